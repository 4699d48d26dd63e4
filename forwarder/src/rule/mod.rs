//! Rules as people write, keep and read them.

mod allow;
mod endpoint;
mod family;
mod invalid;
mod lifetime;
mod ports;
mod protocol;
mod reference;
mod spec;
mod text;
mod view;

use std::fmt;
use std::net::IpAddr;

use jiff::Timestamp;

use crate::datapath::Epoch;

pub use allow::AllowList;
pub use endpoint::{External, Place, Target, check_interface_name};
pub use family::Family;
pub use invalid::{Invalid, quoted};
pub use lifetime::{Lifetime, now, parse_duration};
pub use ports::PortRange;
pub use protocol::Protocol;
pub use reference::RuleRef;
pub use spec::{Limits, LimitsRequest, Request, Spec, Via, parse_date};
pub use view::{Counters, RuleView, State};

/// Number of a rule, never given twice.
pub type RuleId = u64;

/// A rule as the store keeps it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    pub id: RuleId,
    /// Its place in the kernel's arrays, its own for life.
    pub slot: u32,
    pub epoch: Epoch,
    pub spec: Spec,
    pub created_at: Timestamp,
    pub created_by: String,
    pub changed_at: Timestamp,
    pub expires_at: Option<Timestamp>,
    /// Deleted, but established flows may end by themselves.
    pub draining: bool,
    /// The external addresses it was last reached at, so that their loss is noticed
    /// even when it happens while no controller runs.
    pub bound: Vec<IpAddr>,
}

impl Rule {
    pub fn label(&self) -> Label<'_> {
        Label(self)
    }

    /// Whether it would be reached elsewhere with this spec.
    pub fn moves_to(&self, spec: &Spec) -> bool {
        let place = |spec: &Spec| (spec.external.clone(), spec.protocol, spec.family(), spec.dmz);
        place(&self.spec) != place(spec)
    }
}

/// How messages name a rule: `rule 3 (web)`.
pub struct Label<'a>(&'a Rule);

impl fmt::Display for Label<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rule {}", self.0.id)?;
        match &self.0.spec.name {
            Some(name) => write!(f, " ({name})"),
            None => Ok(()),
        }
    }
}
