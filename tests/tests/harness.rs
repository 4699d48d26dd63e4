//! The test network itself: that it is what the other tests take it for.

#![allow(clippy::unwrap_used)]

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::UdpSocket;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;
use std::{env, fs};

use testbed::{
    DEADLINE, End, Extension, Family, Frame, Host, TcpFields, TcpServer, Testbed, UdpServer, bytes, connect,
    connect_from, download, udp_ask, udp_socket, veth, wait_until,
};

/// A bed whose client knows the way to the inside, so that plain routing joins them.
fn routed() -> Testbed {
    routed_in(Family::Ipv4)
}

fn routed_in(family: Family) -> Testbed {
    let bed = Testbed::builder().family(family).build().unwrap();
    bed.client.ip(&bed.ip("route add 10.0.0.0/8 via 203.0.113.1")).unwrap();
    bed
}

#[test]
fn each_address_has_a_twin_of_ipv6() {
    for (text, twin) in [
        ("tcp wan:8080 10.0.0.10:80-90", "tcp wan:8080 [fd00::a:0:0:a]:80-90"),
        ("--allow 198.51.100.0/25,192.0.2.7", "--allow 2001:db8::c6:33:64:0/121,2001:db8::c0:0:2:7"),
        ("203.0.113.1/24 dev eth0", "2001:db8::cb:0:71:1/112 dev eth0"),
        ("10.9.9.9/32", "fd00::a:9:9:9/128"),
        ("0.0.0.0:0", "[::]:0"),
        ("0.0.0.0/0", "::/0"),
        ("[2001:db8::1]:4000", "[2001:db8::1]:4000"),
        ("[::ffff:192.0.2.7]:4000", "[::ffff:192.0.2.7]:4000"),
        ("a1.2.3.4 10s 1.2.3", "a1.2.3.4 10s 1.2.3"),
    ] {
        assert_eq!(Family::Ipv6.of(text), twin);
        assert_eq!(Family::Ipv6.of(twin), twin);
        assert_eq!(Family::Ipv4.of(text), text);
    }
}

#[test]
fn real_sockets_reach_each_other_through_the_router() {
    for family in [Family::Ipv4, Family::Ipv6] {
        let bed = routed_in(family);
        let [tcp, udp] = ["10.0.0.10:80", "10.0.0.10:53"].map(|text| bed.ip(text));
        let tcp_server = TcpServer::greeting(bed.server(), &tcp, "hello").unwrap();
        let udp_server = UdpServer::echo(bed.server(), &udp, "dns").unwrap();

        let mut stream = connect_from(&bed.client, &bed.ip("203.0.113.2:4000"), &tcp, DEADLINE).unwrap();
        stream.write_all(b"again").unwrap();
        let mut answer = [0; 11];
        stream.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"hello\nagain");
        assert_eq!(tcp_server.peers(), [bed.endpoint("203.0.113.2:4000")]);

        let socket = udp_socket(&bed.client, &bed.ip("203.0.113.2:4001")).unwrap();
        assert_eq!(udp_ask(&socket, &udp, "who?").unwrap(), "dns who?");
        assert_eq!(udp_server.peers(), [bed.endpoint("203.0.113.2:4001")]);
    }
}

#[test]
fn downloads_are_equal_with_and_without_offloads() {
    for offload in [true, false] {
        let bed = Testbed::builder().checksum_offload(offload).build().unwrap();
        bed.client.ip("route add 10.0.0.0/8 via 203.0.113.1").unwrap();
        let body = bytes(3_000_000);
        let pages = HashMap::from([("/".to_owned(), body.clone())]);
        let _server = TcpServer::http(bed.server(), "10.0.0.10:80", pages).unwrap();
        assert!(download(&bed.client, "10.0.0.10:80", "/").unwrap() == body);
        assert!(download(&bed.client, "10.0.0.10:80", "/other").is_err());
    }
}

#[test]
fn hosts_on_one_network_are_joined_by_a_switch() {
    let bed = Testbed::builder()
        .internal("lan", "192.168.2.1/24", &["192.168.2.101", "192.168.2.102", "192.168.2.103"])
        .build()
        .unwrap();
    bed.client.ip("route add 192.168.0.0/16 via 203.0.113.1").unwrap();
    for address in ["192.168.2.101", "192.168.2.102", "192.168.2.103"] {
        let _server = UdpServer::echo(bed.at(address), &format!("{address}:7"), address).unwrap();
        for asker in [&bed.client, bed.at("192.168.2.102"), &bed.router] {
            let socket = udp_socket(asker, "0.0.0.0:0").unwrap();
            assert_eq!(udp_ask(&socket, &format!("{address}:7"), "x").unwrap(), format!("{address} x"));
        }
    }
}

#[test]
fn raw_frames_go_out_and_come_in() {
    for family in [Family::Ipv4, Family::Ipv6] {
        let bed = routed_in(family);
        let client = bed.wire("203.0.113.2").unwrap();
        let server = bed.wire("10.0.0.10").unwrap();

        let segment = TcpFields::new(TcpFields::PSH | TcpFields::ACK, 1000, 2000);
        let mut frame = bed.tcp("192.0.2.7:1234", "10.0.0.10:80", segment, b"payload");
        (frame.ttl, frame.dscp, frame.ecn, frame.id) = (9, 46, 1, 777);
        client.send(&frame).unwrap();
        let packet = server.receive(DEADLINE, |packet| packet.tcp.is_some()).unwrap();
        assert_eq!((packet.source, packet.destination), (frame.source, frame.destination));
        assert_eq!((packet.ttl, packet.dscp, packet.ecn, packet.id), (8, 46, 1, 777));
        assert_eq!((packet.tcp, packet.payload.as_slice()), (Some(segment), b"payload".as_slice()));
        assert_eq!(packet.destination_mac, bed.server().mac("eth0").unwrap());
        assert!(packet.checksums_right());

        let datagram = |payload: &[u8]| bed.udp("192.0.2.7:5", "10.0.0.10:6", payload);
        client.send(&Frame { checksum: Some(0), ..datagram(b"none") }).unwrap();
        let packet = server.receive(DEADLINE, |packet| packet.tcp.is_none()).unwrap();
        assert!(packet.checksum == 0 && packet.right_checksum != 0);
        assert_eq!(packet.checksums_right(), family == Family::Ipv4, "IPv6 has no packets without one");

        client.send(&Frame { checksum: Some(7), ..datagram(b"wrong") }).unwrap();
        assert!(!server.receive(DEADLINE, |packet| packet.payload == b"wrong").unwrap().checksums_right());

        client.send(&datagram(b"last")).unwrap();
        client.send(&datagram(b"after")).unwrap();
        let before = server.receive_until(DEADLINE, |packet| packet.payload == b"after").unwrap();
        assert_eq!(before.len(), 1);
        assert!(server.receive(Duration::from_millis(20), |_| true).is_err());
    }
}

#[test]
fn what_stands_before_the_ports_goes_out_and_comes_in() {
    let extensions = vec![
        Extension::hop_by_hop(16),
        Extension::destination_options(8),
        Extension::routing(0),
        Extension::fragment(7, 0, false),
        Extension::authentication(),
    ];
    for family in [Family::Ipv4, Family::Ipv6] {
        let bed = routed_in(family);
        let (client, server) = (bed.wire("203.0.113.2").unwrap(), bed.wire("10.0.0.10").unwrap());
        let options = vec![1, 1, 1, 0];
        let bare = bed.udp("192.0.2.7:5", "10.0.0.10:6", b"payload");
        let frame = Frame { options, extensions: extensions.clone(), ..bare };
        client.send(&frame).unwrap();
        let packet = server.receive(DEADLINE, |packet| packet.payload == b"payload").unwrap();
        assert_eq!((packet.between.len(), packet.checksums_right()), (frame.between().len(), true));
        assert_eq!(packet.between, frame.between());
    }
}

#[test]
fn fragments_are_put_together_by_real_stacks() {
    for family in [Family::Ipv4, Family::Ipv6] {
        let bed = routed_in(family);
        let client = bed.wire("203.0.113.2").unwrap();
        let server = udp_socket(bed.server(), &bed.ip("10.0.0.10:6")).unwrap();
        let whole = bed.udp("203.0.113.2:5", "10.0.0.10:6", &[9; 100]);
        for fragment in client.fragments(&whole, 40) {
            client.send_bytes(&fragment).unwrap();
        }
        let mut buffer = [0; 200];
        assert_eq!(server.recv_from(&mut buffer).unwrap(), (100, bed.endpoint("203.0.113.2:5")));
        assert_eq!(buffer[..100], [9; 100]);
    }
}

#[test]
fn errors_are_read() {
    for (family, unreachable) in [(Family::Ipv4, (3, 3)), (Family::Ipv6, (1, 4))] {
        let bed = routed_in(family);
        let client = bed.wire("203.0.113.2").unwrap();
        client.send(&bed.udp("203.0.113.2:5", "10.0.0.10:6", b"nobody listens")).unwrap();
        let error = client.receive_error(DEADLINE).unwrap();
        assert_eq!((error.kind, error.checksums_right, error.mtu), (unreachable, true, 0), "{error:?}");
        assert_eq!(error.source, bed.endpoint("10.0.0.10:0").ip());
        assert_eq!(error.quoted_source, bed.endpoint("203.0.113.2:5"));
        assert_eq!(error.quoted_destination, bed.endpoint("10.0.0.10:6"));
    }
}

#[test]
fn a_host_sees_its_own_sys_and_run() {
    let host = Host::new("alone").unwrap();
    assert_eq!(host.run(|| fs::read_dir("/sys/class/net").unwrap().count()), 1);
    host.run(|| {
        fs::create_dir("/sys/fs/bpf/pins").unwrap();
        fs::write("/run/testbed-self-test", "here").unwrap();
    });
    // They outlive what made them, and are there for processes and threads, but only of this host.
    assert_eq!(host.output("cat", &["/run/testbed-self-test"]).unwrap(), "here");
    assert_eq!(host.output("ls", &["-d", "/sys/fs/bpf/pins"]).unwrap(), "/sys/fs/bpf/pins\n");
    let other = Host::new("other").unwrap();
    assert!(other.read("/run/testbed-self-test").is_err());
    assert!(!fs::exists("/run/testbed-self-test").unwrap());
    assert!(!fs::exists("/sys/fs/bpf/pins").unwrap());
}

#[test]
fn beds_side_by_side_do_not_meet() {
    let beds = [routed(), routed()];
    let servers = ["first", "second"].map(|name| {
        let bed = &beds[usize::from(name == "second")];
        TcpServer::greeting(bed.server(), "10.0.0.10:80", name).unwrap()
    });
    for (bed, name) in beds.iter().zip(["first", "second"]) {
        let mut line = String::new();
        BufReader::new(connect(&bed.client, "10.0.0.10:80").unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line.trim(), name);
    }
    assert!(servers.iter().all(|server| server.peers().len() == 1));
}

#[test]
fn links_are_as_they_were_ordered() {
    let [a, b] = ["a", "b"].map(|name| Host::new(name).unwrap());
    let end =
        |host, address| End::new(host, "eth0").address(address).mtu(1400).gro(false).checksum_offload(false);
    veth(&end(&a, "10.1.1.1/24"), &end(&b, "10.1.1.2/24")).unwrap();
    let server = udp_socket(&b, "10.1.1.2:7").unwrap();
    let asked = a.spawn(|| {
        let socket = UdpSocket::bind("10.1.1.1:8").unwrap();
        socket.send_to(&[0; 1372], "10.1.1.2:7").unwrap();
        socket
    });
    let mut buffer = [0; 2000];
    assert_eq!(server.recv_from(&mut buffer).unwrap(), (1372, "10.1.1.1:8".parse().unwrap()));
    drop(asked.join().unwrap());
    for (host, other) in [(&a, &b), (&b, &a)] {
        assert_eq!(host.read("/sys/class/net/eth0/mtu").unwrap(), "1400\n");
        assert_ne!(host.mac("eth0").unwrap(), other.mac("eth0").unwrap());
    }
}

/// The identity of a host's network.
fn network(host: &Host) -> PathBuf {
    host.run(|| fs::read_link("/proc/thread-self/ns/net").unwrap())
}

/// Whether any thread of this machine is in a network, or this process holds it open.
fn is_held(network: &PathBuf) -> bool {
    let held = |path: PathBuf| fs::read_link(path).is_ok_and(|it| it == *network);
    let entries =
        |path: PathBuf| fs::read_dir(path).into_iter().flatten().flatten().map(|entry| entry.path());
    let threads = entries("/proc".into()).flat_map(|process| entries(process.join("task")));
    threads.map(|thread| thread.join("ns/net")).any(held) || entries("/proc/self/fd".into()).any(held)
}

#[test]
fn a_panic_leaves_nothing() {
    let mut seen = None;
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        let bed = routed();
        seen = Some(network(&bed.router));
        assert!(is_held(seen.as_ref().unwrap()));
        let mut sleep = bed.router.command("sleep");
        sleep.arg("1000");
        let _process = bed.router.start(sleep).unwrap();
        let _server = TcpServer::echo(&bed.router, "10.0.0.1:80").unwrap();
        bed.router.run(|| panic!("inside a host"));
    }));
    assert_eq!(outcome.unwrap_err().downcast_ref(), Some(&"inside a host"));
    wait_until("the network is gone", DEADLINE, || !is_held(seen.as_ref().unwrap())).unwrap();
}

#[test]
fn being_killed_leaves_nothing() {
    const VICTIM: &str = "TESTBED_VICTIM";
    if env::var_os(VICTIM).is_some() {
        let bed = routed();
        let mut sleep = bed.router.command("sleep");
        sleep.arg("1000");
        // Started on a thread that ends at once, which must not end the process.
        let _process = bed.router.run(|| bed.router.start(sleep).unwrap());
        println!("network {}", network(&bed.router).display());
        loop {
            std::thread::park();
        }
    }
    let mut victim = Command::new(env::current_exe().unwrap())
        .args(["--exact", "being_killed_leaves_nothing", "--nocapture"])
        .env(VICTIM, "1")
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(victim.stdout.take().unwrap()).lines().map_while(Result::ok);
    let network =
        lines.find_map(|line| line.split_once("network ").map(|(_, id)| PathBuf::from(id))).unwrap();
    assert!(is_held(&network), "the process inside lives on");
    victim.kill().unwrap();
    victim.wait().unwrap();
    wait_until("the network is gone", DEADLINE, || !is_held(&network)).unwrap();
}
