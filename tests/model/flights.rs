//! Three readers of one process, who share what a flight brings, over a memory that may come back with an old dump.
//! Who may join, and what a landing is good for.

use stateright::{Model, Property};

use super::entry::{Answer, Command, Entry, Fence, Tag};
use super::world::{LATER, World};

#[derive(Clone, Debug)]
pub struct Flights {
    /// Whoever boards gets what the flight brings.
    pub shared: bool,
    /// A stored fill is proof that nothing was invalidated since its lease, only if both went to one memory.
    pub one_memory: bool,
    /// What changes drops the generation of a group that the entry depends on, and leaves the entry's own fence alone.
    pub grouped: bool,
    /// A stored fill is proof only if the generations are still those of its lease.
    pub same_tag: bool,
    pub readers: usize,
    /// Restarts that may happen.
    pub restarts: u8,
}

impl Flights {
    pub const SOUND: Self =
        Self { shared: false, one_memory: true, grouped: false, same_tag: true, readers: 3, restarts: 0 };
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Passenger {
    /// Reads still to begin.
    Idle(u8),
    Asked {
        left: u8,
        floor: u8,
    },
    Missed {
        left: u8,
        floor: u8,
    },
    Aboard {
        left: u8,
        floor: u8,
        step: u8,
    },
}

/// A command is sent, and is executed some time later; who boards in between is late.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stage {
    Gathering,
    LeaseSent {
        covers: u8,
    },
    Leased,
    LoadSent {
        covers: u8,
    },
    Loaded {
        covers: u8,
        value: u8,
    },
    FillSent {
        covers: u8,
        late: u8,
        value: u8,
    },
    /// Over, in the same step.
    Landing {
        covers: u8,
        value: u8,
    },
}

/// The right to fill, and which life of the memory gave it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ticket {
    pub fence: Fence,
    pub tag: Tag,
    pub life: u8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Flight {
    pub step: u8,
    pub stage: Stage,
    pub ticket: Option<Ticket>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct State {
    pub world: World,
    pub readers: Vec<Passenger>,
    pub flight: Option<Flight>,
    /// The last fence that was drawn.
    pub fence: u8,
    /// The memory's restarts, and its epoch.
    pub life: u8,
    pub epoch: Tag,
    /// After a restart, until a look has found other ids and begun a new epoch.
    pub trusted: bool,
    pub dump: Option<Entry<u8>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    Read(usize),
    /// Boards without a look at the cache.
    Skip(usize),
    Fly,
    Commit(usize),
    Invalidate(usize),
    Evict,
    SoftEnds,
    /// Another process fills the entry.
    Others,
    Save,
    Restart,
    NewEpoch,
}

impl Flights {
    fn apply(&self, state: &mut State, action: Action) -> Option<()> {
        match action {
            Action::Read(index) => state.read(index),
            Action::Skip(index) => {
                let Passenger::Asked { left, floor } = state.readers[index] else { return None };
                state.readers[index] = Passenger::Missed { left, floor };
                state.read(index)
            }
            Action::Fly => state.fly(self),
            Action::Commit(index) => state.world.commit(index),
            Action::Invalidate(index) if self.grouped => {
                state.world.acknowledge(index)?;
                state.epoch += 1;
                Some(())
            }
            Action::Invalidate(index) => state.world.invalidate(index),
            Action::Evict => (state.world.tell(Command::Evict) == Answer::Done).then_some(()),
            Action::SoftEnds => state.world.over(true),
            Action::Others => {
                let (tag, value) = (state.epoch, state.world.committed);
                let (fence, lock, ttl, grace) = (Fence::MAX, LATER, LATER, LATER);
                let absent = state.trusted && state.world.entry == Entry::Absent;
                absent.then(|| {
                    state.world.tell(Command::Lease { fence, tag, lock, spare: 0, refreshes: None });
                    state.world.tell(Command::Fill { fence, tag, value, ttl, grace });
                })
            }
            Action::Save => {
                (self.restarts > 0 && state.dump.is_none()).then(|| state.dump = Some(state.world.entry.clone()))
            }
            Action::Restart => {
                if state.life == self.restarts {
                    return None;
                }
                state.world.entry = state.dump.clone()?;
                state.life += 1;
                state.trusted = false;
                Some(())
            }
            Action::NewEpoch => (!state.trusted).then(|| {
                state.epoch += 1;
                state.trusted = true;
            }),
        }
    }
}

impl State {
    fn read(&mut self, index: usize) -> Option<()> {
        self.readers[index] = match self.readers[index] {
            Passenger::Idle(0) | Passenger::Aboard { .. } => return None,
            Passenger::Idle(left) => Passenger::Asked { left: left - 1, floor: self.world.floor },
            Passenger::Asked { left, floor } => match self.world.tell(Command::Read { tag: self.epoch }) {
                Answer::Fresh(value) if self.trusted => {
                    self.world.serve(floor, value);
                    Passenger::Idle(left)
                }
                _ => Passenger::Missed { left, floor },
            },
            Passenger::Missed { left, floor } => {
                let new = Flight { step: 0, stage: Stage::Gathering, ticket: None };
                let step = self.flight.get_or_insert(new).step;
                Passenger::Aboard { left, floor, step }
            }
        };
        Some(())
    }

    fn fly(&mut self, rules: &Flights) -> Option<()> {
        let mut flight = self.flight.take()?;
        flight.stage = match flight.stage {
            Stage::Gathering => Stage::LeaseSent { covers: flight.advance() },
            Stage::LeaseSent { .. } if !self.trusted => Stage::Leased,
            Stage::LeaseSent { covers } => {
                self.fence += 1;
                let ticket = Ticket { fence: self.fence.into(), tag: self.epoch, life: self.life };
                match self.world.tell(Command::Lease {
                    fence: ticket.fence,
                    tag: ticket.tag,
                    lock: LATER,
                    spare: 0,
                    refreshes: None,
                }) {
                    Answer::Hit(value) | Answer::Wait { stale: Some(value) } => Stage::Landing { covers, value },
                    Answer::Fill { .. } => {
                        flight.ticket = Some(ticket);
                        Stage::Leased
                    }
                    // Patience is over at once: a poll is a lease to this model.
                    _ => Stage::Leased,
                }
            }
            Stage::Leased => Stage::LoadSent { covers: flight.advance() },
            landing @ Stage::Landing { .. } => landing,
            Stage::LoadSent { covers } => Stage::Loaded { covers, value: self.world.committed },
            Stage::Loaded { covers, value } if flight.ticket.is_none() => Stage::Landing { covers, value },
            Stage::Loaded { covers, value } => Stage::FillSent { covers, late: flight.advance(), value },
            Stage::FillSent { covers, late, value } => {
                let Ticket { fence, tag, life } = flight.ticket?;
                let stored = self.world.tell(Command::Fill { fence, tag, value, ttl: LATER, grace: LATER });
                let same = tag == self.epoch || !rules.same_tag;
                let believed = self.trusted && same && (life == self.life || !rules.one_memory);
                let covers = if stored == Answer::Stored && believed { late } else { covers };
                Stage::Landing { covers, value }
            }
        };
        match flight.stage {
            Stage::Landing { covers, value } => self.land(rules, covers, value),
            _ => self.flight = Some(flight),
        }
        Some(())
    }

    /// Serves those whom the landing covers; the others ask again.
    fn land(&mut self, rules: &Flights, covers: u8, value: u8) {
        for passenger in &mut self.readers {
            if let Passenger::Aboard { left, floor, step } = *passenger {
                *passenger = if step < covers || rules.shared {
                    self.world.serve(floor, value);
                    Passenger::Idle(left)
                } else {
                    Passenger::Asked { left, floor }
                };
            }
        }
    }

    /// Somebody is aboard who came too late for what was loaded.
    fn late(&self, sent: bool) -> bool {
        let (Some(flight), true) = (&self.flight, self.trusted) else { return false };
        let Stage::FillSent { covers, late, .. } = flight.stage else { return false };
        let kept = matches!((&self.world.entry, flight.ticket), (Entry::Pending { fence, .. }, Some(ticket))
            if *fence == ticket.fence);
        let step = if sent { late } else { covers };
        kept && self.readers.iter().any(|reader| matches!(reader, Passenger::Aboard { step: at, .. } if *at == step))
    }
}

impl Flight {
    /// Before a command is sent whose reply may be shared: who is aboard now may have it.
    fn advance(&mut self) -> u8 {
        self.step += 1;
        self.step
    }
}

impl Model for Flights {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        let readers = vec![Passenger::Idle(1); self.readers];
        let world = World::default();
        vec![State { world, readers, flight: None, fence: 0, life: 0, epoch: 0, trusted: true, dump: None }]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        if state.world.broken {
            return;
        }
        actions.extend((0..self.readers).flat_map(|index| [Action::Read(index), Action::Skip(index)]));
        actions.extend((0..2).flat_map(|index| [Action::Commit(index), Action::Invalidate(index)]));
        actions.extend([Action::Fly, Action::Evict, Action::SoftEnds, Action::Others]);
        actions.extend([Action::Save, Action::Restart, Action::NewEpoch]);
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        let mut state = last.clone();
        self.apply(&mut state, action)?;
        // Readers have no names.
        state.readers.sort_unstable();
        Some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always(super::ACKNOWLEDGED, |_, state: &State| !state.world.broken),
            Property::sometimes("who came before a stored fill was sent shares it", |_, state: &State| {
                state.late(false)
            }),
            Property::sometimes("who came after it was sent asks again", |_, state: &State| state.late(true)),
        ]
    }
}
