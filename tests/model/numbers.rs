//! How old a hit may be, told by numbers and the reader's own clock alone: for a memory whose clock is too coarse.
//!
//! Every write of the control key counts its number up, and goes through only if nobody has written since it was read. A
//! round reads it, then takes its S, then writes. A reader who is shown number r knows that its S is younger than his last
//! look that saw r − 2 or less.

use stateright::{Model, Property};

/// `max_staleness`: at once, so that a moment more is too long.
const BOUND: u8 = 0;
/// Where a run ends.
const END: u8 = 1;

#[derive(Clone, Debug)]
pub struct Numbers {
    /// So much less than a round's number proves that its S is younger.
    pub least: u8,
    /// What a look saw is dated by when it was sent; otherwise by when its reply came.
    pub sent: bool,
    /// A round takes its S after it has looked.
    pub after: bool,
    /// A write goes through only if nobody has written since.
    pub compared: bool,
    /// Writes in all.
    pub writes: u8,
    /// How often the control key is lost.
    pub losses: u8,
    /// Rounds that may be under way.
    pub runners: usize,
}

impl Numbers {
    pub const SOUND: Self =
        Self { least: 2, sent: true, after: true, compared: true, writes: 3, losses: 0, runners: 1 };
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Control {
    pub epoch: u8,
    pub number: u8,
    /// The number under which S came, and when that was taken.
    pub round: u8,
    pub s: u8,
    /// No other value has it.
    pub cas: u8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Round {
    /// What it saw: number, epoch and which value; `None`: nothing was there.
    pub seen: Option<(u8, u8, u8)>,
    pub looked: bool,
    pub s: Option<u8>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Reader {
    /// When the look under way was sent, and what it found once it was executed.
    pub sent: Option<u8>,
    pub found: Option<Option<Control>>,
    pub epoch: u8,
    pub seen: Vec<(u8, u8)>,
    pub deadline: Option<u8>,
    /// When the S was taken that the deadline is for.
    pub s: u8,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct State {
    pub now: u8,
    pub control: Option<Control>,
    pub writes: u8,
    pub losses: u8,
    pub rounds: [Option<Round>; 2],
    pub reader: Reader,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    Tick,
    Round(usize),
    /// A registration, say: it brings no S.
    Write,
    Lose,
    Send,
    Look,
    Learn,
    Reconnect,
}

impl Numbers {
    fn apply(&self, state: &mut State, action: Action) -> Option<()> {
        match action {
            Action::Tick => (state.now < END).then(|| state.now += 1),
            Action::Round(index) => {
                let none = Round { seen: None, looked: false, s: None };
                let mut round = state.rounds[index].unwrap_or(none);
                if round.s.is_none() && (round.looked || !self.after) {
                    round.s = Some(state.now);
                } else if !round.looked {
                    round.looked = true;
                    round.seen = state.control.map(|control| (control.number, control.epoch, control.cas));
                } else {
                    state.rounds[index] = None;
                    let same = state.control.map(|control| control.cas) == round.seen.map(|(.., cas)| cas);
                    if !same && self.compared {
                        return Some(());
                    }
                    let (number, epoch, _) = round.seen.unwrap_or((0, state.writes + 1, 0));
                    let s = round.s?;
                    return self.write(state, Control { epoch, number: number + 1, round: number + 1, s, cas: 0 });
                }
                state.rounds[index] = Some(round);
                Some(())
            }
            Action::Write => {
                let control = state.control?;
                self.write(state, Control { number: control.number + 1, ..control })
            }
            Action::Lose => {
                state.losses += 1;
                (state.losses <= self.losses).then_some(())?;
                state.control.take().map(drop)
            }
            Action::Send => state.reader.sent.is_none().then(|| state.reader.sent = Some(state.now)),
            Action::Look => {
                state.reader.sent?;
                state.reader.found.is_none().then(|| state.reader.found = Some(state.control))
            }
            Action::Learn => {
                let (found, sent) = (state.reader.found.take()?, state.reader.sent.take()?);
                self.learn(&mut state.reader, found, if self.sent { sent } else { state.now });
                Some(())
            }
            Action::Reconnect => (state.reader != Reader::default()).then(|| state.reader = Reader::default()),
        }
    }

    fn write(&self, state: &mut State, control: Control) -> Option<()> {
        state.writes += 1;
        state.control = Some(Control { cas: state.writes, ..control });
        (state.writes <= self.writes).then_some(())
    }

    fn learn(&self, reader: &mut Reader, found: Option<Control>, at: u8) {
        reader.deadline = None;
        let Some(control) = found else { return };
        let went_back = reader.seen.last().is_some_and(|(last, _)| control.number < *last);
        if control.epoch != reader.epoch || went_back {
            reader.epoch = control.epoch;
            reader.seen.clear();
        }
        match reader.seen.last_mut() {
            Some((last, before)) if *last == control.number => *before = at,
            _ => reader.seen.push((control.number, at)),
        }
        let proves = |seen: &&(u8, u8)| seen.0 + self.least <= control.round;
        let base = reader.seen.iter().rev().find(proves).map(|(_, at)| *at);
        if let Some(base) = base {
            // Later rounds have higher numbers: what was before is not needed any more.
            reader.seen.retain(|(_, at)| *at >= base);
        }
        reader.deadline = base.map(|base| base + BOUND);
        reader.s = if base.is_some() { control.s } else { 0 };
    }
}

impl Model for Numbers {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        let control = Some(Control { epoch: 0, number: 0, round: 0, s: 0, cas: 0 });
        let reader = Reader::default();
        vec![State { now: 0, control, writes: 0, losses: 0, rounds: [None; 2], reader }]
    }

    fn actions(&self, _: &State, actions: &mut Vec<Action>) {
        actions.extend((0..self.runners).map(Action::Round));
        actions.extend([Action::Tick, Action::Write, Action::Lose]);
        actions.extend([Action::Send, Action::Look, Action::Learn, Action::Reconnect]);
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        let mut state = last.clone();
        self.apply(&mut state, action)?;
        // Runners have no names.
        state.rounds.sort_unstable();
        Some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always(super::BOUNDED, |_, state: &State| {
                let trusted = state.reader.deadline.is_some_and(|deadline| state.now <= deadline);
                !trusted || state.now <= state.reader.s + BOUND
            }),
            Property::sometimes("a hit is as old as it may be", |_, state: &State| {
                let trusted = state.reader.deadline.is_some_and(|deadline| state.now <= deadline);
                trusted && state.now - state.reader.s == BOUND
            }),
        ]
    }
}
