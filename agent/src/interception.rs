//! From the kernel's hooks to an accepted connection whose caller is known.
//!
//! [`loader`] puts the programs into the kernel and writes their maps, [`attach`] keeps them attached, [`listener`]
//! listens in other network namespaces, [`accept`] lets through what [`flow`], [`caller`] and [`process`] vouch for,
//! [`cluster_watch`] and [`pod`] which pods there are. What a connection says is not read here.

pub mod accept;
pub mod attach;
pub mod caller;
pub mod cgroup;
pub mod cluster_access;
pub mod cluster_watch;
pub mod flow;
pub mod listener;
pub mod loader;
pub mod pod;
pub mod process;
