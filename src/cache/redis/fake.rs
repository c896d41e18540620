//! A server for tests: a thread that answers when the story says so.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use tokio::sync::mpsc as heard;

use super::shared::Shared;
use crate::config::{self, SecretUrl};

/// What operations may take here.
pub(super) const TIMEOUT: Duration = Duration::from_millis(100);

/// A server for one connection, to which some commands come as news: what becomes of them is the story's to say.
///
/// A paused clock is moved on where everybody waits, but not while there is a thread at work, as this one is: so it
/// stands still until the story moves it.
pub(super) struct Fake {
    port: u16,
    heard: heard::UnboundedReceiver<()>,
    said: mpsc::Sender<()>,
}

impl Fake {
    /// Begins to listen; `news` are the commands of that name.
    pub(super) fn start(news: &'static str) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a port is free");
        let port = listener.local_addr().expect("it has one").port();
        let ((tell, heard), (said, word)) = (heard::unbounded_channel(), mpsc::channel());
        tokio::task::spawn_blocking(move || {
            let (mut stream, _) = listener.accept().expect("somebody comes");
            let mut commands = BufReader::new(stream.try_clone().expect("it can be cloned"));
            while let Some(words) = command(&mut commands) {
                // Not where it is only asked whether it may be sent.
                let is_news = words[0] == news && words.get(1).is_some_and(|key| !key.ends_with("-rights"));
                if is_news && (tell.send(()).is_err() || word.recv().is_err()) {
                    // Nobody will say anything any more.
                    return;
                }
                if stream.write_all(reply(&words[0]).as_bytes()).is_err() {
                    return;
                }
            }
        });
        Self { port, heard, said }
    }

    /// Waits until the next of them has come. It is not answered before [`Self::answer`].
    pub(super) async fn heard(&mut self) {
        self.heard.recv().await.expect("it is there");
    }

    /// Answers it.
    pub(super) fn answer(&self) {
        self.said.send(()).expect("it is there");
    }

    /// What leads to it.
    pub(super) fn config(&self) -> config::Cache {
        let url = SecretUrl::new(format!("redis://127.0.0.1:{}", self.port));
        config::Cache { url, timeout: TIMEOUT, ..config::Cache::default() }
    }

    /// The same, for lanes.
    pub(super) fn shared(&self, max_staleness: Option<Duration>) -> Arc<Shared> {
        Arc::new(Shared::new(&self.config(), max_staleness).expect("sound"))
    }
}

fn command(from: &mut impl BufRead) -> Option<Vec<String>> {
    let count = number(from)?;
    let words = (0..count).map(|_| {
        let mut word = vec![0; number(from)? + 2];
        from.read_exact(&mut word).ok()?;
        word.truncate(word.len() - 2);
        Some(String::from_utf8_lossy(&word).into_owned())
    });
    words.collect()
}

fn number(from: &mut impl BufRead) -> Option<usize> {
    let mut line = String::new();
    from.read_line(&mut line).ok()?;
    line.get(1..)?.trim().parse().ok()
}

fn reply(name: &str) -> String {
    let info = "redis_version:7.0.0\r\nrun_id:one\r\nrole:master\r\nmaster_replid:one\r\n";
    match name {
        "HGETALL" => {
            "*6\r\n$5\r\nepoch\r\n$1\r\n1\r\n$3\r\nrun\r\n$3\r\none\r\n$11\r\nreplication\r\n$3\r\none\r\n".to_owned()
        }
        "TIME" => "*2\r\n$1\r\n1\r\n$1\r\n0\r\n".to_owned(),
        "INFO" => format!("${}\r\n{info}\r\n", info.len()),
        "UNLINK" => ":1\r\n".to_owned(),
        _ => "+OK\r\n".to_owned(),
    }
}
