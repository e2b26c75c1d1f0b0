//! From the kernel's hooks to an accepted connection whose caller is known.
//!
//! [`loader`] puts the programs into the kernel and writes their maps, [`attach`] keeps them attached, [`listener`]
//! listens in other network namespaces, [`accept`] lets through what [`flow`], [`caller`] and [`process`] vouch for,
//! [`cluster_watch`] and [`pod`] which pods there are, `held_back` has their containers wait until they are enrolled, [`api_set`] what is an API server. [`guard`] puts in force what must
//! be so before anything else, with what [`stored_set`] remembers; [`run`] puts it all to work on a node. What a connection says is
//! not read here.

pub mod accept;
pub mod account_rights;
pub mod answers;
pub mod api_set;
pub mod attach;
mod beside;
mod bpf;
pub mod caller;
pub mod canary;
pub mod cgroup;
mod cgroup_tree;
mod claims;
pub mod cluster_access;
pub mod cluster_watch;
pub mod counters;
mod coverage;
mod debug_log;
mod enrolled;
pub mod enrolment;
pub mod flow;
pub mod foreign;
pub mod guard;
pub mod handover;
mod held_back;
#[cfg(test)]
mod held_back_tests;
pub mod hosts;
mod interface;
pub mod layouts;
pub mod leftovers;
pub mod listener;
pub mod loader;
mod maps;
mod namespace;
mod nested;
mod netlink;
pub mod observed;
pub mod pinned;
pub mod pod;
pub mod pod_lookup;
mod pod_network;
pub mod powers;
pub mod presence;
pub mod process;
pub mod proof;
pub mod quarantine;
mod reads;
mod report;
mod resolution;
pub mod run;
pub mod security;
mod security_programs;
mod service_dial;
mod settled;
mod sieve;
mod sockets;
pub mod startup_taint;
pub mod stored_set;
pub mod succession;
mod told;
mod trouble;
pub mod uninstallers;
pub mod usage;
mod verifier_log;
pub mod waits;
