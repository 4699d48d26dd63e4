//! Interfaces with an Ethernet header, and those without one (TUN, WireGuard, PPP).
//!
//! The core sees an Ethernet header on every packet. Where the skb has none, one is kept beside it:
//! both addresses zero, which is also what the interface's own is described as. The core writes
//! the next hop's into it, and it becomes real when the packet leaves.

use aya_ebpf::{Global, bindings::__sk_buff, macros::map, maps::PerCpuArray};
use forwarder_common::{
    packet::{OutOfBounds, Plain},
    wire::ethernet,
};

/// How packets begin on a kind of interface.
pub trait Link {
    /// Bytes of the Ethernet header that the skb does not have.
    const MISSING: usize;

    /// Bytes of it that the skb has.
    const PRESENT: usize = ethernet::LEN - Self::MISSING;

    /// Where in the skb an offset in the frame is.
    fn in_skb(offset: usize) -> usize;
}

pub struct Ethernet;

impl Link for Ethernet {
    const MISSING: usize = 0;

    #[inline(always)]
    fn in_skb(offset: usize) -> usize {
        offset
    }
}

pub struct Bare;

impl Link for Bare {
    const MISSING: usize = ethernet::LEN;

    #[inline(always)]
    fn in_skb(offset: usize) -> usize {
        offset.wrapping_sub(Self::MISSING) & ALL_BITS.load() as usize
    }
}

/// Keeps the compiler, which does not know its value, from subtracting last: of a pointer with a
/// negative offset the verifier learns nothing from a comparison. (`black_box` would do as well, and
/// needs the stack.)
#[unsafe(no_mangle)]
static ALL_BITS: Global<u32> = Global::new(u32::MAX);

/// A header as words, and the rest of the last one.
type Header = [u32; 4];

#[map]
static HEADER: PerCpuArray<Header> = PerCpuArray::with_max_entries(1, 0);

/// This CPU's header; always there.
#[inline(always)]
pub fn header() -> Option<&'static mut Header> {
    // SAFETY: as in `tables::workspace`.
    HEADER.get_ptr_mut(0).map(|header| unsafe { &mut *header })
}

/// The header of a packet of this skb, as it came.
#[inline(always)]
fn first(skb: *const __sk_buff) -> Header {
    // SAFETY: the verifier lets a program read this field of its own context.
    [0, 0, 0, unsafe { (*skb).protocol }]
}

/// Begins the header of a packet of this skb.
#[inline(always)]
pub fn begin<L: Link>(skb: *const __sk_buff) {
    if L::MISSING > 0
        && let Some(header) = header()
    {
        *header = first(skb);
    }
}

/// Reads from the missing header, as it came.
#[inline(always)]
pub fn read<L: Link, T: Plain>(skb: *const __sk_buff, offset: usize) -> Option<T> {
    if !is_missing::<L, T>(offset) {
        return None;
    }
    // Not from the map: a look-up for each read would need the stack.
    let header = first(skb);
    // SAFETY: all of it lies within the `MISSING` bytes.
    Some(unsafe { header.as_ptr().cast::<u8>().add(offset).cast::<T>().read_unaligned() })
}

/// Whether this is a place in the missing header.
#[inline(always)]
pub const fn is_missing<L: Link, T>(offset: usize) -> bool {
    offset + size_of::<T>() <= L::MISSING
}

/// Writes to a place in the missing header. Older verifiers do not know that the map has its element:
/// then this must not go on to the packet.
#[inline(always)]
pub fn write<T: Plain>(offset: usize, value: T) -> Result<(), OutOfBounds> {
    let header: *mut Header = header().ok_or(OutOfBounds)?;
    // SAFETY: as in `read`.
    unsafe { header.cast::<u8>().add(offset).cast::<T>().write_unaligned(value) };
    Ok(())
}
