//! `cargo xtask test --vm`: the tests of what this machine's kernel may lack, on kernels that have it.

use std::{fmt::Write as _, path::PathBuf, process::Command};

use anyhow::{Context as _, Result};

use crate::{
    process,
    setup::{self, Apt, Preference, Tool},
    test,
    vm::{Kernel, Machines},
    workspace::{Workspace, ensure_root},
};

/// Meta-packages of Debian 12: Linux 6.1, which has no TCX, and 6.12.
const KERNELS: [&str; 2] = ["linux-image-amd64", "linux-image-6.12-amd64"];

/// What the tests make and use, as far as it is a module.
const MODULES: &str = "veth bridge tun 8021q bonding dummy wireguard ppp_generic pppoe nf_tables";

/// What the tests run to make such interfaces.
const TOOLS: &[Tool] = &[
    Tool { program: "wg", packages: &["wireguard-tools"] },
    Tool { program: "pppd", packages: &["ppp"] },
    Tool { program: "pppoe-server", packages: &["pppoe"] },
];

/// The tests that run there unless others are named.
const FILTER: &str = "interfaces";

/// Builds here, and runs end-to-end tests on each kernel, those that are usually ignored included.
pub fn run(workspace: &Workspace, filter: &[String]) -> Result<()> {
    ensure_root("the virtual machine runs this machine's programs as root", "test --vm")?;
    setup::ensure(workspace, Preference::Auto)?;
    setup::ensure_tools("what makes interfaces for the tests", TOOLS)?;
    let machines = Machines::ensure()?;
    let mut apt = Apt::find()?.context("the kernels come as Debian packages, and there is no apt here")?;
    let kernels = KERNELS
        .into_iter()
        .map(|package| Kernel::of_package(&mut apt, package))
        .collect::<Result<Vec<_>>>()?;
    process::run(test::host_side(workspace, "build").arg("--all-targets"))?;
    let script = script(workspace, filter)?;
    for kernel in &kernels {
        machines.run(kernel, &script, &workspace.target.join("vm"))?;
    }
    process::announce("all passed");
    Ok(())
}

/// What is run inside.
fn script(workspace: &Workspace, filter: &[String]) -> Result<String> {
    let programs = workspace.target.join("debug");
    let mut script = String::from("mountpoint -q /sys/fs/bpf || mount -t bpf bpf /sys/fs/bpf\n");
    // Some are part of one kernel or the other.
    writeln!(script, "for module in {MODULES}; do modprobe --quiet $module; done")?;
    writeln!(script, "export FORWARDERD={0}/forwarderd FORWARDERCTL={0}/forwarderctl", programs.display())?;
    // Emulated, it is ten times slower: more at once would only run into the deadlines.
    write!(script, "RUST_TEST_THREADS=1 {} --include-ignored", test_program(workspace)?.display())?;
    let filter = if filter.is_empty() { &[FILTER.to_owned()] } else { filter };
    for word in filter {
        write!(script, " '{word}'")?;
    }
    Ok(script)
}

/// The built end-to-end tests, by what cargo says of them.
fn test_program(workspace: &Workspace) -> Result<PathBuf> {
    let mut cargo = Command::new(&workspace.cargo);
    cargo.current_dir(&workspace.root).args(["test", "--package", "testbed", "--test", "e2e", "--no-run"]);
    let messages = process::output(cargo.args(["--message-format", "json"]))?;
    let executable = messages.lines().rev().find_map(|line| {
        let (_, rest) = line.split_once(r#""executable":""#)?;
        rest.split_once('"').map(|(path, _)| path.into())
    });
    executable.context("cargo names no test program")
}
