//! An audit log in a redb file: its records, what is asked of it, and nothing of whoever writes it.
//!
//! A record stands at a `place`, which orders the log: in a ledger its `seq`, in a file that takes in many chains the
//! order of arrival.
//!
//! | table | key | value |
//! |---|---|---|
//! | `audit` | place | SHA-256, then the hashed bytes |
//! | `audit_last` | call id | place of the call's last event; follows `audit` by a cursor |

use redb::{TableDefinition, WriteTransaction};
use serde_json::{Map, Value};

use crate::audit::Sealed;
use crate::id::CallId;
use crate::time::UnixMs;

type Bytes = &'static [u8];

pub(crate) const AUDIT: TableDefinition<'_, u64, Bytes> = TableDefinition::new("audit");
pub(crate) const AUDIT_LAST: TableDefinition<'_, &[u8; 16], u64> = TableDefinition::new("audit_last");

/// Why the log gave no answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum JournalError {
    /// It cannot be read or written.
    #[error("the log cannot be used: {0}")]
    Storage(String),
    /// A stored value is not what it should be.
    #[error("the log holds something that is no {0}")]
    Corrupt(&'static str),
}

macro_rules! storage_errors {
    ($($error:ty),*) => { $(
        impl From<$error> for JournalError {
            fn from(error: $error) -> Self {
                Self::Storage(error.to_string())
            }
        }
    )* };
}
storage_errors!(redb::TableError, redb::StorageError);

/// One page of a list.
#[derive(Clone, Debug)]
pub struct Page<T, C> {
    /// What was found.
    pub items: Vec<T>,
    /// Where the next page begins, when there may be more.
    pub next: Option<C>,
}

/// Which records to list.
#[derive(Clone, Debug, Default)]
pub struct AuditFilter {
    /// Top-level fields and the values that they must have.
    pub equal: Vec<(&'static str, String)>,
    /// Entries of `metadata` and `stripe_metadata`.
    pub within: Vec<(&'static str, String, String)>,
    /// Not before.
    pub since: Option<UnixMs>,
    /// Before.
    pub until: Option<UnixMs>,
    /// Every record instead of one row for each call.
    pub all_events: bool,
    /// Oldest first instead of newest first.
    pub ascending: bool,
    /// Only labels that start so.
    pub label_prefix: Option<String>,
}

impl AuditFilter {
    /// Whether a record is one of those that are asked for, but for its being the last of its call.
    pub fn matches(&self, record: &Map<String, Value>) -> bool {
        let text = |field: &str| record.get(field).and_then(Value::as_str);
        let at = text("at").and_then(UnixMs::parse).unwrap_or_default();
        let under_prefix = |prefix: &String| text("label").is_some_and(|label| label.starts_with(prefix));
        self.label_prefix.as_ref().is_none_or(under_prefix)
            && self.since.is_none_or(|since| at >= since)
            && self.until.is_none_or(|until| at < until)
            && self.equal.iter().all(|(field, wanted)| text(field) == Some(wanted))
            && self.within.iter().all(|(field, name, wanted)| {
                record.get(*field).and_then(|object| object.get(name)).and_then(Value::as_str) == Some(wanted)
            })
    }
}

/// Puts a record into its place. Nothing else is written here, so that whoever waits for the commit waits for one table:
/// the index follows by itself.
///
/// # Errors
/// [`JournalError::Storage`].
pub fn append(txn: &WriteTransaction, place: u64, sealed: &Sealed) -> Result<(), JournalError> {
    let stored = [sealed.hash.as_slice(), &sealed.bytes].concat();
    txn.open_table(AUDIT)?.insert(place, stored.as_slice())?;
    Ok(())
}

/// A stored record: its hash and the bytes that were hashed.
pub(crate) fn split_sealed(stored: &[u8]) -> Result<([u8; 32], &[u8]), JournalError> {
    stored
        .split_first_chunk::<32>()
        .map(|(hash, bytes)| (*hash, bytes))
        .ok_or(JournalError::Corrupt("record"))
}

pub(crate) fn sealed_of(stored: &[u8]) -> Result<Sealed, JournalError> {
    let (hash, bytes) = split_sealed(stored)?;
    Ok(Sealed { bytes: bytes.to_vec(), hash })
}

/// The call whose outcome a record tells; `None` for any other record.
pub(crate) fn call_of(record: &[u8]) -> Result<Option<CallId>, JournalError> {
    #[derive(serde::Deserialize)]
    struct Head<'a> {
        event: crate::audit::Event,
        #[serde(borrow)]
        call_id: Option<&'a str>,
    }
    let head: Head<'_> = serde_json::from_slice(record).map_err(|_| JournalError::Corrupt("record"))?;
    Ok(head.call_id.filter(|_| head.event.is_of_a_call()).and_then(CallId::parse))
}
