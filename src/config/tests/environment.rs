//! `${NAME}`, the well-known variables, overrides, composed URLs, and who beats whom.

use std::time::Duration;

use super::{BASE, bare, parse_with, under};
use crate::config::{AccessLevel, WriteKind};

#[test]
fn a_value_may_name_a_variable() {
    let prefix = |text: &str, variables: &[(&str, &str)]| {
        let text = format!("{BASE}cache:\n  key_prefix: {text}\n");
        parse_with(&text, variables).map(|config| config.cache.key_prefix)
    };
    let set = [("NAME", "x"), ("EMPTY", "")];
    for (text, expected) in [
        ("${NAME}", "x"),
        ("a-${NAME}-${NAME}-b", "a-x-x-b"),
        ("'${NAME}:'", "x:"),
        ("${EMPTY}", ""),
        ("${EMPTY:-d}", "d"),
        ("${NAME:-d}", "x"),
        ("${NONE:-d}", "d"),
        ("'${NONE:-}'", ""),
        ("'${NONE:-a:-b}'", "a:-b"),
        ("$NAME $ $$ 1$", "$NAME $ $$ 1$"),
        ("$${NAME}", "${NAME}"),
        ("$${ ${NAME}", "${ x"),
        ("\"{${NAME}}\"", "{x}"),
    ] {
        assert_eq!(prefix(text, &set).as_deref(), Ok(expected), "for {text}");
    }
    for (text, expected) in [
        ("${NONE}", "${NONE} is not set; set it, or write ${NONE:-default}"),
        ("'${NAME'", "a ${ without its }; write $${ for the two characters"),
        ("'${}'", "${} names no variable; write ${NAME} or ${NAME:-default}"),
        ("'${NAME:?no}'", "${NAME:?no} names no variable; write ${NAME} or ${NAME:-default}"),
        ("'${NONE:-${NAME}}'", "the default of ${NONE} can't hold another ${"),
    ] {
        let expected = format!("config.yaml:7: cache.key_prefix: {expected}");
        assert_eq!(prefix(text, &set), Err(expected), "for {text}");
    }
}

#[test]
fn what_a_variable_holds_is_text_and_no_yaml() {
    let text = format!("{BASE}cache:\n  key_prefix: ${{P}}\n");
    let config = parse_with(&text, &[("P", "a: [b] # c\n${P} \"")]).unwrap();
    assert_eq!(config.cache.key_prefix, "a: [b] # c\n${P} \"");
}

#[test]
fn overrides_reach_every_kind_of_value() {
    let hash = "AB".repeat(32);
    let tokens = format!("[{{name: ci, sha256: {hash}, scopes: [read]}}]");
    let config = under(&[
        ("CACHE_ASIDE__SERVER__LISTEN", "127.0.0.1:1"),
        ("CACHE_ASIDE__SERVER__CORS_ORIGINS", "https://a.example, https://b.example"),
        ("CACHE_ASIDE__CACHE__LOCAL__MAX_BYTES", "1KiB"),
        ("CACHE_ASIDE__CACHE__KEY_PREFIX", "{app}:"),
        ("CACHE_ASIDE__RESOURCES__USERS__TTL", "5s"),
        ("CACHE_ASIDE__RESOURCES__USERS__KEY", "a,b"),
        ("CACHE_ASIDE__RESOURCES__USERS__COLUMNS", "[a, b, 'c,d']"),
        ("CACHE_ASIDE__RESOURCES__USERS__WRITE", "create,delete"),
        ("CACHE_ASIDE__RESOURCES__USERS__LISTS__NAME__LIMIT", "7"),
        ("CACHE_ASIDE__RESOURCES__FRUIT", "{table: fruits}"),
        ("CACHE_ASIDE__RESOURCES__FRUIT__TTL", "9s"),
        ("CACHE_ASIDE__Access__Read", "off"),
        ("CACHE_ASIDE__ACCESS__TOKENS", &tokens),
        ("CACHE_ASIDE_CONFIG", "/nowhere"),
        ("CACHE_ASIDE_ELSE", "no override"),
    ])
    .unwrap();
    let users = &config.resources["users"];
    assert_eq!(config.server.listen.to_string(), "127.0.0.1:1");
    assert_eq!(config.server.cors_origins, ["https://a.example", "https://b.example"]);
    assert_eq!((config.cache.local.max_bytes, config.cache.key_prefix.as_str()), (1024, "{app}:"));
    assert_eq!((users.ttl, &users.key), (Some(Duration::from_secs(5)), &vec!["a".into(), "b".into()]));
    assert_eq!(users.columns.as_deref(), Some(&["a".to_owned(), "b".into(), "c,d".into()][..]));
    assert_eq!(users.write, [WriteKind::Create, WriteKind::Delete]);
    assert_eq!(users.lists["name"].limit, 7);
    assert_eq!(config.resources["fruit"].table, "fruits");
    assert_eq!(config.resources["fruit"].ttl, Some(Duration::from_secs(9)));
    assert_eq!(config.access.read, AccessLevel::Off);
    assert_eq!(config.access.tokens[0].sha256.0, [0xab; 32]);
    let emptied = under(&[("CACHE_ASIDE__RESOURCES__USERS__WRITE", ""), ("CACHE_ASIDE__DATABASE__CA_FILE", "ca.pem")]);
    let emptied = emptied.unwrap();
    assert!(emptied.resources["users"].write.is_empty());
    assert_eq!(emptied.database.ca_file.as_deref(), Some(std::path::Path::new("ca.pem")));
}

#[test]
fn overrides_find_names_as_the_file_writes_them() {
    let text =
        "database: { url: 'sqlite::memory:' }\nresources:\n  my__users:\n    lists: { OwnerId: }\naccess:\n  tokens:\n";
    let text = format!("{text}  - {{ name: a, sha256: {}, scopes: [] }}\n", "0".repeat(64));
    let config = parse_with(
        &text,
        &[
            ("CACHE_ASIDE__RESOURCES__MY__USERS__LISTS__OWNERID__LIMIT", "7"),
            ("CACHE_ASIDE__ACCESS__TOKENS__0__NAME", "ci"),
        ],
    )
    .unwrap();
    assert_eq!(config.resources["my__users"].lists["OwnerId"].limit, 7);
    assert_eq!(config.access.tokens[0].name, "ci");
}

#[test]
fn an_override_that_fits_nowhere_is_refused() {
    for (variable, value, expected) in [
        ("CACHE_ASIDE__DATABASE__URLL", "x", "there is no such key; did you mean CACHE_ASIDE__DATABASE__URL?"),
        ("CACHE_ASIDE__SEVER__LISTEN", "x", "there is no such key; did you mean CACHE_ASIDE__SERVER?"),
        (
            "CACHE_ASIDE__INVALIDATION__ZZZ",
            "x",
            "there is no such key; after CACHE_ASIDE__INVALIDATION__ may stand MAX_STALENESS, MODE",
        ),
        (
            "CACHE_ASIDE__SERVER__LISTEN__PORT",
            "1",
            "there is no such key; CACHE_ASIDE__SERVER__LISTEN is as far as names go here",
        ),
        (
            "CACHE_ASIDE__ACCESS__TOKENS__0__NAME",
            "x",
            "there is no such key; CACHE_ASIDE__ACCESS__TOKENS is as far as names go here",
        ),
        (
            "CACHE_ASIDE__RESOURCES__USERS__TTTL_FILE",
            "x",
            "there is no such key; did you mean CACHE_ASIDE__RESOURCES__USERS__TTL?",
        ),
        ("CACHE_ASIDE__RESOURCES__USERS__TTL", "5", "resources.users.ttl: \"5\" has no unit; add a unit, e.g. 5s"),
        ("CACHE_ASIDE__RESOURCES__USERS__WRITE", "create,create", "resources.users.write: \"create\" stands twice"),
        ("CACHE_ASIDE__RESOURCES__USERS__WRITE", "[create", "no valid YAML"),
        ("CACHE_ASIDE__RESOURCES__USERS", "{tttl: 1s}", "resources.users.tttl: unknown key; did you mean \"ttl\"?"),
        ("CACHE_ASIDE__ACCESS__TOKENS", "abc", "access.tokens[0]: expected the keys name, scopes, sha256 below it"),
        ("CACHE_ASIDE__SERVER__MAX_BATCH", "0", "server.max_batch: must be at least 1"),
    ] {
        let error = under(&[(variable, value)]).map(drop).unwrap_err();
        let place = error.strip_prefix(variable).unwrap_or_else(|| panic!("{error}"));
        assert!(place.contains(expected), "{error}");
    }
    let near = under(&[("CACHE_ASIDE__", "x"), ("CACHE_ASIDE____URL", "x")]).map(drop).unwrap_err();
    assert!(
        near.starts_with("CACHE_ASIDE__: there is no such key; after CACHE_ASIDE__ may stand ACCESS, CACHE"),
        "{near}"
    );
}

#[test]
fn well_known_variables_stand_between_overrides_and_the_file() {
    let text = format!("{BASE}cache: {{ url: redis://file }}\ndefaults: {{ ttl: 1m }}\n");
    let read = |variables: &[(&str, &str)]| {
        let config = parse_with(&text, variables).unwrap();
        let urls = (config.database.url.expose().to_owned(), config.cache.url.expose().to_owned());
        (urls.0, urls.1, config.defaults.ttl.as_secs())
    };
    let file = "postgres://app:secret@db/grocery";
    assert_eq!(read(&[]), (file.into(), "redis://file".into(), 60));
    assert_eq!(read(&[("DATABASE_URL", ""), ("CACHE_URL", ""), ("CACHE_TTL", "")]), read(&[]));
    let known = [("DATABASE_URL", "sqlite:a"), ("REDIS_URL", "redis://r"), ("CACHE_TTL", "7")];
    assert_eq!(read(&known), ("sqlite:a".into(), "redis://r".into(), 7));
    assert_eq!(read(&[("REDIS_URL", "redis://r"), ("CACHE_URL", "redis://c"), ("CACHE_TTL", "2m")]).1, "redis://c");
    assert_eq!(read(&[("CACHE_TTL", "2m")]).2, 120);
    let all = [("DATABASE_URL", "sqlite:a"), ("CACHE_TTL", "7"), ("CACHE_ASIDE__DATABASE__URL", "sqlite:b")];
    assert_eq!(read(&all).0, "sqlite:b");
    assert_eq!(read(&[("CACHE_TTL", "7"), ("CACHE_ASIDE__DEFAULTS__TTL", "8s")]).2, 8);
    // Parts are the last resort.
    assert_eq!(read(&[("DB_HOST", "h"), ("DB_ENGINE", "oracle"), ("CACHE_HOST", "h")]), read(&[]));
    assert_eq!(under(&[("CACHE_TTL", "0")]).map(drop), Err("CACHE_TTL: defaults.ttl: must be longer than 0s".into()));
    assert_eq!(
        under(&[("DATABASE_URL", "oracle://h/d")]).map(drop),
        Err(
            "DATABASE_URL: database.url: the scheme \"oracle\" is not known; use postgres://, mysql://, mariadb:// or sqlite:"
                .into()
        )
    );
}

#[test]
fn telemetry_has_its_own_variables() {
    let config = under(&[("OTEL_EXPORTER_OTLP_ENDPOINT", "http://c:4318"), ("OTEL_SERVICE_NAME", "shop")]).unwrap();
    assert_eq!(
        (config.telemetry.otlp_endpoint.as_str(), config.telemetry.service_name.as_str()),
        ("http://c:4318", "shop")
    );
    assert_eq!(under(&[("OTEL_SERVICE_NAME", "")]).unwrap().telemetry.service_name, "cache-aside");
}

#[test]
fn a_database_url_is_composed_of_parts() {
    let url = |variables: &[(&str, &str)]| {
        bare(variables).map(|config| config.map(|config| config.database.url.expose().to_owned()))
    };
    for (variables, expected) in [
        (&[("DB_HOST", "db")][..], "postgres://postgres@db:5432"),
        (&[("DB_NAME", "shop")], "postgres://postgres@localhost:5432/shop"),
        (&[("DB_HOST", "db"), ("DB_PORT", "tcp://10.0.0.1:5432")], "postgres://postgres@db:5432"),
        (
            &[
                ("DB_ENGINE", "postgresql"),
                ("DB_HOST", "db"),
                ("DB_PORT", "6000"),
                ("DB_USER", "a@b"),
                ("DB_PASSWORD", "p:/?#ä"),
                ("DB_NAME", "x y"),
            ],
            "postgres://a%40b:p%3A%2F%3F%23%C3%A4@db:6000/x%20y",
        ),
        (&[("DB_HOST", "::1")], "postgres://postgres@[::1]:5432"),
        (&[("DB_HOST", "/run/pg")], "postgres://postgres@%2Frun%2Fpg:5432"),
        (&[("DB_HOST", "h"), ("DB_ENGINE", "mariadb")], "mariadb://root@h:3306"),
        (&[("DB_ENGINE", "sqlite"), ("DB_NAME", "/data/a.db")], "sqlite:/data/a.db"),
        (&[("DB_ENGINE", "sqlite"), ("DB_HOST", "ignored")], "sqlite::memory:"),
    ] {
        assert_eq!(url(variables), Ok(Some(expected.to_owned())));
    }
    for (variables, expected) in [
        (
            &[("DB_ENGINE", "oracle"), ("DB_HOST", "h")][..],
            "DB_ENGINE: \"oracle\" is not known; use postgres, mysql, mariadb or sqlite",
        ),
        (&[("DB_HOST", "h"), ("DB_PORT", "x")], "DB_PORT: \"x\" is no port; write a number up to 65535"),
    ] {
        assert_eq!(url(variables), Err(expected.to_owned()));
    }
    assert_eq!(url(&[("DB_USER", "u"), ("DB_PORT", "1")]), Ok(None));
    assert_eq!(url(&[("DB_HOST", "h"), ("DATABASE_URL", "sqlite:a")]), Ok(Some("sqlite:a".into())));
}

#[test]
fn a_cache_url_is_composed_of_parts() {
    let url = |variables: &[(&str, &str)]| under(variables).map(|config| config.cache.url.expose().to_owned());
    for (variables, expected) in [
        (&[][..], "memory:"),
        (&[("CACHE_HOST", "c")], "redis://c:6379"),
        (&[("CACHE_HOST", "c"), ("CACHE_PORT", "7"), ("CACHE_ENGINE", "valkey")], "valkey://c:7"),
        (&[("CACHE_HOST", "c"), ("CACHE_ENGINE", "memcached")], "memcached://c:11211"),
        (&[("CACHE_HOST", "c"), ("CACHE_PORT", "tcp://10.0.0.1:7")], "redis://c:6379"),
        (&[("CACHE_HOST", "::1")], "redis://[::1]:6379"),
        (&[("CACHE_ENGINE", "memory"), ("CACHE_HOST", "c")], "memory:"),
        (&[("CACHE_ENGINE", "redis")], "redis://localhost:6379"),
        (&[("CACHE_HOST", "c"), ("REDIS_URL", "redis://r")], "redis://r"),
    ] {
        assert_eq!(url(variables), Ok(expected.to_owned()));
    }
    assert_eq!(
        url(&[("CACHE_ENGINE", "hazelcast")]),
        Err("CACHE_ENGINE: \"hazelcast\" is not known; use redis, valkey, memcached or memory".into())
    );
}

#[cfg(unix)]
#[test]
fn a_variable_that_is_not_text_is_an_error_only_where_it_is_read() {
    use std::ffi::OsString;
    use std::os::unix::ffi::OsStringExt;

    use crate::config::{Config, Env};

    let garbled = || OsString::from_vec(vec![b'a', 0xff]);
    let load = |text: &str, name: OsString| {
        let env = Env::from_os([(name, garbled()), ("GOOD".into(), "g".into())]);
        assert_eq!(env.get("GOOD"), Some("g"));
        Config::from_yaml(text, "config.yaml", &env).map(drop).map_err(|error| error.to_string())
    };
    assert_eq!(load(BASE, "UNREAD".into()), Ok(()));
    assert_eq!(load(BASE, garbled()), Ok(()));
    for name in ["CACHE_TTL", "DATABASE_URL_FILE", "CACHE_ASIDE__SERVER__LISTEN", "OTEL_SERVICE_NAME"] {
        assert_eq!(load(BASE, name.into()), Err(format!("{name}: its value is not UTF-8")));
    }
    assert_eq!(
        load(&format!("{BASE}cache:\n  key_prefix: ${{P:-x}}\n"), "P".into()),
        Err("config.yaml:7: cache.key_prefix: P: its value is not UTF-8".into())
    );
}
