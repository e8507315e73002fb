//! Storage in memory for redb: a file that outlives its handle, and one that remembers every write.

use std::io;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use redb::StorageBackend;

/// How long an opening waits for the handle before to be gone.
const CLOSE_WAIT: Duration = Duration::from_secs(10);

/// What happened to a file, in order.
#[derive(Clone, Debug)]
pub(super) enum Op {
    Write { offset: usize, data: Vec<u8> },
    SetLen(usize),
    Sync,
}

#[derive(Debug, Default)]
struct State {
    bytes: Vec<u8>,
    is_open: bool,
    log: Option<Vec<Op>>,
    fails_after: Option<u64>,
    /// Whether the next write panics.
    panics: bool,
    /// Whether syncs hang.
    hangs: bool,
}

/// A file in memory. Clones are the same file.
#[derive(Clone, Debug, Default)]
pub(super) struct File(Arc<(Mutex<State>, Condvar)>);

/// One opening of a file.
#[derive(Debug)]
pub(super) struct Handle(File);

impl File {
    /// A file with these bytes.
    pub(super) fn of(bytes: Vec<u8>) -> Self {
        let file = Self::default();
        file.with(|state| state.bytes = bytes);
        file
    }

    /// A file that remembers what happens to it.
    pub(super) fn recording() -> Self {
        let file = Self::default();
        file.with(|state| state.log = Some(Vec::new()));
        file
    }

    /// What is in it.
    pub(super) fn bytes(&self) -> Vec<u8> {
        self.with(|state| state.bytes.clone())
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
        self.log().iter().filter(|op| matches!(op, Op::Sync)).count()
    }

    /// Opens it, once the handle before is gone.
    pub(super) fn open(&self) -> Handle {
        let (lock, closed) = &*self.0;
        let state = lock.lock().unwrap_or_else(PoisonError::into_inner);
        let waiting = closed.wait_timeout_while(state, CLOSE_WAIT, |state| state.is_open);
        let (mut state, waited) = waiting.unwrap_or_else(PoisonError::into_inner);
        assert!(!waited.timed_out(), "the handle before was not closed");
        state.is_open = true;
        drop(state);
        Handle(self.clone())
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
        self.0.with(|state| Ok(state.bytes.len() as u64))
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.0.with(|state| {
            let found = state.bytes.get(at(offset)..at(offset) + out.len());
            out.copy_from_slice(found.ok_or(io::ErrorKind::UnexpectedEof)?);
            Ok(())
        })
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.with(|state| {
            state.may_write()?;
            state.bytes.resize(at(len), 0);
            state.did(Op::SetLen(at(len)));
            Ok(())
        })
    }

    fn sync_data(&self) -> io::Result<()> {
        let (lock, changed) = &*self.0.0;
        let state = lock.lock().unwrap_or_else(PoisonError::into_inner);
        drop(changed.wait_while(state, |state| state.hangs).unwrap_or_else(PoisonError::into_inner));
        self.0.with(|state| {
            state.may_write()?;
            state.did(Op::Sync);
            Ok(())
        })
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.0.with(|state| {
            state.may_write()?;
            put(&mut state.bytes, at(offset), data);
            state.did(Op::Write { offset: at(offset), data: data.to_vec() });
            Ok(())
        })
    }

    fn close(&self) -> io::Result<()> {
        self.0.with(|state| state.is_open = false);
        self.0.0.1.notify_all();
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
