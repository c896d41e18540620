//! The statements of `docs/walkthrough.md` on the demo's airline tables, scaled up in PostgreSQL, with Redis in front: what
//! an answer from the database takes through the API, and what the cached one takes. `make walkthrough`.

#![allow(unreachable_pub, dead_code, reason = "modules of the stories")]
#![allow(clippy::expect_used, clippy::panic, missing_docs, reason = "a benchmark that cannot go on says why and ends")]

/// Nothing: services run as they do for others.
const GIVEN: [(&str, &str, &str); 0] = [];

#[path = "../tests/it/app.rs"]
mod app;
#[path = "../tests/it/servers.rs"]
mod servers;

use std::time::{Duration, Instant};

use app::{App, Reply};
use servers::{Postgres, Redis};

const ROUNDS: usize = 300;

/// The demo's five airlines, four airports, eight flights and twelve bookings, times 20, 1,000, 1,000 and 10,000.
const SCALE: &str = "
    ALTER TABLE booking ALTER price TYPE numeric(10, 2);
    INSERT INTO airline SELECT g, 'X' || g, 'Airline ' || g FROM generate_series(6, 100) g;
    INSERT INTO airport SELECT g, 'X' || g, 'Airport ' || g FROM generate_series(5, 4000) g;
    INSERT INTO flight SELECT g, 'XX' || g, 1 + g % 100, 1 + (g * 7) % 4 + 4 * (g % 3) * (g % 333), 1 + (g * 13) % 4000,
                              timestamp '2026-07-01' + g * interval '1 minute' FROM generate_series(9, 8000) g;
    INSERT INTO booking SELECT g, 1 + (g * 17) % 8000, (g % 30) || 'A', 40 + (g * 31) % 600 FROM generate_series(13, 120000) g;
    ANALYZE;";

fn statement(name: &str) -> String {
    let docs = include_str!("../docs/walkthrough.md");
    let line = docs.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix("='"));
    line.and_then(|line| line.strip_suffix('\'')).expect("the docs have it").to_owned()
}

async fn ask(app: &App, body: &str) -> (Reply, Duration) {
    let began = Instant::now();
    let reply = app.post("/api/query", body).await.expect(200);
    (reply, began.elapsed())
}

fn median(mut all: Vec<Duration>) -> f64 {
    all.sort_unstable();
    all[all.len() / 2].as_secs_f64() * 1000.0
}

#[tokio::main]
async fn main() {
    let (postgres, redis) = (Postgres::start().await, Redis::start().await);
    let database = postgres.create_database().await;
    let demo = include_str!("../src/demo/demo.sql");
    database.client().await.batch_execute(&format!("{demo}{SCALE}")).await.expect("the data is sound");
    let config = format!(
        "database: {{ url: \"{}\", statement_timeout: 30s }}\ncache: {{ url: \"{}\", timeout: 5s }}\n\
         server: {{ listen: \"127.0.0.1:0\", request_timeout: 60s, drain_delay: 0s }}\naccess: {{ adhoc_queries: public, refresh: public, admin: public }}\nresources: {{ airline: {{}} }}\n",
        database.url,
        redis.url()
    );
    let app = App::start(&config).await;
    let mut table = String::from(
        "| statement | tables | database, median | cache, median | times faster |\n| --- | --- | --- | --- | --- |\n",
    );
    for (name, tables) in [("simple", 1), ("medium", 3), ("advanced", 4)] {
        let body = statement(name);
        let refresh = format!("{},\"refresh\":true}}", body.strip_suffix('}').expect("an object"));
        println!("{name}");
        let steps = [("miss", &body), ("hit", &body), ("forced refresh", &refresh)];
        app.until("cached", async |app| ask(app, &body).await.0.source() == "cache").await;
        app.ask(reqwest::Method::DELETE, "/admin/cache/query").json(&body).send().await.expect(204);
        for (step, body) in steps {
            let (reply, took) = ask(&app, body).await;
            println!(
                "  {step:<15} {:<10} {:>9.2} ms   {}",
                reply.source(),
                took.as_secs_f64() * 1000.0,
                reply.header("cache-status")
            );
        }
        app.ask(reqwest::Method::DELETE, "/admin/cache/query").json(&body).send().await.expect(204);
        println!("  invalidated");
        let (reply, took) = ask(&app, &body).await;
        println!(
            "  {:<15} {:<10} {:>9.2} ms   {}",
            "miss",
            reply.source(),
            took.as_secs_f64() * 1000.0,
            reply.header("cache-status")
        );
        let (mut database, mut cache) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            let (reply, took) = ask(&app, &refresh).await;
            assert_eq!(reply.source(), "database");
            database.push(took);
            let (reply, took) = ask(&app, &body).await;
            // A machine that is busy elsewhere may bring a read past the cache: it counts for neither.
            if reply.source() == "cache" {
                cache.push(took);
            }
        }
        assert!(cache.len() > ROUNDS / 2, "the cache was hardly in use");
        let (slow, fast) = (median(database), median(cache));
        let line = format!("| {name} | {tables} | {slow:.2} ms | {fast:.2} ms | {:.1} |\n", slow / fast);
        table.push_str(&line);
    }
    println!("\n{table}");
}
