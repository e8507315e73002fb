//! A ledger file that no sidecar uses, with its write-ahead log: looked at whole, and not written.

use std::path::{Path, PathBuf};

use redb::Database;
use serde_json::{Map, Value};

use crate::id::LedgerId;
use crate::journal::{self, split_sealed};
use crate::ledger::redb::view::{Tree, View};
use crate::ledger::redb::{stored_and_left, sync_folder_of, wal_path};
use crate::ledger::row::{self, AUDIT, BindingRow, META, all, each_row, meta};
use crate::ledger::source::{Order, Source};
use crate::ledger::tx::Tx;
use crate::ledger::{LedgerError, Opening};

/// Such a file, kept from everybody else for as long as this is there.
pub(crate) struct Stopped {
    view: View,
    // Below what reads it: it closes last.
    _db: Database,
    path: PathBuf,
}

/// The last record of a file.
pub(crate) struct Last {
    /// Where it stands.
    pub(crate) place: u64,
    /// As it is stored.
    pub(crate) stored: Vec<u8>,
    /// The sidecar that wrote it.
    pub(crate) node: String,
}

impl Stopped {
    /// Opens a file that is there.
    ///
    /// # Errors
    /// [`LedgerError::Locked`] while a sidecar runs on it, or whatever keeps it from being read.
    pub(crate) fn open(path: &Path) -> Result<Self, LedgerError> {
        let db = journal::database().open(path)?;
        let (_, recent) = stored_and_left(&db, path)?;
        let view = View { recent, ..View::of(Tree::open(&db)?) };
        Ok(Self { view, _db: db, path: path.to_owned() })
    }

    pub(crate) fn id(&self) -> Result<LedgerId, LedgerError> {
        self.view.get(&META, &meta::LEDGER_ID, row::decode)?.ok_or(LedgerError::Corrupt("ledger id"))
    }

    pub(crate) fn binding(&self) -> Result<BindingRow, LedgerError> {
        self.view.get(&META, &meta::BINDING, row::decode)?.ok_or(LedgerError::Corrupt("binding"))
    }

    /// There is one from the first moment on.
    pub(crate) fn last(&self) -> Result<Last, LedgerError> {
        let mut rows = self.view.range(&AUDIT, all(), Order::Descending, None, |place, stored| {
            let (_, record) = split_sealed(stored)?;
            let record: Map<String, Value> =
                serde_json::from_slice(record).map_err(|_| LedgerError::Corrupt("record"))?;
            let node = record.get("node").and_then(Value::as_str).ok_or(LedgerError::Corrupt("record"))?;
            Ok(Last { place, stored: stored.to_vec(), node: node.to_owned() })
        })?;
        rows.next().ok_or(LedgerError::Corrupt("audit log"))?
    }

    /// Makes of its rows, in memory, what they are in a ledger that several sidecars have together, and of what was being
    /// sent doubts. Answers how many those are.
    pub(crate) fn move_out(&mut self, opening: &Opening) -> Result<usize, LedgerError> {
        let mut tx = Tx::open(Source::View(&self.view), opening, None)?;
        let now = opening.clock.now().max(tx.mark()?);
        let doubts = tx.move_out(opening, now)?;
        let changes = tx.into_changes();
        self.view.recent.join(changes);
        Ok(doubts)
    }

    /// Goes through all its rows, as bytes, by the number of their table.
    pub(crate) fn each_row(
        &self,
        each: impl FnMut(usize, Vec<u8>, Vec<u8>) -> Result<(), LedgerError>,
    ) -> Result<(), LedgerError> {
        each_row(Source::View(&self.view), each)
    }

    /// Gives both files another name, so that no start goes on from what they say. Answers the ledger's.
    ///
    /// # Errors
    /// When it cannot be done.
    pub(crate) fn put_away(self) -> std::io::Result<PathBuf> {
        let to = put_away(&self.path);
        std::fs::rename(&self.path, &to)?;
        let log = wal_path(&self.path);
        if log.exists() {
            std::fs::rename(&log, put_away(&log))?;
        }
        sync_folder_of(&self.path)?;
        Ok(to)
    }
}

/// What a file is called once it was taken over.
pub(crate) fn put_away(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".imported");
    name.into()
}
