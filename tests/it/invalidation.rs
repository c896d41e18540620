//! Changes that others make: seen within the promised second, whoever made them and whatever failed in between.

use std::time::{Duration, Instant};

use crate::app::{App, PATIENCE, World, command};
use crate::faults::Proxy;
use crate::servers::{Kind, Postgres, Redis};

pub const SCHEMA: &str = "
    CREATE TABLE team (id int PRIMARY KEY, name text);
    INSERT INTO team SELECT g, 'team ' || g FROM generate_series(1, 3) g;
    CREATE TABLE item (id int PRIMARY KEY, team_id int REFERENCES team ON DELETE CASCADE, v int NOT NULL DEFAULT 0);
    INSERT INTO item SELECT g, 1 + g % 2, 0 FROM generate_series(1, 100) g;
    CREATE VIEW board AS SELECT i.id, i.v, t.name FROM item i JOIN team t ON t.id = i.team_id;";

pub const RESOURCES: &str = "resources: { item: { write: [create, update, delete], lists: { team_id: {} } }, \
                         team: { write: [update, delete] }, board: { key: id, depends_on: [item, team] } }\n";

/// What no hit may be further behind than.
const PROMISE: Duration = Duration::from_secs(1);

/// Reads at all replicas until each has answered as expected. A hit that began later than the promise allows must be right
/// at once, unless it is marked.
pub async fn seen(apps: &[&App], path: &str, expected: &str) {
    let changed = Instant::now();
    for app in apps {
        loop {
            let late = changed.elapsed() > PROMISE;
            let reply = app.get(path).await;
            if reply.text.contains(expected) {
                break;
            }
            let marked = reply.header("cache-status").contains("unverified");
            assert!(!late || marked || reply.status != 200, "{path} should be {expected}: {reply:?}\n{}", app.log());
            assert!(changed.elapsed() < PATIENCE, "{path} never was {expected}: {reply:?}\n{}", app.log());
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

pub const PARTITIONED: &str =
    "CREATE TABLE event (id int, day date, v int, PRIMARY KEY (id, day)) PARTITION BY RANGE (day);
         CREATE TABLE event_1 PARTITION OF event FOR VALUES FROM ('2026-01-01') TO ('2026-02-01');
         INSERT INTO event VALUES (1, '2026-01-05', 0);";

#[tokio::test]
async fn partitions_are_captured_and_those_that_come_later_too() {
    partitions(World::new(PARTITIONED).await).await;
}

pub async fn partitions(world: World) {
    let app = world.app("resources: { event: { lists: { id: {} } } }").await;
    let (row, list) = ("/api/event/1,2026-01-05", "/api/event?id=1");
    warm(&[&app], &[row, list]).await;
    world.sql("UPDATE event_1 SET v = 1").await;
    seen(&[&app], row, r#""v":1"#).await;
    seen(&[&app], list, r#""v":1"#).await;
    warm(&[&app], &[row, list]).await;
    world.sql("CREATE TABLE event_2 PARTITION OF event FOR VALUES FROM ('2026-02-01') TO ('2026-03-01')").await;
    world.sql("INSERT INTO event_2 VALUES (1, '2026-02-05', 7)").await;
    seen(&[&app], list, r#""v":7"#).await;
    warm(&[&app], &[list]).await;
    // From one partition into another.
    world.sql("UPDATE event SET day = '2026-02-06' WHERE day = '2026-01-05'").await;
    seen(&[&app], row, "Not Found").await;
    // Too many to be told one by one, also where somebody has meddled with the count.
    let many = "INSERT INTO event SELECT g, '2026-02-09', 0 FROM generate_series(100, 30100) g";
    world.sql(many).await;
    let rows = "SELECT count(*)::text FROM cache_aside.outbox WHERE image ->> 'day' = '2026-02-09'";
    let told = world.text(rows).await.parse::<u32>().expect("a number");
    assert!(told <= 10_000, "{told}");
    let last = "/api/event/30100,2026-02-09";
    for (v, before) in [
        (1, ""),
        (
            2,
            "SELECT set_config(name, '2000000', false) FROM (SELECT 'cache_aside.told_' || substr(\
        tgname, 13, 16) AS name FROM pg_trigger WHERE tgname LIKE 'cache_aside%' LIMIT 1) t;",
        ),
    ] {
        // What was told before must not do the work of what is told now.
        tokio::time::sleep(PROMISE).await;
        warm(&[&app], &[last]).await;
        world.sql(&format!("{before} UPDATE event SET v = {v} WHERE day = '2026-02-09'")).await;
        seen(&[&app], last, &format!(r#""v":{v}"#)).await;
    }
}

#[tokio::test]
async fn without_capture_nothing_is_cached_and_it_is_noticed_when_it_comes_and_goes() {
    let world = World::new(SCHEMA).await;
    let config = world.config(RESOURCES);
    let app = App::launch(&config).await;
    app.until("ready", async |app| app.get("/readyz").await.status == 200).await;
    for _ in 0..3 {
        let reply = app.get("/api/item/1").await.expect(200);
        assert_eq!(reply.header("cache-status"), "cache-aside; fwd=bypass");
    }
    assert!(app.get("/readyz?verbose").await.text.contains("run cache-aside migrate"));
    assert_eq!(app.metric("cache_aside_capture_complete{resource=\"item\"}").await, 0);
    assert!(app.log().contains("\"level\":\"WARN\"") && app.log().contains("served past the cache"));
    let check = command(&config, &["check"]);
    assert!(String::from_utf8_lossy(&check.stdout).contains("run cache-aside migrate"), "{check:?}");
    assert_eq!(check.status.code(), Some(1), "it serves, but does not cache");

    crate::app::migrate(&config);
    warm(&[&app], &["/api/item/1", "/api/item/2"]).await;
    assert_eq!(app.metric("cache_aside_capture_complete{resource=\"item\"}").await, 1);
    let check = command(&config, &["check"]);
    assert!(String::from_utf8_lossy(&check.stdout).contains("changes by anybody are captured"), "{check:?}");
    assert_eq!(check.status.code(), Some(0));
    assert!(command(&config, &["migrate", "--uninstall"]).status.success());
    world.sql("UPDATE item SET v = 1 WHERE id = 1").await;
    seen(&[&app], "/api/item/1", r#""v":1"#).await;
    let bypassed = async |app: &App| app.get("/api/item/2").await.header("cache-status") == "cache-aside; fwd=bypass";
    app.until("past the cache", bypassed).await;
    world.sql("UPDATE item SET v = 2 WHERE id = 2").await;
    // What was cached before the gap has missed a change: the new installation must not revive it.
    crate::app::migrate(&config);
    seen(&[&app], "/api/item/2", r#""v":2"#).await;
    warm(&[&app], &["/api/item/2"]).await;
    assert!(app.get("/api/item/2").await.text.contains(r#""v":2"#));
}

#[tokio::test]
async fn a_role_without_any_other_right_can_serve() {
    let world = World::new(SCHEMA).await;
    let role = format!("server_{}", world.database.name);
    world
        .sql(&format!(
            "CREATE ROLE {role} LOGIN; GRANT SELECT, UPDATE ON item, team TO {role}; GRANT SELECT ON board TO {role};"
        ))
        .await;
    let admin = world.config(RESOURCES);
    let config = admin.replace("postgres://postgres@", &format!("postgres://{role}@"));
    assert_ne!(admin, config);
    assert!(command(&admin, &["migrate"]).status.success());
    let app = App::launch(&config).await;
    app.until("told", async |app| app.get("/readyz?verbose").await.text.contains("--grant ROLE")).await;
    assert!(!command(&config, &["migrate"]).status.success(), "it can't install");
    let granted = command(&admin, &["migrate", "--grant", &role]);
    assert!(granted.status.success(), "{granted:?}");
    warm(&[&app], &["/api/item/1", "/api/item/2"]).await;
    app.patch("/api/item/1", r#"{"v":3}"#).await.expect(200);
    assert!(app.get("/api/item/1").await.text.contains(r#""v":3"#));
    world.sql("UPDATE item SET v = 4 WHERE id = 2").await;
    seen(&[&app], "/api/item/2", r#""v":4"#).await;
    // Writers need no right to the outbox either.
    world.sql(&format!("SET ROLE {role}; UPDATE item SET v = 5 WHERE id = 2")).await;
    seen(&[&app], "/api/item/2", r#""v":5"#).await;
}

#[tokio::test]
async fn installing_waits_for_no_writer_for_long_and_can_be_repeated_printed_and_undone() {
    let world = World::new(SCHEMA).await;
    let config = world.config(RESOURCES);
    let printed = command(&config, &["migrate", "--print"]);
    let script = String::from_utf8(printed.stdout).expect("it is text");
    assert_eq!(world.text("SELECT count(*)::text FROM pg_namespace WHERE nspname = 'cache_aside'").await, "0");
    let writer = world.database.client().await;
    writer.batch_execute("BEGIN; UPDATE item SET v = 9 WHERE id = 1").await.expect("it is sound");
    let migrating = tokio::task::spawn_blocking({
        let config = config.clone();
        move || command(&config, &["migrate"])
    });
    // It wants a lock that the writer holds; another writer must still come through.
    let queued = "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE query LIKE '%lock_timeout%' \
                  AND wait_event_type = 'Lock' AND datname = current_database())";
    world.until(queued).await;
    for id in 2..6 {
        world.sql(&format!("UPDATE item SET v = 1 WHERE id = {id}")).await;
    }
    writer.batch_execute("COMMIT").await.expect("it is sound");
    let done = migrating.await.expect("it runs");
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let before = world.text("SELECT string_agg(id::text, ',' ORDER BY relation) FROM cache_aside.captures").await;
    let again = command(&config, &["migrate"]);
    assert!(String::from_utf8_lossy(&again.stdout).contains("up to date"), "{again:?}");
    // Another configuration of the same database adds, and takes nothing away.
    let more = world.config("resources: { item: { lists: { v: {} } } }");
    crate::app::migrate(&more);
    let columns =
        world.text("SELECT array_to_string(columns, ',') FROM cache_aside.captures WHERE relation LIKE '%item%'");
    assert_eq!(columns.await, "id,team_id,v");
    assert_eq!(
        world.text("SELECT string_agg(id::text, ',' ORDER BY relation) FROM cache_aside.captures").await,
        before
    );
    assert!(command(&config, &["migrate", "--uninstall"]).status.success());
    assert_eq!(world.text("SELECT count(*)::text FROM pg_trigger WHERE tgname LIKE 'cache_aside%'").await, "0");
    // What was printed does the same when a person runs it, twice too.
    world.sql(&script).await;
    world.sql(&script).await;
    let app = App::start(&config).await;
    warm(&[&app], &["/api/item/1"]).await;
    world.sql("UPDATE item SET v = 10 WHERE id = 1").await;
    seen(&[&app], "/api/item/1", r#""v":10"#).await;
}

#[tokio::test]
async fn a_captured_column_that_goes_breaks_nobodys_writes() {
    let world = World::new(SCHEMA).await;
    let app = world.app("resources: { item: { lists: { v: {} } } }").await;
    warm(&[&app], &["/api/item/1"]).await;
    world
        .sql("ALTER TABLE item RENAME COLUMN v TO w; UPDATE item SET w = 5 WHERE id = 1; DELETE FROM item WHERE id = 2")
        .await;
    let rows = world.text("SELECT count(*)::text FROM cache_aside.outbox WHERE image IS NULL").await;
    assert_eq!(rows, "2");
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

fn args(words: &[&str]) -> redis::Cmd {
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

/// Reads until it comes from the tier in process.
async fn warm_locally(apps: &[&App], paths: &[&str]) {
    for app in apps {
        for path in paths {
            let local = async |app: &App| app.get(path).await.header("cache-status").ends_with("detail=local");
            app.until(&format!("held in process: {path}"), local).await;
        }
    }
}

const LOCAL: &str = "resources: { item: { local_ttl: 1h, write: [create, update, delete], lists: { team_id: {} } } }\n";

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
    let rest = format!("{RESOURCES}telemetry: {{ audit_ratio: 1 }}\ninvalidation: {{ max_staleness: 300ms }}\n");
    let app = world.app(&rest).await;
    warm(&[&app], &["/api/item/1"]).await;
    let checks = "cache_aside_consistency_checks_total{resource=\"item\",result=";
    app.until("audited", async |app| app.metric(&format!("{checks}\"equal\"")).await > 0).await;
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
async fn unusual_tables_are_captured_as_others_are() {
    let world = World::new(
        "CREATE TYPE mood AS ENUM ('ok', 'so so');
         CREATE TABLE feeling (m mood PRIMARY KEY, v int); INSERT INTO feeling VALUES ('so so', 0);
         CREATE TABLE moment (t timestamptz PRIMARY KEY, v int); INSERT INTO moment VALUES ('2026-01-01 00:00Z', 0);
         CREATE TABLE amount (n numeric(9, 2), b bytea, v int, PRIMARY KEY (n, b)); INSERT INTO amount VALUES (1.5, '\\x00ff', 0);
         CREATE TABLE part (id int PRIMARY KEY, v int) PARTITION BY RANGE (id);
         CREATE TABLE part_1 PARTITION OF part FOR VALUES FROM (0) TO (100); INSERT INTO part VALUES (1, 0);",
    )
    .await;
    // The partition first, then its parent, and both at once; then again.
    let partition = world.config("resources: { part_1: {} }");
    crate::app::migrate(&partition);
    let resources = "resources: { part_1: {}, part: {}, feeling: {}, moment: {}, amount: {} }";
    let app = world.app(resources).await;
    crate::app::migrate(&world.config(resources));
    let cases = [
        ("/api/part/1", "UPDATE part_1 SET v = 1"),
        ("/api/part_1/1", "UPDATE part SET v = 2"),
        ("/api/feeling/so%20so", "SET bytea_output = escape; UPDATE feeling SET v = 3"),
        ("/api/moment/2026-01-01T00:00:00%2B00:00", "SET timezone = 'Asia/Tokyo'; UPDATE moment SET v = 4"),
        ("/api/amount/1.50,%5Cx00ff", "SET bytea_output = escape; UPDATE amount SET v = 5"),
    ];
    for (index, (path, sql)) in cases.iter().enumerate() {
        warm(&[&app], &[path]).await;
        world.sql(sql).await;
        seen(&[&app], path, &format!(r#""v":{}"#, index + 1)).await;
    }
    // A table that is captured can still become a partition.
    world.sql("CREATE TABLE part_2 (id int PRIMARY KEY, v int)").await;
    let more = world.config("resources: { part_2: {}, part: {} }");
    crate::app::migrate(&more);
    world
        .sql(
            "ALTER TABLE part ATTACH PARTITION part_2 FOR VALUES FROM (100) TO (200); INSERT INTO part VALUES (101, 0)",
        )
        .await;
    // What fired once per statement does not see statements on the parent: told, and mended.
    let check = command(&more, &["check"]);
    assert!(String::from_utf8_lossy(&check.stdout).contains("part_2"), "{check:?}");
    assert_eq!(check.status.code(), Some(1));
    crate::app::migrate(&more);
    assert_eq!(command(&more, &["check"]).status.code(), Some(0));
}

#[tokio::test]
async fn a_schema_that_is_somebody_elses_is_not_adopted() {
    let world = World::new(SCHEMA).await;
    let role = format!("stranger_{}", world.database.name);
    world
        .sql(&format!(
            "CREATE ROLE {role}; CREATE SCHEMA cache_aside AUTHORIZATION {role}; SET ROLE {role};
             CREATE TABLE cache_aside.outbox (relation text)"
        ))
        .await;
    let refused = command(&world.config(RESOURCES), &["migrate"]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&refused.stderr).contains(&role), "{refused:?}");
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

#[tokio::test]
async fn a_table_that_is_no_longer_captured_is_past_the_cache_in_batches_too() {
    let world = World::new(SCHEMA).await;
    let app = world.app(RESOURCES).await;
    warm(&[&app], &["/api/item/1"]).await;
    world.sql("ALTER TABLE item DISABLE TRIGGER USER").await;
    let bypassed = async |app: &App| app.get("/api/item/2").await.header("cache-status") == "cache-aside; fwd=bypass";
    app.until("past the cache", bypassed).await;
    for _ in 0..2 {
        let batch = app.get("/api/item?id=1,2").await.expect(200);
        assert_eq!(batch.json()["source"]["database"], 2, "{batch:?}");
    }
}
