//! `cache-aside warm`: fills the cache with rows of a resource, beside a running service or without one.
//!
//! It is a replica without a door: it brings the cache up to date itself, where nobody else does, and fills it the way that
//! any read does. Lists and results of statements are left to their readers.

use std::fs::{File, metadata};
use std::io::{self, BufRead, BufReader, IsTerminal, Read as _, Write as _, stderr, stdin};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use futures_util::stream::{self, BoxStream};
use futures_util::{Stream, StreamExt};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use super::{failed, load, misconfigured, resource, runtime, say, store};
use crate::app::{Watches, look, open_cache, serve};
use crate::aside::{Counts, RATE, Share, Tally, Warming};
use crate::cache::AnyCache;
use crate::catalog::{Capture, KeyError, Resource, State, Target};
use crate::config::{Config, Env, LogFormat};
use crate::served::Served;
use crate::store::StoreError;
use crate::telemetry::{self, Metrics};

/// How long the cache may take to be usable.
const CONNECT: Duration = Duration::from_secs(5);
/// Between two looks whether it is.
const LOOK: Duration = Duration::from_millis(20);
/// Between two changes of the line on a terminal.
const REDRAW: Duration = Duration::from_millis(200);
/// Between two lines where there is no terminal.
const LINE: Duration = Duration::from_secs(5);
/// Keys that are read at once from a file.
const CHUNK: usize = 100;
/// The longest line, in bytes.
const LONGEST: u64 = 64 << 10;
/// Bad lines that are shown; the others are only counted.
const SHOWN: usize = 20;

#[derive(clap::Args)]
#[command(group = clap::ArgGroup::new("which").required(true))]
pub(super) struct Options {
    /// The resource.
    resource: String,
    /// Rows by their keys, one per line, as in paths: parts of a composite key are separated by commas. `-`: standard input.
    #[arg(long, value_name = "FILE", group = "which")]
    ids: Option<PathBuf>,
    /// All rows.
    #[arg(long, group = "which")]
    all: bool,
    /// Keys per second; 0: as fast as it goes with a quarter of `database.pool_size`.
    #[arg(long, value_name = "KEYS", default_value_t = RATE)]
    rate: u32,
}

pub(super) fn run(file: Option<&Path>, env: &Env, options: &Options) -> ExitCode {
    telemetry::init_log(LogFormat::Text, env.get("RUST_LOG").or(Some("error")), true);
    let (config, is_demo) = match load(file, env) {
        Ok(loaded) => loaded,
        Err(error) => return misconfigured(&error),
    };
    let warmed = runtime().and_then(|runtime| {
        let warmed = runtime.block_on(warm(config, is_demo, options));
        runtime.shutdown_background();
        warmed
    });
    match warmed {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => failed(&error),
    }
}

/// Whether all of it is in the cache now.
async fn warm(mut config: Config, is_demo: bool, options: &Options) -> anyhow::Result<bool> {
    let name = &options.resource;
    let cache = open_cache(&config)?;
    if let AnyCache::Memory(_) = cache {
        anyhow::bail!(
            "the cache is in the service's own process: nothing can be filled from outside; \
             ask the service with POST /admin/warm/{name}"
        );
    }
    let lines = match &options.ids {
        Some(file) => Some(Lines::open(file)?),
        None => None,
    };
    let store = store(&config, is_demo).await?;
    let (catalog, _) = look(&store, &config).await;
    let resource = resource(&catalog, name)?;
    anyhow::ensure!(
        resource.capture != Capture::Lacking,
        "changes of {name} are not captured: it is served past the cache until cache-aside migrate has run"
    );
    // Nobody asks here for rows that are not there.
    config.resources.values_mut().for_each(|resource| resource.filter = false);
    let config = Arc::new(config);
    let served = serve(&config, store, cache, Arc::new(Metrics::new()?));
    let watches = Watches::start(&served, &config);
    let resource = usable(&served, name).await.with_context(|| format!("the cache at {}", config.cache.url))?;

    let (tally, share) = (Arc::new(Tally::default()), Share::of(config.database.pool_size));
    let total = lines.as_ref().and_then(|lines| lines.count);
    let keys: BoxStream<'static, Result<Vec<Target>, StoreError>> = match lines {
        Some(lines) => lines.targets(resource, Arc::clone(&tally)).boxed(),
        None => served.aside.all(&resource, &share).boxed(),
    };
    let started = Instant::now();
    let mut warming = served.aside.warm(keys, tally, options.rate, share);
    let stopped = followed(&mut warming, total, started).await;
    let counts = warming.counts();
    say(format_args!("{name}: {}, in {:.1} s", summary(&counts), started.elapsed().as_secs_f64()));
    for (why, count) in &counts.why {
        eprintln!("{count} failed: {why}");
    }
    served.aside.settle(Duration::from_secs(1)).await;
    drop(watches);
    let whole = match stopped {
        Ok(true) => true,
        Ok(false) => {
            eprintln!("stopped before the end");
            false
        }
        Err(error) => {
            eprintln!("gave up: {error}");
            false
        }
    };
    Ok(whole && counts.failed == 0)
}

/// Waits until the cache can be filled, and gives the resource as it is known from then on.
async fn usable(served: &Served, name: &str) -> anyhow::Result<Arc<Resource>> {
    let started = Instant::now();
    loop {
        let health = served.aside.cache().health();
        let known = served.catalog.load();
        match (known.resources.get(name), &health) {
            (Some(State::Ready(resource, _)), Ok(())) => return Ok(Arc::clone(resource)),
            _ if started.elapsed() < CONNECT => tokio::time::sleep(LOOK).await,
            (_, Err(error)) => anyhow::bail!("it can't be used: {error}"),
            (_, Ok(())) => anyhow::bail!("{name} can't be looked at any more"),
        }
    }
}

/// Shows how it goes until it ends; whether it came to its end.
async fn followed(warming: &mut Warming, total: Option<u64>, started: Instant) -> anyhow::Result<bool> {
    let on_terminal = stderr().is_terminal();
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let mut ticks = tokio::time::interval(if on_terminal { REDRAW } else { LINE });
    // The first one comes at once.
    ticks.tick().await;
    let mut whole = true;
    let ended = loop {
        // Both are only waited for: the end is asked for again after a look.
        let counts = warming.counts();
        tokio::select! {
            ended = warming.ended() => break ended,
            _ = terminate.recv() => { whole = false; }
            _ = interrupt.recv() => { whole = false; }
            _ = ticks.tick() => {
                let line = progress(&counts, total, started.elapsed());
                let (before, after) = if on_terminal { ("\r\x1b[K", "") } else { ("", "\n") };
                // Whoever closed it does not want to see it.
                let _ = write!(stderr(), "{before}{line}{after}");
                continue;
            }
        }
        warming.stop();
    };
    if on_terminal {
        let _ = write!(stderr(), "\r\x1b[K");
    }
    ended?;
    Ok(whole)
}

/// One line: a bar where the end is known.
fn progress(counts: &Counts, total: Option<u64>, passed: Duration) -> String {
    const WIDTH: u64 = 24;
    let keys = counts.keys();
    #[expect(clippy::cast_precision_loss, reason = "shown to people")]
    let speed = keys as f64 / passed.as_secs_f64().max(0.001);
    let how = match total.filter(|total| *total > 0) {
        Some(total) => {
            let done = keys.min(total);
            let filled = usize::try_from(done * WIDTH / total).unwrap_or(0);
            let left = usize::try_from(WIDTH).unwrap_or(0) - filled;
            format!("[{}{}] {:3}% {keys} of {total}", "#".repeat(filled), " ".repeat(left), done * 100 / total)
        }
        None => format!("{keys} keys"),
    };
    format!("{how}, {speed:.0}/s, {} failed", counts.failed)
}

fn summary(counts: &Counts) -> String {
    let Counts { filled, present, absent, failed, .. } = counts;
    format!("{filled} filled, {present} already there, {absent} absent, {failed} failed")
}

/// Keys, one per line.
struct Lines {
    from: From,
    number: usize,
    /// How many there are, where that is known without reading them twice from a pipe.
    count: Option<u64>,
    shown: usize,
}

/// Where lines come from.
enum From {
    File(File),
    Stdin,
    /// A pipe, or whatever else is no file: to open it may take until somebody writes into it.
    Pipe(PathBuf),
}

impl From {
    fn open(self) -> io::Result<Box<dyn BufRead>> {
        Ok(match self {
            Self::File(file) => Box::new(BufReader::new(file)),
            Self::Stdin => Box::new(BufReader::new(stdin())),
            Self::Pipe(path) => Box::new(BufReader::new(File::open(path)?)),
        })
    }
}

impl Lines {
    fn open(file: &Path) -> anyhow::Result<Self> {
        let words = || format!("{} can't be read", file.display());
        let (from, count) = if file == Path::new("-") {
            (From::Stdin, None)
        } else if metadata(file).with_context(words)?.is_file() {
            let count = count(&mut BufReader::new(File::open(file).with_context(words)?))?;
            (From::File(File::open(file).with_context(words)?), Some(count))
        } else {
            (From::Pipe(file.to_owned()), None)
        };
        Ok(Self { from, number: 0, count, shown: 0 })
    }

    /// The rows that they name, some at a time. What is wrong with a line is said and counted, and the rest goes on. They are
    /// read in a thread of its own, which the end does not wait for: a pipe may stay silent for ever.
    fn targets(
        self,
        resource: Arc<Resource>,
        tally: Arc<Tally>,
    ) -> impl Stream<Item = Result<Vec<Target>, StoreError>> + Send + 'static {
        let (tell, told) = mpsc::channel(1);
        tokio::task::spawn_blocking(move || self.read(&resource, &tally, &tell));
        stream::unfold(told, async |mut told| Some((Ok(told.recv().await?), told)))
    }

    /// Reads until the end, or until nobody wants to know any more.
    fn read(mut self, resource: &Arc<Resource>, tally: &Tally, tell: &mpsc::Sender<Vec<Target>>) {
        let mut from = match std::mem::replace(&mut self.from, From::Stdin).open() {
            Ok(from) => from,
            Err(error) => return self.wrong(tally, "lines that can't be read", &error.to_string()),
        };
        while let Some(targets) = self.some(&mut from, resource, tally) {
            if tell.blocking_send(targets).is_err() {
                return;
            }
        }
    }

    /// The next ones; `None`: that was all.
    fn some(&mut self, from: &mut impl BufRead, resource: &Arc<Resource>, tally: &Tally) -> Option<Vec<Target>> {
        let (mut targets, mut read) = (Vec::with_capacity(CHUNK), false);
        while targets.len() < CHUNK {
            let mut line = Vec::new();
            match from.by_ref().take(LONGEST).read_until(b'\n', &mut line) {
                Ok(0) => break,
                Ok(length) if length as u64 == LONGEST && !line.ends_with(b"\n") => {
                    (self.number, read) = (self.number + 1, true);
                    self.wrong(tally, "lines that are too long", "too long");
                    // What can't be skipped can't be read either.
                    let _ = from.skip_until(b'\n');
                    continue;
                }
                Ok(_) => {}
                Err(error) => {
                    self.wrong(tally, "lines that can't be read", &error.to_string());
                    break;
                }
            }
            (self.number, read) = (self.number + 1, true);
            while line.pop_if(|last| matches!(last, b'\n' | b'\r')).is_some() {}
            let Ok(line) = str::from_utf8(&line) else {
                self.wrong(tally, "lines that are not UTF-8", "not UTF-8");
                continue;
            };
            if line.is_empty() {
                continue;
            }
            match resource.row_spelled(line) {
                Ok(target) => targets.push(target),
                Err(KeyError::CannotExist) => tally.absent(),
                Err(KeyError::Malformed(words)) => self.wrong(tally, "lines that are no keys", &words),
            }
        }
        (read || !targets.is_empty()).then_some(targets)
    }

    fn wrong(&mut self, tally: &Tally, why: &'static str, words: &str) {
        tally.failed(why);
        self.shown += 1;
        if self.shown <= SHOWN {
            let clear = if stderr().is_terminal() { "\r\x1b[K" } else { "" };
            eprintln!("{clear}line {}: {words}", self.number);
        }
    }
}

/// Counts lines.
fn count(from: &mut impl BufRead) -> io::Result<u64> {
    let mut lines = 0;
    while from.skip_until(b'\n')? > 0 {
        lines += 1;
    }
    Ok(lines)
}
