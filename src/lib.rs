//! cache-aside

pub mod app;
pub mod aside;
pub mod cache;
pub mod catalog;
pub mod cli;
pub mod config;
pub mod demo;
pub mod http;
pub mod store;
pub mod telemetry;
