//! Drills under fire: herds, dead caches, slow databases, under load that does not wait. Where `tests/drill` asks whether
//! anything was ever wrong, these ask who had to wait, and what the database had to bear.
//!
//! `make drill-stampede` and so on run one each in a release build and print its table. Counts must hold anywhere; of times
//! there are only ratios within one run, and their bounds are generous. `cargo test` runs a small stampede, so that they
//! stay alive, and looks at no time.

#![allow(unreachable_pub, dead_code, reason = "modules of another binary too")]
#![allow(clippy::expect_used, clippy::panic, reason = "a drill that cannot go on says why and ends")]

/// Nothing: services run as they do for others.
const GIVEN: [(&str, &str, &str); 0] = [];

#[path = "../it/app.rs"]
mod app;
mod drills;
mod fleet;
mod load;
mod machine;
mod plot;
mod report;
#[path = "../it/servers.rs"]
mod servers;
mod wire;

use std::process::ExitCode;

use machine::Processors;

use drills::{cache_killed, flush, hot, idle, permits, roll, slow_database, stampede};

const ALL: [&str; 9] =
    ["stampede", "hot", "cache-killed", "cache-hung", "flush", "slow-database", "permits", "idle", "roll"];

fn main() -> ExitCode {
    // What `cargo test` passes on is about tests, and this is none: only these are for us.
    let value = |name: &str| std::env::args().skip_while(|arg| arg != name).nth(1);
    let asked = value("--drill");
    let plot = value("--plot");
    let names = match asked.as_deref() {
        None => vec!["smoke"],
        Some("all") => ALL.to_vec(),
        Some(name) => vec![name],
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime = runtime.expect("a runtime should start");
    let mut held = true;
    for name in names {
        let processors = Processors::now();
        let reports = runtime.block_on(async {
            match name {
                "smoke" => vec![stampede::small().await],
                "stampede" => stampede::run().await,
                "hot" => vec![hot::run().await],
                "cache-killed" => vec![cache_killed::killed().await],
                "cache-hung" => vec![cache_killed::hung().await],
                "flush" => vec![flush::run(plot.as_deref()).await],
                "slow-database" => vec![slow_database::run().await],
                "permits" => vec![permits::run().await],
                "idle" => vec![idle::run().await],
                "roll" => vec![roll::run().await],
                other => panic!("no drill is called {other:?}; say all, or one of {}", ALL.join(", ")),
            }
        });
        for report in reports {
            held &= report.print();
        }
        let percent = processors.stolen_since() * 100.0;
        println!("\nOther machines had {percent:.0} % of the time of this one's processors meanwhile.");
    }
    if cfg!(debug_assertions) {
        println!("\n(a debug build: its times mean nothing)");
    }
    if held { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
