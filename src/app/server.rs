//! The service: HTTP servers over what is served, and the order in which all that ends.

use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use actix_web::dev::{Server, ServerHandle};
use actix_web::middleware::Condition;
use actix_web::{App as Service, HttpServer, web};
use anyhow::Context;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::task::AbortOnDropHandle;

use super::door::{BACKLOG, Door, GOODBYE, KEEP_ALIVE};
use super::start::{self, Starting};
use super::{Watches, serve};
use crate::cache::AnyCache;
use crate::catalog::Policy;
use crate::config::Config;
use crate::http::{self, Front, Gate, Settings, Underway};
use crate::served::{Health, Served};
use crate::store::AnyStore;
use crate::telemetry::Metrics;

/// Connections to the management side.
const MANAGEMENT: usize = 128;

/// A service that is built and listens, but does not answer yet.
pub struct App {
    servers: Vec<Server>,
    addresses: Vec<SocketAddr>,
    front: Front,
    drain_delay: Duration,
    config: Arc<Config>,
    /// There is something to be done before it is ready.
    starting: Option<Starting>,
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
        let Served { aside, catalog, health } = serve(&config, store, cache, metrics);
        let starting = config.cache.local.warm_start.then(|| Starting::begin(&health));
        let server = &config.server;
        let front = Front {
            aside,
            catalog,
            gate: Arc::new(Gate::new(config.access.clone())),
            settings: Arc::new(Settings {
                request_timeout: server.request_timeout,
                max_body: server.max_body,
                ad_hoc: Policy::new(&config.defaults),
                key_prefix: config.cache.key_prefix.clone(),
                max_batch: server.max_batch,
                not_built_yet: config.not_built_yet(),
            }),
            health,
            underway: Underway::new(config.database.pool_size),
            bodies: http::room(server.max_body),
        };
        let workers = std::thread::available_parallelism().map_or(1, usize::from);
        let door = Door::new(server, config.database.pool_size, workers);
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
        // A client that closes its side has hung up, as for most servers: what it waited for is given up where that is safe.
        let api = api.workers(workers).max_connections(door.per_worker).h1_allow_half_closed(false);
        let api = api.keep_alive(KEEP_ALIVE).client_request_timeout(door.head).client_disconnect_timeout(GOODBYE);
        let api = api.tcp_nodelay(true).on_connect(move |connection, _| door.connected(connection));
        servers.push(api.disable_signals().shutdown_timeout(grace).listen(listener)?.run());
        if let Some(address) = management {
            let listener = listen(address)?;
            addresses.push(listener.local_addr()?);
            let front = front.clone();
            let management =
                HttpServer::new(move || Service::new().configure(http::management(&web::Data::new(front.clone()))));
            // Whoever may come here is known, and must get through whatever goes on at the other port.
            let management = management.workers(1).max_connections(MANAGEMENT).h1_allow_half_closed(false);
            let management = management.client_request_timeout(door.head).client_disconnect_timeout(GOODBYE);
            let management = management.tcp_nodelay(true).on_connect(move |connection, _| door.connected(connection));
            servers.push(management.disable_signals().shutdown_timeout(grace).listen(listener)?.run());
        }
        let drain_delay = config.server.drain_delay;
        Ok(Self { servers, addresses, front, drain_delay, config: Arc::new(config), starting })
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
        let served = Served {
            aside: front.aside.clone(),
            catalog: Arc::clone(&front.catalog),
            health: Arc::clone(&front.health),
        };
        let metrics = Arc::clone(front.aside.metrics());
        let ratios = tokio::spawn(async move { metrics.sample().await });
        let watches = Watches::start(&served, &self.config);
        let start = self.starting.map(|starting| AbortOnDropHandle::new(tokio::spawn(start::watch(served, starting))));
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
        drop(watches);
        drop(start);
        ratios.abort();
        tracing::info!("stopped");
        Ok(())
    }
}

fn listen(address: SocketAddr) -> anyhow::Result<TcpListener> {
    let listener = TcpListener::bind(address).with_context(|| format!("{address} can't be listened on"))?;
    listener.set_nonblocking(true)?;
    // Again, for a longer queue than the standard library's.
    rustix::net::listen(&listener, BACKLOG)?;
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
