//! From source to a syntax tree that may be evaluated: parsed, every name and function known, its size and loops
//! bounded, and what repeats made to pay a [`Meter`](super::value::Meter), since the interpreter has no limit of cost.
//!
//! An expression comes from the configuration, what it reads from a caller. So what is wrong with it is said here,
//! with its place, and evaluation has nothing left to find but types and missing keys.

use std::sync::{Arc, LazyLock};

use cel::{
    Env, ParseErrors,
    common::{
        ast::{
            CallExpr, ComprehensionExpr, EntryExpr, Expr, IdedEntryExpr, IdedExpr, ListExpr, LiteralValue,
            MapExpr, SelectExpr, SourceInfo, operators,
        },
        types::DYN_TYPE,
    },
    extensions,
};
use regex::RegexBuilder;

use super::{
    expression::{
        DEPTH_MAX, ExpressionError, LOOPS_MAX, NODES_MAX, PATTERN_BYTES_MAX, Place, SEPARATOR_BYTES_MAX,
    },
    value::{self, Pattern},
};

/// Most bytes of a compiled regular expression.
const PATTERN_COMPILED_BYTES_MAX: usize = 64 * 1024;
/// Longest part of a parser's message that is passed on.
const MESSAGE_CHARS_MAX: usize = 200;

/// Names that only generated calls can have: `@` is no letter of the language.
pub(super) const METER: &str = "@meter";
pub(super) const PATTERN: &str = "@pattern";
const CHARGE: &str = "@charge";
const TICK: &str = "@tick";
const MATCHES: &str = "@matches";

/// Names of types, which are values.
const TYPES: [&str; 10] =
    ["bool", "bytes", "double", "int", "list", "map", "null_type", "string", "type", "uint"];

/// Operators, as the parser calls them.
const OPERATORS: [&str; 20] = [
    operators::CONDITIONAL,
    operators::LOGICAL_AND,
    operators::LOGICAL_OR,
    operators::LOGICAL_NOT,
    operators::SUBSTRACT,
    operators::ADD,
    operators::MULTIPLY,
    operators::DIVIDE,
    operators::MODULO,
    operators::EQUALS,
    operators::NOT_EQUALS,
    operators::GREATER_EQUALS,
    operators::LESS_EQUALS,
    operators::GREATER,
    operators::LESS,
    operators::NEGATE,
    operators::INDEX,
    operators::OPT_INDEX,
    operators::OPT_SELECT,
    operators::IN,
];

/// Operators that look at nothing of their operands but what costs the same for all.
const CHEAP: [&str; 5] = [
    operators::CONDITIONAL,
    operators::LOGICAL_AND,
    operators::LOGICAL_OR,
    operators::LOGICAL_NOT,
    operators::INDEX,
];

/// Functions: name, how many arguments.
const FUNCTIONS: [(&str, &[usize]); 9] = [
    ("bool", &[1]),
    ("bytes", &[1]),
    ("double", &[1]),
    ("dyn", &[1]),
    ("int", &[1]),
    ("size", &[1]),
    ("string", &[1]),
    ("type", &[1]),
    ("uint", &[1]),
];

/// Functions of a value (`x.f()`): name, how many arguments. Without `replace` and `format`, whose results can be as
/// long as the product of what they are given.
const METHODS: [(&str, &[usize]); 17] = [
    ("charAt", &[1]),
    ("contains", &[1]),
    ("endsWith", &[1]),
    ("hasValue", &[0]),
    ("indexOf", &[1, 2]),
    ("join", &[0, 1]),
    ("lastIndexOf", &[1, 2]),
    ("lowerAscii", &[0]),
    ("matches", &[1]),
    ("orValue", &[1]),
    ("size", &[0]),
    ("split", &[1, 2]),
    ("startsWith", &[1]),
    ("substring", &[1, 2]),
    ("trim", &[0]),
    ("upperAscii", &[0]),
    ("value", &[0]),
];

/// Methods whose first argument is repeated or searched for, so that it must be short and in the source.
const LITERAL_ARGUMENT: [&str; 3] = ["indexOf", "join", "lastIndexOf"];

/// The functions that evaluation finds.
pub(super) static ENVIRONMENT: LazyLock<Arc<Env>> = LazyLock::new(|| {
    let mut env = Env::stdlib();
    let dynamic = || DYN_TYPE.to_owned();
    // The names are this file's own and `extensions` was not added before: there is nothing to collide with. Were it
    // otherwise, the functions would be missing and evaluation would refuse.
    let _ = env.add_extension(extensions::strings);
    let _ = env.add_overload(CHARGE, CHARGE, vec![dynamic(), dynamic()], value::charge);
    let _ = env.add_overload(TICK, TICK, vec![dynamic()], value::tick);
    let _ = env.add_overload(MATCHES, MATCHES, vec![dynamic(), dynamic(), dynamic()], value::matches);
    Arc::new(env)
});

/// What may be evaluated.
pub(super) struct Syntax {
    pub(super) tree: IdedExpr,
    pub(super) patterns: Vec<Pattern>,
    /// Variables and the keys that are read of them by name.
    pub(super) selections: Vec<(String, String)>,
}

/// Parses and checks `source`, in which `variables` are known. Recurses as deep as `source` is nested: the caller
/// bounds its length and gives it the stack.
pub(super) fn parse(source: &str, variables: &[String]) -> Result<Syntax, ExpressionError> {
    let limit = u16::try_from(DEPTH_MAX).unwrap_or(u16::MAX);
    let parser = ENVIRONMENT.parser().max_recursion_depth(limit);
    let (tree, info) = parser.parse_with_source_info(source).map_err(|errors| syntax_error(&errors))?;
    let mut checker = Checker {
        variables,
        scope: Vec::new(),
        nodes: 0,
        patterns: Vec::new(),
        selections: Vec::new(),
        source,
        info: &info,
    };
    let tree = checker.checked(tree, 0)?;
    Ok(Syntax { tree, patterns: checker.patterns, selections: checker.selections })
}

fn syntax_error(errors: &ParseErrors) -> ExpressionError {
    let number = |number: isize| usize::try_from(number).unwrap_or(0);
    let first = errors.errors.first();
    let place = first.map_or(Place { line: 0, column: 0 }, |error| Place {
        line: number(error.pos.0),
        column: number(error.pos.1),
    });
    let message = match first.map(|error| error.msg.as_str()) {
        None => "cannot be parsed",
        // The parser's own words for it are the debug output of its error.
        Some(message) if message.contains("Recursion limit") => "is nested too deep; split it",
        Some(message) => message,
    };
    ExpressionError::Refused { place, problem: message.chars().take(MESSAGE_CHARS_MAX).collect() }
}

struct Checker<'a> {
    variables: &'a [String],
    /// Variables of the macros around.
    scope: Vec<String>,
    nodes: usize,
    patterns: Vec<Pattern>,
    selections: Vec<(String, String)>,
    source: &'a str,
    info: &'a SourceInfo,
}

impl Checker<'_> {
    fn refused<T>(&self, id: u64, problem: impl Into<String>) -> Result<T, ExpressionError> {
        let start = self.info.offset_for(id).map_or(0, |(start, _)| start as usize);
        let before: Vec<char> = self.source.chars().take(start).collect();
        let line = before.iter().filter(|character| **character == '\n').count();
        let column = before.iter().rev().take_while(|character| **character != '\n').count();
        let place = Place { line: line + 1, column: column + 1 };
        Err(ExpressionError::Refused { place, problem: problem.into() })
    }

    fn in_loop(&self) -> bool {
        !self.scope.is_empty()
    }

    fn checked(
        &mut self,
        IdedExpr { id, expr }: IdedExpr,
        depth: usize,
    ) -> Result<IdedExpr, ExpressionError> {
        self.nodes += 1;
        if self.nodes > NODES_MAX {
            return self.refused(id, format!("the expression has more than {NODES_MAX} parts; split it"));
        }
        if depth > DEPTH_MAX {
            return self.refused(id, format!("is nested deeper than {DEPTH_MAX}; split it"));
        }
        let expr = match expr {
            Expr::Literal(literal) => Expr::Literal(literal),
            Expr::Ident(name) => self.name(id, name)?,
            Expr::Select(SelectExpr { operand, field, test }) => {
                self.selected(&operand.expr, &field);
                let operand = Box::new(self.checked(*operand, depth + 1)?);
                Expr::Select(SelectExpr { operand, field, test })
            }
            Expr::List(list) if list.optional_indices.is_empty() => {
                Expr::List(ListExpr::new(self.operands(list.elements, depth, self.in_loop())?))
            }
            Expr::Map(map) => self.map(id, map, depth)?,
            Expr::Call(call) => return self.call(id, call, depth),
            Expr::Comprehension(comprehension) => self.comprehension(id, *comprehension, depth)?,
            Expr::List(_) | Expr::Struct(_) | Expr::Unspecified => {
                return self
                    .refused(id, "is not supported here: optional elements and messages are left out");
            }
        };
        Ok(IdedExpr { id, expr })
    }

    fn name(&self, id: u64, name: String) -> Result<Expr, ExpressionError> {
        let known =
            self.scope.contains(&name) || self.variables.contains(&name) || TYPES.contains(&name.as_str());
        if !known {
            let variables = self.variables.join(", ");
            return self.refused(id, format!("unknown variable {name:?}; known here: {variables}"));
        }
        Ok(Expr::Ident(name))
    }

    fn selected(&mut self, operand: &Expr, key: &str) {
        if let Expr::Ident(variable) = operand
            && !self.scope.contains(variable)
        {
            self.selections.push((variable.clone(), key.to_owned()));
        }
    }

    /// Operands of one operation; those that it may walk or copy are `paid` for, unless the source holds them.
    fn operands(
        &mut self,
        operands: Vec<IdedExpr>,
        depth: usize,
        paid: bool,
    ) -> Result<Vec<IdedExpr>, ExpressionError> {
        let mut checked = Vec::with_capacity(operands.len());
        for operand in operands {
            let operand = self.checked(operand, depth + 1)?;
            let literal = matches!(operand.expr, Expr::Literal(_));
            checked.push(if paid && !literal { charged(operand) } else { operand });
        }
        Ok(checked)
    }

    fn map(&mut self, id: u64, map: MapExpr, depth: usize) -> Result<Expr, ExpressionError> {
        let mut entries = Vec::with_capacity(map.entries.len());
        for entry in map.entries {
            let EntryExpr::MapEntry(mut pair) = entry.expr else {
                return self.refused(id, "is not supported here: messages are left out");
            };
            if pair.optional {
                return self.refused(id, "is not supported here: optional elements are left out");
            }
            let mut both = self.operands(vec![pair.key, pair.value], depth, self.in_loop())?.into_iter();
            if let (Some(key), Some(value)) = (both.next(), both.next()) {
                (pair.key, pair.value) = (key, value);
                entries.push(IdedEntryExpr { id: entry.id, expr: EntryExpr::MapEntry(pair) });
            }
        }
        Ok(Expr::Map(MapExpr { entries }))
    }

    fn call(&mut self, id: u64, call: CallExpr, depth: usize) -> Result<IdedExpr, ExpressionError> {
        let CallExpr { func_name: name, target, args } = call;
        let operator = target.is_none() && OPERATORS.contains(&name.as_str());
        if !operator {
            self.known_function(id, &name, target.is_some(), args.len())?;
        }
        if name == "matches" || LITERAL_ARGUMENT.contains(&name.as_str()) {
            self.literal_argument(id, &name, &args)?;
        }
        let selects =
            [operators::INDEX, operators::OPT_INDEX, operators::OPT_SELECT].contains(&name.as_str());
        if let (true, [operand, IdedExpr { expr: Expr::Literal(LiteralValue::String(key)), .. }]) =
            (selects, args.as_slice())
        {
            self.selected(&operand.expr, key.inner());
        }
        // Outside of loops what is walked was there before, and is walked as often as the source says; but sums grow.
        let paid = match name.as_str() {
            operators::ADD => true,
            cheap if CHEAP.contains(&cheap) => false,
            _ => self.in_loop(),
        };
        let target = match target {
            Some(target) => self.operands(vec![*target], depth, paid)?.pop().map(Box::new),
            None => None,
        };
        let split = name == "split";
        let expr = if let (true, Some(target)) = (name == "matches", &target) {
            self.matches(id, target.as_ref().clone(), &args)?
        } else {
            let args = self.operands(args, depth, paid)?;
            Expr::Call(CallExpr { func_name: name, target, args })
        };
        let call = IdedExpr { id, expr };
        Ok(if split { charged(call) } else { call })
    }

    fn known_function(&self, id: u64, name: &str, method: bool, args: usize) -> Result<(), ExpressionError> {
        let table: &[(&str, &[usize])] = if method { &METHODS } else { &FUNCTIONS };
        let Some((_, counts)) = table.iter().find(|(known, _)| *known == name) else {
            let known: Vec<&str> = table.iter().map(|(known, _)| *known).collect();
            let what = if method { "method" } else { "function" };
            let problem =
                format!("unknown {what} {name:?}; known with these arguments: {}", known.join(", "));
            return self.refused(id, problem);
        };
        if !counts.contains(&args) {
            return self.refused(id, format!("{name:?} does not take {args} arguments"));
        }
        Ok(())
    }

    fn literal_argument(&self, id: u64, name: &str, args: &[IdedExpr]) -> Result<(), ExpressionError> {
        let bytes_max = if name == "matches" { PATTERN_BYTES_MAX } else { SEPARATOR_BYTES_MAX };
        match args.first().map(|argument| &argument.expr) {
            None => Ok(()),
            Some(Expr::Literal(LiteralValue::String(literal))) if literal.inner().len() <= bytes_max => {
                Ok(())
            }
            Some(_) => {
                let problem = format!(
                    "the argument of {name:?} must be a string in the source, at most {bytes_max} bytes"
                );
                self.refused(id, problem)
            }
        }
    }

    fn matches(&mut self, id: u64, target: IdedExpr, args: &[IdedExpr]) -> Result<Expr, ExpressionError> {
        let Some(Expr::Literal(LiteralValue::String(literal))) = args.first().map(|argument| &argument.expr)
        else {
            return self.refused(id, "\"matches\" needs a pattern");
        };
        let compiled = RegexBuilder::new(literal.inner())
            .size_limit(PATTERN_COMPILED_BYTES_MAX)
            .dfa_size_limit(PATTERN_COMPILED_BYTES_MAX)
            .build();
        let pattern = match compiled {
            Ok(pattern) => pattern,
            Err(error) => {
                let reason = error.to_string();
                let reason = reason.lines().next_back().unwrap_or_default();
                return self.refused(id, format!("the pattern of \"matches\" is refused: {reason}"));
            }
        };
        let name = format!("{PATTERN}{}", self.patterns.len());
        self.patterns.push(Pattern(pattern));
        Ok(generated_call(
            MATCHES,
            vec![generated(Expr::Ident(METER.to_owned())), target, generated(Expr::Ident(name))],
        ))
    }

    fn comprehension(
        &mut self,
        id: u64,
        mut macro_: ComprehensionExpr,
        depth: usize,
    ) -> Result<Expr, ExpressionError> {
        if self.scope.len() >= LOOPS_MAX {
            return self.refused(id, format!("macros are nested deeper than {LOOPS_MAX}"));
        }
        // Each element is copied for its step: what is walked is paid for as a whole, and each step again.
        macro_.iter_range = charged(self.checked(macro_.iter_range, depth + 1)?);
        self.scope.push(macro_.iter_var.clone());
        macro_.loop_step = self.step(id, macro_.loop_step, &macro_.accu_var, depth + 1)?;
        self.scope.pop();
        if macro_.iter_var2.is_some() {
            return self.refused(id, "macros with two variables are left out");
        }
        Ok(Expr::Comprehension(Box::new(macro_)))
    }

    /// The step of a macro, in the shapes that the standard macros have: `result && X`, `result || X`,
    /// `X ? STEP : result`, `result + [X]`, `result + 1`. `result` is no name of the language, so it is left as it is.
    fn step(
        &mut self,
        id: u64,
        step: IdedExpr,
        result: &str,
        depth: usize,
    ) -> Result<IdedExpr, ExpressionError> {
        let is_result = |part: &IdedExpr| matches!(&part.expr, Expr::Ident(name) if name == result);
        let Expr::Call(CallExpr { func_name, target: None, mut args }) = step.expr else {
            return self.refused(id, "is a macro that is not known here");
        };
        match (func_name.as_str(), args.as_mut_slice()) {
            (operators::LOGICAL_AND | operators::LOGICAL_OR, [first, condition]) if is_result(first) => {
                *condition = ticked(self.checked(std::mem::take(condition), depth)?);
            }
            (operators::CONDITIONAL, [condition, then, last]) if is_result(last) => {
                *condition = ticked(self.checked(std::mem::take(condition), depth)?);
                *then = self.step(id, std::mem::take(then), result, depth)?;
            }
            (operators::ADD, [first, IdedExpr { expr: Expr::List(list), .. }]) if is_result(first) => {
                for element in &mut list.elements {
                    *element = charged(self.checked(std::mem::take(element), depth)?);
                }
            }
            (operators::ADD, [first, IdedExpr { expr: Expr::Literal(_), .. }]) if is_result(first) => {}
            _ => return self.refused(id, "is a macro that is not known here"),
        }
        Ok(IdedExpr { id: step.id, expr: Expr::Call(CallExpr { func_name, target: None, args }) })
    }
}

fn generated(expr: Expr) -> IdedExpr {
    IdedExpr { id: 0, expr }
}

fn generated_call(name: &str, args: Vec<IdedExpr>) -> Expr {
    Expr::Call(CallExpr { func_name: name.to_owned(), target: None, args })
}

/// `@charge(@meter, value)`.
fn charged(value: IdedExpr) -> IdedExpr {
    generated(generated_call(CHARGE, vec![generated(Expr::Ident(METER.to_owned())), value]))
}

/// `@tick(@meter) ? condition : false`: where nothing can be paid any more, the condition is not looked at.
fn ticked(condition: IdedExpr) -> IdedExpr {
    let tick = generated(generated_call(TICK, vec![generated(Expr::Ident(METER.to_owned()))]));
    let never = generated(Expr::Literal(LiteralValue::Boolean(false.into())));
    generated(generated_call(operators::CONDITIONAL, vec![tick, condition, never]))
}
