//! A small tree of values that remember where each stands.
//!
//! Scalars stay text: what a value is, is decided by the field that takes it. So `key_prefix: 007` keeps its zeros, and a
//! value from the environment is treated like one from the file.

use super::error::Origin;

/// A value and where it came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Node {
    pub(super) origin: Origin,
    pub(super) value: Value,
}

/// What a value is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Value {
    /// Nothing: `~`, `null`, or empty.
    Null,
    /// Text, as it stands.
    Scalar(String),
    /// Values in order.
    List(Vec<Node>),
    /// Values by key, each key once.
    Map(Vec<(String, Node)>),
}

impl Node {
    pub(super) fn map(origin: Origin) -> Self {
        Self { origin, value: Value::Map(Vec::new()) }
    }

    pub(super) fn scalar(variable: &str, text: impl Into<String>) -> Self {
        Self { origin: Origin::Variable(variable.to_owned()), value: Value::Scalar(text.into()) }
    }

    /// The value one step below: a key of a map, or `[0]` of a list.
    pub(super) fn child(&self, step: &str) -> Option<&Self> {
        match &self.value {
            Value::Map(entries) => entries.iter().find(|(key, _)| key == step).map(|(_, value)| value),
            Value::List(items) => items.get(index(step)?),
            Value::Null | Value::Scalar(_) => None,
        }
    }

    /// The value at `path`, if each step is there.
    pub(super) fn get<S: AsRef<str>>(&self, path: &[S]) -> Option<&Self> {
        path.iter().try_fold(self, |node, step| node.child(step.as_ref()))
    }

    /// Where the value at `path` stands, or else the nearest thing around it.
    pub(super) fn origin_of(&self, path: &[String]) -> &Origin {
        let mut node = self;
        for step in path {
            let Some(child) = node.child(step) else { break };
            node = child;
        }
        &node.origin
    }

    /// Sets the value at `path`, making the maps on the way.
    pub(super) fn set<S: AsRef<str>>(&mut self, path: &[S], value: Self) {
        let Some((step, rest)) = path.split_first() else {
            *self = value;
            return;
        };
        let step = step.as_ref();
        if let (Value::List(items), Some(index)) = (&mut self.value, index(step)) {
            if let Some(item) = items.get_mut(index) {
                item.set(rest, value);
            }
            return;
        }
        if !matches!(self.value, Value::Map(_)) {
            // What isn't there in the file gets its place from the first variable that needs it.
            *self = Self::map(value.origin.clone());
        }
        let Value::Map(entries) = &mut self.value else { return };
        if let Some((_, node)) = entries.iter_mut().find(|(key, _)| key == step) {
            node.set(rest, value);
            return;
        }
        let mut node = Self::map(value.origin.clone());
        node.set(rest, value);
        entries.push((step.to_owned(), node));
    }

    /// Gives everything below the same origin.
    pub(super) fn relabel(&mut self, origin: &Origin) {
        self.origin = origin.clone();
        match &mut self.value {
            Value::List(items) => items.iter_mut().for_each(|item| item.relabel(origin)),
            Value::Map(entries) => entries.iter_mut().for_each(|(_, value)| value.relabel(origin)),
            Value::Null | Value::Scalar(_) => {}
        }
    }
}

/// The steps to the item `index` of the list at `path`.
pub(super) fn item(path: &[String], index: usize) -> Vec<String> {
    below(path, &format!("[{index}]"))
}

/// The steps to what is called `key` below `path`.
pub(super) fn below(path: &[String], key: &str) -> Vec<String> {
    let mut path = path.to_vec();
    path.push(key.to_owned());
    path
}

fn index(step: &str) -> Option<usize> {
    step.strip_prefix('[')?.strip_suffix(']')?.parse().ok()
}
