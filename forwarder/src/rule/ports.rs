//! Port ranges.

use std::fmt;
use std::str::FromStr;

use super::invalid::{Invalid, quoted, refuse, serde_as_text};

/// One port or a run of them: never port 0, never empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PortRange {
    pub first: u16,
    pub last: u16,
}

impl PortRange {
    pub const ALL: Self = Self { first: 1, last: u16::MAX };

    pub fn new(first: u16, last: u16) -> Result<Self, Invalid> {
        if first == 0 {
            refuse!("port 0 cannot be mapped: ports are 1 to 65535");
        }
        if first > last {
            refuse!("port range {first}-{last} runs backwards: write {last}-{first}");
        }
        Ok(PortRange { first, last })
    }

    /// How many ports it has.
    pub fn count(self) -> u32 {
        u32::from(self.last) - u32::from(self.first) + 1
    }

    pub fn contains(self, port: u16) -> bool {
        (self.first..=self.last).contains(&port)
    }

    pub fn intersects(self, other: PortRange) -> bool {
        self.first <= other.last && other.first <= self.last
    }
}

impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.first == self.last {
            write!(f, "{}", self.first)
        } else {
            write!(f, "{}-{}", self.first, self.last)
        }
    }
}

impl FromStr for PortRange {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        match text.split_once('-') {
            Some((first, last)) if !first.is_empty() => PortRange::new(port(first)?, port(last)?),
            _ => {
                let port = port(text)?;
                PortRange::new(port, port)
            }
        }
    }
}

fn port(text: &str) -> Result<u16, Invalid> {
    // `u16::from_str` takes a leading plus; a port has none.
    if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) {
        match text.parse() {
            Ok(port) => return Ok(port),
            Err(_) => refuse!("port {} is too large: ports are 1 to 65535", quoted(text)),
        }
    }
    refuse!("port {} is not a number: write 1 to 65535, or a range as 8000-8100", quoted(text))
}

serde_as_text!(PortRange);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_form_goes_there_and_back() {
        for text in ["1", "65535", "1-65535", "10000-20000"] {
            assert_eq!(text.parse::<PortRange>().unwrap().to_string(), text);
        }
        assert_eq!("80-80".parse::<PortRange>().unwrap().to_string(), "80");
    }

    #[test]
    fn what_is_no_port_is_refused_with_what_would_be_right() {
        for text in
            ["0", "0-10", "65536", "70000", "", "-", "80-", "-80", "+80", "8o", "90-80", "1-2-3", " 80"]
        {
            let error = text.parse::<PortRange>().unwrap_err().to_string();
            assert!(!error.contains('\n') && error.contains(':'), "{text}: {error}");
        }
        assert!("-80".parse::<PortRange>().unwrap_err().to_string().starts_with("port `-80` is not"));
        assert!("90-80".parse::<PortRange>().unwrap_err().to_string().contains("80-90"));
    }

    #[test]
    fn ranges_meet_only_where_a_port_is_in_both() {
        let range = |text: &str| text.parse::<PortRange>().unwrap();
        assert!(range("10-20").intersects(range("20-30")));
        assert!(!range("10-20").intersects(range("21-30")));
        assert!(range("1-65535").intersects(range("80")));
        assert_eq!(range("1-65535").count(), 65535);
        assert!(range("10-20").contains(20) && !range("10-20").contains(21));
    }
}
