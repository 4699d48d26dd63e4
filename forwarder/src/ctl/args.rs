//! The command line of forwarderctl.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::config::DEFAULT_SOCKET;
use crate::rule::{AllowList, Invalid, LimitsRequest, Request, Via, parse_date, quoted};

/// Sees to the port mappings of a running forwarderd
#[derive(Debug, Parser)]
#[command(name = "forwarderctl", version)]
#[command(after_help = "Example:\n  forwarderctl add tcp wan:8080 10.0.0.10:80 --name web --lifetime 12h")]
pub struct Cli {
    /// The controller's socket
    #[arg(long, global = true, value_name = "FILE", default_value = DEFAULT_SOCKET)]
    pub socket: PathBuf,
    /// Print one JSON value and nothing else
    #[arg(long, global = true)]
    pub json: bool,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Show how the controller fares, and what carries packets on each interface
    ///
    /// Of the tables, `rules` counts rules, `ports` the pages of 64 ports that they have, `flows` and
    /// `half-open` sessions over IPv4, `flows-ipv6` and `half-open-ipv6` those over IPv6.
    #[command(after_help = "Example:\n  forwarderctl status")]
    Status,
    /// Add a rule
    #[command(after_help = "Examples:
  forwarderctl add tcp wan:8080 10.0.0.10:80 --name web
  forwarderctl add udp 203.0.113.10:10000-10099 10.0.0.20:10000-10099 --lifetime 12h --allow 198.51.100.0/24
  forwarderctl add tcp '[2001:db8::1]:443' '[fd00::10]:443'")]
    Add(Add),
    /// Change a rule in place
    #[command(after_help = "Examples:
  forwarderctl set web --target 10.0.0.11:80
  forwarderctl set tcp wan:8080 --allow 198.51.100.0/24 192.0.2.7")]
    Set(Set),
    /// Give a rule a new end, counted from now
    #[command(after_help = "Example:\n  forwarderctl renew web --lifetime 12h")]
    Renew(Renew),
    /// Delete rules
    #[command(after_help = "Examples:\n  forwarderctl del web 7\n  forwarderctl del tcp wan:8080 --drain")]
    Del(Del),
    /// Show all rules
    ///
    /// IN is towards the target. SESS counts the established sessions of now, without those that
    /// are half-open or closing; `flows` shows all. ALLOW has the first network and how many more.
    #[command(after_help = "Example:\n  forwarderctl list --json")]
    List,
    /// Show all about one rule
    #[command(after_help = "Example:\n  forwarderctl show tcp wan:8080")]
    Show {
        /// Id, name, or PROTO EXTERNAL
        #[arg(required = true, num_args = 1..=2, value_name = "RULE")]
        rule: Vec<String>,
    },
    /// Show live sessions, of one rule or of all
    ///
    /// IN is towards the target.
    #[command(after_help = "Example:\n  forwarderctl flows web")]
    Flows {
        /// Id, name, or PROTO EXTERNAL
        #[arg(num_args = 0..=2, value_name = "RULE")]
        rule: Vec<String>,
    },
    /// Show packets and bytes, by rule and by what became of them
    #[command(after_help = "Example:\n  forwarderctl stats")]
    Stats,
}

#[derive(Debug, Args)]
pub struct Add {
    /// tcp, udp or tcp+udp
    #[arg(value_name = "PROTO")]
    pub protocol: String,
    /// Where it is reached: ADDR:PORT[-PORT] or IFACE:PORT[-PORT], an IPv6 address in brackets
    #[arg(value_name = "EXTERNAL")]
    pub external: String,
    /// Where it leads: ADDR:PORT[-PORT]; an interface is reached at its addresses of this one's family
    #[arg(value_name = "TARGET")]
    pub target: String,
    #[command(flatten)]
    pub options: Options,
    /// How long it lives, as 90s, 10m, 12h, 30d, or never
    #[arg(long, value_name = "DUR", allow_hyphen_values = true)]
    pub lifetime: Option<String>,
    /// Hosts inside may not reach the external address
    #[arg(long)]
    pub no_hairpin: bool,
    /// Make the target a DMZ host: all ports, written as 1-65535, that no other rule and no service
    /// of the router has. Risky: needs --review-by, or --force
    #[arg(long)]
    pub dmz: bool,
    /// Keep it without letting it forward yet
    #[arg(long)]
    pub disabled: bool,
    /// Take the place of the one rule that it would collide with: what is not named here, above all
    /// its allow list and its end, stays as it was
    #[arg(long)]
    pub replace: bool,
}

#[derive(Debug, Args)]
pub struct Set {
    /// Id, name, or PROTO EXTERNAL
    #[arg(required = true, num_args = 1..=2, value_name = "RULE")]
    pub rule: Vec<String>,
    /// Where it leads: UDP moves at once, established TCP stays to its end
    #[arg(long, value_name = "TARGET")]
    pub target: Option<String>,
    /// End all its flows now
    #[arg(long)]
    pub cut: bool,
    #[command(flatten)]
    pub options: Options,
    /// A new end counted from now, as 90s, 10m, 12h, 30d; or never, which makes it permanent
    #[arg(long, value_name = "DUR", allow_hyphen_values = true)]
    pub lifetime: Option<String>,
    /// Hosts inside may reach the external address
    #[arg(long, conflicts_with = "no_hairpin")]
    pub hairpin: bool,
    /// Hosts inside may not reach the external address
    #[arg(long)]
    pub no_hairpin: bool,
    /// Let it forward again
    #[arg(long, conflicts_with = "disabled")]
    pub enabled: bool,
    /// Keep it without letting it forward; its flows are cut
    #[arg(long)]
    pub disabled: bool,
}

#[derive(Debug, Default, Args)]
pub struct Options {
    /// A name to call it by
    #[arg(long, allow_hyphen_values = true)]
    pub name: Option<String>,
    /// Who answers for it
    #[arg(long)]
    pub owner: Option<String>,
    /// What it is for
    #[arg(long)]
    pub purpose: Option<String>,
    /// When somebody should look whether it is still wanted, as 2026-12-31
    #[arg(long, value_name = "DATE")]
    pub review_by: Option<String>,
    /// Sources that may use it, separated by spaces or commas; `any` for everyone. Takes all words
    /// up to the next option: write it last
    #[arg(long, value_name = "CIDR", num_args = 1.., value_delimiter = ',')]
    pub allow: Vec<String>,
    /// Most established sessions at once, beyond which new ones are dropped; `none`: no limit
    #[arg(long, value_name = "N")]
    pub max_sessions: Option<String>,
    /// Most established sessions at once of one source address; `none`: no limit
    #[arg(long, value_name = "N")]
    pub max_sessions_per_source: Option<String>,
    /// Most new sessions a second, half-open ones too; `none`: no limit
    #[arg(long, value_name = "N")]
    pub new_per_second: Option<String>,
    /// Which way its packets take
    #[arg(long)]
    pub via: Option<Way>,
    /// Take the port although a service of the router listens on it; expose a DMZ host without a
    /// review date
    #[arg(long)]
    pub force: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Way {
    /// The forwarder's own path
    Fast,
    /// The host's routing and firewall (not built yet: refused)
    Stack,
}

#[derive(Debug, Args)]
pub struct Renew {
    /// Id, name, or PROTO EXTERNAL
    #[arg(required = true, num_args = 1..=2, value_name = "RULE")]
    pub rule: Vec<String>,
    /// How long from now, as 90s, 10m, 12h, 30d
    #[arg(long, value_name = "DUR", allow_hyphen_values = true)]
    pub lifetime: String,
}

#[derive(Debug, Args)]
pub struct Del {
    /// Ids, names, or PROTO EXTERNAL
    #[arg(required = true, num_args = 1.., value_name = "RULE")]
    pub rules: Vec<String>,
    /// Let established flows end by themselves
    #[arg(long)]
    pub drain: bool,
}

impl Cli {
    /// Reads this process's arguments, or says what is wrong with them and ends it.
    pub fn read() -> Self {
        Cli::try_parse().unwrap_or_else(|error| explained(error, std::env::args_os()).exit())
    }
}

/// Says where missing words may have gone.
fn explained(mut error: clap::Error, mut arguments: impl Iterator<Item = OsString>) -> clap::Error {
    if error.kind() == ErrorKind::MissingRequiredArgument && arguments.any(|word| word == "--allow") {
        let tip = "--allow takes all words up to the next option: write it last";
        error.insert(ContextKind::Suggested, ContextValue::StyledStrs(vec![tip.into()]));
    }
    error
}

impl Add {
    pub fn request(&self) -> Result<Request, Invalid> {
        let request = Request {
            protocol: Some(self.protocol.parse()?),
            external: Some(self.external.parse()?),
            target: Some(self.target.parse()?),
            lifetime: self.lifetime.as_deref().map(str::parse).transpose()?,
            hairpin: self.no_hairpin.then_some(false),
            enabled: self.disabled.then_some(false),
            dmz: self.dmz,
            replace: self.replace,
            ..self.options.request()?
        };
        // The controller checks it as well; here the refusal comes also without one.
        request.new_spec()?;
        Ok(request)
    }
}

impl Set {
    pub fn request(&self) -> Result<Request, Invalid> {
        let request = Request {
            target: self.target.as_deref().map(str::parse).transpose()?,
            lifetime: self.lifetime.as_deref().map(str::parse).transpose()?,
            hairpin: switched(self.hairpin, self.no_hairpin),
            enabled: switched(self.enabled, self.disabled),
            cut: self.cut,
            ..self.options.request()?
        };
        if request == (Request { force: self.options.force, ..Request::default() }) {
            return Err(Invalid(
                "nothing to change is given: name an option, as --target 10.0.0.11:80".to_owned(),
            ));
        }
        Ok(request)
    }
}

/// A limit, or `none` for none.
fn limit(name: &str, text: Option<&str>) -> Result<Option<Option<u64>>, Invalid> {
    match text {
        None => Ok(None),
        Some("none") => Ok(Some(None)),
        Some(text) => text.parse().map(|limit| Some(Some(limit))).map_err(|_| {
            Invalid(format!("{name} {} is not a number: write 1 or more, or none", quoted(text)))
        }),
    }
}

fn switched(on: bool, off: bool) -> Option<bool> {
    (on || off).then_some(on)
}

impl Options {
    fn request(&self) -> Result<Request, Invalid> {
        if let Some(date) = self.review_by.as_deref().filter(|date| !date.is_empty()) {
            parse_date(date)?;
        }
        let limits = LimitsRequest {
            max_sessions: limit("max-sessions", self.max_sessions.as_deref())?,
            max_sessions_per_source: limit(
                "max-sessions-per-source",
                self.max_sessions_per_source.as_deref(),
            )?,
            new_per_second: limit("new-per-second", self.new_per_second.as_deref())?,
        };
        Ok(Request {
            name: self.name.clone(),
            owner: self.owner.clone(),
            purpose: self.purpose.clone(),
            review_by: self.review_by.clone(),
            allow: match self.allow.as_slice() {
                [] => None,
                networks => Some(AllowList::parse(networks.iter().map(String::as_str))?),
            },
            limits: (limits != LimitsRequest::default()).then_some(limits),
            via: self.via.map(|way| match way {
                Way::Fast => Via::Fast,
                Way::Stack => Via::Stack,
            }),
            force: self.force,
            ..Request::default()
        })
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn read(line: &str) -> Result<Request, String> {
        let words = std::iter::once("forwarderctl").chain(line.split(' '));
        match Cli::try_parse_from(words).map_err(|error| format!("usage: {error}"))?.command {
            Command::Add(add) => add.request().map_err(|error| error.to_string()),
            Command::Set(set) => set.request().map_err(|error| error.to_string()),
            other => panic!("{other:?} makes no request"),
        }
    }

    #[test]
    fn the_command_line_is_consistent_and_every_command_has_an_example() {
        Cli::command().debug_assert();
        for command in Cli::command().get_subcommands().chain([&Cli::command()]) {
            let help = command.clone().render_help().to_string();
            assert!(help.contains("Example") && help.contains("forwarderctl "), "{}", command.get_name());
        }
    }

    #[test]
    fn all_options_arrive() {
        let request = read(
            "add tcp+udp wan:80-81 10.0.0.10:80-81 --name web --owner ops --purpose site --review-by 2030-01-01 \
             --lifetime 12h --allow 192.0.2.0/24,198.51.100.7 203.0.113.0/24 --no-hairpin --via fast --disabled --force --replace \
             --max-sessions 9 --max-sessions-per-source 3 --new-per-second 2",
        )
        .unwrap();
        assert_eq!(
            serde_json::to_value(&request).unwrap(),
            serde_json::json!({
                "protocol": "tcp+udp", "external": "wan:80-81", "target": "10.0.0.10:80-81", "name": "web",
                "owner": "ops", "purpose": "site", "review_by": "2030-01-01", "lifetime": "12h",
                "allow": ["192.0.2.0/24", "198.51.100.7/32", "203.0.113.0/24"], "hairpin": false, "via": "fast", "enabled": false,
                "force": true, "replace": true,
                "limits": { "max_sessions": 9, "max_sessions_per_source": 3, "new_per_second": 2 },
            })
        );
    }

    #[test]
    fn a_change_says_only_what_changes() {
        let request = read("set tcp wan:80 --enabled --allow any --lifetime never --cut").unwrap();
        assert_eq!(
            serde_json::to_value(&request).unwrap(),
            serde_json::json!({ "enabled": true, "allow": [], "lifetime": "never", "cut": true })
        );
        let request = read("set web --max-sessions none").unwrap();
        assert_eq!(
            serde_json::to_value(&request).unwrap(),
            serde_json::json!({ "limits": { "max_sessions": null } })
        );
        assert!(read("set web").is_err());
        assert!(read("set web --enabled --disabled").unwrap_err().starts_with("usage"));
        // A value that a script has left out must not take the next option with it.
        for line in ["set web --owner --disabled", "set web --purpose --allow=192.0.2.0/24"] {
            assert!(read(line).unwrap_err().starts_with("usage"), "{line}");
        }
    }

    #[test]
    fn words_that_went_to_the_allow_list_are_missed_with_a_hint() {
        let hint = |line: &str| {
            let words = || line.split(' ').map(OsString::from);
            let error = Cli::try_parse_from(words()).unwrap_err();
            explained(error, words()).to_string()
        };
        assert!(
            hint("forwarderctl add --allow 192.0.2.0/24 tcp wan:80 10.0.0.1:80").contains("write it last")
        );
        assert!(!hint("forwarderctl add tcp wan:80").contains("--allow takes"));
    }

    #[test]
    fn bad_values_are_refused_in_one_line_without_a_controller() {
        for line in [
            "add icmp wan:80 10.0.0.1:80",
            "add tcp wan:0 10.0.0.1:80",
            "add tcp wan:70000 10.0.0.1:80",
            "add tcp 300.0.0.1:80 10.0.0.1:80",
            "add tcp wan:80 host:80",
            "add tcp wan:80 [fe80::1]:80",
            "add tcp [2001:db8::1]:80 10.0.0.1:80",
            "add tcp 203.0.113.1:80 [2001:db8::1]:80",
            "add tcp wan:80 127.0.0.1:80",
            "add tcp wan:80-89 10.0.0.1:80-88",
            "add tcp wan:80 10.0.0.1:80 --lifetime 0",
            "add tcp wan:80 10.0.0.1:80 --lifetime soon",
            "add tcp wan:80 10.0.0.1:80 --lifetime -5s",
            "add tcp wan:80 10.0.0.1:80 --name -x",
            "add tcp wan:80 10.0.0.1:80 --allow ::/0",
            "add tcp wan:80 10.0.0.1:80 --review-by soon",
            "add tcp wan:80 10.0.0.1:80 --allow 10.0.0.0/33",
            "add tcp wan:80 10.0.0.1:80 --name 12",
            "add tcp wan:80 10.0.0.1:80 --max-sessions 0",
            "add tcp wan:80 10.0.0.1:80 --max-sessions-per-source many",
            "add tcp wan:80 10.0.0.1:80 --new-per-second 1000001",
            "set web --target nowhere",
            "set web --lifetime 0s",
            "set web --review-by 1.1.2030",
        ] {
            let error = read(line).unwrap_err();
            assert!(!error.contains('\n') && !error.starts_with("usage"), "{line}: {error}");
        }
    }
}
