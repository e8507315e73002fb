//! What an operator says of a call in doubt.

use serde_json::{Map, Value};

use crate::admin::fields::{Fields, invalid};
use crate::ledger::Actor;
use crate::ledger::rules::resolve::{EndDoubt, Known};
use crate::money::parse_amount;
use crate::refusal::Refusal;

/// Characters of an object's id.
const OBJECT_ID_CHARS_MAX: usize = 255;

/// Reads `{"outcome": "spent", "amount", "object_id", "reason"}` or `{"outcome": "not_executed", "reason"}`.
///
/// # Errors
/// `parameter_invalid`, naming the field.
pub fn end_of(body: &[u8], actor: &Actor) -> Result<EndDoubt, Refusal> {
    let mut fields = Fields::parse(body)?;
    let outcome: String = fields.need("outcome", "\"spent\" or \"not_executed\"")?;
    let reason = fields.reason()?;
    let mut evidence = Map::new();
    evidence.insert("reason".to_owned(), Value::from(reason));
    let (outcome, objects) = match outcome.as_str() {
        "spent" => {
            let amount: u64 = fields.need("amount", "a whole number in the currency's smallest unit")?;
            let minor = parse_amount(&amount.to_string())
                .ok_or_else(|| invalid("amount", "may have at most 12 digits"))?;
            let object: String = fields.need("object_id", "the id of the object at Stripe, such as ch_…")?;
            let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-');
            if object.is_empty() || object.len() > OBJECT_ID_CHARS_MAX || !object.chars().all(plain) {
                return Err(invalid("object_id", "must be the id of an object at Stripe, such as ch_…"));
            }
            evidence.insert("object_id".to_owned(), Value::from(object.as_str()));
            (Known::Executed { minor }, vec![object])
        }
        "not_executed" => (Known::NotExecuted, Vec::new()),
        _ => return Err(invalid("outcome", "must be \"spent\" or \"not_executed\"")),
    };
    fields.finish()?;
    Ok(EndDoubt { outcome, objects, answer: None, actor: Some(actor.0.clone()), evidence })
}
