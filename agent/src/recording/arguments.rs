//! Arguments of commands as they are recorded: what looks like a credential is masked. Sans-IO.
//!
//! They are free text that declares nothing, so this looks for the forms in which clients and shells carry a secret, and masks
//! too much rather than too little. In what a shell reads (`sh -c`) words are masked, so that the commands beside a secret stay; of any
//! other argument all that follows where a secret begins.

use std::{borrow::Cow, ops::Range, sync::LazyLock};

use regex::Regex;
use serde_json::Value;

use super::{
    body::Sensitivity,
    bounded,
    mask::{MASK_PREFIX, Masker},
    walk::{Around, Walk, is_mask},
};

/// Flags of kubectl, helm, curl and their like whose value is a credential.
const CREDENTIAL_FLAGS: [&str; 12] = [
    "--token",
    "--password",
    "--username",
    "--from-literal",
    "--docker-password",
    "--auth-provider-arg",
    "--exec-env",
    "--header",
    "--user",
    "--proxy-user",
    "--oauth2-bearer",
    "--cookie",
];

/// Short flags whose value may hold a credential, whoever's they are.
const CREDENTIAL_SHORT_FLAGS: [&str; 3] = ["-H", "-u", "-b"];

/// curl's: header, user, cookie, proxy's user, certificate with its password.
const CURL_CREDENTIALS: &str = "HubUE";
/// curl's other short flags that have a value, which may follow without a space.
const CURL_VALUES: &str = "AcCdDeFhKmoPQrtTwxXyYz";

/// Least bytes of a URI's user without a password for it to count as a token.
const TOKEN_USER_BYTES: usize = 16;

/// What is looked for in text.
struct Expressions {
    /// A name that speaks of a secret, its quote, and what separates it from the value.
    named: Regex,
    /// A header's name, in front of its value.
    header: Regex,
    /// A scheme of `Authorization`, and what follows it.
    scheme: Regex,
    /// What stands before the host of a URI.
    user: Regex,
    /// A credential flag in a script.
    flag: Regex,
    /// What is a credential by its form alone.
    form: Regex,
    /// What stands between spaces.
    word: Regex,
    /// A mask.
    mask: Regex,
    /// A command that is about Secrets.
    secrets: Regex,
    /// Where a document begins, or the part of a Secret that has its values.
    document: Regex,
}

static EXPRESSIONS: LazyLock<Option<Expressions>> = LazyLock::new(|| {
    let flags = CREDENTIAL_FLAGS.join("|");
    let built = |text: &str| Regex::new(text).ok();
    Some(Expressions {
        named: built(
            r#"(?i)([\w.\[\]-]*(?:token|passw(?:or)?d|secret|credential|api[_-]?key|private[_-]?key)[\w.\[\]-]*)(\\*["'])?(\s*)([:=])"#,
        )?,
        header: built(
            r#"(?i)(?:^|[\s"'])(?:(?:proxy-)?authorization|(?:set-)?cookie|[\w-]*(?:token|secret|password|api-?key)|x-auth[\w-]*)\s*:\s*"#,
        )?,
        scheme: built(r"(?i)\b(?:bearer|basic|negotiate|token)\s+([\w.~+/-]{8,}=*)")?,
        user: built(r#"[A-Za-z][A-Za-z0-9+.-]*://([^/\s@"'?#]+)@"#)?,
        flag: built(&format!(r#"[\s"'](?:{flags})(?:=|\s+)"#))?,
        form: built(
            r"eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*|k8s-aws-v1\.[\w-]+|gh[pousr]_\w{20,}|-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*",
        )?,
        word: built(r"\S+")?,
        mask: built(&format!("^{MASK_PREFIX}(?:0|le[0-9]{{1,20}}):[0-9a-f]{{16}}"))?,
        secrets: built(r"(?i)\bsecrets?\b|stringData")?,
        document: built(r#"[\[{]\s*\\*["']|\[\s*\{|(?i:stringData|data)\\*["']?\s*:"#)?,
    })
});

/// What an argument is because of the one before.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    Any,
    /// A credential.
    Credential,
    /// What a shell or an interpreter reads.
    Script,
}

impl Masker {
    /// Arguments as they are recorded. They are a claim anyway; what looks like a credential is masked.
    pub(super) fn arguments(&self, arguments: &[String]) -> Vec<String> {
        self.arguments_with(arguments, |uri| self.uri(uri))
    }

    /// The same, with something else for arguments that are URIs with a query.
    pub(super) fn arguments_with(
        &self,
        arguments: &[String],
        masked_uri: impl Fn(&str) -> String,
    ) -> Vec<String> {
        let Some(expressions) = &*EXPRESSIONS else {
            return arguments.iter().map(|argument| self.mask(argument.as_bytes())).collect();
        };
        let about_secrets = arguments.iter().any(|argument| expressions.secrets.is_match(argument));
        let of_curl = arguments.iter().any(|argument| argument.rsplit('/').next() == Some("curl"));
        let mut place = Place::Any;
        let one = |argument: &String| {
            let here = std::mem::replace(&mut place, Place::Any);
            if here == Place::Credential {
                return self.mask(argument.as_bytes());
            }
            place = announced(argument);
            if let Some(at) = curl_credential(argument).filter(|_| of_curl) {
                let (flags, value) = argument.split_at(at);
                if value.is_empty() {
                    place = Place::Credential;
                    return argument.clone();
                }
                return format!("{flags}{}", self.mask(value.as_bytes()));
            }
            if let Some(masked) = self.flag(argument).or_else(|| self.document(argument, about_secrets)) {
                return masked;
            }
            let has_uri =
                argument.contains('?') && argument.contains("://") && !argument.contains(char::is_whitespace);
            let text =
                if has_uri { Cow::Owned(masked_uri(argument)) } else { Cow::Borrowed(argument.as_str()) };
            let is_script = here == Place::Script;
            self.found(&text, expressions.spans(self, &text, is_script, about_secrets))
        };
        arguments.iter().map(one).collect()
    }

    /// `--token=VALUE`; `--from-literal=key=VALUE` keeps its key.
    fn flag(&self, argument: &str) -> Option<String> {
        let (flag, value) = argument.split_once('=').filter(|(flag, _)| CREDENTIAL_FLAGS.contains(flag))?;
        Some(match value.split_once('=') {
            Some((key, value)) if flag == "--from-literal" => {
                format!("{flag}={key}={}", self.mask(value.as_bytes()))
            }
            _ => format!("{flag}={}", self.mask(value.as_bytes())),
        })
    }

    /// JSON: a patch, what is created, what is sent. None: it is something else.
    fn document(&self, argument: &str, about_secrets: bool) -> Option<String> {
        let is_flag = argument.starts_with('-');
        let (flag, text) = argument.split_once('=').filter(|_| is_flag).unwrap_or(("", argument));
        if !text.trim_start().starts_with(['{', '[']) {
            return None;
        }
        // A name that speaks of a secret decides for itself.
        let mut value = bounded::json(text.as_bytes()).filter(|_| !speaks_of_secret(flag))?;
        let mut walk = Walk { masker: self, masks: 0 };
        let sensitivity = if about_secrets { Sensitivity::Secrets } else { Sensitivity::None };
        walk.root(&mut value, Around { sensitivity, fields: 0, own: 0 });
        self.named(&mut value);
        let separator = &argument[flag.len()..argument.len() - text.len()];
        // Serialised anew: what the parser dropped, a name that stands twice, must not survive.
        Some(format!("{flag}{separator}{value}"))
    }

    /// Masks what stands under a name that speaks of a secret, and what is a credential in other strings.
    fn named(&self, value: &mut Value) {
        match value {
            Value::Array(items) => items.iter_mut().for_each(|item| self.named(item)),
            Value::Object(entries) => {
                for (name, value) in entries {
                    match value {
                        Value::String(text) if is_mask(text) => {}
                        Value::String(_) | Value::Number(_) if speaks_of_secret(name) => {
                            let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
                            *value = Value::String(self.mask(text.as_bytes()));
                        }
                        other => self.named(other),
                    }
                }
            }
            Value::String(text) if !is_mask(text) => {
                *text = match &*EXPRESSIONS {
                    Some(expressions) => self.found(text, expressions.spans(self, text, true, false)),
                    None => self.mask(text.as_bytes()),
                };
            }
            _ => {}
        }
    }

    /// Text with these places masked, and what the operator's expressions find.
    fn found(&self, text: &str, mut spans: Vec<Range<usize>>) -> String {
        if spans.is_empty() {
            return self.text(text);
        }
        // Where both find something, a part of what one has found would hide it from the other.
        if self.masks().patterns().is_some_and(|patterns| patterns.are_in(text.as_bytes())) {
            return self.mask(text.as_bytes());
        }
        spans.sort_unstable_by_key(|span| span.start);
        let (mut masked, mut from) = (String::new(), 0);
        let mut spans = spans.into_iter().peekable();
        while let Some(Range { start, mut end }) = spans.next() {
            while let Some(next) = spans.next_if(|next| next.start <= end) {
                end = end.max(next.end);
            }
            masked.push_str(&text[from..start]);
            masked.push_str(&self.mask(&text.as_bytes()[start..end]));
            from = end;
        }
        masked.push_str(&text[from..]);
        masked
    }
}

impl Expressions {
    /// Where secrets stand in text; not sorted, and they may overlap.
    fn spans(&self, masker: &Masker, text: &str, is_script: bool, about_secrets: bool) -> Vec<Range<usize>> {
        let mut search = Search { text, is_script, reached: 0, spans: Vec::new() };
        for found in self.named.captures_iter(text) {
            let part = |at: usize| found.get(at).map_or("", |part| part.as_str());
            let end = found.get(0).map_or(0, |found| found.end());
            let rest = &text[end..];
            let (is_quoted, is_spaced) = (!part(2).is_empty(), !part(3).is_empty());
            // `image:tag` is no value; `name: value`, `"name":value` and `name:"value"` are.
            let is_value =
                part(4) == "=" || is_quoted || rest.starts_with([' ', '\t', '\n', '"', '\'', '\\']);
            let skipped = if part(4) == ":" || is_spaced { rest.len() - rest.trim_start().len() } else { 0 };
            if is_value && speaks_of_secret(part(1)) {
                search.value(end + skipped);
            }
        }
        search.reached = 0;
        for (at, _) in text.match_indices('=') {
            let name = text[..at].rsplit(|c: char| !(c.is_ascii_alphanumeric() || c == '_')).next();
            let name = name.filter(|name| !name.is_empty()).unwrap_or_default();
            let is_flag = text[..at - name.len()].ends_with(['-', '.']);
            if !name.is_empty() && !is_flag && masker.masks().environment(name) {
                search.value(at + 1);
            }
        }
        search.reached = 0;
        self.flag.find_iter(text).for_each(|found| search.word(found.end()));
        search.reached = 0;
        if text.contains("curl") {
            let mut is_next = false;
            for word in self.word.find_iter(text) {
                let credential = curl_credential(word.as_str());
                match credential {
                    _ if is_next => search.word(word.start()),
                    Some(at) if at < word.len() => search.word(word.start() + at),
                    _ => {}
                }
                is_next = credential == Some(word.len());
            }
        }
        search.reached = 0;
        self.header.find_iter(text).for_each(|found| search.line(found.end()));
        search.reached = 0;
        let group = |found: regex::Captures<'_>| found.get(1).map(|found| found.range());
        // Words of a sentence have neither.
        let is_coded = |span: &Range<usize>| {
            text[span.clone()].contains(|c: char| c.is_ascii_uppercase() || c.is_ascii_digit())
        };
        search.spans.extend(self.scheme.captures_iter(text).filter_map(group).filter(is_coded));
        let is_credential =
            |user: &Range<usize>| user.len() >= TOKEN_USER_BYTES || text[user.clone()].contains(':');
        search.spans.extend(self.user.captures_iter(text).filter_map(group).filter(is_credential));
        search.spans.extend(self.form.find_iter(text).map(|found| found.range()));
        if let Some(found) = self.document.find(text).filter(|_| about_secrets) {
            search.spans.push(found.start()..text.len());
        }
        search.spans.retain(|span| span.start < span.end && !self.is_masked(&text[span.clone()]));
        search.spans
    }

    /// Whether this is a mask already, of a URI's parameter, of which others may follow.
    fn is_masked(&self, text: &str) -> bool {
        self.mask.find(text).is_some_and(|mask| matches!(text.as_bytes().get(mask.end()), None | Some(b'&')))
    }
}

/// A search through text from its start on, for values in one form after the other.
struct Search<'a> {
    text: &'a str,
    is_script: bool,
    /// What was found of this form ends here: what begins before it is a part of that, so that no byte is looked at for each of them.
    reached: usize,
    spans: Vec<Range<usize>>,
}

impl Search<'_> {
    /// A value begins here.
    fn value(&mut self, start: usize) {
        // A backslash: a string within a string, whose end is not looked for.
        if self.is_script && !self.text[start..].starts_with('\\') {
            self.word(start);
        } else {
            self.until(start, |_| None);
        }
    }

    /// A shell's word begins here.
    fn word(&mut self, start: usize) {
        self.until(start, word_length);
    }

    /// What begins here goes on to the end of its line or string.
    fn line(&mut self, start: usize) {
        self.until(start, |rest| rest.find(['"', '\'', '\n']));
    }

    fn until(&mut self, start: usize, length: impl FnOnce(&str) -> Option<usize>) {
        if start < self.reached {
            return;
        }
        let rest = &self.text[start..];
        self.reached = start + length(rest).unwrap_or(rest.len());
        self.spans.push(start..self.reached);
    }
}

/// What the argument that follows this one is.
fn announced(argument: &str) -> Place {
    let is_credential = CREDENTIAL_FLAGS.contains(&argument)
        || CREDENTIAL_SHORT_FLAGS.contains(&argument)
        // `kubectl config set users.NAME.token VALUE`
        || argument.starts_with("users.") && speaks_of_secret(argument);
    let flags = argument.strip_prefix('-').unwrap_or_default();
    if is_credential {
        Place::Credential
    } else if flags.ends_with('c') && flags.bytes().all(|byte| byte.is_ascii_alphabetic()) {
        Place::Script
    } else {
        Place::Any
    }
}

/// Where in a group of curl's short flags the value begins of one that is a credential: the group's end, if it is the next argument.
fn curl_credential(argument: &str) -> Option<usize> {
    let flags = argument.strip_prefix('-').filter(|flags| !flags.starts_with('-'))?;
    let (at, flag) = flags
        .char_indices()
        .find(|(_, flag)| CURL_CREDENTIALS.contains(*flag) || CURL_VALUES.contains(*flag))?;
    CURL_CREDENTIALS.contains(flag).then_some(1 + at + 1)
}

/// Whether what has this name is a secret. What ends in `name` or `ref` says which one.
fn speaks_of_secret(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    let words =
        ["token", "password", "passwd", "secret", "credential", "apikey", "api_key", "api-key", "private"];
    words.iter().any(|word| name.contains(word))
        && !["name", "names", "ref", "refs"].iter().any(|end| name.ends_with(end))
}

/// How long the shell's word is with which text begins; none: to its end.
fn word_length(text: &str) -> Option<usize> {
    let (mut quote, mut is_escaped) = (None, false);
    for (at, c) in text.char_indices() {
        match (quote, c) {
            _ if std::mem::take(&mut is_escaped) => {}
            (Some(open), _) if c == open => quote = None,
            (Some('\''), _) => {}
            (_, '\\') => is_escaped = true,
            (Some(_), _) => {}
            (None, '\'' | '"') => quote = Some(c),
            (None, _) if c.is_whitespace() || ";|&()<>`".contains(c) => return Some(at),
            (None, _) => {}
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use expect_test::{Expect, expect};

    use crate::recording::mask::Masker;

    const CANARY: &str = "canary-Hunter2";

    /// Arguments, separated by `¦`; masks are shown without their digest.
    #[track_caller]
    fn check(given: &str, expected: Expect) {
        let given: Vec<_> = given.replace("CANARY", CANARY).split('¦').map(str::to_owned).collect();
        let masked = Masker::for_cluster(&[1; 32], "c").arguments(&given).join("¦");
        assert!(!masked.contains(CANARY), "{masked}");
        let digest = regex::Regex::new("weir:masked:(le[0-9]+):[0-9a-f]{16}").unwrap();
        expected.assert_eq(&digest.replace_all(&masked, "<$1>"));
    }

    #[test]
    fn flags_of_credentials_are_known() {
        check(
            "kubectl¦--token=CANARY¦--token¦CANARY¦-n¦x¦--from-literal=key=CANARY¦PASSWORD=CANARY and more",
            expect!["kubectl¦--token=<le16>¦--token¦<le16>¦-n¦x¦--from-literal=key=<le16>¦PASSWORD=<le32>"],
        );
        check(
            "kubectl¦set¦env¦--env=DB_PASSWORD=CANARY¦--env¦API_KEY=CANARY¦--env=LEVEL=info¦--sort-key=.a",
            expect![
                "kubectl¦set¦env¦--env=DB_PASSWORD=<le16>¦--env¦API_KEY=<le16>¦--env=LEVEL=info¦--sort-key=.a"
            ],
        );
        check("kubectl¦config¦set¦users.u.token¦CANARY", expect!["kubectl¦config¦set¦users.u.token¦<le16>"]);
    }

    #[test]
    fn what_curl_is_given_is_masked_wherever_its_flags_end() {
        check(
            "/usr/bin/curl¦-skH¦Authorization: Bearer CANARY¦-uu:CANARY¦-sSo¦/dev/null¦-HAuthorization:CANARY",
            expect!["/usr/bin/curl¦-skH¦<le64>¦-u<le16>¦-sSo¦/dev/null¦-H<le32>"],
        );
        check(
            r#"curl¦-d¦{"user":"u","password":"CANARY"}¦https://u:CANARY@host/a¦https://h/a?token=CANARY&b=c"#,
            expect![
                r#"curl¦-d¦{"password":"<le16>","user":"u"}¦https://<le16>@host/a¦https://h/a?token=<le16>&b=c"#
            ],
        );
        check("tar¦-Hcf¦a¦grep¦-rH¦word", expect!["tar¦-Hcf¦a¦grep¦-rH¦word"]);
    }

    #[test]
    fn documents_are_masked_as_bodies_are() {
        check(
            r#"kubectl¦patch¦secret¦s¦-p¦{"stringData":{"a":"CANARY"},"metadata":{"labels":{"b":"c"}}}"#,
            expect![
                r#"kubectl¦patch¦secret¦s¦-p¦{"metadata":{"labels":{"b":"c"}},"stringData":{"a":"<le16>"}}"#
            ],
        );
        check(
            r#"kubectl¦patch¦secrets/s¦--type=json¦-p=[{"op":"add","path":"/data/a","value":"CANARY"}]"#,
            expect![
                r#"kubectl¦patch¦secrets/s¦--type=json¦-p=[{"op":"add","path":"/data/a","value":"<le16>"}]"#
            ],
        );
        check(
            r#"kubectl¦patch¦secret¦s¦-p¦data: {a: CANARY, b: CANARY}¦-o¦jsonpath={.data.a}"#,
            expect!["kubectl¦patch¦secret¦s¦-p¦<le64>¦-o¦jsonpath={.data.a}"],
        );
        check(
            r#"kubectl¦run¦p¦--overrides={"spec":{"containers":[{"env":[{"name":"A_TOKEN","value":"CANARY"},{"name":"B","value":"c"}],"args":["-c","A_TOKEN=CANARY run"]}]}}"#,
            expect![
                r#"kubectl¦run¦p¦--overrides={"spec":{"containers":[{"args":["-c","A_TOKEN=<le16> run"],"env":[{"name":"A_TOKEN","value":"<le16>"},{"name":"B","value":"c"}]}]}}"#
            ],
        );
        check(
            r#"kubectl¦patch¦deploy¦d¦-p¦{"spec":{"replicas": 2}}"#,
            expect![[r#"kubectl¦patch¦deploy¦d¦-p¦{"spec":{"replicas":2}}"#]],
        );
    }

    #[test]
    fn of_helms_values_all_is_masked_that_follows_a_secret() {
        check(
            "helm¦--set=auth.password=CANARY,b=c¦--set-string¦a=1,password=CANARY¦--set¦replicas=3¦--set-json¦auth={\"password\":\"CANARY\"}",
            expect![
                "helm¦--set=auth.password=<le32>¦--set-string¦a=1,password=<le16>¦--set¦replicas=3¦--set-json¦auth={\"password\":<le32>"
            ],
        );
    }

    #[test]
    fn in_a_script_the_commands_beside_a_secret_stay() {
        check(
            "sh¦-ec¦export TOKEN=\"CANARY b\" && curl -sH 'Authorization: Bearer CANARY' https://h/x; kubectl --token CANARY delete ns prod",
            expect![
                "sh¦-ec¦export TOKEN=<le32> && curl -sH <le64> https://h/x; kubectl --token <le16> delete ns prod"
            ],
        );
        check(
            "bash¦-lc¦curl -sSu user:CANARY -b CANARY -HX:CANARY -o out https://h/a && ls -u x",
            expect!["bash¦-lc¦curl -sSu <le32> -b <le16> -H<le16> -o out https://h/a && ls -u <le8>"],
        );
        check(
            "bash¦-c¦kubectl create secret generic s --from-literal=a=CANARY && kubectl get pods",
            expect!["bash¦-c¦kubectl create secret generic s --from-literal=<le16> && kubectl get pods"],
        );
        check(
            "sh¦-c¦kubectl patch secret s -p '{\"stringData\":{\"a\":\"CANARY\"}}'",
            expect!["sh¦-c¦kubectl patch secret s -p '<le64>"],
        );
        check(
            r#"sh¦-c¦curl -d "{\"password\":\"CANARY b\"}" h"#,
            expect![r#"sh¦-c¦curl -d "{\"password\":<le32>"#],
        );
    }

    #[test]
    fn a_uri_hides_nothing_that_its_argument_is_masked_for() {
        check(
            "DATABASE_URL=postgres://u:CANARY@h/db?x=y¦WEBHOOK_SECRET=https://h/x?sig=CANARY¦https://h/?%74oken=CANARY&b=c",
            expect![
                "DATABASE_URL=postgres://<le16>@h/db?x=y¦WEBHOOK_SECRET=<le32>¦https://h/?%74oken=<le16>&b=c"
            ],
        );
        let mask = "weir:masked:le16:0123456789abcdef";
        check(
            &format!("--a-token={mask} CANARY¦A_TOKEN=weir:masked:CANARY"),
            expect!["--a-token=<le64>¦A_TOKEN=<le32>"],
        );
    }

    #[test]
    fn what_is_long_is_searched_in_the_time_that_its_length_takes() {
        // Each of these takes minutes if what follows a match is looked at for every match.
        for part in ["A_TOKEN=", "token: ", "X-A-Token: ", " --token=", " curl -u", "Bearer a", "https://"] {
            let argument = part.repeat(256 * 1024 / part.len());
            for before in ["-c", "x"] {
                Masker::for_cluster(&[1; 32], "c").arguments(&[before.to_owned(), argument.clone()]);
            }
        }
    }

    #[test]
    fn a_credential_is_known_by_its_form() {
        check(
            "git¦clone¦https://ghp_CANARYcanarycanary@github.com/a¦echo¦Bearer CANARY¦eyJhbGciOiJSUzI1.eyJzdWIiOiJh.CANARY",
            expect!["git¦clone¦https://<le32>@github.com/a¦echo¦Bearer <le16>¦<le64>"],
        );
        check(
            "echo¦basic authentication¦git@host:a¦ssh://git@host/a",
            expect!["echo¦basic authentication¦git@host:a¦ssh://git@host/a"],
        );
    }

    #[test]
    fn what_names_a_secret_stays() {
        let plain = "kubectl¦get¦secret¦s¦-o¦jsonpath={.data.password}¦--field-selector=type=Opaque¦-l¦app=token-service¦token-service:v1.2¦secretName: s";
        check(
            plain,
            expect![[
                r#"kubectl¦get¦secret¦s¦-o¦jsonpath={.data.password}¦--field-selector=type=Opaque¦-l¦app=token-service¦token-service:v1.2¦secretName: s"#
            ]],
        );
    }
}
