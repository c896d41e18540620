//! Reads YAML into a small tree that remembers where each value stands.
//!
//! Scalars stay text: what a value is, is decided by the field that takes it. So `key_prefix: 007` keeps its zeros, and a
//! value from the environment is treated like one from the file.

use std::collections::HashMap;

use saphyr_parser::{Event, Parser, ScalarStyle, Span};

use super::ConfigError;
use super::error::Origin;

/// Past this many nodes a file is no configuration but an attack: aliases can multiply.
const NODES: usize = 100_000;
const DEEPEST: usize = 64;

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

    /// The value at `path`, if each step is there.
    pub(super) fn get(&self, path: &[&str]) -> Option<&Self> {
        path.iter().try_fold(self, |node, step| match &node.value {
            Value::Map(entries) => entries.iter().find(|(key, _)| key == step).map(|(_, value)| value),
            _ => None,
        })
    }

    /// Sets the value at `path`, making the maps on the way.
    pub(super) fn set(&mut self, path: &[String], value: Self) {
        let Some((step, rest)) = path.split_first() else {
            *self = value;
            return;
        };
        if !matches!(self.value, Value::Map(_)) {
            self.value = Value::Map(Vec::new());
        }
        let Value::Map(entries) = &mut self.value else { return };
        if let Some((_, node)) = entries.iter_mut().find(|(key, _)| key == step) {
            node.set(rest, value);
        } else {
            let mut node = Self { origin: value.origin.clone(), value: Value::Null };
            node.set(rest, value);
            entries.push((step.clone(), node));
        }
    }
}

/// Reads one document; an empty one is an empty map. `name` is what messages call the file.
pub(super) fn parse(text: &str, name: &str) -> Result<Node, ConfigError> {
    let mut reader = Reader { events: Parser::new_from_str(text), name, anchors: HashMap::new(), nodes: 0 };
    let mut root = None;
    loop {
        let (event, span) = reader.next()?;
        match event {
            Event::StreamEnd => break,
            Event::StreamStart | Event::DocumentStart(_) | Event::DocumentEnd | Event::Nothing => {}
            _ if root.is_some() => {
                return Err(reader.error(span.start.line(), "a second document; keep one in the file"));
            }
            event => root = Some(reader.node(event, span, 0)?),
        }
    }
    let root = root.unwrap_or_else(|| Node::map(Origin::Line(1)));
    match root.value {
        Value::Map(_) => Ok(root),
        Value::Null => Ok(Node::map(root.origin)),
        _ => Err(root.origin.error(name, "", "expected sections such as database: and resources:")),
    }
}

/// Reads a value that stands in an environment variable: flow lists and maps, or plain text.
pub(super) fn parse_value(text: &str, variable: &str) -> Result<Node, ConfigError> {
    let origin = Origin::Variable(variable.to_owned());
    if !text.starts_with(['[', '{']) {
        return Ok(Node { origin, value: Value::Scalar(text.to_owned()) });
    }
    let mut node = parse(&format!("value: {text}"), variable)?;
    node = node.get(&["value"]).cloned().unwrap_or(node);
    relabel(&mut node, &origin);
    Ok(node)
}

fn relabel(node: &mut Node, origin: &Origin) {
    node.origin = origin.clone();
    match &mut node.value {
        Value::List(items) => items.iter_mut().for_each(|item| relabel(item, origin)),
        Value::Map(entries) => entries.iter_mut().for_each(|(_, value)| relabel(value, origin)),
        Value::Null | Value::Scalar(_) => {}
    }
}

struct Reader<'a> {
    events: Parser<'a, saphyr_parser::StrInput<'a>>,
    name: &'a str,
    anchors: HashMap<usize, (Node, usize)>,
    nodes: usize,
}

impl<'a> Reader<'a> {
    fn next(&mut self) -> Result<(Event<'a>, Span), ConfigError> {
        match self.events.next_event() {
            Some(Ok(next)) => Ok(next),
            Some(Err(error)) => Err(self.error(error.marker().line(), &format!("no valid YAML: {}", error.info()))),
            None => Err(self.error(1, "no valid YAML: it ends in the middle")),
        }
    }

    fn error(&self, line: usize, message: &str) -> ConfigError {
        Origin::Line(line).error(self.name, "", message)
    }

    fn count(&mut self, nodes: usize, line: usize) -> Result<(), ConfigError> {
        self.nodes += nodes;
        if self.nodes > NODES {
            return Err(self.error(line, "too many values for a configuration"));
        }
        Ok(())
    }

    fn node(&mut self, event: Event<'a>, span: Span, depth: usize) -> Result<Node, ConfigError> {
        let line = span.start.line();
        if depth > DEEPEST {
            return Err(self.error(line, "nested too deep"));
        }
        let before = self.nodes;
        self.count(1, line)?;
        let (value, anchor) = match event {
            Event::Scalar(text, style, anchor, _) => {
                let null = matches!(style, ScalarStyle::Plain) && matches!(&*text, "" | "~" | "null" | "Null" | "NULL");
                (if null { Value::Null } else { Value::Scalar(text.into_owned()) }, anchor)
            }
            Event::SequenceStart(anchor, _) => (self.list(depth)?, anchor),
            Event::MappingStart(anchor, _) => (self.entries(depth)?, anchor),
            Event::Alias(anchor) => {
                let Some((node, size)) = self.anchors.get(&anchor).cloned() else {
                    return Err(self.error(line, "an alias without its anchor"));
                };
                self.count(size, line)?;
                return Ok(Node { origin: Origin::Line(line), ..node });
            }
            _ => return Err(self.error(line, "no valid YAML")),
        };
        let node = Node { origin: Origin::Line(line), value };
        if anchor > 0 {
            self.anchors.insert(anchor, (node.clone(), self.nodes - before));
        }
        Ok(node)
    }

    fn list(&mut self, depth: usize) -> Result<Value, ConfigError> {
        let mut items = Vec::new();
        loop {
            match self.next()? {
                (Event::SequenceEnd, _) => return Ok(Value::List(items)),
                (event, span) => items.push(self.node(event, span, depth + 1)?),
            }
        }
    }

    fn entries(&mut self, depth: usize) -> Result<Value, ConfigError> {
        let mut entries: Vec<(String, Node)> = Vec::new();
        loop {
            let (event, span) = self.next()?;
            let line = span.start.line();
            let key = match event {
                Event::MappingEnd => return Ok(Value::Map(entries)),
                Event::Scalar(key, ..) => key.into_owned(),
                _ => return Err(self.error(line, "a key must be text")),
            };
            if entries.iter().any(|(other, _)| *other == key) {
                return Err(self.error(line, &format!("the key {key:?} stands twice")));
            }
            let (event, span) = self.next()?;
            let mut value = self.node(event, span, depth + 1)?;
            // Where a value is wrong, the line of its key is the one to look at.
            value.origin = Origin::Line(line);
            entries.push((key, value));
        }
    }
}
