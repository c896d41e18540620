//! `cache-aside serve`: the service, or the embedded demo.

use std::path::Path;
use std::process::ExitCode;

use super::{failed, misconfigured, runtime};
use crate::app::{App, open_cache, open_store};
use crate::config::{Config, Env};
use crate::store::AnyStore;
use crate::{demo, telemetry};

pub(super) fn run(file: Option<&Path>, env: &Env) -> ExitCode {
    let loaded = Config::load(file, env).and_then(|config| match config {
        Some(config) => Ok((config, false)),
        None => demo::config(env).map(|config| (config, true)),
    });
    let (config, is_demo) = match loaded {
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
    let store = open_store(&config.database)?;
    if let (true, AnyStore::Sqlite(store)) = (is_demo, &store) {
        store.execute(demo::SQL).await?;
    }
    let cache = open_cache(&config.cache)?;
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
        println!("{}", demo::invitation(address));
    }
    app.run_until_stopped().await
}
