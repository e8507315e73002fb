//! A vault key as a row: what an operator granted, until when, and what became of it. The secret itself is not here.
//!
//! Field numbers are stored: add at the end, as an `Option` or with a default, and never use one again.

use minicbor::{Decode, Encode};

use crate::id::{BudgetId, IssuerId, KeyId};
use crate::money::{MicroUsd, parse_amount};
use crate::refusal::{Code, Refusal};
use crate::time::{DAY_MS, SECOND_MS, UnixMs};

/// The longest life of a key, in seconds: 31 days.
pub const EXPIRES_IN_SECONDS_MAX: u64 = 2_678_400;
/// When the same parameters are worth a new attempt after a decline, unless a key says so itself, in seconds.
pub const RETRY_DECLINED_AFTER_S: u64 = 3_600;
/// Requests in a second, unless a key says so itself.
pub const REQUESTS_PER_SECOND: u32 = 25;
/// The most requests in a second that a key may have.
pub const REQUESTS_PER_SECOND_MAX: u32 = 10_000;
/// Pairs of `metadata` that a key may carry.
pub const METADATA_PAIRS_MAX: usize = 20;

/// What a vault key is and may do.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Key {
    /// Its name in lists and records.
    #[n(0)]
    pub id: KeyId,
    /// SHA-256 of the secret.
    #[cbor(n(1), with = "minicbor::bytes")]
    pub digest: [u8; 32],
    /// What people call it.
    #[n(2)]
    pub label: String,
    /// Whose API it opens.
    #[n(3)]
    pub vendor: String,
    /// Which operations.
    #[n(4)]
    pub grants: Vec<Grant>,
    /// How much.
    #[n(5)]
    pub caps: Caps,
    /// What counts as the same call.
    #[n(6)]
    pub idempotency: Idempotency,
    /// How long answers are remembered, in days.
    #[n(7)]
    pub remember_days: u32,
    /// Whether answers keep `client_secret`.
    #[n(8)]
    pub client_secrets: bool,
    /// Copied into every audit record of the key.
    #[n(9)]
    pub metadata: Vec<(String, String)>,
    /// When it was made.
    #[n(10)]
    pub created_at: UnixMs,
    /// From when on it opens nothing.
    #[n(11)]
    pub expires_at: UnixMs,
    /// When an operator revoked it.
    #[n(12)]
    pub revoked_at: Option<UnixMs>,
    /// When this program closed it, because Stripe executed more than was held.
    #[n(13)]
    pub closed_at: Option<UnixMs>,
    /// Who made it; the admin key when `None`.
    #[n(14)]
    pub issuer: Option<IssuerId>,
    /// Whose counters it shares, among the keys of the same issuer.
    #[n(15)]
    pub budget: Option<String>,
    /// Parameters that must have certain values.
    #[n(16)]
    #[cbor(default)]
    pub constraints: Vec<Constraint>,
    /// Connected accounts that it may act on.
    #[n(17)]
    #[cbor(default)]
    pub accounts: Vec<String>,
    /// Whether the first cap refusal stops its whole budget.
    #[n(18)]
    #[cbor(default)]
    pub stop_budget_on_refusal: bool,
    /// In `content` mode, when the same parameters are worth a new attempt after a decline, in seconds; the default when
    /// `None`.
    #[n(19)]
    pub retry_declined_after_s: Option<u64>,
    /// Requests that it may make in a second; the default when `None`.
    #[n(20)]
    pub requests_per_second: Option<u32>,
}

/// A parameter that must have one of some values, or lie between bounds.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Constraint {
    /// The parameter's canonical name.
    #[n(0)]
    pub param: String,
    /// What it may be.
    #[n(1)]
    pub rule: Rule,
}

/// What a constrained parameter may be.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub enum Rule {
    /// One of these, to the letter.
    #[n(0)]
    OneOf(#[n(0)] Vec<String>),
    /// A whole number between these, both included.
    #[n(1)]
    Between {
        /// At least.
        #[n(0)]
        min: Option<u64>,
        /// At most.
        #[n(1)]
        max: Option<u64>,
    },
}

impl Rule {
    /// Whether a value keeps the rule. A number is read in its one accepted spelling.
    pub fn admits(&self, value: &str) -> bool {
        match self {
            Self::OneOf(values) => values.iter().any(|allowed| allowed == value),
            Self::Between { min, max } => parse_amount(value).is_some_and(|number| {
                min.is_none_or(|min| number >= min) && max.is_none_or(|max| number <= max)
            }),
        }
    }

    /// Whether everything that `tighter` admits is admitted here too.
    pub fn covers(&self, tighter: &Self) -> bool {
        match (self, tighter) {
            (_, Self::OneOf(values)) => values.iter().all(|value| self.admits(value)),
            (Self::OneOf(_), Self::Between { .. }) => false,
            (Self::Between { min, max }, Self::Between { min: low, max: high }) => {
                let above = min.is_none_or(|min| low.is_some_and(|low| low >= min));
                let below = max.is_none_or(|max| high.is_some_and(|high| high <= max));
                above && below
            }
        }
    }
}

/// One operation that a key may call.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Grant {
    /// The operation's template, such as `GET /v1/charges/{charge}`.
    #[n(0)]
    pub operation: String,
    /// The entry as it was written.
    #[n(1)]
    pub written: String,
    /// Whether it was written with a `*`.
    #[n(2)]
    pub wildcard: bool,
}

/// The limits of a key; all must hold.
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub struct Caps {
    /// Per UTC day, or for the whole life of a key that lives a day or less.
    #[n(0)]
    pub daily: Option<MicroUsd>,
    /// For the whole life.
    #[n(1)]
    pub total: Option<MicroUsd>,
    /// For one call.
    #[n(2)]
    pub per_request: Option<MicroUsd>,
    /// Money out, counted apart, in the window of `daily`.
    #[n(3)]
    pub daily_out: Option<MicroUsd>,
    /// Money calls that are spent, held or in doubt.
    #[n(4)]
    pub max_calls: Option<u64>,
    /// The operator said that no dollar cap is meant.
    #[n(5)]
    pub uncapped: bool,
}

/// What counts as the same call.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub enum Idempotency {
    /// The caller's own key, which must be one that a new run would send again.
    #[n(0)]
    Required,
    /// The caller's key, whatever it is.
    #[n(1)]
    Client,
    /// What is charged, whatever key the caller sends.
    #[n(2)]
    Content {
        /// What the calls of this key are about, such as `billing:2026-07`.
        #[n(0)]
        scope: String,
        /// Parameters whose values tell one call from another; empty means the operation's default.
        #[n(1)]
        fields: Vec<String>,
    },
}

impl Idempotency {
    /// Whether the caller's own idempotency key means anything.
    pub const fn minds_caller_key(&self) -> bool {
        match self {
            Self::Required | Self::Client => true,
            Self::Content { .. } => false,
        }
    }

    /// The mode's name.
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::Required => "required",
            Self::Client => "client",
            Self::Content { .. } => "content",
        }
    }
}

/// What became of a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// It opens what it grants.
    Active,
    /// Its time is over.
    Expired,
    /// An operator revoked it.
    Revoked,
    /// Stripe executed more than was held.
    Closed,
}

impl Status {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Active, Self::Expired, Self::Revoked, Self::Closed];

    /// The name in lists and filters.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Active => "active",
            Self::Expired => "expired",
            Self::Revoked => "revoked",
            Self::Closed => "closed",
        }
    }
}

impl Key {
    /// What became of it by `now`.
    pub fn status(&self, now: UnixMs) -> Status {
        if self.revoked_at.is_some() {
            Status::Revoked
        } else if self.closed_at.is_some() {
            Status::Closed
        } else if now >= self.expires_at {
            Status::Expired
        } else {
            Status::Active
        }
    }

    /// Refuses a key that opens nothing any more.
    ///
    /// # Errors
    /// `vault_key_expired`, `vault_key_revoked` or `vault_key_closed`.
    pub fn alive(&self, now: UnixMs) -> Result<(), Refusal> {
        match self.status(now) {
            Status::Active => Ok(()),
            Status::Expired => Err(Refusal::new(
                Code::VaultKeyExpired,
                format!("This vault key ({}) expired at {}. Mint a new one.", self.id, self.expires_at),
            )),
            Status::Revoked => {
                Err(Refusal::new(Code::VaultKeyRevoked, format!("This vault key ({}) was revoked.", self.id)))
            }
            Status::Closed => Err(Refusal::new(
                Code::VaultKeyClosed,
                format!(
                    "This vault key ({}) was closed: Stripe executed more than was held for one of its calls.",
                    self.id
                ),
            )),
        }
    }

    /// Whether the daily cap spans the key's whole life instead of a UTC day.
    pub fn lives_a_day_or_less(&self) -> bool {
        self.expires_at.millis_since(self.created_at) <= DAY_MS
    }

    /// The grant under which an operation may be called.
    pub fn grant_for(&self, operation: &str) -> Option<&Grant> {
        self.grants.iter().find(|grant| grant.operation == operation)
    }

    /// The budget whose counters it shares.
    pub fn budget_id(&self) -> Option<BudgetId> {
        self.budget.as_deref().map(|name| BudgetId::of(self.issuer, name))
    }

    /// What a parameter must be.
    pub fn constraint_on(&self, param: &str) -> Option<&Constraint> {
        self.constraints.iter().find(|constraint| constraint.param == param)
    }

    /// When the same parameters are worth a new attempt after a decline, in milliseconds.
    pub fn retry_declined_after_ms(&self) -> u64 {
        self.retry_declined_after_s.unwrap_or(RETRY_DECLINED_AFTER_S).saturating_mul(SECOND_MS)
    }

    /// Requests that it may make in a second.
    pub fn rate(&self) -> u32 {
        self.requests_per_second.unwrap_or(REQUESTS_PER_SECOND)
    }

    /// Whether no dollar cap bounds what it may move.
    pub fn is_uncapped(&self) -> bool {
        self.caps.is_uncapped()
    }
}

impl Caps {
    /// Whether no dollar cap of any kind is set, on purpose. A call whose price nobody knows can only be let through
    /// here: no other limit could hold it.
    pub fn is_uncapped(&self) -> bool {
        self.uncapped
            && [self.daily, self.total, self.per_request, self.daily_out].iter().all(Option::is_none)
    }
}
