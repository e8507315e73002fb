//! What a key may still spend, and what stops it: caps, limits of calls, the kill switch, revocation and expiry.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::standin::faults::{Fault, On};
use crate::support::{PATIENCE, Reply, Sidecar, head_of, world};

const TWO_DAYS_S: u64 = 2 * 86_400;

/// The figures of a refusal, without what explains them.
fn figures(reply: &Reply) -> Vec<&str> {
    assert_eq!(reply.verdict(), (429, "spend_cap_exceeded"), "{}", reply.text);
    let error = &reply.body["error"];
    assert!(error["message"].as_str().unwrap().starts_with("Spend cap exceeded"), "{}", reply.text);
    assert_eq!(reply.header("stripe-should-retry"), Some("false"));
    ["cap", "limit", "spent", "held", "requested"].map(|field| error[field].as_str().unwrap()).to_vec()
}

#[tokio::test]
async fn the_refusal_of_a_cap_says_what_a_person_and_a_program_need() {
    let (standin, sidecar) = world().await;
    let (key, _) = sidecar.mint("10.00", json!({"expires_in_seconds": TWO_DAYS_S})).await;
    assert_eq!(sidecar.charge(&key, "order-1", 600, "cus_1").await.status, 200);
    standin.fault(Fault::DropBefore);
    assert_eq!(sidecar.charge(&key, "order-2", 150, "cus_1").await.status, 502);
    let over = sidecar.charge(&key, "order-3", 500, "cus_1").await;
    assert_eq!(figures(&over), ["daily", "10.00", "6.00", "1.50", "5.00"]);
    let error = over.body["error"].as_object().unwrap();
    let names: BTreeSet<_> = error.keys().map(String::as_str).collect();
    let expected =
        ["cap", "code", "doc_url", "held", "limit", "message", "requested", "resets_at", "spent", "type"];
    assert_eq!(names, BTreeSet::from(expected));
    assert_eq!(error["type"], "invalid_request_error");
    assert!(error["doc_url"].as_str().unwrap().ends_with("/keybrake/errors#spend_cap_exceeded"));
    let resets_at = error["resets_at"].as_str().unwrap();
    assert!(resets_at.ends_with("T00:00:00.000Z") || resets_at.ends_with("T00:00:00Z"), "{resets_at}");
    let seconds: u64 = over.header("retry-after").unwrap().parse().unwrap();
    assert!((1..=86_400).contains(&seconds), "{seconds}");
    // To the cent: what fits still goes through, and one cent more does not.
    assert_eq!(sidecar.charge(&key, "order-4", 251, "cus_1").await.status, 429);
    assert_eq!(sidecar.charge(&key, "order-4", 250, "cus_1").await.status, 200);
    assert_eq!(figures(&sidecar.charge(&key, "order-5", 50, "cus_1").await)[2..4], ["8.50", "1.50"]);
}

#[tokio::test]
async fn where_nothing_resets_nothing_says_when() {
    let (_standin, sidecar) = world().await;
    let (short, short_id) = sidecar.mint("5.00", json!({"expires_in_seconds": 86_400})).await;
    let mut total = json!({"expires_in_seconds": TWO_DAYS_S, "total_usd_cap": "4.00"});
    let (both, _) = sidecar.mint("5.00", total.clone()).await;
    total["max_usd_per_request"] = json!(3);
    let (small, small_id) = sidecar.mint("5.00", total).await;
    for (key, amount, expected) in [
        (&short, 501, ["daily", "5.00", "0.00", "0.00", "5.01"]),
        // The tightest of those that it exceeds.
        (&both, 501, ["total", "4.00", "0.00", "0.00", "5.01"]),
        (&both, 401, ["total", "4.00", "0.00", "0.00", "4.01"]),
        (&small, 501, ["per_request", "3.00", "0.00", "0.00", "5.01"]),
        (&small, 301, ["per_request", "3.00", "0.00", "0.00", "3.01"]),
    ] {
        let over = sidecar.charge(key, &format!("order-{amount}"), amount, "cus_1").await;
        assert_eq!(figures(&over), expected);
        assert_eq!((&over.body["error"]["resets_at"], over.header("retry-after")), (&Value::Null, None));
    }
    assert_eq!(sidecar.charge(&small, "order-a", 300, "cus_1").await.status, 200);
    assert_eq!(
        figures(&sidecar.charge(&small, "order-b", 200, "cus_1").await)[..3],
        ["total", "4.00", "3.00"]
    );
    let today = sidecar.key(&short_id).await["spend"]["today"].clone();
    assert_eq!(today["resets_at"], Value::Null);
    let spend = sidecar.key(&small_id).await["spend"].clone();
    assert_eq!(spend["today"]["remaining"], "1.00", "the total cap is nearer than the daily one");
    assert_eq!(spend["total"]["remaining"], "1.00");
    assert!(spend["today"]["resets_at"].is_string());
}

#[tokio::test]
async fn the_spend_of_a_key() {
    let (standin, sidecar) = world().await;
    let (key, id) = sidecar.mint("10.00", json!({"expires_in_seconds": TWO_DAYS_S})).await;
    assert_eq!(sidecar.charge(&key, "order-1", 450, "cus_1").await.status, 200);
    standin.fault(Fault::DropBefore);
    assert_eq!(sidecar.charge(&key, "order-2", 150, "cus_1").await.status, 502);
    let mut shown = sidecar.key(&id).await;
    assert!(shown["spend"]["today"]["resets_at"].take().as_str().unwrap().contains("T00:00:00"));
    assert!(shown["spend"]["today"]["out"]["resets_at"].take().is_string());
    let out = json!({"spent": "0.00", "held": "0.00", "doubt": "0.00", "remaining": null});
    let with = |remaining: Value, out: &Value| json!({"spent": "4.50", "held": "1.50", "doubt": "1.50", "remaining": remaining, "out": out});
    let (mut today, mut total) = (with(json!("4.00"), &out), with(Value::Null, &out));
    (today["resets_at"], today["out"]["resets_at"], total["calls"]) = (Value::Null, Value::Null, json!(2));
    assert_eq!(shown["spend"], json!({"today": today, "total": total}));
    assert!(shown.get("vault_key").is_none(), "the secret is shown once");
    let own = sidecar.call("GET", "/keybrake/key", &key, &[], &[]).await;
    assert_eq!((own.status, &own.body["spend"]["today"]["remaining"]), (200, &json!("4.00")), "{}", own.text);
    assert_eq!((&own.body["mode"], &own.body["expires_at"]), (&json!("test"), &shown["expires_at"]));
}

#[tokio::test]
async fn a_limit_of_calls_counts_what_moved_or_may_move() {
    let (standin, sidecar) = world().await;
    let (key, id) = sidecar.mint("100.00", json!({"max_calls": 2})).await;
    standin.fault(Fault::Decline);
    assert_eq!(sidecar.charge(&key, "order-0", 100, "cus_1").await.status, 402);
    assert_eq!(sidecar.charge(&key, "order-1", 100, "cus_1").await.status, 200);
    standin.fault(Fault::DropAfter);
    assert_eq!(sidecar.charge(&key, "order-2", 100, "cus_1").await.status, 502);
    let third = sidecar.charge(&key, "order-3", 100, "cus_1").await;
    assert_eq!(third.verdict(), (429, "call_limit_exceeded"), "{}", third.text);
    assert_eq!(third.header("stripe-should-retry"), Some("false"));
    assert_eq!(third.header("retry-after"), None);
    assert_eq!(sidecar.charge(&key, "order-1", 100, "cus_1").await.status, 200, "a replay needs no room");
    assert_eq!(sidecar.charge(&key, "order-2", 100, "cus_1").await.status, 200, "nor does a doubt");
    assert_eq!(sidecar.key(&id).await["spend"]["total"]["calls"], 2);
    assert_eq!(standin.executed().len(), 2);
}

#[tokio::test]
async fn an_uncapped_key_is_counted_all_the_same() {
    let (_standin, sidecar) = world().await;
    let policy = json!({"daily_usd_cap": null, "uncapped": true, "max_usd_per_request": "9000.00"});
    let (key, id) = sidecar.mint("", policy).await;
    for n in 0..3 {
        assert_eq!(sidecar.charge(&key, &format!("order-{n}"), 800_000, "cus_1").await.status, 200);
    }
    assert_eq!(sidecar.charge(&key, "order-9", 900_001, "cus_1").await.status, 429);
    let shown = sidecar.key(&id).await;
    assert_eq!((&shown["daily_usd_cap"], &shown["uncapped"]), (&Value::Null, &json!(true)));
    let today = &shown["spend"]["today"];
    assert_eq!((&today["spent"], &today["remaining"]), (&json!("24000.00"), &Value::Null));
    let reads = json!({"daily_usd_cap": null, "allowed_endpoints": ["GET /v1/charges"]});
    let (reader, _) = sidecar.mint("", reads).await;
    assert_eq!(sidecar.call("GET", "/v1/charges", &reader, &[], &[]).await.status, 200);
    assert_eq!(
        sidecar.charge(&reader, "order-1", 100, "cus_1").await.verdict(),
        (403, "endpoint_not_allowed")
    );
}

async fn charges_at_once(sidecar: &Arc<Sidecar>, key: &str, count: usize) -> BTreeMap<u16, usize> {
    let mut calls = JoinSet::new();
    for n in 0..count {
        let (sidecar, key) = (Arc::clone(sidecar), key.to_owned());
        calls.spawn(async move {
            sidecar.charge(&key, &format!("order-{n}"), 100, &format!("cus_{n}")).await.status
        });
    }
    let mut statuses = BTreeMap::new();
    for status in calls.join_all().await {
        *statuses.entry(status).or_default() += 1;
    }
    statuses
}

#[tokio::test]
async fn forty_calls_at_once_stay_under_a_small_cap() {
    let (standin, sidecar) = world().await;
    let sidecar = Arc::new(sidecar);
    let (key, id) = sidecar.mint("10.00", json!({})).await;
    let statuses = charges_at_once(&sidecar, &key, 40).await;
    assert_eq!(statuses, BTreeMap::from([(200, 10), (429, 30)]));
    assert_eq!(standin.executed().iter().map(|moved| moved.amount).sum::<u64>(), 1000);
    assert_eq!(sidecar.spend(&id).await, ("10.00".into(), "0.00".into(), "0.00".into()));
}

/// The same with half of the answers lost: what is not known is counted, so the cap holds for what Stripe executed.
#[tokio::test]
async fn lost_answers_do_not_stretch_a_cap() {
    let (standin, sidecar) = world().await;
    let sidecar = Arc::new(sidecar);
    let (key, id) = sidecar.mint("10.00", json!({})).await;
    standin.fault(Fault::DropAfter.times(3));
    standin.fault(Fault::Status500After.times(2));
    standin.fault(Fault::DropBefore.times(2));
    let statuses = charges_at_once(&sidecar, &key, 40).await;
    assert_eq!(statuses, BTreeMap::from([(200, 3), (429, 30), (500, 2), (502, 5)]));
    assert_eq!(standin.executed().len(), 8);
    assert_eq!(sidecar.spend(&id).await, ("3.00".into(), "7.00".into(), "7.00".into()));
    charges_at_once(&sidecar, &key, 40).await;
    assert_eq!(standin.executed().len(), 10, "no doubt was given to somebody else");
    assert_eq!(sidecar.spend(&id).await, ("8.00".into(), "2.00".into(), "2.00".into()), "a stored 500 stays");
}

#[tokio::test]
async fn the_kill_switch_stops_everything_until_it_is_off() {
    let (standin, mut sidecar) = world().await;
    let endpoints = json!({"allowed_endpoints": ["POST /v1/charges", "GET /v1/charges"]});
    let (key, _) = sidecar.mint("10.00", endpoints).await;
    assert_eq!(sidecar.charge(&key, "order-1", 100, "cus_1").await.status, 200);
    let off = sidecar.admin("GET", "/admin/kill_switch", None).await;
    assert_eq!((off.status, &off.body["on"]), (200, &json!(false)));
    let on = json!({"on": true, "reason": "a runaway flow"});
    let set = sidecar.admin("POST", "/admin/kill_switch", Some(&on)).await;
    assert_eq!((set.status, &set.body["on"], &set.body["reason"]), (200, &json!(true), &on["reason"]));
    let before = standin.requests().len();
    for restarted in [false, true] {
        if restarted {
            sidecar.kill();
            sidecar.restart().await;
        }
        let seen = standin.requests().len();
        for reply in [
            sidecar.charge(&key, "order-1", 100, "cus_1").await,
            sidecar.charge(&key, "order-2", 100, "cus_1").await,
            sidecar.call("GET", "/v1/charges", &key, &[], &[]).await,
        ] {
            assert_eq!(reply.verdict(), (403, "kill_switch"), "{}", reply.text);
            assert_eq!(reply.header("stripe-should-retry"), Some("false"));
        }
        assert_eq!(standin.requests().len(), seen, "nothing was sent");
    }
    let unreasoned = sidecar.admin("POST", "/admin/kill_switch", Some(&json!({"on": false}))).await;
    assert_eq!((unreasoned.status, &unreasoned.body["error"]["param"]), (400, &json!("reason")));
    let off = json!({"on": false, "reason": "mended"});
    assert_eq!(sidecar.admin("POST", "/admin/kill_switch", Some(&off)).await.status, 200);
    assert_eq!(sidecar.charge(&key, "order-1", 100, "cus_1").await.status, 200);
    assert_eq!(sidecar.charge(&key, "order-2", 100, "cus_1").await.status, 200);
    assert!(standin.requests().len() > before);
    let switched = sidecar.audit("event=kill_switch&events=all").await;
    let told: Vec<_> = switched.iter().map(|one| (&one["detail"]["on"], &one["detail"]["reason"])).collect();
    assert_eq!(told, [(&json!(true), &on["reason"]), (&json!(false), &off["reason"])]);
}

/// Whoever sends slowly was let in before the switch was thrown.
#[tokio::test]
async fn the_kill_switch_stops_what_is_still_arriving() {
    let (standin, sidecar) = world().await;
    let endpoints = json!({"allowed_endpoints": ["POST /v1/charges", "POST /v1/customers"]});
    let (key, _) = sidecar.mint("10.00", endpoints).await;
    let body = "description=x&amount=100&currency=usd&customer=cus_1&source=tok_visa";
    let mut slow = Vec::new();
    for path in ["/v1/charges", "/v1/customers"] {
        slow.push(head_of(&sidecar, &key, path, "order-1", body).await);
    }
    // Time for their heads to be read.
    assert_eq!(sidecar.charge(&key, "order-2", 100, "cus_1").await.status, 200);
    let on = json!({"on": true, "reason": "a runaway flow"});
    assert_eq!(sidecar.admin("POST", "/admin/kill_switch", Some(&on)).await.status, 200);
    let seen = standin.requests().len();
    for mut stream in slow {
        stream.write_all(body.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 403 ") && answer.contains("\"kill_switch\""), "{answer}");
    }
    assert_eq!(standin.requests().len(), seen, "nothing was sent");
}

#[tokio::test]
async fn a_revoked_key_opens_nothing_from_the_next_request_on() {
    let (standin, sidecar) = world().await;
    let sidecar = Arc::new(sidecar);
    let (key, id) = sidecar.mint("10.00", json!({})).await;
    assert_eq!(sidecar.charge(&key, "order-1", 100, "cus_1").await.status, 200);
    // One is on its way when the key is revoked: what has left is settled.
    standin.fault(Fault::HoldAfter.on(On::IdempotencyKey("order-2".into())));
    let under_way = {
        let (sidecar, key) = (Arc::clone(&sidecar), key.clone());
        tokio::spawn(async move { sidecar.charge(&key, "order-2", 100, "cus_1").await })
    };
    standin.until_held(1).await;
    let path = format!("/admin/vault_keys/{id}");
    let revoked = sidecar.admin("DELETE", &path, None).await;
    assert_eq!((revoked.status, &revoked.body["status"]), (200, &json!("revoked")), "{}", revoked.text);
    for name in ["order-1", "order-3"] {
        let refused = sidecar.charge(&key, name, 100, "cus_1").await;
        assert_eq!(refused.verdict(), (401, "vault_key_revoked"), "{}", refused.text);
    }
    let own = sidecar.call("GET", "/keybrake/key", &key, &[], &[]).await;
    assert_eq!(own.verdict(), (401, "vault_key_revoked"));
    standin.release();
    assert_eq!(under_way.await.unwrap().status, 200);
    assert_eq!(sidecar.spend(&id).await.0, "2.00");
    let again = sidecar.admin("DELETE", &path, None).await;
    assert_eq!((again.status, &again.body["revoked_at"]), (200, &revoked.body["revoked_at"]), "idempotent");
    assert_eq!(sidecar.audit("event=key_revoked&events=all").await.len(), 1);
    let unknown = format!("/admin/vault_keys/{}", "vk_id000000000000000000000000");
    assert_eq!(sidecar.admin("DELETE", &unknown, None).await.verdict(), (404, "not_found"));
    assert_eq!(standin.executed().len(), 2);
}

#[tokio::test]
async fn a_key_expires_by_itself() {
    let (standin, sidecar) = world().await;
    let (key, id) = sidecar.mint("10.00", json!({"expires_in_seconds": 1})).await;
    assert_eq!(sidecar.charge(&key, "order-1", 100, "cus_1").await.status, 200);
    let since = Instant::now();
    let expired = loop {
        let reply = sidecar.charge(&key, "order-1", 100, "cus_1").await;
        if reply.status != 200 {
            break reply;
        }
        assert!(since.elapsed() < PATIENCE, "it lives for ever");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    };
    assert_eq!(expired.verdict(), (401, "vault_key_expired"), "{}", expired.text);
    assert_eq!(sidecar.charge(&key, "order-2", 100, "cus_1").await.verdict(), (401, "vault_key_expired"));
    assert_eq!(sidecar.key(&id).await["status"], "expired");
    let listed = |status: &'static str| sidecar.list(status);
    assert_eq!(listed("/admin/vault_keys?status=expired").await.len(), 1);
    assert_eq!(listed("/admin/vault_keys?status=active").await.len(), 0);
    assert_eq!(standin.executed().len(), 1);
}
