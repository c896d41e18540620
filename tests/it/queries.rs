//! Results of statements: declared ones by name, and those that somebody makes up.

use std::process::Command;

use crate::app::{App, Reply, World, command};
use crate::invalidation::{SCHEMA, seen, warm};

const QUERIES: &str = "resources: { item: { write: [update] } }
queries:
  team:
    sql: SELECT i.id, i.v, t.name FROM item i JOIN team t ON t.id = i.team_id WHERE t.id = $1 ORDER BY i.id LIMIT $2
    params: [team, { name: limit, default: '2' }]
    depends_on: [item, team]
  some:
    sql: SELECT id, 'a  b' AS text FROM item WHERE id = ANY ($1) ORDER BY array_position($1, id) -- in the order asked
    params: [ids]
  maybe:
    sql: SELECT $1::text IS NULL AS absent, $1::text AS text
    params: [text]
  many:
    sql: SELECT g FROM generate_series(1, 20000) g
";

fn status(reply: &Reply) -> String {
    reply.header("cache-status").to_owned()
}

#[tokio::test]
async fn a_declared_statement_is_served_by_name_and_dropped_when_its_tables_change() {
    depends(World::new(SCHEMA).await).await;
}

pub async fn depends(world: World) {
    let (one, two) = (world.app(QUERIES).await, world.app(QUERIES).await);
    let path = "/api/queries/team?team=2";
    let first = one.get(path).await.expect(200);
    assert_eq!(first.data(), r#"[{"id":1,"v":0,"name":"team 2"},{"id":3,"v":0,"name":"team 2"}]"#);
    warm(&[&two], &[path]).await;
    let second = two.get(path).await.expect(200);
    assert_eq!((second.source().as_str(), second.data()), ("cache", first.data()));
    // Who joined them is known.
    world.sql("UPDATE team SET name = 'renamed' WHERE id = 2").await;
    seen(&[&one, &two], path, "renamed").await;
    warm(&[&one, &two], &[path]).await;
    one.patch("/api/item/3", r#"{"v":7}"#).await.expect(200);
    assert!(two.get(path).await.text.contains(r#"{"id":3,"v":7"#), "a write through the API is seen at once");
    world.sql("TRUNCATE item").await;
    seen(&[&one, &two], path, r#"{"data":[]"#).await;
    let metrics = one.get("/metrics").await.text;
    assert!(metrics.contains(r#"cache_aside_requests_total{resource="query:team",result="hit""#), "{metrics}");
    assert!(one.get("/readyz?verbose").await.text.contains("query team: served"));
    assert!(one.get("/metrics").await.text.contains(r#"cache_aside_capture_complete{resource="query:team"} 1"#));
}

#[tokio::test]
async fn parameters_are_what_the_database_takes_them_for() {
    let world = World::new(SCHEMA).await;
    let app = world.app(QUERIES).await;
    let data = async |path: &str| app.get(path).await.expect(200).data().to_owned();
    assert_eq!(data("/api/queries/team?team=2&limit=1").await, r#"[{"id":1,"v":0,"name":"team 2"}]"#);
    for ids in ["ids=3,1", "ids=3&ids=1", "ids={3,1}", "ids=%7B3%2C1%7D"] {
        let expected = r#"[{"id":3,"text":"a  b"},{"id":1,"text":"a  b"}]"#;
        assert_eq!(data(&format!("/api/queries/some?{ids}")).await, expected, "{ids}");
    }
    assert_eq!(data("/api/queries/maybe?text").await, r#"[{"absent":true,"text":null}]"#);
    assert_eq!(data("/api/queries/maybe?text=").await, r#"[{"absent":false,"text":""}]"#);
    let odd = data("/api/queries/maybe?text=%27%3B+DROP+TABLE+item%3B--%F0%9F%A6%80").await;
    assert_eq!(odd, r#"[{"absent":false,"text":"'; DROP TABLE item;--🦀"}]"#);
    let many = app.get("/api/queries/many").await.expect(200);
    assert!(many.text.contains(r#"{"g":10000}],"truncated":true"#) && !many.text.contains("10001"));
    for (path, expected) in [
        ("/api/queries/team", "say team="),
        ("/api/queries/team?team=x", "can't read the value"),
        ("/api/queries/team?team=1&page=2", "there is no parameter \\\"page\\\"; use team, limit"),
        ("/api/queries/many?x=1", "it takes none"),
        ("/api/queries/maybe?text=%00", "NUL"),
        ("/api/queries/maybe?text=%ff", "UTF-8"),
    ] {
        let reply = app.get(path).await.expect(400);
        assert!(reply.text.contains(expected), "{path}: {reply:?}");
    }
    app.get("/api/queries/other").await.expect(404);
    let refused = app.post("/api/queries/team", "{}").await.expect(405);
    assert_eq!(refused.header("allow"), "GET, HEAD");
    // Dropped one by one, or all.
    let (a, b) = ("/api/queries/maybe?text=a", "/api/queries/maybe?text=b");
    warm(&[&app], &[a, b]).await;
    app.delete("/admin/cache/queries/maybe?text=a").await.expect(204);
    assert_eq!((app.get(a).await.source(), app.get(b).await.source()), ("database".into(), "cache".into()));
    app.delete("/admin/cache/queries/maybe").await.expect(204);
    app.until("dropped", async |app| app.get(b).await.source() == "database").await;
}

#[tokio::test]
async fn what_is_wrong_with_a_statement_is_said_before_anybody_asks() {
    let world = World::new(SCHEMA).await;
    let config = world.config(
        "queries:
  fine: { sql: 'SELECT * FROM board WHERE v = $1', params: [v], depends_on: [item] }
  lacking: { sql: 'SELECT nothing FROM item' }
  few: { sql: 'SELECT $1::int + $2::int', params: [a] }
  writes: { sql: 'DELETE FROM item RETURNING id' }
",
    );
    let check = command(&config, &["check"]);
    let said = String::from_utf8_lossy(&check.stdout).into_owned();
    for words in [
        "ok       query fine: the statement can be run",
        "warning  query fine: it also reads \"public\".\"team\"; name them with depends_on:",
        "error    query lacking: the statement can't be run: column \"nothing\" does not exist",
        "error    query few: the statement takes 2 parameters, and params: names 1",
        "error    query writes: ",
    ] {
        assert!(said.contains(words), "{words}: {said}");
    }
    assert_eq!(check.status.code(), Some(1));
    let app = App::launch(&config).await;
    app.until("looked at", async |app| app.get("/readyz?verbose").await.text.contains("query fine: served")).await;
    app.get("/api/queries/few?a=1").await.expect(503);
}

fn ad_hoc(sql: &str, more: &str) -> String {
    format!("{{\"sql\":{}{more}}}", serde_json::Value::from(sql))
}

const OPEN: &str =
    "access: { write: public, refresh: public, admin: public, adhoc_queries: public }\nresources: { item: {} }\n";

#[tokio::test]
async fn anything_that_reads_can_be_asked_where_that_is_allowed() {
    let world = World::trusting(SCHEMA).await;
    let app = world.app(OPEN).await;
    let ask = async |body: String| app.post("/api/query", &body).await;
    let sql = "SELECT id, v FROM item WHERE id = $1 OR team_id = ANY ($2::int[]) ORDER BY id LIMIT 2";
    let body = ad_hoc(sql, r#","params":[7,[3,null]],"ttl":"5m""#);
    let miss = ask(body.clone()).await.expect(200);
    assert_eq!((miss.data(), miss.source().as_str()), (r#"[{"id":7,"v":0}]"#, "database"));
    let hit = ask(body.clone()).await.expect(200);
    assert_eq!(hit.source(), "cache");
    let ttl: u32 =
        status(&hit).split("ttl=").nth(1).and_then(|rest| rest.split(';').next()?.parse().ok()).expect("a ttl");
    assert!((200..=300).contains(&ttl), "{hit:?}");
    // A shorter life is not answered out of a longer one.
    assert_eq!(ask(body.replace("5m", "4m")).await.source(), "database");
    assert_eq!(ask(body.clone()).await.source(), "cache", "the young one stays");
    // Written otherwise, the same; with other parameters, not.
    assert_eq!(
        ask(ad_hoc(&format!(" {}\n;", sql.replace(' ', "  ")), r#","params":[7,[3,null]],"ttl":"5m""#)).await.source(),
        "cache"
    );
    assert_eq!(ask(ad_hoc(sql, r#","params":["8",[3,null]]"#)).await.source(), "database");
    let refreshed = ask(ad_hoc(sql, r#","params":[7,[3,null]],"ttl":"5m","refresh":true"#)).await.expect(200);
    assert!(status(&refreshed).contains("fwd=request"), "{refreshed:?}");
    app.ask(reqwest::Method::DELETE, "/admin/cache/query").json(&body).send().await.expect(204);
    assert_eq!(ask(body).await.source(), "database");
    for (body, expected) in [
        (ad_hoc("DELETE FROM item", ""), "syntax error"),
        (ad_hoc("WITH gone AS (DELETE FROM item RETURNING id) SELECT * FROM gone", ""), "data-modifying"),
        (ad_hoc("SELECT 1) x; DELETE FROM item; SELECT (1", ""), "syntax error"),
        (ad_hoc("SELECT 1) x) y; DELETE FROM item; SELECT '' AS json FROM (SELECT (SELECT 1", ""), "multiple commands"),
        (ad_hoc("SELECT 1; SELECT 2", ""), "syntax error"),
        (ad_hoc("SELECT id FROM item FOR UPDATE", ""), "read-only transaction"),
        (ad_hoc("SELECT * FROM item WHERE id = $1", ""), "takes 1 parameters, and 0 were given"),
        (ad_hoc("SELECT nothing FROM item", ""), "does not exist"),
        (ad_hoc("SELECT 1/0", ""), "division by zero"),
        (ad_hoc("", ""), "sql is empty"),
        (ad_hoc("SELECT 1", r#","ttl":"soon""#), "ttl"),
        (ad_hoc("SELECT 1", r#","ttl":"0s""#), "ttl"),
        (ad_hoc("SELECT 1", r#","more":1"#), "unknown field"),
        (ad_hoc("SELECT 1", &format!(r#","params":[{}{}]"#, "[".repeat(100_000), "]".repeat(100_000))), "dimensions"),
        ("[".to_owned(), "the body is not as expected"),
    ] {
        let reply = ask(body.clone()).await.expect(400);
        assert!(reply.text.contains(expected), "{body}: {reply:?}");
    }
    assert_eq!(world.text("SELECT count(*)::text FROM item").await, "100");
    assert_eq!(ask(ad_hoc("SELECT 1 AS one -- and no more", "")).await.data(), r#"[{"one":1}]"#);
    app.get("/api/query").await.expect(405);
    let large = ask(ad_hoc("SELECT repeat('x', 1000000) AS x FROM generate_series(1, 100)", "")).await.expect(200);
    let huge = ask(ad_hoc("SELECT repeat('x', 20000000) AS x", "")).await.expect(200);
    assert!(huge.text.starts_with(r#"{"data":[],"truncated":true"#), "{}", huge.text.len());
    let locked = ask(ad_hoc("SELECT pg_advisory_lock(42)::text AS locked", "")).await.expect(200);
    assert_eq!(locked.source(), "database");
    assert_eq!(world.text("SELECT count(*)::text FROM pg_locks WHERE locktype = 'advisory' AND objid = 42").await, "0");
    assert!(large.text.contains(r#""truncated":true"#) && large.text.len() < 20_000_000, "{}", large.text.len());
}

#[tokio::test]
async fn a_statement_that_takes_too_long_is_stopped_in_the_database() {
    let world = World::new(SCHEMA).await;
    let config = world.config(OPEN).replace("database: {", "database: { statement_timeout: 300ms,");
    let app = App::start(&config).await;
    app.post("/api/query", &ad_hoc("SELECT pg_sleep(20)", "")).await.expect(504);
    world
        .until(
            "SELECT NOT EXISTS (SELECT FROM pg_stat_activity WHERE query LIKE '%pg_sleep(20)%' AND state = 'active' \
                AND pid <> pg_backend_pid() AND datname = current_database())",
        )
        .await;
}

#[tokio::test]
async fn asking_takes_its_own_scope() {
    let world = World::new(SCHEMA).await;
    let sha256 = |text: &str| {
        let digest = Command::new("sh").args(["-c", "printf %s \"$0\" | sha256sum", text]).output().expect("it runs");
        String::from_utf8_lossy(&digest.stdout).split(' ').next().expect("a digest").to_owned()
    };
    let tokens = format!(
        "tokens: [ {{ name: reader, sha256: {}, scopes: [read] }}, {{ name: asker, sha256: {}, scopes: [query] }} ]",
        sha256("reader"),
        sha256("asker")
    );
    let app = world.app(&format!("access: {{ adhoc_queries: token, {tokens} }}\nresources: {{ item: {{}} }}\n")).await;
    let ask = async |token: &str| {
        let ask = app.ask(reqwest::Method::POST, "/api/query").json(&ad_hoc("SELECT 1", ""));
        ask.header("authorization", &format!("Bearer {token}")).send().await.status.as_u16()
    };
    assert_eq!((ask("asker").await, ask("reader").await, ask("nobody").await), (200, 403, 401));
    app.post("/api/query", &ad_hoc("SELECT 1", "")).await.expect(401);
    let off = world.app("resources: { item: {} }\n").await;
    off.post("/api/query", &ad_hoc("SELECT 1", "")).await.expect(403);
}

#[tokio::test]
async fn the_demo_can_be_asked_anything_too() {
    let dir = tempfile::tempdir().expect("a folder can be made");
    let mut demo = Command::new(env!("CARGO_BIN_EXE_cache-aside"));
    demo.env("CACHE_ASIDE__SERVER__LISTEN", "127.0.0.1:0");
    let app = App::spawn(demo, dir).await;
    app.until("ready", async |app| app.get("/readyz").await.status == 200).await;
    let declared = app.get("/api/queries/airline?airline_id=1").await.expect(200);
    assert_eq!(declared.source(), "database");
    assert_eq!(app.get("/api/queries/airline?airline_id=1").await.data(), declared.data());
    let body = ad_hoc("SELECT * FROM airline WHERE airline_id = $1", r#","params":[1]"#);
    let sources = async |body: &str| app.post("/api/query", body).await.expect(200).source();
    assert_eq!((sources(&body).await, sources(&body).await), ("database".into(), "cache".into()));
    assert_eq!(app.post("/api/query", &body).await.data(), declared.data());
    assert_eq!(sources(&body.replace('}', r#","refresh":true}"#)).await, "database");
    assert_eq!(sources(&body).await, "cache");
    app.ask(reqwest::Method::DELETE, "/admin/cache/query").json(&body).send().await.expect(204);
    assert_eq!(sources(&body).await, "database");
    // What docs/walkthrough.md has in store.
    let docs = include_str!("../../docs/walkthrough.md");
    for name in ["simple='", "medium='", "advanced='"] {
        let body = docs.lines().find_map(|line| line.strip_prefix(name)?.strip_suffix('\'')).expect("the docs have it");
        let first = app.post("/api/query", body).await.expect(200);
        assert!(first.data().starts_with("[{"), "{first:?}");
        assert_eq!(sources(body).await, "cache");
        assert_eq!(sources(&format!("{},\"refresh\":true}}", &body[..body.len() - 1])).await, "database");
        app.ask(reqwest::Method::DELETE, "/admin/cache/query").json(body).send().await.expect(204);
        assert_eq!(sources(body).await, "database");
    }
    for sql in ["DELETE FROM airline", "SELECT 1; SELECT 2", "PRAGMA query_only", "SELECT nothing", "ATTACH 'x' AS y"] {
        app.post("/api/query", &ad_hoc(sql, "")).await.expect(400);
    }
    let typed =
        app.post("/api/query", &ad_hoc("SELECT 1.5 AS r, NULL AS n, 'x' AS t, $1 AS p", r#","params":["a"]"#)).await;
    assert_eq!(typed.data(), r#"[{"r":1.5,"n":null,"t":"x","p":"a"}]"#);
}
