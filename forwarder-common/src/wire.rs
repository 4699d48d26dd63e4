//! Where things stand in the headers that the core reads, in bytes from the start of each header.
//!
//! Layouts come from `network-types`; here are the offsets and the few bits that it does not name.

use core::mem::offset_of;

use network_types::{
    eth::EthHdr,
    icmp::Icmpv4Hdr,
    ip::{Ipv4Hdr, Ipv6Hdr},
    tcp::TcpHdr,
    udp::UdpHdr,
};

pub mod ethernet {
    use super::*;

    pub const LEN: usize = EthHdr::LEN;
    pub const TYPE: usize = offset_of!(EthHdr, ether_type);
    /// EtherTypes as they lie in memory.
    pub const TYPE_IPV4: u16 = 0x0800_u16.to_be();
    pub const TYPE_IPV6: u16 = 0x86dd_u16.to_be();
    pub const TYPE_VLAN: u16 = 0x8100_u16.to_be();
    pub const TYPE_QINQ: u16 = 0x88a8_u16.to_be();
}

pub mod ipv4 {
    use super::*;

    pub const MIN_LEN: usize = Ipv4Hdr::LEN;
    /// With all the options that fit.
    pub const MAX_LEN: usize = 60;
    pub const TTL: usize = offset_of!(Ipv4Hdr, ttl);
    pub const CHECKSUM: usize = offset_of!(Ipv4Hdr, check);
    pub const SRC: usize = offset_of!(Ipv4Hdr, src_addr);

    /// "Don't fragment", in the flags and offset word.
    pub const DF: u16 = 0x4000;
    /// "More fragments", in the same word.
    pub const MF: u16 = 0x2000;
    /// The offset in units of eight bytes, in the same word.
    pub const OFFSET: u16 = 0x1fff;
}

pub mod ipv6 {
    use super::*;

    pub const LEN: usize = Ipv6Hdr::LEN;
    /// With the extension headers that are looked through.
    pub const MAX_LEN: usize = 248;
    pub const HOP_LIMIT: usize = offset_of!(Ipv6Hdr, hop_limit);
    pub const SRC: usize = offset_of!(Ipv6Hdr, src_addr);
    pub const DST: usize = offset_of!(Ipv6Hdr, dst_addr);

    /// Extension headers (RFC 8200 section 4) by their protocol numbers.
    pub const HOP_BY_HOP: u8 = 0;
    pub const ROUTING: u8 = 43;
    pub const FRAGMENT: u8 = 44;
    pub const DESTINATION_OPTIONS: u8 = 60;

    /// "More fragments", in the fragment header's offset word.
    pub const MF: u16 = 0x0001;
    /// The offset in bytes, in the same word.
    pub const OFFSET: u16 = 0xfff8;
}

/// ICMP of both families: the header has the same shape (RFC 792, RFC 4443).
pub mod icmp {
    use super::*;

    pub const LEN: usize = size_of::<Icmpv4Hdr>();
    pub const CHECKSUM: usize = offset_of!(Icmpv4Hdr, check);

    /// Of IPv4.
    pub const NUMBER: u8 = 1;
    pub const DESTINATION_UNREACHABLE: u8 = 3;
    pub const TIME_EXCEEDED: u8 = 11;
    pub const PARAMETER_PROBLEM: u8 = 12;

    /// Of IPv6.
    pub const NUMBER_V6: u8 = 58;
    /// Destination unreachable, packet too big, time exceeded, parameter problem.
    pub const ERRORS_V6: core::ops::RangeInclusive<u8> = 1..=4;
}

pub mod tcp {
    use super::*;

    pub const NUMBER: u8 = 6;
    pub const MIN_LEN: usize = TcpHdr::LEN;
    pub const CHECKSUM: usize = offset_of!(TcpHdr, check);
}

pub mod udp {
    use super::*;

    pub const NUMBER: u8 = 17;
    pub const LEN: usize = UdpHdr::LEN;
    pub const CHECKSUM: usize = offset_of!(UdpHdr, check);
}
