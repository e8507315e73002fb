//! The central collector and the sidecars that ship to it, each a process of its own.

mod way;

use std::collections::BTreeMap;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::time::{Duration, Instant, sleep};

use crate::dice::Dice;
use crate::standin::faults::Fault;
use crate::standin::{Options, Standin};
use crate::support::{PATIENCE, Reply, STRIPE_KEY, Sidecar, client, environment, free_port, run};

const QUERY_KEY: &str = "query-key-of-the-tests-0123456789abcdef";

fn token(node: &str) -> String {
    format!("token-of-{node}-0123456789abcdef0123456789abcdef")
}

/// A collector for some nodes, and the directory of its records.
struct Collector {
    process: Sidecar,
    dir: tempfile::TempDir,
}

impl Collector {
    /// Without TLS.
    async fn start(nodes: &[&str]) -> Self {
        Self::start_with("off", nodes).await
    }

    /// With an authority of its own.
    async fn start_with_tls(nodes: &[&str]) -> Self {
        let mut collector = Self::start_with("auto", nodes).await;
        let ca = collector.ca();
        collector.process.trusts(&ca);
        collector
    }

    /// The certificate of its authority.
    fn ca(&self) -> PathBuf {
        self.process.data.join("tls/ca.pem")
    }

    async fn start_with(tls: &str, nodes: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let tokens: Vec<String> = nodes.iter().map(|node| format!("{node} {}", token(node))).collect();
        std::fs::write(dir.path().join("tokens"), tokens.join("\n")).unwrap();
        let (listen, ops) = (format!("127.0.0.1:{}", free_port()), format!("127.0.0.1:{}", free_port()));
        let data = dir.path().join("data").display().to_string();
        let env = BTreeMap::from(
            [
                ("LISTEN", listen.clone()),
                ("OPS_LISTEN", ops.clone()),
                ("DATA_DIR", data.clone()),
                ("COLLECT_LISTEN", listen),
                ("COLLECT_OPS_LISTEN", ops),
                ("COLLECT_DATA_DIR", data),
                ("COLLECT_TOKENS_FILE", dir.path().join("tokens").display().to_string()),
                ("COLLECT_QUERY_KEY", QUERY_KEY.to_owned()),
                ("TLS", tls.to_owned()),
                ("LOG", "debug".to_owned()),
            ]
            .map(|(name, value)| (format!("KEYBRAKE_{name}"), value)),
        );
        let mut process = Sidecar::spawn_collector(env);
        process.ready().await;
        Self { process, dir }
    }

    async fn get(&self, path: &str) -> Reply {
        self.process.json("GET", path, QUERY_KEY, None).await
    }

    async fn records(&self, query: &str) -> Vec<Value> {
        let reply = self.get(&format!("/audit?order=asc&limit=1000&{query}")).await;
        assert_eq!(reply.status, 200, "{}", reply.text);
        reply.body["data"].as_array().unwrap().clone()
    }

    /// What it says of a node.
    async fn node(&self, node: &str) -> Value {
        let reply = self.get("/audit/nodes").await;
        assert_eq!(reply.status, 200, "{}", reply.text);
        let all = reply.body["data"].as_array().unwrap();
        all.iter().find(|one| one["node"] == node).cloned().unwrap_or_default()
    }

    async fn is_whole(&self) -> bool {
        let verdict = self.get("/audit/verify").await;
        assert_eq!(verdict.status, 200, "{}", verdict.text);
        verdict.body["whole"] == true
    }

    /// A sidecar that ships to it.
    async fn sidecar(&self, node: &str, standin: &Standin, data: &Path) -> Sidecar {
        let mut sidecar = Sidecar::spawn(self.env_of(node, standin, data));
        sidecar.ready().await;
        sidecar
    }

    fn env_of(&self, node: &str, standin: &Standin, data: &Path) -> BTreeMap<String, String> {
        let mut env = environment(standin.addr(), data);
        env.insert("KEYBRAKE_NODE".to_owned(), node.to_owned());
        env.insert("KEYBRAKE_COLLECTOR_URL".to_owned(), self.process.base.clone());
        env.insert("KEYBRAKE_COLLECTOR_TOKEN".to_owned(), token(node));
        env
    }

    /// Waits until it holds everything that a sidecar has written.
    async fn has_all_of(&self, sidecar: &Sidecar, node: &str) {
        let since = Instant::now();
        loop {
            let own = sidecar.admin("GET", "/audit/verify", None).await.body;
            let held = self.node(node).await["chains"][0].clone();
            if held["head"] == own["head"] {
                return;
            }
            assert!(since.elapsed() < PATIENCE, "{held} is not {own}:\n{}", sidecar.log());
            sleep(Duration::from_millis(50)).await;
        }
    }
}

#[tokio::test]
async fn records_of_all_nodes_arrive_once_and_can_be_asked_for() {
    let (standin, dirs) = (Standin::start(Options::default()), [tempfile::tempdir(), tempfile::tempdir()]);
    let [a, b] = dirs.map(Result::unwrap);
    let collector = Collector::start(&["a", "b"]).await;
    let first = collector.sidecar("a", &standin, a.path()).await;
    let second = collector.sidecar("b", &standin, b.path()).await;
    let (key, _) = first.mint("50.00", json!({"label": "of-a"})).await;
    let (other, _) = second.mint("50.00", json!({"label": "of-b"})).await;
    assert_eq!(first.charge(&key, "one", 1000, "cus_1").await.status, 200);
    assert_eq!(second.charge(&other, "two", 2000, "cus_2").await.status, 200);
    collector.has_all_of(&first, "a").await;
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
    no_secret_is_told(&collector, &first, &[&key, &token("a"), QUERY_KEY, STRIPE_KEY]).await;
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

#[tokio::test]
async fn a_collector_that_is_down_slows_nothing_and_gets_everything_later() {
    let (standin, dir) = (Standin::start(Options::default()), tempfile::tempdir().unwrap());
    let mut collector = Collector::start(&["a"]).await;
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

#[tokio::test]
async fn a_new_ledger_under_a_known_node_is_reported() {
    let (standin, dirs) = (Standin::start(Options::default()), [tempfile::tempdir(), tempfile::tempdir()]);
    let [old, new] = dirs.map(Result::unwrap);
    let collector = Collector::start(&["a"]).await;
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
#[tokio::test]
async fn a_ledger_that_was_restored_makes_no_money_calls_until_that_is_accepted() {
    let (standin, dir) = (Standin::start(Options::default()), tempfile::tempdir().unwrap());
    let collector = Collector::start(&["a"]).await;
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
#[tokio::test]
async fn a_ledger_that_was_copied_is_found_out_and_the_evidence_is_kept() {
    let (standin, dir) = (Standin::start(Options::default()), tempfile::tempdir().unwrap());
    let collector = Collector::start(&["a"]).await;
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

#[tokio::test]
async fn a_batch_that_contradicts_is_refused_and_kept_as_evidence() {
    let (standin, dir) = (Standin::start(Options::default()), tempfile::tempdir().unwrap());
    let collector = Collector::start(&["a", "b"]).await;
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
    assert!(std::fs::metadata(collector.dir.path().join("data/collector.redb")).is_ok());
}

fn sha256(text: &str) -> String {
    use sha2::Digest as _;
    keybrake::id::hex(&sha2::Sha256::digest(text))
}

/// Sidecars and collector die at random moments while charges are made; in the end every executed charge has one call at
/// the collector, with all of its events, and every chain is whole.
#[tokio::test]
async fn whatever_dies_every_executed_charge_has_one_call_at_the_collector() {
    const ROUNDS: usize = 5;
    let (standin, dirs) = (Standin::start(Options::default()), [tempfile::tempdir(), tempfile::tempdir()]);
    let dirs = dirs.map(Result::unwrap);
    let mut collector = Collector::start(&["a", "b"]).await;
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

/// A collector whose volume is lost gets again what its sidecars still have.
#[tokio::test]
async fn a_collector_that_lost_everything_is_filled_again() {
    let (standin, dir) = (Standin::start(Options::default()), tempfile::tempdir().unwrap());
    let mut collector = Collector::start(&["a"]).await;
    let sidecar = collector.sidecar("a", &standin, dir.path()).await;
    let (key, _) = sidecar.mint("50.00", json!({})).await;
    assert_eq!(sidecar.charge(&key, "one", 1000, "cus_1").await.status, 200);
    collector.has_all_of(&sidecar, "a").await;
    collector.process.kill();
    std::fs::remove_dir_all(collector.dir.path().join("data")).unwrap();
    collector.process.restart().await;
    assert_eq!(sidecar.charge(&key, "two", 1000, "cus_1").await.status, 200);
    collector.has_all_of(&sidecar, "a").await;
    assert_eq!(collector.records("events=all").await, sidecar.audit("events=all").await);
    let node = collector.node("a").await;
    assert_eq!((&node["chains"][0]["state"], sidecar.readyz().await), (&json!("whole"), 200), "{node}");
    assert!(collector.is_whole().await);
}

/// A collector whose disk is full takes nothing and loses nothing.
#[tokio::test]
async fn a_collector_with_a_full_disk_gets_the_rest_when_there_is_room() {
    let (standin, dir) = (Standin::start(Options::default()), tempfile::tempdir().unwrap());
    let mut collector = Collector::start(&["a"]).await;
    let sidecar = collector.sidecar("a", &standin, dir.path()).await;
    let fat: serde_json::Map<_, _> = (0..20).map(|n| (format!("m{n}"), json!("x".repeat(500)))).collect();
    let (key, _) = sidecar.mint("5000.00", json!({"metadata": fat})).await;
    collector.has_all_of(&sidecar, "a").await;
    assert!(collector.process.terminate().success());
    let data = collector.dir.path().join("data/collector.redb");
    let kib = std::fs::metadata(&data).unwrap().len() / 1_024;
    let env = collector.process.env().clone();
    let mut command = std::process::Command::new("sh");
    let script = format!("trap '' XFSZ; ulimit -f {}; exec \"$0\" collect", kib * 2);
    command.arg("-c").arg(script).arg(env!("CARGO_BIN_EXE_keybrake")).env_clear().envs(&env);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut full = Sidecar::spawn_by(&mut command, env);
    full.ready().await;
    let since = Instant::now();
    let mut charged = 0;
    while !full.log().contains("records cannot be kept") {
        assert_eq!(sidecar.charge(&key, &format!("n-{charged}"), 100, "cus_1").await.status, 200);
        charged += 1;
        assert!(since.elapsed() < PATIENCE, "the disk is never full: {}", full.log());
    }
    full.kill();
    collector.process.restart().await;
    collector.has_all_of(&sidecar, "a").await;
    let spent = collector.records("outcome=spent").await;
    assert_eq!((spent.len(), collector.is_whole().await), (charged, true));
}

/// Reads one request, answers it with 200 and closes.
async fn take_one(mut stream: tokio::net::TcpStream) -> (String, Vec<u8>) {
    let mut text = Vec::new();
    loop {
        let end = text.windows(4).position(|four| four == b"\r\n\r\n").map(|at| at + 4);
        if let Some(end) = end {
            let head = String::from_utf8(text[..end].to_vec()).unwrap();
            let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")?.parse().ok());
            if text.len() >= end + length.unwrap_or(0_usize) {
                stream
                    .write_all(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")
                    .await
                    .unwrap();
                return (head, text.split_off(end));
            }
        }
        assert_ne!(stream.read_buf(&mut text).await.unwrap(), 0, "cut off");
    }
}

/// Something that says 200 to everything has not taken anything.
#[tokio::test]
async fn a_stranger_at_the_collectors_address_acknowledges_nothing() {
    let (standin, dir) = (Standin::start(Options::default()), tempfile::tempdir().unwrap());
    let stranger = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut env = environment(standin.addr(), dir.path());
    let url = format!("http://{}", stranger.local_addr().unwrap());
    env.insert("KEYBRAKE_COLLECTOR_URL".to_owned(), url);
    env.insert("KEYBRAKE_COLLECTOR_TOKEN".to_owned(), token("a"));
    let (taken, mut asked) = tokio::sync::mpsc::unbounded_channel();
    tokio::spawn(async move {
        loop {
            let (stream, _) = stranger.accept().await.unwrap();
            let _ = taken.send(take_one(stream).await);
        }
    });
    let mut sidecar = Sidecar::spawn(env);
    sidecar.ready().await;
    for _ in 0..2 {
        let (head, body) = tokio::time::timeout(PATIENCE, asked.recv()).await.unwrap().unwrap();
        assert!(
            head.starts_with("GET /collect/v1/chains/") && body.is_empty(),
            "no record goes there: {head}"
        );
    }
    let metrics =
        client().get(format!("{}/metrics", sidecar.ops)).send().await.unwrap().text().await.unwrap();
    assert!(
        !metrics.contains("keybrake_audit_backlog 0") && metrics.contains("keybrake_audit_shipped_total 0")
    );
    assert!(sidecar.log().contains("no collector of this program"), "{}", sidecar.log());
}

/// Any log store takes the records as lines, packed, with a bearer; a 2xx takes them.
#[tokio::test]
async fn a_log_store_gets_lines_that_verify() {
    let (standin, dir) = (Standin::start(Options::default()), tempfile::tempdir().unwrap());
    let store = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = store.local_addr().unwrap();
    let (taken, mut batches) = tokio::sync::mpsc::unbounded_channel();
    tokio::spawn(async move {
        loop {
            let (stream, _) = store.accept().await.unwrap();
            let _ = taken.send(take_one(stream).await);
        }
    });
    let mut env = environment(standin.addr(), dir.path());
    for (name, value) in [
        ("COLLECTOR_URL", format!("http://{address}/in/keybrake")),
        ("COLLECTOR_TOKEN", "any".to_owned()),
        ("COLLECTOR_FORMAT", "ndjson".to_owned()),
    ] {
        env.insert(format!("KEYBRAKE_{name}"), value);
    }
    let mut sidecar = Sidecar::spawn(env);
    sidecar.ready().await;
    let (key, _) = sidecar.mint("50.00", json!({})).await;
    assert_eq!(sidecar.charge(&key, "one", 1000, "cus_1").await.status, 200);
    let own = sidecar.audit("events=all").await;
    let mut lines = String::new();
    while lines.lines().count() < own.len() {
        let (head, body) = tokio::time::timeout(PATIENCE, batches.recv()).await.unwrap().unwrap();
        assert!(head.starts_with("POST /in/keybrake HTTP/1.1\r\n"), "{head}");
        for told in
            ["authorization: bearer any", "content-encoding: gzip", "content-type: application/x-ndjson"]
        {
            assert!(head.to_lowercase().contains(told), "{head}");
        }
        flate2::read::GzDecoder::new(body.as_slice()).read_to_string(&mut lines).unwrap();
    }
    let export = dir.path().join("export.ndjson");
    std::fs::write(&export, &lines).unwrap();
    let (code, told, _) = run(&BTreeMap::new(), &["audit", "verify", "--file", export.to_str().unwrap()]);
    assert_eq!(code, 0, "{told}");
    assert!(told.contains(&format!("{} records", own.len())), "{told}");
    let refused = sidecar.admin("GET", "/audit?fleet=true", None).await;
    assert_eq!(refused.verdict(), (400, "parameter_invalid"), "{}", refused.text);
}
