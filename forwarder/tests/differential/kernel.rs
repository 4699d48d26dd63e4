//! The programs and maps in the kernel, on a router whose routes and neighbours are those of the scenario.

use std::net::IpAddr;

use aya::{
    Ebpf, EbpfLoader, TestRunOptions,
    maps::{Array, HashMap, MapData, PerCpuArray, PerCpuValues, lpm_trie},
    programs::{SchedClassifier, TestRun as _, Xdp},
};
use forwarder::datapath::kernel::object;
use forwarder_common::{
    address::{Address, Ipv4, Ipv6},
    family::Family,
    flow::{Flow, FlowKey, Side},
    fragment::{FragmentKey, Held, HeldKey, Train},
    layout::{Count, Hook, Interface, REASON_COUNTERS, RuleCounters, Settings, reason_index},
    model::{
        Counts, Tables,
        scenario::{CLIENT, CLIENT_MAC, DMZ_PORTS, GATEWAY, OTHER_SERVER, Router, SERVER, SERVER_MAC, W},
        twin,
    },
    pipeline::Outcome,
    reason::Reason,
    rule::{ALLOW_LIST_BITS, AllowKey, MAPPED_BITS, Page, PageKey, Rule},
    sessions::SessionsKey,
};
use testbed::{End, Host, veth};

use crate::shots::Shot;

const RULES: u32 = 64;
/// Offsets in `struct xdp_md` and `struct __sk_buff` (include/uapi/linux/bpf.h).
const XDP_MD: (usize, usize, usize) = (24, 4, 12);
const SK_BUFF: (usize, usize) = (192, 40);

/// The tables of one family.
struct Maps<A: Address> {
    flows: HashMap<MapData, FlowKey<A>, Flow<A>>,
    half_open: HashMap<MapData, FlowKey<A>, Flow<A>>,
    trains: HashMap<MapData, FragmentKey<A>, Train>,
    held: HashMap<MapData, HeldKey<A>, Held>,
}

impl<A: Address> Maps<A> {
    fn take(ebpf: &mut Ebpf, suffix: &str) -> Self {
        let mut map = |name: &str| ebpf.take_map(&format!("{name}{suffix}")).unwrap();
        Self {
            flows: map("FLOWS").try_into().unwrap(),
            half_open: map("HALF_OPEN").try_into().unwrap(),
            trains: map("FRAGMENTS").try_into().unwrap(),
            held: map("HELD").try_into().unwrap(),
        }
    }

    fn clear(&mut self) {
        for map in [&mut self.flows, &mut self.half_open] {
            let keys: Vec<_> = map.keys().collect::<Result<_, _>>().unwrap();
            for key in keys {
                map.remove(&key).unwrap();
            }
        }
        let trains: Vec<_> = self.trains.keys().collect::<Result<_, _>>().unwrap();
        for key in trains {
            self.trains.remove(&key).unwrap();
        }
        let held: Vec<_> = self.held.keys().collect::<Result<_, _>>().unwrap();
        for key in held {
            self.held.remove(&key).unwrap();
        }
    }
}

/// A family whose tables the kernel has.
pub trait Tabled: Family {
    #[expect(private_interfaces, reason = "it is for this module, the trait's name for the next")]
    fn maps(kernel: &Kernel) -> &Maps<Self>;
}

impl Tabled for Ipv4 {
    #[expect(private_interfaces, reason = "as above")]
    fn maps(kernel: &Kernel) -> &Maps<Self> {
        &kernel.ipv4
    }
}

impl Tabled for Ipv6 {
    #[expect(private_interfaces, reason = "as above")]
    fn maps(kernel: &Kernel) -> &Maps<Self> {
        &kernel.ipv6
    }
}

pub struct Kernel {
    host: Host,
    /// The host's own.
    _sockets: (std::net::TcpListener, std::net::UdpSocket),
    /// What the router's interfaces lead to.
    _peers: [Host; 2],
    router: Router,
    ebpf: Ebpf,
    ipv4: Maps<Ipv4>,
    ipv6: Maps<Ipv6>,
    sessions: HashMap<MapData, SessionsKey, i64>,
    due: Array<MapData, u64>,
    host_sessions: HashMap<MapData, FlowKey<Ipv6>, u64>,
    reasons: PerCpuArray<MapData, Count>,
    rules: PerCpuArray<MapData, RuleCounters>,
}

impl Kernel {
    /// `flags`: of both interfaces, for the programs.
    pub fn new(flags: u8) -> Self {
        let (host, peers, router) = network(flags).unwrap();
        let ebpf = host.run(|| load().unwrap());
        Self::fill(host, peers, router, ebpf)
    }

    fn fill(host: Host, peers: [Host; 2], router: Router, mut ebpf: Ebpf) -> Self {
        let machine = router.machine();
        let settings = Settings { generation: machine.generation, ..Settings::default() };
        let mut map: Array<_, Settings> = ebpf.map_mut("SETTINGS").unwrap().try_into().unwrap();
        map.set(0, settings, 0).unwrap();
        let mut map: HashMap<_, u32, Interface> = ebpf.map_mut("INTERFACES").unwrap().try_into().unwrap();
        for (index, interface) in &machine.interfaces {
            map.insert(index, interface, 0).unwrap();
        }
        let mut map: HashMap<_, PageKey, Page> = ebpf.map_mut("PORTS").unwrap().try_into().unwrap();
        for (key, page) in &machine.pages {
            map.insert(key, page, 0).unwrap();
        }
        let mut map: Array<_, Rule> = ebpf.map_mut("RULES").unwrap().try_into().unwrap();
        for (slot, rule) in &machine.rules {
            map.set(*slot, rule, 0).unwrap();
        }
        let mut map: lpm_trie::LpmTrie<_, AllowKey, u8> = ebpf.map_mut("ALLOW").unwrap().try_into().unwrap();
        for (list, network, prefix_len) in &machine.allow {
            for source in [Ipv4::new(*network).mapped(), Ipv6::new(twin(*network))] {
                let key = AllowKey { list: list.to_be_bytes(), source };
                let bits = ALLOW_LIST_BITS + MAPPED_BITS + prefix_len;
                map.insert(&lpm_trie::Key::new(bits, key), 1, 0).unwrap();
            }
        }
        let mut map: HashMap<_, Ipv6, u8> = ebpf.map_mut("ROLES").unwrap().try_into().unwrap();
        for (address, roles) in &machine.roles {
            map.insert(address.mapped(), roles, 0).unwrap();
            map.insert(Ipv6::new(twin(address.bytes())), roles, 0).unwrap();
        }
        let bind = |port| {
            let address = ("::", port);
            (std::net::TcpListener::bind(address).unwrap(), std::net::UdpSocket::bind(address).unwrap())
        };
        let sockets = host.run(|| bind(DMZ_PORTS.1));
        Self {
            _sockets: sockets,
            sessions: ebpf.take_map("SESSIONS").unwrap().try_into().unwrap(),
            due: ebpf.take_map("DUE").unwrap().try_into().unwrap(),
            ipv4: Maps::take(&mut ebpf, ""),
            ipv6: Maps::take(&mut ebpf, "_IPV6"),
            host_sessions: ebpf.take_map("HOST_SESSIONS").unwrap().try_into().unwrap(),
            reasons: ebpf.take_map("REASON_COUNTERS").unwrap().try_into().unwrap(),
            rules: ebpf.take_map("RULE_COUNTERS").unwrap().try_into().unwrap(),
            host,
            _peers: peers,
            router,
            ebpf,
        }
    }

    pub fn router(&self) -> Router {
        self.router
    }

    /// Instructions that the verifier went through, paths walked twice counted twice (Linux 5.16).
    pub fn verified_instructions(&mut self, hook: Hook) -> u32 {
        let info = match hook {
            Hook::Xdp => program::<Xdp>(&mut self.ebpf, hook).info(),
            Hook::TcIngress | Hook::TcEgress => program::<SchedClassifier>(&mut self.ebpf, hook).info(),
        };
        info.unwrap().verified_instruction_count().unwrap()
    }

    /// Ends all flows and zeroes all counters.
    pub fn clear(&mut self) {
        self.ipv4.clear();
        self.ipv6.clear();
        let counts: Vec<_> = self.sessions.keys().collect::<Result<_, _>>().unwrap();
        for key in counts {
            self.sessions.remove(&key).unwrap();
        }
        let sessions: Vec<_> = self.host_sessions.keys().collect::<Result<_, _>>().unwrap();
        for key in sessions {
            self.host_sessions.remove(&key).unwrap();
        }
        let cpus = aya::util::nr_cpus().unwrap();
        for index in 0..REASON_COUNTERS as u32 {
            let zeroes = PerCpuValues::try_from(vec![Count::default(); cpus]).unwrap();
            self.reasons.set(index, zeroes, 0).unwrap();
        }
        for slot in 0..RULES {
            self.due.set(slot, 0, 0).unwrap();
            let zeroes = PerCpuValues::try_from(vec![RuleCounters::ZERO; cpus]).unwrap();
            self.rules.set(slot, zeroes, 0).unwrap();
        }
    }

    /// The verdict and the bytes, or `None` if the kernel does not take such a frame.
    pub fn run(&mut self, hook: Hook, shot: &Shot) -> Option<(u32, Vec<u8>)> {
        let Self { host, router, ebpf, .. } = self;
        let (ifindex, _) = router.interface(if hook == Hook::TcEgress { Side::External } else { shot.side });
        let mut out = vec![0; shot.bytes.len() + 256];
        let context = context(hook, ifindex, shot.bytes.len());
        let options = TestRunOptions {
            data_in: Some(&shot.bytes),
            data_out: Some(&mut out),
            ctx_in: Some(&context),
            ..TestRunOptions::default()
        };
        // The kernel looks the interface up in the caller's network.
        let result = host.run(|| match hook {
            Hook::Xdp => program::<Xdp>(ebpf, hook).test_run(options),
            Hook::TcIngress | Hook::TcEgress => program::<SchedClassifier>(ebpf, hook).test_run(options),
        });
        let result = result.ok()?;
        out.truncate(result.data_size_out as usize);
        Some((result.return_value, out))
    }

    /// Times and hops are left out: the model has another clock.
    pub fn compare_flows<A: Tabled>(&self, model: &Tables<A>) -> Result<(), String> {
        let maps = A::maps(self);
        for (name, map, model) in [
            ("established", &maps.flows, &model.established),
            ("half-open", &maps.half_open, &model.half_open),
        ] {
            let mut left = model.clone();
            for entry in map.iter() {
                let (key, flow) = entry.unwrap();
                let expected = left
                    .remove(&key)
                    .ok_or_else(|| format!("{name}: only the kernel has {key:?} {flow:?}"))?;
                if timeless(flow) != timeless(expected) {
                    return Err(format!("{name}: {key:?}\nhost:   {expected:?}\nkernel: {flow:?}"));
                }
            }
            if let Some((key, flow)) = left.iter().next() {
                return Err(format!("{name}: only the host has {key:?} {flow:?}"));
            }
        }
        for (key, count) in &model.sessions {
            let counted = self.sessions.get(key, 0).unwrap_or(0);
            if counted != *count {
                return Err(format!("sessions of {key:?}: host {count}, kernel {counted}"));
            }
        }
        Ok(())
    }

    pub fn compare_counts(&self, hook: Hook, model: &Counts) -> Result<(), String> {
        // A round for the egress program runs the one at ingress too, the model counts them together.
        let hooks: &[Hook] =
            if hook == Hook::TcEgress { &[Hook::TcIngress, Hook::TcEgress] } else { &[hook] };
        for reason in Reason::ALL {
            let mut sum = (0, 0);
            for hook in hooks {
                for cpu in self.reasons.get(&reason_index(*hook, *reason), 0).unwrap().iter() {
                    sum = (sum.0 + cpu.packets, sum.1 + cpu.bytes);
                }
            }
            let expected = model.reasons.get(reason.name()).copied().unwrap_or_default();
            if sum != expected {
                return Err(format!("{}: host {expected:?}, kernel {sum:?}", reason.name()));
            }
        }
        for slot in 0..RULES {
            let expected = model.rules.get(&slot).copied().unwrap_or(RuleCounters::ZERO);
            let sum = self.rules.get(&slot, 0).unwrap().iter().copied().fold(RuleCounters::ZERO, add);
            if sum != expected {
                return Err(format!("rule {slot}\nhost:   {expected:?}\nkernel: {sum:?}"));
            }
        }
        Ok(())
    }
}

fn add(mut sum: RuleCounters, cpu: RuleCounters) -> RuleCounters {
    for (sum, cpu) in [(&mut sum.inward, cpu.inward), (&mut sum.outward, cpu.outward)] {
        (sum.packets, sum.bytes) = (sum.packets + cpu.packets, sum.bytes + cpu.bytes);
    }
    sum.sessions += cpu.sessions;
    for (sum, cpu) in sum.dropped.iter_mut().zip(cpu.dropped) {
        *sum += cpu;
    }
    sum
}

fn timeless<A: Address>(flow: Flow<A>) -> Flow<A> {
    let mtu = flow.hop.mtu;
    Flow {
        last_seen: 0,
        hop_checked: 0,
        created: 0,
        hop: forwarder_common::flow::Hop { mtu, ..flow.hop },
        ..flow
    }
}

fn program<P>(ebpf: &mut Ebpf, hook: Hook) -> &mut P
where
    for<'p> &'p mut P: TryFrom<&'p mut aya::programs::Program, Error: std::fmt::Debug>,
{
    let name = match hook {
        Hook::Xdp => "forwarder_xdp",
        Hook::TcIngress => "forwarder_ingress",
        Hook::TcEgress => "forwarder_egress",
    };
    ebpf.program_mut(name).unwrap().try_into().unwrap()
}

/// What the programs return for an outcome.
pub fn verdict(hook: Hook, outcome: Outcome) -> u32 {
    const XDP: [u32; 3] = [2, 1, 4];
    const TC: [u32; 3] = [u32::MAX, 2, 7];
    let [pass, drop, redirect] = if hook == Hook::Xdp { XDP } else { TC };
    match outcome {
        Outcome::Pass | Outcome::PassMarked => pass,
        Outcome::Drop | Outcome::Hold => drop,
        Outcome::Redirect { .. } | Outcome::RedirectNeighbour { .. } | Outcome::Release => redirect,
        Outcome::Continue | Outcome::Admit => 0,
    }
}

fn context(hook: Hook, ifindex: u32, len: usize) -> Vec<u8> {
    let put = |context: &mut Vec<u8>, at: usize, value: u32| {
        context[at..at + 4].copy_from_slice(&value.to_ne_bytes())
    };
    if hook == Hook::Xdp {
        let (size, data_end, ingress_ifindex) = XDP_MD;
        let mut context = vec![0; size];
        put(&mut context, data_end, len as u32);
        put(&mut context, ingress_ifindex, ifindex);
        return context;
    }
    let (size, at) = SK_BUFF;
    let mut context = vec![0; size];
    put(&mut context, at, ifindex);
    context
}

/// The scenario's network: MACs and neighbours as the model has them.
fn network(flags: u8) -> anyhow::Result<(Host, [Host; 2], Router)> {
    let host = Host::new("router")?;
    let peers = [Host::new("outside")?, Host::new("inside")?];
    veth(&End::new(&host, "wan").address("203.0.113.1/24"), &End::new(&peers[0], "eth0"))?;
    veth(&End::new(&host, "lan").address("10.0.0.1/24"), &End::new(&peers[1], "eth0"))?;
    host.sysctl("net.ipv4.ip_forward", "1")?;
    host.sysctl("net.ipv6.conf.all.forwarding", "1")?;
    for (address, interface) in [(W, "wan"), (GATEWAY, "lan")] {
        let address = std::net::Ipv6Addr::from(twin(address));
        host.ip(&format!("addr add {address}/120 dev {interface} nodad"))?;
    }
    let neighbour = |address: [u8; 4], mac: [u8; 6], interface: &str| {
        let mac = mac.map(|byte| format!("{byte:02x}")).join(":");
        for address in [IpAddr::from(address), IpAddr::from(twin(address))] {
            host.ip(&format!("neigh replace {address} lladdr {mac} dev {interface}"))?;
        }
        anyhow::Ok(())
    };
    neighbour(CLIENT, CLIENT_MAC, "wan")?;
    neighbour(SERVER, SERVER_MAC, "lan")?;
    neighbour(OTHER_SERVER, SERVER_MAC, "lan")?;
    let interface = |name: &str| anyhow::Ok((host.index(name)?, host.mac(name)?));
    let router = Router { wan: interface("wan")?, lan: interface("lan")?, flags };
    Ok((host, peers, router))
}

fn load() -> anyhow::Result<Ebpf> {
    let pins = "/sys/fs/bpf/differential";
    std::fs::create_dir_all(pins)?;
    let mut loader = EbpfLoader::new();
    loader.default_map_pin_directory(pins);
    for map in ["RULES", "PROBES", "RULE_COUNTERS", "DUE"] {
        loader.map_max_entries(map, RULES);
    }
    for map in [
        "PORTS",
        "ROLES",
        "ALLOW",
        "FLOWS",
        "HALF_OPEN",
        "FLOWS_IPV6",
        "HALF_OPEN_IPV6",
        "SESSIONS",
        "CORRECTIONS",
    ] {
        loader.map_max_entries(map, 1 << 16);
    }
    let mut ebpf = loader.load(object())?;
    program::<Xdp>(&mut ebpf, Hook::Xdp).load()?;
    for hook in [Hook::TcIngress, Hook::TcEgress] {
        program::<SchedClassifier>(&mut ebpf, hook).load()?;
    }
    Ok(ebpf)
}
