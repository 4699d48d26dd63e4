//! Flows: what the packet path remembers of a session.
//!
//! A flow has two entries, one for each direction, each of them a full rewrite under the key that
//! its packets have on the wire. Both lie in the same table: half-open flows in one that strangers
//! may overflow, established ones in one that only their own end, their idle time or the operator
//! empties (design, law 6).

use crate::address::{Address, Ipv4, Ipv6, Macs, Port};

/// Addresses and ports of a packet, as they stand on the wire.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Tuple<A> {
    pub src: A,
    pub dst: A,
    pub src_port: Port,
    pub dst_port: Port,
}

impl<A: Address> Tuple<A> {
    pub const NOTHING: Self =
        Self { src: A::UNSPECIFIED, dst: A::UNSPECIFIED, src_port: Port::new(0), dst_port: Port::new(0) };

    #[inline(always)]
    pub fn reversed(self) -> Self {
        Self { src: self.dst, dst: self.src, src_port: self.dst_port, dst_port: self.src_port }
    }
}

/// The class of an interface: a packet counts only for the side that it comes from.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Side {
    External = 0,
    Internal = 1,
}

impl Side {
    #[inline(always)]
    pub fn from_byte(byte: u8) -> Option<Self> {
        match byte {
            0 => Some(Self::External),
            1 => Some(Self::Internal),
            _ => None,
        }
    }
}

/// Key of the flow tables. All its bytes are compared: the padding is named, and zero. (Aligned, because
/// the compiler copies two of its words at once, and the verifier wants that aligned on the stack.)
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FlowKey<A> {
    pub tuple: Tuple<A>,
    /// IP protocol number.
    pub protocol: u8,
    /// A [`Side`].
    pub side: u8,
    padding: [u8; 2],
}

impl<A: Address> FlowKey<A> {
    pub const NOTHING: Self = Self { tuple: Tuple::NOTHING, protocol: 0, side: 0, padding: [0; 2] };

    #[inline(always)]
    pub fn new(tuple: Tuple<A>, protocol: u8, side: Side) -> Self {
        Self { tuple, protocol, side: side as u8, padding: [0; 2] }
    }

    /// The same with IPv6 addresses ([`Address::mapped`]), for tables of both families.
    #[inline(always)]
    pub fn mapped(&self) -> FlowKey<Ipv6> {
        let Tuple { src, dst, src_port, dst_port } = self.tuple;
        let tuple = Tuple { src: src.mapped(), dst: dst.mapped(), src_port, dst_port };
        FlowKey { tuple, protocol: self.protocol, side: self.side, padding: self.padding }
    }
}

/// Where a packet goes next, and what its Ethernet header says then.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Hop {
    pub macs: Macs,
    pub ifindex: u32,
    /// The largest IP packet that the egress interface takes, in bytes.
    pub mtu: u32,
    /// Whether XDP may redirect to the egress interface: 0 or 1.
    pub from_xdp: u32,
}

/// `Flow::direction`: towards the target.
pub const INWARD: u8 = 0;
/// `Flow::direction`: from the target to the client.
pub const OUTWARD: u8 = 1;

/// `Flow::progress`, on a half-open flow's inward entry: nothing has come back yet.
pub const UNANSWERED: u8 = 0;
/// `Flow::progress`, on a half-open flow's inward entry: the target has answered.
pub const ANSWERED: u8 = 1;
/// `Flow::progress`, on a half-open flow's inward entry: the client has shown that it has the
/// answer; it is established, or will be as soon as there is room.
pub const PROVEN: u8 = 2;

/// `Flow::ended` bits, on both entries.
pub const FIN_INWARD: u8 = 1;
/// See [`FIN_INWARD`].
pub const FIN_OUTWARD: u8 = 2;
/// A RST from either end.
pub const RESET: u8 = 4;

/// `Flow::flags`: the hop is where the request came from; otherwise the route decides.
pub const LEARNED_HOP: u8 = 1;
/// `Flow::flags`, on both entries: the client is inside too (hairpin).
pub const FROM_INSIDE: u8 = 2;
/// `Flow::flags`: [`Flow::seq_end`] holds something.
pub const SEQ_KNOWN: u8 = 4;
/// `Flow::flags`: [`Flow::ack`] holds something.
pub const ACK_KNOWN: u8 = 8;
/// `Flow::flags`, on both entries: the connection was opened before there was a flow.
pub const PICKED_UP: u8 = 16;
/// `Flow::flags`, on both entries: the learned hop is the neighbour that the route back led to when the
/// flow was made, and is followed when that gets another MAC.
pub const ROUTED_BACK: u8 = 32;

/// Whether a TCP flow with these `Flow::ended` bits is over, so that a SYN may start it anew.
#[inline(always)]
pub fn is_closing(ended: u8) -> bool {
    ended & RESET != 0 || ended & (FIN_INWARD | FIN_OUTWARD) == FIN_INWARD | FIN_OUTWARD
}

/// One direction of a flow.
///
/// The counters are plain stores: two CPUs that carry one flow at the same moment may lose a
/// packet in them (the counters of the rule are per CPU and exact).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow<A: Address> {
    /// Monotonic clock in ns, of the last packet in this direction.
    pub last_seen: u64,
    /// Monotonic clock in ns, when the hop was last asked of the kernel; see [`LEARNED_HOP`].
    pub hop_checked: u64,
    /// Monotonic clock in ns, the same on both entries.
    pub created: u64,
    pub packets: u64,
    /// Of the IP packets.
    pub bytes: u64,
    /// What the packet has after the rewrite.
    pub to: Tuple<A>,
    /// Slot of the rule.
    pub rule: u32,
    /// The rule's epoch for this protocol when the flow was made.
    pub epoch: u32,
    pub hop_generation: u32,
    pub hop: Hop,
    /// Of the learned hop, with [`ROUTED_BACK`]: its address.
    pub gateway: A,
    /// Established, inward entry: how many have noticed at the same time that the session is over.
    pub ends: u32,
    /// Zero.
    pub padding: A::Padding,
    /// TCP, half-open, inward entry: the acknowledgement that proves that the client has seen the
    /// target's answer (RFC 9293: of a SYN-ACK its sequence number plus one), host byte order.
    pub expected_ack: u32,
    /// TCP: the sequence number behind the last segment in this direction, host byte order.
    pub seq_end: u32,
    /// TCP: what the last segment in this direction acknowledged, host byte order.
    pub ack: u32,
    pub direction: u8,
    /// On inward entries.
    pub progress: u8,
    pub ended: u8,
    /// [`LEARNED_HOP`] and its neighbours.
    pub flags: u8,
}

impl<A: Address> Flow<A> {
    pub const ZERO: Self = Self {
        last_seen: 0,
        hop_checked: 0,
        created: 0,
        packets: 0,
        bytes: 0,
        to: Tuple::NOTHING,
        rule: 0,
        epoch: 0,
        hop_generation: 0,
        hop: Hop { macs: Macs::new([0; 6], [0; 6]), ifindex: 0, mtu: 0, from_xdp: 0 },
        gateway: A::UNSPECIFIED,
        ends: 0,
        padding: A::PADDING,
        expected_ack: 0,
        seq_end: 0,
        ack: 0,
        direction: 0,
        progress: 0,
        ended: 0,
        flags: 0,
    };

    /// Key of the same flow's entry for the other direction; `key` is this entry's own.
    #[inline(always)]
    pub fn other_key(&self, key: &FlowKey<A>) -> FlowKey<A> {
        FlowKey::new(self.to.reversed(), key.protocol, self.egress_side())
    }

    /// The side that this direction's packets leave by, and the other's come from.
    #[inline(always)]
    pub fn egress_side(&self) -> Side {
        if self.direction == INWARD || self.flags & FROM_INSIDE != 0 {
            Side::Internal
        } else {
            Side::External
        }
    }

    /// Whether both are of the same rule in the same epoch.
    #[inline(always)]
    pub fn has_same_rule(&self, other: &Self) -> bool {
        self.rule == other.rule && self.epoch == other.epoch
    }

    /// Whether both are the same direction of the same session of the same rule.
    #[inline(always)]
    pub fn has_same_owner(&self, other: &Self) -> bool {
        self.has_same_rule(other) && self.to == other.to && self.direction == other.direction
    }
}

// No padding but the named.
const _: () = assert!(size_of::<FlowKey<Ipv4>>() == 16 && size_of::<FlowKey<Ipv6>>() == 40);
const _: () = assert!(size_of::<Flow<Ipv4>>() == 112 && size_of::<Flow<Ipv6>>() == 152);
