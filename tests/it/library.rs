//! The library as programs embed it: their own loaders behind memory and a real Redis, and a database without HTTP.

use std::collections::HashMap;
use std::error::Error as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use cache_aside::config::{Config, Env};
use cache_aside::{CacheAside, Database, Entries, Error};
use serde::{Deserialize, Serialize};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;

use crate::app::{PATIENCE, World, migrate};
use crate::faults::Proxy;
use crate::servers::Redis;

const HOUR: Duration = Duration::from_hours(1);

/// What the program's own database does wrong.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Trouble {
    None,
    Down,
    Panic,
}

#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
#[error("the program's own database is down")]
struct Down;

/// The program's own database.
#[derive(Clone)]
struct Source {
    rows: Arc<Mutex<HashMap<u32, String>>>,
    /// The ids of each call of the loader.
    calls: Arc<Mutex<Vec<Vec<u32>>>>,
    trouble: Arc<Mutex<Trouble>>,
    /// Each call has read its rows and waits here.
    gate: Arc<Semaphore>,
}

impl Source {
    fn new() -> Self {
        let rows = (1..100).map(|id| (id, format!("old {id}"))).collect();
        Self {
            rows: Arc::new(Mutex::new(rows)),
            calls: Arc::default(),
            trouble: Arc::new(Mutex::new(Trouble::None)),
            gate: Arc::new(Semaphore::new(Semaphore::MAX_PERMITS)),
        }
    }

    /// The same with a gate that is closed.
    fn gated() -> Self {
        Self { gate: Arc::new(Semaphore::new(0)), ..Self::new() }
    }

    fn open_gate(&self) {
        self.gate.add_permits(1000);
    }

    async fn load(self, ids: Vec<u32>) -> Result<HashMap<u32, String>, Down> {
        self.calls.lock().expect("nobody panics").push(ids.clone());
        let rows = self.rows.lock().expect("nobody panics").clone();
        let trouble = *self.trouble.lock().expect("nobody panics");
        drop(self.gate.acquire().await.expect("it is never closed"));
        match trouble {
            Trouble::None => Ok(ids.iter().filter_map(|id| Some((*id, rows.get(id)?.clone()))).collect()),
            Trouble::Down => Err(Down),
            // Not by the hook: where that prints a backtrace, it takes longer than a lock lasts on a busy machine.
            Trouble::Panic => std::panic::resume_unwind(Box::new("as the test wants it")),
        }
    }

    fn entries(&self, cache: &CacheAside) -> Entries<u32, String> {
        let source = self.clone();
        let entries = cache.entries("rows").ttl(HOUR).negative_ttl(HOUR);
        entries.loader(move |ids| source.clone().load(ids))
    }

    fn set(&self, id: u32, value: &str) {
        self.rows.lock().expect("nobody panics").insert(id, value.into());
    }

    fn is(&self, trouble: Trouble) {
        *self.trouble.lock().expect("nobody panics") = trouble;
    }

    fn calls(&self) -> Vec<Vec<u32>> {
        self.calls.lock().expect("nobody panics").clone()
    }

    async fn called(&self, times: usize) {
        until("the loader was called", async || self.calls().len() >= times).await;
    }
}

async fn until(what: &str, condition: impl AsyncFn() -> bool) {
    let started = Instant::now();
    while !condition().await {
        assert!(started.elapsed() < PATIENCE, "never: {what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

fn prefix() -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    format!("lib{}-{}:", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

async fn open(url: &str, prefix: &str) -> CacheAside {
    let cache = CacheAside::builder().url(url).key_prefix(prefix).timeout(Duration::from_secs(2)).build();
    cache.await.expect("it is there")
}

/// A cache of each engine.
async fn caches() -> [CacheAside; 2] {
    [open("memory:", "").await, open(&Redis::shared().await.url(), &prefix()).await]
}

fn reading(entries: &Entries<u32, String>, id: u32) -> JoinHandle<cache_aside::Result<Option<String>>> {
    let entries = entries.clone();
    tokio::spawn(async move { entries.get(&id).await })
}

async fn joined<T>(task: JoinHandle<T>) -> T {
    task.await.expect("no reader panics")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cold_key_is_loaded_once_whoever_asks_in_two_processes() {
    let (url, prefix, source) = (Redis::shared().await.url(), prefix(), Source::gated());
    let caches = [open(&url, &prefix).await, open(&url, &prefix).await];
    let entries = caches.each_ref().map(|cache| source.entries(cache));
    let readers: Vec<_> = (0..200).map(|index| reading(&entries[index % 2], 7)).collect();
    source.called(1).await;
    source.open_gate();
    for reader in readers {
        assert_eq!(joined(reader).await.expect("it is loaded").as_deref(), Some("old 7"));
    }
    assert_eq!(source.calls(), [[7]]);
    for entries in entries {
        assert!(entries.fetch(&7).await.expect("it is there").is_hit());
    }
}

#[tokio::test]
async fn many_keys_are_one_call_with_exactly_the_missing_ones_in_order() {
    for cache in caches().await {
        let source = Source::new();
        let entries = source.entries(&cache);
        entries.get(&2).await.expect("it is loaded");
        let found = entries.get_many(&[30, 2, 10, 30, 900]).await.expect("they are loaded");
        let texts: Vec<Option<&str>> = found.iter().map(Option::as_deref).collect();
        assert_eq!(texts, [Some("old 30"), Some("old 2"), Some("old 10"), Some("old 30"), None]);
        assert_eq!(source.calls()[1..], [vec![30, 10, 900]]);
        let again = entries.fetch_many(&[30, 2, 10, 900]).await.expect("they are there");
        assert!(again.iter().all(cache_aside::Fetched::is_hit));
        assert!(entries.get_many(&[]).await.expect("nothing is asked").is_empty());
        assert_eq!(source.calls().len(), 2);
    }
}

#[tokio::test]
async fn what_was_read_before_an_invalidation_is_not_stored_after_it() {
    for cache in caches().await {
        let source = Source::gated();
        let entries = source.entries(&cache);
        let before = reading(&entries, 1);
        source.called(1).await;
        source.set(1, "new");
        entries.invalidate(&1).await.expect("the cache is told");
        let after = reading(&entries, 1);
        source.open_gate();
        assert_eq!(joined(before).await.expect("it is loaded").as_deref(), Some("old 1"), "it asked before");
        assert_eq!(joined(after).await.expect("it is loaded").as_deref(), Some("new"), "it asked after");
        let found = entries.fetch(&1).await.expect("it is there");
        assert_eq!((found.is_hit(), found.value.as_deref()), (true, Some("new")));
        assert_eq!(source.calls().len(), 2);
        let text = String::from_utf8(cache.metrics().encode().expect("it can be told")).expect("it is text");
        let refused = ["fenced", "gone"].iter().any(|outcome| {
            let line = format!(r#"cache_aside_fills_total{{outcome="{outcome}",resource="rows"}} 1"#);
            text.contains(&line)
        });
        assert!(refused, "{text}");
    }
}

#[tokio::test]
async fn an_invalidation_is_seen_by_every_process_and_may_name_many_or_all() {
    let (url, prefix, source) = (Redis::shared().await.url(), prefix(), Source::new());
    let (one, other) = (open(&url, &prefix).await, open(&url, &prefix).await);
    let (one, other) = (source.entries(&one), source.entries(&other));
    let ids: Vec<u32> = (1..=5).collect();
    other.get_many(&ids).await.expect("they are loaded");
    for id in &ids {
        source.set(*id, "new");
    }
    one.invalidate_many(&ids[..2]).await.expect("the cache is told");
    let found = other.get_many(&ids).await.expect("they are there");
    let texts: Vec<&str> = found.iter().flatten().map(String::as_str).collect();
    assert_eq!(texts, ["new", "new", "old 3", "old 4", "old 5"]);
    one.invalidate_all().await.expect("the cache is told");
    assert_eq!(one.get(&3).await.expect("it is loaded").as_deref(), Some("new"), "at once where it was asked for");
    until("the other one has seen it", async || other.get(&5).await.expect("it is there").as_deref() == Some("new"))
        .await;
}

#[tokio::test]
async fn a_loaders_error_reaches_all_who_waited_with_its_source_and_the_next_call_tries_again() {
    for cache in caches().await {
        let source = Source::gated();
        source.is(Trouble::Down);
        let entries = source.entries(&cache);
        let readers = [reading(&entries, 1), reading(&entries, 1)];
        source.called(1).await;
        source.open_gate();
        for reader in readers {
            let error = joined(reader).await.expect_err("the loader fails");
            assert!(matches!(error, Error::Loader(_)), "{error:?}");
            assert_eq!(error.to_string(), "the loader failed: the program's own database is down");
            assert_eq!(error.source().and_then(|source| source.downcast_ref()), Some(&Down));
        }
        source.is(Trouble::None);
        assert_eq!(entries.get(&1).await.expect("it is loaded").as_deref(), Some("old 1"));
    }
}

#[tokio::test]
async fn a_loader_that_panics_or_miscounts_hurts_nobody_else() {
    for cache in caches().await {
        let source = Source::gated();
        source.is(Trouble::Panic);
        let entries = source.entries(&cache);
        let broken = reading(&entries, 1);
        source.called(1).await;
        source.is(Trouble::None);
        let fine = reading(&entries, 2);
        source.called(2).await;
        source.open_gate();
        assert!(matches!(joined(broken).await, Err(Error::Panicked)));
        assert_eq!(joined(fine).await.expect("it is loaded").as_deref(), Some("old 2"));
        assert_eq!(entries.get(&1).await.expect("it is loaded").as_deref(), Some("old 1"));

        let miscounting =
            cache.entries::<u32, String>("miscounted").loader(async |_: Vec<u32>| Ok::<_, Down>(vec![None]));
        assert_eq!(miscounting.get(&1).await.expect("one of one"), None);
        let error = miscounting.get_many(&[2, 3]).await.expect_err("one of two");
        assert!(matches!(error, Error::Count { asked: 2, came: 1 }), "{error:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_who_wait_for_a_loader_that_panics_are_answered_by_its_second_call() {
    for cache in caches().await {
        let source = Source::gated();
        source.is(Trouble::Panic);
        let entries = source.entries(&cache);
        let broken = reading(&entries, 1);
        source.called(1).await;
        source.is(Trouble::None);
        let readers: Vec<_> = (0..100).map(|_| reading(&entries, 1)).collect();
        source.open_gate();
        assert!(matches!(joined(broken).await, Err(Error::Panicked)));
        for reader in readers {
            assert_eq!(joined(reader).await.expect("it is loaded").as_deref(), Some("old 1"));
        }
        // A lock may end on a busy machine.
        assert!((2..=3).contains(&source.calls().len()), "{:?}", source.calls());
        assert_eq!(entries.get(&1).await.expect("it is there").as_deref(), Some("old 1"));
    }
}

#[tokio::test]
async fn a_caller_that_goes_away_leaves_the_load_to_the_others() {
    for cache in caches().await {
        let source = Source::gated();
        let entries = source.entries(&cache);
        let gone = reading(&entries, 1);
        source.called(1).await;
        let other = reading(&entries, 1);
        gone.abort();
        assert!(gone.await.expect_err("it was cancelled").is_cancelled());
        source.open_gate();
        assert_eq!(joined(other).await.expect("it is loaded").as_deref(), Some("old 1"));
        assert_eq!(source.calls().len(), 1);
    }
}

#[tokio::test]
async fn a_loader_that_takes_too_long_is_given_up() {
    for cache in caches().await {
        let source = Source::gated();
        let entries = cache.entries::<u32, String>("rows").load_timeout(Duration::from_millis(20)).loader({
            let source = source.clone();
            move |ids| source.clone().load(ids)
        });
        assert!(matches!(entries.get(&1).await, Err(Error::TimedOut)));
        source.open_gate();
        assert_eq!(entries.get(&1).await.expect("it is loaded").as_deref(), Some("old 1"));
    }
}

#[tokio::test]
async fn not_found_is_remembered_until_it_is_invalidated() {
    for cache in caches().await {
        let source = Source::new();
        let entries = source.entries(&cache);
        for _ in 0..2 {
            assert_eq!(entries.get(&900).await.expect("it is answered"), None);
        }
        assert_eq!(source.calls().len(), 1);
        source.set(900, "new");
        entries.invalidate(&900).await.expect("the cache is told");
        assert_eq!(entries.get(&900).await.expect("it is loaded").as_deref(), Some("new"));
    }
}

#[tokio::test]
async fn what_is_past_its_ttl_is_served_while_the_loader_fails_and_never_once_it_was_invalidated() {
    for cache in caches().await {
        let source = Source::new();
        let entries = cache.entries("rows").ttl(Duration::from_millis(1)).stale_if_error(HOUR).loader({
            let source = source.clone();
            move |ids| source.clone().load(ids)
        });
        entries.get(&1).await.expect("it is loaded");
        source.is(Trouble::Down);
        until("the TTL has ended", async || {
            let found = entries.fetch(&1).await.expect("it is served");
            assert_eq!(found.value.as_deref(), Some("old 1"));
            found.is_stale()
        })
        .await;
        entries.invalidate(&1).await.expect("the cache is told");
        assert!(matches!(entries.get(&1).await, Err(Error::Loader(_))));
    }
}

#[tokio::test]
async fn a_value_of_another_type_is_loaded_anew_and_another_version_is_another_value() {
    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Row {
        name: String,
    }
    for cache in caches().await {
        let (source, loads) = (Source::new(), Arc::new(AtomicU64::new(0)));
        source.entries(&cache).get_many(&[1, 2]).await.expect("they are loaded");
        let typed = |version| {
            let (source, loads) = (source.clone(), Arc::clone(&loads));
            cache.entries::<u32, Row>("rows").version(version).loader(move |ids: Vec<u32>| {
                loads.fetch_add(1, Ordering::SeqCst);
                let source = source.clone();
                async move {
                    let found = source.load(ids).await?;
                    Ok::<_, Down>(found.into_iter().map(|(id, name)| (id, Row { name })).collect::<HashMap<_, _>>())
                }
            })
        };
        let rows = typed(0);
        let row = |name: &str| Some(Row { name: name.into() });
        assert_eq!(rows.get(&1).await.expect("it is loaded anew"), row("old 1"));
        assert_eq!(rows.get_many(&[1, 2, 3]).await.expect("so are these"), [row("old 1"), row("old 2"), row("old 3")]);
        let found = rows.fetch_many(&[1, 2, 3]).await.expect("they are there");
        assert!(found.iter().all(cache_aside::Fetched::is_hit));
        assert!(loads.load(Ordering::SeqCst) <= 3, "once for 1, then for 2 and 3");
        let next = typed(1);
        assert!(!next.fetch(&1).await.expect("it is loaded").is_hit());
    }
}

#[tokio::test]
async fn single_keys_may_be_loaded_one_by_one_and_keys_be_of_any_type() {
    for cache in caches().await {
        let lines =
            cache.entries::<(u32, String), String>("order lines").loader_each(async |(order, line): (u32, String)| {
                Ok::<_, Down>((order < 10).then(|| format!("{order}/{line}")))
            });
        let ids = [(7, "a:b".to_owned()), (70, "c".to_owned())];
        assert_eq!(lines.get_many(&ids).await.expect("they are loaded"), [Some("7/a:b".to_owned()), None]);
        assert!(lines.key(&ids[0]).expect("it has one").ends_with(r#"order%20lines:[7,"a:b"]"#));
        lines.invalidate(&ids[0]).await.expect("the cache is told");
        assert_eq!(lines.inspect(&ids[0]).await.expect("it is asked").state, "absent");
        assert_eq!(lines.inspect(&ids[1]).await.expect("it is asked").state, "valid");
    }
}

#[tokio::test]
async fn a_cache_that_is_away_costs_no_answer_and_closing_settles_what_it_is_owed() {
    let redis = Redis::start().await;
    let proxy = Proxy::to(([127, 0, 0, 1], redis.port()).into()).await;
    let source = Source::new();
    let cache = open(&format!("redis://{}", proxy.addr()), "p:").await;
    let entries = source.entries(&cache);
    entries.get(&1).await.expect("it is loaded");
    let mut client = redis.client().await;
    let mut there =
        async || redis::cmd("EXISTS").arg("p:rows:1").query_async::<bool>(&mut client).await.expect("it answers");
    assert!(there().await);
    proxy.cut();
    source.set(1, "new");
    assert!(matches!(entries.invalidate(&1).await, Err(Error::InvalidationPending(_))));
    assert_eq!(entries.get(&1).await.expect("it is loaded").as_deref(), Some("new"));
    assert!(there().await, "nobody could tell the cache");
    let closing = tokio::spawn(cache.close());
    proxy.restore();
    joined(closing).await.expect("everything was told");
    assert!(!there().await);
}

#[tokio::test]
async fn for_ever_is_a_time_too() {
    for cache in caches().await {
        let (source, ever) = (Source::new(), Duration::MAX);
        let entries =
            cache.entries("rows").ttl(ever).negative_ttl(ever).stale_if_error(ever).stale_while_revalidate(ever);
        let entries = entries.load_timeout(ever).timeout(ever).loader({
            let source = source.clone();
            move |ids| source.clone().load(ids)
        });
        for hit in [false, true] {
            let found = entries.fetch_many(&[1, 900]).await.expect("it is answered");
            assert_eq!((found[0].value.as_deref(), &found[1].value), (Some("old 1"), &None));
            assert!(found.iter().all(|found| found.is_hit() == hit));
        }
    }
}

#[tokio::test]
async fn what_can_not_be_used_is_said_when_it_is_built() {
    for (url, words) in [("ftp://x", "ftp"), ("", "empty"), ("redis://[", "cache.url")] {
        let error = CacheAside::builder().url(url).build().await.expect_err("it is no cache");
        assert!(matches!(&error, Error::Config(text) if text.contains(words)), "{url}: {error}");
    }
    let registry = prometheus::Registry::new();
    let _first = CacheAside::builder().registry(&registry).build().await.expect("it is the first");
    assert!(CacheAside::builder().registry(&registry).build().await.is_err());
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Item {
    id: i64,
    name: String,
    kind: i64,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_is_served_without_http_and_kept_current() {
    let world = World::new(
        "CREATE TABLE item (id bigint PRIMARY KEY, name text NOT NULL, kind int NOT NULL);
         INSERT INTO item VALUES (1, 'one', 5), (2, 'two', 5), (3, 'three', 6);",
    )
    .await;
    let yaml = world.config(
        "resources: { item: { write: [create, update, delete], lists: { kind: {} } } }
queries: { kinds: { sql: \"SELECT kind AS id, min(name) AS name, count(*) AS kind FROM item WHERE kind >= $1 GROUP BY kind ORDER BY 1\", params: [least], depends_on: [item] } }",
    );
    migrate(&yaml);
    let mut config = Config::from_yaml(&yaml, "test", &Env::default()).expect("it is sound");
    // The machine may be busy.
    config.cache.timeout = Duration::from_secs(2);
    let db = Database::open(config).await.expect("it opens");
    assert!(db.is_ready());
    let items = db.table::<i64, Item>("item");
    let item = |id, name: &str, kind| Item { id, name: name.into(), kind };

    assert_eq!(items.get(&1).await.expect("it is read"), Some(item(1, "one", 5)));
    assert!(items.fetch(&1).await.expect("it is read").is_hit());
    assert_eq!(
        items.get_many(&[3, 9, 1]).await.expect("they are read"),
        [Some(item(3, "three", 6)), None, Some(item(1, "one", 5))]
    );
    assert_eq!(items.list("kind", &5).await.expect("it is read").len(), 2);
    let kinds = || db.named("kinds").param("least", 5);
    assert_eq!(kinds().get::<Item>().await.expect("it is read"), [item(5, "one", 2), item(6, "three", 1)]);
    assert!(kinds().fetch::<Item>().await.expect("it is read").is_hit());

    // Its own write: out of the cache before it returns, lists and statements too.
    let saved = items.merge(&1, &serde_json::json!({ "kind": 6 })).await.expect("it is written");
    assert_eq!((saved.row, saved.invalidation_pending), (item(1, "one", 6), false));
    assert_eq!(items.list("kind", &5).await.expect("it is read"), [item(2, "two", 5)]);
    assert_eq!(kinds().get::<Item>().await.expect("it is read"), [item(5, "two", 1), item(6, "one", 2)]);
    items.create(&item(4, "four", 5)).await.expect("it is written");
    items.delete(&2).await.expect("it is written");
    assert_eq!(items.get(&2).await.expect("it is read"), None);

    // Somebody else's: the rounds bring it.
    items.get(&3).await.expect("it is read");
    world.sql("UPDATE item SET name = 'drei' WHERE id = 3").await;
    until("the change has arrived", async || items.get(&3).await.expect("it is read") == Some(item(3, "drei", 6)))
        .await;

    let made_up = || db.query("SELECT * FROM item WHERE name = ANY($1) ORDER BY id").bind(vec!["drei", "four"]);
    assert_eq!(made_up().get::<Item>().await.expect("it is read"), [item(3, "drei", 6), item(4, "four", 5)]);
    assert!(made_up().fetch::<Item>().await.expect("it is read").is_hit());
    made_up().invalidate().await.expect("the cache is told");
    assert!(!made_up().fetch::<Item>().await.expect("it is read").is_hit());

    assert!(
        matches!(db.table::<i64, Item>("itme").get(&1).await, Err(Error::NotServed(words)) if words.contains("item"))
    );
    assert!(matches!(db.table::<&str, Item>("item").get(&"x").await, Err(Error::Key(_))));
    assert!(matches!(db.query("DELETE FROM item").get::<Item>().await, Err(Error::Database(_))));
    assert!(matches!(items.create(&item(4, "again", 5)).await, Err(Error::Write(_))));
    drop(items);
    db.close().await.expect("everything was told");
    world.until(NOBODY_ELSE).await;
}

const NOBODY_ELSE: &str = "SELECT count(*) = 0 FROM pg_stat_activity
    WHERE datname = current_database() AND backend_type = 'client backend' AND pid <> pg_backend_pid()";

#[tokio::test]
async fn a_database_that_is_dropped_leaves_nothing_running() {
    let world = World::new("CREATE TABLE item (id bigint PRIMARY KEY, name text NOT NULL, kind int NOT NULL)").await;
    let yaml = world.config("resources: { item: {} }");
    migrate(&yaml);
    let config = Config::from_yaml(&yaml, "test", &Env::default()).expect("it is sound");
    let db = Database::open(config).await.expect("it opens");
    let items = db.table::<i64, Item>("item");
    assert_eq!(items.get(&1).await.expect("it is read"), None);
    drop(db);
    assert_eq!(items.get(&1).await.expect("a table holds its database"), None);
    drop(items);
    world.until(NOBODY_ELSE).await;
}
