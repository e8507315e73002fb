//! The stand-in's sockets: HTTP/1.1 in, and answers that may be late, cut short or never come.

use std::collections::BTreeMap;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Limited};
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::header::{HeaderName, HeaderValue};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::Sleep;

use super::control;
use super::engine::{Engine, Plan, Reply, Seen};
use super::faults::Fault;

/// Larger requests end without an answer.
const BODY_BYTES_MAX: usize = 16 << 20;
/// How long the first half of a body has to leave before the connection is cut.
const HALF_MS: u64 = 30;

pub(crate) async fn serve(listener: TcpListener, engine: Arc<Engine>) {
    loop {
        // An accept fails when descriptors run out; they come back.
        let Ok((stream, _)) = listener.accept().await else {
            tokio::time::sleep(Duration::from_millis(5)).await;
            continue;
        };
        tokio::spawn(connection(stream, Arc::clone(&engine)));
    }
}

async fn connection(stream: TcpStream, engine: Arc<Engine>) {
    let _without = stream.set_nodelay(true);
    let reset = Arc::new(AtomicBool::new(false));
    let wire = Wire { stream, reset: Arc::clone(&reset) };
    let service = service_fn(move |request| {
        let (engine, reset) = (Arc::clone(&engine), Arc::clone(&reset));
        async move { respond(engine, reset, request).await }
    });
    // Its error is what a fault wanted, or the caller's own.
    let _ended =
        hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(wire), service).await;
}

/// How a connection ends without an answer.
#[derive(Clone, Copy)]
enum Cut {
    Close,
    Reset,
}

async fn respond(
    engine: Arc<Engine>,
    reset: Arc<AtomicBool>,
    request: Request<Incoming>,
) -> io::Result<Response<Payload>> {
    let seen = read(request).await?;
    if seen.path.starts_with(control::PREFIX) {
        return Ok(response(control::answer(&engine, &seen), None));
    }
    // A task of its own: what Stripe has begun it ends, also when the caller has hung up.
    let answer = tokio::spawn(async move { answer(&engine, seen).await }).await.map_err(io::Error::other)?;
    answer.map_err(|cut| {
        if matches!(cut, Cut::Reset) {
            reset.store(true, Ordering::SeqCst);
        }
        io::Error::other("the script ends this connection")
    })
}

async fn read(request: Request<Incoming>) -> io::Result<Seen> {
    let (head, body) = request.into_parts();
    let body = Limited::new(body, BODY_BYTES_MAX).collect().await.map_err(io::Error::other)?.to_bytes();
    let mut headers: BTreeMap<String, String> = BTreeMap::new();
    for (name, value) in &head.headers {
        let value = String::from_utf8_lossy(value.as_bytes());
        let all = headers.entry(name.as_str().to_owned()).or_default();
        if !all.is_empty() {
            all.push_str(", ");
        }
        all.push_str(&value);
    }
    Ok(Seen {
        seq: 0,
        at_ms: 0,
        method: head.method.as_str().to_owned(),
        path: head.uri.path().to_owned(),
        query: head.uri.query().unwrap_or_default().to_owned(),
        headers,
        body: String::from_utf8_lossy(&body).into_owned(),
    })
}

async fn answer(engine: &Engine, seen: Seen) -> Result<Response<Payload>, Cut> {
    let mut releases = engine.releases.subscribe();
    let arrival = engine.arrive(seen);
    let fault = arrival.fault.as_ref();
    if matches!(fault, Some(Fault::Reset)) {
        return Err(Cut::Reset);
    }
    let plan = arrival.plan.ok_or(Cut::Close)?;
    wait_ms(engine.latency_ms()).await;
    match fault {
        Some(Fault::SlowMs(ms)) => wait_ms(*ms).await,
        Some(Fault::Hold) => hold(engine, &mut releases).await,
        Some(Fault::Answer { headers, .. }) => {
            wait_ms(headers.get("x-delay-ms").and_then(|ms| ms.parse().ok()).unwrap_or(0)).await;
        }
        _ => {}
    }
    let reply = match plan {
        Plan::Answer(reply) => reply,
        Plan::Execute(task) => engine.execute(arrival.generation, *task, fault).ok_or(Cut::Close)?,
    };
    match fault {
        Some(Fault::SlowAfterMs(ms)) => wait_ms(*ms).await,
        Some(Fault::HoldAfter) => hold(engine, &mut releases).await,
        Some(Fault::DropAfter) => return Err(Cut::Close),
        Some(Fault::ResetAfter) => return Err(Cut::Reset),
        _ => {}
    }
    Ok(response(reply, fault))
}

async fn wait_ms(ms: u64) {
    if ms > 0 {
        tokio::time::sleep(Duration::from_millis(ms)).await;
    }
}

async fn hold(engine: &Engine, releases: &mut tokio::sync::watch::Receiver<u64>) {
    // A release before this point was meant for others.
    releases.mark_unchanged();
    engine.held.fetch_add(1, Ordering::SeqCst);
    let _released = releases.changed().await;
    engine.held.fetch_sub(1, Ordering::SeqCst);
}

fn response(reply: Reply, fault: Option<&Fault>) -> Response<Payload> {
    let (body, cut, status) = match fault {
        Some(Fault::Garbage) => (Bytes::from_static(b"<html>upstream connect error</html>"), false, 200),
        Some(Fault::HalfBody) => (reply.body, true, reply.status),
        _ => (reply.body, false, reply.status),
    };
    let mut response = Response::new(Payload::new(body, cut));
    *response.status_mut() = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    for (name, value) in reply.headers {
        if let (Ok(name), Ok(value)) = (HeaderName::try_from(name), HeaderValue::try_from(value)) {
            response.headers_mut().insert(name, value);
        }
    }
    response
}

/// A body that comes whole, or whose second half never comes.
struct Payload {
    rest: Option<Bytes>,
    /// Bytes still announced.
    announced: u64,
    cut: Option<Pin<Box<Sleep>>>,
}

impl Payload {
    fn new(body: Bytes, cut: bool) -> Self {
        let announced = body.len() as u64;
        let half = if cut { body.slice(..body.len() / 2) } else { body };
        let timer = cut.then(|| Box::pin(tokio::time::sleep(Duration::from_millis(HALF_MS))));
        Self { rest: (!half.is_empty()).then_some(half), announced, cut: timer }
    }
}

impl Body for Payload {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        if let Some(bytes) = self.rest.take() {
            self.announced -= bytes.len() as u64;
            return Poll::Ready(Some(Ok(Frame::data(bytes))));
        }
        // The pause lets hyper flush what it has: an error at once would take the head back as well.
        let Some(timer) = self.cut.as_mut() else { return Poll::Ready(None) };
        ready!(timer.as_mut().poll(context));
        Poll::Ready(Some(Err(io::Error::other("the script cuts this body"))))
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_none() && self.cut.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.announced)
    }
}

/// A stream that can be made to end with a reset.
struct Wire {
    stream: TcpStream,
    reset: Arc<AtomicBool>,
}

impl Drop for Wire {
    fn drop(&mut self) {
        if self.reset.load(Ordering::SeqCst) {
            let _closed_already = self.stream.set_zero_linger();
        }
    }
}

impl AsyncRead for Wire {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Wire {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
