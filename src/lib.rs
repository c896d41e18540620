//! A cache in front of what is slow to load, in which nothing stays wrong: misses are loaded once in the whole fleet, values
//! that were read before a change are refused after it, and a cache that is down costs no answer.
//!
//! Redis, Valkey or the process's own memory; behind it a closure of yours, or a database's tables and statements.
//!
//! # Your own loader
//!
//! ```
//! # #[tokio::main(flavor = "current_thread")] async fn main() -> cache_aside::Result<()> {
//! # use std::{collections::HashMap, io, time::Duration};
//! # #[derive(Clone, PartialEq, Debug, serde::Serialize, serde::Deserialize)] struct User { name: String }
//! # #[derive(Clone)] struct Db;
//! # impl Db {
//! #     async fn users(&self, ids: &[u64]) -> io::Result<HashMap<u64, User>> {
//! #         Ok(ids.iter().filter(|id| **id < 10).map(|id| (*id, User { name: format!("user {id}") })).collect())
//! #     }
//! #     async fn rename(&self, _: u64, _: &str) -> cache_aside::Result<()> { Ok(()) }
//! # }
//! # let db = Db;
//! use cache_aside::CacheAside;
//!
//! let cache = CacheAside::builder().url("memory:").key_prefix("shop:").build().await?; // or redis://…
//! let users = cache.entries::<u64, User>("users").ttl(Duration::from_secs(10)).loader({
//!     let db = db.clone();
//!     move |ids| { let db = db.clone(); async move { db.users(&ids).await } } // a map of what there is
//! });
//!
//! let one: Option<User> = users.get(&7).await?;                        // one load per key, however many ask
//! let many: Vec<Option<User>> = users.get_many(&[7, 8, 900]).await?;   // one round trip, one load for the missing
//! db.rename(7, "Ada").await?;
//! users.invalidate(&7).await?;                                         // before you answer your own write
//! # assert_eq!((one.unwrap().name.as_str(), many[1].as_ref().unwrap().name.as_str(), &many[2]), ("user 7", "user 8", &None));
//! # cache.close().await }
//! ```
//!
//! Start at [`CacheAside`] and [`Entries`]. Keys and values are whatever serde can write and read.
//!
//! # A database
//!
//! With the feature `postgres`, `mysql` or `sqlite`, [`Database`](https://docs.rs/cache-aside/latest/cache_aside/struct.Database.html)
//! serves declared tables, lists and statements without HTTP: reads by key, batches, lists by a column, any SELECT; writes
//! that are out of the cache before they return; and changes by other programs, which it learns from the database itself.
//!
//! # What is promised
//!
//! | | own loaders | a database with `invalidation.mode` outbox or wal |
//! | --- | --- | --- |
//! | a cold key is loaded | once in all processes that share the cache | the same |
//! | after `invalidate`, or a write through it, returned | no read in any process gets older values | the same, of all that the write changed |
//! | a load that began before a change | is never stored after its invalidation, however late it comes | the same |
//! | a change that nobody tells of, or whose teller crashed | is seen when the TTL ends | within `max_staleness` (1 s), or the hit is marked |
//! | the loader or database fails | values past their TTL for `stale_if_error`, never invalidated ones | the same |
//! | the cache is down, hung or full | reads are loaded, still one at a time per key and process | the same |
//!
//! Nothing is promised across keys. With `memory:` each process is a cache of its own. A loader must read anew each time it
//! is called, and from a primary: what a lagging replica says after an invalidation is stored. More in
//! [docs/library.md](https://github.com/cache-aside/cache-aside/blob/main/docs/library.md) and
//! [docs/consistency.md](https://github.com/cache-aside/cache-aside/blob/main/docs/consistency.md).
//!
//! # Features
//!
//! | feature | brings | crates |
//! | --- | --- | --- |
//! | (none) | the cache in memory, own loaders, metrics | 52 |
//! | `redis` | `redis://`, `rediss://`, `valkey://`, `redis+sentinel://`, `redis+cluster://` | 109 |
//! | `memcached` | `memcached://` | 65 |
//! | `postgres` | [`Database`](https://docs.rs/cache-aside/latest/cache_aside/struct.Database.html) over PostgreSQL | 118 |
//! | `mysql` | the same over MySQL and MariaDB | 165 |
//! | `sqlite` | the same over SQLite, which is compiled in | 77 |
//! | `config` | configuration files: YAML, the environment, the JSON Schema | 61 |
//! | `server` (default) | the service and its binary, with all of the above | 282 |
//!
//! A program that embeds the cache says `default-features = false`:
//!
//! ```toml
//! cache-aside = { version = "0.1", default-features = false, features = ["redis"] }
//! ```
//!
//! `examples/` has users with ULIDs, sessions, a product catalogue, cached SQL and a loader for anything.
//!
//! # The rooms
//!
//! A read's journey, in the service as in the library:
//!
//! 1. a door (`http`, or the types on this page) makes a [`catalog::Target`] of a key, or refuses it
//! 2. [`aside`] asks the [`cache`]: a hit is answered with the bytes as they are
//! 3. a miss opens a flight, which whoever asks next will board
//! 4. the flight takes a lease: a fresh random fence, in the cache
//! 5. it loads from the [`store`]: a database's own JSON, or a loader's values
//! 6. it fills: accepted if the fence is still there, else refused and counted
//! 7. all who boarded in time are answered
//!
//! A write goes to the [`store`] and then, before its answer, takes all that it changed out of the [`cache`].
//! [`invalidation`] brings other writers' changes, and says in the cache how far that got: a hit counts only as long as that
//! is recent. `app` puts the rooms together from a [`config`]; `cli` is what `main` runs.

#![cfg_attr(docsrs, feature(doc_cfg))]

mod library;

pub use library::{Builder, CacheAside, Entries, EntriesBuilder, Error, Fetched, Found, Result};
#[cfg(feature = "store")]
pub use library::{Database, Query, Saved, Table};

pub use aside::{Forward, Source, Status};
pub use cache::{CacheError, Inspection};
#[cfg(feature = "store")]
pub use catalog::Param;
pub use prometheus;
pub use telemetry::Metrics;

#[cfg(feature = "server")]
#[doc(hidden)]
pub mod cli;

#[doc(hidden)]
pub mod app;
#[cfg(feature = "server")]
#[doc(hidden)]
pub mod http;
#[cfg(feature = "store")]
#[doc(hidden)]
pub mod served;

pub mod catalog;

pub mod aside;
pub mod invalidation;

pub mod cache;
pub mod store;

pub mod config;
#[cfg(feature = "server")]
#[doc(hidden)]
pub mod demo;
pub mod shield;
pub mod telemetry;
