//! What was acknowledged when, and what each read makes of it.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// No unmarked hit is further behind than this.
pub const PROMISE: Duration = Duration::from_secs(1);

/// All rows' histories, and the score of each phase.
pub struct Ledger {
    rows: Vec<Mutex<Row>>,
    phases: Mutex<Vec<Phase>>,
    now: AtomicUsize,
}

#[derive(Default)]
struct Row {
    next: u64,
    /// Versions, when each was known to be committed, and whether caches were told before that.
    acked: Vec<(u64, Instant, bool)>,
    /// Reads that began before this moment are not judged: the database itself lost commits.
    amnesty: Option<Instant>,
}

/// What is expected of a phase.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Expect {
    /// Whoever reads after an acknowledged write gets it.
    ReadYourWrites,
    /// The cache could not be told, or there were two: only the bound on staleness holds.
    Bounded,
}

#[derive(Default)]
struct Phase {
    name: String,
    bounded: bool,
    reads: u64,
    hits: u64,
    marked: u64,
    stale: u64,
    errors: u64,
    writes: u64,
    /// Hits older than a write by the API that was acknowledged before, and the oldest of them.
    behind_own: (u64, Duration),
    /// Hits older than what an outside writer committed, and the oldest of them.
    behind_others: (u64, Duration),
    /// Unmarked hits past the promise.
    past_promise: (u64, Duration),
    /// Old rows from the database: somebody else's load was shared too late.
    old_loads: (u64, Duration),
    slowest: Duration,
    example: String,
}

/// A read that was answered.
pub struct Read<'a> {
    pub row: usize,
    pub started: Instant,
    pub version: u64,
    pub hit: bool,
    /// Served although nobody knows how old it is: the database did not answer.
    pub unverified: bool,
    /// Past its TTL, for the same reason.
    pub stale: bool,
    /// For the report.
    pub headers: &'a dyn Fn() -> String,
}

impl Ledger {
    pub fn new(rows: usize) -> Self {
        let rows = (0..rows).map(|_| Mutex::default()).collect();
        Self { rows, phases: Mutex::default(), now: AtomicUsize::new(0) }
    }

    fn row(&self, row: usize) -> MutexGuard<'_, Row> {
        self.rows[row].lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn phases(&self) -> MutexGuard<'_, Vec<Phase>> {
        self.phases.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn begin(&self, name: &str, expect: Expect) {
        let mut phases = self.phases();
        phases.push(Phase { name: name.to_owned(), bounded: expect == Expect::Bounded, ..Phase::default() });
        self.now.store(phases.len() - 1, Ordering::SeqCst);
        println!("… {name}");
    }

    pub fn phase(&self) -> usize {
        self.now.load(Ordering::SeqCst)
    }

    /// The version that a writer tries next.
    pub fn next(&self, row: usize) -> u64 {
        let mut row = self.row(row);
        row.next += 1;
        row.next
    }

    /// A version is committed. `told`: the caches were told before it was acknowledged.
    pub fn acknowledged(&self, row: usize, version: u64, told: bool) {
        self.row(row).acked.push((version, Instant::now(), told));
        let now = self.phase();
        self.phases()[now].writes += 1;
    }

    /// The database lost commits: what was acknowledged before counts no more.
    pub fn forgive(&self) {
        for row in &self.rows {
            let mut row = row.lock().unwrap_or_else(PoisonError::into_inner);
            row.acked.clear();
            row.amnesty = Some(Instant::now());
        }
    }

    pub fn failed(&self, phase: usize) {
        self.phases()[phase].errors += 1;
    }

    /// Judges a read. `own`: the row is written through the API.
    pub fn judge(&self, phase: usize, read: &Read<'_>, own: bool) {
        let took = read.started.elapsed();
        let row = self.row(read.row);
        if row.amnesty.is_some_and(|since| read.started < since) {
            return;
        }
        // Versions only grow: the first later one that was acknowledged before the read began says how old it is.
        let newer = row.acked.partition_point(|(version, ..)| *version <= read.version);
        let later = &row.acked[newer..];
        let behind = |told_only: bool| {
            let first = later.iter().find(|(_, _, told)| *told || !told_only)?;
            read.started.checked_duration_since(first.1)
        };
        let (any, told) = (behind(false), behind(true));
        drop(row);
        let mut phases = self.phases();
        let phase = &mut phases[phase];
        phase.reads += 1;
        phase.slowest = phase.slowest.max(took);
        phase.hits += u64::from(read.hit);
        phase.marked += u64::from(read.unverified);
        phase.stale += u64::from(read.stale);
        let Some(age) = any else { return };
        let note = |score: &mut (u64, Duration), age: Duration| {
            score.0 += 1;
            score.1 = score.1.max(age);
        };
        if read.unverified || read.stale {
            return;
        }
        // A load that was stored is shared with whoever came before it was: nothing was invalidated in between. A write by
        // the API was, before it was acknowledged; what others commit is a moment later.
        if !read.hit && (own && told.is_some() || age > PROMISE) {
            note(&mut phase.old_loads, age);
            phase.example = (read.headers)();
            return;
        }
        if age > PROMISE {
            note(&mut phase.past_promise, age);
            phase.example = (read.headers)();
        }
        if own {
            if let Some(age) = told {
                note(&mut phase.behind_own, age);
                if !phase.bounded {
                    phase.example = (read.headers)();
                }
            }
        } else {
            note(&mut phase.behind_others, age);
        }
    }

    /// Prints the table, and answers what was broken.
    pub fn report(&self) -> Vec<String> {
        let phases = self.phases();
        let mut broken = Vec::new();
        let milliseconds = |duration: Duration| duration.as_secs_f64() * 1000.0;
        println!(
            "\n| phase | reads | hits | unverified | past TTL | errors | writes | behind own writes (oldest) | behind others (oldest) | \
             slowest |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
        );
        let (mut reads, mut hits) = (0, 0);
        for phase in phases.iter() {
            let aged = |(count, oldest): (u64, Duration)| format!("{count} ({:.0} ms)", milliseconds(oldest));
            println!(
                "| {} | {} | {:.0} % | {} | {} | {} | {} | {} | {} | {:.0} ms |",
                phase.name,
                phase.reads,
                percent(phase.hits, phase.reads),
                phase.marked,
                phase.stale,
                phase.errors,
                phase.writes,
                aged(phase.behind_own),
                aged(phase.behind_others),
                milliseconds(phase.slowest),
            );
            (reads, hits) = (reads + phase.reads, hits + phase.hits);
            let mut tell = |what: &str, score: (u64, Duration)| {
                if score.0 > 0 {
                    broken.push(format!("{}: {what}: {}; e.g. {}", phase.name, aged(score), phase.example));
                }
            };
            tell("unmarked hits past the promise", phase.past_promise);
            tell("old rows from the database", phase.old_loads);
            if !phase.bounded {
                tell("reads older than an acknowledged write", phase.behind_own);
            }
        }
        println!("\n{reads} checked reads, {:.0} % hits", percent(hits, reads));
        if hits * 2 < reads {
            broken.push("fewer than half of the reads were hits: too little was tried".into());
        }
        broken
    }
}

#[expect(clippy::cast_precision_loss, reason = "shown to people")]
fn percent(part: u64, whole: u64) -> f64 {
    100.0 * part as f64 / whole.max(1) as f64
}
