//! Everything that is declared, and how far each part of it can be served now.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::{Capture, Mapping, Problem, Resource};
use crate::config::{Config, nearest};

/// The state of one declared resource.
#[derive(Clone, Debug)]
pub enum State {
    /// It fits the database; problems that don't keep it from being served come along.
    Ready(Arc<Resource>, Vec<Problem>),
    /// It can't be served, for these reasons.
    Waiting(Vec<Problem>),
}

/// What people call it.
#[must_use]
pub fn called(name: &str) -> String {
    name.strip_prefix("query:").map_or_else(|| format!("resource {name}"), |name| format!("query {name}"))
}

/// All declared resources by name. Replaced as a whole when it is looked at anew.
#[derive(Clone, Debug, Default)]
pub struct Catalog {
    /// The resources.
    pub resources: BTreeMap<String, State>,
    /// The declared statements, each as a resource of its results; named `query:NAME`.
    pub queries: BTreeMap<String, State>,
}

impl Catalog {
    /// A catalog in which nothing was looked at yet.
    #[must_use]
    pub fn unseen(config: &Config) -> Self {
        let waiting = |name: &String| (name.clone(), State::Waiting(vec![Problem::fatal("not looked at yet")]));
        Self {
            resources: config.resources.keys().map(waiting).collect(),
            queries: config.queries.keys().map(|name| waiting(&format!("query:{name}"))).collect(),
        }
    }

    /// Resources and statements.
    pub fn all(&self) -> impl Iterator<Item = (&String, &State)> {
        self.resources.iter().chain(&self.queries)
    }

    /// Whether everything that is declared can be served; nothing at all is not ready.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.all().next().is_some() && self.all().all(|(_, state)| matches!(state, State::Ready(..)))
    }

    /// Whether changes are seen wherever they should be.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.all().all(|(_, state)| matches!(state, State::Ready(resource, _) if resource.capture != Capture::Lacking))
    }

    /// Which changes concern what is served.
    #[must_use]
    pub fn mappings(&self) -> Vec<Mapping> {
        let ready = self.all().filter_map(|(_, state)| match state {
            State::Ready(resource, _) => Some(resource.mappings()),
            State::Waiting(_) => None,
        });
        ready.flatten().collect()
    }

    /// The name closest to one that is not there.
    #[must_use]
    pub fn nearest(&self, name: &str) -> Option<&str> {
        nearest(name, self.resources.keys().map(String::as_str))
    }
}
