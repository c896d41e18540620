//! Asks PostgreSQL's catalogues what a table is.

use tokio_postgres::types::Type;
use tokio_postgres::{Client, Error, Row};

use crate::catalog::{Column, Kind, Table, TableName};

/// Exact names first, then lower-case ones, in the order of the search path.
const FIND: &str = "
    SELECT c.oid, n.nspname::text, c.relname::text, c.relkind IN ('v', 'm')
    FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
    WHERE c.relkind IN ('r', 'p', 'v', 'm', 'f') AND c.relname IN ($1, lower($1))
      AND CASE WHEN $2::text IS NULL THEN n.nspname = ANY (current_schemas(false))
               ELSE n.nspname IN ($2, lower($2)) END
    ORDER BY c.relname <> $1, n.nspname IS DISTINCT FROM $2 AND $2 IS NOT NULL,
             array_position(current_schemas(false), n.nspname)
    LIMIT 1";

const ALL: &str = "
    SELECT c.oid, n.nspname::text, c.relname::text, false
    FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
    WHERE c.relkind IN ('r', 'p') AND NOT c.relispartition AND n.nspname = ANY (current_schemas(false))
    ORDER BY array_position(current_schemas(false), n.nspname), c.relname";

/// One row per column. Domains are followed to what they are made of; a type modifier of -1 gives a name that can be
/// cast to without cutting anything (`bpchar`, where `character` would mean `character(1)`).
const COLUMNS: &str = "
    SELECT a.attname::text, format_type(a.atttypid, a.atttypmod), format_type(b.oid, -1),
           CASE WHEN bn.nspname = 'pg_catalog' OR b.typname = 'citext' THEN b.typname::text ELSE '' END,
           COALESCE(l.collisdeterministic, true), a.attgenerated <> '', NOT a.attnotnull,
           CASE WHEN b.typtype = 'e' THEN
             ARRAY(SELECT e.enumlabel::text FROM pg_catalog.pg_enum e WHERE e.enumtypid = b.oid) END
    FROM pg_catalog.pg_attribute a
    CROSS JOIN LATERAL (
      WITH RECURSIVE made_of(oid, typtype, typbasetype) AS (
        SELECT t.oid, t.typtype, t.typbasetype FROM pg_catalog.pg_type t WHERE t.oid = a.atttypid
        UNION ALL
        SELECT t.oid, t.typtype, t.typbasetype
        FROM pg_catalog.pg_type t JOIN made_of ON made_of.typtype = 'd' AND t.oid = made_of.typbasetype)
      SELECT made_of.oid FROM made_of WHERE made_of.typtype <> 'd') base
    JOIN pg_catalog.pg_type b ON b.oid = base.oid
    JOIN pg_catalog.pg_namespace bn ON bn.oid = b.typnamespace
    LEFT JOIN pg_catalog.pg_collation l ON l.oid = a.attcollation
    WHERE a.attrelid = $1 AND a.attnum > 0 AND NOT a.attisdropped
    ORDER BY a.attnum";

const UNIQUE: &str = "
    SELECT i.indisprimary, ARRAY(
      SELECT a.attname::text FROM unnest(i.indkey::int2[]) WITH ORDINALITY k (attnum, position)
      JOIN pg_catalog.pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.attnum
      WHERE k.position <= i.indnkeyatts ORDER BY k.position)
    FROM pg_catalog.pg_index i
    WHERE i.indrelid = $1 AND i.indisunique AND i.indisvalid AND i.indpred IS NULL AND i.indexprs IS NULL";

/// The table or view of this name.
pub(super) async fn table(client: &Client, name: &TableName) -> Result<Option<Table>, Error> {
    let found = client.query_typed(FIND, &[(&name.name, Type::TEXT), (&name.schema, Type::TEXT)]).await?;
    match found.first() {
        Some(row) => describe(client, row).await.map(Some),
        None => Ok(None),
    }
}

/// All tables in the search path, partitions left out.
pub(super) async fn tables(client: &Client) -> Result<Vec<Table>, Error> {
    let mut tables = Vec::new();
    for row in client.query_typed(ALL, &[]).await? {
        tables.push(describe(client, &row).await?);
    }
    Ok(tables)
}

async fn describe(client: &Client, row: &Row) -> Result<Table, Error> {
    let oid: u32 = row.try_get(0)?;
    let columns = client.query_typed(COLUMNS, &[(&oid, Type::OID)]).await?;
    let mut table = Table {
        schema: Some(row.try_get(1)?),
        name: row.try_get(2)?,
        is_view: row.try_get(3)?,
        columns: columns.iter().map(column).collect::<Result<_, _>>()?,
        primary_key: Vec::new(),
        unique: Vec::new(),
    };
    for index in client.query_typed(UNIQUE, &[(&oid, Type::OID)]).await? {
        if index.try_get(0)? {
            table.primary_key = index.try_get(1)?;
        } else {
            table.unique.push(index.try_get(1)?);
        }
    }
    Ok(table)
}

fn column(row: &Row) -> Result<Column, Error> {
    let built_in: String = row.try_get(3)?;
    let deterministic: bool = row.try_get(4)?;
    let labels: Option<Vec<String>> = row.try_get(7)?;
    let integer = |min, max| (Kind::Integer { min, max }, true);
    let (kind, exact) = match (labels, built_in.as_str()) {
        (Some(labels), _) => (Kind::Label(labels), true),
        (None, "int2") => integer(i16::MIN.into(), i16::MAX.into()),
        (None, "int4") => integer(i32::MIN.into(), i32::MAX.into()),
        (None, "int8") => integer(i64::MIN.into(), i64::MAX.into()),
        (None, "oid") => integer(0, u32::MAX.into()),
        (None, "text" | "varchar") => (Kind::Text { max_bytes: None }, deterministic),
        (None, "bpchar" | "citext") => (Kind::Text { max_bytes: None }, false),
        // Longer texts are cut silently by the cast, and would find another row.
        (None, "name") => (Kind::Text { max_bytes: Some(63) }, deterministic),
        (None, "uuid") => (Kind::Uuid, true),
        (None, "bool") => (Kind::Boolean, true),
        (None, "bytea") => (Kind::Bytes, true),
        (None, "numeric" | "float4" | "float8") => (Kind::Number, false),
        (None, _) => (Kind::Other, false),
    };
    Ok(Column {
        name: row.try_get(0)?,
        type_name: row.try_get(1)?,
        cast: row.try_get(2)?,
        kind,
        exact,
        json: matches!(built_in.as_str(), "json" | "jsonb"),
        generated: row.try_get(5)?,
        counted: false,
        nullable: row.try_get(6)?,
    })
}
