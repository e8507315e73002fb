//! What one of Stripe's answers says about money.

use crate::call::{Reading, Record};
use crate::money::{Currency, Money, Rates};
use crate::time::UnixMs;
use crate::vendor::stripe::form;
use crate::vendor::stripe::json::{self, Value};
use crate::vendor::stripe::object::{Look, Source, amount, amount_or, is_id, reference, text};
use crate::vendor::stripe::pricing::Answers;

/// An answer, as far as it matters here.
#[derive(Clone, Copy, Debug)]
pub struct Answer<'a> {
    /// The status.
    pub status: u16,
    /// The body.
    pub body: &'a [u8],
}

/// What was held for a call, as far as its answer is read against it.
#[derive(Clone, Copy, Debug)]
pub struct Expected<'a> {
    /// What a 2xx answers with.
    pub answers: Answers,
    /// What is held.
    pub held: Money,
    /// Whether that is only what the key allows for one call, in dollars, whatever the object is in.
    pub is_ceiling: bool,
    /// What other currencies count, for an answer that is in another one than is held.
    pub rates: &'a Rates,
    /// What was sent.
    pub params: &'a [(String, String)],
    /// When it was sent, at the earliest.
    pub asked_at: UnixMs,
}

/// What an answer to a money call says, and the objects that it names, the main one first.
///
/// `expected` is `None` for a call whose price is not known. `more` is the body of the read that [`follow`] asked for.
pub fn read(
    answer: Answer<'_>,
    expected: Option<Expected<'_>>,
    more: Option<&[u8]>,
) -> (Reading, Vec<String>) {
    let body = json::read(answer.body);
    match answer.status {
        200..=299 => body.map_or((UNCLEAR, Vec::new()), |body| read_object(&body, expected, more)),
        402 => (Reading::Declined, body.as_ref().map(declined_objects).unwrap_or_default()),
        400 | 404 if body.as_ref().is_some_and(is_key_mismatch) => (Reading::KeyMismatch, Vec::new()),
        401 => (Reading::OwnKeyRefused, Vec::new()),
        403 if body.as_ref().is_some_and(is_about_own_key) => (Reading::OwnKeyRefused, Vec::new()),
        400 | 403 | 404 if body.is_some() => (Reading::Invalid, Vec::new()),
        429 => (Reading::Throttled, Vec::new()),
        500..=599 => (Reading::Unclear { is_5xx: true }, Vec::new()),
        // 409, 424, whatever has no meaning here, and errors that cannot be read.
        _ => (UNCLEAR, Vec::new()),
    }
}

/// What has to be read besides an answer to know how much moved: the latest invoice of a subscription.
pub fn follow(answer: Answer<'_>, answers: Answers) -> Option<Look> {
    let is_billed = matches!(answers, Answers::NewSubscription | Answers::Subscription);
    if !is_billed || !(200..300).contains(&answer.status) {
        return None;
    }
    let body = json::read(answer.body)?;
    let invoice = body.get("latest_invoice").and_then(Value::as_str)?;
    is_id(invoice).then(|| Source::Invoice.look(invoice))
}

/// Whether an answer to a call that moves no money turns the sidecar's own key away.
pub fn refuses_own_key(answer: Answer<'_>) -> bool {
    match answer.status {
        401 => true,
        403 => json::read(answer.body).as_ref().is_some_and(is_about_own_key),
        _ => false,
    }
}

/// What the answer to a call that ends something says of it when it is final: the object, its record, and the currency of
/// what moved.
pub fn ended(answer: Answer<'_>, answers: Answers) -> Option<(String, Record, Option<Currency>)> {
    let body = json::read(answer.body).filter(|_| answer.status == 200)?;
    let id = text(&body, "id")?.to_owned();
    if text(&body, "object") != Some(answers.object()) {
        return None;
    }
    let deleted = body.get("deleted").and_then(Value::as_bool) == Some(true);
    let status = text(&body, "status").unwrap_or_default();
    let moved = match (answers, status) {
        (Answers::Intent, "canceled") => amount(&body, "amount_received")?,
        (Answers::Invoice, "void") => amount(&body, "amount_paid")?,
        (Answers::CheckoutSession, "expired") if !is_recoverable(&body) => 0,
        (Answers::Payout | Answers::Refund, "canceled") => 0,
        (Answers::Invoice | Answers::InvoiceItem, _) if deleted => 0,
        _ => return None,
    };
    let record = if moved == 0 { Record::Ended } else { Record::Moved { minor: moved } };
    Some((id, record, text(&body, "currency").and_then(Currency::parse)))
}

const UNCLEAR: Reading = Reading::Unclear { is_5xx: false };
/// Money may move, and the answer does not say how much: all that is held stays held.
const STAYS_HELD: Reading = Reading::Pending { minor: 0 };

fn read_object(
    body: &Value<'_>,
    expected: Option<Expected<'_>>,
    more: Option<&[u8]>,
) -> (Reading, Vec<String>) {
    let Some(id) = text(body, "id") else { return (UNCLEAR, Vec::new()) };
    let mut objects = vec![id.to_owned()];
    let Some(expected) = expected else { return (Reading::Moved { minor: 0 }, objects) };
    let Expected { answers, held, is_ceiling, rates, params, asked_at } = expected;
    if text(body, "object") != Some(answers.object()) {
        return (UNCLEAR, objects);
    }
    let currency = text(body, "currency").and_then(Currency::parse);
    // Only of what nobody could price before may the currency be another one than was held.
    if currency != Some(held.currency) && !is_ceiling {
        return (UNCLEAR, objects);
    }
    let reading = match answers {
        Answers::Charge => read_charge(body),
        Answers::ChargeRefund => {
            // The charge stays the object of the hold that made it.
            objects.clear();
            amount(body, "amount_refunded")
                .filter(|refunded| *refunded >= held.minor)
                .map(|_| Reading::Moved { minor: held.minor })
        }
        Answers::Intent => {
            objects.extend(reference(body, "latest_charge"));
            read_intent(body)
        }
        Answers::Refund => read_refund(body),
        Answers::Invoice => read_invoice(body),
        Answers::InvoiceItem => Some(Reading::Pending { minor: positive(body, "amount") }),
        Answers::NewSubscription => Some(read_new_subscription(body, more, params)),
        Answers::Subscription => Some(read_changed_subscription(body, more, asked_at)),
        Answers::Transfer | Answers::TransferReversal => {
            amount(body, "amount").map(|minor| Reading::Moved { minor })
        }
        Answers::Payout => read_payout(body),
        Answers::BalanceTransaction => Some(Reading::Moved { minor: positive(body, "amount") }),
        Answers::CheckoutSession => Some(read_session(body)),
        Answers::LineItem => {
            // What it was about is its invoice.
            objects.clear();
            Some(STAYS_HELD)
        }
        Answers::SubscriptionItem | Answers::SubscriptionSchedule => Some(STAYS_HELD),
    };
    let reading = reading.unwrap_or(UNCLEAR);
    match currency {
        Some(currency) if currency != held.currency => (exchanged(&reading, currency, held, rates), objects),
        Some(_) => (reading, objects),
        None => (STAYS_HELD, objects),
    }
}

/// The same in the currency that is held. What cannot be counted is more than was held, for all that is known.
fn exchanged(reading: &Reading, currency: Currency, held: Money, rates: &Rates) -> Reading {
    let (Reading::Moved { minor } | Reading::Pending { minor }) = reading else { return reading.clone() };
    match (exchange(Money { minor: *minor, currency }, held.currency, rates), reading) {
        (None, _) => Reading::Pending { minor: held.minor.saturating_add(1) },
        (Some(minor), Reading::Moved { .. }) => Reading::Moved { minor },
        (Some(minor), _) => Reading::Pending { minor },
    }
}

/// What money counts in another currency, rounded up; `None` where a rate is missing.
pub(super) fn exchange(money: Money, currency: Currency, rates: &Rates) -> Option<u64> {
    if money.currency == currency || money.minor == 0 {
        return Some(money.minor);
    }
    rates.of(currency)?.minor(rates.of(money.currency)?.usd(money.minor)?)
}

/// An invoice tells all that was ever paid for it. What is due stands in for what remains, where that is missing.
fn read_invoice(invoice: &Value<'_>) -> Option<Reading> {
    let paid = amount(invoice, "amount_paid")?;
    let due = paid.checked_add(amount_or(invoice, "amount_remaining", "amount_due")?)?;
    Some(match text(invoice, "status")? {
        // Nobody collects a draft that does not advance by itself; who finalizes or pays it is asked then.
        "draft" if invoice.get("auto_advance").and_then(Value::as_bool) == Some(false) => {
            Reading::Moved { minor: 0 }
        }
        "draft" => Reading::Pending { minor: due.max(amount(invoice, "amount_due")?) },
        "open" | "uncollectible" => Reading::Pending { minor: due },
        "void" if paid == 0 => Reading::NotMoved,
        "paid" | "void" => Reading::Moved { minor: paid },
        _ => return None,
    })
}

/// Parameters that put off what is billed first.
const DEFERRING_PARAMS: &[&str] = &[
    "backdate_start_date",
    "billing_cycle_anchor",
    "billing_cycle_anchor_config",
    "proration_behavior",
    "trial_end",
    "trial_from_plan",
    "trial_period_days",
];
/// How far Stripe's clock may be behind ours.
const CLOCKS_APART_MS: u64 = 120_000;

/// Only a first invoice that is paid is final, when it bills the whole first period: anything else is billed later.
fn read_new_subscription(
    subscription: &Value<'_>,
    more: Option<&[u8]>,
    params: &[(String, String)],
) -> Reading {
    let is_deferred = params.iter().any(|(name, _)| DEFERRING_PARAMS.contains(&form::base(name)));
    // Found late, its latest invoice may be that of a later period.
    let is_first = |invoice: &Value<'_>| {
        text(invoice, "billing_reason").is_none_or(|reason| reason == "subscription_create")
    };
    let paid = latest_invoice(subscription, more)
        .filter(|invoice| text(invoice, "status") == Some("paid") && is_first(invoice))
        .and_then(|invoice| amount(&invoice, "amount_paid"));
    match (text(subscription, "status"), paid) {
        (Some("active"), Some(minor)) if minor > 0 && !is_deferred => Reading::Moved { minor },
        (Some("incomplete_expired"), _) => Reading::NotMoved,
        _ => STAYS_HELD,
    }
}

/// What a change billed at once counts, and what it bills later stays held; an invoice from before is none of it.
fn read_changed_subscription(subscription: &Value<'_>, more: Option<&[u8]>, asked_at: UnixMs) -> Reading {
    let is_from_before = |invoice: &Value<'_>| {
        let created = invoice.get("created").and_then(Value::as_u64);
        created.is_some_and(|created| {
            created.saturating_mul(1_000).saturating_add(CLOCKS_APART_MS) < asked_at.millis()
        })
    };
    let billed = latest_invoice(subscription, more).filter(|invoice| !is_from_before(invoice));
    let of = |field| billed.as_ref().and_then(|invoice| amount(invoice, field)).unwrap_or(0);
    Reading::Pending { minor: of("amount_due").max(of("amount_paid")) }
}

fn latest_invoice<'a>(subscription: &Value<'a>, more: Option<&'a [u8]>) -> Option<Value<'a>> {
    let read = more.and_then(json::read);
    read.or_else(|| subscription.get("latest_invoice").cloned())
        .filter(|invoice| text(invoice, "object") == Some("invoice"))
}

fn read_payout(payout: &Value<'_>) -> Option<Reading> {
    // One that takes back another is told as a negative amount.
    let minor = payout.get("amount").and_then(Value::as_i64).map(i64::unsigned_abs)?;
    Some(match text(payout, "status")? {
        "paid" => Reading::Moved { minor },
        "pending" | "in_transit" => Reading::Pending { minor },
        "failed" | "canceled" => Reading::NotMoved,
        _ => return None,
    })
}

fn read_session(session: &Value<'_>) -> Reading {
    let total = amount(session, "amount_total").unwrap_or(0);
    match (text(session, "status"), text(session, "payment_status"), text(session, "mode")) {
        (Some("expired"), _, _) if !is_recoverable(session) => Reading::NotMoved,
        (_, Some("paid"), Some("payment")) => Reading::Moved { minor: total },
        (_, _, Some("setup")) => Reading::Moved { minor: 0 },
        // The customer pays later, in a browser.
        _ => Reading::Pending { minor: total },
    }
}

/// Whether an expired session can be opened anew under an address of its own.
pub(super) fn is_recoverable(session: &Value<'_>) -> bool {
    session
        .get("after_expiration")
        .and_then(|after| after.get("recovery"))
        .is_some_and(|recovery| !recovery.is_null())
}

fn positive(object: &Value<'_>, field: &str) -> u64 {
    amount(object, field).unwrap_or(0)
}

fn read_charge(charge: &Value<'_>) -> Option<Reading> {
    let whole = amount(charge, "amount")?;
    Some(match (text(charge, "status")?, charge.get("captured").and_then(Value::as_bool)) {
        ("succeeded", Some(true)) => {
            // Stripe's own fixtures show 0 in `amount_captured` of a captured charge.
            let captured = amount(charge, "amount_captured").filter(|captured| *captured > 0);
            Reading::Moved { minor: captured.unwrap_or(whole) }
        }
        ("succeeded", Some(false)) | ("pending", _) => Reading::Pending { minor: whole },
        ("failed", _) => Reading::NotMoved,
        _ => return None,
    })
}

fn read_intent(intent: &Value<'_>) -> Option<Reading> {
    let whole = amount(intent, "amount")?;
    Some(match text(intent, "status")? {
        "succeeded" => Reading::Moved { minor: amount(intent, "amount_received")? },
        "canceled" => match amount(intent, "amount_received")? {
            0 => Reading::NotMoved,
            minor => Reading::Moved { minor },
        },
        "processing"
        | "requires_action"
        | "requires_capture"
        | "requires_confirmation"
        | "requires_payment_method" => Reading::Pending { minor: whole },
        _ => return None,
    })
}

fn read_refund(refund: &Value<'_>) -> Option<Reading> {
    let whole = amount(refund, "amount")?;
    Some(match text(refund, "status")? {
        "succeeded" => Reading::Moved { minor: whole },
        "pending" | "requires_action" => Reading::Pending { minor: whole },
        "failed" | "canceled" => Reading::NotMoved,
        _ => return None,
    })
}

/// A declined payment intent exists, and can be confirmed again; so does a failed charge.
fn declined_objects(body: &Value<'_>) -> Vec<String> {
    let error = body.get("error");
    let intent = error.and_then(|error| reference(error, "payment_intent"));
    let charge = error.and_then(|error| reference(error, "charge"));
    intent.into_iter().chain(charge).collect()
}

fn is_key_mismatch(body: &Value<'_>) -> bool {
    body.get("error").and_then(|error| text(error, "type")) == Some("idempotency_error")
}

/// Stripe says "The provided key … does not have the required permissions" of a restricted key; any other 403 is about
/// the resource.
fn is_about_own_key(body: &Value<'_>) -> bool {
    let message = body.get("error").and_then(|error| text(error, "message")).unwrap_or_default();
    message.starts_with("The provided key") || message.contains("required permissions")
}

#[cfg(test)]
mod tests {
    use std::sync::LazyLock;

    use super::*;
    use crate::money::Rate;

    fn held_for(answers: Answers) -> Expected<'static> {
        static NONE: LazyLock<Rates> = LazyLock::new(Rates::default);
        Expected {
            answers,
            held: Money { minor: 100, currency: Currency::USD },
            is_ceiling: false,
            rates: &NONE,
            params: &[],
            asked_at: UnixMs::from_millis(1_000_000_000),
        }
    }

    /// Read as what the body says it is.
    fn reading(status: u16, body: &str) -> Reading {
        let read_body = json::read(body.as_bytes()).unwrap_or(Value::Null);
        let object = text(&read_body, "object").unwrap_or_default();
        let answers = Answers::read(object).unwrap_or(Answers::Charge);
        read(Answer { status, body: body.as_bytes() }, Some(held_for(answers)), None).0
    }

    #[test]
    fn answers_say_what_they_say() {
        let pending = |minor| Reading::Pending { minor };
        let moved = |minor| Reading::Moved { minor };
        let charge =
            |rest: &str| format!(r#"{{"object":"charge","id":"ch_1","currency":"usd","amount":100,{rest}}}"#);
        let intent = |rest: &str| {
            format!(r#"{{"object":"payment_intent","id":"pi_1","currency":"usd","amount":100,{rest}}}"#)
        };
        let refund =
            |rest: &str| format!(r#"{{"object":"refund","id":"re_1","currency":"usd","amount":100,{rest}}}"#);
        for (status, body, expected) in [
            (200, charge(r#""status":"succeeded","captured":true,"amount_captured":100"#), moved(100)),
            (200, charge(r#""status":"succeeded","captured":true,"amount_captured":60"#), moved(60)),
            (200, charge(r#""status":"succeeded","captured":true,"amount_captured":0"#), moved(100)),
            (200, charge(r#""status":"succeeded","captured":false"#), pending(100)),
            (200, charge(r#""status":"pending","captured":true"#), pending(100)),
            (200, charge(r#""status":"failed","captured":false"#), Reading::NotMoved),
            (200, charge(r#""status":"sideways","captured":true"#), UNCLEAR),
            (200, intent(r#""status":"succeeded","amount_received":100"#), moved(100)),
            (200, intent(r#""status":"succeeded""#), UNCLEAR),
            (200, intent(r#""status":"requires_capture""#), pending(100)),
            (200, intent(r#""status":"processing""#), pending(100)),
            (200, intent(r#""status":"canceled","amount_received":0"#), Reading::NotMoved),
            (200, refund(r#""status":"succeeded""#), moved(100)),
            (200, refund(r#""status":"pending""#), pending(100)),
            (200, refund(r#""status":"failed""#), Reading::NotMoved),
            (200, charge(r#""status":"succeeded","captured":true"#).replace("usd", "eur"), UNCLEAR),
            (200, charge(r#""status":"succeeded","captured":true"#).replace("100", "\"100\""), UNCLEAR),
            (200, charge(r#""status":"succeeded","captured":true"#).replace("100", "9999999999999"), UNCLEAR),
            (200, r#"{"object":"charge"}"#.into(), UNCLEAR),
            (200, "garbage".into(), UNCLEAR),
            (200, String::new(), UNCLEAR),
            (402, "garbage".into(), Reading::Declined),
            (400, r#"{"error":{"type":"invalid_request_error"}}"#.into(), Reading::Invalid),
            (400, r#"{"error":{"type":"idempotency_error"}}"#.into(), Reading::KeyMismatch),
            (400, "garbage".into(), UNCLEAR),
            (404, r#"{"error":{"type":"invalid_request_error"}}"#.into(), Reading::Invalid),
            (401, "{}".into(), Reading::OwnKeyRefused),
            (
                403,
                r#"{"error":{"message":"The provided key 'rk_test_***' does not have …"}}"#.into(),
                Reading::OwnKeyRefused,
            ),
            (403, r#"{"error":{"message":"This object cannot be …"}}"#.into(), Reading::Invalid),
            (429, "{}".into(), Reading::Throttled),
            (409, "{}".into(), UNCLEAR),
            (424, "{}".into(), UNCLEAR),
            (302, "{}".into(), UNCLEAR),
            (500, "{}".into(), Reading::Unclear { is_5xx: true }),
            (503, "x".into(), Reading::Unclear { is_5xx: true }),
        ] {
            assert_eq!(reading(status, &body), expected, "{status} {body}");
        }
    }

    #[test]
    fn objects_are_named_with_their_charges() {
        let objects = |status, body: &str| {
            read(Answer { status, body: body.as_bytes() }, Some(held_for(Answers::Intent)), None).1
        };
        let intent = r#"{"object":"payment_intent","id":"pi_1","currency":"usd","amount":1,"status":"processing","latest_charge":CH}"#;
        assert_eq!(objects(200, &intent.replace("CH", "\"ch_1\"")), ["pi_1", "ch_1"]);
        assert_eq!(objects(200, &intent.replace("CH", r#"{"id":"ch_2"}"#)), ["pi_1", "ch_2"]);
        assert_eq!(objects(200, &intent.replace("CH", "null")), ["pi_1"]);
        let declined = r#"{"error":{"charge":"ch_9","payment_intent":{"id":"pi_9"}}}"#;
        assert_eq!(objects(402, declined), ["pi_9", "ch_9"]);
    }

    /// What is answered with which fields, and what that says.
    const ANSWERS: &[(&str, &str, Reading)] = &[
        ("charge_refund", r#""amount":100,"amount_refunded":100"#, Reading::Moved { minor: 100 }),
        ("charge_refund", r#""amount":100,"amount_refunded":60"#, UNCLEAR),
        ("invoice", r#""status":"paid","amount_paid":90,"amount_remaining":0"#, Reading::Moved { minor: 90 }),
        (
            "invoice",
            r#""status":"open","amount_paid":30,"amount_remaining":60"#,
            Reading::Pending { minor: 90 },
        ),
        (
            "invoice",
            r#""status":"uncollectible","amount_paid":0,"amount_remaining":60"#,
            Reading::Pending { minor: 60 },
        ),
        ("invoice", r#""status":"void","amount_paid":0,"amount_remaining":60"#, Reading::NotMoved),
        (
            "invoice",
            r#""status":"draft","auto_advance":false,"amount_paid":0,"amount_remaining":60,"amount_due":60"#,
            Reading::Moved { minor: 0 },
        ),
        (
            "invoice",
            r#""status":"draft","auto_advance":true,"amount_paid":0,"amount_remaining":60,"amount_due":60"#,
            Reading::Pending { minor: 60 },
        ),
        (
            "invoice",
            r#""status":"draft","amount_paid":0,"amount_remaining":60,"amount_due":70"#,
            Reading::Pending { minor: 70 },
        ),
        ("invoice", r#""status":"paid""#, UNCLEAR),
        ("invoiceitem", r#""amount":80,"invoice":null"#, Reading::Pending { minor: 80 }),
        ("invoiceitem", r#""amount":80,"invoice":"in_1""#, Reading::Pending { minor: 80 }),
        ("invoiceitem", r#""amount":-80"#, Reading::Pending { minor: 0 }),
        ("line_item", r#""amount":80"#, Reading::Pending { minor: 0 }),
        ("new_subscription", r#""status":"active","latest_invoice":"in_1""#, Reading::Pending { minor: 0 }),
        (
            "new_subscription",
            r#""status":"active","latest_invoice":{"object":"invoice","status":"paid","amount_paid":70}"#,
            Reading::Moved { minor: 70 },
        ),
        (
            "new_subscription",
            r#""status":"active","latest_invoice":{"object":"invoice","status":"open","amount_paid":0}"#,
            Reading::Pending { minor: 0 },
        ),
        (
            "new_subscription",
            r#""status":"trialing","latest_invoice":{"object":"invoice","status":"paid","amount_paid":0}"#,
            Reading::Pending { minor: 0 },
        ),
        ("new_subscription", r#""status":"incomplete","latest_invoice":null"#, Reading::Pending { minor: 0 }),
        ("new_subscription", r#""status":"incomplete_expired""#, Reading::NotMoved),
        ("subscription", r#""status":"canceled""#, Reading::Pending { minor: 0 }),
        ("transfer", r#""amount":100,"amount_reversed":0"#, Reading::Moved { minor: 100 }),
        ("transfer", r#""amount":"100""#, UNCLEAR),
        ("transfer_reversal", r#""amount":100"#, Reading::Moved { minor: 100 }),
        ("payout", r#""amount":100,"status":"paid""#, Reading::Moved { minor: 100 }),
        ("payout", r#""amount":100,"status":"in_transit""#, Reading::Pending { minor: 100 }),
        ("payout", r#""amount":-100,"status":"pending""#, Reading::Pending { minor: 100 }),
        ("payout", r#""amount":100,"status":"failed""#, Reading::NotMoved),
        ("payout", r#""amount":100,"status":"lost""#, UNCLEAR),
        ("customer_balance_transaction", r#""amount":100"#, Reading::Moved { minor: 100 }),
        (
            "checkout.session",
            r#""status":"open","payment_status":"unpaid","mode":"payment","amount_total":90"#,
            Reading::Pending { minor: 90 },
        ),
        (
            "checkout.session",
            r#""status":"complete","payment_status":"paid","mode":"payment","amount_total":90"#,
            Reading::Moved { minor: 90 },
        ),
        (
            "checkout.session",
            r#""status":"complete","payment_status":"paid","mode":"subscription","amount_total":90"#,
            Reading::Pending { minor: 90 },
        ),
        (
            "checkout.session",
            r#""status":"open","payment_status":"no_payment_required","mode":"setup""#,
            Reading::Moved { minor: 0 },
        ),
    ];

    #[test]
    fn every_kind_of_answer_says_what_moved() {
        for (answers, fields, expected) in ANSWERS {
            let answers = Answers::read(answers).unwrap();
            let body = format!(r#"{{"object":"{}","id":"x_1","currency":"usd",{fields}}}"#, answers.object());
            let told = |body: &str, is_ceiling| {
                let of_kind = Expected { is_ceiling, ..held_for(answers) };
                read(Answer { status: 200, body: body.as_bytes() }, Some(of_kind), None).0
            };
            assert_eq!(&told(&body, false), expected, "{body}");
            // Another object than was asked for says nothing, and another currency nothing of what is held.
            let other = body.replace(r#""object":""#, r#""object":"not_"#);
            assert_eq!(told(&other, false), UNCLEAR, "{other}");
            let euros = body.replace("\"usd\"", "\"eur\"");
            // Only a ceiling may meet another currency; what no rate counts is more than was held.
            let moves = matches!(expected, Reading::Moved { minor: 1.. } | Reading::Pending { minor: 1.. });
            let beyond = if moves { Reading::Pending { minor: 101 } } else { expected.clone() };
            assert_eq!((told(&euros, false), told(&euros, true)), (UNCLEAR, beyond), "{euros}");
            let rates = Rates::new(vec![(Currency::parse("eur").unwrap(), Rate::from_pico(20_000_000_000))]);
            let of_kind = Expected { is_ceiling: true, rates: &rates, ..held_for(answers) };
            let counted = read(Answer { status: 200, body: euros.as_bytes() }, Some(of_kind), None).0;
            let twice = if let Reading::Moved { minor } = expected {
                Reading::Moved { minor: minor * 2 }
            } else if let Reading::Pending { minor } = expected {
                Reading::Pending { minor: minor * 2 }
            } else {
                expected.clone()
            };
            // A refund of a charge tells what it was asked for.
            if answers != Answers::ChargeRefund {
                assert_eq!(counted, twice, "{euros}");
            }
        }
    }

    #[test]
    fn a_new_subscription_is_followed_to_its_first_invoice() {
        let body = br#"{"object":"subscription","id":"sub_1","currency":"usd","status":"active","latest_invoice":"in_1"}"#;
        let answer = Answer { status: 200, body };
        assert_eq!(follow(answer, Answers::NewSubscription).unwrap().path, "/v1/invoices/in_1");
        assert_eq!(follow(answer, Answers::Subscription), follow(answer, Answers::NewSubscription));
        assert_eq!(follow(answer, Answers::SubscriptionItem), None);
        assert_eq!(follow(Answer { status: 402, body }, Answers::NewSubscription), None);
        let strange = br#"{"latest_invoice":"in_1/../../charges"}"#;
        assert_eq!(follow(Answer { status: 200, body: strange }, Answers::NewSubscription), None);
        let invoice: &[u8] = br#"{"object":"invoice","id":"in_1","status":"paid","amount_paid":80}"#;
        let (told, objects) = read(answer, Some(held_for(Answers::NewSubscription)), Some(invoice));
        assert_eq!((told, objects), (Reading::Moved { minor: 80 }, vec!["sub_1".to_owned()]));
        let later: &[u8] =
            br#"{"object":"invoice","id":"in_1","status":"paid","amount_paid":80,"billing_reason":"subscription_cycle"}"#;
        assert_eq!(read(answer, Some(held_for(Answers::NewSubscription)), Some(later)).0, STAYS_HELD);
        // What comes later is not in it.
        let free = br#"{"object":"invoice","id":"in_1","status":"paid","amount_paid":0}"#;
        assert_eq!(read(answer, Some(held_for(Answers::NewSubscription)), Some(free)).0, STAYS_HELD);
        let params = [("billing_cycle_anchor".to_owned(), "1795540000".to_owned())];
        let deferred = Expected { params: &params, ..held_for(Answers::NewSubscription) };
        assert_eq!(read(answer, Some(deferred), Some(invoice)).0, STAYS_HELD);
    }

    #[test]
    fn a_change_of_a_subscription_counts_what_it_billed_at_once() {
        let body = br#"{"object":"subscription","id":"sub_1","currency":"usd","status":"active","latest_invoice":"in_1"}"#;
        let told = |invoice: &str| {
            let answer = Answer { status: 200, body };
            read(answer, Some(held_for(Answers::Subscription)), Some(invoice.as_bytes())).0
        };
        let billed = r#"{"object":"invoice","created":999900,"amount_due":500,"amount_paid":0}"#;
        assert_eq!(told(billed), Reading::Pending { minor: 500 });
        assert_eq!(told(&billed.replace("999900", "999800")), STAYS_HELD, "from before");
        assert_eq!(told(&billed.replace(r#""created":999900,"#, "")), Reading::Pending { minor: 500 });
        assert_eq!(told("garbage"), STAYS_HELD);
    }

    #[test]
    fn a_refund_leaves_its_charge_to_the_hold_that_made_it() {
        let body = br#"{"object":"charge","id":"ch_1","currency":"usd","amount":100,"amount_refunded":100}"#;
        let told = read(Answer { status: 200, body }, Some(held_for(Answers::ChargeRefund)), None);
        assert_eq!(told, (Reading::Moved { minor: 100 }, Vec::new()));
    }

    #[test]
    fn what_ends_an_object_tells_its_record() {
        let of = |answers, status, body: &str| ended(Answer { status, body: body.as_bytes() }, answers);
        let over = |id: &str| Some((id.to_owned(), Record::Ended, None));
        let intent = r#"{"object":"payment_intent","id":"pi_1","status":"canceled","amount_received":0}"#;
        assert_eq!(of(Answers::Intent, 200, intent), over("pi_1"));
        assert_eq!(
            of(Answers::Intent, 200, &intent.replace(":0", r#":40,"currency":"eur""#)),
            Some(("pi_1".into(), Record::Moved { minor: 40 }, Currency::parse("eur")))
        );
        assert_eq!(of(Answers::Intent, 200, &intent.replace("canceled", "succeeded")), None);
        assert_eq!(of(Answers::Intent, 400, intent), None);
        assert_eq!(of(Answers::Refund, 200, intent), None);
        for (answers, body) in [
            (Answers::Refund, r#"{"object":"refund","id":"x_1","status":"canceled"}"#),
            (Answers::Payout, r#"{"object":"payout","id":"x_1","status":"canceled"}"#),
            (Answers::CheckoutSession, r#"{"object":"checkout.session","id":"x_1","status":"expired"}"#),
            (Answers::Invoice, r#"{"object":"invoice","id":"x_1","status":"void","amount_paid":0}"#),
            (Answers::Invoice, r#"{"object":"invoice","id":"x_1","deleted":true}"#),
            (Answers::InvoiceItem, r#"{"object":"invoiceitem","id":"x_1","deleted":true}"#),
        ] {
            assert_eq!(of(answers, 200, body), over("x_1"), "{body}");
            let alive =
                body.replace("canceled", "pending").replace("expired", "open").replace("void", "open");
            assert_eq!(of(answers, 200, &alive.replace("true", "false")), None, "{alive}");
        }
    }
}
