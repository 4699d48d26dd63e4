//! Where things stand in the headers that the core reads, in bytes from the start of each header.
//!
//! Layouts come from `network-types`; here are the offsets and the few bits that it does not name.

use core::mem::offset_of;

use network_types::{eth::EthHdr, ip::Ipv4Hdr, tcp::TcpHdr, udp::UdpHdr};

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
    pub const TTL: usize = offset_of!(Ipv4Hdr, ttl);
    pub const SRC: usize = offset_of!(Ipv4Hdr, src_addr);

    /// "Don't fragment", in the flags and offset word.
    pub const DF: u16 = 0x4000;
    /// "More fragments" and the offset, in the same word.
    pub const MF_OR_OFFSET: u16 = 0x3fff;
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
