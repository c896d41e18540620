//! Keys out of paths and query strings: split at commas first, decoded afterwards.

use percent_encoding::percent_decode_str;

use super::problem::Problem;

/// Decodes one part of a path.
pub(super) fn decode(text: &str) -> Result<String, Problem> {
    let decoded = percent_decode_str(text).decode_utf8();
    decoded.map(std::borrow::Cow::into_owned).map_err(|_| Problem::bad_request("the path is not UTF-8"))
}

/// Decodes one part of a query string, in which a plus is a space.
fn decode_query(text: &str) -> Result<String, Problem> {
    let spaced = if text.contains('+') { text.replace('+', " ").into() } else { std::borrow::Cow::Borrowed(text) };
    let decoded = percent_decode_str(&spaced).decode_utf8();
    decoded.map(std::borrow::Cow::into_owned).map_err(|_| Problem::bad_request("the query string is not UTF-8"))
}

/// The parts of a key in a path.
pub(super) fn parts(text: &str) -> Result<Vec<String>, Problem> {
    text.split(',').map(decode).collect()
}

/// One parameter of a query string: its decoded name, and its value as it came.
pub(super) struct Parameter<'a> {
    pub(super) name: String,
    raw: &'a str,
    bare: bool,
}

impl Parameter<'_> {
    /// It came without an equals sign.
    pub(super) fn is_bare(&self) -> bool {
        self.bare
    }

    /// The value, whole.
    pub(super) fn value(&self) -> Result<String, Problem> {
        decode_query(self.raw)
    }

    /// The value's parts.
    pub(super) fn parts(&self) -> Result<Vec<String>, Problem> {
        self.raw.split(',').map(decode_query).collect()
    }
}

/// The parameters of a query string.
pub(super) fn parameters(query: &str) -> Result<Vec<Parameter<'_>>, Problem> {
    query
        .split('&')
        .filter(|pair| !pair.is_empty())
        .map(|pair| {
            let (name, raw) = pair.split_once('=').unwrap_or((pair, ""));
            Ok(Parameter { name: decode_query(name)?, raw, bare: !pair.contains('=') })
        })
        .collect()
}
