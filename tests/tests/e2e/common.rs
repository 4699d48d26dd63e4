//! What these tests share.

use std::collections::BTreeSet;
use std::net::UdpSocket;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use serde_json::Value;
use testbed::{DEADLINE, Frame, Host, Packet, RawSocket, TcpFields, Testbed, TestbedBuilder, udp_ask};

/// The mapped address of most tests, and what it leads to.
pub const W8080: &str = "203.0.113.1:8080";
pub const TARGET: &str = "10.0.0.10:80";

/// Where most raw packets come from: somewhere on the internet behind the client, so that no
/// network stack answers to what comes back.
pub const STRANGER: &str = "192.0.2.7:4000";

/// Two servers on one network.
pub fn two_servers() -> TestbedBuilder {
    Testbed::builder().internal("lan", "10.0.0.1/24", &["10.0.0.10", "10.0.0.11"])
}

/// Long enough for what should not come to have come.
pub const QUIET: Duration = Duration::from_millis(200);

/// Makes one test of each data path, on beds of its own.
macro_rules! for_each_datapath {
    ($(#[$doc:meta])* fn $name:ident($bed:ident = $builder:expr) $body:block) => {
        $(#[$doc])*
        mod $name {
            use super::*;

            fn check($bed: &mut Testbed) $body

            fn run(datapath: testbed::Datapath) {
                let mut bed = $builder.datapath(datapath).start().unwrap();
                check(&mut bed);
                $crate::common::assert_no_other_path(&bed, datapath);
            }

            #[test]
            fn tc() {
                run(testbed::Datapath::Tc);
            }

            #[test]
            fn xdp_generic() {
                run(testbed::Datapath::GenericXdp);
            }

            #[test]
            fn xdp() {
                run(testbed::Datapath::NativeXdp);
            }
        }
    };
}

/// TC alone means alone: XDP has seen nothing.
pub fn assert_no_other_path(bed: &Testbed, datapath: testbed::Datapath) {
    if datapath == testbed::Datapath::Tc {
        let stats = bed.stats().unwrap();
        for verdict in ["forward", "pass", "drop"] {
            assert_eq!(stats.verdict("xdp", verdict), 0, "{stats}");
        }
    }
}

/// The bed's data path itself has forwarded packets, and more than any other.
pub fn assert_carried(bed: &Testbed) {
    let datapath = bed.daemon.options.datapath.unwrap();
    let stats = bed.stats().unwrap();
    let forwarded = |path| stats.verdict(path, "forward");
    let others = ["xdp", "tc-ingress", "tc-egress"].into_iter().filter(|path| *path != datapath.path());
    assert!(
        forwarded(datapath.path()) > others.map(forwarded).sum(),
        "{datapath:?} has not carried it: {stats}"
    );
}

/// `forwarderctl add`, with its arguments as one typed them; returns the rule.
pub fn add(bed: &Testbed, arguments: &str) -> Value {
    let arguments: Vec<&str> = ["add"].into_iter().chain(arguments.split_whitespace()).collect();
    bed.ctl_json(&arguments).unwrap()
}

/// The only rule there is, as `list` shows it.
pub fn only_rule(bed: &Testbed) -> Value {
    let list = bed.ctl_json(&["list"]).unwrap();
    let [rule] = list.as_array().unwrap().as_slice() else { panic!("not one rule: {list:#}") };
    rule.clone()
}

pub fn rules(bed: &Testbed) -> Vec<Value> {
    bed.ctl_json(&["list"]).unwrap().as_array().unwrap().clone()
}

pub fn flows(bed: &Testbed) -> Vec<Value> {
    bed.ctl_json(&["flows"]).unwrap().as_array().unwrap().clone()
}

/// The states of all flows, without duplicates.
pub fn flow_states(bed: &Testbed) -> BTreeSet<String> {
    flows(bed).iter().map(|flow| flow["state"].as_str().unwrap().to_owned()).collect()
}

/// Whether a datagram is answered at once.
pub fn answers(socket: &UdpSocket, to: &str) -> bool {
    static QUESTION: AtomicU32 = AtomicU32::new(0);
    // An answer that came too late for its own question does not pass for one to this.
    let question = format!("question {}", QUESTION.fetch_add(1, Ordering::Relaxed));
    socket.set_read_timeout(Some(QUIET)).unwrap();
    loop {
        match udp_ask(socket, to, &question) {
            Ok(answer) if answer.ends_with(&question) => return true,
            Ok(_) => {}
            Err(_) => return false,
        }
    }
}

/// Keeps a host's stack from answering to the packets that it gets from afar; raw frames still leave it.
pub fn mute(host: &Host) {
    host.ip("route replace blackhole default").unwrap();
}

/// The cables at both ends of a mapping: raw frames are all that goes in and out there.
pub struct Ends {
    pub client: RawSocket,
    pub server: RawSocket,
}

impl Ends {
    pub fn new(bed: &Testbed) -> Self {
        mute(bed.server());
        Self { client: bed.wire("203.0.113.2").unwrap(), server: bed.wire("10.0.0.10").unwrap() }
    }

    /// What arrives at the server of what the client sends.
    pub fn inward(&self, frame: &Frame) -> Packet {
        self.client.send(frame).unwrap();
        self.server
            .receive(DEADLINE, |packet| {
                packet.source == frame.source && packet.tcp == frame.tcp && packet.payload == frame.payload
            })
            .unwrap_or_else(|error| panic!("{frame:?} did not arrive at the server: {error:#}"))
    }

    /// What arrives at the client of what the server sends.
    pub fn outward(&self, frame: &Frame) -> Packet {
        self.server.send(frame).unwrap();
        self.client
            .receive(DEADLINE, |packet| {
                packet.destination == frame.destination
                    && packet.tcp == frame.tcp
                    && packet.payload == frame.payload
            })
            .unwrap_or_else(|error| panic!("{frame:?} did not arrive at the client: {error:#}"))
    }

    /// Sends frames from the client, and asserts that nothing of them arrives at the server.
    /// Needs a rule for UDP at `W8080`: a datagram that follows them shows when to stop waiting.
    pub fn assert_none_arrives(&self, frames: &[Vec<u8>]) {
        self.drain();
        for frame in frames {
            self.client.send_bytes(frame).unwrap();
        }
        let last = Frame::udp("192.0.2.200:9999", W8080, b"the last one");
        self.client.send(&last).unwrap();
        let before = self.server.receive_until(DEADLINE, |packet| packet.payload == last.payload).unwrap();
        // Several CPUs may have them in hand: the last one may have overtaken others.
        let after = self.server.receive_for(Duration::from_millis(30)).unwrap();
        let arrived: Vec<String> = before.iter().chain(&after).map(ToString::to_string).collect();
        assert!(arrived.is_empty(), "these should not have arrived: {arrived:#?}");
    }

    /// Throws away what has come so far.
    pub fn drain(&self) {
        self.client.receive_for(Duration::from_millis(1)).unwrap();
        self.server.receive_for(Duration::from_millis(1)).unwrap();
    }

    /// A TCP segment of the stranger to the mapping, as it arrives.
    pub fn segment_in(&self, flags: u8, sequence: u32, acknowledgment: u32) -> Packet {
        self.inward(&Frame::tcp(STRANGER, W8080, TcpFields::new(flags, sequence, acknowledgment), b""))
    }

    /// A TCP segment of the target to the stranger, as it arrives.
    pub fn segment_out(&self, flags: u8, sequence: u32, acknowledgment: u32) -> Packet {
        self.outward(&Frame::tcp(TARGET, STRANGER, TcpFields::new(flags, sequence, acknowledgment), b""))
    }

    /// A TCP connection of the stranger: the client stands at 101, the server at 501.
    pub fn handshake(&self) {
        self.segment_in(TcpFields::SYN, 100, 0);
        self.segment_out(TcpFields::SYN | TcpFields::ACK, 500, 101);
        self.segment_in(TcpFields::ACK, 101, 501);
    }
}
