//! Warming: from the command line, beside a service or without one, and through the API of a running one.

use std::io::{Read as _, Write as _};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use reqwest::Method;
use serde_json::Value;

use crate::app::{App, PATIENCE, World, command, migrate};
use crate::servers::{Mariadb, Redis};

const ROWS: &str = "
    CREATE TABLE item (id int PRIMARY KEY, v int NOT NULL); INSERT INTO item SELECT n, n FROM generate_series(1, 2500) n;
    CREATE TABLE line (ord int, code text, PRIMARY KEY (ord, code)); INSERT INTO line VALUES (7, '2'), (7, 'a,b'), (8, '100%');";

const CONFIG: &str = "resources: { item: { write: [update] }, line: {} }\n";

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

/// How many rows were filled and how many were there already, where none was absent and none failed. Some of those that were
/// there are filled again where the cache was late.
fn filled(said: &str) -> (u32, u32) {
    assert!(said.contains(" already there, 0 absent, 0 failed, in "), "{said}");
    let before = |words: &str| said.split_once(words)?.0.rsplit(' ').next()?.parse().ok();
    let counts = before(" filled, ").zip(before(" already there"));
    counts.unwrap_or_else(|| panic!("no counts in {said}"))
}

/// How many rows of a resource a service gets from its cache alone.
async fn cached(app: &App, paths: impl Iterator<Item = String>) -> usize {
    let mut found = 0;
    for path in paths {
        let reply = app.ask(Method::GET, &path).header("cache-control", "only-if-cached").send().await;
        assert!(matches!(reply.status.as_u16(), 200 | 504), "{reply:?}");
        found += usize::from(reply.status == 200);
    }
    found
}

#[tokio::test]
async fn all_rows_are_warmed_from_the_command_line_without_a_service_and_found_by_one() {
    all_rows(World::new(ROWS).await).await;
}

#[tokio::test]
async fn the_same_where_changes_are_decoded_from_the_log() {
    all_rows(World::decoding(ROWS).await).await;
}

async fn all_rows(world: World) {
    let config = world.config(CONFIG);
    migrate(&config);
    let first = command(&config, &["warm", "item", "--all", "--rate", "0"]);
    assert!(first.status.success(), "{}", said(&first));
    let (filled, there) = filled(&said(&first));
    assert_eq!(filled + there, 2500, "{}", said(&first));
    // A service that starts later: nothing has changed, so all of it is still true.
    let app = world.app(CONFIG).await;
    app.until("warm", async |app| cached(app, (1..=2500).step_by(83).map(|id| format!("/api/item/{id}"))).await == 31)
        .await;
    assert_eq!(app.metric("cache_aside_store_queries_total{operation=\"row\",resource=\"item\"}").await, 0);
    // Beside it: what is there is not loaded again, and what was changed or dropped is.
    app.patch("/api/item/5", r#"{"v":-5}"#).await.expect(200);
    app.delete("/admin/cache/item/6").await.expect(204);
    let again = command(&config, &["warm", "item", "--all"]);
    let (filled, there) = self::filled(&said(&again));
    assert!(filled >= 2 && filled < there && filled + there == 2500, "{}", said(&again));
    let expected = r#"{"data":{"id":5,"v":-5},"source":"cache"}"#;
    app.until("warmed", async |app| app.get("/api/item/5").await.expect(200).text == expected).await;
}

#[tokio::test]
async fn keys_of_a_file_are_warmed_and_bad_lines_named() {
    let world = World::new(ROWS).await;
    let config = world.config(CONFIG);
    migrate(&config);
    let mut file = tempfile::NamedTempFile::new().expect("a file can be made");
    file.write_all(b"7,2\n7,a%2Cb\r\n\n7\nx,2\n8,100%25\n8,gone\n9,\xff\n99999999999,1").expect("it can be written");
    let path = file.path().to_str().expect("it is text");
    let warmed = command(&config, &["warm", "line", "--ids", path]);
    assert_eq!(warmed.status.code(), Some(1), "{}", said(&warmed));
    for words in [
        "line: 3 filled, 0 already there, 2 absent, 3 failed",
        "line 4: the key has 2 parts, 1 came",
        "line 5: ord is of type integer: expected a whole number such as 42",
        "line 8: not UTF-8",
        "2 failed: lines that are no keys",
    ] {
        assert!(said(&warmed).contains(words), "{words}: {}", said(&warmed));
    }
    let app = world.app(CONFIG).await;
    let paths = ["7,2", "7,a%2Cb", "8,100%25"].map(|key| format!("/api/line/{key}"));
    app.until("warm", async |app| cached(app, paths.iter().cloned()).await == 3).await;

    let mut piped = Command::new(env!("CARGO_BIN_EXE_cache-aside"));
    let mut config_file = tempfile::NamedTempFile::with_suffix(".yaml").expect("a file can be made");
    config_file.write_all(config.as_bytes()).expect("it can be written");
    piped.args(["warm", "item", "--ids", "-", "--config"]).arg(config_file.path());
    let mut child = piped.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("it runs");
    child.stdin.take().expect("it is piped").write_all(b"1\n2\n03\n").expect("it can be written");
    let output = child.wait_with_output().expect("it ends");
    assert!(output.status.success() && said(&output).contains("item: 3 filled"), "{}", said(&output));
}

#[tokio::test]
async fn what_can_not_be_warmed_says_so() {
    let world = World::new(ROWS).await;
    let config = world.config(CONFIG);
    // Nobody has migrated.
    let bypassed = command(&config, &["warm", "item", "--all"]);
    assert_eq!(bypassed.status.code(), Some(1));
    assert!(said(&bypassed).contains("changes of item are not captured"), "{}", said(&bypassed));
    let unknown = command(&config, &["warm", "itme", "--all"]);
    assert_eq!(unknown.status.code(), Some(1));
    assert!(said(&unknown).contains("did you mean \"item\"?"), "{}", said(&unknown));
    let in_process = format!("database: {{ url: \"{}\" }}\n{CONFIG}", world.database.url);
    let memory = command(&in_process, &["warm", "item", "--all"]);
    assert_eq!(memory.status.code(), Some(1));
    assert!(said(&memory).contains("POST /admin/warm/item"), "{}", said(&memory));
    for usage in [
        &["warm", "item"][..],
        &["warm"],
        &["warm", "item", "--all", "--ids", "x"],
        &["warm", "item", "--all", "--rate", "-1"],
    ] {
        assert_eq!(command(&config, usage).status.code(), Some(2), "{usage:?}");
    }
    let no_file = command(&config, &["warm", "item", "--ids", "/no/such/file"]);
    assert_eq!(no_file.status.code(), Some(1));
    let nowhere = config.replace(&world.redis_url, "redis://127.0.0.1:1");
    migrate(&config);
    let no_cache = command(&nowhere, &["warm", "item", "--all"]);
    assert_eq!(no_cache.status.code(), Some(1));
    assert!(said(&no_cache).contains("it can't be used"), "{}", said(&no_cache));
}

#[tokio::test]
async fn an_interrupted_warm_ends_and_says_how_far_it_came() {
    let world = World::new(ROWS).await;
    let config = world.config(CONFIG);
    migrate(&config);
    let mut file = tempfile::NamedTempFile::with_suffix(".yaml").expect("a file can be made");
    file.write_all(config.as_bytes()).expect("it can be written");
    let mut warm = Command::new(env!("CARGO_BIN_EXE_cache-aside"));
    warm.args(["warm", "item", "--all", "--rate", "100", "--config"]).arg(file.path());
    let mut child = warm.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("it runs");
    let redis = redis_of(&world);
    let started = Instant::now();
    while keys(&redis, &world).await == 0 {
        assert!(started.elapsed() < PATIENCE, "it never filled anything");
    }
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().expect("kill runs").success());
    let status = child.wait().expect("it ends");
    let (mut out, mut err) = (String::new(), String::new());
    child.stdout.take().expect("it is piped").read_to_string(&mut out).expect("it is text");
    child.stderr.take().expect("it is piped").read_to_string(&mut err).expect("it is text");
    assert_eq!(status.code(), Some(1), "{out}{err}");
    assert!(out.contains(" filled, 0 already there") && err.contains("stopped before the end"), "{out}{err}");
    assert!(keys(&redis, &world).await < 2500, "{out}{err}");
}

#[tokio::test]
async fn a_warm_that_reads_from_a_silent_pipe_ends_when_it_is_told_to() {
    let world = World::new(ROWS).await;
    let config = world.config(CONFIG);
    migrate(&config);
    let dir = tempfile::tempdir().expect("a folder can be made");
    let (file, pipe) = (dir.path().join("config.yaml"), dir.path().join("ids"));
    std::fs::write(&file, &config).expect("it can be written");
    assert!(Command::new("mkfifo").arg(&pipe).status().expect("mkfifo runs").success());
    let mut warm = Command::new("setpriv");
    warm.args(["--pdeathsig", "KILL", env!("CARGO_BIN_EXE_cache-aside"), "warm", "item", "--config"]).arg(&file);
    warm.arg("--ids").arg(&pipe);
    let mut child = warm.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("it runs");
    // Both ways, so that this neither waits for the reader nor lets it see an end.
    let mut writer = std::fs::File::options().read(true).write(true).open(&pipe).expect("it is there");
    let ids: String = (1..=150).map(|id| format!("{id}\n")).collect();
    writer.write_all(ids.as_bytes()).expect("it fits");
    let (redis, started) = (redis_of(&world), Instant::now());
    while keys(&redis, &world).await < 100 {
        assert!(started.elapsed() < PATIENCE, "it never filled anything");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(Command::new("kill").args(["-TERM", &child.id().to_string()]).status().expect("kill runs").success());
    let started = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().expect("it is ours to wait for") {
            break status;
        }
        assert!(started.elapsed() < PATIENCE, "it never ended");
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    let (mut out, mut err) = (String::new(), String::new());
    child.stdout.take().expect("it is piped").read_to_string(&mut out).expect("it is text");
    child.stderr.take().expect("it is piped").read_to_string(&mut err).expect("it is text");
    assert_eq!(status.code(), Some(1), "{out}{err}");
    assert!(out.contains("item: 100 filled") && err.contains("stopped before the end"), "{out}{err}");
}

fn redis_of(world: &World) -> redis::Client {
    redis::Client::open(world.redis_url.as_str()).expect("the URL is sound")
}

/// How many items are in the cache.
async fn keys(client: &redis::Client, world: &World) -> usize {
    let mut connection = client.get_multiplexed_async_connection().await.expect("it is there");
    let found: Vec<String> = redis::cmd("KEYS")
        .arg(format!("{}item:*", world.prefix))
        .query_async(&mut connection)
        .await
        .expect("it answers");
    found.len()
}

/// The lines of a warm that was asked for.
async fn warmed(app: &App, resource: &str, body: &str) -> Vec<Value> {
    let reply = app.post(&format!("/admin/warm/{resource}"), body).await.expect(200);
    assert_eq!(reply.header("content-type"), "application/x-ndjson");
    assert!(reply.text.ends_with('\n'), "{reply:?}");
    reply
        .text
        .lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}")))
        .collect()
}

#[tokio::test]
async fn a_service_warms_itself_and_tells_how_it_goes() {
    let world = World::new(ROWS).await;
    let app = world.app(CONFIG).await;
    let lines = warmed(&app, "item", r#"{"keys":[1,"02",3,3,777777,99999999999],"rate":0}"#).await;
    let last = lines.last().expect("there is one");
    assert_eq!((&last["done"], &last["total"], &last["keys"]), (&true.into(), &6.into(), &6.into()), "{last}");
    assert_eq!((&last["filled"], &last["absent"], &last["failed"]), (&4.into(), &2.into(), &0.into()), "{last}");
    let composite = warmed(&app, "line", r#"{"keys":["7,2","7,a%2Cb",[8,"100%"]]}"#).await;
    assert_eq!(composite.last().expect("there is one")["filled"], 3);
    // A second and a half at this rate: a line in between, and the last.
    let lines = warmed(&app, "item", r#"{"all":true,"rate":2000}"#).await;
    let (first, last) = (&lines[0], &lines[lines.len() - 1]);
    assert!(lines.len() >= 2 && first["done"] == false && last["done"] == true, "{lines:?}");
    // A fill that was not answered in time is found to be there when it is tried again.
    let (filled, present) = (last["filled"].as_u64().unwrap_or(0), last["present"].as_u64().unwrap_or(0));
    assert!(filled + present == 2500 && present >= 3 && last["failed"] == 0, "{last}");
    app.until("warm", async |app| cached(app, (1..=2500).step_by(83).map(|id| format!("/api/item/{id}"))).await == 31)
        .await;
    // A warm is no request: the ratio is that of readers.
    let text = app.get("/metrics").await.text;
    assert!(text.contains(r#"cache_aside_requests_total{resource="item",result="miss",tier="database"} 0"#), "{text}");
    // With the four of the first wish.
    let counted = format!("cache_aside_warmed_keys_total{{outcome=\"filled\",resource=\"item\"}} {}", filled + 4);
    assert!(text.contains(&counted), "{counted}: {text}");
    let none = warmed(&app, "item", r#"{"keys":[]}"#).await;
    assert_eq!(none.last().expect("there is one")["done"], true);
}

#[tokio::test]
async fn a_body_of_very_many_keys_takes_little_memory() {
    let world = World::new(ROWS).await;
    let app = world.app(CONFIG).await;
    warmed(&app, "item", r#"{"keys":[1]}"#).await;
    let before = app.memory_peak();
    // As many as fit into a megabyte.
    let body = format!(r#"{{"keys":[{}7]}}"#, "7,".repeat(500_000));
    let request = app.client.post(format!("{}/admin/warm/item", app.url)).header("content-type", "application/json");
    let mut response = request.body(body).send().await.expect("it answers");
    let first = response.chunk().await.expect("it arrives").expect("there is a line");
    let line: Value = serde_json::from_slice(&first).expect("it is JSON");
    assert_eq!(line["total"], 500_001, "{line}");
    let grown = (app.memory_peak() - before) >> 20;
    assert!(grown < 40, "{grown} MiB: the whole body as rows takes more than a hundred");
}

#[tokio::test]
async fn what_is_hot_at_a_replica_is_warmed_again_after_a_purge() {
    let world = World::new(ROWS).await;
    let app = world.app(CONFIG).await;
    let none = warmed(&app, "line", r#"{"hot":true}"#).await;
    assert_eq!(none.last().expect("there is one")["total"], 0);
    app.until("known to be read", async |app| {
        for key in ["7,a%2Cb", "8,100%25"] {
            app.get(&format!("/api/line/{key}")).await.expect(200);
        }
        app.get("/api/item/7").await.expect(200);
        let top = app.get("/admin/top").await.json();
        top["hot"].as_array().is_some_and(|hot| hot.len() == 3)
    })
    .await;
    app.delete("/admin/cache/line").await.expect(204);
    let lines = warmed(&app, "line", r#"{"hot":true}"#).await;
    let last = lines.last().expect("there is one");
    assert_eq!((&last["done"], &last["filled"]), (&true.into(), &2.into()), "{last}");
}

#[tokio::test]
async fn malformed_wishes_are_refused_with_a_word_on_what_is_wrong() {
    let world = World::new(ROWS).await;
    let app = world.app(&format!(
        "{CONFIG}access: {{ admin: token, tokens: [{{ name: t, sha256: \"{}\", scopes: [admin] }}, {{ name: r, sha256: \"{}\", scopes: [read] }}] }}\nserver: {{ listen: \"127.0.0.1:0\", drain_delay: 0s, max_body: 2KiB }}\n",
        "2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b", // "secret"
        "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb", // "a"
    ))
    .await;
    let ask = async |path: &str, body: &str| {
        app.ask(Method::POST, path).header("authorization", "Bearer secret").json(body).send().await
    };
    for (body, words) in [
        ("", "the body is not as expected"),
        ("[]", "the body is not as expected"),
        ("{}", "say which rows"),
        (r#"{"all":false}"#, "say which rows"),
        (r#"{"all":true,"keys":[1]}"#, "say which rows"),
        (r#"{"hot":true,"all":true}"#, "say which rows"),
        (r#"{"al":true}"#, "al"),
        (r#"{"all":true,"rate":-1}"#, "rate"),
        (r#"{"keys":7}"#, "the body is not as expected"),
        (r#"{"keys":[1,"x"]}"#, "keys[1]: id is of type integer"),
        (r#"{"keys":[null]}"#, "keys[0]: expected a text or a number"),
        (r#"{"keys":[[1,2]]}"#, "keys[0]: the key has 1 part, 2 came"),
        (r#"{"keys":[{"id":1}]}"#, "keys[0]: expected a text or a number"),
    ] {
        let reply = ask("/admin/warm/item", body).await.expect(400);
        let detail = reply.json()["detail"].as_str().unwrap_or_default().to_owned();
        assert!(detail.contains(words), "{body}: {detail}");
    }
    ask("/admin/warm/itme", r#"{"all":true}"#).await.expect(404);
    ask("/admin/warm/item/1", r#"{"all":true}"#).await.expect(404);
    ask("/admin/warm/item", &format!(r#"{{"keys":[{}1]}}"#, "1,".repeat(2000))).await.expect(413);
    let get = app.ask(Method::GET, "/admin/warm/item").header("authorization", "Bearer secret").send().await;
    assert_eq!(get.expect(405).header("allow"), "POST");
    app.post("/admin/warm/item", r#"{"all":true}"#).await.expect(401);
    let lacking = app.ask(Method::POST, "/admin/warm/item").header("authorization", "Bearer a").json("{}").send().await;
    lacking.expect(403);
}

#[tokio::test]
async fn one_warm_at_a_time_and_none_for_a_client_that_hung_up() {
    let world = World::new(ROWS).await;
    let app = world.app(CONFIG).await;
    let slow = r#"{"all":true,"rate":100}"#;
    let begin = || app.ask(Method::POST, "/admin/warm/item").json(slow);
    let request = app.client.post(format!("{}/admin/warm/item", app.url));
    let mut response = request.header("content-type", "application/json").body(slow).send().await.expect("it answers");
    let first = response.chunk().await.expect("it arrives").expect("there is a line");
    assert!(first.starts_with(b"{\"absent\":0"), "{first:?}");
    begin().send().await.expect(409);
    // Another resource is another matter.
    warmed(&app, "line", r#"{"all":true}"#).await;
    drop(response);
    // Its place is free again once the service has noticed.
    app.until("free again", async |app| {
        let again = app.post("/admin/warm/item", r#"{"keys":[1]}"#).await;
        again.status == 200
    })
    .await;
    let before = app.metric("cache_aside_warmed_keys_total{outcome=\"filled\",resource=\"item\"}").await;
    assert!(before < 2500, "{before}");
}

#[tokio::test]
async fn a_warm_is_stopped_when_the_service_is_and_says_so() {
    let world = World::new(ROWS).await;
    let mut app = world.app(CONFIG).await;
    let request = app.client.post(format!("{}/admin/warm/item", app.url)).header("content-type", "application/json");
    let mut response = request.body(r#"{"all":true,"rate":100}"#).send().await.expect("it answers");
    response.chunk().await.expect("it arrives").expect("there is a line");
    app.signal("TERM");
    let mut rest = Vec::new();
    while let Some(some) = response.chunk().await.expect("the answer arrives whole") {
        rest.extend_from_slice(&some);
    }
    let rest = String::from_utf8(rest).expect("it is text");
    let last: Value = serde_json::from_str(rest.lines().last().expect("there is one")).expect("it is JSON");
    assert_eq!((&last["done"], &last["stopped"]), (&false.into(), &"the service is stopping".into()), "{rest}");
    assert_eq!(app.ended().await.code(), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn readers_go_first() {
    // Each row takes a while, and three of four connections are for readers.
    let world = World::new(
        "CREATE TABLE item (id int PRIMARY KEY); INSERT INTO item SELECT generate_series(1, 5000);
         CREATE FUNCTION slow() RETURNS int LANGUAGE plpgsql VOLATILE AS $$ BEGIN PERFORM pg_sleep(0.005); RETURN 0; END $$;
         CREATE VIEW slow_item AS SELECT id, slow() AS waited FROM item;",
    )
    .await;
    let config = world
        .config("resources: { slow_item: { key: id } }\n")
        .replace("database: {", "database: { pool_size: 4, queue: 2,");
    let app = App::start(&config).await;
    let warming = {
        let request = app.client.post(format!("{}/admin/warm/slow_item", app.url));
        let keys: Vec<String> = (1..=2000).map(|id| id.to_string()).collect();
        let body = format!(r#"{{"rate":0,"keys":[{}]}}"#, keys.join(","));
        request.header("content-type", "application/json").body(body).send().await.expect("it answers")
    };
    assert_eq!(warming.status(), 200);
    app.until("at work", async |app| {
        app.metric("cache_aside_warmed_keys_total{outcome=\"filled\",resource=\"slow_item\"}").await > 0
    })
    .await;
    let client = world.database.client().await;
    let mut most = 0;
    for id in 4001..4060 {
        // Nothing of what readers ask for is refused: there is always a place for them.
        let path = format!("/api/slow_item/{id}");
        let busy =
            "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep' AND datname = current_database()";
        let (one, row) = tokio::join!(app.get(&path), client.query_one(busy, &[]));
        one.expect(200);
        most = most.max(row.expect("it answers").get::<_, i64>(0));
    }
    assert!(most <= 2, "{most}: a reader's and the one that is shared by all that is warmed");
    assert_eq!(app.metric("cache_aside_errors_total{component=\"store\"").await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_warm_beside_writers_leaves_nothing_stale() {
    let world = World::new(ROWS).await;
    let app = world.app(CONFIG).await;
    let writer = async {
        let client = world.database.client().await;
        for round in 0..40 {
            let sql = format!("UPDATE item SET v = v + 1 WHERE id % 40 = {round}");
            client.batch_execute(&sql).await.expect("the statement is sound");
        }
    };
    let (lines, ()) = tokio::join!(warmed(&app, "item", r#"{"all":true,"rate":0}"#), writer);
    assert_eq!(lines.last().expect("there is one")["done"], true, "{lines:?}");
    app.until("as the database has them", async |app| {
        for id in (1..=2500).step_by(11) {
            let reply = app.get(&format!("/api/item/{id}")).await.expect(200);
            if reply.json()["data"]["v"] != id + 1 {
                return false;
            }
        }
        true
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tables_of_mariadb_are_warmed_too() {
    let database = Mariadb::shared().await.create_database().await;
    database
        .sql("CREATE TABLE line (ord int, code varchar(20) COLLATE utf8mb4_bin, PRIMARY KEY (ord, code)); INSERT INTO line VALUES (1, 'b'), (1, 'a'), (2, 'x,y')")
        .await;
    let redis = Redis::shared().await.url();
    let config = format!(
        "database: {{ url: \"{}\" }}\ncache: {{ url: \"{redis}\", key_prefix: \"{}:\" }}\nresources: {{ line: {{}} }}\n",
        database.url,
        database.url.rsplit('/').next().expect("it has a name")
    );
    migrate(&config);
    let warmed = command(&config, &["warm", "line", "--all"]);
    assert!(warmed.status.success() && said(&warmed).contains("line: 3 filled"), "{}", said(&warmed));
    let again = command(&config, &["warm", "line", "--all"]);
    assert!(said(&again).contains("0 filled, 3 already there"), "{}", said(&again));
}
