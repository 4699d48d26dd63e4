//! Fragments of IP packets (RFC 791 section 3.2, RFC 8200 section 4.5): only the first one has ports.
//!
//! What the first one was is remembered, so that later ones go its way. One that comes before the
//! first is held: a BPF program cannot keep a packet, but a copy of its bytes. It is found again by
//! where in the payload it stands: each fragment that comes looks for the one right behind it, so that
//! none has to know how many there are.

use crate::{
    address::{Address, Ipv4, Ipv6, Port},
    family::Family,
    flow::Side,
    parse::Datagram,
};

/// Which part of a packet a frame holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fragment {
    /// Of the packet, as it lies in memory; of IPv4 the lower half.
    pub id: u32,
    /// Whether more of it follows behind this part.
    pub more: bool,
    /// Of a later one: the first went through the host's stack, which has to have them all.
    pub to_host: bool,
    /// Where in the packet's payload this part stands, in bytes.
    pub offset: u32,
    /// Length of the headers in front of this part, in bytes from the IP header's start.
    pub headers: u32,
}

impl Fragment {
    pub const NOTHING: Self = Self { id: 0, more: false, to_host: false, offset: 0, headers: 0 };

    #[inline(always)]
    pub fn is_whole(&self) -> bool {
        !self.more && self.offset == 0
    }

    #[inline(always)]
    pub fn is_later(&self) -> bool {
        self.offset != 0
    }
}

/// What the fragments of one packet have in common (addresses and identification, of IPv4 the protocol
/// too), and the side that they come from. (Aligned, because the compiler writes two of its words at once,
/// and the verifier wants that aligned on the stack.)
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FragmentKey<A> {
    src: A,
    dst: A,
    id: u32,
    protocol: u8,
    side: u8,
    padding: [u8; 2],
}

impl<A: Family> FragmentKey<A> {
    #[inline(always)]
    pub fn new(datagram: &Datagram<A>, side: Side) -> Self {
        let (src, dst) = (datagram.tuple.src, datagram.tuple.dst);
        Self {
            src,
            dst,
            id: datagram.fragment.id,
            protocol: if A::FRAGMENTS_SHARE_PROTOCOL { datagram.protocol } else { 0 },
            side: side as u8,
            padding: [0; 2],
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
    pub to_host: u8,
    /// Its IP protocol number. (Later IPv6 fragments may name an extension header.)
    pub protocol: u8,
}

/// How long later fragments may take, as long as Linux waits for them (`ipfrag_time`).
pub const TRAIN_LIFETIME: u64 = 30_000_000_000;

/// How many bytes of a frame may be held, without the Ethernet header: an MTU of 9216, filled up so that
/// [`Held`] is whole words.
pub const LONGEST_HELD: usize = 9220;

/// Which fragment is held.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct HeldKey<A> {
    pub packet: FragmentKey<A>,
    /// See [`Fragment::offset`].
    offset: u32,
    padding: u32,
}

impl<A: Family> HeldKey<A> {
    #[inline(always)]
    pub fn new(datagram: &Datagram<A>, side: Side, offset: u32) -> Self {
        Self { packet: FragmentKey::new(datagram, side), offset, padding: 0 }
    }
}

impl<A: Address> HeldKey<A> {
    pub const NONE: Self = Self {
        packet: FragmentKey {
            src: A::UNSPECIFIED,
            dst: A::UNSPECIFIED,
            id: 0,
            protocol: 0,
            side: 0,
            padding: [0; 2],
        },
        offset: 0,
        padding: 0,
    };
}

/// A fragment that is held: its frame as it came in, but for the Ethernet header. (It comes back under
/// that of the fragment that it waited for, so that it does not matter by which interface each came.)
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Held {
    /// Monotonic clock in ns: from then on its packet is not waited for. As long as receivers wait, so
    /// that no fragment meets one of another packet here that it would not meet there.
    pub expires: u64,
    pub len: u32,
    pub bytes: [u8; LONGEST_HELD],
}

// No padding but the named.
const _: () = assert!(size_of::<FragmentKey<Ipv4>>() == 16 && size_of::<FragmentKey<Ipv6>>() == 40);
const _: () = assert!(size_of::<Train>() == 16);
const _: () = assert!(size_of::<HeldKey<Ipv4>>() == 24 && size_of::<HeldKey<Ipv6>>() == 48);
const _: () = assert!(size_of::<Held>() == 12 + LONGEST_HELD);
