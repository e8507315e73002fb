//! Runs of the process: those that are gone, those that were only slow, and two under one name.

use std::process::Command;
use std::time::Duration;

use serde_json::json;

use crate::fleet::proxy::AtCommit;
use crate::fleet::{Fleet, money, until};
use crate::postgres;
use crate::standin::faults::{Fault, On, Scripted};
use crate::support::{Sidecar, client, patient_client};

pub(super) fn signal(sidecar: &Sidecar, signal: &str) {
    let sent = Command::new("kill").arg(signal).arg(sidecar.pid().to_string()).status().unwrap();
    assert!(sent.success());
}

/// Else recovery would end the doubts by what it finds at Stripe.
fn keep_records_back(fleet: &Fleet) {
    let reads = On::Path { method: "GET".to_owned(), prefix: "/v1/".to_owned() };
    fleet.standin.fault(Scripted { count: 1_000, ..Fault::DropBefore.on(reads) });
}

async fn reasons(sidecar: &Sidecar) -> String {
    client().get(format!("{}/readyz", sidecar.ops)).send().await.unwrap().text().await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_dead_sidecar_was_sending_is_sent_again_by_another_one() {
    let Some(server) = postgres::server() else { return };
    let mut fleet = Fleet::of(server, "dead", 2).await;
    let (key, id) = fleet.sidecars[0].mint("1.00", json!({})).await;
    keep_records_back(&fleet);
    fleet.standin.fault(Fault::HoldAfter);
    let [a, b] = fleet.sidecars.as_mut_slice() else { panic!("two") };
    let asked = patient_client().build().unwrap().post(format!("{}/v1/charges", a.base));
    let asked = asked.bearer_auth(&key).header("idempotency-key", "one");
    let asked = asked.header("content-type", "application/x-www-form-urlencoded");
    let asked = tokio::spawn(asked.body("amount=60&currency=usd&customer=cus_1&source=tok_visa").send());
    until("it is at Stripe", async || fleet.standin.executed().len() == 1).await;
    a.kill();
    assert!(asked.await.unwrap().is_err());
    // Whoever it belongs to may live.
    let early = b.charge(&key, "one", 60, "cus_1").await;
    assert_eq!(early.status, 409, "{}", early.text);
    assert_eq!(b.charge(&key, "two", 60, "cus_1").await.verdict(), (429, "spend_cap_exceeded"));
    until("it is a doubt", async || b.spend(&id).await == money("0.00", "0.60", "0.60")).await;
    let sent = b.charge(&key, "one", 60, "cus_1").await;
    assert_eq!(sent.status, 200, "{}", sent.text);
    assert_eq!(b.spend(&id).await, money("0.60", "0.00", "0.00"));
    assert_eq!(fleet.standin.executed().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_boot_that_was_only_slow_settles_what_it_learned() {
    let Some(server) = postgres::server() else { return };
    let fleet = Fleet::of(server, "slow", 2).await;
    let [a, b] = fleet.sidecars.as_slice() else { panic!("two") };
    let (key, id) = a.mint("2.00", json!({})).await;
    keep_records_back(&fleet);
    // The second is made again by the other one meanwhile.
    fleet.standin.fault(Fault::HoldAfter.times(2));
    let slow = async |name| {
        let asked = patient_client().build().unwrap().post(format!("{}/v1/charges", a.base));
        let asked = asked.bearer_auth(&key).header("idempotency-key", name);
        let asked = asked.header("content-type", "application/x-www-form-urlencoded");
        asked.body("amount=60&currency=usd&customer=cus_1&source=tok_visa").send().await.unwrap()
    };
    let (first, second, ()) = tokio::join!(slow("one"), slow("two"), async {
        until("they are at Stripe", async || fleet.standin.executed().len() == 2).await;
        signal(a, "-STOP");
        fleet.standin.release();
        until("they are doubts", async || b.spend(&id).await == money("0.00", "1.20", "1.20")).await;
        assert_eq!(b.charge(&key, "two", 60, "cus_1").await.status, 200);
        assert_eq!(b.spend(&id).await, money("0.60", "0.60", "0.60"));
        signal(a, "-CONT");
    });
    // What was answered meanwhile was not seen within the time that Stripe has, or it was.
    for answer in [&first, &second] {
        assert!([200, 502, 504].contains(&answer.status().as_u16()), "{answer:?}");
    }
    for name in ["one", "two"] {
        for sidecar in [a, b] {
            let again = sidecar.charge(&key, name, 60, "cus_1").await;
            assert_eq!(again.status, 200, "{}", again.text);
        }
    }
    assert_eq!(b.spend(&id).await, money("1.20", "0.00", "0.00"));
    assert_eq!(fleet.standin.executed().len(), 2);
    assert_eq!(a.charge(&key, "three", 60, "cus_1").await.status, 200);
    assert_eq!(a.readyz().await, 200);
    let boots = server.schema_of(&a.env()["KEYBRAKE_LEDGER_SCHEMA"]);
    let boots = boots.sql("SELECT fenced, doubted FROM boots WHERE node = 'node-0' ORDER BY fenced").await;
    assert_eq!(boots, [["f", "f"], ["t", "t"]]);
}

/// The registration of its next run holds, and the answer to that is lost.
#[tokio::test(flavor = "multi_thread")]
async fn a_boot_that_comes_back_knows_itself_again() {
    let Some(server) = postgres::server() else { return };
    let fleet = Fleet::through_proxies(server, "comes_back", 1).await;
    let (sidecar, proxy) = (&fleet.sidecars[0], &fleet.proxies[0]);
    let (key, _) = sidecar.mint("2.00", json!({})).await;
    let schema = server.schema_of(&sidecar.env()["KEYBRAKE_LEDGER_SCHEMA"]);
    for (n, what) in [AtCommit::LoseAnswer, AtCommit::LoseCommit].into_iter().enumerate() {
        proxy.at_commit(what);
        schema.sql("UPDATE boots SET fenced = true").await;
        until("it is lost", async || proxy.lost() == u64::try_from(n + 1).unwrap()).await;
        let name = format!("charge-{n}");
        until("it goes on", async || sidecar.charge(&key, &name, 50, "cus_1").await.status == 200).await;
        assert_eq!((sidecar.readyz().await, fleet.standin.executed().len()), (200, n + 1));
    }
}

/// Between its last commit and its heartbeat: it hears of itself as of one that is gone.
#[tokio::test(flavor = "multi_thread")]
async fn a_boot_that_finds_itself_among_the_gone_goes_on() {
    let Some(server) = postgres::server() else { return };
    let fleet = Fleet::of(server, "itself", 1).await;
    let sidecar = &fleet.sidecars[0];
    let (key, id) = sidecar.mint("2.00", json!({})).await;
    keep_records_back(&fleet);
    let schema = server.schema_of(&sidecar.env()["KEYBRAKE_LEDGER_SCHEMA"]);
    fleet.standin.fault(Fault::HoldAfter);
    let (answer, ()) = tokio::join!(sidecar.charge(&key, "one", 60, "cus_1"), async {
        until("it is at Stripe", async || fleet.standin.executed().len() == 1).await;
        schema
            .sql(
                "CREATE FUNCTION fence() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                   IF NEW.batch = OLD.batch AND (SELECT count(*) FROM boots) = 1 THEN NEW.fenced := true; END IF;
                   RETURN NEW;
                 END $$;
                 CREATE TRIGGER fence BEFORE UPDATE ON boots FOR EACH ROW EXECUTE FUNCTION fence()",
            )
            .await;
        until("it is another one", async || schema.sql("SELECT 1 FROM boots WHERE doubted").await.len() == 1)
            .await;
        fleet.standin.release();
    });
    assert_eq!(answer.status, 200, "{}", answer.text);
    assert_eq!(sidecar.spend(&id).await, money("0.60", "0.00", "0.00"));
    assert_eq!(sidecar.charge(&key, "two", 60, "cus_1").await.status, 200);
    assert_eq!(fleet.standin.executed().len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_processes_under_one_name_the_older_one_stops() {
    let Some(server) = postgres::server() else { return };
    let fleet = Fleet::made(server, "same_name", 2, Vec::new(), |node| {
        // The second one begins when the first is ready.
        std::thread::sleep(Duration::from_millis(1_500) * u32::try_from(node).unwrap());
        vec![("KEYBRAKE_NODE", "the-same".to_owned())]
    });
    let fleet = fleet.await;
    let [older, younger] = fleet.sidecars.as_slice() else { panic!("two") };
    until("it says so", async || reasons(older).await.contains("another process runs as node the-same"))
        .await;
    assert_eq!((older.readyz().await, younger.readyz().await), (503, 200));
    let (key, _) = younger.mint("1.00", json!({})).await;
    let refused = older.charge(&key, "one", 60, "cus_1").await;
    assert_eq!(refused.verdict(), (503, "ledger_unavailable"), "{}", refused.text);
    assert!(fleet.standin.executed().is_empty());
    assert_eq!(younger.charge(&key, "one", 60, "cus_1").await.status, 200);
    assert_eq!(older.charge(&key, "two", 10, "cus_1").await.status, 503);
}
