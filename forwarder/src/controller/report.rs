//! What the controller tells about itself and its rules.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use jiff::Timestamp;
use log::warn;
use serde::{Deserialize, Serialize};

use super::{Controller, Error, warnings};
use crate::datapath::{InterfaceStatus, ReasonCount, RuleCounters, TableFill};
use crate::rule::{Counters, External, Family, Protocol, Rule, RuleId, RuleRef, RuleView, State};

/// How the controller fares.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    pub version: String,
    pub pid: u32,
    pub started_at: Timestamp,
    pub uptime_seconds: u64,
    pub interfaces: Vec<InterfaceStatus>,
    pub tables: Vec<TableFill>,
    pub rules: RuleCounts,
    /// What keeps rules from working, each with its cure.
    pub warnings: Vec<String>,
}

/// Rules by state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RuleCounts {
    pub active: u64,
    pub waiting: u64,
    pub disabled: u64,
    pub draining: u64,
}

/// One live session.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FlowView {
    pub rule: RuleId,
    pub rule_name: Option<String>,
    pub protocol: String,
    pub client: SocketAddr,
    pub external: SocketAddr,
    pub target: SocketAddr,
    /// `half-open`, `established` or `closing`.
    pub state: String,
    pub age_seconds: u64,
    pub idle_seconds: u64,
    pub packets_in: u64,
    pub bytes_in: u64,
    pub packets_out: u64,
    pub bytes_out: u64,
}

/// Packets and bytes by rule and by reason.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    pub rules: Vec<RuleStats>,
    pub reasons: Vec<ReasonCount>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RuleStats {
    pub id: RuleId,
    pub name: Option<String>,
    pub protocol: Protocol,
    pub external: External,
    pub counters: Counters,
}

impl Controller {
    pub fn list(&mut self) -> Result<Vec<RuleView>, Error> {
        let mut views = self.views()?;
        let mut warnings = self.rule_warnings(self.rules.values());
        for view in &mut views {
            view.warnings.extend(warnings.remove(&view.id).unwrap_or_default());
        }
        Ok(views)
    }

    pub fn show(&mut self, which: &RuleRef) -> Result<RuleView, Error> {
        let id = self.find(which)?.id;
        let view = self.view(id)?;
        Ok(self.with_warnings(view))
    }

    /// Live sessions of one rule or of all.
    pub fn flows(&mut self, which: Option<&RuleRef>) -> Result<Vec<FlowView>, Error> {
        let only = which.map(|which| self.find(which).map(|rule| rule.id)).transpose()?;
        let by_slot: std::collections::HashMap<u32, &Rule> =
            self.rules.values().map(|rule| (rule.slot, rule)).collect();
        let mut flows = Vec::new();
        for flow in self.datapath.flows()? {
            // A flow whose rule has just gone is not listed: it is as good as cut.
            let Some(rule) = by_slot.get(&flow.slot).filter(|rule| only.is_none_or(|id| rule.id == id))
            else {
                continue;
            };
            flows.push(FlowView {
                rule: rule.id,
                rule_name: rule.spec.name.clone(),
                protocol: flow.protocol.to_owned(),
                client: flow.client,
                external: flow.external,
                target: flow.target,
                state: flow.state.to_owned(),
                age_seconds: flow.age.as_secs(),
                idle_seconds: flow.idle.as_secs(),
                packets_in: flow.inward.packets,
                bytes_in: flow.inward.bytes,
                packets_out: flow.outward.packets,
                bytes_out: flow.outward.bytes,
            });
        }
        flows.sort_by_key(|flow| (flow.rule, flow.client));
        Ok(flows)
    }

    pub fn stats(&mut self) -> Result<Stats, Error> {
        let rules = self.views()?.into_iter().map(|rule| RuleStats {
            id: rule.id,
            name: rule.name,
            protocol: rule.protocol,
            external: rule.external,
            counters: rule.counters,
        });
        Ok(Stats { rules: rules.collect(), reasons: self.datapath.reasons()? })
    }

    pub fn status(&mut self) -> Result<Status, Error> {
        let mut rules = RuleCounts::default();
        for rule in self.rules.values() {
            *match RuleView::new(rule, self.waiting(rule.id), RuleCounters::default()).state {
                State::Active => &mut rules.active,
                State::Waiting => &mut rules.waiting,
                State::Disabled => &mut rules.disabled,
                State::Draining => &mut rules.draining,
            } += 1;
        }
        Ok(Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            started_at: self.started_at,
            uptime_seconds: self.started.elapsed().as_secs(),
            interfaces: self.datapath.interfaces(),
            tables: self.datapath.tables()?,
            rules,
            warnings: self.all_warnings(),
        })
    }

    /// What keeps everything, or some rules, from working.
    fn all_warnings(&self) -> Vec<String> {
        let mut warnings = self.machine_warnings();
        warnings.extend(self.uplink_warnings());
        let of_rules = self.rule_warnings(self.rules.values());
        if !of_rules.is_empty() {
            let ids: Vec<String> = of_rules.keys().take(8).map(RuleId::to_string).collect();
            let more = if of_rules.len() > ids.len() { ", …" } else { "" };
            let (count, ids) = (of_rules.len(), ids.join(", "));
            warnings.push(format!(
                "{count} rule{} may not work as things are, and `forwarderctl show` says why: {ids}{more}",
                if count == 1 { "" } else { "s" }
            ));
        }
        warnings
    }

    /// Not at the start: it asks for routes and waits, which a task of the runtime may not.
    fn uplink_warnings(&self) -> Vec<String> {
        warnings::of_uplinks(&self.settings, &self.network, &self.machine)
    }

    /// What keeps all rules of a family from working, of the families that rules have.
    pub(super) fn machine_warnings(&self) -> Vec<String> {
        let rules = self.rules.values().filter(|rule| !rule.draining && rule.spec.enabled);
        self.machine_warnings_of(rules.map(|rule| rule.spec.family()).collect())
    }

    fn machine_warnings_of(&self, families: BTreeSet<Family>) -> Vec<String> {
        let mut warnings = warnings::of_machine(&families, &self.settings, &self.machine);
        warnings.extend(self.datapath.warnings());
        warnings
    }

    /// What keeps rules from working, for those of which there is something to say.
    fn rule_warnings<'a>(&self, rules: impl Iterator<Item = &'a Rule>) -> BTreeMap<RuleId, Vec<String>> {
        let rules: Vec<&Rule> = rules.filter(|rule| !rule.draining && rule.spec.enabled).collect();
        let egress = self.find_egress(&rules.iter().map(|rule| rule.spec.target.address).collect());
        let warnings = rules.into_iter().map(|rule| {
            let egress = egress.get(&rule.spec.target.address);
            let of_rule = warnings::of_rule(&rule.spec, &self.settings, &self.network, egress);
            (rule.id, of_rule)
        });
        warnings.filter(|(_, warnings)| !warnings.is_empty()).collect()
    }

    fn views(&mut self) -> Result<Vec<RuleView>, Error> {
        let ids: Vec<RuleId> = self.rules.keys().copied().collect();
        ids.into_iter().map(|id| self.view(id)).collect()
    }

    fn view(&mut self, id: RuleId) -> Result<RuleView, Error> {
        let Some(rule) = self.rules.get(&id) else {
            return Err(Error::NotFound(format!("there is no rule {id}")));
        };
        let counters = self.datapath.counters(rule.slot)?;
        Ok(RuleView::new(rule, self.waiting(id), counters))
    }

    /// The rule after a change that is done: counters that cannot be read must not make it look undone.
    pub(super) fn changed_view(&mut self, rule: &Rule, warnings: Vec<String>) -> RuleView {
        let counters = self.datapath.counters(rule.slot).unwrap_or_else(|error| {
            warn!("cannot read the counters of {}: {error:#}", rule.label());
            RuleCounters::default()
        });
        RuleView { warnings, ..RuleView::new(rule, self.waiting(rule.id), counters) }
    }

    /// Adds what would keep the rule from working.
    pub(super) fn with_warnings(&self, mut view: RuleView) -> RuleView {
        if matches!(view.state, State::Active | State::Waiting) {
            view.warnings.extend(self.machine_warnings_of([Family::of(view.target.address)].into()));
            view.warnings.extend(self.uplink_warnings());
        }
        let of_rule = self.rule_warnings(self.rules.get(&view.id).into_iter());
        view.warnings.extend(of_rule.into_values().flatten());
        view
    }

    fn waiting(&self, id: RuleId) -> Option<&str> {
        self.resolutions.get(&id)?.waiting.as_deref()
    }
}
