//! What a collector must do, wherever it keeps its records.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Value, json};
use tokio::time::{Duration, Instant, sleep};

use crate::collector::{Collector, Kept, QUERY_KEY, token};
use crate::dice::Dice;
use crate::standin::faults::Fault;
use crate::standin::{Options, Standin};
use crate::support::{PATIENCE, STRIPE_KEY, Sidecar, client, run};

/// Runs the suite on a store; not at all where the store cannot be had, which whoever has it says.
macro_rules! conformance {
    ($kept:expr) => {
        crate::collector::suite::conformance!(
            $kept; records_of_all_nodes_arrive_once_and_can_be_asked_for
            a_collector_that_is_down_slows_nothing_and_gets_everything_later
            a_new_ledger_under_a_known_node_is_reported
            a_ledger_that_was_restored_makes_no_money_calls_until_that_is_accepted
            a_ledger_that_was_copied_is_found_out_and_the_evidence_is_kept
            a_batch_that_contradicts_is_refused_and_kept_as_evidence
            whatever_dies_every_executed_charge_has_one_call_at_the_collector
            a_collector_that_lost_everything_is_filled_again
            a_way_that_is_cut_within_batches_loses_and_doubles_nothing old_records_go_and_what_comes_later_is_found
        );
    };
    ($kept:expr; $($name:ident)*) => { $(
        #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn $name() {
            if let Some(kept) = $kept {
                crate::collector::suite::$name(kept).await;
            }
        }
    )* };
}
pub(super) use conformance;

pub(super) use super::store::old_records_go_and_what_comes_later_is_found;
pub(super) use super::way::a_way_that_is_cut_within_batches_loses_and_doubles_nothing;

pub(super) async fn records_of_all_nodes_arrive_once_and_can_be_asked_for(kept: Kept) {
    let (standin, dirs) = (Standin::start(Options::default()), [tempfile::tempdir(), tempfile::tempdir()]);
    let [a, b] = dirs.map(Result::unwrap);
    let collector = Collector::start(kept, &["a", "b"]).await;
    let first = collector.sidecar("a", &standin, a.path()).await;
    let second = collector.sidecar("b", &standin, b.path()).await;
    let (key, _) = first.mint("50.00", json!({"label": "of-a"})).await;
    let (other, _) = second.mint("50.00", json!({"label": "of-b"})).await;
    assert_eq!(first.charge(&key, "one", 1000, "cus_1").await.status, 200);
    // They are told in the order in which they arrive.
    collector.has_all_of(&first, "a").await;
    assert_eq!(second.charge(&other, "two", 2000, "cus_2").await.status, 200);
    collector.has_all_of(&second, "b").await;
    let spent = collector.records("outcome=spent").await;
    let told: Vec<_> =
        spent.iter().map(|one| (one["node"].as_str().unwrap(), one["usd"].as_str().unwrap())).collect();
    assert_eq!(told, [("a", "10.00"), ("b", "20.00")]);
    // The very records, in the very order.
    let own = first.audit("events=all").await;
    let held: Vec<Value> =
        collector.records("events=all").await.into_iter().filter(|one| one["node"] == "a").collect();
    assert_eq!(held, own);
    assert!(collector.is_whole().await);
    let node = collector.node("a").await;
    let chain = &node["chains"][0];
    let told = (&chain["state"], &chain["account"], &chain["mode"]);
    assert_eq!(told, (&json!("whole"), &json!("acct_standin0000001"), &json!("test")));
    let warned = node["warnings"][0].as_str().unwrap();
    assert!(warned.contains("served by the ledger of b too"), "{warned}");
    fleet_is_asked_within_bounds(&first, &key).await;
    tokens_open_what_is_theirs(&collector).await;
    the_doctor_looks_at_the_collector(&first);
    let password = kept.password().unwrap_or(QUERY_KEY);
    no_secret_is_told(&collector, &first, &[&key, &token("a"), QUERY_KEY, STRIPE_KEY, password]).await;
}

fn the_doctor_looks_at_the_collector(sidecar: &Sidecar) {
    let told = |env: &BTreeMap<String, String>| {
        let (_, told, complaint) = run(env, &["doctor", "--json"]);
        let told: Value = serde_json::from_str(&told).unwrap_or_else(|_| panic!("{told}{complaint}"));
        let all = told["findings"].as_array().unwrap().clone();
        all.into_iter().find(|one| one["check"] == "collector").unwrap()
    };
    let mut env = sidecar.env().clone();
    assert_eq!(told(&env)["verdict"], "ok", "{}", told(&env));
    env.insert("KEYBRAKE_COLLECTOR_TOKEN".to_owned(), token("nobody"));
    assert!(told(&env)["told"].as_str().unwrap().contains("does not know COLLECTOR_TOKEN"), "{}", told(&env));
    env.insert("KEYBRAKE_COLLECTOR_URL".to_owned(), "http://127.0.0.1:9".to_owned());
    assert!(told(&env)["told"].as_str().unwrap().contains("does not answer"), "{}", told(&env));
    env.retain(|name, _| !name.starts_with("KEYBRAKE_COLLECTOR_"));
    assert_eq!(told(&env)["verdict"], "note", "{}", told(&env));
}

/// Logs, metrics and records of both programs, at the most talkative level of their own.
async fn no_secret_is_told(collector: &Collector, sidecar: &Sidecar, secrets: &[&str]) {
    let text = async |url: String| client().get(url).send().await.unwrap().text().await.unwrap();
    let seen = [
        collector.process.log(),
        sidecar.log(),
        text(format!("{}/metrics", collector.process.ops)).await,
        text(format!("{}/metrics", sidecar.ops)).await,
        collector.get("/audit?events=all&limit=1000").await.text,
        collector.get("/audit/nodes").await.text,
    ];
    assert!(seen[2].contains("keybrake_collect_records{node=\"a\"}"), "{}", seen[2]);
    for secret in secrets {
        assert!(seen.iter().all(|text| !text.contains(secret)), "{secret} is told");
    }
}

/// Through a sidecar: the admin sees all nodes, a vault key the records of its label.
async fn fleet_is_asked_within_bounds(sidecar: &Sidecar, key: &str) {
    let all = sidecar.admin("GET", "/audit?fleet=true&outcome=spent", None).await;
    assert_eq!((all.status, all.body["data"].as_array().unwrap().len()), (200, 2), "{}", all.text);
    assert!(all.body["as_of"]["b"].as_str().is_some(), "{}", all.text);
    let own = sidecar.json("GET", "/audit?fleet=true&outcome=spent", key, None).await;
    assert_eq!((own.status, own.body["data"].as_array().unwrap().len()), (200, 1), "{}", own.text);
    let others = sidecar.json("GET", "/audit?fleet=true&label=of-b", key, None).await;
    assert_eq!((others.status, others.body["data"].as_array().unwrap().len()), (200, 0), "{}", others.text);
}

async fn tokens_open_what_is_theirs(collector: &Collector) {
    for (path, key, status) in [
        ("/audit", "wrong", 401),
        ("/audit/nodes", QUERY_KEY, 200),
        ("/collect/v1/chains/x", QUERY_KEY, 403),
        ("/elsewhere", QUERY_KEY, 404),
        ("/audit?nonsense=1", QUERY_KEY, 400),
    ] {
        let reply = collector.process.json("GET", path, key, None).await;
        assert_eq!(reply.status, status, "{path}: {}", reply.text);
    }
    let env = BTreeMap::from([
        ("KEYBRAKE_URL".to_owned(), collector.process.base.clone()),
        ("KEYBRAKE_COLLECT_QUERY_KEY".to_owned(), QUERY_KEY.to_owned()),
    ]);
    let (code, told, complaint) = run(&env, &["audit", "query", "customer=cus_2", "--json"]);
    assert_eq!(code, 0, "{complaint}");
    assert!(told.contains("cus_2") && !told.contains("cus_1"), "{told}");
    let (code, told, _) = run(&env, &["audit", "verify"]);
    assert_eq!((code, told.starts_with("whole")), (0, true), "{told}");
    let chain = collector.node("b").await["chains"][0].clone();
    let of_chain = format!("chain_id={}", chain["chain_id"].as_str().unwrap());
    let file = collector.dir.path().join("export.ndjson").display().to_string();
    let (code, _, told) = run(&env, &["audit", "export", &of_chain, "--out", &file]);
    let head = chain["head"].as_str().unwrap();
    assert!(code == 0 && told.contains(head), "{told}");
    let (code, told, _) = run(&BTreeMap::new(), &["audit", "verify", "--file", &file, "--head", head]);
    assert_eq!(code, 0, "{told}");
}

pub(super) async fn a_collector_that_is_down_slows_nothing_and_gets_everything_later(kept: Kept) {
    let (standin, dir) = (Standin::start(Options::default()), tempfile::tempdir().unwrap());
    let mut collector = Collector::start(kept, &["a"]).await;
    let mut sidecar = collector.sidecar("a", &standin, dir.path()).await;
    let (key, _) = sidecar.mint("500.00", json!({})).await;
    collector.process.kill();
    for n in 0..20 {
        assert_eq!(sidecar.charge(&key, &format!("n-{n}"), 100, "cus_1").await.status, 200);
    }
    assert_eq!(sidecar.readyz().await, 200, "a backlog is no reason to get no traffic");
    let metrics =
        client().get(format!("{}/metrics", sidecar.ops)).send().await.unwrap().text().await.unwrap();
    let waiting = metrics.lines().find_map(|line| line.strip_prefix("keybrake_audit_backlog ")).unwrap();
    assert_ne!(waiting, "0", "{metrics}");
    // Killed in the meantime, it still has them.
    sidecar.kill();
    sidecar.restart().await;
    collector.process.restart().await;
    collector.has_all_of(&sidecar, "a").await;
    let spent = collector.records("outcome=spent").await;
    assert_eq!((spent.len(), collector.is_whole().await), (20, true));
}

pub(super) async fn a_new_ledger_under_a_known_node_is_reported(kept: Kept) {
    let (standin, dirs) = (Standin::start(Options::default()), [tempfile::tempdir(), tempfile::tempdir()]);
    let [old, new] = dirs.map(Result::unwrap);
    let collector = Collector::start(kept, &["a"]).await;
    let mut lost = collector.sidecar("a", &standin, old.path()).await;
    collector.has_all_of(&lost, "a").await;
    assert!(lost.terminate().success());
    let replaced = collector.sidecar("a", &standin, new.path()).await;
    let (key, _) = replaced.mint("50.00", json!({})).await;
    assert_eq!(replaced.charge(&key, "one", 1000, "cus_1").await.status, 200, "a new ledger works");
    collector.has_all_of(&replaced, "a").await;
    let node = collector.node("a").await;
    assert_eq!(node["chains"].as_array().unwrap().len(), 2, "{node}");
    assert!(node["warnings"][0].as_str().unwrap().contains("lost, replaced or restored"), "{node}");
    assert!(collector.process.log().contains("a known node started a new chain"));
    assert!(collector.is_whole().await);
}

fn copy_ledger(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    std::fs::copy(from.join("keybrake.redb"), to.join("keybrake.redb")).unwrap();
}

/// Waits until it listens, ready or not.
async fn answers(sidecar: &Sidecar) {
    let since = Instant::now();
    while client().get(format!("{}/keybrake/errors", sidecar.base)).send().await.is_err() {
        assert!(since.elapsed() < PATIENCE, "{}", sidecar.log());
        sleep(Duration::from_millis(10)).await;
    }
}

/// A sidecar with a ledger of yesterday: money calls wait for an operator, who begins a new chain.
pub(super) async fn a_ledger_that_was_restored_makes_no_money_calls_until_that_is_accepted(kept: Kept) {
    let (standin, dir) = (Standin::start(Options::default()), tempfile::tempdir().unwrap());
    let collector = Collector::start(kept, &["a"]).await;
    let data = dir.path().join("data");
    let mut sidecar = collector.sidecar("a", &standin, &data).await;
    let (key, _) = sidecar
        .mint("50.00", json!({"allowed_endpoints": ["POST /v1/charges", "GET /v1/charges/{id}"]}))
        .await;
    assert_eq!(sidecar.charge(&key, "one", 1000, "cus_1").await.status, 200);
    assert!(sidecar.terminate().success());
    copy_ledger(&data, &dir.path().join("backup"));
    sidecar.restart().await;
    let charged = sidecar.charge(&key, "two", 1000, "cus_1").await;
    assert_eq!(charged.status, 200);
    collector.has_all_of(&sidecar, "a").await;
    assert!(sidecar.terminate().success());
    copy_ledger(&dir.path().join("backup"), &data);
    let mut sidecar = Sidecar::spawn(sidecar.env().clone());
    answers(&sidecar).await;
    let before = standin.requests().len();
    for name in ["one", "two", "three"] {
        let refused = sidecar.charge(&key, name, 1000, "cus_1").await;
        assert_eq!(refused.verdict(), (503, "ledger_unavailable"), "{}", refused.text);
        assert!(refused.text.contains("accept-ledger-loss"), "{}", refused.text);
    }
    assert_eq!((standin.requests().len(), sidecar.readyz().await), (before, 503));
    let path = format!("/v1/charges/{}", charged.body["id"].as_str().unwrap());
    assert_eq!(sidecar.call("GET", &path, &key, &[], &[]).await.status, 200, "reads go on");
    // A restart changes nothing, with or without the collector.
    sidecar.kill();
    let mut sidecar = Sidecar::spawn(sidecar.env().clone());
    answers(&sidecar).await;
    assert_eq!(sidecar.charge(&key, "three", 1000, "cus_1").await.verdict(), (503, "ledger_unavailable"));
    let mut env = sidecar.env().clone();
    env.insert("KEYBRAKE_URL".to_owned(), sidecar.base.clone());
    assert_eq!(run(&env, &["doctor", "--accept-ledger-loss"]).0, 64, "it needs a reason");
    let why = ["doctor", "--accept-ledger-loss", "--reason", "the backup is all there is"];
    let (code, told, complaint) = run(&env, &why);
    assert_eq!(code, 0, "{told}{complaint}");
    sidecar.ready().await;
    assert_eq!(sidecar.charge(&key, "three", 1000, "cus_1").await.status, 200);
    // Stripe still knows the one that was lost.
    let met = sidecar.charge(&key, "two", 1000, "cus_1").await;
    assert_eq!((met.status, standin.executed().len()), (200, 3), "{}", met.text);
    collector.has_all_of(&sidecar, "a").await;
    assert!(collector.is_whole().await);
    assert_eq!(collector.node("a").await["chains"].as_array().unwrap().len(), 2);
    let started = collector.records("events=all&event=chain_started").await;
    let detail = &started[1]["detail"];
    assert_eq!(detail["reason"], "the backup is all there is", "{detail}");
    assert!(detail["before"]["collector_seq"].as_u64() > detail["before"]["seq"].as_u64(), "{detail}");
    assert_eq!(sidecar.admin("GET", "/audit/verify", None).await.body["whole"], true);
    let again = run(&env, &why);
    assert_eq!(again.0, 1, "there is nothing left to accept");
}

/// A restored ledger that ran on before it met its collector again.
pub(super) async fn a_ledger_that_was_copied_is_found_out_and_the_evidence_is_kept(kept: Kept) {
    let (standin, dir) = (Standin::start(Options::default()), tempfile::tempdir().unwrap());
    let collector = Collector::start(kept, &["a"]).await;
    let data = dir.path().join("data");
    let mut sidecar = collector.sidecar("a", &standin, &data).await;
    let (key, _) = sidecar.mint("50.00", json!({})).await;
    assert!(sidecar.terminate().success());
    copy_ledger(&data, &dir.path().join("copy"));
    sidecar.restart().await;
    // The copy works beside it, as another's volume snapshot would, and reaches the collector second.
    let mut env = collector.env_of("a", &standin, &dir.path().join("copy"));
    env.insert("KEYBRAKE_COLLECTOR_URL".to_owned(), "http://127.0.0.1:9".to_owned());
    let mut copy = Sidecar::spawn(env);
    copy.ready().await;
    assert_eq!(sidecar.charge(&key, "one", 1000, "cus_1").await.status, 200);
    assert_eq!(copy.charge(&key, "other", 700, "cus_2").await.status, 200);
    collector.has_all_of(&sidecar, "a").await;
    assert!(copy.terminate().success());
    let copy = Sidecar::spawn(collector.env_of("a", &standin, &dir.path().join("copy")));
    answers(&copy).await;
    assert_eq!(copy.charge(&key, "third", 700, "cus_2").await.verdict(), (503, "ledger_unavailable"));
    assert!(collector.is_whole().await, "what is held is whole");
    assert_eq!(
        sidecar.charge(&key, "fourth", 100, "cus_1").await.status,
        200,
        "the one that came first goes on"
    );
}

pub(super) async fn a_batch_that_contradicts_is_refused_and_kept_as_evidence(kept: Kept) {
    let (standin, dir) = (Standin::start(Options::default()), tempfile::tempdir().unwrap());
    let collector = Collector::start(kept, &["a", "b"]).await;
    let sidecar = collector.sidecar("a", &standin, dir.path()).await;
    let (key, _) = sidecar.mint("50.00", json!({})).await;
    standin.fault(Fault::DropAfter);
    assert_eq!(sidecar.charge(&key, "one", 1000, "cus_1").await.status, 502);
    collector.has_all_of(&sidecar, "a").await;
    let own = sidecar.audit("events=all").await;
    let line = |record: &Value| {
        let mut kept = record.as_object().unwrap().clone();
        let hash = kept.remove("hash").unwrap();
        kept.retain(|_, value| !value.is_null());
        let bytes = Value::Object(kept).to_string();
        format!("{},\"hash\":{hash}}}\n", bytes.strip_suffix('}').unwrap())
    };
    let lines: Vec<String> = own.iter().map(line).collect();
    let resealed = |record: &Value| {
        let mut kept = record.as_object().unwrap().clone();
        kept.remove("hash");
        kept.retain(|_, value| !value.is_null());
        kept.insert("customer".to_owned(), json!("cus_forged"));
        let bytes = Value::Object(kept).to_string();
        let hash = sha256(&bytes);
        format!("{},\"hash\":\"{hash}\"}}\n", bytes.strip_suffix('}').unwrap())
    };
    let (last, issued) =
        (own.last().unwrap(), lines.iter().find(|line| line.contains("key_issued")).unwrap());
    let post = async |node: &str, body: String| {
        let sent = client()
            .post(format!("{}/collect/v1/batches", collector.process.base))
            .bearer_auth(token(node))
            .body(body)
            .send()
            .await
            .unwrap();
        let status = sent.status().as_u16();
        let body: Value = serde_json::from_str(&sent.text().await.unwrap()).unwrap();
        (status, body["error"]["code"].as_str().unwrap_or_default().to_owned())
    };
    for (what, node, body, expected) in [
        ("the same once more", "a", lines.concat(), (200, "")),
        ("nothing", "a", String::new(), (400, "batch_unreadable")),
        ("no record", "a", "{}\n".to_owned(), (400, "batch_unreadable")),
        ("a flipped byte", "a", issued.replace("key_issued", "key_issueD"), (409, "chain_broken")),
        ("out of order", "a", [lines[2].clone(), lines[1].clone()].concat(), (409, "chain_broken")),
        ("with a hole", "a", [lines[0].clone(), lines[2].clone()].concat(), (409, "chain_broken")),
        ("another's", "b", lines.concat(), (403, "chain_foreign")),
        ("rewritten", "a", resealed(last), (409, "chain_forked")),
    ] {
        let (status, code) = post(node, body).await;
        assert_eq!((status, code.as_str()), expected, "{what}");
    }
    let evidence = collector.get("/audit/evidence").await.body["data"].clone();
    assert_eq!(evidence[0]["records"][0]["customer"], "cus_forged", "{evidence}");
    assert_eq!(evidence.as_array().unwrap().len(), 1, "{evidence}");
    let node = collector.node("a").await;
    assert_eq!(node["chains"][0]["state"], "forked", "{node}");
    let held: Vec<Value> = collector.records("events=all").await;
    let seqs: Vec<u64> = held.iter().map(|record| record["seq"].as_u64().unwrap()).collect();
    assert_eq!(seqs, (1..).take(seqs.len()).collect::<Vec<u64>>(), "what was sent twice is held once");
    assert!(held.iter().all(|record| record["customer"] != "cus_forged") && collector.is_whole().await);
    let is_file = std::fs::metadata(collector.process.data.join("collector.redb")).is_ok();
    assert_eq!(is_file, matches!(kept, Kept::File));
}

fn sha256(text: &str) -> String {
    use sha2::Digest as _;
    keybrake::id::hex(&sha2::Sha256::digest(text))
}

/// Sidecars and collector die at random moments while charges are made; in the end every executed charge has one call at
/// the collector, with all of its events, and every chain is whole.
pub(super) async fn whatever_dies_every_executed_charge_has_one_call_at_the_collector(kept: Kept) {
    const ROUNDS: usize = 5;
    let (standin, dirs) = (Standin::start(Options::default()), [tempfile::tempdir(), tempfile::tempdir()]);
    let dirs = dirs.map(Result::unwrap);
    let mut collector = Collector::start(kept, &["a", "b"]).await;
    let mut sidecars = [
        collector.sidecar("a", &standin, dirs[0].path()).await,
        collector.sidecar("b", &standin, dirs[1].path()).await,
    ];
    let keys =
        [sidecars[0].mint("5000.00", json!({})).await.0, sidecars[1].mint("5000.00", json!({})).await.0];
    let mut dice = Dice::new(11);
    let mut names: Vec<(usize, String)> = Vec::new();
    for round in 0..ROUNDS {
        let mut charges = Vec::new();
        for n in 0..24 {
            let (at, name) = (n % 2, format!("r{round}-{n}"));
            let sent = client()
                .post(format!("{}/v1/charges", sidecars[at].base))
                .bearer_auth(&keys[at])
                .header("idempotency-key", &name)
                .header("content-type", "application/x-www-form-urlencoded")
                .body(format!("amount=100&currency=usd&customer=cus_{name}&source=tok_visa"))
                .send();
            charges.push(tokio::spawn(sent));
            names.push((at, name));
        }
        sleep(Duration::from_millis(u64::try_from(dice.below(60)).unwrap())).await;
        let victim = dice.below(3);
        match victim {
            0 | 1 => sidecars[victim].kill(),
            _ => collector.process.kill(),
        }
        for charge in charges {
            // Some callers lose their sidecar.
            let _ = charge.await.unwrap();
        }
        match victim {
            0 | 1 => sidecars[victim].restart().await,
            _ => collector.process.restart().await,
        }
    }
    for (at, name) in &names {
        let since = Instant::now();
        loop {
            let again = sidecars[*at].charge(&keys[*at], name, 100, &format!("cus_{name}")).await;
            if again.status == 200 {
                break;
            }
            assert!(since.elapsed() < PATIENCE, "{name}: {}", again.text);
            sleep(Duration::from_millis(50)).await;
        }
    }
    for (sidecar, node) in sidecars.iter().zip(["a", "b"]) {
        collector.has_all_of(sidecar, node).await;
        let own = sidecar.audit("events=all").await;
        let held = collector.records(&format!("events=all&node={node}")).await;
        assert_eq!(held, own, "all records of {node}, each once and in order");
    }
    let mut executed: Vec<String> = standin.executed().iter().map(|one| one.object_id.clone()).collect();
    let spent = collector.records("outcome=spent").await;
    let mut told: Vec<String> =
        spent.iter().map(|one| one["object_id"].as_str().unwrap_or_default().to_owned()).collect();
    executed.sort();
    told.sort();
    assert_eq!((told, executed.len()), (executed.clone(), names.len()));
    assert!(collector.is_whole().await);
}

/// A collector whose records are lost gets again what its sidecars still have.
pub(super) async fn a_collector_that_lost_everything_is_filled_again(kept: Kept) {
    let (standin, dir) = (Standin::start(Options::default()), tempfile::tempdir().unwrap());
    let mut collector = Collector::start(kept, &["a"]).await;
    let sidecar = collector.sidecar("a", &standin, dir.path()).await;
    let (key, _) = sidecar.mint("50.00", json!({})).await;
    assert_eq!(sidecar.charge(&key, "one", 1000, "cus_1").await.status, 200);
    collector.has_all_of(&sidecar, "a").await;
    collector.process.kill();
    collector.lose().await;
    collector.process.restart().await;
    assert_eq!(sidecar.charge(&key, "two", 1000, "cus_1").await.status, 200);
    collector.has_all_of(&sidecar, "a").await;
    assert_eq!(collector.records("events=all").await, sidecar.audit("events=all").await);
    let node = collector.node("a").await;
    assert_eq!((&node["chains"][0]["state"], sidecar.readyz().await), (&json!("whole"), 200), "{node}");
    assert!(collector.is_whole().await);
}
