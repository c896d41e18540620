//! Passwords are printed nowhere.

use super::{BASE, parse_with, with};
use crate::config::SecretUrl;

#[test]
fn a_url_is_shown_without_its_password() {
    for (url, shown) in [
        ("postgres://app:secret@db:5432/grocery", "postgres://…@db:5432/grocery"),
        ("postgres://app:se?cret@db/grocery?sslmode=verify-full", "postgres://…@db/grocery"),
        ("postgres://app:se/cr@et@db/grocery", "postgres://…@db/grocery"),
        ("postgres://db/grocery?user=app&password=secret", "postgres://db/grocery"),
        ("rediss://:secret@cache:6379/0", "rediss://…@cache:6379/0"),
        ("sqlite:/data/shop.db", "sqlite:/data/shop.db"),
        ("memory:", "memory:"),
        ("", ""),
    ] {
        let url = SecretUrl::new(url);
        assert_eq!(url.to_string(), shown);
        assert_eq!(format!("{url:?}"), shown);
    }
}

#[test]
fn a_configuration_is_printed_without_passwords() {
    let text = format!("{BASE}cache: {{ url: 'redis://:secret@h' }}\n")
        .replace("resources:", "  replica_url: postgres://u:secret@r/d\nresources:");
    let config = parse_with(&text, &[]).unwrap();
    assert_eq!(config.database.url.expose(), "postgres://app:secret@db/grocery");
    assert_eq!(config.database.url.scheme(), "postgres");
    assert!(!format!("{config:#?}").contains("secret"));
}

#[test]
fn no_complaint_repeats_a_password() {
    for more in [
        "cache:\n  url: [redis://:secret@h]\n",
        "cache: redis://:secret@h\n",
        "cache:\n  url: redis+unheard-of://:secret@h\n",
        "cache:\n  url: hazelcast://:secret@h\n",
        "cache:\n  - redis://:secret@h\n",
        "telemetry: redis://:secret@h\n",
    ] {
        let error = with(more).map(drop).unwrap_err();
        assert!(!error.contains("secret"), "{error}");
    }
    let error = parse_with(BASE, &[("CACHE_ASIDE__DATABASE", "postgres://u:secret@h/d")]).map(drop).unwrap_err();
    assert!(
        error.starts_with("CACHE_ASIDE__DATABASE: database: expected the keys ") && !error.contains("secret"),
        "{error}"
    );
}
