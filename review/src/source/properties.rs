//! The file of `--kafka-config`: properties of librdkafka, one `name=value` a line, for TLS and SASL.
//!
//! The file holds secrets. No value is ever part of an error or of `Debug`, and neither is a line that cannot be read:
//! it may be a password on a line of its own. A name is shown only if it looks like one.

use std::{
    fmt, fs, io,
    path::{Path, PathBuf},
};

/// Longest file that is read.
const FILE_BYTES_MAX: u64 = 256 * 1024;
/// Longest name.
const NAME_BYTES_MAX: usize = 80;

/// Weir's own: a file with a token, for SASL OAUTHBEARER.
const TOKEN_FILE: &str = "weir.oauth.token.file";

/// What Weir sets itself, or does not allow: another value would read something else than the whole topic, or run
/// foreign code.
const FIXED: [&str; 13] = [
    "allow.auto.create.topics",
    "auto.offset.reset",
    "bootstrap.servers",
    "enable.auto.commit",
    "enable.auto.offset.store",
    "enable.partition.eof",
    "isolation.level",
    "log.queue",
    "metadata.broker.list",
    "plugin.library.paths",
    "statistics.interval.ms",
    "test.mock.num.brokers",
    "topic.blacklist",
];

/// A property.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Property {
    /// Line in the file, from 1.
    pub(crate) line: usize,
    /// As librdkafka calls it.
    pub(crate) name: String,
    /// Perhaps a secret.
    pub(crate) value: String,
}

impl fmt::Debug for Property {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Property").field("line", &self.line).field("name", &self.name).finish_non_exhaustive()
    }
}

/// Properties, and the file that they came from.
#[derive(Clone, Debug, Default)]
pub(crate) struct Properties {
    path: PathBuf,
    list: Vec<Property>,
}

/// Why a file holds no properties.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PropertiesError {
    /// It cannot be read.
    #[error("cannot read {path}")]
    File { path: PathBuf, source: io::Error },
    /// It is far too long.
    #[error("{path} is longer than the {FILE_BYTES_MAX} bytes that a file of properties may have")]
    TooLong { path: PathBuf },
    /// A line is not understood.
    #[error("{path} line {line}: {what}")]
    Line { path: PathBuf, line: usize, what: String },
}

impl Properties {
    /// Reads a file.
    ///
    /// # Errors
    /// It cannot be read, or a line of it is not understood.
    pub(crate) fn read(path: &Path) -> Result<Self, PropertiesError> {
        let error = |source| PropertiesError::File { path: path.to_owned(), source };
        if fs::metadata(path).map_err(error)?.len() > FILE_BYTES_MAX {
            return Err(PropertiesError::TooLong { path: path.to_owned() });
        }
        Self::parse(path, &fs::read_to_string(path).map_err(error)?)
    }

    fn parse(path: &Path, text: &str) -> Result<Self, PropertiesError> {
        let mut list: Vec<Property> = Vec::new();
        for (line, content) in (1..).zip(text.lines()) {
            let error = |what: String| PropertiesError::Line { path: path.to_owned(), line, what };
            let content = content.trim();
            if content.is_empty() || content.starts_with('#') {
                continue;
            }
            let Some((name, value)) = content.split_once('=') else {
                return Err(error("there is no `=`; write name=value".into()));
            };
            let (name, value) = (name.trim(), value.trim());
            let looks_like_one = !name.is_empty()
                && name.len() <= NAME_BYTES_MAX
                && name
                    .bytes()
                    .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"._-".contains(&byte));
            if !looks_like_one {
                return Err(error("what stands before the `=` is no name of a property".into()));
            }
            if FIXED.contains(&name) {
                return Err(error(format!("{name} cannot be set here; weir sets what reading needs itself")));
            }
            if value.contains('\0') {
                return Err(error(format!("the value of {name} has a zero byte")));
            }
            if let Some(earlier) = list.iter().find(|earlier| earlier.name == name) {
                return Err(error(format!("{name} is set in line {} already", earlier.line)));
            }
            list.push(Property { line, name: name.to_owned(), value: value.to_owned() });
        }
        Ok(Self { path: path.to_owned(), list })
    }

    /// Those of the library.
    pub(crate) fn list(&self) -> impl Iterator<Item = &Property> {
        self.list.iter().filter(|property| property.name != TOKEN_FILE)
    }

    /// The file with the token that brokers are shown.
    pub(crate) fn token_file(&self) -> Option<&Path> {
        let property = self.list.iter().find(|property| property.name == TOKEN_FILE)?;
        Some(Path::new(&property.value))
    }

    /// An error about a property that librdkafka refused, without its value.
    pub(crate) fn refused(&self, name: &str, why: &str) -> Option<PropertiesError> {
        let property = self.list.iter().find(|property| property.name == name)?;
        let what = format!("{name} {why}");
        Some(PropertiesError::Line { path: self.path.clone(), line: property.line, what })
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::Properties;

    fn parse(text: &str) -> Result<Properties, String> {
        Properties::parse(Path::new("client.properties"), text).map_err(|error| error.to_string())
    }

    #[test]
    fn properties_stand_one_a_line_between_comments() {
        let text =
            "# TLS\n\nsecurity.protocol = SASL_SSL\r\nsasl.password=a=b #c \n ssl.ca.location=/etc/ca.pem\n";
        let properties = parse(text).unwrap();
        let list: Vec<(&str, &str)> =
            properties.list().map(|p| (p.name.as_str(), p.value.as_str())).collect();
        assert_eq!(
            list,
            [
                ("security.protocol", "SASL_SSL"),
                ("sasl.password", "a=b #c"),
                ("ssl.ca.location", "/etc/ca.pem")
            ]
        );
    }

    #[test]
    fn the_file_of_a_token_is_no_property_of_the_library() {
        let properties = parse("weir.oauth.token.file=/run/token\nclient.id=x").unwrap();
        assert_eq!(properties.token_file(), Some(Path::new("/run/token")));
        assert_eq!(properties.list().count(), 1);
        assert_eq!(parse("client.id=x").unwrap().token_file(), None);
    }

    #[test]
    fn a_line_that_is_not_understood_is_named_by_file_and_number_and_never_shown() {
        for (text, expected) in [
            ("a=1\nhunter2\n", "client.properties line 2: there is no `=`; write name=value"),
            (
                "hunter2 secret = x",
                "client.properties line 1: what stands before the `=` is no name of a property",
            ),
            ("=hunter2", "client.properties line 1: what stands before the `=` is no name of a property"),
            (
                "sasl.password=hunter2\nsasl.password=hunter2",
                "client.properties line 2: sasl.password is set in line 1 already",
            ),
            (
                "bootstrap.servers=hunter2",
                "client.properties line 1: bootstrap.servers cannot be set here; weir sets what reading needs itself",
            ),
            (
                "sasl.password=hunter2\0",
                "client.properties line 1: the value of sasl.password has a zero byte",
            ),
        ] {
            let error = parse(text).unwrap_err();
            assert_eq!(error, expected);
            assert!(!error.contains("hunter2"));
        }
    }

    #[test]
    fn no_secret_is_in_debug_output_or_in_a_refusal() {
        let properties = parse("ssl.key.password=hunter2").unwrap();
        assert!(!format!("{properties:?}").contains("hunter2"), "{properties:?}");
        let refused = properties.refused("ssl.key.password", "is no property of librdkafka").unwrap();
        assert_eq!(
            refused.to_string(),
            "client.properties line 1: ssl.key.password is no property of librdkafka"
        );
        assert!(properties.refused("other", "").is_none());
    }

    #[test]
    fn a_file_that_cannot_be_read_is_named() {
        let error = Properties::read(Path::new("/nonexistent/client.properties")).unwrap_err();
        assert_eq!(error.to_string(), "cannot read /nonexistent/client.properties");
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("long");
        std::fs::write(&path, vec![b'#'; 300 * 1024]).unwrap();
        assert!(Properties::read(&path).unwrap_err().to_string().contains("is longer than"));
    }
}
