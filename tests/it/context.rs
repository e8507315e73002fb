//! Where a request says it comes from (`Keybrake-Context-…`): in every record of it, and nowhere else.

use serde_json::{Value, json};

use crate::raw::{FORM, Raw};
use crate::standin::faults::Fault;
use crate::support::{Reply, Sidecar, world};

const EXECUTION: &str = "Keybrake-Context-Execution";

/// A charge with headers of its own.
async fn charge(sidecar: &Sidecar, key: &str, name: &str, amount: &str, context: &[(&str, &str)]) -> Reply {
    let form = [("amount", amount), ("currency", "usd"), ("customer", "cus_9"), ("source", "tok_visa")];
    let headers: Vec<_> = [("idempotency-key", name)].iter().chain(context).copied().collect();
    sidecar.call("POST", "/v1/charges", key, &headers, &form).await
}

fn events(records: &[Value]) -> Vec<&str> {
    records.iter().map(|record| record["event"].as_str().unwrap()).collect()
}

#[tokio::test]
async fn every_record_of_a_request_says_where_it_came_from() {
    let (standin, mut sidecar) = world().await;
    let policy = json!({
        "metadata": {"flow": "billing", "task": "charge"},
        "allowed_endpoints": ["POST /v1/charges", "GET /v1/charges"],
    });
    let (key, id) = sidecar.mint("50.00", policy).await;
    let first = [
        (EXECUTION, "4XyFirst"),
        ("Keybrake-Context-Original-Execution", "4XyOrigin"),
        // The minter says what the flow is.
        ("Keybrake-Context-Flow", "another flow"),
    ];
    assert_eq!(charge(&sidecar, &key, "paid", "100", &first).await.status, 200);
    let second = [(EXECUTION, "4XySecond"), ("Keybrake-Context-Attempt", "2")];
    let replay = charge(&sidecar, &key, "paid", "100", &second).await;
    assert_eq!(replay.header("idempotent-replayed"), Some("true"), "not part of what makes a call the same");
    let refused = charge(&sidecar, &key, "much", "900000", &second).await;
    assert_eq!(refused.verdict(), (429, "spend_cap_exceeded"));
    let unread = sidecar.call("POST", "/v1/charges?a=b", &key, &second, &[]).await;
    assert_eq!(unread.verdict(), (400, "request_ambiguous"));
    assert_eq!(sidecar.call("GET", "/v1/charges", &key, &second, &[]).await.status, 200);
    standin.fault(Fault::DropAfter);
    let lost = charge(&sidecar, &key, "lost", "200", &first).await;
    assert_eq!(lost.code(), "outcome_unknown", "{}", lost.text);
    // What the first execution holds, the second one sends again.
    assert_eq!(charge(&sidecar, &key, "lost", "200", &second).await.status, 200);

    let of = |execution: &str| format!("events=all&metadata[execution]={execution}&key_id={id}");
    let told = sidecar.audit(&of("4XyFirst")).await;
    assert_eq!(events(&told), ["admitted", "settled", "admitted", "doubt"]);
    let metadata = json!({
        "flow": "billing", "task": "charge", "execution": "4XyFirst", "original_execution": "4XyOrigin",
    });
    assert!(told.iter().all(|record| record["metadata"] == metadata), "{told:#?}");
    let told = sidecar.audit(&of("4XySecond")).await;
    assert_eq!(events(&told), ["replayed", "refused", "refused", "forwarded", "admitted", "resolved"]);
    let metadata = json!({"flow": "billing", "task": "charge", "execution": "4XySecond", "attempt": "2"});
    assert!(told.iter().all(|record| record["metadata"] == metadata), "{told:#?}");
    let rows = sidecar.audit("metadata[original_execution]=4XyOrigin&outcome=spent").await;
    assert_eq!(rows.len(), 1, "the row of the call that the first one paid");

    // What is in flight is recorded by the next start, from what is kept with the hold.
    standin.fault(Fault::HoldAfter);
    let cut = [(EXECUTION, "4XyThird")];
    tokio::select! {
        early = charge(&sidecar, &key, "cut", "300", &cut) => panic!("an answer: {}", early.text),
        () = standin.until_held(1) => {}
    }
    sidecar.kill();
    standin.release();
    sidecar.restart().await;
    let told = sidecar.audit(&of("4XyThird")).await;
    assert_eq!(&events(&told)[..2], ["admitted", "doubt"]);
    assert_eq!(told[1]["flags"], json!(["restart"]));

    for seen in standin.requests() {
        let named = seen.headers.keys().any(|name| name.starts_with("keybrake-context"));
        assert!(!named && !seen.body.contains("4Xy") && !seen.query.contains("4Xy"), "{seen:?}");
    }
}

#[tokio::test]
async fn one_who_waited_is_recorded_with_what_it_said_itself() {
    let (standin, sidecar) = world().await;
    let (key, _) = sidecar.mint("50.00", json!({})).await;
    standin.fault(Fault::Hold);
    let leader = charge(&sidecar, &key, "same", "100", &[(EXECUTION, "4XyLeader")]);
    let waiter = async {
        standin.until_held(1).await;
        let waiter = charge(&sidecar, &key, "same", "100", &[(EXECUTION, "4XyWaiter")]);
        let release = async {
            // Long enough to be waiting; if it is not, it gets a replay and the test says so.
            tokio::time::sleep(std::time::Duration::from_millis(300)).await;
            standin.release();
        };
        tokio::join!(waiter, release).0
    };
    let (leader, waiter) = tokio::join!(leader, waiter);
    assert_eq!((leader.status, waiter.status), (200, 200));
    let told = sidecar.audit("events=all&metadata[execution]=4XyWaiter").await;
    assert_eq!(events(&told), ["joined"]);
    assert_eq!(
        events(&sidecar.audit("events=all&metadata[execution]=4XyLeader").await),
        ["admitted", "settled"]
    );
}

#[tokio::test]
async fn a_header_that_a_record_should_not_hold_is_refused_before_anything_is_held() {
    let (standin, sidecar) = world().await;
    let (key, id) = sidecar.mint("50.00", json!({})).await;
    let sent = "amount=100&currency=usd&customer=cus_9&source=tok_visa";
    let charge = || {
        Raw::new("POST /v1/charges")
            .add("Authorization", &format!("Bearer {key}"))
            .add("Content-Type", FORM)
            .add("Idempotency-Key", "bad-context")
            .body(sent)
    };
    let host = sidecar.base.strip_prefix("http://").unwrap();
    for (raw, param) in [
        (charge().add(EXECUTION, "a").add("keybrake-context-execution", "b"), EXECUTION),
        (charge().add(EXECUTION, "sk_live_presented0000000000001"), EXECUTION),
        (charge().add(EXECUTION, &key), EXECUTION),
        (charge().add(EXECUTION, &"x".repeat(201)), EXECUTION),
        (charge().add("Keybrake-Context-A_B", "x"), "Keybrake-Context-A_b"),
    ] {
        let answer = raw.send(host).await;
        let error = answer.body["error"].clone();
        assert_eq!((answer.status, &error["code"]), (400, &json!("parameter_invalid")), "{}", answer.text);
        assert_eq!((&error["param"], &error["type"]), (&json!(param), &json!("invalid_request_error")));
    }
    assert!(standin.executed().is_empty() && sidecar.holds(&id).await.is_empty());
    let records = serde_json::to_string(&sidecar.audit("events=all").await).unwrap();
    assert!(!records.contains("presented") && !records.contains(&key) && !records.contains("\"execution\""));
    // The same by whoever mints.
    for policy in [json!({"metadata": {"by": "sk_live_abc"}}), json!({"label": "of vk_test_abc"})] {
        let mut whole = json!({
            "label": "x", "vendor": "stripe", "allowed_endpoints": ["POST /v1/charges"], "daily_usd_cap": 1,
            "expires_in_seconds": 60,
        });
        whole.as_object_mut().unwrap().extend(policy.as_object().unwrap().clone());
        let reply = sidecar.admin("POST", "/admin/vault_keys", Some(&whole)).await;
        assert_eq!(reply.verdict(), (400, "parameter_invalid"), "{}", reply.text);
    }
}
