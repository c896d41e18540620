//! A closure where a database stands: for programs that bring their own way to load what is missing.
//!
//! It knows texts and bytes alone; the library makes them of its callers' types. A loader's panic ends here, as an error
//! for those who waited for that load.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;

use super::{Batch, Load, LoaderError, Row, Rows, StoreError, Waiters};
use crate::catalog::{Key, Param, Resource};

/// The values of some keys, in their order.
type Loading = BoxFuture<'static, Result<Vec<Option<Bytes>>, LoaderError>>;

/// Loads values by their keys.
#[derive(Clone)]
pub struct Loader {
    load: Arc<dyn Fn(Vec<String>) -> Loading + Send + Sync>,
    timeout: Duration,
}

/// What a loader can do wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// It panicked.
    #[error("it panicked")]
    Panicked,
    /// It gave more or fewer values than it was asked for.
    #[error("it gave {came} values for {asked} keys")]
    Count {
        /// Keys.
        asked: usize,
        /// Values.
        came: usize,
    },
}

impl Loader {
    /// Loads with `load`, for `timeout` at most.
    pub fn new(load: impl Fn(Vec<String>) -> Loading + Send + Sync + 'static, timeout: Duration) -> Self {
        Self { load: Arc::new(load), timeout }
    }
}

impl std::fmt::Debug for Loader {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("Loader").field("timeout", &self.timeout).finish_non_exhaustive()
    }
}

impl From<Fault> for StoreError {
    fn from(fault: Fault) -> Self {
        Self::Loader(LoaderError(Arc::new(fault)))
    }
}

impl Load for Loader {
    async fn rows(&self, _: &Resource, keys: &[&Key], _: &Waiters) -> Result<Batch, StoreError> {
        let texts: Vec<String> = keys.iter().map(ToString::to_string).collect();
        // The call itself may panic too, before there is a future.
        let load = AssertUnwindSafe(async { (self.load)(texts).await }).catch_unwind();
        let loaded = tokio::time::timeout(self.timeout, load).await.map_err(|_| StoreError::TimedOut)?;
        let values = loaded.map_err(|_| Fault::Panicked)?.map_err(StoreError::Loader)?;
        if values.len() != keys.len() {
            return Err(Fault::Count { asked: keys.len(), came: values.len() }.into());
        }
        let row = |json| Row { json, spelled_as_asked: true };
        Ok(Batch { rows: values.into_iter().map(|value| value.map(row)).collect(), origin: 0 })
    }

    async fn list(&self, _: &Resource, _: usize, _: &str, _: &Waiters) -> Result<Rows, StoreError> {
        Err(StoreError::BadStatement("a loader has no lists".into()))
    }

    async fn query(&self, _: &Resource, _: &[Param], _: &Waiters) -> Result<Rows, StoreError> {
        Err(StoreError::BadStatement("a loader runs no statements".into()))
    }

    /// Its queue, if there is one, is the program's.
    fn is_pressed(&self) -> bool {
        false
    }
}
