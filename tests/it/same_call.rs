//! What counts as the same call, over HTTP: one execution, however often, under whatever key and whenever it is asked.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::task::JoinSet;

use crate::standin::Standin;
use crate::standin::bank::Kind;
use crate::standin::faults::{Fault, On};
use crate::support::{Reply, Sidecar, head_of, world, world_with};

/// A UUID as SDKs make one up for each call.
fn random_key(n: u32) -> String {
    format!("{n:08x}-0b9f-4b0e-9c2a-2f6f{n:08x}")
}

fn content(scope: &str) -> Value {
    json!({"idempotency": "content", "idempotency_scope": scope})
}

fn intents() -> Value {
    json!({"allowed_endpoints": ["POST /v1/payment_intents", "GET /v1/payment_intents/{id}"]})
}

/// The keys that Stripe saw, in order, of requests that move money.
fn upstream_keys(standin: &Standin) -> Vec<String> {
    let posts = standin.requests().into_iter().filter(|seen| seen.method == "POST");
    posts.map(|seen| seen.header("idempotency-key").unwrap_or("none").to_owned()).collect()
}

fn is_replay(reply: &Reply) -> bool {
    reply.header("idempotent-replayed") == Some("true")
}

async fn all_at_once(sidecar: &Arc<Sidecar>, keys: Vec<String>) -> Vec<Reply> {
    let mut calls = JoinSet::new();
    for key in keys {
        let sidecar = Arc::clone(sidecar);
        calls.spawn(async move { sidecar.charge(&key, "invoice-1", 2999, "cus_9").await });
    }
    calls.join_all().await
}

/// One execution, equal answers, and all but one say that they are replays of the same original.
fn one_of(replies: &[Reply]) {
    let distinct: BTreeSet<_> = replies.iter().map(|reply| (reply.status, &reply.text)).collect();
    assert_eq!(distinct.len(), 1, "{distinct:?}");
    assert_eq!(replies[0].status, 200, "{}", replies[0].text);
    let (replays, leaders): (Vec<_>, Vec<_>) = replies.iter().partition(|reply| is_replay(reply));
    assert_eq!(leaders.len(), 1);
    let original = leaders[0].header("request-id");
    assert!(replays.iter().all(|reply| reply.header("original-request") == original));
    assert!(replays.iter().all(|reply| reply.header("keybrake-replayed-from").is_some()));
    let ids: BTreeSet<_> = replies.iter().map(|reply| reply.header("request-id")).collect();
    assert_eq!(ids.len(), replies.len(), "every caller has a Request-Id of its own");
}

#[tokio::test]
async fn two_hundred_equal_calls_at_once_are_one_execution() {
    let (standin, sidecar) = world().await;
    let sidecar = Arc::new(sidecar);
    let (key, id) = sidecar.mint("32.99", json!({})).await;
    standin.fault(Fault::Hold);
    let calls = {
        let (sidecar, key) = (Arc::clone(&sidecar), key.clone());
        tokio::spawn(async move { all_at_once(&sidecar, vec![key; 200]).await })
    };
    standin.until_held(1).await;
    standin.release();
    one_of(&calls.await.unwrap());
    assert_eq!((standin.executed().len(), upstream_keys(&standin).len()), (1, 1));
    assert_eq!(sidecar.spend(&id).await, ("29.99".into(), "0.00".into(), "0.00".into()));
    let events = sidecar.audit("events=all").await;
    let count = |names: &[&str]| {
        events.iter().filter(|event| names.contains(&event["event"].as_str().unwrap())).count()
    };
    assert_eq!((count(&["admitted"]), count(&["settled"]), count(&["joined", "replayed"])), (1, 1, 199));
}

#[tokio::test]
async fn two_hundred_vault_keys_share_one_execution() {
    let (standin, sidecar) = world().await;
    let sidecar = Arc::new(sidecar);
    let mut mints = JoinSet::new();
    for _ in 0..200 {
        let sidecar = Arc::clone(&sidecar);
        mints.spawn(async move { sidecar.mint("32.99", json!({})).await.0 });
    }
    let keys = mints.join_all().await;
    one_of(&all_at_once(&sidecar, keys).await);
    assert_eq!((standin.executed().len(), upstream_keys(&standin).len()), (1, 1));
}

/// Those who wait for a replay are told of the execution, not of the request that they happened to wait for.
#[tokio::test]
async fn replays_at_once_name_the_execution() {
    let (standin, sidecar) = world().await;
    let sidecar = Arc::new(sidecar);
    let (key, _) = sidecar.mint("32.99", json!({})).await;
    let first = sidecar.charge(&key, "invoice-1", 2999, "cus_9").await;
    let again = all_at_once(&sidecar, vec![key; 100]).await;
    let told: BTreeSet<_> = again
        .iter()
        .map(|reply| (reply.header("original-request"), reply.header("keybrake-replayed-from")))
        .collect();
    assert_eq!(told.len(), 1, "{told:?}");
    assert!(again.iter().all(|reply| is_replay(reply) && reply.text == first.text));
    assert_eq!(again[0].header("original-request"), first.header("request-id"));
    assert_eq!(standin.executed().len(), 1);
}

#[tokio::test]
async fn a_new_vault_key_and_a_restart_replay() {
    let (standin, mut sidecar) = world().await;
    let (first_key, first_id) = sidecar.mint("32.99", json!({})).await;
    let first = sidecar.charge(&first_key, "cus_9:2026-07", 2999, "cus_9").await;
    assert_eq!(first.status, 200, "{}", first.text);
    let (second_key, second_id) = sidecar.mint("32.99", json!({"idempotency": "client"})).await;
    let second = sidecar.charge(&second_key, "cus_9:2026-07", 2999, "cus_9").await;
    sidecar.kill();
    sidecar.restart().await;
    let third = sidecar.charge(&first_key, "cus_9:2026-07", 2999, "cus_9").await;
    let (small_key, _) = sidecar.mint("1.00", json!({})).await;
    let fourth = sidecar.charge(&small_key, "cus_9:2026-07", 2999, "cus_9").await;
    for reply in [&second, &third, &fourth] {
        assert_eq!((reply.status, &reply.text, is_replay(reply)), (200, &first.text, true), "{}", reply.text);
        assert_eq!(reply.header("original-request"), first.header("request-id"));
        assert_ne!(reply.header("request-id"), first.header("request-id"));
    }
    assert_eq!(upstream_keys(&standin), ["cus_9:2026-07"]);
    assert_eq!(sidecar.spend(&first_id).await.0, "29.99");
    assert_eq!(sidecar.spend(&second_id).await.0, "0.00", "a replay is not counted");
}

#[tokio::test]
async fn other_parameters_under_a_callers_key_are_named() {
    let (standin, sidecar) = world().await;
    let endpoints = json!({"allowed_endpoints": ["POST /v1/charges", "POST /v1/payment_intents"]});
    let (key, _) = sidecar.mint("100.00", endpoints).await;
    let first = sidecar.charge(&key, "order-1", 2999, "cus_9").await;
    assert_eq!(first.status, 200, "{}", first.text);
    let usual = [("amount", "2999"), ("currency", "usd"), ("customer", "cus_9"), ("source", "tok_visa")];
    let mut more = usual.to_vec();
    more.push(("metadata[line]", "7"));
    for (path, form, param) in [
        ("/v1/charges", vec![("amount", "3000"), usual[1], usual[2], usual[3]], "amount"),
        ("/v1/charges", vec![usual[0], usual[1], ("customer", "cus_8"), usual[3]], "customer"),
        ("/v1/charges", usual[..3].to_vec(), "source"),
        ("/v1/charges", more, "metadata[line]"),
        ("/v1/payment_intents", usual[..3].to_vec(), "endpoint"),
    ] {
        let reply = sidecar.post(&key, path, "order-1", &form).await;
        assert_eq!(reply.verdict(), (400, "idempotency_error"), "{param}: {}", reply.text);
        assert_eq!(reply.body["error"]["type"], "idempotency_error");
        assert_eq!(reply.body["error"]["param"], param);
        assert!(reply.body["error"]["message"].as_str().unwrap().contains(param), "{}", reply.text);
        assert!(!reply.text.contains("cus_8"), "no value is echoed");
        assert_eq!(reply.header("stripe-should-retry"), Some("false"));
    }
    assert_eq!(upstream_keys(&standin), ["order-1"]);
}

#[tokio::test]
async fn keys_that_sdks_make_up_are_refused_in_required_mode_only() {
    let (standin, sidecar) = world().await;
    let (required, id) = sidecar.mint("100.00", json!({})).await;
    let (client, _) = sidecar.mint("100.00", json!({"idempotency": "client"})).await;
    let made_up = [
        random_key(1),
        random_key(2).to_uppercase(),
        format!("stripe-node-retry-{}", random_key(3)),
        "1763945123456789012_aB3-_z".to_owned(),
    ];
    for key in &made_up {
        let refused = sidecar.charge(&required, key, 100, "cus_1").await;
        assert_eq!(refused.verdict(), (400, "idempotency_key_required"), "{key}");
        let message = refused.body["error"]["message"].as_str().unwrap();
        assert!(message.contains("idempotency key of your own"), "{message}");
        assert!(message.contains("\"idempotency\": \"content\""), "{message}");
        assert!(!message.contains(key), "no value is echoed");
    }
    let form = [("amount", "100"), ("currency", "usd"), ("customer", "cus_1")];
    for headers in [&[][..], &[("idempotency-key", "")]] {
        let refused = sidecar.call("POST", "/v1/charges", &required, headers, &form).await;
        assert_eq!(refused.verdict(), (400, "idempotency_key_required"), "{}", refused.text);
    }
    assert_eq!(standin.requests().iter().filter(|seen| seen.method == "POST").count(), 0);
    assert_eq!(sidecar.spend(&id).await, ("0.00".into(), "0.00".into(), "0.00".into()));
    for key in &made_up {
        let made = sidecar.charge(&client, key, 100, "cus_1").await;
        assert_eq!(made.status, 200, "{}", made.text);
        assert!(is_replay(&sidecar.charge(&client, key, 100, "cus_1").await));
    }
    assert_eq!(upstream_keys(&standin), made_up, "byte for byte");
}

#[tokio::test]
async fn an_unchanged_script_with_random_keys_charges_once_in_content_mode() {
    let (standin, sidecar) = world().await;
    let mut bodies: Vec<BTreeSet<String>> = vec![BTreeSet::new(); 3];
    for run in 0..4 {
        let (key, _) = sidecar.mint("100.00", content("billing:2026-07")).await;
        for (item, seen) in bodies.iter_mut().enumerate() {
            let random = random_key(run * 10 + u32::try_from(item).unwrap());
            let reply = sidecar.charge(&key, &random, 1000, &format!("cus_{item}")).await;
            assert_eq!((reply.status, is_replay(&reply)), (200, run > 0), "{}", reply.text);
            seen.insert(reply.text);
        }
    }
    assert!(bodies.iter().all(|seen| seen.len() == 1), "every run reads the same charges");
    let keys = upstream_keys(&standin);
    assert_eq!((standin.executed().len(), keys.len()), (3, 3));
    assert!(keys.iter().all(|key| key.starts_with("kb1_") && key.len() == 4 + 43), "{keys:?}");
    assert_eq!(keys.iter().collect::<BTreeSet<_>>().len(), 3);
    let (next, _) = sidecar.mint("100.00", content("billing:2026-08")).await;
    let august = sidecar.charge(&next, &random_key(99), 1000, "cus_0").await;
    assert_eq!((august.status, is_replay(&august)), (200, false), "another scope is another call");
}

/// Two sidecars that know nothing of each other agree on the key that Stripe sees.
#[tokio::test]
async fn a_content_key_outlives_its_ledger() {
    let (standin, sidecar) = world().await;
    let (key, _) = sidecar.mint("100.00", content("billing:2026-07")).await;
    let first = sidecar.charge(&key, &random_key(1), 1000, "cus_1").await;
    let address = format!("http://{}", standin.addr());
    let (_unused, other) = world_with(&[("STRIPE_API_BASE", &address)]).await;
    let (key, id) = other.mint("100.00", content("billing:2026-07")).await;
    let second = other.charge(&key, &random_key(2), 1000, "cus_1").await;
    assert_eq!((second.status, &second.text, is_replay(&second)), (200, &first.text, true));
    assert_eq!(standin.executed().len(), 1);
    assert_eq!(
        other.spend(&id).await.0,
        "10.00",
        "what was executed is counted, also when Stripe replays it"
    );
}

#[tokio::test]
async fn the_identity_of_a_content_call() {
    let (standin, sidecar) = world().await;
    let (key, _) = sidecar.mint("100.00", content("s")).await;
    let post = |form: Vec<(&'static str, &'static str)>| {
        let (sidecar, key) = (&sidecar, &key);
        async move { sidecar.call("POST", "/v1/charges", key, &[], &form).await }
    };
    let with = |name, value| vec![("amount", "500"), ("currency", "usd"), (name, value)];
    assert_eq!(post(with("customer", "cus_1")).await.status, 200);
    // The payer is the customer; only without one is it the source.
    let other_source =
        post(vec![("amount", "500"), ("currency", "usd"), ("customer", "cus_1"), ("source", "tok_visa")]);
    let other_source = other_source.await;
    assert_eq!(other_source.verdict(), (400, "idempotency_error"), "{}", other_source.text);
    assert_eq!(other_source.body["error"]["param"], "source");
    assert_eq!(post(with("source", "tok_visa")).await.status, 200);
    assert!(is_replay(&post(with("source", "tok_visa")).await));
    let amount = post(vec![("amount", "501"), ("currency", "usd"), ("customer", "cus_1")]).await;
    assert_eq!(amount.verdict(), (400, "idempotency_error"), "the amount is no identity");
    assert_eq!(amount.body["error"]["param"], "amount");
    for form in [with("description", "x"), with("customer", "")] {
        let nobody = post(form).await;
        assert_eq!(nobody.verdict(), (400, "parameter_invalid"), "{}", nobody.text);
        assert_eq!(nobody.body["error"]["param"], "customer");
    }
    assert_eq!(standin.executed().len(), 2);
}

#[tokio::test]
async fn several_charges_of_one_customer_name_what_tells_them_apart() {
    let (standin, sidecar) = world().await;
    let mut policy = content("billing:2026-07");
    policy["idempotency_fields"] = json!(["customer", "metadata[line_id]"]);
    let (key, _) = sidecar.mint("100.00", policy).await;
    let base = [("amount", "500"), ("currency", "usd"), ("customer", "cus_1"), ("source", "tok_visa")];
    let charge = |line: Option<&'static str>| {
        let (sidecar, key) = (&sidecar, &key);
        let mut form = base.to_vec();
        form.extend(line.map(|line| ("metadata[line_id]", line)));
        async move { sidecar.call("POST", "/v1/charges", key, &[], &form).await }
    };
    assert!(!is_replay(&charge(Some("a")).await));
    assert!(!is_replay(&charge(Some("b")).await));
    assert!(is_replay(&charge(Some("a")).await));
    for line in [None, Some("")] {
        let reply = charge(line).await;
        assert_eq!(reply.verdict(), (400, "parameter_invalid"), "{}", reply.text);
        assert_eq!(reply.body["error"]["param"], "metadata[line_id]");
    }
    assert_eq!(standin.executed().len(), 2);
}

#[tokio::test]
async fn a_declined_content_call_is_tried_anew_with_another_card() {
    let (standin, sidecar) = world().await;
    let (key, id) = sidecar.mint("100.00", content("billing:2026-07")).await;
    let charge = |source: &'static str| {
        let form = [("amount", "500"), ("currency", "usd"), ("customer", "cus_1"), ("source", source)];
        let (sidecar, key) = (&sidecar, &key);
        async move { sidecar.call("POST", "/v1/charges", key, &[], &form).await }
    };
    let declined = charge("tok_chargeDeclined").await;
    assert_eq!(declined.verdict(), (402, "card_declined"), "{}", declined.text);
    let same = charge("tok_chargeDeclined").await;
    assert_eq!(same.verdict(), (402, "card_declined"));
    assert_eq!(sidecar.spend(&id).await, ("0.00".into(), "0.00".into(), "0.00".into()));
    let paid = charge("tok_visa").await;
    assert_eq!((paid.status, is_replay(&paid)), (200, false), "{}", paid.text);
    let keys = upstream_keys(&standin);
    assert_eq!(keys[0], keys[1], "the same parameters are the same attempt");
    assert_ne!(keys[1], keys[2], "another card is the next attempt");
    let calls = sidecar.list("/admin/calls?customer=cus_1").await;
    assert_eq!(calls.len(), 1, "declined and made again is one call");
    let attempts: Vec<_> = calls[0]["attempts"]
        .as_array()
        .unwrap()
        .iter()
        .map(|attempt| (attempt["n"].as_u64(), attempt["end"].as_str(), attempt["upstream_key"].as_str()))
        .collect();
    let expected = [(Some(1), Some("declined"), Some(&*keys[0])), (Some(2), Some("spent"), Some(&*keys[2]))];
    assert_eq!(attempts, expected);
    assert_eq!(calls[0]["state"], "spent");
    assert!(is_replay(&charge("tok_visa").await));
    assert_eq!(standin.executed().len(), 1);
    assert_eq!(sidecar.spend(&id).await.0, "5.00");
}

#[tokio::test]
async fn a_refused_content_call_is_tried_anew_when_it_is_mended() {
    let (standin, sidecar) = world().await;
    let (key, id) = sidecar.mint("100.00", content("billing:2026-07")).await;
    let small = sidecar.charge(&key, &random_key(1), 10, "cus_1").await;
    assert_eq!(small.verdict(), (400, "amount_too_small"), "{}", small.text);
    assert_eq!(sidecar.list("/admin/calls?customer=cus_1").await[0]["state"], "refused");
    let paid = sidecar.charge(&key, &random_key(2), 1000, "cus_1").await;
    assert_eq!(paid.status, 200, "{}", paid.text);
    let keys = upstream_keys(&standin);
    assert_ne!(keys[0], keys[1], "the next attempt");
    assert_eq!((standin.executed().len(), sidecar.spend(&id).await.0), (1, "10.00".into()));
}

/// What Stripe forgot to be open is forgotten here: the same content may be charged again.
#[tokio::test]
async fn a_canceled_intent_can_be_made_again_in_content_mode() {
    let (standin, sidecar) = world().await;
    let mut policy = content("billing:2026-07");
    policy["allowed_endpoints"] = json!([
        "POST /v1/payment_intents",
        "POST /v1/payment_intents/{id}/confirm",
        "POST /v1/payment_intents/{id}/cancel",
    ]);
    let (key, id) = sidecar.mint("10.00", policy).await;
    let create = [("amount", "1000"), ("currency", "usd"), ("customer", "cus_1")];
    // Canceled while it is open, then canceled after a decline: made anew both times.
    for decline in [false, true] {
        let made = sidecar.call("POST", "/v1/payment_intents", &key, &[], &create).await;
        assert_eq!((made.status, is_replay(&made)), (200, false), "{}", made.text);
        let intent = made.body["id"].as_str().unwrap().to_owned();
        if decline {
            let form = [("payment_method", "pm_card_visa_chargeDeclined")];
            let path = format!("/v1/payment_intents/{intent}/confirm");
            let declined = sidecar.call("POST", &path, &key, &[], &form).await;
            assert_eq!(declined.status, 402, "{}", declined.text);
        }
        let path = format!("/v1/payment_intents/{intent}/cancel");
        let canceled = sidecar.call("POST", &path, &key, &[], &[]).await;
        assert_eq!((canceled.status, canceled.body["status"].as_str()), (200, Some("canceled")));
        assert_eq!(sidecar.spend(&id).await, ("0.00".into(), "0.00".into(), "0.00".into()));
    }
    let third = sidecar.call("POST", "/v1/payment_intents", &key, &[], &create).await;
    assert_eq!((third.status, is_replay(&third)), (200, false), "{}", third.text);
    let creates: BTreeSet<_> = standin
        .requests()
        .into_iter()
        .filter(|seen| seen.method == "POST" && seen.path == "/v1/payment_intents")
        .map(|seen| seen.header("idempotency-key").unwrap().to_owned())
        .collect();
    assert_eq!(creates.len(), 3, "each is an attempt of its own");
}

/// We store no 402: the next call is judged, reserved and sent anew. Stripe repeats its own for a day.
#[tokio::test]
async fn a_declined_call_under_a_callers_key_is_made_anew() {
    let (standin, mut sidecar) = world().await;
    let (key, id) = sidecar.mint("20.00", json!({})).await;
    let card = |source| [("amount", "2000"), ("currency", "usd"), ("customer", "cus_1"), ("source", source)];
    let declined = card("tok_chargeDeclined");
    let first = sidecar.post(&key, "/v1/charges", "order-1", &declined).await;
    assert_eq!((first.verdict(), is_replay(&first)), ((402, "card_declined"), false), "{}", first.text);
    let second = sidecar.post(&key, "/v1/charges", "order-1", &declined).await;
    sidecar.kill();
    sidecar.restart().await;
    let third = sidecar.post(&key, "/v1/charges", "order-1", &declined).await;
    for again in [second, third] {
        assert_eq!((again.status, &again.text), (402, &first.text));
        assert!(is_replay(&again), "this is Stripe's own replay");
        assert_eq!(again.header("keybrake-replayed-from"), None, "and none of ours");
    }
    let other = sidecar.post(&key, "/v1/charges", "order-1", &card("tok_visa")).await;
    assert_eq!(other.verdict(), (400, "idempotency_error"), "a new card wants a new key");
    assert_eq!(other.body["error"]["param"], "source");
    assert_eq!(upstream_keys(&standin), ["order-1"; 3]);
    let calls = sidecar.list("/admin/calls?idempotency_key=order-1").await;
    let ends: Vec<_> = calls[0]["attempts"].as_array().unwrap().iter().map(|one| &one["end"]).collect();
    assert_eq!((calls.len(), &calls[0]["state"]), (1, &json!("declined")));
    assert_eq!(ends, ["declined"; 3]);
    let events = sidecar.audit("events=all&idempotency_key=order-1").await;
    let told: Vec<_> = events.iter().map(|one| one["event"].as_str().unwrap()).collect();
    assert_eq!(told, ["admitted", "voided", "admitted", "voided", "admitted", "voided", "refused"]);
    assert_eq!(sidecar.spend(&id).await, ("0.00".into(), "0.00".into(), "0.00".into()));
    let new_key = sidecar.post(&key, "/v1/charges", "order-1b", &card("tok_visa")).await;
    assert_eq!((new_key.status, standin.executed().len()), (200, 1));
}

#[tokio::test]
async fn mount_order_expand_and_version_are_no_part_of_a_call() {
    let (standin, sidecar) = world().await;
    let endpoints = json!({"allowed_endpoints": ["POST /v1/charges", "GET /v1/customers/{id}"]});
    let (key, _) = sidecar.mint("100.00", endpoints).await;
    let form = [
        ("amount", "500"),
        ("currency", "usd"),
        ("customer", "cus_1"),
        ("metadata[b]", "2"),
        ("metadata[a]", "1"),
    ];
    let first = sidecar.post(&key, "/stripe/v1/charges", "order-1", &form).await;
    assert_eq!(first.status, 200, "{}", first.text);
    let mut turned = form.to_vec();
    turned.reverse();
    let mut expanded = turned.clone();
    expanded.push(("expand[0]", "customer"));
    let upper = form.map(|(name, value)| (name, if name == "currency" { "USD" } else { value }));
    let version = ("stripe-version", "2024-06-20");
    for (path, headers, form) in [
        ("/v1/charges", vec![], &turned[..]),
        ("/v1/charges", vec![version], &expanded[..]),
        ("/stripe/v1/charges", vec![version], &form[..]),
        ("/stripe/v1/charges", vec![], &upper[..]),
    ] {
        let mut headers = headers;
        headers.push(("idempotency-key", "order-1"));
        let again = sidecar.call("POST", path, &key, &headers, form).await;
        assert_eq!(
            (again.status, is_replay(&again), &again.text),
            (200, true, &first.text),
            "{path} {form:?}"
        );
    }
    let other = sidecar.post(&key, "/v1/charges", "order-2", &upper).await;
    assert_eq!(other.status, 200, "{}", other.text);
    let seen = standin.requests();
    let sent: Vec<_> = seen.iter().filter(|seen| seen.method == "POST").collect();
    assert_eq!(sent.len(), 2);
    assert!(sent.iter().all(|seen| seen.path == "/v1/charges"), "the mount stays here");
    assert!(sent[1].body.contains("currency=usd"), "forwarded in lower case: {}", sent[1].body);
}

#[tokio::test]
async fn one_who_waits_too_long_is_told_to_come_again() {
    let (standin, sidecar) = world_with(&[("UPSTREAM_TIMEOUT_MS", "1000")]).await;
    let sidecar = Arc::new(sidecar);
    let (key, _) = sidecar.mint("100.00", json!({})).await;
    let body = "amount=2999&currency=usd&customer=cus_9&source=tok_visa";
    // Its time runs from its head; the leader comes later and so has longer.
    let mut waiter = head_of(&sidecar, &key, "/v1/charges", "order-1", body).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    standin.fault(Fault::Hold);
    let leader = {
        let (sidecar, key) = (Arc::clone(&sidecar), key.clone());
        tokio::spawn(async move { sidecar.charge(&key, "order-1", 2999, "cus_9").await })
    };
    standin.until_held(1).await;
    waiter.write_all(body.as_bytes()).await.unwrap();
    let mut answer = String::new();
    waiter.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 409 "), "{answer}");
    assert!(answer.contains("\"idempotency_key_in_use\""), "{answer}");
    assert!(answer.to_lowercase().contains("stripe-should-retry: true"), "{answer}");
    assert_eq!(leader.await.unwrap().verdict(), (504, "outcome_unknown"));
    standin.release();
    while standin.executed().is_empty() {
        tokio::task::yield_now().await;
    }
    assert_eq!(sidecar.charge(&key, "order-1", 2999, "cus_9").await.status, 200);
    assert_eq!(standin.executed().len(), 1);
}

/// Another call under a key that is in flight waits for the end of it, because only then is it known what binds the key.
#[tokio::test]
async fn other_parameters_wait_for_the_call_in_flight() {
    let (standin, sidecar) = world().await;
    let (key, id) = sidecar.mint("100.00", json!({})).await;
    for (fault, declined) in [(Fault::HoldAfter, false), (Fault::Hold, true)] {
        let name = format!("order-{declined}");
        let source = if declined { "tok_chargeDeclined" } else { "tok_visa" };
        let form = [("amount", "2999"), ("currency", "usd"), ("customer", "cus_9"), ("source", source)];
        standin.fault(fault);
        let (first, other) = tokio::join!(sidecar.post(&key, "/v1/charges", &name, &form), async {
            standin.until_held(1).await;
            let (other, ()) = tokio::join!(sidecar.charge(&key, &name, 100, "cus_9"), async {
                // It is under way by now, or comes later: the answer is the same.
                tokio::task::yield_now().await;
                standin.release();
            });
            other
        });
        assert_eq!(first.status, if declined { 402 } else { 200 }, "{}", first.text);
        assert_eq!(other.verdict(), (400, "idempotency_error"), "{}", other.text);
    }
    assert_eq!((standin.executed().len(), sidecar.spend(&id).await.0), (1, "29.99".into()));
}

#[tokio::test]
async fn a_caller_that_hangs_up_cancels_nothing() {
    let (standin, sidecar) = world().await;
    let (key, id) = sidecar.mint("100.00", json!({})).await;
    let body = "amount=2999&currency=usd&customer=cus_9&source=tok_visa";
    standin.fault(Fault::Hold);
    let mut caller = head_of(&sidecar, &key, "/v1/charges", "order-1", body).await;
    caller.write_all(body.as_bytes()).await.unwrap();
    standin.until_held(1).await;
    drop(caller);
    assert_eq!(sidecar.spend(&id).await, ("0.00".into(), "29.99".into(), "0.00".into()));
    standin.release();
    let again = sidecar.charge(&key, "order-1", 2999, "cus_9").await;
    assert_eq!((again.status, is_replay(&again)), (200, true), "{}", again.text);
    assert_eq!((standin.executed().len(), upstream_keys(&standin).len()), (1, 1));
    assert_eq!(sidecar.spend(&id).await, ("29.99".into(), "0.00".into(), "0.00".into()));
}

const INTENT: [(&str, &str); 3] = [("amount", "1000"), ("currency", "usd"), ("customer", "cus_1")];

async fn create_intent(sidecar: &Sidecar, key: &str, name: &str) -> Reply {
    let reply = sidecar.post(key, "/v1/payment_intents", name, &INTENT).await;
    assert_eq!(reply.status, 200, "{}", reply.text);
    assert!(reply.body.as_object().unwrap().contains_key("client_secret"), "{}", reply.text);
    reply
}

#[tokio::test]
async fn a_client_secret_is_given_once_to_a_key_that_has_it_and_kept_nowhere() {
    let (standin, mut sidecar) = world().await;
    let (plain, _) = sidecar.mint("100.00", intents()).await;
    let mut policy = intents();
    policy["client_secrets"] = json!(true);
    let (trusted, _) = sidecar.mint("100.00", policy).await;
    let secret = |reply: &Reply| reply.body["client_secret"].clone();

    let first = create_intent(&sidecar, &plain, "order-1").await;
    assert_eq!(secret(&first), Value::Null);
    assert_eq!(secret(&create_intent(&sidecar, &plain, "order-1").await), Value::Null);
    assert_eq!(secret(&create_intent(&sidecar, &trusted, "order-1").await), Value::Null);
    let path = format!("/v1/payment_intents/{}", first.body["id"].as_str().unwrap());
    assert_eq!(secret(&sidecar.call("GET", &path, &plain, &[], &[]).await), Value::Null);
    assert!(secret(&sidecar.call("GET", &path, &trusted, &[], &[]).await).is_string());

    let kept = secret(&create_intent(&sidecar, &trusted, "order-2").await);
    assert!(kept.as_str().unwrap().contains("_secret_"), "{kept}");
    assert_eq!(secret(&create_intent(&sidecar, &trusted, "order-2").await), Value::Null);

    // Those who waited get none either, whatever their key says.
    let sidecar_shared = Arc::new(sidecar);
    standin.fault(Fault::Hold.on(On::IdempotencyKey("order-3".into())));
    let mut calls = JoinSet::new();
    for _ in 0..8 {
        let (sidecar, key) = (Arc::clone(&sidecar_shared), trusted.clone());
        calls.spawn(async move { create_intent(&sidecar, &key, "order-3").await });
    }
    standin.until_held(1).await;
    standin.release();
    let replies = calls.join_all().await;
    let given = replies.iter().filter(|reply| secret(reply).is_string()).count();
    assert_eq!((given, replies.iter().filter(|reply| is_replay(reply)).count()), (1, 7));

    sidecar = Arc::into_inner(sidecar_shared).unwrap();
    sidecar.kill();
    let file = |name: &str| std::fs::read(sidecar.data.join(name)).unwrap();
    let file = [file("keybrake.redb"), file("keybrake.wal")].concat();
    let found = |text: &[u8]| file.windows(text.len()).any(|bytes| bytes == text);
    assert!(found(b"payment_intent") && found(b"client_secret"), "the answers are stored");
    assert!(!found(b"_secret_"), "without their secrets");
    assert_eq!(standin.executed().iter().filter(|moved| moved.kind == Kind::Charge).count(), 0);
}

/// The secret hides in an error as well: the intent inside a 402.
#[tokio::test]
async fn a_declined_intent_keeps_its_secret_to_itself() {
    let (_standin, sidecar) = world().await;
    let (plain, _) = sidecar.mint("100.00", intents()).await;
    let mut form = INTENT.to_vec();
    form.extend([("payment_method", "pm_card_visa_chargeDeclined"), ("confirm", "true")]);
    let declined = sidecar.post(&plain, "/v1/payment_intents", "order-1", &form).await;
    assert_eq!(declined.verdict(), (402, "card_declined"), "{}", declined.text);
    assert_eq!(declined.body["error"]["payment_intent"]["client_secret"], Value::Null);
    assert!(!declined.text.contains("_secret_"), "{}", declined.text);
}
