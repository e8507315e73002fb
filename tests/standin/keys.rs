//! Idempotency keys as v1 keeps them: per account, status and body of the first execution, for 24 hours.

use std::collections::{HashMap, VecDeque};

use bytes::Bytes;
use sha2::{Digest, Sha256};

use super::form::Params;

/// Longer keys are refused.
pub(crate) const KEY_CHARS_MAX: usize = 255;
/// "At least 24 hours" as published; the stand-in prunes at the earliest moment, which is the hardest case.
const KEEP_MS: u64 = 24 * 3_600_000;
/// Beyond this many the oldest are forgotten, so that a long benchmark does not eat the machine.
const KEYS_MAX: usize = 250_000;

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Slot {
    pub(crate) account: String,
    pub(crate) key: String,
}

/// What a request must share with the first one under its key.
#[derive(Clone, Debug)]
pub(crate) struct Print {
    /// The path, ids included, as Stripe's own message shows it.
    endpoint: String,
    parameters: [u8; 32],
}

impl Print {
    pub(crate) fn of(path: &str, params: &Params) -> Self {
        Self { endpoint: path.into(), parameters: Sha256::digest(params.canonical().as_bytes()).into() }
    }

    pub(crate) fn endpoint(&self) -> &str {
        &self.endpoint
    }
}

#[derive(Debug)]
struct Row {
    print: Print,
    first_use_ms: u64,
    original_request: String,
    /// None while the first request is still going through.
    result: Option<(u16, Bytes)>,
}

#[derive(Debug)]
pub(crate) enum Found {
    Nothing,
    InFlight,
    OtherEndpoint { first: String },
    OtherParameters,
    Result { status: u16, body: Bytes, original_request: String },
}

#[derive(Debug, Default)]
pub(crate) struct Keys {
    rows: HashMap<Slot, Row>,
    order: VecDeque<(u64, Slot)>,
}

impl Keys {
    /// Looks a key up; one that is due is pruned here, so that its next use is a new request.
    pub(crate) fn find(&mut self, slot: &Slot, print: &Print, now_ms: u64) -> Found {
        let Some(row) = self.rows.get(slot) else { return Found::Nothing };
        if row.result.is_some() && now_ms.saturating_sub(row.first_use_ms) >= KEEP_MS {
            self.rows.remove(slot);
            return Found::Nothing;
        }
        if row.print.endpoint != print.endpoint {
            return Found::OtherEndpoint { first: row.print.endpoint.clone() };
        }
        if row.print.parameters != print.parameters {
            return Found::OtherParameters;
        }
        match &row.result {
            None => Found::InFlight,
            Some((status, body)) => Found::Result {
                status: *status,
                body: body.clone(),
                original_request: row.original_request.clone(),
            },
        }
    }

    /// Execution begins: from here on the key is bound.
    pub(crate) fn begin(&mut self, slot: Slot, print: Print, now_ms: u64, original_request: String) {
        self.order.push_back((now_ms, slot.clone()));
        self.rows.insert(slot, Row { print, first_use_ms: now_ms, original_request, result: None });
        if self.order.len() > KEYS_MAX
            && let Some((first_use_ms, oldest)) = self.order.pop_front()
            && self.rows.get(&oldest).is_some_and(|row| row.first_use_ms == first_use_ms)
        {
            self.rows.remove(&oldest);
        }
    }

    /// The first result under a key stays, a 402 and a 500 too.
    pub(crate) fn store(&mut self, slot: &Slot, status: u16, body: Bytes) {
        if let Some(row) = self.rows.get_mut(slot) {
            row.result = Some((status, body));
        }
    }
}
