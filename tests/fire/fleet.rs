//! Replicas of the service as they are run, with servers of their own, and a database that knows how often it was asked.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::task::JoinHandle;

use crate::app::{App, migrate};
use crate::load::Targets;
use crate::servers::{Database, Postgres, Redis};

/// `thing` is what is served. Each row that is read takes as long as `pace` says, without using a processor, and is
/// counted where nobody who reads can forget to. Without a function of our own: its language, or its body, would be what
/// every new connection reads first.
const SCHEMA: &str = "
    CREATE TABLE item (id int PRIMARY KEY, name text NOT NULL, price numeric(10, 2) NOT NULL, description text NOT NULL);
    CREATE TABLE pace (milliseconds float8 NOT NULL);
    INSERT INTO pace VALUES (0);
    CREATE SEQUENCE evaluations;
    CREATE VIEW thing AS SELECT id, name, price, description, nextval('evaluations') AS evaluation,
      (SELECT pg_sleep(milliseconds / 1000) FROM pace WHERE milliseconds > 0 AND item.id > 0)::text AS waited FROM item;";

/// Statements that read `thing`, as the server sees them now.
const LOADS: &str = "state = 'active' AND backend_type = 'client backend' AND pid <> pg_backend_pid() \
                     AND query LIKE '%thing%' AND query NOT LIKE '%pg_stat_activity%'";

pub struct Fleet {
    pub apps: Vec<App>,
    pub redis: Redis,
    pub database: Database,
    config: String,
    _postgres: Postgres,
}

/// What differs between fleets.
#[derive(Clone, Copy)]
pub struct Kit<'a> {
    pub replicas: usize,
    pub rows: usize,
    pub pool_size: usize,
    pub queue: usize,
    /// What else `server:` has.
    pub server: &'a str,
    /// What else `cache:` has.
    pub cache: &'a str,
    /// What `thing` says of its lifetimes.
    pub thing: &'a str,
    /// The cache is somewhere where nobody answers.
    pub without_cache: bool,
}

impl Default for Kit<'_> {
    fn default() -> Self {
        Self {
            replicas: 3,
            rows: 1000,
            pool_size: 16,
            queue: 256,
            server: "drain_delay: 0s",
            cache: "timeout: 100ms",
            thing: "ttl: 1h",
            without_cache: false,
        }
    }
}

impl Fleet {
    pub async fn start(kit: Kit<'_>) -> Self {
        let (postgres, mut redis) = tokio::join!(Postgres::start(), Redis::start());
        let database = postgres.create_database().await;
        let fill = format!(
            "INSERT INTO item SELECT g, 'thing ' || g, g / 100.0, repeat('what it is like ', 6) FROM generate_series(1, {}) g;
             ANALYZE item;",
            kit.rows
        );
        database.client().await.batch_execute(&format!("{SCHEMA}{fill}")).await.expect("the schema is sound");
        let config = format!(
            "server: {{ listen: \"127.0.0.1:0\", {} }}\n\
             database: {{ url: \"{}\", pool_size: {}, queue: {} }}\n\
             cache: {{ url: \"{}\", {} }}\n\
             access: {{ admin: public, refresh: public }}\n\
             resources: {{ thing: {{ key: id, {} }}, steady: {{ table: thing, key: id, ttl: 1h }} }}\n",
            kit.server,
            database.url,
            kit.pool_size,
            kit.queue,
            redis.url(),
            kit.cache,
            kit.thing
        );
        migrate(&config);
        let mut fleet = Self { apps: Vec::new(), redis, database, config, _postgres: postgres };
        if kit.without_cache {
            redis = fleet.redis;
            redis.kill().await;
            fleet.redis = redis;
        }
        for _ in 0..kit.replicas {
            let app = fleet.another().await;
            fleet.apps.push(app);
        }
        fleet
    }

    /// New replicas in place of those that there are.
    pub async fn replace(&mut self) {
        let replicas = self.apps.len();
        self.apps.clear();
        for _ in 0..replicas {
            let app = self.another().await;
            self.apps.push(app);
        }
    }

    /// One more replica, ready to be asked.
    pub async fn another(&self) -> App {
        let app = App::launch(&self.config).await;
        app.until("ready", async |app| app.get("/readyz").await.status == 200).await;
        app
    }

    pub fn addresses(&self) -> Vec<SocketAddr> {
        self.apps.iter().map(address).collect()
    }

    pub fn targets(&self) -> Arc<Targets> {
        Targets::new(self.addresses())
    }

    /// How long reading a row takes from now on.
    pub async fn pace(&self, pace: Duration) {
        let update = format!("UPDATE pace SET milliseconds = {}", pace.as_secs_f64() * 1000.0);
        self.database.client().await.batch_execute(&update).await.expect("the table is there");
    }

    /// How many rows of `thing` the database has read.
    pub async fn evaluations(&self) -> i64 {
        evaluations(&self.database.client().await).await
    }

    /// The sum of a metric's lines of all replicas.
    pub async fn sum(&self, metric: &str) -> f64 {
        let mut sum = 0.0;
        for app in &self.apps {
            sum += values(&app.get("/metrics").await.text, metric).sum::<f64>();
        }
        sum
    }

    /// How many statements the replicas say that they have sent for `thing`.
    pub async fn statements(&self) -> f64 {
        let mut sum = 0.0;
        for app in &self.apps {
            let text = app.get("/metrics").await.text;
            let ours: String =
                text.lines().filter(|line| line.contains("\"thing\"")).map(|line| format!("{line}\n")).collect();
            sum += values(&ours, "cache_aside_store_queries_total").sum::<f64>();
        }
        sum
    }

    /// The sums of a metric's lines of these replicas, by the value of a label.
    pub async fn by(&self, replicas: &[usize], metric: &str, label: &str) -> BTreeMap<String, f64> {
        let label = format!("{label}=\"");
        let mut sums = BTreeMap::new();
        for replica in replicas {
            let text = self.apps[*replica].get("/metrics").await.text;
            for line in text.lines().filter(|line| line.starts_with(metric)) {
                let name = line.split_once(&label).and_then(|(_, rest)| Some(rest.split_once('"')?.0.to_owned()));
                let value = line.rsplit(' ').next().and_then(|value| value.parse::<f64>().ok());
                *sums.entry(name.unwrap_or_default()).or_default() += value.unwrap_or_default();
            }
        }
        sums
    }

    /// How many connections to the database the replicas have.
    pub async fn connections(&self) -> f64 {
        let idle = self.sum("cache_aside_pool_connections{backend=\"postgresql\",state=\"idle\"}").await;
        idle + self.sum("cache_aside_pool_connections{backend=\"postgresql\",state=\"in_use\"}").await
    }

    /// Reads the keys from 1 on through the first replica, a thousand at a time.
    pub async fn warm(&self, keys: usize) {
        for first in (1..=keys).step_by(1000) {
            let last = (first + 999).min(keys);
            let ids: Vec<String> = (first..=last).map(|id| id.to_string()).collect();
            self.apps[0].get(&format!("/api/thing?id={}", ids.join(","))).await.expect(200);
        }
    }

    /// Waits until a key that was read is found in the cache by all replicas.
    pub async fn cached(&self) {
        for app in &self.apps {
            app.until("cached", async |app| app.get("/api/thing/1").await.expect(200).source() == "cache").await;
        }
    }

    /// Looks at the database every 20 ms from now on.
    pub async fn watch(&self) -> Watch {
        let client = self.database.client().await;
        let began = Instant::now();
        let samples = Arc::new(Mutex::new(Vec::new()));
        let task = tokio::spawn({
            let samples = Arc::clone(&samples);
            async move {
                let sql = format!(
                    "SELECT (SELECT last_value - (NOT is_called)::int FROM evaluations),
                            (SELECT count(*) FROM pg_stat_activity WHERE {LOADS})"
                );
                let statement = client.prepare(&sql).await.expect("the statement is sound");
                let mut ticks = tokio::time::interval(Duration::from_millis(20));
                loop {
                    ticks.tick().await;
                    let row = client.query_one(&statement, &[]).await.expect("one row comes");
                    let sample = Sample { at: Instant::now(), evaluations: row.get(0), active: row.get(1) };
                    samples.lock().unwrap_or_else(PoisonError::into_inner).push(sample);
                }
            }
        });
        Watch { began, samples, task }
    }
}

pub fn address(app: &App) -> SocketAddr {
    app.url.trim_start_matches("http://").parse().expect("it listens on an address")
}

/// How many rows of `thing` the database has read.
pub async fn evaluations(client: &tokio_postgres::Client) -> i64 {
    let row = client.query_one("SELECT last_value - (NOT is_called)::int FROM evaluations", &[]).await;
    row.expect("the sequence is there").get(0)
}

/// Ends what works on a load in the database, and says how many there were.
pub async fn terminate_loads(client: &tokio_postgres::Client) -> i64 {
    let sql = format!("SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE {LOADS}");
    client.query_one(&sql, &[]).await.expect("one row comes").get(0)
}

/// The values of all lines of a metric.
pub fn values<'a>(text: &'a str, metric: &'a str) -> impl Iterator<Item = f64> {
    let lines = text.lines().filter(move |line| line.starts_with(metric));
    lines.filter_map(|line| line.rsplit(' ').next()?.parse().ok())
}

/// One look at the database.
#[derive(Clone, Copy)]
pub struct Sample {
    pub at: Instant,
    /// Rows of `thing` that were read so far.
    pub evaluations: i64,
    /// Statements that read `thing` at this moment.
    pub active: i64,
}

/// Somebody who looks at the database.
pub struct Watch {
    began: Instant,
    samples: Arc<Mutex<Vec<Sample>>>,
    task: JoinHandle<()>,
}

impl Watch {
    pub fn end(self) -> Looks {
        self.task.abort();
        let samples = std::mem::take(&mut *self.samples.lock().unwrap_or_else(PoisonError::into_inner));
        assert!(!samples.is_empty(), "nobody looked since {:?}", self.began);
        Looks(samples)
    }
}

/// What somebody saw who looked at the database.
pub struct Looks(Vec<Sample>);

impl Looks {
    fn between(&self, from: Instant, to: Instant) -> impl Iterator<Item = &Sample> {
        self.0.iter().filter(move |sample| sample.at >= from && sample.at < to)
    }

    /// The most statements at one time.
    pub fn most_active(&self, from: Instant, to: Instant) -> i64 {
        self.between(from, to).map(|sample| sample.active).max().unwrap_or(0)
    }

    /// Rows per second, on average.
    #[expect(clippy::cast_precision_loss, reason = "fewer than 2^52 rows")]
    pub fn rate(&self, from: Instant, to: Instant) -> f64 {
        let mut samples = self.between(from, to);
        let (Some(first), Some(last)) = (samples.next(), samples.last()) else { return 0.0 };
        (last.evaluations - first.evaluations) as f64 / (last.at - first.at).as_secs_f64()
    }

    /// Rows per second over each such step of time.
    pub fn rates(&self, from: Instant, to: Instant, step: Duration) -> Vec<(Instant, f64)> {
        let mut rates = Vec::new();
        let mut at = from;
        while at + step <= to {
            // A sample more, so that nothing falls between two steps.
            rates.push((at, self.rate(at, at + step + Duration::from_millis(25))));
            at += step;
        }
        rates
    }
}
