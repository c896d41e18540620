//! The environment, taken once, so that tests can bring their own.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::path::Path;

use super::ConfigError;
use super::file::read_text;

/// Environment variables.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Env {
    texts: BTreeMap<String, String>,
    /// Names of variables whose value is no UTF-8: an error, but only where one of them is read.
    garbled: BTreeSet<String>,
}

impl Env {
    /// The variables of this process. Names that are no UTF-8 are left out: nothing here could ask for them.
    #[must_use]
    pub fn from_process() -> Self {
        Self::from_os(std::env::vars_os())
    }

    pub(super) fn from_os(variables: impl IntoIterator<Item = (OsString, OsString)>) -> Self {
        let mut env = Self::default();
        for (name, value) in variables {
            let Ok(name) = name.into_string() else { continue };
            match value.into_string() {
                Ok(value) => drop(env.texts.insert(name, value)),
                Err(_) => drop(env.garbled.insert(name)),
            }
        }
        env
    }

    /// The same with one more variable.
    #[must_use]
    pub fn with(mut self, name: &str, value: &str) -> Self {
        self.texts.insert(name.to_owned(), value.to_owned());
        self
    }

    /// The value of a variable, if it is set and text.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&str> {
        self.texts.get(name).map(String::as_str)
    }

    /// The same, but a value that is not text is an error rather than absent.
    pub(super) fn text(&self, name: &str) -> Result<Option<&str>, ConfigError> {
        if self.garbled.contains(name) {
            return Err(ConfigError::new(format!("{name}: its value is not UTF-8")));
        }
        Ok(self.get(name))
    }

    /// The names that start with `prefix`, in order.
    pub(super) fn names<'a>(&'a self, prefix: &'a str) -> impl Iterator<Item = &'a str> {
        self.texts.keys().chain(&self.garbled).map(String::as_str).filter(move |name| name.starts_with(prefix))
    }

    /// A variable's value or, where `NAME_FILE` is set, that file's content, and which of the two it was.
    /// An empty variable is unset.
    pub(super) fn read(&self, name: &str) -> Result<Option<(String, String)>, ConfigError> {
        let file = format!("{name}_FILE");
        let set = |name: &str| self.text(name).map(|value| value.filter(|value| !value.is_empty()));
        match (set(name)?, set(&file)?) {
            (Some(_), Some(_)) => Err(both(name, &file)),
            (Some(value), None) => Ok(Some((value.to_owned(), name.to_owned()))),
            (None, Some(path)) => Ok(Some((read_secret(&file, path)?, file))),
            (None, None) => Ok(None),
        }
    }
}

impl<N: Into<String>, V: Into<String>> FromIterator<(N, V)> for Env {
    fn from_iter<I: IntoIterator<Item = (N, V)>>(variables: I) -> Self {
        let texts = variables.into_iter().map(|(name, value)| (name.into(), value.into())).collect();
        Self { texts, garbled: BTreeSet::new() }
    }
}

/// A variable and its `_FILE` form are both set, and nobody can know which one is meant.
pub(super) fn both(name: &str, file: &str) -> ConfigError {
    ConfigError::new(format!("{name} and {file} are both set; keep one of them"))
}

/// A mounted secret: the file's text without its final line break.
pub(super) fn read_secret(variable: &str, path: &str) -> Result<String, ConfigError> {
    let text = read_text(Path::new(path)).map_err(|error| ConfigError::new(format!("{variable}: {error}")))?;
    let text = text.strip_suffix('\n').unwrap_or(&text);
    Ok(text.strip_suffix('\r').unwrap_or(text).to_owned())
}
