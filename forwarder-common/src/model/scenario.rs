//! One router with rules of every kind, and frames that meet them: what properties are checked on,
//! and what the programs in the kernel are compared on.

use std::{vec, vec::Vec};

use super::{Machine, twin};
use crate::{
    address::{Address as _, Ipv4, Ipv6, Macs},
    checksum,
    flow::{Hop, Side},
    layout::{EXTERNAL, Interface, OWN, TARGET, XDP_TARGET},
    reason::Reason,
    rule::{ACTIVE, DMZ, HAIRPIN, LIMITED, ONE_TARGET_PORT, PAGE_PORTS, Page, PageKey, Rule, VIA_STACK},
    tables::Route,
    wire::{icmp, ipv4, ipv6, tcp, udp},
};

pub const W: [u8; 4] = [203, 0, 113, 1];
/// The router's address on the inside.
pub const GATEWAY: [u8; 4] = [10, 0, 0, 1];
pub const CLIENT: [u8; 4] = [203, 0, 113, 2];
pub const OTHER_CLIENT: [u8; 4] = [203, 0, 113, 3];
pub const SERVER: [u8; 4] = [10, 0, 0, 10];
pub const OTHER_SERVER: [u8; 4] = [10, 0, 0, 11];
/// On the link, but its MAC is not known.
pub const SILENT_SERVER: [u8; 4] = [10, 0, 0, 20];
pub const NOWHERE: [u8; 4] = [198, 18, 0, 1];
pub const ON_THE_OUTSIDE: [u8; 4] = [203, 0, 113, 77];

/// MACs of the neighbours.
pub const CLIENT_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];
pub const SERVER_MAC: [u8; 6] = [2, 0, 0, 0, 0, 10];

pub const TCP: &[u8] = &[tcp::NUMBER];
pub const UDP: &[u8] = &[udp::NUMBER];
pub const BOTH: &[u8] = &[tcp::NUMBER, udp::NUMBER];

/// A rule of the scenario.
#[derive(Clone, Copy, Debug)]
pub struct RuleSpec {
    pub protocols: &'static [u8],
    pub ports: (u16, u16),
    pub target: [u8; 4],
    pub target_ports: (u16, u16),
    pub allow_list: u32,
    pub expired: bool,
    pub hairpin: bool,
    /// Sessions at once, of one source, new ones a second; 0: no limit.
    pub limits: (u32, u32, u32),
    pub dmz: bool,
    pub via_stack: bool,
}

const fn rule(
    protocols: &'static [u8],
    ports: (u16, u16),
    target: [u8; 4],
    target_ports: (u16, u16),
) -> RuleSpec {
    RuleSpec {
        protocols,
        ports,
        target,
        target_ports,
        allow_list: 0,
        expired: false,
        hairpin: false,
        limits: (0, 0, 0),
        dmz: false,
        via_stack: false,
    }
}

/// Ports of a rule that takes two sessions at once, one of each source.
pub const LIMITED_PORTS: (u16, u16) = (7004, 7005);
/// Port of a rule that takes one new session a second.
pub const SLOW_PORT: u16 = 7010;
/// Ports of a rule that yields to the host's sockets; it has one on the second.
pub const DMZ_PORTS: (u16, u16) = (7020, 7021);

/// Port of a rule via the host's stack.
pub const STACK_PORT: u16 = 7030;

/// By slot.
pub const RULES: &[RuleSpec] = &[
    rule(TCP, (8080, 8080), SERVER, (80, 80)),
    rule(UDP, (8080, 8080), OTHER_SERVER, (81, 81)),
    RuleSpec { hairpin: true, ..rule(BOTH, (10_000, 10_100), SERVER, (20_000, 20_100)) },
    rule(TCP, (9000, 9010), SERVER, (9999, 9999)),
    RuleSpec { allow_list: 1, ..rule(BOTH, (2222, 2222), SERVER, (22, 22)) },
    rule(BOTH, (7000, 7000), SILENT_SERVER, (7000, 7000)),
    rule(BOTH, (7001, 7001), NOWHERE, (7001, 7001)),
    rule(BOTH, (7002, 7002), ON_THE_OUTSIDE, (7002, 7002)),
    RuleSpec { expired: true, ..rule(BOTH, (7003, 7003), SERVER, (7003, 7003)) },
    rule(BOTH, (1, 1), SERVER, (1, 1)),
    rule(BOTH, (65_535, 65_535), SERVER, (65_535, 65_535)),
    RuleSpec { limits: (2, 1, 0), ..rule(BOTH, LIMITED_PORTS, SERVER, LIMITED_PORTS) },
    RuleSpec { limits: (0, 0, 1), ..rule(BOTH, (SLOW_PORT, SLOW_PORT), SERVER, (SLOW_PORT, SLOW_PORT)) },
    RuleSpec { dmz: true, ..rule(BOTH, DMZ_PORTS, SERVER, DMZ_PORTS) },
    RuleSpec { via_stack: true, ..rule(BOTH, (STACK_PORT, STACK_PORT), SERVER, (STACK_PORT, STACK_PORT)) },
];

/// From here on the slots are those of the same rules in IPv6, from twin to twin.
pub const IPV6_SLOTS: u32 = RULES.len() as u32;

/// List, network, prefix length.
pub const ALLOWED: (u32, [u8; 4], u32) = (1, OTHER_CLIENT, 32);

/// The router's two interfaces.
#[derive(Clone, Copy, Debug)]
pub struct Router {
    pub wan: (u32, [u8; 6]),
    pub lan: (u32, [u8; 6]),
    /// `Interface::flags` of both.
    pub flags: u8,
}

impl Default for Router {
    fn default() -> Self {
        Self { wan: (2, [2, 1, 0, 0, 0, 1]), lan: (3, [2, 1, 0, 0, 0, 2]), flags: XDP_TARGET }
    }
}

impl Router {
    pub fn interface(&self, side: Side) -> (u32, [u8; 6]) {
        match side {
            Side::External => self.wan,
            Side::Internal => self.lan,
        }
    }

    /// The router with all its rules, and flows of epoch 7.
    pub fn machine(&self) -> Machine {
        let mut machine = Machine { now: 1_000_000_000_000, generation: 1, ..Machine::default() };
        for side in [Side::External, Side::Internal] {
            let (index, mac) = self.interface(side);
            let interface = Interface { mtu: 1500, mac, side: side as u8, flags: self.flags };
            machine.interfaces.insert(index, interface);
        }
        let via = |side, mac| Route::Known {
            hop: Hop {
                macs: Macs::new(mac, self.interface(side).1),
                ifindex: self.interface(side).0,
                mtu: 0,
                from_xdp: 0,
            },
            next_hop: Ipv6::default(),
        };
        let silent = |side| Route::Unresolved { ifindex: self.interface(side).0, next_hop: Ipv6::default() };
        machine.routes = vec![
            (SERVER, 32, via(Side::Internal, SERVER_MAC)),
            (OTHER_SERVER, 32, via(Side::Internal, SERVER_MAC)),
            (W, 32, Route::None(Reason::NoRoute)),
            (GATEWAY, 32, Route::None(Reason::NoRoute)),
            ([10, 0, 0, 0], 24, silent(Side::Internal)),
            (CLIENT, 32, via(Side::External, CLIENT_MAC)),
            ([203, 0, 113, 0], 24, silent(Side::External)),
        ];
        machine.allow = vec![ALLOWED];
        let roles = [(W, OWN | EXTERNAL), (GATEWAY, OWN)];
        machine.roles = roles.map(|(address, roles)| (Ipv4::new(address), roles)).into();
        machine.sockets = BOTH.iter().map(|protocol| (*protocol, DMZ_PORTS.1)).collect();
        let (w, w_twin) = (Ipv4::new(W).mapped(), Ipv6::new(twin(W)));
        for (slot, spec) in (0..).zip(RULES) {
            *machine.roles.entry(Ipv4::new(spec.target)).or_default() |= TARGET;
            let target = Ipv4::new(spec.target).mapped();
            let target_twin = Ipv6::new(twin(spec.target));
            for (slot, w, target) in [(slot, w, target), (slot + IPV6_SLOTS, w_twin, target_twin)] {
                machine.rules.insert(slot, spec.line(slot, target));
                for (key, at) in spec.places(w) {
                    machine.pages.entry(key).or_insert(Page::EMPTY).slots[at] = slot + 1;
                }
            }
        }
        machine
    }
}

impl RuleSpec {
    /// The rule's line in the kernel, of epoch 7, or of epochs of its own if it is limited.
    fn line(&self, slot: u32, target: Ipv6) -> Rule {
        let one = if self.target_ports.0 == self.target_ports.1 { ONE_TARGET_PORT } else { 0 };
        let dmz = if self.dmz { DMZ } else { 0 };
        let via = if self.via_stack { VIA_STACK } else { 0 };
        let limited = if self.limits == (0, 0, 0) { 0 } else { LIMITED };
        let (max_sessions, max_sessions_per_source, new_per_second) = self.limits;
        // Counts are by epoch: these must not meet.
        let (tcp_epoch, udp_epoch) = if limited == 0 { (7, 7) } else { (100 + slot, 200 + slot) };
        Rule {
            expires: if self.expired { 1 } else { u64::MAX },
            flags: ACTIVE | one | limited | dmz | via | if self.hairpin { HAIRPIN } else { 0 },
            tcp_epoch,
            udp_epoch,
            allow_list: self.allow_list,
            target,
            target_port: self.target_ports.0,
            external_port: self.ports.0,
            external_last: self.ports.1,
            max_sessions,
            max_sessions_per_source,
            new_per_second,
        }
    }

    /// Where its ports stand in the port map.
    fn places(&self, w: Ipv6) -> Vec<(PageKey, usize)> {
        let mut places = Vec::new();
        for &protocol in self.protocols {
            for port in self.ports.0..=self.ports.1 {
                places.push((PageKey::new(w, protocol, port), usize::from(port) % PAGE_PORTS));
            }
        }
        places
    }
}

/// A frame to be, right in every field unless one is set otherwise.
#[derive(Clone, Debug)]
pub struct FrameSpec {
    /// Over IPv6, between the twins of its addresses. Then these are its extension headers; what only
    /// IPv4 has is not said.
    pub ipv6: Option<Vec<u8>>,
    pub macs: ([u8; 6], [u8; 6]),
    pub src: ([u8; 4], u16),
    pub dst: ([u8; 4], u16),
    pub protocol: u8,
    pub ttl: u8,
    pub tos: u8,
    pub id: u16,
    pub dont_fragment: bool,
    /// Words of IP options (no-operation).
    pub option_words: usize,
    pub flags: u8,
    pub seq: u32,
    pub ack: u32,
    pub payload: Vec<u8>,
    /// Bytes behind the IP packet.
    pub padding: Vec<u8>,
    /// UDP without a checksum.
    pub without_checksum: bool,
}

impl FrameSpec {
    /// From the client to the router's external address.
    pub fn inward(router: &Router, protocol: u8, src: ([u8; 4], u16), port: u16) -> Self {
        Self {
            ipv6: None,
            macs: (router.wan.1, CLIENT_MAC),
            src,
            dst: (W, port),
            protocol,
            ttl: 64,
            tos: 0,
            id: 0x1234,
            dont_fragment: true,
            option_words: 0,
            flags: tcp_flags::SYN,
            seq: 1000,
            ack: 0,
            payload: Vec::new(),
            padding: Vec::new(),
            without_checksum: false,
        }
    }

    /// From a server to a client.
    pub fn outward(router: &Router, protocol: u8, src: ([u8; 4], u16), dst: ([u8; 4], u16)) -> Self {
        Self { macs: (router.lan.1, SERVER_MAC), src, dst, ..Self::inward(router, protocol, src, 0) }
    }

    pub fn bytes(&self) -> Vec<u8> {
        let (dst, src) = self.macs;
        let (ether_type, ip) = match &self.ipv6 {
            None => ([0x08, 0x00], self.ipv4_header()),
            Some(extensions) => ([0x86, 0xdd], self.ipv6_header(extensions)),
        };
        [&dst[..], &src[..], &ether_type, &ip, &self.transport(), &self.padding].concat()
    }

    fn ipv4_header(&self) -> Vec<u8> {
        let header_len = 20 + self.option_words * 4;
        let mut ip = vec![0; header_len];
        ip[0] = 0x40 | (header_len / 4) as u8;
        ip[1] = self.tos;
        ip[2..4].copy_from_slice(&((header_len + self.transport().len()) as u16).to_be_bytes());
        ip[4..6].copy_from_slice(&self.id.to_be_bytes());
        ip[6] = if self.dont_fragment { 0x40 } else { 0 };
        ip[8] = self.ttl;
        ip[9] = self.protocol;
        ip[12..16].copy_from_slice(&self.src.0);
        ip[16..20].copy_from_slice(&self.dst.0);
        ip[20..].fill(1);
        let sum = internet_checksum(&[&ip]);
        ip[10..12].copy_from_slice(&sum);
        ip
    }

    fn ipv6_header(&self, extensions: &[u8]) -> Vec<u8> {
        let next = |at: usize| extensions.get(at).copied().unwrap_or(self.protocol);
        let payload_len = extensions.len() * 8 + self.transport().len();
        let mut ip = ipv6_header(next(0), self.ttl, self.src.0, self.dst.0, payload_len);
        ip[0..2].copy_from_slice(&(0x6000 | u16::from(self.tos) << 4).to_be_bytes());
        for (at, extension) in extensions.iter().enumerate() {
            // Eight bytes each: options are all padding (PadN), a routing header has no station left.
            let has_options = matches!(*extension, ipv6::HOP_BY_HOP | ipv6::DESTINATION_OPTIONS);
            ip.extend([next(at + 1), 0]);
            ip.extend(if has_options { [1, 4, 0, 0, 0, 0] } else { [0; 6] });
        }
        ip
    }

    fn transport(&self) -> Vec<u8> {
        let mut l4 = Vec::new();
        l4.extend(self.src.1.to_be_bytes());
        l4.extend(self.dst.1.to_be_bytes());
        let checksum = if self.protocol == tcp::NUMBER {
            l4.extend(self.seq.to_be_bytes());
            l4.extend(self.ack.to_be_bytes());
            l4.extend([0x50, self.flags, 0x20, 0, 0, 0, 0, 0]);
            tcp::CHECKSUM
        } else {
            l4.extend((8 + self.payload.len() as u16).to_be_bytes());
            l4.extend([0, 0]);
            udp::CHECKSUM
        };
        l4.extend(&self.payload);
        let addresses = match self.ipv6 {
            None => [self.src.0, self.dst.0].concat(),
            Some(_) => [twin(self.src.0), twin(self.dst.0)].concat(),
        };
        let len = (l4.len() as u16).to_be_bytes();
        let mut sum = internet_checksum(&[&addresses, &[0, self.protocol], &len, &l4]);
        if self.protocol == udp::NUMBER && sum == [0, 0] {
            sum = [0xff, 0xff];
        }
        if self.protocol != udp::NUMBER || !self.without_checksum {
            l4[checksum..checksum + 2].copy_from_slice(&sum);
        }
        l4
    }
}

/// The fixed part, between the twins of the addresses.
fn ipv6_header(next: u8, hop_limit: u8, src: [u8; 4], dst: [u8; 4], payload_len: usize) -> Vec<u8> {
    let mut ip = vec![0x60, 0, 0, 0];
    ip.extend((payload_len as u16).to_be_bytes());
    ip.extend([next, hop_limit]);
    ip.extend(twin(src));
    ip.extend(twin(dst));
    ip
}

/// An ICMP error about the IP packet that `quote` begins with.
#[derive(Clone, Debug)]
pub struct ErrorSpec {
    /// Over IPv6, between the twins of its addresses.
    pub ipv6: bool,
    pub macs: ([u8; 6], [u8; 6]),
    pub src: [u8; 4],
    pub dst: [u8; 4],
    pub ttl: u8,
    /// ICMP type and code.
    pub kind: (u8, u8),
    /// The second word of the ICMP header: of frag-needed, the MTU.
    pub rest: [u8; 4],
    pub quote: Vec<u8>,
}

impl ErrorSpec {
    /// Destination unreachable, fragmentation needed, sent by `src` on a side of the router.
    pub fn new(router: &Router, side: Side, src: [u8; 4], dst: [u8; 4], quote: &[u8]) -> Self {
        let neighbour = if side == Side::External { CLIENT_MAC } else { SERVER_MAC };
        let macs = (router.interface(side).1, neighbour);
        let (ipv6, rest) = (false, [0, 0, 5, 0]);
        Self { ipv6, macs, src, dst, ttl: 64, kind: (3, 4), rest, quote: quote.to_vec() }
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut icmp = vec![self.kind.0, self.kind.1, 0, 0];
        icmp.extend(self.rest);
        icmp.extend(&self.quote);
        if self.ipv6 {
            let ip = ipv6_header(icmp::NUMBER_V6, self.ttl, self.src, self.dst, icmp.len());
            let len = (icmp.len() as u32).to_be_bytes();
            let sum = internet_checksum(&[&ip[8..40], &len, &[0, icmp::NUMBER_V6], &icmp]);
            icmp[2..4].copy_from_slice(&sum);
            return [&self.macs.0[..], &self.macs.1[..], &[0x86, 0xdd], &ip, &icmp].concat();
        }
        let sum = internet_checksum(&[&icmp]);
        icmp[2..4].copy_from_slice(&sum);
        let mut ip = vec![0x45, 0, 0, 0, 0, 0, 0, 0, self.ttl, icmp::NUMBER, 0, 0];
        ip[2..4].copy_from_slice(&((20 + icmp.len()) as u16).to_be_bytes());
        ip.extend(self.src);
        ip.extend(self.dst);
        let sum = internet_checksum(&[&ip]);
        ip[10..12].copy_from_slice(&sum);
        [&self.macs.0[..], &self.macs.1[..], &[8, 0], &ip, &icmp].concat()
    }
}

/// A frame's IP packet in fragments of this much payload, a multiple of eight bytes.
pub fn fragmented(frame: &[u8], length: usize) -> Vec<Vec<u8>> {
    if frame[12..14] == [0x86, 0xdd] {
        return ipv6_fragmented(frame, length);
    }
    let header_len = usize::from(frame[14] & 0x0f) * 4;
    let packet_len = usize::from(u16::from_be_bytes([frame[16], frame[17]]));
    let (header, payload) = frame[14..14 + packet_len].split_at(header_len);
    let pieces = payload.chunks(length).enumerate();
    let last = payload.len().div_ceil(length) - 1;
    let piece = |(at, piece): (usize, &[u8])| {
        let mut ip = header.to_vec();
        ip[2..4].copy_from_slice(&((header_len + piece.len()) as u16).to_be_bytes());
        let more = if at == last { 0 } else { ipv4::MF };
        ip[6..8].copy_from_slice(&(more | (at * length / 8) as u16).to_be_bytes());
        ip[10..12].fill(0);
        let sum = internet_checksum(&[&ip]);
        ip[10..12].copy_from_slice(&sum);
        [&frame[..14], &ip, piece].concat()
    };
    pieces.map(piece).collect()
}

/// All extension headers of the frame's packet are repeated in each fragment.
fn ipv6_fragmented(frame: &[u8], length: usize) -> Vec<Vec<u8>> {
    let packet_len = 40 + usize::from(u16::from_be_bytes([frame[18], frame[19]]));
    let packet = &frame[14..14 + packet_len];
    let (mut next_at, mut header_len) = (6, 40);
    while matches!(packet[next_at], ipv6::HOP_BY_HOP | ipv6::ROUTING | ipv6::DESTINATION_OPTIONS) {
        (next_at, header_len) = (header_len, header_len + (usize::from(packet[header_len + 1]) + 1) * 8);
    }
    let (header, payload) = packet.split_at(header_len);
    let last = payload.len().div_ceil(length) - 1;
    let piece = |(at, piece): (usize, &[u8])| {
        let mut ip = header.to_vec();
        let next = std::mem::replace(&mut ip[next_at], ipv6::FRAGMENT);
        ip[4..6].copy_from_slice(&((header_len - 40 + 8 + piece.len()) as u16).to_be_bytes());
        let more = if at == last { 0 } else { ipv6::MF };
        ip.extend([next, 0]);
        ip.extend(((at * length) as u16 | more).to_be_bytes());
        // IPv6 fragments share no protocol: packets of two have two identifications.
        ip.extend((0x00c0_ff00 | u32::from(next)).to_be_bytes());
        [&frame[..14], &ip, piece].concat()
    };
    payload.chunks(length).enumerate().map(piece).collect()
}

/// TCP's flag bits.
pub mod tcp_flags {
    pub use crate::tcp::{ACK, FIN, RST, SYN};
}

/// The checksum over parts, of which all but the last have an even length.
pub fn internet_checksum(parts: &[&[u8]]) -> [u8; 2] {
    let words = parts.iter().flat_map(|part| part.chunks(2));
    let sum: u32 =
        words.map(|word| u32::from(u16::from_ne_bytes([word[0], *word.get(1).unwrap_or(&0)]))).sum();
    (!checksum::fold(sum)).to_ne_bytes()
}
