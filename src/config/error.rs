//! What is wrong with a configuration, where it stands, and what to do about it.

/// A configuration that can't be used: the message names the file and line (or the variable) and the key.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ConfigError(String);

impl ConfigError {
    /// An error with its whole message.
    pub(super) fn new(message: impl Into<String>) -> Self {
        Self(message.into())
    }
}

/// Where a value came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Origin {
    /// A line of the file.
    Line(usize),
    /// An environment variable.
    Variable(String),
}

impl Origin {
    /// An error about the value of `path`, in the file called `name`.
    pub(super) fn error(&self, name: &str, path: &str, message: &str) -> ConfigError {
        let place = match self {
            Self::Line(line) => format!("{name}:{line}"),
            Self::Variable(variable) => variable.clone(),
        };
        ConfigError(if path.is_empty() { format!("{place}: {message}") } else { format!("{place}: {path}: {message}") })
    }
}
