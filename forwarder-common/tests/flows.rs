//! The life of a flow: half-open, established, closing, cut.

#![allow(clippy::unwrap_used, reason = "clippy knows the test functions, but not their helpers")]

mod common;

use common::*;
use forwarder_common::{
    address::{Address as _, Ipv4, Ipv6, Port},
    decide::{Core, Scratch},
    flow::{FIN_INWARD, FIN_OUTWARD, Flow, FlowKey, INWARD, OUTWARD, RESET, Side, Tuple, is_closing},
    fragment::{FragmentKey, HeldKey, Train},
    layout::Hook,
    model::{
        At, Counts, Frame, Machine, Tables,
        scenario::{CLIENT, FrameSpec, LIMITED_PORTS, OTHER_CLIENT, OTHER_SERVER, SERVER, tcp_flags::*},
    },
    pipeline::{self, Outcome, Seen},
    reason::{Reason, Verdict},
    rule::ONE_TARGET_PORT,
    sessions::{Sessions, SessionsKey},
    tables::{Flows, Refused, Stage},
    wire::{tcp, udp},
};
use proptest::prelude::*;

const PROTOCOLS: [u8; 2] = [tcp::NUMBER, udp::NUMBER];

/// The client's segment to W:8080.
fn from_client(rig: &mut Rig, hook: Hook, flags: u8, seq: u32, ack: u32) -> Taken {
    let frame = FrameSpec { flags, seq, ack, ..rig.client(tcp::NUMBER) };
    rig.take(hook, Side::External, &frame.bytes())
}

/// The server's segment to it.
fn from_server(rig: &mut Rig, hook: Hook, flags: u8, seq: u32, ack: u32) -> Taken {
    let frame = FrameSpec { flags, seq, ack, ..rig.server(tcp::NUMBER) };
    rig.take(hook, Side::Internal, &frame.bytes())
}

fn is_forwarded(taken: &Taken) -> bool {
    taken.reason.map(Reason::verdict) == Some(Verdict::Forward)
}

/// Entries of the established table, of the half-open table.
fn entries(rig: &Rig) -> (usize, usize) {
    (rig.flows.established.len(), rig.flows.half_open.len())
}

fn sessions(rig: &Rig) -> u64 {
    rig.counts.rules.values().map(|rule| rule.sessions).sum()
}

/// Where a translated packet goes.
fn target(taken: &Taken) -> ([u8; 4], u16) {
    assert!(is_forwarded(taken), "{taken:?}");
    let b = &taken.bytes;
    ([b[30], b[31], b[32], b[33]], u16::from_be_bytes([b[36], b[37]]))
}

/// The `ended` bits of the only flow: of its inward entry, of its outward one.
fn ended(rig: &Rig) -> (u8, u8) {
    let of = |direction| {
        let mut flows = rig.flows.established.values().chain(rig.flows.half_open.values());
        flows.find(|flow| flow.direction == direction).unwrap().ended
    };
    (of(INWARD), of(OUTWARD))
}

/// Design, law 5: a flow has both its entries, in one table, and each undoes what the other does.
/// What is left of a cut flow does nothing any more but keep its server quiet.
fn assert_whole(machine: &Machine, flows: &Tables) {
    for (table, other_table) in
        [(&flows.established, &flows.half_open), (&flows.half_open, &flows.established)]
    {
        for (key, flow) in table.iter().filter(|(key, flow)| is_live(machine, key, flow)) {
            let other_key = flow.other_key(key);
            let other = table.get(&other_key).unwrap_or_else(|| panic!("half of a flow: {key:?} {flow:?}"));
            assert_eq!(other.other_key(&other_key), *key);
            assert_eq!((flow.rule, flow.epoch, flow.created), (other.rule, other.epoch, other.created));
            assert_eq!(flow.direction + other.direction, INWARD + OUTWARD);
            assert!(!other_table.contains_key(key), "in both tables: {key:?}");
        }
    }
}

fn is_live(machine: &Machine, key: &FlowKey<Ipv4>, flow: &Flow<Ipv4>) -> bool {
    machine.rules.get(&flow.rule).is_some_and(|rule| rule.carries(key.protocol, flow.epoch, machine.now))
}

/// Row 24.
#[test]
fn tcp_is_half_open_until_the_clients_ack_fits_the_servers_syn_ack() {
    for hook in INGRESS {
        let mut rig = Rig::new();
        assert!(is_forwarded(&from_client(&mut rig, hook, SYN, 1000, 0)));
        assert!(is_forwarded(&from_server(&mut rig, hook, SYN | ACK, SERVER_SEQ, 1001)));
        assert_eq!((entries(&rig), sessions(&rig)), ((0, 2), 0));
        assert!(is_forwarded(&from_client(&mut rig, hook, ACK, 1001, SERVER_SEQ + 1)));
        assert_eq!((entries(&rig), sessions(&rig)), ((2, 0), 1));
        assert_whole(&rig.machine, &rig.flows);
    }
}

/// Row 24, where the server's sequence number wraps around.
#[test]
fn an_ack_fits_across_the_end_of_the_sequence_numbers() {
    let mut rig = Rig::new();
    from_client(&mut rig, Hook::Xdp, SYN, 1000, 0);
    from_server(&mut rig, Hook::Xdp, SYN | ACK, u32::MAX, 1001);
    from_client(&mut rig, Hook::Xdp, ACK, 1001, 0);
    assert_eq!(entries(&rig), (2, 0));
}

/// Row 29; design, law 6: established has to be earned.
#[test]
fn a_spoofed_ack_does_not_make_a_flow_established() {
    for hook in INGRESS {
        let mut rig = Rig::new();
        from_client(&mut rig, hook, SYN, 1000, 0);
        // Before any answer, not even what the entry starts with fits.
        for ack in [0, 1, 1001] {
            assert!(is_forwarded(&from_client(&mut rig, hook, ACK, 1001, ack)));
        }
        // Nothing but a SYN-ACK is an answer.
        for flags in [ACK, ACK | FIN, SYN] {
            from_server(&mut rig, hook, flags, SERVER_SEQ, 1001);
            assert!(is_forwarded(&from_client(&mut rig, hook, ACK, 1001, SERVER_SEQ + 1)));
        }
        assert_eq!((entries(&rig), sessions(&rig)), ((0, 2), 0));

        from_server(&mut rig, hook, SYN | ACK, SERVER_SEQ, 1001);
        for ack in [SERVER_SEQ, SERVER_SEQ + 2, SERVER_SEQ.wrapping_sub(1), 0, 1, !SERVER_SEQ] {
            assert!(is_forwarded(&from_client(&mut rig, hook, ACK, 1001, ack)));
        }
        for flags in [0, SYN, SYN | ACK] {
            assert!(is_forwarded(&from_client(&mut rig, hook, flags, 1001, SERVER_SEQ + 1)));
        }
        assert_eq!((entries(&rig), sessions(&rig)), ((0, 2), 0));
        from_client(&mut rig, hook, ACK, 1001, SERVER_SEQ + 1);
        assert_eq!((entries(&rig), sessions(&rig)), ((2, 0), 1));
    }
}

/// Row 24.
#[test]
fn retransmissions_of_the_handshake_arrive_and_make_one_flow() {
    for hook in INGRESS {
        let mut rig = Rig::new();
        for _ in 0..3 {
            assert!(is_forwarded(&from_client(&mut rig, hook, SYN, 1000, 0)));
            assert_eq!(entries(&rig), (0, 2));
        }
        for _ in 0..3 {
            assert!(is_forwarded(&from_server(&mut rig, hook, SYN | ACK, SERVER_SEQ, 1001)));
            assert_eq!(entries(&rig), (0, 2));
        }
        // A SYN that overtook its answer.
        assert!(is_forwarded(&from_client(&mut rig, hook, SYN, 1000, 0)));
        for _ in 0..3 {
            assert!(is_forwarded(&from_client(&mut rig, hook, ACK, 1001, SERVER_SEQ + 1)));
            assert_eq!(entries(&rig), (2, 0));
        }
        // The server has not seen the ACK.
        assert!(is_forwarded(&from_server(&mut rig, hook, SYN | ACK, SERVER_SEQ, 1001)));
        assert!(is_forwarded(&from_client(&mut rig, hook, ACK, 1001, SERVER_SEQ + 1)));
        assert_eq!((entries(&rig), sessions(&rig)), ((2, 0), 1));
    }
}

/// Row 24.
#[test]
fn a_flow_is_closing_after_a_fin_from_each_side() {
    for hook in INGRESS {
        for client_first in [true, false] {
            let mut rig = Rig::new();
            rig.establish(hook, tcp::NUMBER);
            let client = |rig: &mut Rig, flags| from_client(rig, hook, flags, 1001, SERVER_SEQ + 1);
            let server = |rig: &mut Rig, flags| from_server(rig, hook, flags, SERVER_SEQ + 1, 1001);
            let (first, bit) = if client_first {
                (client(&mut rig, FIN | ACK), FIN_INWARD)
            } else {
                (server(&mut rig, FIN | ACK), FIN_OUTWARD)
            };
            assert!(is_forwarded(&first));
            assert_eq!(ended(&rig), (bit, bit));
            assert!(!is_closing(bit));
            // Half closed: everything else goes on, both ways.
            for _ in 0..3 {
                assert!(is_forwarded(&client(&mut rig, ACK)) && is_forwarded(&server(&mut rig, ACK)));
            }
            // A SYN meets the connection that is still there.
            assert!(is_forwarded(&client(&mut rig, SYN)));
            assert_eq!((entries(&rig), ended(&rig)), ((2, 0), (bit, bit)));

            let second = if client_first { server(&mut rig, FIN | ACK) } else { client(&mut rig, FIN | ACK) };
            assert!(is_forwarded(&second));
            assert_eq!(ended(&rig), (FIN_INWARD | FIN_OUTWARD, FIN_INWARD | FIN_OUTWARD));
            // The last ACK, and its retransmission.
            for _ in 0..2 {
                assert!(is_forwarded(&client(&mut rig, ACK)) && is_forwarded(&server(&mut rig, ACK)));
            }
            assert_eq!(entries(&rig), (2, 0));
        }
    }
}

/// Row 24.
#[test]
fn a_rst_from_either_side_makes_a_flow_closing() {
    for hook in INGRESS {
        for (from_inside, established) in [(false, true), (true, true), (false, false), (true, false)] {
            let mut rig = Rig::new();
            if established {
                rig.establish(hook, tcp::NUMBER);
            } else {
                from_client(&mut rig, hook, SYN, 1000, 0);
            }
            let taken = if from_inside {
                from_server(&mut rig, hook, RST | ACK, SERVER_SEQ + 1, 1001)
            } else {
                from_client(&mut rig, hook, RST | ACK, 1001, SERVER_SEQ + 1)
            };
            assert!(is_forwarded(&taken));
            assert_eq!(ended(&rig), (RESET, RESET));
        }
    }
}

/// Row 24; RFC 9293 figure 7: both ends open at once, the client's SYN first.
#[test]
fn a_simultaneous_open_becomes_established() {
    for hook in INGRESS {
        let mut rig = Rig::new();
        assert!(is_forwarded(&from_client(&mut rig, hook, SYN, 1000, 0)));
        assert!(is_forwarded(&from_server(&mut rig, hook, SYN, SERVER_SEQ, 0)));
        assert!(is_forwarded(&from_client(&mut rig, hook, SYN | ACK, 1000, SERVER_SEQ + 1)));
        assert!(is_forwarded(&from_server(&mut rig, hook, SYN | ACK, SERVER_SEQ, 1001)));
        assert_eq!(entries(&rig), (0, 2));
        assert!(is_forwarded(&from_client(&mut rig, hook, ACK, 1001, SERVER_SEQ + 1)));
        assert_eq!((entries(&rig), sessions(&rig)), ((2, 0), 1));
        assert_whole(&rig.machine, &rig.flows);
    }
}

/// Row 24; RFC 5961: whoever knows no more than addresses and ports does not end a connection.
#[test]
fn a_rst_or_fin_far_from_the_connection_arrives_and_ends_nothing() {
    const FAR: u32 = 1 << 17;
    for hook in INGRESS {
        for flags in [RST, RST | ACK, FIN | ACK] {
            for far in [FAR, 1 << 31, 0_u32.wrapping_sub(FAR)] {
                let mut rig = Rig::new();
                rig.establish(hook, tcp::NUMBER);
                let seq = 1001_u32.wrapping_add(far);
                assert!(is_forwarded(&from_client(&mut rig, hook, flags, seq, SERVER_SEQ + 1)));
                let seq = (SERVER_SEQ + 1).wrapping_add(far);
                assert!(is_forwarded(&from_server(&mut rig, hook, flags, seq, 1001)));
                assert_eq!(ended(&rig), (0, 0), "{flags:#x} {far}");
            }
        }
    }
}

/// Row 24: nor can anybody drive the window away, to where he then stands with a RST.
#[test]
fn segments_far_from_the_connection_do_not_move_its_window() {
    for hook in INGRESS {
        let mut rig = Rig::new();
        rig.establish(hook, tcp::NUMBER);
        let far = 1001 + (1 << 30);
        for _ in 0..3 {
            assert!(is_forwarded(&from_client(&mut rig, hook, ACK, far, SERVER_SEQ + far)));
        }
        // Nor by a sweep through all numbers, of which one is near.
        for sweep in 0..4096_u32 {
            from_client(&mut rig, hook, ACK, sweep << 20, 3_000_000_000);
            from_client(&mut rig, hook, 0, sweep << 20, 0);
        }
        from_client(&mut rig, hook, RST, 4095 << 20, 0);
        from_client(&mut rig, hook, RST, far, 0);
        from_server(&mut rig, hook, RST, SERVER_SEQ + far, 0);
        assert_eq!(ended(&rig), (0, 0));
        // The connection itself goes on, also by leaps of a large window, and is ended by its ends.
        let mut seq = 1001;
        for _ in 0..20 {
            seq += 1 << 20;
            assert!(is_forwarded(&from_client(&mut rig, hook, ACK, seq, SERVER_SEQ + 1)));
        }
        from_client(&mut rig, hook, RST, seq, 0);
        assert_eq!(ended(&rig), (RESET, RESET));
    }
}

/// A segment of a connection that was opened before there was a flow, from its middle.
fn midway(rig: &mut Rig, hook: Hook) -> Taken {
    from_client(rig, hook, ACK, 500_000, 700_000)
}

/// Row 24: a router was replaced, or the rule came later.
#[test]
fn a_connection_under_way_is_picked_up_and_established_when_both_ends_fit() {
    for hook in INGRESS {
        let mut rig = Rig::new();
        assert_eq!(target(&midway(&mut rig, hook)), (SERVER, 80));
        assert_eq!((entries(&rig), sessions(&rig)), ((0, 2), 0));
        assert!(is_forwarded(&from_server(&mut rig, hook, ACK, 700_000, 500_000)));
        assert_eq!(entries(&rig), (0, 2), "the client may be anybody yet");
        assert!(is_forwarded(&from_client(&mut rig, hook, ACK, 500_000, 700_000)));
        assert_eq!((entries(&rig), sessions(&rig)), ((2, 0), 1));
        from_server(&mut rig, hook, FIN | ACK, 700_000, 500_000);
        from_client(&mut rig, hook, FIN | ACK, 500_000, 700_001);
        assert_eq!(ended(&rig), (FIN_INWARD | FIN_OUTWARD, FIN_INWARD | FIN_OUTWARD));
        assert_whole(&rig.machine, &rig.flows);
    }
}

/// Row 24; design, law 6: neither a guessed client nor a server that knows nothing of it gets there.
#[test]
fn a_picked_up_flow_whose_ends_do_not_fit_stays_half_open() {
    for hook in INGRESS {
        // The server speaks of other numbers: it tells the real client where it stands (RFC 5961).
        let mut rig = Rig::new();
        midway(&mut rig, hook);
        from_server(&mut rig, hook, ACK, 700_000, 3_000_000_000);
        midway(&mut rig, hook);
        assert_eq!(entries(&rig), (0, 2));
        // The client has not heard the server.
        let mut rig = Rig::new();
        midway(&mut rig, hook);
        from_server(&mut rig, hook, ACK, 3_000_000_000, 500_000);
        midway(&mut rig, hook);
        assert_eq!(entries(&rig), (0, 2));
        // The server resets.
        from_server(&mut rig, hook, RST, 3_000_000_000, 0);
        assert_eq!(ended(&rig), (RESET, RESET));
    }
}

/// Row 24: whoever was first, the real client is believed in the end.
#[test]
fn a_first_segment_of_somebody_else_does_not_keep_the_client_out() {
    for hook in INGRESS {
        // Picked up by a guess; then the client itself.
        let mut rig = Rig::new();
        from_client(&mut rig, hook, ACK, 3_000_000_000, 3_000_000_000);
        midway(&mut rig, hook);
        from_server(&mut rig, hook, ACK, 700_000, 500_000);
        midway(&mut rig, hook);
        assert_eq!(entries(&rig), (2, 0));
        // A SYN that nobody answered, then another one; the target refuses that.
        let mut rig = Rig::new();
        from_client(&mut rig, hook, SYN, 3_000_000_000, 0);
        from_client(&mut rig, hook, SYN, 1000, 0);
        from_server(&mut rig, hook, RST | ACK, 0, 1001);
        assert_eq!(ended(&rig), (RESET, RESET));
    }
}

/// Row 24; design, law 5: a FIN mends what a flood has taken, and is noted when it comes again.
#[test]
fn a_fin_on_a_flow_that_lost_its_outward_entry_makes_it_whole() {
    for hook in INGRESS {
        let mut rig = Rig::new();
        rig.flows.capacity = 2;
        from_client(&mut rig, hook, SYN, 1000, 0);
        from_server(&mut rig, hook, SYN | ACK, SERVER_SEQ, 1001);
        rig.flows.half_open.retain(|_, flow| flow.direction == INWARD);
        for _ in 0..2 {
            from_client(&mut rig, hook, FIN | ACK, 1001, SERVER_SEQ + 1);
        }
        assert_whole(&rig.machine, &rig.flows);
        assert_eq!(ended(&rig), (FIN_INWARD, FIN_INWARD));
    }
}

/// Row 24: only a segment of a connection that goes on can be one.
#[test]
fn what_opens_or_ends_something_else_is_not_picked_up() {
    for hook in INGRESS {
        for flags in [0, FIN, FIN | ACK, RST, RST | ACK, SYN | ACK, SYN | FIN] {
            let mut rig = Rig::new();
            let taken = from_client(&mut rig, hook, flags, 500_000, 700_000);
            assert_eq!((taken.outcome, taken.reason), (Outcome::Drop, Some(Reason::NoFlow)), "{flags:#x}");
            assert_eq!(entries(&rig), (0, 0));
        }
    }
}

/// Rows 24, 31, 33: what was cut is not picked up again, as long as its client goes on.
#[test]
fn a_connection_that_was_cut_is_not_picked_up() {
    for hook in INGRESS {
        let mut rig = Rig::new();
        rig.establish(hook, tcp::NUMBER);
        rig.machine.rules.get_mut(&0).unwrap().tcp_epoch += 1;
        for _ in 0..3 {
            rig.machine.now += 200_000_000_000;
            let taken = from_client(&mut rig, hook, ACK, 1001, SERVER_SEQ + 1);
            assert_eq!((taken.outcome, taken.reason), (Outcome::Drop, Some(Reason::Cut)));
        }
        // Nor after what is no segment at all.
        let broken = FrameSpec { flags: ACK, seq: 1001, ..rig.client(tcp::NUMBER) }.bytes();
        rig.take(hook, Side::External, &[&broken[..46], &[0xf0], &broken[47..]].concat());
        let taken = from_client(&mut rig, hook, ACK, 1001, SERVER_SEQ + 1);
        assert_eq!(taken.reason, Some(Reason::Cut));
        let inward = rig.flows.established.values().find(|flow| flow.direction == INWARD).unwrap();
        assert_eq!(inward.last_seen, rig.machine.now, "the controller leaves it there");
        assert_eq!(target(&from_client(&mut rig, hook, SYN, 1, 0)), (SERVER, 80));
        // Whoever may not use the rule does not keep it in the table.
        let mut rig = Rig::new();
        rig.establish(hook, tcp::NUMBER);
        let rule = rig.machine.rules.get_mut(&0).unwrap();
        (rule.tcp_epoch, rule.allow_list) = (8, 1);
        let then = rig.machine.now;
        rig.machine.now += 1_000_000_000;
        assert_eq!(from_client(&mut rig, hook, ACK, 1001, SERVER_SEQ + 1).reason, Some(Reason::NotAllowed));
        assert!(rig.flows.established.values().all(|flow| flow.last_seen == then));
        // Of a rule that is gone it is the host's to answer.
        let mut rig = Rig::new();
        rig.establish(hook, tcp::NUMBER);
        rig.machine.rules.clear();
        let taken = from_client(&mut rig, hook, ACK, 1001, SERVER_SEQ + 1);
        assert_eq!((taken.outcome, taken.reason), (Outcome::Pass, Some(Reason::NoMatch)));
    }
}

/// Rows 24, 32.
#[test]
fn a_syn_on_a_closing_flow_starts_a_half_open_one_to_the_rules_present_target() {
    type Ending = fn(&mut Rig, Hook);
    let endings: [Ending; 4] = [
        |rig, hook| {
            from_client(rig, hook, FIN | ACK, 1001, SERVER_SEQ + 1);
            from_server(rig, hook, FIN | ACK, SERVER_SEQ + 1, 1002);
        },
        |rig, hook| {
            from_server(rig, hook, FIN | ACK, SERVER_SEQ + 1, 1001);
            from_client(rig, hook, FIN | ACK, 1001, SERVER_SEQ + 2);
        },
        |rig, hook| drop(from_client(rig, hook, RST, 1001, 0)),
        |rig, hook| drop(from_server(rig, hook, RST | ACK, SERVER_SEQ + 1, 1001)),
    ];
    for (hook, end) in INGRESS.into_iter().flat_map(|hook| endings.map(|end| (hook, end))) {
        for established in [true, false] {
            let mut rig = Rig::new();
            if established {
                rig.establish(hook, tcp::NUMBER);
            } else {
                from_client(&mut rig, hook, SYN, 1000, 0);
            }
            end(&mut rig, hook);
            let rule = rig.machine.rules.get_mut(&0).unwrap();
            (rule.target, rule.target_port) = (Ipv4::new(OTHER_SERVER).mapped(), 8000);

            // Nothing else starts one, also not what the server sends.
            for flags in [ACK, SYN | FIN, SYN | ACK] {
                assert_eq!(target(&from_client(&mut rig, hook, flags, 1002, SERVER_SEQ + 2)), (SERVER, 80));
            }
            assert!(is_forwarded(&from_server(&mut rig, hook, SYN | ACK, SERVER_SEQ, 1001)));
            assert_eq!(entries(&rig).0 + entries(&rig).1, 2);

            let syn = from_client(&mut rig, hook, SYN, 5000, 0);
            assert_eq!(target(&syn), (OTHER_SERVER, 8000));
            assert_eq!((entries(&rig), ended(&rig)), ((0, 2), (0, 0)));
            assert_whole(&rig.machine, &rig.flows);

            let answer = FrameSpec { flags: SYN | ACK, seq: 70_000, ..rig.server(tcp::NUMBER) };
            let answer = FrameSpec { src: (OTHER_SERVER, 8000), ..answer };
            assert!(is_forwarded(&rig.take(hook, Side::Internal, &answer.bytes())));
            let proof = from_client(&mut rig, hook, ACK, 5001, 70_001);
            assert_eq!((target(&proof), entries(&rig)), ((OTHER_SERVER, 8000), (2, 0)));
        }
    }
}

/// Design, law 6.
#[test]
fn udp_is_established_by_the_clients_further_packet_after_an_answer() {
    for hook in INGRESS {
        let mut rig = Rig::new();
        let (request, answer) = (rig.client(udp::NUMBER).bytes(), rig.server(udp::NUMBER).bytes());
        for _ in 0..3 {
            assert!(is_forwarded(&rig.take(hook, Side::External, &request)));
        }
        assert_eq!(entries(&rig), (0, 2));
        for _ in 0..3 {
            assert!(is_forwarded(&rig.take(hook, Side::Internal, &answer)));
        }
        assert_eq!((entries(&rig), sessions(&rig)), ((0, 2), 0));
        assert!(is_forwarded(&rig.take(hook, Side::External, &request)));
        assert_eq!((entries(&rig), sessions(&rig)), ((2, 0), 1));
        assert!(is_forwarded(&rig.take(hook, Side::Internal, &answer)));
        assert_whole(&rig.machine, &rig.flows);
    }
}

/// Row 25: what idle times are counted from, and what the CLI shows.
#[test]
fn each_packet_is_noted_in_the_entry_of_its_direction() {
    for protocol in PROTOCOLS {
        let mut rig = Rig::new();
        rig.establish(Hook::Xdp, protocol);
        let start = rig.machine.now;
        let length = if protocol == tcp::NUMBER { 40 } else { 28 };
        let state = |rig: &Rig, direction| {
            let flow = *rig.flows.established.values().find(|flow| flow.direction == direction).unwrap();
            assert_eq!(flow.bytes, flow.packets * length);
            (flow.last_seen - start, flow.packets, flow.created)
        };
        assert_eq!((state(&rig, INWARD), state(&rig, OUTWARD)), ((0, 2, start), (0, 1, start)));
        let (request, answer) = (rig.client(protocol), rig.server(protocol));
        rig.machine.now += 10;
        rig.take(Hook::TcIngress, Side::External, &FrameSpec { flags: ACK, ..request.clone() }.bytes());
        rig.machine.now += 10;
        rig.take(Hook::TcIngress, Side::Internal, &FrameSpec { flags: ACK, ..answer.clone() }.bytes());
        rig.machine.now += 10;
        rig.take(Hook::TcEgress, Side::External, &FrameSpec { flags: ACK, ..answer }.bytes());
        assert_eq!((state(&rig, INWARD), state(&rig, OUTWARD)), ((10, 3, start), (30, 3, start)));
        // What is not forwarded keeps nothing alive.
        rig.take(Hook::Xdp, Side::External, &FrameSpec { ttl: 1, ..request }.bytes());
        assert_eq!(state(&rig, INWARD), (10, 3, start));
    }
}

/// Rows 31, 46: of a flow whose rule is gone, nothing of the server's gets out, at no hook.
#[test]
fn packets_of_the_server_of_a_cut_flow_are_dropped() {
    type Ending = fn(&mut Machine, u32);
    let endings: [Ending; 5] = [
        |machine, slot| assert!(machine.rules.remove(&slot).is_some()),
        |machine, slot| machine.rules.get_mut(&slot).unwrap().flags = ONE_TARGET_PORT,
        |machine, slot| machine.rules.get_mut(&slot).unwrap().expires = machine.now,
        |machine, slot| machine.rules.get_mut(&slot).unwrap().tcp_epoch += (slot == 0) as u32,
        |machine, slot| machine.rules.get_mut(&slot).unwrap().udp_epoch += (slot == 1) as u32,
    ];
    for (slot, protocol) in [(0, tcp::NUMBER), (1, udp::NUMBER)] {
        for (number, cut) in endings.into_iter().enumerate() {
            let established_too = [true, false];
            for (hook, established) in
                Hook::ALL.into_iter().flat_map(|hook| established_too.map(|e| (hook, e)))
            {
                let mut rig = Rig::new();
                if established {
                    rig.establish(Hook::Xdp, protocol);
                } else {
                    let first = rig.client(protocol).bytes();
                    rig.take(Hook::Xdp, Side::External, &first);
                }
                cut(&mut rig.machine, slot);
                // The other protocol's epoch is no concern of this flow.
                let lives = (number, slot) == (3, 1) || (number, slot) == (4, 0);
                let side = if hook == Hook::TcEgress { Side::External } else { Side::Internal };
                for flags in [SYN | ACK, ACK, FIN | ACK, RST] {
                    let frame = FrameSpec { flags, ..rig.server(protocol) }.bytes();
                    let taken = rig.take(hook, side, &frame);
                    if lives {
                        assert!(is_forwarded(&taken));
                    } else {
                        assert_eq!((taken.outcome, taken.reason), (Outcome::Drop, Some(Reason::Cut)));
                    }
                }
                let dropped = rig.counts.rules[&slot].dropped[Reason::Cut as usize - Reason::FIRST_DROP];
                assert_eq!(dropped, if lives { 0 } else { 4 });
            }
        }
    }
}

/// Row 46: also after the client has come back, to whatever the rule is now.
#[test]
fn late_packets_of_the_server_of_a_cut_flow_are_dropped_while_its_client_goes_on() {
    for hook in INGRESS {
        for (protocol, deleted) in
            PROTOCOLS.into_iter().flat_map(|protocol| [(protocol, true), (protocol, false)])
        {
            for established in [true, false] {
                let mut rig = Rig::new();
                let client = rig.client(protocol).bytes();
                if established {
                    rig.establish(hook, protocol);
                } else {
                    rig.take(hook, Side::External, &client);
                }
                let rule = rig.machine.rules.get_mut(&u32::from(protocol == udp::NUMBER)).unwrap();
                rule.target = Ipv4::new([10, 0, 0, 12]).mapped();
                (rule.tcp_epoch, rule.udp_epoch) = (8, 8);
                rule.flags = if deleted { 0 } else { rule.flags };
                let lan = rig.machine.routes[0].2;
                rig.machine.routes.insert(0, ([10, 0, 0, 12], 32, lan));
                for _ in 0..2 {
                    let taken = rig.take(hook, Side::External, &client);
                    assert_eq!(is_forwarded(&taken), !deleted);
                    let late = FrameSpec { flags: ACK, ..rig.server(protocol) };
                    let taken = rig.take(hook, Side::Internal, &late.bytes());
                    assert_eq!((taken.outcome, taken.reason), (Outcome::Drop, Some(Reason::Cut)));
                    let port = if deleted { continue } else { rig.server(protocol).src.1 };
                    let present = FrameSpec { src: ([10, 0, 0, 12], port), flags: SYN | ACK, ..late };
                    assert!(is_forwarded(&rig.take(hook, Side::Internal, &present.bytes())));
                }
            }
        }
    }
}

/// Row 31.
#[test]
fn packets_of_the_client_of_a_cut_flow_go_to_no_server() {
    for hook in INGRESS {
        for protocol in PROTOCOLS {
            let mut rig = Rig::new();
            rig.establish(hook, protocol);
            let slot = if protocol == tcp::NUMBER { 0 } else { 1 };
            rig.machine.rules.get_mut(&slot).unwrap().flags = 0;
            let frame = FrameSpec { flags: ACK, ..rig.client(protocol) }.bytes();
            let taken = rig.take(hook, Side::External, &frame);
            assert_eq!((taken.outcome, taken.reason), (Outcome::Pass, Some(Reason::NoMatch)));
        }
    }
}

/// Moves rule 2, of both protocols, to another server.
fn retarget(rig: &mut Rig, cut_tcp: bool) {
    let rule = rig.machine.rules.get_mut(&2).unwrap();
    rule.target = Ipv4::new(OTHER_SERVER).mapped();
    rule.udp_epoch += 1;
    rule.tcp_epoch += u32::from(cut_tcp);
}

/// Row 32.
#[test]
fn when_a_target_changes_udp_moves_at_once_and_tcp_stays_unless_it_is_cut() {
    for hook in INGRESS {
        for cut_tcp in [false, true] {
            let mut rig = Rig::new();
            let send = |rig: &mut Rig, protocol, flags| {
                let frame = FrameSpec::inward(&rig.router, protocol, (CLIENT, CLIENT_PORT), 10_000);
                rig.take(hook, Side::External, &FrameSpec { flags, ..frame }.bytes())
            };
            for protocol in PROTOCOLS {
                assert_eq!(target(&send(&mut rig, protocol, SYN)), (SERVER, 20_000));
            }
            retarget(&mut rig, cut_tcp);
            assert_eq!(target(&send(&mut rig, udp::NUMBER, 0)), (OTHER_SERVER, 20_000));
            let tcp = send(&mut rig, tcp::NUMBER, ACK);
            if cut_tcp {
                assert_eq!((tcp.outcome, tcp.reason), (Outcome::Drop, Some(Reason::Cut)));
                assert_eq!(target(&send(&mut rig, tcp::NUMBER, SYN)), (OTHER_SERVER, 20_000));
            } else {
                assert_eq!(target(&tcp), (SERVER, 20_000));
            }
            assert_whole(&rig.machine, &rig.flows);
        }
    }
}

/// Row 31: a cut flow's client starts again, at once and with the same ports.
#[test]
fn a_cut_flow_can_be_opened_anew() {
    for hook in INGRESS {
        for protocol in PROTOCOLS {
            for stage in [Stage::Established, Stage::HalfOpen] {
                let mut rig = Rig::new();
                let first = rig.client(protocol).bytes();
                match stage {
                    Stage::Established => rig.establish(hook, protocol),
                    Stage::HalfOpen => drop(rig.take(hook, Side::External, &first)),
                }
                let slot = if protocol == tcp::NUMBER { 0 } else { 1 };
                let rule = rig.machine.rules.get_mut(&slot).unwrap();
                rule.tcp_epoch += 1;
                rule.udp_epoch += 1;
                rig.establish(hook, protocol);
                assert_whole(&rig.machine, &rig.flows);
            }
        }
    }
}

/// Row 29.
#[test]
fn with_the_established_table_full_a_flow_stays_half_open_and_works() {
    for hook in INGRESS {
        // With room for half a flow, and for none.
        for capacity in [3, 2] {
            let mut rig = Rig::new();
            rig.establish(hook, udp::NUMBER);
            rig.flows.capacity = capacity;
            from_client(&mut rig, hook, SYN, 1000, 0);
            from_server(&mut rig, hook, SYN | ACK, SERVER_SEQ, 1001);
            for _ in 0..3 {
                assert!(is_forwarded(&from_client(&mut rig, hook, ACK, 1001, SERVER_SEQ + 1)));
                assert!(is_forwarded(&from_server(&mut rig, hook, ACK, SERVER_SEQ + 1, 1001)));
                assert_eq!((entries(&rig), sessions(&rig)), ((2, 2), 1));
                assert_whole(&rig.machine, &rig.flows);
            }
            // As soon as there is room it is established.
            rig.flows.capacity = 4;
            from_client(&mut rig, hook, ACK, 1001, SERVER_SEQ + 1);
            assert_eq!((entries(&rig), sessions(&rig)), ((4, 0), 2));
        }
    }
}

/// Row 29.
#[test]
fn with_the_half_open_table_full_a_first_packet_is_dropped_and_counted_and_leaves_nothing() {
    for hook in INGRESS {
        for (protocol, slot) in [(tcp::NUMBER, 0), (udp::NUMBER, 1)] {
            for capacity in [0, 1, 2, 3] {
                let mut rig = Rig::new();
                rig.establish(hook, protocol);
                rig.flows.capacity = capacity;
                let other = FrameSpec { src: (OTHER_CLIENT, 1), ..rig.client(protocol) }.bytes();
                for number in 0..2 {
                    let first = FrameSpec { src: (CLIENT, 100 + number), ..rig.client(protocol) }.bytes();
                    rig.take(hook, Side::External, &first);
                }
                let taken = rig.take(hook, Side::External, &other);
                assert_eq!((taken.outcome, taken.reason), (Outcome::Drop, Some(Reason::TableFull)));
                let dropped = rig.counts.rules[&slot].dropped;
                let refused = if capacity < 2 { 3 } else { 2 };
                assert_eq!(dropped[Reason::TableFull as usize - Reason::FIRST_DROP], refused);
                assert_eq!(entries(&rig), (2, capacity / 2 * 2));
                assert_whole(&rig.machine, &rig.flows);
                // Who was there before is not concerned.
                let known = FrameSpec { flags: ACK, ..rig.client(protocol) }.bytes();
                assert!(is_forwarded(&rig.take(hook, Side::External, &known)));
            }
        }
    }
}

/// Row 29; design, law 6.
#[test]
fn a_flood_of_strangers_leaves_established_flows_as_they_are() {
    let mut rig = Rig::new();
    for protocol in PROTOCOLS {
        rig.establish(Hook::Xdp, protocol);
    }
    rig.flows.capacity = 16;
    for stranger in 0..200 {
        for protocol in PROTOCOLS {
            for flags in [SYN, ACK, RST] {
                let source = ([198, 51, 100, stranger], 7000);
                let frame = FrameSpec { src: source, flags, ack: 1, ..rig.client(protocol) }.bytes();
                rig.take(Hook::Xdp, Side::External, &frame);
            }
        }
    }
    assert_eq!((entries(&rig), sessions(&rig)), ((4, 16), 2));
    for protocol in PROTOCOLS {
        let (request, answer) = (rig.client(protocol), rig.server(protocol));
        let request = FrameSpec { flags: ACK, ..request }.bytes();
        assert!(is_forwarded(&rig.take(Hook::Xdp, Side::External, &request)));
        let answer = FrameSpec { flags: ACK, ..answer }.bytes();
        assert!(is_forwarded(&rig.take(Hook::Xdp, Side::Internal, &answer)));
    }
}

/// Segments of one client port to the ports 9000 and 9001 of W, which both go to port 9999, and the
/// server's to it.
fn colliding(rig: &mut Rig, hook: Hook, w_port: u16, flags: u8, ack: u32) -> Taken {
    let spec = FrameSpec::inward(&rig.router, tcp::NUMBER, (CLIENT, CLIENT_PORT), w_port);
    rig.take(hook, Side::External, &FrameSpec { flags, ack, ..spec }.bytes())
}

fn collided_reply(rig: &mut Rig, hook: Hook, port: u16) -> Taken {
    let dst = (CLIENT, port);
    let spec =
        FrameSpec { src: (SERVER, 9999), dst, flags: SYN | ACK, seq: SERVER_SEQ, ..rig.server(tcp::NUMBER) };
    rig.take(hook, Side::Internal, &spec.bytes())
}

/// Row 21: the second has another source port towards the server, and each its own replies.
#[test]
fn of_two_flows_that_would_collide_at_the_server_the_second_gets_another_source_port() {
    for hook in INGRESS {
        for established in [false, true] {
            let mut rig = Rig::new();
            colliding(&mut rig, hook, 9000, SYN, 0);
            collided_reply(&mut rig, hook, CLIENT_PORT);
            if established {
                colliding(&mut rig, hook, 9000, ACK, SERVER_SEQ + 1);
            }
            let second = colliding(&mut rig, hook, 9001, SYN, 0);
            assert_eq!(target(&second), (SERVER, 9999));
            let port = u16::from_be_bytes([second.bytes[34], second.bytes[35]]);
            assert!(port >= 1024 && port != CLIENT_PORT, "{port}");
            // The same one for all its packets.
            assert_eq!(colliding(&mut rig, hook, 9001, SYN, 0).bytes[34..36], port.to_be_bytes());
            for (to_port, w_port) in [(CLIENT_PORT, 9000u16), (port, 9001)] {
                let reply = collided_reply(&mut rig, hook, to_port);
                assert_eq!(reply.bytes[34..36], w_port.to_be_bytes());
                assert_eq!(reply.bytes[36..38], CLIENT_PORT.to_be_bytes());
            }
            colliding(&mut rig, hook, 9001, ACK, SERVER_SEQ + 1);
            assert_eq!(sessions(&rig), 1 + u64::from(established));
            assert_whole(&rig.machine, &rig.flows);
        }
    }
}

/// Row 21: once the first is cut, its port is free.
#[test]
fn the_source_port_of_a_cut_flow_is_used_again() {
    for hook in INGRESS {
        let mut rig = Rig::new();
        colliding(&mut rig, hook, 9000, SYN, 0);
        rig.machine.rules.get_mut(&3).unwrap().tcp_epoch += 1;
        let second = colliding(&mut rig, hook, 9001, SYN, 0);
        assert_eq!(second.bytes[34..36], CLIENT_PORT.to_be_bytes());
        assert_eq!(collided_reply(&mut rig, hook, CLIENT_PORT).bytes[34..36], 9001u16.to_be_bytes());
    }
}

/// Row 21: where none of the ports tried is free, the flow is refused and counted.
#[test]
fn a_flow_without_a_free_source_port_is_dropped() {
    let mut rig = Rig::new();
    colliding(&mut rig, Hook::Xdp, 9000, SYN, 0);
    let outward = rig.flows.half_open.iter().find(|(_, flow)| flow.direction == OUTWARD);
    let (key, flow) = outward.map(|(key, flow)| (*key, *flow)).unwrap();
    for port in 1..=u16::MAX {
        let tuple = Tuple { dst_port: Port::new(port), ..key.tuple };
        rig.flows.half_open.insert(FlowKey::new(tuple, key.protocol, Side::Internal), flow);
    }
    let before = rig.flows.half_open.len();
    let second = colliding(&mut rig, Hook::Xdp, 9001, SYN, 0);
    assert_eq!((second.outcome, second.reason), (Outcome::Drop, Some(Reason::PortCollision)));
    assert_eq!(rig.counts.rules[&3].dropped[Reason::PortCollision as usize - Reason::FIRST_DROP], 1);
    assert_eq!(rig.flows.half_open.len(), before);
}

/// Row 27; design, law 6: what is there with the same owner is adopted.
#[test]
fn an_entry_of_the_same_flow_that_is_there_already_is_adopted() {
    for protocol in PROTOCOLS {
        let mut rig = Rig::new();
        let first = rig.client(protocol).bytes();
        rig.take(Hook::Xdp, Side::External, &first);
        // A flood has taken the inward entry, or another CPU has only come this far.
        rig.flows.half_open.retain(|_, flow| flow.direction == OUTWARD);
        assert!(is_forwarded(&rig.take(Hook::Xdp, Side::External, &first)));
        assert_eq!(entries(&rig), (0, 2));
        assert_whole(&rig.machine, &rig.flows);
    }
}

/// Rows 24, 29; design, law 5: the client's ACK brings back what it needs of a lost outward entry.
#[test]
fn a_flow_whose_outward_entry_is_lost_before_its_proof_is_made_whole_by_it() {
    for hook in INGRESS {
        let mut rig = Rig::new();
        from_client(&mut rig, hook, SYN, 1000, 0);
        from_server(&mut rig, hook, SYN | ACK, SERVER_SEQ, 1001);
        rig.flows.half_open.retain(|_, flow| flow.direction == INWARD);
        from_client(&mut rig, hook, ACK, 1001, SERVER_SEQ + 1);
        assert_eq!(entries(&rig), (2, 0));
        assert_whole(&rig.machine, &rig.flows);
        assert!(is_forwarded(&from_server(&mut rig, hook, ACK, SERVER_SEQ + 1, 1001)));
    }
}

/// Tables in which another CPU takes a packet through between two accesses of this one.
struct Interrupted<'a> {
    tables: &'a mut Tables,
    accesses_before: usize,
    other: Option<&'a mut dyn FnMut(&mut Tables)>,
}

impl Interrupted<'_> {
    fn access(&mut self) -> &mut Tables {
        if self.accesses_before > 0 {
            self.accesses_before -= 1;
        } else if let Some(other) = self.other.take() {
            other(self.tables);
        }
        self.tables
    }
}

impl Flows<Ipv4> for Interrupted<'_> {
    fn is_first_end(&mut self, inward: &FlowKey<Ipv4>) -> bool {
        self.access().is_first_end(inward)
    }

    fn train(&mut self, key: &FragmentKey<Ipv4>) -> Option<Train> {
        self.tables.train(key)
    }

    fn remember(&mut self, key: &FragmentKey<Ipv4>, train: &Train) {
        self.tables.remember(key, train);
    }

    fn is_held(&mut self, key: &HeldKey<Ipv4>, now: u64) -> bool {
        self.tables.is_held(key, now)
    }

    fn host_session(&mut self, key: &FlowKey<Ipv4>) -> Option<&mut u64> {
        self.tables.host_session(key)
    }

    fn note_host_session(&mut self, key: &FlowKey<Ipv4>, now: u64) {
        self.tables.note_host_session(key, now);
    }

    fn find(&mut self, stage: Stage, key: &FlowKey<Ipv4>) -> Option<&mut Flow<Ipv4>> {
        self.access().find(stage, key)
    }

    fn insert_new(&mut self, stage: Stage, key: &FlowKey<Ipv4>, flow: &Flow<Ipv4>) -> Result<(), Refused> {
        self.access().insert_new(stage, key, flow)
    }

    fn remove(&mut self, stage: Stage, key: &FlowKey<Ipv4>) {
        self.access().remove(stage, key);
    }
}

impl Sessions for Interrupted<'_> {
    fn sessions(&mut self, key: &SessionsKey) -> i64 {
        self.access().sessions(key)
    }

    fn count_sessions(&mut self, key: &SessionsKey, by: i64) -> Result<(), Refused> {
        self.access().count_sessions(key, by)
    }

    fn due(&mut self, slot: u32) -> u64 {
        self.access().due(slot)
    }

    fn set_due(&mut self, slot: u32, due: u64) {
        self.access().set_due(slot, due);
    }

    fn postpone(&mut self, slot: u32, by: u64) {
        self.access().postpone(slot, by);
    }
}

/// Takes `frames` through XDP on two CPUs at once: the second's between the first's accesses to the
/// tables, once at each place where that can be. `check` sees the router after each.
fn race(before: &Rig, frames: [(Side, Vec<u8>); 2], check: impl Fn(&Rig)) {
    for accesses_before in 0.. {
        let mut rig = before.clone();
        let Rig { machine, flows, counts, router, .. } = &mut rig;
        let mut others = Counts::default();
        let run = |(side, bytes): &(Side, Vec<u8>), flows: &mut Interrupted, counters: &mut Counts| {
            let world = At::<0> { machine, ifindex: router.interface(*side).0 };
            let scratch = &mut Scratch::EMPTY.clone();
            let core = Core { flows, world: &world, counters, scratch, now: machine.now };
            let outcome = pipeline::process(&mut Frame(bytes.clone()), &mut Seen::NOTHING.clone(), core);
            let refused = counters.last == Some(Reason::SessionLimit);
            assert!(refused || matches!(outcome, Outcome::Redirect { .. }), "{:?}", counters.last);
        };
        let mut other = |tables: &mut Tables| {
            let mut flows = Interrupted { tables, accesses_before: 0, other: None };
            run(&frames[1], &mut flows, &mut others);
        };
        let mut interrupted = Interrupted { tables: flows, accesses_before, other: Some(&mut other) };
        run(&frames[0], &mut interrupted, counts);
        if interrupted.other.is_some() {
            // It was through before its turn to be interrupted came.
            assert!(accesses_before > 1);
            return;
        }
        for (slot, rule) in others.rules {
            counts.rules.entry(slot).and_modify(|own| own.sessions += rule.sessions).or_insert(rule);
        }
        assert_whole(&rig.machine, &rig.flows);
        check(&rig);
    }
}

/// Row 27.
#[test]
fn first_packets_on_two_cpus_at_once_make_one_flow_and_none_is_lost() {
    for protocol in PROTOCOLS {
        let rig = Rig::new();
        let first = (Side::External, rig.client(protocol).bytes());
        race(&rig, [first.clone(), first], |rig| assert_eq!(entries(rig), (0, 2)));
    }
}

/// Row 27.
#[test]
fn sixty_four_first_packets_make_one_flow() {
    for hook in INGRESS {
        for protocol in PROTOCOLS {
            let mut rig = Rig::new();
            let first = rig.client(protocol).bytes();
            for _ in 0..64 {
                assert!(is_forwarded(&rig.take(hook, Side::External, &first)));
            }
            assert_eq!(entries(&rig), (0, 2));
            assert_whole(&rig.machine, &rig.flows);
        }
    }
}

/// Row 24.
#[test]
fn fins_on_two_cpus_at_once_are_both_noted() {
    let mut rig = Rig::new();
    rig.establish(Hook::Xdp, tcp::NUMBER);
    let inward = FrameSpec { flags: FIN | ACK, seq: 1001, ..rig.client(tcp::NUMBER) }.bytes();
    let outward = FrameSpec { flags: FIN | ACK, seq: SERVER_SEQ + 1, ..rig.server(tcp::NUMBER) }.bytes();
    let both = (FIN_INWARD | FIN_OUTWARD, FIN_INWARD | FIN_OUTWARD);
    let frames = [(Side::External, inward), (Side::Internal, outward)];
    race(&rig, frames.clone(), |rig| assert_eq!(ended(rig), both));
    let [inward, outward] = frames;
    race(&rig, [outward, inward], |rig| assert_eq!(ended(rig), both));
}

/// Row 24.
#[test]
fn syns_on_a_closing_flow_on_two_cpus_at_once_start_one_new_flow() {
    for established in [true, false] {
        let mut rig = Rig::new();
        if established {
            rig.establish(Hook::Xdp, tcp::NUMBER);
        } else {
            from_client(&mut rig, Hook::Xdp, SYN, 1000, 0);
        }
        from_server(&mut rig, Hook::Xdp, RST | ACK, SERVER_SEQ + 1, 1001);
        let syn = (Side::External, rig.client(tcp::NUMBER).bytes());
        race(&rig, [syn.clone(), syn], |rig| assert_eq!(entries(rig), (0, 2)));
    }
}

/// What may happen to a router that is in use.
#[derive(Clone, Debug)]
enum Event {
    Client { hook: Hook, protocol: u8, session: usize, flags: u8, ack: u32 },
    Server { hook: Hook, protocol: u8, session: usize, flags: u8 },
    Cut { slot: u32, tcp: bool, udp: bool },
    Retarget { slot: u32, target: [u8; 4] },
    Later(u64),
    Generation,
    Capacity(usize),
}

/// Client port, W's port, and by protocol where it goes at first.
type Session = (u16, u16, [([u8; 4], u16); 2]);

const SESSIONS: [Session; 5] = [
    (5000, 8080, [(SERVER, 80), (OTHER_SERVER, 81)]),
    (5001, 8080, [(SERVER, 80), (OTHER_SERVER, 81)]),
    (5000, 10_000, [(SERVER, 20_000), (SERVER, 20_000)]),
    // The same at the server.
    (5000, 9000, [(SERVER, 9999), (SERVER, 9999)]),
    (5000, 9001, [(SERVER, 9999), (SERVER, 9999)]),
];

impl Event {
    fn happen(&self, rig: &mut Rig) {
        match *self {
            Self::Client { hook, protocol, session, flags, ack } => {
                let (port, w_port, _) = SESSIONS[session];
                let spec = FrameSpec::inward(&rig.router, protocol, (CLIENT, port), w_port);
                rig.take(hook, Side::External, &FrameSpec { flags, ack, ..spec }.bytes());
            }
            Self::Server { hook, protocol, session, flags } => {
                let (port, _, ends) = SESSIONS[session];
                let end = ends[usize::from(protocol == udp::NUMBER)];
                let spec = FrameSpec::outward(&rig.router, protocol, end, (CLIENT, port));
                rig.take(hook, Side::Internal, &FrameSpec { flags, seq: SERVER_SEQ, ..spec }.bytes());
            }
            Self::Cut { slot, tcp, udp } => {
                let rule = rig.machine.rules.get_mut(&slot).unwrap();
                rule.tcp_epoch += u32::from(tcp);
                rule.udp_epoch += u32::from(udp);
            }
            Self::Retarget { slot, target } => {
                rig.machine.rules.get_mut(&slot).unwrap().target = Ipv4::new(target).mapped();
            }
            Self::Later(ns) => rig.machine.now += ns,
            Self::Generation => rig.machine.generation += 1,
            Self::Capacity(capacity) => rig.flows.capacity = capacity,
        }
    }
}

fn client_or_server() -> impl Strategy<Value = Event> {
    // What a handshake needs comes often enough that many sequences complete some.
    let flags = prop_oneof![3 => Just(SYN), 5 => Just(ACK), 1 => Just(FIN | ACK), 1 => Just(RST)];
    let acks = prop_oneof![5 => Just(SERVER_SEQ + 1), 1 => Just(0)];
    let answers =
        prop_oneof![4 => Just(SYN | ACK), 2 => Just(ACK), 1 => Just(FIN | ACK), 1 => Just(RST | ACK)];
    let hook = || prop::sample::select(&INGRESS[..]);
    let protocol = || prop_oneof![3 => Just(tcp::NUMBER), 1 => Just(udp::NUMBER)];
    prop_oneof![
        3 => (hook(), protocol(), 0..SESSIONS.len(), flags, acks).prop_map(|(hook, protocol, session, flags, ack)| {
            Event::Client { hook, protocol, session, flags, ack }
        }),
        2 => (hook(), protocol(), 0..SESSIONS.len(), answers).prop_map(|(hook, protocol, session, flags)| {
            Event::Server { hook, protocol, session, flags }
        }),
    ]
}

fn changes() -> impl Strategy<Value = Event> {
    prop_oneof![
        (0u32..4, any::<bool>(), any::<bool>()).prop_map(|(slot, tcp, udp)| Event::Cut { slot, tcp, udp }),
        (0u32..4, prop::sample::select(&[SERVER, OTHER_SERVER][..]))
            .prop_map(|(slot, target)| Event::Retarget { slot, target }),
    ]
}

fn surroundings() -> impl Strategy<Value = Event> {
    let later = prop::sample::select(&[1, 999_999_999, 1_000_000_000, 60_000_000_000][..]);
    prop_oneof![later.prop_map(Event::Later), Just(Event::Generation), (0usize..10).prop_map(Event::Capacity)]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Design, law 5; rows 21, 24, 29, 31, 32.
    #[test]
    fn flows_are_whole_or_absent_whatever_comes_and_changes(
        events in prop::collection::vec(
            prop_oneof![20 => client_or_server(), 2 => changes(), 1 => surroundings()],
            0..80,
        ),
    ) {
        let mut rig = Rig::new();
        for event in events {
            event.happen(&mut rig);
            assert_whole(&rig.machine, &rig.flows);
        }
    }
}

#[test]
fn a_flow_that_two_cpus_establish_at_once_is_one_session() {
    for protocol in PROTOCOLS {
        let mut rig = Rig::new();
        let first = rig.client(protocol);
        rig.take(Hook::Xdp, Side::External, &first.bytes());
        let answer = FrameSpec { flags: SYN | ACK, seq: SERVER_SEQ, ..rig.server(protocol) }.bytes();
        rig.take(Hook::Xdp, Side::Internal, &answer);
        let proof = FrameSpec { flags: ACK, ack: SERVER_SEQ + 1, ..first }.bytes();
        let proof = (Side::External, proof);
        race(&rig, [proof.clone(), proof], |rig| {
            assert_eq!((entries(rig), sessions(rig)), ((2, 0), 1));
        });
    }
}

/// Rows 24 and 27; design, law 5.

#[test]
fn a_udp_flow_that_two_cpus_establish_at_once_lies_in_one_table() {
    let protocol = udp::NUMBER;
    let mut rig = Rig::new();
    let first = rig.client(protocol);
    rig.take(Hook::Xdp, Side::External, &first.bytes());
    rig.take(Hook::Xdp, Side::Internal, &rig.server(protocol).bytes());
    let proof = (Side::External, first.bytes());
    race(&rig, [proof.clone(), proof], |rig| {
        assert_eq!((entries(rig), sessions(rig)), ((2, 0), 1));
    });
}

/// Row 18: several may meet at a rule's last place.
#[test]
fn two_sessions_that_prove_at_once_do_not_both_get_the_last_place() {
    let mut rig = Rig::new();
    rig.machine.rules.get_mut(&11).unwrap().max_sessions = 1;
    let proofs = [CLIENT, OTHER_CLIENT].map(|client| {
        let client = (client, CLIENT_PORT);
        let syn = FrameSpec::inward(&rig.router, tcp::NUMBER, client, LIMITED_PORTS.0);
        let answer = FrameSpec::outward(&rig.router, tcp::NUMBER, (SERVER, LIMITED_PORTS.0), client);
        rig.take(Hook::Xdp, Side::External, &syn.bytes());
        let answer = FrameSpec { flags: SYN | ACK, seq: SERVER_SEQ, ack: 1001, ..answer };
        rig.take(Hook::Xdp, Side::Internal, &answer.bytes());
        (Side::External, FrameSpec { flags: ACK, seq: 1001, ack: SERVER_SEQ + 1, ..syn }.bytes())
    });
    for proofs in [proofs.clone(), [proofs[1].clone(), proofs[0].clone()]] {
        race(&rig, proofs, |rig| {
            let counted: i64 = rig
                .flows
                .sessions
                .iter()
                .filter(|(key, _)| key.source == Ipv6::UNSPECIFIED)
                .map(|(_, n)| n)
                .sum();
            assert!(rig.flows.established.len() <= 2 && counted == sessions(rig) as i64, "{counted}");
        });
    }
}

/// Row 18: one session, though two CPUs make it.
#[test]
fn a_session_that_is_established_on_two_cpus_at_once_is_counted_once() {
    let mut rig = Rig::new();
    let client = (CLIENT, CLIENT_PORT);
    let syn = FrameSpec::inward(&rig.router, udp::NUMBER, client, LIMITED_PORTS.0);
    let answer = FrameSpec::outward(&rig.router, udp::NUMBER, (SERVER, LIMITED_PORTS.0), client);
    rig.machine.rules.get_mut(&11).unwrap().max_sessions_per_source = 0;
    rig.take(Hook::Xdp, Side::External, &syn.bytes());
    rig.take(Hook::Xdp, Side::Internal, &answer.bytes());
    let proof = (Side::External, syn.bytes());
    race(&rig, [proof.clone(), proof], |rig| {
        assert_eq!((sessions(rig), rig.flows.sessions.values().sum::<i64>()), (1, 1));
    });
}

/// Rows 21 and 27: a flow is promoted while another looks whether its source port is taken.
#[test]
fn a_promotion_hides_no_taken_port() {
    let mut rig = Rig::new();
    colliding(&mut rig, Hook::Xdp, 9000, SYN, 0);
    collided_reply(&mut rig, Hook::Xdp, CLIENT_PORT);
    let spec = |port| FrameSpec::inward(&rig.router, tcp::NUMBER, (CLIENT, CLIENT_PORT), port);
    let proof = FrameSpec { flags: ACK, seq: 1001, ack: SERVER_SEQ + 1, ..spec(9000) }.bytes();
    let syn = spec(9001).bytes();
    for frames in [[syn.clone(), proof.clone()], [proof, syn]] {
        race(&rig, frames.map(|frame| (Side::External, frame)), |rig| {
            assert_whole(&rig.machine, &rig.flows);
            let tables = [&rig.flows.established, &rig.flows.half_open];
            let outward =
                tables.iter().flat_map(|table| table.iter()).filter(|(_, flow)| flow.direction == OUTWARD);
            let mut ports: Vec<u16> = outward.map(|(key, _)| key.tuple.dst_port.number()).collect();
            ports.sort_unstable();
            let all = ports.len();
            ports.dedup();
            assert_eq!((ports.len(), all), (2, 2), "one reply tuple, one flow");
        });
    }
}

/// Rows 21 and 27: whichever source port either CPU finds, both take one.
#[test]
fn two_first_packets_at_once_of_a_flow_whose_port_is_taken_make_one_flow() {
    let mut rig = Rig::new();
    colliding(&mut rig, Hook::Xdp, 9000, SYN, 0);
    let syn = FrameSpec::inward(&rig.router, tcp::NUMBER, (CLIENT, CLIENT_PORT), 9001).bytes();
    race(&rig, [(Side::External, syn.clone()), (Side::External, syn)], |rig| {
        assert_eq!(entries(rig), (0, 4));
        assert_whole(&rig.machine, &rig.flows);
    });
}

/// Rows 24 and 27; design, law 5.

#[test]
fn a_tombstone_in_the_way_takes_no_live_flow_with_it() {
    let mut rig = Rig::new();
    let hook = Hook::Xdp;
    // 9000 -> SERVER:9999, established.
    colliding(&mut rig, hook, 9000, SYN, 0);
    collided_reply(&mut rig, hook, CLIENT_PORT);
    colliding(&mut rig, hook, 9000, ACK, SERVER_SEQ + 1);
    // Cut and retargeted: the client's new connection goes to OTHER_SERVER and is established.
    let rule = rig.machine.rules.get_mut(&3).unwrap();
    rule.tcp_epoch += 1;
    rule.target = Ipv4::new(OTHER_SERVER).mapped();
    colliding(&mut rig, hook, 9000, SYN, 0);
    let spec =
        FrameSpec { src: (OTHER_SERVER, 9999), flags: SYN | ACK, seq: SERVER_SEQ, ..rig.server(tcp::NUMBER) };
    rig.take(hook, Side::Internal, &spec.bytes());
    colliding(&mut rig, hook, 9000, ACK, SERVER_SEQ + 1);
    // Retargeted back, established TCP stays. The same client port to 9001.
    rig.machine.rules.get_mut(&3).unwrap().target = Ipv4::new(SERVER).mapped();
    colliding(&mut rig, hook, 9001, SYN, 0);
    assert_whole(&rig.machine, &rig.flows);
    assert!(is_forwarded(&colliding(&mut rig, hook, 9000, ACK, SERVER_SEQ + 1)));
}

/// Rows 24 and 27; design, law 5.

#[test]
fn a_half_open_flow_that_lost_its_outward_entry_is_made_anew_by_the_next_packet() {
    for protocol in PROTOCOLS {
        let mut rig = Rig::new();
        let first = rig.client(protocol).bytes();
        rig.take(Hook::Xdp, Side::External, &first);
        rig.flows.half_open.retain(|_, flow| flow.direction == INWARD);
        rig.take(Hook::Xdp, Side::External, &first);
        let answer = FrameSpec { flags: SYN | ACK, ..rig.server(protocol) }.bytes();
        let taken = rig.take(Hook::Xdp, Side::Internal, &answer);
        assert!(is_forwarded(&taken), "{:?}", taken.reason);
    }
}

/// Rows 24 and 27; design, law 5.

#[test]
fn a_half_open_flow_that_lost_its_inward_entry_can_still_be_established() {
    let mut rig = Rig::new();
    from_client(&mut rig, Hook::Xdp, SYN, 1000, 0);
    from_server(&mut rig, Hook::Xdp, SYN | ACK, SERVER_SEQ, 1001);
    rig.flows.half_open.retain(|_, flow| flow.direction == OUTWARD);
    from_client(&mut rig, Hook::Xdp, SYN, 1000, 0);
    from_server(&mut rig, Hook::Xdp, SYN | ACK, SERVER_SEQ, 1001);
    from_client(&mut rig, Hook::Xdp, ACK, 1001, SERVER_SEQ + 1);
    assert_eq!(entries(&rig), (2, 0));
}

/// Rows 24 and 27; design, law 5.

#[test]
fn the_ack_may_fit_a_later_syn_ack_with_another_number() {
    let mut rig = Rig::new();
    from_client(&mut rig, Hook::Xdp, SYN, 1000, 0);
    from_server(&mut rig, Hook::Xdp, SYN | ACK, SERVER_SEQ, 1001);
    from_client(&mut rig, Hook::Xdp, SYN, 7000, 0);
    from_server(&mut rig, Hook::Xdp, SYN | ACK, SERVER_SEQ + 5000, 7001);
    from_client(&mut rig, Hook::Xdp, ACK, 7001, SERVER_SEQ + 5001);
    assert_eq!(entries(&rig), (2, 0));
}

/// Rows 24 and 27; design, law 5.

#[test]
fn a_fin_that_is_also_the_proof_is_noted_in_both_entries() {
    let mut rig = Rig::new();
    from_client(&mut rig, Hook::Xdp, SYN, 1000, 0);
    from_server(&mut rig, Hook::Xdp, SYN | ACK, SERVER_SEQ, 1001);
    from_client(&mut rig, Hook::Xdp, FIN | ACK, 1001, SERVER_SEQ + 1);
    assert_eq!(entries(&rig), (2, 0));
    assert_eq!(ended(&rig), (FIN_INWARD, FIN_INWARD));
}

/// Rows 24 and 27; design, law 5.

#[test]
fn a_flow_that_waited_for_room_is_established_by_a_later_ack() {
    let mut rig = Rig::new();
    rig.establish(Hook::Xdp, udp::NUMBER);
    rig.flows.capacity = 2;
    from_client(&mut rig, Hook::Xdp, SYN, 1000, 0);
    from_server(&mut rig, Hook::Xdp, SYN | ACK, SERVER_SEQ, 1001);
    from_client(&mut rig, Hook::Xdp, ACK, 1001, SERVER_SEQ + 1);
    from_server(&mut rig, Hook::Xdp, ACK, SERVER_SEQ + 1, 1001);
    rig.flows.capacity = 10;
    from_client(&mut rig, Hook::Xdp, ACK, 1001, SERVER_SEQ + 501);
    assert_eq!(entries(&rig), (4, 0));
}
