//! Sessions that the host, or its NAT, had from a port before a rule took it: the packet path sees those
//! that begin later by itself.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
};

use anyhow::Result;
use aya::{
    Ebpf,
    maps::{self, MapData},
};
use forwarder_common::{
    address::{Ipv6, Port},
    flow::{FlowKey, Side, Tuple},
    wire::{tcp, udp},
};
use procfs::net::{TcpNetEntry, TcpState, UdpNetEntry};

use super::{clock::monotonic, netfilter::conntrack, rules::mapped_address, take};
use crate::datapath::KernelRule;

/// What an answer to the host has as its source and destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    pub protocol: u8,
    pub src: SocketAddr,
    pub dst: SocketAddr,
}

/// Ports that rules have: whether it is a DMZ host's, address, protocol, first port, and the last one. Those
/// of DMZ hosts do not overlap each other, nor do all others.
type Claims = BTreeMap<(bool, IpAddr, u8, u16), u16>;

pub struct HostSessions {
    map: maps::HashMap<MapData, FlowKey<Ipv6>, u64>,
    claims: Claims,
}

impl HostSessions {
    pub fn open(ebpf: &mut Ebpf) -> Result<Self> {
        Ok(Self { map: take(ebpf, "HOST_SESSIONS")?, claims: Claims::new() })
    }

    /// To be called before `wanted` is brought to the packet path: notes the sessions of the host from
    /// ports that only now become a rule's, as far as its sockets and its connection tracking tell.
    pub fn spare(&mut self, wanted: &[KernelRule]) {
        let claims = claims(wanted);
        let new: Claims = claims
            .iter()
            .filter(|(key, last)| self.claims.get(key) != Some(*last))
            .map(|(key, last)| (*key, *last))
            .collect();
        self.claims = claims;
        if new.is_empty() {
            return;
        }
        let tracked = conntrack::answers().unwrap_or_else(|error| {
            log::debug!("the host's connection tracking cannot be read: {error}");
            Vec::new()
        });
        let now = monotonic();
        for answer in sockets().chain(tracked).filter(|answer| is_claimed(&new, answer)) {
            if let Err(error) = self.map.insert(key(&answer), now, 0) {
                log::warn!("a session of the host from a mapped port may lose its answers: {error}");
                return;
            }
        }
    }
}

fn claims(rules: &[KernelRule]) -> Claims {
    let mut claims = Claims::new();
    for rule in rules {
        let protocols = [(rule.protocol.tcp(), tcp::NUMBER), (rule.protocol.udp(), udp::NUMBER)];
        for (_, protocol) in protocols.into_iter().filter(|(is_its, _)| *is_its) {
            for external in &rule.externals {
                let first = (rule.dmz, *external, protocol, rule.external_ports.first);
                claims.insert(first, rule.external_ports.last);
            }
        }
    }
    claims
}

fn is_claimed(claims: &Claims, answer: &Answer) -> bool {
    let (address, port) = (answer.dst.ip(), answer.dst.port());
    [false, true].into_iter().any(|dmz| {
        let before = claims.range(..=(dmz, address, answer.protocol, port)).next_back();
        before.is_some_and(|(claim, last)| {
            (claim.0, claim.1, claim.2) == (dmz, address, answer.protocol) && port <= *last
        })
    })
}

fn key(answer: &Answer) -> FlowKey<Ipv6> {
    let Answer { protocol, src, dst } = answer;
    let tuple = Tuple {
        src: mapped_address(src.ip()),
        dst: mapped_address(dst.ip()),
        src_port: Port::new(src.port()),
        dst_port: Port::new(dst.port()),
    };
    FlowKey::new(tuple, *protocol, Side::External)
}

/// What the router's own sockets are connected to. Files that are not there hold none.
fn sockets() -> impl Iterator<Item = Answer> {
    let tcp = [procfs::net::tcp(), procfs::net::tcp6()].into_iter().flatten().flatten();
    let tcp = tcp.filter(|entry: &TcpNetEntry| entry.state != TcpState::Listen);
    let tcp = tcp.map(|entry| answer(tcp::NUMBER, entry.remote_address, entry.local_address));
    let udp = [procfs::net::udp(), procfs::net::udp6()].into_iter().flatten().flatten();
    tcp.chain(udp.map(|entry: UdpNetEntry| answer(udp::NUMBER, entry.remote_address, entry.local_address)))
}

/// What is not connected has an unspecified source, and is nobody's answer.
fn answer(protocol: u8, src: SocketAddr, dst: SocketAddr) -> Answer {
    let canonical = |end: SocketAddr| SocketAddr::new(end.ip().to_canonical(), end.port());
    Answer { protocol, src: canonical(src), dst: canonical(dst) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_claimed_by_address_protocol_and_port() {
        let w = IpAddr::from([203, 0, 113, 1]);
        let claims = Claims::from([
            ((false, w, 6, 40_000), 40_009),
            ((false, w, 17, 53), 53),
            ((false, w, 6, 50_000), 50_000),
        ]);
        let is = |protocol, address: [u8; 4], port| {
            let (src, dst) = (SocketAddr::new(w, 1), SocketAddr::new(address.into(), port));
            is_claimed(&claims, &Answer { protocol, src, dst })
        };
        for port in [40_000, 40_005, 40_009, 50_000] {
            assert!(is(6, [203, 0, 113, 1], port), "{port}");
            assert!(!is(17, [203, 0, 113, 1], port) && !is(6, [203, 0, 113, 2], port), "{port}");
        }
        for port in [1, 39_999, 40_010, 49_999, 50_001] {
            assert!(!is(6, [203, 0, 113, 1], port), "{port}");
        }
        assert!(is(17, [203, 0, 113, 1], 53));
    }

    #[test]
    fn a_dmz_host_claims_what_lies_between_the_ports_of_other_rules() {
        let w = IpAddr::from([203, 0, 113, 1]);
        let claims = Claims::from([((true, w, 6, 1), 65_535), ((false, w, 6, 8080), 8080)]);
        for port in [1, 8080, 40_000] {
            let (src, dst) = (SocketAddr::new(w, 1), SocketAddr::new(w, port));
            assert!(is_claimed(&claims, &Answer { protocol: 6, src, dst }), "{port}");
        }
    }

    #[test]
    fn a_connected_socket_is_found_also_where_it_is_of_ipv6() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let stream = std::net::TcpStream::connect(format!("[::ffff:127.0.0.1]:{}", address.port())).unwrap();
        let local = stream.local_addr().unwrap().port();
        let wanted = answer(6, address, SocketAddr::from(([127, 0, 0, 1], local)));
        assert!(sockets().any(|answer| answer == wanted));
    }
}
