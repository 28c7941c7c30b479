//! Tensors that are asked for under another name, or as another matrix, than they are stored.

use std::ops::Range;

use super::view::{Order, RowMap, Storage, rows_cols};
use super::{DType, Entry, Tensor, Weights};
use crate::LoadError;

/// Which part of a stored tensor is meant, in this order: one of a stack, as it is or transposed, of that some rows.
/// A vector's rows are its elements.
#[derive(Clone, Debug, Default)]
pub(crate) struct Cut {
    /// Index into the first dimension, which falls away.
    pub(crate) index: Option<usize>,
    /// Whether rows become columns.
    pub(crate) transposed: bool,
    /// The rows that remain.
    pub(crate) rows: Rows,
}

/// Rows that remain, and their order.
#[derive(Clone, Debug, Default)]
pub(crate) enum Rows {
    /// As they are.
    #[default]
    All,
    /// Consecutive ones.
    Range(Range<usize>),
    /// Every `step`-th from `first` on.
    Every { first: usize, step: usize },
    /// All, in heads of so many, whose rotated pairs are stored side by side and wanted half a head apart.
    Pairs { head_rows: usize },
}

impl Weights {
    /// Makes a part of a stored tensor available as `name`; the stored name then no longer is.
    ///
    /// # Errors
    /// [`LoadError::Format`] where there is no such part, or `name` exists already.
    pub(crate) fn define(&mut self, name: String, stored: &str, cut: &Cut) -> Result<(), LoadError> {
        let entry = self.entry(stored)?;
        let dtype = self.dtype_of(stored)?;
        let (shape, first) = self.indexed(stored, entry, cut.index)?;
        let mut storage = Storage::Rows(entry.span.clone());
        let mut shape = shape.to_vec();
        let mut map = RowMap { first, ..RowMap::PLAIN };
        if cut.transposed {
            let [rows, cols] = shape[..] else {
                return Err(self.wrong(stored, format!("expected a matrix to transpose, found {shape:?}")));
            };
            let Some(row_bytes) = dtype.row_bytes(cols).filter(|_| dtype.format().is_none()) else {
                return Err(self.wrong(stored, format!("expected floats to transpose, found {dtype:?}")));
            };
            let mut bytes = entry.span.clone();
            let start = bytes.range.start + first * row_bytes;
            bytes.range = start..start + rows * row_bytes;
            storage = Storage::Columns { bytes, stride: cols };
            (shape, map) = (vec![cols, rows], RowMap::PLAIN);
        }
        self.pick(stored, &mut shape, &mut map, &cut.rows)?;
        self.insert(name, Tensor { dtype, shape, storage, rows: map }, &[stored])
    }

    /// Makes one matrix of a pair of stored ones available as `name`: MXFP4 codes `[.., rows, cols / 32, 16]` and scales
    /// `[.., rows, cols / 32]`.
    ///
    /// # Errors
    /// As [`Weights::define`].
    pub(crate) fn define_mxfp4(
        &mut self,
        name: String,
        (codes, scales): (&str, &str),
        cut: &Cut,
    ) -> Result<(), LoadError> {
        let (of_codes, of_scales) = (self.entry(codes)?, self.entry(scales)?);
        let halves = of_codes.shape.split_last().filter(|(last, _)| **last == 16).map(|(_, outer)| outer);
        if halves != Some(&of_scales.shape[..]) || of_codes.type_name != "U8" || of_scales.type_name != "U8" {
            let what = format!(
                "expected U8 codes of shape [.., 16] and a U8 scale for each 16, found {} {:?} and {} {:?}",
                of_codes.type_name, of_codes.shape, of_scales.type_name, of_scales.shape
            );
            return Err(self.wrong(codes, what));
        }
        let (shape, first) = self.indexed(scales, of_scales, cut.index)?;
        let [rows, blocks] = shape[..] else {
            return Err(self.wrong(scales, format!("expected a matrix, found {shape:?}")));
        };
        if cut.transposed {
            return Err(self.wrong(codes, "expected floats to transpose, found MXFP4".to_owned()));
        }
        let storage = Storage::Mxfp4 { codes: of_codes.span.clone(), scales: of_scales.span.clone() };
        let mut shape = vec![rows, blocks.saturating_mul(32)];
        let mut map = RowMap { first, ..RowMap::PLAIN };
        self.pick(codes, &mut shape, &mut map, &cut.rows)?;
        self.insert(name, Tensor { dtype: DType::Mxfp4, shape, storage, rows: map }, &[codes, scales])
    }

    /// The shape of a stored tensor, whatever its elements are; `None` where there is none of this name.
    pub(crate) fn stored_shape(&self, name: &str) -> Option<&[usize]> {
        self.stored.get(name).map(|e| &e.shape[..])
    }

    /// The names in the files, sorted.
    pub(crate) fn stored_names(&self) -> impl Iterator<Item = &str> {
        self.stored.keys().map(String::as_str)
    }

    pub(super) fn entry(&self, name: &str) -> Result<&Entry, LoadError> {
        let path = || self.origin.clone();
        let missing =
            || LoadError::MissingTensor { path: path(), name: name.to_owned(), expected: Vec::new() };
        self.stored.get(name).ok_or_else(missing)
    }

    pub(super) fn dtype_of(&self, stored: &str) -> Result<DType, LoadError> {
        let entry = self.entry(stored)?;
        entry.dtype.ok_or_else(|| {
            self.wrong(stored, format!("expected dtype F32, F16 or BF16, found {}", entry.type_name))
        })
    }

    /// The shape of one of a stack, and its first row in the whole.
    fn indexed<'a>(
        &self,
        name: &str,
        entry: &'a Entry,
        index: Option<usize>,
    ) -> Result<(&'a [usize], usize), LoadError> {
        let Some(index) = index else { return Ok((&entry.shape, 0)) };
        match entry.shape.split_first() {
            Some((count, inner)) if index < *count && !inner.is_empty() => {
                Ok((inner, index * rows_cols(inner).0))
            }
            _ => {
                let what = format!("expected a stack of more than {index}, found shape {:?}", entry.shape);
                Err(self.wrong(name, what))
            }
        }
    }

    fn pick(&self, name: &str, shape: &mut [usize], map: &mut RowMap, rows: &Rows) -> Result<(), LoadError> {
        let Some(count) = shape.first_mut() else {
            return Err(self.wrong(name, "expected rows, found a single number".to_owned()));
        };
        match *rows {
            Rows::All => return Ok(()),
            Rows::Range(ref range) if range.start <= range.end && range.end <= *count => {
                map.first += range.start;
                *count = range.len();
            }
            Rows::Every { first, step } if step > 0 && first < step && count.is_multiple_of(step) => {
                map.first += first;
                map.order = Order::Every { step };
                *count /= step;
            }
            Rows::Pairs { head_rows }
                if head_rows > 0 && head_rows.is_multiple_of(2) && count.is_multiple_of(head_rows) =>
            {
                map.order = Order::Pairs { head_rows };
            }
            _ => return Err(self.wrong(name, format!("expected {rows:?} of its rows, found {count} rows"))),
        }
        Ok(())
    }

    pub(super) fn insert(&mut self, name: String, tensor: Tensor, made_of: &[&str]) -> Result<(), LoadError> {
        for stored in made_of {
            self.tensors.remove(*stored);
        }
        if self.tensors.contains_key(&name) {
            return Err(self.wrong(&name, "expected once, found twice".to_owned()));
        }
        self.tensors.insert(name, tensor);
        Ok(())
    }

    pub(crate) fn wrong(&self, name: &str, what: String) -> LoadError {
        LoadError::format(self.origin_of(name), format!("tensor `{name}`: {what}"))
    }
}
