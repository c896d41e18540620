//! The SQL that installs and removes the capture: what all tables share, and one function with its triggers for each.

use std::fmt::Write as _;

use xxhash_rust::xxh3::xxh3_64;

use super::super::sql::quote;

/// What the scripts install; a service refuses to rely on an older one.
pub(super) const VERSION: i32 = 2;

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

/// The name of the publication.
pub(in super::super) const PUBLICATION: &str = "cache_aside";

/// Of a published table `pr`: neither rows nor columns are left out. Servers before 15 leave nothing out.
pub(super) const WHOLE: &str = "to_jsonb(pr) ->> 'prqual' IS NULL AND to_jsonb(pr) ->> 'prattrs' IS NULL";

/// Removes everything: the triggers go with their functions. The slot can't be dropped while it is read, so it comes last.
pub(super) const UNINSTALL: &str =
    "DROP PUBLICATION IF EXISTS cache_aside;\nDROP SCHEMA IF EXISTS cache_aside CASCADE;\n";

/// Ends whoever reads a slot of this database, and says which slots there are.
pub(super) const END_DECODING: &str = "
SELECT s.slot_name::text, s.active_pid IS NOT NULL AND pg_terminate_backend(s.active_pid) FROM pg_replication_slots s
WHERE s.database = current_database() AND s.slot_name LIKE 'cache\\_aside\\_%'";

/// What a role needs to serve, and nothing more.
pub(super) fn grant(role: &str) -> String {
    let role = quote(role);
    format!(
        "GRANT USAGE ON SCHEMA cache_aside TO {role};\n\
         GRANT SELECT ON cache_aside.about, cache_aside.captures, cache_aside.outbox TO {role};\n\
         GRANT EXECUTE ON FUNCTION cache_aside.sweep(integer), cache_aside.origin(), cache_aside.announce(jsonb) TO {role};\n"
    )
}

/// What it needs besides, to decode the log.
pub(super) fn grant_decoding(role: &str) -> String {
    let quoted = quote(role);
    format!(
        "GRANT INSERT ON cache_aside.outbox TO {quoted};\n\
         GRANT EXECUTE ON FUNCTION cache_aside.anew(text) TO {quoted};\n\
         DO $grant$ BEGIN\n  IF NOT (SELECT rolreplication OR rolsuper FROM pg_roles WHERE rolname = {}) THEN\n\
         \x20   ALTER ROLE {quoted} REPLICATION;\n  END IF;\nEND $grant$;\n",
        literal(role)
    )
}

/// A captured column.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in super::super) struct Column {
    pub(in super::super) name: String,
    /// Its type as the installer saw it: of another one the function knows nothing.
    pub(in super::super) type_name: String,
    pub(in super::super) kind: Written,
}

/// How a value becomes text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) enum Written {
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
        Level::Row => by_row(relation, columns),
    };
    // What a session may have set and what decides how numbers and bytes are written; services set the same.
    let settings = " SET bytea_output = hex SET extra_float_digits = 1";
    let tag = tag(&body);
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
    script + &register(relation, columns)
}

/// Tells services which columns of a table come along.
fn register(relation: &str, columns: &[Column]) -> String {
    let names: Vec<String> = columns.iter().map(|column| literal(&column.name)).collect();
    format!(
        "INSERT INTO cache_aside.captures AS c (relation, columns) VALUES ({}, ARRAY[{}]::text[])\n\
         ON CONFLICT (relation) DO UPDATE SET columns = excluded.columns;\n",
        literal(relation),
        names.join(", ")
    )
}

/// The publication that is decoded in WAL mode; a partition's changes come under the name of the table it is part of.
pub(super) fn publication() -> String {
    format!(
        "DO $publication$ BEGIN\n  IF NOT EXISTS (SELECT FROM pg_publication WHERE pubname = '{PUBLICATION}') THEN\n\
         \x20   CREATE PUBLICATION {PUBLICATION} WITH (publish_via_partition_root = true);\n  END IF;\nEND $publication$;\n"
    )
}

/// Publishes a table, and says which of its columns are wanted.
///
/// The lock waits for those who are writing: what they have written would be decoded as the table was then, unpublished,
/// even if they commit later.
pub(super) fn publish(relation: &str, columns: &[Column]) -> String {
    let member = format!(
        "SELECT FROM pg_publication_rel pr JOIN pg_publication p ON p.oid = pr.prpubid\n\
         \x20     WHERE p.pubname = '{PUBLICATION}' AND pr.prrelid = {}::regclass",
        literal(relation)
    );
    let body = format!(
        "BEGIN\n  IF NOT EXISTS ({member} AND {WHOLE}) THEN\n\
         \x20   LOCK TABLE {relation} IN SHARE ROW EXCLUSIVE MODE;\n\
         \x20   IF EXISTS ({member}) THEN\n      ALTER PUBLICATION {PUBLICATION} DROP TABLE {relation};\n    END IF;\n\
         \x20   ALTER PUBLICATION {PUBLICATION} ADD TABLE {relation};\n  END IF;\nEND\n"
    );
    let tag = tag(&body);
    format!("DO {tag}\n{body}{tag};\n{}", register(relation, columns))
}

/// Quotes that a text can't hold: names may have any letters.
fn tag(text: &str) -> String {
    format!("$capture_{:x}$", xxh3_64(text.as_bytes()))
}

/// Inserts decoded changes of a table: `$1` holds them as JSON, each with the lower half of its transaction's id and,
/// where it is known, the row's values; `$2` names the columns that can be among them.
pub(in super::super) fn insert_decoded(relation: &str, columns: &[Column]) -> String {
    let part = |column: &Column| {
        let name = literal(&column.name);
        match column.kind {
            Written::Label => format!("{name}, r.v ->> {name}"),
            Written::Json | Written::Unsettled => {
                format!("{name}, to_jsonb((r.v ->> {name})::{}) #>> '{{}}'", column.type_name)
            }
        }
    };
    let parts: Vec<String> = columns.iter().map(part).collect();
    // Our own id was given out after every id in the log, so theirs is the last one below it that has this lower half. What
    // a snapshot shows would not do: a commit that waits for a standby is in the log before any snapshot shows it.
    format!(
        "INSERT INTO cache_aside.outbox (xid, relation, image)\n\
         SELECT (m.next - ((m.next - r.x) & 4294967295))::text::xid8, {},\n\
         \x20 CASE WHEN jsonb_typeof(r.v) = 'object' THEN jsonb_build_object({})\n\
         \x20   - ARRAY(SELECT c.name FROM unnest($2) AS c (name) WHERE NOT r.v ? c.name) END\n\
         FROM (SELECT pg_current_xact_id()::text::bigint AS next) m,\n\
         \x20 jsonb_to_recordset($1::jsonb) AS r(x bigint, v jsonb)",
        literal(relation),
        parts.join(", ")
    )
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
         AND (a.attname::text, format_type(a.atttypid, -1)) IN ({})) <> {}",
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

/// Row by row, a transaction counts what it has told of the table. The count is a setting, which a rolled back part of the
/// transaction takes back with it; anybody may set it, so past the limit the one row that says it all must be there.
fn by_row(relation: &str, columns: &[Column]) -> String {
    let name = literal(relation);
    let (old, new, anything) = (image("OLD", columns), image("NEW", columns), anything(columns));
    let count = format!("cache_aside.told_{:016x}", xxh3_64(relation.as_bytes()));
    let everything = format!("INSERT INTO cache_aside.outbox (relation) VALUES ({name});");
    let insert = "INSERT INTO cache_aside.outbox (relation, image)";
    format!(
        "DECLARE\n  told integer := coalesce(nullif(current_setting('{count}', true), ''), '0')::integer;\nBEGIN\n\
         \x20 IF TG_OP = 'TRUNCATE' THEN\n    {everything}\n    RETURN NULL;\n  END IF;\n\
         \x20 IF told >= {MOST_ROWS} THEN\n\
         \x20   IF NOT EXISTS (SELECT FROM cache_aside.outbox o WHERE o.image IS NULL AND o.relation = {name}\n\
         \x20       AND o.xid = pg_current_xact_id()) THEN\n      {everything}\n    END IF;\n    RETURN NULL;\n  END IF;\n\
         \x20 PERFORM set_config('{count}', (told + 1)::text, true);\n\
         \x20 IF {anything} THEN\n    {everything}\n\
         \x20 ELSIF TG_OP = 'INSERT' THEN\n    {insert} SELECT {name}, {new};\n\
         \x20 ELSIF TG_OP = 'DELETE' THEN\n    {insert} SELECT {name}, {old};\n\
         \x20 ELSE\n    {insert} SELECT {name}, {old} UNION SELECT {name}, {new};\n\
         \x20 END IF;\n  RETURN NULL;\nEND\n"
    )
}
