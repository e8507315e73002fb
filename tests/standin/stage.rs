//! Operations that the stand-in does not know, as a test plays them: invoices, subscriptions and the like go through the
//! same idempotency layer and the same faults as a charge, and what they move is in the same oracle.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::{Value, json};

use super::bank::{Bank, Context, GENERIC, Kind, Movement};
use super::errors::{self, Failure};
use super::form::Params;
use super::orders::Route;

/// One operation and the object that it makes or changes.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Play {
    /// What is posted to: `/v1/invoices/in_1/pay`.
    pub(crate) path: String,
    /// Where its object is read: `/v1/invoices/in_1`. It is also in the list of its folder.
    pub(crate) record: String,
    /// The object before; null while there is none.
    #[serde(default)]
    pub(crate) before: Value,
    /// The object that an execution leaves and answers, with the metadata of the request.
    pub(crate) after: Value,
    /// What an execution moves, in US cents.
    pub(crate) amount: u64,
}

#[derive(Debug, Default)]
pub(super) struct Stage {
    plays: BTreeMap<String, Play>,
    records: BTreeMap<String, Value>,
}

impl Stage {
    pub(super) fn put(&mut self, play: Play) {
        if !play.before.is_null() {
            self.records.insert(play.record.clone(), play.before.clone());
        }
        self.plays.insert(play.path.clone(), play);
    }

    /// A request of a play: to its operation, its record, or the list of it.
    pub(super) fn route(&self, method: &str, path: &str) -> Option<Route> {
        match method {
            "POST" => self.plays.contains_key(path).then_some(Route::Performed),
            "GET" => {
                let is_of = |play: &Play| play.record == path || folder(&play.record) == path;
                self.plays.values().any(is_of).then_some(Route::Recalled)
            }
            _ => None,
        }
    }
}

fn folder(record: &str) -> &str {
    record.rsplit_once('/').map_or("", |(folder, _)| folder)
}

impl Bank {
    pub(super) fn perform(
        &mut self,
        context: &Context<'_>,
        path: &str,
        params: &Params,
    ) -> Result<Value, Failure> {
        let play = self.stage.plays.get(path).cloned().ok_or_else(|| errors::unrecognized("POST", path))?;
        if context.declined {
            return Err(GENERIC.failure(&self.id("ch")));
        }
        let mut answer = play.after;
        if let Some(metadata) = params.value("metadata") {
            answer["metadata"] = metadata.clone();
        }
        let movement = Movement {
            kind: Kind::Charge,
            object_id: answer["id"].as_str().unwrap_or_default().to_owned(),
            amount: play.amount,
            currency: "usd".to_owned(),
            customer: answer["customer"].as_str().map(str::to_owned),
            metadata: answer["metadata"].as_object().cloned().unwrap_or_default(),
        };
        self.moved(context, movement);
        self.stage.records.insert(play.record, answer.clone());
        Ok(answer)
    }

    pub(super) fn recall(&self, path: &str) -> Result<Value, Failure> {
        let records = &self.stage.records;
        if let Some(record) = records.get(path) {
            return Ok(record.clone());
        }
        if self.stage.plays.values().any(|play| play.record == path) {
            return Err(errors::no_such("object", path, 404, "id"));
        }
        let data: Vec<&Value> =
            records.iter().filter(|(name, _)| folder(name) == path).map(|(_, record)| record).collect();
        Ok(json!({"object": "list", "data": data, "has_more": false, "url": path}))
    }
}
