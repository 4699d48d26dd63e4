//! IPv4 (RFC 791).

use super::Family;
use crate::{
    address::Ipv4,
    checksum::{self, Delta},
    flow::Tuple,
    fragment::Fragment,
    icmp::Quote,
    packet::{OutOfBounds, Packet},
    parse::{self, Datagram},
    reason::Reason,
    wire::{ethernet, icmp, ipv4},
};

impl Family for Ipv4 {
    const ETHER_TYPE: u16 = ethernet::TYPE_IPV4;
    const ICMP: u8 = icmp::NUMBER;
    const ICMP_COVERS_ADDRESSES: bool = false;
    const HEADER_LEN_MASK: u32 = 0x3c;
    const FRAGMENTS_SHARE_PROTOCOL: bool = true;

    #[inline(always)]
    fn parse<P: Packet>(packet: &mut P, whole: bool, datagram: &mut Datagram<Self>) -> Result<(), Reason> {
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
        *datagram = Datagram {
            tuple: Tuple { src: Ipv4::from_word(src), dst: Ipv4::from_word(dst), ..Tuple::NOTHING },
            protocol,
            ttl,
            class: u32::from(tos),
            ip_checksum: (u32::from_be(third) as u16).to_be(),
            ip_len,
            header_len,
            dont_fragment: flags_and_offset & ipv4::DF != 0,
            fragment: Fragment {
                id: (u32::from_be(second) >> 16).to_be(),
                more: flags_and_offset & ipv4::MF != 0,
                to_host: false,
                offset: u32::from(flags_and_offset & ipv4::OFFSET) * 8,
                headers: header_len,
            },
            ..Datagram::NOTHING
        };
        parse::payload(packet, whole, header_len, datagram)
    }

    #[inline(always)]
    fn is_extension(_protocol: u8) -> bool {
        false
    }

    /// Destination unreachable, time exceeded, parameter problem. (Source quench is deprecated, RFC 6633;
    /// a redirect concerns the link it was sent on.)
    #[inline(always)]
    fn is_error(kind: u8) -> bool {
        matches!(kind, icmp::DESTINATION_UNREACHABLE | icmp::TIME_EXCEEDED | icmp::PARAMETER_PROBLEM)
    }

    #[inline(always)]
    fn read_quoted<P: Packet>(
        packet: &P,
        at: usize,
        room: u32,
        quote: &mut Quote<Self>,
    ) -> Result<(), Reason> {
        let words: [u32; ipv4::MIN_LEN / 4] = packet.read(at).map_err(|_| Reason::CutOff)?;
        let [first, second, third, src, dst] = words;
        let [version_and_length, ..] = first.to_ne_bytes();
        let [_, protocol, ..] = third.to_ne_bytes();
        let header_len = u32::from(version_and_length & 0x0f) * 4;
        let is_first_fragment = u32::from_be(second) as u16 & ipv4::OFFSET == 0;
        if version_and_length >> 4 != 4 || header_len < ipv4::MIN_LEN as u32 || !is_first_fragment {
            return Err(Reason::OtherProtocol);
        }
        if room < header_len {
            return Err(Reason::CutOff);
        }
        (quote.tuple.src, quote.tuple.dst) = (Ipv4::from_word(src), Ipv4::from_word(dst));
        (quote.protocol, quote.header_len) = (protocol, header_len);
        quote.ip_checksum = (u32::from_be(third) as u16).to_be();
        Ok(())
    }

    #[inline(always)]
    fn write_header<P: Packet>(
        packet: &mut P,
        datagram: &Datagram<Self>,
        to: &Tuple<Self>,
        ttl: u8,
        addresses: Delta,
    ) -> Result<(), OutOfBounds> {
        let ttl_and_protocol = |ttl| u16::from_ne_bytes([ttl, datagram.protocol]);
        let hop = Delta::of_u16(ttl_and_protocol(datagram.ttl), ttl_and_protocol(ttl));
        let checksum = addresses.and(hop).apply(datagram.ip_checksum);
        packet.write(ethernet::LEN + ipv4::TTL, [ttl_and_protocol(ttl), checksum])?;
        packet.write(ethernet::LEN + ipv4::SRC, [to.src.word(), to.dst.word()])
    }

    #[inline(always)]
    fn write_quoted<P: Packet>(
        packet: &mut P,
        at: usize,
        quote: &Quote<Self>,
        addresses: Delta,
    ) -> Result<Delta, OutOfBounds> {
        let checksum = addresses.apply(quote.ip_checksum);
        packet.write(at + ipv4::CHECKSUM, checksum)?;
        packet.write(at + ipv4::SRC, [quote.to.src.word(), quote.to.dst.word()])?;
        Ok(addresses.and(Delta::of_u16(quote.ip_checksum, checksum)))
    }
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
