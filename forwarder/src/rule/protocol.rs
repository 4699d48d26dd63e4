//! Which transport protocols a rule is for.

use std::fmt;
use std::str::FromStr;

use super::invalid::{Invalid, quoted, refuse, serde_as_text};

/// The protocols of one rule; `tcp+udp` is one rule, not two.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Protocol {
    Tcp,
    Udp,
    TcpUdp,
}

impl Protocol {
    pub fn tcp(self) -> bool {
        self != Protocol::Udp
    }

    pub fn udp(self) -> bool {
        self != Protocol::Tcp
    }

    pub fn intersects(self, other: Protocol) -> bool {
        self.tcp() && other.tcp() || self.udp() && other.udp()
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
            Protocol::TcpUdp => "tcp+udp",
        })
    }
}

impl FromStr for Protocol {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        match text.to_ascii_lowercase().as_str() {
            "tcp" => Ok(Protocol::Tcp),
            "udp" => Ok(Protocol::Udp),
            "tcp+udp" => Ok(Protocol::TcpUdp),
            _ => refuse!("protocol {} is unknown: write tcp, udp or tcp+udp", quoted(text)),
        }
    }
}

serde_as_text!(Protocol);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_form_goes_there_and_back() {
        for text in ["tcp", "udp", "tcp+udp"] {
            assert_eq!(text.parse::<Protocol>().unwrap().to_string(), text);
        }
        assert_eq!("TCP".parse(), Ok(Protocol::Tcp));
        for text in ["", "icmp", "udp+tcp", "tcp "] {
            assert!(text.parse::<Protocol>().is_err(), "{text}");
        }
    }

    #[test]
    fn tcp_and_udp_do_not_meet() {
        use Protocol::*;
        assert!(!Tcp.intersects(Udp));
        assert!(TcpUdp.intersects(Udp) && Tcp.intersects(TcpUdp) && Udp.intersects(Udp));
    }
}
