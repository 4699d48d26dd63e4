//! What the eBPF programs and the controller must agree on: map layouts, reasons and the packet core.
//!
//! The core is written once, over the traits [`packet::Packet`], [`tables::Flows`] and
//! [`tables::World`]. It runs in XDP, in TC, and on the host under tests. A packet goes one way:
//!
//! ```text
//! bytes -> parse -> FlowKey -> tables -> Decision -> rewrite -> Outcome -> counter -> verdict
//! ```
#![cfg_attr(not(any(test, feature = "model")), no_std)]

pub mod address;
pub mod checksum;
pub mod decide;
pub mod family;
pub mod flow;
pub mod fragment;
pub mod icmp;
pub mod layout;
#[cfg(any(test, feature = "model"))]
pub mod model;
pub mod packet;
pub mod parse;
pub mod pipeline;
#[cfg(feature = "user")]
mod pod;
pub mod reason;
pub mod rewrite;
pub mod rule;
pub mod sessions;
pub mod tables;
pub mod tcp;
pub mod wire;
