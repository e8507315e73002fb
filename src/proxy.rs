//! The request path: read, permit, reserve, send, settle, answer.
//!
//! One request is one plain function, `Proxy::serve`, and everything that it needs to know is decided in the order of
//! the contract. The work behind a caller does not stop when the caller hangs up: it runs in a task of its own.

pub mod context;
pub mod course;
pub mod flights;
pub mod look;
pub mod money;
pub mod rate;
pub mod read;
pub mod reply;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use hyper::body::{Body as _, Incoming};
use hyper::http::request::Parts;
use hyper::{Request, Response};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;
use tokio_util::task::TaskTracker;

use crate::account::AccountState;
use crate::audit::{Decision, Entry, Event, RecordedOutcome};
use crate::call::{Estate, Record};
use crate::forward::{Forwarder, FreeRequest};
use crate::fx::Book;
use crate::hold::{ExactRequest, Facts};
use crate::id::RequestId;
use crate::key::{Constraint, Key};
use crate::ledger::notes::Note;
use crate::ledger::query::{Caller, Standing};
use crate::ledger::rules::{issuer_revoked, keeps_constraints, kill_switch, too_soon};
use crate::ledger::{Ledger, LedgerError, entry};
use crate::money::Currency;
use crate::proxy::course::Course;
use crate::proxy::flights::Flights;
use crate::proxy::rate::Buckets;
use crate::proxy::reply::{REPLAYED, REQUEST_ID, Reply, SERVER_TIMING, SHOULD_RETRY, request_id_of};
use crate::random;
use crate::refusal::{Code, Refusal};
use crate::secret::{KeyKind, KeySecret, looks_like_stripe_key};
use crate::server::ReplyBody;
use crate::telemetry::{Metrics, Stage};
use crate::upstream::{Sent, UnknownReason};
use crate::vendor::stripe::answer::{self, Answer};
use crate::vendor::stripe::catalogue::Class;
use crate::vendor::stripe::object::{self, Purpose};
use crate::vendor::stripe::request::{self, Exchange, Reading};
use crate::vendor::stripe::rules::{self, Effect};

/// Bodies of all requests in progress together, in KiB.
const ROOM_KIB: usize = 256 * 1_024;
/// The longest path that a record shows of a request that could not be read.
const PATH_SHOWN_MAX: usize = 200;
/// The method of reads.
const READ: &str = "GET";

/// The settings of the request path.
#[derive(Clone, Debug)]
pub struct ProxyConfig {
    /// The sidecar's label.
    pub node: String,
    /// Whether objects are stamped.
    pub stamp: bool,
    /// The largest request body, in bytes.
    pub body_bytes_max: usize,
    /// One deadline for each request, from its acceptance.
    pub upstream_timeout: Duration,
}

/// Everything that a request needs.
#[derive(Debug)]
pub struct Proxy {
    config: ProxyConfig,
    ledger: Ledger,
    forwarder: Arc<Forwarder>,
    account: Arc<AccountState>,
    metrics: Metrics,
    flights: Flights,
    tracker: TaskTracker,
    fx: Arc<Book>,
    buckets: Buckets,
    room: Arc<Semaphore>,
}

/// Why a request ends without an answer of Stripe's.
#[derive(Debug)]
pub enum No {
    /// Refused, and to be recorded.
    Refused(Refusal),
    /// Refused, and the ledger has recorded it already.
    Recorded(Refusal),
}

impl From<Refusal> for No {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

impl From<LedgerError> for No {
    fn from(error: LedgerError) -> Self {
        tracing::error!(%error, "the ledger gave no answer");
        // It cannot record this either.
        Self::Recorded(match error {
            LedgerError::Lost => Refusal::new(Code::LedgerUnavailable, error.to_string()),
            LedgerError::Unavailable(_)
            | LedgerError::Corrupt(_)
            | LedgerError::Locked
            | LedgerError::NewerFormat { .. }
            | LedgerError::BoundElsewhere { .. }
            | LedgerError::NotFound
            | LedgerError::Contradiction(_) => Refusal::ledger_unavailable(),
        })
    }
}

impl Proxy {
    /// Puts the request path together.
    pub fn new(
        config: ProxyConfig,
        ledger: Ledger,
        forwarder: Arc<Forwarder>,
        account: Arc<AccountState>,
        metrics: Metrics,
        fx: Arc<Book>,
    ) -> Self {
        Self {
            config,
            ledger,
            forwarder,
            account,
            metrics,
            flights: Flights::default(),
            tracker: TaskTracker::new(),
            fx,
            buckets: Buckets::default(),
            room: Arc::new(Semaphore::new(ROOM_KIB)),
        }
    }

    /// What other currencies count right now.
    fn exchange(&self) -> Exchange {
        let table = self.fx.table();
        let now = self.ledger.now();
        Exchange {
            rates: Arc::new(table.at(now)),
            stale: table.is_stale(now).then(|| table.as_of().to_owned()),
        }
    }

    /// The work in progress, to be waited for when the process stops.
    pub fn tracker(&self) -> &TaskTracker {
        &self.tracker
    }

    /// Answers one proxied request. `path` is the path behind the mount.
    pub async fn handle(self: Arc<Self>, request: Request<Incoming>, path: String) -> Response<ReplyBody> {
        let proxy = Arc::clone(&self);
        // A caller that hangs up drops this future; the work goes on. It is large, so it is made where it stays: a task is
        // moved several times before it runs.
        let work = Box::pin(async move { proxy.answer(request, &path).await });
        let work = self.tracker.spawn(work);
        if let Ok(reply) = work.await {
            return reply.into_response();
        }
        // It panicked. What it held stays held.
        let refusal = Refusal::outcome_unknown(true, false, "This request failed inside keybrake.");
        Reply::of_refusal(&refusal, &self.new_request_id(), self.ledger.now()).into_response()
    }

    fn new_request_id(&self) -> String {
        RequestId::new(self.ledger.now(), random::of_id()).to_string()
    }

    async fn answer(&self, request: Request<Incoming>, path: &str) -> Reply {
        let mut course = Course::begin(self.new_request_id(), self.config.upstream_timeout);
        let (head, body) = request.into_parts();
        let mut reply = match self.authenticate(&head).await {
            Err(refusal) => {
                course.during(Stage::Read, read::drain(body)).await;
                self.refuse(&refusal, &course)
            }
            Ok(caller) => self.answer_caller(&mut course, &caller, &head, path, body).await,
        };
        let timing = course.end(&self.metrics);
        reply.set(SERVER_TIMING, &timing);
        reply
    }

    async fn answer_caller(
        &self,
        course: &mut Course,
        caller: &Caller,
        head: &Parts,
        path: &str,
        body: Incoming,
    ) -> Reply {
        let key = &caller.key;
        match self.serve(course, caller, head, path, body).await {
            Ok(reply) => reply,
            Err((No::Recorded(refusal), _)) => self.refuse(&refusal, course),
            Err((No::Refused(refusal), facts)) => {
                match self.record_refusal(course, key, facts, refusal.clone()).await {
                    Ok(()) => self.refuse(&refusal, course),
                    Err(_) => self.refuse(&Refusal::ledger_unavailable(), course),
                }
            }
        }
    }

    /// A read moves no money, so nobody waits for its record.
    async fn record_refusal(
        &self,
        course: &mut Course,
        key: &Key,
        facts: Facts,
        refusal: Refusal,
    ) -> Result<(), LedgerError> {
        let duration_ms = course.elapsed_ms();
        if facts.method != READ {
            let recorded = self.ledger.refused(key.id, facts, refusal, duration_ms);
            return course.during(Stage::Record, recorded).await;
        }
        let (facts, refusal) = (Box::new(facts), Box::new(refusal));
        let note = Note::Refused { key_id: key.id, facts, refusal, duration_ms };
        course.during(Stage::Note, self.ledger.note(note)).await
    }

    fn refuse(&self, refusal: &Refusal, course: &Course) -> Reply {
        self.metrics.decided("refused", refusal.code.as_str());
        tracing::debug!(request_id = course.request_id, code = refusal.code.as_str(), "refused");
        Reply::of_refusal(refusal, &course.request_id, self.ledger.now())
    }

    /// Framing, then who it is. A key that nobody knows is counted, not recorded.
    async fn authenticate(&self, head: &Parts) -> Result<Caller, Refusal> {
        read::framing(head)?;
        let unknown = |message: String| {
            self.metrics.unknown_keys.inc();
            Refusal::new(Code::VaultKeyInvalid, message)
        };
        let credential = read::credential(&head.headers)?;
        let Some(secret) = KeySecret::parse(&credential).filter(|secret| secret.kind() == KeyKind::Vault)
        else {
            return Err(unknown(if looks_like_stripe_key(&credential) {
                "A Stripe key was sent to keybrake. Send a vault key, and roll that Stripe key: it has left its \
                 safe place."
                    .to_owned()
            } else {
                "This is not a vault key.".to_owned()
            }));
        };
        match self.ledger.read(|reader| reader.caller(&secret.digest().0)).await {
            Ok(Some(caller)) => Ok(caller),
            Ok(None) if self.ledger.is_shared() => {
                Err(unknown("No such vault key is known to the ledger of this fleet.".to_owned()))
            }
            Ok(None) => Err(unknown(format!(
                "No such vault key is known to this sidecar (node {}). Keys, caps and memory are each sidecar's own: \
                 a key that another one minted is not known here.",
                self.config.node
            ))),
            Err(error) => {
                tracing::error!(%error, "the ledger cannot be read");
                Err(Refusal::ledger_unavailable())
            }
        }
    }

    /// Everything after the key is known, in the order in which refusals answer.
    async fn serve(
        &self,
        course: &mut Course,
        caller: &Caller,
        head: &Parts,
        path: &str,
        body: Incoming,
    ) -> Result<Reply, (No, Facts)> {
        let key = &caller.key;
        let request_id = course.request_id.clone();
        let unread = || unread_facts(head, path, &request_id);
        // Held until the request is answered: its body is kept as long.
        let room = self.room_for(head);
        if room.is_none() {
            course.during(Stage::Read, read::drain(body)).await;
            return Err((overloaded().into(), unread()));
        }
        // A body may take its time, and the switch be thrown meanwhile.
        let standing = body.is_end_stream().then_some(caller.standing);
        let body = read::body(&head.headers, body, self.config.body_bytes_max);
        let body = course.during(Stage::Read, body).await;
        let early = self.may_serve(key, standing).await.and_then(|estate| Ok((estate, body?)));
        let (estate, body): (Estate, Bytes) = early.map_err(|no| (no, unread()))?;
        let reading =
            read::request(head, path, &body, &request_id).map_err(|refusal| (refusal.into(), unread()))?;
        if reading.account.as_deref() == Some(estate.account.as_str()) {
            let own =
                "Stripe-Account names the sidecar's own account: leave it out, or one call has two names.";
            return Err((Refusal::new(Code::AccountNotAllowed, own).into(), request::facts(&reading, key)));
        }
        let facts = request::facts(&reading, key);
        let (effect, open) =
            permit(key, &reading, head).map_err(|refusal| (refusal.into(), facts.clone()))?;
        if let Effect::Ends(_) | Effect::Free = effect {
            self.object_keeps(course, &open, &reading).await.map_err(|no| (no, facts.clone()))?;
        }
        let answer = match effect {
            Effect::Free | Effect::Ends(_) => self.pass_on(course, key, &reading, effect, &facts).await,
            Effect::Priced(priced) => self.spend(course, key, &reading, Some(priced), &estate).await,
            Effect::Unpriced => self.spend(course, key, &reading, None, &estate).await,
        };
        answer.map_err(|no| (no, facts))
    }

    /// Room for a request's body, or for the largest one where its length is not told; `None` when there is none left.
    fn room_for(&self, head: &Parts) -> Option<OwnedSemaphorePermit> {
        let length = head.headers.get(hyper::header::CONTENT_LENGTH);
        let told = length.and_then(|value| value.to_str().ok()?.parse().ok());
        let largest = if head.method == hyper::Method::GET { 0 } else { self.config.body_bytes_max };
        let kib = told.unwrap_or(largest).min(self.config.body_bytes_max) / 1_024 + 1;
        Arc::clone(&self.room).try_acquire_many_owned(u32::try_from(kib).unwrap_or(u32::MAX)).ok()
    }

    /// Ends the hold of an object. What moved in another currency than is held is left to recovery, which counts it.
    async fn note_end(
        &self,
        account: String,
        object: String,
        facts: &Facts,
        record: Record,
        currency: Option<Currency>,
    ) -> Result<(), LedgerError> {
        if let Record::Moved { .. } = record {
            let known = self.ledger.read(|reader| reader.hold_of_object(&account, &object)).await?;
            let held_in = known.and_then(|hold| hold.currency);
            if held_in.is_some() && held_in != currency {
                return Ok(());
            }
        }
        self.ledger.observe(account, object, facts.clone(), record).await
    }

    /// Constraints that a call without an amount leaves to its object: the ledger knows it, or it is read.
    async fn object_keeps(
        &self,
        course: &mut Course,
        open: &[Constraint],
        reading: &Reading<'_>,
    ) -> Result<(), No> {
        if open.is_empty() {
            return Ok(());
        }
        let request = reading.exact_request();
        let account = reading.account.as_deref().unwrap_or_default();
        let object = reading.ids.first().map(String::as_str).unwrap_or_default();
        let hold = self.ledger.read(|reader| reader.hold_of_object(account, object)).await?;
        let seen = match (&hold, object::look_of_fields(reading)) {
            (None, Some(look)) => Some(self.look(course, &request, &look, Purpose::Fields).await?),
            (Some(_), _) | (None, None) => None,
        };
        Ok(keeps_constraints(open, hold.as_ref(), seen.as_ref())?)
    }

    /// Whether the key opens anything right now, and for whose account. How it stands is looked up where it is not known.
    async fn may_serve(&self, key: &Key, standing: Option<Standing>) -> Result<Estate, No> {
        key.alive(self.ledger.now())?;
        let standing = match standing {
            Some(standing) => standing,
            None => self.ledger.read(|reader| reader.standing(key)).await?,
        };
        if !standing.issuer_lives {
            return Err(issuer_revoked().into());
        }
        if standing.is_stopped {
            return Err(kill_switch().into());
        }
        if self.account.draining() {
            return Err(Refusal::new(Code::NotReady, "This sidecar is stopping; nothing was sent.").into());
        }
        if self.ledger.failure().is_some() {
            return Err(No::Recorded(Refusal::ledger_unavailable()));
        }
        self.account.estate().ok_or_else(|| {
            let why = self.account.not_serving().unwrap_or_default();
            Refusal::new(Code::NotReady, format!("This sidecar is not ready: {why}. Nothing was sent."))
                .into()
        })
    }

    /// Passes on a request that moves no money, with the caller's own key.
    async fn pass_on(
        &self,
        course: &mut Course,
        key: &Key,
        reading: &Reading<'_>,
        effect: Effect,
        facts: &Facts,
    ) -> Result<Reply, No> {
        if !self.buckets.take(key, Instant::now()) {
            return Err(too_soon(key).into());
        }
        let request = ExactRequest { idempotency_key: reading.caller_key.clone(), ..reading.exact_request() };
        let Some(request) = FreeRequest::new(effect, request) else {
            return Err(Refusal::new(Code::AmountUnknown, "This call moves money.").into());
        };
        let answer = match self.timed(course, self.forwarder.send_free(&request, course.deadline)).await {
            Sent::Answered(answer) => answer,
            Sent::NotSent { reason } => return Err(unreachable(reason.as_str(), false).into()),
            Sent::Unknown { reason } => {
                return Err(unreachable(reason.as_str(), reason == UnknownReason::TimedOut).into());
            }
        };
        let told = Answer { status: answer.status, body: &answer.body };
        if answer::refuses_own_key(told) {
            self.account.set_key_refused(true);
            return Err(own_key_refused().into());
        }
        self.account.set_key_refused(false);
        if let Effect::Ends(answers) = effect
            && let Some((object, record, currency)) = answer::ended(told, answers)
        {
            let account = reading.account.clone().unwrap_or_default();
            let noted = self.note_end(account, object, facts, record, currency);
            if let Err(error) = course.during(Stage::Settle, noted).await {
                tracing::error!(%error, "an object that has ended could not be released; it stays held");
            }
        }
        let mut reply = Reply::of_answer(&answer, &course.request_id);
        if answer.status >= 500 {
            let replayed = reply.header(&REPLAYED) == Some("true");
            reply.set(SHOULD_RETRY, if replayed { "false" } else { "true" });
        }
        if !key.client_secrets {
            reply.hide_client_secrets();
        }
        let entry = Entry {
            decision: Some(Decision::Forwarded),
            outcome: Some(RecordedOutcome::None),
            stripe_request_id: request_id_of(&answer),
            request_id: reply.header(&REQUEST_ID).map(str::to_owned),
            upstream_status: Some(answer.status),
            duration_ms: Some(course.elapsed_ms()),
            ..entry::of_request(self.ledger.now(), Event::Forwarded, key, facts)
        };
        if facts.method == READ {
            course.during(Stage::Note, self.ledger.note(Note::Record(Box::new(entry)))).await?;
        } else {
            course.during(Stage::Record, self.ledger.record(entry)).await?;
        }
        self.metrics.decided("forwarded", "");
        Ok(reply)
    }

    /// Sends, and remembers how long Stripe took.
    async fn timed(&self, course: &mut Course, send: impl Future<Output = Sent>) -> Sent {
        let before = Instant::now();
        let result = send.await;
        let took = before.elapsed();
        course.spent(Stage::Upstream, took);
        self.metrics.upstream_seconds.observe(took.as_secs_f64());
        result
    }
}

/// Scope, account, idempotency key and parameters: what key and request alone decide, and the constraints that are left
/// to the object.
fn permit(key: &Key, reading: &Reading<'_>, head: &Parts) -> Result<(Effect, Vec<Constraint>), Refusal> {
    let operation = reading.operation;
    let Some(grant) = key.grant_for(operation.template) else {
        return Err(Refusal::new(
            Code::EndpointNotAllowed,
            format!("This vault key does not grant {}.", operation.template),
        ));
    };
    let effect = rules::effect(operation, &key.caps, grant.wildcard)?.of_call(&reading.params);
    if read::names_context(&head.headers) {
        return Err(Refusal::new(Code::AccountNotAllowed, "Stripe-Context is not supported."));
    }
    if reading.account.as_ref().is_some_and(|account| !key.accounts.contains(account)) {
        return Err(Refusal::new(
            Code::AccountNotAllowed,
            "This vault key does not grant the connected account that Stripe-Account names.",
        ));
    }
    match effect {
        Effect::Priced(_) | Effect::Unpriced => {
            request::check_caller_key(key, reading.caller_key.as_deref())?;
        }
        // It goes to Stripe as it is, where it would take the place of a key that a charge will need.
        Effect::Free | Effect::Ends(_) => request::refuse_reserved_key(reading.caller_key.as_deref())?,
    }
    // A read is decided by its grant; a filter such as `destination` sends nothing anywhere.
    if operation.class != Class::Read {
        rules::refuse_parameters(operation, &reading.params, key)?;
        rules::refuse_bare_metadata(reading)?;
    }
    rules::refuse_expand(&reading.params, key)?;
    let open = rules::keep_constraints(reading, key, effect)?;
    Ok((effect, open))
}

fn unread_facts(head: &Parts, path: &str, request_id: &str) -> Facts {
    let shown: String = path
        .chars()
        .take(PATH_SHOWN_MAX)
        .map(|c| if c.is_ascii_alphanumeric() || matches!(c, '/' | '_' | '-') { c } else { '?' })
        .collect();
    Facts {
        request_id: request_id.to_owned(),
        method: head.method.as_str().to_owned(),
        endpoint: request::showable(&shown),
        // What cannot be read is refused, and the record of that goes without.
        context: context::read(&head.headers).unwrap_or_default(),
        ..Facts::default()
    }
}

fn unreachable(why: &str, timed_out: bool) -> Refusal {
    let status = if timed_out { 504 } else { Code::UpstreamUnreachable.status() };
    let message =
        format!("Stripe could not be reached, or did not answer ({why}). No money was meant to move.");
    Refusal { status, ..Refusal::new(Code::UpstreamUnreachable, message) }
}

fn overloaded() -> Refusal {
    Refusal::new(
        Code::Overloaded,
        "Too many requests are in progress here. Nothing was held or sent; try again in a moment.",
    )
}

fn own_key_refused() -> Refusal {
    Refusal::new(
        Code::UpstreamKeyRefused,
        "Stripe refused the key of this sidecar, or that key lacks a permission for this operation. Nothing was \
         executed. Whoever runs the sidecar has to mend its key.",
    )
}
