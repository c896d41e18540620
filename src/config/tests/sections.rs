//! Defaults, forms, and the example of the documentation.

use std::time::Duration;

use super::{parse, with};
use crate::config::{
    AccessLevel, Config, Consistency, Defaults, GenerateKey, InvalidationMode, List, LogFormat, Parameter, Scope,
    WriteKind,
};

/// The documented example, with the defaults written out and a digest that is one.
const EXAMPLE: &str = include_str!("example.yaml");

#[test]
fn the_documented_example_parses() {
    let config = parse(EXAMPLE).unwrap();
    let (users, products) = (&config.resources["users"], &config.resources["products"]);
    assert_eq!(config.server.management_listen.unwrap().port(), 9090);
    assert_eq!((config.database.replica_url, config.database.ca_file), (None, None));
    assert_eq!(users.generate_key, GenerateKey::Ulid);
    assert_eq!(users.write, [WriteKind::Create, WriteKind::Update, WriteKind::Delete]);
    assert_eq!((users.ttl, users.consistency), (Some(Duration::from_secs(10)), Consistency::Fenced));
    let list = List { ttl: Some(Duration::from_hours(1)), order_by: Some("name".into()), limit: 1000 };
    assert_eq!(products.lists["category_id"], list);
    let airline = &config.queries["airline"];
    assert_eq!(airline.sql, "SELECT * FROM airline WHERE airline_id = $1");
    assert_eq!(airline.params, [Parameter { name: "airline_id".into(), default: None }]);
    assert_eq!(config.invalidation.mode, InvalidationMode::Outbox);
    assert_eq!(config.access.adhoc_queries, AccessLevel::Off);
    assert_eq!(config.access.tokens[0].sha256.0[..2], [0x9f, 0x86]);
    let scopes = [Scope::Read, Scope::Write, Scope::Refresh, Scope::Admin, Scope::Query];
    assert_eq!(config.access.tokens[0].scopes, scopes);
    assert_eq!((config.telemetry.log, config.telemetry.sample_ratio), (LogFormat::Json, 0.1));
}

#[test]
fn the_documented_defaults_are_the_defaults() {
    let written = parse(EXAMPLE).unwrap();
    let plain = Config::default();
    assert_eq!(
        written.server,
        crate::config::Server { management_listen: written.server.management_listen, ..plain.server }
    );
    assert_eq!(written.database, crate::config::Database { url: written.database.url.clone(), ..plain.database });
    assert_eq!(written.cache, crate::config::Cache { url: written.cache.url.clone(), ..plain.cache });
    assert_eq!(written.defaults, plain.defaults);
    assert_eq!(written.invalidation, plain.invalidation);
    assert_eq!(written.access, crate::config::Access { tokens: written.access.tokens.clone(), ..plain.access });
}

#[test]
fn a_resource_inherits_what_it_does_not_say() {
    let config = with(
        "    ttl: 5s\n    refresh_ahead: 0\ndefaults: { ttl: 1m, negative_ttl: 0 }\nqueries: { q: { sql: x, ttl: 9s } }\n",
    );
    let config = config.unwrap();
    let inherited = Defaults { ttl: Duration::from_mins(1), negative_ttl: Duration::ZERO, ..Defaults::default() };
    let users = config.defaults.for_resource(&config.resources["users"]);
    assert_eq!(users, Defaults { ttl: Duration::from_secs(5), refresh_ahead: 0.0, ..inherited.clone() });
    assert_eq!(config.defaults.for_query(&config.queries["q"]), Defaults { ttl: Duration::from_secs(9), ..inherited });
}

#[test]
fn a_tier_in_process_is_opened_only_where_something_is_held_there() {
    assert!(!with("").unwrap().holds_in_process());
    assert!(with("    local_ttl: 1s\n").unwrap().holds_in_process());
    assert!(with("    local_hot_ttl: 1s\n").unwrap().holds_in_process());
    assert!(!with("    local_hot_ttl: 0s\ndefaults: { negative_ttl: 1s }\n").unwrap().holds_in_process());
}

#[test]
fn a_resource_needs_only_its_name() {
    let config = with("  fruit:\n  pears: {}\n  plums: { table: shop.plum, key: [a, b] }\n").unwrap();
    let fruit = &config.resources["fruit"];
    assert_eq!((fruit.table.as_str(), fruit.key.len(), &fruit.columns), ("fruit", 0, &None));
    assert_eq!((fruit.generate_key, fruit.write.len()), (GenerateKey::Database, 0));
    assert_eq!(config.resources["pears"].table, "pears");
    assert_eq!(config.resources["plums"].key, ["a", "b"]);
    assert_eq!(config.resources["users"].key, ["id"]);
}

#[test]
fn a_list_or_a_parameter_has_a_short_form() {
    let config = with(
        "    lists: { a: {}, b: , c: { limit: 3 } }\nqueries:\n  q: { sql: x, params: [a, { name: b, default: 1 }] }\n",
    );
    let config = config.unwrap();
    let lists = &config.resources["users"].lists;
    assert_eq!((&lists["a"], &lists["b"], lists["c"].limit), (&List::default(), &List::default(), 3));
    let second = Parameter { name: "b".into(), default: Some("1".into()) };
    assert_eq!(config.queries["q"].params, [Parameter { name: "a".into(), default: None }, second]);
}

#[test]
fn off_may_have_become_false() {
    for off in ["off", "false", "False", "'off'"] {
        assert_eq!(with(&format!("access: {{ read: {off} }}\n")).unwrap().access.read, AccessLevel::Off);
    }
}

#[test]
fn durations_and_sizes_have_units() {
    for (text, milliseconds) in [
        ("250ms", 250),
        ("10s", 10_000),
        ("5m", 300_000),
        ("1h", 3_600_000),
        ("1d", 86_400_000),
        ("0", 0),
        ("0s", 0),
        ("10 s", 10_000),
    ] {
        let config = with(&format!("server: {{ drain_delay: {text} }}\n")).unwrap();
        assert_eq!(config.server.drain_delay, Duration::from_millis(milliseconds), "{text}");
    }
    for (text, bytes) in
        [("1", 1), ("512B", 512), ("64KiB", 65_536), ("1MiB", 1 << 20), ("1GiB", 1 << 30), ("2 MiB", 2 << 20)]
    {
        assert_eq!(with(&format!("server: {{ max_body: {text} }}\n")).unwrap().server.max_body, bytes, "{text}");
    }
    for text in ["1kib", "KiB", "1.5MiB", "-1", "99999999999GiB", "18446744073709551615"] {
        assert!(with(&format!("server: {{ max_body: {text} }}\n")).is_err(), "{text}");
    }
}
