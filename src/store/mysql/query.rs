//! Statements that people wrote: their rows as JSON, within bounds.
//!
//! A statement must be one that could stand inside another one: then it can only read, and is only one. It is not run
//! there, because MariaDB forgets the order of what stands inside. Parameters cross as text.

use mysql_async::prelude::Queryable;
use mysql_async::{Conn, Error, Params, Value};

use super::MysqlStore;
use super::form::Form;
use super::refusal::{Failure, of_statement};
use super::value;
use crate::catalog::{Param, Problem, Resource};
use crate::store::{RESULT_BYTES, RESULT_ROWS, Rows, StoreError, Waiters, spelling};

/// A statement as the server takes it.
#[derive(Debug, PartialEq, Eq)]
struct Translated {
    /// With `?` in place of `$1`.
    sql: String,
    /// Which parameter each `?` stands for, from 0.
    places: Vec<usize>,
}

impl Translated {
    /// How many parameters there are.
    fn count(&self) -> usize {
        self.places.iter().map(|place| place + 1).max().unwrap_or(0)
    }

    fn bound(&self, params: &[Param]) -> Params {
        if self.places.is_empty() {
            return Params::Empty;
        }
        let one = |place: &usize| params.get(*place).map_or(Value::NULL, bound);
        Params::Positional(self.places.iter().map(one).collect())
    }

    /// Stands for the statement where it is only tried: nothing but a query can be there.
    fn inside(&self) -> String {
        format!("SELECT 1 FROM (\n{}\n) AS `cache-aside rows`", self.sql)
    }
}

fn bound(param: &Param) -> Value {
    match param {
        Param::Null => Value::NULL,
        Param::Text(text) => Value::Bytes(text.clone().into_bytes()),
        // An array is JSON, for JSON_TABLE.
        Param::List(all) => Value::Bytes(json(all).to_string().into_bytes()),
    }
}

fn json(all: &[Param]) -> serde_json::Value {
    let one = |param: &Param| match param {
        Param::Null => serde_json::Value::Null,
        Param::Text(text) => serde_json::Value::from(text.as_str()),
        Param::List(all) => json(all),
    };
    serde_json::Value::Array(all.iter().map(one).collect())
}

/// Puts `?` in place of `$1`, and refuses what could be more than one query, or be read differently than it looks.
fn translate(sql: &str) -> Result<Translated, String> {
    let letters: Vec<char> = sql.chars().collect();
    let at = |index: usize| letters.get(index).copied().unwrap_or('\0');
    let (mut out, mut places, mut depth, mut index) = (String::with_capacity(sql.len()), Vec::new(), 0_usize, 0);
    while index < letters.len() {
        let begin = index;
        match letters[index] {
            quote @ ('\'' | '"' | '`') => {
                index += 1;
                loop {
                    match at(index) {
                        '\0' if index >= letters.len() => return Err("a quote is not closed".into()),
                        '\\' if quote != '`' => index += 2,
                        letter if letter == quote && at(index + 1) == quote => index += 2,
                        letter if letter == quote => break,
                        _ => index += 1,
                    }
                }
                index += 1;
            }
            '#' => index = line_end(&letters, index),
            '-' if at(index + 1) == '-' && (at(index + 2).is_whitespace() || at(index + 2).is_control()) => {
                index = line_end(&letters, index);
            }
            '/' if at(index + 1) == '*' => {
                if at(index + 2) == '!' || (at(index + 2) == 'M' && at(index + 3) == '!') {
                    return Err("comments that the server runs are not allowed".into());
                }
                index += 2;
                while !(at(index) == '*' && at(index + 1) == '/') {
                    if index >= letters.len() {
                        return Err("a comment is not closed".into());
                    }
                    index += 1;
                }
                index += 2;
            }
            '$' if at(index + 1).is_ascii_digit() && !in_name(&letters, index) => {
                index += 1;
                let digits: String = letters[index..].iter().take_while(|letter| letter.is_ascii_digit()).collect();
                index += digits.len();
                match digits.parse::<usize>() {
                    Ok(number @ 1..=1000) => places.push(number - 1),
                    _ => return Err(format!("there is no parameter ${digits}")),
                }
                out.push('?');
                continue;
            }
            '?' => return Err("parameters are written $1, $2 and so on".into()),
            ';' => return Err("it must be one statement".into()),
            '(' => {
                depth += 1;
                index += 1;
            }
            ')' => {
                depth = depth.checked_sub(1).ok_or("a parenthesis is closed that was not opened")?;
                index += 1;
            }
            _ => index += 1,
        }
        out.extend(&letters[begin..index.min(letters.len())]);
    }
    if depth > 0 {
        return Err("a parenthesis is not closed".into());
    }
    Ok(Translated { sql: out, places })
}

fn line_end(letters: &[char], from: usize) -> usize {
    letters[from..].iter().position(|letter| *letter == '\n').map_or(letters.len(), |length| from + length)
}

/// `a$1` is a name.
fn in_name(letters: &[char], index: usize) -> bool {
    index > 0 && (letters[index - 1].is_alphanumeric() || matches!(letters[index - 1], '_' | '$'))
}

/// Rows as one JSON array.
struct Collected {
    json: Vec<u8>,
    truncated: bool,
    /// The server has more of them to send.
    unread: bool,
}

impl MysqlStore {
    /// Tries a declared statement.
    pub(super) async fn prepare_statement(&self, resource: Resource) -> Result<(Resource, Vec<Problem>), StoreError> {
        let declared = resource.parameters.as_ref().map_or(0, |parameters| parameters.0.len());
        let translated = match translate(&resource.statements.row) {
            Ok(translated) => translated,
            Err(words) => return Ok((resource, vec![Problem::fatal(format!("the statement can't be run: {words}"))])),
        };
        if translated.count() != declared {
            let words = format!("the statement takes {} parameters, and params: names {declared}", translated.count());
            return Ok((resource, vec![Problem::fatal(words)]));
        }
        let mut checked = self.checkout(true).await?;
        let asked = tokio::time::timeout(self.limit(), tried(checked.begin()?, &translated)).await;
        match checked.end(asked) {
            Ok(()) => Ok((resource, Vec::new())),
            Err(Failure::Server(refusal)) => match of_statement(&refusal) {
                outage if outage.is_outage() => Err(outage),
                refused => Ok((resource, vec![Problem::fatal(refused.to_string())])),
            },
            Err(failed) => Err(failed.into()),
        }
    }

    /// Runs a statement. One that somebody made up is not kept prepared, and runs in a transaction that only reads:
    /// functions may write.
    pub(super) async fn result(
        &self,
        resource: &Resource,
        params: &[Param],
        waiters: &Waiters,
    ) -> Result<Rows, StoreError> {
        let translated = translate(&resource.statements.row).map_err(StoreError::BadStatement)?;
        if translated.count() != params.len() {
            let words = format!("it takes {} parameters, and {} were given", translated.count(), params.len());
            return Err(StoreError::BadStatement(words));
        }
        let declared = &*resource.name != "query";
        let mut retried = false;
        loop {
            let mut checked = waiters.or(self.checkout(retried)).await?;
            let origin = checked.origin();
            let conn = checked.begin()?;
            let run = async {
                if declared {
                    return collect(conn, &translated, params).await;
                }
                conn.query_drop("START TRANSACTION READ ONLY").await?;
                let collected = made_up(conn, &translated, params).await;
                if !matches!(collected, Ok(Collected { unread: true, .. })) {
                    // Locks of the session outlive the transaction.
                    conn.query_drop("ROLLBACK; DO RELEASE_ALL_LOCKS()").await?;
                }
                collected
            };
            let collected = tokio::time::timeout(self.limit(), run).await;
            if matches!(collected, Ok(Ok(Collected { unread: true, .. }))) {
                // What was cut is still on its way here: the connection is given up, and the server stops.
                let Ok(Ok(Collected { json, .. })) = collected else { continue };
                return Ok(Rows { origin, json: json.into(), truncated: true });
            }
            match checked.end(collected) {
                Ok(Collected { json, truncated, .. }) => return Ok(Rows { origin, json: json.into(), truncated }),
                Err(failed) if failed.was_lost() && !retried => retried = true,
                Err(Failure::Server(refusal)) if declared => return Err(super::meaning(&refusal)),
                Err(Failure::Server(refusal)) => return Err(of_statement(&refusal)),
                Err(failed) => return Err(failed.into()),
            }
        }
    }
}

/// Whether the server takes it, and takes it for a query.
async fn tried(conn: &mut Conn, translated: &Translated) -> Result<(), Error> {
    for sql in [translated.sql.clone(), translated.inside()] {
        let statement = conn.prep(sql).await?;
        conn.close(statement).await?;
    }
    Ok(())
}

async fn made_up(conn: &mut Conn, translated: &Translated, params: &[Param]) -> Result<Collected, Error> {
    tried(conn, translated).await?;
    let statement = conn.prep(translated.sql.as_str()).await?;
    let collected = rows(conn.exec_iter(&statement, translated.bound(params)).await?).await?;
    if !collected.unread {
        conn.close(statement).await?;
    }
    Ok(collected)
}

async fn collect(conn: &mut Conn, translated: &Translated, params: &[Param]) -> Result<Collected, Error> {
    rows(conn.exec_iter(translated.sql.as_str(), translated.bound(params)).await?).await
}

async fn rows(mut result: mysql_async::QueryResult<'_, '_, mysql_async::BinaryProtocol>) -> Result<Collected, Error> {
    let forms: Vec<(Form, String)> =
        result.columns_ref().iter().map(|column| (Form::of_result(column), column.name_str().into_owned())).collect();
    let mut json = vec![b'['];
    let mut count = 0;
    while let Some(row) = result.next().await? {
        if count == RESULT_ROWS || json.len() > RESULT_BYTES {
            return Ok(Collected { json: closed(json), truncated: true, unread: true });
        }
        json.extend_from_slice(if count == 0 { b"{" } else { b",{" });
        for (index, (form, name)) in forms.iter().enumerate() {
            if index > 0 {
                json.push(b',');
            }
            spelling::string(&mut json, name);
            json.push(b':');
            value::write(&mut json, row.as_ref(index).unwrap_or(&Value::NULL), *form);
        }
        json.push(b'}');
        count += 1;
    }
    result.drop_result().await?;
    Ok(Collected { json: closed(json), truncated: false, unread: false })
}

fn closed(mut json: Vec<u8>) -> Vec<u8> {
    json.push(b']');
    json
}

#[cfg(test)]
mod tests {
    use super::translate;

    #[test]
    fn parameters_are_found_outside_of_texts_names_and_comments() {
        for (sql, expected, places) in [
            ("SELECT $1, $2, $1", "SELECT ?, ?, ?", vec![0, 1, 0]),
            (
                "SELECT '$1', \"$1\", `$1`, a$1, 'it''s $1', 'a\\'$1' -- $1\n, $3",
                "SELECT '$1', \"$1\", `$1`, a$1, 'it''s $1', 'a\\'$1' -- $1\n, ?",
                vec![2],
            ),
            ("SELECT 1 /* $1 */ + $1 # $1", "SELECT 1 /* $1 */ + ? # $1", vec![0]),
            ("SELECT 5--1", "SELECT 5--1", vec![]),
        ] {
            let translated = translate(sql).expect("it is sound");
            assert_eq!((translated.sql.as_str(), &translated.places), (expected, &places), "{sql}");
        }
    }

    #[test]
    fn what_could_be_more_than_one_query_is_refused() {
        for sql in [
            "SELECT 1; DROP TABLE t",
            "SELECT 1) AS a INTO OUTFILE '/tmp/x' /*",
            "SELECT 1) AS a, (SELECT 2",
            "SELECT (1",
            "SELECT 'a",
            "SELECT 'a\\'",
            "SELECT `a",
            "SELECT 1 /*! + 1 */",
            "SELECT 1 /*M! + 1 */",
            "SELECT 1 /* ",
            "SELECT ?",
            "SELECT $0",
            "SELECT $99999999999999999999",
        ] {
            assert!(translate(sql).is_err(), "{sql}");
        }
    }
}
