//! The catalogue of stored rows, and their codec.
//!
//! | table | key | value |
//! |---|---|---|
//! | `meta` | name | see [`meta`] |
//! | `keys` | key id | [`crate::key::Key`] |
//! | `key_digests` | SHA-256 of the secret | kind byte ([`KEY_KIND_VAULT`]), id |
//! | `issuers` | issuer id | [`crate::issuer::Issuer`] |
//! | `budgets` | digest of issuer and name | [`BudgetRow`], while the budget is stopped |
//! | `calls` | identity | [`crate::call::Call`] |
//! | `call_ids` | call id | identity |
//! | `answers` | call id | [`crate::call::StoredAnswer`] |
//! | `holds` | phase (0 live, 1 ended), hold id | [`crate::hold::Hold`] |
//! | `objects` | Stripe account (empty for one's own), object id | hold id |
//! | `counters` | subject kind, subject id, day (0 for all), lane | [`crate::ledger::counter::Counter`] |
//! | `due` | instant (ms), kind, id | nothing: when to look at it again |
//! | `refusals` | key id, code and what it was about, minute | [`RefusalRow`]: equal refusals that are not recorded one by one; without a code, how many are told apart |
//!
//! The audit log has tables of its own beside them, by `seq`: [`crate::journal`]. The write-ahead log
//! (`ledger/redb/wal.rs`) holds changes of these rows and of `audit`.
//!
//! Ids are big-endian, so tables are in the order of time. Every value that is not an id starts with a version byte;
//! the rest is CBOR with numbered fields, to which later versions may add.

use std::ops::Bound;

use minicbor::{Decode, Encode};
use redb::{Key, ReadOnlyTable, ReadTransaction, TableDefinition, WriteTransaction};
use sha2::{Digest as _, Sha256};

use crate::hold::{Lane, Subject};
use crate::journal;
use crate::ledger::LedgerError;
use crate::ledger::changes::Changes;
use crate::ledger::source::{Order, Source};
use crate::time::Day;

/// The version of all values written by this build.
const VALUE_VERSION: u8 = 1;
/// The format of a file that holds everything: it was closed.
pub const FORMAT_CLOSED: u32 = 1;
/// The format of a file that is in use, or was when the process ended: the write-ahead log beside it belongs to it. What
/// does not know that log must not open it.
pub const FORMAT_OPEN: u32 = 2;

/// Names of rows in `meta`.
pub mod meta {
    /// [`super::FORMAT_CLOSED`] or [`super::FORMAT_OPEN`].
    pub const FORMAT: &str = "format";
    /// Id of the ledger and of its chain.
    pub const LEDGER_ID: &str = "ledger_id";
    /// 32 random bytes for the digests of parameters.
    pub const SALT: &str = "salt";
    /// [`super::BindingRow`].
    pub const BINDING: &str = "binding";
    /// [`super::KillSwitchRow`], while it is on.
    pub const KILL_SWITCH: &str = "kill_switch";
    /// The highest time that was ever used.
    pub const CLOCK_MARK: &str = "clock_mark";
    /// Attempts first sent up to here are not sent again: the clock was set back after them, so nobody knows how long
    /// ago that was.
    pub const RESEND_FLOOR: &str = "resend_floor";
    /// [`super::AuditFloorRow`]: what was deleted at the beginning of the chain.
    pub const AUDIT_FLOOR: &str = "audit_floor";
    /// [`super::ChainRow`]: the chain that is written now, when it is not the first one.
    pub const CHAIN: &str = "chain";
    /// The place of the last record that a collector acknowledged.
    pub const SHIPPED_TO: &str = "shipped_to";
    /// [`super::LossRow`], from when a collector was seen to know more than this ledger until an operator accepts it.
    pub const LOSS: &str = "loss";
    /// What each sidecar has for itself, where several have a ledger together.
    pub(crate) const OWN: &[&str] = &[CLOCK_MARK, AUDIT_FLOOR, CHAIN, SHIPPED_TO, LOSS];
    /// [`super::WalRow`]: how far the file has taken in its write-ahead log.
    pub const WAL: &str = "wal";
}

pub(crate) type Bytes = &'static [u8];
pub(crate) type Id = &'static [u8; 16];

/// A table. Its number names it in the write-ahead log, and is never given to another one.
pub(crate) struct Table<K: Key + 'static, V: redb::Value + 'static> {
    pub(crate) number: u8,
    pub(crate) definition: TableDefinition<'static, K, V>,
    pub(crate) of: fn(&Tables) -> &ReadOnlyTable<K, V>,
    /// What keeps other processes from a row, where several have a ledger together.
    pub(crate) lock: for<'k> fn(&K::SelfType<'k>) -> Lock,
}

/// What has to be locked before a row is looked at or written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lock {
    /// Nothing: it never changes, it goes with another row that is locked, or only one process writes it.
    Nothing,
    /// Before it is written.
    ToWrite(u32),
    /// Before it is looked at by whoever may write.
    Always(u32),
}

/// How many locks there are. Rows that share one wait for each other without need, and that is all.
pub(crate) const LOCKS: u32 = 1 << 18;

/// The lock of a thing. Every version of this program must come to the same one.
fn lock_of(kind: u8, parts: &[&[u8]]) -> u32 {
    let mut digest = Sha256::new_with_prefix([kind]);
    for part in parts {
        digest.update(part.len().to_le_bytes());
        digest.update(part);
    }
    let digest = digest.finalize();
    digest.first_chunk().map_or(0, |first| u32::from_le_bytes(*first)) % LOCKS
}

/// That of whoever may spend: its row, its counters, and what is counted of its refusals.
fn lock_of_subject(id: &[u8; 16]) -> Lock {
    Lock::Always(lock_of(0, &[id]))
}

/// A row as it is stored.
#[expect(
    clippy::needless_pass_by_value,
    clippy::unnecessary_wraps,
    reason = "what a source wants of who reads it"
)]
fn bytes_of<K: Key, V: redb::Value>(
    key: K::SelfType<'_>,
    value: V::SelfType<'_>,
) -> Result<(Vec<u8>, Vec<u8>), LedgerError> {
    Ok((K::as_bytes(&key).as_ref().to_vec(), V::as_bytes(&value).as_ref().to_vec()))
}

macro_rules! tables {
    ($($constant:ident = $number:literal, $field:ident: $key:ty => $value:ty, $definition:expr, $lock:expr;)*) => {
        $(pub(crate) const $constant: Table<$key, $value> =
            Table { number: $number, definition: $definition, of: |tables| &tables.$field, lock: $lock };)*

        /// How many tables there are.
        pub(crate) const TABLES: usize = [$($number),*].len();

        /// Their names, by their numbers.
        pub(crate) const TABLE_NAMES: [&str; TABLES] = [$(stringify!($field)),*];

        /// All tables of one snapshot.
        pub(crate) struct Tables {
            $($field: ReadOnlyTable<$key, $value>,)*
        }

        /// Goes through the rows of all tables, as bytes, by the number of their table.
        pub(crate) fn each_row(
            source: Source<'_>,
            mut each: impl FnMut(usize, Vec<u8>, Vec<u8>) -> Result<(), LedgerError>,
        ) -> Result<(), LedgerError> {
            $(for row in source.range(&$constant, all(), Order::Ascending, None, bytes_of::<$key, $value>)? {
                let (key, value) = row?;
                each($number, key, value)?;
            })*
            Ok(())
        }

        impl Tables {
            pub(crate) fn open(txn: &ReadTransaction) -> Result<Self, LedgerError> {
                Ok(Self { $($field: txn.open_table($constant.definition)?,)* })
            }

            /// Makes those that are missing.
            pub(crate) fn create(txn: &WriteTransaction) -> Result<(), LedgerError> {
                $(txn.open_table($constant.definition)?;)*
                Ok(())
            }

            /// Writes changes to where they belong.
            pub(crate) fn write(changes: &Changes, txn: &WriteTransaction) -> Result<(), LedgerError> {
                $(changes.write(&$constant, txn)?;)*
                Ok(())
            }
        }
    };
}

tables! {
    META = 0, meta: &'static str => Bytes, TableDefinition::new("meta"),
        |name| {
            if meta::OWN.contains(name) { Lock::Nothing } else { Lock::ToWrite(lock_of(1, &[name.as_bytes()])) }
        };
    KEYS = 1, keys: Id => Bytes, TableDefinition::new("keys"), |id| lock_of_subject(id);
    KEY_DIGESTS = 2, key_digests: &'static [u8; 32] => (u8, Id), TableDefinition::new("key_digests"), |_| Lock::Nothing;
    ISSUERS = 3, issuers: Id => Bytes, TableDefinition::new("issuers"), |id| lock_of_subject(id);
    BUDGETS = 4, budgets: Id => Bytes, TableDefinition::new("budgets"), |id| lock_of_subject(id);
    CALLS = 5, calls: &'static [u8; 32] => Bytes, TableDefinition::new("calls"),
        |identity| Lock::Always(lock_of(2, &[identity.as_slice()]));
    CALL_IDS = 6, call_ids: Id => &'static [u8; 32], TableDefinition::new("call_ids"), |_| Lock::Nothing;
    ANSWERS = 7, answers: Id => Bytes, TableDefinition::new("answers"), |_| Lock::Nothing;
    HOLDS = 8, holds: (u8, Id) => Bytes, TableDefinition::new("holds"),
        |(_, id)| Lock::Always(lock_of(3, &[id.as_slice()]));
    OBJECTS = 9, objects: (&'static str, &'static str) => Id, TableDefinition::new("objects"),
        |(account, object)| Lock::Always(lock_of(4, &[account.as_bytes(), object.as_bytes()]));
    COUNTERS = 10, counters: (u8, Id, u32, u8) => Bytes, TableDefinition::new("counters"),
        |(_, id, _, _)| lock_of_subject(id);
    DUE = 11, due: (u64, u8, Id) => (), TableDefinition::new("due"), |_| Lock::Nothing;
    REFUSALS = 12, refusals: (Id, &'static str, u64) => Bytes, TableDefinition::new("refusals"),
        |(id, _, _)| lock_of_subject(id);
    AUDIT = 13, audit: u64 => Bytes, journal::AUDIT, |_| Lock::Nothing;
}

/// In `key_digests`: the id is a vault key's.
pub const KEY_KIND_VAULT: u8 = 0;
/// In `key_digests`: the id is an issuer key's.
pub const KEY_KIND_ISSUER: u8 = 1;
/// In `due`: look at a call.
pub const DUE_CALL: u8 = 0;
/// In `due`: look at a key.
pub const DUE_KEY: u8 = 1;
/// In `due`: look at an ended hold.
pub const DUE_HOLD: u8 = 2;
/// In `holds`: still counted as held.
pub const PHASE_LIVE: u8 = 0;
/// In `holds`: spent or void.
pub const PHASE_ENDED: u8 = 1;

/// How far a file has taken in the write-ahead log beside it.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct WalRow {
    /// The run of the process whose log it is.
    #[n(0)]
    pub epoch: minicbor::bytes::ByteArray<16>,
    /// The number of the last frame that is in the file.
    #[n(1)]
    pub applied: u64,
}

/// To which Stripe account and mode a ledger is bound.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct BindingRow {
    /// `acct_…`; `None` until Stripe told.
    #[n(0)]
    pub account: Option<String>,
    /// `test` or `live`.
    #[n(1)]
    pub mode: String,
    /// SHA-256 of the Stripe key with which the account was verified last.
    #[n(2)]
    pub verified_key: Option<minicbor::bytes::ByteArray<32>>,
}

/// Who stopped everything, and why.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct KillSwitchRow {
    /// Since when.
    #[n(0)]
    pub since: crate::time::UnixMs,
    /// The operator's reason.
    #[n(1)]
    pub reason: String,
}

/// Why a budget is stopped.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct BudgetRow {
    /// Since when.
    #[n(0)]
    pub since: crate::time::UnixMs,
    /// The budget's name.
    #[n(1)]
    pub name: String,
    /// The code of the refusal that stopped it.
    #[n(2)]
    pub code: String,
}

/// Where the kept part of the chain begins.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct AuditFloorRow {
    /// The place of the first record that is kept.
    #[n(0)]
    pub seq: u64,
    /// The hash of the record before it.
    #[n(1)]
    pub prev_hash: minicbor::bytes::ByteArray<32>,
}

/// The chain that is written now. Records of earlier ones stand before it.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct ChainRow {
    /// Its id.
    #[n(0)]
    pub id: crate::id::LedgerId,
    /// The place before its record 1.
    #[n(1)]
    pub base: u64,
}

/// A collector holds records of this ledger that it does not have itself: it was restored from an old copy.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct LossRow {
    /// Since when that is known.
    #[n(0)]
    pub since: crate::time::UnixMs,
    /// The last record that the collector holds, or the first that contradicts.
    #[n(1)]
    pub collector_seq: u64,
}

/// Equal refusals within one minute, after the first.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct RefusalRow {
    /// How many are not recorded yet.
    #[n(0)]
    pub count: u64,
    /// The entry of the last of them, as JSON.
    #[n(1)]
    pub entry: String,
}

/// From which row to which.
pub(crate) type Span<K> = (Bound<K>, Bound<K>);

/// Every row of a table.
pub(crate) fn all<K>() -> Span<K> {
    (Bound::Unbounded, Bound::Unbounded)
}

/// The live holds, in the order of their ids.
pub(crate) fn live_holds() -> Span<(u8, Id)> {
    (Bound::Included((PHASE_LIVE, &[0; 16])), Bound::Included((PHASE_LIVE, &[255; 16])))
}

/// A value's bytes.
pub fn encode<T: Encode<()>>(value: &T) -> Vec<u8> {
    let mut bytes = vec![VALUE_VERSION];
    // Writing to memory cannot fail.
    let _ = minicbor::encode(value, &mut bytes);
    bytes
}

/// Reads a value.
///
/// # Errors
/// [`LedgerError::Corrupt`] for an unknown version or anything that is not the value.
pub fn decode<T: for<'b> Decode<'b, ()>>(bytes: &[u8]) -> Result<T, LedgerError> {
    let corrupt = || LedgerError::Corrupt(std::any::type_name::<T>());
    let (version, value) = bytes.split_first().ok_or_else(corrupt)?;
    if *version != VALUE_VERSION {
        return Err(corrupt());
    }
    minicbor::decode(value).map_err(|_| corrupt())
}

/// The key of a counter.
pub(crate) fn counter_key(subject: &Subject, day: Day, lane: Lane) -> (u8, [u8; 16], u32, u8) {
    let (kind, id) = match subject {
        Subject::Key(id) => (0, *id.as_bytes()),
        Subject::Issuer(id) => (1, *id.as_bytes()),
        Subject::Budget(id) => (2, *id.as_bytes()),
    };
    let lane = match lane {
        Lane::In => 0,
        Lane::Out => 1,
    };
    (kind, id, day.number(), lane)
}
