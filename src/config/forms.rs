//! How values look in the file, for the JSON Schema: an editor knows from it what may be typed.

use std::borrow::Cow;
use std::collections::BTreeMap;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};

/// Declares a schema that stands in for a type whose text form serde doesn't know.
macro_rules! form {
    ($(#[$meta:meta])* $name:ident $schema:tt) => {
        $(#[$meta])*
        pub(super) struct $name;

        impl JsonSchema for $name {
            fn inline_schema() -> bool {
                true
            }

            fn schema_name() -> Cow<'static, str> {
                stringify!($name).into()
            }

            fn json_schema(_: &mut SchemaGenerator) -> Schema {
                json_schema!($schema)
            }
        }
    };
}

form! {
    /// `10s`. Only zero needs no unit.
    Duration { "anyOf": [{ "type": "string", "pattern": r"^([0-9]+ ?(ms|s|m|h|d)|0+)$|\$\{" }, { "const": 0 }] }
}

form! {
    /// `64KiB`.
    Size {
        "anyOf": [
            { "type": "string", "pattern": r"^[0-9]+ ?(B|KiB|MiB|GiB)?$|\$\{" },
            { "type": "integer", "minimum": 0 },
        ]
    }
}

form! {
    /// `true` or `false`.
    Flag { "anyOf": [{ "type": "boolean" }, { "type": "string", "pattern": r"^(true|false)$|\$\{" }] }
}

form! {
    /// 64 hexadecimal digits.
    Digest { "type": "string", "pattern": r"^[0-9A-Fa-f]{64}$|\$\{" }
}

form! {
    /// Nothing, or a string.
    Text { "type": ["string", "null"] }
}

form! {
    /// A name or a list of names.
    Names { "anyOf": [{ "type": "string" }, { "type": "array", "items": { "type": "string" } }] }
}

form! {
    /// A parameter's name, with or without a default.
    Parameter {
        "anyOf": [
            { "type": "string" },
            {
                "type": "object",
                "properties": {
                    "name": { "description": "The name in the URL.", "type": "string" },
                    "default": { "description": "What holds where it is not given.", "type": ["string", "null"] },
                },
                "required": ["name"],
                "additionalProperties": false,
            },
        ]
    }
}

/// Values by name, where `name:` alone means all defaults.
pub(super) type Named<T> = BTreeMap<String, Option<T>>;
