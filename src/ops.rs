//! The plain listener for machines that look after this one: `/metrics`, `/healthz`, `/readyz`.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::sync::Arc;

use hyper::header::CONTENT_TYPE;
use hyper::{Response, StatusCode};
use prometheus_client::encoding::text::encode;
use prometheus_client::registry::Registry;
use serde_json::json;

use crate::account::AccountState;
use crate::clock::ClockWatch;
use crate::disk;
use crate::ledger::{Ledger, LedgerError};
use crate::server::{ReplyBody, whole};
use crate::ship::Progress;

/// What the listener looks at.
#[derive(Debug)]
pub struct Ops {
    /// The ledger.
    pub ledger: Ledger,
    /// Where its files are; `None` where it is in a database.
    pub data_dir: Option<PathBuf>,
    /// The account.
    pub account: Arc<AccountState>,
    /// The clock's watch.
    pub clock: Arc<ClockWatch>,
    /// How far the log is shipped; `None` where there is no collector.
    pub shipping: Option<Arc<Progress>>,
    /// What is counted.
    pub registry: Registry,
}

impl Ops {
    /// Why the sidecar should get no traffic; empty when it should. Doubts are no reason.
    pub async fn not_ready(&self) -> Vec<String> {
        let mut reasons = Vec::new();
        if self.account.draining() {
            reasons.push("stopping".to_owned());
        }
        reasons.extend(self.account.not_serving());
        if self.account.key_refused() {
            reasons.push("Stripe refuses this sidecar's key, or it lacks a permission".to_owned());
        }
        if let Some(why) = self.ledger.failure() {
            reasons.push(format!("the ledger failed: {why}"));
        }
        if let Ok(Some(_)) = self.ledger.read(|reader| reader.loss()).await {
            reasons.push(LedgerError::Lost.to_string());
        }
        if let Some(ahead) = self.clock.jumped() {
            reasons.push(format!(
                "the clock jumped {} s forward; set it right, then POST /admin/clock",
                ahead.as_secs()
            ));
        }
        reasons
    }

    /// Answers one request.
    pub async fn answer(&self, path: &str) -> Response<ReplyBody> {
        match path {
            "/healthz" => text(StatusCode::OK, "text/plain", "ok\n".to_owned()),
            "/readyz" => {
                let reasons = self.not_ready().await;
                let ready = reasons.is_empty();
                let status = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
                let warnings = match &self.shipping {
                    Some(shipping) => shipping.warnings(&self.ledger).await,
                    None => Vec::new(),
                };
                let body = json!({ "ready": ready, "reasons": reasons, "warnings": warnings });
                text(status, "application/json", body.to_string())
            }
            "/metrics" => self.metrics().await,
            _ => text(StatusCode::NOT_FOUND, "text/plain", "not found\n".to_owned()),
        }
    }

    async fn metrics(&self) -> Response<ReplyBody> {
        let mut out = String::new();
        if encode(&mut out, &self.registry).is_err() {
            return text(StatusCode::INTERNAL_SERVER_ERROR, "text/plain", "cannot be written\n".to_owned());
        }
        let more = self.holds().await + &self.backlog().await + &self.size().await;
        let lost = self.ledger.notes_lost();
        let lost = format!(
            "# HELP keybrake_records_lost Records of reads that were handed over and could not be written\n\
             # TYPE keybrake_records_lost counter\nkeybrake_records_lost_total {lost}\n"
        );
        // The registry's text ends the exposition; these lines belong before that.
        let out = out.replace("# EOF\n", &format!("{more}{lost}# EOF\n"));
        text(StatusCode::OK, "application/openmetrics-text; version=1.0.0; charset=utf-8", out)
    }

    async fn backlog(&self) -> String {
        let Some(shipping) = &self.shipping else { return String::new() };
        let (waiting, since) = shipping.backlog(&self.ledger).await;
        let oldest = since.map_or(0, |since| self.ledger.now().millis_since(since)) / 1_000;
        format!(
            "# HELP keybrake_audit_backlog Audit records that wait for the collector\n\
             # TYPE keybrake_audit_backlog gauge\nkeybrake_audit_backlog {waiting}\n\
             # HELP keybrake_audit_backlog_seconds Age of the oldest of them\n\
             # TYPE keybrake_audit_backlog_seconds gauge\nkeybrake_audit_backlog_seconds {oldest}\n"
        )
    }

    /// What grows; a figure that cannot be told is left out.
    async fn size(&self) -> String {
        let log = self.ledger.read(|reader| reader.log_state()).await.ok();
        let figures = [
            (
                "keybrake_ledger_bytes",
                "What the files of the ledger take",
                self.data_dir.as_deref().and_then(|dir| disk::ledger_bytes(dir).ok()),
            ),
            (
                "keybrake_audit_records",
                "Audit records that are kept here",
                log.map(|log| log.last.saturating_add(1).saturating_sub(log.first)),
            ),
            ("process_resident_memory_bytes", "Resident memory", resident_bytes()),
        ];
        let told = figures.into_iter().filter_map(|(name, help, figure)| {
            Some(format!("# HELP {name} {help}\n# TYPE {name} gauge\n{name} {}\n", figure?))
        });
        told.collect()
    }

    async fn holds(&self) -> String {
        let Ok((counts, oldest)) = self.ledger.search(|reader| reader.hold_census()).await else {
            return String::new();
        };
        let oldest = oldest.map_or(0, |since| self.ledger.now().millis_since(since)) / 1_000;
        let mut lines = String::from("# HELP keybrake_holds Holds by state\n# TYPE keybrake_holds gauge\n");
        for (state, count) in counts {
            let _ = writeln!(lines, "keybrake_holds{{state=\"{state}\"}} {count}");
        }
        // Writing to a string cannot fail.
        let _ = writeln!(
            lines,
            "# HELP keybrake_oldest_doubt_seconds Age of the oldest doubt\n\
             # TYPE keybrake_oldest_doubt_seconds gauge\nkeybrake_oldest_doubt_seconds {oldest}"
        );
        lines
    }
}

/// This process's memory, as Linux tells; `None` where it does not.
fn resident_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.trim().strip_suffix(" kB")?.parse::<u64>().ok()?.checked_mul(1_024)
}

fn text(status: StatusCode, kind: &'static str, body: String) -> Response<ReplyBody> {
    let mut response = Response::new(whole(body));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, hyper::header::HeaderValue::from_static(kind));
    response
}
