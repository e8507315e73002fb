//! The process: when it starts, when it does not, how it stops, and what its commands say.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader};
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::{BodyExt as _, Full};
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio::time::Instant;

use crate::outcomes::nothing_is_found;
use crate::standin::faults::{Fault, On, Scripted};
use crate::standin::{Options, Standin};
use crate::support::{
    ADMIN_KEY, PATIENCE, STRIPE_KEY, Sidecar, client, environment, free_port, patient_client, program, run,
    world, world_of, world_with,
};

type Env = BTreeMap<String, String>;

const OTHER_ACCOUNT: &str = "acct_standin0000002";

fn set(env: &mut Env, name: &str, value: &str) {
    env.insert(format!("KEYBRAKE_{name}"), value.to_owned());
}

/// The same ledger and settings on other ports.
fn elsewhere(env: &Env) -> Env {
    let mut env = env.clone();
    set(&mut env, "LISTEN", &format!("127.0.0.1:{}", free_port()));
    set(&mut env, "OPS_LISTEN", &format!("127.0.0.1:{}", free_port()));
    env
}

/// The environment of the commands that talk to a sidecar.
fn client_env(sidecar: &Sidecar) -> Env {
    let mut env = Env::new();
    set(&mut env, "URL", &sidecar.base);
    set(&mut env, "ADMIN_KEY", ADMIN_KEY);
    env
}

fn signal(sidecar: &Sidecar, name: &str) {
    let sent = Command::new("kill").arg(name).arg(sidecar.pid().to_string()).status().unwrap();
    assert!(sent.success());
}

/// Asks until the answer is as it should be; everything here has a reason to become so soon.
async fn until<F: Future<Output = bool>>(what: &str, mut is_so: impl FnMut() -> F) {
    let since = Instant::now();
    while !is_so().await {
        assert!(since.elapsed() < PATIENCE, "never: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

async fn readyz(sidecar: &Sidecar) -> Option<(u16, Value)> {
    let answer = client().get(format!("{}/readyz", sidecar.ops)).send().await.ok()?;
    Some((answer.status().as_u16(), answer.json().await.ok()?))
}

/// Waits until it listens, ready or not, and gives the reasons why it is not.
async fn reasons(sidecar: &Sidecar) -> String {
    until("it listens", || async { readyz(sidecar).await.is_some() }).await;
    readyz(sidecar).await.unwrap().1["reasons"].to_string()
}

/// Runs `serve` to its end.
fn serve(env: &Env) -> (i32, String) {
    let (code, stdout, stderr) = run(env, &["serve"]);
    assert_eq!(stdout, "", "serve says nothing on standard output");
    (code, stderr)
}

fn shows_nothing_secret(text: &str) {
    for secret in [ADMIN_KEY, STRIPE_KEY] {
        assert!(!text.contains(secret), "{text}");
    }
}

fn account_of(account: &str) -> Options {
    Options { account: account.to_owned(), ..Options::default() }
}

#[tokio::test]
async fn a_ledger_belongs_to_one_account_and_mode() {
    let (standin, mut sidecar) = world().await;
    let (key, _) = sidecar.mint("50", json!({})).await;
    assert_eq!(sidecar.charge(&key, "k", 1000, "cus_1").await.status, 200);
    assert!(sidecar.terminate().success());
    let asked = standin.requests().len();

    let mut live = elsewhere(sidecar.env());
    set(&mut live, "STRIPE_SECRET_KEY", "sk_live_standin0000000000000001");
    let (code, told) = serve(&live);
    assert_eq!(code, 64, "{told}");
    assert!(told.contains("live") && told.contains("test"), "{told}");
    assert_eq!(standin.requests().len(), asked, "the key of another mode is not even tried");

    let other = Standin::start(account_of(OTHER_ACCOUNT));
    let mut env = elsewhere(sidecar.env());
    set(&mut env, "STRIPE_API_BASE", &other.base_url());
    let (code, told) = serve(&env);
    assert_eq!(code, 64, "{told}");
    assert!(told.contains(OTHER_ACCOUNT), "{told}");

    let mut named = elsewhere(sidecar.env());
    set(&mut named, "STRIPE_ACCOUNT", OTHER_ACCOUNT);
    let (code, told) = serve(&named);
    assert_eq!(code, 64, "{told}");
    shows_nothing_secret(&told);

    // A rotated key of the same account goes on where the old one stopped.
    standin.set_secret_keys(vec!["sk_test_rotated000000000000001".to_owned()]);
    let mut rotated = sidecar.env().clone();
    set(&mut rotated, "STRIPE_SECRET_KEY", "sk_test_rotated000000000000001");
    let mut again = Sidecar::spawn(rotated);
    again.ready().await;
    let replayed = again.charge(&key, "k", 1000, "cus_1").await;
    assert_eq!(replayed.header("idempotent-replayed"), Some("true"), "{}", replayed.text);
    assert_eq!(again.charge(&key, "k-2", 1000, "cus_1").await.status, 200);
    assert_eq!(standin.executed().len(), 2);
}

/// The account turns out to be another one only after the sidecar has begun to serve.
#[tokio::test]
async fn another_account_that_is_told_late_stops_everything() {
    let late = |fails: bool| async move {
        // None of those that the system gives to outgoing connections: it must be free a second time.
        let listen = SocketAddr::from(([127, 0, 0, 1], free_port()));
        let (standin, mut sidecar) = world_of(Options { listen, ..Options::default() }, &[]).await;
        let (key, _) = sidecar.mint("50", json!({})).await;
        assert!(sidecar.terminate().success());
        drop(standin);
        // The same address, first with nobody behind it or with somebody who fails.
        let other = || Standin::start(Options { listen, ..account_of(OTHER_ACCOUNT) });
        let failing = fails.then(|| {
            let standin = other();
            let fault = Fault::Answer { status: 500, body: json!({}), headers: BTreeMap::new() };
            // The first two questions follow each other at once.
            let on = On::Path { method: "GET".to_owned(), prefix: "/v1/account".to_owned() };
            standin.fault(Scripted { fault, on, count: 2 });
            standin
        });
        let mut again = Sidecar::spawn(sidecar.env().clone());
        again.ready().await;
        let standin = failing.unwrap_or_else(other);
        let status = tokio::task::spawn_blocking(move || again.wait()).await.unwrap();
        assert_eq!(status.code(), Some(64));
        assert!(standin.executed().is_empty());
        drop(key);
    };
    tokio::join!(late(false), late(true));
}

#[tokio::test]
async fn nothing_is_served_before_the_account_is_known() {
    let standin = Standin::start(Options::default());
    standin.set_secret_keys(Vec::new());
    let dir = tempfile::tempdir().unwrap();
    let mut sidecar = Sidecar::spawn(environment(standin.addr(), dir.path()));
    let why = reasons(&sidecar).await;
    assert!(why.contains("refuses this sidecar's key"), "{why}");
    // Keys may be issued meanwhile, and what a key may know of itself it may know.
    let (key, id) = sidecar.mint("50", json!({})).await;
    let refused = sidecar.charge(&key, "k", 1000, "cus_1").await;
    assert_eq!(
        (refused.verdict(), refused.header("stripe-should-retry")),
        ((503, "not_ready"), Some("true"))
    );
    let read = sidecar.call("GET", "/v1/charges", &key, &[], &[]).await;
    assert_eq!(read.verdict(), (503, "not_ready"));
    let unknown = sidecar.call("GET", "/v1/charges", "vk_test_x", &[], &[]).await;
    assert_eq!(unknown.verdict(), (401, "vault_key_invalid"), "who it is comes first");
    assert_eq!(sidecar.call("GET", "/keybrake/key", &key, &[], &[]).await.status, 200);
    assert!(standin.requests().iter().all(|seen| seen.path == "/v1/account"));
    standin.set_secret_keys(vec![STRIPE_KEY.to_owned()]);
    sidecar.ready().await;
    assert_eq!(sidecar.charge(&key, "k", 1000, "cus_1").await.status, 200);
    assert_eq!(sidecar.spend(&id).await.0, "10.00");
}

#[tokio::test]
async fn a_restricted_key_needs_the_name_of_its_account() {
    let standin = Standin::start(Options { restricted: true, ..Options::default() });
    let dir = tempfile::tempdir().unwrap();
    let mut env = environment(standin.addr(), dir.path());
    let mut sidecar = Sidecar::spawn(env.clone());
    let why = reasons(&sidecar).await;
    assert!(why.contains("STRIPE_ACCOUNT"), "{why}");
    let (key, _) = sidecar.mint("50", json!({})).await;
    let refused = sidecar.charge(&key, "k", 1000, "cus_1").await;
    assert_eq!(refused.verdict(), (503, "not_ready"));
    assert!(refused.text.contains("STRIPE_ACCOUNT"), "{}", refused.text);
    let (code, told, _) = run(&env, &["doctor", "--json"]);
    assert_eq!(code, 1);
    assert!(told.contains("set STRIPE_ACCOUNT"), "{told}");
    assert!(sidecar.terminate().success());
    set(&mut env, "STRIPE_ACCOUNT", &Options::default().account);
    let mut named = Sidecar::spawn(env);
    named.ready().await;
    assert_eq!(named.charge(&key, "k", 1000, "cus_1").await.status, 200);
}

#[tokio::test]
async fn one_ledger_has_one_process() {
    let (_standin, sidecar) = world().await;
    let (key, _) = sidecar.mint("50", json!({})).await;
    let (code, told) = serve(&elsewhere(sidecar.env()));
    assert_eq!(code, 1, "{told}");
    assert!(told.contains("another process is using this ledger"), "{told}");
    assert_eq!(sidecar.charge(&key, "k", 1000, "cus_1").await.status, 200);
    // A port that is taken is told as such, and nothing is served on the others.
    let dir = tempfile::tempdir().unwrap();
    let mut taken = elsewhere(sidecar.env());
    set(&mut taken, "DATA_DIR", &dir.path().display().to_string());
    set(&mut taken, "LISTEN", &sidecar.env()["KEYBRAKE_LISTEN"]);
    let (code, told) = serve(&taken);
    assert_eq!(code, 1, "{told}");
    assert!(told.contains("cannot listen"), "{told}");
}

/// Each is wrong in its own way.
const BAD_SETTINGS: &[(&str, &str)] = &[
    ("LISTEN", "0.0.0.0"),
    ("OPS_LISTEN", "nowhere:x"),
    ("ADMIN_KEY", "short-secret"),
    ("STRIPE_SECRET_KEY", "sk_org_live_secret"),
    ("STRIPE_ACCOUNT", "account"),
    ("STRIPE_API_BASE", "http://stripe.example"),
    ("STRIPE_CA_FILE", "/nowhere/ca.pem"),
    ("TLS", "maybe"),
    ("REMEMBER_DAYS", "1"),
    ("AUDIT_DAYS", "0"),
    ("STAMP", "yes"),
    ("UPSTREAM_TIMEOUT_MS", "999"),
    ("DRAIN_MS", "-1"),
    ("MAX_BODY_BYTES", "1e6"),
    ("LOG", "verbose"),
    ("LOG_FORMAT", "xml"),
    ("NODE", "knot\u{fc}"),
    // Later steps.
    ("LEDGER_URL", "nowhere"),
    ("COLLECTOR_URL", "https://collector.example/path"),
    ("COLLECTOR_FORMAT", "xml"),
    ("FX_FILE", "/fx.json"),
    // Misspelt, or of nobody.
    ("ADMIN_KEYS", "misspelt-secret"),
    ("DAILY_CAP", "10"),
    ("STRIPE_ACCOUNT_FILE", "/x"),
];
/// What Kubernetes tells of a Service called `keybrake`.
const KUBERNETES: &[(&str, &str)] = &[
    ("SERVICE_HOST", "10.0.0.1"),
    ("SERVICE_PORT", "8443"),
    ("SERVICE_PORT_HTTPS", "8443"),
    ("PORT", "tcp://10.0.0.1:8443"),
    ("PORT_8443_TCP", "tcp://10.0.0.1:8443"),
    ("PORT_8443_TCP_ADDR", "10.0.0.1"),
    ("COLLECTOR_SERVICE_HOST", "10.0.0.2"),
];

#[test]
fn every_bad_setting_is_told_in_one_go() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    let both = dir.path().join("both");
    std::fs::write(&both, "secret-of-a-file-0123456789abcdef").unwrap();
    let mut env = environment("127.0.0.1:1".parse().unwrap(), &data);
    for (name, value) in BAD_SETTINGS {
        set(&mut env, name, value);
    }
    for (name, value) in KUBERNETES {
        set(&mut env, name, value);
    }
    // Client names are nothing to `serve`.
    for name in ["URL", "CA", "ISSUER_KEY"] {
        set(&mut env, name, "whatever");
    }
    for command in ["serve", "doctor"] {
        let (code, stdout, told) = run(&env, &[command]);
        assert_eq!((code, stdout.as_str()), (64, ""), "{told}");
        for (name, _) in BAD_SETTINGS {
            assert!(told.contains(&format!("KEYBRAKE_{name}:")), "{name} is not told: {told}");
        }
        assert!(
            !told.contains("SERVICE_") && !told.contains("PORT") && !told.contains("_URL: whatever"),
            "{told}"
        );
        for secret in ["short-secret", "sk_org_live_secret", "user:pass", "misspelt-secret"] {
            assert!(!told.contains(secret), "{told}");
        }
    }
    assert!(!data.exists(), "nothing is made for a configuration that is bad");

    let mut double = environment("127.0.0.1:1".parse().unwrap(), &data);
    for name in ["ADMIN_KEY_FILE", "STRIPE_SECRET_KEY_FILE"] {
        set(&mut double, name, &both.display().to_string());
    }
    let (code, told) = serve(&double);
    assert_eq!(code, 64, "{told}");
    assert!(
        told.contains("KEYBRAKE_ADMIN_KEY_FILE") && told.contains("KEYBRAKE_STRIPE_SECRET_KEY_FILE"),
        "{told}"
    );
    assert!(!told.contains("secret-of-a-file"), "{told}");
    shows_nothing_secret(&told);
    let (code, told) = serve(&Env::new());
    assert_eq!(code, 64, "{told}");
    assert!(told.contains("KEYBRAKE_ADMIN_KEY:") && told.contains("KEYBRAKE_STRIPE_SECRET_KEY:"), "{told}");
}

#[tokio::test]
async fn a_call_in_flight_is_finished() {
    let (standin, mut sidecar) = world().await;
    let (key, id) = sidecar.mint("50", json!({})).await;
    standin.fault(Fault::Hold);
    let (base, http) = (sidecar.base.clone(), client());
    let late = {
        let (http, key) = (http.clone(), key.clone());
        tokio::spawn(async move {
            let form = "amount=1000&currency=usd&customer=cus_1&source=tok_visa";
            let request = http
                .post(format!("{base}/v1/charges"))
                .bearer_auth(key)
                .header("idempotency-key", "k")
                .header("content-type", "application/x-www-form-urlencoded")
                .body(form);
            let answer = request.send().await.unwrap();
            (answer.status().as_u16(), answer.text().await.unwrap())
        })
    };
    standin.until_held(1).await;
    signal(&sidecar, "-TERM");
    until("not ready", || async { readyz(&sidecar).await.is_some_and(|(status, _)| status == 503) }).await;
    assert!(readyz(&sidecar).await.unwrap().1["reasons"].to_string().contains("stopping"));
    assert!(client().get(&sidecar.base).send().await.is_err(), "nothing new is taken");
    standin.release();
    let (status, text) = late.await.unwrap();
    assert_eq!(status, 200, "{text}");
    assert_eq!(sidecar.wait().code(), Some(0));
    sidecar.restart().await;
    assert_eq!(sidecar.spend(&id).await, ("10.00".into(), "0.00".into(), "0.00".into()));
}

#[tokio::test]
async fn a_stuck_call_does_not_hold_up_the_end() {
    let (standin, mut sidecar) = world_with(&[("DRAIN_MS", "300")]).await;
    let (key, id) = sidecar.mint("50", json!({})).await;
    standin.fault(Fault::HoldAfter);
    let (base, http, bearer) = (sidecar.base.clone(), client(), key.clone());
    let stuck = tokio::spawn(async move {
        let request = http
            .post(format!("{base}/v1/charges"))
            .bearer_auth(bearer)
            .header("idempotency-key", "k")
            .header("content-type", "application/x-www-form-urlencoded")
            .body("amount=1000&currency=usd&customer=cus_1&source=tok_visa");
        request.send().await.is_ok_and(|answer| answer.status() == 200)
    });
    standin.until_held(1).await;
    let since = Instant::now();
    signal(&sidecar, "-TERM");
    assert_eq!(sidecar.wait().code(), Some(0));
    // The limit is the setting, and what a busy machine adds.
    assert!(since.elapsed() < Duration::from_secs(3), "{:?}", since.elapsed());
    assert!(!stuck.await.unwrap(), "nobody was told that it went well");
    nothing_is_found(&standin);
    sidecar.restart().await;
    assert_eq!(sidecar.spend(&id).await, ("0.00".into(), "10.00".into(), "10.00".into()));
    standin.release();
    let again = sidecar.charge(&key, "k", 1000, "cus_1").await;
    assert_eq!(again.status, 200, "{}", again.text);
    assert_eq!(sidecar.spend(&id).await, ("10.00".into(), "0.00".into(), "0.00".into()));
    assert_eq!(standin.executed().len(), 1);
}

/// A sidecar whose secrets are files.
async fn with_files(standin: &Standin, dir: &Path) -> Sidecar {
    let mut env = environment(standin.addr(), dir);
    for (name, text) in [("ADMIN_KEY", ADMIN_KEY), ("STRIPE_SECRET_KEY", STRIPE_KEY)] {
        let file = dir.join(name.to_lowercase());
        std::fs::write(&file, format!("{text}\n")).unwrap();
        env.remove(&format!("KEYBRAKE_{name}"));
        set(&mut env, &format!("{name}_FILE"), &file.display().to_string());
    }
    let mut sidecar = Sidecar::spawn(env);
    sidecar.ready().await;
    sidecar
}

async fn lists_keys(sidecar: &Sidecar, bearer: &str) -> u16 {
    sidecar.call("GET", "/admin/vault_keys", bearer, &[], &[]).await.status
}

#[tokio::test]
async fn a_hangup_reads_the_files_again() {
    let standin = Standin::start(Options::default());
    let dir = tempfile::tempdir().unwrap();
    let sidecar = with_files(&standin, dir.path()).await;
    let (key, _) = sidecar.mint("50", json!({})).await;
    let new = "the-next-admin-key-0123456789abcdef0123";
    let rotated = "sk_test_rotated000000000000001";
    standin.set_secret_keys(vec![STRIPE_KEY.to_owned(), rotated.to_owned()]);
    std::fs::write(dir.path().join("admin_key"), format!("{new},{ADMIN_KEY}\n")).unwrap();
    std::fs::write(dir.path().join("stripe_secret_key"), rotated).unwrap();
    signal(&sidecar, "-HUP");
    until("the new key", || async { lists_keys(&sidecar, new).await == 200 }).await;
    assert_eq!(lists_keys(&sidecar, ADMIN_KEY).await, 200, "two while rotating");
    std::fs::write(dir.path().join("admin_key"), new).unwrap();
    signal(&sidecar, "-HUP");
    until("without the old key", || async { lists_keys(&sidecar, ADMIN_KEY).await == 401 }).await;
    until("the rotated key", || async {
        sidecar.call("GET", "/v1/charges", &key, &[], &[]).await;
        let (http, bearer) = (sidecar.charge(&key, "k", 1000, "cus_1").await, format!("Bearer {rotated}"));
        http.status == 200 && standin.requests().pop().unwrap().header("authorization") == Some(&bearer)
    })
    .await;
    // What cannot be read changes nothing.
    std::fs::write(dir.path().join("admin_key"), "short").unwrap();
    signal(&sidecar, "-HUP");
    until("the complaint", || async { sidecar.log().contains("the old one stays") }).await;
    assert_eq!(lists_keys(&sidecar, new).await, 200);
}

/// A key of another account in the file must not spend a cent of that account.
#[tokio::test]
async fn a_hangup_does_not_change_the_account() {
    let standin = Standin::start(Options::default());
    let dir = tempfile::tempdir().unwrap();
    let sidecar = with_files(&standin, dir.path()).await;
    let (key, _) = sidecar.mint("50", json!({})).await;
    let foreign = "sk_test_foreign000000000000001";
    standin.set_secret_keys(vec![STRIPE_KEY.to_owned(), foreign.to_owned()]);
    let told = Fault::Answer { status: 200, body: json!({"id": OTHER_ACCOUNT}), headers: BTreeMap::new() };
    standin.fault(told.on(On::Path { method: "GET".to_owned(), prefix: "/v1/account".to_owned() }));
    std::fs::write(dir.path().join("stripe_secret_key"), foreign).unwrap();
    signal(&sidecar, "-HUP");
    until("the complaint", || async { sidecar.log().contains("the new Stripe key") }).await;
    let asked = standin.requests().into_iter().filter(|seen| {
        seen.path == "/v1/account" && seen.header("authorization") == Some(&format!("Bearer {foreign}"))
    });
    assert_eq!(asked.count(), 1);
    assert_eq!(sidecar.charge(&key, "k", 1000, "cus_1").await.status, 200);
    let seen = standin.requests().pop().unwrap();
    assert_eq!(seen.header("authorization"), Some(format!("Bearer {STRIPE_KEY}").as_str()));
    assert_eq!(readyz(&sidecar).await.unwrap().0, 200);
}

fn mode_of(path: &Path) -> u32 {
    std::fs::metadata(path).unwrap_or_else(|error| panic!("{}: {error}", path.display())).permissions().mode()
        & 0o777
}

/// One request over HTTP/2, verified against the CA.
async fn over_h2(address: &str, ca: &Path, path: &str) -> (u16, Value) {
    let mut config = keybrake::tls::client_config(Some(ca)).unwrap();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
    let stream = TcpStream::connect(address).await.unwrap();
    let stream = connector.connect("localhost".try_into().unwrap(), stream).await.unwrap();
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(b"h2".as_slice()));
    let io = TokioIo::new(stream);
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), io).await.unwrap();
    tokio::spawn(connection);
    let request = hyper::Request::get(format!("https://localhost{path}"))
        .header("authorization", format!("Bearer {ADMIN_KEY}"))
        .body(Full::<bytes::Bytes>::default())
        .unwrap();
    let answer = sender.send_request(request).await.unwrap();
    let status = answer.status().as_u16();
    let body = answer.into_body().collect().await.unwrap().to_bytes();
    (status, serde_json::from_slice(&body).unwrap_or_default())
}

#[tokio::test]
async fn tls_is_made_once_and_verified() {
    let standin = Standin::start(Options::default());
    let dir = tempfile::tempdir().unwrap();
    let (data, ca) = (dir.path().join("new/data"), dir.path().join("ca-for-tasks.pem"));
    let mut env = environment(standin.addr(), &data);
    let (port, address) = (free_port(), |port| format!("127.0.0.1:{port}"));
    set(&mut env, "TLS", "auto");
    set(&mut env, "CA_OUT", &ca.display().to_string());
    // One of these belongs to no machine, and another only to those with IPv6.
    set(&mut env, "LISTEN", &format!("{},[::1]:{port},192.0.2.1:{port}", address(port)));
    let mut sidecar = Sidecar::spawn(env);
    sidecar.base = format!("https://localhost:{port}");
    sidecar.ready().await;
    let lacking = |line: &str| line.contains("lacks an address") && line.contains("192.0.2.1");
    assert!(sidecar.log().lines().any(lacking), "{}", sidecar.log());
    assert_eq!(mode_of(&data), 0o700);
    assert_eq!(mode_of(&data.join("tls")), 0o700);
    assert_eq!(mode_of(&data.join("keybrake.redb")), 0o600);
    assert_eq!(mode_of(&data.join("tls/ca.key")), 0o600);
    assert_eq!(mode_of(&ca), 0o644);

    let first = std::fs::read(&ca).unwrap();
    let certificate = reqwest::Certificate::from_pem(&first).unwrap();
    let trusting = patient_client().tls_certs_only([certificate]).build().unwrap();
    for host in ["localhost", "127.0.0.1"] {
        let asked = trusting.get(format!("https://{host}:{port}/admin/vault_keys")).bearer_auth(ADMIN_KEY);
        assert_eq!(asked.send().await.unwrap().status(), 200, "{host}");
    }
    assert_eq!(over_h2(&address(port), &ca, "/admin/vault_keys").await.0, 200);
    // One that trusts what the system trusts.
    let stranger = reqwest::Client::builder().no_proxy().build().unwrap();
    let stranger = stranger.get(format!("https://localhost:{port}/admin/vault_keys")).send().await;
    assert!(stranger.is_err(), "a client that does not know the CA must not connect");
    let plain = client().get(format!("http://localhost:{port}/admin/vault_keys")).bearer_auth(ADMIN_KEY);
    assert!(plain.send().await.is_err(), "nothing is served in the clear");
    let mut commands = client_env(&sidecar);
    let (code, _, told) = run(&commands, &["keys", "list"]);
    assert_eq!(code, 1, "{told}");
    set(&mut commands, "CA", &ca.display().to_string());
    let (code, listed, told) = run(&commands, &["keys", "list", "--json"]);
    assert_eq!((code, listed.trim()), (0, "{\"data\":[]}"), "{told}");

    // The CA outlives the process; a client that trusts it need not be told anew.
    assert!(sidecar.terminate().success());
    std::fs::remove_file(&ca).unwrap();
    let base = sidecar.base.clone();
    let mut sidecar = Sidecar::spawn(sidecar.env().clone());
    sidecar.base = base;
    sidecar.ready().await;
    assert_eq!(std::fs::read(&ca).unwrap(), first);
    let asked = trusting.get(format!("{}/admin/vault_keys", sidecar.base)).bearer_auth(ADMIN_KEY);
    assert_eq!(asked.send().await.unwrap().status(), 200);
}

fn json_of(env: &Env, arguments: &[&str]) -> Value {
    let (code, stdout, stderr) = run(env, &[arguments, &["--json"]].concat());
    assert_eq!(code, 0, "{arguments:?}: {stdout}{stderr}");
    serde_json::from_str(&stdout).unwrap_or_else(|_| panic!("{arguments:?} printed {stdout}"))
}

#[tokio::test]
async fn commands_work_and_speak_json() {
    let (standin, sidecar) = world().await;
    let env = client_env(&sidecar);
    let issued = json_of(
        &env,
        &[
            "keys",
            "issue",
            "--label",
            "from-a-shell",
            "--allow",
            "POST /v1/charges",
            "--daily-usd-cap",
            "32.99",
            "--expires-in",
            "3600",
            "--metadata",
            "flow=billing",
            "--account",
            "acct_other",
        ],
    );
    assert_eq!(issued["accounts"], json!(["acct_other"]));
    let (key, id) = (issued["vault_key"].as_str().unwrap(), issued["id"].as_str().unwrap());
    assert_eq!((&issued["daily_usd_cap"], &issued["metadata"]["flow"]), (&json!("32.99"), &json!("billing")));
    assert_eq!(sidecar.charge(key, "k-1", 1000, "cus_9").await.status, 200);
    standin.fault(Fault::DropAfter);
    assert_eq!(sidecar.charge(key, "k-2", 500, "cus_9").await.status, 502);
    assert_eq!(json_of(&env, &["keys", "list", "--label", "from-a-shell"])["data"][0]["id"], id);
    let shown = json_of(&env, &["keys", "show", id]);
    assert_eq!(shown["spend"]["today"]["spent"], "10.00");
    assert!(shown.get("vault_key").is_none(), "a secret is shown once");
    let holds = json_of(&env, &["holds", "list", "--state", "doubt"]);
    let hold = &holds["data"][0];
    assert_eq!(json_of(&env, &["holds", "show", hold["id"].as_str().unwrap()])["usd"], "5.00");
    let call = hold["call_id"].as_str().unwrap();
    assert_eq!(json_of(&env, &["calls", "show", call])["state"], "doubt");
    assert_eq!(json_of(&env, &["calls", "list", "--customer", "cus_9"])["data"].as_array().unwrap().len(), 2);
    let spent = json_of(&env, &["audit", "query", "outcome=spent", "customer=cus_9"]);
    assert_eq!(spent["data"].as_array().unwrap().len(), 1);
    assert_eq!(json_of(&env, &["audit", "verify"])["whole"], true);
    assert_eq!(json_of(&env, &["keys", "revoke", id])["status"], "revoked");
    for arguments in [
        vec!["keys", "list"],
        vec!["keys", "show", id],
        vec!["holds", "list"],
        vec!["calls", "list"],
        vec!["audit", "query"],
    ] {
        let (code, stdout, stderr) = run(&env, &arguments);
        assert_eq!((code, stderr.as_str()), (0, ""), "{arguments:?}");
        assert!(!stdout.is_empty() && !stdout.contains(key), "{stdout}");
    }
    // Things that are not there, and a key that opens nothing.
    let (code, _, told) = run(&env, &["keys", "show", "vk_id_nothing"]);
    assert_eq!(code, 1, "{told}");
    assert!(told.contains("not_found"), "{told}");
    let mut wrong = env.clone();
    set(&mut wrong, "ADMIN_KEY", "another-admin-key-0123456789abcdef0123");
    assert_eq!(run(&wrong, &["keys", "list"]).0, 1);
    let mut nobody = env.clone();
    set(&mut nobody, "URL", "http://127.0.0.1:1");
    assert_eq!(run(&nobody, &["keys", "list"]).0, 1);
    assert!(standin.executed().len() == 2);
}

#[tokio::test]
async fn the_log_can_be_followed_and_checked_elsewhere() {
    let (_standin, sidecar) = world().await;
    let env = client_env(&sidecar);
    let (key, _) = sidecar.mint("50", json!({})).await;
    assert_eq!(sidecar.charge(&key, "k-1", 1000, "cus_9").await.status, 200);
    let records = sidecar.audit("events=all").await.len();
    let mut tail = program(&env).args(["audit", "tail", "--follow", "--json"]).spawn().unwrap();
    let lines = BufReader::new(tail.stdout.take().unwrap()).lines().take(records);
    let lines: Vec<String> = lines.map(Result::unwrap).collect();
    tail.kill().unwrap();
    tail.wait().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let verify = |name: &str, lines: &[String]| {
        let file = dir.path().join(name);
        std::fs::write(&file, lines.join("\n")).unwrap();
        // No sidecar is needed for this.
        let (code, told, _) =
            run(&Env::new(), &["audit", "verify", "--json", "--file", file.to_str().unwrap()]);
        (code, serde_json::from_str::<Value>(&told).unwrap_or_default())
    };
    let (code, whole) = verify("whole", &lines);
    assert_eq!((code, &whole["whole"], &whole["records"]), (0, &json!(true), &json!(records)));
    assert_eq!(whole["head"], json_of(&env, &["audit", "verify"])["head"]);
    assert_eq!(verify("later", &lines[1..]).0, 0, "what lies before the first line cannot be checked");
    let changed = |from: &str, to: &str| -> Vec<String> {
        let lines: Vec<String> = lines.iter().map(|line| line.replace(from, to)).collect();
        assert!(lines.iter().any(|line| line.contains(to)));
        lines
    };
    let gap: Vec<String> = [&lines[..2], &lines[3..]].concat();
    let mut swapped = lines.clone();
    swapped.swap(1, 2);
    for (name, lines) in [
        ("amount", changed("\"amount\":1000", "\"amount\":1001")),
        ("customer", changed("cus_9", "cus_8")),
        ("gap", gap),
        ("swapped", swapped),
    ] {
        let (code, verdict) = verify(name, &lines);
        assert_eq!((code, &verdict["whole"]), (1, &json!(false)), "{name}");
        assert!(verdict["first_bad"].is_u64(), "{verdict}");
    }
    assert_eq!(verify("none", &["no record".to_owned()]).0, 1);
    assert_eq!(run(&Env::new(), &["audit", "verify", "--file", "/nowhere"]).0, 1);
}

#[tokio::test]
async fn health_and_doctor_tell_how_it_is() {
    let (standin, mut sidecar) = world().await;
    let env = sidecar.env().clone();
    assert_eq!(json_of(&env, &["health"]), json!({"ready": true, "reasons": []}));
    assert_eq!(run(&env, &["health"]).1.trim(), "ready");
    // A probe needs no secrets.
    let only_ops: Env = env
        .iter()
        .filter(|(name, _)| *name == "KEYBRAKE_OPS_LISTEN")
        .map(|(a, b)| (a.clone(), b.clone()))
        .collect();
    assert_eq!(run(&only_ops, &["health"]).0, 0);
    let verdicts = |told: &str| -> BTreeMap<String, String> {
        let told: Value = serde_json::from_str(told).unwrap();
        let text = |one: &Value, field: &str| one[field].as_str().unwrap().to_owned();
        told["findings"]
            .as_array()
            .unwrap()
            .iter()
            .map(|one| (text(one, "check"), text(one, "verdict")))
            .collect()
    };
    let (code, told, _) = run(&env, &["doctor", "--json"]);
    let found = verdicts(&told);
    for check in ["configuration", "stripe", "sidecar"] {
        assert_eq!(found[check], "ok", "{told}");
    }
    let all = &serde_json::from_str::<Value>(&told).unwrap()["findings"];
    let of = |check: &str, told: &str| {
        let mut of_check = all.as_array().unwrap().iter().filter(|one| one["check"] == check);
        of_check.any(|one| one["told"].as_str().unwrap().contains(told))
    };
    let days = "is remembered for 40 days unless its key says otherwise, a record is kept for 400 days";
    assert!(of("size", " MB; a call ") && of("size", days), "{told}");
    assert!(of("memory", " MB and keeps 2 audit records"), "{told}");
    // A temporary directory may lie where nothing lasts, and the doctor says so.
    assert_eq!(code == 0, found["disk"] == "ok", "{told}");
    shows_nothing_secret(&told);
    standin.set_secret_keys(vec!["sk_test_another".to_owned()]);
    let (code, told, _) = run(&env, &["doctor", "--json"]);
    assert_eq!((code, verdicts(&told)["stripe"].as_str()), (1, "BAD"), "{told}");
    assert!(sidecar.terminate().success());
    assert_eq!(run(&env, &["health"]).0, 1);
    let (code, told, _) = run(&env, &["health", "--json"]);
    assert_eq!((code, serde_json::from_str::<Value>(&told).unwrap()["ready"].clone()), (1, json!(false)));
}

#[test]
fn help_names_everything_and_bad_usage_is_64() {
    let none = Env::new();
    let (code, help, _) = run(&none, &["--help"]);
    assert_eq!(code, 0);
    for variable in keybrake::config::VARIABLES.iter().chain(keybrake::config::CLIENT_VARIABLES) {
        assert!(help.contains(variable.name), "{} is missing: {help}", variable.name);
    }
    for name in [
        "LISTEN",
        "OPS_LISTEN",
        "DATA_DIR",
        "LEDGER_URL",
        "ADMIN_KEY",
        "STRIPE_SECRET_KEY",
        "STRIPE_ACCOUNT",
        "STRIPE_API_BASE",
        "STRIPE_CA_FILE",
        "TLS",
        "TLS_CERT_FILE",
        "TLS_KEY_FILE",
        "TLS_NAMES",
        "CA_OUT",
        "NODE",
        "COLLECTOR_URL",
        "COLLECTOR_TOKEN",
        "COLLECTOR_CA_FILE",
        "COLLECTOR_FORMAT",
        "FX_FILE",
        "REMEMBER_DAYS",
        "AUDIT_DAYS",
        "STAMP",
        "UPSTREAM_TIMEOUT_MS",
        "DRAIN_MS",
        "MAX_BODY_BYTES",
        "LOG",
        "LOG_FORMAT",
        "URL",
        "CA",
        "ISSUER_KEY",
    ] {
        assert!(help.contains(&format!("KEYBRAKE_{name} ")), "{name} is missing: {help}");
    }
    for command in ["serve", "keys", "holds", "calls", "audit", "doctor", "health"] {
        assert!(help.contains(command), "{command}");
        assert_eq!(run(&none, &[command, "--help"]).0, 0, "{command}");
    }
    assert_eq!(run(&none, &["--version"]).0, 0);
    for arguments in [
        vec![],
        vec!["nothing"],
        vec!["serve", "--listen", "x"],
        vec!["keys"],
        vec!["keys", "issue"],
        vec!["keys", "issue", "--label", "x", "--allow", "POST /v1/charges", "--expires-in", "soon"],
        vec!["audit", "query", "customer"],
        vec!["keys", "list", "--admin-key", "secret"],
    ] {
        let (code, _, told) = run(&none, &arguments);
        assert_eq!(code, 64, "{arguments:?}: {told}");
    }
    let mut env = none.clone();
    set(&mut env, "URL", "ftp://nowhere");
    set(&mut env, "ADMIN_KEYS", "misspelt");
    let (code, _, told) = run(&env, &["keys", "list"]);
    assert_eq!(code, 64, "{told}");
    assert!(told.contains("KEYBRAKE_URL") && told.contains("KEYBRAKE_ADMIN_KEYS"), "{told}");
}
