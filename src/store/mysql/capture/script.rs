//! The SQL that installs and removes the capture: what all tables share, and the triggers of each.
//!
//! Cascades of foreign keys fire no triggers (MySQL before 9.7, MariaDB). So the triggers of a table tell, besides its own
//! rows, which captured tables its cascades may have changed: all of each, since nobody knows which rows.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use xxhash_rust::xxh3::xxh3_64;

use super::super::form::Form;
use super::super::sql::{literal, quote};
use crate::catalog::{Column, Kind};

/// What the scripts install; a service refuses to rely on an older one.
pub(super) const VERSION: i64 = 1;

/// Our triggers, wherever they are.
pub(super) const TRIGGERS: &str = "
  SELECT t.TRIGGER_SCHEMA, t.TRIGGER_NAME, t.EVENT_OBJECT_TABLE, t.ACTION_STATEMENT, CAST(t.CREATED AS CHAR)
  FROM information_schema.TRIGGERS t WHERE t.TRIGGER_NAME LIKE 'cache|_aside|_%' ESCAPE '|'";

/// Foreign keys that change rows of the referring table.
pub(super) const CASCADES: &str = "
  SELECT k.TABLE_SCHEMA, k.TABLE_NAME, k.REFERENCED_TABLE_SCHEMA, k.REFERENCED_TABLE_NAME, k.REFERENCED_COLUMN_NAME,
         r.DELETE_RULE NOT IN ('RESTRICT', 'NO ACTION'), r.UPDATE_RULE NOT IN ('RESTRICT', 'NO ACTION')
  FROM information_schema.REFERENTIAL_CONSTRAINTS r JOIN information_schema.KEY_COLUMN_USAGE k
    ON k.CONSTRAINT_SCHEMA = r.CONSTRAINT_SCHEMA AND k.CONSTRAINT_NAME = r.CONSTRAINT_NAME AND k.TABLE_NAME = r.TABLE_NAME
  WHERE (r.DELETE_RULE NOT IN ('RESTRICT', 'NO ACTION') OR r.UPDATE_RULE NOT IN ('RESTRICT', 'NO ACTION'))";

/// Tables by database and name.
pub(super) type Place = (String, String);

/// The name that the catalog has for a table.
pub(super) fn relation(place: &Place) -> String {
    let quote = |part: &str| format!("\"{}\"", part.replace('"', "\"\""));
    format!("{}.{}", quote(&place.0), quote(&place.1))
}

/// The shared part, statement by statement.
pub(super) fn base() -> Vec<String> {
    let script = include_str!("base.sql")
        .replace("{version}", &VERSION.to_string())
        .replace("{triggers}", TRIGGERS.trim())
        .replace("{cascades}", CASCADES.trim());
    // Statements end at an empty line.
    let uncommented = |part: &str| {
        let lines: Vec<&str> = part.lines().filter(|line| !line.starts_with("--")).collect();
        lines.join("\n").trim().trim_end_matches(';').to_owned()
    };
    script.split(";\n\n").map(uncommented).map(|part| part.trim_end_matches(';').to_owned()).collect()
}

/// What an account needs to serve, and nothing more.
pub(super) fn grant(account: &str) -> Vec<String> {
    let account = match account.rsplit_once('@') {
        Some((user, host)) => format!("{}@{}", quote(unquoted(user)), quote(unquoted(host))),
        None => quote(unquoted(account)),
    };
    [
        "SELECT, UPDATE ON cache_aside.about",
        "SELECT ON cache_aside.captures",
        "SELECT, INSERT, DELETE ON cache_aside.outbox",
        "SELECT, INSERT, DELETE ON cache_aside.points",
        "SELECT, INSERT ON cache_aside.life",
        "EXECUTE ON PROCEDURE cache_aside.installed",
    ]
    .map(|right| format!("GRANT {right} TO {account}"))
    .to_vec()
}

fn unquoted(name: &str) -> &str {
    ['\'', '`', '"'].iter().find_map(|quote| name.strip_prefix(*quote)?.strip_suffix(*quote)).unwrap_or(name)
}

/// One foreign key that changes rows by itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Cascade {
    pub(super) child: Place,
    pub(super) parent: Place,
    /// The parent's column.
    pub(super) column: String,
    pub(super) deletes: bool,
    pub(super) updates: bool,
}

/// What cascades of one table may change, by what is done to it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Below {
    /// Captured tables, by relation.
    pub(super) delete: BTreeSet<String>,
    /// By the column that must change for it.
    pub(super) update: BTreeMap<String, BTreeSet<String>>,
}

/// What the cascades of each table may change of the captured ones.
pub(super) fn below(cascades: &[Cascade], captured: &BTreeSet<String>) -> BTreeMap<Place, Below> {
    let mut all: BTreeMap<Place, Below> = BTreeMap::new();
    for cascade in cascades {
        let (mut reached, mut open) = (BTreeSet::new(), vec![cascade.child.clone()]);
        while let Some(place) = open.pop() {
            if reached.insert(place.clone()) {
                open.extend(cascades.iter().filter(|other| other.parent == place).map(|other| other.child.clone()));
            }
        }
        let concerned: BTreeSet<String> =
            reached.iter().map(relation).filter(|relation| captured.contains(relation)).collect();
        if concerned.is_empty() {
            continue;
        }
        let below = all.entry(cascade.parent.clone()).or_default();
        if cascade.deletes {
            below.delete.extend(concerned.iter().cloned());
        }
        if cascade.updates {
            below.update.entry(cascade.column.clone()).or_default().extend(concerned);
        }
    }
    all
}

/// The events that are captured.
pub(super) const EVENTS: [&str; 3] = ["insert", "update", "delete"];

/// The name of a trigger.
pub(super) fn trigger(place: &Place, event: &str) -> String {
    format!("cache_aside_{:016x}_{event}", xxh3_64(relation(place).as_bytes()))
}

const INTO: &str = "INSERT INTO cache_aside.outbox (tx, relation, image) VALUES";
const WORD: &str = "LEFT(@cache_aside_tx, 32)";

/// Tells that anything in a table may have changed.
pub(super) fn whole(relation: &str) -> String {
    format!("{INTO} ({WORD}, {}, NULL);", literal(relation))
}

/// What a table's trigger tells of its own rows.
pub(super) fn own(relation: &str, columns: &[&Column], event: &str) -> String {
    let settled: Option<Vec<(&str, String, String)>> =
        columns.iter().map(|column| Some((column.name.as_str(), text("OLD", column)?, text("NEW", column)?))).collect();
    let Some(texts) = settled else { return whole(relation) };
    let image = |pick: fn(&(&str, String, String)) -> String| {
        let parts: Vec<String> = texts.iter().map(|part| format!("{}, {}", literal(part.0), pick(part))).collect();
        format!("JSON_OBJECT({})", parts.join(", "))
    };
    let (old, new) = (image(|part| part.1.clone()), image(|part| part.2.clone()));
    let tell = |image: &str| format!("{INTO} ({WORD}, {}, {image});", literal(relation));
    match event {
        "insert" => tell(&new),
        "delete" => tell(&old),
        // Whatever character set the trigger's creator spoke: in a smaller one, texts that differ are the same.
        _ => format!(
            "{}\n  IF NOT (CAST(CONVERT({old} USING utf8mb4) AS BINARY) <=> CAST(CONVERT({new} USING utf8mb4) AS BINARY)) \
             THEN {} END IF;",
            tell(&new),
            tell(&old)
        ),
    }
}

/// What it tells of the tables below.
pub(super) fn cascaded(below: &Below, event: &str) -> Vec<String> {
    match event {
        "delete" => below.delete.iter().map(|relation| whole(relation)).collect(),
        "update" => below
            .update
            .iter()
            .map(|(column, relations)| {
                let name = quote(column);
                let told: Vec<String> = relations.iter().map(|relation| whole(relation)).collect();
                format!(
                    "IF NOT (CAST(OLD.{name} AS BINARY) <=> CAST(NEW.{name} AS BINARY)) THEN {} END IF;",
                    told.join(" ")
                )
            })
            .collect(),
        _ => Vec::new(),
    }
}

/// A trigger's body; `None` where there is nothing to tell.
pub(super) fn body(relation: &str, columns: Option<&[&Column]>, below: Option<&Below>, event: &str) -> Option<String> {
    let mut parts: Vec<String> = columns.map(|columns| own(relation, columns, event)).into_iter().collect();
    parts.extend(below.map(|below| cascaded(below, event)).unwrap_or_default());
    (!parts.is_empty()).then(|| {
        let mut body = String::from("BEGIN\n");
        for part in parts {
            // Writing to a String can't fail.
            let _ = writeln!(body, "  {part}");
        }
        body + "END"
    })
}

pub(super) fn create(place: &Place, event: &str, body: &str) -> String {
    format!(
        "CREATE TRIGGER {}.{} AFTER {} ON {} FOR EACH ROW\n{body}",
        quote(&place.0),
        quote(&trigger(place, event)),
        event.to_uppercase(),
        table(place)
    )
}

pub(super) fn drop(schema: &str, trigger: &str) -> String {
    format!("DROP TRIGGER IF EXISTS {}.{}", quote(schema), quote(trigger))
}

/// A table as SQL has it.
pub(super) fn table(place: &Place) -> String {
    format!("{}.{}", quote(&place.0), quote(&place.1))
}

/// The text that a column's value has in the row's JSON, as SQL makes it; `None` where it is written differently in each
/// session, or by more rules than belong into a trigger.
fn text(row: &str, column: &Column) -> Option<String> {
    let value = format!("{row}.{}", quote(&column.name));
    Some(match Form::of(column) {
        // Plus nothing: without the zeros of ZEROFILL.
        Form::Integer | Form::Decimal => format!("CAST({value} + 0 AS CHAR)"),
        Form::Boolean => {
            format!("CASE {value} WHEN 1 THEN 'true' WHEN 0 THEN 'false' ELSE CAST({value} AS CHAR) END")
        }
        Form::Bits(width) => format!("LPAD(BIN({value} + 0), {width}, '0')"),
        Form::Date => format!("DATE_FORMAT({value}, '%Y-%m-%d')"),
        Form::Bytes if column.exact => format!("CONCAT(CHAR(92 USING utf8mb4), 'x', LOWER(HEX({value})))"),
        Form::Text if column.kind == Kind::Uuid => format!("CAST({value} AS CHAR)"),
        Form::Text => format!("CONVERT({value} USING utf8mb4)"),
        Form::Float | Form::Double | Form::DateTime | Form::Timestamp | Form::Time | Form::Json | Form::Bytes => {
            return None;
        }
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::{Cascade, Place, base, below, grant, relation};

    fn place(name: &str) -> Place {
        ("shop".into(), name.into())
    }

    fn cascade(child: &str, parent: &str, deletes: bool, updates: bool) -> Cascade {
        Cascade { child: place(child), parent: place(parent), column: "id".into(), deletes, updates }
    }

    #[test]
    fn whatever_a_cascade_reaches_is_told() {
        let cascades = [
            cascade("b", "a", true, false),
            cascade("c", "b", false, true),
            cascade("c", "c", true, true),
            cascade("x", "y", true, true),
        ];
        let captured: BTreeSet<String> = ["b", "c"].iter().map(|name| relation(&place(name))).collect();
        let all = below(&cascades, &captured);
        assert_eq!(all[&place("a")].delete, captured);
        assert!(all[&place("a")].update.is_empty());
        assert_eq!(all[&place("b")].update["id"].len(), 1);
        assert!(!all.contains_key(&place("y")), "nobody caches x");
    }

    #[test]
    fn the_shared_part_is_one_statement_after_the_other() {
        let all = base();
        assert_eq!(all.len(), 10, "{all:#?}");
        assert!(all.iter().all(|statement| !statement.ends_with(';') && !statement.is_empty()));
        assert!(all.iter().any(|statement| statement.starts_with("CREATE PROCEDURE") && statement.ends_with("END")));
    }

    #[test]
    fn an_account_is_quoted_whatever_its_name() {
        assert!(grant("app")[0].ends_with(" TO `app`"));
        assert!(grant("'app'@'10.%'")[0].ends_with(" TO `app`@`10.%`"));
        assert!(grant("a`b@%")[0].ends_with(" TO `a``b`@`%`"));
    }
}
