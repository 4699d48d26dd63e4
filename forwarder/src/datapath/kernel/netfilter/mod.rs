//! The host's own packet filter, where it meets the few packets that go through its stack.
//!
//! They carry a mark. A small nftables table exempts that mark from connection tracking, and with that
//! from NAT: the host sees half of each connection at best, would take its packets for invalid and give
//! fragments of replies other ports. What cannot be exempted, because an accept in one table does not
//! overrule a drop in another, is looked for and said.

mod chains;
pub mod conntrack;
mod generation;
mod legacy;
mod netlink;

use std::{
    fs,
    io::{self, Write as _},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, bail};
use chains::{Finding, Ruleset};
use serde_json::Value;

/// The table, in the network namespace of the controller.
pub const TABLE: &str = "inet forwarder";

/// How often the tables of iptables-legacy are looked at, which have no generation to ask for.
const LEGACY_INTERVAL: Duration = Duration::from_secs(5);

const FWMARK_REFLECT: &str = "/proc/sys/net/ipv4/fwmark_reflect";

/// Between two looks at the ruleset passes this many times what a look takes: others may change theirs all
/// the time (fail2ban, containers), and large ones take long to list.
const PAUSE: u32 = 20;
/// A table of ours that somebody has removed is back by then.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// The table that exempts our packets, and what is known of everybody else's.
pub struct HostFilter {
    mark: u32,
    external: Vec<String>,
    internal: Vec<String>,
    /// The ruleset's generation when it was last looked at; `None` where that has to be done anew.
    seen: Option<u32>,
    /// When the last look ended, and how long it took.
    looked: Option<(Instant, Duration)>,
    /// Our table as it was installed.
    own: Vec<Value>,
    findings: Vec<Finding>,
    legacy: Option<String>,
    legacy_seen: Option<Instant>,
    /// Why the table is not there.
    failure: Option<String>,
}

impl HostFilter {
    pub fn new(mark: u32, external: &[String], internal: &[String]) -> Self {
        Self {
            mark,
            external: external.to_vec(),
            internal: internal.to_vec(),
            seen: None,
            looked: None,
            own: Vec::new(),
            findings: Vec::new(),
            legacy: None,
            legacy_seen: None,
            failure: None,
        }
    }

    /// Installs the table, or finds that it is there; looks at the others where something has changed.
    pub fn follow(&mut self) {
        let generation = generation::read().ok();
        let has_changed = self.seen.is_none() || generation != self.seen;
        if has_changed
            && self.looked.is_none_or(|(at, took)| at.elapsed() >= (took * PAUSE).min(LONGEST_PAUSE))
        {
            let start = Instant::now();
            match self.look() {
                Ok(()) => self.failure = None,
                Err(error) => self.fail(&error),
            }
            self.looked = Some((Instant::now(), start.elapsed()));
        }
        if self.legacy_seen.is_none_or(|seen| seen.elapsed() >= LEGACY_INTERVAL) {
            let legacy = legacy::warning(self.mark);
            log_new(legacy.iter().filter(|warning| Some(*warning) != self.legacy.as_ref()));
            self.legacy = legacy;
            self.legacy_seen = Some(Instant::now());
        }
    }

    fn look(&mut self) -> Result<()> {
        // Before the listing: a change in between shows at the next look.
        let mut generation = generation::read().context("the kernel has no nf_tables")?;
        let mut ruleset = Ruleset::parse(&list()?)?;
        if self.own.is_empty() || ruleset.of_table(TABLE) != self.own {
            if !self.own.is_empty() {
                log::warn!("somebody has removed or changed the nftables table {TABLE}: it is put back");
            }
            install(self.mark)?;
            // Each transaction raises it by one: where there was another, what is listed may not be ours
            // as it was installed.
            let installed = generation.wrapping_add(1).max(1);
            ruleset = Ruleset::parse(&list()?)?;
            if generation::read()? != installed {
                self.seen = None;
                return Ok(());
            }
            generation = installed;
            self.own = ruleset.of_table(TABLE);
        }
        let findings = ruleset.find(self.mark, &self.external, &self.internal);
        let old: Vec<String> = self.findings.iter().map(Finding::to_string).collect();
        let new: Vec<String> =
            findings.iter().filter(|it| it.holds(reflects())).map(Finding::to_string).collect();
        log_new(new.iter().filter(|warning| !old.contains(warning)));
        self.findings = findings;
        self.seen = Some(generation);
        Ok(())
    }

    /// It is tried again each second; said once for as long as it stays the same.
    fn fail(&mut self, error: &anyhow::Error) {
        let failure = format!(
            "the nftables table {TABLE} cannot be installed ({error:#}): where the host tracks connections or masquerades, what it has to fragment or to answer for a mapping may be lost"
        );
        log_new([&failure].into_iter().filter(|failure| self.failure.as_ref() != Some(failure)));
        self.failure = Some(failure);
        self.seen = None;
    }

    /// What the host's filters would ruin, each with its cure.
    pub fn warnings(&self) -> Vec<String> {
        let reflects = reflects();
        let findings = self.findings.iter().filter(|finding| finding.holds(reflects)).map(Finding::to_string);
        self.failure.iter().chain(&self.legacy).cloned().chain(findings).collect()
    }
}

fn log_new<'a>(warnings: impl Iterator<Item = &'a String>) {
    warnings.for_each(|warning| log::warn!("{warning}"));
}

/// Whether what the kernel answers carries the mark of what it answers to.
fn reflects() -> bool {
    fs::read_to_string(FWMARK_REFLECT).is_ok_and(|value| value.trim() != "0")
}

/// In one transaction, whatever there was of it before. Before the defragmentation of connection
/// tracking (priority -400): what is not tracked is not put together either.
fn install(mark: u32) -> Result<()> {
    let rule = format!(
        "meta mark & {mark:#x} == {mark:#x} notrack comment \"forwarderd: its packets in the stack\""
    );
    nft(
        &["-f", "-"],
        &format!(
            "add table {TABLE}\ndelete table {TABLE}\ntable {TABLE} {{\n\
             chain prerouting {{ type filter hook prerouting priority -450; policy accept; {rule}; }}\n\
             chain output {{ type filter hook output priority -450; policy accept; {rule}; }}\n}}\n"
        ),
    )
    .map(drop)
}

/// Takes the table off. Returns whether it was there.
pub fn remove() -> Result<bool> {
    if generation::read().is_err() {
        return Ok(false);
    }
    let was_there = nft(&["list", "table", "inet", "forwarder"], "").is_ok();
    if was_there {
        nft(&["-f", "-"], &format!("delete table {TABLE}\n"))?;
    }
    Ok(was_there)
}

/// All tables, without the elements of sets.
fn list() -> Result<Value> {
    let text = nft(&["--json", "--terse", "list", "ruleset"], "")?;
    serde_json::from_str(&text).context("nft writes no JSON")
}

fn nft(arguments: &[&str], input: &str) -> Result<String> {
    run("nft", arguments, input).map_err(|error| match error.downcast_ref::<io::Error>() {
        Some(cause) if cause.kind() == io::ErrorKind::NotFound => {
            anyhow!("nft is not installed: apt-get install nftables")
        }
        _ => error,
    })
}

/// Runs a program to its end, and returns what it has written.
fn run(program: &str, arguments: &[&str], input: &str) -> Result<String> {
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    if let Some(mut stdin) = child.stdin.take() {
        // A program that does not read it says why.
        let _ = stdin.write_all(input.as_bytes());
    }
    let output = child.wait_with_output()?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("{program}: {}", said.lines().next().unwrap_or("it failed").trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
