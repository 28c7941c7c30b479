//! Weights that are quantized when they are loaded: which of them, how, and their place beside the stored ones.

use std::borrow::Cow;

use super::{Bytes, DType, Mapped, RowMap, Span, Storage, Tensor, Weights};

/// What weights become at load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AtLoad {
    /// 8 bits: Q8_0.
    Q8,
    /// 4 bits: Q4_K, with 6 bits for the vocabulary product.
    Q4,
}

impl AtLoad {
    /// What it is called in a model's identity.
    pub fn name(self) -> &'static str {
        match self {
            AtLoad::Q8 => "q8_0",
            AtLoad::Q4 => "q4_k",
        }
    }
}

impl Weights {
    /// The format that a tensor gets; `None` where it stays as it is: what is no matrix of floats in a product, what is
    /// too small to gain, what has blocks already, and rows that no blocks fill.
    pub fn type_at_load(&self, name: &str, quant: AtLoad) -> Option<DType> {
        const WHOLE: [&str; 5] = [
            "mlp.gate.weight",
            "mlp.router.weight",
            "position_embeddings.weight",
            "token_type_embeddings.weight",
            "norm.weight",
        ];
        let tensor = self.tensors.get(name)?;
        let plain = tensor.dtype.element_bytes().is_some();
        if !plain || tensor.shape.len() != 2 || WHOLE.iter().any(|end| name.ends_with(end)) {
            return None;
        }
        let cols = tensor.shape[1];
        let vocabulary = name.ends_with("lm_head.weight") || name.ends_with("embed_tokens.weight");
        let wanted: &[DType] = match quant {
            AtLoad::Q8 => &[DType::Q8_0],
            AtLoad::Q4 if vocabulary => &[DType::Q6K, DType::Q8_0],
            AtLoad::Q4 => &[DType::Q4K, DType::Q5_0],
        };
        wanted.iter().copied().find(|dtype| dtype.row_bytes(cols).is_some())
    }

    /// Bytes of all tensors once they are quantized.
    pub fn bytes_at_load(&self, quant: AtLoad) -> u64 {
        let bytes = |name: &str| {
            let view = self.tensor(name).ok()?;
            let encoded = self.type_at_load(name, quant).and_then(|dtype| dtype.row_bytes(view.cols()));
            Some(encoded.map_or(view.stored_bytes(), |row| row * view.rows()) as u64)
        };
        self.names().filter_map(bytes).sum()
    }

    /// Puts encoded rows in the place of a tensor.
    ///
    /// # Panics
    /// If there is no such matrix, or the bytes are not those of its shape.
    pub fn replace(&mut self, name: &str, dtype: DType, bytes: Vec<u8>) {
        let shape = self.tensors.get(name).map(|t| t.shape.clone()).unwrap_or_default();
        let expected = match shape[..] {
            [rows, cols] => dtype.row_bytes(cols).map(|bytes| bytes * rows),
            _ => None,
        };
        assert_eq!(expected, Some(bytes.len()), "bytes of {dtype:?} for `{name}` of shape {shape:?}");
        let span = Span { file: self.files.len(), range: 0..bytes.len() };
        self.files.push(Mapped { path: self.origin.clone(), bytes: Bytes::Memory(Cow::Owned(bytes)) });
        let tensor = Tensor { dtype, shape, storage: Storage::Rows(span), rows: RowMap::PLAIN };
        self.tensors.insert(name.to_owned(), tensor);
    }
}
