//! From a file and the environment to a [`Config`], or to a message that says where to look.

use std::collections::HashMap;
use std::path::Path;

use serde::Deserialize;
use serde_json::Map;

use super::error::Origin;
use super::tree::{Node, Value};
use super::{Config, ConfigError, Env, overlay, tree, validate};
use crate::catalog::nearest;

/// The largest file that is read, in bytes.
const LARGEST: u64 = 4 << 20;

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
        let named = env.get("CACHE_ASIDE_CONFIG").filter(|name| !name.is_empty()).map(Path::new);
        let Some(file) = file.or(named) else {
            let (config, origins) = build(Node::map(Origin::Line(1)), "environment", env)?;
            if config.database.url.is_empty() {
                return Ok(None);
            }
            validate::check(&config, &origins, "environment", false)?;
            return Ok(Some(config));
        };
        let name = file.display().to_string();
        let fail = |error: std::io::Error| ConfigError::new(format!("{name}: can't be read: {error}"));
        let size = std::fs::metadata(file).map_err(fail)?.len();
        if size > LARGEST {
            return Err(ConfigError::new(format!("{name}: {size} bytes are too many for a configuration")));
        }
        let bytes = std::fs::read(file).map_err(fail)?;
        let text = String::from_utf8(bytes).map_err(|error| {
            let before = &error.as_bytes()[..error.utf8_error().valid_up_to()];
            let line = before.split(|byte| *byte == b'\n').count();
            Origin::Line(line).error(&name, "", "the file is not UTF-8")
        })?;
        Self::from_yaml(&text, &name, env).map(Some)
    }

    /// Reads a configuration from text; messages call it `name`.
    ///
    /// # Errors
    ///
    /// [`ConfigError`], whose message names line and key.
    pub fn from_yaml(text: &str, name: &str, env: &Env) -> Result<Self, ConfigError> {
        let mut root = tree::parse(text, name)?;
        overlay::interpolate(&mut root, name, "", env)?;
        let (config, origins) = build(root, name, env)?;
        validate::check(&config, &origins, name, true)?;
        Ok(config)
    }

    /// The JSON Schema of the file.
    #[must_use]
    pub fn json_schema() -> serde_json::Value {
        schemars::schema_for!(Config).to_value()
    }
}

/// The configuration, and where each of its values came from.
fn build(mut root: Node, name: &str, env: &Env) -> Result<(Config, HashMap<String, Origin>), ConfigError> {
    overlay::well_known(&mut root, env)?;
    overlay::overrides(&mut root, env)?;
    overlay::compose(&mut root, env)?;
    let mut origins = HashMap::new();
    let value = json(&root, String::new(), &mut origins);
    let mut track = serde_path_to_error::Track::new();
    let tracked = serde_path_to_error::Deserializer::new(value, &mut track);
    let mut config = Config::deserialize(tracked)
        .map_err(|error| explain(&error.to_string(), &track.path().to_string(), &origins, name))?;
    if let Some(service) = env.get("OTEL_SERVICE_NAME").filter(|service| !service.is_empty()) {
        service.clone_into(&mut config.telemetry.service_name);
    }
    Ok((config, origins))
}

/// The tree as JSON, noting where each path stands.
fn json(node: &Node, path: String, origins: &mut HashMap<String, Origin>) -> serde_json::Value {
    let value = match &node.value {
        Value::Null => serde_json::Value::Null,
        Value::Scalar(text) => text.as_str().into(),
        Value::List(items) => items
            .iter()
            .enumerate()
            .map(|(index, item)| json(item, format!("{path}[{index}]"), origins))
            .collect::<Vec<_>>()
            .into(),
        Value::Map(entries) => {
            let mut map = Map::new();
            for (key, value) in entries {
                let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                let named = is_named(&path);
                match json(value, path, origins) {
                    // `fruit:` alone declares a resource with nothing but defaults; elsewhere nothing is said.
                    serde_json::Value::Null if named => map.insert(key.clone(), Map::new().into()),
                    serde_json::Value::Null => None,
                    value => map.insert(key.clone(), value),
                };
            }
            map.into()
        }
    };
    origins.insert(path, node.origin.clone());
    value
}

/// Whether `path` is a resource, or a list of one.
fn is_named(path: &str) -> bool {
    let steps: Vec<&str> = path.split('.').collect();
    matches!(steps.as_slice(), ["resources", _] | ["resources", _, "lists", _])
}

/// Turns serde's words into ours.
fn explain(message: &str, path: &str, origins: &HashMap<String, Origin>, name: &str) -> ConfigError {
    let mut path = if path == "." { String::new() } else { path.to_owned() };
    let mut words = message.to_owned();
    let quoted: Vec<&str> = message.split('`').skip(1).step_by(2).collect();
    if let (true, Some((unknown, known))) = (message.starts_with("unknown field"), quoted.split_first()) {
        if path != *unknown && !path.ends_with(&format!(".{unknown}")) {
            path = if path.is_empty() { (*unknown).to_owned() } else { format!("{path}.{unknown}") };
        }
        words = match nearest(unknown, known.iter().copied()) {
            Some(near) => format!("unknown key; did you mean {near:?}?"),
            None => format!("unknown key; known here: {}", known.join(", ")),
        };
    } else if message.starts_with("unknown variant") && !quoted.is_empty() {
        words = format!("{:?} is not known here; use {}", quoted[0], quoted[1..].join(", "));
    } else if message.starts_with("invalid type") {
        words = message.replace("invalid type: ", "this is ").replace("string ", "");
    }
    // A key that an override made has no line; its nearest relative with an origin has.
    let mut known = path.as_str();
    let origin = loop {
        match (origins.get(known), known.rfind(['.', '['])) {
            (Some(origin), _) => break origin.clone(),
            (None, Some(at)) => known = &known[..at],
            (None, None) => break Origin::Line(1),
        }
    };
    origin.error(name, &path, &words)
}
