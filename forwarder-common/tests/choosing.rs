//! Which packets are translated, to where, and which are left alone or dropped.

#![allow(clippy::unwrap_used, reason = "clippy knows the test functions, but not their helpers")]

mod common;

use common::*;
use forwarder_common::{
    address::{Address as _, Ipv4},
    flow::Side,
    layout::Hook,
    model::scenario::{
        BOTH, CLIENT, DMZ_PORTS, FrameSpec, GATEWAY, NOWHERE, OTHER_CLIENT, OTHER_SERVER, SERVER, SERVER_MAC,
        SILENT_SERVER, STACK_PORT, W, tcp_flags::*,
    },
    pipeline::Outcome,
    reason::Reason,
    rule::HAIRPIN,
    tables::Route,
    wire::{tcp, udp},
};

type Endpoint = ([u8; 4], u16);

/// Where a client's first packet to a port of W goes, or why it does not. What does not go makes no flow.
fn choose(rig: &mut Rig, hook: Hook, protocol: u8, client: [u8; 4], port: u16) -> Result<Endpoint, Reason> {
    let frame = FrameSpec::inward(&rig.router, protocol, (client, CLIENT_PORT), port).bytes();
    let (flows, lan) = (rig.flows.half_open.len(), rig.router.lan.0);
    let taken = rig.take(hook, Side::External, &frame);
    assert!(rig.flows.established.is_empty());
    let made = rig.flows.half_open.len() - flows;
    match taken.outcome {
        Outcome::Pass | Outcome::Drop => {
            assert_eq!(made, 0, "{taken:?}");
            Err(taken.reason.unwrap())
        }
        Outcome::Redirect { ifindex } | Outcome::RedirectNeighbour { ifindex, .. } => {
            assert_eq!((made, ifindex), (2, lan));
            let b = &taken.bytes;
            Ok(([b[30], b[31], b[32], b[33]], u16::from_be_bytes([b[36], b[37]])))
        }
        Outcome::PassMarked | Outcome::Continue | Outcome::Admit | Outcome::Hold | Outcome::Release => {
            panic!("{taken:?}")
        }
    }
}

/// The same on a fresh router, where XDP and TC have to agree.
fn choice(protocol: u8, port: u16) -> Result<Endpoint, Reason> {
    let [xdp, tc] = INGRESS.map(|hook| choose(&mut Rig::new(), hook, protocol, CLIENT, port));
    assert_eq!(xdp, tc);
    xdp
}

/// Drops of a rule for one reason.
fn dropped(rig: &Rig, slot: u32, reason: Reason) -> u64 {
    rig.counts.rules.get(&slot).map_or(0, |rule| rule.dropped[reason as usize - Reason::FIRST_DROP])
}

/// An established flow's packets in both directions, changed by `change`, get `reason` at both hooks.
fn assert_left_alone(change: impl Fn(&mut Vec<u8>), reason: impl Fn(Hook) -> Reason) {
    for hook in INGRESS {
        for &protocol in BOTH {
            let mut rig = Rig::new();
            rig.establish(hook, protocol);
            let spec = FrameSpec { flags: ACK, payload: vec![0; 32], ..rig.client(protocol) };
            let answer = FrameSpec { flags: ACK, payload: vec![0; 32], ..rig.server(protocol) };
            let first = FrameSpec { flags: SYN, src: (OTHER_CLIENT, 6000), ..spec.clone() };
            for (side, spec) in [(Side::External, spec), (Side::Internal, answer), (Side::External, first)] {
                let mut frame = spec.bytes();
                change(&mut frame);
                let taken = rig.take(hook, side, &frame);
                assert_eq!((taken.outcome, taken.reason), (Outcome::Pass, Some(reason(hook))));
            }
            assert_eq!((rig.flows.established.len(), rig.flows.half_open.len()), (2, 0));
        }
    }
}

/// Fills in the IP checksum of a frame whose header has changed.
fn seal(frame: &mut [u8]) {
    let (header, _) = etherparse::Ipv4Header::from_slice(&frame[14..]).unwrap();
    frame[24..26].copy_from_slice(&header.calc_header_checksum().to_be_bytes());
}

/// Row 13.
#[test]
fn tcp_and_udp_on_one_port_go_to_hosts_of_their_own() {
    assert_eq!(choice(tcp::NUMBER, 8080), Ok((SERVER, 80)));
    assert_eq!(choice(udp::NUMBER, 8080), Ok((OTHER_SERVER, 81)));
}

/// Row 13.
#[test]
fn a_rule_for_one_protocol_leaves_the_other_alone() {
    assert_eq!(choice(tcp::NUMBER, 9000), Ok((SERVER, 9999)));
    assert_eq!(choice(udp::NUMBER, 9000), Err(Reason::NoMatch));
}

/// Rows 13, 14.
#[test]
fn a_range_goes_port_by_port_with_its_offset_for_both_protocols() {
    for &protocol in BOTH {
        for port in 10_000..=10_100 {
            assert_eq!(choice(protocol, port), Ok((SERVER, port + 10_000)));
        }
        assert_eq!(choice(protocol, 9_999), Err(Reason::NoMatch));
        assert_eq!(choice(protocol, 10_101), Err(Reason::NoMatch));
    }
}

/// Row 14.
#[test]
fn a_range_to_one_port_goes_there_from_first_to_last() {
    for port in 9000..=9010 {
        assert_eq!(choice(tcp::NUMBER, port), Ok((SERVER, 9999)));
    }
    assert_eq!(choice(tcp::NUMBER, 8999), Err(Reason::NoMatch));
    assert_eq!(choice(tcp::NUMBER, 9011), Err(Reason::NoMatch));
}

/// Row 14.
#[test]
fn the_lowest_and_the_highest_port_are_ports_like_others() {
    for &protocol in BOTH {
        assert_eq!(choice(protocol, 1), Ok((SERVER, 1)));
        assert_eq!(choice(protocol, 65_535), Ok((SERVER, 65_535)));
        for neighbour in [0, 2, 65_534] {
            assert_eq!(choice(protocol, neighbour), Err(Reason::NoMatch));
        }
    }
}

/// Row 16.
#[test]
fn what_no_rule_matches_passes() {
    for hook in INGRESS {
        for &protocol in BOTH {
            let mut rig = Rig::new();
            assert_eq!(choose(&mut rig, hook, protocol, CLIENT, 22), Err(Reason::NoMatch));
            // Another address of the router, on a port that W has a rule for.
            let elsewhere = FrameSpec { dst: ([203, 0, 113, 9], 8080), ..rig.client(protocol) };
            let taken = rig.take(hook, Side::External, &elsewhere.bytes());
            assert_eq!((taken.outcome, taken.reason), (Outcome::Pass, Some(Reason::NoMatch)));
        }
    }
}

/// Row 16: ARP, LLDP.
#[test]
fn what_is_not_ip_passes() {
    for ether_type in [[0x08, 0x06], [0x88, 0xcc]] {
        assert_left_alone(|frame| frame[12..14].copy_from_slice(&ether_type), |_| Reason::NotIp);
    }
}

/// Row 16: ICMP, GRE, ESP, SCTP.
#[test]
fn other_protocols_pass() {
    for protocol in [1, 47, 50, 132] {
        let change = |frame: &mut Vec<u8>| {
            frame[23] = protocol;
            seal(frame);
        };
        assert_left_alone(change, |_| Reason::OtherProtocol);
    }
}

/// Row 20.
#[test]
fn packets_from_inside_that_belong_to_no_flow_pass() {
    for hook in INGRESS {
        for &protocol in BOTH {
            let mut rig = Rig::new();
            rig.establish(hook, protocol);
            let server = rig.server(protocol);
            for flags in [SYN, SYN | ACK, ACK, FIN | ACK, RST] {
                for spec in [
                    FrameSpec { dst: (CLIENT, CLIENT_PORT + 1), ..server.clone() },
                    FrameSpec { dst: (OTHER_CLIENT, CLIENT_PORT), ..server.clone() },
                    FrameSpec { src: (server.src.0, server.src.1 + 1), ..server.clone() },
                    FrameSpec { src: ([10, 0, 0, 12], server.src.1), ..server.clone() },
                    // What a client outside would send means nothing from inside.
                    FrameSpec { macs: server.macs, ..rig.client(protocol) },
                ] {
                    let frame = FrameSpec { flags, ..spec }.bytes();
                    let taken = rig.take(hook, Side::Internal, &frame);
                    assert_eq!((taken.outcome, taken.reason), (Outcome::Pass, Some(Reason::NoMatch)));
                }
            }
        }
    }
}

/// Row 20: nor is what the server would send, when it comes from outside.
#[test]
fn a_servers_packet_from_outside_is_no_reply() {
    for hook in INGRESS {
        for &protocol in BOTH {
            let mut rig = Rig::new();
            rig.establish(hook, protocol);
            let forged = FrameSpec { macs: rig.client(protocol).macs, ..rig.server(protocol) };
            let taken = rig.take(hook, Side::External, &forged.bytes());
            assert_eq!((taken.outcome, taken.reason), (Outcome::Pass, Some(Reason::NoMatch)));
        }
    }
}

/// Row 22.
#[test]
fn what_the_host_sends_itself_leaves_as_it_is() {
    for &protocol in BOTH {
        let mut rig = Rig::new();
        rig.establish(Hook::TcIngress, protocol);
        let own = FrameSpec { src: (W, 40_000), ..rig.server(protocol) };
        assert_eq!(rig.take(Hook::TcEgress, Side::External, &own.bytes()).outcome, Outcome::Pass);
    }
}

/// Row 24: what cannot start a connection starts none.
#[test]
fn segments_that_open_nothing_and_belong_to_no_flow_are_dropped() {
    for hook in INGRESS {
        for flags in [0, SYN | ACK, SYN | RST, SYN | FIN, RST, RST | ACK, FIN] {
            let mut rig = Rig::new();
            let frame = FrameSpec { flags, ..rig.client(tcp::NUMBER) }.bytes();
            let taken = rig.take(hook, Side::External, &frame);
            assert_eq!((taken.outcome, taken.reason), (Outcome::Drop, Some(Reason::NoFlow)));
            assert!(rig.flows.half_open.is_empty());
            assert_eq!(dropped(&rig, 0, Reason::NoFlow), 1);
        }
    }
}

/// Row 17.
#[test]
fn whom_the_allow_list_does_not_name_is_dropped_and_counted_for_the_rule() {
    for hook in INGRESS {
        for &protocol in BOTH {
            let mut rig = Rig::new();
            // Another list says nothing about this rule.
            rig.machine.allow.push((2, CLIENT, 32));
            assert_eq!(choose(&mut rig, hook, protocol, CLIENT, 2222), Err(Reason::NotAllowed));
            assert_eq!(dropped(&rig, 4, Reason::NotAllowed), 1);
            assert_eq!(choose(&mut rig, hook, protocol, OTHER_CLIENT, 2222), Ok((SERVER, 22)));
            rig.machine.allow.push((1, [203, 0, 113, 0], 30));
            assert_eq!(choose(&mut rig, hook, protocol, CLIENT, 2222), Ok((SERVER, 22)));
            assert_eq!(dropped(&rig, 4, Reason::NotAllowed), 1);
        }
    }
}

/// Row 31.
#[test]
fn a_rule_is_gone_from_the_nanosecond_of_its_expiry_on() {
    assert_eq!(choice(tcp::NUMBER, 7003), Err(Reason::NoMatch));
    for hook in INGRESS {
        let mut rig = Rig::new();
        let now = rig.machine.now;
        for (expires, choice) in
            [(now - 1, Err(Reason::NoMatch)), (now, Err(Reason::NoMatch)), (now + 1, Ok((SERVER, 80)))]
        {
            rig.machine.rules.get_mut(&0).unwrap().expires = expires;
            assert_eq!(choose(&mut rig, hook, tcp::NUMBER, CLIENT, 8080), choice);
        }
    }
}

/// Row 31.
#[test]
fn a_disabled_or_missing_rule_matches_nothing() {
    for hook in INGRESS {
        let mut rig = Rig::new();
        rig.machine.rules.get_mut(&0).unwrap().flags = 0;
        assert_eq!(choose(&mut rig, hook, tcp::NUMBER, CLIENT, 8080), Err(Reason::NoMatch));
        rig.machine.rules.remove(&0);
        assert_eq!(choose(&mut rig, hook, tcp::NUMBER, CLIENT, 8080), Err(Reason::NoMatch));
    }
}

/// Row 45.
#[test]
fn a_target_without_a_route_or_with_a_wrong_one_gets_nothing() {
    for hook in INGRESS {
        for &protocol in BOTH {
            let mut rig = Rig::new();
            assert_eq!(choose(&mut rig, hook, protocol, CLIENT, 7001), Err(Reason::NoRoute));
            rig.machine.routes.push((NOWHERE, 32, Route::None(Reason::ForwardingOff)));
            assert_eq!(choose(&mut rig, hook, protocol, CLIENT, 7001), Err(Reason::ForwardingOff));
            assert_eq!((dropped(&rig, 6, Reason::NoRoute), dropped(&rig, 6, Reason::ForwardingOff)), (1, 1));
        }
        let mut rig = Rig::new();
        // Where the neighbour has still to be resolved, TC knows the way out all the same.
        let unresolved = if hook == Hook::Xdp { Reason::LeftUnresolved } else { Reason::WrongEgress };
        assert_eq!(choose(&mut rig, hook, tcp::NUMBER, CLIENT, 7002), Err(unresolved));
        let to_client = rig.machine.routes.iter().find(|(network, ..)| *network == CLIENT).unwrap().2;
        rig.machine.routes.insert(0, ([203, 0, 113, 77], 32, to_client));
        assert_eq!(choose(&mut rig, hook, udp::NUMBER, CLIENT, 7002), Err(Reason::WrongEgress));
        // An interface that is neither external nor internal.
        rig.machine.interfaces.remove(&rig.router.lan.0);
        assert_eq!(choose(&mut rig, hook, udp::NUMBER, CLIENT, 8080), Err(Reason::WrongEgress));
    }
}

/// Row 28; design, law 1.
#[test]
fn an_unresolved_neighbour_is_left_to_tc_which_has_the_kernel_resolve_it() {
    for &protocol in BOTH {
        let mut rig = Rig::new();
        let frame = FrameSpec::inward(&rig.router, protocol, (CLIENT, CLIENT_PORT), 7000).bytes();
        let left = rig.take(Hook::Xdp, Side::External, &frame);
        assert_eq!((left.outcome, left.reason), (Outcome::Pass, Some(Reason::LeftUnresolved)));
        assert!(rig.flows.half_open.is_empty() && rig.flows.established.is_empty());

        let sent = rig.take(Hook::TcIngress, Side::External, &frame);
        let Outcome::RedirectNeighbour { ifindex, next_hop } = sent.outcome else { panic!("{sent:?}") };
        assert_eq!((ifindex, next_hop), (rig.router.lan.0, Ipv4::new(SILENT_SERVER).mapped()));
        assert_eq!(sent.reason, Some(Reason::Resolving));
        assert_eq!(sent.bytes[..12], frame[..12], "the kernel writes the MACs");
        assert_eq!(rig.flows.half_open.len(), 2);
    }
}

/// Row 10.
#[test]
fn impossible_sources_are_dropped() {
    for hook in INGRESS {
        for &protocol in BOTH {
            for source in [
                [0, 0, 0, 0],
                [0, 1, 2, 3],
                [127, 0, 0, 1],
                [127, 255, 0, 1],
                [224, 0, 0, 1],
                [239, 1, 2, 3],
                [240, 0, 0, 1],
                [255, 255, 255, 255],
                W,
                // The router's own, another one than the destination.
                GATEWAY,
                // Inside: a known host, a silent one.
                SERVER,
                SILENT_SERVER,
            ] {
                let mut rig = Rig::new();
                let choice = choose(&mut rig, hook, protocol, source, 8080);
                assert_eq!(choice, Err(Reason::Spoofed), "{source:?}");
                let slot = if protocol == tcp::NUMBER { 0 } else { 1 };
                assert_eq!(dropped(&rig, slot, Reason::Spoofed), 1);
            }
        }
    }
}

/// Row 10.
#[test]
fn frames_for_another_station_or_for_many_are_not_forwarded() {
    for station in [[2, 9, 9, 9, 9, 9], [0xff; 6], [1, 0, 0x5e, 0, 0, 1], [2, 1, 0, 0, 0, 3]] {
        assert_left_alone(|frame| frame[..6].copy_from_slice(&station), |_| Reason::OtherStation);
    }
}

fn tag(frame: &mut Vec<u8>, ether_type: [u8; 2], tci: [u8; 2]) {
    frame.splice(12..12, [ether_type, tci].concat());
}

/// Row 10.
#[test]
fn a_priority_tag_is_left_to_tc_which_sees_it_taken_off() {
    for priority in [0, 0x20, 0xe0] {
        let reason = |hook| if hook == Hook::Xdp { Reason::LeftToTc } else { Reason::Vlan };
        assert_left_alone(|frame| tag(frame, [0x81, 0], [priority, 0]), reason);
    }
}

/// Row 10.
#[test]
fn frames_with_another_vlans_tag_are_left_alone() {
    for (ether_type, tci) in
        [([0x81, 0], [0, 5]), ([0x81, 0], [0x21, 0]), ([0x88, 0xa8], [0, 0]), ([0x88, 0xa8], [0, 5])]
    {
        assert_left_alone(|frame| tag(frame, ether_type, tci), |_| Reason::Vlan);
    }
    assert_left_alone(
        |frame| {
            // Cut off behind the tag's type.
            frame.splice(12.., [0x81, 0]);
        },
        |_| Reason::Vlan,
    );
}

/// Row 38: until the controller has described an interface, nothing is done there.
#[test]
fn an_interface_that_is_not_described_is_left_alone() {
    for hook in Hook::ALL {
        for side in [Side::External, Side::Internal] {
            let mut rig = Rig::new();
            let ifindex = rig.router.interface(side).0;
            let frame = match side {
                Side::External => rig.client(tcp::NUMBER).bytes(),
                Side::Internal => rig.server(tcp::NUMBER).bytes(),
            };
            let unknown = (hook != Hook::TcEgress).then_some(Reason::UnknownInterface);
            rig.machine.interfaces.get_mut(&ifindex).unwrap().side = 2;
            assert_eq!(rig.take(hook, side, &frame).reason, unknown);
            rig.machine.interfaces.remove(&ifindex);
            assert_eq!(rig.take(hook, side, &frame).reason, unknown);
        }
    }
}

/// Row 21.
#[test]
fn two_external_ports_to_one_server_port_are_no_obstacle_to_different_client_ports() {
    for hook in INGRESS {
        let mut rig = Rig::new();
        for (port, w_port) in [(5000, 9000), (5001, 9001), (5002, 9000)] {
            let frame = FrameSpec::inward(&rig.router, tcp::NUMBER, (CLIENT, port), w_port).bytes();
            rig.take(hook, Side::External, &frame);
        }
        for (port, w_port) in [(5000, 9000), (5001, 9001), (5002, 9000)] {
            let reply = FrameSpec { flags: SYN | ACK, ..rig.server(tcp::NUMBER) };
            let reply = FrameSpec { src: (SERVER, 9999), dst: (CLIENT, port), ..reply };
            let taken = rig.take(hook, Side::Internal, &reply.bytes());
            assert_eq!(taken.reason, Some(Reason::Forwarded));
            assert_eq!(taken.bytes[26..30], W);
            assert_eq!(taken.bytes[34..36], u16::to_be_bytes(w_port));
        }
    }
}

/// Row 34: while a rule moves to other ports, its line is written before the port map.
#[test]
fn a_port_that_its_rule_has_left_matches_nothing() {
    for hook in INGRESS {
        let mut rig = Rig::new();
        let rule = rig.machine.rules.get_mut(&2).unwrap();
        (rule.external_port, rule.external_last) = (10_050, 10_100);
        assert_eq!(choose(&mut rig, hook, tcp::NUMBER, CLIENT, 10_050), Ok((SERVER, 20_000)));
        for left in [10_000, 10_049] {
            assert_eq!(choose(&mut rig, hook, tcp::NUMBER, CLIENT, left), Err(Reason::NoMatch));
        }
    }
}

/// The external port of a rule with hairpin, and its port at the server.
const MAPPED: (u16, u16) = (10_005, 20_005);

/// Source and destination of a frame.
fn addressed(bytes: &[u8]) -> (([u8; 4], u16), ([u8; 4], u16)) {
    let port = |at: usize| u16::from_be_bytes([bytes[at], bytes[at + 1]]);
    let address = |at: usize| [bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]];
    ((address(26), port(34)), (address(30), port(36)))
}

/// From a host inside to the mapped port.
fn from_inside(rig: &Rig, protocol: u8, client: [u8; 4]) -> FrameSpec {
    FrameSpec::outward(&rig.router, protocol, (client, 5000), (W, MAPPED.0))
}

/// Row 19.
#[test]
fn a_host_inside_talks_to_the_server_as_if_the_router_were_both() {
    for hook in INGRESS {
        for protocol in [tcp::NUMBER, udp::NUMBER] {
            // A neighbour of the server, and the server itself.
            for client in [OTHER_SERVER, SERVER] {
                let mut rig = Rig::new();
                let first = FrameSpec { seq: 1000, ..from_inside(&rig, protocol, client) };
                let inward = rig.take(hook, Side::Internal, &first.bytes());
                assert_eq!(addressed(&inward.bytes), ((W, 5000), (SERVER, MAPPED.1)), "{:?}", inward.reason);

                let answer = FrameSpec { flags: SYN | ACK, seq: SERVER_SEQ, ..first.clone() };
                let answer = FrameSpec { src: (SERVER, MAPPED.1), dst: (W, 5000), ..answer };
                let outward = rig.take(hook, Side::Internal, &answer.bytes());
                assert_eq!(
                    addressed(&outward.bytes),
                    ((W, MAPPED.0), (client, 5000)),
                    "{:?}",
                    outward.reason
                );

                let proof = FrameSpec { flags: ACK, ack: SERVER_SEQ + 1, ..first };
                rig.take(hook, Side::Internal, &proof.bytes());
                assert_eq!((rig.flows.established.len(), rig.flows.half_open.len()), (2, 0));
                let again = rig.take(hook, Side::Internal, &FrameSpec { flags: ACK, ..answer }.bytes());
                assert_eq!(again.reason, Some(Reason::Forwarded));
            }
        }
    }
}

/// Row 19.
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
        let answer =
            FrameSpec { src: (SERVER, MAPPED.1), dst: (W, 5000), ..from_inside(&rig, udp::NUMBER, SERVER) };
        assert_eq!(rig.take(hook, Side::Internal, &answer.bytes()).reason, Some(Reason::Cut));
        assert_eq!(addressed(&rig.take(hook, Side::Internal, &first).bytes).1, (SERVER, MAPPED.1));
        assert_eq!(addressed(&rig.take(hook, Side::Internal, &answer.bytes()).bytes).1, (OTHER_SERVER, 5000));
    }
}

/// Row 19: the rule's word holds for those who use it already.
#[test]
fn a_rule_that_loses_its_hairpin_cuts_the_hosts_inside_and_nobody_else() {
    for hook in INGRESS {
        let mut rig = Rig::new();
        let inside = from_inside(&rig, udp::NUMBER, OTHER_SERVER).bytes();
        let outside = FrameSpec::inward(&rig.router, udp::NUMBER, (CLIENT, CLIENT_PORT), MAPPED.0).bytes();
        rig.take(hook, Side::Internal, &inside);
        rig.take(hook, Side::External, &outside);
        rig.machine.rules.get_mut(&2).unwrap().flags &= !HAIRPIN;
        assert_eq!(rig.take(hook, Side::Internal, &inside).reason, Some(Reason::NoMatch));
        assert_eq!(rig.take(hook, Side::External, &outside).reason, Some(Reason::Forwarded));
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
    let answer =
        FrameSpec { src: (SERVER, MAPPED.1), dst: (W, 5000), ..from_inside(&rig, udp::NUMBER, SERVER) };
    let answer_ended = FrameSpec { ttl: 1, ..answer.clone() }.bytes();
    let answer_long = FrameSpec { payload: vec![0; 1473], dont_fragment: false, ..answer }.bytes();
    rig.take(Hook::TcIngress, Side::Internal, &from_inside(&rig.clone(), udp::NUMBER, OTHER_SERVER).bytes());
    for (frame, reason) in [
        (ended, Reason::TtlExpired),
        (long, Reason::TooBig),
        (answer_ended, Reason::TtlExpired),
        (answer_long, Reason::TooBig),
    ] {
        let taken = rig.take(Hook::TcIngress, Side::Internal, &frame);
        assert_eq!((taken.outcome, taken.reason), (Outcome::Drop, Some(reason)));
    }
}

/// Row 23.
#[test]
fn a_dmz_host_gets_what_no_socket_of_the_host_takes() {
    for hook in INGRESS {
        for protocol in [tcp::NUMBER, udp::NUMBER] {
            let mut rig = Rig::new();
            let (free, listened) = DMZ_PORTS;
            assert_eq!(choose(&mut rig, hook, protocol, CLIENT, free), Ok((SERVER, free)));
            assert_eq!(choose(&mut rig, hook, protocol, CLIENT, listened), Err(Reason::NoMatch));
            // Also of a connection that the host has opened itself.
            let spec = FrameSpec::inward(&rig.router, protocol, (CLIENT, 80), listened);
            let taken = rig.take(hook, Side::External, &FrameSpec { flags: ACK, ..spec }.bytes());
            assert_eq!(taken.reason, Some(Reason::NoMatch));
            rig.machine.sockets.clear();
            assert_eq!(choose(&mut rig, hook, protocol, CLIENT, listened), Ok((SERVER, listened)));
        }
    }
}

#[test]
fn via_the_stack_a_packet_is_translated_at_the_edge_and_the_host_does_the_rest() {
    for protocol in [tcp::NUMBER, udp::NUMBER] {
        let mut rig = Rig::new();
        let client = (CLIENT, CLIENT_PORT);
        let syn = FrameSpec::inward(&rig.router, protocol, client, STACK_PORT).bytes();
        assert_eq!(rig.take(Hook::Xdp, Side::External, &syn).reason, Some(Reason::LeftToTc));
        assert!(rig.flows.half_open.is_empty());
        // The first opens the flow, the second goes its way. The host counts the hop.
        for _ in 0..2 {
            let taken = rig.take(Hook::TcIngress, Side::External, &syn);
            assert_eq!((taken.outcome, taken.reason), (Outcome::Admit, Some(Reason::TranslatedForHost)));
            assert_eq!((taken.bytes[22], &taken.bytes[30..34]), (syn[22], &SERVER[..]));
            assert_eq!(rig.take(Hook::Xdp, Side::External, &syn).reason, Some(Reason::LeftToTc));
        }
        let reply = FrameSpec::outward(&rig.router, protocol, (SERVER, STACK_PORT), client);
        let reply = FrameSpec { flags: SYN | ACK, ack: 1001, ..reply }.bytes();
        assert_eq!(rig.take(Hook::TcIngress, Side::Internal, &reply).reason, Some(Reason::LeftToStack));
        let left = rig.take(Hook::TcEgress, Side::External, &reply);
        assert_eq!((left.outcome, &left.bytes[26..30]), (Outcome::Continue, &W[..]));
        // Hosts inside are the host's own affair.
        let inside = FrameSpec {
            macs: (rig.router.lan.1, SERVER_MAC),
            ..FrameSpec::inward(&rig.router, protocol, (OTHER_SERVER, 4000), STACK_PORT)
        };
        assert_eq!(rig.take(Hook::TcIngress, Side::Internal, &inside.bytes()).reason, Some(Reason::NoMatch));
    }
}
