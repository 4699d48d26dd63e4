//! Per-CPU counters: exact, and without contention.

use core::marker::PhantomData;

use aya_ebpf::{macros::map, maps::PerCpuArray, programs::TcContext};
use forwarder_common::{
    flow::INWARD,
    layout::{self, Count, Hook, REASON_COUNTERS as ENTRIES, RuleCounters},
    reason::Reason,
    tables::Counters,
};

use crate::tables::Place;

#[map]
static REASON_COUNTERS: PerCpuArray<Count> = PerCpuArray::pinned(ENTRIES as u32, 0);

/// Its size is set when it is loaded.
#[map]
static RULE_COUNTERS: PerCpuArray<RuleCounters> = PerCpuArray::pinned(1, 0);

pub struct PerCpuCounters<H>(PhantomData<H>);

impl<H: Place> PerCpuCounters<H> {
    #[inline(always)]
    pub fn new() -> Self {
        Self(PhantomData)
    }
}

#[inline(always)]
fn rule_counters(slot: u32) -> Option<&'static mut RuleCounters> {
    // SAFETY: this CPU's own element; programs do not interrupt each other on one CPU at these hooks.
    RULE_COUNTERS.get_ptr_mut(slot).map(|counters| unsafe { &mut *counters })
}

#[inline(always)]
fn count(hook: Hook, reason: Reason, bytes: u64) {
    if let Some(count) = REASON_COUNTERS.get_ptr_mut(layout::reason_index(hook, reason)) {
        // SAFETY: as in `rule_counters`.
        unsafe { (*count).add(bytes) };
    }
}

/// A packet of another VLAN never reaches the core.
#[inline(always)]
pub fn count_other_vlan(ctx: &TcContext) {
    count(Hook::TcIngress, Reason::Vlan, u64::from(ctx.len()).saturating_sub(14));
}

impl<H: Place> Counters for PerCpuCounters<H> {
    #[inline(always)]
    fn count_reason(&mut self, reason: Reason, bytes: u64) {
        count(H::HOOK, reason, bytes);
    }

    #[inline(always)]
    fn count_forwarded(&mut self, slot: u32, direction: u8, bytes: u64) {
        if let Some(counters) = rule_counters(slot) {
            if direction == INWARD {
                counters.inward.add(bytes);
            } else {
                counters.outward.add(bytes);
            }
        }
    }

    #[inline(always)]
    fn count_session(&mut self, slot: u32) {
        if let Some(counters) = rule_counters(slot) {
            counters.sessions += 1;
        }
    }

    #[inline(always)]
    fn count_dropped(&mut self, slot: u32, reason: Reason) {
        // The compiler knows the enum's range and would leave the bound out; the verifier wants it.
        let index = core::hint::black_box((reason as usize).wrapping_sub(Reason::FIRST_DROP));
        if let Some(count) = rule_counters(slot).and_then(|counters| counters.dropped.get_mut(index)) {
            *count += 1;
        }
    }
}
