//! One write: to the store, and then, before anybody is told, out of the cache.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures_util::FutureExt;

use super::{Aside, Core};
use crate::cache::Cache;
use crate::cache::entry::Fence;
use crate::catalog::{Key, Resource};
use crate::invalidation::{Plan, plan};
use crate::store::{LastWord, Store, StoreError, Waiters, Write, WriteError, Written};

/// Keys that one command drops.
const CHUNK: usize = 1_000;

/// What a write holds.
#[derive(Default)]
struct Hold {
    owner: Option<Fence>,
    keys: Vec<String>,
}

/// A write that was committed.
#[derive(Clone, Debug, PartialEq)]
pub struct Wrote {
    /// What it did.
    pub written: Written,
    /// The cache could not be told yet; it will be before this process reads from it again.
    pub invalidation_pending: bool,
}

impl<C: Cache + Clone + 'static, S: Store + 'static> Aside<C, S> {
    /// Writes, and invalidates the row and the lists it was or is in. Once begun, it ends whether or not anybody waits:
    /// a client that hangs up between the commit and the invalidation must leave nothing stale behind. What waits for a
    /// connection when nobody waits for it any more is not begun.
    ///
    /// # Errors
    ///
    /// [`WriteError`]; a cache that can't be reached is none.
    pub async fn write(&self, resource: &Arc<Resource>, write: Write) -> Result<Wrote, WriteError> {
        self.write_holding(resource, write, ()).await
    }

    /// The same; what is `held` is dropped when the write has ended, whoever has left by then.
    pub(crate) async fn write_holding(
        &self,
        resource: &Arc<Resource>,
        write: Write,
        held: impl Send + 'static,
    ) -> Result<Wrote, WriteError> {
        let (core, resource) = (Arc::clone(&self.core), Arc::clone(resource));
        let waiters = Waiters::default();
        let _leaving = waiters.until_dropped();
        let work = async move {
            let _held = held;
            core.write(&resource, write, &waiters).await
        };
        let task = self.core.writes.run(&self.core.runtime, work);
        match task.await {
            Ok(outcome) => outcome,
            Err(ended) => {
                tracing::error!(error = %ended, "a write ended unexpectedly");
                self.core.metrics.error("aside", "panic");
                Err(StoreError::Unavailable("the write ended unexpectedly".into()).into())
            }
        }
    }
}

impl<C: Cache + Clone + 'static, S: Store + 'static> Core<C, S> {
    async fn write(
        self: &Arc<Self>,
        resource: &Arc<Resource>,
        write: Write,
        waiters: &Waiters,
    ) -> Result<Wrote, WriteError> {
        let (operation, asked) = match &write {
            Write::Create { .. } => ("create", None),
            Write::Replace { key, .. } => ("replace", Some(key.clone())),
            Write::Merge { key, .. } => ("merge", Some(key.clone())),
            Write::Delete { key, .. } => ("delete", Some(key.clone())),
        };
        let held = Arc::new(Mutex::new(Hold::default()));
        let last = self.last_word(resource, asked.clone(), &held)?;
        self.guard.admit().inspect_err(|_| self.metrics.error("store", "not_asked"))?;
        let started = Instant::now();
        let outcome = self.store.write(resource, write, &last, waiters).await;
        self.metrics.store_query(&resource.name, operation, started.elapsed());
        match &outcome {
            Ok(_) => self.guard.learn(None),
            Err(WriteError::Store(error)) => self.guard.learn(Some(error)),
            Err(_) => {}
        }
        let hold = std::mem::take(&mut *held.lock().unwrap_or_else(PoisonError::into_inner));
        match outcome {
            Ok(written) => {
                let invalidation_pending = !self.forget(resource, asked, &written, hold.owner).await;
                self.audit_write(&resource.row_of(written.key.clone()));
                Ok(Wrote { written, invalidation_pending })
            }
            // Whatever it holds only time gives up: nobody knows when the change will be visible.
            Err(WriteError::Unknown(written)) => {
                self.metrics.error("store", "commit_unknown");
                self.forget(resource, asked.clone(), &written, None).await;
                self.forget_again(resource, asked, &written);
                Err(WriteError::Unknown(written))
            }
            Err(refused) => {
                if let WriteError::Store(error) = &refused {
                    self.metrics.error("store", error.kind());
                }
                if let Some(owner) = hold.owner {
                    let keys: Vec<&str> = hold.keys.iter().map(String::as_str).collect();
                    // Where it fails, the hold ends by itself.
                    let given_up = self.cache.invalidate_unless_held(&keys, Some(owner));
                    let _ = self.asked("release", given_up).await;
                }
                Err(refused)
            }
        }
    }

    /// Holds what a write is about to change, where that was declared: between its commit and the invalidation no reader
    /// finds the old row here, and none fills it.
    fn last_word(
        self: &Arc<Self>,
        resource: &Arc<Resource>,
        asked: Option<Key>,
        held: &Arc<Mutex<Hold>>,
    ) -> Result<LastWord, WriteError> {
        if !resource.hold && !self.mappings.load().iter().any(|mapping| mapping.hold) {
            return Ok(LastWord::default());
        }
        let no_randomness = |error: getrandom::Error| StoreError::Unavailable(error.to_string());
        let owner = Fence::new().map_err(no_randomness)?;
        let (core, resource, held) = (Arc::clone(self), Arc::clone(resource), Arc::clone(held));
        Ok(LastWord::new(move |written| {
            let (core, held) = (Arc::clone(&core), Arc::clone(&held));
            let plan = core.touched(&resource, asked.clone(), &written);
            async move {
                let keys: Vec<String> = plan.keys(true).cloned().collect();
                if keys.is_empty() {
                    return true;
                }
                let names: Vec<&str> = keys.iter().map(String::as_str).collect();
                let taken = core.asked("hold", core.cache.hold(&names, owner, core.limits.hold)).await.is_ok();
                if taken {
                    // One that was not answered may arrive late, in place of another writer's: only time may end it.
                    *held.lock().unwrap_or_else(PoisonError::into_inner) = Hold { owner: Some(owner), keys };
                }
                taken
            }
            .boxed()
        }))
    }

    /// What a write has changed.
    fn touched(&self, resource: &Arc<Resource>, asked: Option<Key>, written: &Written) -> Plan {
        let mut targets = vec![resource.row_of(written.key.clone())];
        targets.extend(asked.filter(|key| *key != written.key).map(|key| resource.row_of(key)));
        targets.extend(written.lists.iter().map(|(index, value)| resource.list_of(*index, value.clone())));
        let mappings = self.mappings.load();
        let mut plan = plan(mappings.iter(), &written.changes);
        // Where nothing tells of changes, what depends on the table is known all the same.
        let relation = resource.table.relation();
        for mapping in mappings.iter().filter(|mapping| mapping.relation == relation) {
            if let Some(group) = mapping.group() {
                plan.drop.entry(mapping.resource.clone()).or_default().insert(group.to_owned());
            }
        }
        if resource.hold {
            plan.held.insert(resource.name.to_string());
        }
        let own = plan.drop.entry(resource.name.to_string()).or_default();
        own.extend(targets.iter().map(|target| target.entry().to_owned()));
        plan
    }

    /// A commit without an answer may become visible after its invalidation (it waits for a standby, say), and be read
    /// too early by a fill in between: so the invalidation is repeated for a while.
    fn forget_again(self: &Arc<Self>, resource: &Arc<Resource>, asked: Option<Key>, written: &Written) {
        let (core, resource, written) = (Arc::clone(self), Arc::clone(resource), written.clone());
        self.runtime.spawn(async move {
            for pause in [1, 4, 25] {
                tokio::time::sleep(Duration::from_secs(pause)).await;
                core.forget(&resource, asked.clone(), &written, None).await;
            }
        });
    }

    /// Invalidates what a write touched; whether the cache took all of it, and it is known what that was.
    /// `owner`: who holds what is held.
    async fn forget(
        &self,
        resource: &Arc<Resource>,
        asked: Option<Key>,
        written: &Written,
        owner: Option<Fence>,
    ) -> bool {
        let plan = self.touched(resource, asked, written);
        let mut told = !written.incomplete;
        for (name, keys) in plan.drop {
            self.metrics.resource(&name).invalidated_by_write(keys.len() as u64);
            let keys: Vec<&str> = keys.iter().map(String::as_str).collect();
            for some in keys.chunks(CHUNK) {
                let taken = if plan.held.contains(&name) {
                    self.asked("invalidate", self.cache.invalidate_unless_held(some, owner)).await
                } else {
                    self.asked("invalidate", self.cache.invalidate(some)).await
                };
                told &= taken.is_ok();
            }
        }
        for name in plan.renew {
            // Other replicas learn of a new generation at their next look: until then they may answer with what was.
            told = false;
            self.metrics.resource(&name).invalidated_by_write(1);
            // Where it fails, the next round does it.
            let _ = self.asked("purge", self.cache.purge(&name)).await;
        }
        told
    }
}
