//! Makes connections: in one runtime, with TLS as the URL asks for it, and set up the same each time.

use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;

use deadpool_postgres::Connect;
use futures_util::future::{BoxFuture, FutureExt, TryFutureExt};
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
    /// What the last connection found.
    origin: Arc<ArcSwap<Origin>>,
}

/// A connection that is set up, and which database it leads to.
pub(super) struct Found {
    pub(super) client: Client,
    pub(super) driver: JoinHandle<()>,
    pub(super) life: Arc<Origin>,
}

/// Which database a connection leads to, and which of its lives.
#[derive(Debug, Default)]
pub(super) struct Origin {
    /// As the database says it; empty where it can't or won't.
    text: String,
    pub(super) fingerprint: u64,
}

impl Origin {
    pub(super) fn text(&self) -> &str {
        &self.text
    }

    /// The timeline of the primary; it stays the same for as long as the server is one.
    pub(super) fn timeline(&self) -> Option<i32> {
        i32::from_str_radix(self.text.split(':').nth(1)?, 16).ok()
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
        Ok(Self { config, tls, setup, runtime: Handle::current(), origin: Arc::default() })
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

    /// Which database the last connection found: system, timeline, database, and life.
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
        self.learn(origin.clone());
        Ok((client, origin))
    }

    /// Whether that is the database which connections find now. What was connected before leads to another one, or may.
    pub(super) fn leads_to(&self, origin: &Origin) -> bool {
        self.origin.load().fingerprint == origin.fingerprint
    }

    /// Notes which database connections find.
    fn learn(&self, text: String) -> Arc<Origin> {
        let found = Arc::new(Origin { fingerprint: store::origin(&text), text });
        if !self.leads_to(&found) {
            self.origin.store(Arc::clone(&found));
        }
        found
    }

    /// A connection that is set up, and which database it leads to. Whoever asks sees to it that it takes no longer than
    /// [`CONNECT`].
    pub(super) async fn find(&self) -> Result<Found, Error> {
        let connector = self.clone();
        // Wherever the request came from: a connection dies with the runtime that drives it, and workers end one by one.
        let finding = self.runtime.spawn(async move {
            let (client, connection) = connector.config.connect(connector.tls.clone()).await?;
            // It ends with this: by itself it would wait for what a server that hangs was asked, for as long as that hangs.
            let driver = AbortOnDropHandle::new(tokio::spawn(async move {
                if let Err(error) = connection.await {
                    tracing::debug!(%error, "a database connection ended");
                }
            }));
            let said = client.simple_query(&connector.setup).await?;
            let knows =
                said.iter().any(|message| matches!(message, SimpleQueryMessage::Row(row) if row.get(0) == Some("t")));
            let text = if knows { origin(&client).await? } else { String::new() };
            Ok(Found { client, driver: driver.detach(), life: connector.learn(text) })
        });
        // Whoever waits may give up: then nobody wants it, and his right to it is another's.
        match AbortOnDropHandle::new(finding).await {
            Ok(outcome) => outcome,
            // The runtime is shutting down.
            Err(_) => std::future::pending().await,
        }
    }
}

/// What the database says of itself; nothing where it can't. Where it only took too long, has no room just now or went away,
/// that is no answer.
async fn origin(client: &Client) -> Result<String, Error> {
    let passes = |code: &str| ["08", "40", "53", "57", "58"].iter().any(|class| code.starts_with(class));
    let said = match client.simple_query("SELECT cache_aside.origin()").await {
        Err(failed) if failed.as_db_error().is_some_and(|refusal| !passes(refusal.code().code())) => Vec::new(),
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
        self.find().map_ok(|found| (found.client, found.driver)).boxed()
    }
}
