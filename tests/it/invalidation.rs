//! Changes that others make: seen within the promised second, whoever made them and whatever failed in between.

use std::time::{Duration, Instant};

use crate::app::{App, PATIENCE, World, command};
use crate::faults::Proxy;
use crate::servers::{Kind, Postgres, Redis};
use crate::tier::{LOCAL, warm_locally};

pub const SCHEMA: &str = "
    CREATE TABLE team (id int PRIMARY KEY, name text);
    INSERT INTO team SELECT g, 'team ' || g FROM generate_series(1, 3) g;
    CREATE TABLE item (id int PRIMARY KEY, team_id int REFERENCES team ON DELETE CASCADE, v int NOT NULL DEFAULT 0);
    INSERT INTO item SELECT g, 1 + g % 2, 0 FROM generate_series(1, 100) g;
    CREATE VIEW board AS SELECT i.id, i.v, t.name FROM item i JOIN team t ON t.id = i.team_id;";

pub const RESOURCES: &str = "resources: { item: { write: [create, update, delete], lists: { team_id: {} } }, \
                         team: { write: [update, delete] }, board: { key: id, depends_on: [item, team] } }\n";

/// What no hit may be further behind than.
pub const PROMISE: Duration = Duration::from_secs(1);

/// Reads at all replicas until each has answered as expected. A hit that began later than the promise allows must be right
/// at once, unless it is marked.
pub async fn seen(apps: &[&App], path: &str, expected: &str) {
    let changed = Instant::now();
    for app in apps {
        loop {
            let late = changed.elapsed() > PROMISE;
            let reply = app.get(path).await;
            let status = reply.header("cache-status");
            // What was read past the cache says nothing of what is in it.
            let says_it = status.contains("; hit") || status.contains("stored");
            if reply.text.contains(expected) {
                if late || says_it {
                    break;
                }
            } else {
                let marked = status.contains("unverified");
                assert!(
                    !late || marked || reply.status != 200,
                    "{path} should be {expected}: {reply:?}\n{}",
                    app.log()
                );
                assert!(changed.elapsed() < PATIENCE, "{path} never was {expected}: {reply:?}\n{}", app.log());
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        // One look past the cache proves nothing.
        for _ in 0..10 {
            let reply = app.get(path).await;
            let marked = reply.header("cache-status").contains("unverified");
            let right = marked || reply.status == 503 || reply.text.contains(expected);
            assert!(right, "{path} was {expected}, and is not: {reply:?}\n{}", app.log());
            tokio::time::sleep(Duration::from_millis(3)).await;
        }
    }
}

/// Reads until it comes from the cache.
pub async fn warm(apps: &[&App], paths: &[&str]) {
    for app in apps {
        for path in paths {
            let hit = |reply: &crate::app::Reply| reply.header("cache-status").starts_with("cache-aside; hit");
            app.until(&format!("cached: {path}"), async |app| hit(&app.get(path).await)).await;
        }
    }
}

#[tokio::test]
async fn every_kind_of_change_by_others_is_seen_at_every_replica() {
    every_kind(World::new(SCHEMA).await).await;
}

pub async fn every_kind(world: World) {
    let (one, two) = (world.app(RESOURCES).await, world.app(RESOURCES).await);
    let both = [&one, &two];
    let (row, absent, list, other, view) =
        ("/api/item/7", "/api/item/1007", "/api/item?team_id=2", "/api/item?team_id=3", "/api/board/7");
    let all = [row, absent, list, other, view, "/api/team/2"];
    warm(&both, &all).await;
    world.sql("UPDATE item SET v = 1 WHERE id = 7").await;
    for path in [row, list, view] {
        seen(&both, path, r#""v":1"#).await;
    }
    warm(&both, &all).await;
    world.sql("INSERT INTO item VALUES (1007, 2, 5)").await;
    seen(&both, absent, r#""v":5"#).await;
    seen(&both, list, r#"{"id":1007"#).await;
    warm(&both, &all).await;
    world.sql("UPDATE item SET team_id = 3 WHERE id = 1007").await;
    seen(&both, other, r#"{"id":1007"#).await;
    seen(&both, list, r#"{"id":99,"team_id":2,"v":0}]"#).await;
    warm(&both, &all).await;
    world.sql("UPDATE item SET id = 2007 WHERE id = 7").await;
    seen(&both, row, "Not Found").await;
    seen(&both, list, r#"{"id":2007"#).await;
    warm(&both, &all).await;
    world.sql("UPDATE team SET name = 'renamed' WHERE id = 2; DELETE FROM item WHERE id = 1007").await;
    seen(&both, "/api/team/2", "renamed").await;
    seen(&both, absent, "Not Found").await;
    warm(&both, &all).await;
    world.sql("INSERT INTO item VALUES (7, 2, 8)").await;
    seen(&both, view, "renamed").await;
    warm(&both, &all).await;
    world.sql("TRUNCATE item").await;
    seen(&both, row, "Not Found").await;
    seen(&both, list, r#"{"data":[]"#).await;
    seen(&both, view, "Not Found").await;
}

#[tokio::test]
async fn a_transaction_that_began_early_and_ends_late_is_seen() {
    early_and_late(World::new(SCHEMA).await).await;
}

pub async fn early_and_late(world: World) {
    let app = world.app(RESOURCES).await;
    let slow = world.database.client().await;
    slow.batch_execute("BEGIN; UPDATE item SET v = 1 WHERE id = 1; SAVEPOINT s; UPDATE item SET v = 2 WHERE id = 2")
        .await
        .expect("it is sound");
    // Later ones overtake it, so that a cursor over ids would have passed it by.
    for id in 10..20 {
        let path = format!("/api/item/{id}");
        warm(&[&app], &[&path, "/api/item/1", "/api/item/2"]).await;
        world.sql(&format!("UPDATE item SET v = 3 WHERE id = {id}")).await;
        seen(&[&app], &path, r#""v":3"#).await;
    }
    slow.batch_execute("COMMIT").await.expect("it is sound");
    seen(&[&app], "/api/item/1", r#""v":1"#).await;
    seen(&[&app], "/api/item/2", r#""v":2"#).await;
}

#[tokio::test]
async fn what_a_write_changes_by_cascades_and_triggers_is_new_at_once_at_another_replica() {
    cascades(World::new(&with_cascades()).await).await;
}

/// A team with a thousand items, and a trigger that changes the team of an item.
pub fn with_cascades() -> String {
    format!(
        "{SCHEMA}
         INSERT INTO team VALUES (9, 'many'); INSERT INTO item SELECT g, 9, 0 FROM generate_series(1001, 2000) g;
         CREATE FUNCTION follow() RETURNS trigger LANGUAGE plpgsql AS
           $$ BEGIN UPDATE team SET name = 'followed ' || NEW.v WHERE id = NEW.team_id; RETURN NEW; END $$;
         CREATE CONSTRAINT TRIGGER follow AFTER UPDATE ON item DEFERRABLE INITIALLY DEFERRED
           FOR EACH ROW EXECUTE FUNCTION follow();"
    )
}

pub async fn cascades(world: World) {
    let (writer, reader) = (world.app(RESOURCES).await, world.app(RESOURCES).await);
    let rows: Vec<String> = (1001..=2000).step_by(37).map(|id| format!("/api/item/{id}")).collect();
    let paths: Vec<&str> = rows.iter().map(String::as_str).chain(["/api/item?team_id=9", "/api/team/1"]).collect();
    warm(&[&reader], &paths).await;
    writer.delete("/api/team/9").await.expect(204);
    for path in &paths[..rows.len()] {
        reader.get(path).await.expect(404);
    }
    assert_eq!(reader.get("/api/item?team_id=9").await.expect(200).data(), "[]");
    writer.patch("/api/item/2", r#"{"v":4}"#).await.expect(200);
    assert!(reader.get("/api/team/1").await.text.contains("followed 4"), "a deferred trigger's work counts too");
}

pub const MANY_ITEMS: &str =
    "CREATE TABLE item (id int PRIMARY KEY, v int); INSERT INTO item SELECT g, 0 FROM generate_series(1, 100000) g;";

#[tokio::test]
async fn a_very_large_statement_drops_the_whole_resource() {
    very_large(World::new(MANY_ITEMS).await).await;
}

pub async fn very_large(world: World) {
    let app = world.app("resources: { item: {} }").await;
    let paths: Vec<String> = (1..100_000).step_by(9_973).map(|id| format!("/api/item/{id}")).collect();
    for path in &paths {
        warm(&[&app], &[path]).await;
    }
    world.sql("UPDATE item SET v = 1").await;
    for path in &paths {
        seen(&[&app], path, r#""v":1"#).await;
    }
    let kept = world.text("SELECT count(*)::text FROM cache_aside.outbox").await;
    assert!(kept.parse::<u32>().expect("a number") < 10, "one row says it all: {kept}");
    // And many small statements between two rounds, which come to more than can be told one by one.
    world.sql("DO $$ BEGIN FOR i IN 1..12000 LOOP UPDATE item SET v = 2 WHERE id = i; END LOOP; END $$").await;
    seen(&[&app], &paths[1], r#""v":2"#).await;
}

#[tokio::test]
async fn whoever_runs_the_rounds_may_die_or_stop_and_another_goes_on() {
    die_or_stop(World::new(SCHEMA).await).await;
}

pub async fn die_or_stop(world: World) {
    // The first to start is the one that runs them.
    let mut first = world.app(RESOURCES).await;
    let (second, third) = (world.app(RESOURCES).await, world.app(RESOURCES).await);
    warm(&[&first, &second, &third], &["/api/item/1", "/api/item/2"]).await;
    first.signal("STOP");
    world.sql("UPDATE item SET v = 1 WHERE id = 1").await;
    seen(&[&second, &third], "/api/item/1", r#""v":1"#).await;
    warm(&[&second, &third], &["/api/item/1"]).await;
    world.sql("UPDATE item SET v = 2 WHERE id = 1").await;
    // It slept longer than what it knows is good for: nothing old may come out of it.
    tokio::time::sleep(PROMISE + PROMISE / 5).await;
    first.signal("CONT");
    assert!(first.get("/api/item/1").await.text.contains(r#""v":2"#));
    seen(&[&second, &third], "/api/item/1", r#""v":2"#).await;
    first.signal("KILL");
    first.ended().await;
    world.sql("UPDATE item SET v = 3 WHERE id = 1").await;
    seen(&[&second, &third], "/api/item/1", r#""v":3"#).await;
}

#[tokio::test]
async fn a_cache_that_comes_back_with_old_data_is_brought_up_to_date_first() {
    old_data(Kind::Redis).await;
}

pub async fn old_data(kind: Kind) {
    let world = World::new(SCHEMA).await;
    let mut redis = Redis::start_as(kind, &["--save", "3600", "1"]).await;
    let world = world.on(&redis);
    let app = world.app(RESOURCES).await;
    let mut conn = redis.client().await;
    for round in 1..=3 {
        warm(&[&app], &["/api/item/1", "/api/item/2"]).await;
        let () = redis::cmd("SAVE").query_async(&mut conn).await.expect("it saves");
        world.sql(&format!("UPDATE item SET v = {round} WHERE id = 1")).await;
        seen(&[&app], "/api/item/1", &format!(r#""v":{round}"#)).await;
        redis.kill().await;
        redis.start_again().await;
        conn = redis.client().await;
        // The dump has the row as it was before the change, and says so itself.
        for _ in 0..200 {
            assert!(app.get("/api/item/1").await.text.contains(&format!(r#""v":{round}"#)));
        }
        warm(&[&app], &["/api/item/1", "/api/item/2"]).await;
        assert!(app.get("/api/item/1").await.text.contains(&format!(r#""v":{round}"#)));
    }
}

#[tokio::test]
async fn a_database_that_is_away_leaves_marked_hits_and_one_that_crashed_is_caught_up_with() {
    let redis = Redis::start().await;
    marked_hits(&redis.url()).await;
}

pub async fn marked_hits(cache: &str) {
    let mut postgres = Postgres::start().await;
    let database = postgres.create_database().await;
    database.client().await.batch_execute(SCHEMA).await.expect("the schema is sound");
    let config = format!(
        "database: {{ url: \"{}\" }}\ncache: {{ url: \"{cache}\" }}\naccess: {{ write: public }}\n{RESOURCES}",
        database.url,
    );
    let app = App::start(&config).await;
    warm(&[&app], &["/api/item/1", "/api/item/2"]).await;
    postgres.kill().await;
    let killed = Instant::now();
    let mut marked = false;
    while killed.elapsed() < PROMISE * 3 {
        let late = killed.elapsed() > PROMISE;
        let reply = app.get("/api/item/1").await.expect(200);
        marked = reply.header("cache-status").contains("detail=unverified");
        assert!(marked || !late, "an unmarked hit, although nobody can know: {reply:?}");
    }
    assert!(marked);
    postgres.start_again().await;
    app.until("ready", async |app| app.get("/readyz").await.status == 200).await;
    database.client().await.batch_execute("UPDATE item SET v = 1 WHERE id = 1").await.expect("it is sound");
    seen(&[&app], "/api/item/1", r#""v":1"#).await;
    warm(&[&app], &["/api/item/1"]).await;
    assert!(!app.get("/api/item/1").await.header("cache-status").contains("unverified"));
}

#[tokio::test]
async fn a_cache_that_refuses_writes_is_not_trusted() {
    let world = World::new(SCHEMA).await;
    let redis = Redis::start().await;
    let config = world.config(RESOURCES).replace(&world.redis_url, &redis.url());
    let (one, two) = (App::start(&config).await, App::start(&config).await);
    let mut conn = redis.client().await;
    for (break_it, mend_it) in [
        (&["CONFIG", "SET", "maxmemory", "1"][..], &["CONFIG", "SET", "maxmemory", "0"][..]),
        (&["REPLICAOF", "127.0.0.1", "1"], &["REPLICAOF", "NO", "ONE"]),
        (&["FLUSHALL"], &["PING"]),
        (&["DEL", "cache-aside:control"], &["PING"]),
    ] {
        warm(&[&one, &two], &["/api/item/1", "/api/item/2"]).await;
        let _: redis::Value = args(break_it).query_async(&mut conn).await.expect("it obeys");
        let before = world.text("SELECT v::text FROM item WHERE id = 1").await;
        let next = before.parse::<u32>().expect("a number") + 1;
        world.sql(&format!("UPDATE item SET v = {next} WHERE id = 1")).await;
        seen(&[&one, &two], "/api/item/1", &format!(r#""v":{next}}}"#)).await;
        let _: redis::Value = args(mend_it).query_async(&mut conn).await.expect("it obeys");
        warm(&[&one, &two], &["/api/item/1"]).await;
        assert!(one.get("/api/item/1").await.text.contains(&format!(r#""v":{next}}}"#)));
    }
}

/// A command of Redis.
pub fn args(words: &[&str]) -> redis::Cmd {
    let mut cmd = redis::cmd(words[0]);
    cmd.arg(&words[1..]);
    cmd
}

#[tokio::test]
async fn a_replica_cut_off_from_the_cache_or_the_database_alone_serves_nothing_old() {
    let world = World::new(SCHEMA).await;
    let redis = Redis::start().await;
    let cache = Proxy::to(([127, 0, 0, 1], redis.port()).into()).await;
    let database = Proxy::to(([127, 0, 0, 1], world.database.port).into()).await;
    let direct = world.config(RESOURCES).replace(&world.redis_url, &redis.url());
    let proxied = direct
        .replace(&redis.url(), &format!("redis://{}", cache.addr()))
        .replace(&format!("127.0.0.1:{}/", world.database.port), &format!("{}/", database.addr()));
    let (far, near) = (App::start(&proxied).await, App::start(&direct).await);
    let mut v = 0;
    for cut in ["cache", "database"] {
        warm(&[&far, &near], &["/api/item/1"]).await;
        if cut == "cache" {
            cache.black_hole();
        } else {
            database.black_hole();
        }
        v += 1;
        world.sql(&format!("UPDATE item SET v = {v} WHERE id = 1")).await;
        seen(&[&near, &far], "/api/item/1", &format!(r#""v":{v}"#)).await;
        if cut == "cache" {
            cache.restore();
        } else {
            database.restore();
        }
        warm(&[&far, &near], &["/api/item/1"]).await;
    }
}

#[tokio::test]
async fn deployments_with_caches_of_their_own_do_not_disturb_each_other() {
    deployments(World::new(SCHEMA).await).await;
}

pub async fn deployments(world: World) {
    let mut blue_redis = Redis::start().await;
    let green = world.app(RESOURCES).await;
    let blue = App::start(&world.config(RESOURCES).replace(&world.redis_url, &blue_redis.url())).await;
    warm(&[&green, &blue], &["/api/item/1"]).await;
    blue_redis.kill().await;
    world.sql("UPDATE item SET v = 1 WHERE id = 1").await;
    seen(&[&green, &blue], "/api/item/1", r#""v":1"#).await;
    warm(&[&green], &["/api/item/1"]).await;
    blue_redis.start_again().await;
    warm(&[&blue], &["/api/item/1"]).await;
    assert!(blue.get("/api/item/1").await.text.contains(r#""v":1"#));
}

#[tokio::test]
async fn the_outbox_is_swept_and_a_cache_that_missed_too_much_begins_anew() {
    let world = World::new(SCHEMA).await;
    let app = world.app(RESOURCES).await;
    warm(&[&app], &["/api/item/1"]).await;
    app.signal("STOP");
    world.sql("UPDATE item SET v = 1 WHERE id = 1").await;
    // As if everything up to now had been taken eleven minutes ago.
    world.sql("INSERT INTO cache_aside.marks (at) VALUES (clock_timestamp() - interval '10 minutes 30 seconds')").await;
    world.sql("SELECT cache_aside.sweep(1000)").await;
    assert_eq!(world.text("SELECT count(*)::text FROM cache_aside.outbox").await, "0");
    app.signal("CONT");
    seen(&[&app], "/api/item/1", r#""v":1"#).await;
    // One look past the cache proves nothing: what it holds must be right.
    warm(&[&app], &["/api/item/1"]).await;
    assert!(app.get("/api/item/1").await.text.contains(r#""v":1"#));
    assert_eq!(app.log().matches("absent from now on").count(), 2, "at the start, and now");
}

#[tokio::test]
async fn a_memory_in_process_has_a_watermark_too() {
    let world = World::new(SCHEMA).await;
    let config = world.config(RESOURCES).replace(&world.redis_url, "memory:");
    let (one, two) = (App::start(&config).await, App::start(&config).await);
    warm(&[&one, &two], &["/api/item/1", "/api/item?team_id=2", "/api/board/1"]).await;
    two.patch("/api/item/1", r#"{"v":6}"#).await.expect(200);
    assert!(two.get("/api/item/1").await.text.contains(r#""v":6"#));
    for path in ["/api/item/1", "/api/item?team_id=2", "/api/board/1"] {
        seen(&[&one, &two], path, r#""v":6"#).await;
    }
}

#[tokio::test]
async fn a_person_can_drop_entries_from_outside() {
    let world = World::new(SCHEMA).await;
    let config = world.config(LOCAL);
    let app = App::start(&config).await;
    let paths = ["/api/item/1", "/api/item/2"];
    let cached = async |app: &App, path: &str| app.get(path).await.header("cache-status").contains("; hit");
    warm_locally(&[&app], &paths).await;
    let done = command(&config, &["invalidate", "item", "1"]);
    assert_eq!((done.status.code(), String::from_utf8_lossy(&done.stdout).as_ref()), (Some(0), "dropped 1 of item\n"));
    app.until("dropped", async |app| !cached(app, paths[0]).await).await;
    assert!(cached(&app, paths[1]).await);
    warm_locally(&[&app], &paths).await;
    assert!(command(&config, &["invalidate", "item"]).status.success());
    app.until("dropped", async |app| !cached(app, paths[1]).await).await;
    for (wrong, words) in [
        (&["invalidate", "itme"][..], "did you mean \"item\""),
        (&["invalidate", "item", "x"], "expected a whole number"),
    ] {
        let refused = command(&config, wrong);
        assert_eq!(refused.status.code(), Some(1));
        assert!(String::from_utf8_lossy(&refused.stderr).contains(words), "{refused:?}");
    }
    let in_process = command(&config.replace(&world.redis_url, "memory:"), &["invalidate", "item"]);
    assert_eq!(in_process.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&in_process.stderr).contains("in the service's own process"));
}

#[tokio::test]
async fn what_a_person_dropped_stays_dropped_when_the_cache_comes_back_with_it() {
    let world = World::new(SCHEMA).await;
    let mut redis = Redis::start_with(&["--save", "3600", "1"]).await;
    let config = world.config(RESOURCES).replace(&world.redis_url, &redis.url());
    let app = App::start(&config).await;
    // Nobody captures this.
    let silently = |id: u32| format!("SET session_replication_role = replica; UPDATE item SET v = 9 WHERE id = {id}");
    let paths = ["/api/item/1", "/api/item/2", "/api/item/3"];
    warm(&[&app], &paths).await;
    let () = redis::cmd("SAVE").query_async(&mut redis.client().await).await.expect("it saves");
    for id in 1..=3 {
        world.sql(&silently(id)).await;
    }
    app.delete("/admin/cache/item/1").await.expect(204);
    let dropped = command(&config, &["invalidate", "item", "2"]);
    assert!(dropped.status.success(), "{dropped:?}");
    redis.kill().await;
    redis.start_again().await;
    app.until("used again", async |app| app.get("/api/item/3").await.source() == "cache").await;
    let values: Vec<bool> = [app.get(paths[0]).await, app.get(paths[1]).await, app.get(paths[2]).await]
        .iter()
        .map(|reply| reply.text.contains(r#""v":9"#))
        .collect();
    assert_eq!(values, [true, true, false], "only the third was not dropped");
}

#[tokio::test]
async fn the_auditor_tells_equal_from_stale() {
    let world = World::new(SCHEMA).await;
    let rest = format!("{RESOURCES}telemetry: {{ audit_ratio: 1 }}\n");
    let app = world.app(&rest).await;
    warm(&[&app], &["/api/item/1"]).await;
    let checks = "cache_aside_consistency_checks_total{resource=\"item\",result=";
    app.until("audited", async |app| {
        // Not every hit can be compared where the machine stands still.
        app.get("/api/item/1").await;
        app.metric(&format!("{checks}\"equal\"")).await > 0
    })
    .await;
    assert_eq!(app.metric(&format!("{checks}\"stale\"")).await, 0);
    // A change that no trigger sees: what is promised nobody, the auditor finds.
    world.sql("SET session_replication_role = replica; UPDATE item SET v = 9 WHERE id = 1").await;
    let found = async |app: &App| {
        app.get("/api/item/1").await;
        app.metric(&format!("{checks}\"stale\"")).await > 0
    };
    app.until("found", found).await;
    assert!(app.log().contains("the cache holds what the database does not"));
}

#[tokio::test]
async fn a_database_that_was_put_back_has_no_entries_from_its_former_life() {
    let mut postgres = Postgres::start().await;
    let database = postgres.create_database().await;
    database.client().await.batch_execute(SCHEMA).await.expect("the schema is sound");
    let redis = Redis::start().await;
    let config = format!(
        "database: {{ url: \"{}\" }}\ncache: {{ url: \"{}\" }}\naccess: {{ write: public }}\n{RESOURCES}",
        database.url,
        redis.url()
    );
    let app = App::start(&config).await;
    let copy = postgres.back_up().await;
    app.until("connected again", async |app| app.get("/readyz").await.status == 200).await;
    database.client().await.batch_execute("UPDATE item SET v = 7 WHERE id = 1").await.expect("it is sound");
    seen(&[&app], "/api/item/1", r#""v":7"#).await;
    warm(&[&app], &["/api/item/1"]).await;
    postgres.put_back(&copy).await;
    app.until("seen to be put back", async |app| app.get("/api/item/1").await.text.contains(r#""v":0"#)).await;
    for _ in 0..50 {
        assert!(app.get("/api/item/1").await.text.contains(r#""v":0"#));
    }
}
