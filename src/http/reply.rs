//! Answers of reads: the cached bytes between a prefix and a suffix, and the headers that tell how they came.

use std::fmt::Write as _;

use actix_web::http::header::{AGE, CACHE_CONTROL, CONTENT_TYPE, ETAG, HeaderName};
use actix_web::{HttpRequest, HttpResponse, HttpResponseBuilder};
use bytes::Bytes;

use super::conditional;
use crate::aside::{Answer, Forward, Source, Status};
use crate::cache::entry::{self, Entry};

pub(super) const CACHE_STATUS: HeaderName = HeaderName::from_static("cache-status");
const SERVER_TIMING: HeaderName = HeaderName::from_static("server-timing");

/// A row or list.
pub(super) fn one(request: &HttpRequest, answer: &Answer, engine: &str) -> HttpResponse {
    let Answer { entry, status } = answer;
    let mut response = start(request, entry.etag);
    response.insert_header((CACHE_STATUS, cache_status(entry, status, engine)));
    response.insert_header((SERVER_TIMING, timing(status)));
    if status.source == Source::Cache {
        response.insert_header((AGE, entry.age_ms / 1000));
    }
    if conditional::has(request, entry.etag) {
        return response.finish();
    }
    let truncated = if entry.truncated { r#","truncated":true"# } else { "" };
    let source = source(status.source);
    let mut body = Vec::with_capacity(entry.payload.len() + 64);
    body.extend_from_slice(br#"{"data":"#);
    body.extend_from_slice(&entry.payload);
    body.extend_from_slice(truncated.as_bytes());
    body.extend_from_slice(br#","source":""#);
    body.extend_from_slice(source.as_bytes());
    body.extend_from_slice(br#""}"#);
    response.body(body)
}

/// Rows of a batch: `found` in the order asked, and the keys that are not there.
pub(super) fn many(request: &HttpRequest, answers: &[Answer], missing: &[String], engine: &str) -> HttpResponse {
    let found = || answers.iter().filter(|answer| !answer.entry.negative);
    let mut data = Vec::with_capacity(64 + found().map(|answer| answer.entry.payload.len() + 1).sum::<usize>());
    data.push(b'[');
    for (index, answer) in found().enumerate() {
        if index > 0 {
            data.push(b',');
        }
        data.extend_from_slice(&answer.entry.payload);
    }
    data.push(b']');
    let etag = entry::etag(&data);
    let mut response = start(request, etag);
    response.insert_header((CACHE_STATUS, batch_status(answers, engine)));
    let longest = |time: fn(&Status) -> std::time::Duration| {
        answers.iter().map(|answer| time(&answer.status)).max().unwrap_or_default()
    };
    let (cache, database) = (longest(|status| status.cache), longest(|status| status.database));
    response.insert_header((SERVER_TIMING, durations(cache, database)));
    let oldest = found().filter(|answer| answer.status.source == Source::Cache).map(|answer| answer.entry.age_ms).max();
    if let Some(age) = oldest {
        response.insert_header((AGE, age / 1000));
    }
    if conditional::has(request, etag) {
        return response.finish();
    }
    let from = |source| found().filter(|answer| answer.status.source == source).count();
    let missing = serde_json::Value::from(missing).to_string();
    data.splice(0..0, br#"{"data":"#.iter().copied());
    let (cache, database) = (from(Source::Cache), from(Source::Database));
    let rest = format!(r#","missing":{missing},"source":{{"cache":{cache},"database":{database}}}}}"#);
    data.extend_from_slice(rest.as_bytes());
    response.body(data)
}

/// A row after a write.
pub(super) fn written(mut response: HttpResponseBuilder, row: &Bytes, pending: bool) -> HttpResponse {
    response.insert_header((CONTENT_TYPE, "application/json"));
    response.insert_header((ETAG, conditional::tag(entry::etag(row))));
    response.insert_header((CACHE_STATUS, write_status(pending)));
    let mut body = Vec::with_capacity(row.len() + 16);
    body.extend_from_slice(br#"{"data":"#);
    body.extend_from_slice(row);
    body.push(b'}');
    response.body(body)
}

/// `Cache-Status` of a write.
pub(super) fn write_status(pending: bool) -> &'static str {
    if pending { "cache-aside; fwd=method; detail=invalidation-pending" } else { "cache-aside; fwd=method" }
}

fn start(request: &HttpRequest, etag: u128) -> HttpResponseBuilder {
    let mut response = if conditional::has(request, etag) { HttpResponse::NotModified() } else { HttpResponse::Ok() };
    response.insert_header((CONTENT_TYPE, "application/json"));
    response.insert_header((ETAG, conditional::tag(etag)));
    // Whoever keeps a copy must ask before using it: the promise ends here.
    response.insert_header((CACHE_CONTROL, "no-cache"));
    response
}

fn source(source: Source) -> &'static str {
    match source {
        Source::Cache => "cache",
        Source::Database => "database",
    }
}

/// RFC 9211.
pub(super) fn cache_status(entry: &Entry, status: &Status, engine: &str) -> String {
    let Some(forward) = status.forward else {
        return format!("cache-aside; hit; ttl={}; detail={}", entry.ttl_ms.div_euclid(1000), detail(entry, engine));
    };
    let mut text = format!("cache-aside; fwd={}", reason(forward));
    if status.stored {
        text.push_str("; stored");
    }
    if status.collapsed {
        text.push_str("; collapsed");
    }
    if (status.source, forward) == (Source::Cache, Forward::Stale) {
        // Writing to a String can't fail.
        let _ = write!(text, "; ttl={}; detail={}", entry.ttl_ms.div_euclid(1000), detail(entry, engine));
    }
    text
}

fn reason(forward: Forward) -> &'static str {
    match forward {
        Forward::Miss => "miss",
        Forward::Stale => "stale",
        Forward::Request => "request",
        Forward::Bypass => "bypass",
    }
}

fn batch_status(answers: &[Answer], engine: &str) -> String {
    let forwarded = || answers.iter().filter_map(|answer| answer.status.forward);
    let Some(first) = forwarded().next() else {
        let ttl = answers.iter().map(|answer| answer.entry.ttl_ms).min().unwrap_or(0).div_euclid(1000);
        let verified = answers.iter().all(|answer| answer.entry.verified);
        return format!("cache-aside; hit; ttl={ttl}; detail={}", if verified { engine } else { "unverified" });
    };
    let partial = forwarded().count() < answers.len();
    let mut text = format!("cache-aside; fwd={}", if partial { "partial" } else { reason(first) });
    if answers.iter().any(|answer| answer.status.stored) {
        text.push_str("; stored");
    }
    if answers.iter().any(|answer| answer.status.collapsed) {
        text.push_str("; collapsed");
    }
    if answers.iter().any(|answer| !answer.entry.verified) {
        text.push_str("; detail=unverified");
    }
    text
}

/// Where it was found, unless how old it may be is not known: that is what matters then.
fn detail<'a>(entry: &Entry, engine: &'a str) -> &'a str {
    match (entry.verified, entry.local) {
        (false, _) => "unverified",
        (true, true) => "local",
        (true, false) => engine,
    }
}

fn timing(status: &Status) -> String {
    durations(status.cache, status.database)
}

fn durations(cache: std::time::Duration, database: std::time::Duration) -> String {
    let milliseconds = |duration: std::time::Duration| duration.as_secs_f64() * 1000.0;
    if database.is_zero() {
        return format!("cache;dur={:.2}", milliseconds(cache));
    }
    format!("cache;dur={:.2}, db;dur={:.2}", milliseconds(cache), milliseconds(database))
}
