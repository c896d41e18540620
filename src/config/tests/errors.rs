//! Every complaint, with its line.

use super::{BASE, parse, parse_with, with};

#[track_caller]
fn complains(more: &str, expected: &str) {
    assert_eq!(with(more).map(drop), Err(expected.to_owned()), "for {more}");
}

#[test]
fn an_unknown_key_suggests_the_nearest_one() {
    complains("    tttl: 5s\n", "config.yaml:6: resources.users.tttl: unknown key; did you mean \"ttl\"?");
    complains("server:\n  listn: 0.0.0.0:1\n", "config.yaml:7: server.listn: unknown key; did you mean \"listen\"?");
    complains("sever: {}\n", "config.yaml:6: sever: unknown key; did you mean \"server\"?");
    complains(
        "cache:\n  local:\n    max_byte: 1MiB\n",
        "config.yaml:8: cache.local.max_byte: unknown key; did you mean \"max_bytes\"?",
    );
    complains(
        "    lists:\n      name:\n        orderby: id\n",
        "config.yaml:8: resources.users.lists.name.orderby: unknown key; did you mean \"order_by\"?",
    );
    complains(
        "access:\n  tokens:\n    - name: ci\n      sha: 00\n",
        "config.yaml:9: access.tokens[0].sha: unknown key; known here: name, scopes, sha256",
    );
    complains(
        "queries:\n  q:\n    sql: SELECT 1\n    params: [{ nam: a }]\n",
        "config.yaml:9: queries.q.params[0].nam: unknown key; did you mean \"name\"?",
    );
}

#[test]
fn an_unknown_key_with_nothing_near_lists_what_is_known() {
    complains(
        "invalidation:\n  zookeeper: 1\n",
        "config.yaml:7: invalidation.zookeeper: unknown key; known here: max_staleness, mode",
    );
    complains(
        "\"a\\nb\": 1\n",
        "config.yaml:6: a\\nb: unknown key; known here: access, cache, database, defaults, invalidation, queries, \
         resources, server, telemetry",
    );
}

#[test]
fn values_that_make_no_sense_are_quoted_with_what_would() {
    for (more, expected) in [
        ("    ttl: 10\n", "6: resources.users.ttl: \"10\" has no unit; add a unit, e.g. 10s"),
        ("    ttl: soon\n", "6: resources.users.ttl: \"soon\" is no duration; write it like 250ms, 10s, 5m or 1h"),
        ("    ttl: -1s\n", "6: resources.users.ttl: \"-1s\" is no duration; write it like 250ms, 10s, 5m or 1h"),
        ("    ttl: 1h30m\n", "6: resources.users.ttl: \"1h30m\" is no duration; write it like 250ms, 10s, 5m or 1h"),
        ("    ttl: 0s\n", "6: resources.users.ttl: must be longer than 0s"),
        (
            "    ttl: 99999999999999999999s\n",
            "6: resources.users.ttl: \"99999999999999999999s\" is longer than a century",
        ),
        ("    ttl_jitter: 1.5\n", "6: resources.users.ttl_jitter: must be between 0 and 1"),
        (
            "    ttl_jitter: .nan\n",
            "6: resources.users.ttl_jitter: \".nan\" is no number that fits here: invalid float literal",
        ),
        ("    refresh_ahead: -1\n", "6: resources.users.refresh_ahead: must be 0 or more"),
        ("    refresh_ahead: inf\n", "6: resources.users.refresh_ahead: must be 0 or more"),
        ("defaults:\n  ttl: 0\n", "7: defaults.ttl: must be longer than 0s"),
        ("defaults:\n  ttl_jitter: -0.1\n", "7: defaults.ttl_jitter: must be between 0 and 1"),
        ("server:\n  max_body: 1MB\n", "7: server.max_body: \"1MB\" is no size; write it like 512B, 64KiB or 1MiB"),
        ("server:\n  max_body: 0\n", "7: server.max_body: must be at least 1"),
        ("server:\n  max_batch: 0\n", "7: server.max_batch: must be at least 1"),
        ("server:\n  max_connections: 0\n", "7: server.max_connections: must be at least 1"),
        ("server:\n  request_timeout: 0s\n", "7: server.request_timeout: must be longer than 0s"),
        ("server:\n  listen: 8080\n", "7: server.listen: \"8080\" is no address and port; write it like 0.0.0.0:8080"),
        (
            "server:\n  management_listen: x\n",
            "7: server.management_listen: \"x\" is no address and port; write it like 0.0.0.0:8080",
        ),
        (
            "server:\n  management_listen: 0.0.0.0:8080\n",
            "7: server.management_listen: is the same as server.listen; leave it out to have all on one port",
        ),
        (
            "server:\n  cors_origins:\n    - '*'\n    - https://shop.example/\n",
            "9: server.cors_origins[1]: \"https://shop.example/\" is no origin; write it like https://shop.example, or * \
             for all",
        ),
        ("cache:\n  timeout: 0s\n", "7: cache.timeout: must be longer than 0s"),
        ("cache:\n  max_entry: 0B\n", "7: cache.max_entry: must be at least 1"),
        ("cache: { local: { max_bytes: 0 } }\n", "6: cache.local.max_bytes: must be at least 1"),
        (
            "cache: { local: { warm_start: true } }\n",
            "6: cache.local.warm_start: needs redis:// or valkey:// and no cluster: there replicas note what is hot",
        ),
        ("invalidation:\n  mode: on\n", "7: invalidation.mode: \"on\" is not known here; use outbox, wal, none"),
        ("invalidation:\n  mode: kafka\n", "7: invalidation.mode: \"kafka\" is not known here; use outbox, wal, none"),
        ("invalidation:\n  max_staleness: 0s\n", "7: invalidation.max_staleness: must be longer than 0s"),
        ("telemetry:\n  sample_ratio: 2\n", "7: telemetry.sample_ratio: must be between 0 and 1"),
        ("telemetry:\n  audit_ratio: NaN\n", "7: telemetry.audit_ratio: must be between 0 and 1"),
        ("access:\n  read: everybody\n", "7: access.read: \"everybody\" is not known here; use public, token, off"),
        ("access:\n  read: true\n", "7: access.read: \"true\" is not known here; use public, token, off"),
    ] {
        complains(more, &format!("config.yaml:{expected}"));
    }
}

#[test]
fn a_number_that_does_not_fit_says_why() {
    let database = |key: &str| format!("database:\n  url: 'sqlite::memory:'\n  {key}\nresources: {{ users: }}\n");
    let error = |key: &str| parse(&database(key)).map(drop).unwrap_err();
    assert_eq!(error("pool_size: 0"), "config.yaml:3: database.pool_size: must be at least 1");
    assert!(
        error("pool_size: -1").starts_with("config.yaml:3: database.pool_size: \"-1\" is no number that fits here")
    );
    assert!(error("queue: 5000000000").starts_with("config.yaml:3: database.queue: \"5000000000\" is no number"));
    assert!(error("queue: ''").starts_with("config.yaml:3: database.queue: \"\" is no number"));
    assert_eq!(error("statement_timeout: 0s"), "config.yaml:3: database.statement_timeout: must be longer than 0s");
    assert_eq!(parse(&database("queue: 0")).unwrap().database.queue, 0);
}

#[test]
fn a_value_of_the_wrong_kind_is_described_and_never_shown() {
    for (more, expected) in [
        ("server: postgres://u:secret@h/d\n", "6: server: expected the keys cors_origins, "),
        ("cache:\n  url: [redis://u:secret@h]\n", "7: cache.url: expected one value"),
        ("cache:\n  url:\n    redis: secret\n", "7: cache.url: expected one value"),
        ("    columns: id\n", "6: resources.users.columns: expected a list, e.g. [a, b]"),
        ("  lines:\n    key: { a: b }\n", "7: resources.lines.key: expected one value or a list"),
        ("  lines:\n    key: [[id]]\n", "7: resources.lines.key[0]: expected one value"),
        ("    columns: [id, ~]\n", "6: resources.users.columns[1]: an empty item; remove it or write \"\""),
        ("    lists: [name]\n", "6: resources.users.lists: expected names with a colon below it"),
        ("queries:\n  q: SELECT 1\n", "7: queries.q: expected the keys depends_on, "),
    ] {
        let error = with(more).map(drop).unwrap_err();
        assert!(error.starts_with(&format!("config.yaml:{expected}")), "{error}");
        assert!(!error.contains("secret") && !error.contains('\n'), "{error}");
    }
}

#[test]
fn what_must_be_there_is_asked_for() {
    let missing = "config.yaml: database.url is missing: set it in the file or DATABASE_URL";
    assert_eq!(parse("resources: { users: }").map(drop), Err(missing.into()));
    assert_eq!(parse("").map(drop), Err(missing.into()));
    assert_eq!(
        parse("database:\n  url: ''\nresources: { users: }").map(drop),
        Err("config.yaml:2: database.url is missing: set it in the file or DATABASE_URL".into())
    );
    let nothing = "config.yaml: nothing is served: declare at least one resource or query";
    assert_eq!(parse("database: { url: 'sqlite::memory:' }").map(drop), Err(nothing.into()));
    assert_eq!(parse("database: { url: 'sqlite::memory:' }\nresources:\nqueries: {}\n").map(drop), Err(nothing.into()));
    complains("queries:\n  q:\n", "config.yaml:7: queries.q.sql: is missing; write the statement");
    complains("queries:\n  q:\n    sql: ' '\n", "config.yaml:8: queries.q.sql: is missing; write the statement");
    complains("cache:\n  url: ''\n", "config.yaml:7: cache.url: is empty; set it, or leave it out for memory:");
    complains("access:\n  tokens:\n    - name: ci\n", "config.yaml:8: access.tokens[0]: lacks the key \"sha256\"");
}

#[test]
fn names_have_a_form() {
    let form = "a name starts with a lower-case letter and goes on with those, digits and _";
    for name in ["Orders", "1st", "_x", "a-b", "a.b", "größe", "''"] {
        let shown = name.trim_matches('\'');
        complains(&format!("  {name}:\n"), &format!("config.yaml:6: resources.{shown}: {form}"));
    }
    for name in ["query", "queries"] {
        let taken = "this name is taken by the API; choose another and say table:";
        complains(&format!("  {name}: {{}}\n"), &format!("config.yaml:6: resources.{name}: {taken}"));
    }
    complains("queries:\n  Top: { sql: SELECT 1 }\n", &format!("config.yaml:7: queries.Top: {form}"));
    assert!(with("queries:\n  query: { sql: SELECT 1 }\n").is_ok());
}

#[test]
fn what_stands_twice_is_refused() {
    complains("    key: name\n", "config.yaml:6: the key \"key\" stands twice");
    complains("    write: [create, create]\n", "config.yaml:6: resources.users.write: \"create\" stands twice");
    complains("    columns: [id, a, a]\n", "config.yaml:6: resources.users.columns: \"a\" stands twice");
    complains("  lines:\n    key: [a, a]\n", "config.yaml:7: resources.lines.key: \"a\" stands twice");
    complains(
        "queries:\n  q: { sql: SELECT 1, params: [a, { name: a }] }\n",
        "config.yaml:7: queries.q.params: \"a\" stands twice",
    );
    let token = format!("    - {{ name: ci, sha256: {}, scopes: [read] }}\n", "ab".repeat(32));
    complains(
        &format!("access:\n  tokens:\n{token}{token}"),
        "config.yaml:9: access.tokens[1].name: \"ci\" stands twice",
    );
}

#[test]
fn values_must_fit_each_other() {
    complains("    columns: [name]\n", "config.yaml:6: resources.users.columns: lacks the key column \"id\"");
    complains(
        "    columns: []\n",
        "config.yaml:6: resources.users.columns: shows nothing; leave it out for all columns",
    );
    for kind in ["ulid", "uuidv7"] {
        complains(
            &format!("  lines:\n    key: [a, b]\n    generate_key: {kind}\n"),
            "config.yaml:8: resources.lines.generate_key: needs a key of one column",
        );
    }
    complains(
        "    local_ttl: 1s\ninvalidation: { mode: none }\n",
        "config.yaml:6: resources.users.local_ttl: needs invalidation.mode outbox or wal",
    );
    complains(
        "defaults:\n  local_ttl: 1s\ninvalidation: { mode: none }\n",
        "config.yaml:7: defaults.local_ttl: needs invalidation.mode outbox or wal",
    );
    complains(
        "    consistency: hold\n    local_ttl: 1s\n",
        "config.yaml:6: resources.users.consistency: hold can't be kept in process: set local_ttl: 0s",
    );
    complains(
        "    local_hot_ttl: 1s\ninvalidation: { mode: none }\n",
        "config.yaml:6: resources.users.local_hot_ttl: needs invalidation.mode outbox or wal",
    );
    complains(
        "    consistency: hold\n    local_hot_ttl: 1s\n",
        "config.yaml:6: resources.users.consistency: hold can't be kept in process: set local_hot_ttl: 0s",
    );
    complains(
        "    lists: { name: { limit: 0 } }\n",
        "config.yaml:6: resources.users.lists.name.limit: must be at least 1",
    );
    complains(
        "    lists: { name: { ttl: 0s } }\n",
        "config.yaml:6: resources.users.lists.name.ttl: must be longer than 0s",
    );
    assert!(with("    local_ttl: 1s\ninvalidation: { mode: wal }\n").is_ok());
}

#[test]
fn a_token_needs_a_whole_digest() {
    for digest in ["abc", &"g".repeat(64), &"ä".repeat(32)] {
        complains(
            &format!("access:\n  tokens:\n    - {{ name: ci, sha256: {digest}, scopes: [] }}\n"),
            "config.yaml:8: access.tokens[0].sha256: expected a SHA-256 as 64 hexadecimal digits (printf %s \"$TOKEN\" | \
             sha256sum)",
        );
    }
    complains(
        &format!("access:\n  tokens:\n    - {{ name: ci, sha256: {}, scopes: [raed] }}\n", "0".repeat(64)),
        "config.yaml:8: access.tokens[0].scopes[0]: \"raed\" is not known here; did you mean read?",
    );
}

#[test]
fn schemes_are_known_unknown_or_not_built_yet() {
    let database = |url: &str| parse(&format!("database:\n  url: {url}\nresources: {{ users: }}\n")).map(drop);
    let cache = |url: &str| with(&format!("cache:\n  url: {url}\n")).map(drop);
    for url in
        ["postgres://h/d", "postgresql://h/d", "mysql://h/d", "mariadb://h/d", "sqlite:file.db", "'sqlite::memory:'"]
    {
        assert_eq!(database(url), Ok(()));
    }
    for url in ["redis://h", "rediss://h", "valkey://h", "valkeys://h", "'memory:'", "redis+cluster://h,i"] {
        assert_eq!(cache(url), Ok(()));
    }
    let braces = "redis+cluster://h\n  key_prefix: 'a{b}:'";
    let expected = "config.yaml:8: cache.key_prefix: braces decide which node of a cluster holds a key: leave them out";
    assert_eq!(cache(braces), Err(expected.into()));
    let wal = parse("database:\n  url: mysql://h/d\nresources: { users: }\ninvalidation:\n  mode: wal\n").map(drop);
    assert!(wal.unwrap_err().starts_with("config.yaml:5: invalidation.mode: wal reads the log of PostgreSQL"));
    let known = "use postgres://, mysql://, mariadb:// or sqlite:";
    assert_eq!(
        database("oracle://h/d"),
        Err(format!("config.yaml:2: database.url: the scheme \"oracle\" is not known; {known}"))
    );
    assert_eq!(
        database("localhost"),
        Err("config.yaml:2: database.url: this is no URL; write it with postgres://, mysql://, mariadb:// or sqlite:"
            .into())
    );
    assert!(cache("http://h").unwrap_err().starts_with("config.yaml:7: cache.url: the scheme \"http\" is not known"));
    let replica = |more: &str| {
        let text = format!("{}  replica_url: {more}\n", &BASE[..BASE.find("resources").unwrap()]);
        parse_with(&format!("{text}resources: {{ users: }}"), &[]).map(drop)
    };
    assert_eq!(replica("postgresql://h/d"), Ok(()));
    assert_eq!(
        replica("mysql://h"),
        Err("config.yaml:3: database.replica_url: is for PostgreSQL alone: both URLs begin with postgres://".into())
    );
    assert_eq!(
        replica("postgres://h/d\ninvalidation: { mode: none }"),
        Err("config.yaml:3: database.replica_url: needs invalidation.mode outbox or wal".into())
    );
}

#[test]
fn memcached_is_told_what_it_has_not() {
    let said = |text: &str| with(text).map(drop).unwrap_err();
    for (url, words) in [
        ("memcached://", "names no host"),
        ("'memcached:h'", "names no host"),
        ("memcached://a,b", "names several hosts"),
        ("memcached://u:p@h", "has credentials"),
        ("memcached://h/1", "has more than a host and a port"),
    ] {
        let said = said(&format!("cache:\n  url: {url}\n"));
        assert!(said.starts_with(&format!("config.yaml:7: cache.url: {words}")), "{said}");
        assert!(!said.contains("u:p"), "{said}");
    }
    let cache = "cache:\n  url: memcached://h\n";
    for (line, words) in [
        ("  ca_file: /a\n", "config.yaml:8: cache.ca_file: memcached over TLS"),
        ("  key_prefix: a b\n", "config.yaml:8: cache.key_prefix: must be at most 100"),
        ("defaults:\n  local_ttl: 1s\n", "config.yaml:9: defaults.local_ttl: can't be used with memcached"),
        ("defaults:\n  local_hot_ttl: 1s\n", "config.yaml:9: defaults.local_hot_ttl: can't be used with memcached"),
    ] {
        let said = said(&format!("{cache}{line}"));
        assert!(said.starts_with(words), "{said}");
    }
}
