//! Lets aya copy these types in and out of maps.

use aya::Pod;

use crate::{
    address::Ipv4,
    flow::{Flow, FlowKey},
    fragment::{FragmentKey, Train},
    layout::{Count, Interface, RuleCounters, Settings},
    rule::{AllowKey, Page, PageKey, Rule},
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
// SAFETY: as above.
unsafe impl Pod for FlowKey<Ipv4> {}
// SAFETY: as above.
unsafe impl Pod for Flow<Ipv4> {}
// SAFETY: as above.
unsafe impl Pod for PageKey<Ipv4> {}
// SAFETY: as above.
unsafe impl Pod for Page {}
// SAFETY: as above.
unsafe impl Pod for Rule<Ipv4> {}
// SAFETY: as above.
unsafe impl Pod for AllowKey<Ipv4> {}
// SAFETY: as above.
unsafe impl Pod for FragmentKey<Ipv4> {}
// SAFETY: as above.
unsafe impl Pod for Train {}
// SAFETY: as above.
unsafe impl Pod for Ipv4 {}
