//! `/api/queries/{name}` and `/api/query`: the results of statements.

use std::sync::Arc;
use std::time::Duration;

use actix_web::http::Method;
use actix_web::{HttpRequest, HttpResponse, web};
use serde::Deserialize;
use serde_json::value::RawValue;

use super::access::Grant;
use super::api::{ask, one};
use super::body::Room;
use super::front::Front;
use super::problem::Problem;
use super::{body, keys};
use crate::catalog::{Param, Policy, Resource, Target};
use crate::config::{Scope, parse_duration};

/// The most parameters of an ad-hoc statement.
const MOST_PARAMS: usize = 1_000;

/// The most dimensions of an array, as PostgreSQL has it.
const DIMENSIONS: u32 = 6;

/// A declared statement.
pub(super) async fn declared(front: &Front, request: &HttpRequest, name: &str) -> Result<HttpResponse, Problem> {
    let grant = front.gate.grant(request)?;
    let query = front.query(&keys::decode(name)?)?;
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        return Err(Problem::method_not_allowed(&["GET", "HEAD"]));
    }
    grant.need(Scope::Read)?;
    let target = target(&query, request)?;
    one(front, request, &target, ask(front, request, &grant)).await
}

/// The result that a query string asks for.
pub(super) fn target(query: &Arc<Resource>, request: &HttpRequest) -> Result<Target, Problem> {
    let given = keys::parameters(request.uri().query().unwrap_or_default())?;
    let declared = query.parameters.as_ref().map_or(&[][..], |parameters| &parameters.0);
    if let Some(unknown) = given.iter().find(|one| !declared.iter().any(|parameter| parameter.name == one.name)) {
        let names: Vec<&str> = declared.iter().map(|parameter| parameter.name.as_str()).collect();
        let expected = if names.is_empty() { "it takes none".into() } else { format!("use {}", names.join(", ")) };
        return Err(Problem::bad_request(format!("there is no parameter {:?}; {expected}", unknown.name)));
    }
    let mut params = Vec::with_capacity(declared.len());
    for parameter in declared {
        let mut values = Vec::new();
        for one in given.iter().filter(|one| one.name == parameter.name) {
            values.push(if one.is_bare() { Param::Null } else { text(one.value()?)? });
        }
        params.push(match (values.len(), &parameter.default) {
            (0, Some(default)) => Param::Text(default.clone()),
            (0, None) => return Err(Problem::bad_request(format!("say {}=…", parameter.name))),
            (1, _) => values.swap_remove(0),
            _ => Param::List(values),
        });
    }
    Ok(query.result_of(params))
}

fn text(text: String) -> Result<Param, Problem> {
    if text.contains('\0') {
        return Err(Problem::bad_request("a parameter holds a NUL"));
    }
    Ok(Param::Text(text))
}

/// What somebody made up.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct AdHoc {
    sql: String,
    #[serde(default)]
    params: Vec<Box<RawValue>>,
    ttl: Option<String>,
    #[serde(default)]
    refresh: bool,
}

impl AdHoc {
    fn target(&self, front: &Front) -> Result<Target, Problem> {
        if self.sql.trim().is_empty() {
            return Err(Problem::bad_request("sql is empty; write the statement"));
        }
        if self.sql.contains('\0') {
            return Err(Problem::bad_request("sql holds a NUL"));
        }
        if self.params.len() > MOST_PARAMS {
            return Err(Problem::bad_request(format!("a statement has at most {MOST_PARAMS} parameters")));
        }
        let mut policy = Policy { local_ttl: Duration::ZERO, local_hot_ttl: Duration::ZERO, ..front.settings.ad_hoc };
        if let Some(ttl) = &self.ttl {
            policy.ttl = parse_duration(ttl).map_err(|words| Problem::bad_request(format!("ttl: {words}")))?;
            if policy.ttl.is_zero() {
                return Err(Problem::bad_request("ttl: must be longer than 0s"));
            }
        }
        let params = self.params.iter().map(|raw| param(raw, DIMENSIONS)).collect::<Result<_, _>>()?;
        Ok(Arc::new(Resource::ad_hoc_query(&self.sql, policy, &front.settings.key_prefix)).result_of(params))
    }
}

/// A JSON value as a parameter: what is not text, null or an array is the text it has in JSON.
fn param(raw: &RawValue, dimensions: u32) -> Result<Param, Problem> {
    let json = raw.get();
    let wrong = |error: serde_json::Error| Problem::bad_request(format!("params: {error}"));
    match json.as_bytes().first() {
        Some(b'n') => Ok(Param::Null),
        Some(b'"') => text(serde_json::from_str(json).map_err(wrong)?),
        Some(b'[') if dimensions == 0 => {
            Err(Problem::bad_request(format!("params: an array has at most {DIMENSIONS} dimensions")))
        }
        Some(b'[') => {
            let all: Vec<Box<RawValue>> = serde_json::from_str(json).map_err(wrong)?;
            Ok(Param::List(all.iter().map(|raw| param(raw, dimensions - 1)).collect::<Result<_, _>>()?))
        }
        _ => Ok(Param::Text(json.to_owned())),
    }
}

/// A statement that somebody made up.
pub(super) async fn ad_hoc(
    front: &Front,
    request: &HttpRequest,
    payload: web::Payload,
) -> Result<HttpResponse, Problem> {
    let grant = front.gate.grant(request)?;
    if *request.method() != Method::POST {
        return Err(Problem::method_not_allowed(&["POST"]));
    }
    grant.need(Scope::Query)?;
    // Until it is answered: what runs on after that is no more than there are connections.
    let (asked, deadline, _room): (AdHoc, _, _) = body::json(front, request, payload).await?;
    let target = asked.target(front)?;
    let ask = crate::aside::Ask { deadline, ..ask(front, request, &grant) };
    let refresh = ask.refresh || asked.refresh && grant.may_refresh();
    one(front, request, &target, crate::aside::Ask { refresh, ..ask }).await
}

/// The result that a body names, to be dropped.
pub(super) async fn named(
    front: &Front,
    request: &HttpRequest,
    payload: web::Payload,
    grant: &Grant<'_>,
) -> Result<(Target, Room), Problem> {
    grant.need(Scope::Admin)?;
    let (asked, _, room): (AdHoc, _, _) = body::json(front, request, payload).await?;
    Ok((asked.target(front)?, room))
}
