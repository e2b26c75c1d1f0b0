//! Expressions of the configuration (CEL) over what is known of a caller: compiled once, with every bound checked,
//! and evaluated for each request within a bounded cost.
//!
//! `cel` is imported here and in its two parts alone: [`super::syntax`], what may be evaluated, and [`super::value`],
//! what is read. `docs/identity.md` says how the language differs from that of Kubernetes.

use std::{
    fmt,
    panic::{AssertUnwindSafe, catch_unwind},
    thread,
};

use cel::{Context, ExecutionError, common::value::CowVal, context::VariableResolver};

use super::{
    syntax::{self, Syntax},
    value::{Meter, Pattern},
};

pub use super::value::{INPUT_BYTES_MAX, INPUT_DEPTH_MAX, INPUT_VALUES_MAX, Value};

/// Longest source of an expression, in bytes.
pub const SOURCE_BYTES_MAX: usize = 4096;
/// Most parts (names, literals, calls) of an expression, macros expanded.
pub const NODES_MAX: usize = 512;
/// Deepest nesting of an expression.
pub const DEPTH_MAX: usize = 32;
/// Deepest nesting of macros (`all`, `exists`, `exists_one`, `map`, `filter`) within each other.
pub const LOOPS_MAX: usize = 2;
/// Longest pattern of `matches`, in bytes.
pub const PATTERN_BYTES_MAX: usize = 256;
/// Longest argument of `join`, `indexOf` and `lastIndexOf`, in bytes.
pub const SEPARATOR_BYTES_MAX: usize = 32;
/// Most that one evaluation may cost: about one for each step of a macro, each value copied, and eight bytes of text.
pub const COST_MAX: u64 = 100_000;
/// Most variables of an evaluation.
pub const VARIABLES_MAX: usize = 32;
/// Longest name that an error repeats.
const NAME_CHARS_MAX: usize = 64;
/// Stack for parsing [`SOURCE_BYTES_MAX`] of the deepest nesting; only what is used becomes memory.
const PARSER_STACK_BYTES: usize = 256 * 1024 * 1024;

/// A place in an expression's source, counted from 1; 0 where the parser knows none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Line.
    pub line: usize,
    /// Column, in characters.
    pub column: usize,
}

impl fmt::Display for Place {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "line {}, column {}", self.line, self.column)
    }
}

/// Why an expression was refused, or has no value. Never holds what it read, but for the name of a key.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ExpressionError {
    /// Longer than [`SOURCE_BYTES_MAX`].
    #[error("the expression has {bytes} bytes, more than {SOURCE_BYTES_MAX}; split it")]
    SourceTooLong {
        /// Its length.
        bytes: usize,
    },
    /// Cannot be parsed, or may not be evaluated.
    #[error("{place}: {problem}")]
    Refused {
        /// Where.
        place: Place,
        /// What, and the mend.
        problem: String,
    },
    /// The parser or the interpreter failed where it should not have.
    #[error("the expression cannot be handled; simplify it")]
    Failed,
    /// A value over [`INPUT_BYTES_MAX`], [`INPUT_VALUES_MAX`] or [`INPUT_DEPTH_MAX`].
    #[error(
        "a value that expressions read is larger than {INPUT_BYTES_MAX} bytes, {INPUT_VALUES_MAX} values or \
         {INPUT_DEPTH_MAX} levels"
    )]
    InputTooLarge,
    /// A value without a form in JSON.
    #[error("a value that expressions read has no form in JSON")]
    NotJson,
    /// More than [`COST_MAX`].
    #[error("the expression costs more than {COST_MAX} steps for this caller; make its macros walk less")]
    TooCostly,
    /// No value for what was read.
    #[error("{0}")]
    NoValue(String),
    /// A value of another type than was needed.
    #[error("the expression yields {found}, not {expected}")]
    WrongType {
        /// What was needed.
        expected: &'static str,
        /// What it yields.
        found: String,
    },
    /// A value of a type that means nothing outside of an expression.
    #[error(
        "the expression yields {found}; it may yield booleans, numbers, strings, null, and lists and maps of those"
    )]
    ResultType {
        /// Its type.
        found: String,
    },
    /// A value nested deeper than [`INPUT_DEPTH_MAX`].
    #[error("the expression yields a value of more than {INPUT_DEPTH_MAX} levels")]
    ResultTooDeep,
}

/// The variables of one evaluation. Making one copies nothing.
#[derive(Clone, Debug, Default)]
pub struct Variables<'a> {
    values: Vec<(&'a str, &'a Value)>,
}

impl<'a> Variables<'a> {
    /// None.
    pub fn new() -> Self {
        Self::default()
    }

    /// These and `name`, which hides an earlier one of the same name.
    #[must_use]
    pub fn with(mut self, name: &'a str, value: &'a Value) -> Self {
        self.values.push((name, value));
        self
    }
}

/// What evaluation looks names up in.
struct Names<'a> {
    variables: &'a Variables<'a>,
    patterns: &'a [Pattern],
    meter: Meter,
}

impl VariableResolver for Names<'_> {
    fn resolve<'b>(&'b self, name: &str) -> Option<CowVal<'b, 'b>> {
        if name == syntax::METER {
            return Some(CowVal::Borrowed(&self.meter));
        }
        if let Some(index) = name.strip_prefix(syntax::PATTERN) {
            let pattern = self.patterns.get(index.parse::<usize>().ok()?)?;
            return Some(CowVal::Borrowed(pattern));
        }
        let found = self.variables.values.iter().rev().find(|(known, _)| *known == name);
        found.map(|(_, value)| CowVal::Borrowed(value.borrowed()))
    }
}

/// A compiled expression.
pub struct Expression {
    source: String,
    syntax: Syntax,
}

impl fmt::Debug for Expression {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_tuple("Expression").field(&self.source).finish()
    }
}

impl Expression {
    /// Compiles `source`, in which `variables` are known.
    ///
    /// # Errors
    /// What is wrong with it, and where.
    pub fn compile(source: &str, variables: &[&str]) -> Result<Self, ExpressionError> {
        if source.len() > SOURCE_BYTES_MAX {
            return Err(ExpressionError::SourceTooLong { bytes: source.len() });
        }
        let known: Vec<String> = variables.iter().map(|name| (*name).to_owned()).collect();
        let text = source.to_owned();
        // The parser recurses with the nesting of what it is given, and only then can that be counted; it also expects
        // things of nodes that it could not parse. On a thread of its own neither ends the agent.
        let parser = thread::Builder::new()
            .name("expression".to_owned())
            .stack_size(PARSER_STACK_BYTES)
            .spawn(move || syntax::parse(&text, &known))
            .map_err(|_| ExpressionError::Failed)?;
        let syntax = parser.join().unwrap_or(Err(ExpressionError::Failed))?;
        Ok(Self { source: source.to_owned(), syntax })
    }

    /// Its source.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Whether it reads `key` of `variable`, by that name.
    pub fn selects(&self, variable: &str, key: &str) -> bool {
        self.syntax.selections.iter().any(|(of, selected)| of == variable && selected == key)
    }

    /// Its value.
    ///
    /// # Errors
    /// It has none, or one that would cost more than [`COST_MAX`].
    pub fn evaluate(&self, variables: &Variables<'_>) -> Result<Value, ExpressionError> {
        if variables.values.len() > VARIABLES_MAX {
            return Err(ExpressionError::InputTooLarge);
        }
        let names = Names { variables, patterns: &self.syntax.patterns, meter: Meter::new(COST_MAX) };
        // The interpreter has asserts about trees and values. All that are known are out of reach of a checked tree; one
        // that is not refuses this request and not every other. Nothing that it can leave half done outlives the call.
        let evaluated = catch_unwind(AssertUnwindSafe(|| {
            let mut context = Context::with_env(syntax::ENVIRONMENT.clone());
            context.set_variable_resolver(&names);
            match cel::Value::resolve_val(&self.syntax.tree, &context) {
                Ok(result) => Value::from_result(result),
                Err(error) => Err(no_value(&error)),
            }
        }));
        if names.meter.is_spent() {
            return Err(ExpressionError::TooCostly);
        }
        evaluated.unwrap_or(Err(ExpressionError::Failed))
    }

    /// Its value, which must be a boolean.
    ///
    /// # Errors
    /// See [`Self::evaluate`]; or it is something else.
    pub fn boolean(&self, variables: &Variables<'_>) -> Result<bool, ExpressionError> {
        let value = self.evaluate(variables)?;
        value.as_bool().ok_or_else(|| wrong_type("a boolean", &value))
    }

    /// Its value, which must be a string.
    ///
    /// # Errors
    /// See [`Self::evaluate`]; or it is something else.
    pub fn string(&self, variables: &Variables<'_>) -> Result<String, ExpressionError> {
        let value = self.evaluate(variables)?;
        value.as_str().map(str::to_owned).ok_or_else(|| wrong_type("a string", &value))
    }

    /// Its value, which must be a list of strings, one string (a list of one) or null (an empty list).
    ///
    /// # Errors
    /// See [`Self::evaluate`]; or it is something else.
    pub fn strings(&self, variables: &Variables<'_>) -> Result<Vec<String>, ExpressionError> {
        let value = self.evaluate(variables)?;
        value.as_strings().ok_or_else(|| wrong_type("a string or a list of strings", &value))
    }
}

fn wrong_type(expected: &'static str, value: &Value) -> ExpressionError {
    ExpressionError::WrongType { expected, found: value.type_name().to_owned() }
}

/// What the interpreter says, without the values that it says it of: they are the caller's.
fn no_value(error: &ExecutionError) -> ExpressionError {
    let name = |name: &str| name.chars().take(NAME_CHARS_MAX).collect::<String>();
    ExpressionError::NoValue(match error {
        ExecutionError::NoSuchKey(key) => {
            format!("no such key: {:?}; test for it with has()", name(key))
        }
        ExecutionError::NoSuchOverload(overload) => overload.to_string(),
        ExecutionError::UnexpectedType { want, .. } => format!("a value is not {}", name(want)),
        ExecutionError::UndeclaredReference(reference) => format!("unknown name {:?}", name(reference)),
        ExecutionError::FunctionError { function, .. } => {
            format!("{} cannot be done with its arguments", name(function))
        }
        ExecutionError::DivisionByZero(_) | ExecutionError::RemainderByZero(_) => {
            "division by zero".to_owned()
        }
        ExecutionError::Overflow(..) => "a number is out of range".to_owned(),
        ExecutionError::IndexOutOfBounds(_) => "an index is out of range".to_owned(),
        ExecutionError::DuplicateKey(_) => "a map has one key twice".to_owned(),
        ExecutionError::UnsupportedBinaryOperator(operator, ..) => {
            format!("{operator:?} cannot be done with its operands")
        }
        ExecutionError::ValuesNotComparable(..) => "values of these types cannot be compared".to_owned(),
        _ => "an operation cannot be done with its operands".to_owned(),
    })
}
