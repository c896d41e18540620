//! What the lanes of Redis and Memcached have in common.

mod returns;

pub(super) use self::returns::{PATIENCE, Returns};
