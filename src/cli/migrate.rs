//! `cache-aside migrate`: installs what tells of changes in the database, prints it, or removes it.

use std::path::Path;
use std::process::ExitCode;

use super::{failed, load, misconfigured, runtime, say, store};
use crate::app::look;
use crate::catalog::{State, called};
use crate::config::{Config, Env, InvalidationMode, LogFormat};
use crate::store::postgres::PostgresStore;
use crate::store::{AnyStore, Wanted};
use crate::telemetry;

#[derive(clap::Args)]
pub(super) struct Options {
    /// Print the SQL and change nothing.
    #[arg(long)]
    print: bool,
    /// Remove the capture of all tables, whoever installed it.
    #[arg(long, conflicts_with = "role")]
    uninstall: bool,
    /// Let this role serve: it needs no more than that, and owns nothing.
    #[arg(long = "grant", value_name = "ROLE")]
    role: Option<String>,
}

pub(super) fn run(file: Option<&Path>, env: &Env, options: &Options) -> ExitCode {
    telemetry::init_log(LogFormat::Text, env.get("RUST_LOG").or(Some("error")), true);
    let (config, is_demo) = match load(file, env) {
        Ok(loaded) => loaded,
        Err(error) => return misconfigured(&error),
    };
    let migrated = runtime().and_then(|runtime| {
        let migrated = runtime.block_on(migrate(&config, is_demo, options));
        runtime.shutdown_background();
        migrated
    });
    match migrated {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => failed(&error),
    }
}

/// Whether everything that is declared is captured now.
async fn migrate(config: &Config, is_demo: bool, options: &Options) -> anyhow::Result<bool> {
    if options.uninstall && options.print && !matches!(config.database.url.scheme(), "mysql" | "mariadb") {
        say(format_args!("{}", PostgresStore::uninstall_script().trim_end()));
        return Ok(true);
    }
    anyhow::ensure!(
        !is_demo,
        "nothing is configured, so there is no database: give --config FILE, or set DATABASE_URL"
    );
    let store = store(config, is_demo).await?;
    if let AnyStore::Sqlite(_) = store {
        say(format_args!("nothing to do: this database tells nobody of changes; the service's own writes invalidate"));
        return Ok(true);
    }
    if options.uninstall {
        uninstall(&store, options.print).await?;
        return Ok(true);
    }
    if config.invalidation.mode == InvalidationMode::None {
        eprintln!("note: invalidation.mode is none: a service with this configuration does not use what is installed");
    }
    let (catalog, outage) = look(&store, config).await;
    anyhow::ensure!(!outage, "the database does not answer; nothing was changed");
    let mut whole = catalog.all().next().is_some();
    let mut wanted: Vec<Wanted> = Vec::new();
    for (name, state) in catalog.all() {
        match state {
            State::Ready(resource, _) => wanted.extend(resource.wanted()),
            State::Waiting(problems) => {
                whole = false;
                for problem in problems {
                    eprintln!("error: {}: {}", called(name), problem.text);
                }
            }
        }
    }
    anyhow::ensure!(catalog.all().next().is_some(), "there is no table with a primary key");
    let role = options.role.as_deref();
    if options.print {
        let script = match &store {
            AnyStore::Postgres(store) => store.install_script(&wanted, role).await?,
            AnyStore::Mysql(store) => store.install_script(&wanted, role).await?,
            AnyStore::Sqlite(_) => String::new(),
        };
        say(format_args!("{}", script.trim_end()));
        return Ok(whole);
    }
    let done = match &store {
        AnyStore::Postgres(store) => store.install(&wanted, role).await?,
        AnyStore::Mysql(store) => store.install(&wanted, role).await?,
        AnyStore::Sqlite(_) => Vec::new(),
    };
    for line in done {
        say(format_args!("{line}"));
    }
    Ok(whole)
}

/// Removes the capture, or says how.
async fn uninstall(store: &AnyStore, print: bool) -> anyhow::Result<()> {
    match store {
        AnyStore::Mysql(store) if print => say(format_args!("{}", store.uninstall_script().await?.trim_end())),
        AnyStore::Mysql(store) => store.uninstall().await?,
        AnyStore::Postgres(store) => store.uninstall().await?,
        AnyStore::Sqlite(_) => {}
    }
    if !print {
        say(format_args!("removed the schema cache_aside with its triggers"));
    }
    Ok(())
}
