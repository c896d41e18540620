//! Whatever does not answer is not asked, and asked again once it answers.

use std::time::Duration;

use cache_aside::app::open_store;
use cache_aside::config::{Config, Env};
use cache_aside::store::{Store, StoreError};

use crate::app::{App, World};
use crate::faults::Proxy;
use crate::outages::{Load, SCHEMA, config, hasty, hits};
use crate::servers::{Memcached, Postgres, Redis};

const CACHE: &str = r#"cache_aside_breaker_state{backend="redis"}"#;
const DATABASE: &str = r#"cache_aside_breaker_state{backend="postgresql"}"#;

/// Waits until the metric is there and has this value.
pub async fn until(app: &App, metric: &str, value: u64) {
    let line = format!("{metric} {value}");
    let what = format!("as in {line}");
    app.until(&what, async |app| app.get("/metrics").await.text.lines().any(|found| found == line)).await;
}

async fn timeouts(app: &App) -> u64 {
    app.metric(r#"cache_aside_errors_total{component="cache",kind="timeout"}"#).await
}

/// A cache that hangs, is found out, and answers again.
async fn hung(app: &App, breaker: &str, pause: impl Fn(), resume: impl Fn()) {
    until(app, breaker, 0).await;
    app.until("cached", hits).await;
    let load = Load::on(app);
    let hits_so_far = r#"cache_aside_requests_total{resource="item",result="hit",tier="shared"}"#;
    app.until("busy", async |app| app.metric(hits_so_far).await > 50).await;
    let before = timeouts(app).await;
    pause();
    let readers = (1..=64).map(|id| {
        let (client, url) = (app.client.clone(), format!("{}/api/item/{id}", app.url));
        tokio::spawn(async move {
            for _ in 0..10 {
                assert_eq!(client.get(&url).send().await.expect("it answers").status(), 200);
            }
        })
    });
    for reader in readers.collect::<Vec<_>>() {
        reader.await.expect("no reader panics");
    }
    // Those who asked before anybody knew, and a few; the looks that fail end the connection much later.
    let sent = timeouts(app).await - before;
    assert!(sent <= 2 * (64 + 8), "{sent} of 640 reads waited for a cache that does not answer");
    until(app, breaker, 2).await;
    let before = timeouts(app).await;
    for id in 1..=100 {
        assert_eq!(app.get(&format!("/api/item/{id}")).await.expect(200).source(), "database");
    }
    let more = timeouts(app).await - before;
    assert!(more < 20, "{more} of 100 reads and their fills were sent to a cache that does not answer");
    // What can't be told is owed.
    let written = app.patch("/api/item/7", r#"{"v":7}"#).await.expect(200);
    assert!(written.header("cache-status").contains("invalidation-pending"), "{written:?}");
    resume();
    until(app, breaker, 0).await;
    app.until("used again", hits).await;
    assert_eq!(app.get("/api/item/7").await.json()["data"]["v"], 7);
    let (reads, bad, _) = load.end().await;
    assert!(reads > 100 && bad == 0, "{bad} of {reads} reads failed");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_redis_that_hangs_is_not_asked_until_it_answers() {
    let (world, redis) = (World::new(SCHEMA).await, Redis::start().await);
    let app = App::start(&hasty(&world.database.url, &redis.url())).await;
    hung(&app, CACHE, || redis.pause(), || redis.resume()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_memcached_that_hangs_is_not_asked_until_it_answers() {
    let (world, memcached) = (World::new(SCHEMA).await, Memcached::start().await);
    let app = App::start(&hasty(&world.database.url, &memcached.url())).await;
    let breaker = r#"cache_aside_breaker_state{backend="memcached"}"#;
    hung(&app, breaker, || memcached.pause(), || memcached.resume()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_network_that_swallows_everything_on_the_way_to_the_cache_opens_its_breaker() {
    let (world, redis) = (World::new(SCHEMA).await, Redis::start().await);
    let proxy = Proxy::to(([127, 0, 0, 1], redis.port()).into()).await;
    let app = App::start(&hasty(&world.database.url, &format!("redis://{}", proxy.addr()))).await;
    hung(&app, CACHE, || proxy.black_hole(), || proxy.restore()).await;
}

#[tokio::test]
async fn the_breaker_of_a_cache_that_never_was_there_is_open() {
    let (world, mut redis) = (World::new(SCHEMA).await, Redis::start().await);
    redis.kill().await;
    let app = App::start(&config(&world.database.url, &redis.url())).await;
    until(&app, CACHE, 2).await;
    app.get("/api/item/1").await.expect(200);
    redis.start_again().await;
    until(&app, CACHE, 0).await;
    redis.kill().await;
    until(&app, CACHE, 2).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_waits_for_a_database_that_is_known_to_hang() {
    let postgres = Postgres::start().await;
    let database = postgres.create_database().await;
    database.client().await.batch_execute(SCHEMA).await.expect("the schema is sound");
    let redis = Redis::start().await;
    let app = App::start(&config(&database.url, &redis.url()).replace("item: {", "item: { ttl: 300ms,")).await;
    app.get("/api/item/1").await.expect(200);
    until(&app, DATABASE, 0).await;
    postgres.pause();
    until(&app, DATABASE, 2).await;
    let sent = async || app.metric(r#"cache_aside_store_queries_total{operation="row",resource="item"}"#).await;
    // What was sent before is still waited for.
    app.until("quiet", async |app| {
        app.metric(r#"cache_aside_pool_connections{backend="postgresql",state="in_use"}"#).await == 0
    })
    .await;
    let before = sent().await;
    for _ in 0..20 {
        let stale = app.get("/api/item/1").await.expect(200);
        assert!(stale.header("cache-status").contains("fwd=stale"), "{stale:?}");
        assert!(!app.get("/api/item/50").await.expect(503).header("retry-after").is_empty());
        app.patch("/api/item/1", r#"{"v":1}"#).await.expect(503);
    }
    assert_eq!(sent().await, before, "it was asked all the same");
    postgres.resume();
    app.until("used again", async |app| app.get("/api/item/50").await.status == 200).await;
    until(&app, DATABASE, 0).await;
    app.patch("/api/item/1", r#"{"v":1}"#).await.expect(200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn statements_that_time_out_refuse_nobody_else() {
    let world = World::new(
        "CREATE TABLE item (id int PRIMARY KEY, v int); INSERT INTO item SELECT g, 0 FROM generate_series(1, 100) g;
         CREATE FUNCTION slow() RETURNS int LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(60); RETURN 0; END $$;
         CREATE VIEW heavy AS SELECT id, slow() AS waited FROM item;",
    )
    .await;
    let config = world
        .config("resources: { item: {}, heavy: { key: id } }")
        .replace("database: {", "database: { statement_timeout: 200ms,");
    let app = App::start(&config).await;
    for id in 1..=5 {
        // Several in a row, with no answer in between.
        let paths: Vec<String> = (1..=4).map(|heavy| format!("/api/heavy/{}", 10 * id + heavy)).collect();
        let all = futures_util::future::join_all(paths.iter().map(|path| app.get(path))).await;
        assert!(all.iter().all(|reply| reply.status == 504), "{all:?}");
        app.get(&format!("/api/item/{id}")).await.expect(200);
    }
    until(&app, DATABASE, 0).await;
    // The database has stopped working on them, and their connections are free.
    world
        .until(
            "SELECT count(*) = 0 FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'PgSleep'",
        )
        .await;
    app.until("free", async |app| {
        app.metric(r#"cache_aside_pool_connections{backend="postgresql",state="in_use"}"#).await == 0
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_of_the_database_behind_a_pool_costs_no_read() {
    let mut postgres = Postgres::start().await;
    let database = postgres.create_database().await;
    database.client().await.batch_execute(SCHEMA).await.expect("the schema is sound");
    let proxy = Proxy::to(([127, 0, 0, 1], postgres.port()).into()).await;
    let redis = Redis::start().await;
    let through = database.url.replace(&format!(":{}/", postgres.port()), &format!(":{}/", proxy.addr().port()));
    assert_ne!(through, database.url);
    let app = App::start(&config(&through, &redis.url())).await;
    app.get("/api/item/1").await.expect(200);
    // For a moment nobody is there: as when a name leads to another server.
    proxy.cut();
    let (client, url) = (app.client.clone(), format!("{}/api/item/50", app.url));
    let read = tokio::spawn(async move { client.get(url).send().await.expect("it answers").status().as_u16() });
    app.until("tried again", async |app| app.metric("cache_aside_store_retries_total").await > 0).await;
    proxy.restore();
    let status = read.await.expect("the reader is there");
    assert!(status == 200 || status == 503, "{status}");
    app.until("used again", async |app| app.get("/api/item/51").await.status == 200).await;
    postgres.kill().await;
    tokio::time::timeout(Duration::from_secs(10), app.get("/api/item/52")).await.expect("it is refused").expect(503);
}

/// Reads that find nothing but connections that have ended.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_that_a_restart_has_ended_cost_no_read() {
    let mut postgres = Postgres::start().await;
    let database = postgres.create_database().await;
    database.client().await.batch_execute(SCHEMA).await.expect("the schema is sound");
    // Nobody knows one life of it from another: a connection that has ended is known by that alone.
    let config = config(&database.url, &Redis::shared().await.url()) + "invalidation: { mode: none }\n";
    let app = App::start(&config).await;
    app.until("kept open", async |app| {
        app.metric(r#"cache_aside_pool_connections{backend="postgresql",state="idle"}"#).await >= 4
    })
    .await;
    postgres.kill().await;
    until(&app, DATABASE, 2).await;
    postgres.start_again().await;
    until(&app, DATABASE, 0).await;
    let before = app.metric("cache_aside_store_retries_total").await;
    for id in 1..=20 {
        app.get(&format!("/api/item/{id}")).await.expect(200);
    }
    assert_eq!(app.metric("cache_aside_store_retries_total").await, before);
}

/// A database to which a connection takes longer than a question may.
pub async fn far_away(app: &App, proxy: &Proxy, breaker: &str) {
    until(app, breaker, 0).await;
    proxy.cut();
    until(app, breaker, 2).await;
    // A connection takes several times as long, a question once.
    proxy.delay(Duration::from_millis(600));
    until(app, breaker, 0).await;
    app.until("served", async |app| app.get("/api/item/60").await.status == 200).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_far_away_is_asked_again() {
    let (world, port) = (World::new(SCHEMA).await, Postgres::shared().await.port());
    let proxy = Proxy::to(([127, 0, 0, 1], port).into()).await;
    let through = format!(":{}/", proxy.addr().port());
    let config = world.config("invalidation: { mode: none }\nresources: { item: {} }\n");
    let app = App::start(&config.replace(&format!(":{port}/"), &through)).await;
    far_away(&app, &proxy, DATABASE).await;
}

/// What a service says that was just started.
pub async fn ping(config: &str) -> Result<(), StoreError> {
    let config = Config::from_yaml(config, "test", &Env::default()).expect("it is sound");
    open_store(&config).expect("the URL is sound").ping().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_has_no_room_or_refuses_us_answers() {
    let world = World::new(SCHEMA).await;
    let guest = format!("guest_{}", world.database.name);
    let config = world.config("resources: { item: {} }\n").replace("postgres@", &format!("{guest}@"));
    assert!(config.contains(&guest), "{config}");
    let refused = ping(&config).await;
    assert!(matches!(refused, Err(StoreError::Refused(_))), "there is no such role: {refused:?}");
    world.sql(&format!("CREATE ROLE {guest} LOGIN CONNECTION LIMIT 0")).await;
    let refused = ping(&config).await;
    assert!(matches!(&refused, Err(StoreError::Refused(said)) if said.contains("53300")), "{refused:?}");
    world.sql(&format!("ALTER ROLE {guest} CONNECTION LIMIT 1")).await;
    ping(&config).await.expect("it may");
    world.sql(&format!("DROP ROLE {guest}")).await;
}
