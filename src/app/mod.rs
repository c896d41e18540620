//! The composition root: configuration → cache and store → the heart → the server; and the order in which all that ends.

mod bind;

use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use actix_web::dev::{Server, ServerHandle};
use actix_web::middleware::Condition;
use actix_web::{App as Service, HttpServer, web};
use anyhow::Context;
use arc_swap::ArcSwap;
use tokio::signal::unix::{SignalKind, signal};

pub use bind::look;

use crate::aside::{Aside, Limits};
use crate::cache::AnyCache;
use crate::cache::memory::MemoryCache;
use crate::cache::redis::RedisCache;
use crate::catalog::{Catalog, Policy};
use crate::config::{Config, InvalidationMode};
use crate::http::{self, Front, Gate, Health, Settings};
use crate::invalidation::{Pace, Rounds};
use crate::store::AnyStore;
use crate::store::mysql::MysqlStore;
use crate::store::postgres::{Decoder, PostgresStore};
use crate::store::sqlite::SqliteStore;
use crate::telemetry::Metrics;

/// Longer than load balancers keep idle connections, so that they close them and never write into one that just closed.
const KEEP_ALIVE: Duration = Duration::from_mins(2);

/// A service that is built and listens, but does not answer yet.
pub struct App {
    servers: Vec<Server>,
    addresses: Vec<SocketAddr>,
    front: Front,
    drain_delay: Duration,
    config: Arc<Config>,
}

/// The cache that a URL names.
///
/// # Errors
///
/// A URL or certificate that can't be used.
pub fn open_cache(config: &Config) -> anyhow::Result<AnyCache> {
    let (cache, watermark) = (&config.cache, config.watermark());
    Ok(match cache.url.scheme() {
        "memory" => AnyCache::Memory(MemoryCache::new(cache.local.max_bytes, cache.max_entry, watermark)),
        _ => AnyCache::Redis(
            RedisCache::new(cache, watermark, config.holds_in_process()).context("cache.url can't be used")?,
        ),
    })
}

/// The database that a URL names.
///
/// # Errors
///
/// A URL or certificate that can't be used.
pub fn open_store(config: &Config) -> anyhow::Result<AnyStore> {
    let (database, mode) = (&config.database, config.invalidation.mode);
    Ok(match database.url.scheme() {
        "mysql" | "mariadb" => AnyStore::Mysql(MysqlStore::new(database).context("database.url can't be used")?),
        "sqlite" => AnyStore::Sqlite(SqliteStore::new(database).context("database.url can't be used")?),
        _ => AnyStore::Postgres(PostgresStore::new(database, mode).context("database.url can't be used")?),
    })
}

impl App {
    /// Builds the service around a store and a cache and binds its ports. Must run in a multi-threaded runtime, which
    /// then does all work but that of requests that hit.
    ///
    /// # Errors
    ///
    /// Ports that can't be bound.
    pub fn build(config: Config, store: AnyStore, cache: AnyCache) -> anyhow::Result<Self> {
        let metrics = Arc::new(Metrics::new()?);
        let queries = config.queries.keys().map(|name| format!("query:{name}"));
        for name in config.resources.keys().cloned().chain(queries) {
            // Known from the first scrape on.
            drop(metrics.resource(&name));
        }
        let limits = Limits {
            max_entry: config.cache.max_entry,
            wait: config.database.statement_timeout + Duration::from_millis(500),
            audit_ratio: config.telemetry.audit_ratio,
            max_staleness: config.invalidation.max_staleness,
            hold: config.database.statement_timeout + Duration::from_secs(5),
        };
        let server = &config.server;
        let front = Front {
            aside: Aside::new(cache, store, limits, metrics),
            catalog: Arc::new(ArcSwap::from_pointee(Catalog::unseen(&config))),
            gate: Arc::new(Gate::new(config.access.clone())),
            settings: Arc::new(Settings {
                request_timeout: server.request_timeout,
                max_body: server.max_body,
                ad_hoc: Policy::new(&config.defaults),
                key_prefix: config.cache.key_prefix.clone(),
                max_batch: server.max_batch,
                not_built_yet: config.not_built_yet(),
            }),
            health: Arc::new(Health::default()),
        };
        let management = server.management_listen.filter(|address| *address != server.listen);
        let mut servers = Vec::new();
        let mut addresses = Vec::new();
        let listener = listen(server.listen)?;
        addresses.push(listener.local_addr()?);
        let origins = server.cors_origins.clone();
        let attached = front.clone();
        let api = HttpServer::new(move || {
            // Here, in the worker's own runtime: its replies from the cache wake no other thread.
            let front = web::Data::new(Front { aside: attached.aside.attach(), ..attached.clone() });
            let cors = cors(&origins);
            Service::new()
                .wrap(Condition::new(!origins.is_empty(), cors))
                .configure(http::api(&front, management.is_none()))
        });
        let grace = server.shutdown_timeout.as_secs().max(1);
        servers.push(api.keep_alive(KEEP_ALIVE).disable_signals().shutdown_timeout(grace).listen(listener)?.run());
        if let Some(address) = management {
            let listener = listen(address)?;
            addresses.push(listener.local_addr()?);
            let front = front.clone();
            let management =
                HttpServer::new(move || Service::new().configure(http::management(&web::Data::new(front.clone()))));
            let management = management.workers(1).disable_signals().shutdown_timeout(grace);
            servers.push(management.listen(listener)?.run());
        }
        let drain_delay = config.server.drain_delay;
        Ok(Self { servers, addresses, front, drain_delay, config: Arc::new(config) })
    }

    /// The address of the API and, where it has one of its own, of the management side.
    #[must_use]
    pub fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    /// Serves until SIGTERM or SIGINT, and then until everything that was accepted is answered.
    ///
    /// # Errors
    ///
    /// A server that fails.
    pub async fn run_until_stopped(self) -> anyhow::Result<()> {
        let front = self.front;
        let mut watches = vec![
            tokio::spawn(bind::watch_catalog(front.clone(), Arc::clone(&self.config))),
            tokio::spawn(bind::watch_database(front.clone())),
            tokio::spawn({
                let metrics = Arc::clone(front.aside.metrics());
                async move { metrics.sample().await }
            }),
            tokio::spawn(watch_staleness(front.clone())),
        ];
        if let Some(rounds) = rounds(&front, &self.config) {
            watches.push(tokio::spawn(rounds.run()));
        }
        if let (InvalidationMode::Wal, AnyStore::Postgres(store)) = (self.config.invalidation.mode, front.aside.store())
        {
            let decoder = Decoder::new(store.clone(), Arc::clone(front.aside.metrics()));
            watches.push(tokio::spawn(decoder.run()));
        }
        for missing in &front.settings.not_built_yet {
            tracing::warn!("{missing}");
        }
        let handles: Vec<ServerHandle> = self.servers.iter().map(Server::handle).collect();
        let servers: Vec<_> = self.servers.into_iter().map(tokio::spawn).collect();
        let drain = tokio::spawn(drain(front.health, handles, self.drain_delay));
        for server in servers {
            server.await??;
        }
        drain.abort();
        front.aside.settle(self.config.server.shutdown_timeout).await;
        watches.iter().for_each(tokio::task::JoinHandle::abort);
        tracing::info!("stopped");
        Ok(())
    }
}

/// What keeps the cache current, where somebody is to.
fn rounds(front: &Front, config: &Config) -> Option<Rounds> {
    let (max_staleness, node) = (config.watermark()?, front.aside.cache().node()?);
    let pace = Pace::new(max_staleness);
    let feed = front.aside.store().feed(pace.patience)?;
    Some(Rounds::new(node, feed, pace, Arc::clone(front.aside.metrics()), Arc::clone(&front.health.rounds)))
}

/// Tells in metrics how far behind the cache may be, and for how long nobody knew.
async fn watch_staleness(front: Front) {
    const STEP: Duration = Duration::from_millis(100);
    let (cache, metrics) = (front.aside.cache(), front.aside.metrics());
    let node = cache.address();
    metrics.untrusted(node, Duration::ZERO);
    let mut before = std::time::Instant::now();
    loop {
        tokio::time::sleep(STEP).await;
        let passed = before.elapsed();
        before = std::time::Instant::now();
        if cache.health().is_err() {
            metrics.untrusted(node, passed);
        }
        #[expect(clippy::cast_precision_loss, reason = "milliseconds, shown to people")]
        metrics.staleness(node, cache.staleness().map(|milliseconds| milliseconds as f64 / 1000.0));
    }
}

fn listen(address: SocketAddr) -> anyhow::Result<TcpListener> {
    let listener = TcpListener::bind(address).with_context(|| format!("{address} can't be listened on"))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

fn cors(origins: &[String]) -> actix_cors::Cors {
    let base = actix_cors::Cors::default()
        .allowed_methods(["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"])
        .allowed_headers([
            "authorization",
            "cache-control",
            "content-type",
            "if-match",
            "if-none-match",
            "x-request-id",
        ])
        .expose_headers(["age", "cache-status", "etag", "location", "server-timing", "x-request-id"])
        .max_age(600);
    origins.iter().fold(base, |cors, origin| {
        if origin == "*" { cors.allow_any_origin().send_wildcard() } else { cors.allowed_origin(origin) }
    })
}

/// SIGTERM: unready first, still accepting until load balancers know, then no new connections, then the end of those
/// under way. A second signal cuts it short.
async fn drain(health: Arc<Health>, servers: Vec<ServerHandle>, delay: Duration) -> anyhow::Result<()> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tracing::info!(delay_seconds = delay.as_secs_f64(), "stopping: not ready any more, still accepting");
    health.draining.store(true, Ordering::Relaxed);
    tokio::select! {
        () = tokio::time::sleep(delay) => {}
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tracing::info!("stopping: answering what was accepted");
    let all = futures_util::future::join_all(servers.iter().map(|server| server.stop(true)));
    tokio::select! {
        _ = all => {}
        _ = interrupt.recv() => {
            futures_util::future::join_all(servers.iter().map(|server| server.stop(false))).await;
        }
    }
    Ok(())
}
