//! Redis Cluster, on six real nodes: the contract, changes by others, slots that move under load, and a node that dies.

use std::time::{Duration, Instant};

use cache_aside::cache::AnyCache;
use cache_aside::cache::redis::cluster::ClusterCache;

use crate::app::{App, PATIENCE, World};
use crate::cache_suite::{config, contract, trusted};
use crate::invalidation::{every_kind, seen, warm};
use crate::nodes::Nodes;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_keeps_the_contract() {
    let nodes = Nodes::start().await;
    let open = |prefix: &str| {
        let yaml = format!("cache: {{ url: \"{}\", key_prefix: \"{prefix}\", timeout: 5s }}", nodes.url());
        AnyCache::Cluster(ClusterCache::new(&config(&yaml), None, false).expect("the URL is sound"))
    };
    let cache = open("p:");
    trusted(&cache).await;
    let other = cache.attach();
    trusted(&other).await;
    contract(&cache, &other, "p:").await;
}

async fn world(nodes: &Nodes, schema: &str) -> World {
    let mut world = World::new(schema).await;
    world.redis_url = nodes.url();
    world
}

#[tokio::test]
async fn changes_by_others_reach_every_node_of_a_cluster() {
    let nodes = Nodes::start().await;
    every_kind(world(&nodes, crate::invalidation::SCHEMA).await).await;
    crate::tier::tier_in_process(world(&nodes, crate::invalidation::SCHEMA).await).await;
    crate::queries::depends(world(&nodes, crate::invalidation::SCHEMA).await).await;
}

const ITEMS: &str = "CREATE TABLE item (id int PRIMARY KEY, v int NOT NULL); \
                     INSERT INTO item SELECT g, 0 FROM generate_series(1, 200) g;";
const RESOURCES: &str = "resources: { item: { write: [update] } }\n";

/// Every row, in one batch.
fn all() -> String {
    let ids: Vec<String> = (1..=200).map(|id| id.to_string()).collect();
    format!("/api/item?id={}", ids.join(","))
}

/// The values of a batch, and how many of them came from the cache.
async fn batch(app: &App) -> (Vec<i64>, u64) {
    let reply = app.get(&all()).await.expect(200).json();
    let rows = reply["data"].as_array().expect("rows").iter();
    (rows.map(|row| row["v"].as_i64().expect("a number")).collect(), reply["source"]["cache"].as_u64().unwrap_or(0))
}

#[tokio::test]
async fn slots_move_under_load_and_no_row_is_wrong() {
    let nodes = Nodes::start().await;
    let world = world(&nodes, ITEMS).await;
    let (one, two) = (world.app(RESOURCES).await, world.app(RESOURCES).await);
    one.until("all of it cached", async |app| batch(app).await.1 == 200).await;
    let key = |id: u32| format!("{}item:{id}", world.prefix);
    let mut v = 0;
    for id in 1..=20 {
        let slot = nodes.slot(&key(id)).await;
        let from = nodes.holder(slot).await;
        let path = format!("/api/item/{id}");
        warm(&[&two], &[&path]).await;
        nodes
            .move_slot(slot, from, (from + 1) % 3, async || {
                // Its keys are elsewhere already, the slot is not.
                v += 1;
                one.patch(&path, &format!(r#"{{"v":{v}}}"#)).await.expect(200);
                let reply = two.get(&path).await.expect(200);
                assert!(reply.text.contains(&format!(r#""v":{v}}}"#)), "{reply:?}");
                world.sql(&format!("UPDATE item SET v = -{v} WHERE id = {id}")).await;
                seen(&[&one, &two], &path, &format!(r#""v":-{v}}}"#)).await;
            })
            .await;
        v += 1;
        let wrote = one.patch(&path, &format!(r#"{{"v":{v}}}"#)).await.expect(200);
        let pending = wrote.header("cache-status").contains("pending");
        let reply = two.get(&path).await.expect(200);
        assert!(pending || reply.text.contains(&format!(r#""v":{v}}}"#)), "{wrote:?} {reply:?}");
        seen(&[&one, &two], &path, &format!(r#""v":{v}}}"#)).await;
    }
    for app in [&one, &two] {
        app.until("all of it cached again", async |app| batch(app).await.1 == 200).await;
        let (values, _) = batch(app).await;
        assert!(values[20..].iter().all(|v| *v == 0) && values[..20].iter().all(|v| *v > 0), "{values:?}");
    }
}

#[tokio::test]
async fn what_changed_while_keys_were_away_is_not_forgotten() {
    let nodes = Nodes::start().await;
    let world = world(&nodes, ITEMS).await;
    let app = world.app(RESOURCES).await;
    let away = async |id: u32, change: &str| {
        let key = format!("{}item:{id}", world.prefix);
        let slot = nodes.slot(&key).await;
        let from = nodes.holder(slot).await;
        let path = format!("/api/item/{id}");
        warm(&[&app], &[&path]).await;
        let mut pending = false;
        nodes
            .move_keys_and_back(slot, from, (from + 1) % 3, async || {
                if change == "write" {
                    let wrote = app.patch(&path, r#"{"v":1}"#).await.expect(200);
                    pending = wrote.header("cache-status").contains("pending");
                } else {
                    world.sql(&format!("UPDATE item SET v = 1 WHERE id = {id}")).await;
                    // Until a round that began after that has ended, and lanes, which look half as often, have seen it: the
                    // key itself can't be read meanwhile.
                    let before = nodes.rounds(from, &world.prefix).await;
                    app.until("told", async |_| nodes.rounds(from, &world.prefix).await >= before + 6).await;
                }
            })
            .await;
        // At once, before any round has noticed.
        let reply = app.get(&path).await.expect(200);
        assert!(pending || reply.text.contains(r#""v":1}"#), "{reply:?}");
        seen(&[&app], &path, r#""v":1}"#).await;
    };
    away(1, "write").await;
    away(2, "outside").await;
}

#[tokio::test]
async fn an_entry_that_comes_back_with_its_slot_counts_for_nothing() {
    let nodes = Nodes::start().await;
    let world = world(&nodes, ITEMS).await;
    let app = world.app(RESOURCES).await;
    warm(&[&app], &["/api/item/1"]).await;
    let key = format!("{}item:1", world.prefix);
    let slot = nodes.slot(&key).await;
    let from = nodes.holder(slot).await;
    let mut conn = nodes.0[from].client().await;
    let kept: Vec<u8> = redis::cmd("DUMP").arg(&key).query_async(&mut conn).await.expect("it is there");
    nodes.move_slot(slot, from, (from + 1) % 3, async || {}).await;
    world.sql("UPDATE item SET v = 1 WHERE id = 1").await;
    seen(&[&app], "/api/item/1", r#""v":1}"#).await;
    // What the other node was told of never reached this one.
    warm(&[&app], &["/api/item/1"]).await;
    nodes.move_slot(slot, (from + 1) % 3, from, async || {}).await;
    let restore = redis::cmd("RESTORE").arg(&key).arg(60_000).arg(kept).arg("REPLACE").to_owned();
    restore.exec_async(&mut conn).await.expect("the slot is back");
    let started = Instant::now();
    loop {
        let reply = app.get("/api/item/1").await.expect(200);
        assert!(reply.text.contains(r#""v":1}"#), "{reply:?}");
        if reply.header("cache-status").starts_with("cache-aside; hit") {
            break;
        }
        assert!(started.elapsed() < PATIENCE, "{}", app.log());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn a_node_is_killed_under_load_and_another_takes_its_place() {
    let mut nodes = Nodes::start_with("2000").await;
    let world = world(&nodes, ITEMS).await;
    let (one, two) = (world.app(RESOURCES).await, world.app(RESOURCES).await);
    one.until("all of it cached", async |app| batch(app).await.1 == 200).await;
    let id = 7;
    let holder = nodes.holder(nodes.slot(&format!("{}item:{id}", world.prefix)).await).await;
    let path = format!("/api/item/{id}");
    nodes.0[holder].kill().await;
    let killed = Instant::now();
    let mut v = 0;
    loop {
        v += 1;
        let wrote = one.patch(&path, &format!(r#"{{"v":{v}}}"#)).await.expect(200);
        let pending = wrote.header("cache-status").contains("pending");
        let reply = two.get(&path).await.expect(200);
        assert!(pending || reply.text.contains(&format!(r#""v":{v}}}"#)), "{wrote:?} {reply:?}");
        let (values, cached) = batch(&two).await;
        assert!(pending || values[id - 1] == v, "{values:?}");
        if !pending && two.get(&path).await.header("cache-status").starts_with("cache-aside; hit") && cached == 200 {
            break;
        }
        assert!(killed.elapsed() < PATIENCE, "{}", two.log());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    two.until("done with the former master", async |app| {
        !app.get("/readyz?verbose").await.expect(200).text.contains("[!] cache")
    })
    .await;
    // The former master comes back and follows.
    nodes.0[holder].start_again().await;
    world.sql(&format!("UPDATE item SET v = 100000 WHERE id = {id}")).await;
    seen(&[&one, &two], &path, r#""v":100000}"#).await;
    warm(&[&one, &two], &[&path]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_hangs_is_not_asked_and_the_others_are() {
    // Nobody takes its place meanwhile.
    let nodes = Nodes::start_with("60000").await;
    let world = world(&nodes, ITEMS).await;
    let app = world.app(RESOURCES).await;
    app.until("all of it cached", async |app| batch(app).await.1 == 200).await;
    let breaker = async |index: usize, state: u8| {
        let line = format!("cache_aside_breaker_state{{backend=\"127.0.0.1:{}\"}} {state}", nodes.0[index].port());
        app.until(&line, async |app| app.get("/metrics").await.text.lines().any(|found| found == line)).await;
    };
    nodes.0[0].pause();
    breaker(0, 2).await;
    breaker(1, 0).await;
    breaker(2, 0).await;
    let (rows, cached) = batch(&app).await;
    assert!(rows.len() == 200 && (1..200).contains(&cached), "{cached} of {} from the cache", rows.len());
    nodes.0[0].resume();
    breaker(0, 0).await;
    app.until("all of it cached again", async |app| batch(app).await.1 == 200).await;
}
