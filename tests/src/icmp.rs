//! ICMP and ICMPv6 errors as they come in frames.

use std::net::{IpAddr, SocketAddr};

use etherparse::{
    Icmpv4Slice, Icmpv6Slice, Ipv4HeaderSlice, Ipv4Slice, Ipv6Header, Ipv6HeaderSlice, Ipv6Slice, NetSlice,
    SlicedPacket, TransportSlice,
};

/// An ICMP error about a TCP or UDP packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IcmpError {
    pub source: IpAddr,
    pub destination: IpAddr,
    pub ttl: u8,
    /// ICMP type and code, of the family's own kind.
    pub kind: (u8, u8),
    /// Of "too big" errors, the length that is not.
    pub mtu: u32,
    /// Whether its IP and ICMP checksums, and the quoted IP header's, are right.
    pub checksums_right: bool,
    /// The quoted packet's addresses and ports.
    pub quoted_source: SocketAddr,
    pub quoted_destination: SocketAddr,
}

impl IcmpError {
    /// Nothing where the frame holds something else.
    pub fn parse(frame: &[u8]) -> Option<Self> {
        let packet = SlicedPacket::from_ethernet(frame).ok()?;
        match (packet.net?, packet.transport?) {
            (NetSlice::Ipv4(ip), TransportSlice::Icmpv4(icmp)) => Self::of_ipv4(&ip, &icmp),
            (NetSlice::Ipv6(ip), TransportSlice::Icmpv6(icmp)) => Self::of_ipv6(&ip, &icmp),
            _ => None,
        }
    }

    fn of_ipv4(ip: &Ipv4Slice, icmp: &Icmpv4Slice) -> Option<Self> {
        let (outer, kind) = (ip.header(), (icmp.type_u8(), icmp.code_u8()));
        if ![3, 11, 12].contains(&kind.0) {
            return None;
        }
        let quoted = Ipv4HeaderSlice::from_slice(icmp.payload()).ok()?;
        let [from, to] = ports(icmp.payload().get(quoted.slice().len()..)?)?;
        let checksums_right = outer.to_header().calc_header_checksum() == outer.header_checksum()
            && quoted.to_header().calc_header_checksum() == quoted.header_checksum()
            && icmp.icmp_type().calc_checksum(icmp.payload()) == icmp.checksum();
        Some(Self {
            source: outer.source_addr().into(),
            destination: outer.destination_addr().into(),
            ttl: outer.ttl(),
            kind,
            mtu: u32::from_be_bytes(icmp.bytes5to8()) & 0xffff,
            checksums_right,
            quoted_source: SocketAddr::new(quoted.source_addr().into(), from),
            quoted_destination: SocketAddr::new(quoted.destination_addr().into(), to),
        })
    }

    fn of_ipv6(ip: &Ipv6Slice, icmp: &Icmpv6Slice) -> Option<Self> {
        let (outer, kind) = (ip.header(), (icmp.type_u8(), icmp.code_u8()));
        if !(1..=4).contains(&kind.0) {
            return None;
        }
        let quoted = Ipv6HeaderSlice::from_slice(icmp.payload()).ok()?;
        let behind = icmp.payload().get(Ipv6Header::LEN..)?;
        let (_, l4) = Ipv6Header::skip_all_header_extensions_in_slice(behind, quoted.next_header()).ok()?;
        let [from, to] = ports(l4)?;
        Some(Self {
            source: outer.source_addr().into(),
            destination: outer.destination_addr().into(),
            ttl: outer.hop_limit(),
            kind,
            mtu: u32::from_be_bytes(icmp.bytes5to8()),
            checksums_right: icmp.is_checksum_valid(outer.source(), outer.destination()),
            quoted_source: SocketAddr::new(quoted.source_addr().into(), from),
            quoted_destination: SocketAddr::new(quoted.destination_addr().into(), to),
        })
    }
}

/// The ports at the beginning of a TCP or UDP header, of which there may be no more than eight bytes.
fn ports(l4: &[u8]) -> Option<[u16; 2]> {
    let [a, b, c, d] = *l4.first_chunk()?;
    Some([u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d])])
}
