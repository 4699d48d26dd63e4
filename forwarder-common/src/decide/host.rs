//! Sessions that the host itself has opened from a port that a rule maps, or that its NAT has: who was there
//! first keeps the port for what it talks to.
//!
//! They show as they leave by an external interface. Of each the tuple is kept that its answers have, which
//! then open no flow.

use super::{Core, Keys};
use crate::{
    family::Family,
    flow::{FlowKey, Side, UNANSWERED},
    parse::{Datagram, Transport},
    reason::Reason,
    rule::DMZ,
    tables::{Counters, Flows, Stage, World},
    tcp as tcp_flags,
    wire::tcp,
};

/// How long a session may be idle, in ns, before its tuple is the rule's (RFC 5382 REQ-5, RFC 4787 REQ-5).
const fn lifetime(protocol: u8) -> u64 {
    const SECOND: u64 = 1_000_000_000;
    if protocol == tcp::NUMBER { 7440 * SECOND } else { 300 * SECOND }
}

impl<A: Family, F: Flows<A>, W: World<A>, C: Counters> Core<'_, A, F, W, C> {
    /// Refuses a packet without a flow that answers to the host. (A function of its own, as the next: see
    /// [`Core::claim`].)
    #[inline(never)]
    pub(super) fn yield_to_host(&mut self, key: &FlowKey<A>) -> Result<(), Reason> {
        let now = self.now;
        match self.flows.host_session(key) {
            Some(last_seen) if now.wrapping_sub(*last_seen) < lifetime(key.protocol) => {
                *last_seen = now;
                Err(Reason::HostSession)
            }
            _ => Ok(()),
        }
    }

    /// Notes that the host talks from a mapped port, unless the tuple is a flow's already.
    #[inline(never)]
    pub(super) fn note_host(&mut self, datagram: &Datagram<A>, keys: &mut Keys<A>) -> Result<(), Reason> {
        let tuple = &datagram.tuple;
        if !matches!(datagram.transport, Transport::Tcp | Transport::Udp) {
            return Err(Reason::NoMatch);
        }
        // A refusal begins no session.
        if datagram.segment.flags & tcp_flags::RST != 0 {
            return Err(Reason::NoMatch);
        }
        let slot = self
            .world
            .rule_for(tuple.src, datagram.protocol, tuple.src_port.number())
            .ok_or(Reason::NoMatch)?;
        let rule = self.world.rule(slot).filter(|rule| rule.is_open(self.now)).ok_or(Reason::NoMatch)?;
        keys.other = FlowKey::new(tuple.reversed(), datagram.protocol, Side::External);
        // A DMZ host leaves alone what sockets take: to note all of that would only drive out what the
        // host's NAT has opened.
        if rule.flags & DMZ != 0 && self.world.has_socket(&keys.other.tuple, datagram.protocol) {
            return Err(Reason::NoMatch);
        }
        if let Some(last_seen) = self.flows.host_session(&keys.other) {
            *last_seen = self.now;
            return Ok(());
        }
        if self.flows.find(Stage::Established, &keys.other).is_some() {
            return Err(Reason::NoMatch);
        }
        if let Some(flow) = self.flows.find(Stage::HalfOpen, &keys.other) {
            if flow.progress != UNANSWERED {
                return Err(Reason::NoMatch);
            }
            // Anybody could have sent that one packet, to have the answers that the host waits for.
            keys.here = flow.other_key(&keys.other);
            self.flows.remove(Stage::HalfOpen, &keys.other);
            self.flows.remove(Stage::HalfOpen, &keys.here);
        }
        self.flows.note_host_session(&keys.other, self.now);
        Ok(())
    }
}
