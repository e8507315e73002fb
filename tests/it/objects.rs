//! One object, one hold: what is done to a payment intent or a charge after it was made, and refunds of it.

use serde_json::{Value, json};

use crate::standin::Standin;
use crate::standin::bank::Kind;
use crate::standin::faults::Fault;
use crate::standin::intents::Settlement;
use crate::support::{Reply, Sidecar, world};

fn all_operations() -> Value {
    json!({
        "allowed_endpoints": [
            "POST /v1/charges",
            "POST /v1/charges/{id}/capture",
            "POST /v1/payment_intents",
            "POST /v1/payment_intents/{id}/confirm",
            "POST /v1/payment_intents/{id}/capture",
            "POST /v1/payment_intents/{id}/cancel",
            "POST /v1/payment_intents/{id}/increment_authorization",
            "GET /v1/payment_intents/{id}",
        ]
    })
}

fn refunds(daily_usd_out_cap: &str) -> Value {
    let mut policy = all_operations();
    policy["allowed_endpoints"].as_array_mut().unwrap().push(json!("POST /v1/refunds"));
    policy["daily_usd_out_cap"] = json!(daily_usd_out_cap);
    policy
}

fn money(spent: &str, held: &str, doubt: &str) -> (String, String, String) {
    (spent.into(), held.into(), doubt.into())
}

/// A payment intent of 10.00 that waits for its capture method.
async fn intent(sidecar: &Sidecar, key: &str, name: &str, more: &[(&str, &str)]) -> String {
    let mut form = vec![("amount", "1000"), ("currency", "usd"), ("customer", "cus_1")];
    form.extend_from_slice(more);
    let reply = sidecar.post(key, "/v1/payment_intents", name, &form).await;
    assert_eq!(reply.status, 200, "{}", reply.text);
    reply.body["id"].as_str().unwrap().to_owned()
}

/// Does something to an intent under an idempotency key that says what.
async fn act(sidecar: &Sidecar, key: &str, intent: &str, verb: &str, form: &[(&str, &str)]) -> Reply {
    let parts: Vec<_> = form.iter().map(|(_, value)| *value).collect();
    let name = format!("{intent}-{verb}-{}", parts.join("-"));
    sidecar.post(key, &format!("/v1/payment_intents/{intent}/{verb}"), &name, form).await
}

fn status(reply: &Reply) -> (u16, &str) {
    (reply.status, reply.body["status"].as_str().unwrap_or_else(|| reply.code()))
}

fn moved(standin: &Standin, kind: Kind) -> u64 {
    standin.executed().iter().filter(|one| one.kind == kind).map(|one| one.amount).sum()
}

const GOOD: (&str, &str) = ("payment_method", "pm_card_visa");
const BAD: (&str, &str) = ("payment_method", "pm_card_visa_chargeDeclined");
const MANUAL: (&str, &str) = ("capture_method", "manual");

#[tokio::test]
async fn an_intent_has_one_hold_from_creation_to_capture() {
    let (standin, sidecar) = world().await;
    let (key, id) = sidecar.mint("16.00", all_operations()).await;
    let (other, other_id) = sidecar.mint("99.00", all_operations()).await;
    let made = intent(&sidecar, &key, "order-1", &[MANUAL]).await;
    assert_eq!(sidecar.spend(&id).await, money("0.00", "10.00", "0.00"), "reserved at creation");
    let confirmed = act(&sidecar, &other, &made, "confirm", &[GOOD]).await;
    assert_eq!(status(&confirmed), (200, "requires_capture"), "{}", confirmed.text);
    assert_eq!(sidecar.spend(&id).await, money("0.00", "10.00", "0.00"), "and not once more");
    let raised = act(&sidecar, &other, &made, "increment_authorization", &[("amount", "1500")]).await;
    assert_eq!(status(&raised), (200, "requires_capture"), "{}", raised.text);
    assert_eq!(sidecar.spend(&id).await, money("0.00", "15.00", "0.00"), "the amount is the new total");
    let too_much = act(&sidecar, &other, &made, "increment_authorization", &[("amount", "1700")]).await;
    assert_eq!(too_much.verdict(), (429, "spend_cap_exceeded"), "the key that made it pays");
    assert_eq!(too_much.body["error"]["requested"], "2.00");
    assert_eq!(sidecar.spend(&id).await, money("0.00", "15.00", "0.00"));
    let taken = act(&sidecar, &other, &made, "capture", &[("amount_to_capture", "600")]).await;
    assert_eq!(status(&taken), (200, "succeeded"), "{}", taken.text);
    assert_eq!(sidecar.spend(&id).await, money("6.00", "0.00", "0.00"), "the rest is released");
    assert_eq!(sidecar.spend(&other_id).await, money("0.00", "0.00", "0.00"));
    assert_eq!((moved(&standin, Kind::Capture), moved(&standin, Kind::Authorization)), (600, 1500));
    let records = sidecar.audit(&format!("events=all&object_id={made}")).await;
    let holds: std::collections::BTreeSet<_> =
        records.iter().filter_map(|one| one["hold_id"].as_str()).collect();
    assert_eq!(holds.len(), 1, "{records:#?}");
    // The creation is spent with its hold, and its replay is what was answered then.
    let again = sidecar
        .post(
            &key,
            "/v1/payment_intents",
            "order-1",
            &[MANUAL, ("amount", "1000"), ("currency", "usd"), ("customer", "cus_1")],
        )
        .await;
    assert_eq!((again.status, again.header("idempotent-replayed")), (200, Some("true")), "{}", again.text);
    let calls = sidecar.list(&format!("/admin/calls?object_id={made}")).await;
    let states: Vec<_> = calls.iter().map(|call| call["state"].as_str().unwrap()).collect();
    assert_eq!(states, ["spent"; 4], "{calls:#?}");
}

#[tokio::test]
async fn captures_in_parts_keep_the_rest_held() {
    let (standin, sidecar) = world().await;
    let (key, id) = sidecar.mint("10.00", all_operations()).await;
    let made = intent(&sidecar, &key, "order-1", &[MANUAL, GOOD, ("confirm", "true")]).await;
    let part = [("amount_to_capture", "400"), ("final_capture", "false")];
    let first = act(&sidecar, &key, &made, "capture", &part).await;
    assert_eq!(status(&first), (200, "requires_capture"), "{}", first.text);
    assert_eq!(sidecar.spend(&id).await, money("0.00", "10.00", "0.00"));
    let last = act(&sidecar, &key, &made, "capture", &[("amount_to_capture", "500")]).await;
    assert_eq!(status(&last), (200, "succeeded"), "{}", last.text);
    assert_eq!(sidecar.spend(&id).await, money("9.00", "0.00", "0.00"));
    assert_eq!(moved(&standin, Kind::Capture), 900);
}

#[tokio::test]
async fn a_charge_is_captured_on_its_own_hold() {
    let (standin, sidecar) = world().await;
    let (key, id) = sidecar.mint("10.00", all_operations()).await;
    let (other, _) = sidecar.mint("10.00", all_operations()).await;
    let form = [("amount", "1000"), ("currency", "usd"), ("source", "tok_visa"), ("capture", "false")];
    let made = sidecar.post(&key, "/v1/charges", "order-1", &form).await;
    assert_eq!(status(&made), (200, "succeeded"), "{}", made.text);
    assert_eq!(sidecar.spend(&id).await, money("0.00", "10.00", "0.00"), "authorised is held");
    let path = format!("/v1/charges/{}/capture", made.body["id"].as_str().unwrap());
    let too_much = sidecar.post(&other, &path, "capture-too-much", &[("amount", "1100")]).await;
    assert_eq!(too_much.verdict(), (429, "spend_cap_exceeded"), "{}", too_much.text);
    let taken = sidecar.post(&other, &path, "capture-1", &[("amount", "700")]).await;
    assert_eq!(taken.status, 200, "{}", taken.text);
    assert_eq!(sidecar.spend(&id).await, money("7.00", "0.00", "0.00"));
    let again = sidecar.post(&key, &path, "capture-1", &[("amount", "700")]).await;
    assert_eq!((again.text, moved(&standin, Kind::Capture)), (taken.text, 700));
}

#[tokio::test]
async fn what_waits_for_a_payer_or_a_bank_stays_held() {
    let (standin, sidecar) = world().await;
    let (key, id) = sidecar.mint("20.00", all_operations()).await;
    let three_ds = intent(&sidecar, &key, "order-1", &[]).await;
    let action = [("payment_method", "pm_card_authenticationRequired")];
    let waiting = act(&sidecar, &key, &three_ds, "confirm", &action).await;
    assert_eq!(status(&waiting), (200, "requires_action"), "{}", waiting.text);
    let bank = intent(&sidecar, &key, "order-2", &[]).await;
    let debit = [("payment_method", "pm_usBankAccount_processing")];
    let processing = act(&sidecar, &key, &bank, "confirm", &debit).await;
    assert_eq!(status(&processing), (200, "processing"), "{}", processing.text);
    assert_eq!(sidecar.spend(&id).await, money("0.00", "20.00", "0.00"));
    assert_eq!(sidecar.holds(&id).await, ["open", "open"]);
    let replayed = act(&sidecar, &key, &bank, "confirm", &debit).await;
    assert_eq!(replayed.header("idempotent-replayed"), Some("true"));
    // Another card pays, on the same hold.
    let paid = act(&sidecar, &key, &three_ds, "confirm", &[GOOD]).await;
    assert_eq!(status(&paid), (200, "succeeded"), "{}", paid.text);
    assert_eq!(sidecar.spend(&id).await, money("10.00", "10.00", "0.00"));
    // What the bank did afterwards is not known here yet, and goes on being counted.
    standin.settle(&bank, Settlement::Succeeded).unwrap();
    assert_eq!(sidecar.spend(&id).await, money("10.00", "10.00", "0.00"));
    assert_eq!(moved(&standin, Kind::Charge), 2000);
}

#[tokio::test]
async fn a_decline_on_confirm_voids_and_a_later_confirm_reserves_anew() {
    let (standin, sidecar) = world().await;
    let (key, id) = sidecar.mint("10.00", all_operations()).await;
    let (other, other_id) = sidecar.mint("12.00", all_operations()).await;
    let made = intent(&sidecar, &key, "order-1", &[]).await;
    let declined = act(&sidecar, &key, &made, "confirm", &[BAD]).await;
    assert_eq!(status(&declined), (402, "card_declined"), "{}", declined.text);
    assert_eq!(sidecar.spend(&id).await, money("0.00", "0.00", "0.00"));
    assert_eq!(sidecar.charge(&key, "order-2", 500, "cus_1").await.status, 200);
    let full = act(&sidecar, &key, &made, "confirm", &[GOOD]).await;
    assert_eq!(full.verdict(), (429, "spend_cap_exceeded"), "its room was given away: {}", full.text);
    let paid = act(&sidecar, &other, &made, "confirm", &[GOOD]).await;
    assert_eq!(status(&paid), (200, "succeeded"), "{}", paid.text);
    assert_eq!(sidecar.spend(&id).await, money("5.00", "0.00", "0.00"));
    assert_eq!(sidecar.spend(&other_id).await, money("10.00", "0.00", "0.00"), "who confirms now pays");
    assert_eq!(moved(&standin, Kind::Charge), 1500);
    // Made and declined in one request: the intent exists, and can be confirmed.
    let form = [("amount", "200"), ("currency", "usd"), BAD, ("confirm", "true")];
    let both = sidecar.post(&other, "/v1/payment_intents", "order-3", &form).await;
    assert_eq!(both.status, 402, "{}", both.text);
    let made = both.body["error"]["payment_intent"]["id"].as_str().unwrap().to_owned();
    assert_eq!(sidecar.spend(&other_id).await, money("10.00", "0.00", "0.00"));
    let paid = act(&sidecar, &other, &made, "confirm", &[GOOD]).await;
    assert_eq!(status(&paid), (200, "succeeded"), "{}", paid.text);
    assert_eq!(sidecar.spend(&other_id).await, money("12.00", "0.00", "0.00"));
}

#[tokio::test]
async fn a_cancel_releases_and_only_when_stripe_says_so() {
    let (standin, sidecar) = world().await;
    let (key, id) = sidecar.mint("20.00", all_operations()).await;
    let (other, _) = sidecar.mint("1.00", all_operations()).await;
    let open = intent(&sidecar, &key, "order-1", &[]).await;
    let authorised = intent(&sidecar, &key, "order-2", &[MANUAL, GOOD, ("confirm", "true")]).await;
    assert_eq!(sidecar.spend(&id).await, money("0.00", "20.00", "0.00"));
    for fault in [Fault::Status500Before, Fault::DropBefore, Fault::RateLimited] {
        standin.fault(fault);
        let path = format!("/v1/payment_intents/{open}/cancel");
        assert_ne!(sidecar.call("POST", &path, &other, &[], &[]).await.status, 200);
        assert_eq!(sidecar.spend(&id).await, money("0.00", "20.00", "0.00"));
    }
    // It moves no money, so any key that grants it may do it, with any idempotency key or none.
    let canceled =
        sidecar.call("POST", &format!("/v1/payment_intents/{open}/cancel"), &other, &[], &[]).await;
    assert_eq!(status(&canceled), (200, "canceled"), "{}", canceled.text);
    assert_eq!(sidecar.spend(&id).await, money("0.00", "10.00", "0.00"));
    let canceled = act(&sidecar, &key, &authorised, "cancel", &[]).await;
    assert_eq!(status(&canceled), (200, "canceled"), "{}", canceled.text);
    assert_eq!(sidecar.spend(&id).await, money("0.00", "0.00", "0.00"));
    assert!(sidecar.holds(&id).await.is_empty());
    let unknown = sidecar.call("POST", "/v1/payment_intents/pi_unknown/cancel", &key, &[], &[]).await;
    assert_eq!(unknown.verdict(), (404, "resource_missing"), "an unknown one passes: {}", unknown.text);
    // A paid one is not released by a cancel that Stripe refuses.
    let paid = intent(&sidecar, &key, "order-3", &[GOOD, ("confirm", "true")]).await;
    let refused = act(&sidecar, &key, &paid, "cancel", &[]).await;
    assert_eq!(refused.status, 400, "{}", refused.text);
    assert_eq!(sidecar.spend(&id).await, money("10.00", "0.00", "0.00"));
}

#[tokio::test]
async fn one_call_on_an_object_at_a_time() {
    let (standin, sidecar) = world().await;
    let sidecar = std::sync::Arc::new(sidecar);
    let (key, id) = sidecar.mint("10.00", all_operations()).await;
    let made = intent(&sidecar, &key, "order-1", &[]).await;
    standin.fault(Fault::Hold);
    let first = {
        let (sidecar, key, made) = (std::sync::Arc::clone(&sidecar), key.clone(), made.clone());
        tokio::spawn(async move { act(&sidecar, &key, &made, "confirm", &[GOOD]).await })
    };
    standin.until_held(1).await;
    let second = act(&sidecar, &key, &made, "confirm", &[("payment_method", "pm_card_mastercard")]).await;
    assert_eq!(second.verdict(), (409, "idempotency_key_in_use"), "{}", second.text);
    assert_eq!(second.header("stripe-should-retry"), Some("true"));
    standin.release();
    assert_eq!(status(&first.await.unwrap()), (200, "succeeded"));
    assert_eq!(
        (sidecar.spend(&id).await, moved(&standin, Kind::Charge)),
        (money("10.00", "0.00", "0.00"), 1000)
    );
}

#[tokio::test]
async fn a_doubt_on_an_object_keeps_its_money_until_that_call_is_made_again() {
    let (standin, sidecar) = world().await;
    let (key, id) = sidecar.mint("30.00", all_operations()).await;
    let made = intent(&sidecar, &key, "order-1", &[MANUAL, GOOD, ("confirm", "true")]).await;
    standin.fault(Fault::DropAfter);
    let raise = [("amount", "1500")];
    let lost = act(&sidecar, &key, &made, "increment_authorization", &raise).await;
    assert_eq!(lost.verdict(), (502, "outcome_unknown"), "{}", lost.text);
    assert_eq!(sidecar.spend(&id).await, money("0.00", "15.00", "15.00"), "the higher amount is counted");
    let capture = act(&sidecar, &key, &made, "capture", &[]).await;
    assert_eq!(capture.verdict(), (409, "idempotency_key_in_use"), "{}", capture.text);
    let again = act(&sidecar, &key, &made, "increment_authorization", &raise).await;
    assert_eq!(again.status, 200, "{}", again.text);
    assert_eq!(sidecar.spend(&id).await, money("0.00", "15.00", "0.00"));
    // Refused, declined, or lost and then proven refused: the hold is again what it was.
    let refusal = json!({"error": {"type": "invalid_request_error", "message": "No."}});
    let refused = |replayed: bool| {
        let replay = replayed.then(|| ("idempotent-replayed".to_owned(), "true".to_owned()));
        Fault::Answer { status: 400, body: refusal.clone(), headers: replay.into_iter().collect() }
    };
    for (amount, faults) in [
        ("1600", vec![(refused(false), 400)]),
        ("1700", vec![(Fault::Decline, 402)]),
        ("1800", vec![(Fault::DropBefore, 502), (refused(true), 400)]),
    ] {
        for (fault, expected) in faults {
            standin.fault(fault);
            let reply = act(&sidecar, &key, &made, "increment_authorization", &[("amount", amount)]).await;
            assert_eq!(reply.status, expected, "{amount}: {}", reply.text);
        }
        assert_eq!(sidecar.spend(&id).await, money("0.00", "15.00", "0.00"), "{amount}");
        assert_eq!(sidecar.holds(&id).await, ["open"]);
    }
    let taken = act(&sidecar, &key, &made, "capture", &[]).await;
    assert_eq!(status(&taken), (200, "succeeded"), "{}", taken.text);
    assert_eq!(sidecar.spend(&id).await, money("15.00", "0.00", "0.00"));
    assert_eq!(moved(&standin, Kind::Capture), 1500);
}

#[tokio::test]
async fn an_object_that_nobody_knows_has_no_price() {
    let (standin, sidecar) = world().await;
    let (key, id) = sidecar.mint("30.00", refunds("5.00")).await;
    for (path, form) in [
        ("/v1/payment_intents/pi_other/confirm", vec![]),
        ("/v1/payment_intents/pi_other/capture", vec![("amount_to_capture", "1")]),
        ("/v1/payment_intents/pi_other/increment_authorization", vec![("amount", "100")]),
        ("/v1/charges/ch_other/capture", vec![]),
        ("/v1/refunds", vec![("charge", "ch_other"), ("amount", "100")]),
    ] {
        let reply = sidecar.post(&key, path, path, &form).await;
        assert_eq!(reply.verdict(), (404, "not_found"), "{path}: {}", reply.text);
    }
    assert_eq!(standin.requests().iter().filter(|seen| seen.method == "POST").count(), 0);
    assert_eq!(sidecar.spend(&id).await, money("0.00", "0.00", "0.00"));
}

#[tokio::test]
async fn refunds_are_counted_apart_and_give_nothing_back() {
    let (standin, sidecar) = world().await;
    let mut uncapped_out = refunds("5.00");
    uncapped_out["daily_usd_out_cap"] = Value::Null;
    uncapped_out["label"] = json!("x");
    for (name, value) in
        [("vendor", json!("stripe")), ("daily_usd_cap", json!("1.00")), ("expires_in_seconds", json!(60))]
    {
        uncapped_out[name] = value;
    }
    let minted = sidecar.admin("POST", "/admin/vault_keys", Some(&uncapped_out)).await;
    assert_eq!(minted.verdict(), (400, "parameter_invalid"), "{}", minted.text);
    assert_eq!(minted.body["error"]["param"], "daily_usd_out_cap");

    let (key, id) = sidecar.mint("10.00", refunds("5.00")).await;
    let charge = sidecar.charge(&key, "order-1", 1000, "cus_1").await.body["id"].as_str().unwrap().to_owned();
    let refund = |name: &'static str, form: Vec<(&'static str, String)>| {
        let (sidecar, key) = (&sidecar, &key);
        async move {
            let form: Vec<_> = form.iter().map(|(name, value)| (*name, value.as_str())).collect();
            sidecar.post(key, "/v1/refunds", name, &form).await
        }
    };
    let whole = refund("refund-0", vec![("charge", charge.clone())]).await;
    assert_eq!(whole.verdict(), (429, "spend_cap_exceeded"), "all of it is 10.00: {}", whole.text);
    assert_eq!(whole.body["error"]["requested"], "10.00");
    let both = vec![("charge", charge.clone()), ("payment_intent", "pi_1".into()), ("amount", "1".into())];
    assert_eq!(refund("refund-0", both).await.verdict(), (400, "parameter_invalid"));
    let first = refund("refund-1", vec![("charge", charge.clone()), ("amount", "300".into())]).await;
    assert_eq!(status(&first), (200, "succeeded"), "{}", first.text);
    assert_eq!(sidecar.spend(&id).await, money("10.00", "0.00", "0.00"), "no budget comes back");
    let out = sidecar.key(&id).await["spend"]["today"]["out"].clone();
    assert_eq!((&out["spent"], &out["remaining"]), (&json!("3.00"), &json!("2.00")));
    let over = refund("refund-2", vec![("charge", charge.clone()), ("amount", "201".into())]).await;
    assert_eq!(over.verdict(), (429, "spend_cap_exceeded"), "{}", over.text);
    let told = |field: &str| over.body["error"][field].as_str().unwrap().to_owned();
    assert_eq!(
        (told("cap"), told("limit"), told("spent")),
        ("daily_out".into(), "5.00".into(), "3.00".into())
    );
    let again = refund("refund-1", vec![("charge", charge.clone()), ("amount", "300".into())]).await;
    assert_eq!(again.header("idempotent-replayed"), Some("true"));
    let more = sidecar.charge(&key, "order-2", 100, "cus_1").await;
    assert_eq!(more.verdict(), (429, "spend_cap_exceeded"), "what was refunded stays spent");
    assert_eq!(moved(&standin, Kind::Refund), 300);
}

#[tokio::test]
async fn an_intent_is_refunded_by_its_own_name_or_its_charges() {
    let (standin, sidecar) = world().await;
    let (key, id) = sidecar.mint("10.00", refunds("9.00")).await;
    let made = intent(&sidecar, &key, "order-1", &[GOOD, ("confirm", "true")]).await;
    let read = sidecar.call("GET", &format!("/v1/payment_intents/{made}"), &key, &[], &[]).await;
    let charge = read.body["latest_charge"].as_str().unwrap().to_owned();
    for (name, object) in [("payment_intent", &made), ("charge", &charge)] {
        let form = [(name, object.as_str()), ("amount", "400")];
        let reply = sidecar.post(&key, "/v1/refunds", name, &form).await;
        assert_eq!(status(&reply), (200, "succeeded"), "{name}: {}", reply.text);
    }
    assert_eq!((moved(&standin, Kind::Refund), sidecar.spend(&id).await.0), (800, "10.00".into()));
}

/// What Stripe says is booked, whatever was held; but a key that was taken beyond its hold does nothing more.
#[tokio::test]
async fn more_than_was_held_is_booked_told_and_closes_the_key() {
    let (standin, sidecar) = world().await;
    let (key, id) = sidecar.mint("12.00", all_operations()).await;
    assert_eq!(sidecar.charge(&key, "order-0", 100, "cus_1").await.status, 200);
    let body = json!({
        "object": "charge", "id": "ch_over", "amount": 1500, "amount_captured": 1500, "currency": "usd",
        "status": "succeeded", "captured": true,
    });
    standin.fault(Fault::Answer { status: 200, body, headers: std::collections::BTreeMap::new() });
    let over = sidecar.charge(&key, "order-1", 1000, "cus_1").await;
    assert_eq!(over.status, 200, "{}", over.text);
    assert_eq!(sidecar.spend(&id).await, money("16.00", "0.00", "0.00"));
    let shown = sidecar.key(&id).await;
    assert_eq!((&shown["status"], &shown["spend"]["today"]["remaining"]), (&json!("closed"), &json!("0.00")));
    let record = &sidecar.audit("outcome=spent&idempotency_key=order-1").await[0];
    assert_eq!(
        (&record["flags"], &record["usd"], &record["amount"]),
        (&json!(["over_hold"]), &json!("15.00"), &json!(1500))
    );
    for name in ["order-0", "order-2"] {
        let closed = sidecar.charge(&key, name, 100, "cus_1").await;
        assert_eq!(closed.verdict(), (403, "vault_key_closed"), "{name}: {}", closed.text);
    }
    assert_eq!(sidecar.list("/admin/vault_keys?status=closed").await.len(), 1);
}
