//! Keeps the counts that limits go by equal to the flows that there are.
//!
//! The programs count what they establish and what ends by its own packets. What the controller ends
//! it takes off by corrections, in a map of its own. What neither knows of (a controller that died
//! between the two, CPUs that got in each other's way) shows as a difference between the counts and
//! the flows, and is corrected once two looks agree.

use std::collections::{BTreeSet, HashMap, HashSet};

use anyhow::{Context as _, Result};
use aya::{
    Ebpf,
    maps::{self, MapData, MapError},
};
use forwarder_common::{
    address::Address,
    flow::{self, Flow, FlowKey, INWARD},
    sessions::SessionsKey as Key,
};

use super::{rules::Lines, take};

type Map = maps::HashMap<MapData, Key, i64>;
type Counts = HashMap<Key, i64>;

/// What the programs and the controller have counted.
pub struct SessionCounts {
    counted: Map,
    corrections: Map,
    /// What `corrections` holds.
    corrected: Counts,
    /// By how much the last look saw too few or too many in the counts; 0 where there were none at all.
    differences: Counts,
}

impl SessionCounts {
    pub fn open(ebpf: &mut Ebpf) -> Result<Self> {
        let corrections: Map = take(ebpf, "CORRECTIONS")?;
        let corrected = read(&corrections)?;
        Ok(Self { counted: take(ebpf, "SESSIONS")?, corrections, corrected, differences: Counts::new() })
    }

    /// Forgets everything.
    pub fn clear(&mut self) -> Result<()> {
        let keys: Vec<Key> = read(&self.counted)?.into_keys().chain(self.corrected.keys().copied()).collect();
        keys.iter().try_for_each(|key| self.forget(key))
    }

    /// What the programs have counted so far; to be asked for before the flows are read.
    pub fn counted(&self) -> Result<Counts> {
        read(&self.counted)
    }

    /// Takes an established flow off that the controller ends. Its inward entry stands for it; the
    /// other one changes nothing.
    pub fn leave<A: Address>(&mut self, key: &FlowKey<A>, flow: &Flow<A>, lines: &Lines) -> Result<()> {
        if !counts(flow) {
            return Ok(());
        }
        for key in keys(key, flow, lines) {
            self.correct(key, -1)?;
        }
        Ok(())
    }

    /// Makes the counts of some rules equal to the established flows at once.
    pub fn adopt(&mut self, slots: &BTreeSet<u32>, Tally(there): &Tally, lines: &Lines) -> Result<()> {
        let counted = read(&self.counted)?;
        let of_slots = slots.iter().filter_map(|slot| lines.get(*slot));
        let epochs: HashSet<u32> = of_slots.flat_map(|line| [line.tcp_epoch, line.udp_epoch]).collect();
        let keys: HashSet<Key> =
            there.keys().chain(counted.keys()).chain(self.corrected.keys()).copied().collect();
        for key in keys.into_iter().filter(|key| epochs.contains(&key.epoch)) {
            let of = |counts: &Counts| counts.get(&key).copied().unwrap_or(0);
            self.correct(key, of(there) - of(&counted) - of(&self.corrected))?;
        }
        Ok(())
    }

    /// Compares the counts with the established flows. `before` is what [`Self::counted`] gave before
    /// the flows were read: where it has changed meanwhile, all between the two is right.
    pub fn compare(&mut self, before: &Counts, Tally(there): &Tally, lines: &Lines) -> Result<()> {
        let after = read(&self.counted)?;
        let known = there.keys().chain(after.keys()).chain(self.corrected.keys());
        let known: HashSet<Key> = known.copied().collect();
        let limited = lines.iter().filter(|line| line.counts_sessions());
        let epochs: HashSet<u32> = limited.flat_map(|line| [line.tcp_epoch, line.udp_epoch]).collect();
        let mut differences = Counts::new();
        for key in known {
            if !epochs.contains(&key.epoch) {
                self.forget(&key)?;
                continue;
            }
            let of = |counts: &Counts| counts.get(&key).copied().unwrap_or(0);
            let corrected = of(&self.corrected);
            let bounds = [of(before) + corrected, of(&after) + corrected];
            let difference = difference(of(there), bounds);
            let last = self.differences.get(&key).copied();
            let is_unused = difference == 0 && of(there) == 0 && bounds == [0, 0];
            if is_unused && last == Some(0) {
                self.forget(&key)?;
                continue;
            }
            let agreed = agreed(difference, last.unwrap_or(0));
            if agreed != 0 {
                log::debug!("{agreed} sessions of epoch {} were not counted", key.epoch);
                self.correct(key, agreed)?;
            } else if difference != 0 || is_unused {
                differences.insert(key, difference);
            }
        }
        self.differences = differences;
        Ok(())
    }

    fn correct(&mut self, key: Key, by: i64) -> Result<()> {
        if by != 0 {
            let corrected = self.corrected.entry(key).or_default();
            *corrected += by;
            self.corrections.insert(key, *corrected, 0).context("cannot correct the sessions of a limit")?;
        }
        Ok(())
    }

    /// A session that begins at this moment may be lost from the counts, and is found by the next looks.
    fn forget(&mut self, key: &Key) -> Result<()> {
        self.corrected.remove(key);
        for map in [&mut self.counted, &mut self.corrections] {
            match map.remove(key) {
                Ok(()) => {}
                Err(MapError::SyscallError(error))
                    if error.io_error.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) => return Err(error).context("cannot forget the sessions of a limit"),
            }
        }
        Ok(())
    }
}

/// Everything in a map. (The programs take nothing out, so that no walk begins anew.)
fn read(map: &Map) -> Result<Counts> {
    map.iter().collect::<Result<_, _>>().context("cannot read the sessions of limits")
}

/// Established flows that count, as far as they have been seen.
#[derive(Default)]
pub struct Tally(Counts);

impl Tally {
    /// Takes in the entry of a flow that is established and alive.
    pub fn see<A: Address>(&mut self, key: &FlowKey<A>, flow: &Flow<A>, lines: &Lines) {
        if counts(flow) {
            keys(key, flow, lines).for_each(|key| *self.0.entry(key).or_default() += 1);
        }
    }
}

/// Whether an established flow's inward entry is of a session that is not over.
fn counts<A: Address>(flow: &Flow<A>) -> bool {
    flow.direction == INWARD && flow.ends == 0 && !flow::is_closing(flow.ended)
}

/// Where a live flow counts.
fn keys<A: Address>(key: &FlowKey<A>, flow: &Flow<A>, lines: &Lines) -> impl Iterator<Item = Key> + use<A> {
    let line = lines.get(flow.rule);
    let all = line.filter(|line| line.max_sessions != 0).map(|_| Key::all(flow.epoch));
    let own =
        line.filter(|line| line.max_sessions_per_source != 0).map(|_| Key::of(flow.epoch, key.tuple.src));
    all.into_iter().chain(own)
}

/// How far a number of flows is from what was counted before and after it was found.
fn difference(there: i64, [before, after]: [i64; 2]) -> i64 {
    there - there.clamp(before.min(after), before.max(after))
}

/// What two differences have in common: one of them may have come about while the flows were read.
fn agreed(one: i64, other: i64) -> i64 {
    if one.signum() != other.signum() {
        return 0;
    }
    if one.abs() < other.abs() { one } else { other }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lies_between_two_readings_is_no_difference() {
        assert_eq!(difference(5, [3, 7]), 0);
        assert_eq!(difference(5, [7, 3]), 0);
        assert_eq!(difference(2, [3, 7]), -1);
        assert_eq!(difference(9, [3, 7]), 2);
    }

    #[test]
    fn only_what_two_looks_have_in_common_is_corrected() {
        assert_eq!(agreed(2, 3), 2);
        assert_eq!(agreed(-4, -3), -3);
        assert_eq!([agreed(2, 0), agreed(0, 2), agreed(2, -1)], [0, 0, 0]);
    }
}
