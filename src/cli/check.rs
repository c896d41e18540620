//! `cache-aside check`: the configuration held against the world, one line per finding.

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use super::{failed, load, misconfigured, runtime, say, store};
use crate::app::{look, open_cache};
use crate::cache::AnyCache;
use crate::cache::memcached::MemcachedCache;
use crate::catalog::{Capture, Resource, State, called};
use crate::config::{AccessLevel, Config, Env, InvalidationMode, LogFormat};
use crate::store::{AnyStore, Store};
use crate::telemetry;

/// Counts what it prints.
#[derive(Default)]
struct Findings {
    errors: usize,
}

impl Findings {
    fn ok(what: &str) {
        say(format_args!("ok       {what}"));
    }

    fn warning(what: &str) {
        say(format_args!("warning  {what}"));
    }

    fn error(&mut self, what: &str) {
        self.errors += 1;
        say(format_args!("error    {what}"));
    }
}

pub(super) fn run(file: Option<&Path>, env: &Env, offline: bool) -> ExitCode {
    telemetry::init_log(LogFormat::Text, env.get("RUST_LOG").or(Some("error")), true);
    let (config, is_demo) = match load(file, env) {
        Ok(loaded) => loaded,
        Err(error) => return misconfigured(&error),
    };
    let mut findings = Findings::default();
    Findings::ok("the configuration is well formed");
    for missing in config.not_built_yet() {
        Findings::warning(&missing);
    }
    if !offline {
        let checked = runtime().and_then(|runtime| {
            let checked = runtime.block_on(connected(&config, is_demo, &mut findings));
            runtime.shutdown_background();
            checked
        });
        if let Err(error) = checked {
            return failed(&error);
        }
    }
    if findings.errors > 0 { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

async fn connected(config: &Config, is_demo: bool, findings: &mut Findings) -> anyhow::Result<()> {
    let store = store(config, is_demo).await?;
    if let Err(error) = store.ping().await {
        findings.error(&format!("database: {error}"));
    } else {
        let version = match &store {
            AnyStore::Postgres(store) => store.version().await.unwrap_or_default(),
            AnyStore::Mysql(store) => store.version().await.unwrap_or_default(),
            AnyStore::Sqlite(_) => String::new(),
        };
        Findings::ok(format!("database: {} {version} answers", store.engine()).replace("  ", " ").as_str());
        if let AnyStore::Postgres(store) = &store {
            match store.decoding().await {
                Ok(all) => all.into_iter().for_each(|said| match said {
                    Ok(words) => Findings::ok(&format!("database: {words}")),
                    Err(problem) if problem.fatal => findings.error(&format!("database: {}", problem.text)),
                    Err(problem) => Findings::warning(&format!("database: {}", problem.text)),
                }),
                Err(error) => findings.error(&format!("database: {error}")),
            }
        }
        if let AnyStore::Postgres(store) = &store {
            match store.replica().await {
                Some(Ok(words)) => Findings::ok(&format!("database: {words}")),
                // The service is slower without it, and right.
                Some(Err(words)) => Findings::warning(&format!("database: {words}")),
                None => {}
            }
        }
        if let (AnyStore::Mysql(_), true) = (&store, config.watermark().is_some()) {
            Findings::warning(
                "database: TRUNCATE and DDL fire no triggers there: what they change is seen when the TTL ends; \
                 delete the rows instead, or drop them from the cache with cache-aside invalidate",
            );
        }
        let catalog = look(&store, config).await.0;
        for (name, state) in catalog.all() {
            let name = called(name);
            let (served, problems) = match state {
                State::Ready(query, problems) if query.parameters.is_some() => {
                    Findings::ok(&format!("{name}: the statement can be run"));
                    if query.capture == Capture::On {
                        Findings::ok(&format!("{name}: changes by anybody are captured"));
                    }
                    suggest(&store, query, &name).await;
                    (true, problems)
                }
                State::Ready(resource, problems) => {
                    let keys: Vec<&str> = resource.key_columns().map(|column| column.name.as_str()).collect();
                    let columns = resource.columns.len();
                    Findings::ok(&format!(
                        "{name}: table {}, key ({}), {columns} columns",
                        resource.table.name,
                        keys.join(", ")
                    ));
                    if resource.capture == Capture::On {
                        Findings::ok(&format!("{name}: changes by anybody are captured"));
                    }
                    (true, problems)
                }
                State::Waiting(problems) => (false, problems),
            };
            for problem in problems {
                let line = format!("{name}: {}", problem.text);
                if served && !problem.fatal && !problem.bypass {
                    Findings::warning(&line);
                } else {
                    findings.error(&line);
                }
            }
        }
    }
    if config.invalidation.mode == InvalidationMode::Wal && config.access.adhoc_queries != AccessLevel::Off {
        Findings::warning(
            "access.adhoc_queries: with invalidation.mode wal the database's role may replicate, and whoever may ask anything \
             may move or drop the slot with it: give this scope to nobody you don't trust with the cache",
        );
    }
    cache(config, findings).await
}

/// Names the tables that a statement reads and that are not among those whose change drops its results.
async fn suggest(store: &AnyStore, query: &Resource, name: &str) {
    let AnyStore::Postgres(store) = store else { return };
    match store.reads(query).await {
        Ok(tables) => {
            let missing: Vec<String> = tables.into_iter().filter(|table| !query.depends_on.contains(table)).collect();
            if !missing.is_empty() {
                let words = missing.join(", ");
                Findings::warning(&format!("{name}: it also reads {words}; name them with depends_on:"));
            }
        }
        Err(error) => Findings::warning(&format!("{name}: which tables it reads is not known: {error}")),
    }
}

async fn memcached(config: &Config, cache: &MemcachedCache, findings: &mut Findings) {
    let profile = match cache.profile().await {
        Ok(profile) => profile,
        Err(error) => {
            findings.error(&format!("cache: {} can't be used: {error}", config.cache.url));
            return;
        }
    };
    let megabytes = profile.memory >> 20;
    Findings::ok(&format!("cache: memcached {} answers, with {megabytes} MiB for items", profile.version));
    // The header of an entry and that of the item come on top.
    let needed = config.cache.max_entry as u64 + 1024;
    if needed > profile.item_size {
        Findings::warning(&format!(
            "cache: it takes items of up to {} bytes, and cache.max_entry is {}: what lies between is not cached; start it with -I {}m, \
             or lower cache.max_entry",
            profile.item_size,
            config.cache.max_entry,
            needed.div_ceil(1 << 20)
        ));
    }
    if profile.evicts {
        Findings::ok("cache: it makes room for what is new");
    } else {
        Findings::warning("cache: it was started with -M: once full it refuses fills, and is not used; leave -M out");
    }
}

async fn cache(config: &Config, findings: &mut Findings) -> anyhow::Result<()> {
    let cache = open_cache(config)?;
    match &cache {
        AnyCache::Memory(_) => {
            Findings::ok("cache: in this process");
            return Ok(());
        }
        AnyCache::Memcached(cache) => {
            memcached(config, cache, findings).await;
            return Ok(());
        }
        AnyCache::Redis(_) | AnyCache::Cluster(_) => {}
    }
    // The lane connects by itself; give it the time that a slow network takes.
    let infos = cache.infos(Duration::from_secs(3)).await;
    if infos.is_empty() {
        findings.error(&format!("cache: no node of {} answers", config.cache.url));
    }
    for (address, info) in infos {
        match info {
            Ok(info) => server(&address, &info),
            Err(why) => findings.error(&format!("cache: {address} can't be used: {why}")),
        }
    }
    Ok(())
}

/// What a server says of itself.
fn server(address: &str, info: &str) {
    let field = |name: &str| info.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim);
    // Valkey keeps to `redis_version` the version of Redis that it came from.
    let (name, version) =
        field("valkey_version").map_or(("Redis", field("redis_version")), |own| ("Valkey", Some(own)));
    Findings::ok(&format!("cache: {name} {} answers at {address}", version.unwrap_or("of unknown version")));
    match field("maxmemory_policy") {
        Some("noeviction") if field("maxmemory") == Some("0") => Findings::warning(
            "cache: no maxmemory and no eviction: it grows until the machine is full; set maxmemory and maxmemory-policy allkeys-lru",
        ),
        Some("noeviction") => Findings::warning(
            "cache: maxmemory-policy noeviction: once full it refuses fills; set allkeys-lru or allkeys-lfu",
        ),
        Some(policy) => Findings::ok(&format!("cache: maxmemory-policy {policy}")),
        None => Findings::warning("cache: its eviction policy is not known"),
    }
}
