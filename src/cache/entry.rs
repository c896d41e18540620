//! One entry, one value: a fixed header and the payload, so that every script touches one key alone.
//!
//! ```text
//! offset size
//!      0    2  magic "C\x03": another format version is another entry
//!      2    1  state: P pending, V valid, H held by a writer
//!      3    1  flags: 1 not found, 2 truncated list, 4 packed payload
//!      4   16  fence: of the fill (P) or of the refresh (V) under way; zero: none
//!     20    8  tag: format version, shape, epoch and generation
//!     28    8  check: a fingerprint of the cache key, so that no reply can pass for another key's
//!     36    8  soft_expires, milliseconds of the cache's clock
//!     44    8  stored_at, milliseconds of the cache's clock
//!     52    8  refresh_until, milliseconds of the cache's clock: until then the refresh is taken
//!     60   16  etag
//!     76    4  shape: the half of its fingerprint that tells a rolling update from a purge
//!     80    4  cost: what loading it took, in microseconds
//!     84    …  payload, as it is served or packed; of a held entry, 16 bytes for each holder
//! ```
//!
//! Integers are little endian. The scripts know these offsets too. The etag is that of what is served, packed or not, and
//! whoever reads entries can unpack them, whether he packs his own or not: replicas may differ in that.

use bytes::{BufMut, Bytes, BytesMut};
use xxhash_rust::xxh3::{xxh3_64, xxh3_128};

use super::Fill;
#[cfg(any(feature = "redis", feature = "memcached"))]
use super::pack::{pack, unpack};

/// Bytes before the payload.
pub const HEADER: usize = 84;

const MAGIC: [u8; 2] = *b"C\x03";
/// Where the half of the shape's fingerprint stands, and how long it is.
const SHAPE_AT: usize = 76;
const SHAPE: usize = 4;
const COST_AT: usize = 80;
const NEGATIVE: u8 = 1;
const TRUNCATED: u8 = 2;
const PACKED: u8 = 4;

/// A value as it is served.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// The bytes; empty for "not found".
    pub payload: Bytes,
    /// The payload's fingerprint.
    pub etag: u128,
    /// This is a "not found".
    pub negative: bool,
    /// The list was cut by its limit.
    pub truncated: bool,
    /// When it was stored, in milliseconds of the cache's clock; zero where no cache gave it.
    pub stored_at: u64,
    /// Milliseconds since it was stored, when it was read.
    pub age_ms: u64,
    /// Milliseconds until its TTL ends, when it was read; negative past it.
    pub ttl_ms: i64,
    /// Microseconds that loading it took.
    pub cost_us: u32,
    /// It is known to be as current as was promised. Otherwise it is served only because the database does not answer.
    pub verified: bool,
    /// It comes from the in-process tier in front of a shared memory.
    pub local: bool,
}

/// 128 random bits, new for every attempt to lease. From the operating system: a counter or a seeded generator would
/// repeat after a restart, and a repeated fence revives a dead lease.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Fence(pub [u8; 16]);

impl Fence {
    /// A new one.
    ///
    /// # Errors
    ///
    /// Where the operating system gives no randomness.
    pub fn new() -> Result<Self, getrandom::Error> {
        let mut bytes = [0; 16];
        getrandom::fill(&mut bytes)?;
        Ok(Self(bytes))
    }
}

impl std::fmt::Debug for Fence {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(out, "Fence({:032x})", u128::from_be_bytes(self.0))
    }
}

/// The fingerprint of a payload: the `ETag` of what is served.
#[must_use]
pub fn etag(payload: &[u8]) -> u128 {
    xxh3_128(payload)
}

/// The fingerprint of a cache key that is kept in its entry.
#[must_use]
pub fn check(key: &str) -> u64 {
    xxh3_64(key.as_bytes())
}

/// What an entry must have been stored under to be of any use.
#[must_use]
pub fn tag(shape: u64, epoch: u64, generation: u64, groups: &[u64]) -> u64 {
    let mut bytes = [0; 24];
    bytes[..8].copy_from_slice(&shape.to_le_bytes());
    bytes[8..16].copy_from_slice(&epoch.to_le_bytes());
    bytes[16..].copy_from_slice(&generation.to_le_bytes());
    groups.iter().fold(xxh3_64(&bytes), |tag, group| {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&tag.to_le_bytes());
        bytes[8..].copy_from_slice(&group.to_le_bytes());
        xxh3_64(&bytes)
    })
}

/// A value as a memory holds it.
#[derive(Clone, Debug, PartialEq)]
pub enum Held {
    /// Being filled.
    Pending,
    /// Kept empty by a writer that is about to commit.
    Reserved,
    /// A value of this tag.
    Valid {
        /// What it was stored under.
        tag: u64,
        /// Milliseconds of the cache's clock.
        soft_expires: u64,
        /// The value.
        entry: Entry,
    },
}

/// Reads a held value back; `now` is the cache's clock in milliseconds.
///
/// `None` for anything that is not an entry of this key and format: it is treated as absent. So is a packed payload that is
/// damaged, or would be larger than `max_entry`.
#[must_use]
pub fn decode(key: &str, value: &Bytes, now: u64, max_entry: usize) -> Option<Held> {
    let header = value.first_chunk::<HEADER>()?;
    if header[..2] != MAGIC {
        return None;
    }
    let number = |at: usize| {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&header[at..at + 8]);
        u64::from_le_bytes(bytes)
    };
    if number(28) != check(key) {
        return None;
    }
    match header[2] {
        b'P' => Some(Held::Pending),
        b'H' => Some(Held::Reserved),
        b'V' => {
            let mut etag = [0; 16];
            etag.copy_from_slice(&header[60..SHAPE_AT]);
            let mut cost = [0; 4];
            cost.copy_from_slice(&header[COST_AT..]);
            let (flags, tag, soft_expires, stored_at) = (header[3], number(20), number(36), number(44));
            let entry = Entry {
                etag: u128::from_le_bytes(etag),
                negative: flags & NEGATIVE != 0,
                truncated: flags & TRUNCATED != 0,
                stored_at,
                age_ms: now.saturating_sub(stored_at),
                ttl_ms: signed_difference(soft_expires, now),
                cost_us: u32::from_le_bytes(cost),
                verified: true,
                local: false,
                payload: if flags & PACKED == 0 { value.slice(HEADER..) } else { unpack(&value[HEADER..], max_entry)? },
            };
            Some(Held::Valid { tag, soft_expires, entry })
        }
        _ => None,
    }
}

/// Nobody packs what never leaves the process.
#[cfg(not(any(feature = "redis", feature = "memcached")))]
fn pack(_: &[u8]) -> Option<Vec<u8>> {
    None
}

#[cfg(not(any(feature = "redis", feature = "memcached")))]
fn unpack(_: &[u8], _: usize) -> Option<Bytes> {
    None
}

/// `later - earlier` in milliseconds, clamped.
fn signed_difference(later: u64, earlier: u64) -> i64 {
    if later >= earlier {
        i64::try_from(later - earlier).unwrap_or(i64::MAX)
    } else {
        i64::try_from(earlier - later).map_or(i64::MIN, |past| -past)
    }
}

#[cfg(feature = "memcached")]
/// What decides over a lease, for a memory that has no scripts to read it with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Marks {
    /// `P`, `V` or `H`.
    pub(super) state: u8,
    /// Of the fill or refresh under way.
    pub(super) fence: Fence,
    /// What it was leased or stored under.
    pub(super) tag: u64,
    /// When it was stored, in milliseconds of the cache's clock.
    pub(super) stored_at: u64,
    /// What stands in `refresh_until`.
    pub(super) lock: u64,
    shape: [u8; SHAPE],
}

#[cfg(feature = "memcached")]
impl Marks {
    /// Reads them; `None` for anything that is not an entry of this key and format.
    pub(super) fn of(key: &str, value: &[u8]) -> Option<Self> {
        let header = value.first_chunk::<HEADER>()?;
        let number = |at: usize| u64::from_le_bytes(std::array::from_fn(|index| header[at + index]));
        if header[..2] != MAGIC || number(28) != check(key) || !b"PVH".contains(&header[2]) {
            return None;
        }
        Some(Self {
            state: header[2],
            fence: Fence(std::array::from_fn(|index| header[4 + index])),
            tag: number(20),
            stored_at: number(44),
            lock: number(52),
            shape: std::array::from_fn(|index| header[SHAPE_AT + index]),
        })
    }

    /// Whether it is of this shape, of whatever generation.
    pub(super) fn is_of_shape(&self, shape: u64) -> bool {
        self.shape == shape.to_le_bytes()[..SHAPE]
    }
}

#[cfg(feature = "memcached")]
/// The same value with another fence and another `refresh_until`.
pub(super) fn marked(value: &[u8], fence: Fence, lock: u64) -> Vec<u8> {
    let mut value = value.to_vec();
    if value.len() >= HEADER {
        value[4..20].copy_from_slice(&fence.0);
        value[52..60].copy_from_slice(&lock.to_le_bytes());
    }
    value
}

/// The value of an entry that is being filled.
#[must_use]
pub fn pending(key: &str, fence: Fence, tag: u64, shape: u64) -> Vec<u8> {
    empty(b'P', key, fence, tag, shape)
}

/// The value of an entry that writers keep empty: the payload names them.
#[must_use]
pub fn reserved(key: &str, owners: &[Fence]) -> Vec<u8> {
    let mut value = empty(b'H', key, Fence([0; 16]), 0, 0);
    value.extend(owners.iter().flat_map(|owner| owner.0));
    value
}

/// Who holds an entry; nobody where it is not held.
#[must_use]
pub fn holders(value: &[u8]) -> Vec<Fence> {
    if value.get(..3) != Some(b"C\x03H") {
        return Vec::new();
    }
    let (owners, _) = value.get(HEADER..).unwrap_or_default().as_chunks::<16>();
    owners.iter().map(|owner| Fence(*owner)).collect()
}

fn empty(state: u8, key: &str, fence: Fence, tag: u64, shape: u64) -> Vec<u8> {
    let mut value = Vec::with_capacity(HEADER);
    value.extend_from_slice(&MAGIC);
    value.extend_from_slice(&[state, 0]);
    value.extend_from_slice(&fence.0);
    value.extend_from_slice(&tag.to_le_bytes());
    value.extend_from_slice(&check(key).to_le_bytes());
    value.resize(SHAPE_AT, 0);
    value.extend_from_slice(&shape.to_le_bytes()[..SHAPE]);
    value.resize(HEADER, 0);
    value
}

/// The value of a filled entry; `now` is the cache's clock in milliseconds. A payload of more than `pack_above` bytes is
/// packed where that makes it smaller; `None`: none is.
#[must_use]
pub fn valid(key: &str, tag: u64, shape: u64, fill: &Fill, now: u64, pack_above: Option<usize>) -> Bytes {
    let ttl = u64::try_from(fill.ttl.as_millis()).unwrap_or(u64::MAX);
    let mut flags = 0;
    if fill.negative {
        flags |= NEGATIVE;
    }
    if fill.truncated {
        flags |= TRUNCATED;
    }
    let packed = pack_above.filter(|above| fill.payload.len() > *above).and_then(|_| pack(&fill.payload));
    if packed.is_some() {
        flags |= PACKED;
    }
    let payload = packed.as_deref().unwrap_or(&fill.payload);
    let mut value = BytesMut::with_capacity(HEADER + payload.len());
    value.put_slice(&MAGIC);
    value.put_slice(&[b'V', flags]);
    value.put_slice(&[0; 16]);
    value.put_u64_le(tag);
    value.put_u64_le(check(key));
    value.put_u64_le(now.saturating_add(ttl));
    value.put_u64_le(now);
    value.put_u64_le(0);
    value.put_u128_le(fill.etag);
    value.put_slice(&shape.to_le_bytes()[..SHAPE]);
    value.put_u32_le(u32::try_from(fill.cost.as_micros()).unwrap_or(u32::MAX));
    value.put_slice(payload);
    value.freeze()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use bytes::Bytes;
    use proptest::prelude::*;

    use super::{Fence, HEADER, Held, decode, etag, pending, tag, valid};
    use crate::cache::Fill;

    fn fill(payload: &'static [u8]) -> Fill {
        Fill {
            payload: Bytes::from_static(payload),
            etag: etag(payload),
            negative: false,
            truncated: true,
            ttl: Duration::from_secs(10),
            grace: Duration::ZERO,
            cost: Duration::from_millis(3),
            origin: 0,
        }
    }

    #[test]
    fn what_was_stored_is_read_back() {
        let value = valid("fruit:1", 7, 3, &fill(b"{}"), 1_000, None);
        let Some(Held::Valid { tag, soft_expires, entry }) = decode("fruit:1", &value, 4_000, 1 << 20) else {
            panic!("the entry should be valid");
        };
        assert_eq!((tag, soft_expires, entry.age_ms, entry.ttl_ms), (7, 11_000, 3_000, 7_000));
        assert_eq!(entry.cost_us, 3_000);
        assert_eq!((entry.payload.as_ref(), entry.etag), (b"{}".as_ref(), etag(b"{}")));
        assert!(entry.truncated && !entry.negative);
    }

    #[test]
    fn another_keys_value_is_never_taken_for_this_keys() {
        let value = valid("fruit:1", 7, 3, &fill(b"{}"), 0, None);
        assert_eq!(decode("fruit:2", &value, 0, 1 << 20), None);
        let value = pending("fruit:1", Fence([1; 16]), 7, 3);
        assert_eq!(decode("fruit:2", &value.into(), 0, 1 << 20), None);
    }

    #[test]
    fn a_tag_differs_by_each_of_its_parts() {
        let groups = [tag(1, 2, 3, &[4]), tag(1, 2, 3, &[5]), tag(1, 2, 3, &[4, 5]), tag(1, 2, 3, &[5, 4])];
        let plain = [tag(1, 2, 3, &[]), tag(2, 2, 3, &[]), tag(1, 3, 3, &[]), tag(1, 2, 4, &[]), tag(3, 2, 1, &[])];
        let all = [plain.as_slice(), groups.as_slice()].concat();
        for (index, one) in all.iter().enumerate() {
            assert!(!all[..index].contains(one));
        }
    }

    #[cfg(any(feature = "redis", feature = "memcached"))]
    #[test]
    fn large_payloads_are_packed_and_nobody_notices() {
        let json: &'static [u8] = Box::leak(b"{\"id\":1,\"name\":\"apple\"}".repeat(100).into_boxed_slice());
        let plain = valid("k", 7, 3, &fill(json), 0, Some(json.len()));
        assert_eq!((plain.len(), plain[3]), (HEADER + json.len(), 2), "it is not above");
        let packed = valid("k", 7, 3, &fill(json), 0, Some(json.len() - 1));
        assert!(packed.len() < plain.len() / 4);
        assert_eq!(packed[3], 2 | 4);
        assert_eq!(decode("k", &packed, 5, 1 << 20), decode("k", &plain, 5, 1 << 20));
        // A reader who caches nothing so large would not serve it either; what is not packed costs nothing.
        assert_eq!(decode("k", &packed, 5, json.len() - 1), None);
        assert!(decode("k", &plain, 5, 1).is_some());
        assert_eq!(decode("k", &packed.slice(..packed.len() - 1), 5, 1 << 20), None);
        assert_eq!(decode("k", &packed.slice(..HEADER + 2), 5, 1 << 20), None);
    }

    proptest! {
        #[test]
        fn any_bytes_are_an_entry_or_absent(bytes in proptest::collection::vec(any::<u8>(), 0..200), now: u64) {
            let _ = decode("k", &bytes.into(), now, 1 << 20);
        }

        #[test]
        fn a_damaged_header_never_panics(at in 0..HEADER, with: u8, now: u64) {
            let mut value = valid("k", 1, 3, &fill(b"payload"), 5, None).to_vec();
            value[at] = with;
            let _ = decode("k", &value.into(), now, 1 << 20);
        }
    }
}
