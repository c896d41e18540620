//! A client that costs as little as a client can: HTTP/1.1 with keep-alive, request bytes made beforehand, and of the
//! answer no more is looked at than a drill counts.
//!
//! It shares two cores with what it measures, so it makes no header map and keeps no body.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// More than the service gives a request.
const PATIENCE: Duration = Duration::from_secs(20);

/// What came of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// 200 from a cache.
    Hit,
    /// 200 from a cache, past its TTL.
    Stale,
    /// 200, after a load of one's own or of somebody else's: this one waited.
    Miss,
    /// 200 from the database, past a cache that can't be used.
    Bypass,
    /// 503: not now.
    Shed,
    /// Any other status, a broken connection, no answer.
    Failed,
}

pub const HOWS: [How; 6] = [How::Hit, How::Stale, How::Miss, How::Bypass, How::Shed, How::Failed];

/// An answer, as far as it is looked at.
#[derive(Clone, Copy, Debug)]
pub struct Reply {
    pub how: How,
    pub status: u16,
    /// The server closes the connection after it.
    pub close: bool,
    /// It says when to come again.
    pub retry_after: bool,
}

/// Why there was no answer.
#[derive(Debug)]
pub enum Broken {
    /// The connection ended before a byte of the answer: whoever kept it open too long may ask again elsewhere.
    Unanswered,
    /// It ended within an answer, made no sense, or took too long.
    Midway,
}

/// A connection to one replica.
pub struct Wire {
    stream: TcpStream,
    buffer: Vec<u8>,
    /// Whether anything was asked here before.
    pub used: bool,
}

impl Wire {
    pub async fn open(address: SocketAddr) -> io::Result<Self> {
        let stream = timeout(PATIENCE, TcpStream::connect(address)).await??;
        stream.set_nodelay(true)?;
        Ok(Self { stream, buffer: Vec::with_capacity(2048), used: false })
    }

    pub async fn ask(&mut self, request: &[u8]) -> Result<Reply, Broken> {
        self.send(request).await?;
        self.answer().await
    }

    pub async fn send(&mut self, request: &[u8]) -> Result<(), Broken> {
        self.buffer.clear();
        self.stream.write_all(request).await.map_err(|_| Broken::Unanswered)
    }

    /// The answer to what was sent.
    pub async fn answer(&mut self) -> Result<Reply, Broken> {
        let reply = timeout(PATIENCE, self.read()).await.map_err(|_| Broken::Midway)?;
        self.used = true;
        reply
    }

    async fn read(&mut self) -> Result<Reply, Broken> {
        loop {
            if let Some(head) = find(&self.buffer, b"\r\n\r\n") {
                let (reply, length) = parse(&self.buffer[..head]).ok_or(Broken::Midway)?;
                while self.buffer.len() < head + 4 + length {
                    if self.more().await? == 0 {
                        return Err(Broken::Midway);
                    }
                }
                return Ok(reply);
            }
            let before = self.buffer.len();
            match self.more().await {
                Ok(0) | Err(_) if before == 0 => return Err(Broken::Unanswered),
                Ok(0) => return Err(Broken::Midway),
                Ok(_) => {}
                Err(broken) => return Err(broken),
            }
        }
    }

    async fn more(&mut self) -> Result<usize, Broken> {
        self.stream.read_buf(&mut self.buffer).await.map_err(|_| Broken::Midway)
    }

    /// Waits until the server ends the connection, and throws away what it says before.
    pub async fn ended(&mut self) {
        loop {
            self.buffer.clear();
            if let Ok(0) | Err(_) = self.more().await {
                return;
            }
        }
    }
}

/// A GET of a path.
pub fn get(path: &str) -> Vec<u8> {
    format!("GET {path} HTTP/1.1\r\nhost: drill\r\n\r\n").into_bytes()
}

fn find(bytes: &[u8], what: &[u8]) -> Option<usize> {
    bytes.windows(what.len()).position(|window| window == what)
}

/// What is in a head, and how long the body is.
fn parse(head: &[u8]) -> Option<(Reply, usize)> {
    let status = std::str::from_utf8(head.get(9..12)?).ok()?.parse().ok()?;
    let mut reply = Reply { how: How::Failed, status, close: false, retry_after: false };
    let mut length = 0;
    let mut cache = How::Miss;
    for line in head.split(|byte| *byte == b'\n').skip(1) {
        let Some(colon) = line.iter().position(|byte| *byte == b':') else { continue };
        let (name, value) = (&line[..colon], line[colon + 1..].trim_ascii());
        if name.eq_ignore_ascii_case(b"content-length") {
            length = std::str::from_utf8(value).ok()?.parse().ok()?;
        } else if name.eq_ignore_ascii_case(b"cache-status") {
            cache = forwarded(value);
        } else if name.eq_ignore_ascii_case(b"connection") {
            reply.close = value.eq_ignore_ascii_case(b"close");
        } else if name.eq_ignore_ascii_case(b"retry-after") {
            reply.retry_after = true;
        }
    }
    reply.how = match status {
        200 => cache,
        503 => How::Shed,
        _ => How::Failed,
    };
    Some((reply, length))
}

/// RFC 9211, as the service writes it.
fn forwarded(value: &[u8]) -> How {
    let rest = value.strip_prefix(b"cache-aside; ").unwrap_or(value);
    match rest {
        [b'h', b'i', b't', ..] => How::Hit,
        // With what is left of the TTL, if it came out of the cache; else it was stale there, and loaded.
        [b'f', b'w', b'd', b'=', b's', b't', ..] if find(rest, b"; ttl=").is_some() => How::Stale,
        [b'f', b'w', b'd', b'=', b'b', ..] => How::Bypass,
        _ => How::Miss,
    }
}
