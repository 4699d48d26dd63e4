//! Row 8: fragments in another order than they were sent in.

use std::collections::HashSet;
use std::net::UdpSocket;
use std::thread::sleep;
use std::time::Duration;

use testbed::{DEADLINE, Datapath, Frame, RawSocket, Testbed, UdpServer, bytes, udp_socket, wait_until};

use crate::common::*;

/// Of a datagram in three fragments.
const PAYLOAD: usize = 4000;

/// How much of a packet a fragment carries on links of 1500 bytes, of either family.
const LENGTH: u16 = 1448;

/// Sends frames, the last after a pause.
fn send_last_after(wire: &RawSocket, frames: &[Vec<u8>], pause: Duration) {
    let (last, others) = frames.split_last().unwrap();
    for frame in others {
        wire.send_bytes(frame).unwrap();
    }
    sleep(pause);
    wire.send_bytes(last).unwrap();
}

/// The next datagram that a real stack has put together, and where it came from.
fn received(socket: &UdpSocket) -> (Vec<u8>, String) {
    let mut buffer = vec![0; 1 << 16];
    let (length, from) = socket.recv_from(&mut buffer).expect("the datagram arrives");
    buffer.truncate(length);
    (buffer, from.to_string())
}

fn assert_nothing_comes(socket: &UdpSocket) {
    socket.set_read_timeout(Some(QUIET)).unwrap();
    assert!(socket.recv_from(&mut [0; 1 << 16]).is_err());
    socket.set_read_timeout(Some(DEADLINE)).unwrap();
}

const PAUSES: [Duration; 3] = [Duration::ZERO, Duration::from_millis(50), Duration::from_millis(500)];

for_each_family! {
    fn a_datagram_arrives_whose_first_fragment_comes_last(bed = Testbed::builder()) {
        add(bed, "udp 203.0.113.1:8080 10.0.0.10:80");
        let server = udp_socket(bed.server(), &bed.ip(TARGET)).unwrap();
        let wire = bed.wire("203.0.113.2").unwrap();
        for (id, pause) in (0..).zip(PAUSES) {
            let payload = bytes(PAYLOAD + usize::from(id));
            let mut pieces = wire.fragments(&Frame { id, ..bed.udp(STRANGER, W8080, &payload) }, LENGTH);
            pieces.reverse();
            send_last_after(&wire, &pieces, pause);
            assert!(received(&server) == (payload, bed.ip(STRANGER)), "after {pause:?}");
        }
        assert_nothing_comes(&server);
        let stats = bed.stats().unwrap();
        assert_eq!((stats.reason("held"), stats.dropped()), (6, 0), "{stats}");
        assert_eq!(only_rule(bed)["counters"]["packets_in"], 9, "each is counted once for the rule");
    }
}

for_each_family! {
    fn a_datagram_arrives_whatever_order_its_fragments_come_in(bed = Testbed::builder()) {
        add(bed, "udp 203.0.113.1:8080 10.0.0.10:80");
        let server = udp_socket(bed.server(), &bed.ip(TARGET)).unwrap();
        let wire = bed.wire("203.0.113.2").unwrap();
        for id in 0..24 {
            let payload = bytes(5000 + usize::from(id));
            let mut pieces = wire.fragments(&Frame { id, ..bed.udp(STRANGER, W8080, &payload) }, LENGTH);
            // Each order of four has a number: which goes next of those that are left.
            let mut number = usize::from(id);
            while !pieces.is_empty() {
                let next = number % pieces.len();
                number /= pieces.len();
                wire.send_bytes(&pieces.remove(next)).unwrap();
            }
            assert!(received(&server) == (payload, bed.ip(STRANGER)), "order {id}");
        }
        // As many fragments as there may be, the wrong way round.
        let payload = bytes(65_507);
        let mut pieces = wire.fragments(&Frame { id: 999, ..bed.udp(STRANGER, W8080, &payload) }, LENGTH);
        pieces.reverse();
        send_last_after(&wire, &pieces, Duration::ZERO);
        assert!(received(&server).0 == payload);
        assert_eq!(bed.stats().unwrap().dropped(), 0);
    }
}

for_each_family! {
    fn an_answer_arrives_whose_first_fragment_comes_last(bed = Testbed::builder()) {
        add(bed, "udp 203.0.113.1:8080 10.0.0.10:80");
        let client = udp_socket(&bed.client, &bed.ip("203.0.113.2:4000")).unwrap();
        mute(bed.server());
        let wire = bed.wire("10.0.0.10").unwrap();
        client.send_to(b"question", bed.ip(W8080)).unwrap();
        wire.receive(DEADLINE, |packet| packet.payload == b"question").unwrap();
        for (id, pause) in (0..).zip(PAUSES) {
            let payload = bytes(PAYLOAD + usize::from(id));
            let mut pieces = wire.fragments(&Frame { id, ..bed.udp(TARGET, "203.0.113.2:4000", &payload) }, LENGTH);
            pieces.reverse();
            send_last_after(&wire, &pieces, pause);
            assert!(received(&client) == (payload, bed.ip(W8080)), "after {pause:?}");
        }
        assert_nothing_comes(&client);
    }
}

for_each_family! {
    fn a_host_inside_may_send_the_first_fragment_last_too(bed = two_servers()) {
        add(bed, "udp 203.0.113.1:8080 10.0.0.10:80");
        let server = udp_socket(bed.server(), &bed.ip(TARGET)).unwrap();
        let wire = bed.wire("10.0.0.11").unwrap();
        let payload = bytes(PAYLOAD);
        let mut pieces = wire.fragments(&bed.udp("10.0.0.11:4000", W8080, &payload), LENGTH);
        pieces.reverse();
        send_last_after(&wire, &pieces, Duration::from_millis(50));
        let (arrived, from) = received(&server);
        assert!(arrived == payload && from.starts_with(bed.ip("203.0.113.1:").as_str()), "{from}");
    }
}

for_each_family! {
    fn clients_with_one_identification_are_kept_apart_in_any_order(bed = Testbed::builder()) {
        add(bed, "udp 203.0.113.1:8080 10.0.0.10:80");
        let server = udp_socket(bed.server(), &bed.ip(TARGET)).unwrap();
        let wire = bed.wire("203.0.113.2").unwrap();
        let clients: Vec<String> = (1..=9).map(|number| format!("192.0.2.{number}:4000")).collect();
        let datagram = |client: &String| [client.as_bytes(), &bytes(PAYLOAD)].concat();
        let pieces: Vec<_> =
            clients.iter().map(|client| wire.fragments(&bed.udp(client, W8080, &datagram(client)), LENGTH)).collect();
        // All last ones, then all in the middle, then all first ones.
        for at in (0..pieces[0].len()).rev() {
            for of_client in &pieces {
                wire.send_bytes(&of_client[at]).unwrap();
            }
        }
        let arrived: HashSet<_> = clients.iter().map(|_| received(&server)).collect();
        assert!(arrived == clients.iter().map(|client| (datagram(client), bed.ip(client))).collect());
    }
}

for_each_family! {
    fn the_routers_own_services_get_their_fragments_in_any_order(bed = Testbed::builder()) {
        add(bed, "udp 203.0.113.1:8080 10.0.0.10:80");
        let service = udp_socket(&bed.router, &bed.ip("203.0.113.1:53")).unwrap();
        let wire = bed.wire("203.0.113.2").unwrap();
        for (id, pause) in (0..).zip(PAUSES) {
            for backwards in [false, true] {
                let payload = bytes(PAYLOAD + usize::from(id));
                let mut pieces = wire.fragments(&Frame { id, ..bed.udp(STRANGER, "203.0.113.1:53", &payload) }, LENGTH);
                if backwards {
                    pieces.reverse();
                }
                send_last_after(&wire, &pieces, pause);
                assert!(received(&service) == (payload, bed.ip(STRANGER)), "after {pause:?}");
            }
        }
        assert_nothing_comes(&service);
    }
}

for_each_family! {
    /// Row 10 as well: each with a priority tag of its own.
    fn tagged_fragments_arrive_in_any_order(bed = Testbed::builder()) {
        add(bed, "udp 203.0.113.1:8080 10.0.0.10:80");
        let server = udp_socket(bed.server(), &bed.ip(TARGET)).unwrap();
        let wire = bed.wire("203.0.113.2").unwrap();
        let payload = bytes(PAYLOAD);
        let mut pieces = wire.fragments(&Frame { vlan: Some(0xa000), ..bed.udp(STRANGER, W8080, &payload) }, LENGTH);
        pieces.reverse();
        send_last_after(&wire, &pieces, Duration::ZERO);
        assert!(received(&server) == (payload, bed.ip(STRANGER)));
    }
}

#[test]
fn fragments_of_9000_bytes_arrive_in_any_order() {
    for datapath in [Datapath::Tc, Datapath::GenericXdp] {
        let bed = Testbed::builder().mtu(9000).checksum_offload(true).datapath(datapath).start().unwrap();
        add(&bed, "udp 203.0.113.1:8080 10.0.0.10:80");
        let server = udp_socket(bed.server(), &bed.ip(TARGET)).unwrap();
        let wire = bed.wire("203.0.113.2").unwrap();
        let payload = bytes(40_000);
        let mut pieces = wire.fragments(&bed.udp(STRANGER, W8080, &payload), 8952);
        pieces.reverse();
        send_last_after(&wire, &pieces, Duration::ZERO);
        assert!(received(&server) == (payload, bed.ip(STRANGER)), "{datapath:?}");
    }
}

for_each_family! {
    fn a_flood_of_lone_fragments_harms_nobody(bed = Testbed::builder()) {
        add(bed, "udp 203.0.113.1:8080 10.0.0.10:80");
        let _server = UdpServer::echo(bed.server(), &bed.ip(TARGET), "server").unwrap();
        let client = udp_socket(&bed.client, &bed.ip("203.0.113.2:4000")).unwrap();
        let wire = bed.wire("203.0.113.2").unwrap();
        let long = "long ".repeat(1000);
        let flood = bytes(100);
        for number in 0..20_000_u16 {
            let stranger = format!("192.0.2.{}:4000", number % 250 + 1);
            let frame = Frame { id: number, ..bed.udp(&stranger, W8080, &flood) };
            wire.send_bytes(&wire.fragments(&frame, 24)[1 + usize::from(number % 3)]).unwrap();
            if number % 2000 == 0 {
                assert!(answers(&client, &bed.ip(W8080)));
                client.set_read_timeout(Some(DEADLINE)).unwrap();
                // In fragments there and back, in order.
                assert_eq!(testbed::udp_ask(&client, &bed.ip(W8080), &long).unwrap(), format!("server {long}"));
            }
        }
        let stats = bed.stats().unwrap();
        assert!(stats.reason("held") > 15_000 && stats.dropped() == 0, "{stats}");
        let mut pieces = wire.fragments(&bed.udp("203.0.113.2:4000", W8080, long.as_bytes()), LENGTH);
        pieces.reverse();
        send_last_after(&wire, &pieces, Duration::from_millis(50));
        assert!(received(&client) == (format!("server {long}").into_bytes(), bed.ip(W8080)));
    }
}

for_each_family! {
    fn fragments_are_held_as_long_as_there_is_a_rule(bed = Testbed::builder()) {
        add(bed, "udp 203.0.113.1:8080 10.0.0.10:80 --name only");
        mute(bed.server());
        let (client, server) = (bed.wire("203.0.113.2").unwrap(), bed.wire("10.0.0.10").unwrap());
        let send_lone_ones = || {
            for (wire, from, to) in [(&client, STRANGER, W8080), (&server, TARGET, STRANGER)] {
                let pieces = wire.fragments(&bed.udp(from, to, &bytes(PAYLOAD)), LENGTH);
                wire.send_bytes(&pieces[2]).unwrap();
            }
        };
        let lone_ones = || {
            let stats = bed.stats().unwrap();
            (stats.reason("held"), stats.verdict("tc-ingress", "hold") + stats.verdict("tc-ingress", "pass"))
        };
        send_lone_ones();
        wait_until("both are held", DEADLINE, || lone_ones().0 == 2).unwrap();
        bed.ctl(&["del", "only"]).unwrap();
        let before = lone_ones().1;
        send_lone_ones();
        wait_until("two more have come", DEADLINE, || lone_ones().1 >= before + 2).unwrap();
        assert_eq!(lone_ones().0, 2, "{}", bed.stats().unwrap());
    }
}

for_each_family! {
    /// Row 35.
    fn fragments_are_held_without_a_controller(bed = Testbed::builder()) {
        add(bed, "udp 203.0.113.1:8080 10.0.0.10:80");
        let server = udp_socket(bed.server(), &bed.ip(TARGET)).unwrap();
        let wire = bed.wire("203.0.113.2").unwrap();
        bed.daemon.kill();
        let deliver = |bed: &mut Testbed, id: u16, meanwhile: fn(&mut Testbed)| {
            let payload = bytes(PAYLOAD + usize::from(id));
            let mut pieces = wire.fragments(&Frame { id, ..bed.udp(STRANGER, W8080, &payload) }, LENGTH);
            let first = pieces.remove(0);
            pieces.iter().for_each(|piece| wire.send_bytes(piece).unwrap());
            sleep(Duration::from_millis(50));
            meanwhile(bed);
            wire.send_bytes(&first).unwrap();
            assert!(received(&server) == (payload, bed.ip(STRANGER)));
        };
        deliver(bed, 1, |_| {});
        // The next controller finds what is held.
        deliver(bed, 2, |bed| bed.daemon.start().unwrap());
    }
}
