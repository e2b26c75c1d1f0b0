//! The node agent as a library; `main.rs` is only the command line, [`app`] the only wiring.
//!
//! A connection's way: [`interception`] (kernel hooks, in-pod listeners, flow lookup) hands an accepted
//! connection to [`proxy`] (TLS with a certificate from [`trust`], HTTP, upstream), which records through
//! [`recording`] (sessions, masks, journal; what is said on upgraded connections comes from [`streams`]); [`publishing`]
//! carries the journal to Kafka. [`telemetry`] shows how all of them do.

pub mod app;
pub mod auth;
pub mod aws;
pub mod config;
pub mod doctor;
pub mod emergency;
pub mod exec;
pub mod explain;
pub mod guard_unit;
pub mod interception;
mod key_file;
pub mod nri;
pub mod proxy;
pub mod publishing;
pub mod readiness;
mod recipients;
pub mod recording;
pub mod removal;
pub mod signing;
pub mod status;
mod storage;
pub mod streams;
pub mod support;
pub mod telemetry;
pub mod traces;
pub mod trust;
