//! Fragments of IP packets (RFC 791 section 3.2): only the first one has ports.
//!
//! What the first one was is remembered, so that later ones go its way. One that comes before the
//! first is not known to be anything: a BPF program cannot hold a packet back.

use crate::{
    address::{Address, Ipv4, Port},
    flow::Side,
    parse::Datagram,
};

/// Which part of a packet a frame holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fragment {
    /// Of the packet, as it lies in memory.
    pub id: u16,
    /// Whether more of it follows behind this part.
    pub more: bool,
    /// Of a later one: the first went through the host's stack, which has to have them all.
    pub to_host: bool,
    /// Where in the packet's payload this part stands, in bytes.
    pub offset: u32,
}

impl Fragment {
    #[inline(always)]
    pub fn is_whole(&self) -> bool {
        !self.more && self.offset == 0
    }

    #[inline(always)]
    pub fn is_later(&self) -> bool {
        self.offset != 0
    }
}

/// What the fragments of one packet have in common (RFC 791: addresses, protocol, identification),
/// and the side that they come from. (Aligned, because the compiler writes two of its words at once,
/// and the verifier wants that aligned on the stack.)
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FragmentKey<A> {
    src: A,
    dst: A,
    id: u16,
    protocol: u8,
    side: u8,
    padding: [u8; 4],
}

impl<A: Address> FragmentKey<A> {
    #[inline(always)]
    pub fn new(datagram: &Datagram<A>, side: Side) -> Self {
        let (src, dst) = (datagram.tuple.src, datagram.tuple.dst);
        Self {
            src,
            dst,
            id: datagram.fragment.id,
            protocol: datagram.protocol,
            side: side as u8,
            padding: [0; 4],
        }
    }
}

/// What the first fragment has told.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Train {
    /// Monotonic clock in ns: until then later fragments belong to it.
    pub expires: u64,
    pub src_port: Port,
    pub dst_port: Port,
    /// How much of the payload the first one had, in bytes: a later one that reaches into that would
    /// put another header in the place of the one that was looked at (RFC 1858).
    pub first_end: u16,
    /// Whether the first one went through the host's stack: 0 or 1.
    pub to_host: u16,
}

/// How long later fragments may take, as long as Linux waits for them (`ipfrag_time`).
pub const TRAIN_LIFETIME: u64 = 30_000_000_000;

// No padding but the named.
const _: () = assert!(size_of::<FragmentKey<Ipv4>>() == 16 && size_of::<Train>() == 16);
