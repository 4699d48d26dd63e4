//! The data path in the kernel: eBPF programs, their maps, and what the controller does with them.

mod attach;
mod clock;
mod detach_link;
mod flows;
mod host_sessions;
mod load;
mod netfilter;
mod owner;
mod roles;
mod rules;
mod sessions;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use anyhow::{Context as _, Result};
pub use attach::detach;
use attach::{Attached, Pins, XdpKind};
use aya::{
    Ebpf,
    maps::{self, Array, MapData, MapError, PerCpuArray},
};
use aya_log::EbpfLogger;
use flows::FlowTables;
use forwarder_common::{
    flow::Side,
    layout::{self, Hook, LAYOUT_VERSION, Settings, UNFINISHED_CHECKSUMS, XDP_TARGET},
    reason::Reason,
};
use host_sessions::HostSessions;
pub use load::object;
use netfilter::HostFilter;
use roles::Roles;
use rules::RuleTables;

use super::{
    Count, Datapath, FlowRecord, InterfaceStatus, KernelRule, Mode, Options, ReasonCount, RuleCounters,
    TableFill, TableSizes, Timeouts,
};
use crate::network::{Interface, Network};

/// The programs and maps of this machine.
pub struct KernelDatapath {
    ebpf: Ebpf,
    pins: Pins,
    mode: Mode,
    ports: Vec<ConfiguredPort>,
    settings: Array<MapData, Settings>,
    interfaces: maps::HashMap<MapData, u32, layout::Interface>,
    roles: Roles,
    reasons: PerCpuArray<MapData, layout::Count>,
    rules: RuleTables,
    flows: FlowTables,
    host_sessions: HostSessions,
    host_filter: HostFilter,
    /// The eBPF side's lines, rare ones, on their way into this side's log.
    log: Option<EbpfLogger<&'static dyn log::Log>>,
    /// What `INTERFACES` holds.
    described: BTreeMap<u32, layout::Interface>,
    /// Somebody has taken the programs off, and it has been said.
    detached: bool,
}

const TAKEN_OFF: &str =
    "the programs were taken off (`forwarderd detach`): nothing is forwarded until a restart attaches again";

/// An interface that the configuration names, there or not.
struct ConfiguredPort {
    name: String,
    side: Side,
    /// Its index, and what is attached to it.
    attached: Option<(u32, Attached)>,
    /// Why nothing is.
    missing: String,
}

/// Takes a map out of the object by its name and type.
fn take<T>(ebpf: &mut Ebpf, name: &str) -> Result<T>
where
    T: TryFrom<maps::Map, Error = MapError>,
{
    let map = ebpf.take_map(name).with_context(|| format!("the eBPF object has no map {name}"))?;
    T::try_from(map).with_context(|| format!("the map {name} is of another type"))
}

impl KernelDatapath {
    /// Loads the programs over the maps that are there, and attaches them.
    ///
    /// Programs of an earlier controller are replaced in one step, its flows and counters kept.
    pub fn open(options: Options, network: &Network) -> Result<Self> {
        load::check_bpffs(&options.pin_dir)?;
        let pins = Pins::take(&options.pin_dir)?;
        owner::check_namespace(&options.pin_dir)?;
        let mut ebpf = load::load(&options)?;
        let log = EbpfLogger::init(&mut ebpf)
            .inspect_err(|error| log::warn!("the eBPF side's log cannot be followed: {error}"))
            .ok();
        let port = |name: &String, side| ConfiguredPort {
            name: name.clone(),
            side,
            attached: None,
            missing: String::new(),
        };
        let ports = options.external.iter().map(|name| port(name, Side::External));
        let ports = ports.chain(options.internal.iter().map(|name| port(name, Side::Internal))).collect();
        let mut datapath = Self {
            pins,
            mode: options.mode,
            ports,
            settings: take(&mut ebpf, load::SETTINGS)?,
            interfaces: take(&mut ebpf, "INTERFACES")?,
            roles: Roles::open(&mut ebpf)?,
            reasons: take(&mut ebpf, "REASON_COUNTERS")?,
            rules: RuleTables::open(&mut ebpf)?,
            flows: FlowTables::open(&mut ebpf, options.timeouts)?,
            host_sessions: HostSessions::open(&mut ebpf)?,
            host_filter: HostFilter::new(options.mark, &options.external, &options.internal),
            described: BTreeMap::new(),
            detached: false,
            log,
            ebpf,
        };
        datapath.adopt(options.store_id)?;
        datapath.compare_sizes(options.tables);
        datapath.attach_all(network, true)?;
        Ok(datapath)
    }

    /// Maps that are adopted have the size that they were made with.
    fn compare_sizes(&self, wanted: TableSizes) {
        if self.rules.capacity() != wanted.rules || self.flows.capacity() != FlowTables::entries(wanted) {
            log::warn!(
                "the pinned maps keep their sizes; `forwarderd detach` before a start gives them those configured, and ends all flows"
            );
        }
    }

    /// Of another store, flows mean nothing: their rules' slots are others.
    fn adopt(&mut self, store_id: u64) -> Result<()> {
        let settings = self.settings.get(&0, 0)?;
        if settings.layout != 0 && settings.store_id != store_id {
            log::warn!("the maps were filled from another store; their flows are ended");
            // Rules first: the programs that are attached would make flows of them meanwhile.
            self.rules.reconcile(&[])?;
            self.flows.clear()?;
        }
        let settings = Settings {
            store_id,
            layout: LAYOUT_VERSION,
            controller: std::process::id(),
            namespace: owner::network_namespace()?,
            ..settings
        };
        self.settings.set(0, settings, 0).context("cannot write the settings")?;
        for described in self.interfaces.iter() {
            let (index, interface) = described?;
            self.described.insert(index, interface);
        }
        Ok(())
    }

    /// Attaches where nothing is yet and describes each interface. An interface that cannot be
    /// attached to is an error at the start, later a state that `status` shows.
    fn attach_all(&mut self, network: &Network, starting: bool) -> Result<()> {
        self.notice_detached();
        if self.detached {
            return Ok(());
        }
        for port in &mut self.ports {
            let Some(interface) = network.interface(&port.name) else {
                if port.attached.is_some() {
                    log::warn!("{}: the interface is gone; waiting for it", port.name);
                }
                port.attached = None;
                port.missing = "there is no such interface now; it is attached to when it comes".to_owned();
                continue;
            };
            if port.attached.as_ref().is_some_and(|(index, _)| *index == interface.index) {
                continue;
            }
            if interface.mac.is_none() && !interface.is_bare {
                port.attached = None;
                port.missing =
                    "it has another header than Ethernet's before its packets: that is not supported"
                        .to_owned();
                log::warn!("{}: {}", port.name, port.missing);
                continue;
            }
            match self.pins.attach(&mut self.ebpf, interface, port.side == Side::External, self.mode) {
                Ok(attached) => {
                    let xdp = attached.xdp.map_or("no XDP", XdpKind::name);
                    log::info!("{}: {} and {xdp} ({})", port.name, attached.tc, attached.why);
                    let is_veth = interface.kind.as_deref() == Some("veth");
                    if is_veth && interface.sends_for_xdp.is_none() && attached.xdp == Some(XdpKind::Native) {
                        log::warn!(
                            "{}: before Linux 6.3 nobody can see whether a veth's peer takes frames from XDP; it has to have GRO on",
                            port.name
                        );
                    }
                    port.attached = Some((interface.index, attached));
                }
                Err(error) if starting => return Err(error),
                Err(error) => {
                    if port.missing != format!("{error:#}") {
                        log::error!("{}: {error:#}", port.name);
                    }
                    port.missing = format!("{error:#}");
                }
            }
        }
        let indices: BTreeSet<u32> =
            self.ports.iter().filter_map(|port| Some(port.attached.as_ref()?.0)).collect();
        self.pins.retain(&indices);
        self.roles.follow_network(network)?;
        self.describe(network)
    }

    /// Says once that somebody has taken the programs off. From then on nothing is attached.
    fn notice_detached(&mut self) {
        let is_off = |port: &ConfiguredPort| {
            port.attached.as_ref().is_some_and(|(index, _)| !self.pins.is_attached(*index))
        };
        if !self.detached && self.ports.iter().any(is_off) {
            self.detached = true;
            log::warn!("{TAKEN_OFF}");
        }
    }

    /// Writes what the packet path has to know of the interfaces, and starts a new generation of hops.
    fn describe(&mut self, network: &Network) -> Result<()> {
        let mut wanted = BTreeMap::new();
        for port in &self.ports {
            let Some((index, attached)) = &port.attached else { continue };
            if let Some(interface) = network.interfaces.iter().find(|interface| interface.index == *index) {
                wanted.insert(*index, describe(interface, port.side, attached, self.mode));
            }
        }
        for (index, interface) in &wanted {
            if self.described.get(index) != Some(interface) {
                self.interfaces.insert(index, interface, 0).context("cannot describe an interface")?;
            }
        }
        for index in self.described.keys().filter(|index| !wanted.contains_key(index)) {
            self.interfaces.remove(index).context("cannot forget an interface")?;
        }
        self.described = wanted;
        let settings = self.settings.get(&0, 0)?;
        let settings = Settings { generation: settings.generation.wrapping_add(1), ..settings };
        self.settings.set(0, settings, 0).context("cannot start a new generation of hops")
    }
}

fn describe(interface: &Interface, side: Side, attached: &Attached, mode: Mode) -> layout::Interface {
    let hardware = interface.kind.is_none();
    // Generic XDP sees skbs, whose checksum may be unfinished on any interface.
    let finished = hardware && attached.xdp == Some(XdpKind::Native);
    // Before Linux 6.3 it does not say: who has asked for native XDP on a veth vouches for its peer.
    let sends = interface.sends_for_xdp.unwrap_or(attached.xdp == Some(XdpKind::Native));
    let target = !interface.is_bare && (mode == Mode::XdpGeneric || sends);
    layout::Interface {
        mtu: interface.mtu,
        mac: interface.mac.unwrap_or_default(),
        side: side as u8,
        flags: if finished { 0 } else { UNFINISHED_CHECKSUMS } | if target { XDP_TARGET } else { 0 },
    }
}

impl Datapath for KernelDatapath {
    fn keep(&mut self) {
        self.pins.keep();
        // Last, so that a start that fails leaves no table.
        self.host_filter.follow();
    }

    fn rule_capacity(&self) -> u32 {
        self.rules.capacity()
    }

    fn reconcile(&mut self, wanted: &[KernelRule]) -> Result<()> {
        self.roles.follow_rules(wanted)?;
        self.host_sessions.spare(wanted);
        self.rules.reconcile(wanted)?;
        if self.rules.take_yielded() {
            self.flows.yield_ports(&self.rules)?;
        }
        let uncounted = self.rules.take_uncounted();
        self.flows.recount(&uncounted, &self.rules)
    }

    fn cut_flows(&mut self, slot: u32, keep: &dyn Fn(IpAddr) -> bool) -> Result<()> {
        self.flows.cut(slot, keep, &self.rules)
    }

    fn network_changed(&mut self, network: &Network) -> Result<()> {
        self.attach_all(network, false)
    }

    fn collect(&mut self) -> Result<()> {
        self.notice_detached();
        if !self.detached {
            self.host_filter.follow();
        }
        if let Some(log) = &mut self.log {
            log.flush();
        }
        self.rules.follow_clock()?;
        self.flows.collect(&self.rules)
    }

    fn counters(&mut self, slot: u32) -> Result<RuleCounters> {
        let counters = self.rules.counters(slot)?;
        let count = |count: layout::Count| Count { packets: count.packets, bytes: count.bytes };
        let reasons = Reason::ALL[Reason::FIRST_DROP..].iter().map(|reason| reason.name());
        Ok(RuleCounters {
            inward: count(counters.inward),
            outward: count(counters.outward),
            sessions_active: self.flows.sessions(slot, &self.rules)?,
            sessions_total: counters.sessions,
            dropped: reasons.zip(counters.dropped).filter(|(_, packets)| *packets > 0).collect(),
        })
    }

    fn refused(&mut self, slot: u32) -> Result<u64> {
        let dropped = self.rules.counters(slot)?.dropped;
        let of = |reason: Reason| dropped.get(reason as usize - Reason::FIRST_DROP).copied().unwrap_or(0);
        Ok([Reason::SessionLimit, Reason::SourceLimit, Reason::RateLimit].map(of).iter().sum())
    }

    fn flows(&mut self) -> Result<Vec<FlowRecord>> {
        self.flows.list(&self.rules)
    }

    fn reasons(&mut self) -> Result<Vec<ReasonCount>> {
        let mut reasons = Vec::new();
        for hook in Hook::ALL {
            for &reason in Reason::ALL {
                let mut sum = Count::default();
                for cpu in self.reasons.get(&layout::reason_index(hook, reason), 0)?.iter() {
                    sum.packets += cpu.packets;
                    sum.bytes += cpu.bytes;
                }
                if sum.packets > 0 {
                    reasons.push(ReasonCount {
                        path: hook.name().to_owned(),
                        reason: reason.name().to_owned(),
                        verdict: reason.verdict().name().to_owned(),
                        count: sum,
                    });
                }
            }
        }
        Ok(reasons)
    }

    fn warnings(&self) -> Vec<String> {
        if self.detached { vec![TAKEN_OFF.to_owned()] } else { self.host_filter.warnings() }
    }

    fn interfaces(&self) -> Vec<InterfaceStatus> {
        let status = |port: &ConfiguredPort| {
            let attached = port.attached.as_ref().filter(|(index, _)| self.pins.is_attached(*index));
            let missing = match port.attached {
                Some(_) => "taken off by `forwarderd detach`; a restart attaches again",
                None => &port.missing,
            };
            InterfaceStatus {
                name: port.name.clone(),
                index: attached.map(|(index, _)| *index),
                side: if port.side == Side::External { "external" } else { "internal" }.to_owned(),
                xdp: attached.and_then(|(_, attached)| attached.xdp).map_or("none", XdpKind::name).to_owned(),
                tc: attached.map_or("none", |(_, attached)| attached.tc).to_owned(),
                why: attached.map_or(missing, |(_, attached)| &attached.why).to_owned(),
            }
        };
        self.ports.iter().map(status).collect()
    }

    fn tables(&mut self) -> Result<Vec<TableFill>> {
        let (rules, pages) = self.rules.fill();
        let fill = |name: &str, entries: usize, capacity: u32| TableFill {
            name: name.to_owned(),
            entries: entries as u64,
            capacity: u64::from(capacity),
        };
        let mut tables =
            vec![fill("rules", rules, self.rules.capacity()), fill("ports", pages, load::PORTS_CAPACITY)];
        tables.extend(self.flows.fill(&self.rules)?);
        Ok(tables)
    }

    fn set_timeouts(&mut self, timeouts: &Timeouts) -> Result<()> {
        self.flows.set_timeouts(*timeouts);
        Ok(())
    }
}
