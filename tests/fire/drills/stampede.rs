//! Ten thousand readers of one key that nobody has read yet: one query. And the same while whoever loads it is killed,
//! stops, or loses its statement: two queries at most, and nobody waits for longer than the lock and the load.

use std::time::{Duration, Instant};

use crate::fleet::{Fleet, Kit};
use crate::load::{Shot, Volley};
use crate::report::{Report, ratio};
use crate::wire::{How, Wire, get};

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
    vec![herds(readers, &faults, true).await]
}

/// Small enough for every test run.
pub async fn small() -> Report {
    herds(300, &[Fault::None, Fault::Killed], false).await
}

async fn herds(readers: usize, faults: &[Fault], timed: bool) -> Report {
    let title = format!("stampede: {readers} readers of one cold key at three replicas, SQL {} ms", LOAD.as_millis());
    let mut report = Report::new(title, timed);
    let fleet = Fleet::start(Kit::default()).await;
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
    let (before, said) = (fleet.evaluations().await, fleet.statements().await);
    let troubles = troubles(fleet, &[0, 1, 2]).await;
    let volley = Volley::load(&fleet.addresses(), readers).await;
    // Where one replica is to be the filler, it is asked a moment earlier.
    let mut first = None;
    if fault != Fault::None {
        let mut wire = Wire::open(fleet.addresses()[0]).await.expect("a replica listens");
        wire.send(&get(&path)).await.expect("a replica listens");
        let asked = Instant::now();
        while fleet.evaluations().await == before {
            assert!(asked.elapsed() < Duration::from_secs(10), "nobody loads");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        first = Some(wire);
    }
    // Readers at a replica that is gone can't be answered.
    let counted: &[usize] = if matches!(fault, Fault::None | Fault::Terminated) { &[0, 1, 2] } else { &[1, 2] };
    let happens = async {
        tokio::time::sleep(LOAD / 2).await;
        match fault {
            Fault::None => return 0,
            Fault::Terminated => return fleet.terminate_loads().await,
            Fault::Hung => fleet.apps[0].signal("STOP"),
            Fault::Killed => fleet.apps[0].signal("KILL"),
        }
        1
    };
    let (shots, hit) = tokio::join!(volley.fire(&path, counted), happens);
    let queries = fleet.evaluations().await - before;
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
    let after = self::troubles(fleet, counted).await;
    let troubles: f64 = counted.iter().map(|replica| after[*replica] - troubles[*replica]).sum();
    report.seen(format!("{name}: operations that the cache did not answer in time"), troubles);
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
    if fault == Fault::None {
        report.must(format!("{name}: queries, as the database counts"), queries, "1", queries == 1);
        let said = fleet.statements().await - said;
        report.must(format!("{name}: queries, as the replicas count"), said, "1", (said - 1.0).abs() < 0.5);
    } else {
        report.must(format!("{name}: queries, as the database counts"), queries, "at most 2", queries <= 2);
    }
    waits(name, &shots, fault, report);
}

/// Operations of the cache that failed so far, replica by replica.
async fn troubles(fleet: &Fleet, replicas: &[usize]) -> [f64; 3] {
    let mut troubles = [0.0; 3];
    for replica in replicas {
        troubles[*replica] = fleet.of(*replica, "cache_aside_errors_total{component=\"cache\"").await;
    }
    troubles
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
