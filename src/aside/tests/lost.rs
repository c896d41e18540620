//! Loads that panic, fillers that are gone, and readers who hang up: those who wait with them are answered.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::{Heart, Turn, ask, refreshed, value};
use crate::aside::{Aside, LOCK, ReadError, Source};
use crate::cache::{Cache, Lease, Lookup};
use crate::catalog::Target;
use crate::config::Defaults;

#[tokio::test(start_paused = true)]
async fn a_hundred_who_wait_for_a_load_that_panics_are_answered_by_the_second() {
    let heart = Heart::new(1 << 10);
    heart.then(&[Turn::Panic]);
    let first = heart.begin(1).await;
    let others: Vec<_> = (0..99)
        .map(|_| {
            let (aside, target) = (heart.aside.clone(), heart.target(1));
            tokio::spawn(async move { aside.read(&target, ask()).await })
        })
        .collect();
    for reader in others.into_iter().chain([first]) {
        assert_eq!(value(reader.await.expect("the reader does not panic")), "0");
    }
    assert_eq!(heart.loads(), 2);
    assert_eq!(value(heart.read(1).await), "0");
    assert_eq!(heart.loads(), 2, "the second is in the cache");
}

#[tokio::test(start_paused = true)]
async fn a_fleet_that_waits_for_a_load_that_panics_makes_one_more_and_waits_for_its_lock() {
    let heart = Heart::new(1 << 10);
    let (cache, metrics) = (heart.aside.cache().clone(), Arc::clone(heart.aside.metrics()));
    let other = Aside::new(cache, heart.script.clone(), heart.aside.core.limits, metrics);
    heart.then(&[Turn::Panic]);
    let began = Instant::now();
    let first = heart.begin(1).await;
    let others: Vec<_> = (0..100)
        .map(|reader| {
            let (aside, target) = ([&heart.aside, &other][reader % 2].clone(), heart.target(1));
            tokio::spawn(async move { aside.read(&target, ask()).await })
        })
        .collect();
    for reader in others.into_iter().chain([first]) {
        assert_eq!(value(reader.await.expect("the reader does not panic")), "0");
    }
    assert_eq!(heart.loads(), 2);
    // A load takes a second.
    assert!(began.elapsed() < LOCK + Duration::from_secs(2) + LOCK / 4, "{:?}", began.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_batch_whose_load_panics_is_loaded_again_however_many_keys_it_has() {
    let heart = Heart::new(1 << 10);
    let targets: Vec<Target> = (1..=20).map(|id| heart.target(id)).collect();
    heart.then(&[Turn::Panic]);
    assert_eq!(heart.aside.read_many(&targets, ask()).await.expect("it is answered").len(), 20);
    assert_eq!(heart.loads(), 2);
    let others: Vec<Target> = (21..=40).map(|id| heart.target(id)).collect();
    heart.then(&[Turn::Panic; 9]);
    assert_eq!(heart.aside.read_many(&others, ask()).await, Err(ReadError::Failed), "but not for ever");
    assert_eq!(heart.loads(), 5);
    heart.then(&[]);
    assert_eq!(heart.aside.read_many(&others, ask()).await.expect("nothing is left behind").len(), 20);
}

#[tokio::test(start_paused = true)]
async fn a_refresh_that_panics_costs_no_reader_anything_and_the_next_one_is_begun() {
    // So eager that there is time for more of them than may run at once.
    let heart = Heart::with(1 << 10, &Defaults { refresh_ahead: 20.0, ..Defaults::default() });
    heart.read(1).await.expect("it is answered");
    sleep(Duration::from_mins(53)).await;
    heart.script.value.store(1, Ordering::SeqCst);
    let panics = heart.aside.core.limits.refreshes + 1;
    heart.then(&vec![Turn::Panic; panics]);
    for _ in 0..=panics {
        refreshed(&heart).await;
    }
    sleep(Duration::from_secs(2)).await;
    let answer = heart.read(1).await.expect("it is answered");
    assert_eq!((answer.status.forward, answer.status.source), (None, Source::Cache));
    assert_eq!(answer.entry.payload, "1");
}

#[tokio::test(start_paused = true)]
async fn whoever_waits_for_another_process_waits_for_no_load_beside_it() {
    let heart = Heart::new(1 << 10);
    let other = heart.another_process();
    let (dead, alive) = (heart.target(1), heart.target(2));
    let leases = heart.aside.cache().lease(&[dead.place()], LOCK).await.expect("it is asked");
    assert!(matches!(leases[..], [Lease::Fill { .. }]), "its filler never fills it");
    let (filler, target) = (other.clone(), alive.clone());
    let filled = tokio::spawn(async move { filler.read(&target, ask()).await });
    tokio::task::yield_now().await;
    let both = {
        let (aside, targets) = (heart.aside.clone(), [dead.clone(), alive.clone()]);
        tokio::spawn(async move { aside.read_many(&targets, ask()).await.map(drop) })
    };
    heart.then(&[Turn::Hang]);
    // It boards the flight of the two.
    sleep(Duration::from_millis(100)).await;
    let answers = heart.aside.read_many(std::slice::from_ref(&alive), ask()).await.expect("it is answered");
    assert_eq!(answers[0].entry.payload, "0");
    filled.await.expect("no panic").expect("it is answered");
    sleep(LOCK).await;
    assert_eq!(heart.loads(), 1, "the other one is loaded here, for a minute");
    assert_eq!(both.await.expect("no panic"), Err(ReadError::TimedOut));
    // For all of that minute its lock was renewed.
    sleep(Duration::from_secs(40)).await;
    let found = heart.aside.cache().read(dead.place()).await.expect("it is asked");
    assert!(matches!(found, Lookup::Fresh(_)), "{found:?}");
}

#[tokio::test(start_paused = true)]
async fn those_who_wait_for_another_process_lose_nothing_with_the_one_who_asked_first() {
    let heart = Heart::new(1 << 10);
    let other = heart.another_process();
    let target = heart.target(1);
    let filled = tokio::spawn(async move { other.read(&target, ask()).await });
    tokio::task::yield_now().await;
    let leader = heart.begin(1).await;
    let passenger = heart.begin(1).await;
    leader.abort();
    let began = Instant::now();
    let answer = passenger.await.expect("no panic").expect("it is answered");
    // Found by whoever waited for all, or by himself when it took longer than a lock.
    assert_eq!(answer.status.source, Source::Cache);
    assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
    filled.await.expect("no panic").expect("it is answered");
    assert_eq!(heart.loads(), 0, "the other process has loaded it");
}
