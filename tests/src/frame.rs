//! Frames to send, and what can be said about frames that came.

use std::fmt;
use std::net::{Ipv4Addr, SocketAddrV4};

use etherparse::{
    EtherType, Ethernet2Header, IpDscp, IpEcn, IpNumber, Ipv4Header, Ipv4Options, LinkSlice, NetSlice,
    SlicedPacket, TcpHeader, TransportSlice, UdpHeader,
};

/// An Ethernet frame with an IPv4 packet in it. Every field is open; [`Frame::udp`] and [`Frame::tcp`]
/// fill in what an ordinary sender would.
#[derive(Clone, Debug)]
pub struct Frame {
    /// None: the sending interface's.
    pub source_mac: Option<[u8; 6]>,
    /// None: the gateway's.
    pub destination_mac: Option<[u8; 6]>,
    /// The control word of an 802.1Q tag.
    pub vlan: Option<u16>,
    pub source: SocketAddrV4,
    pub destination: SocketAddrV4,
    pub ttl: u8,
    pub dscp: u8,
    pub ecn: u8,
    pub id: u16,
    pub dont_fragment: bool,
    pub more_fragments: bool,
    /// In units of eight bytes.
    pub fragment_offset: u16,
    /// Whole words of IP options.
    pub options: Vec<u8>,
    /// UDP if absent.
    pub tcp: Option<TcpFields>,
    pub payload: Vec<u8>,
    /// None: the right one.
    pub checksum: Option<u16>,
    /// Bytes behind the IP packet.
    pub trailer: Vec<u8>,
}

/// What a TCP header says apart from ports, options and checksum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TcpFields {
    /// As on the wire: [`TcpFields::SYN`] and so on.
    pub flags: u8,
    pub sequence: u32,
    pub acknowledgment: u32,
    pub window: u16,
}

impl TcpFields {
    pub const FIN: u8 = 0x01;
    pub const SYN: u8 = 0x02;
    pub const RST: u8 = 0x04;
    pub const PSH: u8 = 0x08;
    pub const ACK: u8 = 0x10;

    pub fn new(flags: u8, sequence: u32, acknowledgment: u32) -> Self {
        Self { flags, sequence, acknowledgment, window: 64240 }
    }
}

impl Frame {
    /// A datagram between two `address:port`.
    pub fn udp(source: &str, destination: &str, payload: &[u8]) -> Self {
        Self {
            source_mac: None,
            destination_mac: None,
            vlan: None,
            source: endpoint(source),
            destination: endpoint(destination),
            ttl: 64,
            dscp: 0,
            ecn: 0,
            id: 0x1234,
            dont_fragment: true,
            more_fragments: false,
            fragment_offset: 0,
            options: Vec::new(),
            tcp: None,
            payload: payload.to_vec(),
            checksum: None,
            trailer: Vec::new(),
        }
    }

    /// A TCP segment between two `address:port`.
    pub fn tcp(source: &str, destination: &str, tcp: TcpFields, payload: &[u8]) -> Self {
        Self { tcp: Some(tcp), ..Self::udp(source, destination, payload) }
    }

    /// Where the IP header begins.
    pub fn ip_offset(&self) -> usize {
        if self.vlan.is_some() { 18 } else { 14 }
    }

    /// Where the TCP or UDP header begins.
    pub fn l4_offset(&self) -> usize {
        self.ip_offset() + 20 + self.options.len()
    }

    /// The frame as it goes out, with these hardware addresses where it names none itself.
    ///
    /// # Panics
    /// Where a field holds what its place in the header cannot.
    pub fn bytes(&self, source_mac: [u8; 6], destination_mac: [u8; 6]) -> Vec<u8> {
        const PLACE: &str = "a frame field does not fit its place in the header";
        let l4 = self.l4();
        let mut ip = Ipv4Header::new(
            0,
            self.ttl,
            self.ip_number(),
            self.source.ip().octets(),
            self.destination.ip().octets(),
        )
        .expect(PLACE);
        ip.options = Ipv4Options::try_from(self.options.as_slice()).expect(PLACE);
        ip.set_payload_len(l4.len()).expect(PLACE);
        ip.dscp = IpDscp::try_new(self.dscp).expect(PLACE);
        ip.ecn = IpEcn::try_new(self.ecn).expect(PLACE);
        ip.identification = self.id;
        ip.dont_fragment = self.dont_fragment;
        ip.more_fragments = self.more_fragments;
        ip.fragment_offset = self.fragment_offset.try_into().expect(PLACE);
        ip.header_checksum = ip.calc_header_checksum();

        let ethernet = Ethernet2Header {
            source: self.source_mac.unwrap_or(source_mac),
            destination: self.destination_mac.unwrap_or(destination_mac),
            ether_type: if self.vlan.is_some() { EtherType::VLAN_TAGGED_FRAME } else { EtherType::IPV4 },
        };
        let mut frame = ethernet.to_bytes().to_vec();
        if let Some(tag) = self.vlan {
            frame.extend(tag.to_be_bytes());
            frame.extend(EtherType::IPV4.0.to_be_bytes());
        }
        frame.extend(ip.to_bytes());
        frame.extend(l4);
        frame.extend(&self.trailer);
        frame
    }

    fn ip_number(&self) -> IpNumber {
        if self.tcp.is_some() { IpNumber::TCP } else { IpNumber::UDP }
    }

    fn l4(&self) -> Vec<u8> {
        const LENGTH: &str = "the payload is too long for a packet";
        let (source, destination) = (self.source.port(), self.destination.port());
        let addresses = (self.source.ip().octets(), self.destination.ip().octets());
        let mut bytes = match self.tcp {
            Some(tcp) => {
                let mut header = TcpHeader::new(source, destination, tcp.sequence, tcp.window);
                header.acknowledgment_number = tcp.acknowledgment;
                header.fin = tcp.flags & TcpFields::FIN != 0;
                header.syn = tcp.flags & TcpFields::SYN != 0;
                header.rst = tcp.flags & TcpFields::RST != 0;
                header.psh = tcp.flags & TcpFields::PSH != 0;
                header.ack = tcp.flags & TcpFields::ACK != 0;
                let right =
                    header.calc_checksum_ipv4_raw(addresses.0, addresses.1, &self.payload).expect(LENGTH);
                header.checksum = self.checksum.unwrap_or(right);
                header.to_bytes().to_vec()
            }
            None => {
                let mut header =
                    UdpHeader::without_ipv4_checksum(source, destination, self.payload.len()).expect(LENGTH);
                let right =
                    header.calc_checksum_ipv4_raw(addresses.0, addresses.1, &self.payload).expect(LENGTH);
                header.checksum = self.checksum.unwrap_or(right);
                header.to_bytes().to_vec()
            }
        };
        bytes.extend(&self.payload);
        bytes
    }
}

/// An IPv4 packet with TCP or UDP that came in a frame.
#[derive(Clone, Debug)]
pub struct Packet {
    pub source_mac: [u8; 6],
    pub destination_mac: [u8; 6],
    pub source: SocketAddrV4,
    pub destination: SocketAddrV4,
    pub ttl: u8,
    pub dscp: u8,
    pub ecn: u8,
    pub id: u16,
    /// The IP header's options, as they came.
    pub options: Vec<u8>,
    /// UDP if absent.
    pub tcp: Option<TcpFields>,
    pub payload: Vec<u8>,
    /// The TCP or UDP checksum, as it came.
    pub checksum: u16,
    /// What that checksum should be: of UDP never 0.
    pub right_checksum: u16,
    pub ip_checksum_right: bool,
}

impl Packet {
    /// None where the frame holds no whole TCP or UDP packet of IPv4. Bytes behind it do not matter.
    pub fn parse(frame: &[u8]) -> Option<Self> {
        let sliced = SlicedPacket::from_ethernet(frame).ok()?;
        let Some(LinkSlice::Ethernet2(ethernet)) = sliced.link else { return None };
        let Some(NetSlice::Ipv4(ip)) = sliced.net else { return None };
        let header = ip.header().to_header();
        let addresses = (header.source, header.destination);
        let (ports, tcp, payload, checksum, right_checksum) = match sliced.transport? {
            TransportSlice::Tcp(tcp) => {
                let header = tcp.to_header();
                let flags = [
                    (header.fin, TcpFields::FIN),
                    (header.syn, TcpFields::SYN),
                    (header.rst, TcpFields::RST),
                    (header.psh, TcpFields::PSH),
                    (header.ack, TcpFields::ACK),
                ];
                let fields = TcpFields {
                    flags: flags.iter().filter(|(set, _)| *set).map(|(_, flag)| flag).sum(),
                    sequence: header.sequence_number,
                    acknowledgment: header.acknowledgment_number,
                    window: header.window_size,
                };
                let right = header.calc_checksum_ipv4_raw(addresses.0, addresses.1, tcp.payload()).ok()?;
                let ports = (header.source_port, header.destination_port);
                (ports, Some(fields), tcp.payload(), header.checksum, right)
            }
            TransportSlice::Udp(udp) => {
                let header = udp.to_header();
                let right = header.calc_checksum_ipv4_raw(addresses.0, addresses.1, udp.payload()).ok()?;
                ((header.source_port, header.destination_port), None, udp.payload(), header.checksum, right)
            }
            _ => return None,
        };
        Some(Self {
            source_mac: ethernet.source(),
            destination_mac: ethernet.destination(),
            source: SocketAddrV4::new(Ipv4Addr::from(addresses.0), ports.0),
            destination: SocketAddrV4::new(Ipv4Addr::from(addresses.1), ports.1),
            ttl: header.time_to_live,
            dscp: header.dscp.value(),
            ecn: header.ecn.value(),
            id: header.identification,
            ip_checksum_right: header.header_checksum == header.calc_header_checksum(),
            options: header.options.to_vec(),
            tcp,
            payload: payload.to_vec(),
            checksum,
            right_checksum,
        })
    }

    /// Both checksums are as they should be (a UDP checksum of 0 is none at all).
    pub fn checksums_right(&self) -> bool {
        let none = self.tcp.is_none() && self.checksum == 0;
        self.ip_checksum_right && (none || self.checksum == self.right_checksum)
    }

    /// Whether a TCP segment has just these flags.
    pub fn has_flags(&self, flags: u8) -> bool {
        self.tcp.is_some_and(|tcp| tcp.flags == flags)
    }
}

impl fmt::Display for Packet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let protocol = if self.tcp.is_some() { "tcp" } else { "udp" };
        write!(f, "{protocol} {} -> {}, {} bytes", self.source, self.destination, self.payload.len())?;
        if let Some(tcp) = self.tcp {
            write!(f, ", flags {:#04x} seq {} ack {}", tcp.flags, tcp.sequence, tcp.acknowledgment)?;
        }
        if !self.checksums_right() {
            write!(f, ", wrong checksum")?;
        }
        Ok(())
    }
}

fn endpoint(text: &str) -> SocketAddrV4 {
    text.parse().unwrap_or_else(|_| panic!("not an IPv4 address and port: {text}"))
}
