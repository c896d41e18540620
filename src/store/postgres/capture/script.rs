//! The SQL that installs and removes the capture: what all tables share, and one function with its triggers for each.

use std::fmt::Write as _;

use xxhash_rust::xxh3::xxh3_64;

use super::super::sql::quote;

/// What the scripts install; a service refuses to rely on an older one.
pub(super) const VERSION: i32 = 1;

/// A statement that changes more rows is captured as "anything may have changed".
const MOST_ROWS: usize = 10_000;

/// Which rows' triggers can be trusted to see every statement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Level {
    /// Once per statement, with the changed rows as tables.
    Statement,
    /// Once per row: what reaches every partition, those that come later too, and rows that are changed through a parent.
    Row,
}

/// The shared part.
pub(super) fn base() -> String {
    include_str!("base.sql").replace("{version}", &VERSION.to_string())
}

/// Removes everything: the triggers go with their functions.
pub(super) const UNINSTALL: &str = "DROP SCHEMA IF EXISTS cache_aside CASCADE;\n";

/// What a role needs to serve, and nothing more.
pub(super) fn grant(role: &str) -> String {
    let role = quote(role);
    format!(
        "GRANT USAGE ON SCHEMA cache_aside TO {role};\n\
         GRANT SELECT ON cache_aside.about, cache_aside.captures, cache_aside.outbox TO {role};\n\
         GRANT EXECUTE ON FUNCTION cache_aside.sweep(integer), cache_aside.origin() TO {role};\n"
    )
}

/// A captured column.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Column {
    pub(super) name: String,
    /// Its type as the installer saw it: of another one the function knows nothing.
    pub(super) type_name: String,
    pub(super) kind: Written,
}

/// How a value becomes text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Written {
    /// As in the row's JSON, the same in every session.
    Json,
    /// An enum's label, by its own output: a user's cast to JSON must not run with the rights of the function's owner.
    Label,
    /// Differently in each session, or by a user's own function: such a row can't be told.
    Unsettled,
}

/// The name of a table's function: readable, and as good as unique.
pub(super) fn function(relation: &str) -> String {
    format!("cache_aside.{}", quote(&function_name(relation)))
}

/// The same without quotes and schema.
pub(super) fn function_name(relation: &str) -> String {
    let readable: String = relation.chars().filter(|letter| letter.is_ascii_alphanumeric() || *letter == '_').collect();
    let readable: String = readable.chars().take(36).collect();
    format!("{readable}_{:016x}", xxh3_64(relation.as_bytes()))
}

/// The events that are captured.
pub(super) const EVENTS: [&str; 4] = ["insert", "update", "delete", "truncate"];

/// The name of a trigger. A partition has its parent's and may have its own.
pub(super) fn trigger(relation: &str, event: &str) -> String {
    format!("cache_aside_{:016x}_{event}", xxh3_64(relation.as_bytes()))
}

/// Installs, or brings up to date, the capture of one table.
pub(super) fn table(relation: &str, columns: &[Column], level: Level) -> String {
    let (function, name) = (function(relation), literal(relation));
    let body = match level {
        Level::Statement => by_statement(&name, columns),
        Level::Row => by_row(&name, columns),
    };
    // What a session may have set and what decides how numbers and bytes are written; services set the same.
    let settings = " SET bytea_output = hex SET extra_float_digits = 1";
    let names: Vec<String> = columns.iter().map(|column| literal(&column.name)).collect();
    // A tag that the body can't hold: names may have any letters.
    let tag = format!("$capture_{:x}$", xxh3_64(body.as_bytes()));
    let mut script = format!(
        "CREATE OR REPLACE FUNCTION {function}() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER\n\
         SET search_path = pg_catalog, pg_temp{settings} AS {tag}\n{body}{tag};\n\
         REVOKE ALL ON FUNCTION {function}() FROM PUBLIC;\n"
    );
    for event in EVENTS {
        let (rows, each) = match (level, event) {
            (_, "truncate") => ("", "STATEMENT"),
            (Level::Row, _) => ("", "ROW"),
            (Level::Statement, "insert") => (" REFERENCING NEW TABLE AS new_rows", "STATEMENT"),
            (Level::Statement, "delete") => (" REFERENCING OLD TABLE AS old_rows", "STATEMENT"),
            (Level::Statement, _) => (" REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows", "STATEMENT"),
        };
        // Writing to a String can't fail.
        let _ = writeln!(
            script,
            "CREATE OR REPLACE TRIGGER {} AFTER {} ON {relation}{rows} FOR EACH {each} EXECUTE FUNCTION {function}();",
            trigger(relation, event),
            event.to_uppercase()
        );
    }
    let _ = writeln!(
        script,
        "INSERT INTO cache_aside.captures AS c (relation, columns) VALUES ({name}, ARRAY[{}]::text[])\n\
         ON CONFLICT (relation) DO UPDATE SET columns = excluded.columns;",
        names.join(", ")
    );
    script
}

/// Forgets that a table was captured: what comes next is a new installation.
pub(super) fn forget(relation: &str) -> String {
    format!("DELETE FROM cache_aside.captures WHERE relation = {};\n", literal(relation))
}

fn literal(text: &str) -> String {
    // Standard strings: a backslash means itself.
    format!("'{}'", text.replace('\'', "''"))
}

/// Whether the statement can't be told row by row: the table was emptied, or a captured column was dropped, renamed or
/// made of another type since (then the rest of the function would fail, and with it everybody's writes).
fn anything(columns: &[Column]) -> String {
    if columns.is_empty() {
        return "TG_OP = 'TRUNCATE'".into();
    }
    if columns.iter().any(|column| column.kind == Written::Unsettled) {
        return "true".into();
    }
    let known: Vec<String> =
        columns.iter().map(|column| format!("({}, {})", literal(&column.name), literal(&column.type_name))).collect();
    format!(
        "TG_OP = 'TRUNCATE' OR (SELECT count(*) FROM pg_attribute a WHERE a.attrelid = TG_RELID AND NOT a.attisdropped \
         AND (a.attname::text, format_type(a.atttypid, NULL)) IN ({})) <> {}",
        known.join(", "),
        columns.len()
    )
}

/// The captured columns of a row, each as the text that it has in the row's JSON.
fn image(row: &str, columns: &[Column]) -> String {
    let part = |column: &Column| {
        let (name, value) = (literal(&column.name), format!("{row}.{}", quote(&column.name)));
        match column.kind {
            Written::Label => format!("{name}, CASE WHEN {value} IS NOT NULL THEN format('%s', {value}) END"),
            Written::Json | Written::Unsettled => format!("{name}, to_jsonb({value}) #>> '{{}}'"),
        }
    };
    let parts: Vec<String> = columns.iter().map(part).collect();
    format!("jsonb_build_object({})", parts.join(", "))
}

fn by_statement(name: &str, columns: &[Column]) -> String {
    let everything = format!("INSERT INTO cache_aside.outbox (relation) VALUES ({name});");
    // The rows are named only where the event has them: a condition that names others can't even be read.
    let arm = |event: &str, counted: &str, images: &str| {
        format!(
            "  ELSIF TG_OP = '{event}' THEN\n\
             \x20   IF (SELECT count(*) FROM (SELECT FROM {counted} LIMIT {}) c) > {MOST_ROWS} THEN\n\
             \x20     {everything}\n    ELSE\n\
             \x20     INSERT INTO cache_aside.outbox (relation, image) {images};\n    END IF;\n",
            MOST_ROWS + 1
        )
    };
    let from = |rows: &str| format!("SELECT {name}, {} FROM {rows} r", image("r", columns));
    let distinct = |rows: &str| format!("SELECT DISTINCT {name}, {} FROM {rows} r", image("r", columns));
    format!(
        "BEGIN\n  IF {} THEN\n    {everything}\n{}{}{}  END IF;\n  RETURN NULL;\nEND\n",
        anything(columns),
        arm("INSERT", "new_rows", &distinct("new_rows")),
        arm("UPDATE", "new_rows", &format!("{} UNION {}", from("old_rows"), from("new_rows"))),
        arm("DELETE", "old_rows", &distinct("old_rows")),
    )
}

fn by_row(name: &str, columns: &[Column]) -> String {
    let (old, new, anything) = (image("OLD", columns), image("NEW", columns), anything(columns));
    format!(
        "BEGIN\n  IF {anything} THEN\n    INSERT INTO cache_aside.outbox (relation) VALUES ({name});\n\
         \x20 ELSIF TG_OP = 'INSERT' THEN\n    INSERT INTO cache_aside.outbox (relation, image) SELECT {name}, {new};\n\
         \x20 ELSIF TG_OP = 'DELETE' THEN\n    INSERT INTO cache_aside.outbox (relation, image) SELECT {name}, {old};\n\
         \x20 ELSE\n    INSERT INTO cache_aside.outbox (relation, image) SELECT {name}, {old} UNION SELECT {name}, {new};\n\
         \x20 END IF;\n  RETURN NULL;\nEND\n"
    )
}
