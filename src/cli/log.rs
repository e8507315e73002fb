//! `audit`: the log of a sidecar, or of a file.
#![expect(clippy::doc_markdown, reason = "doc comments of arguments are the text of --help")]

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result};
use clap::Subcommand;
use serde_json::Value;

use crate::cli::client::{Client, PAGE};
use crate::cli::output::{complain, line, sink};
use crate::cli::verify::{self, Expected};
use crate::cli::{Json, Target, Usage, client, explain, show_list};

/// Records that `audit query` shows unless asked otherwise.
const RECORDS_DEFAULT: usize = 100;
/// How often `audit tail` looks.
const TAIL_PAUSE_MS: u64 = 1_000;

#[derive(Debug, Subcommand)]
pub(super) enum Audit {
    /// Show records, newest first: one row for each call, and every refusal and replay
    Query {
        /// A filter of GET /audit, such as customer=cus_9, outcome=spent, hold_id=hold_…, request_id=req_… or
        /// metadata[flow]=billing; may be repeated
        filters: Vec<String>,
        /// Every event instead of one row for each call
        #[arg(long)]
        all_events: bool,
        /// Records at most
        #[arg(long, default_value_t = RECORDS_DEFAULT)]
        limit: usize,
    },
    /// Tell in plain words what was decided about a call or request, and why
    Explain {
        /// call_…, hold_…, a Request-Id, an object such as ch_…, or an idempotency key
        id: String,
        /// Look in a file of exported records instead of asking a sidecar
        #[arg(long)]
        file: Option<PathBuf>,
    },
    /// Write all records, oldest first, one JSON object a line; tells on standard error how many, and the head
    Export {
        /// A filter as in `query`; may be repeated. Filtered records are no chain any more
        filters: Vec<String>,
        /// Write into this file, readable for its owner alone, instead of standard output
        #[arg(long)]
        out: Option<PathBuf>,
    },
    /// Print the records that there are, oldest first, one JSON object a line (with or without --json)
    Tail {
        /// Go on with new records as they come, until it is stopped
        #[arg(long)]
        follow: bool,
    },
    /// Check the hash chain of a sidecar, or of a file of exported records: exit 0 whole, 1 broken
    Verify {
        /// A file with one record a line, oldest first, as `audit export` writes them
        #[arg(long)]
        file: Option<PathBuf>,
        /// The hash that the last record of the file must have; without it nobody sees that the last lines are gone
        #[arg(long, requires = "file")]
        head: Option<String>,
        /// How many records the file must have
        #[arg(long, requires = "file")]
        records: Option<u64>,
    },
}

/// Runs a command on the audit log.
pub(super) async fn audit(command: Audit, target: &Target) -> Result<ExitCode> {
    match command {
        Audit::Query { filters, all_events, limit } => {
            let mut query = pairs(&filters)?;
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
        Audit::Explain { id, file: Some(file) } => explain::of_file(&file, &id, target.json),
        Audit::Explain { id, file: None } => explain::of_sidecar(&client(target)?, &id, target.json).await,
        Audit::Export { filters, out } => {
            export(&client(target)?, &pairs(&filters)?, out.as_deref(), target.json).await
        }
        Audit::Tail { follow } => tail(&client(target)?, follow).await,
        Audit::Verify { file: Some(file), head, records } => {
            let state = verify::file(&file, &Expected { head, records })?;
            Ok(show_verdict(&state, target.json))
        }
        Audit::Verify { file: None, .. } => {
            let state = client(target)?.get("/audit/verify", &[]).await?;
            Ok(show_verdict(&state, target.json))
        }
    }
}

fn pairs(filters: &[String]) -> Result<Vec<(String, String)>, Usage> {
    let pair = |filter: &String| match filter.split_once('=') {
        Some((name, value)) => Ok((name.to_owned(), value.to_owned())),
        None => Err(Usage(format!("{filter}: write NAME=VALUE"))),
    };
    filters.iter().map(pair).collect()
}

/// The log from the oldest record on, page by page.
struct Pages<'a> {
    client: &'a Client,
    query: Vec<(String, String)>,
    cursor: Option<String>,
    /// Records behind the cursor that were given out: the last page names none to go on from.
    given: usize,
}

impl<'a> Pages<'a> {
    fn new(client: &'a Client, filters: &[(String, String)]) -> Self {
        let fixed = [("events", "all"), ("order", "asc"), ("limit", &PAGE.to_string())]
            .map(|(name, value)| (name.to_owned(), value.to_owned()));
        Self { client, query: [filters, fixed.as_slice()].concat(), cursor: None, given: 0 }
    }

    /// The next records, and whether there are more already.
    async fn next(&mut self) -> Result<(Vec<Value>, bool)> {
        let mut query = self.query.clone();
        query.extend(self.cursor.clone().map(|cursor| ("cursor".to_owned(), cursor)));
        let mut page = self.client.get("/audit", &query).await?;
        let mut records = page["data"].as_array_mut().map(std::mem::take).unwrap_or_default();
        let on_page = records.len();
        records.drain(..self.given.min(on_page));
        let next = page["next_cursor"].as_str().map(str::to_owned);
        let has_more = next.is_some();
        if has_more {
            (self.cursor, self.given) = (next, 0);
        } else {
            self.given = on_page;
        }
        Ok((records, has_more))
    }
}

/// Prints what there is, and goes on as records come when it is asked to.
async fn tail(client: &Client, follow: bool) -> Result<ExitCode> {
    let mut pages = Pages::new(client, &[]);
    loop {
        let (records, has_more) = pages.next().await?;
        for record in records {
            line(&record.to_string());
        }
        match (has_more, follow) {
            (true, _) => {}
            (false, true) => tokio::time::sleep(Duration::from_millis(TAIL_PAUSE_MS)).await,
            (false, false) => return Ok(ExitCode::SUCCESS),
        }
    }
}

/// Writes what there is, and tells what `verify` needs to know that all of it is there.
async fn export(
    client: &Client,
    filters: &[(String, String)],
    out: Option<&Path>,
    json: Json,
) -> Result<ExitCode> {
    let cannot = || format!("cannot write {}", out.unwrap_or(Path::new("to standard output")).display());
    let mut sink = sink(out).with_context(cannot)?;
    let mut pages = Pages::new(client, filters);
    let (mut count, mut head) = (0_u64, String::new());
    loop {
        let (records, has_more) = pages.next().await?;
        for record in records {
            writeln!(sink, "{record}").with_context(cannot)?;
            record["hash"].as_str().unwrap_or_default().clone_into(&mut head);
            count += 1;
        }
        if !has_more {
            break;
        }
    }
    sink.finish().with_context(cannot)?;
    // A collector has many chains, and one of them is a chain too.
    let is_chain = filters.iter().all(|(name, _)| name == "chain_id");
    complain(&match (json.json, is_chain) {
        (true, _) => serde_json::json!({ "records": count, "head": is_chain.then_some(head) }).to_string(),
        (false, true) => format!("{count} records, head {head}"),
        (false, false) => {
            format!("{count} records by a filter: they are no chain, and cannot be verified as one")
        }
    });
    Ok(ExitCode::SUCCESS)
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
