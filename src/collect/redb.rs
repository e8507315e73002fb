//! The store of one collector: one redb file. One writer thread commits for all batches that wait; reads run beside it, on
//! snapshots.
//!
//! | table | key | value |
//! |---|---|---|
//! | [`crate::journal`]'s | | records by place of arrival, their indexes |
//! | `chains` | chain id | [`Chain`], as JSON |
//! | `places` | chain number, seq | place of arrival |
//! | `arrivals` | hour | the first place of that hour |
//! | `evidence` | number | a batch that contradicted what was held, as JSON |
//!
//! A write that fails closes the file; the next batch opens it again.

use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use redb::{
    Database, Durability, ReadableDatabase as _, ReadableTable as _, ReadableTableMetadata as _,
    TableDefinition, TableError,
};
use serde_json::{Map, Value};
use tokio::sync::{mpsc, oneshot};

use crate::collect::chain::{self, Batch, Chain, Refused, Taken};
use crate::collect::store::{
    BATCHES_MAX, BATCHES_WAITING_MAX, CHAINS_MAX, DROP_EVERY_MS, DROP_ROWS, EVIDENCE_MAX, Following,
    Incoming, Reply, StoreError, Verdict, evidence_of, report_fork, report_new,
};
use crate::journal::{self, AuditFilter, JournalError, Page};
use crate::time::{Clock, HOUR_MS, UnixMs};

/// Records that one step of indexing takes, between two commits and while nobody waits.
const INDEX_ROWS: usize = 2_000;

const CHAINS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("chains");
const PLACES: TableDefinition<'_, (u32, u64), u64> = TableDefinition::new("places");
const ARRIVALS: TableDefinition<'_, u64, u64> = TableDefinition::new("arrivals");
const EVIDENCE: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("evidence");

macro_rules! storage_errors {
    ($($error:ty),*) => { $(
        impl From<$error> for StoreError {
            fn from(error: $error) -> Self {
                Self::Unavailable(error.to_string())
            }
        }
    )* };
}
storage_errors!(
    redb::TransactionError,
    TableError,
    redb::StorageError,
    redb::CommitError,
    redb::SetDurabilityError,
    JournalError
);

impl From<redb::DatabaseError> for StoreError {
    fn from(error: redb::DatabaseError) -> Self {
        if matches!(error, redb::DatabaseError::DatabaseAlreadyOpen) {
            Self::Locked
        } else {
            Self::Unavailable(error.to_string())
        }
    }
}

/// The handle.
#[derive(Clone, Debug)]
pub struct Store {
    file: Arc<OpenFile>,
    batches: mpsc::Sender<(Incoming, Reply)>,
}

/// The file, which is opened again after a failure.
#[derive(Debug)]
struct OpenFile {
    path: PathBuf,
    db: RwLock<Option<Arc<Database>>>,
}

impl Store {
    /// Opens or makes the file and starts the writer. Records are kept for `keep_days`.
    ///
    /// # Errors
    /// [`StoreError::Locked`] or [`StoreError::Unavailable`].
    pub fn open(path: &Path, clock: Clock, keep_days: u32) -> Result<Self, StoreError> {
        let file = Arc::new(OpenFile { path: path.to_owned(), db: RwLock::new(None) });
        file.db()?;
        let (batches, waiting) = mpsc::channel(BATCHES_WAITING_MAX);
        let writer = Writer { file: Arc::clone(&file), clock, keep_days, dropped_at: UnixMs::default() };
        std::thread::spawn(move || writer.run(waiting));
        Ok(Self { file, batches })
    }

    pub(super) async fn take(&self, incoming: Incoming) -> Result<Chain, StoreError> {
        let gone = || StoreError::Unavailable("its writer has stopped".to_owned());
        let (reply, answer) = oneshot::channel();
        self.batches.send((incoming, reply)).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }

    pub(super) fn chains(&self) -> Result<Vec<(String, Chain)>, StoreError> {
        let txn = self.file.db()?.begin_read()?;
        let table = match txn.open_table(CHAINS) {
            Ok(table) => table,
            Err(TableError::TableDoesNotExist(_)) => return Ok(Vec::new()),
            Err(error) => return Err(error.into()),
        };
        let rows = table.iter()?.map(|found| {
            let (id, bytes) = found?;
            Ok((id.value().to_owned(), chain_of(bytes.value())?))
        });
        rows.collect()
    }

    pub(super) fn query(
        &self,
        filter: &AuditFilter,
        after: Option<u64>,
        limit: usize,
    ) -> Result<Page<Map<String, Value>, u64>, StoreError> {
        Ok(journal::query(&self.file.db()?.begin_read()?, filter, after, limit)?)
    }

    pub(super) fn verify(&self, chain_id: &str, chain: &Chain) -> Result<Verdict, StoreError> {
        let txn = self.file.db()?.begin_read()?;
        let places = txn.open_table(PLACES)?;
        let mut following = Following::of(chain);
        for found in places.range((chain.number, 0)..=(chain.number, u64::MAX))? {
            let (at, place) = found?;
            let Some(sealed) = journal::get(&txn, place.value())? else { continue };
            if let Err(broken) = following.follow(at.value().1, &sealed) {
                return Ok(following.verdict(chain_id, Some(broken)));
            }
        }
        Ok(following.verdict(chain_id, None))
    }

    pub(super) fn evidence(&self, limit: usize) -> Result<Vec<Value>, StoreError> {
        let txn = self.file.db()?.begin_read()?;
        let table = match txn.open_table(EVIDENCE) {
            Ok(table) => table,
            Err(TableError::TableDoesNotExist(_)) => return Ok(Vec::new()),
            Err(error) => return Err(error.into()),
        };
        let rows = table.iter()?.rev().take(limit);
        rows.map(|found| Ok(serde_json::from_slice(found?.1.value()).unwrap_or_default())).collect()
    }
}

impl OpenFile {
    fn db(&self) -> Result<Arc<Database>, StoreError> {
        if let Some(db) = self.db.read().unwrap_or_else(PoisonError::into_inner).as_ref() {
            return Ok(Arc::clone(db));
        }
        let mut slot = self.db.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(db) = slot.as_ref() {
            return Ok(Arc::clone(db));
        }
        make_private(&self.path).map_err(|error| StoreError::Unavailable(error.to_string()))?;
        let db = Arc::new(journal::database().create(&self.path)?);
        *slot = Some(Arc::clone(&db));
        Ok(db)
    }

    /// After a failed write the library wants the file opened anew.
    fn close(&self) {
        *self.db.write().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

/// Makes the file before the store does, for the owner alone: it holds personal data.
fn make_private(path: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
    let file = std::fs::OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(path)?;
    file.set_permissions(std::fs::Permissions::from_mode(0o600))
}

struct Writer {
    file: Arc<OpenFile>,
    clock: Clock,
    keep_days: u32,
    dropped_at: UnixMs,
}

/// What a batch came to, told once it is durable.
type Told = (Reply, Result<Chain, StoreError>);

impl Writer {
    fn run(mut self, mut waiting: mpsc::Receiver<(Incoming, Reply)>) {
        let mut behind = true;
        loop {
            let mut batches = Vec::new();
            if behind {
                batches.extend(waiting.try_recv().ok());
            } else {
                match waiting.blocking_recv() {
                    Some(batch) => batches.push(batch),
                    None => return,
                }
            }
            while batches.len() < BATCHES_MAX
                && let Ok(batch) = waiting.try_recv()
            {
                batches.push(batch);
            }
            if !batches.is_empty() {
                self.commit(batches);
            } else if waiting.is_closed() {
                return;
            }
            behind = match self.look_after() {
                Ok(more) => more,
                Err(error) => {
                    tracing::error!(%error, "the indexes of the store cannot follow; they are tried again");
                    self.file.close();
                    false
                }
            };
        }
    }

    fn commit(&mut self, batches: Vec<(Incoming, Reply)>) {
        let (mut told, mut left) = (Vec::new(), batches.into_iter());
        let result = self.try_commit(&mut left, &mut told);
        if let Err(error) = &result {
            tracing::error!(%error, "records cannot be kept; their senders will send them again");
            self.file.close();
        }
        let failed = result.err();
        for (reply, verdict) in told {
            // A sender that has gone will ask again.
            let _ = reply.send(failed.clone().map_or(verdict, Err));
        }
        for (_, reply) in left {
            let failed = failed.clone();
            let _ = reply.send(Err(failed.unwrap_or(StoreError::Unavailable("not reached".to_owned()))));
        }
    }

    fn try_commit(
        &self,
        batches: &mut impl Iterator<Item = (Incoming, Reply)>,
        told: &mut Vec<Told>,
    ) -> Result<(), StoreError> {
        let db = self.file.db()?;
        let mut txn = db.begin_write()?;
        txn.set_durability(Durability::Immediate)?;
        let now = self.clock.now();
        note_arrival(&txn, now)?;
        for (incoming, reply) in batches.by_ref() {
            match take(&txn, &incoming, now) {
                Err(error @ (StoreError::Unavailable(_) | StoreError::Locked)) => {
                    told.push((reply, Err(error.clone())));
                    return Err(error);
                }
                verdict => told.push((reply, verdict)),
            }
        }
        Ok(txn.commit()?)
    }

    /// Indexes and deletes in bounded steps; says whether more is left.
    fn look_after(&mut self) -> Result<bool, StoreError> {
        let db = self.file.db()?;
        let mut txn = db.begin_write()?;
        // Lost in a crash, it is done again.
        txn.set_durability(Durability::None)?;
        let indexed = journal::index_step(&txn, INDEX_ROWS)?;
        let now = self.clock.now();
        let mut dropped = 0;
        if now.millis_since(self.dropped_at) >= DROP_EVERY_MS {
            dropped = self.drop_old(&txn, now)?;
            if dropped < DROP_ROWS {
                self.dropped_at = now;
            }
        }
        if indexed.rows == 0 && dropped == 0 {
            txn.abort()?;
        } else {
            txn.commit()?;
        }
        Ok(indexed.more || dropped == DROP_ROWS)
    }

    /// Deletes records that arrived before the time for which they are kept.
    fn drop_old(&self, txn: &redb::WriteTransaction, now: UnixMs) -> Result<usize, StoreError> {
        let kept_hours = u64::from(self.keep_days).saturating_mul(24);
        let first_kept = (now.millis() / HOUR_MS).saturating_sub(kept_hours);
        let below = {
            let mut arrivals = txn.open_table(ARRIVALS)?;
            let next = arrivals.range(first_kept..)?.next().transpose()?.map(|(_, place)| place.value());
            // The last record stays: the next one takes the place behind it, which the index has not seen.
            let last = journal::last_place_in(txn)?;
            let below = next.unwrap_or(last).min(last);
            arrivals.retain_in(..first_kept, |_, place| place >= below)?;
            below
        };
        let old = journal::first_in(txn, below, DROP_ROWS)?;
        let Some((last, _)) = old.last() else { return Ok(0) };
        let below = last.saturating_add(1);
        let (mut chains, mut places) = (txn.open_table(CHAINS)?, txn.open_table(PLACES)?);
        for (_, sealed) in &old {
            let fields: Map<String, Value> = serde_json::from_slice(&sealed.bytes).unwrap_or_default();
            let id = fields.get("chain_id").and_then(Value::as_str).unwrap_or_default();
            let seq = fields.get("seq").and_then(Value::as_u64).unwrap_or_default();
            let known = chains.get(id)?.map(|bytes| chain_of(bytes.value())).transpose()?;
            if let Some(mut chain) = known {
                places.remove((chain.number, seq))?;
                chain.first_seq = chain.first_seq.max(seq.saturating_add(1));
                put_chain(&mut chains, id, &chain)?;
            }
        }
        Ok(journal::drop_below(txn, below, DROP_ROWS)?)
    }
}

fn note_arrival(txn: &redb::WriteTransaction, now: UnixMs) -> Result<(), StoreError> {
    let mut arrivals = txn.open_table(ARRIVALS)?;
    let hour = now.millis() / HOUR_MS;
    if arrivals.get(hour)?.is_none() {
        arrivals.insert(hour, journal::last_place_in(txn)?.saturating_add(1))?;
    }
    Ok(())
}

fn take(txn: &redb::WriteTransaction, incoming: &Incoming, now: UnixMs) -> Result<Chain, StoreError> {
    let Incoming { batch, floor, backlog } = incoming;
    let id = batch.origin.chain_id.as_str();
    let mut chains = txn.open_table(CHAINS)?;
    let mut places = txn.open_table(PLACES)?;
    let before = chains.get(id)?.map(|bytes| chain_of(bytes.value())).transpose()?;
    let number = u32::try_from(chains.len()?).unwrap_or(u32::MAX);
    if before.is_none() && usize::try_from(number).is_ok_and(|number| number >= CHAINS_MAX) {
        return Err(Refused::Foreign.into());
    }
    let hash_of = |seq| -> Option<[u8; 32]> {
        let place = places.get((before.as_ref()?.number, seq)).ok()??.value();
        journal::get_in(txn, place).ok()?.map(|sealed| sealed.hash)
    };
    match chain::judge(before.as_ref(), number, batch, *floor, now, hash_of) {
        Ok(Taken { held, mut chain }) => {
            if before.is_none() {
                look_for_others(&chains, id, &chain)?;
            }
            chain.backlog = *backlog;
            for record in batch.records.iter().skip(held) {
                let place = journal::append_next(txn, &record.sealed)?;
                places.insert((chain.number, record.seq), place)?;
            }
            put_chain(&mut chains, id, &chain)?;
            Ok(chain)
        }
        Err(refused @ Refused::Forked(seq)) => {
            report_fork(batch, seq);
            if let Some(mut chain) = before {
                chain.forked_at = chain.forked_at.or(Some(seq));
                chain.last_seen = now.millis();
                put_chain(&mut chains, id, &chain)?;
            }
            keep_evidence(txn, batch, seq, now)?;
            Err(refused.into())
        }
        Err(refused) => Err(refused.into()),
    }
}

fn look_for_others(
    chains: &impl redb::ReadableTable<&'static str, &'static [u8]>,
    id: &str,
    chain: &Chain,
) -> Result<(), StoreError> {
    for found in chains.iter()? {
        let (other, bytes) = found?;
        if chain_of(bytes.value())?.node == chain.node {
            report_new(&chain.node, id, other.value());
            break;
        }
    }
    Ok(())
}

fn keep_evidence(
    txn: &redb::WriteTransaction,
    batch: &Batch,
    seq: u64,
    now: UnixMs,
) -> Result<(), StoreError> {
    let mut table = txn.open_table(EVIDENCE)?;
    if table.len()? >= EVIDENCE_MAX {
        return Ok(());
    }
    let last = table.last()?.map_or(0, |(number, _)| number.value());
    let (digest, kept) = evidence_of(batch, seq, now);
    let is_known = table.last()?.is_some_and(|(_, bytes)| {
        let kept: Value = serde_json::from_slice(bytes.value()).unwrap_or_default();
        kept["last_hash"] == digest
    });
    if is_known {
        return Ok(());
    }
    table.insert(last.saturating_add(1), kept.to_string().as_bytes())?;
    Ok(())
}

fn put_chain(table: &mut redb::Table<'_, &str, &[u8]>, id: &str, chain: &Chain) -> Result<(), StoreError> {
    // Strings and integers always serialise.
    let bytes = serde_json::to_vec(chain).unwrap_or_default();
    table.insert(id, bytes.as_slice())?;
    Ok(())
}

fn chain_of(bytes: &[u8]) -> Result<Chain, StoreError> {
    serde_json::from_slice(bytes).map_err(|_| StoreError::Unavailable("a chain cannot be read".to_owned()))
}
