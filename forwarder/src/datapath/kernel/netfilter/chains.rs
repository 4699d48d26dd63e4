//! Other people's nftables chains, walked through as one of our packets would.
//!
//! What a rule asks for that is not known of such a packet (addresses, ports) counts as not met: a chain
//! that is named here drops unless one of those rules happens to accept.

use std::fmt;

use anyhow::{Context as _, Result};
use serde_json::Value;

/// All tables, as `nft --json list ruleset` writes them.
pub struct Ruleset(Vec<Value>);

/// One of our packets, at one of the host's hooks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Traveller<'a> {
    enters: Option<&'a str>,
    leaves: Option<&'a str>,
    /// As connection tracking sees it.
    state: &'static str,
    mark: u32,
    /// Our mark, whether it carries it or not.
    ours: u32,
    /// The router's own ICMP error.
    is_error: bool,
}

/// What becomes of a packet in a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Accepted,
    Dropped,
    /// The chain has nothing to say; a base chain has its policy.
    Falls,
}

/// A chain that drops our packets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    chain: String,
    what: String,
    cure: String,
    /// It does not where the router's answers carry the mark (`net.ipv4.fwmark_reflect`).
    unless_reflected: bool,
}

impl Finding {
    /// Whether it is so, given whether the router's answers carry the mark.
    pub fn holds(&self, reflects: bool) -> bool {
        !(self.unless_reflected && reflects)
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} drops {}: {}", self.chain, self.what, self.cure)
    }
}

/// How many chains may call each other: as many as the kernel allows.
const DEPTH: u32 = 16;

impl Ruleset {
    pub fn parse(listing: &Value) -> Result<Self> {
        let objects = listing["nftables"].as_array().context("nft lists no tables")?;
        Ok(Self(objects.clone()))
    }

    /// What belongs to a table, but for the numbers that each installation changes.
    pub fn of_table(&self, table: &str) -> Vec<Value> {
        let belongs =
            |object: &&Value| ["chain", "rule"].iter().any(|kind| name_of(&object[kind], "table") == table);
        let mut objects: Vec<Value> = self.0.iter().filter(belongs).cloned().collect();
        for inside in objects.iter_mut().filter_map(Value::as_object_mut).flat_map(|it| it.values_mut()) {
            inside.as_object_mut().map(|inside| inside.remove("handle"));
        }
        objects
    }

    /// The chains that drop what goes through the stack for a mapping.
    pub fn find(&self, mark: u32, external: &[String], internal: &[String]) -> Vec<Finding> {
        let chains = self.0.iter().map(|object| &object["chain"]).filter(|chain| chain["hook"].is_string());
        let ours = chains.filter(|chain| ["ip", "inet"].contains(&text(&chain["family"])));
        ours.filter_map(|chain| self.find_in(chain, &ways(text(&chain["hook"]), mark, external, internal)))
            .collect()
    }

    fn find_in(&self, chain: &Value, ways: &[Traveller<'_>]) -> Option<Finding> {
        let lost = ways.iter().find(|way| self.drops(chain, way))?;
        let (reflect, accept) = ("sysctl -w net.ipv4.fwmark_reflect=1", accept(chain, lost.ours));
        let reflected = Traveller { state: "untracked", mark: lost.ours, ..*lost };
        let mended = lost.is_error && !self.drops(chain, &reflected);
        let cure = match (lost.is_error, mended) {
            (false, _) => accept,
            (true, true) => reflect.to_owned(),
            (true, false) => format!("{reflect} && {accept}"),
        };
        Some(Finding { chain: shown(chain), what: lost.to_string(), cure, unless_reflected: mended })
    }

    fn drops(&self, chain: &Value, packet: &Traveller<'_>) -> bool {
        match self.walk(&name_of(chain, "table"), text(&chain["name"]), packet, DEPTH) {
            End::Accepted => false,
            End::Dropped => true,
            End::Falls => text(&chain["policy"]) == "drop",
        }
    }

    fn walk(&self, table: &str, chain: &str, packet: &Traveller<'_>, depth: u32) -> End {
        let rules = self.0.iter().map(|object| &object["rule"]);
        let mut rules = rules.filter(|rule| text(&rule["chain"]) == chain && name_of(rule, "table") == table);
        let end = rules.find_map(|rule| {
            let verdict = rule["expr"].as_array().and_then(|statements| verdict(statements, packet))?;
            self.follow(table, &verdict, packet, depth)
        });
        end.unwrap_or(End::Falls)
    }

    /// What a rule's verdict leads to; nothing where the next rule has its say.
    fn follow(&self, table: &str, verdict: &Value, packet: &Traveller<'_>, depth: u32) -> Option<End> {
        let (kind, inside) = verdict.as_object()?.iter().next()?;
        match (kind.as_str(), depth) {
            ("accept", _) => Some(End::Accepted),
            ("drop" | "reject", _) => Some(End::Dropped),
            ("return", _) => Some(End::Falls),
            ("xt", _) if ["REJECT", "DROP"].contains(&text(&inside["name"])) => Some(End::Dropped),
            ("jump" | "goto", 1..) => {
                let end = self.walk(table, text(&inside["target"]), packet, depth - 1);
                (end != End::Falls || kind == "goto").then_some(end)
            }
            _ => None,
        }
    }
}

/// Each way through a hook. Of what is not tracked, so are the router's errors about it: unless they carry
/// its mark, they are invalid.
fn ways<'a>(hook: &str, mark: u32, external: &'a [String], internal: &'a [String]) -> Vec<Traveller<'a>> {
    let packet =
        Traveller { enters: None, leaves: None, state: "untracked", mark, ours: mark, is_error: false };
    let ends = || external.iter().chain(internal).map(|name| Some(name.as_str()));
    let marked = || ends().map(|leaves| Traveller { leaves, ..packet });
    let errors = || marked().map(|packet| Traveller { state: "invalid", mark: 0, is_error: true, ..packet });
    match hook {
        "prerouting" => ends().map(|enters| Traveller { enters, ..packet }).collect(),
        "output" => errors().collect(),
        "postrouting" => marked().chain(errors()).collect(),
        "forward" => {
            let pairs =
                external.iter().flat_map(|outside| internal.iter().map(move |inside| (outside, inside)));
            let both = pairs.flat_map(|(outside, inside)| [(outside, inside), (inside, outside)]);
            both.map(|(enters, leaves)| Traveller { enters: Some(enters), leaves: Some(leaves), ..packet })
                .collect()
        }
        _ => Vec::new(),
    }
}

impl fmt::Display for Traveller<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.enters, self.leaves) {
            _ if self.is_error => {
                write!(f, "what the router tells of mapped packets (TTL exceeded, too long)")
            }
            (Some(enters), None) => {
                write!(f, "what the router has to fragment or to answer and enters by {enters}")
            }
            (Some(enters), Some(leaves)) => {
                write!(f, "what has to be fragmented between {enters} and {leaves}")
            }
            (_, leaves) => write!(f, "what has to be fragmented and leaves by {}", leaves.unwrap_or("it")),
        }
    }
}

/// The verdict of a rule that our packet is known to meet.
fn verdict(statements: &[Value], packet: &Traveller<'_>) -> Option<Value> {
    for statement in statements {
        let (kind, inside) = statement.as_object()?.iter().next()?;
        match kind.as_str() {
            "match" if meets(inside, packet) == Some(true) => {}
            // They say nothing of which packets the rule is for.
            "counter" | "log" | "mangle" | "notrack" | "set" => {}
            "vmap" => return of_map(inside, packet),
            "accept" | "drop" | "reject" | "return" | "jump" | "goto" | "xt" => {
                return Some(statement.clone());
            }
            _ => return None,
        }
    }
    None
}

/// The verdict that a verdict map has for our packet.
fn of_map(map: &Value, packet: &Traveller<'_>) -> Option<Value> {
    let entries = map["data"]["set"].as_array()?;
    let fits = |entry: &&Value| is_one_of(&map["key"], &entry[0], packet) == Some(true);
    entries.iter().find(fits).map(|entry| entry[1].clone())
}

/// Whether our packet meets a match, as far as that is known.
fn meets(condition: &Value, packet: &Traveller<'_>) -> Option<bool> {
    let is_one = is_one_of(&condition["left"], &condition["right"], packet)?;
    match text(&condition["op"]) {
        "==" | "in" => Some(is_one),
        "!=" => Some(!is_one),
        _ => None,
    }
}

fn is_one_of(left: &Value, right: &Value, packet: &Traveller<'_>) -> Option<bool> {
    let several = right["set"].as_array().or_else(|| right.as_array());
    if let Some(several) = several {
        let each: Vec<Option<bool>> = several.iter().map(|one| is_one_of(left, one, packet)).collect();
        return if each.contains(&Some(true)) {
            Some(true)
        } else {
            each.into_iter().collect::<Option<Vec<_>>>().map(|_| false)
        };
    }
    if let Some(mask) = left["&"][1].as_u64().filter(|_| text(&left["&"][0]["meta"]["key"]) == "mark") {
        return Some(u64::from(packet.mark) & mask == right.as_u64()?);
    }
    match (text(&left["meta"]["key"]), text(&left["ct"]["key"]), text(&left["payload"]["field"])) {
        ("mark", ..) => Some(u64::from(packet.mark) == right.as_u64()?),
        ("iifname" | "iif", ..) => is_named(packet.enters?, right.as_str()?),
        ("oifname" | "oif", ..) => is_named(packet.leaves?, right.as_str()?),
        ("nfproto", ..) => Some(right == "ipv4"),
        ("l4proto", ..) | (.., "protocol") if packet.is_error => Some(right == "icmp"),
        (.., "type") if packet.is_error => {
            Some(["time-exceeded", "destination-unreachable"].contains(&right.as_str()?))
        }
        (_, "state", _) => Some(right == packet.state),
        _ => None,
    }
}

fn is_named(name: &str, pattern: &str) -> Option<bool> {
    if pattern.starts_with('@') {
        // A set, whose elements are not listed.
        return None;
    }
    Some(match pattern.strip_suffix('*') {
        Some(beginning) => name.starts_with(beginning),
        None => name == pattern,
    })
}

/// The command that accepts the mark in a chain, in the language that it was written in.
fn accept(chain: &Value, mark: u32) -> String {
    let (table, name) = (text(&chain["table"]), text(&chain["name"]));
    let by_iptables = chain["family"] == "ip" && name == text(&chain["hook"]).to_uppercase();
    if by_iptables {
        return format!("iptables -t {table} -I {name} -m mark --mark {mark:#x}/{mark:#x} -j ACCEPT");
    }
    format!("nft insert rule {} {name} meta mark and {mark:#x} == {mark:#x} accept", name_of(chain, "table"))
}

fn shown(chain: &Value) -> String {
    format!("chain {} of nftables table {}", text(&chain["name"]), name_of(chain, "table"))
}

/// A table's family and name, as commands have it.
fn name_of(object: &Value, table: &str) -> String {
    format!("{} {}", text(&object["family"]), text(&object[table]))
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::slice;

    use serde_json::json;

    use super::*;

    const MARK: u32 = 0x2000_0000;

    /// What is said of a base chain with these rules, and a chain `sub` beside it.
    fn said(family: &str, hook: &str, policy: &str, rules: &[Value], sub: &[Value]) -> Vec<String> {
        let name = if family == "ip" { hook.to_uppercase() } else { hook.to_owned() };
        let rule = |chain: &str, rule: &Value| json!({"rule": {"family": family, "table": "filter", "chain": chain, "expr": rule}});
        let mut objects = vec![
            json!({"metainfo": {"version": "1.0.6"}}),
            json!({"chain": {"family": family, "table": "filter", "name": "sub"}}),
            json!({"chain": {"family": family, "table": "filter", "name": name, "hook": hook, "policy": policy}}),
        ];
        objects.extend(rules.iter().map(|it| rule(&name, it)));
        objects.extend(sub.iter().map(|it| rule("sub", it)));
        let ruleset = Ruleset::parse(&json!({ "nftables": objects })).unwrap();
        let found = ruleset.find(MARK, &["wan".to_owned()], &["lan".to_owned()]);
        found.iter().map(|it| format!("{it}{}", if it.holds(true) { "" } else { " (mended)" })).collect()
    }

    fn of_forward(policy: &str, rules: &[Value]) -> bool {
        !said("inet", "forward", policy, rules, &[json!([{"drop": null}])]).is_empty()
    }

    fn is(key: &str, name: &str) -> Value {
        json!({"match": {"op": "==", "left": {"meta": {"key": key}}, "right": name}})
    }

    #[test]
    fn a_policy_of_drop_is_named_with_its_cure() {
        let said = said("inet", "forward", "drop", &[], &[]);
        assert_eq!(
            said,
            [
                "chain forward of nftables table inet filter drops what has to be fragmented between wan and lan: \
              nft insert rule inet filter forward meta mark and 0x20000000 == 0x20000000 accept"
            ]
        );
        assert!(!of_forward("accept", &[]));
    }

    #[test]
    fn what_accepts_our_packets_both_ways_is_not_named() {
        let marked = json!({"&": [{"meta": {"key": "mark"}}, MARK]});
        let by_mark = json!([{"match": {"op": "==", "left": marked, "right": MARK}}, {"counter": {}}, {"accept": null}]);
        assert!(!of_forward("drop", &[by_mark]));
        let out = json!([is("iifname", "lan"), is("oifname", "wan"), {"accept": null}]);
        let back = json!([is("iifname", "w*"), is("oifname", "lan"), {"accept": null}]);
        assert!(of_forward("drop", slice::from_ref(&out)) && of_forward("drop", slice::from_ref(&back)));
        assert!(!of_forward("drop", &[out, back]));
    }

    #[test]
    fn what_is_not_known_of_our_packets_decides_nothing() {
        let port = json!({"match": {"op": "==", "left": {"payload": {"protocol": "tcp", "field": "dport"}}, "right": 22}});
        let set = is("iifname", "@inside");
        for condition in
            [port, set, json!({"xt": {"type": "match", "name": "conntrack"}}), json!({"limit": {"rate": 1}})]
        {
            assert!(!of_forward("accept", &[json!([condition, {"drop": null}])]), "{condition}");
            assert!(of_forward("drop", &[json!([condition, {"accept": null}])]), "{condition}");
        }
    }

    #[test]
    fn our_packets_are_not_invalid_because_they_are_not_tracked() {
        let state = |op: &str, right: Value| json!({"match": {"op": op, "left": {"ct": {"key": "state"}}, "right": right}});
        let invalid = json!([state("in", json!("invalid")), {"drop": null}]);
        assert!(!of_forward("accept", &[invalid]));
        let known = json!([state("in", json!(["established", "related"])), {"accept": null}]);
        assert!(of_forward("drop", &[known]));
        let untracked = json!([state("==", json!({"set": ["new", "untracked"]})), {"accept": null}]);
        assert!(!of_forward("drop", &[untracked]));
        let map = json!([{"vmap": {"key": {"ct": {"key": "state"}}, "data": {"set": [["invalid", {"drop": null}], ["untracked", {"accept": null}]]}}}]);
        assert!(!of_forward("drop", &[map]));
    }

    #[test]
    fn chains_that_call_others_are_followed_and_a_circle_ends() {
        for kind in ["jump", "goto"] {
            let jump = json!([{kind: {"target": "sub"}}]);
            assert!(of_forward("accept", slice::from_ref(&jump)));
            assert_eq!(
                said("inet", "forward", "accept", slice::from_ref(&jump), slice::from_ref(&jump)),
                [""; 0]
            );
        }
        assert!(!of_forward("accept", &[json!([{"return": null}]), json!([{"reject": null}])]));
    }

    #[test]
    fn chains_of_iptables_get_a_cure_of_iptables() {
        let said = said(
            "ip",
            "forward",
            "accept",
            &[json!([{"counter": {}}, {"xt": {"type": "target", "name": "REJECT"}}])],
            &[],
        );
        assert!(
            said[0]
                .ends_with(": iptables -t filter -I FORWARD -m mark --mark 0x20000000/0x20000000 -j ACCEPT"),
            "{said:?}"
        );
    }

    #[test]
    fn the_routers_own_errors_are_invalid_unless_they_carry_the_mark() {
        let invalid = json!([{"match": {"op": "in", "left": {"ct": {"key": "state"}}, "right": "invalid"}}, {"drop": null}]);
        let mended = said("inet", "output", "accept", slice::from_ref(&invalid), &[]);
        assert!(mended[0].ends_with("sysctl -w net.ipv4.fwmark_reflect=1 (mended)"), "{mended:?}");
        let both = said("inet", "output", "drop", &[invalid], &[]);
        assert!(
            both[0].contains("fwmark_reflect=1 && nft insert rule") && !both[0].contains("(mended)"),
            "{both:?}"
        );
        let errors = json!([{"match": {"op": "==", "left": {"payload": {"protocol": "ip", "field": "protocol"}}, "right": "icmp"}}, {"accept": null}]);
        assert_eq!(said("inet", "output", "drop", &[errors], &[]), [""; 0]);
    }

    #[test]
    fn other_families_and_hooks_are_none_of_our_business() {
        for (family, hook) in
            [("ip6", "forward"), ("bridge", "forward"), ("netdev", "ingress"), ("inet", "input")]
        {
            assert_eq!(said(family, hook, "drop", &[], &[]), [""; 0]);
        }
        for hook in ["prerouting", "postrouting"] {
            assert_eq!(said("inet", hook, "drop", &[], &[]).len(), 1, "{hook}");
        }
    }

    #[test]
    fn our_table_is_known_again_whatever_its_numbers() {
        let listing = |handle: u32, table: &str| {
            Ruleset::parse(&json!({"nftables": [
                {"table": {"family": "inet", "name": table, "handle": handle}},
                {"rule": {"family": "inet", "table": table, "chain": "output", "handle": handle, "expr": []}},
            ]}))
            .unwrap()
        };
        let own = listing(1, "forwarder").of_table("inet forwarder");
        assert_eq!(own.len(), 1);
        assert_eq!(listing(2, "forwarder").of_table("inet forwarder"), own);
        assert!(listing(1, "filter").of_table("inet forwarder").is_empty());
        assert!(Ruleset::parse(&json!({})).is_err());
    }
}
