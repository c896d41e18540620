//! The cache and the database die, hang and come back, under load.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::app::{App, PATIENCE, World, command};
use crate::faults::Proxy;
use crate::invalidation::{seen, warm};
use crate::servers::{Kind, Postgres, Redis};

pub const SCHEMA: &str =
    "CREATE TABLE item (id int PRIMARY KEY, v int); INSERT INTO item SELECT g, 0 FROM generate_series(1, 100) g;";

pub fn config(database: &str, redis: &str) -> String {
    format!(
        "database: {{ url: \"{database}\" }}\ncache: {{ url: \"{redis}\" }}\n\
         access: {{ write: public, admin: public, refresh: public }}\nresources: {{ item: {{ write: [update] }} }}\n"
    )
}

/// The same, for a cache that will hang: it is not waited for long.
pub fn hasty(database: &str, redis: &str) -> String {
    config(database, redis).replace("cache: {", "cache: { timeout: 300ms,")
}

/// Readers that go on until told to stop, counting what is not a 200 and the slowest answer.
pub struct Load {
    stop: Arc<AtomicBool>,
    bad: Arc<AtomicU64>,
    slowest: Arc<AtomicU64>,
    readers: Vec<tokio::task::JoinHandle<u64>>,
}

impl Load {
    pub fn on(app: &App) -> Self {
        let (stop, bad, slowest) = (Arc::new(AtomicBool::new(false)), Arc::default(), Arc::default());
        let readers = (0..8_u32).map(|reader| {
            let (stop, bad, slowest): (_, Arc<AtomicU64>, Arc<AtomicU64>) =
                (Arc::clone(&stop), Arc::clone(&bad), Arc::clone(&slowest));
            let (client, url) = (app.client.clone(), app.url.clone());
            tokio::spawn(async move {
                let mut count = 0;
                while !stop.load(Ordering::Relaxed) {
                    let id = 1 + (reader * 13 + u32::try_from(count % 100).unwrap_or(0)) % 100;
                    let started = Instant::now();
                    let status =
                        client.get(format!("{url}/api/item/{id}")).send().await.map(|reply| reply.status().as_u16());
                    if !matches!(status, Ok(200)) {
                        bad.fetch_add(1, Ordering::Relaxed);
                    }
                    let took = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
                    slowest.fetch_max(took, Ordering::Relaxed);
                    count += 1;
                }
                count
            })
        });
        let readers = readers.collect();
        Self { stop, bad, slowest, readers }
    }

    /// Ends it: the number of reads, of bad ones, and the slowest in milliseconds.
    pub async fn end(self) -> (u64, u64, u64) {
        self.stop.store(true, Ordering::Relaxed);
        let mut reads = 0;
        for reader in self.readers {
            reads += reader.await.expect("no reader panics");
        }
        (reads, self.bad.load(Ordering::Relaxed), self.slowest.load(Ordering::Relaxed))
    }
}

pub async fn hits(app: &App) -> bool {
    app.get("/api/item/1").await;
    app.get("/api/item/1").await.source() == "cache"
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cache_that_is_killed_costs_no_answer_and_is_used_again_when_it_is_back() {
    killed(Kind::Redis).await;
}

pub async fn killed(kind: Kind) {
    let world = World::new(SCHEMA).await;
    let mut redis = Redis::start_as(kind, &[]).await;
    let app = App::start(&config(&world.database.url, &redis.url())).await;
    app.until("cached", hits).await;
    let load = Load::on(&app);
    tokio::time::sleep(Duration::from_millis(300)).await;
    redis.kill().await;
    for _ in 0..20 {
        assert_eq!(app.get("/api/item/1").await.expect(200).source(), "database");
        app.get("/readyz").await.expect(200);
    }
    assert!(app.get("/readyz?verbose").await.text.contains("[!] cache (redis)"));
    redis.start_again().await;
    app.until("used again", hits).await;
    let (reads, bad, _) = load.end().await;
    assert!(reads > 100 && bad == 0, "{bad} of {reads} reads failed");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cache_that_hangs_costs_no_answer() {
    let world = World::new(SCHEMA).await;
    let redis = Redis::start().await;
    let app = App::start(&hasty(&world.database.url, &redis.url())).await;
    app.until("cached", hits).await;
    let load = Load::on(&app);
    tokio::time::sleep(Duration::from_millis(300)).await;
    redis.pause();
    for _ in 0..20 {
        assert_eq!(app.get("/api/item/2").await.expect(200).source(), "database");
        app.get("/readyz").await.expect(200);
    }
    redis.resume();
    app.until("used again", hits).await;
    let (reads, bad, slowest) = load.end().await;
    assert!(reads > 100 && bad == 0, "{bad} of {reads} reads failed");
    // Not a measurement: the server's own limits for a request are ten times that.
    assert!(slowest < 5_000, "one read took {slowest} ms");
}

#[tokio::test]
async fn a_cut_or_silent_network_to_the_cache_heals() {
    let world = World::new(SCHEMA).await;
    let redis = Redis::start().await;
    let proxy = Proxy::to(([127, 0, 0, 1], redis.port()).into()).await;
    let app = App::start(&hasty(&world.database.url, &format!("redis://{}", proxy.addr()))).await;
    for fault in [Proxy::cut, Proxy::black_hole] {
        app.until("cached", hits).await;
        fault(&proxy);
        for _ in 0..10 {
            app.get("/api/item/3").await.expect(200);
        }
        proxy.restore();
    }
    app.until("cached", hits).await;
    proxy.delay(Duration::from_millis(400));
    assert_eq!(app.get("/api/item/1").await.expect(200).source(), "database", "slower than cache.timeout is down");
    proxy.restore();
    app.until("cached", hits).await;
}

#[tokio::test]
async fn a_write_while_the_cache_is_away_is_never_followed_by_the_old_row() {
    let world = World::new(SCHEMA).await;
    let redis = Redis::start().await;
    let proxy = Proxy::to(([127, 0, 0, 1], redis.port()).into()).await;
    let app = App::start(&config(&world.database.url, &format!("redis://{}", proxy.addr()))).await;
    app.until("cached", hits).await;
    // The entry outlives the cut: the memory itself is untouched.
    proxy.cut();
    let patched = app.patch("/api/item/1", r#"{"v":7}"#).await.expect(200);
    assert!(patched.header("cache-status").contains("detail=invalidation-pending"), "{patched:?}");
    assert_eq!(app.get("/api/item/1").await.json()["data"]["v"], 7);
    proxy.restore();
    let started = Instant::now();
    loop {
        let reply = app.get("/api/item/1").await.expect(200);
        assert_eq!(reply.json()["data"]["v"], 7, "{reply:?}");
        if reply.source() == "cache" {
            break;
        }
        assert!(started.elapsed() < PATIENCE, "the cache was never used again");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn a_database_that_dies_leaves_hits_and_refuses_misses_at_once() {
    let mut postgres = Postgres::start().await;
    let database = postgres.create_database().await;
    database.client().await.batch_execute(SCHEMA).await.expect("the schema is sound");
    let redis = Redis::start().await;
    let app = App::start(&config(&database.url, &redis.url())).await;
    app.until("cached", hits).await;
    postgres.kill().await;
    for _ in 0..10 {
        assert_eq!(app.get("/api/item/1").await.expect(200).source(), "cache");
    }
    let miss = app.get("/api/item/50").await.expect(503);
    assert!(!miss.header("retry-after").is_empty(), "{miss:?}");
    app.get("/api/item?id=1,51").await.expect(503);
    app.patch("/api/item/1", r#"{"v":1}"#).await.expect(503);
    app.until("unready", async |app| app.get("/readyz").await.status == 503).await;
    // What can still be answered is still to be asked for here.
    assert!(app.get("/readyz?exclude=database&verbose").await.expect(200).text.contains("[!] database"));
    app.get("/readyz?exclude=cache").await.expect(400);
    app.get("/livez").await.expect(200);
    postgres.start_again().await;
    app.until("ready", async |app| app.get("/readyz").await.status == 200).await;
    app.get("/api/item/50").await.expect(200);
}

#[tokio::test]
async fn what_is_past_its_ttl_is_served_while_the_database_is_away() {
    let mut postgres = Postgres::start().await;
    let database = postgres.create_database().await;
    database.client().await.batch_execute(SCHEMA).await.expect("the schema is sound");
    let redis = Redis::start().await;
    let app =
        App::start(&config(&database.url, &redis.url()).replace("item: { write:", "item: { ttl: 200ms, write:")).await;
    app.get("/api/item/1").await.expect(200);
    postgres.kill().await;
    app.until("stale", async |app| {
        let reply = app.get("/api/item/1").await.expect(200);
        reply.header("cache-status").contains("fwd=stale")
    })
    .await;
    app.delete("/admin/cache/item/1").await.expect(204);
    app.get("/api/item/1").await.expect(503);
    assert!(app.metric(r#"cache_aside_requests_total{resource="item",result="stale"#).await >= 1);
}

#[tokio::test]
async fn a_service_that_starts_before_its_database_keeps_trying() {
    let mut postgres = Postgres::start().await;
    let database = postgres.create_database().await;
    database.client().await.batch_execute(SCHEMA).await.expect("the schema is sound");
    let redis = Redis::start().await;
    postgres.kill().await;
    let app = App::launch(&config(&database.url, &redis.url())).await;
    app.get("/livez").await.expect(200);
    app.get("/readyz").await.expect(503);
    app.get("/readyz?exclude=database").await.expect(503);
    app.get("/api/item/1").await.expect(503);
    postgres.start_again().await;
    app.until("ready", async |app| app.get("/readyz").await.status == 200).await;
    app.get("/api/item/1").await.expect(200);
}

#[tokio::test]
async fn a_table_that_is_missing_is_waited_for() {
    let world = World::new("").await;
    let app = App::launch(&world.config("resources: { item: {} }")).await;
    app.until("answering", async |app| app.get("/readyz?verbose").await.text.contains("no table or view item")).await;
    app.get("/readyz").await.expect(503);
    world.sql(SCHEMA).await;
    app.until("ready", async |app| app.get("/readyz").await.status == 200).await;
    app.get("/api/item/1").await.expect(200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn past_a_full_queue_requests_are_refused_at_once() {
    let world = World::new(
        "CREATE TABLE item (id int PRIMARY KEY); INSERT INTO item SELECT generate_series(1, 100);
         CREATE FUNCTION slow() RETURNS int LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(0.5); RETURN 0; END $$;
         CREATE VIEW slow_item AS SELECT id, slow() AS waited FROM item;",
    )
    .await;
    let config = world
        .config("resources: { slow_item: { key: id } }")
        .replace("database: {", "database: { pool_size: 2, queue: 3,");
    let app = App::start(&config).await;
    let reads: Vec<_> = (1..=20)
        .map(|id| {
            let (client, url) = (app.client.clone(), format!("{}/api/slow_item/{id}", app.url));
            tokio::spawn(async move { client.get(url).send().await.expect("it answers").status().as_u16() })
        })
        .collect();
    let mut answers = std::collections::BTreeMap::new();
    for read in reads {
        *answers.entry(read.await.expect("no reader panics")).or_insert(0) += 1;
    }
    assert_eq!(answers.keys().copied().collect::<Vec<_>>(), [200, 503], "{answers:?}");
    assert!(answers[&200] >= 5 && answers[&503] >= 10, "{answers:?}");
}

#[tokio::test]
async fn a_database_that_dies_while_a_table_is_missing_leaves_the_others_served() {
    let mut postgres = Postgres::start().await;
    let database = postgres.create_database().await;
    database.client().await.batch_execute(SCHEMA).await.expect("the schema is sound");
    let redis = Redis::start().await;
    let config = config(&database.url, &redis.url()).replace("resources: {", "resources: { absent: {},");
    let migrated = command(&config, &["migrate"]);
    assert_eq!(migrated.status.code(), Some(1), "the absent table is told");
    let app = App::launch(&config).await;
    app.until("cached", hits).await;
    postgres.kill().await;
    app.until("noticed", async |app| app.get("/readyz?verbose").await.text.contains("[-] database")).await;
    for _ in 0..100 {
        assert_eq!(app.get("/api/item/1").await.expect(200).source(), "cache");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_that_hangs_leaves_hits_and_ends_misses_and_is_used_again() {
    let postgres = Postgres::start().await;
    let database = postgres.create_database().await;
    database.client().await.batch_execute(SCHEMA).await.expect("the schema is sound");
    let redis = Redis::start().await;
    let config = config(&database.url, &redis.url())
        .replace("database: {", "database: { pool_size: 2, statement_timeout: 300ms,");
    let app = App::start(&config).await;
    app.until("cached", hits).await;
    postgres.pause();
    let misses: Vec<_> = (50..60)
        .map(|id| {
            let (client, url) = (app.client.clone(), format!("{}/api/item/{id}", app.url));
            tokio::spawn(async move { client.get(url).send().await.expect("it answers").status().as_u16() })
        })
        .collect();
    for _ in 0..20 {
        assert_eq!(app.get("/api/item/1").await.expect(200).source(), "cache");
    }
    for miss in misses {
        let status = miss.await.expect("no reader panics");
        assert!(status == 503 || status == 504, "{status}");
    }
    app.until("unready", async |app| app.get("/readyz").await.status == 503).await;
    postgres.resume();
    app.until("used again", async |app| app.get("/api/item/70").await.status == 200).await;
    app.until("ready", async |app| app.get("/readyz").await.status == 200).await;
}

#[tokio::test]
async fn sentinels_name_the_master_and_another_when_it_fails() {
    let world = World::new(
        "CREATE TABLE item (id int PRIMARY KEY, v int); INSERT INTO item SELECT g, 0 FROM generate_series(1, 50) g;",
    )
    .await;
    let mut master = Redis::start().await;
    let replica = Redis::start_with(&["--replicaof", &format!("127.0.0.1 {}", master.port())]).await;
    let mut sentinels = Vec::new();
    for _ in 0..3 {
        sentinels.push(Redis::sentinel(master.port(), 2, 600).await);
    }
    let hosts: Vec<String> = sentinels.iter().map(|sentinel| format!("127.0.0.1:{}", sentinel.port())).collect();
    let url = format!("redis+sentinel://{}/main", hosts.join(","));
    let config =
        world.config("resources: { item: { write: [update], local_ttl: 1h } }\n").replace(&world.redis_url, &url);
    let (one, two) = (App::start(&config).await, App::start(&config).await);
    warm(&[&one, &two], &["/api/item/1", "/api/item/2"]).await;
    // They know each other and the replica only after a while.
    let conn = sentinels[0].client().await;
    one.until("known to each other", async |_| {
        let known: std::collections::HashMap<String, String> =
            redis::cmd("SENTINEL").arg("MASTER").arg("main").query_async(&mut conn.clone()).await.expect("it answers");
        known.get("num-other-sentinels").is_some_and(|count| count == "2")
            && known.get("num-slaves").is_some_and(|count| count == "1")
    })
    .await;
    // One Sentinel may be away, and the failover still happens.
    sentinels.pop();
    master.kill().await;
    let mut v = 0;
    let failed_over = Instant::now();
    loop {
        v += 1;
        let wrote = one.patch("/api/item/1", &format!(r#"{{"v":{v}}}"#)).await.expect(200);
        let pending = wrote.header("cache-status").contains("pending");
        let reply = two.get("/api/item/1").await.expect(200);
        assert!(pending || reply.text.contains(&format!(r#""v":{v}"#)), "{reply:?}");
        if two.get("/api/item/2").await.header("cache-status").starts_with("cache-aside; hit") && !pending {
            break;
        }
        assert!(failed_over.elapsed() < PATIENCE, "{}", two.log());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // A hit may have come from the tier in process.
    two.until("answers", async |app| app.get("/readyz?verbose").await.text.contains("[+] cache (redis): answers"))
        .await;
    let mut promoted = replica.client().await;
    let keys: u32 = redis::cmd("DBSIZE").query_async(&mut promoted).await.expect("it answers");
    assert!(keys > 0, "the one that was promoted is in use");
    // The former master comes back, as one that follows: nobody uses it.
    master.start_again().await;
    world.sql("UPDATE item SET v = 1000 WHERE id = 2").await;
    seen(&[&one, &two], "/api/item/2", r#""v":1000"#).await;
    warm(&[&one, &two], &["/api/item/2"]).await;
}
