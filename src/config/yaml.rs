//! Reads YAML into a [`Node`] tree, within bounds: no file can make it run out of memory, stack or patience.

use std::collections::{HashMap, HashSet};

use saphyr_parser::{Event, Parser, ScalarStyle, Span, StrInput, Tag};

use super::ConfigError;
use super::error::Origin;
use super::tree::{Node, Value};

/// Past this many nodes a file is no configuration but an attack: aliases can multiply.
const NODES: usize = 100_000;
/// Levels of nesting, aliases resolved.
const DEEPEST: usize = 64;

/// Reads one document; messages call it `name`. An empty one is an empty map.
pub(super) fn parse(text: &str, name: &str) -> Result<Node, ConfigError> {
    let root = document(text, name)?;
    match root.value {
        Value::Map(_) => Ok(root),
        Value::Null => Ok(Node::map(Origin::Absent)),
        _ => Err(root.origin.error(name, &[], "expected sections such as database: and resources:")),
    }
}

/// Reads a value that stands in an environment variable.
pub(super) fn parse_value(text: &str, variable: &str) -> Result<Node, ConfigError> {
    let mut root = document(text, variable)?;
    root.relabel(&Origin::Variable(variable.to_owned()));
    Ok(root)
}

fn document(text: &str, name: &str) -> Result<Node, ConfigError> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut reader = Reader { events: Parser::new_from_str(text), name, anchors: HashMap::new(), nodes: 0, deepest: 0 };
    let mut root = None;
    loop {
        let (event, span) = reader.next()?;
        match event {
            Event::StreamEnd => break,
            Event::DocumentStart(_) if root.is_some() => {
                return Err(reader.error(span.start.line(), "a second document; keep one in the file"));
            }
            Event::StreamStart | Event::DocumentStart(_) | Event::DocumentEnd | Event::Nothing => {}
            event => root = Some(reader.node(event, span, 0)?),
        }
    }
    Ok(root.unwrap_or(Node { origin: Origin::Absent, value: Value::Null }))
}

/// What an anchor stands for, and what using it again costs.
struct Anchor {
    node: Node,
    nodes: usize,
    levels: usize,
}

struct Reader<'a> {
    events: Parser<'a, StrInput<'a>>,
    name: &'a str,
    anchors: HashMap<usize, Anchor>,
    nodes: usize,
    /// The deepest level since the innermost node under way began.
    deepest: usize,
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
        Origin::Line(line).error(self.name, &[], message)
    }

    /// Pays for `nodes` more of them, the deepest at `depth`.
    fn spend(&mut self, nodes: usize, depth: usize, line: usize) -> Result<(), ConfigError> {
        self.nodes += nodes;
        self.deepest = self.deepest.max(depth);
        if self.nodes > NODES {
            return Err(self.error(line, "too many values for a configuration"));
        }
        if depth > DEEPEST {
            return Err(self.error(line, "nested too deep"));
        }
        Ok(())
    }

    fn node(&mut self, event: Event<'a>, span: Span, depth: usize) -> Result<Node, ConfigError> {
        let line = span.start.line();
        let (nodes_before, deepest_before) = (self.nodes, self.deepest);
        self.deepest = depth;
        if !matches!(event, Event::Alias(_)) {
            self.spend(1, depth, line)?;
        }
        let (value, anchor) = match event {
            Event::Scalar(text, style, anchor, tag) => {
                self.know(tag.as_deref(), line)?;
                let null = matches!(style, ScalarStyle::Plain) && matches!(&*text, "" | "~" | "null" | "Null" | "NULL");
                (if null { Value::Null } else { Value::Scalar(text.into_owned()) }, anchor)
            }
            Event::SequenceStart(anchor, tag) => {
                self.know(tag.as_deref(), line)?;
                (self.list(depth)?, anchor)
            }
            Event::MappingStart(anchor, tag) => {
                self.know(tag.as_deref(), line)?;
                (self.entries(depth)?, anchor)
            }
            Event::Alias(anchor) => {
                let Some(&Anchor { nodes, levels, .. }) = self.anchors.get(&anchor) else {
                    return Err(self.error(line, "an alias without its anchor before it"));
                };
                // Before the copy is made: the copies are what an alias bomb is about.
                self.spend(nodes, depth + levels, line)?;
                (self.anchors.get(&anchor).map_or(Value::Null, |anchor| anchor.node.value.clone()), 0)
            }
            _ => return Err(self.error(line, "no valid YAML")),
        };
        let node = Node { origin: Origin::Line(line), value };
        if anchor > 0 {
            let (nodes, levels) = (self.nodes - nodes_before, self.deepest - depth);
            self.spend(nodes, depth, line)?;
            self.anchors.insert(anchor, Anchor { node: node.clone(), nodes, levels });
        }
        self.deepest = self.deepest.max(deepest_before);
        Ok(node)
    }

    /// Tags of other programs (`!include`, `!vault`) ask for something that would not happen.
    fn know(&self, tag: Option<&Tag>, line: usize) -> Result<(), ConfigError> {
        match tag {
            Some(tag) if !(tag.is_yaml_core_schema() || tag.handle.is_empty() && tag.suffix == "!") => {
                let message = format!("the tag {}{} is not known here", tag.handle, tag.suffix);
                Err(self.error(line, &message))
            }
            _ => Ok(()),
        }
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
        let mut entries = Vec::new();
        let mut seen = HashSet::new();
        loop {
            let (event, span) = self.next()?;
            let line = span.start.line();
            let key = match event {
                Event::MappingEnd => return Ok(Value::Map(entries)),
                Event::Scalar(key, ..) => key.into_owned(),
                _ => return Err(self.error(line, "a key must be text")),
            };
            if !seen.insert(key.clone()) {
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
