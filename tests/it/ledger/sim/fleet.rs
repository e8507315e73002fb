//! Random histories of several sidecars that have one ledger in a database together, by wires that break: right before a
//! COMMIT, right after it, at any other message, and for longer. Time is the database's there, so that no clock turns; a
//! sidecar that is silent is taken for gone.
//!
//! `KEYBRAKE_TEST_FLEET_HISTORIES` sets how many are run. What sidecars do at the same time is not up to the seed alone.

use keybrake::hold::HoldState;
use keybrake::ledger::Admitted;

use crate::dice::{Told, seeds};
use crate::ledger::line::Cut;
use crate::postgres;

use super::node::{BY_CONTENT, Node};
use super::{History, must_be};

/// Histories that are run when nobody says otherwise, steps of each, and sidecars.
const HISTORIES: u64 = 1;
const STEPS: usize = 60;
const SIDECARS: usize = 3;
/// Messages of a batch or two.
const MESSAGES: usize = 40;

#[test]
fn random_histories_of_a_fleet_keep_the_invariants() {
    let Some(server) = postgres::server() else { return };
    let seeds = seeds("KEYBRAKE_TEST_FLEET_HISTORIES", HISTORIES);
    let (some, others) = seeds.split_at(seeds.len() / 2);
    std::thread::scope(|scope| {
        [some, others].map(|seeds| scope.spawn(move || run_all(server, seeds))).map(drop)
    });
}

fn run_all(server: &'static postgres::Server, seeds: &[u64]) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    for seed in seeds {
        runtime.block_on(run(server, *seed));
    }
}

async fn run(server: &'static postgres::Server, seed: u64) {
    let _told = Told::of_seed(seed);
    let mut history = History::of(seed, vec![Node::shared(server.schema("sim"), SIDECARS).await]);
    for n in 0..STEPS {
        history.break_something();
        if history.dice.percent(20) {
            history.rush().await;
        } else {
            history.step().await;
        }
        history.mend_something().await;
        if n % 4 == 0 {
            history.check(0);
        }
        if n % 16 == 0 {
            history.check_ended();
        }
    }
    history.end().await;
}

impl History {
    /// Another sidecar acts, and its wire may break meanwhile.
    fn break_something(&mut self) {
        let node = &mut self.nodes[0];
        node.acts = self.dice.below(node.processes.len());
        if !self.dice.percent(40) {
            return;
        }
        let cut = match self.dice.below(4) {
            0 => Cut::BeforeCommit,
            1 => Cut::AfterCommit,
            _ => Cut::AtMessage(self.dice.below(MESSAGES)),
        };
        let is_of_commit = matches!(cut, Cut::BeforeCommit | Cut::AfterCommit);
        let then_down = self.dice.percent(25) && (!is_of_commit || std::mem::take(&mut self.may_take_long));
        let acts = node.acts;
        node.process().breaks(cut, then_down);
        self.note(0, &format!("process {acts}: {cut:?} {then_down}"));
    }

    /// Wires do not break any more, and most of those that did are mended.
    async fn mend_something(&mut self) {
        let node = &mut self.nodes[0];
        for process in &node.processes {
            process.keeps();
            if !process.is_down() || self.dice.percent(30) {
                process.mend().await;
            }
        }
        node.learn();
    }

    /// A sidecar that goes on with what it sends, and of which nobody hears.
    pub(super) async fn silence(&mut self, n: usize) {
        let acts = self.nodes[n].acts;
        self.note(n, &format!("process {acts} is silent"));
        self.nodes[n].is_silent().await;
    }

    /// All sidecars are asked at the same time, often for the same.
    async fn rush(&mut self) {
        let k = self.dice.below(self.nodes[0].keys.len());
        let status = self.nodes[0].status(k);
        let same = self.any_ask();
        let asks: Vec<_> = (0..SIDECARS)
            .map(|_| if self.dice.percent(60) { same.clone() } else { self.any_ask() })
            .collect();
        self.note(0, &format!("all k{k} {asks:?}"));
        let Some(status) = status else { return };
        let node = &self.nodes[0];
        for (process, ask) in node.processes.iter().zip(&asks) {
            if let Some((id, object)) =
                ask.object.as_ref().and_then(|id| self.stripe.objects.get_key_value(id))
            {
                process.world.tells(id, object.record());
            }
        }
        let (key, must) = (node.keys[k], must_be(status, node.is_stopped));
        let [one, two, three] = node.processes.as_slice() else { panic!("{SIDECARS}") };
        let (one, two, three) = tokio::join!(
            one.world.admit(key, &asks[0]),
            two.world.admit(key, &asks[1]),
            three.world.admit(key, &asks[2])
        );
        let mut names = Vec::new();
        for (at, admitted) in [one, two, three].into_iter().enumerate() {
            self.nodes[0].acts = at;
            match admitted {
                Ok(admitted) => {
                    if matches!(admitted, Admitted::Held(_)) {
                        let what = (k == BY_CONTENT).then(|| (asks[at].deed, asks[at].object.clone()));
                        names.push((asks[at].name.clone(), what));
                    }
                    self.take(0, k, &asks[at], must, admitted);
                }
                Err(error) => self.could_not(0, &error),
            }
        }
        for (at, name) in names.iter().enumerate() {
            assert!(!names[..at].contains(name), "{name:?} is sent by two\n{}", self.told());
        }
    }

    /// Everybody dies, one for ever: nothing is being sent any more that nobody ends.
    async fn end(&mut self) {
        let last = SIDECARS - 1;
        for at in 0..SIDECARS {
            self.nodes[0].acts = at;
            self.nodes[0].process().mend().await;
            self.die(0);
            if at < last {
                self.nodes[0].processes[at].restart();
            }
        }
        self.nodes[0].is_silent().await;
        self.nodes[0].acts = 0;
        let left = self.nodes[0].world().reads().unsettled_holds(1_000).unwrap();
        let sent = left.iter().find(|hold| matches!(hold.state, HoldState::Sending { .. }));
        assert!(sent.is_none(), "{sent:?}\n{}", self.told());
        self.nodes[0].learn();
        self.check(0);
        self.check_records();
    }
}
