//! WAL mode: the promises that triggers keep are kept without them, and what can only go wrong here.

use std::time::Duration;

use crate::app::{App, World, command};
use crate::invalidation::{self as stories, RESOURCES, SCHEMA, seen, warm};
use crate::pool::through;
use crate::servers::{Postgres, Redis};
use crate::{capture, tier};

/// With this, the log tells all of a row's past.
const FULL: &str = "ALTER TABLE item REPLICA IDENTITY FULL;";

#[tokio::test]
async fn every_kind_of_change_is_seen() {
    stories::every_kind(World::decoding(SCHEMA).await).await;
}

#[tokio::test]
async fn every_kind_of_change_is_seen_where_all_of_the_past_is_told() {
    stories::every_kind(World::decoding(&format!("{SCHEMA}{FULL}")).await).await;
}

#[tokio::test]
async fn a_transaction_that_began_early_and_ends_late_is_seen() {
    stories::early_and_late(World::decoding(SCHEMA).await).await;
}

#[tokio::test]
async fn a_very_large_statement_drops_the_whole_resource() {
    stories::very_large(World::decoding(stories::MANY_ITEMS).await).await;
}

#[tokio::test]
async fn partitions_are_captured_under_the_name_of_the_whole() {
    capture::partitions(World::decoding(capture::PARTITIONED).await).await;
}

#[tokio::test]
async fn whoever_runs_the_rounds_or_decodes_may_die_or_stop() {
    stories::die_or_stop(World::decoding(SCHEMA).await).await;
}

#[tokio::test]
async fn deployments_share_a_slot() {
    stories::deployments(World::decoding(SCHEMA).await).await;
}

#[tokio::test]
async fn the_tier_in_process_learns_of_every_change() {
    tier::tier_in_process(World::decoding(&format!("{SCHEMA}{FULL}")).await).await;
}

#[tokio::test]
async fn what_a_write_changes_by_cascades_and_triggers_is_new_at_once() {
    stories::cascades(World::decoding(&stories::with_cascades()).await).await;
}

#[tokio::test]
async fn a_list_is_dropped_although_nobody_says_that_a_row_left_it() {
    let world = World::decoding(SCHEMA).await;
    let app = world.app(RESOURCES).await;
    let (former, other) = ("/api/item?team_id=1", "/api/item?team_id=2");
    warm(&[&app], &["/api/item/7", former, other]).await;
    // Its identity did not change, so the log names the new team alone.
    world.sql("UPDATE item SET team_id = 3 WHERE id = 8").await;
    seen(
        &[&app],
        former,
        r#"{"data":[{"id":2,"team_id":1,"v":0},{"id":4,"team_id":1,"v":0},{"id":6,"team_id":1,"v":0},{"id":10"#,
    )
    .await;
    // Rows stay.
    let only = || app.ask(reqwest::Method::GET, "/api/item/7").header("cache-control", "only-if-cached").send();
    app.until("kept", async |_| only().await.status == 200).await;
}

/// The slot of a world's database, dropped under its reader as if the server had given it up.
async fn lose_the_slot(world: &World) {
    world
        .sql(
            "DO $$ DECLARE gone bool := false; BEGIN WHILE NOT gone LOOP
               PERFORM pg_terminate_backend(active_pid) FROM pg_replication_slots
                 WHERE database = current_database() AND active;
               BEGIN
                 PERFORM pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE database = current_database();
                 gone := true;
               EXCEPTION WHEN object_in_use THEN NULL;
               END;
             END LOOP; END $$",
        )
        .await;
}

#[tokio::test]
async fn a_lost_slot_loses_no_change() {
    let world = World::decoding(SCHEMA).await;
    let (one, two) = (world.app(RESOURCES).await, world.app(RESOURCES).await);
    for v in 1..4 {
        warm(&[&one, &two], &["/api/item/1", "/api/item/2", "/api/item?team_id=2"]).await;
        // Committed while nobody reads, and after the last slot is gone; one is under way while the next is made.
        let slow = world.database.client().await;
        let begun = format!("BEGIN; UPDATE item SET v = {v} WHERE id = 2");
        slow.batch_execute(&begun).await.expect("it is sound");
        lose_the_slot(&world).await;
        world.sql(&format!("UPDATE item SET v = {v} WHERE id = 1")).await;
        seen(&[&one, &two], "/api/item/1", &format!(r#""v":{v}"#)).await;
        slow.batch_execute("COMMIT").await.expect("it is sound");
        seen(&[&one, &two], "/api/item/2", &format!(r#""v":{v}"#)).await;
        seen(&[&one, &two], "/api/item?team_id=2", &format!(r#"{{"id":1,"team_id":2,"v":{v}}}"#)).await;
    }
}

#[tokio::test]
async fn a_commit_that_is_decoded_before_it_is_visible_is_told_again() {
    let postgres = Postgres::start().await;
    let database = postgres.create_database().await;
    let client = database.client().await;
    client.batch_execute(SCHEMA).await.expect("the schema is sound");
    let redis = Redis::start().await;
    let config = format!(
        "database: {{ url: \"{}\" }}\ncache: {{ url: \"{}\" }}\naccess: {{ write: public }}\n\
         invalidation: {{ mode: wal }}\n{RESOURCES}",
        database.url,
        redis.url()
    );
    let app = App::start(&config).await;
    warm(&[&app], &["/api/item/1", "/api/item/2"]).await;
    for setting in ["ALTER SYSTEM SET synchronous_standby_names = 'nobody'", "SELECT pg_reload_conf()"] {
        client.batch_execute(setting).await.expect("a superuser may");
    }
    // Two of them: when they are decoded, no snapshot knows the later one's id yet.
    let mut committing = Vec::new();
    for id in 1..=2 {
        let writer = database.client().await;
        let update = format!("UPDATE item SET v = 1 WHERE id = {id}");
        committing.push(tokio::spawn(async move { writer.batch_execute(&update).await }));
        // It waits for a standby that will never come, and the log has it.
        let told = format!("SELECT EXISTS (SELECT FROM cache_aside.outbox WHERE image ->> 'id' = '{id}')");
        app.until("decoded", async |_| client.query_one(&told, &[]).await.is_ok_and(|row| row.get(0))).await;
    }
    let strange = "SELECT count(*) FROM cache_aside.outbox WHERE xid >= pg_snapshot_xmax(pg_current_snapshot())::text::bigint::text::xid8 \
                   AND xid::text::numeric > pg_snapshot_xmax(pg_current_snapshot())::text::numeric + 10";
    assert_eq!(client.query_one(strange, &[]).await.expect("it answers").get::<_, i64>(0), 0, "ids of their own");
    for _ in 0..100 {
        assert!(app.get("/api/item/2").await.text.contains(r#""v":0"#));
        assert!(app.get("/api/item/1").await.text.contains(r#""v":0"#));
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let give_up = "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep'";
    client.batch_execute(give_up).await.expect("a superuser may");
    for one in committing {
        one.await.expect("it ends").expect("it is committed all the same");
    }
    seen(&[&app], "/api/item/1", r#""v":1"#).await;
    seen(&[&app], "/api/item/2", r#""v":1"#).await;
}

#[tokio::test]
async fn a_commit_that_is_not_on_disk_yet_is_seen_in_time() {
    let world = World::decoding(SCHEMA).await;
    let app = world.app(RESOURCES).await;
    for v in 1..20 {
        warm(&[&app], &["/api/item/1"]).await;
        world.sql(&format!("SET synchronous_commit = off; UPDATE item SET v = {v} WHERE id = 1")).await;
        seen(&[&app], "/api/item/1", &format!(r#""v":{v}"#)).await;
    }
    let lag = app.metric("cache_aside_replication_slot_retained_bytes").await;
    assert!(lag > 0, "it is measured");
}

#[tokio::test]
async fn a_row_of_any_size_and_type_is_decoded() {
    let world = World::decoding(
        "CREATE TYPE mood AS ENUM ('ok', 'so so');
         CREATE TABLE feeling (m mood PRIMARY KEY, v int); INSERT INTO feeling VALUES ('so so', 0);
         CREATE TABLE moment (t timestamptz PRIMARY KEY, v int); INSERT INTO moment VALUES ('2026-01-01 00:00Z', 0);
         CREATE TABLE local (t timestamp, b bool, d date, v int, PRIMARY KEY (t, b, d));
         INSERT INTO local VALUES ('2026-01-01 10:00', true, '2026-02-03', 0);
         CREATE TABLE country (code char(2) PRIMARY KEY, v int); INSERT INTO country VALUES ('DE', 0);
         CREATE TABLE amount (n numeric(9, 2), b bytea, v int, PRIMARY KEY (n, b)); INSERT INTO amount VALUES (1.5, '\\x00ff', 0);
         CREATE TABLE document (id int PRIMARY KEY, text text, v int); INSERT INTO document VALUES (1, '', 0), (2, '', 0);
         ALTER TABLE document ALTER COLUMN text SET STORAGE PLAIN;",
    )
    .await;
    let app = world
        .app("resources: { feeling: {}, moment: {}, local: {}, country: {}, amount: {}, document: { columns: [id, v] } }")
        .await;
    let cases = [
        ("/api/feeling/so%20so", "UPDATE feeling SET v = 1"),
        ("/api/moment/2026-01-01T00:00:00%2B00:00", "SET timezone = 'Asia/Tokyo'; UPDATE moment SET v = 2"),
        ("/api/local/2026-01-01T10:00:00,true,2026-02-03", "SET datestyle = german; UPDATE local SET v = 3"),
        ("/api/amount/1.50,%5Cx00ff", "SET bytea_output = escape; UPDATE amount SET v = 4"),
        ("/api/country/DE", "UPDATE country SET v = 5"),
        // Longer than what is read of one change.
        (
            "/api/document/1",
            "ALTER TABLE document ALTER COLUMN text SET STORAGE EXTERNAL; \
             UPDATE document SET v = 6, text = repeat('x', 20000000) WHERE id = 1",
        ),
        ("/api/document/2", "UPDATE document SET v = 7 WHERE id = 2"),
    ];
    for (index, (path, sql)) in cases.iter().enumerate() {
        warm(&[&app], &[path]).await;
        world.sql(sql).await;
        seen(&[&app], path, &format!(r#""v":{}"#, index + 1)).await;
    }
    // A column that is decoded becomes one of another type, and another name.
    warm(&[&app], &["/api/amount/1.50,%5Cx00ff"]).await;
    world.sql("ALTER TABLE amount ALTER COLUMN n TYPE text; UPDATE amount SET v = 8").await;
    seen(&[&app], "/api/amount/1.50,%5Cx00ff", r#""v":8"#).await;
}

#[tokio::test]
async fn what_the_log_can_not_tell_is_said() {
    let world = World::decoding(
        "CREATE TABLE bare (id int NOT NULL, v int); CREATE UNIQUE INDEX ON bare (id);
         CREATE UNLOGGED TABLE fleeting (id int PRIMARY KEY);
         CREATE TABLE whole (id int PRIMARY KEY) PARTITION BY RANGE (id);
         CREATE TABLE part PARTITION OF whole FOR VALUES FROM (0) TO (100);",
    )
    .await;
    let config = world.config("resources: { bare: { key: id }, fleeting: {}, whole: {}, part: {} }");
    drop(command(&config, &["migrate"]));
    let check = command(&config, &["check"]);
    let said = String::from_utf8_lossy(&check.stdout).into_owned();
    for words in [
        "bare: \"public\".\"bare\" has no replica identity",
        "fleeting: \"public\".\"fleeting\" is unlogged",
        "part: \"public\".\"part\" is a partition",
        "resource whole: changes by anybody are captured",
    ] {
        assert!(said.contains(words), "{words}: {said}");
    }
    assert_eq!(check.status.code(), Some(1));
    // Its users' updates go on as before: it was not published.
    world.sql("INSERT INTO bare VALUES (1, 0); UPDATE bare SET v = 1; DELETE FROM bare").await;
    world.sql("ALTER TABLE bare REPLICA IDENTITY FULL").await;
    crate::app::migrate(&config);
    let check = command(&config, &["check"]);
    assert_eq!(check.status.code(), Some(0), "{check:?}");
    let postgres = Postgres::start_with(&["wal_level=replica"]).await;
    let database = postgres.create_database().await;
    database.client().await.batch_execute(SCHEMA).await.expect("the schema is sound");
    let config = config.replace(&world.database.url, &database.url).replace("bare:", "item:");
    let check = command(&config, &["migrate"]);
    assert!(String::from_utf8_lossy(&check.stderr).contains("wal_level"), "{check:?}");
}

#[tokio::test]
async fn a_role_that_may_replicate_can_decode_and_all_of_it_can_be_removed() {
    let world = World::decoding(SCHEMA).await;
    let role = format!("decoder_{}", world.database.name);
    world.sql(&format!("CREATE ROLE {role} LOGIN; GRANT SELECT ON item, team, board TO {role}")).await;
    let admin = world.config(RESOURCES);
    let config = admin.replace("postgres://postgres@", &format!("postgres://{role}@"));
    assert!(command(&admin, &["migrate"]).status.success());
    world
        .sql(&format!("GRANT USAGE ON SCHEMA cache_aside TO {role}; GRANT SELECT ON cache_aside.about TO {role}"))
        .await;
    let said = String::from_utf8(command(&config, &["check"]).stdout).expect("it is text");
    assert!(said.contains(&format!("error    database: role {role} may not decode the log")), "{said}");
    assert!(said.contains("is read by nobody") && said.contains("warning  database: max_slot_wal_keep_size"), "{said}");
    let granted = command(&admin, &["migrate", "--grant", &role]);
    assert!(granted.status.success(), "{granted:?}");
    let mut app = App::launch(&config).await;
    warm(&[&app], &["/api/item/1"]).await;
    world.sql("UPDATE item SET v = 1 WHERE id = 1").await;
    seen(&[&app], "/api/item/1", r#""v":1"#).await;
    // What is printed does the same, twice too.
    let script =
        String::from_utf8(command(&admin, &["migrate", "--print", "--grant", &role]).stdout).expect("it is text");
    world.sql(&script).await;
    // Whoever goes back to triggers is told of the slot that keeps the log.
    app.signal("KILL");
    app.ended().await;
    let triggers = config.replace("mode: wal", "mode: outbox");
    let kept = |said: &str| said.contains("is read by nobody, and the server keeps");
    let since = std::time::Instant::now();
    while !kept(&String::from_utf8_lossy(&command(&triggers, &["check"]).stdout)) {
        assert!(since.elapsed() < crate::app::PATIENCE, "never told");
    }
    let app = App::launch(&config).await;
    warm(&[&app], &["/api/item/1"]).await;
    let removed = command(&admin, &["migrate", "--uninstall"]);
    assert!(removed.status.success(), "{removed:?}");
    let left = "SELECT (SELECT count(*) FROM pg_replication_slots WHERE database = current_database())
                + (SELECT count(*) FROM pg_publication) + (SELECT count(*) FROM pg_namespace WHERE nspname = 'cache_aside')";
    assert_eq!(world.text(&format!("SELECT ({left})::text")).await, "0");
    app.until("past the cache", async |app| app.get("/api/item/1").await.header("cache-status").contains("bypass"))
        .await;
    world.sql(&script).await;
    world.sql(&script).await;
    warm(&[&app], &["/api/item/1"]).await;
    world.sql("UPDATE item SET v = 2 WHERE id = 1").await;
    seen(&[&app], "/api/item/1", r#""v":2"#).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_decoder_notices_that_the_network_fell_silent() {
    let world = World::decoding(SCHEMA).await;
    let (proxy, config) = through(Postgres::shared().await, &world.config(RESOURCES)).await;
    let app = App::start(&config).await;
    warm(&[&app], &["/api/item/7"]).await;
    let turns = |app: &App| app.log().matches("decoding the log").count();
    let before = turns(&app);
    // No end of a connection passes.
    proxy.black_hole();
    app.until("noticed", async |app| app.log().contains("the server fell silent")).await;
    world.sql("UPDATE item SET v = 1 WHERE id = 7").await;
    proxy.restore();
    app.until("decoding again", async |app| turns(app) > before).await;
    seen(&[&app], "/api/item/7", r#""v":1"#).await;
}
