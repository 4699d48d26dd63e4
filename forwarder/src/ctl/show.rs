//! Answers of the controller as text.

use std::time::Duration;

use comfy_table::Color;
use jiff::Timestamp;

use super::human;
use super::table::{Field, Kind, Terminal, render};
use crate::controller::{FlowView, Stats, Status};
use crate::rule::{AllowList, Limits, RuleView, State};

const TEXT: Kind = Kind::Text;
const WORD: Kind = Kind::Word;
const NUMBER: Kind = Kind::Number;
const SPARE: Kind = Kind::Spare;
const SPARE_WORD: Kind = Kind::SpareWord;

/// One line about a rule that was changed.
pub fn line(rule: &RuleView, verb: &str) -> String {
    let name = rule.name.as_ref().map(|name| format!(" ({name})")).unwrap_or_default();
    let end = rule.expires_at.map(|end| format!(", until {end}")).unwrap_or_default();
    let reason = rule.state_reason.as_ref().map(|reason| format!(": {reason}")).unwrap_or_default();
    let allow = if rule.allow.is_empty() { String::new() } else { format!(", for {}", allowed(&rule.allow)) };
    format!(
        "rule {}{name} {verb}: {} {} to {}{allow}{end} [{}{reason}]\n",
        rule.id, rule.protocol, rule.external, rule.target, rule.state
    )
}

/// One line about a rule that is no more.
pub fn deleted(rule: &RuleView) -> String {
    let name = rule.name.as_ref().map(|name| format!(" ({name})")).unwrap_or_default();
    format!("rule {}{name} deleted: {} {} to {}\n", rule.id, rule.protocol, rule.external, rule.target)
}

/// The table of rules.
pub fn list(rules: &[RuleView], now: Timestamp, terminal: Terminal) -> String {
    if rules.is_empty() {
        return "no rules: add one as `forwarderctl add tcp wan:8080 10.0.0.10:80`\n".to_owned();
    }
    let header = [
        ("ID", NUMBER),
        ("NAME", WORD),
        ("PROTO", WORD),
        ("EXTERNAL", WORD),
        ("TARGET", WORD),
        ("ALLOW", SPARE_WORD),
        ("STATE", WORD),
        ("EXPIRES", WORD),
        ("PKTS IN", SPARE),
        ("PKTS OUT", SPARE),
        ("SESS", SPARE),
        ("DROPS", SPARE),
    ];
    let row = |rule: &RuleView| {
        let counters = &rule.counters;
        vec![
            rule.id.into(),
            rule.name.as_deref().unwrap_or("-").into(),
            rule.protocol.into(),
            external(rule).into(),
            rule.target.into(),
            allowed(&rule.allow).into(),
            marked(rule),
            human::end(rule.expires_at, now).into(),
            counters.packets_in.into(),
            counters.packets_out.into(),
            counters.sessions_active.into(),
            counters.dropped.values().sum::<u64>().into(),
        ]
    };
    let table = render(&header, rules.iter().map(row).collect(), terminal);
    match rules.iter().any(|rule| !rule.warnings.is_empty()) {
        true => table + "(! may not work as things are: `forwarderctl show ID` says why)\n",
        false => table,
    }
}

pub fn rule(rule: &RuleView, now: Timestamp, terminal: Terminal) -> String {
    let or_none = |text: &Option<String>| text.clone().unwrap_or_else(|| "-".to_owned());
    let counters = &rule.counters;
    let mut facts: Vec<(&str, Field)> = vec![
        ("id", rule.id.into()),
        ("name", or_none(&rule.name).into()),
        ("protocol", rule.protocol.into()),
        ("external", external(rule).into()),
        ("target", rule.target.into()),
        ("state", state(rule.state)),
    ];
    if let Some(reason) = &rule.state_reason {
        facts.push(("waits because", reason.into()));
    }
    let end = rule.expires_at.map(|end| format!(" ({end})")).unwrap_or_default();
    facts.extend([
        ("expires", Field::from(human::end(rule.expires_at, now) + &end)),
        ("allow", (&rule.allow).into()),
        ("limits", limits(&rule.limits, counters.sessions_active).into()),
        ("hairpin", if rule.hairpin { "yes" } else { "no" }.into()),
        ("via", format!("{:?}", rule.via).to_lowercase().into()),
        ("owner", or_none(&rule.owner).into()),
        ("purpose", or_none(&rule.purpose).into()),
        ("review by", rule.review_by.map_or("-".to_owned(), |date| date.to_string()).into()),
        ("created", format!("{} by {}", rule.created_at, rule.created_by).into()),
        ("changed", rule.changed_at.into()),
        ("in", carried(counters.packets_in, counters.bytes_in).into()),
        ("out", carried(counters.packets_out, counters.bytes_out).into()),
        ("sessions", format!("{} now, {} in all", counters.sessions_active, counters.sessions_total).into()),
    ]);
    let dropped =
        counters.dropped.iter().map(|(reason, count)| ("dropped", format!("{count} {reason}").into()));
    let warnings = rule.warnings.iter().map(|warning| ("warning", warning.into()));
    let rows = facts.into_iter().chain(dropped).chain(warnings).map(|(key, value)| vec![key.into(), value]);
    render(&[("", WORD), ("", TEXT)], rows.collect(), terminal)
}

pub fn flows(flows: &[FlowView], terminal: Terminal) -> String {
    if flows.is_empty() {
        return "no sessions\n".to_owned();
    }
    let header = [
        ("RULE", WORD),
        ("PROTO", WORD),
        ("CLIENT", WORD),
        ("EXTERNAL", WORD),
        ("TARGET", WORD),
        ("STATE", WORD),
        ("AGE", SPARE),
        ("IDLE", SPARE),
        ("BYTES IN", SPARE),
        ("BYTES OUT", SPARE),
    ];
    let row = |flow: &FlowView| {
        vec![
            flow.rule_name.clone().unwrap_or_else(|| flow.rule.to_string()).into(),
            (&flow.protocol).into(),
            flow.client.into(),
            flow.external.into(),
            flow.target.into(),
            (&flow.state).into(),
            human::duration(Duration::from_secs(flow.age_seconds)).into(),
            human::duration(Duration::from_secs(flow.idle_seconds)).into(),
            human::bytes(flow.bytes_in).into(),
            human::bytes(flow.bytes_out).into(),
        ]
    };
    render(&header, flows.iter().map(row).collect(), terminal)
}

pub fn stats(stats: &Stats, terminal: Terminal) -> String {
    let header = [
        ("RULE", WORD),
        ("PROTO", WORD),
        ("EXTERNAL", WORD),
        ("PKTS IN", SPARE),
        ("BYTES IN", SPARE),
        ("PKTS OUT", SPARE),
        ("BYTES OUT", SPARE),
        ("SESSIONS", SPARE),
        ("DROPPED", TEXT),
    ];
    let rows = stats.rules.iter().map(|rule| {
        let counters = &rule.counters;
        let dropped: Vec<String> =
            counters.dropped.iter().map(|(reason, count)| format!("{reason} {count}")).collect();
        vec![
            rule.name.clone().unwrap_or_else(|| rule.id.to_string()).into(),
            rule.protocol.into(),
            (&rule.external).into(),
            counters.packets_in.into(),
            human::bytes(counters.bytes_in).into(),
            counters.packets_out.into(),
            human::bytes(counters.bytes_out).into(),
            counters.sessions_total.into(),
            dropped.join(", ").into(),
        ]
    });
    let by_rule = if stats.rules.is_empty() {
        "no rules\n".to_owned()
    } else {
        render(&header, rows.collect(), terminal)
    };
    if stats.reasons.is_empty() {
        return format!("{by_rule}\nno packets\n");
    }
    let header =
        [("PATH", WORD), ("VERDICT", WORD), ("REASON", WORD), ("PACKETS", NUMBER), ("BYTES", NUMBER)];
    let rows = stats.reasons.iter().map(|reason| {
        vec![
            (&reason.path).into(),
            (&reason.verdict).into(),
            (&reason.reason).into(),
            reason.count.packets.into(),
            human::bytes(reason.count.bytes).into(),
        ]
    });
    format!("{by_rule}\n{}", render(&header, rows.collect(), terminal))
}

pub fn status(status: &Status, terminal: Terminal) -> String {
    let rules = &status.rules;
    let mut text = format!(
        "forwarderd {}, pid {}, up {}\nrules: {} active, {} waiting, {} disabled, {} draining\n",
        status.version,
        status.pid,
        human::duration(Duration::from_secs(status.uptime_seconds)),
        rules.active,
        rules.waiting,
        rules.disabled,
        rules.draining
    );
    let header = [("INTERFACE", WORD), ("SIDE", WORD), ("XDP", WORD), ("TC", WORD), ("WHY", TEXT)];
    let rows = status.interfaces.iter().map(|interface| {
        [&interface.name, &interface.side, &interface.xdp, &interface.tc, &interface.why]
            .map(Field::from)
            .into()
    });
    text += "\n";
    text += &render(&header, rows.collect(), terminal);
    let header = [("TABLE", TEXT), ("IN USE", NUMBER), ("CAPACITY", NUMBER)];
    let rows = status
        .tables
        .iter()
        .map(|table| vec![(&table.name).into(), table.entries.into(), table.capacity.into()]);
    text += "\n";
    text += &render(&header, rows.collect(), terminal);
    for warning in &status.warnings {
        text += &format!("\nwarning: {warning}\n");
    }
    text
}

/// A rule's state, marked where something keeps it from working.
fn marked(rule: &RuleView) -> Field {
    let mark = if rule.warnings.is_empty() { "" } else { " !" };
    Field::coloured(format!("{}{mark}", rule.state), colour(rule.state))
}

fn state(state: State) -> Field {
    Field::coloured(state, colour(state))
}

fn colour(state: State) -> Color {
    match state {
        State::Active => Color::Green,
        State::Waiting => Color::Yellow,
        State::Disabled => Color::DarkGrey,
        State::Draining => Color::Cyan,
    }
}

/// Whom a rule lets in, short enough for a column.
fn allowed(allow: &AllowList) -> String {
    match allow.networks() {
        [] => "any".to_owned(),
        [network] => network.to_string(),
        [first, more @ ..] => format!("{first} +{}", more.len()),
    }
}

fn carried(packets: u64, bytes: u64) -> String {
    format!("{packets} packet{}, {}", if packets == 1 { "" } else { "s" }, human::bytes(bytes))
}

/// Where a rule is reached; of a DMZ host, at what others leave.
fn external(rule: &RuleView) -> String {
    format!("{}{}", rule.external, if rule.dmz { " (DMZ)" } else { "" })
}

/// A rule's limits, and how much of them is in use.
fn limits(limits: &Limits, sessions: u64) -> String {
    let named = [
        (format!("sessions ({sessions} in use)"), limits.max_sessions),
        ("sessions a source".to_owned(), limits.max_sessions_per_source),
        ("new a second".to_owned(), limits.new_per_second),
    ];
    let set: Vec<String> =
        named.iter().filter_map(|(name, limit)| limit.map(|limit| format!("{limit} {name}"))).collect();
    if set.is_empty() { "none".to_owned() } else { set.join(", ") }
}
