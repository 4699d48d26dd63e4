//! Debian's and Ubuntu's package manager.

use std::{path::Path, process::Command};

use anyhow::{Context as _, Result, bail};

use crate::{
    process,
    workspace::{find_program, is_root},
};

/// How long apt waits for another apt to finish, in seconds.
const LOCK_TIMEOUT: &str = "DPkg::Lock::Timeout=300";

/// apt on this machine.
pub struct Apt {
    /// Whether the package lists have been fetched in this run.
    updated: bool,
}

impl Apt {
    /// None where the distribution has no apt.
    pub fn find() -> Result<Option<Self>> {
        let there = ["apt-get", "apt-cache", "dpkg-query"].iter().all(|tool| find_program(tool).is_some());
        Ok(there.then_some(Self { updated: false }))
    }

    /// Whether a package is installed.
    pub fn is_installed(&self, package: &str) -> bool {
        let mut query = Command::new("dpkg-query");
        query.args(["--show", "--showformat=${db:Status-Status}", package]);
        // It fails for a package that it has never heard of.
        process::output(&mut query).is_ok_and(|status| status == "installed")
    }

    /// The version of a package that an installation would bring, if there is any.
    pub fn candidate(&mut self, package: &str) -> Result<Option<String>> {
        self.update()?;
        let mut query = Command::new("apt-cache");
        query.args(["policy", package]).env("LC_ALL", "C");
        let policy = process::output(&mut query)?;
        let candidate = policy.lines().find_map(|line| line.trim().strip_prefix("Candidate: "));
        Ok(candidate.filter(|version| *version != "(none)").map(str::to_owned))
    }

    /// Installs packages, or says what to type where we may not.
    pub fn install(&mut self, what: &str, packages: &[&str]) -> Result<()> {
        let list = packages.join(" ");
        if !is_root() {
            bail!(
                "missing here: {what}, and installing it needs root; type\n\n    \
                 sudo apt-get update && sudo apt-get install --no-remove {list}\n\n\
                 and then `cargo xtask setup` again"
            );
        }
        self.update()?;
        process::announce(&format!("installing {what}: {list}"));
        // Nothing of the user's is to go: apt refuses where a package is in the way.
        process::run_quietly(
            apt_get("install").args(["--yes", "--no-install-recommends", "--no-remove"]).args(packages),
        )
        .with_context(|| {
            format!(
                "cannot install {what}. Where a package is in the way, remove it \
                 (`apt-get remove NAME`), or use rustup's nightly instead: \
                 `cargo xtask setup --toolchain nightly`"
            )
        })
    }

    /// The package that a meta-package stands for.
    pub fn dependency(&self, meta: &str) -> Result<String> {
        let mut query = Command::new("apt-cache");
        query.args(["depends", "--important", meta]).env("LC_ALL", "C");
        let answer = process::output(&mut query)?;
        let found = answer.lines().find_map(|line| line.trim().strip_prefix("Depends: "));
        found.map(str::to_owned).with_context(|| format!("{meta} leads to no other package"))
    }

    /// Downloads a package's file into a folder.
    pub fn download(&self, package: &str, dir: &Path) -> Result<()> {
        process::run_quietly(apt_get("download").arg(package).current_dir(dir))
            .with_context(|| format!("cannot download {package}; check the network"))
    }

    /// Fetches the package lists, once a run; without root those that are there have to do.
    fn update(&mut self) -> Result<()> {
        if self.updated || !is_root() {
            return Ok(());
        }
        process::announce("fetching the package lists");
        process::run_quietly(&mut apt_get("update"))
            .context("cannot fetch the package lists; check the network and /etc/apt")?;
        self.updated = true;
        Ok(())
    }
}

fn apt_get(subcommand: &str) -> Command {
    let mut command = Command::new("apt-get");
    command.args([subcommand, "-o", LOCK_TIMEOUT]).env("DEBIAN_FRONTEND", "noninteractive");
    command
}
