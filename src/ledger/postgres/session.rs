//! What goes over the wire: one session with its statements, and how rows are named in the database.
//!
//! Each table of [`crate::ledger::row`] is a table of two columns, `k` and `v`. Keys are in the order of their bytes, so
//! numbers in them are turned around; what each sidecar has for itself has the sidecar's id before it.

use std::collections::{HashMap, HashSet};
use std::future::{Future, poll_fn};
use std::ops::Bound;
use std::pin::Pin;
use std::sync::Mutex;
use std::task::Poll;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio_postgres::Statement;
use tokio_postgres::types::ToSql;

use crate::id::BootId;
use crate::ledger::changes::Changes;
use crate::ledger::loaded::{Loaded, Needs, Part, PartRows};
use crate::ledger::postgres::locked;
use crate::ledger::row::{AUDIT, COUNTERS, DUE, META, TABLE_NAMES, TABLES, meta};
use crate::ledger::source::Order;
use crate::postgres::{self, Connection, DatabaseError, Target};
use crate::time::UnixMs;

/// The steps in which the schema came to be.
pub(super) const STEPS: &[&str] = &["
    CREATE TABLE sidecars (node text PRIMARY KEY, id bytea NOT NULL, boot bytea NOT NULL);
    CREATE TABLE boots (
        boot bytea PRIMARY KEY, node text NOT NULL, batch bigint NOT NULL DEFAULT 0,
        seen timestamptz NOT NULL DEFAULT clock_timestamp(),
        fenced boolean NOT NULL DEFAULT false, doubted boolean NOT NULL DEFAULT false
    ) WITH (fillfactor = 50);
    CREATE TABLE locks (slot integer PRIMARY KEY);
    CREATE TABLE meta (k bytea PRIMARY KEY, v bytea NOT NULL);
    CREATE TABLE keys (k bytea PRIMARY KEY, v bytea NOT NULL);
    CREATE TABLE key_digests (k bytea PRIMARY KEY, v bytea NOT NULL);
    CREATE TABLE issuers (k bytea PRIMARY KEY, v bytea NOT NULL);
    CREATE TABLE budgets (k bytea PRIMARY KEY, v bytea NOT NULL);
    CREATE TABLE calls (k bytea PRIMARY KEY, v bytea NOT NULL) WITH (fillfactor = 80);
    CREATE TABLE call_ids (k bytea PRIMARY KEY, v bytea NOT NULL);
    CREATE TABLE answers (k bytea PRIMARY KEY, v bytea NOT NULL);
    CREATE TABLE holds (k bytea PRIMARY KEY, v bytea NOT NULL) WITH (fillfactor = 80);
    CREATE TABLE objects (k bytea PRIMARY KEY, v bytea NOT NULL);
    CREATE TABLE counters (k bytea PRIMARY KEY, v bytea NOT NULL) WITH (fillfactor = 50);
    CREATE TABLE due (k bytea PRIMARY KEY, v bytea NOT NULL);
    CREATE TABLE refusals (k bytea PRIMARY KEY, v bytea NOT NULL);
    CREATE TABLE audit (k bytea PRIMARY KEY, v bytea NOT NULL);
"];

/// How long a sidecar may be silent until others take it for gone, in seconds.
pub(super) const SILENCE_S: u32 = 15;
/// How long one round trip may take, locks that are waited for included.
const ANSWER: Duration = Duration::from_secs(8);
/// How statements are planned: all of them go by the keys of their tables, however small those were when it was planned, and
/// once for all. A server of the same wire protocol may know less of that.
const PLANS: &str = "SELECT set_config(name, wanted, false) FROM pg_settings JOIN (VALUES
        ('plan_cache_mode', 'force_generic_plan'), ('enable_seqscan', 'off'), ('enable_bitmapscan', 'off'), ('jit', 'off')
    ) AS plans (name, wanted) USING (name)";
/// How long a run of the process that is over is remembered, in hours.
const BOOTS_KEPT_H: u32 = 48;

/// Where a number stands in the key of a table.
fn number_in(table: usize) -> Option<std::ops::Range<usize>> {
    match table {
        _ if table == usize::from(DUE.number) || table == usize::from(AUDIT.number) => Some(0..8),
        _ if table == usize::from(COUNTERS.number) => Some(17..21),
        _ => None,
    }
}

/// Numbers are stored with their least byte first here, and with their greatest first there.
fn turned(table: usize, key: &[u8]) -> Vec<u8> {
    let mut key = key.to_vec();
    if let Some(number) = number_in(table).and_then(|place| key.get_mut(place)) {
        number.reverse();
    }
    key
}

/// The id of a sidecar, before what it has for itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Own(pub(super) [u8; 16]);

impl Own {
    /// A row's key in the database.
    pub(super) fn stored(&self, table: usize, key: &[u8]) -> Vec<u8> {
        if table == usize::from(AUDIT.number) {
            return [self.0.as_slice(), &turned(table, key)].concat();
        }
        if table == usize::from(META.number) {
            let is_own = meta::OWN.iter().any(|name| name.as_bytes() == key);
            return if is_own {
                [[1].as_slice(), &self.0, key].concat()
            } else {
                [[0].as_slice(), key].concat()
            };
        }
        turned(table, key)
    }

    /// The same the other way round.
    fn row(table: usize, stored: &[u8]) -> Box<[u8]> {
        let rest = match (table, stored.first()) {
            _ if table == usize::from(AUDIT.number) => stored.get(16..),
            (_, Some(1)) if table == usize::from(META.number) => stored.get(17..),
            _ if table == usize::from(META.number) => stored.get(1..),
            _ => Some(stored),
        };
        turned(table, rest.unwrap_or_default()).into()
    }

    /// From which key to before which.
    fn span(&self, part: &Part) -> (Vec<u8>, Vec<u8>) {
        let table = usize::from(part.table);
        let is_own = table == usize::from(AUDIT.number);
        let before = if is_own { self.0.to_vec() } else { Vec::new() };
        let next = |key: &[u8]| [self.stored(table, key).as_slice(), &[0]].concat();
        let from = match &part.from {
            Bound::Included(key) => self.stored(table, key),
            Bound::Excluded(key) => next(key),
            Bound::Unbounded => before.clone(),
        };
        let to = match &part.to {
            Bound::Included(key) => next(key),
            Bound::Excluded(key) => self.stored(table, key),
            // No key is as long as this and begins with so many of the highest byte.
            Bound::Unbounded => [before.as_slice(), &[255; 64]].concat(),
        };
        (from, to)
    }
}

/// How a transaction ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Ended {
    /// It holds.
    Held,
    /// It does not hold, and never will.
    Not(DatabaseError),
    /// Nobody knows.
    Unknown(DatabaseError),
}

/// What a transaction found when it began.
#[derive(Clone, Copy, Debug)]
pub(super) struct Begun {
    /// The database's clock.
    pub(super) at: UnixMs,
    /// Whether others took this run of the process for gone.
    pub(super) fenced: bool,
    /// How long it waited for its locks.
    pub(super) waited: Duration,
}

/// Tables, a bit for the number of each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
struct TableSet(u32);

impl TableSet {
    fn insert(&mut self, table: usize) {
        self.0 |= 1 << table;
    }

    fn names(self) -> impl Iterator<Item = (usize, &'static str)> {
        TABLE_NAMES.into_iter().enumerate().filter(move |(table, _)| self.0 & (1 << table) != 0)
    }
}

/// A statement about several tables at once, and about no others: the server goes through each that a statement names,
/// and answers each statement by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Shape {
    Load(TableSet),
    /// What is put and what is removed, and the number of the batch.
    Write {
        puts: TableSet,
        removes: TableSet,
    },
}

impl Shape {
    fn text(self) -> String {
        let mut last = 0;
        let mut next = || {
            last += 1;
            format!("${last}")
        };
        match self {
            Self::Load(tables) => {
                let of_each = tables.names().map(|(table, name)| {
                    format!("SELECT {table}::smallint, k, v FROM {name} WHERE k = ANY({}::bytea[])", next())
                });
                of_each.collect::<Vec<_>>().join(" UNION ALL ")
            }
            Self::Write { puts, removes } => {
                let beat = format!(
                    "UPDATE boots SET batch = {}, seen = clock_timestamp() WHERE boot = {}",
                    next(),
                    next()
                );
                let mut parts = Vec::new();
                for (_, name) in puts.names() {
                    let rows = format!("unnest({}::bytea[], {}::bytea[])", next(), next());
                    parts.push(format!(
                        "put_{name} AS (INSERT INTO {name} (k, v) SELECT * FROM {rows}
                         ON CONFLICT (k) DO UPDATE SET v = excluded.v)"
                    ));
                }
                for (_, name) in removes.names() {
                    parts.push(format!(
                        "remove_{name} AS (DELETE FROM {name} WHERE k = ANY({}::bytea[]))",
                        next()
                    ));
                }
                if parts.is_empty() { beat } else { format!("WITH {} {beat}", parts.join(", ")) }
            }
        }
    }
}

/// Shapes that a session remembers: the server keeps some 0.1 MB for each. Few dozens are usual.
const SHAPES_MAX: usize = 64;

/// A session, and the statements that it knows.
pub(super) struct Session {
    connection: Connection,
    own: Own,
    shapes: Mutex<HashMap<Shape, Statement>>,
    /// Upwards and downwards.
    parts: Vec<[Statement; 2]>,
    claim: Statement,
    make_locks: Statement,
    lock: Statement,
    /// Locks that are there, as transactions of this session have seen: none ever goes.
    made: Mutex<HashSet<u32>>,
}

type Answered<'f, T> = Pin<Box<dyn Future<Output = Result<T, tokio_postgres::Error>> + Send + 'f>>;

/// Asks all before it waits for the first: they go out together, in this order.
async fn all_of<T>(mut asked: Vec<Answered<'_, T>>) -> Vec<Result<T, tokio_postgres::Error>> {
    let mut answers: Vec<Option<Result<T, tokio_postgres::Error>>> = asked.iter().map(|_| None).collect();
    poll_fn(move |context| {
        let mut waits = false;
        for (question, answer) in asked.iter_mut().zip(&mut answers) {
            if answer.is_none() {
                match question.as_mut().poll(context) {
                    Poll::Ready(found) => *answer = Some(found),
                    Poll::Pending => waits = true,
                }
            }
        }
        if waits { Poll::Pending } else { Poll::Ready(answers.drain(..).flatten().collect()) }
    })
    .await
}

/// A peer that acknowledges all and says nothing would be waited for for ever.
async fn in_time<T>(asked: impl Future<Output = Result<T, DatabaseError>>) -> Result<T, DatabaseError> {
    let late = |_| DatabaseError::Unavailable("it gives no answer".to_owned());
    tokio::time::timeout(ANSWER, asked).await.map_err(late)?
}

impl Session {
    /// Opens a session for a sidecar's rows.
    pub(super) async fn open(target: &Target, own: Own) -> Result<Self, DatabaseError> {
        let connection = postgres::connect(target).await?;
        let mut texts = vec![
            "SELECT fenced, clock_timestamp() FROM boots WHERE boot = $1 FOR UPDATE".to_owned(),
            "INSERT INTO locks SELECT unnest($1::integer[]) ON CONFLICT DO NOTHING".to_owned(),
            "SELECT count(*), clock_timestamp()
             FROM (SELECT FROM locks WHERE slot = ANY($1::integer[]) ORDER BY slot FOR UPDATE) AS taken"
                .to_owned(),
        ];
        for (name, order) in TABLE_NAMES.iter().flat_map(|name| [(name, "ASC"), (name, "DESC")]) {
            texts.push(format!(
                "SELECT k, v FROM {name} WHERE k >= $1 AND k < $2 ORDER BY k {order} LIMIT $3"
            ));
        }
        let asked = texts.iter().map(|text| Box::pin(connection.prepare(text)) as Answered<'_, Statement>);
        let known = in_time(async {
            connection.batch_execute(PLANS).await?;
            Ok(all_of(asked.collect()).await)
        })
        .await?;
        let known: Result<Vec<Statement>, _> = known.into_iter().collect();
        let mut known = known?.into_iter();
        let gone = || DatabaseError::Unavailable("a statement was not prepared".to_owned());
        let mut next = || known.next().ok_or_else(gone);
        let (claim, make_locks, lock) = (next()?, next()?, next()?);
        let parts = (0..TABLES).map(|_| Ok([next()?, next()?])).collect::<Result<_, DatabaseError>>()?;
        let (shapes, made) = (Mutex::default(), Mutex::default());
        Ok(Self { connection, own, shapes, parts, claim, make_locks, lock, made })
    }

    /// The statement of a shape. What this session has not had yet is prepared first.
    async fn statement(&self, shape: Shape) -> Result<Statement, DatabaseError> {
        if let Some(known) = locked(&self.shapes).get(&shape) {
            return Ok(known.clone());
        }
        // Seldom done, and large.
        let statement = Box::pin(self.connection.prepare(&shape.text())).await?;
        let mut shapes = locked(&self.shapes);
        if shapes.len() >= SHAPES_MAX {
            shapes.clear();
        }
        shapes.insert(shape, statement.clone());
        Ok(statement)
    }

    /// Begins a transaction of this run of the process, locks and loads, all in one round trip.
    ///
    /// Locks that are not there yet are made by the transaction itself, then all are taken, each time in the order of their
    /// slots. While it makes them it may wait for another that is making the same one, and has itself only made lower ones.
    /// Once it takes them it waits for no maker any more, only for takers, and has itself only taken lower ones, beside
    /// those that it made, which nobody else sees yet. So nobody waits in a circle. What was made meanwhile is seen when it
    /// is taken: each statement sees all that is committed when it begins.
    pub(super) async fn begin(
        &self,
        boot: BootId,
        needs: &Needs,
        loaded: &mut Loaded,
    ) -> Result<Begun, DatabaseError> {
        let slots = |locks: &mut dyn Iterator<Item = &u32>| -> Vec<i32> {
            locks.map(|lock| i32::try_from(*lock).unwrap_or(i32::MAX)).collect()
        };
        let locks = slots(&mut needs.locks.iter());
        let unmade = {
            let made = locked(&self.made);
            slots(&mut needs.locks.iter().filter(|lock| !made.contains(*lock)))
        };
        let boot = boot.as_bytes().as_slice();
        let claims: [&(dyn ToSql + Sync); 1] = [&boot];
        let (makes, takes): ([&(dyn ToSql + Sync); 1], [&(dyn ToSql + Sync); 1]) = ([&unmade], [&locks]);
        let connection = &self.connection;
        let mut asked: Vec<Answered<'_, Vec<tokio_postgres::Row>>> = vec![
            Box::pin(async { connection.batch_execute("BEGIN").await.map(|()| Vec::new()) }),
            Box::pin(async { connection.query(&self.claim, &claims).await }),
        ];
        if !unmade.is_empty() {
            asked.push(Box::pin(async { connection.query(&self.make_locks, &makes).await }));
        }
        asked.push(Box::pin(async { connection.query(&self.lock, &takes).await }));
        let (answers, found) =
            in_time(async { Ok(both(all_of(asked), Box::pin(self.load(needs, loaded))).await) }).await?;
        let answers: Vec<_> = answers.into_iter().collect::<Result<_, _>>()?;
        let missing = || DatabaseError::Unavailable("an answer is missing".to_owned());
        let [_, own, .., held] = answers.as_slice() else { return Err(missing()) };
        found?;
        let row = own.first();
        let fenced = row.map_or(Ok(true), |row| row.try_get::<_, bool>(0))?;
        let at = row.map_or(Ok(UNIX_EPOCH), |row| row.try_get::<_, SystemTime>(1))?;
        let held = held.first().ok_or_else(missing)?;
        let (count, locked_at): (i64, SystemTime) = (held.try_get(0)?, held.try_get(1)?);
        let waited = locked_at.duration_since(at).unwrap_or_default();
        let at = at.duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
        if fenced {
            self.rollback().await?;
        } else if usize::try_from(count) != Ok(locks.len()) {
            return Err(DatabaseError::Unavailable("a lock is missing".to_owned()));
        }
        Ok(Begun { at: UnixMs::from_millis(u64::try_from(at).unwrap_or(0)), fenced, waited })
    }

    /// Loads rows.
    pub(super) async fn load(&self, needs: &Needs, loaded: &mut Loaded) -> Result<(), DatabaseError> {
        let (mut tables, mut keys) = (TableSet::default(), Vec::new());
        for (table, rows) in needs.rows.iter().enumerate().filter(|(_, rows)| !rows.is_empty()) {
            tables.insert(table);
            keys.push(rows.iter().map(|key| self.own.stored(table, key)).collect::<Vec<_>>());
        }
        let wanted: Vec<&(dyn ToSql + Sync)> = keys.iter().map(|keys| keys as &(dyn ToSql + Sync)).collect();
        let load =
            if wanted.is_empty() { None } else { Some(in_time(self.statement(Shape::Load(tables))).await?) };
        let spans: Vec<(&Part, Vec<u8>, Vec<u8>, i64)> = needs
            .parts
            .iter()
            .map(|(part, limit)| {
                let (from, to) = self.own.span(part);
                (part, from, to, i64::try_from(*limit).unwrap_or(i64::MAX))
            })
            .collect();
        let mut asked: Vec<Answered<'_, Vec<tokio_postgres::Row>>> = Vec::new();
        if let Some(load) = &load {
            asked.push(Box::pin(async { self.connection.query(load, &wanted).await }));
        }
        for (part, from, to, limit) in &spans {
            let Some([up, down]) = self.parts.get(usize::from(part.table)) else { continue };
            let statement = match part.order {
                Order::Ascending => up,
                Order::Descending => down,
            };
            asked.push(Box::pin(async move { self.connection.query(statement, &[from, to, limit]).await }));
        }
        let mut answers = in_time(async { Ok(all_of(asked).await) }).await?.into_iter();
        if load.is_some() {
            let found = answers.next().transpose()?.unwrap_or_default();
            for (table, rows) in needs.rows.iter().enumerate() {
                for key in rows {
                    loaded.add_row(table, key.clone(), None);
                }
            }
            for row in found {
                let table = usize::try_from(row.try_get::<_, i16>(0)?).unwrap_or(TABLES);
                let (key, value): (&[u8], &[u8]) = (row.try_get(1)?, row.try_get(2)?);
                loaded.add_row(table, Own::row(table, key), Some(value.into()));
            }
        }
        for ((part, _, _, limit), answer) in spans.iter().zip(answers) {
            let mut rows = Vec::new();
            for row in answer? {
                let (key, value): (&[u8], &[u8]) = (row.try_get(0)?, row.try_get(1)?);
                rows.push((Own::row(usize::from(part.table), key), value.into()));
            }
            let limit = usize::try_from(*limit).unwrap_or(usize::MAX);
            loaded.add_part((*part).clone(), PartRows { rows, limit });
        }
        Ok(())
    }

    /// Writes changes and commits, in one round trip.
    pub(super) async fn commit(&self, boot: BootId, batch: i64, changes: &Changes) -> Ended {
        let boot = boot.as_bytes().as_slice();
        let (mut puts, mut removes) = (TableSet::default(), TableSet::default());
        let (mut put, mut gone) = (Vec::new(), Vec::new());
        for (table, rows) in changes.rows() {
            let (mut keys, mut values, mut without) = (Vec::new(), Vec::new(), Vec::new());
            let mut rows: Vec<_> = rows.map(|(key, value)| (self.own.stored(table, key), value)).collect();
            rows.sort_unstable();
            for (key, value) in rows {
                match value {
                    Some(value) => {
                        keys.push(key);
                        values.push(value);
                    }
                    None => without.push(key),
                }
            }
            if !keys.is_empty() {
                puts.insert(table);
                put.push((keys, values));
            }
            if !without.is_empty() {
                removes.insert(table);
                gone.push(without);
            }
        }
        let write = match in_time(self.statement(Shape::Write { puts, removes })).await {
            Ok(write) => write,
            // No COMMIT was sent.
            Err(error) => return Ended::Not(error),
        };
        let mut written: Vec<&(dyn ToSql + Sync)> = vec![&batch, &boot];
        for (keys, values) in &put {
            written.push(keys);
            written.push(values);
        }
        written.extend(gone.iter().map(|keys| keys as &(dyn ToSql + Sync)));
        let asked: Vec<Answered<'_, ()>> = vec![
            Box::pin(async { self.connection.execute(&write, &written).await.map(drop) }),
            Box::pin(self.connection.batch_execute("COMMIT")),
        ];
        let answers = match in_time(async { Ok(all_of(asked).await) }).await {
            Ok(answers) => answers,
            Err(error) => return Ended::Unknown(error),
        };
        let mut ended = Ended::Held;
        for answer in answers {
            let Err(error) = answer else { continue };
            match DatabaseError::from(error) {
                // The server says that the transaction is over: the COMMIT behind it is a ROLLBACK.
                error @ (DatabaseError::Failed { .. }
                | DatabaseError::Refused(_)
                | DatabaseError::Newer { .. }) => {
                    return Ended::Not(error);
                }
                error @ DatabaseError::Unavailable(_) if ended == Ended::Held => {
                    ended = Ended::Unknown(error);
                }
                DatabaseError::Unavailable(_) => {}
            }
        }
        ended
    }

    /// Notes that locks are there: a transaction that took them has committed.
    pub(super) fn note_made(&self, locks: impl IntoIterator<Item = u32>) {
        locked(&self.made).extend(locks);
    }

    pub(super) async fn rollback(&self) -> Result<(), DatabaseError> {
        in_time(async { Ok(self.connection.batch_execute("ROLLBACK").await?) }).await
    }

    /// Whether a batch holds. Its transaction is over when this is told: the lock of its run's row says so.
    pub(super) async fn holds(&self, boot: BootId, batch: i64) -> Result<bool, DatabaseError> {
        // Nothing else is begun: the lock is let go of when it is told.
        let asked = "SELECT batch FROM boots WHERE boot = $1 FOR UPDATE";
        let boot = boot.as_bytes().as_slice();
        let row = in_time(async { Ok(self.connection.query_opt(asked, &[&boot]).await?) }).await?;
        let lost = || DatabaseError::Unavailable("a run of the process is not known any more".to_owned());
        Ok(row.ok_or_else(lost)?.try_get::<_, i64>(0)? >= batch)
    }

    /// Says that this run of the process lives, and fences those that were silent for too long. Answers those that are
    /// fenced and may be sending still, by the ledger, and whether this one is the first of those that live.
    pub(super) async fn beat(&self, boot: BootId, looks: bool) -> Result<(Vec<BootId>, bool), DatabaseError> {
        in_time(self.beat_and_fence(boot, looks)).await
    }

    async fn beat_and_fence(&self, boot: BootId, looks: bool) -> Result<(Vec<BootId>, bool), DatabaseError> {
        let boot = boot.as_bytes().as_slice();
        self.connection
            .execute("UPDATE boots SET seen = clock_timestamp() WHERE boot = $1 AND NOT fenced", &[&boot])
            .await?;
        // All of them looking through all of them each second would be too much: the first one does, or whoever sees that
        // the first one is silent.
        let first = format!(
            "SELECT boot, seen < clock_timestamp() - interval '{SILENCE_S} seconds' FROM boots
             WHERE NOT fenced ORDER BY boot LIMIT 1"
        );
        let first = self.connection.query_opt(&first, &[]).await?;
        let (leads, is_silent) = match &first {
            Some(row) => (row.try_get::<_, &[u8]>(0)? == boot, row.try_get::<_, bool>(1)?),
            None => (false, true),
        };
        if !leads && !is_silent && !looks {
            return Ok((Vec::new(), false));
        }
        let fence = format!(
            "UPDATE boots SET fenced = true
             WHERE NOT fenced AND boot <> $1 AND seen < clock_timestamp() - interval '{SILENCE_S} seconds'"
        );
        self.connection.execute(&fence, &[&boot]).await?;
        let left = self.connection.query("SELECT boot FROM boots WHERE fenced AND NOT doubted", &[]).await?;
        let mut boots = Vec::new();
        for row in left {
            let id: &[u8] = row.try_get(0)?;
            boots.extend(id.try_into().ok().map(BootId::from_bytes));
        }
        Ok((boots, leads))
    }

    /// Notes that runs of the process have nothing more that they are sending, by the ledger.
    pub(super) async fn note_doubted(&self, gone: &[BootId]) -> Result<(), DatabaseError> {
        let gone: Vec<&[u8]> = gone.iter().map(|boot| boot.as_bytes().as_slice()).collect();
        let old = format!(
            "DELETE FROM boots WHERE doubted AND seen < clock_timestamp() - interval '{BOOTS_KEPT_H} hours'"
        );
        in_time(async {
            let doubted = "UPDATE boots SET doubted = true WHERE boot = ANY($1::bytea[])";
            self.connection.execute(doubted, &[&gone]).await?;
            self.connection.execute(&old, &[]).await?;
            Ok(())
        })
        .await
    }
}

/// Both at once, the first asked first.
async fn both<A, B>(first: impl Future<Output = A>, second: impl Future<Output = B>) -> (A, B) {
    let (mut first, mut second) = (std::pin::pin!(first), std::pin::pin!(second));
    let (mut one, mut other) = (None, None);
    poll_fn(move |context| {
        if one.is_none()
            && let Poll::Ready(found) = first.as_mut().poll(context)
        {
            one = Some(found);
        }
        if other.is_none()
            && let Poll::Ready(found) = second.as_mut().poll(context)
        {
            other = Some(found);
        }
        match (one.take(), other.take()) {
            (Some(one), Some(other)) => Poll::Ready((one, other)),
            (left, right) => {
                (one, other) = (left, right);
                Poll::Pending
            }
        }
    })
    .await
}

/// Makes the schema, and registers a run of the process under a node's name: earlier runs under it are fenced. Answers the
/// database's clock too.
pub(super) async fn register(
    target: &Target,
    node: &str,
    fresh: [u8; 16],
    boot: BootId,
) -> Result<Option<(Own, UnixMs)>, DatabaseError> {
    let mut connection = postgres::connect(target).await?;
    postgres::migrate(&mut connection, target.schema(), STEPS).await?;
    in_time(register_in(&mut connection, node, fresh, boot, None)).await
}

/// Registers a run that comes back after it was fenced, and names the run that it was. It gets nothing when another took its
/// place.
pub(super) async fn register_again(
    target: &Target,
    node: &str,
    own: Own,
    boot: BootId,
    back_from: BootId,
) -> Result<Option<(Own, UnixMs)>, DatabaseError> {
    let mut connection = postgres::connect(target).await?;
    in_time(register_in(&mut connection, node, own.0, boot, Some(back_from))).await
}

async fn register_in(
    connection: &mut Connection,
    node: &str,
    fresh: [u8; 16],
    boot: BootId,
    back_from: Option<BootId>,
) -> Result<Option<(Own, UnixMs)>, DatabaseError> {
    let txn = connection.transaction().await?;
    let boot = boot.as_bytes().as_slice();
    txn.execute(
        "INSERT INTO sidecars (node, id, boot) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING",
        &[&node, &fresh.as_slice(), &boot],
    )
    .await?;
    let row = txn
        .query_one(
            "SELECT id, boot, (extract(epoch FROM clock_timestamp()) * 1000)::bigint FROM sidecars
             WHERE node = $1 FOR UPDATE",
            &[&node],
        )
        .await?;
    let at = UnixMs::from_millis(u64::try_from(row.try_get::<_, i64>(2)?).unwrap_or(0));
    let (id, before): (&[u8], &[u8]) = (row.try_get(0)?, row.try_get(1)?);
    let odd = |_| DatabaseError::Unavailable("a sidecar has an id that is none".to_owned());
    let own = Own(id.try_into().map_err(odd)?);
    let before: BootId = BootId::from_bytes(before.try_into().map_err(odd)?);
    if back_from.is_some_and(|own| own != before && before.as_bytes() != boot) {
        txn.rollback().await?;
        return Ok(None);
    }
    txn.execute(
        "UPDATE boots SET fenced = true WHERE node = $1 AND boot <> $2 AND NOT fenced",
        &[&node, &boot],
    )
    .await?;
    txn.execute("INSERT INTO boots (boot, node) VALUES ($1, $2) ON CONFLICT DO NOTHING", &[&boot, &node])
        .await?;
    txn.execute("UPDATE sidecars SET boot = $2 WHERE node = $1", &[&node, &boot]).await?;
    txn.commit().await?;
    Ok(Some((own, at)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_keep_their_order() {
        let own = Own([9; 16]);
        let number = |at: u64| own.stored(usize::from(AUDIT.number), &at.to_le_bytes());
        assert!(number(1) < number(256) && number(255) < number(256));
        for (table, name) in TABLE_NAMES.iter().enumerate() {
            let key: Vec<u8> = (0..40).collect();
            assert_eq!(&*Own::row(table, &own.stored(table, &key)), key.as_slice(), "{name}");
        }
        let own_name = own.stored(usize::from(META.number), meta::CHAIN.as_bytes());
        assert_eq!(&*Own::row(usize::from(META.number), &own_name), meta::CHAIN.as_bytes());
        assert_ne!(own_name, Own([8; 16]).stored(usize::from(META.number), meta::CHAIN.as_bytes()));
    }

    #[test]
    fn a_part_ends_where_it_says() {
        let own = Own([9; 16]);
        let part = |from, to| Part { table: AUDIT.number, from, to, order: Order::Ascending };
        let at = |place: u64| Box::from(place.to_le_bytes().as_slice());
        let (from, to) = own.span(&part(Bound::Excluded(at(7)), Bound::Included(at(9))));
        let stored = |place: u64| own.stored(usize::from(AUDIT.number), &place.to_le_bytes());
        let is_in = |place: u64| (from.as_slice()..to.as_slice()).contains(&stored(place).as_slice());
        assert_eq!((6..12).filter(|place| is_in(*place)).collect::<Vec<_>>(), [8, 9]);
        let (from, to) = own.span(&part(Bound::Unbounded, Bound::Unbounded));
        assert!(from <= stored(0) && stored(u64::MAX) < to);
        assert!(to < Own([10; 16]).stored(usize::from(AUDIT.number), &[0; 8]));
    }
}
