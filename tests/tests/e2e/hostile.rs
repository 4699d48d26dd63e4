//! Hosts whose own packet filter would ruin what goes through their stack.

use std::fs;
use std::net::UdpSocket;

use testbed::{
    DEADLINE, Datapath, Frame, IcmpError, RawSocket, TcpFields, Testbed, UdpServer, udp_socket, wait_until,
};

use crate::common::*;

/// Loads nftables rules on the router.
fn nft(bed: &Testbed, rules: &str) {
    bed.router.run(|| fs::write("/run/hostile.nft", rules)).unwrap();
    bed.router.output("nft", &["-f", "/run/hostile.nft"]).unwrap();
}

fn has_table(bed: &Testbed) -> bool {
    bed.router.output("nft", &["list", "tables"]).unwrap().contains("table inet forwarder\n")
}

fn warnings(bed: &Testbed) -> Vec<String> {
    let status = bed.ctl_json(&["status"]).unwrap();
    status["warnings"].as_array().unwrap().iter().map(|line| line.as_str().unwrap().to_owned()).collect()
}

/// Waits for a warning with these words, and returns it.
fn warning(bed: &Testbed, words: &str) -> String {
    let find = || warnings(bed).into_iter().find(|warning| warning.contains(words));
    wait_until(words, DEADLINE, || find().is_some())
        .unwrap_or_else(|error| panic!("{error}: {:?}", warnings(bed)));
    find().unwrap()
}

/// Does what a warning advises, and waits until it is gone.
fn mend(bed: &Testbed, warning: &str) {
    let cure = warning.rsplit_once(": ").unwrap().1;
    bed.router.output("sh", &["-c", cure]).unwrap();
    wait_until("the warning goes", DEADLINE, || !warnings(bed).contains(&warning.to_owned())).unwrap();
}

const FORWARD_DROPS: &str = "table inet filter {
    chain forward { type filter hook forward priority 0; policy drop; }
}";

const INVALID_DROPS: &str = "table inet filter {
    chain prerouting { type filter hook prerouting priority -150; ct state invalid drop; }
    chain forward { type filter hook forward priority 0; ct state invalid drop; }
}";

const OUTPUT_DROPS: &str = "table inet local {
    chain output { type filter hook output priority 0; ct state invalid drop; }
    chain postrouting { type filter hook postrouting priority 50; ct state invalid drop; }
}";

const MASQUERADES: &str = "table ip nat {
    chain postrouting { type nat hook postrouting priority 100; oifname \"wan\" masquerade; }
}";

const CLIENT: &str = "203.0.113.2:5555";

/// Sends a frame, again and again, until its sender is told so.
fn told(sender: &RawSocket, frame: &Frame, kind: (u8, u8)) -> IcmpError {
    let mut said = None;
    wait_until("the sender is told", DEADLINE, || {
        sender.send(frame).unwrap();
        said = sender.receive_error(QUIET).ok().filter(|error| error.kind == kind);
        said.is_some()
    })
    .unwrap_or_else(|error| panic!("{error}: {kind:?} for {frame:?}"));
    said.unwrap()
}

/// Rows 5, 7, 28: first packets and ordinary ones arrive, and who sends what cannot go on is told, by
/// the address that it knows.
fn assert_told(bed: &Testbed) {
    let rule = add(bed, "tcp+udp 203.0.113.1:8080 10.0.0.10:80");
    let ends = Ends::new(bed);
    ends.inward(&Frame::udp(CLIENT, W8080, b"the first"));
    ends.outward(&Frame::udp(TARGET, CLIENT, b"its answer"));
    ends.inward(&Frame::udp(CLIENT, W8080, b"a flow"));
    // Of TCP the host sees the middle of a connection at best.
    ends.handshake();
    let ways = [
        ("lan", &ends.client, "203.0.113.1", (CLIENT, STRANGER, W8080, W8080)),
        ("wan", &ends.server, "10.0.0.1", (TARGET, TARGET, CLIENT, STRANGER)),
    ];
    for (narrow, sender, router, (from, tcp_from, to, tcp_to)) in ways {
        bed.router.ip(&format!("link set {narrow} mtu 1280")).unwrap();
        let segment = Frame::tcp(tcp_from, tcp_to, TcpFields::new(TcpFields::ACK, 101, 501), b"");
        for (frame, kind) in [
            (Frame { ttl: 1, ..Frame::udp(from, to, b"probe") }, (11, 0)),
            (Frame { ttl: 1, ..segment }, (11, 0)),
            (Frame { dont_fragment: true, ..Frame::udp(from, to, &[0; 1400]) }, (3, 4)),
        ] {
            let error = told(sender, &frame, kind);
            assert_eq!(
                (error.source.to_string().as_str(), error.checksums_right),
                (router, true),
                "{error:?}"
            );
            assert_eq!((error.quoted_source, error.quoted_destination), (frame.source, frame.destination));
        }
        bed.router.ip(&format!("link set {narrow} mtu 1500")).unwrap();
    }
    ends.inward(&Frame::udp(CLIENT, W8080, b"still there?"));
    ends.outward(&Frame::udp(TARGET, CLIENT, b"yes"));
    bed.ctl(&["del", &rule["id"].to_string()]).unwrap();
    bed.server().ip("route replace default via 10.0.0.1").unwrap();
}

/// A client and a server that let the network fragment what they say, with a flow between them.
struct Talk {
    client: UdpSocket,
    server: UdpSocket,
}

impl Talk {
    fn new(bed: &Testbed) -> Self {
        add(bed, "udp 203.0.113.1:8080 10.0.0.10:80");
        for host in [&bed.client, bed.server()] {
            host.sysctl("net.ipv4.ip_no_pmtu_disc", "1").unwrap();
        }
        let talk = Self {
            client: udp_socket(&bed.client, CLIENT).unwrap(),
            server: udp_socket(bed.server(), TARGET).unwrap(),
        };
        for socket in [&talk.client, &talk.server] {
            socket.set_read_timeout(Some(QUIET)).unwrap();
        }
        assert_eq!(talk.arrives(true, 8), Some(CLIENT.to_owned()));
        talk
    }

    /// Who is heard to have said this much, if it arrives whole.
    fn arrives(&self, inward: bool, length: usize) -> Option<String> {
        let (sender, to, receiver) =
            if inward { (&self.client, W8080, &self.server) } else { (&self.server, CLIENT, &self.client) };
        let said: Vec<u8> = (0..length).map(|at| (at * 31 % 251) as u8).collect();
        sender.send_to(&said, to).unwrap();
        let mut heard = [0; 4000];
        let (length, from) = receiver.recv_from(&mut heard).ok()?;
        assert!(heard[..length] == said);
        Some(from.to_string())
    }

    /// Row 7: what is too long for the link behind the router, in one piece or in several, arrives whole.
    fn assert_fragments_arrive(&self, bed: &Testbed, inward: bool) {
        let (narrow, from) = if inward { ("lan", CLIENT) } else { ("wan", W8080) };
        bed.router.ip(&format!("link set {narrow} mtu 1280")).unwrap();
        let by_host = || {
            let stats = bed.stats().unwrap();
            stats.reason("translated-for-host") + stats.reason("translated-at-egress")
        };
        for length in [1400, 3000] {
            let before = by_host();
            // The data path learns of the link's MTU in its own time.
            wait_until("what is too long is cut up and arrives", DEADLINE, || {
                let heard = self.arrives(inward, length);
                assert!(heard.as_deref().is_none_or(|heard| heard == from), "{heard:?}");
                heard.is_some() && by_host() > before
            })
            .unwrap_or_else(|error| panic!("{error}: {length} bytes, inward: {inward}"));
        }
        bed.router.ip(&format!("link set {narrow} mtu 1500")).unwrap();
    }
}

for_each_datapath! {
    /// Rows 5, 7: the kernel looks at TTL and length before its forward chain.
    fn a_forward_policy_of_drop_keeps_nobody_from_being_told(bed = Testbed::builder()) {
        nft(bed, FORWARD_DROPS);
        assert_told(bed);
    }
}

for_each_datapath! {
    /// Row 7: what has to go through the forward chain is lost there, which `status` says, with what mends it.
    fn a_forward_policy_of_drop_is_named_and_its_cure_works(bed = Testbed::builder()) {
        let talk = Talk::new(bed);
        assert_eq!(warnings(bed), [""; 0]);
        nft(bed, FORWARD_DROPS);
        let warning = warning(bed, "chain forward of nftables table inet filter drops");
        bed.router.ip("link set lan mtu 1280").unwrap();
        wait_until("it is too long", DEADLINE, || {
            talk.arrives(true, 1400);
            bed.stats().unwrap().reason("translated-for-host") > 0
        })
        .unwrap();
        assert_eq!(talk.arrives(true, 1400), None);
        mend(bed, &warning);
        talk.assert_fragments_arrive(bed, true);
        talk.assert_fragments_arrive(bed, false);
    }
}

for_each_datapath! {
    /// Rows 5, 7: connection tracking sees nothing of a mapping's connections, and calls it invalid.
    fn what_is_invalid_to_connection_tracking_is_answered_and_cut_up(bed = Testbed::builder()) {
        nft(bed, INVALID_DROPS);
        bed.router.sysctl("net.netfilter.nf_conntrack_tcp_loose", "0").unwrap();
        assert_told(bed);
        let talk = Talk::new(bed);
        talk.assert_fragments_arrive(bed, true);
        talk.assert_fragments_arrive(bed, false);
    }
}

for_each_datapath! {
    /// Rows 5, 7: the router's own errors about what is not tracked are invalid, unless they carry its mark.
    fn an_output_chain_that_drops_invalid_errors_is_named_and_its_cure_works(bed = Testbed::builder()) {
        nft(bed, OUTPUT_DROPS);
        warning(bed, "chain postrouting of nftables table inet local drops");
        let warning = warning(bed, "chain output of nftables table inet local drops");
        mend(bed, &warning);
        assert_eq!(warnings(bed), [""; 0]);
        assert_told(bed);
    }
}

for_each_datapath! {
    /// Row 7: of what the host masquerades, fragments would leave with another port.
    fn long_replies_keep_their_source_where_the_host_masquerades(bed = Testbed::builder()) {
        nft(bed, MASQUERADES);
        let talk = Talk::new(bed);
        talk.assert_fragments_arrive(bed, false);
        talk.assert_fragments_arrive(bed, true);
    }
}

for_each_datapath! {
    /// Rows 5, 7.
    fn masquerading_changes_nothing_of_what_the_router_tells(bed = Testbed::builder()) {
        nft(bed, MASQUERADES);
        assert_told(bed);
    }
}

for_each_datapath! {
    /// Row 46: what somebody else has put the mark on, or what lost its flow on the way, does not leave with
    /// its private source.
    fn what_carries_the_mark_and_is_not_translated_does_not_leave(bed = Testbed::builder()) {
        add(bed, "udp 203.0.113.1:8080 10.0.0.10:80");
        let ends = Ends::new(bed);
        ends.inward(&Frame::udp(CLIENT, W8080, b"a flow"));
        let direct = Frame::udp("10.0.0.10:4321", CLIENT, b"by itself");
        ends.outward(&direct);
        let marks = "type filter hook prerouting priority -400; meta mark set meta mark or 0x20000000;";
        nft(bed, &format!("table inet other {{\n chain marks {{\n {marks}\n }}\n}}"));
        ends.server.send(&direct).unwrap();
        wait_until("it is dropped", DEADLINE, || bed.stats().unwrap().reason("untranslated") > 0).unwrap();
        assert!(ends.client.receive_for(QUIET).unwrap().is_empty());
    }
}

for_each_datapath! {
    /// The mark is a bit of the operator's choice, and the others are left as they are.
    fn another_mark_works_as_well(bed = Testbed::builder().config("mark = 0x80")) {
        nft(bed, MASQUERADES);
        let talk = Talk::new(bed);
        talk.assert_fragments_arrive(bed, false);
        talk.assert_fragments_arrive(bed, true);
        let table = bed.router.output("nft", &["list", "table", "inet", "forwarder"]).unwrap();
        assert!(table.contains("0x00000080"), "{table}");
    }
}

for_each_datapath! {
    /// Row 47: what the kernel is to answer passes its rp_filter; what is forwarded does not.
    fn a_strict_rp_filter_on_a_second_uplink_is_named_and_its_cure_works(
        bed = Testbed::builder().external("wan2", "198.51.100.1/24", &["198.51.100.2"])
    ) {
        let dialled = "198.51.100.1:8080";
        add(bed, &format!("udp {dialled} 10.0.0.10:80"));
        let (ends, second) = (Ends::new(bed), bed.wire("198.51.100.2").unwrap());
        assert_eq!(warnings(bed), [""; 0]);
        bed.router.sysctl("net.ipv4.conf.wan2.rp_filter", "1").unwrap();
        let question = Frame::udp(STRANGER, dialled, b"question");
        second.send(&question).unwrap();
        ends.server.receive(DEADLINE, |packet| packet.payload == question.payload).unwrap();
        ends.server.send(&Frame::udp(TARGET, STRANGER, b"answer")).unwrap();
        second.receive(DEADLINE, |packet| packet.payload == b"answer").unwrap();

        let last_hop = Frame { ttl: 1, ..question };
        second.send(&last_hop).unwrap();
        assert!(second.receive_error(QUIET).is_err());
        let named = warning(bed, "rp_filter is strict on wan2, and the route back to the internet leads by wan:");
        let rule = bed.ctl_json(&["show", "1"]).unwrap();
        assert!(rule["warnings"].to_string().contains("rp_filter is strict on wan2"), "{rule:#}");
        mend(bed, &named);
        assert_eq!(told(&second, &last_hop, (11, 0)).quoted_destination.to_string(), dialled);
    }
}

/// Our table is there as long as packets are forwarded, and nobody else's is touched.
#[test]
fn the_table_is_kept_without_a_controller_and_goes_with_detach() {
    let mut bed = Testbed::builder().datapath(Datapath::Tc).start().unwrap();
    nft(&bed, FORWARD_DROPS);
    assert!(has_table(&bed));
    bed.daemon.kill();
    assert!(has_table(&bed));
    bed.daemon.start().unwrap();
    bed.daemon.terminate().unwrap();
    assert!(has_table(&bed));
    let detach = || bed.router.output(testbed::forwarderd(), &["detach"]).unwrap();
    let said = detach();
    assert!(said.contains("removed the nftables table inet forwarder"), "{said}");
    assert!(!has_table(&bed));
    assert!(detach().contains("nothing to take off"));
    let left = bed.router.output("nft", &["list", "ruleset"]).unwrap();
    assert!(left.contains("table inet filter") && left.contains("policy drop"), "{left}");
}

/// Whoever loads a ruleset of his own flushes ours with it.
#[test]
fn a_table_that_is_flushed_or_changed_is_put_back_and_told() {
    let bed = Testbed::builder().datapath(Datapath::Tc).start().unwrap();
    let list = || bed.router.output("nft", &["list", "table", "inet", "forwarder"]).unwrap_or_default();
    let before = list();
    for change in ["flush ruleset", "flush table inet forwarder", "delete chain inet forwarder output"] {
        bed.router.output("sh", &["-c", &format!("nft {change}")]).unwrap();
        wait_until("it is put back", DEADLINE, || list() == before).unwrap();
    }
    let log = bed.daemon.log();
    assert!(log.matches("it is put back").count() >= 3, "{log}");
    bed.router.output(testbed::forwarderd(), &["detach"]).unwrap();
    std::thread::sleep(std::time::Duration::from_secs(2));
    assert_eq!(list(), "", "the controller that still runs leaves it alone");
}

/// A start that fails leaves nothing behind.
#[test]
fn a_failed_start_leaves_no_table() {
    let mut bed = Testbed::builder().datapath(Datapath::NativeXdp).mtu(9000).build().unwrap();
    bed.daemon.start().unwrap_err();
    assert!(!has_table(&bed));
}

/// Without nft, forwarding goes on, and `status` says what may be missing.
#[test]
fn a_router_without_nft_forwards_and_says_what_it_lacks() {
    let mut bed = Testbed::builder().datapath(Datapath::Tc).build().unwrap();
    let nft = bed.router.output("sh", &["-c", "command -v nft"]).unwrap();
    bed.router.output("mount", &["--bind", "/dev/null", nft.trim()]).unwrap();
    bed.daemon.start().unwrap();
    add(&bed, "udp 203.0.113.1:8080 10.0.0.10:80");
    let _server = UdpServer::echo(bed.server(), TARGET, "server").unwrap();
    assert!(answers(&udp_socket(&bed.client, "0.0.0.0:0").unwrap(), W8080));
    warning(&bed, "the nftables table inet forwarder cannot be installed");
    bed.router.output("umount", &[nft.trim()]).unwrap();
    wait_until("it is installed", DEADLINE, || has_table(&bed) && warnings(&bed).is_empty()).unwrap();
}

/// What iptables-legacy has is not in nftables.
#[test]
fn a_forward_policy_of_old_iptables_is_named_and_its_cure_works() {
    let bed = Testbed::builder().datapath(Datapath::Tc).start().unwrap();
    bed.router.output("iptables-legacy", &["-P", "FORWARD", "DROP"]).unwrap();
    let talk = Talk::new(&bed);
    mend(&bed, &warning(&bed, "iptables' FORWARD"));
    talk.assert_fragments_arrive(&bed, true);
}

/// Rules of iptables get a cure of iptables.
#[test]
fn a_forward_policy_of_iptables_is_named_and_its_cure_works() {
    let bed = Testbed::builder().datapath(Datapath::Tc).start().unwrap();
    bed.router.output("iptables", &["-P", "FORWARD", "DROP"]).unwrap();
    let talk = Talk::new(&bed);
    let named = warning(&bed, "chain FORWARD of nftables table ip filter");
    assert!(named.contains("iptables -t filter -I FORWARD"), "{named}");
    mend(&bed, &named);
    talk.assert_fragments_arrive(&bed, true);
}
