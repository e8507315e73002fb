//! Which of the [`BLOCK`] places of one block are meant: a set that two words of which are compared at once.

use crate::journal::JournalError;

/// Places of one block.
pub(super) const BLOCK: u64 = 1 << BLOCK_BITS;
const BLOCK_BITS: u32 = 12;
/// Places of one word, which is also one zone of time.
const WORD_BITS: u32 = 6;
const WORDS: usize = 64;
/// Sets of fewer are stored one by one, in two bytes each; the others as 64 words.
const LISTED_MAX: usize = 255;
const WORDS_BYTES: usize = WORDS * 8;

/// The block of a place.
pub(super) fn block_of(place: u64) -> u64 {
    place >> BLOCK_BITS
}

/// The first place of a block.
pub(super) fn first_of(block: u64) -> u64 {
    block << BLOCK_BITS
}

/// The last place of a block.
pub(super) fn last_of(block: u64) -> u64 {
    first_of(block) | (BLOCK - 1)
}

/// A set of places of one block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Bits([u64; WORDS]);

impl Bits {
    pub(super) const NONE: Self = Self([0; WORDS]);
    pub(super) const ALL: Self = Self([u64::MAX; WORDS]);

    /// Where a place of its block stands: word and bit.
    fn position(place: u64) -> (usize, u64) {
        let offset = place & (BLOCK - 1);
        (usize::try_from(offset >> WORD_BITS).unwrap_or_default(), 1 << (offset & 63))
    }

    pub(super) fn add(&mut self, place: u64) {
        let (word, bit) = Self::position(place);
        self.0[word] |= bit;
    }

    /// All places of one word of 64.
    pub(super) fn add_word(&mut self, word: u8) {
        self.0[usize::from(word)] = u64::MAX;
    }

    pub(super) fn join(&mut self, other: &Self) {
        self.0.iter_mut().zip(other.0).for_each(|(word, other)| *word |= other);
    }

    pub(super) fn keep(&mut self, other: &Self) {
        self.0.iter_mut().zip(other.0).for_each(|(word, other)| *word &= other);
    }

    pub(super) fn remove(&mut self, other: &Self) {
        self.0.iter_mut().zip(other.0).for_each(|(word, other)| *word &= !other);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.iter().all(|word| *word == 0)
    }

    /// The places of `block` that are meant, in order.
    pub(super) fn places(&self, block: u64) -> Vec<u64> {
        let mut places = Vec::new();
        for (at, word) in (0..).zip(self.0) {
            let mut rest = word;
            while rest != 0 {
                places.push(first_of(block) | at << WORD_BITS | u64::from(rest.trailing_zeros()));
                rest &= rest - 1;
            }
        }
        places
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        let count: u32 = self.0.iter().map(|word| word.count_ones()).sum();
        if usize::try_from(count).is_ok_and(|count| count <= LISTED_MAX) {
            let offsets = self.places(0).into_iter().filter_map(|offset| u16::try_from(offset).ok());
            return offsets.flat_map(u16::to_le_bytes).collect();
        }
        self.0.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    pub(super) fn decode(stored: &[u8]) -> Result<Self, JournalError> {
        let mut bits = Self::NONE;
        if stored.len() == WORDS_BYTES {
            for (word, bytes) in bits.0.iter_mut().zip(stored.as_chunks::<8>().0) {
                *word = u64::from_le_bytes(*bytes);
            }
            return Ok(bits);
        }
        let (offsets, rest) = stored.as_chunks::<2>();
        if !rest.is_empty() || offsets.is_empty() || offsets.len() > LISTED_MAX {
            return Err(JournalError::Corrupt("posting"));
        }
        for offset in offsets.iter().map(|bytes| u64::from(u16::from_le_bytes(*bytes))) {
            if offset >= BLOCK {
                return Err(JournalError::Corrupt("posting"));
            }
            bits.add(offset);
        }
        Ok(bits)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_is_stored_and_read_back() {
        for step in [1, 2, 15, 16, 17, 4095] {
            let places: Vec<u64> = (first_of(7)..=last_of(7)).step_by(step).collect();
            let mut bits = Bits::NONE;
            for place in &places {
                bits.add(*place);
            }
            assert_eq!(bits.places(7), places);
            let stored = bits.encode();
            assert!(stored.len() <= WORDS_BYTES);
            assert_eq!(Bits::decode(&stored), Ok(bits), "every {step}th");
        }
        for bad in [&[][..], &[1], &[0, 16], &[0; WORDS_BYTES + 2]] {
            assert_eq!(Bits::decode(bad), Err(JournalError::Corrupt("posting")), "{bad:?}");
        }
    }
}
