//! What other programs count: syncs of the disk (strace), instructions (callgrind). Where one is missing, or may not
//! look, the table says so and has no figure.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use crate::load::{self, Arrival, Call, Target};
use crate::processes::{Measured, Place, Process, program};

/// How long strace takes to be there, at most.
const ATTACH: Duration = Duration::from_secs(1);
/// Calls of the base run, of which nothing is told, and those that a longer run has more.
const BASE_CALLS: usize = 50;
const MORE_CALLS: usize = 400;
const COUNTS: usize = 3;
/// The index of the audit log follows every five seconds: a run that ended before it would lack what another one has.
const INDEX_FOLLOWS: Duration = Duration::from_millis(7_500);

/// Syncs of the disk for each charge, by connections. `Err` tells why there is no figure.
pub(crate) async fn syncs(
    sidecar: &Measured,
    connections: &[usize],
    lasting: Duration,
    dir: &Path,
) -> Result<std::result::Result<Vec<(usize, f64)>, String>> {
    let Some(strace) = program("strace") else { return Ok(Err("there is no strace".to_owned())) };
    let pid = sidecar.process.as_ref().context("the sidecar has a process")?.pid();
    let mut found = Vec::new();
    for &count in connections {
        let out = dir.join(format!("strace-{count}"));
        let mut command = Command::new(&strace);
        command.args(["-c", "-f", "-e", "trace=fdatasync,fsync", "-o"]).arg(&out);
        command.args(["-p", &pid.to_string()]).stdin(Stdio::null());
        let mut counting = Process::start(&mut command, dir, &format!("strace-{count}-log"))?;
        std::thread::sleep(ATTACH);
        if counting.still_runs().is_err() {
            return Ok(Err("strace may not look at a process".to_owned()));
        }
        let pass = load::pass(&sidecar.target, Call::Charge, Arrival::Kept(count), lasting, || ()).await?;
        counting.stop("INT")?;
        let table = std::fs::read_to_string(&out)?;
        found.push((count, f64_of(calls_of(&table))? / f64_of(u64::try_from(pass.sent)?)?));
    }
    Ok(Ok(found))
}

/// The fourth column of the rows of both calls: `% time, seconds, usecs/call, calls`.
fn calls_of(table: &str) -> u64 {
    let rows = table.lines().filter(|row| row.ends_with("fdatasync") || row.ends_with("fsync"));
    rows.filter_map(|row| row.split_whitespace().nth(3)?.parse::<u64>().ok()).sum()
}

fn f64_of(count: u64) -> Result<f64> {
    Ok(f64::from(u32::try_from(count).context("more than can be counted here")?))
}

/// Instructions of the whole sidecar for each call, one caller, without TLS: what a run of more calls takes above one
/// of fewer, so that the start falls out.
pub(crate) async fn instructions(place: &Place<'_>) -> Result<std::result::Result<Value, String>> {
    let Some(valgrind) = program("valgrind") else { return Ok(Err("there is no valgrind".to_owned())) };
    let (mut charges, mut gets) = (Vec::new(), Vec::new());
    for round in 0..COUNTS {
        let mut totals = Vec::new();
        for (run, (more_charges, more_gets)) in
            [(0, 0), (MORE_CALLS, 0), (MORE_CALLS, MORE_CALLS)].into_iter().enumerate()
        {
            let name = format!("callgrind-{round}-{run}");
            let counts = (BASE_CALLS + more_charges, BASE_CALLS + more_gets);
            totals.push(total(place, &valgrind, &name, counts).await?);
        }
        let per_call =
            |more: usize, fewer: usize| totals[more].saturating_sub(totals[fewer]) / MORE_CALLS as u64;
        charges.push(per_call(1, 0));
        // Each read before a charge: its record is committed with that, not whenever a timer says so.
        gets.push(per_call(2, 1));
    }
    let told = |mut counts: Vec<u64>| {
        counts.sort_unstable();
        json!({ "median": counts[COUNTS / 2], "least": counts[0], "most": counts[COUNTS - 1] })
    };
    Ok(Ok(json!({ "charge": told(charges), "get": told(gets) })))
}

/// All instructions of a sidecar from its start to its end, with so many charges and reads in between.
async fn total(place: &Place<'_>, valgrind: &Path, name: &str, counts: (usize, usize)) -> Result<u64> {
    let out = place.dir.join(format!("{name}.out"));
    let mut command = Command::new(valgrind);
    command.args(["--tool=callgrind", &format!("--callgrind-out-file={}", out.display())]);
    command.arg(env!("CARGO_BIN_EXE_keybrake"));
    let settings = [("TLS", PathBuf::from("off"))];
    let (mut process, addr) = place.serve(command, name, &settings)?;
    let bearers = place.vault_keys(&format!("http://{addr}")).await?.into();
    let target = Target { addr, tls: None, bearers };
    load::calls(&target, counts.0, counts.1).await?;
    tokio::time::sleep(INDEX_FOLLOWS).await;
    process.stop("TERM")?;
    let told = std::fs::read_to_string(&out)?;
    let total = told.lines().find_map(|line| line.strip_prefix("totals: "));
    let total = total.context("callgrind told no total")?.trim().parse()?;
    ensure!(total > 0, "callgrind counted nothing");
    Ok(total)
}
