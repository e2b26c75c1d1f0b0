//! What is in the binaries and the image, as an SPDX 2.3 document: every crate that is compiled in, from Cargo's own account, and
//! every Debian package that a library is copied from. The document describes the image and the tarball, each by its digest.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

/// Identifiers of what is given away.
const IMAGE: &str = "SPDXRef-image";
const TARBALL: &str = "SPDXRef-tarball";

/// A Debian package that an image has something of.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Package {
    pub(crate) name: String,
    pub(crate) version: String,
    pub(crate) architecture: String,
}

/// What a document describes: what is given away, for one architecture.
#[derive(Clone, Debug)]
pub(crate) struct Described<'a> {
    /// Of the document.
    pub(crate) name: &'a str,
    pub(crate) version: &'a str,
    /// The commit, if it is known.
    pub(crate) revision: Option<&'a str>,
    /// The image's archive: name, SHA-256 in hexadecimal digits, and the image's own digest (`sha256:…`).
    pub(crate) image: (&'a str, &'a str, &'a str),
    /// The tarball: name and SHA-256.
    pub(crate) tarball: (&'a str, &'a str),
}

impl Described<'_> {
    /// The image, and the tarball.
    fn packages(&self) -> [Value; 2] {
        let of = |id: &str, purpose: &str, (file, sha256): (&str, &str)| {
            let mut package = package(id, self.name, self.version, "Apache-2.0");
            package["packageFileName"] = json!(file);
            package["checksums"] = json!([{"algorithm": "SHA256", "checksumValue": sha256}]);
            package["primaryPackagePurpose"] = json!(purpose);
            package["sourceInfo"] =
                json!(format!("built of the commit {}", self.revision.unwrap_or("unknown")));
            package
        };
        let (archive, sha256, digest) = self.image;
        let mut image = of(IMAGE, "CONTAINER", (archive, sha256));
        image["externalRefs"] = purl(&format!("pkg:oci/weir-agent@{}", digest.replace(':', "%3A")));
        [image, of(TARBALL, "ARCHIVE", self.tarball)]
    }

    /// One document's alone (SPDX 2.3, 6.5): of the same commit and the same files it is the same document.
    fn namespace(&self) -> String {
        let (_, image, _) = self.image;
        let digest = format!(
            "{}-{}",
            image.get(..16).unwrap_or(image),
            self.tarball.1.get(..16).unwrap_or(self.tarball.1)
        );
        format!("https://weir.dev/spdx/{}/{}/{digest}", self.name, self.revision.unwrap_or("unknown"))
    }
}

/// The document of what is described, for a target, with libraries of these packages.
///
/// # Errors
/// Cargo cannot be asked.
pub(crate) fn document(
    root: &Path,
    described: &Described<'_>,
    target: &str,
    libraries: &[Package],
) -> Result<Value> {
    let crates = crates(root, target)?;
    let libraries = libraries.iter().map(|package| {
        let mut found = entry("deb/debian", &package.name, &package.version, "NOASSERTION");
        let locator = &mut found["externalRefs"][0]["referenceLocator"];
        *locator = json!(format!("{}?arch={}", locator.as_str().unwrap_or_default(), package.architecture));
        found
    });
    let libraries: Vec<_> = libraries.collect();
    let related = |from: &str, how: &str, to: &Value| json!({"spdxElementId": from, "relationshipType": how, "relatedSpdxElement": to});
    let packages = described.packages();
    let mut relationships: Vec<_> =
        packages.iter().map(|package| related("SPDXRef-DOCUMENT", "DESCRIBES", &package["SPDXID"])).collect();
    // The tarball's programs use the libraries of the machine that it is unpacked on.
    relationships
        .extend(crates.iter().chain(&libraries).map(|part| related(IMAGE, "CONTAINS", &part["SPDXID"])));
    relationships.extend(crates.iter().map(|part| related(TARBALL, "CONTAINS", &part["SPDXID"])));
    Ok(json!({
        "spdxVersion": "SPDX-2.3",
        "dataLicense": "CC0-1.0",
        "SPDXID": "SPDXRef-DOCUMENT",
        "name": described.name,
        "documentNamespace": described.namespace(),
        // A document of the same content is the same document, whenever it was made.
        "creationInfo": {"created": "1970-01-01T00:00:00Z", "creators": ["Tool: weir-xtask-dist"]},
        "packages": packages.into_iter().chain(crates).chain(libraries).collect::<Vec<_>>(),
        "relationships": relationships,
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
    let id = format!("SPDXRef-{}-{}-{}", plain(kind), plain(name), plain(version));
    let mut entry = package(&id, name, version, license);
    entry["externalRefs"] = purl(&format!("pkg:{kind}/{name}@{}", version.replace('+', "%2B")));
    entry
}

fn purl(locator: &str) -> Value {
    json!([{"referenceCategory": "PACKAGE-MANAGER", "referenceType": "purl", "referenceLocator": locator}])
}

fn package(id: &str, name: &str, version: &str, license: &str) -> Value {
    json!({
        "SPDXID": id,
        "name": name,
        "versionInfo": version,
        "licenseConcluded": "NOASSERTION",
        "licenseDeclared": license,
        "copyrightText": "NOASSERTION",
        "downloadLocation": "NOASSERTION",
        "filesAnalyzed": false,
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
        let described = Described {
            name: "name",
            version: "1.2.3",
            revision: Some("c0ffee"),
            image: ("name.oci.tar", &"1".repeat(64), &format!("sha256:{}", "2".repeat(64))),
            tarball: ("name.tar.gz", &"3".repeat(64)),
        };
        let made = |described: &Described<'_>| {
            document(root, described, "aarch64-unknown-linux-gnu", std::slice::from_ref(&library)).unwrap()
        };
        let document = made(&described);
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
        is_of_what_is_given_away(&document, &ids);

        // One namespace a document: another commit's, or of other files, is another one.
        let namespace = |described: &Described<'_>| described.namespace();
        assert_eq!(document["documentNamespace"], namespace(&described));
        let (other, same) = ("4".repeat(64), described.clone());
        let others = [
            Described { revision: Some("deca4"), ..described.clone() },
            Described { revision: None, ..described.clone() },
            Described { tarball: ("name.tar.gz", &other), ..described.clone() },
            Described { image: ("name.oci.tar", &other, described.image.2), ..described.clone() },
        ];
        let namespaces: BTreeSet<_> = others.iter().chain([&described, &same]).map(namespace).collect();
        assert_eq!(namespaces.len(), 5, "{namespaces:?}");
    }

    /// The image and the tarball by their digests and the commit, what each contains, and nothing of which nobody says where it is.
    fn is_of_what_is_given_away(document: &Value, ids: &BTreeSet<&str>) {
        let package = |id: &str| {
            let mut packages = document["packages"].as_array().unwrap().iter();
            packages.find(|package| package["SPDXID"] == id).unwrap()
        };
        for (id, file, digit) in [(IMAGE, "name.oci.tar", "1"), (TARBALL, "name.tar.gz", "3")] {
            let checksum = json!([{"algorithm": "SHA256", "checksumValue": digit.repeat(64)}]);
            let found = package(id);
            assert_eq!((&found["packageFileName"], &found["checksums"]), (&json!(file), &checksum));
            assert_eq!(found["sourceInfo"], "built of the commit c0ffee");
        }
        let digest = &package(IMAGE)["externalRefs"][0]["referenceLocator"];
        assert_eq!(*digest, format!("pkg:oci/weir-agent@sha256%3A{}", "2".repeat(64)));
        let related = |from: &str| -> BTreeSet<&str> {
            let all = document["relationships"].as_array().unwrap().iter();
            let of = all.filter(|one| one["spdxElementId"] == from);
            of.map(|one| one["relatedSpdxElement"].as_str().unwrap()).collect()
        };
        assert_eq!(related("SPDXRef-DOCUMENT"), BTreeSet::from([IMAGE, TARBALL]));
        let (in_image, in_tarball) = (related(IMAGE), related(TARBALL));
        let parts: BTreeSet<_> = ids.iter().copied().filter(|id| ![IMAGE, TARBALL].contains(id)).collect();
        assert_eq!(in_image, parts);
        let of_debian: Vec<_> = in_image.difference(&in_tarball).collect();
        assert_eq!(of_debian, [&"SPDXRef-deb-debian-libc6-2.36-9-deb12u14"]);
    }
}
