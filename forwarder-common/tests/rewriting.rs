//! What a translated packet's bytes are. The oracle is etherparse: it parses, and it computes every
//! checksum in full, where the core only adjusts them.

#![allow(clippy::unwrap_used, reason = "clippy knows the test functions, but not their helpers")]

mod common;

use common::*;
use etherparse::{NetSlice, SlicedPacket, TransportSlice, checksum::Sum16BitWords};
use forwarder_common::{
    address::{Address as _, Ipv4},
    flow::Side,
    layout::Hook,
    model::scenario::{
        CLIENT, CLIENT_MAC, FrameSpec, OTHER_CLIENT, Router, SERVER, SERVER_MAC, W, fragmented,
        internet_checksum, tcp_flags::*,
    },
    pipeline::Outcome,
    reason::{Reason, Verdict},
    wire::{tcp, udp},
};
use proptest::prelude::*;

type Endpoint = ([u8; 4], u16);

const IP: usize = 14;

fn l4(frame: &[u8]) -> usize {
    IP + usize::from(frame[IP] & 0x0f) * 4
}

fn is_tcp(frame: &[u8]) -> bool {
    frame[IP + 9] == tcp::NUMBER
}

fn l4_checksum_at(frame: &[u8]) -> usize {
    l4(frame) + if is_tcp(frame) { 16 } else { 6 }
}

fn l4_checksum(frame: &[u8]) -> u16 {
    let at = l4_checksum_at(frame);
    u16::from_be_bytes([frame[at], frame[at + 1]])
}

fn set(frame: &mut [u8], at: usize, bytes: &[u8]) {
    frame[at..at + bytes.len()].copy_from_slice(bytes);
}

/// The right checksums of IP and of L4 (UDP's 0 as 0xffff).
fn full_checksums(frame: &[u8]) -> (u16, u16) {
    let packet = SlicedPacket::from_ethernet(frame).unwrap();
    let Some(NetSlice::Ipv4(ip)) = packet.net else { panic!("not IPv4: {packet:?}") };
    let header = ip.header().to_header();
    let l4 = match packet.transport {
        Some(TransportSlice::Tcp(tcp)) => tcp.calc_checksum_ipv4(header.source, header.destination),
        Some(TransportSlice::Udp(udp)) => {
            udp.to_header().calc_checksum_ipv4_raw(header.source, header.destination, udp.payload())
        }
        other => panic!("neither TCP nor UDP: {other:?}"),
    };
    (header.calc_header_checksum(), l4.unwrap())
}

/// Fills in both checksums.
fn seal(frame: &mut [u8]) {
    let (ip, l4) = full_checksums(frame);
    set(frame, IP + 10, &ip.to_be_bytes());
    set(frame, l4_checksum_at(frame), &l4.to_be_bytes());
}

/// A word of the segment that may be anything: TCP's urgent pointer, the first of UDP's payload.
fn free_word(frame: &[u8]) -> Option<usize> {
    let l4 = l4(frame);
    let udp_len = u16::from_be_bytes([frame[l4 + 4], frame[l4 + 5]]);
    if is_tcp(frame) { Some(l4 + 18) } else { (udp_len >= 10).then_some(l4 + 8) }
}

fn with_word(mut case: Case, at: usize, word: u16) -> Case {
    set(&mut case.frame, at, &word.to_be_bytes());
    seal(&mut case.frame);
    case
}

/// The ones' complement sum that is 0xffff where the L4 checksum is right, as a remainder: there 0.
fn l4_error(frame: &[u8]) -> u16 {
    let end = IP + usize::from(u16::from_be_bytes([frame[IP + 2], frame[IP + 3]]));
    let segment = &frame[l4(frame)..end];
    let sum = Sum16BitWords::new()
        .add_slice(&frame[IP + 12..IP + 20])
        .add_2bytes([0, frame[IP + 9]])
        .add_2bytes((segment.len() as u16).to_be_bytes())
        .add_slice(segment);
    sum.ones_complement().to_be() % 0xffff
}

/// `frame` as it has to be after its translation.
fn translated(frame: &[u8], src: Endpoint, dst: Endpoint, macs: Option<([u8; 6], [u8; 6])>) -> Vec<u8> {
    let mut expected = frame.to_vec();
    if let Some((dst, src)) = macs {
        set(&mut expected, 0, &[dst, src].concat());
    }
    expected[IP + 8] -= 1;
    set(&mut expected, IP + 12, &[src.0, dst.0].concat());
    set(&mut expected, l4(frame), &[src.1.to_be_bytes(), dst.1.to_be_bytes()].concat());
    seal(&mut expected);
    if !is_tcp(frame) && l4_checksum(frame) == 0 {
        set(&mut expected, l4_checksum_at(frame), &[0, 0]);
    }
    expected
}

/// A packet of a flow of the rule for ports 10000 to 10100, to 20000 to 20100 of the server.
#[derive(Clone, Debug)]
struct Case {
    hook: Hook,
    side: Side,
    /// Inwards: whether it is the flow's first packet.
    opens: bool,
    client: Endpoint,
    port: u16,
    frame: Vec<u8>,
}

impl Case {
    fn ends(&self) -> (Endpoint, Endpoint, Endpoint) {
        (self.client, (W, 10_000 + self.port), (SERVER, 20_000 + self.port))
    }

    fn spec(&self, protocol: u8) -> FrameSpec {
        let router = Router::default();
        let (client, outside, inside) = self.ends();
        match self.side {
            Side::External => FrameSpec::inward(&router, protocol, client, outside.1),
            Side::Internal => FrameSpec::outward(&router, protocol, inside, client),
        }
    }

    /// What it is, and what it should be, after its translation.
    fn translations(&self) -> (Vec<u8>, Vec<u8>) {
        let mut rig = Rig::new();
        let (client, outside, inside) = self.ends();
        if self.side == Side::Internal || !self.opens {
            let first = FrameSpec::inward(&rig.router, self.frame[IP + 9], client, outside.1);
            rig.take(self.hook, Side::External, &first.bytes());
        }
        let (wan, lan) = (rig.router.wan, rig.router.lan);
        let taken = rig.take(self.hook, self.side, &self.frame);
        match self.side {
            Side::External => {
                let macs = match taken.outcome {
                    // In TC the first packet makes the kernel see to the neighbour.
                    Outcome::RedirectNeighbour { ifindex, next_hop } if self.hook == Hook::TcIngress => {
                        assert_eq!(
                            (ifindex, next_hop, self.opens),
                            (lan.0, Ipv4::new(SERVER).mapped(), true)
                        );
                        None
                    }
                    Outcome::Redirect { ifindex } if ifindex == lan.0 => Some((SERVER_MAC, lan.1)),
                    other => panic!("{other:?}: {:?}", taken.reason),
                };
                (taken.bytes, translated(&self.frame, client, inside, macs))
            }
            Side::Internal => {
                assert_eq!(taken.outcome, Outcome::Redirect { ifindex: wan.0 });
                (taken.bytes, translated(&self.frame, outside, client, Some((CLIENT_MAC, wan.1))))
            }
        }
    }
}

fn clients() -> impl Strategy<Value = Endpoint> {
    let outside = |address: &[u8; 4]| !matches!(address[0], 0 | 10 | 127 | 224..) && *address != W;
    (any::<[u8; 4]>().prop_filter("not a client's", outside), any::<u16>())
}

fn words(most: usize) -> impl Strategy<Value = Vec<u8>> {
    (0..=most).prop_flat_map(|words| prop::collection::vec(any::<u8>(), words * 4))
}

fn bytes(most: usize) -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec(any::<u8>(), 0..=most)
}

/// Frames with every field that may differ from packet to packet at random, and right checksums.
fn cases(protocols: &'static [u8]) -> impl Strategy<Value = Case> {
    let ip = (2u8.., any::<u8>(), any::<u16>(), any::<bool>(), words(10));
    // Flags, and what stands before them: the reserved bits.
    let tcp = (any::<u32>(), any::<u32>(), any::<[u8; 2]>(), any::<[u8; 6]>(), words(10));
    let way = (
        prop::sample::select(&INGRESS[..]),
        prop::sample::select(&[Side::External, Side::Internal][..]),
        any::<bool>(),
        clients(),
        0u16..=100,
        prop::sample::select(protocols),
    );
    (way, ip, tcp, bytes(64), bytes(20), any::<bool>()).prop_map(
        |(way, (ttl, tos, id, dont_fragment, options), tcp, payload, padding, with_checksum)| {
            let (hook, side, opens, client, port, protocol) = way;
            let case = Case { hook, side, opens, client, port, frame: Vec::new() };
            let (seq, ack, [reserved, flags], rest, tcp_options) = tcp;
            let is_tcp = protocol == tcp::NUMBER;
            let payload = if is_tcp { [&tcp_options[..], &payload].concat() } else { payload };
            let option_words = options.len() / 4;
            let opening = side == Side::External && opens;
            let flags = if opening { flags & !(ACK | RST | FIN) | SYN } else { flags };
            let spec = case.spec(protocol);
            let spec = FrameSpec { ttl, tos, id, dont_fragment, option_words, seq, ack, flags, ..spec };
            let mut frame = FrameSpec { payload, padding, ..spec }.bytes();
            set(&mut frame, IP + 20, &options);
            let l4 = l4(&frame);
            if is_tcp {
                frame[l4 + 12] = ((5 + tcp_options.len() / 4) as u8) << 4 | reserved & 0x0f;
                // Window and urgent pointer; the checksum between them is filled in below.
                set(&mut frame, l4 + 14, &rest);
            }
            seal(&mut frame);
            if !is_tcp && !with_checksum {
                set(&mut frame, l4 + 6, &[0, 0]);
            }
            Case { frame, ..case }
        },
    )
}

proptest! {
    /// Rows 1, 2, 3, 4: nothing but tuple, TTL, MACs and checksums changes, and both checksums are
    /// what a full computation gives.
    #[test]
    fn a_translated_packet_differs_in_tuple_ttl_and_checksums_only(case in cases(&[tcp::NUMBER, udp::NUMBER])) {
        let (got, expected) = case.translations();
        prop_assert_eq!(got, expected);
    }

    /// Row 10.
    #[test]
    fn a_wrong_l4_checksum_stays_wrong_by_the_same_difference(
        mut case in cases(&[tcp::NUMBER, udp::NUMBER]),
        wrong in 1u16..,
    ) {
        let at = l4_checksum_at(&case.frame);
        set(&mut case.frame, at, &wrong.to_be_bytes());
        prop_assume!(l4_error(&case.frame) != 0);
        let (got, mut expected) = case.translations();
        prop_assert_eq!(l4_error(&got), l4_error(&case.frame));
        expected[at..at + 2].copy_from_slice(&got[at..at + 2]);
        prop_assert_eq!(got, expected);
    }

    /// Row 2: a word is chosen so that the sum comes out as 0, which only UDP has another use for.
    #[test]
    fn a_checksum_that_is_computed_as_0_goes_out_as_0xffff_in_udp_and_as_0_in_tcp(
        case in cases(&[tcp::NUMBER, udp::NUMBER]),
    ) {
        let Some(at) = free_word(&case.frame) else { return Err(TestCaseError::reject("no room")) };
        let case = with_word(case, at, 0);
        let (_, sealed) = case.translations();
        let case = with_word(case, at, l4_checksum(&sealed));
        let (got, expected) = case.translations();
        prop_assert_eq!(l4_checksum(&got), if is_tcp(&got) { 0 } else { 0xffff });
        prop_assert_eq!(got, expected);
    }

    /// Row 2: the same on the way in.
    #[test]
    fn a_checksum_that_was_computed_as_0_is_adjusted_rightly(case in cases(&[tcp::NUMBER, udp::NUMBER])) {
        let Some(at) = free_word(&case.frame) else { return Err(TestCaseError::reject("no room")) };
        let case = with_word(case, at, 0);
        let word = l4_checksum(&case.frame);
        let case = with_word(case, at, word);
        prop_assert_eq!(l4_checksum(&case.frame), if is_tcp(&case.frame) { 0 } else { 0xffff });
        let (got, expected) = case.translations();
        prop_assert_eq!(got, expected);
    }

    /// Row 4: a UDP datagram may end before its IP packet does; its checksum covers no more.
    #[test]
    fn what_lies_behind_the_udp_length_is_not_summed(mut case in cases(&[udp::NUMBER]), length in 8u16..) {
        let frame = &mut case.frame;
        let l4 = l4(frame);
        let l4_len = u16::from_be_bytes([frame[l4 + 4], frame[l4 + 5]]);
        set(frame, l4 + 4, &(8 + length % (l4_len - 7)).to_be_bytes());
        seal(frame);
        let (got, expected) = case.translations();
        prop_assert_eq!(got, expected);
    }

    /// Rows 1, 3.
    #[test]
    fn a_reply_has_as_its_source_what_the_client_dialled(case in cases(&[tcp::NUMBER, udp::NUMBER])) {
        let mut rig = Rig::new();
        let (client, outside, _) = case.ends();
        let protocol = case.frame[IP + 9];
        let request = FrameSpec::inward(&rig.router, protocol, client, outside.1);
        let inside = rig.take(case.hook, Side::External, &request.bytes()).bytes;
        // The server answers to whatever it sees.
        let endpoint = |frame: &[u8], address: usize, port: usize| {
            let port = u16::from_be_bytes([frame[port], frame[port + 1]]);
            ([frame[address], frame[address + 1], frame[address + 2], frame[address + 3]], port)
        };
        let (seen, own) = (endpoint(&inside, 26, 34), endpoint(&inside, 30, 36));
        let answer = FrameSpec { flags: SYN | ACK, ..FrameSpec::outward(&rig.router, protocol, own, seen) };
        let reply = rig.take(case.hook, Side::Internal, &answer.bytes()).bytes;
        prop_assert_eq!((endpoint(&reply, 26, 34), endpoint(&reply, 30, 36)), (outside, client));
    }
}

/// Row 3: each length that an IP header can have.
#[test]
fn packets_with_any_number_of_options_are_translated_at_the_right_offset() {
    for (hook, protocol) in INGRESS.into_iter().flat_map(|hook| [(hook, tcp::NUMBER), (hook, udp::NUMBER)]) {
        for option_words in 0..=10 {
            let client = (CLIENT, CLIENT_PORT);
            let case = Case { hook, side: Side::External, opens: true, client, port: 0, frame: Vec::new() };
            let spec = FrameSpec { option_words, payload: vec![7; 11], ..case.spec(protocol) };
            let (got, expected) = Case { frame: spec.bytes(), ..case }.translations();
            assert_eq!(got, expected);
        }
    }
}

/// Row 1; design, law 3: the stack has counted the hop and written the MACs when a reply gets to
/// TC egress.
#[test]
fn a_reply_that_comes_through_the_stack_is_translated_at_egress_with_its_ttl_as_it_is() {
    for protocol in [tcp::NUMBER, udp::NUMBER] {
        let mut rig = Rig::new();
        rig.establish(Hook::TcIngress, protocol);
        let spec = FrameSpec { payload: vec![1, 2, 3], ..rig.server(protocol) };
        let frame = FrameSpec { macs: (CLIENT_MAC, rig.router.wan.1), flags: ACK, ..spec }.bytes();
        let taken = rig.take(Hook::TcEgress, Side::External, &frame);
        assert_eq!(taken.outcome, Outcome::Continue);
        let mut expected = translated(&frame, (W, W_PORT), (CLIENT, CLIENT_PORT), None);
        expected[IP + 8] = frame[IP + 8];
        seal(&mut expected);
        assert_eq!(taken.bytes, expected);
    }
}

/// The payload of fragments that lie in order, and the addresses of the last one.
fn reassembled(fragments: &[Vec<u8>]) -> (Vec<u8>, Vec<u8>) {
    let payloads = fragments.iter().flat_map(|frame| {
        let header_len = usize::from(frame[14] & 0x0f) * 4;
        let packet_len = usize::from(u16::from_be_bytes([frame[16], frame[17]]));
        frame[14 + header_len..14 + packet_len].to_vec()
    });
    (payloads.collect(), fragments[fragments.len() - 1][26..34].to_vec())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Row 8: fragments whose first comes first are, put together, what the whole packet would be;
    /// whatever order the others come in.
    #[test]
    fn fragments_put_together_are_the_translated_packet(
        protocol in prop::sample::select(&[tcp::NUMBER, udp::NUMBER][..]),
        side in prop::sample::select(&[Side::External, Side::Internal][..]),
        option_words in 0usize..11,
        payload in prop::collection::vec(any::<u8>(), 30..200),
        length in prop::sample::select(&[24usize, 32, 64, 104][..]),
        without_checksum in any::<bool>(),
        backwards in any::<bool>(),
    ) {
        let mut rig = Rig::new();
        rig.establish(Hook::TcIngress, protocol);
        let spec = if side == Side::External { rig.client(protocol) } else { rig.server(protocol) };
        let spec = FrameSpec { flags: ACK, dont_fragment: false, option_words, payload, without_checksum, ..spec };
        let whole = rig.take(Hook::TcIngress, side, &spec.bytes());
        let mut fragments = fragmented(&spec.bytes(), length);
        if backwards {
            fragments[1..].reverse();
        }
        for fragment in &mut fragments {
            let taken = rig.take(Hook::TcIngress, side, fragment);
            prop_assert_eq!(taken.outcome, whole.outcome);
            *fragment = taken.bytes;
        }
        if backwards {
            fragments[1..].reverse();
        }
        prop_assert_eq!(reassembled(&fragments), reassembled(&[whole.bytes]));
    }
}

/// Row 8: the same identification of another client, another protocol, another side is another packet.
#[test]
fn fragments_of_different_packets_are_kept_apart() {
    let mut rig = Rig::new();
    rig.establish(Hook::TcIngress, udp::NUMBER);
    let spec = FrameSpec { payload: vec![7; 40], ..rig.client(udp::NUMBER) };
    let fragments = fragmented(&spec.bytes(), 24);
    assert_eq!(rig.take(Hook::TcIngress, Side::External, &fragments[0]).reason, Some(Reason::Forwarded));
    for other in [
        FrameSpec { src: (OTHER_CLIENT, 5000), ..spec.clone() },
        FrameSpec { id: spec.id + 1, ..spec.clone() },
        FrameSpec { protocol: tcp::NUMBER, ..spec.clone() },
    ] {
        let later = &fragmented(&other.bytes(), 24)[1];
        assert_eq!(rig.take(Hook::TcIngress, Side::External, later).reason, Some(Reason::Held));
    }
    assert_eq!(rig.take(Hook::TcIngress, Side::External, &fragments[1]).reason, Some(Reason::Forwarded));
}

/// Row 8; RFC 1858: nothing may be put over the header that was looked at.
#[test]
fn a_fragment_that_reaches_into_the_first_one_is_dropped() {
    let mut rig = Rig::new();
    rig.establish(Hook::TcIngress, udp::NUMBER);
    let spec = FrameSpec { payload: vec![7; 40], ..rig.client(udp::NUMBER) };
    rig.take(Hook::TcIngress, Side::External, &fragmented(&spec.bytes(), 24)[0]);
    let taken = rig.take(Hook::TcIngress, Side::External, &fragmented(&spec.bytes(), 16)[1]);
    assert_eq!((taken.outcome, taken.reason), (Outcome::Drop, Some(Reason::BadFragment)));
}

/// Row 8: a first fragment without its whole header says too little.
#[test]
fn a_first_fragment_too_small_for_its_header_is_dropped() {
    for protocol in [tcp::NUMBER, udp::NUMBER] {
        let mut rig = Rig::new();
        let spec = FrameSpec { payload: vec![7; 40], ..rig.client(protocol) };
        let mut tiny = fragmented(&spec.bytes(), 8).swap_remove(0);
        if protocol == udp::NUMBER {
            // Eight bytes are a whole UDP header: cut off half of it.
            tiny.truncate(14 + 20 + 4);
            tiny[16..18].copy_from_slice(&24_u16.to_be_bytes());
            tiny[24..26].fill(0);
            let sum = internet_checksum(&[&tiny[14..34]]);
            tiny[24..26].copy_from_slice(&sum);
        }
        let taken = rig.take(Hook::TcIngress, Side::External, &tiny);
        assert_eq!((taken.outcome, taken.reason), (Outcome::Drop, Some(Reason::BadL4Length)));
        assert!(rig.flows.trains.is_empty());
    }
}

/// Row 8: later fragments may take as long as a receiver waits for them, and only go where the flow does.
#[test]
fn later_fragments_come_in_time_and_open_nothing() {
    let mut rig = Rig::new();
    rig.establish(Hook::TcIngress, udp::NUMBER);
    let spec = FrameSpec { payload: vec![7; 60], ..rig.client(udp::NUMBER) };
    let fragments = fragmented(&spec.bytes(), 24);
    let take = |rig: &mut Rig, at: usize| rig.take(Hook::TcIngress, Side::External, &fragments[at]).reason;
    take(&mut rig, 0);
    rig.machine.now += 29_000_000_000;
    rig.machine.generation += 1;
    assert_eq!(take(&mut rig, 1).map(Reason::verdict), Some(Verdict::Forward));
    rig.machine.now += 1_000_000_001;
    assert_eq!(take(&mut rig, 2), Some(Reason::Held));
    rig.flows.held.clear();
    take(&mut rig, 0);
    rig.flows.established.clear();
    assert_eq!(take(&mut rig, 1), Some(Reason::NoFlow));
    assert!(rig.flows.established.is_empty() && rig.flows.half_open.is_empty());
}

/// Row 8: the host has to have all fragments of what it is to put together.
#[test]
fn fragments_follow_the_first_one_through_the_host() {
    let mut rig = Rig::new();
    rig.establish(Hook::TcIngress, udp::NUMBER);
    rig.machine.interfaces.get_mut(&rig.router.lan.0).unwrap().mtu = 1280;
    rig.machine.generation += 1;
    let spec = FrameSpec { payload: vec![7; 1900], dont_fragment: false, ..rig.client(udp::NUMBER) };
    for fragment in fragmented(&spec.bytes(), 1480) {
        let taken = rig.take(Hook::TcIngress, Side::External, &fragment);
        assert_eq!(taken.reason, Some(Reason::TranslatedForHost));
    }
}

/// Row 7: what the host has cut up on its way out is translated piece by piece.
#[test]
fn fragments_that_the_host_sends_are_translated_at_egress() {
    let mut rig = Rig::new();
    rig.establish(Hook::TcIngress, udp::NUMBER);
    let spec = FrameSpec { payload: vec![7; 60], dont_fragment: false, ..rig.server(udp::NUMBER) };
    let whole = rig.take(Hook::TcEgress, Side::External, &spec.bytes());
    let mut fragments = fragmented(&spec.bytes(), 24);
    for fragment in &mut fragments {
        let taken = rig.take(Hook::TcEgress, Side::External, fragment);
        assert_eq!(taken.reason, Some(Reason::TranslatedAtEgress));
        *fragment = taken.bytes;
    }
    assert_eq!(reassembled(&fragments), reassembled(&[whole.bytes]));
}
