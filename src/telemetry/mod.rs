//! What operators see: every metric in one table, and the log.

#[cfg(feature = "server")]
mod log;
mod metrics;
mod ratio;
mod resource;
mod throttle;

#[cfg(feature = "server")]
pub use log::init as init_log;
pub use metrics::Metrics;
pub use resource::{Outcome, ResourceMetrics};
pub use throttle::Throttle;
