//! The values that expressions read and yield, and the meter of what an evaluation costs. Bounded where they are
//! made: too large is an error, never a shorter value.

use std::{
    any::Any,
    collections::HashMap,
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use cel::{
    ExecutionError,
    common::{
        types::{
            CelBool, CelDouble, CelInt, CelList, CelMap, CelMapKey, CelNull, CelOptional, CelString, CelUInt,
            DYN_TYPE, Type,
        },
        value::{CowVal, StaticVal, Val},
    },
};
use regex::Regex;
use serde::Serialize;

use super::expression::ExpressionError;

/// Most bytes of all strings and keys in one value that an expression reads; a token is shorter.
pub const INPUT_BYTES_MAX: usize = 64 * 1024;
/// Most values within one value that an expression reads.
pub const INPUT_VALUES_MAX: usize = 8192;
/// Deepest nesting of a value that an expression reads, or of its result.
pub const INPUT_DEPTH_MAX: usize = 32;

/// A value that expressions read or yield. Cheap to clone; made once, read by many evaluations.
#[derive(Clone)]
pub struct Value(Arc<dyn Val>);

/// Shows the type only: claims are nobody's business in a log.
impl fmt::Debug for Value {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "Value({})", self.type_name())
    }
}

/// What is left for a value that is being made.
struct Room {
    bytes: usize,
    values: usize,
}

impl Room {
    fn take(&mut self, bytes: usize) -> Result<(), ExpressionError> {
        let left = self.bytes.checked_sub(bytes).zip(self.values.checked_sub(1));
        (self.bytes, self.values) = left.ok_or(ExpressionError::InputTooLarge)?;
        Ok(())
    }
}

impl Value {
    /// A value that reads as `json` does: integers are `int` (or `uint` where they are larger), other numbers `double`.
    ///
    /// # Errors
    /// [`ExpressionError::InputTooLarge`].
    pub fn from_json(json: &serde_json::Value) -> Result<Self, ExpressionError> {
        let mut room = Room { bytes: INPUT_BYTES_MAX, values: INPUT_VALUES_MAX };
        Ok(Self(Arc::from(made(json, 0, &mut room)?)))
    }

    /// A value that reads as `data` does in JSON.
    ///
    /// # Errors
    /// [`ExpressionError::InputTooLarge`], or `data` has no form in JSON.
    pub fn of(data: &impl Serialize) -> Result<Self, ExpressionError> {
        Self::from_json(&serde_json::to_value(data).map_err(|_| ExpressionError::NotJson)?)
    }

    pub(super) fn from_result(result: CowVal<'_, '_>) -> Result<Self, ExpressionError> {
        Ok(Self(Arc::from(owned(result.as_ref(), 0)?)))
    }

    pub(super) fn borrowed(&self) -> &dyn Val {
        self.0.as_ref()
    }

    /// The name of its type, as expressions know it.
    pub fn type_name(&self) -> &str {
        self.0.get_type().name()
    }

    /// Itself, if it is a boolean.
    pub fn as_bool(&self) -> Option<bool> {
        self.0.downcast_ref::<CelBool>().map(|boolean| *boolean.inner())
    }

    /// Itself, if it is a string.
    pub fn as_str(&self) -> Option<&str> {
        self.0.downcast_ref::<CelString<'_>>().map(CelString::inner)
    }

    /// Its strings, if it is a list of strings, one string (a list of one), or null (an empty list).
    pub fn as_strings(&self) -> Option<Vec<String>> {
        if self.0.downcast_ref::<CelNull>().is_some() {
            return Some(Vec::new());
        }
        if let Some(string) = self.as_str() {
            return Some(vec![string.to_owned()]);
        }
        let list = self.0.downcast_ref::<CelList<'_>>()?;
        let strings =
            list.inner().iter().map(|item| Some(item.downcast_ref::<CelString<'_>>()?.inner().to_owned()));
        strings.collect()
    }

    /// Its form in JSON, if it has one.
    pub fn to_json(&self) -> Option<serde_json::Value> {
        json(self.0.as_ref(), 0)
    }
}

fn made(json: &serde_json::Value, depth: usize, room: &mut Room) -> Result<Box<dyn Val>, ExpressionError> {
    if depth > INPUT_DEPTH_MAX {
        return Err(ExpressionError::InputTooLarge);
    }
    room.take(json.as_str().map_or(0, str::len))?;
    Ok(match json {
        serde_json::Value::Null => Box::new(CelNull),
        serde_json::Value::Bool(boolean) => Box::new(CelBool::from(*boolean)),
        serde_json::Value::Number(number) => match (number.as_i64(), number.as_u64(), number.as_f64()) {
            (Some(int), ..) => Box::new(CelInt::from(int)),
            (None, Some(uint), _) => Box::new(CelUInt::from(uint)),
            (None, None, double) => Box::new(CelDouble::from(double.unwrap_or(f64::NAN))),
        },
        serde_json::Value::String(string) => Box::new(CelString::from(string.clone())),
        serde_json::Value::Array(items) => {
            let items = items.iter().map(|item| made(item, depth + 1, room));
            Box::new(CelList::from(items.collect::<Result<Vec<_>, _>>()?))
        }
        serde_json::Value::Object(entries) => {
            let mut map = HashMap::with_capacity(entries.len());
            for (key, value) in entries {
                room.take(key.len())?;
                map.insert(CelMapKey::String(CelString::from(key.clone())), made(value, depth + 1, room)?);
            }
            Box::new(CelMap::from(map))
        }
    })
}

/// A copy that borrows nothing. Results are as large as their evaluation could pay for.
fn owned(value: &dyn Val, depth: usize) -> Result<Box<dyn Val>, ExpressionError> {
    if depth > INPUT_DEPTH_MAX {
        return Err(ExpressionError::ResultTooDeep);
    }
    if let Some(string) = value.downcast_ref::<CelString<'_>>() {
        return Ok(Box::new(CelString::from(string.inner().to_owned())));
    }
    if let Some(list) = value.downcast_ref::<CelList<'_>>() {
        let items = list.inner().iter().map(|item| owned(item.as_ref(), depth + 1));
        return Ok(Box::new(CelList::from(items.collect::<Result<Vec<_>, _>>()?)));
    }
    if let Some(map) = value.downcast_ref::<CelMap<'_>>() {
        let entries = map
            .inner()
            .iter()
            .map(|(key, value)| Ok((key.clone().into_static(), owned(value.as_ref(), depth + 1)?)));
        return Ok(Box::new(CelMap::from(entries.collect::<Result<HashMap<_, _>, ExpressionError>>()?)));
    }
    let scalar: Option<Box<dyn Val>> = (value.downcast_ref::<CelBool>().map(|v| Box::new(*v) as _))
        .or_else(|| value.downcast_ref::<CelInt>().map(|v| Box::new(*v) as _))
        .or_else(|| value.downcast_ref::<CelUInt>().map(|v| Box::new(*v) as _))
        .or_else(|| value.downcast_ref::<CelDouble>().map(|v| Box::new(*v) as _))
        .or_else(|| value.downcast_ref::<CelNull>().map(|_| Box::new(CelNull) as _));
    scalar.ok_or_else(|| ExpressionError::ResultType { found: value.get_type().name().to_owned() })
}

fn json(value: &dyn Val, depth: usize) -> Option<serde_json::Value> {
    if depth > INPUT_DEPTH_MAX {
        return None;
    }
    if let Some(string) = value.downcast_ref::<CelString<'_>>() {
        return Some(string.inner().into());
    }
    if let Some(list) = value.downcast_ref::<CelList<'_>>() {
        return list.inner().iter().map(|item| json(item.as_ref(), depth + 1)).collect();
    }
    if let Some(map) = value.downcast_ref::<CelMap<'_>>() {
        let entries = map.inner().iter().map(|(key, value)| match key {
            CelMapKey::String(key) => Some((key.inner().to_owned(), json(value.as_ref(), depth + 1)?)),
            _ => None,
        });
        let entries: Option<serde_json::Map<_, _>> = entries.collect();
        return entries.map(serde_json::Value::Object);
    }
    (value.downcast_ref::<CelBool>().map(|v| (*v.inner()).into()))
        .or_else(|| value.downcast_ref::<CelInt>().map(|v| (*v.inner()).into()))
        .or_else(|| value.downcast_ref::<CelUInt>().map(|v| (*v.inner()).into()))
        .or_else(|| value.downcast_ref::<CelNull>().map(|_| serde_json::Value::Null))
        .or_else(|| {
            let double = *value.downcast_ref::<CelDouble>()?.inner();
            serde_json::Number::from_f64(double).map(serde_json::Value::Number)
        })
}

/// What an evaluation may still cost. `syntax` puts calls that pay into what repeats.
#[derive(Debug)]
pub(super) struct Meter {
    left: AtomicU64,
    spent: std::sync::atomic::AtomicBool,
}

/// Bytes of a string that cost as much as one value.
const BYTES_PER_COST: usize = 8;
/// What one byte costs that a regular expression looks at.
const MATCH_COST_PER_BYTE: u64 = 2;

impl Meter {
    pub(super) fn new(left: u64) -> Self {
        Self { left: AtomicU64::new(left), spent: false.into() }
    }

    /// Whether something could not be paid. The interpreter may have taken the error for a `false`, so this decides.
    pub(super) fn is_spent(&self) -> bool {
        self.spent.load(Ordering::Relaxed)
    }

    fn pay(&self, cost: u64) -> Result<(), ExecutionError> {
        // One thread evaluates: the atomic is there because values must be `Sync`.
        match self.left.load(Ordering::Relaxed).checked_sub(cost) {
            Some(left) if !self.is_spent() => {
                self.left.store(left, Ordering::Relaxed);
                Ok(())
            }
            _ => {
                self.spent.store(true, Ordering::Relaxed);
                Err(ExecutionError::InternalError("cost".to_owned()))
            }
        }
    }
}

/// What it costs to copy, compare or walk `value`; stops counting a little above `limit`.
fn cost(value: &dyn Val, limit: u64) -> u64 {
    if let Some(string) = value.downcast_ref::<CelString<'_>>() {
        return 1 + (string.inner().len() / BYTES_PER_COST) as u64;
    }
    let mut sum = 1;
    if let Some(list) = value.downcast_ref::<CelList<'_>>() {
        for item in list.inner() {
            if sum > limit {
                break;
            }
            sum += cost(item.as_ref(), limit - sum);
        }
    } else if let Some(map) = value.downcast_ref::<CelMap<'_>>() {
        for (key, value) in map.inner() {
            if sum > limit {
                break;
            }
            sum += cost(key.inner(), limit - sum);
            sum += cost(value.as_ref(), limit.saturating_sub(sum));
        }
    } else if let Some(optional) = value.downcast_ref::<CelOptional<'_>>() {
        // There is no other way to look into one.
        let _ = optional.map(|inner| {
            sum += cost(inner, limit);
            Box::new(CelNull)
        });
    }
    sum
}

/// A value of this module alone, which only generated calls are given.
macro_rules! internal {
    ($type:ty, $clone:expr) => {
        impl Val for $type {
            fn get_type(&self) -> &Type {
                <Self as Val>::cel_type()
            }

            fn cel_type() -> &'static Type {
                &DYN_TYPE
            }

            fn clone_as_boxed<'v>(&self) -> Box<dyn Val + 'v> {
                Box::new($clone(self))
            }

            fn as_any(&self) -> Option<&dyn Any> {
                Some(self)
            }
        }

        impl StaticVal for $type {}
    };
}

// A copy of a meter has nothing left: copies are not made, and none may be a way to more.
internal!(Meter, |_| Meter::new(0));

/// A regular expression, compiled when its expression was.
#[derive(Clone, Debug)]
pub(super) struct Pattern(pub(super) Regex);

internal!(Pattern, Pattern::clone);

fn misuse() -> ExecutionError {
    ExecutionError::InternalError("call".to_owned())
}

/// `@charge(meter, value)`: `value`, once paid for.
pub(super) fn charge<'b, 'v>(mut args: Vec<CowVal<'b, 'v>>) -> Result<CowVal<'b, 'v>, ExecutionError> {
    let value = args.pop().ok_or_else(misuse)?;
    let meter = args.first().and_then(|meter| meter.downcast_ref::<Meter>()).ok_or_else(misuse)?;
    meter.pay(cost(value.as_ref(), meter.left.load(Ordering::Relaxed)))?;
    Ok(value)
}

/// `@tick(meter)`: true, once one step is paid for.
pub(super) fn tick<'b, 'v>(args: Vec<CowVal<'b, 'v>>) -> Result<CowVal<'b, 'v>, ExecutionError> {
    let meter = args.first().and_then(|meter| meter.downcast_ref::<Meter>()).ok_or_else(misuse)?;
    meter.pay(1)?;
    Ok(CowVal::owned(CelBool::from(true)))
}

/// `@matches(meter, string, pattern)`: whether the pattern is found in the string.
pub(super) fn matches<'b, 'v>(args: Vec<CowVal<'b, 'v>>) -> Result<CowVal<'b, 'v>, ExecutionError> {
    let [meter, string, pattern] = args.as_slice() else { return Err(misuse()) };
    let meter = meter.downcast_ref::<Meter>().ok_or_else(misuse)?;
    let pattern = pattern.downcast_ref::<Pattern>().ok_or_else(misuse)?;
    let Some(string) = string.downcast_ref::<CelString<'_>>() else {
        let found = string.get_type().name().to_owned();
        return Err(ExecutionError::no_such_member_overload("matches", vec![found, "string".to_owned()]));
    };
    meter.pay(1 + MATCH_COST_PER_BYTE * string.inner().len() as u64)?;
    Ok(CowVal::owned(CelBool::from(pattern.0.is_match(string.inner()))))
}
