//! `ledger`: what is done to a ledger that no sidecar has open.

use std::process::ExitCode;

use anyhow::Result;
use clap::Subcommand;
use serde_json::{Map, Value, json};

use crate::cli::output::line;
use crate::cli::{Json, Usage};
use crate::config::Config;
use crate::id::{BootId, LedgerId};
use crate::ledger::{self, ImportError, Imported, LedgerError, Opening};
use crate::random;
use crate::time::Clock;

#[derive(Debug, Subcommand)]
pub(super) enum Ledger {
    /// Take the ledger file of a stopped sidecar (DATA_DIR) into an empty schema of PostgreSQL (LEDGER_URL), with all that it
    /// knows, and rename the file. Settings as of serve, NODE too
    Import,
}

pub(super) async fn ledger(command: Ledger, json: Json) -> Result<ExitCode> {
    match command {
        Ledger::Import => import(json).await,
    }
}

async fn import(json: Json) -> Result<ExitCode> {
    let config =
        Config::from_env().map_err(|errors| Usage(format!("the configuration has errors\n{errors}")))?;
    let Some(target) = &config.ledger else {
        return Err(Usage("KEYBRAKE_LEDGER_URL names no database to import into".to_owned()).into());
    };
    let now = Clock::System.now();
    let opening = Opening {
        node: config.node.clone(),
        mode: config.stripe_mode,
        clock: Clock::System,
        boot: BootId::new(now, random::bytes()),
        fresh_id: LedgerId::new(now, random::bytes()),
        fresh_salt: random::bytes(),
        audit_days: u32::from(config.audit_days),
        ships: config.collector.is_some(),
    };
    let path = config.data_dir.join("keybrake.redb");
    let imported = match ledger::import(&path, target, &opening, config.stripe_account.as_deref()).await {
        Ok(imported) => imported,
        Err(ImportError::Ledger(error @ LedgerError::BoundElsewhere { .. })) => {
            return Err(Usage(error.to_string()).into());
        }
        Err(ImportError::Ledger(LedgerError::Locked)) => {
            anyhow::bail!("{} is in use: stop the sidecar first", path.display());
        }
        Err(error) => return Err(error.into()),
    };
    tell(&imported, &target.place(), &config.node, json);
    Ok(ExitCode::SUCCESS)
}

fn tell(imported: &Imported, place: &str, node: &str, json: Json) {
    let Imported { ledger, rows, doubts, file } = imported;
    if json.json {
        let rows: Option<Map<String, Value>> = rows.as_ref().map(|rows| {
            rows.iter().map(|(table, count)| ((*table).to_owned(), Value::from(*count))).collect()
        });
        let told = json!({
            "imported": rows.is_some(),
            "ledger_id": ledger.to_string(),
            "node": node,
            "rows": rows,
            "doubts": doubts,
            "file": file.display().to_string(),
        });
        line(&told.to_string());
        return;
    }
    match rows {
        None => line(&format!("all of {ledger} is in {place} already; nothing was written there")),
        Some(rows) => {
            let told: Vec<String> = rows
                .iter()
                .filter(|(table, count)| *count > 0 && *table != "meta")
                .map(|(table, count)| format!("{count} {}", table.replace('_', " ")))
                .collect();
            line(&format!("{ledger} of node {node} is in {place}: {}", told.join(", ")));
            if *doubts > 0 {
                line(&format!("{doubts} calls were being sent when the sidecar ended: they are doubts now"));
            }
        }
    }
    line(&format!("the file is {} now: no sidecar starts from it", file.display()));
}
