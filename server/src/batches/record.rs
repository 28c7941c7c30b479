//! What is known of a batch: as it stands on disk, and as the API shows it.

use serde_json::{Map, Value, json};

/// The version of the record on disk.
const FORMAT: u64 = 1;

/// How far a batch is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Status {
    Validating,
    Failed,
    InProgress,
    Finalizing,
    Completed,
    Expired,
    Cancelling,
    Cancelled,
}

impl Status {
    const ALL: [Self; 8] = [
        Self::Validating,
        Self::Failed,
        Self::InProgress,
        Self::Finalizing,
        Self::Completed,
        Self::Expired,
        Self::Cancelling,
        Self::Cancelled,
    ];

    /// As the API has it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Validating => "validating",
            Self::Failed => "failed",
            Self::InProgress => "in_progress",
            Self::Finalizing => "finalizing",
            Self::Completed => "completed",
            Self::Expired => "expired",
            Self::Cancelling => "cancelling",
            Self::Cancelled => "cancelled",
        }
    }

    /// Whether nothing more happens.
    pub(crate) fn is_over(self) -> bool {
        matches!(self, Self::Failed | Self::Completed | Self::Expired | Self::Cancelled)
    }
}

/// How many lines have been answered, and how.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) completed: u64,
    pub(crate) failed: u64,
}

/// What is known of a batch.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct BatchRecord {
    pub(crate) id: String,
    /// Whose it is, by name: its lines speak for the tenant.
    pub(crate) tenant: String,
    pub(crate) endpoint: String,
    pub(crate) input_file_id: String,
    pub(crate) completion_window: String,
    pub(crate) metadata: Option<Map<String, Value>>,
    /// How long what it writes is kept, seconds.
    pub(crate) output_lifetime_s: Option<u64>,
    pub(crate) status: Status,
    /// Unix seconds, as all times here.
    pub(crate) created_at: u64,
    pub(crate) expires_at: u64,
    /// When it reached each status, as `in_progress_at`.
    pub(crate) reached: Map<String, Value>,
    /// Lines; 0 until they are checked.
    pub(crate) total: u64,
    /// As of the end.
    pub(crate) counts: Counts,
    /// What is wrong with its lines.
    pub(crate) errors: Vec<Value>,
    /// The ids of its answers and of its errors, chosen before there are such files, so that they are written once.
    pub(crate) output_files: [String; 2],
    /// Which of the two there are.
    pub(crate) has_files: [bool; 2],
}

impl BatchRecord {
    /// Notes that it has reached a status.
    pub(crate) fn reach(&mut self, status: Status, now: u64) {
        self.status = status;
        self.reached.insert(format!("{}_at", status.name()), json!(now));
    }

    /// As it stands on disk.
    pub(super) fn to_json(&self) -> Value {
        json!({
            "format": FORMAT,
            "id": self.id,
            "tenant": self.tenant,
            "endpoint": self.endpoint,
            "input_file_id": self.input_file_id,
            "completion_window": self.completion_window,
            "metadata": self.metadata,
            "output_lifetime_s": self.output_lifetime_s,
            "status": self.status.name(),
            "created_at": self.created_at,
            "expires_at": self.expires_at,
            "reached": self.reached,
            "total": self.total,
            "counts": [self.counts.completed, self.counts.failed],
            "errors": self.errors,
            "output_files": self.output_files,
            "has_files": self.has_files,
        })
    }

    /// Reads what [`BatchRecord::to_json`] wrote.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(super) fn of_json(bytes: &[u8]) -> Result<Self, String> {
        let value: Value = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
        if value["format"] != FORMAT {
            return Err(format!("expected format {FORMAT}, found {}", value["format"]));
        }
        Self::parts(&value).ok_or_else(|| "a part of the record is missing".to_owned())
    }

    fn parts(value: &Value) -> Option<Self> {
        let text = |value: &Value| value.as_str().map(str::to_owned);
        let status = value["status"].as_str()?;
        let files = &value["output_files"];
        let has = &value["has_files"];
        Some(Self {
            id: text(&value["id"])?,
            tenant: text(&value["tenant"])?,
            endpoint: text(&value["endpoint"])?,
            input_file_id: text(&value["input_file_id"])?,
            completion_window: text(&value["completion_window"])?,
            metadata: value["metadata"].as_object().cloned(),
            output_lifetime_s: value["output_lifetime_s"].as_u64(),
            status: Status::ALL.into_iter().find(|known| known.name() == status)?,
            created_at: value["created_at"].as_u64()?,
            expires_at: value["expires_at"].as_u64()?,
            reached: value["reached"].as_object()?.clone(),
            total: value["total"].as_u64()?,
            counts: Counts { completed: value["counts"][0].as_u64()?, failed: value["counts"][1].as_u64()? },
            errors: value["errors"].as_array()?.clone(),
            output_files: [text(&files[0])?, text(&files[1])?],
            has_files: [has[0].as_bool()?, has[1].as_bool()?],
        })
    }

    /// As the API shows it, with what has been answered so far.
    pub(crate) fn object(&self, counts: Counts) -> Value {
        let mut object = json!({
            "id": self.id,
            "object": "batch",
            "endpoint": self.endpoint,
            "input_file_id": self.input_file_id,
            "completion_window": self.completion_window,
            "status": self.status.name(),
            "created_at": self.created_at,
            "expires_at": self.expires_at,
            "request_counts": {
                "total": self.total,
                "completed": counts.completed,
                "failed": counts.failed,
            },
            "metadata": self.metadata,
        });
        for (at, seconds) in &self.reached {
            object[at] = seconds.clone();
        }
        let files = ["output_file_id", "error_file_id"].into_iter().zip(&self.output_files);
        for ((field, id), _) in files.zip(self.has_files).filter(|(_, has)| *has) {
            object[field] = json!(id);
        }
        if !self.errors.is_empty() {
            object["errors"] = json!({"object": "list", "data": self.errors});
        }
        object
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::batches) fn record(id: &str) -> BatchRecord {
        BatchRecord {
            id: id.to_owned(),
            tenant: "default".to_owned(),
            endpoint: "/v1/completions".to_owned(),
            input_file_id: "file-1".to_owned(),
            completion_window: "24h".to_owned(),
            metadata: None,
            output_lifetime_s: None,
            status: Status::Validating,
            created_at: 5,
            expires_at: 9,
            reached: Map::new(),
            total: 0,
            counts: Counts::default(),
            errors: Vec::new(),
            output_files: ["file-out".to_owned(), "file-err".to_owned()],
            has_files: [false, false],
        }
    }

    #[test]
    fn a_record_is_read_as_it_was_written() {
        for status in Status::ALL {
            let mut wanted = record("batch_1");
            wanted.reach(status, 7);
            wanted.metadata = json!({"a": "b"}).as_object().cloned();
            wanted.output_lifetime_s = Some(3600);
            wanted.errors = vec![json!({"line": 3})];
            (wanted.total, wanted.counts) = (4, Counts { completed: 1, failed: 2 });
            wanted.has_files = [true, false];
            let bytes = wanted.to_json().to_string();
            assert_eq!(BatchRecord::of_json(bytes.as_bytes()), Ok(wanted.clone()));
            assert!(BatchRecord::of_json(bytes.replace("\"format\":1", "\"format\":2").as_bytes()).is_err());
            assert!(BatchRecord::of_json(bytes.replace("\"reached\"", "\"other\"").as_bytes()).is_err());
            let object = wanted.object(wanted.counts);
            assert_eq!(object[format!("{}_at", status.name())], 7);
            assert_eq!((&object["output_file_id"], object.get("error_file_id")), (&json!("file-out"), None));
            assert_eq!(object["request_counts"], json!({"total": 4, "completed": 1, "failed": 2}));
        }
    }
}
