//! The results of statements.

use std::sync::Arc;
use std::time::Duration;

use serde::de::DeserializeOwned;

use super::entries::{self, Way};
use super::{Database, Error, Fetched, Result};
use crate::catalog::{Param, Policy, Resource, Target};

/// A statement and its parameters; its result is the same for everybody who asks for both.
///
/// ```no_run
/// # async fn example(db: cache_aside::Database) -> cache_aside::Result<()> {
/// # #[derive(serde::Deserialize)] struct Airline { iata: String }
/// use std::time::Duration;
///
/// let query = || db.query("SELECT iata FROM airline WHERE airline_id = $1").bind(7).ttl(Duration::from_mins(5));
/// let rows: Vec<Airline> = query().get().await?;      // a miss, then hits
/// let rows: Vec<Airline> = query().refresh().get().await?;
/// query().invalidate().await?;
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
#[must_use = "a query does nothing until it is fetched or invalidated"]
pub struct Query {
    database: Database,
    statement: Statement,
    params: Vec<Param>,
    named: Vec<(String, Param)>,
    ttl: Option<Duration>,
    way: Way,
}

#[derive(Clone, Debug)]
enum Statement {
    AdHoc(String),
    Named(String),
}

impl Query {
    fn new(database: Database, statement: Statement) -> Self {
        Self { database, statement, params: Vec::new(), named: Vec::new(), ttl: None, way: Way::Cache }
    }

    pub(super) fn ad_hoc(database: Database, sql: &str) -> Self {
        Self::new(database, Statement::AdHoc(sql.to_owned()))
    }

    pub(super) fn named(database: Database, name: &str) -> Self {
        Self::new(database, Statement::Named(name.to_owned()))
    }

    /// The next parameter: `$1`, then `$2`…
    pub fn bind(mut self, value: impl Into<Param>) -> Self {
        self.params.push(value.into());
        self
    }

    /// A parameter of a declared statement, by its name.
    pub fn param(mut self, name: &str, value: impl Into<Param>) -> Self {
        self.named.push((name.to_owned(), value.into()));
        self
    }

    /// How long the result is fresh. Default: `defaults.ttl`; a declared statement has its own.
    pub fn ttl(mut self, ttl: Duration) -> Self {
        self.ttl = Some(ttl);
        self
    }

    /// Runs the statement whatever the cache holds, and stores the result.
    pub fn refresh(mut self) -> Self {
        self.way = Way::Refresh;
        self
    }

    /// The rows.
    ///
    /// # Errors
    ///
    /// The database's, and rows that are no `T`.
    pub async fn get<T: DeserializeOwned>(self) -> Result<Vec<T>> {
        Ok(self.fetch().await?.value)
    }

    /// The same, with how they came, and whether they were cut: at 10,000 rows or 16 MiB.
    ///
    /// # Errors
    ///
    /// As [`Self::get`].
    pub async fn fetch<T: DeserializeOwned>(self) -> Result<Fetched<Vec<T>>> {
        let target = self.target()?;
        let (aside, timeout) = (&self.database.served().aside, self.database.timeout());
        let fetched: Result<Fetched<Option<Vec<T>>>> = entries::read(aside, &target, self.way, timeout).await;
        Ok(fetched.map_err(|error| self.database.failed(error))?.map(Option::unwrap_or_default))
    }

    /// Drops the result from the cache.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidationPending`] where the cache could not be told.
    pub async fn invalidate(self) -> Result<()> {
        let target = self.target()?;
        self.database.served().aside.drop_entry(&target).await.map_err(Error::InvalidationPending)
    }

    /// The key under which the cache has the result: `query:` and the SHA-256 of statement and parameters.
    ///
    /// # Errors
    ///
    /// A declared statement that is not served, or that has other parameters.
    pub fn key(&self) -> Result<String> {
        Ok(self.target()?.entry().to_owned())
    }

    fn target(&self) -> Result<Target> {
        match &self.statement {
            Statement::AdHoc(sql) => {
                if sql.contains('\0') {
                    return Err(Error::NotServed("the statement holds a NUL".into()));
                }
                if let Some((name, _)) = self.named.first() {
                    return Err(Error::NotServed(format!(
                        "{name}: parameters have names where statements are declared"
                    )));
                }
                let config = self.database.config();
                let policy = Policy::new(&config.defaults);
                let ttl = self.ttl.unwrap_or(policy.ttl);
                let policy = Policy { local_ttl: Duration::ZERO, local_hot_ttl: Duration::ZERO, ttl, ..policy };
                let resource = Resource::ad_hoc_query(sql, policy, &config.cache.key_prefix);
                Ok(Arc::new(resource).result_of(self.params.clone()))
            }
            Statement::Named(name) => {
                let resource = self.database.resource(&format!("query:{name}"))?;
                let params = self.declared(name, &resource)?;
                Ok(resource.result_of(params))
            }
        }
    }

    /// Parameters in the order declared, by name or in that order, with their defaults.
    fn declared(&self, name: &str, resource: &Resource) -> Result<Vec<Param>> {
        let declared = resource.parameters.as_ref().map_or(&[][..], |parameters| &parameters.0);
        let wrong = |words: String| Err(Error::NotServed(format!("query {name}: {words}")));
        if self.params.len() > declared.len() {
            return wrong(format!("it takes {} parameters, {} came", declared.len(), self.params.len()));
        }
        if let Some((unknown, _)) = self.named.iter().find(|(given, _)| declared.iter().all(|one| one.name != *given)) {
            return wrong(format!("there is no parameter {unknown:?}"));
        }
        let mut params = Vec::with_capacity(declared.len());
        for (index, parameter) in declared.iter().enumerate() {
            let named = self.named.iter().rev().find(|(given, _)| *given == parameter.name).map(|(_, value)| value);
            match (named.or(self.params.get(index)), &parameter.default) {
                (Some(value), _) => params.push(value.clone()),
                (None, Some(default)) => params.push(Param::Text(default.clone())),
                (None, None) => return wrong(format!("the parameter {:?} is missing", parameter.name)),
            }
        }
        Ok(params)
    }
}

/// Values that have a text which every database reads as one of their type.
macro_rules! text {
    ($($type:ty),*) => { $(
        impl From<$type> for Param {
            fn from(value: $type) -> Self {
                Self::Text(value.to_string())
            }
        }
    )* };
}

text!(i8, i16, i32, i64, i128, u8, u16, u32, u64, u128, f32, f64, bool, char, &str, &String, uuid::Uuid, ulid::Ulid);

impl From<String> for Param {
    fn from(value: String) -> Self {
        Self::Text(value)
    }
}

impl<T: Into<Self>> From<Option<T>> for Param {
    fn from(value: Option<T>) -> Self {
        value.map_or(Self::Null, Into::into)
    }
}

impl<T: Into<Self>> From<Vec<T>> for Param {
    fn from(values: Vec<T>) -> Self {
        Self::List(values.into_iter().map(Into::into).collect())
    }
}
