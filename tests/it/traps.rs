//! Ways around a price that were found by attack, and must stay closed.

use serde_json::{Value, json};

use crate::families::script;
use crate::standin::Standin;
use crate::standin::faults::{Fault, On, Scripted};
use crate::support::{Sidecar, world, world_with};

fn with(mut base: Value, more: Value) -> Value {
    let Value::Object(more) = more else { panic!("{more} is no object") };
    base.as_object_mut().unwrap().extend(more);
    base
}

fn invoice(more: Value) -> Value {
    with(
        json!({
            "id": "in_1", "object": "invoice", "currency": "usd", "customer": "cus_9", "status": "open",
            "collection_method": "charge_automatically", "auto_advance": false,
            "amount_due": 2000, "amount_paid": 0, "amount_remaining": 2000,
            "lines": {"object": "list", "data": []},
        }),
        more,
    )
}

fn item(more: Value) -> Value {
    with(
        json!({"id": "ii_1", "object": "invoiceitem", "currency": "usd", "amount": 100, "invoice": null}),
        more,
    )
}

fn slow(standin: &Standin, request: &str, body: Value, ms: u64) {
    let (method, prefix) = request.split_once(' ').unwrap();
    let on = On::Path { method: method.to_owned(), prefix: prefix.to_owned() };
    let headers = [
        ("content-type".to_owned(), "application/json".to_owned()),
        ("x-delay-ms".to_owned(), ms.to_string()),
    ]
    .into();
    standin.fault(Scripted { fault: Fault::Answer { status: 200, body, headers }, on, count: 1 });
}

async fn mint(sidecar: &Sidecar, cap: &str, endpoints: &[&str], more: Value) -> (String, String) {
    sidecar.mint(cap, with(json!({"allowed_endpoints": endpoints}), more)).await
}

const ITEM: &[(&str, &str)] = &[("customer", "cus_9"), ("currency", "usd")];

/// A decimal quantity re-prices an item, and nobody counts it.
#[tokio::test]
async fn quantity_decimal_reprices_for_free() {
    let (standin, sidecar) = world().await;
    let endpoints = ["POST /v1/invoiceitems", "POST /v1/invoiceitems/{id}"];
    let (key, id) = mint(&sidecar, "2.00", &endpoints, json!({})).await;
    script(&standin, "POST /v1/invoiceitems", 200, item(json!({})));
    let form = [ITEM, &[("unit_amount_decimal", "100")]].concat();
    assert_eq!(sidecar.post(&key, "/v1/invoiceitems", "a", &form).await.status, 200);
    script(&standin, "POST /v1/invoiceitems/ii_1", 200, item(json!({"amount": 1_000_000})));
    let raised = sidecar.post(&key, "/v1/invoiceitems/ii_1", "b", &[("quantity_decimal", "10000")]).await;
    assert_ne!(
        raised.status,
        200,
        "an item of 10,000 USD under a cap of 2.00: {:?}",
        sidecar.spend(&id).await
    );
}

/// The same at creation.
#[tokio::test]
async fn quantity_decimal_at_creation() {
    let (standin, sidecar) = world().await;
    let (key, id) = mint(&sidecar, "2.00", &["POST /v1/invoiceitems"], json!({})).await;
    script(&standin, "POST /v1/invoiceitems", 200, item(json!({"amount": 1_000_000})));
    let form = [ITEM, &[("unit_amount_decimal", "100"), ("quantity_decimal", "10000")]].concat();
    let made = sidecar.post(&key, "/v1/invoiceitems", "a", &form).await;
    assert_ne!(made.status, 200, "an item of 10,000 USD under a cap of 2.00: {:?}", sidecar.spend(&id).await);
}

/// An expired session that can be recovered is still a way to pay.
#[tokio::test]
async fn expired_session_with_recovery_releases() {
    let (standin, sidecar) = world().await;
    let endpoints = ["POST /v1/checkout/sessions", "POST /v1/checkout/sessions/{id}/expire"];
    let (key, id) = mint(&sidecar, "45.00", &endpoints, json!({"max_usd_per_request": "45.00"})).await;
    let session = |status: &str, url: Value| {
        json!({"id": "cs_1", "object": "checkout.session", "currency": "usd", "mode": "payment", "status": status,
            "payment_status": "unpaid", "amount_total": 4500,
            "after_expiration": {"recovery": {"enabled": true, "url": url, "expires_at": 1_800_000_000}}})
    };
    script(&standin, "POST /v1/checkout/sessions", 200, session("open", Value::Null));
    let form = [("mode", "payment"), ("customer", "cus_9"), ("after_expiration[recovery][enabled]", "true")];
    let made = sidecar.post(&key, "/v1/checkout/sessions", "a", &form).await;
    let url = json!("https://buy.stripe.com/r/live_abc");
    script(&standin, "POST /v1/checkout/sessions/cs_1/expire", 200, session("expired", url));
    sidecar.post(&key, "/v1/checkout/sessions/cs_1/expire", "b", &[]).await;
    assert!(
        made.status != 200 || sidecar.spend(&id).await.1 == "45.00",
        "the recovery url lets the customer pay 45.00: {:?}",
        sidecar.spend(&id).await
    );
}

/// A declined pay of an open invoice releases it, and its hosted page can still take the money.
#[tokio::test]
async fn declined_open_invoice_is_released() {
    let (standin, sidecar) = world().await;
    let endpoints =
        ["POST /v1/invoices/{id}/finalize", "POST /v1/invoices/{id}/pay", "POST /v1/invoices/{id}/send"];
    let (key, _) = mint(&sidecar, "20.00", &endpoints, json!({})).await;
    let mut open = 0;
    for name in ["in_1", "in_2", "in_3"] {
        let sent = json!({"id": name, "collection_method": "send_invoice", "auto_advance": true});
        script(
            &standin,
            &format!("GET /v1/invoices/{name}"),
            200,
            invoice(with(sent.clone(), json!({"status": "draft"}))),
        );
        let answer =
            invoice(with(sent.clone(), json!({"hosted_invoice_url": "https://invoice.stripe.com/i/x"})));
        script(&standin, &format!("POST /v1/invoices/{name}/send"), 200, answer);
        let reply = sidecar.post(&key, &format!("/v1/invoices/{name}/send"), &format!("s{name}"), &[]).await;
        if reply.status == 200 {
            open += 1;
        }
        script(&standin, &format!("GET /v1/invoices/{name}"), 200, invoice(sent));
        let declined = json!({"error": {"type": "card_error", "code": "card_declined"}});
        script(&standin, &format!("POST /v1/invoices/{name}/pay"), 402, declined);
        let pm = [("payment_method", "pm_card_chargeDeclined")];
        sidecar.post(&key, &format!("/v1/invoices/{name}/pay"), &format!("p{name}"), &pm).await;
        standin.clear_faults();
    }
    assert_eq!(open, 1, "open, payable invoices of 20.00 under a cap of 20.00");
}

/// What was read is old when it is used.
#[tokio::test]
async fn finalize_races_add_lines() {
    let (standin, sidecar) = world().await;
    let endpoints = ["POST /v1/invoices/{id}/finalize", "POST /v1/invoices/{id}/add_lines"];
    let (key, id) = mint(&sidecar, "20.00", &endpoints, json!({"max_usd_per_request": "10"})).await;
    let draft = |due: u64| invoice(json!({"status": "draft", "amount_due": due, "amount_remaining": due}));
    slow(&standin, "GET /v1/invoices/in_1", draft(100), 1500);
    script(&standin, "GET /v1/invoices/in_1", 200, draft(100));
    script(&standin, "GET /v1/invoices/in_1", 200, draft(500_100));
    script(&standin, "POST /v1/invoices/in_1/add_lines", 200, draft(500_100));
    let open = invoice(json!({"auto_advance": true, "amount_due": 500_100, "amount_remaining": 500_100}));
    script(&standin, "POST /v1/invoices/in_1/finalize", 200, open);
    let lines = [("lines[0][pricing][price]", "price_of_5000")];
    let later = async {
        tokio::time::sleep(std::time::Duration::from_millis(500)).await;
        sidecar.post(&key, "/v1/invoices/in_1/add_lines", "l", &lines).await
    };
    let (done, added) = tokio::join!(
        sidecar.post(&key, "/v1/invoices/in_1/finalize", "f", &[("auto_advance", "true")]),
        later
    );
    assert_eq!(added.status, 200, "{}", added.text);
    assert_ne!(done.status, 200, "5,001 USD under a cap of 20: {:?}", sidecar.spend(&id).await);
}

/// A payout to somewhere else.
#[tokio::test]
async fn payout_method_redirects() {
    let (standin, sidecar) = world().await;
    let more = json!({"daily_usd_out_cap": "30.00", "constraints": {"destination": ["ba_1"]}});
    let (key, _) = mint(&sidecar, "5.00", &["POST /v1/payouts"], more).await;
    let payout =
        json!({"id": "po_1", "object": "payout", "currency": "usd", "amount": 1000, "status": "pending"});
    script(&standin, "POST /v1/payouts", 200, payout.clone());
    let form =
        [("amount", "1000"), ("currency", "usd"), ("destination", "ba_1"), ("payout_method", "fa_mine")];
    let one = sidecar.post(&key, "/v1/payouts", "a", &form).await;
    standin.clear_faults();
    let (free, _) =
        mint(&sidecar, "5.00", &["POST /v1/payouts"], json!({"daily_usd_out_cap": "30.00"})).await;
    script(&standin, "POST /v1/payouts", 200, payout);
    let form = [("amount", "1000"), ("currency", "usd"), ("payout_method", "fa_mine")];
    let two = sidecar.post(&free, "/v1/payouts", "b", &form).await;
    assert_eq!((one.code(), two.code()), ("parameter_not_allowed", "parameter_not_allowed"));
}

/// A new source of a customer makes Stripe take what is past due.
#[tokio::test]
async fn a_new_source_retries_an_invoice() {
    let (standin, sidecar) = world().await;
    let (key, _) = mint(&sidecar, "1.00", &["POST /v1/customers/{id}"], json!({})).await;
    script(&standin, "POST /v1/customers/cus_9", 200, json!({"id": "cus_9", "object": "customer"}));
    let reply = sidecar.post(&key, "/v1/customers/cus_9", "a", &[("source", "tok_visa")]).await;
    assert_ne!(reply.status, 200, "Stripe charges the latest open invoice of each past_due subscription");
}

/// A free first period, and the full price in an hour.
#[tokio::test]
async fn a_subscription_whose_first_invoice_is_zero() {
    let (standin, sidecar) = world().await;
    let more = json!({"max_usd_per_request": "10.00"});
    let (key, id) = mint(&sidecar, "10.00", &["POST /v1/subscriptions"], more).await;
    for name in ["a", "b", "c"] {
        let sub = json!({"id": format!("sub_{name}"), "object": "subscription", "currency": "usd", "customer": "cus_9",
            "status": "active", "latest_invoice": format!("in_{name}")});
        script(&standin, "POST /v1/subscriptions", 200, sub);
        let zero = invoice(
            json!({"id": format!("in_{name}"), "status": "paid", "amount_due": 0, "amount_remaining": 0}),
        );
        script(&standin, &format!("GET /v1/invoices/in_{name}"), 200, zero);
        let form = [
            ("customer", "cus_9"),
            ("items[0][price]", "price_999"),
            ("proration_behavior", "none"),
            ("billing_cycle_anchor", "1795540000"),
        ];
        sidecar.post(&key, "/v1/subscriptions", name, &form).await;
    }
    assert_eq!(
        sidecar.spend(&id).await.1,
        "10.00",
        "three subscriptions that bill 9.99 each within the hour"
    );
}

/// An item that leaves its invoice is billed by the next one, and held by nobody.
#[tokio::test]
async fn an_unassigned_item_is_not_held() {
    let (standin, sidecar) = world().await;
    let endpoints = [
        "POST /v1/invoiceitems",
        "POST /v1/invoices",
        "POST /v1/invoices/{id}/remove_lines",
        "DELETE /v1/invoices/{id}",
    ];
    let (key, id) = mint(&sidecar, "30.00", &endpoints, json!({"max_usd_per_request": "10.00"})).await;
    script(&standin, "POST /v1/invoiceitems", 200, item(json!({"amount": 1000})));
    let form = [ITEM, &[("amount", "1000")]].concat();
    assert_eq!(sidecar.post(&key, "/v1/invoiceitems", "i", &form).await.status, 200);
    let lines = json!({"object": "list", "data": [
        {"id": "il_1", "parent": {"invoice_item_details": {"invoice_item": "ii_1"}}}]});
    let draft = invoice(
        json!({"status": "draft", "auto_advance": true, "amount_due": 1000, "amount_remaining": 1000,
        "lines": lines}),
    );
    script(&standin, "POST /v1/invoices", 200, draft);
    assert_eq!(sidecar.post(&key, "/v1/invoices", "n", &[("customer", "cus_9")]).await.status, 200);
    script(
        &standin,
        "GET /v1/invoices/in_1",
        200,
        invoice(json!({"status": "draft", "amount_due": 1000, "amount_remaining": 1000})),
    );
    let empty =
        invoice(json!({"status": "draft", "auto_advance": true, "amount_due": 0, "amount_remaining": 0}));
    script(&standin, "POST /v1/invoices/in_1/remove_lines", 200, empty);
    let form = [("lines[0][id]", "il_1"), ("lines[0][behavior]", "unassign")];
    let removed = sidecar.post(&key, "/v1/invoices/in_1/remove_lines", "r", &form).await;
    assert_eq!(removed.status, 200, "{}", removed.text);
    script(
        &standin,
        "DELETE /v1/invoices/in_1",
        200,
        json!({"id": "in_1", "object": "invoice", "deleted": true}),
    );
    assert_eq!(sidecar.call("DELETE", "/v1/invoices/in_1", &key, &[], &[]).await.status, 200);
    assert_eq!(
        sidecar.spend(&id).await.1,
        "10.00",
        "the item is pending again, and the next renewal bills it"
    );
}

/// Metadata on an invoice that was paid long ago.
#[tokio::test]
async fn a_paid_invoice_is_booked_again() {
    let (standin, sidecar) = world().await;
    let endpoints = ["POST /v1/invoices/{id}", "POST /v1/invoices/{id}/pay"];
    let (key, id) = mint(&sidecar, "50.00", &endpoints, json!({"max_usd_per_request": "20.00"})).await;
    let paid = invoice(json!({"status": "paid", "amount_paid": 2000, "amount_remaining": 0}));
    script(&standin, "GET /v1/invoices/in_1", 200, invoice(json!({})));
    script(&standin, "POST /v1/invoices/in_1/pay", 200, paid.clone());
    assert_eq!(sidecar.post(&key, "/v1/invoices/in_1/pay", "p", &[]).await.status, 200);
    script(&standin, "GET /v1/invoices/in_1", 200, paid.clone());
    script(&standin, "POST /v1/invoices/in_1", 200, paid);
    let named = sidecar.post(&key, "/v1/invoices/in_1", "m", &[("metadata[x]", "y")]).await;
    assert_eq!(named.status, 200, "{}", named.text);
    assert_eq!(sidecar.spend(&id).await.0, "20.00", "paid once");
    let old = invoice(json!({"id": "in_2", "status": "paid", "amount_paid": 50_000, "amount_remaining": 0}));
    script(&standin, "GET /v1/invoices/in_2", 200, old.clone());
    script(&standin, "POST /v1/invoices/in_2", 200, old);
    let named = sidecar.post(&key, "/v1/invoices/in_2", "o", &[("metadata[x]", "y")]).await;
    assert_eq!(named.status, 200, "{}", named.text);
    assert_eq!(sidecar.key(&id).await["status"], "active", "nothing moved");
}

fn table() -> String {
    let today = keybrake::time::Clock::System.now().to_string()[..10].to_owned();
    json!({"as_of": today, "margin_percent": 0, "micro_usd_per_minor_unit": {"eur": 10_000}}).to_string()
}

/// An invoice in euros ends the holds of its items, and holds only the ceiling.
#[tokio::test]
async fn an_invoice_in_euros_releases_its_items() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("fx.json");
    std::fs::write(&file, table()).unwrap();
    let (standin, sidecar) = world_with(&[("FX_FILE", file.to_str().unwrap())]).await;
    let endpoints = ["POST /v1/invoiceitems", "POST /v1/invoices"];
    let (key, id) = mint(&sidecar, "100.00", &endpoints, json!({"max_usd_per_request": "20.00"})).await;
    for name in ["ii_1", "ii_2", "ii_3", "ii_4"] {
        script(
            &standin,
            "POST /v1/invoiceitems",
            200,
            item(json!({"id": name, "currency": "eur", "amount": 2000})),
        );
        let form = [("customer", "cus_9"), ("currency", "eur"), ("amount", "2000")];
        assert_eq!(sidecar.post(&key, "/v1/invoiceitems", name, &form).await.status, 200);
    }
    assert_eq!(sidecar.spend(&id).await.1, "80.00");
    let data: Vec<Value> = ["ii_1", "ii_2", "ii_3", "ii_4"]
        .iter()
        .map(|name| json!({"id": "il", "parent": {"invoice_item_details": {"invoice_item": name}}}))
        .collect();
    let draft =
        invoice(json!({"status": "draft", "auto_advance": true, "currency": "eur", "amount_due": 8000,
        "amount_remaining": 8000, "lines": {"object": "list", "data": data}}));
    script(&standin, "POST /v1/invoices", 200, draft);
    let form = [("customer", "cus_9"), ("auto_advance", "true")];
    assert_eq!(sidecar.post(&key, "/v1/invoices", "n", &form).await.status, 200);
    let held: f64 = sidecar.spend(&id).await.1.parse().unwrap();
    assert!(held >= 80.0, "Stripe collects 80 EUR by itself, and {held} USD are held");
}

/// An invoice in another currency costs whatever it likes, and the key stays open.
#[tokio::test]
async fn a_large_invoice_in_euros_does_not_close_the_key() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("fx.json");
    std::fs::write(&file, table()).unwrap();
    let (standin, sidecar) = world_with(&[("FX_FILE", file.to_str().unwrap())]).await;
    let more = json!({"max_usd_per_request": "10.00"});
    let (key, _) = mint(&sidecar, "100.00", &["POST /v1/invoices"], more).await;
    let mut made = 0;
    for at in 0..5 {
        let name = format!("in_{at}");
        let body = invoice(json!({"id": name, "status": "draft", "auto_advance": true, "currency": "eur",
            "amount_due": 500_000, "amount_remaining": 500_000}));
        script(&standin, "POST /v1/invoices", 200, body);
        let form = [("customer", "cus_9"), ("auto_advance", "true"), ("currency", "eur")];
        made += usize::from(sidecar.post(&key, "/v1/invoices", &name, &form).await.status == 200);
        standin.clear_faults();
    }
    assert_eq!(made, 1, "invoices of 5000 EUR each; the first is told to be more than was held");
}

/// A constraint on the amount, and a quantity.
#[tokio::test]
async fn an_amount_constraint_does_not_see_a_quantity() {
    let (standin, sidecar) = world().await;
    let endpoints = ["POST /v1/invoiceitems", "POST /v1/invoiceitems/{id}"];
    let more = json!({"max_usd_per_request": "100", "constraints": {"amount": {"max": 1000}}});
    let (key, _) = mint(&sidecar, "500.00", &endpoints, more).await;
    script(&standin, "POST /v1/invoiceitems", 200, item(json!({"amount": 1000})));
    let form = [ITEM, &[("amount", "1000")]].concat();
    assert_eq!(sidecar.post(&key, "/v1/invoiceitems", "a", &form).await.status, 200);
    script(&standin, "POST /v1/invoiceitems/ii_1", 200, item(json!({"amount": 9000})));
    let reply = sidecar.post(&key, "/v1/invoiceitems/ii_1", "b", &[("quantity", "9")]).await;
    assert_eq!(reply.code(), "parameter_not_allowed", "90.00 under an amount of at most 10.00");
}

/// What the customer may raise in the browser.
#[tokio::test]
async fn a_session_that_the_customer_can_raise() {
    let (standin, sidecar) = world().await;
    let more = json!({"max_usd_per_request": "10"});
    let (key, _) = mint(&sidecar, "10.00", &["POST /v1/checkout/sessions"], more).await;
    let session = json!({"id": "cs_1", "object": "checkout.session", "currency": "usd", "mode": "payment",
        "status": "open", "payment_status": "unpaid", "amount_total": 1000});
    script(&standin, "POST /v1/checkout/sessions", 200, session);
    let form = [
        ("mode", "payment"),
        ("customer", "cus_9"),
        ("line_items[0][price_data][unit_amount]", "1000"),
        ("line_items[0][price_data][currency]", "usd"),
        ("line_items[0][quantity]", "1"),
        ("line_items[0][adjustable_quantity][enabled]", "true"),
        ("line_items[0][adjustable_quantity][maximum]", "999999"),
    ];
    let reply = sidecar.post(&key, "/v1/checkout/sessions", "a", &form).await;
    assert_ne!(reply.status, 200, "up to 9,999,990 USD under a cap of 10");
}

/// An amount and a price of one, at once.
#[tokio::test]
async fn an_update_that_names_an_amount_and_a_unit() {
    let (standin, sidecar) = world().await;
    let (key, _) = mint(&sidecar, "5.00", &["POST /v1/invoiceitems/{id}"], json!({})).await;
    script(&standin, "GET /v1/invoiceitems/ii_1", 200, item(json!({})));
    script(&standin, "POST /v1/invoiceitems/ii_1", 200, item(json!({"amount": 100_000})));
    let form = [("amount", "100"), ("unit_amount_decimal", "100"), ("quantity", "1000")];
    let reply = sidecar.post(&key, "/v1/invoiceitems/ii_1", "a", &form).await;
    assert_eq!(reply.verdict(), (400, "parameter_invalid"), "as at creation");
}

/// A line's answer takes the place of the invoice in its hold.
#[tokio::test]
async fn a_line_clobbers_the_object_of_the_hold() {
    let (standin, sidecar) = world().await;
    let endpoints = [
        "POST /v1/invoices/{id}/finalize",
        "POST /v1/invoices/{id}/pay",
        "POST /v1/invoices/{invoice}/lines/{id}",
        "POST /v1/invoices/{id}/void",
    ];
    let (key, _) = mint(&sidecar, "100.00", &endpoints, json!({"max_usd_per_request": "20"})).await;
    script(&standin, "GET /v1/invoices/in_1", 200, invoice(json!({"status": "draft"})));
    script(&standin, "POST /v1/invoices/in_1/finalize", 200, invoice(json!({})));
    assert_eq!(sidecar.post(&key, "/v1/invoices/in_1/finalize", "f", &[]).await.status, 200);
    let line = json!({"id": "il_1", "object": "line_item", "currency": "usd", "amount": 2000});
    script(&standin, "GET /v1/invoices/in_1", 200, invoice(json!({})));
    script(&standin, "POST /v1/invoices/in_1/lines/il_1", 200, line);
    assert_eq!(
        sidecar.post(&key, "/v1/invoices/in_1/lines/il_1", "l", &[("metadata[a]", "b")]).await.status,
        200
    );
    script(&standin, "GET /v1/invoices/in_1", 200, invoice(json!({})));
    script(&standin, "POST /v1/invoices/in_1/pay", 402, json!({"error": {"type": "card_error"}}));
    assert_eq!(sidecar.post(&key, "/v1/invoices/in_1/pay", "p", &[]).await.status, 402);
    standin.clear_faults();
    let (key, _) = mint(&sidecar, "100.00", &["POST /v1/invoices/{id}/pay"], json!({})).await;
    script(&standin, "GET /v1/invoices/in_1", 200, invoice(json!({})));
    script(&standin, "POST /v1/invoices/in_1/pay", 402, json!({"error": {"type": "card_error"}}));
    assert_eq!(sidecar.post(&key, "/v1/invoices/in_1/pay", "p2", &[]).await.status, 402);
    script(&standin, "GET /v1/invoices/in_1", 200, invoice(json!({})));
    script(&standin, "POST /v1/invoices/in_1/pay", 500, json!({"error": {"type": "api_error"}}));
    assert_eq!(sidecar.post(&key, "/v1/invoices/in_1/pay", "q", &[]).await.status, 500);
    script(&standin, "GET /v1/invoices/in_1", 200, invoice(json!({})));
    script(
        &standin,
        "POST /v1/invoices/in_1/pay",
        200,
        invoice(json!({"status": "paid", "amount_paid": 2000, "amount_remaining": 0})),
    );
    let third = sidecar.post(&key, "/v1/invoices/in_1/pay", "r", &[]).await;
    assert_eq!(third.status, 409, "another call on this invoice is in doubt");
}

/// A payment record is a payment out of band.
#[tokio::test]
async fn a_payment_record_waives_an_invoice() {
    let (standin, sidecar) = world().await;
    let more = json!({"max_usd_per_request": "20"});
    let (key, _) = mint(&sidecar, "100.00", &["POST /v1/invoices/{id}/attach_payment"], more).await;
    script(
        &standin,
        "POST /v1/invoices/in_1/attach_payment",
        200,
        invoice(json!({"status": "paid", "amount_paid": 0, "amount_remaining": 0})),
    );
    let reply =
        sidecar.post(&key, "/v1/invoices/in_1/attach_payment", "a", &[("payment_record", "pr_1")]).await;
    assert_eq!(reply.code(), "parameter_not_allowed");
}

/// An item of a draft that becomes dearer without any of the parameters that are priced.
#[tokio::test]
async fn discountable_and_tax_are_free() {
    let (standin, sidecar) = world().await;
    let (key, _) = mint(&sidecar, "5.00", &["POST /v1/invoiceitems/{id}"], json!({})).await;
    for (name, value) in [
        ("discountable", "false"),
        ("tax_behavior", "exclusive"),
        ("tax_code", "txcd_1"),
        ("invoicing_rules[x]", "y"),
    ] {
        script(&standin, "POST /v1/invoiceitems/ii_1", 200, item(json!({"amount": 100})));
        let reply = sidecar.post(&key, "/v1/invoiceitems/ii_1", name, &[(name, value)]).await;
        assert_eq!(reply.verdict(), (400, "parameter_invalid"), "{name}: {}", reply.text);
        standin.clear_faults();
    }
}

/// A declined intent whose secret the caller has.
#[tokio::test]
async fn a_declined_intent_with_its_secret() {
    let (_standin, sidecar) = world().await;
    let (key, id) =
        mint(&sidecar, "20.00", &["POST /v1/payment_intents"], json!({"client_secrets": true})).await;
    for name in ["a", "b", "c"] {
        let form = [
            ("amount", "2000"),
            ("currency", "usd"),
            ("customer", "cus_9"),
            ("confirm", "true"),
            ("payment_method", "pm_card_chargeDeclined"),
        ];
        sidecar.post(&key, "/v1/payment_intents", name, &form).await;
    }
    assert_ne!(sidecar.spend(&id).await.1, "0.00", "each can be confirmed in a browser");
}

/// A free update makes somebody else's intent fit a constraint.
#[tokio::test]
async fn a_free_update_of_the_customer() {
    let (standin, sidecar) = world().await;
    let endpoints = ["POST /v1/payment_intents/{id}", "POST /v1/payment_intents/{id}/confirm"];
    let more = json!({"constraints": {"customer": ["cus_9"]}});
    let (key, _) = mint(&sidecar, "20.00", &endpoints, more).await;
    let pi = |customer: Value| {
        json!({"id": "pi_8", "object": "payment_intent", "currency": "usd", "amount": 2000,
        "amount_received": 0, "status": "requires_confirmation", "customer": customer, "payment_method": "pm_of_somebody"})
    };
    script(&standin, "GET /v1/payment_intents/pi_8", 200, pi(json!("cus_8")));
    let direct = sidecar.post(&key, "/v1/payment_intents/pi_8/confirm", "a", &[]).await;
    standin.clear_faults();
    script(&standin, "GET /v1/payment_intents/pi_8", 200, pi(json!("cus_8")));
    script(&standin, "POST /v1/payment_intents/pi_8", 200, pi(json!("cus_9")));
    let update = sidecar.post(&key, "/v1/payment_intents/pi_8", "b", &[("customer", "cus_9")]).await;
    assert_eq!((direct.code(), update.code()), ("parameter_not_allowed", "parameter_not_allowed"));
}

/// A change of a subscription that charges at once.
#[tokio::test]
async fn an_upgrade_that_charges_at_once() {
    let (standin, sidecar) = world().await;
    let more = json!({"max_usd_per_request": "10.00"});
    let (key, _) = mint(&sidecar, "30.00", &["POST /v1/subscriptions/{id}"], more).await;
    let mut done = 0;
    for name in ["a", "b", "c"] {
        let sub = json!({"id": "sub_1", "object": "subscription", "currency": "usd", "customer": "cus_9",
            "status": "active", "latest_invoice": format!("in_{name}")});
        script(&standin, "POST /v1/subscriptions/sub_1", 200, sub);
        let paid = invoice(
            json!({"id": format!("in_{name}"), "status": "paid", "amount_paid": 500_000, "amount_remaining": 0}),
        );
        script(&standin, &format!("GET /v1/invoices/in_{name}"), 200, paid);
        let form = [("items[0][price]", "price_5000"), ("proration_behavior", "always_invoice")];
        done += usize::from(sidecar.post(&key, "/v1/subscriptions/sub_1", name, &form).await.status == 200);
        standin.clear_faults();
    }
    assert_eq!(done, 1, "5,000 USD each, and the first one tells");
}

/// An uncapped key changes a line of an invoice that is held under a cap.
#[tokio::test]
async fn an_uncapped_key_and_a_line() {
    let (standin, sidecar) = world().await;
    let (key, _) = mint(&sidecar, "30.00", &["POST /v1/invoices/{id}/finalize"], json!({})).await;
    script(&standin, "GET /v1/invoices/in_1", 200, invoice(json!({"status": "draft"})));
    script(
        &standin,
        "POST /v1/invoices/in_1/finalize",
        200,
        invoice(json!({"status": "draft", "auto_advance": true})),
    );
    assert_eq!(sidecar.post(&key, "/v1/invoices/in_1/finalize", "f", &[]).await.status, 200);
    let policy = json!({"label": "u", "vendor": "stripe", "expires_in_seconds": 600, "daily_usd_cap": null, "uncapped": true,
        "allowed_endpoints": ["POST /v1/invoices/{id}/lines/{id}", "POST /v1/invoices/{id}/add_lines"]});
    let (free, _) = sidecar.mint_policy(&policy).await;
    let line = json!({"id": "il_1", "object": "line_item", "currency": "usd", "amount": 500_000});
    script(&standin, "POST /v1/invoices/in_1/lines/il_1", 200, line);
    let add = sidecar.post(&free, "/v1/invoices/in_1/add_lines", "x", &[("lines[0][amount]", "1")]).await;
    let reply = sidecar.post(&free, "/v1/invoices/in_1/lines/il_1", "l", &[("amount", "500000")]).await;
    assert_eq!(reply.code(), add.code(), "the invoice is held under a cap");
}

/// A declined confirm, made again: the first one carried no pin, the second one does.
#[tokio::test]
async fn a_declined_confirm_made_again() {
    let (_standin, sidecar) = world().await;
    let endpoints = ["POST /v1/payment_intents", "POST /v1/payment_intents/{id}/confirm"];
    let mut told = Vec::new();
    for (at, more) in [json!({}), json!({"idempotency": "content", "idempotency_scope": "billing:2026-07"})]
        .into_iter()
        .enumerate()
    {
        let (key, _) = mint(&sidecar, "50.00", &endpoints, more).await;
        let form = [
            ("amount", "2000"),
            ("currency", "usd"),
            ("customer", "cus_9"),
            ("payment_method", "pm_card_chargeDeclined"),
        ];
        let made = sidecar.post(&key, "/v1/payment_intents", &format!("m{at}"), &form).await;
        assert_eq!(made.status, 200, "{}", made.text);
        let path = format!("/v1/payment_intents/{}/confirm", made.body["id"].as_str().unwrap());
        for _ in 0..3 {
            let reply = sidecar.post(&key, &path, &format!("c{at}"), &[]).await;
            told.push(reply.status);
        }
    }
    assert_eq!(told, [402; 6]);
}

/// A delete that bills, in doubt, made again.
#[tokio::test]
async fn a_delete_in_doubt() {
    let (standin, sidecar) = world().await;
    let more = json!({"max_usd_per_request": "30"});
    let (key, id) = mint(&sidecar, "100.00", &["DELETE /v1/subscriptions/{id}"], more).await;
    let path = "/v1/subscriptions/sub_1?invoice_now=true";
    script(&standin, "DELETE /v1/subscriptions/sub_1", 500, json!({"error": {"type": "api_error"}}));
    sidecar.call("DELETE", path, &key, &[("idempotency-key", "a")], &[]).await;
    script(
        &standin,
        "DELETE /v1/subscriptions/sub_1",
        404,
        json!({"error": {"type": "invalid_request_error"}}),
    );
    sidecar.call("DELETE", path, &key, &[("idempotency-key", "a")], &[]).await;
    assert_eq!(sidecar.spend(&id).await.2, "30.00");
}

/// What a discount took off comes back, uncounted.
#[tokio::test]
async fn discountable_on_a_billed_item() {
    let (standin, sidecar) = world().await;
    let endpoints = ["POST /v1/invoiceitems", "POST /v1/invoiceitems/{id}", "POST /v1/invoices"];
    let (key, id) = mint(&sidecar, "120.00", &endpoints, json!({"max_usd_per_request": "100.00"})).await;
    script(&standin, "POST /v1/invoiceitems", 200, item(json!({"amount": 10_000})));
    let form = [ITEM, &[("amount", "10000")]].concat();
    assert_eq!(sidecar.post(&key, "/v1/invoiceitems", "i", &form).await.status, 200);
    // Another key, whose ceiling is small: 90 % off the invoice.
    let (small, small_id) =
        mint(&sidecar, "10.00", &endpoints, json!({"max_usd_per_request": "10.00"})).await;
    let lines = json!({"object": "list", "data": [{"id": "il_1", "parent": {"invoice_item_details": {"invoice_item": "ii_1"}}}]});
    let draft = invoice(
        json!({"status": "draft", "auto_advance": true, "amount_due": 1000, "amount_remaining": 1000, "lines": lines}),
    );
    script(&standin, "POST /v1/invoices", 200, draft);
    let form = [("customer", "cus_9"), ("discounts[0][coupon]", "90off"), ("auto_advance", "true")];
    assert_eq!(sidecar.post(&small, "/v1/invoices", "n", &form).await.status, 200);
    script(&standin, "POST /v1/invoiceitems/ii_1", 200, item(json!({"amount": 10_000, "invoice": "in_1"})));
    let free = sidecar.post(&small, "/v1/invoiceitems/ii_1", "d", &[("discountable", "false")]).await;
    assert_eq!(free.status, 200, "{}", free.text);
    assert_eq!(sidecar.spend(&id).await.1, "110.00", "Stripe collects 100 USD");
    assert_eq!(sidecar.spend(&small_id).await.1, "10.00");
}

/// What was paid in another currency than is held, told by the answer that ends it.
#[tokio::test]
async fn a_part_paid_invoice_in_euros_is_voided() {
    let (standin, sidecar) = world().await;
    let endpoints = ["POST /v1/invoices", "POST /v1/invoices/{id}/void"];
    let (key, id) = mint(&sidecar, "100.00", &endpoints, json!({"max_usd_per_request": "20.00"})).await;
    let draft = invoice(json!({"status": "draft", "auto_advance": true}));
    script(&standin, "POST /v1/invoices", 200, draft);
    assert_eq!(sidecar.post(&key, "/v1/invoices", "n", &[("customer", "cus_9")]).await.status, 200);
    let mut void = invoice(json!({"status": "void", "currency": "eur", "amount_paid": 500}));
    script(&standin, "POST /v1/invoices/in_1/void", 200, void.clone());
    assert_eq!(sidecar.post(&key, "/v1/invoices/in_1/void", "v", &[]).await.status, 200);
    let held = ("0.00".to_owned(), "20.00".to_owned(), "0.00".to_owned());
    assert_eq!(sidecar.spend(&id).await, held, "5 EUR are not 5 USD");
    void["currency"] = json!("usd");
    script(&standin, "POST /v1/invoices/in_1/void", 200, void);
    assert_eq!(sidecar.post(&key, "/v1/invoices/in_1/void", "w", &[]).await.status, 200);
    assert_eq!(sidecar.spend(&id).await.0, "5.00");
}
