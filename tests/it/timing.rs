//! Where the time of a request goes, as its answer and the metrics tell it.

use std::collections::BTreeMap;

use serde_json::json;
use tokio::time::Instant;

use crate::standin::faults::Fault;
use crate::support::{Reply, Sidecar, client, world};

/// `Server-Timing` writes thousandths of a millisecond.
const ROUNDING_MS: f64 = 0.000_5;

/// The entries of `Server-Timing` in their order, in milliseconds.
fn entries(reply: &Reply) -> Vec<(&str, f64)> {
    let header = reply.header("server-timing").unwrap_or_else(|| panic!("no Server-Timing: {reply:?}"));
    header
        .split(", ")
        .map(|entry| entry.split_once(";dur=").unwrap())
        .map(|(name, ms)| (name, ms.parse().unwrap()))
        .collect()
}

/// What the entry of a name says.
fn of(reply: &Reply, name: &str) -> f64 {
    entries(reply).iter().find(|(found, _)| *found == name).unwrap().1
}

/// The samples of `/metrics` by name and labels, as they are written.
async fn metrics(sidecar: &Sidecar) -> BTreeMap<String, String> {
    let text = client().get(format!("{}/metrics", sidecar.ops)).send().await.unwrap().text().await.unwrap();
    let samples = text.lines().filter(|line| !line.starts_with('#'));
    samples
        .map(|line| line.rsplit_once(' ').unwrap())
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect()
}

/// How many times a histogram counted, and the milliseconds of all together; nothing where it has not counted yet.
fn counted(metrics: &BTreeMap<String, String>, name: &str, labels: &str) -> (u64, f64) {
    let of = |what| metrics.get(&format!("{name}_{what}{labels}"));
    let count = of("count").map_or(0, |count| count.parse().unwrap());
    (count, of("sum").map_or(0.0, |sum| sum.parse::<f64>().unwrap() * 1_000.0))
}

fn stage(metrics: &BTreeMap<String, String>, stage: &str) -> (u64, f64) {
    counted(metrics, "keybrake_stage_seconds", &format!("{{stage=\"{stage}\"}}"))
}

/// A request that is answered with this code, how long its caller waited, and whether the ledger and Stripe must have had
/// a part in that; `None` where the ledger's may be too short to be told.
struct Case {
    what: &'static str,
    code: &'static str,
    reply: Reply,
    waited_ms: f64,
    ledger: Option<bool>,
    upstream: bool,
}

async fn case(
    what: &'static str,
    code: &'static str,
    ledger: Option<bool>,
    upstream: bool,
    request: impl Future<Output = Reply>,
) -> Case {
    let before = Instant::now();
    let reply = request.await;
    let waited_ms = before.elapsed().as_secs_f64() * 1_000.0;
    Case { what, code, reply, waited_ms, ledger, upstream }
}

async fn one_of_each(sidecar: &Sidecar) -> Vec<Case> {
    let allowed = json!(["POST /v1/charges", "GET /v1/charges"]);
    let policy = json!({"allowed_endpoints": allowed, "max_usd_per_request": "40"});
    let (key, _) = sidecar.mint("50", policy).await;
    let charge = |name: &'static str, amount| sidecar.charge(&key, name, amount, "cus_1");
    let (over, other) = ("spend_cap_exceeded", "endpoint_not_allowed");
    let customer = sidecar.call("POST", "/v1/customers", &key, &[], &[("email", "a@b.c")]);
    let unknown = "vk_test_unknown";
    vec![
        case("a charge", "", Some(true), true, charge("k-1", 2_999)).await,
        case("its replay", "", Some(true), false, charge("k-1", 2_999)).await,
        case("one more than fits", over, Some(true), false, charge("k-2", 2_999)).await,
        case("one that never fits", over, Some(true), false, charge("k-3", 9_999)).await,
        case("a write without leave", other, Some(true), false, customer).await,
        case("a read", "", None, true, sidecar.call("GET", "/v1/charges", &key, &[], &[])).await,
        case("a read without leave", other, None, false, sidecar.call("GET", "/v1/refunds", &key, &[], &[]))
            .await,
        case(
            "a key that nobody knows",
            "vault_key_invalid",
            Some(false),
            false,
            sidecar.charge(unknown, "k-4", 1, "cus_1"),
        )
        .await,
    ]
}

#[tokio::test]
async fn every_answer_says_where_its_time_went() {
    let (_standin, sidecar) = world().await;
    for case in one_of_each(&sidecar).await {
        let (what, told) = (case.what, entries(&case.reply));
        assert_eq!(case.reply.code(), case.code, "{what}: {}", case.reply.text);
        let [("keybrake", own), ("ledger", ledger), ("upstream", upstream)] = told[..] else {
            panic!("{what}: {told:?}");
        };
        assert!(0.0 <= ledger && ledger <= own && 0.0 <= upstream, "{what}: {told:?}");
        assert!(
            own + upstream <= case.waited_ms + 2.0 * ROUNDING_MS,
            "{what}: {told:?} of {}",
            case.waited_ms
        );
        assert_eq!(upstream > 0.0, case.upstream, "{what}: {told:?}");
        assert!(case.ledger.is_none_or(|has_part| has_part == (ledger > 0.0)), "{what}: {told:?}");
    }
}

#[tokio::test]
async fn the_stages_of_all_requests_add_up_to_them() {
    let (_standin, sidecar) = world().await;
    let cases = one_of_each(&sidecar).await;
    let metrics = metrics(&sidecar).await;
    let count = |name| stage(&metrics, name).0;
    let (requests, whole) = counted(&metrics, "keybrake_request_seconds", "");
    assert_eq!((requests, count("read"), count("rest")), (8, 8, 8));
    // A charge, its replay, and one that the ledger refused.
    assert_eq!((count("reserve"), count("settle"), count("same_call")), (3, 1, 0));
    assert_eq!((count("record"), count("note"), count("upstream")), (2, 2, 2));
    assert_eq!(counted(&metrics, "keybrake_upstream_seconds", "").0, 2);

    let close = |one: f64, other: f64, by: f64| assert!((one - other).abs() <= by, "{one} is not {other}");
    let sum = |names: &[&str]| names.iter().map(|name| stage(&metrics, name).1).sum::<f64>();
    let ledger = ["reserve", "settle", "record", "note"];
    close(sum(&ledger) + sum(&["read", "upstream", "same_call", "rest"]), whole, 0.000_01);
    // The answers say the same.
    let rounding = f64::from(u32::try_from(cases.len()).unwrap()) * ROUNDING_MS;
    let told = |name| cases.iter().map(|case| of(&case.reply, name)).sum::<f64>();
    close(told("ledger"), sum(&ledger), rounding);
    close(told("upstream"), sum(&["upstream"]), rounding);
    close(told("keybrake") + told("upstream"), whole, 2.0 * rounding);
}

/// Its wait is another one's wait for Stripe, and told apart from what we do ourselves.
#[tokio::test]
async fn one_who_waits_for_an_equal_call_says_so() {
    let (standin, sidecar) = world().await;
    let (key, _) = sidecar.mint("50", json!({})).await;
    standin.fault(Fault::Hold);
    let charge = || sidecar.charge(&key, "same", 100, "cus_1");
    let waiter = async {
        standin.until_held(1).await;
        let release = async {
            // Long enough to be waiting; if it is not, it gets a replay and the test says so.
            tokio::time::sleep(std::time::Duration::from_millis(300)).await;
            standin.release();
        };
        tokio::join!(charge(), release).0
    };
    let (leader, waiter) = tokio::join!(charge(), waiter);
    assert_eq!((leader.status, waiter.status), (200, 200));
    let names = |reply| entries(reply).iter().map(|(name, _)| (*name).to_owned()).collect::<Vec<_>>();
    assert_eq!(names(&leader), ["keybrake", "ledger", "upstream"]);
    assert_eq!(names(&waiter), ["keybrake", "ledger", "upstream", "same_call"]);
    let [own, ledger, same_call] = ["keybrake", "ledger", "same_call"].map(|name| of(&waiter, name));
    assert!(
        0.0 < same_call && 0.0 < ledger && same_call + ledger <= own + ROUNDING_MS,
        "{:?}",
        entries(&waiter)
    );
    assert!(of(&waiter, "upstream") <= 0.0, "{:?}", entries(&waiter));
    let metrics = metrics(&sidecar).await;
    let counts = ["reserve", "upstream", "settle", "same_call", "record"].map(|name| stage(&metrics, name).0);
    assert_eq!(counts, [1; 5]);
}
