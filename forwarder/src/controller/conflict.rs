//! What stands against a rule: the network, and the other rules.

use std::net::IpAddr;

use super::{Error, Rules, Settings};
use crate::network::Network;
use crate::rule::{External, Invalid, Place, Protocol, Rule, RuleId, Spec};

/// Refuses a rule that this machine could not serve.
pub fn check_place(spec: &Spec, settings: &Settings, network: &Network) -> Result<(), Invalid> {
    if let Place::Interface(name) = &spec.external.place
        && !settings.external.contains(name)
    {
        let external = settings.external.join(", ");
        return Err(Invalid(match network.interface(name) {
            Some(_) => {
                format!("interface {name} is not an external one: the external interfaces are {external}")
            }
            None => format!("there is no interface {name}: the external interfaces are {external}"),
        }));
    }
    Ok(())
}

/// Refuses a target that is the router itself: its packets would not be forwarded anywhere.
pub fn check_target(spec: &Spec, network: &Network) -> Result<(), Invalid> {
    let target = spec.target.address;
    if external_addresses(&spec.external, network).contains(&target) {
        return Err(Invalid(format!(
            "target {target} is the external address itself: give the address of a host behind it"
        )));
    }
    if network.owns(target) {
        return Err(Invalid(format!(
            "target {target} is an address of this router: give the address of a host behind it"
        )));
    }
    Ok(())
}

/// The addresses at which an external is reached just now.
pub fn external_addresses(external: &External, network: &Network) -> Vec<IpAddr> {
    match &external.place {
        Place::Address(address) => vec![*address],
        Place::Interface(name) => {
            network.interface(name).map(|interface| interface.addresses.clone()).unwrap_or_default()
        }
    }
}

/// The first rule, other than `except`, that has the name already.
pub fn same_name<'a>(spec: &Spec, rules: &'a Rules, except: Option<RuleId>) -> Option<&'a Rule> {
    let name = spec.name.as_ref()?;
    others(rules, except).find(|rule| rule.spec.name.as_ref() == Some(name))
}

/// Refuses a DMZ host that nobody means to look at again.
pub fn check_exposure(spec: &Spec, force: bool) -> Result<(), Invalid> {
    if spec.dmz && spec.review_by.is_none() && !force {
        let target = spec.target.address;
        return Err(Invalid(format!(
            "a DMZ host exposes every port of {target}: say with --review-by when somebody looks whether it is still wanted, or --force it"
        )));
    }
    Ok(())
}

/// The rules that have a port of this one already. A DMZ host has what others leave: only another one
/// is in its way.
pub fn overlapping<'a>(spec: &Spec, rules: &'a Rules, network: &Network) -> impl Iterator<Item = &'a Rule> {
    reached_at((spec.protocol, &spec.external), rules, network).filter(move |rule| rule.spec.dmz == spec.dmz)
}

/// The rules that have a port of the mapping.
pub fn reached_at<'a>(
    mapping: (Protocol, &External),
    rules: &'a Rules,
    network: &Network,
) -> impl Iterator<Item = &'a Rule> {
    others(rules, None).filter(move |rule| overlap(mapping, &rule.spec, network))
}

pub fn name_taken(rule: &Rule, advice: &str) -> Error {
    let message = format!("the name is that of {}: {advice}", rule.label());
    Error::Conflict { message, rule: Some(rule.id) }
}

pub fn port_taken(spec: &Spec, rule: &Rule) -> Error {
    let message = format!(
        "{} {} overlaps {}, which has {} {}: give another port, or --replace it",
        spec.protocol,
        spec.external,
        rule.label(),
        rule.spec.protocol,
        rule.spec.external
    );
    Error::Conflict { message, rule: Some(rule.id) }
}

/// Draining rules take nothing: their name and their ports are free.
fn others(rules: &Rules, except: Option<RuleId>) -> impl Iterator<Item = &Rule> {
    rules.values().filter(move |rule| !rule.draining && Some(rule.id) != except)
}

fn overlap((protocol, external): (Protocol, &External), other: &Spec, network: &Network) -> bool {
    protocol.intersects(other.protocol)
        && external.ports.intersects(other.external.ports)
        && same_place(&external.place, &other.external.place, network)
}

fn same_place(one: &Place, other: &Place, network: &Network) -> bool {
    match (one, other) {
        (Place::Address(one), Place::Address(other)) => one == other,
        (Place::Interface(one), Place::Interface(other)) => one == other,
        (Place::Address(address), Place::Interface(name))
        | (Place::Interface(name), Place::Address(address)) => {
            network.interface(name).is_some_and(|interface| interface.addresses.contains(address))
        }
    }
}
