//! What two ledgers owe each other: a call that both make under the same upstream keys is executed once within the day for
//! which Stripe remembers them.

use std::collections::{BTreeMap, HashMap, HashSet};

use keybrake::id::LedgerId;
use keybrake::time::DAY_MS;

use super::node::is_by_content;
use super::stripe::Executed;

/// What was executed under an upstream key, and by whom.
#[derive(Clone, Debug)]
pub(super) struct Ran {
    pub(super) executed: Executed,
    pub(super) ledger: LedgerId,
}

/// The attempts at one call that Stripe stored.
#[derive(Debug, Default)]
struct Ladder {
    keys: BTreeMap<String, (u64, Option<Ran>)>,
    /// Whether an attempt was left for a reason that another ledger cannot know.
    diverged: bool,
}

/// The calls of a history, by name.
#[derive(Debug, Default)]
pub(super) struct Ladders {
    of: HashMap<String, Ladder>,
    forgotten: HashSet<String>,
}

impl Ladders {
    /// A request is about to reach Stripe: once all keys of its call are forgotten there, it is a new one. Where each
    /// attempt has a key, ledgers may be at different attempts from then on.
    pub(super) fn begin(&mut self, name: &str, now: u64) {
        let ladder = self.of.entry(name.to_owned()).or_default();
        if !ladder.keys.is_empty() && ladder.keys.values().all(|(at, _)| now >= at + DAY_MS) {
            ladder.keys.clear();
            self.diverge(name);
        }
    }

    /// Stripe stored an answer under a key.
    pub(super) fn stored(&mut self, name: &str, key: &str, at: u64, ran: Option<Ran>) {
        let ladder = self.of.entry(name.to_owned()).or_default();
        ladder.keys.insert(key.to_owned(), (at, ran));
    }

    /// What was executed under a key, as Stripe remembers it.
    pub(super) fn ran(&self, name: &str, key: &str) -> Option<&Executed> {
        let (_, ran) = self.of.get(name)?.keys.get(key)?;
        ran.as_ref().map(|ran| &ran.executed)
    }

    /// An attempt is left for a reason that another ledger cannot know. A caller's key is that of all attempts.
    pub(super) fn diverge(&mut self, name: &str) {
        self.of.entry(name.to_owned()).or_default().diverged |= is_by_content(name);
    }

    /// An operator takes a call back.
    pub(super) fn forget(&mut self, name: &str) {
        self.diverge(name);
        self.forgotten.insert(name.to_owned());
    }

    /// Whether an operator ever took it back.
    pub(super) fn was_forgotten(&self, name: &str) -> bool {
        self.forgotten.contains(name)
    }

    /// What another ledger executed of the same call, where both should have met at Stripe.
    pub(super) fn twice(
        &self,
        name: &str,
        ledger: LedgerId,
        now: u64,
        canceled: impl Fn(&str) -> bool,
    ) -> Option<&str> {
        let ladder = self.of.get(name)?;
        if ladder.diverged || ladder.keys.values().any(|(at, _)| now >= at + DAY_MS) {
            return None;
        }
        let ran = ladder.keys.values().filter_map(|(_, ran)| ran.as_ref());
        let mut others = ran.filter(|ran| ran.ledger != ledger).map(|ran| ran.executed.object.as_str());
        others.find(|object| !canceled(object))
    }
}
