//! Sessions, cached for half an hour: log in, read at every request, change the cart, log out.
//!
//! `cargo run --example sessions`; with `REDIS_URL` set (and the feature `redis`) the cache is that server.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use cache_aside::CacheAside;
use serde::{Deserialize, Serialize};
use ulid::Ulid;

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Session {
    user: String,
    cart: Vec<u32>,
}

type Table = Arc<Mutex<HashMap<String, Session>>>;

#[tokio::main]
async fn main() -> cache_aside::Result<()> {
    let url = std::env::var("REDIS_URL").unwrap_or_else(|_| "memory:".into());
    let cache = CacheAside::builder().url(url).key_prefix("example:").build().await?;
    let table = Table::default();
    let sessions = cache
        .entries::<String, Session>("sessions")
        .ttl(Duration::from_mins(30))
        // Whoever guesses identifiers fills no cache with them.
        .negative_ttl(Duration::ZERO)
        // A session that may have ended is better not served while its table is away.
        .stale_if_error(Duration::ZERO)
        .loader_each({
            let table = table.clone();
            move |id: String| {
                let session = table.lock().unwrap_or_else(PoisonError::into_inner).get(&id).cloned();
                async move { Ok::<_, std::io::Error>(session) }
            }
        });
    let write = |id: &str, session: Option<Session>| {
        let mut table = table.lock().unwrap_or_else(PoisonError::into_inner);
        match session {
            Some(session) => drop(table.insert(id.to_owned(), session)),
            None => drop(table.remove(id)),
        }
    };
    let show = async |what: &str, id: &str| -> cache_aside::Result<()> {
        let found = sessions.fetch(id).await?;
        let session =
            found.value.as_ref().map(|session| format!("{} has {:?} in the cart", session.user, session.cart));
        println!("{what:16}{} ({})", session.as_deref().unwrap_or("nobody is logged in"), found.status);
        Ok(())
    };

    let id = Ulid::new().to_string();
    show("before login", &id).await?;
    write(&id, Some(Session { user: "Ada".into(), cart: vec![1] }));
    sessions.invalidate(&id).await?;
    show("logged in", &id).await?;
    show("next request", &id).await?;

    write(&id, Some(Session { user: "Ada".into(), cart: vec![1, 4] }));
    sessions.invalidate(&id).await?;
    show("cart changed", &id).await?;
    show("next request", &id).await?;

    write(&id, None);
    sessions.invalidate(&id).await?;
    show("logged out", &id).await?;
    cache.close().await
}
