//! What the doctor says where the ledger is in a database.

use super::{Finding, Verdict, finding};
use crate::config::Config;
use crate::ledger::{Fleet, Run, look_at_fleet};
use crate::postgres::Target;
use crate::time::{Clock, UnixMs};

/// Nodes that are told by name.
const NODES_TOLD: usize = 20;
/// Of a hundred connections, how many may be in use before that is worth a word, and before a start may find none.
const CONNECTIONS_NOTED: i64 = 80;
const CONNECTIONS_BAD: i64 = 95;

/// The database, what is in it, and who uses it.
pub(super) async fn findings(config: &Config, target: &Target) -> Vec<Finding> {
    let mut findings = Vec::new();
    let file = config.data_dir.join("keybrake.redb");
    if file.exists() {
        let told = format!(
            "{} is not used with LEDGER_URL: `keybrake ledger import` takes it over, or move it away",
            file.display()
        );
        findings.push(finding("file", Verdict::Note, told));
    }
    let place = target.place();
    let fleet = match look_at_fleet(target).await {
        Ok(fleet) => fleet,
        Err(error) => {
            findings.push(finding("database", Verdict::Bad, format!("{place}: {error}")));
            return findings;
        }
    };
    findings.push(if target.is_encrypted() {
        finding("database", Verdict::Good, format!("{place} answers, encrypted"))
    } else {
        finding("database", Verdict::Note, format!("{place} answers, not encrypted"))
    });
    findings.extend(connections(&fleet));
    findings.push(ledger(config, &fleet));
    if fleet.binding.is_some() {
        findings.push(sidecars(&fleet.runs));
        findings.push(holds(&fleet, Clock::System.now()));
    }
    findings
}

fn connections(fleet: &Fleet) -> Option<Finding> {
    let (used, most) = fleet.connections?;
    let share = used.saturating_mul(100) / most.max(1);
    let verdict = match share {
        CONNECTIONS_BAD.. => Verdict::Bad,
        CONNECTIONS_NOTED.. => Verdict::Note,
        _ => Verdict::Good,
    };
    let told = format!("{used} of {most} in use (max_connections); a sidecar takes two");
    Some(finding("connections", verdict, told))
}

fn ledger(config: &Config, fleet: &Fleet) -> Finding {
    let known = fleet.known;
    match (fleet.version, &fleet.binding) {
        (None, _) => finding("ledger", Verdict::Note, "the first start makes the schema"),
        (Some(version), _) if version > known => {
            let told = format!(
                "the schema is of version {version}, this build knows up to {known}: use a newer one"
            );
            finding("ledger", Verdict::Bad, told)
        }
        (Some(version), _) if version < known => {
            let told = format!("the schema is of version {version}; the next start brings it to {known}");
            finding("ledger", Verdict::Note, told)
        }
        (Some(version), None) => {
            let told =
                format!("the schema is of version {version} and empty; the first start begins the ledger");
            finding("ledger", Verdict::Note, told)
        }
        (Some(version), Some(binding)) => {
            let account = binding.account.as_deref().unwrap_or("no account yet");
            let is_other = config.stripe_account.as_deref().zip(binding.account.as_deref());
            if binding.mode != config.stripe_mode.as_str() {
                let told = format!(
                    "belongs to {} mode, the Stripe key to {}",
                    binding.mode,
                    config.stripe_mode.as_str()
                );
                finding("ledger", Verdict::Bad, told)
            } else if is_other.is_some_and(|(configured, bound)| configured != bound) {
                finding("ledger", Verdict::Bad, format!("belongs to {account}, not to STRIPE_ACCOUNT"))
            } else {
                let told = format!("schema version {version}, {} mode, {account}", binding.mode);
                finding("ledger", Verdict::Good, told)
            }
        }
    }
}

fn sidecars(runs: &[Run]) -> Finding {
    let living = runs.iter().filter(|run| run.lives()).count();
    let mut told: Vec<String> = runs.iter().take(NODES_TOLD).map(seen).collect();
    if let Some(more) = runs.len().checked_sub(NODES_TOLD).filter(|more| *more > 0) {
        told.push(format!("and {more} more"));
    }
    let verdict = if living == runs.len() { Verdict::Good } else { Verdict::Note };
    finding("sidecars", verdict, format!("{living} of {} live: {}", runs.len(), told.join(", ")))
}

fn seen(run: &Run) -> String {
    let fenced = if run.fenced { ", fenced" } else { "" };
    match run.silent_s {
        Some(silent) => format!("{} (heartbeat {silent} s ago{fenced})", run.node),
        None => format!("{} (gone for days)", run.node),
    }
}

/// What nobody knows the outcome of.
fn holds(fleet: &Fleet, now: UnixMs) -> Finding {
    let at_least = if fleet.has_more_holds { "at least " } else { "" };
    let oldest = fleet.oldest_doubt.map_or_else(String::new, |since| {
        format!(", the oldest for {} min", now.millis_since(since) / 60_000)
    });
    let left = match fleet.left_behind {
        0 => String::new(),
        left => {
            format!("; {left} being sent by sidecars that are gone, doubts as soon as another one sees that")
        }
    };
    let verdict = if fleet.doubts + fleet.left_behind == 0 { Verdict::Good } else { Verdict::Note };
    finding("doubts", verdict, format!("{at_least}{} in doubt{oldest}{left}", fleet.doubts))
}
