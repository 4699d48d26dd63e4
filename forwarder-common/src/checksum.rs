//! The internet checksum, updated incrementally (RFC 1624, equation 3).
//!
//! Sums are over 16-bit words in the machine's own byte order: a one's complement sum comes out
//! the same bytes either way (RFC 1071, section 2), and nothing has to be swapped.

/// A change to a one's complement sum: each word's complement taken out, the new word put in.
///
/// At most 2^16 words may be added before it overflows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Delta(u32);

impl Delta {
    pub const NONE: Self = Self(0);

    /// The change of a 16-bit word at an even offset of the summed range; words as they lie in memory.
    #[inline(always)]
    pub fn of_u16(old: u16, new: u16) -> Self {
        Self(u32::from(!old) + u32::from(new))
    }

    /// The same for two neighbouring words.
    #[inline(always)]
    pub fn of_u32(old: u32, new: u32) -> Self {
        let old = !old;
        Self((old & 0xffff) + (old >> 16) + (new & 0xffff) + (new >> 16))
    }

    #[inline(always)]
    pub fn and(self, other: Self) -> Self {
        Self(self.0 + other.0)
    }

    /// The sum as the kernel's checksum helpers take a difference.
    #[inline(always)]
    pub fn to_kernel(self) -> u32 {
        self.0
    }

    /// The checksum field's new value; both as they lie in memory.
    #[inline(always)]
    pub fn apply(self, checksum: u16) -> u16 {
        !fold(self.0 + u32::from(!checksum))
    }
}

/// Folds a 32-bit one's complement sum into 16 bits.
#[inline(always)]
pub fn fold(sum: u32) -> u16 {
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    sum as u16
}

/// One's complement sum of the words' halves, not folded.
#[inline(always)]
pub fn sum<const N: usize>(words: [u32; N]) -> u32 {
    let mut sum = 0;
    let mut at = 0;
    while at < N {
        sum += (words[at] & 0xffff) + (words[at] >> 16);
        at += 1;
    }
    sum
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn full(bytes: &[u8]) -> u16 {
        let sum = bytes
            .chunks(2)
            .map(|word| u32::from(u16::from_ne_bytes([word[0], *word.get(1).unwrap_or(&0)])))
            .sum();
        !fold(sum)
    }

    proptest! {
        #[test]
        fn an_updated_checksum_equals_a_full_one(
            mut bytes in prop::collection::vec(any::<u8>(), 8..64),
            at in 0usize..4,
            new in any::<[u8; 4]>(),
        ) {
            // An all-zero message has two representations of its sum; no IP packet is all zero.
            bytes[6] |= 1;
            let at = if at * 2 + 4 > 6 { 0 } else { at * 2 };
            let before = full(&bytes);
            let old = u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
            bytes[at..at + 4].copy_from_slice(&new);
            prop_assert_eq!(Delta::of_u32(old, u32::from_ne_bytes(new)).apply(before), full(&bytes));
        }
    }
}
