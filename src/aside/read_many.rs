//! A batch: one round trip to the cache for all keys, and one statement for those it lacks.

use std::collections::HashMap;
use std::time::Instant;

use tokio::time::timeout_at;

use super::answer::{Answer, Ask, ReadError, Status};
use super::flight::Arrived;
use super::lease::Way;
use super::read::{LOST, Path, is_own};
use super::{Aside, refresh};
use crate::cache::{Cache, CacheError, Lookup, Place};
use crate::catalog::Target;
use crate::store::Load;
use crate::telemetry::Outcome;

impl<C: Cache + Clone + 'static, S: Load + 'static> Aside<C, S> {
    /// Reads rows of one resource, answering in their order. A key that is asked for twice is read once.
    ///
    /// # Errors
    ///
    /// [`ReadError`]: of the whole batch, because half an answer could not be told from a whole one.
    pub async fn read_many(&self, targets: &[Target], ask: Ask) -> Result<Vec<Answer>, ReadError> {
        let Some(first) = targets.first() else { return Ok(Vec::new()) };
        let started = Instant::now();
        let metrics = self.core.metrics.resource(&first.resource().name);
        let outcome = self.answer_many(targets, ask).await;
        match &outcome {
            Ok(answers) => {
                for (target, answer) in targets.iter().zip(answers) {
                    self.core.top.read(target, Some(answer.entry.payload.len()), started);
                    metrics.reads(answer.status.outcome(&answer.entry), 1);
                }
                let hit = answers.iter().all(|answer| answer.status.forward.is_none());
                metrics.batch(if hit { Outcome::Hit } else { Outcome::Miss }, started);
            }
            Err(_) => metrics.read(Outcome::Error, started),
        }
        outcome
    }

    /// The same, counted by nobody.
    pub(super) async fn answer_many(&self, targets: &[Target], ask: Ask) -> Result<Vec<Answer>, ReadError> {
        let mut places: HashMap<&str, usize> = HashMap::with_capacity(targets.len());
        let mut distinct: Vec<&Target> = Vec::with_capacity(targets.len());
        let order: Vec<usize> = targets
            .iter()
            .map(|target| {
                *places.entry(target.entry()).or_insert_with(|| {
                    distinct.push(target);
                    distinct.len() - 1
                })
            })
            .collect();
        let mut answers: Vec<Option<Answer>> = vec![None; distinct.len()];
        let mut open: Vec<usize> = (0..distinct.len()).collect();
        let mut path = match distinct.first() {
            // They are of one resource.
            Some(first) if !first.cacheable() => Path::Bypass,
            _ if ask.refresh => self.all_invalidated(&distinct).await,
            _ => Path::Lookup,
        };
        let mut lost = 0;
        for round in 0.. {
            let looked = Instant::now();
            let (mut doubtful, mut past) = (false, path == Path::Bypass);
            if matches!(path, Path::Lookup | Path::Again) {
                let asked: Vec<Place<'_>> =
                    open.iter().map(|index| self.core.place(distinct[*index], looked)).collect();
                match self.core.asked("get_many", self.cache.read_many(&asked)).await {
                    Ok(lookups) => {
                        let took = looked.elapsed();
                        for (index, lookup) in open.iter().zip(lookups) {
                            if let Lookup::Fresh(entry) = lookup {
                                answers[*index] = Some(Answer { entry, status: Status::hit(took) });
                            }
                        }
                        if !ask.only_if_cached {
                            let hits = open.iter().filter_map(|index| {
                                answers[*index].as_ref().map(|answer| (distinct[*index], &answer.entry))
                            });
                            let due: Vec<_> = hits.filter(|(target, entry)| refresh::due(target, entry)).collect();
                            self.core.refresh_ahead(&due);
                        }
                        open.retain(|index| answers[*index].is_none());
                    }
                    // As for a single read.
                    Err(error) if is_own(error) => {
                        let first = open.first().map(|index| distinct[*index].entry());
                        doubtful = first.is_some_and(|entry| !self.core.cache.answered_since(entry, looked));
                    }
                    Err(CacheError::Untrusted) => {}
                    Err(_) => past = true,
                }
            }
            if open.is_empty() {
                break;
            }
            if ask.only_if_cached {
                return Err(ReadError::NotCached);
            }
            let cache = looked.elapsed();
            let mut led = Vec::new();
            let mut passengers = Vec::with_capacity(open.len());
            for index in &open {
                let (pilot, passenger) = self.core.board(distinct[*index]);
                passengers.push((*index, pilot.is_some(), passenger));
                led.extend(pilot);
            }
            if !led.is_empty() {
                let way = if past { Way::Past } else { self.core.way(doubtful) };
                self.core.fly(led, way, round > 0);
            }
            let mut lost_one = false;
            for (index, leads, mut passenger) in passengers {
                let arrived = timeout_at(ask.deadline, passenger.arrive()).await.map_err(|_| ReadError::TimedOut)?;
                match arrived {
                    Arrived::Covered(landing) => {
                        answers[index] = Some(self.core.arrived(distinct[index], path, landing, leads, cache)?);
                    }
                    Arrived::TooEarly { .. } => {}
                    Arrived::Lost => lost_one = true,
                }
            }
            // A flight that is lost has all its keys on board: that is one, however many they are.
            lost += u32::from(lost_one);
            open.retain(|index| answers[*index].is_none());
            if open.is_empty() || lost >= LOST {
                break;
            }
            path = path.again();
        }
        let whole: Option<Vec<Answer>> = order.into_iter().map(|index| answers[index].clone()).collect();
        whole.ok_or(ReadError::Failed)
    }

    async fn all_invalidated(&self, targets: &[&Target]) -> Path {
        match self.dropped(targets).await {
            Ok(()) => Path::Refresh,
            Err(_) => Path::Bypass,
        }
    }
}
