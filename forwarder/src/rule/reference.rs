//! How a user says which rule is meant.

use std::fmt;
use std::str::FromStr;

use super::invalid::{Invalid, quoted, refuse};
use super::{External, Protocol, RuleId};

/// An id, a name, or `PROTO EXTERNAL`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RuleRef {
    Id(RuleId),
    Name(String),
    Mapping(Protocol, External),
}

impl fmt::Display for RuleRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RuleRef::Id(id) => write!(f, "{id}"),
            RuleRef::Name(name) => f.write_str(name),
            RuleRef::Mapping(protocol, external) => write!(f, "{protocol} {external}"),
        }
    }
}

impl FromStr for RuleRef {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        if text.is_empty() {
            refuse!("no rule is named: give its id, its name or PROTO EXTERNAL, as tcp wan:8080");
        }
        if text.bytes().all(|byte| byte.is_ascii_digit()) {
            return match text.parse() {
                Ok(id) => Ok(RuleRef::Id(id)),
                Err(_) => {
                    refuse!("{} is too large for an id: see them with `forwarderctl list`", quoted(text))
                }
            };
        }
        if let Some((protocol, external)) = text.split_once(' ')
            && let Ok(protocol) = protocol.parse()
        {
            return Ok(RuleRef::Mapping(protocol, external.parse()?));
        }
        Ok(RuleRef::Name(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_three_ways_are_told_apart() {
        assert_eq!("12".parse(), Ok(RuleRef::Id(12)));
        assert_eq!("web 2".parse(), Ok(RuleRef::Name("web 2".into())));
        assert_eq!("tcp wan:80".parse(), Ok(RuleRef::Mapping(Protocol::Tcp, "wan:80".parse().unwrap())));
    }

    #[test]
    fn half_a_mapping_and_nothing_are_refused() {
        for text in ["", "tcp wan", "tcp  wan:80", "99999999999999999999999"] {
            assert!(text.parse::<RuleRef>().is_err(), "{text:?}");
        }
    }
}
