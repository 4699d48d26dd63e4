//! The machine's interfaces and addresses, read and followed through netlink.

mod netlink;
mod xdp_features;

use std::net::IpAddr;

use crate::rule::Family;

pub use netlink::{find_egress, snapshot, watch};

/// A snapshot of what the machine has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Network {
    pub interfaces: Vec<Interface>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    pub index: u32,
    pub name: String,
    /// Absent where there is no Ethernet header.
    pub mac: Option<[u8; 6]>,
    /// Packets begin with their IP header (TUN, WireGuard, PPP).
    pub is_bare: bool,
    pub mtu: u32,
    /// `veth`, `bridge`, …; absent for hardware.
    pub kind: Option<String>,
    /// Those that are in use: not those that it is still finding out about whether somebody else has
    /// them (RFC 4862).
    pub addresses: Vec<IpAddr>,
    /// Of these, those that it changes by itself, so as not to be recognised (RFC 8981).
    pub temporary: Vec<IpAddr>,
    /// Whether a frame that XDP redirects to it is sent; absent where the kernel does not say (before 6.3).
    pub sends_for_xdp: Option<bool>,
}

/// How packets to an address leave this machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Egress {
    /// By the interface with this index.
    Interface(u32),
    /// No route leads there.
    NoRoute,
    /// It is a broadcast, multicast or anycast address.
    NoHost,
}

impl Interface {
    /// The addresses of a family at which others may be told to reach it.
    pub fn lasting(&self, family: Family) -> impl Iterator<Item = IpAddr> {
        let lasts = move |address: &IpAddr| match address {
            IpAddr::V4(_) => true,
            IpAddr::V6(v6) => !v6.is_unicast_link_local() && !self.temporary.contains(address),
        };
        self.addresses.iter().copied().filter(move |address| family.has(*address)).filter(lasts)
    }
}

impl Network {
    pub fn interface(&self, name: &str) -> Option<&Interface> {
        self.interfaces.iter().find(|interface| interface.name == name)
    }

    /// Whether any interface has this address.
    pub fn owns(&self, address: IpAddr) -> bool {
        self.interfaces.iter().any(|interface| interface.addresses.contains(&address))
    }
}
