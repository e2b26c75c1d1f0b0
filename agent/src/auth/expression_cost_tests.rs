//! That no expression costs more than it may, and none is too deep for the stack it has.

use std::time::Duration;

use nix::time::{ClockId, clock_gettime};
use serde_json::{Value as Json, json};

use super::{
    expression::{DEPTH_MAX, Expression, ExpressionError, SOURCE_BYTES_MAX, Value, Variables},
    expression_tests::evaluated,
};

/// Claims as large as they may be, in the shapes that cost most.
fn largest() -> Json {
    json!({
        "many": vec!["a"; 4000],
        "long": "a".repeat(20_000),
        "longs": vec!["a".repeat(1000); 20],
        "nested": vec![vec![1; 50]; 50],
    })
}

/// What this thread has cost so far, however busy the machine is.
fn cpu_time() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).expect("there is a clock").into()
}

#[test]
fn no_expression_costs_more_than_it_may() {
    let inner_sum = vec!["claims.long"; 30].join(" + ");
    let sources = [
        "claims.many.all(a, claims.many.all(b, a == b))",
        "claims.many.exists(a, claims.many.exists(b, a != b))",
        "claims.many.map(a, claims.many.map(b, a + b))",
        "claims.many.map(a, claims)",
        "claims.many.map(a, [claims, claims])",
        "claims.many.map(a, {'a': claims})",
        "claims.many.map(a, claims.long + claims.long)",
        "claims.many.filter(a, claims.long.matches('(a|aa)+b'))",
        "claims.many.filter(a, claims.long.contains('aab'))",
        "claims.many.filter(a, claims.long.indexOf('aaaaaaaaaaaaaaaaaaaaaaaaaaab') > 0)",
        "claims.many.map(a, claims.long.split(''))",
        "claims.many.exists(a, claims.long.upperAscii() == 'B')",
        "claims.many.exists(a, string(bytes(claims.long)) == 'B')",
        "claims.many.exists_one(a, claims.many == claims.many)",
        "claims.many.all(a, !(claims.longs in [[claims.longs]]))",
        "claims.many.map(a, claims.nested).map(b, claims.nested)",
        "claims.nested.map(a, a.map(b, claims.long.size()))",
        &format!("claims.many.map(a, {inner_sum})"),
    ];
    for source in sources {
        let begun = cpu_time();
        let result = evaluated(source, &largest()).map(|_| ());
        let taken = cpu_time() - begun;
        println!("{taken:?} {source:.60}");
        assert_eq!(result, Err(ExpressionError::TooCostly), "{source}");
        assert!(taken < Duration::from_secs(2), "{source} took {taken:?}");
    }
    // What a caller with many groups does need has room.
    let many = json!({"many": (0..2000).map(|index| format!("group-{index}")).collect::<Vec<_>>()});
    let value = evaluated("claims.many.filter(g, g.matches('^group-1')).map(g, 'oidc:' + g)", &many);
    assert_eq!(value.map(|value| value.as_strings().map(|list| list.len())), Ok(Some(1111)));
}

#[test]
fn a_spent_meter_is_no_answer_even_where_errors_are_absorbed() {
    let source = "claims.many.all(a, claims.many.all(b, a == b)) || true";
    assert_eq!(evaluated(source, &largest()).map(|_| ()), Err(ExpressionError::TooCostly));
    let source = "claims.many.all(a, claims.many.all(b, a == b) || true)";
    assert_eq!(evaluated(source, &largest()).map(|_| ()), Err(ExpressionError::TooCostly));
}

#[test]
fn deeply_nested_sources_are_refused_without_overflow() {
    let nested = |open: &str, inner: &str, close: &str| {
        let times = (SOURCE_BYTES_MAX - inner.len()) / (open.len() + close.len());
        format!("{}{inner}{}", open.repeat(times), close.repeat(times))
    };
    let sources = [
        nested("(", "1", ")"),
        nested("[", "1", "]"),
        nested("{1:", "1", "}"),
        nested("a[", "1", "]"),
        nested("f(", "1", ")"),
        nested("(", "", ""),
        nested("[", "", ""),
        nested("{", "", ""),
        nested("!", "true", ""),
        nested("-", "1", ""),
        nested("1+", "1", ""),
        nested("a.", "a", ""),
        nested("a", "", ".a()"),
        nested("a?a:", "a", ""),
        nested("a?", "a", ":a"),
        nested("a||", "a", ""),
        nested("a&&a||", "a", ""),
        nested("a<", "a", ""),
        nested("a in ", "a", ""),
        nested("[].map(x,", "x", ")"),
        nested("a,", "a", ""),
        nested("?", "", ""),
        nested("'", "", ""),
        nested("@", "", ""),
        nested("\\", "", ""),
    ];
    for source in sources {
        let compiled = Expression::compile(&source, &["a"]);
        // What the parser folds into one, or balances, is not deep.
        let folded = ["!", "-", "a||"].iter().any(|start| source.starts_with(start));
        assert!(compiled.is_err() || folded, "{source:.20} compiles");
    }
}

/// As deep as an expression may be: evaluating it must fit a worker thread's stack.
#[test]
fn the_deepest_expressions_are_evaluated_on_a_small_stack() {
    let deepest = (1..=DEPTH_MAX)
        .rev()
        .flat_map(|depth| {
            let sum = vec!["claims.level"; depth].join(" + ");
            let choices = "claims.level == 1 ? 1 : ".repeat(depth) + "2";
            let negated = "(!".repeat(depth) + "true" + &")".repeat(depth);
            let list = "[".repeat(depth) + "1" + &"]".repeat(depth);
            let loops = format!("[1].all(a, [1].all(b, {} == 1))", vec!["b"; depth].join(" + "));
            [sum, choices, negated, list, loops]
        })
        .filter_map(|source| Expression::compile(&source, &["claims"]).ok())
        .collect::<Vec<_>>();
    assert!(deepest.len() > 100);
    let evaluate = move || {
        let claims = Value::from_json(&json!({"level": 2})).expect("is small");
        for expression in &deepest {
            let _ = expression.evaluate(&Variables::new().with("claims", &claims));
        }
    };
    // Half of what tokio gives its workers, and what librdkafka's thread-local storage (16 KiB) takes of every stack.
    let stack_bytes = (1024 + 16) * 1024;
    let thread = std::thread::Builder::new().stack_size(stack_bytes).spawn(evaluate).expect("can be started");
    thread.join().expect("does not fail");
}
