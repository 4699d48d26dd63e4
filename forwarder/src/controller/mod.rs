//! The single owner of the rules.
//!
//! A change is checked as a whole, written to the store, and brought to the data path before the
//! store commits: whoever gets an answer has it in both, and whoever gets an error has it in neither.

mod conflict;
mod error;
mod limits;
mod report;
mod resolve;
mod shared;
mod warnings;

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Instant;

use jiff::Timestamp;
use log::{error, info, warn};

use crate::datapath::{Datapath, Epoch, KernelRule, Timeouts};
use crate::listeners::{Listener, Ports};
use crate::network::{Egress, Network};
use crate::rule::{
    External, Invalid, Lifetime, Protocol, Request, Rule, RuleId, RuleRef, RuleView, Spec, Via, now, quoted,
};
use crate::store::Store;

pub use error::Error;
pub use report::{FlowView, RuleCounts, RuleStats, Stats, Status};
pub use shared::Shared;

use resolve::{Resolution, resolve};

type Rules = BTreeMap<RuleId, Rule>;

/// What the controller asks the machine when a rule changes.
#[derive(Clone, Copy)]
pub struct Machine {
    /// Services of the router itself.
    pub find_listeners: fn(Ports) -> anyhow::Result<Vec<Listener>>,
    /// How packets to each of these leave.
    pub find_egress: fn(&BTreeSet<IpAddr>) -> anyhow::Result<BTreeMap<IpAddr, Egress>>,
    /// Where the kernel's settings of the network are read: [`NET_SETTINGS`].
    pub net_settings: &'static str,
}

/// The settings of the reader's network namespace.
pub const NET_SETTINGS: &str = "/proc/sys/net";

/// What adding has led to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Added {
    pub rule: RuleView,
    /// It took the place of a rule, and its id.
    pub replaced: bool,
}

/// What a controller is told at its start, apart from the data path's own options.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    pub external: Vec<String>,
    pub internal: Vec<String>,
}

/// See the module.
pub struct Controller {
    store: Store,
    datapath: Box<dyn Datapath>,
    network: Network,
    settings: Settings,
    machine: Machine,
    /// What the store has.
    rules: Rules,
    resolutions: BTreeMap<RuleId, Resolution>,
    /// What the data path was last brought to; nothing before the first success.
    kernel: Option<Vec<KernelRule>>,
    /// The data path may differ from the store: the next tick brings it in line.
    stale: bool,
    /// The data path has not yet taken in the network as it is.
    unattached: bool,
    last_complaint: String,
    refusals: limits::Refusals,
    started: Instant,
    started_at: Timestamp,
}

/// One step from one consistent set of rules to the next.
#[derive(Default)]
struct Change {
    put: Vec<Rule>,
    remove: Vec<RuleId>,
    /// Rules whose present flows have to pass the allow list again.
    recheck: Vec<RuleId>,
}

impl Controller {
    /// Takes over the store's rules and brings the data path in line with them.
    pub fn new(
        store: Store,
        datapath: Box<dyn Datapath>,
        network: Network,
        settings: Settings,
        machine: Machine,
    ) -> Result<Self, Error> {
        let rules = store.rules()?.into_iter().map(|rule| (rule.id, rule)).collect();
        let mut controller = Controller {
            store,
            datapath,
            network,
            settings,
            machine,
            rules,
            resolutions: BTreeMap::new(),
            kernel: None,
            stale: false,
            unattached: false,
            last_complaint: String::new(),
            refusals: limits::Refusals::default(),
            started: Instant::now(),
            started_at: now(),
        };
        controller.check_slots()?;
        controller.commit(Change::default())?;
        controller.datapath.keep();
        controller.machine_warnings().iter().for_each(|warning| warn!("{warning}"));
        Ok(controller)
    }

    /// Adds a rule, or with `replace` puts it in the place of the one that it collides with.
    pub fn add(&mut self, request: &Request, user: &str) -> Result<Added, Error> {
        self.expire_due(now())?;
        let spec = request.new_spec()?;
        conflict::check_place(&spec, &self.settings, &self.network)?;
        self.check_target(&spec)?;
        conflict::check_exposure(&spec, request.force)?;
        let mut warnings = Vec::from_iter(warnings::of_exposing(&spec));
        let Some(old) = self.in_the_way(&spec, request.replace)? else {
            self.check_listeners(&spec, request.force, &mut warnings)?;
            let rule = self.insert(spec, request.lifetime, user, warnings)?;
            return Ok(Added { rule: self.with_warnings(rule), replaced: false });
        };
        let spec = request.spec_in_place_of(&old.spec)?;
        if old.moves_to(&spec) || spec.enabled && !old.spec.enabled {
            self.check_listeners(&spec, request.force, &mut warnings)?;
        }
        warnings.extend(warnings::of_replacing(&old, &spec, request));
        let rule = self.update(&old, spec, request.lifetime, false, user, warnings)?;
        Ok(Added { rule: self.with_warnings(rule), replaced: true })
    }

    /// Changes a rule in place.
    pub fn set(&mut self, which: &RuleRef, request: &Request, user: &str) -> Result<RuleView, Error> {
        self.expire_due(now())?;
        let old = self.find_living(which)?;
        let spec = request.changed_spec(&old.spec)?;
        if spec.target != old.spec.target {
            self.check_target(&spec)?;
        }
        if let Some(other) = conflict::same_name(&spec, &self.rules, Some(old.id)) {
            return Err(conflict::name_taken(other, "give another"));
        }
        let mut warnings = Vec::new();
        if spec.enabled && !old.spec.enabled {
            self.check_listeners(&spec, request.force, &mut warnings)?;
        }
        warnings.extend(warnings::of_opening(&old, &spec));
        let rule = self.update(&old, spec, request.lifetime, request.cut, user, warnings)?;
        Ok(self.with_warnings(rule))
    }

    /// Gives a rule a new end, counted from now.
    pub fn renew(&mut self, which: &RuleRef, lifetime: Lifetime, user: &str) -> Result<RuleView, Error> {
        self.expire_due(now())?;
        let old = self.find_living(which)?;
        if lifetime == Lifetime::Never {
            let line = "renewing needs an end, as 12h: `forwarderctl set RULE --lifetime never` makes a rule permanent";
            return Err(Invalid(line.to_owned()).into());
        }
        let mut warnings = Vec::new();
        if old.expires_at.is_none() {
            warnings.push(format!("{} was permanent and now has an end", old.label()));
        }
        self.update(&old, old.spec.clone(), Some(lifetime), false, user, warnings)
    }

    /// Deletes a rule: its flows are cut, or with `drain` the established ones may end by themselves.
    ///
    /// Gives the rule as it was last, or as it drains.
    pub fn del(&mut self, which: &RuleRef, drain: bool, user: &str) -> Result<RuleView, Error> {
        let rule = self.find(which)?.clone();
        if drain {
            let draining = Rule { draining: true, changed_at: now(), ..rule.clone() };
            if !rule.draining {
                self.commit(Change { put: vec![draining.clone()], ..Change::default() })?;
                info!("{} drains, deleted by {user}", rule.label());
            }
            return Ok(self.changed_view(&draining, Vec::new()));
        }
        let last = self.changed_view(&rule, Vec::new());
        self.commit(Change { remove: vec![rule.id], ..Change::default() })?;
        info!("{} deleted by {user}", rule.label());
        Ok(last)
    }

    /// Removes the rules that have ended by `now` and gives their ids.
    pub fn expire_due(&mut self, now: Timestamp) -> Result<Vec<RuleId>, Error> {
        let due = self.rules.values().filter(|rule| rule.expires_at.is_some_and(|end| end <= now));
        let due: Vec<(RuleId, String)> = due.map(|rule| (rule.id, rule.label().to_string())).collect();
        let ids: Vec<RuleId> = due.iter().map(|(id, _)| *id).collect();
        if !ids.is_empty() {
            self.commit(Change { remove: ids.clone(), ..Change::default() })?;
        }
        for (_, label) in due {
            info!("{label} has expired");
        }
        Ok(ids)
    }

    /// When the next rule ends.
    pub fn next_expiry(&self) -> Option<Timestamp> {
        self.rules.values().filter_map(|rule| rule.expires_at).min()
    }

    /// Takes in the machine's present interfaces and addresses.
    pub fn network_changed(&mut self, network: Network) {
        // A route or neighbour concerns the data path alone.
        self.stale |= self.network != network;
        self.network = network;
        self.unattached = true;
        self.catch_up();
    }

    /// Takes other idle times.
    pub fn set_timeouts(&mut self, timeouts: &Timeouts) -> Result<(), Error> {
        Ok(self.datapath.set_timeouts(timeouts)?)
    }

    /// What is to be done about once a second.
    pub fn tick(&mut self, now: Timestamp) {
        if let Err(error) = self.expire_due(now) {
            self.complain("cannot remove expired rules", &error);
        }
        self.catch_up();
        if let Err(error) = self.datapath.collect() {
            self.complain("cannot end idle flows", &error.into());
        }
        if let Err(error) = self.finish_draining() {
            self.complain("cannot finish draining", &error);
        }
        if let Err(error) = self.notice_refusals() {
            self.complain("cannot read what limits have refused", &error);
        }
    }

    /// Does again what has failed before.
    fn catch_up(&mut self) {
        if self.unattached {
            match self.datapath.network_changed(&self.network) {
                Ok(()) => self.unattached = false,
                Err(error) => self.complain("cannot follow a change of the network", &error.into()),
            }
        }
        if self.stale {
            self.stale = false;
            if let Err(error) = self.commit(Change::default()) {
                self.stale = true;
                self.complain("cannot bring the data path in line with the rules", &error);
            }
        }
    }

    fn finish_draining(&mut self) -> Result<(), Error> {
        let draining: Vec<(RuleId, u32)> =
            self.rules.values().filter(|rule| rule.draining).map(|rule| (rule.id, rule.slot)).collect();
        let mut remove = Vec::new();
        for (id, slot) in draining {
            if self.datapath.counters(slot)?.sessions_active == 0 {
                info!("rule {id} has drained");
                remove.push(id);
            }
        }
        if remove.is_empty() {
            return Ok(());
        }
        self.commit(Change { remove, ..Change::default() })
    }

    /// Logs a failure of the background, once for as long as it stays the same.
    fn complain(&mut self, what: &str, why: &Error) {
        let complaint = format!("{what}: {why}");
        if complaint != self.last_complaint {
            error!("{complaint}");
            self.last_complaint = complaint;
        }
    }

    fn insert(
        &mut self,
        spec: Spec,
        lifetime: Option<Lifetime>,
        user: &str,
        warnings: Vec<String>,
    ) -> Result<RuleView, Error> {
        let now = now();
        let rule = Rule {
            id: self.store.next_rule_id()?,
            slot: self.free_slot()?,
            epoch: Epoch { tcp: self.store.next_epoch()?, udp: self.store.next_epoch()? },
            spec,
            created_at: now,
            created_by: user.to_owned(),
            changed_at: now,
            expires_at: lifetime.map_or(Ok(None), |lifetime| lifetime.end(now))?,
            draining: false,
            bound: Vec::new(),
        };
        self.commit(Change { put: vec![rule.clone()], ..Change::default() })?;
        info!("{}, added by {user}", describe(&rule));
        Ok(self.changed_view(&rule, warnings))
    }

    /// Gives `old` another spec and, where `lifetime` says so, another end.
    fn update(
        &mut self,
        old: &Rule,
        spec: Spec,
        lifetime: Option<Lifetime>,
        cut: bool,
        user: &str,
        warnings: Vec<String>,
    ) -> Result<RuleView, Error> {
        let now = now();
        let expires_at = lifetime.map_or(Ok(old.expires_at), |lifetime| lifetime.end(now))?;
        if spec == old.spec && expires_at == old.expires_at && !cut {
            return Ok(self.changed_view(old, warnings));
        }
        let moved = old.moves_to(&spec);
        let recheck = if spec.allow == old.spec.allow { Vec::new() } else { vec![old.id] };
        let rule = Rule {
            epoch: self.next_epoch(old, &spec, cut || moved)?,
            bound: if moved { Vec::new() } else { old.bound.clone() },
            spec,
            changed_at: now,
            expires_at,
            ..old.clone()
        };
        self.commit(Change { put: vec![rule.clone()], recheck, ..Change::default() })?;
        info!("{}, changed by {user}", describe(&rule));
        Ok(self.changed_view(&rule, warnings))
    }

    /// The epoch of `old` once it is `spec`: another one cuts flows.
    fn next_epoch(&mut self, old: &Rule, spec: &Spec, cut: bool) -> Result<Epoch, Error> {
        // The host's connection tracking has seen nothing of a running session, or keeps what it has seen.
        let cut = cut || old.spec.enabled && !spec.enabled || old.spec.via != spec.via;
        // UDP moves to another target at once, established TCP stays to its end.
        let moves = spec.target != old.spec.target;
        Ok(Epoch {
            tcp: if cut { self.store.next_epoch()? } else { old.epoch.tcp },
            udp: if cut || moves { self.store.next_epoch()? } else { old.epoch.udp },
        })
    }

    /// Brings a change to the store and to the data path: to both, or to neither.
    fn commit(&mut self, change: Change) -> Result<(), Error> {
        let mut rules = self.rules.clone();
        let mut written: BTreeSet<RuleId> = change.put.iter().map(|rule| rule.id).collect();
        for id in &change.remove {
            rules.remove(id);
        }
        rules.extend(change.put.into_iter().map(|rule| (rule.id, rule)));
        let resolutions = resolve(&rules, &self.settings, &self.network);
        written.extend(self.follow_addresses(&mut rules, &resolutions)?);
        let kernel = kernel_rules(&rules, &resolutions);

        let stored = self.store.begin()?;
        for id in &change.remove {
            stored.remove(*id)?;
        }
        for rule in written.iter().filter_map(|id| rules.get(id)) {
            stored.put(rule)?;
        }
        let recheck = change.recheck.iter().filter_map(|id| rules.get(id));
        let done = push(&mut *self.datapath, &kernel, recheck).and_then(|()| stored.commit());
        if let Err(error) = done {
            self.restore();
            return Err(error.into());
        }
        self.rules = rules;
        self.resolutions = resolutions;
        self.kernel = Some(kernel);
        Ok(())
    }

    /// Takes the data path back to before a change that failed.
    fn restore(&mut self) {
        // Before the first success there is nothing to go back to, and what an earlier controller left stays.
        if let Some(kernel) = &self.kernel
            && let Err(error) = self.datapath.reconcile(kernel)
        {
            warn!("cannot take a failed change back yet: {error:#}");
            self.stale = true;
        }
    }

    /// Notes where each rule is reached, and cuts the flows of those that have lost an address.
    ///
    /// Gives the rules that this has changed. One lost address cuts all flows of its rule:
    /// those to another address of the same interface begin anew.
    fn follow_addresses(
        &mut self,
        rules: &mut Rules,
        resolutions: &BTreeMap<RuleId, Resolution>,
    ) -> Result<Vec<RuleId>, Error> {
        let mut changed = Vec::new();
        for rule in rules.values_mut().filter(|rule| rule.draining || rule.spec.enabled) {
            let mut held = if rule.draining {
                resolve::addresses(rule, &self.network)
            } else {
                resolutions.get(&rule.id).map(|resolution| resolution.externals.clone()).unwrap_or_default()
            };
            if rule.draining {
                held.retain(|address| rule.bound.contains(address));
            }
            if held == rule.bound {
                continue;
            }
            if let Some(gone) = rule.bound.iter().find(|address| !held.contains(address)) {
                info!("{} is no longer reached at {gone}: its flows are cut", rule.label());
                rule.epoch = Epoch { tcp: self.store.next_epoch()?, udp: self.store.next_epoch()? };
            }
            rule.bound = held;
            changed.push(rule.id);
        }
        Ok(changed)
    }

    /// The rule that `spec` would replace; refused where it may not, or where there are several.
    fn in_the_way(&self, spec: &Spec, replace: bool) -> Result<Option<Rule>, Error> {
        let namesake = conflict::same_name(spec, &self.rules, None);
        let mut found: Vec<&Rule> = conflict::overlapping(spec, &self.rules, &self.network).collect();
        if !replace {
            return match (found.first(), namesake) {
                (Some(rule), _) => Err(conflict::port_taken(spec, rule)),
                (None, Some(rule)) => Err(conflict::name_taken(rule, "give another, or --replace it")),
                (None, None) => Ok(None),
            };
        }
        found.extend(namesake.filter(|namesake| !found.iter().any(|rule| rule.id == namesake.id)));
        match found.as_slice() {
            [] => Ok(None),
            [rule] => Ok(Some((*rule).clone())),
            [first, second, ..] => Err(Error::Conflict {
                message: format!(
                    "it would replace {} and {}: --replace takes the place of one, so delete the others first",
                    first.label(),
                    second.label()
                ),
                rule: Some(first.id),
            }),
        }
    }

    fn check_target(&self, spec: &Spec) -> Result<(), Error> {
        conflict::check_target(spec, &self.network)?;
        let target = spec.target.address;
        if self.find_egress(&[target].into()).get(&target) == Some(&Egress::NoHost) {
            let line =
                format!("target {target} is no single host's address here: give the address of one host");
            return Err(Invalid(line).into());
        }
        Ok(())
    }

    /// Where it cannot be found out nothing is said.
    fn find_egress(&self, targets: &BTreeSet<IpAddr>) -> BTreeMap<IpAddr, Egress> {
        (self.machine.find_egress)(targets).unwrap_or_else(|error| {
            warn!("cannot ask for the routes to the targets: {error:#}");
            BTreeMap::new()
        })
    }

    fn check_listeners(&self, spec: &Spec, force: bool, warnings: &mut Vec<String>) -> Result<(), Error> {
        // A DMZ host leaves them their ports.
        if !spec.enabled || spec.dmz {
            return Ok(());
        }
        let listeners = (self.machine.find_listeners)(Ports {
            family: spec.family(),
            protocol: spec.protocol,
            addresses: &conflict::external_addresses(spec, &self.network),
            ports: spec.external.ports,
        })?;
        let Some(first) = listeners.first() else { return Ok(()) };
        let more = match listeners.len() - 1 {
            0 => String::new(),
            more => format!(" (and {more} more)"),
        };
        if force {
            warnings.push(format!("{first} on this router{more} and is no longer reached from outside"));
            return Ok(());
        }
        let message = format!("{first} on this router{more}: give another port, or --force to take it");
        Err(Error::Conflict { message, rule: None })
    }

    fn free_slot(&self) -> Result<u32, Error> {
        let taken: BTreeSet<u32> = self.rules.values().map(|rule| rule.slot).collect();
        let capacity = self.datapath.rule_capacity();
        (0..capacity).find(|slot| !taken.contains(slot)).ok_or_else(|| Error::Conflict {
            message: format!("there are {capacity} rules already, as many as the tables hold: delete one, or raise rules in [tables] and start anew after `forwarderd detach`"),
            rule: None,
        })
    }

    /// Refuses to start where the tables have become too small for a rule that is there.
    fn check_slots(&self) -> Result<(), Error> {
        let capacity = self.datapath.rule_capacity();
        match self.rules.values().find(|rule| rule.slot >= capacity) {
            None => Ok(()),
            Some(rule) => Err(Error::Failed(anyhow::anyhow!(
                "{} needs {} rule slots and [tables] has {capacity}: raise rules there and start anew after `forwarderd detach`",
                rule.label(),
                rule.slot + 1
            ))),
        }
    }

    fn find(&self, which: &RuleRef) -> Result<&Rule, Error> {
        let matches = |rule: &&Rule| match which {
            RuleRef::Id(id) => rule.id == *id,
            RuleRef::Name(name) => rule.spec.name.as_ref() == Some(name),
            RuleRef::Mapping(protocol, external) => {
                rule.spec.protocol == *protocol && rule.spec.external == *external
            }
        };
        let mut found: Vec<&Rule> = self.rules.values().filter(matches).collect();
        // A draining rule has given its name and its ports away: it comes last.
        found.sort_by_key(|rule| rule.draining);
        match (found.as_slice(), which) {
            ([], RuleRef::Mapping(protocol, external)) => Err(self.no_such_mapping(*protocol, external)),
            ([], _) => {
                let which = quoted(&which.to_string());
                Err(Error::NotFound(format!("there is no rule {which}: see them with `forwarderctl list`")))
            }
            ([one, other, ..], _)
                if one.draining == other.draining && one.spec.family() != other.spec.family() =>
            {
                Err(conflict::ambiguous(one, other))
            }
            ([rule, ..], _) => Ok(rule),
        }
    }

    fn no_such_mapping(&self, protocol: Protocol, external: &External) -> Error {
        let mapping = conflict::Mapping { protocol, external, family: None };
        let advice = match conflict::reached_at(mapping, &self.rules, &self.network).next() {
            Some(Rule { id, spec: Spec { protocol, external, .. }, .. }) => {
                format!("rule {id} is {protocol} {external}; if you mean it, call it {id}")
            }
            None => "see them with `forwarderctl list`".to_owned(),
        };
        let which = quoted(&format!("{protocol} {external}"));
        Error::NotFound(format!("there is no rule {which}: {advice}"))
    }

    /// A rule that can still be changed.
    fn find_living(&self, which: &RuleRef) -> Result<Rule, Error> {
        let rule = self.find(which)?;
        if rule.draining {
            return Err(Error::Conflict {
                message: format!("{} is deleted and drains: add it anew", rule.label()),
                rule: Some(rule.id),
            });
        }
        Ok(rule.clone())
    }
}

/// What the data path is to hold. Rules that take no flows stay in it, so that they keep their counters.
fn kernel_rules(rules: &Rules, resolutions: &BTreeMap<RuleId, Resolution>) -> Vec<KernelRule> {
    let kernel_rule = |rule: &Rule| KernelRule {
        slot: rule.slot,
        externals: resolutions
            .get(&rule.id)
            .map(|resolution| resolution.externals.clone())
            .unwrap_or_default(),
        protocol: rule.spec.protocol,
        external_ports: rule.spec.external.ports,
        target: rule.spec.target.address,
        target_ports: rule.spec.target.ports,
        hairpin: rule.spec.hairpin,
        via_stack: rule.spec.via == Via::Stack,
        allow: rule.spec.allow.networks().to_vec(),
        limits: rule.spec.limits,
        dmz: rule.spec.dmz,
        expires_at: rule.expires_at,
        epoch: rule.epoch,
    };
    rules.values().map(kernel_rule).collect()
}

fn push<'a>(
    datapath: &mut dyn Datapath,
    kernel: &[KernelRule],
    recheck: impl Iterator<Item = &'a Rule>,
) -> anyhow::Result<()> {
    datapath.reconcile(kernel)?;
    for rule in recheck {
        datapath.cut_flows(rule.slot, &|client| rule.spec.allow.permits(client))?;
    }
    Ok(())
}

fn describe(rule: &Rule) -> String {
    let spec = &rule.spec;
    let mut line = format!("{}: {} {} to {}", rule.label(), spec.protocol, spec.external, spec.target);
    if let Some(end) = rule.expires_at {
        line.push_str(&format!(" until {end}"));
    }
    line
}
