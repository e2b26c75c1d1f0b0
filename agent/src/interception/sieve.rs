//! What spares the programs look-ups, kept true: marks of the addresses of the API set, and the generation of that and of the
//! map of cgroups.
//!
//! Both may be written by several processes at a time (an agent and its successor, `weir-agent guard`), so each write is one
//! that does not depend on what was there: a mark is set and never taken away, and a generation is a time, which no other
//! write can have.

use std::sync::{
    Mutex,
    atomic::{Ordering, fence},
};

use aya::maps::{Array, MapData};
use weir_common::{
    kernel::{Address, maps},
    sieve::slot_of,
};

use super::{flow::boottime_ns, loader::KernelError, maps::lock};

/// A slot that an address of the API set has.
const MARKED: u64 = 1;

/// Marks and generation.
pub(super) struct Sieve {
    pub(super) marks: Mutex<Array<MapData, u64>>,
    pub(super) generation: Mutex<Array<MapData, u64>>,
}

impl Sieve {
    /// Marks an address. To be called before it comes into the API set: without its mark the programs would not look.
    pub(super) fn mark(&self, address: Address) -> Result<(), KernelError> {
        lock(&self.marks)
            .set(slot_of(words(address)), MARKED, 0)
            .map_err(|source| KernelError::Map { map: maps::SIEVE, source })?;
        // The mark is seen by whoever sees what follows.
        fence(Ordering::SeqCst);
        Ok(())
    }

    /// Begins a new generation. To be called after each change of the map of cgroups or the API set: when this returns, the
    /// change holds for every connection.
    pub(super) fn begin_generation(&self) -> Result<(), KernelError> {
        // Whoever sees the generation sees the change.
        fence(Ordering::SeqCst);
        // A clock that cannot be read gives 0, with which nothing is kept.
        lock(&self.generation)
            .set(0, boottime_ns().unwrap_or(0), 0)
            .map_err(|source| KernelError::Map { map: maps::GENERATION, source })
    }
}

/// An address by its words in memory, as the programs read it.
fn words(address: Address) -> [u32; 4] {
    let mut words = [0; 4];
    for (word, bytes) in words.iter_mut().zip(address.as_chunks().0) {
        *word = u32::from_ne_bytes(*bytes);
    }
    words
}
