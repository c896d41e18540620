//! The cache goes away under load, killed or hung, and comes back three seconds later: reads are as slow as without a
//! cache and no slower, none fails, the database sees its permits, and hits are back at once.
//!
//! It goes away several times, each time for replicas that have just started, and before each time replicas that have no
//! cache bear the same load. Few of a round's reads make its 99th percentile, and a machine that stands still for a moment
//! holds as many: so the reads of all rounds are compared, and rounds in which others had much of the processors are repeated.
//! What there still is of chance, the same replicas say a moment later, when they have no cache any more than the others: it
//! is against those reads that what a cache costs by going is told.

use std::time::{Duration, Instant};

use tokio::time::sleep;

use crate::fleet::{Fleet, Kit, Looks};
use crate::load::{Load, Seen, Window, uniform};
use crate::machine::Processors;
use crate::report::{Report, ratio};
use crate::wire::How;

/// Reads per second; the first that this machine bears without a cache counts.
const RATES: [f64; 6] = [1200.0, 900.0, 600.0, 400.0, 300.0, 200.0];
/// It bears a load whose 99th percentile is no more than this, in milliseconds: five statements.
const BORNE: f64 = 25.0;
const KEYS: usize = 500;
/// What a statement takes.
const PACE: Duration = Duration::from_millis(5);
const POOL: usize = 16;
/// A load has found its pace by then.
const SETTLED: Duration = Duration::from_secs(1);
const CALM: Duration = Duration::from_secs(1);
const AWAY: Duration = Duration::from_secs(3);
const AFTER: Duration = Duration::from_secs(3);
const SERVED: [How; 4] = [How::Hit, How::Stale, How::Miss, How::Bypass];
/// Others had more of the processors than this: the round's times say more of them.
const STOLEN: f64 = 0.05;
const MOST_DISTURBED: usize = 30;
/// Of fewer rounds no times are judged.
const FEW: usize = 3;
/// After this long everybody knows that the cache is away.
const NOTICED: Duration = Duration::from_millis(500);

pub async fn killed() -> Report {
    run("killed", 15, 1.2).await
}

pub async fn hung() -> Report {
    run("hung", 10, 10.0).await
}

async fn run(how: &str, rounds: usize, most: f64) -> Report {
    let without = Fleet::start(Kit { without_cache: true, ..kit() }).await;
    without.pace(PACE).await;
    let mut fleet = Fleet::start(kit()).await;
    let rate = bearable(&without).await;
    let (mut calm, mut disturbed) = (Vec::new(), Vec::new());
    while calm.len() < rounds && disturbed.len() < MOST_DISTURBED {
        let processors = Processors::now();
        let alone = alone(&without, rate).await;
        // A load that is too much without a cache shows nothing either.
        let is_too_much = alone.served() < alone.asked();
        let round = round(&mut fleet, rate, alone, how == "hung").await;
        let is_disturbed = is_too_much || processors.stolen_since() > STOLEN;
        (if is_disturbed { &mut disturbed } else { &mut calm }).push(round);
    }
    report(how, rate, most, &calm, &disturbed)
}

/// The most reads per second that this machine bears without a cache.
async fn bearable(without: &Fleet) -> f64 {
    for rate in RATES {
        for _ in 0..MOST_DISTURBED {
            let processors = Processors::now();
            if p99(&alone(without, rate).await) <= BORNE {
                return rate;
            }
            if processors.stolen_since() <= STOLEN {
                break;
            }
        }
    }
    RATES[RATES.len() - 1]
}

fn kit() -> Kit<'static> {
    Kit { pool_size: POOL, ..Kit::default() }
}

fn load(fleet: &Fleet, rate: f64) -> Load {
    Load { targets: fleet.targets(), path: "/api/thing/", keys: uniform(KEYS), rate, connections: 240, control: None }
}

/// What the same load is like without a cache.
async fn alone(fleet: &Fleet, rate: f64) -> Window {
    let began = Instant::now();
    let seen = load(fleet, rate).run(SETTLED + AWAY).await;
    seen.between(began + SETTLED, began + SETTLED + AWAY)
}

/// One time that the cache went away.
struct Round {
    /// The same load without a cache, just before.
    alone: Window,
    seen: Seen,
    looks: Looks,
    calm: Instant,
    gone: Instant,
    returns: Instant,
    back: Instant,
    /// Connections to the database, before and after.
    connections: (f64, f64),
}

async fn round(fleet: &mut Fleet, rate: f64, alone: Window, hung: bool) -> Round {
    fleet.replace().await;
    fleet.pace(Duration::ZERO).await;
    fleet.cached().await;
    fleet.warm(KEYS).await;
    fleet.pace(PACE).await;
    let watch = fleet.watch().await;
    let going = load(fleet, rate).start();
    sleep(SETTLED).await;
    let calm = Instant::now();
    sleep(CALM).await;
    let before = fleet.connections().await;
    going.next_window().await;
    let gone = Instant::now();
    if hung {
        fleet.redis.pause();
    } else {
        fleet.redis.kill().await;
    }
    sleep(AWAY.saturating_sub(gone.elapsed())).await;
    let returns = Instant::now();
    if hung {
        fleet.redis.resume();
    } else {
        fleet.redis.start_again().await;
    }
    let back = Instant::now();
    sleep(AFTER).await;
    let seen = going.end().await;
    Round {
        alone,
        seen,
        looks: watch.end(),
        calm,
        gone,
        returns,
        back,
        connections: (before, fleet.connections().await),
    }
}

impl Round {
    fn calm(&self) -> Window {
        self.seen.between(self.calm, self.gone)
    }

    fn away(&self) -> Window {
        self.seen.between(self.gone, self.returns)
    }

    /// From the first moment on that at least half of the reads were hits, for half a second.
    fn hits_back(&self) -> f64 {
        let windows: Vec<_> = self.seen.each(self.back).map(|(at, window)| (at, window.hit_ratio() >= 0.5)).collect();
        let first = windows.windows(5).find(|five| five.iter().all(|(_, hits)| *hits)).map(|five| five[0].0);
        first.map_or(f64::INFINITY, |at| at.saturating_duration_since(self.back).as_secs_f64())
    }
}

fn p99(window: &Window) -> f64 {
    window.percentile(99.0, &SERVED)
}

/// A figure of every round.
fn each(rounds: &[Round], of: impl Fn(&Round) -> f64) -> Vec<f64> {
    rounds.iter().map(of).collect()
}

/// The reads of all rounds.
fn all_of<'a>(rounds: impl IntoIterator<Item = &'a Round>, of: impl Fn(&Round) -> Window) -> Window {
    let mut all = Window::default();
    rounds.into_iter().for_each(|round| all.add(&of(round)));
    all
}

fn list(figures: &[f64], digits: usize) -> String {
    figures.iter().map(|figure| format!("{figure:.digits$}")).collect::<Vec<_>>().join(", ")
}

fn report(how: &str, rate: f64, most: f64, rounds: &[Round], disturbed: &[Round]) -> Report {
    let all = || rounds.iter().chain(disturbed);
    let title = format!(
        "cache {how} {} times, for {} s each, at {rate} reads/s over three replicas",
        all().count(),
        AWAY.as_secs()
    );
    let mut report = Report::new(title, rounds.len() >= FEW);
    let (mut calm, mut whole) = (Window::default(), Window::default());
    for round in all() {
        calm.add(&round.calm());
        whole.add(&round.seen.since(round.calm));
    }
    report.calm(&calm);
    report.seen("hits, calm", format!("{:.1} %", calm.hit_ratio() * 100.0));
    let failed = whole.asked() - whole.served();
    report.must("reads that failed", format!("{failed} of {}", whole.asked()), "0", failed == 0);
    let permits = i64::try_from(POOL * Kit::default().replicas).unwrap_or(i64::MAX);
    let active = all().map(|round| round.looks.most_active(round.calm, round.back + AFTER)).max().unwrap_or_default();
    report.must(
        "statements at one time, at most",
        active,
        format!("{permits} at most: the permits"),
        active <= permits,
    );
    let back: Vec<_> = all().map(Round::hits_back).collect();
    let slowest = back.iter().copied().fold(0.0, f64::max);
    report.timing(
        "seconds until half of the reads are hits again, at most",
        format!("{slowest:.1}"),
        3,
        slowest <= 3.0,
    );

    let quiet = format!("{}, {}", rounds.len(), disturbed.len());
    report.seen("rounds whose times count, and others, in which other machines had the processors", quiet);
    let later = |round: &Round| round.seen.between(round.gone + NOTICED, round.returns);
    report.seen("p99 without a cache, in ms, round by round", list(&each(rounds, |round| p99(&round.alone)), 1));
    report.seen("p99 while away", list(&each(rounds, |round| p99(&round.away())), 1));
    let without = p99(&all_of(rounds, |round| round.alone.clone()));
    let (away, later) = (all_of(rounds, Round::away), all_of(rounds, later));
    let against = |window: &Window, base: f64| {
        let figure = p99(window);
        (format!("{:.2} × ({figure:.1} ms against {base:.1} ms)", ratio(figure, base)), ratio(figure, base))
    };
    let (text, _) = against(&away, without);
    report.seen("p99 while away / without a cache, of all rounds", text);
    let (text, times) = against(&later, without);
    let words = format!("the same from {} ms on, when it is known to be away", NOTICED.as_millis());
    report.timing(words, text, "2 at most", times <= 2.0);
    let (text, times) = against(&away, p99(&later));
    let words = format!("p99 while away / from {} ms on: what its going costs", NOTICED.as_millis());
    report.timing(words, text, format!("{most} at most"), times <= most);
    let tenths = (0..10).map(|tenth| {
        let from = Duration::from_millis(100) * tenth;
        let of = |round: &Round| round.seen.between(round.gone + from, round.gone + from + Duration::from_millis(100));
        p99(&all_of(rounds, of))
    });
    report.seen("p99 of each 100 ms after it went, in ms", list(&tenths.collect::<Vec<_>>(), 0));
    let hits = p99(&all_of(rounds, Round::calm));
    let text = format!("{:.2} × ({hits:.1} ms calm)", ratio(p99(&away), hits));
    report.seen("p99 while away / calm, with hits", text);
    let longest = each(rounds, |round| round.seen.since(round.gone).percentile(100.0, &SERVED));
    report.seen("longest read from then on, in ms", list(&longest, 0));
    let connections: Vec<_> =
        rounds.iter().map(|Round { connections: (before, after), .. }| format!("{before}, {after}")).collect();
    report.seen("connections to the database, before and after", connections.join("; "));
    report
}
