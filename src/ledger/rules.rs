//! The money rules: loaded state and a command in, effects or a refusal out.
//!
//! Pure: no clock, socket, database or randomness; time and ids are inputs. Every check comes before the line that says
//! "from here it succeeds". A store loads what [`Loaded`] names, calls [`admit`], and writes the [`Effects`] in one
//! transaction or not at all.
#![deny(clippy::arithmetic_side_effects, clippy::as_conversions)]

pub mod limits;
mod price;
pub mod resolve;

use crate::audit::{Decision, Entry, Event, RecordedOutcome};
use crate::call::{
    ATTEMPTS_MAX, Attempt, Call, CallState, KeyBasis, StoredAnswer, first_difference, stamp, upstream_key,
};
use crate::hold::{Base, ExactRequest, Hold, HoldState, LiveCall};
use crate::id::{BootId, CallId, HoldId};
use crate::intent::{Claim, HoldMark, Intent, Seen, Verb};
use crate::issuer::Issuer;
use crate::key::{Constraint, Idempotency, Key};
use crate::ledger::counter::{Contradiction, Counters};
use crate::ledger::entry;
use crate::ledger::rules::price::{Priced, Reserve};
use crate::money::Rate;
use crate::refusal::{Code, Refusal};
use crate::time::UnixMs;

/// Attempts and calls that a row remembers one by one.
const TRAIL_MAX: usize = 16;

/// A money call asks to be let through.
#[derive(Clone, Debug)]
pub struct Admit {
    /// What it would do.
    pub intent: Intent,
    /// A fresh id, used when the call is new.
    pub call_id: CallId,
    /// A fresh id, used when money is held anew.
    pub hold_id: HoldId,
    /// The run of this process.
    pub boot: BootId,
    /// Whether the key's rate lets another request through to the vendor.
    pub may_go: bool,
    /// Whether a call that another process is sending is waited for, rather than refused.
    pub may_wait: bool,
    /// From acceptance to here, milliseconds.
    pub duration_ms: u64,
}

/// What a store loads before it asks.
#[derive(Clone, Copy, Debug)]
pub struct Loaded<'a> {
    /// The key under which the call is made.
    pub key: &'a Key,
    /// Whether an operator stopped everything.
    pub kill_switch: bool,
    /// Attempts first sent up to here are not sent again, because the clock was set back since.
    pub resend_floor: UnixMs,
    /// The call with the intent's identity.
    pub call: Option<&'a Call>,
    /// The hold of that call's last attempt.
    pub call_hold: Option<&'a Hold>,
    /// Whether that call's answer is kept.
    pub answer_kept: bool,
    /// The hold of the object that the claim names.
    pub object_hold: Option<&'a Hold>,
    /// The key that pays for that hold.
    pub owner: Option<&'a Key>,
    /// Who minted the key, when not the admin.
    pub issuer: Option<&'a Issuer>,
    /// Who minted the owner, when not the admin.
    pub owner_issuer: Option<&'a Issuer>,
    /// Whether the key's budget is stopped.
    pub budget_stopped: bool,
    /// The counters of the subjects of key and owner ([`limits::subjects_of`]) on the days of [`limits::days_of`]; both lanes.
    pub counters: &'a Counters,
}

/// Rows that must be written together.
#[derive(Clone, Debug, Default)]
pub struct Effects {
    /// Calls as they become.
    pub calls: Vec<Call>,
    /// A hold as it was and as it becomes; the counters follow from it.
    pub hold: Option<(Option<Hold>, Hold)>,
    /// Objects at Stripe that belong to that hold.
    pub objects: Vec<String>,
    /// An answer to keep.
    pub answer: Option<(CallId, StoredAnswer)>,
    /// Answers to forget.
    pub drop_answers: Vec<CallId>,
    /// A key as it becomes.
    pub key: Option<Key>,
    /// When to look again whether a call's rows may go.
    pub look_at_call: Option<(UnixMs, CallId)>,
    /// What is recorded.
    pub audit: Vec<Entry>,
}

/// What was decided about a money call.
#[derive(Debug)]
pub enum Verdict {
    /// Write the effects, then send the request of the hold in them.
    Send(Box<Effects>),
    /// Answer from memory; the effects are the record of it.
    Replay(CallId, Box<Effects>),
    /// Read the object first, and ask again with what its record says, and how its hold was before.
    Look(Option<HoldMark>),
    /// It was executed, and no answer of it is kept: answer with its object, where that can be read.
    Tell(Box<Executed>),
    /// Answer with the refusal.
    Refuse(Refusal),
}

/// A call that was executed, and whose answer was never seen here.
#[derive(Clone, Debug)]
pub struct Executed {
    /// The call.
    pub call_id: CallId,
    /// Its operation.
    pub operation: String,
    /// Its object.
    pub object_id: String,
    /// When it was sent.
    pub at: UnixMs,
    /// The answer where the object cannot be read.
    pub refusal: Refusal,
}

/// Judges a money call.
pub fn admit(state: &Loaded<'_>, command: &Admit, now: UnixMs) -> Verdict {
    judge(state, command, now).unwrap_or_else(Verdict::Refuse)
}

fn judge(state: &Loaded<'_>, command: &Admit, now: UnixMs) -> Result<Verdict, Refusal> {
    state.key.alive(now)?;
    if state.issuer.is_some_and(|issuer| issuer.revoked_at.is_some()) {
        return Err(issuer_revoked());
    }
    if state.kill_switch {
        return Err(kill_switch());
    }
    let intent = &command.intent;
    let to_keep = constraints_to_keep(intent);
    if !to_keep.is_empty() && state.object_hold.is_none() && intent.seen.is_none() {
        return Ok(look(state));
    }
    keeps_constraints(&to_keep, state.object_hold, intent.seen.as_ref())?;
    let attempt = match same_call(state, intent, now)? {
        Same::Replay(call) => return Ok(replay(state, command, call, now)),
        Same::Tell(executed) => return Ok(Verdict::Tell(executed)),
        _ if !command.may_go => return Err(too_soon(state.key)),
        Same::Resend(call, hold) => return resend(state, command, call, hold, now),
        Same::New => NewAttempt { call: None, n: 1 },
        Same::Again(call, n) => NewAttempt { call: Some(call), n },
    };
    let Priced::Known(reserve) = price::price(state, intent)? else { return Ok(look(state)) };
    if state.budget_stopped {
        return Err(budget_stopped(state.key));
    }
    limits::fits(state, &reserve, now)?;
    // From here it succeeds.
    Ok(send(state, command, &attempt, &reserve, now))
}

fn look(state: &Loaded<'_>) -> Verdict {
    Verdict::Look(state.object_hold.map(|hold| (hold.id, hold.since)))
}

/// The refusal of a request that comes too soon after the key's others.
pub fn too_soon(key: &Key) -> Refusal {
    Refusal::new(
        Code::RateLimited,
        format!(
            "This vault key may make {} requests in a second (requests_per_second). Try again in a moment.",
            key.rate()
        ),
    )
}

/// The refusal of a key whose issuer was revoked: it may not outlive it.
pub fn issuer_revoked() -> Refusal {
    Refusal::new(Code::VaultKeyRevoked, "The issuer key that minted this vault key was revoked.")
}

fn budget_stopped(key: &Key) -> Refusal {
    let name = key.budget.as_deref().unwrap_or_default();
    Refusal::new(
        Code::BudgetStopped,
        format!("The budget '{name}' was stopped by a cap refusal; an operator has to resume it."),
    )
}

/// The constraints that the object has to keep. How much of it goes back at most is told only by its record.
fn constraints_to_keep(intent: &Intent) -> Vec<Constraint> {
    let reads_amount = matches!(intent.claim, Claim::Return { minor: None, .. }) && intent.seen.is_none();
    let of_amount = |constraint: &Constraint| !["customer", "currency"].contains(&constraint.param.as_str());
    let open = intent.open_constraints.iter();
    open.filter(|constraint| !(reads_amount && of_amount(constraint))).cloned().collect()
}

/// Constraints that the request left open are kept by the object's own fields, or refuse the call.
///
/// # Errors
/// `parameter_not_allowed`, also for an object that nobody knows.
pub fn keeps_constraints(
    open: &[Constraint],
    object: Option<&Hold>,
    seen: Option<&Seen>,
) -> Result<(), Refusal> {
    for constraint in open {
        let param = constraint.param.as_str();
        let own = seen.and_then(|seen| seen.own_field(param));
        let value = own.or_else(|| object.and_then(|hold| hold.own_field(param)));
        if !value.is_some_and(|value| constraint.rule.admits(&value)) {
            return Err(Refusal::of_param(
                Code::ParameterNotAllowed,
                param,
                format!(
                    "'{param}' is constrained by this key, and neither the call nor its object keeps that."
                ),
            ));
        }
    }
    Ok(())
}

/// The refusal while everything is stopped.
pub fn kill_switch() -> Refusal {
    Refusal::new(Code::KillSwitch, "An operator has stopped all calls through this sidecar (kill switch).")
}

/// How a request relates to what was called before.
enum Same<'a> {
    New,
    Again(&'a Call, u32),
    Replay(&'a Call),
    Tell(Box<Executed>),
    Resend(&'a Call, &'a Hold),
}

struct NewAttempt<'a> {
    call: Option<&'a Call>,
    n: u32,
}

fn same_call<'a>(state: &Loaded<'a>, intent: &Intent, now: UnixMs) -> Result<Same<'a>, Refusal> {
    let Some(call) = state.call else { return Ok(Same::New) };
    let remembered = state.answer_kept
        && call.remember_until.is_some_and(|until| now < until || call.state == CallState::Open);
    // Not for want of an answer: what is known to be executed without one is executed as well.
    let over = call.state == CallState::Spent && call.remember_until.is_some_and(|until| now >= until);
    if over {
        return if call.by_content { Err(already_executed(call)) } else { Ok(Same::New) };
    }
    let differs = call.fingerprint != intent.fingerprint;
    if differs && call.binds_parameters(now) {
        return Err(other_parameters(call, intent));
    }
    match call.state {
        CallState::InFlight => Err(in_use("This call is being made right now; its answer is not known yet.")),
        CallState::Spent | CallState::Open if remembered => Ok(Same::Replay(call)),
        CallState::Spent | CallState::Open => tell(call),
        CallState::Doubt => match state.call_hold {
            Some(hold) if call.may_resend(now, state.resend_floor) => Ok(Same::Resend(call, hold)),
            _ => Err(Refusal::outcome_unknown(false, false, doubt_text(call))),
        },
        CallState::Declined if call.by_content => next_after_decline(call, differs, now, state.key, intent),
        CallState::Refused if call.by_content => Ok(Same::Again(call, last_n(call).saturating_add(1))),
        CallState::NotExecuted if call.by_content => {
            next_after_no_execution(call, differs, now, state.key, intent)
        }
        CallState::Declined | CallState::Refused | CallState::NotExecuted | CallState::Forgotten => {
            Ok(Same::Again(call, last_n(call).saturating_add(1)))
        }
    }
}

/// What Stripe never looked at goes up under the same key. What it made and ended (a canceled object) needs the next:
/// under the same key Stripe would repeat the object as it was.
fn next_after_no_execution<'a>(
    call: &'a Call,
    differs: bool,
    now: UnixMs,
    key: &Key,
    intent: &Intent,
) -> Result<Same<'a>, Refusal> {
    match call.last_attempt() {
        Some(attempt) if attempt.sends > 0 => Ok(Same::Again(call, attempt.n.saturating_add(1))),
        Some(attempt) if attempt.declined_at.is_some() => next_after_decline(call, differs, now, key, intent),
        Some(_) | None => Ok(Same::Again(call, last_n(call))),
    }
}

/// After a decline in `content` mode: other parameters (a new card) are a new attempt at once, the same ones only
/// after a while; until then the same key goes up and Stripe repeats its answer.
fn next_after_decline<'a>(
    call: &'a Call,
    differs: bool,
    now: UnixMs,
    key: &Key,
    intent: &Intent,
) -> Result<Same<'a>, Refusal> {
    let n = last_n(call);
    let declined_at = call.last_attempt().and_then(|attempt| attempt.declined_at).unwrap_or(call.created_at);
    let waited = now.millis_since(declined_at) >= key.retry_declined_after_ms();
    match (differs, n < ATTEMPTS_MAX) {
        (true, true) => Ok(Same::Again(call, n.saturating_add(1))),
        (true, false) => Err(other_parameters(call, intent)),
        (false, true) if waited => Ok(Same::Again(call, n.saturating_add(1))),
        (false, _) => Ok(Same::Again(call, n)),
    }
}

fn last_n(call: &Call) -> u32 {
    call.last_attempt().map_or(1, |attempt| attempt.n)
}

fn other_parameters(call: &Call, intent: &Intent) -> Refusal {
    let param = first_difference(&call.params, &intent.params).unwrap_or("parameters").to_owned();
    let identity = if call.by_content {
        "This has been charged, or is being charged, under this scope"
    } else {
        "Keys for idempotent requests can only be used with the same parameters they were first used with; this key \
         was used before"
    };
    let message = format!("{identity} with other parameters: '{param}' differs (call {}).", call.id);
    Refusal::of_param(Code::IdempotencyError, param, message)
}

fn in_use(message: &str) -> Refusal {
    Refusal::new(Code::IdempotencyKeyInUse, message)
}

fn already_executed(call: &Call) -> Refusal {
    let object = call.object_id.as_deref().unwrap_or("an object that is not known here");
    Refusal::new(
        Code::AlreadyExecuted,
        format!("This call was executed as {object} (call {}); its answer is no longer kept.", call.id),
    )
}

fn tell<'a>(call: &Call) -> Result<Same<'a>, Refusal> {
    let refusal = already_executed(call);
    let Some(object_id) = call.object_id.clone() else { return Err(refusal) };
    Ok(Same::Tell(Box::new(Executed {
        call_id: call.id,
        operation: call.operation.clone(),
        object_id,
        at: call.last_attempt().map_or(call.created_at, |attempt| attempt.first_send),
        refusal,
    })))
}

fn doubt_text(call: &Call) -> String {
    format!(
        "Nobody here knows whether Stripe executed this call ({}). Its money stays counted, and it is not sent again \
         because Stripe may have forgotten its idempotency key. An operator has to look it up.",
        call.id
    )
}

fn replay(state: &Loaded<'_>, command: &Admit, call: &Call, now: UnixMs) -> Verdict {
    let audit = Entry {
        call_id: Some(call.id.to_string()),
        decision: Some(Decision::Replayed),
        outcome: Some(RecordedOutcome::None),
        object_id: call.object_id.clone(),
        idempotency_key: call.last_attempt().and_then(|attempt| attempt.upstream_key.clone()),
        duration_ms: Some(command.duration_ms),
        ..entry::of_request(now, Event::Replayed, state.key, &command.intent.facts)
    };
    Verdict::Replay(call.id, Box::new(Effects { audit: vec![audit], ..Effects::default() }))
}

fn resend(
    state: &Loaded<'_>,
    command: &Admit,
    call: &Call,
    was: &Hold,
    now: UnixMs,
) -> Result<Verdict, Refusal> {
    let (HoldState::Doubt, Some(live)) = (was.state, &was.live) else {
        return Err(Refusal::outcome_unknown(false, false, doubt_text(call)));
    };
    // From here it succeeds.
    let mut call = call.clone();
    call.state = CallState::InFlight;
    if let Some(attempt) = call.attempts.last_mut() {
        attempt.last_send = now;
        attempt.sends = attempt.sends.saturating_add(1);
    }
    let mut hold = was.clone();
    hold.state = HoldState::Sending { boot: command.boot };
    hold.call_id = call.id;
    hold.since = now;
    // The same call by another request, which may come from another execution.
    let crate::hold::Facts { request_id, context, .. } = command.intent.facts.clone();
    let facts = crate::hold::Facts { request_id, context, ..live.facts.clone() };
    let audit = Entry {
        flags: Some(vec!["resend".to_owned()]),
        duration_ms: Some(command.duration_ms),
        ..entry::of_call(now, Event::Admitted, RecordedOutcome::Held, state.key, &hold, &facts)
    };
    if let Some(live) = hold.live.as_mut() {
        live.facts = facts;
        live.key_id = state.key.id;
    }
    Ok(Verdict::Send(Box::new(Effects {
        calls: vec![call],
        hold: Some((Some(was.clone()), hold)),
        audit: vec![audit],
        ..Effects::default()
    })))
}

fn send(
    state: &Loaded<'_>,
    command: &Admit,
    attempt: &NewAttempt<'_>,
    reserve: &Reserve<'_>,
    now: UnixMs,
) -> Verdict {
    let intent = &command.intent;
    let generation = attempt.call.map_or(0, |call| call.generation);
    let key = upstream_key(&intent.basis, &intent.identity, attempt.n, generation);
    let call_id = attempt.call.map_or(command.call_id, |call| call.id);
    let mark = intent.stamp_param.as_ref().map(|_| {
        let seen = key.clone().unwrap_or_else(|| call_id.to_string());
        stamp(&intent.estate, &intent.operation, &seen, &intent.basis, attempt.n, generation)
    });
    let mut request: ExactRequest = intent.request.clone();
    request.idempotency_key.clone_from(&key);
    if let (Some(param), Some(mark)) = (&intent.stamp_param, &mark) {
        request.params.push((param.clone(), mark.clone()));
    }
    // Under the same upstream key Stripe compares parameters: what it saw without a pin, or with another, it sees so again.
    let before = attempt.call.and_then(Call::last_attempt).filter(|last| last.upstream_key == key);
    let pin = match before {
        Some(last) => last.pinned,
        None => pinned(intent),
    };
    if let (Some(param), Some(minor)) = (&intent.pin, pin) {
        request.params.push((param.clone(), minor.to_string()));
    }
    let facts = crate::hold::Facts { idempotency_key: key.clone(), ..intent.facts.clone() };
    let live = LiveCall { request, facts, decline_voids: reserve.decline_voids, key_id: state.key.id };
    let hold = held(state, command, call_id, reserve, live, now);
    let made = Attempt {
        n: attempt.n,
        upstream_key: key,
        first_send: now,
        last_send: now,
        sends: 1,
        end: None,
        ended_at: None,
        stamp: mark,
        hold_id: hold.id,
        saw_5xx: false,
        pinned: pin,
        declined_at: attempt
            .call
            .and_then(Call::last_attempt)
            .filter(|last| last.n == attempt.n)
            .and_then(|last| last.declined_at),
    };
    let call = called(state, command, attempt, made, now);
    let audit = Entry {
        duration_ms: Some(command.duration_ms),
        ..entry::of_call(
            now,
            Event::Admitted,
            RecordedOutcome::Held,
            state.key,
            &hold,
            &hold.live.as_ref().map(|live| live.facts.clone()).unwrap_or_default(),
        )
    };
    let objects = hold.object_id.clone().into_iter().collect();
    Verdict::Send(Box::new(Effects {
        calls: vec![call],
        hold: Some((reserve.on.cloned(), hold)),
        objects,
        audit: vec![audit],
        ..Effects::default()
    }))
}

/// The amount that was read, for a call that leaves it to its object: between the read and the call nobody may change it.
fn pinned(intent: &Intent) -> Option<u64> {
    let ceiling = intent.seen.as_ref()?.ceiling?;
    match intent.claim {
        Claim::Use { minor: None, verb: Verb::Confirm | Verb::Capture, .. }
        | Claim::Return { minor: None, .. } => Some(ceiling.minor),
        Claim::Use { .. }
        | Claim::Return { .. }
        | Claim::Create { .. }
        | Claim::Ceiling { .. }
        | Claim::Unpriced { .. } => None,
    }
}

fn held(
    state: &Loaded<'_>,
    command: &Admit,
    call_id: CallId,
    reserve: &Reserve<'_>,
    live: LiveCall,
    now: UnixMs,
) -> Hold {
    let intent = &command.intent;
    let seen = intent.seen.as_ref();
    // What is made anew for a known object belongs to that object; what goes back is an object of its own.
    let (of_object, object_id) = match &intent.claim {
        Claim::Use { object, .. } => (state.object_hold, Some(object)),
        Claim::Ceiling { object, on_its_hold: true, .. } => (state.object_hold, object.as_ref()),
        Claim::Ceiling { .. } | Claim::Create { .. } | Claim::Return { .. } | Claim::Unpriced { .. } => {
            (None, None)
        }
    };
    let customer = match object_id {
        Some(_) => {
            of_object.and_then(|hold| hold.customer.clone()).or(seen.and_then(|seen| seen.customer.clone()))
        }
        None => intent.facts.customer.clone(),
    };
    let mut calls = of_object.map(|hold| hold.calls.clone()).unwrap_or_default();
    calls.retain(|known| *known != call_id);
    calls.push(call_id);
    // The call that made the object stays: it is remembered for as long as the object is open.
    let excess = calls.len().saturating_sub(TRAIL_MAX);
    calls.drain(1..=excess);
    Hold {
        id: reserve.on.map_or(command.hold_id, |hold| hold.id),
        key_id: reserve.payer.id,
        call_id,
        state: HoldState::Sending { boot: command.boot },
        lane: reserve.lane,
        day: reserve.on.map_or(now.day(), |hold| hold.day),
        subjects: reserve.on.map_or_else(|| limits::subjects_of(reserve.payer), |hold| hold.subjects.clone()),
        currency: reserve.currency,
        minor: reserve.minor,
        usd: reserve.usd,
        base: reserve.on.map(|hold| match seen {
            // What was read just now is what the object stands for, whatever becomes of this call.
            Some(_) => Base { minor: reserve.minor, usd: reserve.usd },
            None => Base { minor: hold.minor, usd: hold.usd },
        }),
        object_id: of_object.and_then(|hold| hold.object_id.clone()).or_else(|| object_id.cloned()),
        admitted_at: reserve.on.map_or(now, |hold| hold.admitted_at),
        since: now,
        live: Some(live),
        calls,
        aliases: of_object.map(|hold| hold.aliases.clone()).unwrap_or_default(),
        account: intent.request.account.clone().unwrap_or_default(),
        customer,
        object_over: false,
        rate: (reserve.rate != Rate::USD).then_some(reserve.rate),
        moved_before: reserve.moved_before,
        search: None,
        is_ceiling: matches!(intent.claim, Claim::Ceiling { .. }),
    }
}

fn called(state: &Loaded<'_>, command: &Admit, attempt: &NewAttempt<'_>, made: Attempt, now: UnixMs) -> Call {
    let intent = &command.intent;
    let mut attempts: Vec<Attempt> = attempt.call.map(|call| call.attempts.clone()).unwrap_or_default();
    attempts.retain(|known| known.n != made.n);
    let hold_id = made.hold_id;
    attempts.push(made);
    let excess = attempts.len().saturating_sub(TRAIL_MAX);
    attempts.drain(..excess);
    Call {
        id: attempt.call.map_or(command.call_id, |call| call.id),
        identity: intent.identity,
        operation: intent.operation.clone(),
        state: CallState::InFlight,
        fingerprint: intent.fingerprint,
        params: intent.params.clone(),
        generation: attempt.call.map_or(0, |call| call.generation),
        attempts,
        key_id: state.key.id,
        by_content: match state.key.idempotency {
            Idempotency::Content { .. } => true,
            Idempotency::Required | Idempotency::Client => false,
        },
        caller_key: match &intent.basis {
            KeyBasis::Caller(key) => Some(key.clone()),
            KeyBasis::Content | KeyBasis::Absent => None,
        },
        customer: intent.facts.customer.clone(),
        object_id: intent.facts.object_id.clone(),
        hold_id,
        created_at: attempt.call.map_or(now, |call| call.created_at),
        answered_at: None,
        remember_until: None,
    }
}

/// What the counters become by a hold's change.
///
/// # Errors
/// [`Contradiction`] when the hold was not counted as it was.
pub fn shift(counters: &mut Counters, effects: &Effects) -> Result<(), Contradiction> {
    match &effects.hold {
        Some((was, is)) => counters.shift(was.as_ref(), is),
        None => Ok(()),
    }
}
