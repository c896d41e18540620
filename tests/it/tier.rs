//! The tier in process: it learns of every change, and is believed no more than the node behind it.

use crate::app::{App, World};
use crate::faults::Proxy;
use crate::invalidation::{SCHEMA, args, seen};
use crate::servers::Redis;

pub const LOCAL: &str =
    "resources: { item: { local_ttl: 1h, write: [create, update, delete], lists: { team_id: {} } } }\n";

/// Reads until it comes from the tier in process.
pub async fn warm_locally(apps: &[&App], paths: &[&str]) {
    for app in apps {
        for path in paths {
            let local = async |app: &App| app.get(path).await.header("cache-status").ends_with("detail=local");
            app.until(&format!("held in process: {path}"), local).await;
        }
    }
}

#[tokio::test]
async fn the_tier_in_process_learns_of_every_change() {
    tier_in_process(World::new(SCHEMA).await).await;
}

pub async fn tier_in_process(world: World) {
    let (one, two) = (world.app(LOCAL).await, world.app(LOCAL).await);
    let both = [&one, &two];
    let (row, absent, list) = ("/api/item/7", "/api/item/1007", "/api/item?team_id=2");
    let all = [row, absent, list];
    warm_locally(&both, &all).await;
    assert!(one.metric("cache_aside_requests_total{resource=\"item\",result=\"hit\",tier=\"local\"}").await > 0);
    world.sql("UPDATE item SET v = 1 WHERE id = 7").await;
    seen(&both, row, r#""v":1"#).await;
    seen(&both, list, r#""v":1"#).await;
    warm_locally(&both, &all).await;
    one.patch(row, r#"{"v":2}"#).await.expect(200);
    assert!(one.get(row).await.text.contains(r#""v":2"#), "the writer's own tier is right at once");
    seen(&both, row, r#""v":2"#).await;
    warm_locally(&both, &all).await;
    world.sql("INSERT INTO item VALUES (1007, 2, 5)").await;
    seen(&both, absent, r#""v":5"#).await;
    warm_locally(&both, &all).await;
    world.sql("UPDATE item SET v = v + 7 WHERE id < 2000").await;
    seen(&both, row, r#""v":9"#).await;
    warm_locally(&both, &all).await;
    world.sql("TRUNCATE item").await;
    seen(&both, row, "Not Found").await;
    warm_locally(&both, &[row]).await;
    // Dropped by a person: in every process.
    one.delete("/admin/cache/item/7").await.expect(204);
    for app in both {
        app.until("dropped", async |app| !app.get(row).await.header("cache-status").ends_with("detail=local")).await;
    }
    warm_locally(&both, &[row]).await;
    one.delete("/admin/cache/item").await.expect(204);
    for app in both {
        // Whoever asks second may find what the first has just stored.
        app.until("dropped", async |app| !app.get(row).await.header("cache-status").ends_with("detail=local")).await;
    }
}

#[tokio::test]
async fn the_tier_in_process_is_not_believed_when_its_node_can_not_be() {
    let world = World::new(SCHEMA).await;
    let redis = Redis::start().await;
    let proxy = Proxy::to(([127, 0, 0, 1], redis.port()).into()).await;
    let near = world.config(LOCAL).replace(&world.redis_url, &redis.url());
    let far = near.replace(&redis.url(), &format!("redis://{}", proxy.addr()));
    let (far, near) = (App::start(&far).await, App::start(&near).await);
    let mut conn = redis.client().await;
    let mut v = 0;
    for fault in ["black hole", "cut", "batches lost", "one replica stopped", "flushed"] {
        warm_locally(&[&far, &near], &["/api/item/1"]).await;
        match fault {
            "black hole" => proxy.black_hole(),
            "cut" => proxy.cut(),
            "batches lost" => {
                let _: redis::Value =
                    args(&["DEL", "cache-aside:changes"]).query_async(&mut conn).await.expect("it obeys");
            }
            "one replica stopped" => near.signal("STOP"),
            _ => {
                let _: redis::Value = args(&["FLUSHALL"]).query_async(&mut conn).await.expect("it obeys");
            }
        }
        v += 1;
        world.sql(&format!("UPDATE item SET v = {v} WHERE id = 1")).await;
        seen(&[&far], "/api/item/1", &format!(r#""v":{v}"#)).await;
        proxy.restore();
        near.signal("CONT");
        seen(&[&near], "/api/item/1", &format!(r#""v":{v}"#)).await;
    }
}
