//! What this user may do on the server: asked once for each connection, before anything relies on it.
//!
//! A right that is missing would show in the middle of a fill or a round, as an entry that stays pending or a watermark that
//! stays where it is. So every command that is ever sent, by itself or in a script, is queued in a transaction that is
//! discarded: the server refuses what the user may not do while it queues, and runs nothing. `docs/redis.md` has the list
//! for people.

use redis::{Pipeline, Value};

/// Each command with arguments that it can be queued with; `KEY` is one of ours.
const COMMANDS: [&[&str]; 23] = [
    &["MULTI"],
    &["GET", KEY],
    &["SET", KEY, "", "XX", "GET", "PX", "1"],
    &["GETRANGE", KEY, "0", "0"],
    &["SETRANGE", KEY, "0", ""],
    &["PTTL", KEY],
    &["PEXPIRE", KEY, "1"],
    &["DEL", KEY],
    &["UNLINK", KEY],
    &["HGETALL", KEY],
    &["HGET", KEY, "n"],
    &["HSET", KEY, "n", "0"],
    &["HINCRBY", KEY, "n", "1"],
    &["XADD", KEY, "MAXLEN", "~", "1", "*", "keys", ""],
    &["XRANGE", KEY, "-", "-"],
    &["TIME"],
    &["INFO", "server"],
    &["SCRIPT", "LOAD", ""],
    &["EVALSHA", "", "1", KEY],
    &["DISCARD"],
    // Nothing that writes: this one runs.
    &["MULTI"],
    &["GET", KEY],
    &["EXEC"],
];

/// What is sent to a node of a cluster beside that.
const IN_A_CLUSTER: [&[&str]; 5] =
    [&["MULTI"], &["CLUSTER", "INFO"], &["CLUSTER", "SLOTS"], &["CLUSTER", "NODES"], &["DISCARD"]];

const KEY: &str = "…";

/// Adds the questions. `key` is one that this process may use and nobody does.
pub(super) fn ask(pipe: &mut Pipeline, key: &str, in_a_cluster: bool) {
    let more = if in_a_cluster { &IN_A_CLUSTER[..] } else { &[] };
    for words in COMMANDS.iter().chain(more) {
        let mut cmd = redis::Cmd::new();
        for word in *words {
            cmd.arg(if *word == KEY { key } else { word });
        }
        pipe.add_command(cmd);
    }
}

/// What the user may not do, in words; `None`: nothing is missing. Any other refusal is not about rights.
pub(super) fn missing(replies: &[Value]) -> Option<String> {
    let mut names: Vec<String> = Vec::new();
    let mut said = String::new();
    for (words, reply) in COMMANDS.iter().chain(&IN_A_CLUSTER).zip(replies) {
        if let Value::ServerError(error) = reply
            && (error.code() == "NOPERM" || error.details().is_some_and(|details| details.contains("NOPERM")))
        {
            let name =
                if matches!(words[0], "SCRIPT" | "CLUSTER") { words[..2].join(" ") } else { words[0].to_owned() };
            if !names.contains(&name) {
                names.push(name);
            }
            error.details().unwrap_or_default().clone_into(&mut said);
        }
    }
    (!names.is_empty()).then(|| {
        format!("its user lacks rights that are needed, for {} ({said}); docs/redis.md has the list", names.join(", "))
    })
}
