//! What the packet core asks of its surroundings: tables it writes, and a world it only reads.

use crate::{
    address::{Address, Ipv6},
    family::Family,
    flow::{Flow, FlowKey, Hop, Tuple},
    fragment::{FragmentKey, HeldKey, Train},
    layout::{Hook, Interface},
    reason::Reason,
    rule::Rule,
    sessions::Sessions,
};

/// Which flow table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    HalfOpen,
    Established,
}

/// Why an insertion was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    Exists,
    Full,
}

/// The two flow tables, and what limits are counted by.
pub trait Flows<A: Family>: Sessions {
    /// The entry itself, to be changed in place.
    fn find(&mut self, stage: Stage, key: &FlowKey<A>) -> Option<&mut Flow<A>>;
    /// Only if the key is free.
    fn insert_new(&mut self, stage: Stage, key: &FlowKey<A>, flow: &Flow<A>) -> Result<(), Refused>;
    fn remove(&mut self, stage: Stage, key: &FlowKey<A>);
    /// Notes in an established flow's inward entry that the session is over. Never true twice for
    /// one session.
    fn is_first_end(&mut self, inward: &FlowKey<A>) -> bool;
    /// What the first fragment of a packet has told.
    fn train(&mut self, key: &FragmentKey<A>) -> Option<Train>;
    /// For its later fragments. Where there is no room, an older one goes.
    fn remember(&mut self, key: &FragmentKey<A>, train: &Train);
    /// Whether this fragment is held, and not for too long yet.
    fn is_held(&mut self, key: &HeldKey<A>, now: u64) -> bool;
    /// When a session of the host itself was last seen (monotonic clock, ns), under the key of its answers.
    fn host_session(&mut self, key: &FlowKey<A>) -> Option<&mut u64>;
    /// Where there is no room, an older one goes.
    fn note_host_session(&mut self, key: &FlowKey<A>, now: u64);
}

/// What to ask the kernel's routing for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RouteQuery<'q, A> {
    pub tuple: &'q Tuple<A>,
    pub protocol: u8,
    /// See [`crate::parse::Datagram::class`].
    pub class: u32,
}

/// What the kernel's routing says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// The neighbour is known. `mtu` and `from_xdp` of the hop are not filled in.
    Known { hop: Hop, next_hop: Ipv6 },
    /// The neighbour's address has still to be resolved. `next_hop` is of either family
    /// ([`Address::mapped`]): an IPv4 route may have an IPv6 gateway (RFC 8950).
    Unresolved { ifindex: u32, next_hop: Ipv6 },
    /// No way: a drop's reason.
    None(Reason),
}

/// What a packet path can see and not change, whatever the packet's family.
pub trait Surroundings {
    /// Where this program runs.
    const HOOK: Hook;

    /// Coarse monotonic clock, ns.
    fn now(&self) -> u64;
    /// See [`crate::layout::Settings::generation`].
    fn generation(&self) -> u32;
    /// Index of the interface that the packet came in on (at egress: leaves by).
    fn ifindex(&self) -> u32;
    /// Bytes of payload in each of the segments that the packet stands for; 0 where it is just one.
    fn segment_size(&self) -> u32;
    /// Whether it carries the mark of what was left to the host's stack ([`crate::layout::DEFAULT_MARK`]).
    fn is_marked(&self) -> bool;
    fn interface(&self, ifindex: u32) -> Option<&Interface>;
    fn rule(&self, slot: u32) -> Option<&Rule>;
    /// True once a second for each rule, for one caller: its packet is to go through the kernel's
    /// neighbour code, which finds out whether the neighbour still answers.
    fn claim_probe(&self, slot: u32, now: u64) -> bool;
}

/// The same, asked by addresses.
pub trait World<A: Address>: Surroundings {
    /// The rule that claims an external address, protocol and port (host byte order).
    fn rule_for(&self, address: A, protocol: u8, port: u16) -> Option<u32>;
    /// Whether `source` is on the allow list.
    fn is_allowed(&self, list: u32, source: A) -> bool;
    /// What an address is to this router: bits of [`crate::layout::OWN`] and its neighbours.
    fn roles(&self, address: A) -> u8;
    /// Whether a socket of the host itself takes packets of this tuple: one that listens, or whose
    /// connection they belong to.
    fn has_socket(&self, tuple: &Tuple<A>, protocol: u8) -> bool;
    fn route(&self, query: &RouteQuery<'_, A>) -> Route;
}

/// Where the core counts.
pub trait Counters {
    fn count_reason(&mut self, reason: Reason, bytes: u64);
    fn count_forwarded(&mut self, slot: u32, direction: u8, bytes: u64);
    fn count_session(&mut self, slot: u32);
    fn count_dropped(&mut self, slot: u32, reason: Reason);
}
