//! Programs of somebody else's, and what is attached where.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use testbed::Host;

/// What runs the smallest of programs: one that returns a number.
#[derive(Clone, Copy)]
pub enum Kind {
    /// Returns XDP_PASS.
    Xdp,
    /// A classifier that returns TC_ACT_UNSPEC: the next one shall decide.
    Classifier,
}

/// Loads such a program, as if somebody else did, and pins it on the host.
pub fn load_and_pin(host: &Host, kind: Kind, pin: &str) {
    // From linux/bpf.h.
    const BPF_PROG_LOAD: libc::c_long = 5;
    const BPF_OBJ_PIN: libc::c_long = 6;
    let (program_type, result): (u32, i32) = match kind {
        Kind::Xdp => (6, 2),
        Kind::Classifier => (3, -1),
    };
    // r0 = result; exit
    let instructions: [u64; 2] = [0xb7 | u64::from(result as u32) << 32, 0x95];
    let mut load = [0_u64; 16];
    load[0] = u64::from(program_type) | (instructions.len() as u64) << 32;
    load[1] = instructions.as_ptr() as u64;
    load[2] = c"GPL".as_ptr() as u64;
    let program = bpf(BPF_PROG_LOAD, &mut load).expect("the kernel loads a program that returns a number");
    // SAFETY: the call has returned a new descriptor, which nobody else has.
    let program = unsafe { OwnedFd::from_raw_fd(program as i32) };
    let path = std::ffi::CString::new(pin).unwrap();
    let mut arguments = [0_u64; 16];
    arguments[0] = path.as_ptr() as u64;
    arguments[1] = program.as_raw_fd() as u64;
    host.run(move || bpf(BPF_OBJ_PIN, &mut arguments)).expect("a program can be pinned");
    assert!(host.run(|| fs::exists(pin)).unwrap());
}

/// Where TCX programs run.
#[derive(Clone, Copy, Debug)]
pub enum Tcx {
    Ingress = 46,
    Egress = 47,
}

/// The programs that TCX runs at an interface, by their ids.
pub fn tcx_programs(host: &Host, interface: &str, hook: Tcx) -> Vec<u32> {
    const BPF_PROG_QUERY: libc::c_long = 16;
    let index = host.index(interface).unwrap();
    let mut ids = [0_u32; 64];
    let mut arguments = [0_u64; 16];
    arguments[0] = u64::from(index) | (hook as u64) << 32;
    arguments[2] = ids.as_mut_ptr() as u64;
    arguments[3] = ids.len() as u64;
    host.run(|| bpf(BPF_PROG_QUERY, &mut arguments)).expect("the kernel tells what TCX runs");
    ids[..arguments[3] as u32 as usize].to_vec()
}

/// The XDP program of an interface, by its id.
pub fn xdp_program(host: &Host, interface: &str) -> Option<u64> {
    let json = host.output("ip", &["-json", "link", "show", "dev", interface]).unwrap();
    let link: serde_json::Value = serde_json::from_str(&json).unwrap();
    link[0]["xdp"]["prog"]["id"].as_u64()
}

fn bpf(command: libc::c_long, arguments: &mut [u64; 16]) -> io::Result<libc::c_long> {
    // SAFETY: the arguments are as long as they say, zero where unused, and point at memory that
    // lives through the call.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, command, arguments.as_mut_ptr(), size_of_val(arguments)) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}
