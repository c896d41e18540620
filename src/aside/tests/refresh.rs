//! What is loaded again near the end of its TTL: nobody waits for it, and it brings back nothing that was dropped.

use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::{Heart, Turn, ask, refreshed, value};
use crate::aside::{Answer, Ask, Forward, Source};
use crate::cache::{Cache, Lookup};
use crate::catalog::Target;
use crate::config::Defaults;

#[tokio::test(start_paused = true)]
async fn what_is_read_often_is_loaded_again_ahead_and_nobody_waits_for_it() {
    let heart = Heart::new(1 << 10);
    heart.read(1).await.expect("it is answered");
    for loads in 2..5 {
        // The TTL is 54 minutes at least; a load takes a second.
        sleep(Duration::from_mins(53)).await;
        heart.script.value.store(loads, Ordering::SeqCst);
        let began = Instant::now();
        refreshed(&heart).await;
        assert!(began.elapsed() > Duration::from_secs(30), "not much earlier than a load takes");
        // The load is under way; then everybody has what it brought.
        while value(heart.read(1).await) != loads.to_string() {
            sleep(Duration::from_millis(10)).await;
        }
        assert_eq!(heart.loads(), loads);
    }
}

#[tokio::test(start_paused = true)]
async fn what_is_dropped_while_it_is_refreshed_ahead_never_comes_back() {
    let heart = Heart::new(1 << 10);
    heart.read(1).await.expect("it is answered");
    sleep(Duration::from_mins(53)).await;
    refreshed(&heart).await;
    heart.aside.drop_entry(&heart.target(1)).await.expect("it is dropped");
    sleep(Duration::from_secs(2)).await;
    assert_eq!(heart.aside.cache().read(heart.target(1).place()).await, Ok(Lookup::Absent));
}

#[tokio::test(start_paused = true)]
async fn a_refresh_that_fails_is_not_tried_at_once_and_the_entry_stays_a_hit() {
    // There is time for three.
    let heart = Heart::with(1 << 10, &Defaults { refresh_ahead: 3.0, ..Defaults::default() });
    heart.read(1).await.expect("it is answered");
    sleep(Duration::from_mins(53)).await;
    heart.then(&[Turn::Down; 2]);
    refreshed(&heart).await;
    let failed = Instant::now() + Duration::from_secs(1);
    refreshed(&heart).await;
    assert!(Instant::now() > failed, "one at a time");
    refreshed(&heart).await;
    sleep(Duration::from_secs(2)).await;
    assert_eq!(heart.read(1).await.expect("it is answered").status.source, Source::Cache);
}

#[tokio::test(start_paused = true)]
async fn nothing_is_refreshed_ahead_while_readers_wait_for_a_connection() {
    let heart = Heart::with(1 << 10, &Defaults { refresh_ahead: 20.0, ..Defaults::default() });
    let ttl = heart.read(1).await.expect("it is answered").entry.ttl_ms.unsigned_abs();
    heart.script.pressed.store(true, Ordering::SeqCst);
    sleep(Duration::from_millis(ttl - 30_000)).await;
    for _ in 0..100 {
        heart.read(1).await.expect("it is answered");
        sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(heart.loads(), 1);
    heart.script.pressed.store(false, Ordering::SeqCst);
    refreshed(&heart).await;
}

#[tokio::test(start_paused = true)]
async fn a_refresh_that_failed_delays_nobody_past_the_ttl() {
    // So eager that it is refreshed by the first hit near the end.
    let heart = Heart::with(1 << 10, &Defaults { refresh_ahead: 10_000.0, ..Defaults::default() });
    let ttl = heart.read(1).await.expect("it is answered").entry.ttl_ms.unsigned_abs();
    sleep(Duration::from_millis(ttl - 1_050)).await;
    heart.then(&[Turn::Down; 2]);
    let ends = Instant::now() + Duration::from_millis(1_070);
    refreshed(&heart).await;
    tokio::time::sleep_until(ends).await;
    let began = Instant::now();
    assert_eq!(heart.read(1).await.expect("it is served").status.forward, Some(Forward::Stale));
    assert!(began.elapsed() < Duration::from_millis(1_020), "it waited for its own load alone");
}

#[tokio::test(start_paused = true)]
async fn not_found_is_never_served_past_its_ttl() {
    let heart =
        Heart::with(1 << 10, &Defaults { stale_while_revalidate: Duration::from_mins(1), ..Defaults::default() });
    heart.then(&[Turn::Absent]);
    let ttl = heart.read(1).await.expect("it is answered").entry.ttl_ms.unsigned_abs();
    let ends = Instant::now() + Duration::from_millis(ttl + 30);
    sleep(Duration::from_millis(ttl - 500)).await;
    refreshed(&heart).await;
    tokio::time::sleep_until(ends).await;
    let after = heart.read(1).await.expect("it is answered");
    assert!(!after.entry.negative, "the refresh brought what there is by now");
}

#[tokio::test(start_paused = true)]
async fn a_reader_that_wants_no_load_begins_none() {
    let heart = Heart::new(1 << 10);
    heart.read(1).await.expect("it is answered");
    sleep(Duration::from_mins(53)).await;
    let cached = || Ask { only_if_cached: true, ..ask() };
    while heart.aside.read(&heart.target(1), cached()).await.is_ok() {
        heart.aside.read_many(&[heart.target(1)], cached()).await.ok();
        sleep(Duration::from_millis(10)).await;
        assert_eq!(heart.loads(), 1);
    }
}

#[tokio::test(start_paused = true)]
async fn a_refresh_that_finds_nothing_that_can_be_kept_drops_what_there_was() {
    let heart = Heart::with(1 << 10, &Defaults { negative_ttl: Duration::ZERO, ..Defaults::default() });
    heart.read(1).await.expect("it is answered");
    sleep(Duration::from_mins(53)).await;
    heart.then(&[Turn::Absent]);
    refreshed(&heart).await;
    sleep(Duration::from_millis(1_100)).await;
    assert_eq!(heart.aside.cache().read(heart.target(1).place()).await, Ok(Lookup::Absent));
}

#[tokio::test(start_paused = true)]
async fn a_batch_is_refreshed_ahead_and_nothing_is_loaded_twice() {
    let heart = Heart::with(1 << 10, &Defaults { ttl_jitter: 0.0, ..Defaults::default() });
    let targets: Vec<Target> = (1..4).map(|id| heart.target(id)).collect();
    heart.aside.read_many(&targets, ask()).await.expect("it is answered");
    heart.script.value.store(1, Ordering::SeqCst);
    sleep(Duration::from_mins(59)).await;
    // Each has a lot of its own: they may be refreshed one by one, but none is loaded twice.
    let old = |answers: &[Answer]| answers.iter().filter(|answer| answer.entry.payload == "0").count();
    loop {
        let answers = heart.aside.read_many(&targets, ask()).await.expect("it is answered");
        assert!(answers.iter().all(|answer| answer.status.forward.is_none()), "nobody waits");
        if old(&answers) == 0 {
            break;
        }
        sleep(Duration::from_millis(10)).await;
    }
    assert!((2..=4).contains(&heart.loads()), "{}", heart.loads());
}
