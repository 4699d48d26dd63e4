//! What `forwarderctl --json stats` says, asked about.

use std::fmt;

use serde_json::Value;

/// Counters by path (`xdp`, `tc-ingress`, `tc-egress`), reason and verdict (`forward`, `pass`, `hold`, `drop`).
#[derive(Clone, Debug, PartialEq)]
pub struct Stats(Value);

impl Stats {
    /// Takes the JSON of `stats`.
    pub fn new(json: Value) -> Self {
        Self(json)
    }

    /// Packets that came to this verdict in this path.
    pub fn verdict(&self, path: &str, verdict: &str) -> u64 {
        self.sum(|line| line["path"] == path && line["verdict"] == verdict)
    }

    /// Packets that ended for this reason, in all paths.
    pub fn reason(&self, reason: &str) -> u64 {
        self.sum(|line| line["reason"] == reason)
    }

    /// Packets that were dropped, in all paths.
    pub fn dropped(&self) -> u64 {
        self.sum(|line| line["verdict"] == "drop")
    }

    fn sum(&self, wanted: impl Fn(&Value) -> bool) -> u64 {
        let lines = self.0["reasons"].as_array().map(Vec::as_slice).unwrap_or_default();
        lines.iter().filter(|line| wanted(line)).filter_map(|line| line["packets"].as_u64()).sum()
    }
}

impl fmt::Display for Stats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#}", self.0["reasons"])
    }
}
