//! A data path that only remembers what it was told, for tests of everything above it.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Result, bail};

use super::{
    Datapath, FlowRecord, InterfaceStatus, KernelRule, ReasonCount, RuleCounters, TableFill, Timeouts,
};
use crate::network::Network;

/// What a fake data path holds; the test keeps a handle to it.
#[derive(Debug, Default)]
pub struct FakeState {
    pub capacity: u32,
    pub rules: BTreeMap<u32, KernelRule>,
    pub counters: BTreeMap<u32, RuleCounters>,
    pub flows: Vec<FlowRecord>,
    pub interfaces: Vec<InterfaceStatus>,
    pub timeouts: Option<Timeouts>,
    /// How often `reconcile` found something to write.
    pub writes: usize,
    /// How many more calls of `reconcile` fail; they take over what they were given all the
    /// same, as a kernel that refuses half of a change would.
    pub refusals: usize,
}

/// Remembers rules instead of forwarding anything.
#[derive(Clone, Debug, Default)]
pub struct FakeDatapath {
    state: Arc<Mutex<FakeState>>,
}

impl FakeDatapath {
    pub fn with_capacity(capacity: u32) -> Self {
        let fake = FakeDatapath::default();
        fake.state().capacity = capacity;
        fake
    }

    pub fn state(&self) -> MutexGuard<'_, FakeState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Datapath for FakeDatapath {
    fn rule_capacity(&self) -> u32 {
        self.state().capacity
    }

    fn reconcile(&mut self, wanted: &[KernelRule]) -> Result<()> {
        let mut state = self.state();
        let rules: BTreeMap<u32, KernelRule> = wanted.iter().map(|rule| (rule.slot, rule.clone())).collect();
        assert_eq!(rules.len(), wanted.len(), "two rules have one slot");
        if rules != state.rules {
            state.writes += 1;
            // As the kernel: flows live as long as their rule has the epoch they were made under.
            let before = std::mem::replace(&mut state.rules, rules);
            let FakeState { rules, flows, .. } = &mut *state;
            flows.retain(|flow| match (before.get(&flow.slot), rules.get(&flow.slot)) {
                (Some(before), Some(now)) if flow.protocol == "tcp" => before.epoch.tcp == now.epoch.tcp,
                (Some(before), Some(now)) => before.epoch.udp == now.epoch.udp,
                _ => false,
            });
        }
        if state.refusals > 0 {
            state.refusals -= 1;
            bail!("the fake data path was told to refuse");
        }
        Ok(())
    }

    fn cut_flows(&mut self, slot: u32, keep: &dyn Fn(IpAddr) -> bool) -> Result<()> {
        self.state().flows.retain(|flow| flow.slot != slot || keep(flow.client.ip()));
        Ok(())
    }

    fn network_changed(&mut self, _network: &Network) -> Result<()> {
        Ok(())
    }

    fn collect(&mut self) -> Result<()> {
        Ok(())
    }

    fn counters(&mut self, slot: u32) -> Result<RuleCounters> {
        let state = self.state();
        let mut counters = state.counters.get(&slot).cloned().unwrap_or_default();
        counters.sessions_active = state.flows.iter().filter(|flow| flow.slot == slot).count() as u64;
        Ok(counters)
    }

    fn refused(&mut self, slot: u32) -> Result<u64> {
        let state = self.state();
        let dropped = state.counters.get(&slot).map(|counters| &counters.dropped);
        Ok(dropped.into_iter().flatten().map(|(_, packets)| packets).sum())
    }

    fn flows(&mut self) -> Result<Vec<FlowRecord>> {
        Ok(self.state().flows.clone())
    }

    fn reasons(&mut self) -> Result<Vec<ReasonCount>> {
        Ok(Vec::new())
    }

    fn interfaces(&self) -> Vec<InterfaceStatus> {
        self.state().interfaces.clone()
    }

    fn tables(&mut self) -> Result<Vec<TableFill>> {
        let state = self.state();
        Ok(vec![TableFill {
            name: "rules".into(),
            entries: state.rules.len() as u64,
            capacity: u64::from(state.capacity),
        }])
    }

    fn set_timeouts(&mut self, timeouts: &Timeouts) -> Result<()> {
        self.state().timeouts = Some(*timeouts);
        Ok(())
    }
}
