//! cache-aside
#![forbid(unsafe_code)]
pub mod catalog;
pub mod cache;
pub mod config;
pub mod store;
