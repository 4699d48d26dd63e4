//! Reads, ends and collects flows.

mod batch;
mod table;

use std::{
    collections::{BTreeSet, HashMap},
    net::IpAddr,
    time::{Duration, Instant},
};

use anyhow::Result;
use aya::Ebpf;
use forwarder_common::{
    address::{Address, Ipv4, Ipv6},
    flow::{self, Flow, FlowKey, INWARD},
    wire::tcp,
};
use table::{Moment, STAGES, Stage, Tables, address, is_live};

use super::{
    clock,
    rules::{Lines, RuleTables},
    sessions::{SessionCounts, Tally},
};
use crate::datapath::{FlowRecord, TableFill, TableSizes, Timeouts};

/// Between two looks at the tables passes this many times what a look takes: a twentieth of one core.
const PAUSE: u32 = 20;

/// What is shown is at most this old.
const MAX_AGE: Duration = Duration::from_secs(1);

/// The flow tables of both families.
pub struct FlowTables {
    ipv4: Tables<Ipv4>,
    ipv6: Tables<Ipv6>,
    sessions: SessionCounts,
    timeouts: Timeouts,
    seen: Seen,
    collected_at: Option<Instant>,
}

/// What the last look at the tables showed.
#[derive(Default)]
struct Seen {
    at: Option<Instant>,
    took: Duration,
    /// Live sessions by slot.
    sessions: HashMap<u32, u64>,
    /// Entries by table, in the order of [`TABLES`].
    entries: [u64; TABLES.len()],
}

/// The tables as `status` names them: which stage, whether of IPv6.
const TABLES: [(&str, Stage, bool); 4] = [
    ("flows", Stage::Established, false),
    ("half-open", Stage::HalfOpen, false),
    ("flows-ipv6", Stage::Established, true),
    ("half-open-ipv6", Stage::HalfOpen, true),
];

impl Seen {
    fn count<A: Address>(&mut self, stage: Stage, key: &FlowKey<A>, flow: &Flow<A>, moment: Moment<'_>) {
        let is_ipv6 = size_of::<A>() == size_of::<Ipv6>();
        if let Some(at) = TABLES.iter().position(|(_, of, ipv6)| (*of, *ipv6) == (stage, is_ipv6)) {
            self.entries[at] += 1;
        }
        let is_session = stage == Stage::Established && flow.direction == INWARD;
        if is_session && !flow::is_closing(flow.ended) && is_live(key, flow, moment) {
            *self.sessions.entry(flow.rule).or_default() += 1;
        }
    }

    fn done(mut self, start: Instant) -> Self {
        (self.at, self.took) = (Some(Instant::now()), start.elapsed());
        self
    }
}

/// Counts an established flow, if it is alive.
fn take_in<A: Address>(tally: &mut Tally, key: &FlowKey<A>, flow: &Flow<A>, moment: Moment<'_>) {
    if is_live(key, flow, moment) {
        tally.see(key, flow, moment.lines);
    }
}

impl FlowTables {
    pub fn open(ebpf: &mut Ebpf, timeouts: Timeouts) -> Result<Self> {
        Ok(Self {
            ipv4: Tables::open(ebpf, "")?,
            ipv6: Tables::open(ebpf, "_IPV6")?,
            sessions: SessionCounts::open(ebpf)?,
            timeouts,
            seen: Seen::default(),
            collected_at: None,
        })
    }

    /// Entries that the tables have room for, in the order of [`FlowTables::entries`]; a session takes two.
    pub fn capacity(&self) -> [u64; TABLES.len()] {
        TABLES.map(|(_, stage, ipv6)| match ipv6 {
            true => self.ipv6.capacity(stage),
            false => self.ipv4.capacity(stage),
        })
    }

    /// Entries for as many sessions as are asked for.
    pub fn entries(sizes: TableSizes) -> [u64; TABLES.len()] {
        [sizes.flows, sizes.half_open, sizes.flows_ipv6, sizes.half_open_ipv6]
            .map(|sessions| u64::from(sessions) * 2)
    }

    pub fn set_timeouts(&mut self, timeouts: Timeouts) {
        self.timeouts = timeouts;
    }

    /// Removes everything.
    pub fn clear(&mut self) -> Result<()> {
        self.sessions.clear()?;
        self.ipv4.clear()?;
        self.ipv6.clear()
    }

    /// Cuts the flows of `slot` whose client `keep` refuses.
    pub fn cut(&mut self, slot: u32, keep: &dyn Fn(IpAddr) -> bool, rules: &RuleTables) -> Result<()> {
        fn refused<A: Address>(
            slot: u32,
            keep: &dyn Fn(IpAddr) -> bool,
        ) -> impl Fn(&FlowKey<A>, &Flow<A>) -> bool {
            move |key, flow| flow.rule == slot && !keep(address(key.tuple.src))
        }
        self.seen.at = None;
        let lines = rules.lines();
        self.ipv4.cut(refused(slot, keep), &lines, &mut self.sessions)?;
        self.ipv6.cut(refused(slot, keep), &lines, &mut self.sessions)
    }

    /// Cuts the UDP flows of a DMZ host to ports that now are another rule's: that one is to work at
    /// once. TCP connections stay to their end, as they do when a target changes.
    pub fn yield_ports(&mut self, rules: &RuleTables) -> Result<()> {
        fn yielded<A: Address>(rules: &RuleTables) -> impl Fn(&FlowKey<A>, &Flow<A>) -> bool {
            |key, flow| key.protocol != tcp::NUMBER && rules.has_yielded(flow.rule, key)
        }
        let lines = rules.lines();
        self.ipv4.cut(yielded(rules), &lines, &mut self.sessions)?;
        self.ipv6.cut(yielded(rules), &lines, &mut self.sessions)
    }

    /// Counts the sessions of rules that have been given a limit on them.
    pub fn recount(&mut self, slots: &BTreeSet<u32>, rules: &RuleTables) -> Result<()> {
        if slots.is_empty() {
            return Ok(());
        }
        let (lines, mut tally) = (rules.lines(), Tally::default());
        let moment = Moment { lines: &lines, timeouts: &self.timeouts, now: clock::monotonic() };
        self.ipv4.each(Stage::Established, |key, flow| take_in(&mut tally, key, flow, moment))?;
        self.ipv6.each(Stage::Established, |key, flow| take_in(&mut tally, key, flow, moment))?;
        self.sessions.adopt(slots, &tally, &lines)
    }

    /// A round of collection, if one is due. Counts what it sees.
    pub fn collect(&mut self, rules: &RuleTables) -> Result<()> {
        let interval = (self.seen.took * PAUSE).max(Duration::from_secs(1));
        if self.collected_at.is_some_and(|at| at.elapsed() < interval) {
            return Ok(());
        }
        let (start, mut seen) = (Instant::now(), Seen::default());
        let (lines, mut tally) = (rules.lines(), Tally::default());
        let moment = Moment { lines: &lines, timeouts: &self.timeouts, now: clock::monotonic() };
        let counted = self.sessions.counted()?;
        self.ipv4.collect(moment, &mut self.sessions, |stage, key, flow| {
            seen.count(stage, key, flow, moment);
            if stage == Stage::Established {
                take_in(&mut tally, key, flow, moment);
            }
        })?;
        self.ipv6.collect(moment, &mut self.sessions, |stage, key, flow| {
            seen.count(stage, key, flow, moment);
            if stage == Stage::Established {
                take_in(&mut tally, key, flow, moment);
            }
        })?;
        self.sessions.compare(&counted, &tally, &lines)?;
        self.seen = seen.done(start);
        self.collected_at = Some(Instant::now());
        Ok(())
    }

    /// Looks at the tables, unless a look costs more than its age is worth.
    fn look(&mut self, rules: &RuleTables) -> Result<()> {
        if self.seen.at.is_some_and(|at| at.elapsed() < (self.seen.took * PAUSE).min(MAX_AGE)) {
            return Ok(());
        }
        let (start, mut seen) = (Instant::now(), Seen::default());
        let moment = Moment { lines: &rules.lines(), timeouts: &self.timeouts, now: clock::monotonic() };
        for stage in STAGES {
            self.ipv4.each(stage, |key, flow| seen.count(stage, key, flow, moment))?;
            self.ipv6.each(stage, |key, flow| seen.count(stage, key, flow, moment))?;
        }
        self.seen = seen.done(start);
        Ok(())
    }

    /// Established sessions of a rule that are not over.
    pub fn sessions(&mut self, slot: u32, rules: &RuleTables) -> Result<u64> {
        self.look(rules)?;
        Ok(self.seen.sessions.get(&slot).copied().unwrap_or(0))
    }

    /// Sessions in each of the tables.
    pub fn fill(&mut self, rules: &RuleTables) -> Result<Vec<TableFill>> {
        self.look(rules)?;
        // A session has two entries; of half-open ones the kernel may have evicted one.
        let fill = |((name, ..), (entries, capacity)): (&(&str, Stage, bool), (u64, u64))| TableFill {
            name: (*name).to_owned(),
            entries: entries.div_ceil(2),
            capacity: capacity / 2,
        };
        Ok(TABLES.iter().zip(self.seen.entries.into_iter().zip(self.capacity())).map(fill).collect())
    }

    /// All live sessions.
    pub fn list(&self, rules: &RuleTables) -> Result<Vec<FlowRecord>> {
        let moment = Moment { lines: &rules.lines(), timeouts: &self.timeouts, now: clock::monotonic() };
        let mut records = Vec::new();
        self.ipv4.list(moment, &mut records)?;
        self.ipv6.list(moment, &mut records)?;
        Ok(records)
    }
}
