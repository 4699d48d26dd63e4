//! The life of a flow.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::UdpSocket;
use std::thread;
use std::time::{Duration, Instant};

use testbed::{
    DEADLINE, RawSocket, TcpFields, TcpServer, Testbed, UdpServer, connect, udp_ask, udp_socket, wait_until,
};

use crate::common::*;

const FIN: u8 = TcpFields::FIN;
const SYN: u8 = TcpFields::SYN;
const RST: u8 = TcpFields::RST;
const ACK: u8 = TcpFields::ACK;

fn assert_state(bed: &Testbed, state: &str) {
    assert_eq!(flow_states(bed).into_iter().collect::<Vec<_>>(), [state]);
    assert_eq!(flows(bed).len(), 1);
}

for_each_family! {
    /// Row 24.
    fn tcp_is_half_open_until_the_clients_ack_then_closes_by_two_fins(bed = Testbed::builder()) {
        add(bed, "tcp 203.0.113.1:8080 10.0.0.10:80");
        let ends = Ends::new(bed);
        ends.segment_in(SYN, 100, 0);
        assert_state(bed, "half-open");
        ends.segment_out(SYN | ACK, 500, 101);
        assert_state(bed, "half-open");
        // An acknowledgement of what the server has not sent proves nothing.
        ends.segment_in(ACK, 101, 9999);
        assert_state(bed, "half-open");
        ends.segment_in(ACK, 101, 501);
        assert_state(bed, "established");
        // Half closed, it goes on in the other direction.
        ends.segment_in(FIN | ACK, 101, 501);
        assert_state(bed, "established");
        ends.segment_out(ACK, 501, 102);
        ends.segment_out(ACK | TcpFields::PSH, 501, 102);
        ends.segment_out(FIN | ACK, 501, 102);
        assert_state(bed, "closing");
        ends.segment_in(ACK, 102, 502);
        assert_state(bed, "closing");
    }
}

for_each_family! {
    /// Row 24.
    fn retransmissions_of_a_handshake_arrive(bed = Testbed::builder()) {
        add(bed, "tcp 203.0.113.1:8080 10.0.0.10:80");
        let ends = Ends::new(bed);
        for _ in 0..3 {
            ends.segment_in(SYN, 100, 0);
        }
        for _ in 0..3 {
            ends.segment_out(SYN | ACK, 500, 101);
        }
        for _ in 0..3 {
            ends.segment_in(ACK, 101, 501);
        }
        // The server may not have seen the ACK.
        ends.segment_out(SYN | ACK, 500, 101);
        ends.segment_in(ACK, 101, 501);
        assert_state(bed, "established");
        let counters = &only_rule(bed)["counters"];
        assert_eq!(counters["sessions_total"], 1, "{counters}");
    }
}

for_each_family! {
    /// Row 24: by the rule as it is by then.
    fn a_syn_on_a_closed_connection_starts_a_new_one(
        bed = two_servers()
    ) {
        add(bed, "tcp 203.0.113.1:8080 10.0.0.10:80 --name web");
        let ends = Ends::new(bed);
        mute(bed.at("10.0.0.11"));
        let other = bed.wire("10.0.0.11").unwrap();

        ends.handshake();
        ends.segment_out(RST | ACK, 501, 101);
        assert_state(bed, "closing");
        ends.segment_in(SYN, 7000, 0);
        assert_state(bed, "half-open");
        ends.segment_out(SYN | ACK, 8000, 7001);
        ends.segment_in(ACK, 7001, 8001);
        assert_state(bed, "established");

        // An established connection stays at its target; a new one goes to the present.
        bed.ctl(&["set", "web", "--target", &bed.ip("10.0.0.11:81")]).unwrap();
        ends.segment_in(ACK | FIN, 7001, 8001);
        ends.segment_out(ACK | FIN, 8001, 7002);
        ends.segment_in(ACK, 7002, 8002);
        let again = bed.tcp(STRANGER, W8080, TcpFields::new(SYN, 9000, 0), b"");
        ends.client.send(&again).unwrap();
        let seen = other.receive(DEADLINE, |packet| packet.has_flags(SYN)).unwrap();
        assert_eq!(seen.destination, bed.endpoint("10.0.0.11:81"));
        let counters = &only_rule(bed)["counters"];
        assert_eq!(counters["sessions_total"], 2, "{counters}");
    }
}

for_each_family! {
    /// Row 24.
    fn the_clients_reset_ends_a_connection(bed = Testbed::builder()) {
        add(bed, "tcp 203.0.113.1:8080 10.0.0.10:80");
        let ends = Ends::new(bed);
        ends.handshake();
        ends.segment_in(RST, 101, 0);
        assert_state(bed, "closing");
        ends.handshake();
        assert_state(bed, "established");
    }
}

for_each_family! {
    /// Row 25: a datagram back, and another in, and the flow is established.
    fn udp_is_half_open_until_it_is_answered_and_goes_on(bed = Testbed::builder()) {
        add(bed, "udp 203.0.113.1:8080 10.0.0.10:80");
        let ends = Ends::new(bed);
        ends.inward(&bed.udp(STRANGER, W8080, b"one"));
        ends.inward(&bed.udp(STRANGER, W8080, b"two"));
        assert_state(bed, "half-open");
        ends.outward(&bed.udp(TARGET, STRANGER, b"answer"));
        assert_state(bed, "half-open");
        ends.inward(&bed.udp(STRANGER, W8080, b"three"));
        assert_state(bed, "established");

        let flow = &flows(bed)[0];
        let [client, external, target] = [STRANGER, W8080, TARGET].map(|text| bed.ip(text));
        assert_eq!(flow["client"], client, "{flow}");
        assert_eq!(flow["external"], external, "{flow}");
        assert_eq!(flow["target"], target, "{flow}");
        let shown = bed.ctl(&["flows"]).unwrap();
        assert!([&client, &external, &target, "established"].iter().all(|word| shown.contains(word)), "{shown}");
    }
}

for_each_family! {
    /// Row 27.
    fn first_packets_that_come_at_once_make_one_flow_and_all_arrive(bed = Testbed::builder()) {
        const SENDERS: usize = 4;
        add(bed, "udp 203.0.113.1:8080 10.0.0.10:80");
        let ends = Ends::new(bed);
        // So that neither neighbour has to be found first.
        ends.inward(&bed.udp("192.0.2.1:1", W8080, b"before"));
        for round in 0..5 {
            let client = bed.ip(&format!("192.0.2.7:{}", 4000 + round));
            let wires: Vec<RawSocket> = (0..SENDERS).map(|_| bed.wire("203.0.113.2").unwrap()).collect();
            let start = std::sync::Barrier::new(SENDERS);
            thread::scope(|scope| {
                for (sender, wire) in wires.iter().enumerate() {
                    let (bed, client, start) = (&*bed, &client, &start);
                    scope.spawn(move || {
                        let frames: Vec<_> = (0..64 / SENDERS)
                            .map(|number| wire.bytes(&bed.udp(client, W8080, format!("{sender} {number}").as_bytes())))
                            .collect();
                        start.wait();
                        for frame in frames {
                            wire.send_bytes(&frame).unwrap();
                        }
                    });
                }
            });
            let mut arrived = std::collections::BTreeSet::new();
            while arrived.len() < 64 {
                let packet = ends.server.receive(DEADLINE, |packet| packet.source.to_string() == client).unwrap();
                assert!(packet.checksums_right() && packet.destination == bed.endpoint(TARGET), "{packet}");
                assert!(arrived.insert(packet.payload), "one came twice");
            }
            let of_client = flows(bed).into_iter().filter(|flow| flow["client"] == client.as_str());
            assert_eq!(of_client.count(), 1, "round {round}");
        }
        assert_eq!(bed.stats().unwrap().dropped(), 0);
    }
}

for_each_family! {
    /// Row 28.
    fn what_is_sent_to_a_target_that_is_not_there_is_counted(bed = Testbed::builder()) {
        add(bed, "udp 203.0.113.1:8080 10.0.0.99:80");
        let socket = udp_socket(&bed.client, &bed.ip(ANY)).unwrap();
        // Past the three seconds after which the kernel gives its neighbour up.
        for _ in 0..40 {
            socket.send_to(b"anybody there?", bed.endpoint(W8080)).unwrap();
            thread::sleep(Duration::from_millis(100));
        }
        assert_eq!(only_rule(bed)["counters"]["packets_in"], 40, "{}", bed.stats().unwrap());
    }
}

for_each_family! {
    /// Row 28.
    fn the_first_packets_arrive_although_nobody_knows_the_neighbour(bed = Testbed::builder()) {
        add(bed, "tcp+udp 203.0.113.1:8080 10.0.0.10:80");
        let ends = Ends::new(bed);
        for round in 0..3_u32 {
            bed.router.ip("neigh flush dev lan\nneigh flush dev wan").unwrap();
            let client = format!("192.0.2.{}:4000", 10 + round);
            let frames = [0, 1, 2].map(|number| bed.udp(&client, W8080, &[number; 40]));
            for frame in &frames {
                ends.client.send(frame).unwrap();
            }
            for frame in &frames {
                let seen = ends.server.receive(DEADLINE, |packet| packet.payload == frame.payload).unwrap();
                assert!(seen.checksums_right() && seen.ttl == 63, "{seen}");
            }
            ends.outward(&bed.udp(TARGET, &client, b"answer"));
        }
        assert_eq!(bed.stats().unwrap().dropped(), 0);
    }
}

/// Asks every few milliseconds, until the answer is `wanted`; returns how long that took.
fn time_until(bed: &Testbed, socket: &UdpSocket, wanted: &str) -> Duration {
    let start = Instant::now();
    socket.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
    while start.elapsed() < DEADLINE {
        match udp_ask(socket, &bed.ip(W8080), "x") {
            Ok(answer) if answer == wanted => break,
            Ok(_) => thread::sleep(Duration::from_millis(5)),
            Err(_) => {}
        }
    }
    start.elapsed()
}

/// Within a second, and what a busy machine may add.
const FOLLOWED: Duration = Duration::from_millis(1500);

for_each_family! {
    /// Row 28.
    fn a_servers_new_hardware_address_is_followed(bed = Testbed::builder()) {
        add(bed, "udp 203.0.113.1:8080 10.0.0.10:80");
        let _server = UdpServer::echo(bed.server(), &bed.ip(TARGET), "server").unwrap();
        let socket = udp_socket(&bed.client, &bed.ip(ANY)).unwrap();
        time_until(bed, &socket, "server x");
        // The announcement (gratuitous ARP) that a real fail-over makes too.
        announces_itself(bed.server());
        bed.server().ip("link set eth0 address 02:aa:bb:cc:dd:01").unwrap();
        let time = time_until(bed, &socket, "server x");
        assert!(time < FOLLOWED, "{time:?}");
        assert_eq!(flows(bed).len(), 1, "still the same flow");
    }
}

for_each_family! {
    /// Row 28.
    fn a_changed_route_is_followed(
        bed = two_servers()
    ) {
        // A service address that two hosts have, like a virtual one that moves between them.
        let servers = ["10.0.0.10", "10.0.0.11"].map(|address| {
            bed.at(address).add_address("lo", &bed.ip("10.9.9.9/32")).unwrap();
            UdpServer::echo(bed.at(address), &bed.ip("10.9.9.9:80"), address).unwrap()
        });
        bed.router.ip(&bed.ip("route add 10.9.9.9 via 10.0.0.10")).unwrap();
        add(bed, "udp 203.0.113.1:8080 10.9.9.9:80");
        let socket = udp_socket(&bed.client, &bed.ip(ANY)).unwrap();
        time_until(bed, &socket, "10.0.0.10 x");
        bed.router.ip(&bed.ip("route replace 10.9.9.9 via 10.0.0.11")).unwrap();
        let time = time_until(bed, &socket, "10.0.0.11 x");
        assert!(time < FOLLOWED, "{time:?}");
        drop(servers);
    }
}

for_each_family! {
    /// Rows 24 and 46: what belongs to no flow is not forwarded, from either side.
    fn segments_without_a_flow_open_nothing(bed = Testbed::builder()) {
        add(bed, "tcp+udp 203.0.113.1:8080 10.0.0.10:80");
        let ends = Ends::new(bed);
        let segment = |flags| bed.tcp(STRANGER, W8080, TcpFields::new(flags, 1, 1), b"");
        ends.assert_none_arrives(&[SYN | ACK, RST, RST | ACK, FIN, 0].map(|flags| ends.client.bytes(&segment(flags))));
        let of_tcp = flows(bed).into_iter().filter(|flow| flow["protocol"] == "tcp");
        assert_eq!(of_tcp.count(), 0);
    }
}

for_each_family! {
    /// Row 25: each state has its own idle time, and traffic starts it anew.
    fn idle_flows_end(
        bed = Testbed::builder().config("[timeouts]\nudp-half-open = \"2s\"\nudp-established = \"4s\"\n")
    ) {
        add(bed, "udp 203.0.113.1:8080 10.0.0.10:80");
        let ends = Ends::new(bed);
        ends.inward(&bed.udp("192.0.2.1:1", W8080, b"never answered"));
        ends.inward(&bed.udp(STRANGER, W8080, b"question"));
        ends.outward(&bed.udp(TARGET, STRANGER, b"answer"));
        ends.inward(&bed.udp(STRANGER, W8080, b"thanks"));
        let clients = || -> Vec<_> { flows(bed).iter().map(|flow| flow["client"].as_str().unwrap().to_owned()).collect() };
        assert_eq!(clients().len(), 2);
        wait_until("the half-open flow has ended", DEADLINE, || clients() == [bed.ip(STRANGER)]).unwrap();
        let kept = Instant::now();
        while kept.elapsed() < Duration::from_secs(5) {
            // The server alone keeps it alive.
            ends.outward(&bed.udp(TARGET, STRANGER, b"more"));
            thread::sleep(Duration::from_millis(100));
        }
        assert_eq!(clients(), [bed.ip(STRANGER)]);
        let idle = Instant::now();
        wait_until("the flow has ended", DEADLINE, || clients().is_empty()).unwrap();
        assert!(idle.elapsed() > Duration::from_secs(2), "after {:?}", idle.elapsed());
    }
}

for_each_family! {
    /// Row 24: the flow table was lost, as when a router is replaced.
    fn a_connection_under_way_is_picked_up(bed = Testbed::builder()) {
        add(bed, "tcp 203.0.113.1:8080 10.0.0.10:80");
        let _server = TcpServer::echo(bed.server(), &bed.ip(TARGET)).unwrap();
        let mut stream = connect(&bed.client, &bed.ip(W8080)).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        let mut said = |text: &[u8]| {
            stream.write_all(text).unwrap();
            let mut back = vec![0; text.len()];
            stream.read_exact(&mut back).unwrap();
            assert_eq!(back, text);
        };
        said(b"before");
        bed.daemon.terminate().unwrap();
        bed.router.output(testbed::forwarderd(), &["detach"]).unwrap();
        bed.daemon.start().unwrap();
        assert_eq!(flows(bed).len(), 0);
        said(b"after");
        said(b"and on");
        assert_eq!(flow_states(bed), BTreeSet::from(["established".to_owned()]));
    }
}

for_each_family! {
    /// Row 26: the neighbour that requests come from fails over to other hardware.
    fn replies_follow_a_neighbour_with_a_new_hardware_address(bed = Testbed::builder()) {
        add(bed, "udp 203.0.113.1:8080 10.0.0.10:80");
        let server = udp_socket(bed.server(), &bed.ip(TARGET)).unwrap();
        server.set_read_timeout(Some(DEADLINE)).unwrap();
        let client = udp_socket(&bed.client, &bed.ip("203.0.113.2:5555")).unwrap();
        client.send_to(b"hello", bed.endpoint(W8080)).unwrap();
        let mut buffer = [0; 100];
        let (_, peer) = server.recv_from(&mut buffer).unwrap();
        // It announces itself, as whoever takes an address over does (RFC 5227 section 3).
        announces_itself(&bed.client);
        bed.client.ip("link set eth0 down\nlink set eth0 address 02:00:00:00:77:77\nlink set eth0 up").unwrap();
        client.set_read_timeout(Some(QUIET)).unwrap();
        // Not a word of the client's: its flow alone has to follow.
        wait_until("the server's words arrive", DEADLINE, || {
            server.send_to(b"still there?", peer).unwrap();
            client.recv_from(&mut buffer).is_ok()
        })
        .unwrap();
    }
}

for_each_family! {
    /// Row 29: many more strangers than the half-open table has room for, while somebody works.
    fn a_flood_of_strangers_is_survived(bed = Testbed::builder().config("[tables]\nhalf-open = 500\nhalf-open-ipv6 = 500\n")) {
        add(bed, "tcp+udp 203.0.113.1:8080 10.0.0.10:80");
        let _tcp = TcpServer::echo(bed.server(), &bed.ip(TARGET)).unwrap();
        let _udp = UdpServer::echo(bed.server(), &bed.ip(TARGET), "server").unwrap();
        let mut stream = connect(&bed.client, &bed.ip(W8080)).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        let socket = udp_socket(&bed.client, &bed.ip(ANY)).unwrap();
        for _ in 0..2 {
            assert!(answers(&socket, &bed.ip(W8080)));
        }
        let established = || flows(bed).iter().filter(|flow| flow["state"] == "established").count();
        assert_eq!(established(), 2);
        // What the server answers to strangers leads nowhere, and is not to be resolved for each.
        bed.client.ip(&bed.ip("route replace blackhole 192.0.2.0/24")).unwrap();
        let wire = bed.wire("203.0.113.2").unwrap();
        for number in 0..4000_u32 {
            let stranger = format!("192.0.2.{}:{}", number % 250 + 1, 1024 + number);
            let syn = TcpFields::new(TcpFields::SYN, number, 0);
            wire.send(&bed.tcp(&stranger, W8080, syn, b"")).unwrap();
            wire.send(&bed.udp(&stranger, W8080, b"flood")).unwrap();
            if number % 1000 == 0 {
                stream.write_all(b"at work").unwrap();
                stream.read_exact(&mut [0; 7]).unwrap();
                assert!(answers(&socket, &bed.ip(W8080)));
            }
        }
        assert_eq!(established(), 2);
        let over = Instant::now();
        let mut fresh = connect(&bed.client, &bed.ip(W8080)).unwrap();
        fresh.write_all(b"new").unwrap();
        fresh.read_exact(&mut [0; 3]).unwrap();
        assert!(over.elapsed() < Duration::from_secs(1), "{:?}", over.elapsed());
        stream.write_all(b"at work").unwrap();
        stream.read_exact(&mut [0; 7]).unwrap();
    }
}
