//! Reads the fields of a JSON object, strictly: every error names the field, what was expected and what was found.
//!
//! An explicit null is an absent field, everywhere. Unknown fields are never looked at.

use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use crate::error::ApiError;

/// Longest text of a value shown in an error.
const SHOWN_LEN: usize = 40;

/// A JSON object and where it stands in the body.
#[derive(Clone, Copy)]
pub(crate) struct Fields<'a, 'path> {
    object: &'a Map<String, Value>,
    path: &'path str,
}

/// What a value is, for the second half of "expected .., found ..".
pub(crate) fn found(value: &Value) -> String {
    match value {
        Value::Null => "null".to_owned(),
        Value::Bool(value) => format!("the boolean {value}"),
        Value::Number(value) => format!("the number {value}"),
        Value::String(text) if text.chars().count() <= SHOWN_LEN => format!("the string {text:?}"),
        Value::String(text) => format!("a string of {} characters", text.chars().count()),
        Value::Array(items) => format!("an array of length {}", items.len()),
        Value::Object(_) => "an object".to_owned(),
    }
}

/// An error for a value that is not what its field holds.
pub(crate) fn unexpected(param: impl Into<String>, expected: &str, value: &Value) -> ApiError {
    ApiError::field(param, format!("expected {expected}, found {}", found(value)))
}

/// The value as an integer, if it is one; `7.0` is.
fn integer(value: &Value) -> Option<i64> {
    const EXACT: f64 = 9_007_199_254_740_992.0;
    let whole = |x: f64| (x.fract() == 0.0 && x.abs() <= EXACT).then_some(x as i64);
    value.as_i64().or_else(|| value.as_f64().and_then(whole))
}

impl<'a, 'path> Fields<'a, 'path> {
    /// The fields of the body itself.
    pub(crate) fn of(object: &'a Map<String, Value>) -> Self {
        Self { object, path: "" }
    }

    /// The fields of an object that stands at `path` in the body, such as `messages[0]`.
    pub(crate) fn at(object: &'a Map<String, Value>, path: &'path str) -> Self {
        Self { object, path }
    }

    /// The full name of a field.
    pub(crate) fn name(&self, field: &str) -> String {
        if self.path.is_empty() { field.to_owned() } else { format!("{}.{field}", self.path) }
    }

    /// The value, if there is one.
    pub(crate) fn get(&self, field: &str) -> Option<&'a Value> {
        self.object.get(field).filter(|value| !value.is_null())
    }

    fn read<T>(
        &self,
        field: &str,
        expected: &str,
        parse: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, ApiError> {
        let Some(value) = self.get(field) else { return Ok(None) };
        parse(value).map(Some).ok_or_else(|| unexpected(self.name(field), expected, value))
    }

    /// An error for a field that is missing.
    pub(crate) fn missing(&self, field: &str, expected: &str) -> ApiError {
        ApiError::field(self.name(field), format!("expected {expected}, found nothing"))
    }

    pub(crate) fn bool(&self, field: &str) -> Result<Option<bool>, ApiError> {
        self.read(field, "a boolean", Value::as_bool)
    }

    pub(crate) fn string(&self, field: &str) -> Result<Option<&'a str>, ApiError> {
        self.read(field, "a string", Value::as_str)
    }

    pub(crate) fn required_string(&self, field: &str) -> Result<&'a str, ApiError> {
        self.string(field)?.ok_or_else(|| self.missing(field, "a string"))
    }

    pub(crate) fn array(&self, field: &str) -> Result<Option<&'a [Value]>, ApiError> {
        self.read(field, "an array", |value| value.as_array().map(Vec::as_slice))
    }

    pub(crate) fn object(&self, field: &str) -> Result<Option<&'a Map<String, Value>>, ApiError> {
        self.read(field, "an object", Value::as_object)
    }

    /// A number in a closed range.
    pub(crate) fn number(&self, field: &str, range: RangeInclusive<f64>) -> Result<Option<f32>, ApiError> {
        let expected = match (*range.start(), *range.end()) {
            (from, f64::MAX) => format!("a number of at least {from}"),
            (from, to) => format!("a number from {from} to {to}"),
        };
        self.read(field, &expected, |value| value.as_f64().filter(|x| range.contains(x)).map(|x| x as f32))
    }

    /// A number in a range that does not hold its lower end, 0.
    pub(crate) fn positive(&self, field: &str, max: f64) -> Result<Option<f32>, ApiError> {
        let expected = match max {
            f64::MAX => "a number above 0".to_owned(),
            max => format!("a number above 0 and at most {max}"),
        };
        let parse = |x: &f64| *x > 0.0 && *x <= max && (*x as f32) > 0.0;
        self.read(field, &expected, |value| value.as_f64().filter(parse).map(|x| x as f32))
    }

    /// An integer in a closed range.
    pub(crate) fn integer(&self, field: &str, range: RangeInclusive<i64>) -> Result<Option<i64>, ApiError> {
        let expected = match (*range.start(), *range.end()) {
            (i64::MIN, i64::MAX) => "an integer".to_owned(),
            (from, i64::MAX) => format!("an integer of at least {from}"),
            (from, to) => format!("an integer from {from} to {to}"),
        };
        self.read(field, &expected, |value| integer(value).filter(|x| range.contains(x)))
    }

    /// A count in a closed range.
    pub(crate) fn count(&self, field: &str, range: RangeInclusive<usize>) -> Result<Option<usize>, ApiError> {
        let end = i64::try_from(*range.end()).unwrap_or(i64::MAX);
        let start = i64::try_from(*range.start()).unwrap_or(i64::MAX);
        Ok(self.integer(field, start..=end)?.and_then(|value| usize::try_from(value).ok()))
    }

    /// A list of token ids below `vocab`.
    pub(crate) fn token_ids(&self, field: &str, vocab: usize) -> Result<Option<Vec<u32>>, ApiError> {
        let Some(items) = self.array(field)? else { return Ok(None) };
        token_ids(&self.name(field), items, vocab).map(Some)
    }
}

/// Token ids below `vocab`.
pub(crate) fn token_ids(name: &str, items: &[Value], vocab: usize) -> Result<Vec<u32>, ApiError> {
    let id = |(at, value): (usize, &Value)| {
        let id = integer(value).and_then(|id| u32::try_from(id).ok()).filter(|id| (*id as usize) < vocab);
        let expected = || format!("a token id from 0 to {}", vocab.saturating_sub(1));
        id.ok_or_else(|| {
            ApiError::field(name, format!("expected {} at {at}, found {}", expected(), found(value)))
        })
    };
    items.iter().enumerate().map(id).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn object(value: Value) -> Map<String, Value> {
        value.as_object().unwrap().clone()
    }

    #[test]
    fn null_is_absent_and_the_wrong_type_is_named() {
        let map = object(json!({"a": null, "b": "hot", "c": 3.5, "d": 7.0, "e": [1, 2.0, 9], "f": 1e300}));
        let fields = Fields::of(&map);
        assert_eq!(fields.bool("a"), Ok(None));
        assert_eq!(fields.number("missing", 0.0..=1.0), Ok(None));
        assert_eq!(fields.integer("d", 0..=9), Ok(Some(7)));
        assert_eq!(fields.token_ids("e", 10), Ok(Some(vec![1, 2, 9])));
        for wrong in [
            fields.number("b", 0.0..=2.0).unwrap_err(),
            fields.number("c", 0.0..=2.0).unwrap_err(),
            fields.integer("c", 0..=9).unwrap_err(),
            fields.integer("f", i64::MIN..=i64::MAX).unwrap_err(),
            fields.token_ids("e", 9).unwrap_err(),
            fields.required_string("missing").unwrap_err(),
        ] {
            assert_eq!(wrong.status, 400);
        }
        let error = fields.number("b", 0.0..=2.0).unwrap_err().body();
        assert_eq!(error["error"]["message"], "b: expected a number from 0 to 2, found the string \"hot\"");
        assert_eq!(error["error"]["param"], "b");
    }
}
