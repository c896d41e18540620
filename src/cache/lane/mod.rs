//! What the lanes of Redis and Memcached have in common.

mod clock;
mod failed;
mod returns;

pub(super) use self::clock::{Wait, now_ms};
pub(super) use self::failed::{Failed, Strikes};
pub(super) use self::returns::{PATIENCE, Returns};
