//! Lets aya copy these types in and out of maps.

use aya::Pod;

use crate::{
    address::{Address, Ipv6},
    flow::{Flow, FlowKey},
    fragment::{FragmentKey, Held, HeldKey, Train},
    layout::{Count, Interface, RuleCounters, Settings},
    rule::{AllowKey, Page, PageKey, Rule},
    sessions::SessionsKey,
};

// SAFETY: each is `repr(C)`, holds integers and byte arrays only, and has no padding that is not
// a named field (the size assertions beside the types), so any bytes are a value and every byte is
// initialised.
unsafe impl Pod for Settings {}
// SAFETY: as above.
unsafe impl Pod for Interface {}
// SAFETY: as above.
unsafe impl Pod for Count {}
// SAFETY: as above.
unsafe impl Pod for RuleCounters {}
// SAFETY: as above, for the two families that there are.
unsafe impl<A: Address> Pod for FlowKey<A> {}
// SAFETY: as above, for the two families that there are.
unsafe impl<A: Address> Pod for Flow<A> {}
// SAFETY: as above.
unsafe impl Pod for PageKey {}
// SAFETY: as above.
unsafe impl Pod for Page {}
// SAFETY: as above.
unsafe impl Pod for Rule {}
// SAFETY: as above.
unsafe impl Pod for AllowKey {}
// SAFETY: as above.
unsafe impl Pod for SessionsKey {}
// SAFETY: as above, for the two families that there are.
unsafe impl<A: Address> Pod for FragmentKey<A> {}
// SAFETY: as above.
unsafe impl Pod for Train {}
// SAFETY: as above, for the two families that there are.
unsafe impl<A: Address> Pod for HeldKey<A> {}
// SAFETY: as above.
unsafe impl Pod for Held {}
// SAFETY: as above.
unsafe impl Pod for Ipv6 {}
