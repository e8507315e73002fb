//! The ledger: what is held, spent and remembered, and the record of it. Durable before anything is answered.
//!
//! - One writer takes every command that waits, runs the pure [`rules`] on what it loads, and commits once for all of
//!   them; nobody is answered before that commit, but for the records of reads ([`notes`]), which follow within a tenth of
//!   a second. Reads run beside it, on snapshots.
//! - Holds, counters, calls, audit records and keys change together in one transaction or not at all.
//! - [`Held`] can only be made here, by a reserve that is durable. Whoever forwards a money call must show one.
//! - A write that fails latches a file: nothing is written or admitted until the process is started again, because nobody
//!   knows what of it survived. A database is asked, and used again when it is back.
//! - Nothing in here or below knows Stripe.

pub(crate) mod changes;
pub mod command;
pub mod counter;
pub mod entry;
mod execute;
mod held;
pub(crate) mod loaded;
pub mod notes;
pub(crate) mod postgres;
pub mod query;
pub mod redb;
pub mod row;
pub mod rules;
pub(crate) mod source;
pub(crate) mod tx;
pub mod writer;

pub use held::{Admitted, Held, Sending};
pub use postgres::fleet::{Fleet, Run, look as look_at_fleet};
pub use postgres::import::{ImportError, Imported, import};

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Map, Value};
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;
use tokio::time::{Instant, timeout_at};

use crate::audit::Entry;
use crate::call::{Call, Outcome, Record};
use crate::hold::{Facts, Hold};
use crate::id::{BootId, CallId, HoldId, IssuerId, KeyId, LedgerId};
use crate::issuer::Issuer;
use crate::key::Key;
use crate::ledger::command::{Command, Late, Reply};
use crate::ledger::notes::{Note, Notes};
use crate::ledger::postgres::PostgresStore;
use crate::ledger::query::{AuditFilter, Page, Reader};
use crate::ledger::redb::RedbStore;
use crate::ledger::row::BindingRow;
use crate::ledger::rules::Admit;
use crate::ledger::rules::resolve::{EndDoubt, Resolve};
use crate::ledger::source::Source;
use crate::ledger::writer::Mail;
use crate::postgres::Target;
use crate::refusal::Refusal;
use crate::secret::Mode;
use crate::time::{Clock, UnixMs};

/// How long an answer may take that has to come from a database.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);
/// Commands that may wait for the writer.
const COMMANDS_WAITING_MAX: usize = 4_096;

/// Why the ledger gave no answer.
#[derive(Clone, Debug, thiserror::Error)]
pub enum LedgerError {
    /// It cannot be read or written.
    #[error("the ledger cannot be used: {0}")]
    Unavailable(String),
    /// A stored value is not what it should be.
    #[error("the ledger holds something that is no {0}")]
    Corrupt(&'static str),
    /// Another process has it open.
    #[error("another process is using this ledger; every sidecar needs a DATA_DIR of its own")]
    Locked,
    /// Written by a newer version of this program.
    #[error(
        "the ledger has format {found}, and this build reads formats up to {known}: use a newer keybrake"
    )]
    NewerFormat {
        /// The file's format.
        found: u32,
        /// The highest that is read.
        known: u32,
    },
    /// Bound to another account or mode.
    #[error(
        "this ledger belongs to {bound}, and the Stripe key to {offered}: use a DATA_DIR of its own for it"
    )]
    BoundElsewhere {
        /// To what it is bound.
        bound: String,
        /// What was offered.
        offered: String,
    },
    /// The thing named does not exist.
    #[error("there is no such thing")]
    NotFound,
    /// It was restored from an old copy, as a collector's records show, and no operator has accepted that yet.
    #[error(
        "the ledger was restored from an old copy: its collector holds later records. `keybrake doctor --accept-ledger-loss` takes it as it is"
    )]
    Lost,
    /// The counters contradict the holds.
    #[error("the ledger contradicts itself: {0}")]
    Contradiction(&'static str),
}

impl From<counter::Contradiction> for LedgerError {
    fn from(_: counter::Contradiction) -> Self {
        Self::Contradiction("the counters do not carry a hold as it was")
    }
}

/// What became of an attempt to end a doubt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// It ended.
    Ended,
    /// It was over before.
    NotInDoubt,
    /// The object is another hold's: one object, one hold.
    OfAnother,
}

/// What a tick left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ticked {
    /// Nothing that is due.
    Done,
    /// More rows whose time has come than one step may take: the next tick should come soon.
    GoOn,
    /// The index of the audit log lags, or old records wait to go: nothing that a call notices.
    Lags,
}

/// Who asks for a change by hand, and how it is recorded.
#[derive(Clone, Debug)]
pub struct Actor(pub String);

/// The handle that everybody holds: sends commands to the writer, reads snapshots itself.
#[derive(Clone, Debug)]
pub struct Ledger {
    commands: mpsc::Sender<Mail>,
    notes: Notes,
    late: Late,
    store: Store,
    boot: BootId,
}

/// The stores that a ledger can live in.
#[derive(Clone, Debug)]
enum Store {
    Redb(Arc<RedbStore>),
    Postgres(Arc<PostgresStore>),
}

/// How to open a ledger.
#[derive(Clone, Debug)]
pub struct Opening {
    /// The sidecar's label in audit records.
    pub node: String,
    /// The mode of the Stripe key.
    pub mode: Mode,
    /// The clock.
    pub clock: Clock,
    /// This run of the process.
    pub boot: BootId,
    /// An id for a ledger that does not exist yet.
    pub fresh_id: LedgerId,
    /// A salt for a ledger that does not exist yet.
    pub fresh_salt: [u8; 32],
    /// How long audit records are kept, in days.
    pub audit_days: u32,
    /// Whether they are shipped: what was not acknowledged is kept for longer.
    pub ships: bool,
}

impl Ledger {
    /// Opens or makes the ledger file, turns what an earlier run was sending into doubts, and starts the writer.
    ///
    /// # Errors
    /// [`LedgerError::Locked`], [`LedgerError::NewerFormat`], [`LedgerError::BoundElsewhere`] for a key of the other
    /// mode, or [`LedgerError::Unavailable`].
    pub fn open(path: &Path, opening: Opening) -> Result<Self, LedgerError> {
        Ok(Self::start(RedbStore::open_file(path, &opening)?, opening))
    }

    /// The same on storage backends, of the tree and of its write-ahead log: the seam at which crashes are simulated.
    ///
    /// # Errors
    /// As [`Ledger::open`].
    pub fn open_backend(
        tree: impl ::redb::StorageBackend,
        log: impl ::redb::StorageBackend,
        opening: Opening,
    ) -> Result<Self, LedgerError> {
        Ok(Self::start(RedbStore::open_backend(tree, log, &opening)?, opening))
    }

    fn start(store: RedbStore, opening: Opening) -> Self {
        let store = Arc::new(store);
        let (commands, waiting) = mpsc::channel(COMMANDS_WAITING_MAX);
        let boot = opening.boot;
        let notes = Notes::default();
        writer::spawn(Arc::clone(&store), waiting, notes.clone(), opening);
        // Whoever asks this one waits until there is room.
        let late = Late::default();
        Self { commands, notes, late, store: Store::Redb(store), boot }
    }

    /// Opens or makes the ledger in a schema of a PostgreSQL, which other sidecars may have together with this one, doubts
    /// what earlier runs of this sidecar were sending, and starts the writer.
    ///
    /// # Errors
    /// As [`Ledger::open`].
    pub async fn open_postgres(target: Target, opening: Opening) -> Result<Self, LedgerError> {
        let (commands, waiting) = mpsc::channel(COMMANDS_WAITING_MAX);
        let (boot, notes, late) = (opening.boot, Notes::default(), Late::default());
        let store = postgres::open(target, opening, waiting, notes.clone(), late.clone()).await?;
        Ok(Self { commands, notes, late, store: Store::Postgres(store), boot })
    }

    /// Whether other sidecars may have it together with this one.
    pub fn is_shared(&self) -> bool {
        matches!(self.store, Store::Postgres(_))
    }

    /// Whether this sidecar looks for what became of doubts: of those that have a ledger together, one at a time does. That
    /// two do while one takes over from another is harmless: what they find is written under locks.
    pub fn leads(&self) -> bool {
        match &self.store {
            Store::Redb(_) => true,
            Store::Postgres(store) => store.leads(),
        }
    }

    /// This run of the process.
    pub fn boot(&self) -> BootId {
        match &self.store {
            Store::Redb(_) => self.boot,
            Store::Postgres(store) => store.boot(),
        }
    }

    /// The ledger's id.
    pub fn id(&self) -> LedgerId {
        match &self.store {
            Store::Redb(store) => store.id(),
            Store::Postgres(store) => store.id(),
        }
    }

    /// The salt of its digests.
    pub fn salt(&self) -> &[u8; 32] {
        match &self.store {
            Store::Redb(store) => store.salt(),
            Store::Postgres(store) => store.salt(),
        }
    }

    /// The time: the machine's clock, held where it was when that is set back.
    pub fn now(&self) -> UnixMs {
        match &self.store {
            Store::Redb(store) => store.now(),
            Store::Postgres(store) => store.now(),
        }
    }

    /// Why nothing can be written any more; `None` while all is well.
    pub fn failure(&self) -> Option<String> {
        match &self.store {
            Store::Redb(store) => store.failure(),
            Store::Postgres(store) => store.failure(),
        }
    }

    /// Reads what is durable. `look` may be asked again, when rows have to be fetched for it first.
    ///
    /// # Errors
    /// [`LedgerError`] when the ledger cannot be read, or what `look` says.
    pub async fn read<T>(
        &self,
        look: impl Fn(&Reader<'_>) -> Result<T, LedgerError>,
    ) -> Result<T, LedgerError> {
        match &self.store {
            Store::Redb(store) => look(&Reader::of(Source::Store(store), store.id())),
            Store::Postgres(store) => Box::pin(store.read(look)).await,
        }
    }

    /// The same, where much may have to be looked through for it: not on a thread that serves requests.
    ///
    /// # Errors
    /// As [`Ledger::read`].
    pub async fn search<T: Send + 'static>(
        &self,
        look: impl Fn(&Reader<'_>) -> Result<T, LedgerError> + Send + 'static,
    ) -> Result<T, LedgerError> {
        match &self.store {
            Store::Redb(store) => {
                let store = Arc::clone(store);
                apart(move || look(&Reader::of(Source::Store(&store), store.id()))).await
            }
            Store::Postgres(store) => Box::pin(store.read(look)).await,
        }
    }

    /// Audit records; by default one row for each call, in its last outcome, and every other record.
    ///
    /// # Errors
    /// [`LedgerError`] when the ledger cannot be read.
    pub async fn audit(
        &self,
        filter: AuditFilter,
        after: Option<u64>,
        limit: usize,
    ) -> Result<Page<Map<String, Value>, u64>, LedgerError> {
        match &self.store {
            Store::Redb(store) => {
                let store = Arc::clone(store);
                apart(move || store.audit(&filter, after, limit)).await
            }
            Store::Postgres(store) => {
                let look = |reader: &Reader<'_>| reader.audit_without_index(&filter, after, limit);
                Box::pin(store.read(look)).await
            }
        }
    }

    /// Judges a money call and, when it is let through, holds its money durably.
    ///
    /// # Errors
    /// [`LedgerError`]: nothing is held, and nothing may be sent.
    pub async fn admit(&self, key_id: KeyId, admit: Admit) -> Result<Admitted, LedgerError> {
        self.ask(|reply| Command::Admit { key_id, admit: Box::new(admit), reply }).await
    }

    /// Settles, voids or doubts a hold; durable when it returns.
    ///
    /// # Errors
    /// [`LedgerError`]: the hold stays counted. A database is told when it can be used again; else it is a doubt after the
    /// next start.
    pub async fn resolve(&self, held: Held, resolve: Resolve) -> Result<(), LedgerError> {
        let sending = held.sending();
        self.ask(|reply| Command::Resolve { sending, resolve: Box::new(resolve), reply }).await
    }

    /// Doubts a hold whose sender failed on the way: bytes may have left. One that was settled before stays settled.
    ///
    /// # Errors
    /// [`LedgerError`]: as [`Ledger::resolve`], or it was settled.
    pub async fn doubt(&self, sending: Sending, request_id: String) -> Result<(), LedgerError> {
        let resolve = Resolve {
            outcome: Outcome::Unknown,
            objects: Vec::new(),
            answer: None,
            seen_request_id: request_id,
            stripe_request_id: None,
            upstream_status: None,
            duration_ms: 0,
        };
        self.ask(|reply| Command::Resolve { sending, resolve: Box::new(resolve), reply }).await
    }

    /// Ends an open or doubtful hold by Stripe's own record of its object.
    ///
    /// # Errors
    /// [`LedgerError`]: the hold stays as it is.
    pub async fn observe(
        &self,
        account: String,
        object: String,
        facts: Facts,
        record: Record,
    ) -> Result<(), LedgerError> {
        self.ask(|reply| Command::Observe { account, object, facts: Box::new(facts), record, reply }).await
    }

    /// Ends a doubt by what was found at Stripe, or by what an operator says.
    ///
    /// # Errors
    /// [`LedgerError::NotFound`], or the hold stays in doubt.
    pub async fn end_doubt(&self, hold_id: HoldId, end: EndDoubt) -> Result<Ending, LedgerError> {
        self.ask(|reply| Command::EndDoubt { hold_id, end: Box::new(end), reply }).await
    }

    /// Keeps what was looked for at Stripe to end a doubt.
    ///
    /// # Errors
    /// [`LedgerError`]: it is not kept.
    pub async fn note_search(
        &self,
        hold_id: HoldId,
        read: String,
        came_to: String,
    ) -> Result<(), LedgerError> {
        self.ask(|reply| Command::NoteSearch { hold_id, read, came_to, reply }).await
    }

    /// Takes a call back, so that the same call can be made again. `None` while it is held or in doubt.
    ///
    /// # Errors
    /// [`LedgerError::NotFound`], or the call stays as it was.
    pub async fn forget_call(
        &self,
        call_id: CallId,
        reason: String,
        actor: Actor,
    ) -> Result<Option<Call>, LedgerError> {
        self.ask(|reply| Command::ForgetCall { call_id, reason, actor, reply }).await
    }

    /// Records a refusal, or counts it with its equals of the same minute.
    ///
    /// # Errors
    /// [`LedgerError`]: it is not recorded.
    pub async fn refused(
        &self,
        key_id: KeyId,
        facts: Facts,
        refusal: Refusal,
        duration_ms: u64,
    ) -> Result<(), LedgerError> {
        self.ask(|reply| Command::Refused {
            key_id,
            facts: Box::new(facts),
            refusal: Box::new(refusal),
            duration_ms,
            reply,
        })
        .await
    }

    /// Records an entry whose time the writer fills in.
    ///
    /// # Errors
    /// [`LedgerError`]: it is not recorded.
    pub async fn record(&self, entry: Entry) -> Result<(), LedgerError> {
        self.ask(|reply| Command::Record { entry: Box::new(entry), reply }).await
    }

    /// Hands a record over and does not wait for it; only for room, when too many wait already.
    ///
    /// # Errors
    /// [`LedgerError`]: it was not taken, because nothing can be written.
    pub async fn note(&self, note: Note) -> Result<(), LedgerError> {
        let ticket = self.notes.place().await.ok_or_else(writer_gone)?;
        if let Some(why) = self.failure() {
            ticket.settle();
            return Err(LedgerError::Unavailable(why));
        }
        // A full queue is being worked on, and the next batch takes along what lies there.
        if self.notes.put(note, ticket)
            && let Err(TrySendError::Closed(_)) = self.commands.try_send(Mail::Notes)
        {
            return Err(writer_gone());
        }
        Ok(())
    }

    /// How many records were handed over and could not be written.
    pub fn notes_lost(&self) -> u64 {
        self.notes.lost()
    }

    /// Stores a new vault key.
    ///
    /// # Errors
    /// [`LedgerError`]: there is no such key.
    pub async fn issue_key(&self, key: Key, actor: Actor) -> Result<(), LedgerError> {
        self.ask(|reply| Command::IssueKey { key: Box::new(key), actor, reply }).await
    }

    /// Revokes a vault key; revoking twice is the same as once.
    ///
    /// # Errors
    /// [`LedgerError::NotFound`], or the key stays as it was.
    pub async fn revoke_key(&self, key_id: KeyId, actor: Actor) -> Result<Key, LedgerError> {
        self.ask(|reply| Command::RevokeKey { key_id, actor, reply }).await
    }

    /// Stores a new issuer key.
    ///
    /// # Errors
    /// [`LedgerError`]: there is no such issuer.
    pub async fn create_issuer(&self, issuer: Issuer, actor: Actor) -> Result<(), LedgerError> {
        self.ask(|reply| Command::CreateIssuer { issuer: Box::new(issuer), actor, reply }).await
    }

    /// Revokes an issuer key, and with it every key that it minted.
    ///
    /// # Errors
    /// [`LedgerError::NotFound`], or the issuer stays as it was.
    pub async fn revoke_issuer(&self, issuer_id: IssuerId, actor: Actor) -> Result<Issuer, LedgerError> {
        self.ask(|reply| Command::RevokeIssuer { issuer_id, actor, reply }).await
    }

    /// Lets a stopped budget's keys spend again; answers whether it was stopped.
    ///
    /// # Errors
    /// [`LedgerError`]: the budget stays stopped.
    pub async fn resume_budget(
        &self,
        issuer: Option<IssuerId>,
        name: String,
        reason: String,
        actor: Actor,
    ) -> Result<bool, LedgerError> {
        self.ask(|reply| Command::ResumeBudget { issuer, name, reason, actor, reply }).await
    }

    /// Stops every call, or lets them through again.
    ///
    /// # Errors
    /// [`LedgerError`]: the switch stays as it was.
    pub async fn set_kill_switch(&self, on: bool, reason: String, actor: Actor) -> Result<(), LedgerError> {
        self.ask(|reply| Command::KillSwitch { on, reason, actor, reply }).await
    }

    /// Binds the ledger to the account of a Stripe key, or confirms that it is bound to it.
    ///
    /// # Errors
    /// [`LedgerError::BoundElsewhere`] when it belongs to another account.
    pub async fn bind(&self, account: String, key_digest: [u8; 32]) -> Result<BindingRow, LedgerError> {
        self.ask(|reply| Command::Bind { account, key_digest, reply }).await
    }

    /// Lowers the clock's high-water mark to the machine's clock, after it was set wrongly forward and back.
    ///
    /// # Errors
    /// [`LedgerError`]: the mark stays.
    pub async fn lower_clock(&self, reason: String, actor: Actor) -> Result<(UnixMs, UnixMs), LedgerError> {
        self.ask(|reply| Command::LowerClock { reason, actor, reply }).await
    }

    /// Notes up to which place of the log a collector has it, so that this may be deleted in its time.
    ///
    /// # Errors
    /// [`LedgerError`]: it is kept for longer.
    pub async fn shipped(&self, to: u64) -> Result<(), LedgerError> {
        self.ask(|reply| Command::Shipped { to, reply }).await
    }

    /// Notes that a collector holds records of this ledger that it does not have itself, up to this one: it was restored
    /// from an old copy. Money calls are refused from now on, over restarts.
    ///
    /// # Errors
    /// [`LedgerError`]: nothing is noted.
    pub async fn note_loss(&self, collector_seq: u64) -> Result<(), LedgerError> {
        self.ask(|reply| Command::NoteLoss { collector_seq, reply }).await
    }

    /// An operator accepts that loss: money calls are let through again, and a new chain begins. Answers whether there was
    /// one.
    ///
    /// # Errors
    /// [`LedgerError`]: money calls stay refused.
    pub async fn accept_loss(
        &self,
        fresh: LedgerId,
        reason: String,
        actor: Actor,
    ) -> Result<bool, LedgerError> {
        self.ask(|reply| Command::AcceptLoss { fresh, reason, actor, reply }).await
    }

    /// Returns when everything that was sent before is durable.
    ///
    /// # Errors
    /// [`LedgerError`]: something of it may not be.
    pub async fn flush(&self) -> Result<(), LedgerError> {
        self.ask(|reply| Command::Flush { reply }).await
    }

    /// Ends everything in order: the file holds all that was written before, and nothing is written any more.
    ///
    /// # Errors
    /// [`LedgerError`]: the next start takes in what its write-ahead log holds.
    pub async fn close(&self) -> Result<(), LedgerError> {
        self.ask(|reply| Command::Close { reply }).await
    }

    /// Lets the writer prune, count and index what is due, as much as one step may.
    ///
    /// # Errors
    /// [`LedgerError`]: it is done at the next tick.
    pub async fn tick(&self) -> Result<Ticked, LedgerError> {
        self.ask(|reply| Command::Tick { reply }).await
    }

    async fn ask<T>(&self, command: impl FnOnce(Reply<T>) -> Command) -> Result<T, LedgerError> {
        let (reply, mut answer) = Reply::channel();
        let command = command(reply);
        // A database may be gone for longer than any caller waits.
        let until = match &self.store {
            Store::Redb(_) => None,
            Store::Postgres(_) => Some(Instant::now() + ANSWER_WITHIN),
        };
        let late = || LedgerError::Unavailable("the database gives no answer".to_owned());
        let Some(place) = within(until, self.commands.reserve()).await else {
            self.late.put(command);
            return Err(late());
        };
        place.map_err(|_| writer_gone())?.send(Mail::Command(command));
        if let Some(found) = within(until, &mut answer).await {
            return found.map_err(|_| writer_gone())?;
        }
        // The writer hears from now on that nobody waits, and takes back what it lets through. What it said in this
        // moment is heard: else it would stay held by nobody.
        answer.close();
        answer.try_recv().unwrap_or_else(|_| Err(late()))
    }
}

/// `None` when it is too late.
async fn within<T>(until: Option<Instant>, found: impl Future<Output = T>) -> Option<T> {
    match until {
        None => Some(found.await),
        Some(until) => timeout_at(until, found).await.ok(),
    }
}

/// Runs what takes its time on a thread for such things.
async fn apart<T: Send + 'static>(
    look: impl FnOnce() -> Result<T, LedgerError> + Send + 'static,
) -> Result<T, LedgerError> {
    let found = tokio::task::spawn_blocking(look).await;
    found.unwrap_or_else(|_| Err(LedgerError::Unavailable("the search was cut off".to_owned())))
}

fn writer_gone() -> LedgerError {
    LedgerError::Unavailable("its writer has stopped".to_owned())
}

/// A hold with the call that it belongs to, for lists.
#[derive(Clone, Debug)]
pub struct HoldView {
    /// The hold.
    pub hold: Hold,
    /// Its last call.
    pub call: Option<Call>,
}
