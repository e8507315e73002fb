//! The audit record: its fields, the bytes that are hashed, and the chain.
//!
//! # The bytes
//!
//! A record's bytes are one JSON object without white space, its fields in the order of [`FIELDS`], those that do not
//! apply left out (a reader shows them as `null`), strings in UTF-8 with only `"`, `\` and control characters escaped
//! (`\b \t \n \f \r`, else `\u00xx`). `prev_hash` is the `hash` of the record before, 64 zeros for the first. `hash` is
//! SHA-256 over exactly these bytes, in lower-case hexadecimal, and is not part of them. In Python:
//!
//! ```python
//! kept = {name: record[name] for name in FIELDS if record[name] is not None}
//! bytes_ = json.dumps(kept, separators=(",", ":"), ensure_ascii=False).encode()
//! assert hashlib.sha256(bytes_).hexdigest() == record["hash"]
//! ```
//!
//! Record 1 of a chain is the event `chain_started`; it names the ledger. `seq` starts at 1 and has no gaps.
//!
//! Pure: no clock, no storage. Never in a record: a key, a card number, a body.
#![deny(clippy::arithmetic_side_effects, clippy::as_conversions)]

#[cfg(test)]
mod properties;
pub mod words;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use sha2::{Digest as _, Sha256};

use crate::id::{from_hex, hex};

/// The fields of a record, in the order in which they are hashed.
pub const FIELDS: &[&str] = &[
    "seq",
    "ledger_id",
    "node",
    "at",
    "event",
    "call_id",
    "hold_id",
    "request_id",
    "key_id",
    "issuer_id",
    "label",
    "metadata",
    "method",
    "endpoint",
    "decision",
    "code",
    "outcome",
    "amount",
    "currency",
    "usd",
    "idempotency_key",
    "customer",
    "object_id",
    "stripe_metadata",
    "stripe_request_id",
    "upstream_status",
    "duration_ms",
    "count",
    "flags",
    "actor",
    "detail",
    "chain_id",
    "prev_hash",
];

/// The `prev_hash` of a chain's first record.
pub const FIRST_PREV_HASH: [u8; 32] = [0; 32];

/// What is told of one event. Everything but the place in the chain, which the ledger adds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// RFC 3339, UTC.
    pub at: String,
    /// What happened.
    pub event: Event,
    /// The call.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub call_id: Option<String>,
    /// Its hold.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hold_id: Option<String>,
    /// The `Request-Id` that the caller saw, or ours until one is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub request_id: Option<String>,
    /// The vault key.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key_id: Option<String>,
    /// Who minted it, when not the admin.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub issuer_id: Option<String>,
    /// Its label.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub label: Option<String>,
    /// Its metadata.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub metadata: Option<Map<String, Value>>,
    /// The HTTP method.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub method: Option<String>,
    /// The concrete path.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<String>,
    /// What was decided.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub decision: Option<Decision>,
    /// The refusal's code.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub code: Option<String>,
    /// What became of the money.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub outcome: Option<RecordedOutcome>,
    /// Minor units.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub amount: Option<u64>,
    /// Of `amount`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub currency: Option<String>,
    /// Decimal dollars.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usd: Option<String>,
    /// The key that Stripe sees.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub idempotency_key: Option<String>,
    /// The `customer` parameter.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub customer: Option<String>,
    /// The object at Stripe.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub object_id: Option<String>,
    /// The caller's `metadata` parameters.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stripe_metadata: Option<Map<String, Value>>,
    /// Stripe's `Request-Id`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stripe_request_id: Option<String>,
    /// Stripe's status.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub upstream_status: Option<u16>,
    /// From acceptance to the decision, milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub duration_ms: Option<u64>,
    /// How many equal events this one record stands for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub count: Option<u64>,
    /// Remarks: `over_hold`, `restart`, `resend`, `others` (refusals that are not told apart any more).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub flags: Option<Vec<String>>,
    /// Who did it, for admin events.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub actor: Option<String>,
    /// What was before and after, and why, for admin events; the figures of a cap that was exceeded.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub detail: Option<Map<String, Value>>,
}

/// What happened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Event {
    /// The first record of a chain.
    #[default]
    ChainStarted,
    /// A money call was reserved.
    Admitted,
    /// Its outcome is known, or known to be pending.
    Settled,
    /// It was proven not executed.
    Voided,
    /// Its outcome is unknown.
    Doubt,
    /// A doubt ended.
    Resolved,
    /// A remembered answer was given again.
    Replayed,
    /// A request waited for an equal one and got its answer.
    Joined,
    /// A request was refused.
    Refused,
    /// A call that moves no money was passed on.
    Forwarded,
    /// A vault key was made.
    KeyIssued,
    /// A vault key was revoked.
    KeyRevoked,
    /// An issuer key was made.
    IssuerCreated,
    /// An issuer key was revoked.
    IssuerRevoked,
    /// A cap refusal stopped a budget.
    BudgetStopped,
    /// An operator resumed a budget.
    BudgetResumed,
    /// The kill switch was turned on or off.
    KillSwitch,
    /// The ledger was bound to a Stripe account.
    AccountBound,
    /// An operator lowered the clock's high-water mark.
    ClockLowered,
    /// An operator took a call back, so that it can be made again.
    CallForgotten,
}

impl Event {
    /// Whether a later event of the same call takes its place in a list of calls.
    pub fn is_of_a_call(self) -> bool {
        match self {
            Self::Admitted | Self::Settled | Self::Voided | Self::Doubt | Self::Resolved => true,
            Self::ChainStarted
            | Self::Replayed
            | Self::Joined
            | Self::Refused
            | Self::Forwarded
            | Self::KeyIssued
            | Self::KeyRevoked
            | Self::IssuerCreated
            | Self::IssuerRevoked
            | Self::BudgetStopped
            | Self::BudgetResumed
            | Self::KillSwitch
            | Self::AccountBound
            | Self::ClockLowered
            | Self::CallForgotten => false,
        }
    }
}

/// What was decided about a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Decision {
    /// Passed on to Stripe.
    Forwarded,
    /// Answered from memory.
    Replayed,
    /// Not passed on.
    Refused,
}

/// What became of the money.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RecordedOutcome {
    /// Reserved; being sent.
    Held,
    /// Executed.
    Spent,
    /// Nothing left this machine.
    NotSent,
    /// The customer's bank said no.
    Declined,
    /// Not final at Stripe.
    Pending,
    /// Unknown.
    Doubt,
    /// No money is meant.
    None,
}

/// Where a record stands in its chain.
#[derive(Clone, Debug)]
pub struct Place<'a> {
    /// Counted from 1.
    pub seq: u64,
    /// The ledger.
    pub ledger_id: &'a str,
    /// The sidecar's label.
    pub node: &'a str,
    /// The chain.
    pub chain_id: &'a str,
    /// The hash of the record before.
    pub prev_hash: [u8; 32],
}

#[derive(Serialize)]
struct Hashed<'a> {
    seq: u64,
    ledger_id: &'a str,
    node: &'a str,
    #[serde(flatten)]
    entry: &'a Entry,
    chain_id: &'a str,
    prev_hash: String,
}

/// A record as it is kept: the hashed bytes and their hash.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sealed {
    /// The bytes.
    pub bytes: Vec<u8>,
    /// Their SHA-256.
    pub hash: [u8; 32],
}

/// Puts an entry into its place.
pub fn seal(place: &Place<'_>, entry: &Entry) -> Sealed {
    let hashed = Hashed {
        seq: place.seq,
        ledger_id: place.ledger_id,
        node: place.node,
        entry,
        chain_id: place.chain_id,
        prev_hash: hex(&place.prev_hash),
    };
    // Strings, integers and maps with string keys always serialise.
    let bytes = serde_json::to_vec(&hashed).unwrap_or_default();
    let hash = Sha256::digest(&bytes).into();
    Sealed { bytes, hash }
}

impl Sealed {
    /// The record as readers get it: every field, `null` where it does not apply, and its hash.
    pub fn to_json(&self) -> Map<String, Value> {
        let mut kept: Map<String, Value> = serde_json::from_slice(&self.bytes).unwrap_or_default();
        let mut shown: Map<String, Value> = FIELDS
            .iter()
            .map(|field| ((*field).to_owned(), kept.remove(*field).unwrap_or(Value::Null)))
            .collect();
        shown.insert("hash".to_owned(), Value::String(hex(&self.hash)));
        shown
    }
}

/// What a line says between the hashed bytes and the hash.
const LINE_HASH: &str = ",\"hash\":\"";
/// What ends a line.
const LINE_END: &str = "\"}";

impl Sealed {
    /// The record as one line of JSON that holds the very bytes that were hashed: they, with `hash` as one more field at
    /// their end. So records travel.
    pub fn to_line(&self) -> Vec<u8> {
        let open = self.bytes.strip_suffix(b"}").unwrap_or(&self.bytes);
        [open, LINE_HASH.as_bytes(), hex(&self.hash).as_bytes(), LINE_END.as_bytes()].concat()
    }

    /// Takes such a line apart; `None` when it is none. Whether the hash is that of the bytes is not asked.
    pub fn from_line(line: &[u8]) -> Option<Self> {
        let rest = line.strip_suffix(LINE_END.as_bytes())?;
        let (open, hash) = rest.split_at_checked(rest.len().checked_sub(64)?)?;
        let open = open.strip_suffix(LINE_HASH.as_bytes())?;
        let hash = from_hex(std::str::from_utf8(hash).ok()?)?.try_into().ok()?;
        Some(Self { bytes: [open, b"}"].concat(), hash })
    }
}

/// Why a chain is broken at a record.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Broken {
    /// Not a record.
    #[error("record {seq} cannot be read")]
    Unreadable {
        /// The record that was expected.
        seq: u64,
    },
    /// A record is missing, doubled or moved.
    #[error("record {seq} is missing or out of place")]
    OutOfPlace {
        /// The record that was expected.
        seq: u64,
    },
    /// It does not continue the record before.
    #[error("record {seq} does not continue the record before it")]
    Detached {
        /// The record.
        seq: u64,
    },
    /// Its bytes are not those that were hashed.
    #[error("record {seq} was changed after it was written")]
    Changed {
        /// The record.
        seq: u64,
    },
}

impl Broken {
    /// The first bad record.
    pub fn seq(&self) -> u64 {
        match self {
            Self::Unreadable { seq }
            | Self::OutOfPlace { seq }
            | Self::Detached { seq }
            | Self::Changed { seq } => *seq,
        }
    }
}

/// Follows a chain record by record, and over to the next one of the same ledger, which names it.
#[derive(Clone, Debug)]
pub struct Verifier {
    next_seq: u64,
    head: [u8; 32],
    chain_id: Option<String>,
    followed: u64,
}

impl Default for Verifier {
    fn default() -> Self {
        Self::from_record(1, FIRST_PREV_HASH)
    }
}

impl Verifier {
    /// A verifier that begins in the middle of a chain, trusting the first record's `prev_hash`.
    pub fn from_record(seq: u64, prev_hash: [u8; 32]) -> Self {
        Self { next_seq: seq, head: prev_hash, chain_id: None, followed: 0 }
    }

    /// How many records were followed.
    pub fn records(&self) -> u64 {
        self.followed
    }

    /// The hash of the last record.
    pub fn head(&self) -> [u8; 32] {
        self.head
    }

    /// Follows one stored record.
    ///
    /// # Errors
    /// [`Broken`] names the first record that does not hold.
    pub fn follow(&mut self, sealed: &Sealed) -> Result<(), Broken> {
        let record: Map<String, Value> =
            serde_json::from_slice(&sealed.bytes).map_err(|_| Broken::Unreadable { seq: self.next_seq })?;
        if self.is_next_chain(&record) {
            (self.next_seq, self.head) = (1, FIRST_PREV_HASH);
        }
        let seq = self.next_seq;
        if record.get("seq").and_then(Value::as_u64) != Some(seq) {
            return Err(Broken::OutOfPlace { seq });
        }
        if record.get("prev_hash").and_then(Value::as_str) != Some(hex(&self.head).as_str()) {
            return Err(Broken::Detached { seq });
        }
        let hash: [u8; 32] = Sha256::digest(&sealed.bytes).into();
        if hash != sealed.hash {
            return Err(Broken::Changed { seq });
        }
        self.head = hash;
        self.next_seq = seq.saturating_add(1);
        self.chain_id = record.get("chain_id").and_then(Value::as_str).map(str::to_owned);
        self.followed = self.followed.saturating_add(1);
        Ok(())
    }

    /// Whether a record starts a chain and says that it comes after exactly what was followed so far.
    fn is_next_chain(&self, record: &Map<String, Value>) -> bool {
        let before = record.get("detail").and_then(|detail| detail.get("before"));
        let text = |name: &str| before?.get(name)?.as_str();
        self.next_seq > 1
            && self.chain_id.is_some()
            && record.get("seq").and_then(Value::as_u64) == Some(1)
            && record.get("event").and_then(Value::as_str) == Some("chain_started")
            && text("chain_id") == self.chain_id.as_deref()
            && before.and_then(|before| before.get("seq")?.as_u64()) == self.next_seq.checked_sub(1)
    }

    /// Follows one exported record: a JSON object with every field and `hash`.
    ///
    /// # Errors
    /// [`Broken`] names the first record that does not hold.
    pub fn follow_json(&mut self, record: &Map<String, Value>) -> Result<(), Broken> {
        let seq = self.next_seq;
        let known = |name: &String| FIELDS.contains(&name.as_str()) || name == "hash";
        let hash = record.get("hash").and_then(Value::as_str).and_then(from_hex);
        let (Some(hash), true) = (hash.and_then(|hash| hash.try_into().ok()), record.keys().all(known))
        else {
            return Err(Broken::Unreadable { seq });
        };
        let kept: Map<String, Value> = FIELDS
            .iter()
            .filter_map(|field| record.get(*field).map(|value| ((*field).to_owned(), value.clone())))
            .filter(|(_, value)| !value.is_null())
            .collect();
        let bytes = serde_json::to_vec(&kept).map_err(|_| Broken::Unreadable { seq })?;
        self.follow(&Sealed { bytes, hash })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn chain(entries: &[Entry]) -> Vec<Sealed> {
        let mut prev_hash = FIRST_PREV_HASH;
        (1..)
            .zip(entries)
            .map(|(seq, entry)| {
                let place = Place { seq, ledger_id: "ledger_1", node: "n", chain_id: "c", prev_hash };
                let sealed = seal(&place, entry);
                prev_hash = sealed.hash;
                sealed
            })
            .collect()
    }

    fn entries() -> Vec<Entry> {
        let at = "2026-07-14T03:33:20.123Z".to_owned();
        vec![
            Entry { at: at.clone(), ..Entry::default() },
            Entry {
                at: at.clone(),
                event: Event::Settled,
                amount: Some(2999),
                customer: Some("cus_ü\"\n\u{1f}".into()),
                flags: Some(vec!["over_hold".into()]),
                outcome: Some(RecordedOutcome::Spent),
                ..Entry::default()
            },
            Entry { at, event: Event::Refused, ..Entry::default() },
        ]
    }

    #[test]
    fn the_hashed_bytes_are_fixed() {
        let bytes: Vec<String> =
            chain(&entries()).into_iter().map(|sealed| String::from_utf8(sealed.bytes).unwrap()).collect();
        expect_test::expect![[r#"
            {"seq":1,"ledger_id":"ledger_1","node":"n","at":"2026-07-14T03:33:20.123Z","event":"chain_started","chain_id":"c","prev_hash":"0000000000000000000000000000000000000000000000000000000000000000"}
            {"seq":2,"ledger_id":"ledger_1","node":"n","at":"2026-07-14T03:33:20.123Z","event":"settled","outcome":"spent","amount":2999,"customer":"cus_ü\"\n\u001f","flags":["over_hold"],"chain_id":"c","prev_hash":"63a2fc673a47436ac2e228cdb55fa7a9714a626661d6e697a96614e61a05ae1d"}
            {"seq":3,"ledger_id":"ledger_1","node":"n","at":"2026-07-14T03:33:20.123Z","event":"refused","chain_id":"c","prev_hash":"c8639716e84be4ad71d6434fa710cd62c05215a527c704fa11cbb17245b21298"}"#]].assert_eq(&bytes.join("\n"));
    }

    #[test]
    fn a_whole_chain_verifies_stored_and_exported() {
        let chain = chain(&entries());
        let (mut stored, mut exported) = (Verifier::default(), Verifier::default());
        for sealed in &chain {
            stored.follow(sealed).unwrap();
            exported.follow_json(&sealed.to_json()).unwrap();
        }
        assert_eq!(stored.records(), 3);
        assert_eq!(stored.head(), chain[2].hash);
        assert_eq!(exported.head(), chain[2].hash);
    }

    #[test]
    fn the_first_bad_record_is_named() {
        let whole = chain(&entries());
        let verdict = |records: &[Map<String, Value>]| {
            let mut verifier = Verifier::default();
            records.iter().try_for_each(|record| verifier.follow_json(record))
        };
        let exported: Vec<_> = whole.iter().map(Sealed::to_json).collect();
        let mut changed = exported.clone();
        changed[1]["amount"] = Value::from(1);
        assert_eq!(verdict(&changed), Err(Broken::Changed { seq: 2 }));
        let mut missing = exported.clone();
        missing.remove(1);
        assert_eq!(verdict(&missing), Err(Broken::OutOfPlace { seq: 2 }));
        let mut detached = exported.clone();
        detached[2]["prev_hash"] = Value::String("0".repeat(64));
        assert_eq!(verdict(&detached), Err(Broken::Detached { seq: 3 }));
        let mut foreign = exported;
        foreign[0].insert("smuggled".into(), Value::Bool(true));
        assert_eq!(verdict(&foreign), Err(Broken::Unreadable { seq: 1 }));
    }
}
