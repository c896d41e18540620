//! The same contract and the most telling stories on Valkey, by `valkey://` URLs. What a cache engine can't change (types,
//! keys, statements) is told on Redis alone.

use crate::app::{App, World, command};
use crate::invalidation::{self, SCHEMA, seen, warm};
use crate::servers::{Kind, Redis};
use crate::{cache_suite, outages, tier};

async fn valkey() -> Redis {
    Redis::start_as(Kind::Valkey, &[]).await
}

#[tokio::test]
async fn valkey_keeps_the_contract() {
    cache_suite::keeps_the_contract(Kind::Valkey).await;
}

#[tokio::test]
async fn valkey_forgets_its_scripts_and_its_data_without_harm() {
    cache_suite::forgets(Kind::Valkey).await;
}

#[tokio::test]
async fn foreign_bytes_under_a_key_of_valkey_are_absent_and_replaced() {
    cache_suite::foreign_bytes(Kind::Valkey).await;
}

#[tokio::test]
async fn a_valkey_that_is_full_refuses_fills_and_takes_invalidations() {
    cache_suite::full(Kind::Valkey).await;
}

#[tokio::test]
async fn a_lease_on_what_valkey_lacks_needs_no_script() {
    cache_suite::no_script(Kind::Valkey).await;
}

#[tokio::test]
async fn every_kind_of_change_by_others_is_seen_through_valkey() {
    let valkey = valkey().await;
    invalidation::every_kind(World::new(SCHEMA).await.on(&valkey)).await;
}

#[tokio::test]
async fn a_change_is_decoded_from_the_log_for_valkey_too() {
    let valkey = valkey().await;
    invalidation::every_kind(World::decoding(SCHEMA).await.on(&valkey)).await;
}

#[tokio::test]
async fn what_a_write_changes_is_new_at_once_through_valkey() {
    let valkey = valkey().await;
    invalidation::cascades(World::new(&invalidation::with_cascades()).await.on(&valkey)).await;
}

#[tokio::test]
async fn the_tier_in_process_learns_of_every_change_from_valkey() {
    let valkey = valkey().await;
    tier::tier_in_process(World::new(SCHEMA).await.on(&valkey)).await;
}

#[tokio::test]
async fn a_valkey_that_comes_back_with_old_data_is_brought_up_to_date_first() {
    invalidation::old_data(Kind::Valkey).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_valkey_that_is_killed_costs_no_answer_and_is_used_again_when_it_is_back() {
    outages::killed(Kind::Valkey).await;
}

#[tokio::test]
async fn with_holds_writes_through_valkey_are_seen_by_all_at_once() {
    let valkey = valkey().await;
    holds(World::new(SCHEMA).await.on(&valkey)).await;
}

pub async fn holds(world: World) {
    let resources = "resources: { item: { write: [update], consistency: hold } }";
    let (one, two) = (world.app(resources).await, world.app(resources).await);
    for v in 1..=20 {
        warm(&[&one, &two], &["/api/item/1"]).await;
        let written = async |app: &App| {
            let reply = app.patch("/api/item/1", &format!(r#"{{"v":{v}}}"#)).await;
            // Who can't be told in time is waited for: nothing is written meanwhile.
            assert!(reply.status == 200 || reply.text.contains("the cache can't be told"), "{reply:?}");
            reply.status == 200
        };
        one.until("written", written).await;
        for app in [&one, &two] {
            assert!(app.get("/api/item/1").await.text.contains(&format!(r#""v":{v}"#)));
        }
    }
    world.sql("UPDATE item SET v = 100 WHERE id = 1").await;
    seen(&[&one, &two], "/api/item/1", r#""v":100"#).await;
}

#[tokio::test]
async fn check_calls_valkey_by_its_name() {
    let valkey = valkey().await;
    let config = World::new(SCHEMA).await.on(&valkey).config("resources: { item: {} }");
    let out = String::from_utf8(command(&config, &["check"]).stdout).expect("it is text");
    assert!(out.contains("cache: Valkey 8") || out.contains("cache: Valkey 9"), "{out}");
    assert!(out.contains("maxmemory"), "{out}");
}
