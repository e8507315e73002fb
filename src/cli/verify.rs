//! The check of an exported log: reads a file line by line, without a ledger or a sidecar.

use std::fs::File;
use std::io::{BufRead as _, BufReader};
use std::path::Path;

use anyhow::{Context as _, Result};
use serde_json::{Map, Value, json};

use crate::audit::{Broken, Verifier};
use crate::id::{from_hex, hex};

/// How the file should end, as whoever kept it was told. Without that, a file whose last lines are gone is as whole as one
/// that was exported earlier.
#[derive(Debug, Default)]
pub(super) struct Expected {
    /// The hash of the last record.
    pub(super) head: Option<String>,
    /// How many records there are.
    pub(super) records: Option<u64>,
}

/// What was followed of a file, and where that ended.
#[derive(Debug, Default)]
struct Followed {
    verifier: Option<Verifier>,
    first: u64,
    records: u64,
    broken: Option<(Option<u64>, String)>,
}

/// Follows the chain of a file and says what came of it, as `GET /audit/verify` does.
pub(super) fn file(path: &Path, expected: &Expected) -> Result<Value> {
    let cannot = || format!("cannot read {}", path.display());
    let mut followed = Followed::default();
    for (at, line) in BufReader::new(File::open(path).with_context(cannot)?).split(b'\n').enumerate() {
        let line = line.with_context(cannot)?;
        if line.trim_ascii().is_empty() {
            continue;
        }
        followed.follow(at + 1, &line);
        if followed.broken.is_some() {
            break;
        }
    }
    followed.end(expected);
    let head = followed.verifier.as_ref().map(|verifier| hex(&verifier.head())).unwrap_or_default();
    let (first_bad, why) = followed.broken.unzip();
    Ok(json!({
        "whole": why.is_none(),
        "records": followed.records,
        "first": followed.first,
        "head": head,
        "first_bad": first_bad.flatten(),
        "why": why,
    }))
}

impl Followed {
    fn follow(&mut self, number: usize, line: &[u8]) {
        let record: Option<Map<String, Value>> = serde_json::from_slice(line).ok();
        let verifier = match (&mut self.verifier, &record) {
            (Some(verifier), _) => verifier,
            (None, Some(record)) if begins(record).is_some() => {
                self.first = record["seq"].as_u64().unwrap_or_default();
                self.verifier.insert(begins(record).unwrap_or_default())
            }
            (None, _) => {
                self.broken = Some((None, format!("line {number} is no audit record")));
                return;
            }
        };
        let seq = verifier.records() + 1;
        let verdict = match &record {
            Some(record) => verifier.follow_json(record),
            None => Err(Broken::Unreadable { seq }),
        };
        match verdict {
            Ok(()) => self.records += 1,
            Err(broken) => self.broken = Some((Some(broken.seq()), broken.to_string())),
        }
    }

    /// Compares the end with what it should be.
    fn end(&mut self, expected: &Expected) {
        if self.broken.is_some() {
            return;
        }
        let last = self.verifier.as_ref().map_or(0, Verifier::records);
        let head = self.verifier.as_ref().map(|verifier| hex(&verifier.head()));
        let head_differs = expected.head.as_ref().is_some_and(|wanted| head.as_ref() != Some(wanted));
        self.broken = match expected.records {
            Some(wanted) if self.records > wanted => Some((
                Some(self.first + wanted),
                format!("record {} is one more than the {wanted} that there should be", self.first + wanted),
            )),
            Some(wanted) if self.records < wanted && !head_differs && expected.head.is_some() => Some((
                self.first.checked_sub(1),
                format!(
                    "what comes before record {} is missing: {} of {wanted} records",
                    self.first, self.records
                ),
            )),
            Some(wanted) if self.records < wanted => Some((
                Some(last + 1),
                format!(
                    "record {} is missing: the file ends after {} of {wanted} records",
                    last + 1,
                    self.records
                ),
            )),
            Some(_) if head_differs => {
                Some((Some(last), format!("record {last} is not the one that was the head")))
            }
            None if head_differs => Some((
                Some(last + 1),
                format!(
                    "record {} is missing: the file ends at record {last}, which is not the given head",
                    last + 1
                ),
            )),
            Some(_) | None => None,
        };
    }
}

/// An export may begin in the middle of a chain; what lies before it cannot be checked, and is told by its `seq`.
fn begins(record: &Map<String, Value>) -> Option<Verifier> {
    let seq = record.get("seq")?.as_u64()?;
    if seq == 1 {
        return Some(Verifier::default());
    }
    let prev = from_hex(record.get("prev_hash")?.as_str()?)?;
    Some(Verifier::from_record(seq, prev.try_into().ok()?))
}
