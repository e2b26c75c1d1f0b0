//! What spares the programs look-ups, kept true: marks of the addresses of the API set, and the generation of that and of the
//! map of cgroups.
//!
//! Both may be written by several processes at a time (an agent and its successor, `weir-agent guard`), so each write is one
//! that does not depend on what was there: a mark is set and never taken away, and a generation is a random number, which no
//! other write has and nobody can foresee.

use std::sync::{
    Mutex,
    atomic::{Ordering, fence},
};

use aya::maps::{Array, MapData};
use rand::{RngCore as _, rngs::OsRng};
use weir_common::{
    kernel::{Address, maps},
    sieve::{doubt_of, slot_of},
};

use super::{
    loader::{Kernel, KernelError},
    maps::lock,
};

/// A slot that an address of the API set has.
const MARKED: u64 = 1;

/// Marks and generation.
pub(super) struct Sieve {
    pub(super) marks: Mutex<Array<MapData, u64>>,
    pub(super) doubts: Mutex<Array<MapData, u64>>,
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

    /// Marks an address that a pod was told, as the kernel does.
    pub(super) fn doubt(&self, address: Address) -> Result<(), KernelError> {
        self.mark(address)?;
        lock(&self.doubts)
            .set(doubt_of(words(address)), MARKED, 0)
            .map_err(|source| KernelError::Map { map: maps::DOUBTS, source })
    }

    /// Makes a change of the map of cgroups or the API set: when this returns, it holds for every connection.
    pub(super) fn change(&self, change: impl FnOnce() -> Result<(), KernelError>) -> Result<(), KernelError> {
        changed(&mut lock(&self.generation), change)
    }
}

impl Kernel {
    /// The generation that holds at this moment; 0: what was kept does not count.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn generation(&self) -> Result<u64, KernelError> {
        lock(&self.sieve.generation)
            .get(&0, 0)
            .map_err(|source| KernelError::Map { map: maps::GENERATION, source })
    }
}

/// The generation in which the programs keep nothing, and use nothing that was kept.
const NOTHING_KEPT: u64 = 0;

/// Makes a change between two generations, in which nothing that is kept counts. A process that is killed after its change and
/// before the next generation leaves it so, and the maps are asked for everything until another begins: what was kept before
/// must not outlive the change.
pub(super) fn changed(
    generation: &mut Array<MapData, u64>,
    change: impl FnOnce() -> Result<(), KernelError>,
) -> Result<(), KernelError> {
    set_generation(generation, NOTHING_KEPT)?;
    let changed = change();
    // Also after one that failed: it may be there in part, and a new generation is right whatever is there.
    set_generation(generation, new_generation())?;
    changed
}

/// One that was never there before. Its highest bit is 0, which the programs rely on (`after` in `ebpf/src/sieve.rs`). Without
/// randomness nothing is kept.
fn new_generation() -> u64 {
    let mut bytes = [0; 8];
    match OsRng.try_fill_bytes(&mut bytes) {
        Ok(()) => u64::from_ne_bytes(bytes) >> 1,
        Err(_) => NOTHING_KEPT,
    }
}

/// Writes the generation. What was written before is seen by whoever sees it, and whoever sees what is written next sees it.
fn set_generation(generation: &mut Array<MapData, u64>, value: u64) -> Result<(), KernelError> {
    fence(Ordering::SeqCst);
    generation.set(0, value, 0).map_err(|source| KernelError::Map { map: maps::GENERATION, source })?;
    fence(Ordering::SeqCst);
    Ok(())
}

/// An address by its words in memory, as the programs read it.
fn words(address: Address) -> [u32; 4] {
    let mut words = [0; 4];
    for (word, bytes) in words.iter_mut().zip(address.as_chunks().0) {
        *word = u32::from_ne_bytes(*bytes);
    }
    words
}
