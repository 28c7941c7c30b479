//! What can go wrong before a model serves its first request; addressed to the operator.

use std::path::{Path, PathBuf};

/// Why a model could not be loaded. Every message says what was expected and what was found.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The file could not be opened, read or mapped.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file is not what its name promises.
    #[error("{path}: {what}")]
    Format {
        /// The file.
        path: PathBuf,
        /// Expected and found.
        what: String,
    },
    /// A weight that the model needs is in none of its files.
    #[error("{path}: tensor `{name}` is missing (expected shape {expected:?})")]
    MissingTensor {
        /// The file or directory that was searched.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// The shape that the configuration asks for.
        expected: Vec<usize>,
    },
    /// A weight has another shape than the configuration asks for.
    #[error("{path}: tensor `{name}`: expected shape {expected:?}, found {found:?}")]
    Shape {
        /// The file that holds it.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// The shape that the configuration asks for.
        expected: Vec<usize>,
        /// The shape in the file.
        found: Vec<usize>,
    },
    /// The configuration names a family that is not known.
    #[error("{path}: unknown model_type `{found}` (known: {known})")]
    UnknownFamily {
        /// The configuration file.
        path: PathBuf,
        /// What it says.
        found: String,
        /// Comma-separated families.
        known: String,
    },
    /// The program of a family does not hold together.
    #[error("op {op} ({name}): {what}")]
    Graph {
        /// Index in its block.
        op: usize,
        /// The op.
        name: &'static str,
        /// Expected and found.
        what: String,
    },
    /// A backend does not have an op or a variant of it.
    #[error("the {backend} backend does not support {what}")]
    Unsupported {
        /// The backend.
        backend: &'static str,
        /// The op and its variant.
        what: String,
    },
    /// The machine does not have what the limits ask for.
    #[error("{what}")]
    Resources {
        /// Expected and found.
        what: String,
    },
}

impl LoadError {
    /// [`LoadError::Format`]: `what` says what was expected and what was found.
    pub(crate) fn format(path: &Path, what: impl Into<String>) -> Self {
        Self::Format { path: path.to_owned(), what: what.into() }
    }
}
