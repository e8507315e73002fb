//! The sidecar put together: opens the ledger, settles the account, listens, and stops in order.

pub mod collector;

use std::future::Future;
use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use anyhow::{Context as _, Result};
use axum::body::Body as AxumBody;
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use hyper::{Request, Response};
use prometheus_client::registry::Registry;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tower::ServiceExt as _;

use crate::account::{self, AccountState, Unsettled};
use crate::admin::{self, Admin};
use crate::clock::ClockWatch;
use crate::config::{self, CollectorConfig, Config};
use crate::disk;
use crate::forward::Forwarder;
use crate::fx::{Book, Table};
use crate::id::{BootId, LedgerId};
use crate::ledger::{Ledger, LedgerError, Opening, Ticked};
use crate::money::MicroUsd;
use crate::ops::Ops;
use crate::proxy::{Proxy, ProxyConfig};
use crate::random;
use crate::recover::Recovery;
use crate::server::{self, Limits, Listeners, ReplyBody};
use crate::ship::{Fleet, Format, Progress, Shipper, Way};
use crate::telemetry::Metrics;
use crate::time::{Clock, UnixMs};
use crate::tls::{self, ServerTls};
use crate::upstream::{Upstream, UpstreamConfig};

/// How long the start waits for Stripe to name the account, and for the collector, before it listens without.
const FIRST_QUESTION_MS: u64 = 3_000;
/// How often the ledger prunes, counts and indexes. Each time keeps the disk and a processor from calls for some
/// milliseconds, less for each call the more of them it takes together; whoever asks the log takes in the rest first.
const TICK_MS: u64 = 5_000;
/// The same where others have the ledger too, which have to hear of this sidecar.
const TICK_FLEET_MS: u64 = 1_000;
/// The pause before the next tick when one left rows whose time has come: the calls that wait come first.
const TICK_AGAIN_MS: u64 = 20;
/// The pause when the audit log's index lags: it leaves the processor to calls, and still follows more than 2,000 records a
/// second.
const TICK_LAGS_MS: u64 = 500;
/// How often the file with the rates of other currencies is looked at: mounted files change without a signal.
const FX_LOOK_MS: u64 = 30_000;
/// How often the certificate's age is looked at.
const RENEW_LOOK_MS: u64 = 3_600_000;
/// Of the drain time, what is kept for ending connections after the work is done.
const DRAIN_TAIL_MS: u64 = 500;

/// How long the end waits for records of reads that are not durable yet: a disk that hangs must not keep a process.
const LAST_WRITE_MS: u64 = 2_000;

/// Why the sidecar did not start, or had to stop.
#[derive(Debug)]
pub enum Stopped {
    /// It may not run as it is configured.
    Misconfigured(String),
    /// Something failed.
    Failed(anyhow::Error),
}

impl From<anyhow::Error> for Stopped {
    fn from(error: anyhow::Error) -> Self {
        Self::Failed(error)
    }
}

impl From<LedgerError> for Stopped {
    fn from(error: LedgerError) -> Self {
        match error {
            LedgerError::BoundElsewhere { .. } | LedgerError::NewerFormat { .. } => {
                Self::Misconfigured(error.to_string())
            }
            LedgerError::Unavailable(_)
            | LedgerError::Corrupt(_)
            | LedgerError::Locked
            | LedgerError::NotFound
            | LedgerError::Lost
            | LedgerError::Contradiction(_) => Self::Failed(error.into()),
        }
    }
}

/// A sidecar that is ready to listen.
struct Sidecar {
    ledger: Ledger,
    forwarder: Arc<Forwarder>,
    account: Arc<AccountState>,
    fx: Arc<Book>,
    proxy: Arc<Proxy>,
    admin: Arc<Admin>,
    ops: Arc<Ops>,
    metrics: Metrics,
    tls: Option<Arc<ServerTls>>,
    /// To the collector.
    way: Option<Way>,
}

/// Runs the sidecar until `shutdown`.
///
/// # Errors
/// [`Stopped`] when it cannot start, or learns that the ledger belongs to another account.
pub async fn run(
    config: Config,
    shutdown: impl Future<Output = ()>,
    reload: impl FnMut() -> Option<Config> + Send + 'static,
    hangup: tokio::sync::mpsc::Receiver<()>,
) -> Result<(), Stopped> {
    let sidecar = build(&config).await?;
    account::recall(&sidecar.account, &sidecar.ledger, &sidecar.forwarder).await?;
    let configured = config.stripe_account.clone();
    let first = account::settle(&sidecar.account, &sidecar.ledger, &sidecar.forwarder, configured.as_deref());
    let settled = match tokio::time::timeout(Duration::from_millis(FIRST_QUESTION_MS), first).await {
        Ok(Err(Unsettled::Elsewhere(error))) => return Err(error.into()),
        Ok(Ok(())) => true,
        Ok(Err(Unsettled::Later(why))) => {
            tracing::warn!(%why, "the Stripe account is not verified yet");
            false
        }
        Err(_) => false,
    };
    let stop = CancellationToken::new();
    spawn_upkeep(&sidecar, &stop);
    spawn_fx_look(&sidecar, &config, &stop);
    spawn_recovery(&sidecar, &stop);
    let shipping = spawn_shipping(&sidecar, &config, &stop).await;
    spawn_reload(&sidecar, &config, reload, hangup, &stop);
    let elsewhere = spawn_settling(&sidecar, configured, settled);
    let listeners = Listeners::bind(&config.listen).await.context("cannot listen (LISTEN)")?;
    let ops_listeners = Listeners::bind(&config.ops_listen).await.context("cannot listen (OPS_LISTEN)")?;
    tracing::info!(
        addresses = ?listeners.addresses().unwrap_or_default(),
        ledger = %sidecar.ledger.id(),
        ready = sidecar.ops.not_ready().await.is_empty(),
        "keybrake is listening"
    );
    let (told, told_elsewhere) = tokio::sync::oneshot::channel();
    let account = Arc::clone(&sidecar.account);
    let asked_to_stop = async move {
        let error = tokio::select! {
            () = shutdown => None,
            error = elsewhere => error,
        };
        account.set_draining();
        let _ = told.send(error);
    };
    serve(&config, &sidecar, listeners, ops_listeners, asked_to_stop, &stop).await;
    if let Some(shipping) = shipping {
        // It ends by itself soon after the stop.
        let _ = shipping.await;
    }
    let close = tokio::time::timeout(Duration::from_millis(LAST_WRITE_MS), sidecar.ledger.close()).await;
    if !matches!(close, Ok(Ok(()))) {
        tracing::warn!("the ledger was not closed; the next start takes in what its write-ahead log holds");
    }
    tracing::info!("keybrake has stopped");
    match told_elsewhere.await {
        Ok(Some(error)) => Err(error.into()),
        Ok(None) | Err(_) => Ok(()),
    }
}

async fn build(config: &Config) -> Result<Sidecar, Stopped> {
    make_private_dir(&config.data_dir)
        .with_context(|| format!("cannot make {}", config.data_dir.display()))?;
    let clock = Clock::System;
    let now = clock.now();
    let ledger = open_ledger(config, &clock, now).await?;
    let tls = match &config.tls {
        Some(source) => {
            let tls = ServerTls::new(source.clone(), wall_clock()).context("TLS cannot be set up")?;
            Some(Arc::new(tls))
        }
        None => None,
    };
    let client =
        tls::client_config(config.stripe_ca_file.as_deref()).context("STRIPE_CA_FILE cannot be used")?;
    let upstream = Upstream::new(UpstreamConfig::new(config.stripe_api_base.clone(), Arc::new(client)));
    let forwarder = Arc::new(Forwarder::new(upstream, config.stripe_secret_key.clone()));
    let account = Arc::new(AccountState::new(config.stripe_mode));
    let watch = Arc::new(ClockWatch::new(clock));
    let metrics = Metrics::default();
    let mut registry = Registry::default();
    metrics.register(&mut registry);
    let fx = Arc::new(Book::new(config.fx.clone()));
    let proxy = Arc::new(Proxy::new(
        ProxyConfig {
            node: config.node.clone(),
            stamp: config.stamp,
            body_bytes_max: config.body_bytes_max,
            upstream_timeout: config.upstream_timeout,
        },
        ledger.clone(),
        Arc::clone(&forwarder),
        Arc::clone(&account),
        metrics.clone(),
        Arc::clone(&fx),
    ));
    tell_rates(&config.fx, now);
    let way = config.collector.as_ref().map(way_to).transpose()?;
    let admin = Arc::new(Admin {
        ledger: ledger.clone(),
        account: Arc::clone(&account),
        clock: Arc::clone(&watch),
        admin_keys: RwLock::new(config.admin_keys.clone()),
        remember_days: u32::from(config.remember_days),
        fleet: fleet_of(config, way.as_ref()),
        metrics: metrics.clone(),
    });
    let shipping = config.collector.as_ref().map(|_| Arc::new(Progress::default()));
    let ops = Arc::new(Ops {
        ledger: ledger.clone(),
        data_dir: config.ledger.is_none().then(|| config.data_dir.clone()),
        account: Arc::clone(&account),
        clock: watch,
        shipping,
        registry,
    });
    Ok(Sidecar { ledger, forwarder, account, fx, proxy, admin, ops, metrics, tls, way })
}

async fn open_ledger(config: &Config, clock: &Clock, now: UnixMs) -> Result<Ledger, LedgerError> {
    let opening = Opening {
        node: config.node.clone(),
        mode: config.stripe_mode,
        clock: clock.clone(),
        boot: BootId::new(now, random::bytes()),
        fresh_id: LedgerId::new(now, random::bytes()),
        fresh_salt: random::bytes(),
        audit_days: u32::from(config.audit_days),
        ships: config.collector.is_some(),
    };
    if let Some(target) = &config.ledger {
        tracing::info!(
            database = target.place(),
            encrypted = target.is_encrypted(),
            "the ledger is in a database"
        );
        let file = config.data_dir.join("keybrake.redb");
        if file.exists() {
            tracing::warn!(
                file = %file.display(),
                "there is a ledger file, which is not used with LEDGER_URL; `keybrake ledger import` takes one into a \
                 schema in which no sidecar has started yet"
            );
        }
        return Ledger::open_postgres(target.clone(), opening).await;
    }
    if config.collector.is_none()
        && let Some(kind) = disk::kind_of(&config.data_dir).filter(|kind| disk::is_fleeting(kind))
    {
        tracing::warn!(
            kind,
            "DATA_DIR goes with this container and there is no collector: keys, caps, the memory of charges and the \
             audit log are lost with it; mount a volume"
        );
    }
    Ledger::open(&config.data_dir.join("keybrake.redb"), opening)
}

/// The way to ask a collector for all nodes.
fn fleet_of(config: &Config, way: Option<&Way>) -> Option<Fleet> {
    let collector = config.collector.as_ref().filter(|one| one.target.format == Format::Keybrake)?;
    Some(Fleet { target: collector.target.clone(), way: way?.clone() })
}

fn way_to(collector: &CollectorConfig) -> Result<Way> {
    let tls = tls::client_config(collector.ca_file.as_deref()).context("COLLECTOR_CA_FILE cannot be used")?;
    Way::new(tls).context("the way to the collector cannot be made")
}

/// Reads again whom to trust on the way to the collector.
fn trust_again(way: &Way, collector: &CollectorConfig) -> Result<()> {
    Ok(way.trust(tls::client_config(collector.ca_file.as_deref())?)?)
}

#[expect(clippy::disallowed_methods, reason = "certificates are dated by the machine's clock")]
fn wall_clock() -> std::time::SystemTime {
    std::time::SystemTime::now()
}

fn make_private_dir(path: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::DirBuilderExt as _;
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// Prunes and indexes the ledger, and renews the certificate, until the process stops.
fn spawn_upkeep(sidecar: &Sidecar, stop: &CancellationToken) {
    let (ledger, stop_ticks) = (sidecar.ledger.clone(), stop.clone());
    let clock = Arc::clone(&sidecar.admin.clock);
    tokio::spawn(async move {
        let usual_ms = if ledger.is_shared() { TICK_FLEET_MS } else { TICK_MS };
        let mut pause_ms = usual_ms;
        while !wait_or_stop(pause_ms, &stop_ticks).await {
            pause_ms = usual_ms;
            // By a clock that jumped forward, what is still needed would be pruned. A database has a clock of its own.
            if clock.jumped().is_some() && !ledger.is_shared() {
                continue;
            }
            match ledger.tick().await {
                Ok(Ticked::Done) => {}
                Ok(Ticked::GoOn) => pause_ms = TICK_AGAIN_MS,
                Ok(Ticked::Lags) => pause_ms = TICK_LAGS_MS,
                Err(error) => tracing::debug!(%error, "a tick of the ledger failed"),
            }
        }
    });
    let (account, forwarder) = (Arc::clone(&sidecar.account), Arc::clone(&sidecar.forwarder));
    let stop_watch = stop.clone();
    tokio::spawn(async move {
        tokio::select! {
            () = stop_watch.cancelled() => {}
            () = account::watch_key(&account, &forwarder) => {}
        }
    });
    let Some(tls) = sidecar.tls.clone() else { return };
    let stop = stop.clone();
    tokio::spawn(async move {
        while !wait_or_stop(RENEW_LOOK_MS, &stop).await {
            match tls.renew(wall_clock()) {
                Ok(true) => tracing::info!("the TLS certificate was renewed"),
                Ok(false) => {}
                Err(error) => tracing::error!(%error, "the TLS certificate cannot be renewed"),
            }
        }
    });
}

/// Asks Stripe what became of doubts and open objects, until the process stops.
fn spawn_recovery(sidecar: &Sidecar, stop: &CancellationToken) {
    let recovery = Recovery {
        ledger: sidecar.ledger.clone(),
        forwarder: Arc::clone(&sidecar.forwarder),
        account: Arc::clone(&sidecar.account),
        fx: Arc::clone(&sidecar.fx),
        metrics: sidecar.metrics.clone(),
    };
    tokio::spawn(recovery.run(stop.clone()));
}

/// Ships audit records to the collector, until the process stops. Waits until it was asked once: that the ledger is an old
/// copy has to be known before the first call.
async fn spawn_shipping(
    sidecar: &Sidecar,
    config: &Config,
    stop: &CancellationToken,
) -> Option<tokio::task::JoinHandle<()>> {
    let (Some(collector), Some(progress), Some(way)) =
        (&config.collector, &sidecar.ops.shipping, &sidecar.way)
    else {
        return None;
    };
    let shipper = Shipper {
        ledger: sidecar.ledger.clone(),
        target: collector.target.clone(),
        way: way.clone(),
        progress: Arc::clone(progress),
        metrics: sidecar.metrics.clone(),
    };
    let (asked, was_asked) = tokio::sync::oneshot::channel();
    let shipping = tokio::spawn(shipper.run(stop.clone(), asked));
    if tokio::time::timeout(Duration::from_millis(FIRST_QUESTION_MS), was_asked).await.is_err() {
        tracing::warn!("the collector does not answer; whether this ledger is its latest is not known yet");
    }
    Some(shipping)
}

/// Takes over the rates of other currencies whenever their file changes.
fn spawn_fx_look(sidecar: &Sidecar, config: &Config, stop: &CancellationToken) {
    let Some(file) = config.fx_file.clone() else { return };
    let (fx, stop, clock) = (Arc::clone(&sidecar.fx), stop.clone(), Clock::System);
    let mut known = Ok(config.fx.clone());
    tokio::spawn(async move {
        while !wait_or_stop(FX_LOOK_MS, &stop).await {
            let read = config::read_fx(&file);
            if read == known {
                continue;
            }
            match &read {
                Ok(table) => {
                    tell_rates(table, clock.now());
                    fx.set(table.clone());
                }
                Err(why) => {
                    tracing::error!(why, "FX_FILE cannot be used; the old rates stay until they are stale");
                }
            }
            known = read;
        }
    });
}

/// What one whole unit counts: a rate that was given for another unit is seen here.
fn tell_rates(table: &Table, now: UnixMs) {
    if table.is_stale(now) {
        tracing::warn!(as_of = table.as_of(), "FX_FILE is too old: calls in its currencies are refused");
    }
    for (currency, micro_usd) in table.units() {
        let usd = MicroUsd::from_micros(micro_usd).to_string();
        tracing::info!(
            currency,
            usd,
            as_of = table.as_of(),
            "one unit of this currency counts so many dollars"
        );
    }
}

async fn wait_or_stop(wait_ms: u64, stop: &CancellationToken) -> bool {
    tokio::time::timeout(Duration::from_millis(wait_ms), stop.cancelled()).await.is_ok()
}

/// On SIGHUP every file is read again: certificates and keys.
fn spawn_reload(
    sidecar: &Sidecar,
    config: &Config,
    mut reload: impl FnMut() -> Option<Config> + Send + 'static,
    mut hangup: tokio::sync::mpsc::Receiver<()>,
    stop: &CancellationToken,
) {
    let stop = stop.clone();
    let (admin, forwarder, tls) =
        (Arc::clone(&sidecar.admin), Arc::clone(&sidecar.forwarder), sidecar.tls.clone());
    let (account, ledger) = (Arc::clone(&sidecar.account), sidecar.ledger.clone());
    let fx = Arc::clone(&sidecar.fx);
    let collector = config.collector.as_ref().map(|collector| collector.target.clone());
    let way = sidecar.way.clone();
    tokio::spawn(async move {
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                hup = hangup.recv() => if hup.is_none() { return },
            }
            let Some(config) = reload() else { continue };
            if config.stripe_mode != account.mode() {
                tracing::error!("the new Stripe key is of another mode; it is not used");
                continue;
            }
            if let Some(Err(error)) = tls.as_ref().map(|tls| tls.reload(wall_clock())) {
                tracing::error!(%error, "the TLS files cannot be read again; the old ones stay");
            }
            if let (Some(running), Some(way), Some(read)) = (&collector, &way, &config.collector) {
                running.take_token_of(&read.target);
                if let Err(error) = trust_again(way, read) {
                    tracing::error!(%error, "COLLECTOR_CA_FILE cannot be read again; the old one stays");
                }
            }
            fx.set(config.fx);
            admin.admin_keys.write().unwrap_or_else(PoisonError::into_inner).clone_from(&config.admin_keys);
            // The old key goes on until the new one is known to be of the same account: not one call may be made under
            // another's.
            let candidate = forwarder.trying(config.stripe_secret_key.clone());
            let refused = account.key_refused();
            let configured = config.stripe_account.as_deref();
            match account::settle(&account, &ledger, &candidate, configured).await {
                Ok(()) => {
                    forwarder.set_key(config.stripe_secret_key);
                    tracing::info!("settings were read again");
                }
                Err(why) => {
                    account.set_key_refused(refused);
                    tracing::error!(?why, "the new Stripe key could not be verified; the old one stays");
                }
            }
        }
    });
}

/// Goes on asking for the account; ends only when the ledger belongs to another one.
fn spawn_settling(
    sidecar: &Sidecar,
    configured: Option<String>,
    settled: bool,
) -> impl Future<Output = Option<LedgerError>> + use<> {
    let (account, ledger) = (Arc::clone(&sidecar.account), sidecar.ledger.clone());
    let forwarder = Arc::clone(&sidecar.forwarder);
    async move {
        if !settled
            && let Some(error) =
                account::settle_patiently(&account, &ledger, &forwarder, configured.as_deref()).await
        {
            return Some(error);
        }
        std::future::pending().await
    }
}

/// Serves until asked to stop, then lets the work in progress end within the drain time.
async fn serve(
    config: &Config,
    sidecar: &Sidecar,
    listeners: Listeners,
    ops_listeners: Listeners,
    asked_to_stop: impl Future<Output = ()>,
    stop: &CancellationToken,
) {
    let limits = Limits { drain: config.drain, ..Limits::default() };
    let ops = Arc::clone(&sidecar.ops);
    let ops_stop = stop.clone();
    let ops_limits = Limits { drain: Duration::from_millis(100), connections_max: 64, ..Limits::default() };
    let ops_server = tokio::spawn(server::run(
        ops_listeners,
        None,
        ops_limits,
        move |request: Request<Incoming>, _| {
            let ops = Arc::clone(&ops);
            async move { ops.answer(request.uri().path()).await }
        },
        async move { ops_stop.cancelled().await },
    ));
    let (proxy, router) = (Arc::clone(&sidecar.proxy), admin::router(Arc::clone(&sidecar.admin)));
    let tls = sidecar.tls.as_ref().map(|tls| tls.config());
    let (began, stop_began) = tokio::sync::oneshot::channel();
    let shutdown = async move {
        asked_to_stop.await;
        let _ = began.send(Instant::now());
    };
    let left = server::run(
        listeners,
        tls,
        limits,
        move |request, _| route(Arc::clone(&proxy), router.clone(), request),
        shutdown,
    )
    .await;
    // Work whose caller has gone may still be waiting for Stripe: its outcome is worth the rest of the time.
    sidecar.proxy.tracker().close();
    let began = stop_began.await.unwrap_or_else(|_| Instant::now());
    let until = began + config.drain.saturating_sub(Duration::from_millis(DRAIN_TAIL_MS));
    let undone = tokio::time::timeout_at(until, sidecar.proxy.tracker().wait()).await.is_err();
    if left > 0 || undone {
        tracing::warn!(
            connections = left,
            calls = sidecar.proxy.tracker().len(),
            "stopping with work in progress; money calls among it are doubts after the next start"
        );
    }
    stop.cancel();
    let _ = ops_server.await;
    // What was answered and is still to be recorded, and to be shipped.
    let flush = tokio::time::timeout(Duration::from_millis(LAST_WRITE_MS), sidecar.ledger.flush()).await;
    if !matches!(flush, Ok(Ok(()))) {
        tracing::error!("the last records of reads could not be written");
    }
}

/// Which part of the program a path belongs to. The proxy is mounted twice: some SDKs cannot keep a base path.
async fn route(proxy: Arc<Proxy>, router: axum::Router, request: Request<Incoming>) -> Response<ReplyBody> {
    let path = request.uri().path();
    let behind = path.strip_prefix("/stripe").filter(|rest| rest.starts_with('/')).unwrap_or(path);
    let proxied = ["/v1/", "/v2/"].iter().any(|mount| behind.starts_with(mount));
    if proxied {
        let behind = behind.to_owned();
        return proxy.handle(request, behind).await;
    }
    let response = match router.oneshot(request.map(AxumBody::new)).await {
        Ok(response) => response,
        Err(never) => match never {},
    };
    response.map(|body| body.map_err(Into::into).boxed_unsync())
}
