//! Moving in: the file of a stopped sidecar becomes the ledger of a fleet, or nothing changes.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Duration, Instant, sleep};

use crate::collector::{Collector, Kept};
use crate::postgres::{self, Schema, Server};
use crate::standin::faults::Fault;
use crate::standin::{Options, Standin};
use crate::support::{PATIENCE, Sidecar, environment, free_port, run};

type Env = BTreeMap<String, String>;

fn set(env: &mut Env, name: &str, value: &str) {
    env.insert(format!("KEYBRAKE_{name}"), value.to_owned());
}

/// The same sidecar with its ledger in a schema.
fn moved(env: &Env, url: &str, schema: &Schema<'_>) -> Env {
    let mut env = env.clone();
    set(&mut env, "LEDGER_URL", url);
    set(&mut env, "LEDGER_SCHEMA", schema.name());
    env
}

/// Imports; answers the exit code, what was told, and the complaint.
fn import(env: &Env) -> (i32, Value, String) {
    let (code, told, complaint) = run(env, &["ledger", "import", "--json"]);
    (code, serde_json::from_str(&told).unwrap_or_default(), complaint)
}

async fn started(env: Env) -> Sidecar {
    let mut sidecar = Sidecar::spawn(env);
    sidecar.ready().await;
    sidecar
}

/// Every row of a schema, but for locks, which say nothing.
async fn rows_of(schema: &Schema<'_>) -> Vec<Vec<String>> {
    let tables = "SELECT table_name FROM information_schema.tables
                  WHERE table_schema = current_schema() AND table_name <> 'locks' ORDER BY 1";
    let mut all = Vec::new();
    for table in schema.sql(tables).await {
        let rows = format!("SELECT '{0}', t::text FROM {0} t ORDER BY 2", table[0]);
        all.extend(schema.sql(&rows).await);
    }
    all
}

fn is_there(dir: &Path) -> (bool, bool) {
    (dir.join("keybrake.redb").exists(), dir.join("keybrake.redb.imported").exists())
}

/// A charge that is executed and not answered.
async fn sending(sidecar: &Sidecar, standin: &Standin, key: &str, name: &str) {
    let executed = standin.executed().len();
    standin.fault(Fault::HoldAfter);
    let request = crate::support::client()
        .post(format!("{}/v1/charges", sidecar.base))
        .bearer_auth(key)
        .header("idempotency-key", name)
        .header("content-type", "application/x-www-form-urlencoded")
        .body("amount=300&currency=usd&customer=cus_1&source=tok_visa");
    tokio::spawn(request.send());
    let since = Instant::now();
    while standin.executed().len() == executed {
        assert!(since.elapsed() < PATIENCE, "{}", sidecar.log());
        sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
#[expect(clippy::too_many_lines, reason = "one story: what was in the file, and that it is there")]
async fn all_that_a_file_knows_goes_over() {
    let Some(server) = postgres::server() else { return };
    let (schema, standin) = (server.schema("import"), Standin::start(Options::default()));
    let (dir, beside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let collector = Collector::start(Kept::File, &["a", "b"]).await;
    let env = collector.env_of("a", &standin, dir.path());
    let mut old = started(env.clone()).await;
    let paths = ["POST /v1/charges", "POST /v1/payment_intents", "POST /v1/payment_intents/{id}/capture"];
    let (key, id) = old.mint("50.00", json!({"allowed_endpoints": paths})).await;
    assert_eq!(old.charge(&key, "one", 1000, "cus_1").await.status, 200);
    let form = [
        ("amount", "2000"),
        ("currency", "usd"),
        ("customer", "cus_1"),
        ("capture_method", "manual"),
        ("payment_method", "pm_card_visa"),
        ("confirm", "true"),
    ];
    let intent = old.post(&key, "/v1/payment_intents", "two", &form).await;
    assert_eq!(intent.status, 200, "{}", intent.text);
    let intent = intent.body["id"].as_str().unwrap().to_owned();
    let (stopped, _) = old.mint("5.00", json!({"budget": "july", "stop_budget_on_refusal": true})).await;
    // The first is recorded, the others are counted.
    for name in ["three", "four", "five"] {
        assert_eq!(old.charge(&stopped, name, 9_900, "cus_2").await.status, 429);
    }
    let bounds = json!({
        "name": "flows", "label_prefix": "flow-", "allowed_endpoints": ["POST /v1/charges"], "daily_usd_cap": 9, "max_cap_usd": 9,
        "expires_in_seconds": 7200, "max_expires_in_seconds": 3600,
    });
    let issuer = old.admin("POST", "/admin/issuers", Some(&bounds)).await;
    let issuer = issuer.body["issuer_key"].as_str().unwrap().to_owned();
    let policy = json!({
        "label": "flow-1", "vendor": "stripe", "allowed_endpoints": ["POST /v1/charges"], "daily_usd_cap": 8,
        "expires_in_seconds": 600,
    });
    let minted = old.json("POST", "/admin/vault_keys", &issuer, Some(&policy)).await;
    let minted = minted.body["vault_key"].as_str().unwrap().to_owned();
    assert_eq!(old.charge(&minted, "six", 700, "cus_3").await.status, 200);
    let (dead, dead_id) = old.mint("5.00", json!({})).await;
    assert_eq!(old.admin("DELETE", &format!("/admin/vault_keys/{dead_id}"), None).await.status, 200);
    collector.has_all_of(&old, "a").await;
    sending(&old, &standin, &key, "seven").await;
    let (records, spend) = (old.audit("events=all").await, old.spend(&id).await);
    assert_eq!(spend, ("10.00".into(), "23.00".into(), "0.00".into()));
    // Its last calls are in the write-ahead log alone.
    old.kill();
    standin.release();
    let executed = standin.executed().len();

    let env = moved(&env, server.url(), &schema);
    let (code, told, complaint) = import(&env);
    assert_eq!((code, &told["imported"], &told["doubts"]), (0, &json!(true), &json!(1)), "{told}{complaint}");
    assert_eq!(is_there(dir.path()), (false, true));
    assert!(dir.path().join("keybrake.wal.imported").exists());
    for table in
        ["keys", "key_digests", "issuers", "budgets", "calls", "call_ids", "answers", "holds", "objects"]
            .into_iter()
            .chain(["counters", "due", "refusals", "audit", "meta"])
    {
        assert!(told["rows"][table].as_u64().unwrap() > 0, "{table}: {told}");
    }

    let new = started(env.clone()).await;
    let since = new.audit("events=all").await;
    assert_eq!(since[..records.len()], records[..], "the same records, and others behind them");
    assert_eq!(since[records.len()]["event"], "doubt", "{}", since[records.len()]);
    for (key, name, amount, customer) in [(&key, "one", 1000, "cus_1"), (&minted, "six", 700, "cus_3")] {
        let again = new.charge(key, name, amount, customer).await;
        assert_eq!(
            (again.status, again.header("idempotent-replayed")),
            (200, Some("true")),
            "{}",
            again.text
        );
    }
    assert_eq!(new.charge(&key, "one", 1001, "cus_1").await.code(), "idempotency_error");
    assert_eq!(new.charge(&stopped, "eight", 100, "cus_2").await.verdict(), (429, "budget_stopped"));
    assert_eq!(new.charge(&dead, "nine", 100, "cus_2").await.verdict(), (401, "vault_key_revoked"));
    assert_eq!(new.charge(&minted, "ten", 200, "cus_3").await.verdict(), (429, "spend_cap_exceeded"));
    assert_eq!(standin.executed().len(), executed, "none of that was made again");
    // What was being sent is found at Stripe, and what was open is captured on its hold.
    let waits = Instant::now();
    while new.spend(&id).await != ("13.00".into(), "20.00".into(), "0.00".into()) {
        assert!(waits.elapsed() < PATIENCE, "{:?}\n{}", new.spend(&id).await, new.log());
        sleep(Duration::from_millis(50)).await;
    }
    let captured = new.post(&key, &format!("/v1/payment_intents/{intent}/capture"), "eleven", &[]).await;
    assert_eq!(captured.status, 200, "{}", captured.text);
    assert_eq!(new.spend(&id).await, ("33.00".into(), "0.00".into(), "0.00".into()));
    assert_eq!(new.charge(&key, "twelve", 1800, "cus_1").await.verdict(), (429, "spend_cap_exceeded"));

    let mut other = collector.env_of("b", &standin, beside.path());
    set(&mut other, "LEDGER_URL", server.url());
    set(&mut other, "LEDGER_SCHEMA", schema.name());
    let other = started(other).await;
    let again = other.charge(&key, "one", 1000, "cus_1").await;
    assert_eq!((again.status, again.header("idempotent-replayed")), (200, Some("true")), "{}", again.text);
    // Its chain goes on at the collector as the one that it was.
    let whole = new.admin("GET", "/audit/verify", None).await;
    assert_eq!((whole.status, &whole.body["whole"]), (200, &json!(true)), "{}", whole.text);
    collector.has_all_of(&new, "a").await;
    collector.has_all_of(&other, "b").await;
    assert!(collector.is_whole().await);
    assert_eq!(collector.node("a").await["chains"].as_array().unwrap().len(), 1);
    drop(new);
    // Without the database it begins anew, and lets nothing through by what it knew.
    let fresh = started(collector.env_of("a", &standin, dir.path())).await;
    assert_eq!(fresh.charge(&key, "one", 1000, "cus_1").await.verdict(), (401, "vault_key_invalid"));
}

/// A sidecar's file with a charge in it, and its sidecar gone.
async fn left_by(node: &str, standin: &Standin, dir: &Path) -> (Env, String) {
    let mut env = environment(standin.addr(), dir);
    set(&mut env, "NODE", node);
    let mut sidecar = started(env.clone()).await;
    let (key, _) = sidecar.mint("50.00", json!({})).await;
    assert_eq!(sidecar.charge(&key, "one", 1000, "cus_1").await.status, 200);
    assert!(sidecar.terminate().success());
    (env, key)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_does_not_fit_is_refused_and_changes_nothing() {
    let Some(server) = postgres::server() else { return };
    let (used, empty) = (server.schema("used"), server.schema("empty"));
    let standin = Standin::start(Options::default());
    let foreign = Standin::start(Options { account: "acct_other000000001".into(), ..Options::default() });
    let [own, others, elsewhere] = std::array::from_fn(|_| tempfile::tempdir().unwrap());
    // There is a fleet already, of node-a.
    let (env, _) = left_by("node-a", &standin, own.path()).await;
    let into_used = moved(&env, server.url(), &used);
    assert_eq!(import(&into_used).0, 0);
    let mut sidecar = started(into_used.clone()).await;
    assert!(sidecar.terminate().success());
    let before = rows_of(&used).await;
    assert!(before.len() > 10);

    let (b, _) = left_by("node-b", &standin, others.path()).await;
    let (c, _) = left_by("node-a", &foreign, elsewhere.path()).await;
    let with = |env: &Env, name: &str, value: &str| {
        let mut env = env.clone();
        set(&mut env, name, value);
        env
    };
    let (into, nowhere) = (|env: &Env| moved(env, server.url(), &used), tempfile::tempdir().unwrap());
    let mut live = into(&b);
    set(&mut live, "STRIPE_SECRET_KEY", "sk_live_standin0000000000000001");
    for (what, env, code, told) in [
        ("no database", b.clone(), 64, "LEDGER_URL"),
        ("misspelt", with(&b, "LEDGER_ULR", "x"), 64, "LEDGER_ULR"),
        ("no file", with(&into(&b), "DATA_DIR", nowhere.path().to_str().unwrap()), 1, "is not there"),
        ("another's chain", with(&into(&b), "NODE", "node-x"), 1, "of node node-b, and NODE says node-x"),
        ("another mode", live, 64, "live mode"),
        ("not this account", with(&into(&b), "STRIPE_ACCOUNT", "acct_x"), 64, "acct_x"),
        ("another account", into(&c), 1, "the file to test mode, acct_other000000001"),
        ("another ledger", into(&b), 1, "has a ledger already"),
    ] {
        let (ended, _, complaint) = import(&env);
        assert_eq!(ended, code, "{what}: {complaint}");
        assert!(complaint.contains(told), "{what}: {complaint}");
    }
    // The same node, begun anew.
    let again = tempfile::tempdir().unwrap();
    let (d, _) = left_by("node-a", &standin, again.path()).await;
    let (code, _, complaint) = import(&into(&d));
    assert!(code == 1 && complaint.contains("node-a has a chain of its own"), "{complaint}");
    for (dir, name) in [(&others, "node-b"), (&again, "node-a"), (&elsewhere, "node-c")] {
        assert_eq!(is_there(dir.path()), (true, false), "{name}");
    }
    assert_eq!(rows_of(&used).await, before);

    let into_empty = moved(&b, server.url(), &empty);
    // While it runs.
    let mut running = started(b.clone()).await;
    let (code, _, complaint) = import(&into_empty);
    assert!(code == 1 && complaint.contains("stop the sidecar first"), "{complaint}");
    assert!(running.terminate().success());
    // One that was taken over lies there.
    let put_away = others.path().join("keybrake.redb.imported");
    std::fs::write(&put_away, "").unwrap();
    let (code, _, complaint) = import(&into_empty);
    assert!(code == 1 && complaint.contains("move it away first"), "{complaint}");
    std::fs::remove_file(&put_away).unwrap();
    assert_eq!(empty.sql(&format!("SELECT to_regnamespace('{}')", empty.name())).await, [[""]]);
    // A schema of a later build.
    assert_eq!(import(&into_empty).0, 0);
    std::fs::rename(&put_away, others.path().join("keybrake.redb")).unwrap();
    empty.sql("UPDATE migrations SET version = 99").await;
    let (code, _, complaint) = import(&into_empty);
    assert!(code == 1 && complaint.contains("format 99"), "{complaint}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_is_imported_twice_is_known() {
    let Some(server) = postgres::server() else { return };
    let (schema, standin) = (server.schema("twice"), Standin::start(Options::default()));
    let dir = tempfile::tempdir().unwrap();
    let (env, key) = left_by("node-a", &standin, dir.path()).await;
    let into = moved(&env, server.url(), &schema);
    assert_eq!(import(&into).1["imported"], true);
    let bring_back = || {
        for name in ["keybrake.redb", "keybrake.wal"] {
            std::fs::rename(dir.path().join(format!("{name}.imported")), dir.path().join(name)).unwrap();
        }
    };
    bring_back();
    let before = rows_of(&schema).await;
    let (code, told, complaint) = import(&into);
    assert_eq!((code, &told["imported"]), (0, &json!(false)), "{complaint}");
    assert_eq!(is_there(dir.path()), (false, true));
    // Both go on, each by itself.
    bring_back();
    let mut sidecar = started(env).await;
    assert_eq!(sidecar.charge(&key, "two", 1000, "cus_1").await.status, 200);
    assert!(sidecar.terminate().success());
    let (code, _, complaint) = import(&into);
    assert!(code == 1 && complaint.contains("the two differ"), "{complaint}");
    assert_eq!(is_there(dir.path()), (true, false));
    assert_eq!(rows_of(&schema).await, before);
    let sidecar = started(into).await;
    assert!(sidecar.log().contains("there is a ledger file, which is not used"), "{}", sidecar.log());
}

/// When a connection is cut.
#[derive(Clone, Copy, PartialEq)]
enum Cut {
    BeforeCommit,
    AfterCommit,
}

/// A way to a server that breaks when the import ends; later connections pass. Answers its URL.
async fn breaking_way(server: &Server, cut: Cut) -> String {
    let port = free_port();
    let (credentials, address) = server.url().rsplit_once('@').unwrap();
    let (to, database) = address.split_once('/').unwrap();
    let to = to.to_owned();
    let listener = TcpListener::bind(("127.0.0.1", port)).await.unwrap();
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            let server = TcpStream::connect(&to).await.unwrap();
            tokio::spawn(relay(client, server, cut));
        }
    });
    format!("{credentials}@127.0.0.1:{port}/{database}")
}

async fn relay(client: TcpStream, server: TcpStream, cut: Cut) {
    let ((mut from, mut to_client), (mut answers, mut to)) = (client.into_split(), server.into_split());
    let back = tokio::spawn(async move { tokio::io::copy(&mut answers, &mut to_client).await });
    let (mut buffer, mut copies) = (vec![0; 1 << 16], false);
    let has = |bytes: &[u8], word: &[u8]| bytes.windows(word.len()).any(|window| window == word);
    while let Ok(read) = from.read(&mut buffer).await {
        let bytes = &buffer[..read];
        copies |= has(bytes, b"INSERT INTO audit");
        let ends = copies && has(bytes, b"COMMIT");
        if read == 0 || (ends && cut == Cut::BeforeCommit) {
            break;
        }
        if ends {
            // No answer to it comes back.
            back.abort();
        }
        to.write_all(bytes).await.unwrap();
        if ends {
            sleep(Duration::from_millis(300)).await;
            break;
        }
    }
    back.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_import_whose_end_was_not_heard_is_run_again() {
    let Some(server) = postgres::server() else { return };
    for (cut, was_imported) in [(Cut::BeforeCommit, false), (Cut::AfterCommit, true)] {
        let (schema, standin) = (server.schema("cut"), Standin::start(Options::default()));
        let dir = tempfile::tempdir().unwrap();
        let (env, key) = left_by("node-a", &standin, dir.path()).await;
        let way = breaking_way(server, cut).await;
        let (code, _, complaint) = import(&moved(&env, &way, &schema));
        assert!(code == 1 && complaint.contains("run the same again"), "{complaint}");
        assert_eq!(is_there(dir.path()), (true, false));
        let (code, told, complaint) = import(&moved(&env, server.url(), &schema));
        assert_eq!((code, &told["imported"]), (0, &json!(!was_imported)), "{complaint}");
        assert_eq!(is_there(dir.path()), (false, true));
        let sidecar = started(moved(&env, server.url(), &schema)).await;
        let again = sidecar.charge(&key, "one", 1000, "cus_1").await;
        assert_eq!((again.status, again.header("idempotent-replayed")), (200, Some("true")));
        assert_eq!(standin.executed().len(), 1);
    }
}
