//! One connection to one server: commands go out in the order in which they are given, replies come back in that order.
//!
//! A task owns the socket. Whoever asks hands it the bytes and waits for as many replies; all that has piled up goes out in one write.
//! Somebody who stops waiting misaligns nothing: the replies are read all the same, and dropped. Whatever is not the
//! reply that was due ends the connection, and with it the trust in everything that was read over it.

use std::collections::{HashMap, VecDeque};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::Context;
use bytes::BytesMut;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, oneshot};
use tokio::task::AbortHandle;

use super::wire::{self, Batch, Reply};
use crate::cache::CacheError;
use crate::cache::lane::Wait;

/// Batches that may wait to be sent; whoever comes then waits with them, as long as his time lasts.
const QUEUE: usize = 1024;
/// Batches that may wait for their replies.
const UNANSWERED: usize = 4096;
/// Bytes that are collected before they are sent.
const UNSENT: usize = 256 * 1024;
/// What a server says of itself is never longer.
const STATS: usize = 256 * 1024;

/// What a server says of itself.
#[derive(Clone, Debug, Default)]
pub(super) struct Server {
    stats: HashMap<String, String>,
}

impl Server {
    /// A value of `stats` or `stats settings`.
    pub(super) fn get(&self, name: &str) -> Option<&str> {
        self.stats.get(name).map(String::as_str)
    }

    pub(super) fn number(&self, name: &str) -> Option<u64> {
        self.get(name)?.parse().ok()
    }

    /// Which process of the server this is: its id, and when it began by its own clock.
    pub(super) fn run(&self) -> String {
        let began = self.number("time").unwrap_or(0).saturating_sub(self.number("uptime").unwrap_or(0));
        format!("{}:{began}", self.get("pid").unwrap_or_default())
    }
}

struct Request {
    batch: Batch,
    replies: oneshot::Sender<Vec<Reply>>,
}

/// A connection that answers, until it doesn't.
pub(super) struct Connection {
    requests: mpsc::Sender<Request>,
    task: AbortHandle,
    timeout: Duration,
    pub(super) server: Server,
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.close();
    }
}

impl Connection {
    /// Connects, asks the server what it is, and keeps the connection in the current runtime. `open` counts it.
    ///
    /// # Errors
    ///
    /// A server that is away, too old, or that can't compare and set.
    pub(super) async fn open(address: (&str, u16), timeout: Duration, open: &Arc<AtomicUsize>) -> anyhow::Result<Self> {
        let connecting = async {
            let mut stream = TcpStream::connect(address).await?;
            stream.set_nodelay(true)?;
            let server = introduced(&mut stream).await?;
            anyhow::Ok((stream, server))
        };
        let patience = timeout.max(Duration::from_secs(1));
        let (stream, server) = tokio::time::timeout(patience, connecting).await.context("no answer in time")??;
        let (requests, inbox) = mpsc::channel(QUEUE);
        let counted = Counted::new(open);
        let task = tokio::spawn(async move {
            let _counted = counted;
            if let Err(error) = drive(stream, inbox).await {
                tracing::debug!(%error, "a connection to the cache ended");
            }
        });
        Ok(Self { requests, task: task.abort_handle(), timeout, server })
    }

    /// One round trip.
    ///
    /// # Errors
    ///
    /// [`CacheError::TimedOut`], after which it is not known what of it was done, and [`CacheError::Disconnected`].
    pub(super) async fn ask(&self, batch: Batch) -> Result<Vec<Reply>, CacheError> {
        self.ask_within(self.timeout, batch).await
    }

    /// The same for somebody with another patience.
    pub(super) async fn ask_within(&self, patience: Duration, batch: Batch) -> Result<Vec<Reply>, CacheError> {
        if batch.count == 0 {
            return Ok(Vec::new());
        }
        let asking = async {
            let (replies, answer) = oneshot::channel();
            let request = Request { batch, replies };
            self.requests.send(request).await.map_err(|_| CacheError::Disconnected)?;
            answer.await.map_err(|_| CacheError::Disconnected)
        };
        Wait::new(patience).until(pin!(asking)).await.unwrap_or(Err(CacheError::TimedOut))
    }

    /// Whether it has ended.
    pub(super) fn is_closed(&self) -> bool {
        self.requests.is_closed()
    }

    /// Ends it, whoever still waits for a reply.
    pub(super) fn close(&self) {
        self.task.abort();
    }
}

/// Takes one away from the open connections when it goes.
struct Counted(Arc<AtomicUsize>);

impl Counted {
    fn new(open: &Arc<AtomicUsize>) -> Self {
        open.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(open))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What the server says of itself, if it is one that can be used.
async fn introduced(stream: &mut TcpStream) -> anyhow::Result<Server> {
    stream.write_all(b"stats\r\nstats settings\r\n").await?;
    let mut said = Vec::new();
    loop {
        let length = stream.read_buf(&mut said).await?;
        anyhow::ensure!(length > 0, "it closed the connection");
        anyhow::ensure!(said.len() < STATS, "it does not speak memcached's protocol");
        let text = String::from_utf8_lossy(&said);
        let strange = |line: &&str| !line.starts_with("STAT ") && *line != "END";
        let whole = text.rsplit_once("\r\n").map_or("", |(whole, _)| whole);
        if let Some(line) = whole.split("\r\n").filter(|line| !line.is_empty()).find(strange) {
            let line: String = line.chars().take(80).collect();
            anyhow::bail!("it does not speak memcached's protocol, or wants a password: {line:?}");
        }
        if whole.split("\r\n").filter(|line| *line == "END").count() == 2 {
            let pairs = whole.split("\r\n").filter_map(|line| line.strip_prefix("STAT ")?.split_once(' '));
            let server = Server { stats: pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).collect() };
            let version = server.get("version").unwrap_or("of unknown version");
            anyhow::ensure!(is_current(version), "memcached {version} is too old: meta commands need 1.6");
            // With this off, whatever is stored is stored blindly.
            anyhow::ensure!(
                server.get("cas_enabled") != Some("no"),
                "memcached was started with -C: it can't compare and set"
            );
            return Ok(server);
        }
    }
}

fn is_current(version: &str) -> bool {
    let mut parts = version.split(['.', '-']).map_while(|part| part.parse::<u32>().ok());
    (parts.next().unwrap_or(0), parts.next().unwrap_or(0)) >= (1, 6)
}

struct Waiting {
    number: u64,
    count: u32,
    found: Vec<Reply>,
    replies: oneshot::Sender<Vec<Reply>>,
}

async fn drive(mut stream: TcpStream, mut inbox: mpsc::Receiver<Request>) -> anyhow::Result<()> {
    let (mut reader, mut writer) = stream.split();
    let (mut input, mut output) = (BytesMut::with_capacity(16 * 1024), BytesMut::new());
    let mut waiting: VecDeque<Waiting> = VecDeque::new();
    let mut is_open = true;
    while is_open || !waiting.is_empty() {
        tokio::select! {
            request = inbox.recv(), if is_open && waiting.len() < UNANSWERED && output.len() < UNSENT => {
                is_open = request.is_some();
                let mut next = request;
                // Whatever has piled up goes with it.
                while let Some(Request { batch, replies }) = next {
                    // Nobody waits any more, and nothing was sent: nothing need be.
                    if !replies.is_closed() {
                        output.extend_from_slice(&batch.bytes);
                        let found = Vec::with_capacity(batch.count as usize);
                        waiting.push_back(Waiting { number: batch.number, count: batch.count, found, replies });
                    }
                    let room = waiting.len() < UNANSWERED && output.len() < UNSENT;
                    next = if room { inbox.try_recv().ok() } else { None };
                }
            }
            written = writer.write_buf(&mut output), if !output.is_empty() => {
                anyhow::ensure!(written? > 0, "nothing can be written");
            }
            read = reader.read_buf(&mut input) => {
                anyhow::ensure!(read? > 0, "the server closed it");
                while let Some(first) = waiting.front_mut() {
                    let index = u32::try_from(first.found.len())?;
                    let Some(reply) = wire::take(&mut input, first.number, index)? else { break };
                    first.found.push(reply);
                    if index + 1 == first.count
                        && let Some(done) = waiting.pop_front()
                    {
                        // Who stopped waiting needs no reply.
                        let _ = done.replies.send(done.found);
                    }
                }
                anyhow::ensure!(input.is_empty() || !waiting.is_empty(), "the server said what nobody asked");
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::is_current;

    #[test]
    fn versions_are_compared_as_numbers() {
        for (version, fits) in [("1.6.18", true), ("1.10.0", true), ("2.0", true), ("1.6.0-rc1", true)] {
            assert_eq!(is_current(version), fits, "{version}");
        }
        for version in ["1.5.22", "1.4", "0.9", "", "of unknown version"] {
            assert!(!is_current(version), "{version}");
        }
    }
}
