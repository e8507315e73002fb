//! The suite on a PostgreSQL, and what only a database does: several collectors on it, its going and coming, commits whose
//! answer is lost.

use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use keybrake::audit::{Entry, Event};
use keybrake::collect::chain::Refused;
use keybrake::collect::postgres as database;
use keybrake::collect::store::{Store, StoreError};
use keybrake::journal::AuditFilter;
use keybrake::postgres::Target;
use keybrake::time::Clock;
use keybrake::tls;
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Duration, Instant, sleep};

use crate::collector::store::{Ledger, Records, START, all, answer_alike, chain_of, seqs};
use crate::collector::suite::conformance;
use crate::collector::{Collector, Kept, QUERY_KEY, schema_of, token};
use crate::dice::{Told, seeds};
use crate::postgres::{Server, server};
use crate::standin::{Options, Standin};
use crate::support::{PATIENCE, client, run};

fn kept() -> Option<Kept> {
    server().map(Kept::Database)
}

/// A server that a test may stop. It ends with the process of the tests.
fn of_its_own() -> Option<&'static Server> {
    Server::own().map(|server| &*Box::leak(Box::new(server)))
}

conformance!(kept());

#[tokio::test]
async fn what_is_found_is_what_a_file_finds() {
    let Some(kept) = kept() else { return };
    for seed in seeds("KEYBRAKE_TEST_QUESTIONS", 1) {
        let told = Told::of_seed(seed);
        let (clock, _) = Clock::manual(START);
        let (file, rows) = (Records::of(Kept::File), Records::of(kept));
        answer_alike(&file.open(&clock).await, &rows.open(&clock).await, seed).await;
        drop(told);
    }
}

/// Two collectors take the same batches and others at the same time: each record is held once, in one order for all who ask.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn several_collectors_take_the_same_chains_at_once() {
    const RECORDS: usize = 60;
    let Some(kept) = kept() else { return };
    let (records, clock) = (Records::of(kept), Clock::manual(START).0);
    let stores = [records.open(&clock).await, records.open(&clock).await, records.open(&clock).await];
    let ledgers = Arc::new(["a", "b", "c", "d"].map(|name| {
        let mut ledger = Ledger::new(name);
        ledger.fill(RECORDS);
        ledger
    }));
    let mut senders = Vec::new();
    for (n, store) in stores.iter().enumerate() {
        for at in 0..ledgers.len() {
            let (ledgers, store) = (Arc::clone(&ledgers), store.clone());
            senders.push(tokio::spawn(async move {
                let (mut from, step) = (1, 3 + n);
                while from <= RECORDS {
                    let to = (from + step).min(RECORDS);
                    match store.take(ledgers[at].sent(from, to)).await {
                        // Behind what the others have sent, it goes on all the same.
                        Ok(chain) => assert!(chain.head_seq >= to as u64),
                        Err(error) => panic!("{error}"),
                    }
                    from = to + 1;
                }
            }));
        }
    }
    // Who follows the log meanwhile misses nothing.
    let (mut followed, mut after) = (Vec::new(), None);
    let everything = AuditFilter { all_events: true, ascending: true, ..AuditFilter::default() };
    let since = Instant::now();
    while followed.len() < RECORDS * ledgers.len() {
        let page = stores[0].query(everything.clone(), after, 7).await.unwrap();
        let mut places = page.items.len() as u64;
        if let Some(next) = page.next {
            places = next - after.unwrap_or(0);
            assert_eq!(places, page.items.len() as u64, "places have no gaps");
        }
        after = Some(after.unwrap_or(0) + places);
        followed.extend(page.items);
        assert!(since.elapsed() < PATIENCE, "{} were followed", followed.len());
    }
    for sender in senders {
        sender.await.unwrap();
    }
    assert_eq!(followed, all(&stores[1], &everything, 1_000).await);
    for (id, chain) in stores[2].chains().await.unwrap() {
        let verdict = stores[2].verify(&id, &chain).await.unwrap();
        assert_eq!((verdict.records, verdict.broken), (RECORDS as u64, None), "{id}");
        assert_eq!((chain.head_seq, chain.state()), (RECORDS as u64, "whole"), "{id}");
    }
}

/// A way to the database on which the answer to a COMMIT is lost, or the COMMIT itself.
struct Relay {
    port: u16,
    /// COMMITs still to be lost on their way there.
    before: Arc<AtomicUsize>,
    /// COMMITs whose answers are still to be lost.
    after: Arc<AtomicUsize>,
}

impl Relay {
    async fn start(to: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let relay = Self {
            port: listener.local_addr().unwrap().port(),
            before: Arc::default(),
            after: Arc::default(),
        };
        let (before, after) = (Arc::clone(&relay.before), Arc::clone(&relay.after));
        tokio::spawn(async move {
            loop {
                let (client, _) = listener.accept().await.unwrap();
                let server = TcpStream::connect(("127.0.0.1", to)).await.unwrap();
                tokio::spawn(pass(client, server, Arc::clone(&before), Arc::clone(&after)));
            }
        });
        relay
    }
}

fn is_due(left: &AtomicUsize) -> bool {
    left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)).is_ok()
}

async fn pass(
    mut client: TcpStream,
    mut server: TcpStream,
    before: Arc<AtomicUsize>,
    after: Arc<AtomicUsize>,
) {
    let (mut asked, mut answered) = (vec![0; 1 << 16], vec![0; 1 << 16]);
    loop {
        tokio::select! {
            read = client.read(&mut asked) => {
                let Ok(n @ 1..) = read else { return };
                let is_commit = asked[..n].windows(7).any(|seven| seven == b"COMMIT\0");
                if is_commit && is_due(&before) {
                    return;
                }
                if server.write_all(&asked[..n]).await.is_err() {
                    return;
                }
                if is_commit && is_due(&after) {
                    // It is answered when it holds.
                    let _ = server.read(&mut answered).await;
                    return;
                }
            }
            read = server.read(&mut answered) => {
                let Ok(n @ 1..) = read else { return };
                if client.write_all(&answered[..n]).await.is_err() {
                    return;
                }
            }
        }
    }
}

/// The answer to a COMMIT is lost: the sender hears that it failed, sends the same again, and the records are held once.
#[tokio::test]
async fn a_commit_whose_answer_is_lost_doubles_nothing() {
    let Some(kept) = kept() else { return };
    let (records, clock) = (Records::of(kept), Clock::manual(START).0);
    let schema = records.schema.as_ref().unwrap();
    let (credentials, address) = schema.url().rsplit_once('@').unwrap();
    let (host, name) = address.split_once('/').unwrap();
    let relay = Relay::start(host.rsplit_once(':').unwrap().1.parse().unwrap()).await;
    let url = format!("{credentials}@127.0.0.1:{}/{name}", relay.port);
    let target = Target::parse(&url, None, schema.name(), tls::client_config(None).unwrap()).unwrap();
    let store = Store::Postgres(database::Store::open(target, clock.clone(), 2).await.unwrap());
    let mut ledger = Ledger::new("a");
    ledger.fill(9);
    assert_eq!(store.take(ledger.sent(1, 3)).await.unwrap().head_seq, 3);
    for (lost, (from, to), holds) in [(&relay.after, (4, 6), true), (&relay.before, (7, 9), false)] {
        lost.store(1, Ordering::SeqCst);
        let failed = store.take(ledger.sent(from, to)).await;
        assert!(matches!(failed, Err(StoreError::Unavailable(_))), "{failed:?}");
        let head = chain_of(&store, &ledger).await.unwrap().head_seq;
        assert_eq!(head, if holds { to } else { from - 1 } as u64);
        assert_eq!(store.take(ledger.sent(from, to)).await.unwrap().head_seq, to as u64);
    }
    assert_eq!(seqs(&store).await, (1..=9).collect::<Vec<u64>>());
    let chain = chain_of(&store, &ledger).await.unwrap();
    assert_eq!(store.verify(&ledger.name, &chain).await.unwrap().records, 9);
}

/// One node that sends what no database takes keeps the others from nothing.
#[tokio::test]
async fn what_cannot_be_kept_is_refused_alone() {
    let Some(kept) = kept() else { return };
    let (records, clock) = (Records::of(kept), Clock::manual(START).0);
    let store = records.open(&clock).await;
    let (mut bad, mut good) = (Ledger::new("a\u{0}b"), Ledger::new("a"));
    bad.fill(2);
    let weird = "\u{0}\u{1f}".repeat(5_000);
    good.append(&Entry {
        at: START.to_string(),
        event: Event::Refused,
        customer: Some(weird.clone()),
        ..Entry::default()
    });
    let (refused, taken) = tokio::join!(store.take(bad.sent(1, 2)), store.take(good.sent(1, 1)));
    assert!(matches!(refused, Err(StoreError::Refused(Refused::Unreadable(1)))), "{refused:?}");
    assert_eq!(taken.unwrap().head_seq, 1);
    let equal = vec![("customer", weird)];
    let found = all(&store, &AuditFilter { equal, ..AuditFilter::default() }, 10).await;
    assert_eq!(found, [good.records[0].to_json()]);
}

#[tokio::test]
async fn collectors_share_one_database() {
    let (Some(kept), standin) = (kept(), Standin::start(Options::default())) else { return };
    let dirs = [tempfile::tempdir(), tempfile::tempdir()].map(Result::unwrap);
    let mut first = Collector::start(kept, &["a", "b"]).await;
    let second = first.another(&["a", "b"]).await;
    let mut a = first.sidecar("a", &standin, dirs[0].path()).await;
    let b = second.sidecar("b", &standin, dirs[1].path()).await;
    let keys = [a.mint("50.00", json!({})).await.0, b.mint("50.00", json!({})).await.0];
    assert_eq!(a.charge(&keys[0], "one", 1000, "cus_1").await.status, 200);
    assert_eq!(b.charge(&keys[1], "two", 1000, "cus_2").await.status, 200);
    // Each answers for both.
    second.has_all_of(&a, "a").await;
    first.has_all_of(&b, "b").await;
    first.process.kill();
    assert_eq!(a.charge(&keys[0], "three", 1000, "cus_1").await.status, 200);
    // As behind a balancer, which the address of the collector is left to.
    assert!(a.terminate().success());
    let a = second.sidecar("a", &standin, dirs[0].path()).await;
    second.has_all_of(&a, "a").await;
    for (sidecar, node) in [(&a, "a"), (&b, "b")] {
        let held = second.records(&format!("events=all&node={node}")).await;
        assert_eq!(held, sidecar.audit("events=all").await);
    }
    assert_eq!(second.records("outcome=spent").await.len(), 3);
    let node = second.node("a").await;
    assert_eq!((node["chains"].as_array().unwrap().len(), second.is_whole().await), (1, true), "{node}");
}

async fn readyz(collector: &Collector) -> (u16, String) {
    let answer = client().get(format!("{}/readyz", collector.process.ops)).send().await.unwrap();
    (answer.status().as_u16(), answer.text().await.unwrap())
}

/// Nothing is taken, answered or lost while the database is away, and everything goes on when it is back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_that_goes_and_comes_is_waited_for() {
    let Some(server) = of_its_own() else { return };
    let (standin, dir) = (Standin::start(Options::default()), tempfile::tempdir().unwrap());
    let collector = Collector::start(Kept::Database(server), &["a"]).await;
    let sidecar = collector.sidecar("a", &standin, dir.path()).await;
    let (key, _) = sidecar.mint("500.00", json!({})).await;
    for round in 0..2 {
        assert_eq!(sidecar.charge(&key, &format!("up-{round}"), 100, "cus_1").await.status, 200);
        collector.has_all_of(&sidecar, "a").await;
        server.stop_immediately();
        for n in 0..5 {
            assert_eq!(sidecar.charge(&key, &format!("down-{round}-{n}"), 100, "cus_1").await.status, 200);
        }
        for path in ["/audit", "/audit/nodes", "/audit/verify", "/audit/evidence"] {
            let refused = collector.get(path).await;
            assert_eq!(refused.verdict(), (503, "collector_unavailable"), "{path}: {}", refused.text);
        }
        let (status, told) = readyz(&collector).await;
        assert!(status == 503 && told.contains("the database cannot be used"), "{told}");
        let since = Instant::now();
        while !collector.process.log().contains("records cannot be kept") {
            assert!(since.elapsed() < PATIENCE, "{}", collector.process.log());
            sleep(Duration::from_millis(10)).await;
        }
        server.start();
        collector.has_all_of(&sidecar, "a").await;
        assert_eq!(readyz(&collector).await.0, 200);
    }
    assert_eq!(collector.records("events=all").await, sidecar.audit("events=all").await);
    assert_eq!((collector.records("outcome=spent").await.len(), collector.is_whole().await), (12, true));
}

/// A collector that comes up before its database waits for it; one that cannot ever use it says so and ends.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_collector_starts_without_its_database_but_not_on_another_builds() {
    let Some(server) = of_its_own() else { return };
    let mut collector = Collector::start(Kept::Database(server), &["a"]).await;
    assert!(collector.process.terminate().success());
    server.stop_immediately();
    let mut again = crate::support::Sidecar::spawn_collector(collector.process.env().clone());
    let since = Instant::now();
    while !again.log().contains("the collector is listening") {
        assert!(since.elapsed() < PATIENCE, "{}", again.log());
        sleep(Duration::from_millis(10)).await;
    }
    let refused = again.json("GET", "/audit", QUERY_KEY, None).await;
    assert_eq!(refused.verdict(), (503, "collector_unavailable"), "{}", refused.text);
    server.start();
    again.ready().await;
    assert!(again.terminate().success());
    let schema = collector.schema.as_ref().unwrap();
    schema.sql("UPDATE migrations SET version = 99").await;
    let (code, _, told) = run(collector.process.env(), &["collect"]);
    assert!(code == 1 && told.contains("is of version 99"), "{code} {told}");
    assert!(!told.contains("password-of-the-tests"), "{told}");
}

/// The password changes while it runs.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rotated_password_is_read_again() {
    let Some(server) = server() else { return };
    let schema = schema_of(Kept::Database(server)).unwrap();
    let role = format!("{}_role", schema.name());
    let address = schema.url().rsplit_once('@').unwrap().1;
    let database = address.rsplit_once('/').unwrap().1;
    let made = format!(
        "CREATE ROLE {role} LOGIN PASSWORD 'first-one'; GRANT CREATE ON DATABASE \"{database}\" TO {role}"
    );
    server.sql(&made).await;
    let secrets = tempfile::tempdir().unwrap();
    let file = secrets.path().join("password");
    std::fs::write(&file, "first-one\n").unwrap();
    let more = [
        ("COLLECT_DATABASE_URL", format!("postgres://{role}@{address}")),
        ("COLLECT_DATABASE_PASSWORD_FILE", file.display().to_string()),
    ];
    let collector = Collector::start_with("off", &["a"], Some(Arc::clone(&schema)), &more).await;
    server.sql(&format!("ALTER ROLE {role} PASSWORD 'second-one'")).await;
    let end = format!("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{role}'");
    server.sql(&end).await;
    let since = Instant::now();
    while readyz(&collector).await.0 == 200 {
        assert!(since.elapsed() < PATIENCE, "its sessions go on");
        sleep(Duration::from_millis(10)).await;
    }
    let (_, told) = readyz(&collector).await;
    assert!(told.contains("password authentication failed"), "{told}");
    std::fs::write(&file, "second-one\n").unwrap();
    let hup = Command::new("kill").arg("-HUP").arg(collector.process.pid().to_string()).status();
    assert!(hup.unwrap().success());
    while readyz(&collector).await.0 != 200 {
        assert!(since.elapsed() < PATIENCE, "{}", collector.process.log());
        sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(collector.process.json("GET", "/audit", &token("a"), None).await.status, 200);
    let log = collector.process.log();
    assert!(!log.contains("first-one") && !log.contains("second-one"), "{log}");
    drop(collector);
    server.sql(&format!("DROP OWNED BY {role} CASCADE; DROP ROLE {role}")).await;
}
