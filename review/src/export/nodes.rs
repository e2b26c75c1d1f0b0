//! The roots of a log's perfect subtrees on disk, as they become complete: what proofs are made of.
//!
//! 64 bytes an event, in a temporary file without a name; memory is that of a buffer.

use std::{
    fs::File,
    io::{self, BufWriter, Seek as _, SeekFrom, Write as _},
    os::unix::fs::FileExt as _,
};

use weir_common::merkle::{self, Hash, Tree};

const BUFFER_BYTES: usize = 256 * 1024;

/// A log while its leaves come.
#[derive(Debug)]
pub(super) struct Growing {
    tree: Tree,
    file: BufWriter<File>,
}

impl Growing {
    /// Goes on from `tree`: of what it covers only the peaks are known.
    pub(super) fn from(tree: Tree) -> io::Result<Self> {
        let file = tempfile::tempfile()?;
        let mut first = 0;
        let bits = (0..u64::BITS).rev().filter(|bit| tree.size() >> bit & 1 == 1);
        for (level, peak) in bits.zip(tree.peaks()) {
            file.write_all_at(peak, offset(level, first >> level))?;
            first += 1 << level;
        }
        let mut file = BufWriter::with_capacity(BUFFER_BYTES, file);
        file.seek(SeekFrom::Start(offset(0, tree.size())))?;
        Ok(Self { tree, file })
    }

    pub(super) fn tree(&self) -> &Tree {
        &self.tree
    }

    pub(super) fn push(&mut self, leaf: Hash) -> io::Result<()> {
        let (file, mut written) = (&mut self.file, Ok(()));
        self.tree.push_with(leaf, &mut |node| {
            if written.is_ok() {
                written = file.write_all(node);
            }
        });
        written
    }

    pub(super) fn finish(self) -> io::Result<Nodes> {
        Ok(Nodes(self.file.into_inner().map_err(io::IntoInnerError::into_error)?))
    }
}

/// A log that is complete.
#[derive(Debug)]
pub(super) struct Nodes(File);

impl Nodes {
    /// Proves that the leaf at `index` is in the tree over `size` leaves; none if there is no such leaf.
    pub(super) fn proof(&self, index: u64, size: u64) -> io::Result<Option<Vec<Hash>>> {
        merkle::inclusion_path(index, size, &mut |level, index| {
            let mut node = Hash::default();
            self.0.read_exact_at(&mut node, offset(level, index))?;
            Ok(node)
        })
    }
}

fn offset(level: u32, index: u64) -> u64 {
    merkle::node_position(level, index) * size_of::<Hash>() as u64
}
