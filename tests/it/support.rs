//! A sidecar as its users run it: the real program in a process of its own, in front of the stand-in.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, ErrorKind, Read as _};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::AsyncWriteExt as _;
use tokio::time::Instant;

use crate::standin::{Options, Standin};

pub(crate) const ADMIN_KEY: &str = "admin-key-of-the-tests-0123456789abcdef";
pub(crate) const STRIPE_KEY: &str = "sk_test_standin0000000000000001";
/// How long anything may take before a test calls it hung.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// A running sidecar, ended by its process id when it is dropped.
pub(crate) struct Sidecar {
    child: Child,
    pub(crate) base: String,
    pub(crate) ops: String,
    pub(crate) data: PathBuf,
    env: BTreeMap<String, String>,
    log: Arc<Mutex<String>>,
    http: reqwest::Client,
    /// Whose certificates its clients trust.
    ca: Option<PathBuf>,
    dir: Option<tempfile::TempDir>,
    role: &'static str,
}

/// An answer, read whole.
#[derive(Clone, Debug)]
pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) headers: reqwest::header::HeaderMap,
    pub(crate) text: String,
    pub(crate) body: Value,
}

impl Reply {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).and_then(|value| value.to_str().ok())
    }

    pub(crate) fn code(&self) -> &str {
        self.body["error"]["code"].as_str().unwrap_or_default()
    }

    /// Status and code, for tables.
    pub(crate) fn verdict(&self) -> (u16, &str) {
        (self.status, self.code())
    }
}

/// Ports that tests give out: below those that the system gives to outgoing connections, so that none of those takes a
/// port between its choice and its use, or while a sidecar is down.
const PORTS: std::ops::Range<u16> = 18_000..32_000;

/// A port that nobody listens on, and that no other test of this process gets.
pub(crate) fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    // Another process of these tests begins elsewhere.
    let start = u16::try_from(std::process::id() % 97).unwrap() * 131;
    loop {
        let n = NEXT.fetch_add(1, Ordering::SeqCst);
        let port = PORTS.start + (start.wrapping_add(n) % (PORTS.end - PORTS.start));
        if std::net::TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
        assert!(n < PORTS.end - PORTS.start, "no port is free");
    }
}

pub(crate) fn client() -> reqwest::Client {
    patient_client().timeout(PATIENCE).build().unwrap()
}

/// What makes a client that trusts nobody and waits for as long as it takes, unless it is told more.
pub(crate) fn patient_client() -> reqwest::ClientBuilder {
    // The program never relies on a process default; reqwest in these tests does.
    let _ = rustls::crypto::ring::default_provider().install_default();
    // Else each client reads all authorities of the system, which costs more than most tests do otherwise.
    reqwest::Client::builder().no_proxy().tls_certs_only([])
}

/// The environment of a sidecar in front of `standin`, without TLS, on free ports.
pub(crate) fn environment(standin: SocketAddr, data: &Path) -> BTreeMap<String, String> {
    let own = |name: &str, value: String| (format!("KEYBRAKE_{name}"), value);
    BTreeMap::from([
        own("LISTEN", format!("127.0.0.1:{}", free_port())),
        own("OPS_LISTEN", format!("127.0.0.1:{}", free_port())),
        own("DATA_DIR", data.display().to_string()),
        own("ADMIN_KEY", ADMIN_KEY.to_owned()),
        own("STRIPE_SECRET_KEY", STRIPE_KEY.to_owned()),
        own("STRIPE_API_BASE", format!("http://{standin}")),
        own("TLS", "off".to_owned()),
        own("NODE", "node-of-the-tests".to_owned()),
        own("UPSTREAM_TIMEOUT_MS", "5000".to_owned()),
        own("DRAIN_MS", "5000".to_owned()),
        own("LOG", "debug".to_owned()),
    ])
}

/// The program with an environment and no other.
pub(crate) fn program(env: &BTreeMap<String, String>) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_keybrake"));
    command.env_clear().envs(env).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Starts a stand-in and a sidecar in front of it.
pub(crate) async fn world() -> (Standin, Sidecar) {
    world_with(&[]).await
}

/// The same with settings such as `("UPSTREAM_TIMEOUT_MS", "1000")`.
pub(crate) async fn world_with(settings: &[(&str, &str)]) -> (Standin, Sidecar) {
    world_of(Options::default(), settings).await
}

/// The same in front of a stand-in with options of its own.
pub(crate) async fn world_of(options: Options, settings: &[(&str, &str)]) -> (Standin, Sidecar) {
    let standin = Standin::start(options);
    let dir = tempfile::tempdir().unwrap();
    let mut env = environment(standin.addr(), dir.path());
    for (name, value) in settings {
        env.insert(format!("KEYBRAKE_{name}"), (*value).to_owned());
    }
    let mut sidecar = Sidecar::spawn(env);
    sidecar.dir = Some(dir);
    sidecar.ready().await;
    (standin, sidecar)
}

impl Sidecar {
    /// Starts the program; does not wait.
    pub(crate) fn spawn(env: BTreeMap<String, String>) -> Self {
        Self::spawn_by(program(&env).arg("serve"), env)
    }

    /// Starts a collector instead. The names of `serve` say where it is; the program itself does not read them.
    pub(crate) fn spawn_collector(env: BTreeMap<String, String>) -> Self {
        let mut collector = Self::spawn_by(program(&env).arg("collect"), env);
        collector.role = "collect";
        collector
    }

    /// The same by a command of the test's own, which runs the program with this environment.
    pub(crate) fn spawn_by(command: &mut Command, env: BTreeMap<String, String>) -> Self {
        let since = Instant::now();
        let mut child = loop {
            match command.spawn() {
                // A program that a test has just written: a child of another test holds it open until it has begun itself.
                Err(error) if error.kind() == ErrorKind::ExecutableFileBusy && since.elapsed() < PATIENCE => {
                    std::thread::sleep(Duration::from_millis(10));
                }
                spawned => break spawned.unwrap(),
            }
        };
        let log = Arc::new(Mutex::new(String::new()));
        let (stderr, kept) = (child.stderr.take().unwrap(), Arc::clone(&log));
        std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                let mut kept = kept.lock().unwrap();
                kept.push_str(&line);
                kept.push('\n');
            }
        });
        let scheme = if env["KEYBRAKE_TLS"] == "off" { "http" } else { "https" };
        Self {
            child,
            base: format!("{scheme}://{}", env["KEYBRAKE_LISTEN"]),
            ops: format!("http://{}", env["KEYBRAKE_OPS_LISTEN"]),
            data: PathBuf::from(&env["KEYBRAKE_DATA_DIR"]),
            env,
            log,
            http: client(),
            ca: None,
            dir: None,
            role: "serve",
        }
    }

    /// Waits until it is ready.
    pub(crate) async fn ready(&mut self) {
        let since = Instant::now();
        loop {
            let answer = self.http.get(format!("{}/readyz", self.ops)).send().await;
            if answer.is_ok_and(|answer| answer.status() == 200) {
                return;
            }
            let ended = self.child.try_wait().unwrap();
            assert!(ended.is_none(), "the sidecar ended with {ended:?}:\n{}", self.log());
            assert!(since.elapsed() < PATIENCE, "the sidecar is not ready:\n{}", self.log());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Trusts this authority alone from now on.
    pub(crate) fn trusts(&mut self, ca: &Path) {
        let authority = reqwest::Certificate::from_pem(&std::fs::read(ca).unwrap()).unwrap();
        self.http = patient_client().timeout(PATIENCE).tls_certs_only([authority]).build().unwrap();
        self.ca = Some(ca.to_owned());
    }

    /// All that it has written to its log.
    pub(crate) fn log(&self) -> String {
        self.log.lock().unwrap().clone()
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn env(&self) -> &BTreeMap<String, String> {
        &self.env
    }

    /// Ends it as a power cut would.
    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Asks it to stop and waits for that.
    pub(crate) fn terminate(&mut self) -> ExitStatus {
        let sent = Command::new("kill").arg("-TERM").arg(self.pid().to_string()).status().unwrap();
        assert!(sent.success());
        self.wait()
    }

    /// Waits for its end.
    pub(crate) fn wait(&mut self) -> ExitStatus {
        let since = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(since.elapsed() < PATIENCE, "the sidecar does not end:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Starts it again on the same ledger, addresses and settings.
    pub(crate) async fn restart(&mut self) {
        self.start_again();
        self.ready().await;
    }

    /// The same where it may end again at once, because what it needs is not there yet.
    pub(crate) async fn restart_until_it_stays(&mut self) {
        let since = Instant::now();
        loop {
            let before = self.log();
            self.start_again();
            let is_ready = async |http: &reqwest::Client, ops: &str| {
                http.get(format!("{ops}/readyz")).send().await.is_ok_and(|answer| answer.status() == 200)
            };
            while self.child.try_wait().unwrap().is_none() {
                if is_ready(&self.http, &self.ops).await {
                    return;
                }
                let told = || format!("{before}\nand then\n{}", self.log());
                assert!(since.elapsed() < PATIENCE * 2, "the sidecar is not ready:\n{}", told());
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    }

    fn start_again(&mut self) {
        let mut again = Self::spawn_by(program(&self.env).arg(self.role), self.env.clone());
        again.role = self.role;
        again.dir = self.dir.take();
        if let Some(ca) = &self.ca {
            again.trusts(ca);
        }
        *self = again;
    }

    /// One request with a bearer.
    pub(crate) async fn call(
        &self,
        method: &str,
        path: &str,
        bearer: &str,
        headers: &[(&str, &str)],
        form: &[(&str, &str)],
    ) -> Reply {
        let method = reqwest::Method::from_bytes(method.as_bytes()).unwrap();
        let mut request = self.http.request(method, format!("{}{path}", self.base)).bearer_auth(bearer);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        if !form.is_empty() {
            let pairs: Vec<_> =
                form.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
            request = request
                .header("content-type", "application/x-www-form-urlencoded")
                .body(keybrake::vendor::stripe::form::serialise(&pairs));
        }
        read(request.send().await.unwrap()).await
    }

    /// A charge under an idempotency key.
    pub(crate) async fn charge(
        &self,
        key: &str,
        idempotency_key: &str,
        amount: u64,
        customer: &str,
    ) -> Reply {
        let amount = amount.to_string();
        let form = [
            ("amount", amount.as_str()),
            ("currency", "usd"),
            ("customer", customer),
            ("source", "tok_visa"),
        ];
        self.call("POST", "/v1/charges", key, &[("idempotency-key", idempotency_key)], &form).await
    }

    /// A POST under an idempotency key.
    pub(crate) async fn post(&self, key: &str, path: &str, name: &str, form: &[(&str, &str)]) -> Reply {
        self.call("POST", path, key, &[("idempotency-key", name)], form).await
    }

    /// One JSON request with the admin key.
    pub(crate) async fn admin(&self, method: &str, path: &str, body: Option<&Value>) -> Reply {
        self.json(method, path, ADMIN_KEY, body).await
    }

    /// One JSON request with a bearer.
    pub(crate) async fn json(&self, method: &str, path: &str, bearer: &str, body: Option<&Value>) -> Reply {
        let method = reqwest::Method::from_bytes(method.as_bytes()).unwrap();
        let mut request = self.http.request(method, format!("{}{path}", self.base)).bearer_auth(bearer);
        if let Some(body) = body {
            request = request.json(body);
        }
        read(request.send().await.unwrap()).await
    }

    /// Mints a key: a cap in dollars and whatever else the policy should say. Answers secret and id.
    pub(crate) async fn mint(&self, daily_usd_cap: &str, more: Value) -> (String, String) {
        let mut policy = json!({
            "label": "of-a-test",
            "vendor": "stripe",
            "allowed_endpoints": ["POST /v1/charges"],
            "daily_usd_cap": daily_usd_cap,
            "expires_in_seconds": 3600,
            "requests_per_second": 10_000,
        });
        for (name, value) in more.as_object().unwrap() {
            policy[name] = value.clone();
        }
        self.mint_policy(&policy).await
    }

    /// Mints a key of a whole policy. Answers secret and id.
    pub(crate) async fn mint_policy(&self, policy: &Value) -> (String, String) {
        let reply = self.admin("POST", "/admin/vault_keys", Some(policy)).await;
        assert_eq!(reply.status, 201, "{}", reply.text);
        let text = |field: &str| reply.body[field].as_str().unwrap().to_owned();
        (text("vault_key"), text("id"))
    }

    /// What a key has spent, held and in doubt today: `("29.99", "0.00", "0.00")`.
    pub(crate) async fn spend(&self, key_id: &str) -> (String, String, String) {
        let reply = self.admin("GET", &format!("/admin/vault_keys/{key_id}"), None).await;
        let text = |field: &str| reply.body["spend"]["today"][field].as_str().unwrap().to_owned();
        (text("spent"), text("held"), text("doubt"))
    }

    /// A key as the admin API shows it.
    pub(crate) async fn key(&self, key_id: &str) -> Value {
        self.admin("GET", &format!("/admin/vault_keys/{key_id}"), None).await.body
    }

    /// What `/admin/holds` or `/admin/calls` lists for a query.
    pub(crate) async fn list(&self, path_and_query: &str) -> Vec<Value> {
        let reply = self.admin("GET", path_and_query, None).await;
        assert_eq!(reply.status, 200, "{}", reply.text);
        reply.body["data"].as_array().unwrap().clone()
    }

    /// The states of the holds that a key pays for and that are not over.
    pub(crate) async fn holds(&self, key_id: &str) -> Vec<String> {
        let all = self.list("/admin/holds?limit=1000").await;
        let of_key = all.iter().filter(|hold| hold["key_id"] == key_id);
        of_key.map(|hold| hold["state"].as_str().unwrap().to_owned()).collect()
    }

    /// Whether it wants traffic, as a load balancer asks.
    pub(crate) async fn readyz(&self) -> u16 {
        self.http.get(format!("{}/readyz", self.ops)).send().await.unwrap().status().as_u16()
    }

    /// Audit records, oldest first; the query without `?`.
    pub(crate) async fn audit(&self, query: &str) -> Vec<Value> {
        let reply = self.admin("GET", &format!("/audit?order=asc&limit=1000&{query}"), None).await;
        assert_eq!(reply.status, 200, "{}", reply.text);
        reply.body["data"].as_array().unwrap().clone()
    }
}

impl Drop for Sidecar {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs a command of the program to its end: exit code, standard output, standard error.
pub(crate) fn run(env: &BTreeMap<String, String>, arguments: &[&str]) -> (i32, String, String) {
    let mut child = program(env).args(arguments).spawn().unwrap();
    let (mut stdout, mut stderr) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
    let errors = std::thread::spawn(move || {
        let mut text = String::new();
        stderr.read_to_string(&mut text).unwrap();
        text
    });
    let mut text = String::new();
    stdout.read_to_string(&mut text).unwrap();
    let status = child.wait().unwrap();
    (status.code().unwrap_or(-1), text, errors.join().unwrap())
}

async fn read(answer: reqwest::Response) -> Reply {
    let (status, headers) = (answer.status().as_u16(), answer.headers().clone());
    let text = answer.text().await.unwrap();
    let body = serde_json::from_str(&text).unwrap_or_default();
    Reply { status, headers, text, body }
}

/// A request under a bearer, written by hand: the head at once, the body when the test says.
pub(crate) async fn head_of(
    sidecar: &Sidecar,
    key: &str,
    path: &str,
    name: &str,
    body: &str,
) -> tokio::net::TcpStream {
    let address = sidecar.base.strip_prefix("http://").unwrap();
    let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
    let head = format!(
        "POST {path} HTTP/1.1\r\nhost: {address}\r\nauthorization: Bearer {key}\r\nidempotency-key: {name}\r\n\
         content-type: application/x-www-form-urlencoded\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    stream
}
