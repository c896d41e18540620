//! A Redis Cluster of six real nodes, and what operators do with its slots.
#![allow(dead_code, reason = "which of it is in use depends on the stories")]
#![expect(clippy::expect_used, clippy::panic, reason = "a test without its servers ends here, and says why")]
#![expect(unreachable_pub, reason = "one binary: `pub` says what is meant for the stories")]

use std::time::{Duration, Instant};

use redis::Value;
use redis::aio::MultiplexedConnection;

use crate::app::PATIENCE;
use crate::servers::Redis;

/// Three masters, each with a replica.
pub struct Nodes(pub Vec<Redis>);

impl Nodes {
    pub async fn start() -> Self {
        // A busy machine must not look like a dead node.
        Self::start_with("10000").await
    }

    /// A node that says nothing for so many milliseconds is given up.
    pub async fn start_with(patience: &str) -> Self {
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

    pub fn url(&self) -> String {
        // The others are found by asking these.
        format!("redis+cluster://127.0.0.1:{},127.0.0.1:{}", self.0[4].port(), self.0[0].port())
    }

    pub async fn id(&self, index: usize) -> String {
        let mut conn = self.0[index].client().await;
        redis::cmd("CLUSTER").arg("MYID").query_async(&mut conn).await.expect("it answers")
    }

    pub async fn slot(&self, key: &str) -> u16 {
        let mut conn = self.0[0].client().await;
        redis::cmd("CLUSTER").arg("KEYSLOT").arg(key).query_async(&mut conn).await.expect("it answers")
    }

    /// The node that holds this slot.
    pub async fn holder(&self, slot: u16) -> usize {
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
    pub async fn rounds(&self, index: usize, prefix: &str) -> u64 {
        let mut conn = self.0[index].client().await;
        let control = format!("{prefix}*cache-aside:control");
        let keys: Vec<String> = redis::cmd("KEYS").arg(control).query_async(&mut conn).await.expect("it answers");
        redis::cmd("HGET").arg(&keys[0]).arg("n").query_async(&mut conn).await.expect("it is there")
    }

    /// Moves a slot with its keys, as an operator's tools do; `moving` is called when its keys have left before it.
    pub async fn move_slot(&self, slot: u16, from: usize, to: usize, moving: impl AsyncFnOnce()) {
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
    pub async fn move_keys_and_back(&self, slot: u16, from: usize, to: usize, moving: impl AsyncFnOnce()) {
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
