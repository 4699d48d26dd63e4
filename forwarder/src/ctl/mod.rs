//! forwarderctl: the operator's hand.

pub mod args;
mod human;
mod show;
mod table;

use std::fmt;
use std::io::{self, ErrorKind, Write};

use serde::Serialize;

use crate::client::{Client, ClientError};
use crate::controller::Added;
use crate::rule::{Invalid, Lifetime, RuleRef, RuleView, now};
use args::{Cli, Command};

pub use table::Terminal;

/// Why a command was not done; the line goes to stderr.
#[derive(Debug)]
pub enum Failure {
    Refused(String),
    Unreachable(String),
}

impl Failure {
    pub fn exit_code(&self) -> u8 {
        match self {
            Failure::Refused(_) => 1,
            Failure::Unreachable(_) => 3,
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::Refused(line) | Failure::Unreachable(line) => f.write_str(line),
        }
    }
}

impl From<Invalid> for Failure {
    fn from(invalid: Invalid) -> Self {
        Failure::Refused(invalid.to_string())
    }
}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Self {
        match error {
            ClientError::Unreachable(line) => Failure::Unreachable(line),
            other => Failure::Refused(other.to_string()),
        }
    }
}

/// What a command has to say.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// For stdout.
    pub text: String,
    /// For stderr, a line each.
    pub warnings: Vec<String>,
}

impl Report {
    /// Writes it out. A reader that has seen enough is no failure.
    pub fn print(&self) -> Result<(), Failure> {
        for warning in &self.warnings {
            // Without a stderr there is nobody to warn.
            let _ = writeln!(io::stderr(), "warning: {warning}");
        }
        let mut out = io::stdout().lock();
        match out.write_all(self.text.as_bytes()).and_then(|()| out.flush()) {
            Err(error) if error.kind() != ErrorKind::BrokenPipe => {
                Err(Failure::Refused(format!("cannot write the output: {error}")))
            }
            _ => Ok(()),
        }
    }
}

/// Does what the command line asks.
pub async fn run(cli: &Cli, terminal: Terminal) -> Result<Report, Failure> {
    let client = Client::new(&cli.socket);
    let json = cli.json;
    match &cli.command {
        Command::Status => {
            let status = client.status().await?;
            answer(json, &status, || show::status(&status, terminal))
        }
        Command::Add(add) => {
            let Added { rule, replaced } = client.add(&add.request()?).await?;
            changed(json, rule, if replaced { "replaced" } else { "added" })
        }
        Command::Set(set) => {
            let which = one_rule(&set.rule)?;
            let rule = client.set(&which, &set.request()?).await?;
            changed(json, rule, "changed")
        }
        Command::Renew(renew) => {
            let lifetime: Lifetime = renew.lifetime.parse()?;
            let rule = client.renew(&one_rule(&renew.rule)?, lifetime).await?;
            changed(json, rule, "renewed")
        }
        Command::Del(del) => delete(&client, &rules(&del.rules)?, del.drain, json).await,
        Command::List => {
            let rules = client.list().await?;
            answer(json, &rules, || show::list(&rules, now(), terminal))
        }
        Command::Show { rule } => {
            let rule = client.show(&one_rule(rule)?).await?;
            answer(json, &rule, || show::rule(&rule, now(), terminal))
        }
        Command::Flows { rule } => {
            let which = if rule.is_empty() { None } else { Some(one_rule(rule)?) };
            let flows = client.flows(which.as_ref()).await?;
            answer(json, &flows, || show::flows(&flows, terminal))
        }
        Command::Stats => {
            let stats = client.stats().await?;
            answer(json, &stats, || show::stats(&stats, terminal))
        }
    }
}

/// Deletes several rules, none of them where one does not exist.
async fn delete(client: &Client, which: &[RuleRef], drain: bool, json: bool) -> Result<Report, Failure> {
    let mut ids = Vec::new();
    for rule in which {
        let id = client.show(rule).await?.id;
        if !ids.contains(&id) {
            ids.push(id);
        }
    }
    let mut removed = Vec::new();
    for id in ids {
        removed.push(client.del(&RuleRef::Id(id), drain).await?);
    }
    answer(json, &removed, || {
        let line = |rule| if drain { show::line(rule, "drains") } else { show::deleted(rule) };
        removed.iter().map(line).collect()
    })
}

/// The answer to a change; its warnings go to stderr, in JSON they stay in the rule as well.
fn changed(json: bool, rule: RuleView, verb: &str) -> Result<Report, Failure> {
    let report = answer(json, &rule, || show::line(&rule, verb))?;
    Ok(Report { warnings: rule.warnings, ..report })
}

fn answer(json: bool, value: &impl Serialize, text: impl FnOnce() -> String) -> Result<Report, Failure> {
    let text = if json {
        let value = serde_json::to_string_pretty(value);
        value.map_err(|error| Failure::Refused(format!("cannot write the answer as JSON: {error}")))? + "\n"
    } else {
        text()
    };
    Ok(Report { text, warnings: Vec::new() })
}

/// Reads words that name rules, each an id, a name, or `PROTO EXTERNAL`.
fn rules(words: &[String]) -> Result<Vec<RuleRef>, Invalid> {
    let mut rules = Vec::new();
    let mut words = words.iter();
    while let Some(word) = words.next() {
        // No rule can have the name of a protocol, so an external follows.
        if word.parse::<crate::rule::Protocol>().is_err() {
            rules.push(word.parse()?);
            continue;
        }
        let Some(external) = words.next() else {
            return Err(Invalid(format!("an external has to follow {word}: write {word} wan:8080")));
        };
        rules.push(format!("{word} {external}").parse()?);
    }
    Ok(rules)
}

fn one_rule(words: &[String]) -> Result<RuleRef, Invalid> {
    match rules(words)?.as_slice() {
        [rule] => Ok(rule.clone()),
        _ => Err(Invalid("name one rule: by its id, its name, or PROTO EXTERNAL".to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<String> {
        text.split(' ').map(str::to_owned).collect()
    }

    #[test]
    fn words_that_name_rules_are_told_apart() {
        let read = rules(&words("web 3 tcp wan:80 udp 203.0.113.10:53 mail")).unwrap();
        let shown: Vec<String> = read.iter().map(RuleRef::to_string).collect();
        assert_eq!(shown, ["web", "3", "tcp wan:80", "udp 203.0.113.10:53", "mail"]);
        assert!(rules(&words("web tcp")).is_err());
        assert!(one_rule(&words("web mail")).is_err());
        assert!(one_rule(&words("tcp wan:80")).is_ok());
    }
}
