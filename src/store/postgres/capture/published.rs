//! Capture in WAL mode: which tables are published, and how much of a changed row's past the log tells.

use std::collections::BTreeMap;

use tokio_postgres::types::Type;
use tokio_postgres::{Client, Error};

use super::script::{self, Column, PUBLICATION};
use super::{columns, question};
use crate::store::{Captured, Wanted};

/// One row per wanted table. Somebody may have narrowed the publication by hand: that doesn't count.
const STATE: &str = "
    SELECT w.relation, coalesce(r.relkind::text, ''), coalesce(r.relispartition, false),
           coalesce(r.relpersistence = 'p', false),
           r.relkind = 'r' AND EXISTS (SELECT FROM pg_inherits i WHERE i.inhparent = r.oid),
           current_setting('wal_level') = 'logical', a.version, c.id::text, c.columns,
           EXISTS (SELECT FROM pg_publication p JOIN pg_publication_rel pr ON pr.prpubid = p.oid
                   WHERE p.pubname = $2 AND pr.prrelid = r.oid AND p.pubinsert AND p.pubupdate AND p.pubdelete
                   AND p.pubtruncate AND p.pubviaroot AND {whole}),
           r.relkind = 'r' AND r.relreplident = 'f',
           ARRAY(SELECT at.attname::text FROM pg_index i JOIN pg_attribute at ON at.attrelid = i.indrelid
                 AND at.attnum = ANY (i.indkey::int2[]) WHERE i.indrelid = r.oid AND CASE r.relreplident
                 WHEN 'd' THEN i.indisprimary WHEN 'i' THEN i.indisreplident AND r.relkind = 'r' ELSE false END),
           r.relkind = 'p' AND EXISTS (SELECT FROM pg_partition_tree(r.oid) t JOIN pg_class l ON l.oid = t.relid
             WHERE t.isleaf AND (l.relreplident NOT IN ('d', 'f') OR l.relkind = 'f')),
           {columns}
    FROM unnest($1::text[]) AS w (relation)
    LEFT JOIN pg_class r ON r.oid = to_regclass(w.relation)
    CROSS JOIN cache_aside.about a
    LEFT JOIN cache_aside.captures c ON c.relation = w.relation";

/// A table that the stream named: how services know it, and what they want of it.
const TABLE: &str = "
    SELECT c.relation, c.columns, {columns}
    FROM pg_class r JOIN pg_namespace n ON n.oid = r.relnamespace JOIN cache_aside.captures c
      ON c.relation = '\"' || replace(n.nspname, '\"', '\"\"') || '\".\"' || replace(r.relname, '\"', '\"\"') || '\"'
    WHERE r.oid = $1";

/// One table of the database, as its publication is concerned.
pub(super) struct Found {
    relation: String,
    kind: String,
    is_partition: bool,
    is_logged: bool,
    is_parent: bool,
    is_logical: bool,
    version: i32,
    id: Option<String>,
    pub(super) columns: Vec<String>,
    pub(super) published: bool,
    /// All of a row's past is told.
    whole: bool,
    /// Otherwise, these of its columns.
    identity: Vec<String>,
    /// A partition can't tell as much as the table it is part of.
    has_mute_partitions: bool,
    pub(super) table_columns: Vec<Column>,
}

impl Found {
    /// What the log can't be made to tell by publishing the table.
    fn obstacle(&self) -> Option<Captured> {
        let relation = &self.relation;
        let never = |words: &str| Some(Captured::Never(format!("{relation} {words}")));
        let lacking = |words: &str| Some(Captured::Lacking(format!("{relation} {words}")));
        match self.kind.as_str() {
            "r" if self.is_parent => {
                never("has inheriting tables: changes made to those directly are not seen before the TTL ends")
            }
            "r" | "p" if self.is_partition => never(
                "is a partition, and the log tells its changes under the name of the whole table: serve that one, or use invalidation.mode outbox",
            ),
            "r" if !self.is_logged => never("is unlogged, so its changes are in no log: use invalidation.mode outbox"),
            "r" if !self.whole && self.identity.is_empty() => {
                lacking("has no replica identity: give it a primary key, or run ALTER TABLE ... REPLICA IDENTITY FULL")
            }
            "p" if self.identity.is_empty() => {
                lacking("needs a primary key, and REPLICA IDENTITY DEFAULT, for its changes to be told")
            }
            "p" if self.has_mute_partitions => lacking("has partitions whose changes can't be told"),
            "r" | "p" => None,
            "" => lacking("is not there"),
            "f" => never("is a foreign table: changes are not seen before the TTL ends"),
            _ => never("is a view: name the tables it reads with depends_on:"),
        }
    }

    pub(super) fn can_be_published(&self) -> bool {
        self.obstacle().is_none()
    }

    /// It is as it should be with these columns.
    pub(super) fn is_complete(&self, columns: &[String]) -> bool {
        self.published && self.id.is_some() && self.columns == columns
    }

    /// What is written of each row.
    pub(super) fn captured(&self, names: &[String]) -> Vec<Column> {
        let column = |name: &String| self.table_columns.iter().find(|column| column.name == *name).cloned();
        names.iter().filter_map(column).collect()
    }

    pub(super) fn judge(&self, wanted: &Wanted) -> Captured {
        let relation = &self.relation;
        if let Some(obstacle) = self.obstacle() {
            return obstacle;
        }
        if !self.is_logical {
            return Captured::Lacking("wal_level is not logical: set it, and restart the database".into());
        }
        if self.version < script::VERSION {
            return Captured::Lacking("the change capture is of an older version; run cache-aside migrate".into());
        }
        let Some(id) = self.id.clone().filter(|_| self.published) else {
            return Captured::Lacking(format!("changes of {relation} are not published; run cache-aside migrate"));
        };
        if let Some(column) = wanted.columns.iter().find(|column| !self.columns.contains(column)) {
            return Captured::Lacking(format!(
                "changes of {relation} are captured without column {column}; run cache-aside migrate"
            ));
        }
        let partial = !self.whole && wanted.columns.iter().any(|column| !self.identity.contains(column));
        Captured::Complete { id, partial, late: true }
    }
}

/// The wanted tables by name.
pub(super) async fn find(
    client: &Client,
    wanted: &[Wanted],
    installed: bool,
) -> Result<BTreeMap<String, Found>, Error> {
    let relations: Vec<&str> = wanted.iter().map(|wanted| wanted.relation.as_str()).collect();
    let state = question(STATE, installed).replace("{whole}", script::WHOLE);
    let rows = client.query_typed(&state, &[(&relations, Type::TEXT_ARRAY), (&PUBLICATION, Type::TEXT)]).await?;
    let mut found = BTreeMap::new();
    for row in &rows {
        let relation: String = row.try_get(0)?;
        let one = Found {
            relation: relation.clone(),
            kind: row.try_get(1)?,
            is_partition: row.try_get(2)?,
            is_logged: row.try_get(3)?,
            is_parent: row.try_get::<_, Option<bool>>(4)?.unwrap_or_default(),
            is_logical: row.try_get(5)?,
            version: row.try_get(6)?,
            id: row.try_get(7)?,
            columns: row.try_get::<_, Option<Vec<String>>>(8)?.unwrap_or_default(),
            published: row.try_get(9)?,
            whole: row.try_get::<_, Option<bool>>(10)?.unwrap_or_default(),
            identity: row.try_get(11)?,
            has_mute_partitions: row.try_get::<_, Option<bool>>(12)?.unwrap_or_default(),
            table_columns: columns(row.try_get(13)?, row.try_get(14)?),
        };
        found.insert(relation, one);
    }
    Ok(found)
}

/// A table of the stream, by its id: its name and what is wanted of its rows. `None`: nobody wants it.
pub(in super::super) async fn captured_table(client: &Client, id: u32) -> Result<Option<(String, Vec<Column>)>, Error> {
    let rows = client.query_typed(&question(TABLE, true), &[(&id, Type::OID)]).await?;
    let Some(row) = rows.first() else { return Ok(None) };
    let (relation, names): (String, Vec<String>) = (row.try_get(0)?, row.try_get(1)?);
    let there = columns(row.try_get(2)?, row.try_get(3)?);
    Ok(Some((relation, there.into_iter().filter(|column| names.contains(&column.name)).collect())))
}
