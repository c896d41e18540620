//! Every metric, declared once. Labels are bounded by the configuration: never a key, never a raw path.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use prometheus::core::Collector;
use prometheus::{
    CounterVec, Encoder, Gauge, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounterVec, IntGauge, IntGaugeVec,
    Opts, Registry, TextEncoder,
};

use super::ratio::{Counts, SAMPLE, Window};
use super::resource::ResourceMetrics;
use crate::shield::State;

/// 100 µs to 10 s, in steps of 1, 2.5, 5.
const BUCKETS: [f64; 16] =
    [0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];

/// All metrics of a service.
pub struct Metrics {
    registry: Registry,
    pub(super) requests: IntCounterVec,
    pub(super) durations: HistogramVec,
    pub(super) fills: IntCounterVec,
    pub(super) coalesced: IntCounterVec,
    pub(super) refreshes: IntCounterVec,
    pub(super) invalidations: IntCounterVec,
    invalidation_lag: Histogram,
    outbox_rows: IntGauge,
    slot_lag: IntGauge,
    slot_retained: IntGauge,
    staleness: GaugeVec,
    untrusted: CounterVec,
    consistency_checks: IntCounterVec,
    warmed: IntCounterVec,
    filter_keys: IntGaugeVec,
    filter_bytes: IntGaugeVec,
    filter_builds: IntCounterVec,
    /// `cache_aside_capture_complete{resource}`
    pub capture: IntGaugeVec,
    hit_ratio: GaugeVec,
    miss_ratio: GaugeVec,
    /// `cache_aside_cache_operation_duration_seconds{operation}`
    pub cache_operations: HistogramVec,
    /// `cache_aside_store_query_duration_seconds{resource,operation}`
    pub store_durations: HistogramVec,
    /// `cache_aside_store_queries_total{resource,operation}`
    pub store_queries: IntCounterVec,
    /// `cache_aside_replica_reads_total{outcome}`
    pub replica_reads: IntCounterVec,
    /// `cache_aside_errors_total{component,kind}`
    pub errors: IntCounterVec,
    breakers: IntGaugeVec,
    retries: IntCounterVec,
    /// `cache_aside_pool_connections{backend,state}`
    pub pool_connections: IntGaugeVec,
    /// `http_requests_total{method,route,status}`
    pub http_requests: IntCounterVec,
    /// `http_request_duration_seconds{method,route}`
    pub http_durations: HistogramVec,
    /// Read at every request, changed when a resource is first served.
    resources: ArcSwap<HashMap<String, Arc<ResourceMetrics>>>,
    all: Mutex<Window>,
}

impl std::fmt::Debug for Metrics {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.write_str("Metrics")
    }
}

impl Metrics {
    /// Everything that a service tells, in a registry of its own.
    ///
    /// # Errors
    ///
    /// Two metrics of one name: a mistake in this file.
    pub fn new() -> prometheus::Result<Self> {
        let metrics = Self::within(&Registry::new())?;
        let registry = &metrics.registry;
        registry.register(Box::new(metrics.hit_ratio.clone()))?;
        registry.register(Box::new(metrics.miss_ratio.clone()))?;
        registry.register(Box::new(metrics.http_requests.clone()))?;
        registry.register(Box::new(metrics.http_durations.clone()))?;
        let build = register(
            registry,
            GaugeVec::new(Opts::new("cache_aside_build_info", "The running version; always 1"), &["version"])?,
        )?;
        build.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1.0);
        let started = register(
            registry,
            Gauge::new("cache_aside_start_time_seconds", "When the service started, since the epoch")?,
        )?;
        started.set(std::time::UNIX_EPOCH.elapsed().unwrap_or_default().as_secs_f64());
        #[cfg(all(feature = "server", target_os = "linux"))]
        registry.register(Box::new(prometheus::process_collector::ProcessCollector::for_self()))?;
        Ok(metrics)
    }

    /// What a cache tells inside another program: the `cache_aside_…` metrics, in that program's registry.
    ///
    /// # Errors
    ///
    /// Metrics of these names are registered already: one cache per registry.
    #[expect(clippy::too_many_lines, reason = "a table: one entry per metric")]
    pub fn within(registry: &Registry) -> prometheus::Result<Self> {
        Ok(Self {
            requests: counters(
                registry,
                "cache_aside_requests_total",
                "Reads of entries, by the tier that answered and the result",
                &["resource", "tier", "result"],
            )?,
            durations: histograms(
                registry,
                "cache_aside_request_duration_seconds",
                "Time from a parsed read to its answer",
                &["resource", "result"],
            )?,
            fills: counters(
                registry,
                "cache_aside_fills_total",
                "Values offered to the cache; fenced and gone are stale values that were refused",
                &["resource", "outcome"],
            )?,
            coalesced: counters(
                registry,
                "cache_aside_coalesced_total",
                "Reads that were answered by another's load",
                &["resource"],
            )?,
            refreshes: counters(
                registry,
                "cache_aside_refreshes_total",
                "Entries loaded again while they were served: ahead of their TTL's end, or past it and stale",
                &["resource", "kind"],
            )?,
            invalidations: counters(
                registry,
                "cache_aside_invalidations_total",
                "Invalidated entries, by what asked for it",
                &["resource", "path"],
            )?,
            invalidation_lag: register(
                registry,
                Histogram::with_opts(
                    HistogramOpts::new(
                        "cache_aside_invalidation_lag_seconds",
                        "Time from a change in the database to its delivery to the cache",
                    )
                    .buckets(BUCKETS.to_vec()),
                )?,
            )?,
            outbox_rows: register(
                registry,
                IntGauge::new(
                    "cache_aside_outbox_rows",
                    "Changes that the database keeps for caches; counted up to 1000001",
                )?,
            )?,
            slot_lag: register(
                registry,
                IntGauge::new(
                    "cache_aside_replication_slot_lag_bytes",
                    "Log that the decoder has not told of yet (invalidation.mode wal)",
                )?,
            )?,
            slot_retained: register(
                registry,
                IntGauge::new(
                    "cache_aside_replication_slot_retained_bytes",
                    "Log that the database keeps for the decoder (invalidation.mode wal)",
                )?,
            )?,
            staleness: register(
                registry,
                GaugeVec::new(
                    Opts::new("cache_aside_staleness_seconds", "How far behind the database this cache node may be"),
                    &["node"],
                )?,
            )?,
            untrusted: register(
                registry,
                CounterVec::new(
                    Opts::new(
                        "cache_aside_untrusted_seconds_total",
                        "Time during which this cache node could not be known to be current",
                    ),
                    &["node"],
                )?,
            )?,
            consistency_checks: counters(
                registry,
                "cache_aside_consistency_checks_total",
                "Entries that the auditor compared with the database; stale ones are a broken promise",
                &["resource", "result"],
            )?,
            filter_keys: register(
                registry,
                IntGaugeVec::new(
                    Opts::new(
                        "cache_aside_filter_keys",
                        "Keys in the filter of existing ones; 0 while it does not answer",
                    ),
                    &["resource"],
                )?,
            )?,
            filter_bytes: register(
                registry,
                IntGaugeVec::new(
                    Opts::new("cache_aside_filter_bytes", "Memory of the filter of existing keys"),
                    &["resource"],
                )?,
            )?,
            filter_builds: counters(
                registry,
                "cache_aside_filter_builds_total",
                "Filters of existing keys that were built, by what became of them",
                &["resource", "outcome"],
            )?,
            warmed: counters(
                registry,
                "cache_aside_warmed_keys_total",
                "Keys that were warmed, by what became of them; they are not among the requests",
                &["resource", "outcome"],
            )?,
            capture: register(
                registry,
                IntGaugeVec::new(
                    Opts::new("cache_aside_capture_complete", "Whether changes of a resource by anybody are captured"),
                    &["resource"],
                )?,
            )?,
            hit_ratio: gauges(
                "cache_aside_hit_ratio",
                "Share of reads answered from a cache over the last five minutes",
            )?,
            miss_ratio: gauges(
                "cache_aside_miss_ratio",
                "Share of reads answered by the database over the last five minutes",
            )?,
            cache_operations: histograms(
                registry,
                "cache_aside_cache_operation_duration_seconds",
                "Round trips to the cache",
                &["operation"],
            )?,
            store_durations: histograms(
                registry,
                "cache_aside_store_query_duration_seconds",
                "Statements of the database, with the wait for a connection",
                &["resource", "operation"],
            )?,
            replica_reads: counters(
                registry,
                "cache_aside_replica_reads_total",
                "Loads that went to the replica, and those that did not because it was behind, unfit or away",
                &["outcome"],
            )?,
            store_queries: counters(
                registry,
                "cache_aside_store_queries_total",
                "Statements sent to the database",
                &["resource", "operation"],
            )?,
            errors: counters(
                registry,
                "cache_aside_errors_total",
                "Errors of the cache and the database, and panics",
                &["component", "kind"],
            )?,
            breakers: register(
                registry,
                IntGaugeVec::new(
                    Opts::new(
                        "cache_aside_breaker_state",
                        "Whether a cache node or the database is asked: 0 closed, 1 half-open, 2 open (not asked, or out of reach)",
                    ),
                    &["backend"],
                )?,
            )?,
            retries: counters(
                registry,
                "cache_aside_store_retries_total",
                "Loads that were tried again because the database could not be reached",
                &["resource"],
            )?,
            pool_connections: register(
                registry,
                IntGaugeVec::new(
                    Opts::new("cache_aside_pool_connections", "Connections, and requests that wait for one"),
                    &["backend", "state"],
                )?,
            )?,
            http_requests: IntCounterVec::new(
                Opts::new("http_requests_total", "HTTP requests by matched route"),
                &["method", "route", "status"],
            )?,
            http_durations: HistogramVec::new(
                HistogramOpts::new("http_request_duration_seconds", "Time to answer HTTP requests, by matched route")
                    .buckets(BUCKETS.to_vec()),
                &["method", "route"],
            )?,
            resources: ArcSwap::default(),
            all: Mutex::default(),
            registry: registry.clone(),
        })
    }

    /// Where they are registered.
    #[must_use]
    pub fn registry(&self) -> &Registry {
        &self.registry
    }

    /// How often a resource was read, however that ended. One that nobody has read is not in the metrics for this.
    #[must_use]
    pub fn reads(&self, name: &str) -> u64 {
        self.resources.load().get(name).map_or(0, |known| known.all_reads())
    }

    /// The counters of a resource; the same ones at every call.
    #[must_use]
    pub fn resource(&self, name: &str) -> Arc<ResourceMetrics> {
        if let Some(known) = self.resources.load().get(name) {
            return Arc::clone(known);
        }
        let made = Arc::new(ResourceMetrics::new(name, self));
        self.resources.rcu(|resources| {
            let mut resources = HashMap::clone(resources);
            // Two threads may come here at once; both use the same counters in the end.
            resources.entry(name.to_owned()).or_insert_with(|| Arc::clone(&made));
            resources
        });
        Arc::clone(self.resources.load().get(name).unwrap_or(&made))
    }

    /// Takes the samples behind the ratios, for as long as the service runs.
    pub async fn sample(&self) {
        let mut ticks = tokio::time::interval(SAMPLE);
        loop {
            ticks.tick().await;
            let now = Instant::now();
            let mut sum = Counts::default();
            for resource in self.resources.load().values() {
                let counts = resource.counts();
                sum.hits += counts.hits;
                sum.misses += counts.misses;
                resource.window.lock().unwrap_or_else(PoisonError::into_inner).sample(now, counts);
            }
            self.all.lock().unwrap_or_else(PoisonError::into_inner).sample(now, sum);
        }
    }

    /// Everything in Prometheus' text format.
    ///
    /// # Errors
    ///
    /// Metrics that can't be encoded: a mistake in this file.
    pub fn encode(&self) -> prometheus::Result<Vec<u8>> {
        self.set_ratios();
        let mut text = Vec::with_capacity(64 << 10);
        TextEncoder::new().encode(&self.registry.gather(), &mut text)?;
        Ok(text)
    }

    fn set_ratios(&self) {
        let now = Instant::now();
        let set = |name: &str, ratio: Option<f64>| {
            if let Some(hits) = ratio {
                self.hit_ratio.with_label_values(&[name]).set(hits);
                self.miss_ratio.with_label_values(&[name]).set(1.0 - hits);
            } else {
                // Absent rather than zero: nothing was asked. It fails where it was absent already.
                let _ = self.hit_ratio.remove_label_values(&[name]);
                let _ = self.miss_ratio.remove_label_values(&[name]);
            }
        };
        let mut sum = Counts::default();
        for (name, resource) in self.resources.load().iter() {
            let counts = resource.counts();
            sum.hits += counts.hits;
            sum.misses += counts.misses;
            set(name, resource.window.lock().unwrap_or_else(PoisonError::into_inner).hit_ratio(now, counts));
        }
        set("_all", self.all.lock().unwrap_or_else(PoisonError::into_inner).hit_ratio(now, sum));
    }

    /// Observes one operation of the cache.
    pub fn cache_operation(&self, operation: &str, took: Duration) {
        self.cache_operations.with_label_values(&[operation]).observe(took.as_secs_f64());
    }

    /// Counts and observes one statement of the database.
    pub fn store_query(&self, resource: &str, operation: &str, took: Duration) {
        self.store_queries.with_label_values(&[resource, operation]).inc();
        self.store_durations.with_label_values(&[resource, operation]).observe(took.as_secs_f64());
    }

    /// Counts an entry that was compared with the database.
    pub fn consistency_check(&self, resource: &str, result: &str) {
        self.consistency_checks.with_label_values(&[resource, result]).inc();
    }

    /// Sets how many keys a filter has, and its bytes.
    pub fn filter(&self, resource: &str, (keys, bytes): (u64, u64)) {
        self.filter_keys.with_label_values(&[resource]).set(keys.cast_signed());
        self.filter_bytes.with_label_values(&[resource]).set(bytes.cast_signed());
    }

    /// Counts a filter: `built`, `missed` (changes, while it was built), `too_many_keys` or `error`.
    pub fn filter_built(&self, resource: &str, outcome: &str) {
        self.filter_builds.with_label_values(&[resource, outcome]).inc();
    }

    /// Counts a key that was warmed: `filled`, `present`, `absent` or `failed`.
    pub fn warmed(&self, resource: &str, outcome: &str) {
        self.warmed.with_label_values(&[resource, outcome]).inc();
    }

    /// Counts entries that a round invalidated.
    pub fn invalidated_by_round(&self, resource: &str, entries: u64) {
        self.resource(resource).invalidated_by_round(entries);
    }

    /// Observes how long a change took to be delivered, in seconds.
    pub fn invalidation_lag(&self, seconds: f64) {
        self.invalidation_lag.observe(seconds);
    }

    /// Sets how many changes the database keeps.
    pub fn outbox_rows(&self, rows: i64) {
        self.outbox_rows.set(rows);
    }

    /// How far behind the decoder is, and what the database keeps for it, in bytes.
    pub fn replication_slot(&self, lag: i64, retained: i64) {
        self.slot_lag.set(lag);
        self.slot_retained.set(retained);
    }

    /// Sets how far behind a node is, in seconds; `None`: nobody knows.
    pub fn staleness(&self, node: &str, seconds: Option<f64>) {
        match seconds {
            Some(seconds) => self.staleness.with_label_values(&[node]).set(seconds),
            // Absent rather than zero. It fails where it was absent already.
            None => drop(self.staleness.remove_label_values(&[node])),
        }
    }

    /// Sets how a breaker is; `None`: there is no such backend any more.
    pub fn breaker(&self, backend: &str, state: Option<State>) {
        match state {
            Some(state) => self.breakers.with_label_values(&[backend]).set(state.gauge()),
            // It fails where it was absent already.
            None => drop(self.breakers.remove_label_values(&[backend])),
        }
    }

    /// Counts a load that is tried again.
    pub fn retried(&self, resource: &str) {
        self.retries.with_label_values(&[resource]).inc();
    }

    /// Counts time during which a node was not trusted.
    pub fn untrusted(&self, node: &str, time: Duration) {
        self.untrusted.with_label_values(&[node]).inc_by(time.as_secs_f64());
    }

    /// Counts an error.
    pub fn error(&self, component: &str, kind: &str) {
        self.errors.with_label_values(&[component, kind]).inc();
    }
}

fn register<C: Collector + Clone + 'static>(registry: &Registry, collector: C) -> prometheus::Result<C> {
    registry.register(Box::new(collector.clone()))?;
    Ok(collector)
}

fn counters(registry: &Registry, name: &str, help: &str, labels: &[&str]) -> prometheus::Result<IntCounterVec> {
    register(registry, IntCounterVec::new(Opts::new(name, help), labels)?)
}

fn histograms(registry: &Registry, name: &str, help: &str, labels: &[&str]) -> prometheus::Result<HistogramVec> {
    register(registry, HistogramVec::new(HistogramOpts::new(name, help).buckets(BUCKETS.to_vec()), labels)?)
}

/// Not registered: they are set when a service is asked for its metrics.
fn gauges(name: &str, help: &str) -> prometheus::Result<GaugeVec> {
    GaugeVec::new(Opts::new(name, help), &["resource"])
}
