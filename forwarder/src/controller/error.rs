//! Why an operation was not done.

use std::fmt;

use crate::rule::{Invalid, RuleId};

/// A refusal or a failure; in either case nothing has changed.
#[derive(Debug)]
pub enum Error {
    /// What was asked for makes no sense.
    Invalid(Invalid),
    /// No such rule.
    NotFound(String),
    /// It makes sense, but what is there already stands against it.
    Conflict { message: String, rule: Option<RuleId> },
    /// The machine could not do it.
    Failed(anyhow::Error),
}

impl Error {
    /// The rule that stands against it.
    pub fn rule(&self) -> Option<RuleId> {
        match self {
            Error::Conflict { rule, .. } => *rule,
            _ => None,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Invalid(invalid) => invalid.fmt(f),
            Error::NotFound(message) | Error::Conflict { message, .. } => f.write_str(message),
            Error::Failed(error) => write!(f, "{error:#}"),
        }
    }
}

impl std::error::Error for Error {}

impl From<Invalid> for Error {
    fn from(invalid: Invalid) -> Self {
        Error::Invalid(invalid)
    }
}

impl From<anyhow::Error> for Error {
    fn from(error: anyhow::Error) -> Self {
        Error::Failed(error)
    }
}
