//! One replication connection: a start-up that the driver has no word for, and then a stream both ways.
//!
//! The messages are built and read by the crate that the driver itself uses; TLS is the pool's.

use std::io;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use fallible_iterator::FallibleIterator;
use postgres_protocol::authentication::{md5_hash, sasl};
use postgres_protocol::message::backend::{ErrorResponseBody, Header, Message};
use postgres_protocol::message::frontend;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio_postgres::Config;
use tokio_postgres::config::{ChannelBinding, Host, SslMode};
use tokio_postgres::tls::{MakeTlsConnect, TlsConnect};
use tokio_postgres_rustls::MakeRustlsConnect;

/// Of a longer message only the start is kept: enough to know which table it is about.
const LONGEST: usize = 16 << 20;
const KEPT: usize = 64;

/// The most that one host may take, unless the URL says otherwise.
const CONNECT: Duration = Duration::from_secs(2);

/// What is read at once, at most.
const READ: usize = 64 << 10;

/// Microseconds from 1970 to 2000, where PostgreSQL's clock starts.
const EPOCH: u64 = 946_684_800_000_000;

/// Why there is no stream, or none any more.
#[derive(Debug, thiserror::Error)]
pub(super) enum Broken {
    #[error("the connection was lost: {0}")]
    Lost(#[from] io::Error),
    #[error("{message} ({code})")]
    Refused { code: String, message: String },
    #[error("{0}")]
    Unusable(String),
}

trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Duplex for T {}

/// What the server sends.
#[derive(Debug)]
pub(super) enum Received {
    /// A message of the output plugin.
    Data(Bytes),
    /// Everything that was committed before this position has been sent.
    CaughtUp {
        position: u64,
        /// It wants to hear from us now.
        reply: bool,
    },
}

/// The stream of one slot. Its slot is free again when it is dropped.
pub(super) struct Stream {
    io: Box<dyn Duplex>,
    inbox: BytesMut,
    outbox: BytesMut,
    /// The start of a message that is too long, and how much of it is still to come.
    long: Option<(BytesMut, usize)>,
}

impl Stream {
    /// Connects to the first host that lets us, and starts the slot's stream from where it was confirmed.
    ///
    /// The server gives up a reader it has not heard from for `patience`.
    pub(super) async fn start(
        config: &Config,
        tls: &MakeRustlsConnect,
        slot: &str,
        publication: &str,
        patience: Duration,
    ) -> Result<Self, Broken> {
        if config.get_channel_binding() == ChannelBinding::Require {
            return Err(Broken::Unusable("channel_binding=require can't be had for a replication connection".into()));
        }
        let mut last = Broken::Unusable("the database's URL names no host".into());
        for (index, host) in config.get_hosts().iter().enumerate() {
            // A host that is away must not cost the next one its turn.
            let limit = config.get_connect_timeout().copied().unwrap_or(CONNECT);
            let opening = Self::open(config, tls, index, host, slot, publication, patience);
            match tokio::time::timeout(limit, opening).await {
                Ok(Ok(stream)) => return Ok(stream),
                Ok(Err(broken)) => last = broken,
                Err(_) => last = Broken::Unusable("connecting took too long".into()),
            }
        }
        Err(last)
    }

    async fn open(
        config: &Config,
        tls: &MakeRustlsConnect,
        index: usize,
        host: &Host,
        slot: &str,
        publication: &str,
        patience: Duration,
    ) -> Result<Self, Broken> {
        let ports = config.get_ports();
        let port = ports.get(index).or(ports.first()).copied().unwrap_or(5432);
        let io: Box<dyn Duplex> = match host {
            Host::Unix(folder) => Box::new(UnixStream::connect(folder.join(format!(".s.PGSQL.{port}"))).await?),
            Host::Tcp(name) => {
                let tcp = match config.get_hostaddrs().get(index) {
                    Some(address) => TcpStream::connect((*address, port)).await?,
                    None => TcpStream::connect((name.as_str(), port)).await?,
                };
                tcp.set_nodelay(true)?;
                encrypt(config.get_ssl_mode(), tls, name, tcp).await?
            }
        };
        let mut stream = Self { io, inbox: BytesMut::new(), outbox: BytesMut::new(), long: None };
        let user = config.get_user().unwrap_or("postgres");
        // What a value's text depends on is what services set for their own connections.
        let options = format!(
            "{} -c wal_sender_timeout={} -c statement_timeout=0 -c datestyle=ISO -c extra_float_digits=1 \
             -c bytea_output=hex",
            config.get_options().unwrap_or_default(),
            patience.as_millis()
        );
        let parameters = [
            ("user", user),
            ("database", config.get_dbname().unwrap_or(user)),
            ("replication", "database"),
            ("client_encoding", "UTF8"),
            ("application_name", config.get_application_name().unwrap_or("cache-aside")),
            ("options", options.trim_start()),
        ];
        frontend::startup_message(parameters, &mut stream.outbox)?;
        stream.send().await?;
        stream.authenticate(user, config.get_password().unwrap_or_default()).await?;
        // A server that follows has no such slot, which must not be taken for a slot that was lost.
        if stream.follows().await? {
            return Err(Broken::Unusable("it follows another database".into()));
        }
        // Both names are letters, digits and underscores.
        let command = format!(
            "START_REPLICATION SLOT \"{slot}\" LOGICAL 0/0 (proto_version '1', publication_names '{publication}')"
        );
        frontend::query(&command, &mut stream.outbox)?;
        stream.send().await?;
        loop {
            let mut frame = stream.frame().await?;
            if frame.first() == Some(&b'W') {
                return Ok(stream);
            }
            if let Some(Message::ErrorResponse(body)) = Message::parse(&mut frame)? {
                return Err(refused(&body));
            }
        }
    }

    async fn authenticate(&mut self, user: &str, password: &[u8]) -> Result<(), Broken> {
        let mut scram = None;
        loop {
            let mut frame = self.frame().await?;
            match Message::parse(&mut frame)? {
                Some(Message::AuthenticationCleartextPassword) => {
                    frontend::password_message(password, &mut self.outbox)?;
                }
                Some(Message::AuthenticationMd5Password(body)) => {
                    let hash = md5_hash(user.as_bytes(), password, body.salt());
                    frontend::password_message(hash.as_bytes(), &mut self.outbox)?;
                }
                Some(Message::AuthenticationSasl(_)) => {
                    let start = sasl::ScramSha256::new(password, sasl::ChannelBinding::unsupported());
                    frontend::sasl_initial_response(sasl::SCRAM_SHA_256, start.message(), &mut self.outbox)?;
                    scram = Some(start);
                }
                Some(Message::AuthenticationSaslContinue(body)) => {
                    let scram = scram.as_mut().ok_or_else(|| strange("an answer to what was not asked"))?;
                    scram.update(body.data())?;
                    frontend::sasl_response(scram.message(), &mut self.outbox)?;
                }
                Some(Message::AuthenticationSaslFinal(body)) => {
                    let scram = scram.as_mut().ok_or_else(|| strange("an answer to what was not asked"))?;
                    scram.finish(body.data())?;
                }
                Some(Message::ErrorResponse(body)) => return Err(refused(&body)),
                Some(Message::ReadyForQuery(_)) => return Ok(()),
                Some(
                    Message::AuthenticationOk
                    | Message::ParameterStatus(_)
                    | Message::BackendKeyData(_)
                    | Message::NoticeResponse(_),
                ) => {}
                _ => return Err(strange("a way to authenticate that is not built")),
            }
            self.send().await?;
        }
    }

    async fn follows(&mut self) -> Result<bool, Broken> {
        frontend::query("SELECT pg_is_in_recovery()", &mut self.outbox)?;
        self.send().await?;
        let mut follows = true;
        loop {
            let mut frame = self.frame().await?;
            match Message::parse(&mut frame)? {
                Some(Message::DataRow(row)) => follows = row.buffer().last() != Some(&b'f'),
                Some(Message::ErrorResponse(body)) => return Err(refused(&body)),
                Some(Message::ReadyForQuery(_)) => return Ok(follows),
                _ => {}
            }
        }
    }

    /// What comes next. May be dropped and called again: nothing is lost.
    pub(super) async fn next(&mut self) -> Result<Received, Broken> {
        loop {
            let mut frame = self.frame().await?;
            let mut body = match Message::parse(&mut frame)? {
                Some(Message::CopyData(body)) => body.into_bytes(),
                Some(Message::ErrorResponse(body)) => return Err(refused(&body)),
                Some(Message::NoticeResponse(_) | Message::ParameterStatus(_)) => continue,
                _ => return Err(strange("the end of the stream")),
            };
            match body.try_get_u8() {
                // Where it starts, where the log ends, and the server's clock.
                Ok(b'w') if body.len() >= 24 => {
                    body.advance(24);
                    return Ok(Received::Data(body));
                }
                Ok(b'k') if body.len() >= 17 => {
                    let position = body.get_u64();
                    body.advance(8);
                    return Ok(Received::CaughtUp { position, reply: body.get_u8() == 1 });
                }
                _ => return Err(strange("a message that is not known")),
            }
        }
    }

    /// Whether a whole message is here already.
    pub(super) fn has_more(&self) -> bool {
        let header = Header::parse(&self.inbox).ok().flatten();
        header.is_some_and(|header| usize::try_from(header.len()).is_ok_and(|length| self.inbox.len() > length))
    }

    /// Says that everything before this position is safe, and that we are there; and asks whether the server is.
    pub(super) async fn confirm(&mut self, position: u64, asks: bool) -> Result<(), Broken> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_micros();
        let now = u64::try_from(now).unwrap_or(EPOCH).saturating_sub(EPOCH);
        let mut status = BytesMut::with_capacity(34);
        status.put_u8(b'r');
        // Written, flushed, applied.
        for _ in 0..3 {
            status.put_u64(position);
        }
        status.put_u64(now);
        status.put_u8(asks.into());
        frontend::CopyData::new(status)?.write(&mut self.outbox);
        self.send().await
    }

    async fn send(&mut self) -> Result<(), Broken> {
        self.io.write_all(&self.outbox).await?;
        self.outbox.clear();
        self.io.flush().await?;
        Ok(())
    }

    /// One whole message, or the start of one that is too long. May be dropped and called again.
    async fn frame(&mut self) -> Result<BytesMut, Broken> {
        loop {
            if let Some((start, rest)) = &mut self.long {
                let here = (*rest).min(self.inbox.len());
                self.inbox.advance(here);
                *rest -= here;
                if *rest == 0 {
                    let start = std::mem::take(start);
                    self.long = None;
                    return Ok(start);
                }
            } else if let Some(header) = Header::parse(&self.inbox)? {
                // The parser has seen that the length is no less than 4.
                let whole = usize::try_from(header.len()).unwrap_or(usize::MAX).saturating_add(1);
                if self.inbox.len() >= whole {
                    return Ok(self.inbox.split_to(whole));
                }
                if whole > LONGEST && self.inbox.len() >= KEPT {
                    let mut start = self.inbox.split_to(KEPT);
                    // With a length to match.
                    start[1..5].copy_from_slice(&u32::try_from(KEPT - 1).unwrap_or_default().to_be_bytes());
                    self.long = Some((start, whole - KEPT));
                    continue;
                }
            }
            // As much as there is: what gathers while changes are written is written at once.
            self.inbox.reserve(READ);
            if self.io.read_buf(&mut self.inbox).await? == 0 {
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
            }
        }
    }
}

async fn encrypt(
    mode: SslMode,
    tls: &MakeRustlsConnect,
    name: &str,
    mut tcp: TcpStream,
) -> Result<Box<dyn Duplex>, Broken> {
    if mode == SslMode::Disable {
        return Ok(Box::new(tcp));
    }
    let mut ask = BytesMut::new();
    frontend::ssl_request(&mut ask);
    tcp.write_all(&ask).await?;
    if tcp.read_u8().await? != b'S' {
        if mode == SslMode::Require {
            return Err(Broken::Unusable("the server has no TLS".into()));
        }
        return Ok(Box::new(tcp));
    }
    let mut tls = tls.clone();
    let connect = MakeTlsConnect::<TcpStream>::make_tls_connect(&mut tls, name)
        .map_err(|error| Broken::Unusable(error.to_string()))?;
    Ok(Box::new(connect.connect(tcp).await?))
}

fn strange(what: &str) -> Broken {
    Broken::Unusable(format!("the server sent {what}"))
}

fn refused(body: &ErrorResponseBody) -> Broken {
    let (mut code, mut message) = (String::new(), String::new());
    let mut fields = body.fields();
    while let Ok(Some(field)) = fields.next() {
        let value = || String::from_utf8_lossy(field.value_bytes()).into_owned();
        match field.type_() {
            b'C' => code = value(),
            b'M' => message = value(),
            _ => {}
        }
    }
    Broken::Refused { code, message }
}
