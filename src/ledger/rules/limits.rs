//! The limits of a key, its budget and its issuer: whose counters are asked, of which days, and which one is tightest.
#![deny(clippy::arithmetic_side_effects, clippy::as_conversions)]

use crate::hold::{Hold, Lane, Subject};
use crate::key::Key;
use crate::ledger::counter::{Counter, Counters};
use crate::ledger::rules::Loaded;
use crate::ledger::rules::price::Reserve;
use crate::money::MicroUsd;
use crate::refusal::{CapFigures, CapKind, Code, Refusal};
use crate::time::{Day, UnixMs};

/// Whose counters carry what a key spends.
pub fn subjects_of(key: &Key) -> Vec<Subject> {
    let issuer = key.issuer.map(Subject::Issuer);
    let budget = key.budget_id().map(Subject::Budget);
    [Some(Subject::Key(key.id)), issuer, budget].into_iter().flatten().collect()
}

/// The days whose counters decide whether a key may spend more: all together, today, the days of its life when it
/// lives a day or less, and the day of the hold that would be raised.
pub fn days_of(key: &Key, object_hold: Option<&Hold>, now: UnixMs) -> Vec<Day> {
    let mut days = vec![Day::TOTAL, now.day(), key.created_at.day(), last_day(key, now)];
    days.extend(object_hold.map(|hold| hold.day));
    days.sort_unstable();
    days.dedup();
    days
}

/// Today, or the last day of a key that is over: what it holds can still be raised.
fn last_day(key: &Key, now: UnixMs) -> Day {
    now.day().min(key.expires_at.day())
}

/// The limit of one call, which needs no running totals.
///
/// # Errors
/// `spend_cap_exceeded` with cap `per_request`.
pub fn one_call_fits(key: &Key, usd: MicroUsd) -> Result<(), Refusal> {
    match key.caps.per_request {
        Some(limit) if usd > limit => Err(Refusal::over_cap(CapFigures {
            cap: CapKind::PerRequest,
            limit,
            spent: MicroUsd::ZERO,
            held: MicroUsd::ZERO,
            requested: usd,
            resets_at: None,
        })),
        Some(_) | None => Ok(()),
    }
}

/// One limit, and the counter that it is checked against.
struct Limit {
    cap: CapKind,
    usd: MicroUsd,
    counter: Counter,
    resets_at: Option<UnixMs>,
}

pub(super) fn fits(state: &Loaded<'_>, reserve: &Reserve<'_>, now: UnixMs) -> Result<(), Refusal> {
    let tightest = limits(state, reserve, now)
        .into_iter()
        .filter(|limit| {
            let room = limit.usd.saturating_sub(limit.counter.counted());
            reserve.more > MicroUsd::ZERO && (reserve.more > room || limit.counter.counted() > limit.usd)
        })
        .min_by_key(|limit| limit.usd.saturating_sub(limit.counter.counted()));
    if let Some(Limit { cap, usd, counter, resets_at }) = tightest {
        return Err(Refusal::over_cap(CapFigures {
            cap,
            limit: usd,
            spent: counter.spent,
            held: counter.held_and_doubt(),
            requested: reserve.more,
            resets_at,
        }));
    }
    calls_fit(state, reserve)
}

/// Every limit that binds the payer in the lane of the call: its own, checked against its budget's counters where it
/// has one, and its issuer's over all keys.
fn limits(state: &Loaded<'_>, reserve: &Reserve<'_>, now: UnixMs) -> Vec<Limit> {
    let key = reserve.payer;
    let own = spender(key);
    let lane = reserve.lane;
    let day = reserve.on.map_or(now.day(), |hold| hold.day);
    let whole_life = key.lives_a_day_or_less();
    // A hold of an earlier day stays counted on that day, which does not come again.
    let day_ends = (day == now.day()).then(|| day.end());
    let total = |subject| state.counters.of(subject, Day::TOTAL, lane);
    let of_day = |subject| state.counters.of(subject, day, lane);
    let window = match (whole_life, own) {
        (false, _) => of_day(own),
        (true, Subject::Budget(_)) => {
            since(state.counters, own, key.created_at.day(), last_day(key, now), lane)
        }
        (true, Subject::Key(_) | Subject::Issuer(_)) => total(own),
    };
    let resets_at = if whole_life { None } else { day_ends };
    let name = |kind| if key.budget.is_some() { CapKind::Budget } else { kind };
    // A key that may spend and has no figure was not meant to: only `uncapped` lifts a cap.
    let limit_of = |cap: Option<MicroUsd>| if key.caps.uncapped { cap } else { cap.or(Some(MicroUsd::ZERO)) };
    let issuer = if reserve.payer.id == state.key.id { state.issuer } else { state.owner_issuer };
    let of_issuer = issuer.map(|issuer| Subject::Issuer(issuer.id));
    let mut limits = Vec::new();
    let mut bind = |cap, limit: Option<MicroUsd>, counter, resets_at| {
        limits.extend(limit.map(|usd| Limit { cap, usd, counter, resets_at }));
    };
    match lane {
        Lane::In => {
            bind(name(CapKind::Daily), limit_of(key.caps.daily), window, resets_at);
            bind(name(CapKind::Total), key.caps.total, total(own), None);
        }
        Lane::Out => bind(name(CapKind::DailyOut), limit_of(key.caps.daily_out), window, resets_at),
    }
    if let (Some(issuer), Some(subject)) = (issuer, of_issuer) {
        let daily = match lane {
            Lane::In => issuer.daily,
            // An issuer that says nothing of money out mints nothing that spends any.
            Lane::Out => issuer.daily_out.or(Some(MicroUsd::ZERO)),
        };
        bind(CapKind::Issuer, daily, of_day(subject), day_ends);
        if lane == Lane::In {
            bind(CapKind::Issuer, issuer.total, total(subject), None);
        }
    }
    limits
}

/// Whose counters a key's own caps are checked against.
pub fn spender(key: &Key) -> Subject {
    key.budget_id().map_or(Subject::Key(key.id), Subject::Budget)
}

/// What was counted from one day to another, both included and not far apart.
fn since(counters: &Counters, subject: Subject, from: Day, to: Day, lane: Lane) -> Counter {
    let first = counters.of(subject, from, lane);
    if from >= to {
        return first;
    }
    first.and(&counters.of(subject, to, lane))
}

fn calls_fit(state: &Loaded<'_>, reserve: &Reserve<'_>) -> Result<(), Refusal> {
    let (Some(max), None) = (reserve.payer.caps.max_calls, reserve.on) else { return Ok(()) };
    let made: u64 = [Lane::In, Lane::Out]
        .map(|lane| state.counters.of(spender(reserve.payer), Day::TOTAL, lane).calls)
        .iter()
        .fold(0, |sum, calls| sum.saturating_add(*calls));
    if made >= max {
        let message = format!("This key may make {max} money calls, and {made} have been made.");
        return Err(Refusal::new(Code::CallLimitExceeded, message));
    }
    Ok(())
}
