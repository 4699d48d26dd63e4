//! virtme-ng, which boots a kernel over the file system of the machine that it runs on.

use std::{env, path::PathBuf, process::Command};

use anyhow::{Context as _, Result};

use crate::{process, setup::cache_dir};

const VERSION: &str = "1.42";

/// An installation in a folder of its own in the user's cache.
pub struct Virtme {
    bin: PathBuf,
}

impl Virtme {
    /// Installs it from PyPI if it is missing.
    pub fn ensure() -> Result<Self> {
        let dir = cache_dir()?.join(format!("port-forwarder/virtme-ng-{VERSION}"));
        let virtme = Self { bin: dir.join("bin") };
        if !virtme.works() {
            process::announce(&format!("installing virtme-ng {VERSION} into {}", dir.display()));
            process::run_quietly(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&dir))?;
            let package = format!("virtme-ng=={VERSION}");
            process::run_quietly(Command::new(virtme.bin.join("pip")).args(["install", "--quiet", &package]))
                .context("cannot install virtme-ng from PyPI")?;
        }
        Ok(virtme)
    }

    fn works(&self) -> bool {
        process::output(self.command().arg("--version")).is_ok_and(|version| version.contains(VERSION))
    }

    /// `vng`, which runs programs that lie beside it.
    pub fn command(&self) -> Command {
        let path = env::var_os("PATH").unwrap_or_default();
        let path = [self.bin.clone()].into_iter().chain(env::split_paths(&path));
        let mut command = Command::new(self.bin.join("vng"));
        if let Ok(path) = env::join_paths(path) {
            command.env("PATH", path);
        }
        command
    }
}
