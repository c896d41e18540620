//! A cache between applications and their database: declare tables, get an HTTP API whose reads come from Redis, whose
//! misses are filled once, and whose stale fills are refused.
//!
//! A read's journey:
//!
//! 1. [`http`] splits the path; [`catalog`] parses the key by its column's type, or refuses it
//! 2. [`aside`] asks the [`cache`]: a hit is answered with the bytes as they are
//! 3. a miss opens a flight, which whoever asks next will board
//! 4. the flight takes a lease: a fresh random fence, in the cache
//! 5. it loads from the [`store`], as JSON that the database itself wrote
//! 6. it fills: accepted if the fence is still there, else refused and counted
//! 7. all who boarded in time are answered
//!
//! A write goes to the [`store`] and then, before its answer, takes all that it changed out of the [`cache`].
//! [`invalidation`] brings other writers' changes, and says in the cache how far that got: a hit counts only as long as that
//! is recent.
//! [`app`] puts the rooms together from a [`config`]; [`cli`] is what `main` runs.

mod library;

pub use library::{Builder, CacheAside, Entries, EntriesBuilder, Error, Fetched, Found, Result};
#[cfg(feature = "store")]
pub use library::{Database, Query, Saved, Table};
pub use prometheus;

#[cfg(feature = "server")]
pub mod cli;

pub mod app;
#[cfg(feature = "server")]
pub mod http;

pub mod catalog;

#[cfg(feature = "store")]
pub mod served;

pub mod aside;
pub mod invalidation;

pub mod cache;
pub mod store;

pub mod config;
#[cfg(feature = "server")]
pub mod demo;
pub mod telemetry;
