//! `cargo xtask build`: the two programs, ready to be installed.

use std::{path::PathBuf, process::Command};

use anyhow::Result;

use crate::{
    process,
    setup::{self, Preference},
    workspace::Workspace,
};

/// Builds the release programs and says where they are.
pub fn run(workspace: &Workspace) -> Result<()> {
    release(workspace)?;
    for program in programs(workspace) {
        println!("{}", program.display());
    }
    Ok(())
}

/// Builds the release programs.
pub fn release(workspace: &Workspace) -> Result<()> {
    setup::ensure(workspace, Preference::Auto)?;
    process::announce("building forwarderd and forwarderctl; a first build takes some minutes");
    process::run(
        Command::new(&workspace.cargo)
            .args(["build", "--release", "--package", "forwarder"])
            .current_dir(&workspace.root),
    )
}

/// Where the release programs lie once they are built: forwarderd and forwarderctl.
pub fn programs(workspace: &Workspace) -> [PathBuf; 2] {
    ["forwarderd", "forwarderctl"].map(|name| workspace.target.join("release").join(name))
}
