//! The controller's daemon.

use std::io::{Write, stderr, stdout};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::Parser;
use env_logger::Env;
use forwarder::api::{ApiSocket, Bounds, serve};
use forwarder::config::{Cli, Command, Config, Flags};
use forwarder::controller::{Controller, Machine, NET_SETTINGS, Settings, Shared};
use forwarder::datapath::Options;
use forwarder::datapath::kernel::{KernelDatapath, detach};
use forwarder::network::Network;
use forwarder::store::{StateLock, Store};
use forwarder::{listeners, network, rule};
use log::{error, info, warn};
use sd_notify::NotifyState;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, oneshot};

/// What the data path needs of Linux: bits of the capability sets, and their names.
const NEEDED: [(u32, &str); 2] = [(12, "CAP_NET_ADMIN"), (21, "CAP_SYS_ADMIN")];

fn main() -> ExitCode {
    let cli = Cli::parse();
    env_logger::Builder::from_env(Env::default().default_filter_or("info")).init();
    let done = match cli.command {
        Some(Command::Detach { pin_dir, config }) => take_off(pin_dir, config),
        Some(Command::CheckConfig { file }) => check_config(&file),
        None => run(&cli.flags),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Without a stderr the exit code has to do.
            let _ = writeln!(stderr(), "forwarderd: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn take_off(pin_dir: Option<PathBuf>, config: Option<PathBuf>) -> Result<()> {
    let pin_dir = Config::pin_dir(&Flags { pin_dir, config, ..Flags::default() })?;
    check_rights()?;
    detach(&pin_dir)?.iter().for_each(|line| say(line));
    Ok(())
}

fn check_config(file: &Path) -> Result<()> {
    for warning in Config::check_file(file)? {
        warn!("{warning}");
    }
    say(&format!("{} is right", file.display()));
    Ok(())
}

fn say(line: &str) {
    // A reader that has seen enough is no failure.
    let _ = writeln!(stdout(), "{line}");
}

#[tokio::main]
async fn run(flags: &Flags) -> Result<()> {
    let config = Config::load(flags)?;
    config.warnings().iter().for_each(|warning| warn!("{warning}"));
    check_rights()?;
    let _lock = StateLock::take(&config.state_dir)?;
    // Early, so that nothing is attached where another controller answers already; clients wait until it is served.
    let socket = ApiSocket::bind(&config.socket)?;
    let mut store = Store::open(&config.state_dir)?;
    // Before anything is attached: what has ended meanwhile must not come back even for a moment.
    for rule in store.remove_expired(rule::now())? {
        info!("{} has expired", rule.label());
    }
    let network = network::snapshot().await.context("cannot read the interfaces")?;
    report_missing(&config, &network);
    let networks = network::watch().await.context("cannot follow the interfaces")?;
    let datapath = KernelDatapath::open(options(&config, store.id()), &network)?;
    let settings = Settings { external: config.external.clone(), internal: config.internal.clone() };
    let machine = Machine {
        find_listeners: listeners::find,
        find_egress: network::find_egress,
        net_settings: NET_SETTINGS,
    };
    // It asks the kernel for routes, and waits for the answers.
    let controller = tokio::task::block_in_place(|| {
        Controller::new(store, Box::new(datapath), network, settings, machine)
    })?;
    attend(flags, config, Shared::new(controller), socket, networks).await
}

/// Serves until it is told to stop. Forwarding goes on afterwards.
async fn attend(
    flags: &Flags,
    config: Config,
    controller: Shared,
    socket: ApiSocket,
    mut networks: mpsc::Receiver<Network>,
) -> Result<()> {
    let (stop, stopped) = oneshot::channel::<()>();
    let api = tokio::spawn(serve(socket, controller.clone(), Bounds::default(), async {
        // An ended sender stops it as well.
        let _ = stopped.await;
    }));
    let mut time = tokio::spawn(controller.clone().keep_time());
    let (mut terminate, mut interrupt) = (on(SignalKind::terminate())?, on(SignalKind::interrupt())?);
    let mut reload = on(SignalKind::hangup())?;
    info!("ready, at {}", config.socket.display());
    tell_systemd(&[NotifyState::Ready]);
    loop {
        tokio::select! {
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            _ = reload.recv() => take_settings(flags, &config, &controller).await,
            ended = &mut time => return ended.context("keeping time failed")?,
            changed = networks.recv() => {
                let network = changed.context("the interfaces can no longer be followed")?;
                controller.run(|controller| { controller.network_changed(network); Ok(()) }).await?;
            }
        }
    }
    tell_systemd(&[NotifyState::Stopping]);
    drop(stop);
    api.await.context("the API failed")?;
    info!("stopped; forwarding goes on (`forwarderd detach` ends it)");
    Ok(())
}

/// Reads the configuration again: idle times hold at once, the rest from the next start on.
async fn take_settings(flags: &Flags, running: &Config, controller: &Shared) {
    let config = match Config::load(flags) {
        Ok(config) => config,
        Err(error) => return error!("the configuration is not taken: {error:#}"),
    };
    config.warnings().iter().for_each(|warning| warn!("{warning}"));
    let timeouts = config.timeouts;
    match controller.run(move |controller| controller.set_timeouts(&timeouts)).await {
        Ok(()) => info!("the configuration is taken"),
        Err(error) => error!("the idle times are not taken: {error}"),
    }
    if (Config { timeouts: running.timeouts, ..config }) != *running {
        warn!("settings other than [timeouts] have changed: they hold after a restart");
    }
}

fn options(config: &Config, store_id: u64) -> Options {
    Options {
        external: config.external.clone(),
        internal: config.internal.clone(),
        mode: config.datapath,
        pin_dir: config.pin_dir.clone(),
        store_id,
        mark: config.mark,
        timeouts: config.timeouts,
        tables: config.tables,
    }
}

fn report_missing(config: &Config, network: &Network) {
    let there: Vec<&str> = network.interfaces.iter().map(|interface| interface.name.as_str()).collect();
    for name in
        config.external.iter().chain(&config.internal).filter(|name| network.interface(name).is_none())
    {
        warn!(
            "there is no interface {name} yet (there are {}): it is attached to when it appears; if the name is wrong, mend --external or --internal",
            there.join(", ")
        );
    }
}

/// Refuses to start without the rights that loading eBPF takes.
fn check_rights() -> Result<()> {
    let status = procfs::process::Process::myself().and_then(|process| process.status());
    let held = status.context("cannot read /proc/self/status")?.capeff;
    let missing: Vec<&str> =
        NEEDED.iter().filter(|(bit, _)| held & (1 << bit) == 0).map(|(_, name)| *name).collect();
    if !missing.is_empty() {
        bail!("run forwarderd as root: it lacks {}", missing.join(" and "));
    }
    Ok(())
}

fn on(kind: SignalKind) -> Result<Signal> {
    signal(kind).context("cannot wait for signals")
}

fn tell_systemd(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        warn!("cannot tell systemd: {error}");
    }
}
