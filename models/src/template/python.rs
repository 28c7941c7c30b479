//! Numbers and JSON as Python writes them.

use std::io;

use minijinja::value::ValueKind;
use minijinja::{Error, ErrorKind, Value};
use serde::Serialize;
use serde_json::ser::Formatter;

/// Options of `json.dumps`.
pub(super) struct JsonStyle {
    /// Escape everything outside ASCII.
    pub(super) ascii: bool,
    /// What one level is indented by; `None` is one line.
    pub(super) indent: Option<String>,
    /// Between items, and between key and value.
    pub(super) separators: Option<(String, String)>,
    /// Keys in order of code points.
    pub(super) sorted: bool,
}

/// Deeper indentation is an attack on memory, not a style.
const INDENT_MAX: usize = 64;

/// An `indent` argument: a number of spaces, or a text.
pub(super) fn indent(value: &Value) -> Result<String, Error> {
    let text = match value.as_str() {
        Some(text) if text.len() <= INDENT_MAX => Some(text.to_owned()),
        Some(_) => None,
        None => value.as_i64().filter(|&n| n <= INDENT_MAX as i64).map(|n| " ".repeat(n.max(0) as usize)),
    };
    text.ok_or_else(|| {
        Error::new(
            ErrorKind::InvalidOperation,
            format!("expected an indent of at most {INDENT_MAX}, found {value}"),
        )
    })
}

/// A `separators` argument: two texts.
pub(super) fn separators(value: &Value) -> Result<(String, String), Error> {
    let texts: Vec<Value> = value.try_iter()?.take(3).collect();
    match texts.as_slice() {
        [item, key] if item.as_str().is_some() && key.as_str().is_some() => {
            Ok((item.to_string(), key.to_string()))
        }
        _ => Err(Error::new(ErrorKind::InvalidOperation, format!("expected two separators, found {value}"))),
    }
}

/// `json.dumps(value)`.
pub(super) fn json(value: &Value, style: &JsonStyle) -> Result<String, Error> {
    let failed = |e: serde_json::Error| {
        Error::new(ErrorKind::InvalidOperation, format!("cannot be written as JSON: {e}"))
    };
    let mut bytes = Vec::new();
    let mut serializer =
        serde_json::Serializer::with_formatter(&mut bytes, Layout { style, depth: 0, filled: false });
    if style.sorted {
        let mut value = serde_json::to_value(value).map_err(failed)?;
        value.sort_all_objects();
        value.serialize(&mut serializer).map_err(failed)?;
    } else {
        value.serialize(&mut serializer).map_err(failed)?;
    }
    String::from_utf8(bytes).map_err(|e| Error::new(ErrorKind::InvalidOperation, e.to_string()))
}

/// The number, if the value is a float.
pub(super) fn float_of(value: &Value) -> Option<f64> {
    if value.kind() != ValueKind::Number || value.is_integer() {
        return None;
    }
    f64::try_from(value.clone()).ok()
}

/// `repr` of a float: the fewest digits that read back equal, with an exponent below 1e-4 and from 1e16 on.
pub(super) fn float(value: f64) -> String {
    if !value.is_finite() {
        return if value.is_nan() { "nan".to_owned() } else { format!("{value}") };
    }
    let scientific = format!("{value:e}");
    let (digits, exponent) = scientific.split_once('e').expect("LowerExp writes an exponent");
    match exponent.parse::<i32>() {
        Ok(exponent) if value != 0.0 && !(-4..16).contains(&exponent) => {
            let sign = if exponent < 0 { '-' } else { '+' };
            format!("{digits}e{sign}{:02}", exponent.abs())
        }
        // Debug writes `1.0` where Display writes `1`, and no exponent in this range.
        _ => format!("{value:?}"),
    }
}

/// Where serde_json asks what to put between values.
struct Layout<'a> {
    style: &'a JsonStyle,
    depth: usize,
    /// Whether the innermost array or object has an item.
    filled: bool,
}

impl Layout<'_> {
    fn open<W: ?Sized + io::Write>(&mut self, out: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.depth += 1;
        self.filled = false;
        out.write_all(bracket)
    }

    fn close<W: ?Sized + io::Write>(&mut self, out: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.depth -= 1;
        if self.filled {
            self.line(out)?;
        }
        self.filled = true;
        out.write_all(bracket)
    }

    fn item<W: ?Sized + io::Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        if !first {
            let lines = self.style.indent.is_some();
            let default = if lines { "," } else { ", " };
            out.write_all(self.style.separators.as_ref().map_or(default, |s| &s.0).as_bytes())?;
        }
        self.line(out)
    }

    fn line<W: ?Sized + io::Write>(&self, out: &mut W) -> io::Result<()> {
        let Some(indent) = &self.style.indent else { return Ok(()) };
        out.write_all(b"\n")?;
        (0..self.depth).try_for_each(|_| out.write_all(indent.as_bytes()))
    }
}

impl Formatter for Layout<'_> {
    fn begin_array<W: ?Sized + io::Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.open(out, b"[")
    }

    fn end_array<W: ?Sized + io::Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.close(out, b"]")
    }

    fn begin_array_value<W: ?Sized + io::Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        self.item(out, first)
    }

    fn end_array_value<W: ?Sized + io::Write>(&mut self, _out: &mut W) -> io::Result<()> {
        self.filled = true;
        Ok(())
    }

    fn begin_object<W: ?Sized + io::Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.open(out, b"{")
    }

    fn end_object<W: ?Sized + io::Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.close(out, b"}")
    }

    fn begin_object_key<W: ?Sized + io::Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        self.item(out, first)
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, out: &mut W) -> io::Result<()> {
        out.write_all(self.style.separators.as_ref().map_or(": ", |s| &s.1).as_bytes())
    }

    fn end_object_value<W: ?Sized + io::Write>(&mut self, _out: &mut W) -> io::Result<()> {
        self.filled = true;
        Ok(())
    }

    fn write_f64<W: ?Sized + io::Write>(&mut self, out: &mut W, value: f64) -> io::Result<()> {
        out.write_all(float(value).as_bytes())
    }

    fn write_string_fragment<W: ?Sized + io::Write>(&mut self, out: &mut W, text: &str) -> io::Result<()> {
        if !self.style.ascii {
            return out.write_all(text.as_bytes());
        }
        for c in text.chars() {
            if matches!(c, ' '..='~') {
                out.write_all(&[c as u8])?;
            } else {
                c.encode_utf16(&mut [0; 2]).iter().try_for_each(|unit| write!(out, "\\u{unit:04x}"))?;
            }
        }
        Ok(())
    }
}
