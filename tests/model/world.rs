//! One key, in the cache and in the database, those who change it, and what readers have been promised.
//!
//! Time is not counted here. Whatever may end by itself (a lock, a TTL) may end at any moment, which is
//! more than any clock could do.

use super::entry::{Answer, Command, Entry};

/// No time passes but by [`World::over`] and eviction.
pub const NOW: u64 = 0;
/// Has not ended at [`NOW`].
pub const LATER: u64 = 1;

/// How far a commit has come. Row locks make commits of one row take turns; their invalidations need not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Writer {
    #[default]
    Idle,
    /// By our API: it invalidates, then acknowledges.
    Committed,
    /// By somebody's SQL, or by a process that died: the next round invalidates.
    Owed,
    Done,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct World {
    pub entry: Entry<u8>,
    /// The newest version in the database.
    pub committed: u8,
    /// Version 1 comes from the first, version 2 from the second.
    pub writers: [Writer; 2],
    /// Whoever begins to read now must get this version or a newer one.
    pub floor: u8,
    /// Somebody got an older one.
    pub broken: bool,
}

impl World {
    pub fn tell(&mut self, command: Command<u8>) -> Answer<u8> {
        let (entry, answer) = std::mem::take(&mut self.entry).step(NOW, command);
        self.entry = entry;
        answer
    }

    pub fn commit(&mut self, index: usize) -> Option<()> {
        if self.writers[index] != Writer::Idle || usize::from(self.committed) != index {
            return None;
        }
        self.writers[index] = Writer::Committed;
        self.committed += 1;
        Some(())
    }

    /// The writer's process ends, or it never was one of ours.
    pub fn die(&mut self, index: usize) -> Option<()> {
        (self.writers[index] == Writer::Committed).then(|| self.writers[index] = Writer::Owed)
    }

    pub fn invalidate(&mut self, index: usize) -> Option<()> {
        self.acknowledge(index)?;
        self.tell(Command::Invalidate);
        Some(())
    }

    /// The same where something else than the entry is dropped.
    pub fn acknowledge(&mut self, index: usize) -> Option<()> {
        match self.writers[index] {
            Writer::Committed => self.floor = self.floor.max([1, 2][index]),
            Writer::Owed => {}
            Writer::Idle | Writer::Done => return None,
        }
        self.writers[index] = Writer::Done;
        Some(())
    }

    /// Ends the TTL (`soft`) or the refresh under way, if there is one to end.
    pub fn over(&mut self, soft: bool) -> Option<()> {
        let Entry::Valid { soft_expires, refresh, .. } = &mut self.entry else { return None };
        let end = if soft { soft_expires } else { &mut refresh.as_mut()?.1 };
        (*end > NOW).then(|| *end = NOW)
    }

    /// Somebody who was promised `floor` or newer gets `value`.
    pub fn serve(&mut self, floor: u8, value: u8) {
        self.broken |= value < floor;
    }

    /// No commit waits for its invalidation.
    pub fn settled(&self) -> bool {
        self.writers.iter().all(|writer| matches!(writer, Writer::Idle | Writer::Done))
    }

    pub fn value(&self) -> Option<u8> {
        match self.entry {
            Entry::Valid { value, .. } => Some(value),
            _ => None,
        }
    }
}
