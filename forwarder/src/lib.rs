//! The controller of the port forwarder: it owns the rules and keeps a data path equal to them.

pub mod api;
pub mod client;
pub mod config;
pub mod controller;
pub mod ctl;
pub mod datapath;
pub mod listeners;
pub mod network;
pub mod rule;
pub mod store;
