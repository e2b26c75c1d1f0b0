//! Embeds the kernel programs into the agent, if they are built: `cargo xtask build-ebpf` makes
//! `target/bpf/weir-ebpf.o`; `WEIR_EBPF_OBJECT` names another file. Only at build time: what a running agent
//! loads into the kernel must not depend on its environment. Without the object the agent builds all the same,
//! and says at run time what is missing.

use std::{
    env, fs,
    path::{Path, PathBuf},
};

/// Where `cargo xtask build-ebpf` puts the object, below the target folder.
const OBJECT: &str = "bpf/weir-ebpf.o";

fn main() {
    println!("cargo::rustc-check-cfg=cfg(weir_ebpf_object)");
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=WEIR_EBPF_OBJECT");
    let Some(out) = env::var_os("OUT_DIR").map(PathBuf::from) else { return };
    let object = match env::var_os("WEIR_EBPF_OBJECT") {
        Some(path) => {
            println!("cargo::rerun-if-changed={}", path.display());
            PathBuf::from(path)
        }
        None => {
            let Some(target) = target(&out) else { return };
            let object = target.join(OBJECT);
            // A file that does not exist counts as changed at every build; its folder counts when it appears.
            let folder = target.join("bpf");
            let watched = if object.is_file() { &object } else { &folder };
            if fs::create_dir_all(&folder).is_ok() {
                println!("cargo::rerun-if-changed={}", watched.display());
            }
            object
        }
    };
    if object.is_file() {
        match fs::copy(&object, out.join("weir-ebpf.o")) {
            Ok(_) => println!("cargo::rustc-cfg=weir_ebpf_object"),
            Err(error) => {
                println!("cargo::error=cannot copy the kernel programs {}: {error}", object.display())
            }
        }
    }
}

/// The target folder: `OUT_DIR` is `<target>[/<triple>]/<profile>/build/<package>/out`, and cargo marks the
/// target folder with a tag.
fn target(out: &Path) -> Option<&Path> {
    out.ancestors().find(|folder| folder.join("CACHEDIR.TAG").is_file())
}
