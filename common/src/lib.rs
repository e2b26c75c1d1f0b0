//! What two of Weir's crates must agree on.
//!
//! Without features this crate is `no_std` and holds only what kernel and user space share: [`kernel`] (map
//! layouts), [`sieve`], [`packet`], [`answer`] and [`verdict`]. The feature `record` adds the event schema and the journal format, all of it
//! sans-IO: no tokio, no files, no clock. Nothing here may depend on another crate of this workspace.
#![cfg_attr(not(any(feature = "record", test)), no_std)]

pub mod answer;
pub mod kernel;
pub mod packet;
pub mod sieve;
pub mod verdict;

#[cfg(feature = "record")]
pub mod attributes;
#[cfg(feature = "record")]
pub mod bearer;
#[cfg(feature = "record")]
pub mod checkpoint;
#[cfg(feature = "encryption")]
pub mod encryption;
#[cfg(feature = "record")]
pub mod envelope;
#[cfg(feature = "record")]
pub mod event;
#[cfg(feature = "record")]
pub mod frame;
#[cfg(feature = "kms")]
pub mod kms;
#[cfg(feature = "record")]
pub mod merkle;
#[cfg(feature = "record")]
pub mod message;
#[cfg(feature = "record")]
pub mod removed;
#[cfg(feature = "record")]
pub mod segment;
