//! The few TCP facts that a flow's life hangs on (RFC 9293 section 3.1).

pub const FIN: u8 = 0x01;
pub const SYN: u8 = 0x02;
pub const RST: u8 = 0x04;
pub const ACK: u8 = 0x10;

/// What the core needs of a segment's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    pub flags: u8,
    /// Host byte order.
    pub seq: u32,
    /// Host byte order.
    pub ack: u32,
    /// The sequence number behind it: payload, SYN and FIN take one each byte and flag.
    pub end: u32,
}

impl Segment {
    pub const NONE: Self = Self { flags: 0, seq: 0, ack: 0, end: 0 };

    /// Opens a connection. (One that would end it as well is nobody's honest segment.)
    #[inline(always)]
    pub fn is_syn(&self) -> bool {
        self.flags & (SYN | ACK | RST | FIN) == SYN
    }

    /// Belongs to a connection that has been opened before, and does not end it.
    #[inline(always)]
    pub fn is_under_way(&self) -> bool {
        self.flags & (SYN | ACK | RST | FIN) == ACK
    }

    /// Answers a SYN.
    #[inline(always)]
    pub fn is_syn_ack(&self) -> bool {
        self.flags & (SYN | ACK | RST) == SYN | ACK
    }

    /// Changes a connection's state; all others only carry data and acknowledgements.
    #[inline(always)]
    pub fn is_control(&self) -> bool {
        self.flags & (SYN | FIN | RST) != 0
    }
}
