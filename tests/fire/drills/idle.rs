//! Thousands of connections on which nothing happens, and hundreds that send a byte per second: everybody else is served
//! as before, and who never asks is sent away.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::sleep;

use crate::fleet::{Fleet, Kit};
use crate::load::{Load, Window, uniform};
use crate::report::{Report, ratio};
use crate::wire::{How, Wire, get};

const IDLE: usize = 5000;
/// Of those, how many never asked for anything.
const SILENT: usize = 2500;
const SLOW: usize = 200;
const RATE: f64 = 1500.0;
const KEYS: usize = 500;
const TIME: Duration = Duration::from_secs(8);
/// How long a server may take to lose patience with who never finishes a request.
const PATIENCE: Duration = Duration::from_secs(30);

pub async fn run() -> Report {
    let fleet = Fleet::start(Kit { replicas: 1, ..Kit::default() }).await;
    fleet.cached().await;
    fleet.warm(KEYS).await;
    let before = measure(&fleet).await;
    let address = fleet.addresses()[0];
    let closed = Arc::new(Closed::default());
    let mut crowd = JoinSet::new();
    for place in 0..IDLE {
        let wire = Wire::open(address).await.expect("it is let in");
        crowd.spawn(idle(wire, place < SILENT, Arc::clone(&closed)));
    }
    for _ in 0..SLOW {
        crowd.spawn(slow(address, Arc::clone(&closed)));
    }
    // Those that ask once have done so.
    sleep(Duration::from_secs(1)).await;
    let during = measure(&fleet).await;
    let ready = fleet.apps[0].get("/readyz").await.status;
    let began = Instant::now();
    while began.elapsed() < PATIENCE && !closed.all() {
        sleep(Duration::from_millis(100)).await;
    }

    let title = format!(
        "idle: {IDLE} idle connections ({SILENT} never asked) and {SLOW} that send a byte per second, at one replica"
    );
    let mut report = Report::new(title, true);
    report.calm(&before);
    let failed = during.asked() - during.served();
    report.must("other reads that failed", format!("{failed} of {}", during.asked()), "0", failed == 0);
    let p99 = |window: &Window| window.percentile(99.0, &[How::Hit]);
    let seen =
        format!("{:.2} × ({:.2} ms against {:.2} ms)", ratio(p99(&during), p99(&before)), p99(&during), p99(&before));
    report.timing("p99 of others, with / without them", seen, "10 at most", ratio(p99(&during), p99(&before)) <= 10.0);
    let p50 = |window: &Window| window.percentile(50.0, &[How::Hit]);
    report.seen("p50 of others, with / without them", format!("{:.2} ×", ratio(p50(&during), p50(&before))));
    report.must("/readyz among them", ready, "200", ready == 200);
    let counts = [&closed.silent, &closed.slow, &closed.asked].map(|count| count.load(Ordering::Relaxed));
    let [silent, slow, asked] = counts;
    report.must("sent away: never asked", format!("{silent} of {SILENT}"), "all", silent == SILENT);
    report.must("sent away: a byte per second", format!("{slow} of {SLOW}"), "all", slow == SLOW);
    let words = format!("{asked} of {}", IDLE - SILENT);
    report.seen("sent away by then: asked once, and stays for a next request", words);
    report
}

async fn measure(fleet: &Fleet) -> Window {
    let load = Load {
        targets: fleet.targets(),
        path: "/api/thing/",
        keys: uniform(KEYS),
        rate: RATE,
        connections: 96,
        control: None,
    };
    let began = Instant::now();
    load.run(TIME).await.since(began + Duration::from_secs(1))
}

/// How many were sent away.
#[derive(Default)]
struct Closed {
    silent: AtomicUsize,
    asked: AtomicUsize,
    slow: AtomicUsize,
}

impl Closed {
    fn all(&self) -> bool {
        self.silent.load(Ordering::Relaxed) == SILENT && self.slow.load(Ordering::Relaxed) == SLOW
    }
}

async fn idle(mut wire: Wire, silent: bool, closed: Arc<Closed>) {
    if !silent {
        wire.ask(&get("/api/thing/1")).await.expect("it is answered");
    }
    wire.ended().await;
    let count = if silent { &closed.silent } else { &closed.asked };
    count.fetch_add(1, Ordering::Relaxed);
}

/// Sends a request that has no end, byte by byte, until it is sent away.
async fn slow(address: SocketAddr, closed: Arc<Closed>) {
    let mut stream = TcpStream::connect(address).await.expect("it is let in");
    let (mut reading, mut writing) = stream.split();
    let endless =
        b"GET /api/thing/1 HTTP/1.1\r\nhost: drill\r\nx-patience: ".iter().copied().chain(std::iter::repeat(b'a'));
    let dripping = async {
        for byte in endless {
            if writing.write_all(&[byte]).await.is_err() {
                return;
            }
            sleep(Duration::from_secs(1)).await;
        }
    };
    let ended =
        async { while !matches!(tokio::io::AsyncReadExt::read(&mut reading, &mut [0; 512]).await, Ok(0) | Err(_)) {} };
    tokio::select! {
        () = dripping => {}
        () = ended => {}
    }
    closed.slow.fetch_add(1, Ordering::Relaxed);
}
