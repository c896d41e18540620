//! Connections to PostgreSQL: how many there are, who makes them, and who waits for one.

use std::time::Duration;

use cache_aside::app::open_store;
use cache_aside::config::{Config, Env};
use cache_aside::store::Store;
use tokio::task::JoinHandle;

use crate::app::{self, App, World};
use crate::faults::Proxy;
use crate::overload::{GATED, begun, get, waiting};
use crate::servers::{Postgres, Redis};

fn sized(world: &World, size: u32, queue: u32) -> String {
    let pool = format!("database: {{ statement_timeout: 20s, pool_size: {size}, queue: {queue},");
    world.config("resources: { item: {}, slow_item: { key: id } }\n").replace("database: {", &pool)
}

async fn connections(app: &App, state: &str) -> u64 {
    app.metric(&format!(r#"cache_aside_pool_connections{{backend="postgresql",state="{state}"}}"#)).await
}

async fn open(app: &App, count: u64) {
    app.until(&format!("{count} open"), async |app| {
        connections(app, "idle").await + connections(app, "in_use").await == count
    })
    .await;
}

/// Readers of rows that nobody has read, numbered from `first`.
fn readers(app: &App, first: u32, count: u32) -> Vec<JoinHandle<u16>> {
    (first..first + count).map(|id| get(app, &format!("/api/slow_item/{id}"))).collect()
}

async fn all_answered(readers: Vec<JoinHandle<u16>>) {
    for reader in readers {
        assert_eq!(reader.await.expect("no panic"), 200);
    }
}

/// A database on a server of its own.
async fn alone(postgres: &Postgres) -> World {
    let database = postgres.create_database().await;
    database.client().await.batch_execute(GATED).await.expect("the schema is sound");
    let prefix = format!("pool{}-{}:", std::process::id(), postgres.port());
    let redis_url = Redis::shared().await.url();
    World { database, redis_url, prefix, cache_more: String::new(), invalidation: "max_staleness: 10s" }
}

/// A proxy before it, and the configuration that leads through that.
pub async fn through(postgres: &Postgres, config: &str) -> (Proxy, String) {
    let proxy = Proxy::to(([127, 0, 0, 1], postgres.port()).into()).await;
    let led = config.replace(&format!(":{}/", postgres.port()), &format!(":{}/", proxy.addr().port()));
    assert_ne!(led, config);
    (proxy, led)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn half_is_kept_open_and_the_rest_is_made_for_those_who_wait_and_never_more() {
    for (size, kept) in [(1, 1), (2, 1), (5, 3)] {
        let world = World::trusting(GATED).await;
        let app = App::start(&sized(&world, size, 3)).await;
        open(&app, kept).await;
        let served = readers(&app, 1, size);
        begun(&world, i64::from(size)).await;
        let gone = readers(&app, 20, 3);
        waiting(&app, 3).await;
        assert_eq!(connections(&app, "in_use").await, u64::from(size));
        for id in 30..40 {
            assert_eq!(get(&app, &format!("/api/slow_item/{id}")).await.expect("no panic"), 503, "the queue is full");
        }
        gone.iter().for_each(JoinHandle::abort);
        waiting(&app, 0).await;
        let patient = readers(&app, 40, 3);
        waiting(&app, 3).await;
        world.until(&format!("SELECT last_value = {size} FROM begun")).await;
        world.sql("INSERT INTO gate VALUES (true)").await;
        all_answered(served).await;
        all_answered(patient).await;
        open(&app, u64::from(size)).await;
    }
}

#[tokio::test]
async fn what_is_read_is_planned_on_connections_that_nobody_has_used_and_reads_no_row_there() {
    let world = World::trusting(GATED).await;
    world.sql("INSERT INTO gate VALUES (true)").await;
    let app = App::start(&sized(&world, 8, 3)).await;
    open(&app, 4).await;
    app.get("/api/slow_item/1").await.expect(200);
    // One of them is used for all that is asked one after the other.
    world
        .until(
            "SELECT count(*) >= 3 FROM pg_stat_activity WHERE datname = current_database() \
             AND application_name = 'cache-aside' AND state = 'idle' AND query LIKE 'SELECT (SELECT row_to_json%slow_item%'",
        )
        .await;
    // With a key that makes the database look, and more than once on a connection, which a busy machine may make one alone.
    world.until("SELECT seq_scan + idx_scan > 1 + 4 FROM pg_stat_user_tables WHERE relname = 'item'").await;
    assert_eq!(world.text("SELECT last_value::text FROM begun").await, "1");
    open(&app, 4).await;
}

#[tokio::test]
async fn what_takes_long_to_find_nothing_is_run_ahead_by_one_connection_and_planned_by_all() {
    let world = World::trusting(
        "CREATE TABLE item (id int PRIMARY KEY, v int); INSERT INTO item VALUES (1, 1); CREATE SEQUENCE begun;
         CREATE VIEW slow_item AS
           SELECT id, n FROM (SELECT id, n FROM item, (SELECT nextval('begun') AS n, pg_sleep(0.3) OFFSET 0) AS s OFFSET 0) AS all_of_it;",
    )
    .await;
    let app = App::start(&sized(&world, 8, 3)).await;
    open(&app, 4).await;
    app.get("/api/slow_item/1").await.expect(200);
    world.until("SELECT last_value = 2 FROM begun").await;
    world
        .until(
            "SELECT count(*) >= 4 FROM pg_stat_activity WHERE datname = current_database() \
             AND application_name = 'cache-aside' AND state = 'idle' AND query LIKE 'SELECT (SELECT row_to_json%slow_item%'",
        )
        .await;
    assert_eq!(world.text("SELECT last_value::text FROM begun").await, "2");
}

#[tokio::test]
async fn a_connection_that_is_lost_while_it_runs_ahead_is_made_anew_and_tries_no_more() {
    let world = World::trusting(
        "CREATE TABLE item (id int PRIMARY KEY, v int); INSERT INTO item VALUES (1, 1); CREATE SEQUENCE begun;
         CREATE VIEW slow_item AS SELECT id, n FROM (
           SELECT id, n, pg_sleep(CASE WHEN n > 1 THEN 15 ELSE 0 END)
           FROM item, (SELECT nextval('begun') AS n OFFSET 0) AS s OFFSET 0) AS all_of_it;",
    )
    .await;
    let app = App::start(&sized(&world, 8, 3)).await;
    open(&app, 4).await;
    app.get("/api/slow_item/1").await.expect(200);
    let running = "FROM pg_stat_activity WHERE datname = current_database() AND state = 'active' \
                   AND wait_event = 'PgSleep' AND application_name = 'cache-aside' \
                   AND query_start < clock_timestamp() - interval '0.3 s'";
    world.until(&format!("SELECT count(*) = 1 {running}")).await;
    // Meanwhile others are served.
    app.get("/api/item/1").await.expect(200);
    world.sql(&format!("SELECT pg_terminate_backend(pid) {running}")).await;
    world
        .until(
            "SELECT count(*) >= 4 FROM pg_stat_activity WHERE datname = current_database() \
             AND application_name = 'cache-aside' AND state = 'idle' AND query LIKE 'SELECT (SELECT row_to_json%item%'",
        )
        .await;
    open(&app, 4).await;
    assert_eq!(world.text("SELECT last_value::text FROM begun").await, "2");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connects_that_hang_keep_nobody_from_those_that_succeed() {
    let postgres = Postgres::start().await;
    let world = alone(&postgres).await;
    let (proxy, config) = through(&postgres, &sized(&world, 8, 10)).await;
    let app = App::start(&config).await;
    open(&app, 4).await;
    // Somebody who takes connections and never says a word.
    let silent = tokio::net::TcpListener::bind(("127.0.0.1", 0)).await.expect("there is a port");
    proxy.lead_to(silent.local_addr().expect("it is bound"));
    let served = readers(&app, 1, 4);
    begun(&world, 4).await;
    let waits = readers(&app, 10, 2);
    // Two connects hang, one beside the other.
    let (first, _) = silent.accept().await.expect("one comes");
    let (_second, _) = silent.accept().await.expect("another one comes");
    let mut said = [0; 1024];
    while let Ok(read) = first.try_read(&mut said) {
        assert!(read > 0, "the first one was given up before the second was tried");
    }
    waiting(&app, 2).await;
    proxy.lead_to(([127, 0, 0, 1], postgres.port()).into());
    // What can be made is made, and whoever waits has it.
    begun(&world, 6).await;
    world.sql("INSERT INTO gate VALUES (true)").await;
    all_answered(served).await;
    all_answered(waits).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_no_connection_can_be_made_readers_hang_up_and_take_nothing_with_them() {
    let mut postgres = Postgres::start().await;
    let world = alone(&postgres).await;
    let (proxy, config) = through(&postgres, &sized(&world, 4, 5)).await;
    let app = App::start(&config).await;
    open(&app, 2).await;
    let silent = tokio::net::TcpListener::bind(("127.0.0.1", 0)).await.expect("there is a port");
    proxy.lead_to(silent.local_addr().expect("it is bound"));
    // All connections end, and none can be made.
    postgres.kill().await;
    open(&app, 0).await;
    for round in 0..3 {
        let gone = readers(&app, 10 * round + 1, 4);
        // They wait, or are refused once it is known that the database does not answer.
        let breaker = r#"cache_aside_breaker_state{backend="postgresql"}"#;
        let waits = async |app: &App| connections(app, "waiting").await > 0 || app.metric(breaker).await == 2;
        app.until("some wait", waits).await;
        gone.iter().for_each(JoinHandle::abort);
        waiting(&app, 0).await;
    }
    postgres.start_again().await;
    proxy.lead_to(([127, 0, 0, 1], postgres.port()).into());
    app.until("served again", async |app| app.get("/api/item/1").await.status == 200).await;
    // As many as before.
    let served = readers(&app, 50, 4);
    begun(&world, 4).await;
    let patient = readers(&app, 60, 2);
    // Looks at the tables may wait too.
    app.until("some wait", async |app| connections(app, "waiting").await >= 2).await;
    world.sql("INSERT INTO gate VALUES (true)").await;
    all_answered(served).await;
    all_answered(patient).await;
}

/// Connects until there is no more room.
async fn take_all(world: &World, others: &mut Vec<tokio_postgres::Client>) {
    while let Ok((client, connection)) = tokio_postgres::connect(&world.database.url, tokio_postgres::NoTls).await {
        tokio::spawn(connection);
        others.push(client);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_the_server_has_no_room_readers_wait_for_the_connections_that_there_are() {
    const OURS: &str = "backend_type = 'client backend' AND application_name = 'cache-aside' AND state = 'idle'
                        AND query LIKE '%item%'";
    let postgres = Postgres::start_with(&["max_connections=30"]).await;
    let world = alone(&postgres).await;
    let app = App::start(&sized(&world, 8, 20)).await;
    open(&app, 4).await;
    let direct = world.database.client().await;
    app.get("/api/item/1").await.expect(200);
    // Others take all that is left, and what one of ours had.
    let mut others = Vec::new();
    take_all(&world, &mut others).await;
    let end = format!("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {OURS} LIMIT 1");
    assert_eq!(direct.query(&end, &[]).await.expect("it can be ended").len(), 1, "it has read a row");
    let before = others.len();
    while others.len() == before {
        take_all(&world, &mut others).await;
    }
    open(&app, 3).await;
    let served = readers(&app, 1, 8);
    let begun = async || {
        let row = direct.query_one("SELECT last_value, is_called FROM begun", &[]).await.expect("it is there");
        if row.get(1) { row.get::<_, i64>(0) } else { 0 }
    };
    app.until("three begun", async |_| begun().await == 3).await;
    app.until("the others wait", async |app| connections(app, "waiting").await >= 5).await;
    direct.batch_execute("INSERT INTO gate VALUES (true)").await.expect("it is open");
    all_answered(served).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_connected_before_changes_were_captured_is_made_anew() {
    let world = World::trusting(GATED).await;
    let config = sized(&world, 4, 10);
    let app = App::launch(&config).await;
    // Both that are kept: nobody needs another one.
    open(&app, 2).await;
    app.until("served", async |app| app.get("/api/item/1").await.status == 200).await;
    assert_eq!(app.get("/api/item/1").await.expect(200).source(), "database", "nobody tells of its changes");
    app::migrate(&config);
    app.until("cached", async |app| app.get("/api/item/1").await.expect(200).source() == "cache").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_all_tables_are_may_take_longer_to_find_out_than_a_statement() {
    let tables: String = (0..15).map(|table| format!("CREATE TABLE t{table} (id int PRIMARY KEY);")).collect();
    let world = World::trusting(&tables).await;
    let config =
        world.config("resources: { t0: {} }\n").replace("database: {", "database: { statement_timeout: 1500ms,");
    let (proxy, config) = through(Postgres::shared().await, &config).await;
    let config = Config::from_yaml(&config, "test", &Env::default()).expect("it is sound");
    let store = open_store(&config).expect("the URL is sound");
    store.ping().await.expect("it is there");
    proxy.delay(Duration::from_millis(150));
    assert_eq!(store.tables().await.expect("it takes as long as it takes").len(), 15);
}

/// A type whose values are looked at for as long as a statement may take.
const EXPLAINED: &str = "
  CREATE SEQUENCE begun;
  CREATE FUNCTION slow(text) RETURNS bool LANGUAGE plpgsql VOLATILE STRICT AS $$
    BEGIN PERFORM nextval('begun'); PERFORM pg_sleep(20); RETURN true; END $$;
  CREATE DOMAIN studied AS text CHECK (slow(VALUE));
  CREATE TABLE note (id int PRIMARY KEY, a int, b studied); INSERT INTO note VALUES (1, 0, NULL);";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_asks_which_value_was_refused_keeps_no_connection_for_it_where_the_network_falls_silent() {
    let world = World::trusting(EXPLAINED).await;
    let config = world.config("invalidation: { mode: none }\nresources: { note: { write: [update] } }\n");
    let config = config.replace("database: {", "database: { statement_timeout: 5s,");
    let (proxy, config) = through(Postgres::shared().await, &config).await;
    let app = App::start(&config).await;
    let (client, url) = (app.client.clone(), format!("{}/api/note/1", app.url));
    let body = r#"{"a":"none","b":"text"}"#;
    let refused = tokio::spawn(async move {
        client.patch(url).header("content-type", "application/json").body(body).send().await.map(drop)
    });
    // The number was refused, and each value is tried by itself.
    begun(&world, 1).await;
    assert!(connections(&app, "in_use").await > 0);
    proxy.black_hole();
    app.until("given up", async |app| connections(app, "in_use").await == 0).await;
    refused.await.expect("no panic").expect("it is answered");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_check_ends_where_the_network_falls_silent() {
    let world = World::trusting(
        "CREATE TABLE item (id int PRIMARY KEY);
         CREATE FUNCTION planned() RETURNS int LANGUAGE plpgsql IMMUTABLE AS $$
           BEGIN PERFORM pg_sleep(20); RETURN 1; END $$;",
    )
    .await;
    let config = world.config(
        "invalidation: { mode: none }\nresources: { item: {} }
queries: { one: { sql: \"SELECT * FROM item WHERE id = planned()\" } }\n",
    );
    let config = config.replace("database: {", "database: { statement_timeout: 1s,");
    let (proxy, config) = through(Postgres::shared().await, &config).await;
    let check = tokio::task::spawn_blocking(move || app::command(&config, &["check"]));
    // It asks which tables the statement reads.
    world
        .until(
            "SELECT count(*) > 0 FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'PgSleep'",
        )
        .await;
    proxy.black_hole();
    let checked = tokio::time::timeout(app::PATIENCE, check).await.expect("it ends").expect("no panic");
    assert!(!checked.stdout.is_empty(), "{checked:?}");
}
