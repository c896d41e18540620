//! What a memory and its readers may claim in every state of the rounds.

use stateright::Property;

use super::database::Set;
use super::entry::{Answer, Command};
use super::rounds::{Control, Filling, Plan, Rounds, Runner, State, filled};
use super::world::NOW;

pub fn properties(rules: &Rounds) -> Vec<Property<Rounds>> {
    let mut properties = vec![
        Property::always(super::QUIET, |rules: &Rounds, state: &State| {
            let Some(control) = state.current(rules) else { return true };
            let hit = state.hit(control).filter(|_| state.quiet(rules, control));
            hit.is_none_or(|value| value == state.database.committed())
        }),
        Property::always(super::ACKNOWLEDGED, |_, state: &State| {
            let looks = state.readers.iter().filter_map(|reader| reader.look);
            looks.filter_map(|look| state.hit(look)).all(|value| state.contains(value, state.database.acknowledged))
        }),
        Property::always(super::BOUNDED, |rules: &Rounds, state: &State| {
            let looks = state.readers.iter().filter_map(|reader| reader.look);
            looks
                .chain(state.current(rules))
                .all(|control| state.hit(control).is_none_or(|value| state.contains(value, control.claims)))
        }),
        Property::sometimes("an old row's fill is refused", |_, state: &State| state.fenced()),
    ];
    if rules.outbox {
        properties.push(Property::sometimes("a round is refused", |_, state: &State| state.refused()));
    }
    if rules.outbox && rules.transactions > 1 {
        properties.push(Property::sometimes("a snapshot names an open transaction", |_, state: &State| {
            state.memory.control.is_some_and(|control| control.s.xip != 0)
        }));
    }
    if rules.restarts > 0 && rules.outbox {
        properties.push(Property::sometimes("a round is refused for its memory's sake", |_, state: &State| {
            state.refused_elsewhere()
        }));
    }
    if rules.purges || rules.restarts + rules.evictions + rules.crashes > 0 {
        properties.push(Property::sometimes("an epoch is renewed", |_, state: &State| {
            state.memory.control.is_some_and(|control| control.tag != 0)
        }));
    }
    properties
}

impl State {
    /// What a reader is given who believes `control`.
    fn hit(&self, control: Control) -> Option<Set> {
        match self.memory.entry.clone().step(NOW, Command::Read { tag: control.tag.into() }).1 {
            Answer::Fresh(value) if control.registered => Some(value),
            _ => None,
        }
    }

    /// The memory as the next reader will find it who looks, if he will trust it.
    fn current(&self, rules: &Rounds) -> Option<Control> {
        self.memory.control.filter(|control| control.id == self.id || !rules.trust)
    }

    /// Whether a value has all that was promised and still exists.
    fn contains(&self, value: Set, promised: Set) -> bool {
        promised & !value & !self.database.lost() == 0
    }

    /// Nothing is stale once a round that began after the last commit is over, or, without rounds, once every
    /// writer has invalidated.
    fn quiet(&self, rules: &Rounds, control: Control) -> bool {
        let database = &self.database;
        let told = if rules.outbox { control.claims } else { database.acknowledged };
        let filling = self.readers.iter().any(|reader| reader.filling != Filling::No);
        told == database.committed() && control.life == database.life && !filling
    }

    /// A round is about to claim, on the memory where it began, and another was faster.
    fn refused(&self) -> bool {
        self.runners.iter().any(|runner| match runner {
            Runner::Knows { id, n: Some(n), plan: Plan::Claim, .. } => {
                *id == self.id && self.memory.control.is_some_and(|control| control.n != *n)
            }
            _ => false,
        })
    }

    /// A round is about to claim on another memory, which counts as the one did where it began.
    fn refused_elsewhere(&self) -> bool {
        self.runners.iter().any(|runner| match runner {
            Runner::Knows { id, n: Some(n), plan: Plan::Claim, .. } => {
                *id != self.id && self.memory.control.is_some_and(|control| control.n == *n)
            }
            _ => false,
        })
    }

    /// A fill is about to be refused, and rightly.
    fn fenced(&self) -> bool {
        self.readers.iter().any(|reader| match reader.filling {
            Filling::Loaded { fence, tag, value } => {
                value != self.database.committed() && self.clone().tell(filled(fence, tag, value)) != Answer::Stored
            }
            _ => false,
        })
    }
}
