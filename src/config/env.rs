//! The environment, taken once, so that tests can bring their own.

use std::collections::BTreeMap;

use super::ConfigError;

/// Environment variables.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Env(BTreeMap<String, String>);

impl Env {
    /// The variables of this process. Those that are no UTF-8 are left out: none that is read here has a reason to be.
    #[must_use]
    pub fn from_process() -> Self {
        let text = |(name, value): (std::ffi::OsString, std::ffi::OsString)| {
            Some((name.into_string().ok()?, value.into_string().ok()?))
        };
        Self(std::env::vars_os().filter_map(text).collect())
    }

    /// The value of a variable, if it is set.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(name, value)| (name.as_str(), value.as_str()))
    }

    /// A variable's value or, where `NAME_FILE` is set, that file's content less a final line break. Empty is unset.
    pub(super) fn read(&self, name: &str) -> Result<Option<String>, ConfigError> {
        let file = format!("{name}_FILE");
        let set = |name: &str| self.get(name).filter(|value| !value.is_empty());
        match (set(name), set(&file)) {
            (Some(_), Some(_)) => Err(ConfigError::new(format!("{name} and {file} are both set; keep one of them"))),
            (Some(value), None) => Ok(Some(value.to_owned())),
            (None, Some(path)) => read_secret(&file, path).map(Some),
            (None, None) => Ok(None),
        }
    }
}

impl<N: Into<String>, V: Into<String>> FromIterator<(N, V)> for Env {
    fn from_iter<I: IntoIterator<Item = (N, V)>>(variables: I) -> Self {
        Self(variables.into_iter().map(|(name, value)| (name.into(), value.into())).collect())
    }
}

/// A mounted secret: the file's text without its final line break.
pub(super) fn read_secret(variable: &str, path: &str) -> Result<String, ConfigError> {
    let text = std::fs::read_to_string(path)
        .map_err(|error| ConfigError::new(format!("{variable}: {path} can't be read: {error}")))?;
    let text = text.strip_suffix('\n').unwrap_or(&text);
    Ok(text.strip_suffix('\r').unwrap_or(text).to_owned())
}
