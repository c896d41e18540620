//! `consistency: hold` in a memory without scripts: writers' holds stand beside the entry, under a key of their own, and
//! nothing looks at both at once.
//!
//! A writer writes his hold, then destroys what is in the entry. A reader writes his lease, then looks for holds. Each of these
//! is a step by itself. Two writers, two readers, and time that never goes back for anybody.

use stateright::{Model, Property};

#[derive(Clone, Debug)]
pub struct Beside {
    /// A reader looks for holds after he has written his lease; otherwise before.
    pub lease_first: bool,
    /// A writer destroys what is in the entry after he has written his hold; otherwise before.
    pub hold_first: bool,
    /// A writer gives up his own hold alone.
    pub own: bool,
    /// Of each reader.
    pub reads: u8,
}

impl Beside {
    pub const SOUND: Self = Self { lease_first: true, hold_first: true, own: true, reads: 2 };
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Entry {
    #[default]
    Absent,
    /// Leased by this reader, with this fence.
    Leased(usize, u8),
    Valid(u8),
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Writer {
    #[default]
    Idle,
    /// The row is locked; one of the two is done.
    Began,
    Holds,
    Committed(u8),
    GaveUp(u8),
    Over,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Step {
    #[default]
    Idle,
    Asked,
    /// One of the two is done: the lease, or the look for holds.
    Half,
    Loading {
        leased: bool,
    },
    Loaded {
        leased: bool,
        value: u8,
    },
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Reader {
    pub step: Step,
    /// He must get this version or a newer one.
    pub floor: u8,
    pub reads: u8,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct State {
    pub entry: Entry,
    pub holds: [bool; 2],
    pub committed: u8,
    pub floor: u8,
    pub writers: [Writer; 2],
    pub readers: [Reader; 2],
    pub broken: bool,
    /// Somebody was kept from filling.
    pub kept: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    Write(usize),
    Read(usize),
    /// By a round, an eviction, a forced refresh.
    Drop,
}

impl Beside {
    fn write(&self, state: &mut State, index: usize) -> Option<()> {
        let locked = state.writers.iter().any(|writer| matches!(writer, Writer::Began | Writer::Holds));
        state.writers[index] = match state.writers[index] {
            Writer::Idle if locked => return None,
            Writer::Idle => {
                if self.hold_first {
                    state.holds[index] = true;
                } else {
                    state.entry = Entry::Absent;
                }
                Writer::Began
            }
            Writer::Began => {
                if self.hold_first {
                    state.entry = Entry::Absent;
                } else {
                    state.holds[index] = true;
                }
                Writer::Holds
            }
            Writer::Holds => {
                state.committed += 1;
                Writer::Committed(state.committed)
            }
            Writer::Committed(version) => {
                state.holds[index] = false;
                if !self.own {
                    state.holds = [false; 2];
                }
                Writer::GaveUp(version)
            }
            Writer::GaveUp(version) => {
                state.entry = Entry::Absent;
                // His answer: everybody who begins later sees his version.
                state.floor = state.floor.max(version);
                Writer::Over
            }
            Writer::Over => return None,
        };
        Some(())
    }

    fn read(&self, state: &mut State, index: usize) -> Option<()> {
        let held = state.holds.contains(&true);
        let reader = state.readers[index];
        let mine = Entry::Leased(index, reader.reads);
        let next = match reader.step {
            Step::Idle => {
                state.readers[index].reads = reader.reads.checked_sub(1)?;
                state.readers[index].floor = state.floor;
                Step::Asked
            }
            Step::Asked => match state.entry {
                Entry::Valid(value) => Self::answer(state, index, value),
                // He loads for himself: one who waits sees no more than that.
                Entry::Leased(..) => Step::Loading { leased: false },
                Entry::Absent if self.lease_first => {
                    state.entry = mine;
                    Step::Half
                }
                Entry::Absent if held => Step::Loading { leased: false },
                Entry::Absent => Step::Half,
            },
            Step::Half if self.lease_first => {
                if held && state.entry == mine {
                    state.entry = Entry::Absent;
                }
                state.kept |= held;
                Step::Loading { leased: !held }
            }
            Step::Half => {
                let leased = state.entry == Entry::Absent;
                if leased {
                    state.entry = mine;
                }
                Step::Loading { leased }
            }
            Step::Loading { leased } => Step::Loaded { leased, value: state.committed },
            Step::Loaded { leased, value } => {
                if leased && state.entry == mine {
                    state.entry = Entry::Valid(value);
                }
                Self::answer(state, index, value)
            }
        };
        state.readers[index].step = next;
        Some(())
    }

    fn answer(state: &mut State, index: usize, value: u8) -> Step {
        state.broken |= value < state.readers[index].floor;
        state.floor = state.floor.max(value);
        Step::Idle
    }
}

impl Model for Beside {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        let reader = Reader { reads: self.reads, ..Reader::default() };
        vec![State { readers: [reader; 2], ..State::default() }]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        if !state.broken {
            actions.extend((0..2).flat_map(|index| [Action::Write(index), Action::Read(index)]));
            actions.push(Action::Drop);
        }
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        let mut state = last.clone();
        match action {
            Action::Write(index) => self.write(&mut state, index)?,
            Action::Read(index) => self.read(&mut state, index)?,
            Action::Drop => state.entry = Entry::Absent,
        }
        Some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always(super::LINEAR, |_, state: &State| !state.broken),
            Property::always(super::QUIET, |_, state: &State| {
                let idle = state.readers.iter().all(|reader| reader.step == Step::Idle);
                let over = state.writers.iter().all(|writer| matches!(writer, Writer::Idle | Writer::Over));
                let stale = matches!(state.entry, Entry::Valid(value) if value != state.committed);
                !(idle && over && stale)
            }),
            Property::sometimes("a hold keeps somebody from filling", |_, state: &State| state.kept),
            Property::sometimes("a writer gives up while another holds", |_, state: &State| {
                state.holds.contains(&true) && state.writers.iter().any(|writer| matches!(writer, Writer::GaveUp(_)))
            }),
        ]
    }
}
