//! The programs of `security`, loaded and attached in one of the ways in which a kernel lets programs decide.
//!
//! aya 0.14 loads none that decide in the place of a function. So the object is read once more, by aya's own reader, bound to the
//! maps that are there already, and loaded by `bpf`. Both ways go through here; the instructions are the same.

use std::{
    collections::{BTreeMap, HashSet},
    fmt, io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
};

use aya::{
    Btf, BtfError, Ebpf, features,
    maps::{Map, MapData, MapError},
};
use aya_obj::{
    Object, ParseError,
    btf::{BtfKind, BtfRelocationError},
    generated::bpf_insn,
    relocation::EbpfRelocationError,
};
use weir_common::kernel::programs;

use super::{
    bpf::{self, AtFunction, Load},
    verifier_log,
};

/// Room for what the verifier says.
const LOG_BYTES: usize = 4 << 20;
/// How much of it is told: less than of others, since the guards stand without these programs.
const LOG_TOLD_MAX: usize = 1000;

/// How the kernel lets programs decide in its security hooks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Way {
    /// As one of its security modules: `bpf` is among those of the command line's `lsm=`.
    Lsm,
    /// Before the functions that ask the security modules (`BPF_MODIFY_RETURN`), whatever modules there are.
    ModifyReturn,
}

impl Way {
    /// The better one first: what modifies a function's result is passed by when it interrupts itself (see the decision).
    pub(crate) const ALL: [Self; 2] = [Self::Lsm, Self::ModifyReturn];

    /// Numbers of `enum bpf_prog_type` and `enum bpf_attach_type`, linux/bpf.h.
    fn types(self) -> (u32, u32) {
        match self {
            Self::Lsm => (29, 27),
            Self::ModifyReturn => (26, 26),
        }
    }

    /// The number of `enum bpf_prog_type`, linux/bpf.h.
    pub(super) fn program_type(self) -> u32 {
        self.types().0
    }

    /// That of a link, by its number of `enum bpf_attach_type`.
    pub(super) fn of_attach_type(number: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|way| way.types().1 == number)
    }

    /// The function of the kernel at which a hook is decided.
    fn function(self, hook: &str) -> String {
        match self {
            Self::Lsm => format!("bpf_lsm_{hook}"),
            Self::ModifyReturn => format!("security_{hook}"),
        }
    }
}

impl fmt::Display for Way {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Lsm => "BPF LSM",
            Self::ModifyReturn => "BPF_MODIFY_RETURN",
        })
    }
}

/// Why the kernel does not have them in this way.
#[derive(Debug, thiserror::Error)]
pub(super) enum SecurityError {
    #[error("the object has no program {0}")]
    Stale(&'static str),
    #[error("the kernel refuses programs of this kind (is it locked down, or is CAP_PERFMON missing?)")]
    Kind(#[source] io::Error),
    #[error("cannot read the object")]
    Object(#[from] ParseError),
    #[error("cannot bind the object to its maps")]
    Bind(#[from] EbpfRelocationError),
    #[error("cannot bind the object to the kernel's types")]
    Types(#[from] BtfRelocationError),
    #[error("the kernel refuses the object's types")]
    OwnTypes(#[source] io::Error),
    #[error("cannot use the kernel's type information")]
    Btf(#[from] BtfError),
    #[error("cannot open a map")]
    Map(#[from] MapError),
    #[error("the kernel refuses {program}{log}")]
    Load {
        program: &'static str,
        log: String,
        #[source]
        source: io::Error,
    },
    #[error("the kernel does not attach {program}")]
    Attach {
        program: &'static str,
        #[source]
        source: io::Error,
    },
}

/// One that is loaded.
#[derive(Debug)]
struct Loaded {
    name: &'static str,
    program: OwnedFd,
    tag: u64,
    /// What a link of it attaches.
    attaches: AtFunction,
}

/// All of them, as far as they are loaded.
#[derive(Debug, Default)]
pub(super) struct SecurityPrograms {
    /// Ids of the object's maps, by name. Programs that are loaded keep the maps.
    maps: BTreeMap<String, u32>,
    loaded: Option<(Way, Vec<Loaded>)>,
    /// Whether they were attached once: the kernel attaches none again while a link of it is left.
    attached: bool,
}

impl SecurityPrograms {
    /// Remembers the maps of a loaded object; to be called while it has them all.
    pub(super) fn new(ebpf: &Ebpf) -> Result<Self, MapError> {
        let mut maps = BTreeMap::new();
        for (name, map) in ebpf.maps() {
            // Of other kinds the object has none.
            if let Map::Array(map)
            | Map::HashMap(map)
            | Map::LruHashMap(map)
            | Map::PerCpuArray(map)
            | Map::PerCpuHashMap(map)
            | Map::RingBuf(map)
            | Map::SkStorage(map) = map
            {
                maps.insert(name.to_owned(), map.info()?.id());
            }
        }
        Ok(Self { maps, ..Self::default() })
    }

    /// Loads them in this way, unless they are and can be attached.
    pub(super) fn load(&mut self, object: &[u8], way: Way) -> Result<(), SecurityError> {
        if !self.attached && self.loaded.as_ref().is_some_and(|(loaded, _)| *loaded == way) {
            return Ok(());
        }
        is_taken(way).map_err(SecurityError::Kind)?;
        let types = Btf::from_sys_fs()?;
        let mut object = Object::parse(object)?;
        let own_types =
            match features().btf().map(|kernel| object.fixup_and_sanitize_btf(kernel)).transpose()? {
                Some(Some(types)) => {
                    Some(bpf::load_types(&types.to_bytes()).map_err(SecurityError::OwnTypes)?)
                }
                _ => None,
            };
        object.relocate_btf(&types)?;
        let _open_until_loaded = self.bind(&mut object)?;
        let loaded = programs::LSM.into_iter().map(|(name, hook)| {
            let function = types.id_by_type_name_kind(&way.function(hook), BtfKind::Func)?;
            load((&object, own_types.as_ref()), (name, function), way)
        });
        self.loaded = Some((way, loaded.collect::<Result<_, _>>()?));
        self.attached = false;
        Ok(())
    }

    /// Puts the maps that are there in the place of those that the object names, by descriptors that must stay open.
    fn bind(&self, object: &mut Object) -> Result<Vec<MapData>, SecurityError> {
        let named: Vec<_> = object.maps.drain().filter(|(name, _)| self.maps.contains_key(name)).collect();
        let here: Vec<_> =
            named.iter().map(|(name, _)| MapData::from_id(self.maps[name])).collect::<Result<_, _>>()?;
        let bound = named.iter().zip(&here);
        let bound = bound.map(|((name, map), here)| (name.as_str(), here.fd().as_fd().as_raw_fd(), map));
        let sections = object.functions.keys().map(|(section, _)| *section).collect::<HashSet<_>>();
        object.relocate_maps(bound, &sections)?;
        object.relocate_calls(&sections)?;
        Ok(here)
    }

    /// Attaches what is loaded, once. The links detach when nobody has them open or pinned.
    pub(super) fn attach(&mut self) -> Result<Vec<(&'static str, OwnedFd)>, SecurityError> {
        let attach = |loaded: &Loaded| {
            let failed = |source| SecurityError::Attach { program: loaded.name, source };
            Ok((loaded.name, bpf::attach(&loaded.program).map_err(failed)?))
        };
        self.attached = true;
        self.loaded.iter().flat_map(|(_, loaded)| loaded).map(attach).collect()
    }

    /// What a link of a program attaches, and the program's tag; none if it is not loaded.
    pub(super) fn loaded(&self, name: &str) -> Option<(AtFunction, u64)> {
        let (_, loaded) = self.loaded.as_ref()?;
        loaded.iter().find(|loaded| loaded.name == name).map(|loaded| (loaded.attaches, loaded.tag))
    }
}

/// Whether the kernel takes such programs from this process at all. Asked first, since reading the kernel's types takes long.
fn is_taken(way: Way) -> io::Result<()> {
    // It names no function, so it is refused as invalid where such programs are not forbidden.
    let exit = bpf_insn {
        code: 0x95,
        _bitfield_align_1: [],
        _bitfield_1: bpf_insn::new_bitfield_1(0, 0),
        off: 0,
        imm: 0,
    };
    match bpf::load(&Load { instructions: &[exit], ..blank(way) }, &mut []) {
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => Err(error),
        _ => Ok(()),
    }
}

fn blank(way: Way) -> Load<'static> {
    let (program_type, attach_type) = way.types();
    Load {
        name: "",
        program_type,
        attach_type,
        function: 0,
        instructions: &[],
        functions: None,
        license: c"GPL",
    }
}

fn load(
    (object, types): (&Object, Option<&OwnedFd>),
    (name, function): (&'static str, u32),
    way: Way,
) -> Result<Loaded, SecurityError> {
    let program = object.programs.get(name).ok_or(SecurityError::Stale(name))?;
    let code = object.functions.get(&program.function_key()).ok_or(SecurityError::Stale(name))?;
    let load = Load {
        name,
        function,
        instructions: &code.instructions,
        functions: types.map(|types| (code.func_info.func_info.as_slice(), types)),
        license: &program.license,
        ..blank(way)
    };
    let refused = |source: io::Error| {
        let mut log = vec![0; LOG_BYTES];
        // Once more, so that it says why.
        let _ = bpf::load(&load, &mut log);
        let end = log.iter().position(|byte| *byte == 0).unwrap_or(log.len());
        let log = verifier_log::told(&String::from_utf8_lossy(&log[..end]), LOG_TOLD_MAX);
        SecurityError::Load { program: name, log, source }
    };
    let fd = bpf::load(&load, &mut []).map_err(refused)?;
    let failed = |source| SecurityError::Load { program: name, log: String::new(), source };
    let (id, tag) = bpf::id_and_tag(&fd).map_err(failed)?;
    let attaches = AtFunction { program: id, attach_type: load.attach_type, function };
    Ok(Loaded { name, program: fd, tag, attaches })
}

#[cfg(test)]
mod tests {
    use super::Way;

    #[test]
    fn a_way_is_known_by_the_type_of_its_links() {
        for way in Way::ALL {
            assert_eq!(Way::of_attach_type(way.types().1), Some(way));
        }
        assert_eq!(Way::of_attach_type(24), None, "BPF_TRACE_FENTRY only looks on");
    }
}
