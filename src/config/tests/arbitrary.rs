//! Whatever somebody feeds it, it answers.

use proptest::prelude::*;

use super::{BASE, env};
use crate::config::Config;

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_text_gets_an_answer(text in any::<String>()) {
        drop(Config::from_yaml(&text, "config.yaml", &env(&[])));
    }

    #[test]
    fn any_yaml_like_text_gets_an_answer(text in "([ \n:,\\[\\]{}&*a!?|>'\"#%@`~$<-]|a: |- |\\$\\{|ttl|users){0,60}") {
        drop(Config::from_yaml(&text, "config.yaml", &env(&[("a", "b")])));
        drop(Config::from_yaml(&format!("{BASE}    {text}"), "config.yaml", &env(&[])));
    }

    #[test]
    fn any_override_gets_an_answer(
        path in "([A-Za-z0-9_]|__|SERVER|RESOURCES|USERS|TTL|KEY|_FILE|ACCESS|TOKENS){0,8}", value in any::<String>(),
    ) {
        drop(Config::from_yaml(BASE, "config.yaml", &env(&[(&format!("CACHE_ASIDE__{path}"), &value)])));
    }

    #[test]
    fn any_value_gets_an_answer(value in any::<String>(), key in 0_usize..8) {
        let names = ["CACHE_TTL", "DATABASE_URL", "DB_HOST", "DB_PORT", "CACHE_HOST", "CACHE_ASIDE__SERVER__MAX_BODY",
            "CACHE_ASIDE__SERVER__LISTEN", "CACHE_ASIDE__RESOURCES"];
        drop(Config::from_yaml(BASE, "config.yaml", &env(&[(names[key], &value)])));
        drop(Config::load(None, &env(&[(names[key], &value)])));
    }

    #[test]
    fn a_message_has_one_line(text in "[a-z\n:{} -]{0,40}") {
        if let Err(error) = Config::from_yaml(&text, "config.yaml", &env(&[])) {
            prop_assert!(!error.to_string().contains('\n'), "{error}");
        }
    }
}
