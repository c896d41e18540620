//! Which entries a change of a table concerns.
//!
//! A mapping is kept in the memory that it is about, not in the process that made it: whoever runs a round there must
//! deliver for everybody who caches there, for other versions and configurations of this service too.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64;

use super::{Key, Resource};

/// What of a changed row comes along with its change: captured columns, each as the text it has in the row's JSON.
pub type Image = BTreeMap<String, Option<String>>;

/// How changes of one table become invalidations of one resource.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mapping {
    /// The table, quoted and with its schema.
    #[serde(rename = "t")]
    pub relation: String,
    /// The resource, whose generation ends where a change can't be told row by row.
    #[serde(rename = "r")]
    pub resource: String,
    /// What the resource's cache keys start with, its name included.
    #[serde(rename = "p")]
    prefix: String,
    /// The key's columns; empty where the resource only depends on the table.
    #[serde(rename = "k")]
    key: Vec<String>,
    /// The columns of cached lists.
    #[serde(rename = "l")]
    lists: Vec<String>,
    /// The group of all cached lists, where a change may not tell which of them the row was in.
    #[serde(rename = "a", default, skip_serializing_if = "Option::is_none")]
    all_lists: Option<String>,
    /// The group that everything depending on the table shares.
    #[serde(rename = "g", default, skip_serializing_if = "Option::is_none")]
    group: Option<String>,
    /// Changes are told a moment after they are visible: a round must wait for that, whoever runs it.
    #[serde(rename = "w", default, skip_serializing_if = "std::ops::Not::not")]
    pub late: bool,
    /// Writers may hold the resource's entries.
    #[serde(rename = "h", default, skip_serializing_if = "std::ops::Not::not")]
    pub hold: bool,
}

/// What an announcement has in place of columns: what the dropped entries' keys start with, and the key of the only one.
const OF: &str = "of";
const KEY: &str = "key";

/// What a change does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// These cache keys are dropped.
    Drop(Vec<String>),
    /// The resource gets a new generation.
    Everything,
}

impl Mapping {
    /// What any change of the table drops.
    #[must_use]
    pub fn group(&self) -> Option<&str> {
        self.group.as_deref()
    }

    /// A name for exactly this mapping.
    #[must_use]
    pub fn fingerprint(&self) -> String {
        format!("{}:{:016x}", self.resource, xxh3_64(self.to_json().as_bytes()))
    }

    /// The mapping as text.
    #[must_use]
    pub fn to_json(&self) -> String {
        // Strings and lists of strings always are JSON.
        serde_json::to_string(self).unwrap_or_default()
    }

    /// Reads a mapping's text.
    #[must_use]
    pub fn from_json(text: &str) -> Option<Self> {
        serde_json::from_str(text).ok()
    }

    /// What a person's announcement does here; `None`: it is about something else.
    #[must_use]
    pub fn told(&self, announced: &Image) -> Option<Effect> {
        let said = |name: &str| announced.get(name).and_then(Option::as_ref);
        (said(OF) == Some(&self.prefix))
            .then(|| said(KEY).map_or(Effect::Everything, |key| Effect::Drop(vec![key.clone()])))
    }

    /// What a change of a row does; `None`: of any row.
    #[must_use]
    pub fn effect(&self, image: Option<&Image>) -> Effect {
        if let Some(group) = &self.group {
            return Effect::Drop(vec![group.clone()]);
        }
        let Some(image) = image else { return Effect::Everything };
        let parts: Option<Vec<String>> = self.key.iter().map(|column| image.get(column).cloned().flatten()).collect();
        // Captured by another version, without what this mapping needs.
        let Some(parts) = parts else { return Effect::Everything };
        let mut row = format!("{}:", self.prefix);
        Key::from_database(parts).spell(&mut row);
        let mut keys = vec![row];
        for column in &self.lists {
            match image.get(column) {
                Some(Some(value)) => keys.push(list(&self.prefix, column, value)),
                // In no list.
                Some(None) => {}
                None => match &self.all_lists {
                    Some(all) => keys.push(all.clone()),
                    None => return Effect::Everything,
                },
            }
        }
        Effect::Drop(keys)
    }
}

/// The cache key of a list; `prefix` ends with the resource's name.
pub(super) fn list(prefix: &str, column: &str, value: &str) -> String {
    format!("{prefix}?{column}={value}")
}

impl Resource {
    /// How changes reach this resource's entries: one mapping per table.
    #[must_use]
    pub fn mappings(&self) -> Vec<Mapping> {
        let bare = |relation: &str| Mapping {
            relation: relation.to_owned(),
            resource: self.name.to_string(),
            prefix: format!("{}{}", self.key_prefix, self.name),
            key: Vec::new(),
            lists: Vec::new(),
            all_lists: None,
            group: None,
            late: self.late,
            hold: false,
        };
        let depends = self.depends_on.iter().zip(&self.groups);
        let mut all: Vec<Mapping> =
            depends.map(|(relation, group)| Mapping { group: Some(group.clone()), ..bare(relation) }).collect();
        if !self.table.is_view {
            let key = self.key_columns().map(|column| column.name.clone()).collect();
            let lists = self.cached_lists().map(|column| column.name.clone()).collect();
            // Beyond what everything here depends on.
            let all_lists = self.list_groups.get(self.groups.len()).cloned();
            all.push(Mapping { key, lists, all_lists, hold: self.hold, ..bare(&self.table.relation()) });
        }
        all
    }

    /// How a person's drop of one entry, or of everything here, is announced.
    #[must_use]
    pub fn announcement(&self, entry: Option<&str>) -> Image {
        let of = (OF.to_owned(), Some(format!("{}{}", self.key_prefix, self.name)));
        let key = entry.map(|entry| (KEY.to_owned(), Some(entry.to_owned())));
        std::iter::once(of).chain(key).collect()
    }

    /// The columns of lists that can be cached.
    pub fn cached_lists(&self) -> impl Iterator<Item = &super::Column> {
        self.lists.iter().map(|list| &self.table.columns[list.column]).filter(|column| column.exact)
    }
}

#[cfg(test)]
mod tests {
    use super::{Effect, Image, Mapping};

    fn mapping() -> Mapping {
        Mapping {
            relation: "\"public\".\"lines\"".into(),
            resource: "lines".into(),
            prefix: "p:lines".into(),
            key: vec!["order_id".into(), "line_no".into()],
            lists: vec!["product".into()],
            all_lists: None,
            group: None,
            late: false,
            hold: false,
        }
    }

    fn image(values: &[(&str, Option<&str>)]) -> Image {
        values.iter().map(|(name, value)| ((*name).to_owned(), value.map(ToOwned::to_owned))).collect()
    }

    #[test]
    fn a_change_drops_the_row_and_its_lists() {
        let image = image(&[("order_id", Some("7")), ("line_no", Some("a,b")), ("product", Some("x"))]);
        let expected = Effect::Drop(vec!["p:lines:7,a%2Cb".into(), "p:lines?product=x".into()]);
        assert_eq!(mapping().effect(Some(&image)), expected);
    }

    #[test]
    fn what_is_not_known_may_be_anything() {
        assert_eq!(mapping().effect(None), Effect::Everything);
        let lacking = image(&[("order_id", Some("7")), ("line_no", Some("1"))]);
        assert_eq!(mapping().effect(Some(&lacking)), Effect::Everything);
        let grouped = Mapping { all_lists: Some("p:all".into()), ..mapping() };
        let expected = Effect::Drop(vec!["p:lines:7,1".into(), "p:all".into()]);
        assert_eq!(grouped.effect(Some(&lacking)), expected);
        let in_no_list = image(&[("order_id", Some("7")), ("line_no", Some("1")), ("product", None)]);
        assert_eq!(mapping().effect(Some(&in_no_list)), Effect::Drop(vec!["p:lines:7,1".into()]));
    }

    #[test]
    fn an_announcement_concerns_the_resource_that_it_is_of() {
        let mapping = mapping();
        let of = |of: &str, key| image(&[("of", Some(of)), ("key", key)]);
        assert_eq!(mapping.told(&of("p:lines", Some("p:lines:7,1"))), Some(Effect::Drop(vec!["p:lines:7,1".into()])));
        assert_eq!(mapping.told(&of("p:lines", None)), Some(Effect::Everything));
        assert_eq!(mapping.told(&of("q:lines", None)), None);
    }

    #[test]
    fn a_mapping_survives_as_text() {
        let group = Mapping { group: Some("p:cache-aside:group:x".into()), ..mapping() };
        for mapping in [mapping(), group] {
            assert_eq!(Mapping::from_json(&mapping.to_json()), Some(mapping));
        }
        assert_ne!(mapping().fingerprint(), Mapping { lists: vec![], ..mapping() }.fingerprint());
    }
}
