//! From changes to what is dropped.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use crate::catalog::{Effect, Mapping};
use crate::store::Change;

/// Past so many entries of one resource, it gets a new generation instead.
const MOST: usize = 10_000;

/// What some changes invalidate, by resource.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Cache keys to drop.
    pub drop: BTreeMap<String, BTreeSet<String>>,
    /// Resources whose entries writers may hold.
    pub held: BTreeSet<String>,
    /// Resources of which anything may have changed.
    pub renew: BTreeSet<String>,
}

impl Plan {
    /// The cache keys of resources whose entries writers hold, or don't.
    pub fn keys(&self, held: bool) -> impl Iterator<Item = &String> {
        self.drop.iter().filter(move |(resource, _)| self.held.contains(*resource) == held).flat_map(|(_, keys)| keys)
    }
}

/// What these changes invalidate, for everybody whose mappings these are.
#[must_use]
pub fn plan<'a>(mappings: impl Iterator<Item = &'a Mapping>, changes: &[Change]) -> Plan {
    let mut plan = Plan::default();
    if changes.is_empty() {
        return plan;
    }
    let mut by_relation: HashMap<&str, Vec<&Mapping>> = HashMap::new();
    let all: Vec<&Mapping> = mappings.collect();
    for mapping in &all {
        by_relation.entry(&mapping.relation).or_default().push(mapping);
    }
    for change in changes {
        // What a person has dropped is about no table.
        let announced = change.image.as_ref().filter(|_| change.relation.is_empty());
        let concerned = if announced.is_some() { Some(&all) } else { by_relation.get(change.relation.as_str()) };
        for mapping in concerned.into_iter().flatten() {
            let effect = match announced {
                Some(announced) => mapping.told(announced),
                None => Some(mapping.effect(change.image.as_ref())),
            };
            let Some(effect) = effect else { continue };
            if plan.renew.contains(&mapping.resource) {
                continue;
            }
            if mapping.hold {
                plan.held.insert(mapping.resource.clone());
            }
            let keys = plan.drop.entry(mapping.resource.clone()).or_default();
            match effect {
                Effect::Drop(more) => keys.extend(more),
                Effect::Everything => {
                    plan.renew.insert(mapping.resource.clone());
                }
            }
            if keys.len() > MOST {
                plan.renew.insert(mapping.resource.clone());
            }
        }
    }
    plan.drop.retain(|resource, keys| !keys.is_empty() && !plan.renew.contains(resource));
    plan
}
