//! How changes come back: rounds that carry what the database says has changed into a memory, and say so there.
//!
//! ```text
//! look      the memory's control key: what it has caught up with, and who it is
//! owed      what changed since, and which state of the database that leads to: one statement
//! drop      those entries
//! advance   if nobody did so since the look, and the memory is still the same: it has caught up
//! ```
//!
//! Anyone may run a round at any time. A late, paused or repeated one is refused, or claims less than it could: there is no
//! leader, no lock that outlives its owner, and nothing is ever marked as delivered.

mod plan;
#[cfg(feature = "rounds")]
mod rounds;

pub use plan::{Plan, plan};
#[cfg(feature = "rounds")]
pub use rounds::{Pace, Rounds, Trouble, Troubles};
