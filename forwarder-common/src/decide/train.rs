//! Fragments behind the first go its way.

use super::Core;
use crate::{
    family::Family,
    flow::Side,
    fragment::{FragmentKey, TRAIN_LIFETIME, Train},
    parse::Datagram,
    reason::Reason,
    tables::{Counters, Flows, World},
};

impl<A: Family, F: Flows<A>, W: World<A>, C: Counters> Core<'_, A, F, W, C> {
    /// Gives a later fragment the ports of the first one. The error is why it stays without.
    /// (A function of its own, as the next: see [`Core::claim`].)
    #[inline(never)]
    pub fn join(&mut self, datagram: &mut Datagram<A>, side: Side) -> Result<(), Reason> {
        match self.flows.train(&FragmentKey::new(datagram, side)) {
            Some(train) if self.now < train.expires => {
                if datagram.fragment.offset < u32::from(train.first_end) {
                    return Err(Reason::BadFragment);
                }
                (datagram.tuple.src_port, datagram.tuple.dst_port) = (train.src_port, train.dst_port);
                (datagram.protocol, datagram.fragment.to_host) = (train.protocol, train.to_host != 0);
                Ok(())
            }
            _ => Err(Reason::Fragment),
        }
    }

    /// Notes a first fragment that is translated, for the later ones.
    #[inline(never)]
    pub fn lead(&mut self, datagram: &Datagram<A>, side: Side, to_host: bool) -> Result<(), Reason> {
        let train = Train {
            expires: self.now.wrapping_add(TRAIN_LIFETIME),
            src_port: datagram.tuple.src_port,
            dst_port: datagram.tuple.dst_port,
            // An IP packet has at most 65535 bytes.
            first_end: datagram.ip_len.wrapping_sub(datagram.fragment.headers) as u16,
            to_host: u8::from(to_host),
            protocol: datagram.protocol,
        };
        self.flows.remember(&FragmentKey::new(datagram, side), &train);
        Ok(())
    }
}
