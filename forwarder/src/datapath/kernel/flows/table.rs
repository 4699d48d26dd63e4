//! The two flow tables of one address family.

use std::{net::IpAddr, os::fd::AsFd as _, time::Duration};

use anyhow::{Context as _, Result};
use aya::{
    Ebpf,
    maps::{self, Map, MapData, MapError},
};
use forwarder_common::{
    address::{Address, Ipv4, Port},
    flow::{self, Flow, FlowKey, INWARD},
    rule::HAIRPIN,
    wire::tcp,
};

use super::{Lines, SessionCounts, batch::Reader, clock};
use crate::datapath::{Count, FlowRecord, Timeouts};

/// How long the outward entry of a cut flow stays: the target's late packets are dropped by it,
/// instead of leaving with their private source.
const LINGER: Duration = Duration::from_secs(240);

/// An epoch that no rule has: the store's begin with 1.
const NO_EPOCH: u32 = 0;

/// `BPF_EXIST`: write only over an entry that is there (include/uapi/linux/bpf.h).
const BPF_EXIST: u64 = 2;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    Established,
    HalfOpen,
}

/// Half-open flows first, the way that a flow goes: one that is promoted meanwhile is met again.
pub const STAGES: [Stage; 2] = [Stage::HalfOpen, Stage::Established];

/// A flow table in the kernel.
struct Table<A: Address> {
    map: maps::HashMap<MapData, FlowKey<A>, Flow<A>>,
    reader: Reader<FlowKey<A>, Flow<A>>,
    capacity: u64,
}

impl<A: Address> Table<A> {
    fn open(ebpf: &mut Ebpf, name: &str) -> Result<Self> {
        let map = ebpf.take_map(name).with_context(|| format!("the eBPF object has no map {name}"))?;
        let (Map::HashMap(data) | Map::LruHashMap(data)) = &map else {
            anyhow::bail!("the map {name} is of another type");
        };
        let reader = Reader::new(data.fd().as_fd().try_clone_to_owned()?);
        let capacity = u64::from(data.info()?.max_entries());
        Ok(Self { map: map.try_into()?, reader, capacity })
    }
}

/// Both tables of a family.
pub struct Tables<A: Address> {
    established: Table<A>,
    half_open: Table<A>,
}

/// What a look at the tables is made against.
#[derive(Clone, Copy)]
pub struct Moment<'a> {
    pub lines: &'a Lines,
    pub timeouts: &'a Timeouts,
    /// Monotonic clock in ns.
    pub now: u64,
}

impl<A: Address> Tables<A> {
    /// `suffix`: of the maps' names.
    pub fn open(ebpf: &mut Ebpf, suffix: &str) -> Result<Self> {
        Ok(Self {
            established: Table::open(ebpf, &format!("FLOWS{suffix}"))?,
            half_open: Table::open(ebpf, &format!("HALF_OPEN{suffix}"))?,
        })
    }

    /// Entries that a table has room for; a session takes two.
    pub fn capacity(&self, stage: Stage) -> u64 {
        self.table(stage).capacity
    }

    fn table(&self, stage: Stage) -> &Table<A> {
        match stage {
            Stage::Established => &self.established,
            Stage::HalfOpen => &self.half_open,
        }
    }

    fn table_mut(&mut self, stage: Stage) -> &mut Table<A> {
        match stage {
            Stage::Established => &mut self.established,
            Stage::HalfOpen => &mut self.half_open,
        }
    }

    fn get(&self, stage: Stage, key: &FlowKey<A>) -> Option<Flow<A>> {
        self.table(stage).map.get(key, 0).ok()
    }

    /// Every entry of a table; see [`Reader`].
    pub fn each(&self, stage: Stage, mut see: impl FnMut(&FlowKey<A>, &Flow<A>)) -> Result<()> {
        let see_all = |keys: &[FlowKey<A>], flows: &[Flow<A>]| {
            keys.iter().zip(flows).for_each(|(key, flow)| see(key, flow));
        };
        self.table(stage).reader.read(see_all).context("cannot read the flow table")
    }

    /// The entries that `wanted` likes.
    fn matching(
        &self,
        stage: Stage,
        wanted: impl Fn(&FlowKey<A>, &Flow<A>) -> bool,
    ) -> Result<Vec<(FlowKey<A>, Flow<A>)>> {
        let mut found = Vec::new();
        self.each(stage, |key, flow| {
            if wanted(key, flow) {
                found.push((*key, *flow));
            }
        })?;
        Ok(found)
    }

    /// Removes everything.
    pub fn clear(&mut self) -> Result<()> {
        for stage in STAGES {
            for (key, _) in self.matching(stage, |_, _| true)? {
                self.remove(stage, &key)?;
            }
        }
        Ok(())
    }

    fn remove(&mut self, stage: Stage, key: &FlowKey<A>) -> Result<()> {
        match self.table_mut(stage).map.remove(key) {
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
    fn remove_both(&mut self, stage: Stage, key: &FlowKey<A>, flow: &Flow<A>) -> Result<()> {
        self.remove(stage, key)?;
        self.remove(stage, &flow.other_key(key))?;
        self.remove(stage, key)
    }

    /// Cuts the flows whose inward entry `refused` names.
    pub fn cut(
        &mut self,
        refused: impl Fn(&FlowKey<A>, &Flow<A>) -> bool,
        lines: &Lines,
        sessions: &mut SessionCounts,
    ) -> Result<()> {
        for stage in STAGES {
            let refused = |key: &FlowKey<A>, flow: &Flow<A>| flow.direction == INWARD && refused(key, flow);
            for (key, flow) in self.matching(stage, refused)? {
                if stage == Stage::Established {
                    sessions.leave(&key, &flow, lines)?;
                }
                self.cut_one(stage, &key, &flow)?;
            }
        }
        Ok(())
    }

    /// Like the flows of a rule that is gone: the outward entry stays, dead, for the target's late
    /// packets; the inward one of a TCP connection as well, which would else be picked up again.
    fn cut_one(&mut self, stage: Stage, key: &FlowKey<A>, flow: &Flow<A>) -> Result<()> {
        self.kill(stage, &flow.other_key(key));
        if key.protocol == tcp::NUMBER {
            self.kill(stage, key);
            return Ok(());
        }
        self.remove(stage, key)
    }

    fn kill(&mut self, stage: Stage, key: &FlowKey<A>) {
        if let Some(flow) = self.get(stage, key) {
            let dead = Flow { epoch: NO_EPOCH, ..flow };
            // It may be gone meanwhile, and then stays so.
            let _ = self.table_mut(stage).map.insert(key, dead, BPF_EXIST);
        }
    }

    /// Removes what is idle or cut for too long. Gives every entry that stays in a table to `stays`.
    pub fn collect(
        &mut self,
        moment: Moment<'_>,
        sessions: &mut SessionCounts,
        mut stays: impl FnMut(Stage, &FlowKey<A>, &Flow<A>),
    ) -> Result<()> {
        for stage in STAGES {
            let mut over = Vec::new();
            self.each(stage, |key, flow| match is_over(stage, key, flow, moment) {
                true => over.push(*key),
                false => stays(stage, key, flow),
            })?;
            for key in over {
                if let Some(flow) = self.collect_entry(stage, &key, moment, sessions)? {
                    stays(stage, &key, &flow);
                }
            }
        }
        Ok(())
    }

    /// Removes what is over. The entry is read again: since the walk passed it, it may have been
    /// used, or replaced by another flow's. Gives it if it stays.
    fn collect_entry(
        &mut self,
        stage: Stage,
        key: &FlowKey<A>,
        moment: Moment<'_>,
        sessions: &mut SessionCounts,
    ) -> Result<Option<Flow<A>>> {
        let Some(flow) = self.get(stage, key) else { return Ok(None) };
        if !is_over(stage, key, &flow, moment) {
            return Ok(Some(flow));
        }
        if !is_live(key, &flow, moment) {
            self.remove(stage, key)?;
            return Ok(None);
        }
        // Traffic in either direction keeps a flow alive (RFC 4787 REQ-6 asks for outward, allows both).
        let other_key = flow.other_key(key);
        let other = self.get(stage, &other_key);
        if other.is_some_and(|other| !is_over(stage, key, &other, moment)) {
            return Ok(Some(flow));
        }
        if stage == Stage::Established {
            sessions.leave(key, &flow, moment.lines)?;
            if let Some(other) = other {
                sessions.leave(&other_key, &other, moment.lines)?;
            }
        }
        self.remove_both(stage, key, &flow)?;
        Ok(None)
    }

    /// All live sessions.
    pub fn list(&self, moment: Moment<'_>, records: &mut Vec<FlowRecord>) -> Result<()> {
        for stage in STAGES {
            let live =
                |key: &FlowKey<A>, flow: &Flow<A>| flow.direction == INWARD && is_live(key, flow, moment);
            for (key, flow) in self.matching(stage, live)? {
                let outward = self.get(stage, &flow.other_key(&key));
                records.push(record(stage, &key, &flow, outward.as_ref(), moment.now));
            }
        }
        Ok(())
    }
}

/// Whether a flow's rule still carries it.
pub fn is_live<A: Address>(key: &FlowKey<A>, flow: &Flow<A>, moment: Moment<'_>) -> bool {
    moment.lines.get(flow.rule).is_some_and(|line| {
        line.carries(key.protocol, flow.epoch, moment.now)
            && (flow.flags & flow::FROM_INSIDE == 0 || line.flags & HAIRPIN != 0)
    })
}

/// Whether an entry alone looks as if its time had come.
fn is_over<A: Address>(stage: Stage, key: &FlowKey<A>, flow: &Flow<A>, moment: Moment<'_>) -> bool {
    let idle = clock::since(flow.last_seen, moment.now);
    match is_live(key, flow, moment) {
        true => idle > idle_time(stage, key, flow, moment.timeouts),
        // The inward entry of a TCP connection keeps it from being picked up again.
        false => flow.direction == INWARD && key.protocol != tcp::NUMBER || idle > LINGER,
    }
}

fn idle_time<A: Address>(stage: Stage, key: &FlowKey<A>, flow: &Flow<A>, timeouts: &Timeouts) -> Duration {
    match (key.protocol == tcp::NUMBER, stage) {
        (true, _) if flow::is_closing(flow.ended) => timeouts.tcp_closing,
        (true, Stage::Established) => timeouts.tcp_established,
        (true, Stage::HalfOpen) => timeouts.tcp_half_open,
        (false, Stage::HalfOpen) if flow.progress == flow::UNANSWERED => timeouts.udp_half_open,
        (false, _) => timeouts.udp_established,
    }
}

fn record<A: Address>(
    stage: Stage,
    key: &FlowKey<A>,
    inward: &Flow<A>,
    outward: Option<&Flow<A>>,
    now: u64,
) -> FlowRecord {
    let last_seen = outward.map_or(inward.last_seen, |outward| outward.last_seen.max(inward.last_seen));
    let count = |flow: &Flow<A>| Count { packets: flow.packets, bytes: flow.bytes };
    let socket = |host, port: Port| (address(host), port.number()).into();
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

pub fn address<A: Address>(address: A) -> IpAddr {
    match Ipv4::from_mapped(address.mapped()) {
        Some(address) => IpAddr::from(address.bytes()),
        None => IpAddr::from(address.mapped().bytes()),
    }
}
