//! One thing that can be read and cached: a row or a list, with the cache key it lives under.

use std::sync::Arc;

use super::{Capture, Key, Param, Policy, Resource};
use crate::cache::Place;

/// What a [`Target`] names.
#[derive(Clone, Debug, PartialEq)]
pub enum What {
    /// One row, by its key.
    Row(Key),
    /// The rows with one value in the column of a declared list.
    List {
        /// Position in [`Resource::lists`].
        index: usize,
        /// The canonical value.
        value: String,
    },
    /// What a statement gives for these parameters.
    Result(Vec<Param>),
}

/// A row or list of a resource. Its cache key is spelled once, when the request is parsed.
#[derive(Clone, Debug, PartialEq)]
pub struct Target {
    resource: Arc<Resource>,
    entry: String,
    what: What,
}

impl Target {
    pub(super) fn new(resource: Arc<Resource>, entry: String, what: What) -> Self {
        Self { resource, entry, what }
    }

    /// The resource it belongs to.
    #[must_use]
    pub fn resource(&self) -> &Arc<Resource> {
        &self.resource
    }

    /// The cache key.
    #[must_use]
    pub fn entry(&self) -> &str {
        &self.entry
    }

    /// What it names.
    #[must_use]
    pub fn what(&self) -> &What {
        &self.what
    }

    /// How long its entry lives.
    #[must_use]
    pub fn policy(&self) -> &Policy {
        match &self.what {
            What::Row(_) | What::Result(_) => &self.resource.policy,
            What::List { index, .. } => &self.resource.lists[*index].policy,
        }
    }

    /// Whether the cache may hold it at all. A list over a column whose equal values have several texts
    /// could not be found again by a change to one of its rows.
    #[must_use]
    pub fn cacheable(&self) -> bool {
        if self.resource.capture == Capture::Lacking {
            return false;
        }
        match &self.what {
            What::Row(_) | What::Result(_) => true,
            What::List { index, .. } => self.resource.table.columns[self.resource.lists[*index].column].exact,
        }
    }

    /// Whether "not found" may be cached under this key.
    #[must_use]
    pub fn negative_cacheable(&self) -> bool {
        !self.policy().negative_ttl.is_zero() && self.resource.exact_key()
    }

    /// Where its entry is kept.
    #[must_use]
    pub fn place(&self) -> Place<'_> {
        let groups = match &self.what {
            What::Row(_) | What::Result(_) => &self.resource.groups,
            What::List { .. } => &self.resource.list_groups,
        };
        Place {
            key: &self.entry,
            resource: &self.resource.name,
            shape: self.resource.shape,
            groups,
            local_ttl: self.policy().local_ttl,
            refreshes: 0,
            strict: self.resource.hold,
        }
    }
}
