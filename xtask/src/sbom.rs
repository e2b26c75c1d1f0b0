//! What is in the binaries and the image, as an SPDX 2.3 document: every crate that is compiled in, from Cargo's own account, and
//! every Debian package that a library is copied from.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

/// A Debian package that an image has something of.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Package {
    pub(crate) name: String,
    pub(crate) version: String,
    pub(crate) architecture: String,
}

/// The document of what is given away under `name`, for a target, with libraries of these packages.
///
/// # Errors
/// Cargo cannot be asked.
pub(crate) fn document(root: &Path, name: &str, target: &str, libraries: &[Package]) -> Result<Value> {
    let mut packages = crates(root, target)?;
    packages.extend(libraries.iter().map(|package| {
        let mut found = entry("deb/debian", &package.name, &package.version, "NOASSERTION");
        let locator = &mut found["externalRefs"][0]["referenceLocator"];
        *locator = json!(format!("{}?arch={}", locator.as_str().unwrap_or_default(), package.architecture));
        found
    }));
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
fn crates(root: &Path, target: &str) -> Result<Vec<Value>> {
    let output = Command::new("cargo")
        .args(["metadata", "--locked", "--format-version", "1", "--filter-platform", target])
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
            let kinds = list(&dependency["dep_kinds"]);
            let package = text(&dependency["pkg"]);
            // Of kind null are those of the program itself; "build" and "dev" are not in it, but for crates that are C sources, which a
            // build compiles in. What such a crate needs itself only compiles them.
            if kinds.iter().any(|kind| kind["kind"].is_null()) {
                pending.push(package);
            } else if text(&dependency["name"]).ends_with("_src")
                && kinds.iter().any(|kind| kind["kind"] == "build")
            {
                reached.insert(package);
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

/// The Debian packages of libraries of this machine; of another distribution none are known.
///
/// # Errors
/// A library cannot be read.
pub(crate) fn packages_of(libraries: &[PathBuf]) -> Result<Vec<Package>> {
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
    Ok(names.iter().filter_map(|name| installed(name)).collect())
}

/// A package of this machine.
pub(crate) fn installed(name: &str) -> Option<Package> {
    let asked = Command::new("dpkg-query").args(["-W", "-f", "${Version} ${Architecture}", name]).output();
    let asked = asked.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    let (version, architecture) = asked.split_once(' ')?;
    let name = name.split(':').next().unwrap_or_default().to_owned();
    Some(Package { name, version: version.to_owned(), architecture: architecture.to_owned() })
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
            "referenceLocator": format!("pkg:{kind}/{name}@{}", version.replace('+', "%2B")),
        }],
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_compiled_from_c_is_listed_and_each_id_is_of_one_package() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        let library = Package {
            name: "libc6".to_owned(),
            version: "2.36-9+deb12u14".to_owned(),
            architecture: "arm64".to_owned(),
        };
        let document = document(root, "name", "aarch64-unknown-linux-gnu", &[library]).unwrap();
        let packages = document["packages"].as_array().unwrap();
        let named = |name: &str| packages.iter().any(|package| package["name"] == name);
        for name in ["weir-agent", "weir", "rdkafka-sys", "openssl-src", "aws-lc-sys", "libc6"] {
            assert!(named(name), "{name}");
        }
        // What only builds and tests use is in nobody's image.
        assert!(!named("cc") && !named("expect-test") && !named("xtask"));
        let ids: BTreeSet<_> = packages.iter().map(|package| package["SPDXID"].as_str().unwrap()).collect();
        assert_eq!(ids.len(), packages.len());
        let locators: Vec<_> =
            packages.iter().map(|package| &package["externalRefs"][0]["referenceLocator"]).collect();
        assert!(locators.contains(&&json!("pkg:deb/debian/libc6@2.36-9%2Bdeb12u14?arch=arm64")));
    }
}
