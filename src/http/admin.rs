//! `/admin`: what the cache holds, dropping it, and filling it; and what stands out in this replica.

use actix_web::http::Method;
use actix_web::{HttpRequest, HttpResponse, web};

use super::front::Front;
use super::problem::Problem;
use super::{keys, queries, warm};
use crate::aside::Outstanding;
use crate::config::Scope;

/// How many entries of each kind `/admin/top` tells, unless asked for another number; and at most.
const TOP: usize = 20;
const TOP_MOST: usize = 256;

/// Any method on any path under `/admin`.
pub(super) async fn handle(request: HttpRequest, payload: web::Payload, front: web::Data<Front>) -> HttpResponse {
    let path = request.uri().path().strip_prefix("/admin/").unwrap_or_default();
    let steps: Vec<&str> = path.split('/').collect();
    let route = match steps.as_slice() {
        ["cache", "query"] => "/admin/cache/query",
        ["cache", "queries", _] => "/admin/cache/queries/{name}",
        ["cache", _] => "/admin/cache/{resource}",
        ["cache", _, _] => "/admin/cache/{resource}/{key}",
        ["warm", _] => "/admin/warm/{resource}",
        ["top"] => "/admin/top",
        _ => "_unmatched",
    };
    let work = async {
        let grant = front.gate.grant(&request)?;
        match steps.as_slice() {
            ["cache", "query"] => {
                if *request.method() != Method::DELETE {
                    return Err(Problem::method_not_allowed(&["DELETE"]));
                }
                let (target, _room) = queries::named(&front, &request, payload, &grant).await?;
                front.aside.drop_entry(&target).await?;
                Ok(HttpResponse::NoContent().finish())
            }
            ["cache", "queries", name] => {
                grant.need(Scope::Admin)?;
                results(&front, &request, name).await
            }
            ["cache", resource] => {
                grant.need(Scope::Admin)?;
                whole(&front, &request, resource).await
            }
            ["cache", resource, key] => {
                grant.need(Scope::Admin)?;
                entry(&front, &request, resource, key).await
            }
            ["warm", resource] => {
                grant.need(Scope::Admin)?;
                warm::handle(&front, &request, payload, resource).await
            }
            ["top"] => {
                grant.need(Scope::Admin)?;
                top(&front, &request)
            }
            _ => Err(Problem::not_found("there is nothing here; entries are at /admin/cache/{resource}/{key}")),
        }
    };
    front.answer(&request, route, work).await
}

/// What stands out in this replica. Keys are data: nobody sees them without the scope.
fn top(front: &Front, request: &HttpRequest) -> Result<HttpResponse, Problem> {
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        return Err(Problem::method_not_allowed(&["GET", "HEAD"]));
    }
    let mut limit = TOP;
    for parameter in keys::parameters(request.uri().query().unwrap_or_default())? {
        if parameter.name != "limit" {
            return Err(Problem::bad_request(format!("there is no parameter {:?}; use limit", parameter.name)));
        }
        limit = match parameter.value()?.parse() {
            Ok(number @ 1..=TOP_MOST) => number,
            _ => return Err(Problem::bad_request(format!("limit: expected a whole number from 1 to {TOP_MOST}"))),
        };
    }
    let standing = front.aside.top(limit);
    let tenths = |number: f64| (number * 10.0).round() / 10.0;
    let row = |row: &Outstanding| {
        serde_json::json!({
            "key": row.key,
            "resource": row.resource,
            "reads_per_second": tenths(row.reads_per_second),
            "size": row.size,
            "refused": tenths(row.refused),
            "in_process": row.in_process,
        })
    };
    let rows = |rows: &[Outstanding]| rows.iter().map(row).collect::<Vec<_>>();
    Ok(HttpResponse::Ok().json(serde_json::json!({
        "hot": rows(&standing.hot),
        "big": rows(&standing.big),
        "refused": rows(&standing.refused),
    })))
}

async fn whole(front: &Front, request: &HttpRequest, name: &str) -> Result<HttpResponse, Problem> {
    let resource = front.resource(&keys::decode(name)?)?;
    if request.method() != Method::DELETE {
        return Err(Problem::method_not_allowed(&["DELETE"]));
    }
    front.aside.drop_resource(&resource).await?;
    Ok(HttpResponse::NoContent().finish())
}

/// One result of a declared statement, or without parameters all of them.
async fn results(front: &Front, request: &HttpRequest, name: &str) -> Result<HttpResponse, Problem> {
    let query = front.query(&keys::decode(name)?)?;
    if *request.method() != Method::DELETE {
        return Err(Problem::method_not_allowed(&["DELETE"]));
    }
    if request.uri().query().is_some_and(|query| !query.is_empty()) {
        front.aside.drop_entry(&queries::target(&query, request)?).await?;
    } else {
        front.aside.drop_resource(&query).await?;
    }
    Ok(HttpResponse::NoContent().finish())
}

async fn entry(front: &Front, request: &HttpRequest, name: &str, key: &str) -> Result<HttpResponse, Problem> {
    let resource = front.resource(&keys::decode(name)?)?;
    let target = resource.row(keys::parts(key)?)?;
    match *request.method() {
        Method::DELETE => {
            front.aside.drop_entry(&target).await?;
            Ok(HttpResponse::NoContent().finish())
        }
        Method::GET | Method::HEAD => {
            let held = front.aside.inspect(&target).await?;
            Ok(HttpResponse::Ok().json(serde_json::json!({
                "key": target.entry(),
                "tier": "shared",
                "engine": front.aside.cache().engine(),
                "state": held.state,
                "negative": held.negative,
                "age": held.age,
                "ttl": held.ttl,
                "size": held.size,
            })))
        }
        _ => Err(Problem::method_not_allowed(&["GET", "HEAD", "DELETE"])),
    }
}
