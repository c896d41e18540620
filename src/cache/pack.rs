//! Payloads in fewer bytes, for a memory at the other end of a connection: LZ4 blocks behind their unpacked size.
//!
//! LZ4 and not zstd: `docs/adr/0011-compression.md`. Left out: dictionaries, and levels to choose from.

use bytes::Bytes;
use lz4_flex::block;

/// The unpacked size, little endian.
const SIZE: usize = 4;

/// The packed form; `None` where it would save less than an eighth, which is not worth unpacking at each hit.
pub(super) fn pack(payload: &[u8]) -> Option<Vec<u8>> {
    let size = u32::try_from(payload.len()).ok()?;
    let mut packed = vec![0; SIZE + block::get_maximum_output_size(payload.len())];
    let (front, rest) = packed.split_first_chunk_mut::<SIZE>()?;
    *front = size.to_le_bytes();
    let length = SIZE + block::compress_into(payload, rest).ok()?;
    packed.truncate(length);
    (length < payload.len() - payload.len() / 8).then_some(packed)
}

/// What was packed; `None` where it is damaged, or would be larger than `largest`: no more than that is ever allocated.
pub(super) fn unpack(packed: &[u8], largest: usize) -> Option<Bytes> {
    let (front, rest) = packed.split_first_chunk::<SIZE>()?;
    let size = usize::try_from(u32::from_le_bytes(*front)).ok().filter(|size| *size <= largest)?;
    let payload = block::decompress(rest, size).ok()?;
    (payload.len() == size).then(|| payload.into())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_was_packed_is_unpacked(
            word in proptest::collection::vec(any::<u8>(), 1..40), times in 1..200_usize, tail in proptest::collection::vec(any::<u8>(), 0..400)
        ) {
            let payload = [word.repeat(times), tail].concat();
            if let Some(packed) = pack(&payload) {
                prop_assert!(packed.len() < payload.len());
                let unpacked = unpack(&packed, payload.len());
                prop_assert_eq!(unpacked.as_deref(), Some(payload.as_slice()));
                prop_assert_eq!(unpack(&packed, payload.len() - 1), None);
            }
        }

        #[test]
        fn any_bytes_are_unpacked_to_their_size_or_not_at_all(
            bytes in proptest::collection::vec(any::<u8>(), 0..300), size in 0..2000_u32
        ) {
            let _ = unpack(&bytes, 1 << 20);
            let claimed = [&size.to_le_bytes()[..], &bytes].concat();
            if let Some(payload) = unpack(&claimed, 1000) {
                prop_assert!(payload.len() == size as usize && size <= 1000);
            }
        }

        #[test]
        fn damage_never_makes_more_of_it(at in 0..200_usize, with: u8) {
            let payload = b"{\"id\":1,\"name\":\"apple\"}".repeat(50);
            let mut packed = pack(&payload).expect("it shrinks");
            let at = at % packed.len();
            packed[at] = with;
            if let Some(unpacked) = unpack(&packed, payload.len()) {
                prop_assert!(unpacked.len() <= payload.len());
            }
        }
    }

    #[test]
    fn what_does_not_shrink_stays_as_it_is() {
        let noise: Vec<u8> = std::iter::repeat_with(|| fastrand::u8(..)).take(10_000).collect();
        assert_eq!(pack(&noise), None);
        assert_eq!(pack(b""), None);
        assert!(pack(&[b'a'; 10_000]).is_some_and(|packed| packed.len() < 100));
    }
}
