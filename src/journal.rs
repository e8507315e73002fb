//! An audit log in a redb file: its records, what is asked of it, and nothing of whoever writes it.
//!
//! A record stands at a `place`, which orders the log: in a ledger its `seq`, in a file that takes in many chains the
//! order of arrival.
//!
//! | table | key | value |
//! |---|---|---|
//! | `audit` | place | SHA-256, then the hashed bytes |
//! | `audit_last` | call id | place of the call's last event |
//! | `audit_postings` | segment of the log; term, block of 4,096 places | which of them have the term |
//! | `audit_zones` | level, number | the earliest and the latest time of each of 64 stretches of the log |
//! | `audit_index` | name | number: up to which place the others follow `audit`, and by which rules they were made |
//!
//! Whoever writes a record writes `audit` alone; the rest is the index and follows in steps ([`index_step`]). What it does
//! not cover yet is read record by record, so that every answer is whole. It can be thrown away and made again.
//!
//! Why sets of 4,096 places and not a row for each record and term: most terms are those of very many records (an
//! endpoint, an outcome, a node), cost an eighth of a byte each so, and two of them are compared 4,096 places at a time.
//! A rare term costs one row either way; ids that nearly every record has of its own share lists for that reason.

mod bits;
mod fields;
mod index;
mod postings;
mod query;
mod terms;
mod zones;

use redb::{ReadTransaction, ReadableTable, TableDefinition, TableError, WriteTransaction};
use serde_json::{Map, Value};

use crate::audit::Sealed;
use crate::id::CallId;
use crate::time::UnixMs;

pub use index::{Indexed, drop_below, index_step};
pub use query::query;

type Bytes = &'static [u8];

/// By which rules this build makes the index: raised whenever a record gets other terms, or they other keys.
const INDEX_VERSION: u64 = 3;
/// In `audit_index`: [`INDEX_VERSION`] of whoever made it.
const VERSION: &str = "version";
/// In `audit_index`: the last place that it covers.
const INDEXED_TO: &str = "indexed_to";

pub(crate) const AUDIT: TableDefinition<'_, u64, Bytes> = TableDefinition::new("audit");
const AUDIT_LAST: TableDefinition<'_, &[u8; 16], u64> = TableDefinition::new("audit_last");
const POSTINGS: TableDefinition<'_, postings::Key, Bytes> = TableDefinition::new("audit_postings");
const ZONES: TableDefinition<'_, zones::Key, Bytes> = TableDefinition::new("audit_zones");
const INDEX: TableDefinition<'_, &str, u64> = TableDefinition::new("audit_index");

/// Pages of a file that are kept in memory at most. The system keeps more of them, and gives them up when it must.
const CACHE_BYTES: usize = 64 << 20;

/// How a file with a log in it is opened.
pub(crate) fn database() -> redb::Builder {
    let mut builder = redb::Builder::new();
    builder.set_cache_size(CACHE_BYTES);
    builder
}

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
storage_errors!(
    TableError,
    redb::StorageError,
    redb::TransactionError,
    redb::CommitError,
    redb::SetDurabilityError,
    redb::DatabaseError
);

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
        let at = time_of(record);
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

/// The record at a place.
///
/// # Errors
/// [`JournalError`].
pub fn get(txn: &ReadTransaction, place: u64) -> Result<Option<Sealed>, JournalError> {
    let Some(audit) = open(txn, AUDIT)? else { return Ok(None) };
    audit.get(place)?.map(|stored| sealed_of(stored.value())).transpose()
}

/// The first of these records: at most so many, and no more once they have so many bytes together, but one where there is
/// one.
///
/// # Errors
/// Whatever the rows fail with.
pub fn within<E>(
    rows: impl Iterator<Item = Result<(u64, Sealed), E>>,
    rows_max: usize,
    bytes_max: usize,
) -> Result<Vec<(u64, Sealed)>, E> {
    let (mut records, mut bytes) = (Vec::new(), 0);
    for found in rows.take(rows_max) {
        let (place, sealed) = found?;
        bytes += sealed.bytes.len();
        if bytes > bytes_max && !records.is_empty() {
            break;
        }
        records.push((place, sealed));
    }
    Ok(records)
}

/// The place of the last record; 0 when there is none.
///
/// # Errors
/// [`JournalError`].
pub fn last_place(txn: &ReadTransaction) -> Result<u64, JournalError> {
    let Some(audit) = open(txn, AUDIT)? else { return Ok(0) };
    Ok(audit.last()?.map_or(0, |(place, _)| place.value()))
}

/// A table that nobody has written yet is none.
fn open<K: redb::Key + 'static, V: redb::Value + 'static>(
    txn: &ReadTransaction,
    table: TableDefinition<'_, K, V>,
) -> Result<Option<redb::ReadOnlyTable<K, V>>, JournalError> {
    match txn.open_table(table) {
        Ok(table) => Ok(Some(table)),
        Err(TableError::TableDoesNotExist(_)) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// What a record can be found by, for an index that this module does not keep.
#[derive(Clone, Debug)]
pub struct Marks {
    /// Every filter that finds the record has only words of these ([`words_of`]). Short, without control characters.
    pub words: Vec<String>,
    /// The call whose outcome it tells; a later record of that call takes its place in a list of calls.
    pub call: Option<String>,
}

/// What a record can be found by.
///
/// # Errors
/// [`JournalError::Corrupt`] for what is no record.
pub fn marks_of(record: &[u8]) -> Result<Marks, JournalError> {
    let fields = fields::Fields::read(record)?;
    // An event that this build does not know is of no call that it could follow.
    let call = fields.call().ok().flatten().map(|call| call.to_string());
    Ok(Marks { words: terms::words_of_record(&fields), call })
}

/// The words that every record has that a filter finds. What it finds has to be compared all the same
/// ([`AuditFilter::matches`]).
pub fn words_of(filter: &AuditFilter) -> Vec<String> {
    terms::words_of_filter(filter)
}

/// When a record was written.
fn time_of(record: &Map<String, Value>) -> UnixMs {
    record.get("at").and_then(Value::as_str).and_then(UnixMs::parse).unwrap_or_default()
}

/// The last place, as a transaction that writes sees it; 0 when empty.
///
/// # Errors
/// [`JournalError`].
pub fn last_place_in(txn: &WriteTransaction) -> Result<u64, JournalError> {
    Ok(txn.open_table(AUDIT)?.last()?.map_or(0, |(place, _)| place.value()))
}

/// Puts a record behind the last one, and says where.
///
/// # Errors
/// [`JournalError`].
pub fn append_next(txn: &WriteTransaction, sealed: &Sealed) -> Result<u64, JournalError> {
    let place = last_place_in(txn)?.saturating_add(1);
    append(txn, place, sealed)?;
    Ok(place)
}

/// One record, as a transaction that writes sees it.
///
/// # Errors
/// [`JournalError`].
pub fn get_in(txn: &WriteTransaction, place: u64) -> Result<Option<Sealed>, JournalError> {
    let table = txn.open_table(AUDIT)?;
    let found = table.get(place)?;
    found.map(|stored| sealed_of(stored.value())).transpose()
}

/// The first records below a place, as a transaction that writes sees them.
///
/// # Errors
/// [`JournalError`].
pub fn first_in(
    txn: &WriteTransaction,
    below: u64,
    rows_max: usize,
) -> Result<Vec<(u64, Sealed)>, JournalError> {
    let table = txn.open_table(AUDIT)?;
    let rows = table.range(..below)?.take(rows_max).map(|found| {
        let (place, stored) = found?;
        Ok((place.value(), sealed_of(stored.value())?))
    });
    rows.collect()
}

/// The call of whose course a record tells.
pub(crate) fn call_of(sealed: &Sealed) -> Result<Option<CallId>, JournalError> {
    fields::Fields::read(&sealed.bytes)?.call()
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

#[cfg(test)]
mod tests;
