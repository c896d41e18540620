//! One contract for every store adapter: the same table, the same answers.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use cache_aside::app::{look, open_store};
use cache_aside::catalog::{Key, KeyError, Resource, State, What};
use cache_aside::config::{Config, Env};
use cache_aside::store::{
    AnyStore, Body, Keys, LastWord, Load, Precondition, Store, StoreError, Waiters, Write, WriteError,
};

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
    INSERT INTO book VALUES ('b,%', 1, 'quote\"s', 2, NULL, NULL, NULL, NULL);
    CREATE TABLE word (lang varchar(5) NOT NULL, word varchar(20) NOT NULL, PRIMARY KEY (lang, word));
    INSERT INTO word VALUES ('de', 'Zebra'), ('de', 'apfel'), ('de', 'Ähre'), ('de', ''), ('EN', 'a b'), ('EN', '10'), ('EN', '9'),
      ('fr', '100%,x'), ('fr', 'éclair'), ('fr', 'Eclat'), ('fr', 'zut'), ('', 'none');
    CREATE TABLE tag (label varchar(20), note varchar(20), weight float, at timestamp DEFAULT NULL);
    INSERT INTO tag VALUES ('b', 'one', 0.1, '2024-05-01 10:00:00'), (NULL, 'two', 0.2, NULL), ('a', 'three', 1e20, '2024-05-01 10:00:01'),
      ('b', 'four', -7, '2024-05-02 00:00:00'), ('b', 'five', 3, NULL), ('c', NULL, 0.3, NULL);
    CREATE VIEW labels AS SELECT label, note, weight, at FROM tag;";

const CONFIG: &str = "
resources:
  author: { write: [create, update, delete] }
  book: { key: [isbn, edition], write: [create, update, delete], lists: { author_id: { order_by: -edition, limit: 2 } } }
  gone: {}
  titles: { table: author, columns: [name, id] }
  word: {}
  labels: { key: label }
  notes: { table: labels, key: [label, note] }
  weights: { table: tag, key: weight }
  moments: { table: labels, key: at }
";

struct Shelf {
    store: AnyStore,
    resources: BTreeMap<String, State>,
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
    keys(shelf).await;
    writes(shelf).await;
    refusals(shelf).await;
}

/// All keys, walked through in pages of so many.
async fn walk(shelf: &Shelf, resource: &str, page: usize) -> Vec<Key> {
    let (resource, mut all, mut walk) = (shelf.resource(resource), Vec::new(), Keys::new(page));
    loop {
        let keys = walk.next(&shelf.store, &resource).await.expect("it answers").keys;
        assert!(keys.len() <= page, "{keys:?}");
        if keys.is_empty() {
            return all;
        }
        all.extend(keys);
    }
}

async fn keys(shelf: &Shelf) {
    for (resource, count) in
        [("author", 3), ("book", 3), ("word", 12), ("labels", 3), ("notes", 4), ("weights", 6), ("moments", 3)]
    {
        let whole = walk(shelf, resource, 100).await;
        for page in [1, 2, 3, 5] {
            let mut walked = walk(shelf, resource, page).await;
            // Rows that share a key stand side by side.
            walked.dedup();
            assert_eq!(walked, whole, "{resource} in pages of {page}");
        }
        let distinct: HashSet<&Key> = whole.iter().collect();
        assert_eq!((distinct.len(), whole.len()), (count, count), "{resource}: {whole:?}");
        // As a client would ask for them.
        let parts: Vec<Vec<&str>> = whole.iter().map(|key| key.parts().iter().map(String::as_str).collect()).collect();
        let parts: Vec<&[&str]> = parts.iter().map(Vec::as_slice).collect();
        let rows = shelf.rows(resource, &parts).await;
        assert!(rows.iter().all(Option::is_some), "{resource}: {whole:?}: {rows:?}");
    }
    assert_eq!(walk(shelf, "author", 2).await.iter().map(ToString::to_string).collect::<Vec<_>>(), ["1", "2", "3"]);
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

/// Walks through each table of a database by its primary key, in pages of two, and gives the keys.
async fn walked(url: &str) -> BTreeMap<String, Vec<String>> {
    let config = Config::from_yaml(
        &format!("database: {{ url: \"{url}\" }}\nresources: {{ x: {{}} }}"),
        "test",
        &Env::default(),
    );
    let mut config = config.expect("it is sound");
    config.resources.clear();
    let store = open_store(&config).expect("the URL is sound");
    let resources = look(&store, &config).await.0.resources;
    let shelf = Shelf { store, resources };
    let mut all = BTreeMap::new();
    for name in shelf.resources.keys() {
        all.insert(name.clone(), walk(&shelf, name, 2).await.iter().map(ToString::to_string).collect());
    }
    all
}

#[tokio::test]
async fn keys_of_all_kinds_are_walked_through_in_postgres() {
    let database = Postgres::shared().await.create_database().await;
    let schema = "
        CREATE TYPE size AS ENUM ('small', 'medium', 'large', 'huge', 'none');
        CREATE COLLATION insensitive (provider = icu, locale = 'und-u-ks-level2', deterministic = false);
        CREATE TABLE sizes (k size PRIMARY KEY); INSERT INTO sizes VALUES ('none'), ('huge'), ('small'), ('large'), ('medium');
        CREATE TABLE words (k text COLLATE insensitive PRIMARY KEY); INSERT INTO words VALUES ('b'), ('A'), ('C'), ('ä'), ('Z');
        CREATE TABLE bytes (k text COLLATE \"C\" PRIMARY KEY); INSERT INTO bytes VALUES ('b'), ('A'), ('C'), ('ä'), ('Z');
        CREATE TABLE floats (k float8 PRIMARY KEY); INSERT INTO floats VALUES ('NaN'), ('-Infinity'), (0.1), (2.5), ('Infinity');
        CREATE TABLE moments (k timestamptz PRIMARY KEY); INSERT INTO moments VALUES ('infinity'), (now()), ('2024-01-01 00:00:00.123456+03');
        CREATE TABLE raws (k bytea PRIMARY KEY); INSERT INTO raws VALUES ('\\x'), ('\\x00'), ('\\xff00'), ('a');
        CREATE TABLE padded (k char(4), n numeric, PRIMARY KEY (k, n)); INSERT INTO padded VALUES ('a', 1.0), ('a', 1.50), ('ab', -3), ('', 0);";
    database.client().await.batch_execute(schema).await.expect("the schema is sound");
    let all = walked(&database.url).await;
    assert_eq!(all["sizes"], ["small", "medium", "large", "huge", "none"]);
    assert_eq!(all["bytes"], ["A", "C", "Z", "b", "ä"]);
    assert_eq!(all["words"], ["A", "ä", "b", "C", "Z"]);
    assert_eq!(all["floats"], ["-Infinity", "0.1", "2.5", "Infinity", "NaN"]);
    assert_eq!(all["raws"], ["\\x", "\\x00", "\\x61", "\\xff00"]);
    assert_eq!((all["moments"].len(), all["padded"].len()), (3, 4), "{all:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_of_all_kinds_are_walked_through_in_mariadb() {
    let database = Mariadb::shared().await.create_database().await;
    database
        .sql(
            "CREATE TABLE sizes (k enum('small', 'medium', 'large', 'huge', 'none') PRIMARY KEY);
             INSERT INTO sizes VALUES ('none'), ('huge'), ('small'), ('large'), ('medium');
             CREATE TABLE flags (k tinyint(1) PRIMARY KEY); INSERT INTO flags VALUES (0), (1), (5), (7), (-3);
             CREATE TABLE words (k varchar(9) PRIMARY KEY); INSERT INTO words VALUES ('b'), ('A'), ('C'), ('e'), ('Z');
             CREATE TABLE bytes (k varchar(9) COLLATE utf8mb4_bin PRIMARY KEY); INSERT INTO bytes VALUES ('b'), ('A'), ('C'), ('a'), ('Z');
             CREATE TABLE many (a int, b decimal(8,2), c date, PRIMARY KEY (a, b, c));
             INSERT INTO many VALUES (1, 1.5, '2024-01-01'), (1, 1.5, '2024-01-02'), (1, -2, '2020-01-01'), (0, 9, '2024-01-01'), (2, 0, '0001-01-01');
             CREATE TABLE raws (k varbinary(9) PRIMARY KEY); INSERT INTO raws VALUES (''), (X'00'), (X'ff00'), ('a');
             CREATE TABLE bits (k bit(9) PRIMARY KEY); INSERT INTO bits VALUES (0), (1), (256), (511);
             CREATE TABLE spans (k time(3) PRIMARY KEY); INSERT INTO spans VALUES ('-10:00:00'), ('10:00:00.5'), ('200:00:00')",
        )
        .await;
    let all = walked(&database.url).await;
    assert_eq!(all["sizes"], ["huge", "large", "medium", "none", "small"], "as texts, as they are compared");
    assert_eq!(all["flags"], ["-3", "false", "true", "5", "7"]);
    assert_eq!(all["words"], ["A", "b", "C", "e", "Z"]);
    assert_eq!(all["bytes"], ["A", "C", "Z", "a", "b"]);
    assert_eq!(
        all["many"],
        ["0,9.00,2024-01-01", "1,-2.00,2020-01-01", "1,1.50,2024-01-01", "1,1.50,2024-01-02", "2,0.00,0001-01-01"]
    );
    assert_eq!(all["raws"], ["\\x", "\\x00", "\\x61", "\\xff00"]);
    assert_eq!((all["bits"].len(), all["spans"].len()), (4, 3), "{all:?}");
}

#[tokio::test]
async fn what_no_key_finds_is_passed_over_in_sqlite() {
    let dir = tempfile::tempdir().expect("a folder can be made");
    let url = format!("sqlite:{}/keys.db", dir.path().display());
    let schema = "
        CREATE TABLE words (k text COLLATE NOCASE PRIMARY KEY);
        INSERT INTO words VALUES ('b'), ('A'), (X'00'), (X'ff'), (X'01'), (NULL), ('c'), (7), ('Z');
        CREATE TABLE counts (k integer, v int, PRIMARY KEY (k, v));
        INSERT INTO counts VALUES (1, 2), (1, 1), ('x', 1), (2, NULL), (0, 5), (1.5, 1), (-1, 1);
        CREATE TABLE numbers (k decimal PRIMARY KEY); INSERT INTO numbers VALUES (1.5), (1), ('x'), (1e300), (-2);";
    let config = format!("database: {{ url: \"{url}\" }}\nresources: {{ x: {{}} }}");
    let store = open_store(&Config::from_yaml(&config, "test", &Env::default()).expect("it is sound"));
    let AnyStore::Sqlite(store) = store.expect("the URL is sound") else { unreachable!("the URL says which") };
    store.execute(schema).await.expect("the schema is sound");
    let all = walked(&url).await;
    assert_eq!(all["words"], ["7", "A", "b", "c", "Z"]);
    assert_eq!(all["counts"], ["-1,1", "0,5", "1,1", "1,2"]);
    assert_eq!(all["numbers"], ["-2", "1", "1.5", "1e+300"]);
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
