//! What expressions mean, what of the language is left out, and what it says where there is no value.

use expect_test::{Expect, expect};
use proptest::prelude::*;
use serde_json::{Value as Json, json};

use super::expression::{
    Expression, ExpressionError, INPUT_BYTES_MAX, INPUT_DEPTH_MAX, INPUT_VALUES_MAX, SOURCE_BYTES_MAX,
    VARIABLES_MAX, Value, Variables,
};

fn claims() -> Json {
    json!({
        "sub": "system:serviceaccount:ci:runner",
        "groups": ["dev", "ops", "admins"],
        "email": "Jane@Example.com",
        "email_verified": true,
        "level": 3,
        "ratio": 1.5,
        "big": u64::MAX,
        "none": null,
        "kubernetes.io": {"pod": {"name": "a", "uid": "u-1"}},
        "labels": {"team": "blue", "tier": "1"},
    })
}

#[track_caller]
pub(super) fn evaluated(source: &str, claims: &Json) -> Result<Value, ExpressionError> {
    let claims = Value::from_json(claims)?;
    Expression::compile(source, &["claims"])?.evaluate(&Variables::new().with("claims", &claims))
}

#[track_caller]
fn check(source: &str, expected: Json) {
    let value = evaluated(source, &claims()).unwrap_or_else(|error| panic!("{source}: {error}"));
    assert_eq!(value.to_json(), Some(expected), "{source}");
}

#[track_caller]
fn fails(source: &str, expected: Expect) {
    let error = evaluated(source, &claims()).map(|value| value.to_json()).expect_err("fails");
    expected.assert_eq(&error.to_string());
}

#[test]
fn expressions_mean_what_they_mean_in_kubernetes() {
    check("claims.sub", json!("system:serviceaccount:ci:runner"));
    check("'oidc:' + claims.sub", json!("oidc:system:serviceaccount:ci:runner"));
    check("claims.sub.startsWith('system:serviceaccount:ci:')", json!(true));
    check("claims.sub.endsWith(':runner') && claims.sub.contains('ci')", json!(true));
    check("'ops' in claims.groups", json!(true));
    check("'nobody' in claims.groups", json!(false));
    check("'team' in claims.labels && claims.labels['team'] == 'blue'", json!(true));
    check("claims.groups.exists(g, g.startsWith('adm'))", json!(true));
    check("claims.groups.all(g, size(g) == 3)", json!(false));
    check("claims.groups.exists_one(g, g == 'dev')", json!(true));
    check("claims.groups.filter(g, g != 'dev').map(g, 'oidc:' + g)", json!(["oidc:ops", "oidc:admins"]));
    check("claims.groups.map(g, g != 'dev', 'oidc:' + g)", json!(["oidc:ops", "oidc:admins"]));
    check("claims.labels.all(key, key.size() == 4)", json!(true));
    check("claims.groups.map(g, claims.labels.exists(k, k == g))", json!([false, false, false]));
    check("has(claims.email) ? claims.email.lowerAscii() : 'none'", json!("jane@example.com"));
    check("has(claims.absent)", json!(false));
    check("has(claims.labels.team)", json!(true));
    check("claims.absent == 'x' || claims.level == 3", json!(true));
    check("claims['kubernetes.io'].pod.uid", json!("u-1"));
    check("claims.sub.split(':')[2]", json!("ci"));
    check("claims.groups.join(',')", json!("dev,ops,admins"));
    check("claims.sub.substring(7, 21)", json!("serviceaccount"));
    check("claims.level + 1", json!(4));
    check("claims.level > 2 && claims.ratio < 2", json!(true));
    check("claims.big > 1", json!(true));
    check("claims.none == null", json!(true));
    check("claims.email.matches('^[A-Za-z]+@[Ee]xample[.]com$')", json!(true));
    check("claims.groups.exists(g, g.matches('^a'))", json!(true));
    check("{'a': claims.level, 'b': [1, 2.5, null]}", json!({"a": 3, "b": [1, 2.5, null]}));
    check("type(claims.sub) == string && string(claims.level) == '3' && int('7') == 7", json!(true));
    check("claims.groups + ['more']", json!(["dev", "ops", "admins", "more"]));
    check("'ä€'.size()", json!(2));
    check("claims.?email_verified.orValue(true) == true", json!(true));
    check("claims.?absent.deeper.orValue('none')", json!("none"));
    check("claims.labels[?'team'].hasValue() ? claims.labels[?'team'].value() : ''", json!("blue"));
    check("[1, 2].exists(claims, claims == 2)", json!(true));
}

#[test]
fn what_cannot_be_known_is_refused_where_it_stands() {
    fails(
        "claims.sub == cliams.sub",
        expect![[r#"line 1, column 15: unknown variable "cliams"; known here: claims"#]],
    );
    fails(
        "true &&\n  user.name == 'a'",
        expect![[r#"line 2, column 3: unknown variable "user"; known here: claims"#]],
    );
    fails("[1].map(x, y)", expect![[r#"line 1, column 12: unknown variable "y"; known here: claims"#]]);
    fails(
        "[1].map(x, x) == [x]",
        expect![[r#"line 1, column 19: unknown variable "x"; known here: claims"#]],
    );
    fails(
        ".claims.sub == 'a'",
        expect![[r#"line 1, column 2: unknown variable ".claims"; known here: claims"#]],
    );
    fails(
        "claims.sub.replace('a', 'b')",
        expect![[
            r#"line 1, column 19: unknown method "replace"; known with these arguments: charAt, contains, endsWith, hasValue, indexOf, join, lastIndexOf, lowerAscii, matches, orValue, size, split, startsWith, substring, trim, upperAscii, value"#
        ]],
    );
    fails(
        "now() > 1",
        expect![[
            r#"line 1, column 4: unknown function "now"; known with these arguments: bool, bytes, double, dyn, int, size, string, type, uint"#
        ]],
    );
    fails(
        "timestamp('2024-01-01T00:00:00Z')",
        expect![[
            r#"line 1, column 10: unknown function "timestamp"; known with these arguments: bool, bytes, double, dyn, int, size, string, type, uint"#
        ]],
    );
    fails("claims.sub.size(1)", expect![[r#"line 1, column 16: "size" does not take 1 arguments"#]]);
}

#[test]
fn what_of_the_language_is_left_out_is_refused_where_it_stands() {
    fails(
        "optional.none()",
        expect![[
            r#"line 1, column 14: unknown method "none"; known with these arguments: charAt, contains, endsWith, hasValue, indexOf, join, lastIndexOf, lowerAscii, matches, orValue, size, split, startsWith, substring, trim, upperAscii, value"#
        ]],
    );
    fails(
        "[?claims.?sub]",
        expect!["line 1, column 1: is not supported here: optional elements and messages are left out"],
    );
    fails(
        "{?1: claims.?sub}",
        expect!["line 1, column 1: is not supported here: optional elements are left out"],
    );
    fails(
        "claims.?sub",
        expect![
            "the expression yields optional_type; it may yield booleans, numbers, strings, null, and lists and maps of those"
        ],
    );
    fails(
        "Message{a: 1}",
        expect!["line 1, column 8: is not supported here: optional elements and messages are left out"],
    );
    fails(
        "claims.sub ==",
        expect![
            "line 1, column 14: Syntax error: mismatched input '<EOF>' expecting {'[', '{', '(', '.', '-', '!', 'true', 'false', 'null', NUM_FLOAT, NUM_INT, NUM_UINT, STRING, BYTES, IDENTIFIER}"
        ],
    );
    fails(
        "",
        expect![
            "line 1, column 1: Syntax error: mismatched input '<EOF>' expecting {'[', '{', '(', '.', '-', '!', 'true', 'false', 'null', NUM_FLOAT, NUM_INT, NUM_UINT, STRING, BYTES, IDENTIFIER}"
        ],
    );
    fails("'abc", expect!["line 1, column 1: Syntax error: token recognition error at: ''abc'"]);
    fails("has(claims)", expect!["line 1, column 5: invalid argument to has() macro"]);
}

#[test]
fn what_may_run_long_is_refused_when_it_is_compiled() {
    fails(
        "claims.sub.matches(claims.email)",
        expect![[
            r#"line 1, column 19: the argument of "matches" must be a string in the source, at most 256 bytes"#
        ]],
    );
    fails(
        "claims.sub.matches('(')",
        expect![[r#"line 1, column 19: the pattern of "matches" is refused: error: unclosed group"#]],
    );
    fails(
        r"claims.sub.matches('(\\w{100}){100}')",
        expect![[
            r#"line 1, column 19: the pattern of "matches" is refused: Compiled regex exceeds size limit of 65536 bytes."#
        ]],
    );
    fails(
        &format!("claims.sub.matches('{}')", "a".repeat(257)),
        expect![[
            r#"line 1, column 19: the argument of "matches" must be a string in the source, at most 256 bytes"#
        ]],
    );
    fails(
        "claims.groups.join(claims.sub)",
        expect![[
            r#"line 1, column 19: the argument of "join" must be a string in the source, at most 32 bytes"#
        ]],
    );
    fails(
        "claims.sub.indexOf(claims.email)",
        expect![[
            r#"line 1, column 19: the argument of "indexOf" must be a string in the source, at most 32 bytes"#
        ]],
    );
    fails(
        "[1].all(a, [1].all(b, [1].all(c, true)))",
        expect!["line 1, column 30: macros are nested deeper than 2"],
    );
    fails(
        &format!("'{}'", "a".repeat(SOURCE_BYTES_MAX)),
        expect!["the expression has 4098 bytes, more than 4096; split it"],
    );
    fails(
        &vec!["claims.level"; 200].join(" || "),
        expect!["line 1, column 2705: the expression has more than 512 parts; split it"],
    );
    fails(
        &vec!["claims.level"; 40].join(" + "),
        expect!["line 1, column 89: is nested deeper than 32; split it"],
    );
}

#[test]
fn what_has_no_value_says_so_without_showing_what_it_read() {
    fails("claims.absent", expect![[r#"no such key: "absent"; test for it with has()"#]]);
    fails("claims.sub + 1", expect![[r#""add" cannot be done with its operands"#]]);
    fails("claims.sub < 1", expect!["found no matching overload for '_<_' applied to '(string, int)'"]);
    fails("claims.sub - 'a'", expect![[r#""sub" cannot be done with its operands"#]]);
    fails("claims.level / 0", expect!["division by zero"]);
    fails("9223372036854775807 + 1", expect!["a number is out of range"]);
    fails("-(-9223372036854775807 - 1)", expect!["a number is out of range"]);
    fails("claims.groups[7]", expect!["an index is out of range"]);
    fails("claims.groups['a']", expect!["found no matching overload for '_[_]' applied to '(list, string)'"]);
    fails("claims.sub.all(x, true)", expect!["a value is not iterable"]);
    fails(
        "claims.level.matches('a')",
        expect!["found no matching overload for 'matches' applied to 'int.(string)'"],
    );
    fails("{claims.sub: 1, claims.sub: 2}", expect!["a map has one key twice"]);
    fails("int(claims.sub)", expect!["int cannot be done with its arguments"]);
    fails("int(1e300)", expect!["int cannot be done with its arguments"]);
    fails("claims.sub.substring(9, 2)", expect!["substring cannot be done with its arguments"]);
    fails("claims.sub && true", expect!["found no matching overload for '_&&_' applied to '(string, bool)'"]);
    fails("!claims.sub", expect!["found no matching overload for '!_' applied to '(string)'"]);
    fails("claims.sub ? 1 : 2", expect!["a value is not bool"]);
    fails(
        "b'abc'",
        expect![
            "the expression yields bytes; it may yield booleans, numbers, strings, null, and lists and maps of those"
        ],
    );
    fails("claims.sub.type", expect!["found no matching overload for '_._' applied to '(string, string)'"]);
}

#[test]
fn typed_results_are_checked() {
    let claims = Value::from_json(&claims()).expect("is small");
    let variables = Variables::new().with("claims", &claims);
    let compiled = |source| Expression::compile(source, &["claims"]).expect("compiles");
    assert_eq!(compiled("claims.email_verified").boolean(&variables), Ok(true));
    assert_eq!(compiled("claims.labels.team").string(&variables).as_deref(), Ok("blue"));
    assert_eq!(
        compiled("claims.groups").strings(&variables),
        Ok(vec!["dev".into(), "ops".into(), "admins".into()])
    );
    assert_eq!(compiled("claims.labels.team").strings(&variables), Ok(vec!["blue".into()]));
    assert_eq!(compiled("claims.none").strings(&variables), Ok(vec![]));
    let wrong = |error: ExpressionError| error.to_string();
    assert_eq!(
        compiled("claims.groups").boolean(&variables).map_err(wrong),
        Err("the expression yields list, not a boolean".to_owned())
    );
    assert_eq!(
        compiled("claims.level").string(&variables).map_err(wrong),
        Err("the expression yields int, not a string".to_owned())
    );
    assert_eq!(
        compiled("[1]").strings(&variables).map_err(wrong),
        Err("the expression yields list, not a string or a list of strings".to_owned())
    );
}

#[test]
fn what_is_read_by_name_is_known() {
    let reads =
        |source, key| Expression::compile(source, &["claims"]).expect("compiles").selects("claims", key);
    for source in [
        "claims.email",
        "'x' + claims.email.lowerAscii()",
        "claims['email']",
        "claims.?email.orValue('')",
        "has(claims.email)",
        "[1].map(x, claims.email)",
        "claims[?'email'].hasValue()",
    ] {
        assert!(reads(source, "email"), "{source}");
    }
    for source in [
        "claims.email_verified",
        "'email' in claims",
        "claims.a.email",
        "[{'email': 1}].map(claims, claims.email)",
    ] {
        assert!(!reads(source, "email"), "{source}");
    }
}

#[test]
fn values_that_are_too_large_are_refused_not_cut() {
    let refused = |json: Json| Value::from_json(&json).map(|_| ()).expect_err("is refused");
    assert_eq!(refused(json!("a".repeat(INPUT_BYTES_MAX + 1))), ExpressionError::InputTooLarge);
    assert_eq!(refused(json!(vec![1; INPUT_VALUES_MAX])), ExpressionError::InputTooLarge);
    let deep = (0..=INPUT_DEPTH_MAX).fold(json!(1), |inner, _| json!([inner]));
    assert_eq!(refused(deep), ExpressionError::InputTooLarge);
    assert!(Value::from_json(&json!("a".repeat(INPUT_BYTES_MAX))).is_ok());
    assert!(Value::from_json(&json!(vec![1; INPUT_VALUES_MAX - 1])).is_ok());
    let value = Value::from_json(&json!(1)).expect("is small");
    let names: Vec<String> = (0..=VARIABLES_MAX).map(|index| format!("v{index}")).collect();
    let many = names.iter().fold(Variables::new(), |variables, name| variables.with(name, &value));
    let expression = Expression::compile("v0", &["v0"]).expect("compiles");
    assert_eq!(expression.evaluate(&many).map(|_| ()), Err(ExpressionError::InputTooLarge));
}

fn source() -> impl Strategy<Value = String> {
    let leaf = prop_oneof![
        Just("claims.sub".to_owned()),
        Just("claims.groups".to_owned()),
        Just("claims.level".to_owned()),
        Just("claims.labels".to_owned()),
        Just("claims".to_owned()),
        Just("x".to_owned()),
        Just("true".to_owned()),
        Just("null".to_owned()),
        Just("''".to_owned()),
        any::<i64>().prop_map(|number| number.to_string()),
        any::<u64>().prop_map(|number| format!("{number}u")),
        any::<f64>().prop_map(|number| format!("{number:?}")),
        "[a-zäß€ ]{0,6}".prop_map(|text| format!("'{text}'")),
    ];
    leaf.prop_recursive(5, 40, 4, |inner| {
        let binary = prop_oneof![
            Just("+"),
            Just("-"),
            Just("*"),
            Just("/"),
            Just("%"),
            Just("=="),
            Just("!="),
            Just("<"),
            Just(">="),
            Just("&&"),
            Just("||"),
            Just("in"),
        ];
        let macros =
            prop_oneof![Just("all"), Just("exists"), Just("exists_one"), Just("map"), Just("filter")];
        let functions = prop_oneof![
            Just("size"),
            Just("string"),
            Just("int"),
            Just("uint"),
            Just("double"),
            Just("bool"),
            Just("bytes"),
            Just("type"),
            Just("dyn"),
        ];
        let methods = prop_oneof![
            Just("charAt"),
            Just("contains"),
            Just("endsWith"),
            Just("lowerAscii"),
            Just("size"),
            Just("split"),
            Just("startsWith"),
            Just("substring"),
            Just("trim"),
            Just("upperAscii"),
        ];
        prop_oneof![
            (inner.clone(), binary, inner.clone()).prop_map(|(a, op, b)| format!("({a} {op} {b})")),
            (inner.clone(), macros, inner.clone()).prop_map(|(a, f, b)| format!("{a}.{f}(x, {b})")),
            (functions, inner.clone()).prop_map(|(f, a)| format!("{f}({a})")),
            (inner.clone(), methods, proptest::collection::vec(inner.clone(), 0..3))
                .prop_map(|(a, f, args)| format!("{a}.{f}({})", args.join(", "))),
            (inner.clone(), inner.clone()).prop_map(|(a, b)| format!("{a}[{b}]")),
            (inner.clone(), inner.clone(), inner.clone()).prop_map(|(a, b, c)| format!("({a} ? {b} : {c})")),
            proptest::collection::vec(inner.clone(), 0..3)
                .prop_map(|items| format!("[{}]", items.join(", "))),
            (inner.clone(), inner.clone()).prop_map(|(a, b)| format!("{{{a}: {b}}}")),
            inner.clone().prop_map(|a| format!("!{a}")),
            inner.prop_map(|a| format!("-{a}")),
        ]
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn random_expressions_have_a_value_or_an_error_and_always_the_same(source in source()) {
        let claims = Value::from_json(&claims()).expect("is small");
        let variables = Variables::new().with("claims", &claims).with("x", &claims);
        if let Ok(expression) = Expression::compile(&source, &["claims", "x"]) {
            let first = expression.evaluate(&variables);
            // Failed stands for a panic of the library: none may be reachable.
            prop_assert_ne!(first.as_ref().err(), Some(&ExpressionError::Failed));
            let second = expression.evaluate(&variables);
            let json = |result: Result<Value, _>| result.map(|value| value.to_json());
            prop_assert_eq!(json(first), json(second));
        }
    }
}
