//! Readers: so many per second, whatever the answers take; and volleys, where everybody asks at once.
//!
//! The rate is fixed beforehand (an open loop), because users don't wait with their next request until the service has
//! caught up. A client that asks again only after it was answered asks less while the service is slow: its percentiles
//! then hold a few slow answers where users would have had thousands ("coordinated omission"). So each request has the
//! moment at which it is meant to be sent, and its latency counts from that moment, also when its connection was still
//! busy with the one before.
//!
//! Everything of one load runs on one thread of its own: the wake-ups between threads would cost more than the work.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::thread;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use tokio::runtime;
use tokio::task::JoinSet;

use crate::wire::{Broken, HOWS, How, Wire, get};

/// The timer has steps of a millisecond: a request that it alone made late by less than this counts from when it was sent.
const TIMER: Duration = Duration::from_millis(2);
/// One request of so many is the control's.
const CONTROL: u64 = 20;
/// How long a window is.
const WINDOW: Duration = Duration::from_millis(100);

/// Who can be asked: an address per replica, and whether a load balancer would send there.
#[derive(Default)]
pub struct Targets {
    list: RwLock<Vec<Option<SocketAddr>>>,
    version: AtomicUsize,
}

impl Targets {
    pub fn new(list: Vec<SocketAddr>) -> Arc<Self> {
        let list = list.into_iter().map(Some).collect();
        Arc::new(Self { list: RwLock::new(list), version: AtomicUsize::new(0) })
    }

    /// Sends what comes from now on to another address, or to the other replicas.
    pub fn set(&self, replica: usize, address: Option<SocketAddr>) {
        self.list.write().unwrap_or_else(PoisonError::into_inner)[replica] = address;
        self.version.fetch_add(1, Ordering::Release);
    }

    /// The replica at this place, or the next one that can be asked.
    fn from(&self, place: usize) -> Option<SocketAddr> {
        let list = self.list.read().unwrap_or_else(PoisonError::into_inner);
        (0..list.len()).find_map(|step| list[(place + step) % list.len()])
    }
}

/// Chooses the next key.
pub type Keys = Arc<dyn Fn(&mut fastrand::Rng) -> usize + Send + Sync>;

/// What is asked, of whom, how often.
pub struct Load {
    pub targets: Arc<Targets>,
    /// Everything before the key.
    pub path: &'static str,
    pub keys: Keys,
    /// Requests per second, of all connections together.
    pub rate: f64,
    /// One of twenty requests asks for this instead, and is recorded apart: whatever else this machine does meanwhile, it
    /// does to both.
    pub control: Option<&'static str>,
    /// How many connections there are, and so how many requests can be under way. Whichever is free takes the next
    /// request: one that waits for its answer delays no other.
    pub connections: usize,
}

/// Answers to requests that were meant to be sent within some time.
#[derive(Clone)]
pub struct Window {
    counts: [u64; HOWS.len()],
    /// In microseconds, by what came of it.
    latencies: [Option<Histogram<u32>>; HOWS.len()],
    /// A connection that had been idle was closed under the request, which went through on a new one.
    pub again: u64,
    /// 503 that didn't say when to come again.
    pub without_retry_after: u64,
}

impl Default for Window {
    fn default() -> Self {
        Self { counts: [0; HOWS.len()], latencies: [const { None }; HOWS.len()], again: 0, without_retry_after: 0 }
    }
}

impl Window {
    pub fn record(&mut self, how: How, took: Duration) {
        self.counts[how as usize] += 1;
        let histogram = self.latencies[how as usize]
            .get_or_insert_with(|| Histogram::new_with_bounds(1, 60_000_000, 2).expect("sound bounds"));
        histogram.saturating_record(u64::try_from(took.as_micros()).unwrap_or(u64::MAX).max(1));
    }

    pub fn add(&mut self, other: &Self) {
        for how in HOWS {
            self.counts[how as usize] += other.counts[how as usize];
            let Some(theirs) = &other.latencies[how as usize] else { continue };
            match &mut self.latencies[how as usize] {
                Some(ours) => ours.add(theirs).expect("it grows where it must"),
                ours @ None => *ours = Some(theirs.clone()),
            }
        }
        self.again += other.again;
        self.without_retry_after += other.without_retry_after;
    }

    pub fn count(&self, how: How) -> u64 {
        self.counts[how as usize]
    }

    /// Everything that was asked.
    pub fn asked(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// Everything that was answered with a row.
    pub fn served(&self) -> u64 {
        self.asked() - self.count(How::Shed) - self.count(How::Failed)
    }

    #[expect(clippy::cast_precision_loss, reason = "fewer than 2^52 requests")]
    pub fn hit_ratio(&self) -> f64 {
        let hits = self.count(How::Hit) + self.count(How::Stale);
        hits as f64 / self.asked().max(1) as f64
    }

    /// A percentile of those that ended in one of these ways, in milliseconds; 0 where there were none.
    pub fn percentile(&self, percent: f64, hows: &[How]) -> f64 {
        let mut all: Option<Histogram<u32>> = None;
        for histogram in hows.iter().filter_map(|how| self.latencies[*how as usize].as_ref()) {
            match &mut all {
                Some(all) => all.add(histogram).expect("it grows where it must"),
                None => all = Some(histogram.clone()),
            }
        }
        all.map_or(0.0, |all| Duration::from_micros(all.value_at_quantile(percent / 100.0)).as_secs_f64() * 1000.0)
    }
}

/// What a load has seen, in windows of 100 ms.
pub struct Seen {
    began: Instant,
    windows: BTreeMap<u128, Window>,
    control: BTreeMap<u128, Window>,
    /// The most requests that were under way at one time.
    pub most_under_way: usize,
}

impl Seen {
    /// The same of the control alone.
    pub fn control(&self, from: Instant, to: Instant) -> Window {
        sum(self.control.range(self.index(from)..self.index(to)))
    }

    /// What was meant to be sent in this time, to the window.
    pub fn between(&self, from: Instant, to: Instant) -> Window {
        sum(self.windows.range(self.index(from)..self.index(to)))
    }

    /// From a moment on.
    pub fn since(&self, from: Instant) -> Window {
        self.between(from, from + Duration::from_hours(1))
    }

    /// Window by window, with the moment each began.
    pub fn each(&self, from: Instant) -> impl Iterator<Item = (Instant, &Window)> {
        let of = |index: u128| self.began + WINDOW * u32::try_from(index).unwrap_or(u32::MAX);
        self.windows.range(self.index(from)..).map(move |(index, window)| (of(*index), window))
    }

    fn index(&self, moment: Instant) -> u128 {
        moment.saturating_duration_since(self.began).as_millis() / WINDOW.as_millis()
    }
}

fn sum<'a>(windows: impl Iterator<Item = (&'a u128, &'a Window)>) -> Window {
    let mut sum = Window::default();
    windows.for_each(|(_, window)| sum.add(window));
    sum
}

/// A load that goes on.
pub struct Going {
    began: Instant,
    stop: Arc<AtomicBool>,
    thread: thread::JoinHandle<Seen>,
}

impl Going {
    /// Waits until a window begins: what is done then concerns none before it.
    pub async fn next_window(&self) {
        let over = Instant::now().saturating_duration_since(self.began).as_millis() % WINDOW.as_millis();
        let left = WINDOW.as_millis() - over;
        tokio::time::sleep(Duration::from_millis(u64::try_from(left).unwrap_or_default())).await;
    }

    /// Ends it, when what was asked is answered.
    pub async fn end(self) -> Seen {
        self.stop.store(true, Ordering::Relaxed);
        let ended = tokio::task::spawn_blocking(move || self.thread.join()).await;
        ended.expect("it can be waited for").expect("no reader panics")
    }
}

/// What the connections of a load share.
struct Shared {
    load: Load,
    began: Instant,
    stop: Arc<AtomicBool>,
    /// How many requests have found a connection.
    taken: AtomicU64,
    windows: Mutex<BTreeMap<u128, Window>>,
    control: Mutex<BTreeMap<u128, Window>>,
    under_way: AtomicUsize,
    most_under_way: AtomicUsize,
}

impl Load {
    pub fn start(self) -> Going {
        let stop = Arc::new(AtomicBool::new(false));
        let began = Instant::now() + Duration::from_millis(20);
        let shared = Arc::new(Shared {
            load: self,
            began,
            stop: Arc::clone(&stop),
            taken: AtomicU64::new(0),
            windows: Mutex::default(),
            control: Mutex::default(),
            under_way: AtomicUsize::new(0),
            most_under_way: AtomicUsize::new(0),
        });
        let thread = thread::spawn(move || {
            let runtime = runtime::Builder::new_current_thread().enable_all().build();
            runtime.expect("a runtime should start").block_on(async {
                let mut readers = JoinSet::new();
                for place in 0..shared.load.connections {
                    readers.spawn(reader(Arc::clone(&shared), place));
                }
                readers.join_all().await;
            });
            let take =
                |windows: &Mutex<_>| std::mem::take(&mut *windows.lock().unwrap_or_else(PoisonError::into_inner));
            let (windows, control) = (take(&shared.windows), take(&shared.control));
            let most_under_way = shared.most_under_way.load(Ordering::Relaxed);
            Seen { began: shared.began, windows, control, most_under_way }
        });
        Going { began, stop, thread }
    }

    /// Reads for a while.
    pub async fn run(self, time: Duration) -> Seen {
        let going = self.start();
        tokio::time::sleep(time).await;
        going.end().await
    }
}

/// One connection: takes the next request, waits for its moment, asks, and so on.
#[expect(clippy::cast_precision_loss, reason = "fewer than 2^52 requests")]
async fn reader(shared: Arc<Shared>, place: usize) {
    let load = &shared.load;
    let mut random = fastrand::Rng::with_seed(place as u64);
    let mut request = Vec::with_capacity(128);
    let mut line = Line { wire: None, address: load.targets.from(place), version: 0 };
    loop {
        let number = shared.taken.fetch_add(1, Ordering::Relaxed);
        let meant = shared.began + Duration::from_secs_f64(number as f64 / load.rate);
        // In short steps, so that it ends soon where it asks rarely.
        loop {
            if shared.stop.load(Ordering::Relaxed) {
                return;
            }
            let now = Instant::now();
            if now >= meant {
                break;
            }
            tokio::time::sleep_until(meant.min(now + Duration::from_millis(200)).into()).await;
        }
        let now = Instant::now();
        let from = if now - meant < TIMER { now } else { meant };
        request.clear();
        let control = load.control.filter(|_| number.is_multiple_of(CONTROL));
        let path = control.unwrap_or(load.path);
        let key = (load.keys)(&mut random);
        let _ = write!(request, "GET {path}{key} HTTP/1.1\r\nhost: drill\r\n\r\n");
        let under_way = shared.under_way.fetch_add(1, Ordering::Relaxed) + 1;
        shared.most_under_way.fetch_max(under_way, Ordering::Relaxed);
        let (how, again, without) = line.ask(&shared, place, &request).await;
        let took = from.elapsed();
        shared.under_way.fetch_sub(1, Ordering::Relaxed);
        let index = meant.saturating_duration_since(shared.began).as_millis() / WINDOW.as_millis();
        {
            let windows = if control.is_some() { &shared.control } else { &shared.windows };
            let mut windows = windows.lock().unwrap_or_else(PoisonError::into_inner);
            let window = windows.entry(index).or_default();
            window.record(how, took);
            window.again += u64::from(again);
            window.without_retry_after += u64::from(without);
        }
    }
}

/// A reader's way to a replica.
struct Line {
    wire: Option<Wire>,
    address: Option<SocketAddr>,
    version: usize,
}

impl Line {
    /// What came of a request, whether it had to be sent again, and whether a refusal didn't say for how long.
    async fn ask(&mut self, shared: &Shared, place: usize, request: &[u8]) -> (How, bool, bool) {
        let targets = &shared.load.targets;
        let version = targets.version.load(Ordering::Acquire);
        if version != self.version {
            self.version = version;
            let address = targets.from(place);
            if address != self.address {
                (self.address, self.wire) = (address, None);
            }
        }
        let mut again = false;
        loop {
            let wire = match &mut self.wire {
                Some(wire) => wire,
                none => {
                    let Some(address) = self.address else { return (How::Failed, again, false) };
                    match Wire::open(address).await {
                        Ok(wire) => none.insert(wire),
                        Err(_) => return (How::Failed, again, false),
                    }
                }
            };
            let used = wire.used;
            match wire.ask(request).await {
                Ok(reply) => {
                    if reply.close {
                        self.wire = None;
                    }
                    return (reply.how, again, reply.how == How::Shed && !reply.retry_after);
                }
                // RFC 9112, 9.5: who asked on a connection that was idle may ask again where asking twice is safe.
                Err(Broken::Unanswered) if used && !again => {
                    again = true;
                    self.wire = None;
                }
                Err(_) => {
                    self.wire = None;
                    return (How::Failed, again, false);
                }
            }
        }
    }
}

/// One of a volley: whom it asked, what came of it and when, since the first was sent.
#[derive(Clone, Copy)]
pub struct Shot {
    pub replica: usize,
    pub how: How,
    /// `None`: there was no answer.
    pub status: Option<u16>,
    pub took: Duration,
}

/// Connections that were let in, spread over the replicas.
pub struct Volley(Vec<(usize, Wire)>);

/// A connection that a replica has let in: one that the kernel keeps in its queue is open too. Whoever was answered once may
/// also take his time; who asks nothing for five seconds is sent away before that.
pub async fn let_in(address: SocketAddr) -> Wire {
    let mut wire = Wire::open(address).await.expect("a connection can be made");
    let reply = wire.ask(&get("/livez")).await.expect("it is let in");
    assert_eq!(reply.status, 200, "it lives");
    wire
}

impl Volley {
    pub async fn load(addresses: &[SocketAddr], connections: usize) -> Self {
        let mut opening = JoinSet::new();
        let mut open = Vec::with_capacity(connections);
        for place in 0..connections {
            let replica = place % addresses.len();
            let address = addresses[replica];
            opening.spawn(async move { (replica, let_in(address).await) });
            // More at once would fill the queue of those that were not let in yet.
            while opening.len() >= 64 {
                open.push(opening.join_next().await.expect("there are some").expect("no reader panics"));
            }
        }
        open.extend(opening.join_all().await);
        Self(open)
    }

    /// All ask for the same, at once. Those at the replicas that count are waited for; the others are left alone then.
    pub async fn fire(self, path: &str, counted: &[usize]) -> Vec<Shot> {
        let request: Arc<[u8]> = get(path).into();
        let mut outstanding = self.0.iter().filter(|(replica, _)| counted.contains(replica)).count();
        let mut seen = Vec::with_capacity(outstanding);
        let began = Instant::now();
        let mut shots = JoinSet::new();
        for (replica, mut wire) in self.0 {
            let request = Arc::clone(&request);
            shots.spawn(async move {
                let reply = wire.ask(&request).await.ok();
                let how = reply.map_or(How::Failed, |reply| reply.how);
                let shot = Shot { replica, how, status: reply.map(|reply| reply.status), took: began.elapsed() };
                // The connections stay open until all are answered: closing them is no part of it.
                (shot, wire)
            });
        }
        let mut wires = Vec::new();
        while outstanding > 0 {
            let (shot, wire) = shots.join_next().await.expect("some are outstanding").expect("no reader panics");
            wires.push(wire);
            if counted.contains(&shot.replica) {
                outstanding -= 1;
                seen.push(shot);
            }
        }
        seen
    }
}

/// Zipf's law: the key of rank `n` is asked for in proportion to `1/n^exponent`, as in most traces of caches.
#[expect(clippy::cast_precision_loss, reason = "fewer than 2^52 keys")]
pub fn zipf(keys: usize, exponent: f64) -> Keys {
    let mut sum = 0.0;
    let cumulative: Vec<f64> = (1..=keys)
        .map(|rank| {
            sum += (rank as f64).powf(-exponent);
            sum
        })
        .collect();
    Arc::new(move |random| {
        let point = random.f64() * sum;
        cumulative.partition_point(|below| *below < point).min(keys - 1) + 1
    })
}

/// Every key alike.
pub fn uniform(keys: usize) -> Keys {
    Arc::new(move |random| random.usize(1..=keys))
}
