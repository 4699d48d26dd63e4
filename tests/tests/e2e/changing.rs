//! Rules that come, change and go while there is traffic.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};
use std::{panic, thread};

use testbed::{DEADLINE, TcpFields, TcpServer, Testbed, UdpServer, connect, udp_ask, udp_socket, wait_until};

use crate::common::*;

/// Whether a connection to an echo server still works.
fn echoes(stream: &mut TcpStream) -> bool {
    stream.set_read_timeout(Some(QUIET)).unwrap();
    let mut answer = [0; 4];
    stream.write_all(b"echo").is_ok() && stream.read_exact(&mut answer).is_ok()
}

for_each_family! {
    /// Row 30.
    fn a_rule_works_at_once_for_a_client_that_was_sending_already(bed = Testbed::builder()) {
        let _server = UdpServer::echo(bed.server(), &bed.ip(TARGET), "server").unwrap();
        let socket = udp_socket(&bed.client, &bed.ip(ANY)).unwrap();
        for _ in 0..20 {
            socket.send_to(b"too early", bed.endpoint(W8080)).unwrap();
        }
        add(bed, "udp 203.0.113.1:8080 10.0.0.10:80");
        assert_eq!(udp_ask(&socket, &bed.ip(W8080), "x").unwrap(), "server x");
        // Gone and come back, it works again for the same client.
        bed.ctl(&["del", "udp", &bed.ip(W8080)]).unwrap();
        assert!(!answers(&socket, &bed.ip(W8080)));
        add(bed, "udp 203.0.113.1:8080 10.0.0.10:80");
        assert!(answers(&socket, &bed.ip(W8080)));
    }
}

for_each_family! {
    /// Rows 31 and 46.
    fn a_deleted_rules_flows_are_cut_at_once(bed = two_servers()) {
        add(bed, "tcp+udp 203.0.113.1:8080 10.0.0.10:80 --name web");
        add(bed, "udp 203.0.113.1:9090 10.0.0.11:80");
        let tcp = TcpServer::echo(bed.server(), &bed.ip(TARGET)).unwrap();
        let _udp = UdpServer::echo(bed.server(), &bed.ip(TARGET), "server").unwrap();
        let mut stream = connect(&bed.client, &bed.ip(W8080)).unwrap();
        let socket = udp_socket(&bed.client, &bed.ip("203.0.113.2:6000")).unwrap();
        assert!(echoes(&mut stream) && answers(&socket, &bed.ip(W8080)) && answers(&socket, &bed.ip(W8080)));
        bed.ctl(&["del", "web"]).unwrap();
        assert!(!answers(&socket, &bed.ip(W8080)) && !echoes(&mut stream));
        assert!(connect(&bed.client, &bed.ip(W8080)).is_err());
        assert_eq!((flows(bed).len(), rules(bed).len()), (0, 1));

        // What the server still has to say to its clients does not go outside under its own address.
        let client = bed.wire("203.0.113.2").unwrap();
        let server = bed.wire("10.0.0.10").unwrap();
        server.send(&bed.udp(TARGET, "203.0.113.2:6000", b"late")).unwrap();
        let late = TcpFields::new(TcpFields::ACK | TcpFields::PSH, 1, 1);
        server.send(&bed.tcp(TARGET, &tcp.peers()[0].to_string(), late, b"late")).unwrap();
        // Somebody else's answer shows when to stop waiting.
        let _other = UdpServer::echo(bed.at("10.0.0.11"), &bed.ip("10.0.0.11:80"), "other").unwrap();
        socket.send_to(b"x", bed.endpoint("203.0.113.1:9090")).unwrap();
        let before = client.receive_until(DEADLINE, |packet| packet.payload == b"other x").unwrap();
        let leaked: Vec<_> = before.iter().filter(|packet| packet.source.ip() == bed.endpoint(TARGET).ip()).collect();
        assert!(leaked.is_empty(), "{}", leaked.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "));
    }
}

for_each_family! {
    /// Row 31: a rule that takes a deleted one's place does not get its flows.
    fn a_new_rule_does_not_revive_flows_of_a_former_one(bed = two_servers()) {
        let old = add(bed, "tcp+udp 203.0.113.1:8080 10.0.0.10:80");
        let _first = (TcpServer::echo(bed.server(), &bed.ip(TARGET)).unwrap(), UdpServer::echo(bed.server(), &bed.ip(TARGET), "first").unwrap());
        let mut stream = connect(&bed.client, &bed.ip(W8080)).unwrap();
        let socket = udp_socket(&bed.client, &bed.ip(ANY)).unwrap();
        assert!(echoes(&mut stream));
        assert_eq!(udp_ask(&socket, &bed.ip(W8080), "x").unwrap(), "first x");
        bed.ctl(&["del", &old["id"].to_string()]).unwrap();
        let new = add(bed, "tcp+udp 203.0.113.1:8080 10.0.0.11:80");
        assert_ne!(old["id"], new["id"]);
        assert_eq!((&new["counters"]["packets_in"], &new["counters"]["sessions_total"]), (&0.into(), &0.into()));
        let _second = UdpServer::echo(bed.at("10.0.0.11"), &bed.ip("10.0.0.11:80"), "second").unwrap();
        assert_eq!(udp_ask(&socket, &bed.ip(W8080), "x").unwrap(), "second x");
        assert!(!echoes(&mut stream));
    }
}

for_each_family! {
    /// Row 31: established flows end by themselves, and with the last of them the rule.
    fn a_draining_rule_keeps_its_flows_and_takes_no_new_ones(
        bed = Testbed::builder().config("[timeouts]\ntcp-closing = \"1s\"\n")
    ) {
        add(bed, "tcp 203.0.113.1:8080 10.0.0.10:80 --name web");
        let _server = TcpServer::echo(bed.server(), &bed.ip(TARGET)).unwrap();
        let mut stream = connect(&bed.client, &bed.ip(W8080)).unwrap();
        assert!(echoes(&mut stream));
        bed.ctl(&["del", "web", "--drain"]).unwrap();
        assert!(echoes(&mut stream));
        assert!(connect(&bed.client, &bed.ip(W8080)).is_err());
        assert!(echoes(&mut stream));
        drop(stream);
        wait_until("the drained rule is gone", DEADLINE, || rules(bed).is_empty()).unwrap();
    }
}

/// Asks every few milliseconds as long as there are answers; returns when the last one came.
fn last_answer(bed: &Testbed) -> Instant {
    let socket = udp_socket(&bed.client, &bed.ip(ANY)).unwrap();
    socket.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    let mut last = Instant::now();
    // One datagram may be lost on a real network; here three in a row mean that it is over.
    let mut lost = 0;
    while lost < 3 {
        match udp_ask(&socket, &bed.ip(W8080), "x") {
            Ok(_) => (last, lost) = (Instant::now(), 0),
            Err(_) => lost += 1,
        }
        thread::sleep(Duration::from_millis(10));
    }
    last
}

for_each_family! {
    /// Row 31: to a second, also with nobody there to end it.
    fn a_lifetime_ends_exactly_and_cuts_with_or_without_a_controller(bed = Testbed::builder()) {
        let _server = UdpServer::echo(bed.server(), &bed.ip(TARGET), "server").unwrap();
        let tcp = TcpServer::echo(bed.server(), &bed.ip(TARGET)).unwrap();
        for controller in [true, false] {
            let before = Instant::now();
            add(bed, "tcp+udp 203.0.113.1:8080 10.0.0.10:80 --lifetime 2s");
            let after = Instant::now();
            let mut stream = connect(&bed.client, &bed.ip(W8080)).unwrap();
            assert!(echoes(&mut stream));
            if !controller {
                bed.daemon.kill();
            }
            let end = last_answer(bed);
            assert!(end > before + Duration::from_secs(1), "ended {:?} after it was added", end - before);
            assert!(end < after + Duration::from_secs(3), "ended {:?} after it was added", end - after);
            assert!(!echoes(&mut stream));
            if !controller {
                bed.daemon.start().unwrap();
            }
            assert_eq!((rules(bed).len(), flows(bed).len()), (0, 0));
        }
        drop(tcp);
    }
}

for_each_family! {
    /// Row 31.
    fn a_renewed_rule_lives_on_with_its_flows(bed = Testbed::builder()) {
        let _server = TcpServer::echo(bed.server(), &bed.ip(TARGET)).unwrap();
        let rule = add(bed, "tcp 203.0.113.1:8080 10.0.0.10:80 --name web --lifetime 2s");
        let mut stream = connect(&bed.client, &bed.ip(W8080)).unwrap();
        let start = Instant::now();
        bed.ctl(&["renew", "web", "--lifetime", "1h"]).unwrap();
        let renewed = only_rule(bed);
        assert!(renewed["expires_at"].as_str().unwrap() > rule["expires_at"].as_str().unwrap());
        while start.elapsed() < Duration::from_secs(3) {
            assert!(echoes(&mut stream));
            thread::sleep(Duration::from_millis(100));
        }
        assert_eq!(only_rule(bed)["counters"]["sessions_total"], 1);
    }
}

for_each_family! {
    /// Row 32.
    fn a_changed_target_moves_udp_and_leaves_tcp_unless_cut(bed = two_servers()) {
        add(bed, "tcp+udp 203.0.113.1:8080 10.0.0.10:80 --name web");
        let servers = ["10.0.0.10", "10.0.0.11"].map(|address| {
            let at = bed.ip(&format!("{address}:80"));
            (TcpServer::echo(bed.at(address), &at).unwrap(), UdpServer::echo(bed.at(address), &at, address).unwrap())
        });
        let mut stream = connect(&bed.client, &bed.ip(W8080)).unwrap();
        let socket = udp_socket(&bed.client, &bed.ip(ANY)).unwrap();
        assert!(echoes(&mut stream));
        assert_eq!(udp_ask(&socket, &bed.ip(W8080), "x").unwrap(), "10.0.0.10 x");

        bed.ctl(&["set", "web", "--target", &bed.ip("10.0.0.11:80")]).unwrap();
        assert_eq!(udp_ask(&socket, &bed.ip(W8080), "x").unwrap(), "10.0.0.11 x");
        assert!(echoes(&mut stream));
        let mut second = connect(&bed.client, &bed.ip(W8080)).unwrap();
        assert!(echoes(&mut second));
        assert_eq!(servers[1].0.peers().len(), 1);

        bed.ctl(&["set", "web", "--target", &bed.ip("10.0.0.10:80"), "--cut"]).unwrap();
        assert!(!echoes(&mut stream) && !echoes(&mut second));
        assert_eq!(udp_ask(&socket, &bed.ip(W8080), "x").unwrap(), "10.0.0.10 x");
    }
}

for_each_family! {
    /// Rows 33 and 46.
    fn a_tightened_allow_list_cuts_whom_it_forbids(bed = Testbed::builder()) {
        bed.client.add_address("eth0", &bed.ip("203.0.113.3/24")).unwrap();
        add(bed, "udp 203.0.113.1:8080 10.0.0.10:80 --name web");
        let _server = UdpServer::echo(bed.server(), &bed.ip(TARGET), "server").unwrap();
        let [kept, forbidden] =
            ["203.0.113.2:7000", "203.0.113.3:7000"].map(|local| udp_socket(&bed.client, &bed.ip(local)).unwrap());
        assert!(answers(&kept, &bed.ip(W8080)) && answers(&forbidden, &bed.ip(W8080)));
        assert!(answers(&kept, &bed.ip(W8080)) && answers(&forbidden, &bed.ip(W8080)));
        bed.ctl(&["set", "web", "--allow", &bed.ip("203.0.113.2")]).unwrap();
        assert!(answers(&kept, &bed.ip(W8080)) && !answers(&forbidden, &bed.ip(W8080)));
        assert_eq!(flows(bed).len(), 1);
        // Row 46: what the server still has to say to the other goes nowhere.
        let (client, server) = (bed.wire("203.0.113.2").unwrap(), bed.wire("10.0.0.10").unwrap());
        server.send(&bed.udp(TARGET, "203.0.113.3:7000", b"late")).unwrap();
        kept.send_to(b"x", bed.endpoint(W8080)).unwrap();
        let before = client.receive_until(DEADLINE, |packet| packet.payload == b"server x").unwrap();
        assert!(before.iter().all(|packet| packet.source.ip() != bed.endpoint(TARGET).ip()), "{before:?}");
        bed.ctl(&["set", "web", "--allow", "any"]).unwrap();
        assert!(answers(&forbidden, &bed.ip(W8080)));
    }
}

for_each_datapath! {
    /// A disabled rule is kept and carries nothing.
    fn a_rule_can_be_switched_off_and_on(bed = Testbed::builder()) {
        add(bed, "udp 203.0.113.1:8080 10.0.0.10:80 --name web --disabled");
        let _server = UdpServer::echo(bed.server(), &bed.ip(TARGET), "server").unwrap();
        let socket = udp_socket(&bed.client, &bed.ip(ANY)).unwrap();
        assert!(!answers(&socket, &bed.ip(W8080)));
        assert_eq!(only_rule(bed)["state"], "disabled");
        bed.ctl(&["set", "web", "--enabled"]).unwrap();
        assert!(answers(&socket, &bed.ip(W8080)));
        assert_eq!(only_rule(bed)["state"], "active");
        bed.ctl(&["set", "web", "--disabled"]).unwrap();
        assert!(!answers(&socket, &bed.ip(W8080)));
    }
}

for_each_datapath! {
    /// Row 34, in small: a change of one rule does nothing to another's flows and counters.
    fn other_rules_do_not_notice_a_change(bed = Testbed::builder()) {
        add(bed, "udp 203.0.113.1:8080 10.0.0.10:80 --name kept");
        let _server = UdpServer::echo(bed.server(), &bed.ip(TARGET), "server").unwrap();
        let socket = udp_socket(&bed.client, &bed.ip(ANY)).unwrap();
        assert_eq!(udp_ask(&socket, &bed.ip(W8080), "x").unwrap(), "server x");
        let asking = thread::scope(|scope| {
            let asker = scope.spawn(|| {
                for _ in 0..2000 {
                    assert_eq!(udp_ask(&socket, &bed.ip(W8080), "x").unwrap(), "server x");
                }
            });
            for round in 0..10 {
                add(bed, &format!("udp 203.0.113.1:{} 10.0.0.10:81 --name other", 9000 + round));
                bed.ctl(&["set", "other", "--target", &bed.ip("10.0.0.10:82")]).unwrap();
                bed.ctl(&["del", "other"]).unwrap();
            }
            asker.join()
        });
        asking.unwrap_or_else(|panic| panic::resume_unwind(panic));
        let counters = &only_rule(bed)["counters"];
        assert_eq!((&counters["packets_in"], &counters["packets_out"]), (&2001.into(), &2001.into()), "{counters}");
        assert_eq!(counters["sessions_total"], 1, "{counters}");
    }
}
