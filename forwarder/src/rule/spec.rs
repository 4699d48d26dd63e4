//! What a user asks of a rule, and whether it can be had.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use jiff::civil::Date;
use serde::{Deserialize, Deserializer, Serialize};

use super::invalid::{Invalid, quoted, refuse};
use super::{AllowList, External, Family, Lifetime, Place, PortRange, Protocol, Target, text};

/// Which way the packets of a rule take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Via {
    /// Through the forwarder's own path.
    #[default]
    Fast,
    /// Through the host's routing and firewall.
    Stack,
}

/// How much a rule may carry; absent: no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_sessions: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_sessions_per_source: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub new_per_second: Option<u64>,
}

/// What a request says about limits: what is not said stays as it was, `null` takes a limit away.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LimitsRequest {
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "limit_or_null")]
    pub max_sessions: Option<Option<u64>>,
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "limit_or_null")]
    pub max_sessions_per_source: Option<Option<u64>>,
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "limit_or_null")]
    pub new_per_second: Option<Option<u64>>,
}

impl LimitsRequest {
    fn apply(&self, limits: &Limits) -> Limits {
        Limits {
            max_sessions: self.max_sessions.unwrap_or(limits.max_sessions),
            max_sessions_per_source: self.max_sessions_per_source.unwrap_or(limits.max_sessions_per_source),
            new_per_second: self.new_per_second.unwrap_or(limits.new_per_second),
        }
    }
}

impl Limits {
    /// As many as a table could ever hold; a packet path that had to give out more turns a second than
    /// this could not keep count.
    const MOST: u64 = 1_000_000_000;
    const MOST_PER_SECOND: u64 = 1_000_000;

    fn check(&self) -> Result<(), Invalid> {
        for (name, limit, most) in [
            ("max-sessions", self.max_sessions, Self::MOST),
            ("max-sessions-per-source", self.max_sessions_per_source, Self::MOST),
            ("new-per-second", self.new_per_second, Self::MOST_PER_SECOND),
        ] {
            match limit {
                Some(0) => refuse!("{name} 0 would let nobody in: write 1 to {most}, or none"),
                Some(limit) if limit > most => {
                    refuse!("{name} {limit} is too large: write 1 to {most}, or none")
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// Everything about a rule that its user decides, apart from its end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Spec {
    pub name: Option<String>,
    pub protocol: Protocol,
    pub external: External,
    pub target: Target,
    pub allow: AllowList,
    pub limits: Limits,
    pub hairpin: bool,
    /// All ports of its external address that nobody else has go to the target.
    #[serde(default, skip_serializing_if = "is_false")]
    pub dmz: bool,
    pub via: Via,
    pub enabled: bool,
    pub owner: Option<String>,
    pub purpose: Option<String>,
    pub review_by: Option<Date>,
}

/// What a request says about a rule: the body of `POST /v1/rules` and of `PATCH /v1/rules/{id}`.
///
/// Adding needs `protocol`, `external` and `target`. Everything that is not said keeps its
/// value, also that of a rule that is replaced, or its default where the rule is new. An empty
/// text, or `null`, takes a text away; nothing else may be `null`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Request {
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "text_or_null")]
    pub name: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "not_null")]
    pub protocol: Option<Protocol>,
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "not_null")]
    pub external: Option<External>,
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "not_null")]
    pub target: Option<Target>,
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "not_null")]
    pub allow: Option<AllowList>,
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "not_null")]
    pub limits: Option<LimitsRequest>,
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "not_null")]
    pub hairpin: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "not_null")]
    pub via: Option<Via>,
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "not_null")]
    pub enabled: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "text_or_null")]
    pub owner: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "text_or_null")]
    pub purpose: Option<String>,
    /// `2026-12-31`
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "text_or_null")]
    pub review_by: Option<String>,
    /// `90s`, `10m`, `12h`, `30d`, or `never`.
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "not_null")]
    pub lifetime: Option<Lifetime>,
    /// When adding: makes the target a DMZ host, which has all ports that nobody else takes.
    #[serde(skip_serializing_if = "is_false")]
    pub dmz: bool,
    /// Takes a port although a service of the router listens on it.
    #[serde(skip_serializing_if = "is_false")]
    pub force: bool,
    /// When adding: takes the place of the one rule that it would collide with.
    #[serde(skip_serializing_if = "is_false")]
    pub replace: bool,
    /// When changing: ends all the rule's flows.
    #[serde(skip_serializing_if = "is_false")]
    pub cut: bool,
}

/// Rules are shown with `null` for a text that they do not have.
fn text_or_null<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    Option::<String>::deserialize(deserializer).map(|text| Some(text.unwrap_or_default()))
}

fn limit_or_null<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Option<u64>>, D::Error> {
    Option::deserialize(deserializer).map(Some)
}

/// A `null` must not pass for "as it was".
fn not_null<'de, D: Deserializer<'de>, T: Deserialize<'de>>(deserializer: D) -> Result<Option<T>, D::Error> {
    T::deserialize(deserializer).map(Some)
}

fn is_false(flag: &bool) -> bool {
    !flag
}

impl Request {
    /// The rule that this asks to add.
    pub fn new_spec(&self) -> Result<Spec, Invalid> {
        let (protocol, external, target) = self.mapping()?;
        let bare = Spec {
            name: None,
            protocol,
            external,
            target,
            allow: AllowList::default(),
            limits: Limits::default(),
            hairpin: true,
            dmz: self.dmz,
            via: Via::default(),
            enabled: true,
            owner: None,
            purpose: None,
            review_by: None,
        };
        self.apply(&bare)
    }

    /// The rule that this asks to put in the place of `old`. What it does not say stays: above
    /// all nobody gets in whom the old rule kept out.
    pub fn spec_in_place_of(&self, old: &Spec) -> Result<Spec, Invalid> {
        let (protocol, external, target) = self.mapping()?;
        self.apply(&Spec { protocol, external, target, dmz: self.dmz, ..old.clone() })
    }

    fn mapping(&self) -> Result<(Protocol, External, Target), Invalid> {
        let (Some(protocol), Some(external), Some(target)) =
            (self.protocol, self.external.clone(), self.target)
        else {
            refuse!("protocol, external and target are needed, as \"tcp\", \"wan:8080\", \"10.0.0.10:80\"");
        };
        if self.cut {
            refuse!("cut belongs to a change of a rule: leave it out when adding");
        }
        Ok((protocol, external, target))
    }

    /// What `spec` becomes by this change.
    pub fn changed_spec(&self, spec: &Spec) -> Result<Spec, Invalid> {
        if self.protocol.is_some() || self.external.is_some() {
            refuse!("protocol and external of a rule stay: delete it and add another");
        }
        if self.dmz && !spec.dmz {
            refuse!("dmz belongs to adding a rule: delete this one and add another");
        }
        if self.replace {
            refuse!("replace belongs to adding a rule: leave it out of a change");
        }
        let changed = self.apply(spec)?;
        if changed.family() != spec.family() {
            let (old, target) = (spec.family(), changed.target);
            refuse!("the rule is one of {old} and target {target} is not: add another rule for it");
        }
        Ok(changed)
    }

    fn apply(&self, spec: &Spec) -> Result<Spec, Invalid> {
        let text = |asked: &Option<String>, kept: &Option<String>| match asked {
            Some(text) if text.is_empty() => None,
            Some(text) => Some(text.clone()),
            None => kept.clone(),
        };
        let changed = Spec {
            name: text(&self.name, &spec.name),
            protocol: spec.protocol,
            external: spec.external.clone(),
            target: self.target.unwrap_or(spec.target),
            allow: self.allow.clone().unwrap_or_else(|| spec.allow.clone()),
            limits: self.limits.unwrap_or_default().apply(&spec.limits),
            // Via the stack there is none, unless somebody insists, which is refused.
            hairpin: self.hairpin.unwrap_or(spec.hairpin && self.via.unwrap_or(spec.via) != Via::Stack),
            dmz: spec.dmz,
            via: self.via.unwrap_or(spec.via),
            enabled: self.enabled.unwrap_or(spec.enabled),
            owner: text(&self.owner, &spec.owner),
            purpose: text(&self.purpose, &spec.purpose),
            review_by: match self.review_by.as_deref() {
                Some("") => None,
                Some(date) => Some(parse_date(date)?),
                None => spec.review_by,
            },
        };
        changed.check()?;
        Ok(changed)
    }
}

/// Reads a day as `2026-12-31`.
pub fn parse_date(text: &str) -> Result<Date, Invalid> {
    // jiff takes more forms, a time of day among them; one is enough here.
    match text.parse::<Date>() {
        Ok(date) if date.to_string() == text => Ok(date),
        _ => refuse!("review date {} is not a day: write it as 2026-12-31", quoted(text)),
    }
}

impl Spec {
    pub fn family(&self) -> Family {
        Family::of(self.target.address)
    }

    /// Refuses what can be known to be wrong from the rule alone.
    pub fn check(&self) -> Result<(), Invalid> {
        self.name.as_deref().map_or(Ok(()), text::check_name)?;
        self.owner.as_deref().map_or(Ok(()), text::check_owner)?;
        self.purpose.as_deref().map_or(Ok(()), text::check_purpose)?;
        self.check_families()?;
        if let Place::Address(address) = self.external.place {
            check_unicast("external", address)?;
            if address == self.target.address {
                refuse!(
                    "target {address} is the external address itself: give the address of a host behind it"
                );
            }
        }
        check_unicast("target", self.target.address)?;
        let (outside, inside) = (self.external.ports.count(), self.target.ports.count());
        if inside != 1 && inside != outside {
            refuse!(
                "external has {outside} port(s) and target {inside}: make the ranges equally long, or give one target port"
            );
        }
        self.check_dmz()?;
        self.check_allow()?;
        self.limits.check()?;
        self.check_hairpin()
    }

    fn check_dmz(&self) -> Result<(), Invalid> {
        let external = External { ports: PortRange::ALL, ..self.external.clone() };
        let target = Target { ports: PortRange::ALL, ..self.target };
        if self.dmz && (&self.external, self.target) != (&external, target) {
            refuse!("a DMZ host has all ports: write {external} {target}");
        }
        Ok(())
    }

    /// A list without a network of the rule's family would let nobody in.
    fn check_allow(&self) -> Result<(), Invalid> {
        let networks = self.allow.networks();
        let family = self.family();
        if !networks.is_empty() && !networks.iter().any(|network| family.has(network.addr())) {
            let example = if family == Family::Ipv4 { "0.0.0.0/0" } else { "::/0" };
            refuse!(
                "the allow list has no {family} network, so nobody could use this rule: add one, as {example}, or write any"
            );
        }
        Ok(())
    }

    fn check_families(&self) -> Result<(), Invalid> {
        let target = self.target.address;
        match self.external.place {
            Place::Address(external) if !self.family().has(external) => {
                let (outside, inside) = (Family::of(external), self.family());
                refuse!(
                    "external {external} is {outside} and target {target} is {inside}: give both of one family"
                )
            }
            _ => Ok(()),
        }
    }

    /// The host's stack takes no packet from its own address, which hairpin needs.
    fn check_hairpin(&self) -> Result<(), Invalid> {
        if self.via == Via::Stack && self.hairpin {
            refuse!("via stack has no hairpin: leave hairpin out, or write via fast");
        }
        Ok(())
    }
}

fn check_unicast(what: &str, address: IpAddr) -> Result<(), Invalid> {
    if let IpAddr::V6(v6) = address {
        check_ipv6(what, v6)?;
    }
    let kind = match address {
        _ if address.is_loopback() => "a loopback",
        _ if address.is_multicast() => "a multicast",
        _ if address.is_unspecified() => "the unspecified",
        IpAddr::V4(Ipv4Addr::BROADCAST) => "the broadcast",
        IpAddr::V4(v4) if v4.octets()[0] == 0 || v4.octets()[0] >= 240 => "a reserved",
        _ => return Ok(()),
    };
    refuse!("{what} {address} is {kind} address: give the address of one host")
}

fn check_ipv6(what: &str, address: Ipv6Addr) -> Result<(), Invalid> {
    if let Some(ipv4) = address.to_ipv4_mapped() {
        refuse!("{what} {address} is an IPv4 address in the notation of IPv6: write it as {ipv4}");
    }
    if address.is_unicast_link_local() {
        refuse!(
            "{what} {address} is a link-local address, which is of one link only: give a global or unique local one"
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(external: &str, target: &str) -> Request {
        Request {
            protocol: Some(Protocol::Tcp),
            external: Some(external.parse().unwrap()),
            target: Some(target.parse().unwrap()),
            ..Request::default()
        }
    }

    fn refusal(external: &str, target: &str) -> String {
        request(external, target).new_spec().unwrap_err().to_string()
    }

    #[test]
    fn a_plain_rule_has_the_defaults() {
        let spec = request("wan:8080", "10.0.0.10:80").new_spec().unwrap();
        assert!(spec.hairpin && spec.enabled && spec.allow.is_empty() && spec.via == Via::Fast);
    }

    #[test]
    fn ranges_are_equally_long_or_lead_to_one_port() {
        assert!(request("wan:100-199", "10.0.0.10:300-399").new_spec().is_ok());
        assert!(request("wan:100-199", "10.0.0.10:300").new_spec().is_ok());
        assert!(refusal("wan:100-199", "10.0.0.10:300-398").contains("100 port(s) and target 99"));
        assert!(refusal("wan:100", "10.0.0.10:300-301").contains("equally long"));
    }

    #[test]
    fn addresses_that_are_no_single_host_are_refused() {
        for bad in ["127.0.0.1", "224.0.0.1", "0.0.0.0", "0.1.2.3", "255.255.255.255", "240.0.0.1"] {
            assert!(refusal("203.0.113.10:80", &format!("{bad}:80")).starts_with("target"), "{bad}");
            assert!(refusal(&format!("{bad}:80"), "10.0.0.10:80").starts_with("external"), "{bad}");
        }
    }

    #[test]
    fn a_target_that_is_the_external_address_is_refused() {
        assert!(refusal("203.0.113.10:80", "203.0.113.10:81").contains("external address itself"));
    }

    #[test]
    fn external_and_target_are_of_one_family() {
        assert!(refusal("203.0.113.10:80", "[2001:db8::1]:80").contains("one family"));
        assert!(refusal("[2001:db8::1]:80", "10.0.0.10:80").contains("one family"));
    }

    #[test]
    fn a_rule_has_the_family_of_its_target() {
        for (external, target, family) in [
            ("203.0.113.10:80", "10.0.0.10:80", Family::Ipv4),
            ("wan:80", "10.0.0.10:80", Family::Ipv4),
            ("[2001:db8::1]:80", "[fd00::10]:80", Family::Ipv6),
            ("wan:80", "[fd00::10]:80", Family::Ipv6),
        ] {
            assert_eq!(request(external, target).new_spec().unwrap().family(), family, "{external}");
        }
    }

    #[test]
    fn ipv6_addresses_that_are_no_single_host_are_refused() {
        for (bad, word) in [
            ("::", "unspecified"),
            ("::1", "loopback"),
            ("ff02::1", "multicast"),
            ("fe80::1", "link-local"),
            ("::ffff:192.0.2.1", "write it as 192.0.2.1"),
        ] {
            let target = refusal("[2001:db8::1]:80", &format!("[{bad}]:80"));
            assert!(target.starts_with("target") && target.contains(word), "{target}");
            let external = refusal(&format!("[{bad}]:80"), "[fd00::10]:80");
            assert!(external.starts_with("external") && external.contains(word), "{external}");
        }
    }

    #[test]
    fn a_change_keeps_the_family() {
        for (old, new) in [("10.0.0.10:80", "[fd00::10]:80"), ("[fd00::10]:80", "10.0.0.10:80")] {
            let spec = request("wan:80", old).new_spec().unwrap();
            let change = Request { target: Some(new.parse().unwrap()), ..Request::default() };
            let error = change.changed_spec(&spec).unwrap_err().to_string();
            assert!(error.contains("add another rule"), "{error}");
        }
    }

    #[test]
    fn via_the_stack_there_is_no_hairpin() {
        let hairpin = Request { hairpin: Some(false), ..request("wan:80", "10.0.0.10:80") };
        assert!(!hairpin.new_spec().unwrap().hairpin);
        let stack = Request { via: Some(Via::Stack), ..request("wan:80", "10.0.0.10:80") };
        assert!(!stack.new_spec().unwrap().hairpin);
        let both = Request { hairpin: Some(true), ..stack };
        assert!(both.new_spec().unwrap_err().to_string().contains("has no hairpin"));
        let fast = request("wan:80", "10.0.0.10:80").new_spec().unwrap();
        let moved = Request { via: Some(Via::Stack), ..Request::default() }.changed_spec(&fast).unwrap();
        assert!(!moved.hairpin && moved.via == Via::Stack);
    }

    #[test]
    fn a_limit_is_one_at_least_and_is_changed_by_itself() {
        let limited = |text: &str| Request {
            limits: Some(serde_json::from_str(text).unwrap()),
            ..request("wan:80", "10.0.0.10:80")
        };
        let spec = limited(r#"{"max_sessions": 5, "new_per_second": 1000000}"#).new_spec().unwrap();
        let change = |text: &str| {
            let limits = Some(serde_json::from_str(text).unwrap());
            Request { limits, ..Request::default() }.changed_spec(&spec).unwrap().limits
        };
        assert_eq!(change("{}"), spec.limits);
        assert_eq!(change(r#"{"max_sessions": 7}"#), Limits { max_sessions: Some(7), ..spec.limits });
        assert_eq!(change(r#"{"max_sessions": null}"#), Limits { max_sessions: None, ..spec.limits });
        for bad in [
            r#"{"max_sessions": 0}"#,
            r#"{"max_sessions_per_source": 0}"#,
            r#"{"new_per_second": 0}"#,
            r#"{"max_sessions": 1000000001}"#,
            r#"{"new_per_second": 1000001}"#,
        ] {
            let refusal = limited(bad).new_spec().unwrap_err().to_string();
            assert!(refusal.contains("write 1 to"), "{refusal}");
        }
    }

    #[test]
    fn an_allow_list_of_the_other_family_alone_is_refused() {
        let allowing = |networks: &[&str]| Request {
            allow: Some(AllowList::parse(networks.iter().copied()).unwrap()),
            ..request("wan:80", "10.0.0.10:80")
        };
        assert!(allowing(&["::/0"]).new_spec().unwrap_err().to_string().contains("no IPv4 network"));
        assert!(allowing(&["::/0", "192.0.2.0/24"]).new_spec().is_ok());
        let for_ipv6 =
            |networks| Request { target: Some("[fd00::10]:80".parse().unwrap()), ..allowing(networks) };
        assert!(for_ipv6(&["0.0.0.0/0"]).new_spec().unwrap_err().to_string().contains("no IPv6 network"));
        assert!(for_ipv6(&["2001:db8::/32", "192.0.2.0/24"]).new_spec().is_ok());
    }

    #[test]
    fn what_replaces_a_rule_keeps_all_that_it_does_not_name() {
        let old = Request {
            name: Some("web".into()),
            owner: Some("ops".into()),
            allow: Some(AllowList::parse(["192.0.2.0/24"]).unwrap()),
            hairpin: Some(false),
            enabled: Some(false),
            ..request("wan:80", "10.0.0.10:80")
        };
        let old = old.new_spec().unwrap();
        let replacing = request("wan:80-89", "10.0.0.11:80-89");
        let spec = replacing.spec_in_place_of(&old).unwrap();
        let (external, target) = (replacing.external.clone().unwrap(), replacing.target.unwrap());
        assert_eq!(spec, Spec { external, target, ..old.clone() });
        let open = Request { allow: Some(AllowList::default()), ..replacing };
        assert!(open.spec_in_place_of(&old).unwrap().allow.is_empty(), "unless it is named");
    }

    #[test]
    fn a_review_date_is_a_day() {
        assert!(parse_date("2026-12-31").is_ok());
        for text in ["", "tomorrow", "31.12.2026", "2026-13-01", "2026-02-30", "2026-12-31T00:00", "20261231"]
        {
            assert!(parse_date(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_change_keeps_what_it_does_not_name() {
        let named = Request {
            name: Some("web".into()),
            owner: Some("ops".into()),
            ..request("wan:80", "10.0.0.10:80")
        };
        let spec = named.new_spec().unwrap();
        let change = Request { owner: Some(String::new()), enabled: Some(false), ..Request::default() };
        let changed = change.changed_spec(&spec).unwrap();
        assert_eq!(changed, Spec { owner: None, enabled: false, ..spec });
    }

    #[test]
    fn null_takes_a_text_away_and_is_refused_elsewhere() {
        let read = |text: &str| serde_json::from_str::<Request>(text);
        let spec =
            Request { owner: Some("ops".into()), ..request("wan:80", "10.0.0.10:80") }.new_spec().unwrap();
        assert_eq!(read(r#"{"owner":null}"#).unwrap().changed_spec(&spec).unwrap().owner, None);
        assert_eq!(read("{}").unwrap().changed_spec(&spec).unwrap(), spec);
        for field in ["protocol", "target", "allow", "lifetime", "enabled", "limits"] {
            assert!(read(&format!(r#"{{"{field}":null}}"#)).is_err(), "{field}");
        }
    }

    #[test]
    fn adding_and_changing_refuse_each_others_words() {
        let spec = request("wan:80", "10.0.0.10:80").new_spec().unwrap();
        assert!(Request { cut: true, ..request("wan:80", "10.0.0.10:80") }.new_spec().is_err());
        assert!(Request { replace: true, ..Request::default() }.changed_spec(&spec).is_err());
        assert!(request("wan:80", "10.0.0.10:80").changed_spec(&spec).is_err());
        assert!(Request::default().new_spec().is_err());
    }

    #[test]
    fn unknown_fields_are_refused_by_name() {
        let error = serde_json::from_str::<Request>(r#"{"protocoll": "tcp"}"#).unwrap_err().to_string();
        assert!(error.contains("`protocoll`"), "{error}");
        let error = serde_json::from_str::<Request>(r#"{"limits": {"max": 1}}"#).unwrap_err().to_string();
        assert!(error.contains("`max`"), "{error}");
    }
}
