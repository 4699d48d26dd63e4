//! A frame in an skb, at TC.

use core::{hint::black_box, marker::PhantomData};

use aya_ebpf::{
    bindings::{BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR},
    helpers::{
        bpf_csum_diff, bpf_csum_update, bpf_l4_csum_replace, bpf_skb_change_head, bpf_skb_load_bytes,
        bpf_skb_pull_data, bpf_skb_store_bytes,
    },
    programs::TcContext,
};
use forwarder_common::{
    checksum::{self, Delta},
    packet::{L4Checksum, OutOfBounds, Packet, Plain},
    wire::{ethernet, ipv4, tcp},
};

use crate::{
    link::{self, Link},
    tables::{self, CHUNK_LEN, Chunk},
};

/// Longest headers that the core reads without asking for more: Ethernet, IPv4 with all its options (IPv6
/// has less without extension headers), TCP without.
const HEADERS: usize = ethernet::LEN + ipv4::MAX_LEN + tcp::MIN_LEN;

/// Longest range that is summed: ICMP errors have 576 bytes (RFC 1812 section 4.3.2.3).
const LONGEST_SUM: usize = 4 * CHUNK_LEN;

pub struct TcPacket<'a, L> {
    ctx: &'a TcContext,
    link: PhantomData<L>,
}

impl<'a, L: Link> TcPacket<'a, L> {
    /// Makes the headers reachable. `None`: the kernel has no memory for that.
    #[inline(always)]
    pub fn new(ctx: &'a TcContext) -> Option<Self> {
        let mut packet = Self { ctx, link: PhantomData };
        link::begin::<L>(ctx.skb.skb);
        packet.reach(HEADERS).ok()?;
        Some(packet)
    }

    /// A packet that was made before, whose headers are reachable.
    #[inline(always)]
    pub fn again(ctx: &'a TcContext) -> Self {
        Self { ctx, link: PhantomData }
    }

    #[inline(always)]
    fn place(&self, offset: usize, len: usize) -> Result<usize, OutOfBounds> {
        let place = self.ctx.data() + L::in_skb(offset);
        if place + len > self.end() { Err(OutOfBounds) } else { Ok(place) }
    }

    /// Gives the skb the header that it lacks, for a way out that begins with one. (Where it does not,
    /// the kernel takes it off again.)
    #[inline(always)]
    pub fn complete(&self) -> Result<(), OutOfBounds> {
        if L::MISSING == 0 {
            return Ok(());
        }
        let (skb, header) = (self.ctx.skb.skb, link::header().ok_or(OutOfBounds)?);
        // SAFETY: the context is this program's own, no packet pointer is held over the calls, and the
        // header has as many bytes.
        let done = unsafe {
            bpf_skb_change_head(skb, L::MISSING as u32, 0) == 0
                && bpf_skb_store_bytes(skb.cast(), 0, header.as_ptr().cast(), L::MISSING as u32, 0) == 0
        };
        if done { Ok(()) } else { Err(OutOfBounds) }
    }

    /// Read anew each time, as in `XdpPacket::end`.
    #[inline(always)]
    fn end(&self) -> usize {
        // SAFETY: the context outlives the packet; its fields are plain integers.
        unsafe { (&raw const (*self.ctx.skb.skb).data_end).read_volatile() as usize }
    }

    #[inline(always)]
    fn sum_chunk(
        &self,
        chunk: &mut Chunk,
        offset: usize,
        size: usize,
        seed: u32,
    ) -> Result<u32, OutOfBounds> {
        // It is 1 to `CHUNK_LEN`: said in a way that also the verifier of Linux 6.1 understands, for
        // which a comparison with 0 gives no least value.
        let size = (black_box(size).wrapping_sub(1) & (CHUNK_LEN - 1)) + 1;
        let (skb, bytes) = (self.ctx.skb.skb.cast(), chunk.0.as_mut_ptr());
        let offset = L::in_skb(offset);
        // SAFETY: the context is this program's own; `size` is at most `CHUNK_LEN`, and the chunk has
        // room for a word more, which fills up the last one with zeroes.
        let sum = unsafe {
            if bpf_skb_load_bytes(skb, offset as u32, bytes.cast(), size as u32) != 0 {
                return Err(OutOfBounds);
            }
            bytes.add(size).cast::<u32>().write_unaligned(0);
            bpf_csum_diff(core::ptr::null_mut(), 0, bytes.cast(), (size as u32 + 3) & !3, seed)
        };
        if sum < 0 { Err(OutOfBounds) } else { Ok(sum as u32) }
    }

    #[inline(always)]
    fn replace_checksum(&self, offset: usize, delta: Delta, flags: u64) -> Result<(), OutOfBounds> {
        if delta == Delta::NONE {
            return Ok(());
        }
        let offset = L::in_skb(offset);
        // SAFETY: the context is this program's own. Size 0 in the flags says that `to` is a difference.
        let done = unsafe {
            bpf_l4_csum_replace(self.ctx.skb.skb, offset as u32, 0, u64::from(delta.to_kernel()), flags)
        };
        if done == 0 { Ok(()) } else { Err(OutOfBounds) }
    }
}

impl<L: Link> Packet for TcPacket<'_, L> {
    #[inline(always)]
    fn len(&self) -> usize {
        self.ctx.len() as usize + L::MISSING
    }

    #[inline(always)]
    fn reach(&mut self, len: usize) -> Result<(), OutOfBounds> {
        let wanted = (if self.len() < len { self.len() } else { len }) - L::MISSING;
        if self.ctx.data() + wanted <= self.end() {
            return Ok(());
        }
        // SAFETY: the context is this program's own, and no packet pointer is held over the call.
        let pulled = unsafe { bpf_skb_pull_data(self.ctx.skb.skb, wanted as u32) };
        if pulled == 0 { Ok(()) } else { Err(OutOfBounds) }
    }

    /// Of at most [`LONGEST_SUM`] bytes. Through a buffer: the packet may lie in pieces.
    #[inline(never)]
    fn sum(&self, offset: usize, len: usize) -> Result<u16, OutOfBounds> {
        let buffer = tables::chunk().ok_or(OutOfBounds)?;
        let mut sum: u32 = 0;
        let mut done = 0;
        for _ in 0..LONGEST_SUM / CHUNK_LEN {
            if done >= len {
                break;
            }
            let left = len - done;
            let size = if left < CHUNK_LEN { left } else { CHUNK_LEN };
            sum = self.sum_chunk(buffer, offset + done, size, sum)?;
            done += size;
        }
        if done < len { Err(OutOfBounds) } else { Ok(checksum::fold(sum)) }
    }

    #[inline(always)]
    fn read<T: Plain>(&self, offset: usize) -> Result<T, OutOfBounds> {
        if let Some(value) = link::read::<L, T>(self.ctx.skb.skb, offset) {
            return Ok(value);
        }
        let place = self.place(offset, size_of::<T>())? as *const T;
        // SAFETY: `place` has checked that a whole T lies within the linear part; it holds integers, any bytes are one.
        Ok(unsafe { place.read_unaligned() })
    }

    #[inline(always)]
    fn write<T: Plain>(&mut self, offset: usize, value: T) -> Result<(), OutOfBounds> {
        if link::is_missing::<L, T>(offset) {
            return link::write(offset, value);
        }
        let place = self.place(offset, size_of::<T>())? as *mut T;
        // SAFETY: as in `read`; the kernel has unshared the skb's head for a program that writes.
        unsafe { place.write_unaligned(value) };
        Ok(())
    }

    /// The kernel knows whether the checksum is finished, and keeps `skb->csum` right where a NIC
    /// has summed the packet.
    #[inline(always)]
    fn adjust_l4_checksum(
        &mut self,
        checksum: L4Checksum,
        pseudo_header: Delta,
        segment: Delta,
    ) -> Result<(), OutOfBounds> {
        let zero_means_none = if checksum.udp { u64::from(BPF_F_MARK_MANGLED_0) } else { 0 };
        let of_addresses = u64::from(BPF_F_PSEUDO_HDR) | zero_means_none;
        if checksum.ipv6 {
            self.replace_ipv6_addresses(checksum.offset, pseudo_header, of_addresses)?;
        } else {
            self.replace_checksum(checksum.offset, pseudo_header, of_addresses)?;
        }
        self.replace_checksum(checksum.offset, segment, zero_means_none)
    }
}

/// `BPF_F_IPV6`: the change of the addresses leaves the sum over the whole packet as it was, since no
/// checksum of the IP header makes up for it (Linux 6.16, and the stable kernels that took it over).
const BPF_F_IPV6: u64 = 1 << 7;

impl<L: Link> TcPacket<'_, L> {
    #[inline(always)]
    fn replace_ipv6_addresses(&self, offset: usize, delta: Delta, flags: u64) -> Result<(), OutOfBounds> {
        if self.replace_checksum(offset, delta, flags | BPF_F_IPV6).is_ok() {
            return Ok(());
        }
        // An older kernel refuses the flag, and takes the change out of `skb->csum`: it is put back.
        self.replace_checksum(offset, delta, flags)?;
        // SAFETY: the context is this program's own. Without a sum to update the helper does nothing.
        unsafe { bpf_csum_update(self.ctx.skb.skb, delta.to_kernel()) };
        Ok(())
    }
}

/// The VLAN tag beside an skb.
pub struct VlanTag {
    /// VLAN 0: a priority, no VLAN.
    pub is_priority: bool,
}

/// `None`: it belongs to another VLAN than the untagged interface's own.
#[inline(always)]
pub fn vlan_tag(ctx: &TcContext) -> Option<VlanTag> {
    // SAFETY: the verifier lets a program read these fields of its own context.
    let (present, tci) = unsafe { ((*ctx.skb.skb).vlan_present, (*ctx.skb.skb).vlan_tci) };
    if present != 0 && tci & 0x0fff != 0 {
        return None;
    }
    Some(VlanTag { is_priority: present != 0 })
}

/// Sets a bit of `skb->mark` and leaves the others: they may be somebody else's.
#[inline(always)]
pub fn mark(ctx: &TcContext, bit: u32) {
    let skb = ctx.skb.skb;
    // SAFETY: the verifier lets a program read and write this field of its own context.
    unsafe { (*skb).mark |= bit };
}

/// `skb->tc_index` of a packet that a program has sent on: what a redirect sends passes TC egress as well.
/// (Its users, the qdiscs dsmark and GRED, are gone or want it on the way out.)
const DONE: u16 = 0xf0d0;

/// Notes that nothing is left to be done at egress.
#[inline(always)]
pub fn set_done(ctx: &TcContext) {
    let skb = ctx.skb.skb;
    // SAFETY: as in `mark`.
    unsafe { (*skb).tc_index = u32::from(DONE) };
}

/// Takes a note of [`set_done`] off again that a router in another namespace has left.
#[inline(always)]
pub fn clear_done(ctx: &TcContext) {
    if is_done(ctx) {
        // SAFETY: as in `mark`.
        unsafe { (*ctx.skb.skb).tc_index = 0 };
    }
}

/// See [`set_done`].
#[inline(always)]
pub fn is_done(ctx: &TcContext) -> bool {
    // SAFETY: as in `mark`.
    unsafe { (*ctx.skb.skb).tc_index == u32::from(DONE) }
}
