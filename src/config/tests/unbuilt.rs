//! Settings that are accepted and do nothing yet say so.

use super::with;

const OUTBOX: &str = "invalidation.mode outbox is not built yet: other writers' changes are seen when the TTL ends";

#[test]
fn the_default_mode_is_named_and_none_is_silent() {
    assert_eq!(with("").unwrap().not_built_yet(), [OUTBOX]);
    assert_eq!(with("invalidation: { mode: none }\n").unwrap().not_built_yet(), [""; 0]);
    assert_eq!(with("invalidation: { mode: wal }\n").unwrap().not_built_yet(), [OUTBOX.replace("outbox", "wal")]);
}

#[test]
fn each_setting_without_effect_has_its_sentence() {
    for (more, key) in [
        ("    local_ttl: 1s\n", "local_ttl "),
        ("defaults: { local_ttl: 1s }\n", "local_ttl "),
        ("telemetry: { otlp_endpoint: 'http://c:4318' }\n", "telemetry.otlp_endpoint "),
        ("telemetry: { audit_ratio: 0.5 }\n", "telemetry.audit_ratio "),
        ("queries: { q: { sql: SELECT 1 } }\n", "queries "),
        ("access: { adhoc_queries: token }\n", "access.adhoc_queries "),
        ("    depends_on: [orders]\n", "depends_on "),
    ] {
        let sentences = with(more).unwrap().not_built_yet();
        assert_eq!(sentences.len(), 2, "{sentences:?}");
        assert!(sentences[1].starts_with(key) && sentences[1].contains("not built yet"), "{sentences:?}");
    }
    let replica = super::parse("database: { url: 'sqlite:a', replica_url: 'sqlite:b' }\nresources: { users: }\n");
    assert!(replica.unwrap().not_built_yet()[1].starts_with("database.replica_url is not built yet"));
}
