//! What the controller asks of a data path, apart from how eBPF does it.

#[doc(hidden)]
pub mod fake;
pub mod kernel;

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, bail};
use ipnet::IpNet;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::network::Network;
use crate::rule::{Limits, PortRange, Protocol};

/// How a data path is set up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    pub external: Vec<String>,
    pub internal: Vec<String>,
    pub mode: Mode,
    pub pin_dir: PathBuf,
    /// Of the store whose rules are served: pinned maps of another store are not adopted.
    pub store_id: u64,
    /// The bit of `skb->mark` that what goes through the host's stack carries.
    pub mark: u32,
    pub timeouts: Timeouts,
    pub tables: TableSizes,
}

/// Where packets are handled; TC always is there as well.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// Native XDP where the driver has it and it pays, TC elsewhere
    #[default]
    Auto,
    /// Native XDP, refused where the driver has none
    Xdp,
    /// Generic XDP
    XdpGeneric,
    /// TC alone
    Tc,
}

/// How long a flow may be idle before it ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Timeouts {
    #[serde(deserialize_with = "crate::config::idle_time")]
    pub tcp_half_open: Duration,
    #[serde(deserialize_with = "crate::config::idle_time")]
    pub tcp_established: Duration,
    #[serde(deserialize_with = "crate::config::idle_time")]
    pub tcp_closing: Duration,
    #[serde(deserialize_with = "crate::config::idle_time")]
    pub udp_half_open: Duration,
    #[serde(deserialize_with = "crate::config::idle_time")]
    pub udp_established: Duration,
}

impl Default for Timeouts {
    /// The minima of RFC 5382 for TCP; for UDP those that RFC 4787 recommends.
    fn default() -> Self {
        let minutes = |minutes: u64| Duration::from_secs(minutes * 60);
        Timeouts {
            tcp_half_open: minutes(4),
            tcp_established: minutes(124),
            tcp_closing: minutes(4),
            udp_half_open: minutes(2),
            udp_established: minutes(5),
        }
    }
}

/// How many entries the kernel's tables have room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct TableSizes {
    pub rules: u32,
    /// Established sessions over IPv4.
    pub flows: u32,
    /// Sessions over IPv4 that are not established yet.
    pub half_open: u32,
    /// Established sessions over IPv6.
    pub flows_ipv6: u32,
    /// Sessions over IPv6 that are not established yet.
    pub half_open_ipv6: u32,
}

impl Default for TableSizes {
    fn default() -> Self {
        TableSizes {
            rules: 16_384,
            flows: 262_144,
            half_open: 65_536,
            flows_ipv6: 65_536,
            half_open_ipv6: 32_768,
        }
    }
}

/// One rule as the packet path needs it: addresses resolved, the life of its flows spelled out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelRule {
    /// Index into the kernel's rule arrays. A rule keeps it for life, so its counters and flows stay its own.
    pub slot: u32,
    /// External addresses it is reached at; empty while it may not take new flows
    /// (draining, or bound to an interface without an address).
    pub externals: Vec<IpAddr>,
    pub protocol: Protocol,
    pub external_ports: PortRange,
    pub target: IpAddr,
    /// As many ports as `external_ports`, mapped one by one; or a single one for all of them.
    pub target_ports: PortRange,
    /// Whether hosts inside may use it too.
    pub hairpin: bool,
    /// Whether the host's stack routes and filters its packets.
    pub via_stack: bool,
    /// Sources that may use the rule; empty: everyone.
    pub allow: Vec<IpNet>,
    pub limits: Limits,
    /// It yields its ports to all other rules, and to the host's sockets.
    pub dmz: bool,
    /// The packet path refuses and cuts from this moment on, whether or not a controller runs.
    pub expires_at: Option<Timestamp>,
    /// Flows of another epoch are cut.
    pub epoch: Epoch,
}

/// Numbers that tell a rule's valid flows from cut ones.
///
/// They come from one counter of the store that never runs backwards, so that a slot used
/// again never revives flows of its former rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Epoch {
    pub tcp: u32,
    pub udp: u32,
}

/// Packets and bytes; bytes are those of the IP packets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Count {
    pub packets: u64,
    pub bytes: u64,
}

/// What one rule has carried and refused since it was made. `inward` is towards the target.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RuleCounters {
    pub inward: Count,
    pub outward: Count,
    pub sessions_active: u64,
    pub sessions_total: u64,
    /// Packets by reason, by the words of `forwarder_common::reason::Reason`; zeroes left out.
    pub dropped: Vec<(&'static str, u64)>,
}

/// A live session as an operator sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FlowRecord {
    pub slot: u32,
    pub protocol: &'static str,
    pub client: std::net::SocketAddr,
    pub external: std::net::SocketAddr,
    pub target: std::net::SocketAddr,
    /// `half-open`, `established` or `closing`.
    pub state: &'static str,
    pub age: std::time::Duration,
    pub idle: std::time::Duration,
    pub inward: Count,
    pub outward: Count,
}

/// Packets by what became of them, for one place where programs run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReasonCount {
    /// `xdp`, `tc-ingress` or `tc-egress`.
    pub path: String,
    pub reason: String,
    /// `forward`, `pass`, `hold` or `drop`.
    pub verdict: String,
    #[serde(flatten)]
    pub count: Count,
}

/// What is attached to one interface, and why just that.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InterfaceStatus {
    pub name: String,
    /// Absent while no such interface exists.
    pub index: Option<u32>,
    /// `external` or `internal`.
    pub side: String,
    /// `native XDP`, `generic XDP` or `none`.
    pub xdp: String,
    /// `TCX`, `clsact` or `none`.
    pub tc: String,
    /// One sentence.
    pub why: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TableFill {
    pub name: String,
    pub entries: u64,
    pub capacity: u64,
}

/// The kernel's side, or a stand-in for it under tests.
pub trait Datapath: Send {
    /// The start has succeeded: what was made for it outlives the controller.
    fn keep(&mut self) {}

    /// How many rule slots there are: slots are `0..capacity`.
    fn rule_capacity(&self) -> u32;

    /// Makes the kernel's tables equal to `wanted`; what is equal already is not written.
    ///
    /// A slot that is not in `wanted` is emptied and its flows are cut with that.
    /// Counters of a slot are zeroed when it is taken by another rule (its epoch grew and it was empty).
    fn reconcile(&mut self, wanted: &[KernelRule]) -> Result<()>;

    /// Removes flows of `slot` whose client `keep` refuses, at once.
    fn cut_flows(&mut self, slot: u32, keep: &dyn Fn(IpAddr) -> bool) -> Result<()>;

    /// Interfaces or addresses have changed: attach to what came, forget what went.
    fn network_changed(&mut self, network: &Network) -> Result<()>;

    /// Ends idle flows. Called about once a second; decides itself when a round is due.
    fn collect(&mut self) -> Result<()>;

    fn counters(&mut self, slot: u32) -> Result<RuleCounters>;

    /// Packets that a rule's limits have refused.
    fn refused(&mut self, slot: u32) -> Result<u64>;

    fn flows(&mut self) -> Result<Vec<FlowRecord>>;
    fn reasons(&mut self) -> Result<Vec<ReasonCount>>;
    fn interfaces(&self) -> Vec<InterfaceStatus>;

    /// What keeps all rules from working, each with its cure.
    fn warnings(&self) -> Vec<String> {
        Vec::new()
    }

    fn tables(&mut self) -> Result<Vec<TableFill>>;

    /// Takes other idle times for all flows, also for those that are there.
    fn set_timeouts(&mut self, _timeouts: &Timeouts) -> Result<()> {
        bail!("this data path takes other idle times only at a start")
    }
}
