//! The one path that everything hangs on.

use crate::support::world;
use serde_json::json;

#[tokio::test]
async fn a_charge_is_made_once_and_recorded() {
    let (standin, sidecar) = world().await;
    let (key, id) = sidecar.mint("32.99", json!({})).await;
    let first = sidecar.charge(&key, "k-1", 2999, "cus_9").await;
    assert_eq!(first.status, 200, "{}", first.text);
    let again = sidecar.charge(&key, "k-1", 2999, "cus_9").await;
    assert_eq!((again.status, &again.body), (200, &first.body));
    assert_eq!(again.header("idempotent-replayed"), Some("true"));
    assert_eq!(again.header("original-request"), first.header("request-id"));
    assert_eq!(standin.executed().len(), 1);
    assert_eq!(sidecar.spend(&id).await, ("29.99".into(), "0.00".into(), "0.00".into()));
    let events: Vec<_> = sidecar.audit("events=all&customer=cus_9").await;
    let told: Vec<_> = events
        .iter()
        .map(|event| (event["event"].as_str().unwrap(), event["outcome"].as_str().unwrap()))
        .collect();
    assert_eq!(told, [("admitted", "held"), ("settled", "spent"), ("replayed", "none")]);
}
