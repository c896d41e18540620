//! What an operator sees.

use crate::app::{App, World};

#[tokio::test]
async fn metrics_tell_hits_from_misses_and_name_no_key() {
    let world =
        World::trusting("CREATE TABLE item (id int PRIMARY KEY); INSERT INTO item SELECT generate_series(1, 9);").await;
    let app = world.app("resources: { item: { write: [delete] } }").await;
    let before = app.get("/metrics").await.expect(200);
    assert!(before.header("content-type").starts_with("text/plain; version=0.0.4"), "{before:?}");
    assert!(!before.text.contains("cache_aside_hit_ratio{"), "absent before the first request");
    app.get("/api/item/1").await.expect(200);
    for _ in 0..3 {
        app.get("/api/item/1").await.expect(200);
    }
    app.get("/api/item/987654321").await.expect(404);
    app.get("/api/item/987654321").await.expect(404);
    app.get("/api/item?id=1,2").await.expect(200);
    app.delete("/api/item/3").await.expect(204);
    let text = app.get("/metrics").await.text;
    for line in [
        r#"cache_aside_requests_total{resource="item",result="hit",tier="shared"} 4"#,
        r#"cache_aside_requests_total{resource="item",result="miss",tier="database"} 3"#,
        r#"cache_aside_requests_total{resource="item",result="negative",tier="shared"} 1"#,
        r#"cache_aside_hit_ratio{resource="item"} 0.625"#,
        r#"cache_aside_miss_ratio{resource="item"} 0.375"#,
        r#"cache_aside_hit_ratio{resource="_all"} 0.625"#,
        r#"cache_aside_fills_total{outcome="stored",resource="item"} 3"#,
        r#"cache_aside_invalidations_total{path="write",resource="item"} 1"#,
        r#"cache_aside_store_queries_total{operation="row",resource="item"}"#,
        r#"cache_aside_request_duration_seconds_count{resource="item",result="hit"}"#,
        r#"cache_aside_cache_operation_duration_seconds_count{operation="get"}"#,
        r#"cache_aside_pool_connections{backend="postgresql",state="idle"}"#,
        r#"cache_aside_pool_connections{backend="redis",state="in_use"}"#,
        r#"http_requests_total{method="GET",route="/api/{resource}/{key}",status="200"}"#,
        r#"http_request_duration_seconds_bucket{method="GET",route="/api/{resource}/{key}",le="0.0001"}"#,
        "cache_aside_build_info{version=",
        "process_resident_memory_bytes",
    ] {
        assert!(text.lines().any(|found| found.starts_with(line)), "{line} is not in\n{text}");
    }
    assert!(!text.contains("987654321"), "no key is a label");
}

#[tokio::test]
async fn management_has_a_port_of_its_own_where_one_is_given() {
    let world = World::trusting("CREATE TABLE item (id int PRIMARY KEY); INSERT INTO item VALUES (1);").await;
    let config = world.config("resources: { item: {} }\n")
        + "server: { listen: \"127.0.0.1:0\", management_listen: \"127.0.0.2:0\", drain_delay: 0s }\n";
    let app = App::launch(&config).await;
    let management = app
        .log()
        .lines()
        .find_map(|line| Some(line.split_once("listening on 127.0.0.2:")?.1.split('"').next()?.to_owned()))
        .expect("it logs both addresses");
    let get = async |path: &str| {
        let url = format!("http://127.0.0.2:{management}{path}");
        app.client.get(url).send().await.expect("it answers").status().as_u16()
    };
    app.until("ready", async |_| get("/readyz").await == 200).await;
    app.get("/api/item/1").await.expect(200);
    assert_eq!((get("/metrics").await, get("/admin/cache/item/1").await, get("/api/item/1").await), (200, 200, 404));
    for path in ["/metrics", "/readyz", "/livez", "/admin/cache/item/1"] {
        app.get(path).await.expect(404);
    }
}

#[tokio::test]
async fn the_log_is_json_and_holds_no_password() {
    let world = World::trusting("CREATE TABLE item (id int PRIMARY KEY);").await;
    let config =
        world.config("resources: { item: {} }").replace("postgres://postgres@", "postgres://postgres:hunter2@");
    let app = App::start(&config).await;
    assert!(app.log().lines().all(|line| serde_json::from_str::<serde_json::Value>(line).is_ok()), "{}", app.log());
    assert!(app.log().contains("starting") && !app.log().contains("hunter2"), "{}", app.log());
}
