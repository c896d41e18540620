//! The tier in a process: a memory in front of a memory, filled from what the node holds and kept up with its batches.
//!
//! The node is taken as sound here (its fills are one step), so that all that can go wrong is the tier's.

use stateright::{Model, Property};

#[derive(Clone, Debug)]
pub struct Tiers {
    /// What was read from the node is kept only if the tier is still where it was before that read.
    pub noted: bool,
    /// "Where" is more than a number: whose number it is counts too.
    pub whose: bool,
    /// A control key that was evicted is put back as somebody saw it; otherwise it is made anew, with a new epoch.
    pub puts_back: bool,
    pub restarts: u8,
    pub rounds: u8,
    pub commits: u8,
}

impl Tiers {
    pub const SOUND: Self = Self { noted: true, whose: true, puts_back: false, restarts: 0, rounds: 4, commits: 2 };
}

/// Which state of which memory: its life (the ids), its epoch, and how many rounds it has seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Place {
    pub life: u8,
    pub epoch: u8,
    pub n: u8,
}

/// A place and the version that S saw there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Control {
    pub place: Place,
    pub s: u8,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Batch {
    pub n: u8,
    pub s: u8,
    /// The key is in it.
    pub changed: bool,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Node {
    pub control: Option<Control>,
    /// Version and epoch.
    pub value: Option<(u8, u8)>,
    /// The last batches.
    pub stream: [Batch; 2],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Round {
    pub from: Place,
    pub s: u8,
    pub changed: bool,
    pub delivered: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Insert {
    #[default]
    No,
    Noted(Place),
    Read(Place, u8),
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct State {
    pub committed: u8,
    pub node: Node,
    pub life: u8,
    pub dump: Option<Node>,
    pub round: Option<Round>,
    pub rounds: u8,
    pub tier: Control,
    pub kept: Option<u8>,
    pub insert: Insert,
    /// What another process's last look said.
    pub seen: Option<Control>,
    pub evicted: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    Commit,
    Round,
    /// The node's entry is filled, or lost, or invalidated by a writer.
    Fill,
    Forget,
    /// The tier looks, and takes one batch.
    Advance,
    Insert,
    See,
    EvictControl,
    PutBack,
    Save,
    Restart,
}

impl Tiers {
    fn apply(&self, state: &mut State, action: Action) -> Option<()> {
        let State { node, .. } = state;
        match action {
            Action::Commit => (state.committed < self.commits).then(|| state.committed += 1),
            Action::Round => self.round(state),
            Action::Fill => {
                let epoch = node.control?.place.epoch;
                let usable = node.value.is_some_and(|(_, tag)| tag == epoch);
                (!usable).then(|| node.value = Some((state.committed, epoch)))
            }
            Action::Forget => node.value.take().map(drop),
            Action::Advance => {
                let control = node.control.filter(|control| control.place.life == state.life)?;
                let (tier, there) = (state.tier.place, control.place);
                let next = node.stream.iter().find(|batch| batch.n == tier.n + 1);
                match next {
                    _ if tier == there => return None,
                    Some(batch) if (tier.life, tier.epoch) == (there.life, there.epoch) && tier.n < there.n => {
                        state.tier = Control { place: Place { n: batch.n, ..tier }, s: batch.s };
                        state.kept = state.kept.filter(|_| !batch.changed);
                    }
                    _ => (state.tier, state.kept) = (control, None),
                }
                Some(())
            }
            Action::Insert => {
                state.insert = match state.insert {
                    Insert::No => Insert::Noted(state.tier.place),
                    Insert::Noted(place) if place.life != state.life => Insert::No,
                    Insert::Noted(place) => match node.value {
                        Some((value, epoch)) if epoch == place.epoch => Insert::Read(place, value),
                        _ => Insert::No,
                    },
                    Insert::Read(place, value) => {
                        let there = state.tier.place;
                        let same = if self.whose { place == there } else { place.n == there.n };
                        if same || !self.noted {
                            state.kept = Some(value);
                        }
                        Insert::No
                    }
                };
                Some(())
            }
            Action::See => {
                let control = node.control.filter(|_| self.puts_back && state.seen.is_none())?;
                state.seen = Some(control);
                Some(())
            }
            Action::EvictControl => {
                if state.evicted {
                    return None;
                }
                state.evicted = true;
                node.control.take().map(drop)
            }
            Action::PutBack => {
                let seen = state.seen.filter(|seen| node.control.is_none() && seen.place.life == state.life)?;
                node.control = Some(seen);
                Some(())
            }
            Action::Save => {
                (state.dump.is_none() && state.life < self.restarts).then(|| state.dump = Some(node.clone()))
            }
            Action::Restart => {
                if state.life == self.restarts {
                    return None;
                }
                *node = state.dump.clone()?;
                state.life += 1;
                Some(())
            }
        }
    }

    fn round(&self, state: &mut State) -> Option<()> {
        let node = &mut state.node;
        let Some(round) = &mut state.round else {
            if state.rounds == self.rounds {
                return None;
            }
            state.rounds += 1;
            if let Some(control) = node.control {
                let from = Place { life: state.life, ..control.place };
                let changed = state.committed > control.s;
                state.round = Some(Round { from, s: state.committed, changed, delivered: !changed });
            } else if !self.puts_back {
                // Its batches go with it: their numbers begin again.
                let place = Place { life: state.life, epoch: state.rounds, n: 0 };
                node.control = Some(Control { place, s: state.committed });
                node.stream = [Batch::default(); 2];
            }
            return Some(());
        };
        if !round.delivered {
            round.delivered = true;
            node.value = None;
            return Some(());
        }
        let Round { from, s, changed, .. } = *round;
        state.round = None;
        let control = node.control.as_mut()?;
        if from.n == control.place.n && from.life == state.life {
            let n = from.n + 1;
            let epoch = control.place.epoch;
            *control = Control { place: Place { life: state.life, epoch, n }, s };
            node.stream = [node.stream[1], Batch { n, s, changed }];
        }
        Some(())
    }
}

impl Model for Tiers {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        vec![State { node: Node { control: Some(Control::default()), ..Node::default() }, ..State::default() }]
    }

    fn actions(&self, _: &State, actions: &mut Vec<Action>) {
        actions.extend([Action::Commit, Action::Round, Action::Fill, Action::Forget, Action::Advance, Action::Insert]);
        actions.extend([Action::See, Action::EvictControl, Action::PutBack, Action::Save, Action::Restart]);
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        let mut state = last.clone();
        self.apply(&mut state, action).map(|()| state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always(super::TIER, |_, state: &State| state.kept.is_none_or(|value| value >= state.tier.s)),
            Property::sometimes("a tier keeps what is older than the database", |_, state: &State| {
                state.kept.is_some_and(|value| value < state.committed)
            }),
            Property::sometimes("what was read comes too late to be kept", |_, state: &State| {
                let Insert::Read(place, value) = state.insert else { return false };
                place != state.tier.place && value < state.tier.s
            }),
            Property::sometimes("numbers begin again", |_, state: &State| {
                state.node.control.is_some_and(|control| control.place.n < state.tier.place.n)
            }),
        ]
    }
}
