//! What the stand-in itself must hold, over real sockets.

use std::collections::BTreeMap;
use std::io;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::bank::Kind;
use super::faults::{Fault, On, Scripted};
use super::intents::Settlement;
use super::stage::Play;
use super::{Options, Standin};

const DAY_SECONDS: u64 = 86_400;
const CHARGE: &str = "amount=2000&currency=USD&customer=cus_9&source=tok_visa";

#[derive(Debug)]
struct Answer {
    status: u16,
    headers: BTreeMap<String, String>,
    body: String,
}

impl Answer {
    fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap()
    }

    fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", String::as_str)
    }

    fn error(&self, field: &str) -> Value {
        self.json()["error"][field].clone()
    }

    fn id(&self) -> String {
        self.json()["id"].as_str().unwrap().to_owned()
    }
}

/// One request on a connection of its own, as raw text, so that what comes back is not smoothed by a client.
async fn raw(addr: std::net::SocketAddr, request: String) -> io::Result<Answer> {
    let mut stream = TcpStream::connect(addr).await?;
    stream.write_all(request.as_bytes()).await?;
    let mut text = String::new();
    stream.read_to_string(&mut text).await?;
    let (head, body) = text.split_once("\r\n\r\n").ok_or(io::ErrorKind::UnexpectedEof)?;
    let mut lines = head.split("\r\n");
    let status = lines.next().unwrap().split(' ').nth(1).unwrap().parse().unwrap();
    let pairs = lines.map(|line| line.split_once(": ").unwrap());
    let headers: BTreeMap<String, String> = pairs.map(|(name, value)| (name.into(), value.into())).collect();
    Ok(Answer { status, headers, body: body.to_owned() })
}

async fn send(standin: &Standin, line: &str, key: Option<&str>, body: &str) -> io::Result<Answer> {
    let keyed = key.map(|key| format!("Idempotency-Key: {key}\r\n")).unwrap_or_default();
    let request = format!(
        "{line} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer {}\r\n{keyed}\
         Content-Type: application/x-www-form-urlencoded\r\nContent-Length: {}\r\n\r\n{body}",
        Options::default().secret_keys[0],
        body.len()
    );
    raw(standin.addr(), request).await
}

async fn post(standin: &Standin, path: &str, key: &str, body: &str) -> Answer {
    send(standin, &format!("POST {path}"), Some(key), body).await.unwrap()
}

async fn get(standin: &Standin, path: &str) -> Answer {
    send(standin, &format!("GET {path}"), None, "").await.unwrap()
}

async fn control(standin: &Standin, line: &str, body: &Value) -> Answer {
    let body = body.to_string();
    let request = format!(
        "{line} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    raw(standin.addr(), request).await.unwrap()
}

fn standin() -> Standin {
    Standin::start(Options::default())
}

#[tokio::test]
async fn same_key_is_one_charge_and_a_replay() {
    let standin = standin();
    let first = post(&standin, "/v1/charges", "k1", CHARGE).await;
    let again =
        post(&standin, "/v1/charges", "k1", "source=tok_visa&customer=cus_9&currency=USD&amount=2000").await;
    assert_eq!((first.status, again.status), (200, 200));
    assert_eq!(first.body, again.body);
    assert_eq!(first.header("request-id"), first.header("original-request"));
    assert_eq!(first.header("idempotency-key"), "k1");
    assert_eq!(first.header("stripe-should-retry"), "false");
    assert_eq!(first.header("idempotent-replayed"), "");
    assert_eq!(again.header("idempotent-replayed"), "true");
    assert_eq!(again.header("original-request"), first.header("request-id"));
    assert_ne!(again.header("request-id"), first.header("request-id"));
    let executed = standin.executed();
    assert_eq!(executed.len(), 1);
    assert_eq!(
        (executed[0].kind, executed[0].amount, executed[0].currency.as_str()),
        (Kind::Charge, 2000, "usd")
    );
    assert_eq!(executed[0].idempotency_key.as_deref(), Some("k1"));
    assert_eq!(standin.requests().len(), 2);
    assert_eq!(standin.requests()[0].header("idempotency-key"), Some("k1"));
}

#[tokio::test]
async fn same_key_for_something_else_is_refused() {
    let standin = standin();
    post(&standin, "/v1/charges", "k1", CHARGE).await;
    let other = post(&standin, "/v1/charges", "k1", &CHARGE.replace("2000", "2001")).await;
    assert_eq!((other.status, other.error("type")), (400, json!("idempotency_error")));
    assert_eq!(
        other.error("message"),
        "Keys for idempotent requests can only be used with the same parameters they were first used with. Try using \
         a key other than 'k1' if you meant to execute a different request."
    );
    let elsewhere = post(&standin, "/v1/refunds", "k1", CHARGE).await;
    assert_eq!((elsewhere.status, elsewhere.error("type")), (400, json!("idempotency_error")));
    assert!(elsewhere.error("message").as_str().unwrap().contains("('/v1/refunds' vs '/v1/charges')"));
    assert_eq!(standin.executed().len(), 1);
}

#[tokio::test]
async fn a_key_in_flight_is_a_conflict_that_is_not_stored() {
    let standin = standin();
    standin.fault(Fault::Hold);
    let (first, ()) = tokio::join!(post(&standin, "/v1/charges", "k1", CHARGE), async {
        standin.until_held(1).await;
        let second = post(&standin, "/v1/charges", "k1", CHARGE).await;
        assert_eq!((second.status, second.error("code")), (409, json!("idempotency_key_in_use")));
        assert!(standin.executed().is_empty());
        standin.release();
    });
    assert_eq!(first.status, 200);
    assert_eq!(post(&standin, "/v1/charges", "k1", CHARGE).await.header("idempotent-replayed"), "true");
    assert_eq!(standin.executed().len(), 1);
}

#[tokio::test]
async fn keys_are_pruned_after_a_day() {
    let standin = standin();
    let first = post(&standin, "/v1/charges", "k1", CHARGE).await;
    standin.advance(DAY_SECONDS - 60);
    assert_eq!(post(&standin, "/v1/charges", "k1", CHARGE).await.id(), first.id());
    standin.advance(60);
    assert_ne!(post(&standin, "/v1/charges", "k1", CHARGE).await.id(), first.id());
    assert_eq!(standin.executed().len(), 2);
}

#[tokio::test]
async fn a_decline_is_stored_and_repeated() {
    let standin = standin();
    let body = "amount=2000&currency=usd&source=tok_chargeDeclined";
    let first = post(&standin, "/v1/charges", "k1", body).await;
    assert_eq!((first.status, first.error("decline_code")), (402, json!("generic_decline")));
    assert_eq!((first.error("code"), first.error("type")), (json!("card_declined"), json!("card_error")));
    let again = post(&standin, "/v1/charges", "k1", body).await;
    assert_eq!((again.status, again.header("idempotent-replayed")), (402, "true"));
    assert_eq!(first.body, again.body);
    let failed =
        get(&standin, &format!("/v1/charges/{}", first.error("charge").as_str().unwrap())).await.json();
    assert_eq!((&failed["status"], &failed["paid"]), (&json!("failed"), &json!(false)));
    assert!(standin.executed().is_empty());

    let intent = "amount=2000&currency=usd&confirm=true&payment_method=pm_card_visa_chargeDeclined";
    let refused = post(&standin, "/v1/payment_intents", "k2", intent).await;
    assert_eq!(refused.status, 402);
    assert_eq!(refused.error("payment_intent")["status"], "requires_payment_method");
    assert_eq!(refused.error("payment_intent")["latest_charge"], refused.error("charge"));
    assert_eq!(refused.error("payment_method")["id"], "pm_card_visa_chargeDeclined");
}

#[tokio::test]
async fn failed_validation_leaves_the_key_free() {
    let standin = standin();
    for (body, code, param) in [
        ("amount=49&currency=usd&source=tok_visa", "amount_too_small", "amount"),
        ("amount=2e3&currency=usd&source=tok_visa", "parameter_invalid_integer", "amount"),
        ("amount[]=2000&currency=usd&source=tok_visa", "parameter_invalid_integer", "amount"),
        ("amount=&currency=usd&source=tok_visa", "parameter_invalid_empty", "amount"),
        ("currency=usd&source=tok_visa", "parameter_missing", "amount"),
        ("amount=2000&source=tok_visa", "parameter_missing", "currency"),
        ("amount=2000&currency=usd&source=tok_visa&tip=5", "parameter_unknown", "tip"),
    ] {
        let answer = post(&standin, "/v1/charges", "k1", body).await;
        assert_eq!((answer.status, answer.error("code")), (400, json!(code)), "{body}");
        assert_eq!(answer.error("param"), param, "{body}");
    }
    assert_eq!(post(&standin, "/v1/charges", "k1", CHARGE).await.status, 200);
    let long = post(&standin, "/v1/charges", &"k".repeat(256), CHARGE).await;
    assert_eq!(long.status, 400);
    assert_eq!(standin.executed().len(), 1);
}

#[tokio::test]
async fn a_failure_of_the_execution_is_stored() {
    let standin = standin();
    let charge = post(&standin, "/v1/charges", "k1", CHARGE).await.id();
    let body = format!("charge={charge}&amount=2001");
    let refused = post(&standin, "/v1/refunds", "k2", &body).await;
    assert_eq!((refused.status, refused.header("idempotent-replayed")), (400, ""));
    let again = post(&standin, "/v1/refunds", "k2", &body).await;
    assert_eq!((again.status, again.header("idempotent-replayed")), (400, "true"));
}

#[tokio::test]
async fn a_lost_request_and_a_lost_answer_look_alike() {
    for (fault, moved) in
        [(Fault::DropBefore, 0), (Fault::DropAfter, 1), (Fault::Reset, 0), (Fault::ResetAfter, 1)]
    {
        let standin = standin();
        standin.fault(fault.clone());
        let lost = send(&standin, "POST /v1/charges", Some("k1"), CHARGE).await;
        let reset = matches!(fault, Fault::Reset | Fault::ResetAfter);
        let kind = if reset { io::ErrorKind::ConnectionReset } else { io::ErrorKind::UnexpectedEof };
        assert_eq!(lost.unwrap_err().kind(), kind, "{fault:?}");
        assert_eq!(standin.executed().len(), moved, "{fault:?}");
        assert_eq!(standin.requests().len(), 1, "{fault:?}");
        let again = post(&standin, "/v1/charges", "k1", CHARGE).await;
        assert_eq!(again.header("idempotent-replayed"), if moved == 1 { "true" } else { "" }, "{fault:?}");
        assert_eq!(standin.executed().len(), 1, "{fault:?}");
    }
}

#[tokio::test]
async fn a_server_error_is_stored_whatever_happened() {
    for (fault, status, moved) in
        [(Fault::Status500After, 500, 1), (Fault::Status500Before, 500, 0), (Fault::Status424, 424, 0)]
    {
        let standin = standin();
        standin.fault(fault.clone());
        let first = post(&standin, "/v1/charges", "k1", CHARGE).await;
        let again = post(&standin, "/v1/charges", "k1", CHARGE).await;
        assert_eq!((first.status, again.status), (status, status), "{fault:?}");
        assert_eq!(again.header("idempotent-replayed"), "true", "{fault:?}");
        assert_eq!(standin.executed().len(), moved, "{fault:?}");
    }
}

#[tokio::test]
async fn conflicts_and_limits_are_not_stored() {
    for (fault, status, code) in [
        (Fault::RateLimited, 429, "rate_limit"),
        (Fault::LockTimeout, 429, "lock_timeout"),
        (Fault::Conflict409, 409, "idempotency_key_in_use"),
    ] {
        let standin = standin();
        standin.fault(fault);
        let first = post(&standin, "/v1/charges", "k1", CHARGE).await;
        assert_eq!((first.status, first.error("code")), (status, json!(code)));
        let second = post(&standin, "/v1/charges", "k1", CHARGE).await;
        assert_eq!((second.status, second.header("idempotent-replayed")), (200, ""));
    }
}

#[tokio::test]
async fn a_scripted_decline_meets_whom_it_waits_for() {
    let standin = standin();
    standin.fault(Fault::Decline.on(On::Customer("cus_9".into())));
    standin.fault(Fault::Decline.on(On::IdempotencyKey("k3".into())));
    let other = post(&standin, "/v1/charges", "k1", "amount=2000&currency=usd&customer=cus_8").await;
    assert_eq!(other.status, 200);
    assert_eq!(post(&standin, "/v1/charges", "k2", CHARGE).await.status, 402);
    assert_eq!(post(&standin, "/v1/charges", "k3", CHARGE).await.status, 402);
    assert_eq!(post(&standin, "/v1/charges", "k4", CHARGE).await.status, 200);
}

#[tokio::test]
async fn slow_before_and_slow_after() {
    let standin = standin();
    let patience = std::time::Duration::from_millis(40);
    for (fault, moved) in [(Fault::SlowMs(200), 1), (Fault::SlowAfterMs(60_000), 2)] {
        standin.fault(fault);
        let key = format!("k{moved}");
        let early =
            tokio::time::timeout(patience, send(&standin, "POST /v1/charges", Some(&key), CHARGE)).await;
        assert!(early.is_err());
        // The caller has hung up; the execution goes on.
        while standin.executed().len() < moved {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
        assert_eq!(post(&standin, "/v1/charges", &key, CHARGE).await.header("idempotent-replayed"), "true");
    }
}

#[tokio::test]
async fn cut_and_unreadable_answers() {
    let standin = standin();
    standin.fault(Fault::HalfBody);
    let half = post(&standin, "/v1/charges", "k1", CHARGE).await;
    let announced: usize = half.header("content-length").parse().unwrap();
    assert_eq!((half.status, half.body.len()), (200, announced / 2));
    standin.fault(Fault::Garbage);
    let garbage = post(&standin, "/v1/charges", "k2", CHARGE).await;
    assert_eq!(garbage.status, 200);
    assert!(serde_json::from_str::<Value>(&garbage.body).is_err());
    assert_eq!(standin.executed().len(), 2);
}

#[tokio::test]
async fn an_answer_may_be_held_back() {
    let standin = standin();
    standin.fault(Fault::HoldAfter);
    let (held, ()) = tokio::join!(post(&standin, "/v1/charges", "k1", CHARGE), async {
        standin.until_held(1).await;
        assert_eq!(standin.executed().len(), 1);
        standin.release();
    });
    assert_eq!(held.status, 200);
}

#[tokio::test]
async fn a_literal_answer_executes_nothing() {
    let standin = standin();
    let headers = BTreeMap::from([("Retry-After".to_owned(), "3".to_owned())]);
    standin.fault(Scripted::from(Fault::Answer { status: 503, body: json!("busy"), headers }));
    let literal = post(&standin, "/v1/charges", "k1", CHARGE).await;
    assert_eq!((literal.status, literal.body.as_str(), literal.header("retry-after")), (503, "busy", "3"));
    assert!(standin.executed().is_empty());
    standin.fault(Fault::Answer { status: 502, body: json!({"a": 1}), headers: BTreeMap::new() }.times(2));
    for _ in 0..2 {
        assert_eq!(post(&standin, "/v1/charges", "k1", CHARGE).await.json(), json!({"a": 1}));
    }
    assert_eq!(post(&standin, "/v1/charges", "k1", CHARGE).await.status, 200);
}

#[tokio::test]
async fn an_intent_lives_through_its_states() {
    let standin = standin();
    let body = "amount=2000&currency=usd&capture_method=manual&metadata[line]=7";
    let made = post(&standin, "/v1/payment_intents", "k1", body).await;
    assert_eq!(made.json()["status"], "requires_payment_method");
    let path = format!("/v1/payment_intents/{}", made.id());
    let early = post(&standin, &format!("{path}/capture"), "k2", "").await;
    assert_eq!(early.error("code"), "payment_intent_unexpected_state");
    let stamped = post(&standin, &format!("{path}/confirm"), "k3", "metadata[a]=b").await;
    assert_eq!(stamped.error("code"), "parameter_unknown");
    let held = post(&standin, &format!("{path}/confirm"), "k3", "payment_method=pm_card_visa").await.json();
    assert_eq!((&held["status"], &held["amount_capturable"]), (&json!("requires_capture"), &json!(2000)));
    post(&standin, &format!("{path}/increment_authorization"), "k4", "amount=2500").await;
    let body = "amount_to_capture=2200&expand[]=latest_charge";
    let taken = post(&standin, &format!("{path}/capture"), "k5", body).await.json();
    assert_eq!((&taken["status"], &taken["amount_received"]), (&json!("succeeded"), &json!(2200)));
    assert_eq!(taken["latest_charge"]["amount_captured"], 2200);
    let body = format!("payment_intent={}", made.id());
    assert_eq!(post(&standin, "/v1/refunds", "k6", &body).await.json()["amount"], 2200);
    let kinds: Vec<(Kind, u64)> = standin.executed().iter().map(|entry| (entry.kind, entry.amount)).collect();
    let expected = [
        (Kind::Authorization, 2000),
        (Kind::Authorization, 500),
        (Kind::Capture, 2200),
        (Kind::Refund, 2200),
    ];
    assert_eq!(kinds, expected);
    assert_eq!(standin.executed()[2].metadata["line"], "7");
    let late = post(&standin, &format!("{path}/cancel"), "k7", "").await;
    assert_eq!((late.status, late.error("code")), (400, json!("payment_intent_unexpected_state")));
}

#[tokio::test]
async fn intents_wait_for_payers_and_banks() {
    let standin = standin();
    let make = async |key: &str, method: &str| {
        let body = format!("amount=2000&currency=usd&confirm=true&payment_method={method}");
        post(&standin, "/v1/payment_intents", key, &body).await
    };
    let action = make("k1", "pm_card_authenticationRequired").await;
    assert_eq!(action.json()["status"], "requires_action");
    assert_eq!(action.json()["next_action"]["type"], "use_stripe_sdk");
    let slow = make("k2", "pm_usBankAccount_processing").await;
    let lost = make("k3", "pm_usBankAccount_processing").await;
    assert_eq!(slow.json()["status"], "processing");
    assert!(standin.executed().is_empty());
    standin.settle(&action.id(), Settlement::Succeeded).unwrap();
    standin.settle(&slow.id(), Settlement::Succeeded).unwrap();
    standin.settle(&lost.id(), Settlement::Failed).unwrap();
    assert!(standin.settle(&slow.id(), Settlement::Canceled).is_err());
    let status =
        async |id: String| get(&standin, &format!("/v1/payment_intents/{id}")).await.json()["status"].clone();
    assert_eq!(status(slow.id()).await, "succeeded");
    assert_eq!(status(lost.id()).await, "requires_payment_method");
    let keys: Vec<_> = standin.executed().into_iter().map(|entry| entry.idempotency_key.unwrap()).collect();
    assert_eq!(keys, ["k1", "k2"]);
}

#[tokio::test]
async fn a_charge_can_be_captured_later() {
    let standin = standin();
    let held = post(&standin, "/v1/charges", "k1", &format!("{CHARGE}&capture=false")).await;
    assert_eq!((&held.json()["captured"], &held.json()["paid"]), (&json!(false), &json!(true)));
    let path = format!("/v1/charges/{}/capture", held.id());
    let taken = post(&standin, &path, "k2", "amount=500").await.json();
    assert_eq!((&taken["amount_captured"], &taken["amount_refunded"]), (&json!(500), &json!(1500)));
    assert_eq!(post(&standin, &path, "k3", "").await.error("code"), "charge_already_captured");
    let kinds: Vec<Kind> = standin.executed().iter().map(|entry| entry.kind).collect();
    assert_eq!(kinds, [Kind::Authorization, Kind::Capture]);
}

#[tokio::test]
async fn lists_are_filtered_and_paged() {
    let standin = standin();
    for index in 0..5 {
        let body = format!("amount={}&currency=usd&customer=cus_{}", 1000 + index, index % 2);
        post(&standin, "/v1/charges", &format!("k{index}"), &body).await;
    }
    let amounts = |answer: &Answer| -> Vec<u64> {
        let json = answer.json();
        json["data"].as_array().unwrap().iter().map(|one| one["amount"].as_u64().unwrap()).collect()
    };
    let page = get(&standin, "/v1/charges?limit=2&customer=cus_0").await;
    assert_eq!((amounts(&page), &page.json()["has_more"]), (vec![1004, 1002], &json!(true)));
    let last = page.json()["data"][1]["id"].as_str().unwrap().to_owned();
    let rest = get(&standin, &format!("/v1/charges?limit=2&customer=cus_0&starting_after={last}")).await;
    assert_eq!((amounts(&rest), &rest.json()["has_more"]), (vec![1000], &json!(false)));
    let before = get(&standin, &format!("/v1/charges?limit=1&ending_before={last}")).await;
    assert_eq!((amounts(&before), &before.json()["has_more"]), (vec![1003], &json!(true)));
    let from = page.json()["data"][0]["created"].as_u64().unwrap() + 3600;
    assert!(amounts(&get(&standin, &format!("/v1/charges?created[gte]={from}")).await).is_empty());
    assert_eq!(amounts(&get(&standin, &format!("/v1/charges?created[lt]={from}")).await).len(), 5);
}

#[tokio::test]
async fn query_and_body_are_one_bucket() {
    let standin = standin();
    let line = "/v1/charges?amount=7000&description=from+the%20query";
    let body = "amount=60&amount=70&currency=usd&source=tok_visa&metadata%5Ba%5D=1&metadata[a]=2";
    let charge = post(&standin, line, "k1", body).await.json();
    assert_eq!(charge["amount"], 70);
    assert_eq!(charge["description"], "from the query");
    assert_eq!(charge["metadata"], json!({"a": "2"}));
    let clash = post(&standin, "/v1/charges", "k2", &format!("{body}&amount[x]=1")).await;
    assert_eq!(clash.status, 400);
}

#[tokio::test]
async fn keys_of_the_account_and_addresses() {
    let options = Options {
        secret_keys: vec!["sk_test_old".into(), "sk_test_new".into()],
        restricted: true,
        connected: vec!["acct_other".into()],
        livemode: true,
        ..Options::default()
    };
    let standin = Standin::start(options);
    assert!(standin.base_url().starts_with("http://127.0.0.1:"));
    let ask = async |path: &str, headers: &str| {
        let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{headers}\r\n");
        raw(standin.addr(), request).await.unwrap()
    };
    assert_eq!(ask("/v1/balance", "").await.status, 401);
    assert_eq!(ask("/v1/balance", "Authorization: Bearer sk_test_wrong\r\n").await.status, 401);
    assert_eq!(ask("/v1/balance", "Authorization: Bearer sk_test_old\r\n").await.json()["livemode"], true);
    // sk_test_new and an empty password.
    let basic = "Authorization: Basic c2tfdGVzdF9uZXc6\r\n";
    assert_eq!(ask("/v1/balance", basic).await.status, 200);
    let account = ask("/v1/account", basic).await;
    assert_eq!(account.status, 403);
    assert!(account.error("message").as_str().unwrap().contains("on account 'acct_standin0000001'"));
    let unknown = ask("/v1/topups/", basic).await;
    assert_eq!(unknown.status, 404);
    let message = unknown.error("message");
    assert!(message.as_str().unwrap().starts_with("Unrecognized request URL (GET: /v1/topups/). If you are"));
    assert_eq!(ask("/v1/charges", &format!("{basic}Stripe-Account: acct_other\r\n")).await.status, 200);
    assert_eq!(ask("/v1/charges", &format!("{basic}Stripe-Account: acct_foreign\r\n")).await.status, 403);
    standin.set_secret_keys(vec!["sk_test_newest".into()]);
    assert_eq!(ask("/v1/balance", basic).await.status, 401);
}

#[tokio::test]
async fn chunks_are_read_and_json_is_refused() {
    let standin = standin();
    let key = &Options::default().secret_keys[0];
    let head = format!(
        "POST /v1/charges HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer {key}\r\n"
    );
    let chunked = format!(
        "{head}Content-Type: application/x-www-form-urlencoded\r\nTransfer-Encoding: chunked\r\n\r\n{:x}\r\n{CHARGE}\r\n\
         0\r\n\r\n",
        CHARGE.len()
    );
    assert_eq!(raw(standin.addr(), chunked).await.unwrap().status, 200);
    let json = format!("{head}Content-Type: application/json\r\nContent-Length: 2\r\n\r\n{{}}");
    let refused = raw(standin.addr(), json).await.unwrap();
    assert_eq!(refused.status, 400);
    assert!(refused.error("message").as_str().unwrap().contains("unsupported Content-Type application/json"));
}

#[tokio::test]
async fn another_process_can_do_the_same() {
    let standin = standin();
    let script = json!([
        {"fault": "drop_before", "on": {"path": {"method": "POST", "prefix": "/v1/refunds"}}},
        {"fault": {"slow_ms": 1}, "on": "any"},
        {"fault": {"answer": {"status": 503}}, "on": {"idempotency_key": "k9"}, "count": 2},
    ]);
    assert_eq!(control(&standin, "POST /_standin/faults", &script).await.json()["faults"], 3);
    let unknown = json!({"fault": "drop_before", "often": true});
    assert_eq!(control(&standin, "POST /_standin/faults", &unknown).await.status, 400);
    assert!(send(&standin, "POST /v1/refunds", None, "charge=ch_1").await.is_err());
    let body = "amount=2000&currency=usd&confirm=true&payment_method=pm_usBankAccount_processing";
    let intent = post(&standin, "/v1/payment_intents", "k1", body).await.id();
    assert_eq!(post(&standin, "/v1/charges", "k9", CHARGE).await.status, 503);
    let settled = json!({"id": intent, "status": "succeeded"});
    assert_eq!(control(&standin, "POST /_standin/settle", &settled).await.status, 200);
    let none = json!(null);
    let executed = control(&standin, "GET /_standin/executed", &none).await.json();
    assert_eq!(executed["data"][0]["kind"], "charge");
    assert_eq!(executed["data"][0]["operation"], "settle");
    let requests = control(&standin, "GET /_standin/requests?since=2", &none).await.json();
    assert_eq!(requests["data"].as_array().unwrap().len(), 1);
    assert_eq!(requests["data"][0]["body"], CHARGE);
    control(&standin, "POST /_standin/advance", &json!({"seconds": 5})).await;
    control(&standin, "POST /_standin/release", &none).await;
    control(&standin, "POST /_standin/secret_keys", &json!({"secret_keys": ["sk_test_x"]})).await;
    assert_eq!(get(&standin, "/v1/balance").await.status, 401);
    let state = control(&standin, "POST /_standin/reset", &none).await.json();
    assert_eq!((&state["executed"], &state["requests"], &state["faults"]), (&json!(0), &json!(0), &json!(0)));
    standin.reset();
    assert_eq!(control(&standin, "GET /_standin/nothing", &none).await.status, 404);
}

#[tokio::test]
async fn many_callers_at_once_lose_nothing() {
    let standin = std::sync::Arc::new(standin());
    let mut callers = tokio::task::JoinSet::new();
    for caller in 0..8 {
        let standin = std::sync::Arc::clone(&standin);
        callers.spawn(async move {
            for index in 0..50 {
                post(&standin, "/v1/charges", &format!("k{caller}-{index}"), CHARGE).await;
            }
        });
    }
    while callers.join_next().await.is_some() {}
    assert_eq!(standin.executed().len(), 400);
}

#[tokio::test]
async fn a_play_is_kept_stored_and_broken_as_the_rest() {
    let standin = standin();
    let invoice = |status: &str| json!({"id": "in_1", "object": "invoice", "status": status});
    let (path, record) = ("/v1/invoices/in_1/pay", "/v1/invoices/in_1");
    assert_eq!(post(&standin, path, "k1", "").await.status, 404);
    standin.play(Play {
        path: path.to_owned(),
        record: record.to_owned(),
        before: invoice("open"),
        after: invoice("paid"),
        amount: 2_000,
    });
    assert_eq!(get(&standin, record).await.json(), invoice("open"));
    for (fault, status) in [(Fault::Decline, 402), (Fault::Status500Before, 500)] {
        standin.fault(fault.on(On::Any));
        assert_eq!(post(&standin, path, &status.to_string(), "").await.status, status);
    }
    assert_eq!((get(&standin, record).await.json(), standin.executed().len()), (invoice("open"), 0));
    standin.fault(Fault::DropAfter.on(On::Any));
    let form = "metadata[keybrake_call]=s";
    assert!(send(&standin, &format!("POST {path}"), Some("k1"), form).await.is_err());
    let again = post(&standin, path, "k1", form).await;
    assert_eq!((again.status, again.header("idempotent-replayed")), (200, "true"), "{}", again.body);
    let paid = get(&standin, record).await.json();
    assert_eq!((&paid["status"], &paid["metadata"]["keybrake_call"]), (&json!("paid"), &json!("s")));
    assert_eq!(get(&standin, "/v1/invoices?customer=cus_9").await.json()["data"], json!([paid]));
    let executed = standin.executed();
    assert_eq!((executed.len(), executed[0].amount, executed[0].object_id.as_str()), (1, 2_000, "in_1"));
}
