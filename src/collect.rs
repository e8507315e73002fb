//! The central collector: takes the records of all sidecars, each once, keeps them, and answers the same `/audit` API for
//! all nodes.
//!
//! # How records travel
//!
//! `POST /collect/v1/batches`, bearer of the node, `Content-Encoding: gzip`, one record a line as
//! [`crate::audit::Sealed::to_line`] writes it, of one chain and in order; `Keybrake-Floor`: the first record that the
//! sender still has, `Keybrake-Backlog`: how many wait. 200 names the last record that is held; 409 says why a batch is
//! not taken (`chain_gap` names what has to come next, `chain_forked` the record that contradicts). Sent again, a record is
//! held once. `GET /collect/v1/chains/{id}` tells what is held of a chain, and who else serves the same Stripe account.

pub mod chain;
pub mod store;
pub mod redb;
pub mod postgres;
pub mod ops;

use std::collections::BTreeMap;
use std::io::Read as _;
use std::path::Path as FilePath;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use axum::Router;
use axum::body::{Bytes, to_bytes};
use axum::extract::{Path, Query, Request, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use flate2::read::GzDecoder;
use serde_json::{Map, Value, json};
use tokio::sync::Semaphore;

use crate::admin::query::Asked;
use crate::admin::records::records_answer;
use crate::collect::chain::{Batch, Chain, Refused};
use crate::collect::store::{Incoming, Store, StoreError};
use crate::id::hex;
use crate::refusal::Refusal;
use crate::secret::Secret;
use crate::time::{Clock, DAY_MS, UnixMs};

/// The largest batch as it travels, in bytes.
const BATCH_BYTES_MAX: usize = 4 << 20;
/// The same unpacked.
const UNPACKED_BYTES_MAX: u64 = 32 << 20;
/// Two ledgers of one account that both sent something within so long serve it side by side.
const BESIDE_MS: u64 = DAY_MS;
/// Batches that are read and unpacked at one time; the next ones are told to come again.
pub const BATCHES_AT_ONCE: usize = 16;
/// How long the body of a batch may take.
const BODY_TIMEOUT_MS: u64 = 30_000;
/// Chains that one answer lists.
const CHAINS_SHOWN_MAX: usize = 10_000;
/// Refused batches that one answer shows.
const EVIDENCE_SHOWN_MAX: usize = 20;

/// A node and the token by which it is known.
#[derive(Clone, Debug)]
pub struct NodeToken {
    /// The sidecar's `NODE`.
    pub node: String,
    /// Its `COLLECTOR_TOKEN`.
    pub token: Secret,
}

/// Reads a file of tokens: one `node token` a line, `#` begins a comment. A node may have two while one is rotated.
///
/// # Errors
/// Names the line and what is wrong with it, never the token.
pub fn parse_tokens(text: &str) -> Result<Vec<NodeToken>, String> {
    let mut tokens: Vec<NodeToken> = Vec::new();
    for (at, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let bad = |why: &str| Err(format!("line {}: {why}", at + 1));
        // A node's name may hold spaces; a token may not.
        let Some((node, token)) = line.rsplit_once(char::is_whitespace) else {
            return bad("is not `node token`");
        };
        if token.len() < TOKEN_CHARS_MIN || !token.bytes().all(|byte| byte.is_ascii_graphic()) {
            return bad("the token needs 32 printable ASCII characters or more");
        }
        if tokens.iter().any(|known| known.token.matches(token)) {
            return bad("the token is another line's too: every node needs its own");
        }
        tokens.push(NodeToken { node: node.trim().to_owned(), token: Secret::new(token) });
    }
    if tokens.is_empty() { Err("names no node".to_owned()) } else { Ok(tokens) }
}

/// Characters of a token at least.
pub const TOKEN_CHARS_MIN: usize = 32;

/// What the handlers share.
#[derive(Debug)]
pub struct Collector {
    /// The records.
    pub store: Store,
    /// Who may send.
    pub tokens: RwLock<Vec<NodeToken>>,
    /// Who may ask.
    pub query_key: RwLock<Option<Secret>>,
    /// Room for batches that are read and unpacked at one time.
    pub room: Semaphore,
    /// The clock.
    pub clock: Clock,
}

/// Why something is not answered.
struct No(StatusCode, &'static str, String, Map<String, Value>);

impl IntoResponse for No {
    fn into_response(self) -> Response {
        let Self(status, code, message, more) = self;
        let mut error = Map::new();
        error.insert("type".to_owned(), Value::from("invalid_request_error"));
        error.insert("code".to_owned(), Value::from(code));
        error.insert("message".to_owned(), Value::from(message));
        error.extend(more);
        json_answer(status, &json!({ "error": error }))
    }
}

impl From<StoreError> for No {
    fn from(error: StoreError) -> Self {
        let message = error.to_string();
        let (status, code, more) = match error {
            StoreError::Unavailable(_) | StoreError::Locked => {
                (StatusCode::SERVICE_UNAVAILABLE, "collector_unavailable", Map::new())
            }
            StoreError::Refused(refused) => told_of(&refused),
        };
        Self(status, code, message, more)
    }
}

impl From<Refusal> for No {
    fn from(refusal: Refusal) -> Self {
        let mut more = Map::new();
        more.insert("param".to_owned(), refusal.param.clone().map_or(Value::Null, Value::from));
        let status = StatusCode::from_u16(refusal.status).unwrap_or(StatusCode::BAD_REQUEST);
        Self(status, refusal.code.as_str(), refusal.message, more)
    }
}

fn told_of(refused: &Refused) -> (StatusCode, &'static str, Map<String, Value>) {
    let mut more = Map::new();
    let (status, code) = match refused {
        Refused::Unreadable(line) => {
            more.insert("line".to_owned(), Value::from(*line));
            (StatusCode::BAD_REQUEST, "batch_unreadable")
        }
        Refused::Broken(seq) => {
            more.insert("seq".to_owned(), Value::from(*seq));
            (StatusCode::CONFLICT, "chain_broken")
        }
        Refused::Gap { next } => {
            more.insert("next".to_owned(), Value::from(*next));
            (StatusCode::CONFLICT, "chain_gap")
        }
        Refused::Forked(seq) => {
            more.insert("seq".to_owned(), Value::from(*seq));
            (StatusCode::CONFLICT, "chain_forked")
        }
        Refused::Foreign => (StatusCode::FORBIDDEN, "chain_foreign"),
    };
    (status, code, more)
}

type Answer = Result<Response, No>;
type Shared = State<Arc<Collector>>;

/// Who asks.
enum Asker {
    Node(String),
    Query,
}

impl Collector {
    fn asker(&self, headers: &HeaderMap) -> Result<Asker, No> {
        let no =
            |message: &str| No(StatusCode::UNAUTHORIZED, "token_invalid", message.to_owned(), Map::new());
        let sent = headers
            .get(header::AUTHORIZATION)
            .and_then(|value| value.to_str().ok()?.strip_prefix("Bearer "))
            .ok_or_else(|| no("Send a key: 'Authorization: Bearer …'."))?;
        // Every key is compared, so that the time says nothing about which one was close.
        let tokens = self.tokens.read().unwrap_or_else(PoisonError::into_inner);
        let node =
            tokens.iter().fold(
                None,
                |found: Option<&str>, known| {
                    if known.token.matches(sent) { Some(&known.node) } else { found }
                },
            );
        let query = self.query_key.read().unwrap_or_else(PoisonError::into_inner);
        let asks = query.as_ref().is_some_and(|key| key.matches(sent));
        match (node, asks) {
            (Some(node), _) => Ok(Asker::Node(node.to_owned())),
            (None, true) => Ok(Asker::Query),
            (None, false) => Err(no("This key opens nothing here.")),
        }
    }

    fn node(&self, headers: &HeaderMap) -> Result<String, No> {
        match self.asker(headers)? {
            Asker::Node(node) => Ok(node),
            Asker::Query => Err(No(
                StatusCode::FORBIDDEN,
                "token_invalid",
                "This needs the token of a node; the query key was sent.".to_owned(),
                Map::new(),
            )),
        }
    }
}

/// The routes.
pub fn router(collector: Arc<Collector>) -> Router {
    Router::new()
        .route("/collect/v1/batches", post(take))
        .route("/collect/v1/chains/{id}", get(held))
        .route("/audit", get(records))
        .route("/audit/nodes", get(nodes))
        .route("/audit/verify", get(verify))
        .route("/audit/evidence", get(evidence))
        .fallback(unknown_path)
        .with_state(collector)
}

async fn unknown_path() -> No {
    No(StatusCode::NOT_FOUND, "not_found", "There is nothing at this path.".to_owned(), Map::new())
}

async fn take(State(collector): Shared, request: Request) -> Answer {
    // Nobody else's body is read.
    let (head, body) = request.into_parts();
    let (node, headers) = (collector.node(&head.headers)?, head.headers);
    let busy = |_| {
        let message = "Too many batches at once; send it again.".to_owned();
        No(StatusCode::SERVICE_UNAVAILABLE, "overloaded", message, Map::new())
    };
    let _room = collector.room.try_acquire().map_err(busy)?;
    let body = tokio::time::timeout(Duration::from_millis(BODY_TIMEOUT_MS), to_bytes(body, BATCH_BYTES_MAX));
    let body = body.await.ok().and_then(Result::ok).ok_or_else(|| {
        let message = "The body is larger than 4 MiB, or did not come.".to_owned();
        No(StatusCode::BAD_REQUEST, "batch_unreadable", message, Map::new())
    })?;
    let body = unpacked(&headers, &body)?;
    let batch = tokio::task::spawn_blocking(move || chain::read(&body)).await;
    let batch: Batch = batch.unwrap_or(Err(Refused::Unreadable(1))).map_err(StoreError::from)?;
    if batch.origin.node != node {
        tracing::warn!(node, claimed = batch.origin.node, "a node sent records under another's name");
        return Err(StoreError::from(Refused::Foreign).into());
    }
    let number = |name: &str| headers.get(name).and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    let incoming = Incoming {
        floor: number("keybrake-floor").unwrap_or(1),
        backlog: number("keybrake-backlog").unwrap_or(0),
        batch,
    };
    let id = incoming.batch.origin.chain_id.clone();
    let chain = collector.store.take(incoming).await?;
    Ok(json_answer(StatusCode::OK, &held_of(&id, &chain)))
}

fn held_of(id: &str, chain: &Chain) -> Value {
    json!({ "chain_id": id, "seq": chain.head_seq, "hash": chain.head_hash, "state": chain.state() })
}

fn unpacked(headers: &HeaderMap, body: &Bytes) -> Result<Vec<u8>, No> {
    let coding = headers.get(header::CONTENT_ENCODING).map(HeaderValue::as_bytes);
    let bad = |status, message: &str| No(status, "batch_unreadable", message.to_owned(), Map::new());
    match coding {
        None => Ok(body.to_vec()),
        Some(b"gzip") => {
            let mut text = Vec::new();
            let read = GzDecoder::new(body.as_ref()).take(UNPACKED_BYTES_MAX + 1).read_to_end(&mut text);
            if read.is_err() {
                return Err(bad(StatusCode::BAD_REQUEST, "The body is no whole gzip."));
            }
            if text.len() as u64 > UNPACKED_BYTES_MAX {
                return Err(bad(StatusCode::PAYLOAD_TOO_LARGE, "The batch unpacks to more than 32 MiB."));
            }
            Ok(text)
        }
        Some(_) => Err(bad(StatusCode::UNSUPPORTED_MEDIA_TYPE, "Content-Encoding must be gzip.")),
    }
}

async fn held(State(collector): Shared, headers: HeaderMap, Path(id): Path<String>) -> Answer {
    let node = collector.node(&headers)?;
    let chains = collector.store.chains().await?;
    let own = chains.iter().find(|(known, _)| *known == id).map(|(_, chain)| chain);
    if own.is_some_and(|chain| chain.node != node) {
        return Err(StoreError::from(Refused::Foreign).into());
    }
    let beside: Vec<Value> = own
        .map(|own| beside(&chains, &own.ledger_id, own, collector.clock.now()))
        .unwrap_or_default()
        .into_iter()
        .map(|(_, chain)| json!({ "node": chain.node, "ledger_id": chain.ledger_id }))
        .collect();
    let held = own.map_or(Value::Null, |chain| held_of(&id, chain));
    Ok(json_answer(StatusCode::OK, &json!({ "held": held, "beside": beside })))
}

/// Chains of other ledgers that serve the same Stripe account now: their caps and memories are not one.
fn beside<'a>(
    chains: &'a [(String, Chain)],
    ledger_id: &str,
    own: &Chain,
    now: UnixMs,
) -> Vec<&'a (String, Chain)> {
    let is_beside = |chain: &Chain| {
        chain.ledger_id != ledger_id
            && chain.account.is_some()
            && (&chain.account, &chain.mode) == (&own.account, &own.mode)
            && now.millis().saturating_sub(chain.last_seen) < BESIDE_MS
            && now.millis().saturating_sub(own.last_seen) < BESIDE_MS
    };
    chains.iter().filter(|(_, chain)| is_beside(chain)).collect()
}

async fn records(
    State(collector): Shared,
    headers: HeaderMap,
    Query(query): Query<Vec<(String, String)>>,
) -> Answer {
    collector.asker(&headers)?;
    // A sidecar passes on what its reader may see.
    let (prefix, query): (Vec<_>, Vec<_>) = query.into_iter().partition(|(name, _)| name == "label_prefix");
    let mut asked = Asked::read(query)?;
    let mut filter = asked.records()?;
    filter.label_prefix = prefix.into_iter().next().map(|(_, prefix)| prefix);
    let (after, limit) = asked.page(|text| text.parse().ok())?;
    asked.finish()?;
    let page = collector.store.query(filter, after, limit).await?;
    let mut as_of = BTreeMap::new();
    for (_, chain) in collector.store.chains().await? {
        let seen = as_of.entry(chain.node).or_insert(0);
        *seen = chain.last_seen.max(*seen);
    }
    let as_of: Map<String, Value> = as_of
        .into_iter()
        .map(|(node, at)| (node, Value::from(UnixMs::from_millis(at).to_string())))
        .collect();
    let data: Vec<Value> = page.items.into_iter().map(Value::Object).collect();
    Ok(records_answer(&headers, &data, page.next, Some(as_of)))
}

async fn nodes(State(collector): Shared, headers: HeaderMap) -> Answer {
    collector.asker(&headers)?;
    let (chains, now) = (collector.store.chains().await?, collector.clock.now());
    let mut by_node: BTreeMap<&str, Vec<&(String, Chain)>> = BTreeMap::new();
    for one in chains.iter().take(CHAINS_SHOWN_MAX) {
        by_node.entry(&one.1.node).or_default().push(one);
    }
    let data: Vec<Value> = by_node
        .into_iter()
        .map(|(node, mut own)| {
            own.sort_by_key(|(_, chain)| std::cmp::Reverse(chain.last_seen));
            let last = own.first().map(|(_, chain)| chain);
            let warnings = warnings(&chains, &own, now);
            json!({
                "node": node,
                "last_seen": last.map(|chain| UnixMs::from_millis(chain.last_seen).to_string()),
                "backlog": last.map(|chain| chain.backlog),
                "warnings": warnings,
                "chains": own.iter().map(|(id, chain)| shown(id, chain)).collect::<Vec<_>>(),
            })
        })
        .collect();
    Ok(json_answer(StatusCode::OK, &json!({ "data": data })))
}

fn shown(id: &str, chain: &Chain) -> Value {
    json!({
        "chain_id": id,
        "ledger_id": chain.ledger_id,
        "account": chain.account,
        "mode": chain.mode,
        "state": chain.state(),
        "forked_at": chain.forked_at,
        "missing": chain.missing,
        "first_seq": chain.first_seq,
        "head_seq": chain.head_seq,
        "head": chain.head_hash,
        "first_seen": UnixMs::from_millis(chain.first_seen).to_string(),
        "last_seen": UnixMs::from_millis(chain.last_seen).to_string(),
    })
}

/// What an operator should look at, of one node's chains with the last one first.
fn warnings(all: &[(String, Chain)], own: &[&(String, Chain)], now: UnixMs) -> Vec<String> {
    let mut told = Vec::new();
    if own.len() > 1 {
        told.push(format!(
            "this node has {} chains: its ledger was lost, replaced or restored, and what it remembered before is gone",
            own.len()
        ));
    }
    for (id, chain) in own {
        if let Some(seq) = chain.forked_at {
            told.push(format!(
                "chain {id} was continued in two ways from record {seq} on: a ledger was copied"
            ));
        }
        if let [(first, last), ..] = chain.missing.as_slice() {
            told.push(format!("records {first} to {last} of chain {id} came too late to be had"));
        }
    }
    let others: Vec<&str> = own
        .iter()
        .flat_map(|(_, chain)| beside(all, &chain.ledger_id, chain, now))
        .map(|(_, chain)| chain.node.as_str())
        .filter(|node| own.first().is_none_or(|(_, chain)| chain.node != *node))
        .collect();
    if let Some(other) = others.first() {
        told.push(format!(
            "its Stripe account is served by the ledger of {other} too: caps and memory are not shared between them"
        ));
    }
    told
}

async fn verify(
    State(collector): Shared,
    headers: HeaderMap,
    Query(query): Query<BTreeMap<String, String>>,
) -> Answer {
    collector.asker(&headers)?;
    let wanted = query.get("chain_id");
    let mut verdicts = Vec::new();
    for (id, chain) in collector.store.chains().await? {
        if wanted.is_none_or(|wanted| *wanted == id) {
            verdicts.push(collector.store.verify(&id, &chain).await?);
        }
    }
    let chains: Vec<Value> = verdicts
        .iter()
        .map(|verdict| {
            json!({
                "chain_id": verdict.chain_id,
                "whole": verdict.broken.is_none(),
                "records": verdict.records,
                "head": hex(&verdict.head),
                "first_bad": verdict.broken.as_ref().map(crate::audit::Broken::seq),
                "why": verdict.broken.as_ref().map(ToString::to_string),
            })
        })
        .collect();
    let whole = verdicts.iter().all(|verdict| verdict.broken.is_none());
    let records: u64 = verdicts.iter().map(|verdict| verdict.records).sum();
    Ok(json_answer(StatusCode::OK, &json!({ "whole": whole, "records": records, "chains": chains })))
}

async fn evidence(State(collector): Shared, headers: HeaderMap) -> Answer {
    collector.asker(&headers)?;
    let data = collector.store.evidence(EVIDENCE_SHOWN_MAX).await?;
    Ok(json_answer(StatusCode::OK, &json!({ "data": data })))
}

fn json_answer(status: StatusCode, body: &Value) -> Response {
    let headers = [(header::CONTENT_TYPE, "application/json"), (header::CACHE_CONTROL, "no-store")];
    (status, headers, body.to_string()).into_response()
}

/// Where the records are, in the collector's directory.
pub fn file_in(data_dir: &FilePath) -> std::path::PathBuf {
    data_dir.join("collector.redb")
}
