//! Several sidecars on one PostgreSQL: one ledger for all of them.

use std::time::Duration;

use serde_json::json;

use crate::postgres::{self, Server};
use crate::standin::faults::Fault;
use crate::standin::{Options, Standin};
use crate::support::{Sidecar, environment};

/// Sidecars with a ledger together, in front of one stand-in.
struct Fleet {
    standin: Standin,
    sidecars: Vec<Sidecar>,
    _dirs: Vec<tempfile::TempDir>,
}

impl Fleet {
    async fn of(server: &Server, what: &str, size: usize) -> Self {
        let standin = Standin::start(Options::default());
        let schema = server.schema(what);
        let (mut sidecars, mut dirs) = (Vec::new(), Vec::new());
        for node in 0..size {
            let dir = tempfile::tempdir().unwrap();
            let mut env = environment(standin.addr(), dir.path());
            env.insert("KEYBRAKE_LEDGER_URL".to_owned(), server.url().to_owned());
            env.insert("KEYBRAKE_LEDGER_SCHEMA".to_owned(), schema.name().to_owned());
            env.insert("KEYBRAKE_NODE".to_owned(), format!("node-{node}"));
            sidecars.push(Sidecar::spawn(env));
            dirs.push(dir);
        }
        for sidecar in &mut sidecars {
            sidecar.ready().await;
        }
        Self { standin, sidecars, _dirs: dirs }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_caps_and_calls_are_the_fleets() {
    let Some(server) = postgres::server() else { return };
    let fleet = Fleet::of(server, "shared", 3).await;
    let [a, b, c] = fleet.sidecars.as_slice() else { panic!("three") };
    let (key, id) = a.mint("1.10", json!({})).await;
    assert_eq!(b.charge(&key, "one", 60, "cus_1").await.status, 200);
    let again = c.charge(&key, "one", 60, "cus_1").await;
    assert_eq!((again.status, again.header("idempotent-replayed")), (200, Some("true")));
    assert_eq!(a.charge(&key, "two", 60, "cus_1").await.verdict(), (429, "spend_cap_exceeded"));
    assert_eq!(c.charge(&key, "three", 50, "cus_1").await.status, 200);
    assert_eq!(b.charge(&key, "one", 61, "cus_1").await.status, 400);
    assert_eq!(b.admin("DELETE", &format!("/admin/vault_keys/{id}"), None).await.status, 200);
    assert_eq!(a.charge(&key, "four", 50, "cus_1").await.verdict(), (401, "vault_key_revoked"));
    let (key, _) = c.mint("1.00", json!({})).await;
    let stop = json!({"on": true, "reason": "drill"});
    assert_eq!(a.admin("POST", "/admin/kill_switch", Some(&stop)).await.status, 200);
    assert_eq!(b.charge(&key, "five", 50, "cus_1").await.verdict(), (403, "kill_switch"));
    assert_eq!(fleet.standin.executed().len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_in_flight_at_another_worker_is_waited_for() {
    let Some(server) = postgres::server() else { return };
    let fleet = Fleet::of(server, "in_flight", 2).await;
    let [a, b] = fleet.sidecars.as_slice() else { panic!("two") };
    let (key, _) = a.mint("1.00", json!({})).await;
    fleet.standin.fault(Fault::SlowAfterMs(700));
    let (first, second) = tokio::join!(a.charge(&key, "one", 60, "cus_1"), async {
        tokio::time::sleep(Duration::from_millis(200)).await;
        b.charge(&key, "one", 60, "cus_1").await
    });
    assert_eq!((first.status, second.status), (200, 200), "{} {}", first.text, second.text);
    assert_eq!(first.body["id"], second.body["id"]);
    assert_eq!(fleet.standin.executed().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_is_gone_admits_nothing_and_is_used_again_when_it_is_back() {
    let Some(server) = Server::own() else { return };
    let fleet = Fleet::of(&server, "gone", 2).await;
    let [a, b] = fleet.sidecars.as_slice() else { panic!("two") };
    let (key, _) = a.mint("1.00", json!({})).await;
    assert_eq!(a.charge(&key, "one", 50, "cus_1").await.status, 200);
    server.stop_immediately();
    for sidecar in [a, b] {
        let refused = sidecar.charge(&key, "two", 50, "cus_1").await;
        assert_eq!(refused.verdict(), (503, "ledger_unavailable"), "{}", refused.text);
    }
    assert_eq!(fleet.standin.executed().len(), 1);
    server.start();
    for sidecar in [a, b] {
        let mut tries = 0;
        while sidecar.charge(&key, "two", 50, "cus_1").await.status != 200 {
            tries += 1;
            assert!(tries < 100, "{}", sidecar.log());
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
    assert_eq!(fleet.standin.executed().len(), 2);
}
