//! The JSON Schema of the file, made of the types and their comments.

use serde_json::{Value, json};

use super::Config;

impl Config {
    /// The JSON Schema of the file (draft 2020-12): descriptions, defaults, and no keys but the known ones.
    #[must_use]
    pub fn json_schema() -> Value {
        let mut schema = schemars::schema_for!(Config).to_value();
        polish(&mut schema);
        schema
    }
}

/// Takes out defaults that say nothing, and lets `${NAME}` stand where the types want a number or a fixed word.
fn polish(schema: &mut Value) {
    match schema {
        Value::Array(items) => items.iter_mut().for_each(polish),
        Value::Object(fields) => {
            if fields.get("default").is_some_and(|default| default.is_null() || default == "") {
                fields.remove("default");
            }
            let number = match fields.get("type") {
                Some(Value::String(one)) if matches!(one.as_str(), "integer" | "number") => vec![json!(one)],
                Some(Value::Array(types)) if types.contains(&json!("integer")) || types.contains(&json!("number")) => {
                    types.clone()
                }
                _ => Vec::new(),
            };
            if !number.is_empty() {
                // A pattern concerns strings alone: numbers stay free.
                fields.insert("type".into(), number.into_iter().chain([json!("string")]).collect());
                fields.insert("pattern".into(), json!(r"\$\{"));
            }
            if let Some(Value::Array(choices)) = fields.get_mut("oneOf") {
                choices.push(json!({ "type": "string", "pattern": r"\$\{" }));
            }
            fields.values_mut().for_each(polish);
        }
        _ => {}
    }
}
