//! What keeps trouble from spreading: breakers, and the budget of retries. Pure rules, without I/O and without a clock.
//!
//! - `breaker`: whether the other side is asked at all. One per lane of a cache node, fed by its operations and probed by its
//!   supervisor's looks; one for the database, fed and probed by the watch that asks it beside the queue
//! - `budget`: how many loads may be tried again, and after which pause
//!
//! Time is bounded elsewhere: whoever waits for something brings his deadline ([`Waiters`](crate::store::Waiters)), and every
//! adapter bounds its own steps.

mod breaker;
mod budget;

pub use breaker::{Breaker, State};
pub use budget::{ATTEMPTS, Budget, pause};
