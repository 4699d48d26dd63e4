//! What goes through the host's stack: it is marked as it enters, and leaves translated or not at all.

#![allow(clippy::unwrap_used, reason = "clippy knows the test functions, but not their helpers")]

mod common;

use common::*;
use forwarder_common::{
    flow::Side,
    layout::Hook,
    model::scenario::{CLIENT, ErrorSpec, FrameSpec, SERVER, fragmented, tcp_flags::*},
    pipeline::Outcome,
    reason::Reason,
    wire::{tcp, udp},
};

/// A router with an established flow, and a packet of its server that is too long for the uplink.
fn too_long(protocol: u8) -> (Rig, FrameSpec) {
    let mut rig = Rig::new();
    rig.establish(Hook::TcIngress, protocol);
    let spec = FrameSpec { flags: ACK, payload: vec![7; 1900], dont_fragment: false, ..rig.server(protocol) };
    (rig, spec)
}

/// Rows 5, 7; design, law 3: the mark says which of the packets that pass are on the mapping's business.
#[test]
fn of_what_passes_only_that_which_the_host_is_to_answer_or_cut_up_is_marked() {
    for protocol in [tcp::NUMBER, udp::NUMBER] {
        for dont_fragment in [true, false] {
            let (mut rig, long) = too_long(protocol);
            let last_hop = FrameSpec { ttl: 1, payload: vec![], dont_fragment, ..long.clone() };
            let long = FrameSpec { dont_fragment, ..long };
            let direct = FrameSpec { src: (SERVER, 4321), dont_fragment, ..long.clone() };
            for (spec, marked, reason) in [
                (long, Outcome::PassMarked, Reason::LeftTooBig),
                (last_hop, Outcome::PassMarked, Reason::LeftTtlExpired),
                (direct, Outcome::Pass, Reason::NoMatch),
            ] {
                for hook in INGRESS {
                    let taken = rig.take(hook, Side::Internal, &spec.bytes());
                    if hook == Hook::Xdp {
                        assert_eq!(taken.outcome, Outcome::Pass);
                    } else {
                        assert_eq!((taken.outcome, taken.reason), (marked, Some(reason)));
                    }
                }
            }
        }
    }
}

/// Row 46; design, law 3: no private address leaves by way of the host's stack.
#[test]
fn what_was_left_to_the_host_leaves_translated_or_not_at_all() {
    for protocol in [tcp::NUMBER, udp::NUMBER] {
        let (mut rig, reply) = too_long(protocol);
        let reply = FrameSpec { payload: vec![7; 100], ..reply };
        let untracked = FrameSpec { src: (SERVER, 4321), ..reply.clone() };
        let error = ErrorSpec::new(&rig.router, Side::Internal, SERVER, CLIENT, &untracked.bytes()[14..]);
        let mut ping = reply.bytes();
        ping[23] = 1;
        let mut arp = reply.bytes();
        arp[13] = 6;
        let lost =
            [untracked.bytes(), error.bytes(), fragmented(&reply.bytes(), 24).swap_remove(1), ping, arp];
        for marked in [false, true] {
            rig.machine.marked = marked;
            for frame in &lost {
                let taken = rig.take(Hook::TcEgress, Side::External, frame);
                let expected =
                    if marked { (Outcome::Drop, Some(Reason::Untranslated)) } else { (Outcome::Pass, None) };
                assert_eq!((taken.outcome, taken.reason), expected);
            }
            let taken = rig.clone().take(Hook::TcEgress, Side::External, &reply.bytes());
            assert_eq!(taken.reason, Some(Reason::TranslatedAtEgress));
        }
        // At ingress the mark is somebody else's.
        let taken = rig.take(Hook::TcIngress, Side::Internal, &untracked.bytes());
        assert_eq!((taken.outcome, taken.reason), (Outcome::Pass, Some(Reason::NoMatch)));
    }
}

/// Rows 7, 8: a host that puts fragments together has to have all of them, and lets them go as one packet
/// or as they came.
#[test]
fn fragments_of_a_reply_follow_the_first_one_through_the_host() {
    let (mut rig, spec) = too_long(udp::NUMBER);
    rig.machine.interfaces.get_mut(&rig.router.wan.0).unwrap().mtu = 1280;
    rig.machine.generation += 1;
    let fragments = fragmented(&spec.bytes(), 1480);
    for fragment in &fragments {
        let taken = rig.take(Hook::TcIngress, Side::Internal, fragment);
        assert_eq!((taken.outcome, taken.reason), (Outcome::PassMarked, Some(Reason::LeftTooBig)));
    }
    rig.machine.marked = true;
    for fragment in fragmented(&fragments[0], 1256).iter().chain(&fragments[1..]) {
        let taken = rig.take(Hook::TcEgress, Side::External, fragment);
        assert_eq!(taken.reason, Some(Reason::TranslatedAtEgress));
    }
}
