//! Rules via the stack: translated at the edge, routed and filtered by the host.

use std::fs;
use std::time::Duration;

use testbed::{Family, TcpServer, Testbed, UdpServer, connect_from, udp_socket, wait_until};

use crate::common::*;

/// The host lets nothing through but what belongs to a connection that it has let through, and what
/// `accepted` says.
fn filter(bed: &Testbed, accepted: &str) {
    let rules = format!(
        "table inet filter\ndelete table inet filter\ntable inet filter {{
            chain forward {{
                type filter hook forward priority 0; policy drop;
                ct state established,related accept
                {accepted}
            }}
        }}"
    );
    bed.router.run(|| fs::write("/run/filter.nft", rules)).unwrap();
    bed.router.output("nft", &["-f", "/run/filter.nft"]).unwrap();
}

/// The server's ports, as the host's filter sees them.
fn accept_server(bed: &Testbed) -> String {
    let server = bed.ip("10.0.0.10");
    let family = if server.contains(':') { "ip6" } else { "ip" };
    let server = server.trim_matches(['[', ']']);
    format!("{family} daddr {server} tcp dport 80 accept; {family} daddr {server} udp dport 80 accept;")
}

fn greets(bed: &Testbed) -> bool {
    connect_from(&bed.client, &bed.ip("203.0.113.2:0"), &bed.ip(W8080), Duration::from_millis(300)).is_ok()
}

for_each_family! {
    fn the_host_filters_what_a_rule_via_the_stack_carries(bed = Testbed::builder()) {
        let rule = add(bed, "tcp+udp 203.0.113.1:8080 10.0.0.10:80 --via stack --name filtered");
        assert_eq!((&rule["via"], &rule["hairpin"]), (&"stack".into(), &false.into()));
        let _tcp = TcpServer::greeting(bed.server(), &bed.ip(TARGET), "hello").unwrap();
        let _udp = UdpServer::echo(bed.server(), &bed.ip(TARGET), "server").unwrap();
        let socket = udp_socket(&bed.client, &bed.ip("203.0.113.2:4000")).unwrap();

        filter(bed, "");
        assert!(!greets(bed) && !answers(&socket, &bed.ip(W8080)), "past a forward policy of drop");
        filter(bed, &accept_server(bed));
        wait_until("the host lets it through", testbed::DEADLINE, || greets(bed)).unwrap();
        assert!(answers(&socket, &bed.ip(W8080)) && answers(&socket, &bed.ip(W8080)));
        assert!(flow_states(bed).contains("established"));

        // Taken off that way, it goes past the host's filter again, and back.
        filter(bed, "");
        bed.ctl(&["set", "filtered", "--via", "fast"]).unwrap();
        assert!(greets(bed));
        bed.ctl(&["set", "filtered", "--via", "stack"]).unwrap();
        assert!(!greets(bed));
    }
}

#[test]
fn a_target_behind_an_uplink_is_reached_via_the_stack_alone() {
    let bed = Testbed::builder().family(Family::Ipv4).external(
        "wan",
        "203.0.113.1/24",
        &["203.0.113.2", "203.0.113.3"],
    );
    let bed = bed.start().unwrap();
    bed.at("203.0.113.3").ip("route add default via 203.0.113.1").unwrap();
    let _server = UdpServer::echo(bed.at("203.0.113.3"), "203.0.113.3:80", "server").unwrap();
    // It answers a neighbour through the router, as one that is reached through a tunnel would.
    bed.at("203.0.113.3").ip("route add 203.0.113.2/32 via 203.0.113.1").unwrap();
    bed.router.sysctl("net.ipv4.conf.all.send_redirects", "0").unwrap();
    bed.router.sysctl("net.ipv4.conf.wan.send_redirects", "0").unwrap();
    let socket = udp_socket(&bed.client, "203.0.113.2:4000").unwrap();
    add(&bed, "udp 203.0.113.1:8080 203.0.113.3:80 --name away");
    assert!(!answers(&socket, W8080));
    bed.ctl(&["set", "away", "--via", "stack"]).unwrap();
    assert!(answers(&socket, W8080) && answers(&socket, W8080));
}
