//! Commits whose answers are lost, and commits that are lost themselves: the sidecar cannot tell one from the other, and
//! must be right in both.

use std::time::Duration;

use serde_json::json;
use tokio::time::Instant;

use crate::fleet::proxy::AtCommit::{self, LeaveOpen, LoseAnswer, LoseCommit};
use crate::fleet::{Fleet, money, until};
use crate::postgres;
use crate::standin::faults::Fault;

const BOTH: [AtCommit; 2] = [LoseAnswer, LoseCommit];

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_that_is_lost_or_loses_its_answer_costs_nothing() {
    let Some(server) = postgres::server() else { return };
    let fleet = Fleet::through_proxies(server, "lost", 1).await;
    let (sidecar, proxy) = (&fleet.sidecars[0], &fleet.proxies[0]);
    for (n, what) in BOTH.into_iter().enumerate() {
        let (key, id) = sidecar.mint("1.00", json!({})).await;
        // The admission.
        let before = proxy.lost();
        proxy.at_commit(what);
        let sent = sidecar.charge(&key, &format!("admitted-{n}"), 50, "cus_1").await;
        assert_eq!(sent.status, 200, "{what:?}: {}", sent.text);
        assert_eq!(proxy.lost(), before + 1);
        // The settle.
        fleet.standin.fault(Fault::HoldAfter);
        let name = format!("settled-{n}");
        let (settled, ()) = tokio::join!(sidecar.charge(&key, &name, 50, "cus_1"), async {
            until("it is at Stripe", async || fleet.standin.executed().len() == 2 * n + 2).await;
            proxy.at_commit(what);
            fleet.standin.release();
            proxy.has_lost(before + 2).await;
        });
        assert_eq!(settled.status, 200, "{what:?}: {}", settled.text);
        assert_eq!(sidecar.spend(&id).await, money("1.00", "0.00", "0.00"), "{what:?}");
        let more = sidecar.charge(&key, "more", 1, "cus_1").await;
        assert_eq!(more.verdict(), (429, "spend_cap_exceeded"), "{what:?}");
        // A revocation.
        proxy.at_commit(what);
        let revoked = sidecar.admin("DELETE", &format!("/admin/vault_keys/{id}"), None).await;
        assert_eq!(revoked.status, 200, "{what:?}: {}", revoked.text);
        assert_eq!(proxy.lost(), before + 3);
        assert_eq!(sidecar.charge(&key, "late", 1, "cus_1").await.verdict(), (401, "vault_key_revoked"));
    }
    assert_eq!(fleet.standin.executed().len(), 4);
}

/// The database goes with the commit, for longer than an answer waits for the truth.
#[tokio::test(flavor = "multi_thread")]
async fn what_nobody_knew_to_be_held_is_taken_back() {
    let Some(server) = postgres::server() else { return };
    let fleet = Fleet::through_proxies(server, "unknown", 2).await;
    let [a, b] = fleet.sidecars.as_slice() else { panic!("two") };
    let proxy = &fleet.proxies[0];
    let (key, id) = a.mint("1.00", json!({})).await;
    for (n, what) in BOTH.into_iter().enumerate() {
        let name = format!("admitted-{n}");
        proxy.at_commit_then_down(what);
        let refused = a.charge(&key, &name, 50, "cus_1").await;
        assert_eq!(refused.verdict(), (503, "ledger_unavailable"), "{what:?}: {}", refused.text);
        let held = if matches!(what, LoseAnswer) { "0.50" } else { "0.00" };
        assert_eq!(b.spend(&id).await.1, held, "{what:?}");
        assert_eq!((fleet.standin.executed().len(), a.readyz().await), (n, 503));
        proxy.set_down(false);
        until("it is taken back", async || b.spend(&id).await.1 == "0.00").await;
        until("it is ready", async || a.readyz().await == 200).await;
        assert_eq!(a.charge(&key, &name, 50, "cus_1").await.status, 200, "{}", a.log());
        assert_eq!(fleet.standin.executed().len(), n + 1);
    }
    assert_eq!(b.spend(&id).await, money("1.00", "0.00", "0.00"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_settle_that_cannot_be_written_is_kept_and_written() {
    let Some(server) = postgres::server() else { return };
    let fleet = Fleet::through_proxies(server, "kept", 2).await;
    let [a, b] = fleet.sidecars.as_slice() else { panic!("two") };
    let proxy = &fleet.proxies[0];
    let (key, id) = a.mint("2.00", json!({})).await;
    for (n, what) in [None, Some(LoseAnswer), Some(LoseCommit)].into_iter().enumerate() {
        fleet.standin.fault(Fault::HoldAfter);
        let name = format!("settled-{n}");
        let (answer, ()) = tokio::join!(a.charge(&key, &name, 50, "cus_1"), async {
            until("it is at Stripe", async || fleet.standin.executed().len() == n + 1).await;
            match what {
                Some(what) => proxy.at_commit_then_down(what),
                None => proxy.set_down(true),
            }
            fleet.standin.release();
        });
        assert_ne!(answer.status, 200, "{what:?}: an answer that nobody would remember");
        assert_eq!(b.charge(&key, "too much", 180, "cus_1").await.verdict(), (429, "spend_cap_exceeded"));
        proxy.set_down(false);
        let spent = format!("{}.{}0", n.div_ceil(2), (n + 1) % 2 * 5);
        until("it is settled", async || b.spend(&id).await == money(&spent, "0.00", "0.00")).await;
        for sidecar in [a, b] {
            let again = async || sidecar.charge(&key, &name, 50, "cus_1").await;
            until("it is used again", async || again().await.status != 503).await;
            let again = again().await;
            assert_eq!((again.status, again.header("idempotent-replayed")), (200, Some("true")));
        }
    }
    assert_eq!(fleet.standin.executed().len(), 3);
}

/// The server does not know that the connection is gone: the transaction and its locks stay until it ends them.
#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_that_is_left_open_is_waited_for() {
    let Some(server) = postgres::server() else { return };
    let fleet = Fleet::through_proxies(server, "open", 2).await;
    let [a, b] = fleet.sidecars.as_slice() else { panic!("two") };
    let (key, id) = a.mint("1.00", json!({})).await;
    fleet.proxies[0].at_commit(LeaveOpen);
    let refused = a.charge(&key, "one", 50, "cus_1").await;
    assert_eq!(refused.verdict(), (503, "ledger_unavailable"), "{}", refused.text);
    assert!(fleet.standin.executed().is_empty());
    for sidecar in [a, b] {
        until("it goes on", async || sidecar.charge(&key, "one", 50, "cus_1").await.status == 200).await;
    }
    assert_eq!(b.spend(&id).await, money("0.50", "0.00", "0.00"));
    assert_eq!(fleet.standin.executed().len(), 1);
}

/// Nothing is cut, and nothing comes: as from a machine that hangs.
#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_says_nothing_is_not_waited_for_for_ever() {
    let Some(server) = postgres::server() else { return };
    let fleet = Fleet::through_proxies(server, "silent", 2).await;
    let [a, b] = fleet.sidecars.as_slice() else { panic!("two") };
    let proxy = &fleet.proxies[0];
    let (key, id) = a.mint("1.00", json!({})).await;
    proxy.hang();
    let refused = a.charge(&key, "one", 50, "cus_1").await;
    assert_eq!(refused.verdict(), (503, "ledger_unavailable"), "{}", refused.text);
    until("it says that it is not ready", async || a.readyz().await == 503).await;
    assert_eq!(b.charge(&key, "two", 50, "cus_1").await.status, 200);
    // New sessions get through; those that hang never do.
    proxy.let_new_ones_through();
    until("it goes on", async || a.charge(&key, "one", 50, "cus_1").await.status == 200).await;
    assert_eq!(b.spend(&id).await, money("1.00", "0.00", "0.00"));
    assert_eq!(fleet.standin.executed().len(), 2);
}

/// Every round trip takes longer than the clock stands still.
#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_is_far_away_is_slow_and_no_more() {
    let Some(server) = postgres::server() else { return };
    let fleet = Fleet::through_proxies(server, "far", 1).await;
    let (sidecar, proxy) = (&fleet.sidecars[0], &fleet.proxies[0]);
    let (key, _) = sidecar.mint("100.00", json!({})).await;
    proxy.delay(Duration::from_millis(25));
    let since = Instant::now();
    let mut made = 0;
    while since.elapsed() < Duration::from_secs(5) {
        let sent = sidecar.charge(&key, &format!("far-{made}"), 50, "cus_1").await;
        assert_eq!(sent.status, 200, "{}", sent.text);
        made += 1;
    }
    assert!(made >= 2, "{made} calls in five seconds");
    assert!(!sidecar.log().contains("a tick of the ledger failed"), "{}", sidecar.log());
}
