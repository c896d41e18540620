//! The heart on paused time, with a store that does as it is told: the moments that no real database can be made to hit.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use tokio::time::{Instant, sleep};

use super::{Answer, Aside, Ask, Forward, Limits, ReadError, Source};
use crate::cache::memory::MemoryCache;
use crate::cache::{Cache, Lookup};
use crate::catalog::{self, Column, Image, Key, Kind, Param, Problem, Resource, Table, TableName, Target, What};
use crate::config::{self, Defaults};
use crate::store::{Batch, Captured, LastWord, Load, Row, Rows, Store, StoreError, Wanted, Write, WriteError, Written};
use crate::telemetry::Metrics;

/// What the next load does; each takes a second.
#[derive(Clone, Copy)]
enum Turn {
    /// Reads the value as it is when the load begins.
    Value,
    Absent,
    Panic,
    Down,
}

#[derive(Clone, Default)]
struct Script {
    value: Arc<AtomicU32>,
    loads: Arc<AtomicU32>,
    turns: Arc<Mutex<Vec<Turn>>>,
}

impl Load for Script {
    async fn rows(&self, _: &Resource, keys: &[&Key]) -> Result<Batch, StoreError> {
        self.loads.fetch_add(1, Ordering::SeqCst);
        let value = self.value.load(Ordering::SeqCst);
        let turn = self.turns.lock().unwrap().pop().unwrap_or(Turn::Value);
        sleep(Duration::from_secs(1)).await;
        match turn {
            Turn::Value => {
                let json = Bytes::from(value.to_string());
                Ok(Batch { rows: vec![Some(Row { json, spelled_as_asked: true }); keys.len()], origin: 0 })
            }
            Turn::Absent => Ok(Batch { rows: vec![None; keys.len()], origin: 0 }),
            Turn::Panic => panic!("as the script says"),
            Turn::Down => Err(StoreError::Unavailable("as the script says".into())),
        }
    }

    async fn list(&self, _: &Resource, _: usize, _: &str) -> Result<Rows, StoreError> {
        Err(StoreError::Busy)
    }

    async fn query(&self, _: &Resource, _: &[Param]) -> Result<Rows, StoreError> {
        Err(StoreError::Busy)
    }
}

impl Store for Script {
    async fn write(&self, _: &Resource, write: Write, _: &LastWord) -> Result<Written, WriteError> {
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
        let bound = catalog::bind("item", &declared, &Defaults::default(), "", table);
        let (resource, _) = bound.expect("it fits");
        let script = Script::default();
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
async fn what_is_read_often_is_loaded_again_ahead_and_nobody_waits_for_it() {
    let heart = Heart::new(1 << 10);
    heart.read(1).await.expect("it is answered");
    for loads in 2..5 {
        // The TTL is 54 minutes at least; a load takes a second.
        sleep(Duration::from_mins(53)).await;
        heart.script.value.store(loads, Ordering::SeqCst);
        let began = Instant::now();
        refreshed(&heart).await;
        assert!(began.elapsed() > Duration::from_secs(30), "not much earlier than a load takes");
        // The load is under way; then everybody has what it brought.
        while value(heart.read(1).await) != loads.to_string() {
            sleep(Duration::from_millis(10)).await;
        }
        assert_eq!(heart.loads(), loads);
    }
}

#[tokio::test(start_paused = true)]
async fn what_is_dropped_while_it_is_refreshed_ahead_never_comes_back() {
    let heart = Heart::new(1 << 10);
    heart.read(1).await.expect("it is answered");
    sleep(Duration::from_mins(53)).await;
    refreshed(&heart).await;
    heart.aside.drop_entry(&heart.target(1)).await.expect("it is dropped");
    sleep(Duration::from_secs(2)).await;
    assert_eq!(heart.aside.cache().read(heart.target(1).place()).await, Ok(Lookup::Absent));
}

#[tokio::test(start_paused = true)]
async fn a_refresh_that_fails_is_not_tried_at_once_and_the_entry_stays_a_hit() {
    let heart = Heart::new(1 << 10);
    heart.read(1).await.expect("it is answered");
    sleep(Duration::from_mins(53)).await;
    heart.then(&[Turn::Down; 2]);
    refreshed(&heart).await;
    refreshed(&heart).await;
    refreshed(&heart).await;
    sleep(Duration::from_secs(2)).await;
    assert_eq!(heart.read(1).await.expect("it is answered").status.source, Source::Cache);
}

#[tokio::test(start_paused = true)]
async fn a_batch_is_refreshed_ahead_with_one_statement() {
    let heart = Heart::new(1 << 10);
    let targets: Vec<Target> = (1..4).map(|id| heart.target(id)).collect();
    heart.aside.read_many(&targets, ask()).await.expect("it is answered");
    sleep(Duration::from_mins(53)).await;
    while heart.loads() == 1 {
        let answers = heart.aside.read_many(&targets, ask()).await.expect("it is answered");
        assert!(answers.iter().all(|answer| answer.status.forward.is_none()));
        sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test(start_paused = true)]
async fn what_is_past_its_ttl_is_served_while_the_store_is_down_and_never_once_it_was_invalidated() {
    let heart = Heart::new(1 << 10);
    heart.read(1).await.expect("it is answered");
    // The TTL is an hour, stale_if_error ten minutes.
    sleep(Duration::from_secs(3601)).await;
    heart.then(&[Turn::Down; 8]);
    let stale = heart.read(1).await.expect("it is served");
    assert_eq!((stale.status.forward, stale.status.source), (Some(Forward::Stale), Source::Cache));
    // A reader who comes after an invalidation, while a load that knows the stale entry is under way.
    let before = heart.begin(1).await;
    heart.aside.drop_entry(&heart.target(1)).await.expect("it is dropped");
    let after = heart.begin(1).await;
    for reader in [before, after] {
        assert!(
            matches!(reader.await.expect("no panic"), Err(ReadError::Store(_))),
            "what was dropped never comes back"
        );
    }
    let lookup = heart.aside.cache().read(heart.target(1).place()).await;
    assert_eq!(lookup, Ok(Lookup::Absent));
    heart.then(&[]);
    heart.read(1).await.expect("it is answered");
    sleep(Duration::from_secs(3600 + 601)).await;
    heart.then(&[Turn::Down]);
    assert!(heart.read(1).await.is_err(), "not for longer than stale_if_error");
}
