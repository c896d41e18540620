//! A loader for anything that is slow, costs money or is down now and then; here, the weather.
//!
//! `cargo run --example own_loader`; with `REDIS_URL` set (and the feature `redis`) the cache is that server.

use std::error::Error as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use cache_aside::CacheAside;

#[derive(Clone, Default)]
struct Weather {
    calls: Arc<AtomicU32>,
    down: Arc<AtomicBool>,
}

impl Weather {
    /// One call for any number of cities, one answer for each.
    async fn of(self, cities: Vec<String>) -> Result<Vec<Option<String>>, String> {
        self.calls.fetch_add(1, Ordering::Relaxed);
        tokio::time::sleep(Duration::from_millis(20)).await;
        if self.down.load(Ordering::Relaxed) {
            return Err("the weather service does not answer".into());
        }
        let known = |city: &String| ["Graz", "Linz", "Wien"].contains(&city.as_str());
        Ok(cities.iter().map(|city| known(city).then(|| format!("{city}: fair"))).collect())
    }

    fn calls(&self) -> u32 {
        self.calls.swap(0, Ordering::Relaxed)
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let url = std::env::var("REDIS_URL").unwrap_or_else(|_| "memory:".into());
    let cache = CacheAside::builder().url(url).key_prefix(format!("example-{}:", ulid::Ulid::new())).build().await?;
    let weather = Weather::default();
    let reports = cache
        .entries::<String, String>("weather")
        .ttl(Duration::from_millis(300))
        .stale_if_error(Duration::from_mins(10))
        .loader({
            let weather = weather.clone();
            move |cities| weather.clone().of(cities)
        });

    let readers = (0..100).map(|_| {
        let reports = reports.clone();
        tokio::spawn(async move { reports.get("Graz").await })
    });
    for reader in readers.collect::<Vec<_>>() {
        reader.await??;
    }
    println!("100 readers at once: {} call(s)", weather.calls());

    let cities = ["Linz", "Graz", "Atlantis", "Wien"].map(String::from);
    let found = reports.get_many(&cities).await?;
    println!("4 cities: {found:?}, {} call(s) for what was missing", weather.calls());

    weather.down.store(true, Ordering::Relaxed);
    while reports.cached("Graz").await.is_ok() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let stale = reports.fetch("Graz").await?;
    println!("past its TTL, the service down: {:?} ({})", stale.value, stale.status);

    reports.invalidate("Graz").await?;
    match reports.get("Graz").await {
        Err(error) => println!(
            "invalidated, the service down: {error}; its source: {:?}",
            error.source().map(ToString::to_string)
        ),
        Ok(found) => println!("this should not be: {found:?}"),
    }

    weather.down.store(false, Ordering::Relaxed);
    println!("the service is back: {:?}", reports.get("Graz").await?);
    cache.close().await?;
    Ok(())
}
