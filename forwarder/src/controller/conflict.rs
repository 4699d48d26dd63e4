//! What stands against a rule: the network, and the other rules.

use std::net::IpAddr;

use super::{Error, Rules, Settings};
use crate::network::{Interface, Network};
use crate::rule::{External, Family, Invalid, Place, Protocol, Rule, RuleId, Spec};

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
    if external_addresses(spec, network).contains(&target) {
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

/// The addresses that a rule's external stands for just now.
pub fn external_addresses(spec: &Spec, network: &Network) -> Vec<IpAddr> {
    match &spec.external.place {
        Place::Address(address) => vec![*address],
        Place::Interface(name) => {
            let interface = network.interface(name);
            interface.map(|interface| interface.lasting(spec.family()).collect()).unwrap_or_default()
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

/// What a user names a rule by, or wants it to have.
#[derive(Clone, Copy)]
pub struct Mapping<'a> {
    pub protocol: Protocol,
    pub external: &'a External,
    /// Absent where it is not said: an external that is an interface may be of either.
    pub family: Option<Family>,
}

impl<'a> From<&'a Spec> for Mapping<'a> {
    fn from(spec: &'a Spec) -> Self {
        Mapping { protocol: spec.protocol, external: &spec.external, family: Some(spec.family()) }
    }
}

/// The rules that have a port of this one already. A DMZ host has what others leave: only another one
/// is in its way.
pub fn overlapping<'a>(spec: &Spec, rules: &'a Rules, network: &Network) -> impl Iterator<Item = &'a Rule> {
    reached_at(spec.into(), rules, network).filter(move |rule| rule.spec.dmz == spec.dmz)
}

/// The rules that have a port of the mapping.
pub fn reached_at<'a>(
    mapping: Mapping,
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

/// An interface may have the same port for either family.
pub fn ambiguous(one: &Rule, other: &Rule) -> Error {
    let (first, second) = (one.spec.family(), other.spec.family());
    let message = format!(
        "{} {} is {} for {first} and {} for {second}: say which by id or name",
        one.spec.protocol,
        one.spec.external,
        one.label(),
        other.label()
    );
    Error::Conflict { message, rule: Some(one.id) }
}

/// Draining rules take nothing: their name and their ports are free.
fn others(rules: &Rules, except: Option<RuleId>) -> impl Iterator<Item = &Rule> {
    rules.values().filter(move |rule| !rule.draining && Some(rule.id) != except)
}

fn overlap(mapping: Mapping, other: &Spec, network: &Network) -> bool {
    let Mapping { protocol, external, family } = mapping;
    protocol.intersects(other.protocol)
        && family.is_none_or(|family| family == other.family())
        && external.ports.intersects(other.external.ports)
        && same_place(&external.place, &other.external.place, network)
}

fn same_place(one: &Place, other: &Place, network: &Network) -> bool {
    match (one, other) {
        (Place::Address(one), Place::Address(other)) => one == other,
        (Place::Interface(one), Place::Interface(other)) => one == other,
        (Place::Address(address), Place::Interface(name))
        | (Place::Interface(name), Place::Address(address)) => {
            let has =
                |interface: &Interface| interface.lasting(Family::of(*address)).any(|own| own == *address);
            network.interface(name).is_some_and(has)
        }
    }
}
