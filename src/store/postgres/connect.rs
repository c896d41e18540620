//! Makes connections: in one runtime, with TLS as the URL asks for it, and set up the same each time.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;

use deadpool_postgres::Connect;
use futures_util::future::{BoxFuture, FutureExt};
use tokio::runtime::Handle;
use tokio::task::JoinHandle;
use tokio_postgres::{Client, Config, Error, SimpleQueryMessage};
use tokio_postgres_rustls::MakeRustlsConnect;
use tokio_util::task::AbortOnDropHandle;

use super::tls;
use crate::{config, store};

/// The most that making a connection may take.
pub(super) const CONNECT: Duration = Duration::from_secs(5);

/// Everything that a new connection needs.
#[derive(Clone)]
pub(super) struct Connector {
    config: Config,
    tls: MakeRustlsConnect,
    setup: String,
    runtime: Handle,
    origin: Arc<ArcSwap<Origin>>,
    /// Connections that were made beforehand, for the next who would have to make one.
    spares: Arc<Mutex<Vec<Found>>>,
}

/// A connection that is set up, and which database it leads to.
struct Found {
    client: Client,
    driver: JoinHandle<()>,
    origin: u64,
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
        let (origin, spares) = (Arc::default(), Arc::default());
        Ok(Self { config, tls, setup, runtime: Handle::current(), origin, spares })
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
        self.find().await.map(|found| found.client)
    }

    /// The same, and which database it leads to.
    pub(super) async fn open_known(&self) -> Result<(Client, String), Error> {
        let client = self.open().await?;
        let rows = client.query_typed("SELECT cache_aside.origin()", &[]).await?;
        let origin: Option<String> = rows.first().map_or(Ok(None), |row| row.try_get(0))?;
        let origin = origin.unwrap_or_default();
        // What was connected before changes were captured could not tell.
        self.learn(&origin);
        Ok((client, origin))
    }

    /// Makes a connection for the next who would have to make one.
    pub(super) async fn stock(&self) -> Result<(), Error> {
        let found = self.find().await?;
        self.spares.lock().unwrap_or_else(PoisonError::into_inner).push(found);
        Ok(())
    }

    /// How many were made beforehand and can be used.
    pub(super) fn spares(&self) -> usize {
        let mut spares = self.spares.lock().unwrap_or_else(PoisonError::into_inner);
        spares.retain(|spare| self.is_good(spare));
        spares.len()
    }

    /// One that was made beforehand and can be used.
    fn spare(&self) -> Option<Found> {
        let mut spares = self.spares.lock().unwrap_or_else(PoisonError::into_inner);
        spares.retain(|spare| self.is_good(spare));
        spares.pop()
    }

    fn is_good(&self, spare: &Found) -> bool {
        !spare.client.is_closed() && self.leads_to(spare.origin)
    }

    /// Whether that is the database which connections find now.
    fn leads_to(&self, origin: u64) -> bool {
        self.origin.load().fingerprint == origin
    }

    /// Notes which database connections find. What was connected before leads to another one, or may.
    fn learn(&self, text: &str) -> u64 {
        let fingerprint = store::origin(text);
        if !self.leads_to(fingerprint) {
            self.origin.store(Arc::new(Origin { text: text.to_owned(), fingerprint, since: Some(Instant::now()) }));
        }
        fingerprint
    }

    /// A connection that is set up, and which database it leads to.
    async fn find(&self) -> Result<Found, Error> {
        let connector = self.clone();
        // Wherever the request came from: a connection dies with the runtime that drives it, and workers end one by one.
        let finding = async move {
            let (client, connection) = connector.config.connect(connector.tls.clone()).await?;
            let driver = tokio::spawn(async move {
                if let Err(error) = connection.await {
                    tracing::debug!(%error, "a database connection ended");
                }
            });
            let said = client.simple_query(&connector.setup).await?;
            let knows =
                said.iter().any(|message| matches!(message, SimpleQueryMessage::Row(row) if row.get(0) == Some("t")));
            let text = if knows { origin(&client).await? } else { String::new() };
            let origin = connector.learn(&text);
            Ok(Found { client, driver, origin })
        };
        // Whoever waits may give up: then nobody wants it, and his right to it is another's.
        let finding = self.runtime.spawn(tokio::time::timeout(CONNECT, finding));
        match AbortOnDropHandle::new(finding).await {
            Ok(Ok(outcome)) => outcome,
            // It took too long, or the runtime is shutting down. Whoever waits is bounded by the same time.
            Ok(Err(_)) | Err(_) => std::future::pending().await,
        }
    }
}

/// What the database says of itself; nothing where it can't. Where it only took too long or went away, that is no answer.
async fn origin(client: &Client) -> Result<String, Error> {
    let said = match client.simple_query("SELECT cache_aside.origin()").await {
        Err(failed) if failed.as_db_error().is_some_and(|refusal| !refusal.code().code().starts_with("57")) => {
            Vec::new()
        }
        said => said?,
    };
    let text = said.iter().find_map(|message| match message {
        SimpleQueryMessage::Row(row) => row.get(0),
        _ => None,
    });
    Ok(text.unwrap_or_default().to_owned())
}

impl Connect for Connector {
    fn connect(&self, _: &Config) -> BoxFuture<'_, Result<(Client, JoinHandle<()>), Error>> {
        async move {
            if let Some(spare) = self.spare() {
                return Ok((spare.client, spare.driver));
            }
            loop {
                let found = self.find().await?;
                if self.leads_to(found.origin) {
                    return Ok((found.client, found.driver));
                }
                // Others found another database meanwhile: this connection must not be taken for one of those.
            }
        }
        .boxed()
    }
}
