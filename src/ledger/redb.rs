//! The ledger in a redb file with a write-ahead log: a batch loads, asks the rules, and is durable as one frame of the log;
//! the file takes it in later. What a reader sees is both.

pub(super) mod batch;
pub(crate) mod stopped;
pub(crate) mod upkeep;
pub(crate) mod view;
mod wal;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use minicbor::bytes::ByteArray;
use redb::backends::FileBackend;
use redb::{Database, Durability, ReadableDatabase, ReadableTable, StorageBackend, WriteTransaction};
use serde_json::{Map, Value};

use crate::id::LedgerId;
use crate::journal::{self, AuditFilter, JournalError, Page};
use crate::ledger::changes::{Change, Changes};
use crate::ledger::redb::view::{Tree, View};
use crate::ledger::redb::wal::Wal;
use crate::ledger::row::{self, AUDIT, BindingRow, FORMAT_CLOSED, FORMAT_OPEN, META, Tables, WalRow, meta};
use crate::ledger::source::Source;
use crate::ledger::tx::Tx;
use crate::ledger::{LedgerError, Opening};
use crate::time::{Clock, UnixMs};

macro_rules! storage_errors {
    ($($error:ty),*) => { $(
        impl From<$error> for LedgerError {
            fn from(error: $error) -> Self {
                Self::Unavailable(error.to_string())
            }
        }
    )* };
}
storage_errors!(
    redb::TransactionError,
    redb::TableError,
    redb::StorageError,
    redb::CommitError,
    redb::SetDurabilityError
);

impl From<JournalError> for LedgerError {
    fn from(error: JournalError) -> Self {
        match error {
            JournalError::Storage(why) => Self::Unavailable(why),
            JournalError::Corrupt(what) => Self::Corrupt(what),
        }
    }
}

impl From<redb::DatabaseError> for LedgerError {
    fn from(error: redb::DatabaseError) -> Self {
        if matches!(error, redb::DatabaseError::DatabaseAlreadyOpen) {
            Self::Locked
        } else {
            Self::Unavailable(error.to_string())
        }
    }
}

/// An open ledger file: the tree, the write-ahead log in front of it, and the changes that only the log has.
///
/// The writer alone makes changes: durable in the log, then seen by readers. Whoever settles takes them into the tree, one
/// at a time, while the writer goes on.
#[derive(Debug)]
pub struct RedbStore {
    view: RwLock<View>,
    wal: Mutex<Wal>,
    /// Held by whoever writes the tree.
    settling: Mutex<WalRow>,
    // Below what reads it: it closes last.
    db: Database,
    id: LedgerId,
    salt: [u8; 32],
    failure: Mutex<Option<String>>,
    /// The highest time that was ever used: the clock may not go back, or windows and remembered times would open again.
    mark: Arc<AtomicU64>,
    clock: Clock,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl RedbStore {
    pub(crate) fn open_file(path: &Path, opening: &Opening) -> Result<Self, LedgerError> {
        let failed = |error| LedgerError::Unavailable(format!("{}: {error}", path.display()));
        if !path.exists() {
            Self::create_file(path, opening, failed)?;
        }
        make_private(path).map_err(failed)?;
        // The store would take an empty file for a new one, and every call that it remembered would be made again.
        if std::fs::metadata(path).map_err(failed)?.len() == 0 {
            return Err(failed(std::io::Error::other(
                "the file is empty, and a ledger never is: restore it, or remove it to begin anew without memory",
            )));
        }
        let db = journal::database().open(path)?;
        let log = wal_path(path);
        let has_log = log.exists();
        make_private(&log).map_err(failed)?;
        let file = std::fs::File::options().read(true).write(true).open(&log).map_err(failed)?;
        let store = Self::open(db, Box::new(FileBackend::new(file)?), opening).map_err(|error| {
            if !matches!(error, LedgerError::Corrupt(WAL_MISSING)) {
                return error;
            }
            if !has_log {
                // Made a moment ago. Whether it goes or not, it is the one before that is missing.
                let _ = std::fs::remove_file(&log);
            }
            failed(std::io::Error::other(format!(
                "its last calls are in {}, which is not there or another ledger's: restore both files as they were, or \
                 remove both to begin anew without memory",
                log.display()
            )))
        })?;
        sync_folder_of(path).map_err(failed)?;
        Ok(store)
    }

    /// Makes a ledger under a name of its own, and gives it its name when it is whole: a file that was cut short while
    /// it was made could never be opened again.
    fn create_file(
        path: &Path,
        opening: &Opening,
        failed: impl Fn(std::io::Error) -> LedgerError,
    ) -> Result<(), LedgerError> {
        let fresh = path.with_extension(format!("{}.new", opening.fresh_id));
        let made = make_private(&fresh)
            .map_err(&failed)
            .and_then(|()| Self::create(&journal::database().create(&fresh)?, opening));
        if let Err(error) = made {
            // On a full disk each start would leave one more. Whether it goes or not, why it was not made is what matters.
            let _ = std::fs::remove_file(&fresh);
            return Err(error);
        }
        match std::fs::hard_link(&fresh, path) {
            Ok(()) => std::fs::remove_file(&fresh).map_err(&failed)?,
            // Whoever was faster keeps its own.
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
                std::fs::remove_file(&fresh).map_err(&failed)?;
            }
            // Not every file system has links.
            Err(_) => std::fs::rename(&fresh, path).map_err(&failed)?,
        }
        sync_folder_of(path).map_err(failed)
    }

    pub(crate) fn open_backend(
        tree: impl StorageBackend,
        log: impl StorageBackend,
        opening: &Opening,
    ) -> Result<Self, LedgerError> {
        Self::open(journal::database().create_with_backend(tree)?, Box::new(log), opening)
    }

    /// Lays down the first rows, when there are none. Answers the format of the file.
    fn create(db: &Database, opening: &Opening) -> Result<u32, LedgerError> {
        let txn = begin(db)?;
        // Before anything else is read: nothing else of a newer file needs to be readable.
        let found = stored_format(&txn)?;
        if let Some(found) = found.filter(|found| *found > FORMAT_OPEN) {
            return Err(LedgerError::NewerFormat { found, known: FORMAT_OPEN });
        }
        if let Some(found) = found
            && Tree::open(db).is_ok()
        {
            txn.abort()?;
            return Ok(found);
        }
        // An earlier build made each table when it first had a row for it.
        Tables::create(&txn)?;
        txn.commit()?;
        if let Some(found) = found {
            return Ok(found);
        }
        let view = View::of(Tree::open(db)?);
        let mut tx = Tx::open(Source::View(&view), opening, None)?;
        tx.create(opening, opening.clock.now())?;
        let txn = begin(db)?;
        Tables::write(&tx.into_changes(), &txn)?;
        txn.commit()?;
        Ok(FORMAT_CLOSED)
    }

    /// Makes what is missing, checks what is there, takes in what an earlier run left in the log, and turns what it was
    /// sending into doubts, all before anybody can ask.
    fn open(db: Database, log: Box<dyn StorageBackend>, opening: &Opening) -> Result<Self, LedgerError> {
        let format = Self::create(&db, opening)?;
        let tree = Tree::open(&db)?;
        let mut view = View::of(tree);
        let row: Option<WalRow> = view.get(&META, &meta::WAL, row::decode)?;
        let in_log = row.as_ref().filter(|_| format == FORMAT_OPEN).map(|row| *row.epoch);
        let mut applied = row.as_ref().map_or(0, |row| row.applied);
        if format == FORMAT_OPEN {
            (applied, view.recent) = left_in(&*log, row.as_ref())?;
        }
        let mut tx = Tx::open(Source::View(&view), opening, None)?;
        let now = opening.clock.now().max(tx.mark()?);
        tx.check_mode(opening)?;
        tx.note_clock(now, opening.clock.now())?;
        tx.doubt_orphans(opening.boot, now)?;
        let epoch = ByteArray::from(*opening.boot.as_bytes());
        let row = WalRow { epoch, applied };
        tx.put_meta(meta::WAL, &row);
        tx.put_meta(meta::FORMAT, &FORMAT_OPEN);
        let (id, salt) = (tx.ledger_id()?, tx.salt()?);
        let opened = tx.into_changes();
        Wal::lay_out(&*log)?;
        // Before the tree names it. Until then the tree names the one before, which the log names, too.
        let wal = Wal::begin(log, *row.epoch, in_log, applied)?;
        let txn = begin(&db)?;
        Tables::write(&view.recent, &txn)?;
        Tables::write(&opened, &txn)?;
        txn.commit()?;
        Ok(Self {
            view: RwLock::new(View::of(Tree::open(&db)?)),
            wal: Mutex::new(wal),
            settling: Mutex::new(row),
            db,
            id,
            salt,
            failure: Mutex::new(None),
            mark: Arc::new(AtomicU64::new(now.millis())),
            clock: opening.clock.clone(),
        })
    }

    /// The ledger's id.
    pub fn id(&self) -> LedgerId {
        self.id
    }

    /// The salt of its digests.
    pub fn salt(&self) -> &[u8; 32] {
        &self.salt
    }

    /// Why nothing can be written any more.
    pub fn failure(&self) -> Option<String> {
        locked(&self.failure).clone()
    }

    /// The time: the machine's clock, held where it was when that is set back.
    pub fn now(&self) -> UnixMs {
        let wall = self.clock.now();
        UnixMs::from_millis(self.mark.fetch_max(wall.millis(), Ordering::SeqCst)).max(wall)
    }

    /// All that is durable. Changes wait for whoever holds it, so it is let go of before anything slow.
    pub(crate) fn view(&self) -> RwLockReadGuard<'_, View> {
        self.view.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn view_mut(&self) -> RwLockWriteGuard<'_, View> {
        self.view.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Latches: from now on nothing is written, until the file is opened again.
    pub(super) fn fail(&self, error: &LedgerError) {
        let mut failure = locked(&self.failure);
        if failure.is_none() {
            tracing::error!(%error, "the ledger failed; nothing is admitted until it is opened again");
            *failure = Some(error.to_string());
        }
    }

    /// Makes changes durable, and then seen. What has no room in the log goes into the tree at once.
    fn keep(&self, changes: Changes) -> Result<(), LedgerError> {
        let frame = changes.encode()?;
        let mut wal = locked(&self.wal);
        // It may have been closed since the batch began.
        if let Some(why) = self.failure() {
            return Err(LedgerError::Unavailable(why));
        }
        if wal.append(&frame)? {
            self.view_mut().recent.join(changes);
            return Ok(());
        }
        drop(wal);
        self.settle_with(Some(&changes), |_| Ok(()))
    }

    /// Whether the log should be taken into the tree before it is full.
    pub(super) fn is_filling(&self) -> bool {
        locked(&self.wal).is_filling()
    }

    /// Takes everything that is durable so far into the tree.
    pub(crate) fn settle(&self) -> Result<(), LedgerError> {
        self.settle_with(None, |_| Ok(()))
    }

    /// Takes everything that is durable so far into the tree, then `more`, then does what `then` does with it, in one
    /// transaction. What only `then` fails at leaves the rest settled.
    pub(super) fn settle_with<T>(
        &self,
        more: Option<&Changes>,
        then: impl FnOnce(&WriteTransaction) -> Result<T, LedgerError>,
    ) -> Result<T, LedgerError> {
        let mut row = locked(&self.settling);
        if let Some(why) = self.failure() {
            return Err(LedgerError::Unavailable(why));
        }
        let settled = self.settle_in_turn(&mut row, more, then);
        if let Err(error @ LedgerError::Unavailable(_)) = &settled {
            self.fail(error);
        }
        settled
    }

    fn settle_in_turn<T>(
        &self,
        row: &mut WalRow,
        more: Option<&Changes>,
        then: impl FnOnce(&WriteTransaction) -> Result<T, LedgerError>,
    ) -> Result<T, LedgerError> {
        let txn = begin(&self.db)?;
        let (settling, applied) = {
            // Between a frame and its being seen there is no moment here.
            let mut wal = locked(&self.wal);
            let mut view = self.view_mut();
            if !view.settling.is_empty() {
                // It panicked on the way. Both halves are needed now, and the next start takes them in.
                let why = "its log was being taken in, and that was cut short";
                return Err(LedgerError::Unavailable(why.to_owned()));
            }
            view.settling = Arc::new(std::mem::take(&mut view.recent));
            (Arc::clone(&view.settling), wal.switch())
        };
        Tables::write(&settling, &txn)?;
        if let Some(more) = more {
            Tables::write(more, &txn)?;
        }
        let done = then(&txn);
        if let Err(LedgerError::Unavailable(_)) = &done {
            return done;
        }
        row.applied = applied;
        txn.open_table(META.definition)?.insert(meta::WAL, row::encode(row).as_slice())?;
        txn.commit()?;
        let tree = Tree::open(&self.db)?;
        let before = {
            let mut view = self.view_mut();
            view.settling = Arc::default();
            std::mem::replace(&mut view.tree, tree)
        };
        // Its pages are free again, once no reader has it any more.
        drop(before);
        done
    }

    /// Audit records; by default one row for each call, in its last outcome, and every other record.
    ///
    /// # Errors
    /// [`LedgerError`].
    pub fn audit(
        &self,
        filter: &AuditFilter,
        after: Option<u64>,
        limit: usize,
    ) -> Result<Page<Map<String, Value>, u64>, LedgerError> {
        // The log's own index knows the tree alone. One that cannot be written any more still tells what it has.
        if self.view().changed(&AUDIT) && self.failure().is_none() {
            self.settle()?;
        }
        let tree = Arc::clone(&self.view().tree);
        Ok(journal::query(&tree.txn, filter, after, limit)?)
    }

    /// Takes everything in, and notes that the log is not needed any more. Nothing is written from now on.
    pub(super) fn close(&self) -> Result<(), LedgerError> {
        let mut row = locked(&self.settling);
        {
            let mut failure = locked(&self.failure);
            if let Some(why) = &*failure {
                return Err(LedgerError::Unavailable(why.clone()));
            }
            *failure = Some("it is closed".to_owned());
        }
        self.settle_in_turn(&mut row, None, |txn| {
            txn.open_table(META.definition)?.insert(meta::FORMAT, row::encode(&FORMAT_CLOSED).as_slice())?;
            Ok(())
        })
    }
}

impl Drop for RedbStore {
    fn drop(&mut self) {
        // One that failed is left as it is: the next start looks at both files.
        if self.failure().is_none()
            && let Err(error) = self.close()
        {
            tracing::warn!(%error, "the ledger was not closed; the next start takes in its log");
        }
    }
}

/// In [`LedgerError::Corrupt`]: the file needs a log that is not there.
const WAL_MISSING: &str = "ledger with its write-ahead log";

/// What the log has and the tree does not: the number of its last frame, and all changes in one.
fn left_in(log: &dyn StorageBackend, row: Option<&WalRow>) -> Result<(u64, Changes), LedgerError> {
    let missing = LedgerError::Corrupt(WAL_MISSING);
    let Some(row) = row else { return Err(missing) };
    if !wal::epochs(log)?.contains(&Some(*row.epoch)) {
        return Err(missing);
    }
    let (mut last, mut changes) = (row.applied, Changes::default());
    for (number, frame) in wal::frames(log, &row.epoch)? {
        if number <= last {
            continue;
        }
        if last.checked_add(1) != Some(number) {
            return Err(missing);
        }
        last = number;
        changes.join(frame);
    }
    Ok((last, changes))
}

/// Where the write-ahead log of a ledger file is.
fn wal_path(path: &Path) -> PathBuf {
    path.with_extension("wal")
}

fn sync_folder_of(path: &Path) -> std::io::Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    std::fs::File::open(folder).and_then(|folder| folder.sync_all())
}

/// Looks into a ledger file that nobody has open, without changing what it says: its format and to whom it is bound.
///
/// # Errors
/// [`LedgerError::Locked`] while a sidecar runs on it, or whatever keeps it from being used.
pub fn inspect(path: &Path) -> Result<(u32, BindingRow), LedgerError> {
    let db = journal::database().open(path)?;
    let (format, changes) = stored_and_left(&db, path)?;
    if let Change::Put(binding) = changes.get(&META, meta::BINDING.as_bytes()) {
        return Ok((format, row::decode(binding)?));
    }
    let table = db.begin_read()?.open_table(META.definition)?;
    let binding = table.get(meta::BINDING)?.ok_or(LedgerError::Corrupt("binding"))?;
    Ok((format, row::decode(binding.value())?))
}

/// The format of a file, and what its write-ahead log has more than itself.
fn stored_and_left(db: &Database, path: &Path) -> Result<(u32, Changes), LedgerError> {
    let table = db.begin_read()?.open_table(META.definition)?;
    let format: u32 = match table.get(meta::FORMAT)? {
        Some(bytes) => row::decode(bytes.value())?,
        None => return Err(LedgerError::Corrupt("ledger")),
    };
    if format > FORMAT_OPEN {
        return Err(LedgerError::NewerFormat { found: format, known: FORMAT_OPEN });
    }
    if format < FORMAT_OPEN {
        return Ok((format, Changes::default()));
    }
    let row = table.get(meta::WAL)?.map(|bytes| row::decode(bytes.value())).transpose()?;
    let file = std::fs::File::open(wal_path(path))
        .map_err(|error| LedgerError::Unavailable(format!("{}: {error}", wal_path(path).display())))?;
    let (_, changes) = left_in(&FileBackend::new(file)?, row.as_ref())?;
    Ok((format, changes))
}

/// Makes the file before the store does, for the owner alone: it holds personal data.
fn make_private(path: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
    let file = std::fs::OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(path)?;
    file.set_permissions(std::fs::Permissions::from_mode(0o600))
}

fn begin(db: &Database) -> Result<WriteTransaction, LedgerError> {
    let mut txn = db.begin_write()?;
    txn.set_durability(Durability::Immediate)?;
    // After a kill nothing has to be walked through. No caller waits for what that costs a commit.
    txn.set_quick_repair(true);
    Ok(txn)
}

/// The format of the file; `None` when it is new.
fn stored_format(txn: &WriteTransaction) -> Result<Option<u32>, LedgerError> {
    let table = txn.open_table(META.definition)?;
    let found = table.get(meta::FORMAT)?;
    found.map(|bytes| row::decode(bytes.value())).transpose()
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use redb::backends::InMemoryBackend;

    use super::*;
    use crate::id::BootId;
    use crate::secret::Mode;

    fn opening() -> Opening {
        let now = UnixMs::from_millis(1_784_000_000_000);
        Opening {
            node: "node-1".to_owned(),
            mode: Mode::Test,
            clock: Clock::manual(now).0,
            boot: BootId::new(now, [1; 10]),
            fresh_id: LedgerId::new(now, [2; 10]),
            fresh_salt: [3; 32],
            audit_days: 400,
            ships: false,
        }
    }

    /// What was begun to be taken into the tree and was not is in the log alone: the next settling must not count it as
    /// taken in.
    #[test]
    fn a_settling_that_panicked_is_the_last_one() {
        let log = InMemoryBackend::new();
        log.set_len(64 << 10).unwrap();
        let store = RedbStore::open_backend(InMemoryBackend::new(), log, &opening()).unwrap();
        let mut changes = Changes::default();
        changes.put(&META, &"durable", &b"told".as_slice());
        store.keep(changes).unwrap();
        let panicked = catch_unwind(AssertUnwindSafe(|| {
            store.settle_with(None, |_| -> Result<(), LedgerError> { panic!("on purpose") })
        }));
        assert!(panicked.is_err());
        let told = || store.view().get(&META, &"durable", |told| Ok(told.to_vec())).unwrap();
        assert_eq!(told().as_deref(), Some(b"told".as_slice()));
        assert!(matches!(store.settle(), Err(LedgerError::Unavailable(_))));
        assert!(store.failure().is_some(), "nothing is written until the next start");
        assert_eq!(told().as_deref(), Some(b"told".as_slice()), "what is durable is seen");
    }
}
