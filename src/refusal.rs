//! Every "no" that this program says: its code, its status, whether asking again can help, and the text outside.
//!
//! A refusal is a value, not an error: it was decided, and nothing was forwarded. It never carries a parameter's value
//! or a secret.

use crate::money::MicroUsd;
use crate::time::UnixMs;

macro_rules! codes {
    ($($(#[$doc:meta])* $variant:ident = $text:literal, $status:literal, $retry:literal, $meaning:literal;)*) => {
        /// What a refusal is called, alphabetically. The names are part of the API: never change one.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Code {
            $(#[doc = $meaning] $variant,)*
        }

        impl Code {
            /// All of them, in alphabetical order.
            pub const ALL: &[Self] = &[$(Self::$variant,)*];

            /// The code as callers see it.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $text,)* }
            }

            /// The HTTP status.
            pub const fn status(self) -> u16 {
                match self { $(Self::$variant => $status,)* }
            }

            /// Whether an SDK should send the same request again, unless the refusal itself says otherwise.
            pub const fn retry(self) -> bool {
                match self { $(Self::$variant => $retry,)* }
            }

            /// One sentence for the error page.
            pub const fn meaning(self) -> &'static str {
                match self { $(Self::$variant => $meaning,)* }
            }
        }
    };
}

codes! {
    AccountNotAllowed = "account_not_allowed", 403, false,
        "The request names a connected account that the key was not granted.";
    AdminKeyRequired = "admin_key_required", 403, false,
        "This needs the admin key; a key of a lower kind was presented.";
    AlreadyExecuted = "already_executed", 409, false,
        "This call was executed earlier and its answer is no longer kept; the message names the object at Stripe.";
    AmountUnknown = "amount_unknown", 403, false,
        "What this call would cost cannot be known before it is sent, and the key has a cap.";
    BodyTooLarge = "body_too_large", 413, false,
        "The request body is larger than the sidecar takes.";
    BudgetStopped = "budget_stopped", 429, false,
        "A call under this budget was refused for its cap, and the budget stopped until an operator resumes it.";
    CallLimitExceeded = "call_limit_exceeded", 429, false,
        "The key has made as many money calls as it may make.";
    Conflict = "conflict", 409, false,
        "The thing named is not in a state in which this can be done.";
    CurrencyNotAllowed = "currency_not_allowed", 403, false,
        "Only amounts in USD, and in currencies that have a rate, can be counted against a cap.";
    EncodingNotAllowed = "encoding_not_allowed", 415, false,
        "The body is compressed, or not of the content type that the operation takes.";
    EndpointNotAllowed = "endpoint_not_allowed", 403, false,
        "The key does not grant this operation, or no such operation is known.";
    HeadersTooLarge = "headers_too_large", 431, false,
        "The request's headers are too many or too long.";
    IdempotencyError = "idempotency_error", 400, false,
        "The same call was made before with other parameters; the message names the one that differs.";
    IdempotencyKeyInUse = "idempotency_key_in_use", 409, true,
        "The same call, or another call on the same object, is being made right now.";
    IdempotencyKeyRequired = "idempotency_key_required", 400, false,
        "A money call came without an idempotency key, or with one that an SDK makes up at random for each run.";
    KillSwitch = "kill_switch", 403, false,
        "An operator has stopped every call.";
    LedgerUnavailable = "ledger_unavailable", 503, true,
        "The ledger cannot be written, so nothing was forwarded.";
    MethodNotAllowed = "method_not_allowed", 405, false,
        "Only GET, POST and DELETE are served.";
    NotFound = "not_found", 404, false,
        "There is nothing at this path.";
    NotReady = "not_ready", 503, true,
        "The Stripe account is not verified yet, or the process is stopping; nothing was forwarded.";
    OutcomeUnknown = "outcome_unknown", 502, true,
        "Stripe may have executed the call. The money stays counted until the outcome is known.";
    Overloaded = "overloaded", 503, true,
        "Too many requests are in progress at this sidecar; nothing was held or forwarded.";
    ParameterInvalid = "parameter_invalid", 400, false,
        "A parameter or header is missing, malformed or out of bounds.";
    ParameterNotAllowed = "parameter_not_allowed", 403, false,
        "A parameter that the key does not grant: it sends money elsewhere, carries card data or reaches other objects.";
    RateLimited = "rate_limited", 429, true,
        "The key makes more requests in a second than it may.";
    RequestAmbiguous = "request_ambiguous", 400, false,
        "The request could be read in more than one way.";
    RequestTimeout = "request_timeout", 408, true,
        "The request's body did not arrive in time.";
    SpendCapExceeded = "spend_cap_exceeded", 429, false,
        "The call would exceed a cap; the error object says which, and what is spent and held.";
    UpstreamKeyRefused = "upstream_key_refused", 502, false,
        "Stripe refused this sidecar's own key; nothing was executed.";
    UpstreamUnreachable = "upstream_unreachable", 502, true,
        "Stripe could not be reached; nothing was sent.";
    VaultKeyClosed = "vault_key_closed", 403, false,
        "Stripe executed more than was held under this key, so it was closed.";
    VaultKeyExpired = "vault_key_expired", 401, false,
        "The vault key has expired.";
    VaultKeyInvalid = "vault_key_invalid", 401, false,
        "No such key is known to this sidecar.";
    VaultKeyRevoked = "vault_key_revoked", 401, false,
        "The vault key was revoked.";
}

impl Code {
    /// Stripe's `error.type` for it.
    pub const fn error_type(self) -> &'static str {
        match self {
            Self::IdempotencyError => "idempotency_error",
            Self::LedgerUnavailable
            | Self::NotReady
            | Self::OutcomeUnknown
            | Self::Overloaded
            | Self::UpstreamKeyRefused
            | Self::UpstreamUnreachable => "api_error",
            Self::AccountNotAllowed
            | Self::AdminKeyRequired
            | Self::AlreadyExecuted
            | Self::AmountUnknown
            | Self::BodyTooLarge
            | Self::BudgetStopped
            | Self::CallLimitExceeded
            | Self::Conflict
            | Self::CurrencyNotAllowed
            | Self::EncodingNotAllowed
            | Self::EndpointNotAllowed
            | Self::HeadersTooLarge
            | Self::IdempotencyKeyInUse
            | Self::IdempotencyKeyRequired
            | Self::KillSwitch
            | Self::MethodNotAllowed
            | Self::NotFound
            | Self::ParameterInvalid
            | Self::ParameterNotAllowed
            | Self::RateLimited
            | Self::RequestAmbiguous
            | Self::RequestTimeout
            | Self::SpendCapExceeded
            | Self::VaultKeyClosed
            | Self::VaultKeyExpired
            | Self::VaultKeyInvalid
            | Self::VaultKeyRevoked => "invalid_request_error",
        }
    }
}

/// Which limit a call ran into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CapKind {
    /// A limit that is checked against what a budget's keys spent together.
    Budget,
    /// `daily_usd_cap`.
    Daily,
    /// `daily_usd_out_cap`.
    DailyOut,
    /// A limit over all keys of one issuer.
    Issuer,
    /// `max_usd_per_request`.
    PerRequest,
    /// `total_usd_cap`.
    Total,
}

impl CapKind {
    /// The name in `error.cap`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Budget => "budget",
            Self::Daily => "daily",
            Self::DailyOut => "daily_out",
            Self::Issuer => "issuer",
            Self::PerRequest => "per_request",
            Self::Total => "total",
        }
    }
}

/// The figures behind `spend_cap_exceeded`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CapFigures {
    /// The tightest limit that the call would exceed.
    pub cap: CapKind,
    /// The limit.
    pub limit: MicroUsd,
    /// Spent in the limit's window.
    pub spent: MicroUsd,
    /// Held in the limit's window, doubt included.
    pub held: MicroUsd,
    /// What the call asked for.
    pub requested: MicroUsd,
    /// When the window ends; `None` where nothing resets.
    pub resets_at: Option<UnixMs>,
}

/// One "no".
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// What it is called.
    pub code: Code,
    /// What a person reads. Never a parameter's value, never a secret.
    pub message: String,
    /// The parameter or field at fault.
    pub param: Option<String>,
    /// With `spend_cap_exceeded`.
    pub figures: Option<Box<CapFigures>>,
    /// Whether the same request should be sent again.
    pub retry: bool,
    /// The status, where one code has two.
    pub status: u16,
}

impl Refusal {
    /// A refusal with a message.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            param: None,
            figures: None,
            retry: code.retry(),
            status: code.status(),
        }
    }

    /// A refusal that names the parameter or field at fault.
    pub fn of_param(code: Code, param: impl Into<String>, message: impl Into<String>) -> Self {
        Self { param: Some(param.into()), ..Self::new(code, message) }
    }

    /// The refusal of a call that exceeds a cap.
    pub fn over_cap(figures: CapFigures) -> Self {
        let CapFigures { cap, limit, spent, held, requested, resets_at } = &figures;
        let resets = resets_at.map_or(String::new(), |at| format!("; resets {at}"));
        let message = match cap {
            CapKind::PerRequest => {
                format!("Spend cap exceeded: one call may cost {limit} USD, this one {requested}")
            }
            CapKind::Budget | CapKind::Daily | CapKind::DailyOut | CapKind::Issuer | CapKind::Total => {
                format!(
                    "Spend cap exceeded: of {limit} USD ({}), {spent} are spent and {held} held; this call asks for \
                 {requested}{resets}",
                    cap.as_str()
                )
            }
        };
        Self { figures: Some(Box::new(figures)), ..Self::new(Code::SpendCapExceeded, message) }
    }

    /// The ledger could not take it.
    pub fn ledger_unavailable() -> Self {
        Self::new(
            Code::LedgerUnavailable,
            "The ledger cannot be written right now; nothing was sent to Stripe.",
        )
    }

    /// Stripe may have executed the call; `retry` says whether the same request may be sent again.
    pub fn outcome_unknown(retry: bool, timed_out: bool, message: impl Into<String>) -> Self {
        let status = if timed_out { 504 } else { Code::OutcomeUnknown.status() };
        Self { retry, status, ..Self::new(Code::OutcomeUnknown, message) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_sorted_and_unlike() {
        let names: Vec<&str> = Code::ALL.iter().map(|code| code.as_str()).collect();
        let mut sorted = names.clone();
        sorted.sort_unstable();
        sorted.dedup();
        assert_eq!(names, sorted);
    }

    #[test]
    fn a_cap_refusal_starts_with_the_words_that_users_look_for() {
        let refusal = Refusal::over_cap(CapFigures {
            cap: CapKind::Daily,
            limit: MicroUsd::from_micros(10_000_000),
            spent: MicroUsd::from_micros(6_000_000),
            held: MicroUsd::ZERO,
            requested: MicroUsd::from_micros(5_000_000),
            resets_at: None,
        });
        assert!(refusal.message.starts_with("Spend cap exceeded"), "{}", refusal.message);
        assert_eq!((refusal.status, refusal.retry), (429, false));
    }
}
