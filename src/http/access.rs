//! Who may do what: bearer tokens, known by their SHA-256 alone and compared in constant time.

use actix_web::HttpRequest;
use actix_web::http::header::AUTHORIZATION;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use super::problem::Problem;
use crate::config::{Access, AccessLevel, Scope};

/// The configured access.
#[derive(Debug)]
pub struct Gate {
    access: Access,
}

/// What one request may do beyond what everybody may.
#[derive(Clone, Copy, Debug)]
pub(super) struct Grant<'a> {
    access: &'a Access,
    scopes: Option<&'a [Scope]>,
}

impl Gate {
    /// A gate with these levels and tokens.
    #[must_use]
    pub fn new(access: Access) -> Self {
        Self { access }
    }

    /// Reads the request's token. One that is not known is refused even where none is needed: its sender believes
    /// to be somebody.
    pub(super) fn grant(&self, request: &HttpRequest) -> Result<Grant<'_>, Problem> {
        let access = &self.access;
        let Some(header) = request.headers().get(AUTHORIZATION) else {
            return Ok(Grant { access, scopes: None });
        };
        let bytes = header.as_bytes();
        let end = bytes.iter().position(|byte| *byte == b' ').unwrap_or(bytes.len());
        let (scheme, token) = bytes.split_at(end);
        if !scheme.eq_ignore_ascii_case(b"bearer") {
            // Another scheme is somebody else's business: a proxy's, say.
            return Ok(Grant { access, scopes: None });
        }
        let digest: [u8; 32] = Sha256::digest(token.trim_ascii()).into();
        let mut scopes = None;
        // All are compared, so that the time tells nothing.
        for known in &access.tokens {
            if bool::from(known.sha256.0.ct_eq(&digest)) {
                scopes = Some(known.scopes.as_slice());
            }
        }
        match scopes {
            Some(scopes) => Ok(Grant { access, scopes: Some(scopes) }),
            None => Err(Problem::unauthorized("the token is not known")),
        }
    }
}

impl Grant<'_> {
    /// Whether the request may do this.
    pub(super) fn need(&self, scope: Scope) -> Result<(), Problem> {
        let level = match scope {
            Scope::Read => self.access.read,
            Scope::Write => self.access.write,
            Scope::Refresh => self.access.refresh,
            Scope::Admin => self.access.admin,
            Scope::Query => self.access.adhoc_queries,
        };
        let name = || format!("{scope:?}").to_lowercase();
        match (level, self.scopes) {
            (AccessLevel::Public, _) => Ok(()),
            (AccessLevel::Off, _) => Err(Problem::forbidden(format!("{} is switched off here", name()))),
            (AccessLevel::Token, Some(scopes)) if scopes.contains(&scope) => Ok(()),
            (AccessLevel::Token, Some(_)) => Err(Problem::forbidden(format!("the token lacks the scope {}", name()))),
            (AccessLevel::Token, None) => Err(Problem::unauthorized("send a token: Authorization: Bearer …")),
        }
    }

    /// The same without words, for what is ignored where it is not allowed.
    pub(super) fn may_refresh(&self) -> bool {
        match self.access.refresh {
            AccessLevel::Public => true,
            AccessLevel::Off => false,
            AccessLevel::Token => self.scopes.is_some_and(|scopes| scopes.contains(&Scope::Refresh)),
        }
    }
}
