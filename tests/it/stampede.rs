//! Many readers of one cold key, and fillers that pause or die: one query, and nothing stale.

use crate::app::{App, World};
use crate::servers::Redis;

/// Each evaluation of a row takes 200 ms and is counted.
pub const SCHEMA: &str = "
    CREATE TABLE item (id int PRIMARY KEY, name text);
    INSERT INTO item SELECT g, 'old' FROM generate_series(1, 100) g;
    CREATE SEQUENCE evaluations;
    CREATE FUNCTION slow(milliseconds int) RETURNS int LANGUAGE plpgsql VOLATILE AS $$
      BEGIN PERFORM nextval('evaluations'); PERFORM pg_sleep(milliseconds / 1000.0); RETURN 0; END $$;
    CREATE VIEW slow_item AS SELECT id, name, slow(200) AS waited FROM item;
    CREATE VIEW slower_item AS SELECT id, name, slow(1200) AS waited FROM item;";

const RESOURCES: &str = "resources: { slow_item: { key: id }, slower_item: { key: id }, item: { write: [update] } }";

pub async fn evaluations(world: &World) -> i64 {
    let client = world.database.client().await;
    let row = client.query_one("SELECT last_value - (NOT is_called)::int FROM evaluations", &[]).await;
    row.expect("the sequence is there").get::<_, i64>(0)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn four_hundred_readers_at_two_replicas_make_one_query() {
    four_hundred_readers(World::trusting(SCHEMA).await).await;
}

pub async fn four_hundred_readers(world: World) {
    let apps = [world.app(RESOURCES).await, world.app(RESOURCES).await];
    let before = evaluations(&world).await;
    let reads = (0..400).map(|index| {
        let (client, url) = (apps[index % 2].client.clone(), format!("{}/api/slow_item/7", apps[index % 2].url));
        tokio::spawn(async move { crate::app::reply(client.get(url).send().await.expect("it answers")).await })
    });
    for read in reads.collect::<Vec<_>>() {
        let reply = read.await.expect("no reader panics").expect(200);
        assert_eq!(reply.json()["data"]["name"], "old");
    }
    assert_eq!(evaluations(&world).await - before, 1);
    let coalesced = apps[0].metric(r#"cache_aside_coalesced_total{resource="slow_item"}"#).await
        + apps[1].metric(r#"cache_aside_coalesced_total{resource="slow_item"}"#).await;
    // How many came before it was stored is the machine's business.
    assert!(coalesced >= 1, "{coalesced}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cache_that_answers_late_costs_no_second_query() {
    let (world, redis) = (World::trusting(SCHEMA).await, Redis::start().await);
    let world = World { cache_more: ", timeout: 1s".into(), ..world }.on(&redis);
    let apps = [world.app(RESOURCES).await, world.app(RESOURCES).await];
    for app in &apps {
        app.until("cached", async |app| app.get("/api/item/1").await.source() == "cache").await;
    }
    let before = evaluations(&world).await;
    redis.pause();
    let reads = (0..40).map(|index| {
        let (client, url) = (apps[index % 2].client.clone(), format!("{}/api/slow_item/7", apps[index % 2].url));
        tokio::spawn(async move { client.get(url).send().await.expect("it answers").status() })
    });
    let reads: Vec<_> = reads.collect();
    // Their lookups have been given up, as on a machine that stands still; then it goes on.
    for app in &apps {
        let late = r#"cache_aside_errors_total{component="cache",kind="timeout"}"#;
        app.until("late", async |app| app.metric(late).await > 0).await;
    }
    redis.resume();
    for read in reads {
        assert_eq!(read.await.expect("no reader panics"), 200);
    }
    assert_eq!(evaluations(&world).await - before, 1);
}

#[tokio::test]
async fn a_batch_of_cold_keys_is_one_query_too_and_batches_share() {
    let world = World::trusting(SCHEMA).await;
    let app = world.app(RESOURCES).await;
    let before = evaluations(&world).await;
    let path = "/api/slow_item?id=1,2,3";
    let (one, other, single) = tokio::join!(app.get(path), app.get(path), app.get("/api/slow_item/2"));
    for reply in [one, other, single] {
        reply.expect(200);
    }
    assert_eq!(evaluations(&world).await - before, 3, "each row was evaluated once");
}

/// Starts a read at `app` and returns once its load is under way.
async fn load_under_way(world: &World, app: &App, path: &str) -> tokio::task::JoinHandle<crate::app::Reply> {
    let before = evaluations(world).await;
    let (client, url) = (app.client.clone(), format!("{}{path}", app.url));
    let read = tokio::spawn(async move { crate::app::reply(client.get(url).send().await.expect("it answers")).await });
    world.until(&format!("SELECT last_value - (NOT is_called)::int > {before} FROM evaluations")).await;
    read
}

#[tokio::test]
async fn a_filler_that_pauses_while_the_row_changes_is_refused() {
    paused_filler(World::trusting(SCHEMA).await).await;
}

pub async fn paused_filler(world: World) {
    let (paused, other) = (world.app(RESOURCES).await, world.app(RESOURCES).await);
    let read = load_under_way(&world, &paused, "/api/slow_item/7").await;
    paused.signal("STOP");
    // Another client changes the row and drops the entry, as a write through a table's own resource would.
    world.sql("UPDATE item SET name = 'new' WHERE id = 7").await;
    other.delete("/admin/cache/slow_item/7").await.expect(204);
    let refilled = other.get("/api/slow_item/7").await.expect(200);
    assert_eq!(refilled.json()["data"]["name"], "new");
    paused.signal("CONT");
    // It answers its own reader with what it read; that reader asked before the change.
    assert_eq!(read.await.expect("the reader is there").expect(200).json()["data"]["name"], "old");
    for app in [&paused, &other] {
        let after = app.get("/api/slow_item/7").await.expect(200);
        assert_eq!((after.json()["data"]["name"].as_str(), after.source().as_str()), (Some("new"), "cache"));
    }
    // Fenced, or not even asked where this machine stood still for longer than the cache is waited for.
    assert_eq!(paused.metric(r#"cache_aside_fills_total{outcome="stored",resource="slow_item"}"#).await, 0);
}

#[tokio::test]
async fn a_fill_whose_lease_was_invalidated_finds_nothing() {
    invalidated_lease(World::trusting(SCHEMA).await).await;
}

pub async fn invalidated_lease(world: World) {
    let app = world.app(RESOURCES).await;
    let read = load_under_way(&world, &app, "/api/slow_item/8").await;
    app.delete("/admin/cache/slow_item/8").await.expect(204);
    read.await.expect("the reader is there").expect(200);
    assert_eq!(app.metric(r#"cache_aside_fills_total{outcome="gone",resource="slow_item"}"#).await, 1);
    assert_eq!(app.get("/api/slow_item/8").await.source(), "database");
}

#[tokio::test]
async fn a_live_filler_keeps_its_lock_for_longer_than_the_lock() {
    live_filler(World::trusting(SCHEMA).await).await;
}

pub async fn live_filler(world: World) {
    let (one, other) = (world.app(RESOURCES).await, world.app(RESOURCES).await);
    let before = evaluations(&world).await;
    let (first, second) = tokio::join!(one.get("/api/slower_item/9"), other.get("/api/slower_item/9"));
    first.expect(200);
    second.expect(200);
    assert_eq!(evaluations(&world).await - before, 1);
}

#[tokio::test]
async fn a_filler_that_dies_delays_others_by_its_lock_alone() {
    dying_filler(World::trusting(SCHEMA).await).await;
}

pub async fn dying_filler(world: World) {
    let (mut dying, other) = (world.app(RESOURCES).await, world.app(RESOURCES).await);
    let before = evaluations(&world).await;
    let url = format!("{}/api/slower_item/10", dying.url);
    let client = dying.client.clone();
    let read = tokio::spawn(async move { client.get(url).send().await.is_err() });
    world.until(&format!("SELECT last_value - (NOT is_called)::int > {before} FROM evaluations")).await;
    dying.signal("KILL");
    dying.ended().await;
    assert!(read.await.expect("the reader is there"), "its own reader is cut off");
    other.get("/api/slower_item/10").await.expect(200);
    assert_eq!(evaluations(&world).await - before, 2);
}

#[tokio::test]
async fn a_reader_that_hangs_up_stops_no_load_that_others_wait_for() {
    let world = World::trusting(SCHEMA).await;
    let app = world.app(RESOURCES).await;
    let before = evaluations(&world).await;
    let read = load_under_way(&world, &app, "/api/slow_item/11").await;
    read.abort();
    assert_eq!(app.get("/api/slow_item/11").await.expect(200).json()["data"]["id"], 11);
    assert_eq!(evaluations(&world).await - before, 1);
}
