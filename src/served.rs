//! What is served, and how it is: the heart over a database, the catalog, and what its watches see. The HTTP API and the
//! library's [`Database`](crate::Database) are two doors to it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use arc_swap::ArcSwap;
use tokio::sync::Notify;

use crate::aside::Aside;
use crate::cache::AnyCache;
use crate::catalog::Catalog;
#[cfg(feature = "rounds")]
use crate::invalidation::Troubles;
use crate::store::AnyStore;
use crate::telemetry::Throttle;

/// Clones share everything.
#[derive(Clone, Debug)]
pub struct Served {
    /// Reads and writes.
    pub aside: Aside<AnyCache, AnyStore>,
    /// What is served.
    pub catalog: Arc<ArcSwap<Catalog>>,
    /// How it is.
    pub health: Arc<Health>,
}

/// How the service is, as its watches see it.
#[derive(Debug)]
pub struct Health {
    /// The database's last answer; the error is in words.
    pub database: ArcSwap<Result<(), String>>,
    /// Why the cache can't be kept current, where it can't.
    #[cfg(feature = "rounds")]
    pub rounds: Arc<Troubles>,
    /// Which filters of existing keys don't answer or can't be built anew, and why, by resource.
    pub filters: ArcSwap<BTreeMap<String, String>>,
    /// It reads what is hot at others first: no requests yet, please.
    pub starting: AtomicBool,
    /// SIGTERM came: no new requests, please.
    pub draining: AtomicBool,
    /// Rings when a table was not as the catalog knows it.
    pub look_again: Notify,
    /// Rings when the catalog was looked at.
    pub looked: Notify,
    /// Requests fail by the thousand where one does.
    pub warnings: Throttle,
}

impl Default for Health {
    fn default() -> Self {
        Self {
            database: ArcSwap::from_pointee(Err("not asked yet".into())),
            #[cfg(feature = "rounds")]
            rounds: Arc::default(),
            filters: ArcSwap::default(),
            starting: AtomicBool::new(false),
            draining: AtomicBool::new(false),
            look_again: Notify::new(),
            looked: Notify::new(),
            warnings: Throttle::default(),
        }
    }
}
