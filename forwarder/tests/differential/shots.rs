//! Random frames, most of them near something that matters.

use forwarder_common::{
    address::Ipv6,
    family::Family,
    flow::{FlowKey, INWARD, OUTWARD, Side},
    layout::Hook,
    model::{
        Tables, original,
        scenario::{
            CLIENT, ErrorSpec, FrameSpec, GATEWAY, NOWHERE, OTHER_CLIENT, OTHER_SERVER, RULES, Router,
            SERVER, W, fragmented,
            tcp_flags::{ACK, FIN, RST, SYN},
        },
    },
    wire::{ipv6, tcp, udp},
};

/// A frame on one of the router's interfaces.
#[derive(Clone, Debug)]
pub struct Shot {
    pub side: Side,
    pub bytes: Vec<u8>,
}

/// The keys of one direction, sorted: maps walk in another order each time, and a seed is to say all.
fn keys<A: Family>(flows: &Tables<A>, direction: u8) -> Vec<FlowKey<A>> {
    let tables = [&flows.half_open, &flows.established];
    let entries =
        tables.iter().flat_map(|table| table.iter()).filter(|(_, flow)| flow.direction == direction);
    let mut keys: Vec<_> = entries.map(|(key, _)| *key).collect();
    keys.sort_by_key(|key| {
        let tuple = key.tuple;
        (
            key.protocol,
            original(tuple.src),
            tuple.src_port.number(),
            original(tuple.dst),
            tuple.dst_port.number(),
        )
    });
    keys
}

/// splitmix64: small, and the same everywhere.
pub struct Random {
    state: u64,
    /// Of the packet that was cut up last, what has not been sent.
    pieces: Vec<Shot>,
}

impl Random {
    pub fn new(seed: u64) -> Self {
        Self { state: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15), pieces: Vec::new() }
    }

    fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.state ^ (self.state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }

    /// True once in `times`.
    pub fn chance(&mut self, times: usize) -> bool {
        self.below(times) == 0
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.next() as u8).collect()
    }

    /// The next frame, with a mind to the flows that there are.
    pub fn shot<A: Family>(&mut self, router: &Router, hook: Hook, flows: &Tables<A>) -> Shot {
        if !self.pieces.is_empty() && self.chance(2) {
            let at = self.below(self.pieces.len());
            return self.pieces.swap_remove(at);
        }
        let side = if hook == Hook::TcEgress || self.chance(2) { Side::Internal } else { Side::External };
        let mut spec = match side {
            Side::External => self.inward(router, flows),
            Side::Internal => self.outward(router, flows),
        };
        self.vary(&mut spec);
        if A::ETHER_TYPE == Ipv6::ETHER_TYPE {
            spec.ipv6 = Some(self.extensions());
        }
        let mut bytes = if self.chance(6) { self.error(router, side, flows, &spec) } else { spec.bytes() };
        if self.chance(10) {
            bytes = self.fragment(side, &bytes);
        }
        if self.chance(12) {
            // BPF_PROG_TEST_RUN wants an Ethernet header at least, of an skb also that of IP.
            let least = match hook {
                Hook::Xdp => 14,
                _ if A::ETHER_TYPE == Ipv6::ETHER_TYPE => 54,
                _ => 34,
            };
            self.damage(&mut bytes, least);
        }
        Shot { side, bytes }
    }

    fn inward<A: Family>(&mut self, router: &Router, flows: &Tables<A>) -> FrameSpec {
        // Often the one that counts its sessions: most frames are of no session.
        let limited = RULES.iter().find(|rule| rule.limits.0 != 0).filter(|_| self.chance(4));
        let rule = limited.copied().unwrap_or_else(|| self.pick(RULES));
        let ports =
            [rule.ports.0, rule.ports.1, rule.ports.0 / 2 + rule.ports.1 / 2, rule.ports.1.wrapping_add(1)];
        let client =
            self.pick(&[CLIENT, CLIENT, OTHER_CLIENT, SERVER, W, GATEWAY, [127, 0, 0, 1], [230, 0, 0, 1]]);
        let src = (client, 40_000 + self.below(3) as u16);
        let protocol = self.pick(&[tcp::NUMBER, udp::NUMBER]);
        let mut spec = FrameSpec::inward(router, protocol, src, self.pick(&ports));
        // Acknowledge what a server has sent: only that makes a flow established.
        let expected =
            flows.half_open.iter().find(|(key, flow)| flow.expected_ack != 0 && key.protocol == protocol);
        if let Some((key, flow)) = expected
            && self.chance(2)
        {
            let tuple = key.tuple;
            spec = FrameSpec::inward(
                router,
                protocol,
                (original(tuple.src), tuple.src_port.number()),
                tuple.dst_port.number(),
            );
            spec.flags = ACK;
            spec.ack = flow.expected_ack;
        }
        spec
    }

    fn outward<A: Family>(&mut self, router: &Router, flows: &Tables<A>) -> FrameSpec {
        let keys = keys(flows, OUTWARD);
        if self.chance(5) {
            let src = (self.pick(&[OTHER_SERVER, SERVER, CLIENT]), 40_000 + self.below(2) as u16);
            let port = self.pick(&[10_000, 10_005, 10_100, 8080]);
            return FrameSpec::outward(router, self.pick(&[tcp::NUMBER, udp::NUMBER]), src, (W, port));
        }
        let mut spec = if keys.is_empty() || self.chance(6) {
            let protocol = self.pick(&[tcp::NUMBER, udp::NUMBER]);
            FrameSpec::outward(router, protocol, (SERVER, 80), (CLIENT, 40_000))
        } else {
            let key = self.pick(&keys);
            let tuple = key.tuple;
            let src = (original(tuple.src), tuple.src_port.number());
            FrameSpec::outward(router, key.protocol, src, (original(tuple.dst), tuple.dst_port.number()))
        };
        spec.flags = self.pick(&[SYN | ACK, SYN | ACK, ACK]);
        spec
    }

    /// One of its fragments, or what only says that it is one. Others follow.
    fn fragment(&mut self, side: Side, frame: &[u8]) -> Vec<u8> {
        let length = self.pick(&[8, 16, 24, 40]);
        let mut pieces = fragmented(frame, length);
        let at = self.pick(&[0, 0, 0, 1, 1, 2]).min(pieces.len() - 1);
        let piece = pieces.swap_remove(at);
        pieces.truncate(4);
        self.pieces = pieces.into_iter().map(|bytes| Shot { side, bytes }).collect();
        piece
    }

    /// An ICMP error that arrives on `side`, about a packet of some flow, or about `spec`.
    fn error<A: Family>(
        &mut self,
        router: &Router,
        side: Side,
        flows: &Tables<A>,
        spec: &FrameSpec,
    ) -> Vec<u8> {
        let mut about = spec.clone();
        let mut keys = keys(flows, if side == Side::External { INWARD } else { OUTWARD });
        keys.truncate(4);
        if !keys.is_empty() && !self.chance(8) {
            let key = self.pick(&keys);
            let tuple = key.tuple.reversed();
            about.protocol = key.protocol;
            about.src = (original(tuple.src), tuple.src_port.number());
            about.dst = (original(tuple.dst), tuple.dst_port.number());
        }
        let quoted = &about.bytes()[14..];
        let length = self.pick(&[28, 48, 60, quoted.len(), self.state as usize % 64]).min(quoted.len());
        let hop = self.pick(&[NOWHERE, NOWHERE, SERVER, W, GATEWAY]);
        let mut error = ErrorSpec::new(router, side, hop, about.src.0, &quoted[..length]);
        error.ipv6 = about.ipv6.is_some();
        error.kind = match error.ipv6 {
            false => self.pick(&[(3, 3), (3, 4), (11, 0), (12, 0), (8, 0), (5, 1)]),
            true => self.pick(&[(1, 4), (2, 0), (3, 0), (4, 1), (128, 0), (137, 0)]),
        };
        error.ttl = spec.ttl;
        let mut bytes = error.bytes();
        if self.chance(8) {
            let at = 34 + self.below(bytes.len() - 34);
            bytes[at] ^= 1 << self.below(8);
        }
        bytes
    }

    /// Mostly none, seldom more than are looked through.
    fn extensions(&mut self) -> Vec<u8> {
        const ALL: [u8; 5] =
            [ipv6::HOP_BY_HOP, ipv6::ROUTING, ipv6::DESTINATION_OPTIONS, ipv6::DESTINATION_OPTIONS, 51];
        let most = self.pick(&[0, 0, 0, 0, 0, 1, 1, 2, 7]);
        (0..self.below(most + 1)).map(|_| self.pick(&ALL)).collect()
    }

    fn vary(&mut self, spec: &mut FrameSpec) {
        spec.seq = self.next() as u32;
        spec.payload = match self.below(8) {
            0 => self.bytes(1480),
            1 => self.bytes(1452),
            _ => {
                let len = self.below(40);
                self.bytes(len)
            }
        };
        spec.tos = self.next() as u8;
        // Few, so that later fragments meet first ones.
        spec.id = self.below(3) as u16;
        spec.dont_fragment = self.chance(2);
        if self.chance(5) {
            spec.flags = self.pick(&[ACK, FIN | ACK, RST, RST | ACK, SYN | FIN, 0, 0xff]);
        }
        if self.chance(8) {
            spec.option_words = self.below(11);
        }
        if self.chance(8) {
            spec.ttl = self.pick(&[0, 1, 2, 255]);
        }
        if self.chance(8) {
            let len = self.below(30);
            spec.padding = self.bytes(len);
        }
        if self.chance(10) {
            spec.macs.0 = self.pick(&[[0xff; 6], [1, 0, 0x5e, 0, 0, 1], [2, 9, 9, 9, 9, 9]]);
        }
        spec.without_checksum = self.chance(6);
    }

    fn damage(&mut self, bytes: &mut Vec<u8>, min_len: usize) {
        match self.below(3) {
            0 => {
                let len = min_len + self.below(bytes.len() - min_len);
                bytes.truncate(len);
            }
            1 => {
                let at = 12 + self.below((bytes.len() - 12).min(50));
                bytes[at] = self.next() as u8;
            }
            _ => {
                let len = min_len + self.below(90);
                *bytes = self.bytes(len);
            }
        }
    }
}
