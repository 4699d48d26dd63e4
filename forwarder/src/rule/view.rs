//! A rule as the API shows it.

use std::collections::BTreeMap;
use std::fmt;

use jiff::Timestamp;
use jiff::civil::Date;
use serde::{Deserialize, Serialize};

use super::{AllowList, External, Limits, Protocol, Rule, RuleId, Target, Via};
use crate::datapath::RuleCounters;

/// What a rule does at present.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    Active,
    /// It has no address to be reached at; the reason stands beside it.
    Waiting,
    Disabled,
    /// Deleted; established flows may still end by themselves.
    Draining,
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            State::Active => "active",
            State::Waiting => "waiting",
            State::Disabled => "disabled",
            State::Draining => "draining",
        })
    }
}

/// What a rule has carried; `in` is from outside towards the target, bytes are those of IP packets.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    pub packets_in: u64,
    pub bytes_in: u64,
    pub packets_out: u64,
    pub bytes_out: u64,
    pub sessions_active: u64,
    pub sessions_total: u64,
    pub dropped: BTreeMap<String, u64>,
}

impl From<RuleCounters> for Counters {
    fn from(counters: RuleCounters) -> Self {
        Counters {
            packets_in: counters.inward.packets,
            bytes_in: counters.inward.bytes,
            packets_out: counters.outward.packets,
            bytes_out: counters.outward.bytes,
            sessions_active: counters.sessions_active,
            sessions_total: counters.sessions_total,
            dropped: counters.dropped.into_iter().map(|(reason, count)| (reason.to_owned(), count)).collect(),
        }
    }
}

/// A rule in JSON.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RuleView {
    pub id: RuleId,
    pub name: Option<String>,
    pub protocol: Protocol,
    pub external: External,
    pub target: Target,
    pub allow: AllowList,
    pub limits: Limits,
    pub hairpin: bool,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub dmz: bool,
    pub via: Via,
    pub enabled: bool,
    pub owner: Option<String>,
    pub purpose: Option<String>,
    pub created_at: Timestamp,
    pub created_by: String,
    pub changed_at: Timestamp,
    pub review_by: Option<Date>,
    pub expires_at: Option<Timestamp>,
    pub state: State,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state_reason: Option<String>,
    pub counters: Counters,
    /// What the user should know about the change that this answers.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
}

impl RuleView {
    /// Shows `rule`; `waiting` says why it is reached nowhere, where that is so.
    pub fn new(rule: &Rule, waiting: Option<&str>, counters: RuleCounters) -> Self {
        let state = match waiting {
            _ if rule.draining => State::Draining,
            _ if !rule.spec.enabled => State::Disabled,
            Some(_) => State::Waiting,
            None => State::Active,
        };
        let spec = rule.spec.clone();
        RuleView {
            id: rule.id,
            name: spec.name,
            protocol: spec.protocol,
            external: spec.external,
            target: spec.target,
            allow: spec.allow,
            limits: spec.limits,
            hairpin: spec.hairpin,
            dmz: spec.dmz,
            via: spec.via,
            enabled: spec.enabled,
            owner: spec.owner,
            purpose: spec.purpose,
            created_at: rule.created_at,
            created_by: rule.created_by.clone(),
            changed_at: rule.changed_at,
            review_by: spec.review_by,
            expires_at: rule.expires_at,
            state,
            state_reason: waiting.filter(|_| state == State::Waiting).map(str::to_owned),
            counters: counters.into(),
            warnings: Vec::new(),
        }
    }
}
