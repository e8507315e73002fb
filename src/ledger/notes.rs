//! Records that nobody waits for: those of reads, which move no money.
//!
//! A GET that waited for a commit of its own would pay for a sync of the disk, and a flow that looks at a thousand charges
//! would keep the writer from those that it makes. So the record is handed over, and written with the next commit, or by
//! itself within [`NOTES_WAIT_MS`]. What that costs is told by a constant: a power cut loses at most
//! [`NOTES_WAITING_MAX`] of them, never the record of money, and never one from the middle of the chain.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::audit::Entry;
use crate::hold::Facts;
use crate::id::KeyId;
use crate::refusal::Refusal;

/// Notes that may be handed over and not be durable yet. Whoever brings one more waits for room.
pub const NOTES_WAITING_MAX: usize = 1_024;
/// How long the first of them waits for a commit that it can share, in milliseconds.
pub const NOTES_WAIT_MS: u64 = 100;
/// So many do not wait any longer.
const NOTES_MANY: usize = 256;

/// What is recorded without anybody waiting for it.
#[derive(Debug)]
pub enum Note {
    /// An entry whose time the writer fills in.
    Record(Box<Entry>),
    /// A refusal, counted with its equals of the same minute.
    Refused {
        /// Under which key.
        key_id: KeyId,
        /// What the request was.
        facts: Box<Facts>,
        /// Why not.
        refusal: Box<Refusal>,
        /// From acceptance to refusal.
        duration_ms: u64,
    },
}

/// The room for notes, those that wait, and how many were handed over and could not be written.
///
/// They do not go through the writer's queue: it would be woken for each of them, which costs more than the note.
#[derive(Clone, Debug)]
pub(super) struct Notes {
    room: Arc<Semaphore>,
    waiting: Arc<Mutex<Vec<(Note, Ticket)>>>,
    lost: Arc<AtomicU64>,
}

impl Default for Notes {
    fn default() -> Self {
        Self {
            room: Arc::new(Semaphore::new(NOTES_WAITING_MAX)),
            waiting: Arc::default(),
            lost: Arc::default(),
        }
    }
}

impl Notes {
    /// A place for one more, as soon as there is one.
    pub(super) async fn place(&self) -> Option<Ticket> {
        let room = Arc::clone(&self.room).acquire_owned().await.ok()?;
        Some(Ticket { _room: room, lost: Arc::clone(&self.lost), settled: false })
    }

    /// Hands one over. Answers whether the writer has to hear of it: of the first, and when there are many.
    pub(super) fn put(&self, note: Note, ticket: Ticket) -> bool {
        let mut waiting = self.waiting();
        waiting.push((note, ticket));
        waiting.len() == 1 || waiting.len().is_multiple_of(NOTES_MANY)
    }

    /// Whether so many wait that a commit of their own pays.
    pub(super) fn are_many(&self) -> bool {
        self.waiting().len() >= NOTES_MANY
    }

    /// All that wait, in their order.
    pub(super) fn take(&self) -> Vec<(Note, Ticket)> {
        std::mem::take(&mut self.waiting())
    }

    fn waiting(&self) -> MutexGuard<'_, Vec<(Note, Ticket)>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many were lost.
    pub(super) fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }
}

/// The place of one note until it is durable. Dropped anywhere else (a batch that failed, a writer that panicked), the
/// note counts as lost: there is no way to lose one that is not counted.
#[derive(Debug)]
pub struct Ticket {
    _room: OwnedSemaphorePermit,
    lost: Arc<AtomicU64>,
    settled: bool,
}

impl Ticket {
    /// The note is durable, or whoever brought it knows that it was not taken.
    pub fn settle(mut self) {
        self.settled = true;
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if !self.settled {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }
}
