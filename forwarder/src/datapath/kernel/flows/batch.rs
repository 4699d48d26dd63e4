//! Reads a hash map many entries at a time: `BPF_MAP_LOOKUP_BATCH` (Linux 5.6), for which aya has no call.

use std::{
    io,
    marker::PhantomData,
    os::fd::{AsRawFd as _, OwnedFd},
};

use aya::Pod;

// Number and layout: include/uapi/linux/bpf.h.
const BPF_MAP_LOOKUP_BATCH: libc::c_long = 24;

#[repr(C)]
struct Batch {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    elem_flags: u64,
    flags: u64,
}

/// Entries asked for at once: small enough for the processor's cache, large against the call.
const FIRST_COUNT: usize = 4096;

/// Far more than one bucket of a hash map ever holds.
const LAST_COUNT: usize = 1 << 20;

/// A hash map's entries, bucket by bucket: what comes or goes meanwhile may or may not be seen, all else
/// is seen once.
pub struct Reader<K, V> {
    map: OwnedFd,
    entries: PhantomData<(K, V)>,
}

impl<K: Pod, V: Pod> Reader<K, V> {
    /// `map` has keys of type `K` and values of type `V`.
    pub fn new(map: OwnedFd) -> Self {
        Self { map, entries: PhantomData }
    }

    /// Gives the entries to `see`, some thousand at a time.
    pub fn read(&self, mut see: impl FnMut(&[K], &[V])) -> io::Result<()> {
        let (mut keys, mut values): (Vec<K>, Vec<V>) = (Vec::new(), Vec::new());
        let mut count = FIRST_COUNT;
        // Which bucket comes next: the kernel's own business, of as many bytes as a key at the most.
        let (mut here, mut next) = ([0_u64; 8], [0_u64; 8]);
        let mut is_first = true;
        loop {
            keys.reserve_exact(count);
            values.reserve_exact(count);
            let mut batch = Batch {
                in_batch: if is_first { 0 } else { here.as_ptr() as u64 },
                out_batch: next.as_mut_ptr() as u64,
                keys: keys.as_mut_ptr() as u64,
                values: values.as_mut_ptr() as u64,
                count: count as u32,
                map_fd: self.map.as_raw_fd().unsigned_abs(),
                elem_flags: 0,
                flags: 0,
            };
            let done = look_up(&mut batch);
            match &done {
                Err(error) if error.raw_os_error() == Some(libc::ENOSPC) && count < LAST_COUNT => {
                    count *= 2;
                    continue;
                }
                Err(error) if error.raw_os_error() != Some(libc::ENOENT) => return done,
                _ => {}
            }
            let found = (batch.count as usize).min(count);
            // SAFETY: the kernel has written `found` keys and values, which any bytes are, into buffers
            // with room for `count`; both are emptied before they are given to it again.
            unsafe {
                keys.set_len(found);
                values.set_len(found);
            }
            see(&keys, &values);
            if done.is_err() {
                return Ok(());
            }
            keys.clear();
            values.clear();
            (here, is_first) = (next, false);
        }
    }
}

fn look_up(batch: &mut Batch) -> io::Result<()> {
    // SAFETY: the attributes, and the buffers that they name, live over the call, and the buffers have
    // room for `count` entries of the map's own sizes.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, BPF_MAP_LOOKUP_BATCH, &raw mut *batch, size_of::<Batch>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
