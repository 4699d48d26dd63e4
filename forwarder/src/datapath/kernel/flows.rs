//! Reads, ends and collects flows.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use aya::{
    Ebpf,
    maps::{self, MapData, MapError},
};
use forwarder_common::{
    address::{Ipv4, Port},
    flow::{self, INWARD, OUTWARD},
    rule::HAIRPIN,
    wire::tcp,
};

use super::{clock, rules::RuleTables};
use crate::datapath::{Count, FlowRecord, TableFill, Timeouts};

type Key = flow::FlowKey<Ipv4>;
type Flow = flow::Flow<Ipv4>;
type Map = maps::HashMap<MapData, Key, Flow>;

/// How long the outward entry of a cut flow stays: the target's late packets are dropped by it,
/// instead of leaving with their private source.
const LINGER: Duration = Duration::from_secs(240);

/// An epoch that no rule has: the store's begin with 1.
const NO_EPOCH: u32 = 0;

/// `BPF_EXIST`: write only over an entry that is there (include/uapi/linux/bpf.h).
const BPF_EXIST: u64 = 2;

/// Between two looks at the tables passes this many times what a look takes: a twentieth of one core.
const PAUSE: u32 = 20;

/// What is shown is at most this old.
const MAX_AGE: Duration = Duration::from_secs(1);

/// The two flow tables.
pub struct FlowTables {
    established: Map,
    half_open: Map,
    capacity: [u64; 2],
    timeouts: Timeouts,
    seen: Seen,
}

/// What the last look at the tables showed.
struct Seen {
    at: Option<Instant>,
    took: Duration,
    /// Live sessions by slot.
    sessions: HashMap<u32, u64>,
    /// Entries of the established and of the half-open table.
    entries: [u64; 2],
    collected_at: Option<Instant>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    Established,
    HalfOpen,
}

impl FlowTables {
    pub fn open(ebpf: &mut Ebpf, timeouts: Timeouts) -> Result<Self> {
        let established = ebpf.take_map("FLOWS").context("the eBPF object has no map FLOWS")?;
        let half_open = ebpf.take_map("HALF_OPEN").context("the eBPF object has no map HALF_OPEN")?;
        let capacity = [max_entries(&established)?, max_entries(&half_open)?];
        Ok(Self {
            established: established.try_into()?,
            half_open: half_open.try_into()?,
            capacity,
            timeouts,
            seen: Seen {
                at: None,
                took: Duration::ZERO,
                sessions: HashMap::new(),
                entries: [0; 2],
                collected_at: None,
            },
        })
    }

    /// Entries that the established and the half-open table have room for; a session takes two.
    pub fn capacity(&self) -> [u64; 2] {
        self.capacity
    }

    pub fn set_timeouts(&mut self, timeouts: Timeouts) {
        self.timeouts = timeouts;
    }

    /// Removes everything.
    pub fn clear(&mut self) -> Result<()> {
        for stage in [Stage::Established, Stage::HalfOpen] {
            for key in self.read(stage)?.keys() {
                self.remove(stage, key)?;
            }
        }
        Ok(())
    }

    fn map(&self, stage: Stage) -> &Map {
        match stage {
            Stage::Established => &self.established,
            Stage::HalfOpen => &self.half_open,
        }
    }

    fn map_mut(&mut self, stage: Stage) -> &mut Map {
        match stage {
            Stage::Established => &mut self.established,
            Stage::HalfOpen => &mut self.half_open,
        }
    }

    fn remove(&mut self, stage: Stage, key: &Key) -> Result<()> {
        match self.map_mut(stage).remove(key) {
            Ok(()) => Ok(()),
            // The kernel's own ending of the flow came first.
            Err(MapError::SyscallError(error)) if error.io_error.kind() == std::io::ErrorKind::NotFound => {
                Ok(())
            }
            Err(error) => Err(error).context("cannot remove a flow"),
        }
    }

    /// Removes both entries of a flow. A packet may make it anew meanwhile, in the other table; if
    /// it did so in this one, its entry would have lost its other half: that goes too.
    fn remove_both(&mut self, stage: Stage, key: &Key, flow: &Flow) -> Result<()> {
        self.remove(stage, key)?;
        self.remove(stage, &flow.other_key(key))?;
        self.remove(stage, key)
    }

    /// Everything in a table. Entries that come or go meanwhile may or may not be in it.
    ///
    /// Where the entry that the walk stands on goes, the kernel starts it over: it ends with a key
    /// that was seen before, or after as many steps as the table has entries.
    fn read(&self, stage: Stage) -> Result<HashMap<Key, Flow>> {
        let map = self.map(stage);
        let mut entries = HashMap::new();
        for key in map.keys().take(self.capacity[stage as usize] as usize) {
            let key = key.context("cannot read the flow table")?;
            let Ok(flow) = map.get(&key, 0) else { continue };
            if entries.insert(key, flow).is_some() {
                break;
            }
        }
        Ok(entries)
    }

    /// Cuts the flows of `slot` whose client `keep` refuses.
    ///
    /// Half-open ones first, the way that a flow goes: one that is promoted meanwhile is met again.
    pub fn cut(&mut self, slot: u32, keep: &dyn Fn(IpAddr) -> bool) -> Result<()> {
        for stage in [Stage::HalfOpen, Stage::Established] {
            for (key, flow) in self.read(stage)? {
                let client = IpAddr::V4(address(key.tuple.src));
                if flow.rule == slot && flow.direction == INWARD && !keep(client) {
                    self.cut_one(stage, &key, &flow)?;
                }
            }
        }
        self.seen.at = None;
        Ok(())
    }

    /// Like the flows of a rule that is gone: the outward entry stays, dead, for the target's late
    /// packets; the inward one of a TCP connection as well, which would else be picked up again.
    fn cut_one(&mut self, stage: Stage, key: &Key, flow: &Flow) -> Result<()> {
        self.kill(stage, &flow.other_key(key));
        if key.protocol == tcp::NUMBER {
            self.kill(stage, key);
            return Ok(());
        }
        self.remove(stage, key)
    }

    fn kill(&mut self, stage: Stage, key: &Key) {
        if let Ok(flow) = self.map(stage).get(key, 0) {
            let dead = Flow { epoch: NO_EPOCH, ..flow };
            // It may be gone meanwhile, and then stays so.
            let _ = self.map_mut(stage).insert(key, dead, BPF_EXIST);
        }
    }

    /// A round of collection, if one is due.
    pub fn collect(&mut self, rules: &RuleTables) -> Result<()> {
        let interval = (self.seen.took * PAUSE).max(Duration::from_secs(1));
        if self.seen.collected_at.is_some_and(|at| at.elapsed() < interval) {
            return Ok(());
        }
        let start = Instant::now();
        for stage in [Stage::Established, Stage::HalfOpen] {
            for (key, flow) in self.read(stage)? {
                let now = clock::monotonic();
                if self.is_over(stage, &key, &flow, rules, now) {
                    self.collect_entry(stage, &key, rules, now)?;
                }
            }
        }
        self.seen.took = start.elapsed();
        self.seen.collected_at = Some(Instant::now());
        Ok(())
    }

    /// Whether an entry alone looks as if its time had come.
    fn is_over(&self, stage: Stage, key: &Key, flow: &Flow, rules: &RuleTables, now: u64) -> bool {
        let idle = clock::since(flow.last_seen, now);
        match is_live(key, flow, rules, now) {
            true => idle > self.idle_time(stage, key, flow),
            // The inward entry of a TCP connection keeps it from being picked up again.
            false => flow.direction == INWARD && key.protocol != tcp::NUMBER || idle > LINGER,
        }
    }

    /// Removes what is over. The entry is read again: since the walk passed it, it may have been
    /// used, or replaced by another flow's.
    fn collect_entry(&mut self, stage: Stage, key: &Key, rules: &RuleTables, now: u64) -> Result<()> {
        let Ok(flow) = self.map(stage).get(key, 0) else { return Ok(()) };
        if !self.is_over(stage, key, &flow, rules, now) {
            return Ok(());
        }
        if !is_live(key, &flow, rules, now) {
            return self.remove(stage, key);
        }
        // Traffic in either direction keeps a flow alive (RFC 4787 REQ-6 asks for outward, allows both).
        match self.map(stage).get(&flow.other_key(key), 0) {
            Ok(other) if !self.is_over(stage, key, &other, rules, now) => Ok(()),
            _ => self.remove_both(stage, key, &flow),
        }
    }

    fn idle_time(&self, stage: Stage, key: &Key, flow: &Flow) -> Duration {
        match (key.protocol == tcp::NUMBER, stage) {
            (true, _) if flow::is_closing(flow.ended) => self.timeouts.tcp_closing,
            (true, Stage::Established) => self.timeouts.tcp_established,
            (true, Stage::HalfOpen) => self.timeouts.tcp_half_open,
            (false, Stage::HalfOpen) if flow.progress == flow::UNANSWERED => self.timeouts.udp_half_open,
            (false, _) => self.timeouts.udp_established,
        }
    }

    /// Looks at the tables, unless a look costs more than its age is worth.
    fn look(&mut self, rules: &RuleTables) -> Result<()> {
        if self.seen.at.is_some_and(|at| at.elapsed() < (self.seen.took * PAUSE).min(MAX_AGE)) {
            return Ok(());
        }
        let start = Instant::now();
        let now = clock::monotonic();
        let established = self.read(Stage::Established)?;
        self.seen.entries = [established.len() as u64, self.half_open.keys().count() as u64];
        self.seen.sessions.clear();
        for (key, flow) in &established {
            if flow.direction == INWARD && is_live(key, flow, rules, now) && !flow::is_closing(flow.ended) {
                *self.seen.sessions.entry(flow.rule).or_default() += 1;
            }
        }
        self.seen.took = start.elapsed();
        self.seen.at = Some(Instant::now());
        Ok(())
    }

    /// Established sessions of a rule that are not over.
    pub fn sessions(&mut self, slot: u32, rules: &RuleTables) -> Result<u64> {
        self.look(rules)?;
        Ok(self.seen.sessions.get(&slot).copied().unwrap_or(0))
    }

    /// Sessions in the established and in the half-open table.
    pub fn fill(&mut self, rules: &RuleTables) -> Result<[TableFill; 2]> {
        self.look(rules)?;
        // A session has two entries; of half-open ones the kernel may have evicted one.
        let fill = |name: &str, at: usize| TableFill {
            name: name.to_owned(),
            entries: self.seen.entries[at].div_ceil(2),
            capacity: self.capacity[at] / 2,
        };
        Ok([fill("flows", 0), fill("half-open", 1)])
    }

    /// All live sessions.
    pub fn list(&self, rules: &RuleTables) -> Result<Vec<FlowRecord>> {
        let now = clock::monotonic();
        let mut records = Vec::new();
        for stage in [Stage::Established, Stage::HalfOpen] {
            let (inward, outward): (Vec<_>, Vec<_>) =
                self.read(stage)?.into_iter().partition(|(_, flow)| flow.direction != OUTWARD);
            let outward: HashMap<Key, Flow> = outward.into_iter().collect();
            let live = inward.iter().filter(|(key, flow)| is_live(key, flow, rules, now));
            records.extend(
                live.map(|(key, flow)| record(stage, key, flow, outward.get(&flow.other_key(key)), now)),
            );
        }
        Ok(records)
    }
}

fn max_entries(map: &maps::Map) -> Result<u64> {
    let (maps::Map::HashMap(data) | maps::Map::LruHashMap(data)) = map else { return Ok(0) };
    Ok(u64::from(data.info()?.max_entries()))
}

fn is_live(key: &Key, flow: &Flow, rules: &RuleTables, now: u64) -> bool {
    rules.line(flow.rule).is_some_and(|line| {
        line.carries(key.protocol, flow.epoch, now)
            && (flow.flags & flow::FROM_INSIDE == 0 || line.flags & HAIRPIN != 0)
    })
}

fn record(stage: Stage, key: &Key, inward: &Flow, outward: Option<&Flow>, now: u64) -> FlowRecord {
    let last_seen = outward.map_or(inward.last_seen, |outward| outward.last_seen.max(inward.last_seen));
    let count = |flow: &Flow| Count { packets: flow.packets, bytes: flow.bytes };
    FlowRecord {
        slot: inward.rule,
        protocol: if key.protocol == tcp::NUMBER { "tcp" } else { "udp" },
        client: socket(key.tuple.src, key.tuple.src_port),
        external: socket(key.tuple.dst, key.tuple.dst_port),
        target: socket(inward.to.dst, inward.to.dst_port),
        state: match stage {
            _ if flow::is_closing(inward.ended) => "closing",
            Stage::Established => "established",
            Stage::HalfOpen => "half-open",
        },
        age: clock::since(inward.created, now),
        idle: clock::since(last_seen, now),
        inward: count(inward),
        outward: outward.map(count).unwrap_or_default(),
    }
}

fn address(address: Ipv4) -> Ipv4Addr {
    address.bytes().into()
}

fn socket(host: Ipv4, port: Port) -> SocketAddr {
    (address(host), port.number()).into()
}
