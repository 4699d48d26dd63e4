//! What limits are counted by.

use core::arch::asm;

use aya_ebpf::{
    bindings::{BPF_F_NO_PREALLOC, BPF_NOEXIST},
    macros::map,
    maps::{Array, HashMap},
};
use forwarder_common::{sessions::SessionsKey, tables::Refused};

/// What the programs have counted. (Sizes of 1 are set when the object is loaded.)
#[map]
static SESSIONS: HashMap<SessionsKey, i64> = HashMap::pinned(1, BPF_F_NO_PREALLOC);
/// What the controller adds to that. Each map has one side that writes it: neither could add to the
/// other's numbers without losing some of them.
#[map]
static CORRECTIONS: HashMap<SessionsKey, i64> = HashMap::pinned(1, BPF_F_NO_PREALLOC);
/// By slot: see `Sessions::due`.
#[map]
static DUE: Array<u64> = Array::pinned(1, 0);

/// Adds in one step for all CPUs.
///
/// # Safety
/// `to` has to point to an aligned number in a map.
#[inline(always)]
pub unsafe fn add(to: *mut u64, by: u64) {
    // Before Linux 5.12 an atomic step cannot return what was there before, and Rust has none that
    // does not.
    // SAFETY: as the caller vouches.
    unsafe { asm!("lock *(u64 *)({to} + 0) += {by}", to = in(reg) to, by = in(reg) by) };
}

/// As [`add`].
///
/// # Safety
/// As of [`add`].
#[inline(always)]
pub unsafe fn add_u32(to: *mut u32, by: u32) {
    // SAFETY: as the caller vouches.
    unsafe { asm!("lock *(u32 *)({to} + 0) += {by}", to = in(reg) to, by = in(reg) u64::from(by)) };
}

/// The programs' count and the controller's correction.
#[inline(always)]
pub fn sessions(key: &SessionsKey) -> i64 {
    // SAFETY: aligned numbers, copied at once; the kernel keeps their memory while a program runs.
    let read = |count: Option<*const i64>| count.map_or(0, |count| unsafe { count.read_volatile() });
    read(SESSIONS.get_ptr(key)).wrapping_add(read(CORRECTIONS.get_ptr(key)))
}

#[inline(always)]
pub fn count(key: &SessionsKey, by: i64) -> Result<(), Refused> {
    let count = match SESSIONS.get_ptr_mut(key) {
        Some(count) => count,
        None => {
            // Another CPU may do the same: one of the two makes it, both count.
            let _ = SESSIONS.insert(key, 0, u64::from(BPF_NOEXIST));
            SESSIONS.get_ptr_mut(key).ok_or(Refused::Full)?
        }
    };
    // SAFETY: it is in a map, whose values are aligned to 8 bytes.
    unsafe { add(count.cast(), by as u64) };
    Ok(())
}

#[inline(always)]
pub fn due(slot: u32) -> u64 {
    // SAFETY: an aligned number of an array that is never freed.
    DUE.get_ptr(slot).map_or(0, |due| unsafe { due.read_volatile() })
}

#[inline(always)]
pub fn set_due(slot: u32, at: u64) {
    if let Some(due) = DUE.get_ptr_mut(slot) {
        // SAFETY: as in `due`. Another CPU's step may get lost, after a time without new flows.
        unsafe { due.write_volatile(at) };
    }
}

#[inline(always)]
pub fn postpone(slot: u32, by: u64) {
    if let Some(due) = DUE.get_ptr_mut(slot) {
        // SAFETY: as in `due`.
        unsafe { add(due, by) };
    }
}
