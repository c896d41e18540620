//! `cache-aside invalidate`: drops entries from the cache, beside a running service or without one.

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;

use super::{failed, load, misconfigured, resource, runtime, say, store};
use crate::app::{look, open_cache};
use crate::cache::{AnyCache, Cache};
use crate::catalog::{KeyError, Resource, Target};
use crate::config::{Config, Env, LogFormat};
use crate::store::Store;
use crate::telemetry;

/// How long the cache may take to accept a connection.
const CONNECT: Duration = Duration::from_secs(3);
/// Keys that are dropped at once.
const CHUNK: usize = 500;

#[derive(clap::Args)]
pub(super) struct Options {
    /// The resource.
    resource: String,
    /// The rows' keys, as in paths: parts of a composite key are separated by commas. None: everything of the resource.
    ids: Vec<String>,
}

pub(super) fn run(file: Option<&Path>, env: &Env, options: &Options) -> ExitCode {
    telemetry::init_log(LogFormat::Text, env.get("RUST_LOG").or(Some("error")), true);
    let (config, is_demo) = match load(file, env) {
        Ok(loaded) => loaded,
        Err(error) => return misconfigured(&error),
    };
    let done = runtime().and_then(|runtime| {
        let done = runtime.block_on(invalidate(&config, is_demo, options));
        runtime.shutdown_background();
        done
    });
    match done {
        Ok(line) => {
            say(format_args!("{line}"));
            ExitCode::SUCCESS
        }
        Err(error) => failed(&error),
    }
}

async fn invalidate(config: &Config, is_demo: bool, options: &Options) -> anyhow::Result<String> {
    let name = &options.resource;
    let cache = open_cache(config)?;
    if let AnyCache::Memory(_) = cache {
        anyhow::bail!(
            "the cache is in the service's own process: nothing can be dropped from outside; \
             ask the service with DELETE /admin/cache/{name}"
        );
    }
    let store = store(config, is_demo).await?;
    let (catalog, _) = look(&store, config).await;
    let resource = resource(&catalog, name)?;
    let targets = options.ids.iter().map(|id| target(&resource, id)).collect::<anyhow::Result<Vec<_>>>()?;
    cache.connected(CONNECT).await;
    let unreachable = || format!("the cache at {} did not take it", config.cache.url);
    let announced: Vec<_> = if targets.is_empty() {
        vec![resource.announcement(None)]
    } else {
        targets.iter().map(|target| resource.announcement(Some(target.entry()))).collect()
    };
    store.announce(&announced).await.context("it could not be announced in the database")?;
    if targets.is_empty() {
        cache.purge(name).await.with_context(unreachable)?;
        return Ok(format!("dropped everything of {name}"));
    }
    let keys: Vec<&str> = targets.iter().map(Target::entry).collect();
    for some in keys.chunks(CHUNK) {
        if resource.hold {
            cache.invalidate_unless_held(some, None).await.with_context(unreachable)?;
        } else {
            cache.invalidate_everywhere(some).await.with_context(unreachable)?;
        }
    }
    Ok(format!("dropped {} of {name}", keys.len()))
}

fn target(resource: &Arc<Resource>, id: &str) -> anyhow::Result<Target> {
    resource.row_spelled(id).map_err(|error| match error {
        KeyError::Malformed(words) => anyhow::anyhow!("{id:?}: {words}"),
        KeyError::CannotExist => anyhow::anyhow!("{id:?}: no row can have this key"),
    })
}
