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
    /// Rewritten: let the host's stack route and filter it, as any other packet that comes in so.
    Admit,
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
    core.scratch.forget();
    match carry(packet, seen, &mut core) {
        Ok(Carried::Released) => Outcome::Release,
        Ok(Carried::Sent(reason)) => {
            let (plan, onward) = core.scratch.decided();
            let (slot, direction) = (plan.slot, plan.direction);
            let bytes = u64::from(seen.datagram.ip_len);
            core.counters.count_reason(reason, bytes);
            core.counters.count_forwarded(slot, direction, bytes);
            onward_to(onward)
        }
        Err(reason) => stop(reason, packet.len(), &mut core),
    }
}

/// How far a frame was taken.
enum Carried {
    /// Translated: it is sent on, and counted as this.
    Sent(Reason),
    /// It comes in again, and behind it the fragment that was held until it came.
    Released,
}

/// Takes a frame as far as it goes; the error is why it is not sent on.
#[inline(always)]
fn carry<A, P, F, W, C>(
    packet: &mut P,
    seen: &mut Seen<A>,
    core: &mut Core<'_, A, F, W, C>,
) -> Result<Carried, Reason>
where
    A: Family,
    P: Packet,
    F: Flows<A>,
    W: World<A>,
    C: Counters,
{
    read(packet, core.world, seen)?;
    let Seen { datagram, arrival, quote, keys, held } = seen;
    let side = if W::HOOK == Hook::TcEgress { Side::Internal } else { arrival.side };
    // XDP leaves both of these to TC.
    let is_later = W::HOOK != Hook::Xdp && datagram.transport == Transport::LaterFragment;
    let is_error = W::HOOK != Hook::Xdp && datagram.transport == Transport::IcmpError;
    let joined = if is_later { core.join(datagram, side, packet.len()) } else { Ok(()) };
    if joined == Err(Reason::Held) {
        *held = HeldKey::new(datagram, side, datagram.fragment.offset);
    } else if W::HOOK == Hook::TcIngress && datagram.fragment.more && core.finds_next(datagram, side, held) {
        return Ok(Carried::Released);
    }
    joined?;
    let decided = match W::HOOK {
        _ if is_error => {
            icmp::quote(packet, datagram, quote)?;
            core.error(datagram, quote, arrival, keys)
        }
        Hook::TcEgress => core.egress(datagram, keys),
        _ => core.ingress(datagram, arrival, keys),
    };
    if W::HOOK == Hook::TcIngress && decided == Err(Reason::LeftTooBig) && datagram.leads() {
        let _ = core.lead(datagram, side, true);
    }
    decided?;
    if is_error && W::HOOK != Hook::TcEgress && !icmp::is_whole(packet, datagram) {
        return Err(Reason::BadIcmpChecksum);
    }
    write::<A, P, W>(packet, seen, core.scratch).map_err(|_| Reason::Unwritable)?;
    let (_, onward) = core.scratch.decided();
    let reason = counted_as(W::HOOK, onward);
    if W::HOOK != Hook::Xdp && seen.datagram.leads() {
        let _ = core.lead(&seen.datagram, side, reason == Reason::TranslatedForHost);
    }
    Ok(Carried::Sent(reason))
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
fn stop<A, F, W, C>(reason: Reason, frame_len: usize, core: &mut Core<'_, A, F, W, C>) -> Outcome
where
    A: Family,
    F: Flows<A>,
    W: World<A>,
    C: Counters,
{
    let passes = reason.verdict() != Verdict::Drop;
    let is_lost = W::HOOK == Hook::TcEgress && passes && core.world.is_marked();
    let reason = if is_lost { Reason::Untranslated } else { reason };
    let drops = is_lost || !passes;
    if drops || W::HOOK != Hook::TcEgress {
        core.counters.count_reason(reason, frame_len.saturating_sub(ethernet::LEN) as u64);
    }
    if !drops {
        return match reason {
            Reason::Held => Outcome::Hold,
            Reason::LeftTooBig | Reason::LeftTtlExpired if W::HOOK == Hook::TcIngress => Outcome::PassMarked,
            _ => Outcome::Pass,
        };
    }
    if let Some(slot) = core.scratch.slot() {
        core.counters.count_dropped(slot, reason);
    }
    Outcome::Drop
}

/// What a translated packet is counted as.
#[inline(always)]
fn counted_as(hook: Hook, onward: &Onward) -> Reason {
    match onward {
        Onward::Hop(_) if hook != Hook::TcEgress => Reason::Forwarded,
        Onward::Neighbour { .. } => Reason::Resolving,
        Onward::Host | Onward::Stack => Reason::TranslatedForHost,
        Onward::Hop(_) | Onward::Egress => Reason::TranslatedAtEgress,
    }
}

/// Where a translated packet goes.
#[inline(always)]
fn onward_to(onward: &Onward) -> Outcome {
    match *onward {
        Onward::Hop(hop) => Outcome::Redirect { ifindex: hop.ifindex },
        Onward::Neighbour { ifindex, next_hop } => Outcome::RedirectNeighbour { ifindex, next_hop },
        Onward::Stack => Outcome::Admit,
        Onward::Host | Onward::Egress => Outcome::Continue,
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
        Onward::Host | Onward::Stack | Onward::Egress => (false, None),
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
