//! What is read very often and what is very large: held in process for a moment, told at `/admin/top`, packed in the cache.

use std::cell::Cell;
use std::time::Duration;

use reqwest::Method;
use serde_json::Value;
use tokio::time::Instant;

use crate::app::{App, Reply, World};
use crate::invalidation::{SCHEMA, seen, warm};
use crate::servers::{Memcached, Redis};

/// Readers of some paths, until they are dropped.
pub struct Readers(tokio::task::JoinSet<()>);

impl Readers {
    /// As fast as they can.
    pub fn of(app: &App, paths: &[&str]) -> Self {
        Self::paced(app, paths, Duration::ZERO)
    }

    /// Each path 150 times a second: hot, and not for long once they are gone.
    fn steady(app: &App, paths: &[&str]) -> Self {
        Self::paced(app, paths, Duration::from_secs(1) / 75)
    }

    fn paced(app: &App, paths: &[&str], pause: Duration) -> Self {
        let mut readers = tokio::task::JoinSet::new();
        for path in [paths, paths].concat() {
            let (client, url) = (app.client.clone(), format!("{}{path}", app.url));
            readers.spawn(async move {
                let mut next = Instant::now();
                while let Ok(reply) = client.get(&url).send().await {
                    drop(reply.bytes().await);
                    // Those that a busy machine was late for are caught up with.
                    next += pause;
                    tokio::time::sleep_until(next).await;
                }
            });
        }
        Self(readers)
    }

    pub async fn end(mut self) {
        self.0.shutdown().await;
    }
}

pub fn is_local(reply: &Reply) -> bool {
    reply.header("cache-status").ends_with("detail=local")
}

async fn rows(app: &App, kind: &str) -> Vec<Value> {
    let top = app.get("/admin/top").await.expect(200).json();
    top[kind].as_array().unwrap_or_else(|| panic!("no {kind} in {top}")).clone()
}

#[tokio::test]
async fn what_is_hot_is_held_in_process_for_a_moment_stays_current_and_is_forgotten() {
    let world = World::new(SCHEMA).await;
    let resources =
        "resources: { item: { local_hot_ttl: 300ms, write: [update], lists: { team_id: {} } }, team: {} }\n";
    let (one, two) = (world.app(resources).await, world.app(resources).await);
    let (row, list, other) = ("/api/item/7", "/api/item?team_id=2", "/api/team/2");
    warm(&[&one, &two], &[row, list, other]).await;
    let readers = Readers::of(&two, &[row, list, other]);
    for path in [row, list] {
        two.until(&format!("held in process: {path}"), async |two| is_local(&two.get(path).await)).await;
    }
    let key = format!("{}item:7", world.prefix);
    let held =
        async |app: &App| rows(app, "hot").await.iter().any(|row| row["key"] == key && row["in_process"] == true);
    two.until("told", held).await;
    assert!(!is_local(&one.get(row).await), "it is hot elsewhere");
    let hottest = rows(&two, "hot").await;
    let of = |key: &str| hottest.iter().find(|row| row["key"] == key).unwrap_or_else(|| panic!("{key}: {hottest:?}"));
    assert_eq!(of(&key)["resource"], "item");
    assert!(of(&key)["reads_per_second"].as_f64() >= Some(100.0), "{hottest:?}");
    assert_eq!(of(&key)["size"].as_u64(), Some(two.get(row).await.data().len() as u64));
    // Who did not ask for it keeps reading what he wrote, everywhere.
    assert!(!is_local(&two.get(other).await));
    assert_eq!(of(&format!("{}team:2", world.prefix))["in_process"], false);
    readers.end().await;
    let readers = Readers::steady(&two, &[row, list]);
    for v in 1..=3 {
        one.patch(row, &format!(r#"{{"v":{v}}}"#)).await.expect(200);
        assert!(one.get(row).await.text.contains(&format!(r#""v":{v}"#)), "the writer's own replica is right at once");
        for path in [row, list] {
            seen(&[&two], path, &format!(r#""v":{v}"#)).await;
        }
        world.sql(&format!("UPDATE item SET v = {v} + 100 WHERE id = 7")).await;
        for path in [row, list] {
            seen(&[&two], path, &format!(r#""v":{}"#, v + 100)).await;
            two.until("held again", async |two| is_local(&two.get(path).await)).await;
        }
    }
    let local = r#"cache_aside_requests_total{resource="item",result="hit",tier="local"}"#;
    assert!(two.metric(local).await > 0);
    readers.end().await;
    let rate = async |app: &App| {
        let hot = rows(app, "hot").await;
        hot.iter().find(|row| row["key"] == key).and_then(|row| row["reads_per_second"].as_f64()).unwrap_or(0.0)
    };
    two.until("read by nobody", async |two| rate(two).await < 90.0).await;
    // Fewer reads than make it hot. What is held again after each moment would be seen within these.
    let (in_a_row, longer) = (Cell::new(0), 60);
    let forgotten = async |two: &App| {
        in_a_row.set(if is_local(&two.get(row).await) { 0 } else { in_a_row.get() + 1 });
        in_a_row.get() > longer
    };
    two.until("forgotten", forgotten).await;
    assert!(!held(&two).await);
}

#[tokio::test]
async fn what_stands_out_is_told_to_who_may_know_it_and_to_nobody_else() {
    use sha2::{Digest, Sha256};
    let digest: String = Sha256::digest("a").iter().map(|byte| format!("{byte:02x}")).collect();
    let world = World::new(
        "CREATE TABLE doc (id text PRIMARY KEY, body text);
         INSERT INTO doc VALUES ('secret-1', repeat('x', 5000)), ('secret-2', repeat('x', 3000)), ('secret-3', 'x');
         CREATE VIEW slow AS SELECT id, body, pg_sleep(0.3)::text AS slept FROM doc WHERE id = 'secret-3';",
    )
    .await;
    let rest = format!(
        "resources: {{ doc: {{}}, slow: {{ key: id }} }}\n\
         access: {{ tokens: [{{ name: admin, sha256: {digest}, scopes: [admin] }}, {{ name: reader, sha256: {:064}, scopes: [read] }}] }}\n",
        0
    );
    let config = world.config(&rest).replace("key_prefix:", "max_entry: 4KiB, key_prefix:");
    let app = App::start(&config).await;
    let ask = |method: Method, path: &str| app.ask(method, path).header("authorization", "Bearer a");
    let top = async |path: &str| ask(Method::GET, path).send().await;
    app.get("/admin/top").await.expect(401);
    assert_eq!(top("/admin/top").await.expect(200).json()["hot"], Value::Array(Vec::new()));
    for _ in 0..200 {
        for key in ["secret-2", "secret-2", "secret-2", "secret-3"] {
            app.get(&format!("/api/doc/{key}")).await.expect(200);
        }
    }
    app.get("/api/doc/secret-1").await.expect(200);
    // A fill that is refused: its entry is dropped while it is loaded.
    let (done, reading) = (Cell::new(false), app.get("/api/slow/secret-3"));
    let dropping = async {
        while !done.get() {
            ask(Method::DELETE, "/admin/cache/slow/secret-3").send().await.expect(204);
        }
    };
    let reading = async {
        reading.await.expect(200);
        done.set(true);
    };
    tokio::join!(reading, dropping);
    let said = top("/admin/top").await.expect(200).json();
    let keys = |said: &Value, kind: &str| -> Vec<String> {
        let rows = said[kind].as_array().unwrap_or_else(|| panic!("no {kind} in {said}"));
        rows.iter().map(|row| row["key"].as_str().expect("a text").replacen(&world.prefix, "", 1)).collect()
    };
    assert_eq!(keys(&said, "hot")[0], "doc:secret-2", "{said}");
    assert_eq!(keys(&said, "big")[..2], ["doc:secret-1", "doc:secret-2"], "{said}");
    assert_eq!(keys(&said, "refused"), ["slow:secret-3"], "{said}");
    assert!(
        said["big"][0]["size"].as_u64() > Some(5000) && said["refused"][0]["refused"].as_f64() >= Some(0.9),
        "{said}"
    );
    assert_eq!(said["hot"][0]["in_process"], false);
    let one = top("/admin/top?limit=1").await.expect(200).json();
    assert_eq!([keys(&one, "hot").len(), keys(&one, "big").len()], [1, 1]);
    top("/admin/top?limit=256").await.expect(200);
    for wrong in ["limit=0", "limit=257", "limit=-1", "limit=x", "limit=", "limit", "limit=1e2", "limit=%FF", "top=3"] {
        let refused = top(&format!("/admin/top?{wrong}")).await.expect(400);
        assert_eq!(refused.header("content-type"), "application/problem+json", "{wrong}");
    }
    let refused = ask(Method::POST, "/admin/top").send().await.expect(405);
    assert_eq!(refused.header("allow"), "GET, HEAD");
    assert_eq!(ask(Method::HEAD, "/admin/top").send().await.expect(200).text, "");
    top("/admin/top/").await.expect(404);
    top("/admin/top/1").await.expect(404);
    let metrics = app.get("/metrics").await.text;
    assert!(metrics.contains(r#"route="/admin/top""#));
    assert!(!metrics.contains("secret-") && !app.log().contains("secret-"), "keys are data");
}

const LISTED: &str = "CREATE TABLE item (id int PRIMARY KEY, team_id int, name text);
    INSERT INTO item SELECT g, 1 + g / 150, 'the name of item ' || g FROM generate_series(1, 200) g;";

const RESOURCES: &str = "resources: { item: { write: [update], lists: { team_id: {} } } }\n";

/// Writes, and waits until the round has delivered it too: from then on nobody drops the entry again.
async fn changed(by: &App, other: &App, path: &str, body: &str) {
    let rounds = r#"cache_aside_invalidations_total{path="round",resource="item"}"#;
    let delivered = async || by.metric(rounds).await + other.metric(rounds).await;
    let before = delivered().await;
    by.patch(path, body).await.expect(200);
    by.until("delivered", async |_| delivered().await > before).await;
}

/// One replica that packs and one that does not read each other's entries, and what is damaged is read from the database.
async fn packed(world: &World, stored: impl AsyncFn() -> u64, damage: impl AsyncFn()) {
    let plain = world.config(RESOURCES);
    let packing = plain.replace("key_prefix:", "compress_above: 1KiB, key_prefix:");
    assert_ne!(plain, packing);
    let (packing, plain) = (App::start(&packing).await, App::start(&plain).await);
    let (list, row) = ("/api/item?team_id=1", "/api/item/7");
    let loaded = packing.get(list).await.expect(200);
    warm(&[&packing], &[list, row]).await;
    let size = loaded.data().len() as u64;
    assert!(size > 7_000 && stored().await < size / 2, "{} of {size}", stored().await);
    for app in [&packing, &plain] {
        warm(&[app], &[list]).await;
        let cached = app.get(list).await.expect(200);
        assert_eq!((cached.data(), cached.header("etag")), (loaded.data(), loaded.header("etag")));
        app.ask(Method::GET, list).header("if-none-match", loaded.header("etag")).send().await.expect(304);
    }
    assert!(plain.get("/admin/cache/item/7").await.json()["size"].as_u64() < Some(200), "small ones stay as they are");
    changed(&packing, &plain, row, r#"{"name":"another"}"#).await;
    let new = plain.get(list).await.expect(200);
    assert!(new.text.contains("another"));
    warm(&[&plain, &packing], &[list]).await;
    assert!(stored().await > size, "this one did not pack it: {} of {size}", stored().await);
    assert_eq!(packing.get(list).await.data(), new.data());
    packing.delete("/admin/cache/item").await.expect(204);
    packing
        .until("packed again", async |packing| packing.get(list).await.source() == "cache" && stored().await < size)
        .await;
    damage().await;
    for app in [&packing, &plain] {
        let reply = app.get(list).await.expect(200);
        assert_eq!((reply.data(), reply.source().as_str()), (new.data(), "database"));
    }
    // It is in nobody's way: a change takes it away as any other.
    changed(&packing, &plain, row, r#"{"name":"mended"}"#).await;
    warm(&[&plain, &packing], &[list]).await;
    assert!(plain.get(list).await.text.contains("mended"));
}

#[tokio::test]
async fn a_list_is_packed_in_redis_and_read_by_who_packs_nothing() {
    let world = World::new(LISTED).await;
    let redis = Redis::shared().await;
    let key = format!("{}item?team_id=1", world.prefix);
    let stored = async || -> u64 {
        redis::cmd("STRLEN").arg(&key).query_async(&mut redis.client().await).await.expect("it obeys")
    };
    let damage = async || {
        let end = stored().await - 40;
        let mut set = redis::cmd("SETRANGE");
        set.arg(&key).arg(end).arg(vec![0xff_u8; 40]);
        let _: u64 = set.query_async(&mut redis.client().await).await.expect("it obeys");
    };
    packed(&world, stored, damage).await;
}

#[tokio::test]
async fn a_list_is_packed_in_memcached_and_what_no_item_would_hold_is_cached() {
    let memcached = Memcached::start().await;
    let mut world = World::new(&format!(
        "{LISTED} CREATE TABLE doc (id int PRIMARY KEY, body text); INSERT INTO doc VALUES (1, repeat('0123456789', 150000));"
    ))
    .await;
    world.redis_url = memcached.url();
    world.cache_more = ", max_entry: 4MiB, compress_above: 64KiB".into();
    let app = world.app("resources: { doc: {} }").await;
    warm(&[&app], &["/api/doc/1"]).await;
    assert_eq!(app.get("/api/doc/1").await.data().len(), 1_500_000 + r#"{"id":1,"body":""}"#.len());
    drop(app);
    memcached.say(b"flush_all\r\n", "OK").await;
    world.cache_more = String::new();
    let key = format!("{}item?team_id=1", world.prefix);
    let read = async || memcached.say(format!("get {key}\r\n").as_bytes(), "END").await;
    let stored = async || {
        let said = read().await;
        let first = said.lines().next().unwrap_or_default();
        first.rsplit(' ').next().and_then(|size| size.parse().ok()).unwrap_or_else(|| panic!("no size in {first}"))
    };
    let damage = async || {
        // What follows the end of a packed payload makes it as useless as a changed one.
        let append = format!("append {key} 0 0 5\r\n\u{1}\u{1}\u{1}\u{1}\u{1}\r\n");
        memcached.say(append.as_bytes(), "STORED").await;
    };
    packed(&world, stored, damage).await;
}
