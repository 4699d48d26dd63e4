//! How long a rule lives.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use jiff::Timestamp;

use super::invalid::{Invalid, quoted, refuse, serde_as_text};

const SHORTEST: Duration = Duration::from_secs(1);
const LONGEST: Duration = Duration::from_secs(36_500 * 24 * 3600);

/// `90s`, `10m`, `12h`, `30d`; or `never`, which makes a rule permanent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lifetime {
    Never,
    For(Duration),
}

impl Lifetime {
    /// The moment a rule ends that begins this life at `now`.
    pub fn end(self, now: Timestamp) -> Result<Option<Timestamp>, Invalid> {
        let Lifetime::For(duration) = self else { return Ok(None) };
        match now.checked_add(duration) {
            Ok(end) => Ok(Some(end)),
            Err(_) => refuse!("lifetime {self} ends after the calendar: give a shorter one"),
        }
    }
}

/// The present, in the milliseconds that the store keeps.
pub fn now() -> Timestamp {
    let now = Timestamp::now();
    Timestamp::from_millisecond(now.as_millisecond()).unwrap_or(now)
}

impl fmt::Display for Lifetime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Lifetime::Never => f.write_str("never"),
            Lifetime::For(duration) => {
                let seconds = duration.as_secs();
                let units = [
                    (seconds / 86_400, "d"),
                    (seconds / 3600 % 24, "h"),
                    (seconds / 60 % 60, "m"),
                    (seconds % 60, "s"),
                ];
                units
                    .iter()
                    .filter(|(count, _)| *count > 0)
                    .try_for_each(|(count, unit)| write!(f, "{count}{unit}"))
            }
        }
    }
}

impl FromStr for Lifetime {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        if text == "never" {
            return Ok(Lifetime::Never);
        }
        let Some(duration) = parse_duration(text) else {
            refuse!("lifetime {} is not a duration: write 90s, 10m, 12h or 30d", quoted(text));
        };
        if duration < SHORTEST {
            refuse!("lifetime {} is too short: the shortest is 1s", quoted(text));
        }
        if duration > LONGEST {
            refuse!("lifetime {} is too long: the longest is 36500d", quoted(text));
        }
        Ok(Lifetime::For(duration))
    }
}

/// Reads `90s`, `10m`, `12h`, `30d`, and several of these together. No other units: `10M` would be
/// ten months.
pub fn parse_duration(text: &str) -> Option<Duration> {
    let mut units = text.split(|c: char| !c.is_alphabetic()).filter(|unit| !unit.is_empty());
    let known = units.all(|unit| ["s", "m", "h", "d"].contains(&unit));
    humantime::parse_duration(text).ok().filter(|_| known)
}

serde_as_text!(Lifetime);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read_as_people_write_them() {
        for (text, seconds) in [("90s", 90), ("10m", 600), ("12h", 43_200), ("30d", 2_592_000)] {
            assert_eq!(text.parse::<Lifetime>().unwrap(), Lifetime::For(Duration::from_secs(seconds)));
        }
        assert_eq!("never".parse::<Lifetime>().unwrap(), Lifetime::Never);
    }

    #[test]
    fn no_life_at_all_or_nonsense_is_refused() {
        for text in [
            "0",
            "0s",
            "500ms",
            "",
            "10",
            "-5s",
            "soon",
            "40000d",
            "99999999999999999999d",
            "10M",
            "1y",
            "1w",
            "5min",
            "10 seconds",
        ] {
            assert!(text.parse::<Lifetime>().is_err(), "{text}");
        }
    }

    #[test]
    fn the_text_form_reads_back() {
        for (text, shown) in [("1h 30m", "1h30m"), ("400d", "400d"), ("90s", "1m30s"), ("86401s", "1d1s")] {
            let lifetime: Lifetime = text.parse().unwrap();
            assert_eq!(lifetime.to_string(), shown);
            assert_eq!(shown.parse::<Lifetime>().unwrap(), lifetime);
        }
    }
}
