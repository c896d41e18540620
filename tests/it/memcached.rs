//! The stories of the other rooms, told with Memcached as the cache, and those of its own: what it forgets, refuses and can't do.

use std::time::{Duration, Instant};

use crate::app::{App, PATIENCE, World, command};
use crate::faults::Proxy;
use crate::invalidation::{self, RESOURCES, seen, warm};
use crate::outages::{Load, hits};
use crate::servers::Memcached;
use crate::{outages, stampede, writes};

/// A world whose cache is the Memcached that all tests share.
async fn world(schema: &str) -> World {
    let mut world = World::new(schema).await;
    world.redis_url = Memcached::shared().await.url();
    world
}

/// The same for stories that are not about staleness.
async fn trusting(schema: &str) -> World {
    World { redis_url: Memcached::shared().await.url(), ..World::trusting(schema).await }
}

/// A world with a Memcached of its own, which may be broken.
async fn alone(schema: &str, memcached: &Memcached) -> World {
    let mut world = World::new(schema).await;
    world.redis_url = memcached.url();
    world
}

#[tokio::test]
async fn every_kind_of_change_by_others_is_seen_at_every_replica() {
    invalidation::every_kind(world(invalidation::SCHEMA).await).await;
}

#[tokio::test]
async fn a_transaction_that_began_early_and_ends_late_is_seen() {
    invalidation::early_and_late(world(invalidation::SCHEMA).await).await;
}

#[tokio::test]
async fn what_a_write_changes_by_cascades_and_triggers_is_new_at_once_at_another_replica() {
    invalidation::cascades(world(&invalidation::with_cascades()).await).await;
}

#[tokio::test]
async fn a_very_large_statement_drops_the_whole_resource() {
    invalidation::very_large(world(invalidation::MANY_ITEMS).await).await;
}

#[tokio::test]
async fn whoever_runs_the_rounds_may_die_or_stop_and_another_goes_on() {
    invalidation::die_or_stop(world(invalidation::SCHEMA).await).await;
}

#[tokio::test]
async fn a_database_that_is_away_leaves_marked_hits_and_one_that_crashed_is_caught_up_with() {
    let memcached = Memcached::start().await;
    invalidation::marked_hits(&memcached.url()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn four_hundred_readers_at_two_replicas_make_one_query() {
    stampede::four_hundred_readers(trusting(stampede::SCHEMA).await).await;
}

#[tokio::test]
async fn a_filler_that_pauses_while_the_row_changes_is_refused() {
    stampede::paused_filler(trusting(stampede::SCHEMA).await).await;
}

#[tokio::test]
async fn a_fill_whose_lease_was_invalidated_finds_nothing() {
    stampede::invalidated_lease(trusting(stampede::SCHEMA).await).await;
}

#[tokio::test]
async fn a_live_filler_keeps_its_lock_for_longer_than_the_lock() {
    stampede::live_filler(trusting(stampede::SCHEMA).await).await;
}

#[tokio::test]
async fn a_filler_that_dies_delays_others_by_its_lock_alone() {
    stampede::dying_filler(trusting(stampede::SCHEMA).await).await;
}

#[tokio::test]
async fn no_read_after_a_write_is_older_at_any_replica() {
    writes::no_older(world(writes::SCHEMA).await).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn concurrent_readers_never_see_an_acknowledged_write_undone() {
    writes::concurrent(world(writes::SCHEMA).await).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_holds_no_reader_is_ever_ahead_of_another() {
    writes::never_ahead(world(writes::COUNTER).await).await;
}

#[tokio::test]
async fn with_holds_nothing_is_written_while_the_cache_can_not_be_told() {
    let mut memcached = Memcached::start().await;
    let world = alone(writes::COUNTER, &memcached).await;
    let app = world.app(writes::HOLD).await;
    app.patch("/api/counter/1", r#"{"v":1}"#).await.expect(200);
    memcached.kill().await;
    let refused = app.patch("/api/counter/1", r#"{"v":2}"#).await.expect(503);
    assert!(refused.text.contains("the cache can't be told"), "{refused:?}");
    assert_eq!(world.text("SELECT v::text FROM counter").await, "1");
    memcached.start_again().await;
    app.until("written", async |app| app.patch("/api/counter/1", r#"{"v":3}"#).await.status == 200).await;
    assert!(app.get("/api/counter/1").await.expect(200).text.contains(r#""v":3"#));
}

#[tokio::test]
async fn what_it_forgets_is_never_taken_for_current() {
    let mut memcached = Memcached::start().await;
    let world = alone(invalidation::SCHEMA, &memcached).await;
    let (one, two) = (world.app(RESOURCES).await, world.app(RESOURCES).await);
    let control = format!("md {}cache-aside:control\r\n", world.prefix);
    let spoilt = format!("ms {}cache-aside:control 5\r\nwrong\r\n", world.prefix);
    for fault in ["flush_all\r\n", &control, &spoilt, "restart", "killed", "hung", "flush_all\r\n"] {
        warm(&[&one, &two], &["/api/item/1", "/api/item/2"]).await;
        match fault {
            "restart" => memcached.start_again().await,
            "killed" => memcached.kill().await,
            "hung" => memcached.pause(),
            words => drop(memcached.say(words.as_bytes(), if words.starts_with('f') { "OK" } else { "HD" }).await),
        }
        let before = world.text("SELECT v::text FROM item WHERE id = 1").await;
        let next = before.parse::<u32>().expect("a number") + 1;
        world.sql(&format!("UPDATE item SET v = {next} WHERE id = 1")).await;
        seen(&[&one, &two], "/api/item/1", &format!(r#""v":{next}}}"#)).await;
        match fault {
            "killed" => memcached.start_again().await,
            "hung" => memcached.resume(),
            _ => {}
        }
        warm(&[&one, &two], &["/api/item/1"]).await;
        for app in [&one, &two] {
            assert!(app.get("/api/item/1").await.text.contains(&format!(r#""v":{next}}}"#)), "after {fault}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_or_a_pause_under_load_costs_no_answer() {
    let world = World::new(outages::SCHEMA).await;
    let mut memcached = Memcached::start().await;
    let app = App::start(&outages::config(&world.database.url, &memcached.url())).await;
    app.until("cached", hits).await;
    let load = Load::on(&app);
    for fault in ["killed", "hung"] {
        if fault == "killed" {
            memcached.kill().await;
        } else {
            memcached.pause();
        }
        for _ in 0..20 {
            assert_eq!(app.get("/api/item/1").await.expect(200).source(), "database", "{fault}");
            app.get("/readyz").await.expect(200);
        }
        assert!(app.get("/readyz?verbose").await.text.contains("[!] cache (memcached)"));
        if fault == "killed" {
            memcached.start_again().await;
        } else {
            memcached.resume();
        }
        app.until("used again", hits).await;
    }
    let (reads, bad, _) = load.end().await;
    assert!(reads > 100 && bad == 0, "{bad} of {reads} reads failed");
}

#[tokio::test]
async fn a_write_while_the_cache_is_away_is_never_followed_by_the_old_row() {
    let world = World::new(outages::SCHEMA).await;
    let memcached = Memcached::start().await;
    let proxy = Proxy::to(([127, 0, 0, 1], memcached.port()).into()).await;
    let config = outages::config(&world.database.url, &format!("memcached://{}", proxy.addr()));
    let alone = App::start(&format!("{config}invalidation: {{ mode: none }}\n")).await;
    let app = App::start(&config).await;
    // Without rounds, only what the process owes brings it up to date.
    let faults = [(7, Proxy::cut as fn(&Proxy), &app), (8, Proxy::black_hole, &app)];
    for (v, fault, app) in
        faults.into_iter().chain([(9, Proxy::cut as fn(&Proxy), &alone), (10, Proxy::black_hole, &alone)])
    {
        // Another's write, which without rounds is seen when it is dropped by hand.
        app.until("dropped", async |app| app.delete("/admin/cache/item/1").await.status == 204).await;
        app.until("cached", hits).await;
        // The entry outlives the cut: the memory itself is untouched.
        fault(&proxy);
        let patched = app.patch("/api/item/1", &format!(r#"{{"v":{v}}}"#)).await.expect(200);
        assert!(patched.header("cache-status").contains("detail=invalidation-pending"), "{patched:?}");
        assert_eq!(app.get("/api/item/1").await.json()["data"]["v"], v);
        proxy.restore();
        let started = Instant::now();
        loop {
            let reply = app.get("/api/item/1").await.expect(200);
            assert_eq!(reply.json()["data"]["v"], v, "{reply:?}");
            if reply.source() == "cache" {
                break;
            }
            assert!(started.elapsed() < PATIENCE, "the cache was never used again");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

#[tokio::test]
async fn a_replica_cut_off_from_the_cache_or_the_database_alone_serves_nothing_old() {
    let memcached = Memcached::start().await;
    let world = alone(invalidation::SCHEMA, &memcached).await;
    let cache = Proxy::to(([127, 0, 0, 1], memcached.port()).into()).await;
    let database = Proxy::to(([127, 0, 0, 1], world.database.port).into()).await;
    let direct = world.config(RESOURCES);
    let proxied = direct
        .replace(&memcached.url(), &format!("memcached://{}", cache.addr()))
        .replace(&format!("127.0.0.1:{}/", world.database.port), &format!("{}/", database.addr()));
    let (far, near) = (App::start(&proxied).await, App::start(&direct).await);
    for (v, proxy) in [(1, &cache), (2, &database)] {
        warm(&[&far, &near], &["/api/item/1"]).await;
        proxy.black_hole();
        world.sql(&format!("UPDATE item SET v = {v} WHERE id = 1")).await;
        seen(&[&near, &far], "/api/item/1", &format!(r#""v":{v}"#)).await;
        proxy.restore();
        warm(&[&far, &near], &["/api/item/1"]).await;
    }
}

/// Rows of 40 kB, three times as many as a memory of two megabytes takes.
const LARGE: &str = "CREATE TABLE item (id int PRIMARY KEY, v int NOT NULL, filler text NOT NULL);
    INSERT INTO item SELECT g, 0, repeat(md5(g::text), 1250) FROM generate_series(1, 150) g;";

#[tokio::test]
async fn under_pressure_it_forgets_and_nothing_old_is_served() {
    let memcached = Memcached::start_with(&["-m", "2"]).await;
    let world = alone(LARGE, &memcached).await;
    let app = world.app("resources: { item: {} }").await;
    let mut found = 0;
    for v in 1..=3 {
        for id in 1..=150 {
            let reply = app.get(&format!("/api/item/{id}")).await.expect(200);
            found += u32::from(app.get(&format!("/api/item/{id}")).await.expect(200).source() == "cache");
            let old = format!(r#""v":{},"#, v - 1);
            assert!(reply.text.contains(&old) || id <= v, "{:.80}", reply.text);
        }
        for id in [v, 150] {
            world.sql(&format!("UPDATE item SET v = {v} WHERE id = {id}")).await;
            seen(&[&app], &format!("/api/item/{id}"), &format!(r#""v":{v},"#)).await;
        }
        world.sql(&format!("UPDATE item SET v = {v}")).await;
        seen(&[&app], "/api/item/75", &format!(r#""v":{v},"#)).await;
    }
    assert!(found > 100, "it was in use: {found}");
    let evicted = memcached.say(b"stats\r\n", "END").await;
    let evicted = evicted.lines().find_map(|line| line.strip_prefix("STAT evictions ")?.parse::<u32>().ok());
    assert!(evicted.is_some_and(|evicted| evicted > 50), "{evicted:?}");
}

#[tokio::test]
async fn one_that_refuses_what_is_new_is_not_trusted_and_is_used_again() {
    let memcached = Memcached::start_with(&["-m", "2", "-M"]).await;
    let world = alone(invalidation::SCHEMA, &memcached).await;
    let app = world.app(RESOURCES).await;
    warm(&[&app], &["/api/item/1", "/api/item/2"]).await;
    // Of every size, until there is no room for any.
    let mut ballast = Vec::new();
    for size in (0..14).map(|power| 30_usize << power).chain([300, 700, 1_100, 1_500, 2_500]) {
        for number in 0..(2_200_000 / (size + 60)).min(12_000) {
            ballast.extend_from_slice(format!("ms b{size}-{number} {size} q\r\n").as_bytes());
            ballast.resize(ballast.len() + size, b'x');
            ballast.extend_from_slice(b"\r\n");
        }
    }
    ballast.extend_from_slice(b"mn\r\n");
    memcached.say(&ballast, "MN").await;
    app.until("refused", async |app| app.get("/api/item/1").await.expect(200).source() == "database").await;
    assert!(app.metric("cache_aside_errors_total{component=\"rounds\",kind=\"refused\"}").await > 0, "{}", app.log());
    for v in 1..=3 {
        world.sql(&format!("UPDATE item SET v = {v} WHERE id = 1")).await;
        seen(&[&app], "/api/item/1", &format!(r#""v":{v}"#)).await;
    }
    memcached.say(b"flush_all\r\n", "OK").await;
    warm(&[&app], &["/api/item/1"]).await;
    assert!(app.get("/api/item/1").await.text.contains(r#""v":3"#));
}

#[tokio::test]
async fn what_is_larger_than_an_item_may_be_is_served_and_not_cached() {
    let schema = "CREATE TABLE item (id int PRIMARY KEY, v int NOT NULL, filler text NOT NULL);
        INSERT INTO item VALUES (1, 0, repeat('0123456789', 120000)), (2, 0, repeat('0123456789', 90000));";
    let world = world(schema).await;
    let config = world.config("resources: { item: {} }").replace("key_prefix:", "max_entry: 4MiB, key_prefix:");
    let app = App::start(&config).await;
    warm(&[&app], &["/api/item/2"]).await;
    let counted = r#"cache_aside_fills_total{outcome="too_big",resource="item"}"#;
    for count in 1..=2 {
        assert_eq!(app.get("/api/item/1").await.expect(200).source(), "database");
        assert_eq!(app.metric(counted).await, count, "nobody waits for a lease that can't be filled");
    }
    let check = command(&config, &["check"]);
    let said = String::from_utf8_lossy(&check.stdout);
    assert!(said.contains("memcached 1.") && said.contains("start it with -I 5m"), "{said}");
    assert_eq!(check.status.code(), Some(0), "{said}");
}

#[tokio::test]
async fn keys_of_any_text_have_entries_of_their_own() {
    let world = world(
        "CREATE TABLE tag (name text PRIMARY KEY, v int NOT NULL);
         INSERT INTO tag VALUES ('a b', 1), (repeat('k', 400), 2), ('ä', 3), (repeat('é ', 120), 4), (E'x\\r\\nmd y', 5), ('YSBi', 6);",
    )
    .await;
    let app = world.app("resources: { tag: { write: [update] } }").await;
    let names = ["a%20b", &"k".repeat(400), "%C3%A4", &"%C3%A9%20".repeat(120), "x%0D%0Amd%20y", "YSBi"];
    for (name, v) in names.iter().zip(1..) {
        let path = format!("/api/tag/{name}");
        warm(&[&app], &[&path]).await;
        assert_eq!(app.get(&path).await.json()["data"]["v"], v, "{name}");
    }
    for (name, v) in names.iter().zip(11..) {
        let path = format!("/api/tag/{name}");
        app.patch(&path, &format!(r#"{{"v":{v}}}"#)).await.expect(200);
        assert_eq!(app.get(&path).await.json()["data"]["v"], v, "{name}");
    }
    // What the documentation says of a key can be typed.
    warm(&[&app], &["/api/tag/YSBi"]).await;
    let typed = Memcached::shared().await.say(format!("mg {}tag:YSBi s\r\n", world.prefix).as_bytes(), "HD").await;
    assert!(typed.starts_with("HD s"), "{typed}");
}

#[tokio::test]
async fn one_that_can_not_compare_and_set_is_refused_in_words() {
    let memcached = Memcached::start_with(&["-C"]).await;
    let world = alone(outages::SCHEMA, &memcached).await;
    let config = world.config("resources: { item: {} }");
    let app = App::start(&config).await;
    for _ in 0..3 {
        assert_eq!(app.get("/api/item/1").await.expect(200).source(), "database");
    }
    assert!(app.log().contains("started with -C"));
    let check = command(&config, &["check"]);
    assert_eq!(check.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&check.stdout).contains("started with -C"), "{check:?}");
}

#[tokio::test]
async fn a_server_of_another_kind_is_no_memcached() {
    let world = World::new(outages::SCHEMA).await;
    let redis = crate::servers::Redis::shared().await;
    let config = world.config("resources: { item: {} }");
    let config = config.replace(&world.redis_url, &redis.url().replace("redis://", "memcached://"));
    let check = command(&config, &["check"]);
    assert!(String::from_utf8_lossy(&check.stdout).contains("does not speak memcached's protocol"), "{check:?}");
}
