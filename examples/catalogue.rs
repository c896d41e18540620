//! A product catalogue in a database: products for two hours, lists by category for one; a write drops what it changed.
//!
//! `cargo run --example catalogue`: SQLite in memory; with `REDIS_URL` set the cache is that server.

use std::collections::BTreeMap;
use std::time::Duration;

use cache_aside::config::{Config, List, Resource, SecretUrl, WriteKind};
use cache_aside::store::{AnyStore, sqlite::SqliteStore};
use cache_aside::{Database, Table};
use serde::{Deserialize, Serialize};

const SCHEMA: &str = "
    CREATE TABLE products (id INTEGER PRIMARY KEY, category_id INTEGER NOT NULL, name TEXT NOT NULL, price DECIMAL(10, 2));
    INSERT INTO products VALUES (1, 1, 'Apple', 0.35), (2, 1, 'Orange', 0.60), (3, 2, 'Carrot', 0.20);";

#[derive(Debug, Serialize, Deserialize)]
struct Product {
    id: i64,
    category_id: i64,
    name: String,
    price: f64,
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
    let by_category = List { ttl: Some(Duration::from_hours(1)), order_by: Some("name".into()), ..List::default() };
    let products = Resource {
        ttl: Some(Duration::from_hours(2)),
        lists: BTreeMap::from([("category_id".into(), by_category)]),
        write: vec![WriteKind::Create, WriteKind::Update],
        ..Resource::default()
    };
    config.resources.insert("products".into(), products);

    // A database of one's own would be there already: `Database::open(config)`.
    let store = SqliteStore::new(&config.database)?;
    store.execute(SCHEMA).await?;
    let db = Database::over(config, AnyStore::Sqlite(store)).await?;
    let products = db.table::<i64, Product>("products");

    product(&products, 2).await?;
    product(&products, 2).await?;
    category(&products, 1).await?;
    category(&products, 1).await?;
    category(&products, 2).await?;

    let moved = products.merge(&2, &serde_json::json!({ "category_id": 2 })).await?;
    println!(
        "moved       {} to category {}: the product and both lists are invalidated",
        moved.row.name, moved.row.category_id
    );
    product(&products, 2).await?;
    category(&products, 1).await?;
    category(&products, 2).await?;

    let pear = Product { id: 4, category_id: 1, name: "Pear".into(), price: 0.45 };
    products.create(&pear).await?;
    println!("created     {}", pear.name);
    category(&products, 1).await?;
    category(&products, 2).await?;
    let some = products.get_many(&[1, 99, 4]).await?;
    println!(
        "1, 99, 4    {:?}",
        some.iter().map(|found| found.as_ref().map(|product| product.name.as_str())).collect::<Vec<_>>()
    );
    db.close().await?;
    Ok(())
}

async fn product(products: &Table<i64, Product>, id: i64) -> cache_aside::Result<()> {
    let found = products.fetch(&id).await?;
    println!("product {id}   {} ({})", found.value.as_ref().map_or("none", |product| &product.name), found.status);
    Ok(())
}

async fn category(products: &Table<i64, Product>, id: i64) -> cache_aside::Result<()> {
    let found = products.fetch_list("category_id", &id).await?;
    let names: Vec<&str> = found.value.iter().map(|product| product.name.as_str()).collect();
    println!("category {id}  {} ({})", names.join(", "), found.status);
    Ok(())
}
