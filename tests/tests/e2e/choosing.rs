//! Which rule a packet belongs to, if any.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Read, Write};

use testbed::{
    DEADLINE, Frame, TcpFields, TcpServer, Testbed, UdpServer, connect, connect_from, udp_ask, udp_socket,
};

use crate::common::*;

/// The line that a server says to whoever connects.
fn greeting(bed: &Testbed, address: &str) -> String {
    let mut line = String::new();
    BufReader::new(connect(&bed.client, address).unwrap()).read_line(&mut line).unwrap();
    line.trim().to_owned()
}

for_each_family! {
    /// Row 13.
    fn tcp_and_udp_on_one_port_may_part(bed = two_servers()) {
        add(bed, "tcp 203.0.113.1:8080 10.0.0.10:80");
        add(bed, "udp 203.0.113.1:8080 10.0.0.11:80");
        add(bed, "tcp+udp 203.0.113.1:9090 10.0.0.11:80");
        let servers = ["10.0.0.10", "10.0.0.11"].map(|address| {
            let at = bed.ip(&format!("{address}:80"));
            let tcp = TcpServer::greeting(bed.at(address), &at, address).unwrap();
            (tcp, UdpServer::echo(bed.at(address), &at, address).unwrap())
        });
        let socket = udp_socket(&bed.client, &bed.ip(ANY)).unwrap();
        assert_eq!(greeting(bed, &bed.ip(W8080)), "10.0.0.10");
        assert_eq!(udp_ask(&socket, &bed.ip(W8080), "x").unwrap(), "10.0.0.11 x");
        assert_eq!(greeting(bed, &bed.ip("203.0.113.1:9090")), "10.0.0.11");
        // From another port: two of ours at one port of the target would collide there.
        let socket = udp_socket(&bed.client, &bed.ip(ANY)).unwrap();
        assert_eq!(udp_ask(&socket, &bed.ip("203.0.113.1:9090"), "x").unwrap(), "10.0.0.11 x");
        assert_eq!(rules(bed).len(), 3);
        assert_carried(bed);
        drop(servers);
    }
}

/// Row 12.
#[test]
fn a_port_belongs_to_one_rule() {
    let bed = Testbed::builder().start().unwrap();
    add(&bed, "tcp 203.0.113.1:8000-8100 10.0.0.10:80 --name first-come");
    for (protocol, external) in [
        ("tcp", "203.0.113.1:8000"),
        ("tcp", "203.0.113.1:8100"),
        ("tcp", "203.0.113.1:1-65535"),
        ("tcp+udp", "203.0.113.1:8050"),
    ] {
        let refusal = bed.ctl_output(&["add", protocol, external, "10.0.0.10:22"]).unwrap();
        let line = String::from_utf8(refusal.stderr).unwrap();
        assert_eq!(refusal.status.code(), Some(1), "{protocol} {external}");
        assert!(line.contains("first-come"), "{line}");
    }
    assert_eq!(rules(&bed).len(), 1);
    for (protocol, external) in
        [("udp", "203.0.113.1:8050"), ("tcp", "203.0.113.1:7999"), ("tcp", "203.0.113.1:8101")]
    {
        bed.ctl(&["add", protocol, external, "10.0.0.10:22"]).unwrap();
    }
}

for_each_family! {
    /// Row 14.
    fn ranges_map_port_by_port_or_all_to_one(bed = Testbed::builder()) {
        add(bed, "udp 203.0.113.1:10000-20000 10.0.0.10:30000-40000");
        add(bed, "udp 203.0.113.1:65535 10.0.0.10:1");
        add(bed, "udp 203.0.113.1:1 10.0.0.10:65535");
        add(bed, "udp 203.0.113.1:7000-7999 10.0.0.10:80");
        add(bed, "udp 203.0.113.1:8080 10.0.0.10:80");
        let ends = Ends::new(bed);
        for (asked, got) in [
            (10000, 30000), (10001, 30001), (20000, 40000), (65535, 1), (1, 65535), (7000, 80), (7500, 80), (7999, 80),
        ] {
            // A client port for each: several ports lead to one.
            let client = format!("192.0.2.7:{asked}");
            let question = bed.udp(&client, &format!("203.0.113.1:{asked}"), b"question");
            assert_eq!(ends.inward(&question).destination, bed.endpoint(&format!("10.0.0.10:{got}")));
            let answer = ends.outward(&bed.udp(&format!("10.0.0.10:{got}"), &client, b"answer"));
            assert_eq!(answer.source, bed.endpoint(&format!("203.0.113.1:{asked}")));
        }
        let outside = [9999, 20001, 6999, 8000, 65534, 2]
            .map(|port| ends.client.bytes(&bed.udp(STRANGER, &format!("203.0.113.1:{port}"), b"outside")));
        ends.assert_none_arrives(&outside);
    }
}

for_each_family! {
    /// Row 15, as far as addresses stay.
    fn a_rule_may_be_bound_to_an_interface(bed = Testbed::builder()) {
        bed.router.add_address("wan", &bed.ip("203.0.113.9/24")).unwrap();
        add(bed, "udp wan:8080 10.0.0.10:80");
        let _server = UdpServer::echo(bed.server(), &bed.ip(TARGET), "server").unwrap();
        let socket = udp_socket(&bed.client, &bed.ip(ANY)).unwrap();
        assert_eq!(udp_ask(&socket, &bed.ip(W8080), "x").unwrap(), "server x");
        let socket = udp_socket(&bed.client, &bed.ip(ANY)).unwrap();
        testbed::wait_until("the second address is served", DEADLINE, || answers(&socket, &bed.ip("203.0.113.9:8080"))).unwrap();
    }
}

for_each_family! {
    /// Row 17.
    fn only_listed_sources_may_use_a_rule_with_an_allow_list(bed = Testbed::builder()) {
        add(bed, "tcp 203.0.113.1:8080 10.0.0.10:80 --allow 198.51.100.0/25 --allow 192.0.2.7");
        add(bed, "udp 203.0.113.1:8080 10.0.0.10:80");
        let ends = Ends::new(bed);
        let syn = |source: &str| bed.tcp(source, W8080, TcpFields::new(TcpFields::SYN, 1, 0), b"");
        for source in ["198.51.100.1:9", "198.51.100.127:9", "192.0.2.7:9"] {
            ends.inward(&syn(source));
        }
        let others = ["198.51.100.128:9", "192.0.2.8:9", "192.0.2.6:9", "203.0.113.2:9"];
        ends.assert_none_arrives(&others.map(|source| ends.client.bytes(&syn(source))));
        let rule = rules(bed).into_iter().find(|rule| rule["protocol"] == "tcp").unwrap();
        assert_eq!(rule["counters"]["dropped"]["not-allowed"], others.len(), "{rule:#}");
    }
}

for_each_family! {
    /// Row 20.
    fn direct_traffic_of_a_target_is_never_rewritten(
        bed = Testbed::builder().internal("lan2", "10.0.1.1/24", &["10.0.1.10"])
    ) {
        add(bed, "tcp+udp 203.0.113.1:8080 10.0.0.10:80");
        let tcp = TcpServer::greeting(bed.server(), &bed.ip(TARGET), "direct").unwrap();
        let _udp = UdpServer::echo(bed.server(), &bed.ip(TARGET), "direct").unwrap();
        let inside = bed.at("10.0.1.10");
        // Same ports as a mapped flow that is there already.
        let outside = udp_socket(&bed.client, &bed.ip("203.0.113.2:6000")).unwrap();
        assert_eq!(udp_ask(&outside, &bed.ip(W8080), "x").unwrap(), "direct x");
        let socket = udp_socket(inside, &bed.ip("10.0.1.10:6000")).unwrap();
        assert_eq!(udp_ask(&socket, &bed.ip(TARGET), "x").unwrap(), "direct x");
        let mut line = String::new();
        BufReader::new(connect(inside, &bed.ip(TARGET)).unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "direct\n");
        assert_eq!(tcp.peers()[0].ip(), bed.endpoint("10.0.1.10:0").ip());

        // What the server begins by itself from the mapped port.
        mute(bed.server());
        let (client, server) = (bed.wire("203.0.113.2").unwrap(), bed.wire("10.0.0.10").unwrap());
        let own = bed.udp(TARGET, "192.0.2.99:99", b"of its own");
        server.send(&own).unwrap();
        let seen = client.receive(DEADLINE, |packet| packet.payload == own.payload).unwrap();
        assert_eq!(seen.source, bed.endpoint(TARGET));
        let own = bed.tcp(TARGET, "192.0.2.99:99", TcpFields::new(TcpFields::SYN, 1, 0), b"");
        server.send(&own).unwrap();
        let seen = client.receive(DEADLINE, |packet| packet.has_flags(TcpFields::SYN)).unwrap();
        assert_eq!(seen.source, bed.endpoint(TARGET));
    }
}

for_each_family! {
    /// Rows 1 and 26: pf's reply-to.
    fn a_reply_leaves_by_the_uplink_that_its_request_came_from(
        bed = Testbed::builder().external("wan2", "198.51.100.1/24", &["198.51.100.2"])
    ) {
        add(bed, "tcp+udp 203.0.113.1:8080 10.0.0.10:80");
        add(bed, "tcp+udp 198.51.100.1:8080 10.0.0.10:80");
        let ends = Ends::new(bed);
        let second = bed.wire("198.51.100.2").unwrap();
        // The route back to this stranger leads through `wan`, which its request did not come by.
        let question = bed.udp(STRANGER, "198.51.100.1:8080", b"question");
        second.send(&question).unwrap();
        ends.server.receive(DEADLINE, |packet| packet.payload == question.payload).unwrap();
        ends.server.send(&bed.udp(TARGET, STRANGER, b"answer")).unwrap();
        let answer = second.receive(DEADLINE, |packet| packet.payload == b"answer").unwrap();
        assert_eq!(answer.source, bed.endpoint("198.51.100.1:8080"));
        assert_eq!(answer.destination_mac, bed.at("198.51.100.2").mac("eth0").unwrap());
        // Row 47: nor does what the router itself says of it leave elsewhere.
        second.send(&Frame { ttl: 1, ..question }).unwrap();
        let error = second.receive_error(DEADLINE).unwrap();
        assert_eq!((error.kind, error.source), (time_exceeded(bed), bed.endpoint("198.51.100.1:0").ip()));
        assert_eq!(error.quoted_destination, bed.endpoint("198.51.100.1:8080"));

        // The same stranger by the other uplink is another flow; its port at the target must differ
        // or it is refused, but answers never cross.
        ends.client.send(&bed.udp("192.0.2.8:4000", W8080, b"by the first")).unwrap();
        ends.server.receive(DEADLINE, |packet| packet.payload == b"by the first").unwrap();
        let answer = ends.outward(&bed.udp(TARGET, "192.0.2.8:4000", b"to the first"));
        assert_eq!(answer.source, bed.endpoint(W8080));
    }
}

for_each_family! {
    /// Row 13, seen from the client: both protocols of a rule at work at once.
    fn many_clients_are_kept_apart(bed = Testbed::builder()) {
        add(bed, "tcp 203.0.113.1:8080 10.0.0.10:80");
        let server = TcpServer::echo(bed.server(), &bed.ip(TARGET)).unwrap();
        let mut streams: Vec<_> = (0..50).map(|_| connect(&bed.client, &bed.ip(W8080)).unwrap()).collect();
        for (number, stream) in streams.iter_mut().enumerate() {
            writeln!(stream, "client {number}").unwrap();
        }
        for (number, stream) in streams.iter().enumerate() {
            let mut line = String::new();
            BufReader::new(stream).read_line(&mut line).unwrap();
            assert_eq!(line, format!("client {number}\n"));
        }
        assert_eq!(server.peers().len(), 50);
        let counters = &only_rule(bed)["counters"];
        assert_eq!(counters["sessions_total"], 50, "{counters}");
        assert_carried(bed);
    }
}

for_each_family! {
    /// Row 19: a neighbour of the server, and the server itself, dial the external address.
    fn hosts_inside_reach_the_server_by_the_external_address(bed = two_servers()) {
        add(bed, "tcp+udp 203.0.113.1:8080 10.0.0.10:80");
        let tcp = TcpServer::echo(bed.server(), &bed.ip(TARGET)).unwrap();
        let udp = UdpServer::echo(bed.server(), &bed.ip(TARGET), "server").unwrap();
        for inside in ["10.0.0.11", "10.0.0.10"] {
            let host = bed.at(inside);
            let socket = udp_socket(host, &bed.ip(ANY)).unwrap();
            // Connected: it takes answers from there alone.
            host.run(|| socket.connect(bed.endpoint(W8080))).unwrap();
            assert_eq!(udp_ask(&socket, &bed.ip(W8080), "hello").unwrap(), "server hello", "{inside}");
            let mut stream = connect(host, &bed.ip(W8080)).unwrap();
            stream.write_all(b"hello").unwrap();
            let mut back = [0; 5];
            stream.read_exact(&mut back).unwrap();
            assert_eq!(&back, b"hello");
        }
        let seen: Vec<_> = tcp.peers().into_iter().chain(udp.peers()).map(|peer| peer.ip()).collect();
        assert!(!seen.is_empty() && seen.iter().all(|peer| *peer == bed.endpoint(W8080).ip()), "{seen:?}");
    }
}

for_each_family! {
    /// Rows 19 and 48.
    fn hairpin_ends_with_the_rules_word_and_its_allow_list(bed = two_servers()) {
        add(bed, "udp 203.0.113.1:8080 10.0.0.10:80 --name echo");
        let _server = UdpServer::echo(bed.server(), &bed.ip(TARGET), "server").unwrap();
        let socket = udp_socket(bed.at("10.0.0.11"), &bed.ip(ANY)).unwrap();
        assert!(answers(&socket, &bed.ip(W8080)));
        bed.ctl(&["set", "echo", "--allow", &bed.ip("10.0.0.99")]).unwrap();
        assert!(!answers(&socket, &bed.ip(W8080)));
        assert!(only_rule(bed)["counters"]["dropped"]["not-allowed"].as_u64() > Some(0));
        bed.ctl(&["set", "echo", "--allow", &bed.ip("10.0.0.11")]).unwrap();
        assert!(answers(&socket, &bed.ip(W8080)));
        bed.ctl(&["set", "echo", "--allow", "any", "--no-hairpin"]).unwrap();
        assert!(!answers(&socket, &bed.ip(W8080)), "also for who was using it");
        bed.ctl(&["set", "echo", "--hairpin"]).unwrap();
        assert!(answers(&socket, &bed.ip(W8080)));
    }
}

for_each_family! {
    /// Row 21: two external ports lead to one port of the server, and the client uses one port of its own.
    fn two_mappings_to_one_port_keep_apart_what_one_client_says(bed = Testbed::builder()) {
        add(bed, "tcp+udp 203.0.113.1:8080-8082 10.0.0.10:80");
        let udp = UdpServer::echo(bed.server(), &bed.ip(TARGET), "server").unwrap();
        let tcp = TcpServer::echo(bed.server(), &bed.ip(TARGET)).unwrap();
        let socket = udp_socket(&bed.client, &bed.ip("203.0.113.2:6000")).unwrap();
        socket.set_read_timeout(Some(DEADLINE)).unwrap();
        let mut streams = Vec::new();
        for port in 8080..=8082 {
            let mapped = bed.ip(&format!("203.0.113.1:{port}"));
            for _ in 0..2 {
                socket.send_to(mapped.as_bytes(), &mapped).unwrap();
                let mut buffer = [0; 100];
                let (length, from) = socket.recv_from(&mut buffer).unwrap();
                assert_eq!(from.to_string(), mapped);
                assert_eq!(buffer[..length], *format!("server {mapped}").as_bytes());
            }
            streams.push(connect_from(&bed.client, &bed.ip("203.0.113.2:6001"), &mapped, DEADLINE).unwrap());
        }
        for (at, stream) in streams.iter_mut().enumerate() {
            stream.write_all(&[at as u8; 1000]).unwrap();
            let mut back = [0; 1000];
            stream.read_exact(&mut back).unwrap();
            assert_eq!(back, [at as u8; 1000]);
        }
        let client = bed.endpoint("203.0.113.2:0").ip();
        for peers in [udp.peers(), tcp.peers()] {
            let ports: BTreeSet<u16> = peers.iter().map(|peer| peer.port()).collect();
            assert!(ports.len() == 3 && peers.iter().all(|peer| peer.ip() == client), "{peers:?}");
        }
        assert_eq!(bed.stats().unwrap().dropped(), 0);
    }
}

for_each_datapath! {
    /// Row 23.
    fn a_dmz_host_gets_what_no_rule_and_no_service_of_the_router_takes(bed = two_servers()) {
        let own = (
            TcpServer::greeting(&bed.router, "0.0.0.0:22", "router").unwrap(),
            UdpServer::echo(&bed.router, "203.0.113.1:53", "router").unwrap(),
        );
        let at_target = ["22", "80", "8080"].map(|port| {
            let at = format!("10.0.0.10:{port}");
            (TcpServer::greeting(bed.server(), &at, "dmz").unwrap(), UdpServer::echo(bed.server(), &at, "dmz").unwrap())
        });
        let other = UdpServer::echo(bed.at("10.0.0.11"), "10.0.0.11:80", "other").unwrap();
        let asked = |to: &str| udp_ask(&udp_socket(&bed.client, "0.0.0.0:0").unwrap(), to, "x").unwrap();
        add(bed, "tcp+udp 203.0.113.1:1-65535 10.0.0.10:1-65535 --dmz --review-by 2100-01-01 --name dmz");
        let shown = bed.ctl(&["list"]).unwrap();
        assert!(shown.contains("203.0.113.1:1-65535 (DMZ)"), "{shown}");

        assert_eq!(greeting(bed, W8080), "dmz");
        assert_eq!(asked("203.0.113.1:80"), "dmz x");
        assert_eq!(greeting(bed, "203.0.113.1:22"), "router");
        assert_eq!(asked("203.0.113.1:53"), "router x");

        // The router's own connections get their answers, also from where its sockets are not bound.
        let abroad = TcpServer::greeting(&bed.client, "203.0.113.2:7000", "abroad").unwrap();
        let mut line = String::new();
        BufReader::new(connect(&bed.router, "203.0.113.2:7000").unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "abroad\n");
        let echo = UdpServer::echo(&bed.client, "203.0.113.2:7000", "abroad").unwrap();
        let socket = udp_socket(&bed.router, "0.0.0.0:0").unwrap();
        assert_eq!(udp_ask(&socket, "203.0.113.2:7000", "x").unwrap(), "abroad x");

        // A rule takes its port away, at once also from who uses it.
        let socket = udp_socket(&bed.client, "0.0.0.0:0").unwrap();
        (0..2).for_each(|_| assert_eq!(udp_ask(&socket, W8080, "x").unwrap(), "dmz x"));
        add(bed, "udp 203.0.113.1:8080 10.0.0.11:80 --name other");
        assert_eq!(udp_ask(&socket, W8080, "x").unwrap(), "other x");
        assert_eq!(greeting(bed, W8080), "dmz");
        bed.ctl(&["del", "other"]).unwrap();
        assert_eq!(udp_ask(&socket, W8080, "x").unwrap(), "dmz x");

        // A service that ends leaves its port to the host.
        drop(own);
        assert_eq!(greeting(bed, "203.0.113.1:22"), "dmz");
        drop((at_target, other, abroad, echo));
    }
}

for_each_datapath! {
    /// Rows 17, 19 and 23.
    fn a_dmz_host_is_reached_from_inside_and_by_its_allow_list(bed = two_servers()) {
        add(bed, "udp 203.0.113.1:1-65535 10.0.0.10:1-65535 --dmz --force --name dmz");
        let own = UdpServer::echo(&bed.router, "203.0.113.1:53", "router").unwrap();
        let server = UdpServer::echo(bed.server(), "10.0.0.10:8080", "dmz").unwrap();
        let inside = udp_socket(bed.at("10.0.0.11"), "0.0.0.0:0").unwrap();
        assert_eq!(udp_ask(&inside, W8080, "x").unwrap(), "dmz x");
        assert_eq!(udp_ask(&inside, "203.0.113.1:53", "x").unwrap(), "router x");
        bed.ctl(&["set", "dmz", "--allow", "10.0.0.11"]).unwrap();
        let outside = udp_socket(&bed.client, "0.0.0.0:0").unwrap();
        assert!(answers(&inside, W8080) && !answers(&outside, W8080));
        assert!(answers(&outside, "203.0.113.1:53"));
        drop((own, server));
    }
}
