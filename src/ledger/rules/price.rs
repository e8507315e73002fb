//! What a call would hold: the amount that it names, what its object stands for, or what the key says for one call.
#![deny(clippy::arithmetic_side_effects, clippy::as_conversions)]

use crate::hold::{Hold, HoldState, Lane};
use crate::intent::{Claim, Intent, Verb};
use crate::key::Key;
use crate::ledger::rules::{Loaded, in_use, limits};
use crate::money::{Currency, MicroUsd, Money, Rate};
use crate::refusal::{Code, Refusal};

/// What a call would hold.
pub(super) struct Reserve<'a> {
    /// The hold to go on with; a new one when `None`.
    pub(super) on: Option<&'a Hold>,
    /// Who pays.
    pub(super) payer: &'a Key,
    pub(super) lane: Lane,
    pub(super) currency: Option<Currency>,
    pub(super) rate: Rate,
    /// What is held afterwards.
    pub(super) minor: u64,
    pub(super) usd: MicroUsd,
    /// What must still fit under the payer's caps.
    pub(super) more: MicroUsd,
    pub(super) decline_voids: bool,
    /// What had moved before, and is not this hold's.
    pub(super) moved_before: u64,
}

/// Whether the price of a call is known.
pub(super) enum Priced<'a> {
    Known(Reserve<'a>),
    /// The object's own record has to tell it.
    AfterALook,
}

pub(super) fn price<'a>(state: &Loaded<'a>, intent: &Intent) -> Result<Priced<'a>, Refusal> {
    match &intent.claim {
        Claim::Create { lane, money, rate } => price_new(state, intent, *lane, *money, *rate),
        Claim::Return { minor, .. } => price_return(state, intent, *minor),
        Claim::Ceiling { usd, on_its_hold, always_read, .. } => {
            let on = live_hold(state).filter(|_| *on_its_hold);
            if let Some(busy) = on.and_then(|(hold, _)| is_busy(hold)) {
                return Err(busy);
            }
            if *always_read && !is_fresh(state, intent) {
                return Ok(Priced::AfterALook);
            }
            price_ceiling(state, intent, on, *usd, *always_read)
        }
        Claim::Use { verb, minor, currency, no_more, always_read, .. } => {
            let named = Named { minor: *minor, currency: *currency, no_more: *no_more };
            let on = live_hold(state);
            if let Some(busy) = on.and_then(|(hold, _)| is_busy(hold)) {
                return Err(busy);
            }
            match on {
                Some((hold, currency)) if is_fresh(state, intent) || !*always_read => {
                    price_use(state, intent, hold, currency, *verb, named)
                }
                None if is_fresh(state, intent) => price_seen(state, intent, *verb, named),
                Some(_) | None => Ok(Priced::AfterALook),
            }
        }
        Claim::Unpriced { .. } if is_held_under_a_cap(state) => {
            Err(amount_unknown("This would change an object whose money is held under a cap"))
        }
        Claim::Unpriced { .. } if state.key.is_uncapped() => Ok(Priced::Known(Reserve {
            on: None,
            payer: state.key,
            lane: Lane::In,
            currency: None,
            rate: Rate::USD,
            minor: 0,
            usd: MicroUsd::ZERO,
            more: MicroUsd::ZERO,
            decline_voids: true,
            moved_before: 0,
        })),
        Claim::Unpriced { .. } => {
            Err(amount_unknown("What this operation costs cannot be known before it is sent"))
        }
    }
}

/// Prices a call that makes an object of its own: all of it is held anew.
fn price_new<'a>(
    state: &Loaded<'a>,
    intent: &Intent,
    lane: Lane,
    money: Money,
    rate: Rate,
) -> Result<Priced<'a>, Refusal> {
    let usd = rate.usd(money.minor).ok_or_else(no_figures)?;
    limits::one_call_fits(state.key, usd)?;
    Ok(Priced::Known(Reserve {
        on: None,
        payer: state.key,
        lane,
        currency: Some(money.currency),
        rate,
        minor: money.minor,
        usd,
        more: usd,
        decline_voids: !intent.payable_after_decline,
        moved_before: 0,
    }))
}

/// Whether what was read is still what the object's hold stands for: nothing was done to it here since.
fn is_fresh(state: &Loaded<'_>, intent: &Intent) -> bool {
    let mark = state.object_hold.map(|hold| (hold.id, hold.since));
    intent.seen.is_some() && intent.read_against == mark
}

/// Prices money that goes back: what is named, or all that is left. The currency is the object's.
fn price_return<'a>(state: &Loaded<'a>, intent: &Intent, named: Option<u64>) -> Result<Priced<'a>, Refusal> {
    let known = state.object_hold.and_then(|hold| hold.currency);
    let money = match (named, known, intent.seen.as_ref()) {
        (None, _, Some(seen)) => seen.ceiling.ok_or_else(no_figures)?,
        (Some(minor), _, Some(seen)) => Money { minor, currency: seen.currency.ok_or_else(no_figures)? },
        (Some(minor), Some(currency), None) => Money { minor, currency },
        (None, _, None) | (Some(_), None, None) => return Ok(Priced::AfterALook),
    };
    price_new(state, intent, Lane::Out, money, rate_of(intent, money.currency)?)
}

/// What a request says of the amount of its object.
#[derive(Clone, Copy)]
struct Named {
    minor: Option<u64>,
    currency: Option<Currency>,
    no_more: bool,
}

/// Prices a call on an object that is held: the hold is used or raised, and its key pays.
fn price_use<'a>(
    state: &Loaded<'a>,
    intent: &Intent,
    hold: &'a Hold,
    currency: Currency,
    verb: Verb,
    named: Named,
) -> Result<Priced<'a>, Refusal> {
    same_currency(named.currency, currency)?;
    let ceiling = intent.seen.as_ref().and_then(|seen| seen.ceiling);
    same_currency(ceiling.map(|money| money.currency), currency)?;
    // What moved since the hold was made is its money too.
    let since = intent.seen.as_ref().map_or(0, |seen| seen.moved.saturating_sub(hold.moved_before));
    let seen = ceiling.map_or(0, |money| money.minor).saturating_add(since);
    let minor = hold.minor.max(named.minor.unwrap_or(0)).max(seen);
    let usd = hold.to_usd(minor).ok_or_else(no_figures)?;
    let more = usd.saturating_sub(hold.usd);
    may_raise(state, more)?;
    // A new total costs what it adds; confirm and capture move all of it, which is what was read where that was asked.
    let moves = match verb {
        Verb::Increment | Verb::Reprice => more,
        Verb::Confirm | Verb::Capture => ceiling.and_then(|money| hold.to_usd(money.minor)).unwrap_or(usd),
    };
    limits::one_call_fits(state.key, moves)?;
    Ok(Priced::Known(Reserve {
        on: Some(hold),
        payer: state.owner.unwrap_or(state.key),
        lane: hold.lane,
        currency: Some(currency),
        rate: hold.rate.unwrap_or(Rate::USD),
        minor,
        usd,
        more,
        decline_voids: verb == Verb::Confirm && !intent.payable_after_decline,
        moved_before: hold.moved_before,
    }))
}

/// Prices a call on an object that is not held, by what its record says: whatever the call does is held anew, by the key
/// that makes it.
fn price_seen<'a>(
    state: &Loaded<'a>,
    intent: &Intent,
    verb: Verb,
    named: Named,
) -> Result<Priced<'a>, Refusal> {
    let seen = intent.seen.as_ref().ok_or_else(no_figures)?;
    let Money { minor: ceiling, currency } = seen.ceiling.ok_or_else(no_figures)?;
    same_currency(named.currency, currency)?;
    let rate = rate_of(intent, currency)?;
    let minor = match named.minor {
        Some(minor) if named.no_more => minor,
        Some(minor) => minor.max(ceiling),
        None => ceiling,
    };
    let usd = rate.usd(minor).ok_or_else(no_figures)?;
    limits::one_call_fits(state.key, usd)?;
    Ok(Priced::Known(Reserve {
        on: None,
        payer: state.key,
        lane: Lane::In,
        currency: Some(currency),
        rate,
        minor,
        usd,
        more: usd,
        decline_voids: verb != Verb::Reprice && !intent.payable_after_decline,
        moved_before: seen.moved,
    }))
}

/// A call of unknown cost: what the key says comes on top of what its object stands for already, where that is known.
fn price_ceiling<'a>(
    state: &Loaded<'a>,
    intent: &Intent,
    on: Option<(&'a Hold, Currency)>,
    ceiling: MicroUsd,
    is_read: bool,
) -> Result<Priced<'a>, Refusal> {
    let read = intent.seen.as_ref().filter(|_| is_read);
    let read =
        read.map(|seen| seen.ceiling.map(|money| (money, seen.moved)).ok_or_else(no_figures)).transpose()?;
    let moved = read.map_or(0, |(_, moved)| moved);
    let (currency, rate, stands_for, moved_before) = match (on, read) {
        (Some((hold, currency)), read) => {
            same_currency(read.map(|(money, _)| money.currency), currency)?;
            let since = moved.saturating_sub(hold.moved_before);
            let told = read.map_or(0, |(money, _)| money.minor).saturating_add(since);
            (currency, hold.rate.unwrap_or(Rate::USD), hold.minor.max(told), hold.moved_before)
        }
        (None, Some((money, _))) => (money.currency, rate_of(intent, money.currency)?, money.minor, moved),
        (None, None) => (Currency::USD, Rate::USD, 0, 0),
    };
    let minor = rate.minor(ceiling).and_then(|more| stands_for.checked_add(more)).ok_or_else(no_figures)?;
    let usd = rate.usd(minor).ok_or_else(no_figures)?;
    let more = usd.saturating_sub(on.map_or(MicroUsd::ZERO, |(hold, _)| hold.usd));
    if on.is_some() {
        may_raise(state, more)?;
    }
    Ok(Priced::Known(Reserve {
        on: on.map(|(hold, _)| hold),
        payer: on.map_or(state.key, |_| state.owner.unwrap_or(state.key)),
        lane: on.map_or(Lane::In, |(hold, _)| hold.lane),
        currency: Some(currency),
        rate,
        minor,
        usd,
        more,
        decline_voids: on.is_none() && !intent.payable_after_decline,
        moved_before,
    }))
}

/// The hold of the object, while it counts and has a price.
fn live_hold<'a>(state: &Loaded<'a>) -> Option<(&'a Hold, Currency)> {
    state.object_hold.filter(|hold| hold.state.is_live()).and_then(|hold| Some((hold, hold.currency?)))
}

/// Why a hold cannot be used right now.
fn is_busy(hold: &Hold) -> Option<Refusal> {
    match hold.state {
        HoldState::Sending { .. } => Some(in_use("Another call on this object is being made right now.")),
        HoldState::Doubt => Some(in_use(
            "The outcome of another call on this object is not known yet. Make that call again, or cancel the object.",
        )),
        HoldState::Open | HoldState::Void | HoldState::Spent => None,
    }
}

/// Refuses to let another issuer's key, or a dead one, pay more.
fn may_raise(state: &Loaded<'_>, more: MicroUsd) -> Result<(), Refusal> {
    let payer = state.owner.unwrap_or(state.key);
    let gone = payer.revoked_at.is_some()
        || payer.closed_at.is_some()
        || state.owner_issuer.is_some_and(|issuer| issuer.revoked_at.is_some());
    if more > MicroUsd::ZERO && (payer.issuer != state.key.issuer || gone) {
        return Err(Refusal::new(
            Code::ParameterNotAllowed,
            "This call would raise a hold that another issuer's key, or a dead one, pays for.",
        ));
    }
    Ok(())
}

fn rate_of(intent: &Intent, currency: Currency) -> Result<Rate, Refusal> {
    intent.rates.of(currency).ok_or_else(|| {
        Refusal::of_param(
            Code::CurrencyNotAllowed,
            "currency",
            "The object is in a currency that has no rate here, so it cannot be counted against a cap.",
        )
    })
}

fn same_currency(named: Option<Currency>, own: Currency) -> Result<(), Refusal> {
    match named {
        Some(named) if named != own => Err(Refusal::of_param(
            Code::CurrencyNotAllowed,
            "currency",
            "This call names another currency than its object's.",
        )),
        Some(_) | None => Ok(()),
    }
}

fn no_figures() -> Refusal {
    amount_unknown("What the object's record says of its amount cannot be counted")
}

/// Whether the object is held for a key with a cap, which a call without a price could raise unseen.
fn is_held_under_a_cap(state: &Loaded<'_>) -> bool {
    let held = state.object_hold.is_some_and(|hold| hold.state.is_live() && hold.currency.is_some());
    held && !state.owner.is_some_and(Key::is_uncapped)
}

fn amount_unknown(why: &str) -> Refusal {
    Refusal::new(Code::AmountUnknown, format!("{why}. Nothing was sent."))
}
