//! One request from its arrival to its answer: the log, the script of faults, the key, the idempotency layer, the
//! validation and the execution, in Stripe's order. No sockets here: an answer is a value.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use serde::Serialize;
use serde_json::{Value, json};
use tokio::sync::watch;

use super::Options;
use super::bank::{Bank, Context, Executed};
use super::errors::{self, Failure};
use super::faults::{Fault, Script, Scripted, Traits};
use super::form::Params;
use super::intents::Settlement;
use super::keys::{Found, KEY_CHARS_MAX, Keys, Print, Slot};
use super::orders::{self, Order, Route};
use super::stage::Play;

/// The log keeps this many requests, the newest.
const REQUESTS_MAX: usize = 100_000;
/// The version of the account, for requests that name none.
const VERSION: &str = "2026-10-28.endive";

/// A request as it came in, also one that a fault swallowed.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Seen {
    /// From 1, without gaps.
    pub(crate) seq: u64,
    /// Unix milliseconds of the stand-in's clock.
    pub(crate) at_ms: u64,
    pub(crate) method: String,
    pub(crate) path: String,
    pub(crate) query: String,
    /// Names in lower case; the values of a repeated header joined by a comma and a space.
    pub(crate) headers: BTreeMap<String, String>,
    pub(crate) body: String,
}

impl Seen {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }
}

#[derive(Clone, Debug)]
pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Bytes,
}

impl Reply {
    pub(crate) fn json(status: u16, body: &Value) -> Self {
        let headers = vec![("content-type".to_owned(), "application/json".to_owned())];
        Self { status, headers, body: body.to_string().into() }
    }
}

/// What becomes of a request before anything is executed.
pub(crate) enum Plan {
    Answer(Reply),
    Execute(Box<Task>),
}

/// An execution that has begun: the key is bound, and whatever comes out of it is the key's result.
pub(crate) struct Task {
    route: Route,
    id: String,
    order: Order,
    params: Params,
    account: String,
    slot: Option<Slot>,
    request_id: String,
    version: String,
}

pub(crate) struct Arrival {
    /// Changes with each reset: what began before it must not touch what comes after.
    pub(crate) generation: u64,
    pub(crate) fault: Option<Fault>,
    /// None where the fault keeps the request from the API.
    pub(crate) plan: Option<Plan>,
}

#[derive(Debug)]
struct State {
    options: Options,
    clock_offset_ms: u64,
    generation: u64,
    bank: Bank,
    keys: Keys,
    script: Script,
    requests: VecDeque<Seen>,
    arrivals: u64,
}

#[derive(Debug)]
pub(crate) struct Engine {
    state: Mutex<State>,
    /// Counts releases; held requests wait for a change.
    pub(crate) releases: watch::Sender<u64>,
    pub(crate) held: AtomicUsize,
}

impl Engine {
    pub(crate) fn new(options: Options) -> Self {
        // Apart from every other stand-in, of this process and of earlier ones.
        static STARTED: AtomicUsize = AtomicUsize::new(0);
        let started = STARTED.fetch_add(1, Ordering::SeqCst);
        let salt = format!("{:x}x{:x}x{started:x}x", system_ms(), std::process::id());
        let state = State {
            clock_offset_ms: 0,
            generation: 0,
            bank: Bank::new(options.livemode, salt),
            keys: Keys::default(),
            script: Script::default(),
            requests: VecDeque::new(),
            arrivals: 0,
            options,
        };
        Self { state: Mutex::new(state), releases: watch::Sender::new(0), held: AtomicUsize::new(0) }
    }

    /// A panic in one request must not hide what the others did.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn latency_ms(&self) -> u64 {
        self.state().options.latency_ms
    }

    // === What tests and the control endpoints ask for ===

    pub(crate) fn fault(&self, scripted: Scripted) {
        self.state().script.push(scripted);
    }

    pub(crate) fn play(&self, play: Play) {
        self.state().bank.stage.put(play);
    }

    #[cfg(test)]
    pub(crate) fn clear_faults(&self) {
        self.state().script = Script::default();
    }

    pub(crate) fn executed(&self, since: u64) -> Vec<Executed> {
        self.state().bank.executed(since)
    }

    pub(crate) fn requests(&self, since: u64) -> Vec<Seen> {
        self.state().requests.iter().filter(|seen| seen.seq > since).cloned().collect()
    }

    pub(crate) fn release(&self) {
        self.releases.send_modify(|count| *count += 1);
    }

    pub(crate) fn advance(&self, seconds: u64) {
        let mut state = self.state();
        state.clock_offset_ms = state.clock_offset_ms.saturating_add(seconds.saturating_mul(1_000));
    }

    /// Forgets everything but the options and the count of ids. Requests in flight end without an answer.
    pub(crate) fn reset(&self) {
        let mut state = self.state();
        state.clock_offset_ms = 0;
        state.generation += 1;
        state.bank.clear();
        state.keys = Keys::default();
        state.script = Script::default();
        state.requests.clear();
        state.arrivals = 0;
        drop(state);
        self.release();
    }

    pub(crate) fn settle(&self, id: &str, to: Settlement) -> Result<(), String> {
        let mut state = self.state();
        let now = state.now_ms() / 1_000;
        state.bank.settle(id, to, now)
    }

    pub(crate) fn set_secret_keys(&self, keys: Vec<String>) {
        self.state().options.secret_keys = keys;
    }

    pub(crate) fn summary(&self) -> Value {
        let state = self.state();
        json!({
            "account": state.options.account,
            "livemode": state.options.livemode,
            "now_ms": state.now_ms(),
            "requests": state.arrivals,
            "executed": state.bank.moves(),
            "faults": state.script.len(),
            "held": self.held.load(Ordering::SeqCst),
        })
    }

    // === A request ===

    /// Logs a request, meets it with the next fault that waits for it, and plans its answer.
    pub(crate) fn arrive(&self, mut seen: Seen) -> Arrival {
        let mut state = self.state();
        state.arrivals += 1;
        seen.seq = state.arrivals;
        seen.at_ms = state.now_ms();
        let fault = state.next_fault(&seen);
        let plan = match &fault {
            Some(Fault::DropBefore | Fault::Reset) => None,
            Some(Fault::Answer { status, body, headers }) => Some(literal(*status, body, headers)),
            _ => Some(state.plan(&seen, fault.as_ref())),
        };
        state.requests.push_back(seen);
        if state.requests.len() > REQUESTS_MAX {
            state.requests.pop_front();
        }
        Arrival { generation: state.generation, fault, plan }
    }

    /// Executes and stores. None after a reset: there is nobody left to answer.
    pub(crate) fn execute(&self, generation: u64, task: Task, fault: Option<&Fault>) -> Option<Reply> {
        let mut state = self.state();
        (state.generation == generation).then(|| state.execute(task, fault))
    }
}

impl State {
    fn now_ms(&self) -> u64 {
        system_ms().saturating_add(self.clock_offset_ms)
    }

    fn next_fault(&mut self, seen: &Seen) -> Option<Fault> {
        if self.script.len() == 0 {
            return None;
        }
        let params = Params::read(&seen.query, &seen.body).unwrap_or_default();
        self.script.take(&Traits {
            method: &seen.method,
            path: &seen.path,
            idempotency_key: seen.header("idempotency-key"),
            customer: params.text("customer"),
        })
    }

    fn plan(&mut self, seen: &Seen, fault: Option<&Fault>) -> Plan {
        let request_id = self.bank.id("req");
        let version = seen.header("stripe-version").unwrap_or(VERSION).to_owned();
        match self.admit(seen, fault, &request_id, version.clone()) {
            Ok(plan) => plan,
            Err(failure) => {
                let (status, body) = (failure.status, failure.body(&request_id));
                let mut reply = Reply::json(status, &body);
                let slot = self.slot(seen).filter(|_| ![401, 409, 429].contains(&status));
                head(
                    &mut reply,
                    &request_id,
                    &version,
                    slot.as_ref().map(|slot| (slot, request_id.as_str())),
                );
                Plan::Answer(reply)
            }
        }
    }

    /// Everything before the execution, in this order: key, rate limiter, account, address, parameters, idempotency
    /// layer, validation. A failure here is stored under no key.
    fn admit(
        &mut self,
        seen: &Seen,
        fault: Option<&Fault>,
        request_id: &str,
        version: String,
    ) -> Result<Plan, Failure> {
        self.authenticate(seen)?;
        match fault {
            Some(Fault::RateLimited) => return Err(errors::rate_limited()),
            Some(Fault::LockTimeout) => return Err(errors::lock_timeout()),
            _ => {}
        }
        let account = self.account(seen);
        if account != self.options.account && !self.options.connected.contains(&account) {
            return Err(errors::foreign_account(&account));
        }
        let played = || Some((self.bank.stage.route(&seen.method, &seen.path)?, seen.path.as_str()));
        let Some((route, id)) = orders::route(&seen.method, &seen.path).or_else(played) else {
            return Err(errors::unrecognized(&seen.method, &seen.path));
        };
        if route == Route::Account && self.options.restricted {
            return Err(errors::missing_permission(&account));
        }
        let form = "application/x-www-form-urlencoded";
        if let Some(given) = seen.header("content-type").filter(|_| !seen.body.is_empty())
            && !given.to_ascii_lowercase().starts_with(form)
        {
            return Err(errors::content_type(given));
        }
        let params = Params::read(&seen.query, &seen.body).map_err(Failure::invalid)?;
        let slot = self.slot(seen);
        let print = Print::of(&seen.path, &params);
        if let Some(slot) = &slot
            && let Some(plan) = self.remembered(slot, &print, request_id, &version)?
        {
            return Ok(plan);
        }
        if matches!(fault, Some(Fault::Conflict409)) {
            return Err(errors::in_flight(slot.as_ref().map_or("", |slot| slot.key.as_str())));
        }
        let order = orders::order(route, &params)?;
        if let Some(slot) = &slot {
            let now_ms = self.now_ms();
            self.keys.begin(slot.clone(), print, now_ms, request_id.to_owned());
        }
        let (id, request_id) = (id.to_owned(), request_id.to_owned());
        Ok(Plan::Execute(Box::new(Task { route, id, order, params, account, slot, request_id, version })))
    }

    fn authenticate(&self, seen: &Seen) -> Result<(), Failure> {
        let given = seen.header("authorization").and_then(|value| value.split_once(' '));
        let key = match given {
            Some((scheme, key)) if scheme.eq_ignore_ascii_case("bearer") => key.trim().to_owned(),
            Some((scheme, pair)) if scheme.eq_ignore_ascii_case("basic") => {
                let pair = STANDARD.decode(pair.trim()).ok().and_then(|bytes| String::from_utf8(bytes).ok());
                let pair = pair.unwrap_or_default();
                // The password is ignored.
                pair.split_once(':').map_or(pair.as_str(), |(user, _)| user).to_owned()
            }
            _ => return Err(errors::no_key()),
        };
        if key.is_empty() {
            return Err(errors::no_key());
        }
        if self.options.secret_keys.contains(&key) { Ok(()) } else { Err(errors::wrong_key(&key)) }
    }

    fn account(&self, seen: &Seen) -> String {
        seen.header("stripe-account").unwrap_or(&self.options.account).to_owned()
    }

    /// Keys count for POST only; an empty one is none.
    fn slot(&self, seen: &Seen) -> Option<Slot> {
        let key = seen.header("idempotency-key").filter(|key| seen.method == "POST" && !key.is_empty())?;
        Some(Slot { account: self.account(seen), key: key.to_owned() })
    }

    fn remembered(
        &mut self,
        slot: &Slot,
        print: &Print,
        request_id: &str,
        version: &str,
    ) -> Result<Option<Plan>, Failure> {
        let Slot { key, .. } = slot;
        if key.chars().count() > KEY_CHARS_MAX {
            return Err(errors::long_key());
        }
        let now_ms = self.now_ms();
        match self.keys.find(slot, print, now_ms) {
            Found::Nothing => Ok(None),
            Found::InFlight => Err(errors::in_flight(key)),
            Found::OtherParameters => Err(errors::other_parameters(key)),
            Found::OtherEndpoint { first } => Err(errors::other_endpoint(key, print.endpoint(), &first)),
            Found::Result { status, body, original_request } => {
                let mut reply = Reply::json(status, &Value::Null);
                reply.body = body;
                reply.headers.push(("idempotent-replayed".into(), "true".into()));
                head(&mut reply, request_id, version, Some((slot, &original_request)));
                Ok(Some(Plan::Answer(reply)))
            }
        }
    }

    fn execute(&mut self, task: Task, fault: Option<&Fault>) -> Reply {
        let now = self.now_ms() / 1_000;
        let Task { route, id, order, params, account, slot, request_id, version } = task;
        let context = Context {
            account: &account,
            key: slot.as_ref().map(|slot| slot.key.as_str()),
            operation: route.operation(),
            now,
            declined: matches!(fault, Some(Fault::Decline)),
        };
        let result = match fault {
            Some(Fault::Status500Before) => Err(errors::server_error()),
            Some(Fault::Status424) => Err(errors::dependency_failed()),
            Some(Fault::Status500After) => {
                // What really happened shows in the oracle only.
                let _hidden = self.bank.execute(&context, &id, order, &params);
                Err(errors::server_error())
            }
            _ => self.bank.execute(&context, &id, order, &params),
        };
        let mut reply = match result {
            Ok(body) => Reply::json(200, &body),
            Err(failure) => Reply::json(failure.status, &failure.body(&request_id)),
        };
        if let Some(slot) = &slot {
            self.keys.store(slot, reply.status, reply.body.clone());
        }
        head(&mut reply, &request_id, &version, slot.as_ref().map(|slot| (slot, request_id.as_str())));
        reply
    }
}

/// The headers of every answer, and those of an answer under a key.
fn head(reply: &mut Reply, request_id: &str, version: &str, keyed: Option<(&Slot, &str)>) {
    let mut add = |name: &str, value: &str| reply.headers.push((name.to_owned(), value.to_owned()));
    add("request-id", request_id);
    add("stripe-version", version);
    if let Some((slot, original_request)) = keyed {
        add("idempotency-key", &slot.key);
        add("original-request", original_request);
        add("stripe-should-retry", "false");
    }
}

fn literal(status: u16, body: &Value, headers: &BTreeMap<String, String>) -> Plan {
    let mut reply = Reply::json(status, body);
    if let Some(text) = body.as_str() {
        reply.body = text.to_owned().into();
    }
    for (name, value) in headers {
        reply.headers.retain(|(other, _)| !other.eq_ignore_ascii_case(name));
        reply.headers.push((name.clone(), value.clone()));
    }
    Plan::Answer(reply)
}

#[expect(
    clippy::disallowed_methods,
    reason = "a stand-in has a clock of its own, that of no program under test"
)]
fn system_ms() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
