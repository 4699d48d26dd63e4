//! Debian's kernels, unpacked into a cache and not installed.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail, ensure};

use crate::{
    process,
    setup::{Apt, cache_dir},
};

/// An unpacked kernel with its modules.
pub struct Kernel {
    dir: PathBuf,
    /// What `uname -r` says of it.
    release: String,
}

impl Kernel {
    /// The newest kernel that a meta-package of Debian's leads to, fetched if it is not there yet.
    pub fn of_package(apt: &mut Apt, meta: &str) -> Result<Self> {
        ensure!(
            apt.candidate(meta)?.is_some(),
            "apt knows no package {meta}; the kernels for the tests come from Debian 12 (bookworm) and its \
             security updates"
        );
        let package = apt.dependency(meta)?;
        let release = package.strip_prefix("linux-image-").context("a kernel package of another name")?;
        let dir = cache_dir()?.join("port-forwarder/kernels").join(&package);
        let kernel = Self { release: release.to_owned(), dir };
        if !kernel.image().is_file() {
            kernel.fetch(apt, &package)?;
        }
        Ok(kernel)
    }

    /// What `uname -r` says of it.
    pub fn release(&self) -> &str {
        &self.release
    }

    /// The file to boot. Its modules are found beside it.
    pub fn image(&self) -> PathBuf {
        self.dir.join("boot").join(format!("vmlinuz-{}", self.release))
    }

    /// Unpacks beside its place first, so that an interrupted run leaves nothing that passes for whole.
    fn fetch(&self, apt: &Apt, package: &str) -> Result<()> {
        process::announce(&format!("fetching {package} into {}", self.dir.display()));
        let partial = self.dir.with_extension("partial");
        let _ = fs::remove_dir_all(&partial);
        fs::create_dir_all(&partial).with_context(|| format!("cannot create {}", partial.display()))?;
        apt.download(package, &partial)?;
        let deb = find_deb(&partial)?;
        process::run_quietly(Command::new("dpkg").arg("--extract").arg(&deb).arg(&partial))?;
        fs::remove_file(&deb)?;
        // Newer packages have only usr/lib.
        if !partial.join("lib").exists() {
            std::os::unix::fs::symlink("usr/lib", partial.join("lib"))?;
        }
        let _ = fs::remove_dir_all(&self.dir);
        fs::rename(&partial, &self.dir).with_context(|| format!("cannot make {}", self.dir.display()))
    }
}

fn find_deb(dir: &Path) -> Result<PathBuf> {
    let mut files = fs::read_dir(dir)?.filter_map(|entry| Some(entry.ok()?.path()));
    match files.find(|path| path.extension().is_some_and(|extension| extension == "deb")) {
        Some(deb) => Ok(deb),
        None => bail!("apt has downloaded no package into {}", dir.display()),
    }
}
