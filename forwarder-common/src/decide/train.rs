//! Fragments behind the first go its way, whichever of them comes first.

use super::Core;
use crate::{
    family::Family,
    flow::Side,
    fragment::{FragmentKey, HeldKey, LONGEST_HELD, TRAIN_LIFETIME, Train},
    layout::{EXTERNAL, Hook, TARGET},
    parse::{Datagram, Transport},
    reason::Reason,
    tables::{Counters, Flows, World},
    wire::ethernet,
};

impl<A: Family, F: Flows<A>, W: World<A>, C: Counters> Core<'_, A, F, W, C> {
    /// Gives a later fragment, of a frame of this length, the ports of the first one. The error is why it
    /// stays without. (A function of its own, as the next ones: see [`Core::claim`].)
    #[inline(never)]
    pub fn join(&mut self, datagram: &mut Datagram<A>, side: Side, frame_len: usize) -> Result<(), Reason> {
        match self.flows.train(&FragmentKey::new(datagram, side)) {
            Some(train) if self.now < train.expires => {
                if datagram.fragment.offset < u32::from(train.first_end) {
                    return Err(Reason::BadFragment);
                }
                (datagram.tuple.src_port, datagram.tuple.dst_port) = (train.src_port, train.dst_port);
                (datagram.protocol, datagram.fragment.to_host) = (train.protocol, train.to_host != 0);
                Ok(())
            }
            _ if frame_len <= ethernet::LEN + LONGEST_HELD && self.may_hold(datagram, side) => {
                Err(Reason::Held)
            }
            _ => Err(Reason::Fragment),
        }
    }

    /// Notes a first fragment for the later ones.
    #[inline(never)]
    pub fn lead(&mut self, datagram: &Datagram<A>, side: Side, to_host: bool) -> Result<(), Reason> {
        let train = Train {
            expires: self.now.wrapping_add(TRAIN_LIFETIME),
            src_port: datagram.tuple.src_port,
            dst_port: datagram.tuple.dst_port,
            // An IP packet has at most 65535 bytes.
            first_end: datagram.fragment_len() as u16,
            to_host: u8::from(to_host),
            protocol: datagram.protocol,
        };
        self.flows.remember(&FragmentKey::new(datagram, side), &train);
        Ok(())
    }

    /// Looks for the fragment right behind this one, which is not the last. `held` says which that is;
    /// the result, whether it is held.
    ///
    /// A first one is noted before, also if it turns out to be no rule's: its later ones are not to be
    /// held. Before, because whoever holds one looks for the first once more afterwards: so one of the
    /// two finds the other, on whatever CPUs they are.
    #[inline(never)]
    pub fn finds_next(&mut self, datagram: &Datagram<A>, side: Side, held: &mut HeldKey<A>) -> bool {
        let is_first = !datagram.fragment.is_later();
        if is_first && (datagram.transport == Transport::Malformed || !self.may_hold(datagram, side)) {
            return false;
        }
        if is_first {
            let _ = self.lead(datagram, side, false);
        }
        *held = HeldKey::new(datagram, side, datagram.fragment.offset.wrapping_add(datagram.fragment_len()));
        self.flows.is_held(held, self.now)
    }

    /// Whether a fragment is held until the first one of its packet comes: where a rule may be about it.
    /// All fragments to an address of the router come here, but of others the first may go elsewhere.
    #[inline(always)]
    fn may_hold(&self, datagram: &Datagram<A>, side: Side) -> bool {
        let has = |address, role| self.world.roles(address) & role != 0;
        W::HOOK == Hook::TcIngress
            && (has(datagram.tuple.dst, EXTERNAL)
                || side == Side::Internal && has(datagram.tuple.src, TARGET))
    }
}
