//! What a configuration may ask for and this version does not do: said at start, so that nobody relies on it.

use super::Config;

impl Config {
    /// What this configuration asks for and this version does not do yet: one sentence each.
    #[must_use]
    pub fn not_built_yet(&self) -> Vec<String> {
        let settings = [(
            !self.telemetry.otlp_endpoint.is_empty(),
            "telemetry.otlp_endpoint is not built yet: no traces are sent",
        )];
        settings.into_iter().filter(|(set, _)| *set).map(|(_, sentence)| sentence.to_owned()).collect()
    }
}
