//! YAML itself: what is read, and where reading stops.

use super::{BASE, parse, with};

#[test]
fn broken_yaml_names_its_line() {
    let error = with("cache: [\n").map(drop).unwrap_err();
    assert!(error.starts_with("config.yaml:7: no valid YAML: "), "{error}");
    let error = with("\tcache: 1\n").map(drop).unwrap_err();
    assert!(error.starts_with("config.yaml:6: ") || error.starts_with("config.yaml:5: "), "{error}");
    assert_eq!(
        parse("- a\n").map(drop),
        Err("config.yaml:1: expected sections such as database: and resources:".into())
    );
}

#[test]
fn one_document_is_the_whole_file() {
    let second = Err("config.yaml:6: a second document; keep one in the file".to_owned());
    assert_eq!(with("---\nserver: {}\n").map(drop), second);
    assert_eq!(with("---\n").map(drop), second);
    assert!(parse(&format!("# a comment\n---\n{BASE}...\n")).is_ok());
    assert!(parse(&format!("\u{feff}{BASE}")).is_ok());
    assert!(parse(&BASE.replace('\n', "\r\n")).is_ok());
}

#[test]
fn text_stays_text() {
    for (written, read) in
        [("123", "123"), ("007", "007"), ("'on'", "on"), ("1e3", "1e3"), ("~", ""), ("\"~\"", "~"), ("true", "true")]
    {
        assert_eq!(with(&format!("cache: {{ key_prefix: {written} }}\n")).unwrap().cache.key_prefix, read);
    }
    let config = with("server: { max_batch: '12' }\ncache: { max_entry: 0x10 }\n");
    assert!(config.unwrap_err().contains("\"0x10\" is no size"));
    assert_eq!(with("server: { max_batch: 0x10 }\n").unwrap().server.max_batch, 16);
    assert_eq!(with("server: { max_batch: 0o17 }\n").unwrap().server.max_batch, 15);
}

#[test]
fn an_empty_value_is_the_default() {
    let plain = with("").unwrap();
    let empty = "server:\ncache:\n  local:\n  url:\n  timeout: ~\ndefaults: { ttl: null }\naccess:\n  tokens:\n";
    assert_eq!(with(empty).unwrap(), plain);
}

#[test]
fn an_anchor_may_be_used_again() {
    let config = with("    write: &all [create, update]\n  orders:\n    write: *all\n").unwrap();
    assert_eq!(config.resources["users"].write, config.resources["orders"].write);
    let error = with("    write: &all [create, create]\n  orders:\n    write: *all\n").map(drop).unwrap_err();
    assert!(error.starts_with("config.yaml:8: resources.orders.write"), "{error}");
    let error = with("    columns: *none\n").map(drop).unwrap_err();
    assert!(error.starts_with("config.yaml:6: no valid YAML"), "{error}");
    assert!(with("    columns: &own [*own]\n").is_err());
}

#[test]
fn aliases_can_not_multiply_without_end() {
    let mut bomb = String::from("a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n");
    for level in 1..12 {
        let before = format!("*a{}", level - 1);
        bomb.extend([format!("a{level}: &a{level} [{}]\n", vec![before; 10].join(", "))]);
    }
    let error = parse(&bomb).map(drop).unwrap_err();
    assert!(error.ends_with("too many values for a configuration"), "{error}");
    let long = format!("a: [{}]\n", "x,".repeat(100_001));
    assert_eq!(parse(&long).map(drop), Err("config.yaml:1: too many values for a configuration".into()));
}

#[test]
fn nesting_ends_somewhere_also_through_aliases() {
    let deep = |levels: usize| format!("{}{}", "[".repeat(levels), "]".repeat(levels));
    assert_eq!(parse(&format!("a: {}", deep(100))).map(drop), Err("config.yaml:1: nested too deep".into()));
    let chained = format!("a: &a {}\nb: {}*a{}\n", deep(40), "[".repeat(40), "]".repeat(40));
    assert_eq!(parse(&chained).map(drop), Err("config.yaml:2: nested too deep".into()));
    // Far past the limit the parser itself may be the one to refuse.
    assert!(parse(&format!("a: {}", deep(100_000))).is_err());
    assert!(parse(&"- ".repeat(100_000)).is_err());
    assert!(parse(&"? ".repeat(100_000)).is_err());
}

#[test]
fn tags_of_other_programs_are_refused() {
    let refused = Err("config.yaml:6: the tag !include is not known here".to_owned());
    assert_eq!(with("server: !include server.yaml\n").map(drop), refused);
    assert!(with("cache: { key_prefix: !!str 1 }\n").is_ok());
    assert!(with("cache: { key_prefix: ! a }\n").is_ok());
}

#[test]
fn a_key_is_text() {
    let key = Err("config.yaml:6: a key must be text".to_owned());
    assert_eq!(with("? [a, b]\n: c\n").map(drop), key);
    assert!(with("<<: { server: {} }\n").unwrap_err().starts_with("config.yaml:6: <<: unknown key"));
}
