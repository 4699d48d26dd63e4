//! Link options of the eBPF object.

fn main() {
    // Headers lie unaligned behind the 14 bytes of Ethernet. The kernel's verifier accepts
    // unaligned access to packets where the CPU is good at it (x86-64, arm64); without this
    // feature LLVM (22 and later has it) reads and writes each byte by itself.
    println!("cargo:rustc-link-arg=--cpu-features=+allows-misaligned-mem-access");
    println!("cargo:rerun-if-changed=build.rs");
}
