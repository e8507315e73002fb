//! What the sidecar adds to a call, beside what nginx adds: a durable charge and a read, over TLS, on kept and on fresh
//! connections, as fast as they are answered and at a steady rate. All targets take turns within each round, so that
//! whatever else the machine does meets all of them; told are medians over the rounds, and ratios to nginx in the same
//! round.
//!
//! `BENCH_SECONDS` (1.5) is how long each target is asked in each case and round, `BENCH_ROUNDS` (5) how often;
//! `BENCH_ONLY` picks cases by a part of their name (`BENCH_ONLY=none` leaves memory and what other programs count),
//! `BENCH_JSON` names a file for all figures, and `BENCH_PEERS=1` adds a proxy in Python (`FastAPI`, and a log in
//! `SQLite`).
//!
//! No figure is asserted. It fails when something does not run, when an answer is not 200, or when the stub executed
//! another number of charges than were made.
#![expect(clippy::disallowed_methods, reason = "a benchmark asks the machine's clock and its environment")]
#![expect(clippy::print_stdout, reason = "what it measures is told on standard output")]

#[path = "../bounds.rs"]
mod bounds;
mod certificates;
mod goals;
mod instruments;
mod load;
mod processes;
mod report;
mod stub;

use std::net::SocketAddr;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use tokio_rustls::TlsConnector;

use crate::bounds::knob;
use crate::certificates::Files;
use crate::load::{Arrival, Call};
use crate::processes::{Measured, Place, Process, free_addr};
use crate::report::{Report, Sample};

/// Runs this program as the stub.
const AS_STUB: &str = "stub";

const CASES: &[(&str, Call, Arrival)] = &[
    ("charge, 1 kept", Call::Charge, Arrival::Kept(1)),
    ("charge, 16 kept", Call::Charge, Arrival::Kept(16)),
    ("charge, 64 kept", Call::Charge, Arrival::Kept(64)),
    ("charge, 50/s", Call::Charge, Arrival::Open(50)),
    ("charge, 200/s", Call::Charge, Arrival::Open(200)),
    ("charge, 1 fresh", Call::Charge, Arrival::Fresh(1)),
    ("charge, 16 fresh", Call::Charge, Arrival::Fresh(16)),
    ("get, 1 kept", Call::Get, Arrival::Kept(1)),
    ("get, 16 kept", Call::Get, Arrival::Kept(16)),
    ("get, 64 kept", Call::Get, Arrival::Kept(64)),
    ("get, 50/s", Call::Get, Arrival::Open(50)),
    ("get, 200/s", Call::Get, Arrival::Open(200)),
    ("get, 1 fresh", Call::Get, Arrival::Fresh(1)),
    ("get, 16 fresh", Call::Get, Arrival::Fresh(16)),
];

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
    let lasting = Duration::from_secs_f64(knob("BENCH_SECONDS", 1.5)?);
    let rounds: usize = knob("BENCH_ROUNDS", 5)?;
    ensure!(rounds > 0, "BENCH_ROUNDS: 1 or more");
    let only = std::env::var("BENCH_ONLY").unwrap_or_default();
    // On the disk that the build is on: a ledger in memory would be another one.
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let files = Files::make(dir.path())?;
    let tls = TlsConnector::from(Arc::new(files.client()?));
    let (plain, behind_tls) = (free_addr()?, free_addr()?);
    let mut command = Command::new(std::env::current_exe()?);
    command.args([AS_STUB, &plain.to_string(), &behind_tls.to_string()]).arg(dir.path());
    let mut stub = Process::start(command.stdin(Stdio::piped()), dir.path(), AS_STUB)?;
    stub.listens(plain)?;
    let place = Place { dir: dir.path(), files: &files, tls, upstream: plain };

    let mut report = Report::new(lasting, rounds);
    let mut targets = vec![Measured { name: "direct", target: place.target(behind_tls), process: None }];
    match place.nginx()? {
        Some(nginx) => targets.push(nginx),
        None => report.missing("NGINX IS MISSING (apt-get install nginx-light): there are no ratios to it."),
    }
    targets.push(place.sidecar().await?);
    if knob("BENCH_PEERS", 0)? == 1 {
        targets.push(place.peer()?);
    }
    for measured in &targets {
        report.idle(measured);
    }

    for round in 0..rounds {
        for (name, call, arrival) in CASES.iter().filter(|(name, _, _)| name.contains(&only)) {
            for turn in 0..targets.len() {
                // Each comes first as often as any other.
                let measured = &targets[(round + turn) % targets.len()];
                let sample = ask(measured, *call, *arrival, lasting, plain)
                    .await
                    .with_context(|| format!("{name}: {}", measured.name))?;
                report.add(name, measured.name, sample);
            }
        }
    }
    for measured in &targets {
        report.at_end(measured);
    }

    let sidecar = targets.iter().find(|measured| measured.name == "keybrake").context("the sidecar")?;
    match instruments::syncs(sidecar, &[1, 16, 64], lasting, dir.path()).await? {
        Ok(syncs) => report.syncs(syncs),
        Err(why) => report.missing(&format!("NO SYNCS WERE COUNTED: {why} (apt-get install strace).")),
    }
    drop(targets);
    match instruments::instructions(&place).await? {
        Ok(instructions) => report.instructions(instructions),
        Err(why) => {
            report.missing(&format!("NO INSTRUCTIONS WERE COUNTED: {why} (apt-get install valgrind)."));
        }
    }
    println!("{report}");
    bounds::keep("BENCH_JSON", &report.json())
}

/// One pass, with what the target worked for it; fails where the stub executed more or less than was asked.
async fn ask(
    measured: &Measured,
    call: Call,
    arrival: Arrival,
    lasting: Duration,
    stub: SocketAddr,
) -> Result<Sample> {
    let executed_before = executed(stub).await?;
    let mut cpu = Duration::ZERO;
    let pass = load::pass(&measured.target, call, arrival, lasting, || cpu = measured.cpu()).await?;
    let cpu = measured.process.as_ref().map(|_| measured.cpu().saturating_sub(cpu));
    let executed = executed(stub).await? - executed_before;
    let expected = if call == Call::Charge { pass.sent } else { 0 };
    ensure!(executed == expected, "{expected} charges were made, and {executed} executed");
    Ok(Sample { latencies: pass.latencies, elapsed: pass.elapsed, cpu })
}

async fn executed(stub: SocketAddr) -> Result<usize> {
    let http = reqwest::Client::builder().no_proxy().build()?;
    Ok(http.get(format!("http://{stub}{}", stub::EXECUTED)).send().await?.text().await?.parse()?)
}
