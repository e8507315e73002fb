//! Ships the audit log to a collector: in order, at least once, from the durable log itself, so that nothing waits for it
//! and nothing is lost with it. A collector that is down for days only makes the backlog longer.
//!
//! The log is the outbox: the shipper reads what lies behind the last record that was acknowledged. It asks the collector
//! what it holds before it sends, because the collector is who knows; what it holds beyond this ledger's own head, or
//! otherwise than this ledger, means that the ledger was restored from an old copy. Money calls are refused then, until an
//! operator accepts the loss: a new chain begins.

use std::io::Write as _;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use flate2::Compression;
use flate2::write::GzEncoder;
use hyper::StatusCode;
use hyper::header::HeaderValue;
use serde_json::{Map, Value};
use tokio::sync::oneshot;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::audit::Sealed;
use crate::id::hex;
use crate::ledger::query::LogState;
use crate::ledger::{Ledger, LedgerError};
use crate::random;
use crate::secret::Secret;
use crate::telemetry::Metrics;
use crate::time::{HOUR_MS, SECOND_MS, UnixMs};

/// Records of one batch.
const BATCH_ROWS_MAX: usize = 500;
/// Bytes of one batch, before it is packed.
const BATCH_BYTES_MAX: usize = 512 << 10;
/// How long records wait for others to travel with.
const AGE_MS: u64 = 500;
/// How long the collector may take for one batch.
const TIMEOUT_S: u64 = 30;
/// The first wait after a failure, and the longest.
const BACKOFF_FIRST_MS: u64 = 500;
const BACKOFF_LAST_MS: u64 = 60_000;
/// How long an answer of the collector does, at most: who else serves the same Stripe account, it tells when it is asked.
const ASK_AGAIN_MS: u64 = HOUR_MS;
/// The same while it knew nothing of this ledger: it could not tell.
const ASK_AGAIN_NEW_MS: u64 = 60 * SECOND_MS;
/// How often the place of the last acknowledged record is written down, while there are any.
const NOTE_EVERY_MS: u64 = 5_000;
/// How long a stopping process goes on to ship what is left.
const LAST_MS: u64 = 1_500;
/// Records that wait, and the age of the oldest, at which an operator is warned.
const BACKLOG_WARN: u64 = 10_000;
const BACKLOG_WARN_MS: u64 = 600_000;
/// The longest answer of a collector, in bytes, and the longest page of records.
const ANSWER_BYTES_MAX: usize = 1 << 20;
const PAGE_BYTES_MAX: usize = 64 << 20;
/// Causes of one error that are told.
const CAUSES_MAX: usize = 8;
/// Characters of an unknown answer that a log line repeats.
const TOLD_CHARS_MAX: usize = 200;

/// How records are sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// To a collector of this program.
    Keybrake,
    /// To any log store: one record a line, and a 2xx takes them.
    Ndjson,
}

/// Where records go.
#[derive(Clone, Debug)]
pub struct Target {
    /// The address, without a slash at its end.
    pub url: String,
    /// The bearer; another one after it was read again.
    pub token: Arc<RwLock<Secret>>,
    /// How.
    pub format: Format,
}

impl Target {
    fn bearer(&self) -> String {
        self.token.read().unwrap_or_else(PoisonError::into_inner).expose().to_owned()
    }

    /// Takes over a bearer that was read again.
    pub fn take_token_of(&self, other: &Self) {
        let fresh = other.token.read().unwrap_or_else(PoisonError::into_inner).clone();
        *self.token.write().unwrap_or_else(PoisonError::into_inner) = fresh;
    }

    /// A request with the bearer.
    pub fn signed(&self, request: reqwest::RequestBuilder) -> reqwest::RequestBuilder {
        request.bearer_auth(self.bearer())
    }
}

/// The way to a collector, whoever is trusted there: another one after that was read again.
#[derive(Clone, Debug)]
pub struct Way(Arc<RwLock<reqwest::Client>>);

impl Way {
    /// A way to whoever these settings trust.
    ///
    /// # Errors
    /// When the client cannot be made.
    pub fn new(tls: rustls::ClientConfig) -> reqwest::Result<Self> {
        Ok(Self(Arc::new(RwLock::new(client(tls)?))))
    }

    /// Trusts others from now on.
    ///
    /// # Errors
    /// When the client cannot be made: the old one stays.
    pub fn trust(&self, tls: rustls::ClientConfig) -> reqwest::Result<()> {
        let fresh = client(tls)?;
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = fresh;
        Ok(())
    }

    fn http(&self) -> reqwest::Client {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// How far the shipping is, for probes and metrics.
#[derive(Debug, Default)]
pub struct Progress(Mutex<Reached>);

#[derive(Clone, Debug, Default)]
struct Reached {
    /// The place of the last record that was acknowledged.
    at: u64,
    trouble: Option<String>,
    beside: Vec<String>,
}

impl Progress {
    fn set(&self, change: impl FnOnce(&mut Reached)) {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner));
    }

    fn reached(&self) -> Reached {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Records that wait, and since when the oldest does.
    pub async fn backlog(&self, ledger: &Ledger) -> (u64, Option<UnixMs>) {
        let found = ledger.read(|reader| {
            let LogState { base, first, last, .. } = reader.log_state()?;
            let at = self.reached().at.max(base).max(first.saturating_sub(1));
            Ok((at, last, reader.records_after(at, 1, 1)?))
        });
        let Ok((at, last, oldest)) = found.await else { return (0, None) };
        (last.saturating_sub(at), oldest.first().and_then(|(_, sealed)| time_of(sealed)))
    }

    /// What an operator should look at. No reason to get no traffic.
    pub async fn warnings(&self, ledger: &Ledger) -> Vec<String> {
        let (reached, (backlog, oldest)) = (self.reached(), self.backlog(ledger).await);
        let mut told = Vec::new();
        let age = oldest.map_or(0, |at| ledger.now().millis_since(at));
        if backlog >= BACKLOG_WARN || age >= BACKLOG_WARN_MS {
            let why = reached.trouble.map(|why| format!(": {why}")).unwrap_or_default();
            told.push(format!(
                "{backlog} audit records wait for the collector, the oldest for {} s{why}",
                age / 1_000
            ));
        }
        if !reached.beside.is_empty() {
            told.push(format!(
                "this Stripe account is served by the ledger of {} too: caps and memory are not shared between them",
                reached.beside.join(", ")
            ));
        }
        told
    }
}

/// The shipper.
#[derive(Debug)]
pub struct Shipper {
    /// The log.
    pub ledger: Ledger,
    /// Where to.
    pub target: Target,
    /// The way there.
    pub way: Way,
    /// How far it is.
    pub progress: Arc<Progress>,
    /// What is counted.
    pub metrics: Metrics,
}

/// Where the shipper is.
#[derive(Debug, Default)]
struct Course {
    /// The place of the last record that was acknowledged; `None` when the collector has to be asked.
    at: Option<u64>,
    /// When it was asked last, and for how long that answer does.
    asked: Option<(UnixMs, u64)>,
}

impl Course {
    /// Whether the last answer is too old. A clock that an operator has set back makes it so, too: nobody knows by how
    /// much.
    fn is_stale(&self, now: UnixMs) -> bool {
        self.asked.is_some_and(|(at, lasts_ms)| now < at || now.millis_since(at) >= lasts_ms)
    }
}

/// What one step came to.
enum Step {
    /// All is acknowledged.
    Idle,
    /// Some was; more waits.
    More,
}

/// Why a step failed.
#[derive(Debug, thiserror::Error)]
enum Trouble {
    #[error("no answer from the collector: {0}")]
    Silent(String),
    #[error("the collector answered {0}: {1}")]
    Refused(StatusCode, String),
    #[error("what answers at COLLECTOR_URL is no collector of this program")]
    Stranger,
    #[error("the log cannot be read or written: {0}")]
    Ledger(#[from] LedgerError),
    #[error("the collector holds what this ledger does not: it was restored from an old copy")]
    Lost,
}

impl Shipper {
    /// Ships until `stop`, and then what is left for a moment. `asked` hears when the collector was first asked, whether
    /// it answered or not.
    pub async fn run(self, stop: CancellationToken, asked: oneshot::Sender<()>) {
        let (mut course, mut unasked) = (Course::default(), Some(asked));
        let (mut failures, mut noted) = (0_u32, Instant::now());
        loop {
            if course.is_stale(self.ledger.now()) {
                course.at = None;
            }
            let result = self.step(&mut course).await;
            if let Some(asked) = unasked.take() {
                // The start may have gone on without.
                let _ = asked.send(());
            }
            let pause_ms = match result {
                Ok(done) => {
                    failures = 0;
                    self.progress.set(|reached| reached.trouble = None);
                    match done {
                        Step::More => 0,
                        Step::Idle => AGE_MS,
                    }
                }
                Err(trouble) => {
                    if failures == 0 {
                        tracing::warn!(%trouble, "audit records cannot be shipped; they wait in the ledger");
                    }
                    failures = failures.saturating_add(1);
                    self.progress.set(|reached| reached.trouble = Some(trouble.to_string()));
                    // What the collector holds may be another now.
                    course.at = course.at.filter(|_| self.target.format == Format::Ndjson);
                    backoff(failures)
                }
            };
            if noted.elapsed() >= Duration::from_millis(NOTE_EVERY_MS) {
                self.note(course.at).await;
                noted = Instant::now();
            }
            let pause = Duration::from_millis(pause_ms);
            if tokio::time::timeout(pause, stop.cancelled()).await.is_ok() {
                break;
            }
        }
        let last = async { while let Ok(Step::More) = self.step(&mut course).await {} };
        // What does not arrive now is in the ledger still.
        let _ = tokio::time::timeout(Duration::from_millis(LAST_MS), last).await;
        self.note(course.at).await;
    }

    /// Writes down what may be deleted by now.
    async fn note(&self, at: Option<u64>) {
        let Some(at) = at else { return };
        if self.ledger.read(|reader| reader.shipped_to()).await.is_ok_and(|noted| noted == at) {
            return;
        }
        if let Err(error) = self.ledger.shipped(at).await {
            tracing::debug!(%error, "how far the log was shipped could not be written; it is asked again");
        }
    }

    /// Sends one batch, after it has asked from where on.
    async fn step(&self, course: &mut Course) -> Result<Step, Trouble> {
        let log = self.ledger.read(|reader| reader.log_state()).await?;
        let from = match course.at {
            Some(from) => from.max(log.base),
            None => self.ask(&log, course).await?,
        };
        course.at = Some(from);
        let from = from.max(log.first.saturating_sub(1));
        let records =
            self.ledger.read(|reader| reader.records_after(from, BATCH_ROWS_MAX, BATCH_BYTES_MAX)).await?;
        self.progress.set(|reached| reached.at = from);
        let Some((last, _)) = records.last() else { return Ok(Step::Idle) };
        let (floor, waiting) = (log.first.saturating_sub(log.base), log.last.saturating_sub(*last));
        let answer = self.send(&records, floor, waiting).await?;
        self.metrics.audit_shipped.inc_by(u64::try_from(records.len()).unwrap_or(0));
        let reached = answer.map_or(*last, |seq| log.base.saturating_add(seq));
        // Of more than there is, the collector has to be asked.
        course.at = Some(reached).filter(|reached| *reached <= log.last);
        self.progress.set(|progress| progress.at = reached.min(log.last));
        Ok(if waiting == 0 { Step::Idle } else { Step::More })
    }

    /// Up to where the collector has this log. A ledger that it knows better is one that was restored.
    async fn ask(&self, log: &LogState, course: &mut Course) -> Result<u64, Trouble> {
        if self.target.format == Format::Ndjson {
            return Ok(self.ledger.read(|reader| reader.shipped_to()).await?.max(log.base));
        }
        if self.ledger.read(|reader| reader.loss()).await?.is_some() {
            return Err(Trouble::Lost);
        }
        let url = format!("{}/collect/v1/chains/{}", self.target.url, log.chain_id);
        let answer = self.answered(self.way.http().get(url)).await?;
        if answer.get("held").is_none() {
            return Err(Trouble::Stranger);
        }
        let beside = answer["beside"].as_array().into_iter().flatten();
        let beside = beside.filter_map(|one| one["node"].as_str().map(str::to_owned)).collect();
        self.progress.set(|reached| reached.beside = beside);
        let held = &answer["held"];
        let lasts_ms = if held.is_null() { ASK_AGAIN_NEW_MS } else { ASK_AGAIN_MS };
        course.asked = Some((self.ledger.now(), spread(lasts_ms)));
        let (Some(seq), Some(hash)) = (held["seq"].as_u64(), held["hash"].as_str()) else {
            return Ok(log.base);
        };
        let place = log.base.saturating_add(seq);
        let own = self.ledger.read(|reader| reader.record_hash(place)).await?;
        let is_dropped = place < log.first;
        if place <= log.last && (own.is_some_and(|own| hex(&own) == hash) || is_dropped) {
            return Ok(place);
        }
        self.lost(seq).await
    }

    async fn lost(&self, seq: u64) -> Result<u64, Trouble> {
        self.ledger.note_loss(seq).await?;
        tracing::error!(
            collector_seq = seq,
            "the collector holds records that this ledger does not have: it was restored from an old copy. Money \
             calls are refused until `keybrake doctor --accept-ledger-loss`"
        );
        Err(Trouble::Lost)
    }

    /// Sends a batch; the last record that the collector then holds, where it tells.
    async fn send(
        &self,
        records: &[(u64, Sealed)],
        floor: u64,
        backlog: u64,
    ) -> Result<Option<u64>, Trouble> {
        let lines: Vec<u8> =
            records.iter().flat_map(|(_, sealed)| [sealed.to_line(), b"\n".to_vec()].concat()).collect();
        let mut packed = GzEncoder::new(Vec::new(), Compression::fast());
        let body = packed.write_all(&lines).and_then(|()| packed.finish());
        let body = body.map_err(|error| Trouble::Silent(error.to_string()))?;
        let post = |url: String| {
            let lines = self.way.http().post(url).header("content-type", "application/x-ndjson");
            lines.header("content-encoding", "gzip").body(body)
        };
        if self.target.format == Format::Ndjson {
            return self.answered(post(self.target.url.clone())).await.map(|_| None);
        }
        let sending = post(format!("{}/collect/v1/batches", self.target.url))
            .header("keybrake-floor", floor)
            .header("keybrake-backlog", backlog);
        match self.answered(sending).await {
            // Whoever answers anything with 200 has not taken them.
            Ok(answer) => answer["seq"].as_u64().map(Some).ok_or(Trouble::Stranger),
            Err(Trouble::Refused(StatusCode::CONFLICT, told)) => {
                let error: Map<String, Value> = serde_json::from_str(&told).unwrap_or_default();
                let number = |name: &str| error.get(name).and_then(Value::as_u64).unwrap_or_default();
                match error.get("code").and_then(Value::as_str) {
                    // It has lost some, or never had them: from there on, as far as they are still here.
                    Some("chain_gap") => Ok(Some(number("next").saturating_sub(1))),
                    Some("chain_forked") => self.lost(number("seq")).await.map(Some),
                    _ => Err(Trouble::Refused(StatusCode::CONFLICT, told)),
                }
            }
            Err(trouble) => Err(trouble),
        }
    }

    /// A JSON answer of 2xx. Of a refusal, the error object is told where there is one.
    async fn answered(&self, request: reqwest::RequestBuilder) -> Result<Value, Trouble> {
        let sending = self.target.signed(request).send();
        let silent = |error: reqwest::Error| Trouble::Silent(why(error));
        let answer = sending.await.map_err(silent)?;
        let status = answer.status();
        let text = text_of(answer, ANSWER_BYTES_MAX).await.map_err(silent)?;
        let body: Value = serde_json::from_str(&text).unwrap_or_default();
        if status.is_success() {
            return Ok(body);
        }
        let told = match body.get("error") {
            Some(error @ Value::Object(_)) => error.to_string(),
            _ => text.chars().take(TOLD_CHARS_MAX).collect(),
        };
        Err(Trouble::Refused(status, told))
    }
}

/// Asks a collector of this program on behalf of who may.
#[derive(Debug)]
pub struct Fleet {
    /// The collector.
    pub target: Target,
    /// The way there.
    pub way: Way,
}

impl Fleet {
    /// One page of records of all nodes, as the collector answers it.
    ///
    /// # Errors
    /// Status and body of a refusal; 503 when no answer comes.
    pub async fn records(
        &self,
        query: &[(String, String)],
        accept: &str,
    ) -> Result<Found, (StatusCode, String)> {
        let silent = |error: reqwest::Error| {
            (StatusCode::SERVICE_UNAVAILABLE, format!("the collector does not answer: {}", why(error)))
        };
        let query = crate::vendor::stripe::form::serialise(query);
        let asked =
            self.way.http().get(format!("{}/audit?{query}", self.target.url)).header("accept", accept);
        let answer = self.target.signed(asked).send().await.map_err(silent)?;
        let (status, headers) = (answer.status(), answer.headers().clone());
        let body = text_of(answer, PAGE_BYTES_MAX).await.map_err(silent)?;
        let header = |name: &str| headers.get(name).cloned();
        if !status.is_success() {
            return Err((status, body));
        }
        Ok(Found { body, kind: header("content-type"), next: header("keybrake-next-cursor") })
    }
}

/// A page as it came.
#[derive(Debug)]
pub struct Found {
    /// A JSON list, or one record a line.
    pub body: String,
    /// Which of the two.
    pub kind: Option<HeaderValue>,
    /// Where the next page begins, of lines.
    pub next: Option<HeaderValue>,
}

/// A client for a collector: nothing is sent on to another host, or through somebody else's proxy.
///
/// # Errors
/// When it cannot be made.
pub fn client(tls: rustls::ClientConfig) -> reqwest::Result<reqwest::Client> {
    reqwest::Client::builder()
        .tls_backend_preconfigured(tls)
        .retry(reqwest::retry::never())
        .redirect(reqwest::redirect::Policy::none())
        .no_proxy()
        .timeout(Duration::from_secs(TIMEOUT_S))
        .build()
}

/// Why no answer came, down to the cause: the outermost error says no more than that.
pub fn why(error: reqwest::Error) -> String {
    let error = error.without_url();
    let causes = std::iter::successors(std::error::Error::source(&error), |cause| cause.source());
    let told: Vec<String> = causes.take(CAUSES_MAX).map(|cause| format!(": {cause}")).collect();
    format!("{error}{}", told.concat())
}

/// An answer's text, cut where it is longer than it may be.
async fn text_of(mut answer: reqwest::Response, bytes_max: usize) -> reqwest::Result<String> {
    let mut bytes = Vec::new();
    while let Some(chunk) = answer.chunk().await? {
        bytes.extend_from_slice(&chunk);
        if bytes.len() > bytes_max {
            break;
        }
    }
    bytes.truncate(bytes_max);
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn time_of(sealed: &Sealed) -> Option<UnixMs> {
    let fields: Map<String, Value> = serde_json::from_slice(&sealed.bytes).ok()?;
    fields.get("at").and_then(Value::as_str).and_then(UnixMs::parse)
}

/// Twice as long each time.
fn backoff(failures: u32) -> u64 {
    spread(BACKOFF_FIRST_MS.saturating_mul(1 << failures.min(16)).min(BACKOFF_LAST_MS))
}

/// From half of a wait to all of it: never at the same moment as the others that the same outage has stopped.
fn spread(full_ms: u64) -> u64 {
    let [random] = random::bytes();
    full_ms / 2 + full_ms / 2 * u64::from(random) / 255
}
