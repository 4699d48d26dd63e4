//! What IPv4 and IPv6 do each in their own way; everything else of the core is written once.

mod v4;
mod v6;

use crate::{
    address::Address,
    checksum::Delta,
    flow::Tuple,
    icmp::Quote,
    packet::{OutOfBounds, Packet},
    parse::Datagram,
    reason::Reason,
};

/// An address's protocol: how its header is read and written.
pub trait Family: Address {
    /// As it lies in memory.
    const ETHER_TYPE: u16;
    /// IP protocol number of its ICMP.
    const ICMP: u8;
    /// Whether the checksum of its ICMP covers the addresses too (RFC 4443 section 2.3).
    const ICMP_COVERS_ADDRESSES: bool;
    /// The bits that the length of its header can have, so that a length that was kept in memory has a
    /// bound again that the verifier sees.
    const HEADER_LEN_MASK: u32;
    /// Whether all fragments of a packet name the same protocol (RFC 791; not so RFC 8200 section 4.5).
    const FRAGMENTS_SHARE_PROTOCOL: bool;

    /// Reads a packet behind the Ethernet header, its ports and its TCP or UDP header. The error is why
    /// the core has no say in it. `whole`: fragments are not wanted here.
    fn parse<P: Packet>(packet: &mut P, whole: bool, datagram: &mut Datagram<Self>) -> Result<(), Reason>;

    /// Whether it is a header that may stand in front of TCP and UDP. A later fragment may name one: it is
    /// in the first then.
    fn is_extension(protocol: u8) -> bool;

    /// Whether an ICMP message of this type quotes a packet that had a problem.
    fn is_error(kind: u8) -> bool;

    /// Reads the IP header at `at` that an ICMP error quotes, of which `room` bytes are there: addresses,
    /// protocol, length of the header and its checksum.
    fn read_quoted<P: Packet>(
        packet: &P,
        at: usize,
        room: u32,
        quote: &mut Quote<Self>,
    ) -> Result<(), Reason>;

    /// Writes addresses and TTL (hop limit). `addresses`: what the first change in a checksum.
    fn write_header<P: Packet>(
        packet: &mut P,
        datagram: &Datagram<Self>,
        to: &Tuple<Self>,
        ttl: u8,
        addresses: Delta,
    ) -> Result<(), OutOfBounds>;

    /// Writes the addresses of the quoted IP header at `at`. Returns what that changes in a sum over it.
    fn write_quoted<P: Packet>(
        packet: &mut P,
        at: usize,
        quote: &Quote<Self>,
        addresses: Delta,
    ) -> Result<Delta, OutOfBounds>;
}
