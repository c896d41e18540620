//! A lane against a checkout: the same GETs of the same key, by requests that share one multiplexed connection and by
//! requests that check a connection out of the pool each time. Prints ratios of one run; absolute numbers are the
//! machine's. `cargo bench`, with `redis-server` installed.

#![allow(clippy::expect_used, clippy::panic, missing_docs, reason = "a benchmark that cannot go on says why and ends")]

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use cache_aside::cache::entry;
use cache_aside::cache::redis::RedisCache;
use cache_aside::cache::{Cache, Fill, Lease, Lookup, Place};
use cache_aside::config::{Config, Env};
use deadpool_redis::{Manager, Pool};

const READS: usize = 40_000;
const ROUNDS: usize = 5;
const PLACE: Place<'static> = Place {
    key: "bench:1",
    resource: "bench",
    shape: 1,
    groups: &[],
    local_ttl: Duration::ZERO,
    refreshes: 0,
    strict: false,
};

struct Server(Child, u16);

impl Server {
    fn start() -> Self {
        let port = std::net::TcpListener::bind("127.0.0.1:0")
            .and_then(|socket| socket.local_addr())
            .expect("a port is free")
            .port();
        let child = Command::new("redis-server")
            .args(["--port", &port.to_string(), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"])
            .stdout(Stdio::null())
            .spawn()
            .expect("redis-server is installed");
        Self(child, port)
    }

    /// Processor time that the server has used, in clock ticks of 10 ms.
    fn ticks(&self) -> u64 {
        ticks(&self.0.id().to_string())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It is a child of ours, and nothing in it is worth keeping.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn ticks(process: &str) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).expect("Linux says what a process used");
    let fields: Vec<&str> = stat.rsplit(") ").next().unwrap_or_default().split(' ').collect();
    fields[11..13].iter().map(|field| field.parse::<u64>().expect("it is a number")).sum()
}

/// What a number of reads cost.
#[derive(Clone, Copy, Default)]
struct Cost {
    elapsed: Duration,
    ours: u64,
    server: u64,
}

async fn measure<F: Future<Output = ()> + Send + 'static>(
    server: &Server,
    tasks: usize,
    read: impl Fn() -> F + Clone + Send + 'static,
) -> Cost {
    let (started, ours, theirs) = (Instant::now(), ticks("self"), server.ticks());
    let running: Vec<_> = (0..tasks)
        .map(|_| {
            let read = read.clone();
            tokio::spawn(async move {
                for _ in 0..READS / tasks {
                    read().await;
                }
            })
        })
        .collect();
    for task in running {
        task.await.expect("no read fails");
    }
    Cost { elapsed: started.elapsed(), ours: ticks("self") - ours, server: server.ticks() - theirs }
}

fn median(mut costs: Vec<Cost>) -> Cost {
    costs.sort_by_key(|cost| cost.elapsed);
    costs[costs.len() / 2]
}

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let server = Server::start();
    let url = format!("redis://127.0.0.1:{}", server.1);
    let text = format!(
        "database: {{ url: \"sqlite::memory:\" }}\nresources: {{ a: {{}} }}\ncache: {{ url: \"{url}\", timeout: 5s }}"
    );
    let config = Config::from_yaml(&text, "bench", &Env::default()).expect("it is sound");
    let cache = RedisCache::new(&config.cache, None, false).expect("the URL is sound");
    while cache.health().is_err() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let payload = bytes::Bytes::from(vec![b'x'; 200]);
    let lease = cache.lease(&[PLACE], Duration::from_secs(5)).await.expect("it answers").remove(0);
    let Lease::Fill { ticket, .. } = lease else { panic!("the key is new") };
    let (ttl, grace) = (Duration::from_hours(1), Duration::ZERO);
    let fill = Fill {
        etag: entry::etag(&payload),
        payload,
        negative: false,
        truncated: false,
        ttl,
        grace,
        cost: Duration::ZERO,
        origin: 0,
    };
    cache.fill(&[(PLACE, ticket, fill)]).await.expect("it answers");
    let manager = Manager::new(url.as_str()).expect("the URL is sound");
    let pool = Pool::builder(manager).max_size(16).build().expect("a pool can be made");

    println!("{READS} reads of 200 bytes, median of {ROUNDS} alternating rounds; higher is worse for the checkout\n");
    println!("concurrency   time    our CPU   Redis' CPU   (checkout / lane)");
    for tasks in [1, 16, 64] {
        let (mut lanes, mut checkouts) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            let cache = cache.clone();
            lanes.push(
                measure(&server, tasks, move || {
                    let cache = cache.clone();
                    async move {
                        let found = cache.read(PLACE).await.expect("it answers");
                        assert!(matches!(found, Lookup::Fresh(_)));
                    }
                })
                .await,
            );
            let pool = pool.clone();
            checkouts.push(
                measure(&server, tasks, move || {
                    let pool = pool.clone();
                    async move {
                        let mut connection = pool.get().await.expect("it answers");
                        let value: bytes::Bytes =
                            redis::cmd("GET").arg(PLACE.key).query_async(&mut connection).await.expect("it answers");
                        assert!(value.len() > 200);
                    }
                })
                .await,
            );
        }
        let (lane, checkout) = (median(lanes), median(checkouts));
        #[expect(clippy::cast_precision_loss, reason = "ticks are few")]
        let ratio = |checkout: u64, lane: u64| checkout as f64 / lane.max(1) as f64;
        println!(
            "{tasks:>11}   {:>4.1}   {:>7.1}   {:>10.1}",
            checkout.elapsed.as_secs_f64() / lane.elapsed.as_secs_f64(),
            ratio(checkout.ours, lane.ours),
            ratio(checkout.server, lane.server),
        );
    }
}
