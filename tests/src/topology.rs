//! A router between networks of hosts, with `forwarderd` on it.

use std::net::SocketAddr;
use std::process::Output;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::{
    Daemon, DaemonOptions, Datapath, End, Family, Frame, Host, RawSocket, Stats, TcpFields, bridge, veth,
};

/// A network at one interface of the router. Several hosts are joined by a switch: a host with a bridge.
#[derive(Clone, Debug)]
struct Network {
    interface: String,
    external: bool,
    /// The router's address, with the prefix length.
    router: String,
    hosts: Vec<String>,
}

/// Describes a [`Testbed`].
#[derive(Clone, Debug)]
pub struct TestbedBuilder {
    networks: Vec<Network>,
    checksum_offload: bool,
    mtu: Option<u32>,
    family: Family,
    options: DaemonOptions,
}

impl TestbedBuilder {
    /// The family that the test speaks; every bed has both.
    pub fn family(mut self, family: Family) -> Self {
        self.family = family;
        self
    }

    /// How packets shall be carried; else as `forwarderd` chooses.
    pub fn datapath(mut self, datapath: Datapath) -> Self {
        self.options.datapath = Some(datapath);
        self
    }

    /// An external network: the router's interface, its IPv4 address there with the prefix length, and those
    /// of the hosts, which get the twins of IPv6 too. It takes the place of one at the same interface.
    pub fn external(self, interface: &str, router: &str, hosts: &[&str]) -> Self {
        self.network(interface, true, router, hosts)
    }

    /// An internal network, described likewise.
    pub fn internal(self, interface: &str, router: &str, hosts: &[&str]) -> Self {
        self.network(interface, false, router, hosts)
    }

    fn network(mut self, interface: &str, external: bool, router: &str, hosts: &[&str]) -> Self {
        let network = Network {
            interface: interface.to_owned(),
            external,
            router: router.to_owned(),
            hosts: hosts.iter().map(ToString::to_string).collect(),
        };
        match self.networks.iter_mut().find(|it| it.interface == interface) {
            Some(place) => *place = network,
            None => self.networks.push(network),
        }
        self
    }

    /// Whether the hosts leave checksums to their interfaces (see [`End::checksum_offload`]). They do not
    /// unless asked to: so frames are such as come from a cable, and XDP can carry them.
    pub fn checksum_offload(mut self, on: bool) -> Self {
        self.checksum_offload = on;
        self
    }

    /// The MTU of every link.
    pub fn mtu(mut self, mtu: u32) -> Self {
        self.mtu = Some(mtu);
        self
    }

    /// The text of `forwarderd`'s configuration file.
    pub fn config(mut self, toml: &str) -> Self {
        self.options.config = toml.to_owned();
        self
    }

    /// Builds the network and starts `forwarderd` on the router.
    pub fn start(self) -> Result<Testbed> {
        let mut bed = self.build()?;
        bed.daemon.start()?;
        Ok(bed)
    }

    /// Builds the network; `forwarderd` is not started.
    pub fn build(self) -> Result<Testbed> {
        let router = Host::new("router")?;
        router.sysctl("net.ipv4.ip_forward", "1")?;
        router.sysctl("net.ipv6.conf.all.forwarding", "1")?;
        let mut options = self.options.clone();
        let mut places = Vec::new();
        for network in &self.networks {
            let side = if network.external { &mut options.external } else { &mut options.internal };
            side.push(network.interface.clone());
            places.extend(self.lay(&router, network)?);
        }
        // The first host outside stands for the whole internet.
        let client = places.iter().find(|place| place.external).context("no external network")?;
        default_routes(&router, &client.address)?;
        let (client, family) = (client.host.clone(), self.family);
        Ok(Testbed { daemon: Daemon::new(&router, options), client, router, family, places })
    }

    fn lay(&self, router: &Host, network: &Network) -> Result<Vec<Place>> {
        let (gateway, prefix) =
            network.router.split_once('/').context("the router's address has no prefix")?;
        ensure!(!network.hosts.is_empty(), "no host is to be on the other end of {}", network.interface);
        let uplink = self.end(router, &network.interface, &network.router);
        let switch = match network.hosts.len() {
            1 => None,
            _ => {
                let switch = Host::new(&format!("switch of {}", network.interface))?;
                bridge(&switch, "br0")?;
                veth(&uplink, &self.port(&switch, "uplink"))?;
                Some(switch)
            }
        };
        let mut places = Vec::new();
        for (number, address) in network.hosts.iter().enumerate() {
            let host = Host::new(address)?;
            let end = self
                .end(&host, "eth0", &format!("{address}/{prefix}"))
                .checksum_offload(self.checksum_offload);
            match &switch {
                Some(switch) => veth(&self.port(switch, &format!("port{number}")), &end)?,
                None => veth(&uplink, &end)?,
            }
            if !network.external {
                default_routes(&host, gateway)?;
            }
            places.push(Place {
                address: address.clone(),
                external: network.external,
                router_interface: network.interface.clone(),
                host,
                _switch: switch.clone(),
            });
        }
        Ok(places)
    }

    /// An end with an address and its twin.
    fn end<'a>(&self, host: &'a Host, interface: &str, address: &str) -> End<'a> {
        self.bare_end(host, interface).address(address).address(&Family::Ipv6.of(address))
    }

    /// A port of a switch.
    fn port<'a>(&self, switch: &'a Host, interface: &str) -> End<'a> {
        self.bare_end(switch, interface).master("br0")
    }

    fn bare_end<'a>(&self, host: &'a Host, interface: &str) -> End<'a> {
        let end = End::new(host, interface);
        match self.mtu {
            Some(mtu) => end.mtu(mtu),
            None => end,
        }
    }
}

fn default_routes(host: &Host, gateway: &str) -> Result<()> {
    let twin = Family::Ipv6.of(gateway);
    host.ip(&format!("route add default via {gateway}\nroute add default via {twin}"))
}

#[derive(Debug)]
struct Place {
    address: String,
    external: bool,
    router_interface: String,
    host: Host,
    /// It lasts as long as the hosts that need it.
    _switch: Option<Host>,
}

/// A router with hosts around it and `forwarderd` on it. All of it goes when this is dropped;
/// when that is because of a panic, it tells first how the forwarder was.
#[derive(Debug)]
pub struct Testbed {
    pub daemon: Daemon,
    /// The first host outside, which is also the router's way to the rest of the internet.
    pub client: Host,
    pub router: Host,
    /// Which the test speaks.
    pub family: Family,
    places: Vec<Place>,
}

impl Testbed {
    /// Begins with the example of the documentation: `wan` is 203.0.113.1/24 with the client
    /// 203.0.113.2 on it, `lan` is 10.0.0.1/24 with the server 10.0.0.10. Hosts have one interface, `eth0`.
    /// All have an IPv6 address too (see [`Family::of`]).
    pub fn builder() -> TestbedBuilder {
        TestbedBuilder {
            networks: Vec::new(),
            checksum_offload: false,
            mtu: None,
            family: Family::Ipv4,
            options: DaemonOptions::default(),
        }
        .external("wan", "203.0.113.1/24", &["203.0.113.2"])
        .internal("lan", "10.0.0.1/24", &["10.0.0.10"])
    }

    /// The first host inside.
    ///
    /// # Panics
    /// Where there is none.
    pub fn server(&self) -> &Host {
        &self.places.iter().find(|place| !place.external).expect("the bed has a host inside").host
    }

    /// A text with addresses as the test's family has them (see [`Family::of`]).
    pub fn ip(&self, text: &str) -> String {
        self.family.of(text)
    }

    /// An `address:port` likewise, as sockets and packets have it.
    ///
    /// # Panics
    /// Where it is none.
    pub fn endpoint(&self, text: &str) -> SocketAddr {
        self.ip(text).parse().unwrap_or_else(|_| panic!("not an address and port: {text}"))
    }

    /// [`Frame::udp`] in the test's family.
    pub fn udp(&self, source: &str, destination: &str, payload: &[u8]) -> Frame {
        Frame::udp(&self.ip(source), &self.ip(destination), payload)
    }

    /// [`Frame::tcp`] in the test's family.
    pub fn tcp(&self, source: &str, destination: &str, tcp: TcpFields, payload: &[u8]) -> Frame {
        Frame::tcp(&self.ip(source), &self.ip(destination), tcp, payload)
    }

    /// The host with this IPv4 address.
    ///
    /// # Panics
    /// Where there is none.
    pub fn at(&self, address: &str) -> &Host {
        &self.place(address).host
    }

    /// The raw frames at a host's interface; what it sends goes to the router unless it says otherwise.
    pub fn wire(&self, address: &str) -> Result<RawSocket> {
        let place = self.place(address);
        RawSocket::open(&place.host, "eth0", self.router.mac(&place.router_interface)?)
    }

    fn place(&self, address: &str) -> &Place {
        let found = self.places.iter().find(|place| place.address == address);
        found.unwrap_or_else(|| panic!("the bed has no host {address}"))
    }

    /// [`Daemon::ctl`] of the router.
    pub fn ctl(&self, arguments: &[&str]) -> Result<String> {
        self.daemon.ctl(arguments)
    }

    /// [`Daemon::ctl_json`] of the router.
    pub fn ctl_json(&self, arguments: &[&str]) -> Result<Value> {
        self.daemon.ctl_json(arguments)
    }

    /// [`Daemon::ctl_output`] of the router.
    pub fn ctl_output(&self, arguments: &[&str]) -> Result<Output> {
        self.daemon.ctl_output(arguments)
    }

    /// [`Daemon::stats`] of the router.
    pub fn stats(&self) -> Result<Stats> {
        self.daemon.stats()
    }
}

impl Drop for Testbed {
    fn drop(&mut self) {
        if std::thread::panicking() && self.daemon.was_started() {
            eprintln!("{}", self.daemon.diagnosis());
        }
    }
}
