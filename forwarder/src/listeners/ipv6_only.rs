//! Which IPv6 sockets take IPv6 alone (`IPV6_V6ONLY`): /proc does not say, the kernel's socket diagnostics do.

use std::collections::HashSet;

use anyhow::{Context, Result, ensure};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_SOCK_DIAG};

// From linux/netlink.h, linux/sock_diag.h and linux/inet_diag.h.
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const NLM_F_REQUEST_AND_DUMP: u16 = 0x301;
const INET_DIAG_SKV6ONLY: u16 = 11;
/// nlmsghdr.
const HEADER: usize = 16;
/// inet_diag_req_v2: of it, all behind the states is zero, for every socket.
const REQUEST: usize = 56;
/// inet_diag_msg, and where it has the inode.
const ANSWER: usize = 72;
const INODE: usize = 68;

/// The inodes of the TCP sockets that listen, and of the unconnected UDP sockets, that take IPv6 alone.
pub fn find() -> Result<HashSet<u64>> {
    const LISTEN: u32 = 1 << 10;
    const CLOSE: u32 = 1 << 7;
    let mut inodes = HashSet::new();
    for (protocol, states) in [(libc::IPPROTO_TCP, LISTEN), (libc::IPPROTO_UDP, CLOSE)] {
        dump(protocol as u8, states, &mut inodes).context("cannot ask for the kernel's IPv6 sockets")?;
    }
    Ok(inodes)
}

fn dump(protocol: u8, states: u32, inodes: &mut HashSet<u64>) -> Result<()> {
    let mut socket = Socket::new(NETLINK_SOCK_DIAG)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    socket.send(&request(protocol, states), 0)?;
    loop {
        let (datagram, _) = socket.recv_from_full()?;
        let mut rest = datagram.as_slice();
        ensure!(!rest.is_empty(), "an empty answer");
        while let Some((kind, body, behind)) = split(rest) {
            match kind {
                NLMSG_DONE => return Ok(()),
                NLMSG_ERROR => anyhow::bail!("the kernel has no such diagnostics"),
                SOCK_DIAG_BY_FAMILY => inodes.extend(ipv6_only(body)),
                _ => {}
            }
            rest = behind;
        }
    }
}

fn request(protocol: u8, states: u32) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER + REQUEST);
    bytes.extend(((HEADER + REQUEST) as u32).to_ne_bytes());
    bytes.extend(SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    bytes.extend(NLM_F_REQUEST_AND_DUMP.to_ne_bytes());
    bytes.resize(HEADER, 0);
    bytes.extend([libc::AF_INET6 as u8, protocol, 0, 0]);
    bytes.extend(states.to_ne_bytes());
    bytes.resize(HEADER + REQUEST, 0);
    bytes
}

/// The first message's type and body, and what is behind it.
fn split(bytes: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    let length = u32::from_ne_bytes(*bytes.first_chunk()?) as usize;
    let kind = u16::from_ne_bytes(*bytes.get(4..)?.first_chunk()?);
    let body = bytes.get(HEADER..length)?;
    Some((kind, body, bytes.get(length.next_multiple_of(4)..).unwrap_or_default()))
}

/// The inode of the socket that an answer is about, if it takes IPv6 alone.
fn ipv6_only(answer: &[u8]) -> Option<u64> {
    let inode = u32::from_ne_bytes(*answer.get(INODE..)?.first_chunk()?);
    let mut attributes = answer.get(ANSWER..)?;
    loop {
        let length = u16::from_ne_bytes(*attributes.first_chunk()?) as usize;
        let kind = u16::from_ne_bytes(*attributes.get(2..)?.first_chunk()?);
        if kind == INET_DIAG_SKV6ONLY {
            return (*attributes.get(4)? != 0).then(|| inode.into());
        }
        attributes = attributes.get(length.max(4).next_multiple_of(4)..)?;
    }
}
