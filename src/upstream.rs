//! Exactly one send towards the vendor.
//!
//! Owns: the pool of HTTP/1.1 connections to one base address, and the verdict on each send: provably not sent,
//! answered in whole, or unknown.
//!
//! Invariants:
//! - A request reaches the network at most once. The only second try is for a message that hyper hands back unsent
//!   (the pooled connection was closed before it took the message); it goes out on a fresh connection.
//! - [`Sent::NotSent`] is said only while not one byte of the request can have left. From the moment hyper owns the
//!   message, whatever is not a whole answer is [`Sent::Unknown`].
//! - A connection is used again only after its last answer was read to the end.
//!
//! Never: follows a redirect (the key would leak), looks at proxies in the environment, retries, or knows what the
//! request means; speaks HTTP/2, where one connection that breaks takes every call on it into doubt.

use std::collections::VecDeque;
use std::fmt;
use std::future::Future;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http_body_util::{BodyExt as _, Full};
use hyper::body::{Body as _, Incoming};
use hyper::client::conn::http1;
use hyper::header::{self, HeaderMap, HeaderName, HeaderValue};
use hyper::http::uri::PathAndQuery;
use hyper::{Method, Request, Response, StatusCode, Uri};
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout_at};
use tokio_rustls::TlsConnector;

/// Default of [`UpstreamConfig::connect_timeout`].
pub const CONNECT_TIMEOUT_MS: u64 = 10_000;
/// Default of [`UpstreamConfig::body_bytes_max`]: 16 MiB.
pub const BODY_BYTES_MAX: usize = 16 << 20;
/// Default of [`UpstreamConfig::idle_max`], connections.
pub const IDLE_MAX: usize = 64;
/// Default of [`UpstreamConfig::idle_timeout`]: below the keep-alive of common servers, so that we close first.
pub const IDLE_TIMEOUT_MS: u64 = 20_000;

/// A head larger than this is not an answer we can read.
const HEAD_BYTES_MAX: usize = 64 << 10;
/// How long a finished connection may take to become ready again before it is dropped instead of pooled. It is ready
/// within microseconds unless the peer closes.
const READY_WAIT_MS: u64 = 20;
/// A first try and one more for a message that was handed back.
const TRIES_MAX: usize = 2;

/// Framing is this module's own: a caller's value could end the request early or hide a second one behind it.
const FRAMING_HEADERS: [HeaderName; 8] = [
    header::CONTENT_LENGTH,
    header::TRANSFER_ENCODING,
    header::CONNECTION,
    header::UPGRADE,
    header::EXPECT,
    header::TE,
    header::TRAILER,
    HeaderName::from_static("keep-alive"),
];

/// A request as it goes out. `Host` is set by this module, framing headers in `headers` are dropped.
#[derive(Clone)]
pub struct Outbound {
    /// The method.
    pub method: Method,
    /// Starts with `/`; sent byte for byte.
    pub path_and_query: String,
    /// All other headers, the vendor's key included.
    pub headers: HeaderMap,
    /// The whole body; empty for none.
    pub body: Bytes,
}

/// Shows method and path only: headers carry the key, the body carries personal data.
impl fmt::Debug for Outbound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Outbound")
            .field("method", &self.method)
            .field("path", &self.path())
            .finish_non_exhaustive()
    }
}

impl Outbound {
    fn path(&self) -> &str {
        self.path_and_query.split('?').next().unwrap_or_default()
    }
}

/// A whole answer. An answer without a length that ends by closing counts as whole when TLS closed properly.
#[derive(Clone)]
pub struct Answer {
    /// The status, 200 to 999; interim answers are skipped.
    pub status: u16,
    /// All headers as received.
    pub headers: HeaderMap,
    /// The whole body, at most [`UpstreamConfig::body_bytes_max`] bytes.
    pub body: Bytes,
}

/// Shows the status and the length only.
impl fmt::Debug for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Answer")
            .field("status", &self.status)
            .field("body_bytes", &self.body.len())
            .finish_non_exhaustive()
    }
}

/// What became of a request.
#[derive(Clone, Debug)]
pub enum Sent {
    /// Provably not a byte of it left.
    NotSent {
        /// Why.
        reason: NotSentReason,
    },
    /// A whole answer came back.
    Answered(Answer),
    /// It may have been executed.
    Unknown {
        /// Why no whole answer came back.
        reason: UnknownReason,
    },
}

/// Why a request was not sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum NotSentReason {
    /// The host name has no usable address.
    Resolve,
    /// No address took the connection in time.
    Connect,
    /// The TLS handshake failed or took too long.
    Tls,
    /// The deadline had passed before the message was given to a connection.
    DeadlinePassed,
    /// Two connections in a row were closed by the peer before they took the message.
    HandedBack,
    /// The path is not one that can be sent byte for byte.
    Malformed,
}

impl NotSentReason {
    /// A short name for logs and metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Resolve => "resolve",
            Self::Connect => "connect",
            Self::Tls => "tls",
            Self::DeadlinePassed => "deadline_passed",
            Self::HandedBack => "handed_back",
            Self::Malformed => "malformed",
        }
    }
}

/// Why the outcome of a request is unknown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum UnknownReason {
    /// The deadline passed while the answer was awaited or read.
    TimedOut,
    /// The connection ended before the whole answer was here.
    Cut,
    /// The answer is longer than [`UpstreamConfig::body_bytes_max`].
    TooLarge,
    /// What came back is not an HTTP/1.1 answer, or not one to this request.
    Unreadable,
}

impl UnknownReason {
    /// A short name for logs and metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::TimedOut => "timed_out",
            Self::Cut => "cut",
            Self::TooLarge => "too_large",
            Self::Unreadable => "unreadable",
        }
    }
}

/// Where requests go: scheme, host and port, nothing else. Plain HTTP exists only towards loopback.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Base {
    scheme: Scheme,
    /// Without the brackets of an IPv6 address.
    host: String,
    port: u16,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Scheme {
    Http,
    Https,
}

impl Scheme {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Http => "http",
            Self::Https => "https",
        }
    }

    const fn default_port(self) -> u16 {
        match self {
            Self::Http => 80,
            Self::Https => 443,
        }
    }
}

/// Why a text is no [`Base`]. No message repeats the text, which may hold a password.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BaseError {
    /// Not an absolute `http` or `https` URL.
    #[error("must be an absolute https:// URL")]
    NotUrl,
    /// It names a user or a password.
    #[error("must not contain a user name or password")]
    UserInfo,
    /// It has more than scheme, host and port.
    #[error("must be scheme, host and port only: no path, query or fragment")]
    NotBare,
    /// `http://` towards another machine.
    #[error("http:// is allowed only towards loopback (localhost, 127.0.0.0/8, [::1]): use https://")]
    PlainRemote,
}

impl Base {
    /// Reads `https://host[:port]`, or `http://` with a loopback host; one trailing slash is tolerated.
    ///
    /// # Errors
    ///
    /// Says which rule the text breaks.
    pub fn parse(text: &str) -> Result<Self, BaseError> {
        let uri: Uri = text.parse().map_err(|_| BaseError::NotUrl)?;
        let scheme = match uri.scheme_str() {
            Some("https") => Scheme::Https,
            Some("http") => Scheme::Http,
            Some(_) | None => return Err(BaseError::NotUrl),
        };
        let authority = uri.authority().ok_or(BaseError::NotUrl)?;
        if authority.as_str().contains('@') {
            return Err(BaseError::UserInfo);
        }
        // The parser drops fragments silently.
        if uri.path() != "/" || text.contains(['?', '#']) {
            return Err(BaseError::NotBare);
        }
        let host = authority.host().trim_start_matches('[').trim_end_matches(']').to_ascii_lowercase();
        let port = match authority.port_u16() {
            Some(port) => port,
            None if authority.as_str().len() == authority.host().len() => scheme.default_port(),
            None => return Err(BaseError::NotUrl),
        };
        if ServerName::try_from(host.as_str()).is_err() || port == 0 {
            return Err(BaseError::NotUrl);
        }
        let base = Self { scheme, host, port };
        match base.scheme {
            Scheme::Http if !base.names_loopback() => Err(BaseError::PlainRemote),
            Scheme::Http | Scheme::Https => Ok(base),
        }
    }

    /// The discard port of this machine: a stand-in where there must be some base.
    pub(crate) fn loopback() -> Self {
        Self { scheme: Scheme::Https, host: "localhost".to_owned(), port: 9 }
    }

    /// The host: a name, or an IP address without brackets.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The port, the scheme's own when none was written.
    pub const fn port(&self) -> u16 {
        self.port
    }

    /// Whether the connection is encrypted.
    pub fn is_tls(&self) -> bool {
        self.scheme == Scheme::Https
    }

    fn names_loopback(&self) -> bool {
        self.host == "localhost" || self.host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
    }

    /// `host[:port]` as in a URL and in the `Host` header.
    fn authority(&self) -> String {
        let host = if self.host.contains(':') { format!("[{}]", self.host) } else { self.host.clone() };
        if self.port == self.scheme.default_port() { host } else { format!("{host}:{}", self.port) }
    }
}

impl fmt::Display for Base {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}", self.scheme.as_str(), self.authority())
    }
}

/// Settings of an [`Upstream`].
#[derive(Clone, Debug)]
pub struct UpstreamConfig {
    /// Where requests go.
    pub base: Base,
    /// Trust and protocol versions; used with `https` only.
    pub tls: Arc<rustls::ClientConfig>,
    /// Limit over name resolution, connecting and the TLS handshake together; the deadline of a send may be nearer.
    pub connect_timeout: Duration,
    /// Longest body of an answer, in bytes; more is [`UnknownReason::TooLarge`].
    pub body_bytes_max: usize,
    /// Most connections kept open without a request.
    pub idle_max: usize,
    /// A connection unused for this long is not used again.
    pub idle_timeout: Duration,
}

impl UpstreamConfig {
    /// The settings with this module's defaults.
    pub fn new(base: Base, tls: Arc<rustls::ClientConfig>) -> Self {
        Self {
            base,
            tls,
            connect_timeout: Duration::from_millis(CONNECT_TIMEOUT_MS),
            body_bytes_max: BODY_BYTES_MAX,
            idle_max: IDLE_MAX,
            idle_timeout: Duration::from_millis(IDLE_TIMEOUT_MS),
        }
    }
}

/// An open connection that may take one request.
struct Connection {
    sender: http1::SendRequest<Full<Bytes>>,
    /// The same socket once more, to look at without waiting for the runtime to notice what arrived.
    probe: std::net::TcpStream,
}

impl Connection {
    /// Whether nothing waits on the socket: no end, no alert, no early answer such as an idle server's 408. The task
    /// that drives the connection learns of these a moment later, and a request written in that moment would have an
    /// unknown outcome for nothing.
    fn is_quiet(&self) -> bool {
        let peeked = self.probe.peek(&mut [0; 1]);
        peeked.is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock)
    }
}

struct Idle {
    connection: Connection,
    since: Instant,
}

/// Sends requests to one base address. Shared by reference; a new trust anchor needs a new one.
pub struct Upstream {
    config: UpstreamConfig,
    host_header: HeaderValue,
    /// Oldest first. Dead and expired connections leave whenever one is taken or put back.
    idle: Mutex<VecDeque<Idle>>,
}

impl fmt::Debug for Upstream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Upstream").field("base", &self.config.base).finish_non_exhaustive()
    }
}

enum Exchange {
    Done(Sent),
    /// Never written to a connection.
    HandedBack(Request<Full<Bytes>>),
}

impl Upstream {
    /// Opens nothing yet.
    pub fn new(config: UpstreamConfig) -> Self {
        // A host that passed `Base::parse` is ASCII; were it ever not, an empty Host is refused by the peer.
        let host_header =
            HeaderValue::try_from(config.base.authority()).unwrap_or_else(|_| HeaderValue::from_static(""));
        Self { config, host_header, idle: Mutex::new(VecDeque::new()) }
    }

    /// Sends `out` and reads the answer, both before `deadline`.
    ///
    /// Dropping the future gives up on the answer, not on the request: it may have been sent and executed. Who must
    /// know the outcome runs this in a task of its own.
    pub async fn send(&self, out: Outbound, deadline: Instant) -> Sent {
        let Some(mut request) = self.request(out) else {
            return not_sent(NotSentReason::Malformed);
        };
        for attempt in 0..TRIES_MAX {
            if Instant::now() >= deadline {
                return not_sent(NotSentReason::DeadlinePassed);
            }
            // A second stale connection would hand the message back again: the second try is always fresh.
            let pooled = if attempt == 0 { self.take_idle() } else { None };
            let connection = match pooled {
                Some(connection) => connection,
                None => match self.connect(deadline).await {
                    Ok(connection) => connection,
                    Err(reason) => return not_sent(reason),
                },
            };
            if Instant::now() >= deadline {
                return not_sent(NotSentReason::DeadlinePassed);
            }
            match self.exchange(connection, request, deadline).await {
                Exchange::Done(sent) => return sent,
                Exchange::HandedBack(back) => request = back,
            }
        }
        not_sent(NotSentReason::HandedBack)
    }

    fn request(&self, out: Outbound) -> Option<Request<Full<Bytes>>> {
        let path = PathAndQuery::try_from(out.path_and_query.as_str()).ok()?;
        // The parser drops fragments and turns "" and "*" into paths: only what stays equal is sent as it was meant.
        if path.as_str() != out.path_and_query || !path.as_str().starts_with('/') {
            return None;
        }
        let mut request = Request::new(Full::new(out.body));
        *request.method_mut() = out.method;
        *request.uri_mut() = Uri::from(path);
        *request.headers_mut() = out.headers;
        for name in FRAMING_HEADERS {
            request.headers_mut().remove(name);
        }
        request.headers_mut().insert(header::HOST, self.host_header.clone());
        Some(request)
    }

    /// From `try_send_request` on, only a message that comes back proves that nothing was sent.
    async fn exchange(
        &self,
        mut connection: Connection,
        request: Request<Full<Bytes>>,
        deadline: Instant,
    ) -> Exchange {
        match timeout_at(deadline, connection.sender.try_send_request(request)).await {
            Err(_elapsed) => Exchange::Done(unknown(UnknownReason::TimedOut)),
            Ok(Err(mut failed)) => {
                if let Some(request) = failed.take_message() {
                    return Exchange::HandedBack(request);
                }
                tracing::warn!(base = %self.config.base, error = %chain(failed.error()), "no answer");
                Exchange::Done(unknown(reason_of(failed.error())))
            }
            Ok(Ok(response)) => {
                let read = timeout_at(deadline, self.read(response)).await;
                match read.unwrap_or(Err(UnknownReason::TimedOut)) {
                    Ok(answer) => {
                        self.put_idle(connection, deadline).await;
                        Exchange::Done(Sent::Answered(answer))
                    }
                    Err(reason) => Exchange::Done(unknown(reason)),
                }
            }
        }
    }

    async fn read(&self, response: Response<Incoming>) -> Result<Answer, UnknownReason> {
        let (head, mut body) = response.into_parts();
        if head.status == StatusCode::SWITCHING_PROTOCOLS {
            return Err(UnknownReason::Unreadable);
        }
        let announced = usize::try_from(body.size_hint().lower()).unwrap_or(usize::MAX);
        if announced > self.config.body_bytes_max {
            return Err(UnknownReason::TooLarge);
        }
        let mut whole = BytesMut::with_capacity(announced);
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|error| {
                tracing::warn!(base = %self.config.base, error = %chain(&error), "answer cut short");
                reason_of(&error)
            })?;
            // Trailers are no part of an answer.
            let Ok(data) = frame.into_data() else { continue };
            if data.len() > self.config.body_bytes_max - whole.len() {
                return Err(UnknownReason::TooLarge);
            }
            whole.extend_from_slice(&data);
        }
        Ok(Answer { status: head.status.as_u16(), headers: head.headers, body: whole.freeze() })
    }

    fn take_idle(&self) -> Option<Connection> {
        let mut idle = self.lock_idle();
        // The newest is the least likely to be closed by the peer in this very moment.
        while let Some(Idle { connection, .. }) = idle.pop_back() {
            if connection.is_quiet() {
                return Some(connection);
            }
        }
        None
    }

    /// Keeps the connection, unless the peer or the answer's `Connection: close` ended it.
    async fn put_idle(&self, mut connection: Connection, deadline: Instant) {
        if !connection.sender.is_ready() {
            let wait = deadline.min(Instant::now() + Duration::from_millis(READY_WAIT_MS));
            if !matches!(timeout_at(wait, connection.sender.ready()).await, Ok(Ok(()))) {
                return;
            }
        }
        let mut idle = self.lock_idle();
        idle.push_back(Idle { connection, since: Instant::now() });
        while idle.len() > self.config.idle_max {
            idle.pop_front();
        }
    }

    /// The idle connections that may still be used.
    fn lock_idle(&self) -> MutexGuard<'_, VecDeque<Idle>> {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let timeout = self.config.idle_timeout;
        idle.retain(|idle| idle.connection.sender.is_ready() && now.duration_since(idle.since) < timeout);
        idle
    }

    /// A fresh connection. Nothing of a request has been shown to it.
    async fn connect(&self, deadline: Instant) -> Result<Connection, NotSentReason> {
        let base = &self.config.base;
        let by = deadline.min(Instant::now() + self.config.connect_timeout);
        // Whoever set the nearer limit is to blame for its passing.
        let late = |reason| if by >= deadline { NotSentReason::DeadlinePassed } else { reason };
        let addresses = within(by, resolve(base))
            .await
            .map_err(|failed| failed.reason(base, NotSentReason::Resolve, late))?;
        let stream = within(by, connect_any(&addresses, by))
            .await
            .map_err(|failed| failed.reason(base, NotSentReason::Connect, late))?;
        // Small requests must not wait for the peer's delayed acknowledgement.
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "TCP_NODELAY refused");
        }
        let probe = stream.as_fd().try_clone_to_owned().map_err(|_| NotSentReason::Connect)?.into();
        let sender = match base.scheme {
            Scheme::Http => attach(stream).await?,
            Scheme::Https => {
                let name = ServerName::try_from(base.host.clone()).map_err(|_| NotSentReason::Resolve)?;
                let connector = TlsConnector::from(Arc::clone(&self.config.tls));
                let stream = within(by, connector.connect(name, stream))
                    .await
                    .map_err(|failed| failed.reason(base, NotSentReason::Tls, late))?;
                attach(stream).await?
            }
        };
        Ok(Connection { sender, probe })
    }
}

const fn not_sent(reason: NotSentReason) -> Sent {
    Sent::NotSent { reason }
}

const fn unknown(reason: UnknownReason) -> Sent {
    Sent::Unknown { reason }
}

fn reason_of(error: &hyper::Error) -> UnknownReason {
    if error.is_parse() { UnknownReason::Unreadable } else { UnknownReason::Cut }
}

/// hyper's errors name their cause only in their source.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

enum Failed {
    Elapsed,
    Io(io::Error),
}

impl Failed {
    fn reason(
        self,
        base: &Base,
        reason: NotSentReason,
        late: impl FnOnce(NotSentReason) -> NotSentReason,
    ) -> NotSentReason {
        match self {
            Self::Elapsed => {
                tracing::warn!(%base, step = reason.as_str(), "not connected in time");
                late(reason)
            }
            Self::Io(error) => {
                tracing::warn!(%base, step = reason.as_str(), %error, "not connected");
                reason
            }
        }
    }
}

async fn within<T>(by: Instant, step: impl Future<Output = io::Result<T>>) -> Result<T, Failed> {
    match timeout_at(by, step).await {
        Ok(done) => done.map_err(Failed::Io),
        Err(_elapsed) => Err(Failed::Elapsed),
    }
}

async fn resolve(base: &Base) -> io::Result<Vec<SocketAddr>> {
    let mut addresses: Vec<SocketAddr> = match base.host.parse::<IpAddr>() {
        Ok(ip) => vec![SocketAddr::new(ip, base.port)],
        Err(_) => tokio::net::lookup_host((base.host.as_str(), base.port)).await?.collect(),
    };
    // A hosts file may point `localhost` elsewhere; the key must not go there in the clear.
    if base.scheme == Scheme::Http {
        addresses.retain(|address| address.ip().is_loopback());
    }
    if addresses.is_empty() { Err(io::Error::other("no usable address")) } else { Ok(addresses) }
}

/// Tries the addresses in turn, each with an equal share of the time that is left, so that one that swallows packets
/// does not use it up. The caller limits the whole.
async fn connect_any(addresses: &[SocketAddr], by: Instant) -> io::Result<TcpStream> {
    let mut last = io::Error::from(io::ErrorKind::TimedOut);
    for (address, left) in addresses.iter().zip((1..=addresses.len()).rev()) {
        let now = Instant::now();
        let share = by.saturating_duration_since(now) / u32::try_from(left).unwrap_or(u32::MAX);
        let by = if left == 1 { by } else { now + share };
        match timeout_at(by, TcpStream::connect(address)).await {
            Ok(Ok(stream)) => return Ok(stream),
            Ok(Err(error)) => last = error,
            Err(_elapsed) => last = io::Error::from(io::ErrorKind::TimedOut),
        }
    }
    Err(last)
}

async fn attach<S>(stream: S) -> Result<http1::SendRequest<Full<Bytes>>, NotSentReason>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let made = http1::Builder::new().max_header_size(HEAD_BYTES_MAX).handshake(TokioIo::new(stream)).await;
    let (sender, connection) = made.map_err(|_| NotSentReason::Connect)?;
    // Ends when the sender is dropped or the peer closes.
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            tracing::debug!(error = %chain(&error), "upstream connection ended");
        }
    });
    Ok(sender)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::thread;

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;
    use tokio::sync::mpsc;

    use super::*;

    const OK: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi";

    fn upstream(scheme: &str, port: u16) -> Upstream {
        let base = Base::parse(&format!("{scheme}://127.0.0.1:{port}")).unwrap();
        let tls = Arc::new(crate::tls::client_config(None).unwrap());
        Upstream::new(UpstreamConfig { body_bytes_max: 1000, ..UpstreamConfig::new(base, tls) })
    }

    fn post(path: &str) -> Outbound {
        Outbound {
            method: Method::POST,
            path_and_query: path.to_owned(),
            headers: HeaderMap::new(),
            body: Bytes::from_static(b"amount=600"),
        }
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(5)
    }

    /// Reads one request with a body of ten bytes; `None` at the end of the connection.
    async fn read_request(stream: &mut TcpStream) -> Option<String> {
        let mut text = Vec::new();
        loop {
            if text.ends_with(b"amount=600") {
                return String::from_utf8(text).ok();
            }
            let mut chunk = [0; 1024];
            match stream.read(&mut chunk).await {
                Ok(0) | Err(_) => return None,
                Ok(n) => text.extend_from_slice(&chunk[..n]),
            }
        }
    }

    /// A server that answers each request of each connection with `answer` and tells what it read.
    async fn answering(
        answer: &'static [u8],
        close: bool,
    ) -> (u16, mpsc::UnboundedReceiver<(usize, String)>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (seen, told) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            for connection in 0.. {
                let (mut stream, _) = listener.accept().await.unwrap();
                let seen = seen.clone();
                tokio::spawn(async move {
                    while let Some(request) = read_request(&mut stream).await {
                        let _ = seen.send((connection, request));
                        let _ = stream.write_all(answer).await;
                        if close {
                            return;
                        }
                    }
                });
            }
        });
        (port, told)
    }

    fn answer_of(sent: Sent) -> Answer {
        match sent {
            Sent::Answered(answer) => answer,
            other @ (Sent::NotSent { .. } | Sent::Unknown { .. }) => panic!("no answer: {other:?}"),
        }
    }

    fn unknown_of(sent: Sent) -> UnknownReason {
        match sent {
            Sent::Unknown { reason } => reason,
            other @ (Sent::NotSent { .. } | Sent::Answered(_)) => panic!("not unknown: {other:?}"),
        }
    }

    fn not_sent_of(sent: Sent) -> NotSentReason {
        match sent {
            Sent::NotSent { reason } => reason,
            other @ (Sent::Unknown { .. } | Sent::Answered(_)) => panic!("sent: {other:?}"),
        }
    }

    #[tokio::test]
    async fn one_connection_serves_many_requests() {
        let (port, mut told) = answering(OK, false).await;
        let upstream = upstream("http", port);
        for n in 0..5 {
            let answer = answer_of(upstream.send(post(&format!("/v1/charges?n={n}")), soon()).await);
            assert_eq!((answer.status, &answer.body[..]), (200, &b"hi"[..]));
            let (connection, request) = told.recv().await.unwrap();
            assert_eq!(connection, 0);
            assert!(request.starts_with(&format!("POST /v1/charges?n={n} HTTP/1.1\r\n")), "{request}");
        }
    }

    #[tokio::test]
    async fn only_host_and_length_are_added() {
        let (port, mut told) = answering(OK, false).await;
        let mut out = post("/v1/charges");
        out.headers.insert("authorization", HeaderValue::from_static("Bearer sk_test_1"));
        out.headers.insert("host", HeaderValue::from_static("elsewhere"));
        out.headers.insert("content-length", HeaderValue::from_static("3"));
        out.headers.insert("transfer-encoding", HeaderValue::from_static("chunked"));
        out.headers.insert("expect", HeaderValue::from_static("100-continue"));
        answer_of(upstream("http", port).send(out, soon()).await);
        let (_, request) = told.recv().await.unwrap();
        let (head, _) = request.split_once("\r\n\r\n").unwrap();
        let mut lines: Vec<&str> = head.lines().skip(1).collect();
        lines.sort_unstable();
        let host = format!("host: 127.0.0.1:{port}");
        assert_eq!(lines, ["authorization: Bearer sk_test_1", "content-length: 10", host.as_str()]);
    }

    #[tokio::test]
    async fn an_answer_that_closes_ends_its_connection() {
        let close = b"HTTP/1.1 402 Payment Required\r\nconnection: close\r\ncontent-length: 2\r\n\r\nno";
        let (port, mut told) = answering(close, false).await;
        let upstream = upstream("http", port);
        for n in 0..3 {
            assert_eq!(answer_of(upstream.send(post("/v1/charges"), soon()).await).status, 402);
            assert_eq!(told.recv().await.unwrap().0, n);
        }
    }

    #[tokio::test]
    async fn interim_answers_are_skipped_and_chunks_joined() {
        let chunked =
            b"HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n\
            1\r\nh\r\n1\r\ni\r\n0\r\n\r\n";
        let (port, _told) = answering(chunked, false).await;
        let answer = answer_of(upstream("http", port).send(post("/v1/charges"), soon()).await);
        assert_eq!((answer.status, &answer.body[..]), (200, &b"hi"[..]));
    }

    #[tokio::test]
    async fn redirects_are_answers() {
        let moved = b"HTTP/1.1 307 Moved\r\nlocation: http://127.0.0.1:1/\r\ncontent-length: 0\r\n\r\n";
        let (port, _told) = answering(moved, false).await;
        assert_eq!(answer_of(upstream("http", port).send(post("/v1/charges"), soon()).await).status, 307);
    }

    #[tokio::test]
    async fn what_is_no_whole_answer_is_unknown() {
        let cases: [(&'static [u8], UnknownReason); 9] = [
            (b"", UnknownReason::Cut),
            (b"HTTP/1.1 200 OK\r\ncontent-le", UnknownReason::Cut),
            (b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf", UnknownReason::Cut),
            (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\nhalf\r\n", UnknownReason::Cut),
            (b"HTTP/1.1 100 Continue\r\n\r\n", UnknownReason::Cut),
            (b"HTTP/1.1 200 OK\r\ncontent-length: 1001\r\n\r\n", UnknownReason::TooLarge),
            (b"\x15\x03\x01\x00\x02\x02\x16 garbage\r\n\r\n", UnknownReason::Unreadable),
            (
                b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nhi",
                UnknownReason::Unreadable,
            ),
            (
                b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n",
                UnknownReason::Unreadable,
            ),
        ];
        for (answer, reason) in cases {
            let (port, mut told) = answering(answer, true).await;
            let sent = upstream("http", port).send(post("/v1/charges"), soon()).await;
            let shown = String::from_utf8_lossy(answer);
            assert_eq!(unknown_of(sent), reason, "{shown}");
            told.recv().await.unwrap();
            assert!(told.try_recv().is_err(), "sent twice: {shown}");
        }
    }

    #[tokio::test]
    async fn a_chunked_answer_over_the_limit_is_unknown() {
        let mut answer = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n".to_vec();
        for _ in 0..11 {
            answer.extend_from_slice(format!("64\r\n{}\r\n", "x".repeat(100)).as_bytes());
        }
        answer.extend_from_slice(b"0\r\n\r\n");
        let (port, _told) = answering(answer.leak(), false).await;
        let sent = upstream("http", port).send(post("/v1/charges"), soon()).await;
        assert_eq!(unknown_of(sent), UnknownReason::TooLarge);
    }

    #[tokio::test]
    async fn a_server_that_closes_without_reading_leaves_it_unknown() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let accepted = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&accepted);
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                counter.fetch_add(1, Ordering::SeqCst);
                stream.readable().await.unwrap();
            }
        });
        let sent = upstream("http", port).send(post("/v1/charges"), soon()).await;
        assert_eq!(unknown_of(sent), UnknownReason::Cut);
        assert_eq!(accepted.load(Ordering::SeqCst), 1);
    }

    #[tokio::test]
    async fn a_slow_answer_is_unknown_at_the_deadline() {
        for answer in [&b""[..], b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nslow"] {
            let (port, mut told) = answering(answer, false).await;
            let deadline = Instant::now() + Duration::from_millis(150);
            let sent = upstream("http", port).send(post("/v1/charges"), deadline).await;
            assert_eq!(unknown_of(sent), UnknownReason::TimedOut);
            assert!(Instant::now() < deadline + Duration::from_secs(2));
            told.recv().await.unwrap();
        }
    }

    #[tokio::test]
    async fn a_deadline_that_has_passed_sends_nothing() {
        let (port, mut told) = answering(OK, false).await;
        let upstream = upstream("http", port);
        let sent = upstream.send(post("/v1/charges"), Instant::now()).await;
        assert_eq!(not_sent_of(sent), NotSentReason::DeadlinePassed);
        answer_of(upstream.send(post("/v1/charges"), soon()).await);
        told.recv().await.unwrap();
        let sent = upstream.send(post("/v1/charges"), Instant::now()).await;
        assert_eq!(not_sent_of(sent), NotSentReason::DeadlinePassed);
        assert!(told.try_recv().is_err());
    }

    /// The peer closed while the connection lay in the pool and the runtime had no turn to notice: hyper would write
    /// the request into it and the outcome would be unknown. It must go out once, on a fresh connection.
    #[test]
    fn a_stale_pooled_connection_costs_nothing() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let (closed, wait_closed) = std::sync::mpsc::channel();
        let (next, wait_next) = std::sync::mpsc::channel();
        let server = thread::spawn(move || {
            let mut requests = 0;
            for _ in 0..2 {
                let (mut stream, _) = listener.accept().unwrap();
                let mut text = Vec::new();
                while !text.ends_with(b"amount=600") {
                    let mut chunk = [0; 1024];
                    let n = io::Read::read(&mut stream, &mut chunk).unwrap();
                    assert!(n > 0);
                    text.extend_from_slice(&chunk[..n]);
                }
                requests += 1;
                io::Write::write_all(&mut stream, OK).unwrap();
                wait_next.recv().unwrap();
                drop(stream);
                closed.send(()).unwrap();
            }
            requests
        });
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let upstream = upstream("http", port);
        runtime.block_on(async {
            answer_of(upstream.send(post("/v1/charges"), soon()).await);
            next.send(()).unwrap();
            // Blocks the only runtime thread on purpose.
            wait_closed.recv().unwrap();
            answer_of(upstream.send(post("/v1/charges"), soon()).await);
            next.send(()).unwrap();
        });
        assert_eq!(server.join().unwrap(), 2);
    }

    #[tokio::test]
    async fn a_message_handed_back_is_not_lost() {
        let (port, mut told) = answering(OK, true).await;
        let upstream = upstream("http", port);
        let connection = upstream.connect(soon()).await.unwrap();
        let request = upstream.request(post("/v1/charges?first")).unwrap();
        match upstream.exchange(connection, request, soon()).await {
            Exchange::Done(sent) => assert_eq!(answer_of(sent).status, 200),
            Exchange::HandedBack(_) => panic!("a live connection"),
        }
        told.recv().await.unwrap();
        let mut connection = upstream.connect(soon()).await.unwrap();
        let request = upstream.request(post("/v1/charges?second")).unwrap();
        // Occupied by another request: not ready, so the message comes back.
        drop(connection.sender.try_send_request(upstream.request(post("/v1/charges?other")).unwrap()));
        let _ =
            connection.sender.try_send_request(upstream.request(post("/v1/charges?other")).unwrap()).await;
        match upstream.exchange(connection, request, soon()).await {
            Exchange::HandedBack(request) => assert_eq!(request.uri().query(), Some("second")),
            Exchange::Done(sent) => panic!("{sent:?}"),
        }
    }

    /// Connections end at every possible moment; no request may arrive twice, and "not sent" must be true.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn no_request_arrives_twice() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (seen, mut told) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            for n in 0_u64.. {
                let (mut stream, _) = listener.accept().await.unwrap();
                let seen = seen.clone();
                tokio::spawn(async move {
                    for _ in 0..n % 3 {
                        let Some(request) = read_request(&mut stream).await else { return };
                        seen.send(request.lines().next().unwrap().to_owned()).unwrap();
                        stream.write_all(OK).await.unwrap();
                    }
                    tokio::time::sleep(Duration::from_micros(n * 37 % 900)).await;
                });
            }
        });
        let upstream = upstream("http", port);
        let mut outcomes = Vec::new();
        for n in 0..400 {
            let sent = upstream.send(post(&format!("/v1/charges?{n}")), soon()).await;
            outcomes.push((format!("POST /v1/charges?{n} HTTP/1.1"), sent));
            tokio::time::sleep(Duration::from_micros(n * 53 % 700)).await;
        }
        let mut arrived = Vec::new();
        while let Ok(request) = told.try_recv() {
            arrived.push(request);
        }
        let mut answered = 0;
        for (request, sent) in outcomes {
            let times = arrived.iter().filter(|other| **other == request).count();
            match sent {
                Sent::Answered(_) => {
                    answered += 1;
                    assert_eq!(times, 1, "{request}");
                }
                Sent::NotSent { .. } => assert_eq!(times, 0, "{request}"),
                Sent::Unknown { .. } => assert!(times <= 1, "{request}"),
            }
        }
        assert!(answered > 100, "{answered}");
    }

    #[tokio::test]
    async fn a_refused_connection_sends_nothing() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        drop(listener);
        let sent = upstream("http", port).send(post("/v1/charges"), soon()).await;
        assert_eq!(not_sent_of(sent), NotSentReason::Connect);
    }

    #[tokio::test]
    async fn a_failed_handshake_sends_nothing() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let server = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            stream.write_all(OK).await.unwrap();
            let mut text = Vec::new();
            let _ = stream.read_to_end(&mut text).await;
            text
        });
        let sent = upstream("https", port).send(post("/v1/charges"), soon()).await;
        assert_eq!(not_sent_of(sent), NotSentReason::Tls);
        let text = server.await.unwrap();
        assert!(!String::from_utf8_lossy(&text).contains("charges"));
    }

    #[tokio::test]
    async fn a_handshake_that_hangs_sends_nothing() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let upstream = upstream("https", port);
        let deadline = Instant::now() + Duration::from_millis(150);
        assert_eq!(not_sent_of(upstream.send(post("/v1/x"), deadline).await), NotSentReason::DeadlinePassed);
        let quick = UpstreamConfig { connect_timeout: Duration::from_millis(150), ..upstream.config };
        assert_eq!(not_sent_of(Upstream::new(quick).send(post("/v1/x"), soon()).await), NotSentReason::Tls);
    }

    #[tokio::test]
    async fn a_name_without_an_address_sends_nothing() {
        let base = Base::parse("https://keybrake.invalid").unwrap();
        let tls = Arc::new(crate::tls::client_config(None).unwrap());
        let sent = Upstream::new(UpstreamConfig::new(base, tls)).send(post("/v1/charges"), soon()).await;
        let reason = not_sent_of(sent);
        assert!(matches!(reason, NotSentReason::Resolve | NotSentReason::DeadlinePassed), "{reason:?}");
    }

    #[tokio::test]
    async fn a_path_that_would_change_is_not_sent() {
        let upstream = upstream("http", 1);
        for path in ["", "*", "v1/charges", "/v1/charges#x", "/v1/a b", "http://evil.example/v1"] {
            assert_eq!(
                not_sent_of(upstream.send(post(path), soon()).await),
                NotSentReason::Malformed,
                "{path}"
            );
        }
    }

    #[tokio::test]
    async fn idle_connections_are_bounded_and_expire() {
        let (port, _told) = answering(OK, false).await;
        let full = upstream("http", port);
        let config = UpstreamConfig { idle_max: 2, idle_timeout: Duration::from_millis(200), ..full.config };
        let upstream = Arc::new(Upstream::new(config));
        let mut sends = tokio::task::JoinSet::new();
        for _ in 0..8 {
            let upstream = Arc::clone(&upstream);
            sends.spawn(async move { upstream.send(post("/v1/charges"), soon()).await });
        }
        sends.join_all().await.into_iter().for_each(|sent| assert_eq!(answer_of(sent).status, 200));
        assert!((1..=2).contains(&upstream.lock_idle().len()));
        tokio::time::sleep(Duration::from_millis(250)).await;
        assert!(upstream.take_idle().is_none());
    }

    #[test]
    fn bases_are_bare_and_safe() {
        for (text, shown) in [
            ("https://api.stripe.com", "https://api.stripe.com"),
            ("https://API.stripe.com:443/", "https://api.stripe.com"),
            ("https://10.0.0.7:8443", "https://10.0.0.7:8443"),
            ("http://localhost:12111", "http://localhost:12111"),
            ("http://127.9.9.9", "http://127.9.9.9"),
            ("http://[::1]:80", "http://[::1]"),
            ("https://[2001:db8::1]:8443", "https://[2001:db8::1]:8443"),
        ] {
            assert_eq!(Base::parse(text).unwrap().to_string(), shown, "{text}");
        }
        for (text, error) in [
            ("", BaseError::NotUrl),
            ("api.stripe.com", BaseError::NotUrl),
            ("ftp://api.stripe.com", BaseError::NotUrl),
            ("https://", BaseError::NotUrl),
            ("https://api.stripe.com:x", BaseError::NotUrl),
            ("https://api.stripe.com:", BaseError::NotUrl),
            ("https://api.stripe.com:0", BaseError::NotUrl),
            ("https://api.stripe.com:99999", BaseError::NotUrl),
            ("https://user:pw@api.stripe.com", BaseError::UserInfo),
            ("https://api.stripe.com/v1", BaseError::NotBare),
            ("https://api.stripe.com?x", BaseError::NotBare),
            ("https://api.stripe.com/#x", BaseError::NotBare),
            ("http://api.stripe.com", BaseError::PlainRemote),
            ("http://localhost.example", BaseError::PlainRemote),
            ("http://0.0.0.0:1", BaseError::PlainRemote),
        ] {
            assert_eq!(Base::parse(text), Err(error), "{text}");
        }
    }

    #[test]
    fn nothing_private_is_shown() {
        let mut out = post("/v1/charges?email=a%40b.c");
        out.headers.insert("authorization", HeaderValue::from_static("Bearer sk_test_1"));
        let answer =
            Answer { status: 200, headers: out.headers.clone(), body: Bytes::from_static(b"secret") };
        assert_eq!(format!("{out:?}"), "Outbound { method: POST, path: \"/v1/charges\", .. }");
        assert_eq!(format!("{answer:?}"), "Answer { status: 200, body_bytes: 6, .. }");
    }
}
