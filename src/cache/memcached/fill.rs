//! Stores values in the places of their leases, or says why not.

use super::MemcachedCache;
use super::lane::Live;
use super::operations::millis;
use super::read::number;
use super::steps::{self, wall_ms};
use super::wire::{self, Batch, If, Reply};
use crate::cache::entry;
use crate::cache::lane::now_ms;
use crate::cache::{CacheError, Fill, Filled, Place, Ticket};

/// What an item costs beside its value, at most: the server's header, and the key.
const OVERHEAD: usize = 400;

/// What is done with a fill.
enum Plan {
    Store,
    TooBig,
}

impl MemcachedCache {
    /// Whether the groups of these fills and the generations of their resources are still those of their leases. The entry's
    /// own number says nothing of a group that was dropped, or a resource that was purged, since then.
    pub(super) async fn still(
        &self,
        live: &Live,
        fills: &[(Place<'_>, Ticket, Fill)],
    ) -> Result<Vec<bool>, CacheError> {
        let groups = fills.first().map_or(&[][..], |(place, ..)| place.groups);
        let mut generations = Some(Vec::new());
        if !groups.is_empty() {
            let mut batch = Batch::new();
            for group in groups {
                batch.get(&self.shared.spelling.of(group));
            }
            generations = live.connection.ask(batch).await?.iter().map(number).collect();
        }
        let is_same = |(place, ticket, _): &(Place<'_>, Ticket, Fill)| {
            generations.as_ref().is_some_and(|generations| live.tag(place, generations) == ticket.tag)
        };
        Ok(fills.iter().map(is_same).collect())
    }

    /// Puts one value into the place of its lease's, or says why not.
    fn store(
        &self,
        live: &Live,
        batch: &mut Batch,
        (place, ticket, fill): &(Place<'_>, Ticket, Fill),
        cas: u64,
    ) -> Plan {
        let key = self.shared.spelling.of(place.key);
        let largest = live.connection.server.number("item_size_max").unwrap_or(1 << 20);
        let value = entry::valid(place.key, ticket.tag, place.shape, fill, wall_ms(), self.shared.pack_above);
        if value.len() + OVERHEAD > usize::try_from(largest).unwrap_or(usize::MAX) {
            // The server would drop whatever is there, a writer's hold too. Only what this lease knows goes: nobody need wait
            // for it, and what is past its TTL must not outlive a newer value.
            batch.delete_if(&key, cas);
            return Plan::TooBig;
        }
        let life = wire::life(millis(fill.ttl.saturating_add(fill.grace)));
        batch.set(&key, If::Is(cas), life, &value);
        Plan::Store
    }

    pub(super) async fn store_all(
        &self,
        live: &Live,
        fills: &[(Place<'_>, Ticket, Fill)],
    ) -> Result<Vec<Filled>, CacheError> {
        let now = now_ms();
        let leased: Vec<_> = fills.iter().map(|(_, ticket, _)| live.tickets.take(ticket.fence)).collect();
        let mut numbers: Vec<_> =
            leased.iter().map(|leased| leased.filter(|leased| now < leased.ends).map(|leased| leased.cas)).collect();
        // Of what was forgotten, and of what others may have taken over, the server is asked.
        let unsure: Vec<usize> = (0..fills.len()).filter(|index| numbers[*index].is_none()).collect();
        let mut verdicts = vec![Filled::Gone; fills.len()];
        let batch = Batch::of_gets(unsure.iter().map(|index| self.shared.spelling.of(fills[*index].0.key)));
        for (index, reply) in unsure.into_iter().zip(live.connection.ask(batch).await?) {
            let (place, ticket, _) = &fills[index];
            match (steps::own(place.key, ticket.fence, &reply), reply) {
                // A lock that has ended is over, though nobody has taken it yet; a refresh is not.
                (Some(b'P'), Reply::Value { .. }) if leased[index].is_some() => {}
                (Some(_), Reply::Value { cas, .. }) => numbers[index] = Some(cas),
                (None, Reply::Value { .. }) => verdicts[index] = Filled::Fenced,
                (_, Reply::Missing) => {}
                _ => return Err(CacheError::Refused),
            }
        }
        let mut batch = Batch::new();
        let mut plans = Vec::with_capacity(fills.len());
        for (index, (fill, number)) in fills.iter().zip(numbers).enumerate() {
            if let Some(cas) = number {
                plans.push((index, self.store(live, &mut batch, fill, cas)));
            }
        }
        for ((index, plan), reply) in plans.into_iter().zip(live.connection.ask(batch).await?) {
            verdicts[index] = match (plan, reply) {
                (_, Reply::Refused | Reply::Value { .. }) => return Err(CacheError::Refused),
                (Plan::TooBig, _) => Filled::TooBig,
                (Plan::Store, Reply::Done(_)) => Filled::Stored,
                (Plan::Store, Reply::Changed | Reply::Taken) => Filled::Fenced,
                (Plan::Store, Reply::Missing) => Filled::Gone,
            };
        }
        let gone: Vec<usize> = (0..fills.len()).filter(|index| verdicts[*index] == Filled::Gone).collect();
        let keys: Vec<&str> = gone.iter().map(|index| fills[*index].0.key).collect();
        for (index, is_held) in gone.iter().zip(steps::are_held(&self.shared, &live.connection, &keys).await?) {
            // Not merely gone: a writer took it away.
            if is_held {
                verdicts[*index] = Filled::Fenced;
            }
        }
        Ok(verdicts)
    }
}
