//! From the JSON of `POST /admin/vault_keys` to a key, and from a key to JSON.

use serde_json::{Map, Value, json};

use crate::admin::fields::{Fields, invalid};
use crate::hold::Lane;
use crate::id::{IssuerId, KeyId};
use crate::issuer::Issuer;
use crate::key::{
    Caps, Constraint, EXPIRES_IN_SECONDS_MAX, Grant, Idempotency, Key, METADATA_PAIRS_MAX,
    REQUESTS_PER_SECOND_MAX, Rule,
};
use crate::ledger::entry::written;
use crate::money::MicroUsd;
use crate::refusal::Refusal;
use crate::secret::KeyDigest;
use crate::time::{SECOND_MS, UnixMs};
use crate::vendor::Vendor;
use crate::vendor::stripe::catalogue;
use crate::vendor::stripe::form::Params;
use crate::vendor::stripe::pricing::{Price, Terms};
use crate::vendor::stripe::request::holds_key;
use crate::vendor::stripe::rules::{self, Effect};

/// The longest life of an issuer key, in seconds: two years.
const ISSUER_EXPIRES_IN_SECONDS_MAX: u64 = 2 * 366 * 86_400;
/// Entries of `allowed_endpoints`.
const GRANTS_MAX: usize = 100;
/// Characters of a label, a scope, or a metadata value.
const TEXT_CHARS_MAX: usize = 500;
/// Fields of `idempotency_fields`.
const IDENTITY_FIELDS_MAX: usize = 10;
/// Days that answers may be remembered: longer than Stripe remembers keys.
const REMEMBER_DAYS: std::ops::RangeInclusive<u32> = 2..=400;
/// When a declined call is worth a new attempt, in seconds: up to 30 days.
const RETRY_DECLINED_AFTER_S: std::ops::RangeInclusive<u64> = 1..=2_592_000;
/// Constraints of one key, and values of one constraint.
const CONSTRAINTS_MAX: usize = 20;
/// Values that one constraint may list.
const CONSTRAINT_VALUES_MAX: usize = 1_000;
/// Connected accounts of one key.
const ACCOUNTS_MAX: usize = 100;

/// What a new key needs besides its policy.
#[derive(Clone, Copy, Debug)]
pub struct Birth {
    /// Its id.
    pub id: KeyId,
    /// The digest of its secret.
    pub digest: KeyDigest,
    /// Now.
    pub now: UnixMs,
    /// The default of `remember_days`.
    pub remember_days: u32,
    /// The default of `max_usd_per_request`: the issuer's.
    pub per_request: Option<MicroUsd>,
}

/// Reads a policy.
///
/// # Errors
/// `parameter_invalid`, naming the field.
pub fn key_of(body: &[u8], birth: Birth) -> Result<Key, Refusal> {
    let mut fields = Fields::parse(body)?;
    let label = text(&mut fields, "label")?.ok_or_else(|| invalid("label", "is missing"))?;
    let vendor: String = fields.need("vendor", "\"stripe\"")?;
    if Vendor::parse(&vendor).is_none() {
        return Err(invalid("vendor", "must be \"stripe\""));
    }
    let entries: Vec<String> =
        fields.need("allowed_endpoints", "a list of strings such as \"POST /v1/charges\"")?;
    let seconds: u64 = fields.need("expires_in_seconds", "a whole number of seconds")?;
    if !(1..=EXPIRES_IN_SECONDS_MAX).contains(&seconds) {
        return Err(invalid(
            "expires_in_seconds",
            format!("must be from 1 to {EXPIRES_IN_SECONDS_MAX} (31 days)"),
        ));
    }
    let caps = caps(&mut fields, birth.per_request)?;
    let grants = grants(&entries, &caps)?;
    let idempotency = idempotency(&mut fields)?;
    let remember_days =
        fields.take("remember_days", "a whole number of days")?.unwrap_or(birth.remember_days);
    if !REMEMBER_DAYS.contains(&remember_days) {
        return Err(invalid("remember_days", "must be from 2 to 400"));
    }
    let client_secrets = fields.take("client_secrets", "true or false")?.unwrap_or(false);
    let metadata = metadata(&mut fields)?;
    let constraints = constraints(&mut fields)?;
    let accounts = accounts(&mut fields)?;
    let budget = text(&mut fields, "budget")?;
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | ':' | '@');
    if budget.as_deref().is_some_and(|name| !name.chars().all(plain) || [".", ".."].contains(&name)) {
        return Err(invalid("budget", "may have letters, digits and - _ . : @ only: it is part of a path"));
    }
    let retry_declined_after_s = retry_declined_after_s(&mut fields, &idempotency)?;
    let requests_per_second = requests_per_second(&mut fields)?;
    let stop_budget_on_refusal = fields.take("stop_budget_on_refusal", "true or false")?.unwrap_or(false);
    if stop_budget_on_refusal && budget.is_none() {
        return Err(invalid("stop_budget_on_refusal", "needs a \"budget\""));
    }
    fields.finish()?;
    Ok(Key {
        id: birth.id,
        digest: birth.digest.0,
        label,
        vendor,
        grants,
        caps,
        idempotency,
        remember_days,
        client_secrets,
        metadata,
        created_at: birth.now,
        expires_at: birth.now.plus_millis(seconds.saturating_mul(SECOND_MS)),
        revoked_at: None,
        closed_at: None,
        issuer: None,
        budget,
        constraints,
        accounts,
        stop_budget_on_refusal,
        retry_declined_after_s,
        requests_per_second,
    })
}

fn retry_declined_after_s(fields: &mut Fields, idempotency: &Idempotency) -> Result<Option<u64>, Refusal> {
    let given: Option<u64> = fields.take("retry_declined_after_seconds", "a whole number of seconds")?;
    if given.is_some_and(|seconds| !RETRY_DECLINED_AFTER_S.contains(&seconds)) {
        return Err(invalid("retry_declined_after_seconds", "must be from 1 to 2592000 (30 days)"));
    }
    if given.is_some() && idempotency.minds_caller_key() {
        return Err(invalid("retry_declined_after_seconds", "needs \"idempotency\": \"content\""));
    }
    Ok(given)
}

fn requests_per_second(fields: &mut Fields) -> Result<Option<u32>, Refusal> {
    let given: Option<u32> = fields.take("requests_per_second", "a whole number")?;
    if given.is_some_and(|rate| !(1..=REQUESTS_PER_SECOND_MAX).contains(&rate)) {
        return Err(invalid("requests_per_second", format!("must be from 1 to {REQUESTS_PER_SECOND_MAX}")));
    }
    Ok(given)
}

/// Reads an issuer key's bounds.
///
/// # Errors
/// `parameter_invalid`, naming the field.
pub fn issuer_of(body: &[u8], id: IssuerId, digest: KeyDigest, now: UnixMs) -> Result<Issuer, Refusal> {
    let mut fields = Fields::parse(body)?;
    let name = text(&mut fields, "name")?.ok_or_else(|| invalid("name", "is missing"))?;
    let label_prefix =
        text(&mut fields, "label_prefix")?.ok_or_else(|| invalid("label_prefix", "is missing"))?;
    let entries: Vec<String> =
        fields.need("allowed_endpoints", "a list of strings such as \"POST /v1/charges\"")?;
    let daily = fields.dollars("daily_usd_cap")?;
    let total = fields.dollars("total_usd_cap")?;
    let daily_out = fields.dollars("daily_usd_out_cap")?;
    let max_cap = fields.dollars("max_cap_usd")?;
    let per_request = fields.dollars("max_usd_per_request")?;
    let caps = Caps { daily, per_request, daily_out, ..Caps::default() };
    let grants = grants(&entries, &caps)?;
    let max_expires_in_seconds: u64 =
        fields.take("max_expires_in_seconds", "a whole number of seconds")?.unwrap_or(EXPIRES_IN_SECONDS_MAX);
    let seconds: u64 = fields.need("expires_in_seconds", "a whole number of seconds")?;
    for (field, seconds, max) in [
        ("max_expires_in_seconds", max_expires_in_seconds, EXPIRES_IN_SECONDS_MAX),
        ("expires_in_seconds", seconds, ISSUER_EXPIRES_IN_SECONDS_MAX),
    ] {
        if !(1..=max).contains(&seconds) {
            return Err(invalid(field, format!("must be from 1 to {max}")));
        }
    }
    let idempotency: Option<String> =
        fields.take("idempotency", "\"required\", \"client\" or \"content\"")?;
    if idempotency.as_deref().is_some_and(|mode| !["required", "client", "content"].contains(&mode)) {
        return Err(invalid("idempotency", "must be \"required\", \"client\" or \"content\""));
    }
    let constraints = constraints(&mut fields)?;
    fields.finish()?;
    Ok(Issuer {
        id,
        digest: digest.0,
        name,
        label_prefix,
        grants,
        constraints,
        per_request,
        max_cap,
        daily,
        total,
        daily_out,
        max_expires_in_seconds,
        idempotency,
        created_at: now,
        expires_at: now.plus_millis(seconds.saturating_mul(SECOND_MS)),
        revoked_at: None,
    })
}

fn constraints(fields: &mut Fields) -> Result<Vec<Constraint>, Refusal> {
    #[derive(serde::Deserialize)]
    #[serde(untagged, deny_unknown_fields)]
    enum Written {
        OneOf(Vec<String>),
        Between { min: Option<u64>, max: Option<u64> },
    }
    let bad = |why: &str| Err(invalid("constraints", why));
    let kind = "an object of parameters, each with a list of strings or {\"min\", \"max\"}";
    let written: Vec<(String, Written)> = fields.object("constraints", kind)?;
    if written.len() > CONSTRAINTS_MAX {
        return bad("may have 20 entries");
    }
    let mut constraints = Vec::new();
    for (param, rule) in written {
        if !is_canonical_name(&param) {
            return bad("must name parameters such as \"customer\" or \"metadata[line_id]\"");
        }
        let rule = match rule {
            Written::OneOf(values) if values.is_empty() || values.len() > CONSTRAINT_VALUES_MAX => {
                return bad("must list 1 to 1000 values");
            }
            Written::OneOf(values) if param == "currency" => {
                Rule::OneOf(values.into_iter().map(|value| value.to_ascii_lowercase()).collect())
            }
            Written::OneOf(values) => Rule::OneOf(values),
            Written::Between { min: None, max: None } => return bad("must have a min, a max or both"),
            Written::Between { min: Some(min), max: Some(max) } if min > max => {
                return bad("has a min above its max");
            }
            Written::Between { min, max } => Rule::Between { min, max },
        };
        constraints.push(Constraint { param, rule });
    }
    Ok(constraints)
}

fn accounts(fields: &mut Fields) -> Result<Vec<String>, Refusal> {
    let accounts: Vec<String> = fields.take("accounts", "a list of acct_… ids")?.unwrap_or_default();
    let is_account = |account: &String| {
        account.strip_prefix("acct_").is_some_and(|rest| {
            !rest.is_empty()
                && rest.len() <= 100
                && rest.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
        })
    };
    if accounts.len() > ACCOUNTS_MAX || !accounts.iter().all(is_account) {
        return Err(invalid("accounts", "must be a list of at most 100 acct_… ids"));
    }
    Ok(accounts)
}

/// Whether a parameter is named as it is compared.
fn is_canonical_name(name: &str) -> bool {
    Params::parse(format!("{name}=x").as_bytes())
        .is_ok_and(|params| params.pairs().first().is_some_and(|(canonical, _)| canonical == name))
}

fn text(fields: &mut Fields, name: &str) -> Result<Option<String>, Refusal> {
    let text: Option<String> = fields.take(name, "a string")?;
    match text {
        Some(text) if text.is_empty() || text.chars().count() > TEXT_CHARS_MAX => {
            Err(invalid(name, format!("must have 1 to {TEXT_CHARS_MAX} characters")))
        }
        Some(text) if text.chars().any(char::is_control) => {
            Err(invalid(name, "must not have control characters"))
        }
        Some(text) if holds_key(&text) => {
            Err(invalid(name, "holds a key: it would be kept in the audit log"))
        }
        text => Ok(text),
    }
}

fn caps(fields: &mut Fields, per_request: Option<MicroUsd>) -> Result<Caps, Refusal> {
    if !fields.names("daily_usd_cap") {
        return Err(invalid(
            "daily_usd_cap",
            "is missing: dollars such as 32.99, or null for a key that moves no money or is \"uncapped\"",
        ));
    }
    let caps = Caps {
        daily: fields.dollars("daily_usd_cap")?,
        total: fields.dollars("total_usd_cap")?,
        per_request: fields.dollars("max_usd_per_request")?.or(per_request),
        daily_out: fields.dollars("daily_usd_out_cap")?,
        max_calls: fields.take("max_calls", "a whole number")?,
        uncapped: fields.take("uncapped", "true or false")?.unwrap_or(false),
    };
    if caps.uncapped && caps.daily.is_some() {
        return Err(invalid("uncapped", "contradicts a daily_usd_cap: leave one of them out"));
    }
    if caps.max_calls == Some(0) {
        return Err(invalid("max_calls", "must be 1 or more"));
    }
    Ok(caps)
}

fn grants(entries: &[String], caps: &Caps) -> Result<Vec<Grant>, Refusal> {
    let bad = |why: String| Err(invalid("allowed_endpoints", why));
    if entries.is_empty() || entries.len() > GRANTS_MAX {
        return bad(format!("must have 1 to {GRANTS_MAX} entries"));
    }
    let mut grants: Vec<Grant> = Vec::new();
    for (at, entry) in entries.iter().enumerate() {
        let Some((operation, wildcard)) = catalogue::named(entry) else {
            return bad(format!(
                "entry {at} names no known operation: write METHOD /v1/path, with {{id}} or * for an id"
            ));
        };
        let effect = match rules::effect(operation, caps, wildcard) {
            Ok(effect) => effect,
            Err(refusal) => {
                return bad(format!(
                    "entry {at} could never be called: {}",
                    refusal.message.trim_end_matches('.')
                ));
            }
        };
        refuse_without_cap(operation.template, effect, caps)?;
        if grants.iter().all(|grant| grant.operation != operation.template) {
            grants.push(Grant { operation: operation.template.to_owned(), written: entry.clone(), wildcard });
        }
    }
    Ok(grants)
}

/// An entry under which no call could ever be admitted is a mistake that should be told at once.
fn refuse_without_cap(template: &str, effect: Effect, caps: &Caps) -> Result<(), Refusal> {
    let absent = |cap: Option<MicroUsd>| !caps.uncapped && cap.is_none_or(|cap| cap == MicroUsd::ZERO);
    let Effect::Priced(price) = effect else { return Ok(()) };
    let over = |cap: MicroUsd| caps.per_request.is_some_and(|one| one > cap);
    let is_ceiling = |price: &Price| matches!(price.terms, Terms::Ceiling { .. }) && price.harmless.is_none();
    match price.lane {
        Lane::Out if absent(caps.daily_out) => Err(invalid(
            "daily_usd_out_cap",
            format!("is missing: without it no call of {template} could ever be admitted"),
        )),
        // All of it is held for each call, so it has to fit.
        Lane::In if is_ceiling(price) && [caps.daily, caps.total].iter().flatten().any(|cap| over(*cap)) => {
            Err(invalid(
                "max_usd_per_request",
                format!("is above a cap of this key, and {template} holds all of it for each call"),
            ))
        }
        // With harmless parameters alone such an operation moves no money.
        Lane::In if absent(caps.daily) && price.harmless.is_none() => Err(invalid(
            "daily_usd_cap",
            format!(
                "is null or zero: without it no call of {template} could ever be admitted (or say \"uncapped\")"
            ),
        )),
        Lane::In | Lane::Out => Ok(()),
    }
}

fn idempotency(fields: &mut Fields) -> Result<Idempotency, Refusal> {
    let mode: Option<String> = fields.take("idempotency", "\"required\", \"client\" or \"content\"")?;
    let scope = text(fields, "idempotency_scope")?;
    let named: Option<Vec<String>> = fields.take("idempotency_fields", "a list of parameter names")?;
    match mode.as_deref() {
        Some("content") => {
            let scope = scope.ok_or_else(|| {
                invalid(
                    "idempotency_scope",
                    "is missing: say what the calls are about, such as \"billing:2026-07\"",
                )
            })?;
            Ok(Idempotency::Content { scope, fields: identity_fields(named.unwrap_or_default())? })
        }
        None | Some("required" | "client") if scope.is_some() || named.is_some() => {
            let field = if scope.is_some() { "idempotency_scope" } else { "idempotency_fields" };
            Err(invalid(field, "needs \"idempotency\": \"content\""))
        }
        None | Some("required") => Ok(Idempotency::Required),
        Some("client") => Ok(Idempotency::Client),
        Some(_) => Err(invalid("idempotency", "must be \"required\", \"client\" or \"content\"")),
    }
}

fn identity_fields(fields: Vec<String>) -> Result<Vec<String>, Refusal> {
    let bad = |why: &str| Err(invalid("idempotency_fields", why));
    if fields.len() > IDENTITY_FIELDS_MAX {
        return bad("may have 10 entries");
    }
    for (at, field) in fields.iter().enumerate() {
        if !is_canonical_name(field) {
            return bad("must be parameter names such as \"customer\" or \"metadata[line_id]\"");
        }
        if fields.iter().skip(at + 1).any(|other| other == field) {
            return bad("names a parameter twice");
        }
    }
    Ok(fields)
}

fn metadata(fields: &mut Fields) -> Result<Vec<(String, String)>, Refusal> {
    let pairs = fields.object("metadata", "an object of strings")?;
    let too_long = |text: &String| text.is_empty() || text.chars().count() > TEXT_CHARS_MAX;
    if pairs.len() > METADATA_PAIRS_MAX || pairs.iter().any(|(name, value)| too_long(name) || too_long(value))
    {
        return Err(invalid(
            "metadata",
            format!("may have {METADATA_PAIRS_MAX} pairs of strings of 1 to {TEXT_CHARS_MAX} characters"),
        ));
    }
    if pairs.iter().any(|(name, value)| holds_key(name) || holds_key(value)) {
        return Err(invalid("metadata", "holds a key: it would be kept in the audit log"));
    }
    Ok(pairs)
}

/// A key's policy as JSON, without its secret and spend.
pub fn policy(key: &Key, now: UnixMs) -> Map<String, Value> {
    let usd = |cap: Option<MicroUsd>| cap.map_or(Value::Null, |cap| Value::from(cap.to_string()));
    let grants: Vec<&str> = key.grants.iter().map(|grant| grant.written.as_str()).collect();
    let (scope, fields) = match &key.idempotency {
        Idempotency::Content { scope, fields } => (Value::from(scope.as_str()), json!(fields)),
        Idempotency::Required | Idempotency::Client => (Value::Null, Value::Null),
    };
    let at = |at: Option<UnixMs>| at.map_or(Value::Null, |at| Value::from(at.to_string()));
    let metadata: Map<String, Value> =
        key.metadata.iter().map(|(name, value)| (name.clone(), Value::from(value.as_str()))).collect();
    let mut object = Map::new();
    let mut set = |name: &str, value: Value| object.insert(name.to_owned(), value);
    set("id", Value::from(key.id.to_string()));
    set("label", Value::from(key.label.as_str()));
    set("vendor", Value::from(key.vendor.as_str()));
    set("status", Value::from(key.status(now).as_str()));
    set("allowed_endpoints", json!(grants));
    set("daily_usd_cap", usd(key.caps.daily));
    set("total_usd_cap", usd(key.caps.total));
    set("max_usd_per_request", usd(key.caps.per_request));
    set("daily_usd_out_cap", usd(key.caps.daily_out));
    set("max_calls", key.caps.max_calls.map_or(Value::Null, Value::from));
    set("uncapped", Value::from(key.caps.uncapped));
    set("idempotency", Value::from(key.idempotency.as_str()));
    set("idempotency_scope", scope);
    set("idempotency_fields", fields);
    set("remember_days", Value::from(key.remember_days));
    let retry_declined =
        (!key.idempotency.minds_caller_key()).then(|| key.retry_declined_after_ms() / SECOND_MS);
    set("retry_declined_after_seconds", retry_declined.map_or(Value::Null, Value::from));
    set("requests_per_second", Value::from(key.rate()));
    set("client_secrets", Value::from(key.client_secrets));
    set("constraints", written(&key.constraints));
    set("accounts", json!(key.accounts));
    set("issuer", key.issuer.map_or(Value::Null, |issuer| Value::from(issuer.to_string())));
    set("budget", key.budget.as_deref().map_or(Value::Null, Value::from));
    set("stop_budget_on_refusal", Value::from(key.stop_budget_on_refusal));
    set("metadata", Value::Object(metadata));
    set("created_at", Value::from(key.created_at.to_string()));
    set("expires_at", Value::from(key.expires_at.to_string()));
    set("revoked_at", at(key.revoked_at));
    set("closed_at", at(key.closed_at));
    object
}
