//! IPv6: what holds for a packet holds for its twin in the other family, and what only IPv6 has.

#![allow(clippy::unwrap_used, reason = "clippy knows the test functions, but not their helpers")]

mod common;

use common::*;
use etherparse::{NetSlice, SlicedPacket, TransportSlice};
use forwarder_common::{
    address::{Address, Ipv4, Ipv6},
    flow::{Flow, Side},
    layout::Hook,
    model::{
        Tables, original,
        scenario::{
            CLIENT, ErrorSpec, FrameSpec, IPV6_SLOTS, NOWHERE, OTHER_CLIENT, OTHER_SERVER, SERVER, W,
            fragmented, tcp_flags::*,
        },
        twin,
    },
    pipeline::Outcome,
    reason::{Reason, Verdict},
    wire::{ipv6, tcp, udp},
};
use proptest::prelude::*;

/// What is said of a frame in either family.
#[derive(Debug, PartialEq)]
struct Told {
    macs: Vec<u8>,
    src: ([u8; 4], u16),
    dst: ([u8; 4], u16),
    ttl: u8,
    l4: Vec<u8>,
}

/// The right checksum of a segment.
type Sum = Box<dyn Fn(&TransportSlice<'_>) -> u16>;

/// Reads a TCP or UDP packet of either family by etherparse, which also sums it.
fn told(frame: &[u8]) -> Told {
    let packet = SlicedPacket::from_ethernet(frame).unwrap();
    let (src, dst, ttl, sum): (_, _, _, Sum) = match packet.net.unwrap() {
        NetSlice::Ipv4(ip) => {
            let header = ip.header().to_header();
            let (src, dst) = (header.source, header.destination);
            let sum = move |l4: &TransportSlice<'_>| match l4 {
                TransportSlice::Tcp(tcp) => tcp.calc_checksum_ipv4(src, dst).unwrap(),
                TransportSlice::Udp(udp) => {
                    udp.to_header().calc_checksum_ipv4_raw(src, dst, udp.payload()).unwrap()
                }
                other => panic!("{other:?}"),
            };
            (src, dst, header.time_to_live, Box::new(sum))
        }
        NetSlice::Ipv6(ip) => {
            let header = ip.header().to_header();
            let (src, dst) = (header.source, header.destination);
            let sum = move |l4: &TransportSlice<'_>| match l4 {
                TransportSlice::Tcp(tcp) => {
                    tcp.to_header().calc_checksum_ipv6_raw(src, dst, tcp.payload()).unwrap()
                }
                TransportSlice::Udp(udp) => {
                    udp.to_header().calc_checksum_ipv6_raw(src, dst, udp.payload()).unwrap()
                }
                other => panic!("{other:?}"),
            };
            assert_eq!((twin(original(Ipv6::new(src))), twin(original(Ipv6::new(dst)))), (src, dst));
            (original(Ipv6::new(src)), original(Ipv6::new(dst)), header.hop_limit, Box::new(sum))
        }
        other => panic!("{other:?}"),
    };
    let l4 = packet.transport.unwrap();
    let (ports, checksum, mut bytes) = match &l4 {
        TransportSlice::Tcp(tcp) => {
            ((tcp.source_port(), tcp.destination_port()), tcp.checksum(), tcp.slice().to_vec())
        }
        TransportSlice::Udp(udp) => {
            ((udp.source_port(), udp.destination_port()), udp.checksum(), udp.slice().to_vec())
        }
        other => panic!("{other:?}"),
    };
    assert_eq!(checksum, sum(&l4), "{frame:02x?}");
    let at = if matches!(l4, TransportSlice::Tcp(_)) { 16 } else { 6 };
    bytes[at..at + 2].fill(0);
    Told { macs: frame[..12].to_vec(), src: (src, ports.0), dst: (dst, ports.1), ttl, l4: bytes }
}

/// The entries of both tables, in words that are the same for both families.
fn entries<A: Address>(tables: &Tables<A>, first_slot: u32) -> Vec<String> {
    let entry = |stage: &str, key: String, flow: &Flow<A>| {
        let to = flow.to;
        let rule = flow.rule - first_slot;
        format!(
            "{stage} {key} to {:?}:{} {:?}:{} rule {rule} {:?} {} {} {} {:x} {:x} {:x}",
            original(to.src),
            to.src_port.number(),
            original(to.dst),
            to.dst_port.number(),
            flow.hop,
            flow.direction,
            flow.progress,
            flow.ended,
            flow.flags,
            flow.seq_end,
            flow.ack,
        )
    };
    let mut entries = Vec::new();
    for (stage, table) in [("established", &tables.established), ("half-open", &tables.half_open)] {
        entries.extend(table.iter().map(|(key, flow)| {
            let tuple = key.tuple;
            let key = format!(
                "{} {} {:?}:{} {:?}:{}",
                key.side,
                key.protocol,
                original(tuple.src),
                tuple.src_port.number(),
                original(tuple.dst),
                tuple.dst_port.number(),
            );
            entry(stage, key, flow)
        }));
    }
    entries.sort();
    entries
}

/// A packet that has a twin.
#[derive(Clone, Debug)]
struct Step {
    hook: usize,
    side: bool,
    client: bool,
    port: usize,
    protocol: bool,
    flags: u8,
    ack: bool,
    payload: Vec<u8>,
    ttl: u8,
    kind: usize,
}

fn step() -> impl Strategy<Value = Step> {
    let flags = prop::sample::select(vec![SYN, SYN, ACK, ACK, SYN | ACK, FIN | ACK, RST]);
    (
        (0..3_usize, any::<bool>(), prop::bool::weighted(0.9), 0..4_usize, any::<bool>(), flags),
        (
            any::<bool>(),
            prop::collection::vec(any::<u8>(), 0..40),
            prop::sample::select(vec![64, 64, 64, 2, 1]),
            0..6_usize,
        ),
    )
        .prop_map(|((hook, side, client, port, protocol, flags), (ack, payload, ttl, kind))| Step {
            hook,
            side,
            client,
            port,
            protocol,
            flags,
            ack,
            payload,
            ttl,
            kind,
        })
}

impl Step {
    fn hook(&self) -> Hook {
        if self.side { Hook::ALL[self.hook % 2] } else { Hook::ALL[self.hook] }
    }

    fn side(&self) -> Side {
        if self.side { Side::External } else { Side::Internal }
    }

    fn spec(&self, rig: &Rig, ipv6: bool) -> FrameSpec {
        let protocol = if self.protocol { tcp::NUMBER } else { udp::NUMBER };
        let (w_port, server) = [
            (8080, if self.protocol { (SERVER, 80) } else { (OTHER_SERVER, 81) }),
            (10_007, (SERVER, 20_007)),
            (2222, (SERVER, 22)),
            (9, (SERVER, 9)),
        ][self.port];
        let client = (if self.client { CLIENT } else { OTHER_CLIENT }, CLIENT_PORT);
        let spec = if self.side {
            FrameSpec::inward(&rig.router, protocol, client, w_port)
        } else {
            FrameSpec::outward(&rig.router, protocol, server, client)
        };
        let seq = if self.side { 1000 } else { SERVER_SEQ } + u32::from(self.flags & SYN == 0);
        let ack = if self.side { SERVER_SEQ + 1 } else { 1001 };
        FrameSpec {
            ipv6: ipv6.then(Vec::new),
            flags: self.flags,
            seq,
            ack: if self.ack { ack } else { 77 },
            payload: self.payload.clone(),
            ttl: self.ttl,
            ..spec
        }
    }

    fn frame(&self, rig: &Rig, ipv6: bool) -> Vec<u8> {
        let spec = self.spec(rig, ipv6);
        match self.kind {
            0 => {
                // About a packet of the other direction.
                let about = Step { side: !self.side, ..self.clone() }.spec(rig, ipv6);
                let about = match self.side {
                    // What the server sent as the client saw it, and the other way round.
                    true => FrameSpec { src: (W, spec.dst.1), dst: spec.src, ..about },
                    false => FrameSpec { src: spec.dst, dst: spec.src, ..about },
                };
                let quote = &about.bytes()[14..];
                let hop = if self.side { NOWHERE } else { [10, 9, 9, 9] };
                let mut error = ErrorSpec::new(&rig.router, self.side(), hop, about.src.0, quote);
                (error.ipv6, error.ttl) = (ipv6, self.ttl);
                error.kind = if ipv6 { (2, 0) } else { (3, 4) };
                error.bytes()
            }
            1 | 2 => fragmented(&spec.bytes(), 24).swap_remove(0),
            3 => fragmented(&spec.bytes(), 8).pop().unwrap(),
            _ => spec.bytes(),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// IPv4 is the oracle: it has tests for everything.
    #[test]
    fn a_packet_and_its_twin_fare_alike(steps in prop::collection::vec(step(), 1..25)) {
        let (mut rig, mut rig6) = (Rig::new(), Rig::new());
        for step in steps {
            let (hook, side) = (step.hook(), step.side());
            let frame = step.frame(&rig, false);
            let taken = rig.take(hook, side, &frame);
            let frame6 = step.frame(&rig6, true);
            let taken6 = rig6.take(hook, side, &frame6);
            prop_assert_eq!(taken.reason, taken6.reason, "{:?}", step);
            match (taken.outcome, taken6.outcome) {
                (
                    Outcome::RedirectNeighbour { ifindex, next_hop },
                    Outcome::RedirectNeighbour { ifindex: ifindex6, next_hop: next_hop6 },
                ) => {
                    prop_assert_eq!((ifindex, twin(original(next_hop))), (ifindex6, next_hop6.bytes()));
                }
                (outcome, outcome6) => prop_assert_eq!(outcome, outcome6),
            }
            if step.kind > 3 && taken.reason.map(Reason::verdict) == Some(Verdict::Forward) {
                prop_assert_eq!(told(&taken.bytes), told(&taken6.bytes));
            }
            prop_assert_eq!(entries(&rig.flows, 0), entries(&rig6.flows_ipv6, IPV6_SLOTS));
        }
        prop_assert!(rig.flows_ipv6.half_open.is_empty() && rig6.flows.half_open.is_empty());
    }
}

/// The client's packet to W:8080 over IPv6, with these extension headers.
fn client(rig: &Rig, protocol: u8, extensions: &[u8]) -> FrameSpec {
    FrameSpec { ipv6: Some(extensions.to_vec()), ..rig.client(protocol) }
}

#[test]
fn extension_headers_move_the_ports() {
    let all = [ipv6::HOP_BY_HOP, ipv6::DESTINATION_OPTIONS, ipv6::ROUTING, ipv6::DESTINATION_OPTIONS];
    for count in 1..=all.len() {
        for protocol in [tcp::NUMBER, udp::NUMBER] {
            for hook in INGRESS {
                let mut rig = Rig::new();
                let sent = client(&rig, protocol, &all[..count]).bytes();
                let taken = rig.take(hook, Side::External, &sent);
                let (before, after) = (told(&sent), told(&taken.bytes));
                assert_eq!((after.src, after.l4[4..].to_vec()), (before.src, before.l4[4..].to_vec()));
                let server = if protocol == tcp::NUMBER { (SERVER, 80) } else { (OTHER_SERVER, 81) };
                assert_eq!((after.dst, after.ttl), (server, before.ttl - 1));
                // Extension headers, traffic class, flow label and length are as they were.
                assert_eq!(sent[54..54 + 8 * count], taken.bytes[54..54 + 8 * count]);
                assert_eq!(sent[14..21], taken.bytes[14..21]);
            }
        }
    }
}

#[test]
fn chains_that_are_not_looked_through_are_left_to_the_host() {
    let too_many = [ipv6::DESTINATION_OPTIONS; 7];
    for hook in INGRESS {
        let mut rig = Rig::new();
        let frame = client(&rig, tcp::NUMBER, &too_many).bytes();
        assert_eq!(rig.take(hook, Side::External, &frame).reason, Some(Reason::ExtensionHeaders));

        let mut onward = client(&rig, tcp::NUMBER, &[ipv6::ROUTING]).bytes();
        onward[54 + 3] = 1;
        assert_eq!(rig.take(hook, Side::External, &onward).reason, Some(Reason::ExtensionHeaders));

        let authenticated = client(&rig, tcp::NUMBER, &[51]).bytes();
        assert_eq!(rig.take(hook, Side::External, &authenticated).reason, Some(Reason::OtherProtocol));

        // A length beyond the packet, and one beyond what is looked through.
        for units in [7, 255] {
            let mut long = client(&rig, tcp::NUMBER, &[ipv6::HOP_BY_HOP]).bytes();
            long[54 + 1] = units;
            let reason = rig.take(hook, Side::External, &long).reason.unwrap();
            assert!(matches!(reason, Reason::CutOff | Reason::ExtensionHeaders), "{reason:?}");
        }
    }
}

/// Both ways, with the quoted packet cut anywhere behind its ports, bit for bit.
#[test]
fn an_error_quotes_the_packet_as_its_sender_knows_it() {
    for protocol in [tcp::NUMBER, udp::NUMBER] {
        let mut rig = Rig::new();
        let payload = b"some payload".to_vec();
        let syn = FrameSpec { flags: SYN, seq: 1000, ..client(&rig, protocol, &[]) };
        rig.take(Hook::TcIngress, Side::External, &syn.bytes());
        let server = FrameSpec {
            ipv6: Some(Vec::new()),
            flags: SYN | ACK,
            ack: 1001,
            payload,
            ..rig.server(protocol)
        };
        for (side, spec) in [(Side::External, syn), (Side::Internal, server)] {
            let sent = spec.bytes();
            let arrived = rig.take(Hook::TcIngress, side, &sent).bytes;
            let mut as_sent = sent[14..].to_vec();
            as_sent[7] -= 1;
            for length in [44, 48, 60, as_sent.len()] {
                let length = length.min(as_sent.len());
                let (back, hop, to, told, dst) = match side {
                    Side::External => (Side::Internal, [10, 9, 9, 9], CLIENT, W, CLIENT),
                    Side::Internal => (Side::External, NOWHERE, W, NOWHERE, spec.src.0),
                };
                let error = ErrorSpec::new(&rig.router, back, hop, to, &arrived[14..14 + length]);
                let error = ErrorSpec { ipv6: true, kind: (2, 0), ..error };
                let quote = as_sent[..length].to_vec();
                let expected = ErrorSpec { src: told, dst, ttl: 63, quote, ..error.clone() };
                let taken = rig.take(Hook::TcIngress, back, &error.bytes());
                assert_eq!(taken.bytes[14..], expected.bytes()[14..], "{side:?} {length}");

                let mut wrong = error.bytes();
                wrong[14 + 40 + 2] ^= 1;
                let taken = rig.take(Hook::TcIngress, back, &wrong);
                assert_eq!(taken.reason, Some(Reason::BadIcmpChecksum));
            }
        }
    }
}

#[test]
fn an_ipv4_flow_is_no_ipv6_flow() {
    let mut rig = Rig::new();
    rig.establish(Hook::TcIngress, udp::NUMBER);
    let reply = FrameSpec { ipv6: Some(Vec::new()), ..rig.server(udp::NUMBER) };
    assert_eq!(rig.take(Hook::TcIngress, Side::Internal, &reply.bytes()).reason, Some(Reason::NoMatch));
}

#[test]
fn fragments_put_together_are_the_translated_packet() {
    let mut rig = Rig::new();
    let payload: Vec<u8> = (0..200).collect();
    let whole = FrameSpec { payload, ..client(&rig, udp::NUMBER, &[ipv6::DESTINATION_OPTIONS]) }.bytes();
    let expected = Rig::new().take(Hook::TcIngress, Side::External, &whole).bytes;
    let mut joined = Vec::new();
    for piece in fragmented(&whole, 64) {
        let taken = rig.take(Hook::TcIngress, Side::External, &piece);
        assert_eq!(taken.reason.map(Reason::verdict), Some(Verdict::Forward), "{taken:?}");
        // Ethernet, IPv6, destination options, fragment header.
        joined.extend_from_slice(&taken.bytes[14 + 40 + 8 + 8..]);
        assert_eq!(taken.bytes[38..54], expected[38..54]);
    }
    assert_eq!(joined, expected[14 + 40 + 8..]);
}

#[test]
fn a_fragment_of_a_fragment_goes_nowhere() {
    let mut rig = Rig::new();
    let frame = client(&rig, udp::NUMBER, &[ipv6::FRAGMENT, ipv6::FRAGMENT]).bytes();
    let taken = rig.take(Hook::TcIngress, Side::External, &frame);
    assert_eq!(taken.reason, Some(Reason::ExtensionHeaders));
}

#[test]
fn a_packet_whose_length_is_not_said_is_no_business_of_ours() {
    for hook in INGRESS {
        let mut rig = Rig::new();
        for length in [0, 0xffff_u16] {
            let mut frame = client(&rig, tcp::NUMBER, &[]).bytes();
            frame[18..20].copy_from_slice(&length.to_be_bytes());
            assert_eq!(rig.take(hook, Side::External, &frame).reason, Some(Reason::BadIpLength));
        }
    }
}

#[test]
fn neighbour_discovery_and_other_icmp_is_the_hosts() {
    for hook in INGRESS {
        let mut rig = Rig::new();
        for kind in [128, 129, 133, 134, 135, 136, 137] {
            let mut error = ErrorSpec::new(&rig.router, Side::External, CLIENT, W, &[0; 60]);
            (error.ipv6, error.kind) = (true, (kind, 0));
            assert_eq!(rig.take(hook, Side::External, &error.bytes()).reason, Some(Reason::OtherProtocol));
        }
    }
}

#[test]
fn link_local_sources_open_nothing() {
    for hook in INGRESS {
        let mut rig = Rig::new();
        let mut frame = client(&rig, udp::NUMBER, &[]).bytes();
        frame[22..38].copy_from_slice(&[0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9]);
        assert_eq!(rig.take(hook, Side::External, &frame).reason, Some(Reason::Spoofed));
    }
}

#[test]
fn an_ipv4_route_may_lead_to_an_ipv6_gateway() {
    use forwarder_common::tables::Route;
    let mut rig = Rig::new();
    let gateway = Ipv6::new(twin([10, 0, 0, 254]));
    rig.machine
        .routes
        .insert(0, (SERVER, 32, Route::Unresolved { ifindex: rig.router.lan.0, next_hop: gateway }));
    let taken = rig.take(Hook::TcIngress, Side::External, &rig.client(tcp::NUMBER).bytes());
    assert_eq!(taken.outcome, Outcome::RedirectNeighbour { ifindex: rig.router.lan.0, next_hop: gateway });
    assert_eq!(Ipv4::from_mapped(gateway), None);
}

/// Row 16: tunnels of the router itself.
#[test]
fn fragments_of_other_protocols_are_not_held() {
    let mut rig = Rig::new();
    let payload = vec![7; 100];
    let frame = FrameSpec { payload, ..client(&rig, udp::NUMBER, &[]) }.bytes();
    for (at, mut piece) in fragmented(&frame, 40).into_iter().enumerate().rev() {
        // Next header, in the fragment header.
        piece[54] = 50;
        let taken = rig.take(Hook::TcIngress, Side::External, &piece);
        assert_eq!(taken.reason, Some(Reason::OtherProtocol), "piece {at}");
    }
}
