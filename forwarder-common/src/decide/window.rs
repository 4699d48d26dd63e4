//! Where a TCP connection stands in its sequence numbers, as far as it takes to tell a segment of it
//! from one of somebody who only knows its addresses and ports.

use crate::{
    address::Address,
    flow::{ACK_KNOWN, Flow, INWARD, PICKED_UP, PROVEN, SEQ_KNOWN, UNANSWERED},
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

/// Whether `number` is at most a stride from `known`, on either side.
#[inline(always)]
fn is_a_stride_from(number: u32, known: u32) -> bool {
    number.wrapping_sub(known).wrapping_add(STRIDE) <= 2 * STRIDE
}

/// The later of two numbers that are not far apart.
#[inline(always)]
fn later(number: u32, known: u32) -> u32 {
    if number.wrapping_sub(known) <= STRIDE { number } else { known }
}

/// Moves a direction on by one of its segments, which is believed only if both of its numbers fit:
/// a blind guess hits that once in 2^22 times.
///
/// As long as nobody has proven anything (`settled` is false), a SYN says where its sender begins,
/// whatever was said before; and so does each segment of the client of a connection that was picked
/// up, of which the first may have been somebody else's.
#[inline(always)]
pub fn follow<A: Address>(flow: &mut Flow<A>, segment: &Segment, settled: bool) {
    let has_ack = segment.flags & tcp::ACK != 0;
    let seq_fits = flow.flags & SEQ_KNOWN != 0 && is_a_stride_from(segment.end, flow.seq_end);
    let ack_fits = match (has_ack, flow.flags & ACK_KNOWN != 0) {
        (true, true) => is_a_stride_from(segment.ack, flow.ack),
        (true, false) => true,
        (false, known) => !known,
    };
    if seq_fits && ack_fits {
        flow.seq_end = later(segment.end, flow.seq_end);
        if has_ack {
            let known = flow.flags & ACK_KNOWN != 0;
            flow.ack = if known { later(segment.ack, flow.ack) } else { segment.ack };
            flow.flags |= ACK_KNOWN;
        }
        return;
    }
    let picked_up = flow.direction == INWARD && flow.flags & PICKED_UP != 0;
    let restarts = !settled && flow.progress != PROVEN && (picked_up || segment.flags & tcp::SYN != 0);
    if flow.flags & SEQ_KNOWN == 0 || restarts {
        flow.seq_end = segment.end;
        flow.ack = segment.ack;
        flow.flags = flow.flags & !ACK_KNOWN | SEQ_KNOWN | if has_ack { ACK_KNOWN } else { 0 };
        if picked_up {
            flow.progress = UNANSWERED;
        }
    }
}

/// Where one direction of a connection stands.
#[derive(Clone, Copy)]
pub struct Standing {
    seq_end: u32,
    ack: u32,
    flags: u8,
}

impl Standing {
    #[inline(always)]
    pub fn of<A: Address>(flow: &Flow<A>) -> Self {
        Self { seq_end: flow.seq_end, ack: flow.ack, flags: flow.flags }
    }
}

/// Whether a segment that would end the connection is one of it: it stands near the last one of its
/// direction, or near what the other end has acknowledged; or it answers to a SYN. (RFC 5961 section 3
/// would have the receiver's window, which a router does not know as exactly.)
#[inline(always)]
pub fn fits(own: Standing, other: Standing, segment: &Segment) -> bool {
    own.flags & SEQ_KNOWN != 0 && is_near(segment.seq, own.seq_end)
        || other.flags & ACK_KNOWN != 0 && is_near(segment.seq, other.ack)
        || own.flags & SEQ_KNOWN == 0 && segment.flags & tcp::ACK != 0 && segment.ack == other.seq_end
}
