//! The number that the kernel raises with each change of an nftables ruleset
//! (include/uapi/linux/netfilter/nf_tables.h).

use std::io;

use super::netlink::{ask, attribute};

const NFNL_SUBSYS_NFTABLES: u16 = 10;
const NFT_MSG_GETGEN: u16 = 16;
const NFTA_GEN_ID: u16 = 1;

/// Of the caller's network namespace. An error: the kernel has no nf_tables.
pub fn read() -> io::Result<u32> {
    let mut generation = None;
    ask(NFNL_SUBSYS_NFTABLES, NFT_MSG_GETGEN, 0, 0, |attributes| {
        generation = attribute(attributes, NFTA_GEN_ID).and_then(|id| id.first_chunk()).copied();
    })?;
    generation.map(u32::from_be_bytes).ok_or_else(|| io::Error::other("it knows no generation of its rules"))
}
