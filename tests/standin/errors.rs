//! Error answers in Stripe's shape and, where Stripe's text is known to the public, in its words.

use serde_json::{Map, Value, json};

/// An error answer. It is a value like any other answer: whether it is stored under the key is not its business.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) status: u16,
    fields: Map<String, Value>,
}

impl Failure {
    pub(crate) fn new(status: u16, kind: &str, message: impl Into<String>) -> Self {
        let mut fields = Map::new();
        fields.insert("message".into(), Value::String(message.into()));
        fields.insert("type".into(), Value::String(kind.into()));
        Self { status, fields }
    }

    pub(crate) fn invalid(message: impl Into<String>) -> Self {
        Self::new(400, "invalid_request_error", message)
    }

    pub(crate) fn with(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.fields.insert(name.into(), value.into());
        self
    }

    /// A code comes with the address of its explanation.
    pub(crate) fn code(self, code: &str) -> Self {
        let page = format!("https://stripe.com/docs/error-codes/{}", code.replace('_', "-"));
        self.with("code", code).with("doc_url", page)
    }

    pub(crate) fn param(self, param: &str) -> Self {
        self.with("param", param)
    }

    /// The error object itself, as an intent keeps it.
    pub(crate) fn fields(&self) -> Value {
        Value::Object(self.fields.clone())
    }

    pub(crate) fn body(mut self, request_id: &str) -> Value {
        let log = format!("https://dashboard.stripe.com/test/logs/{request_id}");
        self.fields.insert("request_log_url".into(), Value::String(log));
        json!({ "error": self.fields })
    }
}

pub(crate) fn no_key() -> Failure {
    let message = "You did not provide an API key. You need to provide your API key in the Authorization header, \
                   using Bearer auth (e.g. 'Authorization: Bearer YOUR_SECRET_KEY'). See \
                   https://stripe.com/docs/api#authentication for details, or we can help at \
                   https://support.stripe.com/.";
    Failure::new(401, "invalid_request_error", message)
}

pub(crate) fn wrong_key(key: &str) -> Failure {
    Failure::new(401, "invalid_request_error", format!("Invalid API Key provided: {}", masked(key)))
}

fn masked(key: &str) -> String {
    let shown = key.get(..8).unwrap_or_default();
    let last = key.len().checked_sub(4).filter(|at| *at > 8).and_then(|at| key.get(at..)).unwrap_or_default();
    format!("{shown}****{last}")
}

pub(crate) fn missing_permission(account: &str) -> Failure {
    let message = format!(
        "The provided key 'rk_test_***' does not have the required permissions for this endpoint on account \
         '{account}'. Having the 'rak_accounts_kyc_id_numbers_read' permission would allow this request to continue."
    );
    Failure::new(403, "invalid_request_error", message)
}

pub(crate) fn foreign_account(account: &str) -> Failure {
    let message = format!(
        "The provided key 'sk_test_***' does not have access to account '{account}' (or that account does not exist). \
         Application access may have been revoked."
    );
    Failure::new(403, "invalid_request_error", message).code("account_invalid")
}

pub(crate) fn unrecognized(method: &str, path: &str) -> Failure {
    let slash = "If you are trying to list objects, remove the trailing slash. If you are trying to retrieve an \
                 object, make sure you passed a valid (non-empty) identifier in your code. ";
    let message = format!(
        "Unrecognized request URL ({method}: {path}). {}Please see https://stripe.com/docs or we can help at \
         https://support.stripe.com/.",
        if path.ends_with('/') { slash } else { "" }
    );
    Failure::new(404, "invalid_request_error", message)
}

pub(crate) fn content_type(given: &str) -> Failure {
    Failure::invalid(format!(
        "Invalid request: unsupported Content-Type {given}. If error persists and you need assistance, please contact \
         support@stripe.com."
    ))
}

pub(crate) fn rate_limited() -> Failure {
    Failure::new(429, "invalid_request_error", "Request rate limit exceeded").code("rate_limit")
}

pub(crate) fn lock_timeout() -> Failure {
    let message = "This object cannot be accessed right now because another API request or Stripe process is \
                   currently accessing it. If you see this error intermittently, retry the request. If you see this \
                   error frequently and are making multiple concurrent requests to a single object, make your \
                   requests serially or at a lower rate.";
    Failure::new(429, "invalid_request_error", message).code("lock_timeout")
}

pub(crate) fn in_flight(key: &str) -> Failure {
    let message = format!(
        "There is currently another in-progress request using this Idempotent Key (that probably means you submitted \
         twice, and the other request is still going through): {key}. Please try again later."
    );
    Failure::new(409, "idempotency_error", message).code("idempotency_key_in_use")
}

pub(crate) fn other_parameters(key: &str) -> Failure {
    let message = format!(
        "Keys for idempotent requests can only be used with the same parameters they were first used with. Try using a \
         key other than '{key}' if you meant to execute a different request."
    );
    Failure::new(400, "idempotency_error", message)
}

pub(crate) fn other_endpoint(key: &str, now: &str, first: &str) -> Failure {
    let message = format!(
        "Keys for idempotent requests can only be used for the same endpoint they were first used for ('{now}' vs \
         '{first}'). Try using a key other than '{key}' if you meant to execute a different request."
    );
    Failure::new(400, "idempotency_error", message)
}

/// Only the limit is published, not the sentence.
pub(crate) fn long_key() -> Failure {
    Failure::invalid("The Idempotency-Key must be at most 255 characters long.")
}

/// The outcome of a 500 is indeterminate by definition; the sentence is ours.
pub(crate) fn server_error() -> Failure {
    Failure::new(500, "api_error", "An unexpected error occurred.")
}

/// 424 is a documented status without a documented body; the sentence is ours.
pub(crate) fn dependency_failed() -> Failure {
    Failure::new(424, "api_error", "An external dependency failed.")
}

pub(crate) fn missing(param: &str) -> Failure {
    Failure::invalid(format!("Missing required param: {param}.")).code("parameter_missing").param(param)
}

pub(crate) fn unknown_parameter(param: &str) -> Failure {
    Failure::invalid(format!("Received unknown parameter: {param}")).code("parameter_unknown").param(param)
}

pub(crate) fn empty(param: &str) -> Failure {
    Failure::invalid(format!(
        "You passed an empty string for '{param}'. We assume empty values are an attempt to unset a parameter; however \
         '{param}' cannot be unset. You should remove '{param}' from your request or supply a non-empty value."
    ))
    .code("parameter_invalid_empty")
    .param(param)
}

pub(crate) fn not_an_integer(param: &str, given: &str) -> Failure {
    Failure::invalid(format!("Invalid integer: {given}")).code("parameter_invalid_integer").param(param)
}

pub(crate) fn no_such(what: &str, id: &str, status: u16, param: &str) -> Failure {
    Failure::new(status, "invalid_request_error", format!("No such {what}: '{id}'"))
        .code("resource_missing")
        .param(param)
}
