//! A read as a process makes it: look, lease, load, fill, with as long a pause as you like between any two steps.

use super::entry::{Answer, Command, Entry, Fence, Millis};
use super::world::{LATER, World};

/// Which rules a reader keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rules {
    /// Fill only what the lease's fence still guards; otherwise a plain SET.
    pub fenced: bool,
    /// A new fence for every attempt.
    pub random: bool,
    /// An answer given to one reader binds those who begin after it.
    pub linear: bool,
}

pub const SOUND: Rules = Rules { fenced: true, random: true, linear: false };

/// Where a read is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Step {
    #[default]
    Idle,
    /// About to look.
    Asked { floor: u8 },
    /// About to ask for a lease; perhaps of what was found, stored then, and still fresh.
    Missed { floor: u8, refreshes: Option<Millis> },
    /// About to load; with a lease or without one.
    Loading { floor: u8, leased: bool },
    /// About to fill and to answer.
    Loaded { floor: u8, leased: bool, value: u8 },
}

/// A process that reads, one read after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Reader {
    pub step: Step,
    /// Reads still to begin.
    pub left: u8,
}

impl Reader {
    pub fn new(left: u8) -> Self {
        Self { step: Step::Idle, left }
    }

    /// The fence of the lease that this read asks for. An attempt that was told to wait left none behind, so that all
    /// attempts of one read may share a name here.
    pub fn fence(self, index: usize, rules: Rules) -> Fence {
        if rules.random { 1 + 4 * index as Fence + Fence::from(self.left) } else { 1 }
    }

    /// One step on; `None` where there is none.
    pub fn go(&mut self, index: usize, rules: Rules, world: &mut World) -> Option<()> {
        self.step = match self.step {
            Step::Idle => {
                self.left = self.left.checked_sub(1)?;
                Step::Asked { floor: world.floor }
            }
            Step::Asked { floor } => match world.tell(Command::Read { tag: 0 }) {
                Answer::Fresh(value) => serve(world, rules, floor, value),
                _ if rules.fenced => Step::Missed { floor, refreshes: None },
                _ => Step::Loading { floor, leased: true },
            },
            Step::Missed { floor, refreshes } => {
                let fence = self.fence(index, rules);
                let lease = Command::Lease { fence, tag: 0, lock: LATER, spare: 0, refreshes };
                match world.tell(lease) {
                    Answer::Hit(value) | Answer::Wait { stale: Some(value) } => serve(world, rules, floor, value),
                    Answer::Fill { stale } => {
                        // The stale one may be served while the load goes on.
                        stale.map(|value| serve(world, rules, floor, value));
                        Step::Loading { floor, leased: true }
                    }
                    // Past the cache now, or look again: see `turn`.
                    _ => Step::Loading { floor, leased: false },
                }
            }
            Step::Loading { floor, leased } => Step::Loaded { floor, leased, value: world.committed },
            Step::Loaded { floor, leased, value } => {
                if leased && rules.fenced {
                    let fence = self.fence(index, rules);
                    world.tell(Command::Fill { fence, tag: 0, value, ttl: LATER, grace: LATER });
                } else if leased {
                    let end = LATER;
                    world.entry = Entry::Valid {
                        tag: 0,
                        value,
                        stored_at: 0,
                        soft_expires: end,
                        hard_expires: end,
                        refresh: None,
                    };
                }
                serve(world, rules, floor, value)
            }
        };
        Some(())
    }

    /// The other way on: whoever waits looks again, a load that fails gives its lease back, and a hit may be
    /// refreshed.
    pub fn turn(&mut self, index: usize, rules: Rules, world: &mut World) -> Option<()> {
        self.step = match self.step {
            // What was found is served, and refreshed before its TTL ends.
            Step::Asked { floor } if rules.fenced => match world.tell(Command::Read { tag: 0 }) {
                Answer::Fresh(value) => {
                    serve(world, rules, floor, value);
                    let Entry::Valid { stored_at, .. } = &world.entry else { return None };
                    Step::Missed { floor, refreshes: Some(*stored_at) }
                }
                _ => return None,
            },
            Step::Loading { floor, leased: false } => Step::Asked { floor },
            Step::Loading { leased: true, .. } if rules.fenced => {
                world.tell(Command::Release { fence: self.fence(index, rules) });
                Step::Idle
            }
            _ => return None,
        };
        Some(())
    }

    /// Whether the fill that comes next will be refused.
    pub fn will_be(self, refused: &Answer<u8>, index: usize, rules: Rules, world: &World) -> bool {
        let Step::Loaded { leased: true, value, .. } = self.step else { return false };
        let fill = Command::Fill { fence: self.fence(index, rules), tag: 0, value, ttl: LATER, grace: LATER };
        value < world.committed && world.clone().tell(fill) == *refused
    }
}

fn serve(world: &mut World, rules: Rules, floor: u8, value: u8) -> Step {
    world.serve(floor, value);
    if rules.linear {
        world.floor = world.floor.max(value);
    }
    Step::Idle
}
