//! What an error of the server, or of the way to it, means to a caller.

use mysql_async::{Error, ServerError};

use crate::store::StoreError;

/// Why a statement has no answer.
#[derive(Debug)]
pub(super) enum Failure {
    /// The server said no.
    Server(ServerError),
    /// The connection is no good any more: why.
    Lost(String),
    /// Nothing came in time.
    TimedOut,
}

impl Failure {
    pub(super) fn was_lost(&self) -> bool {
        matches!(self, Self::Lost(_))
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        match error {
            Error::Server(refusal) if has_ended(&refusal) => Self::Lost(said(&refusal)),
            Error::Server(refusal) => Self::Server(refusal),
            // The driver's text holds no statement and no password.
            other => Self::Lost(other.to_string()),
        }
    }
}

impl From<Failure> for StoreError {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Server(refusal) => meaning(&refusal),
            Failure::Lost(why) => Self::Unavailable(why),
            Failure::TimedOut => Self::TimedOut,
        }
    }
}

/// What a "no" of the server means for a statement that was sound before.
pub(super) fn meaning(refusal: &ServerError) -> StoreError {
    let said = said(refusal);
    match refusal.code {
        // Statement timeout (MySQL, MariaDB), killed, waited too long for a lock.
        3024 | 1969 | 1317 | 1205 => StoreError::TimedOut,
        // No such database, column or table.
        1049 | 1054 | 1146 => StoreError::Changed(said),
        // Out of memory or disk.
        1021 | 1037 | 1038 | 1041 | 1114 => StoreError::Exhausted(said),
        // Too many connections, shutting down, killed, read only, deadlock.
        1040 | 1053 | 1152 | 1203 | 1213 | 1226 | 1290 | 1792 | 1836 | 1927 | 3169 | 4031 => {
            StoreError::Unavailable(said)
        }
        // Mixed collations, wrong dates and strings.
        1267 | 1270 | 1271 | 1292 | 1300 | 1366 | 1411 | 1525 => {
            StoreError::BadValue("it is not of the column's type".into())
        }
        _ if refusal.state.starts_with("22") => StoreError::BadValue("it is not of the column's type".into()),
        _ if refusal.state.starts_with("08") => StoreError::Unavailable(said),
        _ => StoreError::Refused(said),
    }
}

/// What it means where the statement itself may be wrong. A syntax error quotes it, which nobody needs.
pub(super) fn of_statement(refusal: &ServerError) -> StoreError {
    match meaning(refusal) {
        // It wanted to write.
        _ if refusal.code == 1792 => StoreError::BadStatement("it may only read".into()),
        outage if outage.is_outage() => outage,
        _ if refusal.code == 1064 => {
            let line = refusal.message.rsplit_once(" at line ").map(|(_, line)| format!(" in line {line}"));
            StoreError::BadStatement(format!("syntax error{}", line.unwrap_or_default()))
        }
        _ => StoreError::BadStatement(refusal.message.clone()),
    }
}

/// Why there is no connection, or no answer to the question whether it answers. Whoever refuses (too many connections, a
/// password that was changed) does answer.
pub(super) fn unanswered(error: &Error) -> StoreError {
    match error {
        // Its state says that it is going, or not there yet.
        Error::Server(refusal) if has_ended(refusal) || refusal.state == "08S01" => {
            StoreError::Unavailable(said(refusal))
        }
        Error::Server(refusal) => StoreError::Refused(said(refusal)),
        other => StoreError::Unavailable(other.to_string()),
    }
}

/// The same for whoever needs a connection: whatever the server said, the database is out of reach.
pub(super) fn out_of_reach(unanswered: StoreError) -> StoreError {
    match unanswered {
        StoreError::Refused(said) => StoreError::Unavailable(said),
        other => other,
    }
}

fn said(refusal: &ServerError) -> String {
    format!("{} ({})", refusal.message, refusal.code)
}

/// Whether this ends the session: the server goes, somebody killed the connection, or nobody used it for too long.
fn has_ended(refusal: &ServerError) -> bool {
    matches!(refusal.code, 1053 | 1079 | 1080 | 1927 | 3169 | 4031)
}
