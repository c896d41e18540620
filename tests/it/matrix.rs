//! Every database with every cache: the same rows, asked for in the same ways, give the same answers.

use crate::app::{App, Reply};
use crate::invalidation::{seen, warm};
use crate::nodes::Nodes;
use crate::servers::{Kind, Mariadb, Memcached, Postgres, Redis};

/// Types that all three databases have. What is different elsewhere is in the docs of each.
fn schema(text: &str, double: &str, blob: &str) -> String {
    let hex = |digits: &str| if blob == "bytea" { format!(r"'\x{digits}'") } else { format!("X'{digits}'") };
    format!(
        "CREATE TABLE thing (id int PRIMARY KEY, kind int, name {text} NOT NULL, big bigint, ratio {double}, raw {blob}, note {text});
         INSERT INTO thing VALUES
         (1, 1, 'plain', 9007199254740993, 0.1, {}, NULL), (2, 2, 'quote\"; and 🙂', -9223372036854775808, 1e300, {}, ''),
         (3, 2, 'Größe', 0, -0.5, NULL, 'x'), (4, NULL, '', NULL, NULL, NULL, NULL);",
        hex("00ff"),
        hex("")
    )
}

const REST: &str = "
access: { write: public, refresh: public, admin: public, adhoc_queries: public }
resources:
  thing: { write: [create, update, delete], lists: { kind: { order_by: name } } }
queries:
  kinds: { sql: \"SELECT kind, count(*) AS n, max(big) AS most FROM thing GROUP BY kind ORDER BY kind IS NULL, kind\", depends_on: [thing] }
  of: { sql: \"SELECT id, name FROM thing WHERE kind = $1 ORDER BY id\", params: [kind], depends_on: [thing] }
";

/// The answer without what may differ: where it came from.
fn answer(what: &str, reply: &Reply) -> String {
    let text = reply.text.split_once(",\"source\"").map_or(reply.text.as_str(), |(text, _)| text);
    let text = text.split_once(",\"request_id\"").map_or(text, |(text, _)| text);
    format!("{what}: {} {text}\n", reply.status.as_u16())
}

/// Everything that is asked, cold and then cached, before and after everything that is written.
async fn conversation(app: &App) -> String {
    const ASKED: [&str; 8] = [
        "/api/thing/1",
        "/api/thing/2",
        "/api/thing/77",
        "/api/thing?id=3,1,99,04,2",
        "/api/thing?kind=2",
        "/api/thing?kind=9",
        "/api/queries/kinds",
        "/api/queries/of?kind=2",
    ];
    let mut said = String::new();
    let look = async |said: &mut String| {
        for path in ASKED {
            let cold = answer(path, &app.get(path).await);
            let warm = answer(path, &app.get(path).await);
            assert_eq!(cold, warm, "from the database and from the cache");
            said.push_str(&cold);
        }
    };
    look(&mut said).await;
    let adhoc = r#"{"sql":"SELECT name FROM thing WHERE id = $1","params":[3]}"#;
    said.push_str(&answer("ad hoc", &app.post("/api/query", adhoc).await));
    let row = r#"{"id":5,"kind":2,"name":"new","big":7,"ratio":2.5,"raw":"\\xabcd","note":null}"#;
    said.push_str(&answer("create", &app.post("/api/thing", row).await));
    said.push_str(answer("again", &app.post("/api/thing", row).await).split(" {").next().unwrap_or_default());
    said.push_str(&answer("merge", &app.patch("/api/thing/1", r#"{"kind":2,"name":"renamed"}"#).await));
    said.push_str(&answer("replace", &app.put("/api/thing/2", r#"{"name":"bare"}"#).await));
    said.push_str(&answer("delete", &app.delete("/api/thing/3").await));
    said.push_str(answer("none", &app.delete("/api/thing/3").await).split(" {").next().unwrap_or_default());
    look(&mut said).await;
    said
}

#[tokio::test]
async fn every_database_with_every_cache_gives_the_same_answers() {
    let (redis, valkey) = (Redis::start().await, Redis::start_as(Kind::Valkey, &[]).await);
    let (nodes, memcached) = (Nodes::start().await, Memcached::start().await);
    let caches = ["memory:".to_owned(), redis.url(), valkey.url(), nodes.url(), memcached.url()];
    let mut expected: Option<String> = None;
    for cache in &caches {
        for engine in ["postgres", "mariadb", "sqlite"] {
            let folder = tempfile::tempdir().expect("a folder can be made");
            let (url, postgres, mariadb) = match engine {
                "postgres" => {
                    let database = Postgres::shared().await.create_database().await;
                    let schema = schema("text", "double precision", "bytea");
                    database.client().await.batch_execute(&schema).await.expect("the schema is sound");
                    (database.url.clone(), Some(database), None)
                }
                "mariadb" => {
                    let database = Mariadb::shared().await.create_database().await;
                    database.sql(&schema("varchar(50)", "double", "varbinary(50)")).await;
                    (database.url.clone(), None, Some(database))
                }
                _ => {
                    let file = folder.path().join("things.db");
                    let file = file.to_str().expect("it is text");
                    let connection = rusqlite::Connection::open(file).expect("it can be made");
                    connection.execute_batch(&schema("text", "double", "blob")).expect("the schema is sound");
                    (format!("sqlite:{file}"), None, None)
                }
            };
            let mode = if engine == "sqlite" { "none" } else { "outbox" };
            let app = App::start(&format!(
                "database: {{ url: \"{url}\" }}\ncache: {{ url: \"{cache}\", key_prefix: \"{engine}:\", timeout: 2s }}\n\
                 invalidation: {{ mode: {mode} }}\n{REST}"
            ))
            .await;
            warm(&[&app], &["/api/thing/4", "/api/queries/kinds"]).await;
            let said = conversation(&app).await;
            match &expected {
                None => expected = Some(said),
                Some(expected) => assert_eq!(*expected, said, "{engine} with {cache}"),
            }
            // And changes by others, where there may be any.
            let change = "UPDATE thing SET name = 'outside' WHERE id = 4";
            match (postgres, mariadb) {
                (Some(database), _) => database.client().await.batch_execute(change).await.expect("it is sound"),
                (_, Some(database)) => database.sql(change).await,
                _ => continue,
            }
            seen(&[&app], "/api/thing/4", "outside").await;
        }
    }
    let expected = expected.expect("at least one pair was asked");
    assert!(
        expected.contains(
            r#"{"id":1,"kind":1,"name":"plain","big":9007199254740993,"ratio":0.1,"raw":"\\x00ff","note":null}"#
        ),
        "{expected}"
    );
    assert!(
        expected.contains("create: 201") && expected.contains("again: 409") && expected.contains("none: 404"),
        "{expected}"
    );
}
