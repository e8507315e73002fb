//! The one thread that writes: takes every command that waits, up to a bound, and has the store commit once for all.
//!
//! No artificial wait fills a batch that anybody waits for: at one caller it would only add latency, and under load the
//! queue fills itself. Notes, for which nobody waits, wait for the next such batch, but not for long.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::{Instant, timeout_at};

use crate::ledger::command::{Command, Reply};
use crate::ledger::notes::{NOTES_WAIT_MS, Notes};
use crate::ledger::redb::RedbStore;
use crate::ledger::redb::batch::Writer;
use crate::ledger::{LedgerError, Opening, Ticked};

/// Commands that share one commit.
const BATCH_COMMANDS_MAX: usize = 256;

/// What the writer hears of.
#[derive(Debug)]
pub(super) enum Mail {
    /// Something to do.
    Command(Command),
    /// Notes wait.
    Notes,
}

/// Starts the writer. It ends when every handle to the ledger is gone.
pub(super) fn spawn(store: Arc<RedbStore>, mut mail: mpsc::Receiver<Mail>, notes: Notes, opening: Opening) {
    std::thread::spawn(move || {
        // For its timer alone: whatever runs the callers, the writer has a thread and a time of its own.
        let runtime = match tokio::runtime::Builder::new_current_thread().enable_time().build() {
            Ok(runtime) => runtime,
            Err(error) => {
                store.fail(&LedgerError::Unavailable(format!("its writer cannot start: {error}")));
                return;
            }
        };
        let keeper = spawn_keeper(Arc::clone(&store), opening.clone());
        let mut writer = Writer::new(&store, &opening, keeper.clone());
        while let Some(batch) = runtime.block_on(next_batch(&mut mail, &notes)) {
            // A defect of ours or of the store must be seen by `/readyz`, as a full disk is: nothing is admitted any more.
            if catch_unwind(AssertUnwindSafe(|| writer.commit(batch))).is_err() {
                store.fail(&LedgerError::Unavailable("its writer panicked".to_owned()));
            }
            if store.is_filling() {
                // It is there already, or the writer settles for itself when there is no room.
                let _ = keeper.try_send(Chore::Settle);
            }
        }
    });
}

/// What is done beside the writer.
pub(super) enum Chore {
    /// Take the write-ahead log into the tree.
    Settle,
    /// The same, and let the index follow and old records go. Whether the writer has left rows whose time has come.
    KeepUp { left: bool, reply: Reply<Ticked> },
    /// Take in everything, for the last time.
    Close(Reply<()>),
}

/// Chores that wait; ticks wait for each other.
const CHORES_WAITING_MAX: usize = 16;

/// Starts the thread that takes what the writer has written into the tree, so that no caller waits for that. It ends with
/// the writer.
fn spawn_keeper(store: Arc<RedbStore>, opening: Opening) -> SyncSender<Chore> {
    let (chores, waiting) = sync_channel(CHORES_WAITING_MAX);
    std::thread::spawn(move || {
        while let Ok(chore) = waiting.recv() {
            let done = catch_unwind(AssertUnwindSafe(|| match chore {
                Chore::Settle if store.is_filling() => drop(store.settle()),
                Chore::Settle => {}
                // Whoever asked may have gone.
                Chore::KeepUp { left, mut reply } => {
                    let ticked =
                        store.keep_up(&opening).map(|ticked| if left { Ticked::GoOn } else { ticked });
                    drop(reply.tell(ticked));
                }
                Chore::Close(mut reply) => drop(reply.tell(store.close())),
            }));
            if done.is_err() {
                store.fail(&LedgerError::Unavailable("what takes its log into the tree panicked".to_owned()));
            }
        }
    });
    chores
}

/// What comes within a time goes along with a batch.
pub(super) async fn add_to(
    batch: &mut Vec<Command>,
    mail: &mut mpsc::Receiver<Mail>,
    notes: &Notes,
    within: Duration,
) {
    let until = Instant::now() + within;
    while batch.len() < BATCH_COMMANDS_MAX {
        match timeout_at(until, mail.recv()).await {
            Ok(Some(Mail::Command(command))) => batch.push(command),
            Ok(Some(Mail::Notes)) => batch.extend(taken(notes)),
            Ok(None) | Err(_) => break,
        }
    }
}

/// What the next commit is for, notes first; `None` when every handle is gone and everything is taken.
pub(super) async fn next_batch(mail: &mut mpsc::Receiver<Mail>, notes: &Notes) -> Option<Vec<Command>> {
    let mut next = Some(mail.recv().await?);
    let until = Instant::now() + Duration::from_millis(NOTES_WAIT_MS);
    let mut commands = Vec::with_capacity(16);
    let mut has_yielded = false;
    while let Some(heard) = next {
        match heard {
            Mail::Command(command) => commands.push(command),
            Mail::Notes => {}
        }
        if commands.len() == BATCH_COMMANDS_MAX {
            break;
        }
        next = match mail.try_recv() {
            Ok(heard) => Some(heard),
            // Where several callers wait there are more of them: they get the processor before the disk does.
            Err(_) if commands.len() > 1 && !has_yielded => {
                has_yielded = true;
                std::thread::yield_now();
                mail.try_recv().ok()
            }
            Err(_) if !commands.is_empty() || notes.are_many() => None,
            Err(_) => timeout_at(until, mail.recv()).await.ok().flatten(),
        };
    }
    Some(taken(notes).chain(commands).collect())
}

fn taken(notes: &Notes) -> impl Iterator<Item = Command> {
    notes.take().into_iter().map(|(note, ticket)| Command::Note { note, ticket: Some(ticket) })
}
