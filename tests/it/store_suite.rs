//! One contract for every store adapter: the same table, the same answers.

use std::sync::Arc;

use cache_aside::app::{look, open_store};
use cache_aside::catalog::{Key, KeyError, Resource, State, What};
use cache_aside::config::{Config, Env};
use cache_aside::store::{AnyStore, Body, LastWord, Load, Precondition, Store, StoreError, Waiters, Write, WriteError};

use crate::servers::{Mariadb, Postgres};

/// Statements that both engines take.
const SCHEMA: &str = "
    CREATE TABLE author (id integer PRIMARY KEY, name varchar(20) NOT NULL UNIQUE);
    CREATE TABLE book (
      isbn text NOT NULL, edition integer NOT NULL, title text DEFAULT 'untitled', author_id integer REFERENCES author (id),
      pages integer CHECK (pages > 0), extra json, sold boolean, cover bytea_, PRIMARY KEY (isbn, edition));
    INSERT INTO author (id, name) VALUES (1, 'Ann'), (2, 'Bob'), (3, 'Cleo');
    INSERT INTO book VALUES ('a', 1, 'A1', 1, 10, '{\"x\":[1,2.50]}', true, X_);
    INSERT INTO book VALUES ('a', 2, 'A2', 1, 20, NULL, false, NULL);
    INSERT INTO book VALUES ('b,%', 1, 'quote\"s', 2, NULL, NULL, NULL, NULL);";

const CONFIG: &str = "
resources:
  author: { write: [create, update, delete] }
  book: { key: [isbn, edition], write: [create, update, delete], lists: { author_id: { order_by: -edition, limit: 2 } } }
  gone: {}
  titles: { table: author, columns: [name, id] }
";

struct Shelf {
    store: AnyStore,
    resources: std::collections::BTreeMap<String, State>,
}

impl Shelf {
    async fn open(url: &str, schema: Option<&'static str>) -> Self {
        let text = format!("database: {{ url: \"{url}\" }}\n{CONFIG}");
        let config = Config::from_yaml(&text, "test", &Env::default()).expect("it is sound");
        let store = open_store(&config).expect("the URL is sound");
        if let (AnyStore::Sqlite(store), Some(schema)) = (&store, schema) {
            store.execute(schema).await.expect("the schema is sound");
        }
        let resources = look(&store, &config).await.0.resources;
        Self { store, resources }
    }

    fn resource(&self, name: &str) -> Arc<Resource> {
        match &self.resources[name] {
            State::Ready(resource, _) => Arc::clone(resource),
            State::Waiting(problems) => panic!("{problems:?}"),
        }
    }

    fn key(&self, resource: &str, parts: &[&str]) -> Key {
        let target = self.resource(resource).row(parts.iter().map(|part| (*part).to_owned()).collect());
        match target.expect("it is a key").what() {
            What::Row(key) => key.clone(),
            What::List { .. } | What::Result(_) => unreachable!("a row was asked for"),
        }
    }

    async fn rows(&self, resource: &str, keys: &[&[&str]]) -> Vec<Option<String>> {
        let keys: Vec<Key> = keys.iter().map(|parts| self.key(resource, parts)).collect();
        let asked: Vec<&Key> = keys.iter().collect();
        let rows =
            self.store.rows(&self.resource(resource), &asked, &Waiters::default()).await.expect("it answers").rows;
        rows.into_iter().map(|row| row.map(|row| String::from_utf8(row.json.to_vec()).expect("it is text"))).collect()
    }

    async fn write(
        &self,
        resource: &str,
        write: Write,
    ) -> Result<(Option<String>, Key, Vec<(usize, String)>), WriteError> {
        let written =
            self.store.write(&self.resource(resource), write, &LastWord::default(), &Waiters::default()).await?;
        let row = written.row.map(|row| String::from_utf8(row.to_vec()).expect("it is text"));
        Ok((row, written.key, written.lists))
    }
}

fn body(json: &str) -> Body {
    serde_json::from_str(json).expect("it is a row")
}

async fn contract(shelf: &Shelf) {
    assert!(shelf.store.ping().await.is_ok());
    let gone = &shelf.resources["gone"];
    assert!(matches!(gone, State::Waiting(problems) if problems[0].text.contains("no table")), "{gone:?}");
    let book = shelf.resource("book");
    assert!(matches!(book.row(vec!["a".into(), "x".into()]), Err(KeyError::Malformed(_))));

    let a1 = r#"{"isbn":"a","edition":1,"title":"A1","author_id":1,"pages":10,"extra":{"x":[1,2.50]},"sold":true,"cover":"\\x00ff"}"#;
    let b1 = r#"{"isbn":"b,%","edition":1,"title":"quote\"s","author_id":2,"pages":null,"extra":null,"sold":null,"cover":null}"#;
    assert_eq!(shelf.rows("book", &[&["a", "1"]]).await, [Some(a1.into())]);
    assert_eq!(
        shelf.rows("book", &[&["b,%", "1"], &["z", "9"], &["a", "1"], &["b,%", "1"]]).await,
        [Some(b1.into()), None, Some(a1.into()), Some(b1.into())]
    );
    assert_eq!(
        shelf.rows("author", &[&["3"], &["99"], &["1"]]).await,
        [Some(r#"{"id":3,"name":"Cleo"}"#.into()), None, Some(r#"{"id":1,"name":"Ann"}"#.into())]
    );
    assert_eq!(shelf.rows("titles", &[&["2"]]).await, [Some(r#"{"name":"Bob","id":2}"#.into())]);
    let list = shelf.store.list(&book, 0, "1", &Waiters::default()).await.expect("it answers");
    assert!(list.json.starts_with(br#"[{"isbn":"a","edition":2"#) && !list.truncated, "{list:?}");
    assert_eq!(shelf.store.list(&book, 0, "77", &Waiters::default()).await.expect("it answers").json, "[]");
    writes(shelf).await;
    refusals(shelf).await;
}

async fn writes(shelf: &Shelf) {
    let create = |json: &str| Write::Create { body: body(json) };
    let key = shelf.key("book", &["a", "3"]);
    let (row, created, lists) =
        shelf.write("book", create(r#"{"isbn":"a","edition":3,"author_id":1}"#)).await.expect("it is sound");
    assert_eq!((created, lists), (key.clone(), vec![(0, "1".to_owned())]));
    assert!(row.is_some_and(|row| row.contains(r#""title":"untitled""#)));
    let list = shelf.store.list(&shelf.resource("book"), 0, "1", &Waiters::default()).await.expect("it answers");
    assert!(list.truncated, "{list:?}");

    let merge = |json: &str| Write::Merge { key: key.clone(), body: body(json), precondition: None };
    let (row, _, mut lists) =
        shelf.write("book", merge(r#"{"author_id":2,"extra":{"a":{"b":1}}}"#)).await.expect("it is sound");
    lists.sort();
    assert_eq!(lists, [(0, "1".to_owned()), (0, "2".to_owned())], "where it was and where it is");
    assert!(row.is_some_and(|row| row.contains(r#""extra":{"a":{"b":1}}"#)));
    let (row, ..) = shelf.write("book", merge(r#"{"extra":{"a":{"b":null,"c":10.0}}}"#)).await.expect("it is sound");
    assert!(row.as_ref().is_some_and(|row| row.contains(r#""extra":{"a":{"c":10.0}}"#)), "{row:?}");
    let (row, _, lists) = shelf.write("book", merge("{}")).await.expect("nothing to do");
    assert!(row.is_some() && lists == [(0, "2".to_owned())]);

    let never = Some(Precondition(Arc::new(|_: &[u8]| false)));
    let guarded = Write::Delete { key: key.clone(), precondition: never };
    assert_eq!(shelf.write("book", guarded).await, Err(WriteError::PreconditionFailed));
    let replace = Write::Replace { key: key.clone(), body: body(r#"{"pages":5}"#), precondition: None };
    let (row, _, lists) = shelf.write("book", replace).await.expect("it is sound");
    assert_eq!(lists, [(0, "2".to_owned())]);
    let expected = r#"{"isbn":"a","edition":3,"title":"untitled","author_id":null,"pages":5,"extra":null,"sold":null,"cover":null}"#;
    assert_eq!(row.as_deref(), Some(expected));

    let delete = || Write::Delete { key: key.clone(), precondition: None };
    let (row, ..) = shelf.write("book", delete()).await.expect("it is there");
    assert_eq!(row, None);
    assert_eq!(shelf.write("book", delete()).await, Err(WriteError::NotFound));
    assert_eq!(shelf.write("book", merge("{}")).await, Err(WriteError::NotFound));
    assert_eq!(shelf.rows("book", &[&["a", "3"]]).await, [None]);
}

async fn refusals(shelf: &Shelf) {
    let columns = |outcome: Result<_, WriteError>| match outcome {
        Err(WriteError::Conflict { columns, .. }) => ("conflict", columns),
        Err(WriteError::Violation { columns, .. }) => ("violation", columns),
        other => panic!("{other:?}"),
    };
    for (resource, json, expected, column) in [
        ("author", r#"{"id":1,"name":"Dora"}"#, "conflict", Some("id")),
        ("author", r#"{"id":9,"name":"Ann"}"#, "conflict", Some("name")),
        ("author", r#"{"id":9}"#, "violation", Some("name")),
        ("author", r#"{"id":"nine","name":"Dora"}"#, "violation", Some("id")),
        ("book", r#"{"isbn":"c","edition":1,"pages":-1}"#, "violation", Some("pages")),
        ("book", r#"{"isbn":"c","edition":1,"author_id":99}"#, "violation", None),
        ("book", r#"{"isbn":"c","edition":1,"sold":"perhaps"}"#, "violation", Some("sold")),
        ("book", r#"{"isbn":"c","edition":1,"cover":"\\xzz"}"#, "violation", Some("cover")),
    ] {
        let (kind, named) = columns(shelf.write(resource, Write::Create { body: body(json) }).await);
        assert_eq!(kind, expected, "{json}");
        if let Some(column) = column {
            assert_eq!(named, [column], "{json}");
        }
    }
    let referred = Write::Delete { key: shelf.key("author", &["1"]), precondition: None };
    assert_eq!(columns(shelf.write("author", referred).await).0, "conflict");
    assert_eq!(shelf.rows("author", &[&["9"]]).await, [None], "a refused write leaves nothing");
}

#[tokio::test]
async fn postgres_keeps_the_contract() {
    let database = Postgres::shared().await.create_database().await;
    let schema = SCHEMA.replace("bytea_", "bytea").replace("X_", r"'\x00ff'");
    database.client().await.batch_execute(&schema).await.expect("the schema is sound");
    contract(&Shelf::open(&database.url, None).await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn mariadb_keeps_the_contract() {
    let database = Mariadb::shared().await.create_database().await;
    let schema = SCHEMA.replace("text", "varchar(40)").replace("bytea_", "varbinary(10)").replace("X_", "X'00ff'");
    database.sql(&schema).await;
    contract(&Shelf::open(&database.url, None).await).await;
    contract(&Shelf::open(&database.url.replace("mysql://", "mariadb://"), None).await).await;
}

#[tokio::test]
async fn sqlite_in_memory_keeps_the_contract() {
    let schema: &'static str = Box::leak(SCHEMA.replace("bytea_", "blob").replace("X_", "X'00ff'").into_boxed_str());
    contract(&Shelf::open("sqlite::memory:", Some(schema)).await).await;
}

#[tokio::test]
async fn sqlite_in_a_file_keeps_the_contract() {
    let schema: &'static str = Box::leak(SCHEMA.replace("bytea_", "blob").replace("X_", "X'00ff'").into_boxed_str());
    let dir = tempfile::tempdir().expect("a folder can be made");
    let url = format!("sqlite:{}/shelf.db", dir.path().display());
    contract(&Shelf::open(&url, Some(schema)).await).await;
}

#[tokio::test]
async fn a_statement_that_takes_too_long_is_ended_by_the_database_itself() {
    let database = Postgres::shared().await.create_database().await;
    let schema = "CREATE VIEW slow AS SELECT 1 AS id, pg_sleep(20)::text AS waited;";
    database.client().await.batch_execute(schema).await.expect("the schema is sound");
    let text = format!(
        "database: {{ url: \"{}\", statement_timeout: 200ms }}\nresources: {{ slow: {{ key: id }} }}",
        database.url
    );
    let config = Config::from_yaml(&text, "test", &Env::default()).expect("it is sound");
    let store = open_store(&config).expect("the URL is sound");
    let State::Ready(slow, _) = &look(&store, &config).await.0.resources["slow"] else { panic!("it is served") };
    let target = slow.row(vec!["1".into()]).expect("it is a key");
    let What::Row(key) = target.what() else { unreachable!("a row was asked for") };
    assert_eq!(store.rows(slow, &[key], &Waiters::default()).await, Err(StoreError::TimedOut));
    let busy = "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND query LIKE '%slow%' AND pid <> pg_backend_pid()";
    let row = database.client().await.query_one(busy, &[]).await.expect("it answers");
    assert_eq!(row.get::<_, i64>(0), 0, "nobody works on it any more");
}
