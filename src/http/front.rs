//! What every request has at hand, and the frame around each: identity, measurement, errors.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use actix_web::http::Method;
use actix_web::http::header::{CONNECTION, HeaderName, HeaderValue};
use actix_web::{HttpRequest, HttpResponse};
use arc_swap::ArcSwap;
use tokio::sync::Semaphore;

use super::access::Gate;
use super::problem::Problem;
use super::warm::Underway;
use crate::aside::Aside;
use crate::cache::AnyCache;
use crate::catalog::{Catalog, Policy, Resource, State};
use crate::served::Health;
use crate::store::AnyStore;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// What the front door needs of the configuration.
#[derive(Clone, Debug)]
pub struct Settings {
    /// A request that is not answered by then gets 504.
    pub request_timeout: Duration,
    /// The largest body, in bytes.
    pub max_body: usize,
    /// The most keys of one batch.
    pub max_batch: usize,
    /// How long the results of ad-hoc statements live.
    pub ad_hoc: Policy,
    /// What comes before all cache keys.
    pub key_prefix: String,
    /// What this version does not do of what was asked; `/readyz?verbose` says so.
    pub not_built_yet: Vec<String>,
}

/// One per worker.
#[derive(Clone, Debug)]
pub struct Front {
    /// Reads and writes, over this worker's connection to the cache.
    pub aside: Aside<AnyCache, AnyStore>,
    /// What is served.
    pub catalog: Arc<ArcSwap<Catalog>>,
    /// Who may do what.
    pub gate: Arc<Gate>,
    /// Limits.
    pub settings: Arc<Settings>,
    /// How the service is.
    pub health: Arc<Health>,
    /// What is being warmed.
    pub underway: Underway,
    /// The memory for bodies.
    pub bodies: Arc<Semaphore>,
}

impl Front {
    /// The resource of this name.
    pub(super) fn resource(&self, name: &str) -> Result<Arc<Resource>, Problem> {
        let catalog = self.catalog.load();
        match catalog.resources.get(name) {
            Some(State::Ready(resource, _)) => Ok(Arc::clone(resource)),
            Some(State::Waiting(_)) => {
                Err(Problem::unavailable(format!("{name} can't be served at the moment; /readyz?verbose says why")))
            }
            None if catalog.resources.is_empty() => {
                Err(Problem::unavailable("the database was not looked at yet; try again"))
            }
            None => Err(Problem::not_found(match catalog.nearest(name) {
                Some(near) => format!("there is no resource {name:?}; did you mean {near:?}?"),
                None => format!("there is no resource {name:?}"),
            })),
        }
    }

    /// The declared statement of this name.
    pub(super) fn query(&self, name: &str) -> Result<Arc<Resource>, Problem> {
        let catalog = self.catalog.load();
        match catalog.queries.get(&format!("query:{name}")) {
            Some(State::Ready(query, _)) => Ok(Arc::clone(query)),
            Some(State::Waiting(_)) => Err(Problem::unavailable(format!(
                "query {name} can't be served at the moment; /readyz?verbose says why"
            ))),
            None => Err(Problem::not_found(format!("there is no query {name:?}"))),
        }
    }

    /// Answers a request: names it, measures it, and gives an error its form.
    pub(super) async fn answer(
        &self,
        request: &HttpRequest,
        route: &'static str,
        work: impl Future<Output = Result<HttpResponse, Problem>>,
    ) -> HttpResponse {
        let started = Instant::now();
        let id = request_id(request);
        let outcome = work.await;
        let mut response = match outcome {
            Ok(response) => response,
            Err(problem) => {
                if problem.look_again() {
                    self.health.look_again.notify_one();
                }
                let status = problem.status();
                let warning = problem.cause().and_then(|cause| {
                    let kept_back = self.health.warnings.pass(route, status.canonical_reason().unwrap_or_default())?;
                    Some((cause, kept_back))
                });
                if let Some((cause, kept_back)) = warning {
                    let request_id = id.to_str().unwrap_or_default();
                    tracing::warn!(request_id, route, status = status.as_u16(), cause, kept_back, "a request failed");
                }
                problem.response(id.to_str().unwrap_or_default())
            }
        };
        let headers = response.headers_mut();
        headers.insert(REQUEST_ID, id);
        if self.health.draining.load(Ordering::Relaxed) {
            // So that no client sends its next request into a connection that is about to close.
            headers.insert(CONNECTION, HeaderValue::from_static("close"));
        }
        let took = started.elapsed();
        let (method, status) = (method(request.method()), response.status());
        let metrics = self.aside.metrics();
        metrics.http_requests.with_label_values(&[method, route, status.as_str()]).inc();
        metrics.http_durations.with_label_values(&[method, route]).observe(took.as_secs_f64());
        tracing::debug!(
            method,
            route,
            status = status.as_u16(),
            milliseconds = took.as_secs_f64() * 1000.0,
            "answered"
        );
        response
    }
}

/// The client's, if it can be a header and a log field; else a new one.
fn request_id(request: &HttpRequest) -> HeaderValue {
    let usable = |id: &&HeaderValue| {
        (1..=128).contains(&id.len()) && id.as_bytes().iter().all(|byte| matches!(byte, b'!'..=b'~'))
    };
    match request.headers().get(REQUEST_ID).filter(usable) {
        Some(id) => id.clone(),
        None => HeaderValue::from_str(&format!("{:032x}", fastrand::u128(..)))
            .unwrap_or_else(|_| HeaderValue::from_static("none")),
    }
}

/// A label with few values, whatever clients send.
fn method(method: &Method) -> &'static str {
    match *method {
        Method::GET => "GET",
        Method::HEAD => "HEAD",
        Method::POST => "POST",
        Method::PUT => "PUT",
        Method::PATCH => "PATCH",
        Method::DELETE => "DELETE",
        Method::OPTIONS => "OPTIONS",
        _ => "_OTHER",
    }
}
