//! A memory as those who keep it current see it: looked at, and brought a step further.

use std::future::Future;

use super::CacheError;
use super::control::{Control, Ids};
use super::memory::MemoryNode;
use super::redis::RedisNode;

/// Points are kept so that one of them is always this much older than the newest, in milliseconds.
const OLDER: u64 = 5_000;

/// What a look found. A round that began with it must end on the same connection.
#[derive(Clone, Debug, Default)]
pub struct Looked {
    /// The control key.
    pub control: Control,
    /// The memory's clock, in milliseconds.
    pub now: u64,
    /// Which memory it is now; what it was when it last caught up is in the control key.
    pub ids: Ids,
    /// The connection that was looked over.
    pub(super) connection: u64,
}

/// One step: what to invalidate, and what the memory has caught up with then.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Step {
    /// The point in the database's history, in the store's words.
    pub point: String,
    /// The database.
    pub origin: String,
    /// Cache keys to drop before.
    pub drop: Vec<String>,
    /// Cache keys to drop before, unless a writer holds them.
    pub spare: Vec<String>,
    /// Resources that get a new generation.
    pub renew: Vec<String>,
    /// Everything here becomes absent: what it missed is not known.
    pub anew: bool,
}

impl Looked {
    /// The points that the control key holds after a step to `point`: the newest, and two that are older.
    pub(super) fn points(&self, step: &Step) -> Control {
        let Control { point, taken, earlier, earlier_taken, earliest, .. } = &self.control;
        let mut next = Control { point: step.point.clone(), taken: self.now, ..Control::default() };
        if step.anew || point.is_empty() {
            // Nothing old enough yet: until then, a database that comes back from a crash makes everything absent.
            (next.earlier, next.earlier_taken) = (step.point.clone(), self.now);
        } else if earlier.is_empty() || self.now.saturating_sub(*earlier_taken) >= OLDER || *earlier_taken > self.now {
            (next.earlier, next.earlier_taken) = (point.clone(), *taken);
            earlier.clone_into(&mut next.earliest);
        } else {
            (next.earlier, next.earlier_taken) = (earlier.clone(), *earlier_taken);
            earliest.clone_into(&mut next.earliest);
        }
        next
    }
}

/// A memory that can be brought up to date.
pub trait Node: Send + Sync {
    /// Its control key, clock and identity, in one round trip.
    fn look(&self) -> impl Future<Output = Result<Looked, CacheError>> + Send;

    /// Drops what is to be dropped, then moves the watermark in one step, unless somebody else did so since the look, or
    /// the memory is another one: then the answer is false.
    fn advance(&self, looked: &Looked, step: &Step) -> impl Future<Output = Result<bool, CacheError>> + Send;

    /// Tells readers whether the database answered: where it does not, what is here is served although nobody knows
    /// how old it is.
    fn database_answers(&self, yes: bool);
}

/// The memory of a running service.
#[derive(Debug)]
pub enum AnyNode {
    /// Redis or Valkey.
    Redis(Box<RedisNode>),
    /// In this process.
    Memory(MemoryNode),
}

impl Node for AnyNode {
    async fn look(&self) -> Result<Looked, CacheError> {
        match self {
            Self::Redis(node) => node.look().await,
            Self::Memory(node) => node.look().await,
        }
    }

    async fn advance(&self, looked: &Looked, step: &Step) -> Result<bool, CacheError> {
        match self {
            Self::Redis(node) => node.advance(looked, step).await,
            Self::Memory(node) => node.advance(looked, step).await,
        }
    }

    fn database_answers(&self, yes: bool) {
        match self {
            Self::Redis(node) => node.database_answers(yes),
            Self::Memory(node) => node.database_answers(yes),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Control, Looked, Step};

    #[test]
    fn there_is_always_a_point_that_is_some_seconds_old() {
        let mut looked = Looked::default();
        for second in 1..60_u64 {
            looked.now = second * 1000;
            let step = Step { point: second.to_string(), ..Step::default() };
            let next = looked.points(&step);
            if second > 12 {
                let earliest: u64 = next.earliest.parse().expect("a number");
                assert!((5..=12).contains(&(second - earliest)), "{earliest} at {second}");
            }
            looked.control = Control { number: looked.control.number + 1, ..next };
        }
    }

    #[test]
    fn a_new_epoch_forgets_older_points() {
        let control = Control { point: "1".into(), earlier: "0".into(), earliest: "0".into(), ..Control::default() };
        let looked = Looked { control, now: 5, ..Looked::default() };
        let next = looked.points(&Step { point: "9".into(), anew: true, ..Step::default() });
        assert_eq!((next.point.as_str(), next.earlier.as_str(), next.earliest.as_str()), ("9", "9", ""));
    }
}
