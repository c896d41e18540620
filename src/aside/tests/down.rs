//! A store that is down: what is stale is served, it is asked again for a while, or not at all.

use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::{Heart, Turn, value};
use crate::aside::{Forward, ReadError, Source};
use crate::cache::{Cache, Lookup};
use crate::catalog::What;
use crate::store::{StoreError, Write, WriteError};

#[tokio::test(start_paused = true)]
async fn what_is_past_its_ttl_is_served_while_the_store_is_down_and_never_once_it_was_invalidated() {
    let heart = Heart::new(1 << 10);
    heart.read(1).await.expect("it is answered");
    // The TTL is an hour, stale_if_error ten minutes.
    sleep(Duration::from_secs(3601)).await;
    heart.then(&[Turn::Down; 8]);
    let stale = heart.read(1).await.expect("it is served");
    assert_eq!((stale.status.forward, stale.status.source), (Some(Forward::Stale), Source::Cache));
    // A reader who comes after an invalidation, while a load that knows the stale entry is under way.
    let before = heart.begin(1).await;
    heart.aside.drop_entry(&heart.target(1)).await.expect("it is dropped");
    let after = heart.begin(1).await;
    for reader in [before, after] {
        assert!(
            matches!(reader.await.expect("no panic"), Err(ReadError::Store(_))),
            "what was dropped never comes back"
        );
    }
    let lookup = heart.aside.cache().read(heart.target(1).place()).await;
    assert_eq!(lookup, Ok(Lookup::Absent));
    heart.then(&[]);
    heart.read(1).await.expect("it is answered");
    sleep(Duration::from_secs(3600 + 601)).await;
    heart.then(&[Turn::Down; 3]);
    assert!(heart.read(1).await.is_err(), "not for longer than stale_if_error");
}

#[tokio::test(start_paused = true)]
async fn a_store_that_is_out_of_reach_for_a_moment_is_asked_again() {
    let heart = Heart::new(1 << 10);
    heart.then(&[Turn::Down, Turn::Down]);
    assert_eq!(value(heart.read(1).await), "0");
    assert_eq!(heart.loads(), 3);
    heart.then(&[Turn::Down; 3]);
    assert!(heart.read(2).await.is_err(), "but not for ever");
    assert_eq!(heart.loads(), 6);
    heart.then(&[Turn::Down; 100]);
    for id in 100..130 {
        assert!(heart.read(id).await.is_err());
    }
    assert!(heart.loads() <= 6 + 30 + 10, "{} loads for 30 reads: retries have a budget", heart.loads());
}

#[tokio::test(start_paused = true)]
async fn a_store_that_has_run_out_of_something_is_not_asked_again_at_once() {
    let heart = Heart::new(1 << 10);
    heart.then(&[Turn::Exhausted]);
    assert!(matches!(heart.read(1).await, Err(ReadError::Store(StoreError::Exhausted(_)))));
    assert_eq!(heart.loads(), 1);
    assert_eq!(value(heart.read(1).await), "0");
    sleep(Duration::from_secs(3601)).await;
    heart.then(&[Turn::Exhausted]);
    let stale = heart.read(1).await.expect("it is served");
    assert_eq!((stale.status.forward, stale.status.source), (Some(Forward::Stale), Source::Cache));
    assert_eq!(heart.loads(), 3);
}

#[tokio::test(start_paused = true)]
async fn where_there_is_something_stale_nobody_waits_for_a_second_try() {
    let heart = Heart::new(1 << 10);
    heart.read(1).await.expect("it is answered");
    sleep(Duration::from_secs(3601)).await;
    heart.then(&[Turn::Down; 3]);
    heart.read(1).await.expect("it is served");
    assert_eq!(heart.loads(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_store_that_is_known_not_to_answer_is_not_asked() {
    let heart = Heart::new(1 << 10);
    heart.read(1).await.expect("it is answered");
    sleep(Duration::from_secs(3601)).await;
    let away = Err(StoreError::TimedOut);
    heart.aside.guard().asked(&away);
    heart.aside.guard().asked(&away);
    let began = Instant::now();
    let stale = heart.read(1).await.expect("it is served");
    assert_eq!((stale.status.forward, stale.status.source), (Some(Forward::Stale), Source::Cache));
    assert!(matches!(heart.read(2).await, Err(ReadError::Store(StoreError::Unavailable(_)))));
    let What::Row(key) = heart.target(1).what().clone() else { panic!("it is a row") };
    let write = Write::Delete { key, precondition: None };
    let refused = heart.aside.write(&heart.resource, write).await;
    assert!(matches!(refused, Err(WriteError::Store(StoreError::Unavailable(_)))), "{refused:?}");
    assert_eq!((heart.loads(), began.elapsed()), (1, Duration::ZERO), "nobody waited for it");
    heart.aside.guard().asked(&Ok(()));
    assert_eq!(value(heart.read(2).await), "0");
}
