//! The fault drill: three replicas on real servers, writers inside and outside, readers everywhere, and one fault after
//! another. It knows when each version of each row was acknowledged, so it can tell of every read how old it was.
//!
//! `cargo test --test drill` runs a short one, `make drill` the long one. It fails if a guarantee was broken.

#![allow(unreachable_pub, dead_code, reason = "modules of another binary too")]
#![allow(clippy::expect_used, clippy::panic, reason = "a drill that cannot go on says why and ends")]

/// Nothing: services run as they do for others.
const GIVEN: [(&str, &str, &str); 0] = [];

#[path = "../it/app.rs"]
mod app;
#[path = "../it/faults.rs"]
mod faults;
mod fleet;
mod ledger;
#[path = "../it/nodes.rs"]
mod nodes;
mod phases;
#[path = "../it/servers.rs"]
mod servers;

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use fleet::Fleet;

fn main() -> ExitCode {
    // What `cargo test` passes on is about tests, and this is none: only these four are for us.
    let value = |name: &str| std::env::args().skip_while(|arg| arg != name).nth(1);
    let seconds: f64 = value("--seconds").and_then(|number| number.parse().ok()).unwrap_or(1.5);
    let mode = value("--mode").unwrap_or_else(|| "outbox".to_owned());
    let cache = value("--cache").unwrap_or_else(|| "redis".to_owned());
    let follows = value("--standby").is_some_and(|answer| answer == "yes");
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime = runtime.expect("a runtime should start");
    let broken = runtime.block_on(async {
        let fleet = Arc::new(Fleet::start(mode, &cache, follows).await);
        let crowd = fleet.crowd();
        phases::run(&fleet, Duration::from_secs_f64(seconds)).await;
        if follows {
            println!("{} loads went to the standby at those that are still up", fleet.read_from_standby().await);
        }
        crowd.disperse().await;
        fleet.ledger.report()
    });
    if broken.is_empty() {
        println!("\nno guarantee was broken");
        return ExitCode::SUCCESS;
    }
    println!("\nBROKEN");
    for line in broken {
        println!("- {line}");
    }
    ExitCode::FAILURE
}
