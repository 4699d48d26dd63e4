//! Row 19: hosts inside use a mapping too.

#![allow(clippy::unwrap_used, reason = "clippy knows the test functions, but not their helpers")]

mod common;

use common::*;
use forwarder_common::{
    flow::Side,
    layout::Hook,
    model::scenario::{FrameSpec, GATEWAY, OTHER_SERVER, SERVER, W, tcp_flags::*},
    pipeline::Outcome,
    reason::Reason,
    wire::{tcp, udp},
};

/// The external port of a rule with hairpin, and its port at the server.
const MAPPED: (u16, u16) = (10_005, 20_005);

/// Source and destination of a frame.
fn ends(bytes: &[u8]) -> (([u8; 4], u16), ([u8; 4], u16)) {
    let port = |at: usize| u16::from_be_bytes([bytes[at], bytes[at + 1]]);
    let address = |at: usize| [bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]];
    ((address(26), port(34)), (address(30), port(36)))
}

/// From a host inside to the mapped port.
fn from_inside(rig: &Rig, protocol: u8, client: [u8; 4]) -> FrameSpec {
    FrameSpec::outward(&rig.router, protocol, (client, 5000), (W, MAPPED.0))
}

#[test]
fn a_host_inside_talks_to_the_server_as_if_the_router_were_both() {
    for hook in INGRESS {
        for protocol in [tcp::NUMBER, udp::NUMBER] {
            // A neighbour of the server, and the server itself.
            for client in [OTHER_SERVER, SERVER] {
                let mut rig = Rig::new();
                let first = FrameSpec { seq: 1000, ..from_inside(&rig, protocol, client) };
                let inward = rig.take(hook, Side::Internal, &first.bytes());
                assert_eq!(ends(&inward.bytes), ((W, 5000), (SERVER, MAPPED.1)), "{:?}", inward.reason);

                let answer = FrameSpec { flags: SYN | ACK, seq: SERVER_SEQ, ..first.clone() };
                let answer = FrameSpec { src: (SERVER, MAPPED.1), dst: (W, 5000), ..answer };
                let outward = rig.take(hook, Side::Internal, &answer.bytes());
                assert_eq!(ends(&outward.bytes), ((W, MAPPED.0), (client, 5000)), "{:?}", outward.reason);

                let proof = FrameSpec { flags: ACK, ack: SERVER_SEQ + 1, ..first };
                rig.take(hook, Side::Internal, &proof.bytes());
                assert_eq!((rig.flows.established.len(), rig.flows.half_open.len()), (2, 0));
                let again = rig.take(hook, Side::Internal, &FrameSpec { flags: ACK, ..answer }.bytes());
                assert_eq!(again.reason, Some(Reason::Forwarded));
            }
        }
    }
}

#[test]
fn a_rule_without_hairpin_leaves_hosts_inside_to_the_host() {
    for hook in INGRESS {
        let mut rig = Rig::new();
        let spec = FrameSpec { dst: (W, W_PORT), ..from_inside(&rig, tcp::NUMBER, OTHER_SERVER) };
        let taken = rig.take(hook, Side::Internal, &spec.bytes());
        assert_eq!((taken.outcome, taken.reason), (Outcome::Pass, Some(Reason::NoMatch)));
    }
}

/// Nobody inside has an address that the router reaches elsewhere.
#[test]
fn sources_that_do_not_belong_there_open_nothing() {
    for hook in INGRESS {
        for source in [W, GATEWAY, [203, 0, 113, 9], [198, 18, 0, 9], [127, 0, 0, 1], [224, 0, 0, 1]] {
            let mut rig = Rig::new();
            let spec = from_inside(&rig, udp::NUMBER, source);
            let taken = rig.take(hook, Side::Internal, &spec.bytes());
            assert_eq!((taken.outcome, taken.reason), (Outcome::Drop, Some(Reason::Spoofed)), "{source:?}");
            assert!(rig.flows.half_open.is_empty());
        }
    }
}

/// Row 46: the two entries of a cut flow both come from inside, and only the server's packets are its end.
#[test]
fn a_client_inside_of_a_cut_flow_begins_anew() {
    for hook in INGRESS {
        let mut rig = Rig::new();
        let first = from_inside(&rig, udp::NUMBER, OTHER_SERVER).bytes();
        rig.take(hook, Side::Internal, &first);
        rig.machine.rules.get_mut(&2).unwrap().udp_epoch += 1;
        let answer = FrameSpec { src: (SERVER, MAPPED.1), dst: (W, 5000), ..from_inside(&rig, udp::NUMBER, SERVER) };
        assert_eq!(rig.take(hook, Side::Internal, &answer.bytes()).reason, Some(Reason::Cut));
        assert_eq!(ends(&rig.take(hook, Side::Internal, &first).bytes).1, (SERVER, MAPPED.1));
        assert_eq!(ends(&rig.take(hook, Side::Internal, &answer.bytes()).bytes).1, (OTHER_SERVER, 5000));
    }
}

/// What would have to go through the host's stack has the router's own address: the stack would not
/// take it.
#[test]
fn what_the_host_cannot_help_is_dropped_and_counted() {
    let mut rig = Rig::new();
    let spec = from_inside(&rig, udp::NUMBER, OTHER_SERVER);
    let ended = FrameSpec { ttl: 1, ..spec.clone() }.bytes();
    let long = FrameSpec { payload: vec![0; 1473], ..spec }.bytes();
    for (frame, reason) in [(ended, Reason::TtlExpired), (long, Reason::TooBig)] {
        let taken = rig.take(Hook::TcIngress, Side::Internal, &frame);
        assert_eq!((taken.outcome, taken.reason), (Outcome::Drop, Some(reason)));
    }
}
