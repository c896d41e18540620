//! The examples: each is run as its readers run it, and says what its comments promise.

use std::path::Path;
use std::process::Command;

use crate::servers::Redis;

/// Runs an example that `cargo test` has built, and gives what it printed.
fn run(name: &str, redis: Option<&str>) -> String {
    let beside = Path::new(env!("CARGO_BIN_EXE_cache-aside")).parent().expect("a program is in a folder");
    let mut command = Command::new(beside.join("examples").join(name));
    command.env_remove("REDIS_URL").envs(redis.map(|url| ("REDIS_URL", url)));
    let done = command.output().unwrap_or_else(|error| panic!("{name}: {error}; `cargo build --examples` makes it"));
    let text = String::from_utf8(done.stdout).expect("it prints text");
    assert!(done.status.success(), "{name}: {text}\n{}", String::from_utf8_lossy(&done.stderr));
    text
}

/// What it does not say, where all of that is to come in this order, each in a line after the one before.
fn lacks<'a>(text: &str, expected: &[&'a str]) -> Option<&'a str> {
    let mut lines = text.lines();
    expected.iter().copied().find(|words| !lines.any(|line| line.contains(words)))
}

/// Runs it until it says all of that, three times at most: an example waits for its cache no longer than a program does, and
/// where the machine stands still for a moment it goes on without.
fn says(name: &str, redis: Option<&str>, expected: &[&str]) {
    for left in (0..3).rev() {
        let text = run(name, redis);
        let Some(words) = lacks(&text, expected) else { return };
        assert!(left > 0, "{name} does not say {words:?} where it should:\n{text}");
    }
}

#[tokio::test]
async fn each_example_runs_and_says_what_it_promises() {
    let url = Redis::shared().await.url();
    for (name, expected) in [
        (
            "users",
            &[
                "Angelica Hill (miss, stored)",
                "Angelica Hill (hit)",
                "renamed and invalidated",
                "Angelica Kern (miss, stored)",
                "Angelica Kern (hit)",
                "not found (miss, stored)",
                "not found (hit)",
                "asked for 3 user(s)",
                "4 found",
            ][..],
        ),
        (
            "sessions",
            &[
                "nobody is logged in (miss)",
                "[1] in the cart (miss, stored)",
                "[1] in the cart (hit)",
                "[1, 4] in the cart (miss, stored)",
                "[1, 4] in the cart (hit)",
                "nobody is logged in (miss)",
            ],
        ),
        (
            "own_loader",
            &[
                "100 readers at once: 1 call(s)",
                r#"[Some("Linz: fair"), Some("Graz: fair"), None, Some("Wien: fair")], 1 call(s)"#,
                r#"the service down: Some("Graz: fair") (stale)"#,
                "the loader failed: the weather service does not answer",
                r#"the service is back: Some("Graz: fair")"#,
            ],
        ),
        (
            "catalogue",
            &[
                "Orange (miss, stored)",
                "Orange (hit)",
                "Apple, Orange (miss, stored)",
                "Apple, Orange (hit)",
                "Carrot (miss, stored)",
                "both lists are invalidated",
                "Orange (miss, stored)",
                "category 1  Apple (miss, stored)",
                "Carrot, Orange (miss, stored)",
                "created     Pear",
                "Apple, Pear (miss, stored)",
                "Carrot, Orange (hit)",
                r#"[Some("Apple"), None, Some("Pear")]"#,
            ],
        ),
        (
            "cached_sql",
            &[
                ":query:",
                "first execution      LH Lufthansa (miss, stored)",
                "second execution     LH Lufthansa (hit)",
                "forced refresh       LH Lufthansa (refresh, stored)",
                "after the refresh    LH Lufthansa (hit)",
                "after that           LH Lufthansa (miss, stored)",
                "declared statement   AF Air France, KL KLM, LH Lufthansa (miss, stored)",
                "and again            AF Air France, KL KLM, LH Lufthansa (hit)",
                "is refused",
            ],
        ),
    ] {
        says(name, None, expected);
        if ["users", "catalogue"].contains(&name) {
            says(name, Some(&url), expected);
        }
    }
}
