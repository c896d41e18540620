//! What a user may type, and what is said when it is wrong.

mod arbitrary;
mod environment;
mod errors;
mod files;
mod form;
mod schema;
mod secrets;
mod sections;
mod unbuilt;

use super::{Config, Env};

/// Enough to be a configuration; lines are appended to it from line 6 on.
const BASE: &str = "database:\n  url: postgres://app:secret@db/grocery\nresources:\n  users:\n    key: id\n";

fn env(variables: &[(&str, &str)]) -> Env {
    variables.iter().copied().collect()
}

fn parse(text: &str) -> Result<Config, String> {
    parse_with(text, &[])
}

fn parse_with(text: &str, variables: &[(&str, &str)]) -> Result<Config, String> {
    Config::from_yaml(text, "config.yaml", &env(variables)).map_err(|error| error.to_string())
}

/// [`BASE`] and more.
fn with(more: &str) -> Result<Config, String> {
    parse(&format!("{BASE}{more}"))
}

/// [`BASE`] under these variables.
fn under(variables: &[(&str, &str)]) -> Result<Config, String> {
    parse_with(BASE, variables)
}

/// Without a file.
fn bare(variables: &[(&str, &str)]) -> Result<Option<Config>, String> {
    Config::load(None, &env(variables)).map_err(|error| error.to_string())
}
