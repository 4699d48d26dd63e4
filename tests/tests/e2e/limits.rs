//! How much a rule may carry.

use std::io::{Read, Write};
use std::thread;
use std::time::Duration;

use testbed::{DEADLINE, Frame, TcpFields, TcpServer, Testbed, connect, wait_until};

use crate::common::*;

const FIN: u8 = TcpFields::FIN;
const SYN: u8 = TcpFields::SYN;
const RST: u8 = TcpFields::RST;
const ACK: u8 = TcpFields::ACK;

/// A stranger by number: another address each.
fn stranger(number: u32) -> String {
    format!("192.0.2.{number}:4000")
}

fn inward(ends: &Ends, client: &str, flags: u8, sequence: u32, acknowledgment: u32) {
    ends.inward(&Frame::tcp(client, W8080, TcpFields::new(flags, sequence, acknowledgment), b""));
}

fn outward(ends: &Ends, client: &str, flags: u8, sequence: u32, acknowledgment: u32) {
    ends.outward(&Frame::tcp(TARGET, client, TcpFields::new(flags, sequence, acknowledgment), b""));
}

/// Makes a TCP connection: the client stands at 101, the server at 501.
fn establish(ends: &Ends, client: &str) {
    inward(ends, client, SYN, 100, 0);
    outward(ends, client, SYN | ACK, 500, 101);
    inward(ends, client, ACK, 101, 501);
}

fn dropped(bed: &Testbed, reason: &str) -> u64 {
    rules(bed).iter().filter_map(|rule| rule["counters"]["dropped"][reason].as_u64()).sum()
}

/// Sends a frame that a limit has to refuse.
fn assert_refused(bed: &Testbed, ends: &Ends, frame: &Frame, reason: &str) {
    let before = dropped(bed, reason);
    ends.drain();
    ends.client.send(frame).unwrap();
    wait_until("the limit refuses it", DEADLINE, || dropped(bed, reason) == before + 1).unwrap();
    let arrived = ends.server.receive_for(Duration::from_millis(20)).unwrap();
    assert!(arrived.iter().all(|packet| packet.source != frame.source), "{arrived:?}");
}

fn syn(client: &str) -> Frame {
    Frame::tcp(client, W8080, TcpFields::new(SYN, 100, 0), b"")
}

for_each_datapath! {
    /// Row 18.
    fn a_rule_takes_as_many_sessions_as_it_may_and_each_that_ends_leaves_room_at_once(bed = Testbed::builder()) {
        add(bed, "tcp 203.0.113.1:8080 10.0.0.10:80 --max-sessions 3 --name web");
        let ends = Ends::new(bed);
        (1..=3).for_each(|number| establish(&ends, &stranger(number)));
        assert_refused(bed, &ends, &syn(&stranger(4)), "session-limit");
        // Who is in is untouched.
        inward(&ends, &stranger(1), ACK | TcpFields::PSH, 101, 501);
        inward(&ends, &stranger(1), RST, 101, 0);
        establish(&ends, &stranger(4));
        assert_refused(bed, &ends, &syn(&stranger(5)), "session-limit");
        outward(&ends, &stranger(2), RST | ACK, 501, 101);
        establish(&ends, &stranger(5));
        inward(&ends, &stranger(3), FIN | ACK, 101, 501);
        assert_refused(bed, &ends, &syn(&stranger(6)), "session-limit");
        outward(&ends, &stranger(3), FIN | ACK, 501, 102);
        inward(&ends, &stranger(3), ACK, 102, 502);
        establish(&ends, &stranger(6));
        assert_refused(bed, &ends, &syn(&stranger(7)), "session-limit");
        let shown = || bed.ctl(&["show", "web"]).unwrap().contains("3 sessions (3 in use)");
        wait_until("`show` says how many there are", DEADLINE, shown).unwrap();

        bed.ctl(&["set", "web", "--cut"]).unwrap();
        (11..=13).for_each(|number| establish(&ends, &stranger(number)));
        assert_refused(bed, &ends, &syn(&stranger(14)), "session-limit");
        bed.ctl(&["set", "web", "--allow", "192.0.2.0/28", "--allow", "192.0.2.13"]).unwrap();
        assert_refused(bed, &ends, &syn(&stranger(14)), "session-limit");
        bed.ctl(&["set", "web", "--allow", "192.0.2.11", "192.0.2.12", "192.0.2.14"]).unwrap();
        establish(&ends, &stranger(14));
        assert_refused(bed, &ends, &Frame { source: "192.0.2.14:9".parse().unwrap(), ..syn(&stranger(14)) }, "session-limit");
    }
}

for_each_datapath! {
    /// Row 18.
    fn a_source_takes_as_many_sessions_as_it_may(bed = Testbed::builder()) {
        add(bed, "tcp+udp 203.0.113.1:8080 10.0.0.10:80 --max-sessions-per-source 2");
        let ends = Ends::new(bed);
        establish(&ends, "192.0.2.7:1001");
        // UDP counts with TCP: it is one rule.
        ends.inward(&Frame::udp("192.0.2.7:1002", W8080, b"question"));
        ends.outward(&Frame::udp(TARGET, "192.0.2.7:1002", b"answer"));
        ends.inward(&Frame::udp("192.0.2.7:1002", W8080, b"thanks"));
        assert_refused(bed, &ends, &syn("192.0.2.7:1003"), "source-limit");
        assert_refused(bed, &ends, &Frame::udp("192.0.2.7:1003", W8080, b"another"), "source-limit");
        establish(&ends, "192.0.2.8:1001");
        inward(&ends, "192.0.2.7:1001", RST, 101, 0);
        establish(&ends, "192.0.2.7:1003");
    }
}

for_each_datapath! {
    /// Row 18.
    fn a_rule_takes_as_many_new_sessions_a_second_as_it_may(bed = Testbed::builder()) {
        add(bed, "tcp 203.0.113.1:8080 10.0.0.10:80 --new-per-second 5 --name web");
        let ends = Ends::new(bed);
        let burst = |first: u32, seconds: u32| {
            let before = dropped(bed, "rate-limit");
            for second in 0..seconds {
                (0..40).for_each(|at| ends.client.send(&syn(&stranger(first + second * 40 + at))).unwrap());
                thread::sleep(Duration::from_secs(1));
            }
            u64::from(seconds * 40) - (dropped(bed, "rate-limit") - before)
        };
        let (at_once, later) = (burst(1, 1), burst(50, 3));
        // A busy machine takes longer than a second for each second.
        assert!((5..=6).contains(&at_once) && (14..=20).contains(&later), "{at_once}, {later}");
        // What belongs to a flow opens none.
        bed.ctl(&["set", "web", "--new-per-second", "1"]).unwrap();
        thread::sleep(Duration::from_secs(1));
        establish(&ends, "192.0.2.200:1");
        (0..5).for_each(|_| inward(&ends, "192.0.2.200:1", ACK, 101, 501));
        bed.ctl(&["set", "web", "--new-per-second", "none"]).unwrap();
        (201..=210).for_each(|number| establish(&ends, &stranger(number)));
    }
}

for_each_datapath! {
    /// Row 18; design, law 6.
    fn a_flood_of_strangers_takes_no_session(bed = Testbed::builder()) {
        add(bed, "tcp+udp 203.0.113.1:8080 10.0.0.10:80 --max-sessions 2 --max-sessions-per-source 1");
        let ends = Ends::new(bed);
        for number in 0..2000_u32 {
            let client = format!("192.0.2.{}:{}", number % 250 + 1, 1024 + number);
            ends.client.send(&syn(&client)).unwrap();
            ends.server.send(&Frame::tcp(TARGET, &client, TcpFields::new(SYN | ACK, 500, 101), b"")).unwrap();
            // He has not seen the answer, and guesses.
            ends.client.send(&Frame::tcp(&client, W8080, TcpFields::new(ACK, 101, 7), b"")).unwrap();
            ends.client.send(&Frame::udp(&client, W8080, b"flood")).unwrap();
        }
        ends.drain();
        establish(&ends, "198.51.100.7:4000");
        establish(&ends, "198.51.100.8:4000");
        assert_refused(bed, &ends, &syn("198.51.100.9:4000"), "session-limit");
    }
}

for_each_datapath! {
    /// Rows 18 and 25: what the controller ends leaves room as well.
    fn an_idle_session_leaves_room(
        bed = Testbed::builder().config("[timeouts]\nudp-established = \"2s\"\n")
    ) {
        add(bed, "udp 203.0.113.1:8080 10.0.0.10:80 --max-sessions 2 --max-sessions-per-source 1");
        let ends = Ends::new(bed);
        for _ in 0..2 {
            for client in [stranger(1), stranger(2)] {
                let asks = || {
                    ends.client.send(&Frame::udp(&client, W8080, b"question")).unwrap();
                    ends.server.receive(QUIET, |packet| packet.source.to_string() == client).is_ok()
                };
                wait_until("there is room again", DEADLINE, asks).unwrap();
                ends.outward(&Frame::udp(TARGET, &client, b"answer"));
                ends.inward(&Frame::udp(&client, W8080, b"thanks"));
            }
            assert_refused(bed, &ends, &Frame::udp(&stranger(3), W8080, b"question"), "session-limit");
        }
    }
}

for_each_datapath! {
    /// Row 18: running sessions count, and are untouched.
    fn a_limit_counts_what_runs_already_when_it_is_set(bed = Testbed::builder()) {
        add(bed, "tcp 203.0.113.1:8080 10.0.0.10:80 --name web");
        let ends = Ends::new(bed);
        (1..=3).for_each(|number| establish(&ends, &stranger(number)));
        bed.ctl(&["set", "web", "--max-sessions", "2", "--max-sessions-per-source", "1"]).unwrap();
        (1..=3).for_each(|number| inward(&ends, &stranger(number), ACK, 101, 501));
        assert_refused(bed, &ends, &syn(&stranger(4)), "session-limit");
        inward(&ends, &stranger(1), RST, 101, 0);
        assert_refused(bed, &ends, &syn(&stranger(4)), "session-limit");
        inward(&ends, &stranger(2), RST, 101, 0);
        assert_refused(bed, &ends, &syn("192.0.2.3:5000"), "source-limit");
        establish(&ends, &stranger(4));
        assert_refused(bed, &ends, &syn(&stranger(5)), "session-limit");
        bed.ctl(&["set", "web", "--max-sessions", "none"]).unwrap();
        assert_refused(bed, &ends, &syn("192.0.2.3:5000"), "source-limit");
        establish(&ends, &stranger(5));
        bed.ctl(&["set", "web", "--max-sessions", "3", "--max-sessions-per-source", "none"]).unwrap();
        assert_refused(bed, &ends, &syn("192.0.2.3:5000"), "session-limit");
        inward(&ends, &stranger(5), RST, 101, 0);
        establish(&ends, "192.0.2.3:5000");
    }
}

for_each_datapath! {
    /// Rows 18 and 35.
    fn counts_outlive_the_controller(bed = Testbed::builder()) {
        add(bed, "tcp 203.0.113.1:8080 10.0.0.10:80 --max-sessions 3 --max-sessions-per-source 2");
        let ends = Ends::new(bed);
        establish(&ends, &stranger(1));
        establish(&ends, &stranger(2));
        bed.daemon.kill();
        establish(&ends, &stranger(3));
        inward(&ends, &stranger(1), RST, 101, 0);
        establish(&ends, &stranger(1));
        bed.daemon.start().unwrap();
        assert_refused(bed, &ends, &syn(&stranger(4)), "session-limit");
        bed.daemon.terminate().unwrap();
        inward(&ends, &stranger(2), RST, 101, 0);
        bed.daemon.start().unwrap();
        establish(&ends, &stranger(4));
        for _ in 0..3 {
            assert_refused(bed, &ends, &syn(&stranger(5)), "session-limit");
            // Looks at the flows, which must find nothing to correct.
            thread::sleep(Duration::from_secs(1));
        }
        (11..=13).for_each(|number| inward(&ends, &stranger(if number == 12 { 3 } else { 1 }), ACK, 101, 501));
    }
}

for_each_datapath! {
    /// Row 18: not by one session, after thousands of them on all CPUs.
    fn counts_do_not_drift(bed = Testbed::builder()) {
        const LIMIT: usize = 40;
        add(bed, &format!("tcp 203.0.113.1:8080 10.0.0.10:80 --max-sessions {LIMIT} --max-sessions-per-source {LIMIT}"));
        let _server = TcpServer::echo(bed.server(), TARGET).unwrap();
        let short = || {
            let Ok(mut stream) = connect(&bed.client, W8080) else { return };
            let _ = stream.write_all(b"hello").and_then(|()| stream.read_exact(&mut [0; 5]));
        };
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..500).for_each(|_| short()));
            }
        });
        let total = only_rule(bed)["counters"]["sessions_total"].as_u64().unwrap();
        assert!(total >= 1900, "{total}");
        let held: Vec<_> = (0..LIMIT).map(|_| connect(&bed.client, W8080).unwrap()).collect();
        let refused = |bed: &Testbed| dropped(bed, "session-limit") + dropped(bed, "source-limit");
        let before = refused(bed);
        let address = W8080.parse().unwrap();
        let one_more = bed.client.run(|| std::net::TcpStream::connect_timeout(&address, Duration::from_millis(300)));
        assert!(one_more.is_err() && refused(bed) > before, "one more than {LIMIT}");
        drop(held);
        connect(&bed.client, W8080).unwrap();
    }
}

/// Row 18: once a minute.
#[test]
fn a_limit_that_is_reached_is_said_once() {
    let bed = Testbed::builder().start().unwrap();
    add(&bed, "tcp 203.0.113.1:8080 10.0.0.10:80 --max-sessions 1 --name web");
    let ends = Ends::new(&bed);
    establish(&ends, &stranger(1));
    thread::sleep(Duration::from_millis(1500));
    assert_refused(&bed, &ends, &syn(&stranger(2)), "session-limit");
    let said = || bed.daemon.log().matches("rule 1 (web) has reached a limit").count();
    wait_until("it is said", DEADLINE, || said() == 1).unwrap();
    assert_refused(&bed, &ends, &syn(&stranger(2)), "session-limit");
    thread::sleep(Duration::from_millis(1500));
    assert_eq!(said(), 1);
}
