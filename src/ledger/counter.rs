//! What is spent, held and in doubt: one counter for each subject, UTC day and lane, and one for all days together.
#![deny(clippy::arithmetic_side_effects, clippy::as_conversions)]

use std::collections::BTreeMap;

use minicbor::{Decode, Encode};

use crate::hold::{Hold, HoldState, Lane, Subject};
use crate::money::MicroUsd;
use crate::time::Day;

/// Money of one subject, day and lane.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub struct Counter {
    /// Executed.
    #[n(0)]
    pub spent: MicroUsd,
    /// Being sent, or open at Stripe.
    #[n(1)]
    pub held: MicroUsd,
    /// Outcome unknown.
    #[n(2)]
    pub doubt: MicroUsd,
    /// Holds that are spent, held or in doubt.
    #[n(3)]
    pub calls: u64,
}

/// Whose counter, of which day ([`Day::TOTAL`] for all), of which lane.
pub type CounterKey = (Subject, Day, Lane);

/// A set of counters; one that is not there is zero.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counters(pub BTreeMap<CounterKey, Counter>);

/// The arithmetic of a counter did not come out: what is stored contradicts itself, and nothing may be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the counters contradict the holds")]
pub struct Contradiction;

impl Counter {
    /// Held and in doubt.
    pub fn held_and_doubt(&self) -> MicroUsd {
        self.held.checked_add(self.doubt).unwrap_or(MicroUsd::from_micros(u64::MAX))
    }

    /// All that counts against a cap.
    pub fn counted(&self) -> MicroUsd {
        self.spent.checked_add(self.held_and_doubt()).unwrap_or(MicroUsd::from_micros(u64::MAX))
    }

    /// Two counters together.
    #[must_use]
    pub fn and(&self, other: &Self) -> Self {
        let most = MicroUsd::from_micros(u64::MAX);
        Self {
            spent: self.spent.checked_add(other.spent).unwrap_or(most),
            held: self.held.checked_add(other.held).unwrap_or(most),
            doubt: self.doubt.checked_add(other.doubt).unwrap_or(most),
            calls: self.calls.saturating_add(other.calls),
        }
    }

    fn add(&mut self, hold: &Hold) -> Result<(), Contradiction> {
        let bucket = match hold.state {
            HoldState::Sending { .. } | HoldState::Open => &mut self.held,
            HoldState::Doubt => &mut self.doubt,
            HoldState::Spent => &mut self.spent,
            HoldState::Void => return Ok(()),
        };
        *bucket = bucket.checked_add(hold.usd).ok_or(Contradiction)?;
        self.calls = self.calls.checked_add(1).ok_or(Contradiction)?;
        Ok(())
    }

    fn take(&mut self, hold: &Hold) -> Result<(), Contradiction> {
        let bucket = match hold.state {
            HoldState::Sending { .. } | HoldState::Open => &mut self.held,
            HoldState::Doubt => &mut self.doubt,
            HoldState::Spent => &mut self.spent,
            HoldState::Void => return Ok(()),
        };
        *bucket = bucket.checked_sub(hold.usd).ok_or(Contradiction)?;
        self.calls = self.calls.checked_sub(1).ok_or(Contradiction)?;
        Ok(())
    }
}

impl Counters {
    /// One counter.
    pub fn of(&self, subject: Subject, day: Day, lane: Lane) -> Counter {
        self.0.get(&(subject, day, lane)).copied().unwrap_or_default()
    }

    /// Moves a hold from what it was to what it is. The counters of its subjects must have been loaded.
    ///
    /// # Errors
    /// [`Contradiction`] when the hold was not counted as it was; nothing must be written then.
    pub fn shift(&mut self, was: Option<&Hold>, is: &Hold) -> Result<(), Contradiction> {
        if let Some(was) = was {
            self.each(was, Counter::take)?;
        }
        self.each(is, Counter::add)
    }

    fn each(
        &mut self,
        hold: &Hold,
        change: fn(&mut Counter, &Hold) -> Result<(), Contradiction>,
    ) -> Result<(), Contradiction> {
        for key in keys_of(hold) {
            change(self.0.entry(key).or_default(), hold)?;
        }
        Ok(())
    }
}

/// The counters that carry a hold.
pub fn keys_of(hold: &Hold) -> impl Iterator<Item = CounterKey> + '_ {
    hold.subjects
        .iter()
        .flat_map(move |subject| [(*subject, Day::TOTAL, hold.lane), (*subject, hold.day, hold.lane)])
}
