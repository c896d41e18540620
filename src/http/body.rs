//! Bodies: bounded in size and time, and JSON. With a body comes the deadline of its request, which began before the first
//! byte of it: what is done with the body must end by then too.

use actix_web::http::header::CONTENT_TYPE;
use actix_web::{HttpRequest, web};
use futures_util::StreamExt;
use serde::de::DeserializeOwned;
use tokio::time::{Instant, timeout_at};

use super::front::Front;
use super::problem::Problem;
use crate::store::Body;

/// Reads a row. `merge` also takes RFC 7396's own media type.
pub(super) async fn row(
    front: &Front,
    request: &HttpRequest,
    payload: web::Payload,
    merge: bool,
) -> Result<(Body, Instant), Problem> {
    let deadline = Instant::now() + front.settings.request_timeout;
    let bytes = bytes(front, request, payload, merge, deadline).await?;
    let row = serde_json::from_slice(&bytes);
    let row = row.map_err(|error| Problem::bad_request(format!("the body is no JSON row: {error}")))?;
    Ok((row, deadline))
}

/// Reads any other body.
pub(super) async fn json<T: DeserializeOwned>(
    front: &Front,
    request: &HttpRequest,
    payload: web::Payload,
) -> Result<(T, Instant), Problem> {
    let deadline = Instant::now() + front.settings.request_timeout;
    let bytes = bytes(front, request, payload, false, deadline).await?;
    let asked = serde_json::from_slice(&bytes);
    let asked = asked.map_err(|error| Problem::bad_request(format!("the body is not as expected: {error}")))?;
    Ok((asked, deadline))
}

async fn bytes(
    front: &Front,
    request: &HttpRequest,
    payload: web::Payload,
    merge: bool,
    deadline: Instant,
) -> Result<Vec<u8>, Problem> {
    let declared = request.headers().get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let media_type = declared.split(';').next().unwrap_or_default().trim();
    let is = |expected: &str| media_type.eq_ignore_ascii_case(expected);
    if !(is("application/json") || merge && is("application/merge-patch+json")) {
        return Err(Problem::media_type("application/json"));
    }
    let read = timeout_at(deadline, read(payload, front.settings.max_body));
    read.await.map_err(|_| Problem::slow_body())?
}

async fn read(mut payload: web::Payload, max: usize) -> Result<Vec<u8>, Problem> {
    let mut bytes = Vec::new();
    while let Some(chunk) = payload.next().await {
        let chunk = chunk.map_err(|_| Problem::bad_request("the body could not be read"))?;
        if bytes.len() + chunk.len() > max {
            return Err(Problem::too_large(max));
        }
        bytes.extend_from_slice(&chunk);
    }
    Ok(bytes)
}
