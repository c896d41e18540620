//! How many connections the service takes, and how long it waits for their clients.
//!
//! A client that sends its head by the byte, one that is gone without a word, and one that never reads its answer each hold
//! a file descriptor and some memory. All of them are bounded in number by `server.max_connections`, and in time by what is
//! here. What can't be bounded in time is a second head on a connection that has had an answer: the server's timer for heads
//! runs for the first one alone.

use std::any::Any;
use std::time::Duration;

use actix_web::rt::net::TcpStream;
use rustix::net::sockopt;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::config::Server;

/// Longer than load balancers keep idle connections, so that they close them and never write into one that just closed.
pub(super) const KEEP_ALIVE: Duration = Duration::from_mins(2);
/// After the head of the first request was not sent whole within this, 408. A head is one packet, or a few: what takes longer is
/// a client that is broken, or means to be.
const HEAD: Duration = Duration::from_secs(5);
/// How long a connection that ends may take to: then it is dropped, with what the client has not read.
pub(super) const GOODBYE: Duration = Duration::from_secs(1);
/// Connections that the kernel keeps until they are accepted: a flood waits there, and not in our memory. The kernel takes
/// `net.core.somaxconn` where that is less.
pub(super) const BACKLOG: i32 = 4096;
/// After so long without a byte the kernel asks a client's machine whether it is still there; three silent answers, fifteen
/// seconds apart, and the connection is gone. Shorter than [`KEEP_ALIVE`], which would find it out later.
const SILENCE: Duration = Duration::from_secs(30);
const ASK_AGAIN: Duration = Duration::from_secs(15);
const ASK_TIMES: u32 = 3;
/// File descriptors for all but clients: both ports, the caches' lanes and rounds, the log, what libraries open for a
/// moment, and the files that are read at the start.
const OWN: u64 = 256;

/// What bounds the clients of a server.
#[derive(Clone, Copy, Debug)]
pub(super) struct Door {
    /// Connections of each worker.
    pub(super) per_worker: usize,
    pub(super) head: Duration,
    /// What a client must read some of an answer in.
    stall: Duration,
}

impl Door {
    /// Opens as many files as there may be, and judges whether `server.max_connections` fit into them. `pool`: connections to
    /// the database.
    pub(super) fn new(server: &Server, pool: u32, workers: usize) -> Self {
        let (wanted, own) = (server.max_connections, OWN + u64::from(pool));
        let most = usize::try_from(files().saturating_sub(own)).unwrap_or(usize::MAX).max(1);
        if most < wanted {
            tracing::warn!(
                server.max_connections = wanted,
                fitting = most,
                "the limit of open files (ulimit -n) is too low for server.max_connections: fewer are taken"
            );
        }
        Self {
            per_worker: wanted.min(most).div_ceil(workers.max(1)),
            head: HEAD.min(server.request_timeout),
            stall: server.request_timeout,
        }
    }

    /// Sets up a connection that was accepted. A client of which nothing is heard while it owes an acknowledgement, or that
    /// does not take any of its answer, is cut off: the server itself has no limit for how long an answer may take to be read.
    pub(super) fn connected(self, connection: &dyn Any) {
        let Some(stream) = connection.downcast_ref::<TcpStream>() else { return };
        let set = || {
            #[cfg(target_os = "linux")]
            sockopt::set_tcp_user_timeout(stream, u32::try_from(self.stall.as_millis()).unwrap_or(u32::MAX).max(1))?;
            sockopt::set_tcp_keepidle(stream, SILENCE)?;
            sockopt::set_tcp_keepintvl(stream, ASK_AGAIN)?;
            sockopt::set_tcp_keepcnt(stream, ASK_TIMES)?;
            sockopt::set_socket_keepalive(stream, true)
        };
        if let Err(error) = set() {
            tracing::debug!(%error, "a connection could not be set up");
        }
    }
}

/// Raises the limit of open files as far as the system lets us; how many there may be.
fn files() -> u64 {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    let now = match setrlimit(Resource::Nofile, raised) {
        Ok(()) => limit.maximum,
        Err(error) => {
            tracing::debug!(%error, "the limit of open files can't be raised");
            limit.current
        }
    };
    now.unwrap_or(u64::MAX)
}
