//! bpf-linker, built for the compiler's LLVM into a folder of its own in the user's cache.

use std::{
    env,
    ops::RangeInclusive,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail, ensure};

use super::cache_dir;
use crate::{process, workspace::Workspace};

const VERSION: &str = "0.13.0";

/// The LLVM versions that this bpf-linker has a feature for.
const SUPPORTED: RangeInclusive<u32> = 21..=23;

/// The folder of a bpf-linker for this LLVM, built if it is missing.
pub fn ensure(workspace: &Workspace, llvm: u32, llvm_bin: &Path) -> Result<PathBuf> {
    ensure!(
        SUPPORTED.contains(&llvm),
        "bpf-linker {VERSION} works with LLVM {} to {}, but the compiler has {llvm}; take another \
         compiler: `cargo xtask setup --toolchain distro` or `--toolchain nightly`",
        SUPPORTED.start(),
        SUPPORTED.end()
    );
    let root = cache_dir()?.join(format!("port-forwarder/bpf-linker-{VERSION}-llvm-{llvm}"));
    let bin = root.join("bin");
    if !works(&bin) {
        install(workspace, llvm, llvm_bin, &root)?;
        if !works(&bin) {
            bail!("bpf-linker is built, but {} does not run", bin.join("bpf-linker").display());
        }
    }
    Ok(bin)
}

/// Whether the linker is there and finds its LLVM: an upgrade can take that away.
pub fn works(bin: &Path) -> bool {
    process::output(Command::new(bin.join("bpf-linker")).arg("--version"))
        .is_ok_and(|version| version.trim().ends_with(VERSION))
}

fn install(workspace: &Workspace, llvm: u32, llvm_bin: &Path, root: &Path) -> Result<()> {
    process::announce(&format!(
        "building bpf-linker {VERSION} for LLVM {llvm} into {} (about a minute)",
        root.display()
    ));
    let prefix = llvm_bin.parent().context("the LLVM programs lie in no folder")?;
    let path = env::var_os("PATH").unwrap_or_default();
    // With its own folder in the path, cargo does not advise to add that.
    let path = [llvm_bin.to_owned(), root.join("bin")].into_iter().chain(env::split_paths(&path));
    process::run(
        Command::new(&workspace.cargo)
            .args(["install", "bpf-linker", "--locked", "--force", "--version", VERSION])
            .args(["--no-default-features", "--features", &format!("llvm-{llvm}"), "--root"])
            .arg(root)
            .env("LLVM_PREFIX", prefix)
            .env("PATH", env::join_paths(path)?)
            // Its intermediate files are none of this workspace's.
            .env_remove("CARGO_TARGET_DIR"),
    )
}
