//! The host's sockets, as the kernel itself finds them for a packet.

use core::ffi::c_void;

use aya_ebpf::{
    bindings::{BPF_F_CURRENT_NETNS, bpf_sock_tuple},
    helpers::{bpf_sk_lookup_udp, bpf_sk_release, bpf_skc_lookup_tcp},
};
use forwarder_common::{flow::Tuple, wire::tcp};

use crate::tables::Tabled;

/// See `World::has_socket`. `ctx` has to be the running program's own.
#[inline(always)]
pub fn is_there<A: Tabled>(ctx: *mut c_void, tuple: &Tuple<A>, protocol: u8) -> bool {
    // SAFETY: integers only; all zeroes are a valid value.
    let mut sought: bpf_sock_tuple = unsafe { core::mem::zeroed() };
    let size = A::seek(tuple, &mut sought);
    let netns = i64::from(BPF_F_CURRENT_NETNS) as u64;
    // SAFETY: the context is this program's own, the tuple of the size given. What is found is
    // released, as the kernel demands.
    unsafe {
        // Of TCP also connections that are just beginning or have just ended.
        let socket = match protocol {
            tcp::NUMBER => bpf_skc_lookup_tcp(ctx, &raw mut sought, size, netns, 0),
            _ => bpf_sk_lookup_udp(ctx, &raw mut sought, size, netns, 0),
        };
        if socket.is_null() {
            return false;
        }
        bpf_sk_release(socket.cast());
    }
    true
}
