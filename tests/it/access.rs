//! Tokens and scopes.

use reqwest::Method;

use crate::app::World;

// printf %s reader-token | sha256sum, and so on.
fn digest(token: &str) -> String {
    use sha2::{Digest, Sha256};
    Sha256::digest(token.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect()
}

#[tokio::test]
async fn reads_are_public_and_everything_else_needs_a_token_with_the_scope() {
    let world = World::trusting("CREATE TABLE item (id int PRIMARY KEY, v int); INSERT INTO item VALUES (1, 1);").await;
    let app = world
        .app(&format!(
            "resources: {{ item: {{ write: [update] }} }}\naccess:\n  tokens:\n  \
             - {{ name: writer, sha256: {}, scopes: [write] }}\n  - {{ name: admin, sha256: {}, scopes: [admin, refresh] }}\n",
            digest("w"),
            digest("a").to_uppercase()
        ))
        .await;
    let ask = |method: Method, path: &'static str, token: Option<&str>| {
        let ask = app.ask(method, path).json(r#"{"v":2}"#);
        match token {
            Some(token) => ask.header("authorization", &format!("Bearer {token}")),
            None => ask,
        }
    };
    app.get("/api/item/1").await.expect(200);
    let refused = ask(Method::PATCH, "/api/item/1", None).send().await.expect(401);
    assert_eq!(refused.header("www-authenticate"), "Bearer");
    ask(Method::PATCH, "/api/item/1", Some("a")).send().await.expect(403);
    ask(Method::PATCH, "/api/item/1", Some("w")).send().await.expect(200);
    ask(Method::GET, "/api/item/1", Some("nobody")).send().await.expect(401);
    ask(Method::GET, "/api/item/1", Some("")).send().await.expect(401);
    app.ask(Method::GET, "/api/item/1").header("authorization", "Basic eDp5").send().await.expect(200);
    ask(Method::DELETE, "/admin/cache/item/1", None).send().await.expect(401);
    ask(Method::DELETE, "/admin/cache/item/1", Some("w")).send().await.expect(403);
    ask(Method::DELETE, "/admin/cache/item/1", Some("a")).send().await.expect(204);
    // A refresh that is not allowed is ignored, not refused.
    app.until("cached", async |app| app.get("/api/item/1").await.expect(200).source() == "cache").await;
    let insists = |token| ask(Method::GET, "/api/item/1", token).header("cache-control", "no-cache").send();
    assert_eq!(insists(None).await.expect(200).source(), "cache");
    assert_eq!(insists(Some("w")).await.expect(200).source(), "cache");
    assert_eq!(insists(Some("a")).await.expect(200).source(), "database");
}

#[tokio::test]
async fn what_is_off_is_off_for_everybody() {
    let world = World::trusting("CREATE TABLE item (id int PRIMARY KEY); INSERT INTO item VALUES (1);").await;
    let app = world
        .app("resources: { item: { write: [delete] } }\naccess: { read: token, write: off, refresh: false, admin: public }\n")
        .await;
    app.get("/api/item/1").await.expect(401);
    app.delete("/api/item/1").await.expect(403);
    app.delete("/admin/cache/item/1").await.expect(204);
}

#[tokio::test]
async fn pages_of_the_configured_origins_may_call_and_others_may_not() {
    let world = World::trusting("CREATE TABLE item (id int PRIMARY KEY); INSERT INTO item VALUES (1);").await;
    let config = world.config("resources: { item: {} }\n")
        + "server: { listen: \"127.0.0.1:0\", drain_delay: 0s, cors_origins: [\"https://shop.example\"] }\n";
    let app = crate::app::App::start(&config).await;
    let from = |origin: &str| app.ask(Method::GET, "/api/item/1").header("origin", origin);
    let allowed = from("https://shop.example").send().await.expect(200);
    assert_eq!(allowed.header("access-control-allow-origin"), "https://shop.example");
    assert_eq!(from("https://evil.example").send().await.header("access-control-allow-origin"), "");
    let preflight = app
        .ask(Method::OPTIONS, "/api/item/1")
        .header("origin", "https://shop.example")
        .header("access-control-request-method", "PATCH")
        .header("access-control-request-headers", "content-type,if-match");
    preflight.send().await.expect(200);
}
