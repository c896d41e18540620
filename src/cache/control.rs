//! The control key: what a memory says of itself, and how far it has caught up with the database.
//!
//! Without a watermark it carries the epoch and the generations alone. With one, it names a snapshot of the database of
//! which everything has been delivered here, and the moment before that snapshot was taken, by this memory's clock.

use std::collections::HashMap;

use super::slots::{self, Slots, Tenure};
use crate::catalog::Mapping;

/// The fields of a control key, as they are spelled.
pub(super) mod field {
    pub(in crate::cache) const EPOCH: &str = "epoch";
    pub(in crate::cache) const NUMBER: &str = "n";
    pub(in crate::cache) const POINT: &str = "point";
    pub(in crate::cache) const TAKEN: &str = "taken";
    pub(in crate::cache) const RUN: &str = "run";
    pub(in crate::cache) const REPLICATION: &str = "replication";
    pub(in crate::cache) const ORIGIN: &str = "origin";
    pub(in crate::cache) const BATCH: &str = "batch";
    pub(in crate::cache) const HELD: &str = "held";
    pub(in crate::cache) const LOST: &str = "lost";

    /// The field of a resource's generation.
    pub(in crate::cache) fn generation(resource: &str) -> String {
        format!("g:{resource}")
    }

    /// The field of a mapping.
    pub(in crate::cache) fn mapping(fingerprint: &str) -> String {
        format!("map:{fingerprint}")
    }
}

/// What the control key says.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Control {
    /// Of everything here: another one, and all entries are absent. Zero: there is none yet.
    pub epoch: u64,
    /// Counts rounds, and whatever else must make a round under way void.
    pub number: u64,
    /// What was delivered here, in the store's words; empty: nobody knows.
    pub point: String,
    /// When that point was asked for, in milliseconds of this memory's clock.
    pub taken: u64,
    /// Which memory this was when it caught up.
    pub ids: Ids,
    /// Which database it caught up with.
    pub origin: String,
    /// The number of the last batch that invalidated something.
    pub batch: u64,
    /// Of a cluster's node: which hash slots it holds. Elsewhere there are none, and every key counts.
    pub tenure: Option<Tenure>,
    /// Who is concerned by which changes, by fingerprint.
    pub mappings: HashMap<String, Mapping>,
    /// Another version of this service caches here in a way that this one can't keep current.
    pub is_newer: bool,
    pub(super) generations: HashMap<String, u64>,
}

/// What tells one life of a memory from another: a restart changes the first, a failover the second.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ids {
    /// Of the process.
    pub run: String,
    /// Of the history of its data.
    pub replication: String,
}

impl Control {
    /// A resource's generation; zero until it was given one.
    #[must_use]
    pub fn generation(&self, resource: &str) -> u64 {
        self.generations.get(resource).copied().unwrap_or(0)
    }

    /// The point from which changes are owed here; `None`: nobody knows.
    #[must_use]
    pub fn since(&self) -> Option<&str> {
        (!self.point.is_empty()).then_some(self.point.as_str())
    }

    /// Whether an entry of this key may be used here at all: in a cluster, one of a slot that the node was not known to
    /// hold at the last round, or that was leaving, may have come from elsewhere since.
    #[must_use]
    pub fn holds(&self, key: &str) -> bool {
        self.tenure.as_ref().is_none_or(|tenure| {
            let slot = slots::slot(key);
            tenure.held.contains(slot) && !tenure.lost.contains(slot)
        })
    }

    /// Whether an entry of this key that has left would be noticed if it came back.
    #[cfg(feature = "redis")]
    pub(super) fn misses(&self, key: &str) -> bool {
        self.tenure.as_ref().is_some_and(|tenure| tenure.lost.contains(slots::slot(key)))
    }

    /// Gives a resource a generation.
    pub(super) fn set_generation(&mut self, resource: &str, generation: u64) {
        self.generations.insert(resource.to_owned(), generation);
    }

    /// Reads the fields of a hash. What can't be read is as good as not there.
    pub(super) fn read(fields: HashMap<String, String>) -> Self {
        let mut control = Self::default();
        let slots = |name: &str| fields.get(name).and_then(|text| Slots::parse(text));
        control.tenure = slots(field::HELD).map(|held| Tenure { held, lost: slots(field::LOST).unwrap_or_default() });
        for (name, value) in fields {
            let number = || value.parse().unwrap_or(0);
            match name.as_str() {
                field::EPOCH => control.epoch = number(),
                field::NUMBER => control.number = number(),
                field::TAKEN => control.taken = number(),
                field::BATCH => control.batch = number(),
                field::POINT => control.point = value,
                field::RUN => control.ids.run = value,
                field::REPLICATION => control.ids.replication = value,
                field::ORIGIN => control.origin = value,
                other => {
                    if let Some(resource) = other.strip_prefix("g:") {
                        let generation = number();
                        control.set_generation(resource, generation);
                    } else if let Some(fingerprint) = other.strip_prefix("map:") {
                        match Mapping::from_json(&value) {
                            Some(mapping) => drop(control.mappings.insert(fingerprint.to_owned(), mapping)),
                            None => control.is_newer = true,
                        }
                    }
                }
            }
        }
        control
    }
}
