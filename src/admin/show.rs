//! Rows as the admin API shows them.

use serde_json::{Map, Value, json};

use crate::call::{Call, CallState};
use crate::hold::{Hold, Lane};
use crate::key::Key;
use crate::ledger::counter::Counter;
use crate::ledger::{Ledger, LedgerError};
use crate::money::MicroUsd;
use crate::time::{Day, UnixMs};

/// What a key has spent and could still spend.
///
/// # Errors
/// [`LedgerError`] when the counters cannot be read.
pub fn spend(ledger: &Ledger, key: &Key, now: UnixMs) -> Result<Value, LedgerError> {
    let whole_life = key.lives_a_day_or_less();
    let window = if whole_life { Day::TOTAL } else { now.day() };
    let resets_at = (!whole_life).then(|| now.day().end());
    let counter = |day, lane| ledger.redb().counter(key.id, day, lane);
    let (today, total) = (counter(window, Lane::In)?, counter(Day::TOTAL, Lane::In)?);
    let (out, total_out) = (counter(window, Lane::Out)?, counter(Day::TOTAL, Lane::Out)?);
    let room =
        |cap: Option<MicroUsd>, counter: &Counter| cap.map(|cap| cap.saturating_sub(counter.counted()));
    let daily_room = room(key.caps.daily, &today);
    let total_room = room(key.caps.total, &total);
    let both = [daily_room, total_room].into_iter().flatten().min();
    let mut now_in = figures(&today, both);
    now_in.insert("resets_at".to_owned(), resets_at.map_or(Value::Null, |at| at.to_string().into()));
    let mut now_out = figures(&out, room(key.caps.daily_out, &out));
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
    })
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
