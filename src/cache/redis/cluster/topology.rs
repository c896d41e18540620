//! Which nodes make up a cluster, and which of them holds what: asked of all that are known, again and again.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use anyhow::Context;
use arc_swap::ArcSwap;
use futures_util::future::join_all;
use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, Client, Pipeline, RedisResult, Value};
use tokio::sync::{Notify, watch};

use super::super::RedisCache;
use super::super::sentinel::{Address, addresses};
use super::super::shared::{Door, Member as Place, Shared, shared_by_many, text};
use crate::cache::lane::OWED_MAX;
use crate::cache::slots::{self, Slots};
use crate::catalog::Mapping;
use crate::config;

/// Between two questions.
const PAUSE: Duration = Duration::from_millis(500);
/// Between two questions that somebody cannot wait for.
const SOON: Duration = Duration::from_millis(20);
/// The most that one node may take to answer.
const PATIENCE: Duration = Duration::from_millis(500);
/// Where nodes listen unless the URL says otherwise.
const PORT: u16 = 6379;
/// The place of a slot that nobody holds.
const NOBODY: u16 = u16::MAX;

static NUMBERS: AtomicU64 = AtomicU64::new(1);

/// What all handles on a cluster have in common.
pub(in crate::cache::redis) struct Cluster {
    config: config::Cache,
    max_staleness: Option<Duration>,
    tiered: bool,
    door: Door,
    seeds: Vec<Address>,
    topology: ArcSwap<Topology>,
    /// Counts answers to the question who is there.
    turns: watch::Sender<u64>,
    /// Connections for questions.
    links: Mutex<HashMap<Address, MultiplexedConnection>>,
    mappings: Mutex<HashMap<String, Mapping>>,
    /// Invalidations of keys whose slot nobody holds, each with whether a writer may hold it; `None`: of too many.
    homeless: Mutex<Option<HashMap<String, bool>>>,
    again: Notify,
    /// Until when the database is taken not to answer.
    away: Arc<AtomicU64>,
}

/// Who is there.
#[derive(Default)]
pub(super) struct Topology {
    pub(super) members: Vec<Arc<Member>>,
    /// By slot: the place of its holder among the members.
    owners: Vec<u16>,
    found: Found,
}

/// A node that holds slots. One that comes to have other keys of its own is another member.
pub(super) struct Member {
    /// No other member of this process has it.
    pub(super) number: u64,
    address: Address,
    elected: u16,
    pub(super) cache: RedisCache,
}

/// What a node says of the cluster.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Found {
    held: BTreeMap<Address, Slots>,
    others: Vec<Address>,
}

impl Topology {
    /// The place of the member that holds this key's slot.
    pub(super) fn owner(&self, key: &str) -> Option<usize> {
        self.owners
            .get(usize::from(slots::slot(key)))
            .filter(|owner| **owner != NOBODY)
            .map(|owner| usize::from(*owner))
    }

    fn has(&self, number: u64) -> bool {
        self.members.iter().any(|member| member.number == number)
    }
}

impl Cluster {
    /// Starts asking the hosts of `redis+cluster://[user:password@]h1[:port],h2,…`; must be called inside a runtime.
    pub(super) fn open(
        config: &config::Cache,
        max_staleness: Option<Duration>,
        tiered: bool,
    ) -> anyhow::Result<Arc<Self>> {
        let (seeds, url) = split(config.url.expose())?;
        let cluster = Arc::new(Self {
            config: config.clone(),
            max_staleness,
            tiered,
            door: Door::new(config, &url)?,
            seeds,
            topology: ArcSwap::default(),
            turns: watch::Sender::new(0),
            links: Mutex::default(),
            mappings: Mutex::default(),
            homeless: Mutex::new(Some(HashMap::new())),
            again: Notify::new(),
            away: Arc::default(),
        });
        tokio::spawn(Self::watch(Arc::downgrade(&cluster)));
        Ok(cluster)
    }

    pub(super) fn topology(&self) -> Arc<Topology> {
        self.topology.load_full()
    }

    pub(super) fn timeout(&self) -> Duration {
        self.config.timeout
    }

    /// Tells of every answer to the question who is there.
    pub(super) fn turns(&self) -> watch::Receiver<u64> {
        self.turns.subscribe()
    }

    /// Asks who is there as soon as may be.
    pub(in crate::cache::redis) fn look_again(&self) {
        self.again.notify_one();
    }

    /// What all members cache from now on, present and future ones.
    pub(super) fn declare(&self, mappings: HashMap<String, Mapping>) {
        // Under the lock, so that a member that is made meanwhile is told of the newer ones.
        let mut declared = self.mappings.lock().unwrap_or_else(PoisonError::into_inner);
        self.topology.load().members.iter().for_each(|member| member.cache.declare(mappings.clone()));
        *declared = mappings;
    }

    async fn watch(cluster: Weak<Self>) {
        let mut failing = false;
        loop {
            let Some(strong) = cluster.upgrade() else { return };
            match strong.discover().await {
                Ok(found) => match strong.apply(found) {
                    Ok(()) => failing = false,
                    Err(error) => tracing::error!(%error, "a node of the cluster can't be used"),
                },
                Err(error) if !failing => {
                    failing = true;
                    tracing::warn!(%error, "who makes up the cluster is not known; trying again");
                }
                Err(error) => tracing::debug!(%error, "who makes up the cluster is not known"),
            }
            strong.turns.send_modify(|turns| *turns += 1);
            tokio::time::sleep(SOON).await;
            tokio::select! {
                () = strong.again.notified() => {}
                () = tokio::time::sleep(PAUSE) => {}
            }
        }
    }

    /// Asks everybody but who was cut off from most of the others. Nodes hear of changes one after another: whose word about
    /// the others fits best what they say of themselves is believed, and among equals who knows of the latest change.
    async fn discover(&self) -> anyhow::Result<Found> {
        let topology = self.topology.load_full();
        let known: Vec<Address> = topology.found.held.keys().chain(&topology.found.others).cloned().collect();
        let mut asked = known;
        asked.extend(self.seeds.iter().cloned());
        asked.sort();
        asked.dedup();
        self.links.lock().unwrap_or_else(PoisonError::into_inner).retain(|address, _| asked.contains(address));
        let answers = join_all(asked.iter().map(|address| self.ask_one(address))).await;
        let mut last = anyhow::anyhow!("no node answers");
        let mut said: Vec<(&Address, u64, Found)> = Vec::new();
        for (address, answer) in asked.iter().zip(answers) {
            match answer {
                Ok((epoch, found)) => said.push((address, epoch, found)),
                Err(error) => last = error,
            }
        }
        let agreed =
            |found: &Found| said.iter().filter(|(who, _, own)| own.held.get(*who) == found.held.get(*who)).count();
        let best = said.iter().max_by_key(|(_, epoch, found)| (agreed(found), *epoch));
        best.map(|(.., found)| found.clone()).ok_or(last)
    }

    /// What one node knows, and how new that is.
    async fn ask_one(&self, address: &Address) -> anyhow::Result<(u64, Found)> {
        let asked = async {
            let mut link = self.link(address).await?;
            let mut pipe = Pipeline::new();
            pipe.cmd("CLUSTER").arg("INFO").cmd("CLUSTER").arg("SLOTS");
            let replies: RedisResult<(Value, Vec<Vec<Value>>)> = pipe.query_async(&mut link).await;
            if replies.is_err() {
                self.forget(address);
            }
            anyhow::Ok(replies?)
        };
        let (info, ranges) = tokio::time::timeout(PATIENCE * 2, asked).await.context("it took too long")??;
        let info = text(&info).unwrap_or_default();
        let line = |name: &str| info.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim);
        anyhow::ensure!(
            line("cluster_state") == Some("ok"),
            "{}:{} says that the cluster is down",
            address.0,
            address.1
        );
        let epoch = line("cluster_current_epoch").and_then(|epoch| epoch.parse().ok()).unwrap_or(0);
        Ok((epoch, read(&ranges, &address.0).context("CLUSTER SLOTS said something else")?))
    }

    async fn link(&self, address: &Address) -> RedisResult<MultiplexedConnection> {
        let kept = self.links.lock().unwrap_or_else(PoisonError::into_inner).get(address).cloned();
        if let Some(link) = kept {
            return Ok(link);
        }
        let patient =
            AsyncConnectionConfig::new().set_connection_timeout(Some(PATIENCE)).set_response_timeout(Some(PATIENCE));
        let client = Client::open(self.door.to(address).info)?;
        let link = client.get_multiplexed_async_connection_with_config(&patient).await?;
        self.links.lock().unwrap_or_else(PoisonError::into_inner).insert(address.clone(), link.clone());
        Ok(link)
    }

    fn forget(&self, address: &Address) {
        self.links.lock().unwrap_or_else(PoisonError::into_inner).remove(address);
    }

    /// Makes what was found the truth. What was owed to members that have lost a slot is owed to those that have it now.
    fn apply(self: &Arc<Self>, found: Found) -> anyhow::Result<()> {
        let before = self.topology.load_full();
        if before.found == found && !before.members.is_empty() {
            // What failed at a member that had lost the key just then.
            self.rehome(&before, &before);
            return Ok(());
        }
        let mut members = Vec::new();
        let mut owners = vec![NOBODY; usize::from(slots::COUNT)];
        for (address, held) in &found.held {
            let Some(elected) = slots::elect(held) else { continue };
            let same = |member: &&Arc<Member>| member.address == *address && member.elected == elected;
            let member = match before.members.iter().find(same) {
                Some(member) => Arc::clone(member),
                None => Arc::new(self.admit(address, elected, found.held.len())?),
            };
            let place = u16::try_from(members.len())?;
            held.iter().for_each(|slot| owners[usize::from(slot)] = place);
            members.push(member);
        }
        let topology = Arc::new(Topology { members, owners, found });
        // Before anybody reads from the new holders, and once more for what failed meanwhile.
        self.rehome(&before, &topology);
        {
            let declared = self.mappings.lock().unwrap_or_else(PoisonError::into_inner);
            topology.members.iter().for_each(|member| member.cache.declare(declared.clone()));
            self.topology.store(Arc::clone(&topology));
        }
        self.rehome(&before, &topology);
        tracing::info!(nodes = topology.members.len(), "the cluster is known");
        Ok(())
    }

    fn admit(self: &Arc<Self>, address: &Address, elected: u16, nodes: usize) -> anyhow::Result<Member> {
        let away = Arc::clone(&self.away);
        let place = Place { elected, tag: slots::tag(elected), cluster: Arc::downgrade(self), away };
        let shared = Shared::of_cluster(&self.config, self.max_staleness, self.door.to(address), place)?;
        let local = self.tiered.then(|| self.config.local.max_bytes / nodes.max(1));
        Ok(Member {
            number: NUMBERS.fetch_add(1, Ordering::Relaxed),
            address: address.clone(),
            elected,
            cache: RedisCache::over(Arc::new(shared), local),
        })
    }

    /// Hands on what members owe for keys that are not theirs.
    fn rehome(&self, before: &Topology, now: &Topology) {
        let homeless = self.homeless.lock().unwrap_or_else(PoisonError::into_inner).replace(HashMap::new());
        if homeless.is_none() {
            now.members.iter().for_each(|member| member.cache.shared().debts.owe_everything());
        }
        let mut stranded: Vec<(String, bool)> = homeless.unwrap_or_default().into_iter().collect();
        for member in &before.members {
            let stays = now.has(member.number);
            let mine = |key: &str| {
                let own = || now.owner(key).is_some_and(|owner| now.members[owner].number == member.number);
                stays && (shared_by_many(&self.config.key_prefix, key).is_some() || own())
            };
            let disowned = member.cache.shared().debts.disown(mine);
            stranded.extend(disowned.keys);
            if disowned.everything && !stays {
                now.members.iter().for_each(|member| member.cache.shared().debts.owe_everything());
            }
        }
        self.owe(now, stranded);
    }

    /// The same for one member, after something has failed there: if it is no member any more, nobody else would.
    pub(super) fn strand(&self, member: &Member) {
        let now = self.topology.load_full();
        if now.has(member.number) {
            return;
        }
        let disowned = member.cache.shared().debts.disown(|_| false);
        if disowned.everything {
            now.members.iter().for_each(|member| member.cache.shared().debts.owe_everything());
        }
        self.owe(&now, disowned.keys);
    }

    pub(super) fn owe(&self, now: &Topology, keys: Vec<(String, bool)>) {
        for (key, spare) in keys {
            if shared_by_many(&self.config.key_prefix, &key).is_some() {
                now.members.iter().for_each(|member| member.cache.shared().debts.owe(&[&key], spare));
            } else if let Some(owner) = now.owner(&key) {
                now.members[owner].cache.shared().debts.owe(&[&key], spare);
            } else {
                let mut homeless = self.homeless.lock().unwrap_or_else(PoisonError::into_inner);
                if let Some(keys) = homeless.as_mut() {
                    keys.insert(key, spare);
                }
                if homeless.as_ref().is_some_and(|keys| keys.len() > OWED_MAX) {
                    *homeless = None;
                }
            }
        }
    }

    /// Whether this key stands for all nodes: each has a copy of its own.
    pub(super) fn everywhere(&self, key: &str) -> bool {
        shared_by_many(&self.config.key_prefix, key).is_some()
    }

    /// Whether invalidations wait for somebody to hold their slot.
    pub(super) fn has_homeless(&self) -> bool {
        self.homeless.lock().unwrap_or_else(PoisonError::into_inner).as_ref().is_none_or(|keys| !keys.is_empty())
    }
}

/// Takes the URL apart: the hosts, and a URL with the credentials for whatever node is found.
fn split(url: &str) -> anyhow::Result<(Vec<Address>, String)> {
    let (scheme, rest) = url.split_once("://").context("this is no URL")?;
    let (credentials, rest) = match rest.rsplit_once('@') {
        Some((credentials, rest)) => (format!("{credentials}@"), rest),
        None => (String::new(), rest),
    };
    let hosts = rest.trim_end_matches('/');
    anyhow::ensure!(
        !hosts.contains(['/', '?']),
        "after the hosts there is nothing: redis+cluster://h1,h2,h3; a cluster has no numbered databases"
    );
    let scheme = scheme.trim_end_matches("+cluster");
    Ok((addresses(hosts, PORT)?, format!("{scheme}://{credentials}localhost")))
}

/// Reads the answer of `CLUSTER SLOTS`. A node that does not know its own name is the one that was asked.
fn read(ranges: &[Vec<Value>], asked: &str) -> Option<Found> {
    let node = |value: &Value| {
        let Value::Array(parts) = value else { return None };
        let host = match parts.first().and_then(text).filter(|host| !host.is_empty()) {
            // It prefers a host name and has none: its address is among what else is told of it.
            Some(host) if host == "?" => Some(beside(parts.get(3)?, "ip")?),
            host => host,
        };
        let Some(Value::Int(port)) = parts.get(1) else { return None };
        Some((host.unwrap_or_else(|| asked.to_owned()), u16::try_from(*port).ok()?))
    };
    let mut found = Found::default();
    for range in ranges {
        let [Value::Int(first), Value::Int(last), master, replicas @ ..] = range.as_slice() else { return None };
        let held = found.held.entry(node(master)?).or_default();
        held.add(u16::try_from(*first).ok()?, u16::try_from(*last).ok()?);
        found.others.extend(replicas.iter().filter_map(node));
    }
    found.others.sort();
    found.others.dedup();
    Some(found)
}

/// A value beside its name, in a flat list or a map.
fn beside(list: &Value, name: &str) -> Option<String> {
    match list {
        Value::Array(parts) => {
            parts.chunks(2).find(|pair| text(&pair[0]).as_deref() == Some(name)).map(|pair| &pair[1])
        }
        Value::Map(pairs) => pairs.iter().find(|(key, _)| text(key).as_deref() == Some(name)).map(|(_, value)| value),
        _ => None,
    }
    .and_then(text)
}

#[cfg(test)]
mod tests {
    use super::split;

    #[test]
    fn a_url_names_some_of_the_nodes() {
        let (hosts, url) = split("redis+cluster://u:p%40x@h1,h2:1234").unwrap();
        assert_eq!(hosts, [("h1".into(), 6379), ("h2".into(), 1234)]);
        assert_eq!(url, "redis://u:p%40x@localhost");
        assert_eq!(split("rediss+cluster://h1/").unwrap().1, "rediss://localhost");
        for wrong in ["redis+cluster://", "redis+cluster://h1,,h2", "redis+cluster://h/0", "redis+cluster://h:x"] {
            assert!(split(wrong).is_err(), "{wrong}");
        }
    }
}
