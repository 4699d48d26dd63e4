//! Where a translated packet goes next, and which it is too long, too old or too early to go to.

#![allow(clippy::unwrap_used, reason = "clippy knows the test functions, but not their helpers")]

mod common;

use common::*;
use forwarder_common::{
    address::{Address as _, Ipv4, Ipv6, Macs},
    decide::HOP_LIFETIME,
    flow::{INWARD, OUTWARD, Side},
    layout::{Hook, Interface, UNFINISHED_CHECKSUMS, XDP_TARGET},
    model::scenario::{
        CLIENT, CLIENT_MAC, FrameSpec, OTHER_SERVER, SERVER, SERVER_MAC, internet_checksum, tcp_flags::*,
    },
    pipeline::Outcome,
    reason::{Reason, Verdict},
    tables::Route,
    wire::{tcp, udp},
};

const NEW_MAC: [u8; 6] = [2, 0, 0, 0, 0, 99];

/// The established flow's packet, with so much payload.
fn packet(rig: &Rig, protocol: u8, direction: u8, payload: usize, dont_fragment: bool) -> FrameSpec {
    let spec = if direction == INWARD { rig.client(protocol) } else { rig.server(protocol) };
    FrameSpec { flags: ACK, payload: vec![9; payload], dont_fragment, ..spec }
}

fn send(rig: &mut Rig, hook: Hook, protocol: u8, direction: u8) -> Taken {
    let side = if direction == INWARD { Side::External } else { Side::Internal };
    let frame = packet(rig, protocol, direction, 0, true).bytes();
    rig.take(hook, side, &frame)
}

/// Gives the neighbour on the way to a host, or with `None` nobody yet.
fn reroute(rig: &mut Rig, host: [u8; 4], side: Side, mac: Option<[u8; 6]>) {
    let (ifindex, own) = rig.router.interface(side);
    let next_hop = Ipv6::default();
    let route = match mac {
        Some(mac) => {
            let hop =
                forwarder_common::flow::Hop { macs: Macs::new(mac, own), ifindex, ..Default::default() };
            Route::Known { hop, next_hop }
        }
        None => Route::Unresolved { ifindex, next_hop },
    };
    rig.machine.routes.insert(0, (host, 32, route));
}

fn server_of(protocol: u8) -> [u8; 4] {
    if protocol == tcp::NUMBER { SERVER } else { OTHER_SERVER }
}

/// Row 28; design, law 7.
#[test]
fn a_hop_inwards_is_asked_anew_after_a_second_or_in_another_generation() {
    for protocol in [tcp::NUMBER, udp::NUMBER] {
        for generations in [0, 1, u32::MAX] {
            let mut rig = Rig::new();
            rig.establish(Hook::Xdp, protocol);
            let lan = rig.router.lan;
            reroute(&mut rig, server_of(protocol), Side::Internal, Some(NEW_MAC));
            rig.machine.now += HOP_LIFETIME - 1;
            let taken = send(&mut rig, Hook::Xdp, protocol, INWARD);
            assert_eq!(taken.bytes[..12], [SERVER_MAC, lan.1].concat());

            rig.machine.generation = rig.machine.generation.wrapping_add(generations);
            rig.machine.now += u64::from(generations == 0);
            let taken = send(&mut rig, Hook::Xdp, protocol, INWARD);
            assert_eq!(taken.outcome, Outcome::Redirect { ifindex: lan.0 });
            assert_eq!(taken.bytes[..12], [NEW_MAC, lan.1].concat());

            // What was learned is good for another second.
            reroute(&mut rig, server_of(protocol), Side::Internal, Some(SERVER_MAC));
            rig.machine.now += HOP_LIFETIME - 1;
            let taken = send(&mut rig, Hook::Xdp, protocol, INWARD);
            assert_eq!(taken.bytes[..12], [NEW_MAC, lan.1].concat());
        }
    }
}

/// Row 28; design, law 2: TC asks through the kernel's neighbour code, which checks the neighbour.
#[test]
fn in_tc_a_stale_hop_goes_through_the_kernels_neighbour_code_once() {
    for protocol in [tcp::NUMBER, udp::NUMBER] {
        let mut rig = Rig::new();
        rig.establish(Hook::TcIngress, protocol);
        let lan = rig.router.lan;
        for _ in 0..3 {
            rig.machine.now += HOP_LIFETIME;
            let taken = send(&mut rig, Hook::TcIngress, protocol, INWARD);
            let next_hop = Ipv4::new(server_of(protocol)).mapped();
            assert_eq!(taken.outcome, Outcome::RedirectNeighbour { ifindex: lan.0, next_hop });
            assert_eq!(taken.reason, Some(Reason::Resolving));
            let taken = send(&mut rig, Hook::TcIngress, protocol, INWARD);
            assert_eq!(taken.outcome, Outcome::Redirect { ifindex: lan.0 });
            assert_eq!(taken.bytes[..12], [SERVER_MAC, lan.1].concat());
        }
    }
}

/// Row 28.
#[test]
fn a_neighbour_that_is_lost_again_is_resolved_again() {
    for protocol in [tcp::NUMBER, udp::NUMBER] {
        let mut rig = Rig::new();
        rig.establish(Hook::Xdp, protocol);
        reroute(&mut rig, server_of(protocol), Side::Internal, None);
        rig.machine.generation += 1;
        let left = send(&mut rig, Hook::Xdp, protocol, INWARD);
        assert_eq!((left.outcome, left.reason), (Outcome::Pass, Some(Reason::LeftUnresolved)));
        for _ in 0..2 {
            let taken = send(&mut rig, Hook::TcIngress, protocol, INWARD);
            assert_eq!(taken.reason, Some(Reason::Resolving));
        }
        reroute(&mut rig, server_of(protocol), Side::Internal, Some(NEW_MAC));
        let taken = send(&mut rig, Hook::Xdp, protocol, INWARD);
        assert_eq!(taken.bytes[..12], [NEW_MAC, rig.router.lan.1].concat());
    }
}

/// Row 45: a route that turns away from the inside takes no running flow with it.
#[test]
fn a_flow_does_not_follow_a_route_to_the_wrong_side() {
    for hook in INGRESS {
        let mut rig = Rig::new();
        rig.establish(hook, tcp::NUMBER);
        rig.machine.generation += 1;
        reroute(&mut rig, SERVER, Side::External, Some(NEW_MAC));
        let taken = send(&mut rig, hook, tcp::NUMBER, INWARD);
        assert_eq!((taken.outcome, taken.reason), (Outcome::Drop, Some(Reason::WrongEgress)));
        rig.machine.routes[0].2 = Route::None(Reason::NoRoute);
        let taken = send(&mut rig, hook, tcp::NUMBER, INWARD);
        assert_eq!((taken.outcome, taken.reason), (Outcome::Drop, Some(Reason::NoRoute)));
    }
}

/// Row 26.
#[test]
fn replies_leave_to_where_the_request_came_from_whatever_the_routes_say() {
    for hook in INGRESS {
        for protocol in [tcp::NUMBER, udp::NUMBER] {
            let mut rig = Rig::new();
            let wan = rig.router.wan;
            reroute(&mut rig, CLIENT, Side::External, Some(NEW_MAC));
            rig.establish(hook, protocol);
            for _ in 0..3 {
                let taken = send(&mut rig, hook, protocol, OUTWARD);
                assert_eq!(taken.outcome, Outcome::Redirect { ifindex: wan.0 });
                assert_eq!(taken.bytes[..12], [CLIENT_MAC, wan.1].concat());
                rig.machine.now += 10 * HOP_LIFETIME;
                rig.machine.generation += 1;
            }
            // Nor can a packet from another MAC, or from inside, turn them.
            let forged = FrameSpec { macs: (wan.1, NEW_MAC), ..packet(&rig, protocol, INWARD, 0, true) };
            rig.take(hook, Side::External, &forged.bytes());
            let forged = FrameSpec { macs: (rig.router.lan.1, NEW_MAC), ..forged };
            assert_eq!(rig.take(hook, Side::Internal, &forged.bytes()).outcome, Outcome::Pass);
            let taken = send(&mut rig, hook, protocol, OUTWARD);
            assert_eq!(taken.bytes[..12], [CLIENT_MAC, wan.1].concat());
        }
    }
}

/// Rows 26, 38.
#[test]
fn when_the_interface_of_a_learned_hop_is_gone_the_route_decides() {
    for hook in INGRESS {
        for gone in [true, false] {
            let mut rig = Rig::new();
            rig.establish(hook, tcp::NUMBER);
            let (old, mac) = rig.router.wan;
            // It came back with another index, or its old one is an internal interface's now.
            let interface = rig.machine.interfaces[&old];
            rig.machine.interfaces.insert(9, interface);
            if gone {
                rig.machine.interfaces.remove(&old);
            } else {
                rig.machine.interfaces.get_mut(&old).unwrap().side = Side::Internal as u8;
            }
            rig.router.wan = (9, mac);
            reroute(&mut rig, CLIENT, Side::External, Some(NEW_MAC));
            rig.machine.generation += 1;
            let first = send(&mut rig, hook, tcp::NUMBER, OUTWARD);
            let next_hop = Ipv4::new(CLIENT).mapped();
            let outcome = match hook {
                Hook::Xdp => Outcome::Redirect { ifindex: 9 },
                _ => Outcome::RedirectNeighbour { ifindex: 9, next_hop },
            };
            assert_eq!(first.outcome, outcome);
            let second = send(&mut rig, hook, tcp::NUMBER, OUTWARD);
            assert_eq!(second.outcome, Outcome::Redirect { ifindex: 9 });
            assert_eq!(second.bytes[..12], [NEW_MAC, mac].concat());

            // From now on it is a hop like others: good for a second.
            reroute(&mut rig, CLIENT, Side::External, Some(CLIENT_MAC));
            rig.machine.now += HOP_LIFETIME;
            send(&mut rig, hook, tcp::NUMBER, OUTWARD);
            let moved = send(&mut rig, hook, tcp::NUMBER, OUTWARD);
            assert_eq!(moved.bytes[..12], [CLIENT_MAC, mac].concat());
        }
    }
}

/// Row 28: once a second a packet goes by way of TC, so that the kernel checks the neighbour.
#[test]
fn a_packet_that_is_to_probe_the_neighbour_is_left_to_tc() {
    for protocol in [tcp::NUMBER, udp::NUMBER] {
        let mut rig = Rig::new();
        rig.establish(Hook::Xdp, protocol);
        rig.machine.probes.set(1);
        // A fresh hop needs no probe.
        assert_eq!(send(&mut rig, Hook::Xdp, protocol, INWARD).reason, Some(Reason::Forwarded));
        rig.machine.now += HOP_LIFETIME;
        let left = send(&mut rig, Hook::Xdp, protocol, INWARD);
        assert_eq!((left.outcome, left.reason), (Outcome::Pass, Some(Reason::LeftToProbe)));
        assert_eq!(send(&mut rig, Hook::TcIngress, protocol, INWARD).reason, Some(Reason::Resolving));

        // Others go on meanwhile; TC probes with each stale hop and claims nothing.
        rig.machine.now += HOP_LIFETIME;
        assert_eq!(send(&mut rig, Hook::Xdp, protocol, INWARD).reason, Some(Reason::Forwarded));
        rig.machine.probes.set(1);
        rig.machine.now += HOP_LIFETIME;
        send(&mut rig, Hook::TcIngress, protocol, INWARD);
        assert_eq!(rig.machine.probes.get(), 1);
    }
}

/// Rows 7, 9: 1500 bytes fit, one more does not. Each on a flow's first packet and on later ones.
#[test]
fn what_is_too_long_goes_to_whom_can_say_so_or_cut_it_up() {
    for (protocol, header_len) in [(tcp::NUMBER, 40), (udp::NUMBER, 28)] {
        for (hook, known) in INGRESS.into_iter().flat_map(|hook| [(hook, true), (hook, false)]) {
            for (direction, dont_fragment) in
                [(INWARD, true), (INWARD, false), (OUTWARD, true), (OUTWARD, false)]
            {
                let mut rig = Rig::new();
                match (known, direction) {
                    (true, _) => rig.establish(hook, protocol),
                    (false, INWARD) => {}
                    (false, _) => continue,
                }
                let mut take = |len: usize| {
                    let spec = packet(&rig, protocol, direction, len - header_len, dont_fragment);
                    let flags = if known { ACK } else { SYN };
                    let src = (spec.src.0, spec.src.1 + u16::from(!known && len > 1500));
                    let side = if direction == INWARD { Side::External } else { Side::Internal };
                    let frame = FrameSpec { flags, src, ..spec }.bytes();
                    let entries = rig.flows.half_open.len();
                    let taken = rig.take(hook, side, &frame);
                    (taken.outcome, taken.reason, taken.bytes, rig.flows.half_open.len() - entries)
                };
                let (_, reason, _, made) = take(1500);
                assert_eq!(reason.map(Reason::verdict), Some(Verdict::Forward));
                assert_eq!(made, if known { 0 } else { 2 });

                let (outcome, reason, bytes, made) = take(1501);
                match (hook, direction, dont_fragment) {
                    (Hook::Xdp, ..) => {
                        assert_eq!((outcome, reason), (Outcome::Pass, Some(Reason::LeftTooBig)));
                    }
                    // Translated, with the hop still to be counted; the host fragments it or tells the client.
                    (_, INWARD, _) => {
                        let expected = (Outcome::Continue, Some(Reason::TranslatedForHost));
                        assert_eq!((outcome, reason), expected);
                        assert_eq!((bytes[22], &bytes[30..34]), (64, &server_of(protocol)[..]));
                    }
                    // The host tells the server, or fragments it: its parts are translated as they leave.
                    _ => assert_eq!((outcome, reason), (Outcome::PassMarked, Some(Reason::LeftTooBig))),
                }
                let opens = !known && outcome == Outcome::Continue;
                assert_eq!(made, if opens { 2 } else { 0 });
            }
        }
    }
}

/// Row 7: the MTU is that of the interface by which the packet leaves.
#[test]
fn the_egress_interfaces_mtu_counts() {
    for hook in INGRESS {
        for (narrow, direction) in [(Side::Internal, INWARD), (Side::External, OUTWARD)] {
            let mut rig = Rig::new();
            let ifindex = rig.router.interface(narrow).0;
            rig.machine.interfaces.get_mut(&ifindex).unwrap().mtu = 1280;
            rig.establish(hook, tcp::NUMBER);
            for (direction, len) in [(INWARD, 1280), (OUTWARD, 1280), (OUTWARD + INWARD - direction, 1500)] {
                let frame = packet(&rig, tcp::NUMBER, direction, len - 40, true).bytes();
                let side = if direction == INWARD { Side::External } else { Side::Internal };
                assert_eq!(rig.take(hook, side, &frame).reason, Some(Reason::Forwarded), "{len}");
            }
            let frame = packet(&rig, tcp::NUMBER, direction, 1241, true).bytes();
            let side = if direction == INWARD { Side::External } else { Side::Internal };
            let taken = rig.take(hook, side, &frame);
            assert!(
                matches!(taken.reason, Some(Reason::LeftTooBig | Reason::TranslatedForHost)),
                "{taken:?}"
            );
        }
    }
}

/// Rows 7, 9: what stands for several segments is cut up by the kernel: the length of each counts.
#[test]
fn segments_that_the_kernel_has_put_together_are_not_too_long() {
    for direction in [INWARD, OUTWARD] {
        let mut rig = Rig::new();
        rig.establish(Hook::TcIngress, tcp::NUMBER);
        let frame = packet(&rig, tcp::NUMBER, direction, 8000, true).bytes();
        let side = if direction == INWARD { Side::External } else { Side::Internal };
        let told = if direction == INWARD { Reason::TranslatedForHost } else { Reason::LeftTooBig };
        for (segment_size, reason) in [(1460, Reason::Forwarded), (1461, told)] {
            rig.machine.segment_size = segment_size;
            assert_eq!(rig.take(Hook::TcIngress, side, &frame).reason, Some(reason));
        }
    }
}

/// Row 5: both ways, a first packet and later ones; TTL 2 arrives as 1.
#[test]
fn a_packet_whose_ttl_ends_here_is_left_to_the_host_to_tell_its_sender() {
    for hook in INGRESS {
        for protocol in [tcp::NUMBER, udp::NUMBER] {
            // The client is to be told of the address that it knows: that takes a flow.
            let mut rig = Rig::new();
            let first = FrameSpec { ttl: 1, ..rig.client(protocol) }.bytes();
            rig.take(hook, Side::External, &first);
            assert_eq!(rig.flows.half_open.len(), if hook == Hook::Xdp { 0 } else { 2 });
            rig.establish(hook, protocol);
            for (direction, side) in [(INWARD, Side::External), (OUTWARD, Side::Internal)] {
                for ttl in 0..3 {
                    let frame = FrameSpec { ttl, ..packet(&rig, protocol, direction, 0, true) }.bytes();
                    let taken = rig.take(hook, side, &frame);
                    let expected = match (ttl, hook, direction) {
                        (2, ..) => Reason::Forwarded,
                        (_, Hook::Xdp, _) => Reason::LeftToTc,
                        (_, _, INWARD) => Reason::TranslatedForHost,
                        _ => Reason::LeftTtlExpired,
                    };
                    assert_eq!(taken.reason, Some(expected));
                    assert_eq!(taken.bytes[22], if ttl == 2 { 1 } else { ttl }, "the host counts the hop");
                }
            }
        }
    }
}

/// Design, law 1: XDP sends only to where a frame arrives; TC does the rest.
#[test]
fn what_xdp_may_not_send_by_the_egress_interface_is_left_to_tc() {
    for protocol in [tcp::NUMBER, udp::NUMBER] {
        for (closed, direction) in [(Side::Internal, INWARD), (Side::External, OUTWARD)] {
            let mut rig = Rig::new();
            let ifindex = rig.router.interface(closed).0;
            rig.machine.interfaces.get_mut(&ifindex).unwrap().flags &= !XDP_TARGET;
            if direction == INWARD {
                let first = rig.client(protocol).bytes();
                assert_eq!(rig.take(Hook::Xdp, Side::External, &first).reason, Some(Reason::LeftToTc));
                assert!(rig.flows.half_open.is_empty());
            }
            rig.establish(Hook::TcIngress, protocol);
            let left = send(&mut rig, Hook::Xdp, protocol, direction);
            assert_eq!((left.outcome, left.reason), (Outcome::Pass, Some(Reason::LeftToTc)));
            assert_eq!(send(&mut rig, Hook::TcIngress, protocol, direction).reason, Some(Reason::Forwarded));
            let other = INWARD + OUTWARD - direction;
            assert_eq!(send(&mut rig, Hook::Xdp, protocol, other).reason, Some(Reason::Forwarded));
        }
    }
}

/// Row 9: a checksum that an offload has still to finish holds the pseudo-header's sum; XDP cannot
/// tell the kernel how it changes. Where no such frames come, it is a wrong checksum like others.
#[test]
fn a_frame_with_an_unfinished_checksum_is_left_to_tc_where_such_frames_come() {
    for (protocol, at) in [(tcp::NUMBER, 50), (udp::NUMBER, 40)] {
        for direction in [INWARD, OUTWARD] {
            let mut rig = Rig::new();
            rig.establish(Hook::Xdp, protocol);
            let side = if direction == INWARD { Side::External } else { Side::Internal };
            let spec = packet(&rig, protocol, direction, 33, true);
            let finished = spec.bytes();
            let mut frame = finished.clone();
            let len = (frame.len() - 34) as u16;
            let sum = internet_checksum(&[&frame[26..34], &[0, protocol], &len.to_be_bytes()]);
            frame[at..at + 2].copy_from_slice(&sum.map(|byte| !byte));
            assert_eq!(rig.take(Hook::Xdp, side, &frame).reason, Some(Reason::Forwarded));

            let ifindex = rig.router.interface(side).0;
            rig.machine.interfaces.get_mut(&ifindex).unwrap().flags |= UNFINISHED_CHECKSUMS;
            let left = rig.take(Hook::Xdp, side, &frame);
            assert_eq!((left.outcome, left.reason), (Outcome::Pass, Some(Reason::LeftUnfinishedChecksum)));
            assert_eq!(rig.take(Hook::TcIngress, side, &frame).reason, Some(Reason::Forwarded));
            assert_eq!(rig.take(Hook::Xdp, side, &finished).reason, Some(Reason::Forwarded));
        }
    }
}

/// Design, law 1: a hop that was learned is no promise about the interface.
#[test]
fn a_learned_hop_takes_over_what_the_interface_is_now() {
    let mut rig = Rig::new();
    rig.establish(Hook::Xdp, tcp::NUMBER);
    let (index, _) = rig.router.wan;
    let interface = rig.machine.interfaces.get_mut(&index).unwrap();
    (interface.mtu, interface.mac) = (100, NEW_MAC);
    rig.machine.generation += 1;
    let small = send(&mut rig, Hook::Xdp, tcp::NUMBER, OUTWARD);
    assert_eq!(small.bytes[..12], [CLIENT_MAC, NEW_MAC].concat());
    let long = packet(&rig, tcp::NUMBER, OUTWARD, 100, true).bytes();
    assert_eq!(rig.take(Hook::Xdp, Side::Internal, &long).reason, Some(Reason::LeftTooBig));

    let interface = rig.machine.interfaces.get_mut(&index).unwrap();
    interface.flags &= !XDP_TARGET;
    rig.machine.generation += 1;
    assert_eq!(send(&mut rig, Hook::Xdp, tcp::NUMBER, OUTWARD).reason, Some(Reason::LeftToTc));
}

/// Row 26: the gateway that both the request came from and the route leads to gets another MAC.
#[test]
fn replies_follow_the_routes_neighbour_where_the_request_came_from_it() {
    for hook in INGRESS {
        // From the route's neighbour; from another one on the same link.
        for (from, expected) in [(CLIENT_MAC, NEW_MAC), ([2, 0, 0, 0, 0, 98], [2, 0, 0, 0, 0, 98])] {
            let mut rig = Rig::new();
            let request = FrameSpec { macs: (rig.router.wan.1, from), ..rig.client(udp::NUMBER) };
            rig.take(hook, Side::External, &request.bytes());
            let reply = rig.server(udp::NUMBER).bytes();
            assert_eq!(rig.take(hook, Side::Internal, &reply).bytes[..6], from);
            for (network, _, route) in &mut rig.machine.routes {
                if let (&mut CLIENT, Route::Known { hop, .. }) = (network, route) {
                    hop.macs = Macs::new(NEW_MAC, hop.macs.src());
                }
            }
            assert_eq!(rig.take(hook, Side::Internal, &reply).bytes[..6], from, "nobody has said so yet");
            rig.machine.generation += 1;
            // In TC the first one goes through the kernel, which checks that the neighbour answers.
            let first = rig.take(hook, Side::Internal, &reply);
            assert_eq!(first.reason == Some(Reason::Resolving), hook != Hook::Xdp && from == CLIENT_MAC);
            assert_eq!(rig.take(hook, Side::Internal, &reply).bytes[..6], expected);
        }
    }
}

/// Rows 26, 47: what comes out of the host's stack by another uplink than the request came by.
#[test]
fn what_the_host_sends_by_another_uplink_leaves_by_that_of_the_request() {
    let mut rig = Rig::new();
    rig.establish(Hook::TcIngress, udp::NUMBER);
    let wan2 = Interface { side: Side::External as u8, mac: [2, 1, 0, 0, 0, 9], mtu: 1500, flags: 0 };
    rig.machine.interfaces.insert(9, wan2);
    // The learned hop is another interface's.
    let (wan, _) = rig.router.wan;
    for flow in rig.flows.established.values_mut().filter(|flow| flow.direction == OUTWARD) {
        assert_eq!(flow.hop.ifindex, wan);
        flow.hop.ifindex = 9;
    }
    let long = FrameSpec { payload: vec![0; 1400], ..rig.server(udp::NUMBER) };
    let taken = rig.take(Hook::TcEgress, Side::External, &long.bytes());
    assert_eq!(
        (taken.outcome, taken.reason),
        (Outcome::Redirect { ifindex: 9 }, Some(Reason::TranslatedAtEgress))
    );
    assert_eq!((taken.bytes[22], &taken.bytes[..6]), (64, &CLIENT_MAC[..]), "its hop is counted already");
    // It may be narrower; and where it has gone, the host's own way will do.
    rig.machine.interfaces.get_mut(&9).unwrap().mtu = 1280;
    rig.machine.generation += 1;
    assert_eq!(rig.take(Hook::TcEgress, Side::External, &long.bytes()).reason, Some(Reason::TooBig));
    rig.machine.interfaces.remove(&9);
    rig.machine.generation += 1;
    assert_eq!(rig.take(Hook::TcEgress, Side::External, &long.bytes()).outcome, Outcome::Continue);
}

/// Row 26: after the link was down the route's neighbour has to be found anew.
#[test]
fn replies_wait_for_no_lost_neighbour() {
    for hook in INGRESS {
        let mut rig = Rig::new();
        let request = rig.client(udp::NUMBER).bytes();
        rig.take(hook, Side::External, &request);
        let reply = rig.server(udp::NUMBER).bytes();
        let known = rig.machine.routes.clone();
        rig.machine.routes.retain(|(network, ..)| *network != CLIENT);
        rig.machine.generation += 1;
        let expected = if hook == Hook::Xdp { Reason::LeftUnresolved } else { Reason::Resolving };
        for _ in 0..2 {
            assert_eq!(rig.take(hook, Side::Internal, &reply).reason, Some(expected));
        }
        rig.machine.routes = known;
        rig.machine.generation += 1;
        rig.take(hook, Side::Internal, &reply);
        let taken = rig.take(hook, Side::Internal, &reply);
        assert_eq!((taken.reason, &taken.bytes[..6]), (Some(Reason::Forwarded), &CLIENT_MAC[..]));
    }
}
