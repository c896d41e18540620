//! `${NAME}` and `${NAME:-default}` inside the file's values.

use super::tree::{Node, Value, below, item};
use super::{ConfigError, Env};

/// Replaces `${NAME}` and `${NAME:-default}` in every value below `path`. `$${` stands for `${`.
pub(super) fn interpolate(node: &mut Node, name: &str, path: &[String], env: &Env) -> Result<(), ConfigError> {
    let origin = &node.origin;
    match &mut node.value {
        Value::Null => Ok(()),
        Value::Scalar(text) => {
            if text.contains("${") {
                *text = expand(text, env).map_err(|message| origin.error(name, path, &message))?;
            }
            Ok(())
        }
        Value::List(items) => {
            items.iter_mut().enumerate().try_for_each(|(index, one)| interpolate(one, name, &item(path, index), env))
        }
        Value::Map(entries) => {
            entries.iter_mut().try_for_each(|(key, value)| interpolate(value, name, &below(path, key), env))
        }
    }
}

fn expand(text: &str, env: &Env) -> Result<String, String> {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, after)) = rest.split_once("${") {
        if let Some(before) = before.strip_suffix('$') {
            out.push_str(before);
            out.push_str("${");
            rest = after;
            continue;
        }
        out.push_str(before);
        let Some((inside, after)) = after.split_once('}') else {
            return Err("a ${ without its }; write $${ for the two characters".into());
        };
        out.push_str(value(inside, env)?);
        rest = after;
    }
    out.push_str(rest);
    Ok(out)
}

/// What stands for `NAME` or `NAME:-default`. As in a shell, an empty variable takes the default too.
fn value<'a>(inside: &'a str, env: &'a Env) -> Result<&'a str, String> {
    let (variable, default) = match inside.split_once(":-") {
        Some((variable, default)) => (variable, Some(default)),
        None => (inside, None),
    };
    let well_formed = variable.starts_with(|first: char| first.is_ascii_alphabetic() || first == '_')
        && variable.chars().all(|letter| letter.is_ascii_alphanumeric() || letter == '_');
    if !well_formed {
        return Err(format!("${{{variable}}} names no variable; write ${{NAME}} or ${{NAME:-default}}"));
    }
    if default.is_some_and(|default| default.contains("${")) {
        return Err(format!("the default of ${{{variable}}} can't hold another ${{"));
    }
    let set = env.text(variable).map_err(|error| error.to_string())?;
    match (set, default) {
        (Some("") | None, Some(default)) => Ok(default),
        (Some(set), _) => Ok(set),
        (None, None) => Err(format!("${{{variable}}} is not set; set it, or write ${{{variable}:-default}}")),
    }
}
