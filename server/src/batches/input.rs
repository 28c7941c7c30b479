//! The lines of a batch's input: each is one request, named by the client.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::path::Path;

use serde_json::{Map, Value, json};

use crate::openai::fields::found;

/// Most lines of a batch, as OpenAI has it.
const LINES_MAX: u64 = 50_000;
/// Most errors that are told of one input.
const ERRORS_MAX: usize = 100;

/// A request of a batch.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Line {
    /// Where it stands in the input, from 1 on.
    pub(crate) number: u64,
    pub(crate) custom_id: String,
    pub(crate) body: Map<String, Value>,
}

/// The lines of an input that are not empty, with their numbers.
pub(crate) struct Lines {
    reader: BufReader<File>,
    number: u64,
}

impl Lines {
    /// # Errors
    /// The disk's.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        Ok(Self { reader: BufReader::with_capacity(1 << 18, File::open(path)?), number: 0 })
    }

    /// The next line; `None` at the end.
    ///
    /// # Errors
    /// The disk's.
    pub(crate) fn next(&mut self) -> io::Result<Option<(u64, Vec<u8>)>> {
        loop {
            let mut bytes = Vec::new();
            if self.reader.read_until(b'\n', &mut bytes)? == 0 {
                return Ok(None);
            }
            self.number += 1;
            if !bytes.trim_ascii().is_empty() {
                return Ok(Some((self.number, bytes)));
            }
        }
    }
}

/// Checks all lines of an input.
///
/// # Errors
/// The disk's. What is wrong with the lines is the inner error: objects as the API shows them.
pub(crate) fn check(path: &Path, endpoint: &str) -> io::Result<Result<u64, Vec<Value>>> {
    let (mut total, mut names, mut errors) = (0, HashSet::new(), Vec::new());
    let mut lines = Lines::open(path)?;
    while let Some((number, bytes)) = lines.next()? {
        total += 1;
        match read(number, &bytes, endpoint) {
            Ok(line) if names.contains(&line.custom_id) => {
                let what = format!("expected a name of its own, found {:?} again", line.custom_id);
                errors.push(Wrong::field("duplicate_custom_id", "custom_id", what).at(number));
            }
            Ok(line) => {
                names.insert(line.custom_id);
            }
            Err(wrong) => errors.push(wrong.at(number)),
        }
        if total > LINES_MAX {
            let message = format!("expected at most {LINES_MAX} lines, found more");
            errors.push(json!({"code": "too_many_lines", "message": message, "param": null, "line": null}));
        }
        if errors.len() >= ERRORS_MAX || total > LINES_MAX {
            break;
        }
    }
    if total == 0 {
        let message = "expected at least one line, found none";
        errors.push(json!({"code": "empty_file", "message": message, "param": null, "line": null}));
    }
    Ok(if errors.is_empty() { Ok(total) } else { Err(errors) })
}

/// What is wrong with a line.
#[derive(Debug, PartialEq)]
pub(crate) struct Wrong {
    code: &'static str,
    param: Option<&'static str>,
    message: String,
}

impl Wrong {
    fn field(code: &'static str, param: &'static str, what: String) -> Self {
        Self { code, param: Some(param), message: format!("{param}: {what}") }
    }

    fn at(self, line: u64) -> Value {
        let message = format!("line {line}: {}", self.message);
        json!({"code": self.code, "message": message, "param": self.param, "line": line})
    }
}

/// Reads a line.
///
/// # Errors
/// What is wrong with it.
pub(crate) fn read(number: u64, bytes: &[u8], endpoint: &str) -> Result<Line, Wrong> {
    let json = |what: String| Wrong { code: "invalid_json_line", param: None, message: what };
    let mut object = match serde_json::from_slice(bytes) {
        Ok(Value::Object(object)) => object,
        Ok(other) => return Err(json(format!("expected a JSON object, found {}", found(&other)))),
        Err(error) => return Err(json(format!("expected a JSON object, found: {error}"))),
    };
    let wrong = |code, param, expected: &str, value: &Value| {
        Wrong::field(code, param, format!("expected {expected}, found {}", found(value)))
    };
    let custom_id = match object.get("custom_id").unwrap_or(&Value::Null) {
        Value::String(text) if !text.is_empty() => text.clone(),
        other => {
            return Err(wrong("invalid_custom_id", "custom_id", "a string that is not empty", other));
        }
    };
    let named = |key: &str| object.get(key).unwrap_or(&Value::Null).clone();
    if named("method") != "POST" {
        return Err(wrong("invalid_method", "method", "POST", &named("method")));
    }
    if named("url") != endpoint {
        let expected = format!("{endpoint}, the batch's endpoint");
        return Err(wrong("invalid_url", "url", &expected, &named("url")));
    }
    let body = match object.remove("body") {
        Some(Value::Object(body)) => body,
        other => {
            return Err(wrong("invalid_body", "body", "an object", &other.unwrap_or_default()));
        }
    };
    for (field, param) in [("stream", "body.stream"), ("background", "body.background")] {
        if let Some(value @ Value::Bool(true)) = body.get(field) {
            return Err(wrong("invalid_body", param, "false in a batch", value));
        }
    }
    Ok(Line { number, custom_id, body })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::tests::Directory;

    const URL: &str = "/v1/completions";

    fn line(id: &str) -> String {
        json!({"custom_id": id, "method": "POST", "url": URL, "body": {"prompt": "x"}}).to_string()
    }

    fn checked(text: &str) -> Result<u64, Vec<Value>> {
        let directory = Directory::new();
        let path = directory.path().join("in.jsonl");
        std::fs::write(&path, text).unwrap();
        check(&path, URL).unwrap()
    }

    #[test]
    fn lines_keep_their_numbers_whatever_is_between_them() {
        assert_eq!(checked(&format!("{}\r\n\n  \n{}", line("a"), line("b"))), Ok(2));
        let directory = Directory::new();
        let path = directory.path().join("in.jsonl");
        std::fs::write(&path, format!("\n{}\n\n{}\n", line("a"), line("b"))).unwrap();
        let mut lines = Lines::open(&path).unwrap();
        let mut found = Vec::new();
        while let Some((number, bytes)) = lines.next().unwrap() {
            found.push((number, read(number, &bytes, URL).unwrap().custom_id));
        }
        assert_eq!(found, [(2, "a".to_owned()), (4, "b".to_owned())]);
    }

    #[test]
    fn what_is_wrong_is_told_by_line() {
        let changed = |from: &str, to: &str| line("x").replace(from, to);
        let cases = [
            ("{", "invalid_json_line", Value::Null),
            ("[]", "invalid_json_line", Value::Null),
            ("\u{fffd}", "invalid_json_line", Value::Null),
            (&changed("\"x\",\"method", "\"\",\"method"), "invalid_custom_id", json!("custom_id")),
            (&changed("custom_id", "other"), "invalid_custom_id", json!("custom_id")),
            (&changed("POST", "GET"), "invalid_method", json!("method")),
            (&changed(URL, "/v1/embeddings"), "invalid_url", json!("url")),
            (&changed("{\"prompt\":\"x\"}", "7"), "invalid_body", json!("body")),
            (&changed("\"prompt\":\"x\"", "\"stream\":true"), "invalid_body", json!("body.stream")),
            (&changed("\"prompt\":\"x\"", "\"background\":true"), "invalid_body", json!("body.background")),
            (&line("a"), "duplicate_custom_id", json!("custom_id")),
        ];
        for (wrong, code, param) in cases {
            let errors = checked(&format!("{}\n{wrong}\n{}", line("a"), line("b"))).unwrap_err();
            assert_eq!(errors.len(), 1, "{wrong}: {errors:?}");
            assert_eq!((&errors[0]["code"], &errors[0]["param"]), (&json!(code), &param), "{wrong}");
            assert_eq!(errors[0]["line"], 2);
            assert!(errors[0]["message"].as_str().unwrap().starts_with("line 2: "));
        }
        assert_eq!(checked("\n \n").unwrap_err()[0]["code"], "empty_file");
        assert_eq!(checked(&"{\n".repeat(1000)).unwrap_err().len(), ERRORS_MAX);
        let many: String = (0..=LINES_MAX).map(|at| line(&at.to_string()) + "\n").collect();
        assert_eq!(checked(&many).unwrap_err()[0]["code"], "too_many_lines");
    }
}
