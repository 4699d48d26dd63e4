//! The two address families: each IPv4 address of a test network has a twin of IPv6.

use std::net::{Ipv4Addr, Ipv6Addr};

/// Which family a test speaks. Tests name hosts and rules by IPv4 addresses, which stand for their twins
/// where it is IPv6.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    Ipv4,
    Ipv6,
}

impl Family {
    /// The text with its IPv4 addresses as this family has them. Of IPv6, `203.0.113.1:8080` is
    /// `[2001:db8::cb:0:71:1]:8080`, `10.0.0.0/24` is `fd00::a:0:0:0/112`, and `0.0.0.0` is `::`.
    pub fn of(self, text: &str) -> String {
        match self {
            Self::Ipv4 => text.to_owned(),
            Self::Ipv6 => in_ipv6(text),
        }
    }
}

fn in_ipv6(mut text: &str) -> String {
    let mut out = String::new();
    while let Some(start) = text.find(|c: char| c.is_ascii_digit()) {
        let rest = &text[start..];
        let word = &rest[..rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '.').unwrap_or(rest.len())];
        // Nor is the end of an IPv6 address one of IPv4.
        let inside_a_word = text[..start].ends_with(|c: char| c.is_ascii_alphanumeric() || c == ':');
        let address = word.parse::<Ipv4Addr>().ok().filter(|_| !inside_a_word);
        let behind = &rest[word.len()..];
        out += &text[..start];
        text = behind;
        match address {
            None => out += word,
            Some(address) if behind.starts_with(':') => out += &format!("[{}]", twin(address)),
            Some(address) => {
                out += &twin(address).to_string();
                if let Some(length) = behind.strip_prefix('/') {
                    let digits = length.find(|c: char| !c.is_ascii_digit()).unwrap_or(length.len());
                    out += &format!("/{}", prefix(length[..digits].parse().unwrap_or_default()));
                    text = &length[digits..];
                }
            }
        }
    }
    out + text
}

/// One group for each byte: private addresses in fd00::/64, others in 2001:db8::/64.
fn twin(address: Ipv4Addr) -> Ipv6Addr {
    if address.is_unspecified() {
        return Ipv6Addr::UNSPECIFIED;
    }
    let [a, b, c, d] = address.octets().map(u16::from);
    let network = if address.is_private() { [0xfd00, 0] } else { [0x2001, 0xdb8] };
    Ipv6Addr::new(network[0], network[1], 0, 0, a, b, c, d)
}

/// The length of the twins' common prefix.
fn prefix(length: u8) -> u8 {
    let (whole, part) = (length / 8, length % 8);
    match (whole, part) {
        (0, 0) => 0,
        (_, 0) => 64 + 16 * whole,
        _ => 64 + 16 * whole + 8 + part,
    }
}
