//! The store of several collectors: one schema of a PostgreSQL.
//!
//! | table | row |
//! |---|---|
//! | `head` | one: the place that the next record takes. Whoever writes anything holds it, so that one collector writes at a time |
//! | `chains` | a chain, as JSON |
//! | `records` | a record by place of arrival: its bytes, and the words by which it is found ([`crate::journal::marks_of`]) |
//! | `calls` | a call, and the place of its last event |
//! | `arrivals` | an hour, and its first place |
//! | `evidence` | a batch that contradicted what was held, as JSON |
//!
//! Places are given out and committed in one order, so that a reader who has seen a place has seen all before it.
//!
//! A commit whose answer is lost leaves nobody wiser, and nobody needs to be: the sender is told that it failed, sends the
//! batch again, and what is held of it already is recognised by chain and sequence. While the database is away every
//! question and every batch is told so; the next one tries again.
//!
//! Never: sends a batch to the database a second time after a commit whose outcome is not known; the sender does.

mod rows;
mod search;

use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use serde_json::{Map, Value};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio::time::{Duration, Instant, sleep_until, timeout};
use tokio_postgres::types::Type;
use tokio_postgres::{IsolationLevel, Row};

use self::rows::{Verdicts, drop_before};
use self::search::Search;
use crate::audit::Sealed;
use crate::collect::chain::Chain;
use crate::collect::store::{
    BATCHES_MAX, BATCHES_WAITING_MAX, DROP_EVERY_MS, DROP_ROWS, Following, Incoming, Reply, StoreError,
    Verdict,
};
use crate::journal::{AuditFilter, Page};
use crate::postgres::{self as database, Connection, DatabaseError, Target};
use crate::time::{Clock, HOUR_MS};

/// Questions that are asked of the database at one time; each has a session of its own.
const READERS: usize = 4;
/// How long a question waits for its turn, and then for its answer.
const READ_MS: u64 = 15_000;
/// What a commit may take in all, waiting for other collectors included.
const COMMIT_MS: u64 = 30_000;
/// How often a commit that stood in the way of another is run again.
const TRIES: usize = 4;
/// Records of a chain that are followed in one step.
const FOLLOW_ROWS: i64 = 1_000;

/// One step for each version. What was released is never changed: the next version is a step of its own.
const STEPS: &[&str] = &["
    CREATE TABLE head (id int PRIMARY KEY, next_place bigint NOT NULL);
    INSERT INTO head VALUES (1, 1);
    CREATE TABLE chains (
        chain_id text PRIMARY KEY, number int NOT NULL UNIQUE, node text NOT NULL, chain jsonb NOT NULL
    );
    CREATE INDEX chains_node ON chains (node);
    CREATE TABLE records (
        place bigint PRIMARY KEY, chain int NOT NULL, seq bigint NOT NULL, at_ms bigint NOT NULL, call text,
        words text[] NOT NULL, hash bytea NOT NULL, record bytea NOT NULL, UNIQUE (chain, seq)
    );
    CREATE INDEX records_at ON records (at_ms);
    CREATE INDEX records_words ON records USING gin (words);
    CREATE TABLE calls (call text PRIMARY KEY, place bigint NOT NULL);
    CREATE TABLE arrivals (hour bigint PRIMARY KEY, place bigint NOT NULL);
    CREATE TABLE evidence (number bigint PRIMARY KEY, last_hash text NOT NULL, batch text NOT NULL);
"];

impl From<DatabaseError> for StoreError {
    fn from(error: DatabaseError) -> Self {
        Self::Unavailable(error.to_string())
    }
}

/// The handle.
#[derive(Clone, Debug)]
pub struct Store {
    readers: Arc<Readers>,
    batches: mpsc::Sender<(Incoming, Reply)>,
}

impl Store {
    /// Makes or brings forward the schema and starts the writer. Records are kept for `keep_days`. A database that cannot
    /// be reached now is tried again by whoever needs it.
    ///
    /// # Errors
    /// [`DatabaseError`], but [`DatabaseError::Unavailable`].
    pub async fn open(target: Target, clock: Clock, keep_days: u32) -> Result<Self, DatabaseError> {
        let target = Arc::new(RwLock::new(target));
        match session_of(&target).await {
            Ok(_) => {}
            Err(error @ DatabaseError::Unavailable(_)) => {
                tracing::warn!(%error, "the collector starts without its database, and tries again");
            }
            Err(error) => return Err(error),
        }
        let (batches, waiting) = mpsc::channel(BATCHES_WAITING_MAX);
        let writer = Writer { target: Arc::clone(&target), session: None, clock, keep_days };
        tokio::spawn(writer.run(waiting));
        let room = Arc::new(Semaphore::new(READERS));
        Ok(Self { readers: Arc::new(Readers { target, room, idle: Mutex::default() }), batches })
    }

    /// Uses another password or trust anchor for sessions to come.
    pub fn turn_to(&self, target: Target) {
        *self.readers.target.write().unwrap_or_else(PoisonError::into_inner) = target;
    }

    pub(super) async fn take(&self, incoming: Incoming) -> Result<Chain, StoreError> {
        let gone = || StoreError::Unavailable("its writer has stopped".to_owned());
        let (reply, answer) = oneshot::channel();
        self.batches.send((incoming, reply)).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }

    pub(super) async fn chains(&self) -> Result<Vec<(String, Chain)>, StoreError> {
        let session = self.readers.lend().await?;
        // As a file orders them, whatever the database's own order is.
        let all = "SELECT chain_id, chain::text FROM chains ORDER BY chain_id COLLATE \"C\"";
        let rows = bounded(session.lent.query_typed(all, &[])).await?;
        session.give_back();
        rows.iter()
            .map(|row| Ok((row.try_get(0)?, chain_of(row.try_get(1)?)?)))
            .collect::<Result<_, _>>()
            .map_err(|error: DatabaseError| error.into())
    }

    pub(super) async fn query(
        &self,
        filter: &AuditFilter,
        after: Option<u64>,
        limit: usize,
    ) -> Result<Page<Map<String, Value>, u64>, StoreError> {
        let mut session = self.readers.lend().await?;
        let txn = session.lent.build_transaction().isolation_level(IsolationLevel::RepeatableRead);
        // A page is of one moment, in however many steps it is found.
        let txn = bounded(txn.read_only(true).start()).await?;
        let page = Search::of(filter, limit).run(&txn, after).await?;
        bounded(txn.rollback()).await?;
        session.give_back();
        Ok(page)
    }

    pub(super) async fn verify(&self, chain_id: &str, chain: &Chain) -> Result<Verdict, StoreError> {
        let session = self.readers.lend().await?;
        let (mut following, mut after) = (Following::of(chain), 0_i64);
        loop {
            let next =
                "SELECT seq, hash, record FROM records WHERE chain = $1 AND seq > $2 ORDER BY seq LIMIT $3";
            let number = number_of(chain);
            let rows = bounded(session.lent.query_typed(
                next,
                &[(&number, Type::INT4), (&after, Type::INT8), (&FOLLOW_ROWS, Type::INT8)],
            ))
            .await?;
            for row in &rows {
                after = row.try_get(0).map_err(DatabaseError::from)?;
                let sealed = sealed_of(row, 1)?;
                if let Err(broken) = following.follow(after.unsigned_abs(), &sealed) {
                    session.give_back();
                    return Ok(following.verdict(chain_id, Some(broken)));
                }
            }
            if rows.is_empty() {
                session.give_back();
                return Ok(following.verdict(chain_id, None));
            }
        }
    }

    pub(super) async fn evidence(&self, limit: usize) -> Result<Vec<Value>, StoreError> {
        let session = self.readers.lend().await?;
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        let newest = "SELECT batch FROM evidence ORDER BY number DESC LIMIT $1";
        let rows = bounded(session.lent.query_typed(newest, &[(&limit, Type::INT8)])).await?;
        session.give_back();
        Ok(rows.iter().map(|row| serde_json::from_str(row.get(0)).unwrap_or_default()).collect())
    }
}

/// A session whose schema is of this build's version.
async fn session_of(target: &RwLock<Target>) -> Result<Connection, DatabaseError> {
    let target = target.read().unwrap_or_else(PoisonError::into_inner).clone();
    let mut session = database::connect(&target).await?;
    let encoding: String = session.query_typed_one("SHOW server_encoding", &[]).await?.try_get(0)?;
    if encoding != "UTF8" {
        let why = format!("its encoding is {encoding}: make it with ENCODING 'UTF8' TEMPLATE template0");
        return Err(DatabaseError::Refused(why));
    }
    database::migrate(&mut session, target.schema(), STEPS).await?;
    Ok(session)
}

/// Sessions of those who ask.
#[derive(Debug)]
struct Readers {
    target: Arc<RwLock<Target>>,
    room: Arc<Semaphore>,
    idle: Mutex<Vec<Connection>>,
}

/// A session that is given back when all went well, and ended else.
struct Session {
    lent: Connection,
    to: Arc<Readers>,
    _permit: OwnedSemaphorePermit,
}

impl Readers {
    async fn lend(self: &Arc<Self>) -> Result<Session, StoreError> {
        let busy = |_| StoreError::Unavailable("too many questions at once; ask again".to_owned());
        let turn = timeout(Duration::from_millis(READ_MS), Arc::clone(&self.room).acquire_owned());
        let Ok(permit) = turn.await.map_err(busy)? else {
            return Err(StoreError::Unavailable("it is closed".to_owned()));
        };
        let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let lent = if let Some(session) = idle.filter(|session| !session.is_closed()) {
            session
        } else {
            let late = |_| StoreError::Unavailable(format!("no session within {READ_MS} ms"));
            let opening = timeout(Duration::from_millis(READ_MS), session_of(&self.target));
            opening.await.map_err(late)??
        };
        Ok(Session { lent, to: Arc::clone(self), _permit: permit })
    }
}

impl Session {
    fn give_back(self) {
        self.to.idle.lock().unwrap_or_else(PoisonError::into_inner).push(self.lent);
    }
}

async fn bounded<T>(
    asked: impl Future<Output = Result<T, tokio_postgres::Error>>,
) -> Result<T, DatabaseError> {
    let late = |_| DatabaseError::Unavailable(format!("no answer within {READ_MS} ms"));
    Ok(timeout(Duration::from_millis(READ_MS), asked).await.map_err(late)??)
}

fn chain_of(text: &str) -> Result<Chain, DatabaseError> {
    serde_json::from_str(text).map_err(|_| DatabaseError::Unavailable("a chain cannot be read".to_owned()))
}

fn number_of(chain: &Chain) -> i32 {
    i32::try_from(chain.number).unwrap_or(i32::MAX)
}

/// A record of two columns: its hash, and its bytes.
fn sealed_of(row: &Row, at: usize) -> Result<Sealed, DatabaseError> {
    let hash: &[u8] = row.try_get(at)?;
    let corrupt = |_| DatabaseError::Unavailable("a record cannot be read".to_owned());
    Ok(Sealed { hash: hash.try_into().map_err(corrupt)?, bytes: row.try_get::<_, Vec<u8>>(at + 1)? })
}

/// Takes what is sent and lets go of what is old, on a session of its own.
struct Writer {
    target: Arc<RwLock<Target>>,
    session: Option<Connection>,
    clock: Clock,
    keep_days: u32,
}

impl Writer {
    async fn run(mut self, mut waiting: mpsc::Receiver<(Incoming, Reply)>) {
        let mut look_at = Instant::now();
        loop {
            tokio::select! {
                batch = waiting.recv() => {
                    let Some(batch) = batch else { return };
                    let mut batches = vec![batch];
                    while batches.len() < BATCHES_MAX
                        && let Ok(batch) = waiting.try_recv()
                    {
                        batches.push(batch);
                    }
                    self.commit(batches).await;
                }
                () = sleep_until(look_at) => {
                    let dropped = self.drop_old().await;
                    // One step and no more while batches may wait.
                    if dropped < DROP_ROWS {
                        look_at = Instant::now() + Duration::from_millis(DROP_EVERY_MS);
                    }
                }
            }
        }
    }

    async fn commit(&mut self, batches: Vec<(Incoming, Reply)>) {
        let (incoming, replies): (Vec<Incoming>, Vec<Reply>) = batches.into_iter().unzip();
        let mut told: Vec<Result<Chain, StoreError>> = Vec::new();
        match self.keep(&incoming).await {
            Ok(verdicts) => told.extend(verdicts.into_iter().map(|verdict| verdict.map_err(Into::into))),
            // One of them cannot be kept; the others have nothing to do with it.
            Err(DatabaseError::Failed { .. }) if incoming.len() > 1 => {
                for one in &incoming {
                    let verdict = self.keep(std::slice::from_ref(one)).await;
                    told.push(match verdict.map(|mut verdicts| verdicts.pop()) {
                        Ok(Some(verdict)) => verdict.map_err(Into::into),
                        Ok(None) => Err(StoreError::Unavailable("not reached".to_owned())),
                        Err(error) => Err(error.into()),
                    });
                }
            }
            Err(error) => told.extend(incoming.iter().map(|_| Err(error.clone().into()))),
        }
        for (reply, verdict) in replies.into_iter().zip(told) {
            // A sender that has gone will ask again.
            let _ = reply.send(verdict);
        }
    }

    async fn keep(&mut self, incoming: &[Incoming]) -> Result<Verdicts, DatabaseError> {
        let now = self.clock.now();
        let mut result = Err(DatabaseError::Unavailable("not tried".to_owned()));
        for _ in 0..TRIES {
            let keep = async |session: &mut Connection| rows::keep(session, incoming, now).await;
            result = self.with_session(keep).await;
            if !result.as_ref().is_err_and(DatabaseError::may_run_again) {
                break;
            }
        }
        if let Err(error) = &result {
            tracing::error!(%error, "records cannot be kept; their senders will send them again");
        }
        result
    }

    /// Deletes records that arrived before the time for which they are kept, in one bounded step; says how many.
    async fn drop_old(&mut self) -> usize {
        let kept_hours = u64::from(self.keep_days).saturating_mul(24);
        let first_kept = (self.clock.now().millis() / HOUR_MS).saturating_sub(kept_hours);
        let drop = async |session: &mut Connection| drop_before(session, first_kept).await;
        match self.with_session(drop).await {
            Ok(dropped) => dropped,
            Err(error) => {
                tracing::warn!(%error, "old records cannot be deleted; that is tried again");
                0
            }
        }
    }

    /// Works on this writer's session, which ends with whatever fails on it.
    async fn with_session<T>(
        &mut self,
        work: impl AsyncFnOnce(&mut Connection) -> Result<T, DatabaseError>,
    ) -> Result<T, DatabaseError> {
        let kept = self.session.take().filter(|session| !session.is_closed());
        let all = async {
            let mut session = match kept {
                Some(session) => session,
                None => session_of(&self.target).await?,
            };
            let done = work(&mut session).await?;
            Ok::<_, DatabaseError>((done, session))
        };
        let late = |_| DatabaseError::Unavailable(format!("no commit within {COMMIT_MS} ms"));
        let (done, session) = timeout(Duration::from_millis(COMMIT_MS), all).await.map_err(late)??;
        self.session = Some(session);
        Ok(done)
    }
}
