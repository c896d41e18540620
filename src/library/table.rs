//! The rows of a declared resource.

use std::marker::PhantomData;
use std::sync::Arc;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::entries::{self, Way};
use super::{Database, Error, Fetched, Result};
use crate::aside::Wrote;
use crate::catalog::{Key, KeyError, Resource, Target, What};
use crate::config::WriteKind;
use crate::store::{Body, Write, WriteError};

/// The rows of a declared resource as `V`, by keys as `K`.
///
/// ```no_run
/// # async fn example(db: cache_aside::Database) -> cache_aside::Result<()> {
/// # #[derive(serde::Serialize, serde::Deserialize)] struct Product { id: i64, name: String, category_id: i64 }
/// let products = db.table::<i64, Product>("products");
/// let one: Option<Product> = products.get(&7).await?;
/// let many: Vec<Option<Product>> = products.get_many(&[7, 8]).await?;
/// let drinks: Vec<Product> = products.list("category_id", &5).await?; // declared under `lists:`
/// products.merge(&7, &serde_json::json!({ "category_id": 6 })).await?; // the row and both lists are out of the cache
/// # Ok(()) }
/// ```
///
/// Reads come from the cache; what it lacks is loaded once, however many ask. Writes go to the database, and before they
/// return everything is out of the cache that they changed: the row, the lists it was or is in and, where changes are
/// captured, what cascades and triggers did.
pub struct Table<K, V> {
    database: Database,
    name: String,
    types: PhantomData<fn(K) -> V>,
}

/// A row that was written.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Saved<V> {
    /// The row as the database has it.
    pub row: V,
    /// The cache could not be told yet. It will be, before this process reads from it again; until then other processes may
    /// find what was there.
    pub invalidation_pending: bool,
}

impl<K, V> Clone for Table<K, V> {
    fn clone(&self) -> Self {
        Self { database: self.database.clone(), name: self.name.clone(), types: PhantomData }
    }
}

impl<K, V> std::fmt::Debug for Table<K, V> {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("Table").field("name", &self.name).finish_non_exhaustive()
    }
}

impl<K, V> Table<K, V> {
    pub(super) fn new(database: Database, name: &str) -> Self {
        Self { database, name: name.to_owned(), types: PhantomData }
    }
}

impl<K: Serialize, V: DeserializeOwned> Table<K, V> {
    /// The row; `None` where there is none.
    ///
    /// # Errors
    ///
    /// The database's, a key that is not of the column's type, or a resource that is not served. A cache that is away is no
    /// error.
    pub async fn get(&self, id: &K) -> Result<Option<V>> {
        Ok(self.fetch(id).await?.value)
    }

    /// The same, with how it came.
    ///
    /// # Errors
    ///
    /// As [`Self::get`].
    pub async fn fetch(&self, id: &K) -> Result<Fetched<Option<V>>> {
        self.read(id, Way::Cache).await
    }

    /// Reads the row in the database whatever the cache holds, and stores it.
    ///
    /// # Errors
    ///
    /// As [`Self::get`].
    pub async fn refresh(&self, id: &K) -> Result<Fetched<Option<V>>> {
        self.read(id, Way::Refresh).await
    }

    /// The row if the cache has it; the database is not asked.
    ///
    /// # Errors
    ///
    /// [`Error::NotCached`].
    pub async fn cached(&self, id: &K) -> Result<Fetched<Option<V>>> {
        self.read(id, Way::CacheOnly).await
    }

    /// The rows of many keys, in their order: one round trip to the cache, and one statement for what is missing.
    ///
    /// # Errors
    ///
    /// As [`Self::get`].
    pub async fn get_many(&self, ids: &[K]) -> Result<Vec<Option<V>>> {
        let resource = self.resource()?;
        let mut targets = Vec::with_capacity(ids.len());
        let mut possible = Vec::with_capacity(ids.len());
        for id in ids {
            let target = target(&resource, id)?;
            possible.push(target.is_some());
            targets.extend(target);
        }
        let (aside, timeout) = (&self.database.served().aside, self.database.timeout());
        let fetched =
            entries::read_many(aside, &targets, timeout).await.map_err(|error| self.database.failed(error))?;
        let mut rows = fetched.into_iter().map(|fetched| fetched.value);
        Ok(possible.into_iter().map(|possible| if possible { rows.next().flatten() } else { None }).collect())
    }

    /// The rows with this value in the column of a declared list, in its order and up to its limit.
    ///
    /// # Errors
    ///
    /// As [`Self::get`]; [`Error::NotServed`] for a list that is not declared.
    pub async fn list(&self, column: &str, value: &(impl Serialize + ?Sized)) -> Result<Vec<V>> {
        Ok(self.fetch_list(column, value).await?.value)
    }

    /// The same, with how it came.
    ///
    /// # Errors
    ///
    /// As [`Self::list`].
    pub async fn fetch_list(&self, column: &str, value: &(impl Serialize + ?Sized)) -> Result<Fetched<Vec<V>>> {
        let resource = self.resource()?;
        let Some(index) = resource.list_on(column) else {
            return Err(Error::NotServed(format!("{} has no list by {column:?}: declare it", self.name)));
        };
        let value = part(serde_json::to_value(value)?)?;
        let target = match resource.list(index, value) {
            Ok(target) => target,
            Err(KeyError::CannotExist) => return Ok(Fetched::impossible(Vec::new())),
            Err(error) => return Err(key_error(&error)),
        };
        let (aside, timeout) = (&self.database.served().aside, self.database.timeout());
        let fetched: Result<Fetched<Option<Vec<V>>>> = entries::read(aside, &target, Way::Cache, timeout).await;
        Ok(fetched.map_err(|error| self.database.failed(error))?.map(Option::unwrap_or_default))
    }

    /// Makes a new row; columns that are not given get their defaults, and the key is made where `generate_key` says so.
    ///
    /// # Errors
    ///
    /// [`Error::Write`], or a resource whose `write` does not say `create`.
    pub async fn create(&self, row: &(impl Serialize + ?Sized)) -> Result<Saved<V>> {
        let resource = self.writable(WriteKind::Create)?;
        let mut body = body(&resource, row)?;
        if let (Some(made), Some(column)) = (resource.make_key(), resource.key_columns().next())
            && body.get(&column.name).is_none_or(|given| given.get() == "null")
        {
            body.set(&column.name, serde_json::value::to_raw_value(&made)?);
        }
        self.saved(&resource, Write::Create { body }).await
    }

    /// Sets every column of a row; those that are not given get their defaults.
    ///
    /// # Errors
    ///
    /// [`Error::Write`], or a resource whose `write` does not say `update`.
    pub async fn replace(&self, id: &K, row: &(impl Serialize + ?Sized)) -> Result<Saved<V>> {
        let resource = self.writable(WriteKind::Update)?;
        let (key, body) = (row_key(&resource, id)?, without_key(&resource, body(&resource, row)?));
        self.saved(&resource, Write::Replace { key, body, precondition: None }).await
    }

    /// Sets the columns that are given, and merges into JSON columns (RFC 7396).
    ///
    /// # Errors
    ///
    /// As [`Self::replace`].
    pub async fn merge(&self, id: &K, columns: &(impl Serialize + ?Sized)) -> Result<Saved<V>> {
        let resource = self.writable(WriteKind::Update)?;
        let (key, body) = (row_key(&resource, id)?, without_key(&resource, body(&resource, columns)?));
        self.saved(&resource, Write::Merge { key, body, precondition: None }).await
    }

    /// Removes a row. The answer is whether the cache could be told: see [`Saved::invalidation_pending`].
    ///
    /// # Errors
    ///
    /// [`Error::Write`], or a resource whose `write` does not say `delete`.
    pub async fn delete(&self, id: &K) -> Result<Saved<()>> {
        let resource = self.writable(WriteKind::Delete)?;
        let key = row_key(&resource, id)?;
        let wrote = self.write(&resource, Write::Delete { key, precondition: None }).await?;
        Ok(Saved { row: (), invalidation_pending: wrote.invalidation_pending })
    }

    /// Drops a row from the cache, after somebody has written it whom nobody watches.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidationPending`] where the cache could not be told.
    pub async fn invalidate(&self, id: &K) -> Result<()> {
        match target(&self.resource()?, id)? {
            Some(target) => self.database.served().aside.drop_entry(&target).await.map_err(Error::InvalidationPending),
            None => Ok(()),
        }
    }

    /// Drops everything of the resource, its lists too.
    ///
    /// # Errors
    ///
    /// As [`Self::invalidate`].
    pub async fn invalidate_all(&self) -> Result<()> {
        let resource = self.resource()?;
        self.database.served().aside.drop_resource(&resource).await.map_err(Error::InvalidationPending)
    }

    async fn read(&self, id: &K, way: Way) -> Result<Fetched<Option<V>>> {
        let Some(target) = target(&self.resource()?, id)? else { return Ok(Fetched::impossible(None)) };
        let (aside, timeout) = (&self.database.served().aside, self.database.timeout());
        entries::read(aside, &target, way, timeout).await.map_err(|error| self.database.failed(error))
    }

    async fn saved(&self, resource: &Arc<Resource>, write: Write) -> Result<Saved<V>> {
        let wrote = self.write(resource, write).await?;
        let row = wrote.written.row.unwrap_or_default();
        Ok(Saved { row: serde_json::from_slice(&row)?, invalidation_pending: wrote.invalidation_pending })
    }

    async fn write(&self, resource: &Arc<Resource>, write: Write) -> Result<Wrote> {
        let writing = self.database.served().aside.write(resource, write);
        let wrote = tokio::time::timeout(self.database.timeout(), writing).await.map_err(|_| Error::TimedOut)?;
        wrote.map_err(|error| match error {
            WriteError::Store(error) => self.database.failed(error.into()),
            error => error.into(),
        })
    }

    fn resource(&self) -> Result<Arc<Resource>> {
        self.database.resource(&self.name)
    }

    fn writable(&self, kind: WriteKind) -> Result<Arc<Resource>> {
        let resource = self.resource()?;
        if resource.allows(kind) {
            return Ok(resource);
        }
        let kind = format!("{kind:?}").to_lowercase();
        Err(Error::NotServed(format!("{}: write does not say {kind}", self.name)))
    }
}

/// A value as the text that the catalog reads.
fn part(value: Value) -> Result<String> {
    match value {
        Value::String(text) => Ok(text),
        Value::Number(_) | Value::Bool(_) => Ok(value.to_string()),
        other => Err(Error::Key(format!("{other} is no column's value"))),
    }
}

fn parts<K: Serialize>(id: &K) -> Result<Vec<String>> {
    match serde_json::to_value(id).map_err(|error| Error::Key(error.to_string()))? {
        Value::Array(all) => all.into_iter().map(part).collect(),
        one => Ok(vec![part(one)?]),
    }
}

/// The row's place; `None`: no row can have this key.
fn target<K: Serialize>(resource: &Arc<Resource>, id: &K) -> Result<Option<Target>> {
    match resource.row(parts(id)?) {
        Ok(target) => Ok(Some(target)),
        Err(KeyError::CannotExist) => Ok(None),
        Err(error) => Err(key_error(&error)),
    }
}

fn key_error(error: &KeyError) -> Error {
    match error {
        KeyError::Malformed(words) => Error::Key(words.clone()),
        KeyError::CannotExist => Error::Key("no row can have it".into()),
    }
}

fn row_key<K: Serialize>(resource: &Arc<Resource>, id: &K) -> Result<Key> {
    match target(resource, id)?.as_ref().map(Target::what) {
        Some(What::Row(key)) => Ok(key.clone()),
        _ => Err(Error::Write(WriteError::NotFound)),
    }
}

fn body(resource: &Resource, row: &(impl Serialize + ?Sized)) -> Result<Body> {
    let body: Body = serde_json::from_str(&serde_json::to_string(row)?)?;
    for (name, _) in body.iter() {
        let refused =
            |words: &str| WriteError::Violation { columns: vec![name.into()], detail: format!("{name}: {words}") };
        resource.writable(name).map_err(refused)?;
    }
    Ok(body)
}

/// The key is said already, and can't be changed.
fn without_key(resource: &Resource, mut body: Body) -> Body {
    for column in resource.key_columns() {
        body.remove(&column.name);
    }
    body
}
