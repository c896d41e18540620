//! The eight scripts. Everything else is plain commands: a script costs the server some thirty times a GET.

use redis::{Cmd, Pipeline, Script};

/// The texts, loaded whenever a connection is made.
const TEXTS: [&str; 8] = [
    include_str!("lease.lua"),
    include_str!("fill.lua"),
    include_str!("renew.lua"),
    include_str!("release.lua"),
    include_str!("round.lua"),
    include_str!("tell.lua"),
    include_str!("spare.lua"),
    include_str!("hold.lua"),
];

/// The scripts by their fingerprints.
pub(super) struct Scripts {
    lease: Script,
    fill: Script,
    renew: Script,
    release: Script,
    round: Script,
    tell: Script,
    spare: Script,
    hold: Script,
}

impl Scripts {
    pub(super) fn new() -> Self {
        let [lease, fill, renew, release, round, tell, spare, hold] = TEXTS.map(Script::new);
        Self { lease, fill, renew, release, round, tell, spare, hold }
    }

    /// Adds one `SCRIPT LOAD` for each: EVALSHA finds them from then on, until the server restarts.
    pub(super) fn load(pipe: &mut Pipeline) {
        for text in TEXTS {
            pipe.cmd("SCRIPT").arg("LOAD").arg(text);
        }
    }

    pub(super) fn lease(&self, key: &str, pending: &[u8], lock_ms: u64, refreshes: u64) -> Cmd {
        let mut cmd = call(&self.lease, key);
        cmd.arg(pending).arg(lock_ms).arg(refreshes);
        cmd
    }

    pub(super) fn fill(&self, key: &str, fence: &[u8], value: &[u8], life_ms: u64) -> Cmd {
        let mut cmd = call(&self.fill, key);
        cmd.arg(fence).arg(value).arg(life_ms);
        cmd
    }

    pub(super) fn renew(&self, key: &str, fence: &[u8], lock_ms: u64) -> Cmd {
        let mut cmd = call(&self.renew, key);
        cmd.arg(fence).arg(lock_ms);
        cmd
    }

    pub(super) fn release(&self, key: &str, fence: &[u8]) -> Cmd {
        let mut cmd = call(&self.release, key);
        cmd.arg(fence);
        cmd
    }

    pub(super) fn round(&self, keys: [&str; 2], args: [&str; 7], fields: &[(String, String)]) -> Cmd {
        let mut cmd = redis::cmd("EVALSHA");
        cmd.arg(self.round.get_hash()).arg(keys.len()).arg(&keys).arg(&args);
        for (name, value) in fields {
            cmd.arg(name).arg(value);
        }
        cmd
    }

    pub(super) fn hold(&self, key: &str, value: &[u8], life_ms: u64) -> Cmd {
        let mut cmd = call(&self.hold, key);
        cmd.arg(value).arg(life_ms);
        cmd
    }

    pub(super) fn spare(&self, key: &str, owner: &[u8]) -> Cmd {
        let mut cmd = call(&self.spare, key);
        cmd.arg(owner);
        cmd
    }

    pub(super) fn tell(&self, keys: [&str; 2], batch: &str) -> Cmd {
        let mut cmd = redis::cmd("EVALSHA");
        cmd.arg(self.tell.get_hash()).arg(keys.len()).arg(&keys).arg(batch);
        cmd
    }
}

fn call(script: &Script, key: &str) -> Cmd {
    let mut cmd = redis::cmd("EVALSHA");
    cmd.arg(script.get_hash()).arg(1).arg(key);
    cmd
}
