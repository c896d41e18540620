//! What a drill has seen, as a table: counts and ratios, and beside them what must hold.

use std::fmt::Display;

use crate::load::Window;
use crate::wire::How;

/// Milliseconds.
const BUSY: f64 = 10.0;

pub struct Report {
    title: String,
    lines: Vec<Line>,
    /// Whether what depends on the machine's speed decides too.
    timed: bool,
}

struct Line {
    what: String,
    seen: String,
    must: String,
    holds: bool,
}

impl Report {
    pub fn new(title: impl Into<String>, timed: bool) -> Self {
        Self { title: title.into(), lines: Vec::new(), timed }
    }

    /// How it was before: a machine on which even hits wait is busy with something else, and its times are not judged.
    pub fn calm(&mut self, window: &Window) {
        let p50 = window.percentile(50.0, &[How::Hit, How::Miss, How::Bypass]);
        self.seen("calm: reads, their p50", format!("{}, {p50:.2} ms", window.asked()));
        if p50 > BUSY && self.timed {
            self.seen("calm: this machine is too busy", "no times are judged");
            self.timed = false;
        }
    }

    /// A figure that nothing depends on.
    pub fn seen(&mut self, what: impl Display, seen: impl Display) {
        self.line(what, seen, String::new(), true);
    }

    /// A count that must hold on any machine.
    pub fn must(&mut self, what: impl Display, seen: impl Display, must: impl Display, holds: bool) {
        self.line(what, seen, must.to_string(), holds);
    }

    /// A time or a ratio of times, with a generous bound; where times are not looked at it is printed alone.
    pub fn timing(&mut self, what: impl Display, seen: impl Display, must: impl Display, holds: bool) {
        let must = if self.timed { must.to_string() } else { format!("({must})") };
        self.line(what, seen, must, holds || !self.timed);
    }

    fn line(&mut self, what: impl Display, seen: impl Display, must: String, holds: bool) {
        self.lines.push(Line { what: what.to_string(), seen: seen.to_string(), must, holds });
    }

    /// Prints it, and says whether everything held.
    pub fn print(&self) -> bool {
        let width = |of: fn(&Line) -> &str| self.lines.iter().map(|line| of(line).chars().count()).max().unwrap_or(0);
        let (what, seen, must) = (width(|line| &line.what), width(|line| &line.seen), width(|line| &line.must).max(9));
        println!("\n{}\n", self.title);
        println!("| {:what$} | {:seen$} | {:must$} |    |", "what", "seen", "must hold");
        println!("| {:-<what$} | {:-<seen$} | {:-<must$} | -- |", "", "", "");
        for line in &self.lines {
            let mark = match (line.must.is_empty(), line.holds) {
                (true, _) => "",
                (false, true) => "ok",
                (false, false) => "NO",
            };
            println!("| {:what$} | {:seen$} | {:must$} | {mark:2} |", line.what, line.seen, line.must);
        }
        self.lines.iter().all(|line| line.holds)
    }
}

/// The one in the middle; of two, the lower.
pub fn median(figures: &[f64]) -> f64 {
    let mut sorted = figures.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len().saturating_sub(1) / 2).copied().unwrap_or(f64::NAN)
}

/// How many times one is the other.
pub fn ratio(one: f64, other: f64) -> f64 {
    one / other.max(f64::MIN_POSITIVE)
}
