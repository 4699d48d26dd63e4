//! A router between networks of hosts, with `forwarderd` on it.

use std::process::Output;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::{Daemon, DaemonOptions, Datapath, End, Host, RawSocket, Stats, bridge, veth};

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
    options: DaemonOptions,
}

impl TestbedBuilder {
    /// How packets shall be carried; else as `forwarderd` chooses.
    pub fn datapath(mut self, datapath: Datapath) -> Self {
        self.options.datapath = Some(datapath);
        self
    }

    /// An external network: the router's interface, its address there with the prefix length, and the
    /// addresses of the hosts. It takes the place of one at the same interface.
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
        let mut options = self.options.clone();
        let mut places = Vec::new();
        for network in &self.networks {
            let side = if network.external { &mut options.external } else { &mut options.internal };
            side.push(network.interface.clone());
            places.extend(self.lay(&router, network)?);
        }
        // The first host outside stands for the whole internet.
        let client = places.iter().find(|place| place.external).context("no external network")?;
        router.ip(&format!("route add default via {}", client.address))?;
        let client = client.host.clone();
        Ok(Testbed { daemon: Daemon::new(&router, options), client, router, places })
    }

    fn lay(&self, router: &Host, network: &Network) -> Result<Vec<Place>> {
        let (gateway, prefix) =
            network.router.split_once('/').context("the router's address has no prefix")?;
        ensure!(!network.hosts.is_empty(), "no host is to be on the other end of {}", network.interface);
        let uplink = self.end(router, &network.interface).address(&network.router);
        let switch = match network.hosts.len() {
            1 => None,
            _ => {
                let switch = Host::new(&format!("switch of {}", network.interface))?;
                bridge(&switch, "br0")?;
                veth(&uplink, &self.end(&switch, "uplink").master("br0"))?;
                Some(switch)
            }
        };
        let mut places = Vec::new();
        for (number, address) in network.hosts.iter().enumerate() {
            let host = Host::new(address)?;
            let end = self
                .end(&host, "eth0")
                .address(&format!("{address}/{prefix}"))
                .checksum_offload(self.checksum_offload);
            match &switch {
                Some(switch) => veth(&self.end(switch, &format!("port{number}")).master("br0"), &end)?,
                None => veth(&uplink, &end)?,
            }
            if !network.external {
                host.ip(&format!("route add default via {gateway}"))?;
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

    fn end<'a>(&self, host: &'a Host, interface: &str) -> End<'a> {
        let end = End::new(host, interface);
        match self.mtu {
            Some(mtu) => end.mtu(mtu),
            None => end,
        }
    }
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
    places: Vec<Place>,
}

impl Testbed {
    /// Begins with the example of the documentation: `wan` is 203.0.113.1/24 with the client
    /// 203.0.113.2 on it, `lan` is 10.0.0.1/24 with the server 10.0.0.10. Hosts have one interface, `eth0`.
    pub fn builder() -> TestbedBuilder {
        TestbedBuilder {
            networks: Vec::new(),
            checksum_offload: false,
            mtu: None,
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

    /// The host with this address.
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
