//! `cache-aside init`: reads a database and prints a configuration to start with.

use std::fmt::Write as _;
use std::process::ExitCode;

use super::{failed, load, misconfigured, runtime, say, store};
use crate::catalog::{Column, Table, discover};
use crate::config::{Env, LogFormat};
use crate::store::Store;
use crate::telemetry;

#[derive(clap::Args)]
pub(super) struct Options {
    /// The database to read. Also `DATABASE_URL`.
    #[arg(long, value_name = "URL")]
    database_url: Option<String>,
}

pub(super) fn run(env: &Env, options: &Options) -> ExitCode {
    telemetry::init_log(LogFormat::Text, env.get("RUST_LOG").or(Some("error")), true);
    let env = match &options.database_url {
        Some(url) => env.clone().with("DATABASE_URL", url),
        None => env.clone(),
    };
    let (config, is_demo) = match load(None, &env) {
        Ok(loaded) => loaded,
        Err(error) => return misconfigured(&error),
    };
    let printed = runtime().and_then(|runtime| {
        let printed = runtime.block_on(async {
            anyhow::ensure!(!is_demo, "say which database: --database-url URL, or DATABASE_URL");
            let store = store(&config, is_demo).await?;
            Ok(configuration(&store.tables().await?, &config.database.url.to_string(), store.own_schema()))
        });
        runtime.shutdown_background();
        printed
    });
    match printed {
        Ok(text) => {
            say(format_args!("{}", text.trim_end()));
            ExitCode::SUCCESS
        }
        Err(error) => failed(&error),
    }
}

/// The file. `from`: the database, without its password. `own`: the schema whose tables need no prefix.
fn configuration(tables: &[Table], from: &str, own: Option<&str>) -> String {
    let mut out = format!(
        "# Every table of {from} that has a primary key, read only.\n\
         # cache-aside check says whether it fits; cache-aside schema prints every key there is.\n\
         database:\n  url: ${{DATABASE_URL}}\n\
         cache:\n  url: ${{CACHE_URL:-redis://localhost:6379}}\n\
         resources:{}\n",
        if tables.iter().all(|table| table.primary_key.is_empty()) { " {}" } else { "" }
    );
    for (name, declared) in discover(tables) {
        let Some(table) = tables.iter().find(|table| table.relation() == declared.table) else { continue };
        // Writing to a String can't fail.
        let _ = writeln!(out, "  {name}:");
        if *table.name != name || table.schema.as_deref().is_some_and(|schema| own != Some(schema)) {
            let _ = writeln!(out, "    table: {}", text(&declared.table));
        }
        let key: Vec<String> = table.primary_key.iter().map(|column| text(column)).collect();
        let key = if let [only] = key.as_slice() { only.clone() } else { format!("[{}]", key.join(", ")) };
        let _ = writeln!(out, "    key: {key}");
        let columns: Vec<String> = table.columns.iter().map(|column| text(&column.name)).collect();
        let _ = writeln!(out, "    columns: [{}]", columns.join(", "));
        let _ = writeln!(out, "    # write: [create, update, delete]");
        if let Some(column) = list(table) {
            let _ = writeln!(out, "    # lists: {{ {}: {{ limit: 1000 }} }}", text(&column.name));
        }
    }
    for table in tables.iter().filter(|table| table.primary_key.is_empty()) {
        let _ = writeln!(out, "# {} has no primary key: name the column that identifies a row with key:", table.name);
    }
    out
}

/// A column that a list may be of: the first that looks like a reference to another table.
fn list(table: &Table) -> Option<&Column> {
    let refers = |column: &&Column| column.name.ends_with("_id") && !table.primary_key.contains(&column.name);
    table.columns.iter().find(refers).filter(|column| column.exact)
}

/// A text as YAML takes it, whatever stands in it.
fn text(text: &str) -> String {
    let plain = text.starts_with(|first: char| first.is_ascii_lowercase())
        && text.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_')
        && !matches!(text, "y" | "n" | "yes" | "no" | "on" | "off" | "true" | "false" | "null");
    if plain { text.to_owned() } else { serde_json::Value::from(text.replace("${", "$${")).to_string() }
}
