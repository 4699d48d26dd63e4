//! Keeps the kernel's rule lines, ports and allow lists equal to what is wanted.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    net::IpAddr,
};

use anyhow::{Context as _, Result};
use aya::{
    Ebpf,
    maps::{self, Array, MapData, PerCpuArray, PerCpuValues, lpm_trie},
};
use forwarder_common::{
    address::{Address, Ipv4, Ipv6},
    flow::{FlowKey, Tuple},
    layout::RuleCounters,
    rule::{self, ALLOW_LIST_BITS, AllowKey, MAPPED_BITS, Page, PageKey},
    wire::{tcp, udp},
};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::{clock::Offset, take};
use crate::{
    datapath::{Epoch, KernelRule},
    rule::{Limits, PortRange, Protocol},
};

type Line = rule::Rule;
type Pages = HashMap<PageKey, Page>;

/// A line that no packet takes part in.
const EMPTY: Line = Line {
    expires: 0,
    flags: 0,
    tcp_epoch: 0,
    udp_epoch: 0,
    allow_list: 0,
    target: Ipv6::UNSPECIFIED,
    target_port: 0,
    external_port: 0,
    external_last: 0,
    max_sessions: 0,
    max_sessions_per_source: 0,
    new_per_second: 0,
};

/// The lines of all slots, for a look at many flows.
pub struct Lines(Vec<Line>);

impl Lines {
    /// The line of a slot, if there may be a rule.
    pub fn get(&self, slot: u32) -> Option<&Line> {
        self.0.get(slot as usize)
    }

    pub fn iter(&self) -> impl Iterator<Item = &Line> {
        self.0.iter()
    }
}

/// The maps that rules are made of, and what is in them.
pub struct RuleTables {
    lines: Array<MapData, Line>,
    ports: maps::HashMap<MapData, PageKey, Page>,
    allow: lpm_trie::LpmTrie<MapData, AllowKey, u8>,
    counters: PerCpuArray<MapData, RuleCounters>,
    /// By slot; slots not in it hold the empty line.
    applied: BTreeMap<u32, Applied>,
    /// Whose counters a slot without a rule still has.
    emptied: HashMap<u32, Epoch>,
    pages: Pages,
    next_list: u32,
    /// Lists that no line names any more.
    stale_lists: Vec<(u32, Vec<IpNet>)>,
    /// Slots of rules with sessions that nobody has counted, or that count no more.
    uncounted: BTreeSet<u32>,
    /// Ports that a rule with [`rule::DMZ`] has may have gone to another.
    yielded: bool,
    /// The clocks' distance when the lines' expiries were written.
    offset: Offset,
}

#[derive(Clone)]
struct Applied {
    line: Line,
    /// What the allow list was made from.
    allow: Vec<IpNet>,
    expires_at: Option<jiff::Timestamp>,
}

impl RuleTables {
    /// Takes the maps over, with what an earlier controller left in them.
    pub fn open(ebpf: &mut Ebpf) -> Result<Self> {
        let mut tables = Self {
            lines: take(ebpf, "RULES")?,
            ports: take(ebpf, "PORTS")?,
            allow: take(ebpf, "ALLOW")?,
            counters: take(ebpf, "RULE_COUNTERS")?,
            applied: BTreeMap::new(),
            emptied: HashMap::new(),
            pages: HashMap::new(),
            next_list: 1,
            stale_lists: Vec::new(),
            uncounted: BTreeSet::new(),
            yielded: false,
            offset: Offset::now(),
        };
        tables.read().context("cannot read the rule maps")?;
        Ok(tables)
    }

    fn read(&mut self) -> Result<()> {
        let mut lists: HashMap<u32, Vec<IpNet>> = HashMap::new();
        for key in self.allow.keys() {
            let key = key?;
            let list = u32::from_be_bytes(key.data().list);
            lists.entry(list).or_default().push(network(&key)?);
        }
        self.next_list = lists.keys().max().map_or(1, |list| list + 1);
        for slot in 0..self.lines.len() {
            let line = self.lines.get(&slot, 0)?;
            if line.flags & rule::ACTIVE == 0 {
                continue;
            }
            let mut allow = lists.remove(&line.allow_list).unwrap_or_default();
            allow.sort();
            self.next_list = self.next_list.max(line.allow_list + 1);
            self.applied.insert(slot, Applied { line, allow, expires_at: None });
        }
        // Of a controller that died before it could clear up.
        for (list, nets) in lists {
            self.remove_list(list, &nets);
        }
        for page in self.ports.iter() {
            let (key, page) = page?;
            self.pages.insert(key, page);
        }
        Ok(())
    }

    pub fn capacity(&self) -> u32 {
        self.lines.len()
    }

    /// Gives the slots of rules whose sessions have to be counted anew, once.
    pub fn take_uncounted(&mut self) -> BTreeSet<u32> {
        std::mem::take(&mut self.uncounted)
    }

    /// Whether a rule that yields its ports may have lost some, once.
    pub fn take_yielded(&mut self) -> bool {
        std::mem::take(&mut self.yielded)
    }

    /// Whether a rule has yielded a port, which is another's now.
    pub fn has_yielded<A: Address>(&self, slot: u32, key: &FlowKey<A>) -> bool {
        let Tuple { dst, dst_port, .. } = key.tuple;
        let page = self.pages.get(&PageKey::new(dst.mapped(), key.protocol, dst_port.number()));
        let owner = page.and_then(|page| page.slot(dst_port.number()));
        let yields = |applied: &Applied| applied.line.flags & rule::DMZ != 0;
        self.applied.get(&slot).is_some_and(yields) && owner.is_some_and(|owner| owner != slot)
    }

    /// Rules and pages in use.
    pub fn fill(&self) -> (usize, usize) {
        (self.applied.len(), self.pages.len())
    }

    /// The lines as they are now.
    pub fn lines(&self) -> Lines {
        let slots = self.applied.keys().next_back().map_or(0, |last| *last as usize + 1);
        let mut lines = vec![EMPTY; slots];
        for (slot, applied) in &self.applied {
            lines[*slot as usize] = applied.line;
        }
        Lines(lines)
    }

    /// Makes the maps equal to `wanted`.
    ///
    /// In an order in which no packet meets a rule that is half there: lists and lines before the
    /// ports that lead to them, ports before the lines that they led to, lists last.
    pub fn reconcile(&mut self, wanted: &[KernelRule]) -> Result<()> {
        let written = self.write(wanted);
        // Also after a failure: taking the change back needs their room.
        for (list, nets) in std::mem::take(&mut self.stale_lists) {
            self.remove_list(list, &nets);
        }
        written
    }

    fn write(&mut self, wanted: &[KernelRule]) -> Result<()> {
        let pages = pages(wanted);
        self.follow_clock()?;
        for rule in wanted {
            self.write_line(rule).with_context(|| format!("cannot write rule slot {}", rule.slot))?;
        }
        self.write_pages(pages)?;
        let keep: HashSet<u32> = wanted.iter().map(|rule| rule.slot).collect();
        let gone: Vec<u32> = self.applied.keys().copied().filter(|slot| !keep.contains(slot)).collect();
        for slot in gone {
            self.lines.set(slot, EMPTY, 0).with_context(|| format!("cannot clear rule slot {slot}"))?;
            if let Some(applied) = self.applied.remove(&slot) {
                let Line { tcp_epoch: tcp, udp_epoch: udp, .. } = applied.line;
                self.emptied.insert(slot, Epoch { tcp, udp });
                self.stale_lists.push((applied.line.allow_list, applied.allow));
            }
        }
        Ok(())
    }

    /// Writes the expiries anew if the wall clock was set.
    pub fn follow_clock(&mut self) -> Result<()> {
        let offset = Offset::now();
        if !offset.has_moved_from(self.offset) {
            return Ok(());
        }
        self.offset = offset;
        for (slot, applied) in &mut self.applied {
            if let Some(expires_at) = applied.expires_at {
                applied.line.expires = offset.monotonic_of(expires_at);
                self.lines.set(*slot, applied.line, 0)?;
            }
        }
        Ok(())
    }

    /// A rule's counters, summed over the CPUs.
    pub fn counters(&self, slot: u32) -> Result<RuleCounters> {
        let mut sum = RuleCounters::ZERO;
        for cpu in self.counters.get(&slot, 0)?.iter() {
            for (sum, cpu) in [(&mut sum.inward, &cpu.inward), (&mut sum.outward, &cpu.outward)] {
                sum.packets += cpu.packets;
                sum.bytes += cpu.bytes;
            }
            sum.sessions += cpu.sessions;
            for (sum, cpu) in sum.dropped.iter_mut().zip(&cpu.dropped) {
                *sum += cpu;
            }
        }
        Ok(sum)
    }

    fn write_line(&mut self, wanted: &KernelRule) -> Result<()> {
        let mut allow = wanted.allow.clone();
        allow.sort();
        let before = self.applied.get(&wanted.slot).cloned();
        let same_list = before
            .as_ref()
            .is_some_and(|before| before.allow == allow && (before.line.allow_list == 0) == allow.is_empty());
        let list = match &before {
            Some(before) if same_list => before.line.allow_list,
            _ => self.insert_list(&allow)?,
        };
        let mut line = line(wanted, list, self.offset);
        match &before {
            Some(before) => {
                if same_expiry(before, wanted, &line) {
                    line.expires = before.line.expires;
                }
                if before.line != line {
                    self.lines.set(wanted.slot, line, 0)?;
                }
                if changes_counts(&before.line, &line) {
                    self.uncounted.insert(wanted.slot);
                }
            }
            None => {
                // A rule that comes back, after a change that failed, keeps its counters.
                if self.emptied.remove(&wanted.slot) != Some(wanted.epoch) {
                    self.zero_counters(wanted.slot)?;
                }
                self.lines.set(wanted.slot, line, 0)?;
            }
        }
        if let Some(before) = before.filter(|_| !same_list) {
            self.stale_lists.push((before.line.allow_list, before.allow));
        }
        self.applied.insert(wanted.slot, Applied { line, allow, expires_at: wanted.expires_at });
        Ok(())
    }

    fn zero_counters(&mut self, slot: u32) -> Result<()> {
        let cpus = aya::util::nr_cpus().map_err(|(what, error)| anyhow::anyhow!("{what}: {error}"))?;
        let zeroes = PerCpuValues::try_from(vec![RuleCounters::ZERO; cpus])?;
        self.counters.set(slot, zeroes, 0)?;
        Ok(())
    }

    /// What has been written is noted at once: after a failure the next call knows where it stands.
    fn write_pages(&mut self, wanted: Pages) -> Result<()> {
        for (key, page) in &wanted {
            if self.pages.get(key) != Some(page) {
                self.ports.insert(key, page, 0).context("cannot write the port map; is it full?")?;
                self.pages.insert(*key, *page);
                self.yielded = self.applied.values().any(|applied| applied.line.flags & rule::DMZ != 0);
            }
        }
        let gone: Vec<PageKey> = self.pages.keys().filter(|key| !wanted.contains_key(key)).copied().collect();
        for key in gone {
            self.ports.remove(&key).context("cannot remove from the port map")?;
            self.pages.remove(&key);
        }
        Ok(())
    }

    /// Makes a new list and returns its number; 0, which admits everyone, for an empty one.
    fn insert_list(&mut self, nets: &[IpNet]) -> Result<u32> {
        if nets.is_empty() {
            return Ok(0);
        }
        let list = self.next_list;
        self.next_list = list
            .checked_add(1)
            .context("the allow lists' numbers are used up: `forwarderd detach` starts anew")?;
        let mut entries = nets.iter().map(|net| allow_key(list, net));
        if let Err(error) = entries.try_for_each(|key| self.allow.insert(&key, 1, 0)) {
            self.remove_list(list, nets);
            return Err(error).context("cannot write the allow lists; are they full?");
        }
        Ok(list)
    }

    fn remove_list(&mut self, list: u32, nets: &[IpNet]) {
        for net in nets {
            if let Err(error) = self.allow.remove(&allow_key(list, net)) {
                log::debug!("allow list {list}: {error}");
            }
        }
    }
}

fn allow_key(list: u32, net: &IpNet) -> lpm_trie::Key<AllowKey> {
    let mapped = if net.addr().is_ipv4() { MAPPED_BITS } else { 0 };
    lpm_trie::Key::new(
        ALLOW_LIST_BITS + mapped + u32::from(net.prefix_len()),
        AllowKey { list: list.to_be_bytes(), source: mapped_address(net.network()) },
    )
}

/// What [`allow_key`] was made from.
fn network(key: &lpm_trie::Key<AllowKey>) -> Result<IpNet> {
    let (bits, source) = (key.prefix_len().saturating_sub(ALLOW_LIST_BITS), key.data().source);
    Ok(match Ipv4::from_mapped(source) {
        Some(ipv4) if bits >= MAPPED_BITS => {
            Ipv4Net::new(ipv4.bytes().into(), (bits - MAPPED_BITS) as u8)?.into()
        }
        _ => Ipv6Net::new(source.bytes().into(), bits as u8)?.into(),
    })
}

/// Whether the line in the kernel ends at the wanted moment already. An adopted line says only when
/// on the monotonic clock: the same but for what the clocks' reading differs.
fn same_expiry(before: &Applied, wanted: &KernelRule, line: &Line) -> bool {
    const READING: u64 = 5_000_000;
    before.expires_at == wanted.expires_at && wanted.expires_at.is_some()
        || before.line.expires.abs_diff(line.expires) < READING
}

fn line(wanted: &KernelRule, allow_list: u32, offset: Offset) -> Line {
    let PortRange { first: target_port, last } = wanted.target_ports;
    let one = if target_port == last { rule::ONE_TARGET_PORT } else { 0 };
    let dmz = if wanted.dmz { rule::DMZ } else { 0 };
    let via = if wanted.via_stack { rule::VIA_STACK } else { 0 };
    let limited = if wanted.limits == Limits::default() { 0 } else { rule::LIMITED };
    Line {
        expires: wanted.expires_at.map_or(u64::MAX, |moment| offset.monotonic_of(moment)),
        flags: rule::ACTIVE | one | limited | dmz | via | if wanted.hairpin { rule::HAIRPIN } else { 0 },
        tcp_epoch: wanted.epoch.tcp,
        udp_epoch: wanted.epoch.udp,
        allow_list,
        target: mapped_address(wanted.target),
        target_port,
        external_port: wanted.external_ports.first,
        external_last: wanted.external_ports.last,
        max_sessions: limit(wanted.limits.max_sessions),
        max_sessions_per_source: limit(wanted.limits.max_sessions_per_source),
        new_per_second: limit(wanted.limits.new_per_second),
    }
}

/// Whether other sessions count from now on: those that began before the limit, hosts inside.
fn changes_counts(before: &Line, line: &Line) -> bool {
    let kinds = |line: &Line| (line.max_sessions != 0, line.max_sessions_per_source != 0);
    line.counts_sessions()
        && (kinds(before) != kinds(line) || (before.flags ^ line.flags) & rule::HAIRPIN != 0)
}

/// A limit as the line has it; what is beyond a number of the line limits nothing.
fn limit(limit: Option<u64>) -> u32 {
    limit.map_or(0, |limit| u32::try_from(limit).unwrap_or(u32::MAX))
}

/// An address as the maps have it.
pub fn mapped_address(address: IpAddr) -> Ipv6 {
    match address {
        IpAddr::V4(address) => Ipv4::new(address.octets()).mapped(),
        IpAddr::V6(address) => Ipv6::new(address.octets()),
    }
}

fn protocols(protocol: Protocol) -> &'static [u8] {
    match protocol {
        Protocol::Tcp => &[tcp::NUMBER],
        Protocol::Udp => &[udp::NUMBER],
        Protocol::TcpUdp => &[tcp::NUMBER, udp::NUMBER],
    }
}

/// The port map that leads to these rules.
fn pages(rules: &[KernelRule]) -> Pages {
    let mut pages = Pages::new();
    // Those that have what nobody else takes come last.
    let (dmz, others): (Vec<_>, Vec<_>) = rules.iter().partition(|rule| rule.dmz);
    for rule in others.into_iter().chain(dmz) {
        for address in &rule.externals {
            let address = mapped_address(*address);
            for &protocol in protocols(rule.protocol) {
                for port in rule.external_ports.first..=rule.external_ports.last {
                    let page = pages.entry(PageKey::new(address, protocol, port)).or_insert(Page::EMPTY);
                    let slot = &mut page.slots[usize::from(port) % rule::PAGE_PORTS];
                    if *slot == 0 || !rule.dmz {
                        *slot = rule.slot + 1;
                    }
                }
            }
        }
    }
    pages
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(slot: u32, ports: &str, dmz: bool) -> KernelRule {
        KernelRule {
            slot,
            externals: vec!["203.0.113.1".parse().unwrap()],
            protocol: Protocol::TcpUdp,
            external_ports: ports.parse().unwrap(),
            target: "10.0.0.10".parse().unwrap(),
            target_ports: ports.parse().unwrap(),
            hairpin: true,
            via_stack: false,
            allow: Vec::new(),
            limits: Limits::default(),
            dmz,
            expires_at: None,
            epoch: Epoch { tcp: 1, udp: 2 },
        }
    }

    #[test]
    fn a_dmz_host_has_the_ports_that_other_rules_leave_whichever_came_first() {
        let (dmz, web) = (rule(0, "1-65535", true), rule(1, "80-99", false));
        for rules in [[dmz.clone(), web.clone()], [web, dmz]] {
            let pages = pages(&rules);
            let owner = |port: u16| {
                let key = PageKey::new(Ipv4::new([203, 0, 113, 1]).mapped(), tcp::NUMBER, port);
                pages.get(&key).and_then(|page| page.slot(port))
            };
            assert_eq!([1, 79, 80, 99, 100, 65535].map(owner), [0, 0, 1, 1, 0, 0].map(Some));
            assert_eq!(owner(0), None);
        }
    }
}
