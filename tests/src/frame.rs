//! Frames to send, and what can be said about frames that came.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use etherparse::{
    EtherType, Ethernet2Header, IpDscp, IpEcn, IpNumber, Ipv4Header, Ipv4Options, Ipv6Header, LinkSlice,
    NetSlice, SlicedPacket, TcpHeader, TcpSlice, TransportSlice, UdpHeader, UdpSlice,
};

/// An Ethernet frame with an IP packet in it. Every field is open; [`Frame::udp`] and [`Frame::tcp`]
/// fill in what an ordinary sender would.
#[derive(Clone, Debug)]
pub struct Frame {
    /// None: the sending interface's.
    pub source_mac: Option<[u8; 6]>,
    /// None: the gateway's.
    pub destination_mac: Option<[u8; 6]>,
    /// The control word of an 802.1Q tag.
    pub vlan: Option<u16>,
    /// Both are of one family, which is the packet's.
    pub source: SocketAddr,
    pub destination: SocketAddr,
    /// IPv6: the hop limit.
    pub ttl: u8,
    pub dscp: u8,
    pub ecn: u8,
    /// IPv6: the flow label, and the identification of fragments.
    pub id: u16,
    /// IPv4 only: of IPv6 it always holds.
    pub dont_fragment: bool,
    /// Whole words of IPv4 options.
    pub options: Vec<u8>,
    /// Extension headers of IPv6, in this order.
    pub extensions: Vec<Extension>,
    /// UDP if absent.
    pub tcp: Option<TcpFields>,
    pub payload: Vec<u8>,
    /// None: the right one.
    pub checksum: Option<u16>,
    /// Bytes behind the IP packet.
    pub trailer: Vec<u8>,
}

/// An extension header of IPv6.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extension {
    /// What the header before it calls it.
    pub number: u8,
    /// All of it behind the number of the next header.
    pub body: Vec<u8>,
}

impl Extension {
    /// Hop-by-hop options of so many bytes in all, a multiple of eight.
    pub fn hop_by_hop(length: u8) -> Self {
        Self { number: 0, body: options(length) }
    }

    /// Destination options likewise.
    pub fn destination_options(length: u8) -> Self {
        Self { number: 60, body: options(length) }
    }

    /// A routing header that names one address and so many that are still to be visited.
    pub fn routing(segments_left: u8) -> Self {
        const TYPE: u8 = 2;
        let mut body = vec![2, TYPE, segments_left, 0, 0, 0, 0];
        body.extend([0x20, 1, 0x0d, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x99]);
        Self { number: 43, body }
    }

    /// An authentication header with 12 bytes of proof that is none.
    pub fn authentication() -> Self {
        const WORDS_LESS_TWO: u8 = 4;
        let mut body = vec![0; 23];
        body[0] = WORDS_LESS_TWO;
        body[6] = 1;
        Self { number: 51, body }
    }

    /// A fragment header; the offset is in bytes.
    pub fn fragment(id: u32, offset: u16, more: bool) -> Self {
        let mut body = vec![0];
        body.extend((offset | u16::from(more)).to_be_bytes());
        body.extend(id.to_be_bytes());
        Self { number: 44, body }
    }
}

/// The body of an options header: one option for experiments, which who does not know it skips (RFC 4727).
fn options(length: u8) -> Vec<u8> {
    const SKIPPED_IF_UNKNOWN: u8 = 0x1e;
    let mut body = vec![0; usize::from(length) - 1];
    body[..3].copy_from_slice(&[length / 8 - 1, SKIPPED_IF_UNKNOWN, length - 4]);
    body
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
            options: Vec::new(),
            extensions: Vec::new(),
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
        let fixed = if self.source.is_ipv4() { 20 } else { 40 };
        self.ip_offset() + fixed + self.between().len()
    }

    /// What stands between the fixed IP header and TCP or UDP.
    pub fn between(&self) -> Vec<u8> {
        match self.source {
            SocketAddr::V4(_) => self.options.clone(),
            SocketAddr::V6(_) => chain(&self.extensions, self.ip_number()).1,
        }
    }

    /// The frame as it goes out, with these hardware addresses where it names none itself.
    ///
    /// # Panics
    /// Where a field holds what its place in the header cannot.
    pub fn bytes(&self, source_mac: [u8; 6], destination_mac: [u8; 6]) -> Vec<u8> {
        self.around(self.ip_packet(&self.l4(), None), source_mac, destination_mac)
    }

    /// The packet in fragments that carry `length` bytes of it each, a multiple of eight, and the last the rest.
    pub fn fragments(&self, source_mac: [u8; 6], destination_mac: [u8; 6], length: u16) -> Vec<Vec<u8>> {
        let l4 = self.l4();
        let parts = l4.chunks(length.into());
        let last = parts.len() - 1;
        let fragment = |(at, part): (usize, &[u8])| {
            let offset = u16::try_from(at).expect(PLACE) * length;
            self.around(self.ip_packet(part, Some((offset, at != last))), source_mac, destination_mac)
        };
        parts.enumerate().map(fragment).collect()
    }

    fn around(&self, packet: Vec<u8>, source_mac: [u8; 6], destination_mac: [u8; 6]) -> Vec<u8> {
        let inner = if self.source.is_ipv4() { EtherType::IPV4 } else { EtherType::IPV6 };
        let ethernet = Ethernet2Header {
            source: self.source_mac.unwrap_or(source_mac),
            destination: self.destination_mac.unwrap_or(destination_mac),
            ether_type: if self.vlan.is_some() { EtherType::VLAN_TAGGED_FRAME } else { inner },
        };
        let mut frame = ethernet.to_bytes().to_vec();
        if let Some(tag) = self.vlan {
            frame.extend(tag.to_be_bytes());
            frame.extend(inner.0.to_be_bytes());
        }
        frame.extend(packet);
        frame.extend(&self.trailer);
        frame
    }

    /// The packet with this part of what is behind its headers: `place` is a fragment's offset in bytes, and
    /// whether more follow.
    fn ip_packet(&self, part: &[u8], place: Option<(u16, bool)>) -> Vec<u8> {
        let header = match (self.source, self.destination) {
            (SocketAddr::V4(source), SocketAddr::V4(destination)) => {
                self.ipv4_header(*source.ip(), *destination.ip(), part.len(), place)
            }
            (SocketAddr::V6(source), SocketAddr::V6(destination)) => {
                self.ipv6_headers(*source.ip(), *destination.ip(), part.len(), place)
            }
            _ => panic!("{} and {} are not of one family", self.source, self.destination),
        };
        [header.as_slice(), part].concat()
    }

    fn ipv4_header(
        &self,
        source: Ipv4Addr,
        destination: Ipv4Addr,
        length: usize,
        place: Option<(u16, bool)>,
    ) -> Vec<u8> {
        let mut ip = Ipv4Header::new(0, self.ttl, self.ip_number(), source.octets(), destination.octets())
            .expect(PLACE);
        ip.options = Ipv4Options::try_from(self.options.as_slice()).expect(PLACE);
        ip.set_payload_len(length).expect(PLACE);
        ip.dscp = IpDscp::try_new(self.dscp).expect(PLACE);
        ip.ecn = IpEcn::try_new(self.ecn).expect(PLACE);
        ip.identification = self.id;
        let (offset, more) = place.unwrap_or_default();
        ip.dont_fragment = self.dont_fragment && place.is_none();
        ip.more_fragments = more;
        ip.fragment_offset = (offset / 8).try_into().expect(PLACE);
        ip.header_checksum = ip.calc_header_checksum();
        ip.to_bytes().to_vec()
    }

    fn ipv6_headers(
        &self,
        source: Ipv6Addr,
        destination: Ipv6Addr,
        length: usize,
        place: Option<(u16, bool)>,
    ) -> Vec<u8> {
        let mut extensions = self.extensions.clone();
        extensions.extend(place.map(|(offset, more)| Extension::fragment(self.id.into(), offset, more)));
        let (first, extensions) = chain(&extensions, self.ip_number());
        let mut ip = Ipv6Header {
            flow_label: u32::from(self.id).try_into().expect(PLACE),
            next_header: first,
            hop_limit: self.ttl,
            source: source.octets(),
            destination: destination.octets(),
            ..Ipv6Header::default()
        };
        ip.set_dscp(IpDscp::try_new(self.dscp).expect(PLACE));
        ip.set_ecn(IpEcn::try_new(self.ecn).expect(PLACE));
        ip.set_payload_length(extensions.len() + length).expect(PLACE);
        [ip.to_bytes().as_slice(), &extensions].concat()
    }

    fn ip_number(&self) -> IpNumber {
        if self.tcp.is_some() { IpNumber::TCP } else { IpNumber::UDP }
    }

    fn l4(&self) -> Vec<u8> {
        let (source, destination) = (self.source.port(), self.destination.port());
        let mut bytes = match self.tcp {
            Some(tcp) => {
                let mut header = TcpHeader::new(source, destination, tcp.sequence, tcp.window);
                header.acknowledgment_number = tcp.acknowledgment;
                header.fin = tcp.flags & TcpFields::FIN != 0;
                header.syn = tcp.flags & TcpFields::SYN != 0;
                header.rst = tcp.flags & TcpFields::RST != 0;
                header.psh = tcp.flags & TcpFields::PSH != 0;
                header.ack = tcp.flags & TcpFields::ACK != 0;
                header.checksum = self
                    .checksum
                    .unwrap_or_else(|| right_tcp(&header, self.source, self.destination, &self.payload));
                header.to_bytes().to_vec()
            }
            None => {
                let mut header =
                    UdpHeader::without_ipv4_checksum(source, destination, self.payload.len()).expect(LENGTH);
                header.checksum = self
                    .checksum
                    .unwrap_or_else(|| right_udp(&header, self.source, self.destination, &self.payload));
                header.to_bytes().to_vec()
            }
        };
        bytes.extend(&self.payload);
        bytes
    }
}

const PLACE: &str = "a frame field does not fit its place in the header";
const LENGTH: &str = "the payload is too long for a packet";

/// The number of the first header, and all of them, each with the number of the next.
fn chain(extensions: &[Extension], last: IpNumber) -> (IpNumber, Vec<u8>) {
    let numbers = extensions.iter().map(|extension| extension.number).chain([last.0]);
    let bytes = extensions.iter().zip(numbers.clone().skip(1));
    let bytes = bytes.flat_map(|(extension, next)| [&[next], extension.body.as_slice()].concat()).collect();
    (IpNumber(numbers.take(1).sum()), bytes)
}

fn right_tcp(header: &TcpHeader, source: SocketAddr, destination: SocketAddr, payload: &[u8]) -> u16 {
    match (source.ip(), destination.ip()) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            header.calc_checksum_ipv4_raw(source.octets(), destination.octets(), payload)
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            header.calc_checksum_ipv6_raw(source.octets(), destination.octets(), payload)
        }
        _ => panic!("{source} and {destination} are not of one family"),
    }
    .expect(LENGTH)
}

fn right_udp(header: &UdpHeader, source: SocketAddr, destination: SocketAddr, payload: &[u8]) -> u16 {
    match (source.ip(), destination.ip()) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            header.calc_checksum_ipv4_raw(source.octets(), destination.octets(), payload)
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            header.calc_checksum_ipv6_raw(source.octets(), destination.octets(), payload)
        }
        _ => panic!("{source} and {destination} are not of one family"),
    }
    .expect(LENGTH)
}

/// An IP packet with TCP or UDP that came in a frame.
#[derive(Clone, Debug)]
pub struct Packet {
    pub source_mac: [u8; 6],
    pub destination_mac: [u8; 6],
    pub source: SocketAddr,
    pub destination: SocketAddr,
    /// IPv6: the hop limit.
    pub ttl: u8,
    pub dscp: u8,
    pub ecn: u8,
    /// IPv6: the lower bits of the flow label.
    pub id: u16,
    /// What stood between the fixed IP header and TCP or UDP.
    pub between: Vec<u8>,
    /// UDP if absent.
    pub tcp: Option<TcpFields>,
    pub payload: Vec<u8>,
    /// The TCP or UDP checksum, as it came.
    pub checksum: u16,
    /// What that checksum should be: of UDP never 0.
    pub right_checksum: u16,
    /// Of IPv6, which has none, always.
    pub ip_checksum_right: bool,
}

impl Packet {
    /// None where the frame holds no whole TCP or UDP packet. Bytes behind it do not matter.
    pub fn parse(frame: &[u8]) -> Option<Self> {
        let sliced = SlicedPacket::from_ethernet(frame).ok()?;
        let Some(LinkSlice::Ethernet2(ethernet)) = sliced.link else { return None };
        let mut packet = match sliced.net? {
            NetSlice::Ipv4(ip) => Self::of_ipv4(&ip.header().to_header()),
            NetSlice::Ipv6(ip) => Self::of_ipv6(&ip.header().to_header(), ip.extensions().slice()),
            _ => return None,
        };
        match sliced.transport? {
            TransportSlice::Tcp(tcp) => packet.take_tcp(&tcp),
            TransportSlice::Udp(udp) => packet.take_udp(&udp),
            _ => return None,
        }
        packet.source_mac = ethernet.source();
        packet.destination_mac = ethernet.destination();
        Some(packet)
    }

    fn of_ipv4(header: &Ipv4Header) -> Self {
        Self {
            dscp: header.dscp.value(),
            ecn: header.ecn.value(),
            id: header.identification,
            ip_checksum_right: header.header_checksum == header.calc_header_checksum(),
            between: header.options.to_vec(),
            ..Self::bare(header.source.into(), header.destination.into(), header.time_to_live)
        }
    }

    fn of_ipv6(header: &Ipv6Header, extensions: &[u8]) -> Self {
        Self {
            dscp: header.dscp().value(),
            ecn: header.ecn().value(),
            id: header.flow_label.value() as u16,
            between: extensions.to_vec(),
            ..Self::bare(header.source.into(), header.destination.into(), header.hop_limit)
        }
    }

    fn bare(source: IpAddr, destination: IpAddr, ttl: u8) -> Self {
        Self {
            source_mac: [0; 6],
            destination_mac: [0; 6],
            source: SocketAddr::new(source, 0),
            destination: SocketAddr::new(destination, 0),
            ttl,
            dscp: 0,
            ecn: 0,
            id: 0,
            between: Vec::new(),
            tcp: None,
            payload: Vec::new(),
            checksum: 0,
            right_checksum: 0,
            ip_checksum_right: true,
        }
    }

    fn take_tcp(&mut self, tcp: &TcpSlice) {
        let header = tcp.to_header();
        let flags = [
            (header.fin, TcpFields::FIN),
            (header.syn, TcpFields::SYN),
            (header.rst, TcpFields::RST),
            (header.psh, TcpFields::PSH),
            (header.ack, TcpFields::ACK),
        ];
        self.tcp = Some(TcpFields {
            flags: flags.iter().filter(|(set, _)| *set).map(|(_, flag)| flag).sum(),
            sequence: header.sequence_number,
            acknowledgment: header.acknowledgment_number,
            window: header.window_size,
        });
        self.source.set_port(header.source_port);
        self.destination.set_port(header.destination_port);
        self.payload = tcp.payload().to_vec();
        self.checksum = header.checksum;
        self.right_checksum = right_tcp(&header, self.source, self.destination, tcp.payload());
    }

    fn take_udp(&mut self, udp: &UdpSlice) {
        let header = udp.to_header();
        self.source.set_port(header.source_port);
        self.destination.set_port(header.destination_port);
        self.payload = udp.payload().to_vec();
        self.checksum = header.checksum;
        self.right_checksum = right_udp(&header, self.source, self.destination, udp.payload());
    }

    /// Both checksums are as they should be (over IPv4, a UDP checksum of 0 is none at all).
    pub fn checksums_right(&self) -> bool {
        let none = self.tcp.is_none() && self.checksum == 0 && self.source.is_ipv4();
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

fn endpoint(text: &str) -> SocketAddr {
    text.parse().unwrap_or_else(|_| panic!("not an address and port: {text}"))
}
