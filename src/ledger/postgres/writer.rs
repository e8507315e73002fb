//! Commits batches in the database: what a batch probably needs is guessed from what was seen lately, locked and loaded in
//! one round trip, the rules run on it in memory, and one more round trip writes and commits. What was missing is loaded,
//! and the rules run again; where a lock was missing, everything begins again with it, so that all locks are taken in one
//! order and nobody waits in a circle.
//!
//! A commit whose answer was lost is neither yes nor no. The writer asks the database before it says anything, and until it
//! knows it does nothing else. What a call came to (a settle, a void, a doubt) is kept and written when the database is
//! back; everything else is refused at once while it is not.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use sha2::{Digest as _, Sha256};
use tokio::time::Instant;

use crate::id::BootId;
use crate::ledger::changes::Changes;
use crate::ledger::command::{Command, Late};
use crate::ledger::execute::{Around, Unclaimed, Waiting, execute, refuse, refuse_all};
use crate::ledger::loaded::{Hints, Loaded, Needs};
use crate::ledger::postgres::PostgresStore;
use crate::ledger::postgres::session::{self, Ended, Session};
use crate::ledger::row::{ANSWERS, AUDIT};
use crate::ledger::source::Source;
use crate::ledger::tx::{Head, Tx};
use crate::ledger::{LedgerError, Opening, Sending};
use crate::postgres::DatabaseError;
use crate::time::UnixMs;

/// How often a transaction is begun anew, because another stood in its way.
const TRIES_MAX: usize = 12;
/// How often a transaction is begun with more locks than before.
const WIDER_MAX: usize = 64;
/// How often rules run on one transaction's rows.
const ROUNDS_MAX: usize = 24;
/// What calls came to and could not be written yet. More than so many, and they stay held as if they were being sent.
const KEPT_MAX: usize = 4_096;
/// How long an answer waits for the truth about a commit, before it says that nobody knows.
const LOOK_FOR: Duration = Duration::from_secs(3);
/// The pause between two questions to a database that gives no answer.
const LOOK_AGAIN: Duration = Duration::from_millis(100);
/// The time at the beginning of an id.
const BOOT_TIME_BYTES: usize = 6;
/// Holds of runs that are gone that one transaction doubts.
const DOUBTED_AT_ONCE: usize = 100;

/// How much of the time that locks were waited for a batch may wait for more.
const PATIENCE_PART: u32 = 4;
/// The least that a timer can wait.
const PATIENCE_MIN: Duration = Duration::from_millis(1);
/// The most that a batch waits for more.
const PATIENCE_MAX: Duration = Duration::from_millis(5);

/// Why a transaction came to nothing.
#[derive(Debug)]
enum Trouble {
    /// The database cannot be used now; nothing is written.
    Down(String),
    /// Nobody knows whether it is written.
    Unknown(String),
    /// Others took this run of the process for gone.
    Fenced,
    /// It stands in the way of others, again and again.
    Crowded,
    /// It needs more locks than it began with.
    Wider,
    /// It must not be written.
    Broken(LedgerError),
}

impl From<DatabaseError> for Trouble {
    fn from(error: DatabaseError) -> Self {
        if error.may_run_again() { Self::Crowded } else { Self::Down(error.to_string()) }
    }
}

/// A batch of which nobody knows whether it holds.
struct Unknown {
    boot: BootId,
    batch: i64,
    commands: Vec<Command>,
    /// What each came to, should it hold.
    came_to: Vec<Waiting>,
}

/// Commits batches. Owned by the writer thread.
pub(super) struct Writer {
    store: Arc<PostgresStore>,
    opening: Opening,
    session: Option<Session>,
    /// The end of this sidecar's chain as the last commit left it.
    head: Option<Head>,
    hints: Hints,
    /// The number of the last batch.
    batch: i64,
    /// What waits for the database to be back.
    kept: VecDeque<Command>,
    late: Late,
    unknown: Option<Unknown>,
    unclaimed: Unclaimed,
    /// How long the last transaction waited for its locks.
    waited: Duration,
}

/// What is done with the rows of a transaction. It may be done several times, until it has all that it needs.
type Work<'w> = &'w mut dyn FnMut(&Around<'_>, &mut Tx<'_>, UnixMs) -> Result<(), LedgerError>;

impl Writer {
    /// Opens the ledger: makes its schema and first rows, and doubts what earlier runs of this sidecar were sending.
    pub(super) async fn open(
        store: Arc<PostgresStore>,
        opening: Opening,
        late: Late,
    ) -> Result<Self, LedgerError> {
        let session = Session::open(&store.target, store.own).await.map_err(unavailable)?;
        let mut writer = Self {
            store,
            opening,
            session: Some(session),
            head: None,
            hints: Hints::default(),
            batch: 0,
            kept: VecDeque::new(),
            late,
            unknown: None,
            unclaimed: Unclaimed::default(),
            waited: Duration::ZERO,
        };
        let joining = writer.opening.clone();
        let mut found = None;
        let joined = writer
            .transact(&mut |around, tx, now| {
                tx.join(&joining, now)?;
                tx.note_clock(now, around.wall)?;
                found = Some((tx.ledger_id()?, tx.salt()?, tx.mark()?));
                Ok(())
            })
            .await;
        joined.map_err(told)?;
        let (id, salt, mark) = found.ok_or(LedgerError::Corrupt("ledger id"))?;
        writer.store.know(id, salt, mark);
        writer.doubt_gone(true).await.map_err(told)?;
        Ok(writer)
    }

    /// How long the next batch may wait for more to come. Where others hold what it wants, it waits for them in any case, and
    /// whoever goes along with it need not wait for them once more.
    pub(super) fn patience(&self) -> Duration {
        let patience = self.waited / PATIENCE_PART;
        if patience < PATIENCE_MIN { Duration::ZERO } else { patience.min(PATIENCE_MAX) }
    }

    /// Executes a batch, commits once, and only then answers.
    pub(super) async fn commit(&mut self, batch: Vec<Command>) {
        if let Some(why) = self.store.latched() {
            let mut batch = batch;
            refuse_all(&mut batch, &LedgerError::Unavailable(why));
            return;
        }
        let ticks = batch.iter().any(|command| matches!(command, Command::Tick { .. }));
        if let Err(why) = self.settle_unknown().await {
            self.store.note_trouble(Some(why.clone()));
            self.put_off(batch, &why);
            return;
        }
        // No more than could be kept again.
        let room = KEPT_MAX.saturating_sub(self.kept.len() + batch.len());
        let mut all: Vec<Command> = self.kept.drain(..).collect();
        all.extend(self.late.take(room));
        all.extend(batch);
        self.commit_all(all).await;
        let unclaimed = self.unclaimed.take();
        if !unclaimed.is_empty() {
            self.commit_all(unclaimed.into_iter().map(Sending::was_not_sent).collect()).await;
        }
        if ticks && self.session.is_some() && self.unknown.is_none() {
            self.keep_up().await;
        }
    }

    /// Commits what is left when the process ends.
    pub(super) async fn close(&mut self) {
        // Without a batch it writes what was kept and what came late.
        self.commit(Vec::new()).await;
    }

    /// At once, or one by one where together they come to nothing.
    async fn commit_all(&mut self, mut batch: Vec<Command>) {
        if batch.is_empty() {
            return;
        }
        if let Some(unknown) = &self.unknown {
            // A batch after it would speak for it.
            let why = format!("whether a commit holds is not known: {}", unknown.batch);
            self.put_off(batch, &why);
            return;
        }
        let mut came_to = Vec::new();
        match self.commit_once(&mut batch, &mut came_to).await {
            Ok(()) => self.store.note_trouble(None),
            Err(Trouble::Crowded | Trouble::Wider | Trouble::Broken(_)) if batch.len() > 1 => {
                for command in batch {
                    Box::pin(self.commit_all(vec![command])).await;
                }
            }
            Err(Trouble::Crowded | Trouble::Wider) => self.put_off(batch, "it is too crowded; try again"),
            Err(Trouble::Broken(error)) => refuse_all(&mut batch, &error),
            Err(Trouble::Fenced) => {
                let why = "this sidecar was taken for gone".to_owned();
                self.put_off(batch, &why);
            }
            Err(Trouble::Down(why)) => {
                tracing::warn!(
                    why,
                    "the ledger's database cannot be used; money calls are refused until it is back"
                );
                self.drop_session();
                self.store.note_trouble(Some(why.clone()));
                self.put_off(batch, &why);
            }
            Err(Trouble::Unknown(why)) => {
                tracing::warn!(why, "whether a commit holds is not known; nothing is written before it is");
                self.store.note_trouble(Some(why.clone()));
                // Their askers have waited for as long as an answer may take.
                for command in &mut batch {
                    if !is_outcome(command) {
                        let why = format!("whether it was written is not known: {why}");
                        refuse(command, &LedgerError::Unavailable(why));
                    }
                }
                let (boot, number) = (self.opening.boot, self.batch);
                self.unknown = Some(Unknown { boot, batch: number, commands: batch, came_to });
            }
        }
    }

    async fn commit_once(
        &mut self,
        batch: &mut [Command],
        came_to: &mut Vec<Waiting>,
    ) -> Result<(), Trouble> {
        {
            let (came_to, batch) = (&mut *came_to, &mut *batch);
            let mut work = move |around: &Around<'_>, tx: &mut Tx<'_>, now: UnixMs| {
                came_to.clear();
                let mut broken = Ok(());
                for command in batch.iter_mut() {
                    match execute(around, tx, command, now) {
                        Ok(answer) => came_to.push(answer),
                        // All of them are looked at, so that all that is missing is known at once.
                        Err((answer, error)) => {
                            came_to.push(answer);
                            broken = Err(error);
                        }
                    }
                }
                broken
            };
            self.transact(&mut work).await?;
        }
        for (command, answer) in batch.iter_mut().zip(came_to.drain(..)) {
            answer(command, None);
        }
        Ok(())
    }

    /// Runs one transaction to its end.
    async fn transact(&mut self, work: Work<'_>) -> Result<(), Trouble> {
        let mut needs = self.guess(work);
        let mut trouble = Trouble::Crowded;
        let mut may_be_stale = self.session.is_some();
        let (mut tries, mut wider) = (0, 0);
        while tries < TRIES_MAX && wider < WIDER_MAX {
            tries += 1;
            if self.session.is_none() {
                self.session = Some(Session::open(&self.store.target, self.store.own).await?);
            }
            trouble = match self.attempt(&mut needs, work).await {
                Ok(()) => return Ok(()),
                // Of a server that was started anew, an old session tells only that.
                Err(Trouble::Down(why)) if may_be_stale => {
                    self.drop_session();
                    may_be_stale = false;
                    Trouble::Down(why)
                }
                Err(Trouble::Unknown(why)) => match self.look(&why).await {
                    Ok(true) => return Ok(()),
                    Ok(false) => Trouble::Crowded,
                    Err(trouble) => return Err(trouble),
                },
                Err(Trouble::Fenced) => {
                    self.come_back().await?;
                    Trouble::Fenced
                }
                Err(Trouble::Wider) => {
                    (tries, wider) = (tries - 1, wider + 1);
                    self.roll_back().await;
                    Trouble::Crowded
                }
                Err(Trouble::Crowded) => {
                    self.roll_back().await;
                    Trouble::Crowded
                }
                Err(trouble @ (Trouble::Down(_) | Trouble::Broken(_))) => return Err(trouble),
            };
        }
        Err(trouble)
    }

    /// What the database has behind another session may be older than what this one saw: where the chain ends is read
    /// again.
    fn drop_session(&mut self) {
        self.session = None;
        self.head = None;
    }

    async fn roll_back(&mut self) {
        if let Some(session) = &self.session
            && session.rollback().await.is_err()
        {
            self.drop_session();
        }
    }

    /// What a transaction will probably need.
    fn guess(&mut self, work: Work<'_>) -> Needs {
        let loaded = Loaded::to_guess(std::mem::take(&mut self.hints));
        // What it comes to is of no interest.
        let _ = self.run(&loaded, self.store.now(), work);
        let needs = loaded.take_needs();
        self.hints = loaded.into_hints();
        needs
    }

    fn run(&self, loaded: &Loaded, now: UnixMs, work: Work<'_>) -> Result<(Head, Changes), LedgerError> {
        let mut tx = Tx::open(Source::Loaded(loaded), &self.opening, self.head)?;
        let around = Around {
            boot: self.opening.boot,
            wall: self.store.wall(),
            mark: &self.store.mark,
            keeper: None,
            unclaimed: &self.unclaimed,
        };
        work(&around, &mut tx, now)?;
        Ok((tx.head(), tx.into_changes()))
    }

    async fn attempt(&mut self, needs: &mut Needs, work: Work<'_>) -> Result<(), Trouble> {
        let boot = self.opening.boot;
        let mut loaded = Loaded::to_write(needs.locks.clone());
        let Some(session) = &self.session else { return Err(Trouble::Down("no session".to_owned())) };
        let begun = session.begin(boot, needs, &mut loaded).await?;
        if begun.fenced {
            return Err(Trouble::Fenced);
        }
        self.store.note_time(begun.at);
        self.waited = begun.waited;
        // One moment for all rounds: what is due depends on it, and would have to be loaded anew for each.
        let now = self.store.now();
        for _ in 0..ROUNDS_MAX {
            let done = self.run(&loaded, now, work);
            let more = loaded.take_needs();
            let Some(session) = &self.session else { return Err(Trouble::Down("no session".to_owned())) };
            if more.is_empty() {
                let (head, changes) = match done {
                    Ok(done) => done,
                    Err(error) => {
                        session.rollback().await?;
                        return Err(Trouble::Broken(error));
                    }
                };
                if changes.is_empty() {
                    session.rollback().await?;
                    return Ok(());
                }
                return self.write(&loaded, head, &changes).await;
            }
            let needs_locks = !more.locks.is_empty();
            if !needs_locks {
                session.load(&more, &mut loaded).await?;
            }
            needs.join(more);
            if needs_locks {
                return Err(Trouble::Wider);
            }
        }
        Err(Trouble::Crowded)
    }

    async fn write(&mut self, loaded: &Loaded, head: Head, changes: &Changes) -> Result<(), Trouble> {
        let Some(session) = &self.session else { return Err(Trouble::Down("no session".to_owned())) };
        self.batch += 1;
        let ended = session.commit(self.opening.boot, self.batch, changes).await;
        // Guesses: nothing is decided by them, so they may be of a commit that does not hold.
        for (table, key, value) in loaded.rows() {
            if value.is_some() && is_worth_a_hint(table) {
                self.hints.note(table, key, value);
            }
        }
        for (table, rows) in changes.rows().filter(|(table, _)| is_worth_a_hint(*table)) {
            rows.for_each(|(key, value)| self.hints.note(table, key, value));
        }
        let before = self.head.replace(head);
        match ended {
            Ended::Held => {
                if let Some(session) = &self.session {
                    session.note_made(loaded.locks());
                }
                Ok(())
            }
            Ended::Not(error) => {
                self.head = before;
                Err(error.into())
            }
            // Read again, when it is known.
            Ended::Unknown(error) => {
                self.head = None;
                Err(Trouble::Unknown(error.to_string()))
            }
        }
    }

    /// Whether the last batch holds, asked for as long as an answer may wait for it.
    async fn look(&mut self, why: &str) -> Result<bool, Trouble> {
        let since = Instant::now();
        loop {
            match self.ask_whether(self.opening.boot, self.batch).await {
                Ok(holds) => return Ok(holds),
                Err(_) if since.elapsed() < LOOK_FOR => tokio::time::sleep(LOOK_AGAIN).await,
                Err(_) => return Err(Trouble::Unknown(why.to_owned())),
            }
        }
    }

    async fn ask_whether(&mut self, boot: BootId, batch: i64) -> Result<bool, DatabaseError> {
        // Never on the session that lost it: what it says next may be of before.
        self.drop_session();
        let session = Session::open(&self.store.target, self.store.own).await?;
        let holds = session.holds(boot, batch).await?;
        self.session = Some(session);
        Ok(holds)
    }

    /// Finds out what became of a batch that nobody knows of. What does not hold comes first in the next one; and so does
    /// the end of what was let through for somebody who was told meanwhile that nobody knows: nothing of it was sent.
    async fn settle_unknown(&mut self) -> Result<(), String> {
        let Some(mut unknown) = self.unknown.take() else { return Ok(()) };
        let first: Vec<Command> = match self.ask_whether(unknown.boot, unknown.batch).await {
            Ok(true) => {
                for (command, answer) in unknown.commands.iter_mut().zip(unknown.came_to) {
                    answer(command, None);
                }
                self.unclaimed.take().into_iter().map(Sending::was_not_sent).collect()
            }
            Ok(false) => unknown.commands.into_iter().filter(is_outcome).collect(),
            Err(error) => {
                self.unknown = Some(unknown);
                return Err(error.to_string());
            }
        };
        first.into_iter().rev().for_each(|command| self.kept.push_front(command));
        Ok(())
    }

    /// Refuses what can be refused, and keeps what calls came to.
    fn put_off(&mut self, batch: Vec<Command>, why: &str) {
        let error = LedgerError::Unavailable(why.to_owned());
        for mut command in batch {
            if is_outcome(&command) && self.kept.len() < KEPT_MAX {
                self.kept.push_back(command);
            } else {
                refuse(&mut command, &error);
            }
        }
    }

    /// Registers anew, as another run of the process: what this one was sending was made doubts, and what it learns of
    /// them is taken all the same.
    async fn come_back(&mut self) -> Result<(), Trouble> {
        let fenced = self.opening.boot;
        // Always the same one: where the answer to a registration was lost, it is known again.
        let (mut next, digest) = (*fenced.as_bytes(), Sha256::digest(fenced.as_bytes()));
        next.iter_mut().skip(BOOT_TIME_BYTES).zip(digest).for_each(|(byte, new)| *byte = new);
        let boot = BootId::from_bytes(next);
        let node = &self.opening.node;
        let registered =
            session::register_again(&self.store.target, node, self.store.own, boot, fenced).await?;
        if registered.is_none() {
            let why = format!("another process runs as node {node}: give every sidecar a NODE of its own");
            tracing::error!(node, "{why}");
            self.store.latch(&why);
            return Err(Trouble::Broken(LedgerError::Unavailable(why)));
        }
        tracing::warn!(node, "this sidecar was silent for so long that others took it for gone; it goes on");
        self.opening.boot = boot;
        self.batch = 0;
        self.head = None;
        self.store.note_boot(boot);
        Ok(())
    }

    /// What is done on a tick beside what the rules do: tells that this run lives, and doubts what those that are gone
    /// were sending.
    async fn keep_up(&mut self) {
        if let Err(trouble) = self.doubt_gone(false).await {
            if let Trouble::Down(_) = trouble {
                self.drop_session();
            }
            tracing::debug!(?trouble, "upkeep of the ledger came to nothing; it is tried again");
        }
    }

    /// `looks`: whether it looks for silent ones whoever leads.
    async fn doubt_gone(&mut self, looks: bool) -> Result<(), Trouble> {
        let Some(session) = &self.session else { return Ok(()) };
        let (gone, leads) = session.beat(self.opening.boot, looks).await?;
        self.store.note_lead(leads);
        if gone.is_empty() {
            return Ok(());
        }
        loop {
            let mut doubted = 0;
            // This run may itself be one of those that are gone, and another one by now.
            self.transact(&mut |around, tx, now| {
                doubted = tx.doubt_those_of(&gone, around.boot, DOUBTED_AT_ONCE, now)?;
                Ok(())
            })
            .await?;
            if doubted == 0 {
                break;
            }
        }
        if let Some(session) = &self.session {
            session.note_doubted(&gone).await?;
        }
        Ok(())
    }
}

/// Answers and records are long, and seldom asked for.
fn is_worth_a_hint(table: usize) -> bool {
    ![ANSWERS.number, AUDIT.number].iter().any(|number| table == usize::from(*number))
}

/// What a call came to, and records for which nobody waits: they are written as soon as they can be.
fn is_outcome(command: &Command) -> bool {
    matches!(command, Command::Resolve { .. } | Command::Note { .. })
}

#[expect(clippy::needless_pass_by_value, reason = "as `map_err` gives it")]
pub(super) fn unavailable(error: DatabaseError) -> LedgerError {
    match error {
        DatabaseError::Newer { found, known, .. } => LedgerError::NewerFormat {
            found: u32::try_from(found).unwrap_or(u32::MAX),
            known: u32::try_from(known).unwrap_or(u32::MAX),
        },
        DatabaseError::Unavailable(_) | DatabaseError::Refused(_) | DatabaseError::Failed { .. } => {
            LedgerError::Unavailable(error.to_string())
        }
    }
}

fn told(trouble: Trouble) -> LedgerError {
    match trouble {
        Trouble::Broken(error) => error,
        Trouble::Down(why) | Trouble::Unknown(why) => LedgerError::Unavailable(why),
        Trouble::Fenced => LedgerError::Unavailable("another process runs as this node".to_owned()),
        Trouble::Crowded | Trouble::Wider => LedgerError::Unavailable("it is too crowded".to_owned()),
    }
}
