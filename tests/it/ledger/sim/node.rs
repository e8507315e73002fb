//! One ledger of a history: its sidecars, what they are sending, and what it has to remember.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use keybrake::hold::{Hold, HoldState, Lane, Subject};
use keybrake::id::{CallId, HoldId, KeyId};
use keybrake::key::{Idempotency, Status};
use keybrake::ledger::{Held, LedgerError};
use keybrake::money::{MicroUsd, Rate};
use keybrake::time::{DAY_MS, Day, UnixMs};

use tokio::time::Instant;

use crate::ledger::backend::File;
use crate::ledger::world::{Ask, Place, World, usd};
use crate::postgres::Schema;

use super::Truth;
use super::process::{PATIENCE, Process, node_of};
use super::stripe::Executed;

/// Keys that are in use at one time, and which of them goes by what is charged.
const KEYS: usize = 4;
pub(super) const BY_CONTENT: usize = 3;
/// How long every key here remembers.
const REMEMBER_DAYS: u32 = 3;

/// A call that is being sent.
pub(super) struct Flight {
    pub(super) held: Held,
    pub(super) name: String,
    pub(super) payer: KeyId,
    pub(super) since: u64,
    /// Which process sends it, and the how many-th sending of its attempt it is.
    pub(super) by: usize,
    pub(super) sends: u32,
}

/// Whether a name stands for what is charged, rather than for a caller's key.
pub(super) fn is_by_content(name: &str) -> bool {
    !name.ends_with(' ')
}

/// What was executed under a name, as this account sees it.
pub(super) struct Done {
    pub(super) object: String,
    /// When the ledger was told, by its own time.
    pub(super) told_at: Option<UnixMs>,
}

/// An outcome of which its sender was not told that it is written.
pub(super) struct Unsure {
    pub(super) call: CallId,
    pub(super) hold: HoldId,
    pub(super) name: String,
    /// What it made or moved, if anything.
    pub(super) object: Option<String>,
    pub(super) by: usize,
}

/// One ledger.
pub(super) struct Node {
    pub(super) processes: Vec<Process>,
    /// Which process acts now.
    pub(super) acts: usize,
    /// Where they have it together.
    schema: Option<Schema<'static>>,
    pub(super) unsure: Vec<Unsure>,
    /// Answers that may have been kept.
    pub(super) perhaps: HashMap<CallId, Vec<Vec<u8>>>,
    /// The keys in use.
    pub(super) keys: Vec<KeyId>,
    /// All that its ledger ever had.
    all_keys: BTreeSet<KeyId>,
    pub(super) is_stopped: bool,
    pub(super) flights: Vec<Flight>,
    pub(super) done: HashMap<String, Done>,
    /// What each call was made for.
    pub(super) names: BTreeMap<CallId, String>,
    pub(super) bodies: HashMap<CallId, Vec<u8>>,
    /// Objects that the ledger was told of.
    pub(super) known: HashSet<String>,
    /// What Stripe made of the call that a hold is for.
    came_to: HashMap<HoldId, Option<Executed>>,
    holds: HashSet<HoldId>,
    ended: HashMap<HoldId, Hold>,
    upstream_keys: HashSet<String>,
    /// The highest time that the ledger ever had: what was over then is over.
    latest: UnixMs,
}

/// A place on a disk of its own.
fn new_place() -> Place {
    let file = File::default();
    Arc::new(move |opening| file.ledger(opening))
}

impl Node {
    pub(super) async fn new() -> Self {
        Self::of(vec![Process::alone(World::new(new_place()))], None).await
    }

    /// Another sidecar with the same clock, and a volume of its own.
    pub(super) async fn beside(other: &Self) -> Self {
        Self::of(vec![Process::alone(other.world().beside(new_place()))], None).await
    }

    /// Several sidecars, with one ledger in a schema of their own.
    pub(super) async fn shared(schema: Schema<'static>, sidecars: usize) -> Self {
        let mut processes: Vec<Process> = Vec::new();
        for number in 0..sidecars {
            let process = Process::of(&schema, number, processes.first().map(|first| &first.world));
            processes.push(process);
        }
        Self::of(processes, Some(schema)).await
    }

    async fn of(processes: Vec<Process>, schema: Option<Schema<'static>>) -> Self {
        let latest = processes[0].world.ledger().now();
        let mut node = Self {
            processes,
            acts: 0,
            schema,
            unsure: Vec::new(),
            perhaps: HashMap::new(),
            keys: Vec::new(),
            all_keys: BTreeSet::new(),
            is_stopped: false,
            flights: Vec::new(),
            done: HashMap::new(),
            names: BTreeMap::new(),
            bodies: HashMap::new(),
            known: HashSet::new(),
            came_to: HashMap::new(),
            holds: HashSet::new(),
            ended: HashMap::new(),
            upstream_keys: HashSet::new(),
            latest,
        };
        for k in 0..KEYS {
            let key = node.new_key(k).await;
            node.keys.push(key);
        }
        node
    }

    /// The process that acts, with what it knows.
    pub(super) fn world(&self) -> &World {
        &self.process().world
    }

    pub(super) fn process(&self) -> &Process {
        &self.processes[self.acts]
    }

    pub(super) const fn is_shared(&self) -> bool {
        self.schema.is_some()
    }

    /// Somebody else sees that the process that acts was silent for longer than one may be.
    pub(super) async fn is_silent(&mut self) {
        let Some(schema) = &self.schema else { return };
        let node = node_of(self.acts);
        let others = (0..self.processes.len()).filter(|p| *p != self.acts);
        let Some(other) = others.into_iter().find(|p| !self.processes[*p].is_down()) else { return };
        let ages = "UPDATE boots SET seen = seen - interval '1 hour' WHERE NOT fenced AND node =";
        schema.sql(&format!("{ages} '{node}'")).await;
        let other = &self.processes[other];
        let left = format!("SELECT count(*) FROM boots WHERE node = '{node}' AND NOT (fenced AND doubted)");
        let since = Instant::now();
        // Upkeep that comes to nothing is tried again at the next tick.
        while schema.sql(&left).await != [["0"]] {
            assert!(since.elapsed() < PATIENCE, "{node} is not fenced");
            let ticked = other.world.ledger().tick().await;
            assert!(matches!(ticked, Ok(_) | Err(LedgerError::Unavailable(_))), "{ticked:?}");
            // What is done beside a tick is done before the next batch.
            other.mend().await;
        }
    }

    /// What was not known to be written and is seen now, or never will be.
    pub(super) fn learn(&mut self) {
        for unsure in std::mem::take(&mut self.unsure) {
            let hold = self.world().hold(unsure.hold);
            match (hold.state, &unsure.object) {
                _ if hold.call_id != unsure.call => {}
                (HoldState::Sending { .. }, _) => self.unsure.push(unsure),
                (HoldState::Doubt, _) if self.processes[unsure.by].is_down() => self.unsure.push(unsure),
                (HoldState::Doubt, _) | (_, None) => {}
                (HoldState::Open | HoldState::Spent | HoldState::Void, Some(object)) => {
                    self.was_told(&unsure.name, object);
                }
            }
        }
    }

    async fn new_key(&mut self, k: usize) -> KeyId {
        let label = format!("k{k}");
        let key = self.world().key(&label, |key| {
            key.remember_days = REMEMBER_DAYS;
            key.caps.daily = Some(usd("9.00"));
            key.caps.daily_out = Some(usd("2.00"));
            match k {
                0 => key.caps.total = Some(usd("13.00")),
                1 => key.expires_at = key.created_at.plus_millis(DAY_MS),
                2 => key.caps.max_calls = Some(6),
                _ => {
                    let (scope, fields) = ("billing:1".to_owned(), Vec::new());
                    key.idempotency = Idempotency::Content { scope, fields };
                }
            }
        });
        let key = key.await;
        self.all_keys.insert(key);
        for other in &self.processes {
            other.world.knows(key, self.world().mode_of(key));
        }
        key
    }

    /// Puts a new key in the place of one that opens nothing.
    pub(super) async fn renew(&mut self, k: usize) {
        self.process().keeps();
        if self.process().is_down() {
            self.process().mend().await;
            self.learn();
        }
        self.keys[k] = self.new_key(k).await;
    }

    /// `None` once its row is gone.
    pub(super) fn status(&self, k: usize) -> Option<Status> {
        let now = self.world().ledger().now();
        self.world().reads().key(self.keys[k]).unwrap().map(|key| key.status(now))
    }

    pub(super) fn notes_the_time(&mut self) {
        self.latest = self.latest.max(self.world().ledger().now());
    }

    pub(super) fn take_off(&mut self, held: Held, by_content: bool, ask: &Ask, real: u64) {
        let call = self.world().call(held.call_id());
        let reserved = self.world().hold(call.hold_id);
        self.holds.insert(reserved.id);
        if held.first_send() {
            self.came_to.insert(reserved.id, None);
        }
        let (by, sends) = (self.acts, call.last_attempt().unwrap().sends);
        self.upstream_keys.insert(held.request().idempotency_key.clone().unwrap());
        let what = if by_content { format!("{:?} {:?}", ask.deed, ask.object) } else { String::new() };
        let name = format!("{} {what}", ask.name);
        self.names.insert(held.call_id(), name.clone());
        self.flights.push(Flight { held, name, payer: reserved.key_id, since: real, by, sends });
    }

    /// Stripe has, or remembers, an answer to what is being sent.
    pub(super) fn came_to(&mut self, flight: &Flight, executed: Option<&Executed>) {
        let hold = self.world().call(flight.held.call_id()).hold_id;
        self.came_to.insert(hold, executed.cloned());
    }

    /// What Stripe executed of the call that a hold is for.
    pub(super) fn executed_for(&self, hold: &Hold) -> Option<&Executed> {
        self.came_to.get(&hold.id)?.as_ref()
    }

    /// The ledger learns that a call was executed.
    pub(super) fn was_told(&mut self, name: &str, object: &str) {
        let now = self.world().ledger().now();
        let fresh = || Done { object: object.to_owned(), told_at: None };
        let done = self.done.entry(name.to_owned()).or_insert_with(fresh);
        if done.object != object {
            *done = fresh();
        }
        done.told_at = Some(done.told_at.unwrap_or(now));
    }

    /// The ledger learns what became of an object; calls that it knew to be on it are done.
    pub(super) fn saw(&mut self, object: &str) {
        let now = self.world().ledger().now();
        let under_way: Vec<&str> = self.flights.iter().map(|flight| flight.name.as_str()).collect();
        for (name, done) in self.done.iter_mut().filter(|(_, done)| done.object == object) {
            if self.known.contains(object) && !under_way.contains(&name.as_str()) {
                done.told_at = Some(done.told_at.unwrap_or(now));
            }
        }
    }

    /// Whether the time for which a call is remembered is over. What is named by its content stays known.
    pub(super) fn may_be_done_again(&self, name: &str, done: &Done) -> bool {
        let until = |at: UnixMs| at.plus_millis(u64::from(REMEMBER_DAYS) * DAY_MS);
        !is_by_content(name) && done.told_at.is_some_and(|at| self.latest >= until(at))
    }

    pub(super) fn check(&mut self, truth: &Truth, told: &dyn Fn() -> String) {
        self.world().check_counters();
        self.check_holds(told);
        for key in &self.all_keys {
            // A key whose row is gone has no counters any more.
            let Some(row) = self.world().reads().key(*key).unwrap() else { continue };
            // What Stripe took beyond a hold is the one thing that may exceed a cap.
            let excess = Rate::USD.usd(truth.excess(*key)).unwrap();
            for (lane, cap) in [(Lane::In, row.caps.daily), (Lane::Out, row.caps.daily_out)] {
                let counted = self.world().total(*key, lane).counted();
                let executed = Rate::USD.usd(truth.executed(*key, lane)).unwrap();
                let allowed = counted.checked_add(excess).unwrap();
                assert!(executed <= allowed, "executed {executed} of counted {counted}\n{}", told());
                let window =
                    if row.lives_a_day_or_less() { Day::TOTAL } else { self.world().ledger().now().day() };
                let today = self.world().reads().counter(Subject::Key(*key), window, lane).unwrap();
                let cap = cap.unwrap().checked_add(excess).unwrap();
                assert!(today.counted() <= cap, "{today:?} over {cap:?}\n{}", told());
            }
            let calls = self.world().total(*key, Lane::In).calls + self.world().total(*key, Lane::Out).calls;
            assert!(calls <= row.caps.max_calls.unwrap_or(u64::MAX), "{calls} calls");
            let total = self.world().total(*key, Lane::In).counted();
            let within = |cap: MicroUsd| total <= cap.checked_add(excess).unwrap();
            assert!(row.caps.total.is_none_or(within), "{total} over the total cap\n{}", told());
        }
    }

    /// A hold that ended as spent is counted as spent.
    fn check_holds(&mut self, told: &dyn Fn() -> String) {
        // Some were let through for somebody who was not told.
        let untold =
            if self.is_shared() { self.world().reads().unsettled_holds(1_000).unwrap() } else { Vec::new() };
        self.holds.extend(untold.iter().map(|hold| hold.id));
        let live: Vec<HoldId> =
            self.holds.iter().filter(|id| !self.ended.contains_key(id)).copied().collect();
        let seen: Vec<Hold> = live.into_iter().map(|id| self.world().hold(id)).collect();
        for hold in seen.into_iter().filter(|hold| !hold.state.is_live()) {
            self.ended.insert(hold.id, hold);
        }
        let mut spent: BTreeMap<(KeyId, Lane), MicroUsd> = BTreeMap::new();
        for hold in self.ended.values().filter(|hold| hold.state == HoldState::Spent) {
            let sum = spent.entry((hold.key_id, hold.lane)).or_default();
            *sum = sum.checked_add(hold.usd).unwrap();
        }
        for ((key, lane), spent) in spent {
            if self.world().reads().key(key).unwrap().is_some() {
                assert_eq!(self.world().total(key, lane).spent, spent, "{}", told());
            }
        }
    }

    /// A hold ends once: what had ended is as it was.
    pub(super) fn check_ended(&self, told: &dyn Fn() -> String) {
        for (id, before) in &self.ended {
            let now = self.world().reads().hold(*id).unwrap();
            // That its object is over may still be learnt; money it has none.
            let now = now.map(|now| Hold { object_over: before.object_over, ..now });
            assert!(now.is_none_or(|now| now == *before), "{before:?} ended again\n{}", told());
        }
    }

    /// Whatever reached Stripe has a record, and nothing was done to the records.
    pub(super) fn check_records(&self, told: &dyn Fn() -> String) {
        let mut log = Vec::new();
        for process in &self.processes {
            process.world.check();
            log.extend(process.world.log());
        }
        let admitted: HashSet<&str> = log
            .iter()
            .filter(|record| record["event"] == "admitted")
            .filter_map(|record| record["idempotency_key"].as_str())
            .collect();
        for key in &self.upstream_keys {
            assert!(admitted.contains(key.as_str()), "{key} has no record\n{}", told());
        }
        let settled: HashSet<&str> = log.iter().filter_map(|record| record["object_id"].as_str()).collect();
        for done in self.done.values().filter(|done| done.told_at.is_some()) {
            assert!(settled.contains(done.object.as_str()), "{} has no record\n{}", done.object, told());
        }
    }
}
