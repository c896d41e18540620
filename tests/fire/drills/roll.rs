//! Three replicas behind a load balancer are replaced one after another under load: no request fails, and the database
//! hardly notices.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tokio::time::sleep;

use crate::app::App;
use crate::fleet::{Fleet, Kit, address};
use crate::load::{Load, Targets, uniform};
use crate::report::{Report, ratio};
use crate::wire::{How, Wire, get};

const RATE: f64 = 1500.0;
const KEYS: usize = 1000;
const CALM: Duration = Duration::from_secs(10);
/// How often the load balancer asks whether a replica is ready.
const CHECK: Duration = Duration::from_millis(200);
const SERVED: [How; 4] = [How::Hit, How::Stale, How::Miss, How::Bypass];

pub async fn run() -> Report {
    let kit = Kit { server: "drain_delay: 1s", thing: "ttl: 5s", ..Kit::default() };
    let mut fleet = Fleet::start(kit).await;
    fleet.cached().await;
    fleet.warm(KEYS).await;
    fleet.pace(Duration::from_millis(5)).await;
    let targets = fleet.targets();
    let watch = fleet.watch().await;
    let load = Load {
        targets: Arc::clone(&targets),
        path: "/api/thing/",
        keys: uniform(KEYS),
        rate: RATE,
        connections: 120,
        control: None,
    };
    let going = load.start();
    sleep(Duration::from_secs(6)).await;
    let calm = Instant::now();
    sleep(CALM).await;
    let roll = Instant::now();
    let mut drained = Duration::ZERO;
    for replica in 0..fleet.apps.len() {
        // As a Deployment does with maxSurge: the new one is there before the old one goes.
        let new = fleet.another().await;
        let checks = Checks::start(&targets, replica, &fleet.apps[replica]);
        let mut old = std::mem::replace(&mut fleet.apps[replica], new);
        old.signal("TERM");
        let asked = Instant::now();
        checks.until_unready().await;
        targets.set(replica, Some(address(&fleet.apps[replica])));
        old.ended().await;
        drained = drained.max(asked.elapsed());
    }
    let rolled = Instant::now();
    sleep(Duration::from_secs(6)).await;
    let end = Instant::now();
    let seen = going.end().await;
    let looks = watch.end();

    let mut report = Report::new(format!("roll: three replicas replaced one by one at {RATE} reads/s"), true);
    report.calm(&seen.between(calm, roll));
    let whole = seen.between(calm, end);
    let failed = whole.asked() - whole.served();
    report.must("reads that failed", format!("{failed} of {}", whole.asked()), "0", failed == 0);
    report.seen("sent again: a connection was closed while it was idle", whole.again);
    report.seen(
        "the roll took, and the longest goodbye",
        format!("{:.1} s, {:.1} s", (rolled - roll).as_secs_f64(), drained.as_secs_f64()),
    );
    let (before, during) = (looks.rate(calm, roll), looks.rate(roll, end));
    let text = format!("{:.2} × ({during:.0}/s against {before:.0}/s)", ratio(during, before));
    report.must("rows read per second, during / calm", text, "1.5 at most", during <= before * 1.5);
    let second =
        |from, to| looks.rates(from, to, Duration::from_secs(1)).iter().map(|(_, rate)| *rate).fold(0.0, f64::max);
    let (most, calm_most) = (second(roll, end), second(calm, roll));
    report.seen(
        "the same, the worst seconds",
        format!("{:.2} × ({most:.0} against {calm_most:.0})", ratio(most, calm_most)),
    );
    let (before, during) = (seen.between(calm, roll), seen.between(roll, rolled));
    let hits = format!("{:.1} %, {:.1} %", before.hit_ratio() * 100.0, during.hit_ratio() * 100.0);
    report.seen("hits calm, and during the roll", hits);
    report.seen("past the cache (a new replica that does not trust it yet)", during.count(How::Bypass));
    let p99 = |window: &crate::load::Window| window.percentile(99.0, &SERVED);
    let text =
        format!("{:.2} × ({:.1} ms against {:.1} ms)", ratio(p99(&during), p99(&before)), p99(&during), p99(&before));
    report.seen("p99, during / calm", text);
    report
}

/// What a load balancer does for one replica: asks every so often, and stops sending when the answer is no.
struct Checks {
    unready: Arc<AtomicBool>,
}

impl Checks {
    fn start(targets: &Arc<Targets>, replica: usize, app: &App) -> Self {
        let (targets, address) = (Arc::clone(targets), address(app));
        let unready = Arc::new(AtomicBool::new(false));
        tokio::spawn({
            let unready = Arc::clone(&unready);
            async move {
                loop {
                    let ready = match Wire::open(address).await {
                        Ok(mut wire) => wire.ask(&get("/readyz")).await.is_ok_and(|reply| reply.status == 200),
                        Err(_) => false,
                    };
                    if !ready {
                        targets.set(replica, None);
                        unready.store(true, Ordering::Relaxed);
                        return;
                    }
                    sleep(CHECK).await;
                }
            }
        });
        Self { unready }
    }

    async fn until_unready(&self) {
        let began = Instant::now();
        while !self.unready.load(Ordering::Relaxed) {
            assert!(began.elapsed() < Duration::from_secs(10), "it is never unready");
            sleep(Duration::from_millis(10)).await;
        }
    }
}
