//! Clocks of machines that are wrong: the time of all is the database's.

use std::path::{Path, PathBuf};
use std::process::Command;

use keybrake::time::{Clock, UnixMs};
use serde_json::json;

use crate::fleet::Fleet;
use crate::postgres;
use crate::standin::faults::Fault;

/// What stands before the system's own: the time of day of another machine.
const CLOCK: &str = r#"
#define _GNU_SOURCE
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
int clock_gettime(clockid_t clock, struct timespec *time) {
  int failed = syscall(SYS_clock_gettime, clock, time);
  const char *ahead = getenv("CLOCK_AHEAD_S");
  if (!failed && clock == CLOCK_REALTIME && ahead) time->tv_sec += atol(ahead);
  return failed;
}
"#;

/// Made by the compiler that links these tests.
fn clock_in(dir: &Path) -> PathBuf {
    let (source, library) = (dir.join("clock.c"), dir.join("clock.so"));
    std::fs::write(&source, CLOCK).unwrap();
    let made = Command::new("cc").args(["-shared", "-fPIC", "-o"]).arg(&library).arg(&source).output();
    let made = made.unwrap();
    assert!(made.status.success(), "cc: {}", String::from_utf8_lossy(&made.stderr));
    library
}

#[tokio::test(flavor = "multi_thread")]
async fn an_hour_between_clocks_is_nothing() {
    let Some(server) = postgres::server() else { return };
    let dir = tempfile::tempdir().unwrap();
    let clock = clock_in(dir.path());
    let fleet = Fleet::made(server, "clocks", 3, Vec::new(), |node| {
        let ahead = ["0", "3600", "-3600"][node].to_owned();
        vec![("LD_PRELOAD", clock.display().to_string()), ("CLOCK_AHEAD_S", ahead)]
    });
    let fleet = fleet.await;
    let logged = fleet.sidecars[1].log();
    let at = logged.split('"').find_map(UnixMs::parse).or_else(|| logged.split(' ').find_map(UnixMs::parse));
    let ahead = at.expect("a line with its time").millis_since(Clock::System.now());
    assert!(ahead > 3_000_000, "the clock of the second one is not wrong: {ahead}");
    for (n, minter) in fleet.sidecars.iter().enumerate() {
        let (key, id) = minter.mint("5.00", json!({"expires_in_seconds": 1_800})).await;
        for (m, sidecar) in fleet.sidecars.iter().enumerate() {
            let name = format!("{n}-{m}");
            fleet.standin.fault(Fault::DropAfter);
            let doubt = sidecar.charge(&key, &name, 50, "cus_1").await;
            assert_eq!(doubt.header("keybrake-outcome"), Some("doubt"), "{}", doubt.text);
            // Another one sends it again: by no clock is it too old for that.
            let other = &fleet.sidecars[(m + 1) % 3];
            let sent = other.charge(&key, &name, 50, "cus_1").await;
            assert_eq!(sent.status, 200, "{n} {m}: {}", sent.text);
        }
        assert_eq!(minter.spend(&id).await.0, "1.50");
    }
    assert_eq!(fleet.standin.executed().len(), 9);
    for sidecar in &fleet.sidecars {
        let now = Clock::System.now();
        let last = sidecar.audit("events=all").await.pop().unwrap();
        let at = UnixMs::parse(last["at"].as_str().unwrap()).unwrap();
        let apart = now.millis_since(at).max(at.millis_since(now));
        assert!(apart < 60_000, "{last}");
    }
}
