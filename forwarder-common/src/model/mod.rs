//! The core's surroundings as plain collections: it runs on the host over these, under tests.
//!
//! Its machine is told in IPv4 addresses. Each has a twin in IPv6 ([`twin`]), for which the same holds.

pub mod scenario;

use std::{
    cell::Cell,
    collections::{BTreeMap, HashMap},
    vec::Vec,
};

use crate::{
    address::{Address, Ipv4, Ipv6},
    decide::{Core, Scratch},
    family::Family,
    flow::{Flow, FlowKey, INWARD, Tuple},
    fragment::{FragmentKey, HeldKey, TRAIN_LIFETIME, Train},
    layout::{Hook, Interface, OWN, RuleCounters},
    packet::{OutOfBounds, Packet, Plain},
    pipeline::{self, Outcome, Seen},
    reason::Reason,
    rule::{Page, PageKey, Rule},
    sessions::{Sessions, SessionsKey},
    tables::{Counters, Flows, Refused, Route, RouteQuery, Stage, Surroundings, World},
    wire::ethernet,
};

/// A frame in memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame(pub Vec<u8>);

impl Packet for Frame {
    fn len(&self) -> usize {
        self.0.len()
    }

    fn reach(&mut self, _len: usize) -> Result<(), OutOfBounds> {
        Ok(())
    }

    fn sum(&self, offset: usize, len: usize) -> Result<u16, OutOfBounds> {
        let bytes = self.0.get(offset..).and_then(|rest| rest.get(..len)).ok_or(OutOfBounds)?;
        Ok(!u16::from_ne_bytes(scenario::internet_checksum(&[bytes])))
    }

    fn read<T: Plain>(&self, offset: usize) -> Result<T, OutOfBounds> {
        let bytes = self.0.get(offset..).and_then(|rest| rest.get(..size_of::<T>())).ok_or(OutOfBounds)?;
        Ok(T::from_bytes(bytes))
    }

    fn write<T: Plain>(&mut self, offset: usize, value: T) -> Result<(), OutOfBounds> {
        let rest = self.0.get_mut(offset..).ok_or(OutOfBounds)?;
        let place = rest.get_mut(..size_of::<T>()).ok_or(OutOfBounds)?;
        value.to_bytes(place);
        Ok(())
    }
}

/// Flow tables with a size.
#[derive(Clone, Debug, Default)]
pub struct Tables<A: Address = Ipv4> {
    pub established: HashMap<FlowKey<A>, Flow<A>>,
    pub half_open: HashMap<FlowKey<A>, Flow<A>>,
    pub trains: HashMap<FragmentKey<A>, Train>,
    /// Frames without their Ethernet header, and until when they are held.
    pub held: HashMap<HeldKey<A>, (Vec<u8>, u64)>,
    pub host_sessions: HashMap<FlowKey<A>, u64>,
    pub sessions: HashMap<SessionsKey, i64>,
    /// By slot: see [`Sessions::due`].
    pub due: HashMap<u32, u64>,
    /// Of each flow table, in entries.
    pub capacity: usize,
}

impl<A: Address> Tables<A> {
    fn stage(&mut self, stage: Stage) -> &mut HashMap<FlowKey<A>, Flow<A>> {
        match stage {
            Stage::Established => &mut self.established,
            Stage::HalfOpen => &mut self.half_open,
        }
    }
}

impl<A: Family> Flows<A> for Tables<A> {
    fn find(&mut self, stage: Stage, key: &FlowKey<A>) -> Option<&mut Flow<A>> {
        self.stage(stage).get_mut(key)
    }

    fn insert_new(&mut self, stage: Stage, key: &FlowKey<A>, flow: &Flow<A>) -> Result<(), Refused> {
        let capacity = self.capacity;
        let table = self.stage(stage);
        if table.contains_key(key) {
            return Err(Refused::Exists);
        }
        if table.len() >= capacity {
            return Err(Refused::Full);
        }
        table.insert(*key, *flow);
        Ok(())
    }

    fn remove(&mut self, stage: Stage, key: &FlowKey<A>) {
        self.stage(stage).remove(key);
    }

    fn is_first_end(&mut self, inward: &FlowKey<A>) -> bool {
        self.established.get_mut(inward).is_some_and(|flow| std::mem::replace(&mut flow.ends, 1) == 0)
    }

    fn train(&mut self, key: &FragmentKey<A>) -> Option<Train> {
        self.trains.get(key).copied()
    }

    fn host_session(&mut self, key: &FlowKey<A>) -> Option<&mut u64> {
        self.host_sessions.get_mut(key)
    }

    fn note_host_session(&mut self, key: &FlowKey<A>, now: u64) {
        self.host_sessions.insert(*key, now);
    }

    fn remember(&mut self, key: &FragmentKey<A>, train: &Train) {
        self.trains.insert(*key, *train);
    }

    fn is_held(&mut self, key: &HeldKey<A>, now: u64) -> bool {
        self.held.get(key).is_some_and(|(_, expires)| now < *expires)
    }
}

impl<A: Address> Sessions for Tables<A> {
    fn sessions(&mut self, key: &SessionsKey) -> i64 {
        self.sessions.get(key).copied().unwrap_or(0)
    }

    fn count_sessions(&mut self, key: &SessionsKey, by: i64) -> Result<(), Refused> {
        *self.sessions.entry(*key).or_default() += by;
        Ok(())
    }

    fn due(&mut self, slot: u32) -> u64 {
        self.due.get(&slot).copied().unwrap_or(0)
    }

    fn set_due(&mut self, slot: u32, due: u64) {
        self.due.insert(slot, due);
    }

    fn postpone(&mut self, slot: u32, by: u64) {
        let due = self.due.entry(slot).or_default();
        *due = due.wrapping_add(by);
    }
}

/// The machine as the core sees it.
#[derive(Clone, Debug, Default)]
pub struct Machine {
    /// ns.
    pub now: u64,
    pub generation: u32,
    pub interfaces: BTreeMap<u32, Interface>,
    pub pages: HashMap<PageKey, Page>,
    pub rules: BTreeMap<u32, Rule>,
    /// List, network, prefix length.
    pub allow: Vec<(u32, [u8; 4], u32)>,
    /// Network, prefix length, and what the kernel says; the first that fits counts.
    pub routes: Vec<([u8; 4], u32, Route)>,
    /// See [`World::segment_size`].
    pub segment_size: u32,
    /// See [`World::is_marked`].
    pub marked: bool,
    /// What addresses are to it.
    pub roles: HashMap<Ipv4, u8>,
    /// Protocols and ports that a socket of the host listens on.
    pub sockets: Vec<(u8, u16)>,
    pub probes: Cell<u32>,
}

/// The machine from one place of the packet path; `HOOK` is a [`Hook`]'s number.
pub struct At<'m, const HOOK: usize> {
    pub machine: &'m Machine,
    pub ifindex: u32,
}

fn is_within(address: Ipv4, network: [u8; 4], prefix_len: u32) -> bool {
    let mask = u32::MAX.checked_shl(32 - prefix_len).unwrap_or(0);
    (u32::from_be_bytes(address.bytes()) ^ u32::from_be_bytes(network)) & mask == 0
}

impl Machine {
    fn route_to(&self, address: Ipv4, next_hop: Ipv6) -> Route {
        let fits = |(network, prefix_len, _): &&([u8; 4], u32, _)| is_within(address, *network, *prefix_len);
        // The next hop is the address itself where the network is on the link.
        let through = |gateway: Ipv6| if gateway == Ipv6::UNSPECIFIED { next_hop } else { gateway };
        match self.routes.iter().find(fits) {
            Some((_, _, Route::Known { hop, next_hop })) => {
                Route::Known { hop: *hop, next_hop: through(*next_hop) }
            }
            Some((_, _, Route::Unresolved { ifindex, next_hop })) => {
                Route::Unresolved { ifindex: *ifindex, next_hop: through(*next_hop) }
            }
            Some((_, _, none)) => *none,
            None => Route::None(Reason::NoRoute),
        }
    }
}

/// The first twelve bytes of the twins' addresses.
const TWINS: [u8; 12] = [0x20, 0x01, 0x0d, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0];

/// The IPv6 address for which all that holds on the machine that does for an IPv4 one.
pub fn twin(address: [u8; 4]) -> [u8; 16] {
    let mut twin = [0; 16];
    twin[..12].copy_from_slice(&TWINS);
    twin[12..].copy_from_slice(&address);
    twin
}

/// The IPv4 address of which this is the twin, or which this is.
pub fn original<A: Address>(address: A) -> [u8; 4] {
    let [.., a, b, c, d] = address.mapped().bytes();
    [a, b, c, d]
}

/// An address of which the machine knows something, as its IPv4 twin.
fn known<A: Address>(address: A) -> Option<Ipv4> {
    Ipv4::from_mapped(address.mapped()).or_else(|| {
        let bytes = address.mapped().bytes();
        bytes.strip_prefix(&TWINS)?.try_into().ok().map(Ipv4::new)
    })
}

impl<const HOOK: usize> Surroundings for At<'_, HOOK> {
    const HOOK: Hook = Hook::ALL[HOOK];

    fn now(&self) -> u64 {
        self.machine.now
    }

    fn generation(&self) -> u32 {
        self.machine.generation
    }

    fn ifindex(&self) -> u32 {
        self.ifindex
    }

    fn segment_size(&self) -> u32 {
        self.machine.segment_size
    }

    fn is_marked(&self) -> bool {
        self.machine.marked
    }

    fn interface(&self, ifindex: u32) -> Option<&Interface> {
        self.machine.interfaces.get(&ifindex)
    }

    fn rule(&self, slot: u32) -> Option<&Rule> {
        self.machine.rules.get(&slot)
    }

    fn claim_probe(&self, _slot: u32, _now: u64) -> bool {
        let left = self.machine.probes.get();
        self.machine.probes.set(left.saturating_sub(1));
        left > 0
    }
}

impl<A: Address, const HOOK: usize> World<A> for At<'_, HOOK> {
    fn rule_for(&self, address: A, protocol: u8, port: u16) -> Option<u32> {
        self.machine.pages.get(&PageKey::new(address.mapped(), protocol, port))?.slot(port)
    }

    fn is_allowed(&self, list: u32, source: A) -> bool {
        let fits = |&(of, network, prefix_len): &(u32, [u8; 4], u32)| {
            of == list && known(source).is_some_and(|source| is_within(source, network, prefix_len))
        };
        self.machine.allow.iter().any(fits)
    }

    fn roles(&self, address: A) -> u8 {
        known(address).and_then(|address| self.machine.roles.get(&address)).copied().unwrap_or_default()
    }

    fn has_socket(&self, tuple: &Tuple<A>, protocol: u8) -> bool {
        self.roles(tuple.dst) & OWN != 0
            && self.machine.sockets.contains(&(protocol, tuple.dst_port.number()))
    }

    fn route(&self, query: &RouteQuery<'_, A>) -> Route {
        let next_hop = query.tuple.dst.mapped();
        known(query.tuple.dst)
            .map_or(Route::None(Reason::NoRoute), |address| self.machine.route_to(address, next_hop))
    }
}

/// Counters as maps.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Counts {
    pub reasons: HashMap<&'static str, (u64, u64)>,
    pub rules: BTreeMap<u32, RuleCounters>,
    /// Of the packet counted last.
    pub last: Option<Reason>,
}

impl Counts {
    fn rule(&mut self, slot: u32) -> &mut RuleCounters {
        self.rules.entry(slot).or_insert(RuleCounters::ZERO)
    }
}

impl Counters for Counts {
    fn count_reason(&mut self, reason: Reason, bytes: u64) {
        let count = self.reasons.entry(reason.name()).or_default();
        *count = (count.0 + 1, count.1 + bytes);
        self.last = Some(reason);
    }

    fn count_forwarded(&mut self, slot: u32, direction: u8, bytes: u64) {
        let rule = self.rule(slot);
        if direction == INWARD { rule.inward.add(bytes) } else { rule.outward.add(bytes) }
    }

    fn count_session(&mut self, slot: u32) {
        self.rule(slot).sessions += 1;
    }

    fn count_dropped(&mut self, slot: u32, reason: Reason) {
        self.rule(slot).dropped[reason as usize - Reason::FIRST_DROP] += 1;
    }
}

/// Takes a frame that is on `ifindex` through the core, as the programs do. With
/// [`Outcome::Release`] the frame has become the fragment that was held.
pub fn process<const HOOK: usize>(
    frame: &mut Frame,
    ifindex: u32,
    machine: &Machine,
    flows: &mut Tables<impl Family>,
    counters: &mut Counts,
) -> Outcome {
    let world = At::<HOOK> { machine, ifindex };
    let (mut seen, mut scratch) = (Seen::NOTHING, Scratch::EMPTY);
    let core = Core { flows: &mut *flows, world: &world, counters, scratch: &mut scratch, now: machine.now };
    let outcome = pipeline::process(frame, &mut seen, core);
    match outcome {
        Outcome::Hold => {
            flows
                .held
                .insert(*seen.held(), (frame.0[ethernet::LEN..].to_vec(), machine.now + TRAIN_LIFETIME));
        }
        Outcome::Release => {
            let (packet, _) = flows.held.remove(seen.held()).expect("only what is held is released");
            frame.0.splice(ethernet::LEN.., packet);
        }
        _ => {}
    }
    outcome
}
