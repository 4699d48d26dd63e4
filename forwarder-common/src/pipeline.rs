//! The way of a packet, from its bytes to its verdict.

use crate::{
    address::Ipv6,
    decide::{Arrival, Core, Keys, Onward, Scratch},
    family::Family,
    flow::Side,
    fragment::HeldKey,
    icmp::{self, Quote},
    layout::{Hook, Interface, UNFINISHED_CHECKSUMS, XDP_TARGET},
    packet::{OutOfBounds, Packet},
    parse::{self, Datagram, Ethernet, Transport},
    reason::{Reason, Verdict},
    rewrite::{self, Rewrite},
    tables::{Counters, Flows, Surroundings, World},
    wire::ethernet,
};

/// What a program is to do with its packet now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The packet is as it came.
    Pass,
    /// The packet is as it came, and the host's stack is to cut it up, or to tell its sender why not:
    /// marked (TC ingress only).
    PassMarked,
    Drop,
    /// Rewritten: send it by this interface as it is.
    Redirect {
        ifindex: u32,
    },
    /// Rewritten: send it by this interface, the kernel resolving the neighbour, which is of either
    /// family ([`crate::address::Address::mapped`]).
    RedirectNeighbour {
        ifindex: u32,
        next_hop: Ipv6,
    },
    /// Rewritten: let it go on its way through the host's stack; at ingress marked.
    Continue,
    /// As it came: keep its bytes, as what [`Seen::held`] says, and drop it.
    Hold,
    /// As it came: let it come in once more, and then the fragment that is held as [`Seen::held`] says.
    Release,
}

/// What the headers say: kept outside of a BPF program's 512 bytes of stack.
///
/// Zeroes are a value of it.
#[derive(Clone, Copy, Debug)]
pub struct Seen<A> {
    datagram: Datagram<A>,
    arrival: Arrival,
    /// Of an ICMP error.
    quote: Quote<A>,
    keys: Keys<A>,
    /// Of a fragment.
    held: HeldKey<A>,
}

impl<A: Family> Seen<A> {
    pub const NOTHING: Self = Self {
        datagram: Datagram::NOTHING,
        arrival: Arrival::NOWHERE,
        quote: Quote::NOTHING,
        keys: Keys::NOTHING,
        held: HeldKey::NONE,
    };

    /// The fragment to hold or to release.
    #[inline(always)]
    pub fn held(&self) -> &HeldKey<A> {
        &self.held
    }
}

/// Whether a frame is IPv6's to process; all others, also those that are neither's, are IPv4's.
#[inline(always)]
pub fn is_ipv6<P: Packet>(packet: &P) -> bool {
    packet.read::<u16>(ethernet::TYPE) == Ok(ethernet::TYPE_IPV6)
}

/// Takes a frame through the core. `seen` is written before it is read.
#[inline(always)]
pub fn process<A, P, F, W, C>(packet: &mut P, seen: &mut Seen<A>, mut core: Core<'_, A, F, W, C>) -> Outcome
where
    A: Family,
    P: Packet,
    F: Flows<A>,
    W: World<A>,
    C: Counters,
{
    if let Err(reason) = read(packet, core.world, seen) {
        return stop(core.world, reason, None, packet.len(), core.counters);
    }
    let Seen { datagram, arrival, quote, keys, held } = seen;
    let side = if W::HOOK == Hook::TcEgress { Side::Internal } else { arrival.side };
    // XDP leaves both of these to TC.
    let is_later = W::HOOK != Hook::Xdp && datagram.transport == Transport::LaterFragment;
    let is_error = W::HOOK != Hook::Xdp && datagram.transport == Transport::IcmpError;
    let known = if is_later {
        core.join(datagram, side, packet.len())
    } else if is_error {
        icmp::quote(packet, datagram, quote)
    } else {
        Ok(())
    };
    if known == Err(Reason::Held) {
        *held = HeldKey::new(datagram, side, datagram.fragment.offset);
    } else if W::HOOK == Hook::TcIngress && datagram.fragment.more && core.finds_next(datagram, side, held) {
        return Outcome::Release;
    }
    if let Err(reason) = known {
        return stop(core.world, reason, None, packet.len(), core.counters);
    }
    let decided = match W::HOOK {
        _ if is_error => core.error(datagram, quote, arrival, keys),
        Hook::TcEgress => core.egress(datagram, keys),
        _ => core.ingress(datagram, arrival, keys),
    };
    let (plan, onward) = core.scratch.decided();
    let (slot, direction) = (plan.slot, plan.direction);
    if let Err(reason) = decided {
        if W::HOOK == Hook::TcIngress && reason == Reason::LeftTooBig && datagram.leads() {
            let _ = core.lead(datagram, side, true);
        }
        let slot = (reason != Reason::NoMatch).then_some(slot);
        return stop(core.world, reason, slot, packet.len(), core.counters);
    }
    if is_error && W::HOOK != Hook::TcEgress && !icmp::is_whole(packet, datagram) {
        return stop(core.world, Reason::BadIcmpChecksum, Some(slot), packet.len(), core.counters);
    }
    let (reason, outcome) = onward_to(W::HOOK, onward);
    if write::<A, P, W>(packet, seen, core.scratch).is_err() {
        return stop(core.world, Reason::Unwritable, Some(slot), packet.len(), core.counters);
    }
    let datagram = &seen.datagram;
    if W::HOOK != Hook::Xdp && datagram.leads() {
        let _ = core.lead(datagram, side, reason == Reason::TranslatedForHost);
    }
    let bytes = u64::from(datagram.ip_len);
    core.counters.count_reason(reason, bytes);
    core.counters.count_forwarded(slot, direction, bytes);
    outcome
}

/// Reads the headers, if the packet is one that this place can have a say in.
///
/// A function of its own in the BPF program, so that what it needs on the stack is free again
/// when the decision is made (and a scalar's: the BPF back end's reasons are at `Core::claim`).
#[inline(never)]
fn read<A, P, W>(packet: &mut P, world: &W, seen: &mut Seen<A>) -> Result<(), Reason>
where
    A: Family,
    P: Packet,
    W: Surroundings,
{
    let interface = world.interface(world.ifindex()).ok_or(Reason::UnknownInterface)?;
    let header = parse::ethernet(packet).map_err(|_| Reason::ShortFrame)?;
    match header.ether_type {
        found if found == A::ETHER_TYPE => {}
        ethernet::TYPE_VLAN | ethernet::TYPE_QINQ => return Err(tagged(packet, header.ether_type, W::HOOK)),
        _ => return Err(Reason::NotIp),
    }
    // At egress it is the next hop's.
    if W::HOOK != Hook::TcEgress && header.macs.dst() != interface.mac {
        return Err(Reason::OtherStation);
    }
    A::parse(packet, W::HOOK == Hook::Xdp, &mut seen.datagram)?;
    if W::HOOK == Hook::Xdp && is_unfinished(&seen.datagram, interface) {
        return Err(Reason::LeftUnfinishedChecksum);
    }
    seen.arrival = arrival(&header, interface)?;
    // Too rare to be worth a place in XDP.
    if W::HOOK == Hook::Xdp && seen.datagram.transport == Transport::IcmpError {
        return Err(Reason::LeftToTc);
    }
    Ok(())
}

/// An incremental update would ruin a checksum that an offload has still to finish.
#[inline(always)]
fn is_unfinished<A: Family>(datagram: &Datagram<A>, interface: &Interface) -> bool {
    interface.flags & UNFINISHED_CHECKSUMS != 0
        && matches!(datagram.transport, Transport::Tcp | Transport::Udp)
        && parse::checksum_is_unfinished(datagram)
}

/// A priority tag (VLAN 0, IEEE 802.1Q) belongs to the untagged interface: TC sees it taken off.
#[inline(always)]
fn tagged<P: Packet>(packet: &P, ether_type: u16, hook: Hook) -> Reason {
    let vlan = packet.read::<u16>(ethernet::LEN).map(|tag| u16::from_be(tag) & 0x0fff);
    if hook == Hook::Xdp && ether_type == ethernet::TYPE_VLAN && vlan == Ok(0) {
        Reason::LeftToTc
    } else {
        Reason::Vlan
    }
}

#[inline(always)]
fn arrival(ethernet: &Ethernet, interface: &Interface) -> Result<Arrival, Reason> {
    Ok(Arrival {
        side: Side::from_byte(interface.side).ok_or(Reason::UnknownInterface)?,
        macs: ethernet.macs,
        mtu: interface.mtu,
        from_xdp: interface.flags & XDP_TARGET != 0,
    })
}

/// Counts a packet that is not forwarded. The host's own packets are not worth a count each time
/// one leaves; what it was to send translated does not leave otherwise (design, law 3).
#[inline(always)]
fn stop<W: Surroundings, C: Counters>(
    world: &W,
    reason: Reason,
    slot: Option<u32>,
    frame_len: usize,
    counters: &mut C,
) -> Outcome {
    let passes = reason.verdict() != Verdict::Drop;
    let is_lost = W::HOOK == Hook::TcEgress && passes && world.is_marked();
    let reason = if is_lost { Reason::Untranslated } else { reason };
    let drops = is_lost || !passes;
    if drops || W::HOOK != Hook::TcEgress {
        counters.count_reason(reason, frame_len.saturating_sub(ethernet::LEN) as u64);
    }
    if !drops {
        return match reason {
            Reason::Held => Outcome::Hold,
            Reason::LeftTooBig | Reason::LeftTtlExpired if W::HOOK == Hook::TcIngress => Outcome::PassMarked,
            _ => Outcome::Pass,
        };
    }
    if let Some(slot) = slot {
        counters.count_dropped(slot, reason);
    }
    Outcome::Drop
}

/// What a translated packet is counted as, and where it goes.
#[inline(always)]
fn onward_to(hook: Hook, onward: &Onward) -> (Reason, Outcome) {
    match *onward {
        Onward::Hop(hop) => {
            let leaves = hook == Hook::TcEgress;
            let reason = if leaves { Reason::TranslatedAtEgress } else { Reason::Forwarded };
            (reason, Outcome::Redirect { ifindex: hop.ifindex })
        }
        Onward::Neighbour { ifindex, next_hop } => {
            (Reason::Resolving, Outcome::RedirectNeighbour { ifindex, next_hop })
        }
        Onward::Host => (Reason::TranslatedForHost, Outcome::Continue),
        Onward::Egress => (Reason::TranslatedAtEgress, Outcome::Continue),
    }
}

/// Puts what has been decided into the packet. (A function of its own: see [`Core`] about the stack.)
#[inline(never)]
fn write<A, P, W>(packet: &mut P, seen: &Seen<A>, scratch: &Scratch<A>) -> Result<(), OutOfBounds>
where
    A: Family,
    P: Packet,
    W: Surroundings,
{
    let (plan, onward) = scratch.decided();
    let (count_hop, macs) = match onward {
        // What leaves the host has had its hop counted there.
        Onward::Hop(hop) => (W::HOOK != Hook::TcEgress, Some(hop.macs)),
        Onward::Neighbour { .. } => (true, None),
        Onward::Host | Onward::Egress => (false, None),
    };
    let rewrite = Rewrite { to: &plan.to, count_hop, macs };
    let Seen { datagram, quote, .. } = seen;
    match datagram.transport {
        // XDP leaves both of these to TC.
        Transport::IcmpError if W::HOOK != Hook::Xdp => {
            rewrite::icmp_error(packet, datagram, quote, &rewrite)
        }
        Transport::LaterFragment if W::HOOK != Hook::Xdp => {
            rewrite::later_fragment(packet, datagram, &rewrite)
        }
        _ => rewrite::whole(packet, datagram, &rewrite),
    }
}
