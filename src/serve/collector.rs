//! The collector put together: opens its store, listens, and stops in order.

use std::future::Future;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use anyhow::Context as _;
use axum::body::Body as AxumBody;
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use hyper::{Request, Response};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tower::ServiceExt as _;

use super::{RENEW_LOOK_MS, Stopped, make_private_dir, wait_or_stop, wall_clock};
use crate::collect::ops::CollectorOps;
use crate::collect::store::Store;
use crate::collect::{self, BATCHES_AT_ONCE, Collector, file_in, postgres, redb};
use crate::config::CollectConfig;
use crate::server::{self, Limits, Listeners, ReplyBody};
use crate::time::Clock;
use crate::tls::ServerTls;

/// Runs the collector until `shutdown`.
///
/// # Errors
/// [`Stopped`] when it cannot start.
pub async fn run(
    config: CollectConfig,
    shutdown: impl Future<Output = ()>,
    reload: impl FnMut() -> Option<CollectConfig> + Send + 'static,
    hangup: tokio::sync::mpsc::Receiver<()>,
) -> Result<(), Stopped> {
    make_private_dir(&config.data_dir)
        .with_context(|| format!("cannot make {}", config.data_dir.display()))?;
    let store = open(&config).await?;
    let tls = match &config.tls {
        Some(source) => {
            Some(Arc::new(ServerTls::new(source.clone(), wall_clock()).context("TLS cannot be set up")?))
        }
        None => None,
    };
    let collector = Arc::new(Collector {
        store: store.clone(),
        tokens: RwLock::new(config.tokens.clone()),
        query_key: RwLock::new(config.query_key.clone()),
        room: Semaphore::new(BATCHES_AT_ONCE),
        clock: Clock::System,
    });
    let stop = CancellationToken::new();
    spawn_renewal(tls.clone(), &stop);
    spawn_reload(&collector, tls.clone(), reload, hangup, &stop);
    let listeners = Listeners::bind(&config.listen).await.context("cannot listen (COLLECT_LISTEN)")?;
    let ops_listeners =
        Listeners::bind(&config.ops_listen).await.context("cannot listen (COLLECT_OPS_LISTEN)")?;
    tracing::info!(addresses = ?listeners.addresses().unwrap_or_default(), "the collector is listening");
    let ops = Arc::new(CollectorOps { store, clock: Clock::System });
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
    let router = collect::router(collector);
    let limits = Limits { drain: config.drain, ..Limits::default() };
    let left = server::run(
        listeners,
        tls.map(|tls| tls.config()),
        limits,
        move |request, _| route(router.clone(), request),
        shutdown,
    )
    .await;
    if left > 0 {
        tracing::warn!(
            connections = left,
            "stopping with batches in flight; their senders will send them again"
        );
    }
    stop.cancel();
    let _ = ops_server.await;
    tracing::info!("the collector has stopped");
    Ok(())
}

async fn open(config: &CollectConfig) -> Result<Store, anyhow::Error> {
    let days = u32::from(config.days);
    if let Some(target) = &config.database {
        let store = postgres::Store::open(target.clone(), Clock::System, days).await;
        return Ok(Store::Postgres(store.with_context(|| format!("cannot use {}", target.place()))?));
    }
    let store = redb::Store::open(&file_in(&config.data_dir), Clock::System, days);
    let context = || format!("cannot open the store in {}", config.data_dir.display());
    Ok(Store::Redb(store.with_context(context)?))
}

async fn route(router: axum::Router, request: Request<Incoming>) -> Response<ReplyBody> {
    let response = match router.oneshot(request.map(AxumBody::new)).await {
        Ok(response) => response,
        Err(never) => match never {},
    };
    response.map(|body| body.map_err(Into::into).boxed_unsync())
}

fn spawn_renewal(tls: Option<Arc<ServerTls>>, stop: &CancellationToken) {
    let Some(tls) = tls else { return };
    let stop = stop.clone();
    tokio::spawn(async move {
        while !wait_or_stop(RENEW_LOOK_MS, &stop).await {
            if let Err(error) = tls.renew(wall_clock()) {
                tracing::error!(%error, "the TLS certificate cannot be renewed");
            }
        }
    });
}

/// On SIGHUP tokens, keys and certificates are read again.
fn spawn_reload(
    collector: &Arc<Collector>,
    tls: Option<Arc<ServerTls>>,
    mut reload: impl FnMut() -> Option<CollectConfig> + Send + 'static,
    mut hangup: tokio::sync::mpsc::Receiver<()>,
    stop: &CancellationToken,
) {
    let (collector, stop) = (Arc::clone(collector), stop.clone());
    tokio::spawn(async move {
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                hup = hangup.recv() => if hup.is_none() { return },
            }
            let Some(config) = reload() else { continue };
            if let Some(Err(error)) = tls.as_ref().map(|tls| tls.reload(wall_clock())) {
                tracing::error!(%error, "the TLS files cannot be read again; the old ones stay");
            }
            *collector.tokens.write().unwrap_or_else(PoisonError::into_inner) = config.tokens;
            *collector.query_key.write().unwrap_or_else(PoisonError::into_inner) = config.query_key;
            if let (Store::Postgres(store), Some(target)) = (&collector.store, config.database) {
                store.turn_to(target);
            }
            tracing::info!("settings were read again");
        }
    });
}
