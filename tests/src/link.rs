//! Links between hosts.

use std::io;

use anyhow::{Context, Result};
use socket2::{Domain, Socket, Type};
use std::os::fd::AsRawFd;

use crate::Host;

/// One end of a link: an interface of a host, and how it shall be.
#[derive(Clone, Debug)]
pub struct End<'a> {
    host: &'a Host,
    interface: String,
    addresses: Vec<String>,
    mtu: Option<u32>,
    master: Option<String>,
    gro: bool,
    checksum_offload: bool,
}

impl<'a> End<'a> {
    /// An interface that is up and has no address. GRO is on: without it frames that XDP redirects
    /// to the other end would be lost on their way to this one.
    pub fn new(host: &'a Host, interface: &str) -> Self {
        Self {
            host,
            interface: interface.to_owned(),
            addresses: Vec::new(),
            mtu: None,
            master: None,
            gro: true,
            checksum_offload: true,
        }
    }

    /// Adds an address with its prefix length, such as `10.0.0.1/24`.
    pub fn address(mut self, address: &str) -> Self {
        self.addresses.push(address.to_owned());
        self
    }

    /// Its largest IP packet.
    pub fn mtu(mut self, mtu: u32) -> Self {
        self.mtu = Some(mtu);
        self
    }

    /// Makes it a port of a bridge of the same host.
    pub fn master(mut self, bridge: &str) -> Self {
        self.master = Some(bridge.to_owned());
        self
    }

    /// Generic receive offload; switching it on also gives a veth interface NAPI.
    pub fn gro(mut self, on: bool) -> Self {
        self.gro = on;
        self
    }

    /// Off: this end's stack fills in every checksum and segments by itself, like a host whose NIC cannot.
    /// On: frames leave it with the checksum still to be done, which on veth nobody does.
    pub fn checksum_offload(mut self, on: bool) -> Self {
        self.checksum_offload = on;
        self
    }

    pub(crate) fn host(&self) -> &Host {
        self.host
    }

    pub(crate) fn interface(&self) -> &str {
        &self.interface
    }

    pub(crate) fn configure(&self) -> Result<()> {
        let interface = &self.interface;
        let mut lines = String::new();
        if let Some(mtu) = self.mtu {
            lines += &format!("link set {interface} mtu {mtu}\n");
        }
        if let Some(master) = &self.master {
            lines += &format!("link set {interface} master {master}\n");
        }
        for address in &self.addresses {
            lines += &format!("addr add {address} dev {interface}\n");
        }
        lines += &format!("link set {interface} up\n");
        self.host.ip(&lines)?;
        set_feature(self.host, interface, ETHTOOL_SGRO, self.gro)?;
        if !self.checksum_offload {
            set_feature(self.host, interface, ETHTOOL_STXCSUM, false)?;
        }
        Ok(())
    }
}

/// Lays a cable between two hosts.
pub fn veth(a: &End, b: &End) -> Result<()> {
    a.host.ip(&format!(
        "link add {} netns {} type veth peer name {} netns {}\n",
        a.interface,
        a.host.net_path(),
        b.interface,
        b.host.net_path()
    ))?;
    a.configure()?;
    b.configure()
}

/// Makes a bridge that is up; its ports name it as their [`End::master`].
pub fn bridge(host: &Host, name: &str) -> Result<()> {
    // Without snooping a silent multicast listener is reached at once.
    host.ip(&format!("link add {name} type bridge forward_delay 0 mcast_snooping 0\nlink set {name} up\n"))
}

// From linux/ethtool.h; libc does not name them.
const ETHTOOL_STXCSUM: u32 = 0x17;
const ETHTOOL_SGRO: u32 = 0x2c;

/// What `ethtool -K` does, without needing that program.
fn set_feature(host: &Host, interface: &str, command: u32, on: bool) -> Result<()> {
    #[repr(C)]
    struct EthtoolValue {
        command: u32,
        data: u32,
    }
    let set = || {
        let socket = Socket::new(Domain::IPV4, Type::DGRAM, None)?;
        let mut value = EthtoolValue { command, data: u32::from(on) };
        // SAFETY: ifreq is plain data, for which all zeroes are valid.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in request.ifr_name.iter_mut().zip(interface.bytes().take(libc::IFNAMSIZ - 1)) {
            *to = from as libc::c_char;
        }
        request.ifr_ifru.ifru_data = (&raw mut value).cast();
        // SAFETY: the request has a terminated name and points at a value that outlives the call,
        // which is what SIOCETHTOOL wants for these commands.
        match unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCETHTOOL, &raw mut request) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    };
    host.run(set).with_context(|| {
        format!("cannot switch an offload of {interface} on {} (ethtool {command:#x})", host.name())
    })
}
