//! What `exec` makes of a kubeconfig's text, for the properties in `tests/properties`.
//!
//! Only a door: nothing is decided here, and the product does not come through it.

use serde_yaml_ng::Value;

use super::kubeconfig_file::File;

/// A kubeconfig and its copy with one CA more.
#[derive(Debug)]
pub struct Copied {
    /// What the file says, as it was read.
    pub document: Value,
    /// What the copy says, as it is read again.
    pub copy: Value,
    /// The copy's text.
    pub content: String,
}

/// Reads `content` as a kubeconfig and copies it; none if either is refused. A copy that cannot be read is an error.
pub fn copied(content: &str, ca_pem: &str) -> Option<Result<Copied, String>> {
    let path = std::path::PathBuf::from("/nonexistent/config");
    let file = File::parse(path.clone(), content.to_owned()).ok()?;
    let copy = file.with_ca(ca_pem).ok()?.content;
    Some(match File::parse(path, copy.clone()) {
        Ok(read) => {
            Ok(Copied { document: file.document().clone(), copy: read.document().clone(), content: copy })
        }
        Err(error) => Err(error.to_string()),
    })
}
