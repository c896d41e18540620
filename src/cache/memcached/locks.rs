//! Who may fill, and for how long, without a clock in common.
//!
//! Memcached's own clock moves once in a second, too coarse for a lock that must not delay anybody for longer than that. So an
//! entry says how *long* its lock is, and whoever meets it notes when he saw it first: if the same value, by its number, is there
//! when that time has passed by his own clock, its filler has not renewed it, and the lock has ended. Taking over goes
//! through only if that value is still there.

use quick_cache::sync::Cache;

use crate::cache::entry::Fence;
use crate::cache::lane::now_ms;

/// Leases that a connection remembers; of one that is forgotten the server is asked.
const TICKETS: usize = 16_384;
/// Locks of others that a connection remembers; one that is forgotten is new.
const LOCKS: usize = 4_096;

/// The leases that were given over a connection.
pub(super) struct Tickets(Cache<[u8; 16], Leased>);

/// What is known of a lease of one's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Leased {
    /// The number of the value with its fence.
    pub(super) cas: u64,
    /// When its lock ends, by this process's clock.
    pub(super) ends: u64,
}

impl Default for Tickets {
    fn default() -> Self {
        Self(Cache::new(TICKETS))
    }
}

impl Tickets {
    /// Remembers a lease that was asked for at `asked`.
    pub(super) fn note(&self, fence: Fence, cas: u64, asked: u64, lock: u64) {
        self.0.insert(fence.0, Leased { cas, ends: asked.saturating_add(lock) });
    }

    /// What is known of it, once: a ticket is good for one fill.
    pub(super) fn take(&self, fence: Fence) -> Option<Leased> {
        self.0.remove(&fence.0).map(|(_, leased)| leased)
    }

    pub(super) fn forget(&self, fence: Fence) {
        self.0.remove(&fence.0);
    }
}

/// The locks of others that were seen over a connection: by key, the number of the value and when it was seen first.
pub(super) struct Locks(Cache<u64, (u64, u64)>);

impl Default for Locks {
    fn default() -> Self {
        Self(Cache::new(LOCKS))
    }
}

impl Locks {
    /// Whether this value has been there for as long as its lock, in milliseconds.
    pub(super) fn has_ended(&self, key: &str, cas: u64, lock: u64) -> bool {
        let (key, now) = (crate::cache::entry::check(key), now_ms());
        match self.0.get(&key) {
            Some((seen, since)) if seen == cas => now.saturating_sub(since) >= lock,
            _ => {
                self.0.insert(key, (cas, now));
                lock == 0
            }
        }
    }
}
