//! One key that everybody reads passes its TTL ten times and more: nobody waits for the database.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::fleet::{Fleet, Kit};
use crate::load::Load;
use crate::report::{Report, ratio};
use crate::wire::How;

const TTL: Duration = Duration::from_secs(1);
const TIME: Duration = Duration::from_secs(12);
/// What the statement takes.
const LOAD: Duration = Duration::from_millis(50);
/// Readers per second; the first with which this machine keeps up counts.
const RATES: [f64; 8] = [20_000.0, 16_000.0, 12_000.0, 9_000.0, 6_000.0, 4_000.0, 2_000.0, 1_000.0];

pub async fn run() -> Report {
    let fleet = Fleet::start(Kit { thing: "ttl: 1s, ttl_jitter: 0", ..Kit::default() }).await;
    fleet.pace(LOAD).await;
    fleet.cached().await;
    fleet.apps[0].get("/api/steady/1").await.expect(200);
    let control = Some("/api/steady/");
    let load = |path, rate| Load {
        targets: fleet.targets(),
        path,
        keys: Arc::new(|_| 1),
        // So many beside the control's.
        rate: rate / 0.95,
        connections: 96,
        control,
    };
    // What this machine can do at all, on a key that stays fresh.
    let mut rate = RATES[0];
    for tried in RATES {
        rate = tried;
        let began = Instant::now();
        let seen = load("/api/steady/", rate).run(Duration::from_secs(5)).await;
        let steady = seen.between(began + Duration::from_secs(1), began + Duration::from_millis(4900));
        // It may be busy elsewhere for a moment, but no queue may only grow.
        let kept_up = enough(steady.asked(), rate, 3.9) && steady.percentile(50.0, &[How::Hit]) < 5.0;
        if kept_up {
            break;
        }
    }
    fleet.cached().await;
    let watch = fleet.watch().await;
    let going = load("/api/thing/", rate).start();
    tokio::time::sleep(Duration::from_secs(1)).await;
    let (from, before, said) = (Instant::now(), fleet.evaluations().await, fleet.statements().await);
    tokio::time::sleep(TIME).await;
    let (to, queries) = (Instant::now(), fleet.evaluations().await - before);
    let said = fleet.statements().await - said;
    let seen = going.end().await;
    let (seen, steady) = (seen.between(from, to), seen.control(from, to));
    let active = watch.end().most_active(from, to);

    let title = format!(
        "hot: one key at {rate} reads/s over three replicas, TTL {} s, SQL {} ms, for {} s; \
         and of one that stays fresh a twentieth of all reads",
        TTL.as_secs(),
        LOAD.as_millis(),
        TIME.as_secs()
    );
    let mut report = Report::new(title, true);
    let asked = seen.asked();
    report.seen("reads, and per second", format!("{asked}, {:.0}", seconds(asked, to - from)));
    let all = [How::Hit, How::Stale, How::Miss, How::Bypass];
    let failed = asked - seen.served();
    report.must("reads that failed", failed, "0", failed == 0);
    let waited = seen.count(How::Miss) + seen.count(How::Bypass);
    report.must("reads that waited for the database", waited, "0", waited == 0);
    report.must("reads past the TTL", seen.count(How::Stale), "0", seen.count(How::Stale) == 0);
    let ttls = TIME.as_secs_f64() / TTL.as_secs_f64();
    #[expect(clippy::cast_precision_loss, reason = "a few dozen")]
    let per_ttl = queries as f64 / ttls;
    let counted = format!("{per_ttl:.2} ({queries} over {ttls} TTLs; the replicas say {said})");
    // A refresh ahead of the TTL makes the TTL that much shorter, but not by more than a half.
    report.must("queries of the fleet per TTL", counted, "at most 2", per_ttl <= 2.0);
    report.must("queries at one time", active, "1 at most", active <= 1);
    for percent in [50.0, 99.0, 99.9, 100.0] {
        let (one, other) = (seen.percentile(percent, &all), steady.percentile(percent, &all));
        let text = format!("{:.2} × ({one:.2} ms against {other:.2} ms)", ratio(one, other));
        // So few of the control's few reads say nothing.
        if percent > 99.5 {
            report.seen(format!("p{percent} / on a key that stays fresh, in the same time"), text);
        } else {
            report.timing(
                format!("p{percent} / on a key that stays fresh, in the same time"),
                text,
                "1.5 at most",
                ratio(one, other) <= 1.5,
            );
        }
    }
    report
}

#[expect(clippy::cast_precision_loss, reason = "fewer than 2^52 requests")]
fn seconds(count: u64, time: Duration) -> f64 {
    count as f64 / time.as_secs_f64()
}

#[expect(clippy::cast_precision_loss, reason = "fewer than 2^52 requests")]
fn enough(asked: u64, rate: f64, seconds: f64) -> bool {
    asked as f64 > rate * seconds * 0.95
}
