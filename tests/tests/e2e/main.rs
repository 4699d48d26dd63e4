//! The forwarder end to end: real programs, real network stacks, raw frames. Rows are those of docs/behaviour.md.

#![allow(clippy::unwrap_used)]

#[macro_use]
mod common;

mod changing;
mod choosing;
mod errors;
mod flows;
mod foreign;
mod fragments;
mod hostile;
mod interfaces;
mod limits;
mod living;
mod refusing;
mod sharing;
mod translating;
mod via_stack;
