//! A cache behind TLS and a user of its own: what the docs say is enough is, and what is missing or wrong is told in words.

use std::fmt::Write as _;

use crate::app::{App, World, command};
use crate::invalidation::{self, SCHEMA, with_cascades};
use crate::servers::{Kind, Redis};
use crate::tls::{certificates, openssl};
use crate::{cache_suite, tier, valkey};

const PASSWORD: &str = "pass-that-nobody-sees";

/// The user of the docs, under this name, less one right.
fn user(name: &str, without: &str) -> String {
    let docs = include_str!("../../docs/redis.md");
    let line = docs.lines().find_map(|line| line.strip_prefix("ACL SETUSER cache-aside ")).expect("the docs say it");
    let words = line.split(' ').filter(|word| *word != without);
    let line = words.collect::<Vec<_>>().join(" ").replace("PASSWORD", PASSWORD);
    format!("user {name} {line}\n")
}

/// Files that a server reads: its users.
fn users(dir: &tempfile::TempDir, users: &str) -> String {
    let file = dir.path().join("users.acl");
    std::fs::write(&file, format!("user default off\n{users}")).expect("it is ours");
    file.display().to_string()
}

/// What a server is told to present this certificate, and to let these users in.
fn tls_args(file: &impl Fn(&str) -> String, certificate: &str) -> Vec<String> {
    let key = file("server.key");
    let pairs = [
        ("--tls-cert-file", file(certificate)),
        ("--tls-key-file", key),
        ("--tls-ca-cert-file", file("ca.crt")),
        ("--tls-auth-clients", "no".to_owned()),
        ("--aclfile", file("users.acl")),
    ];
    pairs.into_iter().flat_map(|(name, value)| [name.to_owned(), value]).collect()
}

async fn behind_tls(kind: Kind) {
    let dir = certificates();
    users(&dir, &user("cache-aside", ""));
    let file = |name: &str| dir.path().join(name).display().to_string();
    let args = tls_args(&file, "server.crt");
    let redis = Redis::start_encrypted(kind, &args.iter().map(String::as_str).collect::<Vec<_>>()).await;
    let scheme = if kind == Kind::Valkey { "valkeys" } else { "rediss" };
    let url = format!("{scheme}://cache-aside:{PASSWORD}@127.0.0.1:{}", redis.port());
    let more = format!(", ca_file: \"{}\"", file("ca.crt"));
    cache_suite::keeps(&format!("url: \"{url}\", key_prefix: \"shop:\"{more}"), "shop:").await;
    let world =
        |world: World| World { redis_url: url.clone(), prefix: "shop:".to_owned(), cache_more: more.clone(), ..world };
    invalidation::every_kind(world(World::new(SCHEMA).await)).await;
    invalidation::cascades(world(World::new(&with_cascades()).await)).await;
    tier::tier_in_process(world(World::new(SCHEMA).await)).await;
    valkey::holds(world(World::new(SCHEMA).await)).await;
    let world = world(World::new(SCHEMA).await);
    let app = world.app(invalidation::RESOURCES).await;
    invalidation::warm(&[&app], &["/api/item/1", "/api/item?team_id=2", "/api/board/1"]).await;
    for path in ["/admin/cache/item/1", "/admin/cache/item"] {
        app.delete(path).await.expect(204);
        invalidation::warm(&[&app], &["/api/item/1"]).await;
    }
    let checked = command(&world.config(invalidation::RESOURCES), &["check"]);
    assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stdout));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_rights_in_the_docs_are_enough_over_tls() {
    behind_tls(Kind::Redis).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_rights_in_the_docs_are_enough_for_valkey_over_tls() {
    behind_tls(Kind::Valkey).await;
}

/// The service is up and answers from the database; its log and `check` say why, and neither says the password.
async fn told(config: &str, words: &[&str]) {
    let app = App::start(config).await;
    let reply = app.get("/api/item/1").await.expect(200);
    assert_eq!(reply.header("cache-status"), "cache-aside; fwd=bypass", "{words:?}: {}", app.log());
    app.until("told", async |app| words.iter().all(|words| app.log().contains(words))).await;
    assert!(!app.log().contains(PASSWORD), "{}", app.log());
    assert!(!app.log().contains("panicked"), "{}", app.log());
    refused(config, words);
}

/// `check` fails and says why.
fn refused(config: &str, words: &[&str]) {
    let out = command(config, &["check"]);
    let text = format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    assert_eq!(out.status.code(), Some(1), "{words:?}: {text}");
    let line =
        text.lines().find(|line| line.starts_with("error    cache: ")).unwrap_or_else(|| panic!("{words:?}: {text}"));
    assert!(words.iter().all(|words| line.contains(words)), "{words:?} in {line}");
    assert!(!text.contains(PASSWORD), "{text}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_right_that_is_missing_is_named_and_reads_go_past_the_cache() {
    let all = user("x", "");
    let rights: Vec<&str> = all.split_whitespace().filter_map(|word| word.strip_prefix('+')).collect();
    assert!(rights.len() > 15, "{all}");
    let dir = tempfile::tempdir().expect("a folder can be made");
    let mut text = String::new();
    for right in &rights {
        text += &user(&right.replace('|', "-"), &format!("+{right}"));
    }
    let _ = write!(text, "{}", user("elsewhere", "").replace("~shop:*", "~other:*"));
    let redis = Redis::start_with(&["--aclfile", &users(&dir, &text)]).await;
    let world = World { prefix: "shop:".to_owned(), ..World::new(SCHEMA).await };
    let config = |user: &str| {
        let url = format!("redis://{user}:{PASSWORD}@127.0.0.1:{}", redis.port());
        world.config("resources: { item: { write: [update] } }").replace(&world.redis_url, &url)
    };
    for right in &rights {
        let name = right.to_uppercase().replace('|', " ");
        refused(&config(&right.replace('|', "-")), &[&format!("lacks rights that are needed, for {name} (")]);
    }
    for (user, words) in [("evalsha", "for EVALSHA"), ("get", "for GET"), ("elsewhere", "for GET, SET")] {
        crate::app::migrate(&config(user));
        told(&config(user), &[words]).await;
    }
    let app = App::start(&config("set")).await;
    let wrote = app.patch("/api/item/1", r#"{"v":5}"#).await.expect(200);
    assert!(wrote.header("cache-status").contains("invalidation-pending"), "{wrote:?}");
    assert_eq!(app.get("/api/item/1").await.json()["data"]["v"], 5);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_password_certificate_or_scheme_is_told_without_the_password() {
    let dir = certificates();
    let file = |name: &str| dir.path().join(name).display().to_string();
    // One that has ended, and one for somebody else.
    let new = "-CA ca.crt -CAkey ca.key -CAcreateserial";
    let key = "-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes";
    openssl(
        dir.path(),
        &format!("req {key} -keyout away.key -out away.csr -subj /CN=x -addext subjectAltName=DNS:away"),
    );
    openssl(dir.path(), &format!("x509 -req -in away.csr {new} -out away.crt -days 2 -copy_extensions copy"));
    openssl(dir.path(), &format!("x509 -req -in server.csr {new} -out ended.crt -days -1 -copy_extensions copy"));
    users(&dir, &user("cache-aside", ""));
    let world = World { prefix: "shop:".to_owned(), ..World::new(SCHEMA).await };
    let config = |url: String, ca: &str| {
        let config = world.config("resources: { item: {} }").replace(&world.redis_url, &url);
        if ca.is_empty() {
            config
        } else {
            config.replace("key_prefix:", &format!("ca_file: \"{}\", key_prefix:", file(ca)))
        }
    };
    crate::app::migrate(&config("memory:".to_owned(), ""));
    let start = async |certificate: &str| {
        let mut args = tls_args(&file, certificate);
        if certificate == "away.crt" {
            args[3] = file("away.key");
        }
        Redis::start_encrypted(Kind::Redis, &args.iter().map(String::as_str).collect::<Vec<_>>()).await
    };
    let (sound, ended, away) = (start("server.crt").await, start("ended.crt").await, start("away.crt").await);
    let plain = Redis::start_with(&["--aclfile", &file("users.acl")]).await;
    let url = |scheme: &str, redis: &Redis| format!("{scheme}://cache-aside:{PASSWORD}@127.0.0.1:{}", redis.port());
    let wrong = |url: String| url.replace(PASSWORD, &format!("not-{PASSWORD}"));
    for (config, words) in [
        (config(wrong(url("rediss", &sound)), "ca.crt"), "the user or password in cache.url is wrong"),
        (config(wrong(url("redis", &plain)), ""), "the user or password in cache.url is wrong"),
        (config(format!("redis://127.0.0.1:{}", plain.port()), ""), "the server wants a password"),
        (config(url("rediss", &sound), "other.crt"), "is not of an authority in cache.ca_file"),
        (config(url("rediss", &sound), ""), "is not of an authority in cache.ca_file"),
        (config(url("rediss", &ended), "ca.crt"), "its certificate has expired"),
        (config(url("rediss", &away), "ca.crt"), "its certificate is for another name"),
        (config(url("redis", &sound), ""), "if the server wants TLS, write rediss://"),
        (config(url("rediss", &plain), "ca.crt"), "does not speak TLS on this port, write redis://"),
    ] {
        told(&config, &[words]).await;
    }
    // A file that can't be used is told at start, by its name.
    std::fs::write(file("empty.crt"), "no certificate").expect("it is ours");
    for (ca, words) in [("absent.crt", "can't be read"), ("empty.crt", "holds no certificate")] {
        let out = command(&config(url("rediss", &sound), ca), &["check"]);
        let text = format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
        assert!(text.contains("cache.ca_file") && text.contains(words) && !text.contains(PASSWORD), "{text}");
        assert_eq!(out.status.code(), Some(1), "{text}");
    }
}
