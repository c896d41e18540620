//! One flight per key and process: whoever asks for a key that is being loaded waits for that load.
//!
//! Not everybody may share what a flight brings. A reply tells how things were when its command was executed, so it is good
//! only for those who asked before the command was *sent*: somebody who asks after a write was acknowledged must
//! not get the row from before. A flight therefore counts its steps (it advances before every command whose
//! reply might be shared), passengers note the step at which they came, and a landing says which steps it covers.
//! Those who came later start again; there is never more than one flight and one set of waiters for the next.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use xxhash_rust::xxh3::xxh3_64;

use super::answer::{Forward, Source};
use crate::cache::entry::Entry;
use crate::store::StoreError;

const SHARDS: usize = 64;

/// The flights of a process.
#[derive(Debug)]
pub(super) struct Flights {
    shards: Arc<Shards>,
}

#[derive(Debug)]
struct Shards {
    /// Open flights: hits look no further where there are none.
    open: AtomicUsize,
    all: [Mutex<HashMap<String, Flight>>; SHARDS],
}

impl Default for Flights {
    fn default() -> Self {
        Self { shards: Arc::new(Shards { open: AtomicUsize::new(0), all: std::array::from_fn(|_| Mutex::default()) }) }
    }
}

#[derive(Clone, Debug)]
struct Flight {
    step: Arc<AtomicU32>,
    /// Only passengers hold the other end: so it is known when all of them have left.
    landing: watch::Sender<Option<Landing>>,
}

impl Flight {
    fn board(&self) -> Passenger {
        Passenger { step: self.step.load(Ordering::SeqCst), landing: self.landing.subscribe() }
    }
}

/// What a flight brought.
#[derive(Clone, Debug)]
pub(super) struct Landing {
    /// The entry and how it was got.
    pub(super) result: Result<Landed, StoreError>,
    /// Passengers who came before this step may have it.
    pub(super) covers: u32,
    /// Time spent with the cache and the database.
    pub(super) cache: Duration,
    pub(super) database: Duration,
}

#[derive(Clone, Debug)]
pub(super) struct Landed {
    pub(super) entry: Entry,
    pub(super) source: Source,
    /// `None`: it turned out to be a hit. Otherwise why it was forwarded.
    pub(super) forward: Option<Forward>,
    pub(super) stored: bool,
    /// Another process loaded it.
    pub(super) collapsed: bool,
}

/// A place in a flight, or at its controls.
pub(super) enum Boarded {
    /// There was none: the caller must fly it.
    Pilot(Pilot, Passenger),
    /// There was one.
    Passenger(Passenger),
}

/// Whoever waits for a flight.
pub(super) struct Passenger {
    step: u32,
    landing: watch::Receiver<Option<Landing>>,
}

/// How a flight ended for one passenger.
pub(super) enum Arrived {
    /// With something this passenger may have.
    Covered(Landing),
    /// With something that may be older than this passenger's question: ask again. `cached`: it was in the cache then.
    TooEarly { cached: bool },
    /// Without a landing: its pilot is gone. Ask again; nobody inherits a panic.
    Lost,
}

impl Passenger {
    pub(super) async fn arrive(&mut self) -> Arrived {
        // The senders are dropped after one of them sent, or without having sent.
        let Ok(landing) = self.landing.wait_for(Option::is_some).await else { return Arrived::Lost };
        match landing.as_ref() {
            Some(landing) if self.step < landing.covers => Arrived::Covered(landing.clone()),
            Some(landing) => {
                let cached = |landed: &Landed| landed.stored || landed.source == Source::Cache;
                Arrived::TooEarly { cached: landing.result.as_ref().is_ok_and(cached) }
            }
            None => Arrived::Lost,
        }
    }
}

/// The right and duty to land a flight.
pub(super) struct Pilot {
    key: String,
    step: Arc<AtomicU32>,
    landing: watch::Sender<Option<Landing>>,
    shards: Arc<Shards>,
}

impl Flights {
    /// Joins the key's flight, if there is one.
    pub(super) fn board_if_open(&self, key: &str) -> Option<Passenger> {
        // Whoever misses one that has just been opened finds it later.
        if self.shards.open.load(Ordering::Relaxed) == 0 {
            return None;
        }
        shard(&self.shards, key).get(key).map(Flight::board)
    }

    /// Joins the key's flight, or opens one.
    pub(super) fn board(&self, key: &str) -> Boarded {
        let mut shard = shard(&self.shards, key);
        if let Some(flight) = shard.get(key) {
            return Boarded::Passenger(flight.board());
        }
        self.shards.open.fetch_add(1, Ordering::Relaxed);
        let (sender, receiver) = watch::channel(None);
        let step = Arc::new(AtomicU32::new(0));
        shard.insert(key.to_owned(), Flight { step: Arc::clone(&step), landing: sender.clone() });
        let pilot = Pilot { key: key.to_owned(), step, landing: sender, shards: Arc::clone(&self.shards) };
        Boarded::Pilot(pilot, Passenger { step: 0, landing: receiver })
    }
}

impl Pilot {
    /// Called before a command is sent whose reply may be shared; the answer is what its landing covers.
    pub(super) fn advance(&self) -> u32 {
        self.step.fetch_add(1, Ordering::SeqCst) + 1
    }

    /// Ends the flight. Whoever boards from now on opens another.
    pub(super) fn land(self, landing: Landing) {
        self.close();
        self.landing.send_replace(Some(landing));
    }

    /// Resolves when nobody is on board any more: all have hung up, or their time is over. Somebody may board just then; a
    /// pilot who leaves without landing makes him ask again.
    pub(super) async fn deserted(&self) {
        self.landing.closed().await;
    }

    /// Whether anybody is on board.
    pub(super) fn is_deserted(&self) -> bool {
        self.landing.is_closed()
    }

    fn close(&self) {
        let mut shard = shard(&self.shards, &self.key);
        // After a landing, the key may belong to the next flight already.
        if shard.get(&self.key).is_some_and(|flight| Arc::ptr_eq(&flight.step, &self.step)) {
            shard.remove(&self.key);
            self.shards.open.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

impl Drop for Pilot {
    fn drop(&mut self) {
        self.close();
    }
}

fn shard<'a>(shards: &'a Shards, key: &str) -> MutexGuard<'a, HashMap<String, Flight>> {
    let index = usize::try_from(xxh3_64(key.as_bytes()) % SHARDS as u64).unwrap_or(0);
    shards.all[index].lock().unwrap_or_else(PoisonError::into_inner)
}
