//! From rules and the machine's addresses to where each rule is reached.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;

use super::{Rules, Settings, conflict};
use crate::network::Network;
use crate::rule::{Family, Place, PortRange, Protocol, Rule, RuleId};

/// Where one rule is reached at present.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Resolution {
    pub externals: Vec<IpAddr>,
    /// Why `externals` is empty, where the rule itself does not want it so.
    pub waiting: Option<String>,
}

/// Resolves all rules at once, since an address rule keeps an interface rule from its address.
pub fn resolve(rules: &Rules, settings: &Settings, network: &Network) -> BTreeMap<RuleId, Resolution> {
    let (mut claims, mut dmz_claims) = (Claims::default(), Claims::default());
    let (by_address, by_interface): (Vec<&Rule>, Vec<&Rule>) =
        rules.values().partition(|rule| matches!(rule.spec.external.place, Place::Address(_)));
    // Address rules first: where DHCP brings an address that one of them has, it keeps it.
    by_address
        .into_iter()
        .chain(by_interface)
        .map(|rule| match misplaced(rule, settings) {
            Some(reason) => (rule.id, Resolution { externals: Vec::new(), waiting: Some(reason) }),
            // A DMZ host has what others leave; no two have it.
            None if rule.spec.dmz => (rule.id, resolve_one(rule, rules, network, &mut dmz_claims)),
            None => (rule.id, resolve_one(rule, rules, network, &mut claims)),
        })
        .collect()
}

/// Why a rule's interface brings it nothing: its packets are not looked at there.
fn misplaced(rule: &Rule, settings: &Settings) -> Option<String> {
    match &rule.spec.external.place {
        Place::Interface(name) if !settings.external.contains(name) => {
            let external = settings.external.join(", ");
            Some(format!("interface {name} is not an external one: the external interfaces are {external}"))
        }
        _ => None,
    }
}

fn resolve_one(rule: &Rule, rules: &Rules, network: &Network, claims: &mut Claims) -> Resolution {
    if rule.draining || !rule.spec.enabled {
        return Resolution::default();
    }
    let mut resolution = Resolution::default();
    let candidates = addresses(rule, network);
    for &address in &candidates {
        match claims.take(address, rule) {
            Ok(()) => resolution.externals.push(address),
            Err(owner) => {
                let owner = rules.get(&owner).map(|owner| owner.label().to_string()).unwrap_or_default();
                resolution.waiting = Some(format!("{owner} has these ports of {address}"));
            }
        }
    }
    if !resolution.externals.is_empty() {
        resolution.waiting = None;
    } else if candidates.is_empty()
        && let Place::Interface(name) = &rule.spec.external.place
    {
        resolution.waiting = Some(match network.interface(name) {
            Some(_) if rule.spec.family() == Family::Ipv4 => format!("interface {name} has no IPv4 address"),
            Some(_) => format!("interface {name} has no lasting global IPv6 address"),
            None => format!("interface {name} does not exist"),
        });
    }
    resolution
}

/// The addresses at which a rule can be reached.
pub fn addresses(rule: &Rule, network: &Network) -> Vec<IpAddr> {
    let mut addresses = conflict::external_addresses(&rule.spec, network);
    addresses.retain(|address| *address != rule.spec.target.address);
    addresses.sort();
    addresses.dedup();
    addresses
}

/// Which ports of which address are taken: per protocol, from a range's first port to its last and its owner.
#[derive(Default)]
struct Claims {
    tcp: HashMap<IpAddr, BTreeMap<u16, (u16, RuleId)>>,
    udp: HashMap<IpAddr, BTreeMap<u16, (u16, RuleId)>>,
}

impl Claims {
    /// Takes a rule's ports of `address`, or names the rule that has one of them.
    fn take(&mut self, address: IpAddr, rule: &Rule) -> Result<(), RuleId> {
        let (protocol, ports) = (rule.spec.protocol, rule.spec.external.ports);
        if let Some(owner) = self.owner(address, protocol, ports) {
            return Err(owner);
        }
        let claim = |table: &mut HashMap<IpAddr, BTreeMap<u16, (u16, RuleId)>>| {
            table.entry(address).or_default().insert(ports.first, (ports.last, rule.id));
        };
        if protocol.tcp() {
            claim(&mut self.tcp);
        }
        if protocol.udp() {
            claim(&mut self.udp);
        }
        Ok(())
    }

    fn owner(&self, address: IpAddr, protocol: Protocol, ports: PortRange) -> Option<RuleId> {
        // Claims do not overlap, so the last that begins at or before the end is the only candidate.
        let find = |table: &HashMap<IpAddr, BTreeMap<u16, (u16, RuleId)>>| {
            let (_, &(last, owner)) = table.get(&address)?.range(..=ports.last).next_back()?;
            (last >= ports.first).then_some(owner)
        };
        let tcp = protocol.tcp().then(|| find(&self.tcp)).flatten();
        tcp.or_else(|| protocol.udp().then(|| find(&self.udp)).flatten())
    }
}
