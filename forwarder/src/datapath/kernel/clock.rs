//! The kernel's clock beside the wall's.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use nix::time::{ClockId, clock_gettime};

/// Monotonic time in ns, the clock that the packet path stamps with.
pub fn monotonic() -> u64 {
    // The clock's id is valid on every Linux, and a valid pointer is all else that can be wrong.
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).map(Duration::from).unwrap_or_default();
    u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)
}

/// How far the wall clock is ahead of the monotonic one. It changes only when the wall clock is
/// set (and by the slow slewing of NTP).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offset(SignedDuration);

impl Offset {
    pub fn now() -> Self {
        let wall = Timestamp::now().as_duration();
        let monotonic = i64::try_from(monotonic()).unwrap_or(i64::MAX);
        Self(wall - SignedDuration::from_nanos(monotonic))
    }

    /// A moment of the wall clock on the monotonic one, ns; 0 if it was before boot.
    pub fn monotonic_of(self, moment: Timestamp) -> u64 {
        let nanos = (moment.as_duration() - self.0).as_nanos();
        u64::try_from(nanos).unwrap_or(if nanos < 0 { 0 } else { u64::MAX })
    }

    /// Whether lines written under `earlier` would now end noticeably early or late.
    pub fn has_moved_from(self, earlier: Self) -> bool {
        (self.0 - earlier.0).abs() > SignedDuration::from_millis(50)
    }
}

/// How long ago a stamp of the packet path is.
pub fn since(stamp: u64, now: u64) -> Duration {
    Duration::from_nanos(now.saturating_sub(stamp))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_moment_of_the_wall_clock_is_as_far_ahead_on_the_monotonic_one() {
        let ahead = SignedDuration::from_secs(100);
        let stamp = Offset::now().monotonic_of(Timestamp::now() + ahead);
        let left = Duration::from_nanos(stamp - monotonic());
        assert!(left > Duration::from_millis(99_900) && left <= Duration::from_millis(100_100), "{left:?}");
    }

    #[test]
    fn a_moment_before_boot_is_zero() {
        assert_eq!(Offset::now().monotonic_of(Timestamp::UNIX_EPOCH), 0);
    }
}
