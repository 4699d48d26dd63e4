//! `cargo xtask test`: everything that has to hold before a change goes in.

use std::{
    env,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};

use crate::{
    process,
    setup::{self, Preference, Record},
    workspace::{Workspace, ensure_root},
};

/// Checks the format, lints both sides, and runs every test.
pub fn run(workspace: &Workspace, filter: &[String]) -> Result<()> {
    ensure_root("the tests make network namespaces and load eBPF programs", "test")?;
    let mut steps = Steps::new();
    let record = steps.run("set-up", || {
        let record = setup::ensure(workspace, Preference::Auto)?;
        setup::ensure_tools("the applications of the tests", setup::APPLICATIONS)?;
        ensure_lints()?;
        Ok(record)
    })?;
    steps.run("format", || {
        process::run(cargo(workspace).args(["fmt", "--all", "--check"]))
            .context("the format differs; `cargo fmt --all` puts it right")
    })?;
    steps.run("lints of the host side", || {
        process::run(host_side(workspace, "clippy").args(["--all-targets", "--", "--deny", "warnings"]))
    })?;
    steps.run("lints of the eBPF side", || process::run(&mut lint_ebpf(workspace, &record)?))?;
    // All targets at once: another choice would bring other features, and with them another eBPF build.
    steps.run("building the programs and their tests", || {
        process::run(host_side(workspace, "build").arg("--all-targets"))
    })?;
    steps.run("tests", || {
        process::run(
            with_programs(host_side(workspace, "test").args(["--no-fail-fast", "--"]), workspace)
                .args(filter)
                .env("RUST_TEST_THREADS", threads()),
        )
    })?;
    steps.summary();
    Ok(())
}

/// Runs the tests that take minutes, one after the other: they measure.
pub fn run_long(workspace: &Workspace, filter: &[String]) -> Result<()> {
    ensure_root("the tests make network namespaces and load eBPF programs", "test --long")?;
    setup::ensure(workspace, Preference::Auto)?;
    process::run(host_side(workspace, "build").arg("--all-targets"))?;
    let mut tests = cargo(workspace);
    tests.args(["test", "--package", "forwarder", "--test", "differential", "--test", "million", "--"]);
    process::run(
        with_programs(&mut tests, workspace)
            .args(["--ignored", "--nocapture", "--test-threads", "1"])
            .args(filter),
    )
}

/// Tells the tests which programs to try.
fn with_programs<'c>(command: &'c mut Command, workspace: &Workspace) -> &'c mut Command {
    let programs = workspace.target.join("debug");
    command.env("FORWARDERD", programs.join("forwarderd")).env("FORWARDERCTL", programs.join("forwarderctl"))
}

/// The end-to-end tests wait more than they compute: three for each core, unless told otherwise.
fn threads() -> String {
    let cores = thread::available_parallelism().map_or(2, usize::from);
    env::var("RUST_TEST_THREADS").unwrap_or_else(|_| (cores * 3).to_string())
}

/// The steps of a run, and how long each has taken.
struct Steps {
    begun: Instant,
    taken: Vec<(&'static str, Duration)>,
}

impl Steps {
    fn new() -> Self {
        Self { begun: Instant::now(), taken: Vec::new() }
    }

    fn run<T>(&mut self, name: &'static str, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let begun = Instant::now();
        process::announce(&format!("{name} (after {})", minutes(self.begun.elapsed())));
        let done = work().with_context(|| format!("{name} failed after {}", minutes(begun.elapsed())))?;
        self.taken.push((name, begun.elapsed()));
        Ok(done)
    }

    fn summary(&self) {
        println!();
        process::announce(&format!("all passed, in {}", minutes(self.begun.elapsed())));
        for (name, taken) in &self.taken {
            println!("    {:>7}  {name}", minutes(*taken));
        }
    }
}

/// `0.3 s` or `2m 05s`.
fn minutes(time: Duration) -> String {
    match time.as_secs() {
        seconds @ 60.. => format!("{}m {:02}s", seconds / 60, seconds % 60),
        _ => format!("{:.1} s", time.as_secs_f32()),
    }
}

/// Cargo for everything but the eBPF side.
pub fn host_side(workspace: &Workspace, subcommand: &str) -> Command {
    let mut cargo = cargo(workspace);
    cargo.args([subcommand, "--workspace", "--exclude", "forwarder-ebpf"]);
    cargo
}

fn cargo(workspace: &Workspace) -> Command {
    let mut cargo = Command::new(&workspace.cargo);
    cargo.current_dir(&workspace.root);
    cargo
}

/// A toolchain of rustup's minimal profile lacks the formatter and the linter.
fn ensure_lints() -> Result<()> {
    let missing: Vec<_> = [("cargo-fmt", "rustfmt"), ("cargo-clippy", "clippy")]
        .into_iter()
        .filter(|(program, _)| process::output(Command::new(program).arg("--version")).is_err())
        .map(|(_, component)| component)
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    process::announce(&format!("adding to rustup's toolchain: {}", missing.join(" ")));
    process::run(Command::new("rustup").args(["component", "add"]).args(&missing))
        .context("rustfmt and clippy are needed; where Rust is the distribution's, install its packages")
}

/// clippy for the eBPF side has to come from the toolchain that builds it.
fn lint_ebpf(workspace: &Workspace, record: &Record) -> Result<Command> {
    let compiler = &record.compiler;
    let bin = compiler.sysroot.join("bin");
    let mut command = if compiler.toolchain.is_empty() {
        Command::new(bin.join("cargo"))
    } else {
        let mut rustup = Command::new("rustup");
        rustup.args(["run", &compiler.toolchain, "cargo"]);
        rustup
    };
    let path = env::var_os("PATH").unwrap_or_default();
    let path = [record.linker_bin.clone()].into_iter().chain(env::split_paths(&path));
    command
        .args(["clippy", "--package", "forwarder-ebpf", "--release"])
        .args(["--target", "bpfel-unknown-none", "-Z", "build-std=core"])
        .args(["--target-dir"])
        .arg(workspace.target.join("ebpf-clippy"))
        .args(["--", "--deny", "warnings"])
        .current_dir(&workspace.root)
        .env("PATH", env::join_paths(path).context("the path of a tool contains a colon")?)
        .env_remove("RUSTC");
    if compiler.bootstrap {
        command.env("RUSTC_BOOTSTRAP", "1");
    }
    Ok(command)
}
