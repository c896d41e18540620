//! The JSON Schema, against the types it is made of.

use serde_json::{Value, json};

use crate::config::Config;

fn schema() -> Value {
    Config::json_schema()
}

/// Every schema within, with its path.
fn walk(schema: &Value, path: &str, visit: &mut dyn FnMut(&str, &Value)) {
    visit(path, schema);
    match schema {
        Value::Object(fields) => fields.iter().for_each(|(key, value)| walk(value, &format!("{path}/{key}"), visit)),
        Value::Array(items) => items.iter().for_each(|value| walk(value, path, visit)),
        _ => {}
    }
}

#[test]
fn every_key_is_described_and_no_other_is_allowed() {
    let mut sections = 0;
    walk(&schema(), "", &mut |path, schema| {
        let Some(properties) = schema.get("properties").and_then(Value::as_object) else { return };
        assert_eq!(schema["additionalProperties"], json!(false), "{path}");
        for (key, property) in properties {
            assert!(property["description"].is_string(), "{path}/{key}");
        }
        sections += 1;
    });
    assert!(sections >= 12, "{sections}");
}

#[test]
fn defaults_are_as_they_are_written() {
    let schema = schema();
    let default = |section: &str, key: &str| &schema["$defs"][section]["properties"][key]["default"];
    assert_eq!(*default("Server", "request_timeout"), "10s");
    assert_eq!(*default("Server", "listen"), "0.0.0.0:8080");
    assert_eq!(*default("Server", "max_body"), "1MiB");
    assert_eq!(*default("Server", "max_batch"), 1000);
    assert_eq!(*default("Server", "cors_origins"), json!([]));
    assert_eq!(*default("Server", "management_listen"), Value::Null);
    assert_eq!(*default("Cache", "url"), "memory:");
    assert_eq!(*default("Cache", "timeout"), "100ms");
    assert_eq!(*default("Cache", "compress_above"), "0B");
    assert_eq!(*default("Local", "max_bytes"), "64MiB");
    assert_eq!(*default("Local", "warm_start"), false);
    assert_eq!(*default("Defaults", "ttl"), "1h");
    assert_eq!(*default("Defaults", "local_ttl"), "0s");
    assert_eq!(*default("Defaults", "ttl_jitter"), 0.1);
    assert_eq!(*default("Access", "adhoc_queries"), "off");
    assert_eq!(*default("Resource", "generate_key"), "database");
    assert_eq!(*default("Resource", "ttl"), Value::Null);
    assert_eq!(*default("List", "limit"), 1000);
    assert_eq!(*default("Telemetry", "log"), "json");
}

/// What the schema calls a default is what an empty file means.
#[test]
fn a_default_may_be_written_down() {
    let schema = schema();
    for (section, definition) in [
        ("server", "Server"),
        ("database", "Database"),
        ("cache", "Cache"),
        ("defaults", "Defaults"),
        ("invalidation", "Invalidation"),
        ("access", "Access"),
        ("telemetry", "Telemetry"),
    ] {
        let properties = schema["$defs"][definition]["properties"].as_object().unwrap();
        for (key, property) in properties {
            let Some(default) = property.get("default").filter(|default| !default.is_object()) else { continue };
            let override_of = format!("CACHE_ASIDE__{}__{}", section.to_uppercase(), key.to_uppercase());
            let text = default.as_str().map_or_else(|| default.to_string(), str::to_owned);
            assert_eq!(super::under(&[(&override_of, &text)]), super::with(""), "{override_of}={text}");
        }
    }
}

#[test]
fn variables_may_stand_for_numbers_and_words() {
    let schema = schema();
    assert_eq!(schema["$defs"]["Database"]["properties"]["pool_size"]["type"], json!(["integer", "string"]));
    assert_eq!(schema["$defs"]["Resource"]["properties"]["ttl_jitter"]["type"], json!(["number", "null", "string"]));
    let words = schema["$defs"]["LogFormat"]["oneOf"].as_array().unwrap();
    assert_eq!(words.last(), Some(&json!({ "type": "string", "pattern": r"\$\{" })));
}
