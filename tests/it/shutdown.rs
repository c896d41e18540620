//! SIGTERM under load: no failed request, exit 0.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::app::{App, World};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sigterm_under_load_fails_no_request() {
    let world = World::trusting(
        "CREATE TABLE item (id int PRIMARY KEY); INSERT INTO item SELECT generate_series(1, 100);
         CREATE FUNCTION slow() RETURNS int LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(0.1); RETURN 0; END $$;
         CREATE VIEW slow_item AS SELECT id, slow() AS waited FROM item;",
    )
    .await;
    let config = world.config("resources: { item: {}, slow_item: { key: id, ttl: 50ms } }\n")
        + "server: { listen: \"127.0.0.1:0\", drain_delay: 500ms }\n";
    let mut app = App::start(&config).await;
    let draining = Arc::new(AtomicBool::new(false));
    let failed = Arc::new(AtomicU64::new(0));
    let readers: Vec<_> = (0..16_u32)
        .map(|reader| {
            let (draining, failed) = (Arc::clone(&draining), Arc::clone(&failed));
            let (client, url) = (app.client.clone(), app.url.clone());
            tokio::spawn(async move {
                let mut count = 0_u32;
                // As a load balancer would: nothing new once it is known to be unready.
                while !draining.load(Ordering::SeqCst) {
                    let name = if reader % 4 == 0 { "slow_item" } else { "item" };
                    let path = format!("{url}/api/{name}/{}", 1 + (count * 7 + reader) % 100);
                    match client.get(path).send().await {
                        Ok(reply) if reply.status() == 200 => count += 1,
                        other => {
                            eprintln!("{other:?}");
                            failed.fetch_add(1, Ordering::SeqCst);
                        }
                    }
                }
                count
            })
        })
        .collect();
    app.until("busy", async |app| seen(app).await > 100).await;
    app.signal("TERM");
    app.until("unready", async |app| app.get("/readyz").await.status == 503).await;
    draining.store(true, Ordering::SeqCst);
    let mut reads = 0;
    for reader in readers {
        reads += reader.await.expect("no reader panics");
    }
    assert_eq!(app.ended().await.code(), Some(0));
    assert_eq!(failed.load(Ordering::SeqCst), 0, "of {reads}");
    assert!(reads > 100, "{reads}");
}

/// A replica's place: its address, while it may be sent requests.
type Seat = Arc<std::sync::Mutex<Option<String>>>;

/// Starts a replica and sends it requests once it is ready, as a load balancer does.
async fn take_seat(config: &str, seat: &Seat) -> App {
    let app = App::launch(config).await;
    app.until("ready", async |app| app.get("/readyz").await.status == 200).await;
    *seat.lock().expect("no reader panics") = Some(app.url.clone());
    app
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replicas_that_are_restarted_in_turn_fail_no_request_and_find_the_cache_warm() {
    const KEYS: u64 = 100;
    let world = World::trusting(&format!(
        "CREATE TABLE item (id int PRIMARY KEY); INSERT INTO item SELECT generate_series(1, {KEYS});"
    ))
    .await;
    let config =
        world.config("resources: { item: {} }\n") + "server: { listen: \"127.0.0.1:0\", drain_delay: 500ms }\n";
    crate::app::migrate(&config);
    let seats: [Seat; 2] = [Arc::default(), Arc::default()];
    let mut apps = Vec::new();
    for seat in &seats {
        apps.push(take_seat(&config, seat).await);
    }
    let (stop, failed) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let client = apps[0].client.clone();
    let readers: Vec<_> = (0..8_u64)
        .map(|reader| {
            let (stop, failed, seats, client) = (Arc::clone(&stop), Arc::clone(&failed), seats.clone(), client.clone());
            tokio::spawn(async move {
                let mut count = 0_u64;
                while !stop.load(Ordering::SeqCst) {
                    let seat = &seats[usize::try_from((count + reader) % 2).expect("it is 0 or 1")];
                    let url = seat.lock().expect("nobody panics with it").clone();
                    count += 1;
                    // Away: the other one is asked.
                    let Some(url) = url else { continue };
                    let asked = client.get(format!("{url}/api/item/{}", 1 + (count * 7 + reader) % KEYS)).send().await;
                    if !asked.as_ref().is_ok_and(|reply| reply.status() == 200) {
                        eprintln!("{asked:?}");
                        failed.fetch_add(1, Ordering::SeqCst);
                    }
                }
                count
            })
        })
        .collect();
    let sent = r#"cache_aside_store_queries_total{operation="row",resource="item"}"#;
    apps[0].until("warm", async |app| app.metric(sent).await > 0 && seen(app).await > 200).await;
    for index in 0..2 {
        apps[index].signal("TERM");
        apps[index].until("unready", async |app| app.get("/readyz").await.status == 503).await;
        // Whoever looks only now and then goes on until the delay is over.
        *seats[index].lock().expect("no reader panics") = None;
        assert_eq!(apps[index].ended().await.code(), Some(0));
        apps[index] = take_seat(&config, &seats[index]).await;
        apps[index].until("in use", async |app| seen(app).await > 200).await;
        let queries = apps[index].metric(sent).await;
        assert!(queries <= KEYS / 5, "{queries} queries by a replica that came to a warm cache");
    }
    stop.store(true, Ordering::SeqCst);
    let mut reads = 0;
    for reader in readers {
        reads += reader.await.expect("no reader panics");
    }
    assert_eq!(failed.load(Ordering::SeqCst), 0, "of {reads}");
}

/// Reads that a replica has answered.
async fn seen(app: &App) -> u64 {
    app.metric(r#"http_requests_total{method="GET",route="/api/{resource}/{key}",status="200"}"#).await
}

#[tokio::test]
async fn a_request_that_was_accepted_is_answered_after_sigterm() {
    let world = World::trusting(
        "CREATE TABLE item (id int PRIMARY KEY); INSERT INTO item VALUES (1); CREATE SEQUENCE begun;
         CREATE FUNCTION slow() RETURNS int LANGUAGE plpgsql VOLATILE AS $$
           BEGIN PERFORM nextval('begun'); PERFORM pg_sleep(1); RETURN 0; END $$;
         CREATE VIEW slow_item AS SELECT id, slow() AS waited FROM item;",
    )
    .await;
    let mut app = world.app("resources: { slow_item: { key: id } }").await;
    let (client, url) = (app.client.clone(), format!("{}/api/slow_item/1", app.url));
    let read = tokio::spawn(async move { client.get(url).send().await.expect("it answers").status().as_u16() });
    world.until("SELECT is_called FROM begun").await;
    app.signal("TERM");
    assert_eq!(read.await.expect("the reader is there"), 200);
    assert_eq!(app.ended().await.code(), Some(0));
}

#[tokio::test]
async fn a_write_that_outlived_its_request_is_finished_and_told_to_the_cache_before_the_end() {
    let world = World::trusting(
        "CREATE TABLE item (id int PRIMARY KEY, v int); INSERT INTO item VALUES (1, 0);
         CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(1.5); RETURN NEW; END $$;
         CREATE TRIGGER slow BEFORE UPDATE ON item FOR EACH ROW EXECUTE FUNCTION slow();",
    )
    .await;
    let config = world.config("resources: { item: { write: [update] } }\n")
        + "server: { listen: \"127.0.0.1:0\", drain_delay: 0s, request_timeout: 400ms }\n";
    let (mut writer, reader) = (App::start(&config).await, App::start(&config).await);
    reader.get("/api/item/1").await.expect(200);
    writer.patch("/api/item/1", r#"{"v":7}"#).await.expect(504);
    writer.signal("TERM");
    assert_eq!(writer.ended().await.code(), Some(0));
    assert_eq!(reader.get("/api/item/1").await.json()["data"]["v"], 7);
}
