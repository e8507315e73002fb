//! What a key grants beyond operations and dollars: constraints, accounts, issuers and budgets.

use serde_json::{Value, json};

use crate::families::script;
use crate::raw::Raw;
use crate::standin::Options;
use crate::support::{Reply, Sidecar, world};

/// A charge with these parameters beside the usual ones.
async fn charge(sidecar: &Sidecar, key: &str, idempotency_key: &str, form: &[(&str, &str)]) -> Reply {
    let mut all = vec![("currency", "usd"), ("source", "tok_visa")];
    all.extend(form);
    sidecar.call("POST", "/v1/charges", key, &[("idempotency-key", idempotency_key)], &all).await
}

async fn issuer(sidecar: &Sidecar, more: Value) -> (String, String) {
    let mut bounds = json!({
        "name": "billing flows",
        "label_prefix": "kestra-",
        "allowed_endpoints": ["POST /v1/charges", "GET /v1/charges/{id}"],
        "max_cap_usd": 50,
        "daily_usd_cap": 100,
        "expires_in_seconds": 7200,
        "max_expires_in_seconds": 3600,
    });
    for (name, value) in more.as_object().unwrap() {
        bounds[name] = value.clone();
    }
    let reply = sidecar.admin("POST", "/admin/issuers", Some(&bounds)).await;
    assert_eq!(reply.status, 201, "{}", reply.text);
    let text = |field: &str| reply.body[field].as_str().unwrap().to_owned();
    assert!(text("issuer_key").starts_with("ik_test_"));
    (text("issuer_key"), text("id"))
}

fn policy(more: &Value) -> Value {
    let mut policy = json!({
        "label": "kestra-cus_9",
        "vendor": "stripe",
        "allowed_endpoints": ["POST /v1/charges"],
        "daily_usd_cap": 32.99,
        "expires_in_seconds": 600,
    });
    for (name, value) in more.as_object().unwrap() {
        policy[name] = value.clone();
    }
    policy
}

#[tokio::test]
async fn constraints_bind_what_is_sent_and_what_is_left_out() {
    let (standin, sidecar) = world().await;
    let constraints =
        json!({"customer": ["cus_9"], "amount": {"min": 100, "max": 2999}, "currency": ["USD"]});
    let (key, _) = sidecar.mint("1000", json!({"constraints": constraints})).await;
    for (form, param) in [
        (&[("amount", "2999"), ("customer", "cus_8")][..], "customer"),
        (&[("amount", "2999")], "customer"),
        (&[("amount", "2999"), ("customer", "")], "customer"),
        (&[("amount", "3000"), ("customer", "cus_9")], "amount"),
        (&[("amount", "29"), ("customer", "cus_9")], "amount"),
    ] {
        let reply = charge(&sidecar, &key, "k-1", form).await;
        assert_eq!(reply.verdict(), (403, "parameter_not_allowed"), "{form:?}: {}", reply.text);
        assert_eq!(reply.body["error"]["param"], param);
        assert!(!reply.text.contains("cus_8"), "a value is never echoed");
    }
    assert_eq!(standin.executed().len(), 0);
    let reply = charge(&sidecar, &key, "k-1", &[("amount", "2999"), ("customer", "cus_9")]).await;
    assert_eq!(reply.status, 200, "{}", reply.text);
}

#[tokio::test]
async fn an_object_keeps_the_constraints_that_a_later_call_leaves_to_it() {
    let (standin, sidecar) = world().await;
    let endpoints = json!(["POST /v1/payment_intents", "POST /v1/payment_intents/{id}/confirm"]);
    let (open, _) = sidecar.mint("1000", json!({"allowed_endpoints": endpoints})).await;
    let mut intents = Vec::new();
    for (key, customer) in [("a", "cus_9"), ("b", "cus_8")] {
        let form = [
            ("amount", "500"),
            ("currency", "usd"),
            ("customer", customer),
            ("payment_method", "pm_card_visa"),
        ];
        let reply =
            sidecar.call("POST", "/v1/payment_intents", &open, &[("idempotency-key", key)], &form).await;
        intents.push(reply.body["id"].as_str().unwrap().to_owned());
    }
    let more = json!({"allowed_endpoints": endpoints, "constraints": {"customer": ["cus_9"]}});
    let (bound, _) = sidecar.mint("1000", more).await;
    let confirm = async |id: &str, key: &str| {
        let path = format!("/v1/payment_intents/{id}/confirm");
        sidecar.call("POST", &path, &bound, &[("idempotency-key", key)], &[]).await
    };
    let foreign = confirm(&intents[1], "c-2").await;
    assert_eq!(foreign.verdict(), (403, "parameter_not_allowed"), "{}", foreign.text);
    assert_eq!(standin.executed().len(), 0);
    assert_eq!(confirm(&intents[0], "c-1").await.status, 200);
    assert_eq!(standin.executed().len(), 1);
}

#[tokio::test]
async fn money_goes_elsewhere_only_where_the_key_says_so() {
    let (_standin, sidecar) = world().await;
    let (plain, _) = sidecar.mint("1000", json!({})).await;
    let more = json!({"constraints": {"transfer_data[destination]": ["acct_shop"]}});
    let (bound, _) = sidecar.mint("1000", more).await;
    let form = |to| [("amount", "500"), ("customer", "cus_9"), ("transfer_data[destination]", to)];
    assert_eq!(
        charge(&sidecar, &plain, "k", &form("acct_shop")).await.verdict(),
        (403, "parameter_not_allowed")
    );
    assert_eq!(
        charge(&sidecar, &bound, "k", &form("acct_other")).await.verdict(),
        (403, "parameter_not_allowed")
    );
    let allowed = charge(&sidecar, &bound, "k", &form("acct_shop")).await;
    assert_ne!(allowed.status, 403, "{}", allowed.text);
}

#[tokio::test]
async fn a_connected_account_must_be_granted() {
    let options = Options { connected: vec!["acct_shop".into(), "acct_other".into()], ..Options::default() };
    let (standin, sidecar) = crate::support::world_of(options, &[]).await;
    let (key, _) = sidecar.mint("1000", json!({"accounts": ["acct_shop"]})).await;
    let form = [("amount", "500"), ("currency", "usd"), ("source", "tok_visa")];
    let to = async |account: &str, idempotency_key: &str| {
        let headers = [("idempotency-key", idempotency_key), ("stripe-account", account)];
        sidecar.call("POST", "/v1/charges", &key, &headers, &form).await
    };
    assert_eq!(to("acct_other", "k-1").await.verdict(), (403, "account_not_allowed"));
    let made = to("acct_shop", "k-1").await;
    assert_eq!(made.status, 200, "{}", made.text);
    assert_eq!(to("acct_shop", "k-1").await.header("idempotent-replayed"), Some("true"));
    let own = sidecar.call("POST", "/v1/charges", &key, &[("idempotency-key", "k-1")], &form).await;
    assert_eq!(own.verdict(), (400, "idempotency_error"), "the same key on another account is another call");
    let context = sidecar.call("GET", "/v1/charges", &key, &[("stripe-context", "acct_shop")], &[]).await;
    assert_eq!(context.status, 403);
    assert_eq!(standin.executed().len(), 1);
}

#[tokio::test]
async fn an_issuer_mints_within_its_bounds_and_nothing_else() {
    let (_standin, sidecar) = world().await;
    let (ik, _) =
        issuer(&sidecar, json!({"constraints": {"currency": ["usd"]}, "max_usd_per_request": 40})).await;
    let mint = async |more: Value| sidecar.json("POST", "/admin/vault_keys", &ik, Some(&policy(&more))).await;
    for (more, param) in [
        (json!({"label": "other-cus_9"}), "label"),
        (json!({"allowed_endpoints": ["POST /v1/payment_intents"]}), "allowed_endpoints"),
        (json!({"allowed_endpoints": ["GET /v1/charges/*"]}), "allowed_endpoints"),
        (json!({"daily_usd_cap": 50.01}), "daily_usd_cap"),
        (json!({"daily_usd_cap": "50.01"}), "daily_usd_cap"),
        (json!({"total_usd_cap": 51}), "total_usd_cap"),
        (json!({"max_usd_per_request": 40.01}), "max_usd_per_request"),
        (json!({"daily_usd_cap": null, "uncapped": true}), "uncapped"),
        (json!({"expires_in_seconds": 3601}), "expires_in_seconds"),
        (json!({"constraints": {"currency": ["usd", "eur"]}}), "constraints"),
        (json!({"accounts": ["acct_1"]}), "accounts"),
        (json!({"client_secrets": true}), "client_secrets"),
    ] {
        let reply = mint(more.clone()).await;
        assert_eq!(reply.verdict(), (403, "parameter_not_allowed"), "{more}: {}", reply.text);
        assert_eq!(reply.body["error"]["param"], param, "{more}");
    }
    let made = mint(json!({})).await;
    assert_eq!(made.status, 201, "{}", made.text);
    assert_eq!(made.body["max_usd_per_request"], "40.00", "what is left out is the issuer's");
    assert_eq!(made.body["constraints"], json!({"currency": ["usd"]}));
    for (method, path) in [
        ("GET", "/admin/issuers"),
        ("GET", "/admin/holds"),
        ("GET", "/admin/kill_switch"),
        ("POST", "/admin/issuers"),
    ] {
        let reply = sidecar.json(method, path, &ik, None).await;
        assert_eq!(reply.verdict(), (403, "admin_key_required"), "{method} {path}");
    }
    let (_, others) = sidecar.mint("5", json!({"label": "kestra-of-the-admin"})).await;
    let listed = sidecar.json("GET", "/admin/vault_keys", &ik, None).await;
    assert_eq!(listed.body["data"].as_array().unwrap().len(), 1, "only its own: {}", listed.text);
    let revoked = sidecar.json("DELETE", &format!("/admin/vault_keys/{others}"), &ik, None).await;
    assert_eq!(revoked.status, 404, "another's key is out of reach");
    let own = made.body["id"].as_str().unwrap();
    assert_eq!(sidecar.json("DELETE", &format!("/admin/vault_keys/{own}"), &ik, None).await.status, 200);
    let spend =
        sidecar.call("POST", "/v1/charges", &ik, &[("idempotency-key", "k")], &[("amount", "1")]).await;
    assert_eq!(spend.status, 401, "an issuer key charges nothing");
}

/// Whatever the JSON looks like: either it is no policy, or it is outside of the bounds, or the bounds hold in the key.
#[tokio::test]
async fn no_encoding_gets_an_issuer_past_its_bounds() {
    let (_standin, sidecar) = world().await;
    let bounds =
        json!({"constraints": {"currency": ["usd"]}, "max_usd_per_request": 40, "idempotency": "required"});
    let (ik, _) = issuer(&sidecar, bounds).await;
    let base = r#""label":"kestra-a","vendor":"stripe","allowed_endpoints":["POST /v1/charges"]"#;
    let ends = r#""daily_usd_cap":50,"expires_in_seconds":600"#;
    for (policy, status) in [
        // Amounts.
        (format!(r#"{{{base},"daily_usd_cap":5001e-2,"expires_in_seconds":600}}"#), 400),
        (format!(r#"{{{base},"daily_usd_cap":"5001e-2","expires_in_seconds":600}}"#), 400),
        (format!(r#"{{{base},"daily_usd_cap":"0000050.01","expires_in_seconds":600}}"#), 403),
        (format!(r#"{{{base},"daily_usd_cap":"+50.01","expires_in_seconds":600}}"#), 400),
        (format!(r#"{{{base},"daily_usd_cap":50.010,"expires_in_seconds":600}}"#), 400),
        (format!(r#"{{{base},"daily_usd_cap":18446744073709.55,"expires_in_seconds":600}}"#), 400),
        (format!(r#"{{{base},"daily_usd_cap":"９９","expires_in_seconds":600}}"#), 400),
        (format!(r#"{{{base},"daily_usd_cap":[60],"expires_in_seconds":600}}"#), 400),
        // Names: escaped, repeated, in another case.
        (format!(r#"{{{base},"daily_usd_c\u0061p":60,"expires_in_seconds":600}}"#), 403),
        (format!(r#"{{{base},{ends},"daily_usd_c\u0061p":60}}"#), 400),
        (format!(r#"{{{base},"daily_usd_cap":60,{ends}}}"#), 400),
        (format!(r#"{{{base},{ends},"Daily_usd_cap":60}}"#), 400),
        (format!(r#"{{{base},{ends},"total_usd_cap":60}}"#), 403),
        (format!(r#"{{{base},{ends},"daily_usd_out_cap":60}}"#), 403),
        (format!(r#"{{{base},{ends},"max_usd_per_request":"40.01"}}"#), 403),
        (format!(r#"{{{base},{ends},"max_usd_per_request":null}}"#), 201),
        // Life.
        (format!(r#"{{{base},"daily_usd_cap":50,"expires_in_seconds":3601}}"#), 403),
        (format!(r#"{{{base},"daily_usd_cap":50,"expires_in_seconds":3.6e3}}"#), 400),
        (format!(r#"{{{base},"daily_usd_cap":50,"expires_in_seconds":-1}}"#), 400),
        (format!(r#"{{{base},"daily_usd_cap":50,"expires_in_seconds":18446744073709551615}}"#), 400),
        // Lists and objects.
        (format!(r#"{{{base},{ends},"allowed_endpoints":["POST /v1/payouts"]}}"#), 400),
        (format!(r#"{{{base},{ends},"constraints":{{"currency":["usd"],"currency":["eur"]}}}}"#), 400),
        (format!(r#"{{{base},{ends},"constraints":{{"c\u0075rrency":["eur"]}}}}"#), 403),
        (format!(r#"{{{base},{ends},"constraints":{{"currency":{{"min":0}}}}}}"#), 403),
        (format!(r#"{{{base},{ends},"constraints":{{"currency ":["eur"]}}}}"#), 400),
        (format!(r#"{{{base},{ends},"constraints":{{"Currency":["eur"]}}}}"#), 201),
        (format!(r#"{{{base},{ends},"constraints":null}}"#), 201),
        (format!(r#"{{{base},{ends},"idempotency":"client"}}"#), 403),
        (format!(r#"{{{base},{ends},"uncapped":false}}"#), 201),
        (format!(r#"{{{base},{ends},"issuer":null}}"#), 400),
        (format!(r"[{{{base},{ends}}}]"), 400),
        (format!(r"{{{base},{ends}}}{{}}"), 400),
    ] {
        let raw = Raw::new("POST /admin/vault_keys").bearer(&ik).add("Content-Type", "application/json");
        let answer = raw.body(&policy).send(sidecar.base.strip_prefix("http://").unwrap()).await;
        assert_eq!(answer.status, status, "{policy}: {}", answer.text);
        if status == 201 {
            assert_eq!(answer.body["constraints"]["currency"], json!(["usd"]), "{policy}");
            assert_eq!(answer.body["max_usd_per_request"], "40.00", "{policy}");
        }
    }
    let minted = sidecar.json("GET", "/admin/vault_keys", &ik, None).await;
    assert_eq!(minted.body["data"].as_array().unwrap().len(), 4, "{}", minted.text);
}

#[tokio::test]
async fn an_issuer_bounds_what_nobody_can_price_and_what_goes_out() {
    let (standin, sidecar) = world().await;
    let subscriptions = json!({"allowed_endpoints": ["POST /v1/subscriptions"], "name": "a", "label_prefix": "kestra-",
        "daily_usd_cap": 100, "expires_in_seconds": 600});
    let refused = sidecar.admin("POST", "/admin/issuers", Some(&subscriptions)).await;
    assert_eq!(refused.verdict(), (400, "parameter_invalid"), "it has no ceiling: {}", refused.text);
    let grants = json!(["POST /v1/subscriptions", "POST /v1/payouts"]);
    let bounds = json!({"allowed_endpoints": grants, "max_usd_per_request": 20, "daily_usd_out_cap": 30});
    let (ik, _) = issuer(&sidecar, bounds).await;
    let mint = async |more: Value| {
        let policy = policy(&more);
        sidecar.json("POST", "/admin/vault_keys", &ik, Some(&policy)).await
    };
    let made = mint(json!({"allowed_endpoints": ["POST /v1/subscriptions"]})).await;
    assert_eq!((made.status, &made.body["max_usd_per_request"]), (201, &json!("20.00")), "{}", made.text);
    let more = json!({"allowed_endpoints": ["POST /v1/subscriptions"], "max_usd_per_request": 21});
    assert_eq!(mint(more).await.body["error"]["param"], "max_usd_per_request");
    // Together its keys send out no more than it may.
    let mut verdicts = Vec::new();
    for n in 0..3 {
        let made = mint(json!({"allowed_endpoints": ["POST /v1/payouts"], "daily_usd_out_cap": 20})).await;
        let key = made.body["vault_key"].as_str().unwrap().to_owned();
        let form = [("amount", "2000"), ("currency", "usd")];
        let payout =
            json!({"id": "po_1", "object": "payout", "currency": "usd", "amount": 2000, "status": "paid"});
        script(&standin, "POST /v1/payouts", 200, payout);
        let reply = sidecar.post(&key, "/v1/payouts", &format!("p-{n}"), &form).await;
        verdicts.push(reply.body["error"]["cap"].as_str().unwrap_or("sent").to_owned());
    }
    assert_eq!(verdicts, ["sent", "issuer", "issuer"]);
}

#[tokio::test]
async fn keys_of_one_issuer_cannot_outspend_it_together() {
    let (standin, sidecar) = world().await;
    let (ik, id) = issuer(&sidecar, json!({"daily_usd_cap": 70})).await;
    let mut codes = Vec::new();
    for n in 0..4 {
        let made = sidecar.json("POST", "/admin/vault_keys", &ik, Some(&policy(&json!({})))).await;
        let key = made.body["vault_key"].as_str().unwrap().to_owned();
        let reply = sidecar.charge(&key, &format!("k-{n}"), 3000, "cus_9").await;
        codes.push(reply.status);
        if reply.status == 429 {
            assert_eq!(reply.body["error"]["cap"], "issuer", "{}", reply.text);
        }
    }
    assert_eq!(codes, [200, 200, 429, 429]);
    assert_eq!(standin.executed().len(), 2);
    let shown = sidecar.admin("GET", &format!("/admin/issuers/{id}"), None).await;
    assert_eq!(shown.body["spend"]["today"]["spent"], "60.00");
    assert_eq!(shown.body["spend"]["today"]["remaining"], "10.00");
}

#[tokio::test]
async fn revoking_an_issuer_ends_what_it_minted() {
    let (standin, mut sidecar) = world().await;
    let (ik, id) = issuer(&sidecar, json!({})).await;
    let made = sidecar.json("POST", "/admin/vault_keys", &ik, Some(&policy(&json!({})))).await;
    let key = made.body["vault_key"].as_str().unwrap().to_owned();
    assert_eq!(sidecar.charge(&key, "k-1", 100, "cus_9").await.status, 200);
    assert_eq!(sidecar.admin("DELETE", &format!("/admin/issuers/{id}"), None).await.status, 200);
    for _ in 0..2 {
        assert_eq!(sidecar.charge(&key, "k-2", 100, "cus_9").await.verdict(), (401, "vault_key_revoked"));
        assert_eq!(sidecar.charge(&key, "k-1", 100, "cus_9").await.status, 401, "replays too");
        let mint = sidecar.json("POST", "/admin/vault_keys", &ik, Some(&policy(&json!({})))).await;
        assert_eq!(mint.status, 401);
        sidecar.kill();
        sidecar.restart().await;
    }
    assert_eq!(standin.executed().len(), 1);
}

#[tokio::test]
async fn twenty_keys_of_one_budget_stay_under_one_cap() {
    let (standin, sidecar) = world().await;
    let (ik, _) = issuer(&sidecar, json!({"daily_usd_cap": 10000})).await;
    let mut keys = Vec::new();
    for _ in 0..20 {
        let more = json!({"daily_usd_cap": 50, "budget": "july"});
        let made = sidecar.json("POST", "/admin/vault_keys", &ik, Some(&policy(&more))).await;
        keys.push(made.body["vault_key"].as_str().unwrap().to_owned());
    }
    let calls = (0..200).map(|n| {
        let (key, sidecar) = (&keys[n % 20], &sidecar);
        async move { sidecar.charge(key, &format!("k-{n}"), 100, &format!("cus_{n}")).await }
    });
    let replies = futures_of(calls).await;
    let made = replies.iter().filter(|reply| reply.status == 200).count();
    let refused = replies.iter().filter(|reply| reply.code() == "spend_cap_exceeded").count();
    assert_eq!((made, refused), (50, 150));
    assert!(
        replies
            .iter()
            .filter(|reply| reply.status == 429)
            .all(|reply| reply.body["error"]["cap"] == "budget")
    );
    assert_eq!(standin.executed().iter().map(|one| one.amount).sum::<u64>(), 5000);
}

/// A parallel group as `charge_items` of kestra/flows has it: a key for each item, and one item's amount wrong.
#[tokio::test]
async fn of_two_hundred_items_at_once_the_one_at_a_hundred_times_its_price_stops_the_others() {
    let (standin, sidecar) = world().await;
    let (ik, _) = issuer(&sidecar, json!({"daily_usd_cap": 10000, "max_cap_usd": 10000})).await;
    let more = json!({
        "daily_usd_cap": 2998, "max_usd_per_request": 14.99, "budget": "july", "stop_budget_on_refusal": true,
    });
    let mut keys = Vec::new();
    for _ in 0..200 {
        let made = sidecar.json("POST", "/admin/vault_keys", &ik, Some(&policy(&more))).await;
        keys.push(made.body["vault_key"].as_str().unwrap().to_owned());
    }
    let items = keys.iter().enumerate().map(|(n, key)| {
        let (amount, sidecar) = (if n == 120 { 149_900 } else { 1499 }, &sidecar);
        async move { sidecar.charge(key, &format!("k-{n}"), amount, &format!("cus_{n}")).await }
    });
    let replies = futures_of(items).await;
    let of = |code: &str| replies.iter().filter(|reply| reply.code() == code).count();
    let made = replies.iter().filter(|reply| reply.status == 200).count();
    assert_eq!(replies[120].verdict(), (429, "spend_cap_exceeded"));
    assert_eq!((of("spend_cap_exceeded"), made + of("budget_stopped")), (1, 199));
    let executed = standin.executed();
    assert_eq!(executed.len(), made);
    assert!(executed.iter().all(|one| one.amount == 1499));
    let late = sidecar.charge(&keys[0], "k-late", 1499, "cus_late").await;
    assert_eq!(late.verdict(), (429, "budget_stopped"));
}

#[tokio::test]
async fn the_first_refusal_stops_a_budget_until_it_is_resumed() {
    let (standin, mut sidecar) = world().await;
    let more = json!({"budget": "july", "stop_budget_on_refusal": true});
    let (first, _) = sidecar.mint("50", more.clone()).await;
    assert_eq!(sidecar.charge(&first, "k-1", 1000, "cus_1").await.status, 200);
    // The one with its amount a hundred times too high.
    assert_eq!(sidecar.charge(&first, "k-2", 100_000, "cus_2").await.verdict(), (429, "spend_cap_exceeded"));
    let stopped = (429, "budget_stopped");
    assert_eq!(sidecar.charge(&first, "k-3", 1000, "cus_3").await.verdict(), stopped);
    let (later, _) = sidecar.mint("50", more).await;
    assert_eq!(sidecar.charge(&later, "k-4", 1000, "cus_4").await.verdict(), stopped, "keys made later too");
    assert_eq!(sidecar.charge(&later, "k-1", 1000, "cus_1").await.status, 200, "replays pass");
    sidecar.kill();
    sidecar.restart().await;
    let reply = sidecar.charge(&first, "k-5", 1000, "cus_5").await;
    assert_eq!(reply.verdict(), stopped, "across restarts");
    assert_eq!(reply.header("stripe-should-retry"), Some("false"));
    let (other, _) = sidecar.mint("50", json!({"budget": "august"})).await;
    assert_eq!(sidecar.charge(&other, "k-6", 1000, "cus_6").await.status, 200, "another budget goes on");
    let path = "/admin/budgets/admin/july";
    assert_eq!(sidecar.admin("GET", path, None).await.body["stopped"], true);
    let reason = json!({"reason": "the price list was mended"});
    let resumed = sidecar.admin("POST", &format!("{path}/resume"), Some(&reason)).await;
    assert_eq!(resumed.body["stopped"], false, "{}", resumed.text);
    assert_eq!(sidecar.charge(&first, "k-5", 1000, "cus_5").await.status, 200);
    assert_eq!(standin.executed().len(), 3);
    let events = sidecar.audit("events=all").await;
    let of = |name: &str| events.iter().filter(|event| event["event"] == name).count();
    assert_eq!((of("budget_stopped"), of("budget_resumed")), (1, 1));
}

/// A payment intent of this customer (of none when empty), ready to be confirmed; its id.
async fn intent_of(sidecar: &Sidecar, key: &str, idempotency_key: &str, more: &[(&str, &str)]) -> String {
    let mut form = vec![("amount", "500"), ("currency", "usd"), ("payment_method", "pm_card_visa")];
    form.extend(more);
    let headers = [("idempotency-key", idempotency_key)];
    let made = sidecar.call("POST", "/v1/payment_intents", key, &headers, &form).await;
    assert_eq!(made.status, 200, "{}", made.text);
    made.body["id"].as_str().unwrap().to_owned()
}

/// Saying whose an object is does not make it his: a constrained key named its own customer on an object of nobody's,
/// was refused by Stripe, and could use the object from then on.
#[tokio::test]
async fn a_constrained_key_cannot_write_its_customer_onto_an_object() {
    let (standin, sidecar) = world().await;
    let endpoints = json!(["POST /v1/payment_intents", "POST /v1/payment_intents/{id}/confirm"]);
    let (open, _) = sidecar.mint("1000", json!({"allowed_endpoints": endpoints})).await;
    let id = intent_of(&sidecar, &open, "a", &[]).await;
    let more = json!({"allowed_endpoints": endpoints, "constraints": {"customer": ["cus_9"]}});
    let (bound, _) = sidecar.mint("1000", more).await;
    let path = format!("/v1/payment_intents/{id}/confirm");
    for (key, form) in [("c-1", &[][..]), ("c-2", &[("customer", "cus_9")]), ("c-3", &[])] {
        let reply = sidecar.call("POST", &path, &bound, &[("idempotency-key", key)], form).await;
        assert_eq!(reply.verdict(), (403, "parameter_not_allowed"), "{key}: {}", reply.text);
    }
    assert_eq!(standin.executed().len(), 0);
}

#[tokio::test]
async fn a_constrained_key_neither_cancels_nor_captures_around_its_constraints() {
    let (standin, sidecar) = world().await;
    let endpoints = json!([
        "POST /v1/payment_intents",
        "POST /v1/payment_intents/{id}/capture",
        "POST /v1/payment_intents/{id}/cancel"
    ]);
    let (open, _) = sidecar.mint("1000", json!({"allowed_endpoints": endpoints})).await;
    let manual = [("confirm", "true"), ("capture_method", "manual")];
    let mut ids = Vec::new();
    for (key, customer) in [("a", "cus_8"), ("b", "cus_9")] {
        let more = [&manual[..], &[("customer", customer)]].concat();
        ids.push(intent_of(&sidecar, &open, key, &more).await);
    }
    let more = json!({"allowed_endpoints": endpoints, "constraints": {"customer": ["cus_9"]}});
    let (bound, _) = sidecar.mint("1000", more).await;
    let cancel = async |id: &str| {
        let path = format!("/v1/payment_intents/{id}/cancel");
        sidecar.call("POST", &path, &bound, &[], &[]).await.status
    };
    assert_eq!((cancel(&ids[0]).await, cancel("pi_unknown").await, cancel(&ids[1]).await), (403, 404, 200));
    let more = json!({"allowed_endpoints": endpoints, "constraints": {"amount": ["500"]}});
    let (exact, _) = sidecar.mint("1000", more).await;
    let path = format!("/v1/payment_intents/{}/capture", ids[0]);
    let capture = async |form: &[(&str, &str)]| {
        sidecar.call("POST", &path, &exact, &[("idempotency-key", "z")], form).await
    };
    let part = capture(&[("amount_to_capture", "50")]).await;
    assert_eq!(part.verdict(), (403, "parameter_not_allowed"), "another name for the amount");
    assert_eq!(capture(&[]).await.status, 200);
    assert_eq!(standin.executed().last().map(|one| one.amount), Some(500));
}

/// Stripe takes its own account's id in `Stripe-Account` for no header at all: one call had two names.
#[tokio::test]
async fn the_own_account_has_one_name() {
    let (standin, sidecar) = world().await;
    let own = Options::default().account;
    let content = json!({"accounts": [own], "idempotency": "content", "idempotency_scope": "b:1"});
    let (key, _) = sidecar.mint("1000", content).await;
    let form = [("amount", "500"), ("currency", "usd"), ("customer", "cus_8"), ("source", "tok_visa")];
    assert_eq!(sidecar.call("POST", "/v1/charges", &key, &[], &form).await.status, 200);
    let named = sidecar.call("POST", "/v1/charges", &key, &[("stripe-account", &own)], &form).await;
    assert_eq!(named.verdict(), (403, "account_not_allowed"), "{}", named.text);
    assert_eq!(standin.executed().len(), 1);
}

#[tokio::test]
async fn a_call_without_a_price_leaves_the_hold_its_object() {
    let (_standin, sidecar) = world().await;
    let endpoints = json!([
        "POST /v1/payment_intents",
        "POST /v1/payment_intents/{id}",
        "POST /v1/payment_intents/{id}/confirm"
    ]);
    let more = json!({"allowed_endpoints": endpoints, "uncapped": true, "daily_usd_cap": null});
    let (free, _) = sidecar.mint_policy(&policy(&more)).await;
    let id = intent_of(&sidecar, &free, "a", &[]).await;
    let update = async |id: &str, key: &str, form: &[(&str, &str)]| {
        sidecar
            .call("POST", &format!("/v1/payment_intents/{id}"), &free, &[("idempotency-key", key)], form)
            .await
    };
    assert_eq!(update(&id, "b", &[("description", "x")]).await.status, 200);
    let path = format!("/v1/payment_intents/{id}/confirm");
    let confirmed = sidecar.call("POST", &path, &free, &[("idempotency-key", "c")], &[]).await;
    assert_eq!(confirmed.status, 200, "the intent is still known: {}", confirmed.text);
    let (capped, _) = sidecar.mint("10", json!({"allowed_endpoints": ["POST /v1/payment_intents"]})).await;
    let held = intent_of(&sidecar, &capped, "d", &[]).await;
    let raised = update(&held, "e", &[("amount", "90000")]).await;
    assert_eq!(raised.verdict(), (429, "spend_cap_exceeded"), "the key that pays has a cap: {}", raised.text);
}

#[tokio::test]
async fn no_key_raises_what_another_issuers_key_pays_for() {
    let (_standin, sidecar) = world().await;
    let increment = "POST /v1/payment_intents/{id}/increment_authorization";
    let endpoints = json!(["POST /v1/payment_intents", increment]);
    let (rich, id) = sidecar.mint("1000", json!({"allowed_endpoints": endpoints})).await;
    let manual = [("confirm", "true"), ("capture_method", "manual"), ("customer", "cus_9")];
    let intent = intent_of(&sidecar, &rich, "a", &manual).await;
    let (ik, _) = issuer(&sidecar, json!({"allowed_endpoints": [increment]})).await;
    let made = sidecar
        .json("POST", "/admin/vault_keys", &ik, Some(&policy(&json!({"allowed_endpoints": [increment]}))))
        .await;
    let poor = made.body["vault_key"].as_str().unwrap().to_owned();
    let path = format!("/v1/payment_intents/{intent}/increment_authorization");
    let raised =
        sidecar.call("POST", &path, &poor, &[("idempotency-key", "i")], &[("amount", "90000")]).await;
    assert_eq!(raised.verdict(), (403, "parameter_not_allowed"), "{}", raised.text);
    assert_eq!(sidecar.spend(&id).await.1, "5.00");
}

/// Runs all at once and waits for all.
async fn futures_of<F: Future>(futures: impl Iterator<Item = F>) -> Vec<F::Output> {
    let mut waiting: Vec<_> = futures.map(|future| (Box::pin(future), None)).collect();
    std::future::poll_fn(|context| {
        for (future, output) in waiting.iter_mut().filter(|(_, output)| output.is_none()) {
            if let std::task::Poll::Ready(ready) = future.as_mut().poll(context) {
                *output = Some(ready);
            }
        }
        if waiting.iter().all(|(_, output)| output.is_some()) {
            std::task::Poll::Ready(())
        } else {
            std::task::Poll::Pending
        }
    })
    .await;
    waiting.into_iter().filter_map(|(_, output)| output).collect()
}
