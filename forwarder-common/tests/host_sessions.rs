//! Who was there first keeps the port: sessions of the host itself from ports that rules map (row 22).

#![allow(clippy::unwrap_used, reason = "clippy knows the test functions, but not their helpers")]

mod common;

use common::*;
use forwarder_common::{
    flow::Side,
    layout::Hook,
    model::scenario::{CLIENT, DMZ_PORTS, FrameSpec, OTHER_CLIENT, W, tcp_flags::*},
    pipeline::Outcome,
    reason::Reason,
    wire::{tcp, udp},
};

/// A port of a range, and what the host talks to from there.
const PORT: u16 = 10_005;
const PEER: ([u8; 4], u16) = (CLIENT, 443);

/// What the host, or its NAT, sends from a port of W.
fn own(rig: &Rig, protocol: u8, port: u16) -> FrameSpec {
    FrameSpec { flags: SYN, ..FrameSpec::outward(&rig.router, protocol, (W, port), PEER) }
}

/// What comes to a port of W.
fn incoming(rig: &mut Rig, hook: Hook, protocol: u8, from: ([u8; 4], u16), port: u16) -> Option<Reason> {
    let spec = FrameSpec { flags: SYN | ACK, ..FrameSpec::inward(&rig.router, protocol, from, port) };
    rig.take(hook, Side::External, &spec.bytes()).reason
}

#[test]
fn the_hosts_own_session_from_a_mapped_port_gets_its_answers_and_the_rule_all_else() {
    for protocol in [tcp::NUMBER, udp::NUMBER] {
        for hook in INGRESS {
            let mut rig = Rig::new();
            let frame = own(&rig, protocol, PORT).bytes();
            assert_eq!(rig.take(Hook::TcEgress, Side::External, &frame).outcome, Outcome::Pass);
            assert_eq!(incoming(&mut rig, hook, protocol, PEER, PORT), Some(Reason::HostSession));
            assert!(rig.flows.half_open.is_empty());
            for (from, port) in [((CLIENT, 444), PORT), ((OTHER_CLIENT, 443), PORT), (PEER, PORT + 1)] {
                let spec = FrameSpec { flags: SYN, ..FrameSpec::inward(&rig.router, protocol, from, port) };
                let taken = rig.take(hook, Side::External, &spec.bytes());
                assert!(rig.flows.half_open.len() >= 2 || hook == Hook::Xdp, "{taken:?}");
                assert_ne!(taken.reason, Some(Reason::HostSession));
            }
        }
    }
}

#[test]
fn what_the_host_sends_from_other_ports_is_not_noted() {
    let mut rig = Rig::new();
    let frame = own(&rig, tcp::NUMBER, 30_000).bytes();
    rig.take(Hook::TcEgress, Side::External, &frame);
    assert!(rig.flows.host_sessions.is_empty());
    // Nor is what was to be translated.
    rig.machine.marked = true;
    let frame = own(&rig, tcp::NUMBER, PORT).bytes();
    rig.take(Hook::TcEgress, Side::External, &frame);
    assert!(rig.flows.host_sessions.is_empty());
}

#[test]
fn a_flow_that_was_there_first_keeps_its_packets() {
    let mut rig = Rig::new();
    rig.establish(Hook::TcIngress, udp::NUMBER);
    let spec = FrameSpec::outward(&rig.router, udp::NUMBER, (W, W_PORT), (CLIENT, CLIENT_PORT));
    rig.take(Hook::TcEgress, Side::External, &spec.bytes());
    assert!(rig.flows.host_sessions.is_empty());
    let taken = rig.take(Hook::TcIngress, Side::External, &rig.client(udp::NUMBER).bytes());
    assert_eq!(taken.reason, Some(Reason::Forwarded));
}

#[test]
fn an_idle_session_of_the_host_gives_its_port_up() {
    for (protocol, seconds) in [(tcp::NUMBER, 7440), (udp::NUMBER, 300)] {
        let mut rig = Rig::new();
        let idle = seconds * 1_000_000_000;
        let frame = own(&rig, protocol, PORT).bytes();
        rig.take(Hook::TcEgress, Side::External, &frame);
        // Packets of both directions count.
        rig.machine.now += idle - 1;
        rig.take(Hook::TcEgress, Side::External, &frame);
        rig.machine.now += idle - 1;
        assert_eq!(incoming(&mut rig, Hook::Xdp, protocol, PEER, PORT), Some(Reason::HostSession));
        rig.machine.now += idle - 1;
        assert_eq!(incoming(&mut rig, Hook::Xdp, protocol, PEER, PORT), Some(Reason::HostSession));
        rig.machine.now += idle;
        assert_ne!(incoming(&mut rig, Hook::Xdp, protocol, PEER, PORT), Some(Reason::HostSession));
    }
}

/// Else a stranger who knows whom the host talks to could have the answers with one packet.
#[test]
fn a_packet_of_anybody_does_not_take_the_answers_to_the_host() {
    for protocol in [tcp::NUMBER, udp::NUMBER] {
        let mut rig = Rig::new();
        let spoofed = FrameSpec::inward(&rig.router, protocol, PEER, PORT).bytes();
        rig.take(Hook::TcIngress, Side::External, &spoofed);
        assert_eq!(rig.flows.half_open.len(), 2);
        let frame = own(&rig, protocol, PORT).bytes();
        rig.take(Hook::TcEgress, Side::External, &frame);
        assert_eq!(incoming(&mut rig, Hook::TcIngress, protocol, PEER, PORT), Some(Reason::HostSession));
        assert!(rig.flows.half_open.is_empty());
    }
}

#[test]
fn what_the_host_refuses_or_sends_while_no_rule_is_open_is_not_noted() {
    let mut rig = Rig::new();
    let refusal = FrameSpec { flags: RST | ACK, ..own(&rig, tcp::NUMBER, PORT) }.bytes();
    rig.take(Hook::TcEgress, Side::External, &refusal);
    // Of a rule that has expired.
    let frame = own(&rig, tcp::NUMBER, 7003).bytes();
    rig.take(Hook::TcEgress, Side::External, &frame);
    assert!(rig.flows.host_sessions.is_empty());
}

/// They would drive out what hangs on being noted: the sessions of the host's NAT.
#[test]
fn beside_a_dmz_host_the_hosts_sockets_are_not_noted() {
    for protocol in [tcp::NUMBER, udp::NUMBER] {
        let mut rig = Rig::new();
        for (port, noted) in [(DMZ_PORTS.1, 0), (DMZ_PORTS.0, 1)] {
            let frame = own(&rig, protocol, port).bytes();
            rig.take(Hook::TcEgress, Side::External, &frame);
            assert_eq!(rig.flows.host_sessions.len(), noted, "{port}");
        }
    }
}
