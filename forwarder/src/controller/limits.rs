//! Says when a rule's limits refuse somebody.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use log::warn;

use super::{Controller, Error};
use crate::rule::{Limits, Rule, RuleId};

/// A rule is named at most once in this time.
const PAUSE: Duration = Duration::from_secs(60);

/// What has been refused and said so far.
#[derive(Default)]
pub struct Refusals {
    of_rules: HashMap<RuleId, Refused>,
}

#[derive(Clone, Copy, Default)]
struct Refused {
    packets: u64,
    said: Option<Instant>,
}

impl Refusals {
    /// Takes in how many packets a rule has refused in all. Gives how many of them nobody has been
    /// told of, when it is time to tell.
    fn note(&mut self, id: RuleId, packets: u64, now: Instant) -> Option<u64> {
        let Some(refused) = self.of_rules.get_mut(&id) else {
            // What it has refused before a restart is history.
            self.of_rules.insert(id, Refused { packets, said: None });
            return None;
        };
        let new = packets.saturating_sub(refused.packets);
        let recent = refused.said.is_some_and(|said| now.saturating_duration_since(said) < PAUSE);
        if new == 0 || recent {
            return None;
        }
        *refused = Refused { packets, said: Some(now) };
        Some(new)
    }
}

impl Controller {
    /// Looks at what the limits have refused since the last time.
    pub(super) fn notice_refusals(&mut self) -> Result<(), Error> {
        let now = Instant::now();
        let limited = |rule: &&Rule| rule.spec.limits != Limits::default();
        self.refusals.of_rules.retain(|id, _| self.rules.get(id).is_some_and(|rule| limited(&rule)));
        for rule in self.rules.values().filter(limited) {
            let refused = self.datapath.refused(rule.slot)?;
            if let Some(packets) = self.refusals.note(rule.id, refused, now) {
                warn!("{} has reached a limit: {packets} packets of new sessions were dropped", rule.label());
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_at_its_limit_is_named_once_a_minute() {
        let (mut refusals, start) = (Refusals::default(), Instant::now());
        let mut note = |packets, second| refusals.note(1, packets, start + Duration::from_secs(second));
        assert_eq!(note(10, 0), None, "of an earlier controller's time");
        assert_eq!(note(13, 1), Some(3));
        assert_eq!([note(20, 2), note(20, 60)], [None, None]);
        assert_eq!(note(20, 61), Some(7));
        assert_eq!(note(20, 200), None);
    }
}
