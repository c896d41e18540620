//! The front door: bytes to domain and back. It knows no engine.
//!
//! All paths are on this screen. `/api` and `/admin` are split by hand: keys may hold any byte, and a path must
//! be taken apart before it is decoded.

mod access;
mod admin;
mod api;
mod body;
mod conditional;
mod front;
mod keys;
mod operations;
mod problem;
mod queries;
mod reply;
mod warm;
mod write;

use actix_web::web;

pub use access::Gate;
pub use body::room;
pub use front::{Front, Settings};
pub use warm::Underway;

/// The API: `/api`, and the management paths too where they have no port of their own.
pub fn api(front: &web::Data<Front>, with_management: bool) -> impl FnOnce(&mut web::ServiceConfig) + use<> {
    let front = front.clone();
    move |config| {
        // A scope with nothing in it but its default: a `{tail:.*}` would be a regular expression at every request.
        config.app_data(front).service(web::scope("/api").default_service(web::to(api::handle)));
        if with_management {
            paths(config);
        }
        config.default_service(web::to(operations::not_found));
    }
}

/// Metrics, health and `/admin`, on a port of their own.
pub fn management(front: &web::Data<Front>) -> impl FnOnce(&mut web::ServiceConfig) + use<> {
    let front = front.clone();
    move |config| {
        config.app_data(front);
        paths(config);
        config.default_service(web::to(operations::not_found));
    }
}

fn paths(config: &mut web::ServiceConfig) {
    config
        .service(web::resource("/livez").to(operations::livez))
        .service(web::resource("/readyz").to(operations::readyz))
        .service(web::resource("/metrics").to(operations::metrics))
        .service(web::scope("/admin").default_service(web::to(admin::handle)));
}
