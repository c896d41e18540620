//! What may stand where, read off the JSON Schema: so the types are the only place that knows the keys.

use std::collections::BTreeMap;

use serde_json::Value as Json;

use super::error::{Origin, nearest};
use super::tree::{Node, Value, below, item};
use super::{Config, ConfigError};

/// The whole configuration's shape.
pub(super) struct Shapes(Json);

/// What one place takes.
#[derive(Clone, Debug, Default)]
pub(super) struct Shape<'a> {
    /// A section's keys and what each takes.
    pub(super) keys: BTreeMap<&'a str, &'a Json>,
    /// What stands under names that the file chooses.
    named: Option<&'a Json>,
    /// What each item of a list is.
    items: Option<&'a Json>,
    /// Whether it takes text.
    scalar: bool,
    /// The only texts it takes.
    pub(super) choices: Vec<&'a str>,
}

impl Shapes {
    pub(super) fn new() -> Self {
        Self(Config::json_schema())
    }

    /// What the file as a whole takes.
    pub(super) fn root(&self) -> Shape<'_> {
        self.read(&self.0)
    }

    /// What stands one step below.
    pub(super) fn child<'a>(&'a self, shape: &Shape<'a>, step: &str) -> Option<Shape<'a>> {
        let schema = if step.starts_with('[') { shape.items } else { shape.keys.get(step).copied().or(shape.named) };
        schema.map(|schema| self.read(schema))
    }

    /// What stands at `path`.
    pub(super) fn at(&self, path: &[String]) -> Option<Shape<'_>> {
        path.iter().try_fold(self.root(), |shape, step| self.child(&shape, step))
    }

    fn read<'a>(&'a self, schema: &'a Json) -> Shape<'a> {
        let mut shape = Shape::default();
        self.add(schema, &mut shape);
        shape
    }

    fn add<'a>(&'a self, schema: &'a Json, shape: &mut Shape<'a>) {
        let definition = |path: &str| self.0.pointer(path.strip_prefix('#')?);
        if let Some(target) = schema["$ref"].as_str().and_then(definition) {
            self.add(target, shape);
        }
        for alternatives in ["anyOf", "oneOf"] {
            let alternatives = schema[alternatives].as_array();
            alternatives.into_iter().flatten().for_each(|one| self.add(one, shape));
        }
        if let Some(choice) = schema["const"].as_str() {
            shape.choices.push(choice);
        }
        shape.choices.extend(schema["enum"].as_array().into_iter().flatten().filter_map(Json::as_str));
        let types = match &schema["type"] {
            Json::Array(types) => types.iter().filter_map(Json::as_str).collect(),
            one => one.as_str().into_iter().collect::<Vec<_>>(),
        };
        for kind in types {
            match kind {
                "object" => {
                    let keys = schema["properties"].as_object().into_iter().flatten();
                    shape.keys.extend(keys.map(|(key, schema)| (key.as_str(), schema)));
                    shape.named = schema.get("additionalProperties").filter(|named| named.is_object()).or(shape.named);
                }
                "array" => shape.items = schema.get("items").or(shape.items),
                "null" => {}
                _ => shape.scalar = true,
            }
        }
        shape.scalar |= !shape.choices.is_empty();
    }

    /// Finds the first value that stands where no such thing can.
    pub(super) fn check(&self, root: &Node, name: &str) -> Result<(), ConfigError> {
        self.fits(root, &self.root(), &[])
            .map_err(|Misfit { origin, path, message }| origin.error(name, &path, &message))
    }

    fn fits(&self, node: &Node, shape: &Shape<'_>, path: &[String]) -> Result<(), Misfit> {
        let misfit = |message: String| Misfit { origin: node.origin.clone(), path: path.to_vec(), message };
        match &node.value {
            Value::Null if path.last().is_some_and(|step| step.starts_with('[')) => {
                Err(misfit("an empty item; remove it or write \"\"".into()))
            }
            Value::Null => Ok(()),
            Value::Scalar(_) if shape.scalar => Ok(()),
            Value::List(items) if shape.items.is_some() => items.iter().enumerate().try_for_each(|(index, one)| {
                let path = item(path, index);
                let shape = self.child(shape, &format!("[{index}]")).unwrap_or_default();
                self.fits(one, &shape, &path)
            }),
            Value::Map(entries) if shape.is_section() => entries.iter().try_for_each(|(key, value)| {
                let path = below(path, key);
                let Some(shape) = self.child(shape, key) else {
                    return Err(Misfit { origin: value.origin.clone(), path, message: shape.unknown(key) });
                };
                self.fits(value, &shape, &path)
            }),
            // Never with the value itself: a URL with its password is the likeliest thing to be out of place.
            _ => Err(misfit(shape.wanted())),
        }
    }
}

struct Misfit {
    origin: Origin,
    path: Vec<String>,
    message: String,
}

impl Shape<'_> {
    /// Whether keys stand here.
    pub(super) fn is_section(&self) -> bool {
        !self.keys.is_empty() || self.named.is_some()
    }

    /// Whether a list stands here.
    pub(super) fn is_list(&self) -> bool {
        self.items.is_some()
    }

    /// Whether the file chooses the keys here.
    pub(super) fn is_named(&self) -> bool {
        self.named.is_some()
    }

    /// Words for a key that is not known here.
    fn unknown(&self, key: &str) -> String {
        match nearest(key, self.keys.keys().copied()) {
            Some(near) => format!("unknown key; did you mean {near:?}?"),
            None => format!("unknown key; known here: {}", self.list()),
        }
    }

    fn list(&self) -> String {
        self.keys.keys().copied().collect::<Vec<_>>().join(", ")
    }

    /// Words for a value of the wrong kind.
    fn wanted(&self) -> String {
        let section =
            || if self.keys.is_empty() { "names with a colon".into() } else { format!("the keys {}", self.list()) };
        match (self.scalar, self.is_list(), self.is_section()) {
            (true, true, _) => "expected one value or a list".into(),
            (true, _, true) => format!("expected one value, or {}", section()),
            (true, ..) => "expected one value".into(),
            (_, true, _) => "expected a list, e.g. [a, b]".into(),
            _ => format!("expected {} below it", section()),
        }
    }
}
