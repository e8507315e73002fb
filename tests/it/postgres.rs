//! A real PostgreSQL for the tests, and what the program asks of one.
//!
//! One server per test process, with a schema for each test; or the one that `KEYBRAKE_TEST_POSTGRES_URL` names (a
//! superuser's URL). Where there is none, tests that need it do not run and say so; with `KEYBRAKE_TEST_POSTGRES=required`
//! they fail.

use std::fs::{self, Permissions};
use std::io::Write as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, Once, OnceLock};

use keybrake::postgres::{self, Connection, DatabaseError, Target};
use keybrake::tls;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use tokio::time::{Duration, Instant, sleep, timeout};
use tokio_postgres::SimpleQueryMessage;

use crate::fleet::proxy::Proxy;
use crate::support::{PATIENCE, free_port};

const USER: &str = "keybrake";
const PASSWORD: &str = "password-of-the-tests";

/// Runs a server, and ends it with whoever holds the other end of its standard input, however that one ends. A word on it
/// ends the server alone; the end of it takes the directory along.
const KEEPER: &str = r#"
dir=$1; shift
"$@" >>"$dir/log" 2>&1 </dev/null & server=$!
if read -r word; then gone=; else gone=yes; fi
kill -QUIT "$server"
wait "$server"
if [ "$gone" ]; then rm -rf "$dir"; fi
"#;

/// A PostgreSQL for tests.
pub(crate) struct Server {
    /// `postgres://user:password@host:port/database`.
    url: String,
    /// `None` for a server of somebody else's.
    own: Option<Own>,
}

/// A server that these tests started.
struct Own {
    bin: PathBuf,
    dir: PathBuf,
    port: u16,
    /// As whom it runs, where these tests are root.
    user: Option<(u32, u32)>,
    keeper: Mutex<Option<(Child, ChildStdin)>>,
}

/// The server of this test process; `None` where there is none, which is told.
pub(crate) fn server() -> Option<&'static Server> {
    static SERVER: OnceLock<Option<Server>> = OnceLock::new();
    let found = SERVER.get_or_init(|| match std::env::var_os("KEYBRAKE_TEST_POSTGRES_URL") {
        Some(url) if !url.is_empty() => {
            Some(Server { url: url.into_string().unwrap().trim_end_matches('/').to_owned(), own: None })
        }
        Some(_) | None => Server::found(),
    });
    found.as_ref()
}

impl Server {
    /// A server of its own, to be stopped and started; `None` where there is none, which is told.
    pub(crate) fn own() -> Option<Self> {
        Self::found()
    }

    fn found() -> Option<Self> {
        static TOLD: Once = Once::new();
        let bin = binaries();
        if bin.is_none() {
            let why = "no `postgres` and `initdb` in PATH or /usr/lib/postgresql/*/bin";
            let is_required =
                std::env::var_os("KEYBRAKE_TEST_POSTGRES").is_some_and(|value| value == "required");
            assert!(!is_required, "KEYBRAKE_TEST_POSTGRES=required, and there is {why}");
            // Past the capture of test output, which nobody sees of tests that pass.
            TOLD.call_once(|| {
                let told = format!(
                    "\n*** NOT RUN: all tests on PostgreSQL. There is {why}.\n*** Install PostgreSQL, or set \
                     KEYBRAKE_TEST_POSTGRES_URL.\n\n"
                );
                std::io::stderr().write_all(told.as_bytes()).unwrap();
            });
        }
        bin.map(Self::make)
    }

    fn make(bin: PathBuf) -> Self {
        let dir = tempfile::Builder::new().prefix("keybrake-postgres-").tempdir().unwrap().keep();
        let port = free_port();
        let own = Own { bin, port, user: other_user(), keeper: Mutex::new(None), dir };
        fs::write(own.dir.join("password"), PASSWORD).unwrap();
        certify(&own.dir);
        if let Some((uid, gid)) = own.user {
            for entry in fs::read_dir(&own.dir).unwrap() {
                chown(entry.unwrap().path(), Some(uid), Some(gid)).unwrap();
            }
            chown(&own.dir, Some(uid), Some(gid)).unwrap();
        }
        let mut initdb = own.command(&own.bin.join("initdb"));
        initdb.args([
            "--pgdata",
            "data",
            "--username",
            USER,
            "--pwfile",
            "password",
            "--auth",
            "scram-sha-256",
        ]);
        let made = initdb.args(["--locale", "C", "--encoding", "UTF8", "--no-sync"]).output().unwrap();
        assert!(made.status.success(), "initdb: {}", String::from_utf8_lossy(&made.stderr));
        let server =
            Self { url: format!("postgres://{USER}:{PASSWORD}@127.0.0.1:{port}/postgres"), own: Some(own) };
        server.start();
        server
    }

    /// A schema of a test's own.
    pub(crate) fn schema(&self, what: &str) -> Schema<'_> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let n = NEXT.fetch_add(1, Ordering::SeqCst);
        Schema { server: self, name: format!("t{}_{n}_{what}", std::process::id()) }
    }

    /// A schema that a test knows by its name already.
    pub(crate) fn schema_of(&self, name: &str) -> Schema<'_> {
        Schema { server: self, name: name.to_owned() }
    }

    /// The URL of its database, over TCP. What is kept where there is said beside it, by the name of a schema.
    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    /// The same over its unix socket.
    fn socket_url(&self) -> Option<String> {
        let Own { dir, port, .. } = self.own.as_ref()?;
        Some(format!("postgres://{USER}:{PASSWORD}@/postgres?host={}&port={port}", dir.display()))
    }

    /// The certificate of the authority that vouches for `localhost`.
    fn ca(&self) -> PathBuf {
        self.own.as_ref().unwrap().dir.join("ca.pem")
    }

    /// Ends it as `pg_ctl stop -m immediate` does: no goodbyes, and what is not committed is gone.
    pub(crate) fn stop_immediately(&self) {
        let own = self.own.as_ref().unwrap();
        let (mut keeper, mut word) = own.keeper.lock().unwrap().take().unwrap();
        word.write_all(b"stop\n").unwrap();
        keeper.wait().unwrap();
    }

    /// Starts it, on the same data and port.
    pub(crate) fn start(&self) {
        let own = self.own.as_ref().unwrap();
        let dir = own.dir.display().to_string();
        let mut keeper = own.command(Path::new("sh"));
        keeper.args(["-c", KEEPER, "keeper", &dir]).arg(own.bin.join("postgres")).args(["-D", "data"]);
        for setting in [
            format!("port={}", own.port),
            format!("unix_socket_directories={dir}"),
            "listen_addresses=127.0.0.1".to_owned(),
            "max_connections=200".to_owned(),
            // It outlives the end of its processes, which is all that it goes through here.
            "fsync=off".to_owned(),
            "ssl=on".to_owned(),
            format!("ssl_cert_file={dir}/cert.pem"),
            format!("ssl_key_file={dir}/key.pem"),
        ] {
            keeper.arg("-c").arg(setting);
        }
        let mut keeper = keeper.stdin(Stdio::piped()).spawn().unwrap();
        let word = keeper.stdin.take().unwrap();
        *own.keeper.lock().unwrap() = Some((keeper, word));
        let since = Instant::now();
        // Its eighth line says how it is.
        while !fs::read_to_string(own.dir.join("data/postmaster.pid"))
            .is_ok_and(|lines| lines.lines().nth(7).is_some_and(|state| state.trim() == "ready"))
        {
            let log = || fs::read_to_string(own.dir.join("log")).unwrap_or_default();
            assert!(since.elapsed() < PATIENCE, "PostgreSQL does not start:\n{}", log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Runs statements outside every schema of a test and gives the rows of all; a null is an empty text.
    pub(crate) async fn sql(&self, text: &str) -> Vec<Vec<String>> {
        self.schema("outside").sql(text).await
    }
}

impl Own {
    fn command(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        // Not ended by a ^C at the terminal before these tests are.
        command.current_dir(&self.dir).stdin(Stdio::null()).process_group(0);
        if let Some((uid, gid)) = self.user {
            command.uid(uid).gid(gid);
        }
        command
    }
}

impl Drop for Own {
    fn drop(&mut self) {
        if let Some((mut keeper, word)) = self.keeper.lock().unwrap().take() {
            drop(word);
            let _ = keeper.wait();
        }
        let _ = fs::remove_dir_all(&self.dir);
    }
}

/// A schema of one test, in which nobody else looks.
pub(crate) struct Schema<'a> {
    server: &'a Server,
    name: String,
}

impl Schema<'_> {
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn url(&self) -> &str {
        self.server.url()
    }

    pub(crate) fn target(&self) -> Target {
        Target::parse(&self.server.url, None, &self.name, tls::client_config(None).unwrap()).unwrap()
    }

    /// A session in it.
    pub(crate) async fn connect(&self) -> Connection {
        postgres::connect(&self.target()).await.unwrap()
    }

    /// Runs statements in it and gives the rows of all; a null is an empty text.
    pub(crate) async fn sql(&self, text: &str) -> Vec<Vec<String>> {
        let told = self.connect().await.simple_query(text).await.unwrap();
        let rows = told
            .into_iter()
            .filter_map(|message| if let SimpleQueryMessage::Row(row) = message { Some(row) } else { None });
        rows.map(|row| (0..row.len()).map(|at| row.get(at).unwrap_or_default().to_owned()).collect())
            .collect()
    }
}

impl Drop for Schema<'_> {
    /// A server of these tests goes whole; on another one nothing is left behind.
    fn drop(&mut self) {
        if self.server.own.is_some() {
            return;
        }
        let (target, name) = (self.target(), self.name.clone());
        let dropped = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async move {
                let session = postgres::connect(&target).await?;
                session.batch_execute(&format!("DROP SCHEMA IF EXISTS \"{name}\" CASCADE")).await?;
                Ok::<_, DatabaseError>(())
            })
        });
        let _ = dropped.join();
    }
}

/// Where `postgres` and `initdb` stand side by side, the newest first where the system keeps several.
fn binaries() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut folders: Vec<PathBuf> = std::env::split_paths(&path).collect();
    let version = |folder: &PathBuf| -> u32 {
        folder.file_name().and_then(|name| name.to_str()?.split('.').next()?.parse().ok()).unwrap_or(0)
    };
    for place in ["/usr/lib/postgresql", "/usr/local/lib/postgresql"] {
        let mut versions: Vec<PathBuf> =
            fs::read_dir(place).into_iter().flatten().map(|entry| entry.unwrap().path()).collect();
        versions.sort_by_key(|folder| std::cmp::Reverse(version(folder)));
        folders.extend(versions.into_iter().map(|folder| folder.join("bin")));
    }
    folders.extend(["/usr/local/bin", "/usr/local/pgsql/bin", "/opt/homebrew/bin"].map(PathBuf::from));
    folders.into_iter().find(|folder| ["postgres", "initdb"].iter().all(|name| folder.join(name).is_file()))
}

/// PostgreSQL does not run as root.
fn other_user() -> Option<(u32, u32)> {
    if fs::metadata("/proc/self").unwrap().uid() != 0 {
        return None;
    }
    let users = fs::read_to_string("/etc/passwd").unwrap();
    let ids = |name: &str| {
        let fields: Vec<&str> =
            users.lines().map(|line| line.split(':').collect::<Vec<_>>()).find(|all| all[0] == name)?;
        Some((fields[2].parse().unwrap(), fields[3].parse().unwrap()))
    };
    Some(ids("postgres").or_else(|| ids("nobody")).expect("root, and no other user to run PostgreSQL as"))
}

/// An authority, and a certificate for `localhost` and no address.
fn certify(dir: &Path) {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, "Authority of the tests");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    let key = KeyPair::generate().unwrap();
    let leaf = CertificateParams::new(["localhost".to_owned()]).unwrap().signed_by(&key, &authority).unwrap();
    fs::write(dir.join("ca.pem"), authority.pem()).unwrap();
    fs::write(dir.join("cert.pem"), leaf.pem()).unwrap();
    fs::write(dir.join("key.pem"), key.serialize_pem()).unwrap();
    fs::set_permissions(dir.join("key.pem"), Permissions::from_mode(0o600)).unwrap();
}

async fn one(session: &Connection, sql: &str) -> String {
    session.query_one(sql, &[]).await.unwrap().get(0)
}

#[tokio::test]
async fn every_session_has_bounds_and_is_durable() {
    let Some(server) = server() else { return };
    let schema = server.schema("bounds");
    let role = format!("{}_role", schema.name());
    schema
        .sql(&format!(
            "CREATE ROLE {role} LOGIN PASSWORD 'of-a-role'; ALTER ROLE {role} SET synchronous_commit TO off;
             ALTER ROLE {role} SET default_transaction_isolation TO serializable"
        ))
        .await;
    let address = server.url().rsplit_once('@').unwrap().1;
    let by_tcp = format!("postgres://{role}:of-a-role@{address}");
    let by_socket = server
        .socket_url()
        .map(|url| url.replace(&format!("{USER}:{PASSWORD}"), &format!("{role}:of-a-role")));
    for url in [Some(by_tcp), by_socket].into_iter().flatten() {
        let target = Target::parse(&url, None, schema.name(), tls::client_config(None).unwrap()).unwrap();
        let session = postgres::connect(&target).await.unwrap();
        for (setting, value) in [
            ("application_name", "keybrake"),
            ("search_path", schema.name()),
            ("synchronous_commit", "on"),
            ("default_transaction_isolation", "read committed"),
            ("statement_timeout", "10s"),
            ("lock_timeout", "5s"),
            ("idle_in_transaction_session_timeout", "10s"),
        ] {
            assert_eq!(one(&session, &format!("SHOW {setting}")).await, value, "{setting}");
        }
    }
    server.sql(&format!("DROP ROLE {role}")).await;
}

#[tokio::test]
async fn who_is_not_let_in_is_told_why_and_no_password() {
    let Some(server) = server() else { return };
    let schema = server.schema("refused");
    let (credentials, address) = server.url().rsplit_once('@').unwrap();
    let user = credentials.strip_prefix("postgres://").unwrap().split(':').next().unwrap();
    let at = |url: &str| Target::parse(url, None, schema.name(), tls::client_config(None).unwrap()).unwrap();
    let wrong = postgres::connect(&at(&format!("postgres://{user}:HUSH@{address}"))).await.unwrap_err();
    assert!(matches!(&wrong, DatabaseError::Refused(_)), "{wrong}");
    assert!(wrong.to_string().contains("password authentication failed"), "{wrong}");
    assert!(!format!("{wrong} {wrong:?}").contains("HUSH"), "{wrong:?}");
    let nowhere = format!("{}/nowhere", server.url().rsplit_once('/').unwrap().0);
    let none = postgres::connect(&at(&nowhere)).await.unwrap_err();
    assert!(matches!(&none, DatabaseError::Refused(told) if told.contains("nowhere")), "{none}");
    let port = free_port();
    let down = postgres::connect(&at(&format!("postgres://u:HUSH@127.0.0.1:{port}/x"))).await.unwrap_err();
    assert!(matches!(&down, DatabaseError::Unavailable(told) if told.contains("refused")), "{down}");
    // A server that can only be read is none.
    let role = format!("{}_reader", schema.name());
    let made = format!(
        "CREATE ROLE {role} LOGIN PASSWORD 'x'; ALTER ROLE {role} SET default_transaction_read_only TO on"
    );
    server.sql(&made).await;
    let reads = postgres::connect(&at(&format!("postgres://{role}:x@{address}"))).await.unwrap_err();
    assert!(
        matches!(&reads, DatabaseError::Unavailable(told) if told.contains("does not allow writes")),
        "{reads}"
    );
    server.sql(&format!("DROP ROLE {role}")).await;
}

#[tokio::test]
async fn a_certificate_is_verified_with_its_name() {
    let Some(server) = Server::own() else { return };
    let port = server.own.as_ref().unwrap().port;
    let foreign = tempfile::tempdir().unwrap();
    certify(foreign.path());
    let (own, foreign) = (server.ca(), foreign.path().join("ca.pem"));
    let connect = async |host: &str, ca: Option<&Path>| {
        let url = format!("postgres://{USER}:{PASSWORD}@{host}:{port}/postgres?sslmode=require");
        let target = Target::parse(&url, None, "s", tls::client_config(ca).unwrap()).unwrap();
        assert!(target.is_encrypted());
        postgres::connect(&target).await
    };
    let session = connect("localhost", Some(&own)).await.unwrap();
    let how = "SELECT ssl::text || ' ' || version FROM pg_stat_ssl WHERE pid = pg_backend_pid()";
    assert_eq!(one(&session, how).await, "true TLSv1.3");
    for (host, ca, why) in [
        // Of the same name, with another key.
        ("localhost", Some(&foreign), "BadSignature"),
        ("localhost", None, "UnknownIssuer"),
        ("127.0.0.1", Some(&own), "not valid for name"),
    ] {
        let refused = connect(host, ca.map(PathBuf::as_path)).await.unwrap_err();
        assert!(
            matches!(&refused, DatabaseError::Unavailable(told) if told.contains(why)),
            "{host}: {refused}"
        );
    }
}

const STEPS: [&str; 2] = [
    "CREATE TABLE things (id int PRIMARY KEY); SELECT pg_sleep(0.2)",
    "CREATE TABLE more (); INSERT INTO things VALUES (1)",
];

#[tokio::test]
async fn a_schema_is_brought_forward_once() {
    let Some(server) = server() else { return };
    let schema = server.schema("forward");
    let (mut one, mut other) = tokio::join!(schema.connect(), schema.connect());
    let (mut third, name) = (schema.connect().await, schema.name());
    let all = tokio::join!(
        postgres::migrate(&mut one, name, &STEPS),
        postgres::migrate(&mut other, name, &STEPS),
        postgres::migrate(&mut third, name, &STEPS[..1]),
    );
    assert_eq!((all.0, all.1), (Ok(2), Ok(2)));
    // An older build at the same time: the version of its own, or too late for that.
    assert!(matches!(all.2, Ok(1) | Err(DatabaseError::Newer { found: 2, known: 1, .. })), "{:?}", all.2);
    assert_eq!(postgres::migrate(&mut one, name, &STEPS).await, Ok(2), "again, there is nothing to do");
    assert_eq!(schema.sql("SELECT id FROM things").await, [["1"]], "each step was made once");
    let refused = postgres::migrate(&mut one, name, &STEPS[..1]).await.unwrap_err();
    assert!(matches!(refused, DatabaseError::Newer { found: 2, known: 1, .. }), "{refused}");
    assert_eq!(postgres::migrate(&mut one, name, &STEPS).await, Ok(2), "the session is still of use");
}

#[tokio::test]
async fn who_has_nothing_to_make_waits_for_nobody() {
    let Some(server) = server() else { return };
    let schema = server.schema("nothing");
    let (mut session, holder) = tokio::join!(schema.connect(), schema.connect());
    postgres::migrate(&mut session, schema.name(), &STEPS[..1]).await.unwrap();
    // As another process does while it makes a step.
    holder.batch_execute("BEGIN; SELECT 1 FROM migrations FOR UPDATE").await.unwrap();
    let at_once = postgres::migrate(&mut session, schema.name(), &STEPS[..1]);
    assert_eq!(timeout(PATIENCE, at_once).await, Ok(Ok(1)));
    let waits = timeout(Duration::from_secs(1), postgres::migrate(&mut session, schema.name(), &STEPS));
    waits.await.unwrap_err();
    holder.batch_execute("COMMIT").await.unwrap();
    assert_eq!(postgres::migrate(&mut *schema.connect().await, schema.name(), &STEPS).await, Ok(2));
}

/// Nothing is cut, and nothing comes.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_says_nothing_is_not_waited_for_for_ever() {
    let Some(server) = server() else { return };
    let (proxy, schema) = (Proxy::before(server.url()).await, server.schema("silent"));
    let trust = tls::client_config(None).unwrap();
    let target = Target::parse(&proxy.url(server.url()), None, schema.name(), trust).unwrap();
    let mut session = postgres::connect(&target).await.unwrap();
    proxy.hang();
    let given_up = timeout(PATIENCE, postgres::migrate(&mut session, schema.name(), &STEPS)).await.unwrap();
    assert!(
        matches!(&given_up, Err(DatabaseError::Unavailable(told)) if told.contains("no answer")),
        "{given_up:?}"
    );
}

#[tokio::test]
async fn a_step_that_fails_leaves_nothing() {
    let Some(server) = server() else { return };
    let schema = server.schema("fails");
    let mut session = schema.connect().await;
    let steps = [STEPS[0], "CREATE TABLE half (); SELECT 1 / 0"];
    let failed = postgres::migrate(&mut session, schema.name(), &steps).await.unwrap_err();
    assert!(matches!(&failed, DatabaseError::Failed { code, .. } if code == "22012"), "{failed}");
    assert_eq!(postgres::migrate(&mut session, schema.name(), &STEPS[..1]).await, Ok(1));
    assert_eq!(schema.sql("SELECT to_regclass('half')").await, [[""]]);
}

/// What a role finds made for it, it uses, though it may make nothing itself.
#[tokio::test]
async fn a_role_that_may_make_nothing_finds_what_was_made() {
    let Some(server) = server() else { return };
    let schema = server.schema("made");
    let (name, role) = (schema.name(), format!("{}_role", schema.name()));
    postgres::migrate(&mut *schema.connect().await, name, &STEPS).await.unwrap();
    let grants = format!(
        "CREATE ROLE {role} LOGIN PASSWORD 'x'; GRANT USAGE ON SCHEMA {name} TO {role};
         GRANT SELECT, UPDATE ON ALL TABLES IN SCHEMA {name} TO {role}"
    );
    server.sql(&grants).await;
    let url = format!("postgres://{role}:x@{}", server.url().rsplit_once('@').unwrap().1);
    let at = |schema: &str| Target::parse(&url, None, schema, tls::client_config(None).unwrap()).unwrap();
    let mut session = postgres::connect(&at(name)).await.unwrap();
    assert_eq!(postgres::migrate(&mut session, name, &STEPS).await, Ok(2));
    let none = postgres::migrate(&mut session, "made_by_nobody", &STEPS).await.unwrap_err();
    assert!(matches!(&none, DatabaseError::Refused(told) if told.contains("permission denied")), "{none}");
    server.sql(&format!("DROP OWNED BY {role}; DROP ROLE {role}")).await;
}

#[tokio::test]
async fn a_server_that_was_stopped_is_found_again_with_what_it_had() {
    let Some(server) = Server::own() else { return };
    let schema = server.schema("stopped");
    let mut session = schema.connect().await;
    postgres::migrate(&mut session, schema.name(), &STEPS).await.unwrap();
    session.batch_execute("INSERT INTO things VALUES (2)").await.unwrap();
    session.batch_execute("BEGIN; INSERT INTO things VALUES (3)").await.unwrap();
    server.stop_immediately();
    let lost = session.batch_execute("COMMIT").await.map_err(DatabaseError::from).unwrap_err();
    assert!(matches!(lost, DatabaseError::Unavailable(_)), "{lost}");
    let away = postgres::connect(&schema.target()).await.unwrap_err();
    assert!(matches!(away, DatabaseError::Unavailable(_)), "{away}");
    server.start();
    assert_eq!(schema.sql("SELECT id FROM things ORDER BY id").await, [["1"], ["2"]]);
    assert!(session.is_closed());
}

/// Who waits for a lock of a session that is gone does not wait for long.
#[tokio::test]
async fn a_session_that_is_dropped_lets_go_of_its_locks() {
    let Some(server) = server() else { return };
    let schema = server.schema("dropped");
    let (mut holder, waiter) = tokio::join!(schema.connect(), schema.connect());
    postgres::migrate(&mut holder, schema.name(), &STEPS).await.unwrap();
    holder.batch_execute("BEGIN; UPDATE things SET id = 9").await.unwrap();
    let waits = tokio::spawn(async move { waiter.batch_execute("UPDATE things SET id = 5").await });
    let since = Instant::now();
    while schema.sql("SELECT 1 FROM pg_locks WHERE NOT granted").await.is_empty() {
        assert!(since.elapsed() < PATIENCE, "nobody waits");
        sleep(Duration::from_millis(10)).await;
    }
    drop(holder);
    waits.await.unwrap().unwrap();
    assert_eq!(schema.sql("SELECT id FROM things").await, [["5"]]);
}
