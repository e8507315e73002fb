//! A ledger with a clock that is set by hand, and short ways to say what is asked of it.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use keybrake::audit::Entry;
use keybrake::call::{
    Call, Estate, KeyBasis, Outcome, StoredAnswer, fingerprint, identity_of_caller_key, identity_of_content,
    identity_of_lone_call,
};
use keybrake::hold::{ExactRequest, Facts, Hold, Lane, Subject};
use keybrake::id::{BootId, CallId, HoldId, KeyId, LedgerId};
use keybrake::intent::{Claim, Intent, Seen, Verb};
use keybrake::key::{Caps, Idempotency, Key};
use keybrake::ledger::counter::Counter;
use keybrake::ledger::query::AuditFilter;
use keybrake::ledger::rules::Admit;
use keybrake::ledger::rules::resolve::Resolve;
use keybrake::ledger::{Actor, Admitted, Held, Ledger, LedgerError, Opening};
use keybrake::money::{Currency, MicroUsd, Money, Rate, Rates};
use keybrake::secret::Mode;
use keybrake::time::{Clock, DAY_MS, Day, HOUR_MS, UnixMs};
use serde_json::{Map, Value};

use crate::ledger::reads::{Reads, wait};

/// One o'clock on 2026-07-14, UTC.
pub(super) const START: UnixMs = UnixMs::from_millis(1_783_987_200_000 + HOUR_MS);
/// What a cent of a euro counts here: two of a dollar.
const EUR: Rate = Rate::from_pico(20_000_000_000);
/// The stamp's parameter, as a vendor would name it.
pub(super) const STAMP_PARAM: &str = "metadata[keybrake_call]";

/// A place where one ledger lives: opens it as often as it is asked, once the handle before is gone.
pub(super) type Place = Arc<dyn Fn(Opening) -> Result<Ledger, LedgerError>>;

/// A ledger and everything around it.
pub(super) struct World {
    place: Place,
    ledger: Option<Ledger>,
    clock: Clock,
    hand: Arc<AtomicU64>,
    made: Cell<u64>,
    /// How many worlds share the clock: their ids differ.
    worlds: Arc<AtomicU64>,
    modes: RefCell<HashMap<KeyId, Idempotency>>,
    /// What the vendor's records say of objects that are read first.
    records: RefCell<HashMap<String, Seen>>,
}

/// What a request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Deed {
    Charge,
    Intent,
    Confirm,
    Capture,
    Increment,
    Refund,
    Ceiling,
    Unpriced,
}

/// A request. Its name is the caller's key, or what it charges in `content` mode; `-` is none.
#[derive(Clone, Debug)]
pub(super) struct Ask {
    pub(super) name: String,
    pub(super) deed: Deed,
    pub(super) object: Option<String>,
    pub(super) minor: Option<u64>,
    pub(super) params: Vec<(String, String)>,
}

impl Ask {
    /// A charge.
    pub(super) fn charge(name: &str, minor: u64) -> Self {
        let (name, params) = (name.to_owned(), Vec::new());
        Self { name, deed: Deed::Charge, object: None, minor: Some(minor), params }
    }

    fn template(&self) -> &'static str {
        match self.deed {
            Deed::Charge => "POST /v1/charges",
            Deed::Intent => "POST /v1/payment_intents",
            Deed::Confirm => "POST /v1/payment_intents/{intent}/confirm",
            Deed::Capture => "POST /v1/payment_intents/{intent}/capture",
            Deed::Increment => "POST /v1/payment_intents/{intent}/increment_authorization",
            Deed::Refund => "POST /v1/refunds",
            Deed::Ceiling => "POST /v1/invoices/{invoice}",
            Deed::Unpriced => "POST /v1/topups",
        }
    }

    fn claim(&self) -> Claim {
        let minor = self.minor.unwrap_or(0);
        let money = Money { minor, currency: Currency::USD };
        let object = || self.object.clone().unwrap();
        let uses = |verb| Claim::Use {
            object: object(),
            verb,
            minor: self.minor,
            currency: None,
            no_more: verb == Verb::Capture,
            always_read: false,
        };
        match self.deed {
            Deed::Charge | Deed::Intent => Claim::Create { lane: Lane::In, money, rate: Rate::USD },
            Deed::Confirm => uses(Verb::Confirm),
            Deed::Capture => uses(Verb::Capture),
            Deed::Increment => uses(Verb::Increment),
            Deed::Refund => Claim::Return { of: object(), minor: self.minor },
            Deed::Ceiling => Claim::Ceiling {
                object: self.object.clone(),
                usd: usd("50.00"),
                on_its_hold: true,
                always_read: false,
            },
            Deed::Unpriced => Claim::Unpriced { object: self.object.clone() },
        }
    }

    /// Where its objects are named in the path rather than in the parameters.
    fn is_on_path(&self) -> bool {
        match self.deed {
            Deed::Confirm | Deed::Capture | Deed::Increment | Deed::Ceiling => true,
            Deed::Charge | Deed::Intent | Deed::Refund | Deed::Unpriced => false,
        }
    }

    fn request(&self) -> ExactRequest {
        let (method, template) = self.template().split_once(' ').unwrap();
        let object = self.object.as_deref().unwrap_or_default();
        let path = template.replace("{intent}", object).replace("{invoice}", object);
        let mut params = self.params.clone();
        params.extend(self.minor.map(|minor| ("amount".to_owned(), minor.to_string())));
        if !self.is_on_path() {
            params.push(("customer".to_owned(), format!("cus_{}", self.name)));
            params.extend(self.object.clone().map(|object| ("charge".to_owned(), object)));
        }
        params.sort();
        let (method, account) = (method.to_owned(), None);
        ExactRequest { method, path, params, version: None, account, idempotency_key: None }
    }
}

/// Dollars.
pub(super) fn usd(text: &str) -> MicroUsd {
    MicroUsd::parse_dollars(text).unwrap()
}

/// The account and mode of every ledger here.
pub(super) fn estate() -> Estate {
    Estate { account: "acct_1".to_owned(), mode: Mode::Test }
}

/// Who changes things by hand.
pub(super) fn admin() -> Actor {
    Actor("admin".to_owned())
}

impl World {
    /// A new ledger.
    pub(super) fn new(place: Place) -> Self {
        let (clock, hand) = Clock::manual(START);
        let (made, modes) = (Cell::new(0), RefCell::default());
        let worlds = Arc::new(AtomicU64::new(1));
        let records = RefCell::default();
        let mut world = Self { place, ledger: None, clock, hand, made, worlds, modes, records };
        world.restart();
        world
    }

    /// Another place with the same clock and keys.
    pub(super) fn beside(&self, place: Place) -> Self {
        let mut world = Self {
            place,
            ledger: None,
            clock: self.clock.clone(),
            hand: Arc::clone(&self.hand),
            made: Cell::new(self.worlds.fetch_add(1, Ordering::SeqCst) * 1_000_000),
            worlds: Arc::clone(&self.worlds),
            modes: self.modes.clone(),
            records: self.records.clone(),
        };
        world.restart();
        world
    }

    /// Drops the process, with whatever it was doing, and starts the next.
    pub(super) fn restart(&mut self) {
        self.restart_with(|_| ()).unwrap();
    }

    /// How a new run of the process opens a ledger.
    pub(super) fn opening(&self) -> Opening {
        Opening {
            node: "node-1".to_owned(),
            mode: Mode::Test,
            clock: self.clock.clone(),
            boot: BootId::new(START, self.random()),
            fresh_id: LedgerId::new(START, self.random()),
            fresh_salt: [7; 32],
            audit_days: 400,
            ships: false,
        }
    }

    /// Drops the process and starts it with changed settings.
    pub(super) fn restart_with(&mut self, change: impl FnOnce(&mut Opening)) -> Result<(), LedgerError> {
        self.ledger = None;
        let mut opening = self.opening();
        change(&mut opening);
        self.ledger = Some((self.place)(opening)?);
        Ok(())
    }

    /// The handle.
    pub(super) fn ledger(&self) -> &Ledger {
        self.ledger.as_ref().unwrap()
    }

    /// The reads.
    pub(super) fn reads(&self) -> Reads<'_> {
        Reads(self.ledger())
    }

    /// Lets time pass.
    pub(super) fn pass(&self, millis: u64) {
        self.hand.fetch_add(millis, Ordering::SeqCst);
    }

    /// Sets the machine's clock.
    pub(super) fn set_clock(&self, at: UnixMs) {
        self.hand.store(at.millis(), Ordering::SeqCst);
    }

    fn random(&self) -> [u8; 10] {
        self.made.set(self.made.get() + 1);
        let mut random = [0; 10];
        random[2..].copy_from_slice(&self.made.get().to_be_bytes());
        random
    }

    /// Makes a key: 100.00 a day for 31 days, by the caller's keys, unless `change` says otherwise.
    pub(super) async fn key(&self, label: &str, change: impl FnOnce(&mut Key)) -> KeyId {
        let now = self.ledger().now();
        let random = self.random();
        let mut digest = [0; 32];
        digest[..10].copy_from_slice(&random);
        let mut key = Key {
            id: KeyId::new(now, random),
            digest,
            label: label.to_owned(),
            vendor: "stripe".to_owned(),
            grants: Vec::new(),
            caps: Caps { daily: Some(usd("100.00")), ..Caps::default() },
            idempotency: Idempotency::Required,
            remember_days: 40,
            client_secrets: false,
            metadata: vec![("flow".to_owned(), "billing".to_owned())],
            created_at: now,
            expires_at: now.plus_millis(31 * DAY_MS),
            revoked_at: None,
            closed_at: None,
            issuer: None,
            budget: None,
            constraints: Vec::new(),
            accounts: Vec::new(),
            stop_budget_on_refusal: false,
            retry_declined_after_s: None,
            requests_per_second: None,
        };
        change(&mut key);
        self.modes.borrow_mut().insert(key.id, key.idempotency.clone());
        let id = key.id;
        self.ledger().issue_key(key, admin()).await.unwrap();
        id
    }

    /// Learns of a key that was made in another world.
    pub(super) fn knows(&self, key: KeyId, idempotency: Idempotency) {
        self.modes.borrow_mut().insert(key, idempotency);
    }

    /// What makes two requests under a key the same call.
    pub(super) fn mode_of(&self, key: KeyId) -> Idempotency {
        self.modes.borrow()[&key].clone()
    }

    /// A request as the ledger learns of it.
    pub(super) fn intent(&self, key: KeyId, ask: &Ask, call_id: CallId) -> Intent {
        let request = ask.request();
        let operation = ask.template().to_owned();
        let (identity, basis) = match &self.modes.borrow()[&key] {
            Idempotency::Content { scope, .. } => {
                let object = ask.object.as_deref().unwrap_or_default();
                let values = [("", object), ("customer", ask.name.as_str())];
                (identity_of_content(&estate(), &operation, "", scope, &values), KeyBasis::Content)
            }
            Idempotency::Required | Idempotency::Client if ask.name == "-" => {
                (identity_of_lone_call(call_id), KeyBasis::Absent)
            }
            Idempotency::Required | Idempotency::Client => {
                (identity_of_caller_key(&estate(), &ask.name), KeyBasis::Caller(ask.name.clone()))
            }
        };
        let salt = self.ledger().salt();
        let (fingerprint, params) = fingerprint(salt, &operation, &request.path, "", &request.params);
        let facts = self.facts(ask, &request);
        Intent {
            operation,
            claim: ask.claim(),
            identity,
            basis,
            fingerprint,
            params,
            request,
            stamp_param: (!ask.is_on_path()).then(|| STAMP_PARAM.to_owned()),
            facts,
            estate: estate(),
            open_constraints: Vec::new(),
            rates: Arc::new(Rates::new(vec![(Currency::parse("eur").unwrap(), EUR)])),
            seen: None,
            payable_after_decline: ask.object.as_ref().is_some_and(|object| object.starts_with("in_")),
            read_against: None,
            pin: Some("amount".to_owned()),
        }
    }

    fn facts(&self, ask: &Ask, request: &ExactRequest) -> Facts {
        Facts {
            request_id: format!("req_kb_{}", self.made.get()),
            method: request.method.clone(),
            endpoint: request.path.clone(),
            customer: (!ask.is_on_path()).then(|| format!("cus_{}", ask.name)),
            object_id: ask.object.clone(),
            ..Facts::default()
        }
    }

    /// The command for a request.
    pub(super) fn command(&self, key: KeyId, ask: &Ask) -> Admit {
        let now = self.ledger().now();
        let call_id = CallId::new(now, self.random());
        let hold_id = HoldId::new(now, self.random());
        let intent = self.intent(key, ask, call_id);
        Admit {
            intent,
            call_id,
            hold_id,
            boot: self.ledger().boot(),
            may_go: true,
            may_wait: false,
            duration_ms: 5,
        }
    }

    /// Asks for a money call.
    pub(super) async fn admit(&self, key: KeyId, ask: &Ask) -> Result<Admitted, LedgerError> {
        let mut command = self.command(key, ask);
        let admitted = self.ledger().admit(key, command.clone()).await?;
        let seen = ask.object.as_ref().and_then(|object| self.records.borrow().get(object).cloned());
        let (Admitted::Look(mark), Some(seen)) = (&admitted, seen) else {
            return Ok(admitted);
        };
        command.intent.seen = Some(seen);
        command.intent.read_against = *mark;
        self.ledger().admit(key, command).await
    }

    /// What a read of an object tells from now on.
    pub(super) fn tells(&self, object: &str, seen: Seen) {
        self.records.borrow_mut().insert(object.to_owned(), seen);
    }

    /// Asks for a money call that must be let through.
    pub(super) async fn held(&self, key: KeyId, ask: &Ask) -> Held {
        match self.admit(key, ask).await.unwrap() {
            Admitted::Held(held) => held,
            other @ (Admitted::Replay { .. }
            | Admitted::Refused(_)
            | Admitted::Look(_)
            | Admitted::Elsewhere
            | Admitted::Tell(_)) => {
                panic!("{ask:?}: {other:?}")
            }
        }
    }

    /// What an answer comes to; no two have the same body.
    pub(super) fn resolve(&self, outcome: Outcome, objects: &[&str], status: Option<u16>) -> Resolve {
        let n = u64::from_be_bytes(*self.random().last_chunk().unwrap());
        let answer = status.map(|status| StoredAnswer {
            status,
            content_type: "application/json".to_owned(),
            request_id: format!("req_{n}"),
            body: format!("{{\"answer\": {n}}}").into_bytes(),
            at: self.ledger().now(),
        });
        Resolve {
            outcome,
            objects: objects.iter().map(|object| (*object).to_owned()).collect(),
            stripe_request_id: answer.as_ref().map(|answer| answer.request_id.clone()),
            answer,
            upstream_status: status,
            seen_request_id: format!("req_{n}"),
            duration_ms: 80,
        }
    }

    /// Executes a charge from end to end.
    pub(super) async fn charged(&self, key: KeyId, name: &str, minor: u64) -> CallId {
        let held = self.held(key, &Ask::charge(name, minor)).await;
        let call = held.call_id();
        let object = format!("ch_{name}");
        let resolve = self.resolve(Outcome::Spent { minor }, &[&object], Some(200));
        self.ledger().resolve(held, resolve).await.unwrap();
        call
    }

    /// A key's counter over all days.
    pub(super) fn total(&self, key: KeyId, lane: Lane) -> Counter {
        self.reads().counter(Subject::Key(key), Day::TOTAL, lane).unwrap()
    }

    /// A call that must be known.
    pub(super) fn call(&self, id: CallId) -> Call {
        self.reads().call_by_id(id).unwrap().unwrap()
    }

    /// A hold that must be known.
    pub(super) fn hold(&self, id: HoldId) -> Hold {
        self.reads().hold(id).unwrap().unwrap()
    }

    /// The whole log, oldest first.
    pub(super) fn log(&self) -> Vec<Map<String, Value>> {
        let all = AuditFilter { all_events: true, ascending: true, ..AuditFilter::default() };
        self.pages(&all, 1_000)
    }

    /// Records, by pages that are small enough to be several.
    pub(super) fn audit(&self, filter: &AuditFilter) -> Vec<Map<String, Value>> {
        self.pages(filter, 2)
    }

    fn pages(&self, filter: &AuditFilter, limit: usize) -> Vec<Map<String, Value>> {
        let (mut records, mut after) = (Vec::new(), None);
        loop {
            let page = wait(self.ledger().audit(filter.clone(), after, limit)).unwrap();
            records.extend(page.items);
            after = page.next;
            if after.is_none() {
                return records;
            }
        }
    }

    /// Everything that must hold at any moment, whatever happened before.
    pub(super) fn check(&self) {
        let chain = self.reads().verify_chain().unwrap();
        assert_eq!(chain.broken, None, "the chain");
        self.check_counters();
    }

    /// The counters carry exactly the live holds.
    pub(super) fn check_counters(&self) {
        let holds = self.reads().holds(None, None, 10_000).unwrap().items;
        for key in self.modes.borrow().keys() {
            for lane in [Lane::In, Lane::Out] {
                let sum = |in_doubt: bool| {
                    let of_key = holds.iter().map(|view| &view.hold);
                    of_key
                        .filter(|hold| hold.key_id == *key && hold.lane == lane)
                        .filter(|hold| (hold.state.as_str() == "doubt") == in_doubt)
                        .fold(MicroUsd::ZERO, |sum, hold| sum.checked_add(hold.usd).unwrap())
                };
                let total = self.total(*key, lane);
                assert_eq!((total.held, total.doubt), (sum(false), sum(true)), "held and doubt of {key}");
            }
        }
    }

    /// Records something by hand.
    pub(super) async fn record(&self, entry: Entry) {
        self.ledger().record(entry).await.unwrap();
    }
}
