//! What one of Stripe's answers says about money.

use serde_json::Value;

use crate::call::{Reading, Record};
use crate::money::{AMOUNT_DIGITS_MAX, Currency};

/// An answer, as far as it matters here.
#[derive(Clone, Copy, Debug)]
pub struct Answer<'a> {
    /// The status.
    pub status: u16,
    /// The body.
    pub body: &'a [u8],
}

/// What an answer to a money call says, and the objects that it names, the main one first.
///
/// `expected` is the currency that was held; `None` for a call whose price is not known.
pub fn read(answer: Answer<'_>, expected: Option<Currency>) -> (Reading, Vec<String>) {
    let body: Option<Value> = serde_json::from_slice(answer.body).ok();
    match answer.status {
        200..=299 => body.map_or((UNCLEAR, Vec::new()), |body| read_object(&body, expected)),
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

/// Whether an answer to a call that moves no money turns the sidecar's own key away.
pub fn refuses_own_key(answer: Answer<'_>) -> bool {
    match answer.status {
        401 => true,
        403 => serde_json::from_slice(answer.body).ok().as_ref().is_some_and(is_about_own_key),
        _ => false,
    }
}

/// What the answer to a cancel says about the payment intent: the object, and its record when it is final.
pub fn canceled(answer: Answer<'_>) -> Option<(String, Record)> {
    let body: Value = serde_json::from_slice(answer.body).ok().filter(|_| answer.status == 200)?;
    let id = text(&body, "id")?.to_owned();
    match (text(&body, "object")?, text(&body, "status")?) {
        ("payment_intent", "canceled") => match amount(&body, "amount_received")? {
            0 => Some((id, Record::Ended)),
            minor => Some((id, Record::Moved { minor })),
        },
        _ => None,
    }
}

const UNCLEAR: Reading = Reading::Unclear { is_5xx: false };

fn read_object(body: &Value, expected: Option<Currency>) -> (Reading, Vec<String>) {
    let Some(id) = text(body, "id") else { return (UNCLEAR, Vec::new()) };
    let mut objects = vec![id.to_owned()];
    let Some(expected) = expected else { return (Reading::Moved { minor: 0 }, objects) };
    // An amount in another currency than was held cannot be booked.
    if text(body, "currency").and_then(Currency::parse) != Some(expected) {
        return (UNCLEAR, objects);
    }
    let reading = match text(body, "object") {
        Some("charge") => read_charge(body),
        Some("payment_intent") => {
            objects.extend(reference(body, "latest_charge"));
            read_intent(body)
        }
        Some("refund") => read_refund(body),
        _ => None,
    };
    (reading.unwrap_or(UNCLEAR), objects)
}

fn read_charge(charge: &Value) -> Option<Reading> {
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

fn read_intent(intent: &Value) -> Option<Reading> {
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

fn read_refund(refund: &Value) -> Option<Reading> {
    let whole = amount(refund, "amount")?;
    Some(match text(refund, "status")? {
        "succeeded" => Reading::Moved { minor: whole },
        "pending" | "requires_action" => Reading::Pending { minor: whole },
        "failed" | "canceled" => Reading::NotMoved,
        _ => return None,
    })
}

/// A declined payment intent exists, and can be confirmed again; so does a failed charge.
fn declined_objects(body: &Value) -> Vec<String> {
    let error = body.get("error");
    let intent = error.and_then(|error| reference(error, "payment_intent"));
    let charge = error.and_then(|error| reference(error, "charge"));
    intent.into_iter().chain(charge).collect()
}

fn is_key_mismatch(body: &Value) -> bool {
    body.get("error").and_then(|error| text(error, "type")) == Some("idempotency_error")
}

/// Stripe says "The provided key … does not have the required permissions" of a restricted key; any other 403 is about
/// the resource.
fn is_about_own_key(body: &Value) -> bool {
    let message = body.get("error").and_then(|error| text(error, "message")).unwrap_or_default();
    message.starts_with("The provided key") || message.contains("required permissions")
}

/// The id in a field that may hold an id or the expanded object.
fn reference(object: &Value, field: &str) -> Option<String> {
    let value = object.get(field)?;
    value.as_str().or_else(|| text(value, "id")).map(str::to_owned)
}

fn text<'a>(object: &'a Value, field: &str) -> Option<&'a str> {
    object.get(field).and_then(Value::as_str)
}

fn amount(object: &Value, field: &str) -> Option<u64> {
    let ceiling = 10_u64.pow(u32::try_from(AMOUNT_DIGITS_MAX).unwrap_or(0));
    object.get(field).and_then(Value::as_u64).filter(|minor| *minor < ceiling)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reading(status: u16, body: &str) -> Reading {
        read(Answer { status, body: body.as_bytes() }, Some(Currency::USD)).0
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
        let objects =
            |status, body: &str| read(Answer { status, body: body.as_bytes() }, Some(Currency::USD)).1;
        let intent = r#"{"object":"payment_intent","id":"pi_1","currency":"usd","amount":1,"status":"processing","latest_charge":CH}"#;
        assert_eq!(objects(200, &intent.replace("CH", "\"ch_1\"")), ["pi_1", "ch_1"]);
        assert_eq!(objects(200, &intent.replace("CH", r#"{"id":"ch_2"}"#)), ["pi_1", "ch_2"]);
        assert_eq!(objects(200, &intent.replace("CH", "null")), ["pi_1"]);
        let declined = r#"{"error":{"charge":"ch_9","payment_intent":{"id":"pi_9"}}}"#;
        assert_eq!(objects(402, declined), ["pi_9", "ch_9"]);
    }

    #[test]
    fn a_cancel_tells_the_end_of_an_intent() {
        let of = |status, body: &str| canceled(Answer { status, body: body.as_bytes() });
        let body = r#"{"object":"payment_intent","id":"pi_1","status":"canceled","amount_received":0}"#;
        assert_eq!(of(200, body), Some(("pi_1".into(), Record::Ended)));
        assert_eq!(of(200, &body.replace(":0", ":40")), Some(("pi_1".into(), Record::Moved { minor: 40 })));
        assert_eq!(of(200, &body.replace("canceled", "succeeded")), None);
        assert_eq!(of(400, body), None);
    }
}
