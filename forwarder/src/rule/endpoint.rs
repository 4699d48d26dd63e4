//! The two ends of a rule: where it is reached, and where it leads.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use super::invalid::{Invalid, quoted, refuse, serde_as_text};
use super::ports::PortRange;

/// Where a rule is reached, apart from the ports.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Place {
    Address(IpAddr),
    /// Whatever addresses the interface has.
    Interface(String),
}

/// Where a rule is reached: `203.0.113.10:8080`, `[2001:db8::1]:443`, `wan:8000-8100`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct External {
    pub place: Place,
    pub ports: PortRange,
}

/// Where a rule leads: `10.0.0.10:80`, `[fd00::10]:80`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Target {
    pub address: IpAddr,
    pub ports: PortRange,
}

impl fmt::Display for External {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.place {
            Place::Address(IpAddr::V4(address)) => write!(f, "{address}:{}", self.ports),
            Place::Address(IpAddr::V6(address)) => write!(f, "[{address}]:{}", self.ports),
            Place::Interface(name) => write!(f, "{name}:{}", self.ports),
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.address {
            IpAddr::V4(address) => write!(f, "{address}:{}", self.ports),
            IpAddr::V6(address) => write!(f, "[{address}]:{}", self.ports),
        }
    }
}

impl FromStr for External {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        let (host, ports) = split(text, "external", "203.0.113.10:8080 or wan:8080")?;
        let place = match address(host)? {
            Some(address) => Place::Address(address),
            None => {
                check_interface_name(host)?;
                Place::Interface(host.to_owned())
            }
        };
        Ok(External { place, ports })
    }
}

impl FromStr for Target {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        let (host, ports) = split(text, "target", "10.0.0.10:80")?;
        match address(host)? {
            Some(address) => Ok(Target { address, ports }),
            None => refuse!("target {} is not an address: write it as 10.0.0.10:80", quoted(host)),
        }
    }
}

serde_as_text!(External);
serde_as_text!(Target);

/// Refuses what Linux could not call an interface.
pub fn check_interface_name(name: &str) -> Result<(), Invalid> {
    let bad = |c: char| c == '/' || c == ':' || c.is_whitespace() || c.is_control();
    if name.is_empty() || name.len() > 15 || name == "." || name == ".." || name.contains(bad) {
        refuse!(
            "{} is neither an address nor an interface: names have 1 to 15 characters, as wan",
            quoted(name)
        );
    }
    Ok(())
}

fn split<'a>(text: &'a str, what: &str, example: &str) -> Result<(&'a str, PortRange), Invalid> {
    match text.rsplit_once(':') {
        Some((host, ports)) if !host.is_empty() && !text.ends_with(']') => Ok((host, ports.parse()?)),
        _ => refuse!("{what} {} has no port or no address: write it as {example}", quoted(text)),
    }
}

/// The address that `host` is, or nothing where it may be a name.
fn address(host: &str) -> Result<Option<IpAddr>, Invalid> {
    if let Some(inner) = host.strip_prefix('[') {
        if inner.contains('%') {
            refuse!(
                "{} names a link: give a global or unique local address, as [2001:db8::1]:443",
                quoted(host)
            );
        }
        return match inner.strip_suffix(']').map(str::parse::<Ipv6Addr>) {
            Some(Ok(address)) => Ok(Some(address.into())),
            _ => {
                refuse!("{} is not an IPv6 address in brackets: write it as [2001:db8::1]:443", quoted(host))
            }
        };
    }
    if let Ok(address) = host.parse::<Ipv4Addr>() {
        return Ok(Some(address.into()));
    }
    if host.contains(':') {
        refuse!("{} looks like IPv6 without brackets: write it as [2001:db8::1]:443", quoted(host));
    }
    if host.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.') {
        refuse!("{} is not an IPv4 address: write four numbers of 0 to 255, as 203.0.113.10", quoted(host));
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn external_text_goes_there_and_back() {
        for text in
            ["203.0.113.10:8080", "[2001:db8::1]:443", "wan:8080", "10.0.0.1:10000-20000", "ppp0.7:1-65535"]
        {
            assert_eq!(text.parse::<External>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn target_text_goes_there_and_back() {
        for text in ["10.0.0.10:80", "[2001:db8::1]:443", "10.0.0.1:30000-40000"] {
            assert_eq!(text.parse::<Target>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn bad_externals_are_refused_in_one_line() {
        for text in [
            "",
            ":",
            "8080",
            ":80",
            "wan",
            "wan:",
            "wan:0",
            "wan:70000",
            "300.1.1.1:80",
            "1.2.3:80",
            "2001:db8::1:443",
            "[2001:db8::1]",
            "[2001:db8::1:443",
            "[10.0.0.1]:80",
            "[fe80::1%wan]:80",
            "a b:80",
            "a/b:80",
            "sixteen-letters-x:80",
            "wan\n:80",
            "..:80",
        ] {
            let error = text.parse::<External>().unwrap_err().to_string();
            assert!(!error.contains('\n'), "{text:?}: {error}");
        }
    }

    #[test]
    fn a_target_is_an_address_never_a_name() {
        for text in ["example.org:80", "wan:80", "", "10.0.0.10", "10.0.0.256:80", "10.0.0.10:0"] {
            assert!(text.parse::<Target>().is_err(), "{text}");
        }
    }
}
