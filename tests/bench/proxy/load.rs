//! The load: one target, one kind of call, one way of arriving, for a while.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::Request;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::sync::{Barrier, Semaphore, oneshot};
use tokio::task::JoinSet;
use tokio_rustls::TlsConnector;

/// How long one call may take before the target counts as hung.
const PATIENCE: Duration = Duration::from_secs(30);
/// Calls on each kept connection before those that are measured.
const WARM_UP: usize = 5;
/// Kept connections that an open loop may use at once. Whoever finds none waits, and that wait is counted.
const OPEN_CONNECTIONS: usize = 64;
/// The least number of calls of an open loop, so that its 99th percentile is one.
const OPEN_CALLS_MIN: u32 = 200;
/// A sleeping thread wakes late: the last bit before a scheduled call is waited for awake.
const AWAKE: Duration = Duration::from_micros(150);

/// What is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Call {
    /// A charge under an idempotency key of its own.
    Charge,
    /// A look at one.
    Get,
}

/// How calls arrive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Arrival {
    /// The next when the last is answered, on so many kept connections.
    Kept(usize),
    /// At a rate per second, whatever the answers do.
    Open(u32),
    /// Like `Kept`, each on a connection of its own.
    Fresh(usize),
}

/// Whom to ask, and as whom.
#[derive(Clone)]
pub(crate) struct Target {
    pub(crate) addr: SocketAddr,
    pub(crate) tls: Option<TlsConnector>,
    /// Bearers, dealt out to connections: one vault key alone would meet its rate.
    pub(crate) bearers: Arc<Vec<String>>,
}

/// What came of it.
#[derive(Debug, Default)]
pub(crate) struct Pass {
    /// Of the measured calls, ascending.
    pub(crate) latencies: Vec<Duration>,
    pub(crate) elapsed: Duration,
    /// All calls, those before the measured ones too.
    pub(crate) sent: usize,
}

/// Makes a number that no other call of this process has.
fn fresh_number() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

struct Connection {
    sender: http1::SendRequest<Full<Bytes>>,
    bearer: String,
}

impl Target {
    async fn connect(&self, number: usize) -> Result<Connection> {
        let stream = TcpStream::connect(self.addr).await.context("connecting")?;
        stream.set_nodelay(true)?;
        let bearer = self.bearers[number % self.bearers.len()].clone();
        let sender = match &self.tls {
            None => start(stream).await?,
            Some(tls) => {
                start(tls.connect("localhost".try_into()?, stream).await.context("the TLS handshake")?)
                    .await?
            }
        };
        Ok(Connection { sender, bearer })
    }
}

async fn start<S>(stream: S) -> Result<http1::SendRequest<Full<Bytes>>>
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
{
    let (sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    // An error ends the call that waits for its answer.
    tokio::spawn(connection);
    Ok(sender)
}

impl Connection {
    async fn call(&mut self, call: Call) -> Result<()> {
        let number = fresh_number();
        let builder = Request::builder().header("host", "localhost");
        let builder = builder.header("authorization", format!("Bearer {}", self.bearer));
        let request = match call {
            Call::Charge => builder
                .method("POST")
                .uri("/v1/charges")
                .header("content-type", "application/x-www-form-urlencoded")
                .header("idempotency-key", format!("billing:bench:{number}"))
                .body(Full::new(Bytes::from_static(
                    b"amount=100&currency=usd&customer=cus_9&source=tok_visa&description=billing+run",
                )))?,
            Call::Get => {
                builder.uri(format!("/v1/charges/ch_1PGet{number:014}")).body(Full::new(Bytes::new()))?
            }
        };
        tokio::time::timeout(PATIENCE, self.answered(request)).await.context("no answer in time")?
    }

    async fn answered(&mut self, request: Request<Full<Bytes>>) -> Result<()> {
        self.sender.ready().await?;
        let answer = self.sender.send_request(request).await?;
        let (status, body) = (answer.status(), answer.into_body().collect().await?.to_bytes());
        ensure!(status == 200, "answered {status}: {}", String::from_utf8_lossy(&body));
        Ok(())
    }
}

/// Asks for a while. `before` runs when everybody is connected and warm.
pub(crate) async fn pass(
    target: &Target,
    call: Call,
    arrival: Arrival,
    lasting: Duration,
    before: impl FnOnce(),
) -> Result<Pass> {
    match arrival {
        Arrival::Kept(connections) => closed(target, call, connections, true, lasting, before).await,
        Arrival::Fresh(at_once) => closed(target, call, at_once, false, lasting, before).await,
        Arrival::Open(rate) => open(target, call, rate, lasting, before).await,
    }
}

/// So many charges, one after the other, each of the first after a read; nothing is measured.
pub(crate) async fn calls(target: &Target, charges: usize, reads: usize) -> Result<()> {
    let mut connection = target.connect(0).await?;
    for number in 0..charges {
        if number < reads {
            connection.call(Call::Get).await?;
        }
        connection.call(Call::Charge).await?;
    }
    Ok(())
}

async fn closed(
    target: &Target,
    call: Call,
    callers: usize,
    keep: bool,
    lasting: Duration,
    before: impl FnOnce(),
) -> Result<Pass> {
    // Twice: everybody is warm, and the caller has looked at the clocks.
    let barrier = Arc::new(Barrier::new(callers + 1));
    let mut tasks = JoinSet::new();
    for number in 0..callers {
        let (target, barrier) = (target.clone(), Arc::clone(&barrier));
        tasks.spawn(async move {
            let mut connection = target.connect(number).await?;
            for _ in 0..WARM_UP {
                connection.call(call).await?;
            }
            barrier.wait().await;
            barrier.wait().await;
            let (begun, mut took) = (Instant::now(), Vec::new());
            while begun.elapsed() < lasting {
                let sent = Instant::now();
                if !keep {
                    drop(connection);
                    connection = target.connect(number).await?;
                }
                connection.call(call).await?;
                took.push(sent.elapsed());
            }
            Ok::<_, anyhow::Error>(took)
        });
    }
    // A caller that failed before the barrier would be waited for in vain.
    tokio::select! {
        _ = barrier.wait() => {}
        Some(failed) = tasks.join_next() => {
            failed??;
        }
    }
    before();
    let begun = Instant::now();
    barrier.wait().await;
    let mut pass = Pass::default();
    while let Some(took) = tasks.join_next().await {
        pass.latencies.extend(took??);
    }
    pass.elapsed = begun.elapsed();
    pass.sent = pass.latencies.len() + callers * WARM_UP;
    pass.latencies.sort_unstable();
    Ok(pass)
}

/// The kept connections of an open loop.
struct Idle {
    connections: Mutex<Vec<Connection>>,
    free: Semaphore,
}

impl Idle {
    async fn call(&self, call: Call) -> Result<()> {
        let _permit = self.free.acquire().await?;
        let taken = self.connections.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let mut connection = taken.context("a permit without a connection")?;
        connection.call(call).await?;
        self.connections.lock().unwrap_or_else(PoisonError::into_inner).push(connection);
        Ok(())
    }
}

async fn open(
    target: &Target,
    call: Call,
    rate: u32,
    lasting: Duration,
    before: impl FnOnce(),
) -> Result<Pass> {
    let mut connections = Vec::new();
    for number in 0..OPEN_CONNECTIONS {
        let mut connection = target.connect(number).await?;
        connection.call(call).await?;
        connections.push(connection);
    }
    let idle =
        Arc::new(Idle { connections: Mutex::new(connections), free: Semaphore::new(OPEN_CONNECTIONS) });
    let interval = Duration::from_secs(1) / rate;
    let count = u32::try_from(lasting.as_nanos() / interval.as_nanos())?.max(OPEN_CALLS_MIN);
    before();
    let begun = Instant::now();
    let (told, tasks) = oneshot::channel();
    let runtime = tokio::runtime::Handle::current();
    // Not a timer of the runtime, which knows whole milliseconds only.
    std::thread::spawn(move || {
        let mut tasks = Vec::new();
        for number in 0..count {
            let scheduled = begun + interval * number;
            std::thread::sleep(scheduled.saturating_duration_since(Instant::now() + AWAKE));
            while Instant::now() < scheduled {
                std::hint::spin_loop();
            }
            let idle = Arc::clone(&idle);
            tasks.push(runtime.spawn(async move {
                idle.call(call).await?;
                // From when it should have left: what queued up behind a slow answer was late, too.
                Ok::<_, anyhow::Error>(scheduled.elapsed())
            }));
        }
        // Nobody listens any more when the benchmark ends early.
        let _ = told.send(tasks);
    });
    let mut pass = Pass::default();
    for task in tasks.await? {
        pass.latencies.push(task.await??);
    }
    pass.elapsed = begun.elapsed();
    pass.sent = pass.latencies.len() + OPEN_CONNECTIONS;
    pass.latencies.sort_unstable();
    Ok(pass)
}
