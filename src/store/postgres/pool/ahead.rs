//! What connections run before anybody needs them.
//!
//! A backend that runs a statement for the first time reads the catalogues and plans: some milliseconds of a processor instead
//! of a fraction of one. When a cache dies, its readers come to all connections at once, and the database plans for all of
//! them at the same time, before it answers. So every idle connection runs what is read here, once, with a key that no row has.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};

use deadpool_postgres::ClientWrapper;
use tokio_postgres::Error;
use tokio_postgres::types::ToSql;

use super::{Checked, LOOK, Made, Pool};
use crate::catalog::Resource;
use crate::store::postgres::SLACK;
use crate::store::waiters::Place;

/// So many at most: what herds read is few, and each takes some memory of each backend.
const MOST: usize = 32;

/// A statement that reads a row or a list by its parameters, all of them text.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Expected {
    sql: String,
    parameters: usize,
}

impl Expected {
    /// What readers of these resources ask; statements that people wrote may do anything with a NULL.
    ///
    /// What was expected before stays where it is still asked: which resource is read more than another changes often.
    fn of<'a>(resources: impl Iterator<Item = &'a Resource>, before: &[Arc<Self>]) -> Vec<Arc<Self>> {
        let resources = resources.filter(|resource| resource.parameters.is_none());
        let asked: Vec<(&str, usize)> = resources
            .flat_map(|resource| {
                let lists = resource.statements.lists.iter().map(|list| (list.as_str(), 1));
                std::iter::once((resource.statements.row.as_str(), resource.key.len())).chain(lists)
            })
            .collect();
        let is = |one: &Self, (sql, parameters): (&str, usize)| one.sql == sql && one.parameters == parameters;
        let kept = before.iter().filter(|one| asked.iter().any(|asked| is(one, *asked)));
        let new = asked.iter().filter(|asked| !before.iter().any(|one| is(one, **asked)));
        let new = new.map(|(sql, parameters)| Arc::new(Self { sql: (*sql).to_owned(), parameters: *parameters }));
        kept.cloned().chain(new).take(MOST).collect()
    }

    async fn run(&self, client: &ClientWrapper) -> Result<(), Error> {
        let null: Option<&str> = None;
        let params: Vec<&(dyn ToSql + Sync)> = (0..self.parameters).map(|_| &null as _).collect();
        let statement = client.prepare_cached(&self.sql).await?;
        client.query(&statement, &params).await.map(drop)
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
    use crate::catalog::{Policy, Resource, Statements};
    use crate::config::Defaults;

    pub(in super::super) fn resource(row: &str, lists: &[&str]) -> Resource {
        let lists = lists.iter().map(|list| (*list).to_owned()).collect();
        let statements = Statements { row: row.into(), lists, ..Statements::default() };
        Resource { statements, ..Resource::loaded("it", Policy::new(&Defaults::default()), "", 1) }
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
    fn there_is_a_bound_and_whoever_was_there_first_stays() {
        let many: Vec<Resource> = (0..MOST + 8).map(|index| resource(&index.to_string(), &[])).collect();
        let first = Expected::of(many.iter(), &[]);
        assert_eq!(first.len(), MOST);
        assert_eq!(Expected::of(many.iter().rev(), &first), first);
    }
}
