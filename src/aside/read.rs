//! One read.

use std::mem;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::time::timeout_at;

use super::answer::{Answer, Ask, Forward, ReadError, Source, Status};
use super::flight::{Arrived, Boarded, Landing, Passenger};
use super::lease::{self, Led, Way};
use super::{Aside, Core, LOCK, refresh};
use crate::cache::entry::Entry;
use crate::cache::{Cache, CacheError, Lookup};
use crate::catalog::Target;
use crate::store::Load;
use crate::telemetry::Outcome;

/// How long a flight waits for those who were too late for the one before.
const GATHER: Duration = Duration::from_millis(2);
/// So many flights in a row may end without a landing before a reader gives up.
pub(super) const LOST: u32 = 3;
/// So many flights at once may ask for leases where nobody knows whether the cache answers. On a busy machine these are the
/// herds; of a cache that hangs no more readers than these wait twice, and they are enough to open its breaker.
pub(super) const PROBES: usize = 6;

impl<C: Cache + Clone + 'static, S: Load + 'static> Aside<C, S> {
    /// Reads one row or list.
    ///
    /// # Errors
    ///
    /// [`ReadError`]; an error of the cache is none.
    pub async fn read(&self, target: &Target, ask: Ask) -> Result<Answer, ReadError> {
        let started = Instant::now();
        let outcome = self.answer(target, ask).await;
        let metrics = self.core.metrics.resource(&target.resource().name);
        let size = outcome.as_ref().ok().map(|answer| answer.entry.payload.len());
        self.core.top.read(target, size, started);
        match &outcome {
            Ok(answer) => metrics.read(answer.status.outcome(&answer.entry), started),
            Err(error) => {
                metrics.read(Outcome::Error, started);
                if let ReadError::TimedOut | ReadError::Failed = error {
                    self.core.metrics.error("aside", error.kind());
                }
            }
        }
        outcome
    }

    async fn answer(&self, target: &Target, ask: Ask) -> Result<Answer, ReadError> {
        let mut path = Path::new(target, ask);
        if path == Path::Refresh {
            path = self.invalidated(target).await;
        }
        let mut lost = 0;
        let mut look = Look::Unless;
        let mut looked = Instant::now();
        loop {
            let before = mem::replace(&mut looked, Instant::now());
            let (mut doubtful, mut past) = (false, path == Path::Bypass);
            // A refresh looks again only if it was too late for somebody else's load: what it then finds was loaded after its own
            // invalidation.
            let through = matches!(path, Path::Lookup | Path::Again);
            let open = (path == Path::Lookup && look == Look::Unless && !ask.only_if_cached)
                .then(|| self.core.flights.board_if_open(target.entry()))
                .flatten();
            let mut seen = false;
            if open.is_none() && through && look != Look::Shared {
                match self.core.asked("get", self.cache.read(self.core.place(target, looked))).await {
                    Ok(Lookup::Fresh(entry)) => return Ok(self.hit(target, ask, entry, looked)),
                    Err(error) if is_own(error) => {
                        doubtful = !self.core.cache.answered_since(target.entry(), looked);
                    }
                    // Nor does it say anything of the cache that this connection was not looked after in time.
                    Ok(_) | Err(CacheError::Untrusted) => {}
                    Err(_) => past = true,
                }
                seen = true;
            }
            if ask.only_if_cached {
                return Err(ReadError::NotCached);
            }
            if look == Look::Shared {
                // Has it said anything while he waited?
                doubtful = !self.core.cache.answered_since(target.entry(), before);
            }
            let cache = looked.elapsed();
            let (led, mut passenger) = open.map_or_else(|| self.core.board(target), |passenger| (None, passenger));
            let leads = led.is_some();
            if let Some(led) = led {
                let way = if past { Way::Past } else { self.core.way(doubtful) };
                self.core.fly(vec![led], way, look != Look::Unless);
            }
            let unseen = through && !seen && !leads;
            let mut arrived = None;
            if unseen {
                // But another process may have stored it since, and this flight may be slower, or fail.
                let soon = ask.deadline.min(tokio::time::Instant::now() + LOCK);
                arrived = timeout_at(soon, passenger.arrive()).await.ok();
                if arrived.is_none() {
                    let found = self.core.asked("get", self.cache.read(self.core.place(target, looked))).await;
                    if let Ok(Lookup::Fresh(entry)) = found {
                        return Ok(self.hit(target, ask, entry, looked));
                    }
                }
            }
            let arrived = match arrived {
                Some(arrived) => arrived,
                None => timeout_at(ask.deadline, passenger.arrive()).await.map_err(|_| ReadError::TimedOut)?,
            };
            match arrived {
                Arrived::Covered(landing) if unseen && landing.result.is_err() => look = Look::Own,
                Arrived::Covered(landing) => return self.core.arrived(target, path, landing, leads, cache),
                Arrived::TooEarly { cached } => {
                    path = path.again();
                    look = if cached { Look::Own } else { Look::Shared };
                }
                Arrived::Lost => {
                    lost += 1;
                    if lost == LOST {
                        return Err(ReadError::Failed);
                    }
                }
            }
        }
    }

    /// The answer of an entry that is fresh.
    fn hit(&self, target: &Target, ask: Ask, entry: Entry, looked: Instant) -> Answer {
        self.core.audit_hit(target);
        if !ask.only_if_cached && refresh::due(target, &entry) {
            self.core.refresh_ahead(&[(target, &entry)]);
        }
        Answer { entry, status: Status::hit(looked.elapsed()) }
    }

    /// Drops entries of one resource, except what writers hold.
    pub(super) async fn dropped(&self, targets: &[&Target]) -> Result<(), CacheError> {
        let keys: Vec<&str> = targets.iter().map(|target| target.entry()).collect();
        if targets.first().is_some_and(|target| target.resource().hold) {
            return self.core.asked("invalidate", self.cache.invalidate_unless_held(&keys, None)).await;
        }
        self.core.asked("invalidate", self.cache.invalidate(&keys)).await
    }

    /// A forced refresh is an invalidation and then an ordinary miss.
    pub(super) async fn invalidated(&self, target: &Target) -> Path {
        match self.dropped(&[target]).await {
            Ok(()) => Path::Refresh,
            Err(_) => Path::Bypass,
        }
    }
}

/// Whether a lookup failed for a reason that may be its connection's alone: late on a busy machine, or not used just now.
/// Leases go over another one, and find out at no cost if that is not used either.
pub(super) fn is_own(error: CacheError) -> bool {
    matches!(error, CacheError::TimedOut | CacheError::Disconnected)
}

/// Who asks the cache for a reader that goes through it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Look {
    /// He himself, unless it is being loaded here. What is was not in the cache: ten thousand who ask for it at once ask the
    /// flight first.
    Unless,
    /// He himself.
    Own,
    /// The next flight, by its lease, for all who were too late for one that has left nothing in the cache. They are awake in
    /// the same moment: if each of them looked, those who are answered last would be too late for that flight too.
    Shared,
}

/// Which way a read goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Path {
    /// Through the cache.
    Lookup,
    /// Through the cache, after an invalidation.
    Refresh,
    /// As after `Refresh`, but another's load was in the way.
    Again,
    /// Past the cache.
    Bypass,
}

impl Path {
    pub(super) fn new(target: &Target, ask: Ask) -> Self {
        match (target.cacheable(), ask.refresh) {
            (false, _) => Self::Bypass,
            (true, true) => Self::Refresh,
            (true, false) => Self::Lookup,
        }
    }

    pub(super) fn again(self) -> Self {
        match self {
            Self::Refresh => Self::Again,
            other => other,
        }
    }
}

impl Status {
    pub(super) fn hit(cache: Duration) -> Self {
        Self { source: Source::Cache, forward: None, stored: false, collapsed: false, cache, database: Duration::ZERO }
    }
}

impl<C: Cache + Clone + 'static, S: Load + 'static> Core<C, S> {
    pub(super) fn board(&self, target: &Target) -> (Option<Led>, Passenger) {
        match self.flights.board(target.entry()) {
            Boarded::Pilot(pilot, passenger) => (Some(Led { target: target.clone(), pilot }), passenger),
            Boarded::Passenger(passenger) => (None, passenger),
        }
    }

    /// Which way the flight of a read goes that may go through the cache.
    ///
    /// `doubtful`: its lookup failed, and the cache has answered nothing else meanwhile.
    pub(super) fn way(&self, doubtful: bool) -> Way {
        if !doubtful {
            return Way::Through(None);
        }
        Arc::clone(&self.probes).try_acquire_owned().map_or(Way::Past, |probe| Way::Through(Some(probe)))
    }

    /// Starts flights that no request's end can stop.
    ///
    /// `gather`: others were too late for the flight before this one, as its leader was; they get a moment to board.
    pub(super) fn fly(self: &Arc<Self>, led: Vec<Led>, way: Way, gather: bool) {
        let core = Arc::clone(self);
        self.runtime.spawn(async move {
            if gather {
                tokio::time::sleep(GATHER).await;
            }
            lease::run(core, led, way).await;
        });
    }

    pub(super) fn arrived(
        &self,
        target: &Target,
        path: Path,
        landing: Landing,
        leads: bool,
        cache: Duration,
    ) -> Result<Answer, ReadError> {
        let landed = landing.result?;
        if !leads {
            self.metrics.resource(&target.resource().name).coalesced.inc();
        }
        let forward = match (path, landed.forward) {
            (Path::Refresh | Path::Again, _) => Some(Forward::Request),
            (_, forward) => forward,
        };
        let status = Status {
            source: landed.source,
            forward,
            stored: landed.stored,
            collapsed: landed.collapsed || !leads,
            cache: cache + landing.cache,
            database: landing.database,
        };
        Ok(Answer { entry: landed.entry, status })
    }
}
