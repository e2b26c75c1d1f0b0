//! What is in the binaries and the image, as an SPDX 2.3 document: every crate that is compiled in, from Cargo's own account, and
//! every Debian package that a library is copied from.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

/// The document of what is given away under `name`.
///
/// # Errors
/// Cargo or dpkg cannot be asked.
pub(crate) fn document(root: &Path, name: &str, libraries: &[PathBuf]) -> Result<Value> {
    let mut packages = crates(root)?;
    packages.extend(debian(libraries)?);
    let described: Vec<_> = packages.iter().map(|package| {
        json!({"spdxElementId": "SPDXRef-DOCUMENT", "relationshipType": "DESCRIBES", "relatedSpdxElement": package["SPDXID"]})
    }).collect();
    Ok(json!({
        "spdxVersion": "SPDX-2.3",
        "dataLicense": "CC0-1.0",
        "SPDXID": "SPDXRef-DOCUMENT",
        "name": name,
        "documentNamespace": format!("https://weir.dev/spdx/{name}"),
        // A document of the same content is the same document, whenever it was made.
        "creationInfo": {"created": "1970-01-01T00:00:00Z", "creators": ["Tool: weir-xtask-dist"]},
        "packages": packages,
        "relationships": described,
    }))
}

/// The crates that the shipped packages are built of, without those that only tests need.
fn crates(root: &Path) -> Result<Vec<Value>> {
    let target = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    let output = Command::new("cargo")
        .args(["metadata", "--locked", "--format-version", "1", "--filter-platform", &target])
        .current_dir(root)
        .output()
        .context("cannot start cargo")?;
    ensure!(output.status.success(), "cargo metadata: {}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).context("cargo metadata wrote no JSON")?;
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let nodes: BTreeMap<_, _> =
        list(&metadata["resolve"]["nodes"]).into_iter().map(|node| (text(&node["id"]), node)).collect();
    let packages = list(&metadata["packages"]);
    let shipped = |package: &&Value| ["weir-agent", "weir"].contains(&text(&package["name"]).as_str());
    let mut pending: Vec<_> = packages.iter().filter(shipped).map(|package| text(&package["id"])).collect();
    ensure!(
        pending.len() == 2,
        "cargo metadata names {} of the two packages that are shipped",
        pending.len()
    );
    let mut reached = BTreeSet::new();
    while let Some(id) = pending.pop() {
        if !reached.insert(id.clone()) {
            continue;
        }
        for dependency in nodes.get(&id).map(|node| list(&node["deps"])).unwrap_or_default() {
            // Of kind null are those of the program itself; "build" and "dev" are not in it.
            if list(&dependency["dep_kinds"]).iter().any(|kind| kind["kind"].is_null()) {
                pending.push(text(&dependency["pkg"]));
            }
        }
    }
    let reached = packages.iter().filter(|package| reached.contains(&text(&package["id"])));
    let of = |package: &Value| {
        let (name, version) = (text(&package["name"]), text(&package["version"]));
        let license = package["license"].as_str().unwrap_or("NOASSERTION").replace('/', " OR ");
        entry("cargo", &name, &version, &license)
    };
    Ok(reached.map(of).collect())
}

/// The Debian packages of the libraries; of another distribution none are known.
fn debian(libraries: &[PathBuf]) -> Result<Vec<Value>> {
    let mut names = BTreeSet::new();
    for library in libraries {
        // dpkg knows files by where they were before /lib became a link to /usr/lib, or after.
        let real = library.canonicalize().with_context(|| format!("cannot read {}", library.display()))?;
        for path in [library, &real] {
            let found = Command::new("dpkg-query").arg("-S").arg(path).output();
            let found =
                found.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
            names.extend(found.split_once(": ").map(|(package, _)| package.to_owned()));
        }
    }
    names.insert("ca-certificates".to_owned());
    let mut found = Vec::new();
    for name in names {
        let asked = Command::new("dpkg-query").args(["-W", "-f", "${Version}", &name]).output();
        let version =
            asked.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
        let plain = name.split(':').next().unwrap_or_default();
        found.extend((!version.is_empty()).then(|| entry("deb/debian", plain, &version, "NOASSERTION")));
    }
    Ok(found)
}

fn entry(kind: &str, name: &str, version: &str, license: &str) -> Value {
    let plain = |text: &str| -> String {
        let fits = |character: char| character.is_ascii_alphanumeric() || matches!(character, '.' | '-');
        text.chars().map(|character| if fits(character) { character } else { '-' }).collect()
    };
    json!({
        "SPDXID": format!("SPDXRef-{}-{}-{}", plain(kind), plain(name), plain(version)),
        "name": name,
        "versionInfo": version,
        "licenseConcluded": "NOASSERTION",
        "licenseDeclared": license,
        "copyrightText": "NOASSERTION",
        "downloadLocation": "NOASSERTION",
        "filesAnalyzed": false,
        "externalRefs": [{
            "referenceCategory": "PACKAGE-MANAGER",
            "referenceType": "purl",
            "referenceLocator": format!("pkg:{kind}/{name}@{version}"),
        }],
    })
}
