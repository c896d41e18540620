//! A TCP proxy that breaks the network between a client and its server, and mends it again.
//!
//! It runs on a thread and a clock of its own, so every fault has happened when its call returns, whatever runtime the
//! test has. It knows nothing of the bytes it carries; servers that crash or freeze are in `servers`.
#![allow(dead_code, reason = "which faults are in use depends on the stories, and a harness is read as a whole")]
#![expect(clippy::expect_used, reason = "a test without its proxy ends here, and says why")]
#![expect(unreachable_pub, reason = "one binary: `pub` says what is meant for the stories")]

use std::{
    future::{pending, poll_fn},
    io,
    net::{Ipv4Addr, SocketAddr},
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use tokio::{
    io::AsyncWrite,
    net::{
        TcpListener, TcpSocket, TcpStream,
        tcp::{ReadHalf, WriteHalf},
    },
    runtime,
    sync::{mpsc, oneshot, watch},
    task::JoinSet,
    time::{Instant, sleep_until},
};

/// A way to one server. Faults do not add up: the last call counts.
pub struct Proxy {
    addr: SocketAddr,
    target: Arc<Mutex<SocketAddr>>,
    counts: Arc<Counts>,
    orders: Option<mpsc::UnboundedSender<Order>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Proxy {
    /// Opens a way to `target`, which need not be there yet: it is called anew for each client.
    pub async fn to(target: SocketAddr) -> Self {
        let (counts, target) = (Arc::new(Counts::default()), Arc::new(Mutex::new(target)));
        let (orders, inbox) = mpsc::unbounded_channel();
        let (ready, addr) = oneshot::channel();
        let thread = thread::spawn({
            let (counts, target) = (Arc::clone(&counts), Arc::clone(&target));
            move || {
                let runtime =
                    runtime::Builder::new_current_thread().enable_all().build().expect("a runtime should start");
                runtime.block_on(async {
                    let door = Door::new();
                    let listener = door.open();
                    let _ = ready.send(door.addr);
                    serve(door, listener, &target, &counts, inbox).await;
                });
            }
        });
        let addr = addr.await.expect("the proxy should find a port");
        Self { addr, target, counts, orders: Some(orders), thread: Some(thread) }
    }

    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Leads clients that come from now on to another server.
    pub fn lead_to(&self, target: SocketAddr) {
        *self.target.lock().expect("nobody panics with it") = target;
    }

    /// Resets every connection and refuses new ones.
    pub fn cut(&self) {
        self.order(Line::Cut);
    }

    /// Lets connections be open and new ones be made, but no byte and no ending pass, in either direction.
    ///
    /// What was sent meanwhile arrives after [`restore`](Self::restore), as after a partition.
    pub fn black_hole(&self) {
        self.order(Line::BlackHole);
    }

    /// Holds each chunk on its way to the server for this long, one after the other.
    pub fn delay(&self, delay: Duration) {
        self.order(Line::Open { delay });
    }

    /// Carries what clients say, and keeps back what servers answer until [`restore`](Self::restore).
    pub fn mute(&self) {
        self.order(Line::Mute);
    }

    pub fn restore(&self) {
        self.order(Line::Open { delay: Duration::ZERO });
    }

    /// Clients connected now; in a black hole also those that have hung up since.
    pub fn connections(&self) -> usize {
        self.counts.open.load(Ordering::SeqCst)
    }

    /// Clients ever let in.
    pub fn accepted(&self) -> u64 {
        self.counts.accepted.load(Ordering::SeqCst)
    }

    fn order(&self, line: Line) {
        let (done, wait) = std::sync::mpsc::channel();
        let orders = self.orders.as_ref().expect("the proxy runs until it is dropped");
        orders.send(Order { line, done }).expect("the proxy should be running");
        wait.recv().expect("the proxy should obey");
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        drop(self.orders.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Line {
    Open { delay: Duration },
    Mute,
    BlackHole,
    Cut,
}

struct Order {
    line: Line,
    done: std::sync::mpsc::Sender<()>,
}

#[derive(Default)]
struct Counts {
    open: AtomicUsize,
    accepted: AtomicU64,
}

/// Takes one away from the open connections when it goes.
struct Open(Arc<Counts>);

impl Open {
    fn count(counts: &Arc<Counts>) -> Self {
        counts.accepted.fetch_add(1, Ordering::SeqCst);
        counts.open.fetch_add(1, Ordering::SeqCst);
        Self(Arc::clone(counts))
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Our address, kept while nobody listens there by a socket that never does: a client is then refused, and the port is
/// given to nobody else.
struct Door {
    addr: SocketAddr,
    _held: TcpSocket,
}

impl Door {
    fn new() -> Self {
        let held = TcpSocket::new_v4().expect("a socket should open");
        held.bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0))).expect("a port should be free");
        // Only now, so that the port was ours alone.
        held.set_reuseaddr(true).expect("a port can be shared");
        Self { addr: held.local_addr().expect("a bound socket has an address"), _held: held }
    }

    fn open(&self) -> TcpListener {
        let socket = TcpSocket::new_v4().expect("a socket should open");
        socket.set_reuseaddr(true).expect("a port can be shared");
        socket.bind(self.addr).expect("the port should still be ours");
        socket.listen(1024).expect("the port should still be ours")
    }
}

async fn serve(
    door: Door,
    listener: TcpListener,
    target: &Mutex<SocketAddr>,
    counts: &Arc<Counts>,
    mut inbox: mpsc::UnboundedReceiver<Order>,
) {
    let line = watch::Sender::new(Line::Open { delay: Duration::ZERO });
    let mut listener = Some(listener);
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            order = inbox.recv() => {
                let Some(Order { line: wanted, done }) = order else { return };
                line.send_replace(wanted);
                if wanted == Line::Cut {
                    listener = None;
                    while connections.join_next().await.is_some() {}
                } else {
                    listener.get_or_insert_with(|| door.open());
                }
                let _ = done.send(());
            }
            client = accept(listener.as_ref()) => {
                // A client that gave up while it waited is no reason to stop.
                if let Ok(client) = client {
                    let target = *target.lock().expect("nobody panics with it");
                    connections.spawn(connection(client, target, line.subscribe(), Open::count(counts)));
                }
            }
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn accept(listener: Option<&TcpListener>) -> io::Result<TcpStream> {
    match listener {
        Some(listener) => listener.accept().await.map(|(client, _)| client),
        None => pending().await,
    }
}

/// Carries one client's bytes until both sides have ended, or one of them breaks: then the other breaks too.
async fn connection(mut client: TcpStream, target: SocketAddr, mut line: watch::Receiver<Line>, _open: Open) {
    let mut server = None;
    let mut cut = line.clone();
    let carried = async {
        passage(&mut line, None).await;
        let server = server.insert(TcpStream::connect(target).await?);
        // Else a delay could be the kernel's rather than the one asked for.
        client.set_nodelay(true)?;
        server.set_nodelay(true)?;
        let (from_client, to_client) = client.split();
        let (from_server, to_server) = server.split();
        tokio::try_join!(
            pump(from_client, to_server, line.clone(), true),
            pump(from_server, to_client, line.clone(), false)
        )
    };
    let ended_well = tokio::select! {
        _ = cut.wait_for(|line| *line == Line::Cut) => false,
        carried = carried => carried.is_ok(),
    };
    if !ended_well {
        // Closing then means a reset instead of a polite end.
        for end in [Some(&client), server.as_ref()].into_iter().flatten() {
            let _ = end.set_zero_linger();
        }
    }
}

/// Carries one direction, its end included.
async fn pump(
    from: ReadHalf<'_>,
    mut to: WriteHalf<'_>,
    mut line: watch::Receiver<Line>,
    delayed: bool,
) -> io::Result<()> {
    let mut chunk = vec![0; 16 * 1024];
    loop {
        let length = read(&from, &mut chunk).await?;
        let arrived = delayed.then(Instant::now);
        passage(&mut line, arrived).await;
        if length == 0 {
            return poll_fn(|context| Pin::new(&mut to).poll_shutdown(context)).await;
        }
        let mut rest = &chunk[..length];
        while !rest.is_empty() {
            match to.try_write(rest) {
                Ok(written) => rest = &rest[written..],
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => to.writable().await?,
                Err(error) => return Err(error),
            }
            passage(&mut line, arrived).await;
        }
    }
}

async fn read(from: &ReadHalf<'_>, chunk: &mut [u8]) -> io::Result<usize> {
    loop {
        from.readable().await?;
        match from.try_read(chunk) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            other => return other,
        }
    }
}

/// Waits until the line lets through what `arrived` then; what is not delayed has no time of arrival.
async fn passage(line: &mut watch::Receiver<Line>, arrived: Option<Instant>) {
    loop {
        let now = *line.borrow_and_update();
        let due = match (now, arrived) {
            (Line::Open { delay }, Some(arrived)) => Some(arrived + delay),
            (Line::Open { .. }, None) | (Line::Mute, Some(_)) => return,
            (Line::Mute, None) | (Line::BlackHole | Line::Cut, _) => None,
        };
        let changed = async {
            if line.changed().await.is_err() {
                pending::<()>().await;
            }
        };
        match due {
            Some(due) if due <= Instant::now() => return,
            Some(due) => tokio::select! { () = sleep_until(due) => {}, () = changed => {} },
            None => changed.await,
        }
    }
}
