//! From bytes to what the core decides on.

use crate::{
    address::{Macs, Port},
    checksum,
    family::Family,
    flow::Tuple,
    fragment::Fragment,
    packet::{L4Checksum, OutOfBounds, Packet},
    reason::Reason,
    tcp::{self as tcp_flags, Segment},
    wire::{ethernet, tcp, udp},
};

/// The Ethernet header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ethernet {
    pub macs: Macs,
    /// As it lies in memory.
    pub ether_type: u16,
}

/// What is above IP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    Tcp,
    Udp,
    /// Its ports can be read, but its header cannot be right for the packet's length.
    Malformed,
    /// An ICMP error; it has no ports.
    IcmpError,
    /// A fragment behind the first: no header and no ports, but those of the first one.
    LaterFragment,
}

/// A TCP or UDP packet or a fragment of one, or a whole ICMP error, whose IP header is right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Datagram<A> {
    pub tuple: Tuple<A>,
    /// IP protocol number: TCP, UDP or ICMP.
    pub protocol: u8,
    pub transport: Transport,
    /// All zero unless it is TCP. (Not a part of `Transport`: copying an enum whose other variants
    /// leave bytes undefined makes the compiler copy whatever a register holds, which the BPF
    /// verifier refuses if it is an address.)
    pub segment: Segment,
    /// TTL, or hop limit.
    pub ttl: u8,
    /// As the kernel's routing wants it: of IPv4 the type of service, of IPv6 traffic class and flow label
    /// (a `__be32`).
    pub class: u32,
    /// Of IPv4, as it lies in memory.
    pub ip_checksum: u16,
    /// TCP's or UDP's, as it lies in memory; meaningless otherwise.
    pub l4_checksum: u16,
    /// Length of the IP packet in bytes; what the frame has behind it is padding.
    pub ip_len: u32,
    /// Length of the IP header in bytes, IPv6 extension headers included.
    pub header_len: u32,
    /// Length of the TCP or UDP header in bytes; meaningless otherwise.
    pub l4_header_len: u32,
    pub dont_fragment: bool,
    pub fragment: Fragment,
}

impl<A: Family> Datagram<A> {
    pub const NOTHING: Self = Self {
        tuple: Tuple::NOTHING,
        protocol: 0,
        transport: Transport::Malformed,
        segment: Segment::NONE,
        ttl: 0,
        class: 0,
        ip_checksum: 0,
        l4_checksum: 0,
        ip_len: 0,
        header_len: 0,
        l4_header_len: 0,
        dont_fragment: false,
        fragment: Fragment::NOTHING,
    };

    /// Offset of the TCP or UDP header from the frame's start.
    #[inline(always)]
    pub fn l4(&self) -> usize {
        // The mask says again what the parser has made sure of: kept in memory in between, the
        // verifier would not know the bound any more.
        ethernet::LEN + (self.header_len & A::HEADER_LEN_MASK) as usize
    }

    /// Where the TCP or UDP checksum stands.
    #[inline(always)]
    pub fn l4_checksum_place(&self) -> L4Checksum {
        let udp = self.protocol == udp::NUMBER;
        let offset = self.l4() + if udp { udp::CHECKSUM } else { tcp::CHECKSUM };
        L4Checksum { offset, udp, ipv6: A::ETHER_TYPE == ethernet::TYPE_IPV6 }
    }

    /// Length of the longest of the IP packets that go out for it: cut up into segments of this much
    /// payload, unless that is 0.
    #[inline(always)]
    pub fn longest_packet(&self, segment_size: u32) -> u32 {
        if segment_size == 0 { self.ip_len } else { self.header_len + self.l4_header_len + segment_size }
    }

    /// Whether it is the first of several fragments.
    #[inline(always)]
    pub fn leads(&self) -> bool {
        self.fragment.more && !self.fragment.is_later()
    }

    /// Length of the TCP segment or UDP datagram in bytes.
    #[inline(always)]
    pub fn l4_len(&self) -> u32 {
        self.ip_len.wrapping_sub(self.header_len)
    }

    /// Length of what this part has of the packet's payload, in bytes.
    #[inline(always)]
    pub fn fragment_len(&self) -> u32 {
        self.ip_len.wrapping_sub(self.fragment.headers)
    }

    /// The sum over the pseudo-header that checksums cover (RFC 793, RFC 8200 section 8.1), not folded.
    #[inline(always)]
    pub fn pseudo_header(&self) -> u32 {
        self.tuple.src.sum()
            + self.tuple.dst.sum()
            + u32::from(u16::from(self.protocol).to_be())
            + u32::from((self.l4_len() as u16).to_be())
    }
}

/// Reads the Ethernet header.
#[inline(always)]
pub fn ethernet<P: Packet>(packet: &P) -> Result<Ethernet, OutOfBounds> {
    Ok(Ethernet { macs: Macs::from_words(packet.read(0)?), ether_type: packet.read(ethernet::TYPE)? })
}

/// Reads what is behind an IP header of `header_len` bytes that a [`Family`] has read into `datagram`.
#[inline(always)]
pub fn payload<A: Family, P: Packet>(
    packet: &P,
    whole: bool,
    header_len: u32,
    datagram: &mut Datagram<A>,
) -> Result<(), Reason> {
    let Datagram { protocol, fragment, .. } = *datagram;
    if whole && !fragment.is_whole() {
        return Err(Reason::Fragment);
    }
    let is_ours = protocol == tcp::NUMBER || protocol == udp::NUMBER;
    let may_be_ours = is_ours || fragment.is_later() && A::is_extension(protocol);
    if !may_be_ours && protocol != A::ICMP {
        return Err(Reason::OtherProtocol);
    }
    let l4 = ethernet::LEN + header_len as usize;
    let l4_len = datagram.ip_len.wrapping_sub(header_len);
    if fragment.is_later() {
        if protocol == A::ICMP {
            return Err(Reason::OtherProtocol);
        }
        datagram.transport = Transport::LaterFragment;
        return Ok(());
    }
    if l4_len < 4 {
        return Err(Reason::CutOff);
    }
    let [src_port, dst_port] = packet.read::<[u16; 2]>(l4).map_err(|_| Reason::CutOff)?;
    if protocol == A::ICMP {
        let [kind, _] = src_port.to_ne_bytes();
        if !fragment.is_whole() || !A::is_error(kind) {
            return Err(Reason::OtherProtocol);
        }
        datagram.transport = Transport::IcmpError;
        return Ok(());
    }
    (datagram.tuple.src_port, datagram.tuple.dst_port) =
        (Port::from_word(src_port), Port::from_word(dst_port));
    (datagram.transport, datagram.segment, datagram.l4_checksum, datagram.l4_header_len) =
        transport(packet, protocol, l4, l4_len, fragment.more);
    Ok(())
}

/// What the transport header says, its checksum as it lies in memory, and its length. `more`: of a
/// UDP datagram only the beginning is here.
#[inline(always)]
fn transport<P: Packet>(
    packet: &P,
    protocol: u8,
    l4: usize,
    l4_len: u32,
    more: bool,
) -> (Transport, Segment, u16, u32) {
    let read = if protocol == tcp::NUMBER {
        tcp_header(packet, l4, l4_len)
            .map(|(segment, checksum, length)| (Transport::Tcp, segment, checksum, length))
    } else {
        udp_checksum(packet, l4, l4_len, more)
            .map(|checksum| (Transport::Udp, Segment::NONE, checksum, udp::LEN as u32))
    };
    read.unwrap_or((Transport::Malformed, Segment::NONE, 0, 0))
}

/// RFC 9293 section 3.1, five words in network byte order.
#[inline(always)]
fn tcp_header<P: Packet>(packet: &P, l4: usize, l4_len: u32) -> Option<(Segment, u16, u32)> {
    let [_, seq, ack, state, sums] = packet.read::<[u32; tcp::MIN_LEN / 4]>(l4).ok()?;
    let [offset, flags, ..] = state.to_ne_bytes();
    let header_len = u32::from(offset >> 4) * 4;
    if header_len < tcp::MIN_LEN as u32 || header_len > l4_len {
        return None;
    }
    let seq = u32::from_be(seq);
    let phantom = u32::from(flags & tcp_flags::SYN != 0) + u32::from(flags & tcp_flags::FIN != 0);
    let end = seq.wrapping_add(l4_len - header_len).wrapping_add(phantom);
    let segment = Segment { flags, seq, ack: u32::from_be(ack), end };
    Some((segment, ((u32::from_be(sums) >> 16) as u16).to_be(), header_len))
}

/// RFC 768: ports, length, checksum.
#[inline(always)]
fn udp_checksum<P: Packet>(packet: &P, l4: usize, l4_len: u32, more: bool) -> Option<u16> {
    let [_, second] = packet.read::<[u32; udp::LEN / 4]>(l4).ok()?;
    let second = u32::from_be(second);
    let length = second >> 16;
    if length < udp::LEN as u32 || l4_len < udp::LEN as u32 || length > l4_len && !more {
        return None;
    }
    Some((second as u16).to_be())
}

/// Whether the checksum field holds just the pseudo-header's sum, as a sender leaves it whose
/// offload is to do the rest (Linux: `CHECKSUM_PARTIAL`).
///
/// A finished checksum may look the same by chance, once in 65,536 packets.
#[inline(always)]
pub fn checksum_is_unfinished<A: Family>(datagram: &Datagram<A>) -> bool {
    checksum::fold(datagram.pseudo_header()) == datagram.l4_checksum
}
