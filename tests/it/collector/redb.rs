//! The suite on a file of the collector's own, and what only a file can do.

use std::process::Stdio;

use serde_json::json;
use tokio::time::Instant;

use crate::collector::suite::conformance;
use crate::collector::{Collector, Kept};
use crate::standin::{Options, Standin};
use crate::support::{PATIENCE, Sidecar};

const FILE: Option<Kept> = Some(Kept::File);

conformance!(FILE);

/// A collector whose disk is full takes nothing and loses nothing.
#[tokio::test]
async fn a_collector_with_a_full_disk_gets_the_rest_when_there_is_room() {
    let (standin, dir) = (Standin::start(Options::default()), tempfile::tempdir().unwrap());
    let mut collector = Collector::start(Kept::File, &["a"]).await;
    let sidecar = collector.sidecar("a", &standin, dir.path()).await;
    let fat: serde_json::Map<_, _> = (0..20).map(|n| (format!("m{n}"), json!("x".repeat(500)))).collect();
    let (key, _) = sidecar.mint("5000.00", json!({"metadata": fat})).await;
    collector.has_all_of(&sidecar, "a").await;
    assert!(collector.process.terminate().success());
    let data = collector.dir.path().join("data/collector.redb");
    let kib = std::fs::metadata(&data).unwrap().len() / 1_024;
    let env = collector.process.env().clone();
    let mut command = std::process::Command::new("sh");
    let script = format!("trap '' XFSZ; ulimit -f {}; exec \"$0\" collect", kib * 2);
    command.arg("-c").arg(script).arg(env!("CARGO_BIN_EXE_keybrake")).env_clear().envs(&env);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut full = Sidecar::spawn_by(&mut command, env);
    full.ready().await;
    let since = Instant::now();
    let mut charged = 0;
    while !full.log().contains("records cannot be kept") {
        assert_eq!(sidecar.charge(&key, &format!("n-{charged}"), 100, "cus_1").await.status, 200);
        charged += 1;
        assert!(since.elapsed() < PATIENCE, "the disk is never full: {}", full.log());
    }
    full.kill();
    collector.process.restart().await;
    collector.has_all_of(&sidecar, "a").await;
    let spent = collector.records("outcome=spent").await;
    assert_eq!((spent.len(), collector.is_whole().await), (charged, true));
}
