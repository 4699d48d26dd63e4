//! What is to become of an ICMP error.

use super::{
    Arrival, Core, Decision, Onward, WHERE_TO_LOOK, find_way, fit, hop_is_fresh, is_live, is_spoofed,
    no_match, stop,
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
        let side = if W::HOOK == Hook::TcEgress { Side::Internal } else { arrival.side };
        // An error goes to whom the quoted packet came from.
        if datagram.tuple.dst != quote.tuple.src {
            return no_match();
        }
        let key = FlowKey::new(quote.tuple.reversed(), quote.protocol, side);
        for stage in WHERE_TO_LOOK {
            let Some(flow) = self.flows.find(stage, &key) else { continue };
            let slot = flow.rule;
            if !is_live(flow, quote.protocol, self.world, self.now) {
                return stop(Reason::Cut, slot);
            }
            let direction = flow.direction;
            let way = flow.to;
            quote.to = way.reversed();
            let src = if direction == INWARD { datagram.tuple.src } else { way.src };
            let to = Tuple { src, dst: way.dst, src_port: Port::new(0), dst_port: Port::new(0) };
            if W::HOOK == Hook::TcEgress {
                return Decision::Translate { to, onward: Onward::Egress, slot, direction };
            }
            if side == Side::External && is_spoofed(datagram, self.world) {
                return stop(Reason::Spoofed, slot);
            }
            let onward = if hop_is_fresh(flow, side, self.world, self.now) {
                Ok(Onward::Hop(flow.hop))
            } else {
                let found = &mut self.scratch.way;
                find_way(&to, datagram, side, self.world, found).map(|()| found.onward)
            };
            return match onward.and_then(|onward| fit(onward, datagram, direction, self.world)) {
                Ok(onward) => Decision::Translate { to, onward, slot, direction },
                Err(reason) => stop(reason, slot),
            };
        }
        no_match()
    }
}
