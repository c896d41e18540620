//! One look at a memory, and the one way in which its control key is written: as a whole, counted up by one, and only if nobody
//! has written since it was read.

use std::collections::HashMap;

use super::connection::Connection;
use super::shared::Shared;
use super::wire::{Batch, If, Reply};
use crate::cache::CacheError;
use crate::cache::control::{Control, Ids, field};
use crate::cache::lane::now_ms;

/// So often a change of the control key is tried while others change it too.
const TRIES: usize = 32;

/// The control key's fields, those of other versions among them.
pub(super) type Fields = HashMap<String, String>;

/// What a look over one connection found.
pub(super) struct Seen {
    pub(super) control: Control,
    pub(super) ids: Ids,
    /// When the look was sent, by this process's clock.
    pub(super) sent: u64,
    fields: Fields,
    /// Under which condition it may be written.
    condition: If,
}

/// Looks, in one round trip.
pub(super) async fn look(shared: &Shared, connection: &Connection) -> Result<Seen, CacheError> {
    let mut batch = Batch::new();
    batch.get(&shared.control_key);
    let sent = now_ms();
    let (fields, condition) = match connection.ask(batch).await?.pop() {
        // What can't be read is as good as not there, and is written over.
        Some(Reply::Value { value, cas, .. }) => (serde_json::from_slice(&value).unwrap_or_default(), If::Is(cas)),
        Some(Reply::Missing) => (Fields::new(), If::Absent),
        _ => return Err(CacheError::Refused),
    };
    let ids = Ids { run: connection.server.run(), replication: String::new() };
    Ok(Seen { control: Control::read(fields.clone()), ids, sent, fields, condition })
}

/// Writes what a look has found, changed; false where somebody has written since.
pub(super) async fn write(
    shared: &Shared,
    connection: &Connection,
    seen: &Seen,
    edit: impl FnOnce(&mut Fields, u64),
) -> Result<bool, CacheError> {
    let number = seen.control.number.saturating_add(1);
    let mut fields = seen.fields.clone();
    fields.insert(field::NUMBER.to_owned(), number.to_string());
    edit(&mut fields, number);
    let value = serde_json::to_vec(&fields).map_err(|_| CacheError::Refused)?;
    let mut batch = Batch::new();
    batch.set(&shared.control_key, seen.condition, 0, &value);
    match connection.ask(batch).await?.pop() {
        Some(Reply::Done(_)) => Ok(true),
        Some(Reply::Taken | Reply::Changed | Reply::Missing) => Ok(false),
        _ => Err(CacheError::Refused),
    }
}

/// Changes the control key, whatever others do to it meanwhile.
pub(super) async fn change(
    shared: &Shared,
    connection: &Connection,
    edit: impl Fn(&mut Fields),
) -> Result<(), CacheError> {
    for _ in 0..TRIES {
        let seen = look(shared, connection).await?;
        if write(shared, connection, &seen, |fields, _| edit(fields)).await? {
            return Ok(());
        }
    }
    Err(CacheError::Refused)
}

/// Tells everybody who runs rounds here of what this process caches. A round that looked before is void. False where
/// everything was known.
pub(super) async fn register(shared: &Shared, connection: &Connection, seen: &Seen) -> Result<bool, CacheError> {
    let mappings = shared.mappings.load();
    let lacking: Vec<_> =
        mappings.iter().filter(|(fingerprint, _)| !seen.control.mappings.contains_key(*fingerprint)).collect();
    if lacking.is_empty() {
        return Ok(false);
    }
    // Where somebody was faster, the next look tells whether there is something left to say.
    write(shared, connection, seen, |fields, _| {
        let lacking = lacking.into_iter();
        fields.extend(lacking.map(|(fingerprint, mapping)| (field::mapping(fingerprint), mapping.to_json())));
    })
    .await?;
    Ok(true)
}
