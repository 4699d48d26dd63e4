//! Tells the packet path what addresses are to this router.

use std::collections::{HashMap, HashSet};

use anyhow::{Context as _, Result};
use aya::{
    Ebpf,
    maps::{self, MapData},
};
use forwarder_common::{
    address::Ipv6,
    layout::{EXTERNAL, OWN, TARGET},
};

use super::{rules::mapped_address, take};
use crate::{datapath::KernelRule, network::Network};

/// The map of roles, and what is in it.
pub struct Roles {
    map: maps::HashMap<MapData, Ipv6, u8>,
    written: HashMap<Ipv6, u8>,
}

impl Roles {
    /// Takes the map over, with what an earlier controller left in it.
    pub fn open(ebpf: &mut Ebpf) -> Result<Self> {
        let map: maps::HashMap<_, _, _> = take(ebpf, "ROLES")?;
        let written = map.iter().collect::<Result<_, _>>().context("cannot read the addresses' roles")?;
        Ok(Self { map, written })
    }

    /// The router's own addresses are those of the network.
    pub fn follow_network(&mut self, network: &Network) -> Result<()> {
        let addresses = network.interfaces.iter().flat_map(|interface| &interface.addresses);
        let own: HashSet<Ipv6> = addresses.copied().map(mapped_address).collect();
        self.replace(OWN, own.into_iter().map(|address| (address, OWN)))
    }

    /// Rules are reached at, and lead to, what these say.
    pub fn follow_rules(&mut self, rules: &[KernelRule]) -> Result<()> {
        let externals = rules.iter().flat_map(|rule| &rule.externals).copied().map(mapped_address);
        let targets = rules.iter().map(|rule| mapped_address(rule.target));
        let roles = externals.map(|address| (address, EXTERNAL));
        self.replace(EXTERNAL | TARGET, roles.chain(targets.map(|address| (address, TARGET))))
    }

    /// Gives these bits to these addresses and to no others; the other bits stay.
    fn replace(&mut self, bits: u8, roles: impl Iterator<Item = (Ipv6, u8)>) -> Result<()> {
        let mut wanted: HashMap<Ipv6, u8> =
            self.written.iter().map(|(address, roles)| (*address, roles & !bits)).collect();
        for (address, role) in roles {
            *wanted.entry(address).or_default() |= role;
        }
        for (address, roles) in wanted {
            if self.written.get(&address) == Some(&roles) {
                continue;
            }
            if roles == 0 {
                self.map.remove(&address).context("cannot write the addresses' roles")?;
                self.written.remove(&address);
            } else {
                self.map
                    .insert(address, roles, 0)
                    .context("cannot write the addresses' roles; is the map full?")?;
                self.written.insert(address, roles);
            }
        }
        Ok(())
    }
}
