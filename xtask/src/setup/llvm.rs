//! The development files of the compiler's LLVM, which bpf-linker is linked with.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Result, bail};

use super::apt::Apt;
use crate::process;

/// The folder of the programs of this LLVM, with its development files installed.
pub fn ensure(apt: Option<&mut Apt>, major: u32) -> Result<PathBuf> {
    if let Some(bin) = find(major) {
        return Ok(bin);
    }
    if let Some(apt) = apt {
        let package = format!("llvm-{major}-dev");
        if apt.candidate(&package)?.is_some() {
            apt.install("the LLVM that this compiler is made with", &[package.as_str()])?;
            if let Some(bin) = find(major) {
                return Ok(bin);
            }
        }
    }
    bail!(
        "the compiler's LLVM is version {major}, and no development files of it are here: \
         install them (a package like llvm-{major}-dev or llvm{major}-devel), name their folder \
         if it is not /usr/lib/llvm-{major}: `export LLVM_PREFIX=…`, \
         then run `cargo xtask setup` again"
    )
}

/// Looks where distributions put them; of several the first with the right version.
fn find(major: u32) -> Option<PathBuf> {
    let prefix = env::var_os("LLVM_PREFIX").map(|prefix| Path::new(&prefix).join("bin/llvm-config"));
    let places = [
        format!("/usr/lib/llvm-{major}/bin/llvm-config"),
        format!("/usr/lib64/llvm{major}/bin/llvm-config"),
        format!("llvm-config-{major}"),
        "llvm-config".to_owned(),
    ];
    prefix.into_iter().chain(places.map(PathBuf::from)).find_map(|config| {
        let version = process::output(Command::new(&config).arg("--version")).ok()?;
        let found: u32 = version.split('.').next()?.parse().ok()?;
        let lib = process::output(Command::new(&config).arg("--libdir")).ok()?;
        let bin = process::output(Command::new(&config).arg("--bindir")).ok()?;
        let usable = found == major && has_library(Path::new(lib.trim()), major);
        usable.then(|| PathBuf::from(bin.trim()))
    })
}

/// Debian's llvm-config comes without the library to link with: that is in the -dev package.
fn has_library(dir: &Path, major: u32) -> bool {
    [format!("libLLVM-{major}.so"), "libLLVM.so".to_owned()].iter().any(|library| dir.join(library).exists())
}
