//! The heart on paused time, with a store that does as it is told: the moments that no real database can be made to hit.

mod down;
mod late;
mod lost;
mod refresh;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep};

use super::{Answer, Aside, Ask, Forward, Limits, ReadError, Source};
use crate::cache::memory::MemoryCache;
use crate::cache::{Cache, Lookup};
use crate::catalog::{self, Column, Image, Key, Kind, Param, Problem, Resource, Table, TableName, Target, What};
use crate::config::{self, Defaults};
use crate::store::{
    Batch, Captured, LastWord, Load, Page, Row, Rows, Store, StoreError, Waiters, Wanted, Write, WriteError, Written,
};
use crate::telemetry::Metrics;

/// What the next load does; each takes a second.
#[derive(Clone, Copy)]
enum Turn {
    /// Reads the value as it is when the load begins.
    Value,
    Absent,
    Panic,
    Down,
    Exhausted,
    /// A minute, and then the value.
    Hang,
}

#[derive(Clone, Default)]
struct Script {
    value: Arc<AtomicU32>,
    loads: Arc<AtomicU32>,
    turns: Arc<Mutex<Vec<Turn>>>,
    /// Its connections, where there are only so many.
    room: Option<Arc<Semaphore>>,
    /// Readers wait for one.
    pressed: Arc<AtomicBool>,
}

impl Load for Script {
    async fn rows(&self, _: &Resource, keys: &[&Key], waiters: &Waiters) -> Result<Batch, StoreError> {
        let _permit = match &self.room {
            Some(room) => Some(waiters.or(async { room.acquire().await.map_err(|_| StoreError::Busy) }).await?),
            None => None,
        };
        self.loads.fetch_add(1, Ordering::SeqCst);
        let value = self.value.load(Ordering::SeqCst);
        let turn = self.turns.lock().unwrap().pop().unwrap_or(Turn::Value);
        let takes = if let Turn::Hang = turn { 60 } else { 1 };
        sleep(Duration::from_secs(takes)).await;
        match turn {
            Turn::Value | Turn::Hang => {
                let json = Bytes::from(value.to_string());
                Ok(Batch { rows: vec![Some(Row { json, spelled_as_asked: true }); keys.len()], origin: 0 })
            }
            Turn::Absent => Ok(Batch { rows: vec![None; keys.len()], origin: 0 }),
            // Not by the hook: where that prints a backtrace it takes longer than a lock lasts.
            Turn::Panic => std::panic::resume_unwind(Box::new("as the script says")),
            Turn::Down => Err(StoreError::Unavailable("as the script says".into())),
            Turn::Exhausted => Err(StoreError::Exhausted("as the script says".into())),
        }
    }

    async fn list(&self, _: &Resource, _: usize, _: &str, _: &Waiters) -> Result<Rows, StoreError> {
        Err(StoreError::Busy)
    }

    async fn query(&self, _: &Resource, _: &[Param], _: &Waiters) -> Result<Rows, StoreError> {
        Err(StoreError::Busy)
    }

    fn is_pressed(&self) -> bool {
        self.pressed.load(Ordering::SeqCst)
    }
}

impl Store for Script {
    async fn write(&self, _: &Resource, write: Write, _: &LastWord, _: &Waiters) -> Result<Written, WriteError> {
        let Write::Delete { key, .. } = write else { return Err(WriteError::NotFound) };
        self.value.fetch_add(1, Ordering::SeqCst);
        Ok(Written { row: None, key, lists: Vec::new(), changes: Vec::new(), incomplete: false })
    }

    async fn describe(&self, _: &TableName) -> Result<Option<Table>, StoreError> {
        Ok(None)
    }

    async fn tables(&self) -> Result<Vec<Table>, StoreError> {
        Ok(Vec::new())
    }

    async fn prepare(&self, resource: Resource) -> Result<(Resource, Vec<Problem>), StoreError> {
        Ok((resource, Vec::new()))
    }

    async fn keys(&self, _: &Resource, _: Option<&Key>, _: usize) -> Result<Page, StoreError> {
        Ok(Page::default())
    }

    async fn captured(&self, _: &[Wanted]) -> Result<Vec<Captured>, StoreError> {
        Ok(Vec::new())
    }

    async fn announce(&self, _: &[Image]) -> Result<(), StoreError> {
        Ok(())
    }

    async fn ping(&self) -> Result<(), StoreError> {
        Ok(())
    }
}

struct Heart {
    aside: Aside<MemoryCache, Script>,
    script: Script,
    resource: Arc<Resource>,
}

impl Heart {
    fn new(max_entry: usize) -> Self {
        Self::with(max_entry, &Defaults::default())
    }

    fn with(max_entry: usize, defaults: &Defaults) -> Self {
        Self::over(Script::default(), max_entry, defaults)
    }

    /// With so few connections to the store.
    fn narrow(connections: usize) -> Self {
        let room = Some(Arc::new(Semaphore::new(connections)));
        Self::over(Script { room, ..Script::default() }, 1 << 10, &Defaults::default())
    }

    fn over(script: Script, max_entry: usize, defaults: &Defaults) -> Self {
        let id = Column {
            name: "id".into(),
            type_name: "integer".into(),
            cast: String::new(),
            kind: Kind::Integer { min: 0, max: 1000 },
            exact: true,
            json: false,
            generated: false,
            counted: false,
            nullable: false,
        };
        let (name, columns) = ("item".to_owned(), vec![id]);
        let table =
            Table { schema: None, name, is_view: false, columns, primary_key: vec!["id".into()], unique: vec![] };
        let declared = config::Resource { lists: BTreeMap::new(), ..config::Resource::default() };
        let bound = catalog::bind("item", &declared, defaults, "", table);
        let (resource, _) = bound.expect("it fits");
        let limits = Limits {
            max_entry,
            wait: Duration::from_secs(5),
            hold: Duration::from_secs(5),
            refreshes: 4,
            audit_ratio: 0.0,
            max_staleness: Duration::from_secs(1),
        };
        let metrics = Arc::new(Metrics::new().expect("names are unique"));
        let aside = Aside::new(MemoryCache::new(1 << 20, 1 << 10, None), script.clone(), limits, metrics);
        Self { aside, script, resource: Arc::new(resource) }
    }

    /// The same cache before a store that answers.
    fn another_process(&self) -> Aside<MemoryCache, Script> {
        let (cache, metrics) = (self.aside.cache().clone(), Arc::clone(self.aside.metrics()));
        Aside::new(cache, Script::default(), self.aside.core.limits, metrics)
    }

    fn target(&self, id: u32) -> Target {
        self.resource.row(vec![id.to_string()]).expect("it is a key")
    }

    /// Starts a read and lets it run until it waits.
    async fn begin(&self, id: u32) -> tokio::task::JoinHandle<Result<Answer, ReadError>> {
        let (aside, target) = (self.aside.clone(), self.target(id));
        let read = tokio::spawn(async move { aside.read(&target, ask()).await });
        sleep(Duration::from_millis(300)).await;
        read
    }

    async fn read(&self, id: u32) -> Result<Answer, ReadError> {
        self.aside.read(&self.target(id), ask()).await
    }

    fn then(&self, turns: &[Turn]) {
        *self.script.turns.lock().unwrap() = turns.iter().rev().copied().collect();
    }

    fn loads(&self) -> u32 {
        self.script.loads.load(Ordering::SeqCst)
    }
}

fn ask() -> Ask {
    Ask { refresh: false, only_if_cached: false, deadline: Instant::now() + Duration::from_secs(30) }
}

fn value(outcome: Result<Answer, ReadError>) -> String {
    String::from_utf8(outcome.expect("it is answered").entry.payload.to_vec()).expect("it is text")
}

/// Reads until its next load has begun, and says that nobody waited meanwhile.
async fn refreshed(heart: &Heart) {
    let before = heart.loads();
    while heart.loads() == before {
        let answer = heart.read(1).await.expect("it is answered");
        assert_eq!((answer.status.forward, answer.status.source), (None, Source::Cache));
        sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_reader_that_comes_during_a_load_shares_it_once_it_is_stored() {
    let heart = Heart::new(1 << 10);
    let (first, second) = (heart.begin(1).await, heart.begin(1).await);
    let (first, second) = (first.await.expect("no panic"), second.await.expect("no panic"));
    assert_eq!(heart.loads(), 1);
    let status = second.as_ref().expect("it is answered").status;
    assert_eq!((status.forward, status.source, status.collapsed), (Some(Forward::Miss), Source::Database, true));
    assert_eq!((value(first), value(second)), ("0".into(), "0".into()));
}

#[tokio::test(start_paused = true)]
async fn a_reader_that_comes_after_a_write_never_shares_the_load_from_before_it() {
    let heart = Heart::new(1 << 10);
    let before = heart.begin(1).await;
    let What::Row(key) = heart.target(1).what().clone() else { panic!("it is a row") };
    let write = Write::Delete { key, precondition: None };
    heart.aside.write(&heart.resource, write).await.expect("it is written");
    // The load of the first read is under way still, and its fence is gone.
    let after = heart.begin(1).await;
    assert_eq!(value(before.await.expect("no panic")), "0", "it asked before the write");
    assert_eq!(value(after.await.expect("no panic")), "1", "it asked after the write");
    assert_eq!(heart.loads(), 2);
    assert_eq!(value(heart.read(1).await), "1");
    assert_eq!(heart.loads(), 2, "the second load is in the cache");
}

#[tokio::test(start_paused = true)]
async fn what_is_not_stored_is_shared_only_with_those_who_came_before_the_load() {
    // Nothing fits into one byte but the first value.
    let heart = Heart::new(0);
    let first = heart.begin(1).await;
    let late: Vec<_> = futures_util::future::join_all((0..10).map(|_| heart.begin(1))).await;
    assert_eq!(value(first.await.expect("no panic")), "0");
    for read in late {
        assert_eq!(value(read.await.expect("no panic")), "0");
    }
    assert_eq!(heart.loads(), 2, "those who were late for the first load share the second");
}

#[tokio::test(start_paused = true)]
async fn a_load_that_panics_hurts_nobody_but_is_tried_again() {
    let heart = Heart::new(1 << 10);
    heart.then(&[Turn::Panic]);
    let (first, second) = (heart.begin(1).await, heart.begin(1).await);
    assert_eq!(value(first.await.expect("the reader does not panic")), "0");
    assert_eq!(value(second.await.expect("the reader does not panic")), "0");
    heart.then(&[Turn::Panic; 3]);
    assert_eq!(heart.read(2).await, Err(ReadError::Failed), "but not for ever");
    assert_eq!(value(heart.read(2).await), "0", "and nothing is left behind");
}

#[tokio::test(start_paused = true)]
async fn a_reader_whose_time_is_over_leaves_the_load_to_the_others() {
    let heart = Heart::new(1 << 10);
    let hurried = Ask { deadline: Instant::now() + Duration::from_millis(10), ..ask() };
    assert_eq!(heart.aside.read(&heart.target(1), hurried).await, Err(ReadError::TimedOut));
    assert_eq!(value(heart.read(1).await), "0");
    assert_eq!(heart.loads(), 1, "the first load went on");
}

#[tokio::test(start_paused = true)]
async fn a_batch_and_single_reads_share_loads() {
    let heart = Heart::new(1 << 10);
    let single = heart.begin(2).await;
    let targets: Vec<Target> = [1, 2, 3, 1].into_iter().map(|id| heart.target(id)).collect();
    let batch = heart.aside.read_many(&targets, ask()).await.expect("it is answered");
    assert_eq!(batch.len(), 4);
    assert_eq!(value(single.await.expect("no panic")), "0");
    assert_eq!(heart.loads(), 2, "one for the single read, one for the rest of the batch");
}

#[tokio::test(start_paused = true)]
async fn not_found_is_cached_for_its_own_time() {
    let heart = Heart::new(1 << 10);
    heart.then(&[Turn::Absent]);
    for _ in 0..2 {
        assert!(heart.read(1).await.expect("it is answered").entry.negative);
    }
    assert_eq!(heart.loads(), 1);
    sleep(Duration::from_secs(6)).await;
    assert_eq!(value(heart.read(1).await), "0");
}

#[tokio::test(start_paused = true)]
async fn whoever_joins_a_load_without_a_look_still_finds_what_another_process_stored() {
    let heart = Heart::new(1 << 10);
    let other = heart.another_process();
    heart.then(&[Turn::Hang]);
    let wedged = heart.begin(1).await;
    heart.aside.drop_entry(&heart.target(1)).await.expect("it is dropped");
    other.read(&heart.target(1), ask()).await.expect("it is answered");
    let began = Instant::now();
    let joined = heart.read(1).await.expect("it is answered");
    assert_eq!((joined.status.source, joined.status.forward), (Source::Cache, None));
    assert!(began.elapsed() < Duration::from_secs(1), "no longer than a lock");
    wedged.abort();
}

#[tokio::test(start_paused = true)]
async fn whoever_joins_a_load_that_fails_looks_before_he_fails_too() {
    let heart = Heart::new(1 << 10);
    let other = heart.another_process();
    heart.then(&[Turn::Down; 9]);
    let failing = heart.begin(1).await;
    heart.aside.drop_entry(&heart.target(1)).await.expect("it is dropped");
    let joined = heart.begin(1).await;
    other.read(&heart.target(1), ask()).await.expect("it is answered");
    assert!(joined.await.expect("no panic").is_ok(), "it is in the cache by then");
    drop(failing);
}

#[tokio::test(start_paused = true)]
async fn what_a_load_costs_is_its_own_time_and_not_the_queues() {
    let heart = Heart::narrow(1);
    let (first, second) = (heart.begin(1).await, heart.begin(2).await);
    for read in [first, second] {
        let cost = read.await.expect("no panic").expect("it is answered").entry.cost_us;
        assert!((1_000_000..1_100_000).contains(&cost), "{cost}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_load_that_nobody_waits_for_any_more_leaves_the_queue() {
    let heart = Heart::narrow(1);
    let first = heart.begin(1).await;
    let second = heart.begin(2).await;
    let third = heart.begin(3).await;
    second.abort();
    assert_eq!(value(first.await.expect("no panic")), "0");
    assert_eq!(value(third.await.expect("no panic")), "0");
    assert_eq!(heart.loads(), 2, "nobody waited for the second");
    let lookup = heart.aside.cache().read(heart.target(2).place()).await;
    assert_eq!(lookup, Ok(Lookup::Absent), "its lease was given back");
}

#[tokio::test(start_paused = true)]
async fn a_load_stays_in_the_queue_as_long_as_somebody_waits() {
    let heart = Heart::narrow(1);
    let first = heart.begin(1).await;
    let (leader, passenger) = (heart.begin(2).await, heart.begin(2).await);
    leader.abort();
    assert_eq!(value(first.await.expect("no panic")), "0");
    assert_eq!(value(passenger.await.expect("no panic")), "0");
    assert_eq!(heart.loads(), 2);
}

#[tokio::test(start_paused = true)]
async fn whoever_boards_a_flight_that_is_just_given_up_is_answered() {
    let heart = Heart::narrow(1);
    let first = heart.begin(1).await;
    let hurried = heart.begin(2).await;
    hurried.abort();
    // The flight does not know yet that it is deserted.
    assert_eq!(value(heart.read(2).await), "0");
    assert_eq!(value(first.await.expect("no panic")), "0");
    assert_eq!(heart.loads(), 2);
}
