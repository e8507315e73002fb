//! Several sidecars on one PostgreSQL: one ledger for all of them.

mod boots;
mod clocks;
mod commits;
pub(crate) mod proxy;
mod torture;

use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::Instant;

use crate::fleet::proxy::Proxy;
use crate::postgres::{self, Server};
use crate::standin::faults::Fault;
use crate::standin::{Options, Standin};
use crate::support::{PATIENCE, Sidecar, client, environment, free_port, run};

/// Sidecars with a ledger together, in front of one stand-in.
struct Fleet {
    standin: Standin,
    sidecars: Vec<Sidecar>,
    dirs: Vec<tempfile::TempDir>,
    /// One before each, where they reach the database through such.
    proxies: Vec<Proxy>,
}

impl Fleet {
    async fn of(server: &Server, what: &str, size: usize) -> Self {
        Self::made(server, what, size, Vec::new(), |_| Vec::new()).await
    }

    /// The same, each of them through a proxy of its own.
    async fn through_proxies(server: &Server, what: &str, size: usize) -> Self {
        let mut proxies = Vec::new();
        for _ in 0..size {
            proxies.push(Proxy::before(server.url()).await);
        }
        Self::made(server, what, size, proxies, |_| Vec::new()).await
    }

    async fn made(
        server: &Server,
        what: &str,
        size: usize,
        proxies: Vec<Proxy>,
        more: impl Fn(usize) -> Vec<(&'static str, String)>,
    ) -> Self {
        let standin = Standin::start(Options::default());
        let schema = server.schema(what);
        let (mut sidecars, mut dirs) = (Vec::new(), Vec::new());
        for node in 0..size {
            let dir = tempfile::tempdir().unwrap();
            let mut env = environment(standin.addr(), dir.path());
            let url = proxies.get(node).map_or_else(|| server.url().to_owned(), |by| by.url(server.url()));
            env.insert("KEYBRAKE_LEDGER_URL".to_owned(), url);
            env.insert("KEYBRAKE_LEDGER_SCHEMA".to_owned(), schema.name().to_owned());
            env.insert("KEYBRAKE_NODE".to_owned(), format!("node-{node}"));
            env.extend(more(node).into_iter().map(|(name, value)| (name.to_owned(), value)));
            sidecars.push(Sidecar::spawn(env));
            dirs.push(dir);
        }
        for sidecar in &mut sidecars {
            sidecar.ready().await;
        }
        Self { standin, sidecars, dirs, proxies }
    }
}

/// Asks until it is so; everything here has a reason to become so soon.
async fn until(what: &str, is_so: impl AsyncFn() -> bool) {
    let since = Instant::now();
    while !is_so().await {
        assert!(since.elapsed() < PATIENCE * 2, "never: {what}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

fn money(spent: &str, held: &str, doubt: &str) -> (String, String, String) {
    (spent.to_owned(), held.to_owned(), doubt.to_owned())
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

/// What the doctor says of one thing: its verdict and its words; and how it ended.
fn doctor(env: &std::collections::BTreeMap<String, String>, check: &str) -> (i32, String, String) {
    let (code, told, complaint) = run(env, &["doctor", "--json"]);
    let told: Value = serde_json::from_str(&told).unwrap_or_else(|_| panic!("{told}{complaint}"));
    let found = told["findings"].as_array().unwrap().iter().find(|one| one["check"] == check);
    let text = |field: &str| found.map_or("", |one| one[field].as_str().unwrap()).to_owned();
    (code, text("verdict"), text("told"))
}

#[tokio::test(flavor = "multi_thread")]
async fn the_doctor_tells_how_the_fleet_is() {
    let Some(server) = postgres::server() else { return };
    let mut fleet = Fleet::of(server, "doctor", 2).await;
    let env = fleet.sidecars[0].env().clone();
    let schema = env["KEYBRAKE_LEDGER_SCHEMA"].clone();
    let told = |check: &str| doctor(&env, check);
    let is = |check: &str, verdict: &str, words: &str| {
        let (code, found, told) = doctor(&env, check);
        assert_eq!((code, found.as_str()), (i32::from(verdict == "BAD"), verdict), "{check}: {told}");
        assert!(told.contains(words), "{check}: {told}");
    };
    is("database", "note", &format!("schema {schema} answers, not encrypted"));
    is("ledger", "ok", "test mode, acct_standin0000001");
    is("sidecars", "ok", "2 of 2 live: node-");
    is("doubts", "ok", "0 in doubt");
    is("connections", "ok", " in use (max_connections)");
    is("topology", "note", "of all sidecars on this schema");
    assert_eq!((told("size").1, told("file").1), (String::new(), String::new()), "there is no file");
    let metrics = client().get(format!("{}/metrics", fleet.sidecars[0].ops)).send().await.unwrap();
    let metrics = metrics.text().await.unwrap();
    assert!(metrics.contains("keybrake_audit_records ") && !metrics.contains("keybrake_ledger_bytes"));

    // One that dies while it sends; nobody is left to see that.
    let (key, _) = fleet.sidecars[1].mint("5.00", json!({})).await;
    fleet.standin.fault(Fault::HoldAfter);
    let (http, base) = (client(), fleet.sidecars[1].base.clone());
    let body = "amount=100&currency=usd&customer=cus_1&source=tok_visa";
    let request = http.post(format!("{base}/v1/charges")).bearer_auth(&key).header("idempotency-key", "one");
    let request = request.header("content-type", "application/x-www-form-urlencoded").body(body);
    tokio::spawn(request.send());
    let since = Instant::now();
    while fleet.standin.executed().is_empty() {
        assert!(since.elapsed() < PATIENCE);
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    fleet.sidecars.iter_mut().for_each(Sidecar::kill);
    fleet.standin.release();
    let long_ago = format!(
        "UPDATE {schema}.boots SET seen = seen - interval '100 s';
         UPDATE {schema}.boots SET fenced = true WHERE node = 'node-1'"
    );
    server.sql(&long_ago).await;
    is("sidecars", "note", "0 of 2 live: ");
    let (_, _, silent) = told("sidecars");
    assert!(silent.contains("node-1 (heartbeat 10") && silent.contains(" s ago, fenced)"), "{silent}");
    is("doubts", "note", "0 in doubt; 1 being sent by sidecars that are gone");
    std::fs::write(fleet.dirs[0].path().join("keybrake.redb"), "").unwrap();
    is("file", "note", "`keybrake ledger import` takes it over");

    let with = |name: &str, value: &str| {
        let mut env = env.clone();
        env.insert(format!("KEYBRAKE_{name}"), value.to_owned());
        env
    };
    let (code, verdict, told) = doctor(&with("LEDGER_SCHEMA", "made_by_nobody"), "ledger");
    assert_eq!((code, verdict.as_str()), (0, "note"), "{told}");
    let nowhere = format!("postgres://u:HUSH@127.0.0.1:{}/x", free_port());
    let (code, verdict, told) = doctor(&with("LEDGER_URL", &nowhere), "database");
    assert!(code == 1 && verdict == "BAD" && told.contains("refused") && !told.contains("HUSH"), "{told}");
    let (code, verdict, told) =
        doctor(&with("STRIPE_SECRET_KEY", "sk_live_standin0000000000000001"), "ledger");
    assert!(code == 1 && verdict == "BAD" && told.contains("belongs to test mode"), "{told}");
    server.sql(&format!("UPDATE {schema}.migrations SET version = 99")).await;
    is("ledger", "BAD", "the schema is of version 99");
}
