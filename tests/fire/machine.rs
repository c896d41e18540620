//! What else the hardware does under this machine.

use std::fs;

/// Times of all processors since the machine started, in ticks.
#[derive(Clone, Copy)]
pub struct Processors {
    all: u64,
    /// Others were given the processor that this machine would have used.
    stolen: u64,
}

impl Processors {
    /// As Linux says in `/proc/stat` (proc(5)); nothing was ever taken where it says nothing.
    pub fn now() -> Self {
        let stat = fs::read_to_string("/proc/stat").unwrap_or_default();
        let line = stat.lines().next().unwrap_or_default();
        // user, nice, system, idle, iowait, irq, softirq, steal; guests are in the first two.
        let times: Vec<u64> = line.split_whitespace().skip(1).take(8).map_while(|time| time.parse().ok()).collect();
        Self { all: times.iter().sum(), stolen: times.get(7).copied().unwrap_or_default() }
    }

    /// The part of the time since then that others had, from 0 to 1.
    #[expect(clippy::cast_precision_loss, reason = "fewer than 2^52 ticks")]
    pub fn stolen_since(&self) -> f64 {
        let now = Self::now();
        (now.stolen - self.stolen) as f64 / (now.all - self.all).max(1) as f64
    }
}
