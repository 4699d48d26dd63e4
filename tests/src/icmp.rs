//! ICMP errors as they come in frames.

use std::net::{Ipv4Addr, SocketAddrV4};

use etherparse::{Icmpv4Slice, Ipv4HeaderSlice, NetSlice, SlicedPacket, TransportSlice};

/// An ICMP error about a TCP or UDP packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IcmpError {
    pub source: Ipv4Addr,
    pub destination: Ipv4Addr,
    pub ttl: u8,
    /// ICMP type and code.
    pub kind: (u8, u8),
    /// Whether its IP and ICMP checksums, and the quoted IP header's, are right.
    pub checksums_right: bool,
    /// The quoted packet's addresses and ports.
    pub quoted_source: SocketAddrV4,
    pub quoted_destination: SocketAddrV4,
}

impl IcmpError {
    /// Nothing where the frame holds something else.
    pub fn parse(frame: &[u8]) -> Option<Self> {
        let packet = SlicedPacket::from_ethernet(frame).ok()?;
        let (Some(NetSlice::Ipv4(ip)), Some(TransportSlice::Icmpv4(icmp))) = (packet.net, packet.transport)
        else {
            return None;
        };
        let (outer, kind) = (ip.header(), (icmp.type_u8(), icmp.code_u8()));
        if ![3, 11, 12].contains(&kind.0) {
            return None;
        }
        let quoted = Ipv4HeaderSlice::from_slice(icmp.payload()).ok()?;
        let ports = icmp.payload().get(quoted.slice().len()..)?.first_chunk::<4>()?;
        let port = |at: usize| u16::from_be_bytes([ports[at], ports[at + 1]]);
        let checksums_right = outer.to_header().calc_header_checksum() == outer.header_checksum()
            && quoted.to_header().calc_header_checksum() == quoted.header_checksum()
            && is_right(&icmp);
        Some(Self {
            source: outer.source_addr(),
            destination: outer.destination_addr(),
            ttl: outer.ttl(),
            kind,
            checksums_right,
            quoted_source: SocketAddrV4::new(quoted.source_addr(), port(0)),
            quoted_destination: SocketAddrV4::new(quoted.destination_addr(), port(2)),
        })
    }
}

fn is_right(icmp: &Icmpv4Slice<'_>) -> bool {
    icmp.icmp_type().calc_checksum(icmp.payload()) == icmp.checksum()
}
