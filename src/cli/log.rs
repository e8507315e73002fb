//! `audit`: the log of a sidecar, or of a file.
#![expect(clippy::doc_markdown, reason = "doc comments of arguments are the text of --help")]

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail};
use clap::Subcommand;
use serde_json::{Map, Value, json};

use crate::audit::Verifier;
use crate::cli::client::Client;
use crate::cli::output::line;
use crate::cli::{Json, Target, Usage, client, show_list};

/// Records that `audit query` shows unless asked otherwise.
const RECORDS_DEFAULT: usize = 100;
/// How often `audit tail` looks.
const TAIL_PAUSE_MS: u64 = 1_000;

#[derive(Debug, Subcommand)]
pub(super) enum Audit {
    /// Show records, newest first: one row for each call, and every refusal and replay
    Query {
        /// A filter of GET /audit, such as customer=cus_9, outcome=spent or metadata[flow]=billing; may be repeated
        filters: Vec<String>,
        /// Every event instead of one row for each call
        #[arg(long)]
        all_events: bool,
        /// Records at most
        #[arg(long, default_value_t = RECORDS_DEFAULT)]
        limit: usize,
    },
    /// Print new records as they come, one JSON object a line
    Tail,
    /// Check the hash chain of a sidecar, or of a file of exported records: exit 0 whole, 1 broken
    Verify {
        /// A file with one record a line, oldest first, as `audit tail` prints them
        #[arg(long)]
        file: Option<PathBuf>,
    },
}

/// Runs a command on the audit log.
pub(super) async fn audit(command: Audit, target: &Target) -> Result<ExitCode> {
    match command {
        Audit::Query { filters, all_events, limit } => {
            let mut query = filters
                .iter()
                .map(|filter| {
                    let (name, value) =
                        filter.split_once('=').ok_or_else(|| Usage(format!("{filter}: write NAME=VALUE")))?;
                    Ok((name.to_owned(), value.to_owned()))
                })
                .collect::<Result<Vec<_>, Usage>>()?;
            if all_events {
                query.push(("events".to_owned(), "all".to_owned()));
            }
            let records = client(target)?.list("/audit", &query, limit).await?;
            let columns = [
                ("AT", "/at"),
                ("EVENT", "/event"),
                ("OUTCOME", "/outcome"),
                ("USD", "/usd"),
                ("CODE", "/code"),
                ("CUSTOMER", "/customer"),
                ("OBJECT", "/object_id"),
                ("LABEL", "/label"),
            ];
            show_list(&records, &columns, target.json);
            Ok(ExitCode::SUCCESS)
        }
        Audit::Tail => tail(&client(target)?).await,
        Audit::Verify { file: Some(file) } => verify_file(&file, target.json),
        Audit::Verify { file: None } => {
            let state = client(target)?.get("/audit/verify", &[]).await?;
            Ok(show_verdict(&state, target.json))
        }
    }
}

/// Prints records from the beginning and goes on as they come, until it is stopped.
async fn tail(client: &Client) -> Result<ExitCode> {
    let mut query = vec![("events".to_owned(), "all".to_owned()), ("order".to_owned(), "asc".to_owned())];
    query.push(("limit".to_owned(), "1000".to_owned()));
    let mut after: Option<u64> = None;
    loop {
        let mut asked = query.clone();
        asked.extend(after.map(|after| ("cursor".to_owned(), after.to_string())));
        let page = client.get("/audit", &asked).await?;
        for record in page["data"].as_array().into_iter().flatten() {
            line(&record.to_string());
            after = record["seq"].as_u64().or(after);
        }
        if !page["has_more"].as_bool().unwrap_or(false) {
            tokio::time::sleep(Duration::from_millis(TAIL_PAUSE_MS)).await;
        }
    }
}

fn verify_file(file: &Path, json: Json) -> Result<ExitCode> {
    let text = std::fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
    let mut verifier: Option<Verifier> = None;
    let mut records = 0_u64;
    let mut broken = None;
    for (at, text) in text.lines().enumerate().filter(|(_, text)| !text.trim().is_empty()) {
        let record: Map<String, Value> =
            serde_json::from_str(text).map_err(|_| anyhow!("line {} is no JSON object", at + 1))?;
        let verifier = match &mut verifier {
            Some(verifier) => verifier,
            None => verifier.insert(beginning(&record)?),
        };
        if let Err(found) = verifier.follow_json(&record) {
            broken = Some(found);
            break;
        }
        records += 1;
    }
    let head = verifier.map(|verifier| crate::id::hex(&verifier.head())).unwrap_or_default();
    let state = json!({
        "whole": broken.is_none(),
        "records": records,
        "head": head,
        "first_bad": broken.as_ref().map(crate::audit::Broken::seq),
        "why": broken.as_ref().map(ToString::to_string),
    });
    Ok(show_verdict(&state, json))
}

/// An export may begin in the middle of a chain; what lies before it cannot be checked, and is told by its `seq`.
fn beginning(record: &Map<String, Value>) -> Result<Verifier> {
    let seq = record.get("seq").and_then(Value::as_u64);
    let prev = record.get("prev_hash").and_then(Value::as_str).and_then(crate::id::from_hex);
    match (seq, prev.and_then(|prev| prev.try_into().ok())) {
        (Some(1), _) => Ok(Verifier::default()),
        (Some(seq), Some(prev)) => Ok(Verifier::from_record(seq, prev)),
        (Some(_) | None, _) => bail!("the first line is no audit record"),
    }
}

fn show_verdict(state: &Value, json: Json) -> ExitCode {
    let whole = state["whole"].as_bool().unwrap_or(false);
    if json.json {
        line(&state.to_string());
    } else if whole {
        line(&format!(
            "whole: {} records, head {}",
            state["records"],
            state["head"].as_str().unwrap_or_default()
        ));
    } else {
        line(&format!("BROKEN: {}", state["why"].as_str().unwrap_or_default()));
    }
    if whole { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
