//! The cache goes away under load, killed or hung, and comes back three seconds later: reads are as slow as without a
//! cache and no slower, none fails, the database sees its permits, and hits are back at once.

use std::time::{Duration, Instant};

use tokio::time::sleep;

use crate::fleet::{Fleet, Kit};
use crate::load::{Load, Seen, uniform};
use crate::report::{Report, ratio};
use crate::wire::How;

/// Reads per second: what the database bears on its own, with room to spare on two cores.
const RATE: f64 = 1200.0;
const KEYS: usize = 500;
/// What a statement takes.
const PACE: Duration = Duration::from_millis(5);
const POOL: usize = 16;
const AWAY: Duration = Duration::from_secs(3);
const SERVED: [How; 4] = [How::Hit, How::Stale, How::Miss, How::Bypass];
/// After this long everybody knows that the cache is away.
const NOTICED: Duration = Duration::from_millis(500);

pub async fn run() -> Vec<Report> {
    let without = Fleet::start(Kit { without_cache: true, ..kit() }).await;
    without.pace(PACE).await;
    let began = Instant::now();
    let seen = load(&without).run(Duration::from_secs(9)).await;
    let base = seen.since(began + Duration::from_secs(2));
    assert_eq!(base.asked(), base.served(), "the database alone bears this load");
    let base = base.percentile(99.0, &SERVED);
    drop(without);
    let mut fleet = Fleet::start(kit()).await;
    let mut reports = Vec::new();
    for (how, hung) in
        [("killed", false), ("killed again, with all connections to the database open", false), ("hung", true)]
    {
        reports.push(drill(&mut fleet, base, how, hung).await);
    }
    reports
}

fn kit() -> Kit<'static> {
    Kit { pool_size: POOL, ..Kit::default() }
}

fn load(fleet: &Fleet) -> Load {
    Load { targets: fleet.targets(), path: "/api/thing/", keys: uniform(KEYS), rate: RATE, connections: 240 }
}

async fn drill(fleet: &mut Fleet, base: f64, how: &str, hung: bool) -> Report {
    fleet.pace(Duration::ZERO).await;
    fleet.cached().await;
    fleet.warm(KEYS).await;
    fleet.pace(PACE).await;
    let watch = fleet.watch().await;
    let going = load(fleet).start();
    sleep(Duration::from_secs(2)).await;
    let calm = Instant::now();
    sleep(Duration::from_secs(4)).await;
    let connections = fleet.connections().await;
    let gone = Instant::now();
    if hung {
        fleet.redis.pause();
    } else {
        fleet.redis.kill().await;
    }
    sleep(AWAY).await;
    let returns = Instant::now();
    if hung {
        fleet.redis.resume();
    } else {
        fleet.redis.start_again().await;
    }
    let back = Instant::now();
    sleep(Duration::from_secs(6)).await;
    let end = Instant::now();
    let seen = going.end().await;
    let looks = watch.end();

    let title = format!("cache {how} for {} s at {RATE} reads/s over three replicas", AWAY.as_secs());
    let mut report = Report::new(title, true);
    report.calm(&seen.between(calm, gone));
    let whole = seen.between(calm, end);
    let failed = whole.asked() - whole.served();
    report.must("reads that failed", format!("{failed} of {}", whole.asked()), "0", failed == 0);
    let (before, away) = (seen.between(calm, gone), seen.between(gone, returns));
    report.seen("hits, calm", format!("{:.1} %", before.hit_ratio() * 100.0));
    let slow = away.percentile(99.0, &SERVED);
    let later = seen.between(gone + NOTICED, returns).percentile(99.0, &SERVED);
    let against = |p99: f64| format!("{:.2} × ({p99:.1} ms against {base:.1} ms)", ratio(p99, base));
    // A cache that hangs costs those who wait for its first timeouts.
    let most = if hung { 20.0 } else { 3.0 };
    report.timing(
        "p99 while away / without a cache",
        against(slow),
        format!("{most} at most"),
        ratio(slow, base) <= most,
    );
    let words = format!("the same, {} ms after it went", NOTICED.as_millis());
    report.timing(words, against(later), "3 at most", ratio(later, base) <= 3.0);
    let each = seen.each(gone).take(10).map(|(_, window)| format!("{:.0}", window.percentile(99.0, &SERVED)));
    report.seen("p99 of each 100 ms after it went, in ms", each.collect::<Vec<_>>().join(", "));
    let p99 = before.percentile(99.0, &SERVED);
    report.seen("p99 while away / calm, with hits", format!("{:.2} × ({p99:.1} ms calm)", ratio(slow, p99)));
    let longest = seen.between(gone, end).percentile(100.0, &SERVED);
    report.seen("longest read from then on", format!("{longest:.0} ms"));
    let permits = i64::try_from(POOL * fleet.apps.len()).unwrap_or(i64::MAX);
    let active = looks.most_active(calm, end);
    report.must("statements at one time", active, format!("{permits} at most: the permits"), active <= permits);
    let open = fleet.connections().await;
    report.seen("connections to the database, before and after", format!("{connections}, {open}"));
    let took = hits_back(&seen, back).map_or(f64::INFINITY, |at| at.saturating_duration_since(back).as_secs_f64());
    report.timing("until half of the reads are hits again", format!("{took:.1} s"), "3 s at most", took <= 3.0);
    report
}

/// The first moment from which on at least half of the reads were hits, for half a second.
fn hits_back(seen: &Seen, back: Instant) -> Option<Instant> {
    let windows: Vec<_> = seen.each(back).map(|(at, window)| (at, window.hit_ratio() >= 0.5)).collect();
    windows.windows(5).find(|five| five.iter().all(|(_, hits)| *hits)).map(|five| five[0].0)
}
