//! Tensors of GGUF files, and numbers that are computed from them when they are opened.

use std::borrow::Cow;
use std::path::Path;

use super::{Bytes, DType, Entry, Mapped, RowMap, Span, Storage, Tensor, TensorView, Weights, map};
use crate::LoadError;
use crate::gguf::Metadata;
use crate::gguf::read::{self, Header};

impl Weights {
    /// Without tensors yet; `origin` is named in messages.
    pub(crate) fn none(origin: &Path) -> Self {
        Self::empty(origin)
    }

    /// Maps a GGUF file. Its tensors are stored from then on; none can be asked for before it is defined.
    pub(crate) fn add_gguf(&mut self, path: &Path) -> Result<Metadata, LoadError> {
        self.add_gguf_file(path, map(path)?)
    }

    /// As [`Weights::add_gguf`], of bytes in memory.
    pub(crate) fn add_gguf_bytes(&mut self, path: &Path, bytes: Vec<u8>) -> Result<Metadata, LoadError> {
        self.add_gguf_file(path, Bytes::Memory(Cow::Owned(bytes)))
    }

    fn add_gguf_file(&mut self, path: &Path, bytes: Bytes) -> Result<Metadata, LoadError> {
        let Header { metadata, tensors } = read::read(path, &bytes)?;
        let file = self.files.len();
        for t in tensors {
            let type_name = t.type_name.to_owned();
            let span = Span { file, range: t.range };
            self.store(path, t.name, Entry { type_name, dtype: Some(t.dtype), shape: t.shape, span })?;
        }
        self.files.push(Mapped { path: path.to_owned(), bytes });
        Ok(metadata)
    }

    /// The numbers of a stored tensor.
    pub(crate) fn read_stored(&self, name: &str) -> Result<Vec<f32>, LoadError> {
        let dtype = self.dtype_of(name)?;
        let entry = self.entry(name)?;
        let storage = Storage::Rows(self.bytes(&entry.span));
        let view = TensorView { dtype, shape: &entry.shape, storage, rows: RowMap::PLAIN };
        let mut numbers = vec![0.0; view.len()];
        view.read_f32(&mut numbers);
        Ok(numbers)
    }

    /// A tensor that is in no file.
    pub(crate) fn add_numbers(
        &mut self,
        name: String,
        shape: Vec<usize>,
        numbers: &[f32],
    ) -> Result<(), LoadError> {
        assert_eq!(shape.iter().product::<usize>(), numbers.len(), "numbers for {name} of shape {shape:?}");
        let bytes: Vec<u8> = numbers.iter().flat_map(|n| n.to_le_bytes()).collect();
        let span = Span { file: self.files.len(), range: 0..bytes.len() };
        self.files.push(Mapped { path: self.origin.clone(), bytes: Bytes::Memory(Cow::Owned(bytes)) });
        let tensor = Tensor { dtype: DType::F32, shape, storage: Storage::Rows(span), rows: RowMap::PLAIN };
        self.insert(name, tensor, &[])
    }
}
