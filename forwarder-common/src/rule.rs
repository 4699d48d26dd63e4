//! Rules as the packet path sees them.

use crate::address::{Ipv6, Port};

/// Ports that one entry of the port map covers.
pub const PAGE_PORTS: usize = 64;

/// Key of the port map: an external address, a protocol, and 64 neighbouring ports.
///
/// A range of 10,000 ports takes 157 entries, and a look-up costs the same as for a single port.
/// (Aligned as [`crate::fragment::FragmentKey`] is.)
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PageKey {
    /// Of either family: [`crate::address::Address::mapped`].
    pub address: Ipv6,
    /// Port divided by [`PAGE_PORTS`], host byte order.
    page: u16,
    /// IP protocol number.
    pub protocol: u8,
    padding: [u8; 5],
}

impl PageKey {
    /// `port` in host byte order.
    #[inline(always)]
    pub fn new(address: Ipv6, protocol: u8, port: u16) -> Self {
        Self { address, page: port / PAGE_PORTS as u16, protocol, padding: [0; 5] }
    }
}

/// Value of the port map: for each port the rule's slot plus one, or 0.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Page {
    pub slots: [u32; PAGE_PORTS],
}

impl Page {
    pub const EMPTY: Self = Self { slots: [0; PAGE_PORTS] };

    /// `port` in host byte order.
    #[inline(always)]
    pub fn slot(&self, port: u16) -> Option<u32> {
        self.slots[port as usize % PAGE_PORTS].checked_sub(1)
    }
}

/// `Rule::flags`: the slot is in use.
pub const ACTIVE: u16 = 1;
/// `Rule::flags`: all external ports go to the one `target_port`.
pub const ONE_TARGET_PORT: u16 = 2;
/// `Rule::flags`: hosts inside may use it too.
pub const HAIRPIN: u16 = 4;
/// `Rule::flags`: it has a limit.
pub const LIMITED: u16 = 8;
/// `Rule::flags`: it has what nobody else takes (a DMZ host): not what a socket of the host takes.
pub const DMZ: u16 = 16;
/// `Rule::flags`: its packets are translated at the edge, and routed and filtered by the host's stack.
pub const VIA_STACK: u16 = 32;

/// A rule's line, indexed by its slot.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rule {
    /// Monotonic clock in ns; `u64::MAX`: never.
    pub expires: u64,
    pub flags: u16,
    /// Host byte order: the last external port. (A rule that moves to other ports is written before
    /// the port map is.)
    pub external_last: u16,
    pub tcp_epoch: u32,
    pub udp_epoch: u32,
    /// Which list in the allow table; 0: everyone may.
    pub allow_list: u32,
    /// Of either family: [`crate::address::Address::mapped`].
    pub target: Ipv6,
    /// Host byte order: the target's first port, and the external port that it belongs to.
    pub target_port: u16,
    pub external_port: u16,
    /// Established sessions at once, of all sources and of one; new flows a second. 0: no limit.
    /// With any, [`LIMITED`] is set.
    pub max_sessions: u32,
    pub max_sessions_per_source: u32,
    pub new_per_second: u32,
}

impl Rule {
    /// Whether an external port is one of the rule's.
    #[inline(always)]
    pub fn has_port(&self, port: Port) -> bool {
        self.external_port <= port.number() && port.number() <= self.external_last
    }

    /// The target's port for an external one.
    #[inline(always)]
    pub fn target_port(&self, port: Port) -> Port {
        let offset = if self.flags & ONE_TARGET_PORT != 0 {
            0
        } else {
            port.number().wrapping_sub(self.external_port)
        };
        Port::new(self.target_port.wrapping_add(offset))
    }

    #[inline(always)]
    pub fn epoch(&self, protocol: u8) -> u32 {
        if protocol == crate::wire::tcp::NUMBER { self.tcp_epoch } else { self.udp_epoch }
    }

    /// Whether its sessions are counted.
    #[inline(always)]
    pub fn counts_sessions(&self) -> bool {
        self.max_sessions != 0 || self.max_sessions_per_source != 0
    }

    /// Whether a flow made under `epoch` may go on at `now`.
    #[inline(always)]
    pub fn carries(&self, protocol: u8, epoch: u32, now: u64) -> bool {
        self.is_open(now) && self.epoch(protocol) == epoch
    }

    /// See [`VIA_STACK`].
    #[inline(always)]
    pub fn is_via_stack(&self) -> bool {
        self.flags & VIA_STACK != 0
    }

    /// Whether it takes part at all at `now`.
    #[inline(always)]
    pub fn is_open(&self, now: u64) -> bool {
        self.flags & ACTIVE != 0 && now < self.expires
    }
}

/// Key of the allow table, a longest-prefix trie: the list's number comes first, so that each list
/// is a subtree of its own.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AllowKey {
    /// Big-endian: a trie compares bits from the left.
    pub list: [u8; 4],
    /// Of either family: [`crate::address::Address::mapped`].
    pub source: Ipv6,
}

/// What an IPv4 network's prefix is longer by in its mapped form.
pub const MAPPED_BITS: u32 = 96;

/// Bits of [`AllowKey::list`], to be added to a network's prefix length.
pub const ALLOW_LIST_BITS: u32 = 32;

// No padding but the named.
const _: () = assert!(size_of::<PageKey>() == 24);
const _: () = assert!(size_of::<Rule>() == 56);
const _: () = assert!(size_of::<AllowKey>() == 20);
