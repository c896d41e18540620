//! Bodies: bounded in size and time, and JSON. With a body comes the deadline of its request, which began before the first
//! byte of it: what is done with the body must end by then too. All bodies share one budget of memory, from their first byte
//! until what they asked for has ended.

use std::sync::Arc;

use actix_web::http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use actix_web::{HttpRequest, web};
use futures_util::StreamExt;
use serde::de::DeserializeOwned;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout_at};

use super::front::Front;
use super::problem::Problem;
use crate::store::Body;

/// What all bodies may hold together, in bytes; more where few of the largest would not fit. Without it clients that send
/// slowly, or wait for a slow database, could have `server.max_connections` bodies here at once.
const AT_ONCE: usize = 64 << 20;
/// Of the largest bodies there is room for so many.
const LARGEST: usize = 4;
/// What is counted, in bytes.
const UNIT: usize = 1024;

/// The memory for bodies.
#[must_use]
pub fn room(max_body: usize) -> Arc<Semaphore> {
    let units = AT_ONCE.max(max_body.saturating_mul(LARGEST)) / UNIT;
    Arc::new(Semaphore::new(units.min(Semaphore::MAX_PERMITS)))
}

/// The memory that a body takes; it is free again when this is dropped. To be kept for as long as there is anything of the
/// body.
pub(super) struct Room {
    _room: Option<OwnedSemaphorePermit>,
}

/// Reads a row. `merge` also takes RFC 7396's own media type.
pub(super) async fn row(
    front: &Front,
    request: &HttpRequest,
    payload: web::Payload,
    merge: bool,
) -> Result<(Body, Instant, Room), Problem> {
    let deadline = Instant::now() + front.settings.request_timeout;
    let (bytes, room) = bytes(front, request, payload, merge, deadline).await?;
    let row = serde_json::from_slice(&bytes);
    let row = row.map_err(|error| Problem::bad_request(format!("the body is no JSON row: {error}")))?;
    Ok((row, deadline, room))
}

/// Reads any other body.
pub(super) async fn json<T: DeserializeOwned>(
    front: &Front,
    request: &HttpRequest,
    payload: web::Payload,
) -> Result<(T, Instant, Room), Problem> {
    let deadline = Instant::now() + front.settings.request_timeout;
    let (bytes, room) = bytes(front, request, payload, false, deadline).await?;
    let json = &mut serde_json::Deserializer::from_slice(&bytes);
    let asked = serde_path_to_error::deserialize(&mut *json).map_err(|error| match error.path().to_string() {
        whole if whole == "." => error.into_inner().to_string(),
        path => format!("{path}: {}", error.into_inner()),
    });
    // After what was expected there must be nothing more.
    let asked = asked.and_then(|asked| json.end().map(|()| asked).map_err(|error| error.to_string()));
    let asked = asked.map_err(|words| Problem::bad_request(format!("the body is not as expected: {words}")))?;
    Ok((asked, deadline, room))
}

/// The bytes, and the room that they take.
async fn bytes(
    front: &Front,
    request: &HttpRequest,
    payload: web::Payload,
    merge: bool,
    deadline: Instant,
) -> Result<(Vec<u8>, Room), Problem> {
    let declared = request.headers().get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let media_type = declared.split(';').next().unwrap_or_default().trim();
    let is = |expected: &str| media_type.eq_ignore_ascii_case(expected);
    if !(is("application/json") || merge && is("application/merge-patch+json")) {
        return Err(Problem::media_type("application/json"));
    }
    // A client that says how much it will send need not send it first.
    let max = front.settings.max_body;
    let length = request.headers().get(CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<usize>().ok());
    if length.is_some_and(|length| length > max) {
        return Err(Problem::too_large(max));
    }
    let read = timeout_at(deadline, read(payload, max, &front.bodies));
    let (bytes, room) = read.await.map_err(|_| Problem::slow_body())??;
    Ok((bytes, Room { _room: room }))
}

async fn read(
    mut payload: web::Payload,
    max: usize,
    bodies: &Arc<Semaphore>,
) -> Result<(Vec<u8>, Option<OwnedSemaphorePermit>), Problem> {
    let mut bytes = Vec::new();
    let mut room: Option<OwnedSemaphorePermit> = None;
    while let Some(chunk) = payload.next().await {
        let chunk = chunk.map_err(|_| Problem::bad_request("the body could not be read"))?;
        if bytes.len() + chunk.len() > max {
            return Err(Problem::too_large(max));
        }
        let has = room.as_ref().map_or(0, OwnedSemaphorePermit::num_permits);
        let lacks = (bytes.len() + chunk.len()).div_ceil(UNIT).saturating_sub(has);
        if lacks > 0 {
            let lacks = u32::try_from(lacks).unwrap_or(u32::MAX);
            let full = |_| Problem::unavailable("too many bodies are under way; try again");
            let more = Arc::clone(bodies).try_acquire_many_owned(lacks).map_err(full)?;
            match &mut room {
                Some(room) => room.merge(more),
                None => room = Some(more),
            }
        }
        bytes.extend_from_slice(&chunk);
    }
    Ok((bytes, room))
}
