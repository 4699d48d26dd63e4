//! Who may use a rule.

use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Deserializer, Serialize};

use super::invalid::{Invalid, quoted, refuse};

/// The most networks one rule may list.
pub const MOST_NETWORKS: usize = 1024;

/// The word for everyone.
const ANY: &str = "any";

/// Sources that may use a rule; an empty list lets everyone.
///
/// It is sorted and without duplicates, so that equal lists are equal.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct AllowList(Vec<IpNet>);

impl AllowList {
    /// Reads CIDRs; a bare address stands for itself alone, and `any` alone for everyone.
    pub fn parse<'a>(texts: impl IntoIterator<Item = &'a str>) -> Result<Self, Invalid> {
        let texts: Vec<&str> = texts.into_iter().collect();
        if texts == [ANY] {
            return Ok(AllowList::default());
        }
        let mut networks = texts.into_iter().map(network).collect::<Result<Vec<_>, _>>()?;
        networks.sort();
        networks.dedup();
        if networks.len() > MOST_NETWORKS {
            refuse!("the allow list has {} networks: a rule may have {MOST_NETWORKS}", networks.len());
        }
        Ok(AllowList(networks))
    }

    pub fn permits(&self, source: IpAddr) -> bool {
        self.0.is_empty() || self.0.iter().any(|network| network.contains(&source))
    }

    pub fn networks(&self) -> &[IpNet] {
        &self.0
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl fmt::Display for AllowList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str("everyone");
        }
        for (position, network) in self.0.iter().enumerate() {
            let comma = if position == 0 { "" } else { ", " };
            write!(f, "{comma}{network}")?;
        }
        Ok(())
    }
}

impl<'de> Deserialize<'de> for AllowList {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let texts = Vec::<String>::deserialize(deserializer)?;
        AllowList::parse(texts.iter().map(String::as_str)).map_err(serde::de::Error::custom)
    }
}

fn network(text: &str) -> Result<IpNet, Invalid> {
    let parsed = text.parse::<IpAddr>().map(IpNet::from).or_else(|_| text.parse::<IpNet>());
    let Ok(network) = parsed else {
        refuse!("allow {} is not a network: write it as 198.51.100.0/24 or 198.51.100.7", quoted(text));
    };
    if let IpNet::V6(v6) = network
        && v6.prefix_len() >= 96
        && let Some(ipv4) = v6.addr().to_ipv4_mapped()
    {
        refuse!("allow {network} is IPv4 in the notation of IPv6: write {ipv4}/{}", v6.prefix_len() - 96);
    }
    // Bits behind the prefix are most likely a slip, and a slip here lets strangers in.
    if network.trunc() != network {
        refuse!("allow {network} has address bits behind its prefix: write {}", network.trunc());
    }
    Ok(network)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(texts: &[&str]) -> AllowList {
        AllowList::parse(texts.iter().copied()).unwrap()
    }

    #[test]
    fn an_empty_list_lets_everyone() {
        assert!(list(&[]).permits("192.0.2.1".parse().unwrap()));
        assert_eq!(list(&["any"]), list(&[]));
        assert!(AllowList::parse(["any", "192.0.2.0/24"]).is_err());
    }

    #[test]
    fn only_listed_sources_may() {
        let allow = list(&["198.51.100.0/24", "192.0.2.7"]);
        assert!(allow.permits("198.51.100.200".parse().unwrap()));
        assert!(allow.permits("192.0.2.7".parse().unwrap()));
        assert!(!allow.permits("192.0.2.8".parse().unwrap()));
        assert!(
            !list(&["2001:db8::/32"]).permits("192.0.2.8".parse().unwrap()),
            "IPv6 alone lets no IPv4 source"
        );
    }

    #[test]
    fn order_and_repetition_do_not_matter() {
        assert_eq!(list(&["10.0.0.0/8", "192.0.2.7", "10.0.0.0/8"]), list(&["192.0.2.7/32", "10.0.0.0/8"]));
    }

    #[test]
    fn bad_networks_are_refused() {
        for text in ["", "10.0.0.0/33", "10.0.0.1/8", "10/8", "::/129", "everyone", "10.0.0.0/-1"] {
            assert!(AllowList::parse([text]).is_err(), "{text}");
        }
        let error = AllowList::parse(["10.0.0.1/8"]).unwrap_err().to_string();
        assert!(error.ends_with("write 10.0.0.0/8"), "{error}");
        for (text, instead) in
            [("::ffff:192.0.2.1", "192.0.2.1/32"), ("::ffff:192.0.2.0/120", "192.0.2.0/24")]
        {
            let error = AllowList::parse([text]).unwrap_err().to_string();
            assert!(error.ends_with(&format!("write {instead}")), "{error}");
        }
    }

    #[test]
    fn the_list_is_bounded() {
        let many: Vec<String> =
            (0..=MOST_NETWORKS).map(|n| format!("10.0.{}.{}", n / 256, n % 256)).collect();
        assert!(AllowList::parse(many.iter().map(String::as_str)).is_err());
    }
}
