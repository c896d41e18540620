//! Dropping keys, on one server or on a node of a cluster.
//!
//! A cluster takes keys of different slots only one by one. While a slot leaves for another node, its keys are here or
//! there; what is there counts for nothing, and should it ever come back the node begins anew (see `cache::slots`).

use redis::aio::MultiplexedConnection;
use redis::{Cmd, Pipeline, RedisResult, Value};

use super::script::Scripts;
use super::shared::Shared;
use crate::cache::control::Control;
use crate::cache::lane::Wait;

/// Keys that one command drops.
const CHUNK: usize = 1_000;

/// Keys that were not dropped, since they are not here.
#[derive(Default)]
pub(super) struct NotHere<'k> {
    /// They have left, or would have if there were any: their slots are leaving.
    pub(super) left: Vec<&'k str>,
    /// Another node has them.
    pub(super) moved: Vec<&'k str>,
}

impl<'k> NotHere<'k> {
    fn add(&mut self, other: NotHere<'k>) {
        self.left.extend(other.left);
        self.moved.extend(other.moved);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.left.is_empty() && self.moved.is_empty()
    }

    /// Whether nothing is to be feared from them: none is another node's, and what comes back will be noticed.
    pub(super) fn is_harmless(&self, control: &Control) -> bool {
        self.moved.is_empty() && self.left.iter().all(|key| control.misses(key))
    }
}

/// Drops whatever is there. `wait` begins anew with each round trip.
pub(super) async fn unlink<'k, K: AsRef<str>>(
    shared: &Shared,
    conn: &mut MultiplexedConnection,
    keys: &'k [K],
    wait: &mut Wait,
) -> RedisResult<NotHere<'k>> {
    let mut not_here = NotHere::default();
    for some in keys.chunks(CHUNK) {
        *wait = Wait::new(shared.timeout);
        if shared.member.is_some() {
            let commands = some.iter().map(|key| {
                let mut unlink = redis::cmd("UNLINK");
                unlink.arg(&*shared.spell(key.as_ref()));
                unlink
            });
            not_here.add(send(conn, some, commands.collect()).await?);
        } else {
            let mut unlink = redis::cmd("UNLINK");
            for key in some {
                unlink.arg(key.as_ref());
            }
            let () = unlink.query_async(conn).await?;
        }
    }
    Ok(not_here)
}

/// The same, except for what writers hold, save this `owner`.
pub(super) async fn spare<'k, K: AsRef<str>>(
    shared: &Shared,
    conn: &mut MultiplexedConnection,
    keys: &'k [K],
    owner: &[u8],
    wait: &mut Wait,
) -> RedisResult<NotHere<'k>> {
    let mut not_here = NotHere::default();
    for some in keys.chunks(CHUNK) {
        *wait = Wait::new(shared.timeout);
        let scripts = &shared.scripts;
        let commands = || some.iter().map(|key| scripts.spare(&shared.spell(key.as_ref()), owner)).collect();
        not_here.add(match send(conn, some, commands()).await {
            Err(error) if error.code() == Some("NOSCRIPT") => {
                // The server has forgotten it: they are loaded and sent once more.
                let mut load = Pipeline::new();
                Scripts::load(&mut load);
                *wait = Wait::new(shared.timeout);
                load.exec_async(conn).await?;
                *wait = Wait::new(shared.timeout);
                send(conn, some, commands()).await?
            }
            outcome => outcome?,
        });
    }
    Ok(not_here)
}

/// Sends a command for each key, and says which of the keys are not here.
async fn send<'k, K: AsRef<str>>(
    conn: &mut MultiplexedConnection,
    keys: &'k [K],
    commands: Vec<Cmd>,
) -> RedisResult<NotHere<'k>> {
    let mut pipe = Pipeline::with_capacity(commands.len());
    for command in commands {
        pipe.add_command(command);
    }
    let mut not_here = NotHere::default();
    for (key, reply) in keys.iter().zip(conn.send_packed_commands(&pipe, 0, keys.len()).await?) {
        match reply {
            Value::ServerError(error) if error.code() == "ASK" => not_here.left.push(key.as_ref()),
            Value::ServerError(error) if error.code() == "MOVED" => not_here.moved.push(key.as_ref()),
            Value::ServerError(error) => return Err(error.into()),
            _ => {}
        }
    }
    Ok(not_here)
}
