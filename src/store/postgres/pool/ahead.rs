//! What connections run before anybody needs them.
//!
//! A backend that runs a statement for the first time reads the catalogues and plans: some milliseconds of a processor instead
//! of a fraction of one. When a cache dies, its readers come to all connections at once, and the database plans for all of
//! them at the same time, before it answers. So every idle connection runs what is read here, with a key that no row has, until
//! PostgreSQL plans it no more.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use deadpool_postgres::ClientWrapper;
use tokio::time::Instant;
use tokio_postgres::Error;
use tokio_postgres::types::ToSql;

use super::{Checked, LOOK, Made, Pool};
use crate::catalog::{Column, Kind, Resource};
use crate::store::postgres::SLACK;
use crate::store::waiters::Place;

/// So many at most: what herds read is few, and each takes some memory of each backend.
const MOST: usize = 32;
/// PostgreSQL plans a prepared statement for the values that come, five times on each connection; the sixth time it makes
/// the plan that it then keeps, unless others have turned out to be cheaper (`choose_custom_plan` in its `plancache.c`).
const RUNS: usize = 6;
/// What takes longer is run once: planning is little of it.
const SHORT: Duration = Duration::from_millis(10);
/// What takes longer than this, to find nothing or to fail, is run by one connection, not by all.
const LONG: Duration = Duration::from_millis(100);

/// A statement that reads a row or a list.
#[derive(Debug)]
pub(super) struct Expected {
    sql: String,
    /// A text for each of its parameters that no row is likely to have. NULL, where nobody knows one: nothing is planned for
    /// that, but the catalogues are read.
    parameters: Vec<Option<&'static str>>,
    /// All that is asked for it is NULL, which costs the database nothing.
    is_long: AtomicBool,
}

impl PartialEq for Expected {
    fn eq(&self, other: &Self) -> bool {
        (&self.sql, &self.parameters) == (&other.sql, &other.parameters)
    }
}

/// A value that no row is likely to have; one that has is read, no more.
fn absent(column: &Column) -> Option<&'static str> {
    match &column.kind {
        Kind::Integer { min: ..=-32_768, .. } => Some("-32768"),
        Kind::Text { .. } => Some("\u{1}"),
        Kind::Uuid => Some("ffffffff-ffff-ffff-ffff-ffffffffffff"),
        Kind::Bytes => Some("\\x01"),
        Kind::Number => Some("NaN"),
        Kind::Integer { .. } | Kind::Boolean | Kind::Label(_) | Kind::Other => None,
    }
}

impl Expected {
    /// What readers of these resources ask; statements that people wrote may do anything with a NULL.
    ///
    /// What was expected before stays where it is still asked: which resource is read more than another changes often.
    fn of<'a>(resources: impl Iterator<Item = &'a Resource>, before: &[Arc<Self>]) -> Vec<Arc<Self>> {
        let resources = resources.filter(|resource| resource.parameters.is_none());
        let asked: Vec<Self> = resources
            .flat_map(|resource| {
                let row = Self::new(&resource.statements.row, resource.key_columns());
                let lists = resource.statements.lists.iter().zip(&resource.lists);
                let by = |position: usize| std::iter::once(&resource.table.columns[position]);
                std::iter::once(row).chain(lists.map(move |(sql, list)| Self::new(sql, by(list.column))))
            })
            .collect();
        let kept: Vec<Arc<Self>> = before.iter().filter(|one| asked.contains(one)).cloned().collect();
        let new = asked.into_iter().filter(|asked| !before.iter().any(|one| **one == *asked)).map(Arc::new);
        kept.into_iter().chain(new).take(MOST).collect()
    }

    fn new<'a>(sql: &str, by: impl Iterator<Item = &'a Column>) -> Self {
        Self { sql: sql.to_owned(), parameters: by.map(absent).collect(), is_long: AtomicBool::new(false) }
    }

    async fn run(&self, client: &ClientWrapper) -> Result<(), Error> {
        let statement = client.prepare_cached(&self.sql).await?;
        // Until it is known: whoever is cancelled meanwhile does not come back to say so.
        if self.parameters.contains(&None) || self.is_long.swap(true, Ordering::Relaxed) {
            let nulls = vec![&None::<&str> as &(dyn ToSql + Sync); self.parameters.len()];
            return client.query(&statement, &nulls).await.map(drop);
        }
        let params: Vec<&(dyn ToSql + Sync)> = self.parameters.iter().map(|text| text as _).collect();
        let mut ran = Ok(());
        for _ in 0..RUNS {
            let began = Instant::now();
            ran = client.query(&statement, &params).await.map(drop);
            // Also where the server ended it: a connection that was lost at once says nothing of the statement.
            if began.elapsed() > LONG {
                return ran;
            }
            if ran.is_err() || began.elapsed() > SHORT {
                break;
            }
        }
        self.is_long.store(false, Ordering::Relaxed);
        ran
    }
}

/// Looks for connections that have something to run, for as long as the pool is there. A database that hangs meanwhile must
/// not keep anybody from topping up.
pub(super) async fn run(pool: Weak<Pool>) {
    loop {
        tokio::time::sleep(LOOK).await;
        let Some(pool) = pool.upgrade() else { return };
        pool.run_ahead().await;
    }
}

impl Pool {
    /// These resources are read here: idle connections run soon what would be asked if nothing of them were cached any more.
    pub(in crate::store::postgres) fn expect<'a>(&self, resources: impl Iterator<Item = &'a Resource>) {
        let before = self.expected.load();
        let expected = Expected::of(resources, &before);
        if **before != expected {
            self.expected.store(Arc::new(expected));
        }
    }

    /// Has idle connections run what is expected, one after the other, and while nobody waits for one.
    pub(super) async fn run_ahead(&self) {
        while let Some((checked, expected)) = self.check_out_cold() {
            let Ok(client) = checked.client() else { return };
            match tokio::time::timeout(self.patience + SLACK, expected.run(client)).await {
                Ok(Ok(())) => {}
                // Whoever asks for that will hear it.
                Ok(Err(error)) => tracing::debug!(%error, "a statement could not be run ahead"),
                Err(_) => {
                    if let Ok(lost) = checked.lose() {
                        self.cancel(lost);
                    }
                    return;
                }
            }
        }
    }

    /// An idle connection, and what it has not run yet.
    fn check_out_cold(&self) -> Option<(Checked<'_>, Arc<Expected>)> {
        if self.waiting.load(Ordering::SeqCst) > 0 {
            return None;
        }
        let all = self.expected.load();
        let is_among = |one: &Arc<Expected>, many: &[Arc<Expected>]| many.iter().any(|other| Arc::ptr_eq(one, other));
        let inside = Place::take(&self.inside, self.room)?;
        let mut held = self.held();
        let cold = |made: &Made| all.iter().find(|one| !is_among(one, &made.ran));
        let (index, expected) = held.idle.iter().enumerate().find_map(|(index, made)| Some((index, cold(made)?)))?;
        // Where there is none, others are about to take the rest.
        self.ready.try_acquire().ok()?.forget();
        held.lent += 1;
        let mut made = held.idle.remove(index);
        made.ran.retain(|one| is_among(one, &all));
        made.ran.push(Arc::clone(expected));
        let checked = Checked { life: Arc::clone(&made.life), made: Some(made), pool: self, _inside: inside };
        Some((checked, Arc::clone(expected)))
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::sync::Arc;

    use super::{Expected, MOST};
    use crate::catalog::{Column, Kind, List, Policy, Resource, Statements};
    use crate::config::Defaults;

    /// A resource with one column, its key and what it is listed by.
    fn keyed(kind: Kind, row: &str, lists: &[&str]) -> Resource {
        let column = Column {
            name: "id".into(),
            type_name: String::new(),
            cast: String::new(),
            kind,
            exact: true,
            json: false,
            generated: false,
            counted: false,
            nullable: false,
        };
        let policy = Policy::new(&Defaults::default());
        let list = List { column: 0, order: Vec::new(), limit: 1, policy };
        let mut resource = Resource {
            key: vec![0],
            lists: vec![list; lists.len()],
            statements: Statements {
                row: row.into(),
                lists: lists.iter().map(|list| (*list).to_owned()).collect(),
                ..Statements::default()
            },
            ..Resource::loaded("it", policy, "", 1)
        };
        resource.table.columns.push(column);
        resource
    }

    pub(in super::super) fn resource(row: &str, lists: &[&str]) -> Resource {
        keyed(Kind::Uuid, row, lists)
    }

    fn texts(expected: &[Arc<Expected>]) -> Vec<&str> {
        expected.iter().map(|one| one.sql.as_str()).collect()
    }

    #[test]
    fn what_is_read_more_than_another_moves_nothing_and_what_is_read_no_more_goes() {
        let (a, b, c) = (resource("a", &["by x", "by y"]), resource("b", &[]), resource("c", &[]));
        let first = Expected::of([&a, &b].into_iter(), &[]);
        assert_eq!(texts(&first), ["a", "by x", "by y", "b"]);
        let other = Expected::of([&c, &b, &a].into_iter(), &first);
        assert_eq!(texts(&other), ["a", "by x", "by y", "b", "c"]);
        assert!(Arc::ptr_eq(&first[3], &other[3]), "it need not be run again");
        assert_eq!(texts(&Expected::of([&c, &b].into_iter(), &other)), ["b", "c"]);
    }

    #[test]
    fn another_type_is_asked_with_another_value() {
        let first = Expected::of([&keyed(Kind::Uuid, "a", &[])].into_iter(), &[]);
        let other = Expected::of([&keyed(Kind::Text { max_bytes: None }, "a", &[])].into_iter(), &first);
        assert_eq!(other.len(), 1);
        assert_ne!(first, other);
    }

    #[test]
    fn there_is_a_bound_and_whoever_was_there_first_stays() {
        let many: Vec<Resource> = (0..MOST + 8).map(|index| resource(&index.to_string(), &[])).collect();
        let first = Expected::of(many.iter(), &[]);
        assert_eq!(first.len(), MOST);
        assert_eq!(Expected::of(many.iter().rev(), &first), first);
    }
}
