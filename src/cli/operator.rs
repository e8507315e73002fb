//! `holds resolve`: an operator says what became of calls in doubt.

use std::process::ExitCode;

use anyhow::Result;
use clap::{Args, ValueEnum};
use serde_json::{Map, Value, json};

use crate::cli::client::Client;
use crate::cli::output::complain;
use crate::cli::{Json, Usage, show_list};
use crate::time::UnixMs;

#[derive(Args, Debug)]
pub(super) struct Resolve {
    /// hold_…; or a filter with --all
    id: Option<String>,
    /// All doubts that the filters leave, instead of one
    #[arg(long, conflicts_with = "id")]
    all: bool,
    /// With --all: only those of this customer
    #[arg(long, requires = "all")]
    customer: Option<String>,
    /// With --all: only those of calls to this path, such as /v1/charges
    #[arg(long, requires = "all")]
    endpoint: Option<String>,
    /// With --all: only those in doubt since this time or later, such as 2026-07-14T08:00:00Z
    #[arg(long, requires = "all")]
    since: Option<String>,
    /// With --all: only those in doubt since before this time
    #[arg(long, requires = "all")]
    until: Option<String>,
    /// What became of it at Stripe
    #[arg(long)]
    outcome: Said,
    /// With spent: minor units that moved, such as 2999
    #[arg(long)]
    amount: Option<u64>,
    /// With spent: the object at Stripe, such as ch_…
    #[arg(long)]
    object_id: Option<String>,
    /// Why, for the audit log
    #[arg(long)]
    reason: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Said {
    /// It was executed
    Spent,
    /// It was not executed
    NotExecuted,
}

pub(super) async fn resolve(client: &Client, resolve: Resolve, json: Json) -> Result<ExitCode> {
    let ids = match (&resolve.id, resolve.all) {
        (Some(id), _) => vec![id.clone()],
        (None, true) if resolve.outcome == Said::Spent => {
            let why =
                "with --all only --outcome not-executed can be said: each charge has an object of its own";
            return Err(Usage(why.to_owned()).into());
        }
        (None, true) => found(client, &resolve).await?,
        (None, false) => return Err(Usage("name a hold, or say --all".to_owned()).into()),
    };
    let mut body = Map::new();
    let said = match resolve.outcome {
        Said::Spent => "spent",
        Said::NotExecuted => "not_executed",
    };
    body.insert("outcome".to_owned(), Value::from(said));
    body.insert("reason".to_owned(), Value::from(resolve.reason));
    body.extend(resolve.amount.map(|amount| ("amount".to_owned(), Value::from(amount))));
    body.extend(resolve.object_id.map(|object| ("object_id".to_owned(), Value::from(object))));
    let (mut ended, mut failed) = (Vec::new(), false);
    for id in ids {
        match client.post(&format!("/admin/holds/{id}/resolve"), &json!(body)).await {
            Ok(hold) => ended.push(hold),
            Err(error) => {
                failed = true;
                complain(&format!("{id}: {error:#}"));
            }
        }
    }
    let columns =
        [("ID", "/id"), ("STATE", "/state"), ("USD", "/usd"), ("OBJECT", "/object_id"), ("CALL", "/call_id")];
    show_list(&ended, &columns, json);
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// The doubts that the filters leave, the oldest first.
async fn found(client: &Client, resolve: &Resolve) -> Result<Vec<String>> {
    let query = [("state".to_owned(), "doubt".to_owned())];
    let mut holds = client.list("/admin/holds", &query, usize::MAX).await?;
    holds.reverse();
    let text = |hold: &Value, field: &str| hold[field].as_str().unwrap_or_default().to_owned();
    let is = |hold: &Value, field: &str, wanted: &Option<String>| {
        wanted.as_ref().is_none_or(|wanted| text(hold, field) == *wanted)
    };
    let (from, to) =
        (time_of("--since", resolve.since.as_deref())?, time_of("--until", resolve.until.as_deref())?);
    let found = holds.iter().filter(|hold| {
        let since = UnixMs::parse(&text(hold, "since")).unwrap_or_default();
        is(hold, "customer", &resolve.customer)
            && is(hold, "endpoint", &resolve.endpoint)
            && from.is_none_or(|from| since >= from)
            && to.is_none_or(|to| since < to)
    });
    Ok(found.map(|hold| text(hold, "id")).collect())
}

fn time_of(flag: &str, given: Option<&str>) -> Result<Option<UnixMs>> {
    let Some(text) = given else { return Ok(None) };
    match UnixMs::parse(text) {
        Some(at) => Ok(Some(at)),
        None => Err(Usage(format!("{flag} must be a time such as 2026-07-14T08:00:00Z")).into()),
    }
}
