//! One entry as a cache node holds it, as a pure function: what each command makes of it, and what it answers.
//!
//! This is what the adapters promise, said once and without a server: the model checks the protocol with it, and
//! property tests can hold a real adapter's answers against it. It leaves out the payload's format, the
//! connection, and where the clock comes from.
//!
//! Times are milliseconds of the cache's clock. An end is exclusive: whatever lives until 10 is gone at 10. Servers
//! differ in that one millisecond, so a test against a real one should keep away from it.

/// Milliseconds of the cache's clock.
pub type Millis = u64;

/// A lease's random token. The real one is never zero and never used twice.
pub type Fence = u128;

/// What a value must have been stored under to be of use: shape, epoch, generation.
pub type Tag = u64;

/// Everything a node knows of one key.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub enum Entry<V> {
    /// Nothing.
    #[default]
    Absent,
    /// Somebody may fill it. It is gone when the lock ends, and the fence with it.
    Pending { fence: Fence, lock_until: Millis },
    /// A value.
    Valid {
        tag: Tag,
        value: V,
        stored_at: Millis,
        /// From then on it is stale, and one of those who ask may refresh it.
        soft_expires: Millis,
        /// From then on it is gone.
        hard_expires: Millis,
        /// Who refreshes it, and until when that keeps others from it. A refresh that has run out can still be filled
        /// or renewed while nobody else took it: the fence counts, not the time.
        refresh: Option<(Fence, Millis)>,
    },
    /// Writers are about to commit: nobody reads it, nobody fills it.
    Held { owners: Vec<Fence>, until: Millis },
}

/// What a node is told.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Command<V> {
    /// Look, as a reader who uses values of this tag.
    Read { tag: Tag },
    /// Ask for the right to fill. A value of another tag that was stored less than `spare` ago is left alone, so that
    /// two shapes of a rolling update don't fight over it: a second in shared memories, none in those of one process.
    /// The one that was stored at `refreshes` counts as past its TTL though it is fresh.
    Lease { fence: Fence, tag: Tag, lock: Millis, spare: Millis, refreshes: Option<Millis> },
    /// Make the lock or the refresh last for `lock` from now.
    Renew { fence: Fence, lock: Millis },
    /// Store a value: fresh for `ttl`, kept for `grace` more. The tag is that of the lease.
    Fill { fence: Fence, tag: Tag, value: V, ttl: Millis, grace: Millis },
    /// Give the lease back unused.
    Release { fence: Fence },
    /// Destroy value and fence. A hold is no value: it stays.
    Invalidate,
    /// Put a hold in place of whatever is there, beside those of others.
    Hold { owner: Fence, life: Millis },
    /// End a hold, and destroy whatever came after it, but for others' holds.
    ReleaseHold { owner: Fence },
    /// The node needs the room.
    Evict,
}

/// What a node answers.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Answer<V> {
    /// Read: a value within its TTL.
    Fresh(V),
    /// Read: a value past its TTL.
    Soft(V),
    /// Read: being filled.
    Pending,
    /// Read: held by a writer. An adapter may call it absent, for a lease is refused then.
    Held,
    /// Read: nothing of this tag.
    Absent,
    /// Lease: fill it. `stale` is what is there until then.
    Fill { stale: Option<V> },
    /// Lease: somebody else fills it.
    Wait { stale: Option<V> },
    /// Lease: it was filled meanwhile.
    Hit(V),
    /// Lease: read the database and store nothing.
    Past,
    /// Fill: stored.
    Stored,
    /// Fill: refused, the fence is another.
    Fenced,
    /// Fill: refused, nothing is there.
    Gone,
    /// All others: done.
    Done,
    /// All others: not this fence's.
    Refused,
}

impl<V: Clone> Entry<V> {
    /// What is left of it at `now`.
    #[must_use]
    pub fn at(self, now: Millis) -> Self {
        let ends = match &self {
            Self::Absent => return Self::Absent,
            Self::Pending { lock_until, .. } => *lock_until,
            Self::Valid { hard_expires, .. } => *hard_expires,
            Self::Held { until, .. } => *until,
        };
        if ends > now { self } else { Self::Absent }
    }

    /// Does what it is told, at `now`.
    #[must_use]
    pub fn step(self, now: Millis, command: Command<V>) -> (Self, Answer<V>) {
        let entry = self.at(now);
        match command {
            Command::Read { tag } => {
                let answer = entry.read(now, tag);
                (entry, answer)
            }
            Command::Lease { fence, tag, lock, spare, refreshes } => {
                entry.lease(now, (fence, tag, lock), spare, refreshes)
            }
            Command::Renew { fence, lock } => entry.renew(now, fence, lock),
            Command::Fill { fence, tag, value, ttl, grace } => match entry.fence() {
                Some(held) if held == fence => {
                    let soft_expires = now.saturating_add(ttl);
                    let hard_expires = soft_expires.saturating_add(grace);
                    let valid = Self::Valid { tag, value, stored_at: now, soft_expires, hard_expires, refresh: None };
                    (valid, Answer::Stored)
                }
                None if matches!(entry, Self::Absent) => (entry, Answer::Gone),
                _ => (entry, Answer::Fenced),
            },
            Command::Release { fence } if entry.fence() == Some(fence) => (entry.released(), Answer::Done),
            Command::Release { .. } => (entry, Answer::Refused),
            Command::Invalidate if matches!(entry, Self::Held { .. }) => (entry, Answer::Done),
            Command::Invalidate | Command::Evict => (Self::Absent, Answer::Done),
            Command::Hold { owner, life } => {
                let (mut owners, others_end) = match entry {
                    Self::Held { owners, until } => (owners, until),
                    _ => (Vec::new(), 0),
                };
                if !owners.contains(&owner) {
                    owners.push(owner);
                }
                (Self::Held { owners, until: others_end.max(now.saturating_add(life)) }, Answer::Done)
            }
            Command::ReleaseHold { owner } => match entry {
                Self::Held { mut owners, until } => {
                    owners.retain(|other| *other != owner);
                    if owners.is_empty() {
                        (Self::Absent, Answer::Done)
                    } else {
                        (Self::Held { owners, until }, Answer::Refused)
                    }
                }
                _ => (Self::Absent, Answer::Done),
            },
        }
    }

    /// Whose fill would be taken. A hold's token is no fence: nobody fills it.
    fn fence(&self) -> Option<Fence> {
        match self {
            Self::Pending { fence, .. } | Self::Valid { refresh: Some((fence, _)), .. } => Some(*fence),
            Self::Absent | Self::Valid { refresh: None, .. } | Self::Held { .. } => None,
        }
    }

    fn read(&self, now: Millis, wanted: Tag) -> Answer<V> {
        match self {
            Self::Pending { .. } => Answer::Pending,
            Self::Held { .. } => Answer::Held,
            Self::Valid { tag, value, soft_expires, .. } if *tag == wanted => {
                if *soft_expires > now {
                    Answer::Fresh(value.clone())
                } else {
                    Answer::Soft(value.clone())
                }
            }
            Self::Absent | Self::Valid { .. } => Answer::Absent,
        }
    }

    fn lease(
        self,
        now: Millis,
        (fence, wanted, lock): (Fence, Tag, Millis),
        spare: Millis,
        refreshes: Option<Millis>,
    ) -> (Self, Answer<V>) {
        let lock_until = now.saturating_add(lock);
        match self {
            Self::Pending { .. } => (self, Answer::Wait { stale: None }),
            Self::Held { .. } => (self, Answer::Past),
            Self::Valid { tag, stored_at, .. } if tag != wanted && stored_at.saturating_add(spare) > now => {
                (self, Answer::Past)
            }
            Self::Valid { tag, value, stored_at, soft_expires, hard_expires, refresh } if tag == wanted => {
                let answer = match refresh {
                    _ if soft_expires > now && refreshes != Some(stored_at) => Answer::Hit(value.clone()),
                    Some((_, until)) if until > now => Answer::Wait { stale: Some(value.clone()) },
                    _ => Answer::Fill { stale: Some(value.clone()) },
                };
                let taken = matches!(answer, Answer::Fill { .. });
                let refresh = if taken { Some((fence, lock_until)) } else { refresh };
                // For as long as the refresh may come, the fence is there.
                let hard_expires = if taken { hard_expires.max(lock_until) } else { hard_expires };
                (Self::Valid { tag, value, stored_at, soft_expires, hard_expires, refresh }, answer)
            }
            Self::Absent | Self::Valid { .. } => (Self::Pending { fence, lock_until }, Answer::Fill { stale: None }),
        }
    }

    fn renew(mut self, now: Millis, by: Fence, lock: Millis) -> (Self, Answer<V>) {
        let end = now.saturating_add(lock);
        match &mut self {
            Self::Pending { fence, lock_until } if *fence == by => {
                *lock_until = end;
                (self, Answer::Done)
            }
            Self::Valid { refresh: Some((fence, until)), hard_expires, .. } if *fence == by => {
                *until = end;
                *hard_expires = end.max(*hard_expires);
                (self, Answer::Done)
            }
            _ => (self, Answer::Refused),
        }
    }

    /// Without its lease: of a pending entry nothing is left, of a refresh the value.
    fn released(self) -> Self {
        match self {
            Self::Valid { tag, value, stored_at, soft_expires, hard_expires, .. } => {
                Self::Valid { tag, value, stored_at, soft_expires, hard_expires, refresh: None }
            }
            _ => Self::Absent,
        }
    }
}
