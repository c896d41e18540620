//! `warm_start`: a new replica holds what is hot at the others before anybody asks it, and begins whatever stands there.

use redis::AsyncCommands;

use crate::app::{App, World};
use crate::hot::{Readers, is_local};
use crate::invalidation::{SCHEMA, warm};
use crate::servers::Redis;

const LOCAL: &str = r#"cache_aside_requests_total{resource="item",result="hit",tier="local"}"#;
const QUERIES: &str = "cache_aside_store_queries_total{operation=\"row";

async fn world(schema: &str) -> World {
    World { cache_more: ", local: { warm_start: true }".into(), ..World::new(schema).await }
}

fn note(world: &World) -> String {
    format!("{}cache-aside:hot", world.prefix)
}

async fn redis() -> redis::aio::MultiplexedConnection {
    Redis::shared().await.client().await
}

/// Waits until what is noted names this, while some paths are read.
async fn noted(world: &World, app: &App, key: &str, paths: &[&str]) {
    app.until(&format!("noted: {key}"), async |app| {
        for path in paths {
            app.get(path).await.expect(200);
        }
        let text: Option<String> = redis().await.get(note(world)).await.expect("it answers");
        text.is_some_and(|text| text.contains(key))
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_replica_holds_what_is_hot_at_another_before_anybody_asks_it() {
    let world =
        world(&format!("{SCHEMA} CREATE TABLE other (id int PRIMARY KEY); INSERT INTO other VALUES (1);")).await;
    let config =
        "resources: { item: { local_ttl: 1h, lists: { team_id: {} } }, team: { local_hot_ttl: 1h }, other: {} }\n";
    let first = world.app(config).await;
    let (row, list, hot, elsewhere) = ("/api/item/7", "/api/item?team_id=2", "/api/team/2", "/api/other/1");
    warm(&[&first], &[row, list, hot, elsewhere]).await;
    // Of one alone, so that it is hot however busy the machine is.
    let readers = Readers::of(&first, &[hot, hot]);
    for key in ["team:2", "item:7", "item?team_id=2"] {
        noted(&world, &first, key, &[row, list, elsewhere]).await;
    }
    let text: String = redis().await.get(note(&world)).await.expect("it answers");
    assert!(!text.contains("other:1"), "nobody may hold it: {text}");
    let life: i64 = redis().await.pttl(note(&world)).await.expect("it answers");
    assert!(life > 0, "it ends by itself");
    // A stall may cost a start its trust in the cache, but not three of them.
    let mut seen = Vec::new();
    for _ in 0..3 {
        let next = world.app(config).await;
        let said = [next.get(row).await, next.get(list).await, next.get(hot).await];
        assert_eq!(next.metric(QUERIES).await, 0, "nothing was read from the database");
        if said.iter().all(is_local) {
            assert!(next.metric(LOCAL).await >= 2);
            assert!(!is_local(&next.get(elsewhere).await));
            readers.end().await;
            // What it holds is kept as right as any.
            world.sql("UPDATE item SET v = 5 WHERE id = 7").await;
            crate::invalidation::seen(&[&next], row, r#""v":5"#).await;
            return;
        }
        seen.push(said.map(|reply| reply.header("cache-status").to_owned()));
    }
    panic!("not local at three starts: {seen:?}\n{text}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_stands_where_the_note_should_be_nothing_comes_of_it() {
    let world = world(SCHEMA).await;
    let config = "resources: { item: { local_ttl: 1h }, team: {}, board: { key: id, local_ttl: 1h, depends_on: [item, team] } }\n";
    let mut redis = redis().await;
    let name = |key: &str| format!("{}{key}", world.prefix);
    let entries = |keys: &[(&str, String)]| serde_json::json!({ "version": 1, "entries": keys }).to_string();
    // What is there to be held, if somebody followed such a note.
    warm(&[&world.app(config).await], &PATHS).await;
    let sound = entries(&[("item", name("item:5"))]);
    let odd = [
        ("item", name("item:99999999999")),
        ("item", name("item:x")),
        ("item", name("item:6")),
        ("item", name("item:05")),
        ("item", name("item?team_id=1")),
        ("item", "item:5".into()),
        ("item", String::new()),
        ("item", name("cache-aside:control")),
        ("board", name("board:5")),
        ("team", name("team:1")),
        ("team", name("item:5")),
        ("nothing", name("nothing:1")),
        ("query:x", name("query:x:1")),
    ];
    let many: Vec<_> = (1000..1300).map(|id| ("item", name(&format!("item:{id}")))).collect();
    let stands = [
        Vec::new(),
        b"\xff\x00\xfe".to_vec(),
        b"null".to_vec(),
        b"{\"version\":1}".to_vec(),
        sound.replace("\"version\":1", "\"version\":2").into_bytes(),
        (sound + &" ".repeat(20 << 20)).into_bytes(),
        entries(&odd).into_bytes(),
        entries(&many).into_bytes(),
        "[".repeat(16 << 10).into_bytes(),
    ];
    for stands in stands {
        let what = String::from_utf8_lossy(&stands[..stands.len().min(60)]).into_owned();
        let () = redis.set(note(&world), stands).await.expect("it obeys");
        began(&world, config, &what).await;
    }
    let () = redis.del(note(&world)).await.expect("it obeys");
    let _: i64 = redis.rpush(note(&world), "a list").await.expect("it obeys");
    began(&world, config, "a list").await;
}

const PATHS: [&str; 3] = ["/api/item/5", "/api/team/1", "/api/board/5"];

/// It starts, and has read nothing from the database, and holds nothing.
async fn began(world: &World, config: &str, what: &str) {
    let app = world.app(config).await;
    assert_eq!((app.metric(QUERIES).await, app.metric(LOCAL).await), (0, 0), "{what}");
    for path in PATHS {
        let reply = app.get(path).await.expect(200);
        assert!(!is_local(&reply), "{what}: {path}: {reply:?}");
    }
    assert!(!app.log().contains("panicked"), "{what}: {}", app.log());
}

#[tokio::test]
async fn without_a_cache_it_begins_all_the_same() {
    let mut redis = Redis::start().await;
    let world = world(SCHEMA).await.on(&redis);
    redis.kill().await;
    let app = world.app("resources: { item: { local_ttl: 1h } }\n").await;
    app.get("/api/item/1").await.expect(200);
    drop(app);
    redis.start_again().await;
    redis.pause();
    let app = world.app("resources: { item: { local_ttl: 1h } }\n").await;
    app.get("/api/item/1").await.expect(200);
    redis.resume();
}
