//! A Rust compiler that can build `core` for BPF: the distribution's, or rustup's nightly.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};

use super::apt::Apt;
use crate::{process, workspace::find_program};

/// The oldest Rust that the workspace builds with, from its Cargo.toml.
pub const MINIMUM: &str = env!("CARGO_PKG_RUST_VERSION");

/// The name under which rustup knows the distribution's toolchain.
const DISTRO: &str = "distro";

/// A compiler, and what it takes to use it.
#[derive(Debug)]
pub struct Compiler {
    /// What rustup calls it; empty where there is no rustup.
    pub toolchain: String,
    pub sysroot: PathBuf,
    /// The major version of its LLVM: what bpf-linker has to match.
    pub llvm: u32,
    /// A stable compiler builds `core` only with RUSTC_BOOTSTRAP.
    pub bootstrap: bool,
}

impl Compiler {
    /// rustup's nightly with the sources, installed if it is missing.
    pub fn nightly() -> Result<Self> {
        const TOOLCHAIN: &str = "nightly";
        if find_program("rustup").is_none() {
            bail!(
                "no Rust {MINIMUM} with sources here, and no rustup to get one; install rustup \
                 as rustup.rs says, then run `cargo xtask setup` again"
            );
        }
        let list = process::output(Command::new("rustup").args(["toolchain", "list"]))?;
        if !list.lines().any(|line| line.starts_with(TOOLCHAIN)) {
            process::announce("installing rustup's nightly toolchain");
            process::run(Command::new("rustup").args([
                "toolchain",
                "install",
                TOOLCHAIN,
                "--profile",
                "minimal",
            ]))?;
        }
        let sysroot = sysroot(TOOLCHAIN)?;
        if !has_parts(&sysroot) {
            process::announce("adding the sources and clippy to rustup's nightly toolchain");
            process::run(Command::new("rustup").args([
                "component",
                "add",
                "rust-src",
                "clippy",
                "--toolchain",
                TOOLCHAIN,
            ]))?;
        }
        let about = About::of(&sysroot)?;
        Ok(Self { toolchain: TOOLCHAIN.to_owned(), sysroot, llvm: about.llvm, bootstrap: false })
    }

    /// Makes a compiler of the distribution known to rustup, if there is rustup: aya-build then
    /// calls it through rustup.
    pub fn linked(mut self) -> Result<Self> {
        if find_program("rustup").is_none() {
            return Ok(self);
        }
        self.toolchain = DISTRO.to_owned();
        match sysroot(DISTRO) {
            Ok(sysroot) if sysroot == self.sysroot => {}
            Ok(other) => bail!(
                "rustup has a toolchain `{DISTRO}` of another kind ({}); remove it: \
                 `rustup toolchain uninstall {DISTRO}`",
                other.display()
            ),
            Err(_) => {
                let sysroot = self.sysroot.to_string_lossy();
                process::announce(&format!("linking {sysroot} as rustup's toolchain `{DISTRO}`"));
                process::run(Command::new("rustup").args(["toolchain", "link", DISTRO, &sysroot]))?;
            }
        }
        Ok(self)
    }

    /// Whether the compiler is still what it was when it was recorded.
    pub fn holds(&self) -> bool {
        let linked = match (self.toolchain.as_str(), find_program("rustup")) {
            ("", None) => true,
            ("", Some(_)) | (_, None) => false,
            (DISTRO, Some(_)) => rustup_link(DISTRO).is_some_and(|link| link == self.sysroot),
            // Its sysroot lies inside of rustup's own folder.
            (_, Some(_)) => true,
        };
        linked
            && has_parts(&self.sysroot)
            && About::of(&self.sysroot).is_ok_and(|about| about.llvm == self.llvm)
    }
}

/// The Rust of the distribution.
pub struct Distribution;

impl Distribution {
    /// Names of packages that bring compiler, cargo, sources and clippy. The first are those that
    /// Debian keeps new enough for web browsers.
    const FAMILIES: [[&str; 4]; 2] = [
        ["rustc-web", "cargo-web", "rust-web-src", "rust-web-clippy"],
        ["rustc", "cargo", "rust-src", "rust-clippy"],
    ];

    /// The installed compiler, if it is complete and new enough.
    pub fn compiler() -> Option<Compiler> {
        let sysroot = PathBuf::from("/usr");
        // Debian's package `rustup` puts its own launcher there.
        let rustc = fs::canonicalize(sysroot.join("bin/rustc")).ok()?;
        if rustc.file_name()? == "rustup" || !has_parts(&sysroot) {
            return None;
        }
        let about = About::of(&sysroot).ok()?;
        is_new_enough(&about.release).then_some(Compiler {
            toolchain: String::new(),
            sysroot,
            llvm: about.llvm,
            bootstrap: true,
        })
    }

    /// The packages to install for a compiler that is new enough; none if there are none.
    pub fn packages(apt: &mut Apt) -> Result<Option<[&'static str; 4]>> {
        // Debian's rustup conflicts with all of them.
        if apt.is_installed("rustup") {
            return Ok(None);
        }
        let mut families = Self::FAMILIES;
        families.sort_by_key(|[compiler, ..]| !apt.is_installed(compiler));
        for family in families {
            let versions = family.map(|package| apt.candidate(package));
            let mut usable = true;
            for version in versions {
                usable &= version?.is_some_and(|version| is_new_enough(&version));
            }
            if usable {
                return Ok(Some(family));
            }
        }
        Ok(None)
    }
}

/// What `rustc -vV` tells.
struct About {
    release: String,
    llvm: u32,
}

impl About {
    fn of(sysroot: &Path) -> Result<Self> {
        let rustc = sysroot.join("bin/rustc");
        let text = process::output(Command::new(&rustc).arg("-vV"))?;
        Self::parse(&text).with_context(|| format!("{} -vV names no LLVM", rustc.display()))
    }

    fn parse(text: &str) -> Option<Self> {
        let value = |name: &str| text.lines().find_map(|line| line.strip_prefix(name));
        let llvm = value("LLVM version: ")?.split('.').next()?.parse().ok()?;
        Some(Self { release: value("release: ")?.to_owned(), llvm })
    }
}

/// Whether there are the standard library's sources where cargo looks for them, cargo and clippy.
fn has_parts(sysroot: &Path) -> bool {
    ["bin/cargo", "bin/cargo-clippy", "lib/rustlib/src/rust/library/core/src/lib.rs"]
        .iter()
        .all(|part| sysroot.join(part).is_file())
}

fn sysroot(toolchain: &str) -> Result<PathBuf> {
    let mut rustc = Command::new("rustup");
    rustc.args(["run", toolchain, "rustc", "--print", "sysroot"]);
    Ok(process::output(&mut rustc)?.trim().into())
}

/// Where a linked toolchain of rustup points to: asked of the file system, because asking rustup
/// costs half a second.
fn rustup_link(toolchain: &str) -> Option<PathBuf> {
    let home = std::env::var_os("RUSTUP_HOME")
        .map(PathBuf::from)
        .or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".rustup")))?;
    fs::read_link(home.join("toolchains").join(toolchain)).ok()
}

fn is_new_enough(version: &str) -> bool {
    version_of(version) >= version_of(MINIMUM)
}

/// Major and minor of `1.96.0` as of Debian's `1.96.0+dfsg1-1~deb12u2`.
fn version_of(text: &str) -> Option<(u32, u32)> {
    let mut numbers = text.split('.');
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_rustc_says_of_itself() {
        let text = "rustc 1.96.0\nbinary: rustc\nrelease: 1.96.0\nLLVM version: 22.1.8\n";
        let about = About::parse(text).expect("a complete answer");
        assert_eq!((about.release.as_str(), about.llvm), ("1.96.0", 22));
        assert!(About::parse("rustc 1.96.0\n").is_none());
    }

    #[test]
    fn compares_versions_as_numbers() {
        assert_eq!(version_of("1.96.0+dfsg1-1~deb12u2"), Some((1, 96)));
        assert!(is_new_enough("1.100.0"));
        assert!(!is_new_enough("1.63.0+dfsg1-2"));
        assert!(!is_new_enough("no version"));
    }
}
