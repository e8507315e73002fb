//! A refusal as an SDK expects it: Stripe's error object.

use serde_json::{Map, Value, json};

use crate::refusal::Refusal;
use crate::time::UnixMs;

/// Where the codes are explained, on the sidecar itself.
pub const ERRORS_PATH: &str = "/keybrake/errors";

/// The body of a refusal.
pub fn body(refusal: &Refusal) -> Vec<u8> {
    let mut error = Map::new();
    error.insert("type".to_owned(), Value::from(refusal.code.error_type()));
    error.insert("code".to_owned(), Value::from(refusal.code.as_str()));
    error.insert("message".to_owned(), Value::from(refusal.message.as_str()));
    if let Some(param) = &refusal.param {
        error.insert("param".to_owned(), Value::from(param.as_str()));
    }
    error.insert("doc_url".to_owned(), Value::from(format!("{ERRORS_PATH}#{}", refusal.code.as_str())));
    if let Some(figures) = &refusal.figures {
        error.insert("cap".to_owned(), Value::from(figures.cap.as_str()));
        error.insert("limit".to_owned(), Value::from(figures.limit.to_string()));
        error.insert("spent".to_owned(), Value::from(figures.spent.to_string()));
        error.insert("held".to_owned(), Value::from(figures.held.to_string()));
        error.insert("requested".to_owned(), Value::from(figures.requested.to_string()));
        error.insert(
            "resets_at".to_owned(),
            figures.resets_at.map_or(Value::Null, |at| at.to_string().into()),
        );
    }
    json!({ "error": error }).to_string().into_bytes()
}

/// Seconds until something resets, where something does.
pub fn retry_after_s(refusal: &Refusal, now: UnixMs) -> Option<u64> {
    let resets_at = refusal.figures.as_ref()?.resets_at?;
    Some(resets_at.millis_since(now).div_ceil(1_000).max(1))
}
