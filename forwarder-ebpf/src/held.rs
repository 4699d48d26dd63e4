//! Keeps the bytes of a fragment that came before the first one of its packet, and brings them back.

use aya_ebpf::{
    bindings::{BPF_F_INGRESS, BPF_F_RECOMPUTE_CSUM},
    helpers::{
        bpf_clone_redirect, bpf_redirect, bpf_skb_change_tail, bpf_skb_load_bytes, bpf_skb_store_bytes,
    },
    programs::TcContext,
};
use forwarder_common::{
    fragment::{HeldKey, LONGEST_HELD, TRAIN_LIFETIME},
    tables::Flows,
    wire::ipv4,
};

use crate::{
    link::Link,
    tables::{self, FlowMaps, Tabled},
};

/// What has become of the packet in hand.
pub enum Kept {
    /// Nothing of it is needed any more.
    Gone,
    /// It comes in again: what `bpf_redirect` has returned.
    Redirected(i32),
}

/// Keeps a copy. The core has seen to it that it fits.
#[inline(always)]
#[expect(clippy::manual_range_contains, reason = "of a range the verifier learns no least value")]
pub fn hold<A: Tabled, L: Link>(ctx: &TcContext, key: &HeldKey<A>, ifindex: u32, now: u64) -> Kept {
    let len = (ctx.len() as usize).wrapping_sub(L::PRESENT);
    let Some(held) = tables::holding() else { return Kept::Gone };
    // The least length is for the verifier, which wants the helper's to be no 0.
    if len < ipv4::MIN_LEN || len > LONGEST_HELD {
        return Kept::Gone;
    }
    held.expires = now.wrapping_add(TRAIN_LIFETIME);
    held.len = len as u32;
    let (skb, bytes) = (ctx.skb.skb, held.bytes.as_mut_ptr());
    // SAFETY: the context is this program's own; `bytes` has room for `LONGEST_HELD`.
    if unsafe { bpf_skb_load_bytes(skb.cast(), L::PRESENT as u32, bytes.cast(), len as u32) } != 0 {
        return Kept::Gone;
    }
    if A::held().insert(key, held, 0).is_err() {
        return Kept::Gone;
    }
    // Meanwhile the first one may have come on another CPU, and not have seen this one yet.
    match FlowMaps.train(&key.packet) {
        Some(train) if now < train.expires && A::held().remove(key).is_ok() => again(ifindex),
        _ => Kept::Gone,
    }
}

/// Lets the packet in hand come in again, and behind it the one that was held.
#[inline(always)]
pub fn release<A: Tabled, L: Link>(ctx: &TcContext, key: &HeldKey<A>, ifindex: u32) -> Kept {
    // SAFETY: the context is this program's own; no packet pointer is used after the calls here.
    if unsafe { bpf_clone_redirect(ctx.skb.skb, ifindex, u64::from(BPF_F_INGRESS)) } != 0 {
        return Kept::Gone;
    }
    let became = become_held::<A, L>(ctx, key);
    // Also where that was refused: the clone, which comes in next, would find it there and be cloned anew.
    if A::held().remove(key).is_err() || became.is_err() {
        return Kept::Gone;
    }
    again(ifindex)
}

/// Puts a held packet in the place of the one in hand. The Ethernet header stays.
#[inline(always)]
#[expect(clippy::manual_range_contains, reason = "of a range the verifier learns no least value")]
fn become_held<A: Tabled, L: Link>(ctx: &TcContext, key: &HeldKey<A>) -> Result<(), ()> {
    let held = tables::held(key).ok_or(())?;
    let len = held.len as usize;
    if len < ipv4::MIN_LEN || len > LONGEST_HELD {
        return Err(());
    }
    let (skb, bytes) = (ctx.skb.skb, held.bytes.as_ptr());
    let (at, flags) = (L::PRESENT as u32, u64::from(BPF_F_RECOMPUTE_CSUM));
    // SAFETY: as in `release`; `bytes` has `LONGEST_HELD` of them.
    let done = unsafe {
        bpf_skb_change_tail(skb, at + len as u32, 0) == 0
            && bpf_skb_store_bytes(skb.cast(), at, bytes.cast(), len as u32, flags) == 0
    };
    if done { Ok(()) } else { Err(()) }
}

#[inline(always)]
fn again(ifindex: u32) -> Kept {
    // SAFETY: the helper takes plain numbers.
    Kept::Redirected(unsafe { bpf_redirect(ifindex, u64::from(BPF_F_INGRESS)) as i32 })
}
