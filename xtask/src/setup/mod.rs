//! `cargo xtask setup`: brings a machine to where the eBPF side builds, and records how.
//!
//! Everything is looked for before it is installed, so that a second run costs next to nothing.

mod apt;
mod compiler;
mod linker;
mod llvm;
mod record;

use std::{env, path::PathBuf};

use anyhow::{Context as _, Result, bail};

use self::compiler::{Compiler, Distribution};
pub use self::{apt::Apt, record::Record};
use crate::{
    process,
    workspace::{self, Workspace},
};

/// Which Rust is to build the eBPF programs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Preference {
    /// Whatever an earlier set-up chose; else the distribution's, if it has one; else nightly
    #[default]
    Auto,
    /// The distribution's packages (Debian and Ubuntu)
    Distro,
    /// rustup's nightly with rust-src
    Nightly,
}

/// A program that is run, and the Debian packages that bring it.
pub struct Tool {
    pub program: &'static str,
    pub packages: &'static [&'static str],
}

/// The rest of what is needed is built by cargo or brought by the compiler's packages.
const TOOLS: &[Tool] = &[
    // Links every Rust program, and compiles the SQLite that the controller embeds.
    Tool { program: "cc", packages: &["gcc", "libc6-dev"] },
    // Makes the networks of the tests and the demo.
    Tool { program: "ip", packages: &["iproute2"] },
    // The hostile hosts of the tests.
    Tool { program: "nft", packages: &["nftables"] },
    Tool { program: "iptables-legacy", packages: &["iptables"] },
    // The client of the demo.
    Tool { program: "curl", packages: &["curl"] },
];

/// What the tests alone run: applications whose traffic goes through mappings.
pub const APPLICATIONS: &[Tool] = &[
    Tool { program: "sipp", packages: &["sip-tester"] },
    Tool { program: "ffmpeg", packages: &["ffmpeg"] },
    Tool { program: "h2load", packages: &["nghttp2-client"] },
    Tool { program: "nghttpd", packages: &["nghttp2-server"] },
    Tool { program: "ssh", packages: &["openssh-client"] },
    Tool { program: "sshd", packages: &["openssh-server"] },
];

/// Sets the machine up as far as it is not, and says what is there.
pub fn run(workspace: &Workspace, preference: Preference) -> Result<()> {
    let record = ensure(workspace, preference)?;
    println!("The eBPF side is built with {record}.");
    Ok(())
}

/// Sets the machine up as far as it is not; silent where nothing is missing.
pub fn ensure(workspace: &Workspace, preference: Preference) -> Result<Record> {
    let missing = missing_packages(TOOLS);
    if let Some(record) = Record::read(workspace)
        && missing.is_empty()
        && record.suits(preference)
        && record.holds()
    {
        return Ok(record);
    }

    let mut apt = Apt::find()?;
    if !missing.is_empty() {
        install_tools(apt.as_mut(), "the tools that building and testing use", &missing)?;
    }
    let compiler = find_compiler(apt.as_mut(), preference)?;
    let llvm_bin = llvm::ensure(apt.as_mut(), compiler.llvm)?;
    let linker_bin = linker::ensure(workspace, compiler.llvm, &llvm_bin)?;
    let record = Record::new(compiler, llvm_bin, linker_bin);
    record.write(workspace)?;
    Ok(record)
}

/// Installs those of these programs that are missing; `what` they are is said then.
pub fn ensure_tools(what: &str, tools: &[Tool]) -> Result<()> {
    let missing = missing_packages(tools);
    if missing.is_empty() {
        return Ok(());
    }
    install_tools(Apt::find()?.as_mut(), what, &missing)
}

fn missing_packages(tools: &[Tool]) -> Vec<&'static str> {
    tools
        .iter()
        .filter(|tool| workspace::find_program(tool.program).is_none())
        .flat_map(|tool| tool.packages)
        .copied()
        .collect()
}

fn install_tools(apt: Option<&mut Apt>, what: &str, packages: &[&str]) -> Result<()> {
    let Some(apt) = apt else {
        bail!(
            "missing here: {}; install what your distribution calls these Debian packages, \
             then run this again",
            packages.join(" ")
        );
    };
    apt.install(what, packages)
}

fn find_compiler(mut apt: Option<&mut Apt>, preference: Preference) -> Result<Compiler> {
    if preference != Preference::Nightly {
        if let Some(compiler) = Distribution::compiler() {
            return compiler.linked();
        }
        if let Some(apt) = apt.as_mut()
            && let Some(packages) = Distribution::packages(apt)?
        {
            apt.install("the distribution's Rust with its sources", &packages)?;
            return match Distribution::compiler() {
                Some(compiler) => compiler.linked(),
                None => bail!("{} are installed, but hold no usable compiler", packages.join(" ")),
            };
        }
        if preference == Preference::Distro {
            bail!(
                "this distribution has no Rust {} or newer with its sources; \
                 use rustup's: `cargo xtask setup --toolchain nightly`",
                compiler::MINIMUM
            );
        }
        process::announce("this distribution has no Rust that is new enough: using rustup's nightly");
    }
    Compiler::nightly()
}

/// Where the user's programs keep what can be had again.
pub fn cache_dir() -> Result<PathBuf> {
    let variable = |name| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    variable("XDG_CACHE_HOME")
        .filter(|dir| dir.is_absolute())
        .or_else(|| Some(variable("HOME")?.join(".cache")))
        .context("cannot tell where your cache is; say so: `export HOME=…`")
}
