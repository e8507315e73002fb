//! Requests to the admin and audit API that must not work: each is refused with its status, its code and the name of the
//! field at fault, and leaves no trace, not even in the log.

use keybrake::id::{CallId, HoldId, KeyId};
use keybrake::secret::{KeyKind, KeySecret, Mode};
use keybrake::time::UnixMs;
use serde_json::{Value, json};

use crate::bad_input::{Row, address, is_stripe_shaped, row, state};
use crate::raw::Raw;
use crate::standin::Standin;
use crate::support::{ADMIN_KEY, STRIPE_KEY, Sidecar, world};

/// A policy that is fine, with one field changed. `null` in `change` takes the field away.
fn policy(change: &Value) -> Value {
    let mut policy = json!({
        "label": "row", "vendor": "stripe", "allowed_endpoints": ["POST /v1/charges"], "daily_usd_cap": 32.99,
        "expires_in_seconds": 3600,
    });
    for (name, value) in change.as_object().unwrap() {
        policy[name] = value.clone();
    }
    policy
}

fn text_of(length: usize) -> String {
    "x".repeat(length)
}

fn bad_seconds() -> Vec<Value> {
    let numbers = [json!(0), json!(-1), json!(2_678_401), json!(1.5), json!(3600.0)];
    [json!(null), json!("3600"), json!(true)].into_iter().chain(numbers).collect()
}

/// Every field of a policy, wrong in every way; the field is the one that `param` must name.
fn bad_fields() -> Vec<(&'static str, Vec<Value>)> {
    let many: Vec<String> = (0..101).map(|_| "POST /v1/charges".to_owned()).collect();
    let pairs = |count: usize| (0..count).map(|n| (n.to_string(), "x")).collect::<Value>();
    let fields: Vec<String> = (0..11).map(|n| format!("metadata[f{n}]")).collect();
    vec![
        (
            "label",
            vec![
                json!(null),
                json!(""),
                json!(7),
                json!(["a"]),
                json!(text_of(501)),
                json!("a\nb"),
                json!("a\u{0}"),
            ],
        ),
        ("vendor", vec![json!(null), json!("paypal"), json!("Stripe"), json!(""), json!(1)]),
        (
            "allowed_endpoints",
            vec![
                json!(null),
                json!([]),
                json!("POST /v1/charges"),
                json!([7]),
                json!(many),
                json!([""]),
                json!(["*"]),
                json!(["POST /v1/*"]),
                json!(["* /v1/charges"]),
                json!(["/v1/charges"]),
                json!(["POST /v1/charges/"]),
                json!(["post /v1/charges"]),
                json!(["POST /v1/Charges"]),
                json!(["POST  /v1/charges"]),
                json!(["POST /v1/charges "]),
                json!(["POST /v1/charges?amount=5"]),
                json!(["POST /v1/../v1/charges"]),
                json!(["POST https://api.stripe.com/v1/charges"]),
                json!(["POST /stripe/v1/charges"]),
                json!(["POST /v1/charges", "POST /v1/chargess"]),
                json!(["GET /v1/*/search"]),
                json!(["GET /v1/charges/{}"]),
                json!(["GET /v1/charges/ch_1"]),
                json!(["PUT /v1/charges"]),
                // Known, and no call of them could ever be admitted under a cap.
                json!(["POST /v1/topups"]),
                json!(["POST /v1/payment_links"]),
                json!(["POST /v1/subscriptions"]),
                json!(["POST /v1/checkout/sessions"]),
                // Dangerous: by their exact names alone.
                json!(["POST /v1/customers/*"]),
                json!(["DELETE /v1/customers/*"]),
                json!(["POST /v1/payment_methods/*/attach"]),
                json!(["POST /v2/core/event_destinations"]),
            ],
        ),
        ("expires_in_seconds", bad_seconds()),
        ("max_calls", vec![json!(0), json!(-1), json!(1.5), json!("3"), json!([])]),
        ("remember_days", vec![json!(1), json!(401), json!("40"), json!(2.5)]),
        ("requests_per_second", vec![json!(0), json!(10_001), json!("25"), json!(2.5)]),
        ("client_secrets", vec![json!("true"), json!(1), json!([])]),
        ("uncapped", vec![json!("true"), json!(true)]),
        (
            "metadata",
            vec![
                json!([]),
                json!("flow"),
                json!({"a": 1}),
                json!({"a": null}),
                json!({"a": ""}),
                json!({"": "a"}),
                pairs(21),
                json!({"a": text_of(501)}),
            ],
        ),
        ("idempotency", vec![json!("maybe"), json!(""), json!(1), json!("Required")]),
        ("idempotency_scope", vec![json!("billing:2026-07"), json!(""), json!(7)]),
        ("idempotency_fields", vec![json!(["customer"]), json!("customer"), json!([7]), json!(fields)]),
    ]
}

/// Policies whose fields contradict each other, and the field that is named.
fn contradictions() -> Vec<(Value, &'static str)> {
    let of = |endpoint: &str, more: Value| {
        let mut change = json!({"allowed_endpoints": [endpoint]});
        change.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        change
    };
    let uncapped = |endpoint: &str, more: Value| {
        let mut change = of(endpoint, json!({"daily_usd_cap": null, "uncapped": true}));
        change.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        change
    };
    let content = |more: Value| {
        let mut change = json!({"idempotency": "content", "idempotency_scope": "s"});
        change.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        change
    };
    vec![
        (json!({"daily_usd_cap": null}), "daily_usd_cap"),
        (json!({"daily_usd_cap": 0}), "daily_usd_cap"),
        (json!({"daily_usd_cap": "0.00"}), "daily_usd_cap"),
        (json!({"daily_usd_cap": null, "uncapped": false}), "daily_usd_cap"),
        (json!({"daily_usd_cap": null, "total_usd_cap": 10}), "daily_usd_cap"),
        (of("POST /v1/payment_intents", json!({"daily_usd_cap": null})), "daily_usd_cap"),
        (of("POST /v1/payment_intents/*/confirm", json!({"daily_usd_cap": null})), "daily_usd_cap"),
        (of("POST /v1/refunds", json!({})), "daily_usd_out_cap"),
        (of("POST /v1/refunds", json!({"daily_usd_cap": null})), "daily_usd_out_cap"),
        (of("POST /v1/refunds", json!({"daily_usd_out_cap": null})), "daily_usd_out_cap"),
        (of("POST /v1/refunds", json!({"daily_usd_out_cap": 0})), "daily_usd_out_cap"),
        (of("POST /v1/payouts", json!({})), "daily_usd_out_cap"),
        (of("POST /v1/transfers", json!({})), "daily_usd_out_cap"),
        (of("POST /v1/charges/{charge}/refund", json!({})), "daily_usd_out_cap"),
        (
            of("POST /v1/subscriptions", json!({"daily_usd_cap": null, "max_usd_per_request": 5})),
            "daily_usd_cap",
        ),
        (of("POST /v1/subscriptions", json!({"max_usd_per_request": 33})), "max_usd_per_request"),
        (
            of("POST /v1/subscriptions", json!({"max_usd_per_request": 30, "total_usd_cap": 20})),
            "max_usd_per_request",
        ),
        // A wildcard is not an exact name, and another cap is a cap.
        (uncapped("POST /v1/disputes/*/close", json!({})), "allowed_endpoints"),
        (uncapped("POST /v1/subscriptions", json!({"total_usd_cap": 100})), "allowed_endpoints"),
        (uncapped("POST /v1/topups", json!({"max_usd_per_request": 100})), "allowed_endpoints"),
        (uncapped("POST /v1/topups", json!({"daily_usd_out_cap": 100})), "allowed_endpoints"),
        (json!({"retry_declined_after_seconds": 60}), "retry_declined_after_seconds"),
        (content(json!({"retry_declined_after_seconds": 0})), "retry_declined_after_seconds"),
        (content(json!({"retry_declined_after_seconds": 2_592_001})), "retry_declined_after_seconds"),
        (content(json!({"idempotency_scope": null})), "idempotency_scope"),
        (content(json!({"idempotency_scope": ""})), "idempotency_scope"),
        (content(json!({"idempotency_scope": text_of(501)})), "idempotency_scope"),
        (content(json!({"idempotency_fields": ["customer", "customer"]})), "idempotency_fields"),
        (content(json!({"idempotency_fields": ["a=b"]})), "idempotency_fields"),
        (content(json!({"idempotency_fields": ["metadata[]"]})), "idempotency_fields"),
        (content(json!({"idempotency_fields": [""]})), "idempotency_fields"),
        (json!({"idempotency": "client", "idempotency_scope": "s"}), "idempotency_scope"),
    ]
}

/// Bodies that only text can say.
fn bad_texts() -> Vec<(String, &'static str, &'static str)> {
    let fine = policy(&json!({})).to_string();
    let with = |more: &str| fine.replacen('{', &format!("{{{more},"), 1);
    let invalid = "parameter_invalid";
    let mut texts = vec![
        (with("\"label\":\"other\""), "request_ambiguous", "label"),
        (with("\"l\\u0061bel\":\"other\""), "request_ambiguous", "label"),
        (with("\"daily_usd_cap\":1"), "request_ambiguous", "daily_usd_cap"),
        (with("\"metadata\":{\"flow\":\"a\",\"flow\":\"b\"}"), "request_ambiguous", "metadata"),
        (with("\"daily_usd_capp\":1"), invalid, "daily_usd_capp"),
        (with("\"Label\":\"x\""), invalid, "Label"),
        (with("\"id\":\"vk_id_1\""), invalid, "id"),
        (with("\"\":1"), invalid, ""),
        ("[]".to_owned(), invalid, ""),
        ("\"x\"".to_owned(), invalid, ""),
        ("7".to_owned(), invalid, ""),
        ("null".to_owned(), invalid, ""),
        ("{".to_owned(), invalid, ""),
        (format!("{fine}x"), invalid, ""),
        (format!("{fine}{fine}"), invalid, ""),
        (format!("\u{feff}{fine}"), invalid, ""),
        (format!("{}{}", "[".repeat(20_000), "]".repeat(20_000)), invalid, ""),
        (with(&format!("\"metadata\":{}1{}", "[".repeat(5_000), "]".repeat(5_000))), invalid, ""),
        (String::new(), invalid, "label"),
        ("{}".to_owned(), invalid, "label"),
    ];
    for name in
        ["constraints", "accounts", "retry_declined_after_seconds", "budget", "stop_budget_on_refusal"]
    {
        texts.push((with(&format!("\"{name}\":1")), invalid, name));
    }
    texts
}

/// Dollars, as numbers and as strings, that are none.
fn bad_dollars() -> Vec<(String, &'static str, &'static str)> {
    let cap = |name: &str, value: &str| {
        let mut policy = policy(&json!({}));
        policy.as_object_mut().unwrap().remove(name);
        policy.to_string().replacen('{', &format!("{{\"{name}\":{value},"), 1)
    };
    let mut texts = Vec::new();
    for name in ["daily_usd_cap", "total_usd_cap", "max_usd_per_request", "daily_usd_out_cap"] {
        for value in [
            "32.999",
            "32.990",
            "\"32.999\"",
            "1e2",
            "1E2",
            "1.0e1",
            "\"1e2\"",
            "-1",
            "-0",
            "\"-1\"",
            "\"+1\"",
            "\"\"",
            "\" 1\"",
            "\"1.\"",
            "\".5\"",
            "\"1,5\"",
            "\"0x10\"",
            "\"٣\"",
            "\"NaN\"",
            "\"1_000\"",
            "true",
            "[]",
            "{}",
            "99999999999",
            "1e400",
            "100000000000000000000000000",
            "\"99999999999999999999999999\"",
        ] {
            texts.push((cap(name, value), "parameter_invalid", name));
        }
    }
    texts
}

fn mint(body: impl AsRef<[u8]>) -> Raw {
    Raw::new("POST /admin/vault_keys").bearer(ADMIN_KEY).add("Content-Type", "application/json").body(body)
}

/// Sends what must be refused; what is there must stay as it is, the log included.
async fn admin_refuses(standin: &Standin, sidecar: &Sidecar, rows: Vec<Row>) {
    let records = || async { sidecar.audit("events=all").await.len() };
    let before = (state(standin, sidecar, "none").await, records().await);
    let mut wrong = Vec::new();
    for Row { what, raw, status, code, param } in rows {
        let answer = raw.send(address(sidecar)).await;
        let named = param.is_empty() || answer.param() == Some(param);
        if (answer.status, answer.code()) != (status, code) || !named {
            let shown = raw.shown();
            wrong.push(format!(
                "{what}: {status} {code} {param:?} was {} {}: {shown}",
                answer.status, answer.text
            ));
            continue;
        }
        is_stripe_shaped(what, &answer);
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert_eq!((state(standin, sidecar, "none").await, records().await), before);
}

#[tokio::test]
async fn what_a_policy_must_not_say() {
    let (standin, sidecar) = world().await;
    let invalid = |raw, param| row("a policy", raw, 400, "parameter_invalid", param);
    let mut rows = Vec::new();
    for (field, values) in bad_fields() {
        for value in values {
            let mut change = json!({});
            change[field] = value;
            rows.push(invalid(mint(policy(&change).to_string()), field));
        }
    }
    for (change, field) in contradictions() {
        rows.push(invalid(mint(policy(&change).to_string()), field));
    }
    for (text, code, param) in bad_texts().into_iter().chain(bad_dollars()) {
        rows.push(row("a text", mint(text), 400, code, param));
    }
    rows.push(invalid(mint(b"{\"label\": \"\xff\"}"), ""));
    let mut without = policy(&json!({}));
    without.as_object_mut().unwrap().remove("daily_usd_cap");
    rows.push(invalid(mint(without.to_string()), "daily_usd_cap"));
    admin_refuses(&standin, &sidecar, rows).await;
    let told = mint(policy(&json!({"daily_usd_cap": 32.999})).to_string()).send(address(&sidecar)).await;
    assert!(told.text.contains("round"), "{}", told.text);
}

/// Ids of the right shape that belong to nothing.
fn nobodies() -> (KeyId, HoldId, CallId) {
    let at = UnixMs::from_millis(1_700_000_000_000);
    (KeyId::new(at, [1; 10]), HoldId::new(at, [1; 10]), CallId::new(at, [1; 10]))
}

fn admin(line: &str) -> Raw {
    Raw::new(line).bearer(ADMIN_KEY)
}

/// Every route of an operator's, asked by everybody else.
fn strangers(vault: &str, vault_id: &str, revoked: &str) -> Vec<Row> {
    let (_, hold, call) = nobodies();
    let issuer = KeySecret::new(KeyKind::Issuer, Mode::Test, [7; 32]).expose().to_owned();
    let mut rows = Vec::new();
    for line in [
        "POST /admin/vault_keys".to_owned(),
        "GET /admin/vault_keys".to_owned(),
        format!("GET /admin/vault_keys/{vault_id}"),
        format!("DELETE /admin/vault_keys/{vault_id}"),
        "POST /admin/kill_switch".to_owned(),
        "GET /admin/kill_switch".to_owned(),
        "POST /admin/clock".to_owned(),
        "GET /admin/holds".to_owned(),
        format!("GET /admin/holds/{hold}"),
        "GET /admin/calls".to_owned(),
        format!("GET /admin/calls/{call}"),
        "GET /audit/verify".to_owned(),
    ] {
        let raw = || {
            Raw::new(&line).body(if line.starts_with("POST") { "{\"on\":true,\"reason\":\"x\"}" } else { "" })
        };
        let unknown = |what, raw| row(what, raw, 401, "vault_key_invalid", "");
        rows.push(unknown("no key", raw()));
        rows.push(unknown("a wrong key", raw().bearer(&ADMIN_KEY.replace('0', "1"))));
        rows.push(unknown("the beginning of a key", raw().bearer(&ADMIN_KEY[..ADMIN_KEY.len() - 1])));
        rows.push(unknown("the Stripe key", raw().bearer(STRIPE_KEY)));
        rows.push(unknown("an issuer key", raw().bearer(&issuer)));
        rows.push(row("a revoked key", raw().bearer(revoked), 401, "vault_key_revoked", ""));
        rows.push(row("a vault key", raw().bearer(vault), 403, "admin_key_required", ""));
        rows.push(row("two keys", raw().bearer(vault).bearer(ADMIN_KEY), 400, "request_ambiguous", ""));
    }
    rows
}

/// Paths and methods behind which there is nothing.
fn nothing_there() -> Vec<Row> {
    let (key, hold, call) = nobodies();
    let missing = |line: &str| row("nothing there", admin(line), 404, "not_found", "");
    let mut rows = Vec::new();
    for line in [
        "GET /admin",
        "GET /admin/",
        "GET /admin/nothing",
        "GET /admin/vault_keys/",
        "GET /admin/vault_keys/x",
        "DELETE /admin/vault_keys/x",
        "GET /admin/vault_keys/%ff",
        "DELETE /admin/vault_keys/%2e%2e",
        "GET /admin/holds/x",
        "GET /admin/calls/x",
        "GET /admin/holds/%00",
        "GET /audit/x",
        "GET /ADMIN/vault_keys",
        "GET /stripe/admin/vault_keys",
        "GET //admin/vault_keys",
        // These come with later steps.
        "POST /admin/holds/x/resolve",
        "POST /admin/calls/x/forget",
        "GET /audit/nodes",
    ] {
        rows.push(missing(line));
    }
    rows.push(missing(&format!("GET /admin/vault_keys/{key}")));
    rows.push(missing(&format!("DELETE /admin/vault_keys/{key}")));
    rows.push(missing(&format!("GET /admin/holds/{hold}")));
    rows.push(missing(&format!("GET /admin/calls/{call}")));
    for line in [
        "PUT /admin/vault_keys",
        "DELETE /admin/vault_keys",
        "POST /audit",
        "POST /admin/vault_keys/x",
        "PATCH /audit",
    ] {
        rows.push(row("another method", admin(line), 405, "method_not_allowed", ""));
    }
    rows
}

fn bad_queries() -> Vec<Row> {
    let mut rows = Vec::new();
    for (query, param) in [
        ("/admin/vault_keys?limit=0", "limit"),
        ("/admin/vault_keys?limit=1001", "limit"),
        ("/admin/vault_keys?limit=x", "limit"),
        ("/admin/vault_keys?limit=1&limit=2", "limit"),
        ("/admin/vault_keys?status=gone", "status"),
        ("/admin/vault_keys?cursor=x", "cursor"),
        ("/admin/vault_keys?colour=red", "colour"),
        ("/admin/vault_keys?issuer=x", "issuer"),
        ("/admin/holds?state=lost", "state"),
        ("/admin/calls?state=lost", "state"),
        ("/admin/calls?cursor=x", "cursor"),
        ("/audit?limit=0", "limit"),
        ("/audit?since=yesterday", "since"),
        ("/audit?until=2026", "until"),
        ("/audit?events=some", "events"),
        ("/audit?order=random", "order"),
        ("/audit?fleet=true", "fleet"),
        ("/audit?cursor=-1", "cursor"),
        ("/audit?custommer=cus_9", "custommer"),
        ("/audit?label=a&label=b", "label"),
        ("/audit?metadata=x", "metadata"),
    ] {
        rows.push(row("a bad query", admin(&format!("GET {query}")), 400, "parameter_invalid", param));
    }
    rows
}

fn bad_bodies() -> Vec<Row> {
    let mut rows = Vec::new();
    let reason = |body: &str| admin("POST /admin/kill_switch").body(body);
    for (body, param) in [
        ("{}", "on"),
        ("{\"on\":\"yes\",\"reason\":\"x\"}", "on"),
        ("{\"on\":true}", "reason"),
        ("{\"on\":true,\"reason\":\"\"}", "reason"),
        ("{\"on\":true,\"reason\":\" \"}", "reason"),
        ("{\"on\":true,\"reason\":7}", "reason"),
        ("{\"on\":true,\"reason\":\"x\",\"off\":1}", "off"),
        ("[]", ""),
    ] {
        rows.push(row("a bad switch", reason(body), 400, "parameter_invalid", param));
    }
    let large = text_of(65 << 10);
    rows.push(row("a large body", mint(&large), 413, "body_too_large", ""));
    rows.push(row(
        "a large body of a stranger",
        Raw::new("POST /admin/vault_keys").body(text_of(4 << 20)),
        413,
        "body_too_large",
        "",
    ));
    rows.push(row(
        "large chunks",
        mint(&large).chunked().add("Transfer-Encoding", "chunked"),
        413,
        "body_too_large",
        "",
    ));
    rows.push(row(
        "a compressed body",
        mint("{}").add("Content-Encoding", "gzip"),
        415,
        "encoding_not_allowed",
        "",
    ));
    rows
}

#[tokio::test]
async fn who_may_not_ask_and_for_what() {
    let (standin, sidecar) = world().await;
    let (vault, vault_id) = sidecar.mint("50", json!({})).await;
    let (revoked, revoked_id) = sidecar.mint("50", json!({})).await;
    sidecar.admin("DELETE", &format!("/admin/vault_keys/{revoked_id}"), None).await;
    let mut rows = strangers(&vault, &vault_id, &revoked);
    rows.extend(nothing_there());
    rows.extend(bad_queries());
    rows.extend(bad_bodies());
    admin_refuses(&standin, &sidecar, rows).await;
    assert_eq!(sidecar.admin("GET", "/admin/kill_switch", None).await.body["on"], false);
}
