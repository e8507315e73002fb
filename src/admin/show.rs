//! Rows as the admin API shows them.

use serde_json::{Map, Value, json};

use crate::call::{Call, CallState};
use crate::hold::{Hold, HoldState, Lane, Search, Subject};
use crate::id::BudgetId;
use crate::issuer::Issuer;
use crate::key::Key;
use crate::ledger::LedgerError;
use crate::ledger::counter::Counter;
use crate::ledger::entry::bounds;
use crate::ledger::query::Reader;
use crate::ledger::rules::limits;
use crate::money::MicroUsd;
use crate::time::{Day, UnixMs};

/// What a key has spent and could still spend.
///
/// # Errors
/// [`LedgerError`] when the counters cannot be read.
pub fn spend(reader: &Reader<'_>, key: &Key, now: UnixMs) -> Result<Value, LedgerError> {
    let whole_life = key.lives_a_day_or_less();
    let resets_at = (!whole_life).then(|| now.day().end());
    let counter = |subject, day, lane| reader.counter(subject, day, lane);
    let own = Subject::Key(key.id);
    let window = |subject, lane| match (whole_life, subject) {
        (true, Subject::Budget(_)) if key.created_at.day() < now.day() => {
            Ok(counter(subject, key.created_at.day(), lane)?.and(&counter(subject, now.day(), lane)?))
        }
        (true, Subject::Key(_) | Subject::Issuer(_)) => counter(subject, Day::TOTAL, lane),
        (true, Subject::Budget(_)) | (false, _) => counter(subject, now.day(), lane),
    };
    let (today, total) = (window(own, Lane::In)?, counter(own, Day::TOTAL, Lane::In)?);
    let (out, total_out) = (window(own, Lane::Out)?, counter(own, Day::TOTAL, Lane::Out)?);
    // What could still be spent is decided by the counters that the key shares.
    let spender = limits::spender(key);
    let room = |cap: Option<MicroUsd>, counter: Counter| cap.map(|cap| cap.saturating_sub(counter.counted()));
    let issuer = key.issuer.map(|id| reader.issuer(id)).transpose()?.flatten();
    let of_issuer = |cap: Option<MicroUsd>, day, lane| match &issuer {
        Some(issuer) => Ok(room(cap, counter(Subject::Issuer(issuer.id), day, lane)?)),
        None => Ok::<_, LedgerError>(None),
    };
    let total_room = [
        room(key.caps.total, counter(spender, Day::TOTAL, Lane::In)?),
        of_issuer(issuer.as_ref().and_then(|issuer| issuer.total), Day::TOTAL, Lane::In)?,
    ]
    .into_iter()
    .flatten()
    .min();
    let both = [
        room(key.caps.daily, window(spender, Lane::In)?),
        total_room,
        of_issuer(issuer.as_ref().and_then(|issuer| issuer.daily), now.day(), Lane::In)?,
    ]
    .into_iter()
    .flatten()
    .min();
    let out_room = [
        room(key.caps.daily_out, window(spender, Lane::Out)?),
        of_issuer(issuer.as_ref().and_then(|issuer| issuer.daily_out), now.day(), Lane::Out)?,
    ]
    .into_iter()
    .flatten()
    .min();
    let mut now_in = figures(&today, both);
    now_in.insert("resets_at".to_owned(), resets_at.map_or(Value::Null, |at| at.to_string().into()));
    let mut now_out = figures(&out, out_room);
    now_out.insert("resets_at".to_owned(), resets_at.map_or(Value::Null, |at| at.to_string().into()));
    now_in.insert("out".to_owned(), Value::Object(now_out));
    let mut all = figures(&total, total_room);
    all.insert("out".to_owned(), Value::Object(figures(&total_out, None)));
    all.insert("calls".to_owned(), Value::from(total.calls.saturating_add(total_out.calls)));
    Ok(json!({ "today": now_in, "total": all }))
}

fn figures(counter: &Counter, remaining: Option<MicroUsd>) -> Map<String, Value> {
    let mut object = Map::new();
    object.insert("spent".to_owned(), Value::from(counter.spent.to_string()));
    object.insert("held".to_owned(), Value::from(counter.held_and_doubt().to_string()));
    object.insert("doubt".to_owned(), Value::from(counter.doubt.to_string()));
    object.insert("remaining".to_owned(), remaining.map_or(Value::Null, |usd| usd.to_string().into()));
    object
}

/// One hold, with what an operator needs to look it up at Stripe.
pub fn hold(hold: &Hold, call: Option<&Call>) -> Value {
    let facts = hold.live.as_ref().map(|live| &live.facts);
    let attempt = call.and_then(Call::last_attempt);
    json!({
        "id": hold.id.to_string(),
        "key_id": hold.key_id.to_string(),
        "call_id": hold.call_id.to_string(),
        "state": hold.state.as_str(),
        "usd": hold.currency.map(|_| hold.usd.to_string()),
        "amount": hold.currency.map(|_| hold.minor),
        "currency": hold.currency.map(|currency| currency.as_str().to_owned()),
        "micro_usd_per_minor_unit": hold.rate.map(|rate| rate.to_string()),
        "lane": match hold.lane { Lane::In => "in", Lane::Out => "out" },
        "object_id": hold.object_id,
        "since": hold.since.to_string(),
        "admitted_at": hold.admitted_at.to_string(),
        "method": facts.map(|facts| facts.method.as_str()),
        "endpoint": facts.map(|facts| facts.endpoint.as_str()),
        "customer": facts.and_then(|facts| facts.customer.as_deref()),
        "idempotency_key": attempt.and_then(|attempt| attempt.upstream_key.as_deref()),
        "stamp": attempt.and_then(|attempt| attempt.stamp.as_deref()),
        "first_send": attempt.map(|attempt| attempt.first_send.to_string()),
        "last_send": attempt.map(|attempt| attempt.last_send.to_string()),
        "saw_5xx": attempt.map(|attempt| attempt.saw_5xx),
        "search": hold.search.as_ref().map(search),
        "resolve_with": (hold.state == HoldState::Doubt).then(|| resolve_with(hold)),
    })
}

/// What recovery has looked for at Stripe, and what came of it.
fn search(search: &Search) -> Value {
    json!({
        "times": search.times,
        "first_at": search.first_at.to_string(),
        "last_at": search.last_at.to_string(),
        "read": search.read,
        "came_to": search.came_to,
    })
}

/// The command that ends a doubt, either way.
fn resolve_with(hold: &Hold) -> [String; 2] {
    let resolve = format!("keybrake holds resolve {}", hold.id);
    [
        format!(
            "{resolve} --outcome spent --amount {} --object-id ID --reason \"found in the Dashboard\"",
            hold.minor
        ),
        format!("{resolve} --outcome not-executed --reason \"not in the Dashboard, and older than a day\""),
    ]
}

/// One call.
pub fn call(call: &Call) -> Value {
    let attempts: Vec<Value> = call
        .attempts
        .iter()
        .map(|attempt| {
            json!({
                "n": attempt.n,
                "upstream_key": attempt.upstream_key,
                "first_send": attempt.first_send.to_string(),
                "last_send": attempt.last_send.to_string(),
                "end": attempt.end.map(CallState::as_str),
                "hold_id": attempt.hold_id.to_string(),
                "stamp": attempt.stamp,
            })
        })
        .collect();
    json!({
        "id": call.id.to_string(),
        "state": call.state.as_str(),
        "operation": call.operation,
        "key_id": call.key_id.to_string(),
        "hold_id": call.hold_id.to_string(),
        "idempotency_key": call.caller_key,
        "customer": call.customer,
        "object_id": call.object_id,
        "created_at": call.created_at.to_string(),
        "remember_until": call.remember_until.map(|at| at.to_string()),
        "attempts": attempts,
    })
}

/// One issuer key, without its secret.
pub fn issuer(issuer: &Issuer, now: UnixMs) -> Map<String, Value> {
    let mut shown = Map::new();
    shown.insert("id".to_owned(), Value::from(issuer.id.to_string()));
    shown.insert("status".to_owned(), Value::from(issuer.status(now)));
    shown.extend(bounds(issuer));
    shown.insert("created_at".to_owned(), Value::from(issuer.created_at.to_string()));
    let revoked_at = issuer.revoked_at.map_or(Value::Null, |at| at.to_string().into());
    shown.insert("revoked_at".to_owned(), revoked_at);
    shown
}

/// What all keys of an issuer have spent together.
///
/// # Errors
/// [`LedgerError`] when the counters cannot be read.
pub fn issuer_spend(reader: &Reader<'_>, issuer: &Issuer, now: UnixMs) -> Result<Value, LedgerError> {
    subject_spend(reader, now, Subject::Issuer(issuer.id), [issuer.daily, issuer.total, issuer.daily_out])
}

/// What all keys of a budget have spent together.
///
/// # Errors
/// [`LedgerError`] when the counters cannot be read.
pub fn budget_spend(reader: &Reader<'_>, budget: BudgetId, now: UnixMs) -> Result<Value, LedgerError> {
    subject_spend(reader, now, Subject::Budget(budget), [None; 3])
}

fn subject_spend(
    reader: &Reader<'_>,
    now: UnixMs,
    subject: Subject,
    [daily, total, daily_out]: [Option<MicroUsd>; 3],
) -> Result<Value, LedgerError> {
    let today = now.day();
    let of = |day, lane, cap: Option<MicroUsd>| {
        let counter = reader.counter(subject, day, lane)?;
        Ok::<_, LedgerError>(figures(&counter, cap.map(|cap| cap.saturating_sub(counter.counted()))))
    };
    let mut of_today = of(today, Lane::In, daily)?;
    of_today.insert("resets_at".to_owned(), Value::from(today.end().to_string()));
    of_today.insert("out".to_owned(), Value::Object(of(today, Lane::Out, daily_out)?));
    let mut all = of(Day::TOTAL, Lane::In, total)?;
    all.insert("out".to_owned(), Value::Object(of(Day::TOTAL, Lane::Out, None)?));
    Ok(json!({ "today": of_today, "total": all }))
}
