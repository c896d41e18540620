//! Redis Cluster, on six real nodes: the contract, changes by others, slots that move under load, and a node that dies.

use std::time::{Duration, Instant};

use cache_aside::cache::AnyCache;
use cache_aside::cache::redis::cluster::ClusterCache;
use redis::Value;
use redis::aio::MultiplexedConnection;

use crate::app::{App, PATIENCE, World};
use crate::cache_suite::{config, contract, trusted};
use crate::invalidation::{every_kind, seen, tier_in_process, warm};
use crate::servers::Redis;

/// Three masters, each with a replica.
struct Nodes(Vec<Redis>);

impl Nodes {
    async fn start() -> Self {
        // A busy machine must not look like a dead node.
        Self::start_with("10000").await
    }

    /// A node that says nothing for so many milliseconds is given up.
    async fn start_with(patience: &str) -> Self {
        let mut nodes = Vec::new();
        for _ in 0..6 {
            nodes.push(Redis::start_with(&["--cluster-enabled", "yes", "--cluster-node-timeout", patience]).await);
        }
        let nodes = Self(nodes);
        for (index, node) in nodes.0.iter().enumerate() {
            node.cluster(&format!("SET-CONFIG-EPOCH {}", index + 1)).await;
        }
        for (node, slots) in nodes.0.iter().zip(["0 5460", "5461 10922", "10923 16383"]) {
            node.cluster(&format!("ADDSLOTSRANGE {slots}")).await;
        }
        for other in &nodes.0[1..] {
            nodes.0[0].cluster(&format!("MEET 127.0.0.1 {}", other.port())).await;
        }
        for node in &nodes.0 {
            node.until("CLUSTER NODES", |text| text.lines().filter(|line| line.contains("connected")).count() == 6)
                .await;
        }
        for index in 0..3 {
            nodes.0[index + 3].cluster(&format!("REPLICATE {}", nodes.id(index).await)).await;
        }
        for (index, node) in nodes.0.iter().enumerate() {
            node.until("CLUSTER INFO", |text| text.contains("cluster_state:ok")).await;
            node.until("CLUSTER NODES", |text| text.matches("slave").count() == 3).await;
            if index >= 3 {
                node.until("INFO replication", |text| text.contains("master_link_status:up")).await;
            }
        }
        nodes
    }

    fn url(&self) -> String {
        // The others are found by asking these.
        format!("redis+cluster://127.0.0.1:{},127.0.0.1:{}", self.0[4].port(), self.0[0].port())
    }

    async fn id(&self, index: usize) -> String {
        let mut conn = self.0[index].client().await;
        redis::cmd("CLUSTER").arg("MYID").query_async(&mut conn).await.expect("it answers")
    }

    async fn slot(&self, key: &str) -> u16 {
        let mut conn = self.0[0].client().await;
        redis::cmd("CLUSTER").arg("KEYSLOT").arg(key).query_async(&mut conn).await.expect("it answers")
    }

    /// The master among the first three that holds this slot.
    async fn holder(&self, slot: u16) -> usize {
        let mut conn = self.0[0].client().await;
        let ranges: Vec<(u16, u16, Value)> = redis::cmd("CLUSTER")
            .arg("SLOTS")
            .query_async::<Vec<Vec<Value>>>(&mut conn)
            .await
            .expect("it answers")
            .into_iter()
            .map(|range| {
                let number = |index: usize| redis::from_redis_value(range[index].clone()).expect("a number");
                (number(0), number(1), range[2].clone())
            })
            .collect();
        let (.., holder) = ranges.into_iter().find(|(first, last, _)| (*first..=*last).contains(&slot)).expect("held");
        let Value::Array(parts) = holder else { panic!("{holder:?}") };
        let port: u16 = redis::from_redis_value(parts[1].clone()).expect("a port");
        self.0.iter().position(|node| node.port() == port).expect("one of ours")
    }

    /// How many rounds a node has seen.
    async fn rounds(&self, index: usize, prefix: &str) -> u64 {
        let mut conn = self.0[index].client().await;
        let control = format!("{prefix}*cache-aside:control");
        let keys: Vec<String> = redis::cmd("KEYS").arg(control).query_async(&mut conn).await.expect("it answers");
        redis::cmd("HGET").arg(&keys[0]).arg("n").query_async(&mut conn).await.expect("it is there")
    }

    /// Moves a slot with its keys, as an operator's tools do; `moving` is called when its keys have left before it.
    async fn move_slot(&self, slot: u16, from: usize, to: usize, moving: impl AsyncFnOnce()) {
        let (from_id, to_id) = (self.id(from).await, self.id(to).await);
        let mut source = self.0[from].client().await;
        self.0[to].cluster(&format!("SETSLOT {slot} IMPORTING {from_id}")).await;
        self.0[from].cluster(&format!("SETSLOT {slot} MIGRATING {to_id}")).await;
        self.move_keys(slot, &mut source, to).await;
        moving().await;
        self.move_keys(slot, &mut source, to).await;
        self.0[to].cluster(&format!("SETSLOT {slot} NODE {to_id}")).await;
        self.0[from].cluster(&format!("SETSLOT {slot} NODE {to_id}")).await;
    }

    /// Begins to move a slot, and thinks better of it when its keys have left.
    async fn move_keys_and_back(&self, slot: u16, from: usize, to: usize, moving: impl AsyncFnOnce()) {
        let (from_id, to_id) = (self.id(from).await, self.id(to).await);
        self.0[to].cluster(&format!("SETSLOT {slot} IMPORTING {from_id}")).await;
        self.0[from].cluster(&format!("SETSLOT {slot} MIGRATING {to_id}")).await;
        self.move_keys(slot, &mut self.0[from].client().await, to).await;
        moving().await;
        self.0[from].cluster(&format!("SETSLOT {slot} STABLE")).await;
        self.move_keys(slot, &mut self.0[to].client().await, from).await;
        self.0[to].cluster(&format!("SETSLOT {slot} STABLE")).await;
    }

    async fn move_keys(&self, slot: u16, source: &mut MultiplexedConnection, to: usize) {
        loop {
            let keys: Vec<String> =
                redis::cmd("CLUSTER").arg("GETKEYSINSLOT").arg(slot).arg(100).query_async(source).await.expect("keys");
            if keys.is_empty() {
                return;
            }
            let mut migrate = redis::cmd("MIGRATE");
            migrate
                .arg("127.0.0.1")
                .arg(self.0[to].port())
                .arg("")
                .arg(0)
                .arg(5000)
                .arg("REPLACE")
                .arg("KEYS")
                .arg(&keys);
            migrate.exec_async(source).await.expect("the other takes them");
        }
    }
}

impl Redis {
    async fn cluster(&self, words: &str) {
        let mut cmd = redis::cmd("CLUSTER");
        for word in words.split(' ') {
            cmd.arg(word);
        }
        cmd.exec_async(&mut self.client().await).await.unwrap_or_else(|error| panic!("CLUSTER {words}: {error}"));
    }

    /// Waits until a command's answer is such.
    async fn until(&self, command: &str, enough: impl Fn(&str) -> bool) {
        let mut conn = self.client().await;
        let started = Instant::now();
        let mut words = command.split(' ');
        let mut cmd = redis::cmd(words.next().expect("a command"));
        for word in words {
            cmd.arg(word);
        }
        loop {
            let text = match cmd.query_async::<Value>(&mut conn).await.expect("it answers") {
                Value::BulkString(text) => String::from_utf8_lossy(&text).into_owned(),
                Value::VerbatimString { text, .. } | Value::SimpleString(text) => text,
                other => format!("{other:?}"),
            };
            if enough(&text) {
                return;
            }
            assert!(started.elapsed() < PATIENCE, "{command}: {text}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_keeps_the_contract() {
    let nodes = Nodes::start().await;
    let open = |prefix: &str| {
        let yaml = format!("cache: {{ url: \"{}\", key_prefix: \"{prefix}\", timeout: 5s }}", nodes.url());
        AnyCache::Cluster(ClusterCache::new(&config(&yaml), None, false).expect("the URL is sound"))
    };
    let cache = open("p:");
    trusted(&cache).await;
    let other = cache.attach();
    trusted(&other).await;
    contract(&cache, &other, "p:").await;
}

async fn world(nodes: &Nodes, schema: &str) -> World {
    let mut world = World::new(schema).await;
    world.redis_url = nodes.url();
    world
}

#[tokio::test]
async fn changes_by_others_reach_every_node_of_a_cluster() {
    let nodes = Nodes::start().await;
    every_kind(world(&nodes, crate::invalidation::SCHEMA).await).await;
    tier_in_process(world(&nodes, crate::invalidation::SCHEMA).await).await;
    crate::queries::depends(world(&nodes, crate::invalidation::SCHEMA).await).await;
}

const ITEMS: &str = "CREATE TABLE item (id int PRIMARY KEY, v int NOT NULL); \
                     INSERT INTO item SELECT g, 0 FROM generate_series(1, 200) g;";
const RESOURCES: &str = "resources: { item: { write: [update] } }\n";

/// Every row, in one batch.
fn all() -> String {
    let ids: Vec<String> = (1..=200).map(|id| id.to_string()).collect();
    format!("/api/item?id={}", ids.join(","))
}

/// The values of a batch, and how many of them came from the cache.
async fn batch(app: &App) -> (Vec<i64>, u64) {
    let reply = app.get(&all()).await.expect(200).json();
    let rows = reply["data"].as_array().expect("rows").iter();
    (rows.map(|row| row["v"].as_i64().expect("a number")).collect(), reply["source"]["cache"].as_u64().unwrap_or(0))
}

#[tokio::test]
async fn slots_move_under_load_and_no_row_is_wrong() {
    let nodes = Nodes::start().await;
    let world = world(&nodes, ITEMS).await;
    let (one, two) = (world.app(RESOURCES).await, world.app(RESOURCES).await);
    one.until("all of it cached", async |app| batch(app).await.1 == 200).await;
    let key = |id: u32| format!("{}item:{id}", world.prefix);
    let mut v = 0;
    for id in 1..=20 {
        let slot = nodes.slot(&key(id)).await;
        let from = nodes.holder(slot).await;
        let path = format!("/api/item/{id}");
        warm(&[&two], &[&path]).await;
        nodes
            .move_slot(slot, from, (from + 1) % 3, async || {
                // Its keys are elsewhere already, the slot is not.
                v += 1;
                one.patch(&path, &format!(r#"{{"v":{v}}}"#)).await.expect(200);
                let reply = two.get(&path).await.expect(200);
                assert!(reply.text.contains(&format!(r#""v":{v}}}"#)), "{reply:?}");
                world.sql(&format!("UPDATE item SET v = -{v} WHERE id = {id}")).await;
                seen(&[&one, &two], &path, &format!(r#""v":-{v}}}"#)).await;
            })
            .await;
        v += 1;
        let wrote = one.patch(&path, &format!(r#"{{"v":{v}}}"#)).await.expect(200);
        let pending = wrote.header("cache-status").contains("pending");
        let reply = two.get(&path).await.expect(200);
        assert!(pending || reply.text.contains(&format!(r#""v":{v}}}"#)), "{wrote:?} {reply:?}");
        seen(&[&one, &two], &path, &format!(r#""v":{v}}}"#)).await;
    }
    for app in [&one, &two] {
        app.until("all of it cached again", async |app| batch(app).await.1 == 200).await;
        let (values, _) = batch(app).await;
        assert!(values[20..].iter().all(|v| *v == 0) && values[..20].iter().all(|v| *v > 0), "{values:?}");
    }
}

#[tokio::test]
async fn what_changed_while_keys_were_away_is_not_forgotten() {
    let nodes = Nodes::start().await;
    let world = world(&nodes, ITEMS).await;
    let app = world.app(RESOURCES).await;
    let away = async |id: u32, change: &str| {
        let key = format!("{}item:{id}", world.prefix);
        let slot = nodes.slot(&key).await;
        let from = nodes.holder(slot).await;
        let path = format!("/api/item/{id}");
        warm(&[&app], &[&path]).await;
        let mut pending = false;
        nodes
            .move_keys_and_back(slot, from, (from + 1) % 3, async || {
                if change == "write" {
                    let wrote = app.patch(&path, r#"{"v":1}"#).await.expect(200);
                    pending = wrote.header("cache-status").contains("pending");
                } else {
                    world.sql(&format!("UPDATE item SET v = 1 WHERE id = {id}")).await;
                    // Until a round that began after that has ended, and lanes, which look half as often, have seen it: the
                    // key itself can't be read meanwhile.
                    let before = nodes.rounds(from, &world.prefix).await;
                    app.until("told", async |_| nodes.rounds(from, &world.prefix).await >= before + 6).await;
                }
            })
            .await;
        // At once, before any round has noticed.
        let reply = app.get(&path).await.expect(200);
        assert!(pending || reply.text.contains(r#""v":1}"#), "{reply:?}");
        seen(&[&app], &path, r#""v":1}"#).await;
    };
    away(1, "write").await;
    away(2, "outside").await;
}

#[tokio::test]
async fn an_entry_that_comes_back_with_its_slot_counts_for_nothing() {
    let nodes = Nodes::start().await;
    let world = world(&nodes, ITEMS).await;
    let app = world.app(RESOURCES).await;
    warm(&[&app], &["/api/item/1"]).await;
    let key = format!("{}item:1", world.prefix);
    let slot = nodes.slot(&key).await;
    let from = nodes.holder(slot).await;
    let mut conn = nodes.0[from].client().await;
    let kept: Vec<u8> = redis::cmd("DUMP").arg(&key).query_async(&mut conn).await.expect("it is there");
    nodes.move_slot(slot, from, (from + 1) % 3, async || {}).await;
    world.sql("UPDATE item SET v = 1 WHERE id = 1").await;
    seen(&[&app], "/api/item/1", r#""v":1}"#).await;
    // What the other node was told of never reached this one.
    warm(&[&app], &["/api/item/1"]).await;
    nodes.move_slot(slot, (from + 1) % 3, from, async || {}).await;
    let restore = redis::cmd("RESTORE").arg(&key).arg(60_000).arg(kept).arg("REPLACE").to_owned();
    restore.exec_async(&mut conn).await.expect("the slot is back");
    let started = Instant::now();
    loop {
        let reply = app.get("/api/item/1").await.expect(200);
        assert!(reply.text.contains(r#""v":1}"#), "{reply:?}");
        if reply.header("cache-status").starts_with("cache-aside; hit") {
            break;
        }
        assert!(started.elapsed() < PATIENCE, "{}", app.log());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn a_node_is_killed_under_load_and_another_takes_its_place() {
    let mut nodes = Nodes::start_with("2000").await;
    let world = world(&nodes, ITEMS).await;
    let (one, two) = (world.app(RESOURCES).await, world.app(RESOURCES).await);
    one.until("all of it cached", async |app| batch(app).await.1 == 200).await;
    let id = 7;
    let holder = nodes.holder(nodes.slot(&format!("{}item:{id}", world.prefix)).await).await;
    let path = format!("/api/item/{id}");
    nodes.0[holder].kill().await;
    let killed = Instant::now();
    let mut v = 0;
    loop {
        v += 1;
        let wrote = one.patch(&path, &format!(r#"{{"v":{v}}}"#)).await.expect(200);
        let pending = wrote.header("cache-status").contains("pending");
        let reply = two.get(&path).await.expect(200);
        assert!(pending || reply.text.contains(&format!(r#""v":{v}}}"#)), "{wrote:?} {reply:?}");
        let (values, cached) = batch(&two).await;
        assert!(pending || values[id - 1] == v, "{values:?}");
        if !pending && two.get(&path).await.header("cache-status").starts_with("cache-aside; hit") && cached == 200 {
            break;
        }
        assert!(killed.elapsed() < PATIENCE, "{}", two.log());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let health = two.get("/readyz?verbose").await.expect(200);
    assert!(!health.text.contains("[!] cache"), "{health:?}");
    // The former master comes back and follows.
    nodes.0[holder].start_again().await;
    world.sql(&format!("UPDATE item SET v = 100000 WHERE id = {id}")).await;
    seen(&[&one, &two], &path, r#""v":100000}"#).await;
    warm(&[&one, &two], &[&path]).await;
}
