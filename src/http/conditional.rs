//! `ETag`, `If-None-Match` and `If-Match` (RFC 9110, section 13), and what a request's `Cache-Control` asks for.

use std::sync::Arc;

use actix_web::HttpRequest;
use actix_web::http::header::{CACHE_CONTROL, HeaderName, IF_MATCH, IF_NONE_MATCH};

use crate::cache::entry;
use crate::store::Precondition;

/// The strong validator of a payload's fingerprint.
pub(super) fn tag(fingerprint: u128) -> String {
    format!("\"{fingerprint:032x}\"")
}

/// Whether the client has this already.
pub(super) fn has(request: &HttpRequest, fingerprint: u128) -> bool {
    // Weak comparison: the mark of a weak tag is passed over.
    let ours = tag(fingerprint);
    listed(request, &IF_NONE_MATCH).any(|theirs| theirs == "*" || theirs.strip_prefix("W/").unwrap_or(theirs) == ours)
}

/// What must hold of a row before it is changed. `*` is left to the row's existence.
pub(super) fn precondition(request: &HttpRequest) -> Option<Precondition> {
    let tags: Vec<String> = listed(request, &IF_MATCH).map(str::to_owned).collect();
    if !request.headers().contains_key(IF_MATCH) || tags.iter().any(|tag| tag == "*") {
        return None;
    }
    Some(Precondition(Arc::new(move |json| tags.contains(&tag(entry::etag(json))))))
}

/// Entity tags hold no commas of ours; one of somebody else's that does matches nothing either way.
fn listed<'a>(request: &'a HttpRequest, name: &HeaderName) -> impl Iterator<Item = &'a str> {
    let values = request.headers().get_all(name).filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).map(str::trim).filter(|tag| !tag.is_empty())
}

/// Whether the request's `Cache-Control` has this directive.
pub(super) fn directive(request: &HttpRequest, name: &str) -> bool {
    listed(request, &CACHE_CONTROL).any(|directive| directive.eq_ignore_ascii_case(name))
}
