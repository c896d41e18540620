//! The command line: exit codes, messages, and the demo.

use std::process::{Command, Output};

use crate::app::{App, World};

fn run(args: &[&str], env: &[(&str, &str)]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_cache-aside"));
    command.args(args).env_clear().envs(env.iter().copied()).output().expect("it runs")
}

fn file(text: &str) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::with_suffix(".yaml").expect("a file can be made");
    std::fs::write(file.path(), text).expect("it can be written");
    file
}

#[test]
fn a_configuration_that_does_not_parse_exits_with_2_and_names_file_line_and_key() {
    for (text, says) in [
        (
            "database: { url: \"sqlite::memory:\" }\nresources:\n  fruit:\n    tttl: 10s\n",
            ":4: resources.fruit.tttl: unknown key; did you mean \"ttl\"?",
        ),
        (
            "database: { url: \"sqlite::memory:\" }\nresources:\n  fruit:\n    ttl: 10\n",
            ":4: resources.fruit.ttl: \"10\" has no unit",
        ),
        ("databse: {}\n", ":1: databse: unknown key; did you mean \"database\"?"),
        ("resources: { fruit: {} }\n", "database.url is missing"),
        ("a: [\n", "no valid YAML"),
    ] {
        let file = file(text);
        for args in [["check", "--offline", "--config"], ["serve", "--config", ""]] {
            let path = file.path().to_str().expect("it is text");
            let args: Vec<&str> = args.into_iter().filter(|arg| !arg.is_empty()).chain([path]).collect();
            let output = run(&args, &[]);
            let stderr = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.code(), Some(2), "{stderr}");
            assert!(stderr.contains(says) && stderr.contains(path), "{text:?}: {stderr}");
        }
    }
    assert_eq!(run(&["--no-such-flag"], &[]).status.code(), Some(2));
    assert_eq!(run(&["check", "--config", "/no/such/file"], &[]).status.code(), Some(2));
    assert_eq!(run(&["--version"], &[]).status.code(), Some(0));
    assert_eq!(run(&["--help"], &[]).status.code(), Some(0));
}

#[test]
fn the_schema_of_the_file_is_printed() {
    let output = run(&["schema"], &[]);
    let schema: serde_json::Value = serde_json::from_slice(&output.stdout).expect("it is JSON");
    assert_eq!(schema["properties"].as_object().map(serde_json::Map::len), Some(9));
    assert!(schema.to_string().contains("\"additionalProperties\":false"));
    assert!(!run(&["completions", "bash"], &[]).stdout.is_empty());
}

#[tokio::test]
async fn check_holds_the_configuration_against_the_database_and_the_cache() {
    let world = World::new("CREATE TABLE item (id int PRIMARY KEY, v int); CREATE TABLE doc (j json);").await;
    let good = file(&world.config("resources: { item: {} }"));
    assert!(run(&["migrate", "--config", good.path().to_str().expect("it is text")], &[]).status.success());
    let output = run(&["check", "--config", good.path().to_str().expect("it is text")], &[]);
    let said = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(0), "{said}");
    for line in [
        "ok       database: postgresql",
        "ok       resource item: table item, key (id), 2 columns",
        "ok       cache: Redis",
    ] {
        assert!(said.contains(line), "{line}: {said}");
    }
    let bad = file(&world.config(
        "resources: { item: { key: idd }, gone: {}, doc: {}, comparable: { table: doc, key: j }, listed: { table: item, lists: { w: {} } } }",
    ));
    let output = run(&["check", "--config", bad.path().to_str().expect("it is text")], &[]);
    let said = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(1), "{said}");
    for line in [
        "error    resource item: table item has no column \"idd\"; did you mean \"id\"?",
        "error    resource gone: there is no table or view gone",
        "error    resource doc: doc has no primary key",
        "error    resource comparable: a row can't be read",
        "error    resource listed: table item has no column \"w\"",
    ] {
        assert!(said.contains(line), "{line}: {said}");
    }
    let nowhere = file("database: { url: \"postgres://x@127.0.0.1:1/x\" }\nresources: { item: {} }\n");
    assert_eq!(run(&["check", "--config", nowhere.path().to_str().expect("it is text")], &[]).status.code(), Some(1));
    // A job that lost its settings has not done its work.
    let migrated = run(&["migrate"], &[]);
    assert!(!migrated.status.success() && String::from_utf8_lossy(&migrated.stderr).contains("nothing is configured"));
}

#[tokio::test]
async fn without_any_configuration_the_demo_is_served() {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", env!("CARGO_BIN_EXE_cache-aside")]);
    command.env("CACHE_ASIDE__SERVER__LISTEN", "127.0.0.1:0").env("CACHE_ASIDE__SERVER__DRAIN_DELAY", "0s");
    let app = App::spawn(command, tempfile::tempdir().expect("a folder can be made")).await;
    app.until("ready", async |app| app.get("/readyz").await.status == 200).await;
    app.until("inviting", async |app| app.log().matches("curl ").count() == 3).await;
    let fruit = app.get("/api/fruit/1").await.expect(200);
    assert_eq!(fruit.text, r#"{"data":{"id":1,"name":"apple","quantity":100},"source":"database"}"#);
    assert_eq!(app.get("/api/fruit/1").await.expect(200).source(), "cache");
    app.get("/api/products?category_id=5").await.expect(200);
    app.patch("/api/fruit/1", r#"{"quantity":99}"#).await.expect(200);
    assert_eq!(app.get("/api/fruit/1").await.json()["data"]["quantity"], 99);
    for path in ["/api/airline/1", "/api/sessions/s-1", "/api/categories/1"] {
        app.get(path).await.expect(200);
    }
    let user = app.post("/api/users", r#"{"name":"Angelica Hill"}"#).await.expect(201);
    app.get(user.header("location")).await.expect(200);
}

#[tokio::test]
async fn a_database_url_alone_serves_every_table_with_a_key_read_only() {
    let world = World::new(
        "CREATE TABLE \"Order Details\" (id int PRIMARY KEY); INSERT INTO \"Order Details\" VALUES (1); CREATE TABLE keyless (a int);",
    )
    .await;
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", env!("CARGO_BIN_EXE_cache-aside")]);
    command.env("CACHE_ASIDE__SERVER__LISTEN", "127.0.0.1:0").env("DATABASE_URL", &world.database.url);
    command.env("REDIS_URL", &world.redis_url).env("CACHE_ASIDE__CACHE__KEY_PREFIX", &world.prefix);
    let app = App::spawn(command, tempfile::tempdir().expect("a folder can be made")).await;
    app.until("ready", async |app| app.get("/readyz").await.status == 200).await;
    assert_eq!(app.get("/api/order_details/1").await.expect(200).data(), r#"{"id":1}"#);
    app.post("/api/order_details", "{}").await.expect(405);
    app.get("/api/keyless/1").await.expect(404);
}

#[tokio::test]
async fn init_prints_a_configuration_that_fits() {
    let world = World::new(
        "CREATE TABLE users (id int PRIMARY KEY, name text, team_id int);
         CREATE TABLE \"Order Lines\" (\"order\" int, line int, \"${x}\" text, PRIMARY KEY (\"order\", line));
         CREATE TABLE keyless (a int);",
    )
    .await;
    let printed = run(&["init", "--database-url", &world.database.url], &[]);
    assert!(printed.status.success(), "{printed:?}");
    let text = String::from_utf8(printed.stdout).expect("it is text");
    for line in [
        "  users:\n    key: id\n    columns: [id, name, team_id]",
        "    # lists: { team_id: { limit: 1000 } }",
        "  order_lines:\n    table: \"\\\"public\\\".\\\"Order Lines\\\"\"",
        "key: [order, line]",
        "# keyless has no primary key",
    ] {
        assert!(text.contains(line), "{line}: {text}");
    }
    let config = file(&text);
    let env = [("DATABASE_URL", world.database.url.as_str()), ("CACHE_URL", world.redis_url.as_str())];
    let path = config.path().to_str().expect("it is text").to_owned();
    assert!(run(&["migrate", "--config", &path], &env).status.success());
    let check = run(&["check", "--config", &path], &env);
    assert!(check.status.success(), "{check:?}");
    assert!(!run(&["init"], &[]).status.success(), "which database?");
    assert!(!run(&["init", "--database-url", "postgres://127.0.0.1:1/x"], &[]).status.success());
}
