//! The Merkle tree of RFC 6962 (section 2.1), grown leaf by leaf, and its proofs.
//!
//! The leaf of an event is SHA-256(0x00 ‖ value), a node SHA-256(0x01 ‖ left ‖ right); the left subtree of a tree
//! of n leaves holds the largest power of two below n. Sans-IO.

use sha2::{Digest, Sha256};

/// A SHA-256 digest.
pub type Hash = [u8; 32];

/// Hash of a leaf.
pub fn leaf_hash(value: &[u8]) -> Hash {
    Sha256::new().chain_update([0]).chain_update(value).finalize().into()
}

/// Hash of an inner node.
pub fn node_hash(left: &Hash, right: &Hash) -> Hash {
    Sha256::new().chain_update([1]).chain_update(left).chain_update(right).finalize().into()
}

/// Most leaves of a tree that goes on from its peaks: far more than any log has, and far from where numbers end.
pub const LEAVES_MAX: u64 = 1 << 48;

/// A tree of which only the roots of its perfect subtrees are kept: at most 64 hashes, however long the log.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tree {
    /// Roots of perfect subtrees, largest (leftmost) first: one for each bit set in `size`.
    peaks: Vec<Hash>,
    size: u64,
}

impl Tree {
    /// The empty tree.
    pub fn new() -> Self {
        Self::default()
    }

    /// Goes on from a tree whose [`Self::peaks`] were kept; none if there are not as many as a tree of this size has, or
    /// if it is larger than [`LEAVES_MAX`].
    pub fn from_peaks(size: u64, peaks: Vec<Hash>) -> Option<Self> {
        let is_one = size <= LEAVES_MAX && peaks.len() == size.count_ones() as usize;
        is_one.then_some(Self { peaks, size })
    }

    /// Roots of the perfect subtrees, the largest (leftmost) first: one for each bit set in the size.
    pub fn peaks(&self) -> &[Hash] {
        &self.peaks
    }

    /// Number of leaves.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Appends a leaf, given its [`leaf_hash`].
    pub fn push(&mut self, leaf: Hash) {
        self.push_with(leaf, &mut |_| ());
    }

    /// Appends a leaf and shows each root of a perfect subtree that is complete with it, the leaf first: over a whole log
    /// that is the order of [`node_position`].
    pub fn push_with(&mut self, leaf: Hash, complete: &mut dyn FnMut(&Hash)) {
        let mut carry = leaf;
        let mut rest = self.size;
        complete(&carry);
        while rest & 1 == 1 {
            let Some(left) = self.peaks.pop() else { break };
            carry = node_hash(&left, &carry);
            complete(&carry);
            rest >>= 1;
        }
        self.peaks.push(carry);
        // Cannot overflow: it starts at LEAVES_MAX at most, and nobody pushes 2^63 times.
        self.size += 1;
    }

    /// The root; of the empty tree it is SHA-256 of nothing.
    pub fn root(&self) -> Hash {
        let mut peaks = self.peaks.iter().rev();
        let Some(last) = peaks.next() else { return Sha256::digest([]).into() };
        peaks.fold(*last, |right, left| node_hash(left, &right))
    }
}

/// The root over `leaves` (hashes of leaves).
pub fn root(leaves: &[Hash]) -> Hash {
    let mut tree = Tree::new();
    leaves.iter().for_each(|leaf| tree.push(*leaf));
    tree.root()
}

/// Place of a perfect subtree's root where they are written down as they become complete, from 0: the subtree has
/// 2^`level` leaves, the first of them is `index` × 2^`level`.
pub fn node_position(level: u32, index: u64) -> u64 {
    let first = index << level;
    2 * first - u64::from(first.count_ones()) + (2 << level) - 2
}

/// The perfect subtrees over the leaves from `first` (a multiple of their largest) up to `size`, as (level, index).
fn perfect_subtrees(first: u64, size: u64) -> impl Iterator<Item = (u32, u64)> {
    let (mut first, mut left) = (first, size.saturating_sub(first));
    std::iter::from_fn(move || {
        let level = left.checked_ilog2()?;
        let subtree = (level, first >> level);
        first += 1 << level;
        left -= 1 << level;
        Some(subtree)
    })
}

/// Proves that the leaf at `index` is in the tree over `size` leaves, given the roots of perfect subtrees: that of
/// [`node_position`]`(level, index)`. None if there is no such leaf.
///
/// # Errors
/// What `node` returns.
pub fn inclusion_path<E>(
    index: u64,
    size: u64,
    node: &mut dyn FnMut(u32, u64) -> Result<Hash, E>,
) -> Result<Option<Vec<Hash>>, E> {
    if index >= size {
        return Ok(None);
    }
    let (mut at, mut last, mut level, mut proof) = (index, size - 1, 0, Vec::new());
    while last > 0 {
        if at & 1 == 1 {
            proof.push(node(level, at - 1)?);
        } else if at + 1 < last {
            proof.push(node(level, at + 1)?);
        } else if at < last {
            // The right edge: not perfect, but made of perfect ones, the smallest last.
            let mut roots = Vec::new();
            for (level, index) in perfect_subtrees((at + 1) << level, size) {
                roots.push(node(level, index)?);
            }
            proof.extend(roots.into_iter().rev().reduce(|right, left| node_hash(&left, &right)));
        }
        (at, last, level) = (at >> 1, last >> 1, level + 1);
    }
    Ok(Some(proof))
}

/// Largest power of two below `length`, which is at least 2.
fn split(length: u64) -> u64 {
    1 << (63 - (length - 1).leading_zeros())
}

/// Proves that the leaf at `index` is in the tree over `leaves`; none if there is no such leaf.
pub fn inclusion_proof(leaves: &[Hash], index: usize) -> Option<Vec<Hash>> {
    if index >= leaves.len() {
        return None;
    }
    let (mut leaves, mut index, mut proof) = (leaves, index, Vec::new());
    while leaves.len() > 1 {
        let (left, right) = leaves.split_at(split(leaves.len() as u64) as usize);
        if index < left.len() {
            proof.push(root(right));
            leaves = left;
        } else {
            proof.push(root(left));
            index -= left.len();
            leaves = right;
        }
    }
    proof.reverse();
    Some(proof)
}

/// Whether `proof` shows that `leaf` is at `index` of the tree with `size` leaves and this root (RFC 9162, 2.1.3.2).
pub fn verify_inclusion(leaf: &Hash, index: u64, size: u64, root: &Hash, proof: &[Hash]) -> bool {
    if index >= size {
        return false;
    }
    let (mut node, mut last, mut hash) = (index, size - 1, *leaf);
    for sibling in proof {
        if last == 0 {
            return false;
        }
        if node & 1 == 1 || node == last {
            hash = node_hash(sibling, &hash);
            while node & 1 == 0 && node != 0 {
                node >>= 1;
                last >>= 1;
            }
        } else {
            hash = node_hash(&hash, sibling);
        }
        node >>= 1;
        last >>= 1;
    }
    last == 0 && hash == *root
}

/// Proves that the tree over the first `old_size` leaves is a prefix of the tree over `leaves`; none if it is longer.
pub fn consistency_proof(leaves: &[Hash], old_size: usize) -> Option<Vec<Hash>> {
    if old_size > leaves.len() {
        return None;
    }
    let mut proof = Vec::new();
    if old_size == 0 || old_size == leaves.len() {
        return Some(proof);
    }
    let (mut leaves, mut old, mut whole) = (leaves, old_size, true);
    while old != leaves.len() {
        let (left, right) = leaves.split_at(split(leaves.len() as u64) as usize);
        if old <= left.len() {
            proof.push(root(right));
            leaves = left;
        } else {
            proof.push(root(left));
            old -= left.len();
            whole = false;
            leaves = right;
        }
    }
    if !whole {
        proof.push(root(leaves));
    }
    proof.reverse();
    Some(proof)
}

/// Whether `proof` shows that the tree of `old_size` leaves with `old_root` is a prefix of the tree of `new_size` leaves
/// with `new_root` (RFC 9162, 2.1.4.2). The empty tree is a prefix of every tree.
pub fn verify_consistency(
    old_size: u64,
    old_root: &Hash,
    new_size: u64,
    new_root: &Hash,
    proof: &[Hash],
) -> bool {
    if old_size > new_size {
        return false;
    }
    if old_size == 0 {
        return proof.is_empty() && *old_root == Tree::new().root();
    }
    if old_size == new_size {
        return proof.is_empty() && old_root == new_root;
    }
    let mut path = proof.iter();
    let first = if old_size.is_power_of_two() { Some(old_root) } else { path.next() };
    let Some(first) = first else { return false };
    let (mut node, mut last) = (old_size - 1, new_size - 1);
    while node & 1 == 1 {
        node >>= 1;
        last >>= 1;
    }
    let (mut old_hash, mut new_hash) = (*first, *first);
    for sibling in path {
        if last == 0 {
            return false;
        }
        if node & 1 == 1 || node == last {
            old_hash = node_hash(sibling, &old_hash);
            new_hash = node_hash(sibling, &new_hash);
            while node & 1 == 0 && node != 0 {
                node >>= 1;
                last >>= 1;
            }
        } else {
            new_hash = node_hash(&new_hash, sibling);
        }
        node >>= 1;
        last >>= 1;
    }
    last == 0 && old_hash == *old_root && new_hash == *new_root
}

#[cfg(test)]
mod tests {
    use super::{
        Hash, LEAVES_MAX, Tree, consistency_proof, inclusion_path, inclusion_proof, leaf_hash, node_hash,
        node_position, root, split, verify_consistency, verify_inclusion,
    };

    /// The definition of RFC 6962, word for word.
    fn recursive(leaves: &[Hash]) -> Hash {
        match leaves {
            [] => Tree::new().root(),
            [one] => *one,
            _ => {
                let (left, right) = leaves.split_at(split(leaves.len() as u64) as usize);
                node_hash(&recursive(left), &recursive(right))
            }
        }
    }

    fn leaves(count: u8) -> Vec<Hash> {
        (0..count).map(|n| leaf_hash(&[n])).collect()
    }

    #[test]
    fn the_empty_tree_and_the_empty_leaf_have_the_hashes_of_the_rfc() {
        let hex = |hash: Hash| hex::encode(hash);
        assert_eq!(
            hex(Tree::new().root()),
            "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
        );
        assert_eq!(hex(leaf_hash(b"")), "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d");
    }

    #[test]
    fn the_tree_grown_leaf_by_leaf_has_the_root_of_the_definition() {
        for count in 0..70 {
            assert_eq!(root(&leaves(count)), recursive(&leaves(count)), "{count} leaves");
        }
    }

    #[test]
    fn a_tree_goes_on_from_its_peaks_as_if_it_had_not_been_left() {
        for count in 0..70_u8 {
            let (mut whole, mut first) = (Tree::new(), Tree::new());
            for (n, leaf) in (0..).zip(leaves(70)) {
                whole.push(leaf);
                if n < count {
                    first.push(leaf);
                }
            }
            let mut rest = Tree::from_peaks(first.size(), first.peaks().to_vec()).unwrap();
            assert_eq!(rest, first);
            leaves(70)[usize::from(count)..].iter().for_each(|leaf| rest.push(*leaf));
            assert_eq!(rest, whole);
        }
        assert_eq!(Tree::from_peaks(3, vec![leaf_hash(b"")]), None);
        assert_eq!(Tree::from_peaks(u64::MAX, Vec::new()), None);
        assert_eq!(Tree::from_peaks(u64::MAX, vec![[0; 32]; 64]), None, "it could not grow");
        assert!(Tree::from_peaks(LEAVES_MAX, vec![[0; 32]]).is_some());
    }

    #[test]
    fn proofs_from_nodes_as_they_became_complete_are_those_of_the_definition() {
        for count in 1..70_u8 {
            let leaves = leaves(count);
            for kept in [0, 1, 6, 7, count / 2] {
                // What is before `kept` is known by its peaks alone.
                let (mut tree, mut nodes) = (Tree::new(), vec![None; 150]);
                let kept = kept.min(count);
                for (n, leaf) in (0..).zip(&leaves) {
                    if n == kept {
                        nodes = vec![None; 150];
                        let mut first = 0_u64;
                        for (bit, peak) in (0..8).rev().filter(|bit| kept >> bit & 1 == 1).zip(tree.peaks()) {
                            nodes[node_position(bit, first >> bit) as usize] = Some(*peak);
                            first += 1 << bit;
                        }
                    }
                    let mut position = node_position(0, u64::from(n)) as usize;
                    tree.push_with(*leaf, &mut |node| {
                        nodes[position] = Some(*node);
                        position += 1;
                    });
                    assert_eq!(position, node_position(0, u64::from(n) + 1) as usize);
                }
                for index in usize::from(kept)..leaves.len() {
                    let mut node =
                        |level, index| nodes[node_position(level, index) as usize].ok_or((level, index));
                    let path = inclusion_path(index as u64, u64::from(count), &mut node).unwrap();
                    assert_eq!(path, inclusion_proof(&leaves, index), "{index} of {count}, {kept} kept");
                }
            }
        }
        assert_eq!(inclusion_path::<()>(3, 3, &mut |_, _| Err(())), Ok(None));
    }

    #[test]
    fn every_leaf_is_provably_included_and_no_other_is() {
        for count in 1..40_u8 {
            let leaves = leaves(count);
            let root = root(&leaves);
            for index in 0..leaves.len() {
                let proof = inclusion_proof(&leaves, index).unwrap();
                let holds =
                    |leaf: &Hash, index| verify_inclusion(leaf, index, u64::from(count), &root, &proof);
                assert!(holds(&leaves[index], index as u64));
                assert!(!holds(&leaf_hash(b"other"), index as u64));
                assert!(!holds(&leaves[index], index as u64 + 1));
            }
        }
        assert_eq!(inclusion_proof(&leaves(3), 3), None);
    }

    #[test]
    fn every_prefix_is_provably_consistent_and_a_changed_one_is_not() {
        for count in 0..40_u8 {
            let leaves = leaves(count);
            let new_root = root(&leaves);
            for old in 0..=leaves.len() {
                let proof = consistency_proof(&leaves, old).unwrap();
                let holds = |old_root: &Hash| {
                    verify_consistency(old as u64, old_root, u64::from(count), &new_root, &proof)
                };
                assert!(holds(&root(&leaves[..old])), "{old} of {count}");
                assert!(!holds(&leaf_hash(b"other")), "{old} of {count}");
            }
        }
        assert_eq!(consistency_proof(&leaves(3), 4), None);
    }
}
