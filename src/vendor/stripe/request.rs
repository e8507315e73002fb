//! From a request that was read in exactly one way to the intent that the ledger judges.

use std::sync::Arc;

use crate::call::{self, Estate, KeyBasis, UPSTREAM_KEY_PREFIX};
use crate::hold::{ExactRequest, Facts};
use crate::id::CallId;
use crate::intent::{Claim, Intent, Verb};
use crate::key::{Idempotency, Key};
use crate::money::{Currency, MicroUsd, Money, Rate, Rates, parse_amount};
use crate::refusal::{CapFigures, CapKind, Code, Refusal};
use crate::vendor::stripe::catalogue::Operation;
use crate::vendor::stripe::form::{self, Params};
use crate::vendor::stripe::lines;
use crate::vendor::stripe::pricing::{Answers, Price, Terms};
use crate::vendor::stripe::rules;
use crate::vendor::stripe::{METADATA_KEYS_MAX, STAMP_PARAM, VERSION_MAX, VERSION_MIN};

/// The longest idempotency key, in bytes, as at Stripe.
pub const IDEMPOTENCY_KEY_BYTES_MAX: usize = 255;

/// A request that was read, before it is judged.
#[derive(Clone, Debug)]
pub struct Reading<'a> {
    /// The operation.
    pub operation: &'static Operation,
    /// The ids in the path's slots.
    pub ids: Vec<String>,
    /// The path, without a mount.
    pub path: String,
    /// The parameters.
    pub params: Params,
    /// `Idempotency-Key`; an empty one is none.
    pub caller_key: Option<String>,
    /// `Stripe-Version`.
    pub version: Option<String>,
    /// `Stripe-Account`.
    pub account: Option<String>,
    /// Our id for the request.
    pub request_id: &'a str,
    /// What it says of where it comes from, for the records alone.
    pub context: Vec<(String, String)>,
}

impl Reading<'_> {
    /// What goes to Stripe, before a key is put on it.
    pub fn exact_request(&self) -> ExactRequest {
        ExactRequest {
            method: self.operation.method.to_owned(),
            path: self.path.clone(),
            params: self.params.pairs().to_vec(),
            version: self.version.clone(),
            account: self.account.clone(),
            idempotency_key: None,
        }
    }

    /// The id in the path's slot of this name: `customer` of `/v1/customers/{customer}`.
    pub fn slot(&self, name: &str) -> Option<&str> {
        let at = self.operation.slots().position(|slot| slot == name)?;
        self.ids.get(at).map(String::as_str)
    }
}

/// What an intent needs besides the request.
#[derive(Clone, Copy, Debug)]
pub struct Surroundings<'a> {
    /// Whose account and mode.
    pub estate: &'a Estate,
    /// The ledger's salt.
    pub salt: &'a [u8; 32],
    /// Whether objects are stamped.
    pub stamp: bool,
    /// An id for a call that can never be made again.
    pub lone_call: CallId,
    /// What other currencies count, and since when that is not known any more.
    pub exchange: &'a Exchange,
}

/// What other currencies count right now.
#[derive(Clone, Debug, Default)]
pub struct Exchange {
    /// The rates that hold.
    pub rates: Arc<Rates>,
    /// The date of a table that is too old to be used.
    pub stale: Option<String>,
}

/// Checks `Stripe-Version`: a release from the range that the catalogue stands for, and no preview.
///
/// # Errors
/// `parameter_invalid`.
pub fn check_version(version: &str) -> Result<(), Refusal> {
    let (date, name) = version.split_once('.').map_or((version, None), |(date, name)| (date, Some(name)));
    let digits = date.bytes().enumerate().all(|(at, byte)| match at {
        4 | 7 => byte == b'-',
        _ => byte.is_ascii_digit(),
    });
    let named =
        name.is_none_or(|name| !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_lowercase()));
    let released = date.len() == 10 && digits && named && name != Some("preview");
    if released && (VERSION_MIN..=VERSION_MAX).contains(&date) {
        return Ok(());
    }
    Err(Refusal::of_param(
        Code::ParameterInvalid,
        "Stripe-Version",
        format!(
            "Stripe-Version must be a release from {VERSION_MIN} to {VERSION_MAX}; previews are not supported."
        ),
    ))
}

/// Checks the caller's idempotency key against the mode of the vault key.
///
/// # Errors
/// `idempotency_key_required` or `parameter_invalid`.
pub fn check_caller_key(key: &Key, caller_key: Option<&str>) -> Result<(), Refusal> {
    match &key.idempotency {
        Idempotency::Required | Idempotency::Client => refuse_reserved_key(caller_key)?,
        // The caller's key is ignored, and not sent.
        Idempotency::Content { .. } => {}
    }
    match (&key.idempotency, caller_key) {
        (Idempotency::Content { .. } | Idempotency::Client, _) => Ok(()),
        (Idempotency::Required, Some(sent)) if !is_made_up(sent) => Ok(()),
        (Idempotency::Required, sent) => {
            let what = if sent.is_some() {
                "This call has an Idempotency-Key that the SDK made up at random"
            } else {
                "This call has no Idempotency-Key"
            };
            Err(Refusal::of_param(
                Code::IdempotencyKeyRequired,
                "Idempotency-Key",
                format!(
                    "{what}, so the next run of the same script would be a new charge. Two ways out: pass an \
                     idempotency key of your own, made from what is billed (for instance customer and period), or mint \
                     the vault key with \"idempotency\": \"content\" and an \"idempotency_scope\" and leave the script \
                     as it is."
                ),
            ))
        }
    }
}

/// Refuses a key that could be one of those that this program makes in `content` mode. They can be foreseen, so a caller
/// who could send one would bind it at Stripe to another request before its charge comes.
///
/// # Errors
/// `parameter_invalid`.
pub fn refuse_reserved_key(caller_key: Option<&str>) -> Result<(), Refusal> {
    match caller_key {
        Some(sent) if sent.starts_with(UPSTREAM_KEY_PREFIX) => Err(Refusal::of_param(
            Code::ParameterInvalid,
            "Idempotency-Key",
            format!("An Idempotency-Key may not start with {UPSTREAM_KEY_PREFIX}."),
        )),
        Some(_) | None => Ok(()),
    }
}

/// Whether a key has a shape that SDKs make up for each run: a UUID (Python, Java), `stripe-node-retry-…` (Node) or
/// nanoseconds with six characters (Go).
fn is_made_up(key: &str) -> bool {
    let lengths: Vec<usize> = key.split('-').map(str::len).collect();
    let uuid =
        lengths == [8, 4, 4, 4, 12] && key.bytes().all(|byte| byte == b'-' || byte.is_ascii_hexdigit());
    let go = key.split_once('_').is_some_and(|(nanos, tail)| {
        (15..=20).contains(&nanos.len())
            && nanos.bytes().all(|byte| byte.is_ascii_digit())
            && tail.len() == 6
            && tail.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-'))
    });
    uuid || go || key.starts_with("stripe-node-retry-")
}

/// What the records of a request say, money or not.
pub fn facts(reading: &Reading<'_>, key: &Key) -> Facts {
    let metadata = reading.params.pairs().iter().filter_map(|(name, value)| {
        let inner = name.strip_prefix("metadata[")?.strip_suffix(']')?;
        Some((showable(inner), showable(value)))
    });
    let customer = reading.params.get("customer").filter(|value| !value.is_empty());
    Facts {
        request_id: reading.request_id.to_owned(),
        method: reading.operation.method.to_owned(),
        endpoint: showable(&reading.path),
        // In content mode the caller's key is ignored, here too: an SDK made it up.
        idempotency_key: reading.caller_key.clone().filter(|_| key.idempotency.minds_caller_key()),
        customer: customer.map(showable),
        object_id: reading.ids.last().map(|id| showable(id)),
        stripe_metadata: metadata.take(METADATA_KEYS_MAX).collect(),
        context: reading.context.clone(),
    }
}

/// A text as a record may show it: without what could be a card number, an API key of Stripe's or ours, or the secret of
/// an object. Nobody means to write one into a log, and whoever sent it by mistake should not find it there.
pub fn showable(text: &str) -> String {
    // Most texts hold neither, and every record has some.
    let digits = text.bytes().filter(u8::is_ascii_digit).count();
    let shown = if digits < CARD_DIGITS_MIN { text.to_owned() } else { without_card_numbers(text) };
    if may_hold_key(&shown) { without_keys(&shown) } else { shown }
}

/// Whether a text holds what each of [`KEY_PREFIXES`] and [`OBJECT_SECRET_MARK`] holds.
fn may_hold_key(text: &str) -> bool {
    let bytes = text.as_bytes();
    bytes.windows(2).any(|pair| pair == b"k_" || pair == b"c_")
        || bytes.windows(3).any(|three| three == b"_se")
}

/// Whether a text holds what looks like a key or the secret of an object. Unlike digits that could be a card number, that
/// never happens by chance.
pub fn holds_key(text: &str) -> bool {
    without_keys(text) != text
}

/// Digits of a card number, at least and at most.
const CARD_DIGITS_MIN: usize = 13;
const CARD_DIGITS_MAX: usize = 19;
/// How keys begin.
const KEY_PREFIXES: &[&str] = &[
    "sk_live_", "sk_test_", "sk_org_", "rk_live_", "rk_test_", "vk_live_", "vk_test_", "ik_live_",
    "ik_test_", "whsec_",
];
/// Stands between an object's id and its secret.
const OBJECT_SECRET_MARK: &str = "_secret_";

/// Masks words that are keys.
fn without_keys(text: &str) -> String {
    let is_part = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(start) = rest.find(is_part) {
        let (before, word) = rest.split_at(start);
        let (word, after) = word.split_at(word.find(|c| !is_part(c)).unwrap_or(word.len()));
        let is_key =
            KEY_PREFIXES.iter().any(|prefix| word.starts_with(prefix)) || word.contains(OBJECT_SECRET_MARK);
        out.push_str(before);
        out.push_str(if is_key { "[key removed]" } else { word });
        rest = after;
    }
    out + rest
}

/// Masks digit runs that could be a card number.
fn without_card_numbers(text: &str) -> String {
    let is_part = |c: char| c.is_ascii_digit() || c == ' ' || c == '-';
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(start) = rest.find(|c: char| c.is_ascii_digit()) {
        let (before, run) = rest.split_at(start);
        let end = run.find(|c| !is_part(c)).unwrap_or(run.len());
        let (run, after) = run.split_at(end);
        out.push_str(before);
        let digits: Vec<u32> = run.chars().filter_map(|c| c.to_digit(10)).collect();
        let masked = (CARD_DIGITS_MIN..=CARD_DIGITS_MAX).contains(&digits.len()) && luhn(&digits);
        out.push_str(if masked { "[card number removed]" } else { run });
        rest = after;
    }
    out + rest
}

fn luhn(digits: &[u32]) -> bool {
    let sum: u32 = digits
        .iter()
        .rev()
        .enumerate()
        .map(|(at, digit)| match (at % 2, digit * 2) {
            (0, _) => *digit,
            (_, doubled) if doubled > 9 => doubled - 9,
            (_, doubled) => doubled,
        })
        .sum();
    sum.is_multiple_of(10)
}

/// Builds the intent of a money call. `priced` is `None` for an operation whose price nobody knows.
///
/// # Errors
/// The refusals that the request alone decides: amounts, currency, identity.
pub fn intent(
    reading: &Reading<'_>,
    priced: Option<&'static Price>,
    key: &Key,
    around: Surroundings<'_>,
) -> Result<Intent, Refusal> {
    let params = &reading.params;
    let claim = match priced {
        Some(price) => claim(price, reading, key, around.exchange)?,
        None => Claim::Unpriced { object: reading.ids.first().cloned() },
    };
    let account = reading.account.as_deref().unwrap_or_default();
    let open_constraints = rules::keep_constraints(reading, key, rules::Effect::of(priced))?;
    let (identity, basis) = identity(reading, priced, key, around)?;
    let compared: Vec<_> =
        params.pairs().iter().filter(|(name, _)| form::base(name) != "expand").cloned().collect();
    let (fingerprint, digests) =
        call::fingerprint(around.salt, reading.operation.template, &reading.path, account, &compared);
    let metadata = params.pairs().iter().filter(|(name, _)| form::base(name) == "metadata").count();
    let takes_stamp = priced.is_some_and(|price| price.stamp);
    // `metadata=` stands for no metadata at all, and cannot stand beside an entry.
    let has_room = metadata < METADATA_KEYS_MAX && params.get("metadata").is_none();
    let stamped = around.stamp && takes_stamp && has_room;
    let mut facts = facts(reading, key);
    if let (None, Some(Terms::Return(of))) = (&facts.object_id, priced.map(|price| &price.terms)) {
        facts.object_id = params.first_of(of).map(|(_, object)| showable(object));
    }
    Ok(Intent {
        operation: reading.operation.template.to_owned(),
        claim,
        identity,
        basis,
        fingerprint,
        params: digests,
        request: reading.exact_request(),
        stamp_param: stamped.then(|| STAMP_PARAM.to_owned()),
        facts,
        estate: around.estate.clone(),
        open_constraints,
        rates: Arc::clone(&around.exchange.rates),
        seen: None,
        payable_after_decline: priced.is_some_and(|price| stays_payable(price, key)),
        read_against: None,
        pin: priced.and_then(|price| price.pin).map(str::to_owned),
    })
}

fn claim(price: &Price, reading: &Reading<'_>, key: &Key, exchange: &Exchange) -> Result<Claim, Refusal> {
    let params = &reading.params;
    let object = reading.ids.first().cloned();
    Ok(match &price.terms {
        Terms::Named => match lines::named_amount(price, params)? {
            Some((minor, name)) => {
                let of_price = name.starts_with("price_data[");
                let in_currency =
                    if of_price { "price_data[currency]" } else { price.currency.unwrap_or("currency") };
                let (currency, rate) = currency(params, in_currency, exchange)?;
                on_step(minor, currency, price, name)?;
                Claim::Create { lane: price.lane, money: Money { minor, currency }, rate }
            }
            None => ceiling(price, reading, key, exchange)?,
        },
        Terms::Use(verb) => {
            let minor = price.amount.map(|name| amount(params, name)).transpose()?.flatten();
            if minor.is_none() && *verb == Verb::Increment {
                return Err(missing(price.amount.unwrap_or("amount")));
            }
            // What else changes the amount of an item (a quantity, a price, a tax) does not tell the new one.
            if price.answers == Answers::InvoiceItem {
                match minor {
                    None => return ceiling(price, reading, key, exchange),
                    Some(_) => lines::amount_alone(params)?,
                }
            }
            Claim::Use {
                object: object.unwrap_or_default(),
                verb: *verb,
                minor,
                currency: price.currency.and_then(|name| params.get(name)).map(code).transpose()?,
                no_more: *verb == Verb::Capture && params.get("final_capture") != Some("false"),
                always_read: price.always_read,
            }
        }
        Terms::Return(of) => {
            let minor = price.amount.map(|name| amount(params, name)).transpose()?.flatten();
            Claim::Return { of: returned(of, reading)?, minor }
        }
        Terms::Ceiling { .. } => ceiling(price, reading, key, exchange)?,
    })
}

/// Whether a declined object can still be paid without a call through here: an invoice by Stripe itself or on its page, an
/// intent by whoever holds its secret.
fn stays_payable(price: &Price, key: &Key) -> bool {
    price.answers == Answers::Invoice || (price.answers == Answers::Intent && key.client_secrets)
}

/// What the key says that one call may cost, for a call that does not say so itself. What its lines do name is the least
/// that it costs, and has to fit.
fn ceiling(price: &Price, reading: &Reading<'_>, key: &Key, exchange: &Exchange) -> Result<Claim, Refusal> {
    let Some(usd) = key.caps.per_request else {
        let exact = key.grant_for(reading.operation.template).is_some_and(|grant| !grant.wildcard);
        if key.is_uncapped() && exact {
            return Ok(Claim::Unpriced { object: reading.ids.first().cloned() });
        }
        return Err(match price.amount {
            Some(name) => missing(name),
            None => Refusal::new(
                Code::AmountUnknown,
                "This key has no max_usd_per_request to hold for this call.",
            ),
        });
    };
    let least = lines::least(&reading.params, exchange)?;
    if least > usd {
        return Err(Refusal::over_cap(CapFigures {
            cap: CapKind::PerRequest,
            limit: usd,
            spent: MicroUsd::ZERO,
            held: MicroUsd::ZERO,
            requested: least,
            resets_at: None,
        }));
    }
    let on_its_hold = match price.terms {
        Terms::Ceiling { on_hold } => on_hold,
        Terms::Use(_) => true,
        Terms::Named | Terms::Return(_) => false,
    };
    let object = reading.ids.first().cloned().filter(|_| price.terms != Terms::Named);
    // A row of its own says so; a new price of an item replaces the old one.
    let always_read = price.always_read && on_its_hold;
    Ok(Claim::Ceiling { object, usd, on_its_hold, always_read })
}

/// The object whose money goes back.
fn returned(of: &[&'static str], reading: &Reading<'_>) -> Result<String, Refusal> {
    if of.is_empty() {
        return Ok(reading.ids.first().cloned().unwrap_or_default());
    }
    let given: Vec<&str> =
        of.iter().filter_map(|name| reading.params.get(name).filter(|value| !value.is_empty())).collect();
    if let [object] = given.as_slice() {
        return Ok((*object).to_owned());
    }
    let first = of.first().copied().unwrap_or("charge");
    Err(invalid(first, &format!("must be given alone: exactly one of '{}'", of.join("' and '"))))
}

/// Refuses an amount that is finer than Stripe takes in its currency.
fn on_step(minor: u64, currency: Currency, price: &Price, name: &str) -> Result<(), Refusal> {
    let step = currency.step(price.answers == Answers::Payout);
    if minor.is_multiple_of(step) {
        return Ok(());
    }
    Err(invalid(name, &format!("must be a multiple of {step} in this currency")))
}

pub(super) fn amount(params: &Params, name: &str) -> Result<Option<u64>, Refusal> {
    match params.get(name) {
        None => Ok(None),
        Some(text) => parse_amount(text).map(Some).ok_or_else(|| {
            invalid(name, "must be a whole number in the currency's smallest unit, such as 2999 for $29.99")
        }),
    }
}

pub(super) fn required_amount(params: &Params, name: &str) -> Result<u64, Refusal> {
    amount(params, name)?.ok_or_else(|| missing(name))
}

fn missing(name: &str) -> Refusal {
    invalid(name, "is missing, so the cost of this call is not known")
}

pub(super) fn currency(
    params: &Params,
    name: &str,
    exchange: &Exchange,
) -> Result<(Currency, Rate), Refusal> {
    let currency = code(params.get(name).ok_or_else(|| invalid(name, "is missing"))?)?;
    exchange.rates.of(currency).map(|rate| (currency, rate)).ok_or_else(|| {
        let why = match &exchange.stale {
            Some(as_of) => format!("The rates of other currencies than USD are too old (as of {as_of})."),
            None => "Only amounts in USD, and in currencies with a rate in KEYBRAKE_FX_FILE, can be counted against \
                     a cap."
                .to_owned(),
        };
        Refusal::of_param(Code::CurrencyNotAllowed, name, why)
    })
}

fn code(text: &str) -> Result<Currency, Refusal> {
    Currency::parse(text).ok_or_else(|| invalid("currency", "must be a three-letter ISO code"))
}

pub(super) fn invalid(param: &str, why: &str) -> Refusal {
    Refusal::of_param(Code::ParameterInvalid, param, format!("'{param}' {why}."))
}

fn identity(
    reading: &Reading<'_>,
    priced: Option<&Price>,
    key: &Key,
    around: Surroundings<'_>,
) -> Result<(crate::id::Identity, KeyBasis), Refusal> {
    let (scope, fields) = match (&key.idempotency, &reading.caller_key) {
        (Idempotency::Content { scope, fields }, _) => (scope, fields),
        (Idempotency::Required | Idempotency::Client, Some(sent)) => {
            let identity = call::identity_of_caller_key(around.estate, sent);
            return Ok((identity, KeyBasis::Caller(sent.clone())));
        }
        (Idempotency::Required | Idempotency::Client, None) => {
            return Ok((call::identity_of_lone_call(around.lone_call), KeyBasis::Absent));
        }
    };
    let mut values: Vec<(&str, &str)> = reading.ids.iter().map(|id| ("", id.as_str())).collect();
    if fields.is_empty() {
        values.extend(default_identity(reading, priced)?);
    }
    for field in fields {
        let value = reading.params.get(field).filter(|value| !value.is_empty());
        let value = value.ok_or_else(|| {
            invalid(field, "is one of the key's idempotency_fields, so it must be given and not be empty")
        })?;
        values.push((field, value));
    }
    let identity = call::identity_of_content(
        around.estate,
        reading.operation.template,
        reading.account.as_deref().unwrap_or_default(),
        scope,
        &values,
    );
    Ok((identity, KeyBasis::Content))
}

/// The payer or object of an operation; nothing more where the object is in the path.
fn default_identity<'a>(
    reading: &'a Reading<'_>,
    priced: Option<&Price>,
) -> Result<Option<(&'static str, &'a str)>, Refusal> {
    if !reading.ids.is_empty() {
        return Ok(None);
    }
    let candidates: &[&'static str] = match priced.map(|price| (&price.terms, price.payer.as_slice())) {
        Some((Terms::Return(of), _)) => of,
        Some((Terms::Named | Terms::Use(_) | Terms::Ceiling { .. }, payer)) if !payer.is_empty() => payer,
        Some(_) | None => &["customer"],
    };
    reading.params.first_of(candidates).map(Some).ok_or_else(|| {
        let first = candidates.first().copied().unwrap_or("customer");
        invalid(first, "tells one call from another in content mode, so it must be given and not be empty")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_that_sdks_make_up_are_known() {
        for key in [
            "0b9f3f0e-8f4b-4b0e-9c2a-2f6f8f1f3a11",
            "0B9F3F0E-8F4B-4B0E-9C2A-2F6F8F1F3A11",
            "stripe-node-retry-0b9f3f0e-8f4b-4b0e-9c2a-2f6f8f1f3a11",
            "1763945123456789012_aB3-_z",
        ] {
            assert!(is_made_up(key), "{key}");
        }
        for key in [
            "0b9f3f0e8f4b4b0e9c2a2f6f8f1f3a11",
            "cus_9:2026-07",
            "20260701_cus_9a",
            "order-17",
            "1763945_abc",
        ] {
            assert!(!is_made_up(key), "{key}");
        }
    }

    #[test]
    fn versions_are_releases_in_range() {
        for version in ["2020-08-27", "2026-10-28.endive", "2024-06-20", "2025-03-31.basil"] {
            assert!(check_version(version).is_ok(), "{version}");
        }
        for version in [
            "2020-08-26",
            "2026-10-29",
            "2026-10-28.preview",
            "2026-09-30.preview; feature_beta=v1",
            "2017-04-06",
            "",
            "latest",
            "2024-6-20",
            "2024-06-20.",
            "2024-06-20.A",
        ] {
            assert!(check_version(version).is_err(), "{version}");
        }
    }

    #[test]
    fn keys_do_not_reach_a_record() {
        for (text, shown) in [
            ("/v1/charges/sk_live_abc123", "/v1/charges/[key removed]"),
            ("use vk_test_0, please", "use [key removed], please"),
            ("pi_1_secret_abc", "[key removed]"),
            ("task_test_7", "task_test_7"),
            ("cus_9", "cus_9"),
            ("ch_1/refunds?x", "ch_1/refunds?x"),
        ] {
            assert_eq!(showable(text), shown);
        }
    }

    #[test]
    fn the_quick_look_passes_no_key_over() {
        for mark in KEY_PREFIXES.iter().chain([&OBJECT_SECRET_MARK]) {
            assert!(may_hold_key(mark), "{mark}");
        }
    }

    #[test]
    fn card_numbers_do_not_reach_a_record() {
        assert_eq!(without_card_numbers("card 4242 4242 4242 4242!"), "card [card number removed]!");
        assert_eq!(without_card_numbers("4242424242424242"), "[card number removed]");
        assert_eq!(without_card_numbers("order 20260701-17, 4242"), "order 20260701-17, 4242");
        assert_eq!(without_card_numbers("plain"), "plain");
    }
}
