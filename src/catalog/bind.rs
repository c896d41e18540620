//! Holds a declared resource against the table the database described, and says in words what does not fit.

use std::collections::BTreeMap;
use std::hash::{Hash, Hasher};
use std::sync::Arc;

use xxhash_rust::xxh3::Xxh3;

use super::resource::Statements;
use super::{Kind, List, Order, Policy, Resource, Table, names};
use crate::config::{self, Defaults, GenerateKey};

/// Something about a resource that its operator should know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// It can't be served at all.
    pub fatal: bool,
    /// It is served, but not as it was asked for: past the cache.
    pub bypass: bool,
    /// What is wrong, and what to do.
    pub text: String,
}

impl Problem {
    /// A problem that keeps the resource from being served.
    pub fn fatal(text: impl Into<String>) -> Self {
        Self { fatal: true, bypass: false, text: text.into() }
    }

    /// A problem that only limits what is cached, or surprises.
    pub fn warning(text: impl Into<String>) -> Self {
        Self { fatal: false, bypass: false, text: text.into() }
    }

    /// A problem that keeps the resource out of the cache.
    pub fn bypass(text: impl Into<String>) -> Self {
        Self { fatal: false, bypass: true, text: text.into() }
    }
}

/// Resolves every name of `declared` in `table`.
///
/// # Errors
///
/// All problems found, if one of them is fatal; the others come with the resource.
pub fn bind(
    name: &str,
    declared: &config::Resource,
    defaults: &Defaults,
    key_prefix: &str,
    table: Table,
) -> Result<(Resource, Vec<Problem>), Vec<Problem>> {
    let mut problems = Vec::new();
    let mut find =
        |column: &str| names::column(&table, column).map_err(|text| problems.push(Problem::fatal(text))).ok();
    let key: Vec<usize> = match declared.key.as_slice() {
        [] => table.primary_key.iter().filter_map(|column| table.position(column)).collect(),
        named => named.iter().filter_map(|column| find(column)).collect(),
    };
    let columns: Vec<usize> = match &declared.columns {
        Some(named) => named.iter().filter_map(|column| find(column)).collect(),
        None => (0..table.columns.len()).collect(),
    };
    let values = declared.over(defaults);
    let mut lists = Vec::new();
    for (column, list) in &declared.lists {
        let Some(column) = find(column) else { continue };
        let mut order = match &list.order_by {
            Some(order_by) => order_of(order_by, &mut find),
            None => Vec::new(),
        };
        for position in &key {
            if !order.iter().any(|by| by.column == *position) {
                order.push(Order { column: *position, descending: false });
            }
        }
        let policy = Policy { ttl: list.ttl.unwrap_or(values.ttl), ..Policy::new(&values) };
        lists.push(List { column, order, limit: list.limit, policy });
    }
    if key.is_empty() && problems.is_empty() {
        problems.push(Problem::fatal(format!(
            "{} has no primary key; name the column that identifies a row with key:",
            table.name
        )));
    }
    judge(&table, declared, &key, &lists, &mut problems);
    if problems.iter().any(|problem| problem.fatal) {
        return Err(problems);
    }
    let mut resource = Resource {
        name: Arc::from(name),
        table,
        key,
        columns,
        lists,
        policy: Policy::new(&values),
        write: declared.write.clone(),
        generate_key: declared.generate_key,
        shape: 0,
        key_prefix: key_prefix.to_owned(),
        statements: Statements::default(),
        parameters: None,
        depends_on: Vec::new(),
        groups: Vec::new(),
        list_groups: Vec::new(),
        hold: declared.consistency == config::Consistency::Hold,
        late: false,
        capture: super::Capture::Off,
        filter: declared.filter,
    };
    resource.shape = shape(&resource);
    Ok((resource, problems))
}

/// `name`, `name desc`, `-name`, or several of them separated by commas.
fn order_of(text: &str, find: &mut impl FnMut(&str) -> Option<usize>) -> Vec<Order> {
    let one = |part: &str| {
        let part = part.trim();
        let (column, descending) = match (part.strip_prefix('-'), part.rsplit_once(' ')) {
            (Some(column), _) => (column, true),
            (None, Some((column, way))) if way.eq_ignore_ascii_case("desc") => (column, true),
            (None, Some((column, way))) if way.eq_ignore_ascii_case("asc") => (column, false),
            _ => (part, false),
        };
        find(column.trim()).map(|column| Order { column, descending })
    };
    text.split(',').filter_map(one).collect()
}

fn judge(table: &Table, declared: &config::Resource, key: &[usize], lists: &[List], problems: &mut Vec<Problem>) {
    let column = |position: &usize| &table.columns[*position];
    if !declared.write.is_empty() && table.is_view {
        problems.push(Problem::fatal(format!("{} is a view: write: needs a table", table.name)));
    }
    let names: Vec<&str> = key.iter().map(|position| column(position).name.as_str()).collect();
    if !table.is_view && !names.is_empty() && !table.is_unique(&names) {
        let text = format!(
            "no unique index of {} covers the key ({}): where several rows share a key, one of them is served",
            table.name,
            names.join(", ")
        );
        problems.push(if declared.write.is_empty() {
            Problem::warning(text)
        } else {
            Problem::fatal(format!("{text}, but write: would change all of them"))
        });
    }
    for position in key {
        let column = column(position);
        if !column.exact {
            problems.push(Problem::warning(format!(
                "equal values of key column {} ({}) can have several texts: a row is cached only under the text the \
                 database gives, and \"not found\" is not cached",
                column.name, column.type_name
            )));
        }
    }
    for list in lists {
        let column = column(&list.column);
        if !column.exact {
            problems.push(Problem::warning(format!(
                "equal values of list column {} ({}) can have several texts: this list is served, but not cached",
                column.name, column.type_name
            )));
        }
    }
    let wanted = match declared.generate_key {
        GenerateKey::Database => return,
        GenerateKey::Ulid => "ulid",
        GenerateKey::Uuidv7 => "uuidv7",
    };
    let fits = |position: &usize| matches!(column(position).kind, Kind::Text { .. } | Kind::Uuid);
    if key.len() != 1 || !key.iter().all(fits) {
        problems.push(Problem::fatal(format!(
            "generate_key: {wanted} needs a key of one text or uuid column; ({}) is not",
            names.join(", ")
        )));
    }
}

/// All that decides the bytes of an entry, and nothing that differs between two processes.
fn shape(resource: &Resource) -> u64 {
    let mut hasher = Xxh3::new();
    resource.table.schema.hash(&mut hasher);
    resource.table.name.hash(&mut hasher);
    for column in resource.shown_columns().chain(resource.key_columns()) {
        (&column.name, &column.type_name).hash(&mut hasher);
    }
    for list in &resource.lists {
        (&resource.table.columns[list.column].name, &list.order, list.limit).hash(&mut hasher);
    }
    hasher.finish()
}

/// A read-only resource for every table that has a primary key, named after it.
#[must_use]
pub fn discover(tables: &[Table]) -> BTreeMap<String, config::Resource> {
    let mut found = BTreeMap::new();
    for table in tables.iter().filter(|table| !table.primary_key.is_empty()) {
        let base = resource_name(&table.name);
        let qualified = table.schema.as_ref().map(|schema| resource_name(&format!("{schema}_{}", table.name)));
        let numbered = (2..).map(|number: u32| format!("{base}_{number}"));
        let name = std::iter::once(base.clone())
            .chain(qualified)
            .chain(numbered)
            .find(|name| !found.contains_key(name) && name != "query" && name != "queries");
        // The numbered names never end.
        if let Some(name) = name {
            found.insert(name, config::Resource { table: table.relation(), ..config::Resource::default() });
        }
    }
    found
}

/// `Order Details` → `order_details`; what is no letter or digit of ASCII becomes `_`.
fn resource_name(table: &str) -> String {
    let mut name: String = table
        .chars()
        .map(|letter| if letter.is_ascii_alphanumeric() { letter.to_ascii_lowercase() } else { '_' })
        .collect();
    if !name.starts_with(|first: char| first.is_ascii_lowercase()) {
        name.insert_str(0, "t_");
    }
    name
}
