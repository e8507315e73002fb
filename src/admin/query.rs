//! Query strings of lists, read strictly: an unknown or doubled filter is refused, because a filter that is silently
//! ignored shows more than was asked for.

use crate::admin::fields::invalid;
use crate::call::CallState;
use crate::id::IssuerId;
use crate::key::Status;
use crate::ledger::query::{AuditFilter, CallFilter, KeyFilter};
use crate::refusal::Refusal;
use crate::time::UnixMs;

/// Items of one page.
const LIMIT: std::ops::RangeInclusive<usize> = 1..=1_000;
/// Items of one page, unless asked otherwise.
const LIMIT_DEFAULT: usize = 100;
/// Filters of `/audit` that compare one field.
const RECORD_FIELDS: &[&str] = &[
    "label",
    "key_id",
    "customer",
    "endpoint",
    "decision",
    "outcome",
    "idempotency_key",
    "object_id",
    "call_id",
    "hold_id",
    "request_id",
    "stripe_request_id",
    "event",
    "code",
    "node",
    "chain_id",
];
/// Filters of `/audit` that compare an entry of a map.
const RECORD_MAPS: &[&str] = &["metadata", "stripe_metadata"];

/// The parameters of a query that nobody has taken yet.
#[derive(Debug)]
pub struct Asked(Vec<(String, String)>);

impl Asked {
    /// Takes a query's parameters.
    ///
    /// # Errors
    /// `parameter_invalid` for one that is given twice.
    pub fn read(pairs: Vec<(String, String)>) -> Result<Self, Refusal> {
        for (at, (name, _)) in pairs.iter().enumerate() {
            if pairs.iter().skip(at + 1).any(|(other, _)| other == name) {
                return Err(invalid(name, "is given more than once"));
            }
        }
        Ok(Self(pairs))
    }

    fn take(&mut self, name: &str) -> Option<String> {
        let at = self.0.iter().position(|(found, _)| found == name)?;
        Some(self.0.remove(at).1)
    }

    /// `cursor` and `limit`.
    ///
    /// # Errors
    /// `parameter_invalid`.
    pub fn page<C>(&mut self, cursor: impl Fn(&str) -> Option<C>) -> Result<(Option<C>, usize), Refusal> {
        let after = match self.take("cursor") {
            None => None,
            Some(text) => {
                Some(cursor(&text).ok_or_else(|| invalid("cursor", "is not one that was given out"))?)
            }
        };
        let limit = match self.take("limit") {
            None => LIMIT_DEFAULT,
            Some(text) => text
                .parse()
                .ok()
                .filter(|limit| LIMIT.contains(limit))
                .ok_or_else(|| invalid("limit", "must be from 1 to 1000"))?,
        };
        Ok((after, limit))
    }

    /// The filters of a list of keys.
    ///
    /// # Errors
    /// `parameter_invalid`.
    pub fn keys(&mut self) -> Result<KeyFilter, Refusal> {
        let label = self.take("label");
        let status = match self.take("status") {
            None => None,
            Some(text) => Some(
                Status::ALL
                    .into_iter()
                    .find(|status| status.as_str() == text)
                    .ok_or_else(|| invalid("status", "must be active, expired, revoked or closed"))?,
            ),
        };
        let issuer = match self.take("issuer") {
            None => None,
            Some(text) => {
                Some(IssuerId::parse(&text).ok_or_else(|| invalid("issuer", "must be an ik_id_… id"))?)
            }
        };
        Ok(KeyFilter { label, status, issuer, budget: self.take("budget") })
    }

    /// The filter of a list of holds.
    ///
    /// # Errors
    /// `parameter_invalid`.
    pub fn hold_state(&mut self) -> Result<Option<String>, Refusal> {
        match self.take("state") {
            Some(state) if !["sending", "open", "doubt"].contains(&state.as_str()) => {
                Err(invalid("state", "must be sending, open or doubt"))
            }
            state => Ok(state),
        }
    }

    /// The filters of a list of calls.
    ///
    /// # Errors
    /// `parameter_invalid`.
    pub fn calls(&mut self) -> Result<CallFilter, Refusal> {
        let state = match self.take("state") {
            None => None,
            Some(text) => Some(
                CallState::ALL
                    .into_iter()
                    .find(|state| state.as_str() == text)
                    .ok_or_else(|| invalid("state", "is not a state of calls"))?,
            ),
        };
        Ok(CallFilter {
            idempotency_key: self.take("idempotency_key"),
            customer: self.take("customer"),
            object_id: self.take("object_id"),
            state,
        })
    }

    /// The filters of the audit log.
    ///
    /// # Errors
    /// `parameter_invalid`.
    pub fn records(&mut self) -> Result<AuditFilter, Refusal> {
        let mut filter = AuditFilter::default();
        for field in RECORD_FIELDS {
            filter.equal.extend(self.take(field).map(|value| (*field, value)));
        }
        for map in RECORD_MAPS {
            let prefix = format!("{map}[");
            while let Some(at) =
                self.0.iter().position(|(name, _)| name.starts_with(&prefix) && name.ends_with(']'))
            {
                let (name, value) = self.0.remove(at);
                let inner = name[prefix.len()..name.len() - 1].to_owned();
                filter.within.push((*map, inner, value));
            }
        }
        filter.since = self.instant("since")?;
        filter.until = self.instant("until")?;
        filter.all_events = match self.take("events").as_deref() {
            None => false,
            Some("all") => true,
            Some(_) => return Err(invalid("events", "must be \"all\"")),
        };
        filter.ascending = match self.take("order").as_deref() {
            None | Some("desc") => false,
            Some("asc") => true,
            Some(_) => return Err(invalid("order", "must be asc or desc")),
        };
        if self.take("fleet").is_some() {
            return Err(invalid("fleet", "needs a collector, which this version does not have"));
        }
        Ok(filter)
    }

    fn instant(&mut self, name: &str) -> Result<Option<UnixMs>, Refusal> {
        match self.take(name) {
            None => Ok(None),
            Some(text) => UnixMs::parse(&text)
                .map(Some)
                .ok_or_else(|| invalid(name, "must be RFC 3339, such as 2026-07-01T00:00:00Z")),
        }
    }

    /// Refuses what nobody took.
    ///
    /// # Errors
    /// `parameter_invalid`.
    pub fn finish(self) -> Result<(), Refusal> {
        match self.0.first() {
            None => Ok(()),
            Some((name, _)) => Err(invalid(name, "is not a known filter")),
        }
    }
}
