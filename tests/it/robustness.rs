//! Any bytes as path, query, header or body: a 4xx, never a 5xx, never a hang.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::app::{App, World};

const RESOURCES: &str = "
resources:
  item: { write: [create, update, delete], lists: { name: {} } }
  line: { write: [create, update, delete] }
  loose: {}
server: { listen: \"127.0.0.1:0\", drain_delay: 0s, request_timeout: 3s, max_body: 64KiB }
";

const SCHEMA: &str = "
  CREATE TABLE item (id int PRIMARY KEY, name text, data jsonb);
  CREATE TABLE line (a uuid, b bytea, c timestamptz, PRIMARY KEY (a, b, c));
  CREATE TABLE loose (k inet PRIMARY KEY);";

/// Sends bytes as they are; the status of the answer, or 0 where the connection was closed without one.
async fn status_of(app: &App, bytes: &[u8]) -> u16 {
    let address = app.url.strip_prefix("http://").expect("it is a URL");
    let mut stream = TcpStream::connect(address).await.expect("it listens");
    // It may answer and close before it has read everything.
    let _ = stream.write_all(bytes).await;
    let mut answer = Vec::new();
    let read = async {
        let mut chunk = [0; 1024];
        loop {
            match stream.read(&mut chunk).await {
                Ok(0) | Err(_) => break,
                Ok(count) => answer.extend_from_slice(&chunk[..count]),
            }
            if answer.windows(4).any(|window| window == b"\r\n\r\n") {
                break;
            }
        }
    };
    timeout(Duration::from_secs(15), read).await.unwrap_or_else(|_| panic!("no answer to {bytes:?}"));
    String::from_utf8_lossy(&answer).split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0)
}

fn request(method: &[u8], path: &[u8], headers: &[u8], body: &[u8]) -> Vec<u8> {
    let length = format!("Content-Length: {}\r\n\r\n", body.len());
    [method, b" ", path, b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n", headers, length.as_bytes(), body].concat()
}

#[tokio::test]
async fn arbitrary_bytes_get_a_4xx() {
    let world = World::trusting(SCHEMA).await;
    let app = App::start(&world.config(RESOURCES)).await;
    let mut random = fastrand::Rng::with_seed(7);
    let odd: [&[u8]; 26] = [
        b"",
        b"%",
        b"%0",
        b"%00",
        b"%FF",
        b"%C3%28",
        b"%2F",
        b"%2e%2e",
        b"..",
        b",",
        b",,",
        b"'",
        b"%27%20OR%201=1--",
        b"\\",
        b"%5C%5C",
        b"{}",
        b"$1",
        b"99999999999999999999",
        b"-0",
        b"%F0%9F%A6%80",
        b"a=b",
        b"null",
        b"%0d%0aX:y",
        b"+",
        b"~",
        b";",
    ];
    let mut requests = Vec::new();
    for part in odd {
        for method in [&b"GET"[..], b"HEAD", b"PUT", b"DELETE", b"PATCH", b"POST", b"TRACE", b"BREW", b"OPTIONS"] {
            for before in [
                &b"/api/item/"[..],
                b"/api/line/",
                b"/api/loose/",
                b"/api/",
                b"/api/item?id=",
                b"/api/item?name=",
                b"/api/line?key=",
                b"/admin/cache/item/",
                b"/admin/",
            ] {
                let path = [before, part].concat();
                requests.push(request(method, &path, b"Content-Type: application/json\r\n", b"{\"name\":1}"));
            }
        }
    }
    for _ in 0..300 {
        let noise: Vec<u8> = (0..random.usize(0..60)).map(|_| random.u8(..)).collect();
        requests.push(request(b"GET", &[b"/api/item/", noise.as_slice()].concat(), b"", b""));
        requests.push(request(b"GET", &[b"/api/item?", noise.as_slice()].concat(), b"", b""));
        requests.push(request(
            b"GET",
            b"/api/item/1",
            &[b"Authorization: Bearer ", noise.as_slice(), b"\r\n"].concat(),
            b"",
        ));
        requests.push(request(b"GET", b"/api/item/1", &[b"If-None-Match: ", noise.as_slice(), b"\r\n"].concat(), b""));
        requests.push(request(b"GET", b"/api/item/1", &[b"X-Request-Id: ", noise.as_slice(), b"\r\n"].concat(), b""));
        requests.push(request(b"POST", b"/api/item", b"Content-Type: application/json\r\n", &noise));
        requests.push(request(b"PATCH", b"/api/item/1", b"Content-Type: application/merge-patch+json\r\n", &noise));
        requests.push(noise);
    }
    for bytes in requests {
        let mut bytes = bytes;
        // So that what is no request at all ends.
        bytes.extend_from_slice(b"\r\n\r\n");
        let status = status_of(&app, &bytes).await;
        assert!(status < 500, "{status} to {:?}\n{}", String::from_utf8_lossy(&bytes), app.log());
    }
    app.get("/readyz").await.expect(200);
    assert!(!app.log().contains("panicked"), "{}", app.log());
}

#[tokio::test]
async fn deep_large_and_odd_bodies_get_a_4xx() {
    let world = World::trusting(SCHEMA).await;
    let app = App::start(&world.config(RESOURCES)).await;
    app.post("/api/item", r#"{"id":1,"data":{"a":1}}"#).await.expect(201);
    let deep = |open: &str, close: &str, times: usize| format!("{}1{}", open.repeat(times), close.repeat(times));
    for body in [
        format!(r#"{{"id":2,"data":{}}}"#, deep("[", "]", 20_000)),
        format!(r#"{{"data":{}}}"#, deep(r#"{"a":"#, "}", 8_000)),
        deep("[", "]", 20_000),
        r#"{"id":1e400}"#.into(),
        r#"{"id":3,"name":"\ud800"}"#.into(),
        r#"{"id":3,"name":"\u0000"}"#.into(),
        format!(r#"{{"id":{}}}"#, "9".repeat(5_000)),
        format!(r#"{{"{}":1}}"#, "k".repeat(5_000)),
        "x".repeat(100_000),
        // Members by the thousand: no time by their square.
        format!("{{{}}}", (0..6_000).map(|index| format!(r#""k{index}":1"#)).collect::<Vec<_>>().join(",")),
    ] {
        for (method, path) in [(reqwest::Method::POST, "/api/item"), (reqwest::Method::PATCH, "/api/item/1")] {
            let reply = app.ask(method, path).json(&body).send().await;
            assert!((400..500).contains(&reply.status.as_u16()), "{}: {reply:?}", &body[..body.len().min(60)]);
        }
    }
    let long = format!("/api/item?id={}", "1,".repeat(20_000));
    let reply = app.client.get(format!("{}{long}", app.url)).send().await;
    assert!(reply.is_ok_and(|reply| (400..500).contains(&reply.status().as_u16())));
    app.get("/api/item/1").await.expect(200);
}

#[tokio::test]
async fn a_request_that_never_ends_is_ended() {
    let world = World::trusting(SCHEMA).await;
    let app = App::start(&world.config(RESOURCES)).await;
    for unfinished in [
        &b"GET /api/item/1 HTTP/1.1\r\nHost: x\r\nX: "[..],
        b"POST /api/item HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 10\r\n\r\n{",
    ] {
        let status = status_of(&app, unfinished).await;
        assert!(status == 408 || status == 0, "{status}");
    }
}
