//! How a hold leaves "being sent": by an answer, by the vendor's own record of the object, or by a restart.
//!
//! | outcome of the answer | a hold made by this call | a hold that was open before |
//! |---|---|---|
//! | spent | spent | spent |
//! | pending | open | open |
//! | declined | void; open where the object can still be paid | void after a confirm, else open as it was |
//! | refused, turned away, not sent | void | open as it was |
//! | unknown | doubt | doubt |
//!
//! Nothing here releases money without a definite answer.
//!
//! # Every state and every event
//!
//! Hold and call as they become; `·`: cannot happen. Made by `tests/it/ledger/states.rs` from what happens.
#![doc = include_str!("states.md")]

use serde_json::{Map, Value};

use crate::audit::{Decision, Entry, Event, RecordedOutcome};
use crate::call::{Attempt, Call, CallState, EXECUTED_KNOWN_MS, Outcome, Record, StoredAnswer};
use crate::hold::{Facts, Hold, HoldState};
use crate::id::{BootId, CallId};
use crate::key::Key;
use crate::ledger::entry;
use crate::ledger::rules::Effects;
use crate::time::{DAY_MS, UnixMs};

/// Other objects that one hold is known by.
const ALIASES_MAX: usize = 16;

/// What is known after an answer, and what to keep of it.
#[derive(Clone, Debug)]
pub struct Resolve {
    /// What the answer proves.
    pub outcome: Outcome,
    /// The objects at Stripe that the answer names as this hold's, the main one first.
    pub objects: Vec<String>,
    /// The answer, where one came.
    pub answer: Option<StoredAnswer>,
    /// The `Request-Id` that the caller gets to see.
    pub seen_request_id: String,
    /// Stripe's `Request-Id`.
    pub stripe_request_id: Option<String>,
    /// Stripe's status.
    pub upstream_status: Option<u16>,
    /// From acceptance to here, milliseconds.
    pub duration_ms: u64,
}

/// What a store loads before it asks.
#[derive(Clone, Copy, Debug)]
pub struct InFlight<'a> {
    /// The hold, as it is stored.
    pub hold: &'a Hold,
    /// The call that was sent.
    pub call: &'a Call,
    /// All other calls that used the hold.
    pub others: &'a [Call],
    /// The key under which the call was made.
    pub key: &'a Key,
    /// The key that pays.
    pub owner: &'a Key,
    /// Whether the object that the answer names is known to be over.
    pub object_over: bool,
}

/// Settles, voids or doubts a hold by what its answer proves.
pub fn resolve(state: &InFlight<'_>, command: &Resolve, now: UnixMs) -> Effects {
    // An answer from before the object ended, given again under the same key: nothing of it can move any more.
    let outdated = state.object_over && matches!(command.outcome, Outcome::Pending { .. });
    if outdated {
        let refused = Resolve { outcome: Outcome::Refused, objects: Vec::new(), ..command.clone() };
        return resolve(&InFlight { object_over: false, ..*state }, &refused, now);
    }
    let was = state.hold;
    let resent = state.call.last_attempt().is_some_and(|attempt| attempt.sends > 1);
    let mut change = Change::of(was, command.outcome);
    // What the call was about stays the hold's object, whatever else its answer names.
    if change.hold.object_id.is_none() {
        change.hold.object_id = command.objects.first().cloned();
    }
    let own = change.hold.object_id.clone();
    for alias in command.objects.iter().filter(|object| own.as_ref() != Some(object)) {
        if !change.hold.aliases.contains(alias) && change.hold.aliases.len() < ALIASES_MAX {
            change.hold.aliases.push(alias.clone());
        }
    }
    change.hold.since = now;
    let over_hold = change.over_hold;
    let ended = end_of(command.outcome);
    let mut call = with_end(state.call, ended, command, now);
    let facts = was.live.as_ref().map(|live| live.facts.clone()).unwrap_or_default();
    let flags = [(resent, "resend"), (over_hold, "over_hold")]
        .into_iter()
        .filter(|(set, _)| *set)
        .map(|(_, flag)| flag.to_owned())
        .collect::<Vec<_>>();
    let audit = Entry {
        request_id: Some(command.seen_request_id.clone()),
        stripe_request_id: command.stripe_request_id.clone(),
        upstream_status: command.upstream_status,
        duration_ms: Some(command.duration_ms),
        flags: (!flags.is_empty()).then_some(flags),
        ..entry::of_call(
            now,
            event_of(command.outcome, resent),
            recorded(command.outcome),
            state.key,
            &change.told(was),
            &facts,
        )
    };
    let keep = command.answer.as_ref().filter(|_| ended.is_some_and(is_remembered));
    let look_at = remember_until(state.key, now).max(remember_until(state.owner, now));
    if keep.is_some() {
        call.answered_at = Some(now);
    }
    if ended.is_some_and(is_remembered) {
        call.remember_until = Some(look_at);
    }
    let mut calls = vec![call];
    calls.extend(carried_along(state.others, &change.hold));
    Effects {
        calls,
        // What has no price takes no object from the hold that has one.
        objects: if was.currency.is_some() { command.objects.clone() } else { Vec::new() },
        answer: keep.map(|answer| (state.call.id, answer.clone())),
        key: over_hold.then(|| Key { closed_at: state.owner.closed_at.or(Some(now)), ..state.owner.clone() }),
        look_at_call: Some((look_at, state.call.id)),
        hold: Some((Some(was.clone()), change.hold)),
        audit: vec![audit],
        ..Effects::default()
    }
}

/// Until when a call that is executed or open now is the same call.
fn remember_until(key: &Key, now: UnixMs) -> UnixMs {
    now.plus_millis(u64::from(key.remember_days).saturating_mul(DAY_MS))
}

/// How the row of a call ends, or `None` while its outcome is unknown.
fn end_of(outcome: Outcome) -> Option<CallState> {
    match outcome {
        Outcome::Spent { .. } => Some(CallState::Spent),
        Outcome::Pending { .. } => Some(CallState::Open),
        Outcome::Declined => Some(CallState::Declined),
        Outcome::Refused => Some(CallState::Refused),
        Outcome::TurnedAway | Outcome::NotSent => Some(CallState::NotExecuted),
        Outcome::Unknown => None,
    }
}

fn event_of(outcome: Outcome, was_doubt: bool) -> Event {
    match outcome {
        Outcome::Unknown => Event::Doubt,
        Outcome::Spent { .. }
        | Outcome::Pending { .. }
        | Outcome::Declined
        | Outcome::Refused
        | Outcome::TurnedAway
        | Outcome::NotSent
            if was_doubt =>
        {
            Event::Resolved
        }
        Outcome::Spent { .. } | Outcome::Pending { .. } => Event::Settled,
        Outcome::Declined | Outcome::Refused | Outcome::TurnedAway | Outcome::NotSent => Event::Voided,
    }
}

fn recorded(outcome: Outcome) -> RecordedOutcome {
    match outcome {
        Outcome::Spent { .. } => RecordedOutcome::Spent,
        Outcome::Pending { .. } => RecordedOutcome::Pending,
        Outcome::Declined => RecordedOutcome::Declined,
        Outcome::Refused | Outcome::TurnedAway => RecordedOutcome::None,
        Outcome::NotSent => RecordedOutcome::NotSent,
        Outcome::Unknown => RecordedOutcome::Doubt,
    }
}

fn is_remembered(state: CallState) -> bool {
    match state {
        CallState::Spent | CallState::Open => true,
        CallState::InFlight
        | CallState::Declined
        | CallState::Refused
        | CallState::Doubt
        | CallState::NotExecuted
        | CallState::Forgotten => false,
    }
}

fn with_end(call: &Call, ended: Option<CallState>, command: &Resolve, now: UnixMs) -> Call {
    let mut call = call.clone();
    call.state = ended.unwrap_or(CallState::Doubt);
    if let Some(object) = command.objects.first() {
        call.object_id = Some(object.clone());
    }
    if let Some(attempt) = call.attempts.last_mut() {
        attempt.end = ended;
        attempt.ended_at = ended.map(|_| now);
        attempt.saw_5xx |= command.upstream_status.is_some_and(|status| status >= 500);
        match ended {
            Some(CallState::Declined) => attempt.declined_at = attempt.declined_at.or(Some(now)),
            Some(CallState::NotExecuted) => attempt.sends = 0,
            Some(
                CallState::InFlight
                | CallState::Open
                | CallState::Spent
                | CallState::Refused
                | CallState::Doubt
                | CallState::Forgotten,
            )
            | None => {}
        }
    }
    call
}

/// Earlier calls on a hold that is now spent are spent with it.
fn carried_along<'a>(others: &'a [Call], hold: &Hold) -> impl Iterator<Item = Call> + use<'a> {
    let hold = (hold.state == HoldState::Spent).then(|| hold.clone());
    others
        .iter()
        .filter(move |other| {
            other.state == CallState::Open && hold.as_ref().is_some_and(|hold| is_ended_by(other, hold))
        })
        .map(|other| Call { state: CallState::Spent, ..other.clone() })
}

/// Whether the end of a hold is the end of a call that once used it. A caller's key that was refused there may have
/// been used for something else since, which has a hold of its own.
fn is_ended_by(call: &Call, hold: &Hold) -> bool {
    let on_hold = call.hold_id == hold.id;
    match call.state {
        CallState::Doubt => on_hold,
        // It made or used the object under a hold that ended before this one.
        CallState::Open => {
            on_hold
                || call
                    .object_id
                    .as_ref()
                    .is_some_and(|id| hold.object_id.as_ref() == Some(id) || hold.aliases.contains(id))
        }
        CallState::InFlight
        | CallState::Spent
        | CallState::Declined
        | CallState::Refused
        | CallState::NotExecuted
        | CallState::Forgotten => false,
    }
}

/// A hold as an outcome leaves it.
struct Change {
    hold: Hold,
    over_hold: bool,
}

impl Change {
    fn of(was: &Hold, outcome: Outcome) -> Self {
        let mut hold = was.clone();
        let mut over_hold = false;
        // An object tells of all that ever moved for it.
        let own = |minor: u64| minor.saturating_sub(was.moved_before);
        match outcome {
            Outcome::Spent { minor } => {
                over_hold = book(&mut hold, own(minor));
                hold.state = HoldState::Spent;
                (hold.live, hold.base) = (None, None);
            }
            Outcome::Pending { minor } => {
                // Held in full: what Stripe now calls less may still become more.
                let higher = own(minor).max(hold.minor);
                over_hold = book(&mut hold, higher);
                hold.state = HoldState::Open;
                (hold.live, hold.base) = (None, None);
            }
            Outcome::Declined if was.live.as_ref().is_none_or(|live| live.decline_voids) => void(&mut hold),
            // Declined now, and the vendor tries again by itself.
            Outcome::Declined if hold.base.is_none() => {
                hold.state = HoldState::Open;
                hold.live = None;
            }
            Outcome::Declined | Outcome::Refused | Outcome::TurnedAway | Outcome::NotSent => {
                match hold.base.take() {
                    Some(base) => {
                        (hold.minor, hold.usd) = (base.minor, base.usd);
                        hold.state = HoldState::Open;
                        hold.live = None;
                    }
                    None => void(&mut hold),
                }
            }
            Outcome::Unknown => hold.state = HoldState::Doubt,
        }
        Self { hold, over_hold }
    }

    /// A void tells what was held, not what is left of it.
    fn told(&self, was: &Hold) -> Hold {
        match self.hold.state {
            HoldState::Void => Hold { minor: was.minor, usd: was.usd, ..self.hold.clone() },
            HoldState::Sending { .. } | HoldState::Open | HoldState::Doubt | HoldState::Spent => {
                self.hold.clone()
            }
        }
    }
}

fn void(hold: &mut Hold) {
    hold.state = HoldState::Void;
    (hold.live, hold.base) = (None, None);
}

/// Books what Stripe says; true when that is more than was held.
fn book(hold: &mut Hold, minor: u64) -> bool {
    if hold.currency.is_none() {
        return false;
    }
    let over = minor > hold.minor;
    // Vendors read amounts of at most twelve digits, which always have a price.
    hold.usd = hold.to_usd(minor).unwrap_or(hold.usd);
    hold.minor = minor;
    over
}

/// How a doubt ends otherwise than by an answer to its own call.
#[derive(Clone, Debug)]
pub struct EndDoubt {
    /// What is known now.
    pub outcome: Known,
    /// The objects at Stripe that the call made or used, the main one first.
    pub objects: Vec<String>,
    /// The object as Stripe tells it, to be given to whoever makes the same call again.
    pub answer: Option<StoredAnswer>,
    /// Who says so; nobody when it was found.
    pub actor: Option<String>,
    /// What it rests on.
    pub evidence: Map<String, Value>,
}

/// What is known of a call in doubt, in the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Known {
    /// The object's own record tells.
    Record(Outcome),
    /// An operator says: executed, and this much of it is this hold's.
    Executed {
        /// Minor units.
        minor: u64,
    },
    /// An operator says: not executed.
    NotExecuted,
}

/// Ends a doubt. `None` when it is none any more.
pub fn end_doubt(state: &InFlight<'_>, end: &EndDoubt, now: UnixMs) -> Option<Effects> {
    if state.hold.state != HoldState::Doubt {
        return None;
    }
    let outcome = match end.outcome {
        Known::Record(outcome) => outcome,
        Known::Executed { minor } => Outcome::Spent { minor: minor.saturating_add(state.hold.moved_before) },
        // Its bytes were out: under content the next attempt is another one.
        Known::NotExecuted => Outcome::Refused,
    };
    let facts = state.hold.live.as_ref().map(|live| live.facts.clone()).unwrap_or_default();
    let command = Resolve {
        outcome,
        objects: end.objects.clone(),
        answer: end.answer.clone(),
        seen_request_id: facts.request_id,
        stripe_request_id: end.answer.as_ref().map(|answer| answer.request_id.clone()),
        upstream_status: None,
        duration_ms: 0,
    };
    let mut effects = resolve(state, &command, now);
    if let (Known::NotExecuted, Some(call)) = (end.outcome, effects.calls.first_mut()) {
        call.state = CallState::NotExecuted;
        if let Some(attempt) = call.attempts.last_mut() {
            attempt.end = Some(CallState::NotExecuted);
        }
    }
    for entry in &mut effects.audit {
        entry.event = Event::Resolved;
        entry.duration_ms = None;
        entry.actor.clone_from(&end.actor);
        entry.detail = (!end.evidence.is_empty()).then(|| end.evidence.clone());
    }
    Some(effects)
}

/// Takes back a call that is over, so that the same call can be made again. `None` while it is held or in doubt, and when
/// it was taken back before.
pub fn forget(call: &Call, hold_is_live: bool) -> Option<Call> {
    let is_over = match call.state {
        CallState::Spent | CallState::Declined | CallState::Refused | CallState::NotExecuted => true,
        CallState::InFlight | CallState::Open | CallState::Doubt | CallState::Forgotten => false,
    };
    (is_over && !hold_is_live).then(|| Call {
        state: CallState::Forgotten,
        generation: call.generation.saturating_add(1),
        remember_until: None,
        ..call.clone()
    })
}

/// Ends an open or doubtful hold by the vendor's own record of its object. `None` when there is nothing to end.
pub fn observe(
    hold: &Hold,
    calls: &[Call],
    owner: &Key,
    facts: &Facts,
    record: Record,
    now: UnixMs,
) -> Option<Effects> {
    let was_doubt = match hold.state {
        HoldState::Open => false,
        HoldState::Doubt => true,
        HoldState::Sending { .. } | HoldState::Spent | HoldState::Void => return None,
    };
    let (outcome, end) = match record {
        Record::Ended => (Outcome::NotSent, CallState::NotExecuted),
        Record::Moved { minor } => (Outcome::Spent { minor }, CallState::Spent),
    };
    let mut bare = hold.clone();
    (bare.base, bare.live) = (None, None);
    let mut change = Change::of(&bare, outcome);
    change.hold.since = now;
    change.hold.object_over = true;
    let touched = |call: &&Call| is_ended_by(call, hold);
    let drop_answers = match record {
        Record::Ended => calls.iter().filter(touched).map(|call| call.id).collect(),
        Record::Moved { .. } => Vec::new(),
    };
    let until = remember_until(owner, now);
    let calls = calls.iter().filter(touched).map(|call| ended_call(call, end, now, until)).collect();
    let told = match record {
        Record::Ended => RecordedOutcome::None,
        Record::Moved { .. } => RecordedOutcome::Spent,
    };
    let audit = Entry {
        decision: Some(Decision::Forwarded),
        flags: change.over_hold.then(|| vec!["over_hold".to_owned()]),
        ..entry::of_call(now, event_of(outcome, was_doubt), told, owner, &change.told(hold), facts)
    };
    Some(Effects {
        calls,
        drop_answers,
        key: change.over_hold.then(|| Key { closed_at: owner.closed_at.or(Some(now)), ..owner.clone() }),
        hold: Some((Some(hold.clone()), change.hold)),
        audit: vec![audit],
        ..Effects::default()
    })
}

/// The end of an object whose hold was voided before, by a decline: there is no money to release, but what is remembered
/// of the object is over. `None` when nothing is.
pub fn forget_open(hold: &Hold, calls: &[Call], record: Record, now: UnixMs) -> Option<Effects> {
    let open: Vec<&Call> =
        calls.iter().filter(|call| call.state == CallState::Open && is_ended_by(call, hold)).collect();
    let over = hold.state == HoldState::Void && record == Record::Ended && !open.is_empty();
    over.then(|| Effects {
        hold: Some((Some(hold.clone()), Hold { object_over: true, ..hold.clone() })),
        drop_answers: open.iter().map(|call| call.id).collect(),
        calls: open.into_iter().map(|call| ended_call(call, CallState::NotExecuted, now, now)).collect(),
        ..Effects::default()
    })
}

fn ended_call(call: &Call, end: CallState, now: UnixMs, until: UnixMs) -> Call {
    let mut call = call.clone();
    call.state = end;
    if let Some(attempt) = call.attempts.last_mut() {
        attempt.end = Some(end);
        attempt.ended_at = Some(now);
    }
    call.remember_until = match end {
        CallState::Spent => call.remember_until.or(Some(until)),
        CallState::InFlight
        | CallState::Open
        | CallState::Declined
        | CallState::Refused
        | CallState::Doubt
        | CallState::NotExecuted
        | CallState::Forgotten => None,
    };
    call
}

/// At start: a hold that another run of the process was sending is a doubt. `None` when it is not one.
pub fn orphan(hold: &Hold, call: Option<&Call>, key: &Key, boot: BootId, now: UnixMs) -> Option<Effects> {
    match hold.state {
        HoldState::Sending { boot: sender } if sender != boot => {}
        HoldState::Sending { .. }
        | HoldState::Open
        | HoldState::Doubt
        | HoldState::Spent
        | HoldState::Void => return None,
    }
    let mut is = hold.clone();
    is.state = HoldState::Doubt;
    is.since = now;
    let facts = hold.live.as_ref().map(|live| live.facts.clone()).unwrap_or_default();
    let audit = Entry {
        flags: Some(vec!["restart".to_owned()]),
        ..entry::of_call(now, Event::Doubt, RecordedOutcome::Doubt, key, &is, &facts)
    };
    Some(Effects {
        calls: call.map(|call| Call { state: CallState::Doubt, ..call.clone() }).into_iter().collect(),
        look_at_call: call.map(|call| (remember_until(key, now), call.id)),
        hold: Some((Some(hold.clone()), is)),
        audit: vec![audit],
        ..Effects::default()
    })
}

/// What may go of a call whose time has come to be looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Prune {
    /// Everything.
    All,
    /// The answer and all that is personal; that it was executed stays known.
    Answer(UnixMs),
    /// Nothing yet: look again then.
    Later(UnixMs),
}

/// Decides what may go of a call.
pub fn prune(call: &Call, has_answer: bool, hold_is_live: bool, now: UnixMs) -> Prune {
    let tomorrow = now.plus_millis(DAY_MS);
    if hold_is_live {
        return Prune::Later(tomorrow);
    }
    match call.state {
        CallState::InFlight | CallState::Doubt | CallState::Open => Prune::Later(tomorrow),
        CallState::Spent => {
            let until = call.remember_until.unwrap_or(call.created_at);
            let known_until = until.plus_millis(EXECUTED_KNOWN_MS);
            if now < until {
                Prune::Later(until)
            } else if !call.by_content || now >= known_until {
                Prune::All
            } else if has_answer {
                Prune::Answer(known_until)
            } else {
                Prune::Later(known_until)
            }
        }
        CallState::Declined | CallState::Refused | CallState::NotExecuted => {
            let last = call.last_attempt().map_or(call.created_at, Attempt::settled_at);
            let until = last.plus_millis(DAY_MS.saturating_mul(2));
            if now < until { Prune::Later(until) } else { Prune::All }
        }
        // Its generation is what makes the next key another one, so it stays as long as an execution would.
        CallState::Forgotten => {
            let until = call.created_at.plus_millis(EXECUTED_KNOWN_MS);
            if now < until { Prune::Later(until) } else { Prune::All }
        }
    }
}

impl Attempt {
    fn settled_at(&self) -> UnixMs {
        self.ended_at.unwrap_or(self.last_send)
    }
}

/// A call without what is personal in it.
pub fn stripped(call: &Call) -> Call {
    Call { params: Vec::new(), ..call.clone() }
}

/// The id of a call, for lists of calls to load.
pub fn others_of(hold: &Hold) -> impl Iterator<Item = CallId> + '_ {
    hold.calls.iter().copied().filter(|call| *call != hold.call_id)
}
