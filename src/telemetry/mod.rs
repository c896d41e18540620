//! What operators see: every metric in one table, and the log.

mod log;
mod metrics;
mod ratio;
mod throttle;

pub use log::init as init_log;
pub use metrics::{Metrics, Outcome, ResourceMetrics, Tier};
pub use throttle::Throttle;
