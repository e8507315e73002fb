//! What a ledger costs that has grown: remembered calls with their answers, live keys, audit records that wait for a
//! collector that is down. Each grown ledger takes turns with a fresh one of 1,000 calls, so that whatever else the
//! machine does meets both; told are medians over the rounds, and ratios to the fresh one of the same round. Then the
//! sidecar itself is started on what has grown, after a clean stop and after a SIGKILL under load, and at last all of it is
//! pruned while calls are made.
//!
//! `GROWTH_CALLS` (100,000) is how far it grows, tenfold each time; a million takes seven minutes and 8 GB of the disk.
//! The index of the audit log follows before anything is measured. `GROWTH_ROUNDS` (5) is how often each size is measured,
//! `GROWTH_ANSWERS=0` leaves what Stripe answered out of the ledger, and `GROWTH_JSON` names a file for all figures. No
//! figure is asserted: it fails when something does not run, or does not do what is measured.
#![expect(clippy::disallowed_methods, reason = "a benchmark asks the machine's clock and its environment")]
#![expect(clippy::print_stdout, reason = "what it measures is told on standard output")]

#[path = "../bounds.rs"]
mod bounds;
#[path = "../calls.rs"]
mod calls;
#[path = "../proxy/certificates.rs"]
mod certificates;
#[expect(dead_code, reason = "the bench beside nginx has more kinds of load")]
#[path = "../proxy/load.rs"]
mod load;
#[expect(dead_code, reason = "the bench beside nginx measures more programs")]
#[path = "../proxy/processes.rs"]
mod processes;
mod report;
mod restart;
mod sandbox;
#[path = "../proxy/stub.rs"]
mod stub;

use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use keybrake::id::CallId;
use keybrake::time::{Clock, UnixMs};
use tokio_rustls::TlsConnector;

use crate::bounds::knob;
use crate::certificates::Files;
use crate::processes::{Place, Process, free_addr};
use crate::report::{Case, Figures, Pruning, Report, Size};
use crate::sandbox::{APART_MS, AUDIT_DAYS, Beside, REMEMBER_DAYS, Sandbox};

/// Runs this program as the stub.
const AS_STUB: &str = "stub";
const SMALL: u64 = 1_000;
const KEYS_MAX: u64 = 100_000;
/// A pass of one caller, and one of many: few enough that the fresh ledger stays a small one.
const ALONE: usize = 200;
const CALLERS: usize = 64;
const EACH: usize = 30;
/// The calls beside upkeep: some hundred a second, so that what they wait for is upkeep and not each other.
const BESIDE_CALLERS: usize = 4;
const BESIDE_EVERY: Duration = Duration::from_millis(5);
const WITHOUT: Duration = Duration::from_secs(5);
/// A kind of upkeep that goes on for longer is told as far as it came.
const PRUNING_MAX: Duration = Duration::from_mins(1);

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().collect();
    if let [_, role, plain, tls, dir] = arguments.as_slice()
        && role == AS_STUB
    {
        return stub::run(plain.parse()?, tls.parse()?, &Files::in_dir(Path::new(dir)));
    }
    // The program never relies on a process default; reqwest in here does.
    let _ = rustls::crypto::ring::default_provider().install_default();
    tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(run())
}

async fn run() -> Result<()> {
    let most: u64 = knob("GROWTH_CALLS", 100_000)?;
    ensure!((SMALL..=100_000_000).contains(&most), "GROWTH_CALLS: {SMALL} or more");
    let rounds: usize = knob("GROWTH_ROUNDS", 5)?;
    ensure!(rounds > 0, "GROWTH_ROUNDS: 1 or more");
    // On the disk that the build is on: a ledger in memory would be another one.
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let grown_dir = dir.path().join("grown");
    // The past of what grows ends now: the sidecar is started on it later.
    let begin = |calls: u64| UnixMs::from_millis(Clock::System.now().millis() - calls * APART_MS);

    let mut report = Report::new(rounds);
    // Room for the calls that are measured, too.
    let grown = Arc::new(Sandbox::open(&grown_dir, begin(most.saturating_mul(2).max(most + 100_000))).await?);
    let (mut size, mut filled) = (0, SMALL);
    let mut last = None;
    while size < most {
        last = Some(grown.fill(filled - size).await?);
        size = filled;
        report.size(Size { calls: grown.made(), bytes: grown.bytes()?, records: grown.waiting().await? });
        let name = format!("{size} calls");
        report.case(compare(&name, &grown, rounds, dir.path(), begin(SMALL)).await?);
        filled = filled.saturating_mul(10).min(most);
    }
    close(grown)?;

    let keys = most.min(KEYS_MAX);
    let mut sandbox = Sandbox::open(&dir.path().join("keys"), begin(SMALL)).await?;
    sandbox.issue(keys).await?;
    let sandbox = Arc::new(sandbox);
    sandbox.fill(SMALL).await?;
    let name = format!("{keys} live keys");
    report.case(compare(&name, &sandbox, rounds, dir.path(), begin(SMALL)).await?);
    close(sandbox)?;

    let mut sandbox = Sandbox::open(&dir.path().join("records"), begin(most)).await?;
    sandbox.record(most).await?;
    sandbox.pass_days(AUDIT_DAYS + 1);
    sandbox.issue(16).await?;
    let sandbox = Arc::new(sandbox);
    sandbox.fill(SMALL).await?;
    let name = format!("{most} records wait");
    report.case(compare(&name, &sandbox, rounds, dir.path(), begin(SMALL)).await?);
    ensure!(sandbox.waiting().await? > most, "records are missing");
    close(sandbox)?;

    let small = Arc::new(Sandbox::open(&dir.path().join("small"), begin(2 * SMALL)).await?);
    small.fill(SMALL).await?;
    close(small)?;
    restarts(dir.path(), &[("small", SMALL), ("grown", most)], &mut report).await?;

    let last = last.context("something was filled")?;
    for pruning in prune(&grown_dir, most, last).await? {
        report.pruning(pruning);
    }
    println!("{report}");
    bounds::keep("GROWTH_JSON", &report.json())
}

fn close(sandbox: Arc<Sandbox>) -> Result<()> {
    Arc::into_inner(sandbox).context("somebody still uses the ledger")?.close()
}

/// In turns with a fresh ledger of 1,000 calls, which is made anew for each round because the calls that are measured
/// make it grow.
async fn compare(name: &str, grown: &Arc<Sandbox>, rounds: usize, dir: &Path, begin: UnixMs) -> Result<Case> {
    let mut case = Case::new(name);
    for round in 0..rounds {
        let fresh_dir = tempfile::tempdir_in(dir)?;
        let fresh = Arc::new(Sandbox::open(fresh_dir.path(), begin).await?);
        fresh.fill(SMALL).await?;
        let (of_fresh, of_grown) = if round.is_multiple_of(2) {
            let of_fresh = figures(&fresh).await?;
            (of_fresh, figures(grown).await?)
        } else {
            let of_grown = figures(grown).await?;
            (figures(&fresh).await?, of_grown)
        };
        case.add(of_fresh, of_grown);
        close(fresh)?;
    }
    Ok(case)
}

async fn figures(sandbox: &Arc<Sandbox>) -> Result<Figures> {
    // Not measured: whoever comes first would pay for what is cold.
    sandbox.calls(CALLERS, 2).await?;
    let alone = sandbox.calls(1, ALONE).await?;
    let many = sandbox.calls(CALLERS, EACH).await?;
    sandbox.settle().await?;
    Ok(Figures {
        p50_us: alone.percentile_us(50),
        per_second: many.calls() / many.elapsed.as_secs_f64(),
        cpu_us: many.cpu.as_secs_f64() * 1e6 / many.calls(),
    })
}

/// The sidecar as a process, on ledgers that were filled.
async fn restarts(dir: &Path, ledgers: &[(&'static str, u64)], report: &mut Report) -> Result<()> {
    let files = Files::make(dir)?;
    let tls = TlsConnector::from(Arc::new(files.client()?));
    let (plain, behind_tls) = (free_addr()?, free_addr()?);
    let mut command = Command::new(std::env::current_exe()?);
    command.args([AS_STUB, &plain.to_string(), &behind_tls.to_string()]).arg(dir);
    let mut stub = Process::start(command.stdin(Stdio::piped()), dir, AS_STUB)?;
    stub.listens(plain)?;
    let place = Place { dir, files: &files, tls, upstream: plain };
    for (name, calls) in ledgers {
        report.restarts(restart::measure(&place, name, *calls).await?);
    }
    Ok(())
}

/// Lets the time of everything pass, kind by kind, and has the sidecar's upkeep eat it while calls are made.
async fn prune(data_dir: &Path, calls: u64, last: CallId) -> Result<Vec<Pruning>> {
    let mut sandbox = Sandbox::open(data_dir, Clock::System.now()).await?;
    let mut told = Vec::new();
    let shared = Arc::new(sandbox);
    shared.settle().await?;
    told.push(Pruning::of(
        "nothing is due",
        None,
        beside(&shared, WITHOUT, async |_: &Sandbox| Ok(false)).await?,
    ));
    sandbox = Arc::into_inner(shared).context("somebody still uses the ledger")?;

    sandbox.pass_days(REMEMBER_DAYS + 1);
    sandbox.issue(16).await?;
    let shared = Arc::new(sandbox);
    let went =
        beside(&shared, PRUNING_MAX, async |sandbox: &Sandbox| Ok(!sandbox.remembers(last).await?)).await?;
    told.push(Pruning::of("remembered calls go", went.done.then_some(calls), went));
    sandbox = Arc::into_inner(shared).context("somebody still uses the ledger")?;

    let end = sandbox.waiting().await?;
    sandbox.acknowledge(end).await?;
    sandbox.pass_days(AUDIT_DAYS + 1);
    sandbox.issue(16).await?;
    let shared = Arc::new(sandbox);
    let went =
        beside(&shared, PRUNING_MAX, async |sandbox: &Sandbox| Ok(sandbox.first_record().await? > end))
            .await?;
    let gone = shared.first_record().await? - 1;
    told.push(Pruning::of("ended holds and records go", Some(gone), went));
    close(shared)?;
    Ok(told)
}

async fn beside(
    sandbox: &Arc<Sandbox>,
    longest: Duration,
    over: impl AsyncFn(&Sandbox) -> Result<bool>,
) -> Result<Beside> {
    sandbox.upkeep_beside_calls(BESIDE_CALLERS, BESIDE_EVERY, longest, over).await
}
