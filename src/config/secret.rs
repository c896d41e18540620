//! URLs that hold passwords: printed without them.

#[cfg(feature = "config")]
use schemars::JsonSchema;
use serde::Deserialize;

/// A URL whose password is in no log and no message.
#[derive(Clone, Default, PartialEq, Eq, Deserialize)]
#[cfg_attr(feature = "config", derive(JsonSchema))]
#[serde(transparent)]
#[cfg_attr(feature = "config", schemars(inline))]
pub struct SecretUrl(String);

impl SecretUrl {
    /// Wraps a URL.
    #[must_use]
    pub fn new(url: impl Into<String>) -> Self {
        Self(url.into())
    }

    /// The whole URL, password and all: for whoever connects.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// What stands before the colon; empty without one.
    #[must_use]
    pub fn scheme(&self) -> &str {
        self.0.split_once(':').map_or("", |(scheme, _)| scheme)
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl From<String> for SecretUrl {
    fn from(url: String) -> Self {
        Self(url)
    }
}

impl std::fmt::Display for SecretUrl {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The last @ ends the credentials, wherever a careless password has put a ? or a / before it.
        let (before, after) = match (self.0.split_once("://"), self.0.rfind('@')) {
            (Some((scheme, _)), Some(at)) => (format!("{scheme}://…"), &self.0[at..]),
            _ => (String::new(), self.0.as_str()),
        };
        // A password may stand among the options too, so these are left out whole.
        let shown = after.split_once('?').map_or(after, |(shown, _)| shown);
        write!(out, "{before}{shown}")
    }
}

impl std::fmt::Debug for SecretUrl {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(self, out)
    }
}
