//! One look at a memory: its control key, its clock, and whether it is still the one that caught up.

use std::collections::HashMap;

use redis::aio::MultiplexedConnection;
use redis::{Pipeline, Value};

use super::shared::{Peer, Shared, line, text};
use crate::cache::control::{Control, Ids, field};
use crate::cache::lane::now_ms;
use crate::cache::slots::Holdings;

/// What a look over one connection found.
pub(super) struct Seen {
    pub(super) control: Control,
    pub(super) ids: Ids,
    /// The hash slots that the node of a cluster has now.
    pub(super) holdings: Option<Holdings>,
    /// The memory's clock, in milliseconds.
    pub(super) now: u64,
    /// When the look was sent, by this process's clock.
    pub(super) sent: u64,
}

/// Looks, in one round trip.
///
/// # Errors
///
/// Where there is no answer, where the server follows another one, or where what should be the control key is not one.
pub(super) async fn look(shared: &Shared, conn: &mut MultiplexedConnection, peer: &Peer) -> anyhow::Result<Seen> {
    let mut pipe = Pipeline::new();
    pipe.cmd("HGETALL").arg(&shared.control_key).cmd("TIME").cmd("INFO").arg("replication");
    if shared.member.is_some() {
        pipe.cmd("CLUSTER").arg("NODES");
    }
    let sent = now_ms();
    anyhow::ensure!(shared.leads(peer), "another server is the master now");
    let mut replies: Vec<Value> = pipe.query_async(conn).await?;
    let nodes = if shared.member.is_some() { replies.pop() } else { None };
    let (fields, (seconds, micros), info): (HashMap<String, String>, (u64, u64), Value) =
        redis::from_redis_value(Value::Array(replies))?;
    let info = text(&info).unwrap_or_default();
    let holdings = match nodes {
        Some(nodes) => {
            let said = text(&nodes).unwrap_or_default();
            Some(Holdings::read(&said).ok_or_else(|| anyhow::anyhow!("CLUSTER NODES said something else"))?)
        }
        None => None,
    };
    anyhow::ensure!(line(&info, "role").is_none_or(|role| role == "master"), "it follows another server now");
    let replication = line(&info, "master_replid").unwrap_or_default().to_owned();
    Ok(Seen {
        control: Control::read(fields),
        ids: Ids { run: peer.run.clone(), replication },
        holdings,
        // Rounded up: what was taken at this moment must not look younger than it is.
        now: seconds * 1000 + micros.div_ceil(1000),
        sent,
    })
}

/// Tells everybody who runs rounds here of what this process caches. A round that looked before is void.
pub(super) async fn register(shared: &Shared, conn: &mut MultiplexedConnection, seen: &Seen) -> anyhow::Result<bool> {
    let mappings = shared.mappings.load();
    let lacking: Vec<_> =
        mappings.iter().filter(|(fingerprint, _)| !seen.control.mappings.contains_key(*fingerprint)).collect();
    if lacking.is_empty() {
        return Ok(false);
    }
    let mut pipe = Pipeline::new();
    pipe.atomic();
    let hset = pipe.cmd("HSET").arg(&shared.control_key);
    for (fingerprint, mapping) in lacking {
        hset.arg(field::mapping(fingerprint)).arg(mapping.to_json());
    }
    pipe.ignore().cmd("HINCRBY").arg(&shared.control_key).arg(field::NUMBER).arg(1).ignore();
    let () = pipe.query_async(conn).await?;
    Ok(true)
}
