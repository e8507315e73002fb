//! `audit explain`: what was decided about a call or a request and why, record by record, in plain words.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};

use crate::audit::Entry;
use crate::audit::words::sentences;
use crate::cli::Json;
use crate::cli::client::Client;
use crate::cli::output::line;

/// The fields by which somebody may know a call; `GET /audit` has a filter for each.
const NAMES: &[&str] =
    &["call_id", "hold_id", "request_id", "stripe_request_id", "object_id", "idempotency_key"];

/// Records by chain and sequence: a collector has many chains, and each has a record 1.
type Found = BTreeMap<(String, u64), Value>;

/// Tells what a running sidecar has recorded.
pub(super) async fn of_sidecar(client: &Client, id: &str, json: Json) -> Result<ExitCode> {
    let mut found = Found::new();
    for field in NAMES {
        keep(&mut found, records_of(client, field, id).await?);
    }
    for call in calls_of(&found) {
        keep(&mut found, records_of(client, "call_id", &call).await?);
    }
    show(id, &found, json)
}

/// Tells what an exported file says.
pub(super) fn of_file(path: &Path, id: &str, json: Json) -> Result<ExitCode> {
    let mut found = records_in(path, |record| is_named(record, id))?;
    let calls = calls_of(&found);
    // A second time for what the same calls say elsewhere, so that no file has to fit into memory.
    found.extend(records_in(path, |record| {
        record["call_id"].as_str().is_some_and(|call| calls.contains(call))
    })?);
    show(id, &found, json)
}

async fn records_of(client: &Client, field: &str, value: &str) -> Result<Vec<Value>> {
    let query = [(field, value), ("events", "all")].map(|(name, value)| (name.to_owned(), value.to_owned()));
    client.list("/audit", &query, usize::MAX).await
}

fn records_in(path: &Path, wanted: impl Fn(&Value) -> bool) -> Result<Found> {
    let cannot = || format!("cannot read {}", path.display());
    let mut found = Found::new();
    for (at, text) in BufReader::new(File::open(path).with_context(cannot)?).lines().enumerate() {
        let text = text.with_context(cannot)?;
        if text.trim().is_empty() {
            continue;
        }
        let record: Value =
            serde_json::from_str(&text).with_context(|| format!("line {} is no record", at + 1))?;
        if wanted(&record) {
            keep(&mut found, [record]);
        }
    }
    Ok(found)
}

fn is_named(record: &Value, id: &str) -> bool {
    NAMES.iter().any(|field| record[*field] == id)
}

fn keep(found: &mut Found, records: impl IntoIterator<Item = Value>) {
    found.extend(records.into_iter().filter_map(|record| Some((place_of(&record)?, record))));
}

fn place_of(record: &Value) -> Option<(String, u64)> {
    Some((record["chain_id"].as_str()?.to_owned(), record["seq"].as_u64()?))
}

/// The records of all chains by their time, those of one chain in its own order: an operator may have set its clock back.
fn in_order(found: &Found) -> Vec<&Value> {
    let (mut chain, mut latest) = ("", "");
    let mut timed = Vec::new();
    for ((of, _), record) in found {
        let at = record["at"].as_str().unwrap_or_default();
        latest = if chain == of { latest.max(at) } else { at };
        chain = of;
        timed.push((latest, record));
    }
    // Stable: equal times stay in the order of chain and sequence.
    timed.sort_by_key(|(at, _)| *at);
    timed.into_iter().map(|(_, record)| record).collect()
}

fn calls_of(found: &Found) -> BTreeSet<String> {
    found.values().filter_map(|record| record["call_id"].as_str().map(str::to_owned)).collect()
}

/// What a record says; a newer version may have events that this one has no words for.
fn said_by(record: &Value) -> Vec<String> {
    match serde_json::from_value::<Entry>(record.clone()) {
        Ok(entry) => sentences(&entry),
        Err(_) => vec!["This version of keybrake has no words for this record.".to_owned()],
    }
}

fn show(id: &str, found: &Found, json: Json) -> Result<ExitCode> {
    if found.is_empty() {
        bail!("no record names {id}: give a call, a hold, a request, an object or an idempotency key");
    }
    if json.json {
        let events: Vec<Value> = in_order(found)
            .into_iter()
            .map(|record| json!({ "record": record, "says": said_by(record) }))
            .collect();
        line(&json!({ "id": id, "events": events }).to_string());
        return Ok(ExitCode::SUCCESS);
    }
    let mut before = Vec::new();
    for record in in_order(found) {
        let seq = &record["seq"];
        let text = |field: &str| record[field].as_str().unwrap_or("-").to_owned();
        line(&format!("{}  {} of {}, record {seq}", text("at"), text("event"), text("call_id")));
        let says = said_by(record);
        // What the record before has said as well is no news.
        for sentence in says.iter().filter(|sentence| !before.contains(*sentence)) {
            line(&format!("    {sentence}"));
        }
        before = says;
    }
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_of_two_chains_are_told_by_their_time_and_each_chain_in_its_own_order() {
        let record = |chain: &str, seq: u64, second: u64| json!({ "chain_id": chain, "seq": seq, "at": format!("2026-07-01T10:00:{second:02}.000Z") });
        let mut found = Found::new();
        // The clock of b was set back between its records 10 and 11. One record is found twice.
        for records in [
            vec![record("b", 2, 0), record("b", 10, 20), record("b", 11, 5)],
            vec![record("a", 2, 10), record("a", 3, 30), record("b", 10, 20)],
        ] {
            keep(&mut found, records);
        }
        let told = in_order(&found).into_iter();
        let order: Vec<_> = told.map(|one| (one["chain_id"].as_str(), one["seq"].as_u64())).collect();
        let expected = [("b", 2), ("a", 2), ("b", 10), ("b", 11), ("a", 3)];
        assert_eq!(order, expected.map(|(chain, seq)| (Some(chain), Some(seq))));
    }
}
