//! The way between sidecar and collector: what is asked on it, how it breaks, and whom it trusts.
//!
//! `KEYBRAKE_TEST_CUTS` sets in how many worlds it breaks by chance; `KEYBRAKE_TEST_SEED` repeats one.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use keybrake::id::{BootId, LedgerId};
use keybrake::ledger::{Ledger, Opening};
use keybrake::secret::{Mode, Secret};
use keybrake::ship::{Format, Progress, Shipper, Target, Way};
use keybrake::telemetry::Metrics;
use keybrake::time::{Clock, HOUR_MS, UnixMs};
use keybrake::{random, tls};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio::time::{Duration, Instant, sleep};
use tokio_util::sync::CancellationToken;

use crate::collector::{Collector, Kept, token};
use crate::dice::{Dice, Told, seeds};
use crate::ledger::reads::wait;
use crate::own_faults::tls_of;
use crate::standin::{Options, Standin};
use crate::support::{PATIENCE, Sidecar, client, run};

/// A ledger that is shipped in this process, by a clock that is set by hand.
struct Shipped {
    ledger: Ledger,
    hand: Arc<AtomicU64>,
    progress: Arc<Progress>,
    way: Way,
    stop: CancellationToken,
    _dir: tempfile::TempDir,
}

impl Shipped {
    /// A new ledger of a node that serves the one Stripe account.
    async fn start(node: &str, collector: &Collector, ca: Option<&Path>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (clock, hand) = Clock::manual(UnixMs::from_millis(1_784_000_000_000));
        let now = clock.now();
        let opening = Opening {
            node: node.to_owned(),
            mode: Mode::Test,
            clock,
            boot: BootId::new(now, random::bytes()),
            fresh_id: LedgerId::new(now, random::bytes()),
            fresh_salt: [3; 32],
            audit_days: 400,
            ships: true,
        };
        let ledger = Ledger::open(&dir.path().join("keybrake.redb"), opening).unwrap();
        ledger.bind("acct_1".to_owned(), [7; 32]).await.unwrap();
        let way = Way::new(tls::client_config(ca).unwrap()).unwrap();
        let (progress, stop) = (Arc::new(Progress::default()), CancellationToken::new());
        let shipper = Shipper {
            ledger: ledger.clone(),
            target: Target {
                url: collector.process.base.clone(),
                token: Arc::new(Secret::new(token(node)).into()),
                format: Format::Keybrake,
            },
            way: way.clone(),
            progress: Arc::clone(&progress),
            metrics: Metrics::default(),
        };
        tokio::spawn(shipper.run(stop.clone(), oneshot::channel().0));
        Self { ledger, hand, progress, way, stop, _dir: dir }
    }

    fn pass(&self, millis: u64) {
        self.hand.fetch_add(millis, Ordering::SeqCst);
    }

    fn warnings(&self) -> Vec<String> {
        wait(self.progress.warnings(&self.ledger))
    }

    /// Waits until everything is acknowledged.
    async fn is_shipped(&self) {
        self.until("all is shipped", || wait(self.progress.backlog(&self.ledger)).0 == 0).await;
    }

    async fn until(&self, what: &str, is_so: impl Fn() -> bool) {
        let since = Instant::now();
        while !is_so() {
            assert!(since.elapsed() < PATIENCE, "never: {what}; {:?}", self.warnings());
            sleep(Duration::from_millis(10)).await;
        }
    }
}

impl Drop for Shipped {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

/// Nothing fails and nothing is started again: who else serves the account is asked for all the same.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_serves_the_same_account_is_asked_again_within_the_hour() {
    let collector = Collector::start(Kept::File, &["a", "b", "c"]).await;
    let first = Shipped::start("a", &collector, None).await;
    first.is_shipped().await;
    let second = Shipped::start("b", &collector, None).await;
    second.is_shipped().await;
    assert_eq!(
        (first.warnings(), second.warnings()),
        (vec![], vec![]),
        "the collector did not know them yet"
    );
    for (asks, other) in [(&second, "a"), (&first, "b")] {
        asks.pass(60_000);
        let told = [format!(
            "this Stripe account is served by the ledger of {other} too: caps and memory are not shared between them"
        )];
        asks.until("it hears of the other", || asks.warnings() == told).await;
    }
    let third = Shipped::start("c", &collector, None).await;
    third.is_shipped().await;
    let names_third = || {
        let told = first.warnings().concat();
        // In the order of their ids.
        ["of b, c too", "of c, b too"].iter().any(|both| told.contains(both))
    };
    assert!(!names_third(), "nobody has asked since");
    first.pass(HOUR_MS);
    first.until("it hears of the new one", names_third).await;
}

/// One cut of a connection: in a request or in its answer, counted from the first of the connection.
#[derive(Clone, Copy, Debug)]
struct Cut {
    in_answer: bool,
    exchange: usize,
}

/// A way that breaks: each connection has the next cut of a plan, at a byte by chance. When all are made, it is whole.
struct Relay {
    url: String,
    state: Arc<Mutex<Plan>>,
}

struct Plan {
    cuts: VecDeque<Cut>,
    dice: Dice,
    /// Cuts that were made: bytes of batches that were passed on, and of answers to batches.
    made: Vec<(Cut, usize)>,
}

impl Relay {
    async fn start(collector: SocketAddr, seed: u64) -> Self {
        let mut dice = Dice::new(seed);
        // Each within a batch: the first request of a connection asks what the collector holds.
        let mut cuts = [false, true].map(|in_answer| Cut { in_answer, exchange: 1 + dice.below(2) });
        dice.shuffle(&mut cuts);
        let state = Arc::new(Mutex::new(Plan { cuts: cuts.into(), dice, made: Vec::new() }));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let shared = Arc::clone(&state);
        tokio::spawn(async move {
            loop {
                let (client, _) = listener.accept().await.unwrap();
                tokio::spawn(pass(client, collector, Arc::clone(&shared)));
            }
        });
        Self { url, state }
    }

    fn is_whole(&self) -> bool {
        self.state.lock().unwrap().cuts.is_empty()
    }
}

/// Passes bytes on, up to the cut of this connection.
async fn pass(mut client: TcpStream, collector: SocketAddr, state: Arc<Mutex<Plan>>) {
    let cut = state.lock().unwrap().cuts.front().copied();
    let mut server = TcpStream::connect(collector).await.unwrap();
    let (mut asked, mut answered) = (0, 0);
    let (mut request, mut answer) = (vec![0; 1 << 16], vec![0; 1 << 16]);
    loop {
        let (from_client, n) = tokio::select! {
            read = client.read(&mut request) => (true, read),
            read = server.read(&mut answer) => (false, read),
        };
        let Ok(n @ 1..) = n else { return };
        // Neither side says anything out of turn.
        if from_client {
            asked += usize::from(asked == answered);
        } else {
            answered = asked;
        }
        let is_here = cut.filter(|cut| cut.in_answer != from_client && cut.exchange + 1 == asked);
        let passed = match is_here {
            Some(_) => state.lock().unwrap().dice.below(n),
            None => n,
        };
        let (to, bytes) =
            if from_client { (&mut server, &request[..passed]) } else { (&mut client, &answer[..passed]) };
        if to.write_all(bytes).await.is_err() {
            return;
        }
        if let Some(cut) = is_here {
            let mut plan = state.lock().unwrap();
            plan.cuts.pop_front();
            plan.made.push((cut, passed));
            // Half of them without a word of parting.
            if plan.dice.percent(50) {
                let _ = (client.set_zero_linger(), server.set_zero_linger());
            }
            return;
        }
    }
}

/// A sidecar whose way to the collector breaks.
struct Cuttable {
    node: &'static str,
    relay: Relay,
    sidecar: Sidecar,
    key: String,
    _dir: tempfile::TempDir,
}

impl Cuttable {
    async fn start(node: &'static str, collector: &Collector, standin: &Standin, seed: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let address = collector.process.base.strip_prefix("http://").unwrap().parse().unwrap();
        let relay = Relay::start(address, seed).await;
        let mut env = collector.env_of(node, standin, dir.path());
        env.insert("KEYBRAKE_COLLECTOR_URL".to_owned(), relay.url.clone());
        let mut sidecar = Sidecar::spawn(env);
        sidecar.ready().await;
        let (key, _) = sidecar.mint("5000.00", json!({})).await;
        Self { node, relay, sidecar, key, _dir: dir }
    }

    /// Charges until every cut is made; answers how many.
    async fn load(&self) -> usize {
        const CHARGES_MAX: usize = 150;
        let (since, mut charged) = (Instant::now(), 0);
        while charged == 0 || !self.relay.is_whole() {
            if charged < CHARGES_MAX {
                let name = format!("{}-{charged}", self.node);
                let reply = self.sidecar.charge(&self.key, &name, 100, &format!("cus_{name}")).await;
                assert_eq!(reply.status, 200, "{}", reply.text);
                charged += 1;
            }
            sleep(Duration::from_millis(10)).await;
            assert!(since.elapsed() < PATIENCE, "not every cut is made: {}", self.sidecar.log());
        }
        charged
    }
}

/// Connections are cut within batches and within the answers to them, while charges are made.
pub(super) async fn a_way_that_is_cut_within_batches_loses_and_doubles_nothing(kept: Kept) {
    for seed in seeds("KEYBRAKE_TEST_CUTS", 1) {
        let told = Told::of_seed(seed);
        let (standin, collector) =
            (Standin::start(Options::default()), Collector::start(kept, &["a", "b", "c"]).await);
        let start = |node, n| Cuttable::start(node, &collector, &standin, seed.wrapping_mul(3) + n);
        let (a, b, c) = tokio::join!(start("a", 0), start("b", 1), start("c", 2));
        let (of_a, of_b, of_c) = tokio::join!(a.load(), b.load(), c.load());
        for (cuttable, charged) in [(&a, of_a), (&b, of_b), (&c, of_c)] {
            let node = cuttable.node;
            let made = cuttable.relay.state.lock().unwrap().made.clone();
            assert!(made.len() == 2 && made[0].0.in_answer != made[1].0.in_answer, "{node}: {made:?}");
            collector.has_all_of(&cuttable.sidecar, node).await;
            let held = collector.records(&format!("events=all&node={node}")).await;
            assert_eq!(held, cuttable.sidecar.audit("events=all").await, "{node}: each once and in order");
            for event in ["admitted", "settled"] {
                let of_event = held.iter().filter(|record| record["event"] == event);
                assert_eq!(of_event.count(), charged, "{node}: {event}");
            }
        }
        let spent = collector.records("outcome=spent").await;
        let mut told_of: Vec<_> = spent.iter().map(|one| one["object_id"].as_str().unwrap()).collect();
        let executed = standin.executed();
        let mut made: Vec<_> = executed.iter().map(|one| one.object_id.as_str()).collect();
        told_of.sort_unstable();
        made.sort_unstable();
        assert_eq!(told_of, made);
        let evidence = collector.get("/audit/evidence").await.body["data"].clone();
        assert!(collector.is_whole().await && evidence == json!([]), "{evidence}");
        drop(told);
    }
}

/// How a certificate is refused that nobody trusted vouches for.
const UNTRUSTED: &str = "invalid peer certificate: UnknownIssuer";

/// Another authority, whose certificates bear the collector's name.
fn foreign_authority(dir: &Path) -> PathBuf {
    drop(tls_of(dir, "127.0.0.1"));
    dir.join("ca.pem")
}

/// Whoever answers has to prove that it is the collector. Until it can, charges go on and their records wait.
#[tokio::test]
async fn a_collector_that_is_not_trusted_gets_nothing_and_then_everything() {
    let (standin, dir) = (Standin::start(Options::default()), tempfile::tempdir().unwrap());
    let collector = Collector::start_with_tls(&["a"]).await;
    let ca = dir.path().join("collector-ca.pem");
    std::fs::copy(foreign_authority(&dir.path().join("foreign")), &ca).unwrap();
    let mut env = collector.env_of("a", &standin, &dir.path().join("data"));
    env.insert("KEYBRAKE_COLLECTOR_CA_FILE".to_owned(), ca.display().to_string());
    let mut sidecar = Sidecar::spawn(env);
    sidecar.ready().await;
    let backlog = async || -> usize {
        let metrics = client().get(format!("{}/metrics", sidecar.ops)).send().await.unwrap();
        let metrics = metrics.text().await.unwrap();
        metrics.lines().find_map(|line| line.strip_prefix("keybrake_audit_backlog ")?.parse().ok()).unwrap()
    };
    let (key, _) = sidecar.mint("50.00", json!({})).await;
    for n in 0..5 {
        let before = backlog().await;
        assert_eq!(sidecar.charge(&key, &format!("n-{n}"), 100, "cus_1").await.status, 200);
        assert_eq!(backlog().await, before + 2, "both records of the charge wait");
    }
    let refused = |line: &str| line.contains("cannot be shipped") && line.contains(UNTRUSTED);
    assert!(sidecar.log().lines().any(refused), "{}", sidecar.log());
    let (_, told, complaint) = run(sidecar.env(), &["doctor", "--json"]);
    let told: Value = serde_json::from_str(&told).unwrap_or_else(|_| panic!("{told}{complaint}"));
    let finding =
        told["findings"].as_array().unwrap().iter().find(|one| one["check"] == "collector").unwrap();
    assert!(
        finding["verdict"] == "BAD" && finding["told"].as_str().unwrap().contains(UNTRUSTED),
        "{finding}"
    );
    let fleet = sidecar.admin("GET", "/audit?fleet=true", None).await;
    assert_eq!(fleet.verdict(), (502, "upstream_unreachable"), "{}", fleet.text);
    assert_eq!((collector.node("a").await, sidecar.readyz().await), (Value::Null, 200));

    std::fs::copy(collector.ca(), &ca).unwrap();
    let hup = Command::new("kill").arg("-HUP").arg(sidecar.pid().to_string()).status();
    assert!(hup.unwrap().success());
    collector.has_all_of(&sidecar, "a").await;
    assert_eq!(collector.records("events=all").await, sidecar.audit("events=all").await);
    assert_eq!((collector.records("outcome=spent").await.len(), collector.is_whole().await), (5, true));
    let fleet = sidecar.admin("GET", "/audit?fleet=true&outcome=spent", None).await;
    assert_eq!(fleet.body["data"].as_array().map(Vec::len), Some(5), "{}", fleet.text);

    // Taken for the collector at the start as well, and by nobody without its authority.
    assert!(sidecar.terminate().success());
    sidecar.restart().await;
    assert_eq!(sidecar.charge(&key, "n-5", 100, "cus_1").await.status, 200);
    collector.has_all_of(&sidecar, "a").await;
    assert!(client().get(format!("{}/audit", collector.process.base)).send().await.is_err());
}

/// The probe warns of it, with the reason, and goes on to be ready.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn records_that_have_waited_for_long_are_warned_of_with_the_reason() {
    let dir = tempfile::tempdir().unwrap();
    let collector = Collector::start_with_tls(&["a"]).await;
    let foreign = foreign_authority(dir.path());
    let shipped = Shipped::start("a", &collector, Some(&foreign)).await;
    shipped.pass(599_999);
    assert_eq!(shipped.warnings(), [""; 0]);
    shipped.pass(1);
    let waiting = format!("{} audit records wait", wait(shipped.progress.backlog(&shipped.ledger)).0);
    shipped
        .until("a warning", || {
            let told = shipped.warnings().concat();
            told.starts_with(&waiting) && told.contains("the oldest for 600 s") && told.contains(UNTRUSTED)
        })
        .await;
    shipped.way.trust(tls::client_config(Some(&collector.ca())).unwrap()).unwrap();
    shipped.is_shipped().await;
    assert_eq!(shipped.warnings(), [""; 0]);
}
