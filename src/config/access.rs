//! `access:` who may do what.

#[cfg(feature = "config")]
use schemars::JsonSchema;
use serde::de::{Deserializer, Error};
use serde::{Deserialize, Serialize};

#[cfg(feature = "config")]
use super::forms;

/// Who may do what.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[cfg_attr(feature = "config", derive(JsonSchema))]
#[serde(default, deny_unknown_fields)]
pub struct Access {
    /// Who may read. Default `public`.
    pub read: AccessLevel,
    /// Who may write. Default `token`.
    pub write: AccessLevel,
    /// Who may force a refresh. Default `token`.
    pub refresh: AccessLevel,
    /// Who may use /admin. Default `token`.
    pub admin: AccessLevel,
    /// Who may run ad-hoc queries. Default `off`.
    pub adhoc_queries: AccessLevel,
    /// The known tokens.
    pub tokens: Vec<Token>,
}

impl Default for Access {
    fn default() -> Self {
        Self {
            read: AccessLevel::Public,
            write: AccessLevel::Token,
            refresh: AccessLevel::Token,
            admin: AccessLevel::Token,
            adhoc_queries: AccessLevel::Off,
            tokens: Vec::new(),
        }
    }
}

impl Access {
    /// Everything open to everybody: the embedded demo.
    #[must_use]
    pub fn open() -> Self {
        let open = AccessLevel::Public;
        Self { read: open, write: open, refresh: open, admin: open, adhoc_queries: open, tokens: Vec::new() }
    }
}

/// Who may do something.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "config", derive(JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum AccessLevel {
    /// Everybody.
    Public,
    /// Who brings a token with the scope.
    Token,
    /// Nobody. Tools that read YAML 1.1 write `off` as `false`.
    #[serde(alias = "false", alias = "False", alias = "FALSE")]
    Off,
}

/// What a token allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[cfg_attr(feature = "config", derive(JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum Scope {
    /// Reading.
    Read,
    /// Writing.
    Write,
    /// Forcing a refresh.
    Refresh,
    /// `/admin`.
    Admin,
    /// Ad-hoc queries.
    Query,
}

/// A bearer token, known by its fingerprint alone.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[cfg_attr(feature = "config", derive(JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Token {
    /// Who has it, for the log; each name once.
    pub name: String,
    /// The SHA-256 of the token, as 64 hexadecimal digits: `printf %s "$TOKEN" | sha256sum`.
    #[cfg_attr(feature = "config", schemars(with = "forms::Digest"))]
    pub sha256: Digest,
    /// What it allows.
    pub scopes: Vec<Scope>,
}

/// A SHA-256.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Digest(pub [u8; 32]);

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let mut digest = [0; 32];
        let digits = text.as_bytes();
        let nibble = |digit: u8| char::from(digit).to_digit(16).and_then(|nibble| u8::try_from(nibble).ok());
        if digits.len() == 64 {
            let mut bytes = digits.chunks_exact(2).map(|pair| Some(nibble(pair[0])? << 4 | nibble(pair[1])?));
            if digest.iter_mut().all(|byte| bytes.next().flatten().map(|read| *byte = read).is_some()) {
                return Ok(Self(digest));
            }
        }
        Err(D::Error::custom("expected a SHA-256 as 64 hexadecimal digits (printf %s \"$TOKEN\" | sha256sum)"))
    }
}
