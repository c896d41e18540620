//! `cache-aside serve`: the service, or the embedded demo.

use std::path::Path;
use std::process::ExitCode;

use super::{failed, load, misconfigured, runtime, say, store};
use crate::app::{App, open_cache};
use crate::config::{Config, Env};
use crate::{demo, telemetry};

pub(super) fn run(file: Option<&Path>, env: &Env) -> ExitCode {
    let (config, is_demo) = match load(file, env) {
        Ok(loaded) => loaded,
        Err(error) => return misconfigured(&error),
    };
    telemetry::init_log(config.telemetry.log, env.get("RUST_LOG"), false);
    let served = runtime().and_then(|runtime| {
        let served = runtime.block_on(serve(config, is_demo));
        // What still runs has nobody left to answer.
        runtime.shutdown_background();
        served
    });
    match served {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            failed(&error)
        }
    }
}

async fn serve(config: Config, is_demo: bool) -> anyhow::Result<()> {
    let store = store(&config, is_demo).await?;
    let cache = open_cache(&config)?;
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        database = %config.database.url,
        cache = %config.cache.url,
        "starting"
    );
    let app = App::build(config, store, cache)?;
    for address in app.addresses() {
        tracing::info!(%address, "listening on {address}");
    }
    if let (true, Some(address)) = (is_demo, app.addresses().first()) {
        say(format_args!("{}", demo::invitation(address)));
    }
    app.run_until_stopped().await
}
