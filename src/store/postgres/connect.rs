//! Makes connections: in one runtime, with TLS as the URL asks for it, and set up the same each time.

use std::sync::Arc;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;

use deadpool_postgres::Connect;
use futures_util::future::{BoxFuture, FutureExt};
use tokio::runtime::Handle;
use tokio::task::JoinHandle;
use tokio_postgres::{Client, Config, Error, SimpleQueryMessage};
use tokio_postgres_rustls::MakeRustlsConnect;

use super::tls;
use crate::{config, store};

/// Everything that a new connection needs.
#[derive(Clone)]
pub(super) struct Connector {
    config: Config,
    tls: MakeRustlsConnect,
    setup: String,
    runtime: Handle,
    origin: Arc<ArcSwap<Origin>>,
}

/// Which database the last connection found, and since when connections find it.
#[derive(Clone, Copy, Debug)]
struct Origin {
    fingerprint: u64,
    since: Instant,
}

impl Connector {
    pub(super) fn new(database: &config::Database) -> anyhow::Result<Self> {
        let (url, verify) = tls::split_mode(database.url.expose());
        let mut config: Config = url.parse()?;
        if config.get_connect_timeout().is_none() {
            config.connect_timeout(Duration::from_secs(2));
        }
        if config.get_application_name().is_none() {
            config.application_name("cache-aside");
        }
        config.keepalives_idle(Duration::from_secs(30)).tcp_user_timeout(Duration::from_secs(10));
        let tls = tls::connector(verify, database.ca_file.as_deref())?;
        // By SET, not as a start-up parameter: connection poolers refuse those. The digits and the form of bytea are
        // part of what is promised; a transaction whose client stalls must not hold its locks for ever.
        let milliseconds = database.statement_timeout.as_millis();
        let setup = format!(
            "SET statement_timeout = {milliseconds}; SET idle_in_transaction_session_timeout = {}; \
             SET bytea_output = 'hex'; SET extra_float_digits = 1; SELECT {}",
            milliseconds + 5_000,
            super::feed::ORIGIN
        );
        let origin = Arc::new(ArcSwap::from_pointee(Origin { fingerprint: 0, since: Instant::now() }));
        Ok(Self { config, tls, setup, runtime: Handle::current(), origin })
    }

    pub(super) fn config(&self) -> &Config {
        &self.config
    }

    pub(super) fn runtime(&self) -> &Handle {
        &self.runtime
    }

    /// What a connection that was made at `created` is connected to; zero where that is not known for sure, because later
    /// connections found something else.
    pub(super) fn origin(&self, created: Instant) -> u64 {
        let origin = self.origin.load();
        if created >= origin.since { origin.fingerprint } else { 0 }
    }

    /// Asks the server to stop working on the client's statement, over a connection of its own.
    pub(super) async fn cancel(&self, client: &Client) {
        if let Err(error) = client.cancel_token().cancel_query(self.tls.clone()).await {
            tracing::debug!(%error, "a statement could not be cancelled");
        }
    }

    /// A connection outside the pool.
    pub(super) async fn open(&self) -> Result<Client, Error> {
        self.connect(&self.config).await.map(|(client, _)| client)
    }
}

impl Connect for Connector {
    fn connect(&self, _: &Config) -> BoxFuture<'_, Result<(Client, JoinHandle<()>), Error>> {
        let (config, tls, setup) = (self.config.clone(), self.tls.clone(), self.setup.clone());
        let known = Arc::clone(&self.origin);
        // Wherever the request came from: a connection dies with the runtime that drives it, and workers end one by one.
        let connecting = async move {
            let since = Instant::now();
            let (client, connection) = config.connect(tls).await?;
            let driver = tokio::spawn(async move {
                if let Err(error) = connection.await {
                    tracing::debug!(%error, "a database connection ended");
                }
            });
            let said = client.simple_query(&setup).await?;
            let text = said.iter().rev().find_map(|message| match message {
                SimpleQueryMessage::Row(row) => row.get(0),
                _ => None,
            });
            let fingerprint = store::origin(text.unwrap_or_default());
            if known.load().fingerprint != fingerprint {
                // Whatever was connected before is another database, or may be.
                known.store(Arc::new(Origin { fingerprint, since }));
            }
            Ok((client, driver))
        };
        // Bounded in here too: whoever waits may give up, and this task would go on.
        let made = self.runtime.spawn(tokio::time::timeout(super::CONNECT, connecting));
        async move {
            match made.await {
                Ok(Ok(outcome)) => outcome,
                // It took too long, or the runtime is shutting down. Whoever waits is bounded by the same time.
                Ok(Err(_)) | Err(_) => std::future::pending().await,
            }
        }
        .boxed()
    }
}
