//! Reads of a real PostgreSQL through a real Redis.

use reqwest::Method;
use serde_json::json;

use crate::app::World;

/// The columns of the table, as SQL text per row: what the API must answer, byte for byte.
const EXPECTED: &str = r#"SELECT row_to_json(whole)::text FROM "My Schema"."Täble" whole WHERE "Id" = "#;

#[tokio::test]
async fn every_type_comes_as_row_to_json_says_cold_and_cached() {
    let world = World::trusting(include_str!("types.sql")).await;
    let app = world.app("resources: { types: { table: '\"My Schema\".\"Täble\"', key: Id } }").await;
    for key in ["1", "9223372036854775807", "-5", "7", "-9223372036854775808"] {
        let expected = world.text(&format!("{EXPECTED}{key}")).await;
        for source in ["database", "cache"] {
            let reply = app.get(&format!("/api/types/{key}")).await.expect(200);
            assert_eq!(reply.data(), expected, "{key} from the {source}");
            assert_eq!(reply.source(), source);
        }
    }
    let batch = app.get("/api/types?Id=7,1").await.expect(200);
    let expected =
        format!("[{},{}]", world.text(&format!("{EXPECTED}7")).await, world.text(&format!("{EXPECTED}1")).await);
    assert_eq!(batch.text, format!(r#"{{"data":{expected},"missing":[],"source":{{"cache":2,"database":0}}}}"#));
}

#[tokio::test]
async fn a_key_of_any_type_finds_its_row_or_is_refused_at_the_door() {
    let world = World::trusting(
        "CREATE EXTENSION citext; CREATE TYPE mood AS ENUM ('happy', 'so-so');
         CREATE TABLE ints (k int PRIMARY KEY); INSERT INTO ints VALUES (1), (-7);
         CREATE TABLE uuids (k uuid PRIMARY KEY); INSERT INTO uuids VALUES ('a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11');
         CREATE TABLE moods (k mood PRIMARY KEY); INSERT INTO moods VALUES ('so-so');
         CREATE TABLE bytes (k bytea PRIMARY KEY); INSERT INTO bytes VALUES ('\\x00ff');
         CREATE TABLE times (k timestamptz PRIMARY KEY); INSERT INTO times VALUES ('2024-01-01 00:00+00');
         CREATE TABLE citexts (k citext PRIMARY KEY); INSERT INTO citexts VALUES ('Foo');
         CREATE TABLE numbers (k numeric PRIMARY KEY); INSERT INTO numbers VALUES (1.50);
         CREATE TABLE chars (k char(4) PRIMARY KEY); INSERT INTO chars VALUES ('ab');
         CREATE TABLE texts (k text PRIMARY KEY); INSERT INTO texts VALUES ('a,b/c %&?'), ('');
         CREATE TABLE dates (k date PRIMARY KEY); INSERT INTO dates VALUES ('2024-02-29');
         CREATE TABLE nets (k inet PRIMARY KEY); INSERT INTO nets VALUES ('10.0.0.1');",
    )
    .await;
    let names = "ints uuids moods bytes times citexts numbers chars texts dates nets";
    let resources: Vec<String> = names.split(' ').map(|name| format!("{name}: {{}}")).collect();
    let app = world.app(&format!("resources: {{ {} }}", resources.join(", "))).await;
    for (path, status) in [
        ("ints/1", 200),
        ("ints/01", 200),
        ("ints/%2B1", 200),
        ("ints/-7", 200),
        ("ints/2", 404),
        ("ints/99999999999999999999", 404),
        ("ints/one", 400),
        ("ints/1.0", 400),
        ("ints/1,2", 400),
        ("ints/%00", 400),
        ("ints/%FF", 400),
        ("uuids/A0EEBC999C0B4EF8BB6D6BB9BD380A11", 200),
        ("uuids/x", 400),
        ("moods/so-so", 200),
        ("moods/angry", 404),
        ("bytes/%5Cx00FF", 200),
        ("bytes/00ff", 400),
        ("times/2024-01-01T00:00:00%2B00:00", 200),
        ("times/2024-01-01T01:00:00%2B01:00", 200),
        ("times/yesteryear", 400),
        ("citexts/Foo", 200),
        ("citexts/fOO", 200),
        ("citexts/bar", 404),
        ("numbers/1.5", 200),
        ("numbers/1e99999", 404),
        ("numbers/one", 400),
        ("chars/ab", 200),
        ("chars/ab%20%20", 200),
        ("texts/a%2Cb%2Fc%20%25%26%3F", 200),
        ("texts/", 200),
        ("texts/a,b", 400),
        ("dates/2024-02-29", 200),
        ("dates/2023-02-29", 400),
        ("nets/10.0.0.1", 200),
        ("nets/10.0.0", 400),
    ] {
        for _ in 0..2 {
            let reply = app.get(&format!("/api/{path}")).await;
            assert_eq!(reply.status.as_u16(), status, "{path}: {reply:?}");
        }
    }
    // A row is cached only under the text that the database gives.
    for (path, cached) in [("ints/01", true), ("numbers/1.5", false), ("numbers/1.50", true), ("citexts/foo", false)] {
        app.get(&format!("/api/{path}")).await.expect(200);
        let again = app.get(&format!("/api/{path}")).await.expect(200);
        assert_eq!(again.source() == "cache", cached, "{path}");
    }
    app.get("/api/citexts/absent").await.expect(404);
    let again = app.get("/api/citexts/absent").await.expect(404);
    assert!(again.header("cache-status").contains("fwd=miss"), "{again:?}");
}

#[tokio::test]
async fn a_batch_keeps_its_order_names_what_is_missing_and_asks_each_backend_once() {
    let world = World::trusting(
        "CREATE TABLE item (id int PRIMARY KEY, name text); INSERT INTO item SELECT g, 'n' || g FROM generate_series(1, 50) g;
         CREATE TABLE line (a int, b text, v int, PRIMARY KEY (a, b)); INSERT INTO line VALUES (7, 'x', 1), (7, 'y,z', 2), (8, 'x', 3);",
    )
    .await;
    let app = world.app("resources: { item: {}, line: {} }").await;
    app.get("/api/item/3").await.expect(200);
    let reply = app.get("/api/item?id=5,3,99,5&id=1").await.expect(200).json();
    let ids: Vec<&serde_json::Value> =
        reply["data"].as_array().expect("it is a list").iter().map(|row| &row["id"]).collect();
    assert_eq!(json!(ids), json!([5, 3, 5, 1]));
    assert_eq!(reply["missing"], json!(["99"]));
    assert_eq!(reply["source"], json!({ "cache": 1, "database": 3 }));
    assert_eq!(app.metric(r#"cache_aside_store_queries_total{operation="rows",resource="item"}"#).await, 1);
    let again = app.get("/api/item?id=5,3,99,1").await.expect(200);
    assert_eq!(again.json()["source"], json!({ "cache": 3, "database": 0 }));
    assert!(again.header("cache-status").starts_with("cache-aside; hit"), "{again:?}");
    assert_eq!(app.metric(r#"cache_aside_store_queries_total{operation="rows",resource="item"}"#).await, 1);

    let lines = app.get("/api/line?key=8,x&key=7,y%2Cz&key=9,x").await.expect(200).json();
    assert_eq!(lines["data"], json!([{ "a": 8, "b": "x", "v": 3 }, { "a": 7, "b": "y,z", "v": 2 }]));
    assert_eq!(lines["missing"], json!(["9,x"]));
    app.get("/api/line/7,y%2Cz").await.expect(200);

    let many: Vec<String> = (0..1001).map(|id| id.to_string()).collect();
    app.get(&format!("/api/item?id={}", many.join(","))).await.expect(400);
    app.get("/api/item?id=1,x").await.expect(400);
    let absent = app.get("/api/item?id=99999999999").await.expect(200).json();
    assert_eq!(absent, json!({ "data": [], "missing": ["99999999999"], "source": { "cache": 0, "database": 0 } }));
}

#[tokio::test]
async fn a_declared_list_is_ordered_limited_and_cached() {
    let world = World::trusting(
        "CREATE TABLE product (id int PRIMARY KEY, category_id int, name text, price numeric);
         INSERT INTO product SELECT g, g % 3, 'p' || (g % 7), g FROM generate_series(1, 30) g;",
    )
    .await;
    let app = world
        .app("resources: { product: { lists: { category_id: { order_by: name desc, limit: 4 }, price: {} } } }")
        .await;
    let expected = world
        .text(
            "SELECT json_agg(t.id)::text FROM (SELECT id FROM product WHERE category_id = 1 ORDER BY name DESC, id LIMIT 4) t",
        )
        .await;
    for source in ["database", "cache"] {
        let reply = app.get("/api/product?category_id=1").await.expect(200).json();
        let ids: Vec<&serde_json::Value> =
            reply["data"].as_array().expect("it is a list").iter().map(|row| &row["id"]).collect();
        assert_eq!(json!(ids), serde_json::from_str::<serde_json::Value>(&expected).expect("it is JSON"));
        assert_eq!((&reply["truncated"], &reply["source"]), (&json!(true), &json!(source)));
    }
    let empty = app.get("/api/product?category_id=77").await.expect(200).json();
    assert_eq!((&empty["data"], empty.get("truncated")), (&json!([]), None));
    // Equal numerics have several texts: served, not cached.
    for _ in 0..2 {
        assert_eq!(app.get("/api/product?price=5.0").await.expect(200).source(), "database");
    }
    for (query, says) in [
        ("", "?category_id="),
        ("?colour=red", "colour"),
        ("?category_id=x", "integer"),
        ("?category_id=1&category_id=2", "several"),
        ("?category_id=1&id=2", "one parameter"),
    ] {
        let reply = app.get(&format!("/api/product{query}")).await.expect(400);
        assert!(reply.text.contains(says), "{query}: {reply:?}");
    }
    app.get("/api/product?category_id=99999999999").await.expect(200);
}

#[tokio::test]
async fn headers_tell_how_an_answer_came() {
    let world =
        World::trusting("CREATE TABLE item (id int PRIMARY KEY, name text); INSERT INTO item VALUES (1, 'a');").await;
    let app = world
        .app("invalidation: { mode: none }\nresources: { item: { ttl: 10s, ttl_jitter: 0, negative_ttl: 1h } }")
        .await;
    let only = |path: &'static str| app.ask(Method::GET, path).header("cache-control", "only-if-cached").send();
    only("/api/item/1").await.expect(504);
    let miss = app.get("/api/item/1").await.expect(200);
    assert_eq!(miss.header("cache-status"), "cache-aside; fwd=miss; stored");
    assert!(miss.header("server-timing").contains("db;dur="), "{miss:?}");
    assert_eq!(miss.header("cache-control"), "no-cache");
    let hit = only("/api/item/1").await.expect(200);
    assert!(hit.header("cache-status").starts_with("cache-aside; hit; ttl="), "{hit:?}");
    assert!(hit.header("cache-status").ends_with("detail=redis"), "{hit:?}");
    assert!(!hit.header("age").is_empty() && !hit.header("server-timing").contains("db;"), "{hit:?}");
    assert_eq!(hit.header("etag"), miss.header("etag"));
    let etag = hit.header("etag").to_owned();
    for theirs in [etag.clone(), format!("W/{etag}"), format!("\"x\", {etag}"), "*".into()] {
        let same = app.ask(Method::GET, "/api/item/1").header("if-none-match", &theirs).send().await.expect(304);
        assert_eq!((same.header("etag"), same.text.as_str()), (etag.as_str(), ""));
    }
    app.ask(Method::GET, "/api/item/1").header("if-none-match", "\"x\"").send().await.expect(200);
    let head = app.ask(Method::HEAD, "/api/item/1").send().await.expect(200);
    assert_eq!((head.text.as_str(), head.header("content-length")), ("", hit.header("content-length")));

    world.sql("UPDATE item SET name = 'b'").await;
    assert_eq!(app.get("/api/item/1").await.json()["data"]["name"], "a", "nothing told the cache");
    let refreshed = app.ask(Method::GET, "/api/item/1").header("cache-control", "no-cache").send().await.expect(200);
    assert_eq!(refreshed.json()["data"]["name"], "b");
    assert_eq!(refreshed.header("cache-status"), "cache-aside; fwd=request; stored");
    let after = app.get("/api/item/1").await;
    assert_eq!((after.json()["data"]["name"].as_str(), after.source().as_str()), (Some("b"), "cache"));
    assert_ne!(after.header("etag"), etag);

    let absent = app.get("/api/item/2").await.expect(404);
    assert_eq!(absent.header("content-type"), "application/problem+json");
    assert_eq!(absent.json()["request_id"], absent.header("x-request-id"));
    let negative = app.get("/api/item/2").await.expect(404);
    assert!(negative.header("cache-status").starts_with("cache-aside; hit"), "{negative:?}");

    let mine = app.ask(Method::GET, "/api/item/1").header("x-request-id", "my-id-7").send().await;
    assert_eq!(mine.header("x-request-id"), "my-id-7");
    for path in ["/api/item/1", "/api/item?id=1"] {
        let refused = app.delete(path).await.expect(405);
        assert_eq!(refused.header("allow"), "GET, HEAD");
    }
    app.get("/api/itme/1").await.expect(404);
    app.get("/nowhere").await.expect(404);
}

#[tokio::test]
async fn entries_end_with_their_ttl_and_not_found_with_its_own() {
    let world = World::trusting("CREATE TABLE item (id int PRIMARY KEY); INSERT INTO item VALUES (1);").await;
    let app = world.app("resources: { item: { ttl: 2s, negative_ttl: 300ms, refresh_ahead: 0 } }").await;
    app.get("/api/item/1").await.expect(200);
    app.get("/api/item/2").await.expect(404);
    assert_eq!(app.get("/api/item/1").await.source(), "cache");
    world.sql("INSERT INTO item VALUES (2)").await;
    app.until("found", async |app| app.get("/api/item/2").await.status == 200).await;
    app.until("past its TTL", async |app| app.get("/api/item/1").await.source() == "database").await;
    let inspected = app.get("/admin/cache/item/1").await.expect(200).json();
    assert_eq!(inspected["key"], format!("{}item:1", world.prefix));
}

#[tokio::test]
async fn dropped_entries_are_gone_and_a_dropped_resource_whole() {
    let world =
        World::trusting("CREATE TABLE item (id int PRIMARY KEY); INSERT INTO item SELECT generate_series(1, 9);").await;
    let resources = "resources: { item: {} }";
    let (app, other) = (world.app(resources).await, world.app(resources).await);
    for id in 1..=9 {
        app.get(&format!("/api/item/{id}")).await.expect(200);
    }
    app.delete("/admin/cache/item/1").await.expect(204);
    assert_eq!(other.get("/api/item/1").await.source(), "database");
    assert_eq!(other.get("/api/item/2").await.source(), "cache");
    app.delete("/admin/cache/item").await.expect(204);
    assert_eq!(app.get("/api/item/3").await.source(), "database", "for whoever asked, at once");
    other.until("dropped there too", async |other| other.get("/api/item/4").await.source() == "database").await;
    app.delete("/admin/cache/nothing").await.expect(404);
}

#[tokio::test]
async fn large_rows_are_served_and_not_cached() {
    let world = World::trusting(
        "CREATE TABLE doc (id int PRIMARY KEY, body text); INSERT INTO doc VALUES (1, repeat('x', 5000));",
    )
    .await;
    let config = world.config("resources: { doc: {} }").replace("key_prefix:", "max_entry: 4KiB, key_prefix:");
    let app = crate::app::App::start(&config).await;
    for _ in 0..2 {
        assert_eq!(app.get("/api/doc/1").await.expect(200).source(), "database");
    }
    assert_eq!(app.metric(r#"cache_aside_fills_total{outcome="too_big",resource="doc"}"#).await, 2);
}

#[tokio::test]
async fn a_view_is_served_by_the_key_that_is_declared() {
    let world = World::trusting(
        "CREATE TABLE item (id int PRIMARY KEY, name text); INSERT INTO item VALUES (1, 'a');
         CREATE VIEW loud AS SELECT id, upper(name) AS name FROM item;",
    )
    .await;
    let app = world.app("resources: { loud: { key: id, columns: [name, id] } }").await;
    assert_eq!(app.get("/api/loud/1").await.data(), r#"{"name":"A","id":1}"#);
}

#[tokio::test]
async fn a_table_that_changes_under_the_service_is_looked_at_anew() {
    let world =
        World::trusting("CREATE TABLE item (id int PRIMARY KEY, a int, b int); INSERT INTO item VALUES (1, 2, 3);")
            .await;
    let app = world.app("resources: { item: {} }").await;
    assert_eq!(app.get("/api/item/1").await.data(), r#"{"id":1,"a":2,"b":3}"#);
    world.sql("ALTER TABLE item DROP COLUMN a; ALTER TABLE item ADD COLUMN c text DEFAULT 'c'").await;
    app.ask(Method::GET, "/api/item/1").header("cache-control", "no-cache").send().await;
    app.until("bound anew", async |app| {
        let reply = app.get("/api/item/1").await;
        reply.status == 200 && reply.data() == r#"{"id":1,"b":3,"c":"c"}"#
    })
    .await;
}

#[tokio::test]
async fn one_key_that_the_database_cannot_read_costs_no_other_reader_an_answer() {
    let world = World::trusting(
        "CREATE TABLE day (d date PRIMARY KEY); INSERT INTO day VALUES ('2024-01-01'), ('2024-01-02');",
    )
    .await;
    let app = world.app("resources: { day: {} }").await;
    let (bad, good) = tokio::join!(app.get("/api/day?d=2024-01-01,garbage"), app.get("/api/day/2024-01-01"));
    bad.expect(400);
    good.expect(200);
    app.get("/api/day?d=2024-01-01,2024-01-02").await.expect(200);
}
