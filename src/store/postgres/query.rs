//! Statements that people wrote: their rows as JSON, within bounds.
//!
//! The statement stands inside ours, so it can only read, and is only one. Parameters cross as text and are read by the
//! database as what it takes them for.

use std::collections::BTreeSet;
use std::error::Error as StdError;
use std::pin::pin;

use bytes::{BufMut, BytesMut};
use deadpool_postgres::ClientWrapper;
use futures_util::TryStreamExt;
use tokio_postgres::types::{Format, IsNull, Kind, ToSql, Type, to_sql_checked};
use tokio_postgres::{Client, Error, Statement};

use super::{PostgresStore, SLACK, Text, error, sql};
use crate::catalog::{Param, Problem, Resource};
use crate::store::{RESULT_BYTES, RESULT_ROWS, Rows, StoreError, Waiters};

/// The statement that gives each row as JSON. A comment at the end of theirs must not swallow ours.
fn wrapped(sql: &str) -> String {
    format!(
        "SELECT CASE WHEN octet_length(json) <= {RESULT_BYTES} THEN json END FROM (\n\
         SELECT row_to_json(\"cache-aside row\")::text AS json FROM (\n{sql}\n) AS \"cache-aside row\" LIMIT {}\n) AS rows",
        RESULT_ROWS + 1
    )
}

/// One parameter as the database's text for its type.
#[derive(Debug)]
struct Given<'a>(&'a Param);

impl ToSql for Given<'_> {
    fn to_sql(&self, kind: &Type, out: &mut BytesMut) -> Result<IsNull, Box<dyn StdError + Sync + Send>> {
        match self.0 {
            Param::Null => return Ok(IsNull::Yes),
            // In a query string an array is `1,2,3`, or as SQL has it.
            Param::Text(text) if matches!(kind.kind(), Kind::Array(_)) && !text.starts_with('{') => {
                let parts: Vec<Param> = text.split(',').map(|part| Param::Text(part.to_owned())).collect();
                out.put_slice(array(&parts).as_bytes());
            }
            Param::Text(text) => out.put_slice(text.as_bytes()),
            Param::List(all) => out.put_slice(array(all).as_bytes()),
        }
        Ok(IsNull::No)
    }

    fn accepts(_: &Type) -> bool {
        true
    }

    fn encode_format(&self, _: &Type) -> Format {
        Format::Text
    }

    to_sql_checked!();
}

/// An array as SQL has it, with every element in quotes.
fn array(all: &[Param]) -> String {
    let one = |param: &Param| match param {
        Param::Null => "NULL".to_owned(),
        Param::Text(text) => format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\"")),
        Param::List(all) => array(all),
    };
    format!("{{{}}}", all.iter().map(one).collect::<Vec<_>>().join(","))
}

impl PostgresStore {
    /// Tries a declared statement.
    pub(super) async fn prepare_statement(&self, resource: Resource) -> Result<(Resource, Vec<Problem>), StoreError> {
        let declared = resource.parameters.as_ref().map_or(0, |parameters| parameters.0.len());
        let sql = wrapped(&resource.statements.row);
        let prepared = self.ask(async |client| Ok(client.prepare_cached(&sql).await.map_err(statement_error)));
        let problems = match prepared.await? {
            Ok(statement) if statement.params().len() != declared => vec![Problem::fatal(format!(
                "the statement takes {} parameters, and params: names {declared}",
                statement.params().len()
            ))],
            Ok(_) => Vec::new(),
            Err(outage) if outage.is_outage() => return Err(outage),
            Err(refused) => vec![Problem::fatal(refused.to_string())],
        };
        Ok((resource, problems))
    }

    /// Runs a statement. One that somebody made up is not kept prepared, and runs in a transaction that only reads:
    /// functions may write.
    pub(super) async fn result(
        &self,
        resource: &Resource,
        params: &[Param],
        waiters: &Waiters,
    ) -> Result<Rows, StoreError> {
        let sql = wrapped(&resource.statements.row);
        let declared = &*resource.name != "query";
        if declared {
            let there = async |client: &ClientWrapper, statement: &Statement| collect(client, statement, params).await;
            // Whether it still followed was asked after it: nothing is on its way any more.
            if let Some((Ok(Collected { json, truncated, .. }), origin)) =
                self.at_replica(resource, &sql, waiters, there).await?
            {
                return Ok(Rows { origin, json: json.freeze(), truncated });
            }
        }
        let mut retried = false;
        loop {
            let checked = waiters.or(self.checkout()).await?;
            let (client, origin) = (checked.client()?, checked.life.fingerprint);
            let run = async {
                if declared {
                    let statement = client.prepare_cached(&sql).await?;
                    return collect(client, &statement, params).await;
                }
                client.batch_execute("BEGIN READ ONLY").await?;
                let collected = async {
                    let statement = client.prepare(&sql).await?;
                    collect(client, &statement, params).await
                };
                let collected = collected.await;
                // What was cut for its size is still on its way here: its connection is given up below.
                if !matches!(collected, Ok(Ok(Collected { unread: true, .. }))) {
                    // Locks of the session outlive the transaction.
                    client.batch_execute("ROLLBACK; SELECT pg_advisory_unlock_all()").await?;
                }
                collected
            };
            match tokio::time::timeout(self.inner.statement_timeout + SLACK, run).await {
                Ok(Ok(Ok(Collected { json, truncated, unread }))) => {
                    if unread {
                        self.abandon(checked);
                    }
                    return Ok(Rows { origin, json: json.freeze(), truncated });
                }
                Ok(Ok(Err(count))) => {
                    let words = format!("it takes {count} parameters, and {} were given", params.len());
                    return Err(StoreError::BadStatement(words));
                }
                Ok(Err(_)) if client.is_closed() && !retried => retried = true,
                Ok(Err(failed)) if declared && failed.code().is_some_and(|code| code.code() == "0A000") && !retried => {
                    // "cached plan must not change result type": a table was altered.
                    client.statement_cache.clear();
                    retried = true;
                }
                Ok(Err(failed)) if declared => return Err(error(failed)),
                Ok(Err(failed)) => return Err(statement_error(failed)),
                Err(_) => {
                    self.abandon(checked);
                    return Err(StoreError::TimedOut);
                }
            }
        }
    }

    /// Which tables a statement reads, quoted and with their schemas, as the planner sees it: views are what they read.
    ///
    /// # Errors
    ///
    /// [`StoreError`].
    pub async fn reads(&self, resource: &Resource) -> Result<Vec<String>, StoreError> {
        // Its session keeps a prepared statement that the pool must not hand on.
        let lost = self.checkout().await?.lose()?;
        let client = &lost.client;
        let asked = async {
            let count = client.prepare_cached(&wrapped(&resource.statements.row)).await?.params().len();
            let nulls = if count == 0 { String::new() } else { format!("({})", vec!["NULL"; count].join(", ")) };
            // A plan for any parameters: one for NULLs would read nothing.
            let script = format!(
                "SET LOCAL plan_cache_mode = force_generic_plan; PREPARE cache_aside_reads AS {}",
                wrapped(&resource.statements.row)
            );
            client.batch_execute("BEGIN READ ONLY").await?;
            let explained = async {
                client.batch_execute(&script).await?;
                client.simple_query(&format!("EXPLAIN (VERBOSE, FORMAT JSON) EXECUTE cache_aside_reads{nulls}")).await
            };
            let explained = explained.await;
            client.batch_execute("ROLLBACK").await?;
            explained
        };
        let Ok(explained) = tokio::time::timeout(self.inner.statement_timeout + SLACK, asked).await else {
            self.inner.pool.cancel(lost);
            return Err(StoreError::TimedOut);
        };
        let mut plan = String::new();
        for message in explained.map_err(error)? {
            if let tokio_postgres::SimpleQueryMessage::Row(row) = message {
                plan.push_str(row.get(0).unwrap_or_default());
            }
        }
        let mut found = BTreeSet::new();
        tables(&serde_json::from_str(&plan).unwrap_or_default(), &mut found);
        Ok(found.into_iter().collect())
    }
}

/// Gathers the relations of a plan and of all plans in it.
fn tables(plan: &serde_json::Value, found: &mut BTreeSet<String>) {
    match plan {
        serde_json::Value::Array(all) => all.iter().for_each(|one| tables(one, found)),
        serde_json::Value::Object(fields) => {
            let text = |name: &str| fields.get(name).and_then(serde_json::Value::as_str);
            if let (Some(schema), Some(table)) = (text("Schema"), text("Relation Name")) {
                found.insert(format!("{}.{}", sql::quote(schema), sql::quote(table)));
            }
            fields.values().for_each(|value| tables(value, found));
        }
        _ => {}
    }
}

/// Rows as one JSON array.
struct Collected {
    json: BytesMut,
    truncated: bool,
    /// The server has more of them to send.
    unread: bool,
}

/// The rows; or how many parameters there should be.
async fn collect(
    client: &ClientWrapper,
    statement: &Statement,
    params: &[Param],
) -> Result<Result<Collected, usize>, Error> {
    if statement.params().len() != params.len() {
        return Ok(Err(statement.params().len()));
    }
    let client: &Client = client;
    let mut rows = pin!(client.query_raw(statement, params.iter().map(Given)).await?);
    let mut json = BytesMut::from(&b"["[..]);
    let mut count = 0;
    let (mut truncated, mut unread) = (false, false);
    while let Some(row) = rows.try_next().await? {
        if count == RESULT_ROWS || json.len() > RESULT_BYTES {
            truncated = true;
            unread = count < RESULT_ROWS;
            break;
        }
        // One that is too large for an answer by itself did not come.
        let Some(Text(row)) = row.try_get::<_, Option<Text>>(0)? else {
            truncated = true;
            continue;
        };
        if count > 0 {
            json.put_u8(b',');
        }
        json.put_slice(&row);
        count += 1;
    }
    json.put_u8(b']');
    Ok(Ok(Collected { json, truncated, unread }))
}

/// What an error means where the statement itself may be wrong.
fn statement_error(failed: Error) -> StoreError {
    let said = failed.as_db_error().map(|refusal| (refusal.code().code().to_owned(), refusal.message().to_owned()));
    match said {
        Some((code, words)) if ["42", "22", "21", "0A", "54", "25"].iter().any(|class| code.starts_with(class)) => {
            StoreError::BadStatement(words)
        }
        _ => error(failed),
    }
}
