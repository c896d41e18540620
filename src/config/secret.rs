//! URLs that hold passwords: printed without them.

use schemars::JsonSchema;
use serde::Deserialize;

/// A URL whose password is in no log and no message.
#[derive(Clone, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(transparent)]
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

    /// What stands before the colon.
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

impl std::fmt::Display for SecretUrl {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The last @ ends the credentials; a password may stand in the query too, so that is left out whole.
        let shown = self.0.split_once('?').map_or(self.0.as_str(), |(before, _)| before);
        match (shown.split_once("://"), shown.rfind('@')) {
            (Some((scheme, _)), Some(at)) => write!(out, "{scheme}://…{}", &shown[at..]),
            _ => out.write_str(shown),
        }
    }
}

impl std::fmt::Debug for SecretUrl {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(self, out)
    }
}
