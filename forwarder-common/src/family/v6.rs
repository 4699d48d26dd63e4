//! IPv6 (RFC 8200).

use super::Family;
use crate::{
    address::Ipv6,
    checksum::Delta,
    flow::Tuple,
    fragment::Fragment,
    icmp::Quote,
    packet::{OutOfBounds, Packet},
    parse::{self, Datagram},
    reason::Reason,
    wire::{ethernet, icmp, ipv6, tcp},
};

/// How many extension headers are looked through. RFC 8200 section 4.1 has seven in one packet at the
/// most, of which one needs IPsec and one is there twice.
const MAX_EXTENSIONS: u32 = 6;

impl Family for Ipv6 {
    const ETHER_TYPE: u16 = ethernet::TYPE_IPV6;
    const ICMP: u8 = icmp::NUMBER_V6;
    const ICMP_COVERS_ADDRESSES: bool = true;
    const HEADER_LEN_MASK: u32 = 0xfc;
    const FRAGMENTS_SHARE_PROTOCOL: bool = false;

    #[inline(always)]
    fn parse<P: Packet>(packet: &mut P, whole: bool, datagram: &mut Datagram<Self>) -> Result<(), Reason> {
        let fixed = FixedHeader::read(packet, ethernet::LEN).map_err(|_| Reason::ShortFrame)?;
        if fixed.version() != 6 {
            return Err(Reason::BadIpHeader);
        }
        // (A payload length of 0 would be a jumbogram's, RFC 2675.)
        let ip_len = ipv6::LEN as u32 + fixed.payload_len;
        if fixed.payload_len == 0 || ethernet::LEN + ip_len as usize > packet.len() {
            return Err(Reason::BadIpLength);
        }
        // Field by field: put together on the stack it would take a quarter of that.
        *datagram = Datagram::NOTHING;
        read_addresses(packet, ethernet::LEN, &mut datagram.tuple).map_err(|_| Reason::ShortFrame)?;
        (datagram.protocol, datagram.ttl) = (fixed.next_header, fixed.hop_limit);
        datagram.class = fixed.first & FLOW_INFO;
        (datagram.ip_len, datagram.header_len) = (ip_len, ipv6::LEN as u32);
        // No router fragments an IPv6 packet (RFC 8200 section 4.5).
        datagram.dont_fragment = true;
        datagram.fragment.headers = ipv6::LEN as u32;
        if Self::is_extension(fixed.next_header) {
            packet.reach(ethernet::LEN + ipv6::MAX_LEN + tcp::MIN_LEN).map_err(|_| Reason::ShortFrame)?;
            let mut chain = Chain { protocol: fixed.next_header, header_len: ipv6::LEN as u32 };
            look_through(packet, ethernet::LEN, ip_len, &mut chain, &mut datagram.fragment)?;
            (datagram.protocol, datagram.header_len) = (chain.protocol, chain.header_len);
        }
        let header_len = datagram.header_len;
        parse::payload(packet, whole, header_len & Self::HEADER_LEN_MASK, datagram)
    }

    /// (Not among them: the authentication header, whose packets no translation survives.)
    #[inline(always)]
    fn is_extension(protocol: u8) -> bool {
        matches!(protocol, ipv6::HOP_BY_HOP | ipv6::ROUTING | ipv6::FRAGMENT | ipv6::DESTINATION_OPTIONS)
    }

    #[inline(always)]
    fn is_error(kind: u8) -> bool {
        icmp::ERRORS_V6.contains(&kind)
    }

    #[inline(always)]
    fn read_quoted<P: Packet>(
        packet: &P,
        at: usize,
        room: u32,
        quote: &mut Quote<Self>,
    ) -> Result<(), Reason> {
        let fixed = FixedHeader::read(packet, at).map_err(|_| Reason::CutOff)?;
        if fixed.version() != 6 {
            return Err(Reason::OtherProtocol);
        }
        let mut chain = Chain { protocol: fixed.next_header, header_len: ipv6::LEN as u32 };
        let mut fragment = Fragment::NOTHING;
        if Self::is_extension(fixed.next_header) {
            look_through(packet, at, room, &mut chain, &mut fragment)?;
        }
        if fragment.is_later() {
            return Err(Reason::OtherProtocol);
        }
        read_addresses(packet, at, &mut quote.tuple).map_err(|_| Reason::CutOff)?;
        (quote.protocol, quote.header_len) = (chain.protocol, chain.header_len);
        Ok(())
    }

    #[inline(always)]
    fn write_header<P: Packet>(
        packet: &mut P,
        _datagram: &Datagram<Self>,
        to: &Tuple<Self>,
        ttl: u8,
        _addresses: Delta,
    ) -> Result<(), OutOfBounds> {
        packet.write(ethernet::LEN + ipv6::HOP_LIMIT, ttl)?;
        packet.write(ethernet::LEN + ipv6::SRC, to.src.words())?;
        packet.write(ethernet::LEN + ipv6::DST, to.dst.words())
    }

    #[inline(always)]
    fn write_quoted<P: Packet>(
        packet: &mut P,
        at: usize,
        quote: &Quote<Self>,
        addresses: Delta,
    ) -> Result<Delta, OutOfBounds> {
        packet.write(at + ipv6::SRC, quote.to.src.words())?;
        packet.write(at + ipv6::DST, quote.to.dst.words())?;
        Ok(addresses)
    }
}

/// Traffic class and flow label, in the header's first word as it lies in memory.
const FLOW_INFO: u32 = 0x0fff_ffff_u32.to_be();

/// RFC 8200 section 3, without the addresses.
struct FixedHeader {
    /// Version, traffic class and flow label, as they lie in memory.
    first: u32,
    payload_len: u32,
    next_header: u8,
    hop_limit: u8,
}

impl FixedHeader {
    #[inline(always)]
    fn read<P: Packet>(packet: &P, at: usize) -> Result<Self, OutOfBounds> {
        let [first, second] = packet.read::<[u32; 2]>(at)?;
        let [_, _, next_header, hop_limit] = second.to_ne_bytes();
        Ok(Self { first, payload_len: u32::from_be(second) >> 16, next_header, hop_limit })
    }

    #[inline(always)]
    fn version(&self) -> u32 {
        u32::from_be(self.first) >> 28
    }
}

#[inline(always)]
fn read_addresses<P: Packet>(packet: &P, at: usize, tuple: &mut Tuple<Ipv6>) -> Result<(), OutOfBounds> {
    tuple.src = Ipv6::from_words(packet.read(at + ipv6::SRC)?);
    tuple.dst = Ipv6::from_words(packet.read(at + ipv6::DST)?);
    Ok(())
}

/// How far a chain of extension headers has been looked through.
struct Chain {
    /// What comes next.
    protocol: u8,
    /// Length of all headers so far, in bytes.
    header_len: u32,
}

/// Goes along the extension headers of the IP header at `at`, whose packet has `ip_len` bytes from there,
/// up to the first that is none, or to the fragment header of a fragment behind the first. (A function of
/// its own: see [`crate::decide::Core::claim`].)
#[inline(never)]
fn look_through<P: Packet>(
    packet: &P,
    at: usize,
    ip_len: u32,
    chain: &mut Chain,
    fragment: &mut Fragment,
) -> Result<(), Reason> {
    let (mut protocol, mut header_len) = (chain.protocol, chain.header_len);
    let mut left = MAX_EXTENSIONS;
    while Ipv6::is_extension(protocol) {
        if left == 0 {
            return Err(Reason::ExtensionHeaders);
        }
        left -= 1;
        let [first, second] = packet
            .read::<[u32; 2]>(at + (header_len & Ipv6::HEADER_LEN_MASK) as usize)
            .map_err(|_| Reason::CutOff)?;
        let [next, units, _, segments_left] = first.to_ne_bytes();
        // Until the last of its stations the packet's destination is another one.
        if protocol == ipv6::ROUTING && segments_left != 0 {
            return Err(Reason::ExtensionHeaders);
        }
        header_len += if protocol == ipv6::FRAGMENT { 8 } else { (u32::from(units) + 1) * 8 };
        if header_len > ipv6::MAX_LEN as u32 {
            return Err(Reason::ExtensionHeaders);
        }
        if header_len > ip_len {
            return Err(Reason::CutOff);
        }
        if protocol == ipv6::FRAGMENT {
            if fragment.headers > ipv6::LEN as u32 {
                // A fragment of a fragment is nobody's honest packet.
                return Err(Reason::ExtensionHeaders);
            }
            let offset_and_more = u32::from_be(first) as u16;
            *fragment = Fragment {
                id: second,
                more: offset_and_more & ipv6::MF != 0,
                to_host: false,
                offset: u32::from(offset_and_more & ipv6::OFFSET),
                headers: header_len,
            };
        }
        protocol = next;
        if fragment.is_later() {
            // What follows are no headers.
            break;
        }
    }
    *chain = Chain { protocol, header_len };
    Ok(())
}
