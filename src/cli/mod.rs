//! The command line: one file per command.

mod check;
mod init;
mod invalidate;
mod migrate;
mod serve;
mod warm;

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use clap::{CommandFactory, Parser, Subcommand};

use crate::app::open_store;
use crate::catalog::{Catalog, Resource, State};
use crate::config::{Config, ConfigError, Env};
use crate::demo;
use crate::store::AnyStore;

/// Bad usage, or a configuration that does not parse.
const USAGE: u8 = 2;

#[derive(Parser)]
#[command(name = "cache-aside", version, about, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    config: ConfigFile,
}

#[derive(clap::Args, Clone)]
struct ConfigFile {
    /// The configuration file. Also `CACHE_ASIDE_CONFIG`.
    #[arg(long = "config", value_name = "FILE", global = true)]
    file: Option<PathBuf>,
}

#[derive(Subcommand)]
enum Command {
    /// Run the service (the default). Without a configuration or a database URL: the embedded demo.
    Serve,
    /// Validate the configuration, and hold it against the database and the cache.
    Check {
        /// Validate the file alone; connect to nothing.
        #[arg(long)]
        offline: bool,
    },
    /// Install what tells the cache of changes in the database; safe to run again.
    Migrate(migrate::Options),
    /// Read a database and print a configuration to start with.
    Init(init::Options),
    /// Fill the cache with rows of a resource before anybody asks for them.
    Warm(warm::Options),
    /// Drop entries from the cache: some rows of a resource, or all that it has.
    Invalidate(invalidate::Options),
    /// Print the JSON Schema of the configuration file.
    Schema,
    /// Print a script that completes commands in a shell.
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
}

/// Runs the command that the arguments name.
#[must_use]
pub fn run() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // To standard output for --help and --version, to standard error for mistakes. A closed pipe is not our loss.
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { USAGE } else { 0 });
        }
    };
    let env = Env::from_process();
    let file = cli.config.file.as_deref();
    match cli.command.unwrap_or(Command::Serve) {
        Command::Serve => serve::run(file, &env),
        Command::Check { offline } => check::run(file, &env, offline),
        Command::Init(options) => init::run(&env, &options),
        Command::Invalidate(options) => invalidate::run(file, &env, &options),
        Command::Warm(options) => warm::run(file, &env, &options),
        Command::Migrate(options) => migrate::run(file, &env, &options),
        Command::Schema => {
            say(format_args!("{:#}", Config::json_schema()));
            ExitCode::SUCCESS
        }
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "cache-aside", &mut std::io::stdout());
            ExitCode::SUCCESS
        }
    }
}

/// The configuration, and whether it is the demo's because there is none.
fn load(file: Option<&Path>, env: &Env) -> Result<(Config, bool), ConfigError> {
    match Config::load(file, env)? {
        Some(config) => Ok((config, false)),
        None => Ok((demo::config(env)?, true)),
    }
}

/// The configured database; the demo's gets its tables.
async fn store(config: &Config, is_demo: bool) -> anyhow::Result<AnyStore> {
    let store = open_store(config)?;
    if let (true, AnyStore::Sqlite(store)) = (is_demo, &store) {
        store.execute(demo::SQL).await?;
    }
    Ok(store)
}

/// A declared resource that fits the database.
fn resource(catalog: &Catalog, name: &str) -> anyhow::Result<Arc<Resource>> {
    match catalog.resources.get(name) {
        Some(State::Ready(resource, _)) => Ok(Arc::clone(resource)),
        Some(State::Waiting(problems)) => {
            let words: Vec<&str> = problems.iter().map(|problem| problem.text.as_str()).collect();
            anyhow::bail!("resource {name} can't be looked at: {}", words.join("; "));
        }
        None => match catalog.nearest(name) {
            Some(near) => anyhow::bail!("there is no resource {name:?}; did you mean {near:?}?"),
            None => anyhow::bail!("there is no resource {name:?}"),
        },
    }
}

/// Prints a line. Whoever closed the pipe has read enough: `println!` would panic.
fn say(line: std::fmt::Arguments<'_>) {
    let _ = writeln!(std::io::stdout(), "{line}");
}

fn misconfigured(error: &ConfigError) -> ExitCode {
    eprintln!("{error}");
    ExitCode::from(USAGE)
}

fn failed(error: &anyhow::Error) -> ExitCode {
    eprintln!("{error:#}");
    ExitCode::FAILURE
}

fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_multi_thread().enable_all().build()?)
}
