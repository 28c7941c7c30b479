//! What is known of a file: as it stands beside it on disk, and as the API shows it.

use serde_json::{Value, json};

/// The version of the record on disk.
const FORMAT: u64 = 1;

/// What is known of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct FileRecord {
    pub(crate) id: String,
    pub(crate) bytes: u64,
    /// Unix seconds, as all times here.
    pub(crate) created_at: u64,
    pub(crate) expires_at: Option<u64>,
    pub(crate) filename: String,
    pub(crate) purpose: String,
}

impl FileRecord {
    pub(crate) fn is_expired(&self, now: u64) -> bool {
        self.expires_at.is_some_and(|at| at <= now)
    }

    /// As it stands on disk.
    pub(super) fn to_json(&self) -> Value {
        json!({
            "format": FORMAT,
            "id": self.id,
            "bytes": self.bytes,
            "created_at": self.created_at,
            "expires_at": self.expires_at,
            "filename": self.filename,
            "purpose": self.purpose,
        })
    }

    /// Reads what [`FileRecord::to_json`] wrote.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(super) fn of_json(bytes: &[u8]) -> Result<Self, String> {
        let value: Value = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
        if value["format"] != FORMAT {
            return Err(format!("expected format {FORMAT}, found {}", value["format"]));
        }
        let text = |key: &str| value[key].as_str().map(str::to_owned);
        let read = || {
            Some(Self {
                id: text("id")?,
                bytes: value["bytes"].as_u64()?,
                created_at: value["created_at"].as_u64()?,
                expires_at: value["expires_at"].as_u64(),
                filename: text("filename")?,
                purpose: text("purpose")?,
            })
        };
        read().ok_or_else(|| "a part of the record is missing".to_owned())
    }

    /// As the API shows it.
    pub(crate) fn object(&self) -> Value {
        let mut object = json!({
            "id": self.id,
            "object": "file",
            "bytes": self.bytes,
            "created_at": self.created_at,
            "filename": self.filename,
            "purpose": self.purpose,
            "status": "processed",
        });
        if let Some(at) = self.expires_at {
            object["expires_at"] = json!(at);
        }
        object
    }
}
