//! The work of a flight up to its load: get the lease, or wait for whoever has it.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::OwnedSemaphorePermit;
use tokio::time::Instant;

use super::answer::{Forward, Source};
use super::fill::{Flight, stale, within};
use super::flight::{Landed, Pilot};
use super::load::{Job, Stale};
use super::{Core, LOCK};
use crate::cache::entry::Entry;
use crate::cache::{Cache, CacheError, Lease, Lookup, Place};
use crate::catalog::Target;
use crate::store::Load;

/// The first pause between two looks at an entry that another process fills; each next one is twice as long.
const FIRST_PAUSE: Duration = Duration::from_millis(5);
const LONGEST_PAUSE: Duration = Duration::from_millis(80);

/// A target whose flight is led here.
pub(super) struct Led {
    pub(super) target: Target,
    pub(super) pilot: Pilot,
}

/// What the leases say is to be done.
#[derive(Default)]
struct Sorted {
    load: Vec<Job>,
    wait: Vec<(Led, Option<Stale>)>,
}

/// Which way a flight goes.
pub(super) enum Way {
    /// Through the cache; with a permit where nobody knows whether it answers.
    Through(Option<OwnedSemaphorePermit>),
    /// Past it.
    Past,
}

/// Flies all of `led`, which are rows of one resource or a single list.
pub(super) async fn run<C, S>(core: Arc<Core<C, S>>, led: Vec<Led>, way: Way)
where
    C: Cache + Clone + 'static,
    S: Load + 'static,
{
    let began = Instant::now();
    let flight = Flight { core: &core, began };
    let Way::Through(probe) = way else {
        flight.load(led.into_iter().map(|led| led.unstored(Forward::Bypass)).collect()).await;
        return;
    };
    let sorted = flight.lease(led).await;
    drop(probe);
    tokio::join!(flight.load(sorted.load), flight.wait(sorted.wait));
}

impl Led {
    fn unstored(self, forward: Forward) -> Job {
        Job { target: self.target, pilot: Some(self.pilot), ticket: None, stale: None, forward }
    }
}

impl<C: Cache + Clone + 'static, S: Load + 'static> Flight<'_, C, S> {
    /// Asks for the leases, lands what was filled meanwhile, and sorts the rest.
    async fn lease(&self, led: Vec<Led>) -> Sorted {
        let mut sorted = Sorted::default();
        if led.is_empty() {
            return sorted;
        }
        let asked = match self.ask(&led).await {
            // On a busy machine a reply may be late, and loading past the cache would be a query too many. A cache that does
            // not answer at all is soon not asked any more: then this costs nothing. A lease that nobody
            // heard of is given back meanwhile; should it be there still, the second waits for it as for anybody's.
            Err(CacheError::TimedOut) => self.ask(&led).await,
            asked => asked,
        };
        let Ok(leases) = asked else {
            sorted.load = led.into_iter().map(|led| led.unstored(Forward::Bypass)).collect();
            return sorted;
        };
        for (led, (covers, lease)) in led.into_iter().zip(leases) {
            match lease {
                Lease::Hit(entry) => {
                    let landed =
                        Landed { entry, source: Source::Cache, forward: None, stored: false, collapsed: false };
                    self.land(led.pilot, Ok(landed), covers, Duration::ZERO);
                }
                Lease::Past => sorted.load.push(led.unstored(Forward::Bypass)),
                Lease::Wait { stale: Some(entry) } if revalidating(&led.target, &entry) => {
                    self.land(led.pilot, Ok(stale(entry)), covers, Duration::ZERO);
                }
                Lease::Wait { stale } => sorted.wait.push((led, stale.map(|_| Stale { covers }))),
                Lease::Fill { ticket, stale: Some(entry) } if revalidating(&led.target, &entry) => {
                    self.land(led.pilot, Ok(stale(entry)), covers, Duration::ZERO);
                    self.core.metrics.resource(&led.target.resource().name).revalidated();
                    sorted.load.push(Job::unwaited(led.target, ticket, Forward::Stale));
                }
                Lease::Fill { ticket, stale } => {
                    let forward = if stale.is_some() { Forward::Stale } else { Forward::Miss };
                    let (pilot, ticket) = (Some(led.pilot), Some(ticket));
                    let stale = stale.map(|_| Stale { covers });
                    sorted.load.push(Job { target: led.target, pilot, ticket, stale, forward });
                }
            }
        }
        sorted
    }

    /// Asks for leases once; each with whom the reply covers.
    async fn ask(&self, led: &[Led]) -> Result<Vec<(u32, Lease)>, CacheError> {
        let covers: Vec<u32> = led.iter().map(|led| led.pilot.advance()).collect();
        let places: Vec<Place<'_>> = led.iter().map(|led| led.target.place()).collect();
        let leases = self.core.asked("lease", self.core.cache.lease(&places, LOCK)).await?;
        Ok(covers.into_iter().zip(leases).collect())
    }

    /// Waits for other processes' fills; takes over where a lock ends, and goes past those that take too long.
    async fn wait(&self, mut waiting: Vec<(Led, Option<Stale>)>) {
        let mut pause = FIRST_PAUSE;
        while !waiting.is_empty() {
            if self.began.elapsed() > self.core.limits.wait {
                let past = |(led, stale): (Led, Option<Stale>)| Job { stale, ..led.unstored(Forward::Miss) };
                self.load(waiting.into_iter().map(past).collect()).await;
                return;
            }
            tokio::time::sleep(pause.mul_f64(0.5 + fastrand::f64() / 2.0)).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
            waiting.retain(|(led, _)| !led.pilot.is_deserted());
            if waiting.is_empty() {
                return;
            }
            let covers: Vec<u32> = waiting.iter().map(|(led, _)| led.pilot.advance()).collect();
            let places: Vec<Place<'_>> = waiting.iter().map(|(led, _)| led.target.place()).collect();
            let lookups = match self.core.asked("get_many", self.core.cache.read_many(&places)).await {
                Ok(lookups) => lookups,
                // On a busy machine a reply may be late: whoever fills is at it still. Where none comes at all, there is no
                // connection soon.
                Err(CacheError::TimedOut) => continue,
                Err(_) => {
                    let past = |(led, stale): (Led, Option<Stale>)| Job { stale, ..led.unstored(Forward::Bypass) };
                    self.load(waiting.into_iter().map(past).collect()).await;
                    return;
                }
            };
            let mut again = Vec::new();
            let mut still = Vec::new();
            for (((led, stale), covers), lookup) in waiting.into_iter().zip(covers).zip(lookups) {
                match lookup {
                    Lookup::Fresh(entry) => {
                        let landed = Landed {
                            entry,
                            source: Source::Cache,
                            forward: Some(Forward::Miss),
                            stored: false,
                            collapsed: true,
                        };
                        self.land(led.pilot, Ok(landed), covers, Duration::ZERO);
                    }
                    Lookup::Pending => still.push((led, stale)),
                    // The lock has ended, or the refresh may have: one of those who ask fills, the others wait on.
                    Lookup::Soft(_) | Lookup::Absent => again.push(led),
                }
            }
            waiting = still;
            let sorted = self.lease(again).await;
            waiting.extend(sorted.wait);
            if !sorted.load.is_empty() {
                // Whoever waits for another's fill does not wait for this load too.
                tokio::join!(self.load(sorted.load), Box::pin(self.wait(waiting)));
                return;
            }
        }
    }
}

/// Whether a stale entry is served while it is refreshed.
fn revalidating(target: &Target, entry: &Entry) -> bool {
    within(entry, target.policy().stale_while_revalidate)
}
