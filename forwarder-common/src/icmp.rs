//! ICMP errors (RFC 792): packets about another packet, whose headers they quote.
//!
//! A quote holds the packet as its receiver saw it, behind a translation: an error travels against
//! the packet that it is about, and what it quotes is translated back on the way (RFC 5508 section 4).

use crate::{
    address::{Address as _, Ipv4, Port},
    checksum::Delta,
    flow::Tuple,
    packet::{OutOfBounds, Packet},
    parse::Datagram,
    reason::Reason,
    wire::{icmp, ipv4, tcp, udp},
};

/// What an ICMP error quotes of a TCP or UDP packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quote<A> {
    pub tuple: Tuple<A>,
    /// What it is to become; see [`crate::decide::Core::error`].
    pub to: Tuple<A>,
    /// Length of the quoted IP header in bytes.
    header_len: u32,
    /// TCP or UDP.
    pub protocol: u8,
    /// Whether the quote is long enough for the TCP or UDP checksum; UDP's may be absent all the same.
    has_checksum: bool,
    /// Of the quoted packet, as they lie in memory.
    ip_checksum: u16,
    l4_checksum: u16,
    /// The error's own.
    checksum: u16,
}

impl Quote<Ipv4> {
    pub const NOTHING: Self = Self {
        tuple: Datagram::NOTHING.tuple,
        to: Datagram::NOTHING.tuple,
        header_len: 0,
        protocol: 0,
        has_checksum: false,
        ip_checksum: 0,
        l4_checksum: 0,
        checksum: 0,
    };
}

/// Whether a message of this type quotes a packet that had a problem: destination unreachable, time
/// exceeded, parameter problem. (Source quench is deprecated, RFC 6633; a redirect concerns the link
/// it was sent on.)
#[inline(always)]
pub fn is_error(kind: u8) -> bool {
    matches!(kind, icmp::DESTINATION_UNREACHABLE | icmp::TIME_EXCEEDED | icmp::PARAMETER_PROBLEM)
}

/// Reads the quote of an error that [`crate::parse::ipv4`] has found. The reason is why the core has
/// no say in it: RFC 5508 section 4.2 wants the error's own checksum right, and says nothing of the
/// quoted packet's length, which may be cut anywhere behind its ports.
/// (A function of its own: see [`crate::decide::Core`] about the stack.)
#[inline(never)]
pub fn quote<P: Packet>(
    packet: &mut P,
    datagram: &Datagram<Ipv4>,
    quote: &mut Quote<Ipv4>,
) -> Result<(), Reason> {
    if datagram.l4_len() < icmp::SHORTEST_QUOTE as u32 {
        return Err(Reason::CutOff);
    }
    packet.reach(icmp::FARTHEST).map_err(|_| Reason::CutOff)?;
    let at = quoted_ip(datagram);
    let words: [u32; ipv4::MIN_LEN / 4] = packet.read(at).map_err(|_| Reason::CutOff)?;
    let [first, second, third, src, dst] = words;
    let [version_and_length, ..] = first.to_ne_bytes();
    let [_, protocol, ..] = third.to_ne_bytes();
    let header_len = u32::from(version_and_length & 0x0f) * 4;
    let is_first_fragment = u32::from_be(second) as u16 & ipv4::OFFSET == 0;
    let is_ours = protocol == tcp::NUMBER || protocol == udp::NUMBER;
    if version_and_length >> 4 != 4 || header_len < ipv4::MIN_LEN as u32 || !is_first_fragment || !is_ours {
        return Err(Reason::OtherProtocol);
    }
    let quoted_l4 = datagram.l4_len().wrapping_sub(icmp::LEN as u32).wrapping_sub(header_len);
    if quoted_l4 > datagram.l4_len() || quoted_l4 < 4 {
        return Err(Reason::CutOff);
    }
    *quote = Quote {
        tuple: Tuple {
            src: Ipv4::from_word(src),
            dst: Ipv4::from_word(dst),
            src_port: Port::new(0),
            dst_port: Port::new(0),
        },
        to: Datagram::NOTHING.tuple,
        header_len,
        protocol,
        has_checksum: false,
        ip_checksum: (u32::from_be(third) as u16).to_be(),
        l4_checksum: 0,
        checksum: packet.read(datagram.l4() + icmp::CHECKSUM).map_err(|_| Reason::CutOff)?,
    };
    let l4 = quoted_l4_at(datagram, quote);
    let [src_port, dst_port] = packet.read::<[u16; 2]>(l4).map_err(|_| Reason::CutOff)?;
    quote.tuple.src_port = Port::from_word(src_port);
    quote.tuple.dst_port = Port::from_word(dst_port);
    if quoted_l4 >= checksum_at(protocol) as u32 + 2 {
        quote.l4_checksum = packet.read(l4 + checksum_at(protocol)).map_err(|_| Reason::CutOff)?;
        quote.has_checksum = protocol == tcp::NUMBER || quote.l4_checksum != 0;
    }
    Ok(())
}

/// Offset of the quoted IP header from the frame's start.
#[inline(always)]
fn quoted_ip(datagram: &Datagram<Ipv4>) -> usize {
    datagram.l4() + icmp::LEN
}

/// Offset of the quoted TCP or UDP header from the frame's start.
#[inline(always)]
fn quoted_l4_at(datagram: &Datagram<Ipv4>, quote: &Quote<Ipv4>) -> usize {
    // See `Datagram::l4` about the mask.
    quoted_ip(datagram) + (quote.header_len & 0x3c) as usize
}

/// Offset of the checksum in a TCP or UDP header.
#[inline(always)]
fn checksum_at(protocol: u8) -> usize {
    if protocol == tcp::NUMBER { tcp::CHECKSUM } else { udp::CHECKSUM }
}

/// Whether the error's own checksum is right (RFC 5508 REQ-3).
#[inline(always)]
pub fn is_whole<P: Packet>(packet: &P, datagram: &Datagram<Ipv4>) -> bool {
    packet.sum(datagram.l4(), datagram.l4_len() as usize) == Ok(0xffff)
}

/// Makes the quoted packet what it is to become, and adjusts the checksums that this concerns: the quoted
/// ones, and with all of these changes the error's own. A wrong one stays wrong.
#[inline(always)]
pub fn translate<P: Packet>(
    packet: &mut P,
    datagram: &Datagram<Ipv4>,
    quote: &Quote<Ipv4>,
) -> Result<(), OutOfBounds> {
    let Quote { tuple: from, to, .. } = quote;
    let addresses = from.src.replaced_by(to.src).and(from.dst.replaced_by(to.dst));
    let ports = from.src_port.replaced_by(to.src_port).and(from.dst_port.replaced_by(to.dst_port));
    let (ip, l4) = (quoted_ip(datagram), quoted_l4_at(datagram, quote));

    let ip_checksum = addresses.apply(quote.ip_checksum);
    packet.write(ip + ipv4::CHECKSUM, ip_checksum)?;
    packet.write(ip + ipv4::SRC, [to.src.word(), to.dst.word()])?;
    packet.write(l4, [to.src_port.word(), to.dst_port.word()])?;
    let mut changed = addresses.and(ports).and(Delta::of_u16(quote.ip_checksum, ip_checksum));
    if quote.has_checksum {
        let mut l4_checksum = addresses.and(ports).apply(quote.l4_checksum);
        if quote.protocol == udp::NUMBER && l4_checksum == 0 {
            l4_checksum = 0xffff;
        }
        packet.write(l4 + checksum_at(quote.protocol), l4_checksum)?;
        changed = changed.and(Delta::of_u16(quote.l4_checksum, l4_checksum));
    }
    packet.write(datagram.l4() + icmp::CHECKSUM, changed.apply(quote.checksum))
}
