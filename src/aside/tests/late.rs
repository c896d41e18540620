//! A cache whose replies are late, or whose connections are away: what that costs its readers, and the database.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::future::join_all;
use tokio::time::{Instant, sleep};

use super::{Heart, ask, value};
use crate::aside::read::PROBES;
use crate::aside::{Aside, Forward};
use crate::cache::entry::Fence;
use crate::cache::memory::MemoryCache;
use crate::cache::{Cache, CacheError, Fill, Filled, Inspection, Lease, Lookup, Place, Ticket};
use crate::catalog::Target;

const TIMEOUT: Duration = Duration::from_millis(100);

/// What becomes of an operation.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fate {
    Answered,
    /// It is done, and nobody hears of it in time.
    Late,
    /// It is not done, and nobody hears of that either.
    Lost,
    /// There is no connection.
    Away,
    /// It is not trusted.
    Untrusted,
    /// It is refused, after so long.
    Refused(Duration),
}

impl Fate {
    async fn of<T>(self, work: impl Future<Output = Result<T, CacheError>>) -> Result<T, CacheError> {
        match self {
            Self::Answered => return work.await,
            Self::Away => return Err(CacheError::Disconnected),
            Self::Untrusted => return Err(CacheError::Untrusted),
            Self::Refused(after) => {
                sleep(after).await;
                return Err(CacheError::Refused);
            }
            Self::Late => drop(work.await),
            Self::Lost => {}
        }
        sleep(TIMEOUT).await;
        Err(CacheError::TimedOut)
    }
}

/// A memory that is out of reach, as it is told, and has answered nobody else.
#[derive(Clone)]
struct Troubled {
    memory: MemoryCache,
    /// Of each lookup of one entry.
    lookups: Fate,
    /// Of the first of them, of which the last comes first.
    first: Arc<Mutex<Vec<Fate>>>,
    /// How many there were.
    looked: Arc<AtomicU32>,
    /// Of the first lookups of many, of which the last comes first; all others are answered.
    batches: Arc<Mutex<Vec<Fate>>>,
    /// Likewise of leases.
    leases: Arc<Mutex<Vec<Fate>>>,
    /// Leases that were asked for.
    asked: Arc<AtomicU32>,
}

impl Heart {
    /// A process with a connection of its own to the same memory and the same store.
    fn troubled(&self, lookups: Fate, batches: &[Fate], leases: &[Fate]) -> Aside<Troubled, super::Script> {
        let cache = Troubled {
            memory: self.aside.cache().clone(),
            lookups,
            first: Arc::default(),
            looked: Arc::default(),
            batches: Arc::new(Mutex::new(batches.to_vec())),
            leases: Arc::new(Mutex::new(leases.to_vec())),
            asked: Arc::default(),
        };
        let metrics = Arc::clone(self.aside.metrics());
        Aside::new(cache, self.script.clone(), self.aside.core.limits, metrics)
    }
}

impl Cache for Troubled {
    async fn read(&self, place: Place<'_>) -> Result<Lookup, CacheError> {
        self.looked.fetch_add(1, Ordering::SeqCst);
        let fate = self.first.lock().unwrap().pop().unwrap_or(self.lookups);
        fate.of(self.memory.read(place)).await
    }

    async fn read_many(&self, places: &[Place<'_>]) -> Result<Vec<Lookup>, CacheError> {
        let fate = self.batches.lock().unwrap().pop().unwrap_or(Fate::Answered);
        fate.of(self.memory.read_many(places)).await
    }

    async fn lease(&self, places: &[Place<'_>], lock: Duration) -> Result<Vec<Lease>, CacheError> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        let fate = self.leases.lock().unwrap().pop().unwrap_or(Fate::Answered);
        fate.of(self.memory.lease(places, lock)).await
    }

    async fn renew(&self, held: &[(Place<'_>, Ticket)], lock: Duration) -> Result<(), CacheError> {
        self.memory.renew(held, lock).await
    }

    async fn fill(&self, fills: &[(Place<'_>, Ticket, Fill)]) -> Result<Vec<Filled>, CacheError> {
        self.memory.fill(fills).await
    }

    async fn release(&self, held: &[(Place<'_>, Ticket)]) -> Result<(), CacheError> {
        self.memory.release(held).await
    }

    async fn invalidate(&self, keys: &[&str]) -> Result<(), CacheError> {
        self.memory.invalidate(keys).await
    }

    async fn hold(&self, keys: &[&str], owner: Fence, time: Duration) -> Result<(), CacheError> {
        self.memory.hold(keys, owner, time).await
    }

    async fn invalidate_unless_held(&self, keys: &[&str], owner: Option<Fence>) -> Result<(), CacheError> {
        self.memory.invalidate_unless_held(keys, owner).await
    }

    async fn invalidate_everywhere(&self, keys: &[&str]) -> Result<(), CacheError> {
        self.memory.invalidate_everywhere(keys).await
    }

    async fn purge(&self, resource: &str) -> Result<(), CacheError> {
        self.memory.purge(resource).await
    }

    fn answered_since(&self, _: &str, _: std::time::Instant) -> bool {
        false
    }

    async fn inspect(&self, place: Place<'_>) -> Result<Inspection, CacheError> {
        self.memory.inspect(place).await
    }
}

#[tokio::test(start_paused = true)]
async fn lookups_that_fail_over_a_connection_of_their_own_cost_no_query_more() {
    for fate in [Fate::Lost, Fate::Away, Fate::Untrusted] {
        let heart = Heart::new(1 << 10);
        let processes = [heart.troubled(fate, &[], &[]), heart.troubled(fate, &[], &[])];
        let target = heart.target(1);
        let readers = (0..20).map(|reader| processes[reader % 2].read(&target, ask()));
        for read in join_all(readers).await {
            assert_eq!(value(read), "0");
        }
        assert_eq!(heart.loads(), 1, "{fate:?}");
        assert_eq!(heart.read(1).await.expect("it is answered").status.forward, None, "it is stored");
    }
}

#[tokio::test(start_paused = true)]
async fn nor_do_those_of_batches() {
    for fate in [Fate::Lost, Fate::Away, Fate::Untrusted] {
        let heart = Heart::new(1 << 10);
        let processes = [heart.troubled(fate, &[fate], &[]), heart.troubled(fate, &[fate], &[])];
        let targets: Vec<Target> = (1..4).map(|id| heart.target(id)).collect();
        let (one, other) =
            tokio::join!(processes[0].read_many(&targets, ask()), processes[1].read_many(&targets, ask()));
        assert_eq!((one.expect("it is answered").len(), other.expect("it is answered").len()), (3, 3));
        assert_eq!(heart.loads(), 1, "{fate:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_lease_that_is_late_is_asked_for_once_more() {
    for fate in [Fate::Lost, Fate::Late] {
        let heart = Heart::new(1 << 10);
        let process = heart.troubled(Fate::Answered, &[], &[fate]);
        let began = Instant::now();
        let answer = process.read(&heart.target(1), ask()).await.expect("it is answered");
        assert!(answer.status.stored, "{fate:?}");
        // What was given unknown is waited for as long as a lock lasts.
        assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
        assert_eq!(heart.loads(), 1);
    }
}

#[tokio::test(start_paused = true)]
async fn and_only_once_and_not_where_there_is_no_connection() {
    for (fates, asked) in [(vec![Fate::Lost; 9], 2), (vec![Fate::Away, Fate::Lost], 2), (vec![Fate::Away], 1)] {
        let heart = Heart::new(1 << 10);
        let process = heart.troubled(Fate::Answered, &[], &fates);
        let answer = process.read(&heart.target(1), ask()).await.expect("it is answered");
        assert_eq!((answer.status.forward, answer.status.stored), (Some(Forward::Bypass), false));
        assert_eq!(process.cache().asked.load(Ordering::SeqCst), asked, "{fates:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_cache_that_answers_nothing_costs_a_few_readers_three_timeouts_and_the_others_one() {
    let heart = Heart::new(1 << 10);
    let process = heart.troubled(Fate::Lost, &[], &[Fate::Lost; 100]);
    let readers = (0..50).map(|id| {
        let (process, target) = (process.clone(), heart.target(id));
        async move {
            let began = Instant::now();
            process.read(&target, ask()).await.expect("it is answered");
            // A load takes a second.
            began.elapsed().checked_sub(Duration::from_secs(1)).expect("it was loaded")
        }
    });
    let waited = join_all(readers).await;
    let more = waited.iter().filter(|waited| **waited > TIMEOUT * 3 / 2).count();
    assert_eq!(more, PROBES);
    assert!(waited.iter().all(|waited| *waited < TIMEOUT * 7 / 2), "{waited:?}");
}

#[tokio::test(start_paused = true)]
async fn those_who_were_too_late_for_what_is_not_stored_ask_the_cache_together() {
    let heart = Heart::new(1 << 10);
    // The first flight goes past the cache.
    let process = heart.troubled(Fate::Answered, &[], &[Fate::Away]);
    let readers = (0..100).map(|reader| {
        let (process, target) = (process.clone(), heart.target(1));
        tokio::spawn(async move {
            sleep(TIMEOUT * if reader == 0 { 0 } else { 4 + reader % 4 }).await;
            process.read(&target, ask()).await
        })
    });
    let readers: Vec<_> = readers.collect();
    // That one has landed, and the next one is under way.
    sleep(Duration::from_millis(1_500)).await;
    assert_eq!((heart.loads(), process.cache().looked.load(Ordering::SeqCst)), (2, 1));
    for read in readers {
        assert_eq!(value(read.await.expect("no panic")), "0");
    }
    assert_eq!(heart.loads(), 2, "all others share it");
    assert_eq!(heart.read(1).await.expect("it is answered").status.forward, None, "it is stored");
}

#[tokio::test(start_paused = true)]
async fn whoever_was_refused_asks_again_when_he_was_too_late_for_a_load_past_the_cache() {
    // Both look before either boards; the second is answered when the first is loading.
    let fates = [Fate::Refused(TIMEOUT), Fate::Refused(Duration::from_millis(1))];
    let heart = Heart::new(1 << 10);
    let process = heart.troubled(Fate::Answered, &fates, &[]);
    process.cache().first.lock().unwrap().extend(fates);
    let target = heart.target(1);
    let (first, second) = tokio::join!(process.read(&target, ask()), process.read(&target, ask()));
    assert_eq!(first.expect("it is answered").status.forward, Some(Forward::Bypass));
    assert!(second.expect("it is answered").status.stored);
    let targets = [heart.target(2), heart.target(3)];
    let (first, second) = tokio::join!(process.read_many(&targets, ask()), process.read_many(&targets, ask()));
    assert_eq!(first.expect("it is answered")[0].status.forward, Some(Forward::Bypass));
    assert!(second.expect("it is answered")[0].status.stored);
}
