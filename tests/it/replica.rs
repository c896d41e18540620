//! Fills that read from a standby: never what the primary has already replaced, and always without it where it is of no use.

use std::time::Instant;

use crate::app::{App, PATIENCE, command};
use crate::faults::Proxy;
use crate::invalidation::{RESOURCES, SCHEMA, seen};
use crate::servers::{Database, Postgres, Redis};

/// A primary, its standby, and a service that knows both.
struct Pair {
    primary: Postgres,
    standby: Postgres,
    database: Database,
    redis: Redis,
}

impl Pair {
    async fn start(schema: &str) -> Self {
        let primary = Postgres::start().await;
        let database = primary.create_database().await;
        database.client().await.batch_execute(schema).await.expect("the schema is sound");
        let standby = Postgres::standby(([127, 0, 0, 1], primary.port()).into()).await;
        Self { primary, standby, database, redis: Redis::start().await }
    }

    fn config_at(&self, replica: &str, rest: &str) -> String {
        format!(
            "database: {{ url: \"{}\", replica_url: \"{replica}\" }}\ncache: {{ url: \"{}\" }}\n\
             access: {{ write: public, refresh: public, admin: public }}\n{rest}",
            self.database.url,
            self.redis.url()
        )
    }

    fn config(&self, rest: &str) -> String {
        self.config_at(&self.standby.url(&self.database.name), rest)
    }

    async fn sql(&self, sql: &str) {
        self.database.client().await.batch_execute(sql).await.expect("the statement is sound");
    }

    /// Runs SQL on the standby.
    async fn at_standby(&self, sql: &str) {
        let (client, connection) =
            tokio_postgres::connect(&self.standby.url(&self.database.name), tokio_postgres::NoTls)
                .await
                .expect("it accepts readers");
        tokio::spawn(connection);
        client.batch_execute(sql).await.expect("the statement is sound");
    }
}

async fn counted(app: &App, outcome: &str) -> u64 {
    app.metric(&format!("cache_aside_replica_reads_total{{outcome=\"{outcome}\"}}")).await
}

/// Forces loads until one came from the standby.
async fn in_use(app: &App) {
    let before = counted(app, "used").await;
    app.until("read from the replica", async |app| {
        refreshed(app, "/api/item/90").await;
        counted(app, "used").await > before
    })
    .await;
}

async fn refreshed(app: &App, path: &str) -> crate::app::Reply {
    app.ask(reqwest::Method::GET, path).header("cache-control", "no-cache").send().await.expect(200)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_keeps_up_is_read_from_and_one_that_lags_never_shows_an_old_row() {
    keeping_up_and_lagging("outbox", 15).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_lags_never_shows_an_old_row_where_the_log_is_decoded() {
    keeping_up_and_lagging("wal", 5).await;
}

async fn keeping_up_and_lagging(mode: &str, rounds: usize) {
    let pair = Pair::start(SCHEMA).await;
    let total = "queries: { total: { sql: \"SELECT sum(v) AS total FROM item\", depends_on: [item] } }\n";
    let config = pair.config(&format!("invalidation: {{ mode: {mode} }}\n{RESOURCES}{total}"));
    let app = App::start(&config).await;
    in_use(&app).await;
    // Rows, batches, lists, statements and views.
    for path in ["/api/item/1", "/api/item?id=2,3", "/api/item?team_id=2", "/api/queries/total", "/api/board/4"] {
        app.until(&format!("read from the replica: {path}"), async |app| {
            let before = counted(app, "used").await;
            refreshed(app, path).await;
            counted(app, "used").await > before
        })
        .await;
    }
    app.until("told by check", async |_| {
        let checked = command(&config, &["check"]);
        String::from_utf8_lossy(&checked.stdout).contains("the replica keeps up")
    })
    .await;

    // It still answers, with rows as they were. It may have been believed a moment ago.
    let mut v = 0;
    for _ in 0..rounds {
        in_use(&app).await;
        pair.at_standby("SELECT pg_wal_replay_pause()").await;
        pair.at_standby(
            "DO $$ BEGIN WHILE pg_get_wal_replay_pause_state() <> 'paused' LOOP PERFORM pg_sleep(0.001); END LOOP; END $$",
        )
        .await;
        for _ in 0..5 {
            v += 1;
            let new = format!(r#""v":{v}"#);
            // Written through the service: nobody may see what was before, from the first read on.
            let wrote = app.patch("/api/item/1", &format!(r#"{{"v":{v}}}"#)).await.expect(200);
            let pending = wrote.header("cache-status").contains("pending");
            for path in ["/api/item/1", "/api/item?team_id=2", "/api/item/1"] {
                let reply = app.get(path).await.expect(200);
                assert!(pending || reply.text.contains(&new), "{reply:?}");
                let forced = refreshed(&app, path).await;
                assert!(forced.text.contains(&new), "{forced:?}");
            }
            // Old results may stay for as long as is promised; past the cache they are new at once.
            app.get("/api/queries/total").await.expect(200);
            assert!(refreshed(&app, "/api/queries/total").await.text.contains(&format!(r#""total":{v}"#)));
        }
        // And by others, without waiting for anything on disk.
        pair.sql(&format!("SET synchronous_commit = off; UPDATE item SET v = {v} WHERE id = 7")).await;
        assert!(refreshed(&app, "/api/item/7").await.text.contains(&format!(r#""v":{v}"#)));
        seen(&[&app], "/api/board/7", &format!(r#""v":{v}"#)).await;
        pair.sql("UPDATE item SET v = 0 WHERE id = 7").await;
        pair.at_standby("SELECT pg_wal_replay_resume()").await;
    }
    assert!(counted(&app, "behind").await > 0, "it was asked, and found to lag:\n{}", app.log());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_is_killed_or_hangs_costs_no_answer_and_is_used_again() {
    let mut pair = Pair::start(SCHEMA).await;
    let proxy = Proxy::to(([127, 0, 0, 1], pair.standby.port()).into()).await;
    let url = format!("postgres://postgres@{}/{}", proxy.addr(), pair.database.name);
    let app = App::start(&pair.config_at(&url, RESOURCES)).await;
    in_use(&app).await;
    pair.standby.kill().await;
    for id in 1..20 {
        app.get(&format!("/api/item/{id}")).await.expect(200);
        refreshed(&app, &format!("/api/item/{id}")).await;
    }
    app.until("told", async |app| app.log().contains("the replica can't be used; fills read the primary")).await;
    pair.standby.start_again().await;
    in_use(&app).await;
    for fault in [Proxy::cut, Proxy::black_hole] {
        fault(&proxy);
        for id in 1..20 {
            refreshed(&app, &format!("/api/item/{id}")).await;
        }
        proxy.restore();
        in_use(&app).await;
    }
    assert!(counted(&app, "away").await > 0);
    app.get("/readyz").await.expect(200);
    // Without the primary there is nothing to measure it by.
    pair.primary.kill().await;
    app.get("/api/item/77").await.expect(503);
    pair.primary.start_again().await;
    app.until("asking the primary", async |app| app.get("/api/item/78").await.status == 200).await;
    in_use(&app).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_was_promoted_is_never_read_again() {
    let pair = Pair::start(SCHEMA).await;
    let app = App::start(&pair.config(RESOURCES)).await;
    in_use(&app).await;
    pair.standby.promote().await;
    // Two histories from here on, and the primary's is the one that counts.
    pair.at_standby("UPDATE item SET v = 666").await;
    let used = counted(&app, "used").await;
    for v in 1..=20 {
        pair.sql(&format!("UPDATE item SET v = {v} WHERE id = 5")).await;
        assert!(refreshed(&app, "/api/item/5").await.text.contains(&format!(r#""v":{v}"#)));
        assert!(!app.get(&format!("/api/item/{}", 10 + v)).await.text.contains("666"));
    }
    assert_eq!(counted(&app, "used").await, used);
    app.until("told", async |app| app.log().contains("it is no standby")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_standby_of_another_history_is_not_read() {
    let pair = Pair::start(SCHEMA).await;
    in_use(&App::start(&pair.config(RESOURCES)).await).await;
    // It follows a former standby that was promoted: the same system, further on in a history of its own.
    let other = Postgres::standby(([127, 0, 0, 1], pair.primary.port()).into()).await;
    other.promote().await;
    let theirs = Postgres::standby(([127, 0, 0, 1], other.port()).into()).await;
    let (client, connection) =
        tokio_postgres::connect(&other.url(&pair.database.name), tokio_postgres::NoTls).await.expect("it is a primary");
    tokio::spawn(connection);
    client
        .batch_execute("UPDATE item SET v = 666; CREATE TABLE ballast AS SELECT g FROM generate_series(1, 100000) g")
        .await
        .expect("it is sound");
    let app = App::start(&pair.config_at(&theirs.url(&pair.database.name), RESOURCES)).await;
    app.until("told", async |app| app.log().contains("the replica can't be used")).await;
    for id in 1..=20 {
        assert!(!refreshed(&app, &format!("/api/item/{id}")).await.text.contains("666"));
    }
    assert_eq!(counted(&app, "used").await, 0, "{}", app.log());
    // Nor is the primary itself, by another name.
    let app = App::start(&pair.config_at(&pair.database.url, RESOURCES)).await;
    app.until("told", async |app| app.log().contains("it is no standby")).await;
    app.until("told by check", async |_| {
        let checked = command(&pair.config_at(&pair.database.url, RESOURCES), &["check"]);
        let out = String::from_utf8_lossy(&checked.stdout);
        out.contains("warning  database: the replica can't be used") && checked.status.success()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_replica_must_not_answer_goes_to_the_primary() {
    let pair = Pair::start(&format!(
        "{SCHEMA} CREATE UNLOGGED TABLE scratch (id int PRIMARY KEY); INSERT INTO scratch VALUES (1);
         CREATE TABLE held (id int PRIMARY KEY, v int); INSERT INTO held VALUES (1, 0);
         CREATE ROLE plain LOGIN; GRANT SELECT ON ALL TABLES IN SCHEMA public TO plain;"
    ))
    .await;
    let resources = "resources: { item: {}, scratch: {}, held: { consistency: hold, write: [update] } }\n";
    let app = App::start(&pair.config(resources)).await;
    in_use(&app).await;
    let used = counted(&app, "used").await;
    // Nobody is ahead of another there, and a standby may be ahead of its primary.
    refreshed(&app, "/api/held/1").await;
    assert_eq!(counted(&app, "used").await, used);
    // Unlogged tables are not on a standby.
    app.get("/api/scratch/1").await.expect(200);
    assert_eq!(counted(&app, "refused").await, 1);
    in_use(&app).await;
    // Whoever may not see whom the standby follows can't rely on it, and is told so.
    assert!(command(&pair.config(resources), &["migrate", "--grant", "plain"]).status.success());
    let plain = pair.config(resources).replace("postgres://postgres@", "postgres://plain@");
    let blind = App::launch(&plain).await;
    blind.until("told", async |app| app.log().contains("GRANT pg_read_all_stats")).await;
    blind.until("served", async |app| app.get("/api/item/1").await.status == 200).await;
    pair.sql("GRANT pg_read_all_stats TO plain").await;
    in_use(&blind).await;
    // Nor is one whose sessions write rows in another form.
    pair.at_standby("ALTER SYSTEM SET intervalstyle = 'iso_8601'").await;
    pair.at_standby("SELECT pg_reload_conf()").await;
    let started = Instant::now();
    loop {
        let other = App::start(&pair.config(resources)).await;
        if other.log().contains("its sessions differ") {
            break;
        }
        assert!(started.elapsed() < PATIENCE, "{}", other.log());
    }
}
