//! `queries:` statements that are served by name.

use serde::Deserialize;

#[cfg(feature = "config")]
use super::forms;
use super::lifetimes::overriding;
use super::units;

overriding! {
    /// A query that is served.
    pub struct Query {
        /// The statement, with `$1`, `$2`… for its parameters. Required.
        pub sql: String,
        /// The parameters in order: names, or `{name, default}`. Default: none.
        #[cfg_attr(feature = "config", schemars(with = "Vec<forms::Parameter>"))]
        pub params: Vec<Parameter>,
        /// The tables whose change drops its results. Default: none, so that only the TTL does.
        pub depends_on: Vec<String>,
    }
}

/// A query's parameter: a name, or a name with a default.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(from = "Form")]
pub struct Parameter {
    /// The name in the URL; each name once.
    pub name: String,
    /// What holds where it is not given. Default: none, so that it must be given.
    pub default: Option<String>,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a parameter's name, or its name and default")]
enum Form {
    Name(String),
    Whole { name: String, default: Option<String> },
}

impl From<Form> for Parameter {
    fn from(form: Form) -> Self {
        match form {
            Form::Name(name) => Self { name, default: None },
            Form::Whole { name, default } => Self { name, default },
        }
    }
}
