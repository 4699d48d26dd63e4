//! The bytes of one frame, wherever they lie: in an XDP buffer, in an skb, in a test's vector.

use crate::checksum::Delta;

/// An access goes beyond the frame's bytes (or beyond what the kernel lets a program reach).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutOfBounds;

/// What can be copied out of a packet and into it: integers, in the byte order of the wire.
pub trait Plain: Copy {
    /// From as many bytes as the type has. For packets in memory; BPF programs read in place.
    fn from_bytes(bytes: &[u8]) -> Self;
    /// See [`Plain::from_bytes`].
    fn to_bytes(self, bytes: &mut [u8]);
}

macro_rules! plain {
    ($($integer:ty)*) => {$(
        impl Plain for $integer {
            fn from_bytes(bytes: &[u8]) -> Self {
                let mut value = [0; size_of::<Self>()];
                value.copy_from_slice(bytes);
                Self::from_ne_bytes(value)
            }

            fn to_bytes(self, bytes: &mut [u8]) {
                bytes.copy_from_slice(&self.to_ne_bytes());
            }
        }

        impl<const N: usize> Plain for [$integer; N] {
            fn from_bytes(bytes: &[u8]) -> Self {
                core::array::from_fn(|at| {
                    const SIZE: usize = size_of::<$integer>();
                    <$integer>::from_bytes(&bytes[at * SIZE..(at + 1) * SIZE])
                })
            }

            fn to_bytes(self, bytes: &mut [u8]) {
                for (value, bytes) in self.into_iter().zip(bytes.chunks_mut(size_of::<$integer>())) {
                    value.to_bytes(bytes);
                }
            }
        }
    )*};
}

plain!(u8 u16 u32);

/// A frame that starts with its Ethernet header.
///
/// Accesses have a fixed size, because the verifier follows those and refuses slices.
pub trait Packet {
    /// Length of the frame in bytes, Ethernet header and trailing padding included.
    fn len(&self) -> usize;

    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Makes as many of the first `len` bytes reachable as there are.
    fn reach(&mut self, len: usize) -> Result<(), OutOfBounds>;

    /// The one's complement sum of `len` bytes at `offset`, folded. (XDP cannot: the core leaves to
    /// TC what needs it.)
    fn sum(&self, offset: usize, len: usize) -> Result<u16, OutOfBounds>;

    /// Copies a `T` from `offset`.
    fn read<T: Plain>(&self, offset: usize) -> Result<T, OutOfBounds>;

    /// Writes `value` at `offset`. Succeeds wherever a [`Packet::read`] of the same place has.
    fn write<T: Plain>(&mut self, offset: usize, value: T) -> Result<(), OutOfBounds>;

    /// Adjusts a TCP or UDP checksum for a change of the pseudo-header and of the segment itself.
    ///
    /// The two are apart because a checksum that an offload has still to finish
    /// (`CHECKSUM_PARTIAL`) covers only the pseudo-header: an skb needs to be told which is which.
    #[inline(always)]
    fn adjust_l4_checksum(
        &mut self,
        checksum: L4Checksum,
        pseudo_header: Delta,
        segment: Delta,
    ) -> Result<(), OutOfBounds> {
        let old: u16 = self.read(checksum.offset)?;
        if checksum.udp && old == 0 {
            return Ok(());
        }
        let mut new = pseudo_header.and(segment).apply(old);
        if checksum.udp && new == 0 {
            new = 0xffff;
        }
        self.write(checksum.offset, new)
    }
}

/// Where a TCP or UDP checksum stands, and of which kind it is.
#[derive(Clone, Copy, Debug)]
pub struct L4Checksum {
    /// From the frame's start.
    pub offset: usize,
    /// A checksum of 0 means none and stays 0, and a computed 0 becomes 0xffff (RFC 768).
    pub udp: bool,
    /// No checksum of the IP header makes up for a change of the addresses.
    pub ipv6: bool,
}
