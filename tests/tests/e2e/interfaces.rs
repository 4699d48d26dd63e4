//! Kinds of interfaces. What a usual kernel has and this machine's may lack is ignored here and runs in
//! a virtual machine: `cargo xtask test --vm`.

use std::io::{Error, ErrorKind, Read, Write};
use std::net::UdpSocket;
use std::os::fd::AsRawFd;
use std::thread;

use testbed::{
    DEADLINE, Datapath, End, Host, Process, TcpServer, Testbed, UdpServer, bytes, connect, tun, udp_ask,
    udp_socket, wait_until,
};

use crate::common::*;
use crate::living::{interface, refusal};

/// What everything of a mapping has to go through, from the client by this external address.
struct Way<'a> {
    bed: &'a Testbed,
    external: &'a str,
    target: &'a str,
}

impl Way<'_> {
    /// TCP, UDP, and ICMP errors, from behind the router and of the router itself.
    fn check(&self) {
        let Self { bed, external, target } = self;
        add(bed, &format!("tcp+udp {external}:8080 {target}:80"));
        add(bed, &format!("udp {external}:8081 {target}:81"));
        let mapped = format!("{external}:8080");
        self.carries_tcp(&mapped);
        self.carries_udp(&mapped);
        self.tells_errors();
        let stats = bed.stats().unwrap();
        assert!(stats.verdict("tc-ingress", "forward") > 100, "{stats}");
        assert_eq!(stats.dropped(), 0, "{stats}");
    }

    fn carries_tcp(&self, mapped: &str) {
        let _server = TcpServer::echo(self.bed.server(), &format!("{}:80", self.target)).unwrap();
        let data = bytes(1 << 20);
        let mut stream = connect(&self.bed.client, mapped).unwrap();
        let mut writer = stream.try_clone().unwrap();
        thread::scope(|scope| {
            scope.spawn(|| writer.write_all(&data).unwrap());
            let mut back = vec![0; data.len()];
            stream.read_exact(&mut back).unwrap();
            assert!(back == data);
        });
    }

    fn carries_udp(&self, mapped: &str) {
        let _server = UdpServer::echo(self.bed.server(), &format!("{}:80", self.target), "server").unwrap();
        let socket = udp_socket(&self.bed.client, "0.0.0.0:0").unwrap();
        for number in 0..20 {
            let question = format!("datagram {number}");
            assert_eq!(udp_ask(&socket, mapped, &question).unwrap(), format!("server {question}"));
        }
    }

    fn tells_errors(&self) {
        for (ttl, kind) in [(64, ErrorKind::ConnectionRefused), (1, ErrorKind::HostUnreachable)] {
            let socket = udp_socket(&self.bed.client, "0.0.0.0:0").unwrap();
            receive_errors(&socket);
            socket.set_ttl(ttl).unwrap();
            self.bed.client.run(|| socket.connect(format!("{}:8081", self.external))).unwrap();
            socket.set_nonblocking(true).unwrap();
            wait_until(&format!("with TTL {ttl} it is told: {kind}"), DEADLINE, || {
                let is_told = |error: Error| error.kind() == kind;
                socket.send(b"?").is_err_and(is_told) || socket.recv(&mut [0; 9]).is_err_and(is_told)
            })
            .unwrap();
        }
    }
}

/// Also those errors that a socket usually keeps to itself.
fn receive_errors(socket: &UdpSocket) {
    let on: libc::c_int = 1;
    // SAFETY: the option takes an int, and is given one.
    let done = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_IP,
            libc::IP_RECVERR,
            (&raw const on).cast(),
            size_of_val(&on) as libc::socklen_t,
        )
    };
    assert_eq!(done, 0, "{}", Error::last_os_error());
}

/// TC carries this interface, and `status` says why.
fn assert_tc(bed: &Testbed, name: &str, why: &str) {
    let shown = interface(bed, name);
    assert_eq!(shown["xdp"], "none", "{shown}");
    assert!(["TCX", "clsact"].contains(&shown["tc"].as_str().unwrap()), "{shown}");
    assert!(shown["why"].as_str().unwrap().contains(why), "{shown}");
}

/// The usual networks, and these interfaces of the router's in place of `wan` and `lan`.
fn bed(external: &str, internal: &str) -> Testbed {
    let mut bed = Testbed::builder().build().unwrap();
    bed.daemon.options.external = vec![external.to_owned()];
    bed.daemon.options.internal = vec![internal.to_owned()];
    bed
}

/// The frames come by the bridge's ports, and the router has its address on the bridge.
#[test]
fn a_bridge_is_an_internal_interface() {
    let mut bed = bed("wan", "br0");
    testbed::bridge(&bed.router, "br0").unwrap();
    bed.router
        .ip("addr del 10.0.0.1/24 dev lan\nlink set lan master br0\naddr add 10.0.0.1/24 dev br0")
        .unwrap();
    bed.daemon.start().unwrap();
    Way { bed: &bed, external: "203.0.113.1", target: "10.0.0.10" }.check();
    assert_tc(&bed, "br0", "bridge");
}

/// An uplink without Ethernet headers: the client at the other end of a tunnel.
fn tunnel_to_client(bed: &Testbed) -> testbed::TunCable {
    tun(
        &End::new(&bed.router, "tun0").address("198.51.100.1/24"),
        &End::new(&bed.client, "tun0").address("198.51.100.2/24"),
    )
    .unwrap()
}

/// The server at the other end of a tunnel.
fn tunnel_to_server(bed: &Testbed) -> testbed::TunCable {
    let cable = tun(
        &End::new(&bed.router, "tun1").address("10.0.9.1/24"),
        &End::new(bed.server(), "tun1").address("10.0.9.10/24"),
    );
    bed.server().ip("route replace default via 10.0.9.1").unwrap();
    cable.unwrap()
}

#[test]
fn a_tunnel_without_ethernet_headers_is_an_uplink() {
    let mut bed = bed("tun0", "lan");
    let _cable = tunnel_to_client(&bed);
    bed.daemon.start().unwrap();
    Way { bed: &bed, external: "198.51.100.1", target: "10.0.0.10" }.check();
    assert_tc(&bed, "tun0", "TC on a tun interface: XDP needs Ethernet headers");
}

#[test]
fn a_tunnel_without_ethernet_headers_leads_to_targets() {
    let mut bed = bed("wan", "tun1");
    let _cable = tunnel_to_server(&bed);
    bed.daemon.start().unwrap();
    Way { bed: &bed, external: "203.0.113.1", target: "10.0.9.10" }.check();
    assert_tc(&bed, "tun1", "Ethernet headers");
}

#[test]
fn between_two_tunnels_there_is_no_ethernet_header_at_all() {
    let mut bed = bed("tun0", "tun1");
    let (_to_client, _to_server) = (tunnel_to_client(&bed), tunnel_to_server(&bed));
    bed.daemon.start().unwrap();
    Way { bed: &bed, external: "198.51.100.1", target: "10.0.9.10" }.check();
}

/// Several uplinks of different kinds: what the router itself says leaves by that of the request.
#[test]
fn replies_leave_by_the_uplink_of_their_request_whatever_its_kind() {
    let mut bed = bed("tun0", "lan");
    bed.daemon.options.external.push("wan".to_owned());
    let _cable = tunnel_to_client(&bed);
    bed.daemon.start().unwrap();
    // The route back to either of the client's addresses leads by the other uplink.
    bed.router.ip("route add 198.51.100.2/32 via 203.0.113.2\nroute add 203.0.113.2/32 dev tun0").unwrap();
    for source in ["198.51.100.2", "203.0.113.2"] {
        bed.client.ip(&format!("rule add from {source} table {}", source.len())).unwrap();
    }
    bed.client
        .ip("route add default via 198.51.100.1 dev tun0 table 12\nroute add default via 203.0.113.1 dev eth0 table 11")
        .unwrap();
    let _server = UdpServer::echo(bed.server(), TARGET, "server").unwrap();
    for (external, client) in [("198.51.100.1", "198.51.100.2"), ("203.0.113.1", "203.0.113.2")] {
        add(&bed, &format!("udp {external}:8080 {TARGET}"));
        let socket = udp_socket(&bed.client, &format!("{client}:0")).unwrap();
        let ttl_of_one = udp_socket(&bed.client, &format!("{client}:0")).unwrap();
        for _ in 0..3 {
            assert!(answers(&socket, &format!("{external}:8080")), "{external}");
        }
        receive_errors(&ttl_of_one);
        ttl_of_one.set_ttl(1).unwrap();
        ttl_of_one.send_to(b"?", format!("{external}:8080")).unwrap();
        assert_eq!(ttl_of_one.recv(&mut [0; 9]).unwrap_err().kind(), ErrorKind::HostUnreachable);
    }
}

#[test]
fn xdp_on_an_interface_without_ethernet_headers_is_refused_by_name() {
    let mut bed = bed("tun0", "lan");
    let _cable = tunnel_to_client(&bed);
    bed.daemon.options.datapath = Some(Datapath::NativeXdp);
    let said = refusal(&bed, bed.daemon.command().unwrap());
    assert!(
        ["tun0", "Ethernet headers", "--datapath tc or auto"].iter().all(|word| said.contains(word)),
        "{said}"
    );
}

/// Also where everything else has generic XDP: a tunnel is TC's, and XDP sends nothing into it.
#[test]
fn beside_generic_xdp_a_tunnel_is_left_to_tc() {
    let mut bed = bed("wan", "tun1");
    let _cable = tunnel_to_server(&bed);
    bed.daemon.options.datapath = Some(Datapath::GenericXdp);
    bed.daemon.start().unwrap();
    Way { bed: &bed, external: "203.0.113.1", target: "10.0.9.10" }.check();
    assert_tc(&bed, "tun1", "Ethernet headers");
    assert_eq!(interface(&bed, "wan")["xdp"], "generic XDP");
}

#[test]
#[ignore = "needs 8021q: cargo xtask test --vm"]
fn a_vlan_is_an_uplink() {
    let mut bed = bed("wan.7", "lan");
    for (host, parent, address) in
        [(&bed.router, "wan", "198.51.100.1/24"), (&bed.client, "eth0", "198.51.100.2/24")]
    {
        host.ip(&format!(
            "link add link {parent} name {parent}.7 type vlan id 7\naddr add {address} dev {parent}.7\nlink set {parent}.7 up"
        ))
        .unwrap();
    }
    bed.daemon.start().unwrap();
    Way { bed: &bed, external: "198.51.100.1", target: "10.0.0.10" }.check();
    assert_tc(&bed, "wan.7", "vlan");
}

#[test]
#[ignore = "needs bonding: cargo xtask test --vm"]
fn a_bond_is_an_internal_interface() {
    let mut bed = bed("wan", "bond0");
    bed.router
        .ip("link add bond0 type bond mode active-backup miimon 100
             addr del 10.0.0.1/24 dev lan
             link set lan down
             link set lan master bond0
             addr add 10.0.0.1/24 dev bond0
             link set bond0 up")
        .unwrap();
    bed.daemon.start().unwrap();
    Way { bed: &bed, external: "203.0.113.1", target: "10.0.0.10" }.check();
    assert_tc(&bed, "bond0", "bond");
}

/// Makes `wg0` between two hosts that reach each other already.
fn wireguard(ends: [(&Host, &str, &str); 2]) {
    for (host, _, address) in ends {
        host.output(
            "sh",
            &["-c", "umask 077; wg genkey > /run/wg.key && wg pubkey < /run/wg.key > /run/wg.pub"],
        )
        .unwrap();
        host.ip(&format!("link add wg0 type wireguard\naddr add {address}/24 dev wg0\nlink set wg0 up"))
            .unwrap();
    }
    let [a, b] = ends;
    for ((host, ..), (peer, endpoint, _)) in [(a, b), (b, a)] {
        let key = peer.read("/run/wg.pub").unwrap();
        let endpoint = format!("{endpoint}:51820");
        host.output(
            "wg",
            &[
                "set",
                "wg0",
                "listen-port",
                "51820",
                "private-key",
                "/run/wg.key",
                "peer",
                key.trim(),
                "allowed-ips",
                "0.0.0.0/0",
                "endpoint",
                &endpoint,
            ],
        )
        .unwrap();
    }
}

#[test]
#[ignore = "needs wireguard: cargo xtask test --vm"]
fn wireguard_is_an_uplink() {
    let mut bed = bed("wg0", "lan");
    wireguard([(&bed.router, "203.0.113.1", "198.51.100.1"), (&bed.client, "203.0.113.2", "198.51.100.2")]);
    bed.daemon.start().unwrap();
    Way { bed: &bed, external: "198.51.100.1", target: "10.0.0.10" }.check();
    assert_tc(&bed, "wg0", "TC on a wireguard interface");
}

#[test]
#[ignore = "needs wireguard: cargo xtask test --vm"]
fn wireguard_leads_to_targets() {
    let mut bed = bed("wan", "wg0");
    wireguard([(&bed.router, "10.0.0.1", "10.0.9.1"), (bed.server(), "10.0.0.10", "10.0.9.10")]);
    bed.server().ip("route replace default dev wg0").unwrap();
    bed.daemon.start().unwrap();
    Way { bed: &bed, external: "203.0.113.1", target: "10.0.9.10" }.check();
    assert_tc(&bed, "wg0", "Ethernet headers");
}

/// The client's side of the link as an access provider has it, and the router's `ppp0`.
fn pppoe(bed: &Testbed) -> [Process; 2] {
    let start = |host: &Host, program: &str, arguments: &str| {
        host.output("mkdir", &["-p", "/run/lock"]).unwrap();
        let mut command = host.command(program);
        command.args(arguments.split_whitespace());
        host.start(command).unwrap()
    };
    bed.client.run(|| std::fs::write("/run/options", "noauth\nlcp-echo-interval 0\n")).unwrap();
    let server = start(
        &bed.client,
        "pppoe-server",
        "-F -k -I eth0 -L 198.51.100.2 -R 198.51.100.1 -N 1 -O /run/options",
    );
    let client = start(
        &bed.router,
        "pppd",
        "plugin pppoe.so wan nodetach noauth nodefaultroute noproxyarp ifname ppp0",
    );
    let [mut server, mut client] = [server, client];
    let is_up = || {
        bed.router
            .output("ip", &["addr", "show", "dev", "ppp0"])
            .is_ok_and(|text| text.contains("198.51.100.1"))
    };
    wait_until("the session is there", DEADLINE * 3, is_up).unwrap_or_else(|error| {
        let ended = [server.ended(), client.ended()];
        panic!("{error} ({ended:?}): {}; {}", server.written(), client.written())
    });
    [server, client]
}

#[test]
#[ignore = "needs ppp and pppoe: cargo xtask test --vm"]
fn pppoe_is_an_uplink() {
    let mut bed = bed("ppp0", "lan");
    let _session = pppoe(&bed);
    bed.daemon.start().unwrap();
    Way { bed: &bed, external: "198.51.100.1", target: "10.0.0.10" }.check();
    assert_tc(&bed, "ppp0", "Ethernet headers");
}
