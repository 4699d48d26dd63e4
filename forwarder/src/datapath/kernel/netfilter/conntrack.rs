//! What the host's connection tracking knows (include/uapi/linux/netfilter/nfnetlink_conntrack.h).

use std::{
    io,
    net::{IpAddr, SocketAddr},
};

use super::netlink::{DUMP, ask, attribute};
use crate::datapath::kernel::host_sessions::Answer;

const NFNL_SUBSYS_CTNETLINK: u16 = 1;
const IPCTNL_MSG_CT_GET: u16 = 1;
/// Both families.
const AF_UNSPEC: u8 = 0;
const CTA_TUPLE_REPLY: u16 = 2;
const CTA_TUPLE_IP: u16 = 1;
const CTA_TUPLE_PROTO: u16 = 2;
/// Of IPv4 and of IPv6.
const CTA_IP_SRC: [u16; 2] = [1, 3];
const CTA_IP_DST: [u16; 2] = [2, 4];
const CTA_PROTO_NUM: u16 = 1;
const CTA_PROTO_SRC_PORT: u16 = 2;
const CTA_PROTO_DST_PORT: u16 = 3;

/// How the answers of all sessions look before NAT changes them back.
pub fn answers() -> io::Result<Vec<Answer>> {
    let mut answers = Vec::new();
    ask(NFNL_SUBSYS_CTNETLINK, IPCTNL_MSG_CT_GET, DUMP, AF_UNSPEC, |session| {
        answers.extend(answer(session))
    })?;
    Ok(answers)
}

fn answer(session: &[u8]) -> Option<Answer> {
    let tuple = attribute(session, CTA_TUPLE_REPLY)?;
    let (ip, ports) = (attribute(tuple, CTA_TUPLE_IP)?, attribute(tuple, CTA_TUPLE_PROTO)?);
    let address = |[v4, v6]: [u16; 2]| match (attribute(ip, v4), attribute(ip, v6)) {
        (Some(v4), _) => Some(IpAddr::from(*v4.first_chunk::<4>()?)),
        (None, v6) => Some(IpAddr::from(*v6?.first_chunk::<16>()?)),
    };
    let end = |ip, port| {
        let port = attribute(ports, port)?.first_chunk()?;
        Some(SocketAddr::new(address(ip)?, u16::from_be_bytes(*port)))
    };
    Some(Answer {
        protocol: *attribute(ports, CTA_PROTO_NUM)?.first()?,
        src: end(CTA_IP_SRC, CTA_PROTO_SRC_PORT)?,
        dst: end(CTA_IP_DST, CTA_PROTO_DST_PORT)?,
    })
}
