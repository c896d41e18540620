//! What operators see: every metric in one table, and the log.

#[cfg(feature = "server")]
mod log;
mod metrics;
mod ratio;
mod throttle;

#[cfg(feature = "server")]
pub use log::init as init_log;
pub use metrics::{Metrics, Outcome, ResourceMetrics, Tier};
pub use throttle::Throttle;
