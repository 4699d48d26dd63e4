//! Puts a decision into the packet's bytes.

use crate::{
    address::{Address, Ipv4, Macs},
    checksum::Delta,
    flow::Tuple,
    icmp::{self, Quote},
    packet::{OutOfBounds, Packet},
    parse::Datagram,
    wire::{ethernet, ipv4, udp},
};

/// What to change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rewrite<A> {
    pub to: Tuple<A>,
    /// False where the host's stack counts the hop itself.
    pub count_hop: bool,
    /// Ethernet destination and source; `None` where the kernel writes them.
    pub macs: Option<Macs>,
}

/// Rewrites an IPv4 packet that [`crate::parse::ipv4`] has read.
///
/// The checksum comes first: it is the only change that a kernel can refuse, so that an error
/// leaves the packet as it was. All places have been read before; writing them cannot fail.
#[inline(always)]
pub fn ipv4<P: Packet>(
    packet: &mut P,
    datagram: &Datagram<Ipv4>,
    rewrite: &Rewrite<Ipv4>,
) -> Result<(), OutOfBounds> {
    let (from, to) = (&datagram.tuple, &rewrite.to);
    let addresses = address_change(datagram, rewrite);
    let ports = from.src_port.replaced_by(to.src_port).and(from.dst_port.replaced_by(to.dst_port));
    packet.adjust_l4_checksum(
        datagram.l4_checksum_offset(),
        addresses,
        ports,
        datagram.protocol == udp::NUMBER,
    )?;
    packet.write(datagram.l4(), [to.src_port.word(), to.dst_port.word()])?;
    ip_header(packet, datagram, rewrite, addresses)
}

/// Rewrites a fragment without a TCP or UDP header: the first one's checksum covers its change.
#[inline(always)]
pub fn later_fragment<P: Packet>(
    packet: &mut P,
    datagram: &Datagram<Ipv4>,
    rewrite: &Rewrite<Ipv4>,
) -> Result<(), OutOfBounds> {
    ip_header(packet, datagram, rewrite, address_change(datagram, rewrite))
}

#[inline(always)]
fn address_change(datagram: &Datagram<Ipv4>, rewrite: &Rewrite<Ipv4>) -> Delta {
    let (from, to) = (&datagram.tuple, &rewrite.to);
    from.src.replaced_by(to.src).and(from.dst.replaced_by(to.dst))
}

/// Rewrites an ICMP error, with what it quotes.
#[inline(always)]
pub fn icmp_error<P: Packet>(
    packet: &mut P,
    datagram: &Datagram<Ipv4>,
    quote: &Quote<Ipv4>,
    rewrite: &Rewrite<Ipv4>,
) -> Result<(), OutOfBounds> {
    icmp::translate(packet, datagram, quote)?;
    ip_header(packet, datagram, rewrite, address_change(datagram, rewrite))
}

#[inline(always)]
fn ip_header<P: Packet>(
    packet: &mut P,
    datagram: &Datagram<Ipv4>,
    rewrite: &Rewrite<Ipv4>,
    addresses: Delta,
) -> Result<(), OutOfBounds> {
    let to = &rewrite.to;
    let ttl = if rewrite.count_hop { datagram.ttl.saturating_sub(1) } else { datagram.ttl };
    let ttl_and_protocol = |ttl| u16::from_ne_bytes([ttl, datagram.protocol]);
    let hop = Delta::of_u16(ttl_and_protocol(datagram.ttl), ttl_and_protocol(ttl));
    let checksum = addresses.and(hop).apply(datagram.ip_checksum);
    packet.write(ethernet::LEN + ipv4::TTL, [ttl_and_protocol(ttl), checksum])?;
    packet.write(ethernet::LEN + ipv4::SRC, [to.src.word(), to.dst.word()])?;

    if let Some(macs) = rewrite.macs {
        packet.write(0, macs.words())?;
    }
    Ok(())
}
