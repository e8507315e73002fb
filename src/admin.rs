//! The JSON APIs beside the proxy: `/admin` for keys, holds and calls, `/audit` for the log, `/keybrake` for what a
//! vault key may know of itself.
//!
//! Handlers parse, ask the ledger and answer; what is decided is decided below.

pub mod fields;
pub mod mint;
pub mod operator;
pub mod query;
pub mod records;
pub mod show;

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};

use axum::Router;
use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, Path, Query, Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{Html, IntoResponse, Response};
use axum::routing::{delete, get, post};
use serde_json::{Map, Value, json};

use crate::account::AccountState;
use crate::admin::fields::Fields;
use crate::admin::mint::Birth;
use crate::admin::query::Asked;
use crate::clock::ClockWatch;
use crate::id::{BudgetId, CallId, HoldId, IssuerId, KeyId, LedgerId, RequestId};
use crate::issuer::Issuer;
use crate::key::Key;
use crate::ledger::rules::issuer_revoked;
use crate::ledger::{Actor, Ending, Ledger, LedgerError};
use crate::proxy::read::credential;
use crate::proxy::reply::Reply;
use crate::random;
use crate::refusal::{Code, Refusal};
use crate::secret::{KeyKind, KeySecret, Secret};
use crate::ship::Fleet;
use crate::telemetry::{EndLabels, Metrics};

/// The largest body of an admin request, in bytes.
const BODY_BYTES_MAX: usize = 64 * 1024;

/// What the handlers share.
#[derive(Debug)]
pub struct Admin {
    /// The ledger.
    pub ledger: Ledger,
    /// The account.
    pub account: Arc<AccountState>,
    /// The clock's watch.
    pub clock: Arc<ClockWatch>,
    /// Bearers of `/admin`.
    pub admin_keys: RwLock<Vec<Secret>>,
    /// The default of `remember_days`.
    pub remember_days: u32,
    /// The collector, for what is asked of all nodes.
    pub fleet: Option<Fleet>,
    /// What is counted.
    pub metrics: Metrics,
}

/// A refusal on its way out of a handler.
#[derive(Debug)]
pub struct Refused {
    refusal: Refusal,
    request_id: String,
    at: crate::time::UnixMs,
}

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        let reply = Reply::of_refusal(&self.refusal, &self.request_id, self.at);
        let mut response = Response::new(axum::body::Body::from(reply.body));
        *response.status_mut() =
            StatusCode::from_u16(reply.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        *response.headers_mut() = reply.headers;
        response
    }
}

pub(crate) type Answer = Result<Response, Refused>;
pub(crate) type Shared = State<Arc<Admin>>;

/// Who may ask for records, and of which label.
enum Reader {
    Admin,
    Issuer(Box<Issuer>),
    VaultKey(Box<Key>),
}

impl Admin {
    fn refuse(&self, refusal: Refusal) -> Refused {
        let at = self.ledger.now();
        Refused { refusal, request_id: RequestId::new(at, random::of_id()).to_string(), at }
    }

    fn failed(&self, error: &LedgerError) -> Refused {
        self.refuse(match error {
            LedgerError::NotFound => not_found(),
            LedgerError::Unavailable(_)
            | LedgerError::Corrupt(_)
            | LedgerError::Locked
            | LedgerError::NewerFormat { .. }
            | LedgerError::BoundElsewhere { .. }
            | LedgerError::Lost
            | LedgerError::Contradiction(_) => {
                tracing::error!(%error, "the ledger gave no answer");
                Refusal::ledger_unavailable()
            }
        })
    }

    async fn reader(&self, headers: &HeaderMap) -> Result<Reader, Refused> {
        let unknown = || self.refuse(Refusal::new(Code::VaultKeyInvalid, "This key opens nothing here."));
        let sent = credential(headers).map_err(|_| {
            self.refuse(Refusal::new(Code::VaultKeyInvalid, "Send a key: 'Authorization: Bearer …'."))
        })?;
        // Every key is compared, so that the time says nothing about which one was close.
        let is_admin = {
            let admin = self.admin_keys.read().unwrap_or_else(PoisonError::into_inner);
            admin.iter().fold(false, |found, key| key.matches(&sent) | found)
        };
        if is_admin {
            return Ok(Reader::Admin);
        }
        let secret = KeySecret::parse(&sent).ok_or_else(unknown)?;
        let (digest, now) = (secret.digest().0, self.ledger.now());
        let dead = |refusal| self.refuse(refusal);
        match secret.kind() {
            KeyKind::Issuer => {
                let issuer = self
                    .ok(self.ledger.read(|reader| reader.issuer_by_digest(&digest)).await)?
                    .ok_or_else(unknown)?;
                issuer.alive(now).map_err(dead)?;
                Ok(Reader::Issuer(Box::new(issuer)))
            }
            KeyKind::Vault => {
                let found = self.ledger.read(|reader| {
                    let Some(key) = reader.key_by_digest(&digest)? else { return Ok(None) };
                    let issuer = key.issuer.map(|id| reader.issuer(id)).transpose()?.flatten();
                    Ok(Some((key, issuer)))
                });
                let (key, issuer) = self.ok(found.await)?.ok_or_else(unknown)?;
                key.alive(now).map_err(dead)?;
                if issuer.is_some_and(|issuer| issuer.revoked_at.is_some()) {
                    return Err(dead(issuer_revoked()));
                }
                Ok(Reader::VaultKey(Box::new(key)))
            }
        }
    }

    async fn admin(&self, headers: &HeaderMap) -> Result<Actor, Refused> {
        match self.reader(headers).await? {
            Reader::Admin => Ok(Actor("admin".to_owned())),
            Reader::Issuer(_) | Reader::VaultKey(_) => Err(self.needs_admin()),
        }
    }

    /// The admin key, or an issuer key for what it minted itself.
    async fn minter(&self, headers: &HeaderMap) -> Result<(Actor, Option<Issuer>), Refused> {
        match self.reader(headers).await? {
            Reader::Admin => Ok((Actor("admin".to_owned()), None)),
            Reader::Issuer(issuer) => Ok((Actor(issuer.id.to_string()), Some(*issuer))),
            Reader::VaultKey(_) => Err(self.needs_admin()),
        }
    }

    fn needs_admin(&self) -> Refused {
        self.refuse(Refusal::new(
            Code::AdminKeyRequired,
            "This needs the admin key; a key of a lower kind was sent.",
        ))
    }

    fn ok<T>(&self, result: Result<T, LedgerError>) -> Result<T, Refused> {
        result.map_err(|error| self.failed(&error))
    }

    fn checked<T>(&self, result: Result<T, Refusal>) -> Result<T, Refused> {
        result.map_err(|refusal| self.refuse(refusal))
    }
}

/// The routes.
pub fn router(admin: Arc<Admin>) -> Router {
    Router::new()
        .route("/admin/vault_keys", post(issue_key).get(list_keys))
        .route("/admin/vault_keys/{id}", get(show_key).merge(delete(revoke_key)))
        .route("/admin/issuers", post(create_issuer).get(list_issuers))
        .route("/admin/issuers/{id}", get(show_issuer).merge(delete(revoke_issuer)))
        .route("/admin/budgets/{owner}/{name}", get(show_budget))
        .route("/admin/budgets/{owner}/{name}/resume", post(resume_budget))
        .route("/admin/kill_switch", post(set_kill_switch).get(show_kill_switch))
        .route("/admin/clock", post(lower_clock))
        .route("/admin/ledger/accept_loss", post(accept_loss))
        .route("/admin/holds", get(list_holds))
        .route("/admin/holds/{id}", get(show_hold))
        .route("/admin/holds/{id}/resolve", post(resolve_hold))
        .route("/admin/calls", get(list_calls))
        .route("/admin/calls/{id}", get(show_call))
        .route("/admin/calls/{id}/forget", post(forget_call))
        .route("/audit", get(records::list_records))
        .route("/audit/verify", get(records::verify))
        .route("/keybrake/key", get(own_key))
        .route("/keybrake/errors", get(errors_page))
        .fallback(unknown_path)
        .method_not_allowed_fallback(unknown_method)
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .layer(axum::middleware::from_fn_with_state(Arc::clone(&admin), whole_body))
        .with_state(admin)
}

/// Reads the body within its bounds before anything else, so that a refusal has a shape.
async fn whole_body(State(admin): Shared, request: Request, next: axum::middleware::Next) -> Answer {
    let (head, body) = request.into_parts();
    admin.checked(crate::proxy::read::framing(&head))?;
    // No path here needs an escape, and one that cannot be undone would be answered without a shape.
    if head.uri.path().contains('%') {
        return Err(admin.refuse(not_found()));
    }
    let body = crate::proxy::read::body(&head.headers, body, BODY_BYTES_MAX).await;
    let body = admin.checked(body)?;
    Ok(next.run(Request::from_parts(head, axum::body::Body::from(body))).await)
}

fn json_answer(status: StatusCode, body: &Value) -> Response {
    let headers = [(header::CONTENT_TYPE, "application/json"), (header::CACHE_CONTROL, "no-store")];
    (status, headers, body.to_string()).into_response()
}

fn not_found() -> Refusal {
    Refusal::new(Code::NotFound, "There is nothing at this path.")
}

async fn unknown_path(State(admin): Shared) -> Refused {
    admin.refuse(not_found())
}

async fn unknown_method(State(admin): Shared) -> Refused {
    admin.refuse(Refusal::new(Code::MethodNotAllowed, "This path does not take this method."))
}

// --- keys

async fn issue_key(State(admin): Shared, headers: HeaderMap, body: Bytes) -> Answer {
    let (actor, issuer) = admin.minter(&headers).await?;
    let now = admin.ledger.now();
    let secret = KeySecret::new(KeyKind::Vault, admin.account.mode(), random::bytes());
    let birth = Birth {
        id: KeyId::new(now, random::bytes()),
        digest: secret.digest(),
        now,
        remember_days: admin.remember_days,
        per_request: issuer.as_ref().and_then(|issuer| issuer.per_request),
    };
    let mut key = admin.checked(mint::key_of(&body, birth))?;
    if let Some(issuer) = issuer {
        key = issuer.filled_in(key);
        admin.checked(issuer.may_mint(&key))?;
    }
    let mut answer = Map::new();
    answer.insert("id".to_owned(), Value::from(key.id.to_string()));
    answer.insert("vault_key".to_owned(), Value::from(secret.expose()));
    answer.extend(mint::policy(&key, now));
    admin.ok(admin.ledger.issue_key(key, actor).await)?;
    Ok(json_answer(StatusCode::CREATED, &Value::Object(answer)))
}

async fn list_keys(
    State(admin): Shared,
    headers: HeaderMap,
    Query(query): Query<Vec<(String, String)>>,
) -> Answer {
    let (_, issuer) = admin.minter(&headers).await?;
    let now = admin.ledger.now();
    let mut asked = admin.checked(Asked::read(query))?;
    let mut filter = admin.checked(asked.keys())?;
    let (after, limit) = admin.checked(asked.page(KeyId::parse))?;
    admin.checked(asked.finish())?;
    if let Some(issuer) = issuer {
        filter.issuer = Some(issuer.id);
    }
    let page = admin.ok(admin.ledger.search(move |reader| reader.keys(&filter, after, limit, now)).await)?;
    let data: Vec<Value> = page.items.iter().map(|key| Value::Object(mint::policy(key, now))).collect();
    Ok(list(&data, page.next.map(|id| id.to_string()).as_deref()))
}

async fn show_key(State(admin): Shared, headers: HeaderMap, Path(id): Path<String>) -> Answer {
    admin.admin(&headers).await?;
    let id = KeyId::parse(&id).ok_or_else(|| admin.refuse(not_found()))?;
    let key = admin
        .ok(admin.ledger.read(|reader| reader.key(id)).await)?
        .ok_or_else(|| admin.refuse(not_found()))?;
    with_spend(&admin, &key).await
}

async fn with_spend(admin: &Admin, key: &Key) -> Answer {
    let now = admin.ledger.now();
    let mut answer = mint::policy(key, now);
    answer.insert("mode".to_owned(), Value::from(admin.account.mode().as_str()));
    answer.insert(
        "spend".to_owned(),
        admin.ok(admin.ledger.read(|reader| show::spend(reader, key, now)).await)?,
    );
    Ok(json_answer(StatusCode::OK, &Value::Object(answer)))
}

async fn revoke_key(State(admin): Shared, headers: HeaderMap, Path(id): Path<String>) -> Answer {
    let (actor, issuer) = admin.minter(&headers).await?;
    let id = KeyId::parse(&id).ok_or_else(|| admin.refuse(not_found()))?;
    if let Some(issuer) = issuer {
        // Another's key is not told apart from one that does not exist.
        let key = admin.ok(admin.ledger.read(|reader| reader.key(id)).await)?;
        key.filter(|key| key.issuer == Some(issuer.id)).ok_or_else(|| admin.refuse(not_found()))?;
    }
    let key = admin.ok(admin.ledger.revoke_key(id, actor).await)?;
    Ok(json_answer(StatusCode::OK, &Value::Object(mint::policy(&key, admin.ledger.now()))))
}

async fn own_key(State(admin): Shared, headers: HeaderMap) -> Answer {
    match admin.reader(&headers).await? {
        Reader::VaultKey(key) => with_spend(&admin, &key).await,
        Reader::Admin | Reader::Issuer(_) => {
            Err(admin
                .refuse(Refusal::new(Code::VaultKeyInvalid, "Send a vault key: this path tells of itself.")))
        }
    }
}

// --- issuers and budgets

async fn create_issuer(State(admin): Shared, headers: HeaderMap, body: Bytes) -> Answer {
    let actor = admin.admin(&headers).await?;
    let now = admin.ledger.now();
    let secret = KeySecret::new(KeyKind::Issuer, admin.account.mode(), random::bytes());
    let id = IssuerId::new(now, random::bytes());
    let issuer = admin.checked(mint::issuer_of(&body, id, secret.digest(), now))?;
    let mut answer = Map::new();
    answer.insert("id".to_owned(), Value::from(id.to_string()));
    answer.insert("issuer_key".to_owned(), Value::from(secret.expose()));
    answer.extend(show::issuer(&issuer, now));
    admin.ok(admin.ledger.create_issuer(issuer, actor).await)?;
    Ok(json_answer(StatusCode::CREATED, &Value::Object(answer)))
}

async fn list_issuers(
    State(admin): Shared,
    headers: HeaderMap,
    Query(query): Query<Vec<(String, String)>>,
) -> Answer {
    admin.admin(&headers).await?;
    let now = admin.ledger.now();
    let mut asked = admin.checked(Asked::read(query))?;
    let (after, limit) = admin.checked(asked.page(IssuerId::parse))?;
    admin.checked(asked.finish())?;
    let page = admin.ok(admin.ledger.search(move |reader| reader.issuers(after, limit)).await)?;
    let data: Vec<Value> = page.items.iter().map(|issuer| Value::Object(show::issuer(issuer, now))).collect();
    Ok(list(&data, page.next.map(|id| id.to_string()).as_deref()))
}

async fn show_issuer(State(admin): Shared, headers: HeaderMap, Path(id): Path<String>) -> Answer {
    admin.admin(&headers).await?;
    let id = IssuerId::parse(&id).ok_or_else(|| admin.refuse(not_found()))?;
    let issuer = admin
        .ok(admin.ledger.read(|reader| reader.issuer(id)).await)?
        .ok_or_else(|| admin.refuse(not_found()))?;
    let now = admin.ledger.now();
    let mut answer = show::issuer(&issuer, now);
    answer.insert(
        "spend".to_owned(),
        admin.ok(admin.ledger.read(|reader| show::issuer_spend(reader, &issuer, now)).await)?,
    );
    Ok(json_answer(StatusCode::OK, &Value::Object(answer)))
}

async fn revoke_issuer(State(admin): Shared, headers: HeaderMap, Path(id): Path<String>) -> Answer {
    let actor = admin.admin(&headers).await?;
    let id = IssuerId::parse(&id).ok_or_else(|| admin.refuse(not_found()))?;
    let issuer = admin.ok(admin.ledger.revoke_issuer(id, actor).await)?;
    Ok(json_answer(StatusCode::OK, &Value::Object(show::issuer(&issuer, admin.ledger.now()))))
}

/// Whose budget a path means: an issuer's, or the admin key's.
fn budget_owner(admin: &Admin, owner: &str) -> Result<Option<IssuerId>, Refused> {
    match owner {
        "admin" => Ok(None),
        id => IssuerId::parse(id).map(Some).ok_or_else(|| admin.refuse(not_found())),
    }
}

async fn show_budget(
    State(admin): Shared,
    headers: HeaderMap,
    Path((owner, name)): Path<(String, String)>,
) -> Answer {
    admin.admin(&headers).await?;
    let issuer = budget_owner(&admin, &owner)?;
    budget(&admin, &owner, issuer, &name).await
}

async fn resume_budget(
    State(admin): Shared,
    headers: HeaderMap,
    Path((owner, name)): Path<(String, String)>,
    body: Bytes,
) -> Answer {
    let actor = admin.admin(&headers).await?;
    let issuer = budget_owner(&admin, &owner)?;
    let mut fields = admin.checked(Fields::parse(&body))?;
    let reason = admin.checked(fields.reason())?;
    admin.checked(fields.finish())?;
    admin.ok(admin.ledger.resume_budget(issuer, name.clone(), reason, actor).await)?;
    budget(&admin, &owner, issuer, &name).await
}

async fn budget(admin: &Admin, owner: &str, issuer: Option<IssuerId>, name: &str) -> Answer {
    let id = BudgetId::of(issuer, name);
    let now = admin.ledger.now();
    let found =
        admin.ledger.read(|reader| Ok((reader.stopped_budget(id)?, show::budget_spend(reader, id, now)?)));
    let (stopped, spend) = admin.ok(found.await)?;
    Ok(json_answer(
        StatusCode::OK,
        &json!({
            "owner": owner,
            "name": name,
            "stopped": stopped.is_some(),
            "stopped_at": stopped.as_ref().map(|row| row.since.to_string()),
            "stopped_by": stopped.as_ref().map(|row| row.code.as_str()),
            "spend": spend,
        }),
    ))
}

// --- operator

async fn set_kill_switch(State(admin): Shared, headers: HeaderMap, body: Bytes) -> Answer {
    let actor = admin.admin(&headers).await?;
    let mut fields = admin.checked(Fields::parse(&body))?;
    let on: bool = admin.checked(fields.need("on", "true or false"))?;
    let reason = admin.checked(fields.reason())?;
    admin.checked(fields.finish())?;
    admin.ok(admin.ledger.set_kill_switch(on, reason, actor).await)?;
    kill_switch(&admin).await
}

async fn show_kill_switch(State(admin): Shared, headers: HeaderMap) -> Answer {
    admin.admin(&headers).await?;
    kill_switch(&admin).await
}

async fn kill_switch(admin: &Admin) -> Answer {
    let row = admin.ok(admin.ledger.read(|reader| reader.kill_switch()).await)?;
    Ok(json_answer(
        StatusCode::OK,
        &json!({
            "on": row.is_some(),
            "reason": row.as_ref().map(|row| row.reason.as_str()),
            "since": row.as_ref().map(|row| row.since.to_string()),
        }),
    ))
}

async fn lower_clock(State(admin): Shared, headers: HeaderMap, body: Bytes) -> Answer {
    let actor = admin.admin(&headers).await?;
    let mut fields = admin.checked(Fields::parse(&body))?;
    let reason = admin.checked(fields.reason())?;
    admin.checked(fields.finish())?;
    let (before, after) = admin.ok(admin.ledger.lower_clock(reason, actor).await)?;
    admin.clock.accept();
    Ok(json_answer(StatusCode::OK, &json!({ "before": before.to_string(), "after": after.to_string() })))
}

async fn list_holds(
    State(admin): Shared,
    headers: HeaderMap,
    Query(query): Query<Vec<(String, String)>>,
) -> Answer {
    admin.admin(&headers).await?;
    let mut asked = admin.checked(Asked::read(query))?;
    let state = admin.checked(asked.hold_state())?;
    let (after, limit) = admin.checked(asked.page(HoldId::parse))?;
    admin.checked(asked.finish())?;
    let page =
        admin.ok(admin.ledger.search(move |reader| reader.holds(state.as_deref(), after, limit)).await)?;
    let data: Vec<Value> = page.items.iter().map(|view| show::hold(&view.hold, view.call.as_ref())).collect();
    Ok(list(&data, page.next.map(|id| id.to_string()).as_deref()))
}

async fn show_hold(State(admin): Shared, headers: HeaderMap, Path(id): Path<String>) -> Answer {
    admin.admin(&headers).await?;
    let id = HoldId::parse(&id).ok_or_else(|| admin.refuse(not_found()))?;
    shown_hold(&admin, id).await
}

async fn shown_hold(admin: &Admin, id: HoldId) -> Answer {
    let hold = admin
        .ok(admin.ledger.read(|reader| reader.hold(id)).await)?
        .ok_or_else(|| admin.refuse(not_found()))?;
    let call = admin.ok(admin.ledger.read(|reader| reader.call_by_id(hold.call_id)).await)?;
    Ok(json_answer(StatusCode::OK, &show::hold(&hold, call.as_ref())))
}

/// An operator says what became of a call in doubt.
async fn resolve_hold(
    State(admin): Shared,
    headers: HeaderMap,
    Path(id): Path<String>,
    body: Bytes,
) -> Answer {
    let actor = admin.admin(&headers).await?;
    let id = HoldId::parse(&id).ok_or_else(|| admin.refuse(not_found()))?;
    let end = admin.checked(operator::end_of(&body, &actor))?;
    let what = match admin.ok(admin.ledger.end_doubt(id, end).await)? {
        Ending::Ended => {
            admin.metrics.doubts_settled.get_or_create(&EndLabels { by: "operator" }).inc();
            return shown_hold(&admin, id).await;
        }
        Ending::NotInDoubt => "This hold is not in doubt, so there is nothing to resolve.",
        Ending::OfAnother => "The object belongs to another hold: one object stands for one charge.",
    };
    Err(admin.refuse(Refusal::new(Code::Conflict, what)))
}

/// An operator takes a call back, so that the same call can be made again.
async fn forget_call(
    State(admin): Shared,
    headers: HeaderMap,
    Path(id): Path<String>,
    body: Bytes,
) -> Answer {
    let actor = admin.admin(&headers).await?;
    let id = CallId::parse(&id).ok_or_else(|| admin.refuse(not_found()))?;
    let mut fields = admin.checked(Fields::parse(&body))?;
    let reason = admin.checked(fields.reason())?;
    admin.checked(fields.finish())?;
    match admin.ok(admin.ledger.forget_call(id, reason, actor).await)? {
        Some(call) => Ok(json_answer(StatusCode::OK, &show::call(&call))),
        None => Err(admin.refuse(Refusal::new(
            Code::Conflict,
            "This call is held, in doubt or open, or was forgotten before: only a call that is over can be forgotten.",
        ))),
    }
}

async fn accept_loss(State(admin): Shared, headers: HeaderMap, body: Bytes) -> Answer {
    let actor = admin.admin(&headers).await?;
    let mut fields = admin.checked(Fields::parse(&body))?;
    let reason = admin.checked(fields.reason())?;
    admin.checked(fields.finish())?;
    let fresh = LedgerId::new(admin.ledger.now(), random::bytes());
    if admin.ok(admin.ledger.accept_loss(fresh, reason, actor).await)? {
        return Ok(json_answer(StatusCode::OK, &json!({ "accepted": true, "chain_id": fresh.to_string() })));
    }
    Err(admin.refuse(Refusal::new(
        Code::Conflict,
        "Nothing is known to be lost: the collector holds no record of this ledger that it does not have itself.",
    )))
}

async fn list_calls(
    State(admin): Shared,
    headers: HeaderMap,
    Query(query): Query<Vec<(String, String)>>,
) -> Answer {
    admin.admin(&headers).await?;
    let mut asked = admin.checked(Asked::read(query))?;
    let filter = admin.checked(asked.calls())?;
    let (after, limit) = admin.checked(asked.page(CallId::parse))?;
    admin.checked(asked.finish())?;
    let page = admin.ok(admin.ledger.search(move |reader| reader.calls(&filter, after, limit)).await)?;
    let data: Vec<Value> = page.items.iter().map(show::call).collect();
    Ok(list(&data, page.next.map(|id| id.to_string()).as_deref()))
}

async fn show_call(State(admin): Shared, headers: HeaderMap, Path(id): Path<String>) -> Answer {
    admin.admin(&headers).await?;
    let id = CallId::parse(&id).ok_or_else(|| admin.refuse(not_found()))?;
    let call = admin
        .ok(admin.ledger.read(|reader| reader.call_by_id(id)).await)?
        .ok_or_else(|| admin.refuse(not_found()))?;
    Ok(json_answer(StatusCode::OK, &show::call(&call)))
}

// --- audit

fn list(data: &[Value], next: Option<&str>) -> Response {
    json_answer(StatusCode::OK, &json!({ "data": data, "has_more": next.is_some(), "next_cursor": next }))
}

async fn errors_page() -> Html<String> {
    let rows: BTreeMap<&str, String> = Code::ALL
        .iter()
        .map(|code| {
            let (name, retry) = (code.as_str(), if code.retry() { "yes" } else { "no" });
            (
                name,
                format!(
                    "<tr id=\"{name}\"><td><code>{name}</code></td><td>{}</td><td>{retry}</td><td>{}</td></tr>",
                    code.status(),
                    code.meaning()
                ),
            )
        })
        .collect();
    let rows: String = rows.into_values().collect();
    Html(format!(
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><title>keybrake: errors</title>\
         <style>body{{font:16px sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}}\
         td,th{{text-align:left;padding:.3rem .6rem;border-bottom:1px solid #ccc;vertical-align:top}}\
         tr:target{{background:#ffd}}</style><h1>What keybrake refuses, and why</h1>\
         <table><tr><th>code</th><th>status</th><th>retry</th><th>meaning</th></tr>{rows}</table></html>"
    ))
}
