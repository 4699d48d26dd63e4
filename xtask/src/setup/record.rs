//! What the set-up found, kept in the target directory for `forwarder/build.rs`.

use std::{collections::HashMap, fmt, fs, path::PathBuf};

use anyhow::{Context as _, Result};

use super::{Preference, compiler::Compiler, linker};
use crate::workspace::Workspace;

/// The name of the file; `forwarder/build.rs` looks for the same.
const FILE: &str = "ebpf-toolchain";

/// The toolchain that builds the eBPF side.
#[derive(Debug)]
pub struct Record {
    pub compiler: Compiler,
    pub llvm_bin: PathBuf,
    pub linker_bin: PathBuf,
}

impl Record {
    pub fn new(compiler: Compiler, llvm_bin: PathBuf, linker_bin: PathBuf) -> Self {
        Self { compiler, llvm_bin, linker_bin }
    }

    /// Reads what an earlier set-up left; none where it is missing or not understood.
    pub fn read(workspace: &Workspace) -> Option<Self> {
        Self::parse(&fs::read_to_string(workspace.target.join(FILE)).ok()?)
    }

    pub fn write(&self, workspace: &Workspace) -> Result<()> {
        let path = workspace.target.join(FILE);
        fs::create_dir_all(&workspace.target)
            .and_then(|()| fs::write(&path, self.to_text()))
            .with_context(|| format!("cannot write {}", path.display()))
    }

    /// Whether this is the kind of toolchain that is asked for.
    pub fn suits(&self, preference: Preference) -> bool {
        match preference {
            Preference::Auto => true,
            // A stable compiler is the distribution's: rustup's has no part in this.
            Preference::Distro => self.compiler.bootstrap,
            Preference::Nightly => !self.compiler.bootstrap,
        }
    }

    /// Whether all of it is still there and fits together.
    pub fn holds(&self) -> bool {
        self.llvm_bin.join("llvm-config").is_file()
            && self.compiler.holds()
            && linker::works(&self.linker_bin)
    }

    fn parse(text: &str) -> Option<Self> {
        let fields: HashMap<_, _> = text.lines().filter_map(|line| line.split_once('=')).collect();
        let field = |name| fields.get(name).copied();
        Some(Self {
            compiler: Compiler {
                toolchain: field("toolchain")?.to_owned(),
                sysroot: field("sysroot")?.into(),
                llvm: field("llvm")?.parse().ok()?,
                bootstrap: field("bootstrap")? == "1",
            },
            llvm_bin: field("llvm_bin")?.into(),
            linker_bin: field("linker_bin")?.into(),
        })
    }

    fn to_text(&self) -> String {
        let Compiler { toolchain, sysroot, llvm, bootstrap } = &self.compiler;
        format!(
            "toolchain={toolchain}\nsysroot={}\nllvm={llvm}\nbootstrap={}\nllvm_bin={}\nlinker_bin={}\n",
            sysroot.display(),
            u8::from(*bootstrap),
            self.llvm_bin.display(),
            self.linker_bin.display(),
        )
    }
}

impl fmt::Display for Record {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Compiler { toolchain, sysroot, llvm, .. } = &self.compiler;
        write!(f, "the Rust in {}", sysroot.display())?;
        if !toolchain.is_empty() {
            write!(f, " (rustup's toolchain `{toolchain}`)")?;
        }
        write!(f, ", LLVM {llvm}, and the bpf-linker in {}", self.linker_bin.display())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_survives_its_file() {
        let text = "toolchain=distro\nsysroot=/usr\nllvm=22\nbootstrap=1\n\
                    llvm_bin=/usr/lib/llvm-22/bin\nlinker_bin=/cache/bin\n";
        let record = Record::parse(text).expect("a complete record");
        assert_eq!(record.to_text(), text);
        assert!(record.suits(Preference::Distro) && !record.suits(Preference::Nightly));
        assert!(Record::parse("toolchain=distro\n").is_none());
    }
}
