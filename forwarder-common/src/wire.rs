//! Where things stand in the headers that the core reads, in bytes from the start of each header.
//!
//! Layouts come from `network-types`; here are the offsets and the few bits that it does not name.

use core::mem::offset_of;

use network_types::{eth::EthHdr, icmp::Icmpv4Hdr, ip::Ipv4Hdr, tcp::TcpHdr, udp::UdpHdr};

pub mod ethernet {
    use super::*;

    pub const LEN: usize = EthHdr::LEN;
    pub const TYPE: usize = offset_of!(EthHdr, ether_type);
    /// EtherTypes as they lie in memory.
    pub const TYPE_IPV4: u16 = 0x0800_u16.to_be();
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

pub mod icmp {
    use super::*;

    pub const NUMBER: u8 = 1;
    pub const LEN: usize = size_of::<Icmpv4Hdr>();
    pub const CHECKSUM: usize = offset_of!(Icmpv4Hdr, check);

    pub const DESTINATION_UNREACHABLE: u8 = 3;
    pub const TIME_EXCEEDED: u8 = 11;
    pub const PARAMETER_PROBLEM: u8 = 12;

    /// ICMP header, quoted IP header, ports.
    pub const SHORTEST_QUOTE: usize = LEN + super::ipv4::MIN_LEN + 4;
    /// How far into a frame the core reads: both IP headers with all their options, and a quoted
    /// TCP header up to its checksum.
    pub const FARTHEST: usize =
        super::ethernet::LEN + super::ipv4::MAX_LEN + LEN + super::ipv4::MAX_LEN + super::tcp::CHECKSUM + 2;
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
