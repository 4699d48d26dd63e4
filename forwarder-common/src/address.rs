//! Addresses, ports and MACs as they stand in a packet.
//!
//! Their bytes in memory are those on the wire; inside they are integers, because the BPF back end
//! keeps an integer in one register where it takes a byte array apart.

use crate::checksum::Delta;

/// IPv4 and IPv6 alike; the core is written over this, so that each family has tables of its own size.
pub trait Address: Copy + Default + Eq + core::hash::Hash + core::fmt::Debug + 'static {
    /// Whether no honest packet from elsewhere can have it as its source:
    /// unspecified, loopback, multicast, reserved (RFC 1122 section 3.2.1.3, RFC 6890).
    fn is_impossible_source(self) -> bool;

    /// What its replacement by `new` changes in a checksum that covers it.
    fn replaced_by(self, new: Self) -> Delta;

    /// Its share of a one's complement sum.
    fn sum(self) -> u32;
}

/// An IPv4 address.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Ipv4(u32);

impl Ipv4 {
    #[inline(always)]
    pub const fn new(bytes: [u8; 4]) -> Self {
        Self(u32::from_ne_bytes(bytes))
    }

    #[inline(always)]
    pub const fn bytes(self) -> [u8; 4] {
        self.0.to_ne_bytes()
    }

    /// The word as the kernel's `__be32`.
    #[inline(always)]
    pub const fn word(self) -> u32 {
        self.0
    }

    #[inline(always)]
    pub const fn from_word(word: u32) -> Self {
        Self(word)
    }
}

impl Address for Ipv4 {
    #[inline(always)]
    fn is_impossible_source(self) -> bool {
        let first = self.bytes()[0];
        first == 0 || first == 127 || first >= 224
    }

    #[inline(always)]
    fn replaced_by(self, new: Self) -> Delta {
        Delta::of_u32(self.0, new.0)
    }

    #[inline(always)]
    fn sum(self) -> u32 {
        (self.0 & 0xffff) + (self.0 >> 16)
    }
}

/// A TCP or UDP port.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Port(u16);

impl Port {
    #[inline(always)]
    pub const fn new(number: u16) -> Self {
        Self(number.to_be())
    }

    /// In host byte order.
    #[inline(always)]
    pub const fn number(self) -> u16 {
        u16::from_be(self.0)
    }

    /// The word as the kernel's `__be16`.
    #[inline(always)]
    pub const fn word(self) -> u16 {
        self.0
    }

    #[inline(always)]
    pub const fn from_word(word: u16) -> Self {
        Self(word)
    }

    #[inline(always)]
    pub fn replaced_by(self, new: Self) -> Delta {
        Delta::of_u16(self.0, new.0)
    }
}

/// The first twelve bytes of an Ethernet frame: destination, then source.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Macs([u32; 3]);

impl Macs {
    #[inline(always)]
    pub const fn new(dst: [u8; 6], src: [u8; 6]) -> Self {
        Self([
            u32::from_ne_bytes([dst[0], dst[1], dst[2], dst[3]]),
            u32::from_ne_bytes([dst[4], dst[5], src[0], src[1]]),
            u32::from_ne_bytes([src[2], src[3], src[4], src[5]]),
        ])
    }

    #[inline(always)]
    pub const fn words(self) -> [u32; 3] {
        self.0
    }

    #[inline(always)]
    pub const fn from_words(words: [u32; 3]) -> Self {
        Self(words)
    }

    #[inline(always)]
    pub fn dst(self) -> [u8; 6] {
        let ([d0, d1, d2, d3], [d4, d5, ..]) = (self.0[0].to_ne_bytes(), self.0[1].to_ne_bytes());
        [d0, d1, d2, d3, d4, d5]
    }

    #[inline(always)]
    pub fn src(self) -> [u8; 6] {
        let ([.., s0, s1], [s2, s3, s4, s5]) = (self.0[1].to_ne_bytes(), self.0[2].to_ne_bytes());
        [s0, s1, s2, s3, s4, s5]
    }

    /// Back to where it came from.
    #[inline(always)]
    pub fn swapped(self) -> Self {
        Self::new(self.src(), self.dst())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn macs_are_the_frames_bytes() {
        let macs = Macs::new([1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12]);
        assert_eq!(macs.dst(), [1, 2, 3, 4, 5, 6]);
        assert_eq!(macs.src(), [7, 8, 9, 10, 11, 12]);
        assert_eq!(macs.swapped(), Macs::new([7, 8, 9, 10, 11, 12], [1, 2, 3, 4, 5, 6]));
    }

    #[test]
    fn sources_that_no_honest_packet_has() {
        for impossible in [[0, 0, 0, 0], [127, 0, 0, 1], [224, 0, 0, 1], [255, 255, 255, 255]] {
            assert!(Ipv4::new(impossible).is_impossible_source(), "{impossible:?}");
        }
        for possible in [[1, 0, 0, 1], [10, 0, 0, 1], [126, 0, 0, 1], [128, 0, 0, 1], [223, 255, 255, 255]] {
            assert!(!Ipv4::new(possible).is_impossible_source(), "{possible:?}");
        }
    }
}
