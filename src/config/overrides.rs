//! `CACHE_ASIDE__SECTION__KEY`, which stands above all but flags.

use super::env::{both, read_secret};
use super::error::{Origin, nearest};
use super::shape::{Shape, Shapes};
use super::tree::{Node, Value};
use super::yaml::parse_value;
use super::{ConfigError, Env};

const PREFIX: &str = "CACHE_ASIDE__";

/// Lays the overrides over `root`. A shorter name comes before what it begins, so the more exact one holds.
pub(super) fn overlay(root: &mut Node, shapes: &Shapes, env: &Env) -> Result<(), ConfigError> {
    for variable in env.names(PREFIX) {
        let text = env.text(variable)?.unwrap_or_default();
        let (path, shape, text) = match (resolve(variable, variable, root, shapes), variable.strip_suffix("_FILE")) {
            (Ok((path, shape)), _) => (path, shape, text.to_owned()),
            // No key has this name: it is the `_FILE` form of one that has.
            (Err(_), Some(bare)) => {
                let (path, shape) = resolve(variable, bare, root, shapes)?;
                if env.get(bare).is_some() {
                    return Err(both(bare, variable));
                }
                (path, shape, read_secret(variable, text)?)
            }
            (Err(error), None) => return Err(error),
        };
        root.set(&path, value(variable, &text, &shape)?);
    }
    Ok(())
}

/// The path that `name` means, which is `variable` or what its `_FILE` is about. Keys are matched without regard to case.
fn resolve<'a>(
    variable: &str,
    name: &str,
    root: &Node,
    shapes: &'a Shapes,
) -> Result<(Vec<String>, Shape<'a>), ConfigError> {
    let error = |message: String| ConfigError::new(format!("{variable}: {message}"));
    let name = name.get(PREFIX.len()..).unwrap_or_default().to_lowercase();
    let mut rest: Vec<&str> = name.split("__").collect();
    let (mut path, mut shape) = (Vec::new(), shapes.root());
    let mut spelled = PREFIX.trim_end_matches('_').to_owned();
    while let Some(first) = rest.first() {
        // A resource's name may hold two underscores itself, so the longest name that is there wins.
        let existing = (1..=rest.len()).rev().find_map(|count| {
            let name = rest[..count].join("__");
            Some((count, key_like(root.get(&path)?, &name)?))
        });
        let known = shape.keys.contains_key(first).then(|| (1, (*first).to_owned()));
        let item = first.parse::<usize>().ok().filter(|_| shape.is_list()).map(|index| (1, format!("[{index}]")));
        let new = (shape.is_named() && !first.is_empty()).then(|| (1, (*first).to_owned()));
        let item = item.filter(|(_, step)| root.get(&path).is_some_and(|list| list.child(step).is_some()));
        let existing = existing.filter(|_| shape.is_named());
        let step = known.or(existing).or(item).or(new);
        let Some((below, (count, step))) = step.and_then(|step| Some((shapes.child(&shape, &step.1)?, step))) else {
            let near = nearest(first, shape.keys.keys().copied());
            let hint = match near {
                Some(near) => format!("did you mean {spelled}__{}?", near.to_uppercase()),
                None if shape.keys.is_empty() => format!("{spelled} is as far as names go here"),
                None => {
                    let keys: Vec<_> = shape.keys.keys().map(|key| key.to_uppercase()).collect();
                    format!("after {spelled}__ may stand {}", keys.join(", "))
                }
            };
            return Err(error(format!("there is no such key; {hint}")));
        };
        spelled = format!("{spelled}__{}", rest[..count].join("__").to_uppercase());
        path.push(step);
        shape = below;
        rest.drain(..count);
    }
    Ok((path, shape))
}

fn key_like(node: &Node, name: &str) -> Option<String> {
    match &node.value {
        Value::Map(entries) => entries.iter().map(|(key, _)| key).find(|key| key.to_lowercase() == name).cloned(),
        _ => None,
    }
}

/// A variable's text as the value that its key takes: lists with commas or as YAML, sections as YAML, the rest as it is.
fn value(variable: &str, text: &str, shape: &Shape<'_>) -> Result<Node, ConfigError> {
    let start = text.trim_start();
    if shape.is_list() && !start.starts_with('[') {
        let origin = Origin::Variable(variable.to_owned());
        let items = text.split(',').map(str::trim).filter(|item| !item.is_empty());
        let items = items.map(|item| Node::scalar(variable, item)).collect();
        return Ok(Node { origin, value: Value::List(items) });
    }
    if shape.is_list() || (shape.is_section() && start.starts_with('{')) {
        return parse_value(text, variable);
    }
    Ok(Node::scalar(variable, text))
}
