//! Keeps what the service believes of its database true: the catalog, and whether it answers at all.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use crate::catalog::{self, Capture, Catalog, Problem, State, TableName};
use crate::config::{Config, InvalidationMode, Query, Resource};
use crate::served::Served;
use crate::store::{AnyStore, Captured, Store, StoreError};

/// Between two looks while something is missing.
const PAUSE: Duration = Duration::from_millis(500);
/// Between two looks whether changes are still captured, when all is well.
const RECHECK: Duration = Duration::from_secs(5);

/// Binds the declared resources, again and again until all are served; and anew whenever a table was not as it was.
pub(super) async fn watch_catalog(served: Served, config: Arc<Config>) {
    let mut before = BTreeMap::new();
    loop {
        let (mut catalog, outage) = look(served.aside.store(), &config).await;
        if outage {
            // The database can't say what has changed, so what was found stands: hits go on.
            keep(&mut catalog, &served.catalog.load(), config.resources.is_empty() && config.queries.is_empty());
        }
        let said: BTreeMap<String, String> = catalog.all().map(|(name, state)| (name.clone(), say(state))).collect();
        for (name, words) in &said {
            if before.get(name) != Some(words) {
                match catalog.resources.get(name).or_else(|| catalog.queries.get(name)) {
                    Some(State::Ready(resource, _)) if resource.capture != Capture::Lacking => {
                        tracing::info!(resource = name, "{words}");
                    }
                    _ => tracing::warn!(resource = name, "{words}"),
                }
            }
        }
        before = said;
        for (name, state) in catalog.all() {
            let capture = match state {
                State::Ready(resource, _) => resource.capture,
                State::Waiting(_) => Capture::Lacking,
            };
            // Where nobody asked for it, there is nothing to tell.
            if config.watermark().is_some() && capture != Capture::Off {
                served.aside.metrics().capture.with_label_values(&[name]).set((capture == Capture::On).into());
            }
        }
        // Before anything of it is served.
        served.aside.declare(catalog.mappings()).await;
        let (ready, complete) = (catalog.is_ready(), catalog.is_complete());
        served.catalog.store(Arc::new(catalog));
        served.health.looked.notify_waiters();
        if ready && complete {
            let again = served.health.look_again.notified();
            if tokio::time::timeout(if config.watermark().is_some() { RECHECK } else { Duration::MAX }, again)
                .await
                .is_ok()
            {
                // Whoever noticed is not alone.
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        } else {
            tokio::time::sleep(PAUSE).await;
        }
    }
}

fn say(state: &State) -> String {
    let problems =
        |problems: &[Problem]| problems.iter().map(|problem| problem.text.as_str()).collect::<Vec<_>>().join("; ");
    match state {
        State::Ready(_, none) if none.is_empty() => "served".into(),
        State::Ready(_, some) => format!("served; {}", problems(some)),
        State::Waiting(some) => format!("not served: {}", problems(some)),
    }
}

/// Puts what was served before back in place of what could not be looked at.
fn keep(catalog: &mut Catalog, before: &Catalog, discovered: bool) {
    if discovered && !before.resources.is_empty() {
        *catalog = before.clone();
        return;
    }
    for (now, before) in [(&mut catalog.resources, &before.resources), (&mut catalog.queries, &before.queries)] {
        for (name, state) in now {
            if let (State::Waiting(_), Some(ready @ State::Ready(..))) = (&*state, before.get(name)) {
                *state = ready.clone();
            }
        }
    }
}

/// Holds all declared resources against the database; without a declaration, everything that has a primary key. Also says
/// whether the database failed to answer, so that the result tells nothing of what could not be looked at.
pub async fn look(store: &AnyStore, config: &Config) -> (Catalog, bool) {
    let mut resources = BTreeMap::new();
    let found;
    let declared = if config.resources.is_empty() && config.queries.is_empty() {
        match store.tables().await {
            Ok(tables) => {
                found = catalog::discover(&tables);
                &found
            }
            Err(error) => {
                tracing::debug!(%error, "the tables could not be listed");
                return (Catalog { resources, ..Catalog::default() }, error.is_outage());
            }
        }
    } else {
        &config.resources
    };
    let mut outage: Option<StoreError> = None;
    for (name, declared) in declared {
        let state = match &outage {
            // One refusal is enough for all.
            Some(error) => State::Waiting(vec![Problem::fatal(error.to_string())]),
            None => match one(store, config, name, declared).await {
                Ok(state) => state,
                Err(error) => {
                    let state = State::Waiting(vec![Problem::fatal(error.to_string())]);
                    outage = error.is_outage().then_some(error);
                    state
                }
            },
        };
        resources.insert(name.clone(), state);
    }
    let mut queries = BTreeMap::new();
    for (name, declared) in &config.queries {
        let state = match &outage {
            Some(error) => State::Waiting(vec![Problem::fatal(error.to_string())]),
            None => match query(store, config, name, declared).await {
                Ok(state) => state,
                Err(error) => {
                    let state = State::Waiting(vec![Problem::fatal(error.to_string())]);
                    outage = error.is_outage().then_some(error);
                    state
                }
            },
        };
        queries.insert(format!("query:{name}"), state);
    }
    (Catalog { resources, queries }, outage.is_some())
}

async fn query(store: &AnyStore, config: &Config, name: &str, declared: &Query) -> Result<State, StoreError> {
    let resource = catalog::Resource::declared_query(name, declared, &config.defaults, &config.cache.key_prefix);
    let (resource, problems) = store.prepare(resource).await?;
    ready(store, config, resource, problems, &declared.depends_on).await
}

async fn one(store: &AnyStore, config: &Config, name: &str, declared: &Resource) -> Result<State, StoreError> {
    let table = if declared.table.is_empty() { name } else { declared.table.as_str() };
    let table = match TableName::parse(table) {
        Ok(table) => table,
        Err(words) => return Ok(State::Waiting(vec![Problem::fatal(words)])),
    };
    let Some(described) = store.describe(&table).await? else {
        return Ok(State::Waiting(vec![Problem::fatal(format!("there is no table or view {table}"))]));
    };
    let bound = catalog::bind(name, declared, &config.defaults, &config.cache.key_prefix, described);
    let (resource, mut problems) = match bound {
        Ok(bound) => bound,
        Err(problems) => return Ok(State::Waiting(problems)),
    };
    let (resource, more) = store.prepare(resource).await?;
    problems.extend(more);
    ready(store, config, resource, problems, &declared.depends_on).await
}

/// What was prepared is served if nothing speaks against it; whether it may be cached is asked last.
async fn ready(
    store: &AnyStore,
    config: &Config,
    mut resource: catalog::Resource,
    mut problems: Vec<Problem>,
    depends: &[String],
) -> Result<State, StoreError> {
    if problems.iter().any(|problem| problem.fatal) {
        return Ok(State::Waiting(problems));
    }
    if let (true, Err(words)) = (resource.filter, resource.filterable()) {
        return Ok(State::Waiting(vec![Problem::fatal(format!("filter: {words}"))]));
    }
    if let Some(missing) = depends_on(store, config, &mut resource, depends).await? {
        return Ok(State::Waiting(vec![missing]));
    }
    if config.invalidation.mode != InvalidationMode::None {
        problems.extend(capture(store, &mut resource).await?);
    }
    Ok(State::Ready(Arc::new(resource), problems))
}

/// Resolves the tables that a resource depends on; one that is not there is a problem.
async fn depends_on(
    store: &AnyStore,
    config: &Config,
    resource: &mut catalog::Resource,
    names: &[String],
) -> Result<Option<Problem>, StoreError> {
    for name in names {
        let table = match TableName::parse(name) {
            Ok(table) => table,
            Err(words) => return Ok(Some(Problem::fatal(format!("depends_on: {words}")))),
        };
        match store.describe(&table).await? {
            Some(described) => resource.depend_on(described.relation(), &config.cache.key_prefix),
            None => return Ok(Some(Problem::fatal(format!("depends_on: there is no table {table}")))),
        }
    }
    Ok(None)
}

/// Finds out whether changes by others will be seen, and says so where they won't.
async fn capture(store: &AnyStore, resource: &mut catalog::Resource) -> Result<Vec<Problem>, StoreError> {
    let wanted = resource.wanted();
    if wanted.is_empty() {
        let what = if resource.parameters.is_some() { "a statement" } else { "a view" };
        let words = format!("it is {what} without depends_on: changes are seen when the TTL ends");
        return Ok(vec![Problem::warning(words)]);
    }
    let (mut ids, mut problems) = (Vec::new(), Vec::new());
    let (mut lacking, mut partial) = (false, false);
    for captured in store.captured(&wanted).await? {
        match captured {
            Captured::Complete { id, partial: some, late } => {
                ids.push(id);
                partial |= some;
                resource.late |= late;
            }
            Captured::Lacking(words) => {
                lacking = true;
                problems.push(Problem::bypass(format!("{words}; served past the cache until then")));
            }
            Captured::Never(words) => problems.push(Problem::warning(words)),
        }
    }
    resource.captured(&ids, lacking, partial);
    if resource.capture == Capture::On && partial && !resource.table.is_view {
        let words = format!(
            "the log tells only the identity of a changed row's past: {}; ALTER TABLE {} REPLICA IDENTITY FULL avoids that",
            "a change drops more than it would have to, such as all lists", resource.table.name
        );
        problems.push(Problem::warning(words));
    }
    problems.dedup();
    Ok(problems)
}

/// Asks the database now and then whether it answers, for /readyz and for the breaker before it.
pub(super) async fn watch_database(served: Served) {
    let (store, guard) = (served.aside.store(), served.aside.guard());
    let mut before = None;
    loop {
        let answer = store.ping().await;
        guard.asked(&answer);
        served.aside.metrics().breaker(store.engine(), Some(guard.state()));
        let refused = matches!(answer, Err(StoreError::Refused(_)));
        let now = Some((answer.is_ok(), refused));
        if before != now {
            match &answer {
                Ok(()) => tracing::info!("the database answers"),
                Err(error) if refused => tracing::warn!(%error, "the database gives us no connection"),
                Err(error) => tracing::warn!(%error, "the database does not answer"),
            }
            before = now;
        }
        let connections = store.connections();
        // Whoever has connections serves, though there is no room for one more.
        let serves = refused && connections.in_use + connections.idle > 0;
        let health = if serves { Ok(()) } else { answer.clone().map_err(|error| error.to_string()) };
        served.health.database.store(Arc::new(health));
        store.expect(most_read(&served).iter().map(AsRef::as_ref));
        guard.pause(&answer).await;
    }
}

/// The resources that were read, the most first.
fn most_read(served: &Served) -> Vec<Arc<catalog::Resource>> {
    let catalog = served.catalog.load();
    let mut read: Vec<_> = catalog
        .all()
        .filter_map(|(_, state)| match state {
            State::Ready(resource, _) => Some((served.aside.metrics().reads(&resource.name), Arc::clone(resource))),
            State::Waiting(_) => None,
        })
        .filter(|(reads, _)| *reads > 0)
        .collect();
    read.sort_by_key(|(reads, _)| std::cmp::Reverse(*reads));
    read.into_iter().map(|(_, resource)| resource).collect()
}
