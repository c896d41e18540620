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
#[derive(Clone, Debug, Default)]
pub(super) struct Origin {
    /// As the database says it; empty where it can't or won't.
    text: String,
    pub(super) fingerprint: u64,
    since: Option<Instant>,
}

impl Origin {
    pub(super) fn text(&self) -> &str {
        &self.text
    }

    /// The timeline of the primary; it stays the same for as long as the server is one.
    pub(super) fn timeline(&self) -> Option<i32> {
        i32::from_str_radix(self.text.split(':').nth(1)?, 16).ok()
    }

    /// Whether a connection that was made at `created` may lead elsewhere than those that were made later.
    pub(super) fn is_former(&self, created: Instant) -> bool {
        self.since.is_some_and(|since| created < since)
    }
}

/// Asks whether the database can say which of its lives this is: only where changes are captured does anybody need to know.
const KNOWS: &str = "SELECT EXISTS (SELECT FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace \
                     WHERE n.nspname = 'cache_aside' AND p.proname = 'origin' \
                     AND has_schema_privilege(n.oid, 'usage') AND has_function_privilege(p.oid, 'execute'))";

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
             SET bytea_output = 'hex'; SET extra_float_digits = 1; {KNOWS}",
            milliseconds + 5_000,
        );
        let origin = Arc::default();
        Ok(Self { config, tls, setup, runtime: Handle::current(), origin })
    }

    pub(super) fn config(&self) -> &Config {
        &self.config
    }

    pub(super) fn tls(&self) -> &MakeRustlsConnect {
        &self.tls
    }

    pub(super) fn runtime(&self) -> &Handle {
        &self.runtime
    }

    /// What connections lead to now.
    pub(super) fn origin(&self) -> Arc<Origin> {
        self.origin.load_full()
    }

    /// The same in words: system, timeline, database, and life.
    pub(super) fn found(&self) -> String {
        self.origin.load().text.clone()
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

    /// The same, and which database it leads to.
    pub(super) async fn open_known(&self) -> Result<(Client, String), Error> {
        let client = self.open().await?;
        let rows = client.query_typed("SELECT cache_aside.origin()", &[]).await?;
        let origin: Option<String> = rows.first().map_or(Ok(None), |row| row.try_get(0))?;
        Ok((client, origin.unwrap_or_default()))
    }
}

/// What the database says of itself; nothing where it can't.
async fn origin(client: &Client) -> String {
    let said = client.simple_query("SELECT cache_aside.origin()").await.unwrap_or_default();
    let text = said.iter().find_map(|message| match message {
        SimpleQueryMessage::Row(row) => row.get(0),
        _ => None,
    });
    text.unwrap_or_default().to_owned()
}

impl Connect for Connector {
    fn connect(&self, _: &Config) -> BoxFuture<'_, Result<(Client, JoinHandle<()>), Error>> {
        let (config, tls, setup) = (self.config.clone(), self.tls.clone(), self.setup.clone());
        let known = Arc::clone(&self.origin);
        // Wherever the request came from: a connection dies with the runtime that drives it, and workers end one by one.
        let connecting = async move {
            let (client, connection) = config.connect(tls).await?;
            let driver = tokio::spawn(async move {
                if let Err(error) = connection.await {
                    tracing::debug!(%error, "a database connection ended");
                }
            });
            let said = client.simple_query(&setup).await?;
            let knows =
                said.iter().any(|message| matches!(message, SimpleQueryMessage::Row(row) if row.get(0) == Some("t")));
            let text = if knows { origin(&client).await } else { String::new() };
            let fingerprint = store::origin(&text);
            if known.load().fingerprint != fingerprint {
                // Whatever was connected before is another database, or may be.
                known.store(Arc::new(Origin { text, fingerprint, since: Some(Instant::now()) }));
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
