//! What tells of changes is installed in the database, told when it is missing, and taken away again.

use crate::app::{App, World, command};
use crate::invalidation::{PROMISE, RESOURCES, SCHEMA, seen, warm};

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
async fn a_table_that_is_no_longer_captured_is_past_the_cache_in_batches_too() {
    let world = World::new(SCHEMA).await;
    let app = world.app(RESOURCES).await;
    warm(&[&app], &["/api/item/1"]).await;
    world.sql("ALTER TABLE item DISABLE TRIGGER USER").await;
    // One read past the cache may have another reason: a busy machine.
    app.until("noticed", async |app| app.get("/readyz?verbose").await.text.contains("run cache-aside migrate")).await;
    for _ in 0..2 {
        let batch = app.get("/api/item?id=1,2").await.expect(200);
        assert_eq!(batch.json()["source"]["database"], 2, "{batch:?}");
    }
}
