//! What forwarderd is told: by flags, and by a file with the same names.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use clap::{Args, Parser, Subcommand};
use forwarder_common::layout::DEFAULT_MARK;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer};

use crate::datapath::{Mode, TableSizes, Timeouts};
use crate::rule::{check_interface_name, parse_duration, quoted};

pub const DEFAULT_CONFIG: &str = "/etc/forwarder/forwarder.toml";
pub const DEFAULT_STATE_DIR: &str = "/var/lib/forwarder";
pub const DEFAULT_SOCKET: &str = "/run/forwarder/forwarder.sock";
pub const DEFAULT_PIN_DIR: &str = "/sys/fs/bpf/forwarder";

const DAEMON_EXAMPLE: &str = "Example:\n  forwarderd --external wan --internal lan --datapath auto";

/// Forwards ports in the kernel, through eBPF
#[derive(Debug, Parser)]
#[command(name = "forwarderd", version, after_help = DAEMON_EXAMPLE)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Option<Command>,
    #[command(flatten)]
    pub flags: Flags,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Take programs, maps and filters off this machine, with or without a running controller
    #[command(after_help = "Example:\n  forwarderd detach --pin-dir /sys/fs/bpf/forwarder")]
    Detach {
        /// Where they are pinned [default: as in the configuration, or /sys/fs/bpf/forwarder]
        #[arg(long, value_name = "DIR")]
        pin_dir: Option<PathBuf>,
        /// Configuration file of the forwarderd that made them [default: /etc/forwarder/forwarder.toml]
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
    },
    /// Read a configuration file and say what is wrong with it
    #[command(after_help = "Example:\n  forwarderd check-config /etc/forwarder/forwarder.toml")]
    CheckConfig { file: PathBuf },
}

#[derive(Clone, Debug, Default, Args)]
pub struct Flags {
    /// Interfaces towards the internet
    #[arg(long, value_name = "IFACE", num_args = 1.., value_delimiter = ',')]
    pub external: Vec<String>,
    /// Interfaces towards the targets
    #[arg(long, value_name = "IFACE", num_args = 1.., value_delimiter = ',')]
    pub internal: Vec<String>,
    /// Where packets are handled [default: auto]
    #[arg(long, value_name = "KIND")]
    pub datapath: Option<Mode>,
    /// Where rules are kept [default: /var/lib/forwarder]
    #[arg(long, value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
    /// Where forwarderctl finds the controller [default: /run/forwarder/forwarder.sock]
    #[arg(long, value_name = "FILE")]
    pub socket: Option<PathBuf>,
    /// Where programs and maps are pinned, on a bpf file system [default: /sys/fs/bpf/forwarder]
    #[arg(long, value_name = "DIR")]
    pub pin_dir: Option<PathBuf>,
    /// Configuration file with the same settings; flags win [default: /etc/forwarder/forwarder.toml]
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
}

/// The settings as they hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    pub external: Vec<String>,
    pub internal: Vec<String>,
    pub datapath: Mode,
    pub state_dir: PathBuf,
    pub socket: PathBuf,
    pub pin_dir: PathBuf,
    /// The bit of `skb->mark` that what goes through the host's stack carries.
    pub mark: u32,
    pub timeouts: Timeouts,
    pub tables: TableSizes,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
struct File {
    external: Vec<String>,
    internal: Vec<String>,
    datapath: Option<Mode>,
    state_dir: Option<PathBuf>,
    socket: Option<PathBuf>,
    pin_dir: Option<PathBuf>,
    mark: Option<u32>,
    timeouts: Timeouts,
    tables: TableSizes,
}

impl File {
    /// What a relative path would mean depends on where the daemon was started.
    fn check_paths(&self) -> Result<()> {
        for (key, path) in
            [("state-dir", &self.state_dir), ("socket", &self.socket), ("pin-dir", &self.pin_dir)]
        {
            if let Some(path) = path.as_ref().filter(|path| !path.is_absolute()) {
                bail!("{key} = {} is not an absolute path: begin it with /", quoted(&path.to_string_lossy()));
            }
        }
        Ok(())
    }
}

/// Of the file what [`Config::pin_dir`] needs.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Pins {
    pin_dir: Option<PathBuf>,
}

impl Config {
    /// Reads the file that the flags name, or the usual one where there is one, and lets the flags win.
    pub fn load(flags: &Flags) -> Result<Self> {
        Config::merge(flags.clone(), read_named(flags)?)
    }

    /// The directory of pins alone, for which the rest of the file need not be right.
    pub fn pin_dir(flags: &Flags) -> Result<PathBuf> {
        if let Some(path) = &flags.pin_dir {
            return Ok(path.clone());
        }
        let file: Pins = read_named(flags).context("name the pins with --pin-dir")?;
        Ok(file.pin_dir.unwrap_or_else(|| DEFAULT_PIN_DIR.into()))
    }

    /// Reads one file for itself. It may leave out what flags can give.
    pub fn check_file(path: &Path) -> Result<Vec<String>> {
        let file: File = read(path)?;
        let timeouts = file.timeouts;
        let mut warnings = warnings(&timeouts);
        if !file.external.is_empty() || !file.internal.is_empty() {
            Config::merge(Flags::default(), file)?;
        } else {
            file.check_paths()?;
            check_tables(&file.tables)?;
            check_mark(file.mark.unwrap_or(DEFAULT_MARK))?;
            warnings.push(
                "it names no interfaces: forwarderd has to be given --external and --internal".to_owned(),
            );
        }
        Ok(warnings)
    }

    /// What holds, but is not wise.
    pub fn warnings(&self) -> Vec<String> {
        warnings(&self.timeouts)
    }

    fn merge(flags: Flags, file: File) -> Result<Self> {
        let listed = |flag: Vec<String>, file: Vec<String>| if flag.is_empty() { file } else { flag };
        let path = |flag: Option<PathBuf>, file: Option<PathBuf>, default: &str| {
            flag.or(file).unwrap_or_else(|| default.into())
        };
        file.check_paths()?;
        let config = Config {
            external: listed(flags.external, file.external),
            internal: listed(flags.internal, file.internal),
            datapath: flags.datapath.or(file.datapath).unwrap_or_default(),
            state_dir: path(flags.state_dir, file.state_dir, DEFAULT_STATE_DIR),
            socket: path(flags.socket, file.socket, DEFAULT_SOCKET),
            pin_dir: path(flags.pin_dir, file.pin_dir, DEFAULT_PIN_DIR),
            mark: file.mark.unwrap_or(DEFAULT_MARK),
            timeouts: file.timeouts,
            tables: file.tables,
        };
        config.check_interfaces()?;
        check_tables(&config.tables)?;
        check_mark(config.mark)?;
        Ok(config)
    }

    fn check_interfaces(&self) -> Result<()> {
        ensure!(
            !self.external.is_empty(),
            "no external interface is given: name one with --external wan, or external = [\"wan\"] in the configuration"
        );
        ensure!(
            !self.internal.is_empty(),
            "no internal interface is given: name one with --internal lan, or internal = [\"lan\"] in the configuration"
        );
        let mut seen = Vec::new();
        for name in self.external.iter().chain(&self.internal) {
            check_interface_name(name)?;
            ensure!(
                name != "lo",
                "lo is the loopback interface, where nothing comes in from outside: leave it out"
            );
            ensure!(
                !seen.contains(&name),
                "interface {name} is given twice: it is either external or internal, once"
            );
            seen.push(name);
        }
        Ok(())
    }
}

fn check_tables(tables: &TableSizes) -> Result<()> {
    for (key, value, most) in [
        ("rules", tables.rules, 65_536),
        ("flows", tables.flows, 16_777_216),
        ("half-open", tables.half_open, 16_777_216),
        ("flows-ipv6", tables.flows_ipv6, 16_777_216),
        ("half-open-ipv6", tables.half_open_ipv6, 16_777_216),
    ] {
        ensure!((1..=most).contains(&value), "[tables] {key} = {value} is out of bounds: write 1 to {most}");
    }
    Ok(())
}

fn check_mark(mark: u32) -> Result<()> {
    ensure!(
        mark.is_power_of_two(),
        "mark = {mark:#x} is not one bit: write one that nobody else uses, as {DEFAULT_MARK:#x}"
    );
    Ok(())
}

fn warnings(timeouts: &Timeouts) -> Vec<String> {
    let least = Timeouts::default();
    let minute = Duration::from_secs(60);
    [
        ("tcp-half-open", timeouts.tcp_half_open, least.tcp_half_open, "RFC 5382"),
        ("tcp-established", timeouts.tcp_established, least.tcp_established, "RFC 5382"),
        ("tcp-closing", timeouts.tcp_closing, least.tcp_closing, "RFC 5382"),
        ("udp-half-open", timeouts.udp_half_open, 2 * minute, "RFC 4787"),
        ("udp-established", timeouts.udp_established, 2 * minute, "RFC 4787"),
    ]
    .into_iter()
    .filter(|(_, value, least, _)| value < least)
    .map(|(key, value, least, rfc)| {
        let (value, least) = (humantime::format_duration(value), humantime::format_duration(least));
        format!("[timeouts] {key} is {value}, and {rfc} wants at least {least}")
    })
    .collect()
}

/// The file that the flags name, or the usual one where there is one.
fn read_named<T: DeserializeOwned + Default>(flags: &Flags) -> Result<T> {
    match &flags.config {
        Some(path) => read(path),
        None => read_if_there(Path::new(DEFAULT_CONFIG)),
    }
}

fn read_if_there<T: DeserializeOwned + Default>(path: &Path) -> Result<T> {
    match fs::read_to_string(path) {
        Ok(text) => parse(path, &text),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(T::default()),
        Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
    }
}

fn read<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    parse(path, &text)
}

fn parse<T: DeserializeOwned>(path: &Path, text: &str) -> Result<T> {
    toml::from_str(text).map_err(|error| {
        let line = error.span().map_or(String::new(), |span| {
            let line = text.get(..span.start).unwrap_or(text).matches('\n').count() + 1;
            format!(" line {line}")
        });
        let message = error.message().lines().collect::<Vec<_>>().join("; ");
        anyhow!("{}{line}: {message}", path.display())
    })
}

/// Reads an idle time as `4m` or `2h4m`.
pub fn idle_time<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    let text = String::deserialize(deserializer)?;
    parse_idle_time(&text).map_err(serde::de::Error::custom)
}

fn parse_idle_time(text: &str) -> Result<Duration> {
    let Some(duration) = parse_duration(text) else {
        bail!("{} is not a duration: write 90s, 4m or 2h4m", quoted(text));
    };
    let (least, most) = (Duration::from_secs(1), Duration::from_secs(30 * 24 * 3600));
    ensure!((least..=most).contains(&duration), "{} is out of bounds: write 1s to 30d", quoted(text));
    Ok(duration)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn file(text: &str) -> Result<Config, String> {
        let parsed = parse(Path::new("forwarder.toml"), text).map_err(|error| error.to_string())?;
        Config::merge(Flags::default(), parsed).map_err(|error| error.to_string())
    }

    fn flags(line: &str) -> Cli {
        Cli::try_parse_from(std::iter::once("forwarderd").chain(line.split(' '))).unwrap()
    }

    const LEAST: &str = "external = [\"wan\"]\ninternal = [\"lan\"]\n";

    #[test]
    fn the_command_line_is_consistent_and_every_command_has_an_example() {
        Cli::command().debug_assert();
        for command in Cli::command().get_subcommands().chain([&Cli::command()]) {
            assert!(command.clone().render_help().to_string().contains("Example"), "{}", command.get_name());
        }
    }

    #[test]
    fn all_keys_of_the_file_hold() {
        let config = file(
            "external = [\"wan\", \"wan2\"]\ninternal = [\"lan\"]\ndatapath = \"xdp-generic\"\nstate-dir = \"/s\"\n\
             socket = \"/r\"\npin-dir = \"/p\"\nmark = 0x80\n[timeouts]\ntcp-half-open = \"1s\"\ntcp-established = \"2h4m\"\n\
             tcp-closing = \"90s\"\nudp-half-open = \"30s\"\nudp-established = \"1m\"\n[tables]\nrules = 1\n\
             flows = 2\nhalf-open = 3\nflows-ipv6 = 4\nhalf-open-ipv6 = 5\n",
        )
        .unwrap();
        assert_eq!(config.external, ["wan", "wan2"]);
        assert_eq!((config.datapath, config.pin_dir), (Mode::XdpGeneric, "/p".into()));
        assert_eq!(config.mark, 0x80);
        assert_eq!(config.timeouts.tcp_established, Duration::from_secs(7440));
        let tables = TableSizes { rules: 1, flows: 2, half_open: 3, flows_ipv6: 4, half_open_ipv6: 5 };
        assert_eq!(config.tables, tables);
    }

    #[test]
    fn what_is_not_said_has_its_default() {
        let config = file(LEAST).unwrap();
        assert_eq!(config.state_dir, Path::new(DEFAULT_STATE_DIR));
        assert_eq!(config.mark, DEFAULT_MARK);
        assert_eq!((config.timeouts, config.tables), (Timeouts::default(), TableSizes::default()));
        assert_eq!(config.warnings(), [""; 0]);
    }

    #[test]
    fn flags_win_over_the_file() {
        let line = "--external wan3,wan4 --external wan5 --datapath tc --state-dir /flag";
        let merged = Config::merge(flags(line).flags, parse(Path::new("f"), LEAST).unwrap()).unwrap();
        assert_eq!(merged.external, ["wan3", "wan4", "wan5"]);
        assert_eq!(merged.internal, ["lan"]);
        assert_eq!((merged.datapath, merged.state_dir), (Mode::Tc, "/flag".into()));
    }

    #[test]
    fn bad_files_are_refused_in_one_line_with_the_place() {
        for (text, expected) in [
            ("externl = [\"wan\"]\n", "line 1: unknown field `externl`"),
            ("external = [\"wan\"]\n\n[timeouts]\ntcp = \"4m\"\n", "line 4: unknown field `tcp`"),
            ("[tables]\nflow = 1\n", "line 2: unknown field `flow`"),
            ("external = \"wan\"\n", "line 1: invalid type"),
            ("external = [\"wan\"\n", "line"),
            ("datapath = \"fast\"\n", "line 1: unknown variant `fast`"),
            ("[timeouts]\nudp-half-open = 120\n", "line 2: invalid type"),
            ("[timeouts]\nudp-half-open = \"soon\"\n", "not a duration"),
            ("[timeouts]\nudp-half-open = \"0s\"\n", "out of bounds"),
            ("[tables]\nrules = -1\n", "line 2: invalid value"),
            ("internal = [\"lan\"]\n", "no external interface"),
            ("external = [\"wan\"]\n", "no internal interface"),
            ("external = [\"wan\"]\ninternal = [\"wan\"]\n", "given twice"),
            (
                "external = [\"wan\"]\ninternal = [\"lan\"]\nsocket = \"\"\n",
                "socket = `` is not an absolute path",
            ),
            ("state-dir = \"state\"\n", "not an absolute path"),
            ("external = [\"lo\"]\ninternal = [\"lan\"]\n", "loopback"),
            ("external = [\"a name too long to be one\"]\ninternal = [\"lan\"]\n", "1 to 15 characters"),
            ("external = [\"wan\"]\ninternal = [\"lan\"]\n[tables]\nrules = 0\n", "[tables] rules = 0"),
            ("external = [\"wan\"]\ninternal = [\"lan\"]\nmark = 0x30\n", "mark = 0x30 is not one bit"),
            ("external = [\"wan\"]\ninternal = [\"lan\"]\nmark = 0\n", "mark = 0x0 is not one bit"),
            ("mark = 0x100000000\n", "line 1: invalid value"),
            ("external = [\"wan\"]\ninternal = [\"lan\"]\n[tables]\nflows = 4294967295\n", "out of bounds"),
        ] {
            let error = file(text).unwrap_err();
            assert!(error.contains(expected) && !error.contains('\n'), "{text}: {error}");
        }
    }

    #[test]
    fn idle_times_below_the_rfcs_are_taken_with_a_warning() {
        let config =
            file(&format!("{LEAST}[timeouts]\ntcp-established = \"10s\"\nudp-established = \"3m\"\n"))
                .unwrap();
        assert_eq!(config.warnings().len(), 1);
        assert!(config.warnings()[0].contains("tcp-established is 10s, and RFC 5382 wants at least 2h 4m"));
    }

    #[test]
    fn a_named_file_has_to_be_there() {
        let error =
            Config::load(&flags("--config /nowhere/f.toml --external wan").flags).unwrap_err().to_string();
        assert!(error.contains("/nowhere/f.toml"), "{error}");
        assert!(Config::check_file(Path::new("/nowhere/f.toml")).is_err());
        assert!(read_if_there::<File>(Path::new("/nowhere/f.toml")).is_ok());
    }

    #[test]
    fn the_pins_are_where_the_flag_or_else_the_file_says() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("forwarder.toml");
        fs::write(&path, "colour = 1\npin-dir = \"/p\"\n").unwrap();
        let flags = Flags { config: Some(path), ..Flags::default() };
        assert_eq!(Config::pin_dir(&flags).unwrap(), Path::new("/p"));
        let flags = Flags { pin_dir: Some("/q".into()), ..flags };
        assert_eq!(Config::pin_dir(&flags).unwrap(), Path::new("/q"));
    }

    #[test]
    fn a_file_may_leave_the_interfaces_to_flags() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("forwarder.toml");
        fs::write(&path, "datapath = \"tc\"\n").unwrap();
        assert!(Config::check_file(&path).unwrap()[0].contains("names no interfaces"));
        fs::write(&path, "datapath = \"tc\"\n[tables]\nrules = 0\n").unwrap();
        assert!(Config::check_file(&path).is_err());
    }
}
