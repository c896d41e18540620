//! Health and metrics.

use std::fmt::Write as _;
use std::sync::atomic::Ordering;

use actix_web::http::Method;
use actix_web::{HttpRequest, HttpResponse, web};

use super::front::Front;
use super::problem::Problem;
use crate::catalog::{State, called};

/// The process is up and its workers answer.
pub(super) async fn livez(request: HttpRequest, front: web::Data<Front>) -> HttpResponse {
    front.answer(&request, "/livez", async { read_only(&request).map(|()| text(true, "ok\n".into())) }).await
}

/// The database answers and everything declared can be served. The cache has no say: without it the service is slower.
///
/// `exclude=database` is for whoever sends requests here (the parameter is that of Kubernetes' own `/readyz`): what was ready
/// once serves hits, and what is stale, also while the database is away.
pub(super) async fn readyz(request: HttpRequest, front: web::Data<Front>) -> HttpResponse {
    let work = async {
        read_only(&request)?;
        let (mut verbose, mut without_database) = (false, false);
        for part in request.uri().query().unwrap_or_default().split('&') {
            match part.split_once('=').unwrap_or((part, "")) {
                ("verbose", _) => verbose = true,
                ("exclude", "database") => without_database = true,
                ("exclude", _) => return Err(Problem::bad_request("nothing but exclude=database can be excluded")),
                _ => {}
            }
        }
        let (ready, report) = report(&front, !without_database);
        let summary = if ready { "ready\n" } else { "not ready\n" };
        Ok(text(ready, if verbose { report + summary } else { summary.into() }))
    };
    front.answer(&request, "/readyz", work).await
}

/// `database`: whether it has a say.
fn report(front: &Front, database: bool) -> (bool, String) {
    let mut ready = true;
    let mut report = String::new();
    // Writing to a String can't fail.
    let mut line = |ok: bool, decides: bool, text: std::fmt::Arguments<'_>| {
        ready &= ok || !decides;
        let mark = if ok {
            '+'
        } else if decides {
            '-'
        } else {
            '!'
        };
        let _ = writeln!(report, "[{mark}] {text}");
    };
    let draining = front.health.draining.load(Ordering::Relaxed);
    line(!draining, true, format_args!("{}", if draining { "shutting down" } else { "running" }));
    if front.health.starting.load(Ordering::Relaxed) {
        line(false, true, format_args!("starting: what is hot at other replicas is read first"));
    }
    match front.health.database.load().as_ref() {
        Ok(()) => line(true, true, format_args!("database: answers")),
        Err(error) => line(false, database, format_args!("database: {error}")),
    }
    let cache = front.aside.cache();
    let (engine, memories) = (cache.engine(), cache.memories());
    if memories.is_empty() {
        line(false, false, format_args!("cache ({engine}): no node is known; reads go to the database"));
    }
    let many = memories.len() > 1;
    for memory in memories {
        let address = if many { format!(" {}", memory.address) } else { String::new() };
        match (memory.health, memory.staleness) {
            (Ok(()), None) => line(true, false, format_args!("cache ({engine}{address}): answers")),
            (Ok(()), Some(behind)) => line(
                true,
                false,
                format_args!("cache ({engine}{address}): answers, {behind} ms behind the database at most"),
            ),
            (Err(error), _) => {
                line(false, false, format_args!("cache ({engine}{address}): {error}; reads go to the database"));
            }
        }
    }
    for (address, trouble) in front.health.rounds.all() {
        let address = if many { format!(" of {address}") } else { String::new() };
        line(false, false, format_args!("rounds{address}: {trouble}"));
    }
    let catalog = front.catalog.load();
    if catalog.all().next().is_none() {
        line(
            false,
            true,
            format_args!("resources: the database has no table with a primary key, or was not looked at yet"),
        );
    }
    for (name, state) in catalog.all() {
        let name = called(name);
        match state {
            State::Ready(_, problems) => {
                line(true, true, format_args!("{name}: served"));
                for problem in problems {
                    line(false, false, format_args!("{name}: {}", problem.text));
                }
            }
            State::Waiting(problems) => {
                for problem in problems {
                    line(false, true, format_args!("{name}: {}", problem.text));
                }
            }
        }
    }
    for (name, words) in front.health.filters.load().iter() {
        line(false, false, format_args!("resource {name}: its filter of existing keys {words}"));
    }
    for missing in &front.settings.not_built_yet {
        line(false, false, format_args!("{missing}"));
    }
    (ready, report)
}

/// Everything in Prometheus' text format.
pub(super) async fn metrics(request: HttpRequest, front: web::Data<Front>) -> HttpResponse {
    let work = async {
        read_only(&request)?;
        let metrics = std::sync::Arc::clone(front.aside.metrics());
        let pools = &metrics.pool_connections;
        let set = |backend: &str, state: &str, count: usize| {
            pools.with_label_values(&[backend, state]).set(i64::try_from(count).unwrap_or(i64::MAX));
        };
        let store = front.aside.store();
        let connections = store.connections();
        set(store.engine(), "in_use", connections.in_use);
        set(store.engine(), "idle", connections.idle);
        set(store.engine(), "waiting", connections.waiting);
        for (outcome, count) in store.replica_reads() {
            metrics.replica_reads.with_label_values(&[outcome]).inc_by(count);
        }
        let cache = front.aside.cache();
        set(cache.engine(), "in_use", cache.connections());
        // Encoding takes milliseconds where there are many resources: not on a worker that serves hits.
        let encoded = web::block(move || metrics.encode()).await;
        let encoded = encoded.map_err(|error| Problem::internal(error.to_string()))?;
        let encoded = encoded.map_err(|error| Problem::internal(error.to_string()))?;
        Ok(HttpResponse::Ok().content_type("text/plain; version=0.0.4; charset=utf-8").body(encoded))
    };
    front.answer(&request, "/metrics", work).await
}

/// No path is like this.
pub(super) async fn not_found(request: HttpRequest, front: web::Data<Front>) -> HttpResponse {
    let nothing = async { Err(Problem::not_found("there is nothing here; rows are at /api/{resource}/{key}")) };
    front.answer(&request, "_unmatched", nothing).await
}

fn read_only(request: &HttpRequest) -> Result<(), Problem> {
    match *request.method() {
        Method::GET | Method::HEAD => Ok(()),
        _ => Err(Problem::method_not_allowed(&["GET", "HEAD"])),
    }
}

fn text(ok: bool, body: String) -> HttpResponse {
    let mut response = if ok { HttpResponse::Ok() } else { HttpResponse::ServiceUnavailable() };
    response.content_type("text/plain; charset=utf-8").body(body)
}
