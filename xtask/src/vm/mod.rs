//! Virtual machines with other kernels, over this machine's own file system.
//!
//! The kernels are Debian's, and QEMU emulates: nothing of this machine's kernel is needed, and nothing
//! but a folder that is named can be changed from inside.

mod kernel;
mod virtme;

use std::{fs, path::Path, process::Command};

use anyhow::{Context as _, Result, ensure};

pub use self::kernel::Kernel;
use self::virtme::Virtme;
use crate::{
    process,
    setup::{self, Tool},
};

/// What running a virtual machine takes.
const TOOLS: &[Tool] = &[
    Tool { program: "qemu-system-x86_64", packages: &["qemu-system-x86"] },
    Tool { program: "modprobe", packages: &["kmod"] },
    Tool { program: "busybox", packages: &["busybox-static"] },
    Tool { program: "python3", packages: &["python3", "python3-venv"] },
];

/// Runs scripts on other kernels.
pub struct Machines {
    virtme: Virtme,
}

impl Machines {
    /// Installs what is missing for it.
    pub fn ensure() -> Result<Self> {
        setup::ensure_tools("what runs virtual machines", TOOLS)?;
        Ok(Self { virtme: Virtme::ensure()? })
    }

    /// Boots a kernel, runs a shell script as root, and fails if that fails. `dir` is where the script
    /// is put and what it may write to; everything else is as on this machine.
    pub fn run(&self, kernel: &Kernel, script: &str, dir: &Path) -> Result<()> {
        let [file, status] = ["script", "status"].map(|name| dir.join(name));
        fs::create_dir_all(dir)
            .and_then(|()| fs::write(&file, script))
            .and_then(|()| fs::write(&status, ""))
            .with_context(|| format!("cannot write to {}", dir.display()))?;
        let told = format!("sh {}; echo $? > {}", file.display(), status.display());
        process::announce(&format!("booting Linux {}", kernel.release()));
        let mut command: Command = self.virtme.command();
        command
            .args(["--run", &kernel.image().to_string_lossy()])
            // A guest with /dev/kvm hangs where this machine is a guest itself.
            .args(["--disable-kvm", "--memory", "2G", "--force-9p", "--disable-microvm", "--verbose"])
            .arg(format!("--rwdir={}", dir.display()))
            .args(["--exec", &told]);
        process::run(&mut command)?;
        let ended = fs::read_to_string(&status).unwrap_or_default();
        ensure!(ended.trim() == "0", "failed on Linux {} (exit code {:?})", kernel.release(), ended.trim());
        Ok(())
    }
}
