//! Masks by rule: which values an operator wants masked beside what always is. Sans-IO.
//!
//! Three kinds: environment variables by their names, fields of objects by kind and path, and text by regular expression
//! ([`Patterns`]). Read once, when the configuration is; what a body is searched for before it is parsed is compiled then, too.

use regex::bytes::Regex;

use super::patterns::{PatternError, Patterns};

/// Most entries of each list of rules. A set of them fits a `u64`.
pub const MASKS_MAX: usize = 64;
/// Longest name, path or expression, bytes.
pub const MASK_BYTES_MAX: usize = 1024;
/// Most names that a path has.
const SEGMENTS_MAX: usize = 32;
/// Names of environment variables whose values are masked, unless others are configured.
pub const ENVIRONMENT: [&str; 6] = ["*PASSWORD*", "*PASSWD*", "*TOKEN*", "*SECRET*", "*KEY*", "*CREDENTIAL*"];

/// How a private key in PEM begins, and in base64 (without, `RSA `, `EC `, `OPENSSH `, `ENCRYPTED `): such a value is masked wherever it stands.
pub(super) const PRIVATE_KEYS: [&str; 6] = [
    "PRIVATE KEY-----",
    "LS0tLS1CRUdJTiBQUklWQVRFIEtF",
    "LS0tLS1CRUdJTiBSU0EgUFJJVkFURSBL",
    "LS0tLS1CRUdJTiBFQyBQUklWQVRFIEtF",
    "LS0tLS1CRUdJTiBPUEVOU1NIIFBSSVZBVEUgS0VZ",
    "LS0tLS1CRUdJTiBFTkNSWVBURUQgUFJJVkFURSBL",
];

/// Fields of objects that are masked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FieldMask {
    /// Kinds of the objects, of any API group; empty: all.
    pub kinds: Vec<String>,
    /// Paths from the object's root: `data.*`, `spec.users[*].password`, `data["tls.key"]`.
    pub paths: Vec<String>,
}

/// The rules as they are written. Not `Debug`: an expression may spell a secret.
#[derive(Clone, PartialEq, Eq)]
pub struct MaskRules {
    /// Names of environment variables, with `*` for any characters; the case of letters does not matter.
    pub environment: Vec<String>,
    /// Fields.
    pub fields: Vec<FieldMask>,
    /// Regular expressions over bytes.
    pub patterns: Vec<String>,
}

impl Default for MaskRules {
    fn default() -> Self {
        let environment = ENVIRONMENT.map(str::to_owned).to_vec();
        Self { environment, fields: Vec::new(), patterns: Vec::new() }
    }
}

/// A rule that cannot be: where it stands, and why not. Never spells an expression.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MaskError {
    /// Which one, as `fields[0].paths[1]`.
    pub place: String,
    /// What is wrong, with the mend.
    pub problem: String,
}

/// A set of [`FieldMask`]s.
pub(super) type FieldSet = u64;

/// The rules, ready for use.
pub struct Masks {
    rules: MaskRules,
    /// By the rules' order.
    paths: Vec<Vec<Path>>,
    /// What in a body in JSON makes it worth parsing.
    mention: Regex,
    /// Names of environment variables, wherever they stand.
    names: Option<Regex>,
    patterns: Option<Patterns>,
}

impl std::fmt::Debug for Masks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let MaskRules { environment, fields, patterns } = &self.rules;
        let counts = (environment.len(), fields.len(), patterns.len());
        f.debug_tuple("Masks").field(&counts).finish()
    }
}

impl PartialEq for Masks {
    fn eq(&self, other: &Self) -> bool {
        self.rules == other.rules
    }
}

impl Eq for Masks {}

impl Default for Masks {
    fn default() -> Self {
        match Self::new(MaskRules::default()) {
            Ok(masks) => masks,
            // Tested: they are written above.
            Err(_) => unreachable!("the rules without a configuration are valid"),
        }
    }
}

impl Masks {
    /// Checks and compiles rules.
    ///
    /// # Errors
    /// One cannot be read, or there are too many.
    pub fn new(rules: MaskRules) -> Result<Self, MaskError> {
        bounded("environment", &rules.environment)?;
        if rules.fields.len() > MASKS_MAX {
            return fail(
                "fields",
                format!("has {} entries; at most {MASKS_MAX} are read", rules.fields.len()),
            );
        }
        let mut paths = Vec::new();
        for (index, field) in rules.fields.iter().enumerate() {
            let place = format!("fields[{index}]");
            bounded(&format!("{place}.kinds"), &field.kinds)?;
            bounded(&format!("{place}.paths"), &field.paths)?;
            if field.paths.is_empty() {
                return fail(format!("{place}.paths"), "names no path; without one nothing is masked");
            }
            let read = field.paths.iter().enumerate().map(|(at, path)| {
                let place = format!("{place}.paths[{at}]");
                Path::parse(path).map_err(|problem| MaskError { place, problem: problem.to_owned() })
            });
            paths.push(read.collect::<Result<Vec<_>, _>>()?);
        }
        bounded("patterns", &rules.patterns)?;
        let patterns = Patterns::new(&rules.patterns).map_err(|PatternError { index, problem }| {
            let place = index.map_or_else(|| "patterns".to_owned(), |index| format!("patterns[{index}]"));
            MaskError { place, problem }
        })?;
        let (mention, names) = searched(&rules)?;
        Ok(Self { rules, paths, mention, names, patterns })
    }

    /// The expressions, if there are any.
    pub(super) fn patterns(&self) -> Option<&Patterns> {
        self.patterns.as_ref()
    }

    /// Whether any text or field is masked by rule: what cannot be read is not recorded then.
    pub(super) fn hides(&self, here: FieldSet) -> bool {
        here != 0 || self.patterns.is_some()
    }

    /// Whether something in a body may be masked by rule, so that it must be parsed.
    pub(super) fn may_be_in(&self, body: &[u8], here: FieldSet, yaml: bool) -> bool {
        let has_environment = !self.rules.environment.is_empty();
        self.hides(here)
            || self.mention.is_match(body)
            // Names can be written in many ways there.
            || yaml && has_environment && body.windows(3).any(|window| window == b"env")
    }

    /// Whether the value of an environment variable of this name is masked.
    pub(super) fn environment(&self, name: &str) -> bool {
        self.rules.environment.iter().any(|pattern| glob(pattern, name, true))
    }

    /// Whether the name of such a variable may stand in bytes that are not text.
    pub(super) fn environment_in(&self, bytes: &[u8]) -> bool {
        self.names.as_ref().is_some_and(|names| names.is_match(bytes))
    }

    /// Whether values of environment variables are masked at all.
    pub(super) fn has_environment(&self) -> bool {
        !self.rules.environment.is_empty()
    }

    /// Fields that are masked in objects of a kind.
    pub(super) fn of_kind(&self, kind: &str) -> FieldSet {
        self.set(|kinds| kinds.iter().any(|of| of == kind))
    }

    /// Fields that are masked in objects that a request for this resource carries, whatever they call themselves.
    pub(super) fn of_resource(&self, resource: &str) -> FieldSet {
        if self.rules.fields.is_empty() || resource.is_empty() {
            return 0;
        }
        self.set(|kinds| kinds.iter().any(|kind| is_plural(resource, kind)))
    }

    fn set(&self, matches: impl Fn(&[String]) -> bool) -> FieldSet {
        let rules = self.rules.fields.iter().zip(0..);
        let chosen = rules.filter(|(rule, _)| rule.kinds.is_empty() || matches(&rule.kinds));
        chosen.fold(0, |set, (_, bit)| set | 1 << bit)
    }

    /// Paths of a set of fields.
    pub(super) fn paths(&self, set: FieldSet) -> impl Iterator<Item = &Path> {
        let chosen = self.paths.iter().zip(0..).filter(move |(_, bit)| set >> bit & 1 == 1);
        chosen.flat_map(|(paths, _)| paths)
    }
}

/// What in a body makes it worth parsing: a kind of a rule, an environment variable of such a name, a patch of one, a private key; and those names
/// alone.
fn searched(rules: &MaskRules) -> Result<(Regex, Option<Regex>), MaskError> {
    let kinds = rules.fields.iter().flat_map(|field| &field.kinds);
    let mut any: Vec<String> = kinds.map(|kind| regex::escape(kind)).collect();
    let name = |pattern: &String| pattern.split('*').map(regex::escape).collect::<Vec<_>>().join(r#"[^"]*"#);
    let names: Vec<_> = rules.environment.iter().map(name).collect();
    let names = format!("(?i:{})", names.join("|"));
    if !rules.environment.is_empty() {
        // Quotes are escaped in JSON within JSON.
        any.push(format!(r#"name\\*"\s*:\s*\\*"{names}\\*""#));
        any.push(r#"/env(?:\\?/|")"#.to_owned());
    }
    let built = |text: &str| regex::bytes::RegexBuilder::new(text).unicode(false).build();
    any.extend(PRIVATE_KEYS.map(str::to_owned));
    let has_names = !rules.environment.is_empty();
    let all = built(&any.join("|"))
        .and_then(|mention| Ok((mention, has_names.then(|| built(&names)).transpose()?)));
    all.map_err(|_| {
        let problem = "is too long to be searched for, with the kinds in fields; give fewer or shorter names";
        MaskError { place: "environment".to_owned(), problem: problem.to_owned() }
    })
}

fn fail<T>(place: impl Into<String>, problem: impl Into<String>) -> Result<T, MaskError> {
    Err(MaskError { place: place.into(), problem: problem.into() })
}

fn bounded(place: &str, list: &[String]) -> Result<(), MaskError> {
    if list.len() > MASKS_MAX {
        return fail(place, format!("has {} entries; at most {MASKS_MAX} are read", list.len()));
    }
    match list.iter().position(|text| text.is_empty() || text.len() > MASK_BYTES_MAX) {
        Some(index) => {
            fail(format!("{place}[{index}]"), format!("must have from 1 to {MASK_BYTES_MAX} bytes"))
        }
        None => Ok(()),
    }
}

/// Whether `resource` may be what the API calls objects of `kind`: as Kubernetes guesses it, in all ways that occur. One that is
/// taken for another only masks too much.
fn is_plural(resource: &str, kind: &str) -> bool {
    let kind = kind.to_ascii_lowercase();
    match resource.strip_prefix(kind.as_str()) {
        Some(rest) => matches!(rest, "" | "s" | "es"),
        None => kind.strip_suffix('y').is_some_and(|stem| resource.strip_prefix(stem) == Some("ies")),
    }
}

/// Whether `text` is what `pattern` says, where `*` stands for any characters.
fn glob(pattern: &str, text: &str, any_case: bool) -> bool {
    let same = |a: &[u8], b: &[u8]| if any_case { a.eq_ignore_ascii_case(b) } else { a == b };
    let (mut rest, mut parts) = (text.as_bytes(), pattern.as_bytes().split(|byte| *byte == b'*'));
    let first = parts.next().unwrap_or_default();
    let Some((begin, after)) = rest.split_at_checked(first.len()) else { return false };
    if !same(begin, first) {
        return false;
    }
    rest = after;
    let mut parts = parts.peekable();
    if parts.peek().is_none() {
        return rest.is_empty();
    }
    while let Some(part) = parts.next() {
        if parts.peek().is_none() {
            return rest.len() >= part.len() && same(&rest[rest.len() - part.len()..], part);
        }
        let found = (0..=rest.len().saturating_sub(part.len()))
            .find(|at| rest.get(*at..at + part.len()).is_some_and(|begin| same(begin, part)));
        let Some(at) = found else { return false };
        rest = &rest[at + part.len()..];
    }
    true
}

/// A way from an object's root to what is masked. Lists are looked through: a name goes for each entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Path(Vec<Segment>);

/// Names of one level.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    name: String,
    /// `*` in it stands for itself.
    is_quoted: bool,
}

impl Segment {
    /// Whether it is, or includes, this name.
    pub(super) fn is(&self, name: &str) -> bool {
        if self.is_quoted { self.name == name } else { glob(&self.name, name, false) }
    }
}

impl Path {
    fn parse(text: &str) -> Result<Self, &'static str> {
        let mut rest = text.strip_prefix('$').unwrap_or(text);
        let mut segments = Vec::new();
        while !rest.is_empty() {
            if let Some(after) = rest.strip_prefix("[*]") {
                rest = after;
                continue;
            }
            let quote = ["[\"", "['"].into_iter().find_map(|open| rest.strip_prefix(open).zip(open.get(1..)));
            if let Some((quoted, quote)) = quote {
                let close = format!("{quote}]");
                let Some((name, after)) = quoted.split_once(&close) else {
                    return Err("has a name in brackets that does not end; write it as data[\"tls.key\"]");
                };
                segments.push(Segment { name: name.to_owned(), is_quoted: true });
                rest = after;
                continue;
            }
            if rest.starts_with('[') {
                return Err(
                    "has something in brackets that is neither * nor a name in quotes; lists are looked through, \
                            so leave indices out",
                );
            }
            rest = rest.strip_prefix('.').unwrap_or(rest);
            let end = rest.find(['.', '[']).unwrap_or(rest.len());
            let (name, after) = rest.split_at(end);
            if name.is_empty() {
                return Err("has a level without a name; write it as data.* or spec.users[*].password");
            }
            segments.push(Segment { name: name.to_owned(), is_quoted: false });
            rest = after;
        }
        match segments.len() {
            0 => Err("names nothing; write it as data.* or spec.users[*].password"),
            1..=SEGMENTS_MAX => Ok(Self(segments)),
            _ => Err("has too many levels; no object is as deep"),
        }
    }

    pub(super) fn segments(&self) -> &[Segment] {
        &self.0
    }

    /// Where on the way the target of a JSON Patch is: what is left of it from there, in each way to read the target. Empty: at
    /// its end, or beyond.
    pub(super) fn behind(&self, pointer: &[String]) -> Vec<&[Segment]> {
        let mut reached = vec![0];
        for name in pointer {
            let mut next = Vec::new();
            for at in reached {
                let Some(segment) = self.0.get(at) else { return vec![&[]] };
                if segment.is(name) {
                    next.push(at + 1);
                }
                // An entry of a list, which the path looks through.
                if name == "-" || name.bytes().all(|byte| byte.is_ascii_digit()) {
                    next.push(at);
                }
            }
            next.sort_unstable();
            next.dedup();
            reached = next;
        }
        reached.into_iter().map(|at| &self.0[at..]).collect()
    }
}

#[cfg(test)]
mod tests {
    use expect_test::{Expect, expect};

    use super::{FieldMask, MaskRules, Masks, Path, glob, is_plural};

    #[test]
    fn globs_match_whole_names() {
        for (pattern, text, matches) in [
            ("*PASSWORD*", "db_password_1", true),
            ("*KEY", "API_KEY", true),
            ("*KEY", "KEYS", false),
            ("A*B*C", "AxBBxC", true),
            ("A*B", "AB", true),
            ("A*A", "A", false),
            ("*", "", true),
            ("a", "ab", false),
        ] {
            assert_eq!(glob(pattern, text, true), matches, "{pattern} {text}");
        }
        assert!(!glob("data", "DATA", false));
    }

    #[test]
    fn kinds_are_known_by_their_resources() {
        for (resource, kind) in [
            ("configmaps", "ConfigMap"),
            ("ingresses", "Ingress"),
            ("networkpolicies", "NetworkPolicy"),
            ("gateways", "Gateway"),
            ("endpoints", "Endpoints"),
        ] {
            assert!(is_plural(resource, kind), "{resource} {kind}");
        }
        assert!(!is_plural("configmapsets", "ConfigMap"));
    }

    #[test]
    fn a_path_is_found_in_the_target_of_a_patch() {
        let path = Path::parse(r#"$.spec.users[*]["pass.word"].x*"#).unwrap();
        let left = |pointer: &str| {
            let pointer: Vec<_> = pointer.split('/').skip(1).map(str::to_owned).collect();
            path.behind(&pointer).iter().map(|left| left.len()).collect::<Vec<_>>()
        };
        assert_eq!(left(""), [4]);
        assert_eq!(left("/spec/users/0"), [2]);
        assert_eq!(left("/spec/users/0/pass.word/xy/z"), [0]);
        assert!(left("/spec/other").is_empty());
        assert!(left("/spec/users/pass.wordy").is_empty());
    }

    #[track_caller]
    fn refused(rules: MaskRules, expected: Expect) {
        let error = Masks::new(rules).expect_err("is refused");
        expected.assert_eq(&format!("{}: {}", error.place, error.problem));
    }

    #[test]
    fn what_cannot_be_read_is_refused_by_its_place() {
        let path = |path: &str| MaskRules {
            fields: vec![FieldMask { kinds: vec![], paths: vec!["data.*".into(), path.into()] }],
            ..MaskRules::default()
        };
        refused(
            path("data..x"),
            expect![
                "fields[0].paths[1]: has a level without a name; write it as data.* or spec.users[*].password"
            ],
        );
        refused(
            path("spec.a[0]"),
            expect![
                "fields[0].paths[1]: has something in brackets that is neither * nor a name in quotes; lists are looked through, so leave indices out"
            ],
        );
        refused(
            path("data['x"),
            expect![[
                r#"fields[0].paths[1]: has a name in brackets that does not end; write it as data["tls.key"]"#
            ]],
        );
        refused(
            MaskRules { fields: vec![FieldMask::default()], ..MaskRules::default() },
            expect!["fields[0].paths: names no path; without one nothing is masked"],
        );
        refused(
            MaskRules { environment: vec![String::new()], ..MaskRules::default() },
            expect!["environment[0]: must have from 1 to 1024 bytes"],
        );
    }

    #[test]
    fn debug_spells_no_expression() {
        let rules = MaskRules { patterns: vec!["hunter2".into()], ..MaskRules::default() };
        assert_eq!(format!("{:?}", Masks::new(rules).unwrap()), "Masks((6, 0, 1))");
    }
}
