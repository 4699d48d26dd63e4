//! Row 6: ICMP errors about packets of flows.

mod common;

use common::*;
use forwarder_common::{
    flow::Side,
    layout::Hook,
    model::scenario::{
        CLIENT, ErrorSpec, FrameSpec, GATEWAY, NOWHERE, OTHER_CLIENT, OTHER_SERVER, SERVER, W,
        internet_checksum, tcp_flags::ACK,
    },
    pipeline::Outcome,
    reason::{Reason, Verdict},
    wire::{icmp, tcp, udp},
};
use proptest::prelude::*;

/// A hop behind the router.
const INNER_HOP: [u8; 4] = [10, 9, 9, 9];
/// A hop in the internet.
const OUTER_HOP: [u8; 4] = NOWHERE;

/// The IP packet in a frame, with a TTL one less: as a hop further on quotes it.
fn one_hop_on(frame: &[u8]) -> Vec<u8> {
    let mut packet = frame[14..].to_vec();
    packet[8] -= 1;
    packet[10..12].fill(0);
    let header_len = usize::from(packet[0] & 0x0f) * 4;
    let sum = internet_checksum(&[&packet[..header_len]]);
    packet[10..12].copy_from_slice(&sum);
    packet
}

/// A packet of the client's or the server's, as it was sent, and as it is behind the router.
fn sent_and_arrived(rig: &mut Rig, side: Side, spec: &FrameSpec) -> (Vec<u8>, Vec<u8>) {
    let sent = spec.bytes();
    let arrived = rig.take(Hook::TcIngress, side, &sent).bytes;
    assert_ne!(sent, arrived);
    (one_hop_on(&sent), arrived[14..].to_vec())
}

fn spec(rig: &Rig, side: Side, protocol: u8) -> FrameSpec {
    let spec = if side == Side::External { rig.client(protocol) } else { rig.server(protocol) };
    FrameSpec { flags: ACK, payload: b"some payload".to_vec(), ..spec }
}

fn other(side: Side) -> Side {
    if side == Side::External { Side::Internal } else { Side::External }
}

/// An error about what the `side` has sent, and what it should arrive as, both as frames without
/// their Ethernet headers.
fn error_about(rig: &mut Rig, side: Side, spec: &FrameSpec, length: usize) -> (ErrorSpec, ErrorSpec) {
    let (sent, arrived) = sent_and_arrived(rig, side, spec);
    let cut = |packet: &[u8]| {
        let header_len = usize::from(packet[0] & 0x0f) * 4;
        packet[..(header_len + length).min(packet.len())].to_vec()
    };
    let (seen_by, told) = match side {
        Side::External => ((INNER_HOP, CLIENT), W),
        // The server talked to the client as such; a hop out there answers to W.
        Side::Internal => ((OUTER_HOP, W), OUTER_HOP),
    };
    let error = ErrorSpec::new(&rig.router, other(side), seen_by.0, seen_by.1, &cut(&arrived));
    let dst = if side == Side::External { CLIENT } else { server_of(spec.protocol) };
    let expected = ErrorSpec { src: told, dst, ttl: 63, quote: cut(&sent), ..error.clone() };
    (error, expected)
}

fn server_of(protocol: u8) -> [u8; 4] {
    if protocol == tcp::NUMBER { SERVER } else { OTHER_SERVER }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// The quote becomes the packet that its sender sent, bit for bit; the flow stays as it is.
    #[test]
    fn an_error_quotes_the_packet_as_its_sender_knows_it(
        side in prop::sample::select(&[Side::External, Side::Internal][..]),
        protocol in prop::sample::select(&[tcp::NUMBER, udp::NUMBER][..]),
        kind in prop::sample::select(&[(3, 1), (3, 3), (3, 4), (11, 0), (12, 0)][..]),
        option_words in 0usize..11,
        length in prop::sample::select(&[8usize, 12, 18, 19, 20, 28, 1000][..]),
        payload in prop::collection::vec(any::<u8>(), 0..60),
        without_checksum in any::<bool>(),
    ) {
        let mut rig = Rig::new();
        rig.establish(Hook::TcIngress, protocol);
        let spec = FrameSpec { option_words, payload, without_checksum, ..spec(&rig, side, protocol) };
        let (mut error, mut expected) = error_about(&mut rig, side, &spec, length);
        (error.kind, expected.kind) = (kind, kind);
        // The way of a reply is learned, and a change of the network changes nothing of that.
        rig.machine.generation += u32::from(side == Side::External);
        let flows = rig.flows.clone();
        let taken = rig.take(Hook::TcIngress, other(side), &error.bytes());
        prop_assert_eq!(taken.reason, Some(Reason::Forwarded));
        prop_assert_eq!(&taken.bytes[14..], &expected.bytes()[14..]);
        prop_assert_eq!((rig.flows.established, rig.flows.half_open), (flows.established, flows.half_open));
    }
}

/// Rows 5, 7: what the router itself tells a client speaks of the address that the client dialled.
#[test]
fn the_routers_own_errors_are_translated_as_they_leave() {
    for protocol in [tcp::NUMBER, udp::NUMBER] {
        let mut rig = Rig::new();
        rig.establish(Hook::TcIngress, protocol);
        let spec = spec(&rig, Side::External, protocol);
        let (error, expected) = error_about(&mut rig, Side::External, &spec, 500);
        let error = ErrorSpec { src: GATEWAY, ..error };
        let taken = rig.take(Hook::TcEgress, Side::External, &error.bytes());
        assert_eq!((taken.outcome, taken.reason), (Outcome::Continue, Some(Reason::TranslatedAtEgress)));
        assert_eq!(taken.bytes[14..], ErrorSpec { ttl: 64, ..expected }.bytes()[14..]);
    }
}

/// They are too rare to be worth room in the fast path.
#[test]
fn errors_are_left_by_xdp_to_tc() {
    for hook in INGRESS {
        let mut rig = Rig::new();
        rig.establish(hook, tcp::NUMBER);
        let spec = spec(&rig, Side::External, tcp::NUMBER);
        let (error, _) = error_about(&mut rig, Side::External, &spec, 500);
        let expected = if hook == Hook::Xdp { Reason::LeftToTc } else { Reason::Forwarded };
        assert_eq!(rig.take(hook, Side::Internal, &error.bytes()).reason, Some(expected));
    }
}

/// An error about a flow, and what makes it one that must not be translated.
#[test]
fn errors_that_are_not_right_are_not_forwarded() {
    type Change = fn(&mut Rig, &mut ErrorSpec);
    let cases: &[(Side, Change, Outcome, Reason)] = &[
        // About no flow: perhaps the host's own.
        (Side::External, |_, error| error.quote[20] ^= 1, Outcome::Pass, Reason::NoMatch),
        (Side::Internal, |_, error| error.quote[23] ^= 1, Outcome::Pass, Reason::NoMatch),
        (Side::External, |_, error| error.dst = OTHER_CLIENT, Outcome::Pass, Reason::NoMatch),
        (Side::External, |_, error| error.kind.0 = 8, Outcome::Pass, Reason::OtherProtocol),
        (Side::External, |_, error| error.kind.0 = 5, Outcome::Pass, Reason::OtherProtocol),
        (Side::External, |_, error| error.quote[9] = 47, Outcome::Pass, Reason::OtherProtocol),
        (Side::External, |_, error| error.quote[0] = 0x65, Outcome::Pass, Reason::OtherProtocol),
        (Side::External, |_, error| error.quote[0] = 0x44, Outcome::Pass, Reason::OtherProtocol),
        // A later fragment has no ports.
        (Side::External, |_, error| error.quote[7] = 1, Outcome::Pass, Reason::OtherProtocol),
        (Side::External, |_, error| error.quote.truncate(23), Outcome::Pass, Reason::CutOff),
        (Side::External, |_, error| error.quote[0] = 0x4f, Outcome::Pass, Reason::CutOff),
        // Nobody in the internet is the router, or inside.
        (Side::Internal, |_, error| error.src = W, Outcome::Drop, Reason::Spoofed),
        (Side::Internal, |_, error| error.src = SERVER, Outcome::Drop, Reason::Spoofed),
        (Side::Internal, |_, error| error.src = [127, 0, 0, 1], Outcome::Drop, Reason::Spoofed),
        (Side::External, |_, error| error.ttl = 1, Outcome::Drop, Reason::TtlExpired),
        (Side::External, |rig, _| rig.machine.rules.clear(), Outcome::Drop, Reason::Cut),
        (Side::Internal, |rig, _| rig.machine.rules.clear(), Outcome::Drop, Reason::Cut),
    ];
    for (at, (side, change, outcome, reason)) in cases.iter().enumerate() {
        let mut rig = Rig::new();
        rig.establish(Hook::TcIngress, tcp::NUMBER);
        let spec = spec(&rig, *side, tcp::NUMBER);
        let (mut error, _) = error_about(&mut rig, *side, &spec, 28);
        assert_eq!(
            rig.take(Hook::TcIngress, other(*side), &error.bytes()).reason,
            Some(Reason::Forwarded),
            "case {at} without its change"
        );
        change(&mut rig, &mut error);
        let taken = rig.take(Hook::TcIngress, other(*side), &error.bytes());
        assert_eq!((taken.outcome, taken.reason), (*outcome, Some(*reason)), "case {at}");
    }
}

/// RFC 5508 REQ-3.
#[test]
fn an_error_with_a_wrong_checksum_goes_no_further() {
    let mut rig = Rig::new();
    rig.establish(Hook::TcIngress, udp::NUMBER);
    let spec = spec(&rig, Side::External, udp::NUMBER);
    let (error, _) = error_about(&mut rig, Side::External, &spec, 28);
    let right = error.bytes();
    for at in (34..right.len()).filter(|at| ![34, 35].contains(at)) {
        let mut wrong = right.clone();
        wrong[at] ^= 0x40;
        let taken = rig.take(Hook::TcIngress, Side::Internal, &wrong);
        assert_ne!(taken.reason.map(Reason::verdict), Some(Verdict::Forward), "byte {at}");
    }
    let mut wrong = right.clone();
    wrong[14 + 20 + icmp::LEN + 28] ^= 0x40;
    let taken = rig.take(Hook::TcIngress, Side::Internal, &wrong);
    assert_eq!((taken.outcome, taken.reason), (Outcome::Drop, Some(Reason::BadIcmpChecksum)));
}

/// RFC 5508 REQ-7: a host inside that uses a mapping is told by the address that it dialled, too.
#[test]
fn an_error_about_a_hairpinned_packet_reaches_the_host_inside() {
    let mut rig = Rig::new();
    let spec = FrameSpec::outward(&rig.router, udp::NUMBER, (OTHER_SERVER, 5000), (W, 10_005));
    let spec = FrameSpec { payload: b"anybody there?".to_vec(), ..spec };
    let (sent, arrived) = sent_and_arrived(&mut rig, Side::Internal, &spec);
    let error = ErrorSpec::new(&rig.router, Side::Internal, SERVER, W, &arrived[..28]);
    let expected =
        ErrorSpec { src: W, dst: OTHER_SERVER, ttl: 63, quote: sent[..28].to_vec(), ..error.clone() };
    let taken = rig.take(Hook::TcIngress, Side::Internal, &error.bytes());
    assert_eq!(taken.reason, Some(Reason::Forwarded));
    assert_eq!(taken.bytes[14..], expected.bytes()[14..]);
}
