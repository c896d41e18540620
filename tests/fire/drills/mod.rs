//! One file per drill.

pub mod cache_killed;
pub mod flush;
pub mod hot;
pub mod idle;
pub mod permits;
pub mod roll;
pub mod slow_database;
pub mod stampede;
