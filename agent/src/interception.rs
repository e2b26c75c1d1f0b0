//! From the kernel's hooks to an accepted connection whose caller is known.

pub mod cluster_access;
pub mod cluster_watch;
pub mod pod;
pub mod process;
