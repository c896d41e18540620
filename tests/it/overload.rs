//! More than there is room for: whoever can be served is, the others are told at once, and the database is left in peace.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;

use crate::app::{App, PATIENCE, World};
use crate::servers::Redis;

/// Rows that take as long as the test says: until somebody deletes the gate.
pub const GATED: &str = "
  CREATE TABLE item (id int PRIMARY KEY, v int); INSERT INTO item SELECT g, 0 FROM generate_series(1, 100) g;
  CREATE TABLE gate (open bool); CREATE SEQUENCE begun;
  CREATE FUNCTION slow() RETURNS int LANGUAGE plpgsql VOLATILE AS $$
    BEGIN
      PERFORM nextval('begun');
      WHILE NOT EXISTS (SELECT FROM gate) LOOP PERFORM pg_sleep(0.01); END LOOP;
      RETURN 0;
    END $$;
  CREATE VIEW slow_item AS SELECT id, slow() AS waited FROM item;";

fn narrow(world: &World, more: &str) -> String {
    world
        .config("resources: { item: { write: [update] }, slow_item: { key: id } }\n")
        .replace("database: {", "database: { statement_timeout: 20s, pool_size: 1, queue: 2,")
        + more
}

pub fn get(app: &App, path: &str) -> JoinHandle<u16> {
    let (client, url) = (app.client.clone(), format!("{}{path}", app.url));
    tokio::spawn(async move { client.get(url).send().await.expect("it answers").status().as_u16() })
}

pub async fn begun(world: &World, count: i64) {
    world.until(&format!("SELECT is_called AND last_value >= {count} FROM begun")).await;
}

pub async fn waiting(app: &App, count: u64) {
    app.until("in the queue", async |app| {
        app.metric(r#"cache_aside_pool_connections{backend="postgresql",state="waiting"}"#).await == count
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_hangs_up_in_the_queue_makes_room_and_costs_the_database_nothing() {
    let world = World::trusting(GATED).await;
    let app = App::start(&narrow(&world, "")).await;
    let first = get(&app, "/api/slow_item/1");
    begun(&world, 1).await;
    let gone = [get(&app, "/api/slow_item/2"), get(&app, "/api/slow_item/3")];
    waiting(&app, 2).await;
    assert_eq!(get(&app, "/api/slow_item/4").await.expect("the reader is there"), 503, "the queue is full");
    gone.iter().for_each(JoinHandle::abort);
    waiting(&app, 0).await;
    let last = get(&app, "/api/slow_item/5");
    waiting(&app, 1).await;
    world.sql("INSERT INTO gate VALUES (true)").await;
    assert_eq!((first.await.expect("no panic"), last.await.expect("no panic")), (200, 200));
    assert_eq!(world.text("SELECT last_value::text FROM begun").await, "2", "nobody waited for the others");
    // Nor do their leases keep anybody waiting.
    assert_eq!(get(&app, "/api/slow_item/2").await.expect("no panic"), 200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_waits_with_one_who_hangs_up_is_answered() {
    let world = World::trusting(GATED).await;
    let app = App::start(&narrow(&world, "")).await;
    let first = get(&app, "/api/slow_item/1");
    begun(&world, 1).await;
    let leader = get(&app, "/api/slow_item/2");
    waiting(&app, 1).await;
    let looks = r#"cache_aside_cache_operation_duration_seconds_count{operation="get"}"#;
    let before = app.metric(looks).await;
    let passenger = get(&app, "/api/slow_item/2");
    // It has looked, and boards what its key has.
    app.until("on board", async |app| app.metric(looks).await > before).await;
    leader.abort();
    world.sql("INSERT INTO gate VALUES (true)").await;
    assert_eq!((first.await.expect("no panic"), passenger.await.expect("no panic")), (200, 200));
    assert_eq!(world.text("SELECT last_value::text FROM begun").await, "2");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_write_whose_time_ends_in_the_queue_is_never_begun() {
    let world = World::trusting(GATED).await;
    let server = "server: { listen: \"127.0.0.1:0\", drain_delay: 0s, request_timeout: 700ms }\n";
    let app = App::start(&narrow(&world, server)).await;
    // Its own time ends too; the statement goes on.
    let first = get(&app, "/api/slow_item/1");
    begun(&world, 1).await;
    app.patch("/api/item/1", r#"{"v":1}"#).await.expect(504);
    waiting(&app, 0).await;
    world.sql("INSERT INTO gate VALUES (true)").await;
    assert_eq!(first.await.expect("no panic"), 504);
    app.until("free", async |app| app.get("/api/item/2").await.status == 200).await;
    assert_eq!(app.get("/api/item/1").await.expect(200).json()["data"]["v"], 0);
    // What was loaded for nobody is there for the next one.
    assert_eq!(app.get("/api/slow_item/1").await.expect(200).source(), "cache");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_scan_of_absent_keys_without_a_cache_sees_no_more_than_the_permits_and_hits_nobody_else() {
    let world = World::trusting(GATED).await;
    let mut redis = Redis::start().await;
    let world = world.on(&redis);
    let app = App::start(
        &world
            .config("resources: { item: {}, slow_item: { key: id } }\n")
            .replace("database: {", "database: { pool_size: 3, queue: 5,"),
    )
    .await;
    redis.kill().await;
    world.sql("INSERT INTO gate VALUES (true)").await;
    let (stop, served, refused) = (Arc::new(AtomicBool::new(false)), Arc::default(), Arc::default());
    let scans: Vec<_> = (0..60_u64)
        .map(|scan| {
            let (stop, served, refused): (_, Arc<AtomicU64>, Arc<AtomicU64>) =
                (Arc::clone(&stop), Arc::clone(&served), Arc::clone(&refused));
            let (client, url) = (app.client.clone(), app.url.clone());
            tokio::spawn(async move {
                for count in 0_u64.. {
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    let absent = 1_000 + (count * 60 + scan) % 1_000_000;
                    let reply = client.get(format!("{url}/api/item/{absent}")).send().await.expect("it answers");
                    match reply.status().as_u16() {
                        404 => served.fetch_add(1, Ordering::Relaxed),
                        503 => {
                            assert!(reply.headers().contains_key("retry-after"));
                            refused.fetch_add(1, Ordering::Relaxed)
                        }
                        other => panic!("{other}"),
                    };
                }
            })
        })
        .collect();
    // The pool, the probe beside it, and the rounds' own connection.
    let count = "SELECT count(*)::text FROM pg_stat_activity \
                 WHERE datname = current_database() AND application_name = 'cache-aside'";
    for _ in 0..30 {
        let connections: u64 = world.text(count).await.parse().expect("it is a number");
        assert!(connections <= 3 + 2, "{connections} connections");
    }
    app.until("shed", async |_| served.load(Ordering::Relaxed) > 100 && refused.load(Ordering::Relaxed) > 100).await;
    stop.store(true, Ordering::Relaxed);
    for scan in scans {
        scan.await.expect("no scan panics");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hits_are_served_while_misses_are_refused() {
    let world = World::trusting(GATED).await;
    let app = App::start(&narrow(&world, "")).await;
    app.get("/api/item/1").await.expect(200);
    app.until("cached", async |app| app.get("/api/item/1").await.source() == "cache").await;
    let blocked = get(&app, "/api/slow_item/1");
    begun(&world, 1).await;
    let queued = [get(&app, "/api/slow_item/2"), get(&app, "/api/slow_item/3")];
    waiting(&app, 2).await;
    for id in 10..60 {
        app.get(&format!("/api/item/{id}")).await.expect(503);
        assert_eq!(app.get("/api/item/1").await.expect(200).source(), "cache");
    }
    world.sql("INSERT INTO gate VALUES (true)").await;
    for read in queued.into_iter().chain([blocked]) {
        assert_eq!(read.await.expect("no panic"), 200);
    }
}

fn address(app: &App) -> &str {
    app.url.strip_prefix("http://").expect("it is a URL")
}

/// Everything until the other side closes.
async fn rest(stream: &mut TcpStream) -> String {
    let mut all = Vec::new();
    let read = async {
        let mut chunk = [0; 4096];
        while let Ok(count @ 1..) = stream.read(&mut chunk).await {
            all.extend_from_slice(&chunk[..count]);
        }
    };
    tokio::time::timeout(PATIENCE, read).await.expect("it is closed");
    String::from_utf8_lossy(&all).into_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn idle_and_dripping_clients_keep_nobody_else_from_being_served() {
    let world = World::trusting(GATED).await;
    let app = App::start(&world.config("resources: { item: {} }\n")).await;
    let address = address(&app);
    let mut idle = Vec::new();
    for _ in 0..3_000 {
        idle.push(TcpStream::connect(address).await.expect("it listens"));
    }
    let drips: Vec<_> = (0..200)
        .map(|_| {
            let address = address.to_owned();
            tokio::spawn(async move {
                let mut stream = TcpStream::connect(address).await.expect("it listens");
                stream.write_all(b"GET /api/item/1 HTTP/1.1\r\nHost: x\r\nX-Drip: ").await.expect("it is open");
                let (mut reader, mut writer) = stream.split();
                let drip = async {
                    while writer.write_all(b"x").await.is_ok() {
                        tokio::time::sleep(Duration::from_millis(50)).await;
                    }
                    String::new()
                };
                let answer = async {
                    let mut all = Vec::new();
                    // Closed, politely or not.
                    let _ = reader.read_to_end(&mut all).await;
                    String::from_utf8_lossy(&all).into_owned()
                };
                tokio::select! { said = answer => said, said = drip => said }
            })
        })
        .collect();
    for id in 1..=100 {
        app.get(&format!("/api/item/{id}")).await.expect(200);
    }
    for drip in drips {
        let said = tokio::time::timeout(PATIENCE, drip).await.expect("it is ended").expect("no panic");
        assert!(said.is_empty() || said.starts_with("HTTP/1.1 408"), "{said}");
    }
    drop(idle);
    app.until("tidy", async |app| app.metric("process_open_fds").await < 300).await;
}

#[tokio::test]
async fn a_head_without_end_is_refused() {
    let world = World::trusting(GATED).await;
    let app = App::start(&world.config("resources: { item: {} }\n")).await;
    let mut stream = TcpStream::connect(address(&app)).await.expect("it listens");
    let long = "x".repeat(4 << 20);
    let head = format!("GET /api/item/1 HTTP/1.1\r\nHost: x\r\nX-Long: {long}");
    // It need not read all of it.
    let _ = stream.write_all(head.as_bytes()).await;
    let said = rest(&mut stream).await;
    assert!(said.is_empty() || said.starts_with("HTTP/1.1 431") || said.starts_with("HTTP/1.1 400"), "{said}");
    app.get("/api/item/1").await.expect(200);
}

#[tokio::test]
async fn a_body_that_is_announced_too_large_is_refused_before_it_comes() {
    let world = World::trusting(GATED).await;
    let server = "server: { listen: \"127.0.0.1:0\", drain_delay: 0s, request_timeout: 20s }\n";
    let app = App::start(&(world.config("resources: { item: { write: [update] } }\n") + server)).await;
    let mut stream = TcpStream::connect(address(&app)).await.expect("it listens");
    let head =
        "PATCH /api/item/1 HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 10000000\r\n\r\n{";
    stream.write_all(head.as_bytes()).await.expect("it is open");
    let mut status = [0; 12];
    tokio::time::timeout(PATIENCE, stream.read_exact(&mut status)).await.expect("in time").expect("it answers");
    assert_eq!(String::from_utf8_lossy(&status), "HTTP/1.1 413");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bodies_that_are_read_at_once_have_a_bound_together() {
    let world = World::trusting(GATED).await;
    let server = "server: { listen: \"127.0.0.1:0\", drain_delay: 0s, request_timeout: 20s }\n";
    let app = App::start(&(world.config("resources: { item: { write: [update] } }\n") + server)).await;
    let head = format!(
        "PATCH /api/item/1 HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
        1 << 20
    );
    let part = vec![b' '; 900 << 10];
    let mut bodies = Vec::new();
    for _ in 0..200 {
        let mut stream = TcpStream::connect(address(&app)).await.expect("it listens");
        stream.write_all(head.as_bytes()).await.expect("it is open");
        // Whoever is refused is not read to the end.
        let _ = stream.write_all(&part).await;
        bodies.push(stream);
    }
    let refused = r#"http_requests_total{method="PATCH",route="/api/{resource}/{key}",status="503"}"#;
    // There is room for 72 of them.
    app.until("refused", async |app| app.metric(refused).await >= 128).await;
    drop(bodies);
    app.until("room again", async |app| app.patch("/api/item/1", r#"{"v":1}"#).await.status == 200).await;
}

/// Rows that are large: four of these bodies fit, and no fifth.
const LARGE: &str = "CREATE TABLE doc (id int PRIMARY KEY, v text); INSERT INTO doc VALUES (1, ''), (2, '');";
const LARGE_CONFIG: &str = "resources: { doc: { write: [update] }, slow_item: { key: id } }
server: { listen: \"127.0.0.1:0\", drain_delay: 0s, request_timeout: 50s, max_body: 16MiB }\n";

fn patch(app: &App, id: u32) -> JoinHandle<(u16, String)> {
    let (client, url) = (app.client.clone(), format!("{}/api/doc/{id}", app.url));
    let body = format!(r#"{{"v":"{}"}}"#, "x".repeat(15 << 20));
    tokio::spawn(async move {
        let asked = client.patch(url).header("content-type", "application/json").body(body);
        let reply = asked.send().await.expect("it answers");
        (reply.status().as_u16(), reply.text().await.expect("it arrives"))
    })
}

async fn no_room(app: &App) {
    let (status, text) = patch(app, 2).await.expect("no panic");
    assert!(status == 503 && text.contains("too many bodies"), "{status} {}", &text[..text.len().min(200)]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bodies_of_writes_that_wait_for_a_connection_count_until_those_have_ended() {
    let world = World::trusting(&format!("{GATED} {LARGE}")).await;
    let config = world.config(LARGE_CONFIG);
    let app =
        App::start(&config.replace("database: {", "database: { statement_timeout: 50s, pool_size: 1, queue: 20,"))
            .await;
    let first = get(&app, "/api/slow_item/1");
    begun(&world, 1).await;
    let mut writes = Vec::new();
    for count in 1..=4 {
        writes.push(patch(&app, 1));
        waiting(&app, count).await;
    }
    no_room(&app).await;
    world.sql("INSERT INTO gate VALUES (true)").await;
    assert_eq!(first.await.expect("no panic"), 200);
    for write in writes {
        assert_eq!(write.await.expect("no panic").0, 200);
    }
    assert_eq!(patch(&app, 2).await.expect("no panic").0, 200, "there is room again");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bodies_of_writes_under_way_count_though_their_clients_hung_up() {
    let world = World::trusting(&format!("{GATED} {LARGE}")).await;
    let config = world.config(LARGE_CONFIG);
    let app = App::start(&config.replace("database: {", "database: { statement_timeout: 50s, pool_size: 8,")).await;
    let other = world.database.client().await;
    other.batch_execute("BEGIN; SELECT FROM doc WHERE id = 1 FOR UPDATE").await.expect("it is free");
    let writes: Vec<_> = (0..4).map(|_| patch(&app, 1)).collect();
    let locked =
        "SELECT count(*) = 4 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'";
    world.until(locked).await;
    writes.iter().for_each(JoinHandle::abort);
    // The service may take a moment to notice.
    for _ in 0..20 {
        no_room(&app).await;
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    other.batch_execute("COMMIT").await.expect("it is there");
    app.until("room again", async |app| patch(app, 2).await.expect("no panic").0 == 200).await;
}

#[tokio::test]
async fn a_database_without_memory_is_not_asked_again_at_once() {
    let world = World::trusting(
        "CREATE TABLE item (id int PRIMARY KEY); INSERT INTO item VALUES (1), (2); CREATE SEQUENCE begun;
         CREATE FUNCTION fail(code text) RETURNS int LANGUAGE plpgsql VOLATILE AS $$
           BEGIN PERFORM nextval('begun'); RAISE EXCEPTION 'as the test says' USING ERRCODE = code; END $$;
         CREATE VIEW poor AS SELECT id, fail(CASE id WHEN 1 THEN '53200' ELSE '53100' END) AS failed FROM item;",
    )
    .await;
    let app = world.app("resources: { poor: { key: id } }\n").await;
    for id in 1..=2 {
        let refused = app.get(&format!("/api/poor/{id}")).await.expect(503);
        assert!(!refused.header("retry-after").is_empty(), "{refused:?}");
        assert_eq!(world.text("SELECT last_value::text FROM begun").await, id.to_string());
    }
    assert!(
        app.get("/metrics").await.text.contains(r#"cache_aside_errors_total{component="store",kind="exhausted"} 2"#)
    );
    app.get("/readyz").await.expect(200);
}

#[tokio::test]
async fn a_body_that_drips_is_refused_and_its_connection_closed() {
    let world = World::trusting(GATED).await;
    let server = "server: { listen: \"127.0.0.1:0\", drain_delay: 0s, request_timeout: 500ms }\n";
    let app = App::start(&(world.config("resources: { item: { write: [update] } }\n") + server)).await;
    let mut stream = TcpStream::connect(address(&app)).await.expect("it listens");
    let head =
        "PATCH /api/item/1 HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{";
    stream.write_all(head.as_bytes()).await.expect("it is open");
    let said = rest(&mut stream).await;
    assert!(said.starts_with("HTTP/1.1 408"), "{said}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_never_reads_its_answers_is_cut_off() {
    let world = World::trusting(
        "CREATE TABLE big (id int PRIMARY KEY, v text); INSERT INTO big VALUES (1, repeat('x', 900000));",
    )
    .await;
    let server = "server: { listen: \"127.0.0.1:0\", drain_delay: 0s, request_timeout: 1s }\n";
    let app = App::start(&(world.config("resources: { big: {} }\n") + server)).await;
    app.until("cached", async |app| app.get("/api/big/1").await.expect(200).source() == "cache").await;
    let before = app.metric("process_open_fds").await;
    let mut deaf = Vec::new();
    for _ in 0..50 {
        let mut stream = TcpStream::connect(address(&app)).await.expect("it listens");
        let asked = "GET /api/big/1 HTTP/1.1\r\nHost: x\r\n\r\n".repeat(20);
        stream.write_all(asked.as_bytes()).await.expect("it is open");
        deaf.push(stream);
    }
    app.until("connected", async |app| app.metric("process_open_fds").await >= before + 50).await;
    app.until("cut off", async |app| app.metric("process_open_fds").await < before + 10).await;
    app.get("/api/big/1").await.expect(200);
    drop(deaf);
}

#[tokio::test]
async fn the_limit_of_open_files_is_raised_and_connections_fit_into_it() {
    let dir = tempfile::tempdir().expect("a folder can be made");
    let world = World::trusting(GATED).await;
    let config = world.config("resources: { item: {} }\nserver: { listen: \"127.0.0.1:0\", drain_delay: 0s }\n");
    crate::app::migrate(&config);
    let file = dir.path().join("config.yaml");
    std::fs::write(&file, config).expect("the configuration can be written");
    let mut command = std::process::Command::new("prlimit");
    command.args([
        "--nofile=64:600",
        "setpriv",
        "--pdeathsig",
        "KILL",
        env!("CARGO_BIN_EXE_cache-aside"),
        "serve",
        "--config",
    ]);
    command.arg(&file);
    let app = App::spawn(command, dir).await;
    app.until("ready", async |app| app.get("/readyz").await.status == 200).await;
    assert_eq!(app.metric("process_max_fds").await, 600);
    assert!(app.log().contains("fewer are taken"), "{}", app.log());
    let mut flood = Vec::new();
    for _ in 0..1_000 {
        flood.push(TcpStream::connect(address(&app)).await.expect("the kernel lets them wait"));
    }
    // Those who say nothing are sent away, and there is room again.
    app.get("/api/item/1").await.expect(200);
    assert!(!app.log().contains("Too many open files"), "{}", app.log());
}
