//! Reads the command line and runs what it says. The only place that exits.

use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    cache_aside::cli::run()
}
