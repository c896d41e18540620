//! `/admin/warm/{resource}`: fills the cache with rows of a resource, and tells how it goes while it does: a line of JSON
//! about once a second, and a last one that says how it ended.

use std::collections::HashSet;
use std::future::ready;
use std::pin::pin;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use actix_web::http::Method;
use actix_web::http::header::CACHE_CONTROL;
use actix_web::{HttpRequest, HttpResponse, web};
use bytes::Bytes;
use futures_util::stream::{self, BoxStream};
use futures_util::{Stream, StreamExt};
use serde::Deserialize;
use serde_json::json;
use serde_json::value::RawValue;

use super::body::Room;
use super::front::Front;
use super::problem::Problem;
use super::{body, keys};
use crate::aside::{RATE, Share, Tally, Warming, batches};
use crate::catalog::{Capture, KeyError, Resource, Target};
use crate::served::Health;
use crate::store::StoreError;

/// Between two lines.
const LINE: Duration = Duration::from_secs(1);
/// Between two looks whether the service is to stop.
const LOOK: Duration = Duration::from_millis(100);
/// What is under way when it is stopped has this long to end.
const STOP: Duration = Duration::from_secs(1);

/// The most rows that are hot.
const HOT: usize = 256;
/// So many keys are looked at before others at the same worker get a turn.
const TURN: u64 = 1_000;

/// What is being warmed in this process. Clones share it.
#[derive(Clone, Debug)]
pub struct Underway {
    resources: Arc<Mutex<HashSet<Arc<str>>>>,
    share: Share,
}

impl Underway {
    /// Nothing yet, with a share of so many connections to the database.
    #[must_use]
    pub fn new(connections: u32) -> Self {
        Self { resources: Arc::default(), share: Share::of(connections) }
    }

    /// Takes a resource's place, which is free again when it is dropped.
    fn begin(&self, name: &Arc<str>) -> Option<Place> {
        let begun = self.resources.lock().unwrap_or_else(PoisonError::into_inner).insert(Arc::clone(name));
        begun.then(|| Place { all: self.clone(), name: Arc::clone(name) })
    }
}

/// The right to warm a resource.
struct Place {
    all: Underway,
    name: Arc<str>,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.all.resources.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.name);
    }
}

type Rows = BoxStream<'static, Result<Vec<Target>, StoreError>>;

/// What is to be warmed: one of the three.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Asked {
    keys: Option<Box<RawValue>>,
    all: Option<bool>,
    hot: Option<bool>,
    rate: Option<u32>,
}

/// Any method.
pub(super) async fn handle(
    front: &Front,
    request: &HttpRequest,
    payload: web::Payload,
    name: &str,
) -> Result<HttpResponse, Problem> {
    let resource = front.resource(&keys::decode(name)?)?;
    if *request.method() != Method::POST {
        return Err(Problem::method_not_allowed(&["POST"]));
    }
    let (asked, _, room): (Asked, _, _) = body::json(front, request, payload).await?;
    let tally = Arc::new(Tally::default());
    let share = front.underway.share.clone();
    let rows: Rows;
    let total = match (asked.keys, asked.all, asked.hot) {
        (Some(keys), None, None) => {
            let named = Named::new(keys)?;
            let count = named.check(&resource).await?;
            rows = batches(named.targets(&resource, &tally)).map(Ok).boxed();
            Some(count)
        }
        (None, Some(true), None) => {
            rows = front.aside.all(&resource, &share).boxed();
            None
        }
        (None, None, Some(true)) => {
            let hot = hot(front, &resource);
            let count = hot.len() as u64;
            rows = batches(stream::iter(hot)).map(Ok).boxed();
            Some(count)
        }
        _ => {
            let words = r#"say which rows, in one way: {"keys":[…]}, {"all":true} or {"hot":true}"#;
            return Err(Problem::bad_request(words));
        }
    };
    if resource.capture == Capture::Lacking {
        let words = "its changes are not captured, so it is served past the cache; /readyz?verbose says more";
        return Err(Problem::conflict(format!("{} can't be warmed: {words}", resource.name)));
    }
    let Some(place) = front.underway.begin(&resource.name) else {
        return Err(Problem::conflict(format!("{} is being warmed already", resource.name)));
    };
    let warming = front.aside.warm(rows, tally, asked.rate.unwrap_or(RATE), share);
    let health = Arc::clone(&front.health);
    let told = Told { warming, _place: place, _room: room, health, total, started: Instant::now() };
    let mut response = HttpResponse::Ok();
    response.content_type("application/x-ndjson").insert_header((CACHE_CONTROL, "no-store"));
    Ok(response.streaming(told.lines()))
}

/// The rows that are read most at this replica; lists are left to their readers.
fn hot(front: &Front, resource: &Arc<Resource>) -> Vec<Target> {
    let prefix = resource.row_prefix();
    let hot = front.aside.top(HOT).hot.into_iter().filter(|one| one.resource == resource.name);
    hot.filter_map(|one| resource.row_spelled(one.key.strip_prefix(&prefix)?).ok()).collect()
}

/// The keys that a body names, in the text that they came in: they are read from it once to see that all are sound, and
/// again when their turn has come. All of them as targets would take a hundred times as much.
#[derive(Clone)]
struct Named(Arc<RawValue>);

impl Named {
    /// Past the bracket.
    const FIRST: usize = 1;

    fn new(keys: Box<RawValue>) -> Result<Self, Problem> {
        if !keys.get().starts_with('[') {
            return Err(Problem::bad_request("the body is not as expected: keys: expected a list"));
        }
        Ok(Self(keys.into()))
    }

    /// The next key from a byte of the text on, and where it ends.
    fn next(&self, at: usize) -> Option<(&str, usize)> {
        let rest = self.0.get().get(at..)?.trim_start_matches([',', ' ', '\n', '\r', '\t']);
        let begin = self.0.get().len() - rest.len();
        // The list was parsed as a whole: what is no value is its end.
        let mut values = serde_json::Deserializer::from_str(rest).into_iter::<&RawValue>();
        let key = values.next()?.ok()?;
        Some((key.get(), begin + values.byte_offset()))
    }

    /// What each key names, in their order.
    fn walk(self, resource: &Arc<Resource>) -> impl Stream<Item = Result<Target, KeyError>> + Send + use<> {
        let resource = Arc::clone(resource);
        stream::unfold((self, Self::FIRST, 0_u64), move |(named, at, seen)| {
            let found = named.next(at).map(|(key, end)| (one(&resource, key), end));
            async move {
                let (target, end) = found?;
                let seen = seen + 1;
                if seen.is_multiple_of(TURN) {
                    tokio::task::yield_now().await;
                }
                Some((target, (named, end, seen)))
            }
        })
    }

    /// How many there are, if each is one that a row may have, or at least looks like one.
    async fn check(&self, resource: &Arc<Resource>) -> Result<u64, Problem> {
        let (mut count, mut keys) = (0_u64, pin!(self.clone().walk(resource)));
        while let Some(key) = keys.next().await {
            if let Err(KeyError::Malformed(words)) = key {
                return Err(Problem::bad_request(format!("keys[{count}]: {words}")));
            }
            count += 1;
        }
        Ok(count)
    }

    /// The rows of these keys. One that no row can have is absent.
    fn targets(self, resource: &Arc<Resource>, tally: &Arc<Tally>) -> impl Stream<Item = Target> + Send + use<> {
        let tally = Arc::clone(tally);
        self.walk(resource).filter_map(move |key| {
            if key.is_err() {
                tally.absent();
            }
            ready(key.ok())
        })
    }
}

/// A key: a text as it stands in a path, a number, or an array of the parts.
fn one(resource: &Arc<Resource>, json: &str) -> Result<Target, KeyError> {
    let text = |json: &str| match json.as_bytes().first() {
        Some(b'"') => serde_json::from_str::<String>(json).map_err(|error| KeyError::Malformed(error.to_string())),
        Some(b'[' | b'{' | b'n') | None => Err(KeyError::Malformed("expected a text or a number".into())),
        Some(_) => Ok(json.to_owned()),
    };
    if json.starts_with('[') {
        let parts: Vec<Box<RawValue>> =
            serde_json::from_str(json).map_err(|error| KeyError::Malformed(error.to_string()))?;
        return resource.row(parts.iter().map(|part| text(part.get())).collect::<Result<_, _>>()?);
    }
    resource.row_spelled(&text(json)?)
}

/// Warming that is told of. When whoever listens hangs up, this is dropped, and all ends.
struct Told {
    warming: Warming,
    _place: Place,
    _room: Room,
    health: Arc<Health>,
    total: Option<u64>,
    started: Instant,
}

/// How it ended.
enum End {
    Done,
    GaveUp(StoreError),
    Stopped,
}

impl Told {
    fn lines(self) -> impl Stream<Item = Result<Bytes, actix_web::Error>> {
        stream::unfold(Some(self), |told| async move {
            let mut told = told?;
            let end = told.next().await;
            let line = told.line(end.as_ref());
            Some((Ok(line), end.is_none().then_some(told)))
        })
    }

    /// Waits for the next line's time, or the end.
    async fn next(&mut self) -> Option<End> {
        let until = Instant::now() + LINE;
        loop {
            match tokio::time::timeout(LOOK, self.warming.ended()).await {
                Ok(Ok(())) => return Some(End::Done),
                Ok(Err(error)) => return Some(End::GaveUp(error)),
                Err(_) if self.health.draining.load(Ordering::Relaxed) => {
                    self.warming.stop();
                    // What is not done by then is not waited for.
                    let _ = tokio::time::timeout(STOP, self.warming.ended()).await;
                    return Some(End::Stopped);
                }
                Err(_) if Instant::now() >= until => return None,
                Err(_) => {}
            }
        }
    }

    fn line(&self, end: Option<&End>) -> Bytes {
        let counts = self.warming.counts();
        let mut line = json!({
            "done": matches!(end, Some(End::Done)),
            "keys": counts.keys(),
            "filled": counts.filled,
            "present": counts.present,
            "absent": counts.absent,
            "failed": counts.failed,
            "seconds": (self.started.elapsed().as_secs_f64() * 1000.0).round() / 1000.0,
        });
        if let Some(total) = self.total {
            line["total"] = total.into();
        }
        if end.is_some() && counts.failed > 0 {
            line["why"] = json!(counts.why);
        }
        match end {
            Some(End::Stopped) => line["stopped"] = "the service is stopping".into(),
            Some(End::GaveUp(error)) => line["stopped"] = gave_up(error).into(),
            Some(End::Done) | None => {}
        }
        let mut text = line.to_string();
        text.push('\n');
        text.into()
    }
}

/// Why there was no use in going on, without what the database said.
fn gave_up(error: &StoreError) -> &'static str {
    tracing::warn!(%error, "warming gave up");
    match error {
        StoreError::Unavailable(_) => "the database can't be reached",
        StoreError::Busy => "too many requests wait for the database",
        StoreError::TimedOut => "the database took too long",
        StoreError::Exhausted(_) => "the database has run out of memory or disk",
        StoreError::Changed(_) => "the table has changed",
        _ => "the database refused the statement",
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::pin::pin;
    use std::sync::Arc;

    use futures_util::{FutureExt, StreamExt};
    use proptest::prelude::*;
    use serde_json::value::RawValue;

    use super::{Named, TURN};
    use crate::aside::{Counts, Tally, batches};
    use crate::catalog::{Policy, Resource};
    use crate::config::Defaults;

    fn named(list: &str) -> Named {
        Named::new(RawValue::from_string(list.to_owned()).unwrap()).unwrap()
    }

    fn walked(list: &str) -> Vec<String> {
        let named = named(list);
        let (mut all, mut at) = (Vec::new(), Named::FIRST);
        while let Some((key, end)) = named.next(at) {
            all.push(key.to_owned());
            at = end;
        }
        all
    }

    #[test]
    fn keys_are_walked_through_in_the_text_that_they_came_in() {
        assert_eq!(walked("[]"), Vec::<String>::new());
        assert_eq!(walked("[ ]"), Vec::<String>::new());
        assert_eq!(
            walked("[1,-2.50 ,\"a\",[7,\"x\"],\n[[]],null,true]"),
            ["1", "-2.50", "\"a\"", "[7,\"x\"]", "[[]]", "null", "true"]
        );
        assert_eq!(walked(r#"["],[",",","\"","\u005d"]"#), [r#""],[""#, r#"",""#, r#""\"""#, r#""\u005d""#]);
        assert!(Named::new(RawValue::from_string("7".to_owned()).unwrap()).is_err());
    }

    #[tokio::test]
    async fn others_get_a_turn_while_keys_that_no_row_has_are_walked_through() {
        // Without columns: no key fits.
        let resource = Arc::new(Resource::loaded("item", Policy::new(&Defaults::default()), "", 1));
        let (keys, tally) = (10 * TURN, Arc::new(Tally::default()));
        let list = format!("[{}7]", "7,".repeat(usize::try_from(keys).unwrap()));
        let mut walk = pin!(batches(named(&list).targets(&resource, &tally)).count());
        let mut turns = 0;
        let found = poll_fn(|context| {
            turns += 1;
            walk.poll_unpin(context)
        });
        assert_eq!((found.await, tally.counts()), (0, Counts { absent: keys + 1, ..Counts::default() }));
        assert!(turns > 10, "{turns}");
    }

    proptest! {
        #[test]
        fn whatever_a_list_holds_is_found_in_it(values in proptest::collection::vec(
            prop_oneof![any::<i64>().prop_map(serde_json::Value::from), ".*".prop_map(serde_json::Value::from),
                proptest::collection::vec(".*", 0..3).prop_map(serde_json::Value::from)], 0..20)
        ) {
            let list = serde_json::Value::from(values.clone()).to_string();
            let found: Vec<String> = values.iter().map(ToString::to_string).collect();
            prop_assert_eq!(walked(&list), found);
        }
    }
}
