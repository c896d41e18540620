//! What is wrong with a configuration, where it stands, and what to do about it.

/// A configuration that can't be used: the message names the file and line (or the variable) and the key.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ConfigError(String);

#[cfg(feature = "config")]
impl ConfigError {
    /// An error with its whole message.
    pub(super) fn new(message: impl Into<String>) -> Self {
        Self(message.into())
    }
}

/// Where a value came from.
#[cfg(feature = "config")]
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Origin {
    /// A line of the file.
    Line(usize),
    /// An environment variable.
    Variable(String),
    /// Nowhere: it is not there.
    Absent,
}

#[cfg(feature = "config")]
impl Origin {
    /// An error about the value of `path`, in the file called `name`.
    pub(super) fn error(&self, name: &str, path: &[String], message: &str) -> ConfigError {
        let place = match self {
            Self::Line(line) => format!("{name}:{line}"),
            Self::Variable(variable) => variable.clone(),
            Self::Absent => name.to_owned(),
        };
        let key = if path.is_empty() { String::new() } else { format!("{}: ", spell(path)) };
        ConfigError(format!("{place}: {key}{message}"))
    }
}

/// What is wrong with the value of `path`, where nobody knows a place for it.
pub(super) fn fault(path: &[String], message: &str) -> ConfigError {
    ConfigError(format!("{}: {message}", spell(path)))
}

/// A path as people write it: `resources.users.key`, `access.tokens[0].name`. A list's steps are `[0]`, `[1]`…
pub(super) fn spell(path: &[String]) -> String {
    let mut out = String::new();
    for step in path {
        if !out.is_empty() && !step.starts_with('[') {
            out.push('.');
        }
        // A message is one line, whatever the key holds.
        out.extend(step.chars().flat_map(|letter| {
            let escaped = letter.is_control().then(|| letter.escape_default());
            let plain = escaped.is_none().then_some(letter);
            escaped.into_iter().flatten().chain(plain)
        }));
    }
    out
}

/// The candidate closest to `name`, if one is close enough to have been meant.
pub(crate) fn nearest<'a>(name: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    // Longer ones come from no human hand, and comparing takes time by the product of the lengths.
    if name.len() > 64 {
        return None;
    }
    let lower = name.to_lowercase();
    candidates
        .into_iter()
        .map(|candidate| (strsim::damerau_levenshtein(&lower, &candidate.to_lowercase()), candidate))
        .min()
        // Of a short name nothing may be left to be like.
        .filter(|(distance, _)| *distance < lower.chars().count())
        .filter(|(distance, candidate)| *distance <= 1 + candidate.chars().count() / 4)
        .map(|(_, candidate)| candidate)
}

#[cfg(test)]
mod tests {
    use super::nearest;

    #[test]
    fn only_a_near_name_is_suggested() {
        let known = ["category_id", "name", "price"];
        assert_eq!(nearest("categoryid", known), Some("category_id"));
        assert_eq!(nearest("nmae", known), Some("name"));
        assert_eq!(nearest("quantity", known), None);
        assert_eq!(nearest(&"name".repeat(100), known), None, "and not searched for at any length");
    }
}
