//! How many statements at one time do good: the same overload with more and more permits, where a statement is work.
//!
//! Elsewhere a statement waits, so that the database's capacity is known; here it keeps a processor busy, of which the
//! machine has few. Nothing must hold: this is for whoever chooses `database.pool_size`.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tokio::time::sleep;

use crate::fleet::{Fleet, Kit};
use crate::load::{Load, uniform};
use crate::report::Report;
use crate::wire::How;

const ROWS: usize = 100_000;
/// Keys that are read again and again.
const WARM: usize = 1000;
const HITS: f64 = 500.0;
/// Keys that nobody has read, per second: somewhat more than two cores can compute.
const MISSES: f64 = 500.0;
const QUEUE: usize = 32;
/// Permits of each replica.
const POOLS: [usize; 5] = [1, 2, 4, 8, 16];
/// Some milliseconds of work for each row.
const WORK: &str =
    "CREATE OR REPLACE VIEW thing AS SELECT id, name, price, description, nextval('evaluations') AS evaluation,
     (SELECT sum(sqrt(g)) FROM generate_series(1, 20000) g WHERE item.id > 0)::text AS waited FROM item";
const TIME: Duration = Duration::from_secs(8);

pub async fn run() -> Report {
    let title = format!(
        "permits: {HITS} hits/s and {MISSES} misses/s over three replicas, where a statement is work, for {} s each",
        TIME.as_secs()
    );
    let mut report = Report::new(title, true);
    for pool in POOLS {
        let fleet = Fleet::start(Kit { rows: ROWS, pool_size: pool, queue: QUEUE, ..Kit::default() }).await;
        fleet.cached().await;
        fleet.warm(WARM).await;
        fleet.database.client().await.batch_execute(WORK).await.expect("the view has the same columns");
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
        let (hits, misses) = (load(uniform(WARM), HITS, 96).start(), load(never_read, MISSES, 900).start());
        sleep(Duration::from_secs(2)).await;
        let from = Instant::now();
        sleep(TIME).await;
        let to = Instant::now();
        let (hits, misses) = (hits.end().await.between(from, to), misses.end().await.between(from, to));
        let hit = |percent| hits.percentile(percent, &[How::Hit]);
        let miss = |percent| misses.percentile(percent, &[How::Miss, How::Bypass]);
        report.seen(
            format!("{pool} at each replica: hits, p50 and p99"),
            format!("{:.1} ms, {:.0} ms", hit(50.0), hit(99.0)),
        );
        report.seen(
            format!("{pool} at each replica: misses served, shed; p50 and p99"),
            format!("{}, {}; {:.0} ms, {:.0} ms", misses.served(), misses.count(How::Shed), miss(50.0), miss(99.0)),
        );
    }
    report
}
