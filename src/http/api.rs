//! `/api`: rows, batches, lists and the results of statements.

use std::sync::Arc;

use actix_web::http::Method;
use actix_web::{HttpRequest, HttpResponse, web};
use tokio::time::Instant;

use super::access::Grant;
use super::front::Front;
use super::problem::Problem;
use super::{conditional, keys, queries, reply, write};
use crate::aside::{Answer, Ask, ReadError, Source, Status};
use crate::cache::entry::{self, Entry};
use crate::catalog::{KeyError, Resource, Target};
use crate::config::{Scope, WriteKind};

/// What a path under `/api` names.
enum Place<'a> {
    Query(&'a str),
    AdHoc,
    Collection(&'a str),
    Row(&'a str, &'a str),
    Nothing,
}

/// Any method on any path under `/api`.
pub(super) async fn handle(request: HttpRequest, payload: web::Payload, front: web::Data<Front>) -> HttpResponse {
    // As it came: decoding first would make `a%2Cb` two keys, and `a%2Fb` two steps.
    let path = request.uri().path().strip_prefix("/api/").unwrap_or_default();
    let mut steps = path.split('/');
    let place = match (steps.next(), steps.next(), steps.next()) {
        (Some("query"), None, _) => Place::AdHoc,
        (Some("queries"), Some(name), None) if !name.is_empty() => Place::Query(name),
        (Some(resource), None, _) if !resource.is_empty() => Place::Collection(resource),
        (Some(resource), Some(key), None) if !resource.is_empty() => Place::Row(resource, key),
        _ => Place::Nothing,
    };
    let route = match place {
        Place::Query(_) => "/api/queries/{name}",
        Place::AdHoc => "/api/query",
        Place::Collection(_) => "/api/{resource}",
        Place::Row(..) => "/api/{resource}/{key}",
        Place::Nothing => "_unmatched",
    };
    let work = async {
        match place {
            Place::Query(name) => queries::declared(&front, &request, name).await,
            Place::AdHoc => queries::ad_hoc(&front, &request, payload).await,
            Place::Collection(resource) => collection(&front, &request, payload, resource).await,
            Place::Row(resource, key) => row(&front, &request, payload, resource, key).await,
            Place::Nothing => Err(Problem::not_found("there is nothing here; rows are at /api/{resource}/{key}")),
        }
    };
    front.answer(&request, route, work).await
}

async fn collection(
    front: &Front,
    request: &HttpRequest,
    payload: web::Payload,
    name: &str,
) -> Result<HttpResponse, Problem> {
    let grant = front.gate.grant(request)?;
    let resource = front.resource(&keys::decode(name)?)?;
    match *request.method() {
        Method::GET | Method::HEAD => {
            grant.need(Scope::Read)?;
            many(front, request, &resource, ask(front, request, &grant)).await
        }
        Method::POST if resource.allows(WriteKind::Create) => {
            grant.need(Scope::Write)?;
            write::create(front, request, payload, &resource).await
        }
        _ => {
            let mut allowed = vec!["GET", "HEAD"];
            allowed.extend(resource.allows(WriteKind::Create).then_some("POST"));
            Err(Problem::method_not_allowed(&allowed))
        }
    }
}

async fn row(
    front: &Front,
    request: &HttpRequest,
    payload: web::Payload,
    name: &str,
    key: &str,
) -> Result<HttpResponse, Problem> {
    let grant = front.gate.grant(request)?;
    let resource = front.resource(&keys::decode(name)?)?;
    let (update, delete) = (resource.allows(WriteKind::Update), resource.allows(WriteKind::Delete));
    match *request.method() {
        Method::GET | Method::HEAD => {
            grant.need(Scope::Read)?;
            let target = resource.row(keys::parts(key)?)?;
            one(front, request, &target, ask(front, request, &grant)).await
        }
        Method::PUT | Method::PATCH if update => {
            grant.need(Scope::Write)?;
            write::update(front, request, payload, &resource, keys::parts(key)?).await
        }
        Method::DELETE if delete => {
            grant.need(Scope::Write)?;
            write::delete(front, request, &resource, keys::parts(key)?).await
        }
        _ => {
            let mut allowed = vec!["GET", "HEAD"];
            allowed.extend(update.then_some(["PUT", "PATCH"]).into_iter().flatten());
            allowed.extend(delete.then_some("DELETE"));
            Err(Problem::method_not_allowed(&allowed))
        }
    }
}

pub(super) fn ask(front: &Front, request: &HttpRequest, grant: &Grant<'_>) -> Ask {
    Ask {
        refresh: conditional::directive(request, "no-cache") && grant.may_refresh(),
        only_if_cached: conditional::directive(request, "only-if-cached"),
        deadline: Instant::now() + front.settings.request_timeout,
    }
}

pub(super) async fn one(
    front: &Front,
    request: &HttpRequest,
    target: &Target,
    ask: Ask,
) -> Result<HttpResponse, Problem> {
    let engine = front.aside.cache().engine();
    let answer = front.aside.read(target, ask).await?;
    if answer.entry.negative {
        let status = reply::cache_status(&answer.entry, &answer.status, engine);
        return Err(Problem::not_found("there is no such row").with_cache_status(status));
    }
    Ok(reply::one(request, &answer, engine))
}

/// A batch or a list: which, the parameter says.
async fn many(
    front: &Front,
    request: &HttpRequest,
    resource: &Arc<Resource>,
    ask: Ask,
) -> Result<HttpResponse, Problem> {
    let parameters = keys::parameters(request.uri().query().unwrap_or_default())?;
    let expected = || {
        let lists = resource.lists.iter().map(|list| resource.table.columns[list.column].name.as_str());
        let names: Vec<String> =
            std::iter::once(resource.batch_parameter()).chain(lists).map(|name| format!("?{name}=…")).collect();
        names.join(" or ")
    };
    let Some(first) = parameters.first() else {
        return Err(Problem::bad_request(format!("say which rows: {}", expected())));
    };
    if parameters.iter().any(|parameter| parameter.name != first.name) {
        return Err(Problem::bad_request(format!("one parameter at a time: {}", expected())));
    }
    if first.name == resource.batch_parameter() {
        return batch(front, request, resource, &parameters, ask).await;
    }
    let Some(index) = resource.list_on(&first.name) else {
        let message = format!("{:?} is neither the key nor a declared list; use {}", first.name, expected());
        return Err(Problem::bad_request(message));
    };
    if parameters.len() > 1 {
        return Err(Problem::bad_request(format!("a list has one value; {:?} came several times", first.name)));
    }
    match resource.list(index, first.value()?) {
        Ok(target) => one(front, request, &target, ask).await,
        Err(KeyError::CannotExist) => Ok(reply::one(request, &empty_list(), front.aside.cache().engine())),
        Err(error) => Err(error.into()),
    }
}

/// The list of a value that no row can have.
fn empty_list() -> Answer {
    let payload = bytes::Bytes::from_static(b"[]");
    let entry = Entry {
        etag: entry::etag(&payload),
        payload,
        negative: false,
        truncated: false,
        stored_at: 0,
        age_ms: 0,
        ttl_ms: 0,
        cost_us: 0,
        verified: true,
        local: false,
    };
    let zero = std::time::Duration::ZERO;
    let status = Status {
        source: Source::Database,
        forward: Some(crate::aside::Forward::Bypass),
        stored: false,
        collapsed: false,
        cache: zero,
        database: zero,
    };
    Answer { entry, status }
}

async fn batch(
    front: &Front,
    request: &HttpRequest,
    resource: &Arc<Resource>,
    parameters: &[keys::Parameter<'_>],
    ask: Ask,
) -> Result<HttpResponse, Problem> {
    let mut asked: Vec<Vec<String>> = Vec::new();
    for parameter in parameters {
        let parts = parameter.parts()?;
        if resource.key.len() == 1 {
            asked.extend(parts.into_iter().map(|part| vec![part]));
        } else {
            asked.push(parts);
        }
        if asked.len() > front.settings.max_batch {
            let max = front.settings.max_batch;
            return Err(Problem::bad_request(format!("a batch has at most {max} keys; split it")));
        }
    }
    // Each key's spelling in the answer, and its place among those that can exist.
    let mut targets = Vec::with_capacity(asked.len());
    let mut places = Vec::with_capacity(asked.len());
    for parts in asked {
        let spelled = parts.join(",");
        match resource.row(parts) {
            Ok(target) => {
                let crate::catalog::What::Row(key) = target.what() else { continue };
                places.push((key.to_string(), true));
                targets.push(target);
            }
            Err(KeyError::CannotExist) => places.push((spelled, false)),
            Err(error) => return Err(error.into()),
        }
    }
    let answers = match front.aside.read_many(&targets, ask).await {
        Err(ReadError::NotCached) => return Err(ReadError::NotCached.into()),
        answers => answers?,
    };
    let mut next = answers.iter();
    let mut missing: Vec<String> = Vec::new();
    for (spelled, exists) in places {
        let found = exists && next.next().is_some_and(|answer| !answer.entry.negative);
        if !found && !missing.contains(&spelled) {
            missing.push(spelled);
        }
    }
    Ok(reply::many(request, &answers, &missing, front.aside.cache().engine()))
}
