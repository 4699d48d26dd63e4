//! ICMP errors (RFC 792, RFC 4443): packets about another packet, whose headers they quote.
//!
//! A quote holds the packet as its receiver saw it, behind a translation: an error travels against
//! the packet that it is about, and what it quotes is translated back on the way (RFC 5508 section 4).

use crate::{
    address::Port,
    checksum::{self, Delta},
    family::Family,
    flow::Tuple,
    packet::{OutOfBounds, Packet},
    parse::Datagram,
    reason::Reason,
    wire::{ethernet, icmp, tcp, udp},
};

/// What an ICMP error quotes of a TCP or UDP packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quote<A> {
    pub tuple: Tuple<A>,
    /// What it is to become; see [`crate::decide::Core::error`].
    pub to: Tuple<A>,
    /// Length of the quoted IP header in bytes, extension headers included.
    pub header_len: u32,
    /// TCP or UDP.
    pub protocol: u8,
    /// Whether the quote is long enough for the TCP or UDP checksum; UDP's may be absent all the same.
    has_checksum: bool,
    /// Of the quoted IPv4 header, as it lies in memory.
    pub ip_checksum: u16,
    /// Of the quoted packet, as it lies in memory.
    l4_checksum: u16,
    /// The error's own.
    checksum: u16,
}

impl<A: Family> Quote<A> {
    pub const NOTHING: Self = Self {
        tuple: Tuple::NOTHING,
        to: Tuple::NOTHING,
        header_len: 0,
        protocol: 0,
        has_checksum: false,
        ip_checksum: 0,
        l4_checksum: 0,
        checksum: 0,
    };
}

/// Reads the quote of an error that [`Family::parse`] has found. The reason is why the core has
/// no say in it: RFC 5508 section 4.2 wants the error's own checksum right, and says nothing of the
/// quoted packet's length, which may be cut anywhere behind its ports.
/// (A function of its own: see [`crate::decide::Core`] about the stack.)
#[inline(never)]
pub fn quote<A: Family, P: Packet>(
    packet: &mut P,
    datagram: &Datagram<A>,
    quote: &mut Quote<A>,
) -> Result<(), Reason> {
    packet.reach(farthest::<A>()).map_err(|_| Reason::CutOff)?;
    *quote = Quote {
        checksum: packet.read(datagram.l4() + icmp::CHECKSUM).map_err(|_| Reason::CutOff)?,
        ..Quote::NOTHING
    };
    let room = datagram.l4_len().checked_sub(icmp::LEN as u32).ok_or(Reason::CutOff)?;
    A::read_quoted(packet, quoted_ip(datagram), room, quote)?;
    if quote.protocol != tcp::NUMBER && quote.protocol != udp::NUMBER {
        return Err(Reason::OtherProtocol);
    }
    let room = room.checked_sub(quote.header_len).ok_or(Reason::CutOff)?;
    if room < 4 {
        return Err(Reason::CutOff);
    }
    let (l4, checksum_at) = (quoted_l4_at(datagram, quote), checksum_at(quote.protocol));
    let [src_port, dst_port] = packet.read::<[u16; 2]>(l4).map_err(|_| Reason::CutOff)?;
    quote.tuple.src_port = Port::from_word(src_port);
    quote.tuple.dst_port = Port::from_word(dst_port);
    if room >= checksum_at as u32 + 2 {
        quote.l4_checksum = packet.read(l4 + checksum_at).map_err(|_| Reason::CutOff)?;
        quote.has_checksum = quote.protocol == tcp::NUMBER || quote.l4_checksum != 0;
    }
    Ok(())
}

/// How far into a frame the core reads: both IP headers with all that belongs to them, and a quoted TCP
/// header up to its checksum.
#[inline(always)]
fn farthest<A: Family>() -> usize {
    let ip = A::HEADER_LEN_MASK as usize;
    ethernet::LEN + ip + icmp::LEN + ip + tcp::CHECKSUM + 2
}

/// Offset of the quoted IP header from the frame's start.
#[inline(always)]
fn quoted_ip<A: Family>(datagram: &Datagram<A>) -> usize {
    datagram.l4() + icmp::LEN
}

/// Offset of the quoted TCP or UDP header from the frame's start.
#[inline(always)]
fn quoted_l4_at<A: Family>(datagram: &Datagram<A>, quote: &Quote<A>) -> usize {
    // See `Datagram::l4` about the mask.
    quoted_ip(datagram) + (quote.header_len & A::HEADER_LEN_MASK) as usize
}

/// Offset of the checksum in a TCP or UDP header.
#[inline(always)]
fn checksum_at(protocol: u8) -> usize {
    if protocol == tcp::NUMBER { tcp::CHECKSUM } else { udp::CHECKSUM }
}

/// Whether the error's own checksum is right (RFC 5508 REQ-3).
#[inline(always)]
pub fn is_whole<A: Family, P: Packet>(packet: &P, datagram: &Datagram<A>) -> bool {
    let Ok(sum) = packet.sum(datagram.l4(), datagram.l4_len() as usize) else { return false };
    let covered = if A::ICMP_COVERS_ADDRESSES { datagram.pseudo_header() } else { 0 };
    checksum::fold(u32::from(sum) + covered) == 0xffff
}

/// Makes the quoted packet what it is to become, and adjusts the checksums that this concerns: the quoted
/// ones, and with all of these changes the error's own. A wrong one stays wrong. `outer`: the change of the
/// error's own addresses.
#[inline(always)]
pub fn translate<A: Family, P: Packet>(
    packet: &mut P,
    datagram: &Datagram<A>,
    quote: &Quote<A>,
    outer: Delta,
) -> Result<(), OutOfBounds> {
    let Quote { tuple: from, to, .. } = quote;
    let addresses = A::pair_replaced_by((&from.src, &from.dst), (&to.src, &to.dst));
    let ports = from.src_port.replaced_by(to.src_port).and(from.dst_port.replaced_by(to.dst_port));
    let l4 = quoted_l4_at(datagram, quote);

    let mut changed = A::write_quoted(packet, quoted_ip(datagram), quote, addresses)?.and(ports);
    packet.write(l4, [to.src_port.word(), to.dst_port.word()])?;
    if quote.has_checksum {
        let mut l4_checksum = addresses.and(ports).apply(quote.l4_checksum);
        if quote.protocol == udp::NUMBER && l4_checksum == 0 {
            l4_checksum = 0xffff;
        }
        packet.write(l4 + checksum_at(quote.protocol), l4_checksum)?;
        changed = changed.and(Delta::of_u16(quote.l4_checksum, l4_checksum));
    }
    if A::ICMP_COVERS_ADDRESSES {
        changed = changed.and(outer);
    }
    packet.write(datagram.l4() + icmp::CHECKSUM, changed.apply(quote.checksum))
}
