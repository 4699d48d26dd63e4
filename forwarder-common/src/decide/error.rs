//! What is to become of an ICMP error.

use super::{
    Arrival, Core, Decision, Onward, Scratch, WHERE_TO_LOOK, find_way, fit, hop_is_usable, is_impossible,
    is_live, no_match, stop,
};
use crate::{
    address::{Address, Port},
    flow::{FlowKey, INWARD, Side, Tuple},
    icmp::Quote,
    layout::Hook,
    parse::Datagram,
    reason::Reason,
    tables::{Counters, Flows, World},
};

impl<A: Address, F: Flows<A>, W: World<A>, C: Counters> Core<'_, A, F, W, C> {
    /// Decides about an error, at ingress or egress of TC, and says in the quote what the quoted
    /// packet is to become.
    ///
    /// It goes the way of the flow's packets against which it was sent; the flow itself stays as it
    /// is (RFC 5508 REQ-6). Towards the outside the router answers for all that is behind it.
    #[inline(always)]
    pub fn error(&mut self, datagram: &Datagram<A>, quote: &mut Quote<A>, arrival: &Arrival) -> Decision<A> {
        let mut related = self.relate(datagram, quote, arrival);
        if related.is_ok() && W::HOOK != Hook::TcEgress && arrival.side == Side::External {
            related = match is_impossible(datagram, self.world) {
                true => Err(Reason::Spoofed),
                false => self.check_source(datagram, arrival),
            };
        }
        let Scratch { inward: error, way, .. } = &mut *self.scratch;
        if let Err(reason) = related {
            return if reason == Reason::NoMatch { no_match() } else { stop(reason, error.rule) };
        }
        if W::HOOK == Hook::TcEgress {
            // By the uplink of the request, as its packets.
            way.onward = match way.hop {
                Some(hop) if hop.ifindex != self.world.ifindex() => Onward::Hop(hop),
                _ => Onward::Egress,
            };
        } else if let Some(hop) = way.hop {
            way.onward = Onward::Hop(hop);
        } else if let Err(reason) = find_way(&error.to, datagram, error.egress_side(), self.world, way) {
            return stop(reason, error.rule);
        }
        if let Err(reason) = fit(&mut way.onward, datagram, error, self.world) {
            return stop(reason, error.rule);
        }
        Decision::Translate { to: error.to, onward: way.onward, slot: error.rule, direction: error.direction }
    }

    /// Finds the flow of the quoted packet. The error's rewrite, rule and direction are then in the
    /// scratch's inward entry, the flow's hop in its way if it is fresh; with an error other than
    /// [`Reason::NoMatch`] the rule is there. (A function of its own: see [`Core::claim`].)
    #[inline(never)]
    fn relate(
        &mut self,
        datagram: &Datagram<A>,
        quote: &mut Quote<A>,
        arrival: &Arrival,
    ) -> Result<(), Reason> {
        // An error goes to whom the quoted packet came from.
        if datagram.tuple.dst != quote.tuple.src {
            return Err(Reason::NoMatch);
        }
        let side = if W::HOOK == Hook::TcEgress { Side::Internal } else { arrival.side };
        let key = FlowKey::new(quote.tuple.reversed(), quote.protocol, side);
        for stage in WHERE_TO_LOOK {
            let Some(flow) = self.flows.find(stage, &key) else { continue };
            let Scratch { inward: error, way, .. } = &mut *self.scratch;
            (error.rule, error.direction, error.flags) = (flow.rule, flow.direction, flow.flags);
            if !is_live(flow, quote.protocol, self.world, self.now) {
                return Err(Reason::Cut);
            }
            quote.to = flow.to.reversed();
            let src = if flow.direction == INWARD { datagram.tuple.src } else { flow.to.src };
            error.to = Tuple { src, dst: flow.to.dst, src_port: Port::new(0), dst_port: Port::new(0) };
            way.hop = hop_is_usable(flow, self.world, self.now).then_some(flow.hop);
            return Ok(());
        }
        Err(Reason::NoMatch)
    }
}
