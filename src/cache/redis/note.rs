//! A note that replicas leave for one another: a small text under a key of its own. It is a hint and no entry. No answer is
//! made of it, so it needs neither fence nor trust.

use std::time::Duration;

use bytes::Bytes;
use redis::Value;

use super::RedisCache;
use super::operations::millis;
use crate::cache::CacheError;

impl RedisCache {
    /// No resource can have its name: `-` is no letter of theirs.
    fn note_key(&self) -> String {
        format!("{}cache-aside:hot", self.shared.key_prefix)
    }

    /// What stands there; empty: nothing. Of what is larger than `most` bytes that many come, and one more.
    ///
    /// # Errors
    ///
    /// [`CacheError`], also where something stands there that is no text.
    pub async fn note(&self, most: usize) -> Result<Bytes, CacheError> {
        let live = self.lane.live().await?;
        let mut get = redis::cmd("GETRANGE");
        get.arg(self.note_key()).arg(0).arg(most);
        match self.ask(&live, get).await? {
            Value::BulkString(text) => Ok(text.into()),
            _ => Err(CacheError::Refused),
        }
    }

    /// Puts a note there, for so long.
    ///
    /// # Errors
    ///
    /// [`CacheError`]; then the one before it may be there still.
    pub async fn leave_note(&self, text: &str, life: Duration) -> Result<(), CacheError> {
        let live = self.lane.live().await?;
        let mut set = redis::cmd("SET");
        set.arg(self.note_key()).arg(text).arg("PX").arg(millis(life));
        self.ask(&live, set).await.map(drop)
    }
}
