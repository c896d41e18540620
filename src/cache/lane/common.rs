//! What all lanes of a process to one server have in common, whatever its engine.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;

use super::{Deadlines, Debts, Returns};
use crate::cache::{CacheError, Lease, Place};
use crate::catalog::Mapping;
use crate::config;

/// What each engine's own share of it stands beside.
#[derive(Debug)]
pub(in crate::cache) struct Common {
    /// What the server is called.
    pub(in crate::cache) address: String,
    /// The most that one operation may take.
    pub(in crate::cache) timeout: Duration,
    /// How far behind the database a hit may be, in milliseconds; `None`: nobody keeps this memory current.
    pub(in crate::cache) max_staleness: Option<u64>,
    /// What must be registered before anything is used here, by fingerprint.
    pub(in crate::cache) mappings: ArcSwap<HashMap<String, Mapping>>,
    /// What the process owes to the server.
    pub(in crate::cache) debts: Debts,
    /// What is being given back that was perhaps given to nobody.
    pub(in crate::cache) returns: Returns,
    /// What is packed would be at most this large, in bytes.
    pub(in crate::cache) max_entry: usize,
    /// Larger payloads are packed, in bytes; `None`: none are.
    pub(in crate::cache) pack_above: Option<usize>,
}

impl Common {
    pub(in crate::cache) fn new(
        config: &config::Cache,
        max_staleness: Option<Duration>,
        address: String,
        debts: Debts,
    ) -> Self {
        Self {
            address,
            timeout: config.timeout,
            max_staleness: max_staleness.map(|longest| u64::try_from(longest.as_millis()).unwrap_or(u64::MAX)),
            mappings: ArcSwap::default(),
            debts,
            returns: Returns::default(),
            max_entry: config.max_entry,
            pack_above: config.packs_above(),
        }
    }

    /// Declares what is cached here and which changes concern it. Nothing is trusted before it is registered.
    pub(in crate::cache) fn declare(&self, mappings: HashMap<String, Mapping>) {
        let before = self.mappings.swap(Arc::new(mappings));
        if *before != **self.mappings.load() {
            self.debts.mistrust();
        }
    }

    /// Whether what is read under these deadlines is known to be current. An entry that may be strict is of no use
    /// otherwise.
    pub(in crate::cache) fn usable(&self, deadlines: Deadlines, place: &Place<'_>) -> Result<bool, CacheError> {
        let verified = self.debts.verified(deadlines)?;
        if verified || !place.strict { Ok(verified) } else { Err(CacheError::Untrusted) }
    }

    /// What leases found is only as good as it is when it is used.
    pub(in crate::cache) fn still(
        &self,
        mut leases: Vec<Lease>,
        deadlines: Deadlines,
        place: &Place<'_>,
    ) -> Result<Vec<Lease>, CacheError> {
        let verified = self.usable(deadlines, place)?;
        for lease in &mut leases {
            if let Lease::Hit(entry) | Lease::Fill { stale: Some(entry), .. } | Lease::Wait { stale: Some(entry) } =
                lease
            {
                entry.verified &= verified;
            }
        }
        Ok(leases)
    }
}
