//! Settings that are accepted and do nothing yet say so.

use super::with;

#[test]
fn what_is_built_is_silent() {
    for built in ["", "invalidation: { mode: none }\n", "    depends_on: [orders]\n", "    local_ttl: 1s\n"] {
        assert_eq!(with(built).unwrap().not_built_yet(), [""; 0]);
    }
}

#[test]
fn each_setting_without_effect_has_its_sentence() {
    let sentences = with("telemetry: { otlp_endpoint: 'http://c:4318' }\n").unwrap().not_built_yet();
    assert_eq!(sentences.len(), 1, "{sentences:?}");
    assert!(sentences[0].starts_with("telemetry.otlp_endpoint is not built yet"), "{sentences:?}");
}
