//! A ledger in a file of its own, with a clock that is set by hand, filled and asked through the verbs that the proxy
//! uses.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use keybrake::audit::{Entry, Event};
use keybrake::id::{BootId, CallId, KeyId, LedgerId};
use keybrake::ledger::redb::inspect;
use keybrake::ledger::{Actor, Ledger, LedgerError, Opening, Ticked};
use keybrake::random;
use keybrake::secret::Mode;
use keybrake::time::{Clock, DAY_MS, UnixMs};
use tokio::sync::Barrier;
use tokio::task::JoinSet;

use crate::bounds::knob;
use crate::calls::{self, Call, Pass, vault_key};

/// Between two calls of a ledger's past: ten a second.
pub(crate) const APART_MS: u64 = 100;
/// How many fill it at once: as many as share one commit.
const FILLERS: u64 = 256;
/// Days for which a call is remembered, and for which an audit record is kept.
pub(crate) const REMEMBER_DAYS: u32 = 40;
pub(crate) const AUDIT_DAYS: u32 = 400;
const PATIENCE: Duration = Duration::from_mins(1);
/// The pause of the sidecar between two steps of upkeep that have more to do.
const TICK_AGAIN: Duration = Duration::from_millis(20);

pub(crate) struct Sandbox {
    path: PathBuf,
    ledger: Ledger,
    hand: Arc<AtomicU64>,
    keys: Vec<KeyId>,
    /// Calls since it was opened.
    made: AtomicU64,
    /// Whether it remembers what was answered.
    answers: bool,
}

/// What a while of upkeep came to, and calls beside it.
pub(crate) struct Beside {
    pub(crate) pass: Pass,
    pub(crate) steps: u32,
    pub(crate) longest_step: Duration,
    /// Whether all was done that was waited for.
    pub(crate) done: bool,
}

impl Sandbox {
    /// Opens or makes the ledger of a data directory; its clock stands at `at`.
    pub(crate) async fn open(data_dir: &Path, at: UnixMs) -> Result<Self> {
        std::fs::create_dir_all(data_dir)?;
        let path = data_dir.join("keybrake.redb");
        let (clock, hand) = Clock::manual(at);
        let opening = Opening {
            node: "node-of-the-bench".to_owned(),
            mode: Mode::Test,
            clock,
            boot: BootId::new(at, random::bytes()),
            fresh_id: LedgerId::new(at, random::bytes()),
            fresh_salt: random::bytes(),
            audit_days: AUDIT_DAYS,
            // To a collector that is down: nothing is ever acknowledged.
            ships: true,
        };
        let ledger = Ledger::open(&path, opening).with_context(|| path.display().to_string())?;
        let answers = knob("GROWTH_ANSWERS", 1)? == 1;
        let mut sandbox = Self { path, ledger, hand, keys: Vec::new(), made: AtomicU64::new(0), answers };
        sandbox.issue(16).await?;
        Ok(sandbox)
    }

    /// Lets go of the file, and waits until its writer has.
    pub(crate) fn close(self) -> Result<()> {
        let Self { path, ledger, .. } = self;
        drop(ledger);
        let since = Instant::now();
        loop {
            match inspect(&path) {
                Ok(_) => return Ok(()),
                Err(LedgerError::Locked) if since.elapsed() < PATIENCE => {
                    std::thread::sleep(Duration::from_millis(10));
                }
                Err(error) => bail!("{}: {error}", path.display()),
            }
        }
    }

    pub(crate) fn made(&self) -> u64 {
        self.made.load(Ordering::Relaxed)
    }

    /// What its files take on the disk; the store makes its file longer than what it has written.
    pub(crate) fn bytes(&self) -> Result<u64> {
        let mut blocks = 0;
        for entry in std::fs::read_dir(self.path.parent().context("a file is in a directory")?)? {
            blocks += entry?.metadata()?.blocks();
        }
        Ok(blocks * 512)
    }

    pub(crate) fn pass_days(&self, days: u32) {
        self.hand.fetch_add(u64::from(days) * DAY_MS, Ordering::SeqCst);
    }

    /// Makes so many keys, which live for 31 days, and has only them used from now on.
    pub(crate) async fn issue(&mut self, count: u64) -> Result<()> {
        let now = self.ledger.now();
        let (next, made) = (Arc::new(AtomicU64::new(0)), Arc::new(std::sync::Mutex::new(Vec::new())));
        let mut tasks = JoinSet::new();
        for _ in 0..FILLERS.min(count) {
            let (ledger, next, made) = (self.ledger.clone(), Arc::clone(&next), Arc::clone(&made));
            tasks.spawn(async move {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= count {
                        return Ok::<_, anyhow::Error>(());
                    }
                    let key = vault_key(number, now, REMEMBER_DAYS)?;
                    let id = key.id;
                    ledger.issue_key(key, Actor("bench".to_owned())).await?;
                    made.lock().map_err(|_| anyhow::anyhow!("a task panicked"))?.push(id);
                }
            });
        }
        while let Some(ended) = tasks.join_next().await {
            ended??;
        }
        self.keys = std::mem::take(&mut *made.lock().map_err(|_| anyhow::anyhow!("a task panicked"))?);
        Ok(())
    }

    /// Makes so many calls, each answered and remembered, one after the other by the clock; tells the last one's id.
    pub(crate) async fn fill(self: &Arc<Self>, count: u64) -> Result<CallId> {
        let left = Arc::new(AtomicU64::new(count));
        let mut tasks = JoinSet::new();
        for _ in 0..FILLERS.min(count) {
            let (sandbox, left) = (Arc::clone(self), Arc::clone(&left));
            tasks.spawn(async move {
                let take = |left: u64| left.checked_sub(1);
                while left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_ok() {
                    sandbox.pair(sandbox.prepare()).await?;
                }
                Ok::<_, anyhow::Error>(())
            });
        }
        while let Some(ended) = tasks.join_next().await {
            ended??;
        }
        let last = self.prepare();
        let id = last.admit.call_id;
        self.pair(last).await?;
        self.settle().await?;
        Ok(id)
    }

    /// Writes so many audit records without a call.
    pub(crate) async fn record(&self, count: u64) -> Result<()> {
        let left = Arc::new(AtomicU64::new(count));
        let mut tasks = JoinSet::new();
        for _ in 0..FILLERS.min(count) {
            let (ledger, left, hand) = (self.ledger.clone(), Arc::clone(&left), Arc::clone(&self.hand));
            tasks.spawn(async move {
                let take = |left: u64| left.checked_sub(1);
                while let Ok(number) = left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take) {
                    hand.fetch_add(APART_MS, Ordering::SeqCst);
                    ledger.record(record(number)).await?;
                }
                Ok::<_, anyhow::Error>(())
            });
        }
        while let Some(ended) = tasks.join_next().await {
            ended??;
        }
        self.settle().await
    }

    /// Does all upkeep that is due.
    pub(crate) async fn settle(&self) -> Result<()> {
        while self.ledger.tick().await? != Ticked::Done {}
        Ok(())
    }

    /// All records wait from the first on: none was dropped, however old.
    pub(crate) async fn waiting(&self) -> Result<u64> {
        let log = self.ledger.read(|reader| reader.log_state()).await?;
        ensure!(log.first == 1, "records were dropped that no collector has: the first is {}", log.first);
        Ok(log.last)
    }

    pub(crate) async fn first_record(&self) -> Result<u64> {
        Ok(self.ledger.read(|reader| reader.log_state()).await?.first)
    }

    /// The collector has all records up to this one.
    pub(crate) async fn acknowledge(&self, to: u64) -> Result<()> {
        Ok(self.ledger.shipped(to).await?)
    }

    pub(crate) async fn remembers(&self, call: CallId) -> Result<bool> {
        Ok(self.ledger.read(|reader| reader.call_by_id(call)).await?.is_some())
    }

    /// So many calls of each of so many callers.
    pub(crate) async fn calls(self: &Arc<Self>, callers: usize, each: usize) -> Result<Pass> {
        let barrier = Arc::new(Barrier::new(callers + 1));
        let mut tasks = JoinSet::new();
        for _ in 0..callers {
            let (sandbox, barrier) = (Arc::clone(self), Arc::clone(&barrier));
            let prepared: Vec<Call> = (0..each).map(|_| self.prepare()).collect();
            tasks.spawn(async move {
                barrier.wait().await;
                let mut latencies = Vec::with_capacity(each);
                for call in prepared {
                    latencies.push(sandbox.pair(call).await?);
                }
                Ok::<_, anyhow::Error>(latencies)
            });
        }
        barrier.wait().await;
        let (begun, cpu) = (Instant::now(), calls::cpu()?);
        let mut latencies = Vec::new();
        while let Some(ended) = tasks.join_next().await {
            latencies.extend(ended??);
        }
        let elapsed = begun.elapsed();
        Ok(Pass::new(latencies, elapsed, calls::cpu()?.saturating_sub(cpu)))
    }

    /// Upkeep as the sidecar does it while there is more to do, with calls beside it: one every so often of each caller.
    /// Until `over`, or for `longest`.
    pub(crate) async fn upkeep_beside_calls(
        self: &Arc<Self>,
        callers: usize,
        every: Duration,
        longest: Duration,
        over: impl AsyncFn(&Self) -> Result<bool>,
    ) -> Result<Beside> {
        let over_now = Arc::new(AtomicBool::new(false));
        let mut tasks = JoinSet::new();
        for _ in 0..callers {
            let (sandbox, over_now) = (Arc::clone(self), Arc::clone(&over_now));
            tasks.spawn(async move {
                let mut latencies = Vec::new();
                while !over_now.load(Ordering::Relaxed) {
                    let call = sandbox.prepare();
                    latencies.push(sandbox.pair(call).await?);
                    tokio::time::sleep(every).await;
                }
                Ok::<_, anyhow::Error>(latencies)
            });
        }
        let (begun, cpu) = (Instant::now(), calls::cpu()?);
        let (mut steps, mut longest_step, mut done) = (0, Duration::ZERO, false);
        while !done && begun.elapsed() < longest {
            let step = Instant::now();
            self.ledger.tick().await?;
            (steps, longest_step) = (steps + 1, longest_step.max(step.elapsed()));
            done = over(self).await?;
            tokio::time::sleep(TICK_AGAIN).await;
        }
        over_now.store(true, Ordering::Relaxed);
        let mut latencies = Vec::new();
        while let Some(ended) = tasks.join_next().await {
            latencies.extend(ended??);
        }
        let pass = Pass::new(latencies, begun.elapsed(), calls::cpu()?.saturating_sub(cpu));
        Ok(Beside { pass, steps, longest_step, done })
    }

    async fn pair(&self, call: Call) -> Result<Duration> {
        let took = call.make(&self.ledger).await?;
        self.made.fetch_add(1, Ordering::Relaxed);
        Ok(took)
    }

    /// The next call.
    fn prepare(&self) -> Call {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let at = UnixMs::from_millis(self.hand.fetch_add(APART_MS, Ordering::SeqCst) + APART_MS);
        let key = self.keys[usize::try_from(number).unwrap_or(0) % self.keys.len()];
        let mut call = Call::new(&self.ledger, key, number, at);
        if !self.answers {
            call.resolve.answer = None;
        }
        call
    }
}

fn record(number: u64) -> Entry {
    Entry {
        event: Event::Refused,
        request_id: Some(format!("req_kb_{number:014}")),
        label: Some(format!("kestra-billing-{}", number % 500)),
        method: Some("POST".to_owned()),
        endpoint: Some("/v1/charges".to_owned()),
        code: Some("spend_cap_exceeded".to_owned()),
        customer: Some(format!("cus_{}", number % 5_000)),
        idempotency_key: Some(format!("billing:growth:{number}")),
        ..Entry::default()
    }
}
