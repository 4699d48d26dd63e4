//! Addresses, ports and MACs as they stand in a packet.
//!
//! Their bytes in memory are those on the wire; inside they are integers, because the BPF back end
//! keeps an integer in one register where it takes a byte array apart.

use crate::checksum::Delta;

/// IPv4 and IPv6 alike; the core is written over this, so that each family has tables of its own size.
pub trait Address: Copy + Default + Eq + core::hash::Hash + core::fmt::Debug + 'static {
    /// All zeroes.
    const UNSPECIFIED: Self;

    /// What fills up a flow entry to whole words of eight bytes.
    type Padding: Copy + Eq + core::fmt::Debug;
    const PADDING: Self::Padding;

    /// As an IPv6 address: of an IPv4 one the mapped form (RFC 4291 section 2.5.5.2). Tables that are not
    /// asked for every packet serve both families by it.
    fn mapped(self) -> Ipv6;

    /// What [`Address::mapped`] has made of an address of this family.
    fn from_mapped(mapped: Ipv6) -> Option<Self>;

    /// Whether no packet that a router forwards can have it as its source: unspecified, loopback,
    /// multicast, reserved (RFC 1122 section 3.2.1.3, RFC 6890), link-local (RFC 4291 section 2.5.6).
    fn is_impossible_source(self) -> bool;

    /// What its replacement by `new` changes in a checksum that covers it.
    fn replaced_by(self, new: Self) -> Delta;

    /// Its share of a one's complement sum.
    fn sum(self) -> u32;

    /// What stands for all the addresses that one client is given, in the mapped form: of IPv4 the
    /// address itself, of IPv6 its /64.
    fn site(self) -> Ipv6;

    /// What the replacement of a pair of addresses changes in a checksum that covers both.
    #[inline(always)]
    fn pair_replaced_by(old: (&Self, &Self), new: (&Self, &Self)) -> Delta {
        old.0.replaced_by(*new.0).and(old.1.replaced_by(*new.1))
    }
}

/// An IPv4 address.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Ipv4(u32);

impl Ipv4 {
    #[inline(always)]
    pub const fn new(bytes: [u8; 4]) -> Self {
        Self(u32::from_ne_bytes(bytes))
    }

    #[inline(always)]
    pub const fn bytes(self) -> [u8; 4] {
        self.0.to_ne_bytes()
    }

    /// The word as the kernel's `__be32`.
    #[inline(always)]
    pub const fn word(self) -> u32 {
        self.0
    }

    #[inline(always)]
    pub const fn from_word(word: u32) -> Self {
        Self(word)
    }
}

impl Address for Ipv4 {
    const UNSPECIFIED: Self = Self(0);

    type Padding = [u32; 0];
    const PADDING: Self::Padding = [];

    #[inline(always)]
    fn mapped(self) -> Ipv6 {
        Ipv6([0, 0, MAPPED, self.0])
    }

    #[inline(always)]
    fn from_mapped(mapped: Ipv6) -> Option<Self> {
        let [first, second, third, address] = mapped.0;
        (first | second | third ^ MAPPED == 0).then_some(Self(address))
    }

    #[inline(always)]
    fn is_impossible_source(self) -> bool {
        let first = self.bytes()[0];
        first == 0 || first == 127 || first >= 224
    }

    #[inline(always)]
    fn replaced_by(self, new: Self) -> Delta {
        Delta::of_u32(self.0, new.0)
    }

    #[inline(always)]
    fn sum(self) -> u32 {
        (self.0 & 0xffff) + (self.0 >> 16)
    }

    #[inline(always)]
    fn site(self) -> Ipv6 {
        self.mapped()
    }
}

/// An IPv6 address.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, Eq)]
pub struct Ipv6([u32; 4]);

/// The third word of `::ffff:0:0/96`, as it lies in memory.
const MAPPED: u32 = 0x0000_ffff_u32.to_be();

// By words: derived, the comparison would be a call of `memcmp`, byte by byte in a BPF program.
impl PartialEq for Ipv6 {
    #[inline(always)]
    fn eq(&self, other: &Self) -> bool {
        let ([a, b, c, d], [e, f, g, h]) = (self.0, other.0);
        (a ^ e) | (b ^ f) | (c ^ g) | (d ^ h) == 0
    }
}

impl core::hash::Hash for Ipv6 {
    fn hash<H: core::hash::Hasher>(&self, state: &mut H) {
        self.0.hash(state);
    }
}

impl Ipv6 {
    #[inline(always)]
    pub const fn new(bytes: [u8; 16]) -> Self {
        let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = bytes;
        Self([
            u32::from_ne_bytes([a, b, c, d]),
            u32::from_ne_bytes([e, f, g, h]),
            u32::from_ne_bytes([i, j, k, l]),
            u32::from_ne_bytes([m, n, o, p]),
        ])
    }

    #[inline(always)]
    pub fn bytes(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        for (word, place) in self.0.iter().zip(bytes.chunks_exact_mut(4)) {
            place.copy_from_slice(&word.to_ne_bytes());
        }
        bytes
    }

    /// The words as the kernel's `__be32[4]`.
    #[inline(always)]
    pub const fn words(self) -> [u32; 4] {
        self.0
    }

    #[inline(always)]
    pub const fn from_words(words: [u32; 4]) -> Self {
        Self(words)
    }
}

impl Address for Ipv6 {
    const UNSPECIFIED: Self = Self([0; 4]);

    type Padding = [u32; 1];
    const PADDING: Self::Padding = [0];

    #[inline(always)]
    fn mapped(self) -> Ipv6 {
        self
    }

    #[inline(always)]
    fn from_mapped(mapped: Ipv6) -> Option<Self> {
        Some(mapped)
    }

    #[inline(always)]
    fn is_impossible_source(self) -> bool {
        let [first, second, third, _] = self.0;
        let first = u32::from_be(first);
        let is_link_local = first & 0xffc0_0000 == 0xfe80_0000;
        let is_multicast = first >> 24 == 0xff;
        // Unspecified, loopback and the long deprecated compatible addresses; mapped ones stay inside hosts.
        let is_embedded = first | second == 0 && (third == 0 || third == MAPPED);
        is_link_local || is_multicast || is_embedded
    }

    #[inline(always)]
    fn replaced_by(self, new: Self) -> Delta {
        let ([a, b, c, d], [e, f, g, h]) = (self.0, new.0);
        Delta::of_u32(a, e).and(Delta::of_u32(b, f)).and(Delta::of_u32(c, g)).and(Delta::of_u32(d, h))
    }

    #[inline(always)]
    fn sum(self) -> u32 {
        crate::checksum::sum(self.0)
    }

    #[inline(always)]
    fn site(self) -> Ipv6 {
        let [first, second, ..] = self.0;
        Self([first, second, 0, 0])
    }

    /// (A function of its own: a BPF program would else keep the sixteen words on its stack until they are
    /// written.)
    #[inline(never)]
    fn pair_replaced_by(old: (&Self, &Self), new: (&Self, &Self)) -> Delta {
        old.0.replaced_by(*new.0).and(old.1.replaced_by(*new.1))
    }
}

/// A TCP or UDP port.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Port(u16);

impl Port {
    #[inline(always)]
    pub const fn new(number: u16) -> Self {
        Self(number.to_be())
    }

    /// In host byte order.
    #[inline(always)]
    pub const fn number(self) -> u16 {
        u16::from_be(self.0)
    }

    /// The word as the kernel's `__be16`.
    #[inline(always)]
    pub const fn word(self) -> u16 {
        self.0
    }

    #[inline(always)]
    pub const fn from_word(word: u16) -> Self {
        Self(word)
    }

    #[inline(always)]
    pub fn replaced_by(self, new: Self) -> Delta {
        Delta::of_u16(self.0, new.0)
    }
}

/// The first twelve bytes of an Ethernet frame: destination, then source.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Macs([u32; 3]);

impl Macs {
    #[inline(always)]
    pub const fn new(dst: [u8; 6], src: [u8; 6]) -> Self {
        Self([
            u32::from_ne_bytes([dst[0], dst[1], dst[2], dst[3]]),
            u32::from_ne_bytes([dst[4], dst[5], src[0], src[1]]),
            u32::from_ne_bytes([src[2], src[3], src[4], src[5]]),
        ])
    }

    #[inline(always)]
    pub const fn words(self) -> [u32; 3] {
        self.0
    }

    #[inline(always)]
    pub const fn from_words(words: [u32; 3]) -> Self {
        Self(words)
    }

    #[inline(always)]
    pub fn dst(self) -> [u8; 6] {
        let ([d0, d1, d2, d3], [d4, d5, ..]) = (self.0[0].to_ne_bytes(), self.0[1].to_ne_bytes());
        [d0, d1, d2, d3, d4, d5]
    }

    #[inline(always)]
    pub fn src(self) -> [u8; 6] {
        let ([.., s0, s1], [s2, s3, s4, s5]) = (self.0[1].to_ne_bytes(), self.0[2].to_ne_bytes());
        [s0, s1, s2, s3, s4, s5]
    }

    /// Back to where it came from.
    #[inline(always)]
    pub fn swapped(self) -> Self {
        Self::new(self.src(), self.dst())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn macs_are_the_frames_bytes() {
        let macs = Macs::new([1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12]);
        assert_eq!(macs.dst(), [1, 2, 3, 4, 5, 6]);
        assert_eq!(macs.src(), [7, 8, 9, 10, 11, 12]);
        assert_eq!(macs.swapped(), Macs::new([7, 8, 9, 10, 11, 12], [1, 2, 3, 4, 5, 6]));
    }

    #[test]
    fn sources_that_no_honest_packet_has() {
        for impossible in [[0, 0, 0, 0], [127, 0, 0, 1], [224, 0, 0, 1], [255, 255, 255, 255]] {
            assert!(Ipv4::new(impossible).is_impossible_source(), "{impossible:?}");
        }
        for possible in [[1, 0, 0, 1], [10, 0, 0, 1], [126, 0, 0, 1], [128, 0, 0, 1], [223, 255, 255, 255]] {
            assert!(!Ipv4::new(possible).is_impossible_source(), "{possible:?}");
        }
    }

    fn ipv6(text: &str) -> Ipv6 {
        Ipv6::new(text.parse::<std::net::Ipv6Addr>().unwrap().octets())
    }

    #[test]
    fn ipv6_sources_that_no_forwarded_packet_has() {
        for impossible in ["::", "::1", "::192.0.2.1", "::ffff:192.0.2.1", "fe80::1", "febf::1", "ff02::1"] {
            assert!(ipv6(impossible).is_impossible_source(), "{impossible}");
        }
        for possible in ["2001:db8::1", "fd00::1", "fec0::1", "fe00::1", "::1:0:0:0:1", "64:ff9b::192.0.2.1"]
        {
            assert!(!ipv6(possible).is_impossible_source(), "{possible}");
        }
    }

    #[test]
    fn an_ipv4_address_is_mapped_and_found_again() {
        let address = Ipv4::new([192, 0, 2, 1]);
        assert_eq!(address.mapped(), ipv6("::ffff:192.0.2.1"));
        assert_eq!(Ipv4::from_mapped(address.mapped()), Some(address));
        for other in ["2001:db8::1", "::192.0.2.1", "1::ffff:192.0.2.1"] {
            assert_eq!(Ipv4::from_mapped(ipv6(other)), None, "{other}");
        }
    }
}
