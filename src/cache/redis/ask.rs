//! One round trip, and what its failure says of the server.

use std::sync::Arc;

use redis::{Cmd, Pipeline, Value};

use super::RedisCache;
use super::lane::Live;
use super::script::Scripts;
use super::unlink::NotHere;
use crate::cache::CacheError;
use crate::cache::lane::Wait;

impl RedisCache {
    pub(super) async fn ask(&self, live: &Live, cmd: Cmd) -> Result<Value, CacheError> {
        let wait = Wait::new(self.shared.timeout);
        match live.conn.clone().send_packed_command(&cmd).await {
            Ok(reply) => {
                self.lane.answered();
                match reply {
                    Value::ServerError(error) => Err(self.refused(error.code())),
                    value => Ok(value),
                }
            }
            Err(error) => Err(self.failed(&error, wait)),
        }
    }

    /// One round trip; replies come in the commands' order, errors among them.
    pub(super) async fn ask_all(&self, live: &Live, pipe: &Pipeline) -> Result<Vec<Value>, CacheError> {
        let (wait, count) = (Wait::new(self.shared.timeout), pipe.len());
        if count == 0 {
            return Ok(Vec::new());
        }
        match live.conn.clone().send_packed_commands(pipe, 0, count).await {
            Ok(values) => {
                self.lane.answered();
                if values.len() == count { Ok(values) } else { Err(CacheError::Refused) }
            }
            Err(error) => Err(self.failed(&error, wait)),
        }
    }

    /// Runs scripts. Where the server has forgotten one, all are loaded and sent once more: each says the same the second
    /// time, or less.
    pub(super) async fn scripts(&self, live: &Live, pipe: &Pipeline) -> Result<Vec<Value>, CacheError> {
        let unknown = |reply: &Value| matches!(reply, Value::ServerError(error) if error.code() == "NOSCRIPT");
        let mut replies = self.ask_all(live, pipe).await?;
        if replies.iter().any(unknown) {
            let mut load = Pipeline::new();
            Scripts::load(&mut load);
            self.ask_all(live, &load).await?;
            replies = self.ask_all(live, pipe).await?;
        }
        for reply in &replies {
            if let Value::ServerError(error) = reply {
                match self.refused(error.code()) {
                    // That is about one key alone.
                    CacheError::Elsewhere => {}
                    refused => return Err(refused),
                }
            }
        }
        Ok(replies)
    }

    pub(super) fn failed(&self, error: &redis::RedisError, wait: Wait) -> CacheError {
        if error.is_timeout() {
            self.lane.missed(wait);
            return CacheError::TimedOut;
        }
        if error.is_unrecoverable_error() || error.is_connection_dropped() {
            // A multiplexed connection never recovers by itself: its supervisor makes another at once.
            self.lane.wake.notify_one();
            return CacheError::Disconnected;
        }
        tracing::debug!(%error, "the cache answered with an error");
        error.code().map_or(CacheError::Refused, |code| self.refused(code))
    }

    pub(super) fn refused(&self, code: &str) -> CacheError {
        tracing::debug!(code, "the cache refused a command");
        if matches!(code, "READONLY" | "LOADING" | "MASTERDOWN") {
            self.lane.wake.notify_one();
        }
        match code {
            "MOVED" => {
                if let Some(cluster) = self.shared.cluster() {
                    cluster.look_again();
                }
                return CacheError::Elsewhere;
            }
            "ASK" => return CacheError::Elsewhere,
            _ => {}
        }
        CacheError::Refused
    }

    /// What became of keys that were to be dropped; what is not known to be gone is owed. `wait` began with the last round
    /// trip.
    pub(super) fn told(
        &self,
        live: Result<Arc<Live>, CacheError>,
        outcome: redis::RedisResult<NotHere<'_>>,
        (keys, spare): (&[&str], bool),
        wait: Wait,
    ) -> Result<(), CacheError> {
        let failure = match (live, outcome) {
            (Ok(_), Ok(not_here)) if not_here.is_empty() => return Ok(()),
            // Should it come back, it counts for nothing; but some lane may not have seen yet that it has left.
            (Ok(live), Ok(not_here)) if not_here.is_harmless(&live.standing.control.load()) => {
                return Err(CacheError::Untrusted);
            }
            (Ok(_), Ok(not_here)) if not_here.moved.is_empty() => CacheError::Elsewhere,
            (Ok(_), Ok(_)) => self.refused("MOVED"),
            (Ok(_), Err(error)) => self.failed(&error, wait),
            (Err(error), _) => error,
        };
        self.shared.debts.owe(keys, spare);
        self.lane.wake.notify_one();
        Err(failure)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::advance;

    use super::super::RedisCache;
    use super::super::fake::{Fake, TIMEOUT};
    use crate::cache::{Cache, CacheError};
    use crate::shield::State;

    #[tokio::test(start_paused = true)]
    async fn a_server_that_does_not_answer_the_last_of_many_round_trips_is_missed() {
        let mut fake = Fake::start("UNLINK");
        let cache = RedisCache::over(fake.shared(None), None);
        cache.connected(Duration::from_secs(10)).await;
        assert_eq!(cache.memory().breaker, Some(State::HalfOpen), "one timeout is enough");
        let keys: Vec<String> = (0..1_001).map(|id| id.to_string()).collect();
        let keys: Vec<&str> = keys.iter().map(String::as_str).collect();
        let (outcome, ()) = tokio::join!(cache.invalidate(&keys), async {
            fake.heard().await;
            advance(TIMEOUT / 4 * 3).await;
            fake.answer();
            fake.heard().await;
            advance(TIMEOUT + Duration::from_millis(10)).await;
        });
        assert_eq!(outcome, Err(CacheError::TimedOut));
        assert_eq!(cache.memory().breaker, Some(State::Open), "this process did not stand still");
    }
}
