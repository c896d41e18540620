//! Makes connections: in one runtime, with TLS as the URL asks for it, and set up the same each time.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use arc_swap::ArcSwap;
use mysql_async::prelude::Queryable;
use mysql_async::{Conn, Error, Opts, OptsBuilder, SslOpts};
use percent_encoding::percent_decode_str;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use tokio::runtime::Handle;
use tokio_util::task::AbortOnDropHandle;

use crate::store::StoreError;
use crate::{config, store};

/// Statements that one connection keeps prepared.
const PREPARED: usize = 256;

/// Refuses what does not fit instead of bending it, whatever the server's own setting is. An id of 0 is an id.
pub(super) const SQL_MODE: &str = "STRICT_ALL_TABLES,NO_ZERO_IN_DATE,NO_ZERO_DATE,ERROR_FOR_DIVISION_BY_ZERO,\
                        NO_ENGINE_SUBSTITUTION,NO_AUTO_VALUE_ON_ZERO";

/// Which server and which of its lives this is. `cache_aside.life` is emptied by a restart; a dump that is put back makes
/// the outbox anew; replicas that are copies of one another differ by `server_id`. Servers have their own comments for
/// what the other one can't read.
const ORIGIN: &str = "
    SELECT CONCAT('mysql:', /*!50708 @@server_uuid, ':', */ @@hostname, ':', @@port, ':', @@datadir, ':',
                  @@server_id, ':', COALESCE((SELECT UNIX_TIMESTAMP(t.CREATE_TIME) FROM information_schema.TABLES t
                            WHERE t.TABLE_SCHEMA = 'cache_aside' AND t.TABLE_NAME = 'outbox'), '')),
           CONCAT(@@global.read_only, @@global.innodb_read_only), (SELECT l.id FROM cache_aside.life l)";

const BIRTH: &str = "INSERT IGNORE INTO cache_aside.life (only_row, id) VALUES (1, ?)";

/// Everything that a new connection needs.
#[derive(Debug)]
pub(super) struct Connector {
    opts: Opts,
    setup: String,
    runtime: Handle,
    origin: ArcSwap<Origin>,
}

/// Which database the last connection found.
#[derive(Debug, Default)]
struct Origin {
    /// As the database says it; empty where it can't or won't.
    text: String,
    fingerprint: u64,
}

/// A connection that is set up, and where it leads.
pub(super) struct Made {
    pub(super) conn: Conn,
    pub(super) origin: u64,
    pub(super) text: String,
    /// When it was known to be alive.
    pub(super) answered: tokio::time::Instant,
}

impl Connector {
    pub(super) fn new(database: &config::Database) -> anyhow::Result<Self> {
        let opts = options(database.url.expose(), database.ca_file.as_deref())?;
        let timeout = database.statement_timeout;
        let seconds = timeout.as_secs_f64().ceil().max(1.0);
        // A session begins with the server's settings, whatever somebody made of them.
        // MariaDB ends any statement that takes too long, MySQL only those that read; waits for locks end on both.
        let setup = format!(
            "SET NAMES utf8mb4; \
             SET SESSION sql_mode = '{SQL_MODE}', time_zone = '+00:00', autocommit = 1, \
             completion_type = 0, sql_select_limit = 18446744073709551615, \
             innodb_lock_wait_timeout = {seconds}, lock_wait_timeout = {seconds} \
             /*M!100101 , max_statement_time = {:.3}, query_cache_type = 0 */ \
             /*!50708 , max_execution_time = {} */ /*!80000 , information_schema_stats_expiry = 0 */; \
             SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED",
            timeout.as_secs_f64(),
            timeout.as_millis()
        );
        Ok(Self { opts, setup, runtime: Handle::current(), origin: ArcSwap::default() })
    }

    pub(super) fn runtime(&self) -> &Handle {
        &self.runtime
    }

    /// The database that the URL names.
    pub(super) fn database(&self) -> Option<&str> {
        self.opts.db_name()
    }

    /// Whether that is the database which connections find now. What was connected before leads to another one, or may.
    pub(super) fn leads_to(&self, origin: u64) -> bool {
        self.origin.load().fingerprint == origin
    }

    /// Which database the last connection found: server and life.
    pub(super) fn found(&self) -> String {
        self.origin.load().text.clone()
    }

    /// A connection that is set up. Why there is none is an outage, whatever the server said.
    pub(super) async fn connect(self: &Arc<Self>) -> Result<Made, StoreError> {
        self.open().await.map_err(super::out_of_reach)
    }

    /// The same; [`StoreError::Refused`] where the server answers, and has no room or does not let us in. It lives in the
    /// store's own runtime, whoever asks for it: it would die with a worker's.
    pub(super) async fn open(self: &Arc<Self>) -> Result<Made, StoreError> {
        let connector = Arc::clone(self);
        let connecting = async move {
            let mut conn = Conn::new(connector.opts.clone()).await?;
            conn.query_drop(&connector.setup).await?;
            let text = origin(&mut conn).await?;
            let fingerprint = store::origin(&text);
            if !connector.leads_to(fingerprint) {
                connector.origin.store(Arc::new(Origin { text: text.clone(), fingerprint }));
            }
            let answered = tokio::time::Instant::now();
            Ok::<_, Error>(Made { conn, origin: fingerprint, text, answered })
        };
        // Whoever waits may give up: then nobody wants it, and his right to it is another's.
        let connecting = self.runtime.spawn(tokio::time::timeout(super::CONNECT, connecting));
        match AbortOnDropHandle::new(connecting).await {
            Ok(Ok(made)) => made.map_err(|failed| super::unanswered(&failed)),
            Ok(Err(_)) => Err(StoreError::Unavailable("connecting took too long".into())),
            Err(_) => Err(StoreError::Unavailable("the service is stopping".into())),
        }
    }

    /// Ends a connection of ours on the server, with whatever it is working on. `found`: where that one led; under the
    /// same name there may be another server by now, where the number is somebody else's.
    pub(super) async fn kill(&self, id: u32, found: u64) {
        let killing = async {
            let mut conn = Conn::new(self.opts.clone()).await?;
            if store::origin(&origin(&mut conn).await?) == found {
                conn.query_drop(format!("KILL {id}")).await?;
            }
            conn.disconnect().await
        };
        match tokio::time::timeout(Duration::from_secs(1), killing).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::debug!(%error, "a statement could not be ended"),
            Err(_) => tracing::debug!("a statement could not be ended in time"),
        }
    }
}

/// What the server says of itself; nothing where no change is captured, or it follows another.
async fn origin(conn: &mut Conn) -> Result<String, Error> {
    for _ in 0..2 {
        let said: Option<(String, String, Option<String>)> = match conn.query_first(ORIGIN).await {
            // Nothing is installed, or not for this account: only where changes are captured does anybody need to know.
            Err(Error::Server(_)) => return Ok(String::new()),
            said => said?,
        };
        match said {
            Some((_, read_only, _)) if !is_writable(&read_only) => break,
            Some((server, _, Some(life))) => return Ok(format!("{server}:{life}")),
            _ => {
                let life = uuid::Uuid::now_v7().to_string();
                match conn.exec_drop(BIRTH, (life,)).await {
                    Err(Error::Server(_)) => break,
                    born => born?,
                }
            }
        }
    }
    Ok(String::new())
}

/// What both settings that make a server a follower say together: the servers write "off" in their own ways.
pub(super) fn is_writable(read_only: &str) -> bool {
    matches!(read_only, "00" | "OFFOFF")
}

/// What the driver is to do, from a URL as the programs of MySQL and MariaDB take it.
fn options(url: &str, ca_file: Option<&Path>) -> anyhow::Result<Opts> {
    let (url, mode) = split_mode(url)?;
    let (_, rest) = url.split_once("://").context("it is written mysql://user:password@host/database")?;
    let opts = Opts::from_url(&format!("mysql://{rest}"))?;
    let mut builder = OptsBuilder::from_opts(opts.clone())
        // Where a socket is wanted, the URL says so.
        .prefer_socket(false)
        .tcp_keepalive(Some(Duration::from_secs(30)))
        .tcp_nodelay(true)
        .stmt_cache_size(PREPARED)
        // A row that was found and already is as wanted was found.
        .client_found_rows(true);
    let host = percent_decode_str(opts.ip_or_hostname()).decode_utf8_lossy();
    if host.starts_with('/') {
        builder = builder.socket(Some(host.to_string()));
    }
    if let Some(mode) = mode {
        builder = builder.ssl_opts(match mode {
            Mode::Disabled => None,
            Mode::Required if ca_file.is_none() => Some(SslOpts::default().with_danger_accept_invalid_certs(true)),
            // As the programs do it: with a certificate to trust, the chain is verified.
            Mode::Required | Mode::VerifyCa => Some(roots(ca_file)?.with_danger_skip_domain_validation(true)),
            Mode::VerifyIdentity => Some(roots(ca_file)?),
        });
    } else if let (Some(asked), Some(_)) = (opts.ssl_opts(), ca_file) {
        let lenient = asked.skip_domain_validation();
        builder = builder.ssl_opts(Some(roots(ca_file)?.with_danger_skip_domain_validation(lenient)));
    }
    Ok(builder.into())
}

/// How much of the server's certificate is verified.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Disabled,
    Required,
    VerifyCa,
    VerifyIdentity,
}

/// Takes the parameter that the driver does not know out of a URL: `ssl-mode` as MySQL's programs spell it.
fn split_mode(url: &str) -> anyhow::Result<(String, Option<Mode>)> {
    let Some((before, query)) = url.split_once('?') else { return Ok((url.to_owned(), None)) };
    let (mut kept, mut mode) = (Vec::new(), None);
    for part in query.split('&') {
        let (name, value) = part.split_once('=').unwrap_or((part, ""));
        if !matches!(name.to_ascii_lowercase().as_str(), "ssl-mode" | "ssl_mode" | "sslmode") {
            kept.push(part);
            continue;
        }
        mode = Some(match value.to_ascii_lowercase().replace('-', "_").as_str() {
            "disabled" | "disable" => Mode::Disabled,
            "required" | "require" => Mode::Required,
            "verify_ca" => Mode::VerifyCa,
            "verify_identity" | "verify_full" => Mode::VerifyIdentity,
            other => {
                anyhow::bail!("ssl-mode={other} is not known; use DISABLED, REQUIRED, VERIFY_CA or VERIFY_IDENTITY")
            }
        });
    }
    let query = kept.join("&");
    Ok((if query.is_empty() { before.to_owned() } else { format!("{before}?{query}") }, mode))
}

/// The certificates to trust: those in the file, or the system's.
fn roots(ca_file: Option<&Path>) -> anyhow::Result<SslOpts> {
    let certificates: Vec<CertificateDer<'static>> = match ca_file {
        Some(file) => {
            let read = CertificateDer::pem_file_iter(file)
                .with_context(|| format!("ca_file {} can't be read", file.display()))?
                .collect::<Result<Vec<_>, _>>()
                .with_context(|| format!("ca_file {} is no PEM certificate", file.display()))?;
            anyhow::ensure!(!read.is_empty(), "ca_file {} holds no certificate", file.display());
            read
        }
        None => rustls_native_certs::load_native_certs().certs,
    };
    let trusted = certificates.into_iter().map(|certificate| certificate.to_vec().into()).collect();
    Ok(SslOpts::default().with_disable_built_in_roots(true).with_root_certs(trusted))
}

#[cfg(test)]
mod tests {
    use super::{Mode, options, split_mode};

    #[test]
    fn the_mode_is_taken_out_of_the_url() {
        let split = |url| split_mode(url).expect("it is known");
        assert_eq!(split("mysql://a@b/c?ssl-mode=VERIFY_CA"), ("mysql://a@b/c".into(), Some(Mode::VerifyCa)));
        let expected = ("mysql://a@b/c?tcp_nodelay=true".to_owned(), Some(Mode::Required));
        assert_eq!(split("mysql://a@b/c?sslmode=require&tcp_nodelay=true"), expected);
        assert_eq!(split("mysql://a@b/c"), ("mysql://a@b/c".into(), None));
        assert!(split_mode("mysql://a@b/c?ssl-mode=PREFERRED").is_err());
    }

    #[test]
    fn a_url_names_host_or_socket_and_database() {
        let tcp = options("mariadb://app:p%40ss@db:3307/shop", None).expect("it is sound");
        assert_eq!((tcp.ip_or_hostname(), tcp.tcp_port(), tcp.db_name()), ("db", 3307, Some("shop")));
        assert_eq!((tcp.pass(), tcp.socket()), (Some("p@ss"), None));
        let socket = options("mysql://app@%2Frun%2Fmysqld%2Fmysqld.sock/shop", None).expect("it is sound");
        assert_eq!(socket.socket(), Some("/run/mysqld/mysqld.sock"));
        for wrong in ["mysql://", "mysql:x", "mysql://a@b/c?no_such=1"] {
            assert!(options(wrong, None).is_err(), "{wrong}");
        }
    }
}
