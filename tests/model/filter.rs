//! A filter of existing keys in a process: built from the database key by key, and told of every batch of the node since
//! before the first of them was read.
//!
//! Two keys, in their order. A round that changes both may say "anything". Some rows come in a way that nobody captures; then
//! somebody purges the resource. The node is taken as sound, so that all that can go wrong is the filter's.

use stateright::{Model, Property};

const KEYS: [u8; 2] = [1, 2];

#[derive(Clone, Copy, Debug)]
#[expect(clippy::struct_excessive_bools, reason = "one for each rule")]
pub struct Filters {
    /// It is told of batches from before the first key is read; otherwise once it has all.
    pub registered_first: bool,
    /// Epoch and generation are noted before the first key is read, and compared when it answers.
    pub tagged_first: bool,
    pub compares_tags: bool,
    /// It answers only while the tier knows to be current enough.
    pub deadline: bool,
    /// A batch that is missing takes it away.
    pub complete: bool,
    /// Numbers are those of one life of the node.
    pub whose: bool,
    /// This process's own writes go into what is being built, too.
    pub own: bool,
    /// Batches of these keys say "anything".
    pub any: u8,
    pub commits: u8,
    pub rounds: u8,
    pub restarts: u8,
    pub loads: u8,
}

impl Filters {
    pub const SOUND: Self = Self {
        registered_first: true,
        tagged_first: true,
        compares_tags: true,
        deadline: true,
        complete: true,
        whose: true,
        own: true,
        any: 3,
        commits: 3,
        rounds: 3,
        restarts: 0,
        loads: 0,
    };
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Control {
    pub life: u8,
    pub generation: u8,
    /// How many rounds, and how many batches.
    pub round: u8,
    pub batch: u8,
    /// The version of the database that all changes were delivered of.
    pub s: u8,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Node {
    pub control: Control,
    /// The last batch: its number and keys. Those before are gone.
    pub stream: (u8, u8),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Round {
    pub from: Control,
    pub s: u8,
    pub keys: u8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Built {
    pub keys: u8,
    pub generation: u8,
    /// How many keys of the database were read.
    pub read: usize,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct State {
    /// The rows of each version of the database, and what changed in it.
    pub rows: [u8; 6],
    pub changed: [u8; 6],
    pub version: u8,
    /// The version of a second ago.
    pub old: u8,
    pub commits: u8,
    /// Rows that nobody was told of.
    pub loaded: u8,
    pub loads: u8,
    /// Rows that were written by this process and are there.
    pub own: u8,
    pub node: Node,
    pub life: u8,
    pub dump: Option<Node>,
    pub round: Option<Round>,
    pub rounds: u8,
    /// No generation is ever given twice.
    pub generations: u8,
    pub tier: Control,
    /// The tier's last look is recent.
    pub trusted: bool,
    pub coming: Option<Built>,
    pub ready: Option<Built>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Somebody writes a row that was not there, or deletes one.
    Commit(u8),
    /// This process does, and tells its filters before it answers.
    Own(u8),
    Load(u8),
    Purge,
    Round,
    /// A second passes.
    Pass,
    /// The tier looks, and takes one batch.
    Look,
    Build,
    Save,
    Restart,
}

impl State {
    fn rows(&self) -> u8 {
        self.rows[usize::from(self.version)]
    }

    fn write(&mut self, key: u8, changed: u8) {
        let rows = self.rows() ^ key;
        self.version += 1;
        (self.rows[usize::from(self.version)], self.changed[usize::from(self.version)]) = (rows, changed);
        self.own &= rows;
    }

    fn tell(&mut self, keys: u8) {
        for filter in [&mut self.ready, &mut self.coming].into_iter().flatten() {
            filter.keys |= keys;
        }
    }

    fn clear(&mut self) {
        (self.ready, self.coming) = (None, None);
    }

    /// It was there in every version of the last second.
    fn stays(&self, key: u8) -> bool {
        (self.old..=self.version).all(|version| self.rows[usize::from(version)] & key != 0)
    }
}

impl Filters {
    /// Whether the process says that there is no such row.
    fn denies(&self, state: &State, key: u8) -> bool {
        let trusted = state.trusted || !self.deadline;
        trusted
            && state.ready.is_some_and(|filter| {
                (filter.generation == state.tier.generation || !self.compares_tags) && filter.keys & key == 0
            })
    }

    fn apply(&self, state: &mut State, action: Action) -> Option<()> {
        match action {
            Action::Commit(key) | Action::Own(key) => {
                if state.commits == self.commits {
                    return None;
                }
                state.commits += 1;
                state.write(key, key);
                if let (Action::Own(_), true) = (action, state.rows() & key != 0) {
                    state.own |= key;
                    if let Some(ready) = &mut state.ready {
                        ready.keys |= key;
                    }
                    if let Some(coming) = state.coming.as_mut().filter(|_| self.own) {
                        coming.keys |= key;
                    }
                }
            }
            Action::Load(key) => {
                if state.loads == self.loads || state.rows() & key != 0 {
                    return None;
                }
                (state.loads, state.loaded) = (state.loads + 1, key);
            }
            Action::Purge => {
                let key = std::mem::take(&mut state.loaded);
                if key == 0 {
                    return None;
                }
                // What was promised begins here: the row counts from now on.
                if state.rows() & key == 0 {
                    state.write(key, 0);
                }
                state.generations += 1;
                state.node.control.generation = state.generations;
            }
            Action::Round => return self.round(state),
            Action::Pass => {
                if state.old == state.version && !state.trusted {
                    return None;
                }
                (state.old, state.trusted) = (state.version, false);
            }
            Action::Look => return self.look(state),
            Action::Build => self.build(state),
            Action::Save => {
                if state.dump.is_some() || state.life == self.restarts {
                    return None;
                }
                state.dump = Some(state.node.clone());
            }
            Action::Restart => {
                if state.life == self.restarts {
                    return None;
                }
                state.node = state.dump.clone()?;
                state.life += 1;
            }
        }
        Some(())
    }

    fn round(&self, state: &mut State) -> Option<()> {
        let Some(Round { from, s, keys }) = state.round.take() else {
            if state.rounds == self.rounds {
                return None;
            }
            state.rounds += 1;
            let from = state.node.control;
            let owed = from.s + 1..=state.version;
            let keys = owed.fold(0, |keys, version| keys | state.changed[usize::from(version)]);
            state.round = Some(Round { from: Control { life: state.life, ..from }, s: state.version, keys });
            return Some(());
        };
        let control = &mut state.node.control;
        // A purge is not a round: it voids none, and what it says stays.
        if control.round != from.round || from.life != state.life {
            return Some(());
        }
        *control = Control { life: state.life, round: from.round + 1, s, ..*control };
        if keys != 0 {
            control.batch += 1;
            if keys == self.any {
                state.generations += 1;
                control.generation = state.generations;
            }
            state.node.stream = (control.batch, keys);
        }
        Some(())
    }

    fn look(&self, state: &mut State) -> Option<()> {
        // Until a round has found out what it missed, a node that went back is not believed.
        let there = state.node.control;
        if there.life != state.life || (state.tier == there && state.trusted) {
            return None;
        }
        let known = there.life == state.tier.life || !self.whose;
        let (last, keys) = state.node.stream;
        if known && there.batch == state.tier.batch {
        } else if known && there.batch == state.tier.batch + 1 && last == there.batch && keys != self.any {
            if self.registered_first {
                state.tell(keys);
            } else if let Some(ready) = &mut state.ready {
                ready.keys |= keys;
            }
        } else if self.complete || !known || keys == self.any {
            state.clear();
        }
        (state.tier, state.trusted) = (there, there.s >= state.old);
        Some(())
    }

    fn build(&self, state: &mut State) {
        let rows = state.rows() | state.loaded;
        let generation = state.tier.generation;
        match &mut state.coming {
            None => state.coming = Some(Built { keys: 0, generation, read: 0 }),
            Some(coming) if coming.read < KEYS.len() => {
                coming.keys |= rows & KEYS[coming.read];
                coming.read += 1;
            }
            Some(coming) => {
                if !self.tagged_first {
                    coming.generation = generation;
                }
                state.ready = state.coming.take();
            }
        }
    }
}

impl Model for Filters {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        vec![State::default()]
    }

    fn actions(&self, _: &State, actions: &mut Vec<Action>) {
        for key in KEYS {
            actions.extend([Action::Commit(key), Action::Own(key), Action::Load(key)]);
        }
        actions.extend([Action::Purge, Action::Round, Action::Pass, Action::Look, Action::Build]);
        actions.extend([Action::Save, Action::Restart]);
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        let mut state = last.clone();
        self.apply(&mut state, action).map(|()| state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always(super::DENIED, |model: &Self, state: &State| {
                KEYS.iter().all(|key| !(model.denies(state, *key) && state.stays(*key)))
            }),
            Property::always(super::OWN, |model: &Self, state: &State| {
                KEYS.iter().all(|key| !(model.denies(state, *key) && state.own & key != 0))
            }),
            Property::sometimes("a row that is there is denied for a moment", |model: &Self, state: &State| {
                KEYS.iter().any(|key| model.denies(state, *key) && state.rows() & key != 0)
            }),
            Property::sometimes("a key that is in no row is asked for", |model: &Self, state: &State| {
                let known = |key: &u8| state.ready.is_some() && state.trusted && !model.denies(state, *key);
                KEYS.iter().any(|key| known(key) && state.rows() & key == 0)
            }),
            Property::sometimes("a filter outlives a batch", |model: &Self, state: &State| {
                state.tier.batch > 0 && KEYS.iter().any(|key| model.denies(state, *key))
            }),
        ]
    }
}
