//! The accept loop: who may talk to us, for how long, and how it ends.
//!
//! Owns: listening sockets, the TLS handshake, HTTP/1.1 and HTTP/2 framing limits, the number of connections, and the
//! orderly end of all of them.
//!
//! Invariants:
//! - At most [`Limits::connections_max`] connections exist, handshakes included; further ones wait in the kernel.
//! - No peer holds a connection by silence: handshake, request head, idle time and a stalled write each have a limit.
//!   (Reading a body in time is the service's business: it knows the deadline of the request.)
//! - A panic in a request is a 500 to that caller and nothing else.
//! - After shutdown begins nothing new is accepted, and answers in progress are finished within [`Limits::drain`].
//!
//! Never: looks into a request, or decides what to answer to one that can be parsed.

use std::convert::Infallible;
use std::error::Error;
use std::future::{Future, poll_fn};
use std::io;
use std::net::SocketAddr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Full};
use hyper::body::{Body, Incoming};
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::{Sleep, sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Pause after a failed accept (out of file descriptors), so that the loop does not spin.
const ACCEPT_BACKOFF_MS: u64 = 100;
/// Pause between two looks at a plain connection that has sent less than [`H2_MARK`].
const SNIFF_PAUSE_MS: u64 = 5;
/// How HTTP/2 with prior knowledge begins; no HTTP/1.1 method does.
const H2_MARK: &[u8] = b"PRI ";
/// `EAFNOSUPPORT` on Linux and on macOS: the machine has no IPv6 at all.
const ADDRESS_FAMILY_UNSUPPORTED: [i32; 2] = [97, 47];

/// The body of an answer: whole or streamed.
pub type ReplyBody = UnsyncBoxBody<Bytes, Box<dyn Error + Send + Sync>>;

/// A body that is here in whole.
pub fn whole(bytes: impl Into<Bytes>) -> ReplyBody {
    Full::new(bytes.into()).map_err(|never| match never {}).boxed_unsync()
}

/// What one server allows its peers.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Connections at once over all listeners of one [`run`].
    pub connections_max: usize,
    /// For the TLS handshake.
    pub handshake_timeout: Duration,
    /// For the head of an HTTP/1.1 request. It runs between requests too, so it is also how long an HTTP/1.1
    /// connection may idle.
    pub head_timeout: Duration,
    /// How long an HTTP/2 connection may stay without an open stream.
    pub idle_timeout: Duration,
    /// How long a peer may take nothing of what is written to it.
    pub write_timeout: Duration,
    /// Size of a request's head, in bytes, and of the HTTP/1.1 read buffer. Over it: 431.
    pub head_bytes_max: u32,
    /// Number of header lines in HTTP/1.1. Over it: 431.
    pub headers_max: usize,
    /// Concurrent streams of one HTTP/2 connection.
    pub streams_max: u32,
    /// An HTTP/2 peer with open streams is pinged after this much silence, and dropped after as much again.
    pub ping_interval: Duration,
    /// How long answers in progress may take after shutdown began.
    pub drain: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections_max: 1024,
            handshake_timeout: Duration::from_secs(10),
            head_timeout: Duration::from_secs(10),
            idle_timeout: Duration::from_mins(1),
            write_timeout: Duration::from_secs(30),
            head_bytes_max: 64 << 10,
            headers_max: 100,
            streams_max: 250,
            ping_interval: Duration::from_secs(20),
            drain: Duration::from_secs(9),
        }
    }
}

/// Where a request came in.
#[derive(Clone, Copy, Debug)]
pub struct ConnInfo {
    /// The address of the caller.
    pub peer: SocketAddr,
    /// Our own address of this connection.
    pub local: SocketAddr,
    /// Whether the connection is encrypted.
    pub tls: bool,
}

/// Bound sockets.
#[derive(Debug)]
pub struct Listeners {
    sockets: Vec<TcpListener>,
}

/// An address that could not be bound.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {address}: {source}")]
pub struct BindError {
    /// Which one.
    pub address: SocketAddr,
    /// Why.
    pub source: io::Error,
}

impl Listeners {
    /// Binds all addresses. One that this machine does not have (`[::1]` in a container without IPv6) is a warning as
    /// long as another is bound.
    ///
    /// # Errors
    ///
    /// When an address is in use or forbidden, or when none could be bound. `addresses` must not be empty: nothing to
    /// listen on is an error too, told of the unspecified address.
    pub async fn bind(addresses: &[SocketAddr]) -> Result<Self, BindError> {
        let mut sockets = Vec::with_capacity(addresses.len());
        let mut lacking = Vec::new();
        for &address in addresses {
            match TcpListener::bind(address).await {
                Ok(socket) => sockets.push(socket),
                Err(source) if is_lacking(&source) => lacking.push(BindError { address, source }),
                Err(source) => return Err(BindError { address, source }),
            }
        }
        if sockets.is_empty() {
            let nothing = || BindError {
                address: SocketAddr::from(([0, 0, 0, 0], 0)),
                source: io::ErrorKind::InvalidInput.into(),
            };
            return Err(lacking.pop().unwrap_or_else(nothing));
        }
        for error in lacking {
            tracing::warn!(address = %error.address, error = %error.source, "this machine lacks an address");
        }
        Ok(Self { sockets })
    }

    /// The bound addresses, with the ports that were chosen for port 0.
    ///
    /// # Errors
    ///
    /// When the system cannot tell.
    pub fn addresses(&self) -> io::Result<Vec<SocketAddr>> {
        self.sockets.iter().map(TcpListener::local_addr).collect()
    }

    async fn accept(&self) -> io::Result<(TcpStream, SocketAddr)> {
        poll_fn(|cx| {
            for socket in &self.sockets {
                if let Poll::Ready(accepted) = socket.poll_accept(cx) {
                    return Poll::Ready(accepted);
                }
            }
            Poll::Pending
        })
        .await
    }
}

fn is_lacking(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::AddrNotAvailable
        || error.raw_os_error().is_some_and(|code| ADDRESS_FAMILY_UNSUPPORTED.contains(&code))
}

/// What all connections of one [`run`] share.
struct Shared<S> {
    tls: Option<TlsAcceptor>,
    limits: Limits,
    service: S,
    /// Finish what is in progress.
    stop: CancellationToken,
    /// Give up what is still in progress.
    kill: CancellationToken,
}

/// Serves until `shutdown` completes, then finishes what is in progress. Gives the number of connections that were
/// still busy when [`Limits::drain`] had passed; these are cut.
///
/// Without `tls` HTTP/2 is spoken to clients that begin with it (prior knowledge).
///
/// The service is called in the connection's task and dropped when the caller hangs up: work that must not stop then
/// belongs into a task of its own.
pub async fn run<S, F>(
    listeners: Listeners,
    tls: Option<Arc<ServerConfig>>,
    limits: Limits,
    service: S,
    shutdown: impl Future<Output = ()>,
) -> usize
where
    S: Fn(Request<Incoming>, ConnInfo) -> F + Send + Sync + 'static,
    F: Future<Output = Response<ReplyBody>> + Send + 'static,
{
    let slots = Arc::new(Semaphore::new(limits.connections_max));
    let drain = limits.drain;
    let connections = TaskTracker::new();
    let shared = Arc::new(Shared {
        tls: tls.map(TlsAcceptor::from),
        limits,
        service,
        stop: CancellationToken::new(),
        kill: CancellationToken::new(),
    });
    let mut shutdown = pin!(shutdown);
    loop {
        tokio::select! {
            biased;
            () = &mut shutdown => break,
            (slot, stream, peer) = next_connection(&listeners, &slots) => {
                let shared = Arc::clone(&shared);
                connections.spawn(async move {
                    connection(&shared, stream, peer).await;
                    drop(slot);
                });
            }
        }
    }
    drop(listeners);
    connections.close();
    shared.stop.cancel();
    let left = match timeout(drain, connections.wait()).await {
        Ok(()) => 0,
        Err(_elapsed) => connections.len(),
    };
    shared.kill.cancel();
    connections.wait().await;
    left
}

/// The slot comes first: a connection that is accepted is served.
async fn next_connection(
    listeners: &Listeners,
    slots: &Arc<Semaphore>,
) -> (OwnedSemaphorePermit, TcpStream, SocketAddr) {
    let slot = match Arc::clone(slots).acquire_owned().await {
        Ok(slot) => slot,
        // The semaphore is never closed; were it, nothing more could be accepted.
        Err(_closed) => std::future::pending().await,
    };
    loop {
        match listeners.accept().await {
            Ok((stream, peer)) => return (slot, stream, peer),
            Err(error) if is_of_one_peer(&error) => {
                tracing::debug!(%error, "a peer left before it was accepted");
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                sleep(Duration::from_millis(ACCEPT_BACKOFF_MS)).await;
            }
        }
    }
}

fn is_of_one_peer(error: &io::Error) -> bool {
    [io::ErrorKind::ConnectionAborted, io::ErrorKind::ConnectionReset, io::ErrorKind::ConnectionRefused]
        .contains(&error.kind())
}

async fn connection<S, F>(shared: &Shared<S>, stream: TcpStream, peer: SocketAddr)
where
    S: Fn(Request<Incoming>, ConnInfo) -> F + Send + Sync + 'static,
    F: Future<Output = Response<ReplyBody>> + Send + 'static,
{
    let Ok(local) = stream.local_addr() else { return };
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "TCP_NODELAY refused");
    }
    let info = ConnInfo { peer, local, tls: shared.tls.is_some() };
    let limits = &shared.limits;
    let Some(tls) = &shared.tls else {
        let begun = before_stop(shared, limits.head_timeout, begins_h2(&stream)).await;
        let stream = Watched::new(stream, limits.write_timeout);
        match begun {
            Some(true) => serve_h2(shared, stream, info).await,
            Some(false) => serve_h1(shared, stream, info).await,
            None => {}
        }
        return;
    };
    let stream = Watched::new(stream, limits.write_timeout);
    let Some(stream) = before_stop(shared, limits.handshake_timeout, tls.accept(stream)).await else {
        return;
    };
    if stream.get_ref().1.alpn_protocol() == Some(b"h2") {
        serve_h2(shared, stream, info).await;
    } else {
        serve_h1(shared, stream, info).await;
    }
}

/// A step before the first request: bounded, and abandoned when the server stops.
async fn before_stop<S, T>(
    shared: &Shared<S>,
    limit: Duration,
    step: impl Future<Output = io::Result<T>>,
) -> Option<T> {
    tokio::select! {
        done = timeout(limit, step) => match done {
            Ok(Ok(done)) => Some(done),
            Ok(Err(error)) => {
                tracing::debug!(%error, "connection ended before its first request");
                None
            }
            Err(_elapsed) => {
                tracing::debug!("peer too slow before its first request");
                None
            }
        },
        () = shared.stop.cancelled() => None,
    }
}

/// Tells from the first bytes, without taking them.
async fn begins_h2(stream: &TcpStream) -> io::Result<bool> {
    let mut first = [0; H2_MARK.len()];
    loop {
        let seen = stream.peek(&mut first).await?;
        if seen == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if first.get(..seen) != H2_MARK.get(..seen) {
            return Ok(false);
        }
        if seen == H2_MARK.len() {
            return Ok(true);
        }
        sleep(Duration::from_millis(SNIFF_PAUSE_MS)).await;
    }
}

async fn serve_h1<S, F, T>(shared: &Shared<S>, stream: T, info: ConnInfo)
where
    S: Fn(Request<Incoming>, ConnInfo) -> F + Send + Sync + 'static,
    F: Future<Output = Response<ReplyBody>> + Send + 'static,
    T: AsyncRead + AsyncWrite + Unpin,
{
    let limits = &shared.limits;
    let head_bytes_max = usize::try_from(limits.head_bytes_max).unwrap_or(usize::MAX);
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.head_timeout)
        .max_header_size(head_bytes_max)
        .max_buf_size(head_bytes_max)
        .max_headers(limits.headers_max)
        .keep_alive(true)
        .half_close(false)
        .serve_connection(TokioIo::new(stream), service_fn(|request| call(shared, request, info)));
    drive(shared, connection, std::future::pending()).await;
}

async fn serve_h2<S, F, T>(shared: &Shared<S>, stream: T, info: ConnInfo)
where
    S: Fn(Request<Incoming>, ConnInfo) -> F + Send + Sync + 'static,
    F: Future<Output = Response<ReplyBody>> + Send + 'static,
    T: AsyncRead + AsyncWrite + Unpin,
{
    let limits = &shared.limits;
    let (busy, idle) = watch::channel(0_usize);
    let busy = Arc::new(busy);
    let connection = http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .max_concurrent_streams(limits.streams_max)
        .max_header_list_size(limits.head_bytes_max)
        .adaptive_window(true)
        .keep_alive_interval(limits.ping_interval)
        .keep_alive_timeout(limits.ping_interval)
        .serve_connection(
            TokioIo::new(stream),
            service_fn(|request| {
                let stream = OpenStream::new(&busy);
                let answering = call(shared, request, info);
                async move {
                    let answer = answering.await;
                    drop(stream);
                    answer
                }
            }),
        );
    drive(shared, connection, idle_for(idle, limits.idle_timeout)).await;
}

/// One open stream of an HTTP/2 connection.
struct OpenStream(Arc<watch::Sender<usize>>);

impl OpenStream {
    fn new(busy: &Arc<watch::Sender<usize>>) -> Self {
        busy.send_modify(|open| *open += 1);
        Self(Arc::clone(busy))
    }
}

impl Drop for OpenStream {
    fn drop(&mut self) {
        self.0.send_modify(|open| *open = open.saturating_sub(1));
    }
}

/// Completes once no stream has been open for `limit`.
async fn idle_for(mut open: watch::Receiver<usize>, limit: Duration) {
    loop {
        if open.wait_for(|open| *open == 0).await.is_err() {
            return;
        }
        tokio::select! {
            () = sleep(limit) => return,
            changed = open.changed() => if changed.is_err() { return },
        }
    }
}

/// A connection of either protocol.
trait Serving: Future<Output = hyper::Result<()>> {
    /// Takes no further request; ends when those in progress are answered.
    fn finish(self: Pin<&mut Self>);
}

impl<T, S, F> Serving for http1::Connection<TokioIo<T>, S>
where
    T: AsyncRead + AsyncWrite + Unpin,
    S: hyper::service::Service<
            Request<Incoming>,
            Response = Response<ReplyBody>,
            Error = Infallible,
            Future = F,
        >,
    F: Future<Output = Result<Response<ReplyBody>, Infallible>>,
{
    fn finish(self: Pin<&mut Self>) {
        self.graceful_shutdown();
    }
}

impl<T, S, F> Serving for http2::Connection<TokioIo<T>, S, TokioExecutor>
where
    T: AsyncRead + AsyncWrite + Unpin,
    S: hyper::service::Service<
            Request<Incoming>,
            Response = Response<ReplyBody>,
            Error = Infallible,
            Future = F,
        >,
    F: Future<Output = Result<Response<ReplyBody>, Infallible>> + Send + 'static,
{
    fn finish(self: Pin<&mut Self>) {
        self.graceful_shutdown();
    }
}

async fn drive<S>(shared: &Shared<S>, connection: impl Serving, idle: impl Future<Output = ()>) {
    let mut connection = pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => Some(ended),
        () = shared.stop.cancelled() => None,
        () = idle => None,
    };
    let ended = if let Some(ended) = ended {
        ended
    } else {
        connection.as_mut().finish();
        tokio::select! {
            ended = connection.as_mut() => ended,
            () = shared.kill.cancelled() => return,
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, cause = ?error.source(), "connection ended");
    }
}

/// Calls the service, and answers in its place when it panics. What it did until then stands. Borrows nothing, because
/// HTTP/2 streams are tasks of their own.
fn call<S, F>(
    shared: &Shared<S>,
    request: Request<Incoming>,
    info: ConnInfo,
) -> impl Future<Output = Result<Response<ReplyBody>, Infallible>> + Send + use<S, F>
where
    S: Fn(Request<Incoming>, ConnInfo) -> F,
    F: Future<Output = Response<ReplyBody>> + Send + 'static,
{
    let called = catch_unwind(AssertUnwindSafe(|| (shared.service)(request, info)));
    async move {
        let answer = match called {
            Ok(answering) => unless_panic(answering).await,
            Err(_panic) => None,
        };
        Ok(answer.unwrap_or_else(|| {
            tracing::error!("a request panicked");
            let mut answer = Response::new(whole(Bytes::new()));
            *answer.status_mut() = StatusCode::INTERNAL_SERVER_ERROR;
            answer
        }))
    }
}

/// `None` when `future` panics; it is not polled again then.
pub async fn unless_panic<F: Future>(future: F) -> Option<F::Output> {
    let mut future = pin!(future);
    poll_fn(|cx| match catch_unwind(AssertUnwindSafe(|| future.as_mut().poll(cx))) {
        Ok(polled) => polled.map(Some),
        Err(_panic) => Poll::Ready(None),
    })
    .await
}

/// Whether a drained body was read to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Drained {
    /// The client has sent everything and will read the answer.
    Whole,
    /// A limit was reached or the client left; an answer now may be lost.
    Partly,
}

/// Reads and drops what is left of a request's body, up to `max_bytes` and for at most `max_time`. Call it before an
/// early refusal such as 413: a server that closes with unread bytes resets the connection, and the client, still
/// writing, never sees the answer.
pub async fn drain_body<B>(body: B, max_bytes: u64, max_time: Duration) -> Drained
where
    B: Body<Data = Bytes>,
{
    let mut body = pin!(body);
    let reading = async {
        let mut left = max_bytes;
        while let Some(frame) = body.frame().await {
            let Ok(frame) = frame else { return Drained::Partly };
            let bytes = frame.data_ref().map_or(0, Bytes::len);
            match left.checked_sub(u64::try_from(bytes).unwrap_or(u64::MAX)) {
                Some(rest) => left = rest,
                None => return Drained::Partly,
            }
        }
        Drained::Whole
    };
    timeout(max_time, reading).await.unwrap_or(Drained::Partly)
}

/// A stream whose writes fail once the peer has taken nothing for a while.
struct Watched<T> {
    stream: T,
    write_timeout: Duration,
    /// Runs while a write waits.
    stalled: Option<Pin<Box<Sleep>>>,
}

impl<T> Watched<T> {
    fn new(stream: T, write_timeout: Duration) -> Self {
        Self { stream, write_timeout, stalled: None }
    }

    fn judge(&mut self, cx: &mut Context<'_>, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if written.is_ready() {
            self.stalled = None;
            return written;
        }
        let limit = self.write_timeout;
        let stalled = self.stalled.get_or_insert_with(|| Box::pin(sleep(limit)));
        ready!(stalled.as_mut().poll(cx));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Watched<T> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_read(cx, buf)
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Watched<T> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = Pin::new(&mut this.stream).poll_write(cx, buf);
        this.judge(cx, written)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = Pin::new(&mut this.stream).poll_write_vectored(cx, bufs);
        this.judge(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    // On a socket neither of these waits; were they to clear the timer, a stalled write would never end.
    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::SystemTime;

    use http_body_util::Empty;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::sync::oneshot;
    use tokio::task::JoinHandle;

    use super::*;

    struct Running {
        address: SocketAddr,
        stop: oneshot::Sender<()>,
        left: JoinHandle<usize>,
    }

    impl Running {
        async fn connect(&self) -> TcpStream {
            TcpStream::connect(self.address).await.unwrap()
        }

        async fn stop(self) -> usize {
            self.stop.send(()).unwrap();
            self.left.await.unwrap()
        }
    }

    fn quick() -> Limits {
        Limits { drain: Duration::from_millis(300), ..Limits::default() }
    }

    /// `/panic` panics, `/slow` takes half a second, `/large` answers 32 MiB, `/drain` refuses after a drain, all else
    /// echoes its path.
    async fn answer(request: Request<Incoming>, info: ConnInfo) -> Response<ReplyBody> {
        let path = request.uri().path().to_owned();
        match path.as_str() {
            "/panic" => panic!("on purpose"),
            "/slow" => sleep(Duration::from_millis(500)).await,
            "/large" => return Response::new(whole(vec![0_u8; 32 << 20])),
            "/drain" => {
                let drained = drain_body(request.into_body(), 8 << 20, Duration::from_secs(5)).await;
                let mut answer = Response::new(whole(format!("{drained:?}")));
                *answer.status_mut() = StatusCode::PAYLOAD_TOO_LARGE;
                return answer;
            }
            _ => {}
        }
        Response::new(whole(format!("{path} tls={}", info.tls)))
    }

    async fn start(tls: Option<Arc<ServerConfig>>, limits: Limits) -> Running {
        let listeners = Listeners::bind(&["127.0.0.1:0".parse().unwrap()]).await.unwrap();
        let address = listeners.addresses().unwrap()[0];
        let (stop, stopped) = oneshot::channel();
        let shutdown = async move {
            let _ = stopped.await;
        };
        let left = tokio::spawn(run(listeners, tls, limits, answer, shutdown));
        Running { address, stop, left }
    }

    async fn exchange(stream: &mut TcpStream, request: &str) -> String {
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut text = Vec::new();
        loop {
            let read = stream.read_buf(&mut text).await.unwrap();
            let so_far = String::from_utf8_lossy(&text).into_owned();
            let whole = so_far.split_once("\r\n\r\n").is_some_and(|(head, body)| {
                let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
                length.is_some_and(|length| body.len() >= length.parse().unwrap())
            });
            if whole || read == 0 {
                return so_far;
            }
        }
    }

    async fn is_closed(stream: &mut TcpStream) -> bool {
        matches!(timeout(Duration::from_secs(3), stream.read(&mut [0; 64])).await, Ok(Ok(0) | Err(_)))
    }

    #[tokio::test]
    async fn a_connection_serves_several_requests() {
        let server = start(None, quick()).await;
        let mut stream = server.connect().await;
        for _ in 0..3 {
            let text = exchange(&mut stream, "GET /x HTTP/1.1\r\nhost: h\r\n\r\n").await;
            assert!(text.starts_with("HTTP/1.1 200 OK\r\n") && text.ends_with("/x tls=false"), "{text}");
        }
        // An idle connection does not hold up the end.
        assert_eq!(server.stop().await, 0);
        assert!(is_closed(&mut stream).await);
    }

    #[tokio::test]
    async fn both_protocols_are_spoken_over_tls() {
        let dir = tempfile::tempdir().unwrap();
        let ca = dir.path().join("ca.pem");
        let source = crate::tls::TlsSource::Auto {
            dir: dir.path().join("tls"),
            names: vec![crate::tls::TlsName::parse("localhost").unwrap()],
            ca_out: Some(ca.clone()),
        };
        #[expect(clippy::disallowed_methods, reason = "the client compares with the machine's clock")]
        let tls = crate::tls::ServerTls::new(source, SystemTime::now()).unwrap();
        let server = start(Some(tls.config()), quick()).await;
        for alpn in ["http/1.1", "h2"] {
            let mut config = crate::tls::client_config(Some(&ca)).unwrap();
            config.alpn_protocols = vec![alpn.as_bytes().to_vec()];
            let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
            let stream =
                connector.connect("localhost".try_into().unwrap(), server.connect().await).await.unwrap();
            assert_eq!(stream.get_ref().1.alpn_protocol(), Some(alpn.as_bytes()));
            let request =
                Request::get("https://localhost/y").header("host", "localhost").body(Empty::<Bytes>::new());
            let request = request.unwrap();
            let response = if alpn == "h2" {
                let (mut sender, connection) =
                    hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
                        .await
                        .unwrap();
                tokio::spawn(connection);
                sender.send_request(request).await.unwrap()
            } else {
                let (mut sender, connection) =
                    hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
                tokio::spawn(connection);
                sender.send_request(request).await.unwrap()
            };
            let body = response.into_body().collect().await.unwrap().to_bytes();
            assert_eq!(body, "/y tls=true");
        }
        assert_eq!(server.stop().await, 0);
    }

    async fn h2_client(server: &Running) -> hyper::client::conn::http2::SendRequest<Empty<Bytes>> {
        let stream = TokioIo::new(server.connect().await);
        let (sender, connection) =
            hyper::client::conn::http2::handshake(TokioExecutor::new(), stream).await.unwrap();
        tokio::spawn(connection);
        sender
    }

    fn h2_get(path: &str) -> Request<Empty<Bytes>> {
        Request::get(format!("http://localhost{path}")).body(Empty::new()).unwrap()
    }

    #[tokio::test]
    async fn plain_http_2_with_prior_knowledge_survives_a_panic() {
        let server = start(None, quick()).await;
        let mut client = h2_client(&server).await;
        let (panicked, fine) =
            tokio::join!(client.clone().send_request(h2_get("/panic")), client.send_request(h2_get("/z")));
        assert_eq!(panicked.unwrap().status(), StatusCode::INTERNAL_SERVER_ERROR);
        assert_eq!(fine.unwrap().status(), StatusCode::OK);
        assert_eq!(server.stop().await, 0);
    }

    #[tokio::test]
    async fn an_idle_http_2_connection_is_closed_and_a_busy_one_is_not() {
        let limits = Limits { idle_timeout: Duration::from_millis(200), ..quick() };
        let server = start(None, limits).await;
        let mut client = h2_client(&server).await;
        let slow = client.send_request(h2_get("/slow")).await.unwrap();
        assert_eq!(slow.status(), StatusCode::OK);
        drop(slow);
        sleep(Duration::from_millis(600)).await;
        assert!(client.is_closed() || client.send_request(h2_get("/x")).await.is_err());
        assert_eq!(server.stop().await, 0);
    }

    #[tokio::test]
    async fn a_panic_is_a_500_and_the_server_lives_on() {
        let server = start(None, quick()).await;
        let mut stream = server.connect().await;
        let text = exchange(&mut stream, "GET /panic HTTP/1.1\r\nhost: h\r\n\r\n").await;
        assert!(text.starts_with("HTTP/1.1 500 "), "{text}");
        let text = exchange(&mut stream, "GET /x HTTP/1.1\r\nhost: h\r\n\r\n").await;
        assert!(text.starts_with("HTTP/1.1 200 "), "{text}");
        assert_eq!(server.stop().await, 0);
    }

    #[tokio::test]
    async fn an_answer_in_progress_is_finished() {
        let server = start(None, Limits { drain: Duration::from_secs(5), ..quick() }).await;
        let mut stream = server.connect().await;
        stream.write_all(b"GET /slow HTTP/1.1\r\nhost: h\r\n\r\n").await.unwrap();
        sleep(Duration::from_millis(100)).await;
        let address = server.address;
        let (left, text) = tokio::join!(server.stop(), exchange(&mut stream, ""));
        assert_eq!(left, 0);
        assert!(text.starts_with("HTTP/1.1 200 ") && text.contains("connection: close"), "{text}");
        assert!(TcpStream::connect(address).await.is_err(), "nothing new is accepted");
    }

    #[tokio::test]
    async fn what_is_not_finished_in_time_is_cut_and_counted() {
        let server = start(None, Limits { drain: Duration::from_millis(50), ..quick() }).await;
        let mut stream = server.connect().await;
        let mut client = h2_client(&server).await;
        stream.write_all(b"GET /slow HTTP/1.1\r\nhost: h\r\n\r\n").await.unwrap();
        let over_h2 = tokio::spawn(async move { client.send_request(h2_get("/slow")).await });
        sleep(Duration::from_millis(100)).await;
        assert_eq!(server.stop().await, 2);
        assert!(is_closed(&mut stream).await);
        assert!(over_h2.await.unwrap().is_err());
    }

    #[tokio::test]
    async fn silence_closes_a_connection() {
        let limits = Limits {
            head_timeout: Duration::from_millis(150),
            handshake_timeout: Duration::from_millis(150),
            ..quick()
        };
        let server = start(None, limits.clone()).await;
        for begin in ["", "P", "GET / HT", "PRI * HTTP/2.0\r\n"] {
            let mut stream = server.connect().await;
            stream.write_all(begin.as_bytes()).await.unwrap();
            if begin.starts_with("PRI") {
                // The HTTP/2 idle limit is the longer one.
                continue;
            }
            assert!(is_closed(&mut stream).await, "{begin:?}");
        }
        let dir = tempfile::tempdir().unwrap();
        let source = crate::tls::TlsSource::Auto {
            dir: dir.path().to_owned(),
            names: vec![crate::tls::TlsName::parse("localhost").unwrap()],
            ca_out: None,
        };
        #[expect(clippy::disallowed_methods, reason = "any time will do")]
        let tls = crate::tls::ServerTls::new(source, SystemTime::now()).unwrap();
        let secure = start(Some(tls.config()), limits).await;
        let mut stream = secure.connect().await;
        assert!(is_closed(&mut stream).await);
        assert_eq!(server.stop().await + secure.stop().await, 0);
    }

    #[tokio::test]
    async fn a_peer_that_reads_nothing_is_dropped() {
        let limits = Limits { write_timeout: Duration::from_millis(200), connections_max: 1, ..quick() };
        let server = start(None, limits).await;
        let mut stalled = server.connect().await;
        stalled.write_all(b"GET /large HTTP/1.1\r\nhost: h\r\n\r\n").await.unwrap();
        // Its slot must come free.
        let mut next = server.connect().await;
        let text = timeout(Duration::from_secs(5), exchange(&mut next, "GET /x HTTP/1.1\r\nhost: h\r\n\r\n"));
        assert!(text.await.unwrap().starts_with("HTTP/1.1 200 "));
        drop(stalled);
        drop(next);
        assert_eq!(server.stop().await, 0);
    }

    #[tokio::test]
    async fn further_connections_wait_for_a_slot() {
        let server = start(None, Limits { connections_max: 1, ..quick() }).await;
        let mut first = server.connect().await;
        exchange(&mut first, "GET /x HTTP/1.1\r\nhost: h\r\n\r\n").await;
        let mut second = server.connect().await;
        let mut waiting = pin!(exchange(&mut second, "GET /y HTTP/1.1\r\nhost: h\r\n\r\n"));
        assert!(timeout(Duration::from_millis(150), &mut waiting).await.is_err());
        drop(first);
        assert!(waiting.await.ends_with("/y tls=false"));
        assert_eq!(server.stop().await, 0);
    }

    #[tokio::test]
    async fn oversized_heads_are_431() {
        let server = start(None, quick()).await;
        let long = format!("GET / HTTP/1.1\r\nhost: h\r\nx: {}\r\n\r\n", "x".repeat(70 << 10));
        let many = format!("GET / HTTP/1.1\r\n{}\r\n", "x: y\r\n".repeat(101));
        for request in [long, many] {
            let mut stream = server.connect().await;
            let text = exchange(&mut stream, &request).await;
            assert!(text.starts_with("HTTP/1.1 431 "), "{text}");
        }
        assert_eq!(server.stop().await, 0);
    }

    #[tokio::test]
    async fn an_early_refusal_reaches_a_client_that_is_still_writing() {
        let server = start(None, quick()).await;
        for _ in 0..10 {
            let mut stream = server.connect().await;
            let head = format!("POST /drain HTTP/1.1\r\nhost: h\r\ncontent-length: {}\r\n\r\n", 4 << 20);
            stream.write_all(head.as_bytes()).await.unwrap();
            stream.write_all(&vec![b'x'; 4 << 20]).await.unwrap();
            let text = exchange(&mut stream, "").await;
            assert!(text.starts_with("HTTP/1.1 413 ") && text.ends_with("Whole"), "{text}");
        }
        assert_eq!(server.stop().await, 0);
    }

    #[tokio::test]
    async fn a_drain_is_bounded() {
        let body = || Full::new(Bytes::from_static(b"0123456789"));
        assert_eq!(drain_body(body(), 10, Duration::from_secs(1)).await, Drained::Whole);
        assert_eq!(drain_body(body(), 9, Duration::from_secs(1)).await, Drained::Partly);
        assert_eq!(drain_body(Silent, 9, Duration::from_millis(20)).await, Drained::Partly);
    }

    /// A body of which nothing ever comes.
    struct Silent;

    impl Body for Silent {
        type Data = Bytes;
        type Error = Infallible;

        fn poll_frame(
            self: Pin<&mut Self>,
            _cx: &mut Context<'_>,
        ) -> Poll<Option<Result<hyper::body::Frame<Bytes>, Infallible>>> {
            Poll::Pending
        }
    }

    #[tokio::test]
    async fn a_lacking_address_is_forgiven_next_to_a_bound_one() {
        // TEST-NET-1 belongs to no machine.
        let lacking: SocketAddr = "192.0.2.1:0".parse().unwrap();
        let present: SocketAddr = "127.0.0.1:0".parse().unwrap();
        let listeners = Listeners::bind(&[lacking, present]).await.unwrap();
        let bound = listeners.addresses().unwrap();
        assert_eq!(bound.len(), 1);
        assert_eq!(Listeners::bind(&[lacking]).await.unwrap_err().address, lacking);
        assert_eq!(Listeners::bind(&[present, bound[0]]).await.unwrap_err().address, bound[0]);
        assert!(Listeners::bind(&[]).await.is_err());
    }

    #[tokio::test]
    async fn every_listener_is_served() {
        let any = "127.0.0.1:0".parse().unwrap();
        let listeners = Listeners::bind(&[any, any]).await.unwrap();
        let addresses = listeners.addresses().unwrap();
        let calls = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&calls);
        let service = move |request, info| {
            counter.fetch_add(1, Ordering::SeqCst);
            answer(request, info)
        };
        let (stop, stopped) = oneshot::channel::<()>();
        let left = tokio::spawn(run(listeners, None, quick(), service, async {
            let _ = stopped.await;
        }));
        for address in addresses {
            let mut stream = TcpStream::connect(address).await.unwrap();
            exchange(&mut stream, "GET /x HTTP/1.1\r\nhost: h\r\n\r\n").await;
        }
        stop.send(()).unwrap();
        assert_eq!((left.await.unwrap(), calls.load(Ordering::SeqCst)), (0, 2));
    }
}
