//! `filter: true`: keys that no row has cost no query, and no row that is there is denied for longer than was promised.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::app::{App, World, command};
use crate::servers::Redis;

const ROWS: &str = "
    CREATE TABLE item (id bigint PRIMARY KEY, v int NOT NULL DEFAULT 0);
    INSERT INTO item SELECT n FROM generate_series(1, 30000) n;
    CREATE TABLE pair (a int, b text, PRIMARY KEY (a, b)); INSERT INTO pair VALUES (1, 'x'), (2, 'y,z');";

const CONFIG: &str = "resources: { item: { filter: true, negative_ttl: 5s, write: [create, update, delete] }, pair: { filter: true } }\n";

/// What a hit may be behind the database, as it was configured.
const PROMISE: Duration = Duration::from_secs(1);

/// Waits until a resource's filter answers.
async fn answers(app: &App, resource: &str) {
    let metric = format!("cache_aside_filter_keys{{resource=\"{resource}\"}}");
    app.until("filtered", async |app| app.metric(&metric).await > 0).await;
}

async fn queries(app: &App) -> u64 {
    app.metric("cache_aside_store_queries_total{operation=\"row\",resource=\"item\"}").await
        + app.metric("cache_aside_store_queries_total{operation=\"rows\",resource=\"item\"}").await
}

#[tokio::test]
async fn keys_that_no_row_has_cost_no_query() {
    let world = World::new(ROWS).await;
    let app = world.app(CONFIG).await;
    answers(&app, "item").await;
    let before = queries(&app).await;
    for id in 0..1000_u64 {
        let absent = 1_000_000 + id.wrapping_mul(0x9e37_79b9_7f4a_7c15) % 1_000_000_000;
        app.get(&format!("/api/item/{absent}")).await.expect(404);
    }
    let asked = queries(&app).await - before;
    assert!(asked <= 30, "{asked} of 1000 were asked for: those that only seem to be there");
    let local = app.metric("cache_aside_requests_total{resource=\"item\",result=\"negative\",tier=\"local\"}").await;
    assert!(local >= 970, "{local}");
    let batch: Vec<String> = (0..100).map(|id| (2_000_000_000 + id).to_string()).collect();
    let reply = app.get(&format!("/api/item?id={},7", batch.join(","))).await.expect(200);
    assert_eq!(reply.json()["missing"].as_array().map(Vec::len), Some(100));
    let absent = app.get("/api/item/999999999999").await.expect(404);
    assert!(absent.header("cache-status").contains("hit"), "{absent:?}");
    // What is there is there.
    for id in (1..=30_000).step_by(997) {
        app.get(&format!("/api/item/{id}")).await.expect(200);
    }
    answers(&app, "pair").await;
    app.get("/api/pair/2,y%2Cz").await.expect(200);
    app.get("/api/pair/2,y").await.expect(404);
    let kept = app.metric("cache_aside_filter_keys{resource=\"item\"}").await;
    assert!((29_000..=30_000).contains(&kept), "{kept}");
}

#[tokio::test]
async fn a_new_row_is_there_at_once_where_it_was_written() {
    let world = World::new(ROWS).await;
    let app = world.app(CONFIG).await;
    answers(&app, "item").await;
    for id in 100_001..100_050 {
        let path = format!("/api/item/{id}");
        app.get(&path).await.expect(404);
        app.post("/api/item", &format!(r#"{{"id":{id}}}"#)).await.expect(201);
        app.get(&path).await.expect(200);
        app.delete(&path).await.expect(204);
        app.get(&path).await.expect(404);
    }
}

/// Rows that were inserted, and when that was acknowledged; readers that check what is said of them.
#[derive(Default)]
struct Ledger {
    there: Mutex<HashMap<u64, Instant>>,
    order: Mutex<Vec<u64>>,
    denied: AtomicU64,
    reads: AtomicU64,
    done: AtomicBool,
}

impl Ledger {
    fn inserted(&self, ids: impl Iterator<Item = u64>) {
        let now = Instant::now();
        for id in ids {
            self.there.lock().expect("nobody panics").insert(id, now);
            self.order.lock().expect("nobody panics").push(id);
        }
    }

    /// One of the latest rows, or now and then any.
    fn pick(&self, turn: usize) -> Option<u64> {
        let order = self.order.lock().expect("nobody panics");
        let (all, last) = (order.len(), order.len().checked_sub(1)?);
        let back = if turn.is_multiple_of(3) { turn * 7919 % all } else { turn % all.min(50) };
        Some(order[last - back])
    }

    /// Reads the latest rows, and some of all, for as long as the story goes on.
    async fn read(self: Arc<Self>, client: reqwest::Client, url: String) {
        let mut turn = 0_usize;
        while !self.done.load(Ordering::SeqCst) {
            turn += 1;
            let Some(id) = self.pick(turn) else {
                tokio::task::yield_now().await;
                continue;
            };
            let since = self.there.lock().expect("nobody panics")[&id];
            let asked = Instant::now();
            let Ok(reply) = client.get(format!("{url}/api/item/{id}")).send().await else { continue };
            self.reads.fetch_add(1, Ordering::SeqCst);
            if reply.status() == 404 && asked > since + PROMISE {
                eprintln!(
                    "{id} was denied {:?} after its commit: {:?}",
                    asked - since,
                    reply.headers().get("cache-status")
                );
                self.denied.fetch_add(1, Ordering::SeqCst);
            }
        }
    }
}

/// Inserts in all ways by `psql`, through the other replica, and faults of the cache; readers at both replicas meanwhile.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_row_is_denied_for_longer_than_was_promised() {
    let mut redis = Redis::start().await;
    let world = World::new(ROWS).await.on(&redis);
    let config = format!("{CONFIG}telemetry: {{ audit_ratio: 1 }}\n");
    let (one, other) = (world.app(&config).await, world.app(&config).await);
    let ledger = Arc::new(Ledger::default());
    let readers: Vec<_> = [&one, &other, &one, &other]
        .map(|app| tokio::spawn(Arc::clone(&ledger).read(app.client.clone(), app.url.clone())))
        .into();
    let mut next = 1_000_000_u64;
    let mut insert = async |count: u64| {
        let ids = next..next + count;
        next += count;
        // While nobody knows of them, they are denied and remembered as absent.
        for id in ids.clone().take(20) {
            one.get(&format!("/api/item/{id}")).await.expect(404);
            other.get(&format!("/api/item/{id}")).await.expect(404);
        }
        world.sql(&format!("INSERT INTO item SELECT n FROM generate_series({}, {}) n", ids.start, ids.end - 1)).await;
        ledger.inserted(ids.clone());
        // Until both have found the last of them, and their filters answer again.
        for app in [&one, &other] {
            app.until("found", async |app| app.get(&format!("/api/item/{}", ids.end - 1)).await.status == 200).await;
            answers(app, "item").await;
        }
    };
    answers(&one, "item").await;
    answers(&other, "item").await;
    for _ in 0..20 {
        insert(1).await;
    }
    // A batch that names its keys, one that says "anything", and a statement that is told as the whole resource.
    for count in [500, 3_000, 20_000] {
        insert(count).await;
    }
    world.sql("UPDATE item SET id = id + 5000000 WHERE id BETWEEN 1 AND 40").await;
    ledger.inserted(5_000_001..=5_000_040);
    insert(1).await;
    one.delete("/admin/cache/item").await.expect(204);
    insert(1).await;
    // The cache comes back empty, and rows were inserted while it was away.
    redis.kill().await;
    world.sql("INSERT INTO item SELECT n FROM generate_series(6000001, 6000050) n").await;
    ledger.inserted(6_000_001..=6_000_050);
    redis.start_again().await;
    insert(10).await;
    for app in [&one, &other] {
        let answered =
            app.metric("cache_aside_requests_total{resource=\"item\",result=\"negative\",tier=\"local\"}").await;
        assert!(answered > 0, "the filter took part");
        assert_eq!(app.metric("cache_aside_consistency_checks_total{resource=\"item\",result=\"stale\"}").await, 0);
    }
    ledger.done.store(true, Ordering::SeqCst);
    for reader in readers {
        reader.await.expect("no reader panics");
    }
    let (reads, denied) = (ledger.reads.load(Ordering::SeqCst), ledger.denied.load(Ordering::SeqCst));
    assert_eq!(denied, 0, "of {reads} reads");
    assert!(reads > 1000, "{reads}");
}

#[tokio::test]
async fn too_many_keys_leave_the_filter_out_and_that_is_said() {
    let world = World { cache_more: ", local: { filter_max_bytes: 30KiB }".into(), ..World::new(ROWS).await };
    let app = world.app(CONFIG).await;
    app.until("said", async |app| {
        app.get("/readyz?verbose")
            .await
            .text
            .contains("resource item: its filter of existing keys does not answer: there are more keys")
    })
    .await;
    app.get("/readyz").await.expect(200);
    let before = queries(&app).await;
    app.get("/api/item/77777777").await.expect(404);
    assert_eq!(queries(&app).await, before + 1, "it is asked for, as ever");
}

#[tokio::test]
async fn where_a_filter_could_not_be_kept_right_it_is_refused() {
    let world = World::new(
        &format!("{ROWS} CREATE TABLE loose (k citext_ PRIMARY KEY); CREATE VIEW seen AS SELECT * FROM item;")
            .replace("citext_", "char(5)"),
    )
    .await;
    let filtered = |more: &str| format!("resources: {{ item: {{ filter: true{more} }} }}\n");
    for (config, words) in [
        (world.config(&filtered("")) + "invalidation: { mode: none }\n", "needs invalidation.mode outbox or wal"),
        (world.config(&filtered(", consistency: hold")), "consistency: hold"),
        (world.config(&filtered(", negative_ttl: 0s")), "needs a negative_ttl"),
        (world.config(&filtered(", depends_on: [pair]")), "depends_on"),
        (world.config(&filtered("")).replace("redis://", "memcached://"), "needs redis:// or valkey://"),
        (world.config(&filtered("")).replace("redis://", "redis+cluster://"), "cluster"),
        (
            format!(
                "database: {{ url: \"sqlite::memory:\" }}\ncache: {{ url: \"{}\" }}\n{}",
                world.redis_url,
                filtered("")
            ),
            "SQLite",
        ),
    ] {
        let checked = command(&config, &["check", "--offline"]);
        let said = String::from_utf8_lossy(&checked.stderr);
        assert!(checked.status.code() == Some(2) && said.contains(words), "{words}: {said}");
    }
    for (table, words) in [("loose", "one text alone"), ("seen", "neither a view nor depends_on")] {
        let key = if table == "seen" { "id" } else { "k" };
        let config = world.config(&format!("resources: {{ {table}: {{ filter: true, key: {key} }} }}\n"));
        let checked = command(&config, &["check"]);
        let said = String::from_utf8_lossy(&checked.stdout);
        assert!(checked.status.code() == Some(1) && said.contains(words), "{words}: {said}");
    }
}

#[tokio::test]
async fn what_another_deployment_holds_is_told_to_those_who_keep_it_in_process() {
    let world = World::new(ROWS).await;
    // Its mapping outlives it.
    drop(world.app("resources: { item: { consistency: hold, write: [create] } }\n").await);
    let app = world.app("resources: { item: { filter: true, local_ttl: 1h } }\n").await;
    answers(&app, "item").await;
    let local = "cache_aside_requests_total{resource=\"item\",result=\"hit\",tier=\"local\"}";
    app.until("held in process", async |app| {
        app.get("/api/item/5").await.expect(200);
        app.metric(local).await > 0
    })
    .await;
    world.sql("INSERT INTO item VALUES (77777); UPDATE item SET v = 1 WHERE id = 5").await;
    crate::invalidation::seen(&[&app], "/api/item/5", r#""v":1"#).await;
    crate::invalidation::seen(&[&app], "/api/item/77777", r#""id":77777"#).await;
}
