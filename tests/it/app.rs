//! The service as its users run it: the binary, a configuration file, a port of its own; and typed requests to it.
#![allow(dead_code, reason = "which verbs are in use depends on the stories")]

use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Write as _};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use reqwest::header::HeaderMap;
use reqwest::{Client, Method, StatusCode};
use serde_json::Value;

use crate::servers::{Database, Postgres, Redis};

/// Nothing that a test waits for takes longer, unless it is broken.
pub const PATIENCE: Duration = Duration::from_mins(1);

/// A running service.
pub struct App {
    child: Child,
    pub url: String,
    pub client: Client,
    log: Arc<Mutex<Vec<String>>>,
    _dir: tempfile::TempDir,
}

/// An answer.
#[derive(Debug)]
pub struct Reply {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub text: String,
}

impl Reply {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|error| panic!("{error} in {self:?}"))
    }

    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().expect("header values are text"))
    }

    pub fn source(&self) -> String {
        self.json()["source"].as_str().unwrap_or_default().to_owned()
    }

    /// The bytes of `data` as they came.
    pub fn data(&self) -> &str {
        let rest = self.text.strip_prefix("{\"data\":").unwrap_or_else(|| panic!("no data in {self:?}"));
        rest.rfind(",\"source\":").map_or(rest, |end| &rest[..end])
    }

    pub fn expect(self, status: u16) -> Self {
        assert_eq!(self.status.as_u16(), status, "{self:?}");
        self
    }
}

/// A request under construction is a method, a path and what comes with it.
pub struct Ask<'a> {
    app: &'a App,
    request: reqwest::RequestBuilder,
}

impl Ask<'_> {
    pub fn header(mut self, name: &str, value: &str) -> Self {
        self.request = self.request.header(name, value);
        self
    }

    pub fn json(mut self, body: &str) -> Self {
        self.request = self.request.header("content-type", "application/json").body(body.to_owned());
        self
    }

    pub async fn send(self) -> Reply {
        let response = self.request.send().await.unwrap_or_else(|error| panic!("{error:?}\n{}", self.app.log()));
        reply(response).await
    }
}

pub async fn reply(response: reqwest::Response) -> Reply {
    let (status, headers) = (response.status(), response.headers().clone());
    Reply { status, headers, text: response.text().await.expect("the body arrives whole") }
}

impl App {
    /// Installs the change capture, starts the service with this configuration and waits until it is ready. `listen`
    /// and [`crate::GIVEN`] are added.
    pub async fn start(config: &str) -> Self {
        if !config.contains("mode: none") {
            migrate(config);
        }
        let app = Self::launch(config).await;
        app.until("ready", async |app| app.get("/readyz").await.status == 200).await;
        // It serves without a cache, too, and soon with it where there is one.
        let started = Instant::now();
        while started.elapsed() < PATIENCE / 10 && !app.get("/readyz?verbose").await.text.contains("[+] cache") {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        app
    }

    /// Starts the service and waits until it listens.
    pub async fn launch(config: &str) -> Self {
        let dir = tempfile::tempdir().expect("a folder can be made");
        let file = dir.path().join("config.yaml");
        let mut text = config.to_owned();
        if !text.contains("server:") {
            text.push_str("\nserver: { listen: \"127.0.0.1:0\", drain_delay: 0s }\n");
        }
        std::fs::write(&file, given(&text)).expect("the configuration can be written");
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", env!("CARGO_BIN_EXE_cache-aside"), "serve", "--config"]).arg(&file);
        Self::spawn(command, dir).await
    }

    pub async fn spawn(mut command: Command, dir: tempfile::TempDir) -> Self {
        let mut child = command
            .env("RUST_LOG", "info")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .expect("the service can be started");
        let log = Arc::new(Mutex::new(Vec::new()));
        let lines = BufReader::new(child.stdout.take().expect("it is piped")).lines();
        std::thread::spawn({
            let log = Arc::clone(&log);
            move || {
                for line in lines.map_while(Result::ok) {
                    log.lock().expect("no reader panics").push(line);
                }
            }
        });
        // A connection on which nobody asks for anything for some seconds may be told so (408) while he is about to.
        let client = Client::builder().timeout(PATIENCE).pool_idle_timeout(Duration::from_secs(2));
        let client = client.build().expect("a client can be made");
        let mut app = Self { child, url: String::new(), client, log, _dir: dir };
        let started = Instant::now();
        loop {
            let found = app.log().lines().find_map(|line| {
                let rest = line.split_once("listening on ")?.1;
                Some(
                    rest.split(|letter: char| !letter.is_ascii_digit() && !matches!(letter, '.' | ':'))
                        .next()?
                        .to_owned(),
                )
            });
            if let Some(address) = found {
                app.url = format!("http://{address}");
                return app;
            }
            assert!(started.elapsed() < PATIENCE, "it never listened:\n{}", app.log());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// What it logged so far.
    pub fn log(&self) -> String {
        self.log.lock().expect("no reader panics").join("\n")
    }

    pub fn ask(&self, method: Method, path: &str) -> Ask<'_> {
        Ask { app: self, request: self.client.request(method, format!("{}{path}", self.url)) }
    }

    pub async fn get(&self, path: &str) -> Reply {
        self.ask(Method::GET, path).send().await
    }

    pub async fn post(&self, path: &str, body: &str) -> Reply {
        self.ask(Method::POST, path).json(body).send().await
    }

    pub async fn put(&self, path: &str, body: &str) -> Reply {
        self.ask(Method::PUT, path).json(body).send().await
    }

    pub async fn patch(&self, path: &str, body: &str) -> Reply {
        self.ask(Method::PATCH, path).json(body).send().await
    }

    pub async fn delete(&self, path: &str) -> Reply {
        self.ask(Method::DELETE, path).send().await
    }

    /// The value of a counter whose line starts like this; 0 where there is none.
    pub async fn metric(&self, start: &str) -> u64 {
        let text = self.get("/metrics").await.text;
        let line = text.lines().find(|line| line.starts_with(start));
        line.and_then(|line| line.rsplit(' ').next()?.parse().ok()).unwrap_or(0)
    }

    /// Waits for a condition.
    pub async fn until(&self, what: &str, condition: impl AsyncFn(&Self) -> bool) {
        let started = Instant::now();
        while !condition(self).await {
            assert!(started.elapsed() < PATIENCE, "never {what}:\n{}", self.log());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Sends a signal by name.
    pub fn signal(&self, name: &str) {
        signal(self.pid(), name);
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The CPU time that it has used, in seconds, to the hundredth.
    pub fn cpu_seconds(&self) -> f64 {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id())).expect("it runs");
        let rest = stat.rsplit_once(") ").map_or("", |(_, rest)| rest);
        // User and system time, in ticks of a hundredth.
        rest.split(' ').skip(11).take(2).map(|ticks| ticks.parse::<f64>().expect("a number") / 100.0).sum()
    }

    /// The most memory that it ever had, in bytes.
    pub fn memory_peak(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).expect("it runs");
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB"));
        peak.and_then(|peak| peak.parse::<u64>().ok()).expect("the kernel says") * 1024
    }

    /// Waits for its end.
    pub async fn ended(&mut self) -> ExitStatus {
        let started = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().expect("it is ours to wait for") {
                return status;
            }
            assert!(started.elapsed() < PATIENCE, "it never ended:\n{}", self.log());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

impl Drop for App {
    fn drop(&mut self) {
        // Gone already, perhaps.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            let _ = writeln!(std::io::stderr(), "--- log of the service\n{}", self.log());
        }
    }
}

/// The configuration with what this binary gives ([`crate::GIVEN`]) where it says nothing of that.
fn given(config: &str) -> String {
    let mut text = config.to_owned();
    for (section, key, value) in crate::GIVEN {
        let start = format!("{section}: {{");
        let says = |line: &str| line.trim_start().starts_with(&start) && !line.contains(&format!(" {key}:"));
        if text.lines().any(says) {
            text = text.replacen(&start, &format!("{start} {key}: {value},"), 1);
        }
    }
    text
}

/// Sends a signal by name.
pub fn signal(pid: u32, name: &str) {
    let sent = Command::new("kill").args([format!("-{name}"), pid.to_string()]).status();
    assert!(sent.expect("kill runs").success());
}

/// Runs a command of the program with this configuration, whatever comes of it.
pub fn command(config: &str, args: &[&str]) -> Output {
    let dir = tempfile::tempdir().expect("a folder can be made");
    let file = dir.path().join("config.yaml");
    std::fs::write(&file, given(config)).expect("the configuration can be written");
    let mut command = Command::new(env!("CARGO_BIN_EXE_cache-aside"));
    command.args(args).arg("--config").arg(&file).output().expect("it runs")
}

/// Installs what the configuration needs in its database.
pub fn migrate(config: &str) {
    let done = command(config, &["migrate"]);
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
}

static PREFIXES: AtomicU64 = AtomicU64::new(0);

/// A database and a key prefix of a test's own, on servers that all tests share.
pub struct World {
    pub database: Database,
    pub redis_url: String,
    pub prefix: String,
    /// What else `cache:` has.
    pub cache_more: String,
    /// What `invalidation:` has where a story says nothing of it.
    pub invalidation: &'static str,
}

impl World {
    /// A new database with this schema.
    pub async fn new(schema: &str) -> Self {
        let database = Postgres::shared().await.create_database().await;
        database.client().await.batch_execute(schema).await.expect("the schema is sound");
        let prefix = format!("t{}-{}:", std::process::id(), PREFIXES.fetch_add(1, Ordering::Relaxed));
        let redis_url = Redis::shared().await.url();
        Self { database, redis_url, prefix, cache_more: String::new(), invalidation: "" }
    }

    /// The same, for services that read changes from the log, not from triggers.
    pub async fn decoding(schema: &str) -> Self {
        Self { invalidation: "mode: wal", ..Self::new(schema).await }
    }

    /// The same, for stories of which reads are hits, wherever else the machine is busy: nothing is distrusted soon.
    pub async fn trusting(schema: &str) -> Self {
        Self { invalidation: "max_staleness: 10s", ..Self::new(schema).await }
    }

    /// The same with another cache.
    pub fn on(self, redis: &Redis) -> Self {
        Self { redis_url: redis.url(), ..self }
    }

    /// A configuration that uses both; `rest` holds the resources and all else.
    pub fn config(&self, rest: &str) -> String {
        let mut config = String::new();
        let more = &self.cache_more;
        let _ = write!(
            config,
            "database: {{ url: \"{}\" }}\ncache: {{ url: \"{}\", key_prefix: \"{}\"{more} }}\n",
            self.database.url, self.redis_url, self.prefix
        );
        if !rest.contains("access:") {
            config.push_str("access: { write: public, refresh: public, admin: public }\n");
        }
        if !self.invalidation.is_empty() && !rest.contains("invalidation:") {
            let _ = writeln!(config, "invalidation: {{ {} }}", self.invalidation);
        }
        config + rest
    }

    pub async fn app(&self, rest: &str) -> App {
        App::start(&self.config(rest)).await
    }

    /// Runs SQL beside the service.
    pub async fn sql(&self, sql: &str) {
        self.database.client().await.batch_execute(sql).await.expect("the statement is sound");
    }

    /// Waits until a query gives true.
    pub async fn until(&self, sql: &str) {
        let client = self.database.client().await;
        let started = Instant::now();
        while !client.query_one(sql, &[]).await.expect("one row comes").get::<_, bool>(0) {
            assert!(started.elapsed() < PATIENCE, "never true: {sql}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// One text out of the database.
    pub async fn text(&self, sql: &str) -> String {
        self.database.client().await.query_one(sql, &[]).await.expect("one row comes").get(0)
    }
}
