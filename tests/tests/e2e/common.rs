//! What these tests share.

use std::collections::BTreeSet;
use std::net::UdpSocket;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use serde_json::Value;
use testbed::{
    DEADLINE, Family, Frame, Host, Packet, RawSocket, TcpFields, Testbed, TestbedBuilder, udp_ask,
};

// Addresses are written as those of IPv4, also where they stand for their twins of IPv6 (see `Family::of`).

/// The mapped address of most tests, and what it leads to.
pub const W8080: &str = "203.0.113.1:8080";
pub const TARGET: &str = "10.0.0.10:80";

/// Where most raw packets come from: somewhere on the internet behind the client, so that no
/// network stack answers to what comes back.
pub const STRANGER: &str = "192.0.2.7:4000";

/// Any port of any address.
pub const ANY: &str = "0.0.0.0:0";

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

            fn run(datapath: testbed::Datapath) {
                $crate::common::run($builder.datapath(datapath), |$bed: &mut Testbed| $body);
            }

            tests_of_datapaths! { run }
        }
    };
}

/// Makes one test of each data path and family.
macro_rules! for_each_family {
    ($(#[$doc:meta])* fn $name:ident($bed:ident = $builder:expr) $body:block) => {
        $(#[$doc])*
        mod $name {
            use super::*;

            fn run(datapath: testbed::Datapath, family: testbed::Family) {
                $crate::common::run($builder.datapath(datapath).family(family), |$bed: &mut Testbed| $body);
            }

            mod ipv4 {
                tests_of_datapaths! { super::run, testbed::Family::Ipv4 }
            }

            mod ipv6 {
                tests_of_datapaths! { super::run, testbed::Family::Ipv6 }
            }
        }
    };
}

macro_rules! tests_of_datapaths {
    ($run:path $(, $family:expr)?) => {
        #[test]
        fn tc() {
            $run(testbed::Datapath::Tc $(, $family)?);
        }

        #[test]
        fn xdp_generic() {
            $run(testbed::Datapath::GenericXdp $(, $family)?);
        }

        #[test]
        fn xdp() {
            $run(testbed::Datapath::NativeXdp $(, $family)?);
        }
    };
}

/// Starts the bed, checks it, and sees that only its own data path has done it.
pub fn run(builder: TestbedBuilder, check: fn(&mut Testbed)) {
    let mut bed = builder.start().unwrap();
    check(&mut bed);
    assert_no_other_path(&bed);
}

/// TC alone means alone: XDP has seen nothing.
fn assert_no_other_path(bed: &Testbed) {
    if bed.daemon.options.datapath == Some(testbed::Datapath::Tc) {
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
    let arguments = bed.ip(arguments);
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

/// Keeps a host's stack from answering to packets from afar, or for others; raw frames still leave it.
pub fn mute(host: &Host) {
    host.ip("route replace blackhole 0.0.0.0/0\nroute replace blackhole ::/0").unwrap();
}

/// Makes a host say its new hardware address to everybody, as whoever takes an address over does
/// (gratuitous ARP, RFC 5227 section 3; unsolicited advertisements, RFC 4861 section 7.2.6).
pub fn announces_itself(host: &Host) {
    host.sysctl("net.ipv4.conf.eth0.arp_notify", "1").unwrap();
    host.sysctl("net.ipv6.conf.eth0.ndisc_notify", "1").unwrap();
}

/// The type and code of the error that says that the TTL has come to its end.
pub fn time_exceeded(bed: &Testbed) -> (u8, u8) {
    match bed.family {
        Family::Ipv4 => (11, 0),
        Family::Ipv6 => (3, 0),
    }
}

/// The cables at both ends of a mapping: raw frames are all that goes in and out there.
pub struct Ends {
    pub client: RawSocket,
    pub server: RawSocket,
    family: Family,
}

impl Ends {
    pub fn new(bed: &Testbed) -> Self {
        // A host that does not forward says so of IPv6 packets: the internet behind it would not.
        mute(bed.server());
        mute(&bed.client);
        let (client, server) = (bed.wire("203.0.113.2").unwrap(), bed.wire("10.0.0.10").unwrap());
        Self { client, server, family: bed.family }
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
        let of = |text| self.family.of(text);
        let last = Frame::udp(&of("192.0.2.200:9999"), &of(W8080), b"the last one");
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
        self.inward(&self.segment(STRANGER, W8080, TcpFields::new(flags, sequence, acknowledgment)))
    }

    /// A TCP segment of the target to the stranger, as it arrives.
    pub fn segment_out(&self, flags: u8, sequence: u32, acknowledgment: u32) -> Packet {
        self.outward(&self.segment(TARGET, STRANGER, TcpFields::new(flags, sequence, acknowledgment)))
    }

    fn segment(&self, from: &str, to: &str, tcp: TcpFields) -> Frame {
        Frame::tcp(&self.family.of(from), &self.family.of(to), tcp, b"")
    }

    /// A TCP connection of the stranger: the client stands at 101, the server at 501.
    pub fn handshake(&self) {
        self.segment_in(TcpFields::SYN, 100, 0);
        self.segment_out(TcpFields::SYN | TcpFields::ACK, 500, 101);
        self.segment_in(TcpFields::ACK, 101, 501);
    }
}
