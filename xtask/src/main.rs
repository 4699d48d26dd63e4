//! What a developer types: `cargo xtask setup`, `build`, `test`, `demo`.

mod build;
mod demo;
mod process;
mod setup;
mod test;
mod test_vm;
mod vm;
mod workspace;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

use crate::{setup::Preference, workspace::Workspace};

/// Sets up a machine, builds, tests and shows the port forwarder.
#[derive(Parser)]
#[command(bin_name = "cargo xtask", after_help = "Example:\n  cargo xtask demo")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Brings this machine to where the eBPF side builds; does nothing twice
    #[command(after_help = "Example:\n  cargo xtask setup\n  cargo xtask setup --toolchain nightly")]
    Setup {
        /// Which Rust is to build the eBPF programs: the distribution's (Debian, Ubuntu), rustup's
        /// nightly, or the first of the two that this machine can have
        #[arg(long, value_enum, default_value_t)]
        toolchain: Preference,
    },
    /// Leaves forwarderd and forwarderctl in target/release
    #[command(after_help = "Example:\n  cargo xtask build")]
    Build,
    /// Forwards real traffic to three web servers behind a router, all of it in namespaces; needs root
    #[command(after_help = "Example:\n  cargo xtask demo")]
    Demo,
    /// Checks the format, lints, and runs every test; needs root
    #[command(
        after_help = "Example:\n  cargo xtask test\n  cargo xtask test -- hairpin\n  cargo xtask test --vm\n  cargo xtask test --long"
    )]
    Test {
        /// Only the end-to-end tests of kinds of interfaces (or those named), in virtual machines with
        /// Debian's Linux 6.1 and 6.12
        #[arg(long)]
        vm: bool,
        /// Only the tests that take minutes: a million random frames through the programs and through the
        /// core on the host, a million sessions
        #[arg(long, conflicts_with = "vm")]
        long: bool,
        /// What to pass on to the tests: a part of their names, or options of the test harness
        #[arg(last = true)]
        filter: Vec<String>,
    },
}

fn main() -> ExitCode {
    match run(Cli::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<()> {
    let workspace = Workspace::find()?;
    match command {
        Command::Setup { toolchain } => setup::run(&workspace, toolchain),
        Command::Build => build::run(&workspace),
        Command::Demo => demo::run(&workspace),
        Command::Test { vm: true, filter, .. } => test_vm::run(&workspace, &filter),
        Command::Test { long: true, filter, .. } => test::run_long(&workspace, &filter),
        Command::Test { filter, .. } => test::run(&workspace, &filter),
    }
}
