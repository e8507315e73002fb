//! The families of billing: what is read first, what is held for it, and what an answer makes of that.
//!
//! The stand-in executes charges, intents and refunds; what Stripe answers for invoices, subscriptions and the like is
//! scripted here, in the shapes of its API reference.

use serde_json::{Value, json};

use crate::standin::engine::Seen;
use crate::standin::faults::{Fault, On, Scripted};
use crate::standin::{Options, Standin};
use crate::support::{Reply, STRIPE_KEY, Sidecar, client, world, world_with};

/// Answers the next request of this kind with this.
pub(crate) fn script(standin: &Standin, request: &str, status: u16, body: Value) {
    let (method, prefix) = request.split_once(' ').unwrap();
    let on = On::Path { method: method.to_owned(), prefix: prefix.to_owned() };
    let headers = [("content-type".to_owned(), "application/json".to_owned())].into();
    standin.fault(Scripted { fault: Fault::Answer { status, body, headers }, on, count: 1 });
}

/// An invoice with these fields.
pub(crate) fn invoice(more: &Value) -> Value {
    let mut invoice = json!({
        "id": "in_1", "object": "invoice", "currency": "usd", "customer": "cus_9", "status": "open",
        "collection_method": "charge_automatically", "auto_advance": false,
        "amount_due": 2000, "amount_paid": 0, "amount_remaining": 2000,
        "lines": {"object": "list", "data": []},
    });
    invoice.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    invoice
}

fn money(spent: &str, held: &str, doubt: &str) -> (String, String, String) {
    (spent.into(), held.into(), doubt.into())
}

/// Somebody else's request at Stripe, without the sidecar.
async fn elsewhere(standin: &Standin, path: &str, form: &[(&str, &str)]) -> Value {
    elsewhere_by(&client(), standin, path, form).await
}

/// The same by a client that is there already: making one takes long.
pub(crate) async fn elsewhere_by(
    http: &reqwest::Client,
    standin: &Standin,
    path: &str,
    form: &[(&str, &str)],
) -> Value {
    let pairs: Vec<_> = form.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    let sent = http
        .post(format!("{}{path}", standin.base_url()))
        .bearer_auth(STRIPE_KEY)
        .header("content-type", "application/x-www-form-urlencoded")
        .body(keybrake::vendor::stripe::form::serialise(&pairs));
    serde_json::from_str(&sent.send().await.unwrap().text().await.unwrap()).unwrap()
}

/// What came to Stripe since, as `METHOD path`.
fn since(standin: &Standin, before: usize) -> Vec<String> {
    let told = |seen: &Seen| format!("{} {}", seen.method, seen.path);
    standin.requests().iter().skip(before).map(told).collect()
}

async fn mint(sidecar: &Sidecar, cap: &str, endpoints: &[&str], more: Value) -> (String, String) {
    let mut policy = json!({"allowed_endpoints": endpoints});
    policy.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    sidecar.mint(cap, policy).await
}

async fn refused(sidecar: &Sidecar, key: &str, path: &str, name: &str) -> (u16, String) {
    let reply = sidecar.post(key, path, name, &[]).await;
    (reply.status, reply.code().to_owned())
}

const INTENT: &[(&str, &str)] =
    &[("amount", "2000"), ("currency", "usd"), ("customer", "cus_9"), ("payment_method", "pm_card_visa")];

#[tokio::test]
async fn an_intent_made_elsewhere_is_read_held_and_pinned() {
    let (standin, sidecar) = world().await;
    let (small, _) = mint(&sidecar, "19.99", &["POST /v1/payment_intents/{id}/confirm"], json!({})).await;
    let (key, id) = mint(&sidecar, "20.00", &["POST /v1/payment_intents/{id}/confirm"], json!({})).await;
    let made = elsewhere(&standin, "/v1/payment_intents", INTENT).await;
    let path = format!("/v1/payment_intents/{}/confirm", made["id"].as_str().unwrap());
    let before = standin.requests().len();
    let over = sidecar.post(&small, &path, "a", &[]).await;
    assert_eq!(over.verdict(), (429, "spend_cap_exceeded"), "{}", over.text);
    assert_eq!(over.body["error"]["requested"], "20.00");
    let done = sidecar.post(&key, &path, "b", &[]).await;
    assert_eq!((done.status, done.body["status"].as_str()), (200, Some("succeeded")), "{}", done.text);
    assert_eq!(sidecar.spend(&id).await, money("20.00", "0.00", "0.00"));
    let read = path.trim_end_matches("/confirm");
    let all = [format!("GET {read}"), format!("GET {read}"), format!("POST {path}")];
    assert_eq!(since(&standin, before), all);
    assert!(standin.requests().pop().unwrap().body.contains("amount_to_confirm=2000"));
    // What is known to be done is answered without another look.
    let again = sidecar.post(&key, &path, "b", &[]).await;
    assert_eq!(again.header("idempotent-replayed"), Some("true"));
    assert_eq!(since(&standin, before), all);
}

#[tokio::test]
async fn a_capture_of_an_intent_made_elsewhere_holds_what_it_names() {
    let (standin, sidecar) = world().await;
    let endpoints = ["POST /v1/payment_intents/{id}/capture", "POST /v1/charges/{id}/capture"];
    let (key, id) = mint(&sidecar, "7.00", &endpoints, json!({})).await;
    let manual = [INTENT, &[("capture_method", "manual"), ("confirm", "true")]].concat();
    let made = elsewhere(&standin, "/v1/payment_intents", &manual).await;
    let path = format!("/v1/payment_intents/{}/capture", made["id"].as_str().unwrap());
    let rest = [("amount_to_capture", "700"), ("final_capture", "false")];
    for form in [&[][..], &[("amount_to_capture", "701")], &rest] {
        let over = sidecar.post(&key, &path, "a", form).await;
        assert_eq!(over.verdict(), (429, "spend_cap_exceeded"), "{form:?}: {}", over.text);
    }
    let done = sidecar.post(&key, &path, "a", &[("amount_to_capture", "700")]).await;
    assert_eq!(done.status, 200, "{}", done.text);
    assert_eq!(sidecar.spend(&id).await, money("7.00", "0.00", "0.00"));
    let form = [("amount", "500"), ("currency", "usd"), ("source", "tok_visa"), ("capture", "false")];
    let charge = elsewhere(&standin, "/v1/charges", &form).await;
    let (other, other_id) = mint(&sidecar, "5.00", &endpoints, json!({})).await;
    let path = format!("/v1/charges/{}/capture", charge["id"].as_str().unwrap());
    assert_eq!(sidecar.post(&other, &path, "c", &[]).await.status, 200);
    assert!(standin.requests().pop().unwrap().body.contains("amount=500"), "pinned");
    assert_eq!(sidecar.spend(&other_id).await, money("5.00", "0.00", "0.00"));
}

#[tokio::test]
async fn a_new_total_of_an_intent_made_elsewhere_is_held_whole() {
    let (standin, sidecar) = world().await;
    let endpoints =
        ["POST /v1/payment_intents/{id}/increment_authorization", "POST /v1/payment_intents/{id}"];
    let (key, id) = mint(&sidecar, "30.00", &endpoints, json!({})).await;
    let manual = [INTENT, &[("capture_method", "manual"), ("confirm", "true")]].concat();
    let made = elsewhere(&standin, "/v1/payment_intents", &manual).await;
    let path = format!("/v1/payment_intents/{}/increment_authorization", made["id"].as_str().unwrap());
    let over = sidecar.post(&key, &path, "a", &[("amount", "3001")]).await;
    assert_eq!(over.verdict(), (429, "spend_cap_exceeded"), "{}", over.text);
    assert_eq!(sidecar.post(&key, &path, "b", &[("amount", "2500")]).await.status, 200);
    assert_eq!(sidecar.spend(&id).await, money("0.00", "25.00", "0.00"), "the total, not what it adds");
    // Another currency would be another amount.
    let update = format!("/v1/payment_intents/{}", made["id"].as_str().unwrap());
    let euros = sidecar.post(&key, &update, "c", &[("amount", "2500"), ("currency", "eur")]).await;
    assert_eq!(euros.verdict(), (403, "currency_not_allowed"), "{}", euros.text);
    // And what changes no amount is no money call.
    let free = sidecar.post(&key, &update, "d", &[("description", "x")]).await;
    assert_eq!(free.code(), "payment_intent_unexpected_state", "Stripe's own answer: {}", free.text);
    assert_eq!(sidecar.list("/admin/calls?idempotency_key=d").await, [Value::Null; 0]);
    assert_eq!(sidecar.spend(&id).await, money("0.00", "25.00", "0.00"));
}

#[tokio::test]
async fn a_refund_without_an_amount_is_all_that_is_left() {
    let (standin, sidecar) = world().await;
    let endpoints = ["POST /v1/refunds", "POST /v1/charges/{id}/refund"];
    let (key, id) = mint(&sidecar, "1.00", &endpoints, json!({"daily_usd_out_cap": "15.00"})).await;
    let form = [("amount", "2000"), ("currency", "usd"), ("source", "tok_visa"), ("customer", "cus_9")];
    let charge = elsewhere(&standin, "/v1/charges", &form).await;
    let charge = charge["id"].as_str().unwrap();
    let over = sidecar.post(&key, "/v1/refunds", "a", &[("charge", charge)]).await;
    assert_eq!(over.verdict(), (429, "spend_cap_exceeded"), "{}", over.text);
    assert_eq!(
        (&over.body["error"]["cap"], &over.body["error"]["requested"]),
        (&json!("daily_out"), &json!("20.00"))
    );
    let part = sidecar.post(&key, "/v1/refunds", "b", &[("charge", charge), ("amount", "600")]).await;
    assert_eq!(part.status, 200, "{}", part.text);
    let rest = sidecar.post(&key, "/v1/refunds", "c", &[("charge", charge)]).await;
    assert_eq!(rest.verdict(), (429, "spend_cap_exceeded"), "14.00 are left of it: {}", rest.text);
    assert_eq!(rest.body["error"]["requested"], "14.00");
    let (rich, rich_id) = mint(&sidecar, "1.00", &endpoints, json!({"daily_usd_out_cap": "14.00"})).await;
    let rest = sidecar.post(&rich, "/v1/refunds", "d", &[("charge", charge)]).await;
    assert_eq!((rest.status, rest.body["amount"].as_u64()), (200, Some(1400)), "{}", rest.text);
    assert!(standin.requests().pop().unwrap().body.contains("amount=1400"), "pinned");
    for (key_id, out) in [(&id, "6.00"), (&rich_id, "14.00")] {
        assert_eq!(sidecar.key(key_id).await["spend"]["today"]["out"]["spent"], out);
        assert_eq!(sidecar.spend(key_id).await, money("0.00", "0.00", "0.00"), "nothing comes back");
    }
    // The old path, which no SDK uses, is the same money.
    let form = [("amount", "300"), ("currency", "usd"), ("source", "tok_visa")];
    let other = elsewhere(&standin, "/v1/charges", &form).await;
    let path = format!("/v1/charges/{}/refund", other["id"].as_str().unwrap());
    let whole = json!({"id": other["id"], "object": "charge", "currency": "usd", "amount": 300, "amount_refunded": 300});
    script(&standin, &format!("POST {path}"), 200, whole);
    assert_eq!(sidecar.post(&key, &path, "e", &[]).await.status, 200);
    assert_eq!(sidecar.key(&id).await["spend"]["today"]["out"]["spent"], "9.00");
}

#[tokio::test]
async fn what_cannot_be_read_is_not_sent() {
    let (standin, sidecar) = world().await;
    let (key, id) = mint(&sidecar, "50.00", &["POST /v1/invoices/{id}/pay"], json!({})).await;
    let path = "/v1/invoices/in_1/pay";
    for (status, body, expected) in [
        (404, json!({"error": {"type": "invalid_request_error"}}), (404, "not_found")),
        (403, json!({"error": {"message": "This object cannot be read."}}), (403, "amount_unknown")),
        (429, json!({}), (502, "upstream_unreachable")),
        (500, json!({}), (502, "upstream_unreachable")),
        (401, json!({}), (502, "upstream_key_refused")),
        (200, json!("garbage"), (403, "amount_unknown")),
        (200, invoice(&json!({"id": "in_2"})), (403, "amount_unknown")),
        (200, invoice(&json!({"object": "charge"})), (403, "amount_unknown")),
        (200, invoice(&json!({"amount_remaining": null, "amount_due": null})), (403, "amount_unknown")),
        (200, invoice(&json!({"amount_remaining": -5})), (403, "amount_unknown")),
        (200, invoice(&json!({"currency": null})), (403, "amount_unknown")),
        (200, invoice(&json!({"currency": "eur"})), (403, "currency_not_allowed")),
        (200, invoice(&json!({"amount_remaining": 5001})), (429, "spend_cap_exceeded")),
    ] {
        script(&standin, "GET /v1/invoices/in_1", status, body.clone());
        let (told, code) = refused(&sidecar, &key, path, "a").await;
        assert_eq!((told, code.as_str()), expected, "{status} {body}");
    }
    assert!(since(&standin, 0).iter().all(|line| line.starts_with("GET ")));
    assert_eq!(sidecar.spend(&id).await, money("0.00", "0.00", "0.00"));
}

#[tokio::test]
async fn an_invoice_is_read_each_time_and_booked_by_what_was_paid_now() {
    let (standin, sidecar) = world().await;
    let endpoints = ["POST /v1/invoices/{id}/finalize", "POST /v1/invoices/{id}/pay"];
    let (key, id) = mint(&sidecar, "50.00", &endpoints, json!({})).await;
    let draft = invoice(&json!({"status": "draft"}));
    script(&standin, "GET /v1/invoices/in_1", 200, draft);
    script(&standin, "POST /v1/invoices/in_1/finalize", 200, invoice(&json!({})));
    assert_eq!(sidecar.post(&key, "/v1/invoices/in_1/finalize", "a", &[]).await.status, 200);
    assert_eq!(sidecar.spend(&id).await, money("0.00", "20.00", "0.00"), "it waits to be paid");
    // Somebody added to it, and part of it was paid since: that counts as well.
    let raised = invoice(&json!({"amount_due": 3500, "amount_paid": 500, "amount_remaining": 3000}));
    script(&standin, "GET /v1/invoices/in_1", 200, raised);
    let paid = invoice(&json!({"status": "paid", "amount_paid": 3500, "amount_remaining": 0}));
    script(&standin, "POST /v1/invoices/in_1/pay", 200, paid.clone());
    assert_eq!(sidecar.post(&key, "/v1/invoices/in_1/pay", "b", &[]).await.status, 200);
    assert_eq!(sidecar.spend(&id).await, money("35.00", "0.00", "0.00"));
    assert_eq!(sidecar.key(&id).await["status"], "active", "and was held before it was sent");
    // Another key, and an invoice of which part was paid before anything was held here.
    let (key, id) = mint(&sidecar, "50.00", &endpoints, json!({})).await;
    let rest =
        invoice(&json!({"id": "in_7", "amount_due": 3500, "amount_paid": 500, "amount_remaining": 3000}));
    script(&standin, "GET /v1/invoices/in_7", 200, rest);
    let mut paid = paid;
    paid["id"] = json!("in_7");
    script(&standin, "POST /v1/invoices/in_7/pay", 200, paid);
    assert_eq!(sidecar.post(&key, "/v1/invoices/in_7/pay", "c", &[]).await.status, 200);
    assert_eq!(sidecar.spend(&id).await, money("30.00", "0.00", "0.00"), "what was paid before is not ours");
    assert_eq!(sidecar.key(&id).await["status"], "active");
}

#[tokio::test]
async fn a_declined_invoice_stays_held_for_it_can_still_be_paid() {
    let (standin, sidecar) = world().await;
    let (key, id) = mint(&sidecar, "90.00", &["POST /v1/invoices/{id}/pay"], json!({})).await;
    let declined = json!({"error": {"type": "card_error", "code": "card_declined"}});
    for (name, auto_advance, held) in [("in_1", false, "20.00"), ("in_2", true, "40.00")] {
        let record = invoice(&json!({"id": name, "auto_advance": auto_advance}));
        script(&standin, &format!("GET /v1/invoices/{name}"), 200, record);
        script(&standin, &format!("POST /v1/invoices/{name}/pay"), 402, declined.clone());
        let reply = sidecar.post(&key, &format!("/v1/invoices/{name}/pay"), name, &[]).await;
        assert_eq!(reply.status, 402, "{}", reply.text);
        assert_eq!(sidecar.spend(&id).await, money("0.00", held, "0.00"), "{name}");
    }
    // Tried again by hand: more than before, declined again, and held at what it is now.
    let more =
        invoice(&json!({"id": "in_2", "auto_advance": true, "amount_due": 2500, "amount_remaining": 2500}));
    script(&standin, "GET /v1/invoices/in_2", 200, more);
    script(&standin, "POST /v1/invoices/in_2/pay", 402, declined);
    assert_eq!(sidecar.post(&key, "/v1/invoices/in_2/pay", "again", &[]).await.status, 402);
    assert_eq!(sidecar.spend(&id).await, money("0.00", "45.00", "0.00"));
}

#[tokio::test]
async fn an_invoice_takes_over_what_its_items_hold() {
    let (standin, sidecar) = world().await;
    let endpoints =
        ["POST /v1/invoiceitems", "POST /v1/invoices/{id}/finalize", "DELETE /v1/invoiceitems/{id}"];
    let (key, id) = mint(&sidecar, "50.00", &endpoints, json!({})).await;
    let item = async |name: &str, form: &[(&str, &str)], amount: u64| {
        let answer = json!({"id": name, "object": "invoiceitem", "currency": "usd", "amount": amount, "invoice": null});
        script(&standin, "POST /v1/invoiceitems", 200, answer);
        let form = [form, &[("customer", "cus_9"), ("currency", "usd")]].concat();
        sidecar.post(&key, "/v1/invoiceitems", name, &form).await
    };
    assert_eq!(item("ii_1", &[("amount", "1200")], 1200).await.status, 200);
    let units = [("unit_amount_decimal", "399.5"), ("quantity", "2")];
    assert_eq!(item("ii_2", &units, 799).await.status, 200);
    assert_eq!(item("ii_3", &[("amount", "100")], 100).await.status, 200);
    assert_eq!(sidecar.spend(&id).await, money("0.00", "20.99", "0.00"), "billed by whatever comes next");
    standin.clear_faults();
    let both = item("ii_4", &[("amount", "100"), ("unit_amount", "5")], 1).await;
    assert_eq!(both.verdict(), (400, "parameter_invalid"), "{}", both.text);
    let price = item("ii_4", &[("pricing[price]", "price_1")], 1).await;
    assert_eq!(price.verdict(), (400, "parameter_invalid"), "it has no ceiling: {}", price.text);
    standin.clear_faults();
    let gone = json!({"id": "ii_3", "object": "invoiceitem", "deleted": true});
    script(&standin, "DELETE /v1/invoiceitems/ii_3", 200, gone);
    assert_eq!(sidecar.call("DELETE", "/v1/invoiceitems/ii_3", &key, &[], &[]).await.status, 200);
    assert_eq!(sidecar.spend(&id).await, money("0.00", "19.99", "0.00"));
    let lines = json!({"object": "list", "data": [
        {"id": "il_1", "parent": {"invoice_item_details": {"invoice_item": "ii_1"}}},
        {"id": "il_2", "invoice_item": "ii_2"},
        {"id": "il_3", "invoice_item": null},
    ]});
    let due = json!({"amount_due": 1999, "amount_remaining": 1999, "lines": lines});
    let mut draft = due.clone();
    draft["status"] = json!("draft");
    script(&standin, "GET /v1/invoices/in_1", 200, invoice(&draft));
    script(&standin, "POST /v1/invoices/in_1/finalize", 200, invoice(&due));
    let done = sidecar.post(&key, "/v1/invoices/in_1/finalize", "f", &[]).await;
    assert_eq!(done.status, 200, "{}", done.text);
    assert_eq!(sidecar.spend(&id).await, money("0.00", "19.99", "0.00"), "counted once, with the invoice");
    // What was billed was made: the same call is not made again.
    let again = item("ii_1", &[("amount", "1200")], 1200).await;
    assert_eq!((again.status, again.header("idempotent-replayed")), (200, Some("true")), "{}", again.text);
}

#[tokio::test]
async fn what_nobody_can_price_holds_the_keys_ceiling() {
    let (standin, sidecar) = world().await;
    let create = ["POST /v1/subscriptions"];
    let policy = json!({"label": "a", "vendor": "stripe", "expires_in_seconds": 60, "daily_usd_cap": 100,
        "allowed_endpoints": create});
    let minted = sidecar.admin("POST", "/admin/vault_keys", Some(&policy)).await;
    assert_eq!(
        (minted.verdict(), &minted.body["error"]["param"]),
        ((400, "parameter_invalid"), &json!("allowed_endpoints"))
    );
    assert!(minted.text.contains("max_usd_per_request"), "{}", minted.text);
    let (key, id) = mint(&sidecar, "100.00", &create, json!({"max_usd_per_request": "40.00"})).await;
    let sub = |more: Value| {
        let mut sub = json!({"id": "sub_1", "object": "subscription", "currency": "usd", "customer": "cus_9",
            "status": "active", "latest_invoice": "in_1"});
        sub.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        sub
    };
    let form = [("customer", "cus_9"), ("items[0][price]", "price_1")];
    // Its first invoice tells.
    script(&standin, "POST /v1/subscriptions", 200, sub(json!({})));
    let paid = invoice(&json!({"status": "paid", "amount_paid": 1900, "amount_remaining": 0}));
    script(&standin, "GET /v1/invoices/in_1", 200, paid);
    let made = sidecar.post(&key, "/v1/subscriptions", "a", &form).await;
    assert_eq!((made.status, &made.body["latest_invoice"]), (200, &json!("in_1")), "{}", made.text);
    assert_eq!(sidecar.spend(&id).await, money("19.00", "0.00", "0.00"));
    // Where it does not, all of it stays held: another currency, a trial, an invoice that cannot be read.
    for (name, more) in [("b", json!({"currency": "eur"})), ("c", json!({"status": "trialing"}))] {
        let more = [more, json!({"id": format!("sub_{name}"), "latest_invoice": null})];
        let body = more.iter().fold(sub(json!({})), |mut body, more| {
            body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            body
        });
        script(&standin, "POST /v1/subscriptions", 200, body);
        assert_eq!(sidecar.post(&key, "/v1/subscriptions", name, &form).await.status, 200);
    }
    assert_eq!(sidecar.spend(&id).await, money("19.00", "80.00", "0.00"));
    let over = sidecar.post(&key, "/v1/subscriptions", "d", &form).await;
    assert_eq!(over.verdict(), (429, "spend_cap_exceeded"), "{}", over.text);
    assert_eq!(over.body["error"]["requested"], "40.00");
}

#[tokio::test]
async fn a_plain_cancel_of_a_subscription_moves_nothing() {
    let (standin, sidecar) = world().await;
    let (key, id) = mint(&sidecar, "100.00", &["DELETE /v1/subscriptions/{id}"], json!({})).await;
    let gone = json!({"id": "sub_1", "object": "subscription", "currency": "usd", "status": "canceled"});
    script(&standin, "DELETE /v1/subscriptions/sub_1", 200, gone.clone());
    assert_eq!(sidecar.call("DELETE", "/v1/subscriptions/sub_1", &key, &[], &[]).await.status, 200);
    let bills = "/v1/subscriptions/sub_1?invoice_now=true";
    let reply = sidecar.call("DELETE", bills, &key, &[("idempotency-key", "a")], &[]).await;
    assert_eq!(reply.verdict(), (403, "amount_unknown"), "{}", reply.text);
    let more = json!({"max_usd_per_request": "30"});
    let (key, other) = mint(&sidecar, "100.00", &["DELETE /v1/subscriptions/{id}"], more).await;
    script(&standin, "DELETE /v1/subscriptions/sub_1", 200, gone);
    let reply = sidecar.call("DELETE", bills, &key, &[("idempotency-key", "a")], &[]).await;
    assert_eq!(reply.status, 200, "{}", reply.text);
    assert_eq!(standin.requests().pop().unwrap().query, "invoice_now=true");
    assert_eq!(sidecar.spend(&id).await, money("0.00", "0.00", "0.00"));
    assert_eq!(sidecar.spend(&other).await, money("0.00", "30.00", "0.00"));
}

#[tokio::test]
async fn an_invoice_that_advances_by_itself_is_held_and_a_draft_is_not() {
    let (standin, sidecar) = world().await;
    let endpoints = ["POST /v1/invoices", "POST /v1/invoices/{id}", "POST /v1/invoices/{id}/void"];
    let (key, id) = mint(&sidecar, "100.00", &endpoints, json!({"max_usd_per_request": "30"})).await;
    let create = async |name: &str, more: Value| {
        let mut body = invoice(&json!({"id": name, "status": "draft"}));
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        script(&standin, "POST /v1/invoices", 200, body);
        let reply = sidecar.post(&key, "/v1/invoices", name, &[("customer", "cus_9")]).await;
        assert_eq!(reply.status, 200, "{}", reply.text);
    };
    create("in_1", json!({})).await;
    assert_eq!(sidecar.spend(&id).await, money("0.00", "0.00", "0.00"), "nobody collects it by itself");
    create("in_2", json!({"auto_advance": true})).await;
    assert_eq!(sidecar.spend(&id).await, money("0.00", "30.00", "0.00"), "Stripe will");
    // Changed: what the key says for one call comes on top, until the answer tells.
    let changed = invoice(
        &json!({"id": "in_2", "status": "draft", "auto_advance": true, "amount_due": 4500, "amount_remaining": 4500}),
    );
    script(&standin, "GET /v1/invoices/in_2", 200, invoice(&json!({"id": "in_2", "status": "draft"})));
    script(&standin, "POST /v1/invoices/in_2", 200, changed);
    assert_eq!(sidecar.post(&key, "/v1/invoices/in_2", "u", &[("footer", "x")]).await.status, 200);
    assert_eq!(sidecar.spend(&id).await, money("0.00", "60.00", "0.00"));
    let void = invoice(&json!({"id": "in_2", "status": "void"}));
    script(&standin, "POST /v1/invoices/in_2/void", 200, void);
    assert_eq!(sidecar.post(&key, "/v1/invoices/in_2/void", "v", &[]).await.status, 200);
    assert_eq!(sidecar.spend(&id).await, money("0.00", "0.00", "0.00"), "and never collects it");
}

#[tokio::test]
async fn a_checkout_session_is_held_until_it_expires() {
    let (standin, sidecar) = world().await;
    let endpoints = ["POST /v1/checkout/sessions", "POST /v1/checkout/sessions/{id}/expire"];
    let (key, id) = mint(&sidecar, "50.00", &endpoints, json!({"max_usd_per_request": "45.00"})).await;
    let session = |status: &str| {
        json!({"id": "cs_1", "object": "checkout.session", "currency": "usd", "mode": "payment", "status": status,
            "payment_status": "unpaid", "amount_total": 2000, "client_secret": "cs_1_secret_abc"})
    };
    script(&standin, "POST /v1/checkout/sessions", 200, session("open"));
    let (price, currency) = ("line_items[0][price_data][unit_amount]", "line_items[0][price_data][currency]");
    for (form, told) in [
        ([(price, "1501"), (currency, "usd"), ("line_items[0][quantity]", "3")], (429, "spend_cap_exceeded")),
        (
            [(price, "100"), (currency, "eur"), ("line_items[0][quantity]", "3")],
            (403, "currency_not_allowed"),
        ),
    ] {
        let reply = sidecar.post(&key, "/v1/checkout/sessions", "x", &form).await;
        assert_eq!(reply.verdict(), told, "what its lines name is known: {}", reply.text);
    }
    let made =
        sidecar.post(&key, "/v1/checkout/sessions", "a", &[("mode", "payment"), ("customer", "cus_9")]).await;
    assert_eq!((made.status, &made.body["client_secret"]), (200, &Value::Null), "{}", made.text);
    assert!(standin.requests().pop().unwrap().body.contains("metadata[keybrake_call]="), "stamped");
    assert_eq!(sidecar.spend(&id).await, money("0.00", "45.00", "0.00"));
    script(&standin, "POST /v1/checkout/sessions/cs_1/expire", 200, session("expired"));
    assert_eq!(sidecar.post(&key, "/v1/checkout/sessions/cs_1/expire", "b", &[]).await.status, 200);
    assert_eq!(sidecar.spend(&id).await, money("0.00", "0.00", "0.00"));
}

#[tokio::test]
async fn money_out_has_a_cap_of_its_own() {
    let (standin, sidecar) = world().await;
    let endpoints = [
        "POST /v1/payouts",
        "POST /v1/payouts/{id}/cancel",
        "POST /v1/transfers",
        "POST /v1/transfers/{id}/reversals",
    ];
    let more = json!({"daily_usd_out_cap": "30.00", "constraints": {"destination": ["acct_1"]}});
    let (key, id) = mint(&sidecar, "5.00", &endpoints, more).await;
    let out = async || sidecar.key(&id).await["spend"]["today"]["out"].clone();
    let to = [("amount", "1000"), ("currency", "usd"), ("destination", "acct_1")];
    let payout =
        json!({"id": "po_1", "object": "payout", "currency": "usd", "amount": 1000, "status": "in_transit"});
    script(&standin, "POST /v1/payouts", 200, payout.clone());
    assert_eq!(sidecar.post(&key, "/v1/payouts", "a", &to).await.status, 200);
    assert_eq!(out().await["held"], "10.00");
    let elsewhere = [("amount", "1000"), ("currency", "usd"), ("destination", "acct_2")];
    let refused = sidecar.post(&key, "/v1/transfers", "b", &elsewhere).await;
    assert_eq!(refused.verdict(), (403, "parameter_not_allowed"), "{}", refused.text);
    let transfer =
        json!({"id": "tr_1", "object": "transfer", "currency": "usd", "amount": 1000, "amount_reversed": 0});
    script(&standin, "POST /v1/transfers", 200, transfer.clone());
    assert_eq!(sidecar.post(&key, "/v1/transfers", "c", &to).await.status, 200);
    assert_eq!((&out().await["spent"], &out().await["remaining"]), (&json!("10.00"), &json!("10.00")));
    let mut canceled = payout;
    canceled["status"] = json!("canceled");
    script(&standin, "POST /v1/payouts/po_1/cancel", 200, canceled);
    // A cancel names no destination, and the record of a payout does not tell whose it is.
    let bound = sidecar.post(&key, "/v1/payouts/po_1/cancel", "d", &[]).await;
    assert_eq!(bound.verdict(), (403, "parameter_not_allowed"), "{}", bound.text);
    let (free, _) = mint(&sidecar, "5.00", &["POST /v1/payouts/{id}/cancel"], json!({})).await;
    assert_eq!(sidecar.post(&free, "/v1/payouts/po_1/cancel", "d", &[]).await.status, 200);
    assert_eq!(out().await["held"], "0.00");
    let (back, back_id) =
        mint(&sidecar, "5.00", &["POST /v1/transfers/{id}/reversals"], json!({"daily_usd_out_cap": "10"}))
            .await;
    script(&standin, "GET /v1/transfers/tr_1", 200, transfer);
    let reversal = json!({"id": "trr_1", "object": "transfer_reversal", "currency": "usd", "amount": 1000});
    script(&standin, "POST /v1/transfers/tr_1/reversals", 200, reversal);
    assert_eq!(sidecar.post(&back, "/v1/transfers/tr_1/reversals", "e", &[]).await.status, 200);
    assert!(standin.requests().pop().unwrap().body.contains("amount=1000"), "pinned");
    assert_eq!(sidecar.key(&back_id).await["spend"]["today"]["out"]["spent"], "10.00");
}

#[tokio::test]
async fn an_object_read_first_keeps_the_keys_constraints() {
    let (standin, sidecar) = world().await;
    let endpoints = ["POST /v1/invoices/{id}/pay", "POST /v1/subscriptions/{id}", "POST /v1/customers/{id}"];
    let more = json!({"constraints": {"customer": ["cus_9"]}, "max_usd_per_request": "20.00"});
    let (key, id) = mint(&sidecar, "50.00", &endpoints, more).await;
    script(&standin, "GET /v1/invoices/in_1", 200, invoice(&json!({"customer": "cus_8"})));
    let other = sidecar.post(&key, "/v1/invoices/in_1/pay", "a", &[]).await;
    assert_eq!(other.verdict(), (403, "parameter_not_allowed"), "{}", other.text);
    script(
        &standin,
        "GET /v1/invoices/in_1",
        200,
        invoice(&json!({"customer": {"id": "cus_9", "object": "customer"}})),
    );
    let paid = invoice(&json!({"status": "paid", "amount_paid": 2000, "amount_remaining": 0}));
    script(&standin, "POST /v1/invoices/in_1/pay", 200, paid);
    assert_eq!(sidecar.post(&key, "/v1/invoices/in_1/pay", "b", &[]).await.status, 200);
    assert_eq!(sidecar.spend(&id).await, money("20.00", "0.00", "0.00"));
    for (customer, expected) in [("cus_8", (403, "parameter_not_allowed")), ("cus_9", (200, ""))] {
        let sub = json!({"id": "sub_1", "object": "subscription", "currency": "usd", "customer": customer, "status": "active"});
        script(&standin, "GET /v1/subscriptions/sub_1", 200, sub.clone());
        script(&standin, "POST /v1/subscriptions/sub_1", 200, sub);
        let reply =
            sidecar.post(&key, "/v1/subscriptions/sub_1", customer, &[("items[0][quantity]", "2")]).await;
        assert_eq!(reply.verdict(), expected, "{customer}: {}", reply.text);
        standin.clear_faults();
    }
    // Where the customer is the object, the path says who it is.
    for (path, expected) in [("/v1/customers/cus_8", 403), ("/v1/customers/cus_9", 200)] {
        script(&standin, &format!("POST {path}"), 200, json!({"id": "cus", "object": "customer"}));
        let reply = sidecar.post(&key, path, path, &[("description", "x")]).await;
        assert_eq!(reply.status, expected, "{path}: {}", reply.text);
        standin.clear_faults();
    }
}

/// A day's table in a file, dated today.
fn table(today: &str, rates: &Value) -> String {
    json!({"as_of": today, "margin_percent": 10, "micro_usd_per_minor_unit": rates}).to_string()
}

fn today() -> String {
    keybrake::time::Clock::System.now().to_string()[..10].to_owned()
}

async fn charge_in(sidecar: &Sidecar, key: &str, name: &str, currency: &str, amount: &str) -> Reply {
    let form = [("amount", amount), ("currency", currency), ("source", "tok_visa"), ("customer", "cus_9")];
    sidecar.post(key, "/v1/charges", name, &form).await
}

#[tokio::test]
async fn other_currencies_count_by_the_rates_of_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("fx.json");
    std::fs::write(&file, table(&today(), &json!({"eur": 10_000, "jpy": "6700.5", "kwd": 3250, "isk": 73})))
        .unwrap();
    let (standin, sidecar) = world_with(&[("FX_FILE", file.to_str().unwrap())]).await;
    let endpoints = json!({"allowed_endpoints": ["POST /v1/charges", "POST /v1/charges/{id}/capture"]});
    let (key, id) = sidecar.mint("100.00", endpoints).await;
    let euros = charge_in(&sidecar, &key, "a", "EUR", "1000").await;
    assert_eq!(euros.status, 200, "{}", euros.text);
    assert!(standin.requests().pop().unwrap().body.contains("currency=eur"));
    assert_eq!(sidecar.spend(&id).await, money("11.00", "0.00", "0.00"), "with the margin");
    let yen = charge_in(&sidecar, &key, "b", "jpy", "1001").await;
    assert_eq!(yen.status, 200, "{}", yen.text);
    assert_eq!(sidecar.spend(&id).await.0, "18.377921", "rounded up, to the micro-dollar");
    for (currency, amount, code) in [
        ("gbp", "1000", "currency_not_allowed"),
        ("kwd", "5124", "parameter_invalid"),
        ("isk", "550", "parameter_invalid"),
    ] {
        let reply = charge_in(&sidecar, &key, "c", currency, amount).await;
        assert_eq!(reply.code(), code, "{currency}: {}", reply.text);
    }
    let over = charge_in(&sidecar, &key, "d", "eur", "7421").await;
    assert_eq!(over.verdict(), (429, "spend_cap_exceeded"), "{}", over.text);
    assert_eq!(over.body["error"]["requested"], "81.631");
    // What is held keeps its rate; what comes later has the new one.
    let form = [("amount", "1000"), ("currency", "eur"), ("source", "tok_visa"), ("capture", "false")];
    let held = sidecar.post(&key, "/v1/charges", "e", &form).await;
    assert_eq!(sidecar.spend(&id).await.1, "11.00");
    let told = &sidecar.list("/admin/holds?state=open").await[0];
    assert_eq!((&told["usd"], &told["micro_usd_per_minor_unit"]), (&json!("11.00"), &json!("11000")));
    std::fs::write(&file, table(&today(), &json!({"eur": 20_000}))).unwrap();
    let hup = std::process::Command::new("kill").arg("-HUP").arg(sidecar.pid().to_string()).status();
    assert!(hup.unwrap().success());
    let since = tokio::time::Instant::now();
    while charge_in(&sidecar, &key, "f", "jpy", "50").await.code() != "currency_not_allowed" {
        assert!(since.elapsed() < crate::support::PATIENCE, "the table is read again");
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    let (spent, ..) = sidecar.spend(&id).await;
    let path = format!("/v1/charges/{}/capture", held.body["id"].as_str().unwrap());
    let taken = sidecar.post(&key, &path, "g", &[]).await;
    assert_eq!(taken.status, 200, "{}", taken.text);
    let spent_by_capture = dollars(&sidecar.spend(&id).await.0) - dollars(&spent);
    assert_eq!(spent_by_capture, 11_000_000);
    assert_eq!(charge_in(&sidecar, &key, "h", "eur", "100").await.status, 200);
    assert_eq!(dollars(&sidecar.spend(&id).await.0) - dollars(&spent) - spent_by_capture, 2_200_000);
}

/// Decimal dollars in micro-dollars.
fn dollars(text: &str) -> u64 {
    let (whole, fraction) = text.split_once('.').unwrap();
    whole.parse::<u64>().unwrap() * 1_000_000 + format!("{fraction:0<6}").parse::<u64>().unwrap()
}

#[tokio::test]
async fn stale_rates_count_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("fx.json");
    std::fs::write(&file, table("2026-01-02", &json!({"eur": 10_000}))).unwrap();
    let (_standin, sidecar) = world_with(&[("FX_FILE", file.to_str().unwrap())]).await;
    let (key, _) = sidecar.mint("100.00", json!({})).await;
    let euros = charge_in(&sidecar, &key, "a", "eur", "1000").await;
    assert_eq!(euros.verdict(), (403, "currency_not_allowed"), "{}", euros.text);
    assert!(euros.text.contains("2026-01-02"), "{}", euros.text);
    assert_eq!(charge_in(&sidecar, &key, "b", "usd", "1000").await.status, 200);
}

#[tokio::test]
async fn a_read_goes_to_the_account_of_its_call() {
    let (standin, sidecar) = crate::support::world_of(
        Options { connected: vec!["acct_other".to_owned()], ..Options::default() },
        &[],
    )
    .await;
    let more = json!({"accounts": ["acct_other"]});
    let (key, _) = mint(&sidecar, "50.00", &["POST /v1/invoices/{id}/pay"], more).await;
    script(&standin, "GET /v1/invoices/in_1", 200, invoice(&json!({})));
    let paid = invoice(&json!({"status": "paid", "amount_paid": 2000, "amount_remaining": 0}));
    script(&standin, "POST /v1/invoices/in_1/pay", 200, paid);
    let headers =
        [("idempotency-key", "a"), ("stripe-account", "acct_other"), ("stripe-version", "2024-06-20")];
    let reply = sidecar.call("POST", "/v1/invoices/in_1/pay", &key, &headers, &[]).await;
    assert_eq!(reply.status, 200, "{}", reply.text);
    let read = standin.requests().into_iter().find(|seen| seen.path == "/v1/invoices/in_1").unwrap();
    assert_eq!(read.header("stripe-account"), Some("acct_other"));
    // The caller's version decides how its own answer looks.
    assert_eq!(read.header("stripe-version"), Some("2026-10-28.endive"));
    assert_eq!(read.header("idempotency-key"), None);
    assert_eq!(standin.requests().pop().unwrap().header("stripe-version"), Some("2024-06-20"));
}

#[tokio::test]
async fn no_answer_to_a_capped_key_carries_a_client_secret_however_deep() {
    let (standin, sidecar) = world().await;
    let endpoints = [
        "GET /v1/invoices",
        "GET /v1/payment_intents/{id}",
        "POST /v1/setup_intents",
        "GET /v1/subscriptions/{id}",
    ];
    let (key, _) = mint(&sidecar, "5.00", &endpoints, json!({})).await;
    let (open, _) = mint(&sidecar, "5.00", &endpoints, json!({"client_secrets": true})).await;
    let listed = json!({"object": "list", "data": [
        {"id": "in_1", "confirmation_secret": {"type": "payment_intent", "client_secret": "pi_1_secret_HUSH"}},
        {"id": "in_2", "payment_intent": {"id": "pi_2", "client_secret": "pi_2_secret_HUSH"}},
    ]});
    let setup = json!({"id": "seti_1", "object": "setup_intent", "client_secret": "seti_1_secret_HUSH"});
    let sub = json!({"id": "sub_1", "pending_setup_intent": setup,
        "latest_invoice": {"payments": {"data": [{"payment": {"payment_intent": {"client_secret": "pi_3_secret_HUSH"}}}]}}});
    for (method, path, body) in [
        ("GET", "/v1/invoices", listed),
        ("POST", "/v1/setup_intents", setup),
        ("GET", "/v1/subscriptions/sub_1", sub),
    ] {
        for (key, shown) in [(&key, false), (&open, true)] {
            script(&standin, &format!("{method} {path}"), 200, body.clone());
            let reply = sidecar.call(method, path, key, &[], &[]).await;
            assert_eq!(reply.status, 200, "{}", reply.text);
            assert_eq!(reply.text.contains("HUSH"), shown, "{method} {path}: {}", reply.text);
        }
    }
}
