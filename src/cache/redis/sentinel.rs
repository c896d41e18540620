//! Which of several Redis servers is the master, as Sentinels say.
//!
//! All of them are asked, again and again, and most of those that answer decide: one that was cut off may name a server that
//! was replaced. Whoever is connected to another server than the one that is named leaves it at the next look.

use std::collections::HashMap;
use std::sync::{Arc, Weak};
use std::time::Duration;

use anyhow::Context;
use arc_swap::ArcSwapOption;
use futures_util::future::join_all;
use redis::{AsyncConnectionConfig, Client};

use super::shared::Shared;

/// Between two questions.
const PAUSE: Duration = Duration::from_millis(500);
/// The most that one Sentinel may take to answer.
const PATIENCE: Duration = Duration::from_millis(500);
/// Where Sentinels listen unless the URL says otherwise.
const PORT: u16 = 26379;

/// A host and a port.
pub(super) type Address = (String, u16);

/// The Sentinels of one master.
pub(super) struct Sentinels {
    name: String,
    hosts: Vec<Address>,
    named: ArcSwapOption<Address>,
}

/// Takes `redis+sentinel://[user:password@]h1[:port],h2,…/master` apart: the Sentinels, and a URL with the credentials for
/// whatever server they name. `None`: it names a server itself.
///
/// # Errors
///
/// A URL without a host or without the master's name.
pub(super) fn split(url: &str) -> anyhow::Result<Option<(Sentinels, String)>> {
    let Some(rest) = url.strip_prefix("redis+sentinel://") else { return Ok(None) };
    let (credentials, rest) = match rest.rsplit_once('@') {
        Some((credentials, rest)) => (format!("{credentials}@"), rest),
        None => (String::new(), rest),
    };
    let (hosts, name) = rest.split_once('/').context("the master's name is missing: redis+sentinel://h1,h2,h3/NAME")?;
    anyhow::ensure!(
        !name.is_empty() && !name.contains(['/', '?']),
        "after the hosts there is the master's name and no more: redis+sentinel://h1,h2,h3/NAME"
    );
    let hosts = addresses(hosts, PORT)?;
    let sentinels = Sentinels { name: name.to_owned(), hosts, named: ArcSwapOption::empty() };
    // The host is never asked: it stands for the one that is named.
    Ok(Some((sentinels, format!("redis://{credentials}localhost"))))
}

/// Hosts with or without a port, between commas.
pub(super) fn addresses(hosts: &str, port: u16) -> anyhow::Result<Vec<Address>> {
    hosts.split(',').map(|host| address(host, port)).collect()
}

fn address(text: &str, default: u16) -> anyhow::Result<Address> {
    // An IPv6 address stands in brackets.
    let (host, port) = match text.rsplit_once(':') {
        Some((host, port)) if !port.contains(']') => {
            (host, port.parse().with_context(|| format!("{port:?} is no port"))?)
        }
        _ => (text, default),
    };
    let host = host.trim_start_matches('[').trim_end_matches(']');
    anyhow::ensure!(!host.is_empty(), "a host is empty: write h1,h2,h3 or h1:port,h2:port");
    Ok((host.to_owned(), port))
}

impl Sentinels {
    /// The server that was named last; asks where none was.
    pub(super) async fn master(&self) -> anyhow::Result<Address> {
        match self.named.load_full() {
            Some(named) => Ok((*named).clone()),
            None => self.ask().await,
        }
    }

    /// Whether this is the server that was named last.
    pub(super) fn name(&self, address: &Address) -> bool {
        self.named.load().as_deref().is_none_or(|named| named == address)
    }

    /// Asks all of them.
    async fn ask(&self) -> anyhow::Result<Address> {
        let answers = join_all(self.hosts.iter().map(|host| self.ask_one(host))).await;
        let mut last = anyhow::anyhow!("no Sentinel answers");
        let mut votes: HashMap<Address, usize> = HashMap::new();
        for answer in answers {
            match answer {
                Ok(named) => *votes.entry(named).or_default() += 1,
                Err(error) => last = error,
            }
        }
        // Where they are divided, nothing changes.
        let before = self.named.load_full();
        let most = votes.into_iter().max_by_key(|(named, votes)| (*votes, before.as_deref() == Some(named)));
        let (named, _) = most.ok_or_else(|| last.context(format!("no Sentinel names the master {:?}", self.name)))?;
        if self.named.load().as_deref() != Some(&named) {
            tracing::info!(master = self.name, address = format!("{}:{}", named.0, named.1), "the master is known");
            self.named.store(Some(Arc::new(named.clone())));
        }
        Ok(named)
    }

    async fn ask_one(&self, (host, port): &Address) -> anyhow::Result<Address> {
        let client = Client::open((host.as_str(), *port))?;
        let config =
            AsyncConnectionConfig::new().set_connection_timeout(Some(PATIENCE)).set_response_timeout(Some(PATIENCE));
        let asked = async {
            let mut conn = client.get_multiplexed_async_connection_with_config(&config).await?;
            let mut ask = redis::cmd("SENTINEL");
            ask.arg("GET-MASTER-ADDR-BY-NAME").arg(&self.name);
            ask.query_async::<Option<Address>>(&mut conn).await
        };
        let named = tokio::time::timeout(PATIENCE * 2, asked).await.context("it took too long")??;
        named.with_context(|| format!("{host}:{port} knows no master {:?}", self.name))
    }

    /// Keeps asking for as long as anybody uses the cache; a change is looked at at once.
    pub(super) async fn watch(shared: Weak<Shared>) {
        loop {
            let Some(strong) = shared.upgrade() else { return };
            let Some(sentinels) = &strong.sentinels else { return };
            let before = sentinels.named.load_full();
            match sentinels.ask().await {
                Ok(named) if before.as_deref().is_some_and(|before| *before != named) => strong.debts.mistrust(),
                Ok(_) => {}
                // Whoever is connected stays so: a cache needs no Sentinel to answer.
                Err(error) => tracing::debug!(%error, "the Sentinels could not be asked"),
            }
            drop(strong);
            tokio::time::sleep(PAUSE).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::split;

    #[test]
    fn a_url_names_sentinels_and_a_master() {
        let (sentinels, url) = split("redis+sentinel://u:p%40x@h1,h2:1234,[::1]:5/main").unwrap().unwrap();
        assert_eq!(url, "redis://u:p%40x@localhost");
        assert_eq!(sentinels.name, "main");
        assert_eq!(sentinels.hosts, [("h1".into(), 26379), ("h2".into(), 1234), ("::1".into(), 5)]);
        assert!(split("redis://h").unwrap().is_none());
        for wrong in [
            "redis+sentinel://h1,h2",
            "redis+sentinel://h1/",
            "redis+sentinel:///m",
            "redis+sentinel://h:x/m",
            "redis+sentinel://h/m/0",
        ] {
            assert!(split(wrong).is_err(), "{wrong}");
        }
    }
}
