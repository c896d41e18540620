//! POST, PUT, PATCH and DELETE of rows.

use std::sync::Arc;

use actix_web::http::Method;
use actix_web::http::header::LOCATION;
use actix_web::{HttpRequest, HttpResponse, web};
use percent_encoding::{AsciiSet, CONTROLS, utf8_percent_encode};
use tokio::time::{Instant, timeout_at};

use super::body::Room;
use super::front::Front;
use super::problem::Problem;
use super::{body, conditional, reply};
use crate::aside::Wrote;
use crate::catalog::{Key, Resource, What};
use crate::store::{Body, Write};

/// What a path segment can't hold as it is, and the comma that separates a key's parts.
const SEGMENT: &AsciiSet = &CONTROLS
    .add(b' ')
    .add(b'"')
    .add(b'#')
    .add(b'<')
    .add(b'>')
    .add(b'?')
    .add(b'`')
    .add(b'{')
    .add(b'}')
    .add(b'/')
    .add(b'%')
    .add(b',')
    .add(b'\\')
    .add(b'^')
    .add(b'|')
    .add(b'[')
    .add(b']');

/// POST: a new row.
pub(super) async fn create(
    front: &Front,
    request: &HttpRequest,
    payload: web::Payload,
    resource: &Arc<Resource>,
) -> Result<HttpResponse, Problem> {
    let (mut body, deadline, room) = body::row(front, request, payload, false).await?;
    check(resource, &body)?;
    if let (Some(made), Some(column)) = (resource.make_key(), resource.key_columns().next())
        && body.get(&column.name).is_none_or(|given| given.get() == "null")
    {
        let key = serde_json::value::to_raw_value(&made).map_err(|error| Problem::internal(error.to_string()))?;
        body.set(&column.name, key);
    }
    let wrote = run(front, resource, Write::Create { body }, deadline, Some(room)).await?;
    let parts = wrote.written.key.parts().iter().map(|part| utf8_percent_encode(part, SEGMENT).to_string());
    let location = format!("/api/{}/{}", resource.name, parts.collect::<Vec<_>>().join(","));
    let mut response = HttpResponse::Created();
    response.insert_header((LOCATION, location));
    answer(response, &wrote)
}

/// PUT and PATCH.
pub(super) async fn update(
    front: &Front,
    request: &HttpRequest,
    payload: web::Payload,
    resource: &Arc<Resource>,
    parts: Vec<String>,
) -> Result<HttpResponse, Problem> {
    let merge = request.method() == Method::PATCH;
    let key = key(resource, parts)?;
    let (mut body, deadline, room) = body::row(front, request, payload, merge).await?;
    check(resource, &body)?;
    // The key may be repeated, but not changed.
    for (index, column) in resource.key_columns().enumerate() {
        let Some(given) = body.get(&column.name) else { continue };
        let text = serde_json::from_str::<String>(given.get()).unwrap_or_else(|_| given.get().to_owned());
        let same =
            Key::parse(std::iter::once(column), vec![text]).is_ok_and(|given| given.parts()[0] == key.parts()[index]);
        if !same {
            return Err(Problem::unprocessable(&column.name, "differs from the key in the path"));
        }
    }
    for column in resource.key_columns() {
        body.remove(&column.name);
    }
    let precondition = conditional::precondition(request);
    let write =
        if merge { Write::Merge { key, body, precondition } } else { Write::Replace { key, body, precondition } };
    let wrote = run(front, resource, write, deadline, Some(room)).await?;
    answer(HttpResponse::Ok(), &wrote)
}

/// DELETE.
pub(super) async fn delete(
    front: &Front,
    request: &HttpRequest,
    resource: &Arc<Resource>,
    parts: Vec<String>,
) -> Result<HttpResponse, Problem> {
    let key = key(resource, parts)?;
    let precondition = conditional::precondition(request);
    let deadline = Instant::now() + front.settings.request_timeout;
    let wrote = run(front, resource, Write::Delete { key, precondition }, deadline, None).await?;
    let mut response = HttpResponse::NoContent();
    response.insert_header((reply::CACHE_STATUS, reply::write_status(wrote.invalidation_pending)));
    Ok(response.finish())
}

fn key(resource: &Arc<Resource>, parts: Vec<String>) -> Result<Key, Problem> {
    match resource.row(parts)?.what() {
        What::Row(key) => Ok(key.clone()),
        What::List { .. } | What::Result(_) => Err(Problem::internal("a row's key named something else")),
    }
}

/// Columns that can't be written are refused before the database is bothered.
fn check(resource: &Resource, body: &Body) -> Result<(), Problem> {
    for (name, _) in body.iter() {
        resource.writable(name).map_err(|words| Problem::unprocessable(name, words))?;
    }
    Ok(())
}

async fn run(
    front: &Front,
    resource: &Arc<Resource>,
    write: Write,
    deadline: Instant,
    room: Option<Room>,
) -> Result<Wrote, Problem> {
    let writing = front.aside.write_holding(resource, write, room);
    let wrote = timeout_at(deadline, writing).await;
    Ok(wrote.map_err(|_| Problem::timed_out())??)
}

fn answer(response: actix_web::HttpResponseBuilder, wrote: &Wrote) -> Result<HttpResponse, Problem> {
    let row = wrote.written.row.as_ref().ok_or_else(|| Problem::internal("a write gave no row"))?;
    Ok(reply::written(response, row, wrote.invalidation_pending))
}
