//! Doubts that end by asking Stripe, or by an operator; in a real process, in front of the stand-in.

use serde_json::{Value, json};
use tokio::time::{Duration, Instant, sleep};

use crate::families::script;
use crate::standin::Standin;
use crate::standin::faults::{Fault, On};
use crate::standin::intents::Settlement;
use crate::support::{PATIENCE, Sidecar, run, world};

fn money(spent: &str, held: &str, doubt: &str) -> (String, String, String) {
    (spent.into(), held.into(), doubt.into())
}

/// Waits until a key's spend is this.
async fn becomes(sidecar: &Sidecar, key_id: &str, expected: (String, String, String)) {
    let since = Instant::now();
    loop {
        let told = sidecar.spend(key_id).await;
        if told == expected {
            return;
        }
        assert!(since.elapsed() < PATIENCE, "{told:?} does not become {expected:?}:\n{}", sidecar.log());
        sleep(Duration::from_millis(100)).await;
    }
}

fn posts(standin: &Standin) -> usize {
    standin.requests().iter().filter(|seen| seen.method == "POST").count()
}

#[tokio::test]
async fn a_charge_whose_answer_was_lost_is_found_by_its_stamp_and_replayed() {
    let (standin, sidecar) = world().await;
    let (key, id) = sidecar.mint("50.00", json!({})).await;
    // Others of the same customer and amount, made without the sidecar's stamp or with another's.
    assert_eq!(sidecar.charge(&key, "order-1", 1500, "cus_9").await.status, 200);
    standin.fault(Fault::DropAfter);
    let lost = sidecar.charge(&key, "order-2", 1500, "cus_9").await;
    assert_eq!(lost.verdict(), (502, "outcome_unknown"), "{}", lost.text);
    assert_eq!(sidecar.spend(&id).await, money("15.00", "15.00", "15.00"));
    becomes(&sidecar, &id, money("30.00", "0.00", "0.00")).await;
    let sent = posts(&standin);
    let again = sidecar.charge(&key, "order-2", 1500, "cus_9").await;
    assert_eq!((again.status, again.header("idempotent-replayed")), (200, Some("true")), "{}", again.text);
    assert_eq!((again.body["object"].as_str(), again.body["amount"].as_u64()), (Some("charge"), Some(1500)));
    assert_eq!((posts(&standin), standin.executed().len()), (sent, 2), "and nothing was sent for it");
    let resolved = sidecar.audit("events=all&outcome=spent").await;
    let record = resolved.iter().find(|record| record["event"] == "resolved").unwrap();
    assert_eq!(record["detail"]["found_by"], "stamp", "{record}");
    assert_eq!(record["object_id"], again.body["id"]);
}

#[tokio::test]
async fn what_was_being_sent_when_the_process_died_is_looked_for_at_the_next_start() {
    let (standin, mut sidecar) = world().await;
    let (key, id) = sidecar.mint("50.00", json!({})).await;
    standin.fault(Fault::HoldAfter);
    let (client, base) = (crate::support::client(), sidecar.base.clone());
    let body = "amount=1500&currency=usd&customer=cus_9&source=tok_visa";
    let sending = tokio::spawn(
        client
            .post(format!("{base}/v1/charges"))
            .bearer_auth(&key)
            .header("idempotency-key", "order-1")
            .header("content-type", "application/x-www-form-urlencoded")
            .body(body)
            .send(),
    );
    let since = Instant::now();
    while standin.executed().is_empty() {
        assert!(since.elapsed() < PATIENCE);
        sleep(Duration::from_millis(10)).await;
    }
    sidecar.kill();
    let _ = sending.await;
    sidecar.restart().await;
    becomes(&sidecar, &id, money("15.00", "0.00", "0.00")).await;
    assert_eq!(standin.executed().len(), 1);
}

#[tokio::test]
async fn what_is_not_found_stays_and_the_operator_is_told_what_was_looked_for() {
    let (standin, sidecar) = world().await;
    let (key, id) = sidecar.mint("50.00", json!({})).await;
    standin.fault(Fault::DropBefore);
    assert_eq!(sidecar.charge(&key, "order-1", 1500, "cus_9").await.status, 502);
    let since = Instant::now();
    let hold = loop {
        let hold = sidecar.list("/admin/holds?state=doubt").await.remove(0);
        if hold["search"] != Value::Null {
            break hold;
        }
        assert!(since.elapsed() < PATIENCE);
        sleep(Duration::from_millis(100)).await;
    };
    let search = &hold["search"];
    assert_eq!(search["times"], 1);
    let read = search["read"].as_str().unwrap();
    assert!(read.starts_with("GET /v1/charges?") && read.contains("customer=cus_9"), "{read}");
    let stamp = hold["stamp"].as_str().unwrap();
    assert!(search["came_to"].as_str().unwrap().contains(stamp), "{search}");
    assert_eq!(sidecar.spend(&id).await, money("0.00", "15.00", "15.00"), "absence proves nothing");
    assert_eq!(sidecar.readyz().await, 200, "a doubt is no reason to get no traffic");
    // The commands that it names work, either way.
    let hold_id = hold["id"].as_str().unwrap();
    let commands = hold["resolve_with"].as_array().unwrap();
    assert!(commands.iter().all(|command| command.as_str().unwrap().contains(hold_id)), "{commands:?}");
    operator_says_not_executed(&sidecar, hold_id, &id).await;
    assert_eq!(
        sidecar.charge(&key, "order-1", 1500, "cus_9").await.status,
        200,
        "and the call is free again"
    );
}

/// Commands that are bad usage, that find nothing, and the one that ends it.
async fn operator_says_not_executed(sidecar: &Sidecar, hold_id: &str, key_id: &str) {
    let mut env = sidecar.env().clone();
    env.retain(|name, _| ["KEYBRAKE_ADMIN_KEY"].contains(&name.as_str()));
    env.insert("KEYBRAKE_URL".to_owned(), sidecar.base.clone());
    for (arguments, code) in [
        (&["holds", "resolve", hold_id, "--outcome", "spent", "--reason", "seen"][..], 1),
        (&["holds", "resolve", "--outcome", "not-executed", "--reason", "seen"], 64),
        (&["holds", "resolve", "--all", "--outcome", "spent", "--reason", "seen"], 64),
        (&["holds", "resolve", "--all", "--since", "now", "--outcome", "not-executed", "--reason", "x"], 64),
        (
            &[
                "holds",
                "resolve",
                "--all",
                "--customer",
                "cus_8",
                "--outcome",
                "not-executed",
                "--reason",
                "x",
            ],
            0,
        ),
    ] {
        let (told, stdout, stderr) = run(&env, arguments);
        assert_eq!(told, code, "{arguments:?}: {stdout}{stderr}");
    }
    assert_eq!(sidecar.spend(key_id).await.2, "15.00", "none of these ended it");
    let all = [
        "holds",
        "resolve",
        "--all",
        "--customer",
        "cus_9",
        "--endpoint",
        "/v1/charges",
        "--outcome",
        "not-executed",
        "--reason",
        "Stripe was down",
        "--json",
    ];
    let (code, stdout, stderr) = run(&env, &all);
    assert_eq!(code, 0, "{stdout}{stderr}");
    assert_eq!(sidecar.spend(key_id).await, money("0.00", "0.00", "0.00"));
    let record =
        sidecar.audit("events=all").await.into_iter().find(|record| record["event"] == "resolved").unwrap();
    assert_eq!((&record["actor"], &record["detail"]["reason"]), (&json!("admin"), &json!("Stripe was down")));
}

#[tokio::test]
async fn an_operator_names_the_object_and_the_next_call_is_told_it() {
    let (standin, sidecar) = world().await;
    let (key, id) = sidecar.mint("50.00", json!({})).await;
    let resolve = async |hold: &str, body: Value| {
        sidecar.admin("POST", &format!("/admin/holds/{hold}/resolve"), Some(&body)).await
    };
    standin.fault(Fault::DropAfter);
    assert_eq!(sidecar.charge(&key, "order-1", 1500, "cus_9").await.status, 502);
    let executed = standin.executed()[0].clone();
    let hold = sidecar.list("/admin/holds?state=doubt").await[0]["id"].as_str().unwrap().to_owned();
    for (body, param) in [
        (json!({}), "outcome"),
        (json!({"outcome": "maybe", "reason": "x"}), "outcome"),
        (json!({"outcome": "spent", "amount": 1500, "object_id": "ch_1"}), "reason"),
        (json!({"outcome": "spent", "amount": 1500, "reason": "x"}), "object_id"),
        (json!({"outcome": "spent", "object_id": "ch_1", "reason": "x"}), "amount"),
        (json!({"outcome": "spent", "amount": 15.5, "object_id": "ch_1", "reason": "x"}), "amount"),
        (json!({"outcome": "spent", "amount": 1500, "object_id": "ch_1/x", "reason": "x"}), "object_id"),
        (json!({"outcome": "not_executed", "amount": 1500, "reason": "x"}), "amount"),
        (json!({"outcome": "not_executed", "reason": "  "}), "reason"),
    ] {
        let reply = resolve(&hold, body.clone()).await;
        assert_eq!(
            (reply.verdict(), reply.body["error"]["param"].as_str()),
            ((400, "parameter_invalid"), Some(param)),
            "{body}"
        );
    }
    let said = json!({"outcome": "spent", "amount": 1500, "object_id": executed.object_id, "reason": "in the Dashboard"});
    assert_eq!(resolve("hold_nothing", said.clone()).await.status, 404);
    let reply = resolve(&hold, said.clone()).await;
    assert_eq!((reply.status, reply.body["state"].as_str()), (200, Some("spent")), "{}", reply.text);
    assert_eq!(resolve(&hold, said).await.verdict(), (409, "conflict"));
    assert_eq!(sidecar.spend(&id).await, money("15.00", "0.00", "0.00"));
    let again = sidecar.charge(&key, "order-1", 1500, "cus_9").await;
    assert_eq!((again.status, &again.body["id"]), (200, &json!(executed.object_id)), "{}", again.text);
    assert_eq!(again.header("idempotent-replayed"), Some("true"));
    // Where it cannot be read, its name has to do.
    let on = On::Path { method: "GET".to_owned(), prefix: "/v1/charges/".to_owned() };
    standin.fault(Fault::RateLimited.on(on));
    let unread = sidecar.charge(&key, "order-1", 1500, "cus_9").await;
    assert_eq!(unread.verdict(), (409, "already_executed"), "{}", unread.text);
    assert!(unread.text.contains(&executed.object_id));
    assert_eq!(standin.executed().len(), 1);
    // Taken back, for instance after a refund, the same call is made again.
    let call =
        sidecar.list("/admin/calls?idempotency_key=order-1").await[0]["id"].as_str().unwrap().to_owned();
    let forget = format!("/admin/calls/{call}/forget");
    assert_eq!(sidecar.admin("POST", &forget, Some(&json!({}))).await.body["error"]["param"], "reason");
    let reply = sidecar.admin("POST", &forget, Some(&json!({"reason": "refunded"}))).await;
    assert_eq!((reply.status, reply.body["state"].as_str()), (200, Some("forgotten")), "{}", reply.text);
    assert_eq!(
        sidecar.admin("POST", &forget, Some(&json!({"reason": "twice"}))).await.verdict(),
        (409, "conflict")
    );
    let forgotten =
        sidecar.audit("events=all").await.into_iter().find(|record| record["event"] == "call_forgotten");
    assert_eq!(forgotten.unwrap()["detail"]["reason"], "refunded");
}

#[tokio::test]
async fn a_confirm_whose_answer_was_lost_is_known_by_its_intent() {
    let (standin, sidecar) = world().await;
    let endpoints =
        json!({"allowed_endpoints": ["POST /v1/payment_intents", "POST /v1/payment_intents/{id}/confirm"]});
    let (key, id) = sidecar.mint("50.00", endpoints).await;
    let form =
        [("amount", "1500"), ("currency", "usd"), ("customer", "cus_9"), ("payment_method", "pm_card_visa")];
    let made = sidecar.post(&key, "/v1/payment_intents", "order-1", &form).await;
    let path = format!("/v1/payment_intents/{}/confirm", made.body["id"].as_str().unwrap());
    let confirms = || On::Path { method: "POST".to_owned(), prefix: path.clone() };
    // Not executed: its intent is as it was, which proves nothing.
    standin.fault(Fault::DropBefore.on(confirms()));
    assert_eq!(sidecar.post(&key, &path, "confirm-1", &[]).await.status, 502);
    sleep(Duration::from_secs(6)).await;
    assert_eq!(sidecar.spend(&id).await, money("0.00", "15.00", "15.00"));
    assert!(sidecar.list("/admin/holds?state=doubt").await[0]["search"]["came_to"].is_string());
    // Executed on the second send.
    standin.fault(Fault::DropAfter.on(confirms()));
    assert_eq!(sidecar.post(&key, &path, "confirm-1", &[]).await.status, 502);
    becomes(&sidecar, &id, money("15.00", "0.00", "0.00")).await;
    let again = sidecar.post(&key, &path, "confirm-1", &[]).await;
    assert_eq!((again.status, again.body["status"].as_str()), (200, Some("succeeded")), "{}", again.text);
    assert_eq!(standin.executed().len(), 1);
}

#[tokio::test]
async fn a_refund_whose_answer_was_lost_is_found_among_those_of_its_charge() {
    let (standin, sidecar) = world().await;
    let policy =
        json!({"allowed_endpoints": ["POST /v1/charges", "POST /v1/refunds"], "daily_usd_out_cap": "20.00"});
    let (key, id) = sidecar.mint("50.00", policy).await;
    let charge = sidecar.charge(&key, "order-1", 1500, "cus_9").await;
    let form = [("charge", charge.body["id"].as_str().unwrap()), ("amount", "400")];
    standin.fault(Fault::DropAfter);
    assert_eq!(sidecar.post(&key, "/v1/refunds", "refund-1", &form).await.status, 502);
    let since = Instant::now();
    while sidecar.key(&id).await["spend"]["today"]["out"]["spent"] != "4.00" {
        assert!(since.elapsed() < PATIENCE, "{}", sidecar.log());
        sleep(Duration::from_millis(100)).await;
    }
    let again = sidecar.post(&key, "/v1/refunds", "refund-1", &form).await;
    assert_eq!((again.status, again.body["amount"].as_u64()), (200, Some(400)), "{}", again.text);
}

/// An item is over when the invoice that bills it was paid, whoever made that invoice.
#[tokio::test]
async fn an_item_ends_when_the_invoice_that_bills_it_is_paid() {
    let (standin, mut sidecar) = world().await;
    let endpoints = json!({"allowed_endpoints": ["POST /v1/invoiceitems", "POST /v1/invoices"],
        "max_usd_per_request": "12.00"});
    let (key, id) = sidecar.mint("50.00", endpoints).await;
    // Its invoice was made here as a draft that nobody collects: it counts nothing.
    let draft = json!({"id": "in_1", "object": "invoice", "currency": "usd", "status": "draft",
        "auto_advance": false, "amount_due": 1200, "amount_paid": 0, "amount_remaining": 1200});
    script(&standin, "POST /v1/invoices", 200, draft);
    assert_eq!(sidecar.post(&key, "/v1/invoices", "n", &[("customer", "cus_9")]).await.status, 200);
    assert_eq!(sidecar.spend(&id).await, money("0.00", "0.00", "0.00"));
    let form = [("amount", "1200"), ("currency", "usd"), ("customer", "cus_9")];
    let item = |name: &str, invoice: Value| json!({"id": name, "object": "invoiceitem", "currency": "usd", "amount": 1200, "invoice": invoice});
    for name in ["ii_1", "ii_2", "ii_3"] {
        script(&standin, "POST /v1/invoiceitems", 200, item(name, Value::Null));
        assert_eq!(sidecar.post(&key, "/v1/invoiceitems", name, &form).await.status, 200);
    }
    assert_eq!(sidecar.spend(&id).await, money("0.00", "36.00", "0.00"));
    let invoice = |name: &str, status: &str| json!({"id": name, "object": "invoice", "status": status});
    script(&standin, "GET /v1/invoiceitems/ii_1", 200, item("ii_1", json!("in_1")));
    script(&standin, "GET /v1/invoices/in_1", 200, invoice("in_1", "paid"));
    script(&standin, "GET /v1/invoiceitems/ii_2", 200, item("ii_2", json!("in_2")));
    script(&standin, "GET /v1/invoices/in_2", 200, invoice("in_2", "open"));
    script(&standin, "GET /v1/invoiceitems/ii_3", 200, item("ii_3", Value::Null));
    sidecar.kill();
    sidecar.restart().await;
    becomes(&sidecar, &id, money("12.00", "24.00", "0.00")).await;
    let read = |path: &str| standin.requests().iter().any(|seen| seen.path == path);
    let since = Instant::now();
    while !(read("/v1/invoices/in_2") && read("/v1/invoiceitems/ii_3")) {
        assert!(since.elapsed() < PATIENCE);
        sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(sidecar.spend(&id).await, money("12.00", "24.00", "0.00"), "nobody paid for these yet");
}

/// The other end of a state table: what is open is asked for, and ends by its record alone.
#[tokio::test]
async fn an_open_object_ends_when_its_record_does() {
    let (standin, mut sidecar) = world().await;
    let endpoints = json!({"allowed_endpoints": ["POST /v1/payment_intents"]});
    let (key, id) = sidecar.mint("50.00", endpoints).await;
    let form = |method| {
        [
            ("amount", "1500"),
            ("currency", "usd"),
            ("customer", "cus_9"),
            ("confirm", "true"),
            ("payment_method", method),
        ]
    };
    let mut intents = Vec::new();
    for (name, method) in [("a", "pm_card_authenticationRequired"), ("b", "pm_card_authenticationRequired")] {
        let made = sidecar.post(&key, "/v1/payment_intents", name, &form(method)).await;
        assert_eq!(made.body["status"], "requires_action", "{}", made.text);
        intents.push(made.body["id"].as_str().unwrap().to_owned());
    }
    assert_eq!(sidecar.spend(&id).await, money("0.00", "30.00", "0.00"));
    standin.settle(&intents[0], Settlement::Succeeded).unwrap();
    standin.settle(&intents[1], Settlement::Canceled).unwrap();
    // The timer asks a minute after it was opened, and the start of the process at once.
    sidecar.kill();
    sidecar.restart().await;
    becomes(&sidecar, &id, money("15.00", "0.00", "0.00")).await;
    let again = sidecar.post(&key, "/v1/payment_intents", "a", &form("pm_card_authenticationRequired")).await;
    assert_eq!(again.header("idempotent-replayed"), Some("true"));
}
