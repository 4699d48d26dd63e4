//! The XDP and TC programs: entry points and verdicts. All decisions are in `forwarder_common`.
#![no_std]
#![no_main]
#![feature(asm_experimental_arch)]

mod counters;
mod held;
mod link;
mod packet_tc;
mod packet_xdp;
mod sessions;
mod sockets;
mod tables;

use aya_ebpf::{
    bindings::{
        TC_ACT_OK, TC_ACT_SHOT, TC_ACT_UNSPEC, bpf_redir_neigh, bpf_redir_neigh__bindgen_ty_1, xdp_action,
    },
    helpers::{bpf_redirect, bpf_redirect_neigh, bpf_skb_vlan_pop},
    macros::{classifier, xdp},
    programs::{TcContext, XdpContext},
};
use aya_log_ebpf::warn;
use forwarder_common::{
    address::{Address as _, Ipv4, Ipv6},
    decide::Core,
    layout::Hook,
    packet::Packet,
    pipeline::{self, Outcome},
    tables::Surroundings as _,
};

use crate::{
    counters::PerCpuCounters,
    held::Kept,
    link::{Bare, Ethernet, Link},
    packet_tc::TcPacket,
    packet_xdp::XdpPacket,
    tables::{AF_INET, AF_INET6, AtTcEgress, AtTcIngress, AtXdp, FlowMaps, Kernel, Place, Tabled, Workspace},
};

#[xdp]
pub fn forwarder_xdp(ctx: XdpContext) -> u32 {
    if pipeline::is_ipv6(&XdpPacket::new(&ctx)) { at_xdp::<Ipv6>(&ctx) } else { at_xdp::<Ipv4>(&ctx) }
}

#[classifier]
pub fn forwarder_ingress(ctx: TcContext) -> i32 {
    packet_tc::clear_done(&ctx);
    let Some(tag) = packet_tc::vlan_tag(&ctx) else {
        counters::count_other_vlan(&ctx);
        return TC_ACT_UNSPEC;
    };
    let verdict = at_tc::<Ethernet, AtTcIngress>(&ctx);
    if tag.is_priority && !matches!(verdict, TC_ACT_UNSPEC | TC_ACT_SHOT) {
        // SAFETY: the context is this program's own; no packet pointer is used after the call.
        let popped = unsafe { bpf_skb_vlan_pop(ctx.skb.skb) };
        if popped != 0 {
            warn!(&ctx, "cannot take the priority tag off a packet: error {}", popped);
            return TC_ACT_SHOT;
        }
    }
    verdict
}

#[classifier]
pub fn forwarder_egress(ctx: TcContext) -> i32 {
    egress::<Ethernet>(&ctx)
}

/// On an interface without Ethernet headers.
#[classifier]
pub fn forwarder_ingress_l3(ctx: TcContext) -> i32 {
    packet_tc::clear_done(&ctx);
    at_tc::<Bare, AtTcIngress>(&ctx)
}

/// On an interface without Ethernet headers.
#[classifier]
pub fn forwarder_egress_l3(ctx: TcContext) -> i32 {
    egress::<Bare>(&ctx)
}

#[inline(always)]
fn egress<L: Link>(ctx: &TcContext) -> i32 {
    if packet_tc::is_done(ctx) { TC_ACT_UNSPEC } else { at_tc::<L, AtTcEgress>(ctx) }
}

/// A function of its own for each family, as is [`at_tc_of`]: the two take up the stack one after the other.
#[inline(never)]
fn at_xdp<A: Tabled>(ctx: &XdpContext) -> u32 {
    let world = Kernel::<AtXdp>::of_xdp(ctx);
    match process::<A, _, _>(&mut XdpPacket::new(ctx), &world) {
        // The core leaves to TC what XDP cannot finish, so that all but the first do not occur here.
        Outcome::Pass
        | Outcome::PassMarked
        | Outcome::Continue
        | Outcome::Admit
        | Outcome::RedirectNeighbour { .. }
        | Outcome::Hold
        | Outcome::Release => xdp_action::XDP_PASS,
        Outcome::Drop => xdp_action::XDP_DROP,
        // SAFETY: the helper takes plain numbers. On success it returns XDP_REDIRECT, else XDP_ABORTED.
        Outcome::Redirect { ifindex } => unsafe { bpf_redirect(ifindex, 0) as u32 },
    }
}

#[inline(always)]
fn at_tc<L: Link, H: Place>(ctx: &TcContext) -> i32 {
    let Some(packet) = TcPacket::<L>::new(ctx) else {
        let is_lost = H::HOOK == Hook::TcEgress && Kernel::<H>::of_skb(ctx).is_marked();
        return if is_lost { TC_ACT_SHOT } else { TC_ACT_UNSPEC };
    };
    if pipeline::is_ipv6(&packet) { at_tc_of::<Ipv6, L, H>(ctx) } else { at_tc_of::<Ipv4, L, H>(ctx) }
}

/// `TC_ACT_UNSPEC` lets the next program or filter of the hook have its say.
#[inline(never)]
fn at_tc_of<A: Tabled, L: Link, H: Place>(ctx: &TcContext) -> i32 {
    let world = Kernel::<H>::of_skb(ctx);
    match process::<A, _, _>(&mut TcPacket::<L>::again(ctx), &world) {
        Outcome::Pass => TC_ACT_UNSPEC,
        Outcome::PassMarked => {
            packet_tc::mark(ctx, tables::mark());
            TC_ACT_UNSPEC
        }
        Outcome::Drop => TC_ACT_SHOT,
        Outcome::Continue => {
            if H::HOOK == Hook::TcIngress {
                packet_tc::mark(ctx, tables::mark());
            }
            TC_ACT_OK
        }
        Outcome::Admit => TC_ACT_OK,
        Outcome::Redirect { .. } | Outcome::RedirectNeighbour { .. } if !prepare::<L>(ctx) => TC_ACT_SHOT,
        Outcome::Redirect { ifindex } => {
            // SAFETY: the helper takes plain numbers.
            unsafe { bpf_redirect(ifindex, 0) as i32 }
        }
        Outcome::RedirectNeighbour { ifindex, next_hop } => redirect_to(ifindex, next_hop),
        // Fragments are held at ingress only.
        Outcome::Hold | Outcome::Release if H::HOOK != Hook::TcIngress => TC_ACT_UNSPEC,
        Outcome::Hold => keep::<A, L, H>(ctx, &world, false),
        Outcome::Release => keep::<A, L, H>(ctx, &world, true),
    }
}

/// Makes a packet ready for its redirect. False: there is no memory for the header that it lacks.
#[inline(always)]
fn prepare<L: Link>(ctx: &TcContext) -> bool {
    if TcPacket::<L>::again(ctx).complete().is_err() {
        warn!(ctx, "no memory for the header of a packet of {} bytes", ctx.len());
        return false;
    }
    // It passes TC egress on its way out.
    packet_tc::set_done(ctx);
    true
}

/// Holds a fragment, or releases the one behind it. (A function of its own, as the next, for its stack.)
#[inline(never)]
fn keep<A: Tabled, L: Link, H: Place>(ctx: &TcContext, world: &Kernel<H>, releases: bool) -> i32 {
    let Some(Workspace { seen, .. }) = A::workspace() else { return TC_ACT_SHOT };
    let (key, ifindex) = (seen.held(), world.ifindex());
    let kept = if releases {
        held::release::<A, L>(ctx, key, ifindex)
    } else {
        held::hold::<A, L>(ctx, key, ifindex, world.now())
    };
    match kept {
        Kept::Gone => TC_ACT_SHOT,
        Kept::Redirected(verdict) => verdict,
    }
}

/// (A function of its own, for its stack.)
#[inline(never)]
fn redirect_to(ifindex: u32, next_hop: Ipv6) -> i32 {
    let (nh_family, words) = match Ipv4::from_mapped(next_hop) {
        Some(next_hop) => (AF_INET, [next_hop.word(), 0, 0, 0]),
        None => (AF_INET6, next_hop.words()),
    };
    let mut next_hop =
        bpf_redir_neigh { nh_family, __bindgen_anon_1: bpf_redir_neigh__bindgen_ty_1 { ipv6_nh: words } };
    // SAFETY: the parameter block is initialised in full and of the size given.
    unsafe { bpf_redirect_neigh(ifindex, &raw mut next_hop, size_of::<bpf_redir_neigh>() as i32, 0) as i32 }
}

#[inline(always)]
fn process<A: Tabled, P: Packet, H: Place>(packet: &mut P, world: &Kernel<H>) -> Outcome {
    let Some(Workspace { seen, scratch }) = A::workspace() else { return Outcome::Pass };
    let core = Core {
        flows: &mut FlowMaps,
        world,
        counters: &mut PerCpuCounters::<H>::new(),
        scratch,
        now: world.now(),
    };
    pipeline::process(packet, seen, core)
}

#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo) -> ! {
    loop {}
}

/// XFRM, redirect and time helpers are for GPL-compatible programs only.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
