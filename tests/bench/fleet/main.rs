//! What a fleet's ledger in PostgreSQL does: one, four and sixteen sidecars on one database, with a key for each caller
//! and with one hot key for all, beside the least that could keep a cap: one statement on one row, committed for the
//! reserve and for the settle, on a connection of each caller's own. They take turns, so that whatever else the machine
//! does meets all of them; told are medians over the rounds, and ratios to the row lock of the same round.
//!
//! A sidecar is a handle to the ledger under a node's name of its own, with its writer, its connections and its ticks, in
//! this process: a sidecar without HTTP. A pair is a reserve and its settle, each durable before its answer: this bench's
//! own server runs with `fsync=on`, on the disk of `/var/tmp`, and is asked over its unix socket. Its processes, all
//! sidecars and all callers share the machine. With `KEYBRAKE_BENCH_POSTGRES_URL` it is that server instead, in a schema
//! that is dropped at the end. Where there is no PostgreSQL it says so, and nothing is measured.
//!
//! `FLEET_ROUNDS` (3), `FLEET_SECONDS` (0.5) of each figure, and `FLEET_JSON` names a file for all of them. No figure is
//! asserted: it fails when something does not run, or does not do what is measured.
#![expect(clippy::disallowed_methods, reason = "a benchmark asks the machine's clock and its environment")]
#![expect(clippy::print_stdout, reason = "what it measures is told on standard output")]

#[expect(dead_code, reason = "other benches have other goals")]
#[path = "../bounds.rs"]
mod bounds;
#[expect(dead_code, reason = "the bench of a ledger that grows asks more of a pass")]
#[path = "../calls.rs"]
mod calls;
#[path = "../proxy/certificates.rs"]
#[expect(dead_code, reason = "what Stripe answers is all that is wanted of the stub")]
mod certificates;
mod load;
mod report;
mod server;
#[path = "../proxy/stub.rs"]
#[expect(dead_code, reason = "what Stripe answers is all that is wanted of it")]
mod stub;

use std::time::Duration;

use anyhow::{Result, ensure};

use crate::bounds::knob;
use crate::load::{Bench, System};
use crate::report::Report;
use crate::server::Server;

const SYSTEMS: [System; 4] =
    [System::RowLock, System::Sidecars(1), System::Sidecars(4), System::Sidecars(16)];
const CALLERS: [usize; 3] = [1, 16, 64];

fn main() -> Result<()> {
    tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(run())
}

async fn run() -> Result<()> {
    let rounds: usize = knob("FLEET_ROUNDS", 3)?;
    ensure!(rounds > 0, "FLEET_ROUNDS: 1 or more");
    let seconds: f64 = knob("FLEET_SECONDS", 0.5)?;
    ensure!((0.1..=3_600.0).contains(&seconds), "FLEET_SECONDS: 0.1 to 3600");
    let Some(server) = Server::find()? else {
        println!("\n*** NOT MEASURED: a fleet's ledger. There is no `postgres` and `initdb` in PATH or");
        println!("*** /usr/lib/postgresql/*/bin, and no KEYBRAKE_BENCH_POSTGRES_URL.\n");
        return Ok(());
    };
    let bench = Bench::prepare(server.target()?, Duration::from_secs_f64(seconds)).await?;
    let mut report = Report::new(rounds, seconds, bench.server_says().await?);
    for round in 0..rounds {
        let mut turns = SYSTEMS;
        turns.rotate_left(round % SYSTEMS.len());
        for system in turns {
            for (case, figures) in bench.measure(system, &CALLERS).await? {
                report.add(round, system, case, figures);
            }
        }
    }
    bench.end().await?;
    println!("{report}");
    bounds::keep("FLEET_JSON", &report.json())
}
