//! The remaining map values: settings, interfaces, counters.

use crate::reason::Reason;

/// Grows whenever a pinned map changes its shape or meaning, so that no controller misreads one.
pub const LAYOUT_VERSION: u32 = 7;

/// The bit of `skb->mark` that the few packets carry which go through the host's stack, unless another one
/// is configured: far from the bits of wg-quick, Kubernetes, Tailscale and mwan3.
pub const DEFAULT_MARK: u32 = 0x2000_0000;

/// The one entry of the settings map.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// Which store the maps were filled from: flows of another one mean nothing.
    pub store_id: u64,
    pub layout: u32,
    /// Raised with every change of a route, neighbour or link: a hop of another generation is asked anew.
    pub generation: u32,
    /// Process of the controller that wrote this.
    pub controller: u32,
    /// Its network namespace: the inode number in `/proc/PID/ns/net`. Interfaces' indices mean
    /// nothing elsewhere.
    pub namespace: u32,
}

/// `Interface::flags`: frames may come with a checksum that is still to be finished (veth, tap).
pub const UNFINISHED_CHECKSUMS: u8 = 1;
/// `Interface::flags`: a frame that XDP redirects to it arrives.
pub const XDP_TARGET: u8 = 2;

/// Roles of an address: it is the router's own.
pub const OWN: u8 = 1;
/// Roles of an address: a rule is reached at it.
pub const EXTERNAL: u8 = 2;
/// Roles of an address: a rule leads to it.
pub const TARGET: u8 = 4;

/// An interface that programs are attached to, keyed by its index.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interface {
    pub mtu: u32,
    pub mac: [u8; 6],
    /// A [`crate::flow::Side`].
    pub side: u8,
    pub flags: u8,
}

/// Where programs run; counters are kept apart for each.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    Xdp = 0,
    TcIngress = 1,
    TcEgress = 2,
}

impl Hook {
    pub const ALL: [Self; 3] = [Self::Xdp, Self::TcIngress, Self::TcEgress];

    /// The word that commands and metrics show.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Xdp => "xdp",
            Self::TcIngress => "tc-ingress",
            Self::TcEgress => "tc-egress",
        }
    }
}

/// Packets and bytes; bytes are those of the IP packets.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    pub packets: u64,
    pub bytes: u64,
}

impl Count {
    #[inline(always)]
    pub fn add(&mut self, bytes: u64) {
        self.packets += 1;
        self.bytes += bytes;
    }
}

/// Entries of the per-CPU reason counters.
pub const REASON_COUNTERS: usize = Hook::ALL.len() * Reason::COUNT;

/// Index into the reason counters.
#[inline(always)]
pub fn reason_index(hook: Hook, reason: Reason) -> u32 {
    (hook as usize * Reason::COUNT + reason as usize) as u32
}

/// Per-CPU counters of a rule, indexed by its slot.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RuleCounters {
    pub inward: Count,
    pub outward: Count,
    /// Flows that became established.
    pub sessions: u64,
    /// Indexed by reason less [`Reason::FIRST_DROP`].
    pub dropped: [u64; Reason::DROP_COUNT],
}

impl RuleCounters {
    pub const ZERO: Self = Self {
        inward: Count { packets: 0, bytes: 0 },
        outward: Count { packets: 0, bytes: 0 },
        sessions: 0,
        dropped: [0; Reason::DROP_COUNT],
    };
}

const _: () = assert!(size_of::<Settings>() == 24 && size_of::<Interface>() == 12);
