//! The records of reads, as they are kept by a sidecar that stops: nobody waits for them, and a clean stop loses none.

use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::support::{Sidecar, world};

async fn reading_key(sidecar: &Sidecar) -> String {
    sidecar.mint("50", json!({"allowed_endpoints": ["POST /v1/charges", "GET /v1/charges"]})).await.0
}

/// Reads at once, none of which is followed by anything that would have its record written.
async fn read(sidecar: &Sidecar, key: &str, count: usize) {
    let mut reads = JoinSet::new();
    for _ in 0..count {
        let request = crate::support::client().get(format!("{}/v1/charges", sidecar.base)).bearer_auth(key);
        reads.spawn(async move { request.send().await.unwrap().status().as_u16() });
    }
    assert_eq!(reads.join_all().await, vec![200; count]);
}

fn of_reads(records: &[Value]) -> usize {
    records.iter().filter(|record| record["event"] == "forwarded").count()
}

#[tokio::test]
async fn a_clean_stop_writes_every_record_of_a_read() {
    let (_standin, mut sidecar) = world().await;
    let key = reading_key(&sidecar).await;
    read(&sidecar, &key, 40).await;
    let refused = sidecar.call("GET", "/v1/customers", &key, &[], &[]).await;
    assert_eq!(refused.verdict(), (403, "endpoint_not_allowed"));
    assert!(sidecar.terminate().success());
    sidecar.restart().await;
    let records = sidecar.audit("events=all").await;
    assert_eq!(of_reads(&records), 40);
    assert_eq!(records.iter().filter(|record| record["code"] == "endpoint_not_allowed").count(), 1);
    let metrics = crate::support::client().get(format!("{}/metrics", sidecar.ops)).send().await.unwrap();
    assert!(metrics.text().await.unwrap().contains("keybrake_records_lost_total 0\n"));
}

#[tokio::test]
async fn a_kill_leaves_a_whole_chain_and_all_that_was_told_of_money() {
    let (standin, mut sidecar) = world().await;
    let key = reading_key(&sidecar).await;
    for n in 0..3 {
        read(&sidecar, &key, 20).await;
        assert_eq!(sidecar.charge(&key, &format!("paid-{n}"), 100, "cus_1").await.status, 200);
        read(&sidecar, &key, 20).await;
        sidecar.kill();
        sidecar.restart().await;
        let records = sidecar.audit("events=all").await;
        let spent = records.iter().filter(|record| record["outcome"] == "spent").count();
        assert_eq!(spent, standin.executed().len(), "money is told before it is answered");
        // What came before the charge went with it.
        assert!(of_reads(&records) >= 20 * (n + 1), "{} reads after kill {n}", of_reads(&records));
        let told = sidecar.admin("GET", "/audit/verify", None).await;
        assert_eq!((&told.body["whole"], &told.body["records"]), (&json!(true), &json!(records.len())));
    }
}

/// A question to the log is answered with everything that was answered before.
#[tokio::test]
async fn a_read_is_in_the_log_as_soon_as_anybody_asks() {
    let (_standin, sidecar) = world().await;
    let key = reading_key(&sidecar).await;
    for n in 1..=5 {
        read(&sidecar, &key, 1).await;
        assert_eq!(of_reads(&sidecar.audit("events=all").await), n);
    }
}
