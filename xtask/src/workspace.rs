//! Where things lie.

use std::{
    env,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, ensure};

/// The folders of this checkout, and the cargo that runs us.
pub struct Workspace {
    /// The folder with the workspace's Cargo.toml.
    pub root: PathBuf,
    /// Where cargo leaves what it builds.
    pub target: PathBuf,
    /// The cargo that started this program.
    pub cargo: PathBuf,
}

impl Workspace {
    /// Takes the folders from what `cargo run` tells its child.
    pub fn find() -> Result<Self> {
        let manifest_dir = env::var_os("CARGO_MANIFEST_DIR").context("start this as `cargo xtask`")?;
        let root = Path::new(&manifest_dir).parent().context("xtask is not inside its workspace")?;
        let executable = env::current_exe().context("cannot tell where this program lies")?;
        // cargo marks its target directory with this file, wherever the user has put it.
        let target = executable.ancestors().find(|dir| dir.join("CACHEDIR.TAG").is_file());
        Ok(Self {
            root: root.to_owned(),
            target: target.map_or_else(|| root.join("target"), Path::to_owned),
            cargo: env::var_os("CARGO").unwrap_or_else(|| "cargo".into()).into(),
        })
    }
}

/// Finds a program in the path, and in the folders for administrators that the path of an
/// ordinary user may lack.
pub fn find_program(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|dir| dir.join(name))
        .find(|program| program.is_file())
}

/// Whether we may do what root may.
pub fn is_root() -> bool {
    nix::unistd::Uid::effective().is_root()
}

/// Fails with what to type unless we may do what root may; `why` is a clause without its full stop.
pub fn ensure_root(why: &str, command: &str) -> Result<()> {
    ensure!(is_root(), "{why}, which needs root; type: sudo -E env \"PATH=$PATH\" cargo xtask {command}");
    Ok(())
}
