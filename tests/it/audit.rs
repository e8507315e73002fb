//! The record of everything: what it says, who may read which part of it, and that it is whole.

use std::collections::BTreeSet;

use serde_json::{Value, json};
use tokio::time::Instant;

use crate::standin::faults::{Fault, On};
use crate::support::{ADMIN_KEY, PATIENCE, Reply, Sidecar, client, world};

/// The fields that the contract names.
const FIELDS: &[&str] = &[
    "seq",
    "ledger_id",
    "node",
    "at",
    "event",
    "call_id",
    "hold_id",
    "request_id",
    "key_id",
    "issuer_id",
    "label",
    "metadata",
    "method",
    "endpoint",
    "decision",
    "code",
    "outcome",
    "amount",
    "currency",
    "usd",
    "idempotency_key",
    "customer",
    "object_id",
    "stripe_metadata",
    "stripe_request_id",
    "upstream_status",
    "duration_ms",
    "count",
    "flags",
    "chain_id",
    "prev_hash",
    "hash",
];

fn texts<'a>(records: &'a [Value], field: &str) -> Vec<&'a str> {
    records.iter().map(|record| record[field].as_str().unwrap_or("-")).collect()
}

async fn ask(sidecar: &Sidecar, bearer: &str, query: &str) -> Reply {
    sidecar.call("GET", &format!("/audit?{query}"), bearer, &[], &[]).await
}

fn seqs(reply: &Reply) -> Vec<u64> {
    assert_eq!(reply.status, 200, "{}", reply.text);
    reply.body["data"].as_array().unwrap().iter().map(|record| record["seq"].as_u64().unwrap()).collect()
}

#[tokio::test]
async fn a_record_has_every_field_and_says_what_the_caller_saw() {
    let (standin, sidecar) = world().await;
    let metadata = json!({"execution": "exec-7", "flow": "billing"});
    let (key, id) = sidecar.mint("32.99", json!({"label": "kestra-cus_9", "metadata": metadata})).await;
    let form = [
        ("amount", "2999"),
        ("currency", "usd"),
        ("customer", "cus_9"),
        ("source", "tok_visa"),
        ("metadata[invoice]", "in_7"),
    ];
    let reply = sidecar.post(&key, "/stripe/v1/charges", "cus_9:2026-07", &form).await;
    assert_eq!(reply.status, 200, "{}", reply.text);
    let trail = sidecar.audit("events=all&customer=cus_9").await;
    assert_eq!(texts(&trail, "event"), ["admitted", "settled"]);
    let shared = json!({
        "node": "node-of-the-tests", "key_id": id, "issuer_id": null, "label": "kestra-cus_9", "metadata": metadata,
        "method": "POST", "endpoint": "/v1/charges", "decision": "forwarded", "code": null, "amount": 2999,
        "currency": "usd", "usd": "29.99", "idempotency_key": "cus_9:2026-07", "customer": "cus_9",
        "stripe_metadata": {"invoice": "in_7"}, "count": null, "flags": null,
    });
    for record in &trail {
        let names: BTreeSet<_> = record.as_object().unwrap().keys().map(String::as_str).collect();
        assert!(FIELDS.iter().all(|field| names.contains(field)), "{names:?}");
        for (field, value) in shared.as_object().unwrap() {
            assert_eq!(&record[field], value, "{field}");
        }
        assert_eq!(record["chain_id"], record["ledger_id"], "with redb the chain is the ledger's");
        assert_eq!(record["call_id"], trail[0]["call_id"]);
        assert_eq!(record["hold_id"], trail[0]["hold_id"]);
    }
    let (admitted, settled) = (&trail[0], &trail[1]);
    assert_eq!((&admitted["outcome"], &settled["outcome"]), (&json!("held"), &json!("spent")));
    assert_eq!((&admitted["upstream_status"], &settled["upstream_status"]), (&Value::Null, &json!(200)));
    assert_eq!(settled["object_id"], reply.body["id"]);
    let seen = reply.header("request-id").unwrap();
    assert!(seen.starts_with("req_"), "Stripe's own: {seen}");
    assert_eq!((&settled["request_id"], &settled["stripe_request_id"]), (&json!(seen), &json!(seen)));
    assert!(settled["duration_ms"].is_u64() && admitted["duration_ms"].is_u64());
    assert_eq!(settled["prev_hash"], admitted["hash"]);
    assert_eq!(standin.executed()[0].metadata["invoice"], "in_7");
}

/// Whatever a caller can quote leads to its record.
#[tokio::test]
async fn the_request_id_of_every_answer_leads_to_its_record() {
    let (standin, sidecar) = world().await;
    let (key, _) =
        sidecar.mint("10.00", json!({"allowed_endpoints": ["POST /v1/charges", "GET /v1/charges"]})).await;
    let mut replies = vec![
        ("settled", sidecar.charge(&key, "paid", 100, "cus_1").await),
        ("replayed", sidecar.charge(&key, "paid", 100, "cus_1").await),
        ("refused", sidecar.charge(&key, "too-much", 2000, "cus_1").await),
        ("refused", sidecar.call("POST", "/v1/refunds", &key, &[], &[("charge", "ch_1")]).await),
        ("forwarded", sidecar.call("GET", "/v1/charges", &key, &[], &[]).await),
    ];
    let bare = |status, body| Fault::Answer { status, body, headers: std::collections::BTreeMap::new() };
    let charge = json!({"object": "charge", "id": "ch_1", "amount": 100, "currency": "usd", "status": "succeeded", "captured": true});
    for (name, event, fault) in [
        ("declined", "voided", Fault::Decline),
        ("lost", "doubt", Fault::DropBefore),
        ("garbled", "doubt", Fault::Garbage),
        ("sorry", "doubt", Fault::Status500Before),
        ("busy", "voided", Fault::RateLimited),
        // Answers without a Request-Id of Stripe's get one of ours.
        ("nameless", "settled", bare(200, charge)),
        ("nameless-error", "doubt", bare(503, json!({"error": {"type": "api_error"}}))),
    ] {
        standin.fault(fault);
        replies.push((event, sidecar.charge(&key, name, 100, "cus_1").await));
    }
    standin.fault(bare(200, json!({"object": "list", "data": []})).on(On::Any));
    replies.push(("forwarded", sidecar.call("GET", "/v1/charges", &key, &[], &[]).await));
    let trail = sidecar.audit("events=all").await;
    for (event, reply) in &replies {
        let id =
            reply.header("request-id").unwrap_or_else(|| panic!("{event} without an id: {}", reply.text));
        let found: Vec<_> = trail.iter().filter(|one| one["request_id"] == id).collect();
        let last = found.last().unwrap_or_else(|| panic!("no record of {event} {id}: {}", reply.text));
        assert_eq!(last["event"], *event, "{}", reply.text);
        let stripe = &last["stripe_request_id"];
        assert!(stripe.is_null() || stripe.as_str().unwrap().starts_with("req_"), "{last}");
    }
    let forwarded = trail.iter().find(|one| one["event"] == "forwarded").unwrap();
    assert_eq!(forwarded["stripe_request_id"], json!(replies[4].1.header("request-id")));
    assert_eq!((&forwarded["method"], &forwarded["endpoint"]), (&json!("GET"), &json!("/v1/charges")));
    assert_eq!((&forwarded["decision"], &forwarded["outcome"]), (&json!("forwarded"), &json!("none")));
    assert_eq!((&forwarded["upstream_status"], &forwarded["call_id"]), (&json!(200), &Value::Null));
}

#[tokio::test]
async fn one_row_for_each_call_in_its_last_outcome() {
    let (standin, sidecar) = world().await;
    let (key, _) = sidecar.mint("10.00", json!({})).await;
    sidecar.charge(&key, "paid", 100, "cus_1").await;
    sidecar.charge(&key, "paid", 100, "cus_1").await;
    standin.fault(Fault::DropAfter);
    sidecar.charge(&key, "lost", 200, "cus_1").await;
    standin.fault(Fault::Decline);
    sidecar.charge(&key, "declined", 300, "cus_2").await;
    let pairs = |records: &[Value]| -> Vec<(String, String)> {
        let of = |record: &Value, field: &str| record[field].as_str().unwrap_or("-").to_owned();
        records.iter().map(|record| (of(record, "idempotency_key"), of(record, "outcome"))).collect()
    };
    let told = |key: &str, outcome: &str| (key.to_owned(), outcome.to_owned());
    let rows = sidecar.audit("endpoint=/v1/charges").await;
    let expected =
        [told("paid", "spent"), told("paid", "none"), told("lost", "doubt"), told("declined", "declined")];
    assert_eq!(pairs(&rows), expected);
    assert_eq!(pairs(&sidecar.audit("outcome=held").await), [], "it was, and is no longer");
    assert_eq!(pairs(&sidecar.audit("outcome=doubt").await), [told("lost", "doubt")]);
    sidecar.charge(&key, "lost", 200, "cus_1").await;
    assert_eq!(pairs(&sidecar.audit("outcome=doubt").await), []);
    assert_eq!(pairs(&sidecar.audit("outcome=spent").await), [told("paid", "spent"), told("lost", "spent")]);
    let all = sidecar.audit("events=all&idempotency_key=lost").await;
    assert_eq!(texts(&all, "event"), ["admitted", "doubt", "admitted", "resolved"]);
    assert_eq!(texts(&sidecar.audit("events=all&outcome=doubt").await, "idempotency_key"), ["lost"]);
    let replay = &sidecar.audit("decision=replayed").await[0];
    assert_eq!((&replay["event"], &replay["outcome"]), (&json!("replayed"), &json!("none")));
    assert_eq!((&replay["call_id"], &replay["object_id"]), (&rows[0]["call_id"], &rows[0]["object_id"]));
    let chain = sidecar.audit("events=all").await;
    assert_eq!((&chain[0]["seq"], texts(&chain[..1], "event")), (&json!(1), vec!["chain_started"]));
    assert_eq!(chain[0]["prev_hash"], "0".repeat(64));
    assert!(chain.iter().zip(1..).all(|(record, seq)| record["seq"] == seq), "no gaps");
}

#[tokio::test]
async fn filters_and_pages() {
    let (_standin, sidecar) = world().await;
    let (first, first_id) =
        sidecar.mint("10.00", json!({"label": "a", "metadata": {"execution": "1"}})).await;
    let (second, _) = sidecar.mint("10.00", json!({"label": "b", "metadata": {"execution": "2"}})).await;
    for n in 1..=3 {
        let reply = sidecar.charge(&first, &format!("a-{n}"), 100, &format!("cus_{n}")).await;
        assert_eq!(reply.status, 200, "{}", reply.text);
    }
    let form = [("amount", "100"), ("currency", "usd"), ("customer", "cus_1"), ("metadata[line]", "7")];
    let with_line = sidecar.post(&second, "/v1/charges", "b-1", &form).await;
    let object = with_line.body["id"].as_str().unwrap();
    let all = sidecar.audit("endpoint=/v1/charges").await;
    assert_eq!(texts(&all, "idempotency_key"), ["a-1", "a-2", "a-3", "b-1"]);
    let middle = all[2]["at"].as_str().unwrap();
    let (since, until): (Vec<_>, Vec<_>) =
        all.iter().partition(|record| record["at"].as_str().unwrap() >= middle);
    let named = |field: &str| format!("{field}={}", all[3][field].as_str().unwrap());
    for (query, expected) in [
        ("label=a".to_owned(), vec!["a-1", "a-2", "a-3"]),
        (format!("key_id={first_id}"), vec!["a-1", "a-2", "a-3"]),
        ("customer=cus_1".to_owned(), vec!["a-1", "b-1"]),
        ("customer=cus_1&label=b".to_owned(), vec!["b-1"]),
        ("decision=forwarded&outcome=spent".to_owned(), vec!["a-1", "a-2", "a-3", "b-1"]),
        ("decision=refused".to_owned(), vec![]),
        ("node=node-of-the-tests&customer=cus_3".to_owned(), vec!["a-3"]),
        ("node=another".to_owned(), vec![]),
        (format!("chain_id={}&customer=cus_3", all[0]["chain_id"].as_str().unwrap()), vec!["a-3"]),
        ("chain_id=another".to_owned(), vec![]),
        ("idempotency_key=a-2".to_owned(), vec!["a-2"]),
        (format!("object_id={object}"), vec!["b-1"]),
        (named("hold_id"), vec!["b-1"]),
        (named("request_id"), vec!["b-1"]),
        (named("stripe_request_id"), vec!["b-1"]),
        ("stripe_request_id=req_another".to_owned(), vec![]),
        ("metadata[execution]=2".to_owned(), vec!["b-1"]),
        ("stripe_metadata[line]=7".to_owned(), vec!["b-1"]),
        ("stripe_metadata[line]=8".to_owned(), vec![]),
        (
            format!("since={middle}"),
            since.iter().map(|one| one["idempotency_key"].as_str().unwrap()).collect(),
        ),
        (
            format!("until={middle}"),
            until.iter().map(|one| one["idempotency_key"].as_str().unwrap()).collect(),
        ),
    ] {
        let found = sidecar.audit(&format!("endpoint=/v1/charges&{query}")).await;
        assert_eq!(texts(&found, "idempotency_key"), expected, "{query}");
    }
    for bad in
        ["colour=red", "limit=0", "limit=1001", "since=yesterday", "label=a&label=b", "cursor=x", "events=no"]
    {
        let reply = ask(&sidecar, ADMIN_KEY, bad).await;
        assert_eq!(reply.verdict(), (400, "parameter_invalid"), "{bad}: {}", reply.text);
    }
    let whole = seqs(&ask(&sidecar, ADMIN_KEY, "events=all&limit=1000").await);
    let (mut paged, mut cursor) = (Vec::new(), String::new());
    loop {
        let page = ask(&sidecar, ADMIN_KEY, &format!("events=all&limit=3{cursor}")).await;
        paged.extend(seqs(&page));
        assert_eq!(page.body["has_more"].as_bool(), Some(page.body["next_cursor"].is_string()));
        let Some(next) = page.body["next_cursor"].as_str() else { break };
        cursor = format!("&cursor={next}");
    }
    assert_eq!(paged, whole);
    assert!(whole.is_sorted_by(|before, after| before > after), "newest first");
}

#[tokio::test]
async fn records_as_lines_verify_like_the_list() {
    let (_standin, sidecar) = world().await;
    let (key, _) = sidecar.mint("10.00", json!({})).await;
    sidecar.charge(&key, "order-1", 100, "cus_ü").await;
    let request = client().get(format!("{}/audit?events=all&order=asc", sidecar.base)).bearer_auth(ADMIN_KEY);
    let answer = request.header("accept", "application/x-ndjson").send().await.unwrap();
    assert_eq!(answer.headers()["content-type"], "application/x-ndjson");
    let text = answer.text().await.unwrap();
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines, sidecar.audit("events=all").await);
    let mut verifier = keybrake::audit::Verifier::default();
    for line in &lines {
        verifier.follow_json(line.as_object().unwrap()).unwrap();
    }
    let told = sidecar.admin("GET", "/audit/verify", None).await;
    assert_eq!(told.body["whole"], true);
    assert_eq!(told.body["records"], lines.len());
    assert_eq!(told.body["head"], lines.last().unwrap()["hash"]);
    let mut forged = lines[2].as_object().unwrap().clone();
    forged.insert("label".into(), json!("somebody else"));
    let mut verifier = keybrake::audit::Verifier::default();
    let follow = lines[..2].iter().all(|line| verifier.follow_json(line.as_object().unwrap()).is_ok());
    assert!(follow && verifier.follow_json(&forged).is_err());
}

#[tokio::test]
async fn a_vault_key_reads_the_records_of_its_label_while_it_lives() {
    let (_standin, sidecar) = world().await;
    let reads = json!({"label": "a", "daily_usd_cap": null, "allowed_endpoints": ["GET /v1/charges"]});
    let (reader, _) = sidecar.mint("", reads).await;
    let (first, first_id) = sidecar.mint("10.00", json!({"label": "a"})).await;
    let (second, _) = sidecar.mint("10.00", json!({"label": "b"})).await;
    sidecar.charge(&first, "a-1", 100, "cus_1").await;
    sidecar.charge(&second, "b-1", 100, "cus_1").await;
    let labels = |reply: &Reply| -> BTreeSet<String> {
        assert_eq!(reply.status, 200, "{}", reply.text);
        let data = reply.body["data"].as_array().unwrap();
        data.iter().map(|record| record["label"].as_str().unwrap_or("-").to_owned()).collect()
    };
    let only_a = BTreeSet::from(["a".to_owned()]);
    for query in ["", "events=all", "customer=cus_1", "outcome=spent"] {
        assert_eq!(labels(&ask(&sidecar, &first, query).await), only_a, "{query}");
        assert_eq!(labels(&ask(&sidecar, &reader, query).await), only_a, "a key that cannot charge: {query}");
    }
    assert!(seqs(&ask(&sidecar, &first, "label=b").await).is_empty());
    assert!(seqs(&ask(&sidecar, &first, "idempotency_key=b-1").await).is_empty());
    let refused = sidecar.charge(&reader, "a-2", 100, "cus_1").await;
    assert_eq!(refused.verdict(), (403, "endpoint_not_allowed"), "{}", refused.text);
    for path in ["/audit/verify", "/admin/vault_keys", "/admin/holds", "/admin/calls", "/admin/kill_switch"] {
        let reply = sidecar.call("GET", path, &first, &[], &[]).await;
        assert_eq!(reply.verdict(), (403, "admin_key_required"), "{path}");
    }
    sidecar.admin("DELETE", &format!("/admin/vault_keys/{first_id}"), None).await;
    assert_eq!(ask(&sidecar, &first, "").await.verdict(), (401, "vault_key_revoked"));
    let (short, _) = sidecar.mint("10.00", json!({"label": "a", "expires_in_seconds": 1})).await;
    let since = Instant::now();
    while ask(&sidecar, &short, "limit=1").await.status == 200 {
        assert!(since.elapsed() < PATIENCE, "it lives for ever");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    assert_eq!(ask(&sidecar, &short, "").await.verdict(), (401, "vault_key_expired"));
    for nobody in
        ["", "vk_test_nobody", "sk_test_standin0000000000000001", "admin-key-of-nobody-0123456789abcdefgh"]
    {
        assert_eq!(ask(&sidecar, nobody, "").await.verdict(), (401, "vault_key_invalid"), "{nobody}");
    }
}

#[tokio::test]
async fn refusals_are_recorded_once_and_counted() {
    let (_standin, sidecar) = world().await;
    let (key, id) = sidecar.mint("1.00", json!({})).await;
    for _ in 0..5 {
        let reply = sidecar.charge(&key, "too-much", 200, "cus_1").await;
        assert_eq!(reply.status, 429, "{}", reply.text);
    }
    let refused = sidecar.audit(&format!("decision=refused&key_id={id}")).await;
    // A second one only where a minute ended meanwhile.
    assert!((1..=2).contains(&refused.len()), "{refused:#?}");
    let record = &refused[0];
    assert_eq!((&record["event"], &record["code"]), (&json!("refused"), &json!("spend_cap_exceeded")));
    assert_eq!((&record["outcome"], &record["count"]), (&json!("none"), &json!(1)));
    assert_eq!((&record["endpoint"], &record["customer"]), (&json!("/v1/charges"), &json!("cus_1")));
    assert_eq!((&record["call_id"], &record["hold_id"]), (&Value::Null, &Value::Null));
    // Another code is another record; a path that is no path is shown as far as it is plain.
    sidecar.call("GET", "/v1/charges/../account", &key, &[], &[]).await;
    sidecar.call("POST", "/v1/refunds", &key, &[], &[("charge", "ch_1")]).await;
    let codes: BTreeSet<_> = sidecar
        .audit(&format!("decision=refused&key_id={id}"))
        .await
        .iter()
        .map(|record| record["code"].as_str().unwrap().to_owned())
        .collect();
    assert!(codes.contains("endpoint_not_allowed") && codes.contains("spend_cap_exceeded"), "{codes:?}");
    // Of a key that nobody knows there is nothing to tell but that it came.
    let before = sidecar.audit("events=all").await.len();
    for _ in 0..3 {
        let reply = sidecar.charge("vk_test_unknown", "order-1", 100, "cus_1").await;
        assert_eq!(reply.verdict(), (401, "vault_key_invalid"));
    }
    assert_eq!(sidecar.audit("events=all").await.len(), before);
    let metrics =
        client().get(format!("{}/metrics", sidecar.ops)).send().await.unwrap().text().await.unwrap();
    assert!(metrics.contains("keybrake_unknown_keys_total 3"), "{metrics}");
    // Readers of a revoked key are refused, and that is recorded under it.
    sidecar.admin("DELETE", &format!("/admin/vault_keys/{id}"), None).await;
    sidecar.charge(&key, "too-late", 50, "cus_1").await;
    let late = sidecar.audit(&format!("code=vault_key_revoked&key_id={id}")).await;
    assert_eq!(texts(&late, "label"), ["of-a-test"]);
    let made: Vec<_> = sidecar.audit(&format!("key_id={id}&events=all")).await;
    let events = texts(&made, "event");
    assert_eq!(events.first(), Some(&"key_issued"));
    assert!(events.contains(&"key_revoked"), "{events:?}");
}

#[tokio::test]
async fn nothing_secret_is_recorded() {
    let (standin, sidecar) = world().await;
    let (key, _) = sidecar
        .mint("10.00", json!({"allowed_endpoints": ["POST /v1/charges", "POST /v1/payment_intents"]}))
        .await;
    let form = [
        ("amount", "100"),
        ("currency", "usd"),
        ("customer", "cus_1"),
        ("metadata[note]", "paid by 4242 4242 4242 4242"),
    ];
    let made = sidecar.post(&key, "/v1/charges", "order-1", &form).await;
    assert_eq!(made.status, 200, "{}", made.text);
    assert_eq!(
        standin.executed()[0].metadata["note"],
        "paid by 4242 4242 4242 4242",
        "Stripe gets what was said"
    );
    sidecar.post(&key, "/v1/payment_intents", "order-2", &form[..3]).await;
    let card = [("amount", "100"), ("currency", "usd"), ("source[number]", "4242424242424242")];
    assert_eq!(
        sidecar.post(&key, "/v1/charges", "order-3", &card).await.verdict(),
        (403, "parameter_not_allowed")
    );
    let text = serde_json::to_string(&sidecar.audit("events=all").await).unwrap();
    for secret in [&*key, ADMIN_KEY, crate::support::STRIPE_KEY, "4242 4242", "42424242", "_secret_"] {
        assert!(!text.contains(secret), "{secret}");
        assert!(!sidecar.log().contains(secret), "{secret} in the log");
    }
}
