//! From bytes to what the core decides on.

use crate::{
    address::{Address, Ipv4, Macs, Port},
    checksum,
    flow::Tuple,
    fragment::Fragment,
    icmp::is_error,
    packet::{OutOfBounds, Packet},
    reason::Reason,
    tcp::{self as tcp_flags, Segment},
    wire::{ethernet, icmp, ipv4, tcp, udp},
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
    pub ttl: u8,
    pub tos: u8,
    /// As it lies in memory.
    pub ip_checksum: u16,
    /// TCP's or UDP's, as it lies in memory; meaningless otherwise.
    pub l4_checksum: u16,
    /// Length of the IP packet in bytes; what the frame has behind it is padding.
    pub ip_len: u32,
    /// Length of the IP header in bytes.
    pub header_len: u32,
    /// Length of the TCP or UDP header in bytes; meaningless otherwise.
    pub l4_header_len: u32,
    pub dont_fragment: bool,
    pub fragment: Fragment,
}

impl<A> Datagram<A> {
    /// Offset of the TCP or UDP header from the frame's start.
    #[inline(always)]
    pub fn l4(&self) -> usize {
        // The mask says again what the parser has made sure of: kept in memory in between, the
        // verifier would not know the bound any more.
        ethernet::LEN + (self.header_len & 0x3c) as usize
    }

    /// Offset of the TCP or UDP checksum from the frame's start.
    #[inline(always)]
    pub fn l4_checksum_offset(&self) -> usize {
        self.l4() + if self.protocol == tcp::NUMBER { tcp::CHECKSUM } else { udp::CHECKSUM }
    }

    /// Length of the longest of the IP packets that go out for it: cut up into segments of this much
    /// payload, unless that is 0.
    #[inline(always)]
    pub fn longest_packet(&self, segment_size: u32) -> u32 {
        if segment_size == 0 { self.ip_len } else { self.header_len + self.l4_header_len + segment_size }
    }

    /// Length of the TCP segment or UDP datagram in bytes.
    #[inline(always)]
    pub fn l4_len(&self) -> u32 {
        self.ip_len.wrapping_sub(self.header_len)
    }
}

impl Datagram<Ipv4> {
    pub const NOTHING: Self = Self {
        tuple: Tuple {
            src: Ipv4::new([0; 4]),
            dst: Ipv4::new([0; 4]),
            src_port: Port::new(0),
            dst_port: Port::new(0),
        },
        protocol: 0,
        transport: Transport::Malformed,
        segment: Segment::NONE,
        ttl: 0,
        tos: 0,
        ip_checksum: 0,
        l4_checksum: 0,
        ip_len: 0,
        header_len: 0,
        l4_header_len: 0,
        dont_fragment: false,
        fragment: Fragment { id: 0, more: false, to_host: false, offset: 0 },
    };
}

/// Reads the Ethernet header.
#[inline(always)]
pub fn ethernet<P: Packet>(packet: &P) -> Result<Ethernet, OutOfBounds> {
    Ok(Ethernet { macs: Macs::from_words(packet.read(0)?), ether_type: packet.read(ethernet::TYPE)? })
}

/// Reads an IPv4 packet behind the Ethernet header. The error is why the core has no say in it.
/// `whole`: fragments are not wanted here.
#[inline(always)]
pub fn ipv4<P: Packet>(packet: &P, whole: bool) -> Result<Datagram<Ipv4>, Reason> {
    // RFC 791 section 3.1, five words in network byte order.
    let words: [u32; ipv4::MIN_LEN / 4] = packet.read(ethernet::LEN).map_err(|_| Reason::ShortFrame)?;
    let [first, second, third, src, dst] = words;
    let [version_and_length, tos, ..] = first.to_ne_bytes();
    let ip_len = u32::from_be(first) & 0xffff;
    let flags_and_offset = u32::from_be(second) as u16;
    let [ttl, protocol, ..] = third.to_ne_bytes();

    let header_len = u32::from(version_and_length & 0x0f) * 4;
    if version_and_length >> 4 != 4 || header_len < ipv4::MIN_LEN as u32 {
        return Err(Reason::BadIpHeader);
    }
    if ip_len < header_len || ethernet::LEN + ip_len as usize > packet.len() {
        return Err(Reason::BadIpLength);
    }
    if !checksum_is_right(packet, words, header_len as usize)? {
        return Err(Reason::BadIpChecksum);
    }
    let fragment = Fragment {
        id: ((u32::from_be(second) >> 16) as u16).to_be(),
        more: flags_and_offset & ipv4::MF != 0,
        to_host: false,
        offset: u32::from(flags_and_offset & ipv4::OFFSET) * 8,
    };
    if whole && !fragment.is_whole() {
        return Err(Reason::Fragment);
    }
    if protocol != tcp::NUMBER && protocol != udp::NUMBER && protocol != icmp::NUMBER {
        return Err(Reason::OtherProtocol);
    }
    let l4 = ethernet::LEN + header_len as usize;
    let l4_len = ip_len - header_len;
    let (mut src_port, mut dst_port) = (0, 0);
    if !fragment.is_later() {
        if l4_len < 4 {
            return Err(Reason::CutOff);
        }
        [src_port, dst_port] = packet.read::<[u16; 2]>(l4).map_err(|_| Reason::CutOff)?;
    }
    let (transport, segment, l4_checksum, l4_header_len) = if protocol == icmp::NUMBER {
        let [kind, _] = src_port.to_ne_bytes();
        if !fragment.is_whole() || !is_error(kind) {
            return Err(Reason::OtherProtocol);
        }
        (src_port, dst_port) = (0, 0);
        (Transport::IcmpError, Segment::NONE, 0, 0)
    } else if fragment.is_later() {
        (Transport::LaterFragment, Segment::NONE, 0, 0)
    } else {
        transport(packet, protocol, l4, l4_len, fragment.more)
    };
    Ok(Datagram {
        tuple: Tuple {
            src: Ipv4::from_word(src),
            dst: Ipv4::from_word(dst),
            src_port: Port::from_word(src_port),
            dst_port: Port::from_word(dst_port),
        },
        protocol,
        transport,
        segment,
        ttl,
        tos,
        ip_checksum: (u32::from_be(third) as u16).to_be(),
        l4_checksum,
        ip_len,
        header_len,
        l4_header_len,
        dont_fragment: flags_and_offset & ipv4::DF != 0,
        fragment,
    })
}

/// Most 4-byte words of options that an IPv4 header can have.
const MAX_OPTION_WORDS: usize = 10;

#[inline(always)]
fn checksum_is_right<P: Packet>(
    packet: &P,
    words: [u32; ipv4::MIN_LEN / 4],
    header_len: usize,
) -> Result<bool, Reason> {
    let mut sum = checksum::sum(words);
    if header_len > ipv4::MIN_LEN {
        for word in 0..MAX_OPTION_WORDS {
            let at = ipv4::MIN_LEN + word * 4;
            if at >= header_len {
                break;
            }
            let option: u32 = packet.read(ethernet::LEN + at).map_err(|_| Reason::ShortFrame)?;
            sum += checksum::sum([option]);
        }
    }
    Ok(checksum::fold(sum) == 0xffff)
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
pub fn checksum_is_unfinished<A: Address>(datagram: &Datagram<A>) -> bool {
    let sum = datagram.tuple.src.sum()
        + datagram.tuple.dst.sum()
        + u32::from(u16::from(datagram.protocol).to_be())
        + u32::from((datagram.l4_len() as u16).to_be());
    checksum::fold(sum) == datagram.l4_checksum
}
