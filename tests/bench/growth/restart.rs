//! The sidecar's own process on a ledger that was filled: how long until it is ready, and how much memory it takes.

use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

use crate::load::{self, Arrival, Call, Target};
use crate::processes::{Measured, Place, free_addr};

/// Starts of each kind.
const STARTS: usize = 5;
const CONNECTIONS: usize = 64;
/// How long it is under load at most: for its memory, and until each SIGKILL, before which it does so many calls a second.
const LOADED: Duration = Duration::from_secs(3);
const KILLED_AT: u32 = 200;
const BEFORE_KILL: Duration = Duration::from_millis(700);

/// What came of it.
pub(crate) struct Restarts {
    pub(crate) calls: u64,
    /// Until `/readyz` said 200, in milliseconds.
    pub(crate) clean_ms: Vec<f64>,
    pub(crate) killed_ms: Vec<f64>,
    pub(crate) started_bytes: u64,
    pub(crate) loaded_bytes: u64,
}

pub(crate) async fn measure(place: &Place<'_>, name: &'static str, calls: u64) -> Result<Restarts> {
    let mut clean_ms = Vec::new();
    let (mut measured, took) = start(place, name).await?;
    clean_ms.push(took);
    let started_bytes = measured.bytes();
    for _ in 1..STARTS {
        drop(measured);
        let (again, took) = start(place, name).await?;
        clean_ms.push(took);
        measured = again;
    }
    let mut killed_ms = Vec::new();
    for _ in 0..STARTS {
        let target = measured.target.clone();
        let load = tokio::spawn(async move {
            load::pass(&target, Call::Charge, Arrival::Open(KILLED_AT), LOADED, || ()).await
        });
        tokio::time::sleep(BEFORE_KILL).await;
        if load.is_finished() {
            load.await?.context("before it was killed")?;
            bail!("the load ended before it was killed");
        }
        if let Some(process) = &mut measured.process {
            process.stop("KILL")?;
        }
        ensure!(load.await?.is_err(), "the calls did not notice that the sidecar was killed");
        let (again, took) = start(place, name).await?;
        killed_ms.push(took);
        measured = again;
    }
    // Last, because it makes the ledger grow.
    load::pass(&measured.target, Call::Charge, Arrival::Kept(CONNECTIONS), LOADED, || ()).await?;
    let loaded_bytes = measured.bytes();
    Ok(Restarts { calls, clean_ms, killed_ms, started_bytes, loaded_bytes })
}

/// Starts it with a collector that is down, so that whatever waits for that is there, too.
async fn start(place: &Place<'_>, name: &'static str) -> Result<(Measured, f64)> {
    let settings = [
        ("TLS", "files".into()),
        ("TLS_CERT_FILE", place.files.cert.clone()),
        ("TLS_KEY_FILE", place.files.key.clone()),
        ("COLLECTOR_URL", PathBuf::from(format!("https://{}", free_addr()?))),
        ("COLLECTOR_TOKEN", "token-of-the-bench-0123456789abcdef0123456789".into()),
        ("LOG", "error".into()),
    ];
    let begun = Instant::now();
    let program = Command::new(env!("CARGO_BIN_EXE_keybrake"));
    let (process, addr) = place.serve(program, name, &settings)?;
    let took = begun.elapsed().as_secs_f64() * 1e3;
    let bearers = Arc::new(place.vault_keys(&format!("https://localhost:{}", addr.port())).await?);
    let target = Target { addr, tls: Some(place.tls.clone()), bearers };
    Ok((Measured { name, target, process: Some(process) }, took))
}
