//! The collector's plain listener for machines: `/metrics`, `/healthz`, `/readyz`.

use std::fmt::Write as _;

use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::{Response, StatusCode};
use serde_json::json;

use crate::collect::store::Store;
use crate::server::{ReplyBody, whole};
use crate::time::{Clock, UnixMs};

/// Nodes of which the metrics tell one by one.
const NODES_MAX: usize = 1_000;

/// What the listener looks at.
#[derive(Debug)]
pub struct CollectorOps {
    /// The records.
    pub store: Store,
    /// The clock.
    pub clock: Clock,
}

impl CollectorOps {
    /// Answers one request.
    pub async fn answer(&self, path: &str) -> Response<ReplyBody> {
        match path {
            "/healthz" => text(StatusCode::OK, "text/plain", "ok\n".to_owned()),
            "/readyz" => {
                let unusable = self.store.chains().await.err();
                let reasons: Vec<String> = unusable.map(|error| error.to_string()).into_iter().collect();
                let ready = reasons.is_empty();
                let status = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
                text(status, "application/json", json!({ "ready": ready, "reasons": reasons }).to_string())
            }
            "/metrics" => text(
                StatusCode::OK,
                "application/openmetrics-text; version=1.0.0; charset=utf-8",
                self.metrics().await,
            ),
            _ => text(StatusCode::NOT_FOUND, "text/plain", "not found\n".to_owned()),
        }
    }

    async fn metrics(&self) -> String {
        let Ok(mut chains) = self.store.chains().await else { return "# EOF\n".to_owned() };
        // Of each node the chain that was heard of last.
        chains
            .sort_by(|(_, one), (_, other)| (&one.node, other.last_seen).cmp(&(&other.node, one.last_seen)));
        let forked = chains.iter().filter(|(_, chain)| chain.forked_at.is_some()).count();
        let incomplete = chains.iter().filter(|(_, chain)| !chain.missing.is_empty()).count();
        let mut lines = String::new();
        // Writing to a string cannot fail.
        let _ = writeln!(
            lines,
            "# HELP keybrake_collect_chains Chains by state\n# TYPE keybrake_collect_chains gauge\n\
             keybrake_collect_chains{{state=\"all\"}} {}\nkeybrake_collect_chains{{state=\"forked\"}} {forked}\n\
             keybrake_collect_chains{{state=\"incomplete\"}} {incomplete}",
            chains.len()
        );
        chains.dedup_by(|(_, later), (_, first)| later.node == first.node);
        chains.truncate(NODES_MAX);
        let mut gauge = |name: &str, help: &str, of: &dyn Fn(&crate::collect::chain::Chain) -> u64| {
            let _ = writeln!(lines, "# HELP {name} {help}\n# TYPE {name} gauge");
            for (_, chain) in &chains {
                let node = chain.node.replace('\\', "\\\\").replace('"', "\\\"");
                let _ = writeln!(lines, "{name}{{node=\"{node}\"}} {}", of(chain));
            }
        };
        let now = self.clock.now();
        let age = |at: u64| now.millis_since(UnixMs::from_millis(at)) / 1_000;
        gauge("keybrake_collect_records", "Last record of each node's chain", &|chain| chain.head_seq);
        gauge("keybrake_collect_backlog", "Records that wait at each node", &|chain| chain.backlog);
        gauge("keybrake_collect_silent_seconds", "Since each node was heard of", &|chain| {
            age(chain.last_seen)
        });
        lines + "# EOF\n"
    }
}

fn text(status: StatusCode, kind: &'static str, body: String) -> Response<ReplyBody> {
    let mut response = Response::new(whole(body));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}
