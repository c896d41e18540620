//! `consistency: hold`: two writers who put a hold before they commit, two readers, and time that never goes back for
//! anybody, not even between a commit and its invalidation.

use stateright::{Model, Property};

use super::entry::{Command, Entry, Fence};
use super::reader::{Reader, Rules, SOUND, Step};
use super::world::{LATER, World};

#[derive(Clone, Debug)]
pub struct Holds {
    /// A hold is put before the commit; otherwise: commit, then invalidate, as everywhere else.
    pub puts: bool,
    /// Invalidations leave a hold alone.
    pub respected: bool,
    /// A writer that did not see its hold's reply lets it expire; otherwise it sends a release after it.
    pub unseen_expires: bool,
    /// So it does after a commit without an answer.
    pub unknown_expires: bool,
}

impl Holds {
    pub const SOUND: Self = Self { puts: true, respected: true, unseen_expires: true, unknown_expires: true };
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Writer {
    #[default]
    Idle,
    /// The row is locked, the hold on its way.
    Sent,
    /// It was executed; the writer knows when `seen`.
    Holds {
        seen: bool,
    },
    /// Rolled back without having seen a reply, which may still be executed.
    Late,
    /// Executed, the release behind it on the same connection.
    LateRelease,
    /// The connection broke at COMMIT: the server may still do it.
    Unknown,
    /// Not acknowledged yet, perhaps, and not released.
    Committed {
        version: u8,
        acknowledged: bool,
    },
    Over,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct State {
    pub world: World,
    pub writers: [Writer; 2],
    pub readers: [Reader; 2],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    Read(usize),
    Turn(usize),
    Write(usize),
    /// The other way on: a timeout, a connection that breaks at COMMIT.
    Fail(usize),
    Acknowledge(usize),
    /// A round, or an earlier writer.
    Invalidate,
    /// The hold's end. By then the server has ended every transaction that put one.
    Expire,
    Evict,
}

/// How the readers read.
const LINEAR: Rules = Rules { linear: true, ..SOUND };

fn owner(index: usize) -> Fence {
    100 + index as Fence
}

impl Holds {
    fn apply(&self, state: &mut State, action: Action) -> Option<()> {
        let State { world, writers, readers } = state;
        match action {
            Action::Read(index) => readers[index].go(index, LINEAR, world),
            Action::Turn(index) => readers[index].turn(index, LINEAR, world),
            Action::Write(index) => {
                let locked = writers.iter().any(|writer| writer.open());
                writers[index] = self.write(writers[index], owner(index), world, locked)?;
                Some(())
            }
            Action::Fail(index) => {
                writers[index] = match writers[index] {
                    Writer::Sent => Writer::Late,
                    Writer::Holds { seen: false } if self.unseen_expires => Writer::Over,
                    Writer::Holds { seen: false } => Writer::LateRelease,
                    Writer::Holds { seen: true } => {
                        if !self.unknown_expires {
                            world.tell(Command::ReleaseHold { owner: owner(index) });
                        }
                        Writer::Unknown
                    }
                    // The server rolls back.
                    Writer::Unknown => Writer::Over,
                    _ => return None,
                };
                Some(())
            }
            Action::Acknowledge(index) => {
                let Writer::Committed { version, acknowledged: acknowledged @ false } = &mut writers[index] else {
                    return None;
                };
                *acknowledged = true;
                world.floor = world.floor.max(*version);
                Some(())
            }
            Action::Invalidate => {
                world.tell(if self.respected { Command::Invalidate } else { Command::Evict });
                Some(())
            }
            Action::Expire | Action::Evict => {
                let held = matches!(world.entry, Entry::Held { .. });
                let open = writers.iter().any(|writer| matches!(writer, Writer::Holds { .. } | Writer::Unknown));
                let may = held == (action == Action::Expire) && !(held && open);
                may.then(|| world.entry = Entry::Absent)
            }
        }
    }

    fn write(&self, writer: Writer, owner: Fence, world: &mut World, locked: bool) -> Option<Writer> {
        Some(match writer {
            Writer::Idle if !locked && self.puts => Writer::Sent,
            Writer::Idle if !locked => Writer::Holds { seen: true },
            Writer::Sent => {
                world.tell(Command::Hold { owner, life: LATER });
                Writer::Holds { seen: false }
            }
            Writer::Holds { seen: false } => Writer::Holds { seen: true },
            Writer::Holds { seen: true } => {
                world.committed += 1;
                Writer::Committed { version: world.committed, acknowledged: false }
            }
            Writer::Late => {
                world.tell(Command::Hold { owner, life: LATER });
                if self.unseen_expires { Writer::Over } else { Writer::LateRelease }
            }
            Writer::Unknown => {
                world.committed += 1;
                Writer::Over
            }
            Writer::LateRelease | Writer::Committed { acknowledged: true, .. } => {
                world.tell(if self.puts { Command::ReleaseHold { owner } } else { Command::Invalidate });
                Writer::Over
            }
            Writer::Committed { version, .. } => {
                // Without a hold, the invalidation comes before the acknowledgement.
                world.tell(if self.puts { Command::ReleaseHold { owner } } else { Command::Invalidate });
                world.floor = world.floor.max(version);
                Writer::Over
            }
            Writer::Idle | Writer::Over => return None,
        })
    }
}

impl Writer {
    /// Has the row locked.
    fn open(self) -> bool {
        matches!(self, Self::Sent | Self::Holds { .. } | Self::Unknown)
    }
}

impl Model for Holds {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        vec![State { world: World::default(), writers: [Writer::Idle; 2], readers: [Reader::new(2), Reader::new(2)] }]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        if state.world.broken {
            return;
        }
        for index in 0..2 {
            actions.extend([Action::Read(index), Action::Turn(index), Action::Write(index), Action::Fail(index)]);
            if self.puts {
                actions.push(Action::Acknowledge(index));
            }
        }
        actions.extend([Action::Invalidate, Action::Expire, Action::Evict]);
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        let mut state = last.clone();
        self.apply(&mut state, action).map(|()| state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always(super::LINEAR, |_, state: &State| !state.world.broken),
            Property::always(super::QUIET, |_, state: &State| {
                let idle = state.readers.iter().all(|reader| reader.step == Step::Idle);
                let over = state.writers.iter().all(|writer| matches!(writer, Writer::Idle | Writer::Over));
                !(idle && over) || state.world.value().is_none_or(|value| value == state.world.committed)
            }),
            Property::sometimes("a hold keeps somebody from filling", |_, state: &State| {
                let past = |reader: &Reader| matches!(reader.step, Step::Loading { leased: false, .. });
                matches!(state.world.entry, Entry::Held { .. }) && state.readers.iter().any(past)
            }),
            Property::sometimes("a release finds another's hold", |_, state: &State| {
                matches!(&state.world.entry, Entry::Held { owners, .. } if owners.contains(&owner(1)))
                    && matches!(state.writers[0], Writer::Committed { .. })
            }),
        ]
    }
}
