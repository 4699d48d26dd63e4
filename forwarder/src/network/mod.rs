//! The machine's interfaces and addresses, read and followed through netlink.

mod netlink;
mod xdp_features;

use std::net::IpAddr;

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
    /// Absent where there is no Ethernet header (TUN, PPP).
    pub mac: Option<[u8; 6]>,
    pub mtu: u32,
    /// `veth`, `bridge`, …; absent for hardware.
    pub kind: Option<String>,
    pub addresses: Vec<IpAddr>,
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

impl Network {
    pub fn interface(&self, name: &str) -> Option<&Interface> {
        self.interfaces.iter().find(|interface| interface.name == name)
    }

    /// Whether any interface has this address.
    pub fn owns(&self, address: IpAddr) -> bool {
        self.interfaces.iter().any(|interface| interface.addresses.contains(&address))
    }
}
