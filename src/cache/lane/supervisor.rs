//! The supervisor of a lane: it connects, looks every 100 ms, and connects anew where looks fail.

use std::sync::{Arc, Weak};
use std::time::Duration;

use super::clock::now_ms;
use super::failed::{Failed, Strikes};
use super::{Engine, Lane};

/// Between two looks while the lane is not trusted but may soon be.
const SOON: Duration = Duration::from_millis(15);
/// Between two attempts to connect, at most.
const BACKOFF: Duration = Duration::from_millis(500);

/// Looks after a lane for as long as it is there.
pub(super) async fn supervise<E: Engine>(engine: Arc<E>, weak: Weak<Lane<E>>) {
    let mut failures = 0_u32;
    while weak.strong_count() > 0 {
        match connect(&*engine).await {
            Ok((link, live)) => {
                let live = Arc::new(live);
                let Some(lane) = weak.upgrade() else { break };
                lane.answers(&live);
                lane.turns.send_modify(|turns| *turns += 1);
                drop(lane);
                tracing::info!(cache = engine.address, "connected to the cache");
                failures = 0;
                let reason = keep_looking(&*engine, &live, &weak).await;
                if let Some(lane) = weak.upgrade() {
                    lane.lost();
                    tracing::warn!(cache = engine.address, reason, "lost the cache; reads go to the database");
                }
                E::close(link, &live);
            }
            Err(error) => {
                if failures == 0 {
                    tracing::warn!(cache = engine.address, %error, "can't reach the cache; trying again");
                }
                failures += 1;
                if let Some(lane) = weak.upgrade() {
                    lane.turns.send_modify(|turns| *turns += 1);
                }
            }
        }
        let pause = BACKOFF.min(Duration::from_millis(20 << failures.min(5)));
        tokio::time::sleep(pause.mul_f64(0.5 + fastrand::f64() / 2.0)).await;
    }
}

async fn connect<E: Engine>(engine: &E) -> anyhow::Result<(E::Link, E::Live)> {
    let (link, live) = engine.connect().await?;
    match engine.turn(&live).await {
        Ok(()) => Ok((link, live)),
        Err(failed) => {
            E::close(link, &live);
            Err(failed.into())
        }
    }
}

/// Looks until the connection is of no use any more, and says why.
async fn keep_looking<E: Engine>(engine: &E, live: &Arc<E::Live>, lane: &Weak<Lane<E>>) -> &'static str {
    let (standing, debts) = (E::standing(live), &engine.debts);
    let mut strikes = Strikes::default();
    loop {
        let soon = standing.deadlines().trust < now_ms() && standing.is_hopeful(debts);
        let pause = if soon { SOON.min(engine.pace()) } else { engine.pace() };
        {
            let Some(strong) = lane.upgrade() else { return "not needed any more" };
            tokio::select! {
                () = strong.wake.notified() => {}
                () = debts.look_now.notified() => {}
                () = tokio::time::sleep(pause) => {}
            }
        }
        let outcome = engine.turn(live).await;
        if let Some(lane) = lane.upgrade() {
            match &outcome {
                Ok(()) => lane.answers(live),
                Err(Failed::TimedOut) => lane.timed_out(),
                Err(_) => {}
            }
            lane.turns.send_modify(|turns| *turns += 1);
        }
        match outcome {
            Ok(()) => strikes = Strikes::default(),
            Err(failed) => {
                tracing::debug!(cache = engine.address, error = %failed, ?strikes, "a look at the cache failed");
                if let Some(reason) = strikes.add(&failed) {
                    return reason;
                }
            }
        }
    }
}
