//! What is to become of an ICMP error.

use super::{
    Arrival, Core, Keys, Onward, Plan, Scratch, WHERE_TO_LOOK, find_way, fit, hop_is_usable, is_impossible,
    is_live, may_enter,
};
use crate::{
    address::Port,
    family::Family,
    flow::{FlowKey, INWARD, Side, Tuple},
    icmp::Quote,
    layout::Hook,
    parse::Datagram,
    reason::Reason,
    rule::Rule,
    tables::{Counters, Flows, World},
};

impl<A: Family, F: Flows<A>, W: World<A>, C: Counters> Core<'_, A, F, W, C> {
    /// Decides about an error, at ingress or egress of TC, and says in the quote what the quoted
    /// packet is to become.
    ///
    /// It goes the way of the flow's packets against which it was sent; the flow itself stays as it
    /// is (RFC 5508 REQ-6). Towards the outside the router answers for all that is behind it.
    #[inline(never)]
    pub fn error(
        &mut self,
        datagram: &Datagram<A>,
        quote: &mut Quote<A>,
        arrival: &Arrival,
        keys: &mut Keys<A>,
    ) -> Result<(), Reason> {
        let related = self.relate(datagram, quote, arrival, keys);
        if related != Err(Reason::NoMatch) {
            let Scratch { inward: error, plan, .. } = &mut *self.scratch;
            *plan = Plan { to: error.to, slot: error.rule, direction: error.direction };
        }
        related?;
        if W::HOOK != Hook::TcEgress && arrival.side == Side::External {
            if is_impossible(datagram, self.world) {
                return Err(Reason::Spoofed);
            }
            self.check_source(datagram, arrival)?;
        }
        let Scratch { inward: error, way, .. } = &mut *self.scratch;
        if W::HOOK == Hook::TcEgress {
            // By the uplink of the request, as its packets.
            way.onward = match way.hop {
                Some(hop) if hop.ifindex != self.world.ifindex() => Onward::Hop(hop),
                _ => Onward::Egress,
            };
        } else if self.world.rule(error.rule).is_some_and(Rule::is_via_stack) {
            may_enter::<W>(error.direction)?;
            way.onward = Onward::Stack;
        } else if let Some(hop) = way.hop {
            way.onward = Onward::Hop(hop);
        } else {
            find_way(&error.to, datagram, error.egress_side(), self.world, way)?;
        }
        fit(&mut way.onward, datagram, error, self.world)
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
        keys: &mut Keys<A>,
    ) -> Result<(), Reason> {
        // An error goes to whom the quoted packet came from.
        if datagram.tuple.dst != quote.tuple.src {
            return Err(Reason::NoMatch);
        }
        let side = if W::HOOK == Hook::TcEgress { Side::Internal } else { arrival.side };
        keys.here = FlowKey::new(quote.tuple.reversed(), quote.protocol, side);
        for stage in WHERE_TO_LOOK {
            let Some(flow) = self.flows.find(stage, &keys.here) else { continue };
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
