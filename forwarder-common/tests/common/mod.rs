//! The scenario's router, and what has to hold for whatever it is given.

use forwarder_common::{
    address::{Ipv4, Ipv6, Port},
    family::Family,
    flow::{FlowKey, Side, Tuple},
    layout::Hook,
    model::{
        Counts, Frame, Machine, Tables, process,
        scenario::{CLIENT, FrameSpec, OTHER_SERVER, Router, SERVER, W, tcp_flags::*},
    },
    pipeline::{Outcome, is_ipv6},
    reason::{Reason, Verdict},
    wire::tcp,
};

/// Where packets come in.
pub const INGRESS: [Hook; 2] = [Hook::Xdp, Hook::TcIngress];

/// The client of most tests, and the external port that it talks to.
pub const CLIENT_PORT: u16 = 5000;
pub const W_PORT: u16 = 8080;

/// The sequence number of the server's SYN-ACK in [`Rig::establish`].
pub const SERVER_SEQ: u32 = 90_000;

/// A router in the middle of its life.
#[derive(Clone)]
pub struct Rig {
    pub router: Router,
    pub machine: Machine,
    pub flows: Tables,
    pub flows_ipv6: Tables<Ipv6>,
    pub counts: Counts,
}

/// What became of a frame.
#[derive(Debug, PartialEq)]
pub struct Taken {
    pub outcome: Outcome,
    /// What it was counted as; `None` for what TC egress lets by.
    pub reason: Option<Reason>,
    pub bytes: Vec<u8>,
}

impl Rig {
    pub fn new() -> Self {
        let router = Router::default();
        Self {
            router,
            machine: router.machine(),
            flows: Tables { capacity: 1000, ..Tables::default() },
            flows_ipv6: Tables { capacity: 1000, ..Tables::default() },
            counts: Counts::default(),
        }
    }

    /// Takes a frame that is on an interface of `side` through the core. Whatever the frame is: what
    /// passes or is dropped stays as it came, and what becomes of it is counted once.
    pub fn take(&mut self, hook: Hook, side: Side, frame: &[u8]) -> Taken {
        let before = self.counts.clone();
        self.counts.last = None;
        let ifindex = self.router.interface(side).0;
        let mut packet = Frame(frame.to_vec());
        let Self { machine, flows, flows_ipv6, counts, .. } = self;
        let outcome = match is_ipv6(&packet) {
            true => at(hook, &mut packet, ifindex, machine, flows_ipv6, counts),
            false => at(hook, &mut packet, ifindex, machine, flows, counts),
        };
        let taken = Taken { outcome, reason: counts.last, bytes: packet.0 };
        self.assert_lawful(hook, frame, &taken, &before);
        taken
    }

    fn assert_lawful(&self, hook: Hook, frame: &[u8], taken: &Taken, before: &Counts) {
        if taken.outcome == Outcome::Release {
            assert_eq!(
                (hook, taken.reason),
                (Hook::TcIngress, None),
                "both are counted when they come in again"
            );
            assert_eq!((&self.counts.reasons, &taken.bytes[..14]), (&before.reasons, &frame[..14]));
            return;
        }
        let verdict = match taken.outcome {
            Outcome::Pass | Outcome::PassMarked => Verdict::Pass,
            Outcome::Drop => Verdict::Drop,
            Outcome::Hold => Verdict::Hold,
            _ => Verdict::Forward,
        };
        let silent = hook == Hook::TcEgress && verdict == Verdict::Pass;
        assert_eq!(taken.reason.map(Reason::verdict), (!silent).then_some(verdict), "{taken:?}");
        if verdict != Verdict::Forward {
            assert_eq!(taken.bytes, frame, "{hook:?} changed a frame and let it by: {:?}", taken.reason);
        }
        assert_eq!(taken.bytes.len(), frame.len());

        let bytes = match verdict {
            Verdict::Forward if frame[12] == 0x86 => {
                40 + u64::from(u16::from_be_bytes([frame[18], frame[19]]))
            }
            Verdict::Forward => u64::from(u16::from_be_bytes([frame[16], frame[17]])),
            _ => frame.len().saturating_sub(14) as u64,
        };
        let mut reasons = before.reasons.clone();
        if let Some(reason) = taken.reason {
            let count = reasons.entry(reason.name()).or_default();
            *count = (count.0 + 1, count.1 + bytes);
        }
        assert_eq!(self.counts.reasons, reasons);

        let (forwarded, dropped) = of_rules(&self.counts);
        let (forwarded_before, dropped_before) = of_rules(before);
        assert_eq!(forwarded - forwarded_before, u64::from(verdict == Verdict::Forward));
        assert!(dropped - dropped_before <= u64::from(verdict == Verdict::Drop));
    }

    /// The client's packet to W:8080.
    pub fn client(&self, protocol: u8) -> FrameSpec {
        FrameSpec::inward(&self.router, protocol, (CLIENT, CLIENT_PORT), W_PORT)
    }

    /// The server's packet to the client.
    pub fn server(&self, protocol: u8) -> FrameSpec {
        let server = if protocol == tcp::NUMBER { (SERVER, 80) } else { (OTHER_SERVER, 81) };
        FrameSpec::outward(&self.router, protocol, server, (CLIENT, CLIENT_PORT))
    }

    /// Makes the client's session with W:8080 an established flow.
    pub fn establish(&mut self, hook: Hook, protocol: u8) {
        let syn = FrameSpec { seq: 1000, ..self.client(protocol) };
        let answer = FrameSpec { flags: SYN | ACK, seq: SERVER_SEQ, ack: 1001, ..self.server(protocol) };
        let proof = FrameSpec { flags: ACK, seq: 1001, ack: SERVER_SEQ + 1, ..syn.clone() };
        for (side, frame) in [(Side::External, syn), (Side::Internal, answer), (Side::External, proof)] {
            let taken = self.take(hook, side, &frame.bytes());
            assert_eq!(taken.reason.map(Reason::verdict), Some(Verdict::Forward), "{taken:?}");
        }
        let (client, w) = (Ipv4::new(CLIENT), Ipv4::new(W));
        let (src_port, dst_port) = (Port::new(CLIENT_PORT), Port::new(W_PORT));
        let tuple = Tuple { src: client, dst: w, src_port, dst_port };
        assert!(self.flows.established.contains_key(&FlowKey::new(tuple, protocol, Side::External)));
    }
}

fn at(
    hook: Hook,
    packet: &mut Frame,
    ifindex: u32,
    machine: &Machine,
    flows: &mut Tables<impl Family>,
    counts: &mut Counts,
) -> Outcome {
    match hook {
        Hook::Xdp => process::<0>(packet, ifindex, machine, flows, counts),
        Hook::TcIngress => process::<1>(packet, ifindex, machine, flows, counts),
        Hook::TcEgress => process::<2>(packet, ifindex, machine, flows, counts),
    }
}

/// Packets of all rules: forwarded, dropped.
fn of_rules(counts: &Counts) -> (u64, u64) {
    let rules = || counts.rules.values();
    let forwarded = rules().map(|rule| rule.inward.packets + rule.outward.packets).sum();
    (forwarded, rules().flat_map(|rule| rule.dropped).sum())
}
