//! What would keep rules from working, or work otherwise than a user may expect; each line says how to mend it.

use std::fs;
use std::net::IpAddr;
use std::path::Path;

use super::{Machine, Settings, conflict};
use crate::network::{Egress, Network};
use crate::rule::{Place, PortRange, Request, Rule, Spec, now};

/// Looks at the machine's settings.
pub fn of_machine(settings: &Settings, machine: &Machine) -> Vec<String> {
    of_sysctls(Path::new(machine.ipv4_settings), settings)
}

fn of_sysctls(ipv4: &Path, settings: &Settings) -> Vec<String> {
    let off = |path: &Path| fs::read_to_string(path).is_ok_and(|value| value.trim() == "0");
    if off(&ipv4.join("ip_forward")) {
        return vec![
            "IPv4 forwarding is off, so nothing is forwarded: sysctl -w net.ipv4.ip_forward=1".to_owned(),
        ];
    }
    let interfaces = settings.external.iter().chain(&settings.internal);
    interfaces
        .filter(|name| off(&ipv4.join("conf").join(name).join("forwarding")))
        .map(|name| {
            // A dot in an interface's name would end a part of the sysctl's name.
            let sysctl = format!("net/ipv4/conf/{name}/forwarding");
            format!("IPv4 forwarding is off on {name}, so nothing that enters there is forwarded: sysctl -w {sysctl}=1")
        })
        .collect()
}

/// Looks at a rule as this machine would serve it now.
pub fn of_rule(
    spec: &Spec,
    settings: &Settings,
    network: &Network,
    egress: Option<&Egress>,
    ephemeral: &EphemeralPorts,
) -> Vec<String> {
    let mut warnings = Vec::new();
    if let Place::Address(address) = spec.external.place
        && !network.owns(address)
    {
        warnings.push(format!(
            "no interface of this router has {address}: packets to it come in only where it is routed to this router"
        ));
    }
    warnings.extend(of_egress(spec.target.address, settings, network, egress));
    let own = conflict::external_addresses(&spec.external, network);
    // A DMZ host leaves the router's own connections alone.
    if !spec.dmz
        && own.iter().any(|address| network.owns(*address))
        && ephemeral.has_one_of(spec.external.ports)
    {
        let ports = spec.external.ports;
        warnings.push(format!(
            "the router opens connections of its own from ports of {ports}, whose answers the rule would take: sysctl -w net.ipv4.ip_local_reserved_ports={ports}, beside what is reserved already"
        ));
    }
    if let Some(day) = spec.review_by
        && day < now().to_zoned(jiff::tz::TimeZone::UTC).date()
    {
        warnings.push(format!(
            "its review was due on {day}: look whether it is still wanted, then set --review-by"
        ));
    }
    warnings
}

/// Whether packets to the target leave towards the inside.
fn of_egress(
    target: IpAddr,
    settings: &Settings,
    network: &Network,
    egress: Option<&Egress>,
) -> Option<String> {
    let index = match egress? {
        Egress::Interface(index) => *index,
        Egress::NoHost => {
            return Some(format!("{target} is no single host's address here: set another --target"));
        }
        Egress::NoRoute => {
            return Some(format!(
                "there is no route to the target {target}: its packets are dropped until there is one"
            ));
        }
    };
    let interface = network.interfaces.iter().find(|interface| interface.index == index)?;
    let (name, internal) = (&interface.name, settings.internal.join(", "));
    (!settings.internal.contains(name)).then(|| {
        format!("the route to the target {target} leaves by {name}, and the internal interfaces are {internal}: its packets are dropped (wrong-egress)")
    })
}

/// The ports from which the router opens connections of its own.
pub struct EphemeralPorts {
    range: Option<(u16, u16)>,
    reserved: Vec<PortRange>,
}

impl EphemeralPorts {
    pub fn read(machine: &Machine) -> Self {
        Self::read_at(Path::new(machine.ipv4_settings))
    }

    fn read_at(ipv4: &Path) -> Self {
        let read = |name: &str| fs::read_to_string(ipv4.join(name)).unwrap_or_default();
        let range: Vec<u16> =
            read("ip_local_port_range").split_whitespace().filter_map(|port| port.parse().ok()).collect();
        let reserved = read("ip_local_reserved_ports");
        EphemeralPorts {
            range: if let [first, last] = range[..] { Some((first, last)) } else { None },
            reserved: reserved.trim().split(',').filter_map(|part| part.parse().ok()).collect(),
        }
    }

    fn has_one_of(&self, ports: PortRange) -> bool {
        let Some((first, last)) = self.range else { return false };
        (ports.first.max(first)..=ports.last.min(last))
            .any(|port| !self.reserved.iter().any(|reserved| reserved.contains(port)))
    }
}

/// Says what a DMZ host means.
pub fn of_exposing(spec: &Spec) -> Option<String> {
    spec.dmz.then(|| {
        let whom = if spec.allow.is_empty() { "everyone" } else { "its allow list" };
        format!(
            "it exposes every port of {} to {whom}, but for those of {} that another rule or the router itself has: add rules for what is needed instead, if you can",
            spec.target.address, spec.external
        )
    })
}

/// Says that a rule which was for some is for everyone now: an empty list may be a slip.
pub fn of_opening(old: &Rule, spec: &Spec) -> Option<String> {
    let opened = spec.allow.is_empty() && !old.spec.allow.is_empty();
    opened.then(|| format!("{} is open to everyone now; before, to {}", old.label(), old.spec.allow))
}

/// Whether something that the old rule mapped is no longer mapped.
fn loses_ports(old: &Spec, new: &Spec) -> bool {
    let (before, after) = (&old.external, &new.external);
    let protocols = old.protocol.tcp() && !new.protocol.tcp() || old.protocol.udp() && !new.protocol.udp();
    protocols
        || before.place != after.place
        || before.ports.first < after.ports.first
        || before.ports.last > after.ports.last
}

/// Says what a rule that takes another's place gives up, and what it keeps without being told.
pub fn of_replacing(old: &Rule, spec: &Spec, request: &Request) -> Vec<String> {
    let mut warnings = Vec::from_iter(of_opening(old, spec));
    if loses_ports(&old.spec, spec) {
        let Spec { protocol, external, target, .. } = &old.spec;
        warnings.push(format!(
            "{} was {protocol} {external} to {target}, of which only what is named again stays mapped",
            old.label()
        ));
    }
    if request.allow.is_none() && !spec.allow.is_empty() {
        warnings.push(format!(
            "{} keeps its allow list, {}: `--allow any` would open it to everyone",
            old.label(),
            spec.allow
        ));
    }
    if !spec.enabled && request.enabled.is_none() {
        warnings.push(format!("{} stays disabled: `forwarderctl set {} --enabled`", old.label(), old.id));
    }
    // A timed rule never becomes permanent by being written again.
    if let (None, Some(end)) = (request.lifetime, old.expires_at) {
        let label = old.label();
        warnings.push(format!("{label} keeps its end, {end}: `--lifetime never` would make it permanent"));
    }
    warnings
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(forward: &str, wan: &str) -> Vec<String> {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir_all(directory.path().join("conf/wan")).unwrap();
        fs::write(directory.path().join("ip_forward"), forward).unwrap();
        fs::write(directory.path().join("conf/wan/forwarding"), wan).unwrap();
        of_sysctls(
            directory.path(),
            &Settings { external: vec!["wan".into()], internal: vec!["gone".into()] },
        )
    }

    #[test]
    fn forwarding_that_is_off_is_named_with_its_cure() {
        assert!(machine("0\n", "0\n")[0].contains("sysctl -w net.ipv4.ip_forward=1"));
        assert!(machine("1\n", "0\n")[0].contains("sysctl -w net/ipv4/conf/wan/forwarding=1"));
        assert_eq!(machine("1\n", "1\n"), [""; 0]);
    }

    #[test]
    fn ports_of_the_routers_own_connections_are_known_unless_they_are_reserved() {
        let directory = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(directory.path().join(name), text).unwrap();
        let taken =
            |ports: &str| EphemeralPorts::read_at(directory.path()).has_one_of(ports.parse().unwrap());
        assert!(!taken("40000"), "nothing is known");
        write("ip_local_port_range", "32768\t60999\n");
        assert!(taken("60999") && taken("30000-32768") && !taken("61000-65535") && !taken("80"));
        write("ip_local_reserved_ports", "8080,40000-40009\n");
        assert!(!taken("40000-40009") && taken("40000-40010"));
    }
}
