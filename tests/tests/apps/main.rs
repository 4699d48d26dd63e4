//! Real applications through mappings, while rules come and go beside them.

#![allow(clippy::unwrap_used)]

#[macro_use]
mod common;

mod calls;
mod files;
mod video;
mod web;
