//! Rounds: how a memory learns what changed in the database, what it may claim afterwards, and who may trust it.
//!
//! One row and one entry; two transactions that change the row, of which the one with the lower id may well commit
//! last; two processes that run rounds and stop wherever they like; and readers, of whom only what they know
//! matters: a GET is one step, so it is enough to ask of every state what a reader would be given in it.
//!
//! A failover to a replica that missed writes is a restart with an old dump: other ids, an earlier state.

use stateright::{Model, Property};

use super::claims;
use super::database::{Database, Set, Snapshot, bit};
use super::entry::{Answer, Command, Entry, Fence};
use super::world::{LATER, NOW};

/// The rules, and how much may happen.
#[derive(Clone, Debug)]
pub struct Rounds {
    /// Otherwise only our API writes, it never dies before it invalidates, and a round only looks after the epoch.
    pub outbox: bool,
    /// A round delivers what S in the memory does not see; otherwise what happened since it looked.
    pub since_s: bool,
    /// Snapshots name the transactions that were still open.
    pub xip: bool,
    /// A round ends only on the memory where it began.
    pub one_memory: bool,
    /// Readers trust a memory only if its control key is its own.
    pub trust: bool,
    /// A memory is replaced only together with its connections: who has looked over one that lives has looked at it.
    pub breaks: bool,
    /// A memory whose S does not contain what was purged gets a new epoch.
    pub horizon: bool,
    /// A database that came back from a crash is another database.
    pub lives: bool,
    /// A resource's first reader registers it; until then nobody delivers it.
    pub registered: Registered,
    /// A control key that was evicted is put back by those who saw it; otherwise it is made anew, with a new epoch.
    pub puts_back: bool,
    /// A control key that is made anew goes on with numbers that nobody has seen.
    pub unique: bool,
    pub transactions: usize,
    /// Rounds that may begin.
    pub looks: u8,
    /// Leases that each reader may ask for.
    pub fills: [u8; 2],
    pub restarts: u8,
    pub evictions: u8,
    pub purges: bool,
    pub crashes: u8,
    pub generations: u8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Registered {
    /// From the beginning.
    Always,
    /// With `n` counted on, so that rounds which looked before are refused.
    Counted,
    /// Without.
    Silently,
}

impl Rounds {
    pub const SOUND: Self = Self {
        outbox: true,
        since_s: true,
        xip: true,
        one_memory: true,
        trust: true,
        breaks: true,
        horizon: true,
        lives: true,
        registered: Registered::Always,
        puts_back: false,
        unique: true,
        transactions: 2,
        looks: 3,
        fills: [2, 0],
        restarts: 0,
        evictions: 0,
        purges: false,
        crashes: 0,
        generations: 0,
    };
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Control {
    pub n: u8,
    /// Every change that it sees has been delivered to this memory.
    pub s: Snapshot,
    /// What S saw when it was taken. Nobody reads it: it is the promise that the properties hold the memory to.
    pub claims: Set,
    /// Run id, replication id and role of the node that it was written on.
    pub id: u8,
    /// Epoch and generation.
    pub tag: u8,
    /// Which life of the database S is from.
    pub life: u8,
    pub registered: bool,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Memory {
    pub entry: Entry<Set>,
    pub control: Option<Control>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Plan {
    /// Nothing is left to deliver.
    Claim,
    Deliver,
    NewEpoch,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Runner {
    #[default]
    Idle,
    Looked {
        id: u8,
        control: Option<Control>,
    },
    Knows {
        id: u8,
        n: Option<u8>,
        next: Control,
        plan: Plan,
    },
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Filling {
    #[default]
    No,
    Leased {
        fence: u8,
        tag: u8,
        life: u8,
    },
    Loaded {
        fence: u8,
        tag: u8,
        value: Set,
    },
}

/// A process that reads: what its last look over the present connection said, and the fill that it is about.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Reader {
    pub look: Option<Control>,
    pub filling: Filling,
    pub fills: u8,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct State {
    pub database: Database,
    pub memory: Memory,
    pub id: u8,
    pub dump: Option<Memory>,
    pub runners: [Runner; 2],
    pub readers: [Reader; 2],
    /// The last tag that was drawn.
    pub tags: u8,
    pub rounds: u8,
    pub evictions: u8,
    pub generations: u8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Takes an id, and changes the row later.
    Begin(usize),
    Commit(usize),
    /// By the API, after its commit. If it never comes the writer died, or was none of ours.
    Invalidate(usize),
    Purge,
    Crash,
    /// One step of a round: look, ask the database, deliver, claim.
    Round(usize),
    /// A round that has too much to deliver gives the resource a new generation instead.
    Generation(usize),
    Look(usize),
    Register(usize),
    /// One step of a fill: lease, load, store.
    Fill(usize),
    Evict,
    EvictControl,
    PutBack(usize),
    /// The dump is written, or a replica falls behind.
    Save,
    Restart {
        empty: bool,
    },
}

impl Rounds {
    fn apply(&self, state: &mut State, action: Action) -> Option<()> {
        match action {
            Action::Begin(index) => state.database.begin(index).filter(|()| index < self.transactions),
            Action::Commit(index) => state.database.commit(index),
            Action::Invalidate(index) => {
                let done = state.database.committed() & !state.database.acknowledged & bit(index);
                (done != 0).then(|| {
                    state.database.acknowledged |= done;
                    state.tell(Command::Invalidate);
                })
            }
            Action::Purge => state.database.purge().filter(|()| self.purges),
            Action::Crash => state.database.crash().filter(|()| state.database.life <= self.crashes),
            Action::Round(index) => {
                let runner = std::mem::take(&mut state.runners[index]);
                state.runners[index] = self.round(state, runner)?;
                Some(())
            }
            Action::Generation(index) => {
                let Runner::Knows { plan: plan @ Plan::Deliver, .. } = &mut state.runners[index] else { return None };
                if state.generations == self.generations {
                    return None;
                }
                *plan = Plan::Claim;
                state.generations += 1;
                state.tags += 1;
                state.memory.control.as_mut()?.tag = state.tags;
                Some(())
            }
            Action::Look(index) => {
                let own = |control: &Control| control.id == state.id || !self.trust;
                let mut look = state.memory.control.filter(own);
                if let (Some(look), false) = (&mut look, self.puts_back) {
                    // Only who puts it back needs the rest.
                    *look = Control { n: 0, s: Snapshot::default(), id: 0, ..*look };
                }
                let news = look != state.readers[index].look;
                news.then(|| state.readers[index].look = look)
            }
            Action::Register(index) => {
                state.readers[index].look?;
                let control = state.memory.control.as_mut()?;
                if control.registered || control.id != state.id || self.fills[index] == 0 {
                    return None;
                }
                control.registered = true;
                control.n += u8::from(self.registered == Registered::Counted);
                state.readers[index].look = None;
                Some(())
            }
            Action::Fill(index) => {
                let reader = std::mem::take(&mut state.readers[index]);
                state.readers[index] = self.fill(state, reader, index)?;
                Some(())
            }
            Action::Evict => (state.tell(Command::Evict) == Answer::Done).then_some(()),
            Action::EvictControl => {
                if state.evictions == self.evictions {
                    return None;
                }
                state.evictions += 1;
                state.memory.control.take().map(drop)
            }
            Action::PutBack(index) => {
                let seen = state.readers[index].look.filter(|_| self.puts_back)?;
                state.memory.control.is_none().then(|| state.memory.control = Some(seen))
            }
            Action::Save => {
                (state.dump.is_none() && state.id < self.restarts).then(|| state.dump = Some(state.memory.clone()))
            }
            Action::Restart { empty } => {
                if state.id == self.restarts {
                    return None;
                }
                state.memory = if empty { Memory::default() } else { state.dump.clone()? };
                state.id += 1;
                // Connections break, and trust with them. Rounds are left alone: they must end well by themselves.
                for reader in state.readers.iter_mut().filter(|_| self.breaks) {
                    reader.look = None;
                }
                Some(())
            }
        }
    }

    fn round(&self, state: &mut State, runner: Runner) -> Option<Runner> {
        let State { database, memory, .. } = state;
        Some(match runner {
            Runner::Idle => {
                let mut control = memory.control;
                if state.rounds == self.looks || !self.outbox && control.is_some_and(|control| control.id == state.id) {
                    return None;
                }
                state.rounds += 1;
                if let (Some(control), false) = (&mut control, self.since_s) {
                    control.s = database.snapshot(self.xip);
                }
                // What only others need would tell apart what is the same.
                let control = control.map(|control| Control { tag: 0, claims: 0, id: 0, ..control });
                Runner::Looked { id: state.id, control }
            }
            Runner::Looked { id, control } => {
                let (life, claims) = (database.life, if self.outbox { database.committed() } else { 0 });
                let old = control.unwrap_or_default();
                let other = life != old.life;
                // Without knowledge of its lives: a connection that is new counts from an older snapshot.
                let owed = database.owed(if other { Snapshot::default() } else { old.s });
                let lost = self.horizon && database.owed(old.s) & database.purged != 0;
                let plan = if control.is_none() || lost || other && self.lives || !self.outbox {
                    Plan::NewEpoch
                } else if owed & !database.purged != 0 && old.registered {
                    Plan::Deliver
                } else {
                    Plan::Claim
                };
                let n = control.map(|control| control.n);
                let (n_next, s) = (n.map_or(0, |n| n + 1), database.snapshot(self.xip));
                let next = Control { n: n_next, s, claims, life, ..Control::default() };
                Runner::Knows { id, n, next, plan }
            }
            Runner::Knows { id, n, next, plan: Plan::Deliver } => {
                state.tell(Command::Invalidate);
                Runner::Knows { id, n, next, plan: Plan::Claim }
            }
            Runner::Knows { id, n, next, plan } => {
                let same = state.memory.control.map(|control| control.n) == n;
                if same && (id == state.id || !self.one_memory) {
                    let now = state.memory.control.unwrap_or_default();
                    // Epoch and generations are not the round's to rewrite, and others may have registered.
                    let mut control = Control { id: state.id, tag: now.tag, registered: now.registered, ..next };
                    if plan == Plan::NewEpoch {
                        state.tags += 1;
                        control.tag = state.tags;
                    }
                    if n.is_none() {
                        control.n = if self.unique { 16 * state.tags } else { 0 };
                        control.registered = self.registered == Registered::Always;
                    }
                    state.memory.control = Some(control);
                }
                Runner::Idle
            }
        })
    }

    fn fill(&self, state: &mut State, mut reader: Reader, index: usize) -> Option<Reader> {
        reader.filling = match reader.filling {
            Filling::No => {
                let look = reader.look.filter(|look| look.registered)?;
                reader.fills += 1;
                let fence = 2 * reader.fills + u8::from(index == 1);
                let lease = Command::Lease {
                    fence: fence.into(),
                    tag: look.tag.into(),
                    lock: LATER,
                    spare: 0,
                    refreshes: None,
                };
                let leased = reader.fills <= self.fills[index] && matches!(state.tell(lease), Answer::Fill { .. });
                leased.then_some(Filling::Leased { fence, tag: look.tag, life: look.life })?
            }
            Filling::Leased { life, .. } if self.lives && life != state.database.life => Filling::No,
            Filling::Leased { fence, tag, .. } => Filling::Loaded { fence, tag, value: state.database.committed() },
            Filling::Loaded { fence, tag, value } => {
                state.tell(filled(fence, tag, value));
                Filling::No
            }
        };
        Some(reader)
    }
}

pub fn filled(fence: u8, tag: u8, value: Set) -> Command<Set> {
    Command::Fill { fence: Fence::from(fence), tag: tag.into(), value, ttl: LATER, grace: LATER }
}

impl State {
    pub fn tell(&mut self, command: Command<Set>) -> Answer<Set> {
        let (entry, answer) = std::mem::take(&mut self.memory.entry).step(NOW, command);
        self.memory.entry = entry;
        answer
    }
}

impl Model for Rounds {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        let registered = self.registered == Registered::Always;
        let control = Some(Control { registered, ..Control::default() });
        vec![State { memory: Memory { entry: Entry::Absent, control }, ..State::default() }]
    }

    fn actions(&self, _: &State, actions: &mut Vec<Action>) {
        for index in 0..2 {
            actions.extend([Action::Begin(index), Action::Commit(index), Action::Invalidate(index)]);
            actions.extend([Action::Round(index), Action::Generation(index)]);
            if self.fills[index] > 0 || self.puts_back {
                actions.extend([
                    Action::Look(index),
                    Action::Register(index),
                    Action::Fill(index),
                    Action::PutBack(index),
                ]);
            }
        }
        actions.extend([Action::Purge, Action::Crash, Action::Evict, Action::EvictControl]);
        actions.extend([Action::Save, Action::Restart { empty: true }, Action::Restart { empty: false }]);
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        let mut state = last.clone();
        self.apply(&mut state, action)?;
        // Runners have no names.
        state.runners.sort_unstable();
        Some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        claims::properties(self)
    }
}
