//! Limits of a rule. The scenario's limited rule takes two sessions at once, one of each source; its
//! slow one a new session a second.

#![allow(clippy::unwrap_used, reason = "clippy knows the test functions, but not their helpers")]

mod common;

use common::*;
use forwarder_common::{
    address::{Address as _, Ipv6},
    flow::{INWARD, Side},
    layout::Hook,
    model::scenario::{CLIENT, FrameSpec, LIMITED_PORTS, OTHER_CLIENT, SERVER, SLOW_PORT, tcp_flags::*},
    reason::{Reason, Verdict},
    wire::{tcp, udp},
};

const THIRD_CLIENT: [u8; 4] = [203, 0, 113, 4];
const PROTOCOLS: [u8; 2] = [tcp::NUMBER, udp::NUMBER];

/// One client's session with the limited rule, step by step.
#[derive(Clone, Copy)]
struct Session {
    protocol: u8,
    client: ([u8; 4], u16),
    hook: Hook,
}

impl Session {
    fn of(protocol: u8, client: [u8; 4], hook: Hook) -> Self {
        Self { protocol, client: (client, CLIENT_PORT), hook }
    }

    fn inward(&self, rig: &mut Rig, flags: u8, seq: u32, ack: u32) -> Option<Reason> {
        let spec = FrameSpec::inward(&rig.router, self.protocol, self.client, LIMITED_PORTS.0);
        let frame = FrameSpec { flags, seq, ack, ..spec }.bytes();
        rig.take(self.hook, Side::External, &frame).reason
    }

    fn outward(&self, rig: &mut Rig, flags: u8, seq: u32, ack: u32) -> Option<Reason> {
        let spec = FrameSpec::outward(&rig.router, self.protocol, (SERVER, LIMITED_PORTS.0), self.client);
        let frame = FrameSpec { flags, seq, ack, ..spec }.bytes();
        rig.take(self.hook, Side::Internal, &frame).reason
    }

    fn open(&self, rig: &mut Rig) -> Option<Reason> {
        self.inward(rig, SYN, 1000, 0)
    }

    fn answer(&self, rig: &mut Rig) -> Option<Reason> {
        self.outward(rig, SYN | ACK, SERVER_SEQ, 1001)
    }

    fn prove(&self, rig: &mut Rig) -> Option<Reason> {
        self.inward(rig, ACK, 1001, SERVER_SEQ + 1)
    }

    /// Why the first step that does not go on does not.
    fn establish(&self, rig: &mut Rig) -> Result<(), Reason> {
        for step in [Self::open, Self::answer, Self::prove] {
            match step(self, rig) {
                Some(reason) if reason.verdict() != Verdict::Forward => return Err(reason),
                _ => {}
            }
        }
        Ok(())
    }
}

fn dropped(rig: &Rig, reason: Reason) -> u64 {
    rig.counts.rules.values().map(|rule| rule.dropped[reason as usize - Reason::FIRST_DROP]).sum()
}

/// What the counts say of all sources, over both protocols.
fn counted(rig: &Rig) -> i64 {
    rig.flows.sessions.iter().filter(|(key, _)| key.source == Ipv6::UNSPECIFIED).map(|(_, n)| n).sum()
}

/// A rule without the limit for each source.
fn of_two(rig: &mut Rig) {
    let rules = rig.machine.rules.values_mut();
    rules.filter(|rule| rule.max_sessions == 2).for_each(|rule| rule.max_sessions_per_source = 0);
}

/// Row 18.
#[test]
fn a_rule_takes_as_many_sessions_as_it_may_and_drops_the_next() {
    for hook in INGRESS {
        for protocol in PROTOCOLS {
            let mut rig = Rig::new();
            of_two(&mut rig);
            for client in [CLIENT, OTHER_CLIENT] {
                Session::of(protocol, client, hook).establish(&mut rig).unwrap();
            }
            let third = Session::of(protocol, THIRD_CLIENT, hook);
            assert_eq!(third.open(&mut rig), Some(Reason::SessionLimit));
            assert!(rig.flows.half_open.is_empty(), "it is as if it had not come");
            assert_eq!((dropped(&rig, Reason::SessionLimit), counted(&rig)), (1, 2));
            // Who is in goes on.
            let first = Session::of(protocol, CLIENT, hook);
            assert_eq!(first.prove(&mut rig), Some(Reason::Forwarded));
            // Both protocols are one rule's.
            let other = if protocol == tcp::NUMBER { udp::NUMBER } else { tcp::NUMBER };
            let third = Session::of(other, THIRD_CLIENT, hook);
            assert_eq!(third.open(&mut rig), Some(Reason::SessionLimit));
        }
    }
}

/// Row 18.
#[test]
fn a_source_takes_as_many_sessions_as_it_may_and_no_place_of_another() {
    for hook in INGRESS {
        let mut rig = Rig::new();
        Session::of(tcp::NUMBER, CLIENT, hook).establish(&mut rig).unwrap();
        let second = Session { client: (CLIENT, 6000), ..Session::of(tcp::NUMBER, CLIENT, hook) };
        assert_eq!(second.open(&mut rig), Some(Reason::SourceLimit));
        assert_eq!(Session::of(udp::NUMBER, CLIENT, hook).open(&mut rig), Some(Reason::SourceLimit));
        assert_eq!(counted(&rig), 1);
        Session::of(tcp::NUMBER, OTHER_CLIENT, hook).establish(&mut rig).unwrap();
    }
}

/// Row 18; design, law 6.
#[test]
fn what_is_half_open_takes_no_place() {
    for hook in INGRESS {
        let mut rig = Rig::new();
        of_two(&mut rig);
        for port in 0..100 {
            let spoofed = Session { protocol: tcp::NUMBER, client: (THIRD_CLIENT, 1024 + port), hook };
            assert_eq!(spoofed.open(&mut rig).map(Reason::verdict), Some(Verdict::Forward));
            spoofed.answer(&mut rig);
            // Whoever has not seen the answer does not know its number.
            spoofed.inward(&mut rig, ACK, 1001, 7);
            let datagram = Session { protocol: udp::NUMBER, ..spoofed };
            datagram.open(&mut rig);
            datagram.open(&mut rig);
        }
        assert_eq!(counted(&rig), 0);
        for client in [CLIENT, OTHER_CLIENT] {
            Session::of(tcp::NUMBER, client, hook).establish(&mut rig).unwrap();
        }
    }
}

/// Row 18: between its first packet and its proof others have taken the last place.
#[test]
fn a_session_that_finds_no_room_at_its_proof_waits_for_it() {
    for hook in INGRESS {
        for protocol in PROTOCOLS {
            let mut rig = Rig::new();
            of_two(&mut rig);
            let late = Session::of(protocol, THIRD_CLIENT, hook);
            late.open(&mut rig);
            late.answer(&mut rig);
            let [first, second] = [CLIENT, OTHER_CLIENT].map(|client| Session::of(tcp::NUMBER, client, hook));
            first.establish(&mut rig).unwrap();
            second.establish(&mut rig).unwrap();
            for _ in 0..3 {
                assert_eq!(late.prove(&mut rig), Some(Reason::SessionLimit));
            }
            assert_eq!(counted(&rig), 2);
            first.inward(&mut rig, RST, 1001, 0);
            assert_eq!(late.prove(&mut rig), Some(Reason::Forwarded));
            assert_eq!(counted(&rig), 2);
        }
    }
}

/// Row 18: whom there was no room for may still hang up.
#[test]
fn a_reset_of_a_session_without_room_arrives() {
    for hook in INGRESS {
        let mut rig = Rig::new();
        let late = Session { client: (CLIENT, 6000), ..Session::of(tcp::NUMBER, CLIENT, hook) };
        late.open(&mut rig);
        late.answer(&mut rig);
        Session::of(tcp::NUMBER, CLIENT, hook).establish(&mut rig).unwrap();
        assert_eq!(late.prove(&mut rig), Some(Reason::SourceLimit));
        assert_eq!(late.inward(&mut rig, RST, 1001, 0), Some(Reason::Forwarded));
        assert_eq!(counted(&rig), 1);
    }
}

/// Row 18.
#[test]
fn a_session_that_has_ended_leaves_room_at_once_and_once() {
    let by_rst: &[(bool, u8)] = &[(true, RST), (true, RST), (false, RST | ACK)];
    let by_fins: &[(bool, u8)] = &[(true, FIN | ACK), (false, FIN | ACK), (false, FIN | ACK), (true, RST)];
    for hook in INGRESS {
        for ending in [by_rst, by_fins] {
            let mut rig = Rig::new();
            let [first, second] = [CLIENT, OTHER_CLIENT].map(|client| Session::of(tcp::NUMBER, client, hook));
            first.establish(&mut rig).unwrap();
            second.establish(&mut rig).unwrap();
            for &(inward, flags) in ending {
                match inward {
                    true => first.inward(&mut rig, flags, 1001, SERVER_SEQ + 1),
                    false => first.outward(&mut rig, flags, SERVER_SEQ + 1, 1002),
                };
            }
            assert_eq!(counted(&rig), 1);
            Session::of(tcp::NUMBER, THIRD_CLIENT, hook).establish(&mut rig).unwrap();
            assert_eq!(Session::of(tcp::NUMBER, CLIENT, hook).open(&mut rig), Some(Reason::SessionLimit));
        }
    }
}

/// Row 18: a rule's counts belong to its epoch.
#[test]
fn what_is_cut_leaves_room_at_once() {
    for hook in INGRESS {
        let mut rig = Rig::new();
        for client in [CLIENT, OTHER_CLIENT] {
            Session::of(tcp::NUMBER, client, hook).establish(&mut rig).unwrap();
        }
        let rules = rig.machine.rules.values_mut();
        rules.filter(|rule| rule.max_sessions != 0).for_each(|rule| rule.tcp_epoch += 1000);
        for client in [CLIENT, OTHER_CLIENT] {
            let again = Session { client: (client, 6000), ..Session::of(tcp::NUMBER, client, hook) };
            again.establish(&mut rig).unwrap();
        }
        assert_eq!(Session::of(tcp::NUMBER, THIRD_CLIENT, hook).open(&mut rig), Some(Reason::SessionLimit));
    }
}

/// Row 18: a session that could not be counted is not a session.
#[test]
fn with_the_established_table_full_nothing_is_counted() {
    for hook in INGRESS {
        let mut rig = Rig::new();
        rig.flows.capacity = 3;
        let session = Session::of(udp::NUMBER, CLIENT, hook);
        rig.establish(hook, tcp::NUMBER);
        assert_eq!(session.establish(&mut rig), Err(Reason::TableFull));
        assert_eq!(counted(&rig), 0);
        rig.flows.capacity = 10;
        assert_eq!(session.prove(&mut rig), Some(Reason::Forwarded));
        assert_eq!(counted(&rig), 1);
        let both = rig.flows.established.values().filter(|flow| flow.direction == INWARD).count();
        assert_eq!(both, 2);
    }
}

/// Row 18: all of a second's at once, or one by one; what was not taken is not saved up.
#[test]
fn a_rule_takes_as_many_new_sessions_a_second_as_it_may() {
    for hook in INGRESS {
        for protocol in PROTOCOLS {
            for per_second in [1, 3, 7, 1000] {
                let mut rig = Rig::new();
                let rules = rig.machine.rules.values_mut();
                rules
                    .filter(|rule| rule.new_per_second != 0)
                    .for_each(|rule| rule.new_per_second = per_second);
                let mut port = 1024;
                let mut open = |rig: &mut Rig, at_most: u32| {
                    (0..at_most + 5)
                        .filter(|_| {
                            port += 1;
                            let spec = FrameSpec::inward(&rig.router, protocol, (CLIENT, port), SLOW_PORT);
                            let taken = rig.take(hook, Side::External, &spec.bytes());
                            taken.reason != Some(Reason::RateLimit)
                        })
                        .count() as u32
                };
                rig.flows.capacity = 100_000;
                assert_eq!(open(&mut rig, per_second), per_second);
                assert_eq!(open(&mut rig, 0), 0);
                rig.machine.now += 1_000_000_000 / u64::from(per_second);
                assert_eq!(open(&mut rig, 1), 1, "{per_second}");
                rig.machine.now += 60_000_000_000;
                assert_eq!(open(&mut rig, per_second), per_second);
            }
        }
    }
}

/// Row 18: what belongs to a flow opens none.
#[test]
fn a_repeated_syn_takes_no_second_turn() {
    for hook in INGRESS {
        let mut rig = Rig::new();
        let syn = FrameSpec::inward(&rig.router, tcp::NUMBER, (CLIENT, 6000), SLOW_PORT).bytes();
        for _ in 0..5 {
            assert_eq!(
                rig.take(hook, Side::External, &syn).reason.map(Reason::verdict),
                Some(Verdict::Forward)
            );
        }
        let other = FrameSpec::inward(&rig.router, tcp::NUMBER, (CLIENT, 6001), SLOW_PORT).bytes();
        assert_eq!(rig.take(hook, Side::External, &other).reason, Some(Reason::RateLimit));
        assert_eq!(dropped(&rig, Reason::RateLimit), 1);
    }
}

/// Row 18; design, law 6: whoever has an IPv6 address has its whole /64.
#[test]
fn in_ipv6_a_source_is_a_64() {
    for hook in INGRESS {
        let mut rig = Rig::new();
        let ipv6 = Some(Vec::new());
        let port = LIMITED_PORTS.0;
        let client = |rig: &Rig, address| {
            let spec = FrameSpec::inward(&rig.router, udp::NUMBER, (address, CLIENT_PORT), port);
            FrameSpec { ipv6: ipv6.clone(), ..spec }.bytes()
        };
        let server = FrameSpec::outward(&rig.router, udp::NUMBER, (SERVER, port), (CLIENT, CLIENT_PORT));
        let answer = FrameSpec { ipv6: ipv6.clone(), ..server }.bytes();
        let question = client(&rig, CLIENT);
        for (side, frame) in
            [(Side::External, &question), (Side::Internal, &answer), (Side::External, &question)]
        {
            let taken = rig.take(hook, side, frame);
            assert_eq!(taken.reason.map(Reason::verdict), Some(Verdict::Forward), "{taken:?}");
        }
        assert_eq!(rig.flows_ipv6.established.len(), 2);
        // The twins of IPv4 addresses lie within one /64.
        let neighbour = client(&rig, OTHER_CLIENT);
        assert_eq!(rig.take(hook, Side::External, &neighbour).reason, Some(Reason::SourceLimit));
    }
}

/// A target may take a RST for none of its connection that the router takes for one.
#[test]
fn a_session_that_has_left_its_place_does_not_go_on_without() {
    for hook in INGRESS {
        let mut rig = Rig::new();
        let session = Session::of(tcp::NUMBER, CLIENT, hook);
        session.establish(&mut rig).unwrap();
        session.inward(&mut rig, RST, 1000, 0);
        assert_eq!(session.prove(&mut rig), Some(Reason::NoFlow));
        session.inward(&mut rig, RST, 1001, 0);
        // Begun anew, it has its place again.
        session.establish(&mut rig).unwrap();
        assert_eq!(session.prove(&mut rig), Some(Reason::Forwarded));
    }
}
