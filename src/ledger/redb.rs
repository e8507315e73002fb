//! The ledger in one redb file: load, ask the rules, store, in one write transaction for each batch.

mod endings;
mod grants;
pub(crate) mod tx;
pub(crate) mod upkeep;

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use minicbor::bytes::ByteArray;
use redb::{Database, Durability, ReadableDatabase, ReadableTable, StorageBackend, WriteTransaction};
use serde_json::{Map, Value};

use crate::audit::{Entry, Event};
use crate::id::{BootId, LedgerId};
use crate::journal::{self, JournalError};
use crate::ledger::notes::Note;
use crate::ledger::redb::tx::{Head, Judged, Tx};
use crate::ledger::row::{self, BindingRow, FORMAT, meta};
use crate::ledger::rules::{self, Verdict, resolve};
use crate::ledger::writer::{Command, Reply};
use crate::ledger::{Admitted, Held, LedgerError, Opening, entry};
use crate::refusal::CapKind;
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

/// An open ledger file.
#[derive(Debug)]
pub struct RedbStore {
    db: Database,
    id: LedgerId,
    salt: [u8; 32],
    failure: Mutex<Option<String>>,
    /// The highest time that was ever used: the clock may not go back, or windows and remembered times would open again.
    mark: AtomicU64,
    clock: Clock,
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
        Self::prepare(journal::database().open(path)?, opening)
    }

    /// Makes a ledger under a name of its own, and gives it its name when it is whole: a file that was cut short while
    /// it was made could never be opened again.
    fn create_file(
        path: &Path,
        opening: &Opening,
        failed: impl Fn(std::io::Error) -> LedgerError,
    ) -> Result<(), LedgerError> {
        let fresh = path.with_extension(format!("{}.new", opening.fresh_id));
        let made = make_private(&fresh).map_err(&failed).and_then(|()| {
            drop(Self::prepare(journal::database().create(&fresh)?, opening)?);
            Ok(())
        });
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
        let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
        std::fs::File::open(dir).and_then(|dir| dir.sync_all()).map_err(failed)
    }

    pub(crate) fn open_backend(backend: impl StorageBackend, opening: &Opening) -> Result<Self, LedgerError> {
        Self::prepare(journal::database().create_with_backend(backend)?, opening)
    }

    /// Makes what is missing, checks what is there, and turns an earlier run's sending holds into doubts, all before
    /// anybody can ask.
    fn prepare(db: Database, opening: &Opening) -> Result<Self, LedgerError> {
        let txn = begin(&db)?;
        // Before anything else is read: nothing else of a newer file needs to be readable.
        let found = tx::stored_format(&txn)?;
        if let Some(found) = found.filter(|found| *found > FORMAT) {
            return Err(LedgerError::NewerFormat { found, known: FORMAT });
        }
        let mut tx = Tx::open(&txn, opening, None)?;
        let now = opening.clock.now().max(tx.mark()?);
        if found.is_none() {
            tx.create(opening, now)?;
        }
        tx.check_mode(opening)?;
        tx.note_clock(now, opening.clock.now())?;
        tx.doubt_orphans(opening.boot, now)?;
        let (id, salt) = (tx.ledger_id()?, tx.salt()?);
        drop(tx);
        txn.commit()?;
        let mark = AtomicU64::new(now.millis());
        Ok(Self { db, id, salt, failure: Mutex::new(None), mark, clock: opening.clock.clone() })
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
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The time: the machine's clock, held where it was when that is set back.
    pub fn now(&self) -> UnixMs {
        let wall = self.clock.now();
        UnixMs::from_millis(self.mark.fetch_max(wall.millis(), Ordering::SeqCst)).max(wall)
    }

    pub(crate) fn read(&self) -> Result<redb::ReadTransaction, LedgerError> {
        Ok(self.db.begin_read()?)
    }

    pub(crate) fn writer(&self, opening: &Opening) -> Writer<'_> {
        Writer { store: self, opening: opening.clone(), head: None }
    }

    /// Latches: from now on nothing is written, until the file is opened again.
    pub(super) fn fail(&self, error: &LedgerError) {
        tracing::error!(%error, "the ledger failed; nothing is admitted until it is opened again");
        *self.failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(error.to_string());
    }
}

/// Looks into a ledger file that nobody has open, without changing what it says: its format and to whom it is bound.
///
/// # Errors
/// [`LedgerError::Locked`] while a sidecar runs on it, or whatever keeps it from being used.
pub fn inspect(path: &Path) -> Result<(u32, BindingRow), LedgerError> {
    let db = journal::database().open(path)?;
    let txn = db.begin_read()?;
    let table = txn.open_table(row::META)?;
    let format: u32 = match table.get(meta::FORMAT)? {
        Some(bytes) => row::decode(bytes.value())?,
        None => return Err(LedgerError::Corrupt("ledger")),
    };
    if format > FORMAT {
        return Err(LedgerError::NewerFormat { found: format, known: FORMAT });
    }
    let binding = table.get(meta::BINDING)?.ok_or(LedgerError::Corrupt("binding"))?;
    Ok((format, row::decode(binding.value())?))
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
    Ok(txn)
}

/// Executes batches. Owned by the writer thread.
#[derive(Debug)]
pub struct Writer<'a> {
    store: &'a RedbStore,
    opening: Opening,
    /// The end of the chain as the last commit left it.
    head: Option<Head>,
}

/// An answer that waits for the commit.
type Waiting = Box<dyn FnOnce(Option<&LedgerError>)>;

impl Writer<'_> {
    /// Executes a batch, commits once, and only then answers.
    pub fn commit(&mut self, batch: Vec<Command>) {
        if let Some(why) = self.store.failure() {
            let error = LedgerError::Unavailable(why);
            refuse_all(batch, &error);
            return;
        }
        let mut waiting = Vec::with_capacity(batch.len());
        let result = self.try_commit(batch, &mut waiting);
        if let Err(error) = &result {
            self.store.fail(error);
        }
        for answer in waiting {
            answer(result.as_ref().err());
        }
    }

    fn try_commit(&mut self, batch: Vec<Command>, waiting: &mut Vec<Waiting>) -> Result<(), LedgerError> {
        let txn = match begin(&self.store.db) {
            Ok(txn) => txn,
            Err(error) => {
                refuse_all(batch, &error);
                return Err(error);
            }
        };
        let mut commands = batch.into_iter();
        let mut tx = match Tx::open(&txn, &self.opening, self.head) {
            Ok(tx) => tx,
            Err(error) => {
                refuse_all(commands, &error);
                return Err(error);
            }
        };
        let mut broken = None;
        for command in commands.by_ref() {
            let now = self.store.now();
            match execute(self.store, &mut tx, command, now, self.opening.boot) {
                Ok(answer) => waiting.push(answer),
                Err((answer, error)) => {
                    waiting.push(answer);
                    broken = Some(error);
                    break;
                }
            }
        }
        if let Some(error) = broken {
            refuse_all(commands, &error);
            return Err(error);
        }
        let (wrote, head) = (tx.wrote(), tx.head());
        drop(tx);
        if !wrote {
            return Ok(txn.abort()?);
        }
        txn.commit()?;
        self.head = Some(head);
        Ok(())
    }
}

type Executed = Result<Waiting, (Waiting, LedgerError)>;

fn answer<T: 'static>(reply: Reply<T>, result: Result<T, LedgerError>) -> Executed {
    told(result, move |result| {
        // Whoever asked may have gone; what was done stays done.
        let _ = reply.send(result);
    })
}

/// Pairs what a command came to with whoever is told of it. An error of storage breaks the batch; any other error is the
/// command's own, and it has written nothing.
fn told<T: 'static>(
    result: Result<T, LedgerError>,
    tell: impl FnOnce(Result<T, LedgerError>) + 'static,
) -> Executed {
    let breaks = match &result {
        Err(error @ LedgerError::Unavailable(_)) => Some(error.clone()),
        Err(
            LedgerError::Corrupt(_)
            | LedgerError::Locked
            | LedgerError::NewerFormat { .. }
            | LedgerError::BoundElsewhere { .. }
            | LedgerError::NotFound
            | LedgerError::Lost
            | LedgerError::Contradiction(_),
        )
        | Ok(_) => None,
    };
    let waiting: Waiting = Box::new(move |failed| {
        tell(match failed {
            Some(error) => Err(error.clone()),
            None => result,
        });
    });
    match breaks {
        Some(error) => Err((waiting, error)),
        None => Ok(waiting),
    }
}

fn refuse_all(commands: impl IntoIterator<Item = Command>, error: &LedgerError) {
    for command in commands {
        refuse_command(command, error);
    }
}

fn refuse_command(command: Command, error: &LedgerError) {
    fn tell<T>(reply: Reply<T>, error: &LedgerError) {
        // Whoever asked may have gone.
        let _ = reply.send(Err(error.clone()));
    }
    match command {
        Command::Admit { reply, .. } => tell(reply, error),
        Command::RevokeKey { reply, .. } => tell(reply, error),
        Command::RevokeIssuer { reply, .. } => tell(reply, error),
        Command::ResumeBudget { reply, .. } | Command::AcceptLoss { reply, .. } => tell(reply, error),
        Command::Bind { reply, .. } => tell(reply, error),
        Command::LowerClock { reply, .. } => tell(reply, error),
        Command::EndDoubt { reply, .. } => tell(reply, error),
        Command::ForgetCall { reply, .. } => tell(reply, error),
        Command::Tick { reply } => tell(reply, error),
        Command::Resolve { reply, .. }
        | Command::CreateIssuer { reply, .. }
        | Command::Observe { reply, .. }
        | Command::NoteSearch { reply, .. }
        | Command::Refused { reply, .. }
        | Command::Record { reply, .. }
        | Command::IssueKey { reply, .. }
        | Command::KillSwitch { reply, .. }
        | Command::Shipped { reply, .. }
        | Command::NoteLoss { reply, .. }
        | Command::Flush { reply } => tell(reply, error),
        // It counts as lost.
        Command::Note { ticket, .. } => drop(ticket),
    }
}

fn execute(store: &RedbStore, tx: &mut Tx<'_>, command: Command, now: UnixMs, boot: BootId) -> Executed {
    if let Err(error) = tx.note_clock(now, store.clock.now()) {
        refuse_command(command, &error);
        return Err((Box::new(|_| ()), error));
    }
    match command {
        Command::Admit { key_id, admit, reply } => answer(reply, admit_call(tx, key_id, &admit, now)),
        Command::Resolve { hold_id, call_id, resolve, reply } => {
            answer(reply, tx.resolve(hold_id, call_id, &resolve, boot, now))
        }
        Command::CreateIssuer { issuer, actor, reply } => {
            answer(reply, tx.create_issuer(&issuer, &actor, now))
        }
        Command::RevokeIssuer { issuer_id, actor, reply } => {
            answer(reply, tx.revoke_issuer(issuer_id, &actor, now))
        }
        Command::ResumeBudget { issuer, name, reason, actor, reply } => {
            answer(reply, tx.resume_budget(issuer, &name, &reason, &actor, now))
        }
        Command::EndDoubt { hold_id, end, reply } => answer(reply, tx.end_doubt(hold_id, &end, now)),
        Command::NoteSearch { hold_id, read, came_to, reply } => {
            answer(reply, tx.note_search(hold_id, &read, &came_to, now))
        }
        Command::ForgetCall { call_id, reason, actor, reply } => {
            answer(reply, tx.forget_call(call_id, &reason, &actor, now))
        }
        Command::Observe { account, object, facts, record, reply } => {
            answer(reply, tx.observe(&account, &object, &facts, record, now))
        }
        Command::Refused { key_id, facts, refusal, duration_ms, reply } => {
            answer(reply, tx.refused(key_id, &facts, &refusal, duration_ms, now))
        }
        Command::Record { entry, reply } => {
            answer(reply, tx.append(&Entry { at: now.to_string(), ..*entry }))
        }
        Command::Note { note, ticket } => {
            let noted = match note {
                Note::Record(entry) => tx.append(&Entry { at: now.to_string(), ..*entry }),
                Note::Refused { key_id, facts, refusal, duration_ms } => {
                    tx.refused(key_id, &facts, &refusal, duration_ms, now)
                }
            };
            told(noted, move |noted| {
                if noted.is_ok() {
                    ticket.settle();
                }
            })
        }
        Command::IssueKey { key, actor, reply } => answer(reply, tx.issue_key(&key, &actor, now)),
        Command::RevokeKey { key_id, actor, reply } => answer(reply, tx.revoke_key(key_id, &actor, now)),
        Command::KillSwitch { on, reason, actor, reply } => {
            answer(reply, tx.kill_switch(on, &reason, &actor, now))
        }
        Command::Bind { account, key_digest, reply } => answer(reply, tx.bind(&account, key_digest, now)),
        Command::LowerClock { reason, actor, reply } => {
            let wall = store.clock.now();
            let lowered = tx.lower_clock(&reason, &actor, now, wall);
            if lowered.is_ok() {
                store.mark.store(wall.millis(), Ordering::SeqCst);
            }
            answer(reply, lowered)
        }
        Command::Shipped { to, reply } => answer(reply, tx.put_meta(meta::SHIPPED_TO, &to)),
        Command::NoteLoss { collector_seq, reply } => answer(reply, tx.note_loss(collector_seq, now)),
        Command::AcceptLoss { fresh, reason, actor, reply } => {
            answer(reply, tx.accept_loss(fresh, &reason, &actor, now))
        }
        Command::Flush { reply } => answer(reply, Ok(())),
        Command::Tick { reply } => answer(reply, tx.tick(now)),
    }
}

fn admit_call(
    tx: &mut Tx<'_>,
    key_id: crate::id::KeyId,
    admit: &rules::Admit,
    now: UnixMs,
) -> Result<Admitted, LedgerError> {
    let Judged { key, payer, verdict } = tx.judge(key_id, admit, now)?;
    match verdict {
        Verdict::Send(effects) => {
            let held = Held::of(&effects, admit.intent.basis.clone())?;
            tx.write(&effects, now)?;
            Ok(Admitted::Held(held))
        }
        Verdict::Replay(call_id, effects) => {
            let answer = tx.answer(call_id)?.ok_or(LedgerError::Contradiction("a kept answer is gone"))?;
            tx.write(&effects, now)?;
            Ok(Admitted::Replay { call_id, answer })
        }
        Verdict::Look(mark) => Ok(Admitted::Look(mark)),
        Verdict::Tell(executed) => Ok(Admitted::Tell(executed)),
        Verdict::Refuse(refusal) => {
            tx.count_refusal(&key, &admit.intent.facts, &refusal, admit.duration_ms, now)?;
            // The limit of one call is the caller's own; all other caps are the payer's.
            let of_one_call =
                refusal.figures.as_ref().is_some_and(|figures| figures.cap == CapKind::PerRequest);
            tx.stop_budget(if of_one_call { &key } else { &payer }, &refusal, now)?;
            Ok(Admitted::Refused(refusal))
        }
    }
}

impl Tx<'_> {
    fn create(&mut self, opening: &Opening, now: UnixMs) -> Result<(), LedgerError> {
        self.put_meta(meta::FORMAT, &FORMAT)?;
        self.put_meta(meta::LEDGER_ID, &opening.fresh_id)?;
        self.put_meta(meta::SALT, &ByteArray::from(opening.fresh_salt))?;
        let binding =
            BindingRow { account: None, mode: opening.mode.as_str().to_owned(), verified_key: None };
        self.put_meta(meta::BINDING, &binding)?;
        self.begin_first_chain(opening.fresh_id);
        let mut detail = Map::new();
        detail.insert("format".to_owned(), Value::from(FORMAT));
        detail.insert("mode".to_owned(), Value::from(opening.mode.as_str()));
        self.append(&entry::of_admin(now, Event::ChainStarted, "keybrake", None, detail))
    }

    fn check_mode(&mut self, opening: &Opening) -> Result<(), LedgerError> {
        let binding: BindingRow = self.binding()?;
        if binding.mode == opening.mode.as_str() {
            return Ok(());
        }
        Err(LedgerError::BoundElsewhere {
            bound: format!("{} mode", binding.mode),
            offered: format!("{} mode", opening.mode.as_str()),
        })
    }

    fn doubt_orphans(&mut self, boot: BootId, now: UnixMs) -> Result<(), LedgerError> {
        for hold in self.live_holds()? {
            let Some(key) = self.key(hold.live.as_ref().map_or(hold.key_id, |live| live.key_id))? else {
                return Err(LedgerError::Contradiction("a live hold has no key"));
            };
            let call = self.call_by_id(hold.call_id)?;
            if let Some(effects) = resolve::orphan(&hold, call.as_ref(), &key, boot, now) {
                self.write(&effects, now)?;
            }
        }
        Ok(())
    }

    pub(super) fn live_holds(&self) -> Result<Vec<crate::hold::Hold>, LedgerError> {
        let table = self.txn().open_table(row::HOLDS)?;
        let mut holds = Vec::new();
        for row in table.range((row::PHASE_LIVE, &[0; 16])..=(row::PHASE_LIVE, &[255; 16]))? {
            holds.push(row::decode(row?.1.value())?);
        }
        Ok(holds)
    }
}
