//! Audit entries of the ledger's own events.

use serde_json::{Map, Value, json};

use crate::audit::{Decision, Entry, Event, RecordedOutcome};
use crate::hold::{Facts, Hold};
use crate::issuer::Issuer;
use crate::key::{Constraint, Key, Rule};
use crate::refusal::{CapFigures, Refusal};
use crate::time::UnixMs;

/// A list of pairs as a JSON object; `None` when it is empty.
pub fn object_of(pairs: &[(String, String)]) -> Option<Map<String, Value>> {
    let object: Map<String, Value> =
        pairs.iter().map(|(name, value)| (name.clone(), Value::String(value.clone()))).collect();
    (!object.is_empty()).then_some(object)
}

/// The metadata of a request's records: the key's own, and what the request said of itself. A name has one value: whoever
/// minted the key is trusted more than the script that uses it.
fn metadata_of(key: &Key, facts: &Facts) -> Option<Map<String, Value>> {
    let is_own = |name: &String| key.metadata.iter().any(|(own, _)| own == name);
    let claimed = facts.context.iter().filter(|(name, _)| !is_own(name)).cloned();
    object_of(&key.metadata.iter().cloned().chain(claimed).collect::<Vec<_>>())
}

/// What every record about a request under a key says.
pub fn of_request(at: UnixMs, event: Event, key: &Key, facts: &Facts) -> Entry {
    Entry {
        at: at.to_string(),
        event,
        request_id: Some(facts.request_id.clone()),
        key_id: Some(key.id.to_string()),
        issuer_id: key.issuer.map(|issuer| issuer.to_string()),
        label: Some(key.label.clone()),
        metadata: metadata_of(key, facts),
        method: Some(facts.method.clone()),
        endpoint: Some(facts.endpoint.clone()),
        idempotency_key: facts.idempotency_key.clone(),
        customer: facts.customer.clone(),
        object_id: facts.object_id.clone(),
        stripe_metadata: object_of(&facts.stripe_metadata),
        ..Entry::default()
    }
}

/// One event of a money call.
pub fn of_call(
    at: UnixMs,
    event: Event,
    outcome: RecordedOutcome,
    key: &Key,
    hold: &Hold,
    facts: &Facts,
) -> Entry {
    Entry {
        call_id: Some(hold.call_id.to_string()),
        hold_id: Some(hold.id.to_string()),
        decision: Some(Decision::Forwarded),
        outcome: Some(outcome),
        amount: hold.currency.map(|_| hold.minor),
        currency: hold.currency.map(|currency| currency.as_str().to_owned()),
        usd: hold.currency.map(|_| hold.usd.to_string()),
        object_id: hold.object_id.clone().or_else(|| facts.object_id.clone()),
        ..of_request(at, event, key, facts)
    }
}

/// One refusal.
pub fn of_refusal(at: UnixMs, key: &Key, facts: &Facts, refusal: &Refusal, duration_ms: u64) -> Entry {
    Entry {
        decision: Some(Decision::Refused),
        code: Some(refusal.code.as_str().to_owned()),
        outcome: Some(RecordedOutcome::None),
        count: Some(1),
        usd: refusal.figures.as_ref().map(|figures| figures.requested.to_string()),
        duration_ms: Some(duration_ms),
        detail: refusal.figures.as_deref().map(figures_of),
        ..of_request(at, Event::Refused, key, facts)
    }
}

/// The cap that a call ran into, as it was at that moment: later nobody could tell any more.
fn figures_of(figures: &CapFigures) -> Map<String, Value> {
    let CapFigures { cap, limit, spent, held, requested: _, resets_at } = figures;
    let left = limit.saturating_sub(*spent).saturating_sub(*held);
    let mut detail = Map::new();
    detail.insert("cap".to_owned(), Value::from(cap.as_str()));
    for (name, usd) in [("limit", *limit), ("spent", *spent), ("held", *held), ("remaining", left)] {
        detail.insert(name.to_owned(), Value::from(usd.to_string()));
    }
    detail.extend(resets_at.map(|at| ("resets_at".to_owned(), Value::from(at.to_string()))));
    detail
}

/// One event of an issuer key.
pub fn of_issuer(at: UnixMs, event: Event, actor: &str, issuer: &Issuer) -> Entry {
    Entry { issuer_id: Some(issuer.id.to_string()), ..of_admin(at, event, actor, None, bounds(issuer)) }
}

/// What an issuer key may mint, as it is shown and recorded.
pub fn bounds(issuer: &Issuer) -> Map<String, Value> {
    let usd = |cap: Option<crate::money::MicroUsd>| cap.map_or(Value::Null, |cap| cap.to_string().into());
    [
        ("name", Value::from(issuer.name.as_str())),
        ("label_prefix", Value::from(issuer.label_prefix.as_str())),
        (
            "allowed_endpoints",
            issuer.grants.iter().map(|grant| Value::from(grant.written.as_str())).collect(),
        ),
        ("constraints", written(&issuer.constraints)),
        ("max_usd_per_request", usd(issuer.per_request)),
        ("max_cap_usd", usd(issuer.max_cap)),
        ("daily_usd_cap", usd(issuer.daily)),
        ("total_usd_cap", usd(issuer.total)),
        ("daily_usd_out_cap", usd(issuer.daily_out)),
        ("max_expires_in_seconds", Value::from(issuer.max_expires_in_seconds)),
        ("idempotency", issuer.idempotency.as_deref().map_or(Value::Null, Value::from)),
        ("expires_at", Value::from(issuer.expires_at.to_string())),
    ]
    .into_iter()
    .map(|(name, value)| (name.to_owned(), value))
    .collect()
}

/// One event of an admin's doing.
pub fn of_admin(
    at: UnixMs,
    event: Event,
    actor: &str,
    key: Option<&Key>,
    detail: Map<String, Value>,
) -> Entry {
    Entry {
        at: at.to_string(),
        event,
        key_id: key.map(|key| key.id.to_string()),
        issuer_id: key.and_then(|key| key.issuer).map(|issuer| issuer.to_string()),
        label: key.map(|key| key.label.clone()),
        metadata: key.and_then(|key| object_of(&key.metadata)),
        actor: Some(actor.to_owned()),
        detail: (!detail.is_empty()).then_some(detail),
        ..Entry::default()
    }
}

/// Constraints as they are written.
pub fn written(constraints: &[Constraint]) -> Value {
    let rows = constraints.iter().map(|constraint| {
        let rule = match &constraint.rule {
            Rule::OneOf(values) => json!(values),
            Rule::Between { min, max } => {
                let bounds = [("min", min), ("max", max)].into_iter();
                Value::Object(
                    bounds
                        .filter_map(|(name, bound)| Some((name.to_owned(), Value::from((*bound)?))))
                        .collect(),
                )
            }
        };
        (constraint.param.clone(), rule)
    });
    Value::Object(rows.collect())
}
