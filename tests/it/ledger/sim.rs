//! Random histories: two sidecars with a few keys and names in front of one Stripe, which loses answers; restarts, a
//! clock that jumps, a kill switch, revoked keys, a ledger that is lost. After every step the invariants are checked
//! against a much simpler account of what was really executed. The same with several sidecars on one ledger in a database
//! (`fleet.rs`).
//!
//! `KEYBRAKE_TEST_HISTORIES` sets how many are run; `KEYBRAKE_TEST_SEED` repeats one.

mod fleet;
mod ladder;
mod node;
pub(super) mod process;
mod stripe;

use std::collections::HashMap;

use keybrake::call::{Outcome, Reading, Record, conclude};
use keybrake::hold::{Facts, Hold, HoldState, Lane};
use keybrake::id::KeyId;
use keybrake::key::Status;
use keybrake::ledger::rules::resolve::{EndDoubt, Known};
use keybrake::ledger::{Admitted, Ending, LedgerError};
use keybrake::refusal::{Code, Refusal};
use keybrake::time::{DAY_MS, HOUR_MS, UnixMs};
use serde_json::Map;

use crate::dice::{Dice, Told, seeds};
use crate::ledger::world::{Ask, Deed, START, admin};

use ladder::{Ladders, Ran};
use node::{BY_CONTENT, Done, Flight, Node, Unsure};
use stripe::{Answer, Object, State, Stripe, plain};

/// Histories that are run when nobody says otherwise, and steps of each.
const HISTORIES: u64 = 60;
const STEPS: usize = 70;
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
        let node = history.step().await;
        history.check(node);
        if n % 16 == 0 {
            history.check_ended();
        }
    }
    history.check_records();
}

/// What really happened to money, whatever the ledgers believe.
#[derive(Default)]
struct Truth {
    executed: HashMap<(KeyId, Lane), u64>,
    /// By how much an object exceeds what a key held for it.
    excess: HashMap<(KeyId, String), u64>,
    ladders: Ladders,
}

impl Truth {
    fn executed(&self, key: KeyId, lane: Lane) -> u64 {
        self.executed.get(&(key, lane)).copied().unwrap_or(0)
    }

    fn excess(&self, key: KeyId) -> u64 {
        self.excess.iter().filter(|((of, _), _)| *of == key).map(|(_, minor)| minor).sum()
    }

    /// Notes that a hold is settled with so much of its object, and says whether that is more than it was.
    fn settles(&mut self, hold: &Hold, object: &str, minor: u64) -> bool {
        let own = minor.saturating_sub(hold.moved_before);
        let is_over = own > hold.minor;
        if is_over {
            self.excess.insert((hold.key_id, object.to_owned()), own - hold.minor);
        }
        is_over
    }
}

/// One history.
struct History {
    dice: Dice,
    stripe: Stripe,
    /// Time as it really passes.
    real: u64,
    nodes: Vec<Node>,
    /// Whether a commit may stay unknown for as long as a sidecar asks for it, which takes seconds.
    may_take_long: bool,
    truth: Truth,
    trail: Vec<String>,
}

impl History {
    async fn new(seed: u64) -> Self {
        let first = Node::new().await;
        let second = Node::beside(&first).await;
        Self::of(seed, vec![first, second])
    }

    fn of(seed: u64, nodes: Vec<Node>) -> Self {
        Self {
            dice: Dice::new(seed),
            stripe: Stripe::default(),
            real: START.millis(),
            nodes,
            may_take_long: true,
            truth: Truth::default(),
            trail: Vec::new(),
        }
    }

    /// Does something at one sidecar, and says at which.
    async fn step(&mut self) -> usize {
        let n = usize::from(self.nodes.len() > 1 && self.dice.percent(35));
        self.nodes[n].notes_the_time();
        let is_shared = self.nodes[n].is_shared();
        match self.dice.below(100) {
            0..43 => self.ask(n).await,
            43..71 => self.deliver(n).await,
            71..76 => self.cancel(n).await,
            76..79 => self.recover(n).await,
            79..81 => self.end_a_doubt(n).await,
            81..85 => self.restart(n),
            85..91 => self.pass(),
            91 => {
                let ticked = self.nodes[n].world().ledger().tick().await;
                ticked.map_or_else(|error| self.could_not(n, &error), drop);
            }
            92..95 => self.elsewhere(n).await,
            95 => self.throw_the_switch(n).await,
            96 => self.revoke(n).await,
            97 => self.forget(n).await,
            98 | 99 if is_shared => self.silence(n).await,
            98 => self.lose(n).await,
            _ => self.turn_the_clock().await,
        }
        n
    }

    fn note(&mut self, n: usize, what: &str) {
        self.trail.push(format!("{n}: {what}"));
    }

    /// Somebody works on intents without a sidecar.
    async fn elsewhere(&mut self, n: usize) {
        let authorized = |(_, object): &(&String, &Object)| object.state == State::Authorized;
        let all: Vec<String> =
            self.stripe.objects.iter().filter(authorized).map(|(id, _)| id.clone()).collect();
        let of_ours = self.dice.any(&all).cloned().filter(|_| self.dice.percent(70));
        let captures = self.dice.percent(50);
        self.trail.push(format!("elsewhere {of_ours:?} {captures}"));
        if let Some(id) = of_ours {
            let object = self.stripe.objects.get_mut(&id).unwrap();
            object.minor += 50;
            object.state = if captures { State::Moved } else { State::Authorized };
            if captures && self.dice.percent(50) {
                let minor = object.minor;
                self.observe(n, id.clone(), Record::Moved { minor }).await;
                self.nodes[n].saw(&id);
            }
        } else {
            let id = format!("pi_{}", self.stripe.objects.len());
            self.stripe.objects.insert(id, Object { minor: 300, state: State::Unconfirmed });
        }
    }

    async fn ask(&mut self, n: usize) {
        let k = self.dice.below(self.nodes[n].keys.len());
        if self.nodes[n].status(k) != Some(Status::Active) && self.dice.percent(70) {
            self.nodes[n].renew(k).await;
        }
        if self.nodes[n].is_stopped && self.dice.percent(30) {
            self.throw_the_switch(n).await;
        }
        let (key, status, ask) = (self.nodes[n].keys[k], self.nodes[n].status(k), self.any_ask());
        self.note(n, &format!("k{k} {ask:?}"));
        let known = ask.object.as_ref().and_then(|id| Some((id, self.stripe.objects.get(id)?)));
        let node = &self.nodes[n];
        if let Some((id, object)) = known {
            node.world().tells(id, object.record());
        }
        let Some(status) = status else { return };
        let must = must_be(status, node.is_stopped);
        match node.world().admit(key, &ask).await {
            Ok(admitted) => self.take(n, k, &ask, must, admitted),
            Err(error) => self.could_not(n, &error),
        }
    }

    /// What was said to a request is what may be said.
    fn take(&mut self, n: usize, k: usize, ask: &Ask, must: Option<Code>, admitted: Admitted) {
        if let (Some(code), Admitted::Held(_) | Admitted::Replay { .. } | Admitted::Tell(_)) =
            (must, &admitted)
        {
            panic!("{admitted:?} instead of {code:?}\n{}", self.told());
        }
        let node = &mut self.nodes[n];
        match (admitted, must) {
            (Admitted::Refused(refusal), Some(code)) => assert_eq!(refusal.code, code),
            (Admitted::Refused(refusal), None) => may_be_refused(&refusal, ask),
            (other, Some(code)) => panic!("{other:?} instead of {code:?}\n{}", self.told()),
            (Admitted::Held(held), None) => node.take_off(held, k == BY_CONTENT, ask, self.real),
            (Admitted::Replay { call_id, answer }, None) => {
                let perhaps = node.perhaps.get(&call_id).into_iter().flatten();
                let mut known = node.bodies.get(&call_id).into_iter().chain(perhaps);
                assert!(known.any(|body| *body == answer.body), "a replay gives the same bytes");
            }
            // What was found or said to be executed has no answer that was seen.
            (Admitted::Tell(executed), None) => {
                assert!(node.known.contains(&executed.object_id), "{executed:?}");
            }
            (Admitted::Look(_), None) => panic!("every object has a record"),
            (Admitted::Elsewhere, None) => panic!("it was not asked to wait"),
        }
    }

    fn any_ask(&mut self) -> Ask {
        let name = format!("n{}", self.dice.below(7));
        // Mostly intents that something can still be done with.
        let any_state = self.dice.percent(25);
        let fits = |(id, object): &(&String, &Object)| {
            id.starts_with("pi")
                && (any_state || matches!(object.state, State::Unconfirmed | State::Authorized))
        };
        let intents: Vec<String> =
            self.stripe.objects.iter().filter(fits).map(|(id, _)| id.clone()).collect();
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

    /// One request reaches Stripe, or not; its answer arrives, or not.
    async fn deliver(&mut self, n: usize) {
        let node = &self.nodes[n];
        let own = |at: &usize| node.flights[*at].by == node.acts;
        let own: Vec<usize> = (0..node.flights.len()).filter(own).collect();
        let Some(at) = self.dice.any(&own).copied() else { return };
        let flight = self.nodes[n].flights.swap_remove(at);
        let answer = match self.dice.below(100) {
            0..5 => plain(Reading::NotSent),
            _ if self.real > flight.since + SENT_WITHIN_MS => plain(Reading::NotSent),
            5..13 => plain(Reading::Silence),
            13..15 => plain(Reading::OwnKeyRefused),
            _ => self.at_stripe(n, &flight),
        };
        let answer = if self.dice.percent(12) { plain(Reading::Silence) } else { answer };
        self.note(n, &format!("  {}: {answer:?}", flight.name));
        let Flight { held, name, payer, sends, by, .. } = flight;
        let outcome = conclude(&answer.reading, held.first_send(), answer.replayed, held.basis());
        let objects: Vec<&str> = answer.objects.iter().map(String::as_str).collect();
        let node = &mut self.nodes[n];
        node.known.extend(answer.objects.iter().cloned());
        let status = (answer.reading != Reading::Silence).then_some(200);
        let resolve = node.world().resolve(outcome, &objects, status);
        let (call_id, sent) = (held.call_id(), node.world().call(held.call_id()));
        let hold = node.world().hold(sent.hold_id);
        assert_eq!(hold.key_id, payer, "who pays does not change");
        // Others took its sender for gone, and may have sent it again.
        let is_late = !matches!(hold.state, HoldState::Sending { .. })
            || sent.last_attempt().is_none_or(|attempt| attempt.sends != sends);
        let is_executed = matches!(outcome, Outcome::Spent { .. } | Outcome::Pending { .. });
        let object = is_executed.then(|| objects[0].to_owned());
        let body = is_executed.then(|| resolve.answer.clone().unwrap().body);
        match node.process().resolve(held, resolve).await {
            Ok(()) => {}
            Err(LedgerError::Contradiction(_)) if is_late => return,
            Err(error) => {
                node.perhaps.entry(call_id).or_default().extend(body);
                node.unsure.push(Unsure { call: call_id, hold: hold.id, name, object, by });
                self.could_not(n, &error);
                return;
            }
        }
        node.bodies.extend(body.map(|body| (call_id, body)));
        if let Some(object) = &object {
            node.was_told(&name, object);
        }
        if let (Outcome::Spent { minor }, Some(object)) = (outcome, &object)
            && self.truth.settles(&hold, object, minor)
        {
            self.is_closed(n, payer);
        }
    }

    /// Stripe gets a request and may execute it: at most once for each name.
    fn at_stripe(&mut self, n: usize, flight: &Flight) -> Answer {
        let request = flight.held.request();
        let key = request.idempotency_key.as_deref().unwrap();
        self.truth.ladders.begin(&flight.name, self.real);
        let before = self.stripe.stored;
        let (answer, executed) = self.stripe.send(&mut self.dice, request, self.real);
        let ledger = self.nodes[n].world().ledger().id();
        let stored_at = self.stripe.stored_at(key, self.real);
        if answer.reading == Reading::KeyMismatch {
            let met = self.stripe.differs(request) || self.truth.ladders.was_forgotten(&flight.name);
            assert!(met, "{} did not meet its equal\n{}", flight.name, self.told());
        } else if self.stripe.stored > before {
            let ran = executed.clone().map(|executed| Ran { executed, ledger });
            self.truth.ladders.stored(&flight.name, key, self.real, ran);
        } else if answer.reading == Reading::Invalid && !answer.replayed {
            // What is turned away at the door has a next attempt here, and none elsewhere.
            self.truth.ladders.diverge(&flight.name);
        }
        if stored_at.is_some() && answer.reading != Reading::KeyMismatch {
            self.nodes[n].came_to(flight, self.truth.ladders.ran(&flight.name, key));
        }
        let Some(executed) = executed else { return answer };
        self.note(n, &format!("  {}: {executed:?}", flight.name));
        let canceled = |object: &str| self.stripe.objects[object].state == State::Canceled;
        if let Some(before) = self.nodes[n].done.get(&flight.name) {
            assert!(
                canceled(&before.object) || self.nodes[n].may_be_done_again(&flight.name, before),
                "{} was executed as {} and again as {}\n{}",
                flight.name,
                before.object,
                executed.object,
                self.told()
            );
        }
        if let Some(other) = self.truth.ladders.twice(&flight.name, ledger, self.real, canceled) {
            panic!("{} was executed as {other} by another ledger\n{}", flight.name, self.told());
        }
        *self.truth.executed.entry((flight.payer, executed.lane)).or_default() += executed.minor;
        let hold = self.nodes[n].world().hold(self.nodes[n].world().call(flight.held.call_id()).hold_id);
        self.truth.settles(&hold, &executed.object, executed.minor);
        let done = Done { object: executed.object, told_at: None };
        self.nodes[n].done.insert(flight.name.clone(), done);
        answer
    }

    async fn cancel(&mut self, n: usize) {
        let open = |object: &Object| matches!(object.state, State::Unconfirmed | State::Authorized);
        let all: Vec<String> =
            self.stripe.objects.iter().filter(|(_, object)| open(object)).map(|(id, _)| id.clone()).collect();
        let Some(id) = self.dice.any(&all).cloned() else { return };
        self.note(n, &format!("cancel {id}"));
        self.stripe.objects.get_mut(&id).unwrap().state = State::Canceled;
        if self.dice.percent(80) {
            self.observe(n, id, Record::Ended).await;
        }
    }

    /// What a later read of an object says, mostly of one whose hold has not ended.
    async fn recover(&mut self, n: usize) {
        let unsettled = self.nodes[n].world().reads().unsettled_holds(1_000).unwrap();
        let open: Vec<String> = unsettled.into_iter().filter_map(|hold| hold.object_id).collect();
        let all: Vec<String> = self.stripe.objects.keys().cloned().collect();
        let from = if self.dice.percent(75) { &open } else { &all };
        let Some(id) = self.dice.any(from).filter(|id| self.stripe.objects.contains_key(*id)).cloned() else {
            return;
        };
        let object = self.stripe.objects[&id].clone();
        let record = match object.state {
            State::Moved => Record::Moved { minor: object.minor },
            State::Canceled => Record::Ended,
            State::Unconfirmed | State::Authorized => return,
        };
        self.note(n, &format!("observe {id} {record:?}"));
        self.observe(n, id.clone(), record).await;
        self.nodes[n].saw(&id);
    }

    async fn observe(&mut self, n: usize, id: String, record: Record) {
        let world = self.nodes[n].world();
        let before = world.reads().hold_of_object("", &id).unwrap();
        while let Err(error) =
            world.ledger().observe(String::new(), id.clone(), Facts::default(), record).await
        {
            self.could_not(n, &error);
            self.nodes[n].process().mend().await;
        }
        let (Some(hold), Record::Moved { minor }) = (before, record) else { return };
        if !hold.state.is_live() || world.hold(hold.id).state.is_live() {
            return;
        }
        self.nodes[n].known.insert(id.clone());
        if self.truth.settles(&hold, &id, minor) {
            self.is_closed(n, hold.key_id);
        }
    }

    /// Recovery finds what a call in doubt has done, or an operator says what became of it.
    async fn end_a_doubt(&mut self, n: usize) {
        let unsettled = self.nodes[n].world().reads().unsettled_holds(1_000).unwrap();
        let doubts: Vec<Hold> = unsettled.into_iter().filter(|hold| hold.state == HoldState::Doubt).collect();
        let Some(hold) = self.dice.any(&doubts).cloned() else { return };
        // Nobody may say what becomes of what is still under way, and of what nobody was let through with there is no
        // account.
        let is_under_way = self.nodes[n].flights.iter().any(|flight| flight.held.call_id() == hold.call_id);
        let Some(name) = self.nodes[n].names.get(&hold.call_id).cloned().filter(|_| !is_under_way) else {
            return;
        };
        let object = self.nodes[n].executed_for(&hold).map(|executed| executed.object.clone());
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
        self.note(n, &format!("{:?} {object:?} {outcome:?}", hold.call_id));
        let node = &mut self.nodes[n];
        let objects: Vec<&str> = object.iter().map(String::as_str).collect();
        let answer = match outcome {
            Known::Record(outcome) => node.world().resolve(outcome, &objects, Some(200)).answer,
            Known::Executed { .. } | Known::NotExecuted => None,
        };
        let body = answer.as_ref().map(|answer| answer.body.clone());
        let actor = by_operator.then(|| "admin".to_owned());
        let objects = object.iter().cloned().collect();
        let end = EndDoubt { outcome, objects, answer, actor, evidence: Map::new() };
        let has_ended = match node.world().ledger().end_doubt(hold.id, end).await {
            Ok(ending) => ending == Ending::Ended,
            Err(error) => {
                self.could_not(n, &error);
                self.nodes[n].process().mend().await;
                self.nodes[n].world().hold(hold.id).state != HoldState::Doubt
            }
        };
        if !has_ended {
            return;
        }
        let node = &mut self.nodes[n];
        node.bodies.extend(body.map(|body| (hold.call_id, body)));
        node.known.extend(object.clone());
        match (object, outcome) {
            (Some(object), Known::Executed { minor } | Known::Record(Outcome::Spent { minor })) => {
                node.was_told(&name, &object);
                // An operator tells what of the object is this hold's.
                let before = if by_operator { hold.moved_before } else { 0 };
                if self.truth.settles(&hold, &object, minor + before) {
                    self.is_closed(n, hold.key_id);
                }
            }
            (Some(object), _) => node.was_told(&name, &object),
            // An operator's word opens a next attempt here, and none elsewhere.
            (None, _) => self.truth.ladders.diverge(&name),
        }
    }

    /// The process dies; what it was sending may have arrived.
    fn restart(&mut self, n: usize) {
        self.note(n, "restart");
        self.die(n);
        let node = &mut self.nodes[n];
        node.processes[node.acts].restart();
    }

    fn die(&mut self, n: usize) {
        let node = &mut self.nodes[n];
        let (own, others) =
            std::mem::take(&mut node.flights).into_iter().partition(|flight| flight.by == node.acts);
        node.flights = others;
        let own: Vec<Flight> = own;
        for flight in own {
            if self.dice.percent(50) && self.real <= flight.since + SENT_WITHIN_MS {
                self.at_stripe(n, &flight);
            }
        }
    }

    /// The process dies and its volume with it. What it had executed is counted by nobody any more; that it was no more
    /// than it counted holds to the end.
    async fn lose(&mut self, n: usize) {
        if self.dice.percent(50) {
            return;
        }
        self.note(n, "lose");
        self.die(n);
        self.check(n);
        self.nodes[n] = Node::beside(&self.nodes[n]).await;
    }

    async fn throw_the_switch(&mut self, n: usize) {
        let on = !self.nodes[n].is_stopped;
        self.note(n, if on { "stop" } else { "go" });
        let done = self.nodes[n].world().ledger().set_kill_switch(on, "a test".to_owned(), admin());
        if let Err(error) = done.await {
            self.could_not(n, &error);
            self.nodes[n].process().mend().await;
        } else {
            self.nodes[n].is_stopped = on;
        }
        let node = &mut self.nodes[n];
        let found: Vec<bool> = node
            .processes
            .iter()
            .map(|process| process.world.reads().kill_switch().unwrap().is_some())
            .collect();
        if node.is_shared() {
            node.is_stopped = found[0];
        }
        assert!(found.iter().all(|found| *found == node.is_stopped), "the switch is everywhere as it is");
    }

    async fn revoke(&mut self, n: usize) {
        let k = self.dice.below(self.nodes[n].keys.len());
        self.note(n, &format!("revoke k{k}"));
        let revoked = self.nodes[n].world().ledger().revoke_key(self.nodes[n].keys[k], admin()).await;
        // It may have gone with its last memory.
        if revoked.is_ok() {
            for process in &self.nodes[n].processes {
                let key = process.world.reads().key(self.nodes[n].keys[k]).unwrap().unwrap();
                assert!(key.revoked_at.is_some(), "it is revoked everywhere");
            }
        }
    }

    /// An operator takes a call back.
    async fn forget(&mut self, n: usize) {
        let calls: Vec<_> = self.nodes[n].names.keys().copied().collect();
        let Some(call) = self.dice.any(&calls).copied() else { return };
        self.nodes[n].process().keeps();
        let taken = self.nodes[n].world().ledger().forget_call(call, "a test".to_owned(), admin()).await;
        if let Ok(Some(_)) = taken {
            let name = self.nodes[n].names[&call].clone();
            self.note(n, &format!("forget {name}"));
            self.nodes[n].done.remove(&name);
            self.truth.ladders.forget(&name);
        }
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
        // Both have the same clock.
        self.nodes[0].world().pass(millis);
    }

    /// The machine's clock goes wrong, is put right, or the mark is lowered after it.
    async fn turn_the_clock(&mut self) {
        let shown = match self.dice.below(4) {
            0 => self.real + DAY_MS * self.dice.number(5),
            1 => self.real.saturating_sub(DAY_MS * self.dice.number(5)),
            _ => self.real,
        };
        self.trail.push(format!("clock {}", UnixMs::from_millis(shown)));
        self.nodes[0].world().set_clock(UnixMs::from_millis(shown));
        let lowers = shown == self.real && self.dice.percent(50);
        for node in &self.nodes {
            // What was sent by a wrong clock is noted by whatever is asked next.
            node.world().ledger().tick().await.unwrap();
            if lowers {
                node.world().ledger().lower_clock("was wrong".to_owned(), admin()).await.unwrap();
            }
        }
    }

    /// A ledger across a wire may be out of reach at any time, and no other.
    fn could_not(&self, n: usize, error: &LedgerError) {
        let may = self.nodes[n].is_shared() && matches!(error, LedgerError::Unavailable(_));
        assert!(may, "{error}\n{}", self.told());
    }

    /// More than was held was executed, and is known: the key is closed.
    fn is_closed(&self, n: usize, key: KeyId) {
        let row = self.nodes[n].world().reads().key(key).unwrap();
        assert!(row.is_none_or(|row| row.closed_at.is_some()), "{key} stays open\n{}", self.told());
    }

    fn check(&mut self, n: usize) {
        let trail = || self.trail.join("\n");
        self.nodes[n].check(&self.truth, &trail);
    }

    fn check_ended(&self) {
        for node in &self.nodes {
            node.check_ended(&|| self.told());
        }
    }

    fn check_records(&self) {
        for node in &self.nodes {
            node.check_ended(&|| self.told());
            node.check_records(&|| self.told());
        }
    }

    fn told(&self) -> String {
        self.trail.join("\n")
    }
}

/// What a key is refused with, whatever it asks for.
fn must_be(status: Status, is_stopped: bool) -> Option<Code> {
    match status {
        Status::Expired => Some(Code::VaultKeyExpired),
        Status::Revoked => Some(Code::VaultKeyRevoked),
        Status::Closed => Some(Code::VaultKeyClosed),
        Status::Active => is_stopped.then_some(Code::KillSwitch),
    }
}

/// Refusals that have a reason here.
fn may_be_refused(refusal: &Refusal, ask: &Ask) {
    let of_any = [
        Code::SpendCapExceeded,
        Code::CallLimitExceeded,
        Code::IdempotencyError,
        Code::IdempotencyKeyInUse,
        Code::OutcomeUnknown,
        Code::AlreadyExecuted,
        Code::AmountUnknown,
    ];
    // The key that pays for the object may be dead.
    let of_object = ask.object.is_some() && refusal.code == Code::ParameterNotAllowed;
    assert!(of_any.contains(&refusal.code) || of_object, "{refusal:?}");
}
