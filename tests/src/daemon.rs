//! The real programs, on a router of the test network.

use std::path::PathBuf;
use std::process::{Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};
use std::{env, fs, thread};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::{Host, Process, Stats};

/// The ways of `forwarderd --datapath` that are one way only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Datapath {
    Tc,
    GenericXdp,
    NativeXdp,
}

impl Datapath {
    /// What `--datapath` calls it.
    pub fn argument(self) -> &'static str {
        match self {
            Self::Tc => "tc",
            Self::GenericXdp => "xdp-generic",
            Self::NativeXdp => "xdp",
        }
    }

    /// What `status` shows as an interface's XDP.
    pub fn shown(self) -> &'static str {
        match self {
            Self::Tc => "none",
            Self::GenericXdp => "generic XDP",
            Self::NativeXdp => "native XDP",
        }
    }

    /// Where `stats` counts what it carried.
    pub fn path(self) -> &'static str {
        match self {
            Self::Tc => "tc-ingress",
            Self::GenericXdp | Self::NativeXdp => "xdp",
        }
    }
}

/// What `forwarderd` is started with. The paths lie where only its host sees them (see [`Host`]).
#[derive(Clone, Debug)]
pub struct DaemonOptions {
    pub external: Vec<String>,
    pub internal: Vec<String>,
    /// None: as `forwarderd` chooses.
    pub datapath: Option<Datapath>,
    pub state_dir: PathBuf,
    pub socket: PathBuf,
    pub pin_dir: PathBuf,
    /// What its configuration file says, in TOML; the machine's own is never read.
    pub config: String,
}

impl Default for DaemonOptions {
    fn default() -> Self {
        Self {
            external: Vec::new(),
            internal: Vec::new(),
            datapath: None,
            state_dir: "/run/forwarder-state".into(),
            socket: "/run/forwarder/forwarder.sock".into(),
            pin_dir: "/sys/fs/bpf/forwarder".into(),
            config: String::new(),
        }
    }
}

/// `forwarderd` on a host, running or not, and `forwarderctl` beside it.
#[derive(Debug)]
pub struct Daemon {
    host: Host,
    pub options: DaemonOptions,
    process: Option<Process>,
    /// What earlier processes wrote.
    log: String,
}

impl Daemon {
    /// Not started yet.
    pub fn new(host: &Host, options: DaemonOptions) -> Self {
        Self { host: host.clone(), options, process: None, log: String::new() }
    }

    /// Starts `forwarderd` and waits until `forwarderctl status` says that it is ready.
    pub fn start(&mut self) -> Result<()> {
        // In an emulated machine the verifier takes more than a minute.
        const LIMIT: Duration = Duration::from_secs(300);
        ensure!(self.process.is_none(), "the daemon runs already");
        let process = self.process.insert(self.host.start(self.command()?)?);
        let deadline = Instant::now() + LIMIT;
        loop {
            if let Some(status) = process.ended()? {
                let process = self.process.take();
                bail!(
                    "forwarderd ended with {status}: {}",
                    process.map(|it| it.finish()).unwrap_or_default()
                );
            }
            let answer =
                ctl_command(&self.host, &self.options).arg("status").output().context("forwarderctl")?;
            if answer.status.success() {
                return Ok(());
            }
            if Instant::now() > deadline {
                bail!(
                    "forwarderd is not ready after {LIMIT:?}; status: {}\nit wrote: {}",
                    String::from_utf8_lossy(&answer.stderr),
                    process.written()
                );
            }
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// Kills it (SIGKILL), as a crash would.
    pub fn kill(&mut self) {
        if let Some(process) = self.process.take() {
            self.log += &process.finish();
        }
    }

    /// Asks it to end (SIGTERM) and waits for that.
    pub fn terminate(&mut self) -> Result<ExitStatus> {
        let mut process = self.process.take().context("the daemon does not run")?;
        process.signal(Signal::SIGTERM)?;
        let status = process.wait(crate::DEADLINE)?;
        self.log += &process.finish();
        Ok(status)
    }

    /// The command that [`Daemon::start`] starts.
    pub fn command(&self) -> Result<Command> {
        const CONFIG: &str = "/run/forwarder.toml";
        let options = &self.options;
        self.host
            .run(|| fs::write(CONFIG, &options.config))
            .context("cannot write the configuration file")?;
        let mut command = self.host.command(forwarderd());
        for interface in &options.external {
            command.args(["--external", interface]);
        }
        for interface in &options.internal {
            command.args(["--internal", interface]);
        }
        if let Some(datapath) = options.datapath {
            command.args(["--datapath", datapath.argument()]);
        }
        command.arg("--state-dir").arg(&options.state_dir);
        command.arg("--socket").arg(&options.socket);
        command.arg("--pin-dir").arg(&options.pin_dir);
        command.args(["--config", CONFIG]);
        Ok(command)
    }

    /// Runs `forwarderctl` and returns what it prints; that it fails is an error with what it says.
    pub fn ctl(&self, arguments: &[&str]) -> Result<String> {
        let output = self.ctl_output(arguments)?;
        ensure!(
            output.status.success(),
            "forwarderctl {}: {}: {}",
            arguments.join(" "),
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(String::from_utf8(output.stdout)?)
    }

    /// Runs `forwarderctl --json` and returns the value that it prints.
    pub fn ctl_json(&self, arguments: &[&str]) -> Result<Value> {
        let text = self.ctl(&[&["--json"], arguments].concat())?;
        serde_json::from_str(&text).with_context(|| format!("not one JSON value: {text}"))
    }

    /// Runs `forwarderctl`, whatever comes of it.
    pub fn ctl_output(&self, arguments: &[&str]) -> Result<Output> {
        ctl_command(&self.host, &self.options).args(arguments).output().context("cannot run forwarderctl")
    }

    /// What `forwarderctl stats` counts.
    pub fn stats(&self) -> Result<Stats> {
        Ok(Stats::new(self.ctl_json(&["stats"])?))
    }

    /// Whether it runs or has run.
    pub(crate) fn was_started(&self) -> bool {
        self.process.is_some() || !self.log.is_empty()
    }

    /// What all processes so far wrote to stdout and stderr.
    pub fn log(&self) -> String {
        let current = self.process.as_ref().map(Process::written).unwrap_or_default();
        format!("{}{current}", self.log)
    }

    /// All that helps to understand why a test has failed.
    pub fn diagnosis(&self) -> String {
        let mut text = format!("forwarderd wrote:\n{}", self.log());
        for command in ["status", "list", "flows", "stats"] {
            text += &match self.ctl(&[command]) {
                Ok(output) => format!("forwarderctl {command}:\n{output}"),
                Err(error) => format!("{error:#}\n"),
            };
        }
        text
    }
}

fn ctl_command(host: &Host, options: &DaemonOptions) -> Command {
    let mut command = host.command(forwarderctl());
    command.arg("--socket").arg(&options.socket).stdin(Stdio::null());
    command
}

/// Where `forwarderd` lies: in `$FORWARDERD`, or beside the running test's target directory.
///
/// # Panics
/// Where there is none.
pub fn forwarderd() -> PathBuf {
    program("forwarderd", "FORWARDERD")
}

/// Where `forwarderctl` lies, by `$FORWARDERCTL` likewise.
///
/// # Panics
/// Where there is none.
pub fn forwarderctl() -> PathBuf {
    program("forwarderctl", "FORWARDERCTL")
}

fn program(name: &str, variable: &str) -> PathBuf {
    let path = match env::var_os(variable) {
        Some(path) => PathBuf::from(path),
        None => {
            // target/debug/deps/TEST or target/debug/PROGRAM
            let here = env::current_exe().expect("the running program has a path");
            let places = here.ancestors().skip(1).take(2).map(|directory| directory.join(name));
            places.clone().find(|path| path.is_file()).or(places.last()).unwrap_or_default()
        }
    };
    assert!(
        path.is_absolute() && path.is_file(),
        "no {name} at {path:?}: run `cargo xtask test`, or set {variable} to its absolute path"
    );
    path
}
