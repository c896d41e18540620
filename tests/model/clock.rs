//! How old a hit may be: deadlines computed from a node's clock that may step back, and a reader's that may not.
//!
//! Only times are left here: when S was taken, what T says of it, when a look was sent. A hit is as old as its S.

use stateright::{Model, Property};

/// `max_staleness`.
const BOUND: u8 = 1;
/// Where a run ends.
const END: u8 = 4;

#[derive(Clone, Debug)]
pub struct Clocks {
    /// A T ahead of the node's clock gives no trust.
    pub none_ahead: bool,
    /// Which T a connection believes.
    pub believes: Believes,
    /// Looks at one T never give more time than an earlier look at it did.
    pub never_grows: bool,
    /// A round whose runner waited longer than the node's clock says is refused.
    pub measured: bool,
    /// How far the node's clock steps back, once.
    pub step: u8,
}

impl Clocks {
    pub const SOUND: Self =
        Self { none_ahead: true, believes: Believes::Later, never_grows: true, measured: true, step: 2 };
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Believes {
    /// Any.
    Any,
    /// Those that it has seen move.
    Moved,
    /// Those that were taken after its first look, by a clock that did not step back since as far as it can see.
    Later,
}

/// Moments of true time but for `t`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Control {
    pub t: u8,
    pub s: u8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Round {
    pub began: u8,
    pub next: Control,
    pub snapshot: bool,
}

/// What one look found, and what it gave.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Look {
    pub sent: u8,
    pub clock: u8,
    pub t: u8,
    pub deadline: Option<u8>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Reader {
    /// When the look under way was sent.
    pub sent: Option<u8>,
    pub last: Option<Look>,
    /// This connection has seen T move.
    pub moved: bool,
    /// What the node's clock read at its first look, or at the last one that found the clock behind.
    pub first: u8,
    /// When the S was taken that the deadline is for.
    pub s: u8,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct State {
    pub now: u8,
    pub stepped: u8,
    pub control: Control,
    pub round: Option<Round>,
    pub reader: Reader,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    Tick,
    StepBack,
    Round,
    Send,
    Look,
    Reconnect,
}

impl State {
    fn clock(&self) -> u8 {
        self.now + 4 - self.stepped
    }
}

impl Clocks {
    fn apply(&self, state: &mut State, action: Action) -> Option<()> {
        let clock = state.clock();
        match action {
            Action::Tick => (state.now < END).then(|| state.now += 1),
            Action::StepBack => (state.stepped == 0 && self.step > 0).then(|| state.stepped = self.step),
            Action::Round => {
                state.round = match state.round {
                    None => {
                        let next = Control { t: clock, s: 0 };
                        Some(Round { began: state.now, next, snapshot: false })
                    }
                    Some(Round { began, next, snapshot: false }) => {
                        Some(Round { began, next: Control { s: state.now, ..next }, snapshot: true })
                    }
                    Some(Round { began, next, .. }) => {
                        let waited = state.now - began;
                        if !self.measured || clock >= next.t + waited {
                            state.control = next;
                        }
                        None
                    }
                };
                Some(())
            }
            Action::Send => state.reader.sent.is_none().then(|| state.reader.sent = Some(state.now)),
            Action::Look => {
                let sent = state.reader.sent.take()?;
                let found = (state.now, clock, state.control);
                self.look(&mut state.reader, sent, found);
                Some(())
            }
            Action::Reconnect => {
                state.reader = Reader::default();
                Some(())
            }
        }
    }

    fn look(&self, reader: &mut Reader, sent: u8, state: (u8, u8, Control)) {
        let (now, clock, Control { t, s, .. }) = state;
        let behind = |last: Look| clock - last.clock < now - last.sent;
        let before = reader.last;
        if before.is_none_or(|last| clock < last.clock || behind(last)) {
            reader.first = clock;
        }
        reader.moved |= before.is_some_and(|last| last.t != t);
        let believed = match self.believes {
            Believes::Any => true,
            Believes::Moved => reader.moved,
            Believes::Later => t > reader.first,
        };
        let age = if self.none_ahead { clock.checked_sub(t) } else { Some(clock.saturating_sub(t)) };
        let mut deadline = age.and_then(|age| (sent + BOUND).checked_sub(age)).filter(|_| believed);
        if let Some(last) = before.filter(|last| last.t == t && self.never_grows) {
            deadline = deadline.min(last.deadline);
        }
        reader.last = Some(Look { sent, clock, t, deadline });
        reader.s = if deadline.is_some() { s } else { 0 };
    }
}

impl Reader {
    fn deadline(&self) -> Option<u8> {
        self.last.and_then(|last| last.deadline)
    }
}

impl Model for Clocks {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        let control = Control { t: 4, s: 0 };
        vec![State { now: 0, stepped: 0, control, round: None, reader: Reader::default() }]
    }

    fn actions(&self, _: &State, actions: &mut Vec<Action>) {
        actions.extend([Action::Tick, Action::StepBack, Action::Round, Action::Send, Action::Look, Action::Reconnect]);
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        let mut state = last.clone();
        self.apply(&mut state, action).map(|()| state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always(super::BOUNDED, |_, state: &State| {
                let trusted = state.reader.deadline().is_some_and(|deadline| state.now <= deadline);
                !trusted || state.now - state.reader.s <= BOUND
            }),
            Property::sometimes("a hit is as old as it may be", |_, state: &State| {
                let trusted = state.reader.deadline().is_some_and(|deadline| state.now <= deadline);
                trusted && state.now - state.reader.s == BOUND
            }),
        ]
    }
}
