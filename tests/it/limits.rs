//! Bounds of a busy sidecar: a key in a hurry, and a crowd.

use serde_json::json;
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;
use tokio::time::{Duration, sleep};

use crate::raw::Raw;
use crate::support::world;

#[tokio::test]
async fn a_key_in_a_hurry_is_told_to_wait_and_its_replays_are_not() {
    let (standin, sidecar) = world().await;
    let more =
        json!({"requests_per_second": 1, "allowed_endpoints": ["POST /v1/charges", "GET /v1/charges/{id}"]});
    let (key, id) = sidecar.mint("100.00", more).await;
    assert_eq!(sidecar.key(&id).await["requests_per_second"], 1);
    let mut codes = Vec::new();
    for n in 0..4 {
        codes.push(sidecar.charge(&key, &format!("k-{n}"), 100, "cus_9").await.status);
    }
    assert_eq!(codes, [200, 200, 429, 429], "two seconds' worth at once");
    let told = sidecar.charge(&key, "k-9", 100, "cus_9").await;
    assert_eq!(told.verdict(), (429, "rate_limited"), "{}", told.text);
    assert_eq!(told.header("stripe-should-retry"), Some("true"));
    assert_eq!(sidecar.call("GET", "/v1/charges/ch_1", &key, &[], &[]).await.code(), "rate_limited");
    for _ in 0..10 {
        let again = sidecar.charge(&key, "k-0", 100, "cus_9").await;
        assert_eq!(again.header("idempotent-replayed"), Some("true"), "{}", again.text);
    }
    assert_eq!(standin.executed().len(), 2);
    assert_eq!(sidecar.spend(&id).await.0, "2.00", "nothing is held for what had to wait");
    sleep(Duration::from_millis(1_100)).await;
    assert_eq!(sidecar.charge(&key, "k-9", 100, "cus_9").await.status, 200);
}

/// Bodies whose length is not told take the room of the largest: a crowd of them leaves none for others.
#[tokio::test]
async fn a_crowd_is_turned_away_before_anything_is_held() {
    let (standin, sidecar) = world().await;
    let (key, id) = sidecar.mint("100.00", json!({})).await;
    let address = sidecar.base.strip_prefix("http://").unwrap();
    let head = format!(
        "POST /v1/charges HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {key}\r\nidempotency-key: crowd\r\n\
         content-type: application/x-www-form-urlencoded\r\ntransfer-encoding: chunked\r\n\r\n"
    );
    let mut crowd = Vec::new();
    for _ in 0..400 {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(head.as_bytes()).await.unwrap();
        crowd.push(stream);
    }
    let since = tokio::time::Instant::now();
    loop {
        let one_more = Raw::post("/v1/charges", &key, "crowd", "amount=100&currency=usd&customer=cus_9");
        let answer = one_more.add("Transfer-Encoding", "chunked").chunked().send(address).await;
        if (answer.status, answer.code()) == (503, "overloaded") {
            assert_eq!(answer.headers["stripe-should-retry"], "true");
            break;
        }
        assert!(since.elapsed() < crate::support::PATIENCE, "{}", answer.text);
    }
    assert_eq!(
        sidecar.charge(&key, "small", 100, "cus_9").await.status,
        200,
        "there is room for a small one"
    );
    assert_eq!(sidecar.spend(&id).await.1, "0.00");
    drop(crowd);
    loop {
        let later = Raw::post("/v1/charges", &key, "later", "amount=100&currency=usd&source=tok_visa");
        let answer = later.add("Transfer-Encoding", "chunked").chunked().send(address).await;
        if answer.status == 200 {
            break;
        }
        assert!(since.elapsed() < crate::support::PATIENCE, "{}", answer.text);
        sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(standin.executed().len(), 2);
}
