//! What is to become of a packet: flows first, then rules.
//!
//! Until a decision to translate is final nothing lasting is changed that would be wrong if XDP
//! then left the packet to TC, which decides again.

mod error;
mod host;
mod limit;
mod train;
mod window;

use window::Standing;

use crate::{
    address::{Address, Ipv6, Macs, Port},
    family::Family,
    flow::{
        ANSWERED, FIN_INWARD, FIN_OUTWARD, FROM_INSIDE, Flow, FlowKey, Hop, INWARD, LEARNED_HOP, OUTWARD,
        PICKED_UP, PROVEN, RESET, ROUTED_BACK, Side, Tuple, UNANSWERED, is_closing,
    },
    layout::{Hook, OWN, XDP_TARGET},
    parse::{Datagram, Transport},
    reason::Reason,
    rule::{DMZ, HAIRPIN, Rule},
    tables::{Counters, Flows, Refused, Route, RouteQuery, Stage, Surroundings, World},
    tcp::{self, Segment},
    wire,
};

/// A hop that is not learned is asked anew after this many ns, also when no controller says that
/// something has changed.
pub const HOP_LIFETIME: u64 = 1_000_000_000;

/// The established table a second time, because another CPU may promote the flow between the first
/// two looks: then it was in neither at the moment it was looked for.
const WHERE_TO_LOOK: [Stage; 3] = [Stage::Established, Stage::HalfOpen, Stage::Established];

/// How many source ports towards the target are tried for a new flow, the client's own first.
const SOURCE_PORTS_TRIED: u32 = 8;

/// A source port for a client whose own is taken: another flow goes to the same target from it.
#[inline(always)]
fn other_source_port<A: Address>(tuple: &Tuple<A>, attempt: u32) -> Port {
    const FIRST: u32 = 1024;
    let ports = u32::from(tuple.src_port.number()) << 16 | u32::from(tuple.dst_port.number());
    // Knuth's multiplicative hash; nobody gains by knowing it.
    let mixed = (ports ^ tuple.src.sum()).wrapping_add(attempt).wrapping_mul(0x9e37_79b1) >> 8;
    Port::new((FIRST + mixed % (0x1_0000 - FIRST)) as u16)
}

/// [`Plan::slot`] where no rule is concerned.
const NO_SLOT: u32 = u32::MAX;

/// How a packet is to be translated.
#[derive(Clone, Copy, Debug)]
pub struct Plan<A> {
    pub to: Tuple<A>,
    /// Also of a packet that is not translated: the rule that it was about, or [`NO_SLOT`].
    pub slot: u32,
    pub direction: u8,
}

/// What has come of looking for a packet's flow. (One byte: see [`Core::claim`] about results.)
enum Followed {
    Done,
    /// It is there; its hop has to be asked anew.
    Stale,
    /// There is none that is alive.
    Unknown,
    Stopped(Reason),
}

/// A flow's entry that is looked at, and its other one: kept outside of a BPF program's stack.
#[derive(Clone, Copy, Debug)]
pub struct Keys<A> {
    here: FlowKey<A>,
    other: FlowKey<A>,
}

impl<A: Address> Keys<A> {
    pub const NOTHING: Self = Self { here: FlowKey::NOTHING, other: FlowKey::NOTHING };
}

/// How a translated packet goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Onward {
    /// To a known neighbour.
    Hop(Hop),
    /// Through the kernel's neighbour resolution (TC only); see [`Route::Unresolved`].
    Neighbour { ifindex: u32, next_hop: Ipv6 },
    /// Through the host's stack, which helps with it (TC only).
    Host,
    /// Through the host's stack, which routes and filters it (TC only; see [`crate::rule::VIA_STACK`]).
    Stack,
    /// It is leaving already (TC egress). Where it does so by another uplink than the request came by,
    /// a hop stands for the right one.
    Egress,
}

/// How the packet came in.
#[derive(Clone, Copy, Debug)]
pub struct Arrival {
    pub side: Side,
    pub macs: Macs,
    /// The MTU of the interface, and whether XDP may send by it.
    pub mtu: u32,
    pub from_xdp: bool,
}

impl Arrival {
    pub const NOWHERE: Self =
        Self { side: Side::External, macs: Macs::new([0; 6], [0; 6]), mtu: 0, from_xdp: false };

    /// Back to where it came from: replies leave by the interface and to the neighbour of the request.
    #[inline(always)]
    fn way_back(&self, ifindex: u32) -> Hop {
        Hop { macs: self.macs.swapped(), ifindex, mtu: self.mtu, from_xdp: self.from_xdp as u32 }
    }
}

/// Where flow entries are put together: the two would fill most of a BPF program's 512 bytes of stack.
///
/// Zeroes are a value of it; each part is written before it is read.
#[derive(Clone, Copy, Debug)]
pub struct Scratch<A: Address> {
    inward: Flow<A>,
    outward: Flow<A>,
    way: Way,
    /// What has been decided, if it is not to stop.
    plan: Plan<A>,
    /// In which table the packet's flow is.
    stage: Stage,
    /// Of a packet without a flow: that was cut.
    is_cut: bool,
}

impl<A: Address> Scratch<A> {
    pub const EMPTY: Self = Self {
        inward: Flow::ZERO,
        outward: Flow::ZERO,
        way: Way { onward: Onward::Host, hop: None },
        plan: Plan { to: Tuple::NOTHING, slot: NO_SLOT, direction: 0 },
        stage: Stage::HalfOpen,
        is_cut: false,
    };

    /// Makes it a new packet's.
    #[inline(always)]
    pub fn forget(&mut self) {
        self.plan.slot = NO_SLOT;
    }

    /// The rule that a packet was about, whatever became of it.
    #[inline(always)]
    pub fn slot(&self) -> Option<u32> {
        (self.plan.slot != NO_SLOT).then_some(self.plan.slot)
    }

    /// How a packet is to be translated, and how it goes on then.
    #[inline(always)]
    pub fn decided(&self) -> (&Plan<A>, &Onward) {
        (&self.plan, &self.way.onward)
    }
}

/// The core and its surroundings, for one packet.
pub struct Core<'a, A: Address, F, W, C> {
    pub flows: &'a mut F,
    pub world: &'a W,
    pub counters: &'a mut C,
    pub scratch: &'a mut Scratch<A>,
    /// Coarse monotonic clock, ns.
    pub now: u64,
}

impl<A: Family, F: Flows<A>, W: World<A>, C: Counters> Core<'_, A, F, W, C> {
    /// Decides about a packet that came in (not at egress): the plan is then in the scratch. The error is
    /// why nothing is to be done with it but what the reason's verdict says.
    #[inline(always)]
    pub fn ingress(
        &mut self,
        datagram: &Datagram<A>,
        arrival: &Arrival,
        keys: &mut Keys<A>,
    ) -> Result<(), Reason> {
        match self.follow(datagram, arrival, keys) {
            Followed::Done => {}
            Followed::Stale => self.follow_anew(datagram, keys)?,
            Followed::Unknown => return self.open(keys, datagram, arrival),
            Followed::Stopped(reason) => return Err(reason),
        }
        self.advance_if_due(keys, datagram, arrival)
    }

    /// Carries a packet of a flow that there is, if its hop is fresh. (A function of its own, as the next,
    /// [`Core::advance`] and [`Core::error`]: see [`Core::claim`].)
    #[inline(never)]
    fn follow(&mut self, datagram: &Datagram<A>, arrival: &Arrival, keys: &mut Keys<A>) -> Followed {
        keys.here = FlowKey::new(datagram.tuple, datagram.protocol, arrival.side);
        self.scratch.is_cut = false;
        // (Not a loop over them: the verifier would go through what follows once for each.)
        let [first, second, third] = WHERE_TO_LOOK;
        let (stage, flow) = match self.flows.find(first, &keys.here) {
            Some(flow) => (first, flow),
            None => match self.flows.find(second, &keys.here) {
                Some(flow) => (second, flow),
                None => match self.flows.find(third, &keys.here) {
                    Some(flow) => (third, flow),
                    None => return Followed::Unknown,
                },
            },
        };
        self.scratch.plan = Plan { to: flow.to, slot: flow.rule, direction: flow.direction };
        self.scratch.stage = stage;
        let Some(rule) = carrier(flow, datagram.protocol, self.world, self.now) else {
            if flow.direction == OUTWARD {
                // As long as the target goes on, it is not to leave with its private source.
                flow.last_seen = self.now;
                return Followed::Stopped(Reason::Cut);
            }
            self.scratch.is_cut = datagram.protocol == wire::tcp::NUMBER && !datagram.segment.is_syn();
            if !self.scratch.is_cut {
                // The outward entry stays: the target's late packets end at it.
                self.flows.remove(stage, &keys.here);
            }
            return Followed::Unknown;
        };
        if datagram.transport == Transport::Malformed {
            return Followed::Stopped(Reason::BadL4Length);
        }
        if rule.counts_sessions() && outlives_its_reset(flow, datagram) {
            return Followed::Stopped(Reason::NoFlow);
        }
        if reopens(flow, datagram) {
            keys.other = flow.other_key(&keys.here);
            self.remove(stage, keys);
            return Followed::Unknown;
        }
        let onward = &mut self.scratch.way.onward;
        if rule.is_via_stack() {
            *onward = Onward::Stack;
            if let Err(reason) = may_enter::<W>(flow.direction) {
                return Followed::Stopped(reason);
            }
        } else if hop_is_fresh(flow, self.world, self.now) {
            *onward = Onward::Hop(flow.hop);
            if let Err(reason) = fit(onward, datagram, flow, self.world) {
                return Followed::Stopped(reason);
            }
        } else {
            return Followed::Stale;
        }
        touch(flow, datagram, stage, self.now);
        Followed::Done
    }

    /// Carries a packet of the flow that [`Core::follow`] has found, with a hop that is asked anew.
    #[inline(never)]
    fn follow_anew(&mut self, datagram: &Datagram<A>, keys: &Keys<A>) -> Result<(), Reason> {
        let stage = self.scratch.stage;
        // Removed meanwhile: its next packet finds what there is then.
        let flow = self.flows.find(stage, &keys.here).ok_or(Reason::NoFlow)?;
        let way = &mut self.scratch.way;
        find_hop(flow, datagram, self.world, self.now, way)?;
        fit(&mut way.onward, datagram, flow, self.world)?;
        touch(flow, datagram, stage, self.now);
        Ok(())
    }

    /// Decides about a packet that the host's stack sends by an external interface: a reply that
    /// did not take the direct way is translated here; its hop is counted and its next hop is
    /// known already.
    #[inline(always)]
    pub fn egress(&mut self, datagram: &Datagram<A>, keys: &mut Keys<A>) -> Result<(), Reason> {
        self.follow_out(datagram, keys)?;
        self.advance_if_due(keys, datagram, &Arrival::NOWHERE)
    }

    /// [`Core::follow`] at egress.
    #[inline(never)]
    fn follow_out(&mut self, datagram: &Datagram<A>, keys: &mut Keys<A>) -> Result<(), Reason> {
        keys.here = FlowKey::new(datagram.tuple, datagram.protocol, Side::Internal);
        for stage in WHERE_TO_LOOK {
            let Some(flow) = self.flows.find(stage, &keys.here) else { continue };
            self.scratch.plan = Plan { to: flow.to, slot: flow.rule, direction: flow.direction };
            if !is_live(flow, datagram.protocol, self.world, self.now) {
                return Err(Reason::Cut);
            }
            if datagram.transport == Transport::Malformed {
                return Err(Reason::BadL4Length);
            }
            leave(flow, datagram, self.world, self.now, &mut self.scratch.way)?;
            touch(flow, datagram, stage, self.now);
            self.scratch.stage = stage;
            return Ok(());
        }
        if !self.world.is_marked() {
            let _ = self.note_host(datagram, keys);
        }
        Err(Reason::NoMatch)
    }

    #[inline(always)]
    fn remove(&mut self, stage: Stage, keys: &Keys<A>) {
        self.flows.remove(stage, &keys.here);
        self.flows.remove(stage, &keys.other);
    }

    /// A new flow, if a rule allows one.
    #[inline(never)]
    fn open(&mut self, keys: &mut Keys<A>, datagram: &Datagram<A>, arrival: &Arrival) -> Result<(), Reason> {
        self.scratch.plan.slot = NO_SLOT;
        let mut claimed = self.claim(datagram, arrival);
        if claimed != Err(Reason::NoMatch) {
            self.scratch.plan.slot = self.scratch.inward.rule;
            claimed = self.yield_to_host(&keys.here).and(claimed);
        }
        if claimed == Err(Reason::Cut) {
            // As long as its client goes on, a connection that was cut is not picked up again.
            for stage in [Stage::Established, Stage::HalfOpen] {
                if let Some(flow) = self.flows.find(stage, &keys.here) {
                    flow.last_seen = self.now;
                }
            }
        }
        claimed?;
        self.check_source(datagram, arrival)?;
        let Scratch { inward, way, .. } = &mut *self.scratch;
        if self.world.rule(inward.rule).is_some_and(Rule::is_via_stack) {
            may_enter::<W>(INWARD)?;
            *way = Way { onward: Onward::Stack, hop: None };
        } else {
            find_way(&inward.to, datagram, Side::Internal, self.world, way)?;
            fit(&mut way.onward, datagram, inward, self.world)?;
        }
        self.admit(datagram.tuple.src)?;
        self.create(keys, datagram, arrival)?;
        let Scratch { inward, plan, .. } = &mut *self.scratch;
        (plan.to, plan.direction) = (inward.to, INWARD);
        Ok(())
    }

    /// Finds the rule for a packet without a flow and whether it may open one: then the rule and
    /// the rewrite are in the scratch's inward entry. With an error other than
    /// [`Reason::NoMatch`] the rule is there.
    ///
    /// A function of its own, like [`find_way`] and [`Core::create`], so that the three have the
    /// rest of the stack one after the other. Such functions return scalars: where a BPF function
    /// returns nothing (a large result counts as nothing), R0 holds what happens to be left in it,
    /// and the verifier refuses that if it is an address on the stack.
    #[inline(never)]
    fn claim(&mut self, datagram: &Datagram<A>, arrival: &Arrival) -> Result<(), Reason> {
        let port = datagram.tuple.dst_port;
        let slot = self
            .world
            .rule_for(datagram.tuple.dst, datagram.protocol, port.number())
            .ok_or(Reason::NoMatch)?;
        let rule = self
            .world
            .rule(slot)
            .filter(|rule| rule.is_open(self.now) && rule.has_port(port))
            .filter(|rule| arrival.side == Side::External || rule.flags & HAIRPIN != 0)
            .filter(|rule| !self.is_the_hosts(rule, datagram))
            .ok_or(Reason::NoMatch)?;
        // (Of the other family no port page leads to it.)
        let target = A::from_mapped(rule.target).ok_or(Reason::NoMatch)?;
        let inward = &mut self.scratch.inward;
        (inward.rule, inward.epoch) = (slot, rule.epoch(datagram.protocol));
        (inward.direction, inward.flags, inward.gateway) = (INWARD, 0, A::UNSPECIFIED);
        inward.to = Tuple { dst: target, dst_port: rule.target_port(port), ..datagram.tuple };
        if arrival.side == Side::Internal {
            inward.flags = FROM_INSIDE;
            // So that the target answers to the router, though it may be the client's neighbour or
            // the client itself (RFC 4787 REQ-9).
            inward.to.src = datagram.tuple.dst;
        }
        if datagram.transport == Transport::Tcp && !datagram.segment.is_syn() {
            inward.flags |= PICKED_UP;
        }
        may_open(datagram, rule, self.world)?;
        if self.scratch.is_cut { Err(Reason::Cut) } else { Ok(()) }
    }

    /// Whether the host has a better claim to a packet than a rule that has what nobody else takes.
    #[inline(always)]
    fn is_the_hosts(&self, rule: &Rule, datagram: &Datagram<A>) -> bool {
        rule.flags & DMZ != 0 && self.world.has_socket(&datagram.tuple, datagram.protocol)
    }

    /// Refuses a source that belongs elsewhere, by the route back to it. Notes whether that route
    /// leads to the neighbour that the packet came from. (A function of its own: see [`Core::claim`].)
    #[inline(never)]
    fn check_source(&mut self, datagram: &Datagram<A>, arrival: &Arrival) -> Result<(), Reason> {
        let ifindex = self.world.ifindex();
        let side_of = |ifindex| self.world.interface(ifindex).map(|interface| interface.side);
        // How the router itself would send to it.
        let to = Tuple { dst: datagram.tuple.src, ..Tuple::NOTHING };
        let back = RouteQuery { tuple: &to, protocol: 0, class: 0 };
        let back = match self.world.route(&back) {
            Route::Known { hop, next_hop } => {
                if hop.ifindex == ifindex
                    && hop.macs.dst() == arrival.macs.src()
                    && let Some(gateway) = A::from_mapped(next_hop)
                {
                    self.scratch.inward.flags |= ROUTED_BACK;
                    self.scratch.inward.gateway = gateway;
                }
                Some(hop.ifindex)
            }
            Route::Unresolved { ifindex, .. } => Some(ifindex),
            Route::None(_) => None,
        };
        let belongs = match arrival.side {
            Side::External => back.and_then(side_of) != Some(Side::Internal as u8),
            Side::Internal => back == Some(ifindex),
        };
        if belongs { Ok(()) } else { Err(Reason::Spoofed) }
    }

    /// Makes the flow that [`Core::claim`] and [`find_way`] have left in the scratch.
    #[inline(never)]
    fn create(
        &mut self,
        keys: &mut Keys<A>,
        datagram: &Datagram<A>,
        arrival: &Arrival,
    ) -> Result<(), Reason> {
        self.compose(&keys.here, arrival);
        touch(&mut self.scratch.inward, datagram, Stage::HalfOpen, self.now);
        for attempt in 0..SOURCE_PORTS_TRIED {
            match self.insert_both(keys) {
                Err(Reason::PortCollision) => {
                    self.scratch.inward.to.src_port = other_source_port(&keys.here.tuple, attempt);
                }
                done => return done,
            }
        }
        Err(Reason::PortCollision)
    }

    /// Both entries of a new flow whose rule and rewrite are in the scratch's inward one.
    #[inline(always)]
    fn compose(&mut self, key: &FlowKey<A>, arrival: &Arrival) {
        let generation = self.world.generation();
        let Scratch { inward, way, .. } = &mut *self.scratch;
        inward.last_seen = self.now;
        inward.hop_checked = self.now;
        inward.created = self.now;
        (inward.packets, inward.bytes) = (0, 0);
        inward.hop = way.hop.unwrap_or_default();
        // Of an older generation it is never fresh: the next packet asks again.
        inward.hop_generation = if way.hop.is_some() { generation } else { generation.wrapping_sub(1) };
        (inward.expected_ack, inward.seq_end, inward.ack) = (0, 0, 0);
        inward.progress = UNANSWERED;
        (inward.ended, inward.ends) = (0, 0);
        self.compose_outward(key, arrival);
    }

    /// The entry for the replies to the scratch's inward one: they leave by the interface, and to
    /// the neighbour, that the request came from.
    #[inline(always)]
    fn compose_outward(&mut self, key: &FlowKey<A>, arrival: &Arrival) {
        let Scratch { inward, outward, .. } = &mut *self.scratch;
        *outward = *inward;
        outward.to = key.tuple.reversed();
        outward.hop = arrival.way_back(self.world.ifindex());
        outward.hop_generation = self.world.generation();
        outward.flags = inward.flags & (FROM_INSIDE | PICKED_UP | ROUTED_BACK) | LEARNED_HOP;
        (outward.seq_end, outward.ack) = (0, 0);
        outward.direction = OUTWARD;
        (outward.packets, outward.bytes) = (0, 0);
    }

    /// Makes the scratch's entries a half-open flow, the reply's first. What another CPU has made
    /// meanwhile for the same packets is adopted: then its rewrite is in the scratch.
    #[inline(always)]
    fn insert_both(&mut self, keys: &mut Keys<A>) -> Result<(), Reason> {
        keys.other = self.scratch.inward.other_key(&keys.here);
        let back = &keys.other;
        if let Some(there) = self.flows.find(Stage::Established, back)
            && !there.has_same_owner(&self.scratch.outward)
        {
            if is_live(there, back.protocol, self.world, self.now) {
                return Err(Reason::PortCollision);
            }
            // Only the tombstone itself: its other half may be a newer flow's by now.
            self.flows.remove(Stage::Established, back);
        }
        self.insert_or_adopt(back, OUTWARD)?;
        // Between the two looks another CPU may have promoted the flow that has it.
        if let Some(there) = self.flows.find(Stage::Established, back)
            && !there.has_same_owner(&self.scratch.outward)
        {
            self.flows.remove(Stage::HalfOpen, back);
            return Err(Reason::PortCollision);
        }
        self.insert_or_adopt(&keys.here, INWARD).inspect_err(|_| self.flows.remove(Stage::HalfOpen, back))?;
        if self.scratch.inward.to != back.tuple.reversed() {
            // The other CPU has chosen another source port.
            self.flows.remove(Stage::HalfOpen, back);
        }
        Ok(())
    }

    #[inline(always)]
    fn insert_or_adopt(&mut self, key: &FlowKey<A>, direction: u8) -> Result<(), Reason> {
        let flow = if direction == INWARD { &self.scratch.inward } else { &self.scratch.outward };
        match self.flows.insert_new(Stage::HalfOpen, key, flow) {
            Ok(()) => return Ok(()),
            Err(Refused::Full) => return Err(Reason::TableFull),
            Err(Refused::Exists) => {}
        }
        match self.flows.find(Stage::HalfOpen, key) {
            Some(there) if there.has_same_owner(flow) => Ok(()),
            Some(there) if direction == INWARD && there.has_same_rule(flow) => {
                self.scratch.inward.to = there.to;
                Ok(())
            }
            Some(there) if is_live(there, key.protocol, self.world, self.now) => Err(Reason::PortCollision),
            // A cut flow's, or gone meanwhile.
            _ => {
                self.flows.remove(Stage::HalfOpen, key);
                self.flows.insert_new(Stage::HalfOpen, key, flow).map_err(|_| Reason::TableFull)
            }
        }
    }

    /// Most packets of an established flow change nothing of its state.
    #[inline(always)]
    fn advance_if_due(
        &mut self,
        keys: &mut Keys<A>,
        datagram: &Datagram<A>,
        arrival: &Arrival,
    ) -> Result<(), Reason> {
        if self.scratch.stage == Stage::HalfOpen || datagram.segment.is_control() {
            return self.advance(keys, datagram, arrival);
        }
        Ok(())
    }

    /// Moves the flow of a packet on in its life, on both of its entries. The error is why the packet
    /// goes no further.
    #[inline(never)]
    fn advance(
        &mut self,
        keys: &mut Keys<A>,
        datagram: &Datagram<A>,
        arrival: &Arrival,
    ) -> Result<(), Reason> {
        let stage = self.scratch.stage;
        let Some(flow) = self.flows.find(stage, &keys.here) else { return Ok(()) };
        keys.other = flow.other_key(&keys.here);
        if datagram.segment.flags & (tcp::FIN | tcp::RST) != 0 {
            self.end(stage, keys, &datagram.segment);
        }
        let Some(flow) = self.flows.find(stage, &keys.here) else { return Ok(()) };
        if flow.direction == INWARD && stage == Stage::HalfOpen {
            if proves(flow, datagram) {
                flow.progress = PROVEN;
            }
            self.scratch.inward = *flow;
            return self.settle(keys, arrival);
        }
        if flow.direction == OUTWARD
            && stage == Stage::HalfOpen
            && let Some(flow) = self.flows.find(stage, &keys.other)
            && flow.progress != PROVEN
            && answers(flow, datagram)
        {
            flow.progress = ANSWERED;
            // Anew with each SYN-ACK: a server may answer a repeated SYN with another number.
            flow.expected_ack = datagram.segment.end;
        }
        Ok(())
    }

    /// Notes on both entries that a FIN or RST has come, unless it is of somebody who does not know
    /// the connection (RFC 5961).
    #[inline(always)]
    fn end(&mut self, stage: Stage, keys: &Keys<A>, segment: &Segment) {
        let Some(flow) = self.flows.find(stage, &keys.here) else { return };
        let (own, ended) = (Standing::of(flow), ends(segment, flow.direction));
        let Some(other) = self.flows.find(stage, &keys.other) else { return };
        if !window::fits(own, Standing::of(other), segment) {
            return;
        }
        other.ended |= ended;
        let mut ended = other.ended;
        if let Some(flow) = self.flows.find(stage, &keys.here) {
            ended |= flow.ended;
            flow.ended = ended;
            flow.last_seen = self.now;
            window::follow(flow, segment, true);
        }
        if stage == Stage::Established && is_closing(ended) {
            self.end_session(keys);
        }
    }

    /// Brings the other entry of the half-open flow in the scratch up to date, and promotes the flow
    /// if it has been earned.
    #[inline(always)]
    fn settle(&mut self, keys: &Keys<A>, arrival: &Arrival) -> Result<(), Reason> {
        match self.flows.find(Stage::HalfOpen, &keys.other) {
            Some(outward) => {
                outward.ended |= self.scratch.inward.ended;
                self.scratch.outward = *outward;
            }
            None => {
                // A flood has evicted it; all that it held is known here too.
                self.compose_outward(&keys.here, arrival);
                let _ = self.flows.insert_new(Stage::HalfOpen, &keys.other, &self.scratch.outward);
            }
        }
        match self.scratch.inward.progress {
            PROVEN if !is_closing(self.scratch.inward.ended) => self.promote(keys),
            _ => Ok(()),
        }
    }

    /// The half-open flow in the scratch becomes established. Where the table is full the flow stays
    /// half-open, and works, unless its rule limits sessions; its next packet tries again.
    #[inline(always)]
    fn promote(&mut self, keys: &Keys<A>) -> Result<(), Reason> {
        let client = keys.here.tuple.src;
        let counted = self.enter(client)?;
        let established = self.establish(keys);
        if counted && established != Ok(true) {
            // Another CPU has counted it, or nobody is to.
            self.leave(client, self.scratch.inward.rule, self.scratch.inward.epoch);
        }
        match established {
            Ok(_) => self.remove(Stage::HalfOpen, keys),
            Err(Refused::Full) if counted => return Err(Reason::TableFull),
            Err(_) => {}
        }
        Ok(())
    }

    /// Puts both of the scratch's entries into the established table, or none. False: another CPU has
    /// done so.
    #[inline(always)]
    fn establish(&mut self, keys: &Keys<A>) -> Result<bool, Refused> {
        match self.flows.insert_new(Stage::Established, &keys.other, &self.scratch.outward) {
            Ok(()) => {}
            Err(Refused::Full) => return Err(Refused::Full),
            Err(Refused::Exists) => match self.flows.find(Stage::Established, &keys.other) {
                Some(there) if there.has_same_owner(&self.scratch.outward) => {}
                _ => return Err(Refused::Exists),
            },
        }
        match self.flows.insert_new(Stage::Established, &keys.here, &self.scratch.inward) {
            Ok(()) => {
                self.counters.count_session(self.scratch.inward.rule);
                Ok(true)
            }
            Err(Refused::Exists) => Ok(false),
            Err(Refused::Full) => {
                self.flows.remove(Stage::Established, &keys.other);
                Err(Refused::Full)
            }
        }
    }
}

/// Whether the flow's rule still carries it.
#[inline(always)]
fn is_live<A: Address, W: Surroundings>(flow: &Flow<A>, protocol: u8, world: &W, now: u64) -> bool {
    carrier(flow, protocol, world, now).is_some()
}

/// The flow's rule, if it still carries it.
#[inline(always)]
fn carrier<'w, A: Address, W: Surroundings>(
    flow: &Flow<A>,
    protocol: u8,
    world: &'w W,
    now: u64,
) -> Option<&'w Rule> {
    world.rule(flow.rule).filter(|rule| {
        rule.carries(protocol, flow.epoch, now)
            && (flow.flags & FROM_INSIDE == 0 || rule.flags & HAIRPIN != 0)
    })
}

/// Whether a packet of a rule via the stack is translated where it came in: what comes from the target is
/// the host's until it leaves.
#[inline(always)]
fn may_enter<W: Surroundings>(direction: u8) -> Result<(), Reason> {
    match (W::HOOK, direction) {
        (Hook::Xdp, _) => Err(Reason::LeftToTc),
        (_, INWARD) => Ok(()),
        _ => Err(Reason::LeftToStack),
    }
}

/// Whether it is a client's segment behind a RST that left its place to another session: the target may
/// have taken that for none of its connection, and the session would go on uncounted.
#[inline(always)]
fn outlives_its_reset<A: Family>(flow: &Flow<A>, datagram: &Datagram<A>) -> bool {
    let ended = flow.ended & RESET != 0 && flow.direction == INWARD;
    ended && !datagram.segment.is_syn() && datagram.segment.flags & tcp::RST == 0
}

/// Whether it is a client's SYN on a connection that is over: it starts a new one (RFC 9293
/// section 3.6.1, RFC 5382 REQ-5).
#[inline(always)]
fn reopens<A: Family>(flow: &Flow<A>, datagram: &Datagram<A>) -> bool {
    datagram.segment.is_syn() && flow.direction == INWARD && is_closing(flow.ended)
}

#[inline(always)]
fn touch<A: Family>(flow: &mut Flow<A>, datagram: &Datagram<A>, stage: Stage, now: u64) {
    // What would end the connection counts only if it fits: see `Core::end`.
    if datagram.segment.flags & (tcp::FIN | tcp::RST) == 0 {
        if datagram.transport == Transport::Tcp {
            window::follow(flow, &datagram.segment, stage == Stage::Established);
        }
        flow.last_seen = now;
    }
    flow.packets += 1;
    flow.bytes += u64::from(datagram.ip_len);
}

/// Whether a flow's hop can be used without asking anew: one that was learned holds within its generation,
/// another one for a second of it.
#[inline(always)]
fn hop_is_fresh<A: Address, W: Surroundings>(flow: &Flow<A>, world: &W, now: u64) -> bool {
    flow.hop_generation == world.generation()
        && (flow.flags & LEARNED_HOP != 0 || now.wrapping_sub(flow.hop_checked) < HOP_LIFETIME)
}

/// Finds the way of a flow whose hop is not fresh, and notes it in the entry.
#[inline(always)]
fn find_hop<A: Family, W: World<A>>(
    flow: &mut Flow<A>,
    datagram: &Datagram<A>,
    world: &W,
    now: u64,
    found: &mut Way,
) -> Result<(), Reason> {
    // A learned hop is never stale but by its generation.
    let learned = flow.flags & LEARNED_HOP != 0;
    if learned && flow.flags & ROUTED_BACK != 0 && follow_gateway(flow, datagram, world, now, found)? {
        return Ok(());
    }
    if learned && renew(flow, world) {
        found.onward = Onward::Hop(flow.hop);
        return Ok(());
    }
    if W::HOOK == Hook::Xdp && world.claim_probe(flow.rule, now) {
        return Err(Reason::LeftToProbe);
    }
    find_way(&flow.to, datagram, flow.egress_side(), world, found)?;
    if let Some(hop) = found.hop {
        flow.hop = hop;
        flow.hop_checked = now;
        flow.hop_generation = world.generation();
        flow.flags &= !LEARNED_HOP;
    }
    Ok(())
}

/// In a new generation, finds out where the gateway is now that the flow's requests came from and that
/// the route back led to. Its packet goes through the kernel's neighbour code, which checks that it
/// still answers: a neighbour that is only ever redirected to would be taken for alive for ever. False:
/// the way is not found.
#[inline(always)]
fn follow_gateway<A: Family, W: World<A>>(
    flow: &mut Flow<A>,
    datagram: &Datagram<A>,
    world: &W,
    now: u64,
    found: &mut Way,
) -> Result<bool, Reason> {
    let to = Tuple { dst: flow.gateway, ..flow.to };
    match find_way(&to, datagram, flow.egress_side(), world, found) {
        Err(Reason::LeftUnresolved) => Err(Reason::LeftUnresolved),
        Ok(()) if found.ifindex() == Some(flow.hop.ifindex) => {
            // Not known: each packet asks again.
            let Some(hop) = found.hop else { return Ok(true) };
            if W::HOOK == Hook::Xdp && world.claim_probe(flow.rule, now) {
                return Err(Reason::LeftToProbe);
            }
            flow.hop.macs = Macs::new(hop.macs.dst(), flow.hop.macs.src());
            let there = renew(flow, world);
            if W::HOOK == Hook::Xdp {
                found.onward = Onward::Hop(flow.hop);
            }
            Ok(there)
        }
        // It is not to be had by that link any more: what was learned holds as long as the interface does.
        _ => Ok(false),
    }
}

/// How a packet of the host's leaves that belongs to a flow: by the uplink of the request.
#[inline(always)]
fn leave<A: Family, W: World<A>>(
    flow: &Flow<A>,
    datagram: &Datagram<A>,
    world: &W,
    now: u64,
    way: &mut Way,
) -> Result<(), Reason> {
    way.onward = Onward::Egress;
    let learned = flow.flags & LEARNED_HOP != 0;
    if learned && flow.hop.ifindex != world.ifindex() && hop_is_usable(flow, world, now) {
        way.onward = Onward::Hop(flow.hop);
    }
    fit(&mut way.onward, datagram, flow, world)
}

/// Takes a learned hop into the present generation, with what its interface is now. False: that is gone.
#[inline(always)]
fn renew<A: Address, W: Surroundings>(flow: &mut Flow<A>, world: &W) -> bool {
    let Some(interface) = world.interface(flow.hop.ifindex) else { return false };
    if interface.side != flow.egress_side() as u8 {
        return false;
    }
    flow.hop.macs = Macs::new(flow.hop.macs.dst(), interface.mac);
    flow.hop.mtu = interface.mtu;
    flow.hop.from_xdp = (interface.flags & XDP_TARGET != 0) as u32;
    flow.hop_generation = world.generation();
    true
}

/// Whether a hop can be used by a packet that must change nothing of the flow: an ICMP error, one that
/// the host sends.
#[inline(always)]
fn hop_is_usable<A: Address, W: Surroundings>(flow: &Flow<A>, world: &W, now: u64) -> bool {
    if flow.flags & LEARNED_HOP != 0 {
        let interface = world.interface(flow.hop.ifindex);
        return interface.is_some_and(|interface| interface.side == flow.egress_side() as u8);
    }
    flow.hop_generation == world.generation() && now.wrapping_sub(flow.hop_checked) < HOP_LIFETIME
}

#[derive(Clone, Copy, Debug)]
struct Way {
    onward: Onward,
    /// What to remember; `None` while the neighbour is unknown.
    hop: Option<Hop>,
}

impl Way {
    #[inline(always)]
    fn ifindex(&self) -> Option<u32> {
        match &self.onward {
            Onward::Hop(hop) => Some(hop.ifindex),
            Onward::Neighbour { ifindex, .. } => Some(*ifindex),
            Onward::Host | Onward::Stack | Onward::Egress => None,
        }
    }
}

/// Asks the kernel for the way to where a packet is translated to.
///
/// In TC the packet then goes through the kernel's neighbour code also where the neighbour is
/// known: only its use there makes the kernel check a stale neighbour. (A function of its own: see
/// [`Core::claim`].)
#[inline(never)]
fn find_way<A: Family, W: World<A>>(
    to: &Tuple<A>,
    datagram: &Datagram<A>,
    egress: Side,
    world: &W,
    way: &mut Way,
) -> Result<(), Reason> {
    let query = RouteQuery { tuple: to, protocol: datagram.protocol, class: datagram.class };
    match world.route(&query) {
        Route::Known { hop, next_hop } => {
            let (mtu, from_xdp) = check_egress(hop.ifindex, egress, world)?;
            let hop = Hop { mtu, from_xdp, ..hop };
            way.hop = Some(hop);
            way.onward = match W::HOOK {
                Hook::Xdp => Onward::Hop(hop),
                _ => Onward::Neighbour { ifindex: hop.ifindex, next_hop },
            };
            Ok(())
        }
        Route::Unresolved { .. } if W::HOOK == Hook::Xdp => Err(Reason::LeftUnresolved),
        Route::Unresolved { ifindex, next_hop } => {
            check_egress(ifindex, egress, world)?;
            *way = Way { onward: Onward::Neighbour { ifindex, next_hop }, hop: None };
            Ok(())
        }
        Route::None(reason) => Err(reason),
    }
}

/// MTU of the egress interface and whether XDP may send by it, if translated packets may leave there at all.
#[inline(always)]
fn check_egress<W: Surroundings>(ifindex: u32, egress: Side, world: &W) -> Result<(u32, u32), Reason> {
    match world.interface(ifindex) {
        Some(interface) if interface.side == egress as u8 => {
            Ok((interface.mtu, (interface.flags & XDP_TARGET != 0) as u32))
        }
        _ => Err(Reason::WrongEgress),
    }
}

/// Whether a packet can take a way as it is: TTL, length, XDP's reach. Where the host can help it
/// goes there instead.
#[inline(always)]
fn fit<A: Family, W: World<A>>(
    onward: &mut Onward,
    datagram: &Datagram<A>,
    flow: &Flow<A>,
    world: &W,
) -> Result<(), Reason> {
    match W::HOOK {
        Hook::Xdp => fit_for_xdp(onward, datagram),
        _ => fit_for_tc(onward, datagram, flow, world),
    }
}

#[inline(always)]
fn fit_for_xdp<A: Family>(onward: &Onward, datagram: &Datagram<A>) -> Result<(), Reason> {
    match onward {
        _ if datagram.ttl <= 1 => Err(Reason::LeftToTc),
        Onward::Hop(hop) if datagram.ip_len > hop.mtu => Err(Reason::LeftTooBig),
        Onward::Hop(hop) if hop.from_xdp == 0 => Err(Reason::LeftToTc),
        _ => Ok(()),
    }
}

/// (A function of its own: see [`Core::claim`].)
#[inline(never)]
fn fit_for_tc<A: Family, W: World<A>>(
    onward: &mut Onward,
    datagram: &Datagram<A>,
    flow: &Flow<A>,
    world: &W,
) -> Result<(), Reason> {
    if datagram.fragment.to_host && W::HOOK == Hook::TcIngress {
        match flow.direction {
            INWARD => *onward = Onward::Host,
            _ => return Err(Reason::LeftTooBig),
        }
    }
    let mtu = match onward {
        // The host has counted the hop, and kept to another uplink's MTU.
        Onward::Hop(hop) if W::HOOK == Hook::TcEgress => {
            let mtu = world.interface(hop.ifindex).map_or(hop.mtu, |interface| interface.mtu);
            let fits = datagram.longest_packet(world.segment_size()) <= mtu;
            return if fits { Ok(()) } else { Err(Reason::TooBig) };
        }
        Onward::Hop(hop) => Some(hop.mtu),
        Onward::Neighbour { ifindex, .. } => world.interface(*ifindex).map(|interface| interface.mtu),
        Onward::Host | Onward::Stack | Onward::Egress => return Ok(()),
    };
    if datagram.ttl <= 1 {
        return match (datagram.transport, flow.direction) {
            // Nobody is told of an error that gets lost (RFC 1812 section 4.3.2.7).
            (Transport::IcmpError, _) => Err(Reason::TtlExpired),
            // The host takes no packet from its own address, and one to it for its own.
            _ if flow.flags & FROM_INSIDE != 0 => Err(Reason::TtlExpired),
            // The host counts the hop, and tells the client: translated back as it leaves.
            (_, INWARD) => {
                *onward = Onward::Host;
                Ok(())
            }
            _ => Err(Reason::LeftTtlExpired),
        };
    }
    let too_big = mtu.is_some_and(|mtu| datagram.longest_packet(world.segment_size()) > mtu);
    match (too_big, flow.direction, datagram.dont_fragment) {
        (false, ..) => Ok(()),
        (true, ..) if flow.flags & FROM_INSIDE != 0 => Err(Reason::TooBig),
        // The stack fragments it, or tells the client: translated back as it leaves.
        (true, INWARD, _) => {
            *onward = Onward::Host;
            Ok(())
        }
        // The stack tells the server, from its own address on that side; or it fragments the packet,
        // whose parts are translated as they leave.
        (true, ..) => Err(Reason::LeftTooBig),
    }
}

/// Whether a packet may open a flow of `rule`.
#[inline(always)]
fn may_open<A: Family, W: World<A>>(datagram: &Datagram<A>, rule: &Rule, world: &W) -> Result<(), Reason> {
    if is_impossible(datagram, world) {
        return Err(Reason::Spoofed);
    }
    match datagram.transport {
        Transport::Malformed => return Err(Reason::BadL4Length),
        Transport::LaterFragment => return Err(Reason::NoFlow),
        Transport::Tcp if !datagram.segment.is_syn() && !datagram.segment.is_under_way() => {
            return Err(Reason::NoFlow);
        }
        _ => {}
    }
    if rule.allow_list != 0 && !world.is_allowed(rule.allow_list, datagram.tuple.src) {
        return Err(Reason::NotAllowed);
    }
    Ok(())
}

/// Whether no honest packet has its source.
#[inline(always)]
fn is_impossible<A: Family, W: World<A>>(datagram: &Datagram<A>, world: &W) -> bool {
    let source = datagram.tuple.src;
    source.is_impossible_source() || source == datagram.tuple.dst || world.roles(source) & OWN != 0
}

/// The `Flow::ended` bits that a segment sets, if it fits.
#[inline(always)]
fn ends(segment: &Segment, direction: u8) -> u8 {
    let fin = match (segment.flags & tcp::FIN != 0, direction) {
        (false, _) => 0,
        (true, INWARD) => FIN_INWARD,
        (true, _) => FIN_OUTWARD,
    };
    fin | if segment.flags & tcp::RST != 0 { RESET } else { 0 }
}

/// Whether a reply shows that the target takes the session.
#[inline(always)]
fn answers<A: Family>(inward: &Flow<A>, datagram: &Datagram<A>) -> bool {
    let segment = &datagram.segment;
    match inward.flags & PICKED_UP {
        _ if datagram.transport == Transport::Udp => true,
        0 => segment.is_syn_ack(),
        // It knows the client's sequence numbers.
        _ => segment.is_under_way() && window::is_near(segment.ack, inward.seq_end),
    }
}

/// Whether a client's packet shows that it has seen the target's answer, which no spoofer has.
#[inline(always)]
fn proves<A: Family>(inward: &Flow<A>, datagram: &Datagram<A>) -> bool {
    let Segment { flags, ack, .. } = datagram.segment;
    let fits = match inward.flags & PICKED_UP {
        0 => ack == inward.expected_ack,
        _ => window::is_near(ack, inward.expected_ack),
    };
    let acknowledges = flags & (tcp::ACK | tcp::SYN | tcp::RST) == tcp::ACK && fits;
    inward.progress == PROVEN
        || inward.progress == ANSWERED && (datagram.transport == Transport::Udp || acknowledges)
}
