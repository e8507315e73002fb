//! Callers, and what they call: sidecars of one ledger, or a row lock.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use keybrake::id::{BootId, KeyId, LedgerId};
use keybrake::ledger::{Actor, Ledger, Opening, Ticked};
use keybrake::postgres::{self, Connection, Target};
use keybrake::random;
use keybrake::secret::Mode;
use keybrake::time::{Clock, UnixMs};
use tokio::sync::Barrier;
use tokio::task::{AbortHandle, JoinSet};
use tokio_postgres::Statement;

use crate::calls::{self, Call, Pass, vault_key};

/// How often a sidecar of a fleet ticks.
const TICK: Duration = Duration::from_secs(1);
const TICK_AGAIN: Duration = Duration::from_millis(20);
/// Pairs of each caller that are not measured: whoever comes first pays for what is cold.
const WARM: usize = 3;
const REMEMBER_DAYS: u32 = 40;
/// As many keys and rows as there are callers at most.
const KEYS: u64 = 64;
/// What a row may have spent: never reached.
const CAP: i64 = i64::MAX / 2;
const HELD: i64 = 100;
/// What is spent less than was held.
const SETTLED: i64 = -1;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum System {
    RowLock,
    Sidecars(usize),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Case {
    /// Whether all callers have one key, or each its own.
    pub(crate) hot: bool,
    pub(crate) callers: usize,
}

pub(crate) struct Figures {
    pub(crate) per_second: f64,
    pub(crate) p50_ms: f64,
    pub(crate) p99_ms: f64,
    /// Of this process, for 1,000 pairs: callers, sidecars, and their side of the wire.
    pub(crate) cpu_ms: f64,
    /// To the database, while it went on.
    pub(crate) connections: i64,
}

pub(crate) struct Bench {
    target: Target,
    lasts: Duration,
    keys: Vec<KeyId>,
    observer: Connection,
}

impl Bench {
    /// Makes what is the same for all that is measured.
    pub(crate) async fn prepare(target: Target, lasts: Duration) -> Result<Self> {
        let ledger = open(&target, 0).await?;
        let now = ledger.now();
        let mut keys = Vec::new();
        for number in 0..KEYS {
            let key = vault_key(number, now, REMEMBER_DAYS)?;
            keys.push(key.id);
            ledger.issue_key(key, Actor("bench".to_owned())).await?;
        }
        ledger.close().await?;
        let observer = postgres::connect(&target).await?;
        observer
            .batch_execute(&format!(
                "CREATE TABLE budget (id integer PRIMARY KEY, cap bigint NOT NULL, spent bigint NOT NULL DEFAULT 0)
                 WITH (fillfactor = 50);
                 INSERT INTO budget SELECT id, {CAP} FROM generate_series(0, {}) id",
                KEYS - 1
            ))
            .await?;
        Ok(Self { target, lasts, keys, observer })
    }

    /// Which server it is, and that what it commits is on its disk.
    pub(crate) async fn server_says(&self) -> Result<String> {
        let settings = "SELECT current_setting('server_version'), current_setting('fsync'),
                        current_setting('synchronous_commit')";
        let row = self.observer.query_one(settings, &[]).await?;
        let (version, fsync, commit): (String, String, String) =
            (row.try_get(0)?, row.try_get(1)?, row.try_get(2)?);
        ensure!(fsync == "on", "the server runs with fsync={fsync}: its commits are not durable");
        Ok(format!("PostgreSQL {version}, fsync={fsync}, synchronous_commit={commit}"))
    }

    /// One system under all loads, hot and spread.
    pub(crate) async fn measure(&self, system: System, callers: &[usize]) -> Result<Vec<(Case, Figures)>> {
        let sidecars = match system {
            System::RowLock => Vec::new(),
            System::Sidecars(count) => {
                let mut sidecars = Vec::new();
                for number in 0..count {
                    sidecars.push(Sidecar::start(&self.target, number).await?);
                }
                sidecars
            }
        };
        let mut told = Vec::new();
        for hot in [false, true] {
            for &callers in callers {
                let case = Case { hot, callers };
                told.push((case, self.load(&sidecars, case).await?));
            }
        }
        for sidecar in sidecars {
            sidecar.stop().await?;
        }
        Ok(told)
    }

    /// One load: on the row where there is no sidecar.
    async fn load(&self, sidecars: &[Sidecar], case: Case) -> Result<Figures> {
        let barrier = Arc::new(Barrier::new(case.callers + 1));
        let mut tasks = JoinSet::new();
        for number in 0..case.callers {
            let row = if case.hot { 0 } else { number };
            let payer = if sidecars.is_empty() {
                Payer::Row(RowLock::open(&self.target, i32::try_from(row)?).await?)
            } else {
                Payer::Key(sidecars[number % sidecars.len()].ledger.clone(), self.keys[row])
            };
            let (barrier, lasts) = (Arc::clone(&barrier), self.lasts);
            tasks.spawn(async move {
                for _ in 0..WARM {
                    payer.pair().await?;
                }
                barrier.wait().await;
                let begun = Instant::now();
                let mut latencies = Vec::new();
                while begun.elapsed() < lasts {
                    latencies.push(payer.pair().await?);
                }
                Ok::<_, anyhow::Error>(latencies)
            });
        }
        // A caller that fails while it warms up never comes to the barrier.
        tokio::select! {
            _ = barrier.wait() => {}
            Some(Ok(Err(error))) = tasks.join_next() => return Err(error),
        }
        let (begun, cpu) = (Instant::now(), calls::cpu()?);
        tokio::time::sleep(self.lasts / 2).await;
        let connections = self.connections().await?;
        let mut latencies = Vec::new();
        while let Some(ended) = tasks.join_next().await {
            latencies.extend(ended??);
        }
        let elapsed = begun.elapsed();
        let pass = Pass::new(latencies, elapsed, calls::cpu()?.saturating_sub(cpu));
        ensure!(pass.calls() > 0.0, "nothing was called");
        Ok(Figures {
            per_second: pass.calls() / pass.elapsed.as_secs_f64(),
            p50_ms: pass.percentile_us(50) / 1e3,
            p99_ms: pass.percentile_us(99) / 1e3,
            cpu_ms: pass.cpu.as_secs_f64() * 1e6 / pass.calls(),
            connections,
        })
    }

    /// All connections to the database but the one that asks.
    async fn connections(&self) -> Result<i64> {
        let sql = "SELECT count(*) FROM pg_stat_activity
                   WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend'";
        Ok(self.observer.query_one(sql, &[]).await?.try_get(0)?)
    }

    /// Leaves nothing behind, on whoever's server.
    pub(crate) async fn end(self) -> Result<()> {
        let schema = self.target.schema();
        Ok(self.observer.batch_execute(&format!("DROP SCHEMA \"{schema}\" CASCADE")).await?)
    }
}

async fn open(target: &Target, number: usize) -> Result<Ledger> {
    let now = Clock::System.now();
    let opening = Opening {
        node: format!("node-{number}"),
        mode: Mode::Test,
        clock: Clock::System,
        boot: BootId::new(now, random::bytes()),
        fresh_id: LedgerId::new(now, random::bytes()),
        fresh_salt: random::bytes(),
        audit_days: 400,
        ships: false,
    };
    let ledger = Ledger::open_postgres(target.clone(), opening).await?;
    // So that it has its connection for reads, too, as a sidecar has.
    ledger.read(|reader| reader.log_state()).await?;
    Ok(ledger)
}

/// One of a fleet.
struct Sidecar {
    ledger: Ledger,
    ticks: AbortHandle,
}

impl Sidecar {
    async fn start(target: &Target, number: usize) -> Result<Self> {
        let ledger = open(target, number).await?;
        let ticking = ledger.clone();
        let ticks = tokio::spawn(async move {
            loop {
                let left = matches!(ticking.tick().await, Ok(Ticked::GoOn));
                tokio::time::sleep(if left { TICK_AGAIN } else { TICK }).await;
            }
        });
        Ok(Self { ledger, ticks: ticks.abort_handle() })
    }

    async fn stop(self) -> Result<()> {
        self.ticks.abort();
        Ok(self.ledger.close().await?)
    }
}

/// Whom a caller asks.
enum Payer {
    Key(Ledger, KeyId),
    Row(RowLock),
}

impl Payer {
    async fn pair(&self) -> Result<Duration> {
        match self {
            Self::Key(ledger, key) => {
                static NEXT: AtomicU64 = AtomicU64::new(0);
                let at: UnixMs = ledger.now();
                Call::new(ledger, *key, NEXT.fetch_add(1, Ordering::Relaxed), at).make(ledger).await
            }
            Self::Row(row) => row.pair().await,
        }
    }
}

/// A cap in one row, and nothing else: each statement is a transaction.
struct RowLock {
    connection: Connection,
    spend: Statement,
    row: i32,
}

impl RowLock {
    async fn open(target: &Target, row: i32) -> Result<Self> {
        let connection = postgres::connect(target).await?;
        let sql = "UPDATE budget SET spent = spent + $1 WHERE id = $2 AND spent + $1 <= cap";
        let spend = connection.prepare(sql).await.context(sql)?;
        Ok(Self { connection, spend, row })
    }

    async fn pair(&self) -> Result<Duration> {
        let begun = Instant::now();
        for minor in [HELD, SETTLED] {
            if self.connection.execute(&self.spend, &[&minor, &self.row]).await? != 1 {
                bail!("the cap of a row was reached");
            }
        }
        Ok(begun.elapsed())
    }
}
