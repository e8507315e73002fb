//! The ledger in PostgreSQL: one for a whole fleet of sidecars, by the same rules over the same rows.
//!
//! - A batch crosses the wire, not a call: two round trips, whatever is in it (`writer.rs`, `session.rs`).
//! - What may be written is locked first, always in one order: rows of `locks`, by what they are about
//!   ([`crate::ledger::row::Lock`]). A row that is read under its lock is as it will be when the transaction holds.
//! - Each sidecar has a chain of its own, by its node's name. Each run of its process has a row in `boots`: its heartbeat,
//!   the number of its last batch, and whether others took it for gone. Every transaction begins by locking that row, so
//!   that a run that is fenced writes nothing any more, and an unknown commit can be asked about.
//! - Time is the database's.
//! - While the database cannot be used, nothing is admitted; when it is back, everything goes on by itself.

pub(in crate::ledger) mod fleet;
pub(in crate::ledger) mod import;
mod session;
mod writer;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::Duration;

use tokio::runtime::Runtime;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use crate::id::{BootId, LedgerId};
use crate::ledger::command::Late;
use crate::ledger::loaded::{Hints, Loaded, Needs};
use crate::ledger::notes::Notes;
use crate::ledger::postgres::session::{Own, Session};
use crate::ledger::postgres::writer::{Writer, unavailable};
use crate::ledger::query::Reader;
use crate::ledger::row::{CALL_IDS, KEY_DIGESTS, KEYS, OBJECTS};
use crate::ledger::source::Source;
use crate::ledger::writer::{Mail, add_to, next_batch};
use crate::ledger::{LedgerError, Opening};
use crate::postgres::Target;
use crate::time::{Clock, UnixMs};

/// How often rows are fetched for one look at the ledger.
const LOOKS_MAX: usize = 24;
/// Rows of a part of a table that one look may want.
const PART_ROWS_MAX: usize = 300_000;
/// How long rows may take.
const FETCH: Duration = Duration::from_secs(8);
/// The pause before a database is asked again that was not there.
const ASK_AGAIN: Duration = Duration::from_millis(500);

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A ledger in a schema of a database.
pub(crate) struct PostgresStore {
    target: Target,
    own: Own,
    /// What the ledger says of itself, once it is open.
    known: OnceLock<(LedgerId, [u8; 32])>,
    boot: Mutex<BootId>,
    /// Why nothing can be written until the process is started again.
    latch: Mutex<Option<String>>,
    /// Why nothing can be written just now.
    trouble: Mutex<Option<String>>,
    /// What the database's clock showed, and when that was heard. The machine's clock is not asked: it may be wrong, or be
    /// set while the process runs.
    heard: Mutex<(Instant, UnixMs)>,
    /// Whether this sidecar is the one that looks for what became of doubts.
    leads: AtomicBool,
    /// The highest time that was ever used.
    mark: Arc<AtomicU64>,
    clock: Clock,
    /// What reads have seen lately.
    hints: Mutex<Hints>,
    /// For reads, which do not wait for the writer.
    reads: tokio::sync::Mutex<Reads>,
    /// Drives the session for reads, whoever reads.
    runtime: Option<Runtime>,
}

impl std::fmt::Debug for PostgresStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PostgresStore").field("target", &self.target).finish_non_exhaustive()
    }
}

impl Drop for PostgresStore {
    fn drop(&mut self) {
        // It may be dropped where nothing may wait.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// Opens the ledger and starts its writer, on a thread of its own.
pub(super) async fn open(
    target: Target,
    opening: Opening,
    mail: mpsc::Receiver<Mail>,
    notes: Notes,
    late: Late,
) -> Result<Arc<PostgresStore>, LedgerError> {
    let (opened, answer) = oneshot::channel();
    thread::spawn(move || {
        let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
            Ok(runtime) => runtime,
            Err(error) => {
                let why = format!("its writer cannot start: {error}");
                drop(opened.send(Err(LedgerError::Unavailable(why))));
                return;
            }
        };
        runtime.block_on(write(target, opening, mail, (notes, late), opened));
    });
    answer.await.unwrap_or_else(|_| Err(LedgerError::Unavailable("its writer has stopped".to_owned())))
}

/// What the writer's thread does.
async fn write(
    target: Target,
    opening: Opening,
    mut mail: mpsc::Receiver<Mail>,
    (notes, late): (Notes, Late),
    opened: oneshot::Sender<Result<Arc<PostgresStore>, LedgerError>>,
) {
    let (store, mut writer) = match begin(target, opening, late).await {
        Ok(begun) => begun,
        Err(error) => {
            drop(opened.send(Err(error)));
            return;
        }
    };
    let latched = Arc::downgrade(&store);
    drop(opened.send(Ok(store)));
    let worked = Box::pin(to_its_end(async {
        while let Some(mut batch) = next_batch(&mut mail, &notes).await {
            let patience = writer.patience();
            if !patience.is_zero() {
                add_to(&mut batch, &mut mail, &notes, patience).await;
            }
            writer.commit(batch).await;
        }
        writer.close().await;
    }));
    if worked.await.is_err()
        && let Some(store) = latched.upgrade()
    {
        store.latch("its writer panicked");
    }
}

/// Runs a task to its end, or to its panic.
async fn to_its_end(work: impl Future<Output = ()>) -> Result<(), ()> {
    use std::panic::{AssertUnwindSafe, catch_unwind};
    let mut work = std::pin::pin!(work);
    std::future::poll_fn(move |context| {
        match catch_unwind(AssertUnwindSafe(|| work.as_mut().poll(context))) {
            Ok(std::task::Poll::Pending) => std::task::Poll::Pending,
            Ok(std::task::Poll::Ready(())) => std::task::Poll::Ready(Ok(())),
            Err(_) => std::task::Poll::Ready(Err(())),
        }
    })
    .await
}

async fn begin(
    target: Target,
    opening: Opening,
    late: Late,
) -> Result<(Arc<PostgresStore>, Writer), LedgerError> {
    let fresh = *opening.fresh_id.as_bytes();
    let registered = session::register(&target, &opening.node, fresh, opening.boot).await;
    let Some((own, at)) = registered.map_err(unavailable)? else {
        return Err(LedgerError::Locked);
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .map_err(|error| LedgerError::Unavailable(format!("its reads cannot start: {error}")))?;
    let store = PostgresStore {
        target,
        own,
        known: OnceLock::new(),
        boot: Mutex::new(opening.boot),
        latch: Mutex::default(),
        trouble: Mutex::default(),
        heard: Mutex::new((Instant::now(), at)),
        leads: AtomicBool::new(false),
        mark: Arc::default(),
        clock: opening.clock.clone(),
        hints: Mutex::default(),
        reads: tokio::sync::Mutex::default(),
        runtime: Some(runtime),
    };
    let store = Arc::new(store);
    let writer = Writer::open(Arc::clone(&store), opening, late).await?;
    Ok((store, writer))
}

impl PostgresStore {
    fn know(&self, id: LedgerId, salt: [u8; 32], mark: UnixMs) {
        let _ = self.known.set((id, salt));
        self.mark.fetch_max(mark.millis(), Ordering::SeqCst);
    }

    pub(super) fn id(&self) -> LedgerId {
        self.known().0
    }

    pub(super) fn salt(&self) -> &[u8; 32] {
        &self.known().1
    }

    fn known(&self) -> &(LedgerId, [u8; 32]) {
        // Known from when it is open, and nobody has it before.
        self.known.get_or_init(|| (LedgerId::from_bytes([0; 16]), [0; 32]))
    }

    /// This run of the process.
    pub(super) fn boot(&self) -> BootId {
        *locked(&self.boot)
    }

    fn note_boot(&self, boot: BootId) {
        *locked(&self.boot) = boot;
    }

    /// Why nothing can be written, for now or until the next start.
    pub(super) fn failure(&self) -> Option<String> {
        self.latched().or_else(|| locked(&self.trouble).clone())
    }

    fn latched(&self) -> Option<String> {
        locked(&self.latch).clone()
    }

    fn latch(&self, why: &str) {
        let mut latch = locked(&self.latch);
        if latch.is_none() {
            tracing::error!(why, "the ledger failed; nothing is admitted until the process is started again");
            *latch = Some(why.to_owned());
        }
    }

    fn note_lead(&self, leads: bool) {
        self.leads.store(leads, Ordering::Relaxed);
    }

    pub(super) fn leads(&self) -> bool {
        self.leads.load(Ordering::Relaxed)
    }

    fn note_trouble(&self, trouble: Option<String>) {
        *locked(&self.trouble) = trouble;
    }

    /// The clock of all: the database's.
    fn wall(&self) -> UnixMs {
        match self.clock {
            Clock::System => {
                let (since, at) = *locked(&self.heard);
                at.plus_millis(u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX))
            }
            Clock::Manual(_) => self.clock.now(),
        }
    }

    /// The time: never before one that was used already.
    pub(super) fn now(&self) -> UnixMs {
        let wall = self.wall();
        UnixMs::from_millis(self.mark.fetch_max(wall.millis(), Ordering::SeqCst)).max(wall)
    }

    /// What the database's clock shows.
    fn note_time(&self, at: UnixMs) {
        *locked(&self.heard) = (Instant::now(), at);
    }

    /// Looks at the ledger, as often as rows have to be fetched for it: mostly once, since it is found out first what will be
    /// needed, by what was seen lately. Nothing is answered by that.
    pub(super) async fn read<T>(
        self: &Arc<Self>,
        look: impl Fn(&Reader<'_>) -> Result<T, LedgerError>,
    ) -> Result<T, LedgerError> {
        let (seen, mut needs) = self.guess(&look);
        if needs.is_empty() {
            return seen;
        }
        let mut loaded = Box::new(Loaded::to_read());
        for _ in 0..LOOKS_MAX {
            loaded = self.fetch(needs, loaded).await?;
            let seen = look(&Reader::of(Source::Loaded(&loaded), self.id()));
            needs = loaded.take_needs();
            if needs.is_empty() {
                self.note_seen(&loaded);
                return seen;
            }
        }
        Err(LedgerError::Unavailable("more has to be looked through than one answer may".to_owned()))
    }

    /// What a look at what was seen lately comes to, and which rows it is about.
    fn guess<T>(
        &self,
        look: impl Fn(&Reader<'_>) -> Result<T, LedgerError>,
    ) -> (Result<T, LedgerError>, Needs) {
        let mut hints = locked(&self.hints);
        let loaded = Loaded::to_guess_reads(std::mem::take(&mut *hints));
        let seen = look(&Reader::of(Source::Loaded(&loaded), self.id()));
        let needs = loaded.take_needs();
        *hints = loaded.into_hints();
        (seen, needs)
    }

    /// Remembers the rows that lead to others.
    fn note_seen(&self, loaded: &Loaded) {
        let leads = [KEY_DIGESTS.number, KEYS.number, OBJECTS.number, CALL_IDS.number].map(usize::from);
        let mut hints = locked(&self.hints);
        for (table, key, value) in loaded.rows().filter(|(table, ..)| leads.contains(table)) {
            hints.note(table, key, value);
        }
    }

    /// Fetches rows, driven by a thread of the store's own: whoever reads may be where nothing else runs.
    async fn fetch(
        self: &Arc<Self>,
        needs: Needs,
        mut loaded: Box<Loaded>,
    ) -> Result<Box<Loaded>, LedgerError> {
        let gone = || LedgerError::Unavailable("its reads have stopped".to_owned());
        if needs.parts.values().any(|limit| *limit > PART_ROWS_MAX) {
            return Err(LedgerError::Unavailable(
                "more has to be looked through than one answer may".to_owned(),
            ));
        }
        let store = Arc::clone(self);
        let fetching = self.runtime.as_ref().ok_or_else(gone)?.spawn(async move {
            let session = store.session().await?;
            let answer = tokio::time::timeout(FETCH, session.load(&needs, &mut loaded)).await;
            match answer {
                Ok(Ok(())) => Ok(loaded),
                Ok(Err(error)) => {
                    store.reads.lock().await.session = None;
                    Err(unavailable(error))
                }
                Err(_) => {
                    store.reads.lock().await.session = None;
                    Err(LedgerError::Unavailable("the database gives no answer".to_owned()))
                }
            }
        });
        fetching.await.unwrap_or_else(|_| Err(gone()))
    }

    /// The session for reads. A database that was not there a moment ago is not asked again yet.
    async fn session(&self) -> Result<Arc<Session>, LedgerError> {
        let mut reads = self.reads.lock().await;
        if let Some(session) = &reads.session {
            return Ok(Arc::clone(session));
        }
        if let Some((at, why)) = &reads.failed
            && at.elapsed() < ASK_AGAIN
        {
            return Err(why.clone());
        }
        match Session::open(&self.target, self.own).await {
            Ok(session) => {
                let session = Arc::new(session);
                (reads.session, reads.failed) = (Some(Arc::clone(&session)), None);
                Ok(session)
            }
            Err(error) => {
                let error = unavailable(error);
                reads.failed = Some((Instant::now(), error.clone()));
                Err(error)
            }
        }
    }
}

/// The session for reads, and how the last attempt to have one failed.
#[derive(Default)]
struct Reads {
    session: Option<Arc<Session>>,
    failed: Option<(Instant, LedgerError)>,
}
