//! Users with ULIDs, cached for ten seconds: create, read, read again, rename.
//!
//! `cargo run --example users`; with `REDIS_URL` set (and the feature `redis`) the cache is that server.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use cache_aside::{CacheAside, Entries};
use serde::{Deserialize, Serialize};
use ulid::Ulid;

#[derive(Clone, Debug, Serialize, Deserialize)]
struct User {
    name: String,
}

/// The program's own table, some milliseconds away.
#[derive(Clone, Default)]
struct Users(Arc<Mutex<HashMap<Ulid, User>>>);

impl Users {
    async fn find(self, ids: Vec<Ulid>) -> Result<HashMap<Ulid, User>, std::io::Error> {
        println!("{:24}the table is asked for {} user(s)", "", ids.len());
        tokio::time::sleep(Duration::from_millis(20)).await;
        let table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(ids.into_iter().filter_map(|id| Some((id, table.get(&id)?.clone()))).collect())
    }

    fn save(&self, id: Ulid, name: &str) {
        let user = User { name: name.into() };
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(id, user);
    }
}

#[tokio::main]
async fn main() -> cache_aside::Result<()> {
    let url = std::env::var("REDIS_URL").unwrap_or_else(|_| "memory:".into());
    let cache = CacheAside::builder().url(url).key_prefix("example:").build().await?;
    let table = Users::default();
    let users = cache.entries::<Ulid, User>("users").ttl(Duration::from_secs(10)).loader({
        let table = table.clone();
        move |ids| table.clone().find(ids)
    });

    let id = Ulid::new();
    table.save(id, "Angelica Hill");
    println!("POST /users             created /users/{id}");
    show("GET", &users, id).await?;
    show("GET again", &users, id).await?;

    table.save(id, "Angelica Kern");
    // After the write, and before anybody is told of it.
    users.invalidate(&id).await?;
    println!("PUT /users/…            renamed and invalidated");
    show("GET", &users, id).await?;
    show("GET again", &users, id).await?;

    let nobody = Ulid::new();
    show("GET of nobody", &users, nobody).await?;
    show("GET of nobody again", &users, nobody).await?;

    let others: Vec<Ulid> = ["Tobias", "Ines", "Jonas"]
        .iter()
        .map(|name| {
            let id = Ulid::new();
            table.save(id, name);
            id
        })
        .collect();
    let all = users.get_many(&[&[id], others.as_slice()].concat()).await?;
    println!(
        "GET of four             {} found: one of them was cached, the rest is one call",
        all.iter().flatten().count()
    );
    cache.close().await
}

async fn show(what: &str, users: &Entries<Ulid, User>, id: Ulid) -> cache_aside::Result<()> {
    let found = users.fetch(&id).await?;
    let name = found.value.as_ref().map_or("not found", |user| &user.name);
    println!("{what:24}{name} ({})", found.status);
    Ok(())
}
