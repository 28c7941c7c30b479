//! What transformers adds to jinja2 (`raise_exception`, `strftime_now`, its own `tojson`), and what minijinja does
//! otherwise than jinja2.

use std::fmt::Write;

use minijinja::value::{Kwargs, Rest, ValueKind};
use minijinja::{Environment, Error, ErrorKind, Value};

use crate::template::python::{self, JsonStyle};

/// Marks errors of `raise_exception`, whose words go to the client as they are.
#[derive(Debug, thiserror::Error)]
#[error("raised by the template")]
struct Raised;

pub(super) fn add(environment: &mut Environment<'static>) {
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", strftime_now);
    environment.add_function("joiner", minijinja_contrib::globals::joiner);
    environment.add_filter("tojson", to_json);
    environment.add_test("sequence", is_sequence);
    environment.set_formatter(|out, state, value| match python::float_of(value) {
        Some(float) => Ok(out.write_str(&python::float(float))?),
        None => minijinja::escape_formatter(out, state, value),
    });
}

pub(super) fn is_raised(error: &Error) -> bool {
    std::error::Error::source(error).is_some_and(|s| s.is::<Raised>())
}

fn raise_exception(message: &Value) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message.to_string()).with_source(Raised))
}

/// The local time by C's `strftime`.
fn strftime_now(format: &str) -> Result<String, Error> {
    let mut text = String::new();
    write!(text, "{}", chrono::Local::now().format(format)).map_err(|_| {
        Error::new(ErrorKind::InvalidOperation, format!("strftime_now: `{format}` is no date format"))
    })?;
    Ok(text)
}

/// `json.dumps` with the options, and the order of options, that transformers gives its filter.
fn to_json(value: &Value, options: Rest<Value>, named: Kwargs) -> Result<Value, Error> {
    const NAMES: [&str; 4] = ["ensure_ascii", "indent", "separators", "sort_keys"];
    if options.len() > NAMES.len() {
        return Err(Error::from(ErrorKind::TooManyArguments));
    }
    let option = |i: usize| -> Result<Option<Value>, Error> {
        let given = match options.get(i) {
            Some(value) => Some(value.clone()),
            None => named.get::<Option<Value>>(NAMES[i])?,
        };
        Ok(given.filter(|v| !v.is_none()))
    };
    let [ascii, indent, separators, sort] = [option(0)?, option(1)?, option(2)?, option(3)?];
    named.assert_all_used()?;
    if value.is_undefined() {
        return Err(Error::new(
            ErrorKind::InvalidOperation,
            "Object of type Undefined is not JSON serializable",
        ));
    }
    let style = JsonStyle {
        ascii: ascii.is_some_and(|v| v.is_true()),
        indent: indent.map(|v| python::indent(&v)).transpose()?,
        separators: separators.map(|v| python::separators(&v)).transpose()?,
        sorted: sort.is_some_and(|v| v.is_true()),
    };
    Ok(Value::from(python::json(value, &style)?))
}

/// In Python a text and a dict have a length and items, and that is what jinja2 asks for.
fn is_sequence(value: &Value) -> bool {
    matches!(value.kind(), ValueKind::Seq | ValueKind::String | ValueKind::Map)
}
