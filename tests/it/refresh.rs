//! What is read often is loaded again before anybody must wait for it, and what is stale is served meanwhile where that is
//! allowed.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::app::{App, World};
use crate::stampede::{SCHEMA, evaluations};

/// Readers that go on until told to stop, and what they were told that was no plain hit.
fn readers(app: &App, path: &str, stop: &Arc<AtomicBool>) -> Vec<tokio::task::JoinHandle<Vec<String>>> {
    let reader = |_| {
        let (stop, client, url) = (Arc::clone(stop), app.client.clone(), format!("{}{path}", app.url));
        tokio::spawn(async move {
            let mut odd = Vec::new();
            while !stop.load(Ordering::Relaxed) {
                let reply = crate::app::reply(client.get(&url).send().await.expect("it answers")).await;
                let status = reply.header("cache-status");
                if reply.status != 200 || !status.contains("; hit") {
                    odd.push(format!("{} {status}, {}", reply.status, reply.header("server-timing")));
                }
            }
            odd
        })
    };
    (0..4).map(reader).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hot_key_passes_its_ttl_again_and_again_and_no_reader_waits() {
    let world = World::trusting(SCHEMA).await;
    // Each load takes 200 ms, and is begun so early that nobody waits where the machine stands still for a moment.
    let resources = "resources: { slow_item: { key: id, ttl: 2s, ttl_jitter: 0, refresh_ahead: 3 } }";
    let apps = [world.app(resources).await, world.app(resources).await];
    apps[0].get("/api/slow_item/7").await.expect(200);
    let before = evaluations(&world).await;
    let stop = Arc::new(AtomicBool::new(false));
    let readers: Vec<_> = apps.iter().flat_map(|app| readers(app, "/api/slow_item/7", &stop)).collect();
    world.until(&format!("SELECT last_value >= {before} + 4 FROM evaluations")).await;
    stop.store(true, Ordering::Relaxed);
    let mut odd = Vec::new();
    for reader in readers {
        odd.extend(reader.await.expect("no reader panics"));
    }
    assert_eq!(odd, Vec::<String>::new(), "everybody hit");
    // One refresher in the fleet: every load that was begun had a lease of its own, and nothing was loaded besides.
    let mut refreshes = 0;
    for app in &apps {
        refreshes += app.metric(r#"cache_aside_refreshes_total{kind="ahead",resource="slow_item"}"#).await;
        assert_eq!(app.metric(r#"cache_aside_fills_total{outcome="fenced",resource="slow_item"}"#).await, 0);
    }
    assert_eq!(evaluations(&world).await - before, i64::try_from(refreshes).expect("it is small"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_stale_is_served_while_one_reader_refreshes_it_and_a_purge_stays_one() {
    let world = World::trusting(SCHEMA).await;
    let resources = "resources: { slow_item: { key: id, ttl: 1ms, stale_while_revalidate: 10m, refresh_ahead: 0 } }";
    let app = world.app(resources).await;
    app.get("/api/slow_item/7").await.expect(200);
    world.sql("UPDATE item SET name = 'new' WHERE id = 7").await;
    let stale = app.get("/api/slow_item/7").await.expect(200);
    assert_eq!(stale.json()["data"]["name"], "old");
    assert!(stale.header("cache-status").contains("fwd=stale"), "{stale:?}");
    app.until("refreshed", async |app| app.get("/api/slow_item/7").await.json()["data"]["name"] == "new").await;
    assert!(app.metric(r#"cache_aside_refreshes_total{kind="stale",resource="slow_item"}"#).await > 0);
    assert!(app.metric(r#"cache_aside_requests_total{resource="slow_item",result="stale",tier="shared"}"#).await > 0);
    // Dropped while somebody refreshes it: neither the stale value nor the refresh comes back.
    world.sql("UPDATE item SET name = 'newest' WHERE id = 7").await;
    app.get("/api/slow_item/7").await.expect(200);
    app.delete("/admin/cache/slow_item/7").await.expect(204);
    assert_eq!(app.get("/api/slow_item/7").await.expect(200).json()["data"]["name"], "newest");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_tier_in_process_follows_what_was_refreshed() {
    let world = World::trusting(SCHEMA).await;
    let resources = "resources: { item: { key: id, ttl: 2s, ttl_jitter: 0, refresh_ahead: 10, local_ttl: 1h } }";
    let app = world.app(resources).await;
    let metric = r#"cache_aside_requests_total{resource="item",result="hit",tier="local"}"#;
    app.until("held in process", async |app| {
        app.get("/api/item/7").await.expect(200);
        app.metric(metric).await > 0
    })
    .await;
    // A change that no trigger sees: nothing drops the entry, only its TTL ends.
    world.sql("SET session_replication_role = replica; UPDATE item SET name = 'new' WHERE id = 7").await;
    let stop = Arc::new(AtomicBool::new(false));
    let readers = readers(&app, "/api/item/7", &stop);
    app.until("refreshed", async |app| app.get("/api/item/7").await.json()["data"]["name"] == "new").await;
    stop.store(true, Ordering::Relaxed);
    for reader in readers {
        assert_eq!(reader.await.expect("no reader panics"), Vec::<String>::new(), "everybody hit");
    }
    assert!(app.metric(r#"cache_aside_refreshes_total{kind="ahead",resource="item"}"#).await > 0);
}
