//! Who gets a connection, and who makes one, before a server that says what each test wants.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::ahead::tests::resource;
use super::{Checked, Connector, Pool, StoreError};
use crate::{config, store};

/// Two databases, or two lives of one.
const ONE: &str = "7:00000001:5:a:0";
const OTHER: &str = "7:00000002:5:b:0";

/// Takes connections, and says nothing by itself.
struct Server(TcpListener);

impl Server {
    async fn start(size: u32, queue: u32) -> (Self, Arc<Pool>) {
        let server = Self(TcpListener::bind(("127.0.0.1", 0)).await.expect("a port is free"));
        let database = config::Database {
            url: format!("postgres://a@{}/b?sslmode=disable", server.0.local_addr().expect("it is bound")).into(),
            pool_size: size,
            queue,
            statement_timeout: Duration::from_mins(1),
            ..config::Database::default()
        };
        let connector = Connector::new(&database).expect("it is sound");
        (server, Pool::empty(connector, &database).expect("it is sound"))
    }

    /// Somebody who connects, and has said who he is.
    async fn next(&self) -> Peer {
        let (mut stream, _) = self.0.accept().await.expect("somebody connects");
        let length = stream.read_u32().await.expect("it says who it is");
        stream.read_exact(&mut vec![0; length as usize - 4]).await.expect("it says who it is");
        Peer(stream)
    }

    /// A connection to a database that says this of itself.
    async fn connection(&self, origin: &str) -> Peer {
        let mut peer = self.next().await;
        peer.set_up(origin).await;
        peer
    }
}

/// The server's end of a connection.
struct Peer(TcpStream);

impl Peer {
    async fn say(&mut self, kind: u8, body: &[u8]) {
        let length = u32::try_from(body.len() + 4).expect("it is short");
        let message = [&[kind][..], &length.to_be_bytes(), body].concat();
        // Whoever has gone does not hear it.
        let _ = self.0.write_all(&message).await;
    }

    async fn let_in(&mut self) {
        self.say(b'R', &[0; 4]).await;
        self.say(b'Z', b"I").await;
    }

    /// What comes next; `None` where the other side has gone.
    async fn message(&mut self) -> Option<(u8, Vec<u8>)> {
        let kind = self.0.read_u8().await.ok()?;
        let length = self.0.read_u32().await.ok()?;
        let mut body = vec![0; length as usize - 4];
        self.0.read_exact(&mut body).await.ok()?;
        Some((kind, body))
    }

    /// The next statement; `None` where the other side has gone.
    async fn asked(&mut self) -> Option<String> {
        let (kind, body) = self.message().await?;
        (kind == b'Q').then(|| String::from_utf8(body).expect("it is text"))
    }

    /// The statement that is to be prepared next; it can't be.
    async fn prepares(&mut self) -> String {
        let mut statement = None;
        loop {
            let message = tokio::time::timeout(Duration::from_secs(20), self.message()).await;
            let (kind, body) = message.expect("it is asked").expect("it is there");
            match kind {
                // A name, the text, the types of its parameters.
                b'P' => statement = body.split(|byte| *byte == 0).nth(1).map(<[u8]>::to_vec),
                // That was all.
                b'S' => break,
                _ => {}
            }
        }
        self.refuse("42P01").await;
        self.say(b'Z', b"I").await;
        String::from_utf8(statement.expect("something is prepared")).expect("it is text")
    }

    /// Whether the other side goes without another word.
    async fn is_left(&mut self) -> bool {
        let ended = tokio::time::timeout(Duration::from_secs(20), self.0.read_u8()).await;
        ended.is_ok_and(|word| word.is_err())
    }

    /// One row with one text.
    async fn answer(&mut self, text: &str) {
        let column = [&1_u16.to_be_bytes()[..], b"x\0", &[0; 6], &25_u32.to_be_bytes(), &[255; 6], &[0; 2]].concat();
        self.say(b'T', &column).await;
        let length = u32::try_from(text.len()).expect("it is short");
        self.say(b'D', &[&1_u16.to_be_bytes()[..], &length.to_be_bytes(), text.as_bytes()].concat()).await;
        self.say(b'C', b"SELECT 1\0").await;
        self.say(b'Z', b"I").await;
    }

    async fn refuse(&mut self, code: &str) {
        self.say(b'E', format!("SERROR\0C{code}\0Mno\0\0").as_bytes()).await;
    }

    async fn set_up(&mut self, origin: &str) {
        self.let_in().await;
        assert!(self.asked().await.expect("it is set up").contains("statement_timeout"));
        self.answer("t").await;
        assert!(self.asked().await.expect("it is asked").contains("origin"));
        self.answer(origin).await;
    }
}

type Asking<'a> = Pin<Box<dyn Future<Output = Result<Checked<'a>, StoreError>> + 'a>>;

/// Somebody who needs a connection, and has none yet.
async fn asking(pool: &Arc<Pool>) -> Asking<'_> {
    let mut asking: Asking<'_> = Box::pin(pool.checkout());
    assert!(futures_util::poll!(&mut asking).is_pending());
    asking
}

/// Goes on with it until so many wait for others.
async fn until_waiting(pool: &Arc<Pool>, asking: &mut Asking<'_>, count: usize) {
    let waiting = async {
        while pool.connections().waiting != count {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::select! {
        ended = asking => panic!("{:?}", ended.err()),
        () = waiting => {}
    }
}

fn counts(pool: &Pool) -> (usize, usize, usize) {
    let now = pool.connections();
    (now.in_use, now.idle, now.waiting)
}

async fn checked<'a>(server: &Server, pool: &'a Arc<Pool>, origin: &str) -> (Peer, Checked<'a>) {
    let (peer, checked) = tokio::join!(server.connection(origin), pool.checkout());
    (peer, checked.expect("it is let in"))
}

#[tokio::test]
async fn what_nobody_wants_any_more_is_not_made() {
    let (server, pool) = Server::start(1, 5).await;
    let gone = asking(&pool).await;
    let mut peer = server.next().await;
    drop(gone);
    peer.let_in().await;
    assert!(peer.is_left().await);
    // Nor does it stay while the server works on what it was asked.
    let gone = asking(&pool).await;
    let mut peer = server.next().await;
    peer.let_in().await;
    assert!(peer.asked().await.is_some());
    drop(gone);
    assert!(peer.is_left().await);
    assert_eq!(counts(&pool), (0, 0, 0));
    let (_peer, _checked) = checked(&server, &pool, ONE).await;
    assert_eq!(counts(&pool), (1, 0, 0));
}

#[tokio::test]
async fn whoever_waits_makes_what_somebody_else_gave_up() {
    let (server, pool) = Server::start(1, 5).await;
    let first = asking(&pool).await;
    let _silent = server.next().await;
    let (gone, second, third) = (asking(&pool).await, asking(&pool).await, asking(&pool).await);
    assert_eq!(counts(&pool), (0, 0, 3));
    drop(gone);
    drop(first);
    let (_peer, second) = tokio::join!(server.connection(ONE), second);
    let second = second.expect("it is let in");
    assert_eq!(counts(&pool), (1, 0, 1));
    drop(second);
    let third = third.await.expect("it came back");
    assert_eq!(counts(&pool), (1, 0, 0));
    drop(third);
    assert_eq!(counts(&pool), (0, 1, 0));
}

#[tokio::test]
async fn whoever_makes_one_takes_what_comes_back_and_the_other_is_made_for_others() {
    let (server, pool) = Server::start(3, 5).await;
    let (_peer, first) = checked(&server, &pool, ONE).await;
    let second = asking(&pool).await;
    let mut slow = server.next().await;
    drop(first);
    let _second = second.await.expect("one came back");
    assert_eq!(counts(&pool), (1, 0, 0));
    let third = asking(&pool).await;
    assert_eq!(counts(&pool), (1, 0, 1), "both that are kept are there or being made");
    slow.set_up(ONE).await;
    let _third = third.await.expect("it was made");
    assert_eq!(counts(&pool), (2, 0, 0));
}

#[tokio::test]
async fn while_a_lost_one_may_still_be_at_work_nobody_has_its_seat() {
    let (server, pool) = Server::start(1, 5).await;
    let (_peer, first) = checked(&server, &pool, ONE).await;
    let lost = first.lose().expect("it is there");
    let mut second = asking(&pool).await;
    // The grower has looked, too.
    for _ in 0..5 {
        until_waiting(&pool, &mut second, 1).await;
        tokio::time::sleep(super::COMES_BACK).await;
    }
    assert_eq!(counts(&pool), (0, 0, 1));
    drop(lost);
    let (_peer, second) = tokio::join!(server.connection(ONE), second);
    second.expect("it is let in");
}

#[tokio::test]
async fn where_the_server_gives_no_other_one_those_that_there_are_are_waited_for() {
    for code in ["53300", "28000"] {
        let (server, pool) = Server::start(3, 5).await;
        let (peer, first) = checked(&server, &pool, ONE).await;
        let mut second = asking(&pool).await;
        let refusing = async {
            loop {
                server.next().await.refuse(code).await;
            }
        };
        let story = async {
            until_waiting(&pool, &mut second, 1).await;
            drop(first);
            let second = second.await.expect("one came back");
            let mut third = asking(&pool).await;
            until_waiting(&pool, &mut third, 1).await;
            // The last one ends, and there is none to wait for.
            drop(peer);
            while !second.client().expect("it is there").is_closed() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            drop(second);
            let refused = third.await.err();
            assert!(matches!(&refused, Some(StoreError::Unavailable(said)) if said.contains(code)), "{refused:?}");
            let refused = pool.checkout().await.err();
            assert!(matches!(&refused, Some(StoreError::Unavailable(said)) if said.contains(code)), "{refused:?}");
        };
        tokio::select! {
            () = refusing => {}
            () = story => {}
        }
        let (_peer, _checked) = checked(&server, &pool, ONE).await;
        assert_eq!(counts(&pool), (1, 0, 0));
    }
}

#[tokio::test]
async fn a_connection_is_of_the_database_that_it_found_and_of_no_use_once_others_find_another() {
    let (server, pool) = Server::start(5, 5).await;
    let connector = &pool.connector;
    // It is made, and before anybody uses it others find another one.
    let slow = asking(&pool).await;
    let mut peer = server.connection(ONE).await;
    let (_peer, found) = tokio::join!(server.connection(OTHER), connector.find());
    drop(found.expect("it is let in"));
    let late = slow.await.expect("it was made");
    assert_eq!(late.life.fingerprint, store::origin(ONE));
    drop(late);
    assert!(peer.is_left().await);

    let (mut former, first) = checked(&server, &pool, ONE).await;
    let (mut idle, second) = checked(&server, &pool, ONE).await;
    drop(second);
    // It finds the other one, and somebody takes what is idle by then.
    let (there, third) = tokio::join!(server.connection(OTHER), async {
        let (taken, third) = (pool.checkout().await.expect("it is idle"), pool.checkout().await);
        drop(taken);
        third
    });
    let (_peer, third) = (there, third.expect("it is let in"));
    assert_eq!((first.life.fingerprint, third.life.fingerprint), (store::origin(ONE), store::origin(OTHER)));
    assert!(idle.is_left().await);
    drop(first);
    assert!(former.is_left().await);
    assert_eq!(counts(&pool), (1, 0, 0));
    drop(third);
    assert_eq!(counts(&pool), (0, 1, 0));
    // Idle ones, too, and whoever takes one by then finds another.
    let (_peer, found) = tokio::join!(server.connection(ONE), connector.find());
    drop(found.expect("it is let in"));
    let (_peer, fourth) = checked(&server, &pool, ONE).await;
    assert_eq!((fourth.life.fingerprint, counts(&pool)), (store::origin(ONE), (1, 0, 0)));
    drop(fourth);
    let (_peer, found) = tokio::join!(server.connection(OTHER), connector.find());
    drop(found.expect("it is let in"));
    pool.sort_out();
    assert_eq!(counts(&pool), (0, 0, 0));
}

#[tokio::test]
async fn a_database_that_has_no_time_to_say_what_it_is_is_no_other_one() {
    let (server, pool) = Server::start(3, 5).await;
    let (_peer, first) = checked(&server, &pool, ONE).await;
    for code in ["57014", "57P01", "53200"] {
        let failing = async {
            let mut peer = server.next().await;
            peer.let_in().await;
            assert!(peer.asked().await.is_some());
            peer.answer("t").await;
            assert!(peer.asked().await.is_some());
            peer.refuse(code).await;
            peer.say(b'Z', b"I").await;
            peer.is_left().await
        };
        let (left, second) = tokio::join!(failing, pool.checkout());
        assert!(left);
        assert!(matches!(&second, Err(StoreError::Unavailable(said)) if said.contains(code)), "{:?}", second.err());
    }
    drop(first);
    assert_eq!(counts(&pool), (0, 1, 0));
}

#[tokio::test(start_paused = true)]
async fn as_many_are_let_in_as_there_are_connections_and_places_to_wait() {
    // The kernel takes connections, and nobody says a word.
    let (_server, pool) = Server::start(2, 3).await;
    for _ in 0..2 {
        let asked = (0..20).map(|_| async { pool.checkout().await.map(drop) });
        let answers = futures_util::future::join_all(asked).await;
        let busy = answers.iter().filter(|answer| **answer == Err(StoreError::Busy)).count();
        let silent = answers.iter().filter(|answer| matches!(answer, Err(StoreError::Unavailable(_)))).count();
        assert_eq!((busy, silent), (15, 5), "{answers:?}");
        assert_eq!(counts(&pool), (0, 0, 0));
    }
}

#[tokio::test]
async fn each_idle_connection_is_asked_once_for_what_is_read() {
    let (server, pool) = Server::start(2, 5).await;
    let (mut one, first) = checked(&server, &pool, ONE).await;
    let (mut other, second) = checked(&server, &pool, ONE).await;
    let (item, list) = (resource("a row", &["a list"]), resource("another row", &[]));
    pool.expect([&item].into_iter());
    // Both are lent: nobody is kept waiting for a connection that is only getting ready.
    pool.run_ahead().await;
    drop(first);
    drop(second);
    let asked = async |peer: &mut Peer| [peer.prepares().await, peer.prepares().await];
    let (first, second, ()) = tokio::join!(asked(&mut one), asked(&mut other), pool.run_ahead());
    assert_eq!((first, second), (["a row".into(), "a list".into()], ["a row".into(), "a list".into()]));
    pool.expect([&item, &list].into_iter());
    let (first, second, ()) = tokio::join!(one.prepares(), other.prepares(), pool.run_ahead());
    assert_eq!((first, second), ("another row".into(), "another row".into()));
    // Whoever asked again would wait for an answer that nobody gives.
    pool.run_ahead().await;
    assert_eq!(counts(&pool), (0, 2, 0));
}
