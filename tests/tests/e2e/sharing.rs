//! Ports that a rule maps and the host uses itself: who was there first keeps them (row 22).

use std::io::{Read, Write};
use std::net::{TcpStream, UdpSocket};

use testbed::{DEADLINE, Frame, Host, TcpServer, Testbed, UdpServer, connect_from, udp_ask, udp_socket};

use crate::common::*;

/// A range that the host's own ports lie in.
const RANGE: &str = "tcp+udp 203.0.113.1:40000-49999 10.0.0.10:40000-49999";

/// Somebody on the internet who serves, and the host's or its guest's port on the way there.
const PEER: &str = "203.0.113.2:443";
const OWN_PORT: u16 = 40_007;

fn assert_echoes(stream: &mut TcpStream) {
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    stream.write_all(b"hello").unwrap();
    let mut back = [0; 5];
    stream.read_exact(&mut back).unwrap();
    assert_eq!(&back, b"hello");
}

/// What others send to the same port is the mapping's.
fn assert_mapped(bed: &Testbed) {
    let target = format!("10.0.0.10:{OWN_PORT}");
    let _udp = UdpServer::echo(bed.server(), &target, "server").unwrap();
    let _tcp = TcpServer::echo(bed.server(), &target).unwrap();
    let external = format!("203.0.113.1:{OWN_PORT}");
    let socket = udp_socket(&bed.client, "0.0.0.0:0").unwrap();
    assert_eq!(udp_ask(&socket, &external, "hello").unwrap(), "server hello");
    assert_echoes(&mut testbed::connect(&bed.client, &external).unwrap());
}

fn masquerade(bed: &Testbed) {
    let rules = "table ip nat {\n chain postrouting {\n type nat hook postrouting priority 100\n \
                 oifname \"wan\" masquerade\n }\n}\n";
    bed.router.run(|| std::fs::write("/run/nat.nft", rules)).unwrap();
    bed.router.output("nft", &["-f", "/run/nat.nft"]).unwrap();
}

/// Talks to the peer with both protocols, and gives what goes on talking.
fn talk(host: &Host, from: &str) -> (TcpStream, UdpSocket) {
    let mut stream = connect_from(host, from, PEER, DEADLINE).unwrap();
    assert_echoes(&mut stream);
    let socket = udp_socket(host, from).unwrap();
    assert_eq!(udp_ask(&socket, PEER, "hello").unwrap(), "peer hello");
    (stream, socket)
}

for_each_datapath! {
    fn connections_of_the_router_from_a_mapped_port_get_their_answers(bed = Testbed::builder()) {
        add(bed, RANGE);
        let _udp = UdpServer::echo(&bed.client, PEER, "peer").unwrap();
        let _tcp = TcpServer::echo(&bed.client, PEER).unwrap();
        let (mut stream, socket) = talk(&bed.router, &format!("203.0.113.1:{OWN_PORT}"));
        assert_mapped(bed);
        assert_echoes(&mut stream);
        assert_eq!(udp_ask(&socket, PEER, "again").unwrap(), "peer again");
        assert!(bed.stats().unwrap().reason("host-session") > 0);
    }
}

for_each_datapath! {
    fn connections_that_the_host_masquerades_from_a_mapped_port_get_their_answers(
        bed = two_servers()
    ) {
        add(bed, RANGE);
        masquerade(bed);
        let _udp = UdpServer::echo(&bed.client, PEER, "peer").unwrap();
        let _tcp = TcpServer::echo(&bed.client, PEER).unwrap();
        // Masquerading keeps the port, which is the mapping's too.
        let (mut stream, socket) = talk(bed.at("10.0.0.11"), &format!("10.0.0.11:{OWN_PORT}"));
        assert_mapped(bed);
        assert_echoes(&mut stream);
        assert_eq!(udp_ask(&socket, PEER, "again").unwrap(), "peer again");
    }
}

for_each_datapath! {
    /// What was open before there was a rule stays open, also if the peer speaks first: sessions of the
    /// router's own, by its sockets, and of its NAT, by its connection tracking.
    fn connections_that_were_there_before_the_rule_stay(bed = two_servers()) {
        masquerade(bed);
        let _tcp = TcpServer::echo(&bed.client, PEER).unwrap();
        let from = format!("203.0.113.1:{OWN_PORT}");
        let mut stream = connect_from(&bed.router, &from, PEER, DEADLINE).unwrap();
        assert_echoes(&mut stream);
        let own = udp_socket(&bed.router, &from).unwrap();
        bed.router.run(|| own.connect(PEER)).unwrap();
        let guest = udp_socket(bed.at("10.0.0.11"), "10.0.0.11:40008").unwrap();
        guest.send_to(b"hello", PEER).unwrap();
        // Its neighbours are known now, so that it has gone.
        let peer = bed.wire("203.0.113.2").unwrap();
        guest.send_to(b"hello again", PEER).unwrap();
        let masqueraded = peer.receive(DEADLINE, |packet| packet.payload == b"hello again").unwrap().source;
        assert_eq!(masqueraded.to_string(), "203.0.113.1:40008");

        add(bed, RANGE);
        for (socket, to) in [(&own, from), (&guest, masqueraded.to_string())] {
            peer.send(&Frame::udp(PEER, &to, b"the peer is first")).unwrap();
            socket.set_read_timeout(Some(DEADLINE)).unwrap();
            assert_eq!(socket.recv(&mut [0; 100]).unwrap(), 17, "{to}");
        }
        assert_echoes(&mut stream);
        assert!(flows(bed).is_empty());
    }
}
