//! Random histories: a few keys and names, a Stripe that loses answers, restarts, a clock that jumps. After every step
//! the invariants are checked against a much simpler account of what was really executed.
//!
//! `KEYBRAKE_TEST_HISTORIES` sets how many are run; `KEYBRAKE_TEST_SEED` repeats one.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;

mod stripe;

use keybrake::call::{Outcome, Reading, Record, conclude};
use keybrake::hold::{Facts, Hold, HoldState, Lane, Subject};
use keybrake::id::{CallId, HoldId, KeyId};
use keybrake::key::{Idempotency, Status};
use keybrake::ledger::rules::resolve::{EndDoubt, Known};
use keybrake::ledger::{Admitted, Ending, Held, Ledger};
use keybrake::money::{MicroUsd, Rate};
use keybrake::refusal::Code;
use keybrake::time::{DAY_MS, Day, HOUR_MS, UnixMs};

use serde_json::Map;

use crate::dice::{Dice, Told, seeds};
use crate::ledger::backend::File;
use crate::ledger::world::{Ask, Deed, START, World, admin, usd};

use stripe::{Answer, Executed, Object, State, Stripe, plain};

/// Histories that are run when nobody says otherwise, and steps of each.
const HISTORIES: u64 = 120;
const STEPS: usize = 70;
/// How long every key here remembers.
const REMEMBER_DAYS: u32 = 3;
/// A request that was let through leaves within its deadline, or not at all.
const SENT_WITHIN_MS: u64 = HOUR_MS / 4;

#[test]
fn random_histories_keep_the_invariants() {
    let seeds = seeds("KEYBRAKE_TEST_HISTORIES", HISTORIES);
    let (some, others) = seeds.split_at(seeds.len() / 2);
    std::thread::scope(|scope| [some, others].map(|seeds| scope.spawn(|| run_all(seeds))).map(drop));
}

fn run_all(seeds: &[u64]) {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    for seed in seeds {
        runtime.block_on(run(*seed));
    }
}

async fn run(seed: u64) {
    let _told = Told::of_seed(seed);
    let mut history = History::new(seed).await;
    for n in 0..STEPS {
        history.step().await;
        history.check();
        if n % 16 == 0 {
            history.check_ended();
        }
    }
    history.check_records();
}

/// A call that is being sent.
struct Flight {
    held: Held,
    name: String,
    payer: KeyId,
    since: u64,
}

/// What was executed under a name, as this account sees it.
struct Done {
    object: String,
    /// When the ledger was told, by its own time.
    told_at: Option<UnixMs>,
    /// Whether the name stands for what is charged.
    by_content: bool,
}

/// One history.
struct History {
    world: World,
    dice: Dice,
    stripe: Stripe,
    /// Time as it really passes.
    real: u64,
    keys: Vec<KeyId>,
    flights: Vec<Flight>,
    done: HashMap<String, Done>,
    /// What was executed under an upstream key.
    ran: HashMap<String, Executed>,
    /// What each call was made for.
    names: HashMap<CallId, String>,
    bodies: HashMap<CallId, Vec<u8>>,
    /// Objects that the ledger was told of.
    known: HashSet<String>,
    holds: HashSet<HoldId>,
    ended: HashMap<HoldId, Hold>,
    executed: HashMap<(KeyId, Lane), u64>,
    upstream_keys: HashSet<String>,
    flagged: HashSet<KeyId>,
    /// The highest time that the ledger ever had: what was over then is over.
    latest: UnixMs,
    trail: Vec<String>,
}

impl History {
    async fn new(seed: u64) -> Self {
        let file = File::default();
        let world = World::new(Arc::new(move |opening| Ledger::open_backend(file.open(), opening)));
        let mut history = Self {
            world,
            dice: Dice::new(seed),
            stripe: Stripe::default(),
            real: START.millis(),
            keys: Vec::new(),
            flights: Vec::new(),
            done: HashMap::new(),
            ran: HashMap::new(),
            names: HashMap::new(),
            bodies: HashMap::new(),
            known: HashSet::new(),
            holds: HashSet::new(),
            ended: HashMap::new(),
            executed: HashMap::new(),
            upstream_keys: HashSet::new(),
            flagged: HashSet::new(),
            latest: START,
            trail: Vec::new(),
        };
        for n in 0..4 {
            let key = history.new_key(n).await;
            history.keys.push(key);
        }
        history
    }

    async fn new_key(&self, n: usize) -> KeyId {
        self.world
            .key(&format!("k{n}"), |key| {
                key.remember_days = REMEMBER_DAYS;
                key.caps.daily = Some(usd("9.00"));
                key.caps.daily_out = Some(usd("2.00"));
                match n {
                    0 => key.caps.total = Some(usd("13.00")),
                    1 => key.expires_at = key.created_at.plus_millis(DAY_MS),
                    2 => key.caps.max_calls = Some(6),
                    _ => {
                        let (scope, fields) = ("billing:1".to_owned(), Vec::new());
                        key.idempotency = Idempotency::Content { scope, fields };
                    }
                }
            })
            .await
    }

    async fn step(&mut self) {
        self.latest = self.latest.max(self.world.ledger().now());
        match self.dice.below(100) {
            0..45 => self.ask().await,
            45..75 => self.deliver().await,
            75..80 => self.cancel().await,
            80..82 => self.recover().await,
            82..84 => self.end_a_doubt().await,
            84..88 => self.restart(),
            88..96 => self.pass(),
            96 => self.world.ledger().tick().await.unwrap(),
            97 => self.elsewhere(),
            _ => self.turn_the_clock().await,
        }
    }

    /// Somebody makes an intent without the sidecar.
    fn elsewhere(&mut self) {
        let id = format!("pi_{}", self.stripe.objects.len());
        self.stripe.objects.insert(id, Object { minor: 300, state: State::Unconfirmed });
    }

    async fn ask(&mut self) {
        let n = self.dice.below(self.keys.len());
        let now = self.world.ledger().now();
        let is_active = |key: keybrake::key::Key| key.status(now) == Status::Active;
        if !self.world.reads().key(self.keys[n]).unwrap().is_some_and(is_active) {
            self.keys[n] = self.new_key(n).await;
        }
        let (key, ask) = (self.keys[n], self.any_ask());
        self.trail.push(format!("k{n} {ask:?}"));
        if let Some((id, object)) =
            ask.object.as_ref().and_then(|id| Some((id, self.stripe.objects.get(id)?)))
        {
            self.world.tells(id, object.record());
        }
        match self.world.admit(key, &ask).await.unwrap() {
            Admitted::Held(held) => self.take_off(held, n == 3, &ask),
            Admitted::Replay { call_id, answer } => {
                assert_eq!(Some(&answer.body), self.bodies.get(&call_id), "a replay gives the same bytes");
            }
            Admitted::Refused(refusal) => {
                let expected = [
                    Code::SpendCapExceeded,
                    Code::CallLimitExceeded,
                    Code::IdempotencyError,
                    Code::IdempotencyKeyInUse,
                    Code::OutcomeUnknown,
                    Code::AlreadyExecuted,
                    Code::AmountUnknown,
                ];
                assert!(expected.contains(&refusal.code), "{refusal:?}");
            }
            // What was found or said to be executed has no answer that was seen.
            Admitted::Tell(executed) => assert!(self.known.contains(&executed.object_id), "{executed:?}"),
            Admitted::Look(_) => panic!("every object has a record"),
        }
    }

    fn any_ask(&mut self) -> Ask {
        let name = format!("n{}", self.dice.below(7));
        let intents: Vec<String> =
            self.stripe.objects.keys().filter(|id| id.starts_with("pi")).cloned().collect();
        let all: Vec<String> = self.stripe.objects.keys().cloned().collect();
        let minor = if self.dice.percent(10) { 450 } else { 300 };
        let create = |deed| Ask { deed, ..Ask::charge(&name, minor) };
        let intent = self.dice.any(&intents).cloned();
        match (self.dice.below(10), intent, self.dice.any(&all).cloned()) {
            (0..3, _, _) => create(Deed::Charge),
            (3 | 4, _, _) | (_, None, None) => create(Deed::Intent),
            (5 | 6, object @ Some(_), _) => Ask { object, minor: None, ..create(Deed::Confirm) },
            (7, object @ Some(_), _) => {
                let minor = self.dice.percent(30).then_some(200);
                Ask { object, minor, ..create(Deed::Capture) }
            }
            (8, object @ Some(_), _) => {
                let minor = Some(300 + 50 * self.dice.number(5));
                Ask { object, minor, ..create(Deed::Increment) }
            }
            (_, _, object) => Ask { object, minor: Some(100), ..create(Deed::Refund) },
        }
    }

    fn take_off(&mut self, held: Held, by_content: bool, ask: &Ask) {
        let call = self.world.call(held.call_id());
        let reserved = self.world.hold(call.hold_id);
        self.holds.insert(reserved.id);
        self.upstream_keys.insert(held.request().idempotency_key.clone().unwrap());
        let what = if by_content { format!("{:?} {:?}", ask.deed, ask.object) } else { String::new() };
        let name = format!("{} {what}", ask.name);
        self.names.insert(held.call_id(), name.clone());
        self.flights.push(Flight { held, name, payer: reserved.key_id, since: self.real });
    }

    /// One request reaches Stripe, or not; its answer arrives, or not.
    async fn deliver(&mut self) {
        if self.flights.is_empty() {
            return;
        }
        let n = self.dice.below(self.flights.len());
        let flight = self.flights.swap_remove(n);
        let answer = match self.dice.below(100) {
            0..5 => plain(Reading::NotSent),
            _ if self.real > flight.since + SENT_WITHIN_MS => plain(Reading::NotSent),
            5..13 => plain(Reading::Silence),
            13..15 => plain(Reading::OwnKeyRefused),
            _ => self.at_stripe(&flight),
        };
        let answer = if self.dice.percent(12) { plain(Reading::Silence) } else { answer };
        self.trail.push(format!("  {}: {answer:?}", flight.name));
        let Flight { held, name, payer, .. } = flight;
        let outcome = conclude(&answer.reading, held.first_send(), answer.replayed, held.basis());
        let objects: Vec<&str> = answer.objects.iter().map(String::as_str).collect();
        self.known.extend(answer.objects.iter().cloned());
        let status = (answer.reading != Reading::Silence).then_some(200);
        let resolve = self.world.resolve(outcome, &objects, status);
        if let Outcome::Spent { .. } | Outcome::Pending { .. } = outcome {
            self.bodies.insert(held.call_id(), resolve.answer.clone().unwrap().body);
            let now = self.world.ledger().now();
            if let Some(done) = self.done.get_mut(&name) {
                done.told_at = Some(done.told_at.unwrap_or(now));
            }
        }
        let hold = self.world.hold(self.world.call(held.call_id()).hold_id);
        assert_eq!(hold.key_id, payer, "who pays does not change");
        self.world.ledger().resolve(held, resolve).await.unwrap();
    }

    /// Stripe gets a request and may execute it: at most once for each name.
    fn at_stripe(&mut self, flight: &Flight) -> Answer {
        let (answer, executed) = self.stripe.send(&mut self.dice, flight.held.request(), self.real);
        let Some(executed) = executed else { return answer };
        self.trail.push(format!("  {}: {executed:?}", flight.name));
        if let Some(before) = self.done.get(&flight.name) {
            let canceled = self.stripe.objects[&before.object].state == State::Canceled;
            let until = |at: UnixMs| at.plus_millis(u64::from(REMEMBER_DAYS) * DAY_MS);
            let over = before.told_at.is_some_and(|at| self.latest >= until(at));
            assert!(
                canceled || (over && !before.by_content),
                "{} was executed as {} and again as {}\n{}",
                flight.name,
                before.object,
                executed.object,
                self.told()
            );
        }
        let key = flight.held.request().idempotency_key.clone().unwrap();
        self.ran.insert(key, executed.clone());
        *self.executed.entry((flight.payer, executed.lane)).or_default() += executed.minor;
        if executed.over {
            self.flagged.insert(flight.payer);
        }
        let by_content = !flight.name.ends_with(' ');
        let done = Done { object: executed.object, told_at: None, by_content };
        self.done.insert(flight.name.clone(), done);
        answer
    }

    async fn cancel(&mut self) {
        let open = |object: &Object| matches!(object.state, State::Unconfirmed | State::Authorized);
        let all: Vec<String> =
            self.stripe.objects.iter().filter(|(_, object)| open(object)).map(|(id, _)| id.clone()).collect();
        let Some(id) = self.dice.any(&all).cloned() else { return };
        self.trail.push(format!("cancel {id}"));
        self.stripe.objects.get_mut(&id).unwrap().state = State::Canceled;
        if self.dice.percent(80) {
            self.world.ledger().observe(String::new(), id, Facts::default(), Record::Ended).await.unwrap();
        }
    }

    /// What a later read of an object says.
    async fn recover(&mut self) {
        let all: Vec<String> = self.stripe.objects.keys().cloned().collect();
        let Some(id) = self.dice.any(&all).cloned() else { return };
        let object = self.stripe.objects[&id].clone();
        let record = match object.state {
            State::Moved => Record::Moved { minor: object.minor },
            State::Canceled => Record::Ended,
            State::Unconfirmed | State::Authorized => return,
        };
        self.trail.push(format!("observe {id} {record:?}"));
        self.world.ledger().observe(String::new(), id.clone(), Facts::default(), record).await.unwrap();
        let now = self.world.ledger().now();
        let under_way: Vec<&str> = self.flights.iter().map(|flight| flight.name.as_str()).collect();
        for (name, done) in self.done.iter_mut().filter(|(_, done)| done.object == id) {
            if !self.known.contains(&id) || under_way.contains(&name.as_str()) {
                continue;
            }
            done.told_at = Some(done.told_at.unwrap_or(now));
        }
    }

    /// Recovery finds what a call in doubt has done, or an operator says what became of it.
    async fn end_a_doubt(&mut self) {
        let unsettled = self.world.reads().unsettled_holds(1_000).unwrap();
        let doubts: Vec<Hold> = unsettled.into_iter().filter(|hold| hold.state == HoldState::Doubt).collect();
        let Some(hold) = self.dice.any(&doubts).cloned() else { return };
        let key = hold.live.as_ref().unwrap().request.idempotency_key.clone().unwrap();
        let object = self.ran.get(&key).map(|executed| executed.object.clone());
        let by_operator = self.dice.percent(50);
        let found = object.as_ref().map(|id| self.stripe.objects[id].clone());
        let outcome = match found {
            Some(Object { minor, state: State::Moved }) if by_operator => Known::Executed { minor },
            None if by_operator => Known::NotExecuted,
            Some(Object { minor, state: State::Moved }) => Known::Record(Outcome::Spent { minor }),
            Some(Object { minor, state: State::Unconfirmed | State::Authorized }) if !by_operator => {
                Known::Record(Outcome::Pending { minor })
            }
            // What is not found proves nothing.
            Some(_) | None => return,
        };
        self.trail.push(format!("{:?} {object:?} {outcome:?}", hold.call_id));
        let objects: Vec<&str> = object.iter().map(String::as_str).collect();
        let answer = match outcome {
            Known::Record(outcome) => self.world.resolve(outcome, &objects, Some(200)).answer,
            Known::Executed { .. } | Known::NotExecuted => None,
        };
        let body = answer.as_ref().map(|answer| answer.body.clone());
        let actor = by_operator.then(|| "admin".to_owned());
        let objects = object.iter().cloned().collect();
        let end = EndDoubt { outcome, objects, answer, actor, evidence: Map::new() };
        if self.world.ledger().end_doubt(hold.id, end).await.unwrap() != Ending::Ended {
            return;
        }
        let now = self.world.ledger().now();
        self.bodies.extend(body.map(|body| (hold.call_id, body)));
        self.known.extend(object.clone());
        let name = &self.names[&hold.call_id];
        if let Some(done) = self.done.get_mut(name).filter(|done| Some(&done.object) == object.as_ref()) {
            done.told_at = Some(done.told_at.unwrap_or(now));
        }
    }

    /// The process dies; what it was sending may have arrived.
    fn restart(&mut self) {
        self.trail.push("restart".to_owned());
        for flight in std::mem::take(&mut self.flights) {
            if self.dice.percent(50) && self.real <= flight.since + SENT_WITHIN_MS {
                self.at_stripe(&flight);
            }
        }
        self.world.restart();
    }

    fn pass(&mut self) {
        let millis = match self.dice.below(8) {
            0..3 => 5 * 60_000,
            3 | 4 => HOUR_MS,
            5 => 12 * HOUR_MS,
            6 => 23 * HOUR_MS,
            _ => DAY_MS * (1 + self.dice.number(10)),
        };
        self.trail.push(format!("pass {} min", millis / 60_000));
        self.real += millis;
        self.world.pass(millis);
    }

    /// The machine's clock goes wrong, is put right, or the mark is lowered after it.
    async fn turn_the_clock(&mut self) {
        let shown = match self.dice.below(4) {
            0 => self.real + DAY_MS * self.dice.number(5),
            1 => self.real.saturating_sub(DAY_MS * self.dice.number(5)),
            _ => self.real,
        };
        self.trail.push(format!("clock {}", UnixMs::from_millis(shown)));
        self.world.set_clock(UnixMs::from_millis(shown));
        // What was sent by a wrong clock is noted by whatever is asked next.
        self.world.ledger().tick().await.unwrap();
        if shown == self.real && self.dice.percent(50) {
            self.trail.push("lower".to_owned());
            self.world.ledger().lower_clock("was wrong".to_owned(), admin()).await.unwrap();
        }
    }

    fn check(&mut self) {
        self.world.check_counters();
        self.check_holds();
        let counted: BTreeSet<KeyId> =
            self.executed.keys().map(|(key, _)| *key).chain(self.keys.clone()).collect();
        for key in counted {
            // A key whose row is gone has no counters any more.
            let Some(row) = self.world.reads().key(key).unwrap() else { continue };
            if self.flagged.contains(&key) {
                continue;
            }
            for (lane, cap) in [(Lane::In, row.caps.daily), (Lane::Out, row.caps.daily_out)] {
                let total = self.world.total(key, lane).counted();
                let minor = self.executed.get(&(key, lane)).copied().unwrap_or(0);
                let executed = Rate::USD.usd(minor).unwrap();
                assert!(executed <= total, "executed {executed} of counted {total}\n{}", self.told());
                let window =
                    if row.lives_a_day_or_less() { Day::TOTAL } else { self.world.ledger().now().day() };
                let today = self.world.reads().counter(Subject::Key(key), window, lane).unwrap();
                assert!(Some(today.counted()) <= cap, "{today:?} over {cap:?}\n{}", self.told());
            }
            let calls = self.world.total(key, Lane::In).calls + self.world.total(key, Lane::Out).calls;
            assert!(calls <= row.caps.max_calls.unwrap_or(u64::MAX), "{calls} calls");
            let total = self.world.total(key, Lane::In).counted();
            assert!(row.caps.total.is_none_or(|cap| total <= cap), "{total} over the total cap");
        }
    }

    /// A hold that ended as spent is counted as spent.
    fn check_holds(&mut self) {
        let live: Vec<HoldId> =
            self.holds.iter().filter(|id| !self.ended.contains_key(id)).copied().collect();
        for hold in live.into_iter().map(|id| self.world.hold(id)).filter(|hold| !hold.state.is_live()) {
            self.ended.insert(hold.id, hold);
        }
        let mut spent: BTreeMap<(KeyId, Lane), MicroUsd> = BTreeMap::new();
        for hold in self.ended.values().filter(|hold| hold.state == HoldState::Spent) {
            let sum = spent.entry((hold.key_id, hold.lane)).or_default();
            *sum = sum.checked_add(hold.usd).unwrap();
        }
        for ((key, lane), spent) in spent {
            if self.world.reads().key(key).unwrap().is_some() {
                assert_eq!(self.world.total(key, lane).spent, spent, "{}", self.told());
            }
        }
    }

    /// A hold ends once: what had ended is as it was.
    fn check_ended(&self) {
        for (id, before) in &self.ended {
            let now = self.world.reads().hold(*id).unwrap();
            // That its object is over may still be learnt; money it has none.
            let now = now.map(|now| Hold { object_over: before.object_over, ..now });
            assert!(now.is_none_or(|now| now == *before), "{before:?} ended again\n{}", self.told());
        }
    }

    /// Whatever reached Stripe has a record, and nothing was done to the records.
    fn check_records(&self) {
        self.world.check();
        self.check_ended();
        let log = self.world.log();
        let admitted: HashSet<&str> = log
            .iter()
            .filter(|record| record["event"] == "admitted")
            .filter_map(|record| record["idempotency_key"].as_str())
            .collect();
        for key in &self.upstream_keys {
            assert!(admitted.contains(key.as_str()), "{key} has no record");
        }
        let settled: HashSet<&str> = log.iter().filter_map(|record| record["object_id"].as_str()).collect();
        for done in self.done.values().filter(|done| done.told_at.is_some()) {
            assert!(settled.contains(done.object.as_str()), "{} has no record", done.object);
        }
    }

    fn told(&self) -> String {
        self.trail.join("\n")
    }
}
