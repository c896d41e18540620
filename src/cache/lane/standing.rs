//! What the looks over one connection have found, and until when that is good for.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use arc_swap::ArcSwap;

use super::clock::now_ms;
use super::debts::Debts;
use crate::cache::control::Control;

/// For so long after it was made, or told to look again, a lane is taken to become trusted soon, in milliseconds.
const HOPE: u64 = 500;
/// Without a watermark, what was read is trusted for this long after the last look was sent; with one, that is how long
/// what was seen of the server's identity is good for. In milliseconds.
const LOOKED: u64 = 1_000;

static NUMBERS: AtomicU64 = AtomicU64::new(1);

/// How a connection stands with this process.
#[derive(Debug)]
pub(in crate::cache) struct Standing {
    pub(in crate::cache) control: ArcSwap<Control>,
    /// Until when what is here is known to be current enough, in milliseconds of this process's clock.
    trust: AtomicU64,
    /// Until when this is known to be the memory that caught up, whatever it has missed since.
    known: AtomicU64,
    /// When the look was sent that gave the two. Stored after them, loaded before.
    looked: AtomicU64,
    /// When it was made, by this process's clock.
    made: u64,
    /// No other connection of this process has it.
    pub(in crate::cache) number: u64,
}

/// What is loaded before a command is sent, and compared when its reply is used.
#[derive(Clone, Copy, Debug)]
pub(in crate::cache) struct Deadlines {
    pub(in crate::cache) looked: u64,
    pub(in crate::cache) trust: u64,
    pub(in crate::cache) known: u64,
}

impl Standing {
    pub(in crate::cache) fn new() -> Self {
        Self {
            control: ArcSwap::default(),
            trust: AtomicU64::new(0),
            known: AtomicU64::new(0),
            looked: AtomicU64::new(0),
            made: now_ms(),
            number: NUMBERS.fetch_add(1, Ordering::Relaxed),
        }
    }

    pub(in crate::cache) fn deadlines(&self) -> Deadlines {
        let looked = self.looked.load(Ordering::Acquire);
        let (trust, known) = (self.trust.load(Ordering::Acquire), self.known.load(Ordering::Acquire));
        Deadlines { looked, trust, known }
    }

    /// Whether it is not trusted only because there was no time yet to look.
    pub(in crate::cache) fn is_hopeful(&self, debts: &Debts) -> bool {
        let floor = debts.floor();
        let since = if floor == u64::MAX { 0 } else { self.made.max(floor) };
        now_ms().saturating_sub(since) < HOPE
    }

    /// Until when a look that was sent then says which memory this is.
    pub(in crate::cache) fn known_after(sent: u64) -> u64 {
        sent + LOOKED
    }

    /// A look that was sent then has found this, and until when it is current enough, and known to be what it says.
    pub(in crate::cache) fn learn(&self, sent: u64, control: Control, (trust, known): (u64, u64)) {
        self.control.store(Arc::new(control));
        self.trust.store(trust, Ordering::Release);
        self.known.store(known, Ordering::Release);
        self.looked.store(sent, Ordering::Release);
    }

    /// What is here is not current, until the next look.
    pub(in crate::cache) fn doubt(&self) {
        self.trust.store(0, Ordering::Release);
    }

    /// Nothing over this connection is of any use any more.
    #[cfg(feature = "redis")]
    pub(in crate::cache) fn mistrust(&self) {
        self.doubt();
        self.known.store(0, Ordering::Release);
    }
}
