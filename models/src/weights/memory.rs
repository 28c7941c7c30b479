//! Tensors that lie in memory and in no file: made-up weights, or such as were converted at load.

use std::borrow::Cow;
use std::path::Path;

use super::view::{RowMap, Storage, rows_cols};
use super::{Bytes, DType, Entry, Mapped, Span, Tensor, Weights};
use crate::LoadError;

/// One tensor in memory.
#[derive(Clone, Debug)]
pub struct MemoryTensor {
    /// The name that it is asked for by.
    pub name: String,
    /// How its numbers are stored.
    pub dtype: DType,
    /// Dimensions, outermost first.
    pub shape: Vec<usize>,
    /// Rows end to end, little-endian.
    pub bytes: Vec<u8>,
}

impl Weights {
    /// The given tensors. `origin` stands for a path in messages.
    ///
    /// # Errors
    /// [`LoadError::Format`] where a tensor has not the bytes that its type and shape ask for, or its name twice.
    pub fn from_tensors(
        origin: &Path,
        tensors: impl IntoIterator<Item = MemoryTensor>,
    ) -> Result<Self, LoadError> {
        let mut weights = Self::empty(origin);
        for MemoryTensor { name, dtype, shape, bytes } in tensors {
            let (rows, cols) = rows_cols(&shape);
            let expected = dtype.row_bytes(cols).and_then(|row| row.checked_mul(rows));
            if expected != Some(bytes.len()) || weights.tensors.contains_key(&name) {
                let found = bytes.len();
                let what = format!(
                    "tensor `{name}`: expected once, {shape:?} of {dtype:?} in {expected:?} bytes, found {found} bytes"
                );
                return Err(LoadError::format(origin, what));
            }
            let span = Span { file: weights.files.len(), range: 0..bytes.len() };
            let storage = Storage::Rows(span.clone());
            let tensor = Tensor { dtype, shape: shape.clone(), storage, rows: RowMap::PLAIN };
            weights.tensors.insert(name.clone(), tensor);
            let type_name = format!("{dtype:?}");
            weights.stored.insert(name, Entry { type_name, dtype: Some(dtype), shape, span });
            let bytes = Bytes::Memory(Cow::Owned(bytes));
            weights.files.push(Mapped { path: origin.to_owned(), bytes });
        }
        Ok(weights)
    }
}
