//! `config.json`, typed access with every number checked: what is absent, of another type, or absurd is an error
//! that names the key.

use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::LoadError;
use crate::file;

/// A parsed configuration. Keys whose value is `null` count as absent, as transformers reads them.
#[derive(Clone, Debug)]
pub struct Config {
    path: PathBuf,
    /// Where the object stands in the file, such as `rope_scaling.`; empty at the top.
    prefix: String,
    map: Map<String, Value>,
}

impl Config {
    /// Reads the `config.json` of a directory.
    ///
    /// # Errors
    /// [`LoadError::Io`], [`LoadError::Format`].
    pub fn open(dir: &Path) -> Result<Self, LoadError> {
        let path = dir.join("config.json");
        Self::from_bytes(&path, &file::read(&path, file::CONFIG_BYTES_MAX)?)
    }

    /// Parses the bytes of a `config.json`; `origin` stands for its path in messages.
    ///
    /// # Errors
    /// [`LoadError::Format`].
    pub fn from_bytes(origin: &Path, json: &[u8]) -> Result<Self, LoadError> {
        let map = serde_json::from_slice(json)
            .map_err(|e| LoadError::format(origin, format!("expected a JSON object, found: {e}")))?;
        Ok(Self { path: origin.to_owned(), prefix: String::new(), map })
    }

    /// The same with keys that the file leaves out; one that it names, be it as `null`, stays.
    pub(crate) fn or(&self, defaults: Value) -> Self {
        let mut config = self.clone();
        for (key, value) in entries(defaults) {
            config.map.entry(key).or_insert(value);
        }
        config
    }

    /// The same with these keys in place of the file's.
    pub(crate) fn with(&self, keys: Value) -> Self {
        let mut config = self.clone();
        config.map.extend(entries(keys));
        config
    }

    /// The file, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// An error about a key: what was expected, what is there.
    pub(crate) fn wrong(&self, key: &str, expected: &str) -> LoadError {
        let found = self.get(key).map_or_else(|| "nothing".to_owned(), shortened);
        LoadError::format(&self.path, format!("{}{key}: expected {expected}, found {found}", self.prefix))
    }

    pub(crate) fn get(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|v| !v.is_null())
    }

    /// All keys and values at this level.
    pub(crate) fn entries(&self) -> impl Iterator<Item = (&String, &Value)> {
        self.map.iter()
    }

    /// A whole number in a range; `None` where absent.
    pub(crate) fn count(&self, key: &str, range: RangeInclusive<usize>) -> Result<Option<usize>, LoadError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let number = value.as_u64().and_then(|n| usize::try_from(n).ok()).filter(|n| range.contains(n));
        let expected = || format!("a whole number from {} to {}", range.start(), range.end());
        number.map(Some).ok_or_else(|| self.wrong(key, &expected()))
    }

    /// A whole number in a range that must be there.
    pub(crate) fn required(&self, key: &str, range: RangeInclusive<usize>) -> Result<usize, LoadError> {
        let expected = format!("a whole number from {} to {}", range.start(), range.end());
        self.count(key, range)?.ok_or_else(|| self.wrong(key, &expected))
    }

    /// A number in a range; `None` where absent.
    pub(crate) fn number(&self, key: &str, range: RangeInclusive<f64>) -> Result<Option<f64>, LoadError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let number = value.as_f64().filter(|n| range.contains(n));
        let expected = || format!("a number from {} to {}", range.start(), range.end());
        number.map(Some).ok_or_else(|| self.wrong(key, &expected()))
    }

    /// A truth value, `default` where absent.
    pub(crate) fn flag(&self, key: &str, default: bool) -> Result<bool, LoadError> {
        match self.get(key) {
            None => Ok(default),
            Some(value) => value.as_bool().ok_or_else(|| self.wrong(key, "true or false")),
        }
    }

    /// A text; `None` where absent.
    pub(crate) fn text(&self, key: &str) -> Result<Option<&str>, LoadError> {
        match self.get(key) {
            None => Ok(None),
            Some(value) => value.as_str().map(Some).ok_or_else(|| self.wrong(key, "a text")),
        }
    }

    /// An object; `None` where absent.
    pub(crate) fn object(&self, key: &str) -> Result<Option<Config>, LoadError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Object(map)) => {
                let prefix = format!("{}{key}.", self.prefix);
                Ok(Some(Config { path: self.path.clone(), prefix, map: map.clone() }))
            }
            Some(_) => Err(self.wrong(key, "an object")),
        }
    }

    /// One token id or a list of them, each below `vocab`; empty where absent.
    pub(crate) fn token_ids(&self, key: &str, vocab: usize) -> Result<Vec<u32>, LoadError> {
        let values = match self.get(key) {
            None => return Ok(Vec::new()),
            Some(Value::Array(list)) => list.as_slice(),
            Some(one) => std::slice::from_ref(one),
        };
        let ids: Option<Vec<u32>> = values
            .iter()
            .map(|v| v.as_u64().filter(|&n| n < vocab as u64).and_then(|n| u32::try_from(n).ok()))
            .collect();
        ids.ok_or_else(|| self.wrong(key, &format!("token ids below {vocab}")))
    }
}

/// The keys of an object that stands in the source.
fn entries(object: Value) -> Map<String, Value> {
    match object {
        Value::Object(map) => map,
        other => unreachable!("{other} is no object"),
    }
}

/// A value as it appears in a message: its beginning, if it is long.
fn shortened(value: &Value) -> String {
    const CHARS_MAX: usize = 80;
    let text = value.to_string();
    match text.char_indices().nth(CHARS_MAX) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}
