//! Whatever comes in does no harm: no panic, nothing half changed, nothing malformed sent on.
//! ([`Rig::take`] checks of each frame that it is as it came unless it was translated, and counted once.)

#![allow(clippy::unwrap_used, reason = "clippy knows the test functions, but not their helpers")]

mod common;

use common::*;
use etherparse::{NetSlice, SlicedPacket, checksum::Sum16BitWords};
use forwarder_common::{
    flow::Side,
    layout::Hook,
    model::scenario::{CLIENT, FrameSpec, OTHER_SERVER, Router, SERVER, tcp_flags::*},
    pipeline::Outcome,
    reason::{Reason, Verdict},
    wire::{tcp, udp},
};
use proptest::{prelude::*, sample::Index};

thread_local! {
    static RIG: Rig = rig_with_flows();
}

/// A router with flows of every kind: established, half-open, cut.
fn rig() -> Rig {
    RIG.with(Rig::clone)
}

fn rig_with_flows() -> Rig {
    let mut rig = Rig::new();
    for protocol in [tcp::NUMBER, udp::NUMBER] {
        rig.establish(Hook::TcIngress, protocol);
        for port in [10_000, 1] {
            let client = (CLIENT, CLIENT_PORT);
            let first = FrameSpec::inward(&rig.router, protocol, client, port).bytes();
            rig.take(Hook::TcIngress, Side::External, &first);
        }
    }
    rig.machine.rules.get_mut(&9).unwrap().tcp_epoch += 1;
    rig
}

/// Good frames that meet these flows, and some that meet none.
fn good_frames() -> impl Strategy<Value = (Side, FrameSpec)> {
    let way = (prop::sample::select(&[tcp::NUMBER, udp::NUMBER][..]), any::<bool>(), any::<bool>());
    let ports =
        prop::sample::select(&[(8080, 80), (10_000, 20_000), (1, 1), (9000, 9999), (2222, 22), (5, 5)]);
    let fields = (0usize..=10, any::<u8>(), any::<u8>(), any::<bool>());
    let bytes = || prop::collection::vec(any::<u8>(), 0..40);
    (way, ports, fields, bytes(), bytes()).prop_map(
        |((protocol, inward, known), (w_port, port), fields, payload, padding)| {
            let router = Router::default();
            let client = (CLIENT, if known { CLIENT_PORT } else { 7 });
            let server =
                if (protocol, w_port) == (udp::NUMBER, 8080) { (OTHER_SERVER, 81) } else { (SERVER, port) };
            let (side, spec) = if inward {
                (Side::External, FrameSpec::inward(&router, protocol, client, w_port))
            } else {
                (Side::Internal, FrameSpec::outward(&router, protocol, server, client))
            };
            let (option_words, flags, ttl, without_checksum) = fields;
            (side, FrameSpec { option_words, flags, ttl, without_checksum, payload, padding, ..spec })
        },
    )
}

/// One thing that happens to a frame on its way.
#[derive(Clone, Debug)]
enum Mutation {
    Byte(Index, u8),
    Word(Index, u16),
    Bit(Index, u8),
    Truncate(usize),
    Extend(Vec<u8>),
    Tag([u8; 4]),
    /// Puts the IP checksum right again, so that what is behind the header is looked at.
    Seal,
}

impl Mutation {
    fn apply(&self, frame: &mut Vec<u8>) {
        match self {
            Self::Byte(at, value) if !frame.is_empty() => *at.get_mut(frame) = *value,
            Self::Bit(at, bit) if !frame.is_empty() => *at.get_mut(frame) ^= 1 << (bit % 8),
            Self::Word(at, value) if frame.len() > 1 => {
                let at = at.index(frame.len() - 1);
                frame[at..at + 2].copy_from_slice(&value.to_be_bytes());
            }
            Self::Truncate(len) => frame.truncate(*len),
            Self::Extend(bytes) => frame.extend(bytes),
            Self::Tag(tag) if frame.len() >= 12 => drop(frame.splice(12..12, *tag)),
            Self::Seal => seal(frame),
            _ => {}
        }
    }
}

/// Puts the checksum of whatever could be an IP header right.
fn seal(frame: &mut [u8]) {
    let Some(ip) = frame.get_mut(14..) else { return };
    let Some(header_len) = ip.first().map(|first| usize::from(first & 0x0f) * 4) else { return };
    let Some(header) = ip.get_mut(..header_len.max(20)) else { return };
    header[10..12].fill(0);
    let sum = Sum16BitWords::new().add_slice(&header[..header_len.max(12)]).ones_complement();
    header[10..12].copy_from_slice(&sum.to_ne_bytes());
}

fn mutations() -> impl Strategy<Value = Vec<Mutation>> {
    // Header bytes are hit more often than a payload's would be by chance.
    let mutation = prop_oneof![
        4 => (any::<Index>(), any::<u8>()).prop_map(|(at, value)| Mutation::Byte(at, value)),
        2 => (any::<Index>(), any::<u16>()).prop_map(|(at, value)| Mutation::Word(at, value)),
        4 => (any::<Index>(), any::<u8>()).prop_map(|(at, bit)| Mutation::Bit(at, bit)),
        1 => (0usize..100).prop_map(Mutation::Truncate),
        1 => prop::collection::vec(any::<u8>(), 0..100).prop_map(Mutation::Extend),
        1 => prop::sample::select(&[[0x81, 0, 0, 0], [0x81, 0, 0, 5], [0x88, 0xa8, 0, 0]])
            .prop_map(Mutation::Tag),
        4 => Just(Mutation::Seal),
    ];
    prop::collection::vec(mutation, 0..6)
}

fn hooks() -> impl Strategy<Value = Hook> {
    prop::sample::select(&Hook::ALL[..])
}

/// Row 11: whatever is sent on is an IPv4 packet, whole and right, of TCP or UDP.
fn assert_harmless(taken: &Taken) {
    if taken.reason.map(Reason::verdict) != Some(Verdict::Forward) {
        return;
    }
    let packet = SlicedPacket::from_ethernet(&taken.bytes).unwrap();
    let Some(NetSlice::Ipv4(ip)) = &packet.net else { panic!("{taken:?}") };
    assert_eq!(Sum16BitWords::new().add_slice(ip.header().slice()).ones_complement(), 0, "{taken:?}");
    // What goes on through the host's stack has its hop counted there.
    let counted = [Some(Reason::Forwarded), Some(Reason::Resolving)].contains(&taken.reason);
    assert!(ip.header().ttl() > 0 || !counted, "{taken:?}");
    // Of a packet in fragments the first one has the header, and later ones follow it.
    let is_later = ip.header().fragments_offset().value() > 0;
    assert!(is_later || ip.is_payload_fragmented() || packet.transport.is_some(), "{taken:?}");
    assert!(packet.link_exts.is_empty());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    /// Row 11.
    #[test]
    fn noise_does_no_harm(
        hook in hooks(),
        side in prop::sample::select(&[Side::External, Side::Internal][..]),
        frame in prop::collection::vec(any::<u8>(), 0..200),
    ) {
        assert_harmless(&rig().take(hook, side, &frame));
    }

    /// Row 11.
    #[test]
    fn noise_behind_a_right_ethernet_header_does_no_harm(
        hook in hooks(),
        side in prop::sample::select(&[Side::External, Side::Internal][..]),
        start in prop::sample::select(vec![vec![], vec![0x45], vec![0x46, 0, 0, 40]]),
        noise in prop::collection::vec(any::<u8>(), 0..200),
    ) {
        let mut rig = rig();
        let spec = if side == Side::External { rig.client(tcp::NUMBER) } else { rig.server(tcp::NUMBER) };
        let mut frame = [&spec.bytes()[..14], &start, &noise].concat();
        assert_harmless(&rig.take(hook, side, &frame));
        seal(&mut frame);
        assert_harmless(&rig.take(hook, side, &frame));
    }

    /// Row 11.
    #[test]
    fn good_frames_gone_bad_do_no_harm(
        hook in hooks(),
        (side, spec) in good_frames(),
        mutations in mutations(),
    ) {
        let mut frame = spec.bytes();
        for mutation in mutations {
            mutation.apply(&mut frame);
        }
        assert_harmless(&rig().take(hook, side, &frame));
    }
}

/// A packet that opens a flow, one of an established flow, and a reply, each with 20 bytes of
/// payload, each changed by `change`, get `reason` at both ingress hooks.
fn assert_refused(protocol: u8, change: impl Fn(&mut Vec<u8>), reason: Reason) {
    for hook in INGRESS {
        let mut rig = Rig::new();
        rig.establish(hook, protocol);
        let payload = vec![0x5a; 20];
        let known = FrameSpec { flags: ACK, payload: payload.clone(), ..rig.client(protocol) };
        let first = FrameSpec { flags: SYN, src: (CLIENT, 7), ..known.clone() };
        let reply = FrameSpec { flags: ACK, payload, ..rig.server(protocol) };
        for (side, spec) in [(Side::External, known), (Side::External, first), (Side::Internal, reply)] {
            let mut frame = spec.bytes();
            change(&mut frame);
            assert_eq!(rig.take(hook, side, &frame).reason, Some(reason), "{hook:?} {spec:?}");
        }
        assert_eq!((rig.flows.established.len(), rig.flows.half_open.len()), (2, 0));
    }
}

fn set_total_length(frame: &mut [u8], length: u16) {
    frame[16..18].copy_from_slice(&length.to_be_bytes());
    seal(frame);
}

/// Row 11.
#[test]
fn an_impossible_ip_header_is_not_looked_behind() {
    for protocol in [tcp::NUMBER, udp::NUMBER] {
        for first in [0x44, 0x40, 0x55, 0x65, 0x05] {
            let change = |frame: &mut Vec<u8>| {
                frame[14] = first;
                seal(frame);
            };
            assert_refused(protocol, change, Reason::BadIpHeader);
        }
    }
}

/// Row 11.
#[test]
fn a_total_length_beyond_the_frame_or_inside_the_header_is_refused() {
    for protocol in [tcp::NUMBER, udp::NUMBER] {
        for length in [0, 19, u16::MAX] {
            assert_refused(protocol, |frame| set_total_length(frame, length), Reason::BadIpLength);
        }
        assert_refused(protocol, |frame| frame.truncate(frame.len() - 1), Reason::BadIpLength);
        // Options that would have to lie behind the packet's end.
        let change = |frame: &mut Vec<u8>| {
            frame[14] = 0x4f;
            set_total_length(frame, 48);
        };
        assert_refused(protocol, change, Reason::BadIpLength);
    }
}

/// Row 11.
#[test]
fn each_bit_of_the_ip_header_is_under_its_checksum() {
    for protocol in [tcp::NUMBER, udp::NUMBER] {
        for bit in 0..20 * 8 {
            // Version and length are looked at first, and the length of the packet.
            if (0..8).contains(&bit) || (16..32).contains(&bit) {
                continue;
            }
            assert_refused(protocol, |frame| frame[14 + bit / 8] ^= 0x80 >> (bit % 8), Reason::BadIpChecksum);
        }
    }
}

/// Rows 3, 11: options are under the checksum too.
#[test]
fn each_word_of_options_is_under_the_ip_checksum() {
    for hook in INGRESS {
        for word in 0..10 {
            let mut rig = Rig::new();
            let mut frame = FrameSpec { option_words: 10, ..rig.client(tcp::NUMBER) }.bytes();
            frame[34 + word * 4 + word % 4] ^= 0x10;
            let taken = rig.take(hook, Side::External, &frame);
            assert_eq!((taken.outcome, taken.reason), (Outcome::Pass, Some(Reason::BadIpChecksum)));
        }
    }
}

/// Rows 4, 11: what the padding holds does not complete a header.
#[test]
fn a_header_that_is_cut_off_is_not_completed_by_what_is_behind_the_packet() {
    for protocol in [tcp::NUMBER, udp::NUMBER] {
        for length in 20..24 {
            assert_refused(protocol, |frame| set_total_length(frame, length), Reason::CutOff);
        }
        let header_len = if protocol == tcp::NUMBER { 20 } else { 8 };
        for length in 24..20 + header_len {
            assert_refused(protocol, |frame| set_total_length(frame, length), Reason::BadL4Length);
        }
    }
}

/// Row 11.
#[test]
fn a_tcp_data_offset_beyond_the_segment_or_inside_the_header_is_refused() {
    // The segment has 40 bytes, which is an offset of 10.
    for offset in (0..=4).chain(11..=15) {
        let change = |frame: &mut Vec<u8>| frame[34 + 12] = offset << 4;
        assert_refused(tcp::NUMBER, change, Reason::BadL4Length);
    }
}

/// Row 11.
#[test]
fn a_udp_length_beyond_the_payload_or_inside_the_header_is_refused() {
    for length in [0u16, 7, 29, u16::MAX] {
        let change = |frame: &mut Vec<u8>| frame[38..40].copy_from_slice(&length.to_be_bytes());
        assert_refused(udp::NUMBER, change, Reason::BadL4Length);
    }
}

/// Row 11: headers that just fit are right.
#[test]
fn headers_that_fill_the_packet_are_translated() {
    for hook in INGRESS {
        let mut rig = Rig::new();
        rig.establish(hook, tcp::NUMBER);
        let mut frame = FrameSpec { flags: ACK, payload: vec![1; 20], ..rig.client(tcp::NUMBER) }.bytes();
        frame[34 + 12] = 0xa0;
        assert_eq!(rig.take(hook, Side::External, &frame).reason, Some(Reason::Forwarded));
        let empty = rig.client(udp::NUMBER).bytes();
        assert_eq!(rig.take(hook, Side::External, &empty).outcome, first_outcome(hook, &rig));
    }
}

/// Of a flow's first packet.
fn first_outcome(hook: Hook, rig: &Rig) -> Outcome {
    let ifindex = rig.router.lan.0;
    match hook {
        Hook::Xdp => Outcome::Redirect { ifindex },
        _ => Outcome::RedirectNeighbour { ifindex, next_hop: rig.machine.rules[&1].target },
    }
}

/// Row 11: drops are counted for the rule, passes concern none.
#[test]
fn malformed_segments_are_counted_for_their_rule() {
    for hook in INGRESS {
        let mut rig = Rig::new();
        for (w_port, verdict) in [(W_PORT, Verdict::Drop), (9, Verdict::Pass)] {
            let spec = FrameSpec { dst: (rig.client(tcp::NUMBER).dst.0, w_port), ..rig.client(tcp::NUMBER) };
            let mut frame = spec.bytes();
            frame[34 + 12] = 0x40;
            let taken = rig.take(hook, Side::External, &frame);
            assert_eq!(taken.reason.map(Reason::verdict), Some(verdict));
        }
        let dropped = |slot: u32| rig.counts.rules[&slot].dropped;
        assert_eq!(dropped(0)[Reason::BadL4Length as usize - Reason::FIRST_DROP], 1);
        assert_eq!(rig.counts.rules.len(), 1);
    }
}

/// Row 11.
#[test]
fn runts_are_left_alone() {
    for hook in INGRESS {
        let mut rig = Rig::new();
        let frame = rig.client(udp::NUMBER).bytes();
        for length in 0..34 {
            let taken = rig.take(hook, Side::External, &frame[..length]);
            assert_eq!((taken.outcome, taken.reason), (Outcome::Pass, Some(Reason::ShortFrame)), "{length}");
        }
    }
}
