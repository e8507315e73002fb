//! PostgreSQL: what a URL means, a connection, and the making of a schema. Nothing of what is kept in it.
//!
//! Owns: the rules for `postgres://…`, TLS towards the server, the settings of every session, the table `migrations` of
//! each schema.
//!
//! Invariants:
//! - Towards another machine a connection is encrypted and the certificate verified, its name included, unless the URL
//!   says `sslmode=disable` in so many words.
//! - Every wait is bounded, on both sides: a session that was lost holds its locks for ten seconds.
//! - What is committed is on the server's disk: `synchronous_commit=off` of a role or a database is overruled.
//! - A schema is changed by one process at a time, and never by one that is older than the schema.
//!
//! Never: shows a password, in an error, a log line or `Debug`; uses advisory locks, which servers of the same wire
//! protocol lack; sends anything twice.

use std::fmt::{self, Write as _};
use std::future::Future;
use std::io;
use std::net::IpAddr;
use std::ops::{Deref, DerefMut};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::task::AbortHandle;
use tokio_postgres::config::{Host, SslMode, TargetSessionAttrs};
use tokio_postgres::error::SqlState;
use tokio_postgres::tls::{ChannelBinding, MakeTlsConnect, TlsConnect, TlsStream};
use tokio_postgres::{Client, Config};
use tokio_rustls::TlsConnector;

use crate::secret::Secret;

/// The whole way to a session that can be used: names, sockets, TLS, password, settings.
const CONNECT_MS: u64 = 10_000;
/// One of several addresses.
const ADDRESS_MS: u64 = 3_000;
/// A statement that takes longer is cancelled by the server.
const STATEMENT_MS: u64 = 10_000;
/// A statement that waits longer for a lock fails.
const LOCK_MS: u64 = 5_000;
/// A session that is silent within a transaction for longer is ended by the server, and its locks with it.
const IDLE_IN_TRANSACTION_MS: u64 = 10_000;
/// A peer that acknowledges nothing for so long is gone.
const SILENCE_MS: u64 = 15_000;
/// When an idle connection is probed, how often, and how often before it is given up.
const PROBE_AFTER_MS: u64 = 10_000;
const PROBE_EVERY_MS: u64 = 5_000;
const PROBES: u32 = 3;
/// What an answer may take that waits for nobody else.
const ANSWER_MS: u64 = 8_000;
/// What a step of [`migrate`] may take, waiting for another process included.
const MIGRATE_MS: u64 = 60_000;
/// Processes that make a schema at the same moment stumble over each other this often at most.
const MAKE_TRIES: usize = 5;
/// Longest name of a schema, as PostgreSQL has it.
const SCHEMA_CHARS_MAX: usize = 63;

/// Parameters of a URL that mean something here. Others are refused: one that is not obeyed must not seem to be.
const PARAMETERS: &[&str] = &[
    "host",
    "port",
    "user",
    "password",
    "dbname",
    "sslmode",
    "sslnegotiation",
    "application_name",
    "connect_timeout",
    "target_session_attrs",
    "load_balance_hosts",
    "options",
];

/// Why a URL or what belongs to it cannot be used. No message holds a part of the URL: it may hold a password.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TargetError {
    /// The URL is none.
    #[error(
        "must be a URL such as postgres://user@host:5432/database (in a password, %-encode @ / : ? and &)"
    )]
    Malformed,
    /// It names no server.
    #[error(
        "names no host: postgres://user@host/database, or postgres://user@/database?host=/run/postgresql"
    )]
    NoHost,
    /// It names no user.
    #[error("names no user: postgres://user@host/database")]
    NoUser,
    /// Unix sockets and hosts in one list.
    #[error("names unix sockets and hosts together: name either")]
    MixedHosts,
    /// A parameter that is not known here.
    #[error("has a parameter that means nothing here; known are {}", PARAMETERS.join(", "))]
    UnknownParameter,
    /// Trust anchors are given otherwise.
    #[error(
        "has sslrootcert, sslcert or sslkey: name the trust anchor by the setting that ends in _CA_FILE instead"
    )]
    TrustInUrl,
    /// `sslmode` is none.
    #[error("has an sslmode that is none of disable, allow, prefer, require, verify-ca, verify-full")]
    SslMode,
    /// TLS over a unix socket.
    #[error("wants TLS on a unix socket, where there is none")]
    TlsOnSocket,
    /// There are two passwords.
    #[error("holds a password, and another one is set beside it: set one of the two")]
    TwoPasswords,
    /// The schema's name.
    #[error("the name of a schema is 1 to 63 of a-z, 0-9 and _, and does not begin with a digit or pg_")]
    Schema,
}

/// A database and the schema in it, checked.
#[derive(Clone)]
pub struct Target {
    config: Config,
    schema: String,
    trust: Arc<ClientConfig>,
}

impl Target {
    /// Reads a URL. `password` stands beside it where it holds none; `trust` says whose certificates are believed.
    ///
    /// # Errors
    /// [`TargetError`].
    pub fn parse(
        url: &str,
        password: Option<&Secret>,
        schema: &str,
        trust: ClientConfig,
    ) -> Result<Self, TargetError> {
        let (url, mode) = without_sslmode(url)?;
        let mut config: Config = url.parse().map_err(|_| TargetError::Malformed)?;
        is_schema(schema)?;
        if config.get_hosts().is_empty() {
            return Err(TargetError::NoHost);
        }
        if config.get_user().is_none_or(str::is_empty) {
            return Err(TargetError::NoUser);
        }
        config.ssl_mode(tls_towards(config.get_hosts(), mode)?);
        match (password, config.get_password()) {
            (Some(_), Some(_)) => return Err(TargetError::TwoPasswords),
            (Some(password), None) => drop(config.password(password.expose())),
            (None, _) => {}
        }
        if config.get_application_name().is_none() {
            config.application_name("keybrake");
        }
        if config.get_connect_timeout().is_none() {
            config.connect_timeout(Duration::from_millis(ADDRESS_MS));
        }
        // Of several servers the one that can be written to; a replica of the only one is as good as none.
        config.target_session_attrs(TargetSessionAttrs::ReadWrite);
        config.keepalives_idle(Duration::from_millis(PROBE_AFTER_MS));
        config.keepalives_interval(Duration::from_millis(PROBE_EVERY_MS));
        config.keepalives_retries(PROBES);
        config.tcp_user_timeout(Duration::from_millis(SILENCE_MS));
        let mut trust = trust;
        // A server that looks at it takes no other.
        trust.alpn_protocols = vec![b"postgresql".to_vec()];
        Ok(Self { config, schema: schema.to_owned(), trust: Arc::new(trust) })
    }

    /// The schema.
    pub fn schema(&self) -> &str {
        &self.schema
    }

    /// Whether what is sent is encrypted.
    pub fn is_encrypted(&self) -> bool {
        self.config.get_ssl_mode() == SslMode::Require
    }

    /// Where it is, for people: hosts, database and schema.
    pub fn place(&self) -> String {
        let mut place = String::new();
        for (at, host) in self.config.get_hosts().iter().enumerate() {
            let comma = if at == 0 { "" } else { "," };
            let port = self.config.get_ports().get(at).or(self.config.get_ports().first()).unwrap_or(&5432);
            // Writing to a string cannot fail.
            let _ = match host {
                Host::Tcp(host) => write!(place, "{comma}{host}:{port}"),
                Host::Unix(path) => write!(place, "{comma}{}:{port}", path.display()),
            };
        }
        let database = self.config.get_dbname().or(self.config.get_user()).unwrap_or_default();
        let _ = write!(place, "/{database}, schema {}", self.schema);
        place
    }
}

impl fmt::Debug for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Target").field("place", &self.place()).finish_non_exhaustive()
    }
}

/// Whether a schema may have this name.
///
/// # Errors
/// [`TargetError::Schema`].
pub fn is_schema(name: &str) -> Result<(), TargetError> {
    let is_one = name.len() <= SCHEMA_CHARS_MAX
        && name.starts_with(|first: char| first.is_ascii_lowercase() || first == '_')
        && name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_')
        && !name.starts_with("pg_");
    is_one.then_some(()).ok_or(TargetError::Schema)
}

/// The modes that a URL may name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Disable,
    /// Nothing is said, or nothing of weight.
    Prefer,
    Require,
}

/// The URL without `sslmode`, of which the driver knows half, and what it said.
fn without_sslmode(url: &str) -> Result<(String, Mode), TargetError> {
    let scheme = ["postgres://", "postgresql://"].into_iter().find(|scheme| url.starts_with(scheme));
    let rest = &url[scheme.ok_or(TargetError::Malformed)?.len()..];
    let after_credentials = rest.find('@').map_or(0, |at| at + 1);
    // A second one is a piece of a password that was not encoded, and would be taken for a host.
    if rest[after_credentials..].contains('@') {
        return Err(TargetError::Malformed);
    }
    let Some(at) = rest[after_credentials..].find('?') else { return Ok((url.to_owned(), Mode::Prefer)) };
    let at = url.len() - rest.len() + after_credentials + at;
    let (mut mode, mut kept) = (Mode::Prefer, Vec::new());
    for parameter in url[at + 1..].split('&').filter(|parameter| !parameter.is_empty()) {
        let (name, value) = parameter.split_once('=').ok_or(TargetError::Malformed)?;
        match name {
            "sslmode" => {
                mode = match value {
                    "disable" => Mode::Disable,
                    "allow" | "prefer" => Mode::Prefer,
                    "require" | "verify-ca" | "verify-full" => Mode::Require,
                    _ => return Err(TargetError::SslMode),
                }
            }
            "sslrootcert" | "sslcert" | "sslkey" => return Err(TargetError::TrustInUrl),
            name if PARAMETERS.contains(&name) => kept.push(parameter),
            _ => return Err(TargetError::UnknownParameter),
        }
    }
    Ok((format!("{}?{}", &url[..at], kept.join("&")), mode))
}

/// Plain towards this machine, unless TLS is asked for; TLS towards others, unless that is declined in so many words.
fn tls_towards(hosts: &[Host], mode: Mode) -> Result<SslMode, TargetError> {
    let sockets = hosts.iter().filter(|host| matches!(host, Host::Unix(_))).count();
    if sockets > 0 && sockets < hosts.len() {
        return Err(TargetError::MixedHosts);
    }
    let is_here = |host: &Host| match host {
        Host::Unix(_) => true,
        Host::Tcp(name) => {
            name.eq_ignore_ascii_case("localhost")
                || name.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
        }
    };
    match mode {
        Mode::Require if sockets > 0 => Err(TargetError::TlsOnSocket),
        Mode::Disable => Ok(SslMode::Disable),
        Mode::Prefer if hosts.iter().all(is_here) => Ok(SslMode::Disable),
        Mode::Require | Mode::Prefer => Ok(SslMode::Require),
    }
}

/// Why the database gave no answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DatabaseError {
    /// It is not there, not for us, or not for writing just now. After a COMMIT was sent: nobody knows whether it holds.
    #[error("the database cannot be used: {0}")]
    Unavailable(String),
    /// It does not let us in, or not do what we must.
    #[error("the database refuses this user: {0}")]
    Refused(String),
    /// It says no to a statement: none of its transaction holds.
    #[error("the database says: {message} ({code})")]
    Failed {
        /// SQLSTATE.
        code: String,
        /// Its message, which names tables and never values.
        message: String,
    },
    /// The schema was made by a later build.
    #[error(
        "the schema {schema} is of version {found}, and this build knows it up to version {known}: a newer build of \
         this program has used it, use that"
    )]
    Newer {
        /// Which one.
        schema: String,
        /// Its version.
        found: i32,
        /// The last one that this build knows.
        known: i32,
    },
}

impl DatabaseError {
    /// Whether the same transaction may hold when it is run again: it stood in the way of another one.
    pub fn may_run_again(&self) -> bool {
        self.is_of(&[SqlState::T_R_SERIALIZATION_FAILURE, SqlState::T_R_DEADLOCK_DETECTED])
    }

    fn is_of(&self, states: &[SqlState]) -> bool {
        let Self::Failed { code, .. } = self else { return false };
        states.iter().any(|state| state.code() == code)
    }
}

impl From<tokio_postgres::Error> for DatabaseError {
    fn from(error: tokio_postgres::Error) -> Self {
        let Some(told) = error.as_db_error() else { return Self::Unavailable(chain_of(&error)) };
        let (code, message) = (told.code().code(), told.message().to_owned());
        match code {
            // Nobody can say whether the transaction holds: a connection that broke, a server that goes or comes, one
            // that was demoted, and two codes that say just that. One that is too slow for our bounds is as good as away.
            "08007" | "40003" | "25006" | "55P03" | "57014" => Self::Unavailable(message),
            _ if ["08", "53", "57P", "58"].iter().any(|class| code.starts_with(class)) => {
                Self::Unavailable(message)
            }
            "3D000" | "42501" => Self::Refused(message),
            _ if code.starts_with("28") => Self::Refused(message),
            _ => Self::Failed { code: code.to_owned(), message },
        }
    }
}

/// An error and what it comes from: the driver's own words alone say little.
fn chain_of(error: &dyn std::error::Error) -> String {
    let mut told = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        // Writing to a string cannot fail.
        let _ = write!(told, ": {cause}");
        source = cause.source();
    }
    told
}

/// A session. Dropped, it ends at once, and the server rolls back what it was doing.
#[derive(Debug)]
pub struct Connection {
    client: Client,
    task: AbortHandle,
}

impl Deref for Connection {
    type Target = Client;

    fn deref(&self) -> &Client {
        &self.client
    }
}

impl DerefMut for Connection {
    fn deref_mut(&mut self) -> &mut Client {
        &mut self.client
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Opens a session whose unqualified names are those of the target's schema, which need not exist yet.
///
/// # Errors
/// [`DatabaseError`], after ten seconds at the latest.
pub async fn connect(target: &Target) -> Result<Connection, DatabaseError> {
    let late = |_| DatabaseError::Unavailable(format!("no session within {CONNECT_MS} ms"));
    tokio::time::timeout(Duration::from_millis(CONNECT_MS), open(target)).await.map_err(late)?
}

async fn open(target: &Target) -> Result<Connection, DatabaseError> {
    let (client, connection) = target.config.connect(Tls(Arc::clone(&target.trust))).await?;
    let task = tokio::spawn(async move {
        // Whoever uses the session is told of its end by it.
        if let Err(error) = connection.await {
            tracing::debug!(error = chain_of(&error), "a connection to the database broke");
        }
    });
    let session = Connection { client, task: task.abort_handle() };
    session
        .batch_execute(&format!(
            "SET search_path TO \"{}\"; SET statement_timeout TO {STATEMENT_MS}; SET lock_timeout TO {LOCK_MS};
             SET idle_in_transaction_session_timeout TO {IDLE_IN_TRANSACTION_MS};
             SET default_transaction_isolation TO 'read committed';
             SELECT set_config('synchronous_commit', 'on', false)
             WHERE current_setting('synchronous_commit') = 'off'",
            target.schema
        ))
        .await?;
    Ok(session)
}

/// Brings a schema to the last of these versions: the first step makes version 1 of an empty schema, each next one the
/// next. A step is SQL whose unqualified names are the schema's; it holds as a whole or not at all. Of processes that come
/// at the same time one applies it, and the others wait. Answers the version that the schema then has.
///
/// # Errors
/// [`DatabaseError::Newer`] where a later build was here, and whatever the database fails with.
pub async fn migrate(client: &mut Client, schema: &str, steps: &[&str]) -> Result<i32, DatabaseError> {
    let known = i32::try_from(steps.len()).unwrap_or(i32::MAX);
    let version_in = format!("SELECT version FROM \"{schema}\".migrations");
    let mut tries = 0;
    // Looked at before it is made: a role that may not make anything can use what was made for it. And before it is locked:
    // whoever has nothing to make waits for nobody.
    let mut found: i32 = loop {
        let looked = within(ANSWER_MS, async { Ok(client.query_opt(&version_in, &[]).await?) }).await;
        match looked {
            Ok(Some(row)) => break row.try_get(0)?,
            Err(error) if tries == MAKE_TRIES || !error.is_of(&MISSING) => return Err(error),
            Ok(None) if tries == MAKE_TRIES => {
                return Err(DatabaseError::Unavailable(format!("the schema {schema} cannot be made")));
            }
            Ok(None) | Err(_) => within(ANSWER_MS, make(client, schema)).await?,
        }
        tries += 1;
    };
    while found < known {
        // The server ends what takes longer than a step may; one that says nothing ends nothing.
        found = within(MIGRATE_MS + ANSWER_MS, step_on(client, schema, steps)).await?;
    }
    if found > known {
        return Err(DatabaseError::Newer { schema: schema.to_owned(), found, known });
    }
    Ok(found)
}

/// Makes the next version, where it is the first to come. Answers the one that there is then.
async fn step_on(client: &mut Client, schema: &str, steps: &[&str]) -> Result<i32, DatabaseError> {
    let txn = client.transaction().await?;
    txn.batch_execute(&format!(
        "SET LOCAL search_path TO \"{schema}\"; SET LOCAL lock_timeout TO {MIGRATE_MS};
         SET LOCAL statement_timeout TO {MIGRATE_MS}"
    ))
    .await?;
    let row = txn.query_one("SELECT version FROM migrations WHERE id = 1 FOR UPDATE", &[]).await?;
    let found: i32 = row.try_get(0)?;
    let Some(step) = usize::try_from(found).ok().and_then(|at| steps.get(at)) else {
        txn.rollback().await?;
        return Ok(found);
    };
    txn.batch_execute(step).await?;
    txn.execute("UPDATE migrations SET version = $1 WHERE id = 1", &[&(found + 1)]).await?;
    txn.commit().await?;
    tracing::info!(schema, version = found + 1, "the schema of the database was brought forward");
    Ok(found + 1)
}

/// A peer that acknowledges all and says nothing would be waited for for ever.
async fn within<T>(
    millis: u64,
    asked: impl Future<Output = Result<T, DatabaseError>>,
) -> Result<T, DatabaseError> {
    let late = |_| DatabaseError::Unavailable("it gives no answer".to_owned());
    tokio::time::timeout(Duration::from_millis(millis), asked).await.map_err(late)?
}

const MISSING: [SqlState; 2] = [SqlState::UNDEFINED_TABLE, SqlState::INVALID_SCHEMA_NAME];

/// The schema and its table of versions, empty.
async fn make(client: &mut Client, schema: &str) -> Result<(), DatabaseError> {
    let made = client
        .batch_execute(&format!(
            "CREATE SCHEMA IF NOT EXISTS \"{schema}\";
             CREATE TABLE IF NOT EXISTS \"{schema}\".migrations (id int PRIMARY KEY, version int NOT NULL);
             INSERT INTO \"{schema}\".migrations VALUES (1, 0) ON CONFLICT DO NOTHING"
        ))
        .await
        .map_err(DatabaseError::from);
    let stumbled = [
        SqlState::UNIQUE_VIOLATION,
        SqlState::DUPLICATE_SCHEMA,
        SqlState::DUPLICATE_TABLE,
        SqlState::DUPLICATE_OBJECT,
    ];
    match made {
        // Another process made the same at the same moment; the catalogue's own indexes say so.
        Err(error) if error.is_of(&stumbled) || error.may_run_again() => Ok(()),
        other => other,
    }
}

/// TLS by the library that everything else here uses.
struct Tls(Arc<ClientConfig>);

impl<S: AsyncRead + AsyncWrite + Unpin + Send + 'static> MakeTlsConnect<S> for Tls {
    type Stream = Encrypted<S>;
    type TlsConnect = TlsTo;
    type Error = rustls::pki_types::InvalidDnsNameError;

    fn make_tls_connect(&mut self, host: &str) -> Result<TlsTo, Self::Error> {
        // Asked for unix sockets too, which have no name and no TLS.
        let name = if host.is_empty() { None } else { Some(ServerName::try_from(host)?.to_owned()) };
        Ok(TlsTo { config: Arc::clone(&self.0), name })
    }
}

struct TlsTo {
    config: Arc<ClientConfig>,
    name: Option<ServerName<'static>>,
}

impl<S: AsyncRead + AsyncWrite + Unpin + Send + 'static> TlsConnect<S> for TlsTo {
    type Stream = Encrypted<S>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<Encrypted<S>>> + Send>>;

    fn connect(self, stream: S) -> Self::Future {
        Box::pin(async move {
            let name = self.name.ok_or_else(|| io::Error::other("there is no name to verify"))?;
            let stream = TlsConnector::from(self.config).connect(name, stream).await?;
            Ok(Encrypted(Box::new(stream)))
        })
    }
}

struct Encrypted<S>(Box<tokio_rustls::client::TlsStream<S>>);

impl<S: AsyncRead + AsyncWrite + Unpin> TlsStream for Encrypted<S> {
    // The server's certificate is verified whole, which binds the session to it as well as the password could.
    fn channel_binding(&self) -> ChannelBinding {
        ChannelBinding::none()
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for Encrypted<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(context, into)
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Encrypted<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(url: &str) -> Result<Target, TargetError> {
        Target::parse(url, None, "keybrake", crate::tls::client_config(None).unwrap())
    }

    #[test]
    fn a_url_says_where_and_whether_it_is_encrypted() {
        for (url, place, is_encrypted) in [
            ("postgres://u@db.example/billing", "db.example:5432/billing", true),
            ("postgresql://u:p%40ss@db.example:6432/b?sslmode=prefer", "db.example:6432/b", true),
            ("postgres://u@db/b?sslmode=verify-full", "db:5432/b", true),
            ("postgres://u@db/b?application_name=x&sslmode=disable", "db:5432/b", false),
            ("postgres://u@localhost/b", "localhost:5432/b", false),
            ("postgres://u@[::1]:7/b", "::1:7/b", false),
            ("postgres://u@127.0.0.9/b?sslmode=require", "127.0.0.9:5432/b", true),
            ("postgres://u@localhost,db:1/b", "localhost:5432,db:1/b", true),
            ("postgres://u@/b?host=/run/postgresql", "/run/postgresql:5432/b", false),
            ("postgres://u:p@%2Frun%2Fpg:5433/b", "/run/pg:5433/b", false),
            ("postgres:///?user=u&host=db", "db:5432/u", true),
        ] {
            let target = parse(url).unwrap_or_else(|error| panic!("{url}: {error}"));
            assert_eq!(target.place(), format!("{place}, schema keybrake"), "{url}");
            assert_eq!(target.is_encrypted(), is_encrypted, "{url}");
        }
    }

    #[test]
    fn what_cannot_be_obeyed_is_refused() {
        for (url, error) in [
            ("", TargetError::Malformed),
            ("mysql://u@db/b", TargetError::Malformed),
            ("host=db user=u", TargetError::Malformed),
            ("postgres://u:p@ss@db/b", TargetError::Malformed),
            ("postgres://u:pa/ss@db:x/b", TargetError::Malformed),
            ("postgres://u@db:port/b", TargetError::Malformed),
            ("postgres://u@db/b?sslmode", TargetError::Malformed),
            ("postgres://u@/b", TargetError::NoHost),
            ("postgres://db/b", TargetError::NoUser),
            ("postgres://:p@db/b", TargetError::NoUser),
            ("postgres://u@db/b?sslmode=verify_full", TargetError::SslMode),
            ("postgres://u@db/b?sslrootcert=/ca.pem", TargetError::TrustInUrl),
            // The driver would connect there, whatever the name says that decides about TLS.
            ("postgres://u@localhost/b?hostaddr=192.0.2.1", TargetError::UnknownParameter),
            ("postgres://u@db/b?channel_binding=require", TargetError::UnknownParameter),
            ("postgres://u@db/b?host=/run/postgresql", TargetError::MixedHosts),
            ("postgres://u@/b?host=/run/postgresql&sslmode=require", TargetError::TlsOnSocket),
        ] {
            assert_eq!(parse(url).err(), Some(error), "{url}");
        }
        let trust = || crate::tls::client_config(None).unwrap();
        for schema in ["", "Keybrake", "1a", "a-b", "a\"b", "pg_own", &"a".repeat(64)] {
            let refused = Target::parse("postgres://u@db/b", None, schema, trust());
            assert_eq!(refused.err(), Some(TargetError::Schema), "{schema}");
        }
        let schema = "a".repeat(63);
        assert_eq!(Target::parse("postgres://u@db/b", None, &schema, trust()).unwrap().schema(), schema);
    }

    #[test]
    fn there_is_one_password_and_nobody_sees_it() {
        let trust = || crate::tls::client_config(None).unwrap();
        let beside = Secret::new("HUSH");
        let both = Target::parse("postgres://u:HUSH@db/b", Some(&beside), "s", trust());
        assert_eq!(both.err(), Some(TargetError::TwoPasswords));
        let with = Target::parse("postgres://u@db/b", Some(&beside), "s", trust()).unwrap();
        assert_eq!(with.config.get_password(), Some(b"HUSH".as_slice()));
        let within = parse("postgres://u:HU%53H@db/b").unwrap();
        assert_eq!(within.config.get_password(), Some(b"HUSH".as_slice()));
        for target in [with, within] {
            assert!(!format!("{target:?} {}", target.place()).contains("HUSH"), "{target:?}");
        }
        for url in ["postgres://u:HUSH@db:HUSH/b", "postgres://u:x@HUSH@db/b", "postgres://u@db/b?HUSH=1"] {
            assert!(!parse(url).unwrap_err().to_string().contains("HUSH"), "{url}");
        }
    }
}
