//! Numbers and times as people read them.

use std::time::Duration;

use jiff::Timestamp;

/// `2d 3h`, `4m 5s`: the two largest units.
pub fn duration(duration: Duration) -> String {
    let seconds = duration.as_secs();
    let units =
        [("d", seconds / 86_400), ("h", seconds / 3600 % 24), ("m", seconds / 60 % 60), ("s", seconds % 60)];
    let begin = units.iter().position(|(_, count)| *count > 0).unwrap_or(units.len() - 1);
    let shown = units[begin..].iter().take(2).filter(|(_, count)| *count > 0);
    let text: Vec<String> = shown.map(|(unit, count)| format!("{count}{unit}")).collect();
    if text.is_empty() { "0s".to_owned() } else { text.join(" ") }
}

/// How far off a rule's end is.
pub fn end(end: Option<Timestamp>, now: Timestamp) -> String {
    match end.map(|end| Duration::try_from(end.duration_since(now))) {
        None => "never".to_owned(),
        Some(Ok(left)) => format!("in {}", duration(left)),
        Some(Err(_)) => "now".to_owned(),
    }
}

/// `512 B`, `1.4 MiB`.
pub fn bytes(bytes: u64) -> String {
    let mut value = bytes as f64;
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut units = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"].iter().peekable();
    loop {
        value /= 1024.0;
        match units.next() {
            Some(unit) if value < 1024.0 || units.peek().is_none() => return format!("{value:.1} {unit}"),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_have_two_units_at_most() {
        for (seconds, text) in
            [(0, "0s"), (59, "59s"), (60, "1m"), (3_725, "1h 2m"), (86_400 * 30, "30d"), (86_405, "1d")]
        {
            assert_eq!(duration(Duration::from_secs(seconds)), text);
        }
    }

    #[test]
    fn bytes_have_a_fitting_unit() {
        for (count, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1536, "1.5 KiB"),
            (100 << 20, "100.0 MiB"),
            (u64::MAX, "16.0 EiB"),
        ] {
            assert_eq!(bytes(count), text);
        }
    }

    #[test]
    fn an_end_is_told_from_now() {
        let now = Timestamp::from_second(1_000_000).unwrap();
        assert_eq!(end(None, now), "never");
        assert_eq!(end(Some(now + Duration::from_secs(90)), now), "in 1m 30s");
        assert_eq!(end(Some(now - Duration::from_secs(90)), now), "now");
    }
}
