//! What a process owes to a memory, and so how far it trusts what that holds.

use std::collections::HashMap;
#[cfg(feature = "redis")]
use std::collections::HashSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use super::clock::now_ms;
use super::standing::Deadlines;
use crate::cache::CacheError;

/// Past this many owed invalidations, the whole node is invalidated instead.
pub(in crate::cache) const OWED_MAX: usize = 10_000;
/// After a round that the database did not answer, for how long that is taken to be so, in milliseconds. Rounds go on
/// meanwhile and renew it.
const AWAY: u64 = 3_000;

/// What a process owes to one memory.
#[derive(Debug, Default)]
pub(in crate::cache) struct Debts {
    /// Looks that were sent before this moment count for nothing.
    floor: AtomicU64,
    /// Rings when every lane should look at once.
    pub(super) look_now: Notify,
    /// Until then the database is taken not to answer. All nodes of a cluster are told by whichever found out.
    away: Arc<AtomicU64>,
    owed: Mutex<Owed>,
    delivering: tokio::sync::Mutex<()>,
}

#[derive(Debug, Default)]
struct Owed {
    /// Each with the number of the failure that it comes from (one that fails again while it is being delivered stays), and
    /// whether a writer may hold it.
    keys: HashMap<String, (u64, bool)>,
    /// All keys, since this failure; zero: not all.
    everything: u64,
    failures: u64,
}

/// What is being delivered. One lane does it at a time: another that found nothing left to send would restore trust before
/// this one is done.
pub(in crate::cache) struct Delivery<'a> {
    debts: &'a Debts,
    keys: HashMap<String, (u64, bool)>,
    everything: u64,
    _alone: tokio::sync::MutexGuard<'a, ()>,
}

/// Invalidations that another node owes from now on.
#[cfg(feature = "redis")]
pub(in crate::cache) struct Disowned {
    /// Each with whether a writer may hold it.
    pub(in crate::cache) keys: Vec<(String, bool)>,
    /// Whatever it held.
    pub(in crate::cache) everything: bool,
}

impl Debts {
    /// Those to a memory that is told with others whether the database answers.
    #[cfg(feature = "redis")]
    pub(in crate::cache) fn beside(away: Arc<AtomicU64>) -> Self {
        Self { away, ..Self::default() }
    }

    pub(super) fn floor(&self) -> u64 {
        self.floor.load(Ordering::Acquire)
    }

    fn owed(&self) -> MutexGuard<'_, Owed> {
        self.owed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Compares deadlines that were loaded before a command was sent with the time its reply is used. What can't be known
    /// to be current is good for nothing, unless the database itself does not answer: then the answer is false.
    pub(in crate::cache) fn verified(&self, deadlines: Deadlines) -> Result<bool, CacheError> {
        let now = now_ms();
        if deadlines.looked < self.floor() {
            Err(CacheError::Untrusted)
        } else if now <= deadlines.trust {
            Ok(true)
        } else if now <= deadlines.known && self.database_is_away() {
            Ok(false)
        } else {
            Err(CacheError::Untrusted)
        }
    }

    /// Nothing is trusted before a look that is sent from now on.
    pub(in crate::cache) fn mistrust(&self) {
        self.floor.fetch_max(now_ms() + 1, Ordering::AcqRel);
        self.look_now.notify_waiters();
    }

    /// Whether the last round found that the database does not answer.
    fn database_is_away(&self) -> bool {
        now_ms() < self.away.load(Ordering::Acquire)
    }

    pub(in crate::cache) fn database_answers(&self, yes: bool) {
        self.away.store(if yes { 0 } else { now_ms() + AWAY }, Ordering::Release);
    }

    /// Remembers invalidations that failed, and whether writers may hold them. Until they are delivered this process trusts
    /// nothing on the node.
    pub(in crate::cache) fn owe(&self, keys: &[&str], spare: bool) {
        let mut owed = self.owed();
        owed.failures += 1;
        let failure = owed.failures;
        if owed.everything == 0 && owed.keys.len() + keys.len() <= OWED_MAX {
            owed.keys.extend(keys.iter().map(|key| ((*key).to_owned(), (failure, spare))));
        } else {
            *owed = Owed { keys: HashMap::new(), everything: failure, failures: failure };
        }
        self.floor.store(u64::MAX, Ordering::Release);
    }

    /// Everything here counts for nothing until it was told so.
    #[cfg(feature = "redis")]
    pub(in crate::cache) fn owe_everything(&self) {
        let mut owed = self.owed();
        let failures = owed.failures + 1;
        *owed = Owed { keys: HashMap::new(), everything: failures, failures };
        self.floor.store(u64::MAX, Ordering::Release);
    }

    /// Takes over or hands on what is owed for keys that `mine` says are another node's now; `None`: everything is.
    #[cfg(feature = "redis")]
    pub(in crate::cache) fn disown(&self, mine: impl Fn(&str) -> bool) -> Disowned {
        let mut owed = self.owed();
        let everything = owed.everything != 0;
        let gone: Vec<String> = owed.keys.keys().filter(|key| !mine(key)).cloned().collect();
        let keys = gone.into_iter().filter_map(|key| owed.keys.remove(&key).map(|(_, spare)| (key, spare))).collect();
        Disowned { keys, everything }
    }

    /// Whether invalidations wait for delivery.
    pub(in crate::cache) fn owes(&self) -> bool {
        self.floor() == u64::MAX
    }

    /// What is to be delivered now, after a look and over the connection that it went over; `None`: nothing, or somebody is
    /// at it.
    pub(in crate::cache) fn due(&self) -> Option<Delivery<'_>> {
        if !self.owes() {
            return None;
        }
        let alone = self.delivering.try_lock().ok()?;
        let owed = self.owed();
        Some(Delivery { debts: self, keys: owed.keys.clone(), everything: owed.everything, _alone: alone })
    }
}

impl Delivery<'_> {
    /// The whole memory is to count for nothing.
    pub(in crate::cache) fn is_everything(&self) -> bool {
        self.everything != 0
    }

    /// The keys that are to be dropped, whoever holds them.
    #[cfg(feature = "memcached")]
    pub(in crate::cache) fn keys(&self) -> Vec<&str> {
        self.keys.keys().map(String::as_str).collect()
    }

    /// The keys that are to be dropped where no writer holds them, or the others.
    #[cfg(feature = "redis")]
    pub(in crate::cache) fn spared(&self, held: bool) -> Vec<&str> {
        let some = self.keys.iter().filter(|(_, (_, spare))| *spare == held);
        some.map(|(key, _)| key.as_str()).collect()
    }

    /// All of it was sent, except what is elsewhere.
    #[cfg(feature = "redis")]
    pub(in crate::cache) fn done_except(self, elsewhere: &HashSet<String>) {
        self.end(|key| elsewhere.contains(key));
    }

    /// All of it was sent.
    #[cfg(feature = "memcached")]
    pub(in crate::cache) fn done(self) {
        self.end(|_| false);
    }

    fn end(self, stays: impl Fn(&str) -> bool) {
        let Self { debts, keys, everything, .. } = &self;
        // Only what was sent is forgotten, and only now: whatever came or broke meanwhile is still owed.
        let mut owed = debts.owed();
        owed.keys.retain(|key, failure| keys.get(key) != Some(&*failure) || stays(key));
        if owed.everything == *everything {
            owed.everything = 0;
        }
        if owed.keys.is_empty() && owed.everything == 0 {
            debts.floor.store(now_ms() + 1, Ordering::Release);
            debts.look_now.notify_waiters();
            tracing::info!(keys = keys.len(), everything = *everything != 0, "owed invalidations were delivered");
        }
    }
}
