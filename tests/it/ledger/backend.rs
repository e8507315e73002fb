//! Storage in memory for a ledger, its tree and its write-ahead log: files that outlive their handles, and remember every
//! write.

use std::io;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use keybrake::ledger::{Ledger, LedgerError, Opening};
use redb::StorageBackend;

/// How long an opening waits for the handle before to be gone.
const CLOSE_WAIT: Duration = Duration::from_secs(10);

/// A log so short that a few calls fill it: its head, and two halves.
const WAL_BYTES: usize = 4_096 + 2 * 16_384;

/// One of the two files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    Tree,
    Wal,
}

/// What is in both.
#[derive(Clone, Debug)]
pub(super) struct Image {
    pub(super) tree: Vec<u8>,
    pub(super) wal: Vec<u8>,
}

impl Default for Image {
    fn default() -> Self {
        Self { tree: Vec::new(), wal: vec![0; WAL_BYTES] }
    }
}

impl Image {
    pub(super) fn part(&mut self, part: Part) -> &mut Vec<u8> {
        match part {
            Part::Tree => &mut self.tree,
            Part::Wal => &mut self.wal,
        }
    }
}

/// What happened to the files, in order.
#[derive(Clone, Debug)]
pub(super) enum Op {
    Write { part: Part, offset: usize, data: Vec<u8> },
    SetLen(Part, usize),
    Sync(Part),
}

impl Op {
    pub(super) fn part(&self) -> Part {
        match self {
            Self::Write { part, .. } | Self::SetLen(part, _) | Self::Sync(part) => *part,
        }
    }
}

#[derive(Debug, Default)]
struct State {
    image: Image,
    is_open: bool,
    log: Option<Vec<Op>>,
    fails_after: Option<u64>,
    /// Whether the next write panics.
    panics: bool,
    /// Whether syncs hang.
    hangs: bool,
}

/// The files of a ledger in memory. Clones are the same files.
#[derive(Clone, Debug, Default)]
pub(super) struct File(Arc<(Mutex<State>, Condvar)>);

/// One opening of one of them.
#[derive(Debug)]
pub(super) struct Handle(File, Part);

impl File {
    /// Files with this in them.
    pub(super) fn of(image: Image) -> Self {
        let file = Self::default();
        file.with(|state| state.image = image);
        file
    }

    /// Opens the ledger in them.
    pub(super) fn ledger(&self, opening: Opening) -> Result<Ledger, LedgerError> {
        let (tree, wal) = self.open();
        Ledger::open_backend(tree, wal, opening)
    }

    /// A file that remembers what happens to it.
    pub(super) fn recording() -> Self {
        let file = Self::default();
        file.with(|state| state.log = Some(Vec::new()));
        file
    }

    /// What is in them.
    pub(super) fn image(&self) -> Image {
        self.with(|state| state.image.clone())
    }

    /// Everything that happened so far.
    pub(super) fn log(&self) -> Vec<Op> {
        self.with(|state| state.log.clone().unwrap_or_default())
    }

    /// How much happened so far.
    pub(super) fn log_len(&self) -> usize {
        self.with(|state| state.log.as_ref().map_or(0, Vec::len))
    }

    /// Lets `writes` more writes and syncs succeed, and none after them.
    pub(super) fn fail_after(&self, writes: u64) {
        self.with(|state| state.fails_after = Some(writes));
    }

    /// Lets the next write or sync panic, as a store does that finds itself damaged.
    pub(super) fn panic_next(&self) {
        self.with(|state| state.panics = true);
    }

    /// Lets everything succeed again.
    pub(super) fn mend(&self) {
        self.with(|state| state.fails_after = None);
    }

    /// Lets every sync hang from now on, or lets them all go.
    pub(super) fn hang(&self, hangs: bool) {
        self.with(|state| state.hangs = hangs);
        self.0.1.notify_all();
    }

    /// How often the disk was asked to keep what it has.
    pub(super) fn syncs(&self) -> usize {
        self.log().iter().filter(|op| matches!(op, Op::Sync(_))).count()
    }

    /// Opens both, once the handle before is gone.
    fn open(&self) -> (Handle, Handle) {
        let (lock, closed) = &*self.0;
        let state = lock.lock().unwrap_or_else(PoisonError::into_inner);
        let waiting = closed.wait_timeout_while(state, CLOSE_WAIT, |state| state.is_open);
        let (mut state, waited) = waiting.unwrap_or_else(PoisonError::into_inner);
        assert!(!waited.timed_out(), "the handle before was not closed");
        state.is_open = true;
        drop(state);
        (Handle(self.clone(), Part::Tree), Handle(self.clone(), Part::Wal))
    }

    fn with<T>(&self, act: impl FnOnce(&mut State) -> T) -> T {
        act(&mut self.0.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl State {
    fn may_write(&mut self) -> io::Result<()> {
        assert!(!std::mem::take(&mut self.panics), "on purpose");
        match &mut self.fails_after {
            Some(0) => Err(io::Error::other("the disk is gone")),
            Some(left) => {
                *left -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }

    fn did(&mut self, op: Op) {
        if let Some(log) = &mut self.log {
            log.push(op);
        }
    }
}

fn at(offset: u64) -> usize {
    usize::try_from(offset).unwrap()
}

impl StorageBackend for Handle {
    fn len(&self) -> io::Result<u64> {
        self.0.with(|state| Ok(state.image.part(self.1).len() as u64))
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.0.with(|state| {
            let found = state.image.part(self.1).get(at(offset)..at(offset) + out.len());
            out.copy_from_slice(found.ok_or(io::ErrorKind::UnexpectedEof)?);
            Ok(())
        })
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.with(|state| {
            state.may_write()?;
            state.image.part(self.1).resize(at(len), 0);
            state.did(Op::SetLen(self.1, at(len)));
            Ok(())
        })
    }

    fn sync_data(&self) -> io::Result<()> {
        let (lock, changed) = &*self.0.0;
        let state = lock.lock().unwrap_or_else(PoisonError::into_inner);
        drop(changed.wait_while(state, |state| state.hangs).unwrap_or_else(PoisonError::into_inner));
        self.0.with(|state| {
            state.may_write()?;
            state.did(Op::Sync(self.1));
            Ok(())
        })
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.0.with(|state| {
            state.may_write()?;
            put(state.image.part(self.1), at(offset), data);
            state.did(Op::Write { part: self.1, offset: at(offset), data: data.to_vec() });
            Ok(())
        })
    }

    fn close(&self) -> io::Result<()> {
        // The tree closes last.
        if self.1 == Part::Tree {
            self.0.with(|state| state.is_open = false);
            self.0.0.1.notify_all();
        }
        Ok(())
    }
}

/// Writes into bytes, which grow where they must, as a file does.
pub(super) fn put(bytes: &mut Vec<u8>, offset: usize, data: &[u8]) {
    let end = offset + data.len();
    if bytes.len() < end {
        bytes.resize(end, 0);
    }
    bytes[offset..end].copy_from_slice(data);
}
