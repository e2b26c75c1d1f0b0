//! One kubeconfig file: reading it as client-go would, and its copy with one CA more.
//!
//! A copy keeps every field, known or not, and differs in `certificate-authority-data` alone (a
//! `certificate-authority` file becomes data, since client-go refuses both). Relative paths are relative to the
//! file. Errors never quote its content.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde::Deserialize as _;
use serde_yaml_ng::{Mapping, Value};

use super::kubeconfig::{
    ClientIdentity, ClusterEntry, KubeconfigError, Overlay, Server, UserEntry, Verification,
};

/// Largest kubeconfig that is read.
pub(super) const KUBECONFIG_BYTES_MAX: u64 = 4 * 1024 * 1024;
/// Fields that are booleans to client-go, whose YAML 1.1 also knows `yes`, `on` and the like.
const BOOLEAN_FIELDS: [&str; 3] = ["insecure-skip-tls-verify", "disable-compression", "provideClusterInfo"];

/// A file as it was read.
#[derive(Clone)]
pub(super) struct File {
    path: PathBuf,
    content: String,
    document: Value,
}

impl File {
    /// Where it is, symbolic links resolved.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// What it says.
    pub(super) fn document(&self) -> &Value {
        &self.document
    }

    pub(super) fn read(path: &Path) -> Result<Option<Self>, KubeconfigError> {
        let failed =
            |source| KubeconfigError::Read { path: path.into(), what: "kubeconfig".to_owned(), source };
        let resolved = match path.canonicalize() {
            Ok(resolved) => resolved,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed(error)),
        };
        let metadata = resolved.metadata().map_err(failed)?;
        if !metadata.is_file() {
            return Err(KubeconfigError::NotAFile { path: path.into() });
        }
        if metadata.len() > KUBECONFIG_BYTES_MAX {
            return Err(KubeconfigError::TooLarge { path: path.into(), bytes: metadata.len() });
        }
        let content = std::fs::read_to_string(&resolved).map_err(failed)?;
        Self::parse(resolved, content).map(Some)
    }

    pub(super) fn parse(path: PathBuf, content: String) -> Result<Self, KubeconfigError> {
        let syntax = |reason: String| KubeconfigError::Syntax { path: path.clone(), reason };
        // client-go reads the first document and ignores others.
        let first = serde_yaml_ng::Deserializer::from_str(&content).next();
        let mut document = match first.map(Value::deserialize) {
            None => Value::Null,
            Some(Ok(document)) => document,
            Some(Err(error)) => {
                let place = error.location().map_or_else(String::new, |place| {
                    format!(" near line {}, column {}", place.line(), place.column())
                });
                return Err(syntax(format!("invalid YAML{place}")));
            }
        };
        document.apply_merge().map_err(|_error| syntax("invalid YAML merge key".to_owned()))?;
        if document.is_null() {
            document = Value::Mapping(Mapping::new());
        }
        if !document.is_mapping() {
            return Err(syntax("its top level is not a mapping".to_owned()));
        }
        if has_tag(&document) {
            return Err(syntax("it has a YAML tag, which a kubeconfig does not need; remove it".to_owned()));
        }
        normalise_booleans(&mut document);
        Ok(Self { path, content, document })
    }

    pub(super) fn entries<'a>(
        &'a self,
        list: &str,
        field: &'a str,
    ) -> impl Iterator<Item = (String, &'a Value)> + use<'a> {
        let items =
            self.document.get(list).and_then(Value::as_sequence).map(Vec::as_slice).unwrap_or_default();
        items.iter().filter_map(move |item| Some((text(item.get("name"))?, item.get(field)?)))
    }

    pub(super) fn cluster(
        &self,
        name: String,
        value: &Value,
    ) -> Result<Option<ClusterEntry>, KubeconfigError> {
        let wrong = |problem: String| KubeconfigError::Entry {
            path: self.path.clone(),
            entry: format!("cluster {name:?}"),
            problem,
        };
        let Some(url) = non_empty(value.get("server")) else { return Ok(None) };
        let data = non_empty(value.get("certificate-authority-data"));
        let file = non_empty(value.get("certificate-authority"));
        let insecure = value.get("insecure-skip-tls-verify").and_then(Value::as_bool).unwrap_or(false);
        let verification = if insecure {
            Verification::Nothing
        } else if let Some(data) = &data {
            let decoded = decode(data)
                .ok_or_else(|| wrong("certificate-authority-data is not base64; correct it".to_owned()))?;
            Verification::Bundle(decoded)
        } else if let Some(file) = &file {
            Verification::Bundle(self.read_beside(file, "certificate-authority")?)
        } else {
            Verification::SystemRoots
        };
        let tls_by_default = insecure || data.is_some() || file.is_some();
        let server = parse_server(&url, tls_by_default)
            .ok_or_else(|| wrong("server is not a URL such as https://HOST:PORT; correct it".to_owned()))?;
        let tls_server_name = non_empty(value.get("tls-server-name"));
        let proxy_url = non_empty(value.get("proxy-url"));
        Ok(Some(ClusterEntry { name, server, verification, tls_server_name, proxy_url }))
    }

    pub(super) fn user(&self, name: String, value: &Value) -> Result<UserEntry, KubeconfigError> {
        let field = |key: &str| -> Result<Option<Vec<u8>>, KubeconfigError> {
            if let Some(data) = non_empty(value.get(format!("{key}-data"))) {
                let decoded = decode(&data).ok_or_else(|| KubeconfigError::Entry {
                    path: self.path.clone(),
                    entry: format!("user {name:?}"),
                    problem: format!("{key}-data is not base64; correct it"),
                })?;
                return Ok(Some(decoded));
            }
            non_empty(value.get(key)).map(|path| self.read_beside(&path, key)).transpose()
        };
        let identity = match (field("client-certificate")?, field("client-key")?) {
            (Some(certificate), Some(key)) => Some(ClientIdentity { certificate, key }),
            _ => None,
        };
        Ok(UserEntry { name, identity })
    }

    fn read_beside(&self, path: &str, what: &str) -> Result<Vec<u8>, KubeconfigError> {
        let path = self.path.parent().unwrap_or(Path::new("/")).join(path);
        std::fs::read(&path).map_err(|source| KubeconfigError::Read {
            what: format!("{what} of {}", self.path.display()),
            path,
            source,
        })
    }

    /// The copy whose clusters trust `ca_pem` too. The text is changed in those places alone, so that nothing
    /// else can change its meaning; where that cannot be done the copy is JSON, which is YAML to every reader and
    /// leaves no doubt about what is a string.
    ///
    /// # Errors
    /// The copy cannot be written (a mapping with a key that is no scalar).
    pub(super) fn with_ca(&self, ca_pem: &str) -> Result<Overlay, KubeconfigError> {
        let mut document = self.document.clone();
        let mut replacements = BTreeMap::new();
        let items = document.get_mut("clusters").and_then(Value::as_sequence_mut);
        for item in items.into_iter().flatten() {
            let Some(name) = text(item.get("name")) else { continue };
            let Some(cluster) = item.get_mut("cluster") else { continue };
            let Some(entry) = self.cluster(name, cluster)? else { continue };
            let Some(cluster) = cluster.as_mapping_mut() else { continue };
            let data = non_empty(cluster.get("certificate-authority-data"));
            let file = non_empty(cluster.get("certificate-authority"));
            // client-go refuses a CA beside insecure-skip-tls-verify, and data beside a file: so it must still.
            let bundle = match entry.verification {
                Verification::Nothing => continue,
                _ if data.is_some() && file.is_some() => continue,
                Verification::SystemRoots => ca_pem.to_owned(),
                Verification::Bundle(bundle) => extend(&bundle, ca_pem),
            };
            let bundle = STANDARD.encode(bundle);
            if let Some(data) = data {
                replacements.insert(data, bundle.clone());
            } else if let Some(file) = file {
                let field = format!("certificate-authority-data: {bundle}");
                replacements.insert(format!("certificate-authority: {file}"), field);
            }
            cluster.remove("certificate-authority");
            cluster.insert("certificate-authority-data".into(), bundle.into());
        }
        let mut content = self.content.clone();
        for (old, new) in &replacements {
            content = content.replace(old, new);
        }
        if Self::parse(self.path.clone(), content.clone()).is_ok_and(|copy| copy.document == document) {
            return Ok(Overlay { path: self.path.clone(), content });
        }
        let content = serde_json::to_string_pretty(&document)
            .map_err(|source| KubeconfigError::Emit { path: self.path.clone(), source })?;
        Ok(Overlay { path: self.path.clone(), content })
    }
}

/// The certificates of `bundle` (nothing else: it may come from a file that the reader of the copy may not read)
/// and `ca_pem`.
fn extend(bundle: &[u8], ca_pem: &str) -> String {
    let text = String::from_utf8_lossy(bundle);
    let mut extended = String::with_capacity(text.len() + ca_pem.len());
    let mut inside = false;
    for line in text.lines().map(str::trim) {
        inside |= line == "-----BEGIN CERTIFICATE-----";
        if inside {
            extended.push_str(line);
            extended.push('\n');
        }
        inside &= line != "-----END CERTIFICATE-----";
    }
    extended + ca_pem
}

fn parse_server(url: &str, tls_by_default: bool) -> Option<Server> {
    let (tls, rest) = match url.split_once("://") {
        Some((scheme, rest)) if scheme.eq_ignore_ascii_case("https") => (true, rest),
        Some((scheme, rest)) if scheme.eq_ignore_ascii_case("http") => (false, rest),
        Some(_) => return None,
        None => (tls_by_default, url),
    };
    let authority = rest.split(['/', '?', '#']).next()?;
    let (host, port) = match authority.strip_prefix('[').and_then(|inside| inside.split_once(']')) {
        Some((address, rest)) => (address, rest.strip_prefix(':').or(rest.is_empty().then_some(""))?),
        None => authority.split_once(':').unwrap_or((authority, "")),
    };
    let port = match port {
        "" if tls => 443,
        "" => 80,
        port => port.parse().ok()?,
    };
    let host = host.to_ascii_lowercase();
    let valid = !host.is_empty() && !host.contains(['@', ' ']);
    valid.then_some(Server { tls, host, port })
}

/// A scalar as text: client-go takes numbers and booleans where it wants a string.
pub(super) fn text(value: Option<&Value>) -> Option<String> {
    match value? {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        Value::Bool(flag) => Some(flag.to_string()),
        _ => None,
    }
}

fn non_empty(value: Option<&Value>) -> Option<String> {
    text(value).filter(|text| !text.is_empty())
}

/// Standard base64 as Go reads it: line breaks are ignored.
fn decode(data: &str) -> Option<Vec<u8>> {
    let joined: String = data.chars().filter(|character| !matches!(character, '\r' | '\n')).collect();
    STANDARD.decode(joined).ok()
}

/// Whether anything in it has a tag of its own: readers differ in what they make of one.
fn has_tag(value: &Value) -> bool {
    match value {
        Value::Tagged(_) => true,
        Value::Sequence(items) => items.iter().any(has_tag),
        Value::Mapping(mapping) => mapping.iter().any(|(key, value)| has_tag(key) || has_tag(value)),
        _ => false,
    }
}

/// Turns YAML 1.1 booleans, which this parser reads as strings, into booleans where client-go wants them.
fn normalise_booleans(value: &mut Value) {
    match value {
        Value::Sequence(items) => items.iter_mut().for_each(normalise_booleans),
        Value::Mapping(mapping) => {
            for (key, value) in mapping.iter_mut() {
                let boolean = key.as_str().is_some_and(|key| BOOLEAN_FIELDS.contains(&key));
                match value.as_str().map(str::to_ascii_lowercase).as_deref() {
                    Some("y" | "yes" | "on" | "true") if boolean => *value = Value::Bool(true),
                    Some("n" | "no" | "off" | "false") if boolean => *value = Value::Bool(false),
                    _ => normalise_booleans(value),
                }
            }
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use expect_test::{Expect, expect};

    use super::*;

    const EPHEMERAL: &str = "-----BEGIN CERTIFICATE-----\nWEIR\n-----END CERTIFICATE-----\n";

    fn file(content: &str) -> File {
        File::parse("/home/ada/.kube/config".into(), content.to_owned()).expect("parses")
    }

    #[track_caller]
    fn check_copy(content: &str, expected: Expect) {
        expected.assert_eq(&file(content).with_ca(EPHEMERAL).expect("copies").content);
    }

    fn servers(content: &str) -> Vec<Server> {
        let file = file(content);
        let clusters = file.entries("clusters", "cluster");
        clusters
            .filter_map(|(name, value)| file.cluster(name, value).expect("valid"))
            .map(|c| c.server)
            .collect()
    }

    #[test]
    fn a_copy_keeps_unknown_fields_and_order_and_extends_the_bundle() {
        let bundle =
            STANDARD.encode("comment\n-----BEGIN CERTIFICATE-----\nOWN\n-----END CERTIFICATE-----\n");
        let (first, rest) = bundle.split_at(20);
        check_copy(
            &format!(
                "kind: Config\nx-unknown: {{a: [1, 1.5, 'no', null]}}\nclusters:\n- cluster:\n    server: \
                 https://a.example\n    certificate-authority-data: |\n      {first}\n      {rest}\n    extensions: \
                 [{{name: e, extension: {{b: yes}}}}]\n  name: one\nusers:\n- name: u\n  user: {{token: 0123}}\n"
            ),
            expect![[r#"
                {
                  "kind": "Config",
                  "x-unknown": {
                    "a": [
                      1,
                      1.5,
                      "no",
                      null
                    ]
                  },
                  "clusters": [
                    {
                      "cluster": {
                        "server": "https://a.example",
                        "certificate-authority-data": "LS0tLS1CRUdJTiBDRVJUSUZJQ0FURS0tLS0tCk9XTgotLS0tLUVORCBDRVJUSUZJQ0FURS0tLS0tCi0tLS0tQkVHSU4gQ0VSVElGSUNBVEUtLS0tLQpXRUlSCi0tLS0tRU5EIENFUlRJRklDQVRFLS0tLS0K",
                        "extensions": [
                          {
                            "name": "e",
                            "extension": {
                              "b": "yes"
                            }
                          }
                        ]
                      },
                      "name": "one"
                    }
                  ],
                  "users": [
                    {
                      "name": "u",
                      "user": {
                        "token": "0123"
                      }
                    }
                  ]
                }"#]],
        );
    }

    #[test]
    fn a_copy_differs_in_the_bundle_alone_even_in_quirks_and_comments() {
        let bundle = STANDARD.encode("-----BEGIN CERTIFICATE-----\nOWN\n-----END CERTIFICATE-----\n");
        check_copy(
            &format!(
                "# mine\nclusters:\n- cluster: {{server: https://a, certificate-authority-data: {bundle}}}\n  name: \
                 one\nusers:\n- name: u\n  user: {{token: 0123, exec: {{env: [{{name: A, value: \"yes\"}}]}}}}\n"
            ),
            expect![[r##"
                # mine
                clusters:
                - cluster: {server: https://a, certificate-authority-data: LS0tLS1CRUdJTiBDRVJUSUZJQ0FURS0tLS0tCk9XTgotLS0tLUVORCBDRVJUSUZJQ0FURS0tLS0tCi0tLS0tQkVHSU4gQ0VSVElGSUNBVEUtLS0tLQpXRUlSCi0tLS0tRU5EIENFUlRJRklDQVRFLS0tLS0K}
                  name: one
                users:
                - name: u
                  user: {token: 0123, exec: {env: [{name: A, value: "yes"}]}}
            "##]],
        );
    }

    #[test]
    fn a_bundle_file_becomes_data() {
        let folder = tempfile::tempdir().expect("temporary folder");
        std::fs::write(folder.path().join("ca.crt"), EPHEMERAL).expect("write");
        let content =
            "clusters:\n- cluster:\n    certificate-authority: ca.crt\n    server: https://a\n  name: a\n";
        let file = File::parse(folder.path().join("config"), content.to_owned()).expect("parses");
        let bundle = STANDARD.encode(format!("{EPHEMERAL}{EPHEMERAL}"));
        assert_eq!(
            file.with_ca(EPHEMERAL).expect("copies").content,
            content
                .replace("certificate-authority: ca.crt", &format!("certificate-authority-data: {bundle}"))
        );
    }

    #[test]
    fn a_cluster_without_a_bundle_gets_one_and_an_insecure_one_stays() {
        check_copy(
            "clusters:\n- {name: system, cluster: {server: 'https://a.example'}}\n- {name: insecure, cluster: \
             {server: 'https://b.example', insecure-skip-tls-verify: yes}}\n",
            expect![[r#"
                {
                  "clusters": [
                    {
                      "name": "system",
                      "cluster": {
                        "server": "https://a.example",
                        "certificate-authority-data": "LS0tLS1CRUdJTiBDRVJUSUZJQ0FURS0tLS0tCldFSVIKLS0tLS1FTkQgQ0VSVElGSUNBVEUtLS0tLQo="
                      }
                    },
                    {
                      "name": "insecure",
                      "cluster": {
                        "server": "https://b.example",
                        "insecure-skip-tls-verify": true
                      }
                    }
                  ]
                }"#]],
        );
    }

    #[test]
    fn anchors_and_merge_keys_are_resolved() {
        check_copy(
            "common: &common {server: 'https://a.example'}\nclusters:\n- name: one\n  cluster:\n    <<: *common\n    \
             tls-server-name: x\n",
            expect![[r#"
                {
                  "common": {
                    "server": "https://a.example"
                  },
                  "clusters": [
                    {
                      "name": "one",
                      "cluster": {
                        "tls-server-name": "x",
                        "server": "https://a.example",
                        "certificate-authority-data": "LS0tLS1CRUdJTiBDRVJUSUZJQ0FURS0tLS0tCldFSVIKLS0tLS1FTkQgQ0VSVElGSUNBVEUtLS0tLQo="
                      }
                    }
                  ]
                }"#]],
        );
    }

    #[test]
    fn only_the_first_document_counts_and_json_is_yaml() {
        assert_eq!(
            servers(
                "{\"clusters\": [{\"name\": \"j\", \"cluster\": {\"server\": \"https://J.example:6443/k8s\"}}]}\n---\nx: 1\n"
            ),
            [Server { tls: true, host: "j.example".to_owned(), port: 6443 }]
        );
    }

    #[test]
    fn servers_are_taken_apart_as_client_go_does() {
        let server = |url: &str| parse_server(url, false).map(|s| (s.tls, s.host, s.port));
        assert_eq!(server("https://[fd00::1]:6443/"), Some((true, "fd00::1".to_owned(), 6443)));
        assert_eq!(server("https://a.example"), Some((true, "a.example".to_owned(), 443)));
        assert_eq!(server("HTTP://a.example"), Some((false, "a.example".to_owned(), 80)));
        assert_eq!(server("a.example:8080"), Some((false, "a.example".to_owned(), 8080)));
        assert_eq!(server("ftp://a.example"), None);
        assert_eq!(server("https://"), None);
        assert_eq!(server("https://a.example:99999"), None);
        assert_eq!(parse_server("10.0.0.1:6443", true).map(|server| server.tls), Some(true));
    }

    #[test]
    fn broken_yaml_is_named_without_its_content() {
        let error = File::parse("/k".into(), "users:\n- token: [s3cret\n".to_owned())
            .err()
            .expect("refused")
            .to_string();
        assert!(error.starts_with("/k is not a kubeconfig: invalid YAML"), "{error}");
        assert!(!error.contains("s3cret"), "{error}");
        let error = File::parse("/k".into(), "just text".to_owned()).err().expect("refused").to_string();
        assert_eq!(error, "/k is not a kubeconfig: its top level is not a mapping");
        let error = File::parse("/k".into(), "users: [!x {}]".to_owned()).err().expect("refused").to_string();
        assert!(error.ends_with("it has a YAML tag, which a kubeconfig does not need; remove it"), "{error}");
    }

    #[test]
    fn a_bundle_file_gives_its_certificates_alone() {
        assert_eq!(extend(b"root:x:0:0\nsecret\n", EPHEMERAL), EPHEMERAL);
    }
}
