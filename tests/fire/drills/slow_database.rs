//! The database is ten times slower for half a minute, with more misses than it can then serve: hits don't notice, what is
//! too much is refused at once, and nothing piles up.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tokio::time::sleep;

use crate::fleet::{Fleet, Kit, values};
use crate::load::{Load, uniform};
use crate::report::{Report, ratio};
use crate::wire::How;

const ROWS: usize = 100_000;
/// Keys that are read again and again.
const WARM: usize = 1000;
const HITS: f64 = 1500.0;
/// Keys that nobody has read, per second: twelve permits serve 1,200 a second when calm, 120 when slow.
const MISSES: f64 = 400.0;
const POOL: usize = 4;
const QUEUE: usize = 32;
const PACE: Duration = Duration::from_millis(10);
const SLOWER: u32 = 10;
const SLOW: Duration = Duration::from_secs(30);
const CALM: Duration = Duration::from_secs(8);
/// More than can be under way: waiting, at work, and some to be refused.
const CONNECTIONS: usize = 900;

pub async fn run() -> Report {
    let fleet = Fleet::start(Kit { rows: ROWS, pool_size: POOL, queue: QUEUE, ..Kit::default() }).await;
    fleet.cached().await;
    fleet.warm(WARM).await;
    fleet.pace(PACE).await;
    let next = Arc::new(AtomicUsize::new(WARM));
    let never_read = Arc::new(move |_: &mut fastrand::Rng| next.fetch_add(1, Ordering::Relaxed) % ROWS + 1);
    let load = |keys, rate, connections| Load {
        targets: fleet.targets(),
        path: "/api/thing/",
        keys,
        rate,
        connections,
        control: None,
    };
    let hits = load(uniform(WARM), HITS, 96).start();
    let misses = load(never_read, MISSES, CONNECTIONS).start();
    sleep(Duration::from_secs(3)).await;
    let calm = Instant::now();
    let calm_state = watch(&fleet, CALM).await;
    fleet.pace(PACE * SLOWER).await;
    let slow = Instant::now();
    let slow_state = watch(&fleet, SLOW).await;
    fleet.pace(PACE).await;
    let over = Instant::now();
    let after_state = watch(&fleet, CALM).await;
    let (hits, misses) = (hits.end().await, misses.end().await);
    // Who was refused when calm came back may have waited since before.
    let settled = over + Duration::from_secs(2);

    let title = format!(
        "slow database: {SLOWER} times slower for {} s, {HITS} hits/s and {MISSES} misses/s over three replicas",
        SLOW.as_secs()
    );
    let mut report = Report::new(title, true);
    let (before, during) = (hits.between(calm, slow), hits.between(slow, over));
    report.calm(&before);
    let p99 = |window: &crate::load::Window| window.percentile(99.0, &[How::Hit]);
    let seen =
        format!("{:.2} × ({:.2} ms against {:.2} ms)", ratio(p99(&during), p99(&before)), p99(&during), p99(&before));
    report.timing("p99 of hits, slow / calm", seen, "3 at most", ratio(p99(&during), p99(&before)) <= 3.0);
    let unserved = during.asked() - during.served();
    report.must("hits that failed", format!("{unserved} of {}", during.asked()), "0", unserved == 0);
    let (before, during, after) = (misses.between(calm, slow), misses.between(slow, over), misses.since(settled));
    report.timing("misses shed while calm", before.count(How::Shed), "0", before.count(How::Shed) == 0);
    let shed = during.count(How::Shed);
    #[expect(clippy::cast_precision_loss, reason = "fewer than 2^52 reads")]
    let share = shed as f64 / during.asked().max(1) as f64;
    report.must(
        "misses shed while slow",
        format!("{shed} of {} ({:.0} %)", during.asked(), share * 100.0),
        "some",
        shed > 0,
    );
    report.must("503 without Retry-After", during.without_retry_after, "0", during.without_retry_after == 0);
    let failed = during.count(How::Failed);
    report.must("misses that failed otherwise", failed, "0", failed == 0);
    let at_once = during.percentile(50.0, &[How::Shed]);
    let waited = during.percentile(50.0, &[How::Miss, How::Bypass]);
    let seen = format!("{:.3} × ({at_once:.2} ms against {waited:.0} ms)", ratio(at_once, waited));
    report.timing("median of a refusal / of a miss that is served", seen, "0.1 at most", ratio(at_once, waited) <= 0.1);
    report.seen("p99 of a refusal", format!("{:.1} ms", during.percentile(99.0, &[How::Shed])));
    let longest = during.percentile(100.0, &[How::Miss, How::Bypass]);
    report.seen("longest miss that was served", format!("{longest:.0} ms"));
    report.timing("misses shed 2 s later", after.count(How::Shed), "0", after.count(How::Shed) == 0);
    let most = |states: &[State]| states.iter().map(|state| state.waiting).fold(0.0, f64::max);
    let waiting = most(&slow_state);
    #[expect(clippy::cast_precision_loss, reason = "a few dozen")]
    let bound = QUEUE as f64;
    report.must("requests that wait at one replica, at most", waiting, format!("{QUEUE} at most"), waiting <= bound);
    let left = most(&after_state[after_state.len() / 2..]);
    report.seen("the same, when calm again", left);
    let bound = (QUEUE + POOL) * fleet.apps.len() + 100;
    let under_way = misses.most_under_way;
    report.must(
        "misses under way, at most",
        under_way,
        format!("{bound}: queues, permits, refusals"),
        under_way <= bound,
    );
    let rss = |states: &[State]| states.iter().map(|state| state.memory).fold(0.0, f64::max);
    let (memory, full) = (rss(&calm_state), rss(&slow_state));
    let seen = format!("{:.2} × ({:.1} MiB against {:.1} MiB)", ratio(full, memory), full / MIB, memory / MIB);
    report.timing("memory of the replicas, slow / calm", seen, "1.2 at most", ratio(full, memory) <= 1.2);
    report
}

const MIB: f64 = 1024.0 * 1024.0;

/// What the replicas say of themselves.
struct State {
    /// Requests that wait for a connection, where there are most.
    waiting: f64,
    /// Bytes of all replicas together.
    memory: f64,
}

/// Asks the replicas twice a second for a while.
async fn watch(fleet: &Fleet, time: Duration) -> Vec<State> {
    let began = Instant::now();
    let mut states = Vec::new();
    while began.elapsed() < time {
        let mut state = State { waiting: 0.0, memory: 0.0 };
        for app in &fleet.apps {
            let text = app.get("/metrics").await.text;
            let waiting = values(&text, "cache_aside_pool_connections{backend=\"postgresql\",state=\"waiting\"}").sum();
            state.waiting = state.waiting.max(waiting);
            state.memory += values(&text, "process_resident_memory_bytes").sum::<f64>();
        }
        states.push(state);
        sleep(Duration::from_millis(500).min(time.saturating_sub(began.elapsed()))).await;
    }
    states
}
