//! The faults, one after another, with a calm phase after each.

use std::time::Duration;

use tokio::time::sleep;

use crate::faults::Proxy;
use crate::fleet::{Fleet, Memory, REPLICAS, here, kind};
use crate::ledger::Expect::{Bounded, ReadYourWrites};
use crate::servers::{Postgres, Redis};

/// How long everything has to find back to normal after a fault; then calm begins.
const RECOVERY: Duration = Duration::from_secs(3);

async fn calm(fleet: &Fleet, unit: Duration, after: &str) {
    fleet.ledger.begin(&format!("({after}: recovery)"), Bounded);
    sleep(RECOVERY).await;
    fleet.ledger.begin(&format!("({after}: calm again)"), ReadYourWrites);
    sleep(unit).await;
}

/// Each fault lasts for a `unit` or a few.
pub async fn run(fleet: &Fleet, unit: Duration) {
    sleep(Duration::from_secs(2)).await;
    fleet.ledger.begin("calm", ReadYourWrites);
    sleep(unit * 2).await;
    replicas(fleet, unit).await;
    if fleet.engine == "cluster" {
        cluster(fleet, unit).await;
    } else {
        networks(fleet, unit).await;
        cache(fleet, unit).await;
        failover_of_the_cache(fleet, unit).await;
    }
    database(fleet, unit).await;
    failover_of_the_database(fleet, unit).await;
}

async fn replicas(fleet: &Fleet, unit: Duration) {
    fleet.ledger.begin("replicas killed (kill -9)", ReadYourWrites);
    for replica in 0..REPLICAS {
        sleep(unit / 3).await;
        fleet.replace(replica).await;
    }
    sleep(unit / 3).await;
    calm(fleet, unit, "replicas killed").await;

    // Any of them may be filling, writing or running the rounds when it is stopped; each is once.
    fleet.ledger.begin("replicas stopped (SIGSTOP) for a moment", ReadYourWrites);
    for turn in 0..(REPLICAS * 3) {
        let replica = turn % REPLICAS;
        fleet.signal(replica, "STOP").await;
        sleep(unit.mul_f64(0.1 + 0.2 * fastrand::f64())).await;
        fleet.signal(replica, "CONT").await;
        sleep(unit / 20).await;
    }
    calm(fleet, unit, "stopped for a moment").await;

    fleet.ledger.begin("replicas stopped for longer than the promise", ReadYourWrites);
    for replica in 0..REPLICAS {
        fleet.signal(replica, "STOP").await;
        sleep(unit.max(Duration::from_millis(1300))).await;
        fleet.signal(replica, "CONT").await;
        sleep(unit / 5).await;
    }
    calm(fleet, unit, "stopped for longer").await;
}

async fn networks(fleet: &Fleet, unit: Duration) {
    let (cache, database) = (&fleet.to_cache, &fleet.to_database);
    for (name, ways) in [
        ("one replica cut off from the cache", &[cache][..]),
        ("one replica cut off from the database", &[database]),
        ("one replica cut off from both", &[cache, database]),
    ] {
        fleet.ledger.begin(name, Bounded);
        for replica in 0..REPLICAS {
            for ways in ways {
                ways[replica].black_hole();
            }
            sleep(unit).await;
            for ways in ways {
                ways[replica].restore();
            }
            sleep(unit / 5).await;
        }
        calm(fleet, unit, name).await;
    }
}

async fn cache(fleet: &Fleet, unit: Duration) {
    fleet.ledger.begin("cache killed, back with what it had persisted", Bounded);
    for _ in 0..3 {
        sleep(unit / 2).await;
        fleet.cache.lock().await.start_again().await;
    }
    sleep(unit / 2).await;
    calm(fleet, unit, "cache killed").await;

    fleet.ledger.begin("cache hung", Bounded);
    fleet.cache.lock().await.pause();
    sleep(unit * 2).await;
    fleet.cache.lock().await.resume();
    calm(fleet, unit, "cache hung").await;

    if let Memory::Memcached(memcached) = &*fleet.cache.lock().await {
        fleet.ledger.begin("cache flushed", Bounded);
        memcached.say(b"flush_all\r\n", "OK").await;
        sleep(unit).await;
        calm(fleet, unit, "cache flushed").await;
    }
    for (name, fault, mend) in [
        ("cache full", &["CONFIG", "SET", "maxmemory", "1"][..], &["CONFIG", "SET", "maxmemory", "0"][..]),
        (
            "cache read-only",
            &["CONFIG", "SET", "min-replicas-to-write", "9"],
            &["CONFIG", "SET", "min-replicas-to-write", "0"],
        ),
        ("cache flushed", &["FLUSHALL"], &["PING"]),
    ] {
        let Memory::Redis(redis) = &*fleet.cache.lock().await else { break };
        fleet.ledger.begin(name, Bounded);
        tell(redis, fault).await;
        sleep(unit).await;
        tell(redis, mend).await;
        calm(fleet, unit, name).await;
    }
}

/// Slots that come and go, and nodes that do.
async fn cluster(fleet: &Fleet, unit: Duration) {
    let mut cache = fleet.cache.lock().await;
    let Memory::Cluster(nodes) = &mut *cache else { return };
    for (name, moves) in [
        ("slots moved to other nodes", 0),
        ("slots moved there and back", 1),
        ("slots whose keys leave and come back", 2),
    ] {
        // What is told while a key is on its way is marked, and bounded.
        fleet.ledger.begin(name, Bounded);
        for row in 0..30 {
            let slot = nodes.slot(&format!("item:{row}")).await;
            let from = nodes.holder(slot).await;
            let to = (0..3).find(|node| *node != from).unwrap_or(0);
            let moving = async || sleep(unit / 30).await;
            match moves {
                0 => nodes.move_slot(slot, from, to, moving).await,
                1 => {
                    nodes.move_slot(slot, from, to, moving).await;
                    nodes.move_slot(slot, to, from, moving).await;
                }
                // A round must have seen it: see the decision on clusters.
                _ => nodes.move_keys_and_back(slot, from, to, async || sleep(Duration::from_secs(1)).await).await,
            }
        }
        calm(fleet, unit, name).await;
    }

    fleet.ledger.begin("a node killed, its replica takes over", Bounded);
    let holder = nodes.holder(nodes.slot("item:0").await).await;
    nodes.0[holder].kill().await;
    sleep(unit.max(Duration::from_secs(6))).await;
    calm(fleet, unit, "node killed").await;
    fleet.ledger.begin("the killed node is back, and follows", Bounded);
    nodes.0[holder].start_again().await;
    calm(fleet, unit, "node back").await;

    fleet.ledger.begin("a node hung until it was replaced, then it wakes up", Bounded);
    let holder = nodes.holder(nodes.slot("item:1").await).await;
    nodes.0[holder].pause();
    sleep(unit.max(Duration::from_secs(8))).await;
    nodes.0[holder].resume();
    sleep(unit).await;
    calm(fleet, unit, "node hung").await;
}

async fn tell(redis: &Redis, words: &[&str]) {
    let mut cmd = redis::cmd(words[0]);
    cmd.arg(&words[1..]);
    let _: redis::Value = cmd.query_async(&mut redis.client().await).await.expect("it obeys");
}

/// The promoted one has missed writes; then the same with one replica of the service left behind at the old master.
async fn failover_of_the_cache(fleet: &Fleet, unit: Duration) {
    for (name, left_behind) in [
        ("cache failed over, with writes lost", None),
        ("cache split: one replica still talks to the old master", Some(0)),
    ] {
        let mut cache = fleet.cache.lock().await;
        // Nobody follows a Memcached.
        let Memory::Redis(redis) = &*cache else { return };
        let link = Proxy::to(here(redis.port())).await;
        let (host, port) = (link.addr().ip().to_string(), link.addr().port().to_string());
        let next = Redis::start_as(kind(&fleet.engine), &["--replicaof", &format!("{host} {port}")]).await;
        let mut conn = next.client().await;
        loop {
            let info: String = redis::cmd("INFO").arg("replication").query_async(&mut conn).await.expect("it answers");
            if info.contains("master_link_status:up") {
                break;
            }
            sleep(Duration::from_millis(20)).await;
        }
        sleep(unit / 2).await;
        link.black_hole();
        sleep(unit.min(Duration::from_secs(3))).await;
        fleet.ledger.begin(name, Bounded);
        tell(&next, &["REPLICAOF", "NO", "ONE"]).await;
        for (replica, way) in fleet.to_cache.iter().enumerate() {
            way.lead_to(here(next.port()));
            if Some(replica) != left_behind {
                way.cut();
                way.restore();
            }
        }
        if left_behind.is_some() {
            sleep(unit).await;
            fleet.to_cache.iter().for_each(|way| {
                way.cut();
                way.restore();
            });
        }
        sleep(unit).await;
        *cache = Memory::Redis(next);
        drop(cache);
        calm(fleet, unit, name).await;
    }
}

async fn database(fleet: &Fleet, unit: Duration) {
    fleet.ledger.begin("database crashed and restarted", Bounded);
    for _ in 0..2 {
        sleep(unit / 2).await;
        fleet.postgres.lock().await.start_again().await;
    }
    sleep(unit / 2).await;
    calm(fleet, unit, "database restarted").await;

    fleet.ledger.begin("database down for longer than the promise", Bounded);
    fleet.postgres.lock().await.kill().await;
    sleep(unit.max(Duration::from_millis(1500))).await;
    fleet.postgres.lock().await.start_again().await;
    calm(fleet, unit, "database down").await;

    fleet.ledger.begin("database slow (stopped half of the time)", Bounded);
    for _ in 0..10 {
        fleet.postgres.lock().await.pause();
        sleep(unit / 10).await;
        fleet.postgres.lock().await.resume();
        sleep(unit / 10).await;
    }
    calm(fleet, unit, "database slow").await;
}

async fn failover_of_the_database(fleet: &Fleet, unit: Duration) {
    let mut postgres = fleet.postgres.lock().await;
    let link = Proxy::to(here(postgres.port())).await;
    let standby = Postgres::standby(link.addr()).await;
    sleep(unit).await;
    link.black_hole();
    // What is committed from now on will be lost.
    sleep(unit.min(Duration::from_secs(2))).await;
    fleet.ledger.begin("database failed over to its standby, with commits lost", Bounded);
    postgres.kill().await;
    // Each row has one writer: while all rows are given new versions, that is us.
    let alone = fleet.writing.write().await;
    fleet.ledger.forgive();
    standby.promote().await;
    fleet.set_primary(standby.port());
    *postgres = standby;
    drop(postgres);
    fleet.overwrite().await;
    drop(alone);
    sleep(unit).await;
    calm(fleet, unit, "database failed over").await;
}
