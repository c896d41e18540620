//! What two settings cost and save, as ratios within one run: `local_hot_ttl` for one hot row, and `compress_above` for a
//! large list. CPU per read of the service and of Redis, bytes that Redis sends per read, bytes that it holds. `make hot`.

#![allow(unreachable_pub, dead_code, reason = "modules of the stories")]
#![allow(clippy::expect_used, clippy::panic, missing_docs, reason = "a benchmark that cannot go on says why and ends")]

/// Nothing: services run as they do for others.
const GIVEN: [(&str, &str, &str); 0] = [];

#[path = "../tests/it/app.rs"]
mod app;
#[path = "../tests/it/servers.rs"]
mod servers;

use std::time::{Duration, Instant};

use app::App;
use servers::{Postgres, Redis};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Both settings take turns, so that what else the machine does hurts both.
const TURNS: usize = 5;
const TURN: Duration = Duration::from_secs(3);
const CLIENTS: usize = 16;

const SCHEMA: &str = "
    CREATE TABLE item (id int PRIMARY KEY, team_id int, sku uuid, name text, price numeric(8, 2), quantity int, description text, changed timestamptz);
    INSERT INTO item SELECT g, 1, md5(g::text)::uuid, 'item ' || g, (g * 37 % 9973) / 100.0, g * 13 % 500,
        (SELECT string_agg((ARRAY['organic','fresh','dark','green','whole','apple','juice','bread','honey','olive','salt','mint'])[1 + (hashint4(g * 40 + w) & 2147483647) % 12], ' ') FROM generate_series(1, 12) w),
        timestamptz '2026-01-01' + g * interval '7919 s' FROM generate_series(1, 130) g;";

/// What was used so far.
#[derive(Clone, Copy, Default)]
struct Used {
    reads: f64,
    /// Seconds.
    service: f64,
    redis: f64,
    sent: f64,
}

impl Used {
    fn each(self, more: Self, change: impl Fn(f64, f64) -> f64) -> Self {
        Self {
            reads: change(self.reads, more.reads),
            service: change(self.service, more.service),
            redis: change(self.redis, more.redis),
            sent: change(self.sent, more.sent),
        }
    }
}

async fn used(app: &App, redis: &Redis) -> Used {
    let info: String = redis::cmd("INFO").query_async(&mut redis.client().await).await.expect("it answers");
    let field = |name: &str| -> f64 {
        let line = info.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.and_then(|number| number.trim().parse().ok()).unwrap_or_else(|| panic!("no {name}"))
    };
    let cpu = field("used_cpu_user") + field("used_cpu_sys");
    Used { reads: 0.0, service: app.cpu_seconds(), redis: cpu, sent: field("total_net_output_bytes") }
}

/// Reads over one connection until the time is over; how many.
async fn reader(address: String, path: String, until: Instant) -> u32 {
    let mut stream = TcpStream::connect(address).await.expect("it accepts");
    let request = format!("GET {path} HTTP/1.1\r\nhost: bench\r\n\r\n");
    let (mut buffer, mut reads) = (Vec::with_capacity(1 << 17), 0);
    while Instant::now() < until {
        stream.write_all(request.as_bytes()).await.expect("it listens");
        buffer.clear();
        let mut whole = usize::MAX;
        while buffer.len() < whole {
            assert!(stream.read_buf(&mut buffer).await.expect("it answers") > 0, "it hung up");
            if whole == usize::MAX
                && let Some(end) = buffer.windows(4).position(|four| four == b"\r\n\r\n")
            {
                let head = String::from_utf8_lossy(&buffer[..end]).to_lowercase();
                assert!(head.starts_with("http/1.1 200"), "{head}");
                let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")?.parse::<usize>().ok());
                whole = end + 4 + length.expect("it says how much");
            }
        }
        reads += 1;
    }
    reads
}

async fn turn(app: &App, redis: &Redis, path: &str) -> Used {
    let before = used(app, redis).await;
    let until = Instant::now() + TURN;
    let address = app.url.trim_start_matches("http://").to_owned();
    let readers = (0..CLIENTS).map(|_| tokio::spawn(reader(address.clone(), path.to_owned(), until)));
    let mut reads = 0;
    for reader in readers.collect::<Vec<_>>() {
        reads += reader.await.expect("no reader panics");
    }
    let after = used(app, redis).await;
    Used { reads: f64::from(reads), ..after.each(before, |after, before| after - before) }
}

/// Compares a service with and without a setting; prints one line of the table.
async fn compare(what: &str, path: &str, configs: [String; 2], tier: [&str; 2]) {
    let redis = Redis::start().await;
    let postgres = Postgres::start().await;
    let database = postgres.create_database().await;
    database.client().await.batch_execute(SCHEMA).await.expect("the data is sound");
    let place = |config: &str, prefix: &str| {
        format!(
            "database: {{ url: \"{}\" }}\nserver: {{ listen: \"127.0.0.1:0\", drain_delay: 0s }}\n{}",
            database.url,
            config.replace("cache: {", &format!("cache: {{ url: \"{}\", key_prefix: \"{prefix}:\",", redis.url()))
        )
    };
    let apps = [App::start(&place(&configs[0], "without")).await, App::start(&place(&configs[1], "with")).await];
    let mut sums = [Used::default(); 2];
    for turn_number in 0..=TURNS {
        for (index, app) in apps.iter().enumerate() {
            let hits =
                format!("cache_aside_requests_total{{resource=\"item\",result=\"hit\",tier=\"{}\"}}", tier[index]);
            let before = app.metric(&hits).await;
            let used = turn(app, &redis, path).await;
            #[expect(clippy::cast_precision_loss, reason = "a count of reads")]
            let share = (app.metric(&hits).await - before) as f64 / used.reads;
            // The first turn warms both.
            if turn_number > 0 {
                assert!(share > 0.9, "{share} of the reads are from the tier {}", tier[index]);
                sums[index] = sums[index].each(used, |sum, more| sum + more);
            }
        }
    }
    let mut held = Vec::new();
    for prefix in ["without", "with"] {
        let key = path.trim_start_matches("/api/").replace("item/", "item:");
        let length: f64 = redis::cmd("STRLEN")
            .arg(format!("{prefix}:{key}"))
            .query_async(&mut redis.client().await)
            .await
            .expect("it answers");
        held.push(length);
    }
    let [without, with] = sums;
    let ratio = |of: fn(&Used) -> f64| (of(&with) / with.reads) / (of(&without) / without.reads);
    println!(
        "| {what} | {:.2} | {:.2} | {:.2} | {:.2} | {:.2} |",
        with.reads / without.reads,
        ratio(|used| used.service),
        ratio(|used| used.redis),
        ratio(|used| used.sent),
        held[1] / held[0],
    );
    let micros = |used: Used| (used.service / used.reads * 1e6, used.redis / used.reads * 1e6, used.sent / used.reads);
    eprintln!(
        "  {what}: without {:.1?}, with {:.1?} (µs of the service, of Redis, bytes sent); held {held:?}",
        micros(without),
        micros(with)
    );
}

#[tokio::main]
async fn main() {
    println!(
        "| with the setting, as a ratio to without | reads | CPU per read, service | CPU per read, Redis | bytes from Redis per read | bytes held |"
    );
    println!("| --- | --- | --- | --- | --- | --- |");
    let resources = |more: &str| format!("resources: {{ item: {{ {more}lists: {{ team_id: {{}} }} }} }}\n");
    let (plain, hot) = (resources(""), resources("local_hot_ttl: 1s, "));
    let cache = "cache: { timeout: 1s }\n";
    let configs = [format!("{cache}{plain}"), format!("{cache}{hot}")];
    compare("a hot row, `local_hot_ttl: 1s`", "/api/item/7", configs, ["shared", "local"]).await;
    let packing = "cache: { timeout: 1s, compress_above: 16KiB }\n";
    let list = "/api/item?team_id=1";
    let configs = [format!("{cache}{plain}"), format!("{packing}{plain}")];
    compare("a list of 31 KB, `compress_above: 16KiB`", list, configs, ["shared"; 2]).await;
    let configs = [format!("{cache}{hot}"), format!("{packing}{hot}")];
    compare("the same list, hot in both", list, configs, ["local"; 2]).await;
}
