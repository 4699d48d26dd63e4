//! Where a TCP connection stands in its sequence numbers, as far as it takes to tell a segment of it
//! from one of somebody who only knows its addresses and ports.

use crate::{
    address::Address,
    flow::{ACK_KNOWN, Flow, SEQ_KNOWN},
    tcp::{self, Segment},
};

/// How far from what is known a segment may stand that ends a connection or proves one: a window
/// without scaling (RFC 9293 section 3.4). A blind guess hits it once in 2^14 to 2^15 times.
const NEAR: u32 = 1 << 16;

/// How far a connection may get on between two segments that are seen. What stands further off is
/// not believed: the window cannot be driven away.
const STRIDE: u32 = 1 << 20;

/// Whether `number` is `known`, or at most `NEAR` from it.
#[inline(always)]
pub fn is_near(number: u32, known: u32) -> bool {
    number.wrapping_sub(known).wrapping_add(NEAR) <= 2 * NEAR
}

/// Moves a direction on by one of its segments.
#[inline(always)]
pub fn follow<A: Address>(flow: &mut Flow<A>, segment: &Segment) {
    if flow.flags & SEQ_KNOWN == 0 || segment.end.wrapping_sub(flow.seq_end) <= STRIDE {
        flow.seq_end = segment.end;
        flow.flags |= SEQ_KNOWN;
    }
    if segment.flags & tcp::ACK == 0 {
        return;
    }
    if flow.flags & ACK_KNOWN == 0 || segment.ack.wrapping_sub(flow.ack) <= STRIDE {
        flow.ack = segment.ack;
        flow.flags |= ACK_KNOWN;
    }
}

/// Whether a segment that would end the connection is one of it: it stands near the last one of its
/// direction, or near what the other end has acknowledged; or it answers to a SYN. (RFC 5961 section 3
/// would have the receiver's window, which a router does not know as exactly.)
#[inline(always)]
pub fn fits<A: Address>(own: &Flow<A>, other: &Flow<A>, segment: &Segment) -> bool {
    own.flags & SEQ_KNOWN != 0 && is_near(segment.seq, own.seq_end)
        || other.flags & ACK_KNOWN != 0 && is_near(segment.seq, other.ack)
        || own.flags & SEQ_KNOWN == 0 && segment.flags & tcp::ACK != 0 && segment.ack == other.seq_end
}
