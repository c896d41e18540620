//! The operations of the trait.

use std::future::Future;
use std::pin::pin;
use std::time::{Duration, Instant};

use bytes::Bytes;

use super::MemcachedCache;
use super::look;
use super::steps::{self, Terms, wall_ms};
use super::wire::Reply;
use crate::cache::control::field;
use crate::cache::entry::{self, Fence, Held};
use crate::cache::lane::{Asked, Wait};
use crate::cache::{Cache, CacheError, Fill, Filled, Inspection, Lease, Lookup, Place, Ticket};
use crate::store;

impl MemcachedCache {
    /// All round trips of one operation together, of which there is one at least, within its time.
    pub(super) async fn within<T>(&self, steps: impl Future<Output = Result<T, CacheError>>) -> Result<T, CacheError> {
        let wait = Wait::new(self.shared.timeout);
        let outcome = wait.until(pin!(steps)).await.unwrap_or(Err(CacheError::TimedOut));
        match outcome {
            Ok(_) => self.lane.answered(),
            Err(CacheError::TimedOut) => self.lane.missed(wait),
            // Its supervisor makes another at once.
            Err(CacheError::Disconnected) => self.lane.wake.notify_one(),
            Err(_) => {}
        }
        outcome
    }

    /// Remembers invalidations that failed.
    fn owing(&self, keys: &[&str], outcome: Result<(), CacheError>) -> Result<(), CacheError> {
        if outcome.is_err() {
            self.shared.debts.owe(keys, false);
            self.lane.wake.notify_one();
        }
        outcome
    }
}

impl Cache for MemcachedCache {
    async fn read(&self, place: Place<'_>) -> Result<Lookup, CacheError> {
        let mut found = self.read_many(&[place]).await?;
        Ok(found.pop().unwrap_or(Lookup::Absent))
    }

    async fn read_many(&self, places: &[Place<'_>]) -> Result<Vec<Lookup>, CacheError> {
        let (live, deadlines) = self.lane.ready().await?;
        if places.is_empty() {
            return Ok(Vec::new());
        }
        self.read_grouped(&live, deadlines, places).await
    }

    async fn lease(&self, places: &[Place<'_>], lock: Duration) -> Result<Vec<Lease>, CacheError> {
        let (live, deadlines) = self.lane.ready().await?;
        // A lease on a memory that can't be trusted would only make others wait.
        let Some(first) = places.first() else { return Ok(Vec::new()) };
        let verified = self.shared.usable(deadlines, first)?;
        let mut asked = Asked::new(&self.shared, &live);
        let leasing = async {
            let Some(groups) = self.groups(&live, first).await? else { return Ok(vec![Lease::Past; places.len()]) };
            let max_entry = self.shared.max_entry;
            let terms = Terms { groups: &groups, lock: millis(lock), verified, max_entry };
            steps::lease(&self.shared, &live, places, &terms, &mut asked).await
        };
        let leases = self.within(Box::pin(leasing)).await?;
        let leases = self.shared.still(leases, deadlines, first)?;
        asked.settled();
        Ok(leases)
    }

    async fn renew(&self, held: &[(Place<'_>, Ticket)], lock: Duration) -> Result<(), CacheError> {
        let live = self.lane.live().await?;
        let held: Vec<_> =
            held.iter().filter(|(_, ticket)| ticket.connection == live.standing.number).copied().collect();
        if held.is_empty() {
            return Ok(());
        }
        self.within(steps::renew(&self.shared, &live, &held, millis(lock))).await
    }

    async fn fill(&self, fills: &[(Place<'_>, Ticket, Fill)]) -> Result<Vec<Filled>, CacheError> {
        let live = self.lane.live().await?;
        let deadlines = live.standing.deadlines();
        if fills.is_empty() {
            return Ok(Vec::new());
        }
        if fills.iter().any(|(_, ticket, _)| ticket.connection != live.standing.number) {
            // The server may have been restarted in between, and its numbers with it. If it was not, nobody need wait for
            // the lock's end.
            let held: Vec<_> = fills.iter().map(|(place, ticket, _)| (*place, *ticket)).collect();
            self.release(&held).await?;
            return Ok(vec![Filled::Gone; fills.len()]);
        }
        let caught_up_with = self.shared.max_staleness.map(|_| store::origin(&live.standing.control.load().origin));
        let (fills, foreign): (Vec<_>, Vec<_>) = fills
            .iter()
            .cloned()
            .enumerate()
            .partition(|(_, (.., fill))| caught_up_with.is_none_or(|origin| origin == fill.origin));
        let mut verdicts = vec![Filled::Fenced; fills.len() + foreign.len()];
        let storing = async {
            if !foreign.is_empty() {
                // Read from another database, or from a former life of this one.
                let held: Vec<_> = foreign.iter().map(|(_, (place, ticket, _))| (*place, *ticket)).collect();
                steps::release(&self.shared, &live, &held).await?;
            }
            let (indexes, fills): (Vec<usize>, Vec<_>) = fills.into_iter().unzip();
            let still = self.still(&live, &fills).await?;
            let filled = self.store_all(&live, &fills).await?;
            for ((index, filled), still) in indexes.into_iter().zip(filled).zip(still) {
                verdicts[index] = if still || filled != Filled::Stored { filled } else { Filled::Fenced };
            }
            Ok(())
        };
        self.within(Box::pin(storing)).await?;
        // "Stored" means that nothing was invalidated meanwhile; while this process owes invalidations that is not known.
        if self.shared.debts.verified(deadlines)? { Ok(verdicts) } else { Err(CacheError::Untrusted) }
    }

    async fn release(&self, held: &[(Place<'_>, Ticket)]) -> Result<(), CacheError> {
        let live = self.lane.live().await?;
        if held.is_empty() {
            return Ok(());
        }
        self.within(steps::release(&self.shared, &live, held)).await
    }

    async fn invalidate(&self, keys: &[&str]) -> Result<(), CacheError> {
        if keys.is_empty() {
            return Ok(());
        }
        let telling = async {
            let live = self.lane.live().await?;
            self.shared.drop_all(&live.connection, keys).await
        };
        self.owing(keys, self.within(Box::pin(telling)).await)
    }

    async fn hold(&self, keys: &[&str], owner: Fence, time: Duration) -> Result<(), CacheError> {
        let live = self.lane.live().await?;
        // A hold in a memory that nobody reads from holds nobody back.
        if !self.shared.debts.verified(live.standing.deadlines())? {
            return Err(CacheError::Untrusted);
        }
        if live.connection.server.get("evictions") == Some("off") {
            // A write that it has no room for destroys what is there: a hold of somebody else, perhaps.
            return Err(CacheError::Refused);
        }
        if keys.is_empty() {
            return Ok(());
        }
        self.within(steps::hold(&self.shared, &live.connection, keys, owner, millis(time))).await
    }

    async fn invalidate_unless_held(&self, keys: &[&str], owner: Option<Fence>) -> Result<(), CacheError> {
        // Holds stand beside their entries: nothing that is done to these opens them.
        let Some(owner) = owner.filter(|_| !keys.is_empty()) else { return self.invalidate(keys).await };
        let telling = async {
            let live = self.lane.live().await?;
            steps::give_up(&self.shared, &live.connection, keys, owner).await
        };
        self.owing(keys, self.within(Box::pin(telling)).await)
    }

    async fn invalidate_everywhere(&self, keys: &[&str]) -> Result<(), CacheError> {
        // There is no tier in process that would have to be told.
        self.invalidate(keys).await
    }

    async fn purge(&self, resource: &str) -> Result<(), CacheError> {
        let live = self.lane.live().await?;
        let renewing = look::change(&self.shared, &live.connection, |fields| {
            fields.insert(field::generation(resource), fastrand::u64(1..).to_string());
        });
        self.within(Box::pin(renewing)).await?;
        // This process knows the new generation before it answers; the others at their next look.
        self.shared.debts.mistrust();
        Ok(())
    }

    fn answered_since(&self, _: &str, moment: Instant) -> bool {
        self.lane.answered_since(moment)
    }

    async fn inspect(&self, place: Place<'_>) -> Result<Inspection, CacheError> {
        let live = self.lane.live().await?;
        let (replies, groups) = self.get(&live, &[place]).await?;
        let groups: Vec<u64> = groups.into_iter().map(|group| group.unwrap_or(0)).collect();
        let value = match replies.into_iter().next() {
            Some(Reply::Value { value, .. }) => value,
            _ => Bytes::new(),
        };
        let is_held = self.within(steps::are_held(&self.shared, &live.connection, &[place.key])).await? == [true];
        let decoded = || entry::decode(place.key, &value, wall_ms(), self.shared.max_entry);
        let held = if is_held { Some(Held::Reserved) } else { decoded() };
        Ok(Inspection::of(held, value.len(), live.tag(&place, &groups)))
    }
}

pub(super) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
