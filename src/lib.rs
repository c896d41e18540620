//! cache-aside
#![forbid(unsafe_code)]
pub mod aside;
pub mod catalog;
pub mod cache;
pub mod config;
pub mod store;
pub mod telemetry;
pub mod http;
