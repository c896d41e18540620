//! The database of the rounds: who committed what, what a snapshot sees of it, and what the outbox still holds.
//!
//! A version of the row is the set of transactions that it contains. Ids are given out when a transaction begins,
//! and say nothing about who commits first.

/// A set of transactions, by their place in [`Database::transactions`].
pub type Set = u8;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Transaction {
    #[default]
    Idle,
    Open(u8),
    Done(u8),
    /// Committed, seen by others, and taken back by a crash: its id is given out again.
    Lost,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Database {
    pub transactions: [Transaction; 2],
    /// Whose writers were told that all is done.
    pub acknowledged: Set,
    /// Whose rows are gone from the outbox.
    pub purged: Set,
    /// Crashes so far: what tells one life of the database from another.
    pub life: u8,
}

/// `pg_current_snapshot()`: all below `xmax` but those in `xip`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Snapshot {
    pub xmax: u8,
    pub xip: u8,
}

pub fn bit(index: usize) -> Set {
    1 << index
}

impl Database {
    fn ids(&self) -> impl Iterator<Item = (usize, u8)> {
        self.transactions.iter().enumerate().filter_map(|(index, transaction)| match transaction {
            Transaction::Done(id) => Some((index, *id)),
            _ => None,
        })
    }

    /// What a statement sees that begins now.
    pub fn committed(&self) -> Set {
        self.ids().fold(0, |set, (index, _)| set | bit(index))
    }

    /// What was seen once and is no more.
    pub fn lost(&self) -> Set {
        let lost = |(index, transaction)| if transaction == &Transaction::Lost { bit(index) } else { 0 };
        self.transactions.iter().enumerate().map(lost).sum()
    }

    /// Without `xip` it is a cursor: the highest id that was seen.
    pub fn snapshot(&self, xip: bool) -> Snapshot {
        let xmax = self.ids().map(|(_, id)| id + 1).max().unwrap_or(0);
        let open = self.transactions.iter().filter_map(|transaction| match transaction {
            Transaction::Open(id) if *id < xmax && xip => Some(1 << id),
            _ => None,
        });
        Snapshot { xmax, xip: open.sum() }
    }

    /// The changes that `since` does not see.
    pub fn owed(&self, since: Snapshot) -> Set {
        let unseen = self.ids().filter(|(_, id)| *id >= since.xmax || since.xip & (1 << id) != 0);
        unseen.fold(0, |set, (index, _)| set | bit(index))
    }

    pub fn begin(&mut self, index: usize) -> Option<()> {
        let earlier = self.transactions[..index].iter().all(|transaction| *transaction != Transaction::Idle);
        if !earlier || self.transactions[index] != Transaction::Idle {
            return None;
        }
        let ids = self.transactions.iter().filter_map(|transaction| match transaction {
            Transaction::Open(id) | Transaction::Done(id) => Some(id + 1),
            Transaction::Idle | Transaction::Lost => None,
        });
        self.transactions[index] = Transaction::Open(ids.max().unwrap_or(0));
        Some(())
    }

    pub fn commit(&mut self, index: usize) -> Option<()> {
        let Transaction::Open(id) = self.transactions[index] else { return None };
        self.transactions[index] = Transaction::Done(id);
        Some(())
    }

    /// Drops the rows of all that is committed, which is more than any age would allow.
    pub fn purge(&mut self) -> Option<()> {
        let all = self.committed();
        (self.purged == 0 && all != 0).then(|| self.purged = all)
    }

    /// The first transaction was committed without waiting for the disk.
    pub fn crash(&mut self) -> Option<()> {
        let Transaction::Done(_) = self.transactions[0] else { return None };
        self.transactions = [Transaction::Lost, Transaction::Idle];
        self.acknowledged = 0;
        self.life += 1;
        Some(())
    }
}
