//! A cache of a hundred thousand entries is flushed under load: the database is asked as much as its permits let through,
//! and hits climb back. Draws what happened.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use tokio::time::sleep;

use crate::fleet::{Fleet, Kit};
use crate::load::{Load, Seen, zipf};
use crate::plot::{Panel, draw};
use crate::report::{Report, ratio};
use crate::servers::Redis;
use crate::wire::How;

const KEYS: usize = 100_000;
const RATE: f64 = 4000.0;
/// What a statement takes, and how many a replica has at one time: 24 permits serve 1,200 rows per second.
const PACE: Duration = Duration::from_millis(20);
const POOL: usize = 8;
const BEFORE: Duration = Duration::from_secs(8);
const AFTER: Duration = Duration::from_secs(40);
const STEP: Duration = Duration::from_millis(500);
const SERVED: [How; 4] = [How::Hit, How::Stale, How::Miss, How::Bypass];

pub async fn run(plot: Option<&str>) -> Report {
    let fleet = Fleet::start(Kit { rows: KEYS, pool_size: POOL, ..Kit::default() }).await;
    fleet.cached().await;
    fleet.warm(KEYS).await;
    fleet.pace(PACE).await;
    let watch = fleet.watch().await;
    let load = Load {
        targets: fleet.targets(),
        path: "/api/thing/",
        keys: zipf(KEYS, 0.99),
        rate: RATE,
        connections: 1200,
        control: None,
    };
    let going = load.start();
    sleep(Duration::from_secs(2)).await;
    let calm = Instant::now();
    sleep(BEFORE).await;
    let flushed = Instant::now();
    flush(&fleet.redis).await;
    sleep(AFTER).await;
    let end = Instant::now();
    let seen = going.end().await;
    let looks = watch.end();

    let title = format!("flush: {KEYS} entries flushed at {RATE} reads/s (Zipf 0.99) over three replicas");
    let mut report = Report::new(title, true);
    let permits = POOL * fleet.apps.len();
    #[expect(clippy::cast_precision_loss, reason = "two dozen")]
    let capacity = permits as f64 / PACE.as_secs_f64();
    report.calm(&seen.between(calm, flushed));
    report.seen("calm: hits", format!("{:.2} %", seen.between(calm, flushed).hit_ratio() * 100.0));
    report.seen("calm: rows read per second", format!("{:.0}", looks.rate(calm, flushed)));
    let rates = looks.rates(flushed, end, STEP);
    let peak = rates.iter().map(|(_, rate)| *rate).fold(0.0, f64::max);
    let text = format!("{:.2} × ({peak:.0}/s against {capacity:.0}/s)", ratio(peak, capacity));
    report.must(
        "peak of rows read per second / what the permits let through",
        text,
        "1.1 at most",
        peak <= capacity * 1.1,
    );
    let active = looks.most_active(calm, end);
    let bound = i64::try_from(permits).unwrap_or(i64::MAX);
    report.must("statements at one time", active, format!("{permits} at most: the permits"), active <= bound);
    let whole = seen.between(flushed, end);
    report.must(
        "reads that failed otherwise than by 503",
        whole.count(How::Failed),
        "0",
        whole.count(How::Failed) == 0,
    );
    report.must("503 without Retry-After", whole.without_retry_after, "0", whole.without_retry_after == 0);
    #[expect(clippy::cast_precision_loss, reason = "fewer than 2^52 reads")]
    let shed = whole.count(How::Shed) as f64 / whole.asked().max(1) as f64;
    report.seen("reads shed with 503", format!("{:.2} % ({})", shed * 100.0, whole.count(How::Shed)));
    let at = |seconds: u64| {
        let from = flushed + Duration::from_secs(seconds);
        seen.between(from, from + Duration::from_secs(1)).hit_ratio()
    };
    let (soon, late) = (at(1), at(AFTER.as_secs() - 2));
    report.seen(
        "hits after 1, 5, 10, 20 s",
        [1, 5, 10, 20].map(|second| format!("{:.0} %", at(second) * 100.0)).join(", "),
    );
    report.must("hits at the end", format!("{:.1} %", late * 100.0), "more than after 1 s", late > soon);
    let rate = looks.rate(flushed + AFTER * 7 / 8, end);
    report.seen("rows read per second at the end / peak", format!("{:.2} × ({rate:.0}/s)", ratio(rate, peak)));
    let p99 = |window: crate::load::Window| window.percentile(99.0, &[How::Hit]);
    let (calm_p99, after_p99) = (p99(seen.between(calm, flushed)), p99(whole.clone()));
    let last = p99(seen.between(flushed + AFTER * 3 / 4, end));
    let text = format!("{:.2} ×, {:.2} × ({calm_p99:.1} ms calm)", ratio(after_p99, calm_p99), ratio(last, calm_p99));
    report.seen("p99 of hits / calm: since the flush, and in the last quarter", text);
    report.seen("longest answer with a row", format!("{:.0} ms", whole.percentile(100.0, &SERVED)));

    let rates = looks.rates(calm, end, STEP);
    let since = |moment: Instant| {
        if moment < flushed { -(flushed - moment).as_secs_f64() } else { (moment - flushed).as_secs_f64() }
    };
    let queries: Vec<(f64, f64)> = rates.iter().map(|(moment, rate)| (since(*moment), *rate)).collect();
    let hits = hits(&seen, calm, end).into_iter().map(|(moment, ratio)| (since(moment), ratio * 100.0)).collect();
    write(plot, &queries, hits, capacity);
    report
}

async fn flush(redis: &Redis) {
    let _: () = redis::cmd("FLUSHALL").query_async(&mut redis.client().await).await.expect("it obeys");
}

fn hits(seen: &Seen, from: Instant, to: Instant) -> Vec<(Instant, f64)> {
    let steps = u32::try_from((to - from).as_millis() / STEP.as_millis()).unwrap_or(0);
    let moments = (0..steps).map(|step| from + STEP * step);
    moments.map(|moment| (moment, seen.between(moment, moment + STEP).hit_ratio())).collect()
}

/// A table and a drawing, where the person who asked wants them, else beside the build.
fn write(plot: Option<&str>, queries: &[(f64, f64)], hits: Vec<(f64, f64)>, capacity: f64) {
    let file = plot.map_or_else(|| PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("flush.svg"), PathBuf::from);
    let mut table = String::from("seconds,rows_read_per_second,hits_percent\n");
    for ((second, rate), (_, hit)) in queries.iter().zip(&hits) {
        let _ = writeln!(table, "{second:.1},{rate:.0},{hit:.1}");
    }
    let csv = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("flush.csv");
    let panels = [
        Panel {
            label: "rows read from the database per second",
            points: queries.to_vec(),
            line: Some((capacity, "what the permits let through")),
        },
        Panel { label: "hits, percent of reads", points: hits, line: None },
    ];
    let drawn = draw("FLUSHALL under load", "seconds since the flush", &panels);
    for (file, text) in [(&file, drawn), (&csv, table)] {
        std::fs::write(file, text).expect("the file can be written");
        println!("wrote {}", file.display());
    }
}
