//! Nothing secret comes out: not in a log at its loudest, an answer, a record, a metric, or the bytes of the ledger.

use serde_json::json;

use crate::raw::Raw;
use crate::standin::Standin;
use crate::standin::faults::Fault;
use crate::support::{ADMIN_KEY, Reply, STRIPE_KEY, Sidecar, run, world_with};

const CARD: &str = "4242424242424242";
/// Another number that passes the check digit, written as people write it.
const SPACED_CARD: &str = "5555 5555 5555 4444";
/// Stripe keys that somebody sends by mistake.
const PRESENTED: [&str; 2] = ["sk_live_presented0000000000001", "rk_live_presented0000000000002"];

/// Everything that came out, with the name of where.
#[derive(Default)]
struct Seen(Vec<(String, String)>);

impl Seen {
    fn keep(&mut self, from: &str, text: impl Into<String>) {
        self.0.push((from.to_owned(), text.into()));
    }

    fn reply(&mut self, from: &str, reply: Reply) -> Reply {
        self.keep(from, format!("{:?} {}", reply.headers, reply.text));
        reply
    }

    fn none_shows(&self, secrets: &[(&str, &str)]) {
        let mut shown = Vec::new();
        for (from, text) in &self.0 {
            for (what, secret) in secrets {
                if let Some(at) = text.find(secret) {
                    let (before, after) = (at.saturating_sub(200), (at + 100).min(text.len()));
                    let around = String::from_utf8_lossy(&text.as_bytes()[before..after]).into_owned();
                    shown.push(format!("{from} shows the {what}: …{around}…"));
                }
            }
        }
        assert!(shown.is_empty(), "{}", shown.join("\n"));
    }
}

/// The secrets that Stripe gave out for the intents that were made.
fn client_secrets(standin: &Standin, replies: &[Reply]) -> Vec<String> {
    let mut secrets: Vec<String> =
        replies.iter().filter_map(|reply| reply.body["client_secret"].as_str().map(str::to_owned)).collect();
    assert!(!standin.executed().is_empty());
    secrets.sort_unstable();
    secrets.dedup();
    secrets
}

/// Calls of all kinds under one key.
async fn spend(seen: &mut Seen, standin: &Standin, sidecar: &Sidecar, key: &str) {
    let path = "/v1/payment_intents";
    let named = |name| [("idempotency-key", name)];
    let card_in_metadata = [
        ("amount", "1000"),
        ("currency", "usd"),
        ("customer", "cus_1"),
        ("source", "tok_visa"),
        ("metadata[note]", CARD),
        ("metadata[spaced]", SPACED_CARD),
        ("metadata[4242424242424242]", "as a name"),
        ("metadata[key]", PRESENTED[0]),
        ("description", CARD),
    ];
    let charge = sidecar.call("POST", "/v1/charges", key, &named("card"), &card_in_metadata).await;
    assert_eq!(charge.status, 200, "{}", charge.text);
    // Stripe's own answer repeats the description and the metadata, which is its business and its caller's.
    let id = charge.body["id"].as_str().unwrap().to_owned();
    let refund = [("charge", id.as_str()), ("amount", "100")];
    seen.reply("a refund", sidecar.call("POST", "/v1/refunds", key, &named("refund"), &refund).await);
    for (name, form) in [
        ("card", vec![("source[number]", CARD)]),
        ("cvc", vec![("card[cvc]", "987"), ("card[number]", SPACED_CARD)]),
        ("as-amount", vec![("amount", CARD), ("currency", "usd")]),
        ("as-currency", vec![("amount", "5"), ("currency", CARD)]),
        ("as-customer", vec![("amount", "5000000"), ("currency", "usd"), ("customer", CARD)]),
        ("as-method", vec![("_method", CARD)]),
        ("as-key", vec![("key", PRESENTED[0])]),
        ("as-stamp", vec![("metadata[keybrake_call]", key)]),
        ("as-expand", vec![("expand[]", CARD)]),
    ] {
        let reply = sidecar.call("POST", "/v1/charges", key, &named(name), &form).await;
        assert!(reply.status >= 400, "{}", reply.text);
        seen.reply(name, reply);
    }
    for header in [
        ("stripe-account", PRESENTED[1]),
        ("stripe-version", CARD),
        ("idempotency-key", "kb1_AAAA"),
        ("x-http-method-override", PRESENTED[0]),
        ("keybrake-context-task", PRESENTED[1]),
        ("keybrake-context-note", CARD),
    ] {
        seen.reply("a bad header", sidecar.call("POST", path, key, &[header], &[("amount", "100")]).await);
    }
    for path in [
        format!("/v1/charges/{CARD}"),
        format!("/v1/charges/{key}"),
        format!("/v1/charges/{}", PRESENTED[0]),
        format!("/v1/{CARD}"),
        format!("/v1/charges/%34{CARD}"),
        format!("/v1/charges?customer={CARD}&limit={key}"),
    ] {
        let reply = sidecar.call("GET", &path, key, &[], &[]).await;
        // Stripe says which id it does not know; what we say ourselves, and what stays, must not.
        if reply.header("request-id").is_some_and(|id| id.starts_with("req_kb_")) {
            seen.reply("a path", reply);
        }
    }
    standin.fault(Fault::Decline);
    seen.reply("a decline", sidecar.charge(key, "declined", 500, "cus_1").await);
    standin.fault(Fault::DropAfter);
    seen.reply("a doubt", sidecar.charge(key, "doubt", 500, "cus_1").await);
    standin.fault(Fault::Status500After);
    seen.reply("a doubt of Stripe's", sidecar.charge(key, "doubt-500", 500, "cus_1").await);
    standin.fault(Fault::Garbage);
    seen.reply("garbage", sidecar.charge(key, "garbage", 500, "cus_1").await);
    seen.reply("too much", sidecar.charge(key, "much", 5_000_000, "cus_1").await);
    seen.reply("a replay", sidecar.charge(key, "doubt", 500, "cus_1").await);
}

/// Intents, whose answers carry a secret that opens them without us.
async fn intents(
    seen: &mut Seen,
    standin: &Standin,
    sidecar: &Sidecar,
    key: &str,
    open: &str,
) -> Vec<String> {
    let form = [("amount", "700"), ("currency", "usd"), ("customer", "cus_2")];
    let make = |key, name: &'static str| async move {
        sidecar.call("POST", "/v1/payment_intents", key, &[("idempotency-key", name)], &form).await
    };
    // Only this key gets to see them, and only once.
    let mut shown = vec![make(open, "open-1").await, make(open, "open-2").await];
    let id = shown[0].body["id"].as_str().unwrap().to_owned();
    let read = format!("/v1/payment_intents/{id}");
    shown.push(sidecar.call("GET", &read, open, &[], &[]).await);
    let secrets = client_secrets(standin, &shown);
    assert_eq!(secrets.len(), 2);
    seen.reply("a replay for the key that may", make(open, "open-1").await);
    seen.reply("a replay for another key", make(key, "open-2").await);
    seen.reply("a read", sidecar.call("GET", &read, key, &[], &[]).await);
    seen.reply("a list", sidecar.call("GET", "/v1/payment_intents?limit=10", key, &[], &[]).await);
    let confirm =
        [("payment_method", "pm_card_authenticationRequired"), ("client_secret", secrets[0].as_str())];
    let path = format!("{read}/confirm");
    standin.fault(Fault::DropAfter);
    let named = [("idempotency-key", "confirm")];
    let with_secret = sidecar.call("POST", &path, key, &named, &confirm).await;
    assert_eq!(with_secret.verdict(), (400, "request_ambiguous"), "{}", with_secret.text);
    seen.reply("a confirm with the secret", with_secret);
    seen.reply("a confirm", sidecar.call("POST", &path, key, &named, &confirm[..1]).await);
    let fails = [("payment_method", "pm_card_visa_chargeDeclined")];
    let other = format!("/v1/payment_intents/{}/confirm", shown[1].body["id"].as_str().unwrap());
    let declined = sidecar.call("POST", &other, key, &[("idempotency-key", "other")], &fails).await;
    assert_eq!(declined.status, 402, "{}", declined.text);
    seen.reply("a decline with the whole intent", declined);
    let cancel = format!("{read}/cancel");
    seen.reply("a cancel", sidecar.call("POST", &cancel, key, &[], &[]).await);
    secrets
}

/// Everything that is wrong about a key, and what an operator asks for.
async fn operate(seen: &mut Seen, sidecar: &Sidecar, key: &str, id: &str) {
    let host = sidecar.base.strip_prefix("http://").unwrap();
    for bearer in [PRESENTED[0], PRESENTED[1], ADMIN_KEY, STRIPE_KEY, &key[..key.len() - 1], "vk_test_short"]
    {
        for path in ["/v1/charges", "/admin/vault_keys", "/audit", "/keybrake/key"] {
            seen.reply("a bad key", sidecar.call("GET", path, bearer, &[], &[]).await);
        }
        let basic = Raw::new("GET /v1/charges").add("Authorization", &format!("Basic {bearer}"));
        seen.keep("a bad Basic key", basic.send(host).await.text);
    }
    for path in [
        "/admin/vault_keys".to_owned(),
        format!("/admin/vault_keys/{id}"),
        format!("/admin/vault_keys/{key}"),
        format!("/admin/vault_keys?label={key}"),
        format!("/admin/calls?customer={CARD}&idempotency_key={key}"),
        "/admin/holds".to_owned(),
        "/admin/calls".to_owned(),
        "/admin/kill_switch".to_owned(),
        "/audit/verify".to_owned(),
        "/keybrake/errors".to_owned(),
    ] {
        seen.reply("the admin API", sidecar.admin("GET", &path, None).await);
    }
    seen.reply("the key itself", sidecar.call("GET", "/keybrake/key", key, &[], &[]).await);
    for body in [
        json!({"label": 7, "vault_key": key}),
        json!({"label": "x", "vendor": key, "allowed_endpoints": [CARD]}),
        json!({key: 1}),
    ] {
        let policy = sidecar.admin("POST", "/admin/vault_keys", Some(&body)).await;
        assert_eq!(policy.status, 400);
        // A name that nobody knows is repeated: whoever sent it has it.
        let text = policy.text.replace(key, "");
        seen.keep("a bad policy", text);
    }
}

#[tokio::test]
async fn nothing_secret_comes_out() {
    let (standin, mut sidecar) =
        world_with(&[("LOG", "trace,keybrake::proxy=trace"), ("UPSTREAM_TIMEOUT_MS", "2000")]).await;
    let mut seen = Seen::default();
    let endpoints = json!([
        "POST /v1/charges",
        "POST /v1/refunds",
        "POST /v1/payment_intents",
        "POST /v1/payment_intents/{intent}/confirm",
        "POST /v1/payment_intents/{intent}/cancel",
        "GET /v1/charges",
        "GET /v1/charges/*",
        "GET /v1/payment_intents",
        "GET /v1/payment_intents/*",
    ]);
    let policy = json!({"allowed_endpoints": endpoints, "daily_usd_out_cap": 10});
    let mut open_policy = policy.clone();
    open_policy["client_secrets"] = json!(true);
    let (key, id) = sidecar.mint("500", policy).await;
    let (open, _) = sidecar.mint("500", open_policy).await;
    let (gone, gone_id) = sidecar.mint("500", json!({})).await;
    sidecar.admin("DELETE", &format!("/admin/vault_keys/{gone_id}"), None).await;
    seen.reply("a revoked key", sidecar.charge(&gone, "k", 100, "cus_1").await);

    spend(&mut seen, &standin, &sidecar, &key).await;
    let client_secrets = intents(&mut seen, &standin, &sidecar, &key, &open).await;
    let early = std::fs::read(sidecar.data.join("keybrake.redb")).unwrap();
    operate(&mut seen, &sidecar, &key, &id).await;
    standin.set_secret_keys(vec!["sk_test_another".to_owned()]);
    seen.reply("our own key refused", sidecar.charge(&key, "refused", 100, "cus_1").await);
    seen.reply("a read under a refused key", sidecar.call("GET", "/v1/charges", &key, &[], &[]).await);
    let hup = std::process::Command::new("kill").arg("-HUP").arg(sidecar.pid().to_string()).status();
    assert!(hup.unwrap().success());
    let (_, doctor, complaint) = run(sidecar.env(), &["doctor", "--json"]);
    seen.keep("the doctor", doctor + &complaint);
    drop(standin);
    seen.reply("nobody there", sidecar.charge(&key, "nobody", 100, "cus_1").await);

    let metrics = crate::support::client().get(format!("{}/metrics", sidecar.ops)).send().await.unwrap();
    let metrics = metrics.text().await.unwrap();
    assert!(metrics.contains("keybrake_calls"));
    seen.keep("the metrics", metrics);
    let records = sidecar.audit("events=all").await;
    assert!(records.len() > 20);
    for record in records {
        seen.keep("the audit log", record.to_string());
    }
    assert!(sidecar.terminate().success());
    let log = sidecar.log();
    assert!(log.lines().count() > 20, "{log}");
    seen.keep("the log", log);

    let mut secrets = vec![
        ("admin key", ADMIN_KEY),
        ("Stripe key", STRIPE_KEY),
        ("vault key", &key),
        ("vault key", &open),
        ("vault key", &gone),
        ("card number", CARD),
        ("card number", SPACED_CARD),
        ("presented key", PRESENTED[0]),
        ("presented key", PRESENTED[1]),
    ];
    secrets.extend(client_secrets.iter().map(|secret| ("client secret", secret.as_str())));
    seen.none_shows(&secrets);

    // What lies on the disk outlives every answer.
    let bytes = [early, std::fs::read(sidecar.data.join("keybrake.redb")).unwrap()].concat();
    let in_bytes = |secret: &str| bytes.windows(secret.len()).any(|window| window == secret.as_bytes());
    assert!(in_bytes("of-a-test"), "the label is there in the clear, so a secret would be too");
    for (what, secret) in
        secrets.iter().filter(|(what, _)| *what != "card number" && *what != "presented key")
    {
        assert!(!in_bytes(secret), "the ledger holds the {what}");
    }
}
