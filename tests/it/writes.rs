//! Writes through the API: what the database says of them, and that no read after their answer is older.

use reqwest::Method;
use serde_json::json;

use crate::app::{App, World};
use crate::faults::Proxy;

pub const SCHEMA: &str = "
    CREATE TABLE team (id int PRIMARY KEY);
    INSERT INTO team VALUES (1), (2);
    CREATE TABLE person (
      id text PRIMARY KEY, name varchar(10) NOT NULL, email text UNIQUE, team_id int REFERENCES team,
      age int DEFAULT 18 CHECK (age >= 0), n numeric(30, 10), data jsonb, tags text[],
      shout text GENERATED ALWAYS AS (upper(name)) STORED);
    CREATE TABLE item (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, name text);
    CREATE TABLE ref (id uuid PRIMARY KEY, item_id int REFERENCES item ON DELETE RESTRICT);
    CREATE TABLE frozen (id int PRIMARY KEY);";

const RESOURCES: &str = "
resources:
  person: { write: [create, update, delete], generate_key: ulid, lists: { team_id: {} } }
  item: { write: [create, delete] }
  ref: { write: [create], generate_key: uuidv7 }
  frozen: {}
";

#[tokio::test]
async fn a_row_is_created_replaced_merged_and_deleted() {
    let world = World::new(SCHEMA).await;
    let app = world.app(RESOURCES).await;
    let body = r#"{"name":"Zoe","team_id":1,"n":12345678901234567890.0123456789,"data":{"a":{"b":1,"c":2.50}},"tags":["x",null]}"#;
    let created = app.post("/api/person", body).await.expect(201);
    let path = created.header("location").to_owned();
    let id = created.json()["data"]["id"].as_str().expect("it is text").to_owned();
    assert_eq!((path.as_str(), id.len()), (format!("/api/person/{id}").as_str(), 26));
    assert!(created.text.contains(r#""n":12345678901234567890.0123456789"#), "{created:?}");
    assert_eq!(created.json()["data"]["shout"], "ZOE");
    let read = app.get(&path).await.expect(200);
    assert_eq!(format!(r#"{{"data":{}}}"#, read.data()), created.text);
    assert_eq!(read.header("etag"), created.header("etag"));

    let patched = app.patch(&path, r#"{"data":{"a":{"b":null,"d":[1]}},"email":"z@x"}"#).await.expect(200).json();
    assert_eq!(patched["data"]["data"], json!({ "a": { "c": 2.5, "d": [1] } }));
    assert_eq!((&patched["data"]["email"], &patched["data"]["team_id"]), (&json!("z@x"), &json!(1)));
    let read = app.get(&path).await.expect(200);
    assert_eq!((read.source().as_str(), &read.json()["data"]), ("database", &patched["data"]));

    let replaced = app.put(&path, r#"{"name":"Zoe"}"#).await.expect(200).json();
    assert_eq!(replaced["data"]["age"], 18, "omitted columns get their default");
    assert_eq!((&replaced["data"]["email"], &replaced["data"]["data"]), (&json!(null), &json!(null)));
    app.patch(&path, "{}").await.expect(200);

    app.delete(&path).await.expect(204);
    app.get(&path).await.expect(404);
    for gone in [app.delete(&path).await, app.put(&path, r#"{"name":"a"}"#).await, app.patch(&path, "{}").await] {
        gone.expect(404);
    }
    let item = app.post("/api/item", r#"{"name":"i"}"#).await.expect(201);
    assert_eq!(item.header("location"), "/api/item/1");
    assert_eq!(app.post("/api/item", r#"{"id":77,"name":"j"}"#).await.expect(201).header("location"), "/api/item/77");
    app.post("/api/item", "{}").await.expect(201);
    let uuid = app.post("/api/ref", r#"{"item_id":1}"#).await.expect(201).json()["data"]["id"].to_string();
    assert_eq!(&uuid[15..16], "7", "a UUID of version 7: {uuid}");
}

#[tokio::test]
async fn the_database_s_no_names_the_column() {
    let world = World::new(SCHEMA).await;
    let app = world.app(RESOURCES).await;
    app.post("/api/person", r#"{"id":"p1","name":"Ann","email":"a@x"}"#).await.expect(201);
    app.post("/api/item", r#"{"name":"i"}"#).await.expect(201);
    app.post("/api/ref", r#"{"item_id":1}"#).await.expect(201);
    for (body, status, column) in [
        (r#"{"id":"p1","name":"Bob"}"#, 409, "id"),
        (r#"{"name":"Bob","email":"a@x"}"#, 409, "email"),
        (r#"{"email":"b@x"}"#, 422, "name"),
        (r#"{"name":null}"#, 422, "name"),
        (r#"{"name":"much too long"}"#, 422, "name"),
        (r#"{"name":"Bob","age":"old"}"#, 422, "age"),
        (r#"{"name":"Bob","age":-1}"#, 422, "age"),
        (r#"{"name":"Bob","age":99999999999}"#, 422, "age"),
        (r#"{"name":"Bob","team_id":99}"#, 422, "team_id"),
        (r#"{"name":"B\u0000b"}"#, 422, "name"),
        (r#"{"name":"Bob","shout":"x"}"#, 422, "shout"),
        (r#"{"name":"Bob","colour":"x"}"#, 422, "colour"),
        (r#"{"name":"Bob","tags":{"a":1}}"#, 422, "tags"),
    ] {
        let refused = app.post("/api/person", body).await.expect(status);
        assert_eq!(refused.json()["columns"], json!([column]), "{body}: {refused:?}");
        assert!(refused.json()["detail"].as_str().is_some_and(|detail| detail.contains(column)), "{refused:?}");
        for secret in ["INSERT", "SELECT", "postgres://", "json_to_record"] {
            assert!(!refused.text.contains(secret), "{refused:?}");
        }
    }
    app.delete("/api/item/1").await.expect(409);
    let changed = app.put("/api/person/p1", r#"{"id":"p2","name":"Ann"}"#).await.expect(422);
    assert_eq!(changed.json()["columns"], json!(["id"]));
    app.put("/api/person/p1", r#"{"id":"p1","name":"Ann"}"#).await.expect(200);
    for (body, status) in
        [("{", 400), ("[]", 400), ("1", 400), ("{\"a\":1,\"a\":2}", 400), ("", 400), ("\u{feff}{}", 400)]
    {
        app.post("/api/person", body).await.expect(status);
    }
    let plain = app.client.post(format!("{}/api/person", app.url)).body("{}").send().await.expect("it answers");
    assert_eq!(plain.status(), 415);
    app.post("/api/person", &format!(r#"{{"name":"{}"}}"#, "x".repeat(2 << 20))).await.expect(413);
    let merge =
        app.ask(Method::PATCH, "/api/person/p1").header("content-type", "application/merge-patch+json; charset=utf-8");
    merge.send().await.expect(400);
    let refused = app.post("/api/frozen", "{}").await.expect(405);
    assert_eq!(refused.header("allow"), "GET, HEAD");
    assert_eq!(app.patch("/api/item/1", "{}").await.expect(405).header("allow"), "GET, HEAD, DELETE");
}

#[tokio::test]
async fn if_match_guards_a_write() {
    let world = World::new(SCHEMA).await;
    let app = world.app(RESOURCES).await;
    let created = app.post("/api/person", r#"{"id":"p1","name":"Ann"}"#).await.expect(201);
    let first = created.header("etag").to_owned();
    let guarded = |method: Method, tag: &str| {
        let ask = app.ask(method, "/api/person/p1").header("if-match", tag);
        async move { ask.json(r#"{"name":"Bob"}"#).send().await }
    };
    let second = guarded(Method::PATCH, &first).await.expect(200).header("etag").to_owned();
    for method in [Method::PATCH, Method::PUT, Method::DELETE] {
        guarded(method, &first).await.expect(412);
    }
    guarded(Method::PUT, &format!("W/{second}")).await.expect(412);
    guarded(Method::PUT, "*").await.expect(200);
    let current = app.get("/api/person/p1").await.header("etag").to_owned();
    guarded(Method::DELETE, &format!("\"other\", {current}")).await.expect(204);
    guarded(Method::DELETE, "*").await.expect(404);
}

#[tokio::test]
async fn no_read_after_a_write_is_older_at_any_replica() {
    no_older(World::new(SCHEMA).await).await;
}

pub async fn no_older(world: World) {
    let (writer, reader) = (world.app(RESOURCES).await, world.app(RESOURCES).await);
    reader.get("/api/person/p1").await.expect(404);
    reader.get("/api/person?team_id=1").await.expect(200);
    writer.post("/api/person", r#"{"id":"p1","name":"Ann","team_id":1}"#).await.expect(201);
    reader.get("/api/person/p1").await.expect(200);
    let names = |reply: &crate::app::Reply| reply.json()["data"].as_array().map_or(0, Vec::len);
    assert_eq!(names(&reader.get("/api/person?team_id=1").await), 1, "the list the row came into");
    assert_eq!(names(&reader.get("/api/person?team_id=2").await), 0);
    for turn in 0..20 {
        writer.patch("/api/person/p1", &format!(r#"{{"age":{turn}}}"#)).await.expect(200);
        for _ in 0..2 {
            assert_eq!(reader.get("/api/person/p1").await.json()["data"]["age"], turn);
            assert_eq!(reader.get("/api/person?team_id=1").await.json()["data"][0]["age"], turn);
            assert_eq!(reader.get("/api/person?id=p1").await.json()["data"][0]["age"], turn);
        }
    }
    writer.patch("/api/person/p1", r#"{"team_id":2}"#).await.expect(200);
    assert_eq!(names(&reader.get("/api/person?team_id=1").await), 0, "the list it left");
    assert_eq!(names(&reader.get("/api/person?team_id=2").await), 1, "the list it went to");
    writer.delete("/api/person/p1").await.expect(204);
    reader.get("/api/person/p1").await.expect(404);
    assert_eq!(names(&reader.get("/api/person?team_id=2").await), 0);
}

#[tokio::test]
async fn concurrent_readers_never_see_an_acknowledged_write_undone() {
    concurrent(World::new(SCHEMA).await).await;
}

pub async fn concurrent(world: World) {
    let apps = std::sync::Arc::new([world.app(RESOURCES).await, world.app(RESOURCES).await]);
    apps[0].post("/api/person", r#"{"id":"p1","name":"Ann","age":0}"#).await.expect(201);
    let acknowledged = std::sync::Arc::new(std::sync::atomic::AtomicI64::new(0));
    let readers: Vec<_> = (0..8)
        .map(|index| {
            let (apps, acknowledged) = (std::sync::Arc::clone(&apps), std::sync::Arc::clone(&acknowledged));
            tokio::spawn(async move {
                for _ in 0..150 {
                    let before = acknowledged.load(std::sync::atomic::Ordering::SeqCst);
                    let seen = apps[index % 2].get("/api/person/p1").await.expect(200).json();
                    let age = seen["data"]["age"].as_i64().expect("it is a number");
                    assert!(age >= before, "read {age} after {before} was acknowledged");
                }
            })
        })
        .collect();
    for age in 1..=150_i64 {
        let app = &apps[usize::try_from(age % 2).expect("0 or 1")];
        app.patch("/api/person/p1", &format!(r#"{{"age":{age}}}"#)).await.expect(200);
        acknowledged.store(age, std::sync::atomic::Ordering::SeqCst);
    }
    for reader in readers {
        reader.await.expect("no reader saw an older row");
    }
}

#[tokio::test]
async fn a_delete_by_another_spelling_takes_the_cached_row_too() {
    let world = World::trusting(
        "CREATE EXTENSION citext; CREATE TABLE tag (k citext PRIMARY KEY, v int); INSERT INTO tag VALUES ('Foo', 1);",
    )
    .await;
    let app = world.app("resources: { tag: { write: [update, delete] } }").await;
    app.get("/api/tag/Foo").await.expect(200);
    assert_eq!(app.get("/api/tag/Foo").await.source(), "cache");
    app.patch("/api/tag/fOO", r#"{"v":2}"#).await.expect(200);
    assert_eq!(app.get("/api/tag/Foo").await.json()["data"]["v"], 2);
    app.get("/api/tag/Foo").await.expect(200);
    app.delete("/api/tag/foo").await.expect(204);
    app.get("/api/tag/Foo").await.expect(404);
}

pub const COUNTER: &str =
    "CREATE TABLE counter (id int PRIMARY KEY, kind int, v int); INSERT INTO counter VALUES (1, 1, 0)";

pub const HOLD: &str =
    "resources: { counter: { consistency: hold, write: [create, update, delete], lists: { kind: {} } } }";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_holds_no_reader_is_ever_ahead_of_another() {
    never_ahead(World::new(COUNTER).await).await;
}

pub async fn never_ahead(world: World) {
    use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
    // The writer is far from the cache: there is a long while between its commit and its invalidation.
    let (scheme, rest) = world.redis_url.split_once(':').expect("a scheme");
    let port = rest.rsplit(':').next().and_then(|port| port.parse().ok()).expect("a port");
    let far = Proxy::to(([127, 0, 0, 1], port).into()).await;
    let config = world.config(HOLD);
    let writer = App::start(&config.replace(&world.redis_url, &format!("{scheme}://{}", far.addr()))).await;
    let apps = std::sync::Arc::new([App::start(&config).await, App::start(&config).await]);
    far.delay(std::time::Duration::from_millis(15));
    let (seen, stop) = (std::sync::Arc::new(AtomicI64::new(0)), std::sync::Arc::new(AtomicBool::new(false)));
    let readers: Vec<_> = (0..6)
        .map(|index| {
            let (apps, seen, stop) =
                (std::sync::Arc::clone(&apps), std::sync::Arc::clone(&seen), std::sync::Arc::clone(&stop));
            tokio::spawn(async move {
                let mut hits = 0;
                while !stop.load(Ordering::SeqCst) {
                    let before = seen.load(Ordering::SeqCst);
                    let app = &apps[index % 2];
                    // Some insist on what the database says.
                    let reply = if index < 2 {
                        app.ask(Method::GET, "/api/counter?kind=1").header("cache-control", "no-cache").send().await
                    } else {
                        app.get("/api/counter/1").await
                    };
                    let data = &reply.json()["data"];
                    let v = data.get("v").or_else(|| data[0].get("v")).and_then(serde_json::Value::as_i64);
                    let v = v.unwrap_or_else(|| panic!("no number in {reply:?}"));
                    assert!(v >= before, "read {v} after somebody had read {before}: {reply:?}");
                    seen.fetch_max(v, Ordering::SeqCst);
                    hits += u32::from(reply.source() == "cache");
                }
                hits
            })
        })
        .collect();
    for v in 1..=30_i64 {
        // While the cache can't be told, nothing is written.
        loop {
            let written = writer.patch("/api/counter/1", &format!(r#"{{"v":{v}}}"#)).await;
            if written.status != 503 {
                written.expect(200);
                break;
            }
        }
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    stop.store(true, Ordering::SeqCst);
    let mut hits = 0;
    for reader in readers {
        hits += reader.await.expect("no reader was ahead");
    }
    assert!(hits > 100, "the cache was in use: {hits}");
    // Lists are held too, and others' changes reach held resources as any other.
    apps[0].get("/api/counter?kind=1").await.expect(200);
    apps[1].post("/api/counter", r#"{"id":2,"kind":1,"v":5}"#).await.expect(201);
    assert!(apps[0].get("/api/counter?kind=1").await.text.contains(r#"{"id":2"#));
    apps[0].until("cached", async |app| app.get("/api/counter/2").await.source() == "cache").await;
    world.sql("UPDATE counter SET v = 6 WHERE id = 2").await;
    apps[0].until("seen", async |app| app.get("/api/counter/2").await.text.contains(r#""v":6"#)).await;
    // A refused write gives up what it held.
    apps[0].post("/api/counter", r#"{"id":2,"kind":1,"v":5}"#).await.expect(409);
    apps[0].until("cached", async |app| app.get("/api/counter/2").await.source() == "cache").await;
}

#[tokio::test]
async fn with_holds_nothing_is_written_while_the_cache_can_not_be_told() {
    let world = World::new(COUNTER).await;
    let mut redis = crate::servers::Redis::start().await;
    let app = App::start(&world.config(HOLD).replace(&world.redis_url, &redis.url())).await;
    app.patch("/api/counter/1", r#"{"v":1}"#).await.expect(200);
    redis.kill().await;
    app.patch("/api/counter/1", r#"{"v":2}"#).await.expect(503);
    assert_eq!(world.text("SELECT v::text FROM counter").await, "1");
    assert!(app.get("/api/counter/1").await.expect(200).text.contains(r#""v":1"#));
    redis.start_again().await;
    app.until("written", async |app| app.patch("/api/counter/1", r#"{"v":3}"#).await.status == 200).await;
    assert!(app.get("/api/counter/1").await.expect(200).text.contains(r#""v":3"#));
}
