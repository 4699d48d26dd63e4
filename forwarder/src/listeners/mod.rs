//! Services of the router itself, found by the sockets that they listen on.

mod ipv6_only;

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result};
use procfs::net::{TcpNetEntry, TcpState, UdpNetEntry, UdpState};
use procfs::process::{FDTarget, Process};

use crate::rule::{Family, PortRange, Protocol};

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

/// Where a rule would take packets: ports of addresses of one family.
#[derive(Clone, Copy, Debug)]
pub struct Ports<'a> {
    pub family: Family,
    pub protocol: Protocol,
    pub addresses: &'a [IpAddr],
    pub ports: PortRange,
}

/// Listeners of this network namespace on `wanted`, also on all addresses.
pub fn find(wanted: Ports) -> Result<Vec<Listener>> {
    let protocol = wanted.protocol;
    let mut sockets = Vec::new();
    if protocol.tcp() {
        sockets.extend(tcp()?.into_iter().map(|(address, inode)| ("tcp", address, inode)));
    }
    if protocol.udp() {
        sockets.extend(udp()?.into_iter().map(|(address, inode)| ("udp", address, inode)));
    }
    sockets.retain(|(_, address, _)| wanted.ports.contains(address.port()));
    // Where the kernel does not say, a socket on all addresses is taken for one of both families.
    let of_ipv4 = wanted.family == Family::Ipv4 && !sockets.is_empty();
    let ipv6_only = if of_ipv4 { ipv6_only::find().unwrap_or_default() } else { HashSet::new() };
    sockets.retain(|(_, address, inode)| match (address.ip().to_canonical(), wanted.family) {
        (IpAddr::V6(all), Family::Ipv4) if all.is_unspecified() => !ipv6_only.contains(inode),
        (all, family) if all.is_unspecified() => family.has(all),
        (one, _) => wanted.addresses.contains(&one),
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
    use socket2::{Domain, Socket, Type};

    use super::*;

    fn found(protocol: Protocol, addresses: &[&str], port: u16) -> Vec<Listener> {
        let addresses: Vec<IpAddr> = addresses.iter().map(|address| address.parse().unwrap()).collect();
        let family = addresses.first().map_or(Family::Ipv4, |address| Family::of(*address));
        let ports = PortRange::new(port, port).unwrap();
        find(Ports { family, protocol, addresses: &addresses, ports }).unwrap()
    }

    fn bound(kind: Type, host: &str, ipv6_only: bool) -> Socket {
        let address = SocketAddr::new(host.parse().unwrap(), 0);
        let socket = Socket::new(Domain::for_address(address), kind, None).unwrap();
        if address.is_ipv6() {
            socket.set_only_v6(ipv6_only).unwrap();
        }
        socket.bind(&address.into()).unwrap();
        if kind == Type::STREAM {
            socket.listen(1).unwrap();
        }
        socket
    }

    #[test]
    fn a_tcp_listener_is_found_with_its_process() {
        for host in ["127.0.0.1", "::1"] {
            let socket = std::net::TcpListener::bind((host, 0)).unwrap();
            let address = socket.local_addr().unwrap();
            let found = found(Protocol::Tcp, &[host], address.port());
            assert_eq!(found.len(), 1);
            assert_eq!(found[0].address, address);
            assert_eq!(found[0].process.as_ref().unwrap().1, std::process::id() as i32);
        }
    }

    #[test]
    fn a_listener_on_all_addresses_meets_every_rule_of_its_families() {
        for (host, ipv6_only, meets) in
            [("0.0.0.0", false, [true, false]), ("::", false, [true, true]), ("::", true, [false, true])]
        {
            for (kind, protocol) in [(Type::STREAM, Protocol::Tcp), (Type::DGRAM, Protocol::Udp)] {
                let socket = bound(kind, host, ipv6_only);
                let port = socket.local_addr().unwrap().as_socket().unwrap().port();
                for (one, meets) in ["192.0.2.1", "2001:db8::1"].into_iter().zip(meets) {
                    let found = found(protocol, &[one], port);
                    assert_eq!(found.len(), usize::from(meets), "{host} {ipv6_only} {one}: {found:?}");
                }
            }
        }
    }

    #[test]
    fn other_addresses_ports_and_protocols_do_not_meet() {
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let address = socket.local_addr().unwrap();
        assert_eq!(found(Protocol::Udp, &["127.0.0.1"], address.port()).len(), 1);
        assert!(found(Protocol::Udp, &["192.0.2.1"], address.port()).is_empty());
        assert!(found(Protocol::Tcp, &["127.0.0.1"], address.port()).is_empty());
        socket.connect(address).unwrap();
        assert!(found(Protocol::Udp, &["127.0.0.1"], address.port()).is_empty());
    }
}
