//! Two processes that read one entry, and two commits whose invalidations come late, twice, or after their writer's
//! death by a round. What a fence is for.

use stateright::{Model, Property};

use super::entry::{Answer, Command, Fence};
use super::reader::{Reader, Rules, SOUND, Step};
use super::world::{LATER, World};

#[derive(Clone, Debug)]
pub struct Fills {
    pub rules: Rules,
    /// A lost reply makes the client library send a lease again; its twin arrives whenever it likes.
    pub resends: bool,
}

impl Fills {
    pub const SOUND: Self = Self { rules: SOUND, resends: false };
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct State {
    pub world: World,
    pub readers: [Reader; 2],
    /// A lease's twin that is still on its way.
    pub twin: Option<Fence>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    Read(usize),
    Turn(usize),
    Commit(usize),
    Die(usize),
    Invalidate(usize),
    Resend(usize),
    TwinArrives,
    /// Eviction, a lock's end, a TTL's end, and an invalidation that comes twice: all are the same to the entry.
    Evict,
    SoftEnds,
    RefreshEnds,
}

impl Fills {
    fn apply(&self, state: &mut State, action: Action) -> Option<()> {
        let State { world, readers, twin } = state;
        match action {
            Action::Read(index) => readers[index].go(index, self.rules, world),
            Action::Turn(index) => readers[index].turn(index, self.rules, world),
            Action::Commit(index) => world.commit(index),
            Action::Die(index) => world.die(index),
            Action::Invalidate(index) => world.invalidate(index),
            Action::Resend(index) => {
                let sent = matches!(readers[index].step, Step::Loading { leased: true, .. });
                (self.resends && twin.is_none() && sent).then(|| *twin = Some(readers[index].fence(index, self.rules)))
            }
            Action::TwinArrives => {
                let fence = twin.take()?;
                world.tell(Command::Lease { fence, tag: 0, lock: LATER, spare: 0, refreshes: None });
                Some(())
            }
            Action::Evict => {
                world.tell(Command::Evict);
                Some(())
            }
            Action::SoftEnds => world.over(true),
            Action::RefreshEnds => world.over(false),
        }
    }
}

impl State {
    /// Everything that was begun has come to its end.
    fn quiet(&self) -> bool {
        self.twin.is_none() && self.readers.iter().all(|reader| reader.step == Step::Idle) && self.world.settled()
    }
}

impl Model for Fills {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        let readers = [Reader::new(2), Reader::new(2)];
        vec![State { world: World::default(), readers, twin: None }]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        if state.world.broken {
            return;
        }
        for index in 0..2 {
            actions.extend([Action::Read(index), Action::Turn(index), Action::Resend(index)]);
            actions.extend([Action::Commit(index), Action::Die(index), Action::Invalidate(index)]);
        }
        actions.extend([Action::TwinArrives, Action::Evict, Action::SoftEnds, Action::RefreshEnds]);
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        let mut state = last.clone();
        self.apply(&mut state, action).map(|()| state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always(super::QUIET, |_, state: &State| {
                !state.quiet() || state.world.value().is_none_or(|value| value == state.world.committed)
            }),
            Property::always(super::ACKNOWLEDGED, |_, state: &State| !state.world.broken),
            Property::sometimes("an old row is fenced", |model, state: &State| {
                state.refusing(&Answer::Fenced, model.rules)
            }),
            Property::sometimes("an old row comes to nothing", |model, state: &State| {
                state.refusing(&Answer::Gone, model.rules)
            }),
            Property::sometimes("a hit is newest", |_, state: &State| state.quiet() && state.world.value() == Some(2)),
        ]
    }
}

impl State {
    fn refusing(&self, refused: &Answer<u8>, rules: Rules) -> bool {
        self.readers.iter().enumerate().any(|(index, reader)| reader.will_be(refused, index, rules, &self.world))
    }
}
