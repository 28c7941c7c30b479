//! Views of matrices whose rows lie a stride apart, so that threads can write disjoint parts of one buffer.

use std::marker::PhantomData;
use std::ops::Range;

/// A shared view, `[rows, cols]`.
#[derive(Clone, Copy)]
pub struct Mat<'a> {
    data: *const f32,
    rows: usize,
    cols: usize,
    stride: usize,
    borrow: PhantomData<&'a [f32]>,
}

/// An exclusive view, `[rows, cols]`.
pub struct MatMut<'a> {
    data: *mut f32,
    rows: usize,
    cols: usize,
    stride: usize,
    borrow: PhantomData<&'a mut [f32]>,
}

fn check(len: usize, rows: usize, cols: usize, stride: usize) {
    let need = if rows == 0 { 0 } else { (rows - 1) * stride + cols };
    assert!(cols <= stride && need <= len, "{rows} rows of {cols}, {stride} apart, do not fit into {len}");
}

impl<'a> Mat<'a> {
    /// Rows of `cols` values, `stride` apart.
    ///
    /// # Panics
    /// If they do not fit into the slice.
    pub fn new(data: &'a [f32], rows: usize, cols: usize, stride: usize) -> Self {
        check(data.len(), rows, cols, stride);
        Self { data: data.as_ptr(), rows, cols, stride, borrow: PhantomData }
    }

    /// A view of memory that somebody else owns.
    ///
    /// # Safety
    /// For `'a`, the elements of all rows are readable and nobody writes them.
    pub unsafe fn from_raw(data: *const f32, rows: usize, cols: usize, stride: usize) -> Self {
        Self { data, rows, cols, stride, borrow: PhantomData }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Width of a row.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// One row.
    ///
    /// # Panics
    /// If there is no such row.
    #[inline(always)]
    pub fn row(&self, row: usize) -> &'a [f32] {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        // SAFETY: the constructor vouches for all rows for 'a.
        unsafe { std::slice::from_raw_parts(self.data.add(row * self.stride), self.cols) }
    }

    /// Some of the columns.
    ///
    /// # Panics
    /// If there are no such columns.
    pub fn columns(&self, cols: Range<usize>) -> Self {
        assert!(cols.start <= cols.end && cols.end <= self.cols, "columns {cols:?} of {}", self.cols);
        // SAFETY: a part of a valid view is valid.
        unsafe { Self::from_raw(self.data.add(cols.start), self.rows, cols.len(), self.stride) }
    }
}

impl<'a> MatMut<'a> {
    /// Rows of `cols` values, `stride` apart.
    ///
    /// # Panics
    /// If they do not fit into the slice.
    pub fn new(data: &'a mut [f32], rows: usize, cols: usize, stride: usize) -> Self {
        check(data.len(), rows, cols, stride);
        Self { data: data.as_mut_ptr(), rows, cols, stride, borrow: PhantomData }
    }

    /// A view of memory that somebody else owns.
    ///
    /// # Safety
    /// For `'a`, the elements of all rows are readable and writable and nobody else touches them.
    pub unsafe fn from_raw(data: *mut f32, rows: usize, cols: usize, stride: usize) -> Self {
        Self { data, rows, cols, stride, borrow: PhantomData }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Width of a row.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// One row.
    ///
    /// # Panics
    /// If there is no such row.
    #[inline(always)]
    pub fn row(&mut self, row: usize) -> &mut [f32] {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        // SAFETY: the constructor vouches for all rows for 'a, and self is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(row * self.stride), self.cols) }
    }
}
