//! From a file and the environment to a [`Config`], or to a message that says where to look.

use std::path::Path;

use serde::Deserialize;
use serde_json::{Map, Value as Json};
use serde_path_to_error::Segment;

use super::error::{Origin, nearest};
use super::file::read_text;
use super::interpolate::interpolate;
use super::shape::{Shape, Shapes};
use super::tree::{Node, Value};
use super::{Config, ConfigError, Env, compose, overrides, validate, well_known, yaml};

impl Config {
    /// Reads `file`, or the file that `CACHE_ASIDE_CONFIG` names, and lays the environment over it.
    ///
    /// `None` where neither a file nor a database URL is configured: the embedded demo is wanted. A database URL
    /// without a file gives a configuration without resources: what is in the database is to be served.
    ///
    /// # Errors
    ///
    /// [`ConfigError`], whose message names file, line and key.
    pub fn load(file: Option<&Path>, env: &Env) -> Result<Option<Self>, ConfigError> {
        let named = env.text("CACHE_ASIDE_CONFIG")?.filter(|name| !name.is_empty()).map(Path::new);
        if let Some(file) = file.or(named) {
            let text = read_text(file).map_err(ConfigError::new)?;
            return Self::from_yaml(&text, &file.display().to_string(), env).map(Some);
        }
        let (config, root) = build(Node::map(Origin::Absent), "environment", env)?;
        // A URL that is there and empty is a mistake to report, not a wish for the demo.
        if config.database.url.is_empty() && root.get(&["database", "url"]).is_none() {
            return Ok(None);
        }
        validate::check(&config, &root, "environment", false)?;
        Ok(Some(config))
    }

    /// Reads a configuration from text; messages call it `name`.
    ///
    /// # Errors
    ///
    /// [`ConfigError`], whose message names line and key.
    pub fn from_yaml(text: &str, name: &str, env: &Env) -> Result<Self, ConfigError> {
        let mut root = yaml::parse(text, name)?;
        interpolate(&mut root, name, &[], env)?;
        let (config, root) = build(root, name, env)?;
        validate::check(&config, &root, name, true)?;
        Ok(config)
    }
}

/// The configuration, and the tree that knows where each of its values came from.
fn build(mut root: Node, name: &str, env: &Env) -> Result<(Config, Node), ConfigError> {
    let shapes = Shapes::new();
    well_known::overlay(&mut root, env)?;
    overrides::overlay(&mut root, &shapes, env)?;
    compose::compose(&mut root, env)?;
    shapes.check(&root, name)?;
    let value = json(&root, &shapes.root(), &shapes).unwrap_or_else(|| Map::new().into());
    let mut track = serde_path_to_error::Track::new();
    let tracked = serde_path_to_error::Deserializer::new(value, &mut track);
    let mut config = Config::deserialize(tracked).map_err(|error| {
        let path = steps(&track.path());
        let message = explain(&error.to_string(), &path, &root, &shapes);
        root.origin_of(&path).error(name, &path, &message)
    })?;
    for (name, resource) in &mut config.resources {
        if resource.table.is_empty() {
            resource.table.clone_from(name);
        }
    }
    if let Some(service) = well_known::service_name(env)? {
        config.telemetry.service_name = service;
    }
    Ok((config, root))
}

/// The tree as JSON. What is empty is left out and keeps its default, but for names that the file chooses: `fruit:`
/// alone declares a resource.
fn json(node: &Node, shape: &Shape<'_>, shapes: &Shapes) -> Option<Json> {
    let below = |step: &str| shapes.child(shape, step).unwrap_or_default();
    match &node.value {
        Value::Null => None,
        Value::Scalar(text) => Some(text.as_str().into()),
        Value::List(items) => items.iter().map(|item| json(item, &below("[0]"), shapes)).collect(),
        Value::Map(entries) => {
            let mut map = Map::new();
            for (key, value) in entries {
                let empty = || shape.is_named().then(|| Map::new().into());
                if let Some(value) = json(value, &below(key), shapes).or_else(empty) {
                    map.insert(key.clone(), value);
                }
            }
            Some(map.into())
        }
    }
}

fn steps(path: &serde_path_to_error::Path) -> Vec<String> {
    let step = |segment: &Segment| match segment {
        Segment::Seq { index } => Some(format!("[{index}]")),
        Segment::Map { key } => Some(key.clone()),
        Segment::Enum { .. } | Segment::Unknown => None,
    };
    path.iter().map_while(step).collect()
}

/// Turns serde's words into ours; those of our own types are ours already.
fn explain(message: &str, path: &[String], root: &Node, shapes: &Shapes) -> String {
    if let Some(field) = message.strip_prefix("missing field `").and_then(|field| field.strip_suffix('`')) {
        return format!("lacks the key {field:?}");
    }
    let given = root.get(path).map(|node| &node.value);
    if let (true, Some(Value::Scalar(text))) = (message.starts_with("unknown variant"), given) {
        let choices = shapes.at(path).map(|shape| shape.choices).unwrap_or_default();
        return match nearest(text, choices.iter().copied()) {
            Some(near) => format!("{text:?} is not known here; did you mean {near}?"),
            None => format!("{text:?} is not known here; use {}", choices.join(", ")),
        };
    }
    message.to_owned()
}
