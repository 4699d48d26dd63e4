//! A frame in an skb, at TC.

use aya_ebpf::{
    bindings::{BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR},
    helpers::{bpf_l4_csum_replace, bpf_skb_pull_data},
    programs::TcContext,
};
use forwarder_common::{
    checksum::Delta,
    packet::{OutOfBounds, Packet, Plain},
};

/// Longest headers that the core reads: Ethernet, IPv4 with all its options, TCP without.
const HEADERS: u32 = 14 + 60 + 20;

pub struct TcPacket<'a> {
    ctx: &'a TcContext,
}

impl<'a> TcPacket<'a> {
    /// Makes the headers reachable. `None`: the kernel has no memory for that.
    #[inline(always)]
    pub fn new(ctx: &'a TcContext) -> Option<Self> {
        let wanted = if ctx.len() < HEADERS { ctx.len() } else { HEADERS };
        if ctx.data() + wanted as usize > ctx.data_end() {
            // SAFETY: the context is this program's own, and no packet pointer is held over the call.
            let pulled = unsafe { bpf_skb_pull_data(ctx.skb.skb, wanted) };
            if pulled != 0 {
                return None;
            }
        }
        Some(Self { ctx })
    }

    #[inline(always)]
    fn place(&self, offset: usize, len: usize) -> Result<usize, OutOfBounds> {
        let place = self.ctx.data() + offset;
        if place + len > self.end() { Err(OutOfBounds) } else { Ok(place) }
    }

    /// Read anew each time, as in `XdpPacket::end`.
    #[inline(always)]
    fn end(&self) -> usize {
        // SAFETY: the context outlives the packet; its fields are plain integers.
        unsafe { (&raw const (*self.ctx.skb.skb).data_end).read_volatile() as usize }
    }

    #[inline(always)]
    fn replace_checksum(&self, offset: usize, delta: Delta, flags: u64) -> Result<(), OutOfBounds> {
        if delta == Delta::NONE {
            return Ok(());
        }
        // SAFETY: the context is this program's own. Size 0 in the flags says that `to` is a difference.
        let done = unsafe {
            bpf_l4_csum_replace(self.ctx.skb.skb, offset as u32, 0, u64::from(delta.to_kernel()), flags)
        };
        if done == 0 { Ok(()) } else { Err(OutOfBounds) }
    }
}

impl Packet for TcPacket<'_> {
    #[inline(always)]
    fn len(&self) -> usize {
        self.ctx.len() as usize
    }

    #[inline(always)]
    fn read<T: Plain>(&self, offset: usize) -> Result<T, OutOfBounds> {
        let place = self.place(offset, size_of::<T>())? as *const T;
        // SAFETY: `place` has checked that a whole T lies within the linear part; it holds integers, any bytes are one.
        Ok(unsafe { place.read_unaligned() })
    }

    #[inline(always)]
    fn write<T: Plain>(&mut self, offset: usize, value: T) -> Result<(), OutOfBounds> {
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
        offset: usize,
        pseudo_header: Delta,
        segment: Delta,
        udp: bool,
    ) -> Result<(), OutOfBounds> {
        let zero_means_none = if udp { u64::from(BPF_F_MARK_MANGLED_0) } else { 0 };
        self.replace_checksum(offset, pseudo_header, u64::from(BPF_F_PSEUDO_HDR) | zero_means_none)?;
        self.replace_checksum(offset, segment, zero_means_none)
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
