//! MariaDB behind the service, and what is different there: types, keys, triggers that cascades don't fire, and a history
//! whose ids become visible in any order.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use cache_aside::app::open_store;
use cache_aside::config::{Config, Env};
use cache_aside::store::{AnyFeed, StoreError};
use mysql_async::prelude::Queryable;
use mysql_async::{Conn, Error};
use serde_json::value::RawValue;

use crate::app::{App, PATIENCE, command};
use crate::breakers::{far_away, ping, until};
use crate::faults::Proxy;
use crate::invalidation::{seen, warm};
use crate::overload::get;
use crate::servers::{Mariadb, MariadbDatabase, Redis};

/// A database and a key prefix of a test's own.
struct World {
    database: MariadbDatabase,
    redis_url: String,
    prefix: String,
}

impl World {
    async fn new(schema: &str) -> Self {
        Self::on(Mariadb::shared().await, schema).await
    }

    async fn on(server: &Mariadb, schema: &str) -> Self {
        static PREFIXES: AtomicU64 = AtomicU64::new(1);
        let database = server.create_database().await;
        database.sql(schema).await;
        let prefix = format!("m{}-{}:", std::process::id(), PREFIXES.fetch_add(1, Ordering::Relaxed));
        Self { database, redis_url: Redis::shared().await.url(), prefix }
    }

    fn config(&self, rest: &str) -> String {
        self.config_with("", rest)
    }

    /// A configuration with further keys for the database.
    fn config_with(&self, database: &str, rest: &str) -> String {
        let access = if rest.contains("access:") {
            ""
        } else {
            "access: { write: public, refresh: public, admin: public, adhoc_queries: public }\n"
        };
        format!(
            "database: {{ url: \"{}\"{database} }}\ncache: {{ url: \"{}\", key_prefix: \"{}\" }}\n{access}{rest}",
            self.database.url, self.redis_url, self.prefix
        )
    }

    async fn app(&self, rest: &str) -> App {
        App::start(&self.config(rest)).await
    }

    async fn sql(&self, sql: &str) {
        self.database.sql(sql).await;
    }

    async fn number(&self, sql: &str) -> i64 {
        self.database.client().await.query_first(sql).await.expect("it is sound").expect("one row comes")
    }

    /// Waits until a query gives a number other than 0.
    async fn until(&self, sql: &str) {
        let started = Instant::now();
        while self.number(sql).await == 0 {
            assert!(started.elapsed() < PATIENCE, "never true: {sql}");
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    }
}

async fn run(conn: &mut Conn, sql: &str) {
    conn.query_drop(sql).await.unwrap_or_else(|error| panic!("{error}: {sql}"));
}

#[tokio::test]
async fn every_type_is_written_byte_for_byte() {
    let columns = "
        id INT PRIMARY KEY, t TINYINT, b BOOLEAN, b5 TINYINT(1), u8 TINYINT UNSIGNED, m MEDIUMINT, z INT(6) ZEROFILL,
        big BIGINT, ubig BIGINT UNSIGNED, d DECIMAL(65,30), dz DECIMAL(8,2) ZEROFILL, f FLOAT, f2 FLOAT, g DOUBLE, g2 DOUBLE,
        bit1 BIT, bit9 BIT(9), y YEAR, da DATE, dt DATETIME, dt6 DATETIME(6), dt3 DATETIME(3), ts TIMESTAMP(6) NULL, ti TIME,
        ti3 TIME(3), neg TIME, c CHAR(5), v VARCHAR(20), latin VARCHAR(20) CHARACTER SET latin1, txt TEXT,
        bi BINARY(3), vb VARBINARY(5), bl BLOB, e ENUM('a','b''c'), s SET('x','y','z'), j JSON, j2 JSON, uu UUID, ip INET6,
        zero DATE, zerot DATETIME, partial DATE, vgen INT AS (id + 1), nul VARCHAR(5)";
    let schema = format!(
        "SET sql_mode = ''; CREATE TABLE one ({columns}); SET NAMES utf8mb4; SET time_zone = '+05:00'; INSERT INTO one
         (id, t, b, b5, u8, m, z, big, ubig, d, dz, f, f2, g, g2, bit1, bit9, y, da, dt, dt6, dt3, ts, ti, ti3, neg, c, v, latin, txt,
          bi, vb, bl, e, s, j, j2, uu, ip, zero, zerot, partial, nul) VALUES
         (1, -128, TRUE, 5, 255, -8388608, 42, -9223372036854775808, 18446744073709551615,
          '12345678901234567890123456789012345.123456789012345678901234567890', 7.5, 0.1, 1234567, 0.1, 1e300,
          b'1', b'100000011', 2024, '2024-02-29', '2024-02-29 10:20:30', '2024-02-29 10:20:30.120000', '2024-02-29 10:20:30.5',
          '2024-02-29 10:20:30.000001', '10:20:30', '10:20:30.250', '-838:59:59', 'ab  ', 'ab  ', 'Größe', 'quote\" \\\\ \\n 🙂',
          'a', X'00ff', X'', 'b''c', 'z,x', '{{\"b\": [1, 2.50, 1e2], \"a\":null}}', '\"text\"',
          '0195F1C6-7C00-7D1E-B1A5-0B6F2F0E8F11', '::1', '0000-00-00', '0000-00-00 00:00:00', '2024-00-00', NULL)"
    );
    let world = World::new(&schema).await;
    let app = world
        .app("resources: { one: { write: [create, update] } }\nqueries: { all: { sql: \"SELECT * FROM one ORDER BY id\" } }\n")
        .await;
    let expected = concat!(
        r#"{"id":1,"t":-128,"b":true,"b5":5,"u8":255,"m":-8388608,"z":42,"big":-9223372036854775808,"#,
        r#""ubig":18446744073709551615,"d":12345678901234567890123456789012345.123456789012345678901234567890,"#,
        r#""dz":7.50,"f":0.1,"f2":1.234567e+06,"g":0.1,"g2":1e+300,"bit1":"1","bit9":"100000011","y":2024,"#,
        r#""da":"2024-02-29","dt":"2024-02-29T10:20:30","dt6":"2024-02-29T10:20:30.12","dt3":"2024-02-29T10:20:30.5","#,
        r#""ts":"2024-02-29T05:20:30.000001+00:00","ti":"10:20:30","ti3":"10:20:30.25","neg":"-838:59:59","#,
        r#""c":"ab","v":"ab  ","latin":"Größe","txt":"quote\" \\ \n 🙂","bi":"\\x610000","vb":"\\x00ff","bl":"\\x","#,
        r#""e":"b'c","s":"x,z","j":{"b": [1, 2.50, 1e2], "a":null},"j2":"text","#,
        r#""uu":"0195f1c6-7c00-7d1e-b1a5-0b6f2f0e8f11","ip":"::1","zero":"0000-00-00","zerot":"0000-00-00T00:00:00","#,
        r#""partial":"2024-00-00","vgen":2,"nul":null}"#
    );
    assert_eq!(app.get("/api/one/1").await.expect(200).data(), expected);
    warm(&[&app], &["/api/one/1"]).await;
    let hit = app.get("/api/one/1").await.expect(200);
    assert_eq!((hit.source().as_str(), hit.data()), ("cache", expected));
    // Here the server's own description of a result leads, which knows no documents.
    let told = app.get("/api/queries/all").await.expect(200);
    let text = |json: &str| serde_json::Value::from(json).to_string();
    let as_told = expected
        .replace(r#"{"b": [1, 2.50, 1e2], "a":null}"#, &text(r#"{"b": [1, 2.50, 1e2], "a":null}"#))
        .replace(r#""j2":"text""#, &format!(r#""j2":{}"#, text("\"text\"")));
    assert_eq!(told.data(), format!("[{as_told}]"));

    // What was read can be written again, and comes back as it was.
    let mut row: std::collections::BTreeMap<String, Box<RawValue>> =
        serde_json::from_str(expected).expect("it is a row");
    row.retain(|name, _| !["zero", "zerot", "partial", "vgen"].contains(&name.as_str()));
    row.insert("id".into(), serde_json::from_str("2").expect("it is JSON"));
    let body: Vec<String> = row.iter().map(|(name, value)| format!("\"{name}\":{value}")).collect();
    let created = app.post("/api/one", &format!("{{{}}}", body.join(","))).await.expect(201);
    let again = expected
        .replace("\"id\":1,", "\"id\":2,")
        .replace("\"vgen\":2", "\"vgen\":3")
        .replace("\"0000-00-00\"", "null")
        .replace("\"0000-00-00T00:00:00\"", "null")
        .replace("\"2024-00-00\"", "null");
    assert_eq!(created.text, format!("{{\"data\":{again}}}"));
}

const SCHEMA: &str = "
    CREATE TABLE team (id INT PRIMARY KEY, name TEXT);
    INSERT INTO team VALUES (1, 'team 1'), (2, 'team 2'), (3, 'team 3');
    CREATE TABLE item (id INT PRIMARY KEY, team_id INT, v INT NOT NULL DEFAULT 0,
        FOREIGN KEY (team_id) REFERENCES team (id) ON DELETE CASCADE ON UPDATE CASCADE);
    INSERT INTO item SELECT seq, 1 + seq % 2, 0 FROM seq_1_to_100;
    CREATE VIEW board AS SELECT i.id, i.v, t.name FROM item i JOIN team t ON t.id = i.team_id;";

const RESOURCES: &str = "resources: { item: { write: [create, update, delete], lists: { team_id: {} } }, \
                         team: { write: [update, delete] }, board: { key: id, depends_on: [item, team] } }\n";

#[tokio::test]
async fn every_kind_of_change_by_others_is_seen_at_every_replica() {
    let world = World::new(SCHEMA).await;
    let (one, two) = (world.app(RESOURCES).await, world.app(RESOURCES).await);
    let both = [&one, &two];
    let (row, absent, list, other, view) =
        ("/api/item/7", "/api/item/1007", "/api/item?team_id=2", "/api/item?team_id=3", "/api/board/7");
    let all = [row, absent, list, other, view, "/api/team/2"];
    warm(&both, &all).await;
    world.sql("UPDATE item SET v = 1 WHERE id = 7").await;
    for path in [row, list, view] {
        seen(&both, path, r#""v":1"#).await;
    }
    warm(&both, &all).await;
    world.sql("INSERT INTO item VALUES (1007, 2, 5)").await;
    seen(&both, absent, r#""v":5"#).await;
    seen(&both, list, r#"{"id":1007"#).await;
    warm(&both, &all).await;
    world.sql("UPDATE item SET team_id = 3 WHERE id = 1007").await;
    seen(&both, other, r#"{"id":1007"#).await;
    seen(&both, list, r#"{"id":99,"team_id":2,"v":0}]"#).await;
    warm(&both, &all).await;
    world.sql("UPDATE item SET id = 2007 WHERE id = 7").await;
    seen(&both, row, "Not Found").await;
    seen(&both, list, r#"{"id":2007"#).await;
    warm(&both, &all).await;
    world.sql("UPDATE team SET name = 'renamed' WHERE id = 2; DELETE FROM item WHERE id = 1007").await;
    seen(&both, "/api/team/2", "renamed").await;
    seen(&both, absent, "Not Found").await;
    warm(&both, &all).await;
    world.sql("REPLACE INTO item VALUES (7, 2, 8), (9, 2, 9)").await;
    seen(&both, view, "renamed").await;
    seen(&both, "/api/item/9", r#""v":9"#).await;
    warm(&both, &all).await;
    // Cascades fire no triggers: those of the parent tell.
    world.sql("UPDATE team SET id = 20 WHERE id = 2").await;
    seen(&both, row, r#""team_id":20"#).await;
    seen(&both, list, r#"{"data":[]"#).await;
    warm(&both, &all).await;
    world.sql("DELETE FROM team WHERE id = 20").await;
    seen(&both, row, "Not Found").await;
    seen(&both, view, "Not Found").await;
}

#[tokio::test]
async fn a_transaction_that_began_early_and_ends_late_is_seen_and_one_that_was_rolled_back_stops_nothing() {
    let world = World::new(SCHEMA).await;
    let app = world.app(RESOURCES).await;
    let (mut slow, mut undone) = (world.database.client().await, world.database.client().await);
    run(&mut slow, "START TRANSACTION; UPDATE item SET v = 1 WHERE id = 1").await;
    run(
        &mut undone,
        "START TRANSACTION; UPDATE item SET v = 9 WHERE id = 3; SAVEPOINT s; UPDATE item SET v = 9 WHERE id = 4",
    )
    .await;
    run(&mut slow, "SAVEPOINT s; UPDATE item SET v = 2 WHERE id = 2").await;
    // Later ones overtake it, so that a cursor over ids would have passed it by.
    for id in 10..20 {
        let path = format!("/api/item/{id}");
        warm(&[&app], &[&path, "/api/item/1", "/api/item/2", "/api/item/3", "/api/item/4"]).await;
        world.sql(&format!("UPDATE item SET v = 3 WHERE id = {id}")).await;
        seen(&[&app], &path, r#""v":3"#).await;
        if id == 12 {
            run(&mut undone, "ROLLBACK TO s; UPDATE item SET v = 8 WHERE id = 5; ROLLBACK").await;
        }
    }
    run(&mut slow, "COMMIT").await;
    seen(&[&app], "/api/item/1", r#""v":1"#).await;
    seen(&[&app], "/api/item/2", r#""v":2"#).await;
    seen(&[&app], "/api/item/3", r#""v":0"#).await;
    // A prepared transaction outlives its connection.
    let mut prepared = world.database.client().await;
    run(&mut prepared, "XA START 'a'; UPDATE item SET v = 4 WHERE id = 50; XA END 'a'; XA PREPARE 'a'").await;
    prepared.disconnect().await.expect("it can go");
    warm(&[&app], &["/api/item/50", "/api/item/51"]).await;
    world.sql("UPDATE item SET v = 3 WHERE id = 51").await;
    seen(&[&app], "/api/item/51", r#""v":3"#).await;
    world.sql("XA COMMIT 'a'").await;
    seen(&[&app], "/api/item/50", r#""v":4"#).await;
}

#[tokio::test]
async fn what_a_write_changes_by_cascades_and_triggers_is_new_at_once_at_another_replica() {
    let world = World::new(&format!(
        "{SCHEMA} CREATE TABLE tally (id INT PRIMARY KEY, n INT); INSERT INTO tally VALUES (1, 0);
         CREATE TRIGGER counting AFTER UPDATE ON item FOR EACH ROW UPDATE tally SET n = n + 1 WHERE id = 1;"
    ))
    .await;
    let resources = RESOURCES.replace("team: {", "tally: {}, team: {");
    let (one, two) = (world.app(&resources).await, world.app(&resources).await);
    let paths = ["/api/item/7", "/api/item?team_id=2", "/api/tally/1", "/api/board/7"];
    warm(&[&one, &two], &paths).await;
    let written = one.patch("/api/item/7", r#"{"v":41}"#).await.expect(200);
    assert!(!written.header("cache-status").contains("pending"), "{written:?}");
    for (path, expected) in paths.iter().zip([r#""v":41"#, r#""v":41"#, r#""n":1"#, r#""v":41"#]) {
        let reply = two.get(path).await;
        assert!(reply.text.contains(expected), "{path}: {reply:?}");
    }
    // A whole resource takes a moment, and the answer says so.
    let deleted = one.delete("/api/team/2").await.expect(204);
    assert!(deleted.header("cache-status").contains("invalidation-pending"), "{deleted:?}");
    seen(&[&one, &two], "/api/item/7", "Not Found").await;
}

#[tokio::test]
async fn writes_are_judged_by_the_database_and_refusals_name_the_column() {
    let world = World::new(
        "CREATE TABLE made (id INT AUTO_INCREMENT PRIMARY KEY, name VARCHAR(10) NOT NULL, n TINYINT, price DECIMAL(6,2) DEFAULT 1.5,
           born DATE DEFAULT '2000-01-01', flags SET('a','b'), kind ENUM('x','1'), UNIQUE KEY by_name (name),
           at TIMESTAMP(6) NOT NULL DEFAULT CURRENT_TIMESTAMP(6), doc JSON, CONSTRAINT positive CHECK (price > 0));
         CREATE TABLE named (id UUID PRIMARY KEY DEFAULT UUID(), v INT);
         CREATE TABLE picky (id INT PRIMARY KEY, v INT);
         CREATE TRIGGER refuse BEFORE INSERT ON picky FOR EACH ROW
           IF NEW.v = 13 THEN SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = 'secret'; END IF;",
    )
    .await;
    let app = world
        .app("resources: { made: { write: [create, update, delete] }, named: { write: [create, update] }, picky: { write: [create] } }\n")
        .await;
    let made = app.post("/api/made", r#"{"name":"a","n":5,"doc":{"x":1.50}}"#).await.expect(201);
    assert_eq!(made.header("location"), "/api/made/1");
    assert!(made.data().contains(r#""price":1.50,"born":"2000-01-01""#) && made.data().contains(r#""doc":{"x":1.50}"#));
    let zero = app.post("/api/made", r#"{"id":0,"name":"zero"}"#).await.expect(201);
    assert_eq!(zero.header("location"), "/api/made/0");
    let put = app.put("/api/made/1", r#"{"name":"b"}"#).await.expect(200);
    assert!(put.data().contains(r#""name":"b","n":null,"price":1.50"#), "{put:?}");
    let merged = app.patch("/api/made/1", r#"{"doc":{"y":2},"flags":"b,a","kind":"1"}"#).await.expect(200);
    assert!(merged.data().contains(r#""flags":"a,b","kind":"1""#) && merged.data().contains(r#""doc":{"y":2}"#));
    let tag = merged.header("etag").to_owned();
    let guarded = |tag: String| {
        let app = &app;
        async move {
            let ask = app.ask(reqwest::Method::PATCH, "/api/made/1").header("if-match", &tag);
            ask.json(r#"{"n":7}"#).send().await
        }
    };
    guarded("\"other\"".into()).await.expect(412);
    guarded(tag).await.expect(200);
    // The key that the server made is found among what the triggers told.
    let named = app.post("/api/named", r#"{"v":1}"#).await.expect(201);
    app.get(named.header("location")).await.expect(200);
    for (path, body, status, words) in [
        ("/api/made", r#"{"id":1,"name":"c"}"#, 409, "id"),
        ("/api/made", r#"{"name":"B"}"#, 409, "name"),
        ("/api/made", "{}", 422, "name"),
        ("/api/made", r#"{"name":null}"#, 422, "name"),
        ("/api/made", r#"{"name":"longer than ten"}"#, 422, "name"),
        ("/api/made", r#"{"name":"d","n":128}"#, 422, "\"n\""),
        ("/api/made", r#"{"name":"d","n":1.5}"#, 422, "\"n\""),
        ("/api/made", r#"{"name":"d","price":-1}"#, 422, "price"),
        ("/api/made", r#"{"name":"d","price":"x"}"#, 422, "price"),
        ("/api/made", r#"{"name":"d","price":123456}"#, 422, "price"),
        ("/api/made", r#"{"name":"d","born":"2024-02-30"}"#, 422, "born"),
        ("/api/made", r#"{"name":"d","born":"0000-00-00"}"#, 422, "born"),
        ("/api/made", r#"{"name":"d","flags":"c"}"#, 422, "flags"),
        ("/api/made", r#"{"name":"d","kind":"2"}"#, 422, "kind"),
        ("/api/made", r#"{"name":"d","kind":""}"#, 422, "kind"),
        ("/api/named", r#"{"id":"x"}"#, 422, "id"),
        ("/api/picky", r#"{"id":1,"v":13}"#, 422, "rule"),
    ] {
        let refused = app.post(path, body).await;
        assert_eq!(refused.status.as_u16(), status, "{body}: {refused:?}");
        assert!(refused.text.contains(words) && !refused.text.contains("secret"), "{body}: {refused:?}");
        assert!(!refused.text.contains("INSERT") && !refused.text.contains('`'), "{body}: {refused:?}");
    }
    app.delete("/api/made/0").await.expect(204);
    app.delete("/api/made/0").await.expect(404);
}

#[tokio::test]
async fn a_row_is_cached_under_the_spelling_that_the_database_gives_and_no_other() {
    let world = World::new(
        "CREATE TABLE word (w VARCHAR(20) PRIMARY KEY, n INT); INSERT INTO word VALUES ('Foo', 1), ('bar', 2), ('ärger', 3);
         CREATE TABLE price (p DECIMAL(20,2) PRIMARY KEY, n INT);
         INSERT INTO price VALUES (1.50, 1), (123456789012345678.01, 2), (123456789012345678.02, 3);
         CREATE TABLE huge (id BIGINT UNSIGNED PRIMARY KEY, day DATE, UNIQUE (day));
         INSERT INTO huge VALUES (18446744073709551615, '2024-05-01'), (7, NULL);",
    )
    .await;
    let app = world
        .app("resources: { word: { write: [update] }, price: {}, huge: {}, by_day: { table: huge, key: day } }\n")
        .await;
    warm(&[&app], &["/api/word/Foo"]).await;
    for spelled in ["foo", "FOO", "Foo "] {
        for _ in 0..3 {
            let reply = app.get(&format!("/api/word/{}", spelled.replace(' ', "%20"))).await.expect(200);
            assert_eq!((reply.data(), reply.source().as_str()), (r#"{"w":"Foo","n":1}"#, "database"), "{spelled}");
        }
    }
    let batch = app.get("/api/word?w=FOO,bar,nix,Foo,Arger,bar").await.expect(200);
    assert_eq!(
        batch.data(),
        r#"[{"w":"Foo","n":1},{"w":"bar","n":2},{"w":"Foo","n":1},{"w":"ärger","n":3},{"w":"bar","n":2}],"missing":["nix"]"#
    );
    // Not found today; found as soon as it is there.
    app.get("/api/word/new").await.expect(404);
    world.sql("INSERT INTO word VALUES ('NEW', 4)").await;
    app.get("/api/word/new").await.expect(200);
    world.sql("UPDATE word SET w = 'fOO' WHERE w = 'foo'").await;
    seen(&[&app], "/api/word/Foo", "fOO").await;
    // A write by another spelling takes the cached row too.
    warm(&[&app], &["/api/word/fOO"]).await;
    app.patch("/api/word/foo", r#"{"n":10}"#).await.expect(200);
    assert!(app.get("/api/word/fOO").await.text.contains("10"));

    assert_eq!(app.get("/api/price/1.5").await.expect(200).data(), r#"{"p":1.50,"n":1}"#);
    assert_eq!(
        app.get("/api/price/123456789012345678.02").await.expect(200).data(),
        r#"{"p":123456789012345678.02,"n":3}"#
    );
    for absent in ["1.501", "123456789012345678.03", "1e300", "NaN", "1.505"] {
        app.get(&format!("/api/price/{absent}")).await.expect(404);
    }
    app.get("/api/price/x").await.expect(400);
    let huge = r#"{"id":18446744073709551615,"day":"2024-05-01"}"#;
    assert_eq!(app.get("/api/huge/18446744073709551615").await.expect(200).data(), huge);
    app.get("/api/huge/18446744073709551616").await.expect(404);
    app.get("/api/huge/-1").await.expect(404);
    assert_eq!(app.get("/api/by_day/2024-05-01").await.expect(200).data(), huge);
    app.get("/api/by_day/2024-05-02").await.expect(404);
    app.get("/api/by_day/tomorrow").await.expect(400);
    app.get("/api/by_day/0000-00-00").await.expect(404);
}

#[tokio::test]
async fn statements_are_served_in_their_order_and_can_only_read() {
    let world = World::new(
        "CREATE TABLE item (id BIGINT PRIMARY KEY, v VARCHAR(20)); INSERT INTO item SELECT seq, CONCAT('v', seq % 7) FROM seq_1_to_100;
         INSERT INTO item VALUES (9007199254740993, 'far');
         CREATE TABLE log (n INT); CREATE FUNCTION sneaky() RETURNS INT MODIFIES SQL DATA BEGIN INSERT INTO log VALUES (1); RETURN 1; END;",
    )
    .await;
    let app = world
        .app(
            "queries:\n  by_v: { sql: \"SELECT id, v, id > 50 AS late FROM item WHERE v = $1 AND id <= $2 ORDER BY id DESC\", \
             params: [v, most], depends_on: [item] }\n",
        )
        .await
        ;
    let path = "/api/queries/by_v?v=v1&most=20";
    assert_eq!(
        app.get(path).await.expect(200).data(),
        r#"[{"id":15,"v":"v1","late":0},{"id":8,"v":"v1","late":0},{"id":1,"v":"v1","late":0}]"#
    );
    warm(&[&app], &[path]).await;
    world.sql("DELETE FROM item WHERE id = 8").await;
    seen(&[&app], path, r#"[{"id":15,"v":"v1","late":0},{"id":1,"#).await;
    let ask = |sql: &str, params: &str| {
        let body = format!("{{\"sql\":{},\"params\":{params}}}", serde_json::Value::from(sql));
        let app = &app;
        async move { app.post("/api/query", &body).await }
    };
    assert_eq!(
        ask("SELECT $2 AS b, $1 AS a, $2 AS c", r#"["x","y"]"#).await.expect(200).data(),
        r#"[{"b":"y","a":"x","c":"y"}]"#
    );
    assert_eq!(
        ask("SELECT id FROM item WHERE id = $1", r#"["9007199254740993"]"#).await.expect(200).data(),
        r#"[{"id":9007199254740993}]"#
    );
    assert_eq!(
        ask("WITH w AS (SELECT 1.10 AS d UNION ALL SELECT 2) SELECT * FROM w ORDER BY d DESC", "[]")
            .await
            .expect(200)
            .data(),
        r#"[{"d":2.00},{"d":1.10}]"#
    );
    let list = ask("SELECT j.v FROM JSON_TABLE($1, '$[*]' COLUMNS (v INT PATH '$')) j", "[[3,4]]").await.expect(200);
    assert_eq!(list.data(), r#"[{"v":3},{"v":4}]"#);
    for sql in [
        "DELETE FROM item",
        "SELECT 1; DELETE FROM item",
        "SELECT sneaky()",
        "SELECT * FROM item INTO OUTFILE '/tmp/x'",
        "SELECT 1 INTO @x",
        "SELEC 1",
        "SELECT nothing FROM nowhere",
        "SET GLOBAL max_connections = 1",
        "CALL cache_aside.installed()",
        "SHOW TABLES",
        "SELECT $1",
        "SELECT 1, 1",
        "",
    ] {
        let refused = ask(sql, "[]").await;
        assert_eq!(refused.status.as_u16(), 400, "{sql}: {refused:?}");
    }
    assert_eq!(world.number("SELECT COUNT(*) FROM log").await, 0);
    let many = ask("SELECT a.id FROM item a, item b, item c WHERE a.id < 1000 AND b.id < 1000 AND c.id < 1000", "[]")
        .await
        .expect(200);
    assert!(many.text.contains(r#""truncated":true"#));
}

#[tokio::test]
async fn a_statement_that_takes_too_long_is_ended_by_the_server() {
    let world =
        World::new("CREATE TABLE item (id INT PRIMARY KEY, v INT); INSERT INTO item VALUES (1, 1), (2, 2);").await;
    let config = world.config_with(
        ", statement_timeout: 300ms",
        "resources: { item: { write: [update] } }\nqueries: { slow: { sql: \"SELECT SLEEP(20) AS s, $1 AS p\", params: [p] } }\n",
    );
    let app = App::start(&config).await;
    app.get("/api/queries/slow?p=mark-of-a-slow-one").await.expect(504);
    world.until("SELECT COUNT(*) = 0 FROM information_schema.PROCESSLIST WHERE INFO LIKE '%SLEEP(20)%' AND ID <> CONNECTION_ID()").await;
    // A row that somebody else holds is waited for no longer.
    let mut other = world.database.client().await;
    run(&mut other, "START TRANSACTION; UPDATE item SET v = 3 WHERE id = 1").await;
    let waited = app.patch("/api/item/1", r#"{"v":9}"#).await;
    assert!(matches!(waited.status.as_u16(), 503 | 504), "{waited:?}");
    run(&mut other, "ROLLBACK").await;
    app.patch("/api/item/1", r#"{"v":9}"#).await.expect(200);
    let open = "SELECT COUNT(*) = 0 FROM information_schema.INNODB_TRX t JOIN information_schema.PROCESSLIST p ON p.ID = t.trx_mysql_thread_id \
                WHERE p.DB = DATABASE() AND t.trx_started < NOW() - INTERVAL 2 SECOND";
    world.until(open).await;
}

#[tokio::test]
async fn a_server_that_crashed_and_came_back_is_a_new_life() {
    let mut server = Mariadb::start().await;
    let world = World::on(&server, SCHEMA).await;
    let app = world.app(RESOURCES).await;
    warm(&[&app], &["/api/item/7"]).await;
    let before = app.log().matches("absent from now on").count();
    server.kill().await;
    app.until("marked", async |app| app.get("/api/item/7").await.header("cache-status").contains("unverified")).await;
    app.patch("/api/item/7", r#"{"v":1}"#).await.expect(503);
    server.start_again().await;
    world.sql("UPDATE item SET v = 2 WHERE id = 7").await;
    seen(&[&app], "/api/item/7", r#""v":2"#).await;
    app.until("begun anew", async |app| app.log().matches("absent from now on").count() > before).await;
    warm(&[&app], &["/api/item/7"]).await;
    world.sql("UPDATE item SET v = 3 WHERE id = 7").await;
    seen(&[&app], "/api/item/7", r#""v":3"#).await;
    app.patch("/api/item/7", r#"{"v":4}"#).await.expect(200);
    assert!(app.get("/api/item/7").await.text.contains(r#""v":4"#));
}

#[tokio::test]
async fn a_server_that_only_reads_is_not_taken_for_the_primary() {
    let server = Mariadb::start().await;
    let world = World::on(&server, SCHEMA).await;
    let app = world.app(RESOURCES).await;
    warm(&[&app], &["/api/item/7"]).await;
    world.sql("SET GLOBAL read_only = 1").await;
    app.until("unverified", async |app| app.get("/api/item/7").await.header("cache-status").contains("unverified"))
        .await;
    world.sql("SET GLOBAL read_only = 0").await;
    warm(&[&app], &["/api/item/7"]).await;
    world.sql("UPDATE item SET v = 3 WHERE id = 7").await;
    seen(&[&app], "/api/item/7", r#""v":3"#).await;
}

#[tokio::test]
async fn with_holds_a_write_is_refused_while_the_cache_can_not_be_told() {
    let world = World::new(SCHEMA).await;
    let mut redis = Redis::start().await;
    let config = world.config("resources: { item: { write: [update], consistency: hold } }\n");
    let app = App::start(&config.replace(&world.redis_url, &redis.url())).await;
    warm(&[&app], &["/api/item/7"]).await;
    app.patch("/api/item/7", r#"{"v":1}"#).await.expect(200);
    assert!(app.get("/api/item/7").await.text.contains(r#""v":1"#));
    redis.kill().await;
    app.patch("/api/item/7", r#"{"v":2}"#).await.expect(503);
    assert_eq!(world.number("SELECT v FROM item WHERE id = 7").await, 1);
}

#[tokio::test]
async fn without_capture_nothing_is_cached_and_it_is_noticed_when_it_comes_and_goes() {
    let server = Mariadb::start().await;
    let world = World::on(&server, SCHEMA).await;
    let config = world.config(RESOURCES);
    let app = App::launch(&config).await;
    app.until("past the cache", async |app| app.get("/api/item/7").await.header("cache-status").contains("fwd=bypass"))
        .await;
    let check = command(&config, &["check"]);
    let said = String::from_utf8_lossy(&check.stdout).into_owned();
    assert!(!check.status.success() && said.contains("run cache-aside migrate") && said.contains("TRUNCATE"), "{said}");
    let printed = command(&config, &["migrate", "--print", "--grant", "app@localhost"]);
    let script = String::from_utf8_lossy(&printed.stdout).into_owned();
    assert!(
        printed.status.success() && script.contains("CREATE TRIGGER") && script.contains("TO `app`@`localhost`"),
        "{script}"
    );
    assert_eq!(
        world.number("SELECT COUNT(*) FROM information_schema.SCHEMATA WHERE SCHEMA_NAME = 'cache_aside'").await,
        0
    );
    let migrated = command(&config, &["migrate"]);
    assert!(migrated.status.success(), "{migrated:?}");
    warm(&[&app], &["/api/item/7"]).await;
    let again = command(&config, &["migrate"]);
    assert!(
        again.status.success() && String::from_utf8_lossy(&again.stdout).matches("up to date").count() == 2,
        "{again:?}"
    );
    let check = command(&config, &["check"]);
    let said = String::from_utf8_lossy(&check.stdout).into_owned();
    assert!(
        check.status.success() && said.contains("MariaDB") && said.contains("changes by anybody are captured"),
        "{said}"
    );
    // A foreign key that came later changes rows that no trigger would tell of.
    world.sql("CREATE TABLE league (id INT PRIMARY KEY); ALTER TABLE team ADD league INT, ADD FOREIGN KEY (league) REFERENCES league (id) ON DELETE SET NULL").await;
    app.until("noticed", async |app| app.get("/api/team/1").await.header("cache-status").contains("fwd=bypass")).await;
    assert!(command(&config, &["migrate"]).status.success());
    warm(&[&app], &["/api/team/1", "/api/item/7"]).await;
    let left = command(&config, &["migrate", "--uninstall", "--print"]);
    let left = String::from_utf8_lossy(&left.stdout).into_owned();
    assert!(left.contains("DROP TRIGGER") && left.ends_with("DROP DATABASE IF EXISTS cache_aside;\n"), "{left}");
    assert!(command(&config, &["migrate", "--uninstall"]).status.success());
    world.sql("UPDATE item SET v = 77 WHERE id = 7").await;
    noticed(&app).await;
    assert!(app.get("/api/item/7").await.text.contains(r#""v":77"#));
    assert_eq!(
        world.number("SELECT COUNT(*) FROM information_schema.TRIGGERS WHERE TRIGGER_NAME LIKE 'cache%'").await,
        0
    );
}

/// Waits until it is known that changes are not captured any more. One read past the cache may have another reason: a busy
/// machine.
async fn noticed(app: &App) {
    app.until("noticed", async |app| app.get("/readyz?verbose").await.text.contains("run cache-aside migrate")).await;
}

#[tokio::test]
async fn a_table_that_took_the_name_of_a_captured_one_is_not_taken_for_captured() {
    let world = World::new("CREATE TABLE item (id INT PRIMARY KEY, v INT); INSERT INTO item VALUES (7, 0)").await;
    let config = world.config("resources: { item: {} }\n");
    let app = App::start(&config).await;
    warm(&[&app], &["/api/item/7"]).await;
    // As tools that change a schema online do it. The triggers go along with the old table.
    world
        .sql(
            "CREATE TABLE item_new LIKE item; INSERT INTO item_new VALUES (7, 1); \
             RENAME TABLE item TO item_old, item_new TO item",
        )
        .await;
    noticed(&app).await;
    world.sql("UPDATE item SET v = 2 WHERE id = 7").await;
    assert!(app.get("/api/item/7").await.text.contains(r#""v":2"#));
    let migrated = command(&config, &["migrate"]);
    assert!(migrated.status.success(), "{migrated:?}");
    let strays = "SELECT COUNT(*) FROM information_schema.TRIGGERS WHERE EVENT_OBJECT_TABLE = 'item_old'";
    assert_eq!(world.number(strays).await, 0);
    warm(&[&app], &["/api/item/7"]).await;
    world.sql("UPDATE item SET v = 3 WHERE id = 7").await;
    seen(&[&app], "/api/item/7", r#""v":3"#).await;
}

#[tokio::test]
async fn where_several_servers_may_write_nothing_is_cached() {
    let server = Mariadb::start_with(&["--auto-increment-increment=2"]).await;
    let world = World::on(&server, SCHEMA).await;
    let config = world.config(RESOURCES);
    assert!(command(&config, &["migrate"]).status.success());
    let app = App::launch(&config).await;
    let bypassed = async |app: &App| app.get("/api/item/7").await.header("cache-status").contains("fwd=bypass");
    app.until("past the cache", bypassed).await;
    let check = command(&config, &["check"]);
    assert!(!check.status.success() && String::from_utf8_lossy(&check.stdout).contains("auto_increment_increment"));
    world.sql("SET GLOBAL auto_increment_increment = 1").await;
    warm(&[&app], &["/api/item/7"]).await;
}

#[tokio::test]
async fn what_is_printed_is_what_is_installed() {
    let server = Mariadb::start().await;
    let world = World::on(&server, SCHEMA).await;
    let config = world.config(RESOURCES);
    let printed = command(&config, &["migrate", "--print"]);
    // As the servers' own client splits it.
    let script = String::from_utf8_lossy(&printed.stdout).into_owned();
    let (settings, script) = script.split_once("DELIMITER ;;").expect("it says where statements end");
    let script = script.trim().strip_suffix("DELIMITER ;").expect("it says where they end as ever");
    let mut client = world.database.client().await;
    // As a client begins that knows no better.
    run(&mut client, "SET NAMES latin1; SET SESSION sql_mode = 'NO_BACKSLASH_ESCAPES,ANSI_QUOTES'").await;
    run(&mut client, settings).await;
    for statement in script.split(";;").map(str::trim).filter(|statement| !statement.is_empty()) {
        run(&mut client, statement).await;
    }
    let done = command(&config, &["migrate"]);
    let said = String::from_utf8_lossy(&done.stdout).into_owned();
    assert!(done.status.success() && said.matches("up to date").count() == 2, "{said}");
    let session = "SELECT COUNT(*) FROM information_schema.TRIGGERS
                   WHERE CHARACTER_SET_CLIENT <> 'utf8mb4' OR SQL_MODE NOT LIKE '%NO_AUTO_VALUE_ON_ZERO%'";
    assert_eq!(world.number(session).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn texts_that_a_smaller_character_set_can_not_tell_apart_are_told_apart() {
    let server = Mariadb::start().await;
    let world = World::on(
        &server,
        "CREATE TABLE word (id VARCHAR(20) COLLATE utf8mb4_nopad_bin PRIMARY KEY, v INT) CHARACTER SET utf8mb4;
         INSERT INTO word VALUES ('日', 0)",
    )
    .await;
    let config = world.config("resources: { word: {} }\n");
    let printed = command(&config, &["migrate", "--print"]);
    let script = String::from_utf8_lossy(&printed.stdout).into_owned();
    let (_, script) = script.split_once("DELIMITER ;;").expect("it says where statements end");
    let mut client = world.database.client().await;
    // Somebody who leaves the first lines out.
    run(&mut client, "SET NAMES latin1").await;
    for statement in script.trim().trim_end_matches("DELIMITER ;").split(";;").map(str::trim) {
        if !statement.is_empty() {
            run(&mut client, statement).await;
        }
    }
    let feed = feed(&config);
    let begun = feed.owed(None, "", false).await.expect("it answers").point;
    world.sql("SET NAMES utf8mb4; UPDATE word SET id = '本' WHERE id = '日'").await;
    assert_eq!(owed(&feed, &begun).await.0, ["日", "本"]);
}

#[tokio::test]
async fn the_last_insert_id_is_the_key_only_where_the_key_is_counted_up() {
    let world = World::new(
        "CREATE TABLE k (id VARCHAR(36) PRIMARY KEY DEFAULT (UUID()), seq BIGINT AUTO_INCREMENT UNIQUE, v INT);
         INSERT INTO k (id, v) VALUES ('2', 22);",
    )
    .await;
    let config = world.config("resources: { k: { write: [create] } }\n");
    let app = App::launch(&config).await;
    app.until("past the cache", async |app| app.get("/api/k/2").await.header("cache-status").contains("fwd=bypass"))
        .await;
    let refused = app.post("/api/k", r#"{"v":1}"#).await.expect(422);
    assert!(refused.text.contains("the key must be given"), "{refused:?}");
    assert_eq!(world.number("SELECT COUNT(*) FROM k").await, 1);
    assert!(command(&config, &["migrate"]).status.success());
    warm(&[&app], &["/api/k/2"]).await;
    let made = app.post("/api/k", r#"{"v":3}"#).await.expect(201);
    assert!(made.data().contains(r#""seq":"#) && made.data().contains(r#""v":3}"#), "{made:?}");
    let id: String = world
        .database
        .client()
        .await
        .query_first("SELECT id FROM k WHERE v = 3")
        .await
        .expect("it is sound")
        .expect("it is there");
    assert_eq!(made.header("location"), format!("/api/k/{id}"));
}

#[tokio::test]
async fn what_the_server_begins_sessions_with_changes_nothing() {
    let server = Mariadb::start_with(&[
        "--completion-type=CHAIN",
        "--query-cache-type=1",
        "--query-cache-size=1M",
        "--sql-mode=ANSI_QUOTES,NO_BACKSLASH_ESCAPES",
    ])
    .await;
    let world = World::on(&server, SCHEMA).await;
    world.sql("SET GLOBAL sql_select_limit = 1").await;
    let app = world.app(RESOURCES).await;
    warm(&[&app], &["/api/item/7", "/api/item?team_id=2"]).await;
    assert!(app.get("/api/item?team_id=2").await.text.contains(r#"{"id":99,"#));
    app.patch("/api/item/7", r#"{"v":1}"#).await.expect(200);
    world.sql("UPDATE item SET v = 2 WHERE team_id = 2").await;
    seen(&[&app], "/api/item/7", r#""v":2"#).await;
    seen(&[&app], "/api/item/99", r#""v":2"#).await;
    // A transaction that was chained to a commit would stay, with whatever was read in it.
    world.until("SELECT COUNT(*) = 0 FROM information_schema.INNODB_TRX").await;
}

#[tokio::test]
async fn an_account_without_any_other_right_can_serve() {
    let server = Mariadb::start().await;
    let world = World::on(&server, SCHEMA).await;
    let name = &world.database.name;
    world.sql(&format!(
        "CREATE USER app@'127.0.0.1'; GRANT SELECT, INSERT, UPDATE, DELETE ON {name}.item TO app@'127.0.0.1'; \
         GRANT SELECT, UPDATE, DELETE ON {name}.team TO app@'127.0.0.1'; GRANT SELECT ON {name}.board TO app@'127.0.0.1'"
    ))
    .await;
    let config = world.config(RESOURCES);
    let own = config.replace("tester@", "app@");
    let app = App::launch(&own).await;
    app.until("past the cache", async |app| app.get("/api/item/7").await.header("cache-status").contains("fwd=bypass"))
        .await;
    let granted = command(&config, &["migrate", "--grant", "app@127.0.0.1"]);
    assert!(granted.status.success(), "{granted:?}");
    warm(&[&app], &["/api/item/7", "/api/board/7"]).await;
    world.sql("UPDATE item SET v = 5 WHERE id = 7").await;
    seen(&[&app], "/api/item/7", r#""v":5"#).await;
    app.patch("/api/item/7", r#"{"v":6}"#).await.expect(200);
    assert!(app.get("/api/item/7").await.text.contains(r#""v":6"#));
    // Who writes needs no right to the outbox either.
    let client = world.database.url.replace("tester@", "app@");
    let mut client = Conn::from_url(format!("{client}?prefer_socket=false")).await.expect("it may connect");
    run(&mut client, "UPDATE item SET v = 7 WHERE id = 7").await;
    seen(&[&app], "/api/item/7", r#""v":7"#).await;
    let dropped = command(&own, &["invalidate", "item", "7"]);
    assert!(dropped.status.success(), "{dropped:?}");
}

/// What the service itself asks, asked beside it.
fn feed(config: &str) -> AnyFeed {
    let config = Config::from_yaml(config, "test", &Env::default()).expect("it is sound");
    open_store(&config).expect("the URL is sound").feed(PATIENCE).expect("it tells of changes")
}

/// The keys of what is owed since a point, and where that leads.
async fn owed(feed: &AnyFeed, since: &str) -> (Vec<String>, String) {
    let owed = feed.owed(Some(since), &feed.origin(), false).await.expect("it answers");
    assert!(owed.complete, "{owed:?}");
    let key = |image: Option<std::collections::BTreeMap<String, Option<String>>>| image?.get("id")?.clone();
    let mut keys: Vec<String> = owed.changes.into_iter().filter_map(|change| key(change.image)).collect();
    keys.sort();
    (keys, owed.point)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_point_waits_for_what_is_under_way_and_forgets_what_never_comes() {
    let server = Mariadb::start().await;
    let world = World::on(&server, SCHEMA).await;
    let config = world.config(RESOURCES);
    assert!(command(&config, &["migrate"]).status.success());
    let feed = feed(&config);
    let begun = feed.owed(None, "", false).await.expect("it answers");
    assert!(!begun.complete && !begun.origin.is_empty());
    let (mut slow, mut undone) = (world.database.client().await, world.database.client().await);
    run(&mut slow, "START TRANSACTION; UPDATE item SET v = 1 WHERE id = 1").await;
    run(&mut undone, "START TRANSACTION; UPDATE item SET v = 1 WHERE id = 2").await;
    world.sql("UPDATE item SET v = 1 WHERE id = 3").await;
    let (keys, point) = owed(&feed, &begun.point).await;
    assert_eq!(keys, ["3"]);
    let (_, gaps) = point.split_once('=').expect("two are under way");
    assert_eq!(gaps.split(',').count(), 1, "a run of ids is one gap: {point}");
    run(&mut undone, "ROLLBACK").await;
    // Ten minutes later, as far as it knows: what never comes is forgotten, what is alive is not.
    let (high, _) = point.split_once(';').expect("it has gaps");
    let long_ago = format!("{high};1={gaps}");
    let (keys, point) = owed(&feed, &long_ago).await;
    assert!(keys.is_empty());
    let (first, _) = gaps.split_once('-').expect("it is a run");
    assert!(point.ends_with(&format!("={first}")), "{point} of {long_ago}");
    // Whoever begins now waits for it too, wherever it begins.
    let anew = feed.owed(None, "", false).await.expect("it answers").point;
    feed.sweep().await.expect("it can");
    let noted = feed.owed(None, "", false).await.expect("it answers").point;
    run(&mut slow, "COMMIT").await;
    for point in [&point, &anew, &noted] {
        assert_eq!(owed(&feed, point).await.0, ["1"], "{point}");
    }
    let (keys, after) = owed(&feed, &point).await;
    assert_eq!((keys, after.contains(';')), (vec!["1".to_owned()], false));
    assert_eq!(owed(&feed, &after).await.0, [""; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_point_of_another_database_or_another_of_its_lives_says_nothing() {
    let server = Mariadb::start().await;
    let world = World::on(&server, SCHEMA).await;
    let config = world.config(RESOURCES);
    assert!(command(&config, &["migrate"]).status.success());
    let feed = feed(&config);
    let mut slow = world.database.client().await;
    run(&mut slow, "START TRANSACTION; UPDATE item SET v = 1 WHERE id = 1").await;
    world.sql("UPDATE item SET v = 1 WHERE id = 3").await;
    // Before commits were lost, what is under way here had been seen under the same ids.
    let last = world.number("SELECT MAX(id) FROM cache_aside.outbox").await;
    let before = format!("1:{last}");
    let begun = feed.owed(Some(&before), "another", false).await.expect("it answers");
    assert!(!begun.complete, "{begun:?}");
    run(&mut slow, "COMMIT").await;
    assert_eq!(owed(&feed, &begun.point).await.0, ["1"], "{begun:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_changes_are_read_from_is_what_connections_find() {
    let server = Mariadb::start().await;
    let world = World::on(&server, SCHEMA).await;
    let config = world.config(RESOURCES);
    assert!(command(&config, &["migrate"]).status.success());
    let feed = feed(&config);
    let begun = feed.owed(None, "", false).await.expect("it answers");
    let made = "SELECT UNIX_TIMESTAMP(CREATE_TIME) FROM information_schema.TABLES
                WHERE TABLE_SCHEMA = 'cache_aside' AND TABLE_NAME = 'outbox'";
    let before = world.number(made).await;
    let mut comment = 0;
    while world.number(made).await == before {
        comment += 1;
        world.sql(&format!("ALTER TABLE cache_aside.outbox COMMENT = '{comment}'")).await;
    }
    // Over a connection of its own, as others are made now and then.
    feed.sweep().await.expect("it can");
    let after = feed.owed(Some(&begun.point), &begun.origin, false).await.expect("it answers");
    assert!(!after.complete && after.origin == feed.origin() && after.origin != begun.origin, "{after:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn sweeping_waits_for_no_transaction_that_is_under_way_beside_it() {
    let server = Mariadb::start().await;
    let world = World::on(&server, SCHEMA).await;
    let config = world.config(RESOURCES);
    assert!(command(&config, &["migrate"]).status.success());
    let feed = feed(&config);
    let (mut low, mut high) = (world.database.client().await, world.database.client().await);
    run(&mut low, "START TRANSACTION; UPDATE item SET v = 6 WHERE id = 1").await;
    world.sql("UPDATE item SET v = 1 WHERE id BETWEEN 2 AND 5").await;
    run(&mut high, "START TRANSACTION; UPDATE item SET v = 6 WHERE id = 6").await;
    world.sql("UPDATE item SET v = 1 WHERE id BETWEEN 7 AND 9").await;
    feed.sweep().await.expect("it can");
    world.sql("UPDATE cache_aside.points SET at = at - INTERVAL 10 MINUTE").await;
    feed.sweep().await.expect("it need not wait");
    assert_eq!(world.number("SELECT COUNT(*) FROM cache_aside.outbox").await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_outbox_is_swept_and_a_cache_that_missed_too_much_begins_anew() {
    let server = Mariadb::start().await;
    let world = World::on(&server, SCHEMA).await;
    let config = world.config(RESOURCES);
    assert!(command(&config, &["migrate"]).status.success());
    let feed = feed(&config);
    let first = feed.owed(None, "", false).await.expect("it answers").point;
    let mut open = world.database.client().await;
    run(&mut open, "START TRANSACTION; UPDATE item SET v = 6 WHERE id = 6").await;
    world.sql("UPDATE item SET v = 1 WHERE id < 5").await;
    feed.sweep().await.expect("it can");
    let rows = "SELECT COUNT(*) FROM cache_aside.outbox";
    assert_eq!(world.number(rows).await, 4, "not before everybody has seen them");
    let (keys, second) = owed(&feed, &first).await;
    assert_eq!(keys, ["1", "2", "3", "4"]);
    world.sql("UPDATE cache_aside.points SET at = at - INTERVAL 10 MINUTE").await;
    feed.sweep().await.expect("it can");
    assert_eq!(world.number(rows).await, 1, "the last one stays: it says how far the ids have got");
    assert!(
        !feed.owed(Some(&first), &feed.origin(), false).await.expect("it answers").complete,
        "something is missing"
    );
    run(&mut open, "COMMIT").await;
    assert_eq!(owed(&feed, &second).await.0, ["6"], "what was open stays");
    // Too much for one round: all of it as one.
    world.sql("INSERT INTO cache_aside.outbox (relation) SELECT 'x' FROM seq_1_to_10001; UPDATE item SET v = 2 WHERE id = 9").await;
    let (_, third) = owed(&feed, &second).await;
    let many = feed.owed(Some(&second), &feed.origin(), false).await.expect("it answers");
    assert!(many.complete && many.changes.len() == 3 && many.point == third, "{many:?}");
    world.sql("INSERT INTO cache_aside.outbox (relation) SELECT 'x' FROM seq_1_to_100001").await;
    let surveyed = feed.owed(Some(&third), &feed.origin(), false).await.expect("it answers");
    assert!(!surveyed.complete);
    // In several steps, and up to the last one.
    let last = world.number("SELECT MAX(id) FROM cache_aside.outbox").await;
    assert_eq!(surveyed.point.split(';').next(), Some(format!("1:{last}").as_str()));
    let points = "SELECT COUNT(*) FROM cache_aside.points";
    world.sql("UPDATE cache_aside.points SET at = at - INTERVAL 30 SECOND").await;
    let noted = world.number(points).await;
    feed.sweep().await.expect("it can");
    assert_eq!(world.number(points).await, noted + 2, "on its way, and at its end");
    // An outbox that is younger than it was has been put back.
    world.sql("DELETE FROM cache_aside.outbox").await;
    assert!(!feed.owed(Some(&third), &feed.origin(), false).await.expect("it answers").complete);
}

#[tokio::test]
async fn a_statement_that_changes_very_many_rows_is_told_as_a_whole() {
    let world = World::new(
        "CREATE TABLE item (id INT PRIMARY KEY, v INT); INSERT INTO item SELECT seq, 0 FROM seq_1_to_30000;
         CREATE TABLE other (id INT PRIMARY KEY, v INT); INSERT INTO other VALUES (1, 0);",
    )
    .await;
    let app = world.app("resources: { item: {}, other: {} }\n").await;
    warm(&[&app], &["/api/item/7", "/api/other/1"]).await;
    let mut client = world.database.client().await;
    run(&mut client, "START TRANSACTION; UPDATE item SET v = 1; UPDATE other SET v = 1; COMMIT").await;
    seen(&[&app], "/api/item/7", r#""v":1"#).await;
    seen(&[&app], "/api/other/1", r#""v":1"#).await;
}

#[tokio::test]
async fn init_prints_a_configuration_that_fits() {
    let world = World::new(
        "CREATE TABLE users (id INT PRIMARY KEY, name TEXT, team_id INT);
         CREATE TABLE `Order Lines` (`order` INT, line INT, `${x}` TEXT, PRIMARY KEY (`order`, line)); CREATE TABLE keyless (a INT);",
    )
    .await;
    let printed = std::process::Command::new(env!("CARGO_BIN_EXE_cache-aside"))
        .args(["init", "--database-url", &world.database.url])
        .output()
        .expect("it runs");
    assert!(printed.status.success(), "{printed:?}");
    let text = String::from_utf8(printed.stdout).expect("it is text");
    for line in [
        "  users:\n    key: id\n    columns: [id, name, team_id]",
        "    # lists: { team_id: { limit: 1000 } }",
        "key: [order, line]",
        "# keyless has no primary key",
    ] {
        assert!(text.contains(line), "{line}: {text}");
    }
    let config = text
        .replace("${DATABASE_URL}", &world.database.url)
        .replace("${CACHE_URL:-redis://localhost:6379}", &world.redis_url);
    let migrated = command(&config, &["migrate"]);
    assert!(migrated.status.success(), "{migrated:?}");
    let check = command(&config, &["check"]);
    assert!(check.status.success(), "{check:?}");
}

const BREAKER: &str = r#"cache_aside_breaker_state{backend="mysql"}"#;
const IDLE: &str = r#"cache_aside_pool_connections{backend="mysql",state="idle"}"#;
const RETRIES: &str = "cache_aside_store_retries_total";
const UNTOLD: &str = "invalidation: { mode: none }\nresources: { item: { write: [update] } }\n";

impl World {
    /// Ends connections to this database from outside, but for those that `spared` (a condition) names.
    async fn kill(&self, spared: &str) {
        let mut admin = self.database.client().await;
        let ours = format!(
            "SELECT ID FROM information_schema.PROCESSLIST WHERE DB = '{}' AND ID <> CONNECTION_ID() AND NOT ({spared})",
            self.database.name
        );
        let ours: Vec<u64> = admin.query(ours).await.expect("it is sound");
        for id in ours {
            // It may have gone by itself.
            let _ = admin.query_drop(format!("KILL {id}")).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn half_of_the_connections_is_kept_open_and_those_that_were_ended_cost_neither_reads_nor_writes() {
    let world = World::new(SCHEMA).await;
    let app = world.app(UNTOLD).await;
    app.until("kept open", async |app| app.metric(IDLE).await >= 8).await;
    let before = app.metric(RETRIES).await;
    world.kill("FALSE").await;
    app.get("/api/item/1").await.expect(200);
    world.kill("FALSE").await;
    app.patch("/api/item/2", r#"{"v":1}"#).await.expect(200);
    world.kill("FALSE").await;
    let paths: Vec<String> = (10..60).map(|id| format!("/api/item/{id}")).collect();
    let all = futures_util::future::join_all(paths.iter().map(|path| app.get(path))).await;
    assert!(all.iter().all(|reply| reply.status == 200), "{all:?}");
    assert_eq!(app.metric(RETRIES).await, before, "each was replaced by one that is alive");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_that_a_restart_has_ended_cost_no_read() {
    let mut server = Mariadb::start().await;
    let world = World::on(&server, SCHEMA).await;
    let app = world.app(UNTOLD).await;
    app.until("kept open", async |app| app.metric(IDLE).await >= 8).await;
    server.kill().await;
    until(&app, BREAKER, 2).await;
    server.start_again().await;
    until(&app, BREAKER, 0).await;
    let before = app.metric(RETRIES).await;
    for id in 1..=20 {
        app.get(&format!("/api/item/{id}")).await.expect(200);
    }
    assert_eq!(app.metric(RETRIES).await, before);
    // And what is kept is whole again: so many readers at once find it so.
    app.until("kept open again", async |app| app.metric(IDLE).await >= 8).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_far_away_is_asked_again() {
    let server = Mariadb::shared().await;
    let world = World::on(server, SCHEMA).await;
    let proxy = Proxy::to(([127, 0, 0, 1], server.port()).into()).await;
    let through = format!(":{}/", proxy.addr().port());
    let app = App::start(&world.config(UNTOLD).replace(&format!(":{}/", server.port()), &through)).await;
    far_away(&app, &proxy, BREAKER).await;
}

/// An account of few rights, whose connections are counted, and a configuration that uses it.
async fn guest(world: &World, database: &str, rest: &str) -> String {
    let (name, guest) = (&world.database.name, "guest@'127.0.0.1'");
    world.sql(&format!("CREATE USER {guest} WITH MAX_USER_CONNECTIONS 100; GRANT SELECT ON {name}.* TO {guest}")).await;
    world.config_with(database, rest).replace("tester@", "guest@")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_has_no_room_or_refuses_us_answers() {
    let mut server = Mariadb::start_with(&["--max-connections=20"]).await;
    let world = World::on(&server, SCHEMA).await;
    let config = guest(&world, "", UNTOLD).await;
    let url = format!("{}?prefer_socket=false", world.database.url.replace("tester@", "guest@"));
    let refused = async |code: &str| {
        let answer = ping(&config).await;
        assert!(matches!(&answer, Err(StoreError::Refused(said)) if said.contains(code)), "{code}: {answer:?}");
    };
    ping(&config).await.expect("it may");
    let held = Conn::from_url(&url).await.expect("it may connect");
    world.sql("ALTER USER guest@'127.0.0.1' WITH MAX_USER_CONNECTIONS 1").await;
    refused("(1226)").await;
    held.disconnect().await.expect("it can go");
    world.sql("ALTER USER guest@'127.0.0.1' WITH MAX_USER_CONNECTIONS 100").await;
    world.sql("SET PASSWORD FOR guest@'127.0.0.1' = PASSWORD('another')").await;
    refused("(1045)").await;
    world.sql("SET PASSWORD FOR guest@'127.0.0.1' = ''").await;
    let mut others = Vec::new();
    loop {
        match Conn::from_url(&url).await {
            Ok(other) => others.push(other),
            Err(Error::Server(full)) if full.code == 1040 => break,
            Err(error) => panic!("{error}"),
        }
    }
    refused("(1040)").await;
    server.kill().await;
    let silent = ping(&config).await;
    assert!(matches!(silent, Err(StoreError::Unavailable(_))), "{silent:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_without_room_for_more_serves_over_the_connections_that_there_are_and_is_not_stormed() {
    let server = Mariadb::start().await;
    let world = World::on(&server, SCHEMA).await;
    world.sql("CREATE VIEW slow AS SELECT id, SLEEP(0.02) AS waited FROM item").await;
    let rest = UNTOLD.replace("item: { write: [update] }", "slow: { key: id }");
    let config = guest(&world, ", statement_timeout: 9s", &rest).await;
    // One is for the question whether it answers.
    world.sql("ALTER USER guest@'127.0.0.1' WITH MAX_USER_CONNECTIONS 4").await;
    let app = App::start(&config).await;
    let tried = "SELECT CAST(VARIABLE_VALUE AS SIGNED) FROM information_schema.GLOBAL_STATUS WHERE VARIABLE_NAME = 'CONNECTIONS'";
    let before = world.number(tried).await;
    let paths: Vec<String> = (1..=100).map(|id| format!("/api/slow/{id}")).collect();
    let all = futures_util::future::join_all(paths.iter().map(|path| app.get(path))).await;
    let bad: Vec<_> = all.iter().filter(|reply| reply.status != 200).collect();
    assert!(bad.is_empty(), "{} of 100 failed: {:?}", bad.len(), bad[0]);
    let tries = world.number(tried).await - before;
    // As many at once as may be, before anybody knows; from then on two per second.
    assert!(tries < 50, "{tries} connections were asked for");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_write_that_finds_dead_connections_waits_for_others_where_the_server_has_no_room_for_more() {
    let server = Mariadb::start().await;
    let world = World::on(&server, SCHEMA).await;
    world.sql("CREATE VIEW slow AS SELECT id, SLEEP(2) AS waited FROM item").await;
    let rest = UNTOLD.replace("item: {", "slow: { key: id }, item: {");
    let config = guest(&world, ", pool_size: 6, statement_timeout: 9s", &rest).await;
    world.sql(&format!("GRANT UPDATE ON {}.* TO guest@'127.0.0.1'", world.database.name)).await;
    let app = App::start(&config).await;
    app.until("kept open", async |app| app.metric(IDLE).await >= 3).await;
    let slow = get(&app, "/api/slow/1");
    world
        .until("SELECT COUNT(*) FROM information_schema.PROCESSLIST WHERE USER = 'guest' AND STATE = 'User sleep'")
        .await;
    // There is room for this one, and for the question whether it answers, which was asked last.
    world.sql("ALTER USER guest@'127.0.0.1' WITH MAX_USER_CONNECTIONS 2").await;
    let last =
        "SELECT MAX(QUERY_ID) FROM information_schema.PROCESSLIST WHERE USER = 'guest' AND STATE <> 'User sleep'";
    let last = world.number(last).await;
    world.kill(&format!("USER = 'guest' AND (STATE = 'User sleep' OR QUERY_ID >= {last})")).await;
    app.patch("/api/item/2", r#"{"v":1}"#).await.expect(200);
    assert_eq!(slow.await.expect("no panic"), 200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_service_that_has_connections_stays_ready_though_it_gets_no_more() {
    let server = Mariadb::start().await;
    let world = World::on(&server, SCHEMA).await;
    let config = guest(&world, ", pool_size: 4", &UNTOLD.replace("{ write: [update] }", "{}")).await;
    let app = App::start(&config).await;
    app.until("kept open", async |app| app.metric(IDLE).await >= 2).await;
    world.sql("ALTER USER guest@'127.0.0.1' WITH MAX_USER_CONNECTIONS 1").await;
    // The question is asked all the time: what was used least recently is one of the pool's.
    let least = "SELECT QUERY_ID FROM information_schema.PROCESSLIST WHERE USER = 'guest' ORDER BY QUERY_ID LIMIT 1";
    world.kill(&format!("USER = 'guest' AND QUERY_ID = {}", world.number(least).await)).await;
    app.until("refused", async |app| app.log().contains("the database gives us no connection")).await;
    for id in 1..=20 {
        app.get(&format!("/api/item/{id}")).await.expect(200);
        assert_eq!(app.get("/readyz").await.expect(200).status, 200);
    }
    until(&app, BREAKER, 0).await;
    world.sql("ALTER USER guest@'127.0.0.1' WITH MAX_USER_CONNECTIONS 100").await;
    app.until("let in again", async |app| app.log().matches("the database answers").count() > 1).await;
}
