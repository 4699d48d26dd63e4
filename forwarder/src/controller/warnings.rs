//! What would keep rules from working, or work otherwise than a user may expect; each line says how to mend it.

use std::collections::BTreeSet;
use std::fs;
use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;

use super::{Machine, Settings};
use crate::network::{Egress, Network};
use crate::rule::{Family, Place, Request, Rule, Spec, now};

/// An address on the internet, which nobody has (RFC 5737).
const SOMEWHERE: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1));

/// Looks at the machine's settings for these families.
pub fn of_machine(families: &BTreeSet<Family>, settings: &Settings, machine: &Machine) -> Vec<String> {
    let net = Path::new(machine.net_settings);
    families.iter().flat_map(|family| of_forwarding(*family, net, settings)).collect()
}

/// Looks at the uplinks, of which all but one may have a strict rp_filter in their way.
pub fn of_uplinks(settings: &Settings, network: &Network, machine: &Machine) -> Vec<String> {
    if settings.external.len() < 2 {
        return Vec::new();
    }
    of_reverse_paths(
        &Path::new(machine.net_settings).join("ipv4"),
        settings,
        default_uplink(network, machine),
    )
}

/// The interface by which packets to the internet leave.
fn default_uplink<'a>(network: &'a Network, machine: &Machine) -> Option<&'a str> {
    let egress = (machine.find_egress)(&BTreeSet::from([SOMEWHERE])).ok()?;
    let Egress::Interface(index) = egress.get(&SOMEWHERE)? else { return None };
    network.interfaces.iter().find(|interface| interface.index == *index).map(|it| it.name.as_str())
}

/// Names other uplinks with a strict rp_filter: the kernel takes from them only what it would answer by
/// them. A mapping's packets do not ask it, but those that the router has to answer or to fragment.
fn of_reverse_paths(ipv4: &Path, settings: &Settings, default: Option<&str>) -> Vec<String> {
    let Some(default) = default else { return Vec::new() };
    let filter = |name: &str| {
        let value = fs::read_to_string(ipv4.join("conf").join(name).join("rp_filter")).unwrap_or_default();
        value.trim().parse::<u8>().unwrap_or(0)
    };
    let others = settings.external.iter().filter(|name| *name != default);
    others
        .filter(|name| filter("all").max(filter(name)) == 1)
        .map(|name| {
            format!(
                "rp_filter is strict on {name}, and the route back to the internet leads by {default}: what comes in by {name} and the router has to fragment or to answer (TTL exceeded, too long) is lost: sysctl -w net/ipv4/conf/{name}/rp_filter=2"
            )
        })
        .collect()
}

fn of_forwarding(family: Family, net: &Path, settings: &Settings) -> Vec<String> {
    let off = |path: &Path| fs::read_to_string(path).is_ok_and(|value| value.trim() == "0");
    let (directory, switch, aside) = match family {
        Family::Ipv4 => ("ipv4", "ip_forward", ""),
        Family::Ipv6 => ("ipv6", "conf/all/forwarding", ACCEPT_RA),
    };
    if off(&net.join(directory).join(switch)) {
        let sysctl = format!("net.{directory}.{}", switch.replace('/', "."));
        return vec![format!(
            "{family} forwarding is off, so nothing of {family} is forwarded: sysctl -w {sysctl}=1{aside}"
        )];
    }
    let interfaces = settings.external.iter().chain(&settings.internal);
    interfaces
        .filter(|name| off(&net.join(directory).join("conf").join(name).join("forwarding")))
        .map(|name| {
            // A dot in an interface's name would end a part of the sysctl's name.
            let sysctl = format!("net/{directory}/conf/{name}/forwarding");
            format!("{family} forwarding is off on {name}, so nothing of {family} that enters there is forwarded: sysctl -w {sysctl}=1")
        })
        .collect()
}

/// Whoever forwards takes no router's advertisements unless told to, and may lose its own way out.
const ACCEPT_RA: &str = ", and accept_ra=2 for an uplink that lives by router advertisements";

/// Looks at a rule as this machine would serve it now.
pub fn of_rule(spec: &Spec, settings: &Settings, network: &Network, egress: Option<&Egress>) -> Vec<String> {
    let mut warnings = Vec::new();
    if let Place::Address(address) = spec.external.place
        && !network.owns(address)
    {
        warnings.push(format!(
            "no interface of this router has {address}: packets to it come in only where it is routed to this router"
        ));
    }
    warnings.extend(of_egress(spec.target.address, settings, network, egress));
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

    #[test]
    fn forwarding_that_is_off_is_named_with_its_cure() {
        let directory = tempfile::tempdir().unwrap();
        let settings = Settings { external: vec!["wan".into()], internal: vec!["gone".into()] };
        for (family, switch, sysctl) in [
            (Family::Ipv4, "ipv4/ip_forward", "net.ipv4.ip_forward=1"),
            (Family::Ipv6, "ipv6/conf/all/forwarding", "net.ipv6.conf.all.forwarding=1"),
        ] {
            let (part, _) = switch.split_once('/').unwrap();
            let said = |all: &str, wan: &str| {
                for (file, value) in [(switch, all), (&format!("{part}/conf/wan/forwarding"), wan)] {
                    let file = directory.path().join(file);
                    fs::create_dir_all(file.parent().unwrap()).unwrap();
                    fs::write(file, value).unwrap();
                }
                of_forwarding(family, directory.path(), &settings)
            };
            assert!(said("0\n", "0\n")[0].contains(&format!("sysctl -w {sysctl}")));
            assert!(said("1\n", "0\n")[0].contains(&format!("sysctl -w net/{part}/conf/wan/forwarding=1")));
            assert_eq!(said("1\n", "1\n"), [""; 0]);
        }
    }

    #[test]
    fn a_family_without_rules_is_not_warned_of() {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir_all(directory.path().join("ipv6/conf/all")).unwrap();
        fs::write(directory.path().join("ipv6/conf/all/forwarding"), "0").unwrap();
        let machine = Machine {
            find_listeners: |_| Ok(Vec::new()),
            find_egress: |_| Ok([].into()),
            net_settings: directory.path().to_str().unwrap().to_owned().leak(),
        };
        let said = |families: &[Family]| {
            of_machine(&families.iter().copied().collect(), &Settings::default(), &machine).len()
        };
        assert_eq!((said(&[]), said(&[Family::Ipv4]), said(&[Family::Ipv4, Family::Ipv6])), (0, 0, 1));
    }

    #[test]
    fn a_strict_rp_filter_is_named_on_uplinks_that_no_route_leads_back_by() {
        let directory = tempfile::tempdir().unwrap();
        let said = |all: u8, wan2: u8, default: Option<&str>| {
            for (name, value) in [("all", all), ("wan", 1), ("wan2", wan2)] {
                let conf = directory.path().join("conf").join(name);
                fs::create_dir_all(&conf).unwrap();
                fs::write(conf.join("rp_filter"), format!("{value}\n")).unwrap();
            }
            let external = vec!["wan".into(), "wan2".into(), "gone".into()];
            let settings = Settings { external, internal: vec!["lan".into()] };
            let said = of_reverse_paths(directory.path(), &settings, default);
            said.iter().map(|line| line.rsplit_once(' ').unwrap().1.to_owned()).collect::<Vec<_>>()
        };
        let cures = |names: &[&str]| {
            names.iter().map(|it| format!("net/ipv4/conf/{it}/rp_filter=2")).collect::<Vec<_>>()
        };
        assert_eq!(said(0, 1, Some("wan")), cures(&["wan2"]));
        assert_eq!(said(1, 0, Some("wan")), cures(&["wan2", "gone"]));
        assert_eq!(said(1, 2, Some("wan")), cures(&["gone"]));
        assert_eq!(said(0, 1, Some("wan2")), cures(&["wan"]));
        assert_eq!(said(1, 1, None), cures(&[]));
    }
}
