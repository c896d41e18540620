//! Ten thousand readers of one key that nobody has read yet: one query. And the same while whoever loads it is killed,
//! stops, or loses its statement: two queries at most, and nobody waits for longer than the lock and the load.

use std::collections::BTreeMap;
use std::thread;
use std::time::{Duration, Instant};

use tokio::runtime;
use tokio::sync::mpsc;

use crate::app::signal;
use crate::fleet::{Fleet, Kit, evaluations, terminate_loads};
use crate::load::{Shot, Volley, let_in};
use crate::report::{Report, ratio};
use crate::wire::{How, get};

const READERS: usize = 10_000;
/// What the statement takes.
const LOAD: Duration = Duration::from_millis(200);
/// What a filler that is gone delays others by.
const LOCK: Duration = Duration::from_millis(750);
/// For ten thousand answers on few cores, beside the lock and the load.
const SLACK: Duration = Duration::from_secs(1);

/// What happens midway to the replica that loads.
#[derive(Clone, Copy, PartialEq)]
enum Fault {
    None,
    /// Its statement is ended by the database.
    Terminated,
    /// SIGSTOP, after the lease and before the fill.
    Hung,
    /// SIGKILL.
    Killed,
}

pub async fn run() -> Vec<Report> {
    let readers = READERS.min(open_files().saturating_sub(1000));
    // Whatever leaves a replica behind comes last.
    let faults = [Fault::None, Fault::Terminated, Fault::Hung, Fault::Killed];
    vec![herds(readers, &faults, Kit::default(), true).await]
}

/// Small enough for every test run.
pub async fn small() -> Report {
    // It is not about slow caches.
    let kit = Kit { cache: "timeout: 5s", ..Kit::default() };
    herds(300, &[Fault::None, Fault::Killed], kit, false).await
}

async fn herds(readers: usize, faults: &[Fault], kit: Kit<'_>, timed: bool) -> Report {
    let title = format!("stampede: {readers} readers of one cold key at three replicas, SQL {} ms", LOAD.as_millis());
    let mut report = Report::new(title, timed);
    let fleet = Fleet::start(kit).await;
    // Everything but the key is warm.
    fleet.warm(1).await;
    fleet.cached().await;
    fleet.pace(LOAD).await;
    for (index, fault) in faults.iter().enumerate() {
        herd(&fleet, 100 + index, readers, *fault, &mut report).await;
    }
    report
}

async fn herd(fleet: &Fleet, key: usize, readers: usize, fault: Fault, report: &mut Report) {
    let path = format!("/api/thing/{key}");
    // Readers at a replica that is gone can't be answered, nor can it be asked.
    let counted: &[usize] = if matches!(fault, Fault::None | Fault::Terminated) { &[0, 1, 2] } else { &[1, 2] };
    let before = Counted::now(fleet, counted).await;
    let volley = Volley::load(&fleet.addresses(), readers).await;
    // Where one replica is to be the filler, it is asked a moment earlier.
    let mut first = None;
    let mut midway = None;
    if fault != Fault::None {
        let mut wire = let_in(fleet.addresses()[0]).await;
        let mut hand = Midway::ready(fleet, fault).await;
        wire.send(&get(&path)).await.expect("a replica listens");
        hand.next().await;
        (first, midway) = (Some(wire), Some(hand));
    }
    let strikes = async {
        match &mut midway {
            Some(hand) => hand.next().await,
            None => 0,
        }
    };
    let (shots, hit) = tokio::join!(volley.fire(&path, counted), strikes);
    let after = Counted::now(fleet, counted).await;
    if fault == Fault::Hung {
        fleet.apps[0].signal("CONT");
        if let Some(wire) = &mut first {
            let late = wire.answer().await.map_or(0, |reply| reply.status);
            report.must("hung: its own reader, once it goes on", late, "200", late == 200);
        }
    }
    let name = match fault {
        Fault::None => "cold",
        Fault::Terminated => "statement ended",
        Fault::Hung => "hung",
        Fault::Killed => "killed",
    };
    let [hits, waited, past] =
        [How::Hit, How::Miss, How::Bypass].map(|how| shots.iter().filter(|shot| shot.how == how).count());
    report.seen(format!("{name}: hits, waited for a fill, went past the cache"), format!("{hits}, {waited}, {past}"));
    // Whatever the cache did not answer in time goes past it.
    report.seen(
        format!("{name}: operations that the cache did not answer in time, or not at all"),
        since(&before.troubles, &after.troubles),
    );
    report.seen(format!("{name}: what became of loads through the cache"), since(&before.fills, &after.fills));
    if fault == Fault::Terminated {
        report.must(format!("{name}: statements that were ended"), hit, "1", hit == 1);
    }
    let served = shots.iter().filter(|shot| !matches!(shot.how, How::Shed | How::Failed)).count();
    report.must(
        format!("{name}: readers answered"),
        format!("{served} of {}", shots.len()),
        "all",
        served == shots.len(),
    );
    if served < shots.len() {
        report.seen(format!("{name}: what the others got"), refusals(&shots));
    }
    let (queries, said) = (after.queries - before.queries, after.statements - before.statements);
    if fault == Fault::None {
        report.must(format!("{name}: queries, as the database counts"), queries, "1", queries == 1);
        report.must(format!("{name}: queries, as the replicas count"), said, "1", (said - 1.0).abs() < 0.5);
    } else {
        report.must(format!("{name}: queries, as the database counts"), queries, "at most 2", queries <= 2);
    }
    waits(name, &shots, fault, report);
}

/// Whoever strikes midway: in a thread of his own, over a connection of his own. Both are there before the herd is; while it is,
/// the drill's other threads and the database's door are busy.
struct Midway(mpsc::UnboundedReceiver<i64>);

impl Midway {
    /// When he has all that he needs. Next he says that a load has begun, and then how many he has hit.
    async fn ready(fleet: &Fleet, fault: Fault) -> Self {
        let (say, said) = mpsc::unbounded_channel();
        let (database, filler) = (fleet.database.clone(), fleet.apps[0].pid());
        let strikes = async move {
            let client = database.client().await;
            let (before, began) = (evaluations(&client).await, Instant::now());
            let _ = say.send(0);
            while evaluations(&client).await == before {
                assert!(began.elapsed() < Duration::from_secs(10), "nobody loads");
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
            let _ = say.send(0);
            tokio::time::sleep(LOAD / 2).await;
            let mut hit = 1;
            match fault {
                Fault::None => hit = 0,
                Fault::Terminated => hit = terminate_loads(&client).await,
                Fault::Hung => signal(filler, "STOP"),
                Fault::Killed => signal(filler, "KILL"),
            }
            let _ = say.send(hit);
        };
        thread::spawn(move || {
            let runtime = runtime::Builder::new_current_thread().enable_all().build();
            runtime.expect("a runtime should start").block_on(strikes);
        });
        let mut midway = Self(said);
        midway.next().await;
        midway
    }

    async fn next(&mut self) -> i64 {
        self.0.recv().await.expect("he does not panic")
    }
}

/// What was counted so far.
struct Counted {
    queries: i64,
    /// The same, as all replicas count it that can be asked.
    statements: f64,
    /// Operations of the cache that failed, by why.
    troubles: BTreeMap<String, f64>,
    /// Fills, by what became of them.
    fills: BTreeMap<String, f64>,
}

impl Counted {
    async fn now(fleet: &Fleet, replicas: &[usize]) -> Self {
        let statements = fleet.by(replicas, "cache_aside_store_queries_total{", "resource").await;
        Self {
            queries: fleet.evaluations().await,
            statements: statements.get("thing").copied().unwrap_or_default(),
            troubles: fleet.by(replicas, "cache_aside_errors_total{component=\"cache\"", "kind").await,
            fills: fleet.by(replicas, "cache_aside_fills_total{", "outcome").await,
        }
    }
}

/// What was added since, in words.
fn since(before: &BTreeMap<String, f64>, after: &BTreeMap<String, f64>) -> String {
    let more = |(name, count): (&String, &f64)| (count - before.get(name).copied().unwrap_or_default(), name.clone());
    let some = after.iter().map(more).filter(|(count, _)| *count > 0.0);
    let words: Vec<String> = some.map(|(count, name)| format!("{count} {name}")).collect();
    if words.is_empty() { "0".into() } else { words.join(", ") }
}

/// What those got who got no row, in words.
fn refusals(shots: &[Shot]) -> String {
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    for shot in shots.iter().filter(|shot| matches!(shot.how, How::Shed | How::Failed)) {
        *counts.entry(shot.status.map_or("no answer".into(), |status| status.to_string())).or_default() += 1;
    }
    let words: Vec<String> = counts.into_iter().map(|(status, count)| format!("{count} × {status}")).collect();
    words.join(", ")
}

/// How long the last reader waited, of whatever came.
fn waits(name: &str, shots: &[Shot], fault: Fault, report: &mut Report) {
    let longest = shots.iter().map(|shot| shot.took).max().unwrap_or_default();
    let (allowed, words) = match fault {
        Fault::None => (LOAD, "the load"),
        Fault::Terminated => (LOAD * 2, "two loads"),
        Fault::Hung | Fault::Killed => (LOCK + LOAD, "lock + load"),
    };
    let seen = format!(
        "{:.2} × ({} ms against {} ms)",
        ratio(longest.as_secs_f64(), allowed.as_secs_f64()),
        longest.as_millis(),
        allowed.as_millis()
    );
    let bound = format!("{} ms more at most", SLACK.as_millis());
    report.timing(format!("{name}: longest wait / {words}"), seen, bound, longest <= allowed + SLACK);
}

/// How many files a process may have open: each connection is one, here and at its replica.
fn open_files() -> usize {
    let limits = std::fs::read_to_string("/proc/self/limits").unwrap_or_default();
    let line = limits.lines().find(|line| line.starts_with("Max open files"));
    line.and_then(|line| line.split_whitespace().nth(3)?.parse().ok()).unwrap_or(1024)
}
