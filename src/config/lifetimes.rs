//! `defaults:` how long things live, and which of it a resource or query may override.

use std::time::Duration;

#[cfg(feature = "config")]
use schemars::JsonSchema;
use serde::Deserialize;

#[cfg(feature = "config")]
use super::forms;
use super::{Config, Query, Resource, units};

/// How long things live, unless a resource or query says otherwise.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[cfg_attr(feature = "config", derive(JsonSchema))]
#[serde(default, deny_unknown_fields)]
pub struct Defaults {
    /// Entries are fresh for this long, more than 0. Also `CACHE_TTL`, in seconds. Default `1h`.
    #[serde(with = "units::duration")]
    #[cfg_attr(feature = "config", schemars(with = "forms::Duration"))]
    pub ttl: Duration,
    /// Each TTL is drawn from `[ttl*(1-jitter), ttl]`; 0 to 1. Default 0.1.
    #[serde(deserialize_with = "units::number")]
    pub ttl_jitter: f64,
    /// How long "not found" is cached; `0s`: never. Default `5s`.
    #[serde(with = "units::duration")]
    #[cfg_attr(feature = "config", schemars(with = "forms::Duration"))]
    pub negative_ttl: Duration,
    /// How long past its TTL an entry may still be served when the database fails. Default `10m`.
    #[serde(with = "units::duration")]
    #[cfg_attr(feature = "config", schemars(with = "forms::Duration"))]
    pub stale_if_error: Duration,
    /// How long past its TTL an entry is served while one reader refreshes it. Default `0s`.
    #[serde(with = "units::duration")]
    #[cfg_attr(feature = "config", schemars(with = "forms::Duration"))]
    pub stale_while_revalidate: Duration,
    /// How eagerly an entry that is read near the end of its TTL is refreshed: so many times two to three times what its last
    /// load took, and 50 to 100 ms, before that end. 0: nothing is refreshed before its TTL ends. Default 1.
    #[serde(deserialize_with = "units::number")]
    pub refresh_ahead: f64,
    /// How long the in-process tier may hold an entry; `0s`: not at all. More needs `invalidation.mode` outbox or wal.
    /// Default `0s`.
    #[serde(with = "units::duration")]
    #[cfg_attr(feature = "config", schemars(with = "forms::Duration"))]
    pub local_ttl: Duration,
    /// How long the in-process tier may hold an entry that is hot: read 100 times a second or more in this process. `0s`: no
    /// longer than others. More needs what `local_ttl` needs, and costs the same: reads are bounded by `max_staleness`.
    /// Default `0s`.
    #[serde(with = "units::duration")]
    #[cfg_attr(feature = "config", schemars(with = "forms::Duration"))]
    pub local_hot_ttl: Duration,
}

impl Default for Defaults {
    fn default() -> Self {
        Self {
            ttl: Duration::from_hours(1),
            ttl_jitter: 0.1,
            negative_ttl: Duration::from_secs(5),
            stale_if_error: Duration::from_mins(10),
            stale_while_revalidate: Duration::ZERO,
            refresh_ahead: 1.0,
            local_ttl: Duration::ZERO,
            local_hot_ttl: Duration::ZERO,
        }
    }
}

impl Defaults {
    /// The values that hold for a resource.
    #[must_use]
    pub fn for_resource(&self, resource: &Resource) -> Self {
        resource.over(self)
    }

    /// Whether any entry may be held in this process in front of a shared cache.
    #[must_use]
    pub fn is_held_in_process(&self) -> bool {
        !self.local_ttl.is_zero() || !self.local_hot_ttl.is_zero()
    }

    /// The values that hold for a query.
    #[must_use]
    pub fn for_query(&self, query: &Query) -> Self {
        query.over(self)
    }
}

impl Config {
    /// Whether anything may be held in this process in front of a shared cache.
    #[must_use]
    pub fn holds_in_process(&self) -> bool {
        let resources = self.resources.values().map(|resource| resource.over(&self.defaults));
        let queries = self.queries.values().map(|query| query.over(&self.defaults));
        self.resources.values().any(|resource| resource.filter)
            || resources.chain(queries).chain([self.defaults.clone()]).any(|values| values.is_held_in_process())
    }
}

/// A struct with the given fields, and one for each value of [`Defaults`] that it may override.
macro_rules! overriding {
    ($(#[$meta:meta])* pub struct $name:ident { $($fields:tt)* }) => {
        $(#[$meta])*
        #[derive(Clone, Debug, Default, PartialEq, serde::Deserialize)]
        #[cfg_attr(feature = "config", derive(schemars::JsonSchema))]
        #[serde(default, deny_unknown_fields)]
        pub struct $name {
            $($fields)*
            /// Overrides `defaults.ttl`.
            #[serde(with = "units::some_duration")]
            #[cfg_attr(feature = "config", schemars(with = "Option<forms::Duration>"))]
            pub ttl: Option<std::time::Duration>,
            /// Overrides `defaults.ttl_jitter`.
            #[serde(deserialize_with = "units::some_number")]
            pub ttl_jitter: Option<f64>,
            /// Overrides `defaults.negative_ttl`.
            #[serde(with = "units::some_duration")]
            #[cfg_attr(feature = "config", schemars(with = "Option<forms::Duration>"))]
            pub negative_ttl: Option<std::time::Duration>,
            /// Overrides `defaults.stale_if_error`.
            #[serde(with = "units::some_duration")]
            #[cfg_attr(feature = "config", schemars(with = "Option<forms::Duration>"))]
            pub stale_if_error: Option<std::time::Duration>,
            /// Overrides `defaults.stale_while_revalidate`.
            #[serde(with = "units::some_duration")]
            #[cfg_attr(feature = "config", schemars(with = "Option<forms::Duration>"))]
            pub stale_while_revalidate: Option<std::time::Duration>,
            /// Overrides `defaults.refresh_ahead`.
            #[serde(deserialize_with = "units::some_number")]
            pub refresh_ahead: Option<f64>,
            /// Overrides `defaults.local_ttl`.
            #[serde(with = "units::some_duration")]
            #[cfg_attr(feature = "config", schemars(with = "Option<forms::Duration>"))]
            pub local_ttl: Option<std::time::Duration>,
            /// Overrides `defaults.local_hot_ttl`.
            #[serde(with = "units::some_duration")]
            #[cfg_attr(feature = "config", schemars(with = "Option<forms::Duration>"))]
            pub local_hot_ttl: Option<std::time::Duration>,
        }

        impl $name {
            /// The values that hold for it, where `defaults` are the configuration's.
            #[must_use]
            pub fn over(&self, defaults: &crate::config::Defaults) -> crate::config::Defaults {
                crate::config::Defaults {
                    ttl: self.ttl.unwrap_or(defaults.ttl),
                    ttl_jitter: self.ttl_jitter.unwrap_or(defaults.ttl_jitter),
                    negative_ttl: self.negative_ttl.unwrap_or(defaults.negative_ttl),
                    stale_if_error: self.stale_if_error.unwrap_or(defaults.stale_if_error),
                    stale_while_revalidate: self.stale_while_revalidate.unwrap_or(defaults.stale_while_revalidate),
                    refresh_ahead: self.refresh_ahead.unwrap_or(defaults.refresh_ahead),
                    local_ttl: self.local_ttl.unwrap_or(defaults.local_ttl),
                    local_hot_ttl: self.local_hot_ttl.unwrap_or(defaults.local_hot_ttl),
                }
            }
        }
    };
}
pub(super) use overriding;
