//! ICMP errors, path MTU, traceroute.

use std::io::{Read, Write};
use std::net::UdpSocket;
use std::thread;

use testbed::{DEADLINE, Family, Frame, TcpFields, TcpServer, Testbed, connect, udp_socket, wait_until};

use crate::common::*;

/// Sends until the network says that nobody is there.
fn assert_refused(socket: &UdpSocket) {
    socket.set_nonblocking(true).unwrap();
    wait_until("the socket is told that nobody listens", DEADLINE, || {
        let sent = socket.send(b"anybody there?");
        let refused = |error: std::io::Error| error.kind() == std::io::ErrorKind::ConnectionRefused;
        sent.is_err_and(refused) || socket.recv(&mut [0; 100]).is_err_and(refused)
    })
    .unwrap();
}

for_each_family! {
    /// Row 6: a real server's stack says that nobody listens, and a real client's takes it.
    fn a_client_is_told_that_nobody_listens_at_the_target(bed = Testbed::builder()) {
        add(bed, "udp 203.0.113.1:8080 10.0.0.10:80");
        let socket = udp_socket(&bed.client, &bed.ip(ANY)).unwrap();
        bed.client.run(|| socket.connect(bed.endpoint(W8080))).unwrap();
        assert_refused(&socket);
    }
}

for_each_family! {
    /// Row 6, the other way.
    fn a_server_is_told_that_the_client_has_gone(bed = Testbed::builder()) {
        add(bed, "udp 203.0.113.1:8080 10.0.0.10:80");
        let server = udp_socket(bed.server(), &bed.ip(TARGET)).unwrap();
        let client = udp_socket(&bed.client, &bed.ip("203.0.113.2:5555")).unwrap();
        client.send_to(b"hello", bed.endpoint(W8080)).unwrap();
        let mut buffer = [0; 100];
        server.set_read_timeout(Some(DEADLINE)).unwrap();
        assert_eq!(server.recv_from(&mut buffer).unwrap().1, bed.endpoint("203.0.113.2:5555"));
        drop(client);
        bed.server().run(|| server.connect(bed.endpoint("203.0.113.2:5555"))).unwrap();
        assert_refused(&server);
    }
}

for_each_family! {
    /// Row 5: a traceroute sees the address that it is about.
    fn whoever_sends_with_a_ttl_of_one_is_told_so_by_the_address_it_dialled(bed = Testbed::builder()) {
        add(bed, "tcp+udp 203.0.113.1:8080 10.0.0.10:80");
        let ends = Ends::new(bed);
        let probes = [
            bed.udp("203.0.113.2:4000", W8080, b"probe"),
            bed.tcp("203.0.113.2:4001", W8080, TcpFields::new(TcpFields::SYN, 1, 0), b""),
        ];
        for probe in probes {
            ends.drain();
            ends.client.send(&Frame { ttl: 1, ..probe.clone() }).unwrap();
            let error = ends.client.receive_error(DEADLINE).unwrap();
            assert_eq!((error.kind, error.checksums_right), (time_exceeded(bed), true), "{error:?}");
            assert_eq!(error.source, bed.endpoint(W8080).ip());
            assert_eq!((error.quoted_source, error.quoted_destination), (probe.source, probe.destination));
        }
    }
}

/// Sends this much through the mapping and back, and compares.
fn assert_carries(bed: &Testbed, length: usize) {
    let data: Vec<u8> = (0..length).map(|at| (at * 31 % 251) as u8).collect();
    let mut stream = connect(&bed.client, &bed.ip(W8080)).unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    let mut writer = stream.try_clone().unwrap();
    thread::scope(|scope| {
        scope.spawn(|| writer.write_all(&data).unwrap());
        let mut back = vec![0; length];
        stream.read_exact(&mut back).unwrap();
        assert!(back == data);
    });
}

for_each_family! {
    /// Row 7: a link behind the router is narrower than the sender knows, who is not told by the
    /// other end's segment size either.
    fn a_narrow_link_is_found_out_in_both_directions(bed = Testbed::builder()) {
        add(bed, "tcp+udp 203.0.113.1:8080 10.0.0.10:80");
        let _server = TcpServer::echo(bed.server(), &bed.ip(TARGET)).unwrap();
        let (client, server) = (bed.wire("203.0.113.2").unwrap(), bed.wire("10.0.0.10").unwrap());
        client.send(&bed.udp("203.0.113.2:7", W8080, b"a flow")).unwrap();
        let (neighbours, longest) = match bed.family {
            Family::Ipv4 => ("203.0.113.0/24 dev eth0", 1460),
            // As the kernel has made it, or it would be another one beside that.
            Family::Ipv6 => ("203.0.113.0/24 dev eth0 metric 256", 1440),
        };
        let narrow = [
            ("lan", bed.server(), "default via 10.0.0.1", &client, ("203.0.113.2:7", W8080), "translated-for-host"),
            ("wan", &bed.client, neighbours, &server, (TARGET, "203.0.113.2:7"), "left-too-big"),
        ];
        for (side, host, route, sender, (from, to), reason) in narrow {
            bed.router.ip(&format!("link set {side} mtu 1280")).unwrap();
            host.ip("link set eth0 mtu 1280").unwrap();
            host.ip(&bed.ip(&format!("route replace {route} advmss {longest}"))).unwrap();
            // The data path learns of it in its own time.
            wait_until("a long datagram is too long", DEADLINE, || {
                sender.send(&bed.udp(from, to, &[0; 1400])).unwrap();
                bed.stats().unwrap().reason(reason) > 0
            })
            .unwrap();
            let before = bed.stats().unwrap().reason(reason);
            assert_carries(bed, 1 << 20);
            assert!(bed.stats().unwrap().reason(reason) > before, "{reason}: {}", bed.stats().unwrap());
            bed.router.ip(&format!("link set {side} mtu 1500")).unwrap();
            host.ip("link set eth0 mtu 1500").unwrap();
        }
        assert!(bed.stats().unwrap().reason("translated-at-egress") > 0, "{}", bed.stats().unwrap());
    }
}

for_each_family! {
    /// Row 7: of two directions, the client is told by the address it dialled, the server by the router's own.
    fn whoever_sends_what_is_too_long_is_told_the_length(bed = Testbed::builder()) {
        add(bed, "udp 203.0.113.1:8080 10.0.0.10:80");
        let ends = Ends::new(bed);
        ends.inward(&bed.udp(STRANGER, W8080, b"a flow"));
        let kind = if bed.family == Family::Ipv4 { (3, 4) } else { (2, 0) };
        let ways = [
            ("lan", &ends.client, (STRANGER, W8080), "203.0.113.1:0"),
            ("wan", &ends.server, (TARGET, STRANGER), "10.0.0.1:0"),
        ];
        for (narrow, sender, (from, to), teller) in ways {
            bed.router.ip(&format!("link set {narrow} mtu 1280")).unwrap();
            let mut told = None;
            // The data path learns of it in its own time.
            wait_until("the sender is told", DEADLINE, || {
                sender.send(&bed.udp(from, to, &[0; 1400])).unwrap();
                told = sender.receive_error(QUIET).ok();
                told.is_some()
            })
            .unwrap();
            let error = told.unwrap();
            assert_eq!((error.kind, error.mtu, error.checksums_right), (kind, 1280, true), "{error:?}");
            assert_eq!(error.source, bed.endpoint(teller).ip());
            assert_eq!(
                (error.quoted_source, error.quoted_destination),
                (bed.endpoint(from), bed.endpoint(to))
            );
            bed.router.ip(&format!("link set {narrow} mtu 1500")).unwrap();
        }
    }
}

for_each_datapath! {
    /// Row 7: what is too long and may be cut up is cut up, by the router's stack.
    fn long_datagrams_that_may_be_fragmented_are_delivered_in_fragments(bed = Testbed::builder()) {
        add(bed, "udp 203.0.113.1:8080 10.0.0.10:80");
        let (client, server) =
            (udp_socket(&bed.client, &bed.ip("203.0.113.2:5555")).unwrap(), udp_socket(bed.server(), &bed.ip(TARGET)).unwrap());
        let (at_client, at_server) = (bed.wire("203.0.113.2").unwrap(), bed.wire("10.0.0.10").unwrap());
        client.send_to(b"a flow", bed.endpoint(W8080)).unwrap();
        let mut buffer = [0; 2000];
        for socket in [&client, &server] {
            socket.set_read_timeout(Some(QUIET)).unwrap();
        }
        let ways = [
            ("lan", bed.server(), &at_client, ("203.0.113.2:5555", W8080), &server, "translated-for-host"),
            ("wan", &bed.client, &at_server, (TARGET, "203.0.113.2:5555"), &client, "translated-at-egress"),
        ];
        for (side, host, sender, (from, to), receiver, reason) in ways {
            bed.router.ip(&format!("link set {side} mtu 1280")).unwrap();
            host.ip("link set eth0 mtu 1280").unwrap();
            let long = Frame { dont_fragment: false, ..bed.udp(from, to, &[7; 1400]) };
            wait_until("it arrives", DEADLINE, || {
                sender.send(&long).unwrap();
                receiver.recv(&mut buffer).is_ok_and(|length| buffer[..length] == [7; 1400])
                    && bed.stats().unwrap().reason(reason) > 0
            })
            .unwrap();
            bed.router.ip(&format!("link set {side} mtu 1500")).unwrap();
            host.ip("link set eth0 mtu 1500").unwrap();
        }
    }
}
