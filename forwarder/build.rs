//! Builds the eBPF object with the toolchain that `cargo xtask setup` found or installed.
//!
//! The object lands in `OUT_DIR/forwarder-ebpf`, from where the controller embeds it.

use std::{
    collections::HashMap,
    env, fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, anyhow, ensure};
use aya_build::{Package, Toolchain};

const REMEDY: &str = "run `cargo xtask setup` first";

/// The file in which the set-up leaves what it found, in the target directory.
const RECORD: &str = "ebpf-toolchain";

fn main() -> Result<()> {
    let workspace = workspace_root()?;
    // aya-build watches the eBPF crate itself, but not the code that it shares with this side.
    for watched in ["forwarder-common/src", "forwarder-common/Cargo.toml", "Cargo.toml"] {
        println!("cargo:rerun-if-changed={}", workspace.join(watched).display());
    }

    let record = Record::read(&find_record(&workspace)?)?;
    record.enter()?;

    let root_dir = workspace.join("forwarder-ebpf");
    let root_dir = root_dir.to_str().context("the path of the workspace is not UTF-8")?;
    let package = Package { name: "forwarder-ebpf", root_dir, ..Package::default() };
    aya_build::build_ebpf([package], Toolchain::Custom(&record.toolchain))
}

fn workspace_root() -> Result<PathBuf> {
    let manifest_dir = env::var("CARGO_MANIFEST_DIR").context("CARGO_MANIFEST_DIR is not set")?;
    let parent = Path::new(&manifest_dir).parent();
    Ok(parent.context("the crate is not inside its workspace")?.to_owned())
}

/// Finds the record in the target directory in use, or else in the workspace's own, so that one
/// set-up serves builds with another `CARGO_TARGET_DIR` too.
fn find_record(workspace: &Path) -> Result<PathBuf> {
    let out_dir = PathBuf::from(env::var_os("OUT_DIR").context("OUT_DIR is not set")?);
    let default = workspace.join("target").join(RECORD);
    let found =
        out_dir.ancestors().map(|dir| dir.join(RECORD)).chain([default.clone()]).find(|path| path.is_file());
    // Of a file that is missing, cargo says that it has changed: the next build looks again.
    let path = found.as_deref().unwrap_or(&default);
    println!("cargo:rerun-if-changed={}", path.display());
    found.ok_or_else(|| anyhow!("the eBPF toolchain is not set up: {REMEDY}"))
}

/// What `cargo xtask setup` recorded; `xtask/src/setup/record.rs` writes it.
struct Record {
    /// The name for `rustup run`; empty on a machine without rustup.
    toolchain: String,
    /// Where the toolchain lies.
    sysroot: PathBuf,
    /// Whether the compiler is a stable one, which has to be told to allow `-Z build-std`.
    bootstrap: bool,
    llvm_bin: PathBuf,
    linker_bin: PathBuf,
}

impl Record {
    fn read(path: &Path) -> Result<Self> {
        let text =
            fs::read_to_string(path).with_context(|| format!("cannot read {}: {REMEDY}", path.display()))?;
        let fields: HashMap<&str, &str> = text.lines().filter_map(|line| line.split_once('=')).collect();
        let field = |name: &str| {
            fields.get(name).copied().with_context(|| format!("{} lacks `{name}`: {REMEDY}", path.display()))
        };
        Ok(Self {
            toolchain: field("toolchain")?.to_owned(),
            sysroot: field("sysroot")?.into(),
            bootstrap: field("bootstrap")? == "1",
            llvm_bin: field("llvm_bin")?.into(),
            linker_bin: field("linker_bin")?.into(),
        })
    }

    /// Checks that what was recorded is still there, and sets the environment that aya-build's
    /// cargo inherits.
    fn enter(&self) -> Result<()> {
        let rustc = self.sysroot.join("bin/rustc");
        for tool in [&rustc, &self.linker_bin.join("bpf-linker")] {
            ensure!(tool.is_file(), "{} of the eBPF toolchain is gone: {REMEDY}", tool.display());
        }

        let mut path = vec![self.linker_bin.clone(), self.llvm_bin.clone()];
        if self.toolchain.is_empty() {
            // Without rustup, aya-build takes the first cargo and rustc in the path.
            path.push(self.sysroot.join("bin"));
        }
        path.extend(env::split_paths(&env::var_os("PATH").unwrap_or_default()));
        let path = env::join_paths(path).context("the path of a tool contains a colon")?;

        // aya-build hands on every line of its cargo as a warning, to be shown again at each build:
        // CARGO_TERM_QUIET leaves the compiler's own.
        //
        // SAFETY: this build script has one thread so far, so nobody reads the environment while
        // it changes; aya-build starts its threads later.
        unsafe {
            env::set_var("PATH", path);
            env::set_var("CARGO_TERM_QUIET", "true");
            if self.bootstrap {
                env::set_var("RUSTC_BOOTSTRAP", "1");
            }
        }
        Ok(())
    }
}
