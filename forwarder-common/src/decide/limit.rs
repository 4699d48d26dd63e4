//! Limits of a rule: sessions at once, of all sources and of one, and new flows a second.
//!
//! Sessions are counted when they become established, which nobody brings about with packets that
//! only seem to be his; what opens flows and goes no further is limited by its rate. Where there is
//! no room, a new flow is refused; and since others may take the last place before it is
//! established, it is asked again then. A CPU adds its session first and looks at the sum second: of
//! several that meet at the last place, the one that looks last sees them all, so a limit is never
//! exceeded.

use super::{Core, Keys};
use crate::{
    address::{Address as _, Ipv6},
    family::Family,
    flow::INWARD,
    reason::Reason,
    rule::{LIMITED, Rule},
    sessions::SessionsKey,
    tables::{Counters, Flows, Stage, World},
};

const SECOND: u64 = 1_000_000_000;

impl<A: Family, F: Flows<A>, W: World<A>, C: Counters> Core<'_, A, F, W, C> {
    /// Whether the rule in the scratch takes one more flow.
    #[inline(always)]
    pub(super) fn admit(&mut self, client: A) -> Result<(), Reason> {
        let world = self.world;
        match world.rule(self.scratch.inward.rule) {
            Some(rule) if rule.flags & LIMITED != 0 => self.admit_limited(client.site(), rule),
            _ => Ok(()),
        }
    }

    /// (A function of its own, as are the next ones: see [`Core::claim`].)
    #[inline(never)]
    fn admit_limited(&mut self, source: Ipv6, rule: &Rule) -> Result<(), Reason> {
        let (most, most_of_one) = (rule.max_sessions, rule.max_sessions_per_source);
        if most != 0 && self.sessions(rule, Ipv6::UNSPECIFIED) >= i64::from(most) {
            return Err(Reason::SessionLimit);
        }
        if most_of_one != 0 && self.sessions(rule, source) >= i64::from(most_of_one) {
            return Err(Reason::SourceLimit);
        }
        if rule.new_per_second != 0 && !self.take_turn(rule.new_per_second) {
            return Err(Reason::RateLimit);
        }
        Ok(())
    }

    /// Takes one of a second's new flows. They may all come at once, and are then due one by one.
    #[inline(always)]
    fn take_turn(&mut self, per_second: u32) -> bool {
        let slot = self.scratch.inward.rule;
        let interval = SECOND.checked_div(u64::from(per_second)).unwrap_or(0);
        let burst = interval.wrapping_mul(u64::from(per_second));
        let due = self.flows.due(slot);
        if due < self.now {
            // What was not taken is not saved up.
            self.flows.set_due(slot, self.now);
        } else if due - self.now + interval > burst {
            return false;
        }
        self.flows.postpone(slot, interval);
        if self.flows.due(slot).saturating_sub(self.now) <= burst {
            return true;
        }
        self.flows.postpone(slot, interval.wrapping_neg());
        false
    }

    /// Counts the session that the scratch's half-open flow is to become, if its rule has room for
    /// it. Whether it was counted.
    #[inline(always)]
    pub(super) fn enter(&mut self, client: A) -> Result<bool, Reason> {
        let world = self.world;
        match world.rule(self.scratch.inward.rule) {
            Some(rule) if rule.counts_sessions() => self.enter_limited(client.site(), rule).map(|()| true),
            _ => Ok(false),
        }
    }

    #[inline(never)]
    fn enter_limited(&mut self, source: Ipv6, rule: &Rule) -> Result<(), Reason> {
        let epoch = self.scratch.inward.epoch;
        let (all, of_one) = (SessionsKey::all(epoch), SessionsKey::new(epoch, source));
        self.take_place(rule, rule.max_sessions, &all, Reason::SessionLimit)?;
        let taken = self.take_place(rule, rule.max_sessions_per_source, &of_one, Reason::SourceLimit);
        if taken.is_err() {
            self.give_back(rule.max_sessions, &all);
        }
        taken
    }

    #[inline(always)]
    fn take_place(&mut self, rule: &Rule, most: u32, key: &SessionsKey, full: Reason) -> Result<(), Reason> {
        if most == 0 {
            return Ok(());
        }
        self.flows.count_sessions(key, 1).map_err(|_| Reason::TableFull)?;
        if self.sessions(rule, key.source) <= i64::from(most) {
            return Ok(());
        }
        self.give_back(most, key);
        Err(full)
    }

    #[inline(always)]
    fn give_back(&mut self, most: u32, key: &SessionsKey) {
        if most != 0 {
            // Without room for the count nothing was counted; the controller puts it right.
            let _ = self.flows.count_sessions(key, -1);
        }
    }

    /// Sessions of a rule, in both protocols; `source`: see [`SessionsKey`].
    #[inline(always)]
    fn sessions(&mut self, rule: &Rule, source: Ipv6) -> i64 {
        let tcp = self.flows.sessions(&SessionsKey::new(rule.tcp_epoch, source));
        tcp + self.flows.sessions(&SessionsKey::new(rule.udp_epoch, source))
    }

    /// Takes a session out of the counts again. (It returns something because a BPF function has to.)
    #[inline(never)]
    pub(super) fn leave(&mut self, client: A, slot: u32, epoch: u32) -> bool {
        let world = self.world;
        let Some(rule) = world.rule(slot) else { return false };
        self.give_back(rule.max_sessions, &SessionsKey::all(epoch));
        self.give_back(rule.max_sessions_per_source, &SessionsKey::of(epoch, client));
        true
    }

    /// An established session is over: it leaves room at once, and once only.
    #[inline(never)]
    pub(super) fn end_session(&mut self, keys: &Keys<A>) -> bool {
        let Some(flow) = self.flows.find(Stage::Established, &keys.here) else { return false };
        let inward = if flow.direction == INWARD { &keys.here } else { &keys.other };
        let (slot, epoch) = (flow.rule, flow.epoch);
        self.flows.is_first_end(inward) && self.leave(inward.tuple.src, slot, epoch)
    }
}
