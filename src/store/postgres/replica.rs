//! Reads from a standby, where it provably shows all that a fill must see.
//!
//! A fill may store what it read only if the read saw everything that was visible on the primary when the lease was given:
//! whatever was invalidated before. So the primary is asked for its insert position after the lease (with
//! `synchronous_commit = off` the flushed one is behind what is visible), and the standby must have replayed as far:
//!
//! 1. its replayed position is asked for in a statement of its own, before the read. A statement's snapshot is older than
//!    what its functions say
//! 2. it must show what the primary's `cache_aside.origin()` wrote into the log, with the start of that very server in it,
//!    and receive that server's timeline: a position in another history means nothing
//! 3. after the read it must still be a standby. One that was promoted meanwhile has a history of its own
//!
//! A standby can show a commit before the primary does (while that waits for synchronous standbys), so resources that hold
//! are never read there. Whatever is wrong with the standby, the primary is asked instead, and the standby is left alone
//! until a watch has seen that it keeps up.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use arc_swap::ArcSwapOption;
use deadpool_postgres::{ClientWrapper, Hook, HookError, Manager, ManagerConfig, Object, Pool, RecyclingMethod};
use tokio_postgres::{Client, Error, Statement};

use super::connect::CONNECT;
use super::connect::{Connector, Origin};
use super::{Inner, PostgresStore, SLACK};
use crate::catalog::Resource;
use crate::config;
use crate::store::{StoreError, Waiters};

/// The most that a fill waits for a connection that is there.
const PATIENCE: Duration = Duration::from_millis(100);
/// Between looks at how far it has replayed: a standby is behind by a moment whenever somebody writes.
const PAUSES: [Duration; 4] =
    [Duration::from_millis(1), Duration::from_millis(2), Duration::from_millis(4), Duration::from_millis(8)];
/// Between looks at one that can't be used.
const AGAIN: Duration = Duration::from_millis(250);

const POSITION: &str = "SELECT pg_current_wal_insert_lsn()::text";

/// Whether it follows, whom, on which timeline, and how far it is. What the receiver does is shown to `pg_read_all_stats` alone.
const REACHED: &str = "
    SELECT pg_is_in_recovery(), EXISTS (SELECT FROM cache_aside.about WHERE origin = $2),
           (SELECT pid IS NOT NULL FROM pg_stat_wal_receiver), (SELECT status FROM pg_stat_wal_receiver),
           (SELECT received_tli FROM pg_stat_wal_receiver), pg_last_wal_replay_lsn() >= $1::text::pg_lsn, pg_backend_pid()";

/// What decides how a row is written, and in which order rows of a text come.
const SESSION: &str = "
    SELECT concat_ws(' ', current_user, current_setting('server_version_num')::int / 10000,
             current_setting('TimeZone'), current_setting('DateStyle'), current_setting('IntervalStyle'),
             current_setting('search_path'), current_setting('row_security'), current_setting('lc_monetary'),
             current_setting('lc_numeric'), current_setting('lc_time'), current_setting('default_text_search_config'),
             (SELECT string_agg(concat_ws('=', c.collname, pg_collation_actual_version(c.oid)), ' ' ORDER BY c.oid)
              FROM pg_collation c CROSS JOIN pg_database d
              WHERE d.datname = current_database() AND (c.collcollate = d.datcollate OR c.collname = 'en-x-icu')))";

/// A standby, and whether it is worth asking.
pub(super) struct Replica {
    pool: Pool,
    connector: Connector,
    /// What the primary says of its sessions: those of the standby must say the same.
    session: Arc<ArcSwapOption<String>>,
    keeps_up: AtomicBool,
    counts: [AtomicU64; 5],
    said: Mutex<Option<String>>,
    patience: Duration,
}

/// How a read that might have gone to the standby went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Used,
    Behind,
    Unfit,
    Away,
    /// The statement can't be run there.
    Refused,
}

/// The labels of a metric.
const OUTCOMES: [&str; 5] = ["used", "behind", "unfit", "away", "refused"];

/// Why it is not used, and what an operator should know of that.
struct Why(Outcome, String);

/// What a read must not be older than.
struct Moment {
    position: String,
    origin: Arc<Origin>,
    timeline: i32,
}

impl Replica {
    /// Prepares the pool, without connecting yet; `None` where no standby is configured.
    pub(super) fn new(database: &config::Database) -> anyhow::Result<Option<Self>> {
        let Some(url) = &database.replica_url else { return Ok(None) };
        // What it gives up on, the primary still has to do within the request's time.
        let patience = database.statement_timeout / 2;
        let connector = Connector::new(&config::Database {
            url: url.clone(),
            statement_timeout: patience.max(Duration::from_millis(1)),
            ..database.clone()
        })?;
        let session: Arc<ArcSwapOption<String>> = Arc::default();
        let expected = Arc::clone(&session);
        let like_the_primary = Hook::async_fn(move |client: &mut ClientWrapper, _| {
            let expected = expected.load_full();
            Box::pin(async move {
                let found = session_of(client).await.map_err(HookError::Backend)?;
                if expected.as_deref() == Some(&found) {
                    return Ok(());
                }
                tracing::debug!(found, expected = expected.as_deref(), "another kind of session");
                Err(HookError::message(
                    "its sessions differ from the primary's: user, version, time zone, search_path, locale or collations",
                ))
            })
        });
        let manager = Manager::from_connect(
            connector.config().clone(),
            connector.clone(),
            ManagerConfig { recycling_method: RecyclingMethod::Fast },
        );
        let pool = Pool::builder(manager)
            .max_size(usize::try_from(database.pool_size)?)
            .post_create(like_the_primary)
            .build()?;
        Ok(Some(Self {
            pool,
            connector,
            session,
            keeps_up: AtomicBool::new(false),
            counts: Default::default(),
            said: Mutex::default(),
            patience,
        }))
    }

    /// What was counted since this was asked last, in the order of [`OUTCOMES`].
    fn take_counts(&self) -> [u64; 5] {
        std::array::from_fn(|index| self.counts[index].swap(0, Ordering::Relaxed))
    }

    fn count(&self, outcome: Outcome) {
        self.counts[outcome as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// It is not asked again before the watch has seen that it keeps up.
    fn leave(&self, Why(outcome, words): Why) {
        self.count(outcome);
        self.keeps_up.store(false, Ordering::Release);
        self.say(outcome, words);
    }

    /// Told once. To be behind for a moment is nothing to tell of.
    fn say(&self, outcome: Outcome, words: String) {
        let mut said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        if outcome == Outcome::Behind {
            tracing::debug!(%words, "the replica is behind");
        } else if said.as_ref() != Some(&words) {
            tracing::warn!(reason = %words, "the replica can't be used; fills read the primary");
            *said = Some(words);
        }
    }

    async fn connection(&self) -> Result<Object, Why> {
        match tokio::time::timeout(PATIENCE, self.pool.get()).await {
            Ok(Ok(client)) => Ok(client),
            Ok(Err(error)) => Err(refused(&error)),
            Err(_) => Err(Why(Outcome::Away, "no connection to it in time".into())),
        }
    }

    /// Runs something with a limit; a connection on which it takes too long goes, and what runs there is cancelled.
    async fn within<T>(
        &self,
        client: Object,
        run: impl AsyncFnOnce(&Object) -> Result<T, Why>,
    ) -> Result<(T, Object), Why> {
        match tokio::time::timeout(self.patience + SLACK, run(&client)).await {
            Ok(Ok(done)) => Ok((done, client)),
            Ok(Err(why)) => Err(why),
            Err(_) => {
                let (client, connector) = (Object::take(client), self.connector.clone());
                self.connector.runtime().spawn(async move {
                    // One that can't be cancelled in time is closed all the same.
                    let _ = tokio::time::timeout(Duration::from_secs(1), connector.cancel(&client)).await;
                });
                Err(Why(Outcome::Away, "it took too long".into()))
            }
        }
    }
}

/// What the driver or the pool says.
fn refused(error: &deadpool_postgres::PoolError) -> Why {
    match error {
        deadpool_postgres::PoolError::PostCreateHook(HookError::Message(words)) => {
            Why(Outcome::Unfit, words.clone().into_owned())
        }
        deadpool_postgres::PoolError::Backend(error)
        | deadpool_postgres::PoolError::PostCreateHook(HookError::Backend(error)) => failed(error),
        other => Why(Outcome::Away, other.to_string()),
    }
}

fn failed(error: &Error) -> Why {
    let code = error.code().map_or("", tokio_postgres::error::SqlState::code);
    match code {
        "42703" | "42P01" | "3F000" => Why(
            Outcome::Unfit,
            "the change capture is of an older version, or not there yet: run cache-aside migrate".into(),
        ),
        // Replay needed what the statement read, or the statement took longer than it may there.
        "40001" | "40P01" | "57014" => {
            Why(Outcome::Behind, "replay went before the statement, or it took too long".into())
        }
        _ => Why(Outcome::Away, super::unreachable(error).to_string()),
    }
}

async fn session_of(client: &Client) -> Result<String, Error> {
    client.query_one(SESSION, &[]).await?.try_get(0)
}

/// Whether a standby is at a moment, or will be soon; which of its processes says so.
async fn reached(client: &Object, moment: &Moment) -> Result<i32, Why> {
    let statement = client.prepare_cached(REACHED).await.map_err(|error| failed(&error))?;
    let mut pauses = PAUSES.iter();
    loop {
        let row = client.query_one(&statement, &[&moment.position, &moment.origin.text()]).await;
        let row = row.map_err(|error| failed(&error))?;
        let read = || {
            let (follows, known): (bool, bool) = (row.try_get(0)?, row.try_get(1)?);
            let (receives, status): (Option<bool>, Option<String>) = (row.try_get(2)?, row.try_get(3)?);
            let (timeline, replayed): (Option<i32>, Option<bool>) = (row.try_get(4)?, row.try_get(5)?);
            Ok::<_, Error>((follows, known, receives, status, timeline, replayed))
        };
        let (follows, known, receives, status, timeline, replayed) = read().map_err(|error| failed(&error))?;
        let unfit = |words: &str| Err(Why(Outcome::Unfit, words.to_owned()));
        if !follows {
            return unfit("it is no standby: it was promoted, or replica_url names a primary");
        }
        if receives.unwrap_or(false) && status.is_none() {
            return unfit("its user may not see whom it follows: GRANT pg_read_all_stats to it");
        }
        // A receiver may be between two connections for a moment, and the primary may just have begun a new life.
        let streaming = status.as_deref() == Some("streaming") && timeline == Some(moment.timeline);
        if streaming && known && replayed == Some(true) {
            return row.try_get(6).map_err(|error| failed(&error));
        }
        let Some(pause) = pauses.next() else {
            return match (streaming, known) {
                (true, true) => Err(Why(Outcome::Behind, "it is behind".into())),
                (true, false) if replayed != Some(true) => Err(Why(Outcome::Behind, "it is behind".into())),
                (true, false) => unfit("it follows another server than the primary, or another life of it"),
                (false, _) => unfit("it receives no log from the primary, or that of another timeline"),
            };
        };
        tokio::time::sleep(*pause).await;
    }
}

/// Whether it is a standby still, and so was one when whatever came before was read.
async fn still_follows(client: &Object, process: i32) -> Result<(), Why> {
    let row = async {
        let statement = client.prepare_cached("SELECT pg_is_in_recovery(), pg_backend_pid() = $1").await?;
        let row = client.query_one(&statement, &[&process]).await?;
        Ok((row.try_get(0)?, row.try_get(1)?))
    };
    match row.await {
        Ok((true, true)) => Ok(()),
        Ok((true, false)) => {
            let words =
                "a pooler stands in between and hands statements to different connections: they may lead anywhere";
            Err(Why(Outcome::Unfit, words.into()))
        }
        Ok((false, _)) => Err(Why(Outcome::Unfit, "it was promoted".into())),
        Err(error) => Err(failed(&error)),
    }
}

impl PostgresStore {
    /// What `read` finds on the standby, and which database that is; `None`: the primary is to be asked.
    ///
    /// # Errors
    ///
    /// The primary's, which is asked where it is.
    pub(super) async fn at_replica<T>(
        &self,
        resource: &Resource,
        sql: &str,
        waiters: &Waiters,
        read: impl AsyncFnOnce(&ClientWrapper, &Statement) -> Result<T, Error>,
    ) -> Result<Option<(T, u64)>, StoreError> {
        let Some(replica) = &self.inner.replica else { return Ok(None) };
        if resource.hold || !replica.keeps_up.load(Ordering::Acquire) {
            return Ok(None);
        }
        let Some(moment) = self.moment(waiters).await? else { return Ok(None) };
        let outcome = async {
            let client = replica.connection().await?;
            let run = async |client: &Object| {
                let process = reached(client, &moment).await?;
                let found = async {
                    let statement = client.prepare_cached(sql).await?;
                    read(client, &statement).await
                };
                let found = match found.await {
                    Ok(found) => found,
                    Err(error) => {
                        // Its plan may be of a table that was altered.
                        client.statement_cache.clear();
                        let why = failed(&error);
                        // A "no" to one statement says nothing of the standby: the primary has the last word.
                        return if client.is_closed() || why.0 == Outcome::Behind { Err(why) } else { Ok(None) };
                    }
                };
                still_follows(client, process).await?;
                Ok(Some(found))
            };
            replica.within(client, run).await
        };
        match outcome.await {
            Ok((Some(found), _)) => {
                replica.count(Outcome::Used);
                Ok(Some((found, moment.origin.fingerprint)))
            }
            Ok((None, _)) => {
                replica.count(Outcome::Refused);
                Ok(None)
            }
            Err(why) => {
                replica.leave(why);
                Ok(None)
            }
        }
    }

    /// Where the primary is now; `None` where it does not say which of its lives this is.
    async fn moment(&self, waiters: &Waiters) -> Result<Option<Moment>, StoreError> {
        let checked = waiters.or(self.checkout()).await?;
        let (client, origin) = (checked.client()?, Arc::clone(&checked.life));
        let Some(timeline) = origin.timeline() else { return Ok(None) };
        let asked = async {
            let statement = client.prepare_cached(POSITION).await?;
            client.query_one(&statement, &[]).await?.try_get(0)
        };
        match tokio::time::timeout(self.inner.statement_timeout + SLACK, asked).await {
            Ok(Ok(position)) => Ok(Some(Moment { position, origin, timeline })),
            // Whoever asks the primary for rows next finds out what is the matter.
            Ok(Err(error)) => {
                tracing::debug!(%error, "the primary does not say how far it is");
                Ok(None)
            }
            Err(_) => {
                self.abandon(checked);
                Err(StoreError::TimedOut)
            }
        }
    }

    /// Whether the standby keeps up now.
    async fn look_at_replica(&self, replica: &Replica) -> Result<(), Why> {
        let unknown = |words: &str| Why(Outcome::Unfit, words.to_owned());
        let primary = |error: StoreError| Why(Outcome::Away, format!("the primary can't be asked: {error}"));
        let moment = self.moment(&Waiters::default()).await.map_err(primary)?;
        let moment =
            moment.ok_or_else(|| unknown("the primary does not say which database it is: run cache-aside migrate"))?;
        let session = self.ask(async |client| session_of(client).await).await.map_err(primary)?;
        replica.session.store(Some(Arc::new(session)));
        let client = match tokio::time::timeout(CONNECT, replica.pool.get()).await {
            Ok(client) => client.map_err(|error| refused(&error))?,
            Err(_) => return Err(Why(Outcome::Away, "connecting took too long".into())),
        };
        replica.within(client, async |client| reached(client, &moment).await).await.map(drop)
    }

    /// What an operator should know of the standby; `None` where there is none.
    pub async fn replica(&self) -> Option<Result<String, String>> {
        let replica = self.inner.replica.as_ref()?;
        Some(match self.look_at_replica(replica).await {
            Ok(()) => Ok("the replica keeps up with the primary".into()),
            Err(Why(_, words)) => Err(format!("the replica can't be used, fills read the primary: {words}")),
        })
    }

    /// How many reads went to the standby since this was asked last, and why others did not.
    pub fn replica_reads(&self) -> impl Iterator<Item = (&'static str, u64)> + use<> {
        let counts = self.inner.replica.as_ref().map(Replica::take_counts);
        counts.into_iter().flat_map(|counts| OUTCOMES.into_iter().zip(counts))
    }
}

/// Looks at a standby that is not in use until it keeps up, for as long as anybody may want to use it.
pub(super) async fn watch(inner: Weak<Inner>) {
    loop {
        let Some(strong) = inner.upgrade() else { return };
        let store = PostgresStore { inner: strong };
        let Some(replica) = &store.inner.replica else { return };
        if !replica.keeps_up.load(Ordering::Acquire) {
            match store.look_at_replica(replica).await {
                Ok(()) => {
                    replica.keeps_up.store(true, Ordering::Release);
                    let before = replica.said.lock().unwrap_or_else(PoisonError::into_inner).take();
                    if let Some(before) = before {
                        tracing::info!(after = %before, "the replica keeps up again");
                    }
                }
                Err(Why(outcome, words)) => replica.say(outcome, words),
            }
        }
        drop(store);
        tokio::time::sleep(AGAIN).await;
    }
}
