//! Puts a decision into the packet's bytes.

use crate::{
    address::Macs,
    checksum::Delta,
    family::Family,
    flow::Tuple,
    icmp::{self, Quote},
    packet::{OutOfBounds, Packet},
    parse::Datagram,
};

/// What to change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rewrite<'p, A> {
    pub to: &'p Tuple<A>,
    /// False where the host's stack counts the hop itself.
    pub count_hop: bool,
    /// Ethernet destination and source; `None` where the kernel writes them.
    pub macs: Option<Macs>,
}

/// Rewrites a packet that [`Family::parse`] has read.
///
/// The checksum comes first: it is the only change that a kernel can refuse, so that an error
/// leaves the packet as it was. All places have been read before; writing them cannot fail.
///
/// (Functions of their own, this and the next two: see [`crate::decide::Core`] about the stack.)
#[inline(never)]
pub fn whole<A: Family, P: Packet>(
    packet: &mut P,
    datagram: &Datagram<A>,
    rewrite: &Rewrite<'_, A>,
) -> Result<(), OutOfBounds> {
    let (from, to) = (&datagram.tuple, rewrite.to);
    let addresses = address_change(datagram, rewrite);
    let ports = from.src_port.replaced_by(to.src_port).and(from.dst_port.replaced_by(to.dst_port));
    packet.adjust_l4_checksum(datagram.l4_checksum_place(), addresses, ports)?;
    packet.write(datagram.l4(), [to.src_port.word(), to.dst_port.word()])?;
    ip_header(packet, datagram, rewrite, addresses)
}

/// Rewrites a fragment without a TCP or UDP header: the first one's checksum covers its change.
#[inline(never)]
pub fn later_fragment<A: Family, P: Packet>(
    packet: &mut P,
    datagram: &Datagram<A>,
    rewrite: &Rewrite<'_, A>,
) -> Result<(), OutOfBounds> {
    ip_header(packet, datagram, rewrite, address_change(datagram, rewrite))
}

#[inline(always)]
fn address_change<A: Family>(datagram: &Datagram<A>, rewrite: &Rewrite<'_, A>) -> Delta {
    let (from, to) = (&datagram.tuple, rewrite.to);
    A::pair_replaced_by((&from.src, &from.dst), (&to.src, &to.dst))
}

/// Rewrites an ICMP error, with what it quotes.
#[inline(never)]
pub fn icmp_error<A: Family, P: Packet>(
    packet: &mut P,
    datagram: &Datagram<A>,
    quote: &Quote<A>,
    rewrite: &Rewrite<'_, A>,
) -> Result<(), OutOfBounds> {
    let addresses = address_change(datagram, rewrite);
    icmp::translate(packet, datagram, quote, addresses)?;
    ip_header(packet, datagram, rewrite, addresses)
}

#[inline(always)]
fn ip_header<A: Family, P: Packet>(
    packet: &mut P,
    datagram: &Datagram<A>,
    rewrite: &Rewrite<'_, A>,
    addresses: Delta,
) -> Result<(), OutOfBounds> {
    let ttl = if rewrite.count_hop { datagram.ttl.saturating_sub(1) } else { datagram.ttl };
    A::write_header(packet, datagram, rewrite.to, ttl, addresses)?;
    if let Some(macs) = rewrite.macs {
        packet.write(0, macs.words())?;
    }
    Ok(())
}
