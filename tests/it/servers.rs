//! Real Postgres, MariaDB, Redis and Memcached servers, started by the tests that need them, each on its own port and in its own folder.
//!
//! A test may break its server as it likes (crash it, freeze it, bring it back), so nothing is shared unless asked for
//! with `shared()`. Nothing is left behind either, even if the test process is killed: everything lives in one folder
//! per process, and a shell that outlives us ends what is left in it. Broken networks are in `faults`, not here.
#![allow(dead_code, reason = "which controls are in use depends on the stories, and a harness is read as a whole")]
#![expect(clippy::expect_used, clippy::panic, reason = "a test without its servers ends here, and says why")]
#![expect(unreachable_pub, reason = "one binary: `pub` says what is meant for the stories")]

use std::{
    env,
    fmt::Display,
    fs::{self, File},
    io::{BufRead, BufReader},
    net::{Ipv4Addr, SocketAddr},
    os::{
        fd::{AsFd, OwnedFd},
        unix::{
            fs::{MetadataExt, chown},
            process::CommandExt,
        },
    },
    path::{Path, PathBuf},
    process::{self, Child, Command, Stdio},
    sync::{
        OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use mysql_async::prelude::Queryable;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
    sync::OnceCell,
    task::spawn_blocking,
    time::{sleep, timeout},
};
use tokio_postgres::NoTls;

const START_DEADLINE: Duration = Duration::from_secs(30);
const STOP_DEADLINE: Duration = Duration::from_secs(10);

/// Safe against crashes of the server, not of the machine, and with the log that logical decoding needs.
///
/// `synchronous_commit` stays on: without `fsync` it costs nothing, and off would let [`Postgres::kill`] lose what was
/// committed in the last half second. `mmap` keeps dynamic shared memory in the data folder; elsewhere it would outlive
/// a killed server.
const POSTGRES_SETTINGS: [&str; 11] = [
    "listen_addresses=127.0.0.1",
    "unix_socket_directories=",
    "max_connections=100",
    "fsync=off",
    "full_page_writes=off",
    "wal_level=logical",
    "max_replication_slots=50",
    "max_wal_senders=50",
    "timezone=UTC",
    "log_timezone=UTC",
    "dynamic_shared_memory_type=mmap",
];

/// A Postgres server with one superuser, `postgres`, and no passwords.
pub struct Postgres {
    server: Server,
}

impl Postgres {
    pub async fn start() -> Self {
        Self::start_with(&[]).await
    }

    /// Starts with further settings, each as `name=value`; they win over ours.
    pub async fn start_with(settings: &[&str]) -> Self {
        static TEMPLATE: OnceCell<PathBuf> = OnceCell::const_new();

        let template = TEMPLATE
            .get_or_init(|| async {
                spawn_blocking(postgres_template).await.expect("initdb should make a data folder")
            })
            .await;
        let mut server = Server::new(Engine::Postgres, &postgres_folder().join("postgres"), postgres_account());
        let data = server.folder.join("data");
        spawn_blocking({
            let (folder, data) = (server.folder.clone(), data.clone());
            move || run_tool(Command::new("cp").arg("-a").arg(template).arg(data), &folder, None)
        })
        .await
        .expect("the data folder should be copied");

        server.args.extend(["-D".to_owned(), data.display().to_string()]);
        for setting in POSTGRES_SETTINGS.iter().chain(settings) {
            server.args.extend(["-c".to_owned(), (*setting).to_owned()]);
        }
        server.start().await;
        Self { server }
    }

    /// A server that follows another one, which it reaches at `primary`, until it is promoted.
    pub async fn standby(primary: SocketAddr) -> Self {
        let mut server = Server::new(Engine::Postgres, &postgres_folder().join("postgres"), postgres_account());
        let data = server.folder.join("data");
        let (folder, account) = (server.folder.clone(), postgres_account());
        spawn_blocking({
            let data = data.clone();
            move || {
                let mut copy = Command::new(postgres_folder().join("pg_basebackup"));
                let (host, port) = (primary.ip().to_string(), primary.port().to_string());
                copy.args(["-h", &host, "-p", &port, "-U", "postgres", "-R", "-X", "stream", "-c", "fast", "-D"]);
                run_tool(copy.arg(data), &folder, account);
            }
        })
        .await
        .expect("the data should be copied");
        server.args.extend(["-D".to_owned(), data.display().to_string()]);
        // Its own readers are never cut off for what it has to catch up with.
        for setting in POSTGRES_SETTINGS.into_iter().chain(["max_standby_streaming_delay=-1"]) {
            server.args.extend(["-c".to_owned(), setting.to_owned()]);
        }
        server.start().await;
        Self { server }
    }

    /// Makes a standby the primary, and waits until it is.
    pub async fn promote(&self) {
        let client = connect(&self.url("postgres")).await.expect("a standby accepts readers");
        client.query("SELECT pg_promote(true, 30)", &[]).await.expect("it can be promoted");
    }

    /// The one server of this test process, for tests that need only their own database and break nothing.
    pub async fn shared() -> &'static Self {
        static SHARED: OnceCell<Postgres> = OnceCell::const_new();
        SHARED.get_or_init(Self::start).await
    }

    pub async fn create_database(&self) -> Database {
        static NEXT: AtomicU64 = AtomicU64::new(1);

        let name = format!("test_{}", NEXT.fetch_add(1, Ordering::Relaxed));
        let admin = connect(&self.url("postgres")).await.expect("the server should be running");
        admin.batch_execute(&format!("CREATE DATABASE {name}")).await.expect("the database should be created");
        Database { url: self.url(&name), name, port: self.port() }
    }

    pub fn url(&self, database: &str) -> String {
        postgres_url(self.port(), database)
    }

    pub fn port(&self) -> u16 {
        self.server.port.number
    }

    /// Crashes the server with all its sessions; what was committed is there after [`start_again`](Self::start_again).
    pub async fn kill(&mut self) {
        self.server.kill().await;
    }

    /// Starts with the same port and data, and waits for the recovery; a server that still runs crashes first.
    pub async fn start_again(&mut self) {
        self.server.start_again().await;
    }

    /// Stops the server as an operator would, copies its data, and starts it again.
    pub async fn back_up(&mut self) -> PathBuf {
        self.server.terminate().await;
        let (data, copy) = (self.server.folder.join("data"), self.server.folder.join("copy"));
        self.copy_folder(&data, &copy).await;
        self.server.start_again().await;
        copy
    }

    /// Puts a copy in place of the data, as after a disaster, with the server stopped in good order.
    pub async fn put_back(&mut self, copy: &Path) {
        self.server.terminate().await;
        let data = self.server.folder.join("data");
        fs::remove_dir_all(&data).expect("the data can be removed");
        self.copy_folder(copy, &data).await;
        self.server.start_again().await;
    }

    async fn copy_folder(&self, from: &Path, to: &Path) {
        let (from, to, folder) = (from.to_owned(), to.to_owned(), self.server.folder.clone());
        let copying = spawn_blocking(move || run_tool(Command::new("cp").arg("-a").arg(from).arg(to), &folder, None));
        copying.await.expect("the data should be copied");
    }

    /// Freezes the server with all its sessions: the kernel still accepts connections, nobody answers them.
    pub fn pause(&self) {
        self.server.pause();
    }

    pub fn resume(&self) {
        self.server.resume();
    }
}

/// A database of a test's own; it goes when its server goes.
#[derive(Clone)]
pub struct Database {
    pub url: String,
    pub name: String,
    pub port: u16,
}

impl Database {
    pub async fn client(&self) -> tokio_postgres::Client {
        connect(&self.url).await.expect("the database should accept a connection")
    }
}

/// Safe against crashes of the server, not of the machine; small, and without what a package's configuration may say.
const MARIADB_SETTINGS: [&str; 9] = [
    "--bind-address=127.0.0.1",
    "--skip-name-resolve",
    "--innodb-flush-log-at-trx-commit=2",
    "--innodb-buffer-pool-size=64M",
    "--innodb-log-file-size=16M",
    "--performance-schema=OFF",
    "--max-connections=500",
    "--character-set-server=utf8mb4",
    "--init-file=init.sql",
];

/// A MariaDB server with one account that may do everything, `tester`, and no passwords.
pub struct Mariadb {
    server: Server,
}

impl Mariadb {
    pub async fn start() -> Self {
        Self::start_with(&[]).await
    }

    /// Starts with further settings, each as `--name=value`; they win over ours.
    pub async fn start_with(settings: &[&str]) -> Self {
        static TEMPLATE: OnceCell<PathBuf> = OnceCell::const_new();

        let template = TEMPLATE
            .get_or_init(|| async { spawn_blocking(mariadb_template).await.expect("a data folder can be made") })
            .await;
        let mut server = Server::new(Engine::Mariadb, &mariadb_program("mariadbd"), account("mysql"));
        let data = server.folder.join("data");
        spawn_blocking({
            let (folder, data) = (server.folder.clone(), data.clone());
            move || run_tool(Command::new("cp").arg("-a").arg(template).arg(data), &folder, None)
        })
        .await
        .expect("the data folder should be copied");
        let init = server.folder.join("init.sql");
        let script = "CREATE USER IF NOT EXISTS tester@'127.0.0.1';\n\
                      GRANT ALL ON *.* TO tester@'127.0.0.1' WITH GRANT OPTION;\n";
        fs::write(&init, script).expect("a file can be written");
        server.args.extend(["--no-defaults".to_owned(), format!("--datadir={}", data.display())]);
        server.args.push(format!("--socket={}", server.folder.join("socket").display()));
        server.args.push(format!("--pid-file={}", server.folder.join("mariadbd.pid").display()));
        // A server that starts deletes whatever another one has left in a folder for temporary files, or has there now.
        server.args.push(format!("--tmpdir={}", data.display()));
        for setting in MARIADB_SETTINGS.iter().chain(settings) {
            server.args.push(setting.replace("init.sql", &init.display().to_string()));
        }
        server.start().await;
        Self { server }
    }

    /// The one server of this test process, for tests that need only their own database and break nothing.
    pub async fn shared() -> &'static Self {
        static SHARED: OnceCell<Mariadb> = OnceCell::const_new();
        SHARED.get_or_init(Self::start).await
    }

    pub async fn create_database(&self) -> MariadbDatabase {
        static NEXT: AtomicU64 = AtomicU64::new(1);

        let name = format!("test_{}", NEXT.fetch_add(1, Ordering::Relaxed));
        let database = MariadbDatabase { url: self.url(&name), name };
        let mut admin = connect_mariadb(&self.url("")).await.expect("the server should be running");
        admin.query_drop(format!("CREATE DATABASE {}", database.name)).await.expect("the database can be created");
        database
    }

    pub fn url(&self, database: &str) -> String {
        mariadb_url(self.server.port.number, database)
    }

    pub fn port(&self) -> u16 {
        self.server.port.number
    }

    /// Crashes the server with all its sessions; what was committed is there after [`start_again`](Self::start_again).
    pub async fn kill(&mut self) {
        self.server.kill().await;
    }

    /// Starts with the same port and data; a server that still runs crashes first.
    pub async fn start_again(&mut self) {
        self.server.start_again().await;
    }

    pub fn pause(&self) {
        self.server.pause();
    }

    pub fn resume(&self) {
        self.server.resume();
    }
}

/// A database of a test's own; it goes when its server goes.
pub struct MariadbDatabase {
    pub url: String,
    pub name: String,
}

impl MariadbDatabase {
    pub async fn client(&self) -> mysql_async::Conn {
        connect_mariadb(&self.url).await.expect("the database should accept a connection")
    }

    /// Runs one or several statements.
    pub async fn sql(&self, sql: &str) {
        self.client().await.query_drop(sql).await.unwrap_or_else(|error| panic!("{error}: {sql}"));
    }
}

/// Whose program speaks the protocol of Redis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Redis,
    Valkey,
}

impl Kind {
    fn program(self) -> PathBuf {
        match self {
            Self::Redis => {
                find("redis-server").unwrap_or_else(|| panic!("redis-server not found: apt-get install redis-server"))
            }
            Self::Valkey => {
                let ours = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/servers/valkey-server");
                let found = find("valkey-server").or_else(|| Some(ours).filter(|program| program.is_file()));
                found.unwrap_or_else(|| panic!("valkey-server not found: make servers"))
            }
        }
    }

    fn scheme(self) -> &'static str {
        match self {
            Self::Redis => "redis",
            Self::Valkey => "valkey",
        }
    }
}

/// A Redis server that keeps nothing on disk, or one that speaks as it does.
pub struct Redis {
    server: Server,
    kind: Kind,
}

impl Redis {
    pub async fn start() -> Self {
        Self::start_with(&[]).await
    }

    /// Starts with further arguments, such as `["--maxmemory", "1mb"]`; they win over ours.
    pub async fn start_with(args: &[&str]) -> Self {
        Self::start_as(Kind::Redis, args).await
    }

    /// The same for any kind.
    pub async fn start_as(kind: Kind, args: &[&str]) -> Self {
        let mut server = Server::new(Engine::Redis, &kind.program(), None);
        let ours = ["--bind", "127.0.0.1", "--save", "", "--appendonly", "no"];
        server.args.extend(ours.iter().chain(args).map(|&arg| arg.to_owned()));
        server.start().await;
        Self { server, kind }
    }

    /// A server that speaks TLS alone, on its one port.
    pub async fn start_encrypted(kind: Kind, args: &[&str]) -> Self {
        let mut server = Server::new(Engine::EncryptedRedis, &kind.program(), None);
        let ours = ["--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--port", "0"];
        server.args.extend(ours.iter().chain(args).map(|&arg| arg.to_owned()));
        server.start().await;
        Self { server, kind }
    }

    /// The one server of this test process, for tests that keep to their own keys and break nothing.
    pub async fn shared() -> &'static Self {
        static SHARED: OnceCell<Redis> = OnceCell::const_new();
        SHARED.get_or_init(Self::start).await
    }

    /// A Sentinel that watches the master at this port, called `main`. It gives a master that says nothing for `patience`
    /// milliseconds up, if `quorum` Sentinels do.
    pub async fn sentinel(master: u16, quorum: u32, patience: u32) -> Self {
        let mut server = Server::new(Engine::Redis, &Kind::Redis.program(), None);
        let file = server.folder.join("sentinel.conf");
        let text = format!(
            "bind 127.0.0.1\nsentinel monitor main 127.0.0.1 {master} {quorum}\n\
             sentinel down-after-milliseconds main {patience}\nsentinel failover-timeout main 3000\n"
        );
        fs::write(&file, text).expect("the configuration can be written");
        server.args.extend([file.display().to_string(), "--sentinel".to_owned()]);
        server.start().await;
        Self { server, kind: Kind::Redis }
    }

    pub fn url(&self) -> String {
        format!("{}://127.0.0.1:{}", self.kind.scheme(), self.port())
    }

    pub fn port(&self) -> u16 {
        self.server.port.number
    }

    pub async fn kill(&mut self) {
        self.server.kill().await;
    }

    /// A client beside the service.
    pub async fn client(&self) -> redis::aio::MultiplexedConnection {
        let client = redis::Client::open(self.url()).expect("the URL is sound");
        // Saving a dump takes as long as the disk does.
        let patient = redis::AsyncConnectionConfig::new()
            .set_connection_timeout(Some(START_DEADLINE))
            .set_response_timeout(Some(START_DEADLINE));
        client
            .get_multiplexed_async_connection_with_config(&patient)
            .await
            .expect("the server should accept a connection")
    }

    /// Ends the server as an operator would, by SIGTERM, and waits until it is gone.
    pub async fn stop_gracefully(&mut self) {
        self.server.terminate().await;
    }

    /// Starts empty on the same port; a server that still runs crashes first.
    pub async fn start_again(&mut self) {
        self.server.start_again().await;
    }

    /// Freezes the server: the kernel still accepts connections, nobody answers them.
    pub fn pause(&self) {
        self.server.pause();
    }

    pub fn resume(&self) {
        self.server.resume();
    }
}

/// A Memcached server.
pub struct Memcached {
    server: Server,
}

impl Memcached {
    pub async fn start() -> Self {
        Self::start_with(&[]).await
    }

    /// Starts with further arguments, such as `["-m", "2"]`; they win over ours.
    pub async fn start_with(args: &[&str]) -> Self {
        let program = find("memcached").unwrap_or_else(|| panic!("memcached not found: apt-get install memcached"));
        let mut server = Server::new(Engine::Memcached, &program, None);
        // As root it insists on being told who it is to be.
        let ours = ["-u", "root", "-l", "127.0.0.1", "-U", "0"];
        server.args.extend(ours.iter().chain(args).map(|&arg| arg.to_owned()));
        server.start().await;
        Self { server }
    }

    /// The one server of this test process, for tests that keep to their own keys and break nothing.
    pub async fn shared() -> &'static Self {
        static SHARED: OnceCell<Memcached> = OnceCell::const_new();
        SHARED.get_or_init(Self::start).await
    }

    pub fn url(&self) -> String {
        format!("memcached://127.0.0.1:{}", self.port())
    }

    pub fn port(&self) -> u16 {
        self.server.port.number
    }

    /// Says something to the server beside the service, and answers what it says until a line that starts with `last`.
    pub async fn say(&self, words: &[u8], last: &str) -> String {
        let mut stream =
            TcpStream::connect(loopback(self.port())).await.expect("the server should accept a connection");
        stream.write_all(words).await.expect("the server should listen");
        let mut said = Vec::new();
        loop {
            let read = timeout(START_DEADLINE, stream.read_buf(&mut said)).await.expect("the server should answer");
            assert!(read.expect("the server should answer") > 0, "it hung up: {}", String::from_utf8_lossy(&said));
            let text = String::from_utf8_lossy(&said);
            if text.lines().any(|line| line.starts_with(last)) && text.ends_with("\r\n") {
                return text.into_owned();
            }
        }
    }

    pub async fn kill(&mut self) {
        self.server.kill().await;
    }

    /// Starts empty on the same port; a server that still runs crashes first.
    pub async fn start_again(&mut self) {
        self.server.start_again().await;
    }

    /// Freezes the server: the kernel still accepts connections, nobody answers them.
    pub fn pause(&self) {
        self.server.pause();
    }

    pub fn resume(&self) {
        self.server.resume();
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Engine {
    Postgres,
    Mariadb,
    Redis,
    EncryptedRedis,
    Memcached,
}

/// A server process, its port and its folder: what both engines have in common.
struct Server {
    engine: Engine,
    program: PathBuf,
    args: Vec<String>,
    account: Option<Account>,
    folder: PathBuf,
    port: Port,
    child: Option<Child>,
}

impl Server {
    fn new(engine: Engine, program: &Path, account: Option<Account>) -> Self {
        Self {
            engine,
            program: program.to_owned(),
            args: Vec::new(),
            account,
            folder: new_folder(account),
            port: Port::reserve(),
            child: None,
        }
    }

    /// A reserved port should be ours, but a program that insists on a fixed one can still come in between.
    async fn start(&mut self) {
        for _ in 0..5 {
            match self.run_until_it_answers().await {
                Ok(()) => return,
                Err(why) if why.contains("Address already in use") => self.port = Port::reserve(),
                Err(why) => panic!("{why}"),
            }
        }
        panic!("{} found five ports taken in a row", self.program.display());
    }

    async fn start_again(&mut self) {
        self.kill().await;
        if let Err(why) = self.run_until_it_answers().await {
            panic!("{why}");
        }
    }

    async fn run_until_it_answers(&mut self) -> Result<(), String> {
        let port_option = match self.engine {
            Engine::Postgres | Engine::Memcached => "-p",
            Engine::Mariadb | Engine::Redis => "--port",
            Engine::EncryptedRedis => "--tls-port",
        };
        let mut command = server_in(&self.folder, &self.program, self.account);
        command.args(&self.args).arg(port_option).arg(self.port.number.to_string());
        self.child = Some(command.spawn().expect("a shell should start"));

        let deadline = Instant::now() + START_DEADLINE;
        loop {
            let ended = self.child.as_mut().and_then(|child| child.try_wait().ok().flatten());
            if let Some(status) = ended {
                self.kill().await;
                return Err(self.complaint(&format!("ended with {status}")));
            }
            match timeout(Duration::from_secs(5), self.answer()).await {
                Ok(Ok(())) => return Ok(()),
                Ok(Err(why)) if Instant::now() > deadline => return Err(self.complaint(&why)),
                Err(_) if Instant::now() > deadline => return Err(self.complaint("does not answer")),
                _ => sleep(Duration::from_millis(20)).await,
            }
        }
    }

    async fn answer(&self) -> Result<(), String> {
        match self.engine {
            Engine::Postgres => {
                let client = connect(&postgres_url(self.port.number, "postgres")).await.map_err(text)?;
                client.simple_query("SELECT 1").await.map_err(text)?;
                Ok(())
            }
            Engine::EncryptedRedis => {
                let stream = TcpStream::connect(loopback(self.port.number)).await.map_err(text)?;
                stream.writable().await.map_err(text)?;
                stream.try_write(b"PING\r\n").map_err(text)?;
                stream.readable().await.map_err(text)?;
                // Whatever it says to that, or if it hangs up: somebody is there.
                Ok(())
            }
            Engine::Mariadb => {
                let mut client = connect_mariadb(&mariadb_url(self.port.number, "")).await.map_err(text)?;
                client.query_drop("SELECT 1").await.map_err(text)
            }
            Engine::Redis => {
                let stream = TcpStream::connect(loopback(self.port.number)).await.map_err(text)?;
                stream.writable().await.map_err(text)?;
                stream.try_write(b"PING\r\n").map_err(text)?;
                stream.readable().await.map_err(text)?;
                let mut answer = [0; 128];
                let length = stream.try_read(&mut answer).map_err(text)?;
                match &answer[..length] {
                    // A wish for a password is an answer too.
                    [b'+', ..] => Ok(()),
                    other if other.starts_with(b"-NOAUTH") => Ok(()),
                    other => Err(String::from_utf8_lossy(other).into_owned()),
                }
            }
            Engine::Memcached => {
                let mut stream = TcpStream::connect(loopback(self.port.number)).await.map_err(text)?;
                stream.write_all(b"mn\r\n").await.map_err(text)?;
                let mut answer = [0; 4];
                stream.read_exact(&mut answer).await.map_err(text)?;
                if answer == *b"MN\r\n" { Ok(()) } else { Err(String::from_utf8_lossy(&answer).into_owned()) }
            }
        }
    }

    fn complaint(&self, why: &str) -> String {
        let log = fs::read_to_string(self.folder.join("log")).unwrap_or_default();
        format!("{} on port {}: {why}; its log:\n{log}", self.program.display(), self.port.number)
    }

    async fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            // What has no children to be found first dies without standing still for that long.
            if self.engine != Engine::Postgres {
                let _ = child.kill();
            }
            let folder = self.folder.clone();
            spawn_blocking(move || end(child, &folder)).await.expect("a server should die");
        }
    }

    async fn terminate(&mut self) {
        self.signal("thaw");
        // To Postgres TERM means to wait until everybody has gone.
        self.signal(match self.engine {
            Engine::Postgres => "kill -s INT",
            Engine::Mariadb | Engine::Redis | Engine::EncryptedRedis | Engine::Memcached => "kill -s TERM",
        });
        let deadline = Instant::now() + STOP_DEADLINE;
        while self.child.as_mut().is_some_and(|child| matches!(child.try_wait(), Ok(None))) {
            assert!(Instant::now() < deadline, "{}", self.complaint("did not stop"));
            sleep(Duration::from_millis(5)).await;
        }
        self.kill().await;
    }

    fn pause(&self) {
        self.signal("freeze");
    }

    fn resume(&self) {
        self.signal("thaw");
    }

    fn signal(&self, verb: &str) {
        let child = self.child.as_ref().expect("the server should be running");
        let mut shell = shell(&format!("{verb} \"$1\""));
        shell.arg(child.id().to_string()).status().expect("a shell should start");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(child) = self.child.take() {
            end(child, &self.folder);
        }
        // What resists is left to the watcher.
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// A port of 127.0.0.1 that stays ours while its server is down.
///
/// Otherwise another test could be given the same number, or a client that keeps trying an absent server could be given
/// it as its own end and then talk to itself. So we hold it with a socket that never listens: bound alone, and only then
/// open to sharing, which Linux grants to a server that asks for `SO_REUSEADDR` as ours do, but to no automatic choice.
struct Port {
    number: u16,
    _held: TcpSocket,
}

impl Port {
    /// The bus of a Redis cluster takes the port ten thousand above.
    const HIGHEST: u16 = u16::MAX - 10_000;

    fn reserve() -> Self {
        loop {
            let socket = TcpSocket::new_v4().expect("a socket should open");
            socket.bind(loopback(0)).expect("a port should be free");
            let number = socket.local_addr().expect("a bound socket has an address").port();
            if number <= Self::HIGHEST {
                socket.set_reuseaddr(true).expect("a port can be shared");
                return Self { number, _held: socket };
            }
        }
    }
}

/// The folder of this process, and the shell that clears it when the process is gone, however it went.
///
/// The shell waits for the end of a pipe that only we and our tools hold. A parent-death signal would not do: it comes when the starting
/// *thread* ends, so the first test to ask would take the shared server with it.
struct Nest {
    folder: PathBuf,
    watcher: Child,
}

impl Nest {
    fn get() -> &'static Self {
        static NEST: OnceLock<Nest> = OnceLock::new();
        NEST.get_or_init(|| {
            let mut watcher = shell("watch \"$1\"")
                .arg(process::id().to_string())
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                // Ctrl-C ends the tests, not the one who cleans up after them.
                .process_group(0)
                .spawn()
                .expect("a shell should start");
            let mut folder = String::new();
            BufReader::new(watcher.stdout.take().expect("the watcher has an output"))
                .read_line(&mut folder)
                .expect("the watcher should name the folder it made");
            let folder = PathBuf::from(folder.trim_end_matches('\n'));
            assert!(folder.is_dir(), "no folder could be made in {}", env::temp_dir().display());
            Self { folder, watcher }
        })
    }

    /// Another hold on the watcher's pipe: it waits for this one too.
    fn pipe(&self) -> OwnedFd {
        let pipe = self.watcher.stdin.as_ref().expect("the watcher has a pipe");
        pipe.as_fd().try_clone_to_owned().expect("a pipe can be held twice")
    }
}

/// What Rust has no safe call for, and what has to work without us.
///
/// Postgres's processes each lead a group of their own, so a signal to the server's group reaches only the first of
/// them: they are found as its children. The first is stopped before they are listed, so that it starts no more, and
/// killed after them, so that none is still writing when it is gone.
const SHELL: &str = r#"
children() { grep -lxs "PPid:[[:space:]]*$1" /proc/[0-9]*/status | cut -d/ -f3; }
is() { grep -qs "^State:[[:space:]]*[$2]" "/proc/$1/status"; }
freeze() {
    while kill -s STOP "$1"; is "$1" RSD; do sleep 0.01; done
    for child in $(children "$1"); do kill -s STOP "$child"; done
}
thaw() {
    for child in $(children "$1"); do kill -s CONT "$child"; done
    kill -s CONT "$1"
}
end() {
    freeze "$1"
    for child in $(children "$1"); do
        kill -s KILL "$child"
        while is "$child" RSDTtI; do sleep 0.01; done
    done
    kill -s KILL -- "-$1"
    # A killed Postgres leaves a System V segment, whose number is the last word of its lock file's seventh line.
    lock="$2/data/postmaster.pid"
    segment=$(sed -n '7s/.* //p' "$lock") && ipcrm -m "$segment"
    rm -f "$lock" "$2/pid"
}
watch() {
    trap '' HUP INT TERM PIPE
    # Not the shell's PPID: we may be gone before it asks.
    tests=$1
    # Made here, so that there is no folder without its watcher; a server under another account has to pass through.
    set -- "$(mktemp -d "${TMPDIR:-/tmp}/cache-aside-it-XXXXXX")"
    chmod 711 "$1"
    echo "$1"
    cat >/dev/null
    # While a process goes, the kernel wakes the stopped groups it leaves behind: wait until we have another parent.
    while grep -qxs "PPid:[[:space:]]*$tests" "/proc/$$/status"; do sleep 0.01; done
    tries=0
    while [ -e "$1" ] && [ "$tries" -lt 100 ]; do
        for file in "$1"/*/pid; do read -r pid <"$file" && end "$pid" "${file%/pid}"; done
        rm -rf "$1" || sleep 0.1
        tries=$((tries + 1))
    done
}
"#;

fn shell(script: &str) -> Command {
    let mut command = Command::new("sh");
    command.arg("-c").arg(format!("{SHELL}\n{script}")).arg("sh");
    command.current_dir("/").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command
}

/// A server that writes its number into its folder before it starts, so that the watcher never misses one: a folder
/// already cleared refuses the file, and the server does not start.
fn server_in(folder: &Path, program: &Path, account: Option<Account>) -> Command {
    let mut command = Command::new("sh");
    command.args(["-c", r#"echo $$ >pid && exec "$@""#, "sh"]).arg(program);
    let log = settle(&mut command, folder, account);
    command.stdout(log);
    command
}

/// Runs a tool to its end.
///
/// What it prints goes into the watcher's pipe, which thus stays open until it is done, even without us: `initdb` would
/// leave shared memory behind if it was killed.
fn run_tool(command: &mut Command, folder: &Path, account: Option<Account>) {
    settle(command, folder, account);
    let status = command.stdout(Nest::get().pipe()).status();
    let status = status.unwrap_or_else(|error| panic!("{}: {error}", command.get_program().display()));
    let log = fs::read_to_string(folder.join("log")).unwrap_or_default();
    assert!(status.success(), "{} {status}:\n{log}", command.get_program().display());
}

/// Ties a command to its folder and account, in a group of its own; returns the log its complaints go to.
fn settle(command: &mut Command, folder: &Path, account: Option<Account>) -> File {
    let log = File::create(folder.join("log")).expect("a log should be writable");
    command
        .current_dir(folder)
        .env("LC_ALL", "C")
        .env("TZ", "UTC")
        .stdin(Stdio::null())
        .stderr(log.try_clone().expect("a log should be writable"))
        .process_group(0);
    if let Some(Account { user, group }) = account {
        command.uid(user).gid(group);
    }
    log
}

/// Kills a server with all its children and waits until they are gone; also called while a test unwinds.
fn end(mut child: Child, folder: &Path) {
    let _ = shell("end \"$1\" \"$2\"").arg(child.id().to_string()).arg(folder).status();
    let _ = child.kill();
    let _ = child.wait();
}

fn new_folder(account: Option<Account>) -> PathBuf {
    static NEXT: AtomicU64 = AtomicU64::new(1);

    let folder = Nest::get().folder.join(NEXT.fetch_add(1, Ordering::Relaxed).to_string());
    fs::create_dir(&folder).expect("a folder should be made");
    if let Some(Account { user, group }) = account {
        chown(&folder, Some(user), Some(group)).expect("root can give a folder away");
    }
    folder
}

/// Runs `initdb`, which takes a second or two: once per process, the servers start from copies.
fn postgres_template() -> PathBuf {
    let account = postgres_account();
    let folder = new_folder(account);
    let data = folder.join("data");
    let options = ["--auth=trust", "--username=postgres", "--encoding=UTF8", "--locale=C", "--no-sync", "-D"];
    let mut initdb = Command::new(postgres_folder().join("initdb"));
    run_tool(initdb.args(options).arg(&data), &folder, account);
    data
}

/// Runs `mariadb-install-db`, which takes some seconds: once per process, the servers start from copies.
fn mariadb_template() -> PathBuf {
    let account = account("mysql");
    let folder = new_folder(account);
    let data = folder.join("data");
    let mut install = Command::new(mariadb_program("mariadb-install-db"));
    install.args(["--no-defaults", "--auth-root-authentication-method=normal", "--skip-test-db"]);
    install.args(["--innodb-log-file-size=16M", "--innodb-flush-log-at-trx-commit=0"]);
    run_tool(install.arg(format!("--datadir={}", data.display())), &folder, account);
    data
}

/// Debian puts the server where only root looks.
fn mariadb_program(name: &str) -> PathBuf {
    let elsewhere = ["/usr/sbin", "/usr/bin"].map(|folder| Path::new(folder).join(name));
    find(name)
        .or_else(|| elsewhere.into_iter().find(|candidate| candidate.is_file()))
        .unwrap_or_else(|| panic!("{name} not found: apt-get install mariadb-server"))
}

/// Debian keeps the server programs of each version out of `PATH`; whoever puts some there has chosen.
fn postgres_folder() -> PathBuf {
    // A link to it leads to where all the others are.
    if let Some(program) = find("initdb").and_then(|program| program.canonicalize().ok()) {
        let folder = program.parent().expect("a program is in a folder").to_owned();
        if folder.join("postgres").exists() {
            return folder;
        }
    }
    let versions = fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    versions
        .filter_map(|version| Some((version.file_name().to_str()?.parse::<u32>().ok()?, version.path().join("bin"))))
        .filter(|(_, folder)| folder.join("initdb").exists() && folder.join("postgres").exists())
        .max()
        .map_or_else(|| panic!("postgres not found: apt-get install postgresql"), |(_, folder)| folder)
}

fn find(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH")?;
    env::split_paths(&path).map(|folder| folder.join(program)).find(|candidate| candidate.is_file())
}

#[derive(Clone, Copy)]
struct Account {
    user: u32,
    group: u32,
}

/// Postgres refuses to run as root, so root runs it as `postgres`; anybody else as themselves.
fn postgres_account() -> Option<Account> {
    account("postgres")
}

/// The servers' own accounts, for root; anybody else runs them as themselves.
fn account(name: &str) -> Option<Account> {
    let we_are_root = fs::metadata("/proc/self").is_ok_and(|us| us.uid() == 0);
    we_are_root.then(|| {
        let accounts = fs::read_to_string("/etc/passwd").expect("the accounts should be readable");
        let mut fields = accounts
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
            .unwrap_or_else(|| panic!("a server must not run as root, and there is no user {name}: make servers"))
            .split(':')
            .skip(1)
            .map(|field| field.parse().expect("an account has numbers"));
        let mut next = || fields.next().expect("an account has a user and a group");
        Account { user: next(), group: next() }
    })
}

async fn connect(url: &str) -> Result<tokio_postgres::Client, tokio_postgres::Error> {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await?;
    // It ends with the client, or with an error that the client's next query reports.
    tokio::spawn(connection);
    Ok(client)
}

async fn connect_mariadb(url: &str) -> Result<mysql_async::Conn, mysql_async::Error> {
    let opts = mysql_async::OptsBuilder::from_opts(mysql_async::Opts::from_url(url)?).prefer_socket(false);
    mysql_async::Conn::new(opts).await
}

fn mariadb_url(port: u16, database: &str) -> String {
    format!("mysql://tester@127.0.0.1:{port}/{database}")
}

fn postgres_url(port: u16, database: &str) -> String {
    format!("postgres://postgres@127.0.0.1:{port}/{database}")
}

fn loopback(port: u16) -> SocketAddr {
    SocketAddr::from((Ipv4Addr::LOCALHOST, port))
}

fn text(error: impl Display) -> String {
    error.to_string()
}
