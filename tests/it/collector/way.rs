//! The way between sidecar and collector: what is asked on it.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use keybrake::id::{BootId, LedgerId};
use keybrake::ledger::{Ledger, Opening};
use keybrake::secret::{Mode, Secret};
use keybrake::ship::{self, Format, Progress, Shipper, Target};
use keybrake::telemetry::Metrics;
use keybrake::time::{Clock, HOUR_MS, UnixMs};
use keybrake::{random, tls};
use tokio::sync::oneshot;
use tokio::time::{Duration, Instant, sleep};
use tokio_util::sync::CancellationToken;

use super::{Collector, token};
use crate::support::PATIENCE;

/// A ledger that is shipped in this process, by a clock that is set by hand.
struct Shipped {
    ledger: Ledger,
    hand: Arc<AtomicU64>,
    progress: Arc<Progress>,
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
        let (progress, stop) = (Arc::new(Progress::default()), CancellationToken::new());
        let shipper = Shipper {
            ledger: ledger.clone(),
            target: Target {
                url: collector.process.base.clone(),
                token: Arc::new(Secret::new(token(node)).into()),
                format: Format::Keybrake,
            },
            http: ship::client(tls::client_config(ca).unwrap()).unwrap(),
            progress: Arc::clone(&progress),
            metrics: Metrics::default(),
        };
        tokio::spawn(shipper.run(stop.clone(), oneshot::channel().0));
        Self { ledger, hand, progress, stop, _dir: dir }
    }

    fn pass(&self, millis: u64) {
        self.hand.fetch_add(millis, Ordering::SeqCst);
    }

    fn warnings(&self) -> Vec<String> {
        self.progress.warnings(&self.ledger)
    }

    /// Waits until everything is acknowledged.
    async fn is_shipped(&self) {
        self.until("all is shipped", || self.progress.backlog(&self.ledger).0 == 0).await;
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
    let collector = Collector::start(&["a", "b", "c"]).await;
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
