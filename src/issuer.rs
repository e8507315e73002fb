//! An issuer key: may mint vault keys within bounds that come from somewhere else than the script that asks.
//!
//! Field numbers are stored: add at the end, as an `Option` or with a default, and never use one again.

use minicbor::{Decode, Encode};

use crate::id::IssuerId;
use crate::key::{Constraint, Grant, Idempotency, Key};
use crate::money::MicroUsd;
use crate::refusal::{Code, Refusal};
use crate::time::UnixMs;

/// What an issuer key is and may mint.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Issuer {
    /// Its name in lists and records.
    #[n(0)]
    pub id: IssuerId,
    /// SHA-256 of the secret.
    #[cbor(n(1), with = "minicbor::bytes")]
    pub digest: [u8; 32],
    /// What people call it.
    #[n(2)]
    pub name: String,
    /// What the labels of its keys start with.
    #[n(3)]
    pub label_prefix: String,
    /// Which operations its keys may have.
    #[n(4)]
    pub grants: Vec<Grant>,
    /// Constraints that its keys have at least.
    #[n(5)]
    pub constraints: Vec<Constraint>,
    /// The most that one call of its keys may cost.
    #[n(6)]
    pub per_request: Option<MicroUsd>,
    /// The highest cap of one key.
    #[n(7)]
    pub max_cap: Option<MicroUsd>,
    /// What all its keys together may spend in a UTC day.
    #[n(8)]
    pub daily: Option<MicroUsd>,
    /// What all its keys together may ever spend.
    #[n(9)]
    pub total: Option<MicroUsd>,
    /// What all its keys together may refund in a UTC day.
    #[n(10)]
    pub daily_out: Option<MicroUsd>,
    /// The longest life of a key, in seconds.
    #[n(11)]
    pub max_expires_in_seconds: u64,
    /// The mode that its keys must have: `required`, `client` or `content`.
    #[n(12)]
    pub idempotency: Option<String>,
    /// When it was made.
    #[n(13)]
    pub created_at: UnixMs,
    /// From when on it mints nothing.
    #[n(14)]
    pub expires_at: UnixMs,
    /// When an operator revoked it; its keys end with it.
    #[n(15)]
    pub revoked_at: Option<UnixMs>,
}

impl Issuer {
    /// The name of what became of it.
    pub fn status(&self, now: UnixMs) -> &'static str {
        if self.revoked_at.is_some() {
            "revoked"
        } else if now >= self.expires_at {
            "expired"
        } else {
            "active"
        }
    }

    /// Refuses an issuer key that opens nothing any more.
    ///
    /// # Errors
    /// `vault_key_expired` or `vault_key_revoked`.
    pub fn alive(&self, now: UnixMs) -> Result<(), Refusal> {
        match self.status(now) {
            "active" => Ok(()),
            "expired" => Err(Refusal::new(
                Code::VaultKeyExpired,
                format!("This issuer key ({}) expired at {}.", self.id, self.expires_at),
            )),
            _ => Err(Refusal::new(
                Code::VaultKeyRevoked,
                format!("This issuer key ({}) was revoked.", self.id),
            )),
        }
    }

    /// Refuses a key outside of the bounds, naming the field.
    ///
    /// # Errors
    /// `parameter_not_allowed`.
    pub fn may_mint(&self, key: &Key) -> Result<(), Refusal> {
        if !key.label.starts_with(&self.label_prefix) {
            return Err(outside("label", format!("must start with \"{}\"", self.label_prefix)));
        }
        let granted = |grant: &&Grant| {
            self.grants
                .iter()
                .any(|own| own.operation == grant.operation && (own.wildcard || !grant.wildcard))
        };
        if let Some(grant) = key.grants.iter().find(|grant| !granted(grant)) {
            return Err(outside("allowed_endpoints", format!("may not hold {}", grant.operation)));
        }
        if key.caps.uncapped {
            return Err(outside("uncapped", "is for the admin key alone"));
        }
        if !key.accounts.is_empty() {
            return Err(outside("accounts", "are for the admin key alone"));
        }
        if key.client_secrets {
            return Err(outside("client_secrets", "are for the admin key alone"));
        }
        let over = |cap: Option<MicroUsd>| cap.zip(self.max_cap).is_some_and(|(cap, max)| cap > max);
        for (field, cap) in [
            ("daily_usd_cap", key.caps.daily),
            ("total_usd_cap", key.caps.total),
            ("daily_usd_out_cap", key.caps.daily_out),
        ] {
            if over(cap) {
                return Err(outside(field, "is above the issuer's max_cap_usd"));
            }
        }
        if key.caps.per_request.zip(self.per_request).is_some_and(|(one, max)| one > max) {
            return Err(outside("max_usd_per_request", "is above the issuer's"));
        }
        for own in &self.constraints {
            if !key.constraint_on(&own.param).is_some_and(|asked| own.rule.covers(&asked.rule)) {
                return Err(outside(
                    "constraints",
                    format!("must hold '{}' at least as tightly as the issuer's", own.param),
                ));
            }
        }
        let seconds = key.expires_at.millis_since(key.created_at) / crate::time::SECOND_MS;
        if seconds > self.max_expires_in_seconds {
            return Err(outside("expires_in_seconds", "is above the issuer's max_expires_in_seconds"));
        }
        if key.expires_at > self.expires_at {
            return Err(outside("expires_in_seconds", "would outlive the issuer key"));
        }
        if self.idempotency.as_deref().is_some_and(|mode| mode != key.idempotency.as_str()) {
            return Err(outside("idempotency", "is not the issuer's"));
        }
        Ok(())
    }

    /// A key as it is minted: what it leaves out is the issuer's.
    #[must_use]
    pub fn filled_in(&self, mut key: Key) -> Key {
        key.issuer = Some(self.id);
        key.caps.per_request = key.caps.per_request.or(self.per_request);
        for own in &self.constraints {
            if key.constraint_on(&own.param).is_none() {
                key.constraints.push(own.clone());
            }
        }
        key
    }

    /// The mode that its keys have unless they say so.
    pub fn wants(&self, idempotency: &Idempotency) -> bool {
        self.idempotency.as_deref().is_none_or(|mode| mode == idempotency.as_str())
    }
}

fn outside(field: &str, why: impl Into<String>) -> Refusal {
    Refusal::of_param(Code::ParameterNotAllowed, field, format!("'{field}' {}.", why.into()))
}
