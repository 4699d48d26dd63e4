//! Services of the router itself, found by the sockets that they listen on.

use std::collections::HashMap;
use std::fmt;
use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result};
use procfs::net::{TcpNetEntry, TcpState, UdpNetEntry, UdpState};
use procfs::process::{FDTarget, Process};

use crate::rule::{PortRange, Protocol};

/// A socket of this machine that takes what a rule would forward.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listener {
    /// `tcp` or `udp`.
    pub protocol: &'static str,
    pub address: SocketAddr,
    /// Name and pid, where they can be found out.
    pub process: Option<(String, i32)>,
}

impl fmt::Display for Listener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.process {
            Some((name, pid)) => write!(f, "{name} (pid {pid})")?,
            None => f.write_str("a process that cannot be named")?,
        }
        write!(f, " listens on {} {}", self.protocol, self.address)
    }
}

/// Listeners of this network namespace on `ports` of one of `addresses`, or of all addresses.
pub fn find(protocol: Protocol, addresses: &[IpAddr], ports: PortRange) -> Result<Vec<Listener>> {
    let mut sockets = Vec::new();
    if protocol.tcp() {
        sockets.extend(tcp()?.into_iter().map(|(address, inode)| ("tcp", address, inode)));
    }
    if protocol.udp() {
        sockets.extend(udp()?.into_iter().map(|(address, inode)| ("udp", address, inode)));
    }
    sockets.retain(|(_, address, _)| {
        let ip = address.ip().to_canonical();
        ports.contains(address.port()) && (ip.is_unspecified() || addresses.contains(&ip))
    });
    if sockets.is_empty() {
        return Ok(Vec::new());
    }
    let owners = owners();
    let named =
        |(protocol, address, inode)| Listener { protocol, address, process: owners.get(&inode).cloned() };
    Ok(sockets.into_iter().map(named).collect())
}

fn tcp() -> Result<Vec<(SocketAddr, u64)>> {
    let mut entries = procfs::net::tcp().context("cannot read the TCP sockets in /proc/net")?;
    // A kernel without IPv6 has no such file.
    entries.extend(procfs::net::tcp6().unwrap_or_default());
    let listening = |entry: &TcpNetEntry| entry.state == TcpState::Listen;
    Ok(entries.into_iter().filter(listening).map(|entry| (entry.local_address, entry.inode)).collect())
}

fn udp() -> Result<Vec<(SocketAddr, u64)>> {
    let mut entries = procfs::net::udp().context("cannot read the UDP sockets in /proc/net")?;
    entries.extend(procfs::net::udp6().unwrap_or_default());
    // A connected socket takes only what its peer sends.
    let unconnected = |entry: &UdpNetEntry| entry.state != UdpState::Established;
    Ok(entries.into_iter().filter(unconnected).map(|entry| (entry.local_address, entry.inode)).collect())
}

/// Which process holds which socket. Processes come and go meanwhile: who cannot be read is left out.
fn owners() -> HashMap<u64, (String, i32)> {
    let mut owners = HashMap::new();
    for process in procfs::process::all_processes().into_iter().flatten().flatten() {
        let (Ok(descriptors), Ok(name)) = (process.fd(), name(&process)) else { continue };
        for descriptor in descriptors.flatten() {
            if let FDTarget::Socket(inode) = descriptor.target {
                owners.insert(inode, (name.clone(), process.pid()));
            }
        }
    }
    owners
}

fn name(process: &Process) -> Result<String> {
    // A process chooses its name: nothing of it may reach a terminal unescaped.
    Ok(process.stat()?.comm.escape_default().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ports(port: u16) -> PortRange {
        PortRange::new(port, port).unwrap()
    }

    #[test]
    fn a_tcp_listener_is_found_with_its_process() {
        let socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = socket.local_addr().unwrap();
        let found = find(Protocol::Tcp, &[address.ip()], ports(address.port())).unwrap();
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].address, address);
        assert_eq!(found[0].process.as_ref().unwrap().1, std::process::id() as i32);
    }

    #[test]
    fn a_listener_on_all_addresses_meets_every_rule() {
        let socket = std::net::TcpListener::bind("[::]:0").unwrap();
        let port = socket.local_addr().unwrap().port();
        assert_eq!(find(Protocol::TcpUdp, &[], ports(port)).unwrap().len(), 1);
    }

    #[test]
    fn other_addresses_ports_and_protocols_do_not_meet() {
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let address = socket.local_addr().unwrap();
        assert_eq!(find(Protocol::Udp, &[address.ip()], ports(address.port())).unwrap().len(), 1);
        assert!(
            find(Protocol::Udp, &["192.0.2.1".parse().unwrap()], ports(address.port())).unwrap().is_empty()
        );
        socket.connect(address).unwrap();
        assert!(find(Protocol::Udp, &[address.ip()], ports(address.port())).unwrap().is_empty());
    }
}
