//! `server:` the HTTP side.

use std::net::SocketAddr;
use std::time::Duration;

#[cfg(feature = "config")]
use schemars::JsonSchema;
use serde::Deserialize;
use serde::de::{Deserializer, Error};

#[cfg(feature = "config")]
use super::forms;
use super::units;

/// The HTTP server.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[cfg_attr(feature = "config", derive(JsonSchema))]
#[serde(default, deny_unknown_fields)]
pub struct Server {
    /// Address and port of the API. Default `0.0.0.0:8080`.
    #[serde(deserialize_with = "address")]
    #[cfg_attr(feature = "config", schemars(with = "String"))]
    pub listen: SocketAddr,
    /// Address and port for /metrics, health and /admin; without it they are on the API's port. Default: none.
    #[serde(deserialize_with = "some_address")]
    #[cfg_attr(feature = "config", schemars(with = "forms::Text"))]
    pub management_listen: Option<SocketAddr>,
    /// A request that is not answered by then gets 504; more than 0. Default `10s`.
    #[serde(with = "units::duration")]
    #[cfg_attr(feature = "config", schemars(with = "forms::Duration"))]
    pub request_timeout: Duration,
    /// The largest request body, at least 1 byte; past it 413. Default `1MiB`.
    #[serde(with = "units::size")]
    #[cfg_attr(feature = "config", schemars(with = "forms::Size"))]
    pub max_body: usize,
    /// The most keys of one batch, at least 1. Default 1000.
    #[serde(deserialize_with = "units::number")]
    pub max_batch: usize,
    /// The most connections to the API at once, at least 1; past it clients wait in the kernel's queue. Each costs some 20 KB
    /// while it is idle. Fewer where the limit of open files is lower. Default 6000.
    #[serde(deserialize_with = "units::number")]
    pub max_connections: usize,
    /// After SIGTERM: unready, but still accepting, until load balancers know. Default `3s`.
    #[serde(with = "units::duration")]
    #[cfg_attr(feature = "config", schemars(with = "forms::Duration"))]
    pub drain_delay: Duration,
    /// Then requests under way have this long. Default `30s`.
    #[serde(with = "units::duration")]
    #[cfg_attr(feature = "config", schemars(with = "forms::Duration"))]
    pub shutdown_timeout: Duration,
    /// Origins whose pages may call the API, like `https://shop.example`; `*` for all. Default: none.
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
            max_connections: 6_000,
            drain_delay: Duration::from_secs(3),
            shutdown_timeout: Duration::from_secs(30),
            cors_origins: Vec::new(),
        }
    }
}

fn address<'de, D: Deserializer<'de>>(deserializer: D) -> Result<SocketAddr, D::Error> {
    let text = String::deserialize(deserializer)?;
    text.parse().map_err(|_| D::Error::custom(format!("{text:?} is no address and port; write it like 0.0.0.0:8080")))
}

fn some_address<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<SocketAddr>, D::Error> {
    let text: Option<String> = units::some_text(deserializer)?;
    text.map(|text| address(serde::de::value::StringDeserializer::new(text))).transpose()
}
