//! The one place where an error gets a status: RFC 9457 problem documents, without SQL, URLs or stack traces.

use std::borrow::Cow;

use actix_web::HttpResponse;
use actix_web::http::StatusCode;
use actix_web::http::header::{ALLOW, CONTENT_TYPE, RETRY_AFTER, WWW_AUTHENTICATE};
use serde::Serialize;

use super::reply::CACHE_STATUS;
use crate::aside::ReadError;
use crate::cache::CacheError;
use crate::catalog::KeyError;
use crate::store::{StoreError, WriteError};

/// An answer that is not what was asked for.
#[derive(Clone, Debug)]
pub(super) struct Problem {
    status: StatusCode,
    detail: Cow<'static, str>,
    /// For `Allow`.
    allow: Option<String>,
    /// The columns that a constraint names.
    columns: Vec<String>,
    cache_status: Option<String>,
    /// For the log alone.
    cause: Option<String>,
    look_again: bool,
}

#[derive(Serialize)]
struct Document<'a> {
    r#type: &'static str,
    title: &'a str,
    status: u16,
    detail: &'a str,
    #[serde(skip_serializing_if = "<[String]>::is_empty")]
    columns: &'a [String],
    request_id: &'a str,
}

impl Problem {
    fn new(status: StatusCode, detail: impl Into<Cow<'static, str>>) -> Self {
        Self {
            status,
            detail: detail.into(),
            allow: None,
            columns: Vec::new(),
            cache_status: None,
            cause: None,
            look_again: false,
        }
    }

    pub(super) fn bad_request(detail: impl Into<Cow<'static, str>>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, detail)
    }

    pub(super) fn unauthorized(detail: &'static str) -> Self {
        Self::new(StatusCode::UNAUTHORIZED, detail)
    }

    pub(super) fn forbidden(detail: impl Into<Cow<'static, str>>) -> Self {
        Self::new(StatusCode::FORBIDDEN, detail)
    }

    pub(super) fn not_found(detail: impl Into<Cow<'static, str>>) -> Self {
        Self::new(StatusCode::NOT_FOUND, detail)
    }

    pub(super) fn method_not_allowed(allowed: &[&str]) -> Self {
        let allow = Some(allowed.join(", "));
        Self { allow, ..Self::new(StatusCode::METHOD_NOT_ALLOWED, "this path does not take the method; see Allow") }
    }

    pub(super) fn conflict(detail: impl Into<Cow<'static, str>>) -> Self {
        Self::new(StatusCode::CONFLICT, detail)
    }

    pub(super) fn too_large(max: usize) -> Self {
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, format!("the body is larger than {max} bytes"))
    }

    pub(super) fn media_type(expected: &'static str) -> Self {
        Self::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, format!("send the body as {expected}"))
    }

    pub(super) fn slow_body() -> Self {
        Self::new(StatusCode::REQUEST_TIMEOUT, "the body took too long")
    }

    pub(super) fn unprocessable(column: &str, detail: impl std::fmt::Display) -> Self {
        Self {
            columns: vec![column.to_owned()],
            ..Self::new(StatusCode::UNPROCESSABLE_ENTITY, format!("{column}: {detail}"))
        }
    }

    pub(super) fn unavailable(detail: impl Into<Cow<'static, str>>) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, detail)
    }

    pub(super) fn timed_out() -> Self {
        Self::new(StatusCode::GATEWAY_TIMEOUT, "the request took too long")
    }

    pub(super) fn internal(cause: impl Into<String>) -> Self {
        let cause = Some(cause.into());
        Self {
            cause,
            ..Self::new(StatusCode::INTERNAL_SERVER_ERROR, "this should not have happened; the log has more")
        }
    }

    pub(super) fn with_cache_status(self, cache_status: String) -> Self {
        Self { cache_status: Some(cache_status), ..self }
    }

    pub(super) fn status(&self) -> StatusCode {
        self.status
    }

    /// What the log should say about it.
    pub(super) fn cause(&self) -> Option<&str> {
        self.cause.as_deref()
    }

    /// A table was not as the catalog knows it.
    pub(super) fn look_again(&self) -> bool {
        self.look_again
    }

    /// The document.
    pub(super) fn response(&self, request_id: &str) -> HttpResponse {
        let document = Document {
            r#type: "about:blank",
            title: self.status.canonical_reason().unwrap_or("Error"),
            status: self.status.as_u16(),
            detail: &self.detail,
            columns: &self.columns,
            request_id,
        };
        let mut response = HttpResponse::build(self.status);
        response.insert_header((CONTENT_TYPE, "application/problem+json"));
        if let Some(allow) = &self.allow {
            response.insert_header((ALLOW, allow.as_str()));
        }
        if self.status == StatusCode::SERVICE_UNAVAILABLE {
            response.insert_header((RETRY_AFTER, "1"));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            response.insert_header((WWW_AUTHENTICATE, "Bearer"));
        }
        if let Some(cache_status) = &self.cache_status {
            response.insert_header((CACHE_STATUS, cache_status.as_str()));
        }
        // Strings and numbers always have a JSON form.
        response.body(serde_json::to_vec(&document).unwrap_or_default())
    }
}

impl From<KeyError> for Problem {
    fn from(error: KeyError) -> Self {
        match error {
            KeyError::Malformed(detail) => Self::bad_request(detail),
            KeyError::CannotExist => Self::not_found("there is no such row"),
        }
    }
}

impl From<StoreError> for Problem {
    fn from(error: StoreError) -> Self {
        let cause = Some(error.to_string());
        match error {
            StoreError::Unavailable(_) => {
                Self { cause, ..Self::unavailable("the database can't be reached; try again") }
            }
            StoreError::Exhausted(_) => {
                Self { cause, ..Self::unavailable("the database can't do it at the moment; try again later") }
            }
            StoreError::Busy => Self::unavailable("too many requests wait for the database; try again"),
            StoreError::Abandoned => Self::timed_out(),
            StoreError::TimedOut => {
                Self { cause, ..Self::new(StatusCode::GATEWAY_TIMEOUT, "the database took too long") }
            }
            StoreError::BadValue(_) => {
                Self::bad_request("the database can't read the value as one of the column's type")
            }
            StoreError::BadStatement(words) => Self::bad_request(format!("the database says: {words}")),
            StoreError::Changed(_) => {
                Self { cause, look_again: true, ..Self::unavailable("the table has changed; it is looked at anew") }
            }
            StoreError::Refused(cause) => Self::internal(cause),
            StoreError::Loader(error) => Self::internal(error.to_string()),
        }
    }
}

impl From<ReadError> for Problem {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::Store(error) => error.into(),
            ReadError::NotCached => {
                Self::new(StatusCode::GATEWAY_TIMEOUT, "it is not in the cache, and only-if-cached was asked for")
            }
            ReadError::TimedOut => Self::timed_out(),
            ReadError::Failed => Self::internal("loads ended without a result"),
        }
    }
}

impl From<WriteError> for Problem {
    fn from(error: WriteError) -> Self {
        let named = |status, columns: Vec<String>, detail: String| {
            let names = columns.join(", ");
            let detail = if names.is_empty() { detail } else { format!("{names}: {detail}") };
            Self { columns, ..Self::new(status, detail) }
        };
        match error {
            WriteError::NotFound => Self::not_found("there is no such row"),
            WriteError::PreconditionFailed => {
                Self::new(StatusCode::PRECONDITION_FAILED, "the row is not the one that If-Match names; read it again")
            }
            WriteError::Conflict { columns, detail } => named(StatusCode::CONFLICT, columns, detail),
            WriteError::Violation { columns, detail } => named(StatusCode::UNPROCESSABLE_ENTITY, columns, detail),
            WriteError::Unknown(_) => Self {
                cause: Some("the connection was lost at COMMIT".into()),
                ..Self::unavailable(
                    "the connection to the database was lost while committing: read the row to see whether it was written",
                )
            },
            WriteError::Untold => {
                Self::unavailable("the cache can't be told before the commit, so nothing was written; try again")
            }
            WriteError::Store(error) => error.into(),
        }
    }
}

impl From<CacheError> for Problem {
    fn from(error: CacheError) -> Self {
        Self::unavailable(format!("{error}; try again"))
    }
}
