//! The way of a packet, from its bytes to its verdict.

use crate::{
    address::Ipv4,
    decide::{Arrival, Core, Decision, Onward},
    flow::Side,
    icmp::{self, Quote},
    layout::{Hook, Interface, UNFINISHED_CHECKSUMS, XDP_TARGET},
    packet::Packet,
    parse::{self, Datagram, Ethernet, Transport},
    reason::{Reason, Verdict},
    rewrite::{self, Rewrite},
    tables::{Counters, Flows, World},
    wire::ethernet,
};

/// What a program is to do with its packet now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The packet is as it came.
    Pass,
    Drop,
    /// Rewritten: send it by this interface as it is.
    Redirect {
        ifindex: u32,
    },
    /// Rewritten: send it by this interface, the kernel resolving the neighbour.
    RedirectNeighbour {
        ifindex: u32,
        next_hop: Ipv4,
    },
    /// Rewritten: let it go on its way through the host's stack.
    Continue,
}

/// What the headers say: kept outside of a BPF program's 512 bytes of stack.
///
/// Zeroes are a value of it.
#[derive(Clone, Copy, Debug)]
pub struct Seen {
    datagram: Datagram<Ipv4>,
    arrival: Arrival,
    /// Of an ICMP error.
    quote: Quote<Ipv4>,
}

impl Seen {
    pub const NOTHING: Self =
        Self { datagram: Datagram::NOTHING, arrival: Arrival::NOWHERE, quote: Quote::NOTHING };
}

/// Takes a frame through the core. `seen` is written before it is read.
#[inline(always)]
pub fn process<P, F, W, C>(packet: &mut P, seen: &mut Seen, mut core: Core<'_, Ipv4, F, W, C>) -> Outcome
where
    P: Packet,
    F: Flows<Ipv4>,
    W: World<Ipv4>,
    C: Counters,
{
    if let Err(reason) = read(packet, core.world, seen) {
        return stop(W::HOOK, reason, None, packet.len(), core.counters);
    }
    let Seen { datagram, arrival, quote } = seen;
    let side = if W::HOOK == Hook::TcEgress { Side::Internal } else { arrival.side };
    // XDP leaves both of these to TC.
    let is_later = W::HOOK != Hook::Xdp && datagram.transport == Transport::LaterFragment;
    let is_error = W::HOOK != Hook::Xdp && datagram.transport == Transport::IcmpError;
    let known = if is_later {
        core.join(datagram, side)
    } else if is_error {
        icmp::quote(packet, datagram, quote)
    } else {
        Ok(())
    };
    if let Err(reason) = known {
        return stop(W::HOOK, reason, None, packet.len(), core.counters);
    }
    let decision = match W::HOOK {
        _ if is_error => core.error(datagram, quote, arrival),
        Hook::TcEgress => core.egress(datagram),
        _ => core.ingress(datagram, arrival),
    };
    match decision {
        Decision::Stop { reason, slot } => stop(W::HOOK, reason, slot, packet.len(), core.counters),
        Decision::Translate { to, onward, slot, direction } => {
            if is_error && W::HOOK != Hook::TcEgress && !icmp::is_whole(packet, datagram) {
                let reason = Reason::BadIcmpChecksum;
                return stop(W::HOOK, reason, Some(slot), packet.len(), core.counters);
            }
            let (rewrite, reason, outcome) = translation(W::HOOK, to, onward);
            let written = if is_error {
                rewrite::icmp_error(packet, datagram, quote, &rewrite)
            } else if is_later {
                rewrite::later_fragment(packet, datagram, &rewrite)
            } else {
                rewrite::ipv4(packet, datagram, &rewrite)
            };
            if written.is_err() {
                return stop(W::HOOK, Reason::Unwritable, Some(slot), packet.len(), core.counters);
            }
            if W::HOOK != Hook::Xdp && datagram.fragment.more && !is_later {
                let _ = core.lead(datagram, side, reason == Reason::TranslatedForHost);
            }
            let bytes = u64::from(datagram.ip_len);
            core.counters.count_reason(reason, bytes);
            core.counters.count_forwarded(slot, direction, bytes);
            outcome
        }
    }
}

/// Reads the headers, if the packet is one that this place can have a say in.
///
/// A function of its own in the BPF program, so that what it needs on the stack is free again
/// when the decision is made (and a scalar's: the BPF back end's reasons are at `Core::claim`).
#[inline(never)]
fn read<P, W>(packet: &P, world: &W, seen: &mut Seen) -> Result<(), Reason>
where
    P: Packet,
    W: World<Ipv4>,
{
    let interface = world.interface(world.ifindex()).ok_or(Reason::UnknownInterface)?;
    let header = parse::ethernet(packet).map_err(|_| Reason::ShortFrame)?;
    match header.ether_type {
        ethernet::TYPE_IPV4 => {}
        ethernet::TYPE_VLAN | ethernet::TYPE_QINQ => return Err(tagged(packet, header.ether_type, W::HOOK)),
        _ => return Err(Reason::NotIpv4),
    }
    // At egress it is the next hop's.
    if W::HOOK != Hook::TcEgress && header.macs.dst() != interface.mac {
        return Err(Reason::OtherStation);
    }
    let datagram = parse::ipv4(packet, W::HOOK == Hook::Xdp)?;
    if W::HOOK == Hook::Xdp && is_unfinished(&datagram, interface) {
        return Err(Reason::LeftUnfinishedChecksum);
    }
    (seen.datagram, seen.arrival) = (datagram, arrival(&header, interface)?);
    // Too rare to be worth a place in XDP.
    if W::HOOK == Hook::Xdp && datagram.transport == Transport::IcmpError {
        return Err(Reason::LeftToTc);
    }
    Ok(())
}

/// An incremental update would ruin a checksum that an offload has still to finish.
#[inline(always)]
fn is_unfinished(datagram: &Datagram<Ipv4>, interface: &Interface) -> bool {
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
/// one leaves.
#[inline(always)]
fn stop<C: Counters>(
    hook: Hook,
    reason: Reason,
    slot: Option<u32>,
    frame_len: usize,
    counters: &mut C,
) -> Outcome {
    let drops = reason.verdict() == Verdict::Drop;
    if drops || hook != Hook::TcEgress {
        counters.count_reason(reason, frame_len.saturating_sub(ethernet::LEN) as u64);
    }
    if !drops {
        return Outcome::Pass;
    }
    if let Some(slot) = slot {
        counters.count_dropped(slot, reason);
    }
    Outcome::Drop
}

#[inline(always)]
fn translation(
    hook: Hook,
    to: crate::flow::Tuple<Ipv4>,
    onward: Onward<Ipv4>,
) -> (Rewrite<Ipv4>, Reason, Outcome) {
    let (count_hop, macs, reason, outcome) = match onward {
        Onward::Hop(hop) => {
            let leaves = hook == Hook::TcEgress;
            let reason = if leaves { Reason::TranslatedAtEgress } else { Reason::Forwarded };
            (!leaves, Some(hop.macs), reason, Outcome::Redirect { ifindex: hop.ifindex })
        }
        Onward::Neighbour { ifindex, next_hop } => {
            (true, None, Reason::Resolving, Outcome::RedirectNeighbour { ifindex, next_hop })
        }
        Onward::Host => (false, None, Reason::TranslatedForHost, Outcome::Continue),
        Onward::Egress => (false, None, Reason::TranslatedAtEgress, Outcome::Continue),
    };
    (Rewrite { to, count_hop, macs }, reason, outcome)
}
