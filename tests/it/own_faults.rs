//! Faults of our own and of the way to Stripe: a disk that is full, a file that is damaged or not ours to write, a panic,
//! names and certificates that are wrong, and peers that vanish without a word. Nothing may leave that is not held, and
//! what was acknowledged must be remembered afterwards.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use keybrake::account::{self, AccountState};
use keybrake::call::CallState;
use keybrake::forward::Forwarder;
use keybrake::fx::{Book, Table};
use keybrake::id::{BootId, LedgerId};
use keybrake::ledger::query::CallFilter;
use keybrake::ledger::{Ledger, Opening};
use keybrake::proxy::{Proxy, ProxyConfig};
use keybrake::secret::{Mode, Secret};
use keybrake::server::{self, Limits, Listeners};
use keybrake::telemetry::Metrics;
use keybrake::time::{Clock, UnixMs};
use keybrake::tls::{ServerTls, TlsName, TlsSource};
use keybrake::upstream::{Base, Upstream, UpstreamConfig};
use redb::{Database, ReadableDatabase as _, TableDefinition};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{DigitallySignedStruct, SignatureScheme};
use serde_json::json;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_rustls::TlsAcceptor;

use crate::outcomes::nothing_is_found;
use crate::standin::faults::Fault;
use crate::standin::{Options, Standin};
use crate::support::{PATIENCE, Reply, STRIPE_KEY, Sidecar, client, environment, program, world};

type Env = BTreeMap<String, String>;

/// Whoever may not write what root may.
const NOBODY: u32 = 65_534;

fn money(spent: &str, held: &str, doubt: &str) -> (String, String, String) {
    (spent.to_owned(), held.to_owned(), doubt.to_owned())
}

/// Asks until it is so; everything here has a reason to become so soon.
async fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let since = Instant::now();
    while !is_so() {
        assert!(since.elapsed() < PATIENCE, "never: {what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

fn is_replayed(reply: &Reply) -> bool {
    reply.status == 200 && reply.header("idempotent-replayed") == Some("true")
}

/// The program under a limit of the size of every file that it writes: beyond, writes fail as on a full disk. The log is a
/// pipe, and the signal of the limit is ignored, which programs inherit.
fn on_a_disk_of(kib: u64, env: &Env) -> Command {
    let mut command = Command::new("sh");
    let script = format!("trap '' XFSZ; ulimit -f {}; exec \"$0\" serve", kib * 2);
    command.arg("-c").arg(script).arg(env!("CARGO_BIN_EXE_keybrake"));
    command.env_clear().envs(env).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

#[tokio::test]
async fn a_full_disk_stops_everything_and_loses_nothing() {
    let (standin, mut sidecar) = world().await;
    // Records carry it, so the file grows soon.
    let fat: serde_json::Map<_, _> = (0..20).map(|n| (format!("m{n}"), json!("x".repeat(500)))).collect();
    let (key, id) = sidecar.mint("1000.00", json!({"metadata": fat})).await;
    assert_eq!(sidecar.charge(&key, "k-0", 100, "cus_1").await.status, 200);
    assert!(sidecar.terminate().success());
    let size = std::fs::metadata(sidecar.data.join("keybrake.redb")).unwrap().len();
    let env = sidecar.env();
    let mut full = Sidecar::spawn_by(&mut on_a_disk_of(size / 1_024, env), env.clone());
    full.ready().await;
    let mut acknowledged = 1;
    let failed = loop {
        let reply = full.charge(&key, &format!("k-{acknowledged}"), 100, "cus_1").await;
        if reply.status != 200 {
            break reply;
        }
        acknowledged += 1;
        assert!(acknowledged < 2_000, "the disk is never full");
    };
    let either = [(503, "ledger_unavailable"), (502, "outcome_unknown")];
    assert!(either.contains(&failed.verdict()), "{}", failed.text);
    let sent = standin.requests().len();
    for name in ["k-0", "new"] {
        let refused = full.charge(&key, name, 100, "cus_1").await;
        assert_eq!(refused.verdict(), (503, "ledger_unavailable"), "{}", refused.text);
        assert_eq!(refused.header("stripe-should-retry"), Some("true"));
    }
    assert_eq!(full.readyz().await, 503);
    assert_eq!(standin.requests().len(), sent, "nothing leaves that cannot be held");
    assert!(full.terminate().success());

    sidecar.restart().await;
    for n in 0..acknowledged {
        let again = sidecar.charge(&key, &format!("k-{n}"), 100, "cus_1").await;
        assert!(is_replayed(&again), "k-{n}: {}", again.text);
    }
    assert_eq!(sidecar.charge(&key, &format!("k-{acknowledged}"), 100, "cus_1").await.status, 200);
    assert_eq!(standin.executed().len(), acknowledged + 1);
    assert_eq!(sidecar.spend(&id).await, money(&format!("{}.00", acknowledged + 1), "0.00", "0.00"));
}

/// The program does not start, and says why.
async fn refuses(what: &str, command: &mut Command, env: &Env, code: i32, reason: &str) {
    let mut refused = Sidecar::spawn_by(command, env.clone());
    assert_eq!(refused.wait().code(), Some(code), "{what}: {}", refused.log());
    until(&format!("{what}: {reason}"), || refused.log().contains(reason)).await;
}

#[tokio::test]
async fn a_disk_that_is_full_at_the_start_leaves_nothing_behind() {
    let standin = Standin::start(Options::default());
    let dir = tempfile::tempdir().unwrap();
    let env = environment(standin.addr(), dir.path());
    refuses("full", &mut on_a_disk_of(4, &env), &env, 1, "File too large").await;
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "nothing is left of the making");
    let mut sidecar = Sidecar::spawn(env);
    sidecar.ready().await;
}

/// A ledger that was ended in order, with one charge in it: its stand-in, sidecar, key and bytes.
async fn one_charge() -> (Standin, Sidecar, String, Vec<u8>) {
    let (standin, mut sidecar) = world().await;
    let (key, _) = sidecar.mint("50.00", json!({})).await;
    assert_eq!(sidecar.charge(&key, "k", 100, "cus_1").await.status, 200);
    assert!(sidecar.terminate().success());
    let bytes = std::fs::read(sidecar.data.join("keybrake.redb")).unwrap();
    (standin, sidecar, key, bytes)
}

/// What was charged is known to the healthy file, and is not charged again.
async fn remembers(standin: &Standin, sidecar: &mut Sidecar, key: &str) {
    sidecar.restart().await;
    assert!(is_replayed(&sidecar.charge(key, "k", 100, "cus_1").await));
    assert_eq!(standin.executed().len(), 1);
}

#[tokio::test]
async fn a_damaged_or_newer_file_is_refused_and_keeps_what_it_says() {
    let (standin, mut sidecar, key, healthy) = one_charge().await;
    let path = sidecar.data.join("keybrake.redb");
    let meta: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("meta");
    let newer_format = {
        let db = Database::create(&path).unwrap();
        let txn = db.begin_write().unwrap();
        txn.open_table(meta).unwrap().insert("format", [1, 9].as_slice()).unwrap();
        txn.commit().unwrap();
        drop(db);
        std::fs::read(&path).unwrap()
    };
    // The store's own version is the first byte of each of its two commit slots.
    let mut newer_store = healthy.clone();
    (newer_store[64], newer_store[192]) = (9, 9);
    let half = healthy[..healthy.len() / 2].to_vec();
    let damages = [
        ("empty", Vec::new(), 1, "empty"),
        ("garbage", b"<html>507 Insufficient Storage</html>".repeat(200), 1, "ledger"),
        ("half", half, 1, "ledger"),
        ("of a newer store", newer_store, 1, "ledger"),
        ("of a newer keybrake", newer_format, 64, "use a newer keybrake"),
    ];
    let asked = standin.requests().len();
    for (what, bytes, code, reason) in damages {
        std::fs::write(&path, &bytes).unwrap();
        refuses(what, program(sidecar.env()).arg("serve"), sidecar.env(), code, reason).await;
        assert!(code == 64 || std::fs::read(&path).unwrap() == bytes, "{what} was changed");
    }
    let newer = Database::open(&path).unwrap().begin_read().unwrap().open_table(meta).unwrap();
    assert_eq!(newer.get("format").unwrap().unwrap().value(), [1, 9], "the last one, which had to be opened");
    assert_eq!(standin.requests().len(), asked, "not even the account is asked for");
    std::fs::write(&path, healthy).unwrap();
    remembers(&standin, &mut sidecar, &key).await;
}

/// A sidecar that was killed has its last calls in the log: without it they would be made again.
#[tokio::test]
async fn a_killed_ledger_is_refused_without_its_log() {
    let (standin, mut sidecar) = world().await;
    let (key, _) = sidecar.mint("50.00", json!({})).await;
    assert_eq!(sidecar.charge(&key, "k", 100, "cus_1").await.status, 200);
    sidecar.kill();
    let log = sidecar.data.join("keybrake.wal");
    let kept = std::fs::read(&log).unwrap();
    let (env, reason) = (sidecar.env().clone(), "its last calls are in");
    for other in [None, Some(vec![0; kept.len()])] {
        std::fs::remove_file(&log).unwrap();
        if let Some(other) = &other {
            std::fs::write(&log, other).unwrap();
        }
        refuses("no log", program(&env).arg("serve"), &env, 1, reason).await;
        assert_eq!(std::fs::read(&log).ok(), other, "it is left as it was");
        std::fs::write(&log, &kept).unwrap();
    }
    remembers(&standin, &mut sidecar, &key).await;
}

/// Gives a folder and all in it to another user.
fn give(dir: &Path, user: u32) {
    let given = Command::new("chown").arg("-R").arg(format!("{user}:{user}")).arg(dir).status().unwrap();
    assert!(given.success());
}

#[tokio::test]
async fn a_file_that_may_not_be_written_is_refused_and_left_as_it_is() {
    let (standin, mut sidecar, key, healthy) = one_charge().await;
    let path = sidecar.data.join("keybrake.redb");
    let mut command = program(sidecar.env());
    let elsewhere = tempfile::tempdir().unwrap();
    let own = std::fs::metadata(&path).unwrap().uid();
    if own == 0 {
        // Permissions do not bind root, and nobody may look into root's folders.
        std::fs::set_permissions(elsewhere.path(), PermissionsExt::from_mode(0o755)).unwrap();
        let copy = elsewhere.path().join("keybrake");
        std::fs::copy(env!("CARGO_BIN_EXE_keybrake"), &copy).unwrap();
        give(&sidecar.data, NOBODY);
        command = Command::new(copy);
        command.env_clear().envs(sidecar.env()).uid(NOBODY).gid(NOBODY).stderr(Stdio::piped());
    }
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o400)).unwrap();
    refuses("read-only", command.arg("serve"), sidecar.env(), 1, "keybrake.redb: Permission denied").await;
    assert!(std::fs::read(&path).unwrap() == healthy, "it was changed");
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o600)).unwrap();
    if own == 0 {
        give(&sidecar.data, own);
    }
    remembers(&standin, &mut sidecar, &key).await;
}

/// Panics once, where a call is already held, and trusts everybody afterwards.
#[derive(Debug)]
struct Panics(AtomicBool);

impl ServerCertVerifier for Panics {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        assert!(!self.0.swap(false, Ordering::SeqCst), "on purpose");
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        rustls::crypto::ring::default_provider().signature_verification_algorithms.supported_schemes()
    }
}

fn opened(path: &Path) -> Ledger {
    let at = UnixMs::from_millis(1);
    let opening = Opening {
        node: "node".to_owned(),
        mode: Mode::Test,
        clock: Clock::System,
        boot: BootId::new(at, [1; 10]),
        fresh_id: LedgerId::new(at, [2; 10]),
        fresh_salt: [3; 32],
        audit_days: 400,
        ships: false,
    };
    Ledger::open(path, opening).unwrap()
}

/// The request path on the sidecar's ledger, towards a Stripe whose certificate nobody can look at without a panic.
async fn panicking(sidecar: &Sidecar, stripe: SocketAddr) -> (SocketAddr, Ledger) {
    let ledger = opened(&sidecar.data.join("keybrake.redb"));
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let tls = rustls::ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    let verifier = Arc::new(Panics(AtomicBool::new(true)));
    let tls = tls.unwrap().dangerous().with_custom_certificate_verifier(verifier).with_no_client_auth();
    let base = Base::parse(&format!("https://{stripe}")).unwrap();
    let upstream = Upstream::new(UpstreamConfig::new(base, Arc::new(tls)));
    let forwarder = Arc::new(Forwarder::new(upstream, Secret::new(STRIPE_KEY)));
    let state = Arc::new(AccountState::new(Mode::Test));
    account::recall(&state, &ledger, &forwarder).await.unwrap();
    let config = ProxyConfig {
        node: "node".to_owned(),
        stamp: true,
        body_bytes_max: 1 << 20,
        upstream_timeout: Duration::from_secs(5),
    };
    let fx = Arc::new(Book::new(Table::default()));
    let proxy = Arc::new(Proxy::new(config, ledger.clone(), forwarder, state, Metrics::default(), fx));
    let listeners = Listeners::bind(&["127.0.0.1:0".parse().unwrap()]).await.unwrap();
    let address = listeners.addresses().unwrap()[0];
    let service = move |request: hyper::Request<hyper::body::Incoming>, _| {
        let path = request.uri().path().to_owned();
        Arc::clone(&proxy).handle(request, path)
    };
    tokio::spawn(server::run(listeners, None, Limits::default(), service, std::future::pending()));
    (address, ledger)
}

#[tokio::test]
async fn a_panic_in_a_held_call_is_a_doubt_at_once() {
    let (standin, mut sidecar) = world().await;
    let (key, _) = sidecar.mint("50.00", json!({})).await;
    assert!(sidecar.terminate().success());
    let dir = tempfile::tempdir().unwrap();
    let relay = Relay::start(standin.addr(), Front::Tls(tls_of(dir.path(), "127.0.0.1"))).await;
    let (address, ledger) = panicking(&sidecar, relay.address).await;
    let charge = || async {
        let request = client()
            .post(format!("http://{address}/v1/charges"))
            .bearer_auth(&key)
            .header("idempotency-key", "k")
            .header("content-type", "application/x-www-form-urlencoded")
            .body("amount=100&currency=usd&customer=cus_1&source=tok_visa");
        let answer = request.send().await.unwrap();
        let doubt = answer.headers().contains_key("keybrake-outcome");
        (answer.status().as_u16(), doubt, answer.text().await.unwrap())
    };
    let state = async || {
        let found = ledger.read(|reader| reader.calls(&CallFilter::default(), None, 10)).await;
        found.unwrap().items[0].state
    };
    let (status, doubt, told) = charge().await;
    assert!((status, doubt) == (502, true) && told.contains("outcome_unknown"), "{status} {told}");
    assert_eq!(state().await, CallState::Doubt);
    let (status, _, told) = charge().await;
    assert_eq!(status, 200, "{told}");
    assert_eq!(state().await, CallState::Spent);
    assert_eq!(standin.executed().len(), 1);
}

/// How the relay meets a new connection.
#[derive(Clone)]
enum Front {
    Plain,
    Tls(Arc<rustls::ServerConfig>),
    /// It is accepted, and never hears a word.
    Silent,
}

/// What the relay does with bytes.
#[derive(Clone, Copy)]
enum Line {
    Open,
    /// What is sent arrives, and no answer comes back.
    Mute,
    /// Whatever is sent is lost, and nobody says so.
    Dead,
    /// Closes when the next request comes, without having read it to Stripe.
    Closing,
}

/// A way to the stand-in that breaks as ways do. A connection that lost something stays lost.
struct Relay {
    address: SocketAddr,
    front: watch::Sender<Front>,
    line: watch::Sender<Line>,
    open: Arc<AtomicUsize>,
}

impl Relay {
    async fn start(stripe: SocketAddr, front: Front) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (front, line) = (watch::Sender::new(front), watch::Sender::new(Line::Open));
        let open = Arc::new(AtomicUsize::new(0));
        let (fronts, lines, count) = (front.subscribe(), line.subscribe(), Arc::clone(&open));
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let (mut fronts, lines, count) = (fronts.clone(), lines.clone(), Arc::clone(&count));
                let front = fronts.borrow_and_update().clone();
                count.fetch_add(1, Ordering::SeqCst);
                tokio::spawn(async move {
                    tokio::select! {
                        () = meet(stream, front, stripe, lines) => {}
                        _ = fronts.changed() => {}
                    }
                    count.fetch_sub(1, Ordering::SeqCst);
                });
            }
        });
        Self { address, front, line, open }
    }

    /// Meets connections in another way from now on; those that are open end.
    async fn turn(&self, front: Front) {
        self.front.send_replace(front);
        until("every connection has ended", || self.open.load(Ordering::SeqCst) == 0).await;
    }
}

async fn meet(stream: TcpStream, front: Front, stripe: SocketAddr, lines: watch::Receiver<Line>) {
    match front {
        Front::Plain => pass(stream, stripe, lines).await,
        Front::Tls(config) => {
            if let Ok(stream) = TlsAcceptor::from(config).accept(stream).await {
                pass(stream, stripe, lines).await;
            }
        }
        Front::Silent => std::future::pending().await,
    }
}

async fn pass(client: impl AsyncRead + AsyncWrite, stripe: SocketAddr, lines: watch::Receiver<Line>) {
    let (mut from, mut to) = tokio::io::split(client);
    let (mut answers, mut requests) = TcpStream::connect(stripe).await.unwrap().into_split();
    let is_lost = AtomicBool::new(false);
    let there = async {
        let mut chunk = vec![0; 1 << 16];
        while let Ok(n @ 1..) = from.read(&mut chunk).await {
            let line = *lines.borrow();
            match line {
                Line::Closing => return,
                Line::Dead => is_lost.store(true, Ordering::SeqCst),
                Line::Open | Line::Mute if is_lost.load(Ordering::SeqCst) => {}
                Line::Open | Line::Mute => requests.write_all(&chunk[..n]).await.unwrap(),
            }
        }
    };
    let back = async {
        let mut chunk = vec![0; 1 << 16];
        while let Ok(n @ 1..) = answers.read(&mut chunk).await {
            if matches!(*lines.borrow(), Line::Mute) {
                is_lost.store(true, Ordering::SeqCst);
            }
            if !is_lost.load(Ordering::SeqCst) && to.write_all(&chunk[..n]).await.is_err() {
                return;
            }
        }
        if is_lost.load(Ordering::SeqCst) {
            std::future::pending::<()>().await;
        }
    };
    tokio::select! {
        () = there => {}
        () = back => {}
    }
}

/// Certificates of this name by the authority of this folder.
#[expect(clippy::disallowed_methods, reason = "who checks them compares with the machine's clock")]
pub(crate) fn tls_of(dir: &Path, name: &str) -> Arc<rustls::ServerConfig> {
    let names = vec![TlsName::parse(name).unwrap()];
    let source = TlsSource::Auto { dir: dir.to_owned(), names, ca_out: None };
    ServerTls::new(source, SystemTime::now()).unwrap().config()
}

/// A sidecar in front of a relay in front of a stand-in, with one charge made.
async fn behind(
    front: Front,
    ca: Option<&Path>,
) -> (Standin, Relay, Sidecar, String, String, tempfile::TempDir) {
    let standin = Standin::start(Options::default());
    let scheme = if matches!(front, Front::Tls(_)) { "https" } else { "http" };
    let relay = Relay::start(standin.addr(), front).await;
    let dir = tempfile::tempdir().unwrap();
    let mut env = environment(relay.address, dir.path());
    let mut set = |name: &str, value: String| env.insert(format!("KEYBRAKE_{name}"), value);
    set("STRIPE_API_BASE", format!("{scheme}://{}", relay.address));
    set("UPSTREAM_TIMEOUT_MS", "1000".to_owned());
    if let Some(ca) = ca {
        set("STRIPE_CA_FILE", ca.display().to_string());
    }
    let mut sidecar = Sidecar::spawn(env);
    sidecar.ready().await;
    let (key, id) = sidecar.mint("50.00", json!({})).await;
    assert_eq!(sidecar.charge(&key, "first", 100, "cus_1").await.status, 200);
    (standin, relay, sidecar, key, id, dir)
}

/// A call that cannot be sent is void, and is made once the way is clear.
async fn is_void(standin: &Standin, sidecar: &Sidecar, key: &str, id: &str, name: &str) {
    let (asked, before) = (standin.requests().len(), sidecar.spend(id).await);
    let reply = sidecar.charge(key, name, 100, "cus_1").await;
    assert_eq!(reply.verdict(), (502, "upstream_unreachable"), "{name}: {}", reply.text);
    assert_eq!(reply.header("keybrake-outcome"), None, "{name}");
    assert_eq!(sidecar.spend(id).await, before, "{name}: nothing is held");
    assert_eq!(standin.requests().len(), asked, "{name}: not a byte is shown to whoever answers there");
    assert_eq!(sidecar.readyz().await, 200);
}

#[tokio::test]
async fn whoever_cannot_prove_to_be_stripe_is_shown_nothing() {
    let (ours, theirs) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let good = tls_of(ours.path(), "127.0.0.1");
    let ca = ours.path().join("ca.pem");
    let (standin, relay, mut sidecar, key, id, _dir) = behind(Front::Tls(Arc::clone(&good)), Some(&ca)).await;
    let wrong = [
        ("of a foreign authority", Front::Tls(tls_of(theirs.path(), "127.0.0.1"))),
        ("of another name", Front::Tls(tls_of(ours.path(), "elsewhere.example"))),
        ("none, and no TLS at all", Front::Plain),
        ("never shown", Front::Silent),
    ];
    for (name, front) in wrong {
        relay.turn(front).await;
        is_void(&standin, &sidecar, &key, &id, name).await;
        relay.turn(Front::Tls(Arc::clone(&good))).await;
        let made = sidecar.charge(&key, name, 100, "cus_1").await;
        assert!(made.status == 200 && !is_replayed(&made), "{name}: {}", made.text);
    }
    assert_eq!(standin.executed().len(), 5);

    // A name that nobody knows: served from what the ledger knows of the account.
    assert!(sidecar.terminate().success());
    let mut env = sidecar.env().clone();
    env.insert("KEYBRAKE_STRIPE_API_BASE".to_owned(), "https://keybrake.invalid".to_owned());
    let mut nameless = Sidecar::spawn(env);
    nameless.ready().await;
    is_void(&standin, &nameless, &key, &id, "of no address").await;
    assert!(nameless.terminate().success());
    sidecar.restart().await;
    assert_eq!(sidecar.charge(&key, "of no address", 100, "cus_1").await.status, 200);
    assert_eq!(sidecar.spend(&id).await, money("6.00", "0.00", "0.00"));
    assert_eq!(standin.executed().len(), 6);
}

#[tokio::test]
async fn a_way_that_vanishes_leaves_a_doubt_and_never_a_second_charge() {
    let (standin, relay, sidecar, key, id, _dir) = behind(Front::Plain, None).await;
    // What is not told is asked for; here only callers may find out.
    nothing_is_found(&standin);
    // Each meets a connection that was used before.
    let ways = [
        ("the answer is lost", Line::Mute, 504, 1),
        ("the request is lost", Line::Dead, 504, 0),
        ("closed as it is written", Line::Closing, 502, 0),
    ];
    let mut made = 1;
    for (name, line, status, executed) in ways {
        relay.line.send_replace(line);
        let seen = posts(&standin);
        let lost = sidecar.charge(&key, name, 100, "cus_1").await;
        assert_eq!(lost.verdict(), (status, "outcome_unknown"), "{name}: {}", lost.text);
        assert_eq!(lost.header("keybrake-outcome"), Some("doubt"), "{name}");
        assert_eq!(posts(&standin) - seen, executed, "{name}: sent once, or lost on the way");
        assert_eq!(sidecar.spend(&id).await, money(&format!("{made}.00"), "1.00", "1.00"), "{name}");
        relay.line.send_replace(Line::Open);
        let again = sidecar.charge(&key, name, 100, "cus_1").await;
        assert_eq!(again.status, 200, "{name}: {}", again.text);
        made += 1;
        assert_eq!(standin.executed().len(), made, "{name}");
        assert_eq!(sidecar.spend(&id).await, money(&format!("{made}.00"), "0.00", "0.00"), "{name}");
    }
    // Closed while it lay idle: that costs nothing.
    relay.turn(Front::Plain).await;
    assert_eq!(sidecar.charge(&key, "idle", 100, "cus_1").await.status, 200);
}

fn posts(standin: &Standin) -> usize {
    standin.requests().iter().filter(|seen| seen.method == "POST").count()
}

#[tokio::test]
async fn a_caller_that_vanishes_half_way_asked_for_nothing() {
    let (standin, sidecar) = world().await;
    let (key, id) = sidecar.mint("50.00", json!({})).await;
    let address = sidecar.base.strip_prefix("http://").unwrap();
    let body = "amount=100&currency=usd&customer=cus_1&source=tok_visa";
    let request = format!(
        "POST /v1/charges HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {key}\r\nidempotency-key: k\r\n\
         content-type: application/x-www-form-urlencoded\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    let head = request.len() - body.len();
    let mut silent = Vec::new();
    for cut in [10, head - 2, head, head + 20, request.len() - 1] {
        for ends in ["silence", "close", "reset"] {
            let mut stream = TcpStream::connect(address).await.unwrap();
            stream.write_all(&request.as_bytes()[..cut]).await.unwrap();
            match ends {
                "silence" => silent.push(stream),
                "reset" => stream.set_zero_linger().unwrap(),
                _ => stream.shutdown().await.unwrap(),
            }
        }
    }
    assert_eq!(sidecar.charge(&key, "other", 100, "cus_1").await.status, 200);
    assert_eq!(posts(&standin), 1, "half a request is none");
    assert_eq!(sidecar.spend(&id).await, money("1.00", "0.00", "0.00"));

    // Whoever said all of it has asked, and may ask again for what came of it.
    standin.fault(Fault::Hold);
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    standin.until_held(1).await;
    stream.set_zero_linger().unwrap();
    drop(stream);
    standin.release();
    let again = sidecar.charge(&key, "k", 100, "cus_1").await;
    assert!(is_replayed(&again), "{}", again.text);
    assert_eq!(standin.executed().len(), 2);
    assert_eq!(sidecar.spend(&id).await, money("2.00", "0.00", "0.00"));
    drop(silent);
}
