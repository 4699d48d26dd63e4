//! Row 8: fragments that come before the first one of their packet.

#![allow(clippy::unwrap_used, reason = "clippy knows the test functions, but not their helpers")]

mod common;

use std::collections::VecDeque;

use common::*;
use forwarder_common::{
    flow::Side,
    fragment::LONGEST_HELD,
    layout::Hook,
    model::scenario::{
        CLIENT, FrameSpec, GATEWAY, OTHER_CLIENT, OTHER_SERVER, SERVER, W, fragmented, internet_checksum,
        tcp_flags::ACK,
    },
    pipeline::Outcome,
    reason::{Reason, Verdict},
    wire::{tcp, udp},
};
use proptest::prelude::*;

/// Takes a frame through TC ingress, and what is released by it. What became of each frame in the end.
fn deliver(rig: &mut Rig, side: Side, frame: &[u8]) -> Vec<Taken> {
    let mut queue = VecDeque::from([frame.to_vec()]);
    let mut done = Vec::new();
    while let Some(frame) = queue.pop_front() {
        assert!(done.len() + queue.len() < 1000, "it goes round and round");
        let taken = rig.take(Hook::TcIngress, side, &frame);
        match taken.outcome {
            Outcome::Release => queue.extend([frame, taken.bytes]),
            _ => done.push(taken),
        }
    }
    done
}

/// A router with an established session, the frames of one packet of it in fragments, and the frame that
/// the whole packet becomes.
fn session(protocol: u8, side: Side, length: usize, payload: usize) -> (Rig, Vec<Vec<u8>>, Vec<u8>) {
    session_of(None, protocol, side, length, payload)
}

/// The same, of either family ([`FrameSpec::ipv6`]).
fn session_of(
    ipv6: Option<Vec<u8>>,
    protocol: u8,
    side: Side,
    length: usize,
    payload: usize,
) -> (Rig, Vec<Vec<u8>>, Vec<u8>) {
    let mut rig = Rig::new();
    if ipv6.is_none() {
        rig.establish(Hook::TcIngress, protocol);
    } else {
        let syn = FrameSpec { ipv6: ipv6.clone(), ..rig.client(protocol) };
        rig.take(Hook::TcIngress, Side::External, &syn.bytes());
    }
    let spec = if side == Side::External { rig.client(protocol) } else { rig.server(protocol) };
    let payload = (0..payload).map(|byte| byte as u8).collect();
    let spec = FrameSpec { ipv6, flags: ACK, dont_fragment: false, payload, ..spec };
    let whole = rig.take(Hook::TcIngress, side, &spec.bytes()).bytes;
    (rig, fragmented(&spec.bytes(), length), whole)
}

fn is_ipv6(frame: &[u8]) -> bool {
    frame[12..14] == [0x86, 0xdd]
}

/// The place of a fragment in its packet, as it stands in the header.
fn place(frame: &[u8]) -> u16 {
    let at = if is_ipv6(frame) { 56 } else { 20 };
    let word = u16::from_be_bytes([frame[at], frame[at + 1]]);
    if is_ipv6(frame) { word >> 3 } else { word & 0x1fff }
}

/// The payload of a packet whose fragments these are, which have to be all forwarded.
fn put_together(mut taken: Vec<Taken>) -> Vec<u8> {
    assert!(taken.iter().all(|taken| taken.reason == Some(Reason::Forwarded)), "{taken:?}");
    taken.sort_by_key(|taken| place(&taken.bytes));
    taken
        .iter()
        .flat_map(|taken| taken.bytes[if is_ipv6(&taken.bytes) { 62 } else { 34 }..].to_vec())
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Whatever order they come in, and whatever comes twice.
    #[test]
    fn fragments_in_any_order_are_the_translated_packet(
        ipv6 in prop::sample::select(vec![None, Some(Vec::new())]),
        protocol in prop::sample::select(&[tcp::NUMBER, udp::NUMBER][..]),
        side in prop::sample::select(&[Side::External, Side::Internal][..]),
        order in Just((0..9).collect::<Vec<usize>>()).prop_shuffle(),
        twice in prop::collection::vec(0usize..9, 0..3),
    ) {
        let (mut rig, fragments, whole) = session_of(ipv6, protocol, side, 24, 9 * 24 - 20);
        let mut delivered: Vec<Taken> = Vec::new();
        for at in order.into_iter().flat_map(|at| [at].repeat(1 + usize::from(twice.contains(&at)))) {
            if let Some(fragment) = fragments.get(at) {
                let taken = deliver(&mut rig, side, fragment);
                delivered.extend(taken.into_iter().filter(|taken| taken.outcome != Outcome::Hold));
            }
        }
        delivered.sort_by_key(|taken| place(&taken.bytes));
        delivered.dedup_by_key(|taken| place(&taken.bytes));
        prop_assert_eq!(put_together(delivered), &whole[if is_ipv6(&whole) { 54 } else { 34 }..]);
        prop_assert!(rig.flows.held.is_empty() && rig.flows_ipv6.held.is_empty());
    }
}

#[test]
fn fragments_of_a_host_inside_to_the_external_address_are_held_too() {
    let mut rig = Rig::new();
    let spec = FrameSpec { payload: vec![7; 40], dont_fragment: false, ..rig.server(udp::NUMBER) };
    let spec = FrameSpec { src: (OTHER_SERVER, 5000), dst: (W, 10_005), ..spec };
    let fragments = fragmented(&spec.bytes(), 24);
    assert_eq!(deliver(&mut rig, Side::Internal, &fragments[1])[0].reason, Some(Reason::Held));
    let taken = deliver(&mut rig, Side::Internal, &fragments[0]);
    assert_eq!(taken.len(), 2);
    assert!(taken.iter().all(|taken| taken.reason.unwrap().verdict() == Verdict::Forward), "{taken:?}");
    assert!(taken.iter().all(|taken| taken.bytes[30..34] == SERVER));
}

#[test]
fn held_fragments_of_two_clients_with_one_identification_are_kept_apart() {
    let (mut rig, of_one, _) = session(udp::NUMBER, Side::External, 24, 40);
    let mut of_other = of_one.clone();
    for frame in &mut of_other {
        frame[26..30].copy_from_slice(&OTHER_CLIENT);
        frame[24..26].fill(0);
        let sum = internet_checksum(&[&frame[14..34]]);
        frame[24..26].copy_from_slice(&sum);
    }
    for fragment in [&of_one[1], &of_other[1]] {
        assert_eq!(deliver(&mut rig, Side::External, fragment)[0].outcome, Outcome::Hold);
    }
    for (client, fragments) in [(OTHER_CLIENT, &of_other), (CLIENT, &of_one)] {
        let taken = deliver(&mut rig, Side::External, &fragments[0]);
        assert_eq!(taken.len(), 2);
        assert!(taken.iter().all(|taken| taken.bytes[26..30] == client), "{taken:?}");
    }
}

/// Its own services get fragmented datagrams too, and hosts inside may talk to whom they like.
#[test]
fn held_fragments_of_what_no_rule_is_about_pass_untouched_when_the_first_one_comes() {
    let rig = Rig::new();
    let (client, server) = (rig.client(udp::NUMBER), rig.server(udp::NUMBER));
    for (side, spec) in [
        (Side::External, FrameSpec { dst: (W, 53), ..client }),
        (Side::Internal, FrameSpec { src: (SERVER, 5353), ..server }),
    ] {
        let mut rig = Rig::new();
        let spec = FrameSpec { payload: vec![7; 60], dont_fragment: false, ..spec };
        let fragments = fragmented(&spec.bytes(), 24);
        for fragment in fragments[1..].iter().rev() {
            assert_eq!(deliver(&mut rig, side, fragment)[0].reason, Some(Reason::Held));
        }
        let taken = deliver(&mut rig, side, &fragments[0]);
        assert_eq!(
            taken.iter().map(|taken| &taken.bytes).collect::<Vec<_>>(),
            fragments.iter().collect::<Vec<_>>()
        );
        assert!(taken.iter().all(|taken| taken.outcome == Outcome::Pass));
        // And those that come in order pass at once.
        for fragment in &fragments {
            assert_eq!(deliver(&mut rig, side, fragment)[0].outcome, Outcome::Pass);
        }
    }
}

/// The first of a packet through this router may go another way, where it is neither's address.
#[test]
fn only_fragments_that_a_rule_can_be_about_are_held() {
    let rig = Rig::new();
    let (client, server) = (rig.client(udp::NUMBER), rig.server(udp::NUMBER));
    for (side, spec, reason) in [
        (Side::External, client.clone(), Reason::Held),
        (Side::External, FrameSpec { dst: (GATEWAY, 8080), ..client.clone() }, Reason::Fragment),
        (Side::External, FrameSpec { dst: ([198, 51, 100, 9], 8080), ..client.clone() }, Reason::Fragment),
        (
            Side::External,
            FrameSpec { src: (SERVER, 80), dst: ([198, 51, 100, 9], 80), ..client },
            Reason::Fragment,
        ),
        (Side::Internal, server.clone(), Reason::Held),
        (Side::Internal, FrameSpec { src: ([10, 0, 0, 99], 80), ..server }, Reason::Fragment),
    ] {
        let spec = FrameSpec { payload: vec![7; 40], dont_fragment: false, ..spec };
        for hook in INGRESS {
            let taken = Rig::new().take(hook, side, &fragmented(&spec.bytes(), 24)[1]);
            let expected = if hook == Hook::Xdp { Reason::Fragment } else { reason };
            assert_eq!(taken.reason, Some(expected), "{hook:?} {spec:?}");
        }
    }
}

/// What the host sends comes in order.
#[test]
fn nothing_is_held_that_the_host_sends() {
    let mut rig = Rig::new();
    let spec = FrameSpec { payload: vec![7; 40], dont_fragment: false, ..rig.server(udp::NUMBER) };
    let taken = rig.take(Hook::TcEgress, Side::External, &fragmented(&spec.bytes(), 24)[1]);
    assert_eq!((taken.outcome, taken.reason), (Outcome::Pass, None));
}

/// What the first may not, the others may not.
#[test]
fn held_fragments_of_a_packet_that_is_refused_go_nowhere() {
    let mut rig = Rig::new();
    let spec = FrameSpec { dst: (W, 2222), payload: vec![7; 40], ..rig.client(udp::NUMBER) };
    let fragments = fragmented(&spec.bytes(), 24);
    assert_eq!(deliver(&mut rig, Side::External, &fragments[1])[0].outcome, Outcome::Hold);
    let taken = deliver(&mut rig, Side::External, &fragments[0]);
    assert_eq!(taken[0].reason, Some(Reason::NotAllowed));
    assert!(taken.iter().all(|taken| taken.reason.unwrap().verdict() == Verdict::Drop), "{taken:?}");
}

/// As long as a receiver waits. RFC 4963: identifications come again.
#[test]
fn a_fragment_is_held_for_thirty_seconds() {
    for (wait, arrives) in [(29_999_999_999, true), (30_000_000_000, false)] {
        let (mut rig, fragments, _) = session(udp::NUMBER, Side::External, 24, 40);
        deliver(&mut rig, Side::External, &fragments[1]);
        rig.machine.now += wait;
        assert_eq!(deliver(&mut rig, Side::External, &fragments[0]).len(), if arrives { 2 } else { 1 });
    }
}

/// RFC 1858: also not one that came before the header that it would be put over.
#[test]
fn a_held_fragment_that_reaches_into_the_first_one_goes_nowhere() {
    let (mut rig, fragments, _) = session(udp::NUMBER, Side::External, 24, 40);
    let (_, narrow, _) = session(udp::NUMBER, Side::External, 16, 40);
    assert_eq!(deliver(&mut rig, Side::External, &narrow[1])[0].outcome, Outcome::Hold);
    assert_eq!(deliver(&mut rig, Side::External, &fragments[0]).len(), 1);
    assert_eq!(deliver(&mut rig, Side::External, &narrow[1])[0].reason, Some(Reason::BadFragment));
}

#[test]
fn a_frame_that_is_too_long_to_hold_is_left_alone() {
    for (more, outcome) in [(0, Outcome::Hold), (1, Outcome::Pass)] {
        let (mut rig, mut fragments, _) = session(udp::NUMBER, Side::External, 24, 40);
        fragments[1].resize(14 + LONGEST_HELD + more, 0);
        assert_eq!(rig.take(Hook::TcIngress, Side::External, &fragments[1]).outcome, outcome);
    }
}

/// Nor does a fragment without its whole header.
#[test]
fn a_malformed_first_fragment_releases_nothing() {
    let (mut rig, fragments, _) = session(tcp::NUMBER, Side::External, 24, 60);
    let (_, tiny, _) = session(tcp::NUMBER, Side::External, 16, 60);
    let _ = fragments;
    assert_eq!(deliver(&mut rig, Side::External, &tiny[1])[0].outcome, Outcome::Hold);
    let taken = deliver(&mut rig, Side::External, &tiny[0]);
    assert_eq!((taken.len(), taken[0].reason), (1, Some(Reason::BadL4Length)));
    assert!(rig.flows.trains.is_empty());
}
