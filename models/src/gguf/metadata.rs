//! The metadata of a GGUF file: typed access, with errors that name the key.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use crate::LoadError;

/// Alignments beyond a page of the largest kind are no file's.
const ALIGNMENT_MAX: u64 = 1 << 21;

/// One value. Whole numbers of every width are one kind: writers disagree about them.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Value {
    Whole(i64),
    Number(f64),
    Flag(bool),
    Text(String),
    Array(Array),
}

/// Values of one type.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Array {
    Texts(Vec<String>),
    /// Anything else.
    Values(Vec<Value>),
}

/// All entries of a file.
#[derive(Debug)]
pub(crate) struct Metadata {
    path: PathBuf,
    entries: HashMap<String, Value>,
}

impl Metadata {
    pub(super) fn new(path: &Path) -> Self {
        Self { path: path.to_owned(), entries: HashMap::new() }
    }

    /// Whether the key is new.
    pub(super) fn insert(&mut self, key: &str, value: Value) -> bool {
        self.entries.insert(key.to_owned(), value).is_none()
    }

    pub(super) fn alignment(&self) -> Result<Option<u64>, String> {
        let Some(value) = self.entries.get("general.alignment") else { return Ok(None) };
        let alignment = match value {
            Value::Whole(n) => u64::try_from(*n).ok().filter(|n| (1..=ALIGNMENT_MAX).contains(n)),
            _ => None,
        };
        let wrong =
            || format!("metadata `general.alignment`: expected 1 to {ALIGNMENT_MAX}, found {}", shown(value));
        alignment.map(Some).ok_or_else(wrong)
    }

    /// The file, for messages.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn get(&self, key: &str) -> Option<&Value> {
        self.entries.get(key)
    }

    /// An error about a key: what was expected, what is there.
    pub(crate) fn wrong(&self, key: &str, expected: &str) -> LoadError {
        let found = self.get(key).map_or_else(|| "nothing".to_owned(), shown);
        LoadError::format(&self.path, format!("metadata `{key}`: expected {expected}, found {found}"))
    }

    pub(crate) fn text(&self, key: &str) -> Result<Option<&str>, LoadError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Text(text)) => Ok(Some(text)),
            Some(_) => Err(self.wrong(key, "a text")),
        }
    }

    pub(crate) fn flag(&self, key: &str) -> Result<Option<bool>, LoadError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Flag(flag)) => Ok(Some(*flag)),
            Some(_) => Err(self.wrong(key, "true or false")),
        }
    }

    pub(crate) fn count(&self, key: &str) -> Result<Option<u64>, LoadError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Whole(n)) => match u64::try_from(*n) {
                Ok(n) => Ok(Some(n)),
                Err(_) => Err(self.wrong(key, "a whole number that is not negative")),
            },
            // a list of equal numbers, one for each layer
            Some(Value::Array(Array::Values(values))) => match values.split_first() {
                Some((Value::Whole(n), rest)) if rest.iter().all(|v| *v == Value::Whole(*n)) => {
                    Ok(u64::try_from(*n).ok())
                }
                _ => Err(self.wrong(key, "one number for all layers")),
            },
            Some(_) => Err(self.wrong(key, "a whole number")),
        }
    }

    pub(crate) fn required(&self, key: &str) -> Result<u64, LoadError> {
        self.count(key)?.ok_or_else(|| self.wrong(key, "a whole number"))
    }

    pub(crate) fn number(&self, key: &str) -> Result<Option<f64>, LoadError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Number(n)) if n.is_finite() => Ok(Some(*n)),
            Some(Value::Whole(n)) => Ok(Some(*n as f64)),
            Some(_) => Err(self.wrong(key, "a number")),
        }
    }

    pub(crate) fn texts(&self, key: &str) -> Result<Option<&[String]>, LoadError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Array(Array::Texts(texts))) => Ok(Some(texts)),
            Some(Value::Array(Array::Values(values))) if values.is_empty() => Ok(Some(&[])),
            Some(_) => Err(self.wrong(key, "a list of texts")),
        }
    }

    /// A list of numbers, each of which `read` takes.
    pub(crate) fn list<T>(
        &self,
        key: &str,
        expected: &str,
        read: impl Fn(&Value) -> Option<T>,
    ) -> Result<Option<Vec<T>>, LoadError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Array(Array::Values(values))) => {
                let read: Option<Vec<T>> = values.iter().map(read).collect();
                read.map(Some).ok_or_else(|| self.wrong(key, expected))
            }
            Some(_) => Err(self.wrong(key, expected)),
        }
    }
}

/// A value as it appears in a message: its beginning, if it is long.
fn shown(value: &Value) -> String {
    const CHARS_MAX: usize = 80;
    match value {
        Value::Whole(n) => n.to_string(),
        Value::Number(n) => n.to_string(),
        Value::Flag(flag) => flag.to_string(),
        Value::Text(text) => match text.char_indices().nth(CHARS_MAX) {
            Some((end, _)) => format!("`{}...`", &text[..end]),
            None => format!("`{text}`"),
        },
        Value::Array(Array::Texts(texts)) => format!("a list of {} texts", texts.len()),
        Value::Array(Array::Values(values)) => format!("a list of {} values", values.len()),
    }
}
