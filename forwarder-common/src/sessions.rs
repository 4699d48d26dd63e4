//! What the limits of rules are counted by.

use crate::{
    address::{Address, Ipv6},
    tables::Refused,
};

/// Whose sessions a count is of.
///
/// Counts belong to an epoch of a rule: what is cut with one write leaves the rule with nothing to
/// count, and a slot that is used again begins at 0. (Aligned as [`crate::fragment::FragmentKey`] is.)
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SessionsKey {
    /// What [`Address::site`] gives; of all sessions, the unspecified address.
    pub source: Ipv6,
    pub epoch: u32,
    padding: u32,
}

impl SessionsKey {
    #[inline(always)]
    pub fn new(epoch: u32, source: Ipv6) -> Self {
        Self { source, epoch, padding: 0 }
    }

    /// All sessions of an epoch.
    #[inline(always)]
    pub fn all(epoch: u32) -> Self {
        Self::new(epoch, Ipv6::UNSPECIFIED)
    }

    /// Those whose client is where `client` is.
    #[inline(always)]
    pub fn of<A: Address>(epoch: u32, client: A) -> Self {
        Self::new(epoch, client.site())
    }
}

/// Counts that limits are compared with. Each operation is one step for all CPUs.
///
/// A count is of established sessions that are not over, since its rule has had a limit, and a
/// correction by the controller, which knows of the others.
pub trait Sessions {
    /// Below 0 only where a correction is still to come.
    fn sessions(&mut self, key: &SessionsKey) -> i64;
    fn count_sessions(&mut self, key: &SessionsKey, by: i64) -> Result<(), Refused>;
    /// When the new flows that a rule has taken so far are spread evenly, the moment of the next one
    /// (ns of the clock that the core goes by).
    fn due(&mut self, slot: u32) -> u64;
    fn set_due(&mut self, slot: u32, due: u64);
    /// Adds to it, wrapping.
    fn postpone(&mut self, slot: u32, by: u64);
}

// No padding but the named.
const _: () = assert!(size_of::<SessionsKey>() == 24);
