//! `server:` the HTTP side.

use std::net::SocketAddr;
use std::time::Duration;

use schemars::JsonSchema;
use serde::Deserialize;

use super::units;

/// The HTTP server.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Server {
    /// Address and port of the API. Default `0.0.0.0:8080`.
    #[schemars(with = "String")]
    pub listen: SocketAddr,
    /// Address and port for /metrics, health and /admin; without it they are on the API's port. Default: none.
    #[serde(deserialize_with = "units::some_parsed")]
    #[schemars(with = "String")]
    pub management_listen: Option<SocketAddr>,
    /// A request that is not answered by then gets 504. Default `10s`.
    #[serde(deserialize_with = "units::duration")]
    #[schemars(with = "String")]
    pub request_timeout: Duration,
    /// The largest request body; past it 413. Default `1MiB`.
    #[serde(deserialize_with = "units::size")]
    #[schemars(with = "String")]
    pub max_body: usize,
    /// The most keys of one batch. Default 1000.
    #[serde(deserialize_with = "units::number")]
    pub max_batch: usize,
    /// After SIGTERM: unready, but still accepting, until load balancers know. Default `3s`.
    #[serde(deserialize_with = "units::duration")]
    #[schemars(with = "String")]
    pub drain_delay: Duration,
    /// Then requests under way have this long. Default `30s`.
    #[serde(deserialize_with = "units::duration")]
    #[schemars(with = "String")]
    pub shutdown_timeout: Duration,
    /// Origins whose pages may call the API; `*` for all. Default: none.
    pub cors_origins: Vec<String>,
}

impl Default for Server {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([0, 0, 0, 0], 8080)),
            management_listen: None,
            request_timeout: Duration::from_secs(10),
            max_body: 1 << 20,
            max_batch: 1000,
            drain_delay: Duration::from_secs(3),
            shutdown_timeout: Duration::from_secs(30),
            cors_origins: Vec::new(),
        }
    }
}
