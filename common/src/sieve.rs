//! What spares the kernel programs look-ups in hash maps: which word of the sieve an address has, and what is kept of a walk
//! up the cgroup tree. Layouts as in [`kernel`](crate::kernel), and part of its version; nothing here decides anything.

use crate::kernel::CgroupEntry;

/// Slots of the [sieve](crate::kernel::maps::SIEVE); a power of two. A full API set (half of it addresses, half addresses
/// with ports) marks two fifths of them.
pub const SIEVE_SLOTS: u32 = 65_536;
/// Slots of the [doubts](crate::kernel::maps::DOUBTS); a power of two, not above that of the sieve.
pub const DOUBT_SLOTS: u32 = 8192;
/// Slots for what was found above a cgroup ([`Nearest`]); a power of two, far more than a node has containers.
pub const NEAREST_SLOTS: u32 = 2048;
/// Slots for what was found in the API set ([`Endpoint`]); a power of two, far more than a node talks to.
pub const ENDPOINT_SLOTS: u32 = 512;

/// Slots of the [counters at hand](crate::kernel::maps::POD_SLOTS); a power of two, far more than a node has pods.
pub const POD_SLOTS: u32 = 4096;

/// The slot of the sieve that an address marks, given by its words in memory.
#[inline(always)]
pub const fn slot_of(address: [u32; 4]) -> u32 {
    let [high, low] = halves(address);
    slot(high.wrapping_mul(ODD) ^ low, SIEVE_SLOTS)
}

/// The slot of the [doubts](crate::kernel::maps::DOUBTS) that an address marks which a pod was told.
#[inline(always)]
pub const fn doubt_of(address: [u32; 4]) -> u32 {
    slot_of(address) / (SIEVE_SLOTS / DOUBT_SLOTS)
}

/// The slot in which an address and port are kept.
#[inline(always)]
pub const fn endpoint_slot(address: [u32; 4], port: u32) -> u32 {
    let [high, low] = halves(address);
    slot(high.wrapping_mul(ODD) ^ low.wrapping_add((port as u64).wrapping_mul(ODD2)), ENDPOINT_SLOTS)
}

/// The slot in which a cgroup's [`Nearest`] is kept.
#[inline(always)]
pub const fn nearest_slot(cgroup: u64) -> u32 {
    slot(cgroup, NEAREST_SLOTS)
}

/// The slot in which a pod's cgroup is [counted](crate::kernel::maps::POD_SLOTS).
#[inline(always)]
pub const fn pod_slot(cgroup: u64) -> u32 {
    slot(cgroup, POD_SLOTS)
}

const fn halves([first, second, third, last]: [u32; 4]) -> [u64; 2] {
    [first as u64 | (second as u64) << 32, third as u64 | (last as u64) << 32]
}

/// 2^64 divided by the golden ratio: multiplied with it, neighbours fall far apart (Knuth, volume 3, 6.4).
const ODD: u64 = 0x9e37_79b9_7f4a_7c15;
const ODD2: u64 = ODD.wrapping_mul(ODD);
const ODD3: u64 = ODD2.wrapping_mul(ODD);
const ODD4: u64 = ODD3.wrapping_mul(ODD);
const ODD5: u64 = ODD4.wrapping_mul(ODD);

/// The upper bits of a product depend on all bits below them, so the upper half is brought down before each.
#[inline(always)]
const fn slot(value: u64, slots: u32) -> u32 {
    let mixed = (value ^ value >> 32).wrapping_mul(ODD);
    let mixed = (mixed ^ mixed >> 32).wrapping_mul(ODD);
    (mixed >> (u64::BITS - slots.trailing_zeros())) as u32
}

/// How many levels of the cgroup tree below the root are looked at. Pods lie on levels 2 to 5; what a container nests below its own
/// cgroup is covered by the pod's entry, so a deeper task is still found.
pub const LEVELS_MAX: u32 = 15;

/// A walk from the root down to a cgroup, which keeps the deepest match. No `Option` in it: of one the compiler would copy what
/// was never written, which the verifier refuses. One step at a time, so that the kernel verifies one.
///
/// What is found may be kept for a cgroup only if the walk has ended there: a task may be moved to another cgroup meanwhile,
/// and one that lies deeper than this looks is not reached. (Moved away and back within one walk, it would be taken for one
/// that stayed; each move waits for locks of the whole tree, which takes many times as long.)
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Walk {
    /// The nearest classified cgroup; 0: there is none.
    pub id: u64,
    /// Its entry, or any.
    pub entry: CgroupEntry,
    /// The last cgroup that was met.
    pub deepest: u64,
    after: u64,
}

impl Walk {
    /// At the root, of which nothing is ever said: it holds everything. `ancestor` gives the id of the cgroup at a level, 0 below the
    /// last one.
    ///
    /// `after` is 0, but comes from the generation: no level and no entry is read before that was, on any processor, since
    /// where they are read depends on it. Older kernels (before 6.1) find an ancestor by comparing levels, on which its
    /// address does not depend, so the key of the entry does as well.
    #[inline(always)]
    pub fn begin(after: u32, ancestor: impl Fn(i32) -> u64) -> Self {
        let entry = CgroupEntry { listener_netns: after as u64, class: after, listener_port: after };
        // A 0 the verifier would know, and look at everything behind it twice.
        let none = after as u64;
        Self { id: none, entry, deepest: ancestor(after as i32), after: none }
    }

    /// Looks at a level, from 1 on. `entry` gives what is known of a cgroup. Whether the walk has ended.
    #[inline(always)]
    pub fn step(
        &mut self,
        level: i32,
        ancestor: impl Fn(i32) -> u64,
        entry: impl Fn(u64) -> Option<CgroupEntry>,
    ) -> bool {
        let id = ancestor(self.after as i32 + level);
        if id == 0 {
            return true;
        }
        self.deepest = id;
        if let Some(entry) = entry(id + self.after) {
            (self.id, self.entry) = (id, entry);
        }
        false
    }
}

/// What was found at and above a cgroup, kept so that the walk up the tree is made once; value of the array indexed by
/// [`nearest_slot`]. Several CPUs may write a slot at a time, and a reader may see a part of each: only what
/// [`Self::found`] gives is whole.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Nearest {
    /// The cgroup that was asked for.
    pub cgroup: u64,
    /// The [generation](crate::kernel::maps::GENERATION) in which that was.
    pub generation: u64,
    /// The nearest classified cgroup; 0: there is none.
    pub id: u64,
    /// `listener_netns` of its entry.
    pub listener_netns: u64,
    /// `class` of its entry, and above it `listener_port`.
    pub class_and_port: u64,
    /// Of all the others together.
    pub seal: u64,
}

impl Nearest {
    /// What is to be kept: the nearest classified cgroup and its entry, or 0 and any entry.
    #[inline(always)]
    pub const fn new(cgroup: u64, generation: u64, (id, entry): (u64, CgroupEntry)) -> Self {
        let CgroupEntry { listener_netns, class, listener_port } = entry;
        let class_and_port = class as u64 | (listener_port as u64) << 32;
        let kept = Self { cgroup, generation, id, listener_netns, class_and_port, seal: 0 };
        Self { seal: kept.seal(), ..kept }
    }

    /// What was found above this cgroup, as [`Self::new`] was told it, if that was in this generation and the slot is whole.
    /// Generation 0 stands for none.
    #[inline(always)]
    pub const fn found(&self, cgroup: u64, generation: u64) -> Option<(u64, CgroupEntry)> {
        if generation == 0
            || self.cgroup != cgroup
            || self.generation != generation
            || self.seal != self.seal()
        {
            return None;
        }
        let entry = CgroupEntry {
            listener_netns: self.listener_netns,
            class: self.class_and_port as u32,
            listener_port: (self.class_and_port >> 32) as u32,
        };
        Some((self.id, entry))
    }

    /// Each field times an odd number of its own: slots that differ in one field never have the same seal, those that differ
    /// in several by a chance of 2^-64.
    #[inline(always)]
    const fn seal(&self) -> u64 {
        self.cgroup
            .wrapping_mul(ODD)
            .wrapping_add(self.generation.wrapping_mul(ODD2))
            .wrapping_add(self.id.wrapping_mul(ODD3))
            .wrapping_add(self.listener_netns.wrapping_mul(ODD4))
            .wrapping_add(self.class_and_port.wrapping_mul(ODD5))
    }
}

/// An entry of the API set that was found, kept so that it is looked up once; value of the array indexed by
/// [`endpoint_slot`]. Written and read like [`Nearest`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Endpoint {
    /// The halves of the address.
    pub address: [u64; 2],
    /// The port, and above it the entry's value.
    pub port_and_cluster: u64,
    /// The [generation](crate::kernel::maps::GENERATION) in which it was found.
    pub generation: u64,
    /// Of all the others together.
    pub seal: u64,
}

impl Endpoint {
    /// What is to be kept.
    #[inline(always)]
    pub const fn new(address: [u32; 4], port: u32, generation: u64, cluster: u32) -> Self {
        let port_and_cluster = port as u64 | (cluster as u64) << 32;
        let kept = Self { address: halves(address), port_and_cluster, generation, seal: 0 };
        Self { seal: kept.seal(), ..kept }
    }

    /// The value that this address and port had, if that was in this generation and the slot is whole. Generation 0 stands
    /// for none.
    #[inline(always)]
    pub const fn found(&self, address: [u32; 4], port: u32, generation: u64) -> Option<u32> {
        let [high, low] = halves(address);
        let is_it = generation != 0
            && self.address[0] == high
            && self.address[1] == low
            && self.port_and_cluster as u32 == port
            && self.generation == generation
            && self.seal == self.seal();
        if is_it { Some((self.port_and_cluster >> 32) as u32) } else { None }
    }

    /// As that of [`Nearest`].
    #[inline(always)]
    const fn seal(&self) -> u64 {
        let [high, low] = self.address;
        high.wrapping_mul(ODD)
            .wrapping_add(low.wrapping_mul(ODD2))
            .wrapping_add(self.port_and_cluster.wrapping_mul(ODD3))
            .wrapping_add(self.generation.wrapping_mul(ODD4))
    }
}

/// What is counted of a pod most often, at hand without a look-up in a hash map; value of the per-CPU array by
/// [`pod_slot`]. Counted besides what its [`PodCounters`](crate::kernel::PodCounters) have, never twice: together they are what happened.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PodSlot {
    /// The pod's cgroup; 0: nobody's. Pods whose slot is another's are counted in the hash map alone.
    pub cgroup: u64,
    /// Connects that were redirected, each of which was seen.
    pub redirected: u64,
}

const _: () = {
    assert!(size_of::<Nearest>() == 48);
    assert!(size_of::<PodSlot>() == 16);
    assert!(size_of::<Endpoint>() == 40);
    assert!(
        SIEVE_SLOTS.is_power_of_two() && NEAREST_SLOTS.is_power_of_two() && ENDPOINT_SLOTS.is_power_of_two()
    );
};

#[cfg(test)]
mod tests {
    use super::{
        CgroupEntry, ENDPOINT_SLOTS, Endpoint, LEVELS_MAX, NEAREST_SLOTS, Nearest, SIEVE_SLOTS, Walk,
        endpoint_slot, nearest_slot, pod_slot, slot_of,
    };

    /// Programs that are pinned read where these say: another hash is another layout (`LAYOUT_VERSION`).
    #[test]
    fn slots_are_part_of_the_layout() {
        let addresses = [[0, 0, 0xffff_0000, 0x0100_600a], [0xb80d_0120, 0, 0, 0x0100_0000], [1, 2, 3, 4]];
        assert_eq!((crate::kernel::LAYOUT_VERSION, addresses.map(slot_of)), (3, [56482, 54395, 56132]));
        assert_eq!((endpoint_slot(addresses[0], 443), nearest_slot(9), pod_slot(9)), (156, 1722, 3445));
    }

    const ENTRY: CgroupEntry = CgroupEntry { listener_netns: 7, class: 3, listener_port: 40_000 };

    /// A whole walk, as the kernel makes it.
    fn walk(after: u32, ancestor: impl Fn(i32) -> u64, entry: impl Fn(u64) -> Option<CgroupEntry>) -> Walk {
        let mut walk = Walk::begin(after, &ancestor);
        let _ended = (1..=LEVELS_MAX as i32).any(|level| walk.step(level, &ancestor, &entry));
        walk
    }

    #[test]
    fn a_walk_that_does_not_end_at_its_cgroup_says_so() {
        let class = |class| CgroupEntry { class, ..ENTRY };
        let known = |id| [(20, class(3)), (30, class(2))].into_iter().find(|(known, _)| *known == id);
        let entry = |id| known(id).map(|(_, entry)| entry);
        let tree = |path: &'static [u64]| move |level: i32| path.get(level as usize).copied().unwrap_or(0);
        for (path, nearest) in
            [(&[1][..], 0), (&[1, 20], 20), (&[1, 20, 21], 20), (&[1, 10, 20, 30, 31], 30), (&[1, 10, 11], 0)]
        {
            let found = walk(0, tree(path), entry);
            assert_eq!((found.id, found.deepest), (nearest, *path.last().unwrap()), "{path:?}");
            assert!(known(nearest).is_none_or(|(_, entry)| entry == found.entry), "{path:?}");
        }
        // A task that is moved between its first and its last step, from the cgroup that was asked for to another.
        for moved in 0..3 {
            let (one, other) = (tree(&[1, 20, 21]), tree(&[1, 10, 30]));
            let steps = std::cell::Cell::new(0);
            let ancestor = |level| {
                steps.set(steps.get() + 1);
                if steps.get() > moved { other(level) } else { one(level) }
            };
            assert_ne!(walk(0, ancestor, entry).deepest, 21, "moved after {moved} steps");
        }
        // Deeper than anyone looks.
        let deep = |level: i32| if level < 40 { 100 + level as u64 } else { 0 };
        assert_ne!(walk(0, deep, entry).deepest, 139);
    }

    #[test]
    fn what_is_read_after_the_generation_depends_on_it() {
        // Were it not 0, other levels and other entries would be read: so their addresses depend on it.
        let levels = std::cell::RefCell::new(Vec::new());
        let entries = std::cell::RefCell::new(Vec::new());
        let ancestor = |level: i32| {
            levels.borrow_mut().push(level);
            if level < 3 { 50 } else { 0 }
        };
        let entry = |id| {
            entries.borrow_mut().push(id);
            None
        };
        walk(1, ancestor, entry);
        assert_eq!((levels.take(), entries.take()), (vec![1, 2, 3], vec![51]));
    }

    #[test]
    fn what_is_kept_is_given_for_its_cgroup_and_generation_alone() {
        for found in [(0, CgroupEntry { listener_netns: 0, class: 0, listener_port: 0 }), (5, ENTRY)] {
            let kept = Nearest::new(9, 2, found);
            assert_eq!(kept.found(9, 2), Some(found));
            assert_eq!(kept.found(8, 2), None, "another cgroup's");
            assert_eq!(kept.found(9, 3), None, "from before a change");
        }
        assert_eq!(Nearest::default().found(9, 2), None, "a slot that was never written");
        assert_eq!(Nearest::default().found(0, 0), None);
        assert_eq!(Nearest::new(9, 0, (5, ENTRY)).found(9, 0), None, "nothing may be kept");
    }

    #[test]
    fn a_slot_that_is_put_together_from_two_is_none() {
        let one = Nearest::new(9, 2, (5, ENTRY));
        let unselected = CgroupEntry { listener_netns: 0, class: 2, listener_port: 0 };
        let other = Nearest::new(10, 3, (6, unselected));
        let words = |kept: &Nearest| {
            [kept.cgroup, kept.generation, kept.id, kept.listener_netns, kept.class_and_port, kept.seal]
        };
        for mixture in 1..63_u32 {
            let mut mixed = words(&one);
            for (place, word) in
                words(&other).into_iter().enumerate().filter(|(place, _)| mixture >> place & 1 == 1)
            {
                mixed[place] = word;
            }
            let [cgroup, generation, id, listener_netns, class_and_port, seal] = mixed;
            let mixed = Nearest { cgroup, generation, id, listener_netns, class_and_port, seal };
            for (cgroup, generation) in [(9, 2), (10, 3), (9, 3), (10, 2)] {
                assert_eq!(mixed.found(cgroup, generation), None, "{mixture:#b}");
            }
        }
    }

    #[test]
    fn an_endpoint_is_given_as_it_was_found_alone() {
        let address = [1, 2, 3, 4];
        let kept = Endpoint::new(address, 443, 2, u32::MAX);
        assert_eq!(kept.found(address, 443, 2), Some(u32::MAX));
        for (address, port, generation) in [
            ([1, 2, 3, 5], 443, 2),
            ([0, 2, 3, 4], 443, 2),
            (address, 80, 2),
            (address, 443, 3),
            (address, 443, 0),
        ] {
            assert_eq!(kept.found(address, port, generation), None);
        }
        assert_eq!(Endpoint::new(address, 443, 0, 1).found(address, 443, 0), None, "nothing may be kept");
        assert_eq!(Endpoint::default().found([0; 4], 0, 2), None, "a slot that was never written");
        // The value is another's.
        let other = Endpoint::new(address, 443, 3, 0);
        assert_eq!(
            Endpoint { port_and_cluster: other.port_and_cluster, ..kept }.found(address, 443, 2),
            None
        );
        assert_eq!(Endpoint { generation: 3, ..kept }.found(address, 443, 3), None);
    }

    #[test]
    fn neighbours_seldom_share_a_slot() {
        let distinct = |slots: &mut dyn Iterator<Item = u32>, most: u32| {
            let seen: std::collections::HashSet<_> = slots.collect();
            assert!(seen.iter().all(|slot| *slot < most));
            seen.len()
        };
        // Addresses of one network, of every hundredth machine of a larger one, of IPv6 machines; at random 1,970 of 2,000.
        let v4 = |number: u32| slot_of([0, 0, 0xffff_u32.to_be(), (0x0a00_0000 + number).to_be()]);
        let v6 = |number: u32| slot_of([0x2001_0db8_u32.to_be(), 0, number.to_be(), 1_u32.to_be()]);
        assert!(distinct(&mut (0..2000).map(v4), SIEVE_SLOTS) > 1900);
        assert!(distinct(&mut (0..2000).map(|number| v4(number * 100)), SIEVE_SLOTS) > 1900);
        assert!(distinct(&mut (0..2000).map(v6), SIEVE_SLOTS) > 1900);
        let api = (0..50_u32).map(|number| {
            endpoint_slot([0, 0, 0xffff_u32.to_be(), (0x0a00_0000 + number / 5).to_be()], number % 5 + 6440)
        });
        assert!(distinct(&mut api.into_iter(), ENDPOINT_SLOTS) > 40);
        assert!(distinct(&mut (1..250).map(|id| nearest_slot(id * 37)), NEAREST_SLOTS) > 200);
    }
}
