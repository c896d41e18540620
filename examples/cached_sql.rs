//! Any SELECT, cached under the SHA-256 of its text and parameters: miss, hit, forced refresh, invalidation, miss.
//!
//! `cargo run --example cached_sql`: SQLite in memory; with `REDIS_URL` set the cache is that server.

use std::time::{Duration, Instant};

use cache_aside::config::{Config, Query as Declared, SecretUrl};
use cache_aside::store::{AnyStore, sqlite::SqliteStore};
use cache_aside::{Database, Query};
use serde::Deserialize;

const SCHEMA: &str = "
    CREATE TABLE airline (airline_id INTEGER PRIMARY KEY, iata TEXT NOT NULL, name TEXT NOT NULL);
    INSERT INTO airline VALUES (1, 'LH', 'Lufthansa'), (2, 'AF', 'Air France'), (3, 'KL', 'KLM');";

#[derive(Debug, Deserialize)]
struct Airline {
    iata: String,
    name: String,
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut config = Config::default();
    config.database.url = SecretUrl::new("sqlite::memory:");
    if let Ok(url) = std::env::var("REDIS_URL") {
        config.cache.url = SecretUrl::new(url);
    }
    // The tables are new at each run.
    config.cache.key_prefix = format!("example-{}:", ulid::Ulid::new());
    let declared = Declared { sql: "SELECT iata, name FROM airline ORDER BY iata".into(), ..Declared::default() };
    config.queries.insert("airlines".into(), declared);
    let store = SqliteStore::new(&config.database)?;
    store.execute(SCHEMA).await?;
    let db = Database::over(config, AnyStore::Sqlite(store)).await?;

    // A query is made anew each time; what makes it the same is its text and its parameters.
    let one = || {
        let sql = "SELECT iata, name FROM airline WHERE airline_id = $1";
        db.query(sql).bind(1).ttl(Duration::from_mins(5))
    };
    println!("key                  {}", one().key()?);
    show("first execution", one()).await?;
    show("second execution", one()).await?;
    show("forced refresh", one().refresh()).await?;
    show("after the refresh", one()).await?;
    one().invalidate().await?;
    println!("invalidated");
    show("after that", one()).await?;

    show("declared statement", db.named("airlines")).await?;
    show("and again", db.named("airlines")).await?;
    match db.query("DELETE FROM airline").get::<Airline>().await {
        Err(error) => println!("what writes          is refused: {error}"),
        Ok(_) => println!("this should not be"),
    }
    db.close().await?;
    Ok(())
}

async fn show(what: &str, query: Query) -> cache_aside::Result<()> {
    let started = Instant::now();
    let found = query.fetch::<Airline>().await?;
    let names: Vec<String> = found.value.iter().map(|airline| format!("{} {}", airline.iata, airline.name)).collect();
    println!("{what:21}{} ({}) in {:.2?}", names.join(", "), found.status, started.elapsed());
    Ok(())
}
