//! Everything that needs real servers, in one binary: they are started once, by the tests themselves.

#![allow(unreachable_pub, reason = "modules of one binary")]
#![allow(clippy::expect_used, clippy::panic, reason = "a test that cannot go on says why and ends")]

/// Section, key, value: much time, where a story says nothing of time. What it tells must not depend on whether a machine with
/// dozens of servers stands still for a moment.
const GIVEN: [(&str, &str, &str); 3] =
    [("database", "statement_timeout", "10s"), ("cache", "timeout", "2s"), ("server", "request_timeout", "20s")];

mod app;
mod engines;
mod faults;
mod nodes;
mod servers;

mod access;
mod breakers;
mod cache_suite;
mod capture;
mod cli;
mod cluster;
mod examples;
mod hot;
mod invalidation;
mod lanes;
mod library;
mod matrix;
mod memcached;
mod mysql;
mod oracle;
mod outages;
mod overload;
mod penetration;
mod pool;
mod queries;
mod reads;
mod refresh;
mod replica;
mod rights;
mod robustness;
mod shutdown;
mod stampede;
mod start;
mod store_suite;
mod telemetry;
mod tier;
mod tls;
mod valkey;
mod wal;
mod warm;
mod writes;
